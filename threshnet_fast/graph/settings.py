"""Which settings of modules count: all that plans and chains are made from, besides tensors.

What is made from a module once is run again without it, so every setting that was read then is
compared before each call. A setting that lowering reads and ``SETTINGS`` lacks would be followed
by nobody.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

from torch import nn

from ..models.network import Network
from ..nn import (
    ConvBNReLU,
    DenseBlock,
    DenseLayer,
    DenseTransition,
    DepthwiseConvBN,
    HarmonicBlock,
    PlainDenseLayer,
    PointwiseDepthwise,
)
from .activations import ACTIVATION_SETTINGS

__all__ = [
    "DROPOUTS",
    "MODELESS",
    "SETTINGS",
    "TENSORS",
    "ModuleSettings",
    "override",
    "settings_of",
]

DROPOUTS = (
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
)
"""Classes that drop elements by chance in training, and nothing in evaluation."""

SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AvgPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    ),
    nn.BatchNorm1d: ("eps", "num_features"),
    nn.BatchNorm2d: ("eps", "num_features"),
    nn.ConstantPad2d: ("padding", "value"),
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ),
    nn.ConvTranspose2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "dilation",
        "groups",
        "padding_mode",
    ),
    **dict.fromkeys(DROPOUTS, ()),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.Identity: (),
    nn.Linear: (),
    nn.MaxPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "ceil_mode",
        "return_indices",
    ),
    nn.ModuleList: (),
    nn.Sequential: (),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
    ConvBNReLU: ("activation",),
    DenseBlock: (),
    DenseLayer: ("out_channels",),
    DenseTransition: (),
    DepthwiseConvBN: (),
    HarmonicBlock: ("links", "channels", "out_layers"),
    Network: ("in_chans", "global_pool", "default_cfg"),
    PlainDenseLayer: ("out_channels",),
    PointwiseDepthwise: (),
    **ACTIVATION_SETTINGS,
}
"""By class: its settings that a plan or a chain depends on; a subclass has those of its bases."""

MODELESS = frozenset(SETTINGS) - {nn.BatchNorm1d, nn.BatchNorm2d, *DROPOUTS, Network}
"""Classes that compute the same in training mode. Anything else, a parametrisation say, may not."""

TENSORS = ("weight", "bias", "running_mean", "running_var")
"""What lowering reads of parameters and buffers."""

# What decides how an instance runs, where a class or an instance has one of its own.
_RUNS = (
    "forward",
    "_conv_forward",
    "_call_impl",
    "_wrapped_call_impl",
    "__call__",
)

# As they were when this was imported, before anyone could replace one.
_METHODS: dict[type[nn.Module], dict[str, Any]] = {
    kind: {name: getattr(kind, name, None) for name in _RUNS} for kind in SETTINGS
}


def settings_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """Returns the settings of a class and of those it is derived from.

    Args:
        kind: Any class of modules.
    """
    return tuple(name for base in kind.__mro__ for name in SETTINGS.get(base, ()))


def override(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """Returns what keeps a module from running exactly as a class does, or None.

    A subclass may have attributes and methods of its own, but none of those that decide what a
    module of the class computes.

    Args:
        module: An instance of ``expected``.
        expected: One of ``SETTINGS``.
    """
    for name in _RUNS:
        original = _METHODS[expected][name]
        if name in module.__dict__ or getattr(type(module), name, None) is not original:
            return name
    for name in TENSORS:
        if name in module.__dict__:
            return name
    kinds = type(module).__mro__
    for kind in kinds[: kinds.index(expected)]:
        for name in (*TENSORS, *settings_of(expected)):
            if name in vars(kind):
                return name
    return None


def _fixed(value: Any) -> bool:
    """Whether a setting cannot be changed in place."""
    if type(value) is tuple:
        return all(map(_fixed, value))
    return value is None or type(value) in (bool, int, float, str)


class ModuleSettings:
    """The settings of modules, as they are when this is made.

    Values are copied, so that a list that is changed in place shows.

    Args:
        modules: Any modules.
        hooks: Attributes with dictionaries of hooks. Those are compared by identity, as who holds
            one looks into it for hooks.
    """

    def __init__(self, modules: Sequence[nn.Module], hooks: Sequence[str]) -> None:
        self._modules = list(modules)
        self._types = list(map(type, modules))
        self._attributes = [module.__dict__ for module in modules]
        self._convolutions = [m.__dict__ for m in modules if isinstance(m, nn.Conv2d)]
        self._own_forwards = self._find_own_forwards()
        self._methods = [
            (kind, name, getattr(kind, name))
            for kind in dict.fromkeys(self._types)
            for name in ("forward", "_conv_forward")
            if hasattr(kind, name)
        ]
        # Grouped by what is read of them, as one reader for many modules takes half of the time.
        groups: dict[tuple[str, ...], list[nn.Module]] = {}
        self._inherited: list[tuple[nn.Module, str, Any]] = []
        for module in modules:
            own = [name for name in settings_of(type(module)) if name in module.__dict__]
            groups.setdefault((*hooks, *own), []).append(module)
            self._inherited += [
                (module, name, copy.deepcopy(getattr(module, name, None)))
                for name in settings_of(type(module))
                if name not in module.__dict__
            ]
        self._groups: list[tuple[Callable[[Any], Any], list[dict[str, Any]], list[Any]]] = []
        # What is compared by identity, and what by value, as it can be changed in place.
        self._fixed: list[tuple[dict[str, Any], str]] = []
        self._changeable = list(self._inherited)
        for names, members in groups.items():
            if not names:
                continue
            read = operator.itemgetter(*names)
            dictionaries = [member.__dict__ for member in members]
            values = [
                [
                    value if name in hooks else copy.deepcopy(value)
                    for name, value in ((name, dictionary[name]) for name in names)
                ]
                for dictionary in dictionaries
            ]
            found = [tuple(each) if len(names) > 1 else each[0] for each in values]
            for member, copies in zip(members, values, strict=True):
                for name, value in zip(names, copies, strict=True):
                    if name in hooks or _fixed(value):
                        self._fixed.append((member.__dict__, name))
                    else:
                        self._changeable.append((member, name, value))
            self._groups.append((read, dictionaries, found))

    def same(self) -> bool:
        """Whether all settings are still what they were, and the modules of the same classes."""
        try:
            return (
                list(map(type, self._modules)) == self._types
                and all(list(map(read, found)) == kept for read, found, kept in self._groups)
                and self._find_own_forwards() == self._own_forwards
                and all(getattr(kind, name, None) is was for kind, name, was in self._methods)
                and all(getattr(module, name, None) == was for module, name, was in self._inherited)
            )
        except (KeyError, RuntimeError, ValueError):
            # A setting was deleted, or is an array that does not compare.
            return False

    def record(self, facts: Any) -> None:
        """Records all of it as facts, as it is now.

        Args:
            facts: What records them: see csrc/python/fingerprint.cpp.
        """
        for module in self._modules:
            facts.kind(module)
            facts.entry(module.__dict__, "forward")
            if isinstance(module, nn.Conv2d):
                facts.entry(module.__dict__, "_conv_forward")
        for dictionary, name in self._fixed:
            facts.entry(dictionary, name)
        for module, name, value in self._changeable:
            facts.attribute(module, name, value)
        for kind, name, method in self._methods:
            facts.attribute(kind, name, method)

    def _find_own_forwards(self) -> tuple[bool, bool]:
        """Whether an instance has a method of its own of those that people replace."""
        return (
            any(map(operator.contains, self._attributes, repeat("forward"))),
            any(map(operator.contains, self._convolutions, repeat("_conv_forward"))),
        )
