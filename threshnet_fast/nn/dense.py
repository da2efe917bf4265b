"""The densely connected layers and block of DenseNet; ThreshNet's early blocks have the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .overwriting import may_overwrite

__all__ = ["DenseBlock", "DenseLayer", "PlainDenseLayer"]


class DenseLayer(nn.Module):
    """Appends ``growth_rate`` new channels to its input.

    ``cat([x, conv2(relu(norm2(conv1(relu(norm1(x))))))], 1)`` with a 1x1 ``conv1`` to
    ``bottleneck * growth_rate`` channels and a 3x3 ``conv2`` padded by one, both without bias
    (DenseNet-B, section 3 of "Densely Connected Convolutional Networks").

    Args:
        in_channels: Channels of the input: everything the block has produced so far.
        growth_rate: Channels that this layer adds.
        bottleneck: Width of the bottleneck as a multiple of ``growth_rate``.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, in_channels + growth_rate, H, W)``, in any floating
        dtype and memory format that :class:`torch.nn.Conv2d` takes.
    """

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: int = 4) -> None:
        super().__init__()
        width = bottleneck * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.out_channels = in_channels + growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """The input followed by the new channels, ``(N, in_channels + growth_rate, H, W)``."""
        new = self.norm1(x)
        inplace = False if torch.jit.is_scripting() else may_overwrite(self.norm1, new)
        new = self.norm2(self.conv1(F.relu(new, inplace=inplace)))
        inplace = False if torch.jit.is_scripting() else may_overwrite(self.norm2, new)
        return torch.cat([x, self.conv2(F.relu(new, inplace=inplace))], 1)


class PlainDenseLayer(nn.Module):
    """Appends ``growth_rate`` new channels to its input, without a bottleneck.

    ``cat([x, conv1(relu(norm1(x)))], 1)`` with a 3x3 ``conv1`` padded by one and without bias.

    Args:
        in_channels: Channels of the input: everything the block has produced so far.
        growth_rate: Channels that this layer adds.

    Shape:
        As that of :class:`DenseLayer`.
    """

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)
        self.out_channels = in_channels + growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """The input followed by the new channels, ``(N, in_channels + growth_rate, H, W)``."""
        new = self.norm1(x)
        inplace = False if torch.jit.is_scripting() else may_overwrite(self.norm1, new)
        return torch.cat([x, self.conv1(F.relu(new, inplace=inplace))], 1)


class DenseBlock(nn.Sequential):
    """Dense layers one after the other, ``denselayer1`` to ``denselayer<num_layers>``.

    Args:
        in_channels: Channels of the input.
        num_layers: Number of layers.
        growth_rate: Channels that each layer adds.
        bottleneck: Passed to :class:`DenseLayer`; 0 for :class:`PlainDenseLayer`.

    Attributes:
        out_channels: Channels of the output.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``, in any floating dtype and memory
        format that :class:`torch.nn.Conv2d` takes.

    Raises:
        ValueError: ``num_layers`` is not positive.
    """

    def __init__(
        self, in_channels: int, num_layers: int, growth_rate: int, bottleneck: int = 4
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: expected 1 or more")
        for index in range(num_layers):
            channels = in_channels + index * growth_rate
            layer = (
                DenseLayer(channels, growth_rate, bottleneck)
                if bottleneck
                else PlainDenseLayer(channels, growth_rate)
            )
            self.add_module(f"denselayer{index + 1}", layer)
        self.out_channels = in_channels + num_layers * growth_rate
