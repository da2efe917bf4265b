"""Writes the performance tables of the documentation from the files of benchmarks/results.

    python benchmarks/table.py           # rewrites README.md and docs/performance.md
    python benchmarks/table.py --check   # fails unless they are up to date

A table stands between ``<!-- performance:NAME:begin -->`` and ``<!-- performance:NAME:end -->``.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from threshnet_fast.cli.errors import CommandError
from threshnet_fast.cli.providers import PROVIDERS
from threshnet_fast.cli.report import conditions, markdown_table, on_gpu
from threshnet_fast.cli.results import COLUMNS, latest_rows, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.csv"
MEMORY = ROOT / "benchmarks" / "results" / "memory.csv"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "gpu.md")

Rows = Sequence[dict[str, str]]


def summary(rows: Rows) -> str:
    """ThreshNet95 on CPUs with the most threads that were measured: minimum milliseconds."""
    rows = [row for row in rows if row["model"] == "threshnet95" and not on_gpu(row)]
    threads = max((int(row["threads"]) for row in rows), default=0)
    rows = [row for row in rows if int(row["threads"]) == threads]
    return f"{markdown_table(rows)}\n\n{conditions(rows)}"


def full(rows: Rows) -> str:
    """Everything on CPUs: minimum and median milliseconds."""
    rows = [row for row in rows if not on_gpu(row)]
    return f"{markdown_table(rows, details=True)}\n\n{conditions(rows)}"


def gpu(rows: Rows) -> str:
    """Everything on GPUs, one table each: minimum and median milliseconds."""
    by_device: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if on_gpu(row):
            by_device.setdefault((row["accelerator"], row["l2"]), []).append(row)
    if not by_device:
        return "No measurement on a GPU has been recorded."
    return "\n\n".join(
        f"{markdown_table(group, details=True)}\n\n{conditions(group)}"
        for group in by_device.values()
    )


def columns(rows: Rows) -> str:
    """The columns of the file, and what they hold."""
    del rows
    lines = ["| column | holds |", "| :-- | :-- |"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in COLUMNS.items())])


def memory(rows: Rows) -> str:
    """Megabytes of every provider, from the last rows of memory.csv for each input."""
    del rows
    try:
        with MEMORY.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
    except OSError as error:
        raise CommandError(f"cannot read {MEMORY}: {error.strerror}") from error
    last = {(r["model"], r["size"], r["batch"], r["provider"]): r for r in found}
    lines = [
        "| model | input | provider | tensors of a call | resident, peak | resident, kept |",
        "| :-- | :-- | :-- | --: | --: | --: |",
    ]
    for (model, size, batch, provider), row in last.items():
        numbers = [
            f"{int(row[name]) / 1e6:.0f}" if row[name] else ""
            for name in ("live_bytes", "peak_bytes", "kept_bytes")
        ]
        line = [model, f"{size}x{size}, batch {batch}", PROVIDERS[provider].title, *numbers]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


TABLES = {"summary": summary, "full": full, "gpu": gpu, "columns": columns, "memory": memory}


def render(text: str, rows: Rows) -> str:
    """Returns the text of a document with its tables made anew.

    Raises:
        CommandError: A marker names no table, or is never closed.
    """

    def replace(match: re.Match[str]) -> str:
        begin, name, end = match.group("begin", "name", "end")
        if name not in TABLES:
            raise CommandError(f"there is no table {name!r}: expected one of {list(TABLES)}")
        return f"{begin}\n{TABLES[name](rows)}\n{end}"

    pattern = (
        r"(?P<begin><!-- performance:(?P<name>\w+):begin -->)"
        r".*?(?P<end><!-- performance:(?P=name):end -->)"
    )
    text, replaced = re.subn(pattern, replace, text, flags=re.DOTALL)
    if replaced != len(re.findall(r"<!-- performance:\w+:begin -->", text)):
        raise CommandError("a performance marker is not closed")
    return text


def main() -> int:
    """Rewrites or checks the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    arguments = parser.parse_args()
    try:
        rows = latest_rows(read_rows(arguments.csv))
        for document in DOCUMENTS:
            text = document.read_text(encoding="utf-8")
            new = render(text, rows)
            if new == text:
                continue
            if arguments.check:
                raise CommandError(f"{document.name} is out of date: run benchmarks/table.py")
            document.write_text(new, encoding="utf-8")
            print(f"Written: {document}")
    except (CommandError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
