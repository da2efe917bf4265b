"""What machine code tells of the resources of kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from emulation.architectures import ARCHITECTURES
from emulation.driver import compiled_for
from emulation.example_kernels import add_kernel, matmul_kernel
from emulation.resources import Resources, resources, shared_limit


def of_matmul(
    architecture: str, dtype: torch.dtype, precision: str = "ieee", **options: int
) -> Resources:
    a = torch.zeros(128, 128, dtype=dtype)
    with compiled_for(architecture) as log:
        matmul_kernel[(1, 1)](a, a, a, 128, 128, 128, precision, 64, 64, 32, **options)
    return resources(log[0].compiled)


TENSOR_CORES = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
    "gfx1100": "v_wmma",
}


@pytest.mark.parametrize("architecture", TENSOR_CORES)
def test_tensor_cores(architecture: str) -> None:
    found = of_matmul(architecture, torch.float16)
    assert found.architecture == architecture
    assert found.tensor_instructions[TENSOR_CORES[architecture]] > 0
    assert found.uses_tensor_cores
    assert found.spills == 0
    assert 16 <= found.registers <= 255
    assert 0 < found.shared_bytes <= shared_limit(architecture)
    assert found.fits


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_without_tensor_cores(architecture: str) -> None:
    """float32 is multiplied exactly by ordinary instructions, as is all by Triton for sm_75."""
    found = of_matmul(architecture, torch.float32)
    assert not found.uses_tensor_cores
    assert found.tensor_instructions == {}


def test_tf32_uses_tensor_cores() -> None:
    assert of_matmul("sm_80", torch.float32, "tf32").tensor_instructions["HMMA"] > 0


def test_asynchronous_copies() -> None:
    assert of_matmul("sm_80", torch.float16, num_stages=3).asynchronous_copies > 0
    assert of_matmul("sm_80", torch.float16, num_stages=1).asynchronous_copies == 0
    assert of_matmul("sm_75", torch.float16, num_stages=3).asynchronous_copies == 0


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("sm_80", torch.float32), ("gfx1100", torch.float16)]
)
def test_spills(architecture: str, dtype: torch.dtype) -> None:
    found = of_matmul(architecture, dtype, num_warps=1, num_stages=1)
    assert found.spills > 0
    assert found.stack_bytes > 0


def test_kernel_without_shared_memory() -> None:
    x = torch.zeros(100)
    with compiled_for("sm_90") as log:
        add_kernel[(1,)](x, x, x, 100, BLOCK=128)
    found = resources(log[0].compiled)
    assert found.shared_bytes == 0
    assert found.spills == found.stack_bytes == found.asynchronous_copies == 0


def test_limits() -> None:
    assert shared_limit("sm_86") == shared_limit("sm_89") == shared_limit("sm_120") == 101376
    assert shared_limit("sm_75") == 65536
    assert shared_limit("sm_80") == 166912
    assert shared_limit("sm_90") == shared_limit("sm_100") == 232448
    assert {shared_limit(name) for name in ARCHITECTURES if name.startswith("gfx")} == {65536}
    base = Resources("sm_86", 32, 0, 0, 101376, {}, 0)
    assert base.fits
    assert not Resources("sm_86", 32, 0, 0, 101377, {}, 0).fits
