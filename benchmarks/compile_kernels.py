"""Compiles all Triton kernels ahead of time, for every architecture, and reports what they use.

    python benchmarks/compile_kernels.py [--architecture sm_90 ...] [--check]

No GPU is needed. What is compiled are the real launches: every tile of the table of configurations
in every class of arithmetic, a network, and both operators with their gradients. The report is
``benchmarks/results/kernels.csv``; the exit status is 1 if a kernel spills registers, exceeds
shared memory, or does without tensor cores or asynchronous copies that the architecture has.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulation.architectures import ARCHITECTURES  # noqa: E402, the line above finds it
from emulation.driver import compiled_for  # noqa: E402
from emulation.resources import resources, shared_limit  # noqa: E402
from threshnet_fast.kernels import configurations, implicit_gemm, launch, layout  # noqa: E402
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

MATRIX_KERNELS = (
    "implicit_gemm_kernel",
    "stem_kernel",
    "dense_layer_kernel",
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
        programs_at_once: On a multiprocessor, by registers, warps and shared memory; NVIDIA only.
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
    programs_at_once: int | str
    tensor_instructions: str
    asynchronous_copies: int


COLUMNS = tuple(Row.__dataclass_fields__)


def problems(row: Row) -> list[str]:
    """Returns what is wrong with a kernel."""
    found = []
    architecture = configurations.ARCHITECTURES[row.architecture]
    if row.spills:
        found.append(f"{row.spills} spills")
    if row.shared_bytes > row.shared_limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, limit {row.shared_limit}")
    half = row.dtype in ("float16", "bfloat16")
    rate = architecture.half if half else architecture.tf32 if row.precision == "tf32" else 0
    if row.kernel in MATRIX_KERNELS and rate > architecture.full and not row.tensor_instructions:
        found.append("no tensor-core instruction")
    asynchronous = row.architecture.startswith("sm_") and row.architecture != "sm_75"
    # The operators' gradients load gathered, gated tiles, which registers have to pass.
    if row.kernel == "implicit_gemm_kernel" and asynchronous and not row.asynchronous_copies:
        found.append("no asynchronous copy")
    return found


def matrix_launches(
    architecture: str, dtype: torch.dtype, precision: str, configuration: Configuration
) -> Iterator[launch.Launch]:
    """Yields the convolution kernel in the variants that networks use, with one configuration."""

    def convolve(channels: list[int], kernel: int, *, prologue: bool, split: bool) -> list:
        parts = 2 if split else 1
        tile = Configuration(
            configuration.block_m,
            configuration.block_n,
            configuration.block_k,
            configuration.num_warps,
            configuration.num_stages,
            parts,
        )
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
            configuration=tile,
            partials=torch.empty(implicit_gemm.partials_size(y, parts)) if split else None,
        )

    yield from convolve([256], 1, prologue=True, split=False)
    yield from convolve([128], 3, prologue=False, split=False)
    yield from convolve([48, 80, 128, 208, 336], 3, prologue=False, split=False)
    yield from convolve([48, 80], 3, prologue=False, split=True)


def channels_last(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised tensor."""
    return torch.empty(n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


def run_network(dtype: torch.dtype) -> None:
    """Launches everything that a network does, on large and small maps, one image and many."""
    model = tf.ThreshNet95(num_classes=10).eval().to(dtype)
    for shape in ((1, 3, 224, 224), (64, 3, 224, 224), (1, 3, 32, 32)):
        with torch.no_grad():
            model(torch.empty(shape, dtype=dtype))


def run_operators(dtype: torch.dtype) -> None:
    """Launches both operators and their gradients on shapes of a network's layers."""

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def features(channels: int) -> Tensor:
        x = channels_last(8, channels, 14, 14, dtype)
        return x.zero_().requires_grad_()

    y = tf.ops.cat_bn_relu_conv(
        [features(64), features(32)], leaf(96), leaf(96), leaf(128, 96, 1, 1)
    )
    y.backward(torch.zeros_like(y))
    y = tf.ops.cat_conv_bn_relu(
        [features(48), features(80)], leaf(64, 128, 3, 3), leaf(64), leaf(64)
    )
    y.backward(torch.zeros_like(y))


def compile_all(architecture: str, say: Callable[[str], None]) -> list[Row]:
    """Compiles everything for one architecture."""
    found = configurations.ARCHITECTURES[architecture]
    rows: dict[str, Row] = {}
    for dtype, precision in CLASSES:
        if configurations.precision_for(architecture, precision) != precision:
            continue
        with compiled_for(architecture) as log, allow_tf32(precision == "tf32"):
            for configuration in configurations.candidates(found, dtype, precision):
                launch.run(list(matrix_launches(architecture, dtype, precision, configuration)))
            with tf.use_backend("triton"):
                run_network(dtype)
                run_operators(dtype)
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


_WARPS = {"sm_75": 32, "sm_86": 48, "sm_89": 48, "sm_120": 48}


def programs_at_once(architecture: str, registers: int, shared: int, num_warps: int) -> int | str:
    """Returns how many programs an NVIDIA multiprocessor holds: its occupancy, in programs."""
    if not architecture.startswith("sm_"):
        return ""
    warps = _WARPS.get(architecture, 64)
    # Registers are given to warps in units of 256; a block takes 1 KB of shared memory itself.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (per_warp * num_warps)
    by_shared = (shared_limit(architecture) + 1024) // (shared + 1024)
    return min(by_registers, by_shared, warps // num_warps)


def read(path: Path = RESULTS) -> list[Row]:
    """Reads a report."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = []
        for fields in csv.DictReader(file):
            typed: dict[str, Any] = dict(fields)
            for name, field in Row.__dataclass_fields__.items():
                if field.type == "int" or (field.type == "int | str" and fields[name]):
                    typed[name] = int(fields[name])
            rows.append(Row(**typed))
        return rows


def write(rows: list[Row], path: Path = RESULTS) -> None:
    """Writes a report."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=None)
    parser.add_argument("--check", action="store_true", help="write no report")
    arguments = parser.parse_args()
    chosen = arguments.architecture or list(ARCHITECTURES)
    others = [row for row in read() if row.architecture not in chosen] if RESULTS.exists() else []
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
        order = list(ARCHITECTURES)
        write(sorted(others + compiled, key=lambda row: order.index(row.architecture)))
    print(f"{len(compiled)} kernels, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
