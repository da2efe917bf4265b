"""Kernels compile ahead of time, and use no more of a GPU than it has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from threshnet_fast.kernels import configurations, launch

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


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("dtype", "precision", "every"),
    [(torch.float16, "ieee", 2), (torch.float32, "tf32", 4), (torch.float32, "ieee", 4)],
)
def test_tiles(architecture: str, dtype: torch.dtype, precision: str, every: int) -> None:
    found = configurations.ARCHITECTURES[architecture]
    tiles = configurations.candidates(found, dtype, precision)[::every]
    with compiled_for(architecture) as log:
        for tile in tiles:
            launch.run(list(compile_kernels.matrix_launches(architecture, dtype, precision, tile)))
    kernels = {entry.compiled.hash: entry.compiled for entry in log}
    assert len(kernels) > len(tiles)
    for compiled in kernels.values():
        row = compile_kernels.describe(architecture, dtype, precision, compiled)
        assert not compile_kernels.problems(row), row


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", list(configurations.ARCHITECTURES))
def test_everything(architecture: str) -> None:
    rows = compile_kernels.compile_all(architecture, print)
    assert [(row, found) for row in rows if (found := compile_kernels.problems(row))] == []


@pytest.fixture(scope="module")
def report() -> list:
    return compile_kernels.read()


def test_report_has_no_problems(report: list) -> None:
    assert [(row, found) for row in report if (found := compile_kernels.problems(row))] == []


@pytest.mark.parametrize("architecture", list(configurations.ARCHITECTURES))
def test_report_is_complete(report: list, architecture: str) -> None:
    """Every tile in every class of arithmetic, and every kernel of networks and operators."""
    found = configurations.ARCHITECTURES[architecture]
    rows = [row for row in report if row.architecture == architecture]
    for dtype, precision in compile_kernels.CLASSES:
        if configurations.precision_for(architecture, precision) != precision:
            continue
        name = str(dtype).removeprefix("torch.")
        of_class = [row for row in rows if (row.dtype, row.precision) == (name, precision)]
        for tile in configurations.candidates(found, dtype, precision):
            sizes = f"BLOCK_M={tile.block_m} BLOCK_N={tile.block_n} BLOCK_K={tile.block_k}"
            assert any(
                row.kernel == "implicit_gemm_kernel" and sizes in row.tile for row in of_class
            ), f"{sizes} {name} {precision}: run benchmarks/compile_kernels.py"
        kernels = {row.kernel for row in of_class}
        assert kernels >= set(compile_kernels.MATRIX_KERNELS) - {"dense_layer_kernel"}


def test_problems_are_found(report: list) -> None:
    from dataclasses import replace

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
