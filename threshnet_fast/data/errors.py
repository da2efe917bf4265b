"""What is wrong with a data set."""

from __future__ import annotations

from pathlib import Path

from ..text import printable

__all__ = ["DataError", "PictureError"]


class DataError(ValueError):
    """A data set is missing, incomplete or damaged; the message says which file, and what to do."""


class PictureError(DataError):
    """A picture cannot be read.

    Args:
        path: The file.
        reason: Why, in one line.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        # Both, so that it can be pickled: workers hand it on.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"
