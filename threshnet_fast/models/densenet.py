"""DenseNet, with the layout and the parameter names of torchvision's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import DenseBlock, DenseTransition
from .arguments import flag, integer, integers, layers, positive
from .network import Network, Options
from .registry import register_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DenseNet",
    "DenseNet121",
    "DenseNet161",
    "DenseNet169",
    "DenseNet201",
    "DenseNetBC100",
]


class DenseNet(Network):
    """The general DenseNet ("Densely Connected Convolutional Networks").

    A stem (7x7 stride 2, BatchNorm, ReLU, max pooling 3x3 stride 2), then blocks of dense layers
    with a transition (BatchNorm, ReLU, 1x1, average pooling 2x2) between every two, BatchNorm and
    ReLU; last global average pooling and a linear classifier.

    Parameter names are torchvision's, so that its checkpoints load with ``strict=True``.

    Args:
        first_channels: Output channels of the first convolution.
        blocks: Number of layers in each block.
        growth_rate: Channels that each layer adds.
        bottleneck: Width of a layer's bottleneck as a multiple of ``growth_rate``; 0 for layers of
            one 3x3 convolution without bottleneck.
        compression: Output channels of a transition over those of its input, at most 1.
        transitions: Output channels of each transition instead; None for those of ``compression``.
        small_stem: Start with nothing but a 3x3 convolution of stride 1, for images of 32x32.
        num_classes: As in :class:`~threshnet_fast.models.Network`, which has the attributes and
            shapes too.
        in_chans: As there.
        drop_rate: As there; torchvision has dropout within the layers instead.
        global_pool: As there.

    Attributes:
        feature_info: As there; of each stage, the block, and the last activation of the last one.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        first_channels: int = 64,
        blocks: Iterable[int],
        growth_rate: int = 32,
        bottleneck: int = 4,
        compression: float = 0.5,
        transitions: Iterable[int] | None = None,
        small_stem: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, global_pool)
        channels = integer("first_channels", first_channels)
        blocks = layers(blocks)
        growth_rate = integer("growth_rate", growth_rate)
        bottleneck = integer("bottleneck", bottleneck, minimum=0)
        compression = positive("compression", compression)
        if compression > 1:
            raise ValueError(f"compression is {compression}: expected at most 1")
        small_stem = flag("small_stem", small_stem)
        if transitions is not None:
            transitions = integers("transitions", transitions)
            if len(transitions) != len(blocks) - 1:
                raise ValueError(
                    f"transitions has {len(transitions)} entries: expected {len(blocks) - 1}, one "
                    "between every two blocks"
                )

        self.features = nn.Sequential()
        if small_stem:
            conv = nn.Conv2d(self.in_chans, channels, 3, padding=1, bias=False)
            self.features.add_module("conv0", conv)
            self._add_feature_info(channels, 1, "features.conv0")
            reduction = 1
        else:
            conv = nn.Conv2d(self.in_chans, channels, 7, stride=2, padding=3, bias=False)
            self.features.add_module("conv0", conv)
            self.features.add_module("norm0", nn.BatchNorm2d(channels))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
            self._add_feature_info(channels, 2, "features.relu0")
            reduction = 4
        for index, num_layers in enumerate(blocks, start=1):
            block = DenseBlock(channels, num_layers, growth_rate, bottleneck)
            self.features.add_module(f"denseblock{index}", block)
            channels = block.out_channels
            if index < len(blocks):
                self._add_feature_info(channels, reduction, f"features.denseblock{index}")
                compressed = int(channels * compression)
                if transitions is not None:
                    compressed = transitions[index - 1]
                if compressed < 1:
                    raise ValueError(
                        f"compression is {compression}: a transition would compress {channels} "
                        "channels to none"
                    )
                transition = DenseTransition(channels, compressed)
                self.features.add_module(f"transition{index}", transition)
                channels = compressed
                reduction *= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.add_module("relu5", nn.ReLU())
        self._add_feature_info(channels, reduction, "features.relu5")
        self.num_features = channels
        self.classifier = self._make_classifier()
        self._finish(reduction, 32 if small_stem else 224, "features.conv0", "classifier")

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity where ``num_classes`` is 0."""
        return self.classifier

    @property
    def _first_weight(self) -> Tensor:
        return cast(nn.Conv2d, self.features.conv0).weight

    def _stages(self) -> list[tuple[str, nn.Module]]:
        return [(f"features.{name}", module) for name, module in self.features.named_children()]

    def _containers(self) -> list[tuple[str, nn.Sequential]]:
        return [("features", self.features)]

    def _plain_features(self, x: Tensor) -> Tensor:
        # As a whole, so that its hooks run.
        features: Tensor = self.features(x)
        return features

    def _run_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        if self.global_pool == "avg":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.classifier(x)
        return x

    def _replace_head(self) -> None:
        weight = self._first_weight
        classifier = self._make_classifier().to(weight.device, weight.dtype)
        self.classifier = classifier.train(self.training)


@register_model("densenet121")
class DenseNet121(DenseNet):
    """DenseNet-121: 7.98 M parameters, 2.83 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`DenseNet`.
        drop_rate: As in :class:`DenseNet`.
        **options: ``in_chans`` and ``global_pool`` as in :class:`DenseNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            blocks=(6, 12, 24, 16), num_classes=num_classes, drop_rate=drop_rate, **options
        )


@register_model("densenet161")
class DenseNet161(DenseNet):
    """DenseNet-161, growth rate 48: 28.68 M parameters, 7.73 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`DenseNet`.
        drop_rate: As in :class:`DenseNet`.
        **options: ``in_chans`` and ``global_pool`` as in :class:`DenseNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            first_channels=96,
            blocks=(6, 12, 36, 24),
            growth_rate=48,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **options,
        )


@register_model("densenet169")
class DenseNet169(DenseNet):
    """DenseNet-169: 14.15 M parameters, 3.36 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`DenseNet`.
        drop_rate: As in :class:`DenseNet`.
        **options: ``in_chans`` and ``global_pool`` as in :class:`DenseNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            blocks=(6, 12, 32, 32), num_classes=num_classes, drop_rate=drop_rate, **options
        )


@register_model("densenet201")
class DenseNet201(DenseNet):
    """DenseNet-201: 20.01 M parameters, 4.29 GMAC at 224x224, with 1000 classes.

    Args:
        num_classes: As in :class:`DenseNet`.
        drop_rate: As in :class:`DenseNet`.
        **options: ``in_chans`` and ``global_pool`` as in :class:`DenseNet`.
    """

    def __init__(
        self, num_classes: int = 1000, *, drop_rate: float = 0.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            blocks=(6, 12, 48, 32), num_classes=num_classes, drop_rate=drop_rate, **options
        )


@register_model("densenet_bc_100")
class DenseNetBC100(DenseNet):
    """DenseNet-BC of 100 layers, growth rate 12, for images of 32x32.

    0.77 M parameters with 10 classes, 0.29 GMAC at 32x32.

    Args:
        num_classes: As in :class:`DenseNet`.
        drop_rate: As in :class:`DenseNet`.
        **options: ``in_chans`` and ``global_pool`` as in :class:`DenseNet`.
    """

    def __init__(
        self, num_classes: int = 10, *, drop_rate: float = 0.0, **options: Unpack[Options]
    ) -> None:
        super().__init__(
            first_channels=24,
            blocks=(16, 16, 16),
            growth_rate=12,
            small_stem=True,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **options,
        )
