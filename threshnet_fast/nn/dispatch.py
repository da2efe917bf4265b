"""The slot through which a network asks for a fused run of itself.

Networks know nothing of plans and engines, which know networks: what runs them fused is put here
when the package is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["FusedRun", "fill", "fused_run"]


class FusedRun(Protocol):
    """Runs one model, and keeps what it has made for it."""

    def __call__(self, model: Any, x: Tensor, *, head: bool) -> Tensor | None:
        """Runs the model fused, or returns None where it must run as the modules that it is.

        Args:
            model: The model, always the same.
            x: Its input, already checked.
            head: Whether to return the logits rather than the last features.
        """


class _Plain:
    """No model runs fused."""

    def __call__(self, model: nn.Module, x: Tensor, *, head: bool) -> None:
        return None


_make: Callable[[], FusedRun] = _Plain


def fill(make: Callable[[], FusedRun]) -> None:
    """Says what runs models fused that are made from now on.

    Args:
        make: Makes what runs one of them.
    """
    global _make
    _make = make


def fused_run() -> FusedRun:
    """Returns what runs one model fused."""
    return _make()
