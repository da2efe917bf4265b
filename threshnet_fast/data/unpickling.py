"""Reads pickles of arrays, text and numbers in dictionaries, and nothing else.

A pickle is a program, and that of a stranger may run anything. Here no name that it gives is ever
imported: the few that NumPy's arrays need are stood in for by objects of this module, which make
arrays of bytes by ``numpy.frombuffer`` alone.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

__all__ = ["load_dictionary"]

# Of what these opcodes take from elsewhere, nothing belongs into such a file.
_FORBIDDEN = {
    *("EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "BINPERSID"),
    *("NEWOBJ", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER"),
}
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


class _Array:
    """Stands in for an array until its state has come."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array has a state of another form")
        _, shape, kind, column_order, content = state
        self.values = _make(content, kind, shape, "F" if column_order else "C")


class _Type:
    """Stands in for the type of an array's elements."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


class _Function:
    """Stands in for a function; it has no attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"it calls what is none: {arguments!r:.50}")


class _Reconstruct(_Function):
    __slots__ = ()

    def __call__(self, *arguments: Any) -> _Array:
        return _Array()


class _FromBuffer(_Function):
    __slots__ = ()

    def __call__(self, content: Any, kind: Any, shape: Any, order: Any, *others: Any) -> _Array:
        array = _Array()
        array.values = _make(content, kind, shape, order)
        return array


class _MakeType(_Function):
    __slots__ = ()

    def __call__(self, name: Any, *flags: Any) -> _Type:
        return _Type(name.decode("latin1") if isinstance(name, bytes) else str(name))


class _Encode(_Function):
    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"it encodes text as {encoding!r:.50}")
        return text.encode("latin1")


_KNOWN = {
    ("numpy", "ndarray"): _Function(),
    ("numpy", "dtype"): _MakeType(),
    ("_codecs", "encode"): _Encode(),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct() for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer() for core in ("core", "_core")},
}


def _make(content: object, kind: object, shape: object, order: object) -> NDArray[np.uint8]:
    if isinstance(content, str):
        content = content.encode("latin1")
    name = kind.name if isinstance(kind, _Type) else type(kind).__name__
    if name not in ("u1", "uint8", "|u1") or not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError(f"an array is of {name!r:.50}: expected unsigned bytes")
    if (
        not isinstance(shape, tuple)
        or not all(isinstance(length, int) and length >= 0 for length in shape)
        or math.prod(shape) != len(content)
        or order not in ("C", "F")
    ):
        raise pickle.UnpicklingError(f"an array of shape {shape!r:.50} has {len(content)} bytes")
    values = np.frombuffer(content, np.uint8).copy()
    return values.reshape(shape, order="F" if order == "F" else "C")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}: expected arrays, text and numbers alone"
            ) from None


def _check_opcodes(content: bytes) -> None:
    """Refuses opcodes that reach out of the file, and places that would need memory to be made."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in _FORBIDDEN:
            raise pickle.UnpicklingError(f"it has an opcode {opcode.name}")
        if opcode.name in _MEMO and not (isinstance(argument, int) and 0 <= argument <= count):
            raise pickle.UnpicklingError(f"it remembers a thing at place {argument}")


def load_dictionary(path: Path, largest: int) -> dict[str, Any]:
    """Reads a pickled dictionary of arrays of bytes, text, numbers, and lists of them.

    Args:
        path: The file; of Python 2 or 3.
        largest: Bytes that it may have.

    Returns:
        Keys and text as ``str``.

    Raises:
        DataError: The file cannot be read, is too large, is damaged, or has anything else in it.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise DataError(f"{path} has {size} bytes: expected at most {largest}")
        content = path.read_bytes()
        _check_opcodes(content)
        loaded = _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load(), {})
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # A damaged pickle raises anything.
        reason = f"{error or type(error).__name__}"
        raise DataError(f"{path} is not the published pickle: {reason:.200}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a {type(loaded).__name__}: expected a dictionary")
    return loaded


def _plain(value: object, known: dict[int, Any]) -> Any:
    """Arrays for what stands in for them, and text for bytes.

    Args:
        value: What was loaded.
        known: What the lists are that have been seen: a list may occur in others any number of
            times, and must be gone through once.
    """
    if isinstance(value, _Array):
        if value.values is None:
            raise pickle.UnpicklingError("an array has no state")
        return value.values
    if isinstance(value, bytes):
        return value.decode("latin1")
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(_plain(key, known)): _plain(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if id(value) not in known:
            known[id(value)] = None
            known[id(value)] = [_plain(item, known) for item in value]
        return known[id(value)]
    raise pickle.UnpicklingError(f"it has a {type(value).__name__} in it")
