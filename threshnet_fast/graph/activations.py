"""Activations that graphs know: those of modules without parameters or settings.

To teach graphs another one, add it here. Which of them an engine computes is not said here: plans
refuse what :data:`threshnet_fast.plan.codes.ACTIVATIONS` lacks, and it runs as plain PyTorch.
"""

from __future__ import annotations

from torch import nn

__all__ = ["ACTIVATIONS", "kind_of"]

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Hardswish: "hardswish",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
"""Names in :mod:`torch.nn.functional`, by class."""


def kind_of(module: nn.Module) -> str:
    """The name of a module's function, by the class of ``ACTIVATIONS`` that it is derived from."""
    return next(kind for known, kind in ACTIVATIONS.items() if isinstance(module, known))
