"""Bugs planted in the convolution kernel, each of which the tests of the kernel must notice."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from threshnet_fast.kernels import implicit_gemm
from threshnet_fast.kernels.configurations import Configuration

from emulation.driver import emulated
from emulation.interpreter import interpreted
from emulation.mutation import mutated, without_instruction
from emulation.ptx_types import PTXError
from emulation.test_triton_implicit_gemm import Case, run, split

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = Case((40, 24), 1, (5, 6), 24, prologue=True)
HARMONIC = Case((68, 40, 16), 1, (4, 4), 40)
SPLIT = Case((96,), 1, (2, 2), 40, configuration=split(3))

SOURCE_BUGS = {
    "mask before the prologue": (
        DENSE,
        "x = tl.where(mask, activation, 0.0).to(x.dtype)",
        "x = activation.to(x.dtype)",
    ),
    "halo off by one": (HARMONIC, "left = column * stride - pad_columns", "left = column * stride"),
    "halo not masked": (
        HARMONIC,
        "& (y_in >= 0) & (y_in < in_height) & (x_in >= 0) & (x_in < in_width)",
        "& (y_in >= 0) & (y_in < in_height) & (x_in >= 0)",
    ),
    "a segment missing": (
        HARMONIC,
        "for segment in tl.static_range(1, len(xs)):",
        "for segment in tl.static_range(1, len(xs) - 1):",
    ),
    "a part of the split reduction missing": (
        SPLIT,
        "for part in range(parts):",
        "for part in range(parts - 1):",
    ),
    "parts of the split reduction overlap": (
        SPLIT,
        "first_step = part * steps // tl.num_programs(1)",
        "first_step = part * (steps - 1) // tl.num_programs(1)",
    ),
    "bias in the wrong channel": (HARMONIC, "bias_ptr + n", "bias_ptr + n // 2"),
    "sums forgotten between steps": (
        HARMONIC,
        "sums = tl.dot(x, weight, sums, input_precision=PRECISION)",
        "sums = tl.dot(x, weight, input_precision=PRECISION)",
    ),
    "taps transposed": (
        HARMONIC,
        "shift_of_tap = tap_row * in_width + tap_column",
        "shift_of_tap = tap_column * in_width + tap_row",
    ),
}

# What a test may report: a wrong number, or something that a GPU forbids.
NOTICED = (AssertionError, PTXError)


@pytest.mark.parametrize("bug", SOURCE_BUGS)
def test_source_emulated(bug: str) -> None:
    case, old, new = SOURCE_BUGS[bug]
    with mutated(implicit_gemm, old, new), emulated("sm_80"), pytest.raises(NOTICED):
        run(case, torch.float16, "ieee")


@pytest.mark.parametrize("bug", SOURCE_BUGS)
def test_source_interpreted(bug: str) -> None:
    case, old, new = SOURCE_BUGS[bug]
    errors = (AssertionError, implicit_gemm.triton.runtime.errors.InterpreterError)
    with mutated(implicit_gemm, old, new), interpreted(), pytest.raises(errors):
        run(case, torch.float32, "ieee")


def test_unchanged_passes() -> None:
    """The counterpart: what the bugs are planted in is right, also when it is copied."""
    with mutated(implicit_gemm, "bias_ptr + n", "bias_ptr + n + 0"), emulated("sm_80"):
        for case in (DENSE, HARMONIC, SPLIT):
            run(case, torch.float16, "ieee")


def test_wrong_divisibility() -> None:
    """A promise of alignment that does not hold makes the compiler emit wide accesses."""
    case = Case((37, 24), 1, (3, 4), 24, apart=True)
    old = '"VECTOR": vector_width('
    new = '"VECTOR": 8 + 0 * vector_width('
    error = pytest.raises(PTXError, match=r"misaligned|out of bounds")
    with mutated(implicit_gemm, old, new), emulated("sm_80"), error:
        run(case, torch.float16, "ieee")


PIPELINED = Case((96,), 1, (5, 5), 24, configuration=Configuration(32, 32, 32, 4, 3))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("instruction", "idle"),
    [
        # Between the first two prefetches the compiler puts one that orders nothing.
        (r"bar\.sync[ \t]+0", [0]),
        (r"cp\.async\.wait_group[ \t]+\S+", []),
    ],
)
def test_dropped_synchronisation(architecture: str, instruction: str, idle: list[int]) -> None:
    """The absence of every barrier and wait that is needed is noticed."""
    with emulated(architecture) as log:
        run(PIPELINED, torch.float16, "ieee")
    count = len(re.findall(instruction, log[0].compiled.asm["ptx"]))
    assert count > 0
    unnoticed = []
    for number in range(count):
        rewrite = without_instruction(instruction, number)
        try:
            with emulated(architecture, rewrite=rewrite):
                run(PIPELINED, torch.float16, "ieee")
        except NOTICED:
            continue
        unnoticed.append(number)
    assert unnoticed == idle


@pytest.mark.parametrize("architecture", ["sm_80"])
def test_swapped_fragments(architecture: str) -> None:
    """The operands of a matrix product in the wrong order of registers."""

    def swap(text: str, name: str) -> str:
        pattern = r"(mma\.sync\S+\s*\{[^}]*\},\s*\{\s*)(%r\d+), (%r\d+)"
        changed, times = re.subn(pattern, r"\1\3, \2", text, count=1)
        assert times == 1
        return changed

    with emulated(architecture, rewrite=swap), pytest.raises(AssertionError):
        run(PIPELINED, torch.float16, "ieee")
