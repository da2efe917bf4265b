"""What the tests of training's operators share: poisoned memory, problems and their solutions.

A map is ``[pixels, channels]`` in NHWC order. All memory that an operator writes begins as NaN, and
so do the channels of its operands that it has no business with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerance import assert_within, dot_bound
from torch import Tensor
from torch.nn import functional as F

from threshnet_fast.engines import cpu
from threshnet_fast.plan.raw import FUSED_ACTIVATIONS

operators = torch.ops.threshnet_fast_cpu

BEFORE, AFTER = 2, 3
"""Channels of a map on either side of those that an operator is given."""

_GUARD_ROWS = 2
_GUARD_FLOATS = 64
_SENTINEL = 12345.0


def isas() -> list[int]:
    """Codes of the instruction sets that can be tested here."""
    return cpu.isa_codes() if cpu.unavailable_reason() is None else [0]


class Poisoned:
    """Rows to be written, NaN, with more NaN before and after them in memory."""

    def __init__(self, rows: int, columns: int) -> None:
        self._memory = torch.full((rows + 2 * _GUARD_ROWS, columns), torch.nan)
        self.tensor = self._memory[_GUARD_ROWS : _GUARD_ROWS + rows]

    def written(self, first: int = 0, columns: int | None = None) -> Tensor:
        """Some columns, in float64; asserts that nothing else has been written."""
        last = self.tensor.shape[1] if columns is None else first + columns
        untouched = self._memory.clone()
        result = self.tensor[:, first:last].double()
        untouched[_GUARD_ROWS : _GUARD_ROWS + len(result), first:last] = torch.nan
        assert untouched.isnan().all(), "something was written where nothing should be"
        return result


class Workspace:
    """As many floats as asked for, aligned and NaN, before others that must stay what they are."""

    def __init__(self, floats: int) -> None:
        memory = torch.full((floats + 16 + _GUARD_FLOATS,), torch.nan)
        start = -(memory.data_ptr() // 4) % 16
        self.tensor = memory[start : start + floats]
        self._guard = memory[start + floats : start + floats + _GUARD_FLOATS]
        self._guard.fill_(_SENTINEL)

    def check(self) -> None:
        assert (self._guard == _SENTINEL).all(), "the workspace is larger than was asked for"


def within_nan(values: Tensor) -> Tensor:
    """A map with such channels in the middle, and NaN on both sides."""
    return F.pad(values, (BEFORE, AFTER), value=torch.nan)


def to_nchw(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def to_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def per_channel(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


@dataclass(frozen=True)
class Case:
    """A convolution, or with ``out`` 0 a pool, of segments; ``padding`` None keeps the size."""

    channels: tuple[int, ...]
    out: int
    batch: int
    size: tuple[int, int]
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    activation: str = "relu"
    channels_last: bool = False

    def __str__(self) -> str:
        return (
            f"{'+'.join(map(str, self.channels))}to{self.out}-{self.batch}x{self.size[0]}x"
            f"{self.size[1]}-k{self.kernel}s{self.stride}p{self.pad}-{self.activation or 'linear'}"
            f"{'-channels_last' if self.channels_last else ''}"
        )

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def after(self) -> tuple[int, int]:
        height, width = ((s + 2 * self.pad - self.kernel) // self.stride + 1 for s in self.size)
        return height, width

    @property
    def same_size(self) -> bool:
        return self.stride == 1 and self.after == self.size

    @property
    def code(self) -> int:
        return FUSED_ACTIVATIONS[self.activation]

    @property
    def window(self) -> list[int]:
        return [self.batch, *self.size, self.kernel, self.kernel, self.stride, self.pad]

    @property
    def segments(self) -> list[int]:
        return [number for channels in self.channels for number in (BEFORE, channels)]

    @property
    def pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]

    @property
    def pixels_after(self) -> int:
        return self.batch * self.after[0] * self.after[1]


class Operands:
    """Random operands, with the float64 of what is common to all operators.

    Where the normalised input is close to a kink of the activation it is moved away, so that
    rounding never decides whether a gradient passes. The gradient that comes from above is that of
    a map which others normalise: ``gradient - output * slope + offset``.
    """

    def __init__(self, case: Case, *, tied: bool = False) -> None:
        generator = torch.Generator().manual_seed(sum(case.window) + case.out)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        channels = sum(case.channels)
        signs = torch.where(torch.rand(channels, generator=generator) < 0.25, -1.0, 1.0)
        scale = signs * (0.5 + torch.rand(channels, generator=generator))
        shift = 0.5 * normal(channels) + (2.0 if case.activation == "relu6" else 0.0)
        self.prologue = torch.stack([scale, shift, 0.3 * normal(channels)])
        x = normal(case.pixels, channels) * (2.0 if case.activation == "relu6" else 1.0)
        if tied:
            # Few different values, so that windows have several maxima.
            x = x.round()
        for kink in (0.0, 6.0):
            x += torch.where((x * scale + shift - kink).abs() < 1e-3, 0.01, 0.0) / scale
        self.maps = [within_nan(part) for part in x.split(case.channels, 1)]

        out = case.out or channels
        self.output = within_nan(normal(case.pixels_after, out))
        self.gradient = within_nan(normal(case.pixels_after, out))
        self.correction = within_nan(0.3 * normal(2, out))
        self.earlier = [normal(len(part), part.shape[1]) for part in self.maps]

        self.x = to_nchw(x.double(), case.batch, *case.size)
        self.scale, self.shift, self.mean = map(per_channel, self.prologue)
        self.before = self.x * self.scale + self.shift
        most = 6.0 if case.activation == "relu6" else torch.inf
        self.activated = self.before.clamp(0, most) if case.activation else self.before
        self.passes = (self.before > 0) & (self.before < most) if case.activation else True
        self.magnitude = (self.x * self.scale).abs() + self.shift.abs()

        middle = slice(BEFORE, BEFORE + out)
        y, dy = self.output[:, middle].double(), self.gradient[:, middle].double()
        slope, offset = self.correction[:, middle].double()
        self.dz = to_nchw(dy - y * slope + offset, case.batch, *case.after)
        magnitude = dy.abs() + (y * slope).abs() + offset.abs()
        self.dz_magnitude = to_nchw(magnitude, case.batch, *case.after)

    def input_gradients(self) -> tuple[list[Poisoned], list[Tensor]]:
        """Memory for the gradients of the maps; in it, what was there before of every second."""
        memory, found = [], []
        for index, earlier in enumerate(self.earlier):
            memory.append(Poisoned(*earlier.shape))
            found.append(torch.zeros_like(earlier))
            if index % 2:
                middle = slice(BEFORE, earlier.shape[1] - AFTER)
                memory[-1].tensor[:, middle] = found[-1][:, middle] = earlier[:, middle]
        return memory, found

    def check_input_gradients(
        self,
        memory: list[Poisoned],
        found: list[Tensor],
        sums: Tensor,
        gradient: Tensor,
        magnitude: Tensor,
        length: int,
    ) -> None:
        """Asserts what operators make of the gradient of the activated input.

        Args:
            memory: What :meth:`input_gradients` gave, written by the operator.
            found: What was there before.
            sums: ``[2, channels]``, written.
            gradient: Of the activated input, in float64.
            magnitude: Sum of the absolute products that each element of it is made of.
            length: How many.
        """
        d = gradient * self.passes
        magnitude = magnitude * self.passes
        dx, bound = to_rows(d * self.scale), to_rows(magnitude * self.scale.abs())
        channels = [part.shape[1] - BEFORE - AFTER for part in self.maps]
        parts = zip(memory, found, dx.split(channels, 1), bound.split(channels, 1), strict=True)
        for to, before, part, limit in parts:
            count = part.shape[1]
            actual = to.written(BEFORE, count)
            before = before[:, BEFORE : BEFORE + count].double()
            limit = dot_bound(limit + before.abs(), length + 2, torch.float32)
            assert_within(actual, before + part, limit)
        moment = self.x - self.mean
        expected = torch.stack([d.sum((0, 2, 3)), (d * moment).sum((0, 2, 3))])
        moment_magnitude = self.x.abs() + self.mean.abs()
        bound = torch.stack(
            [magnitude.sum((0, 2, 3)), (magnitude * moment_magnitude).sum((0, 2, 3))]
        )
        assert_within(sums, expected, dot_bound(bound, length + len(dx), torch.float32))


def check_statistics(statistics: Tensor, rows: Tensor) -> None:
    """Asserts that these are the mean and biased variance of a map, as it was written.

    Sums are taken in float32, of differences from a value of the channel itself: so they are off in
    proportion to how far its values are apart, never to how far they are from zero.

    Args:
        statistics: ``[2, channels]`` in float64.
        rows: ``[pixels, channels]`` in float64.
    """
    spread = rows.amax(0) - rows.amin(0)
    variance, mean = torch.var_mean(rows, 0, correction=0)
    unit = torch.finfo(torch.float32).eps
    for actual, expected, magnitude in (
        (statistics[0], mean, spread),
        (statistics[1], variance, spread.square()),
    ):
        bound = dot_bound(magnitude, len(rows), torch.float32) + unit * expected.abs()
        assert_within(actual, expected, bound)


@functools.lru_cache(maxsize=2)
def operands(case: Case, tied: bool = False) -> Operands:
    return Operands(case, tied=tied)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def aligned_workspace(floats: int) -> Tensor:
    return Workspace(floats).tensor


def check_fails(
    operator: Callable[..., Any], arguments: Callable[[], dict[str, Any]], change: dict[str, Any]
) -> None:
    """Asserts that a call raises and writes nothing, and that it succeeds without a change.

    Args:
        operator: What is called.
        arguments: Function that returns the arguments of a call that succeeds.
        change: Those that are replaced.
    """
    operator(*arguments().values())
    given = {**arguments(), **change}
    tensors = [
        tensor
        for value in given.values()
        for tensor in (value if isinstance(value, list) else [value])
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu"
    ]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(RuntimeError):
        operator(*given.values())
    for tensor, value in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True)
