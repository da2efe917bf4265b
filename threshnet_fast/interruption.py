"""How the process of a command ends when it is interrupted while it still imports."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import PurePath
from types import TracebackType

__all__ = ["expect_interruption"]

_COMMANDS = {"threshnet_fast.cli", "threshnet_fast.train"}


def expect_interruption() -> None:
    """Makes an interruption one line instead of a traceback, in a process of ours alone.

    Importing torch takes seconds, before any command has begun. The process of another program
    that imports this package is left as it is.
    """
    if _runs_command(sys.argv, sys.orig_argv):
        sys.excepthook = _report


def _runs_command(argv: list[str], original: list[str]) -> bool:
    """Whether ``threshnet-fast`` was started, or one of its modules by ``python -m``."""
    if not argv:
        return False
    if argv[0] == "-m":
        # What it is until the module that was named is found.
        return any(
            option == "-m" and name in _COMMANDS for option, name in itertools.pairwise(original)
        )
    return PurePath(argv[0]).stem == "threshnet-fast"


def _report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("threshnet-fast: error: interrupted", file=sys.stderr, flush=True)
        # As of a command that is interrupted later; the interpreter's own end has another status.
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)
