"""What all networks have in common: the interface, the head, the fused forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from ..nn import ConvBNReLU
from ..nn.dispatch import fused_run
from . import imagenet
from .arguments import integer, probability
from .layouts import rename_keys
from .validate import check_input

__all__ = ["FlatNetwork", "Network", "Options", "records_shapes", "smallest_input"]

_GLOBAL_POOLS = ("avg", "")

# What features and logits are made of; a subclass, or an instance, may have its own.
_FEATURE_METHODS = ("_plain_features", "_stages")
_METHODS = (*_FEATURE_METHODS, "forward_features", "forward_head", "get_classifier", "_run_head")

_PACKAGE = __name__.partition(".")[0]


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
        min_size: Smallest height and width of the input: that of which strides and pools leave at
            least one pixel.
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

    # Class attributes have no annotations, as torch.jit.script cannot read them.
    __jit_unused_properties__ = ("_first_weight", "min_size")

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float, global_pool: str) -> None:
        super().__init__()
        self.in_chans = integer("in_chans", in_chans)
        self.drop_rate = probability("drop_rate", drop_rate)
        self.num_classes, self.global_pool = _head_arguments(num_classes, global_pool)
        self.num_features = 0
        self._checked_size = 1
        self.checkpoint: str | None = None
        self.feature_info: list[dict[str, Any]] = []
        self.default_cfg: dict[str, Any] = {}
        self._fused = fused_run()

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
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))
        return self._forward(x)

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
        if not torch.jit.is_scripting():
            self._check_input(x)
            if not _traced(x) and not self._overridden(head=False):
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
        # What is not to be compiled stands in an `if` of its own.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if not self._is_own("get_classifier"):
                x = self._run_head(x, True)
                return x if pre_logits else self.get_classifier()(x)
        return self._run_head(x, pre_logits)

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
    def min_size(self) -> int:
        """Smallest height and width of the input, as the modules are now."""
        return smallest_input(module for _, stage in self._stages() for module in stage.modules())

    @property
    def _first_weight(self) -> Tensor:
        """Stands for the device and dtype of all parameters."""
        raise NotImplementedError

    def _stages(self) -> list[tuple[str, nn.Module]]:
        """What makes the last feature map: modules in the order in which they run, with names."""
        raise NotImplementedError

    def _containers(self) -> list[tuple[str, nn.Sequential]]:
        """The modules that run the stages, if any do, with names."""
        return []

    def _pooling(self) -> list[tuple[str, nn.Module]]:
        """The modules that pool, if any do, with names."""
        return []

    def _plain_features(self, x: Tensor) -> Tensor:
        """The last feature map, by the modules themselves."""
        raise NotImplementedError

    def _run_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        """Pools, drops and classifies by the modules themselves; see :meth:`forward_head`."""
        raise NotImplementedError

    def _replace_head(self) -> None:
        """Makes the head anew, as ``num_classes`` and ``global_pool`` are now."""
        raise NotImplementedError

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        if self._overridden(head=True):
            return self.forward_head(self.forward_features(x))
        self._check_input(x)
        if not _traced(x):
            fused = self._fused(self, x, head=True)
            if fused is not None:
                return fused
        return self.forward_head(self._plain_features(x))

    @torch.jit.unused
    def _overridden(self, *, head: bool) -> str | None:
        """A method that is a user's rather than this package's, or None.

        Args:
            head: Whether to look at those that make logits, too.
        """
        own, kind = self.__dict__, type(self)
        # Written out, as every call comes here.
        for name in _METHODS if head else _FEATURE_METHODS:
            if name in own or not _is_ours(getattr(kind, name)):
                return name
        return None

    @torch.jit.unused
    def _is_own(self, method: str) -> bool:
        return method not in self.__dict__ and _is_ours(getattr(type(self), method))

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        if records_shapes(x):
            return
        if isinstance(x, Tensor) and x.dim() == 4 and min(x.shape[2:]) < self._checked_size:
            # The modules may have been replaced by others, which need less.
            self._checked_size = self.min_size
        check_input(x, self.in_chans, self._checked_size, self._first_weight)

    def _finish(self, reduction: int, size: int, first_conv: str, classifier: str) -> None:
        """Sets what follows from the modules, and initialises their weights."""
        self._checked_size = self.min_size
        self.default_cfg.update(
            input_size=(self.in_chans, size, size),
            min_input_size=(self.in_chans, self._checked_size, self._checked_size),
            num_classes=self.num_classes,
            pool_size=(size // reduction, size // reduction),
            interpolation="bicubic",
            crop_pct=imagenet.CROP_FRACTION,
            mean=imagenet.MEAN,
            std=imagenet.STD,
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
        # A subclass may have a get_classifier that needs what it has not made yet.
        classifier = self.get_submodule(self.default_cfg["classifier"])
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

    head_padding = 0
    if TYPE_CHECKING:
        # A list of modules, the last of which is one too; of no effect, as torch.jit.script reads
        # annotations of attributes.
        base: Any

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity where ``num_classes`` is 0."""
        return cast(nn.Sequential, self.base[-1])[-1]

    @property
    def _first_weight(self) -> Tensor:
        return cast(ConvBNReLU, self.base[0]).conv.weight

    def _stages(self) -> list[tuple[str, nn.Module]]:
        return [(f"base.{i}", module) for i, module in enumerate(list(self.base)[:-1])]

    def _containers(self) -> list[tuple[str, nn.Sequential]]:
        """The modules that run the stages, if any do, with names."""
        return []

    def _pooling(self) -> list[tuple[str, nn.Module]]:
        head = list(cast(nn.Sequential, self.base[-1]).children())
        return [(f"base.{len(self.base) - 1}.{i}", m) for i, m in enumerate(head[:-1])]

    def _plain_features(self, x: Tensor) -> Tensor:
        last = len(self.base) - 1
        for index, module in enumerate(self.base):
            if index < last:
                x = module(x)
        return x

    def _run_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(self.base[-1], _Head):
                # As a whole, so that its hooks run.
                return cast(Tensor, self.base[-1](x, self.drop_rate, pre_logits))
        last = len(self.base[-1]) - 1
        for index, module in enumerate(self.base[-1]):
            if index == last:
                x = F.dropout(x, self.drop_rate, self.training)
            if index < last or not pre_logits:
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

    def _make_head(self) -> _Head:
        pooled = self.global_pool == "avg"
        return _Head(
            nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(),
            nn.Flatten() if pooled else nn.Identity(),
            *(nn.Identity() for _ in range(self.head_padding)),
            self._make_classifier(),
        )


class _Head(nn.Sequential):
    """Pooling, flattening and, last, the classifier, before which features are dropped.

    The dropout is no module, so that none shifts the position of the classifier.
    """

    def forward(self, x: Tensor, drop_rate: float = 0.0, pre_logits: bool = False) -> Tensor:
        """Logits, or with ``pre_logits`` what the classifier would read."""
        last = -1
        for _ in self:
            last += 1
        for index, module in enumerate(self):
            if index == last:
                x = F.dropout(x, drop_rate, self.training)
            if index < last or not pre_logits:
                x = module(x)
        return x


def _traced(x: Any) -> bool:
    """Whether operations are recorded, rather than run on values."""
    return torch.compiler.is_compiling() or _is_proxy(x)


def _is_proxy(x: Any) -> bool:
    return isinstance(x, fx.Proxy)


def records_shapes(x: Any) -> bool:
    """Whether an input's sizes have no values, or would become part of what is recorded."""
    return _is_proxy(x) or torch.jit.is_tracing()


def _is_ours(method: Any) -> bool:
    """Whether a method was written in this package; wrappers that take its name were not."""
    return (
        isinstance(method, FunctionType)
        and method.__globals__["__name__"].partition(".")[0] == _PACKAGE
    )


def smallest_input(modules: Iterable[nn.Module]) -> int:
    """The size of which modules that run one after the other leave one pixel."""
    size = 1
    for module in reversed(list(modules)):
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            size = max(_read_by(module, size, axis) for axis in range(2))
    return size


def _read_by(module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d, size: int, axis: int) -> int:
    """The least size of an input of which a module makes an output of at least ``size``."""
    if module.padding == "same":
        return size
    padding = 0 if module.padding == "valid" else _pair(module.padding)[axis]
    stride = _pair(module.stride)[axis]
    dilation = _pair(getattr(module, "dilation", 1))[axis]
    window = dilation * (_pair(module.kernel_size)[axis] - 1) + 1 - 2 * padding
    if getattr(module, "ceil_mode", False) and size > 1:
        return max(1, (size - 2) * stride + window + 1)
    return max(1, (size - 1) * stride + window)


def _head_arguments(num_classes: Any, global_pool: Any) -> tuple[int, str]:
    if global_pool not in _GLOBAL_POOLS:
        raise ValueError(f"global_pool is {global_pool!r}: expected one of {_GLOBAL_POOLS}")
    classes = integer("num_classes", num_classes, minimum=0)
    if classes and not global_pool:
        raise ValueError(f"num_classes is {classes}: expected 0, as global_pool is ''")
    return classes, global_pool
