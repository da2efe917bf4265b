"""Writes the tables of the documentation from the files of benchmarks/results and shipped weights.

    python benchmarks/table.py           # rewrites README.md and files of docs/
    python benchmarks/table.py --check   # fails unless they are up to date

A table stands between ``<!-- performance:NAME:begin -->`` and ``<!-- performance:NAME:end -->``.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import paper
from bench_growth import ODD

from threshnet_fast.bench.cpu_engines import PROVIDERS
from threshnet_fast.bench.registry import dtypes, registry
from threshnet_fast.bench.report import cells, conditions, markdown_table, on_gpu
from threshnet_fast.bench.results import (
    COLUMNS,
    FOREIGN_COLUMNS,
    TRAINING_COLUMNS,
    latest_rows,
    read_rows,
)
from threshnet_fast.errors import CommandError
from threshnet_fast.models import create_model
from threshnet_fast.models.pretrained import list_pretrained

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.csv"
MEMORY = ROOT / "benchmarks" / "results" / "memory.csv"
GROWTH = ROOT / "benchmarks" / "results" / "growth.csv"
TRAINING = ROOT / "benchmarks" / "results" / "train.csv"
FOREIGN = ROOT / "benchmarks" / "results" / "foreign.csv"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "gpu.md",
    ROOT / "docs" / "paper.md",
    ROOT / "docs" / "models" / "threshnet79_cifar10.md",
)

Rows = Sequence[dict[str, str]]


def by_dtype(rows: Rows, details: bool) -> str:
    """A table for every precision that a CPU was measured in: they are not compared."""
    tables = []
    for dtype in dtypes("cpu"):
        group = [row for row in rows if row["dtype"] == dtype]
        if group:
            tables.append(f"**{dtype}**\n\n{markdown_table(group, details)}")
        if group and details and dtype != "float32":
            tables.append(f"![Latency of ThreshNet95 in {dtype}](figures/latency-{dtype}.png)")
    return "\n\n".join([*tables, conditions(rows)])


def summary(rows: Rows) -> str:
    """ThreshNet95 on CPUs with the most threads that were measured: minimum milliseconds."""
    rows = [row for row in rows if row["model"] == "threshnet95" and not on_gpu(row)]
    threads = max((int(row["threads"]) for row in rows), default=0)
    return by_dtype([row for row in rows if int(row["threads"]) == threads], details=False)


def full(rows: Rows) -> str:
    """Everything on CPUs: minimum and median milliseconds."""
    return by_dtype([row for row in rows if not on_gpu(row)], details=True)


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


def growth(rows: Rows) -> str:
    """Time a pixel of odd shapes, over that of their regular neighbours, from growth.csv."""
    del rows
    if not GROWTH.exists():
        return "No measurement has been recorded."
    found = [row for row in latest_rows(read_rows(GROWTH)) if row["model"] == "threshnet95"]
    threads = max((int(row["threads"]) for row in found), default=0)
    found = [row for row in found if row["status"] == "ok" and int(row["threads"]) == threads]
    times = {
        (_cell(row), row["dtype"], row["provider"]): float(row["min_ms"]) / math.prod(_cell(row))
        for row in found
    }
    columns = [
        (dtype, name)
        for dtype in dtypes("cpu")
        for name in registry("cpu", dtype)
        if any((row["dtype"], row["provider"]) == (dtype, name) for row in found)
    ]
    titles = [f"{registry('cpu', dtype)[name].title}, {dtype}" for dtype, name in columns]
    lines = [["input", "beside", *titles], [":--", ":--", *("--:" for _ in columns)]]
    for odd, regular in ODD.items():
        pairs = [(times.get((odd, *c)), times.get((regular, *c))) for c in columns]
        if any(None not in pair for pair in pairs):
            lines.append([_input(odd), _input(regular), *(_percent(*pair) for pair in pairs)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"![Growth of time and memory](figures/growth.png)\n\n{table}\n\n{conditions(found)}"


def training(rows: Rows) -> str:
    """Steps of a training: minimum and median milliseconds, then memory, from train.csv."""
    del rows
    if not TRAINING.exists():
        return "No measurement has been recorded."
    found = latest_rows(read_rows(TRAINING, tuple(TRAINING_COLUMNS)))
    return "\n\n".join(
        [
            markdown_table(found, details=True),
            "![Steps of a training](figures/training.png)",
            _training_memory(found),
            conditions(found),
        ]
    )


def _training_memory(rows: Rows) -> str:
    """Megabytes of a step and, in brackets, of those of eager PyTorch; with the most threads."""
    threads = max(int(row["threads"]) for row in rows)
    specs = registry("cpu", "float32", "training")
    names = [name for name in specs if any(row["provider"] == name for row in rows)]
    lines = [
        ["model", "input", "", *(specs[name].title for name in names)],
        [":--", ":--", ":--", *("--:" for _ in names)],
    ]
    for group in cells(rows):
        by_name = {row["provider"]: row for row in group}
        for column, title in (("peak_bytes", "resident"), ("live_bytes", "tensors")):
            values = {name: row[column] for name, row in by_name.items() if row[column]}
            if int(group[0]["threads"]) != threads or not values:
                continue
            texts = []
            for name in names:
                text = f"{int(values[name]) / 1e6:.0f}" if name in values else ""
                if text and "eager" in values and name != "eager":
                    text += f" ({int(values[name]) / int(values['eager']):.2f})"
                texts.append(text)
            lines.append([group[0]["model"], _input(_cell(group[0])), title, *texts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def foreign(rows: Rows) -> str:
    """Modules of others: minimum and median milliseconds, from foreign.csv."""
    del rows
    if not FOREIGN.exists():
        return "No measurement has been recorded."
    found = latest_rows(read_rows(FOREIGN, tuple(FOREIGN_COLUMNS)))
    prepared = ", ".join(
        f"{row['model']} {float(row['prepare_s']):.1f} s"
        for row in found
        if row["provider"] == "fused" and row["status"] == "ok"
    )
    first = f"From the module to the first output of `optimize`: {prepared}."
    parts = [markdown_table(found, details=True), *([first] if prepared else [])]
    return "\n\n".join([*parts, conditions(found)])


def training_columns(rows: Rows) -> str:
    """What the columns of train.csv hold, as far as it is not what those of models.csv do."""
    del rows
    lines = ["| column | holds |", "| :-- | :-- |"]
    for name, text in TRAINING_COLUMNS.items():
        if COLUMNS.get(name) != text:
            lines.append(f"| `{name}` | {text} |")
    return "\n".join(lines)


def card(model: str, tag: str) -> str:
    """What the description of shipped weights says: facts, then the accuracy of each class."""
    found = [weights for weights in list_pretrained(model) if weights.tag == tag]
    if not found:
        return "These weights are not in this source tree."
    (weights,) = found
    info = weights.info
    parameters = sum(p.numel() for p in create_model(model, pretrained=tag).parameters())
    steps = [f"the middle {info.crop_fraction:.0%} of the shorter side, square"]
    if info.source_size is not None:
        steps.append(f"reduced to {_sides(info.source_size)}")
    steps.append(f"resized to {_sides(info.image_size)} ({info.interpolation})")
    settings = {name: value for name, value in info.recipe.items() if value and name != "name"}
    facts = {
        "Model": f"`{model}`, {parameters / 1e6:.2f} M parameters, {len(info.classes)} classes",
        "File": f"`{weights.path.name}`, {weights.path.stat().st_size / 1e6:.1f} MB, {info.dtype}",
        "SHA-256": f"`{weights.sha256}`",
        "Licence": weights.license,
        "Input": "; ".join(steps),
        "Normalisation": f"mean {_numbers(info.mean)}, standard deviation {_numbers(info.std)}",
        "Data": info.dataset,
        "Recipe": f"`{info.recipe.get('name', '')}`: "
        + ", ".join(f"{name} {_text(value)}" for name, value in settings.items()),
        "Accuracy": f"{info.accuracy:.2%} of {info.extra['test_images']} test images",
        "Note": weights.note,
    }
    lines = ["| | |", "| :-- | :-- |", *(f"| {name} | {text} |" for name, text in facts.items())]
    by_class = info.extra["class_accuracy"]
    lines += ["", "| class | accuracy |", "| :-- | --: |"]
    lines += [f"| {name} | {share:.1%} |" for name, share in by_class.items()]
    return "\n".join(lines)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(row: dict[str, str]) -> tuple[int, int, int]:
    return int(row["height"]), int(row["width"]), int(row["batch"])


def _input(cell: tuple[int, int, int]) -> str:
    return f"{cell[0]}x{cell[1]}, batch {cell[2]}"


def _percent(time: float | None, other: float | None) -> str:
    """How much more it is than the other, in bold where that is over a quarter."""
    if time is None or other is None:
        return ""
    text = f"{100 * (time / other - 1):+.0f}%"
    return f"**{text}**" if time > 1.25 * other else text


TABLES: dict[str, Callable[[Rows], str]] = {
    "summary": summary,
    "full": full,
    "gpu": gpu,
    "columns": columns,
    "memory": memory,
    "growth": growth,
    "paper": lambda rows: paper.render(),
    "foreign": foreign,
    "training": training,
    "training_columns": training_columns,
    "threshnet79_cifar10": lambda rows: card("threshnet79", "cifar10"),
}


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
