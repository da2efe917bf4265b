"""Writing files so that whoever reads them finds the old content or the new, never a part."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["replace_with", "sha256", "sync_folder", "write_json", "write_tensors", "write_text"]

_CHUNK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_with(temporary: Path, path: Path) -> None:
    """Gives a finished file its name, once its content is on the disk."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_with(temporary, path)


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

    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary
    )
    digest = sha256(temporary)
    replace_with(temporary, path)
    return digest


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
