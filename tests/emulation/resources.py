"""What a compiled kernel uses of a GPU, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler.compiler import CompiledKernel

from .architectures import ARCHITECTURES

__all__ = ["Resources", "resources", "shared_limit"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_NVIDIA_TENSOR = re.compile(r"(HMMA|HGMMA|IMMA|QMMA|QGMMA|OMMA|UTC\w*MMA)$")
_NVIDIA_COPIES = re.compile(r"(LDGSTS|UTMALDG|UBLKCP)$")
_AMD_TENSOR = re.compile(r"(v_s?mfmac?|v_s?wmmac?)_")
_AMD_COPIES = re.compile(r"(buffer|global)_load_\w*lds\b")


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel on one architecture.

    Attributes:
        architecture: ``"sm_90"``, ``"gfx942"``.
        registers: Of a thread; AMD's vector registers.
        stack_bytes: Memory of a thread outside its registers, for spilled ones among others.
        spills: Instructions that move registers to or from there; on AMD, registers that spill.
        shared_bytes: Shared memory of a program, or LDS.
        tensor_instructions: How often each tensor-core instruction stands in the code, by its
            name: ``HMMA``, ``HGMMA``, ``UTCHMMA``, ``v_mfma``, ``v_wmma``.
        asynchronous_copies: Instructions that copy global to shared memory past the registers.
    """

    architecture: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_instructions: dict[str, int]
    asynchronous_copies: int

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether there is any tensor-core instruction."""
        return bool(self.tensor_instructions)

    @property
    def fits(self) -> bool:
        """Whether the shared memory is within the architecture's limit."""
        return self.shared_bytes <= shared_limit(self.architecture)


def shared_limit(architecture: str) -> int:
    """Returns the bytes of shared memory that a program may have."""
    return ARCHITECTURES[architecture].shared_bytes


def resources(compiled: CompiledKernel) -> Resources:
    """Reads the resources of a kernel from its machine code.

    Raises:
        RuntimeError: Triton's disassembler failed or wrote what is not understood.
    """
    if "cubin" in compiled.asm:
        return _nvidia(compiled)
    return _amd(compiled)


def _nvidia(compiled: CompiledKernel) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        code = _tool("nvdisasm", "-c", str(binary))
    name = re.escape(compiled.metadata.name)
    found = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump's output is not understood: {usage}")
    registers, stack, local = map(int, found.groups())
    opcodes = Counter(re.findall(r"^\s+(?:/\*\w+\*/\s+)?\{?\s*(?:@!?U?P\w+\s+)?(\w+)", code, re.M))
    if not opcodes["EXIT"]:
        raise RuntimeError("nvdisasm's output is not understood: it has no EXIT")
    return Resources(
        architecture=f"sm_{compiled.metadata.target.arch}",
        registers=registers,
        stack_bytes=stack + local,
        spills=opcodes["LDL"] + opcodes["STL"],
        shared_bytes=compiled.metadata.shared,
        tensor_instructions={
            opcode: count for opcode, count in opcodes.items() if _NVIDIA_TENSOR.match(opcode)
        },
        asynchronous_copies=sum(
            count for opcode, count in opcodes.items() if _NVIDIA_COPIES.match(opcode)
        ),
    )


def _tool(name: str, *arguments: str) -> str:
    command: Sequence[str] = (str(_TOOLS / name), *arguments)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{name} failed: {finished.stderr}")
    return finished.stdout


def _amd(compiled: CompiledKernel) -> Resources:
    text = compiled.asm["amdgcn"]

    def entry(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.M)
        if found is None:
            raise RuntimeError(f"the assembly does not tell its {name}")
        return int(found.group(1))

    opcodes = Counter(re.findall(r"^\t(\w+)", text, re.M))
    tensor: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        found = _AMD_TENSOR.match(opcode)
        if found is not None:
            tensor[found.group(1)] += count
    return Resources(
        architecture=compiled.metadata.target.arch,
        registers=entry("vgpr_count"),
        stack_bytes=entry("private_segment_fixed_size"),
        spills=entry("vgpr_spill_count") + entry("sgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        tensor_instructions=dict(tensor),
        asynchronous_copies=len(_AMD_COPIES.findall(text)),
    )
