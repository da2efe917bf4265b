"""Depthwise convolution: the cheap half of a separable one, and downsampling without pooling."""

from __future__ import annotations

from torch import Tensor, nn

from .conv import ConvBNReLU

__all__ = ["DepthwiseConvBN", "PointwiseDepthwise"]


class DepthwiseConvBN(nn.Module):
    """``norm(dwconv(x))``: a 3x3 convolution of every channel with itself alone, no activation.

    The convolution has no bias and is padded by 1 on every side.

    Args:
        channels: Channels of the input and of the output.
        stride: Step of the convolution, the same in both directions.

    Shape:
        ``(N, channels, H, W)`` to ``(N, channels, ceil(H / stride), ceil(W / stride))``, in any
        floating dtype and memory format that :class:`torch.nn.Conv2d` takes.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(
            channels, channels, 3, stride, padding=1, groups=channels, bias=False
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to ``(N, channels, ceil(H / stride), ceil(W / stride))``."""
        normalised: Tensor = self.norm(self.dwconv(x))
        return normalised


class PointwiseDepthwise(nn.Module):
    """A 1x1 :class:`ConvBNReLU`, ``layer1``, then a :class:`DepthwiseConvBN`, ``layer2``.

    The layer of the harmonic blocks of HarDNet's DS variants, in place of a 3x3 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        activation: Passed to :class:`ConvBNReLU`.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``, in any floating dtype and memory
        format that :class:`torch.nn.Conv2d` takes.
    """

    def __init__(self, in_channels: int, out_channels: int, activation: str = "relu") -> None:
        super().__init__()
        self.layer1 = ConvBNReLU(in_channels, out_channels, 1, activation=activation)
        self.layer2 = DepthwiseConvBN(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``."""
        filtered: Tensor = self.layer2(self.layer1(x))
        return filtered
