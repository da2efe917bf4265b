"""Fetching data sets, when asked to, and checking what was fetched."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from .errors import DataError

__all__ = ["check_md5", "fetch", "md5", "unpack"]

_CHUNK = 1 << 20
_SECONDS = 60


def md5(path: Path) -> str:
    """Returns the MD5 of a file, which is what data sets are published with."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_md5(path: Path, expected: str) -> None:
    """Raises DataError unless a file is the published one."""
    found = md5(path)
    if found != expected:
        raise DataError(
            f"{path} is damaged, or not the published file: its MD5 is {found}, expected {expected}"
        )


def fetch(url: str, path: Path, expected: str) -> None:
    """Downloads a file, unless it is there already, and checks it.

    Args:
        url: Where it is published.
        path: Where it is put, once it is whole.
        expected: Its MD5.

    Raises:
        DataError: It cannot be fetched, or is not the published file.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
        except (OSError, urllib.error.URLError) as error:
            part.unlink(missing_ok=True)
            raise DataError(f"{url} cannot be fetched: {error}") from error
        check_md5(part, expected)
        part.replace(path)
    else:
        check_md5(path, expected)


def unpack(archive: Path, folder: Path, names: Iterable[str]) -> None:
    """Takes files out of an archive.

    Args:
        archive: A tar file.
        folder: Where they are put, whatever the archive says.
        names: Their names, without folders.

    Raises:
        DataError: The archive is none, or a file is not in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = set(names)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                source = tar.extractfile(member) if name in missing and member.isfile() else None
                if source is None:
                    continue
                part = folder / f"{name}.part"
                with source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
                part.replace(folder / name)
                missing.remove(name)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    if missing:
        raise DataError(f"{archive} does not hold {', '.join(sorted(missing))}")
