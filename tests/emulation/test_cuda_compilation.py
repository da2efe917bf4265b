"""nvcc compiles the CUDA C++ kernels without a warning, to the instructions that they are for."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from emulation import cuda_resources
from emulation.cuda_cases import DTYPES, available, library
from emulation.cuda_library import CSRC, ROOT, Gather, Head, Packing, Segment
from emulation.cuda_resources import LIMITS, Kernel, blocks_at_once


def script() -> ModuleType:
    """benchmarks/compile_cuda.py as a module."""
    path = ROOT / "benchmarks" / "compile_cuda.py"
    spec = importlib.util.spec_from_file_location("compile_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


compile_cuda = script()
ARCHITECTURES = compile_cuda.ARCHITECTURES

compiles = pytest.mark.skipif(
    cuda_resources.skip_reason() is not None, reason=str(cuda_resources.skip_reason())
)


def compiled(architecture: str) -> list:
    """Returns the rows of what nvcc makes of the sources, which have to be without problems."""
    rows = compile_cuda.compile_all([architecture])
    assert [(str(row), found) for row in rows if (found := compile_cuda.problems(row))] == []
    return rows


def check_report(report: list, architecture: str) -> None:
    """Compiles, and compares with the report."""
    rows = compiled(architecture)
    before = [row for row in report if row.architecture == architecture]
    if rows[0].nvcc == before[0].nvcc:
        different = [
            f"{new} was {old}" for old, new in zip(before, rows, strict=True) if old != new
        ]
        assert different == [], "run benchmarks/compile_cuda.py"
    else:
        # Another compiler gives out registers in its own way.
        assert [row.key for row in rows] == [row.key for row in before]


@pytest.fixture(scope="module")
def report() -> list:
    return compile_cuda.read()


@compiles
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compilation(report: list, architecture: str) -> None:
    check_report(report, architecture)


@compiles
@pytest.mark.sweep
@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ("sm_80", "sm_90")]
)
def test_other_architectures(report: list, architecture: str) -> None:
    check_report(report, architecture)


def test_report_has_no_problems(report: list) -> None:
    assert [(str(row), found) for row in report if (found := compile_cuda.problems(row))] == []


def kernels_of_sources() -> Iterator[str]:
    """Yields the names of the functions that the sources declare as kernels."""
    for path in sorted((CSRC / "cuda").iterdir()):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"//.*", "", text)
        yield from re.findall(
            r"__global__\s+void\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+(\w+)\(", text
        )
        assert text.count("__global__") == len(re.findall(r"__global__\s+void\s+__launch", text))


def test_report_has_every_kernel(report: list) -> None:
    expected = set(kernels_of_sources())
    assert len(expected) == 10
    assert {row.kernel for row in report} == expected
    assert set(compile_cuda.REQUIRED) | {"implicit_gemm_kernel"} == expected
    keys = [row.key for row in report if row.architecture == ARCHITECTURES[0]]
    assert len(keys) == len(set(keys))
    for architecture in ARCHITECTURES:
        assert [row.key for row in report if row.architecture == architecture] == keys
    assert len(report) == len(keys) * len(ARCHITECTURES)
    assert compile_cuda.in_order(report) == report


def test_bfloat16_is_refused_where_tensor_cores_lack_it(report: list) -> None:
    for row in report:
        refused = row.kernel == "implicit_gemm_kernel" and row.dtype == "bfloat16"
        refused &= row.architecture == "sm_75"
        assert bool(row.note) == refused
        assert not refused or row.hmma == 0


@available
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_report_has_every_tile(report: list, dtype: torch.dtype) -> None:
    """With the threads and the shared memory that the launcher asks for."""
    name = str(dtype).removeprefix("torch.")
    expected = set()
    for number in range(library().tile_count(dtype)):
        tile = library().tile_of(dtype, number)
        text = f"{tile.pixels}x{tile.columns}x{tile.depth} {tile.stages} stages"
        for architecture, variant in itertools.product(ARCHITECTURES, ("", "prologue")):
            expected.add((architecture, text, variant, tile.threads, tile.shared_bytes))
    found = {
        (row.architecture, row.tile, row.variant, row.threads, row.dynamic_shared)
        for row in report
        if row.kernel == "implicit_gemm_kernel" and row.dtype == name
    }
    assert found == expected, "run benchmarks/compile_cuda.py"


def changed(report: list, kernel: str, dtype: str = "float16", **changes: object) -> list[str]:
    row = next(
        row
        for row in report
        if (row.kernel, row.dtype, row.architecture) == (kernel, dtype, "sm_80")
    )
    assert compile_cuda.problems(row) == []
    return compile_cuda.problems(replace(row, **changes))


@pytest.mark.parametrize("column", ["spill_stores", "spill_loads", "stack_bytes", "ldl", "stl"])
def test_spills_are_found(report: list, column: str) -> None:
    assert changed(report, "pool_kernel", **{column: 4}) == [f"{column} is 4"]


def test_too_much_is_found(report: list) -> None:
    (problem,) = changed(report, "implicit_gemm_kernel", dynamic_shared=163 * 1024 + 1)
    assert problem == "166913 bytes of shared memory of 166912"
    assert changed(report, "implicit_gemm_kernel", blocks=0) == [
        "no block fits on a multiprocessor"
    ]


@pytest.mark.parametrize(
    ("kernel", "dtype", "column"),
    [
        *(
            ("implicit_gemm_kernel", "float16", column)
            for column in ("hmma", "ldsm", "ldsm_transposed", "ldgsts", "stg_128", "bar")
        ),
        ("implicit_gemm_kernel", "float32", "ffma"),
        ("implicit_gemm_kernel", "float32", "ldgsts"),
        ("pool_kernel", "bfloat16", "stg_128"),
        ("gather_pixels_kernel", "float32", "bar"),
        ("head_kernel", "float16", "ldg_128"),
    ],
)
def test_lack_of_instructions_is_found(report: list, kernel: str, dtype: str, column: str) -> None:
    assert changed(report, kernel, dtype, **{column: 0}) == [f"no {column}"]


def test_tensor_cores_in_float32_are_found(report: list) -> None:
    problem = ["float32 by tensor cores"]
    assert changed(report, "implicit_gemm_kernel", "float32", hmma=1) == problem


SPILLING = """
struct Parameters { float* data; };
__global__ void __launch_bounds__(1024) spilling_kernel(const __grid_constant__ Parameters p) {
  float values[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) values[i] = p.data[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) p.data[i * 1024 + 1023 - threadIdx.x] = values[i] * values[127 - i];
}
"""


@compiles
def test_warnings_of_spills_are_errors(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    with pytest.raises(RuntimeError, match="spill"):
        cuda_resources.compiled(source, "sm_80")


COUNTED = """
struct Parameters { float4* data; };
template <typename T, bool kFlag>
__global__ void __launch_bounds__(96) counted_kernel(const __grid_constant__ Parameters p) {
  __shared__ float4 kept[96];
  extern __shared__ float4 more[];
  kept[threadIdx.x] = __ldg(p.data + threadIdx.x);
  __syncthreads();
  more[threadIdx.x] = kept[95 - threadIdx.x];
  __syncthreads();
  p.data[threadIdx.x] = more[threadIdx.x ^ 1];
}
template __global__ void counted_kernel<float, true>(const __grid_constant__ Parameters p);
"""


@compiles
def test_what_is_read(tmp_path: Path) -> None:
    source = tmp_path / "counted.cu"
    source.write_text(COUNTED)
    (kernel,) = cuda_resources.compiled(source, "sm_90")
    assert kernel.name == "void counted_kernel<float, true>(Parameters)"
    assert (kernel.shared_bytes, kernel.threads) == (96 * 16, 96)
    assert 8 <= kernel.registers <= 32
    assert kernel.stack_bytes == kernel.spill_stores == kernel.spill_loads == 0
    assert (kernel.count("LDG"), kernel.count("LDG", "128"), kernel.count("STG", "128")) == (
        1,
        1,
        1,
    )
    assert (kernel.count("LDS", "128"), kernel.count("STS", "128"), kernel.count("BAR")) == (
        2,
        2,
        2,
    )
    assert kernel.count("LDG", "64") == kernel.count("HMMA") == kernel.count("LD") == 0
    assert kernel.instructions >= 12
    assert cuda_resources.compiled(source, "sm_90") == [kernel]


def test_counts() -> None:
    opcodes = {"LDSM.16.M88.4": 3, "LDSM.16.MT88.4": 2, "NOP": 9, "EXIT": 1}
    kernel = Kernel("kernel", 32, 0, 0, 0, 0, 128, opcodes)
    assert (kernel.count("LDSM"), kernel.count("LDSM", "MT88"), kernel.instructions) == (5, 2, 6)


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "threads", "expected"),
    [
        # By registers: 168 * 32 of 16384 in each of four partitions are three warps.
        ("sm_80", 168, 0, 128, 3),
        ("sm_80", 161, 0, 128, 3),
        ("sm_80", 128, 0, 128, 4),
        ("sm_90", 255, 0, 256, 1),
        # By shared memory, 1 KiB more for each block.
        ("sm_80", 32, 49152, 128, 3),
        ("sm_90", 32, 49152, 128, 4),
        ("sm_86", 32, 50 * 1024 - 1024, 128, 2),
        ("sm_86", 32, 50 * 1024 - 1023, 128, 1),
        ("sm_75", 32, 32768, 128, 2),
        ("sm_75", 32, 32769, 128, 1),
        # By warps, and by blocks.
        ("sm_90", 32, 0, 128, 16),
        ("sm_89", 32, 0, 128, 12),
        ("sm_90", 16, 0, 32, 32),
        ("sm_86", 16, 0, 32, 16),
        ("sm_89", 16, 0, 32, 24),
    ],
)
def test_blocks_at_once(
    architecture: str, registers: int, shared_bytes: int, threads: int, expected: int
) -> None:
    assert blocks_at_once(architecture, registers, shared_bytes, threads) == expected


def test_limits() -> None:
    """They are those by which Triton's kernels are chosen."""
    pytest.importorskip("triton")
    from emulation.resources import shared_limit

    for name, limits in LIMITS.items():
        assert limits.block_shared_bytes == shared_limit(name)


@available
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_shared_memory(dtype: torch.dtype) -> None:
    """What the launchers of kernels without tiles ask for."""
    x = torch.zeros(16, dtype=dtype)
    with library().recorded() as launches:
        for channels in range(16, 8192 + 16, 16):
            segment = Segment(data=x, pitch=channels, channels=channels)
            library().head(
                Head(dtype=dtype, batch=1, pixels=999, input=segment, weight=x, classes=1, output=x)
            )
        strides = {"batch_stride": 160, "channel_stride": 4, "height_stride": 2, "width_stride": 1}
        sizes = {"batch": 1, "channels": 40, "height": 2, "width": 2}
        output = {"output": x, "output_pitch": 48, "output_channels": 48}
        library().gather(Gather(dtype=dtype, input=x, **sizes, **strides, **output))
        of_segments = {"segment_count": 1, "channels": [40], "padded_in": 16}
        of_weight = {"taps": 9, "out_channels": 40, "columns": 48, "source": x, "output": x}
        library().pack_weight(Packing(source_dtype=dtype, dtype=dtype, **of_segments, **of_weight))
    most: dict[str, int] = {}
    for launch in launches:
        (name,) = re.findall(r"\d([a-z_]+_kernel)", launch.kernel)
        most[name] = max(most.get(name, 0), launch.shared_bytes)
    assert most == compile_cuda.LARGEST_SHARED_BYTES
