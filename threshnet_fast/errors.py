"""What a command raises to end with one line on the standard error stream, and that line."""

from __future__ import annotations

import sys

from .text import printable

__all__ = ["CommandError", "print_error"]

_LONGEST = 1000


class CommandError(Exception):
    """An error that its message explains in full.

    Args:
        message: One line.
        status: The exit status: 1 for a failure, 2 for wrong arguments.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def print_error(command: str, text: str) -> None:
    """Prints an error as one line, of at most about a thousand letters.

    Args:
        command: What failed; may be empty.
        text: Why.
    """
    line = printable(" ".join(text.split()))
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]} ... and {len(line) - _LONGEST} more letters (--debug shows all)"
    print(f"{f'threshnet-fast {command}'.strip()}: error: {line}", file=sys.stderr)
