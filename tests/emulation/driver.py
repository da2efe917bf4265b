"""A stand-in for Triton's driver: kernels compile for a GPU and run, or only compile, without one.

    with emulated("sm_80") as log:
        kernel[grid](tensor_on_the_cpu, ...)

Within the block, ordinary launches of ``@triton.jit`` functions compile for that architecture, down
to its machine code; what runs, on tensors in the CPU's memory, is the PTX, in :mod:`.ptx_machine`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel

from .architectures import ARCHITECTURES, Architecture
from .ptx import PTXError, UndefinedBytes, run_ptx

__all__ = ["Entry", "Log", "compiled_for", "emulated"]

if tuple(map(int, triton.__version__.split(".")[:2])) != (3, 7):
    raise RuntimeError(
        f"triton is {triton.__version__}: the stand-in driver is written for the internals of 3.7"
    )


@dataclass(frozen=True)
class Entry:
    """One launch.

    Attributes:
        name: The kernel.
        grid: Programs along each axis.
        steps: Emulated instructions, each executed for many threads at once; 0 if nothing ran.
        compiled: Triton's own record: ``asm``, ``metadata``.
    """

    name: str
    grid: tuple[int, int, int]
    steps: int
    compiled: CompiledKernel

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return self.compiled.metadata.num_warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program."""
        return self.compiled.metadata.shared


class Log(list[Entry]):
    """The launches of a block, in order.

    Attributes:
        undefined: Memory whose reading is an error until a kernel writes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.undefined = UndefinedBytes()

    def mark_uninitialised(self, *tensors: torch.Tensor) -> None:
        """Makes it an error that a kernel of this block reads elements that none has written.

        What the host writes into these tensors is not noticed.
        """
        for tensor in tensors:
            self.undefined.add(tensor)

    @property
    def steps(self) -> int:
        """Emulated instructions of all launches."""
        return sum(entry.steps for entry in self)


@contextlib.contextmanager
def emulated(
    architecture: str = "sm_80",
    *,
    races: bool = True,
    rewrite: Callable[[str, str], str] | None = None,
) -> Iterator[Log]:
    """Runs launches within the block in the PTX interpreter.

    Args:
        architecture: An NVIDIA one of :data:`.architectures.ARCHITECTURES`. Of ``"sm_100"`` the
            instructions of the fifth-generation tensor cores are not supported.
        races: Whether to look for races in shared and in global memory.
        rewrite: Given the PTX and the name of a kernel, returns the PTX to run.

    Yields:
        A list to which every launch adds an entry.

    Raises:
        ValueError: The architecture is unknown, or has no PTX.
        PTXError: From within the block: what the interpreter found.
    """
    found = _find(architecture)
    if found.target.backend != "cuda":
        raise ValueError(f"architecture is {architecture!r}: only NVIDIA's can be emulated")
    with _active(_Driver(found, _Emulation(races, rewrite))) as log:
        yield log


@contextlib.contextmanager
def compiled_for(architecture: str, *, run: bool = False) -> Iterator[Log]:
    """Compiles the kernels that are launched within the block, down to machine code; runs none.

    Args:
        architecture: Any of :data:`.architectures.ARCHITECTURES`, AMD's too.
        run: Whether to run them all the same, as :func:`emulated` does.

    Yields:
        A list to which every launch adds an entry.

    Raises:
        ValueError: The architecture is unknown.
    """
    if run:
        with emulated(architecture) as log:
            yield log
        return
    with _active(_Driver(_find(architecture), None)) as log:
        yield log


def _find(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture is {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@contextlib.contextmanager
def _active(driver: _Driver) -> Iterator[Log]:
    config = triton.runtime.driver
    before = config._active
    original = CompiledKernel._init_handles

    @functools.wraps(original)
    def init_handles(kernel: CompiledKernel) -> None:
        fresh = kernel.module is None
        original(kernel)
        if fresh:
            # Launchers are given this handle: they need the PTX, which drivers do not see.
            kernel.function = kernel

    CompiledKernel._init_handles = init_handles
    config.set_active(driver)
    try:
        yield driver.log
    finally:
        config._active = before
        CompiledKernel._init_handles = original


@dataclass(frozen=True)
class _Emulation:
    races: bool
    rewrite: Callable[[str, str], str] | None


class _Utilities:
    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {
            "max_shared_mem": self._architecture.shared_bytes,
            "multiprocessor_count": self._architecture.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": self._architecture.warp_size,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: object) -> tuple[Any, ...]:
        return "loaded", None, 0, 0, 1024


class _Launcher:
    """Made once for each compiled kernel, which outlives the driver that was active then."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature = list(source.signature.values())

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        compiled: CompiledKernel,
        packed_metadata: object,
        launch_metadata: object,
        enter_hook: object,
        exit_hook: object,
        *arguments: Any,
    ) -> None:
        driver = triton.runtime.driver.active
        grid = (grid_x, grid_y, grid_z)
        steps = 0
        if driver.emulation is not None:
            steps = _run(driver, compiled, grid, self._signature, arguments)
        driver.log.append(Entry(compiled.metadata.name, grid, steps, compiled))


class _Driver(DriverBase):
    def __init__(self, architecture: Architecture, emulation: _Emulation | None) -> None:
        self.architecture = architecture
        self.emulation = emulation
        self.log = Log()
        self.utils = _Utilities(architecture)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> str:
        # Triton keeps its compiled kernels by device.
        return f"emulated {self.architecture.name}"

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.architecture.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def run_once(function: Callable[[], object], **_: object) -> list[float]:
            function()
            return [1.0, 1.0, 1.0]

        return run_once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()


def _flatten(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        else:
            yield kind, value


def _run(
    driver: _Driver,
    compiled: CompiledKernel,
    grid: tuple[int, int, int],
    signature: list[Any],
    arguments: tuple[Any, ...],
) -> int:
    name = compiled.metadata.name
    text = compiled.asm["ptx"]
    emulation = driver.emulation
    assert emulation is not None
    if emulation.rewrite is not None:
        text = emulation.rewrite(text, name)
    values = [
        _value(kind, argument)
        for kind, argument in _flatten(signature, arguments)
        if kind != "constexpr"
    ]
    try:
        return run_ptx(
            text,
            name,
            grid,
            (compiled.metadata.target.warp_size * compiled.metadata.num_warps,),
            values,
            dynamic_shared=compiled.metadata.shared,
            races=emulation.races,
            undefined=driver.log.undefined,
        )
    except PTXError as error:
        raise PTXError(f"{name}: {error}") from error


def _value(kind: str, argument: Any) -> Any:
    """Returns a kernel's argument as :func:`.ptx.run_ptx` takes it, given its type."""
    if argument is None or isinstance(argument, torch.Tensor):
        return argument
    if kind.startswith("*"):
        raise TypeError(f"a pointer is {type(argument).__name__}: expected a tensor or None")
    if kind in ("fp16", "bf16", "fp32", "f32", "fp64"):
        # Triton's launcher passes both 16-bit types as they are stored.
        if kind == "bf16":
            return torch.tensor(argument, dtype=torch.bfloat16).view(torch.int16).item()
        return float(argument)
    if kind[0] not in "iu":
        raise TypeError(f"an argument has the type {kind}, which cannot be emulated")
    return int(argument)
