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

import numpy as np
import torch
from torch import Tensor

from .ptx_machine import launch
from .ptx_memory import GlobalMemory
from .ptx_parser import parse
from .ptx_translator import Translation, translate
from .ptx_types import PTXError

__all__ = ["PTXError", "UndefinedBytes", "entries", "modules", "run_ptx", "unsupported"]

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
    kernels = [text[a:b] for a, b in zip(begin, [*begin[1:], len(text)], strict=True)]
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
    """Runs a kernel; all memory that it may access are the storages of the tensors given.

    Args:
        text: A PTX module.
        name: The kernel, as :func:`entries` names it.
        grid: Blocks along x, y and z; missing axes are 1.
        block: Threads of a block along x, y and z; their product is a multiple of 32.
        arguments: A tensor stands for its address, None for the null pointer, bytes for a struct
            that is passed by value.
        memory: Tensors whose storages the kernel sees at the addresses where they really are, for
            pointers within structs.
        dynamic_shared: Bytes of shared memory beside what the program declares.
        races: Whether to look for races.
        undefined: Memory whose reading is an error until it is written.

    Returns:
        Instructions executed, each for many threads at once.

    Raises:
        PTXError: The program did what a GPU forbids or leaves undefined, or cannot be executed.
    """
    translation = _translation(text, name)
    device = _Device(undefined)
    for number, tensor in enumerate(memory):
        device.add(tensor, f"the storage of tensor {number}", in_place=True)
    values: list[int | float | bytes] = []
    for number, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            values.append(device.add(argument, f"the storage of argument {number}"))
        else:
            values.append(0 if argument is None else argument)
    steps = launch(
        translation, device.memory, grid, block, values, dynamic_shared=dynamic_shared, races=races
    )
    device.copy_back()
    return steps


class _Device:
    """Global memory that holds copies of storages."""

    def __init__(self, undefined: UndefinedBytes | None) -> None:
        self.memory = GlobalMemory()
        self._undefined = undefined
        # By where a storage really is: the address, its bytes, which of them are undefined.
        self._copies: dict[int, tuple[int, np.ndarray, np.ndarray | None]] = {}

    def add(self, tensor: Tensor, label: str, *, in_place: bool = False) -> int:
        """Copies a storage unless it is there; returns the address of the tensor.

        Args:
            tensor: A view of the storage.
            label: A name for messages.
            in_place: Whether the copy has the address of the storage itself; there is none of a
                storage without bytes.
        """
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._copies:
            contents = _contents(storage)
            if in_place and len(contents) == 0:
                return start
            address = self.memory.allocate(
                contents, address=start if in_place else None, alignment=start, label=label
            )
            which = None if self._undefined is None else self._undefined.of(storage)
            if which is not None:
                self.memory.mark_undefined(address, which)
            self._copies[start] = address, contents, which
        return self._copies[start][0] + tensor.data_ptr() - start

    def copy_back(self) -> None:
        """Gives the storages, and what is known of them, what is in memory now."""
        for address, contents, which in self._copies.values():
            contents[:] = self.memory.read(address, len(contents))
            if which is not None:
                which[:] = self.memory.undefined(address, len(which))


def _translation(text: str, name: str) -> Translation:
    return _translated(hashlib.sha256(text.encode()).digest(), text, name)


@functools.lru_cache(maxsize=512)
def _translated(digest: bytes, text: str, name: str) -> Translation:
    return translate(parse(text, name))


def _contents(storage: torch.UntypedStorage) -> np.ndarray:
    if storage.nbytes() == 0:
        return np.zeros(0, np.uint8)
    pointer = ctypes.cast(storage.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, (storage.nbytes(),))
