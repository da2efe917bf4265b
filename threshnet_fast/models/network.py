"""What all networks have in common: the interface, the head, the fused forward pass."""

from __future__ import annotations

from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import ConvBNReLU
from .arguments import integer, probability
from .layouts import rename_keys
from .validate import check_input

__all__ = ["FlatNetwork", "Network", "Options"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_GLOBAL_POOLS = ("avg", "")
_MIN_SIZE = 32


class Options(TypedDict, total=False):
    """What every network takes beside classes and dropout; see :class:`Network`."""

    in_chans: int
    global_pool: str


class Network(nn.Module):
    """A classifier of images; the base of all networks of this package.

    In evaluation mode and without gradients it runs fused where a backend can, as
    :func:`threshnet_fast.explain` tells; otherwise as the plain PyTorch that its modules are.

    Args:
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
            whose output it is).
        default_cfg: Input size, normalisation, and the names of the first convolution and of the
            classifier.
        checkpoint: What a training on the CPU keeps for the backward pass: None for all feature
            maps, ``"features"`` for those without the dense layers' bottlenecks, which are then
            calculated twice. See :meth:`set_grad_checkpointing`.

    Shape:
        ``(N, in_chans, H, W)`` with ``H`` and ``W`` at least ``min_size``, of the parameters'
        dtype and device and in any memory format, to ``(N, num_classes)``, ``(N, num_features)``
        without classifier, or ``(N, num_features, h, w)`` without pooling.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.
    """

    num_features: int
    min_size: int
    checkpoint: str | None = None

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float, global_pool: str) -> None:
        super().__init__()
        self.in_chans = integer("in_chans", in_chans)
        self.drop_rate = probability("drop_rate", drop_rate)
        self.num_classes, self.global_pool = _head_arguments(num_classes, global_pool)
        self.feature_info: list[dict[str, Any]] = []
        self.default_cfg: dict[str, Any] = {}
        # Imported here because plans know the models.
        from ..fused import FusedForward

        self._fused = FusedForward()

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
        x = self._pool(x)
        if self.drop_rate:
            # Functional, so that no module shifts the position of the classifier.
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time of a training for memory: sets ``checkpoint``.

        Args:
            enable: Whether to keep no bottleneck of a dense layer for the backward pass.
        """
        self.checkpoint = "features" if enable else None

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity where ``num_classes`` is 0."""
        raise NotImplementedError

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
        self._replace_head()
        self.default_cfg["num_classes"] = self.num_classes
        self._initialise_classifier()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        # As BatchNorm does for older files. A hook would be bound to this instance, and a shallow
        # copy would call it after the instance is gone.
        rename_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def _first_weight(self) -> Tensor:
        """Stands for the device and dtype of all parameters."""
        raise NotImplementedError

    def _stages(self) -> list[tuple[str, nn.Module]]:
        """What makes the last feature map: modules in the order in which they run, with names."""
        raise NotImplementedError

    def _pooling(self) -> list[tuple[str, nn.Module]]:
        """The modules that pool, if any do, with names."""
        return []

    def _pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _replace_head(self) -> None:
        """Makes the head anew, as ``num_classes`` and ``global_pool`` are now."""
        raise NotImplementedError

    def _plain_features(self, x: Tensor) -> Tensor:
        for _, module in self._stages():
            x = module(x)
        return x

    def _check_input(self, x: Tensor) -> None:
        check_input(x, self.in_chans, self.min_size, self._first_weight)

    def _finish(self, reduction: int, size: int, first_conv: str, classifier: str) -> None:
        """Sets what follows from the modules, and initialises their weights."""
        self.min_size = max(_MIN_SIZE, reduction)
        self.default_cfg.update(
            input_size=(self.in_chans, size, size),
            min_input_size=(self.in_chans, self.min_size, self.min_size),
            num_classes=self.num_classes,
            pool_size=(size // reduction, size // reduction),
            interpolation="bicubic",
            crop_pct=0.875,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            first_conv=first_conv,
            classifier=classifier,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self._initialise_classifier()

    def _make_classifier(self) -> nn.Module:
        if self.num_classes:
            return nn.Linear(self.num_features, self.num_classes)
        return nn.Identity()

    def _initialise_classifier(self) -> None:
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Linear):
            nn.init.zeros_(classifier.bias)

    def _add_feature_info(self, channels: int, reduction: int, module: str) -> None:
        self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": module})


class FlatNetwork(Network):
    """A network whose modules lie in one flat list, ``base``, in the order in which they run.

    ``base[-1]`` is the head: pooling, flattening, ``head_padding`` modules without parameters, and
    the classifier.

    Args:
        num_classes: As in :class:`Network`.
        in_chans: As in :class:`Network`.
        drop_rate: As in :class:`Network`.
        global_pool: As in :class:`Network`.
    """

    base: nn.ModuleList
    head_padding = 0

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity where ``num_classes`` is 0."""
        return cast(nn.Sequential, self.base[-1])[-1]

    @property
    def _first_weight(self) -> Tensor:
        return cast(ConvBNReLU, self.base[0]).conv.weight

    def _stages(self) -> list[tuple[str, nn.Module]]:
        return [(f"base.{i}", module) for i, module in enumerate(list(self.base)[:-1])]

    def _pooling(self) -> list[tuple[str, nn.Module]]:
        head = list(cast(nn.Sequential, self.base[-1]).children())
        return [(f"base.{len(self.base) - 1}.{i}", m) for i, m in enumerate(head[:-1])]

    def _pool(self, x: Tensor) -> Tensor:
        for _, module in self._pooling():
            x = module(x)
        return x

    def _finish_base(self, base: list[nn.Module], channels: int, reduction: int) -> None:
        """Takes the modules before the head, which give so many channels, and adds the head."""
        self.num_features = channels
        self.base = nn.ModuleList([*base, self._make_head()])
        classifier = f"base.{len(base)}.{2 + self.head_padding}"
        self._finish(reduction, 224, "base.0.conv", classifier)

    def _replace_head(self) -> None:
        weight = self._first_weight
        head = self._make_head().to(weight.device, weight.dtype)
        self.base[-1] = head.train(self.training)

    def _make_head(self) -> nn.Sequential:
        pooled = self.global_pool == "avg"
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(),
            nn.Flatten() if pooled else nn.Identity(),
            *(nn.Identity() for _ in range(self.head_padding)),
            self._make_classifier(),
        )


def _head_arguments(num_classes: Any, global_pool: Any) -> tuple[int, str]:
    if global_pool not in _GLOBAL_POOLS:
        raise ValueError(f"global_pool is {global_pool!r}: expected one of {_GLOBAL_POOLS}")
    classes = integer("num_classes", num_classes, minimum=0)
    if classes and not global_pool:
        raise ValueError(f"num_classes is {classes}: expected 0, as global_pool is ''")
    return classes, global_pool
