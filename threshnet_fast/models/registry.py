"""Models by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

from torch import nn

from .features import FeatureExtractor
from .network import Network

__all__ = ["create_model", "list_models", "register_model"]

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])

_REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str) -> Callable[[_Builder], _Builder]:
    """Decorator that registers a class or function which builds a model.

    Args:
        name: Lower-case name for :func:`create_model`.

    Returns:
        A decorator that returns what it decorates unchanged.

    Raises:
        TypeError: ``name`` is not a string (the decorator was used without parentheses).
        ValueError: ``name`` is empty, not lower-case, or registered already.
    """
    if not isinstance(name, str):
        raise TypeError(f'name is a {type(name).__name__}: expected @register_model("name")')
    if not name or name != name.lower():
        raise ValueError(f"name is {name!r}: expected a lower-case name")
    if name in _REGISTRY:
        raise ValueError(f"name is {name!r}: a model of that name is registered already")

    def register(builder: _Builder) -> _Builder:
        _REGISTRY[name] = builder
        return builder

    return register


def list_models(filter: str = "*") -> list[str]:
    """Names of the registered models, sorted.

    Args:
        filter: Shell-style pattern, for example ``"*net95"``; case is ignored.
    """
    if not isinstance(filter, str):
        raise TypeError(f"filter is a {type(filter).__name__}: expected a str pattern")
    return sorted(name for name in _REGISTRY if fnmatchcase(name, filter.lower()))


def create_model(
    name: str,
    *,
    pretrained: str | bool | None = None,
    features_only: bool = False,
    out_indices: Iterable[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        name: One of :func:`list_models`.
        pretrained: Name of trained weights that come with the package, for example ``"cifar10"``,
            or True where there is only one choice. ``num_classes`` is then theirs by default; with
            another, the classifier is a new one. ``default_cfg`` says how they take their input,
            and the names of their ``classes``.
        features_only: Whether to return the maps of several stages rather than logits: the result
            is a :class:`~threshnet_fast.models.FeatureExtractor`.
        out_indices: Of which stages, as there; needs ``features_only``.
        **kwargs: Passed to the model, for example ``num_classes`` or ``in_chans``.

    Raises:
        TypeError: ``name`` or ``pretrained`` is of the wrong type, or the model takes no such
            keyword.
        ValueError: No model is called ``name``, or it has no such weights; the message suggests
            the nearest. Or the weights were trained on another number of channels, or
            ``out_indices`` names no stages.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}: expected a str")
    builder = _REGISTRY.get(name)
    if builder is None:
        near = difflib.get_close_matches(name.lower(), _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {list_models()}"
        raise ValueError(f"name is {name!r}, which is no model: {hint}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices is given: expected features_only=True with it")
    if pretrained is None or pretrained is False:
        model = builder(**kwargs)
    else:
        # Not at import: hardly any use of the package needs it.
        from .pretrained import create_pretrained, find_pretrained

        model = create_pretrained(builder, find_pretrained(name, pretrained), kwargs)
    return FeatureExtractor(cast(Network, model), out_indices) if features_only else model
