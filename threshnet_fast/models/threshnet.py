"""ThreshNet: dense blocks up to a threshold, harmonic blocks after it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import ConvBNReLU, DenseLayer, HarmonicBlock
from .registry import register_model
from .validate import check_input

__all__ = ["ThreshNet", "ThreshNet79", "ThreshNet95"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_GLOBAL_POOLS = ("avg", "")


class ThreshNet(nn.Module):
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
        num_classes: Outputs of the classifier; 0 for none: the model returns pooled features.
        in_chans: Channels of the input images.
        drop_rate: Probability of dropout before the classifier, in training.
        global_pool: ``"avg"``, or ``""`` for no pooling, which needs ``num_classes=0``: the model
            then returns the last feature map.

    Attributes:
        num_features: Channels of the last feature map.
        min_size: Smallest height and width of the input: 32, or more where the downsampling
            would otherwise leave no pixel.
        feature_info: For the stem and each stage, in order, a dict with ``num_chs`` (channels),
            ``reduction`` (input size over feature size) and ``module`` (the name of the module
            whose output it is: the transition, before any pooling).
        default_cfg: Input size, normalisation, and the names of the first convolution and of the
            classifier.

    Shape:
        ``(N, in_chans, H, W)`` with ``H`` and ``W`` at least ``min_size``, of the parameters'
        dtype and device and in any memory format, to ``(N, num_classes)``, ``(N, num_features)``
        without classifier, or ``(N, num_features, h, w)`` without pooling.

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
        super().__init__()
        first_channels = _integers("first_channels", first_channels)
        if len(first_channels) != 2:
            raise ValueError(
                f"first_channels has {len(first_channels)} entries: expected 2, one a convolution"
            )
        blocks = _integers("blocks", blocks)
        if not blocks:
            raise ValueError("blocks is empty: expected the number of layers of one block or more")
        transitions = _per_block("transitions", _integers("transitions", transitions), blocks)
        growth_rates = _per_block("growth_rates", _integers("growth_rates", growth_rates), blocks)
        downsample = _per_block("downsample", _flags("downsample", downsample), blocks)
        threshold = _integer("threshold", threshold, minimum=0)
        if threshold > len(blocks):
            raise ValueError(
                f"threshold is {threshold}: expected 0 to {len(blocks)}, the number of blocks"
            )
        multiplier = _real("multiplier", multiplier)
        if not 0 < multiplier < math.inf:
            raise ValueError(f"multiplier is {multiplier}: expected a finite number above 0")
        drop_rate = _real("drop_rate", drop_rate)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}: expected 0 or more and less than 1")

        self.in_chans = _integer("in_chans", in_chans)
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []
        # Imported here because plans know the models.
        from ..fused import FusedForward

        self._fused = FusedForward()

        base: list[nn.Module] = [
            ConvBNReLU(self.in_chans, first_channels[0], stride=2),
            ConvBNReLU(first_channels[0], first_channels[1]),
        ]
        self._add_feature_info(first_channels[1], 2, base)
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
            self._add_feature_info(channels, reduction, base)
            if downsample[index]:
                base.append(nn.MaxPool2d(2, stride=2))
                reduction *= 2

        self.num_features = channels
        self.min_size = max(32, reduction)
        self.num_classes, self.global_pool = _head_arguments(num_classes, global_pool)
        self.base = nn.ModuleList([*base, self._make_head()])
        self.default_cfg: dict[str, Any] = {
            "input_size": (self.in_chans, 224, 224),
            "min_input_size": (self.in_chans, self.min_size, self.min_size),
            "num_classes": self.num_classes,
            "pool_size": (224 // reduction, 224 // reduction),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": _IMAGENET_MEAN,
            "std": _IMAGENET_STD,
            "first_conv": "base.0.conv",
            "classifier": f"base.{len(base)}.2",
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self._initialise_classifier()

    def forward(self, x: Tensor) -> Tensor:
        """Classifies a batch of images.

        Args:
            x: Images, ``(N, in_chans, H, W)``.

        Returns:
            Logits, ``(N, num_classes)``; see the class for models without classifier or pooling.

        Raises:
            TypeError: As :meth:`forward_features`.
            ValueError: As :meth:`forward_features`.
            RuntimeError: As :meth:`forward_features`.
        """
        self._check_input(x)
        if not torch.compiler.is_compiling():
            fused = self._fused(self, x, head=True)
            if fused is not None:
                return fused
        return self.forward_head(self._plain_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, before pooling.

        Args:
            x: Images, ``(N, in_chans, H, W)``.

        Returns:
            ``(N, num_features, h, w)``.

        Raises:
            TypeError: ``x`` is not a dense floating-point tensor of the parameters' dtype.
            ValueError: ``x`` has the wrong rank, number of channels, or size.
            RuntimeError: ``x`` is not on the parameters' device.
        """
        self._check_input(x)
        if not torch.compiler.is_compiling():
            fused = self._fused(self, x, head=False)
            if fused is not None:
                return fused
        return self._plain_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies a feature map.

        Args:
            x: What :meth:`forward_features` returned, ``(N, num_features, h, w)``.
            pre_logits: Stop before the classifier.

        Returns:
            ``(N, num_classes)``, or ``(N, num_features)`` with ``pre_logits`` or without
            classifier; without pooling ``x`` itself.
        """
        pool, flatten, classifier = cast(nn.Sequential, self.base[-1])
        x = flatten(pool(x))
        if self.drop_rate:
            # Functional, so that no module shifts the position of the classifier.
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else classifier(x)

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity where ``num_classes`` is 0."""
        return cast(nn.Sequential, self.base[-1])[2]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one, on the parameters' device and in their dtype.

        Args:
            num_classes: Outputs of the new classifier; 0 for none.
            global_pool: ``"avg"`` or ``""`` as in the constructor; ``None`` keeps the present one.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: ``num_classes`` is negative, or ``global_pool`` is unknown or at odds with
                it.
        """
        if global_pool is None:
            global_pool = self.global_pool
        self.num_classes, self.global_pool = _head_arguments(num_classes, global_pool)
        weight = self._first_weight
        head = self._make_head().to(weight.device, weight.dtype)
        self.base[-1] = head.train(self.training)
        self.default_cfg["num_classes"] = self.num_classes
        self._initialise_classifier()

    @property
    def _first_weight(self) -> Tensor:
        """Stands for the device and dtype of all parameters."""
        return cast(ConvBNReLU, self.base[0]).conv.weight

    def _check_input(self, x: Tensor) -> None:
        check_input(x, self.in_chans, self.min_size, self._first_weight)

    def _plain_features(self, x: Tensor) -> Tensor:
        for module in list(self.base)[:-1]:
            x = module(x)
        return x

    def _make_head(self) -> nn.Sequential:
        pooled = self.global_pool == "avg"
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(),
            nn.Flatten() if pooled else nn.Identity(),
            nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity(),
        )

    def _initialise_classifier(self) -> None:
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Linear):
            nn.init.zeros_(classifier.bias)

    def _add_feature_info(self, channels: int, reduction: int, base: list[nn.Module]) -> None:
        self.feature_info.append(
            {"num_chs": channels, "reduction": reduction, "module": f"base.{len(base) - 1}"}
        )


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


def _integer(name: str, value: Any, minimum: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: expected an integer")
    if number < minimum:
        raise ValueError(f"{name} is {number}: expected {minimum} or more")
    return number


def _sequence(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r}: expected a sequence")
    return list(values)


def _integers(name: str, values: Any) -> list[int]:
    sequence = _sequence(name, values)
    return [_integer(f"{name}[{i}]", value) for i, value in enumerate(sequence)]


def _flags(name: str, values: Any) -> list[bool]:
    flags = _sequence(name, values)
    for i, value in enumerate(flags):
        if value not in (0, 1):
            raise ValueError(f"{name}[{i}] is {value!r}: expected True or False")
    return [bool(value) for value in flags]


def _per_block(name: str, values: list[Any], blocks: list[int]) -> list[Any]:
    if len(values) != len(blocks):
        raise ValueError(
            f"{name} has {len(values)} entries: expected {len(blocks)}, one for each of blocks"
        )
    return values


def _real(name: str, value: Any) -> float:
    try:
        return float(operator.index(value) if not isinstance(value, float) else value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected a number") from None


def _head_arguments(num_classes: Any, global_pool: Any) -> tuple[int, str]:
    if global_pool not in _GLOBAL_POOLS:
        raise ValueError(f"global_pool is {global_pool!r}: expected one of {_GLOBAL_POOLS}")
    classes = _integer("num_classes", num_classes, minimum=0)
    if classes and not global_pool:
        raise ValueError(f"num_classes is {classes}: expected 0, as global_pool is ''")
    return classes, global_pool
