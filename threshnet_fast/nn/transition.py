"""What DenseNet has between two blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .overwriting import may_overwrite

__all__ = ["DenseTransition"]


class DenseTransition(nn.Module):
    """``pool(conv(relu(norm(x))))``: a 1x1 convolution and average pooling 2x2.

    The convolution has no bias. The pooling drops an odd last row and column.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H // 2, W // 2)``, in any floating dtype
        and memory format that :class:`torch.nn.Conv2d` takes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H // 2, W // 2)``."""
        x = self.norm(x)
        inplace = False if torch.jit.is_scripting() else may_overwrite(self.norm, x)
        pooled: Tensor = self.pool(self.conv(F.relu(x, inplace=inplace)))
        return pooled
