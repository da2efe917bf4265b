"""Tables and plots of measurements. All numbers come from rows of the CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import CommandError
from .job import Spec
from .registry import registry
from .results import CELL

__all__ = [
    "cells",
    "format_table",
    "markdown_table",
    "milliseconds",
    "on_gpu",
    "plot",
    "text_table",
    "thread_count",
]

Row = Mapping[str, str]

_ALWAYS_SHOWN = (
    "min_ms",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "gflops",
    "speedup_min",
    "speedup_p50",
    "error",
)

# Processors' worth of other processes that no measurement is free of.
_NEGLIGIBLE = 0.1


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligns columns, the first ``left`` of them to the left, with two spaces in between."""
    table = [list(header), *[list(line) for line in lines]]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]

    def align(line: list[str]) -> str:
        parts = [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([align(table[0]), rule, *(align(line) for line in table[1:])])


def cells(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows by run and by what was run, in the order of the file."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("run", *CELL)), []).append(row)
    return list(groups.values())


def on_gpu(row: Row) -> bool:
    """Whether a row was measured on a GPU."""
    return row.get("device", "") not in ("", "cpu")


def cell_title(row: Row) -> str:
    """What a cell ran, in one line."""
    return f"{row['model']}, {_size(row)}, batch {row['batch']}, {row['dtype']}, {_place(row)}"


def _place(row: Row) -> str:
    if on_gpu(row):
        return row["accelerator"] + (", L2 flushed" if row["l2"] == "flushed" else "")
    return thread_count(int(row["threads"]))


def thread_count(count: int) -> str:
    """``"1 thread"`` or ``"2 threads"``."""
    return "1 thread" if count == 1 else f"{count} threads"


def _specs(row: Row) -> dict[str, Spec]:
    device = "cuda" if on_gpu(row) else "cpu"
    return registry(device, row["dtype"], row.get("task", "inference"))


def text_table(rows: Sequence[Row]) -> str:
    """The table of one cell for a terminal."""
    columns = {
        "min ms": ("min_ms", "{:.2f}"),
        "p20": ("p20_ms", "{:.2f}"),
        "p50": ("p50_ms", "{:.2f}"),
        "p80": ("p80_ms", "{:.2f}"),
        "GFLOP/s": ("gflops", "{:.1f}"),
        "x best peer": ("speedup_min", "{:.2f}"),
        "(p50)": ("speedup_p50", "{:.2f}"),
        "error": ("error", "{:.1e}"),
        "steps/s": ("steps_per_second", "{:.2f}"),
        "gradient error": ("gradient_error", "{:.1e}"),
        "peak MB": ("peak_bytes", "{:.0f}"),
        "tensors MB": ("live_bytes", "{:.0f}"),
    }
    # What is not measured has no column, except what belongs in every table.
    columns = {
        title: (name, form)
        for title, (name, form) in columns.items()
        if name in _ALWAYS_SHOWN or any(row.get(name) for row in rows)
    }
    lines = []
    for row in rows:
        line = [row["provider"], row["version"]]
        for name, form in columns.values():
            scale = 1e6 if name.endswith("_bytes") else 1
            line.append(form.format(float(row[name]) / scale) if row.get(name) else "-")
        lines.append(line)
    header = ["provider", "version", *columns]
    text = format_table(header, lines, left=2)
    notes = [f"{row['provider']}: {row['status']}" for row in rows if row["status"] != "ok"]
    load = disturbance(rows)
    if load is not None:
        notes.append(
            f"Other processes kept {load:.1f} processors busy meanwhile: do not trust these times."
        )
    return "\n".join([cell_title(rows[0]), text, *notes])


def disturbance(rows: Sequence[Row]) -> float | None:
    """The processors that other processes took away from the engines; None if too few to matter.

    A process elsewhere on a large machine takes nothing away while enough processors are idle, and
    of what happens on a GPU processors say nothing.
    """
    rows = [row for row in rows if not on_gpu(row)]
    load = max((float(row["other_load"]) for row in rows if row["other_load"]), default=0.0)
    spare = int(rows[0]["processors"] or 0) - int(rows[0]["threads"]) if rows else 0
    return load if load > max(spare, 0) + _NEGLIGIBLE else None


def markdown_table(rows: Sequence[Row], details: bool = False) -> str:
    """A Markdown table, one line a cell and one column a provider, fastest provider in bold.

    Args:
        rows: Rows of the file, all from GPUs, or all from CPUs in one precision; of cells that ran
            more than once, the last run only.
        details: Show the median after the minimum, and ``model(x)`` beside the frozen network.
    """
    gpu = bool(rows) and on_gpu(rows[0])
    specs = _specs(rows[0]) if rows else {}
    names = [
        name
        for name in specs
        if (details or name != "drop-in") and any(row["provider"] == name for row in rows)
    ]
    header = ["model", "input", "dtype" if gpu else "threads"]
    header += [*(specs[name].title for name in names), "over the best peer"]
    lines = [header, [":--", ":--", ":--" if gpu else "--:", *("--:" for _ in header[3:])]]
    for group in cells(rows):
        timed = {row["provider"]: row for row in group if row["status"] == "ok"}
        best = min(
            (row for name, row in timed.items() if name in names),
            key=lambda row: float(row["min_ms"]),
            default=None,
        )
        first = group[0]
        line = [first["model"], f"{_size(first)}, batch {first['batch']}"]
        line.append(first["dtype"] if gpu else first["threads"])
        for name in names:
            row = timed.get(name)
            if row is None:
                failed = any(r["provider"] == name for r in group)
                line.append("failed" if failed else "")
                continue
            text = milliseconds(row["min_ms"])
            text = f"**{text}**" if row is best else text
            line.append(f"{text} / {milliseconds(row['p50_ms'])}" if details else text)
        fused = timed.get("fused")
        if fused is None or not fused["speedup_min"]:
            line.append("")
        else:
            text = f"{float(fused['speedup_min']):.2f}x"
            if details:
                text += f" / {float(fused['speedup_p50']):.2f}x"
            line.append(text)
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(rows: Sequence[Row]) -> str:
    """One sentence a machine: processor, GPU, instruction sets, versions, commit."""
    seen: dict[str, None] = {}
    for row in rows:
        versions = {
            f"{_specs(r)[r['provider']].title} {r['version']}": None
            for r in rows
            if r["run"] == row["run"] and r["provider"] in ("fused", "onnxruntime", "openvino")
        }
        gpu = []
        if on_gpu(row):
            gpu = [_place(row), row["libraries"]]
            gpu += [f"driver {row['driver']}"] if row["driver"] else []
        text = ", ".join(
            [
                *gpu,
                f"{row['processor']} ({row['processors']} processors)",
                f"torch {row['torch']}",
                *versions,
                f"Python {row['python']}",
                f"{row['time'][:10]}" + (f", commit {row['commit']}" if row["commit"] else ""),
            ]
        )
        load = disturbance([r for r in rows if r["run"] == row["run"]])
        if load is not None:
            text += f"; other processes kept up to {load:.1f} processors busy meanwhile"
        seen[text] = None
    return "\n".join(f"{text}." for text in seen)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws one panel a cell: median call of every provider, 20th to 80th percentile as a line.

    Args:
        rows: Rows of the file.
        path: Image to write; the suffix chooses the format.

    Raises:
        CommandError: There is nothing to draw, or the file cannot be written.
    """
    groups = [
        timed for group in cells(rows) if (timed := [row for row in group if row["status"] == "ok"])
    ]
    if not groups:
        raise CommandError(f"nothing to plot in {path}: no provider was timed")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    most = max(len(group) for group in groups)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, (0.9 + 0.34 * most) * lines),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        _panel(axis, group)
    what = "step" if groups[0][0].get("task") == "training" else "call"
    figure.supxlabel(f"milliseconds a {what}: bar median, line 20th to 80th percentile", fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot write {path}: {reason}") from error
    finally:
        pyplot.close(figure)


def _panel(axis: object, group: Sequence[Row]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    positions = list(range(len(group)))
    medians = [float(row["p50_ms"]) for row in group]
    low = [float(row["p50_ms"]) - float(row["p20_ms"]) for row in group]
    high = [float(row["p80_ms"]) - float(row["p50_ms"]) for row in group]
    ours = [_specs(row)[row["provider"]].ours for row in group]
    axis.barh(positions, medians, color=["#c44e52" if own else "#8c9bb0" for own in ours])
    axis.errorbar(medians, positions, xerr=[low, high], fmt="none", ecolor="#333333", capsize=2)
    for position, median, above in zip(positions, medians, high, strict=True):
        axis.text(
            median + above, position, f"  {milliseconds(str(median))}", va="center", fontsize=8
        )
    titles = [_specs(row)[row["provider"]].title for row in group]
    axis.set_yticks(positions, titles, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(m + h for m, h in zip(medians, high, strict=True)))
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    first = group[0]
    what = f"{first['model']}, {_size(first)}, batch {first['batch']}"
    axis.set_title(f"{what}\n{first['dtype']}, {_place(first)}", fontsize=9)


def milliseconds(text: str) -> str:
    """Three digits, more for what takes over a second."""
    value = float(text)
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _size(row: Row) -> str:
    return f"{row['height']}x{row['width']}"


def check_plot(path: Path) -> None:
    """Raises unless a plot can be written to the path.

    Raises:
        CommandError: The folder does not exist or is not writable, or the format is unknown.
    """
    import os

    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise CommandError(f"cannot write {path}: expected a name that ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")
