"""The harmonic densely connected block of HarDNet, used by the late blocks of ThreshNet."""

import torch
from torch import Tensor, nn

from .conv import ConvBNReLU
from .depthwise import PointwiseDepthwise

__all__ = ["HarmonicBlock", "harmonic_channels", "harmonic_links"]


def harmonic_links(layer: int) -> list[int]:
    """Layers that a layer of a harmonic block reads, nearest first.

    Layer ``i`` reads layer ``i - 2**j`` for every ``j`` such that ``2**j`` divides ``i``
    ("HarDNet: A Low Memory Traffic Network", section 3.1).

    Args:
        layer: Number of the layer, counted from 1; 0 is the block's input, which reads nothing.

    Raises:
        ValueError: ``layer`` is negative.
    """
    if layer < 0:
        raise ValueError(f"layer is {layer}: expected 0 or more")
    powers = (1 << j for j in range(layer.bit_length()))
    return [layer - power for power in powers if layer % power == 0]


def harmonic_channels(layer: int, growth_rate: int, multiplier: float) -> int:
    """Output channels of a layer of a harmonic block, always even.

    ``growth_rate * multiplier**n`` for a layer that is divisible by 2 ``n`` times, to an even
    number: ``int(int(c + 1) / 2) * 2``.

    Args:
        layer: Number of the layer, counted from 1.
        growth_rate: Channels of the odd layers.
        multiplier: Factor for every power of two that divides ``layer``.
    """
    channels = float(growth_rate)
    for _ in harmonic_links(layer)[1:]:
        # Repeated multiplication rather than a power: the rounding of published checkpoints.
        channels *= multiplier
    return int(channels + 1) // 2 * 2


class HarmonicBlock(nn.Module):
    """A block of 3x3 :class:`ConvBNReLU` layers, each reading O(log n) earlier layers.

    Layer ``i`` (from 1; layer 0 is the block's input) reads the concatenation of the layers
    ``harmonic_links(i)`` and writes ``harmonic_channels(i, ...)`` channels. The block returns the
    concatenation, in order, of its odd layers and its last one.

    Args:
        in_channels: Channels of the input.
        growth_rate: Channels of the odd layers.
        multiplier: Factor on ``growth_rate`` for every power of two that divides the layer.
        num_layers: Number of layers.
        activation: Passed to :class:`ConvBNReLU`.
        depthwise: Whether the layers are :class:`PointwiseDepthwise` instead.

    Attributes:
        links: ``links[i]`` are the layers that layer ``i`` reads; ``links[0]`` is empty.
        channels: ``channels[i]`` are the channels of layer ``i``; ``channels[0]`` is the input's.
        out_layers: The layers that the output is made of, in order.
        out_channels: Channels of the output.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``, in any floating dtype and memory
        format that :class:`torch.nn.Conv2d` takes.

    Raises:
        ValueError: ``num_layers`` is not positive, or a layer would have no channels.
    """

    # Not as text, so that torch.jit.script can read it: an empty list does not tell its type.
    links: list[list[int]]

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        multiplier: float,
        num_layers: int,
        activation: str = "relu",
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: expected 1 or more")
        numbers = range(1, num_layers + 1)
        self.links = [harmonic_links(i) for i in range(num_layers + 1)]
        self.channels: list[int] = [in_channels]
        self.channels += [harmonic_channels(i, growth_rate, multiplier) for i in numbers]
        if min(self.channels) < 1:
            raise ValueError(
                f"growth_rate {growth_rate} and multiplier {multiplier} give layers of "
                f"{self.channels[1:]} channels: expected 1 or more in each"
            )
        self.out_layers: list[int] = [i for i in numbers if i % 2 == 1 or i == num_layers]
        self.out_channels: int = sum(self.channels[i] for i in self.out_layers)
        layer = PointwiseDepthwise if depthwise else ConvBNReLU
        self.layers = nn.ModuleList(
            layer(
                sum(self.channels[k] for k in self.links[i]),
                self.channels[i],
                activation=activation,
            )
            for i in numbers
        )

    def forward(self, x: Tensor) -> Tensor:
        """The odd layers and the last one, ``(N, out_channels, H, W)``."""
        features = [x]
        for index, layer in enumerate(self.layers):
            links = self.links[index + 1]
            features.append(layer(torch.cat([features[k] for k in links], 1)))
        return torch.cat([features[i] for i in self.out_layers], 1)
