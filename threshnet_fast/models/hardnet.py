"""HarDNet: harmonic blocks throughout, with depthwise convolutions in the DS variants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..nn import ConvBNReLU, DepthwiseConvBN, HarmonicBlock
from .arguments import flag, positive, probability, stages
from .network import FlatNetwork, Options
from .registry import register_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HarDNet", "HarDNet39DS", "HarDNet68", "HarDNet68DS", "HarDNet85"]

_ACTIVATION = "relu6"


class HarDNet(FlatNetwork):
    """The general HarDNet ("HarDNet: A Low Memory Traffic Network").

    A stem (3x3 stride 2, 3x3, downsampling), then one stage per entry of ``blocks``: a harmonic
    block, a 1x1 transition and, where ``downsample`` says so, downsampling again; last global
    average pooling and a linear classifier. The activation is ReLU6. Downsampling is max pooling,
    3x3 with stride 2 in the stem and 2x2 in the stages.

    With ``depthwise``, the DS variant, the second convolution of the stem is 1x1, a harmonic
    block's layers are a 1x1 convolution and a depthwise 3x3 without activation, and downsampling is
    a depthwise 3x3 convolution of stride 2 with BatchNorm.

    All modules lie in one flat list, ``base``, in the order in which they run; the parameter names
    are those of published HarDNet checkpoints. ``base[-1]`` is the head: pooling, flattening, an
    identity in the place of a dropout, classifier.

    Args:
        first_channels: Output channels of the two stem convolutions.
        blocks: Number of layers in each block.
        transitions: Output channels of the 1x1 transition after each block.
        downsample: Whether downsampling follows each transition.
        growth_rates: Growth rate of each block.
        multiplier: Channel multiplier of the harmonic blocks.
        depthwise: Whether to build the DS variant.
        block_drop_rate: Probability of dropout before the last transition, in training; 0 for no
            module there, which moves those behind it.
        num_classes: As in :class:`~threshnet_fast.models.Network`, which has the attributes and
            shapes too.
        in_chans: As there.
        drop_rate: As there.
        global_pool: As there.

    Attributes:
        feature_info: As there; of each stage, the transition, before any downsampling.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or the per-block arguments differ in length.
    """

    head_padding = 1

    def __init__(
        self,
        *,
        first_channels: Iterable[int] = (32, 64),
        blocks: Iterable[int],
        transitions: Iterable[int],
        downsample: Iterable[bool],
        growth_rates: Iterable[int],
        multiplier: float = 1.7,
        depthwise: bool = False,
        block_drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, global_pool)
        first_channels, blocks, transitions, downsample, growth_rates = stages(
            first_channels, blocks, transitions, downsample, growth_rates
        )
        multiplier = positive("multiplier", multiplier)
        depthwise = flag("depthwise", depthwise)
        block_drop_rate = probability("block_drop_rate", block_drop_rate)

        channels = first_channels[1]
        base: list[nn.Module] = [
            ConvBNReLU(self.in_chans, first_channels[0], stride=2, activation=_ACTIVATION),
            ConvBNReLU(first_channels[0], channels, 1 if depthwise else 3, activation=_ACTIVATION),
            DepthwiseConvBN(channels, stride=2)
            if depthwise
            else nn.MaxPool2d(3, stride=2, padding=1),
        ]
        self._add_feature_info(channels, 2, "base.1")
        reduction = 4
        for index, num_layers in enumerate(blocks):
            block = HarmonicBlock(
                channels, growth_rates[index], multiplier, num_layers, _ACTIVATION, depthwise
            )
            base.append(block)
            if block_drop_rate and index == len(blocks) - 1:
                base.append(nn.Dropout(block_drop_rate))
            channels = transitions[index]
            base.append(ConvBNReLU(block.out_channels, channels, 1, activation=_ACTIVATION))
            self._add_feature_info(channels, reduction, f"base.{len(base) - 1}")
            if downsample[index]:
                base.append(
                    DepthwiseConvBN(channels, stride=2) if depthwise else nn.MaxPool2d(2, stride=2)
                )
                reduction *= 2
        self._finish_base(base, channels, reduction)


@register_model("hardnet39ds")
class HarDNet39DS(HarDNet):
    """HarDNet-39DS: 3.49 M parameters, 0.43 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`HarDNet`.
        drop_rate: As in :class:`HarDNet`; published networks were trained with 0.05.
        **options: ``in_chans`` and ``global_pool`` as in :class:`HarDNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.05, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            first_channels=(24, 48),
            blocks=(4, 16, 8, 4),
            transitions=(96, 320, 640, 1024),
            downsample=(True, True, True, False),
            growth_rates=(16, 20, 64, 160),
            multiplier=1.6,
            depthwise=True,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **options,
        )


@register_model("hardnet68")
class HarDNet68(HarDNet):
    """HarDNet-68: 17.57 M parameters, 4.25 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`HarDNet`.
        drop_rate: As in :class:`HarDNet`; published networks were trained with 0.1.
        **options: ``in_chans`` and ``global_pool`` as in :class:`HarDNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.1, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            blocks=(8, 16, 16, 16, 4),
            transitions=(128, 256, 320, 640, 1024),
            downsample=(True, False, True, True, False),
            growth_rates=(14, 16, 20, 40, 160),
            num_classes=num_classes,
            drop_rate=drop_rate,
            **options,
        )


@register_model("hardnet68ds")
class HarDNet68DS(HarDNet):
    """HarDNet-68DS: 4.18 M parameters, 0.78 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`HarDNet`.
        drop_rate: As in :class:`HarDNet`; published networks were trained with 0.05.
        **options: ``in_chans`` and ``global_pool`` as in :class:`HarDNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.05, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            blocks=(8, 16, 16, 16, 4),
            transitions=(128, 256, 320, 640, 1024),
            downsample=(True, False, True, True, False),
            growth_rates=(14, 16, 20, 40, 160),
            depthwise=True,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **options,
        )


@register_model("hardnet85")
class HarDNet85(HarDNet):
    """HarDNet-85: 36.67 M parameters, 9.07 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`HarDNet`.
        drop_rate: As in :class:`HarDNet`; published networks were trained with 0.2, and always
            with dropout of 0.1 before the last transition.
        **options: ``in_chans`` and ``global_pool`` as in :class:`HarDNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.2, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            first_channels=(48, 96),
            blocks=(8, 16, 16, 16, 16, 4),
            transitions=(192, 256, 320, 480, 720, 1280),
            downsample=(True, False, True, False, True, False),
            growth_rates=(24, 24, 28, 36, 48, 256),
            block_drop_rate=0.1,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **options,
        )
