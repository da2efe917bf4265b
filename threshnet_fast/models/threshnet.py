"""ThreshNet: dense blocks up to a threshold, harmonic blocks after it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..nn import ConvBNReLU, DenseLayer, HarmonicBlock
from .arguments import integer, positive, stages
from .network import FlatNetwork
from .registry import register_model

__all__ = ["ThreshNet", "ThreshNet79", "ThreshNet95"]


class ThreshNet(FlatNetwork):
    """The general ThreshNet.

    A stem (3x3 stride 2, 3x3, max pooling 3x3 stride 2), then one stage per entry of ``blocks``:
    a block of dense layers (the first ``threshold`` blocks) or a harmonic block (the rest), a 1x1
    transition and, where ``downsample`` says so, max pooling 2x2; last global average pooling and
    a linear classifier.

    All modules lie in one flat list, ``base``, in the order in which they run; the parameter names
    are those of published ThreshNet checkpoints. ``base[-1]`` is the head: pooling, flattening,
    classifier.

    Args:
        first_channels: Output channels of the two stem convolutions.
        blocks: Number of layers in each block.
        transitions: Output channels of the 1x1 transition after each block.
        downsample: Whether a 2x2 max pooling follows each transition.
        threshold: Number of dense blocks; the blocks from this index on are harmonic.
        growth_rates: Growth rate of each block.
        multiplier: Channel multiplier of the harmonic blocks.
        num_classes: As in :class:`~threshnet_fast.models.Network`, which has the attributes and
            shapes too.
        in_chans: As there.
        drop_rate: As there.
        global_pool: As there.

    Attributes:
        feature_info: As there; of each stage, the transition, before any pooling.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or the per-block arguments differ in length.
    """

    def __init__(
        self,
        *,
        first_channels: Iterable[int] = (32, 64),
        blocks: Iterable[int],
        transitions: Iterable[int],
        downsample: Iterable[bool],
        threshold: int = 3,
        growth_rates: Iterable[int],
        multiplier: float = 1.7,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, global_pool)
        first_channels, blocks, transitions, downsample, growth_rates = stages(
            first_channels, blocks, transitions, downsample, growth_rates
        )
        threshold = integer("threshold", threshold, minimum=0)
        if threshold > len(blocks):
            raise ValueError(
                f"threshold is {threshold}: expected 0 to {len(blocks)}, the number of blocks"
            )
        multiplier = positive("multiplier", multiplier)

        base: list[nn.Module] = [
            ConvBNReLU(self.in_chans, first_channels[0], stride=2),
            ConvBNReLU(first_channels[0], first_channels[1]),
        ]
        self._add_feature_info(first_channels[1], 2, "base.1")
        base.append(nn.MaxPool2d(3, stride=2, padding=1))
        channels, reduction = first_channels[1], 4
        for index, num_layers in enumerate(blocks):
            growth_rate = growth_rates[index]
            if index < threshold:
                for _ in range(num_layers):
                    dense = DenseLayer(channels, growth_rate)
                    base.append(dense)
                    channels = dense.out_channels
            else:
                harmonic = HarmonicBlock(channels, growth_rate, multiplier, num_layers)
                base.append(harmonic)
                channels = harmonic.out_channels
            base.append(ConvBNReLU(channels, transitions[index], kernel_size=1))
            channels = transitions[index]
            self._add_feature_info(channels, reduction, f"base.{len(base) - 1}")
            if downsample[index]:
                base.append(nn.MaxPool2d(2, stride=2))
                reduction *= 2
        self._finish_base(base, channels, reduction)


@register_model("threshnet79")
class ThreshNet79(ThreshNet):
    """ThreshNet with 79 convolutions: 14.37 M parameters with 10 classes, 3.42 GMAC at 224x224.

    Args:
        num_classes: As in :class:`ThreshNet`.
        in_chans: As in :class:`ThreshNet`.
        drop_rate: As in :class:`ThreshNet`.
        global_pool: As in :class:`ThreshNet`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(
            blocks=(6, 8, 12, 16, 4),
            transitions=(128, 192, 288, 480, 960),
            downsample=(True, True, False, True, False),
            growth_rates=(32, 32, 32, 40, 160),
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


@register_model("threshnet95")
class ThreshNet95(ThreshNet):
    """ThreshNet with 95 convolutions: 16.19 M parameters with 10 classes, 4.03 GMAC at 224x224.

    Args:
        num_classes: As in :class:`ThreshNet`.
        in_chans: As in :class:`ThreshNet`.
        drop_rate: As in :class:`ThreshNet`.
        global_pool: As in :class:`ThreshNet`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(
            blocks=(6, 12, 16, 16, 4),
            transitions=(128, 256, 384, 480, 960),
            downsample=(True, True, False, True, False),
            growth_rates=(32, 32, 32, 40, 160),
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
