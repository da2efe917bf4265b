"""What the kernels of ``csrc/cuda`` use of a GPU, as nvcc compiles them and its disassembler reads.

for kernel in compiled(source, "sm_90"):
    kernel.name, kernel.registers, kernel.opcodes["HMMA"], blocks_at_once("sm_90", ...)
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from threshnet_fast.kernels.architectures import ARCHITECTURES

from .cuda_library import BUILD, CSRC, ROOT, fingerprint

__all__ = [
    "LIMITS",
    "Kernel",
    "Limits",
    "blocks_at_once",
    "compiled",
    "compiled_all",
    "skip_reason",
    "sources",
    "version",
]


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has, as the CUDA C++ programming guide lists by compute capability.

    Attributes:
        warps: That can be resident.
        blocks: That can be resident.
        shared_bytes: Of shared memory.
        block_shared_bytes: Of shared memory that one block may have, if it asks for it.
        reserved_bytes: Of shared memory, that the system takes for each block.
    """

    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int
    reserved_bytes: int


# Blocks that can be resident.
_BLOCKS = {
    "sm_75": 16,
    "sm_80": 32,
    "sm_86": 16,
    "sm_89": 24,
    "sm_90": 32,
    "sm_100": 32,
    "sm_120": 24,
}


def _limits(name: str, blocks: int) -> Limits:
    known = ARCHITECTURES[name]
    return Limits(
        known.warps,
        blocks,
        # One block gets all but what the system takes.
        known.shared_bytes + known.reserved_bytes,
        known.shared_bytes,
        known.reserved_bytes,
    )


LIMITS = {name: _limits(name, blocks) for name, blocks in _BLOCKS.items()}
"""By architecture. All have 65536 registers, in four partitions, and 32 lanes of a warp."""

_WARP = 32
_PARTITIONS = 4
_REGISTERS = 65536
_REGISTER_UNIT = 256
_SHARED_UNIT = 128


def blocks_at_once(architecture: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Returns how many blocks of a kernel a multiprocessor holds.

    Args:
        architecture: One of :data:`LIMITS`.
        registers: Of a thread.
        shared_bytes: Of a block, static and dynamic.
        threads: Of a block.
    """
    limits = LIMITS[architecture]
    of_block = -(-threads // _WARP)
    # A warp's registers are given out in units, within one of the partitions.
    of_warp = _round_up(max(1, registers) * _WARP, _REGISTER_UNIT)
    warps = _REGISTERS // _PARTITIONS // of_warp * _PARTITIONS
    shared = _round_up(shared_bytes, _SHARED_UNIT) + limits.reserved_bytes
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    return min(warps // of_block, limits.warps // of_block, by_shared, limits.blocks)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Kernel:
    """One kernel in machine code.

    Attributes:
        name: With its template arguments, as in C++.
        registers: Of a thread.
        stack_bytes: Memory of a thread outside its registers.
        spill_stores: Bytes of registers that are written there for want of registers.
        spill_loads: Bytes that are read back.
        shared_bytes: Shared memory of a block that its launch does not ask for.
        threads: That a block has at most, as ``__launch_bounds__`` says.
        opcodes: How often each instruction stands in the code, by its name alone (``LDG``) and with
            all that follows it (``LDG.E.128.CONSTANT``).
    """

    name: str
    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    threads: int
    opcodes: dict[str, int]

    def count(self, opcode: str, *modifiers: str) -> int:
        """Returns how many instructions there are of an opcode that have all of some modifiers."""
        return sum(
            count
            for text, count in self.opcodes.items()
            if text.split(".")[0] == opcode and set(modifiers) <= set(text.split(".")[1:])
        )

    @property
    def instructions(self) -> int:
        """How many instructions the code has, without what fills it up behind its end."""
        return sum(count for text, count in self.opcodes.items() if text != "NOP")


def sources() -> list[Path]:
    """Returns the files that have kernels."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def skip_reason() -> str | None:
    """Returns why nothing can be compiled and read here, or None."""
    if _build().find_nvcc() is None:
        return "nvcc is not installed"
    if _disassembler() is None:
        return "nvdisasm is neither beside nvcc nor in PATH nor part of Triton"
    if shutil.which("c++filt") is None:
        return "c++filt is not installed"
    return None


@functools.cache
def version() -> str:
    """Returns nvcc's version, as ``"13.0.88"``."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", _output(_nvcc(), "--version"))
    if found is None:
        raise RuntimeError("nvcc does not tell its version")
    return found.group(1)


def compiled_all(architectures: Sequence[str], jobs: int | None = None) -> dict[str, list[Kernel]]:
    """Returns the kernels of all sources for some architectures, by architecture.

    Args:
        architectures: Of :data:`LIMITS`.
        jobs: How many compilers run at once; None: as many as there are processors.

    Raises:
        RuntimeError: nvcc or the disassembler fails, warns, or writes what is not understood.
    """
    work = [(source, architecture) for architecture in architectures for source in sources()]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        found = list(pool.map(lambda each: compiled(*each), work))
    kernels: dict[str, list[Kernel]] = {architecture: [] for architecture in architectures}
    for (_, architecture), of_source in zip(work, found, strict=True):
        kernels[architecture] += of_source
    return kernels


def compiled(source: Path, architecture: str) -> list[Kernel]:
    """Returns the kernels of one source for one architecture.

    They are compiled with the options of the build, warnings being errors. What was read is kept in
    ``build/emulation`` until a source, an option, a tool or this module changes.

    Raises:
        RuntimeError: As :func:`compiled_all`.
    """
    command = [
        _nvcc(),
        *_build().FLAGS,
        "-Werror=all-warnings",
        "-Xptxas=-v",
        "-Icsrc",
        "-cubin",
        f"-arch={architecture}",
        str(source),
    ]
    tools = (
        version(),
        _output(str(_disassembler()), "-V"),
        Path(__file__).read_text(encoding="utf-8"),
    )
    key = fingerprint(source, *command, *tools)
    kept = BUILD / f"{source.stem}-{architecture}-{key}.json"
    if kept.is_file():
        os.utime(kept)
        return [Kernel(**fields) for fields in json.loads(kept.read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        run = subprocess.run(
            [*command, "-o", str(binary)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
        listing = _output(str(_disassembler()), str(binary)) if binary.exists() else ""
    kernels = _read(run.stdout + run.stderr, listing)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps([asdict(kernel) for kernel in kernels]), encoding="utf-8")
    scratch.replace(kept)
    return kernels


_PROPERTIES = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '\w+'\n"
    r".*\n"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*: Used (?P<registers>\d+) registers(?P<rest>.*)\n"
)
_STATIC = re.compile(r"(\d+) bytes smem")
_SECTION = re.compile(r"^\t\.section\t([^,\n]+)", re.M)
_THREADS = re.compile(r"EIATTR_MAX_THREADS\n(?:.*\n)*?(?:.*\.word\t0x(\w+)\n)(?:.*\.word.*\n){2}")
# The word behind the address and, where there is one, the predicate.
_INSTRUCTION = re.compile(r"^\s+/\*\w{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


def _read(log: str, listing: str) -> list[Kernel]:
    """Reads what the assembler said, and the disassembly."""
    heads = list(_SECTION.finditer(listing))
    ends = [*(head.start() for head in heads[1:]), len(listing)]
    sections = {head[1]: listing[head.end() : end] for head, end in zip(heads, ends, strict=True)}
    found = list(_PROPERTIES.finditer(log))
    names = {each["symbol"] for each in found}
    code = {name.removeprefix(".text.") for name in sections if name.startswith(".text.")}
    if names != code:
        raise RuntimeError(f"ptxas told of {sorted(names)}, the code is of {sorted(code)}: {log}")
    kernels = []
    for each, name in zip(found, _demangled([each["symbol"] for each in found]), strict=True):
        opcodes = Counter(_INSTRUCTION.findall(sections[f".text.{each['symbol']}"]))
        threads = _THREADS.search(sections[f".nv.info.{each['symbol']}"])
        if not opcodes["EXIT"] or threads is None:
            raise RuntimeError("nvdisasm's output is not understood")
        static = _STATIC.search(each["rest"])
        kernels.append(
            Kernel(
                name=name,
                registers=int(each["registers"]),
                stack_bytes=int(each["stack"]),
                spill_stores=int(each["stores"]),
                spill_loads=int(each["loads"]),
                shared_bytes=int(static[1]) if static else 0,
                threads=int(threads[1], 16),
                opcodes=dict(sorted(opcodes.items())),
            )
        )
    return kernels


def _demangled(symbols: Sequence[str]) -> list[str]:
    return _output("c++filt", *symbols).splitlines() if symbols else []


@functools.cache
def _build() -> ModuleType:
    """What the build knows of nvcc."""
    spec = importlib.util.spec_from_file_location("_build_nvcc", ROOT / "build_backend" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for it there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _nvcc() -> str:
    found = _build().find_nvcc()
    if found is None:
        raise RuntimeError("nvcc is not installed")
    return found


@functools.cache
def _disassembler() -> Path | None:
    """The path of nvdisasm. CUDA's packages without its tools lack it, and Triton has one."""
    folders = [Path(_nvcc()).resolve().parent]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "nvdisasm").is_file():
            return folder / "nvdisasm"
    in_path = shutil.which("nvdisasm")
    return Path(in_path) if in_path else None


@functools.cache
def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {run.stderr}")
    return run.stdout
