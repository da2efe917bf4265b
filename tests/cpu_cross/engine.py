"""Builds driver.cpp with the engine, for this machine or for 64-bit ARM, and runs plans by it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")

# As setup.py compiles the extension, but with warnings as errors.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread")
# The processor of a Raspberry Pi 4: an instruction that it lacks is an error.
_PROCESSOR = ("-cpu", "cortex-a72")
_SECONDS = 300


@dataclass(frozen=True)
class Target:
    """What a driver is built by, and what it runs in.

    Attributes:
        compiler: The command of a C++ compiler.
        flags: Those that this target needs.
        runner: The beginning of a command that runs the driver.
    """

    compiler: str
    flags: tuple[str, ...]
    runner: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What the driver wrote.

    Attributes:
        output: ``[N, C, H, W]`` float32.
        arena: The features in between, flat.
        algorithms: How each step was computed, as ``program_algorithms`` numbers it.
    """

    output: Tensor
    arena: Tensor
    algorithms: list[int]


def find_target(architecture: str) -> Target | str:
    """Returns the target for ``"native"`` or ``"aarch64"``, or why there is none here."""
    if architecture == "native" or platform.machine() == architecture:
        candidates = (os.environ.get("CXX"), "g++", "c++", "clang++")
        for name in candidates:
            if name and shutil.which(name):
                return Target(name, (), ())
        return "no C++ compiler was found"
    emulator = next(filter(shutil.which, EMULATORS), None)
    if shutil.which(CROSS_COMPILER) is None:
        return f"{CROSS_COMPILER} was not found (Debian package g++-aarch64-linux-gnu)"
    if emulator is None:
        return f"{EMULATORS[0]} was not found (Debian package qemu-user)"
    return Target(CROSS_COMPILER, ("-static",), (emulator, *_PROCESSOR))


class Driver:
    """The engine as a program.

    Args:
        target: What to build it for.
        folder: An empty folder for the program and for what it reads and writes.

    Raises:
        RuntimeError: A source does not compile without warnings.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        csrc = ROOT / "csrc"
        sources = [
            csrc / "plan.cpp",
            *sorted(set(csrc.glob("cpu/**/*.cpp")) - set(csrc.glob("cpu/*/*bindings.cpp"))),
            Path(__file__).with_name("driver.cpp"),
        ]
        flags = [*_FLAGS, *target.flags, f"-I{csrc}"]

        def build(arguments: Sequence[str | Path]) -> None:
            command = [target.compiler, *flags, *map(str, arguments)]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{process.stderr}")

        # Folders may have files of the same name.
        objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compilations = zip(sources, objects, strict=True)
            list(pool.map(lambda pair: build(["-c", pair[0], "-o", pair[1]]), compilations))
        program = folder / "driver"
        build([*objects, "-o", program])
        self._folder = folder
        self._command = [*target.runner, str(program)]
        *self.isas, self.best = self._run([]).split()
        """Names of the instruction sets that the program has, and of the one that it prefers."""

    def _run(self, arguments: Sequence[str]) -> str:
        command = [*self._command, *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if process.returncode != 0:
            raise RuntimeError(f"status {process.returncode}: {process.stderr.strip()}")
        return process.stdout

    def __call__(
        self,
        description: Tensor,
        weights: Sequence[Tensor],
        isa: str,
        *,
        threads: int = 1,
        winograd: int = -1,
        x: Tensor | None = None,
        externals: Sequence[Tensor] = (),
    ) -> Result:
        """Compiles a plan, packs its weights and runs it, in a process of its own.

        Args:
            description: As ``plan.serialize`` returns it.
            weights: In the order in which the description numbers them.
            isa: Name of an instruction set.
            threads: How many threads.
            winograd: As :func:`threshnet_fast.engines.cpu.winograd_by_default` returns it.
            x: The network's input, ``[N, C, H, W]``, dense in any order of dimensions.
            externals: Inputs of a plan of one step, flat.

        Raises:
            RuntimeError: The program failed; the text is its own.
        """
        source, target = self._folder / "input", self._folder / "output"
        with source.open("wb") as file:

            def write(*values: int) -> None:
                file.write(np.array(values, dtype="<i8").tobytes())

            def write_floats(floats: np.ndarray) -> None:
                write(floats.size)
                file.write(floats.astype("<f4").tobytes())

            write(len(description), *description.tolist())
            write(len(weights))
            for weight in weights:
                write_floats(weight.detach().contiguous().numpy())
            if x is None:
                x = torch.empty(0, 0, 0, 0)
            order = sorted(range(4), key=x.stride, reverse=True)
            memory = x.detach().permute(order)
            assert memory.is_contiguous()
            write_floats(memory.numpy())
            write(*x.stride())
            write(len(externals))
            for external in externals:
                write_floats(external.numpy())
        arguments = [isa, str(threads), str(winograd), str(source), str(target)]
        algorithms = [int(line) for line in self._run(arguments).split()]
        floats = torch.from_numpy(np.fromfile(target, dtype="<f4"))
        batch, _, _, _, channels, height, width = description[2:9].tolist()
        size = batch * channels * height * width
        output = floats[:size].view(batch, height, width, channels).permute(0, 3, 1, 2)
        return Result(output, floats[size:], algorithms)
