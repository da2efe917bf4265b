"""The pictures of a folder are read once before anything is done with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CommandError
from ..text import printable
from .arguments import natural_number

if TYPE_CHECKING:
    from ..train.distributed import Processes

__all__ = ["add_reading_arguments", "find_unreadable"]

_SHOWN = 3


def add_reading_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments of a command that reads a data set."""
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="accept files of the data set that are not as large as the published ones",
    )
    _add_check_arguments(group)
    group.add_argument(
        "--workers",
        type=natural_number,
        default=2,
        metavar="N",
        help="processes that read a folder's images (default 2)",
    )


def _add_check_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments that say whether to check, and what to do with unreadable pictures."""
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out pictures of a folder that cannot be read, and list them (default), or end "
        "the command",
    )
    choice.add_argument(
        "--no-check",
        action="store_true",
        help="do not read all pictures of a folder beforehand: an unreadable one then ends the "
        "command when it is reached",
    )


def find_unreadable(
    arguments: argparse.Namespace, paths: Sequence[Path], channels: int, processes: Processes
) -> list[tuple[Path, str]]:
    """Reads pictures to the end, each in one of the processes, and lists those that cannot be read.

    Args:
        arguments: Those of the command.
        paths: The pictures.
        channels: As of :func:`threshnet_fast.data.pictures.check_pictures`.
        processes: All get the same result, but for reasons that another has found.

    Returns:
        The unreadable ones with their reasons, which the first process has printed.

    Raises:
        CommandError: There are some, and they are not to be left out.
    """
    from ..data.pictures import check_pictures

    if arguments.no_check:
        return []
    rank, count = processes.rank, processes.count
    found = processes.together(
        lambda: dict(
            check_pictures(paths[rank::count], channels=channels, progress=processes.first)
        )
    )
    marks = torch.tensor([path in found for path in paths], dtype=torch.int64)
    marks = processes.sum(marks.to(processes.device))
    unreadable = [paths[number] for number in marks.nonzero().flatten().tolist()]
    if count > 1 and processes.first:
        found |= dict(check_pictures(unreadable, channels=channels, progress=False))
    reasons = [(path, found.get(path, "cannot be read")) for path in unreadable]
    lines = [f"{printable(path)}: {reason}" for path, reason in reasons]

    def tell() -> None:
        if lines and not arguments.skip_unreadable:
            rest = f"; {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            raise CommandError(
                f"{len(lines)} of {len(paths)} pictures cannot be read: "
                f"{'; '.join(lines[:_SHOWN])}{rest}; mend or remove them, or leave them out by "
                "--skip-unreadable"
            )
        for line in lines:
            print(f"left out: {line}", file=sys.stderr)

    processes.together(lambda: tell() if processes.first else None)
    return reasons
