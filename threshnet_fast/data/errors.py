"""What is wrong with a data set."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(ValueError):
    """A data set is missing, incomplete or damaged; the message says which file, and what to do."""
