"""The emulation of CUDA C++ under sanitizers: no reports on what is right, and planted faults."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within, dot_bound

from emulation import cuda_library
from emulation.cuda_library import EmulationError, SanitizedLibrary, SanitizerError
from emulation.host_cuda_examples import (
    EXAMPLES,
    Bug,
    Case,
    Doubling,
    Sizes,
    Swap,
    case,
    poisoned,
    product_case,
    together,
)

pytestmark = pytest.mark.skipif(
    cuda_library.skip_reason() is not None, reason=str(cuda_library.skip_reason())
)

SANITIZERS = ["address", "undefined", "thread"]

BUGS = {
    "address": [
        Bug(
            "read behind shared memory",
            "reverse",
            "tile[length - 1 - mine]",
            "tile[length - mine]",
            "heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*reverse_kernel",
        ),
        Bug(
            "read behind global memory",
            "reverse",
            "if (mine < length) tile[mine] = p.x[first + mine]",
            "tile[mine] = p.x[first + mine]",
            r"heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*0 bytes to the right of 1000-byte",
        ),
        Bug(
            "write before global memory",
            "row_sums",
            "if (lane == 0) p.y[blockIdx.x]",
            "if (lane == 0) p.y[int64_t{blockIdx.x} - 1]",
            "heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*4 bytes to the left of 20-byte",
        ),
        Bug(
            "missing wait",
            "product",
            "    copy_async_wait<kStages - 2>();\n",
            "",
            "use-after-poison(.|\n)*load_matrices",
        ),
        Bug(
            "copy from behind global memory",
            "product",
            "a_row < p.rows && a_column < end",
            "a_column < end",
            "heap-buffer-overflow(.|\n)*READ of size 16|heap-buffer-overflow(.|\n)*copy_async_16",
        ),
    ],
    "undefined": [
        Bug(
            "shift by too much",
            "row_sums",
            "if (lane >= kWarps) return;",
            "if (lane >= 1 << p.columns) return;",
            "shift exponent 301 is too large",
        ),
    ],
    "thread": [
        Bug(
            "race of warps on a tile",
            "reverse",
            "  __syncthreads();\n  if (mine < length) p.y",
            "  if (mine < length) p.y",
            "data race(.|\n)*reverse_kernel",
        ),
        Bug(
            "race of warps on a partial sum",
            "row_sums",
            "  __syncthreads();\n  if (warp > 0)",
            "  if (warp > 0)",
            "data race(.|\n)*row_sums_kernel",
        ),
        Bug(
            "race of blocks on global memory",
            "row_sums",
            "if (lane == 0) p.y[blockIdx.x]",
            "if (lane == 0) p.y[blockIdx.x / 2]",
            "data race(.|\n)*row_sums_kernel",
        ),
        Bug(
            "race of a warp's lanes",
            "swap",
            "  __syncwarp();\n",
            "",
            "data race(.|\n)*swap_kernel",
        ),
        Bug(
            "shuffle in place of __syncwarp",
            "swap",
            "__syncwarp();",
            "__shfl_xor_sync(0xFFFFFFFFu, 0, 1);",
            "data race(.|\n)*swap_kernel",
        ),
        Bug(
            "race of a copy with a matrix",
            "product",
            "    copy_async_wait<kStages - 2>();\n    __syncthreads();\n",
            "    copy_async_wait<kStages - 2>();\n",
            "data race(.|\n)*copy_async_16(.|\n)*Previous read(.|\n)*load_matrices",
        ),
        Bug(
            "wait behind the barrier",
            "product",
            "    copy_async_wait<kStages - 2>();\n    __syncthreads();\n",
            "    __syncthreads();\n    copy_async_wait<kStages - 2>();\n",
            "data race",
        ),
        Bug(
            "race of parts on global memory",
            "product",
            "p.partials + int64_t{blockIdx.y} * p.rows * p.columns",
            "p.partials",
            "data race(.|\n)*product_kernel",
        ),
    ],
}


def sanitized(sanitizer: str, mutations: dict[str, str] | None = None) -> SanitizedLibrary:
    library = cuda_library.load(sanitizer, EXAMPLES, mutations=mutations)
    assert isinstance(library, SanitizedLibrary)
    return library


def small_case(name: str) -> Case:
    # ThreadSanitizer takes almost a millisecond to start a thread.
    return product_case(20, 104, 16, 2) if name == "product" else case(name)


@pytest.mark.parametrize("name", ["reverse", "row_sums", "product", "doubling", "swap"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_reports_on_examples(sanitizer: str, name: str) -> None:
    library = sanitized(sanitizer)
    example = small_case(name)
    bound = dot_bound(example.magnitude, example.length, torch.float32)
    with library.schedule("shuffled", 3):
        assert_within(example.run(library), example.expected, bound)


@pytest.mark.parametrize(
    ("sanitizer", "bug"),
    [
        pytest.param(sanitizer, bug, id=f"{sanitizer}: {bug}")
        for sanitizer, bugs in BUGS.items()
        for bug in bugs
    ],
)
def test_planted_bugs_are_reported(sanitizer: str, bug: Bug) -> None:
    library = sanitized(sanitizer, together(BUGS[sanitizer])[bug])
    assert bug.message is not None
    with pytest.raises(SanitizerError, match=bug.message):
        small_case(bug.example).run(library)


def test_misaligned_vector_is_reported() -> None:
    doubling = Doubling(x=torch.randn(9)[1:], y=poisoned(8), vectors=2)
    with pytest.raises(SanitizerError, match=r"misaligned address .* which requires 16 byte"):
        sanitized("undefined").call("example_doubling", doubling)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_errors_of_the_emulation_come_through(sanitizer: str) -> None:
    library = sanitized(sanitizer)
    with pytest.raises(EmulationError, match="threads in a block, expected 1 to 1024"):
        library.call("example_empty", Sizes(threads=2000, shared_bytes=0))
    swap = Swap(x=torch.randn(64), y=poisoned(64))
    with pytest.raises(RuntimeError, match=r"^thrown by a thread$"):
        library.call("example_throwing", swap)
    with pytest.raises(LookupError, match="this library has no example_nothing"):
        library.call("example_nothing")
