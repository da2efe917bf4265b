"""Convolution, batch normalisation and activation in one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .overwriting import may_overwrite

__all__ = ["ConvBNReLU"]

_ACTIVATIONS = ["relu", "relu6"]


class ConvBNReLU(nn.Module):
    """``activation(norm(conv(x)))``, the "CBR" unit of ThreshNet and HarDNet.

    The convolution has no bias and is padded by ``kernel_size // 2`` on every side.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, an odd number.
        stride: Step of the convolution, the same in both directions.
        activation: ``"relu"`` (ThreshNet) or ``"relu6"`` (HarDNet).

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``,
        in any floating dtype and memory format that :class:`torch.nn.Conv2d` takes.

    Raises:
        ValueError: ``kernel_size`` is even or ``activation`` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size is {kernel_size}: expected an odd number")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: expected one of {_ACTIVATIONS}")
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ...)``."""
        x = self.norm(self.conv(x))
        inplace = False if torch.jit.is_scripting() else may_overwrite(self.norm, x)
        if self.activation == "relu":
            return F.relu(x, inplace=inplace)
        if self.activation == "relu6":
            return F.relu6(x, inplace=inplace)
        raise ValueError("activation is " + self.activation + ": expected 'relu' or 'relu6'")

    def extra_repr(self) -> str:
        """Shown in the printed form of the module."""
        return f"activation={self.activation}"
