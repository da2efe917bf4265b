"""Kernels compile ahead of time, and use no more of a GPU than it has."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from threshnet_fast.kernels import configurations, launch
from threshnet_fast.kernels.architectures import ARCHITECTURES as TABLE
from threshnet_fast.kernels.architectures import precision_for

from emulation.driver import compiled_for

ROOT = Path(__file__).resolve().parents[2]


def script():
    """benchmarks/compile_kernels.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "compile_kernels", ROOT / "benchmarks" / "compile_kernels.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


compile_kernels = script()

ALL_KERNELS = {
    "implicit_gemm_kernel",
    "split_k_reduction_kernel",
    "stem_kernel",
    "dense_layer_kernel",
    "pool_kernel",
    "one_image_kernel",
    "many_images_kernel",
    "checksum_kernel",
    "input_gradient_kernel",
    "weight_gradient_kernel",
    "weight_gradient_reduction_kernel",
    "column_sums_kernel",
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")],
)
def test_tiles(architecture: str, dtype: torch.dtype, precision: str) -> None:
    """The largest tile and the smallest, a prologue, and most segments with a split reduction."""
    found = TABLE[architecture]
    tiles = configurations.candidates(found, dtype, precision)
    with compiled_for(architecture) as log:
        for tile in (tiles[0], tiles[-1]):
            launches = list(compile_kernels.matrix_launches(dtype, precision, tile))
            launch.run([launches[0], *launches[-2:]])
    kernels = {entry.compiled.hash: entry.compiled for entry in log}
    assert [entry.name for entry in log].count("implicit_gemm_kernel") == 4
    assert len(kernels) == 5
    for compiled in kernels.values():
        row = compile_kernels.describe(architecture, dtype, precision, compiled)
        assert not compile_kernels.problems(row), row


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", compile_kernels.REPORTED)
def test_everything(architecture: str) -> None:
    rows = compile_kernels.compile_all(architecture, print)
    assert [(row, found) for row in rows if (found := compile_kernels.problems(row))] == []


@pytest.fixture(scope="module")
def report() -> list:
    return compile_kernels.read()


def test_report_has_no_problems(report: list) -> None:
    assert [(row, found) for row in report if (found := compile_kernels.problems(row))] == []


@pytest.mark.parametrize("architecture", compile_kernels.REPORTED)
def test_report_is_complete(report: list, architecture: str) -> None:
    """Every tile in every class of arithmetic, split and whole, and every kernel."""
    found = TABLE[architecture]
    rows = [row for row in report if row.architecture == architecture]
    assert {row.kernel for row in rows} >= ALL_KERNELS
    for dtype, precision in compile_kernels.CLASSES:
        name = str(dtype).removeprefix("torch.")
        of_class = [row for row in rows if (row.dtype, row.precision) == (name, precision)]
        if precision_for(architecture, precision) != precision:
            assert of_class == []
            continue
        assert {row.kernel for row in of_class} >= set(compile_kernels.MATRIX_KERNELS)
        compiled = {
            (row.tile, row.warps, row.stages)
            for row in of_class
            if row.kernel == "implicit_gemm_kernel"
        }
        for tile in configurations.candidates(found, dtype, precision):
            for split in (False, True):
                sizes = (
                    f"SPLIT={split} BLOCK_M={tile.block_m} BLOCK_N={tile.block_n} "
                    f"BLOCK_K={tile.block_k}"
                )
                assert (sizes, tile.num_warps, tile.num_stages) in compiled, (
                    f"{architecture} {name} {precision}: run benchmarks/compile_kernels.py"
                )


def test_problems_are_found(report: list) -> None:
    row = next(
        row
        for row in report
        if row.kernel == "implicit_gemm_kernel"
        and row.architecture == "sm_90"
        and row.dtype == "float16"
    )
    assert compile_kernels.problems(replace(row, spills=1)) == ["1 spills"]
    assert "shared memory" in compile_kernels.problems(replace(row, shared_bytes=300000))[0]
    assert "tensor-core" in compile_kernels.problems(replace(row, tensor_instructions=""))[0]
    assert "asynchronous" in compile_kernels.problems(replace(row, asynchronous_copies=0))[0]
    assert "no program" in compile_kernels.problems(replace(row, programs_at_once=0))[0]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "num_warps", "expected"),
    [
        # By registers: 168 * 32 of 16384 in each of four partitions are three warps.
        ("sm_80", 168, 0, 4, 3),
        ("sm_90", 255, 0, 8, 1),
        # By shared memory, 1 KiB more for each program.
        ("sm_86", 32, 50 * 1024 - 1024, 4, 2),
        ("sm_86", 32, 50 * 1024, 4, 1),
        ("sm_75", 32, 32768, 4, 2),
        # By warps.
        ("sm_90", 32, 0, 4, 16),
        ("sm_89", 32, 0, 4, 12),
        ("gfx90a", 64, 0, 4, 8),
        # 512 registers of 64 lanes in each of four partitions; 1536 of 32 lanes in each of two.
        ("gfx942", 128, 16384, 4, 4),
        ("gfx1100", 233, 0, 8, 1),
    ],
)
def test_programs_at_once(
    architecture: str, registers: int, shared: int, num_warps: int, expected: int
) -> None:
    found = compile_kernels.programs_at_once(architecture, registers, shared, num_warps)
    assert found == expected
