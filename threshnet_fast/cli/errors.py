"""What a command raises to end with one line on the standard error stream."""

from __future__ import annotations

__all__ = ["CommandError"]


class CommandError(Exception):
    """An error that its message explains in full.

    Args:
        message: One line.
        status: The exit status: 1 for a failure, 2 for wrong arguments.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
