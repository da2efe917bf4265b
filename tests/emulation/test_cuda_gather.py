"""Copies of maps of any strides into whole groups of channels by the CUDA kernels."""

from __future__ import annotations

import sys

import pytest
import torch
from op_cases import LAYOUT_SHAPES, LAYOUTS
from torch import Tensor

from emulation.cuda_cases import (
    DTYPES,
    SCHEDULES,
    Bad,
    Guarded,
    PlantedBug,
    available,
    bits,
    change,
    library,
    misaligned,
    output_map,
    pitch,
    strides,
    whole,
)
from emulation.cuda_library import EmulationError, Gather

pytestmark = [available, pytest.mark.usefixtures("one_thread")]

SHAPES = [
    *LAYOUT_SHAPES,
    (1, 70, 7, 7),
    (2, 37, 13, 17),
    (3, 16, 1, 1),
    (1, 64, 8, 8),
    (2, 130, 3, 5),
    (1, 9, 33, 1),
]


def operands(x: Tensor, output: Guarded) -> Gather:
    n, c, h, w = x.shape
    return Gather(
        dtype=x.dtype,
        batch=n,
        channels=c,
        height=h,
        width=w,
        input=x,
        **strides(x),
        output=output.view,
        output_pitch=pitch(output.view),
        output_channels=output.view.shape[1],
    )


def run(x: Tensor, *, gap: int, extra: int = 0) -> None:
    """Runs the kernel and compares the bits of all that it wrote."""
    n, c, h, w = x.shape
    output = output_map((n, whole(c) + extra, h, w), x.dtype, gap=gap)
    library().gather(operands(x, output))
    assert torch.equal(bits(output.view[:, :c]), bits(x)), "channels"
    assert (bits(output.view[:, c:]) == 0).all(), "zeros behind the channels"
    output.assert_rest_untouched()


def special(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns numbers, among them NaN, infinity and minus zero."""
    x = torch.randn(shape)
    for number in (torch.nan, -torch.inf, torch.inf, -0.0):
        x[torch.rand(shape) < 0.03] = number
    return x.to(dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather(layout: str, dtype: torch.dtype, schedule: str) -> None:
    with library().schedule(schedule):
        for index, shape in enumerate(SHAPES):
            x = LAYOUTS[layout](special(shape, dtype))
            run(x, gap=8 * (index % 3), extra=32 if index == 3 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_map(dtype: torch.dtype) -> None:
    """More vectors than a block has threads, and more than one tile of channels."""
    x = special((1, 1100, 2, 3), dtype)
    run(x, gap=0)
    run(x.contiguous(memory_format=torch.channels_last), gap=0)


def test_misaligned_channels_last() -> None:
    """Channels that are next to each other, but no vector of which is aligned."""
    wide = special((2, 5, 3, 60), torch.float16).permute(0, 3, 1, 2)
    for first in range(4):
        run(wide[:, first : first + 40], gap=0)
    pitched = special((2, 5, 3, 64), torch.float16).permute(0, 3, 1, 2)
    for first in (0, 1, 8):
        run(pitched[:, first : first + 40], gap=0)


def launched(x: Tensor) -> str:
    """Returns the name of the kernel that the launcher chooses."""
    n, c, h, w = x.shape
    output = output_map((n, whole(c), h, w), x.dtype)
    with library().recorded() as launches:
        library().gather(operands(x, output))
    (launch,) = launches
    return launch.kernel


def test_choice() -> None:
    """Warps run along what is next to each other."""
    x = torch.randn(2, 40, 5, 7)
    assert "gather_pixels" in launched(x)
    assert "gather_channels" in launched(x.contiguous(memory_format=torch.channels_last))
    assert "gather_channels" in launched(torch.randn(2, 40, 1, 1))
    assert "gather_pixels" in launched(torch.randn(40, 2, 1, 1).transpose(0, 1))
    assert "gather_channels" in launched(torch.randn(2, 3, 5, 7))


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_beyond_32_bits(channels_last: bool) -> None:
    """Pixels and channels that lie more than 2^31 elements apart; the gaps stay untouched."""
    far = 2**31 + 64
    steps = (0, 1, 0, far) if channels_last else (0, far // 15, 0, 1)
    x = torch.empty(far + 64, dtype=torch.float16).as_strided((1, 16, 1, 2), steps)
    x.copy_(torch.randn(x.shape))
    distance = 2**31 - 64
    y = torch.empty(2 * distance, dtype=torch.float16)
    y = y.as_strided((1, 16, 1, 2), (0, 1, 0, distance)).fill_(torch.nan)
    library().gather(operands(x, Guarded(y, y)))
    assert torch.equal(x, y)


BAD = [
    Bad("dtype is 3, expected 0", {"dtype": 3}),
    Bad("batch is 0, expected a positive", {"batch": 0}),
    Bad("height is 0, expected a positive", {"height": 0}),
    Bad("width is -7, expected a positive", {"width": -7}),
    Bad("input has more than 2147482624 pixels", {"height": 2**30}),
    Bad("channels is 0, expected a positive", {"channels": 0}),
    Bad("input is null", {"input": None}),
    Bad("input is not aligned to 2 bytes", {"input": misaligned(1)}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 16 bytes", {"output": misaligned(8)}),
    Bad("output_channels is 16, expected at least 20", {"output_channels": 16}),
    Bad("output_channels is 24, expected a multiple of 16", {"output_channels": 24}),
    Bad("output_pitch is 24, expected at least 32", {"output_pitch": 24}),
    Bad("output_pitch is 36, expected a multiple of 8", {"output_pitch": 36}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments(bad: Bad) -> None:
    x = torch.randn(2, 20, 5, 7).half()
    output = output_map((2, 32, 5, 7), x.dtype)
    with pytest.raises(ValueError, match=bad.message):
        library().gather(change(operands(x, output), bad.changes))
    assert output.view.isnan().all()
    output.assert_rest_untouched()


PLANTED = [
    PlantedBug("no barrier between reading and writing", "  __syncthreads();\n", "", "gather.cuh"),
    PlantedBug(
        "a channel too many",
        "row[channel] = first_channel + channel < gather.channels",
        "row[channel] = first_channel + channel <= gather.channels",
        "gather.cuh",
    ),
    PlantedBug(
        "a channel too many, along channels",
        "values.elements[element] = first + element < gather.channels",
        "values.elements[element] = first + element <= gather.channels",
        "gather.cuh",
    ),
    PlantedBug(
        "rows of different lengths",
        "+ pixel * kGatherWords + vector * 4",
        "+ pixel * (kGatherWords - 1) + vector * 4",
        "gather.cuh",
    ),
    PlantedBug(
        "channels behind the output",
        " || channel >= gather.output_channels) return",
        ") return",
        "gather.cuh",
    ),
    PlantedBug(
        "pixels behind the output",
        "first_pixel + pixel >= p.pixels",
        "first_pixel + pixel > p.pixels",
        "gather.cuh",
    ),
    PlantedBug(
        "images left out",
        "position.image * gather.batch_stride",
        "0 * gather.batch_stride",
        "gather.cuh",
    ),
]


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs(bug: PlantedBug, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = bug.library("gather.cu")
    monkeypatch.setattr(sys.modules[__name__], "library", lambda: mutated)

    def check() -> None:
        for layout in ("contiguous", "channels_last", "narrowed_channels_last"):
            for order in ("forward", "reverse"):
                test_gather(layout, torch.float16, order)

    with pytest.raises((AssertionError, EmulationError)):
        check()
