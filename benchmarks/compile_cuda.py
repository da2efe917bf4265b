"""Compiles all CUDA C++ kernels for every architecture, and reports what they use.

    python benchmarks/compile_cuda.py [--architecture sm_90 ...] [--check]

nvcc is needed, a GPU is not. The options are those of the build, every warning being an error: of
the assembler too, which warns of registers that spill.

The report is ``benchmarks/results/cuda_kernels.csv``; the exit status is 1 if a kernel spills
registers, exceeds shared memory, or lacks instructions that it is written for.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulation.cuda_resources import (  # noqa: E402, the line above finds it
    LIMITS,
    Kernel,
    blocks_at_once,
    compiled_all,
    skip_reason,
    version,
)
from emulation.reports import read_rows, write_rows  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "cuda_kernels.csv"

ARCHITECTURES = tuple(LIMITS)

DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GROUP = 16

LARGEST_SHARED_BYTES = {
    "head_kernel": 32768,
    "gather_pixels_kernel": 4224,
    "pack_weight_kernel": 4224,
}
"""The most dynamic shared memory that the launchers ask for, of kernels that have no tiles."""

REQUIRED = {
    "split_reduction_kernel": ("ldg_128",),
    "pool_kernel": ("ldg_128", "stg_128"),
    "stem_convolution_kernel": ("ldg_128", "stg_128"),
    "head_kernel": ("ldg_128",),
    "gather_channels_kernel": ("ldg_128", "stg_128"),
    "gather_pixels_kernel": ("stg_128", "bar"),
    "pack_weight_kernel": ("bar",),
    "pack_rows_kernel": (),
    "pack_vector_kernel": (),
}
"""Columns that are not 0, as the source accesses 16 bytes at once or has a barrier; but for
:func:`required_of_convolution` these are all kernels."""

REFUSED = "refused by the launchers: no bfloat16 in tensor cores"


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        nvcc: Version of the compiler.
        architecture: ``"sm_90"``.
        kernel: Name of the function.
        dtype: Of the features; of what is packed.
        tile: Pixels x output channels x products of a stage, and stages.
        variant: What else the compiler knows.
        registers: Of a thread.
        spill_stores: Bytes of registers written to memory for want of registers.
        spill_loads: Bytes of them that are read back.
        stack_bytes: Memory of a thread outside its registers.
        static_shared: Bytes of shared memory of a block that its launch does not ask for.
        dynamic_shared: Bytes that it does, at most.
        threads: Of a block.
        blocks: On a multiprocessor at once, by registers, shared memory and threads.
        warps: Of these blocks.
        instructions: Of the code.
        hmma: Products of tensor cores.
        ldgsts: Asynchronous copies from global to shared memory.
        ldsm: Loads of matrices for tensor cores.
        ldsm_transposed: Those of them that transpose.
        ldg_128: Loads of 16 bytes from global memory.
        stg_128: Stores of 16 bytes to global memory.
        ffma: Products and sums in float32.
        bar: Barriers.
        ldl: Loads from a thread's own memory.
        stl: Stores to it.
        note: What is particular.
    """

    nvcc: str
    architecture: str
    kernel: str
    dtype: str
    tile: str
    variant: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    static_shared: int
    dynamic_shared: int
    threads: int
    blocks: int
    warps: int
    instructions: int
    hmma: int
    ldgsts: int
    ldsm: int
    ldsm_transposed: int
    ldg_128: int
    stg_128: int
    ffma: int
    bar: int
    ldl: int
    stl: int
    note: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What is compiled."""
        return self.kernel, self.dtype, self.tile, self.variant

    def __str__(self) -> str:
        return " ".join(filter(None, (self.architecture, *self.key)))


def required_of_convolution(row: Row) -> tuple[str, ...]:
    """Returns the columns that are not 0 for ``implicit_gemm_kernel``."""
    if row.note:
        return ()
    # Before sm_80 copies are loads.
    copies = ("ldg_128",) if row.architecture == "sm_75" else ("ldgsts",)
    products = ("ffma",) if row.dtype == "float32" else ("hmma", "ldsm", "ldsm_transposed")
    prologue = ("ldg_128",) if row.variant == "prologue" else ()
    return (*copies, *products, *prologue, "stg_128", "bar")


def problems(row: Row) -> list[str]:
    """Returns what is wrong with a kernel."""
    found = [
        f"{name} is {getattr(row, name)}"
        for name in ("spill_stores", "spill_loads", "stack_bytes", "ldl", "stl")
        if getattr(row, name)
    ]
    limit = LIMITS[row.architecture].block_shared_bytes
    if row.static_shared + row.dynamic_shared > limit:
        found.append(f"{row.static_shared + row.dynamic_shared} bytes of shared memory of {limit}")
    if row.blocks < 1:
        found.append("no block fits on a multiprocessor")
    convolution = row.kernel == "implicit_gemm_kernel"
    required = required_of_convolution(row) if convolution else REQUIRED[row.kernel]
    found += [f"no {name}" for name in required if not getattr(row, name)]
    if row.dtype == "float32" and (row.hmma or row.ldsm):
        found.append("float32 by tensor cores")
    return found


def describe(architecture: str, kernel: Kernel) -> Row:
    """Reads a compiled kernel.

    Raises:
        RuntimeError: Its name is not understood.
    """
    name, dtype, tile, variant = parse_name(kernel.name)
    dynamic_shared = LARGEST_SHARED_BYTES.get(name, 0)
    if tile:
        numbers = map(int, re.findall(r"\d+", tile))
        pixels, columns, depth, stages = numbers
        dynamic_shared = (pixels + columns) * depth * stages * ITEM_BYTES[dtype]
    refused = architecture == "sm_75" and name == "implicit_gemm_kernel" and dtype == "bfloat16"
    blocks = blocks_at_once(
        architecture, kernel.registers, kernel.shared_bytes + dynamic_shared, kernel.threads
    )
    return Row(
        nvcc=version(),
        architecture=architecture,
        kernel=name,
        dtype=dtype,
        tile=tile,
        variant=variant,
        registers=kernel.registers,
        spill_stores=kernel.spill_stores,
        spill_loads=kernel.spill_loads,
        stack_bytes=kernel.stack_bytes,
        static_shared=kernel.shared_bytes,
        dynamic_shared=dynamic_shared,
        threads=kernel.threads,
        blocks=blocks,
        warps=blocks * -(-kernel.threads // 32),
        instructions=kernel.instructions,
        hmma=kernel.count("HMMA"),
        ldgsts=kernel.count("LDGSTS"),
        ldsm=kernel.count("LDSM"),
        ldsm_transposed=kernel.count("LDSM", "MT88"),
        ldg_128=kernel.count("LDG", "128"),
        stg_128=kernel.count("STG", "128"),
        ffma=kernel.count("FFMA"),
        bar=kernel.count("BAR"),
        ldl=kernel.count("LDL"),
        stl=kernel.count("STL"),
        note=REFUSED if refused else "",
    )


def parse_name(text: str) -> tuple[str, str, str, str]:
    """Returns the name of a kernel's function, its dtype, its tile and what else it is made for."""
    found = re.fullmatch(r"void threshnet_fast::cuda::(\w+)<(.*)>\(.*\)", text)
    if found is None:
        raise RuntimeError(f"the name of the kernel {text} is not understood")
    name, arguments = found[1], found[2].replace("threshnet_fast::cuda::", "")
    if name == "implicit_gemm_kernel":
        matched = re.fullmatch(r"GemmTile<(\w+), (\d+), (\d+), (\d+), (\d+), .*>, (\w+)", arguments)
        if matched is None:
            raise RuntimeError(f"the tile of {text} is not understood")
        dtype, prologue = DTYPES[matched[1]], matched[6] == "true"
        pixels, columns, groups, stages = map(int, matched.groups()[1:5])
        tile = f"{pixels}x{columns}x{groups * GROUP} {stages} stages"
        return name, dtype, tile, "prologue" if prologue else ""
    types = [DTYPES[each] for each in arguments.split(", ") if each in DTYPES]
    values = [each for each in arguments.split(", ") if each not in DTYPES]
    if name == "pool_kernel":
        average, kernel = values[0] == "true", int(values[1])
        variant = f"{'average' if average else 'maximum'} {window(kernel)}"
    elif name == "stem_convolution_kernel":
        variant = window(int(values[0])) + (f" of {values[1]}" if values[1] != "0" else "")
    elif len(types) == 2:
        variant = f"from {types[0]}"
    elif values or len(types) != 1:
        raise RuntimeError(f"the arguments of {text} are not understood")
    else:
        variant = ""
    return name, types[-1], "", variant


def window(kernel: int) -> str:
    """Returns how a window is written; 0 is one of any size."""
    return f"{kernel}x{kernel}" if kernel else "any window"


def compile_all(architectures: Sequence[str]) -> list[Row]:
    """Compiles everything for some architectures."""
    rows = [
        describe(architecture, kernel)
        for architecture, kernels in compiled_all(architectures).items()
        for kernel in kernels
    ]
    return in_order(rows)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Returns rows as the report has them."""
    return sorted(
        rows, key=lambda row: (row.kernel, ARCHITECTURES.index(row.architecture), row.key)
    )


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
    reason = skip_reason()
    if reason is not None:
        parser.error(reason)
    chosen = arguments.architecture or ARCHITECTURES
    compiled = compile_all(chosen)
    bad = [(row, found) for row in compiled if (found := problems(row))]
    for row, found in bad:
        print(f"{row}: {', '.join(found)}")
    if not arguments.check:
        before = read() if RESULTS.exists() else []
        write(in_order([row for row in before if row.architecture not in chosen] + compiled))
    print(f"{len(compiled)} kernels, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
