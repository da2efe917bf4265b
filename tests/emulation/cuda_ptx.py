"""Runs the CUDA kernels as nvcc compiles them for an architecture, on tensors of the CPU.

    with ptx_launches("sm_80") as log:
        library.pool(operands)     # of cuda_library: its launcher runs, its kernels' PTX too
    log[0].kernel, log[0].grid, log[0].text

    with emulated_cuda("sm_80") as library, ptx_operators(library, "sm_80"):
        plan(x, packed)            # of cuda_plan: all launches of a network

Which kernel is launched and what it is given is what the launchers decide; see :mod:`.ptx_machine`
for what is checked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import cuda_library
from .ptx import Device, UndefinedBytes, modules

__all__ = [
    "PTXLaunch",
    "Rewrite",
    "kernels",
    "nvcc",
    "ptx_launches",
    "ptx_operators",
    "run_launches",
]

Rewrite = Callable[[str, str], str]
"""Given the PTX of a kernel and its name, returns the PTX to run instead."""


@functools.cache
def _nvcc_module() -> ModuleType:
    """What the build knows of nvcc."""
    path = cuda_library.ROOT / "build_backend" / "nvcc.py"
    spec = importlib.util.spec_from_file_location("nvcc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for it there.
    with mock.patch.dict("sys.modules", {"nvcc": module}):
        spec.loader.exec_module(module)
    return module


def nvcc() -> str | None:
    """Returns the path of nvcc, where the build would find it, or None."""
    return _nvcc_module().find_nvcc()


@functools.cache
def kernels(architecture: str) -> dict[str, str]:
    """Compiles all kernels of ``csrc/cuda`` with the options of the build.

    Args:
        architecture: As ``"sm_90"``.

    Returns:
        The PTX of each kernel, a module of its own, by its mangled name.

    Raises:
        subprocess.CalledProcessError: nvcc fails.
    """
    sources = sorted((cuda_library.CSRC / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda source: _compiled(source, architecture), sources))
    return {name: text for each in texts for name, text in modules(each).items()}


def _compiled(source: Path, architecture: str) -> str:
    """Returns the PTX of a source, which is kept beside the emulated library."""
    compiler = nvcc()
    assert compiler is not None
    options = [*_nvcc_module().FLAGS, "-Icsrc", "-ptx", f"-arch={architecture}"]
    version = _nvcc_module().output_of(compiler, "--version")
    key = cuda_library.fingerprint(source, compiler, version, *options)
    target = cuda_library.BUILD / f"{source.stem}-{architecture}-{key}.ptx"
    if target.is_file():
        os.utime(target)
        return target.read_text()
    cuda_library.BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cuda_library.BUILD) as folder:
        made = Path(folder) / target.name
        command = [compiler, *options, str(source), "-o", str(made)]
        subprocess.run(command, check=True, cwd=cuda_library.ROOT)
        made.replace(target)
    return target.read_text()


@dataclass(frozen=True)
class PTXLaunch:
    """A launch that ran.

    Attributes:
        kernel: Its mangled name.
        grid: Blocks along x and y.
        threads: Of a block.
        shared_bytes: Of a block.
        steps: Instructions executed, each for many threads at once.
        text: The PTX.
    """

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    steps: int
    text: str


def run_launches(
    launches: Sequence[cuda_library.Launch],
    architecture: str,
    memory: Sequence[Tensor],
    *,
    rewrite: Rewrite | None = None,
    undefined: UndefinedBytes | None = None,
    races: bool = True,
) -> list[PTXLaunch]:
    """Runs launches that were recorded, one after the other.

    Args:
        launches: Of :meth:`.cuda_library.Library.recorded`.
        architecture: What nvcc compiles for: ``"sm_75"``, ``"sm_80"``, ...
        memory: Tensors that the kernels may access, from their first element to their last.
        rewrite: Changes the PTX before it runs.
        undefined: Memory whose reading is an error until it is written.
        races: Whether to look for races.

    Returns:
        What ran.

    Raises:
        PTXError: A program did what a GPU forbids or leaves undefined, or cannot be executed.
    """
    log = []
    device = Device(undefined)
    device.add_in_place(memory)
    for each in launches:
        text = kernels(architecture)[each.kernel]
        if rewrite is not None:
            text = rewrite(text, each.kernel)
        steps = device.run(
            text,
            each.kernel,
            each.grid,
            (each.threads,),
            [each.parameters],
            dynamic_shared=each.shared_bytes,
            races=races,
        )
        log.append(PTXLaunch(each.kernel, each.grid, each.threads, each.shared_bytes, steps, text))
    device.copy_back()
    return log


@contextlib.contextmanager
def ptx_launches(architecture: str, **options: Any) -> Iterator[list[PTXLaunch]]:
    """Context manager within which what launchers of the emulated library launch runs as PTX.

    The kernels may access the tensors that the launcher's operands point to, and nothing else.

    Args:
        architecture: What nvcc compiles for: ``"sm_75"``, ``"sm_80"``, ...
        **options: Of :func:`run_launches`.

    Returns:
        The launches that ran; it grows.
    """
    log: list[PTXLaunch] = []
    call = cuda_library.Library.call

    def call_as_ptx(
        library: cuda_library.Library, name: str, *arguments: Any, result: Any = None
    ) -> Any:
        with library.recorded() as launches:
            returned = call(library, name, *arguments, result=result)
        memory = [
            tensor
            for argument in arguments
            if isinstance(argument, cuda_library.Operands)
            for tensor in argument.tensors.values()
        ]
        log.extend(run_launches(launches, architecture, memory, **options))
        return returned

    with mock.patch.object(cuda_library.Library, "call", call_as_ptx):
        yield log


class ptx_operators(TorchDispatchMode):
    """Context manager within which launches of ``torch.ops.threshnet_fast_cuda`` run as PTX.

    The kernels may access the operator's arguments and results, and nothing else: memory that an
    operator keeps to itself is out of bounds. Of what it writes, nothing counts as written before.

    Args:
        library: The library that the operators are linked with.
        architecture: What nvcc compiles for: ``"sm_75"``, ``"sm_80"``, ...

    Attributes:
        log: The launches that ran.
    """

    def __init__(self, library: cuda_library.Library, architecture: str) -> None:
        super().__init__()
        self.log: list[PTXLaunch] = []
        self._library = library
        self._architecture = architecture

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), names: Any = None
    ) -> Any:
        """Calls an operator."""
        names = names or {}
        if operator.namespace != "threshnet_fast_cuda":
            return operator(*arguments, **names)
        with self._library.recorded() as launches:
            result = operator(*arguments, **names)
        if launches:
            schema = operator._schema.arguments
            written = [
                value
                for declared, value in zip(schema, arguments, strict=False)
                if declared.alias_info is not None and declared.alias_info.is_write
            ]
            written.append(result)
            undefined = UndefinedBytes()
            for tensor in written:
                undefined.add(tensor)
            memory = [*_tensors(arguments), result]
            self.log += run_launches(launches, self._architecture, memory, undefined=undefined)
        return result


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, Sequence):
            yield from _tensors(argument)
