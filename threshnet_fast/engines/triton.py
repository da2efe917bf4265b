"""The engine of Triton: whether it can run, and networks prepared for it.

Nothing here imports triton before a question or a call needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plan.ir import Plan
from .base import Engine
from .gpu_plan import DTYPES, GpuEngine
from .registry import register

if TYPE_CHECKING:
    from .triton_plan import PackedNetwork, Target, TritonPlan

__all__ = [
    "DTYPES",
    "ENGINE",
    "TritonEngine",
    "architecture",
    "float32_precision",
    "interpreting",
    "target",
    "unavailable_reason",
    "version",
]

_LEAST_VERSION = (3, 7)


def unavailable_reason() -> str | None:
    """Returns one line saying why this backend cannot run, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return f"triton is {triton.__version__}: expected {least} or newer"
    if importlib.util.find_spec(f"{__package__.rpartition('.')[0]}.kernels") is None:
        return "the Triton kernels are not installed"
    if interpreting():
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"triton finds no device ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def version() -> str | None:
    """Returns the version of triton, None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def interpreting() -> bool:
    """Returns whether Triton interprets kernels on the CPU, as under ``TRITON_INTERPRET=1``."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def architecture() -> str:
    """Returns what kernels are compiled for: ``"sm_90"``, ``"gfx942"``, or ``"interpreter"``.

    Raises:
        RuntimeError: If the backend is unavailable.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend 'triton' is unavailable: {reason}")
    if interpreting():
        return "interpreter"
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def float32_precision() -> str:
    """Returns how float32 is multiplied: ``"ieee"``, or ``"tf32"`` where PyTorch may do so.

    A convolution is computed as a matrix product here, so that is where PyTorch allows it for both:
    ``torch.backends.cuda.matmul.fp32_precision``, which does not by default, and
    ``torch.backends.cudnn.conv.fp32_precision``, which does; under whatever name they were set
    (``allow_tf32``, ``torch.set_float32_matmul_precision``).
    """
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    settings = torch.backends.cuda.matmul.fp32_precision, convolution.fp32_precision
    allowed = all(setting not in ("none", "ieee") for setting in settings)
    return "tf32" if allowed else "ieee"


def target(device: torch.device, dtype: torch.dtype) -> Target:
    """Returns what to prepare launches for on a device.

    Args:
        device: The device of the tensors.
        dtype: What to compute in.
    """
    from ..kernels.architectures import precision_for
    from .triton_plan import Target

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        name = architecture()
    precision = float32_precision() if dtype is torch.float32 else "ieee"
    precision = precision_for(name, precision)
    return Target(device, dtype, precision, name, _multiprocessors(device, name))


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device, architecture: str) -> int:
    """Asks the driver, which takes longer than the rest of a call."""
    if architecture == "interpreter":
        return 1
    import triton

    index = triton.runtime.driver.active.get_current_device()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["multiprocessor_count"])


class TritonEngine(GpuEngine):
    """The kernels of threshnet_fast.kernels."""

    name = "triton"

    def unavailable_reason(self) -> str | None:
        """See :meth:`.base.Engine.unavailable_reason`."""
        return unavailable_reason()

    def device_type(self) -> str:
        """See :meth:`.base.Engine.device_type`."""
        return _device_type()

    def describe(self, x: Tensor) -> str:
        """See :meth:`.base.Engine.describe`."""
        return f"{x.dtype} on {x.device}, {architecture()} kernels"

    def _target(self, device: torch.device, dtype: torch.dtype) -> Target:
        return target(device, dtype)

    def _prepare(self, plan: Plan, target: Target, *, graphs: bool) -> TritonPlan:
        from .triton_plan import TritonPlan

        return TritonPlan(plan, target, graphs=graphs)

    def _pack(self, whole: Plan, target: Target) -> PackedNetwork:
        from .triton_plan import pack_network

        return pack_network(whole, target.dtype)

    def operator(self, name: str, xs: list[Tensor], *arguments: Any) -> Tensor:
        """See :meth:`.base.Engine.operator`."""
        result: Tensor = _launched(_kernels(name).forward, xs[0], xs, *arguments)
        return result

    def gradient_engine(self, x: Tensor) -> Engine:
        """This one."""
        return self

    def operator_gradients(
        self, name: str, grad: Tensor, xs: list[Tensor], *arguments: Any
    ) -> list[Tensor]:
        """See :meth:`.base.Engine.operator_gradients`."""
        results: list[Tensor] = _launched(_kernels(name).backward, xs[0], grad, xs, *arguments)
        return results


def _kernels(operator: str) -> ModuleType:
    """The file with the launches of an operator."""
    return importlib.import_module(f"..kernels.{operator}", __package__)


def _launched(function: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
    """Calls an operator's function with a target last, on the device of ``x``."""
    prepared_for = target(x.device, x.dtype)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        return function(*arguments, prepared_for)


def _device_type() -> str:
    if interpreting():
        return "cpu"
    import triton

    return str(triton.runtime.driver.active.get_active_torch_device().type)


ENGINE = register(TritonEngine(), rank=1, auto_on="cuda")
"""The one engine of this file."""
