"""Arguments that several commands take: their types, and groups of them."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from pathlib import Path

import torch

from ..bench.machine import usable_processors
from ..bench.photographs import Photograph, installed_photographs
from ..errors import CommandError
from .pictures import load_picture

__all__ = [
    "add_budget_arguments",
    "add_file_arguments",
    "add_input_arguments",
    "add_run_arguments",
    "cells",
    "check_device",
    "check_model",
    "device",
    "image_size",
    "models",
    "natural_number",
    "photographs",
    "positive_float",
    "positive_integer",
    "prepare_run",
    "threads",
]

_LARGEST = 65536
_THREADS, _THREADS_PER_PROCESSOR = 64, 4
_DEFAULT_MODEL = "threshnet95"
_DEFAULT_CELLS = ((224, 224, 1), (32, 32, 1), (32, 32, 32))


def positive_integer(text: str) -> int:
    """An integer from 1 up."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return number


def natural_number(text: str) -> int:
    """An integer from 0 up."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from 0 up")
    return int(text)


def threads(text: str) -> int:
    """A number of threads, from 1 to what can hardly be meant.

    Making tens of thousands ends the process, in OpenMP, without an exception.
    """
    number = positive_integer(text)
    most = max(_THREADS, _THREADS_PER_PROCESSOR * usable_processors())
    if number > most:
        raise argparse.ArgumentTypeError(
            f"{number}: expected at most {most} threads on {usable_processors()} processors"
        )
    return number


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def image_size(text: str) -> tuple[int, int]:
    """``"224"`` or ``"160x288"``, height before width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 224 or 160x288")
    height, width = int(parts[0]), int(parts[-1])
    if not (0 < height <= _LARGEST and 0 < width <= _LARGEST):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to {_LARGEST} pixels a side")
    return height, width


def device(text: str) -> torch.device:
    """``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cuda:N")
    return torch.device(text)


def check_device(wanted: torch.device) -> torch.device:
    """Returns the device with its index, 0 where it has none.

    Raises:
        CommandError: There is no such device.
    """
    if wanted.type == "cpu":
        return wanted
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        reason = (
            f"torch {torch.__version__} was built without CUDA"
            if build is None
            else f"torch {torch.__version__} finds no CUDA device"
        )
        raise CommandError(f"--device {wanted}: {reason}", status=2)
    count, index = torch.cuda.device_count(), wanted.index or 0
    if index >= count:
        devices = "is 1 CUDA device" if count == 1 else f"are {count} CUDA devices"
        raise CommandError(f"--device {wanted}: there {devices}, the first is cuda:0", status=2)
    return torch.device("cuda", index)


def check_model(name: str) -> None:
    """Raises a :class:`CommandError` that suggests the nearest name unless the model exists."""
    from ..models import list_models

    names = list_models()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise CommandError(f"unknown model {name!r}: {hint}", status=2)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which networks to measure on what; see :func:`cells`."""
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help=f"model, repeatable (default {_DEFAULT_MODEL})",
    )
    what.add_argument(
        "--cell",
        action="append",
        type=_cell,
        metavar="SIZE:BATCH",
        help="input, repeatable, for example 224:1, 32:32 or 160x288:4",
    )
    what.add_argument(
        "--size",
        nargs="+",
        type=image_size,
        metavar="SIZE",
        help="instead of --cell: sizes, for example 224 or 160x288; all are combined with --batch",
    )
    what.add_argument("--batch", nargs="+", type=positive_integer, metavar="N", help="batch sizes")
    what.add_argument(
        "--classes", type=positive_integer, default=10, metavar="N", help="classes (default 10)"
    )
    what.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--image", action="append", metavar="PATH", help="picture to run on, repeatable"
    )
    source.add_argument("--random-input", action="store_true", help="no pictures: random numbers")


def _cell(text: str) -> tuple[int, int, int]:
    size, colon, batch = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected SIZE:BATCH, for example 224:1")
    return (*image_size(size), positive_integer(batch))


def models(arguments: argparse.Namespace) -> list[str]:
    """The models to measure, each once.

    Args:
        arguments: With those of :func:`add_input_arguments`.
    """
    return list(dict.fromkeys(arguments.model or [_DEFAULT_MODEL]))


def cells(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Height, width and batch of the inputs to measure on, each once.

    Args:
        arguments: With those of :func:`add_input_arguments`.

    Raises:
        CommandError: The inputs are named in two ways.
    """
    if arguments.cell and (arguments.size or arguments.batch):
        raise CommandError("--cell already names sizes and batches: leave --size, --batch out", 2)
    if arguments.cell:
        return list(dict.fromkeys(arguments.cell))
    if arguments.size or arguments.batch:
        sizes = arguments.size or [(224, 224)]
        batches = arguments.batch or [1]
        return list(dict.fromkeys((*size, batch) for size in sizes for batch in batches))
    return list(_DEFAULT_CELLS)


def photographs(arguments: argparse.Namespace) -> list[Photograph]:
    """The photographs to measure on, those that were named or that are installed; maybe none.

    Args:
        arguments: With those of :func:`add_input_arguments`.

    Raises:
        CommandError: One that was named cannot be read.
    """
    if arguments.image:
        return [load_picture(path) for path in arguments.image]
    return [] if arguments.random_input else installed_photographs()


def add_budget_arguments(group: argparse._ArgumentGroup, default: str, rounds: str) -> None:
    """Adds the arguments that say for how long to measure.

    Args:
        group: Where they belong.
        default: The default of the seconds, as the help says it.
        rounds: What is repeated, as the help says it.
    """
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help=f"time for each input of each model (default {default})",
    )
    budget.add_argument("--repeats", type=positive_integer, metavar="N", help=f"instead: {rounds}")


def add_file_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the arguments that say which files to write.

    Args:
        parser: Of the command.
        default: The default of the CSV file, as the help says it.
    """
    files = parser.add_argument_group("files")
    files.add_argument(
        "--csv", type=Path, metavar="PATH", help=f"file to append to (default {default})"
    )
    files.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="plot to write: .png, .svg or .pdf (default: beside the CSV file)",
    )
    files.add_argument("--no-files", action="store_true", help="write neither")


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments of a command that runs a model; see :func:`prepare_run`."""
    group.add_argument(
        "--device",
        type=device,
        default=torch.device("cpu"),
        metavar="DEVICE",
        help="cpu (default), cuda or cuda:N",
    )
    group.add_argument("--threads", type=threads, metavar="N", help="default: torch's")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="as use_backend takes it (default auto)"
    )


def prepare_run(arguments: argparse.Namespace) -> torch.device:
    """Sets the number of threads that was asked for, and returns the device.

    Args:
        arguments: With those of :func:`add_run_arguments`.

    Raises:
        CommandError: There is no such backend or device.
    """
    from ..engines.select import check_name

    try:
        check_name(arguments.backend, "--backend")
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    place = check_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return place
