"""Pooling by the CUDA kernel, against PyTorch's own in float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_within, dot_bound
from torch.nn import functional

from emulation.cuda_cases import (
    DTYPES,
    SCHEDULES,
    Bad,
    Guarded,
    PlantedBug,
    available,
    change,
    library,
    misaligned,
    output_map,
    pitch,
    pitched,
    segment,
    window,
)
from emulation.cuda_library import EmulationError, Pool

pytestmark = [available, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Case:
    """A pooling whose output begins ``shift`` elements behind an aligned address."""

    channels: int
    batch: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: int
    padding: int = 0
    average: bool = False
    special: bool = False
    gap: int = 16
    shift: int = 0

    def __str__(self) -> str:
        n, (h, w), (kh, kw) = self.batch, self.size, self.kernel
        kind = "average" if self.average else "special" if self.special else "maximum"
        return (
            f"{kind}-{n}x{self.channels}x{h}x{w}-k{kh}x{kw}s{self.stride}p{self.padding}"
            f"-{self.gap}+{self.shift}"
        )


CASES = [
    Case(64, 1, (19, 23), (3, 3), 2, 1),
    Case(80, 2, (7, 7), (2, 2), 2, special=True),
    Case(37, 3, (5, 7), (3, 3), 2, 1, special=True, gap=0, shift=3),
    Case(160, 1, (7, 7), (7, 7), 1, average=True),
    Case(20, 2, (6, 7), (2, 3), 2, average=True, shift=1),
    Case(1200, 2, (2, 3), (2, 2), 1, average=True),
    Case(30, 1, (13, 17), (3, 3), 1, average=True, gap=2),
    Case(480, 2, (13, 17), (2, 2), 2),
    Case(16, 2, (13, 17), (3, 3), 2, 1, special=True),
    Case(1, 3, (1, 1), (1, 1), 1, gap=0),
    Case(1, 1, (1, 1), (3, 3), 2, 1, special=True),
    Case(17, 2, (9, 4), (5, 3), 3, 1, special=True),
    Case(24, 1, (7, 5), (6, 7), 1, 3, special=True),
    Case(8, 1, (9, 9), (3, 3), 5, 1),
    Case(960, 3, (1, 1), (1, 1), 1, average=True),
    Case(3, 1, (8, 8), (4, 4), 4, average=True, shift=5),
]


def values_of(case: Case, dtype: torch.dtype) -> torch.Tensor:
    # Negative numbers, which a zero for padding would exceed.
    values = torch.randn(case.batch, case.channels, *case.size) - 3
    if case.special:
        for number, share in ((torch.nan, 0.05), (-torch.inf, 0.2), (torch.inf, 0.05)):
            values[torch.rand(values.shape) < share] = number
    return values.to(dtype)


def run(case: Case, dtype: torch.dtype) -> None:
    """Runs the kernel and compares all that it wrote with float64."""
    values = values_of(case, dtype)
    x = pitched(values, gap=8)
    exact = (
        functional.avg_pool2d(values.double(), case.kernel, case.stride)
        if case.average
        else functional.max_pool2d(values.double(), case.kernel, case.stride, case.padding)
    )
    output = output_map(exact.shape, dtype, gap=case.gap, shift=case.shift)
    library().pool(operands(case, x, output))
    bound = torch.zeros_like(exact)
    if case.average:
        taps = case.kernel[0] * case.kernel[1]
        magnitude = functional.avg_pool2d(values.double().abs(), case.kernel, case.stride)
        bound = dot_bound(magnitude, taps, torch.float32) + torch.finfo(dtype).eps * exact.abs()
    assert_within(output.view, exact, bound)
    output.assert_rest_untouched()


def operands(case: Case, x: torch.Tensor, output: Guarded) -> Pool:
    return Pool(
        dtype=x.dtype,
        window=window(x, case.kernel, case.stride, case.padding),
        input=segment(x),
        output=output.view,
        output_pitch=pitch(output.view),
        out_channels=output.view.shape[1],
        average=case.average,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pool(case: Case, dtype: torch.dtype, schedule: str) -> None:
    with library().schedule(schedule):
        run(case, dtype)


@pytest.mark.parametrize("average", [False, True])
def test_offsets_beyond_32_bits(average: bool) -> None:
    """Pixels more than 2^31 elements apart; the gaps stay untouched."""
    far = 2**30 + 64
    x = torch.empty(2 * far + 16, dtype=torch.float16).as_strided((1, 16, 1, 3), (0, 1, 0, far))
    y = torch.empty(2 * far + 16, dtype=torch.float16).as_strided(x.shape, x.stride())
    x.copy_(torch.randn(1, 16, 1, 3))
    y.fill_(torch.nan)
    case = Case(16, 1, (1, 3), (1, 1), 1, average=average)
    library().pool(operands(case, x, Guarded(y, y)))
    assert torch.equal(x, y)


SMALL = Case(20, 2, (5, 7), (3, 3), 2, 1)

BAD = [
    Bad("dtype is 3, expected 0", {"dtype": 3}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 2 bytes", {"output": misaligned(1)}),
    Bad("output_pitch is 19, expected at least 20", {"output_pitch": 19}),
    Bad("out_channels is 0, expected a positive", {"out_channels": 0}),
    Bad("out_channels is 33, expected at most 32", {"out_channels": 33}),
    Bad("input is null", {"input.data": None}),
    Bad("input is not aligned to 16 bytes", {"input.data": misaligned(8)}),
    Bad("channels of the input is 20, expected a multiple of 16", {"input.channels": 20}),
    Bad("channels of the input is 0, expected a positive", {"input.channels": 0}),
    Bad("pitch of the input is 24, expected at least 32", {"input.pitch": 24}),
    Bad("pitch of the input is 36, expected a multiple of 8", {"input.pitch": 36}),
    Bad("batch is 0, expected a positive", {"window.batch": 0}),
    Bad("height is 0, expected a positive", {"window.in_height": 0}),
    Bad("width is -1, expected a positive", {"window.out_width": -1}),
    Bad("input has more than 2147482624 pixels", {"window.batch": 2**27}),
    Bad(
        "input has more than 2147482624 pixels",
        {"window.in_height": 2**31 - 1, "window.in_width": 2**31 - 1, "window.batch": 2**31 - 1},
    ),
    Bad("kernel_height is 0, expected a positive", {"window.kernel_height": 0}),
    Bad("kernel_width is -3, expected a positive", {"window.kernel_width": -3}),
    Bad("extent of the kernel is 8, expected at most 7", {"window.kernel_height": 8}),
    Bad("stride is 0, expected a positive", {"window.stride": 0}),
    Bad("padding is -1, expected at least 0", {"window.padding": -1}),
    Bad("padding is -1, expected at least 0", {"window.padding": -1}),
    Bad("extent of the padded input", {"window.padding": 2**30 + 2**29}),
    Bad("out_height is 4, expected 3", {"window.out_height": 4}),
    Bad("out_width is 3, expected 4", {"window.out_width": 3}),
    Bad(
        "padding is 2, expected at most 1",
        {"window.padding": 2, "window.out_height": 4, "window.out_width": 5},
    ),
    Bad("padding is 1, expected at most 0", {"average": 1}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments(bad: Bad) -> None:
    x = pitched(torch.randn(2, 20, 5, 7).half())
    output = output_map((2, 20, 3, 4), x.dtype)
    with pytest.raises(ValueError, match=bad.message):
        library().pool(change(operands(SMALL, x, output), bad.changes))
    assert output.view.isnan().all()
    output.assert_rest_untouched()


PLANTED = [
    PlantedBug("a row behind the map", "window.in_height - 1)", "window.in_height)", "pool.cuh"),
    PlantedBug(
        "a column before the map",
        "min(max(left + tap_column, 0)",
        "min(max(left + tap_column, -1)",
        "pool.cuh",
    ),
    PlantedBug(
        "rows of the wrong length",
        "y * window.in_width + x",
        "y * window.out_width + x",
        "pool.cuh",
    ),
    PlantedBug("NaN lost", "b > a || b != b ? b : a", "b > a ? b : a", "pool.cuh"),
    PlantedBug("zero chosen", "kAverage ? 0.0f : -INFINITY", "0.0f", "pool.cuh"),
    PlantedBug(
        "sum instead of average", "results[element] * p.reciprocal", "results[element]", "pool.cuh"
    ),
    PlantedBug(
        "channels not cut", "aligned && count >= Vector<T>::kElements", "aligned", "elementwise.cuh"
    ),
    PlantedBug(
        "a channel too many", "if (element < count)", "if (element <= count)", "elementwise.cuh"
    ),
]


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs(bug: PlantedBug, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = bug.library("pool.cu")
    monkeypatch.setattr(sys.modules[__name__], "library", lambda: mutated)

    def check() -> None:
        for case in CASES:
            run(case, torch.float16)

    with pytest.raises((AssertionError, EmulationError)):
        check()
