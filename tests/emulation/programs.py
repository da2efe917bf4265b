"""Small PTX programs for the tests of the interpreter."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import triton

from .ptx import run_ptx

__all__ = ["assemble", "elementwise", "evaluate", "kernel", "module"]

_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

_HEADER = """
.version 8.7
.target sm_90a
.address_size 64
"""


def kernel(
    body: str, *, pointers: int = 2, declarations: str = "", name: str = "kernel", more: str = ""
) -> str:
    """Returns a kernel whose first ``pointers`` parameters are in ``%q0``, ``%q1``, ...

    Declared are also ``%t`` (the thread), ``%c`` (the block), ``%p0``, ..., ``%h0``, ... (16 bits),
    ``%r0``, ..., ``%f0``, ... (32 bits) and ``%d0``, ... (64 bits).

    Args:
        body: Instructions.
        pointers: How many parameters are addresses of global memory.
        declarations: More of registers and shared memory.
        name: Of the entry.
        more: Declarations of further parameters, separated by commas.
    """
    parameters = [f".param .u64 q{number}" for number in range(pointers)]
    loads = "\n".join(f"ld.param.u64 %q{number}, [q{number}];" for number in range(pointers))
    declared = ", ".join(parameters + ([more] if more else []))
    return f"""
.visible .entry {name}({declared})
{{
.reg .pred %p<9>; .reg .b16 %h<33>; .reg .b32 %r<65>; .reg .b32 %f<65>; .reg .b64 %d<33>;
.reg .b64 %q<9>; .reg .b32 %t; .reg .b32 %c;
{declarations}
{loads}
mov.u32 %t, %tid.x;
mov.u32 %c, %ctaid.x;
{body}
ret;
}}
"""


def module(*kernels: str) -> str:
    """Returns a PTX module."""
    return _HEADER + "".join(kernels)


def assemble(text: str) -> None:
    """Checks with NVIDIA's assembler that a module is valid.

    Raises:
        RuntimeError: It is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "module.ptx"
        source.write_text(text)
        command = [str(_PTXAS), "-arch=sm_90a", "-O0", str(source), "-o", str(source) + ".cubin"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr)


def elementwise(
    body: str, inputs: Sequence[np.dtype], outputs: Sequence[np.dtype], *, name: str = "kernel"
) -> str:
    """Returns a kernel that computes ``%o0``, ... from ``%i0``, ..., one element a thread."""
    declarations, loads, stores = [], [], []
    kinds = [("i", kind) for kind in inputs] + [("o", kind) for kind in outputs]
    counts = {"i": 0, "o": 0}
    for place, (letter, kind) in enumerate(kinds):
        size = np.dtype(kind).itemsize
        register = f"%{letter}{counts[letter]}"
        counts[letter] += 1
        declarations.append(f".reg .b{max(16, 8 * size)} {register};")
        address = f"mad.wide.u32 %d0, %t, {size}, %q{place};"
        if letter == "i":
            loads.append(f"{address} ld.global.b{8 * size} {register}, [%d0];")
        else:
            stores.append(f"{address} st.global.b{8 * size} [%d0], {register};")
    return kernel(
        "\n".join([*loads, body, *stores]),
        pointers=len(kinds),
        declarations="\n".join(declarations),
        name=name,
    )


def evaluate(
    body: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.dtype]
) -> list[np.ndarray]:
    """Runs :func:`elementwise` on arrays of a multiple of 32 elements."""
    count = len(inputs[0])
    kinds = [np.dtype(kind) for kind in outputs]
    text = module(elementwise(body, [each.dtype for each in inputs], kinds))
    memory = [torch.from_numpy(each.copy().view(np.uint8)) for each in inputs]
    memory += [torch.full((count * kind.itemsize,), 0xA5, dtype=torch.uint8) for kind in kinds]
    run_ptx(text, "kernel", (1,), (count,), memory)
    for before, after in zip(inputs, memory, strict=False):
        assert before.tobytes() == after.numpy().tobytes()
    return [
        each.numpy().view(kind) for each, kind in zip(memory[len(inputs) :], kinds, strict=True)
    ]
