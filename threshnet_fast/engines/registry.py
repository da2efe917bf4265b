"""The engines that there are, and which of them ``"auto"`` asks, in which order.

An engine's file registers it when it is imported, which loads no kernel and asks no device.
"""

from __future__ import annotations

from typing import TypeVar

from .base import Engine

__all__ = ["automatic", "engine", "names", "register", "unregister"]

AnyEngine = TypeVar("AnyEngine", bound=Engine)

_engines: dict[str, Engine] = {}
_ranks: dict[str, int] = {}
# By type of device, the lowest rank first.
_automatic: dict[str, tuple[str, ...]] = {}

# An emulated or interpreted GPU has its tensors on the CPU. Tensors on a device that no engine is
# for get the objection of this one's.
_OTHERWISE = "cpu"


def register(engine: AnyEngine, *, rank: int = 0, auto_on: str | None = None) -> AnyEngine:
    """Makes an engine one that can be asked for.

    Args:
        engine: The engine.
        rank: ``"auto"`` asks those of the lowest rank first.
        auto_on: The type of the devices on which ``"auto"`` asks it; None for nowhere.

    Returns:
        The engine.

    Raises:
        ValueError: There is one of this name.
    """
    if engine.name in _engines:
        raise ValueError(f"engine {engine.name!r} is registered: expected another name")
    _engines[engine.name] = engine
    _ranks[engine.name] = rank
    if auto_on is not None:
        those = (*_automatic.get(auto_on, ()), engine.name)
        _automatic[auto_on] = tuple(sorted(those, key=lambda name: _ranks[name]))
    return engine


def unregister(name: str) -> None:
    """Makes an engine one that cannot be asked for any more.

    Args:
        name: Of an engine that is registered.
    """
    del _engines[name]
    for device_type, those in _automatic.items():
        _automatic[device_type] = tuple(other for other in those if other != name)


def engine(name: str) -> Engine:
    """Returns an engine.

    Args:
        name: Of one that is registered.
    """
    return _engines[name]


def names() -> tuple[str, ...]:
    """Returns the names of all engines, in alphabetical order."""
    return tuple(sorted(_engines))


def automatic(device_type: str) -> tuple[str, ...]:
    """Returns the names of the engines that ``"auto"`` asks, in order.

    Args:
        device_type: Of the tensors.
    """
    return _automatic.get(device_type) or _automatic[_OTHERWISE]
