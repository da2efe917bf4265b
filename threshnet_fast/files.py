"""Writing files so that whoever reads them finds the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["replacing", "sha256", "sync_folder", "write_json", "write_tensors", "write_text"]

_CHUNK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, whose file takes the place of ``path`` in the end.

    It does so once its content is on the disk, or is removed where the block raises. The file has
    the mode that ``open`` would give it: that of the one it replaces, or what the umask leaves. A
    link is followed, and what is no file, such as a pipe, is written to directly.

    Args:
        path: The file.

    Raises:
        OSError: A file cannot be written there.
    """
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        like = path.stat() if path.exists() else os.fstat(file.fileno())
    try:
        yield temporary
        # Who wrote it may have made a file of its own, as safetensors does.
        temporary.chmod(stat.S_IMODE(like.st_mode))
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step."""
    # NaN is no JSON, but Python reads back what it writes, and a loss may be NaN.
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file in one step.

    Args:
        path: The file.
        tensors: What it shall hold; tensors may lie anywhere, in any memory format.

    Returns:
        The SHA-256 of the file.
    """
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary)
        digest = sha256(temporary)
    return digest


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
