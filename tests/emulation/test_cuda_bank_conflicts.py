"""The CUDA kernels' shared memory is accessed without bank conflicts.

The addresses are those of nvcc's PTX, executed by the emulator: no formula is repeated here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from emulation import cuda_ptx, test_cuda_gather, test_cuda_head, test_cuda_packing
from emulation.cuda_cases import available, library
from emulation.cuda_ptx import ptx_launches
from emulation.ptx_memory import SharedMemory
from emulation.test_cuda_implicit_gemm import Case, run

pytestmark = [
    available,
    pytest.mark.skipif(cuda_ptx.nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.usefixtures("one_thread"),
]


BANKS = 32
BANK_BYTES = 4


def ways(offsets: np.ndarray, size: int, mask: np.ndarray | None = None) -> int:
    """Returns how many words of one bank the worst access needs: 1 is without a conflict.

    Args:
        offsets: ``[blocks, threads]``, what each thread accesses; for ``ldmatrix`` each row.
        size: Bytes of each. At once served are as many neighbouring threads as take 128 bytes, all
            of a warp at most: eight of those that access 16 bytes, or eight rows of a matrix.
        mask: Which threads do.
    """
    active = np.ones_like(offsets, bool) if mask is None else mask
    offsets, active = np.broadcast_arrays(offsets, active)
    if offsets.shape[-1] == 1:
        return 1
    unit = max(size, BANK_BYTES)
    together = BANKS * BANK_BYTES // unit
    words = np.where(active, offsets // unit, -1).reshape(-1, together)
    words = np.sort(words, -1)
    new = words >= 0
    new[:, 1:] &= words[:, 1:] != words[:, :-1]
    return max(int(((words % together == bank) & new).sum(-1).max()) for bank in range(together))


@contextlib.contextmanager
def accesses() -> Iterator[dict[str, int]]:
    """Context manager within which the accesses of programs to shared memory are written down.

    Returns:
        The conflicts of each instruction, as :func:`ways` counts them, by its text.
    """
    found: dict[str, int] = {}
    locate = SharedMemory.locate

    def noted(
        self: Any, addresses: np.ndarray, size: int, mask: np.ndarray | None, text: str
    ) -> np.ndarray:
        offsets = locate(self, addresses, size, mask, text)
        found[text] = max(found.get(text, 1), ways(offsets, size, mask))
        return offsets

    with mock.patch.object(SharedMemory, "locate", noted):
        yield found


def kinds(found: dict[str, int]) -> set[str]:
    """Returns the instructions without types and operands."""
    return {text.split(".")[0] for text in found}


COPY_AND_LOAD = {
    torch.float16: {"cp", "ldmatrix", "ld", "st"},
    torch.bfloat16: {"cp", "ldmatrix", "ld", "st"},
    torch.float32: {"cp", "ld", "st"},
}


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.sweep)],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["sm_80", pytest.param("sm_90", marks=pytest.mark.sweep)])
def test_convolution(dtype: torch.dtype, prologue: bool, architecture: str) -> None:
    """Copies, loads of matrices and vectors, the prologue, the tile of results: in every tile."""
    for tile in range(library().tile_count(dtype)):
        case = Case((40, 24), 3, (5, 6), 72, prologue=prologue, tile=tile)
        with accesses() as found, ptx_launches(architecture, races=False):
            run(case, dtype)
        assert kinds(found) == COPY_AND_LOAD[dtype]
        assert {text: count for text, count in found.items() if count > 1} == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_head(dtype: torch.dtype) -> None:
    with accesses() as found, ptx_launches("sm_80", races=False):
        test_cuda_head.run(test_cuda_head.Case(128, 2, (3, 5), 40), dtype)
    assert kinds(found) == {"ld", "st"}
    assert {text: count for text, count in found.items() if count > 1} == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gather(dtype: torch.dtype) -> None:
    """Of an input whose pixels are neighbours, which is transposed."""
    with accesses() as found, ptx_launches("sm_80", races=False):
        test_cuda_gather.run(torch.randn(2, 80, 5, 11).to(dtype), gap=8)
    assert kinds(found) == {"ld", "st"}
    assert {text: count for text, count in found.items() if count > 1} == {}


def test_packing() -> None:
    case = test_cuda_packing.CASES[0]
    with accesses() as found, ptx_launches("sm_80", races=False):
        test_cuda_packing.test_weight(case, torch.float32, torch.float16, "forward")
    assert kinds(found) == {"ld", "st"}
    assert {text: count for text, count in found.items() if count > 1} == {}


@pytest.mark.parametrize(
    ("offsets", "size", "expected"),
    [
        # A row, a column of rows of 128 bytes, and that column swizzled.
        (np.arange(32) * 4, 4, 1),
        (np.arange(32) * 128, 4, 32),
        (np.arange(32) * 132, 4, 1),
        (np.arange(32) // 2 * 128, 4, 16),
        (np.zeros(32, int), 4, 1),
        # Halves of words, of neighbouring threads.
        (np.arange(32) * 2, 2, 1),
        (np.arange(32) * 8, 4, 2),
        # Eight threads at once.
        (np.arange(32) * 16, 16, 1),
        (np.arange(32) * 32, 16, 2),
        (np.arange(32) * 128, 16, 8),
        (np.arange(32) * 128 + (np.arange(32) % 8) * 16, 16, 1),
        (np.arange(32) // 8 * 128, 16, 1),
        # Sixteen threads at once.
        (np.arange(32) * 8, 8, 1),
        (np.arange(32) * 16, 8, 2),
    ],
)
def test_ways(offsets: np.ndarray, size: int, expected: int) -> None:
    assert ways(offsets[None], size) == expected
    assert ways(np.concatenate([offsets, np.arange(32) * size])[None], size) == expected


def test_inactive_threads_do_not_count() -> None:
    offsets = np.arange(32)[None] * 128
    assert ways(offsets, 4, np.arange(32)[None] < 3) == 3
    assert ways(offsets, 4, np.arange(32)[None] < 1) == 1
    assert ways(offsets[:, :1], 4, np.arange(32)[None] < 3) == 1
