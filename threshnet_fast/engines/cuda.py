"""The engine of CUDA C++: whether it can run, and networks prepared for it.

Its kernels need neither Triton nor a compiler where they run. They compute results only: the
gradients of an operator come from Triton where that is available, else from PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..plan.ir import Plan
from . import cuda_graphs, triton
from .base import Engine
from .gpu_plan import DTYPES, GpuEngine
from .registry import register

if TYPE_CHECKING:
    from .cuda_plan import CudaPlan, Target

__all__ = ["DTYPES", "ENGINE", "CudaEngine", "architecture", "target", "unavailable_reason"]

# As many segments as one launch of csrc/cuda reads where they lie.
_MOST_SEGMENTS = 16

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


def target(device: torch.device, dtype: torch.dtype) -> Target:
    """Returns what to prepare plans for on a device.

    Args:
        device: The device of the tensors.
        dtype: What to compute in.
    """
    from .cuda_plan import Target

    return Target(device, dtype, *_properties(device))


class CudaEngine(GpuEngine):
    """The kernels of csrc/cuda, which take bfloat16 from sm_80 on."""

    name = "cuda"

    def unavailable_reason(self) -> str | None:
        """See :meth:`.base.Engine.unavailable_reason`."""
        return unavailable_reason()

    def device_type(self) -> str:
        """See :meth:`.base.Engine.device_type`."""
        return _device_type()

    def describe(self, x: Tensor) -> str:
        """See :meth:`.base.Engine.describe`."""
        return f"{x.dtype} on {x.device}, CUDA C++ kernels for {architecture(x.device)}"

    def _place_objection(self, x: Tensor, dtype: torch.dtype) -> Exception | None:
        return super()._place_objection(x, dtype) or self._too_old(x.device, dtype)

    def _too_old(self, device: torch.device, dtype: torch.dtype) -> Exception | None:
        number = _properties(device).architecture
        if number < _OLDEST:
            return RuntimeError(f"backend 'cuda' is unavailable: {device} is sm_{number}, too old")
        if dtype is torch.bfloat16 and number < _OLDEST_WITH_BFLOAT16:
            return TypeError(
                f"backend 'cuda' needs sm_{_OLDEST_WITH_BFLOAT16} or newer for torch.bfloat16: "
                f"{device} is sm_{number}"
            )
        failure = _launch_failure(device)
        if failure is not None:
            return RuntimeError(f"backend 'cuda' is unavailable: {failure}")
        return None

    def _target(self, device: torch.device, dtype: torch.dtype) -> Target:
        return target(device, dtype)

    def _prepare(self, plan: Plan, target: Target, *, graphs: bool) -> CudaPlan:
        from .cuda_plan import CudaPlan

        return CudaPlan(plan, target, graphs=graphs)

    def _pack(self, whole: Plan, target: Target) -> Tensor:
        from .cuda_plan import pack_network

        return pack_network(whole, target)

    def operator(self, name: str, xs: list[Tensor], *arguments: Any) -> Tensor:
        """See :meth:`.base.Engine.operator`."""
        run = getattr(torch.ops.threshnet_fast_cuda, name)
        result: Tensor = run(_few_segments(xs), *arguments)
        return result

    def gradient_engine(self, x: Tensor) -> Engine | None:
        """Triton's, where it takes the tensors: the kernels here compute results only."""
        return triton.ENGINE if triton.ENGINE.objection(x) is None else None


def _few_segments(xs: Sequence[Tensor]) -> list[Tensor]:
    """The segments as the kernels take them: more than sixteen are concatenated."""
    return list(xs) if len(xs) <= _MOST_SEGMENTS else [torch.cat(list(xs), 1)]


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


ENGINE = register(CudaEngine(), rank=2, auto_on="cuda")
"""The one engine of this file."""
