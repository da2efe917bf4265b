"""Resize and Upsample: as PyTorch says it where it can, else by matrices of fixed sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from .file import Operation
from .translation import Scalars, Translation, Value, rule

__all__: list[str] = []


@rule("Resize", "Upsample")
def resize(t: Translation, node: Operation) -> Value:
    """A map of another size."""
    given = node.attributes
    x = t.operand(node, 0)
    if t.rank(x) != 4:
        raise ValueError(f"it reads {t.rank(x)} dimensions: expected 4, a map of pixels")
    old = node.kind == "Upsample" or t.opset < 11
    mode = given.get("mode", "nearest")
    kind = "asymmetric" if old else given.get("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else given.get("nearest_mode", "round_prefer_floor")
    if given.get("antialias", 0) or given.get("exclude_outside", 0):
        raise ValueError("antialias and exclude_outside are not taken")
    if given.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("keep_aspect_ratio_policy is not taken: expected stretch")
    if mode not in ("nearest", "linear", "cubic") or kind == "tf_crop_and_resize":
        raise ValueError(f"mode {mode!r} with {kind!r} is not taken")
    scales = None if "scales" in given else t.value(node, 1 if old else 2)
    wanted = None if old else t.value(node, 3)
    factors = _of_pixels(t, x, given, given.get("scales") or _numbers(t, scales), 1.0)
    sizes = _of_pixels(t, x, given, _numbers(t, wanted), None)
    if (factors is None) == (sizes is None):
        raise ValueError("it has both scales and sizes, or neither")
    if factors is not None and not Scalars(tuple(factors)).known:
        raise ValueError("its scales depend on the input: expected numbers, or sizes")
    if factors is not None and not all(0 < factor < 1 << 16 for factor in factors):
        raise ValueError(f"its scales are {factors}")
    if factors is not None:
        # What was meant: 10 times 0.7 are 7, which they are not with the float32 next to 0.7.
        factors = [float(str(np.float32(factor))) for factor in factors]
    simple = _in_words_of_torch(mode, kind, rounding, factors, sizes, given)
    if simple is not None:
        return t.call(
            F.interpolate,
            x,
            **({"size": sizes} if factors is None else {"scale_factor": factors}),
            **simple,
        )
    return _by_matrices(t, x, mode, kind, rounding, factors, sizes, given)


def _numbers(t: Translation, value: Value | None) -> Sequence[Any] | None:
    """The numbers of an input; None where it is left out, or empty, which says the same."""
    if value is None:
        return None
    return t.scalars(value).elements or None


def _of_pixels(
    t: Translation, x: Any, given: Any, numbers: Sequence[Any] | None, same: float | None
) -> list[Any] | None:
    """Height and width of what is given for all four dimensions, or for some axes."""
    if numbers is None:
        return None
    axes = [t.axis(x, axis) for axis in given.get("axes", range(4))]
    if len(numbers) != len(axes):
        raise ValueError(f"it has {len(numbers)} numbers for {len(axes)} dimensions")
    found = dict(zip(axes, numbers, strict=True))
    for axis in (0, 1):
        each = found.get(axis, same)
        if same is None and each is not None and not isinstance(each, fx.Node):
            fixed = t.fixed(x, axis)
            if fixed is not None and fixed != each:
                raise ValueError("it resizes channels or pictures: expected pixels alone")
        elif same is not None and each != same:
            raise ValueError("it resizes channels or pictures: expected pixels alone")
    return [found.get(axis, t.size(x, axis) if same is None else same) for axis in (2, 3)]


def _in_words_of_torch(
    mode: str,
    kind: str,
    rounding: str,
    factors: Sequence[float] | None,
    sizes: Sequence[Any] | None,
    given: Any,
) -> dict[str, Any] | None:
    """What :func:`torch.nn.functional.interpolate` is told, or None where it cannot say it."""
    whole = factors is not None and all(factor == int(factor) for factor in factors)
    if mode == "nearest":
        if kind == "asymmetric" and rounding == "floor":
            return {"mode": "nearest"}
        if kind in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"):
            # Which way halves go matters where the middle of a pixel lies between two, which it
            # never does when every pixel becomes several.
            if rounding == "round_prefer_ceil" and kind == "half_pixel":
                return {"mode": "nearest-exact"}
            if whole and rounding.startswith("round"):
                return {"mode": "nearest"}
        if kind == "tf_half_pixel_for_nn" and rounding == "floor":
            return {"mode": "nearest-exact"}
        return None
    name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    if mode == "cubic" and given.get("cubic_coeff_a", -0.75) != -0.75:
        return None
    if kind == "align_corners":
        return {"mode": name, "align_corners": True}
    several = whole or (
        sizes is not None and not any(not isinstance(each, fx.Node) and each == 1 for each in sizes)
    )
    symmetric = kind == "half_pixel_symmetric" and (whole or sizes is not None)
    if kind == "half_pixel" or symmetric or (kind == "pytorch_half_pixel" and several):
        return {"mode": name, "align_corners": False}
    return None


def _by_matrices(
    t: Translation,
    x: Any,
    mode: str,
    kind: str,
    rounding: str,
    factors: Sequence[float] | None,
    sizes: Sequence[Any] | None,
    given: Any,
) -> Any:
    """Rows, then columns, as products with the weights of every pixel."""
    both = t.example(x)
    for number, axis in enumerate((2, 3)):
        before = t.fixed(x, axis)
        after = None if sizes is None else sizes[number]
        if before is None or isinstance(after, fx.Node) or both is None:
            raise ValueError(
                f"mode {mode!r} with {kind!r} and {rounding!r} needs an input of a fixed size"
            )
        factor = after / before if after is not None else factors[number]  # type: ignore[index]
        after = math.floor(before * factor) if after is None else after
        if not 1 <= after < 1 << 16:
            raise ValueError(f"it makes a map of {after} pixels a side")
        t.spend(8 * before * after)
        centres = _coordinates(kind, before, after, factor)
        if mode == "nearest":
            index = _rounded(centres, rounding).clamp(0, before - 1).to(torch.int64)
            x = t.call(torch.index_select, x, axis, index)
            continue
        cubic = given.get("cubic_coeff_a", -0.75) if mode == "cubic" else None
        matrix = _weights(centres, before, cubic).to(both[0].dtype)
        if axis == 2:
            x = t.call(torch.matmul, matrix, x)
        else:
            x = t.call(torch.matmul, x, matrix.t().contiguous())
    return x


def _coordinates(kind: str, before: int, after: int, factor: float) -> torch.Tensor:
    """Where the pixels of the result lie in the map."""
    pixels = torch.arange(after, dtype=torch.float64)
    match kind:
        case "asymmetric":
            return pixels / factor
        case "align_corners":
            return pixels * (before - 1) / (after - 1) if after > 1 else pixels * 0
        case "pytorch_half_pixel" if after == 1:
            return pixels * 0
        case "half_pixel" | "pytorch_half_pixel":
            return (pixels + 0.5) / factor - 0.5
        case "tf_half_pixel_for_nn":
            return (pixels + 0.5) / factor
        case "half_pixel_symmetric":
            adjustment = after / (factor * before)
            return before / 2 * (1 - adjustment) + (pixels + 0.5) / factor - 0.5
    raise ValueError(f"coordinate_transformation_mode {kind!r} is not taken")


def _rounded(values: torch.Tensor, rounding: str) -> torch.Tensor:
    match rounding:
        case "floor":
            return values.floor()
        case "ceil":
            return values.ceil()
        case "round_prefer_floor":
            return (values - 0.5).ceil()
        case "round_prefer_ceil":
            return (values + 0.5).floor()
    raise ValueError(f"nearest_mode {rounding!r} is not taken")


def _weights(centres: torch.Tensor, before: int, cubic: float | None) -> torch.Tensor:
    """What every pixel of the result takes of those of the map: linear, or cubic."""
    first = centres.floor()
    part = centres - first
    if cubic is None:
        taps = {0: 1 - part, 1: part}
    else:
        a = cubic

        def near(d: torch.Tensor) -> torch.Tensor:
            return ((a + 2) * d - (a + 3)) * d * d + 1

        def far(d: torch.Tensor) -> torch.Tensor:
            return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

        taps = {-1: far(part + 1), 0: near(part), 1: near(1 - part), 2: far(2 - part)}
    matrix = torch.zeros(len(centres), before, dtype=torch.float64)
    rows = torch.arange(len(centres))
    for step, weight in taps.items():
        columns = (first + step).clamp(0, before - 1).to(torch.int64)
        matrix.index_put_((rows, columns), weight, accumulate=True)
    return matrix
