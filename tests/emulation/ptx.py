"""Runs kernels given as PTX on tensors in the CPU's memory.

    run_ptx(text, "kernel", grid=(4,), block=(128,), arguments=[x, y, x.numel()])
    run_ptx(text, "kernel", grid=(4,), block=(128,), arguments=[struct], memory=[x, y])

The text may come from Triton or from ``nvcc --ptx``. See :mod:`.ptx_machine` for what is checked.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .ptx_machine import launch
from .ptx_memory import GlobalMemory
from .ptx_parser import parse
from .ptx_translator import Translation, translate
from .ptx_types import PTXError

__all__ = ["Device", "PTXError", "UndefinedBytes", "entries", "modules", "run_ptx", "unsupported"]

_ENTRY = re.compile(r"^[ \t]*(?:\.visible\s+|\.weak\s+)?\.entry\b", re.MULTILINE)


class UndefinedBytes:
    """Which bytes of which storages nothing has written yet."""

    def __init__(self) -> None:
        # The storages are kept so that their addresses mean nothing else.
        self._storages: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}

    def add(self, tensor: Tensor) -> None:
        """Adds the elements of a tensor, which may be a view."""
        storage = tensor.untyped_storage()
        which = self.of(storage)
        if which is None:
            which = np.zeros(storage.nbytes(), np.bool_)
            self._storages[storage.data_ptr()] = storage, which
        size = tensor.element_size()
        elements = torch.zeros(len(which) // size, dtype=torch.bool)
        view = elements.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        view.fill_(True)
        which[: len(elements) * size] |= elements.numpy().repeat(size)

    def of(self, storage: torch.UntypedStorage) -> np.ndarray | None:
        """Returns which bytes of a storage are undefined, an array to update; None for none."""
        found = self._storages.get(storage.data_ptr())
        return None if found is None else found[1]


def entries(text: str) -> list[str]:
    """Returns the names of the kernels in a PTX module."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def modules(text: str) -> dict[str, str]:
    """Splits a PTX module into one for each kernel, with all that is declared outside of kernels.

    Where the architecture makes no difference to a kernel, so that nothing need be translated
    twice, its modules are equal: they do not say what they are for.
    """
    begin = [match.start() for match in _ENTRY.finditer(text)]
    if not begin:
        return {}
    kernels = [text[first:end] for first, end in pairwise([*begin, len(text)])]
    head = re.sub(r"//.*|^\.(version|target|address_size)\b.*", "", text[: begin[0]], flags=re.M)
    head = re.sub(r"\n\s*\n", "\n", head)
    return {entries(each)[0]: head + each for each in kernels}


def unsupported(text: str, name: str) -> list[str]:
    """Returns what is wrong with the instructions of a kernel that cannot be executed."""
    blocks = _translation(text, name).blocks
    errors = [operation.error for block in blocks for operation in block.operations]
    return [str(error) for error in errors if error is not None]


def run_ptx(
    text: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Tensor | int | float | bytes | None],
    *,
    memory: Sequence[Tensor] = (),
    dynamic_shared: int = 0,
    races: bool = True,
    undefined: UndefinedBytes | None = None,
) -> int:
    """Runs a kernel, which may access memory of the tensors given and no other.

    Args:
        text: A PTX module.
        name: The kernel, as :func:`entries` names it.
        grid: Blocks along x, y and z; missing axes are 1.
        block: Threads of a block along x, y and z; their product is a multiple of 32.
        arguments: A tensor stands for its address, and lets the kernel access all of its storage;
            None stands for the null pointer, bytes for a struct that is passed by value.
        memory: Tensors that the kernel sees at the addresses where they really are, for pointers
            within structs: all bytes from a tensor's first element to its last.
        dynamic_shared: Bytes of shared memory beside what the program declares.
        races: Whether to look for races.
        undefined: Memory whose reading is an error until it is written.

    Returns:
        Instructions executed, each for many threads at once.

    Raises:
        PTXError: The program did what a GPU forbids or leaves undefined, or cannot be executed.
        ValueError: There are tensors among the arguments and others in ``memory``.
    """
    if memory and any(isinstance(each, Tensor) for each in arguments):
        raise ValueError("arguments: expected no tensors beside memory, which has the addresses")
    device = Device(undefined)
    device.add_in_place(memory)
    values: list[int | float | bytes] = []
    for number, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            values.append(device.add(argument, f"the storage of argument {number}"))
        else:
            values.append(0 if argument is None else argument)
    steps = device.run(text, name, grid, block, values, dynamic_shared=dynamic_shared, races=races)
    device.copy_back()
    return steps


@dataclass
class _Copy:
    """What lies in global memory of a storage: its address, its bytes, which are undefined."""

    address: int
    contents: np.ndarray
    undefined: np.ndarray | None


class Device:
    """Global memory that holds copies of tensors, for one launch or several.

    Args:
        undefined: Memory whose reading is an error until it is written.
    """

    def __init__(self, undefined: UndefinedBytes | None = None) -> None:
        self._memory = GlobalMemory()
        self._undefined = undefined
        self._copies: dict[int, _Copy] = {}

    def add(self, tensor: Tensor, label: str) -> int:
        """Copies the whole storage unless it is there; returns the address of the tensor."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._copies:
            self._copy(storage, start, storage.nbytes(), label, in_place=False)
        return self._copies[start].address + tensor.data_ptr() - start

    def add_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Copies what lies between each tensor's first and last element, to the same address."""
        spans = [(*_span(each), number) for number, each in enumerate(tensors) if each.numel()]
        spans.sort()
        while spans:
            start, end, number = spans.pop(0)
            while spans and spans[0][0] < end:
                end = max(end, spans.pop(0)[1])
            storage = tensors[number].untyped_storage()
            self._copy(storage, start, end - start, f"tensor {number}", in_place=True)

    def _copy(
        self, storage: torch.UntypedStorage, start: int, count: int, label: str, *, in_place: bool
    ) -> None:
        contents = _contents(start, count)
        address = self._memory.allocate(
            contents, address=start if in_place else None, alignment=start, label=label
        )
        which = None if self._undefined is None else self._undefined.of(storage)
        if which is not None:
            first = start - storage.data_ptr()
            which = which[first : first + count]
            self._memory.mark_undefined(address, which)
        self._copies[start] = _Copy(address, contents, which)

    def run(
        self,
        text: str,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int | float | bytes],
        *,
        dynamic_shared: int = 0,
        races: bool = True,
    ) -> int:
        """Runs a kernel, as :func:`run_ptx` does, on what is in memory."""
        translation = _translation(text, name)
        return launch(
            translation,
            self._memory,
            grid,
            block,
            arguments,
            dynamic_shared=dynamic_shared,
            races=races,
        )

    def copy_back(self) -> None:
        """Gives the storages, and what is known of them, what is in memory now."""
        for copy in self._copies.values():
            count = len(copy.contents)
            copy.contents[:] = self._memory.read(copy.address, count)
            if copy.undefined is not None:
                copy.undefined[:] = self._memory.undefined(copy.address, count)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Returns the addresses of the first element and behind the last."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _translation(text: str, name: str) -> Translation:
    return _translated(hashlib.sha256(text.encode()).digest(), text, name)


@functools.lru_cache(maxsize=512)
def _translated(digest: bytes, text: str, name: str) -> Translation:
    return translate(parse(text, name))


def _contents(address: int, count: int) -> np.ndarray:
    """Returns the memory of this process from an address on."""
    if count == 0:
        return np.zeros(0, np.uint8)
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, (count,))
