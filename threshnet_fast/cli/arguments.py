"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
import difflib
import math

from .errors import CommandError

__all__ = ["check_model", "image_size", "positive_float", "positive_integer"]

_LARGEST = 65536


def positive_integer(text: str) -> int:
    """An integer from 1 up."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return number


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def image_size(text: str) -> tuple[int, int]:
    """``"224"`` or ``"160x288"``, height before width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 224 or 160x288")
    height, width = int(parts[0]), int(parts[-1])
    if not (0 < height <= _LARGEST and 0 < width <= _LARGEST):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to {_LARGEST} pixels a side")
    return height, width


def check_model(name: str) -> None:
    """Raises a :class:`CommandError` that suggests the nearest name unless the model exists."""
    from ..models import list_models

    names = list_models()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise CommandError(f"unknown model {name!r}: {hint}", status=2)
