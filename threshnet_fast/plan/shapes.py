"""Shapes of what a network or an island of one is given, as engines pass them to its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

__all__ = ["Shape", "batch_of", "with_batch"]

Shape = Sequence[int] | Sequence[Sequence[int]]
"""``(N, C, H, W)``, or for each of several inputs a row ``(N, C, H, W, pitch)``: the elements
between neighbouring pixels, 0 for any strides."""


def batch_of(shape: Shape) -> int:
    """Returns how many images there are.

    Args:
        shape: Of one input or of several.
    """
    first = shape[0]
    return first if isinstance(first, int) else first[0]


def with_batch(shape: Shape, batch: int) -> Any:
    """Returns the shape of another number of images.

    Args:
        shape: Of one input or of several.
        batch: Images.
    """
    if isinstance(shape[0], int):
        return (batch, *cast("Sequence[int]", shape[1:]))
    return tuple((batch, *row[1:]) for row in cast("Sequence[Sequence[int]]", shape))
