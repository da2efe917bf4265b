"""Tile sizes of the convolution kernel for each architecture, and the choice among them.

The choice is a model of cost, not a measurement: see :func:`estimate`. A few tiles for each class
of arithmetic are all there is to choose from, since every tile that a network uses is a compilation
that its first call waits for. :mod:`.autotuning` can measure instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from .architectures import Architecture, find_architecture

__all__ = [
    "Configuration",
    "Problem",
    "candidates",
    "choose",
    "configurations_for",
    "estimate",
    "programs_at_once",
    "shared_bytes",
]


@dataclass(frozen=True)
class Configuration:
    """How a matrix product is cut into programs.

    Attributes:
        block_m: Rows (pixels) of a tile.
        block_n: Columns (output channels) of a tile.
        block_k: Products added at a time.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
        split_k: Parts of the reduction.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


@dataclass(frozen=True)
class Problem:
    """A convolution as a matrix product.

    Attributes:
        pixels: Rows: output pixels of the whole batch.
        out_channels: Columns, whole groups.
        channels: Input channels, whole groups.
        taps: Taps of the window that can meet a pixel.
        dtype: Of the feature maps.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
    """

    pixels: int
    out_channels: int
    channels: int
    taps: int
    dtype: torch.dtype
    precision: str = "ieee"


_INTERPRETER = Configuration(128, 128, 128, 4, 1)
"""A program takes its time in the interpreter, whatever its size."""

# block_m, block_n, block_k, num_warps; none spills registers on any architecture of its class.
# Tiles without which no network was predicted to take 3% longer have been left out.
_HALF = (
    (128, 128, 32, 8),
    (128, 64, 32, 8),
    (128, 32, 32, 4),
    (64, 32, 64, 4),
    (32, 32, 64, 4),
    (16, 32, 64, 4),
)
_TF32 = (
    (128, 128, 16, 8),
    (128, 64, 16, 8),
    (128, 32, 16, 4),
    (64, 32, 32, 4),
    (32, 32, 32, 4),
    (16, 32, 32, 4),
)
_FULL = (
    (64, 64, 16, 4),
    (64, 32, 16, 4),
    (32, 32, 32, 4),
    (16, 32, 32, 4),
)
_HALF_WITHOUT_TENSOR_CORES = (
    (64, 32, 16, 4),
    (32, 32, 16, 4),
    (16, 32, 16, 4),
)
# Tiles that spill on one architecture of their class, and what serves there instead.
_EXCEPTIONS = {
    "sm_100": {
        (128, 64, 32, 8): (128, 64, 32, 4),
        (128, 64, 16, 8): (64, 64, 32, 8),
        (64, 64, 16, 4): (64, 64, 16, 8),
        (32, 32, 32, 4): (32, 32, 32, 8),
    },
    "sm_120": {
        (128, 32, 32, 4): (128, 32, 32, 8),
        (64, 32, 64, 4): (64, 32, 64, 8),
        (128, 64, 16, 8): (64, 64, 32, 8),
        (128, 32, 16, 4): (128, 32, 16, 8),
    },
}
_SPLITS = (1, 2, 4, 8, 16)

# Cycles. Rounded figures of the published micro-benchmarks of the architectures: only how they
# compare with each other and with the arithmetic matters, and only to orders of magnitude.
_LATENCY = 600
_PROGRAM = 2000
_LAUNCH = 3000
_CACHE_BYTES = 32

# Of a thread, beside those for its share of the sums: what compiled kernels need, in the middle.
_REGISTERS = 80


def candidates(
    architecture: Architecture, dtype: torch.dtype, precision: str
) -> tuple[Configuration, ...]:
    """Returns all configurations for a class of arithmetic, reductions not split."""
    if dtype == torch.float32:
        tiles = _TF32 if precision == "tf32" and architecture.tf32 else _FULL
    elif architecture.half > architecture.full:
        tiles = _HALF
    else:
        tiles = _HALF_WITHOUT_TENSOR_CORES
    exceptions = _EXCEPTIONS.get(architecture.name, {})
    return tuple(
        Configuration(*exceptions.get(tile, tile), architecture.num_stages) for tile in tiles
    )


def shared_bytes(configuration: Configuration, dtype: torch.dtype) -> int:
    """Returns the shared memory that the stages of a pipeline take, at least."""
    tiles = configuration.block_m + configuration.block_n
    return configuration.num_stages * tiles * configuration.block_k * dtype.itemsize


def programs_at_once(
    configuration: Configuration, dtype: torch.dtype, architecture: Architecture
) -> int:
    """Estimates how many programs a multiprocessor holds, by their registers and shared memory."""
    c = configuration
    threads = c.num_warps * architecture.warp_size
    registers = c.block_m * c.block_n + threads * _REGISTERS
    by_registers = architecture.registers // registers
    by_shared = architecture.shared_bytes // shared_bytes(c, dtype)
    return max(1, min(by_registers, by_shared))


def estimate(
    problem: Problem, configuration: Configuration, architecture: Architecture, multiprocessors: int
) -> float:
    """Estimates the cycles of a convolution.

    With ``s`` steps of the reduction in a program, ``c`` programs at once on a multiprocessor::

        waves * (start + s * max(c * arithmetic, c * traffic, latency / (stages - 1)) + c * store)

    where a step's arithmetic is its operations, padding included, at the architecture's rate, and
    its traffic the two tiles that it loads at 32 bytes a clock. A split reduction adds a launch,
    and writing and reading its float32 sums. Ignored: reuse of loads in L1, the device's memory
    being slower than its cache, and clocks that change.

    Args:
        problem: What to compute.
        configuration: How.
        architecture: On what.
        multiprocessors: Of the device.
    """
    c = configuration
    size = problem.dtype.itemsize
    rate = architecture.full
    if problem.dtype != torch.float32:
        rate = architecture.half
    elif problem.precision == "tf32" and architecture.tf32:
        rate = architecture.tf32
    tiles = -(-problem.pixels // c.block_m) * -(-problem.out_channels // c.block_n)
    programs = tiles * c.split_k
    resident = programs_at_once(c, problem.dtype, architecture)
    at_once = min(resident, -(-programs // multiprocessors))
    waves = -(-programs // (multiprocessors * at_once))
    steps = -(-problem.taps * -(-problem.channels // c.block_k) // c.split_k)
    arithmetic = 2 * c.block_m * c.block_n * c.block_k / rate
    traffic = (c.block_m + c.block_n) * c.block_k * size / _CACHE_BYTES
    step = max(at_once * arithmetic, at_once * traffic, _LATENCY / max(1, c.num_stages - 1))
    stored = c.block_m * c.block_n * (4 if c.split_k > 1 else size) / _CACHE_BYTES
    cycles = waves * (_PROGRAM + steps * step + at_once * stored)
    if c.split_k > 1:
        sums = 4 * c.split_k * problem.pixels * problem.out_channels
        cycles += _LAUNCH + _PROGRAM + sums / (_CACHE_BYTES * multiprocessors)
    return cycles


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, architecture: str, multiprocessors: int) -> Configuration:
    """Chooses the configuration with the lowest :func:`estimate`, the first of equals.

    Args:
        problem: What to compute.
        architecture: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.
        multiprocessors: Of the device.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    found = find_architecture(architecture)
    return min(
        configurations_for(problem, found),
        key=lambda each: estimate(problem, each, found, multiprocessors),
    )


def configurations_for(problem: Problem, architecture: Architecture) -> list[Configuration]:
    """Returns all configurations of a problem, with its reduction whole and in parts."""
    length = problem.taps * problem.channels
    return [
        replace(tile, split_k=split_k)
        for tile in candidates(architecture, problem.dtype, problem.precision)
        for split_k in _SPLITS
        # A part with fewer than two steps has nothing to pipeline.
        if split_k == 1 or length >= 2 * split_k * tile.block_k
    ]
