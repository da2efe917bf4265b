"""``x * scale + shift`` for every channel, in float64: what BatchNorm is in evaluation.

Tensors may be on the meta device, where nothing is calculated: arithmetic there imports a compiler
at its first use, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..graph.ir import UnsupportedModule

__all__ = ["Affine", "folded", "of_norm", "single"]


@dataclass(frozen=True)
class Affine:
    """Scale and shift of channels.

    Attributes:
        scale: ``[C]``, float64.
        shift: ``[C]``, float64.
    """

    scale: Tensor
    shift: Tensor

    @staticmethod
    def identity(channels: int, device: torch.device | None) -> Affine:
        """Returns what changes nothing."""
        scale = torch.ones(channels, dtype=torch.float64, device=device)
        return Affine(scale, torch.zeros_like(scale) if device is None else scale)

    def part(self, begin: int, end: int) -> Affine:
        """Returns that of channels ``[begin, end)``."""
        return Affine(self.scale[begin:end], self.shift[begin:end])

    def then(self, other: Affine) -> Affine:
        """Returns what this and then another does."""
        if self.scale.is_meta:
            return self
        return Affine(self.scale * other.scale, self.shift * other.scale + other.shift)


def of_norm(norm: nn.BatchNorm2d, name: str, double: Callable[[Tensor], Tensor]) -> Affine:
    """Returns what a BatchNorm is in evaluation.

    Args:
        norm: The BatchNorm.
        name: Its name in the network.
        double: Makes float64 of its tensors.

    Raises:
        UnsupportedModule: It keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedModule(f"{name} keeps no running statistics, so it cannot be folded")
    scale = double(norm.running_var)
    if scale.is_meta:
        return Affine(scale, scale)
    scale = torch.rsqrt(scale + norm.eps)
    if norm.weight is not None:
        scale = scale * double(norm.weight)
    shift = -double(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + double(norm.bias)
    return Affine(scale, shift)


def folded(
    weight: Tensor, bias: Tensor | None, affine: Affine | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias of a convolution with what follows it folded in.

    Args:
        weight: ``[Co, Ci, kh, kw]``, float64.
        bias: ``[Co]``, float64, or None.
        affine: What is done with its outputs, or None.
    """
    if affine is None:
        return weight, bias
    if weight.is_meta:
        return weight, affine.shift
    shift = affine.shift if bias is None else bias * affine.scale + affine.shift
    return weight * affine.scale[:, None, None, None], shift


def single(tensor: Tensor) -> Tensor:
    """Returns a float32 copy that shares nothing with another tensor."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()
