"""The command line, ``threshnet-fast``: one file a command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import environment
from ..errors import CommandError, print_error
from ..text import printable

__all__ = ["CommandError", "build_parser", "main"]


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    from ..version import __version__
    from . import bench, convert, doctor, evaluate, export, info, predict, profile, train

    parser = _Parser(
        prog="threshnet-fast",
        description="ThreshNet and its relatives, run fused.",
        epilog="threshnet-fast COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"threshnet_fast {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=_Parser
    )
    for module in (predict, bench, profile, info, train, evaluate, export, convert, doctor):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.DESCRIPTION, formatter_class=_formatter
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Errors are one line on the standard error stream; ``--debug`` or ``THRESHNET_FAST_DEBUG=1``
    lets them pass as exceptions instead.

    Args:
        argv: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0, 1 where the command failed, 2 where its arguments are wrong.
    """
    debug = environment.switched_on(environment.DEBUG)
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks must not cost the other results.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _fail("", "interrupted", 130)
    try:
        return int(arguments.run(arguments))
    except CommandError as error:
        if debug or arguments.debug:
            raise
        return _fail(arguments.command, str(error), error.status)
    except KeyboardInterrupt:
        return _fail(arguments.command, "interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or arguments.debug:
            raise
        text = str(error) or type(error).__name__
        return _fail(arguments.command, f"{text} (--debug shows where)", 1)


def _fail(command: str, text: str, status: int) -> int:
    print_error(command, text)
    return status
