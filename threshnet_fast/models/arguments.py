"""Checks of a model's arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = ["Stages", "flag", "integer", "integers", "layers", "positive", "probability", "stages"]


class Stages(NamedTuple):
    """The stages of a network with a flat list of modules, as the model's text describes them."""

    first_channels: list[int]
    blocks: list[int]
    transitions: list[int]
    downsample: list[bool]
    growth_rates: list[int]


def stages(
    first_channels: Any, blocks: Any, transitions: Any, downsample: Any, growth_rates: Any
) -> Stages:
    """Returns the stages, all of equal length.

    Raises:
        TypeError: An argument is not a sequence, or an entry not an integer.
        ValueError: A length or an entry is out of range.
    """
    first_channels = integers("first_channels", first_channels)
    if len(first_channels) != 2:
        raise ValueError(
            f"first_channels has {len(first_channels)} entries: expected 2, one a convolution"
        )
    blocks = layers(blocks)
    found = Stages(
        first_channels,
        blocks,
        integers("transitions", transitions),
        [flag(f"downsample[{i}]", v) for i, v in enumerate(_sequence("downsample", downsample))],
        integers("growth_rates", growth_rates),
    )
    for name in ("transitions", "downsample", "growth_rates"):
        values: list[Any] = getattr(found, name)
        if len(values) != len(blocks):
            raise ValueError(
                f"{name} has {len(values)} entries: expected {len(blocks)}, one for each of blocks"
            )
    return found


def layers(blocks: Any) -> list[int]:
    """Returns the number of layers of each block, of which there is one at least.

    Raises:
        TypeError: ``blocks`` is not a sequence of integers.
        ValueError: It is empty, or an entry not positive.
    """
    numbers = integers("blocks", blocks)
    if not numbers:
        raise ValueError("blocks is empty: expected the number of layers of one block or more")
    return numbers


def integer(name: str, value: Any, minimum: int = 1) -> int:
    """Returns ``value`` as an int.

    Args:
        name: What it is called in the messages.
        value: The argument.
        minimum: The least that it may be.

    Raises:
        TypeError: ``value`` is not an integer, or is a bool.
        ValueError: ``value`` is less than ``minimum``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: expected an integer")
    if number < minimum:
        raise ValueError(f"{name} is {number}: expected {minimum} or more")
    return number


def integers(name: str, values: Any, minimum: int = 1) -> list[int]:
    """Returns a sequence of integers, each at least ``minimum``, as a list.

    Raises:
        TypeError: ``values`` is not a sequence, or an entry not an integer.
        ValueError: An entry is less than ``minimum``.
    """
    sequence = _sequence(name, values)
    return [integer(f"{name}[{i}]", value, minimum) for i, value in enumerate(sequence)]


def flag(name: str, value: Any) -> bool:
    """Returns ``value`` as a bool.

    Raises:
        ValueError: ``value`` is neither True nor False.
    """
    if value not in (0, 1):
        raise ValueError(f"{name} is {value!r}: expected True or False")
    return bool(value)


def positive(name: str, value: Any) -> float:
    """Returns a finite number above 0.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is out of range.
    """
    number = _real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {number}: expected a finite number above 0")
    return number


def probability(name: str, value: Any) -> float:
    """Returns the probability of a dropout.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is out of range.
    """
    number = _real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} is {number}: expected 0 or more and less than 1")
    return number


def _sequence(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r}: expected a sequence")
    return list(values)


def _real(name: str, value: Any) -> float:
    try:
        return float(operator.index(value) if not isinstance(value, float) else value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected a number") from None
