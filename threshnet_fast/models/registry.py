"""The networks that can be created by their names, and who registers one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

__all__ = ["find_builder", "list_models", "register_model"]

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])

_REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(name: str) -> Callable[[_Builder], _Builder]:
    """Decorator that registers a class or function which builds a model.

    Args:
        name: Lower-case name for :func:`threshnet_fast.create_model`.

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


def find_builder(name: str) -> Callable[..., nn.Module]:
    """Returns what builds a registered model.

    Args:
        name: One of :func:`list_models`.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: No model is called ``name``; the message suggests the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}: expected a str")
    builder = _REGISTRY.get(name)
    if builder is None:
        near = difflib.get_close_matches(name.lower(), _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {list_models()}"
        raise ValueError(f"name is {name!r}, which is no model: {hint}")
    return builder
