"""The CUDA C++ backend: whether it can run, and networks prepared for it.

Its kernels need neither Triton nor a compiler where they run. They compute results only: the
gradients of an operator come from Triton where that is available, else from PyTorch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..plan.ir import Plan
from . import cuda_graphs
from .gpu_plan import GpuPlanCache

if TYPE_CHECKING:
    from .cuda_plan import CudaPlan, Target

__all__ = ["DTYPES", "PlanCache", "architecture", "objection", "target", "unavailable_reason"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels compute in; bfloat16 from sm_80 on."""

_OLDEST = 75
_OLDEST_WITH_BFLOAT16 = 80


class Properties(NamedTuple):
    """What the kernels have to know of a device.

    Attributes:
        architecture: Compute capability, 90 for 9.0.
        multiprocessors: How many it has.
        shared_bytes: Shared memory that one thread block may have.
    """

    architecture: int
    multiprocessors: int
    shared_bytes: int


def unavailable_reason() -> str | None:
    """Returns one line saying why this backend cannot run, or None when it can."""
    if torch.version.hip is not None:
        return "torch was built for ROCm, and the CUDA kernels run on NVIDIA GPUs"
    if torch.cuda.is_available():
        return extension.cuda_unavailable_reason()
    return extension.cuda_left_out_reason() or "torch finds no CUDA device"


def architecture(device: torch.device) -> str:
    """Returns what a device is to a compiler: ``"sm_90"``.

    Args:
        device: A CUDA device.
    """
    return f"sm_{_properties(device).architecture}"


def objection(x: Tensor, dtype: torch.dtype | None = None) -> Exception | None:
    """Returns the error that this backend would raise for a tensor, or None.

    Args:
        x: A tensor that a kernel would read.
        dtype: What to compute in; None means the dtype of ``x``.
    """
    dtype = x.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        return TypeError(f"backend 'cuda' needs one of {names}: these tensors are {dtype}")
    reason = unavailable_reason()
    if reason is not None:
        return RuntimeError(f"backend 'cuda' is unavailable: {reason}")
    if x.device.type != _device_type():
        return ValueError(
            f"backend 'cuda' needs tensors on {_device_type()}, these are on {x.device}"
        )
    number = _properties(x.device).architecture
    if number < _OLDEST:
        return RuntimeError(f"backend 'cuda' is unavailable: {x.device} is sm_{number}, too old")
    if dtype is torch.bfloat16 and number < _OLDEST_WITH_BFLOAT16:
        return TypeError(
            f"backend 'cuda' needs sm_{_OLDEST_WITH_BFLOAT16} or newer for torch.bfloat16: "
            f"{x.device} is sm_{number}"
        )
    failure = _launch_failure(x.device)
    if failure is not None:
        return RuntimeError(f"backend 'cuda' is unavailable: {failure}")
    return None


def target(device: torch.device, dtype: torch.dtype) -> Target:
    """Returns what to prepare plans for on a device.

    Args:
        device: The device of the tensors.
        dtype: What to compute in.
    """
    from .cuda_plan import Target

    return Target(device, dtype, *_properties(device))


class PlanCache(GpuPlanCache["Target", "CudaPlan", Tensor]):
    """Prepared plans and packed weights of a network that does not change.

    Calls may come from several threads at once.
    """

    def _target(self, device: torch.device, dtype: torch.dtype) -> Target:
        return target(device, dtype)

    def _prepare(self, plan: Plan, target: Target) -> CudaPlan:
        from .cuda_plan import CudaPlan

        return CudaPlan(plan, target, graphs=cuda_graphs.enabled())

    def _pack(self, whole: Plan, target: Target) -> Tensor:
        from .cuda_plan import pack_network

        return pack_network(whole, target)


def _launch_failure(device: torch.device) -> str | None:
    """Returns why no kernel of the library starts on a device, or None.

    The library may have been built for other devices, which shows when a kernel is launched.
    """
    # A capture is not for trying; somebody has called the network or the operator before.
    return None if cuda_graphs.capturing(device) else _first_launch_failure(device)


@functools.lru_cache(maxsize=64)
def _first_launch_failure(device: torch.device) -> str | None:
    with torch.inference_mode():
        pixel = torch.ones(1, 1, 1, 1, device=device)
        one = pixel.flatten()
        try:
            torch.ops.threshnet_fast_cuda.cat_conv_bn_relu([pixel], pixel, one, one, 1, 0, False)
        except RuntimeError as error:
            return f"its kernels do not start on {device}: {str(error).strip().splitlines()[0]}"
    return None


def _device_type() -> str:
    return "cuda"


def _properties(device: torch.device) -> Properties:
    return _properties_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=64)
def _properties_of(index: int) -> Properties:
    """Asks the driver, which takes longer than the rest of a call."""
    found = torch.cuda.get_device_properties(index)
    return Properties(
        10 * found.major + found.minor,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
    )
