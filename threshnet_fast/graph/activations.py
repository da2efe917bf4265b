"""Activations that graphs know: those of modules without parameters.

To teach graphs another one, add it here. Which of them an engine computes is not said here: plans
refuse what :data:`threshnet_fast.plan.codes.ACTIVATIONS` lacks, and it runs as plain PyTorch.
"""

from __future__ import annotations

from torch import nn

__all__ = ["ACTIVATIONS", "ACTIVATION_SETTINGS", "kind_of", "slope_of"]

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Hardswish: "hardswish",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
}
"""Names in :mod:`torch.nn.functional`, by class."""

ACTIVATION_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(ACTIVATIONS, ()),
    nn.LeakyReLU: ("negative_slope",),
    nn.ReLU6: ("min_val", "max_val"),
}
"""Their attributes that decide what they compute."""


def kind_of(module: nn.Module) -> str:
    """The name of a module's function, by the class of ``ACTIVATIONS`` that it is derived from."""
    return next(kind for known, kind in ACTIVATIONS.items() if isinstance(module, known))


def slope_of(module: nn.Module) -> float:
    """The slope below zero of a leaky ReLU; 0 of any other activation."""
    return float(module.negative_slope) if isinstance(module, nn.LeakyReLU) else 0.0
