"""Compiles all Triton kernels ahead of time, for every architecture, and reports what they use.

    python benchmarks/compile_kernels.py [--architecture sm_90 ...] [--check]

No GPU is needed. What is compiled are the real launches: every tile of the table of configurations
in every class of arithmetic, a network, dense layers in one kernel, and both operators with their
gradients; of bfloat16, whose code is that of float16 but for conversions, fewer shapes.

The report is ``benchmarks/results/kernels.csv``; the exit status is 1 if a kernel spills registers
or exceeds shared memory, or lacks tensor cores or asynchronous copies that the architecture has.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulation.architectures import ARCHITECTURES  # noqa: E402, the line above finds it
from emulation.driver import compiled_for  # noqa: E402
from emulation.reports import read_rows, write_rows  # noqa: E402
from emulation.resources import resources, shared_limit  # noqa: E402
from threshnet_fast.kernels import (  # noqa: E402
    checksum,
    configurations,
    dense_layer,
    head,
    implicit_gemm,
    launch,
    layout,
    stem_convolution,
)
from threshnet_fast.kernels.architectures import ARCHITECTURES as TABLE  # noqa: E402
from threshnet_fast.kernels.architectures import precision_for  # noqa: E402
from threshnet_fast.kernels.configurations import Configuration  # noqa: E402

import threshnet_fast as tf  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"

CLASSES = (
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)
"""Dtypes and precisions that kernels are compiled for."""

REPORTED = tuple(name for name in ARCHITECTURES if name != "sm_75")
"""Architectures of the report. sm_75 is emulated too, and computes what it should, but for want of
tensor cores in Triton its half precision spills: it is not what the kernels are for."""

MATRIX_KERNELS = (
    "implicit_gemm_kernel",
    "stem_kernel",
    "dense_layer_kernel",
    "many_images_kernel",
    "input_gradient_kernel",
    "weight_gradient_kernel",
)
"""Kernels that multiply matrices."""

_TILE = re.compile(r"BLOCK|SPLIT|LEAD|WARPS|TILE")


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        architecture: ``"sm_90"``, ``"gfx942"``.
        kernel: Name of the function.
        dtype: Of the features.
        precision: How float32 is multiplied.
        tile: Tile sizes.
        warps: Of a program.
        stages: Of the software pipeline.
        variant: Everything else that the compiler knows.
        registers: Of a thread.
        spills: Instructions that move registers to memory and back, or registers moved.
        stack_bytes: Memory of a thread outside of registers.
        shared_bytes: Of a program.
        shared_limit: What a program may have.
        programs_at_once: On a multiprocessor, by registers, warps and shared memory.
        tensor_instructions: Names and numbers.
        asynchronous_copies: From global to shared memory.
    """

    architecture: str
    kernel: str
    dtype: str
    precision: str
    tile: str
    warps: int
    stages: int
    variant: str
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    programs_at_once: int
    tensor_instructions: str
    asynchronous_copies: int


def problems(row: Row) -> list[str]:
    """Returns what is wrong with a kernel."""
    found = []
    architecture = TABLE[row.architecture]
    if row.spills:
        found.append(f"{row.spills} spills")
    if row.shared_bytes > row.shared_limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, limit {row.shared_limit}")
    if row.programs_at_once < 1:
        found.append("no program fits on a multiprocessor")
    if row.dtype == "float32":
        tensor_cores = row.precision == "tf32" and architecture.tf32 > 0
    else:
        tensor_cores = architecture.half > architecture.full
    if row.kernel in MATRIX_KERNELS and tensor_cores and not row.tensor_instructions:
        found.append("no tensor-core instruction")
    asynchronous = architecture.backend == "cuda" and row.architecture != "sm_75"
    # The operators' gradients load gathered, gated tiles, which registers have to pass.
    if row.kernel == "implicit_gemm_kernel" and asynchronous and not row.asynchronous_copies:
        found.append("no asynchronous copy")
    return found


def matrix_launches(
    dtype: torch.dtype, precision: str, configuration: Configuration
) -> Iterator[launch.Launch]:
    """Yields the convolution kernel in the variants that networks use, with one configuration."""

    def convolve(channels: list[int], kernel: int, *, prologue: bool, split: bool) -> list:
        parts = 2 if split else 1
        buffer = channels_last(1, sum(channels) + 16, 14, 14, dtype)
        ends = [sum(channels[: index + 1]) for index in range(len(channels))]
        xs = [buffer[:, end - count : end] for end, count in zip(ends, channels, strict=True)]
        weight = torch.empty(96, sum(channels), kernel, kernel)
        y = channels_last(1, 512, 14, 14, dtype)[:, :96]
        vector = torch.empty(sum(channels))
        return implicit_gemm.convolve(
            xs,
            layout.pack_weight(weight, channels, dtype),
            y,
            stride=1,
            padding=kernel // 2,
            prologue=(vector, vector) if prologue else None,
            bias=torch.empty(96) if prologue or len(channels) > 1 else None,
            relu=prologue or len(channels) > 1,
            precision=precision,
            configuration=replace(configuration, split_k=parts),
            partials=torch.empty(implicit_gemm.partials_size(y, parts)) if split else None,
        )

    for split in (False, True):
        yield from convolve([256], 1, prologue=True, split=split)
        for segments in (1, 2, 3, 4, 5) if dtype != torch.bfloat16 else (1, 5):
            yield from convolve([48, 80, 128, 208, 336][:segments], 3, prologue=False, split=split)


def stem_launches(
    dtype: torch.dtype, precision: str, configuration: Configuration
) -> list[launch.Launch]:
    """Returns the launches of a network's first convolution, with one configuration."""
    return stem_convolution.convolve_stem(
        torch.empty(1, 3, 32, 32, dtype=dtype),
        stem_convolution.pack_stem(torch.empty(32, 3, 3, 3), dtype),
        channels_last(1, 32, 16, 16, dtype),
        stride=2,
        padding=1,
        bias=torch.empty(32),
        relu=True,
        precision=precision,
        configuration=configuration,
    )


def dense_layer_launches(
    architecture: str, dtype: torch.dtype, precision: str
) -> Iterator[launch.Launch]:
    """Yields dense layers in one kernel, of the sizes of ThreshNet and of wider networks."""
    for channels, bottleneck, growth, size in ((160, 128, 32, 56), (192, 192, 48, 28)):
        buffer = channels_last(1, channels + layout.padded(growth), size, size, dtype)
        packed = torch.empty(channels)
        yield from dense_layer.dense_layer(
            buffer[:, :channels],
            layout.pack_weight(torch.empty(bottleneck, channels, 1, 1), [channels], dtype),
            (packed, packed),
            torch.empty(bottleneck),
            layout.pack_weight(torch.empty(growth, bottleneck, 3, 3), [bottleneck], dtype),
            buffer[:, channels:],
            scratch=torch.empty(2**20, dtype=dtype),
            precision=precision,
            configuration=dense_layer.choose(dtype, precision, architecture),
        )


def head_launches(dtype: torch.dtype, precision: str) -> Iterator[launch.Launch]:
    """Yields pooling with classifier, of an image and of many."""
    for images in (1, 64):
        x = channels_last(images, 512, 7, 7, dtype)
        weight = head.pack_head(torch.empty(1000, 512), dtype)
        y = torch.empty(images, 1000, dtype=dtype)
        yield from head.head(x, weight, torch.empty(1000), y, precision=precision)


def channels_last(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised tensor."""
    return torch.empty(n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


def run_network(dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> None:
    """Launches everything that a network does for some batches and sizes of square images."""
    model = tf.ThreshNet95(num_classes=10).eval().to(dtype)
    for batch, size in shapes:
        with torch.no_grad():
            model(torch.empty(batch, 3, size, size, dtype=dtype))


def run_operators(
    dtype: torch.dtype, shapes: Sequence[tuple[int, int, Sequence[int], int]]
) -> None:
    """Launches both operators and their gradients.

    Args:
        dtype: Of the features.
        shapes: Batch, height and width, channels of the segments, output channels.
    """

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    for batch, size, channels, out_channels in shapes:
        whole = sum(channels)
        for kernel in (1, 3):
            xs = [channels_last(batch, each, size, size, dtype) for each in channels]
            xs = [x.zero_().requires_grad_() for x in xs]
            weight = leaf(out_channels, whole, kernel, kernel)
            if kernel == 1:
                y = tf.ops.cat_bn_relu_conv(xs, leaf(whole), leaf(whole), weight)
            else:
                y = tf.ops.cat_conv_bn_relu(xs, weight, leaf(out_channels), leaf(out_channels))
            y.backward(torch.zeros_like(y))


# One image, and as many as occupy a device, on maps large and small.
_NETWORKS = ((1, 224), (64, 224), (1, 32))

# Tiles of gradients follow the numbers of channels, with limits at 64, and of pixels.
_OPERATORS = (
    (8, 14, (64, 32), 128),
    (8, 14, (48, 80), 32),
    (32, 14, (32,), 64),
    (1, 7, (16,), 16),
)


def compile_all(architecture: str, say: Callable[[str], None]) -> list[Row]:
    """Compiles everything for one architecture."""
    found = TABLE[architecture]
    rows: dict[str, Row] = {}
    for dtype, precision in CLASSES:
        if precision_for(architecture, precision) != precision:
            continue
        shapes = 1 if dtype == torch.bfloat16 else None
        with compiled_for(architecture) as log, allow_tf32(precision == "tf32"):
            for configuration in configurations.candidates(found, dtype, precision):
                launch.run(list(matrix_launches(dtype, precision, configuration)))
                launch.run(stem_launches(dtype, precision, configuration))
            launch.run(list(dense_layer_launches(architecture, dtype, precision)))
            launch.run(list(head_launches(dtype, precision)))
            checksum.checksum(checksum.sample_addresses([torch.zeros(1, dtype=dtype)]))
            with tf.use_backend("triton"):
                run_network(dtype, _NETWORKS[:shapes])
                run_operators(dtype, _OPERATORS[:shapes])
        for entry in log:
            if entry.compiled.hash not in rows:
                rows[entry.compiled.hash] = describe(architecture, dtype, precision, entry.compiled)
        say(f"{architecture} {dtype} {precision}: {len(rows)} kernels so far")
    return sorted(rows.values(), key=lambda row: [str(value) for value in asdict(row).values()])


class allow_tf32:
    """Sets PyTorch's permission to multiply in TF32 within a block."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self._allowed else "ieee"

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.fp32_precision = self._before


def describe(architecture: str, dtype: torch.dtype, precision: str, compiled: Any) -> Row:
    """Reads a compiled kernel."""
    used = resources(compiled)
    names = compiled.src.fn.arg_names
    constants = {
        names[path[0]]: value
        for path, value in compiled.src.constants.items()
        if len(path) == 1 and names[path[0]].isupper()
    }
    segments = compiled.src.signature.get("xs")
    variant = [f"{name}={value}" for name, value in constants.items() if not _TILE.search(name)]
    if isinstance(segments, tuple):
        variant.append(f"segments={len(segments)}")
    metadata = compiled.metadata
    return Row(
        architecture=architecture,
        kernel=metadata.name,
        dtype=str(dtype).removeprefix("torch."),
        precision=precision,
        tile=" ".join(f"{name}={value}" for name, value in constants.items() if _TILE.search(name)),
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        variant=" ".join(variant),
        registers=used.registers,
        spills=used.spills,
        stack_bytes=used.stack_bytes,
        shared_bytes=used.shared_bytes,
        shared_limit=shared_limit(architecture),
        programs_at_once=programs_at_once(
            architecture, used.registers, used.shared_bytes, metadata.num_warps
        ),
        tensor_instructions=" ".join(
            f"{name}={count}" for name, count in sorted(used.tensor_instructions.items())
        ),
        asynchronous_copies=used.asynchronous_copies,
    )


def programs_at_once(architecture: str, registers: int, shared: int, num_warps: int) -> int:
    """Returns how many programs a multiprocessor holds: its occupancy, in programs.

    Registers are given to a warp in units, within one of a multiprocessor's partitions.
    """
    found = TABLE[architecture]
    partitions, unit = (2, 24) if architecture == "gfx1100" else (4, 8)
    of_warp = -(-max(1, registers) // unit) * unit * found.warp_size
    by_registers = partitions * (found.registers // partitions // of_warp)
    warps = min(found.warps, by_registers)
    own = found.reserved_bytes
    by_shared = (found.shared_bytes + own) // max(1, shared + own)
    return min(warps // num_warps, by_shared)


def read(path: Path = RESULTS) -> list[Row]:
    """Reads a report."""
    return read_rows(path, Row)


def write(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Writes a report."""
    write_rows(path, Row, rows)


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=None)
    parser.add_argument("--check", action="store_true", help="write no report")
    arguments = parser.parse_args()
    chosen = arguments.architecture or REPORTED
    compiled: list[Row] = []
    for architecture in chosen:
        compiled += compile_all(architecture, lambda text: print(text, flush=True))
    bad = [(row, found) for row in compiled if (found := problems(row))]
    for row, found in bad:
        print(
            f"{row.architecture} {row.kernel} {row.dtype} {row.precision} {row.tile} "
            f"{row.variant}: {', '.join(found)}"
        )
    if not arguments.check:
        before = read() if RESULTS.exists() else []
        rows = [row for row in before if row.architecture not in chosen] + compiled
        write(sorted(rows, key=lambda row: list(ARCHITECTURES).index(row.architecture)))
    print(f"{len(compiled)} kernels, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
