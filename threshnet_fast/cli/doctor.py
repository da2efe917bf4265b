"""``threshnet-fast doctor``: is this installation sound, and is it as fast as it could be?"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import environment, extension
from ..bench import machine
from ..bench.job import Job, Unavailable
from ..bench.networks import random_model, randomise, reference_output, worst_error
from ..bench.precision import PRECISIONS, Precision
from ..bench.registry import build, registry
from ..engines import cpu, cuda, triton
from ..errors import CommandError
from ..models import ThreshNet
from ..version import __version__

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "checks of the installation, with a numerical self-test"

DESCRIPTION = """\
Checks the installation: versions, the C++ extension, instruction sets, threads, and whether the
fused engine computes what PyTorch does, on the CPU and on a GPU where there is one. The exit status
is not 0 if something is broken."""

_OLDEST_TORCH = (2, 10)
_OLDEST_PYTHON = (3, 10)
# How far the fused engine may be off, in units of PyTorch's own float32 error. Rounding differs
# from processor to processor; something broken is off by orders of magnitude.
_FACTOR = 8.0
_OPTIONAL = {
    "onnxruntime": "a peer of bench",
    "openvino": "a peer of bench",
    "onnx": "export for bench's peers",
    "onnxscript": "export for bench's peers",
    "scikit-image": "more photographs for bench",
}


@dataclass(frozen=True)
class _Finding:
    """A line of the report; ``state`` is ok, note, warn or FAIL."""

    state: str
    subject: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command: it has none."""


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    failures = 0
    for check in _CHECKS:
        for finding in check():
            print(f"[{finding.state:>4}] {finding.subject}: {finding.text}", flush=True)
            failures += finding.state == "FAIL"
    if failures:
        problems = "1 check" if failures == 1 else f"{failures} checks"
        raise CommandError(f"{problems} failed")
    print("Everything works.")
    return 0


def _versions() -> Iterator[_Finding]:
    yield _Finding("ok", "threshnet_fast", __version__)
    python = platform.python_version()
    state = "ok" if sys.version_info >= _OLDEST_PYTHON else "FAIL"
    yield _Finding(state, "Python", f"{python} on {platform.platform()}")
    numbers = torch.__version__.split("+")[0].split(".")[:2]
    if tuple(int(number) for number in numbers) < _OLDEST_TORCH:
        yield _Finding("FAIL", "torch", f"{torch.__version__}: 2.10 or newer is needed")
    else:
        yield _Finding("ok", "torch", str(torch.__version__))


def _extension() -> Iterator[_Finding]:
    reason = extension.unavailable_reason()
    if reason is None:
        yield _Finding("ok", "C++ extension", str(extension.library_path()))
    elif environment.switched_on(environment.NO_EXTENSION):
        yield _Finding("warn", "C++ extension", reason)
    else:
        yield _Finding("FAIL", "C++ extension", reason)
    if reason is None:
        absent = extension.cuda_left_out_reason()
        state = "ok" if absent is None else "note"
        yield _Finding(state, "CUDA extension", absent or str(extension.cuda_library_path()))


def _instructions() -> Iterator[_Finding]:
    yield _Finding("ok", "processor", machine.processor())
    if cpu.unavailable_reason() is not None:
        return
    try:
        isa = cpu.isa()
    except ValueError as error:
        yield _Finding("FAIL", "instruction set", str(error))
        return
    cap = environment.value(environment.CPU_ISA)
    if cap:
        yield _Finding("note", "instruction set", f"{isa}, capped by {environment.CPU_ISA}={cap}")
    elif isa == "scalar":
        yield _Finding("warn", "instruction set", "scalar: no AVX2 here, the engine will be slow")
    else:
        yield _Finding("ok", "instruction set", isa)


def _threads() -> Iterator[_Finding]:
    threads, usable = torch.get_num_threads(), machine.usable_processors()
    text = f"{threads} for {usable} usable processors"
    if threads > usable:
        yield _Finding("warn", "threads", f"{text}: more threads than processors are slow")
    elif threads < usable:
        yield _Finding("note", "threads", f"{text} (torch.set_num_threads, OMP_NUM_THREADS)")
    else:
        yield _Finding("ok", "threads", text)


def _gpu() -> Iterator[_Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            place = torch.device("cuda", index)
            parts = [machine.accelerator(place), machine.accelerator_libraries()]
            parts += [f"driver {known}"] if (known := machine.driver(place)) else []
            yield _Finding("ok", str(place), ", ".join(parts))
    elif torch.version.cuda is None and torch.version.hip is None:
        yield _Finding("note", "CUDA", "torch was built without CUDA")
    else:
        yield _Finding("note", "CUDA", "torch finds no device")
    reason, version = triton.unavailable_reason(), triton.version()
    if reason is None:
        yield _Finding("ok", "Triton", f"{version}, {triton.architecture()} kernels")
    else:
        # On a GPU the networks still run, by the C++ kernels or as plain PyTorch.
        state = "warn" if torch.cuda.is_available() else "note"
        yield _Finding(state, "Triton", reason if version is None else f"{version}, off: {reason}")
    kernels = cuda.unavailable_reason()
    if kernels is not None:
        # They were built to be used.
        built = extension.cuda_left_out_reason() is None and torch.version.hip is None
        state = "warn" if built and torch.cuda.is_available() else "note"
        yield _Finding(state, "CUDA kernels", f"off: {kernels}")
    else:
        use = "by use_backend('cuda') only" if reason is None else "in place of Triton"
        yield _Finding("ok", "CUDA kernels", f"loaded, taken {use}")


def _optional() -> Iterator[_Finding]:
    for name, use in _OPTIONAL.items():
        version = machine.distribution_version(name)
        yield _Finding("note", name, version or f"not installed ({use})")


def _self_test() -> Iterator[_Finding]:
    if cpu.unavailable_reason() is not None:
        yield _Finding("note", "self-test", "left out: there is no fused engine here")
    else:
        for title, (model, x) in _cases().items():
            job = Job(model, x, torch.get_num_threads())
            reference = reference_output(model, x)
            eager = worst_error(build("eager", job).run(), reference)
            eps = torch.finfo(torch.float32).eps
            limit = _FACTOR * max(eager, eps * float(reference.abs().max()))
            own = f"PyTorch's own {eager:.1e}"
            yield from _compared("self-test", title, job, reference, limit, own)
    if torch.cuda.is_available() and (
        triton.unavailable_reason() is None or cuda.unavailable_reason() is None
    ):
        place = torch.device("cuda", torch.cuda.current_device())
        for name, precision in PRECISIONS.items():
            with precision.active():
                yield from _self_test_on_gpu(place, name, precision)


def _self_test_on_gpu(place: torch.device, name: str, precision: Precision) -> Iterator[_Finding]:
    for title, (model, x) in _cases().items():
        job = Job(
            model.to(place, precision.dtype),
            x.to(place, precision.dtype),
            torch.get_num_threads(),
        )
        reference = reference_output(job.model, job.x)
        limit = precision.error_limit * float(reference.abs().max())
        allowed = f"{limit:.1e} is allowed"
        yield from _compared(f"self-test, {name} on {place}", title, job, reference, limit, allowed)


def _cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks and inputs that together reach every kind of step."""
    small = ThreshNet(
        first_channels=(8, 24),
        blocks=(3, 5),
        transitions=(40, 24),
        downsample=(True, False),
        threshold=1,
        growth_rates=(12, 20),
        num_classes=7,
    )
    generator = torch.Generator().manual_seed(0)
    return {
        "a small network, 33x47, batch 3": (
            randomise(small, 0),
            torch.randn(3, 3, 33, 47, generator=generator),
        ),
        "threshnet79, 64x64, batch 2": (
            random_model("threshnet79", 10, 0),
            torch.randn(2, 3, 64, 64, generator=generator),
        ),
    }


def _compared(
    test: str, title: str, job: Job, reference: Tensor, limit: float, scale: str
) -> Iterator[_Finding]:
    """Compares all ways of calling the fused engine with float64; ``scale`` is shown beside it."""
    for provider, spec in registry(job.x.device.type).items():
        if not spec.ours or (spec.optional and spec.objection() is not None):
            continue
        subject = f"{test}, {provider}"
        try:
            error = worst_error(build(provider, job).run(), reference)
        except (Unavailable, RuntimeError, ValueError, TypeError) as problem:
            yield _Finding("FAIL", subject, f"{title}: {' '.join(str(problem).split())}")
            continue
        text = f"{title}: error {error:.1e} against float64 ({scale})"
        if error <= limit:
            yield _Finding("ok", subject, text)
        else:
            yield _Finding("FAIL", subject, f"{text}, at most {limit:.1e} is allowed")


_CHECKS: tuple[Callable[[], Iterator[_Finding]], ...] = (
    _versions,
    _extension,
    _instructions,
    _threads,
    _gpu,
    _optional,
    _self_test,
)
