"""The folder of a run: what it holds already, who may write to it, and what is left in it."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import CommandError
from . import figures
from .evaluation import Evaluation
from .progress import Progress
from .settings import read_settings

__all__ = ["lock", "recorded", "recorded_epochs", "recorded_numbers", "write_figures"]

_WRITTEN = (
    *("model.safetensors", "model.json", "best.safetensors", "best.json", "log.csv"),
    *("class_accuracy.csv", "confusion.csv", "confusion.png", "curves.png"),
)


def recorded(output: Path, resume: bool) -> dict[str, Any] | None:
    """What the folder says of the run that it holds; None where it holds none.

    Args:
        output: The folder, which need not exist.
        resume: Whether to go on with a run that it holds.

    Raises:
        CommandError: It cannot be written to, or holds what is not to be overwritten.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise CommandError(f"--output {output}: {existing} is no folder", status=2)
    if not os.access(existing, os.W_OK):
        raise CommandError(f"--output {output}: {existing} cannot be written to", status=2)
    try:
        found = read_settings(output)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if found is not None and not resume:
        raise CommandError(
            f"--output {output} holds a run already: --resume goes on with it, another folder "
            "starts anew",
            status=2,
        )
    if found is None:
        for name in ("model.safetensors", "log.csv", "checkpoints"):
            if (output / name).exists():
                raise CommandError(
                    f"--output {output} has a {name}, but no config.json of a run", status=2
                )
    return found


def recorded_epochs(content: dict[str, Any], default: int) -> int:
    """For how many epochs a run was meant to go, where the command does not say."""
    recipe = content.get("recipe")
    epochs = recipe.get("epochs") if isinstance(recipe, dict) else None
    return epochs if type(epochs) is int and epochs > 0 else default


def recorded_numbers(content: dict[str, Any], name: str) -> tuple[float, ...]:
    """Numbers that the folder says of its run.

    Raises:
        CommandError: They are missing, or are none.
    """
    try:
        return tuple(map(float, content[name]))
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"config.json of the run is damaged: {name}: {error!r}") from error


def lock(output: Path, stack: contextlib.ExitStack) -> None:
    """Makes the folder, and keeps other runs out of it until the stack closes.

    Raises:
        CommandError: Another process has it.
    """
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process, however that ends.
    file = stack.enter_context((output / ".lock").open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CommandError(f"another process is training in {output}") from error


def write_figures(
    output: Path, progress: Progress, evaluation: Evaluation, classes: tuple[str, ...]
) -> None:
    """Writes what a person looks at once training is done, and prints what the folder holds.

    Args:
        output: The folder.
        progress: Of the whole run.
        evaluation: The last one.
        classes: Their names.
    """
    confusion = evaluation.confusion
    figures.write_confusion(output / "confusion.csv", confusion, classes)
    try:
        figures.draw_curves(output / "curves.png", progress.rows)
        figures.draw_confusion(output / "confusion.png", confusion, classes)
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
    written = [name for name in _WRITTEN if (output / name).exists()]
    print(f"wrote {', '.join(written)} to {output}")
