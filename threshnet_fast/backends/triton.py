"""The Triton backend: whether it can run."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

__all__ = ["DTYPES", "architecture", "objection", "unavailable_reason"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels compute in."""

_LEAST_VERSION = (3, 7)


def unavailable_reason() -> str | None:
    """Returns one line saying why this backend cannot run, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return f"triton is {triton.__version__}: expected {least} or newer"
    if interpreting():
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"triton finds no device ({' '.join(str(error).split()) or type(error).__name__})"
    return None


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


def objection(x: Tensor) -> Exception | None:
    """Returns the error that this backend would raise for a tensor, or None.

    Args:
        x: A tensor that a kernel would read.
    """
    if x.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        return TypeError(f"backend 'triton' needs one of {names}: these tensors are {x.dtype}")
    reason = unavailable_reason()
    if reason is not None:
        return RuntimeError(f"backend 'triton' is unavailable: {reason}")
    device = _device_type()
    if x.device.type != device:
        return ValueError(f"backend 'triton' needs tensors on {device}, these are on {x.device}")
    return None


def _device_type() -> str:
    if interpreting():
        return "cpu"
    import triton

    return str(triton.runtime.driver.active.get_active_torch_device().type)
