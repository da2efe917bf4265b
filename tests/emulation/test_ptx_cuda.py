"""CUDA C++ through nvcc's PTX, with planted faults chosen by the preprocessor."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from emulation.ptx import PTXError, entries, modules, run_ptx, unsupported

NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

SOURCE = r"""
#include <cuda_fp16.h>

#ifdef NO_BARRIER
#define SYNCHRONISE()
#else
#define SYNCHRONISE() __syncthreads()
#endif

struct Shape { int rows, columns; long long pitch; float scale; };

// Transposes through a padded tile; blocks of 32 x 8 threads.
extern "C" __global__ void transpose(const float* x, float* y, Shape shape) {
  __shared__ float tile[32][33];
  int column = blockIdx.x * 32 + threadIdx.x;
  for (int i = threadIdx.y; i < 32; i += 8) {
    int row = blockIdx.y * 32 + i;
    if (row < shape.rows && column < shape.columns)
      tile[i][threadIdx.x] = shape.scale * x[row * shape.pitch + column];
  }
  SYNCHRONISE();
  int row = blockIdx.y * 32 + threadIdx.x;
  for (int i = threadIdx.y; i < 32; i += 8) {
    int to = blockIdx.x * 32 + i;
#ifdef OFF_BY_ONE
    if (row < shape.rows && to <= shape.columns)
#else
    if (row < shape.rows && to < shape.columns)
#endif
      y[to * (long long)shape.rows + row] = tile[threadIdx.x][i];
  }
}

// The sum of each row, one block a row.
extern "C" __global__ void row_sums(const float* x, float* y, double* total, int columns) {
  extern __shared__ float partial[];
  const float4* row = reinterpret_cast<const float4*>(x + (long long)blockIdx.x * columns);
  float sum = 0;
  for (int i = threadIdx.x; i < columns / 4; i += blockDim.x) {
    float4 four = row[i];
    sum += (four.x + four.y) + (four.z + four.w);
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  SYNCHRONISE();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / 32; ++warp) sum += partial[warp];
    y[blockIdx.x] = sum;
    atomicAdd(total, (double)sum);
  }
}

// One 16 x 8 x 16 product by inline assembly, operands by asynchronous copies and ldmatrix.
extern "C" __global__ void product(const __half* a, const __half* b, float* c) {
  __shared__ alignas(16) __half left[16][16], right[16][8];
  unsigned lane = threadIdx.x;
  unsigned l = (unsigned)__cvta_generic_to_shared(&left[lane / 2][lane % 2 * 8]);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(l), "l"(a + lane * 8) : "memory");
  if (lane < 16) {
    unsigned r = (unsigned)__cvta_generic_to_shared(&right[lane][0]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(r), "l"(b + lane * 8)
                 : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
#ifndef NO_WAIT
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
  __syncthreads();
  unsigned fa[4], fb[2];
  l = (unsigned)__cvta_generic_to_shared(&left[lane % 16][lane / 16 * 8]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(l) : "memory");
  unsigned r = (unsigned)__cvta_generic_to_shared(&right[lane % 16][0]);
#ifdef NOT_TRANSPOSED
#define TRANSPOSED ""
#else
#define TRANSPOSED ".trans"
#endif
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANSPOSED ".shared.b16 {%0,%1}, [%2];"
               : "=r"(fb[0]), "=r"(fb[1]) : "r"(r) : "memory");
  float d[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7},"
               " {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  float2* upper = reinterpret_cast<float2*>(c + lane / 4 * 8 + lane % 4 * 2);
  upper[0] = make_float2(d[0], d[1]);
  upper[32] = make_float2(d[2], d[3]);
}
"""

Compile = Callable[..., str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles the source with some names defined, once each."""
    folder: Path = tmp_path_factory.mktemp("cuda")
    known: dict[tuple[str, ...], str] = {}

    def compile_with(*defined: str) -> str:
        if defined not in known:
            source = folder / "kernels.cu"
            source.write_text(SOURCE)
            target = folder / "kernels.ptx"
            assert NVCC is not None
            command = [NVCC, "--ptx", "-arch=sm_80", "-O3", *(f"-D{name}" for name in defined)]
            subprocess.run([*command, str(source), "-o", str(target)], check=True)
            known[defined] = target.read_text()
        return known[defined]

    return compile_with


FAULTS = ("NO_BARRIER", "OFF_BY_ONE", "NO_WAIT", "NOT_TRANSPOSED")
"""Each in a kernel of its own or one that runs before, so that one compilation serves."""


def test_names(compiled: Compile) -> None:
    assert sorted(entries(compiled())) == ["product", "row_sums", "transpose"]


def test_modules(compiled: Compile) -> None:
    parts = modules(compiled())
    assert {name: entries(text) for name, text in parts.items()} == {
        name: [name] for name in ("product", "row_sums", "transpose")
    }
    transpose(parts["transpose"], 45, 70)
    row_sums(parts["row_sums"], 400)
    product(parts["product"])
    assert modules(compiled().replace(".target sm_80", ".target sm_90")) == parts
    assert modules(compiled()[: compiled().index(".visible .entry")]) == {}


def test_unsupported_instructions(compiled: Compile) -> None:
    text = compiled()
    assert [unsupported(text, name) for name in entries(text)] == [[], [], []]
    text = text.replace("bar.sync \t0;", "bar.sync \t0; tcgen05.wait::ld.sync.aligned;")
    assert "tcgen05" in text
    assert unsupported(text, "product") == ["not supported: tcgen05.wait::ld.sync.aligned"]


def transpose(text: str, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns + 3)
    y = torch.full((columns, rows), torch.nan)
    shape = struct.pack("<iiqfxxxx", rows, columns, columns + 3, 2.0)
    grid = (-(-columns // 32), -(-rows // 32))
    run_ptx(text, "transpose", grid, (32, 8), [x, y, shape])
    assert torch.equal(y, 2 * x[:, :columns].T)


def test_transpose(compiled: Compile) -> None:
    transpose(compiled(), 45, 70)
    transpose(compiled(), 64, 32)


def test_missing_barrier(compiled: Compile) -> None:
    with pytest.raises(PTXError, match="shared-memory race"):
        transpose(compiled(*FAULTS), 64, 32)


def test_off_by_one(compiled: Compile) -> None:
    with pytest.raises(PTXError, match=r"global access out of bounds|nothing wrote"):
        transpose(compiled("OFF_BY_ONE"), 45, 70)


def row_sums(text: str, columns: int, x: torch.Tensor | None = None) -> None:
    x = torch.randn(5, columns) if x is None else x
    y, total = torch.full((5,), torch.nan), torch.zeros(1, dtype=torch.float64)
    run_ptx(text, "row_sums", (5,), (96,), [x, y, total, columns], dynamic_shared=12)
    exact = x.double().sum(1)
    assert ((y - exact).abs() <= 2.0**-20 * x.abs().sum(1)).all()
    assert abs(total.item() - y.double().sum().item()) < 1e-9


def test_row_sums(compiled: Compile) -> None:
    row_sums(compiled(), 400)
    row_sums(compiled(), 8)


def test_row_sums_are_checked(compiled: Compile) -> None:
    with pytest.raises(PTXError, match="shared-memory race"):
        row_sums(compiled(*FAULTS), 400)
    misaligned = torch.randn(5 * 400 + 1)[1:].view(5, 400)
    with pytest.raises(PTXError, match="misaligned 16-byte access"):
        row_sums(compiled(), 400, misaligned)


def product(text: str) -> None:
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    c = torch.full((16, 8), torch.nan)
    run_ptx(text, "product", (1,), (32,), [a, b, c])
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


def test_product(compiled: Compile) -> None:
    product(compiled())


def test_product_is_checked(compiled: Compile) -> None:
    with pytest.raises(PTXError, match="read before its copy was waited for"):
        product(compiled(*FAULTS))
    with pytest.raises(AssertionError, match="not close"):
        product(compiled("NOT_TRANSPOSED"))
