"""Weights and vectors packed by the CUDA kernels, to the bit."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from emulation.cuda_cases import (
    DTYPES,
    GROUP,
    SCHEDULES,
    Bad,
    Guarded,
    PlantedBug,
    available,
    bits,
    change,
    fenced,
    library,
    misaligned,
    whole,
)
from emulation.cuda_library import MAX_SEGMENTS, EmulationError, Packing, VectorPacking

pytestmark = [available, pytest.mark.usefixtures("one_thread")]

TYPES = [(torch.float32, dtype) for dtype in DTYPES] + [(dtype, dtype) for dtype in DTYPES[:2]]
"""Of the source, and of what is packed."""


@dataclass(frozen=True)
class Case:
    """A weight; ``columns`` of 0 are the output channels in whole groups."""

    channels: tuple[int, ...]
    out: int
    taps: int = 1
    padded_in: int = GROUP
    columns: int = 0
    rows_are_outputs: bool = False
    shift: int = 0

    def __str__(self) -> str:
        kind = "rows" if self.rows_are_outputs else f"{self.taps}taps-by{self.padded_in}"
        segments = "+".join(map(str, self.channels))
        return f"{segments}to{self.out}in{self.columns}-{kind}+{self.shift}"


CASES = [
    Case((64,), 128, 1),
    Case((40, 3, 17), 33, 9),
    Case((3,), 20, 9, padded_in=1),
    Case((3,), 32, 49, padded_in=1, columns=48),
    Case((68, 40, 16, 116, 24), 68, 9),
    Case((1,), 1, 1, columns=1, shift=1),
    Case((5, 6), 7, 3, columns=7, shift=3),
    Case((1,) * MAX_SEGMENTS, 16, 1),
    Case(tuple(range(1, MAX_SEGMENTS + 1)), 3, 4, padded_in=1),
    Case((37,), 10, columns=10, rows_are_outputs=True),
    Case((960,), 33, columns=40, rows_are_outputs=True, shift=5),
    Case((20, 16, 1), 4, columns=4, rows_are_outputs=True),
    Case((20, 3), 4, padded_in=1, columns=5, rows_are_outputs=True),
]


def special(*shape: int) -> Tensor:
    """Returns numbers that need rounding, and some that half precision has no room for."""
    x = torch.randn(shape)
    for number in (torch.nan, torch.inf, -0.0, 1e-7, 65520.0, -1e20, 1 + 2**-9, 1 + 2**-11):
        x[torch.rand(shape) < 0.02] = number
    return x


def expected(case: Case, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a packed weight, [taps, channels, columns] or the last two the other way round."""
    columns = case.columns or whole(case.out)
    parts = []
    first = 0
    for count in case.channels:
        rows = -(-count // case.padded_in) * case.padded_in
        part = torch.zeros(case.taps, rows, columns, dtype=dtype)
        part[:, :count, : case.out] = weight[:, first : first + count].permute(2, 1, 0)
        parts.append(part)
        first += count
    packed = torch.cat(parts, 1)
    return packed[0].T.contiguous() if case.rows_are_outputs else packed


def operands(case: Case, source: Tensor, output: Guarded) -> Packing:
    return Packing(
        source_dtype=source.dtype,
        dtype=output.view.dtype,
        segment_count=len(case.channels),
        channels=case.channels,
        padded_in=case.padded_in,
        taps=case.taps,
        out_channels=case.out,
        columns=case.columns or whole(case.out),
        rows_are_outputs=case.rows_are_outputs,
        source=source,
        output=output.view,
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Asserts the same bits, but for those of NaNs."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(bits(actual.nan_to_num(9)), bits(expected.nan_to_num(9)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("source", "dtype"), TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight(case: Case, source: torch.dtype, dtype: torch.dtype, schedule: str) -> None:
    weight = fenced(special(case.out, sum(case.channels), case.taps).to(source))
    packed = expected(case, weight, dtype)
    output = Guarded.empty(packed.shape, packed.stride(), dtype, case.shift)
    with library().schedule(schedule):
        library().pack_weight(operands(case, weight, output))
    assert_same(output.view, packed)
    output.assert_rest_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "behind"), [((40,), 0), ((40, 3, 17), 32), ((1,) * MAX_SEGMENTS, 0), ((300,), 0)]
)
def test_vector(channels: tuple[int, ...], behind: int, dtype: torch.dtype) -> None:
    source = fenced(special(sum(channels)).to(dtype))
    parts = [part.float() for part in source.split(channels)]
    padded = [torch.cat([part, torch.zeros(whole(len(part)) - len(part))]) for part in parts]
    packed = torch.cat([*padded, torch.zeros(behind)])
    output = Guarded.empty(packed.shape, (1,), torch.float32, 1)
    library().pack_vector(vector_operands(channels, source, output))
    assert_same(output.view, packed)
    output.assert_rest_untouched()


def test_vector_without_padding() -> None:
    """The last group of the last segment may be cut."""
    source = torch.randn(20)
    output = Guarded.empty((20,), (1,), torch.float32)
    library().pack_vector(vector_operands((20,), source, output))
    assert torch.equal(output.view, source)
    output.assert_rest_untouched()


def vector_operands(channels: tuple[int, ...], source: Tensor, output: Guarded) -> VectorPacking:
    return VectorPacking(
        source_dtype=source.dtype,
        segment_count=len(channels),
        channels=channels,
        length=output.view.numel(),
        source=source,
        output=output.view,
    )


BAD = [
    Bad("dtype is 3, expected 0", {"dtype": 3}),
    Bad("source_dtype is 2, expected 0 or 1", {"source_dtype": 2}),
    Bad("segment_count is 0, expected a positive", {"segment_count": 0}),
    Bad("segment_count is 17, expected at most 16", {"segment_count": 17}),
    Bad("channels of a segment is 0, expected a positive", {"segment_count": 3}),
    Bad("channels of a segment is -1, expected a positive", {"channels": (20,) * 1 + (-1,) * 15}),
    Bad("channels of all segments is", {"channels": (2**31 - 32,) * 16}),
    Bad("padded_in is neither 1 nor 16", {"padded_in": 0}),
    Bad("taps is 0, expected a positive", {"taps": 0}),
    Bad("taps is 9, expected 1", {"rows_are_outputs": 1}),
    Bad("channels of all segments and taps is", {"taps": 2**30}),
    Bad("out_channels is 0, expected a positive", {"out_channels": 0}),
    Bad("columns is 6, expected at least 7", {"columns": 6}),
    Bad("columns is 2147483647, expected at most", {"columns": 2**31 - 1}),
    Bad("source is null", {"source": None}),
    Bad("source is not aligned to 4 bytes", {"source": misaligned(2)}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 2 bytes", {"output": misaligned(1)}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_weight(bad: Bad) -> None:
    case = Case((20, 3), 7, 9)
    output = Guarded.empty((9, 48, 16), (48 * 16, 16, 1), torch.float16)
    given = operands(case, torch.randn(7, 23, 9), output)
    with pytest.raises(ValueError, match=bad.message):
        library().pack_weight(change(given, bad.changes))
    assert output.view.isnan().all()
    output.assert_rest_untouched()


BAD_VECTORS = [
    Bad("dtype is -1, expected 0", {"source_dtype": -1}),
    Bad("segment_count is 0, expected a positive", {"segment_count": 0}),
    Bad("segment_count is 17, expected at most 16", {"segment_count": 17}),
    Bad("channels of a segment is 0, expected a positive", {"channels": (20, 0)}),
    Bad("length is 34, expected at least 35", {"length": 34}),
    Bad("source is null", {"source": None}),
    Bad("source is not aligned to 4 bytes", {"source": misaligned(2)}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 4 bytes", {"output": misaligned(2)}),
]


@pytest.mark.parametrize("bad", BAD_VECTORS, ids=str)
def test_bad_vector(bad: Bad) -> None:
    output = Guarded.empty((48,), (1,), torch.float32)
    given = vector_operands((20, 3), torch.randn(23), output)
    with pytest.raises(ValueError, match=bad.message):
        library().pack_vector(change(given, bad.changes))
    assert output.view.isnan().all()
    output.assert_rest_untouched()


PLANTED = [
    PlantedBug(
        "no barrier before the transposed tile is read", "  __syncthreads();\n", "", "packing.cuh"
    ),
    PlantedBug(
        "not transposed",
        "tile[lane * (kPackingTile + 1) + row]",
        "tile[row * (kPackingTile + 1) + lane]",
        "packing.cuh",
    ),
    PlantedBug(
        "segments without padding", "    if (packed < packed_first) return -1;\n", "", "packing.cuh"
    ),
    PlantedBug(
        "every segment from the first channel", "  first += channels;\n", "  \n", "packing.cuh"
    ),
    PlantedBug(
        "columns not cut", "if (first_column + lane >= p.columns) return;", "", "packing.cuh"
    ),
    PlantedBug(
        "columns behind the source",
        "channel >= 0 && first_column + column < p.out_channels",
        "channel >= 0",
        "packing.cuh",
    ),
    PlantedBug(
        "rows not cut", "if (first_row + row >= p.rows * p.taps) continue;", "", "packing.cuh"
    ),
    PlantedBug(
        "rows behind the source",
        "channel >= 0 && output_channel < p.out_channels",
        "channel >= 0",
        "packing.cuh",
    ),
]


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs(bug: PlantedBug, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = bug.library("packing.cu")
    monkeypatch.setattr(sys.modules[__name__], "library", lambda: mutated)

    def check() -> None:
        for case in CASES:
            for order in ("forward", "reverse"):
                test_weight(case, torch.float32, torch.float16, order)

    with pytest.raises((AssertionError, EmulationError)):
        check()
