"""Whether an activation may overwrite what a norm returned."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["may_overwrite"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def may_overwrite(norm: nn.Module, output: Tensor) -> bool:
    """Whether nobody but the caller can hold what a module has just returned.

    Not so where hooks may keep it or wait for its gradient, where a tracer records it, or where the
    module is another than a BatchNorm, which always returns a new tensor.

    Args:
        norm: The module.
        output: What it returned.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and type(output) is Tensor
        and not any(getattr(norm, name) for name in _HOOKS)
        and not any(getattr(torch_module, f"_global{name}") for name in _HOOKS)
    )
