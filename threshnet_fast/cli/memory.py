"""Peak memory of one provider, measured by the kernel in a process of its own.

In the new process the model and its input are made first, then what is resident is noted. The
provider is built and called once (weights are packed, buffers allocated); what the allocator can
give back is given back; the kernel's high-water mark of resident memory is reset; the provider is
called again. The high-water mark less what was noted is the memory that the provider adds at the
peak of a call: its copies of the weights, its buffers, its temporary tensors. A call on a tiny
network comes before everything, so that the provider's own code does not count.

Only Linux has the reset (``/proc/self/clear_refs``).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .providers import Job

__all__ = ["Memory", "measure"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Memory:
    """Resident memory that a provider adds, in bytes.

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


def measure(
    provider: str, job: Job, model: str, classes: int, seed: int, timeout: float = 600.0
) -> Memory | None:
    """Measures in a new process.

    Args:
        provider: A key of ``providers.PROVIDERS``.
        job: The model as ``random_model(model, classes, seed)`` makes it, and an input.
        model: Name of the model.
        classes: Outputs of its classifier.
        seed: Seed of its weights.
        timeout: Seconds that the process may take.

    Returns:
        The answer; None where the operating system cannot tell, or the process failed.
    """
    if not _CLEAR_REFS.exists():
        return None
    tiny = _tiny_job(job.threads)
    onnx = provider in ("onnxruntime", "openvino")
    question = _Question(
        provider,
        model,
        classes,
        seed,
        tuple(job.x.shape),
        job.threads,
        str(job.onnx()) if onnx else None,
        str(tiny.onnx()) if onnx else None,
    )
    command = [sys.executable, "-m", __name__, json.dumps(asdict(question))]
    try:
        result = subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=timeout
        )
        return Memory(**json.loads(result.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def _tiny_job(threads: int, onnx: str | None = None) -> Job:
    import torch

    from ..models import ThreshNet
    from .providers import Job, randomise

    model = ThreshNet(
        first_channels=(8, 16),
        blocks=(2, 2),
        transitions=(16, 16),
        downsample=(True, False),
        threshold=1,
        growth_rates=(8, 16),
        num_classes=2,
    )
    path = None if onnx is None else Path(onnx)
    return Job(randomise(model, 0), torch.randn(1, 3, 32, 32), threads, path)


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

    from .providers import Job, build, random_model

    build(question.provider, _tiny_job(question.threads, question.tiny_onnx)).run()
    model = random_model(question.model, question.classes, question.seed)
    onnx = None if question.onnx is None else Path(question.onnx)
    job = Job(model, torch.randn(tuple(question.shape)), question.threads, onnx)
    _settle()
    before = _resident("VmRSS")
    provider = build(question.provider, job)
    provider.run()
    _settle()
    built = _resident("VmRSS") - before
    _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    provider.run()
    return Memory(max(built, 0), max(_resident("VmHWM") - before, 0))


if __name__ == "__main__":
    print(json.dumps(asdict(_answer(_Question(**json.loads(sys.argv[1]))))))
