"""Reading files of weights that others wrote, without running anything that is in them."""

from __future__ import annotations

import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint"]

_SAFE = "load it yourself where you trust it, and save model.state_dict()"
# torch.save stores without compression: what unpacks to much more was not written by it.
_SLACK = 16 << 20
_BEGINNINGS = (
    (b"version https://git-lfs", "is a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"\x89HDF", "is HDF5, as Keras writes it: expected a file of PyTorch or of safetensors"),
)


class _NumPyValue:
    """Stands where a file has a number or an array of NumPy, such as its best accuracy.

    NumPy's own types are not made of what a file says of them: their state can break memory.
    """

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: list[Any] = [
    (_NumPyValue, f"numpy{name}")
    for core in (".core.multiarray", "._core.multiarray")
    for name in (".dtype", ".ndarray", f"{core}.scalar", f"{core}._reconstruct")
]


def read_checkpoint(path: Path) -> Mapping[Any, Any]:
    """Reads what ``torch.save`` or safetensors wrote, on the CPU: tensors, and plain Python values.

    Args:
        path: The file; its content tells what it is, not its name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of weights, is damaged, or would run code.
        OSError: It cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no file: expected one of weights")
    with path.open("rb") as file:
        head = file.read(512)
    # The length of the header, below 2^32, and the header, which is JSON.
    if head[4:9] == b"\0\0\0\0{":
        return _read_safetensors(path)
    _check_beginning(path, head)
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_STAND_INS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    # An unpickler raises whatever a malformed file leads it to.
    except Exception as error:
        raise ValueError(f"{path} {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a state_dict")
    return content


def _check_beginning(path: Path, head: bytes) -> None:
    if not head:
        raise ValueError(f"{path} is empty")
    for beginning, text in _BEGINNINGS:
        if head.startswith(beginning):
            raise ValueError(f"{path} {text}")
    if head.lstrip()[:1] == b"<":
        raise ValueError(
            f"{path} is a page of HTML or XML, perhaps the answer of a server: expected weights"
        )


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error


def _check_archive(path: Path) -> None:
    """Refuses an archive that unpacks to more than its size, before anything is unpacked."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if unpacked > size + _SLACK:
        raise ValueError(
            f"{path} unpacks from {size} to {unpacked} bytes: expected a file as torch.save "
            "writes it, which is not compressed"
        )


def _reason(error: Exception) -> str:
    """What is wrong with a file that ``torch.load`` refused."""
    text = str(error)
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted is not None:
        return (
            f"holds more than tensors: its pickle asks for {wanted[1]}, which is code, and code "
            f"of a file is not run; {_SAFE}"
        )
    if "TorchScript" in text:
        return "is a TorchScript archive: torch.jit.load reads it; save its state_dict()"
    if "legacy .tar" in text:
        return (
            "is a tar file of PyTorch before 0.1.10, which cannot be read without running code "
            f"of it; {_SAFE}"
        )
    detail = " ".join(text.split()).partition(". ")[0][:160] or type(error).__name__
    if text.startswith("Weights only load failed"):
        detail = "its pickle is none that torch.save wrote"
    return f"is no file of weights, or damaged ({detail})"
