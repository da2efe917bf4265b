"""Plain PyTorch as an engine: it takes everything and prepares nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Engine, Purpose
from .registry import register

__all__ = ["ENGINE", "ReferenceEngine"]


class ReferenceEngine(Engine):
    """The modules and formulas as they are."""

    name = "reference"
    fused = False
    max_kept_bytes = 0

    def unavailable_reason(self) -> str | None:
        """See :meth:`.base.Engine.unavailable_reason`."""
        return None

    def device_type(self) -> str:
        """Any."""
        raise NotImplementedError

    def describe(self, x: Tensor) -> str:
        """See :meth:`.base.Engine.describe`."""
        return f"{x.dtype} on {x.device}, plain PyTorch"

    def objection(
        self,
        x: Tensor,
        dtype: torch.dtype | None = None,
        purpose: Purpose = Purpose.OPERATOR,
    ) -> Exception | None:
        """See :meth:`.base.Engine.objection`."""
        return None


ENGINE = register(ReferenceEngine())
"""The one engine of this file."""
