"""What all engines have in common."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

__all__ = ["CompilationFailed", "Objection", "PreparedPlan", "WantsGradients"]


class PreparedPlan(Protocol):
    """A plan that a backend has prepared; call it with images and the weights packed for it."""

    backend: str

    def describe(self) -> str:
        """One line: what runs it."""

    @property
    def algorithms(self) -> list[str]:
        """How each step is computed."""

    def __call__(self, x: Tensor, packed: Any) -> Tensor:
        """Runs the plan."""


class Objection(Exception):
    """Why a call cannot run fused, in one line."""


class WantsGradients(Objection):
    """Why a call cannot run as a plan: it is one of a training."""


class CompilationFailed(RuntimeError):
    """Triton cannot compile a kernel for this device, or the device cannot hold it."""
