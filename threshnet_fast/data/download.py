"""Fetching data sets, when asked to, and checking what was fetched."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import secrets
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import DataError

__all__ = ["Published", "fetch", "unpack"]

_CHUNK = 1 << 20
# Without an answer, or without anything more of the file.
_SECONDS = 60


@dataclass(frozen=True)
class Published:
    """What a published file is known by.

    Attributes:
        size: Its bytes.
        sha256: Its checksum.
    """

    size: int
    sha256: str

    def check(self, path: Path) -> None:
        """Raises DataError unless a file is the published one."""
        size = path.stat().st_size
        if size != self.size:
            raise DataError(
                f"{path} is damaged, or not the published file: it has {size} bytes, expected "
                f"{self.size}"
            )
        found = _sha256(path)
        if found != self.sha256:
            raise DataError(
                f"{path} is damaged, or not the published file: its SHA-256 is {found}, expected "
                f"{self.sha256}"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url: str, path: Path, published: Published) -> None:
    """Downloads a file, unless it is there already, and checks it.

    Args:
        url: Where it is published.
        path: Where it is put, once it is whole; nothing is left of a file that is not.
        published: What is expected.

    Raises:
        DataError: It cannot be fetched, or is not the published file.
    """
    if path.is_file():
        published.check(path)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path) as part:
            with urllib.request.urlopen(url, timeout=_SECONDS) as source:
                _copy(source, part, published.size, url)
            published.check(part)
            part.replace(path)
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be fetched: {error or type(error).__name__}") from error


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A new file beside one that it may replace; whatever happens, it is gone afterwards."""
    # Two processes that fetch the same file must not share it. (The module tempfile would hide it
    # from other users, whatever the umask says.)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _copy(source: IO[bytes], path: Path, size: int, name: object) -> None:
    """Copies a file of a known size, and not a byte more."""
    with path.open("xb") as file:
        rest = size
        while chunk := source.read(min(_CHUNK, rest + 1)):
            rest -= len(chunk)
            if rest < 0:
                raise DataError(f"{name} has more than the {size} bytes that were expected")
            file.write(chunk)
    if rest:
        raise DataError(f"{name} ended after {size - rest} bytes: expected {size}")


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
                with source, _part(folder / name) as part:
                    _copy(source, part, member.size, f"{name} in {archive}")
                    part.replace(folder / name)
                missing.remove(name)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    if missing:
        raise DataError(f"{archive} does not hold {', '.join(sorted(missing))}")
