"""Peak memory of one provider, measured in a process of its own.

In the new process the model and its input are made first, then what is resident is noted. The
provider is built and called once (weights are packed, buffers allocated); what the allocator can
give back is given back; the kernel's high-water mark of resident memory is reset; the provider is
called again. The high-water mark less what was noted is the memory that the provider adds at the
peak of a call: its copies of the weights, its buffers, its temporary tensors. A call on a tiny
network comes before everything, so that the provider's own code does not count.

Only Linux has the reset (``/proc/self/clear_refs``).

On a GPU, the same is asked of torch's allocator: the most that it had reserved of the device, less
what it had when model and input were there. Reserved memory is what others cannot have, and other
than allocated memory it includes what a CUDA graph keeps for its intermediate results.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job

__all__ = ["Memory", "live_bytes", "measure"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Memory:
    """Memory that a provider adds, in bytes: resident, or reserved on a GPU.

    Attributes:
        built: What it holds between calls.
        peak: What it holds at the peak of a call, ``built`` included.
    """

    built: int
    peak: int


@dataclass(frozen=True)
class _Question:
    provider: str
    model: str
    classes: int
    seed: int
    shape: tuple[int, ...]
    threads: int
    onnx: str | None
    tiny_onnx: str | None
    device: str
    dtype: str
    task: str


def measure(
    provider: str,
    job: Job,
    model: str,
    classes: int,
    seed: int,
    dtype: str = "float32",
    task: str = "inference",
    timeout: float = 600.0,
) -> Memory | None:
    """Measures in a new process.

    Args:
        provider: A key of ``registry.registry`` for the job's device, ``dtype`` and ``task``.
        job: The model as ``random_model(model, classes, seed)`` makes it, in ``dtype``, and an
            input.
        model: Name of the model.
        classes: Outputs of its classifier.
        seed: Seed of its weights.
        dtype: A key of ``precision.PRECISIONS``, for which the job was made.
        task: ``"inference"`` or ``"training"``, where a call is a whole step.
        timeout: Seconds that the process may take.

    Returns:
        The answer; None where the operating system cannot tell, or the process failed.
    """
    place = job.x.device
    if place.type == "cpu" and not _CLEAR_REFS.exists():
        return None
    tiny = _tiny_job(job.threads, dtype)
    onnx = provider in ("mnn", "onnxruntime", "opencv", "openvino")
    question = _Question(
        provider,
        model,
        classes,
        seed,
        tuple(job.x.shape),
        job.threads,
        str(job.onnx()) if onnx else None,
        str(tiny.onnx()) if onnx else None,
        str(place),
        dtype,
        task,
    )
    command = [sys.executable, "-m", __name__, json.dumps(asdict(question))]
    try:
        result = subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=timeout
        )
        return Memory(**json.loads(result.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def live_bytes(call: Callable[[], object]) -> int:
    """The largest number of bytes that tensors allocated in one call hold at the same time.

    Args:
        call: What to run, on the CPU; what it allocates once only is there already.

    Raises:
        RuntimeError: The profiler recorded nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        call()
    results = recorder.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    if not changes:
        raise RuntimeError("the profiler recorded no allocation")
    live = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        most = max(most, live)
    return most


def _tiny_job(threads: int, dtype: str, onnx: str | None = None) -> Job:
    import torch

    from .job import Job
    from .networks import tiny_model
    from .precision import PRECISIONS

    precision = PRECISIONS[dtype]
    path = None if onnx is None else Path(onnx)
    x = torch.randn(1, 3, 32, 32, dtype=precision.dtype)
    return Job(tiny_model().to(precision.dtype), x, threads, path)


def _resident(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _settle() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _answer(question: _Question) -> Memory:
    import torch

    from .job import Job
    from .networks import random_model
    from .precision import PRECISIONS
    from .registry import build

    if question.device != "cpu":
        return _answer_on_gpu(question)
    tiny = _tiny_job(question.threads, question.dtype, question.tiny_onnx)
    build(question.provider, tiny, question.task).run()
    dtype = PRECISIONS[question.dtype].dtype
    model = random_model(question.model, question.classes, question.seed).to(dtype)
    onnx = None if question.onnx is None else Path(question.onnx)
    job = Job(model, torch.randn(tuple(question.shape)).to(dtype), question.threads, onnx)
    _settle()
    before = _resident("VmRSS")
    provider = build(question.provider, job, question.task)
    provider.run()
    _settle()
    built = _resident("VmRSS") - before
    _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    provider.run()
    return Memory(max(built, 0), max(_resident("VmHWM") - before, 0))


def _answer_on_gpu(question: _Question) -> Memory:
    import torch

    from .job import Job
    from .networks import random_model
    from .precision import PRECISIONS
    from .registry import build

    place, precision = torch.device(question.device), PRECISIONS[question.dtype]

    def moved(job: Job) -> Job:
        model, x = job.model.to(place, precision.dtype), job.x.to(place, precision.dtype)
        return Job(model, x, question.threads)

    def settled() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    with torch.cuda.device(place), precision.active():
        build(question.provider, moved(_tiny_job(question.threads, question.dtype))).run()
        model = random_model(question.model, question.classes, question.seed)
        job = moved(Job(model, torch.randn(tuple(question.shape)), question.threads))
        before = settled()
        provider = build(question.provider, job)
        built = settled() - before
        torch.cuda.reset_peak_memory_stats()
        provider.run()
        torch.cuda.synchronize()
        return Memory(max(built, 0), max(torch.cuda.max_memory_reserved() - before, 0))


if __name__ == "__main__":
    print(json.dumps(asdict(_answer(_Question(**json.loads(sys.argv[1]))))))
