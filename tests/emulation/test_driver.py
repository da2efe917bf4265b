"""The stand-in driver: how launches are bound, compiled, run, recorded, and left behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from emulation import driver
from emulation.architectures import ARCHITECTURES
from emulation.driver import compiled_for, emulated
from emulation.example_kernels import (
    add_kernel,
    gather_kernel,
    matmul_kernel,
    softmax_kernel,
    tuned_add_kernel,
)
from emulation.ptx import PTXError


def add(x: torch.Tensor, y: torch.Tensor | None, out: torch.Tensor) -> None:
    add_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, x.numel(), BLOCK=128)


def divide_by_zero() -> None:
    raise ZeroDivisionError


def test_launch_is_recorded() -> None:
    x, y = torch.randn(300), torch.randn(300)
    out = torch.full((300,), torch.nan)
    with emulated("sm_80") as log:
        assert len(log) == 0
        add(x, y, out)
        add(x, None, out[:])
    assert torch.equal(out, x)
    assert [entry.name for entry in log] == ["add_kernel", "add_kernel"]
    assert log[0].grid == (3, 1, 1)
    assert log[0].num_warps == 4
    assert log[0].shared == 0
    assert log[0].steps > 10
    assert log.steps == log[0].steps + log[1].steps
    assert log[0].compiled.metadata.target.arch == 80
    assert ".target sm_80" in log[0].compiled.asm["ptx"]
    assert log[0].compiled.asm["cubin"]


def test_device_and_its_properties() -> None:
    for name, architecture in ARCHITECTURES.items():
        with compiled_for(name):
            active = triton.runtime.driver.active
            assert active.get_active_torch_device() == torch.device("cpu")
            assert active.get_current_target() == architecture.target
            properties = active.utils.get_device_properties(active.get_current_device())
            assert properties["max_shared_mem"] == architecture.shared_bytes
            assert properties["warpSize"] == architecture.warp_size
            assert properties["multiprocessor_count"] == architecture.multiprocessors


@pytest.mark.parametrize("context", [emulated, compiled_for])
def test_what_was_there_before_comes_back(context) -> None:
    config = triton.runtime.driver
    before = config._active, triton.compiler.CompiledKernel._init_handles
    with context("sm_90"):
        outer = config._active
        with pytest.raises(ZeroDivisionError), context("sm_80"):
            divide_by_zero()
        assert config._active is outer
        with context("sm_80"):
            assert config._active is not outer
        assert config._active is outer
    assert (config._active, triton.compiler.CompiledKernel._init_handles) == before


def test_unknown_architectures() -> None:
    with pytest.raises(ValueError, match="architecture is 'sm_81': expected one of sm_75, sm_80"):
        emulated("sm_81").__enter__()
    with pytest.raises(ValueError, match="architecture is 'gfx942': only NVIDIA's can be emulated"):
        emulated("gfx942").__enter__()


def test_other_versions_of_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    path = Path(driver.__file__)
    spec = importlib.util.spec_from_file_location("emulation.driver_again", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(RuntimeError, match=r"triton is 3\.8\.0: .* written for the internals of"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_architectures_do_not_share_what_they_compiled() -> None:
    x, out = torch.randn(100), torch.full((100,), torch.nan)
    for name in ("sm_80", "sm_90", "sm_80"):
        with emulated(name) as log:
            add(x, x, out)
        assert log[0].compiled.metadata.target.arch == int(name[3:])
    assert torch.equal(out, x + x)


def test_views_of_one_storage() -> None:
    """All of it is visible, and what a kernel writes through one view is read through another."""
    storage = torch.arange(400.0)
    with emulated("sm_80"):
        add(storage[100:150], storage[200:250], storage[300:350])
        add(storage[100:200], None, storage[100:200])
    expected = torch.arange(400.0)
    expected[300:350] = expected[100:150] + expected[200:250]
    assert torch.equal(storage, expected)


def test_bounds_are_those_of_the_storage() -> None:
    storage = torch.zeros(128)
    with emulated("sm_80"):
        add_kernel[(1,)](storage[64:], None, storage, 64, BLOCK=128)
        with pytest.raises(PTXError, match="add_kernel: global access out of bounds"):
            add_kernel[(1,)](storage[64:], None, storage, 65, BLOCK=128)


def test_alignment_is_that_of_the_tensor() -> None:
    """Vectors are accessed where the pointer allows it, and only there."""
    storage = torch.randn(2000)
    out = torch.empty(1024)
    with emulated("sm_80") as log:
        add_kernel[(1,)](storage, None, out, 1024, BLOCK=1024)
        add_kernel[(1,)](storage[1:], None, out, 1024, BLOCK=1024)
    assert torch.equal(out, storage[1:1025])
    assert "ld.global.v4" in log[0].compiled.asm["ptx"]
    assert "ld.global.v4" not in log[1].compiled.asm["ptx"]


def test_tuples() -> None:
    xs = (torch.randn(7), torch.randn(1), torch.randn(20)[3:])
    out = torch.full((25,), torch.nan)
    with emulated("sm_80"):
        gather_kernel[(1,)](xs, tuple(x.numel() for x in xs), out, BLOCK=32)
    assert torch.equal(out, torch.cat(xs))


@triton.jit
def scalars_kernel(out_ptr, a, b, c, d):
    tl.store(out_ptr, a)
    tl.store(out_ptr + 1, b)
    tl.store(out_ptr + 2, c)
    tl.store(out_ptr + 3, tl.where(d, 1.0, 0.0))


def test_scalars() -> None:
    out = torch.zeros(4, dtype=torch.float64)
    with emulated("sm_80"):
        scalars_kernel[(1,)](out, -5, 2**40, 0.5, True)
    assert out.tolist() == [-5, 2**40, 0.5, 1]


def test_empty_tensors_and_grids() -> None:
    with emulated("sm_80") as log:
        add_kernel[(1,)](torch.empty(0), None, torch.empty(0), 0, BLOCK=128)
        add_kernel[(0,)](torch.empty(0), None, torch.empty(0), 0, BLOCK=128)
    assert log[0].steps > 0
    assert log[1].steps == 0


def test_shape_of_the_grid() -> None:
    @triton.jit
    def where_kernel(out_ptr):
        x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        place = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
        tl.store(out_ptr + place, 100 * z + 10 * y + x)

    out = torch.full((2, 3, 4), -1)
    with emulated("sm_80") as log:
        where_kernel[lambda meta: (4, 3, 2)](out)
    assert log[0].grid == (4, 3, 2)
    z, y, x = torch.meshgrid(*(torch.arange(count) for count in (2, 3, 4)), indexing="ij")
    assert torch.equal(out, 100 * z + 10 * y + x)


def test_autotune() -> None:
    x = torch.randn(1000)
    out = torch.full((1000,), torch.nan)
    with emulated("sm_80") as log:
        tuned_add_kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, x, out, 1000)
    assert torch.equal(out, x + x)
    # Each configuration was tried.
    assert {entry.num_warps for entry in log} == {2, 4}


def test_configurations_that_do_not_fit_are_refused() -> None:
    a = torch.zeros(256, 256)
    arguments = (a, a, a, 256, 256, 256, "tf32", 128, 128, 64)
    for context in (emulated, compiled_for):
        with context("sm_86"), pytest.raises(triton.runtime.errors.OutOfResources, match="shared"):
            matmul_kernel[(2, 2)](*arguments, num_stages=3)
    with compiled_for("sm_90") as log:
        matmul_kernel[(2, 2)](*arguments, num_stages=3)
    assert log[0].shared > ARCHITECTURES["sm_86"].shared_bytes


def test_rewriting_leaves_nothing_behind() -> None:
    def subtract(text: str, name: str) -> str:
        assert name == "add_kernel"
        assert "add.f32" in text
        return text.replace("add.f32", "sub.f32")

    x, y = torch.randn(50), torch.randn(50)
    out = torch.full((50,), torch.nan)
    for rewrite, expected in ((None, x + y), (subtract, x - y), (None, x + y)):
        with emulated("sm_80", rewrite=rewrite) as log:
            add(x, y, out)
        assert torch.equal(out, expected)
        assert "add.f32" in log[0].compiled.asm["ptx"]


def test_a_failing_launch_changes_nothing() -> None:
    out = torch.full((64,), 7.0)
    with emulated("sm_80") as log, pytest.raises(PTXError):
        add_kernel[(3,)](torch.zeros(65), None, out, 65, BLOCK=32)
    assert (out == 7).all()
    assert len(log) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compile_only(name: str) -> None:
    x, out = torch.zeros(100), torch.full((100,), torch.nan)
    with compiled_for(name) as log:
        add(x, x, out)
        a = torch.zeros(64, 64).half()
        matmul_kernel[(1, 1)](a, a, a, 64, 64, 64, "ieee", 64, 64, 32)
    assert out.isnan().all()
    assert [entry.name for entry in log] == ["add_kernel", "matmul_kernel"]
    assert log.steps == 0
    binary = log[1].compiled.asm["cubin" if name.startswith("sm_") else "hsaco"]
    assert binary.startswith(b"\x7fELF")


def test_compile_and_run() -> None:
    x, out = torch.randn(100), torch.full((100,), torch.nan)
    with compiled_for("sm_89", run=True) as log:
        add(x, x, out)
    assert torch.equal(out, x + x)
    assert log.steps > 0
    with pytest.raises(ValueError, match="only NVIDIA's can be emulated"):
        compiled_for("gfx942", run=True).__enter__()


def test_uninitialised_tensors() -> None:
    x, out = torch.zeros(100), torch.zeros(200)
    with emulated("sm_80") as log:
        log.mark_uninitialised(out[100:])
        add(x, out[:100], out[:100])
        with pytest.raises(PTXError, match="uninitialised global memory is read"):
            add(x, out[100:], x)
        add(x, None, out[100:])
        add(x, out[100:], x)
    with emulated("sm_80") as log:
        log.mark_uninitialised(out)
        add(out[:0], None, out)
        add_kernel[(1,)](x, None, out, 50, BLOCK=128)
        add_kernel[(1,)](out, None, x, 50, BLOCK=128)
        with pytest.raises(PTXError, match="uninitialised global memory is read"):
            add_kernel[(1,)](out, None, x, 51, BLOCK=128)


def test_programs_with_many_warps_and_few() -> None:
    x = torch.randn(3, 600)
    for warps in (1, 2, 8, 16):
        y = torch.full_like(x, torch.nan)
        with emulated("sm_90"):
            softmax_kernel[(3,)](x, y, 600, BLOCK=1024, num_warps=warps)
        torch.testing.assert_close(y, x.softmax(1))


def test_results_do_not_depend_on_how_many_blocks_run_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from emulation import ptx_machine

    x = torch.randn(9, 100)
    results = []
    for threads in (32, 300, 8192):
        monkeypatch.setitem(ptx_machine.launch.__kwdefaults__, "threads_at_once", threads)
        y = torch.full_like(x, torch.nan)
        with emulated("sm_80"):
            softmax_kernel[(9,)](x, y, 100, BLOCK=128, num_warps=4)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
