"""Planted bugs in the source of the convolution kernels, each of which the emulation must catch.

Each is compiled with two small tiles instead of all. A bug is caught when a launch is stopped, or
when a result is off by more than the tolerance, in any of a few cases and schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from emulation.cuda_cases import available
from emulation.cuda_library import (
    CSRC,
    EmulationError,
    Library,
    load,
    mutation,
)
from emulation.test_cuda_implicit_gemm import Case, nan_and_infinity, run

pytestmark = [available, pytest.mark.usefixtures("one_thread")]

HEADER = "csrc/cuda/implicit_gemm.cuh"
SOURCES = [
    CSRC / "cuda" / f"implicit_gemm{of}.cu" for of in ("", "_float16", "_bfloat16", "_float32")
]

FEW_KERNELS = """
#include "implicit_gemm.cuh"

namespace threshnet_fast::cuda {

GemmKernels float16_kernels() {
  return gemm_kernels<__half,
                      GemmTile<__half, 32, 32, 4, 4, TensorCores<__half, 32, 32, 2, 2>>,
                      GemmTile<__half, 16, 64, 2, 3, TensorCores<__half, 16, 64, 1, 4>>>();
}
GemmKernels bfloat16_kernels() { return {}; }
GemmKernels float32_kernels() { return {}; }

}  // namespace threshnet_fast::cuda
"""

CASES = [
    Case((48, 20), 2, (5, 7), 40, prologue=True, tile=0),
    Case((16, 48), 1, (7, 5), 72, apart=True, output_scale=True, tile=1, stored=71, shift=3),
    Case((40, 16), 1, (3, 9), 24, stride=2, tile=0, parts=3, output_scale=True),
    Case((112,), 1, (1, 1), 32, tile=1, parts=2),
    Case((48,), 1, (5, 7), 32, 1, padding=0, tile=0),
    Case((16,), 2, (3, 3), 40, tile=1, stored=35, shift=8),
    Case((32,), 1, (3, 1), 16, tile=0),
]


def few_kernels() -> dict[str, str]:
    """Returns the sources of the dtypes with two tiles in all, in one of the files."""
    first, *others = (f"csrc/cuda/{path.name}" for path in SOURCES[1:])
    return {first: FEW_KERNELS} | dict.fromkeys(others, "")


@dataclass(frozen=True)
class Bug:
    """One text of the header instead of another.

    Attributes:
        name: What is wrong.
        old: What the header says.
        new: What it says with the bug.
        count: How often ``old`` is there.
    """

    name: str
    old: str
    new: str
    count: int = 1

    def __str__(self) -> str:
        return self.name


# The barrier in the loop and the text around it, as there are several.
LOOP_BARRIER = "    __syncthreads();\n    if (step + Tile::kStages - 1 < steps)"
BUGS = [
    Bug(
        "no barrier between copies and products",
        LOOP_BARRIER,
        LOOP_BARRIER.replace("    __syncthreads();\n", ""),
    ),
    Bug(
        "waits for one group too few",
        "copy_async_wait<Tile::kStages - 2>",
        "copy_async_wait<Tile::kStages - 1>",
    ),
    Bug(
        "copies into the stage that is read",
        "copies.copy_stage(p, free_stage)",
        "copies.copy_stage(p, stage)",
    ),
    Bug("halo one row too far", "y >= 0 && y < p.in_height", "y >= 0 && y <= p.in_height"),
    Bug("halo one column too far", "x >= 0 && x < p.in_width", "x >= -1 && x < p.in_width"),
    Bug(
        "swizzle of the input's copies and loads differ",
        "left_ = swizzled<kLeftChunks>(row + lane % 16, lane / 16)",
        "left_ = (row + lane % 16) * kLeftChunks + lane / 16",
    ),
    Bug(
        "swizzle of the weight's copies and loads differ",
        "right_[j] = right_place(lane % 16,",
        "right_[j] = right_place(lane % 16 + 1,",
    ),
    Bug(
        "shared memory that nothing wrote is read",
        "if (!is_idle(pass, Tile::kLeft))",
        "if (!is_idle(pass, Tile::kLeft) && (inside_ & 1u << pass))",
    ),
    Bug("prologue on padding", "if (inside) place = values", "place = values"),
    Bug("prologue by another group's padding", "kGroups - 1 - group", "kGroups - 2 - group"),
    Bug("prologue of the next channels", "p.scale + channel +", "p.scale + channel + 8 +"),
    Bug(
        "a segment is left out",
        "if (++segment_ == p.segment_count)",
        "if (++segment_ >= p.segment_count - 1)",
    ),
    Bug(
        "the wrong tap's weights",
        "p.kernel_columns - p.tap_columns",
        "p.kernel_columns - p.kernel_columns",
    ),
    Bug(
        "a part begins where the last one did",
        "first_group = each * part +",
        "first_group = each * (part - (part > 0)) +",
    ),
    Bug(
        "all parts are written to one place",
        "int64_t{blockIdx.y} * p.pixels",
        "int64_t{0} * p.pixels",
    ),
    Bug(
        "a part is not added",
        "for (int part = 0; part < p.parts;",
        "for (int part = 1; part < p.parts;",
    ),
    Bug("the wrong lane's row", "visit(row_ + 16 * i + 8,", "visit(row_ + 16 * i + 4,"),
    Bug("the wrong lane's address", "row + lane % 16, lane / 16)", "row + lane % 8, lane / 16)"),
    Bug("not transposed", "load_matrices_transposed(b,", "load_matrices(b,"),
    Bug(
        "fragments swapped",
        "multiply_add<T>(sums_[i][j], a[i], b[0], b[1])",
        "multiply_add<T>(sums_[i][j], a[i], b[1], b[0])",
    ),
    Bug(
        "race on the tile of results",
        "  // Products of the last steps may still be read, and copies of none are under way.\n"
        "  __syncthreads();\n",
        "",
    ),
    Bug("results read before they are written", "  });\n  __syncthreads();\n", "  });\n"),
    Bug("bias of the next channels", "(biases + column)", "(biases + (column ^ kCount))"),
    Bug(
        "the output's last vector is too long",
        "p.vector_store && count == kElements",
        "p.vector_store",
    ),
    Bug(
        "fmaxf, which drops NaN",
        "rectified_pair<T>(pair[0], pair[1])",
        "rectified_pair<T>(fmaxf(0.0f, pair[0]), fmaxf(0.0f, pair[1]))",
    ),
]


def test_without_bugs() -> None:
    library = load(sources=SOURCES, mutations=few_kernels())
    assert isinstance(library, Library)
    assert not caught(library)


def caught(library: Library) -> bool:
    """Returns whether any case fails, in any of three orders of threads."""
    for order, case in (
        (order, case) for order in ("forward", "reverse", "shuffled") for case in CASES
    ):
        torch.manual_seed(0)
        with library.schedule(order, seed=1):
            try:
                run(case, torch.float16, library)
            except (EmulationError, AssertionError):
                return True
    try:
        nan_and_infinity(torch.float16, True, library)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bug_is_caught(bug: Bug) -> None:
    mutations = few_kernels() | mutation(HEADER, bug.old, bug.new, bug.count)
    library = load(sources=SOURCES, mutations=mutations)
    assert isinstance(library, Library)
    assert caught(library)
