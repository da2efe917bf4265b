"""How pictures are prepared for networks that were trained on ImageNet, as is customary."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["CROP_FRACTION", "MEAN", "STD", "average"]

MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue between 0 and 1."""

STD = (0.229, 0.224, 0.225)
"""The standard deviations of the same."""

CROP_FRACTION = 0.875
"""Share of a picture's shorter side that an evaluation looks at."""


def average(values: Sequence[float]) -> tuple[float]:
    """What stands for the values of all channels where pictures are grey."""
    return (math.fsum(values) / len(values),)
