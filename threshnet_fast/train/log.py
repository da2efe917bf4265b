"""The tables that a run writes after every epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .progress import Progress

__all__ = ["write_log"]


def write_log(output: Path, progress: Progress, classes: Sequence[str]) -> None:
    """Writes ``log.csv``, a row an epoch, and ``class_accuracy.csv``, a row an evaluation.

    Args:
        output: The run's folder.
        progress: With one epoch at least.
        classes: Their names.
    """
    rows = progress.rows
    _write_csv(output / "log.csv", list(rows[0]), [list(row.values()) for row in rows])
    _write_csv(output / "class_accuracy.csv", ["epoch", *classes], progress.class_rows)


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([head, *rows])
    write_text(path, text.getvalue())
