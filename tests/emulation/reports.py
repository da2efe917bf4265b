"""Reports of compiled kernels as CSV files: a dataclass of numbers and texts for each row."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

__all__ = ["read_rows", "write_rows"]

Row = TypeVar("Row")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Reads a report whose rows are of a dataclass with fields of ``int`` and ``str``."""
    numbers = {field.name for field in fields(kind) if field.type == "int"}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            kind(**{name: int(text) if name in numbers else text for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Writes a report, one column for each field of the dataclass ``kind``."""
    columns = [field.name for field in fields(kind)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
