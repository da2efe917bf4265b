"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
import difflib
import math
import re

import torch

from ..bench.machine import usable_processors
from ..errors import CommandError

__all__ = [
    "add_run_arguments",
    "check_device",
    "check_model",
    "device",
    "image_size",
    "natural_number",
    "positive_float",
    "positive_integer",
    "prepare_run",
    "threads",
]

_LARGEST = 65536
_THREADS, _THREADS_PER_PROCESSOR = 64, 4


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
