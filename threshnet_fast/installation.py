"""What is installed, what is switched on, and why the rest is not."""

import contextlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

from . import environment


@dataclass(frozen=True, repr=False)
class Config:
    """The state of this installation, as :func:`show_config` found it.

    Attributes:
        entries: Names and findings, in the order in which they print.
    """

    entries: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> str:
        return dict(self.entries)[name]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.entries)
        return "\n".join(f"{name:<{width}}  {finding}" for name, finding in self.entries)

    def __repr__(self) -> str:
        # show_config has already printed the whole; an interactive session prints this after it.
        return f"<threshnet_fast.Config, {len(self.entries)} entries>"


def show_config() -> Config:
    """Prints versions, the extension's state, instruction sets, CUDA, Triton, threads, variables.

    Never raises: what cannot be found out prints as unknown, with the error.

    Returns:
        The same, as an object: ``str()`` is the text, ``config["C++ extension"]`` one finding.
    """
    config = Config(tuple((name, _ask(question)) for name, question in _QUESTIONS.items()))
    with contextlib.suppress(OSError, ValueError):
        print(config)
    return config


def _ask(question: Callable[[], str]) -> str:
    try:
        return question()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"unknown ({type(error).__name__}: {text})"


def _version() -> str:
    from .version import __version__

    return __version__


def _python() -> str:
    return f"{platform.python_version()} ({platform.platform()})"


def _torch() -> str:
    import torch

    return str(torch.__version__)


def _distribution(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    from . import extension

    reason = extension.unavailable_reason()
    return f"off: {reason}" if reason else f"loaded from {extension.library_path()}"


def _cpu_isa() -> str:
    from .engines import cpu

    reason = cpu.unavailable_reason()
    if reason:
        return f"none: {reason}"
    cap = environment.value(environment.CPU_ISA)
    why = f"{environment.CPU_ISA}={cap}" if cap else "the best that this CPU and the kernels share"
    return f"{cpu.isa()} ({why})"


def _backend() -> str:
    from .engines import select

    request = select.request()
    if not request.automatic:
        return f"{request.name} (asked for by use_backend)"
    from .engines import cpu, cuda, triton

    places = []
    if triton.unavailable_reason() is None and not triton.interpreting():
        places.append("triton on CUDA devices")
    elif cuda.unavailable_reason() is None:
        places.append("cuda on CUDA devices")
    reason = cpu.unavailable_reason()
    if reason is None:
        places.append("cpu for float32 tensors on the CPU")
    if not places:
        return f"auto: reference ({reason})"
    return f"auto: {', '.join(places)}, else reference"


def _triton() -> str:
    from .engines import triton

    reason = triton.unavailable_reason()
    version = triton.version()
    if reason is not None:
        return f"off: {reason}" if version is None else f"{version}, off: {reason}"
    return f"{version}, {triton.architecture()} kernels"


def _cuda() -> str:
    import torch

    build, version = "CUDA", torch.version.cuda
    if torch.version.hip is not None:
        build, version = "HIP", torch.version.hip
    if version is None:
        return "off: torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"off: torch was built for {build} {version} and finds no device"
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{build} {version} ({devices})"


def _cuda_kernels() -> str:
    import torch

    from .engines import cuda

    reason = cuda.unavailable_reason()
    if reason is not None:
        return f"off: {reason}"
    devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    names = dict.fromkeys(cuda.architecture(device) for device in devices)
    return f"loaded, for {', '.join(names)}"


def _threads() -> str:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{torch.get_num_threads()} ({usable} processors usable)"


def _environment() -> str:
    found = (f"{name}={value}" for name, value in environment.values().items())
    return " ".join(found) or "no THRESHNET_FAST_* is set"


_QUESTIONS: dict[str, Callable[[], str]] = {
    "threshnet_fast": _version,
    "Python": _python,
    "torch": _torch,
    "numpy": lambda: _distribution("numpy"),
    "C++ extension": _extension,
    "CPU instructions": _cpu_isa,
    "backend": _backend,
    "CUDA": _cuda,
    "CUDA kernels": _cuda_kernels,
    "Triton": _triton,
    "threads": _threads,
    "environment": _environment,
}
