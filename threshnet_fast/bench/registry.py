"""All providers by device, precision and task."""

from __future__ import annotations

import torch

from .cpu_engines import CPU_PROVIDERS
from .gpu_engines import CUDA_PROVIDERS
from .job import Job, Provider, Spec, Unavailable
from .precision import PRECISIONS
from .training_steps import TRAINING_PROVIDERS

__all__ = ["build", "dtypes", "registry"]


def registry(device_type: str, dtype: str = "float32", task: str = "inference") -> dict[str, Spec]:
    """All providers by name, in the order of the tables.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: A key of ``PRECISIONS``. On a GPU all providers calculate in any of them; on a CPU
            there are none for some.
        task: ``"inference"``, or ``"training"``, which is measured in float32 on the CPU.
    """
    if task == "training":
        return TRAINING_PROVIDERS if (device_type, dtype) == ("cpu", "float32") else {}
    if device_type == "cpu":
        return CPU_PROVIDERS.get(dtype, {})
    return CUDA_PROVIDERS


def dtypes(device_type: str) -> list[str]:
    """The keys of ``PRECISIONS`` that there are providers for on ``"cpu"`` or ``"cuda"``."""
    return [dtype for dtype in PRECISIONS if registry(device_type, dtype)]


def build(name: str, job: Job, task: str = "inference") -> Provider:
    """Prepares a provider for a job.

    Args:
        name: A key of :func:`registry` for the job's device, its dtype, and the task.
        job: What it is to run.
        task: ``"inference"``, or ``"training"`` for whole steps of a training.

    Raises:
        Unavailable: It cannot be used here.
    """
    spec = registry(job.x.device.type, str(job.x.dtype).removeprefix("torch."), task)[name]
    reason = spec.objection()
    if reason is not None:
        raise Unavailable(reason)
    torch.set_num_threads(job.threads)
    return spec.build(job)
