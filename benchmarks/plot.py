"""Draws the figures of the documentation from the files of benchmarks/results.

    python benchmarks/plot.py

From models.csv a figure for each precision of the CPU, from growth.csv one of how cost grows, from
train.csv one of steps of a training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_growth import ODD

from threshnet_fast.bench.registry import dtypes, registry
from threshnet_fast.bench.report import on_gpu, plot
from threshnet_fast.bench.results import TRAINING_COLUMNS, latest_rows, read_rows
from threshnet_fast.errors import CommandError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.csv"
GROWTH = ROOT / "benchmarks" / "results" / "growth.csv"
TRAINING = ROOT / "benchmarks" / "results" / "train.csv"
FIGURE = ROOT / "docs" / "figures" / "latency.png"
GROWTH_FIGURE = ROOT / "docs" / "figures" / "growth.png"
TRAINING_FIGURE = ROOT / "docs" / "figures" / "training.png"

Row = Mapping[str, str]

_COLORS = {"fused": "#c44e52", "channels-last": "#8c9bb0", "onnxruntime": "#4c72b0"}
_OTHER_COLORS = ("#55a868", "#8172b3", "#937860", "#64b5cd")
_LINES = {"float32": "-", "bfloat16": "--"}
_MARKERS = {"float32": "o", "bfloat16": "s"}


@dataclass(frozen=True)
class _Panel:
    """One panel: which rows it shows, and what of them."""

    title: str
    x_label: str
    y_label: str
    shows: Callable[[Row], bool]
    x: Callable[[Row], float]
    y: Callable[[Row], float]


def main() -> int:
    """Draws ThreshNet95 on a CPU with the most threads that were measured, one panel an input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--model", default="threshnet95")
    parser.add_argument(
        "--output",
        type=Path,
        default=FIGURE,
        help="of float32; the names of other precisions are appended",
    )
    parser.add_argument("--growth-csv", type=Path, default=GROWTH, help="left out where missing")
    parser.add_argument("--growth-output", type=Path, default=GROWTH_FIGURE)
    parser.add_argument(
        "--training-csv", type=Path, default=TRAINING, help="left out where missing"
    )
    parser.add_argument("--training-output", type=Path, default=TRAINING_FIGURE)
    arguments = parser.parse_args()
    try:
        for dtype, rows in _latency_rows(arguments.csv, arguments.model).items():
            output = arguments.output
            if dtype != "float32":
                output = output.with_name(f"{output.stem}-{dtype}{output.suffix}")
            output.parent.mkdir(parents=True, exist_ok=True)
            plot(rows, output)
            print(f"Written: {output}")
        if arguments.growth_csv.exists():
            rows = latest_rows(read_rows(arguments.growth_csv))
            arguments.growth_output.parent.mkdir(parents=True, exist_ok=True)
            plot_growth(
                [row for row in rows if row["model"] == arguments.model], arguments.growth_output
            )
            print(f"Written: {arguments.growth_output}")
        if arguments.training_csv.exists():
            rows = latest_rows(read_rows(arguments.training_csv, tuple(TRAINING_COLUMNS)))
            arguments.training_output.parent.mkdir(parents=True, exist_ok=True)
            plot(_with_most_threads(rows), arguments.training_output)
            print(f"Written: {arguments.training_output}")
    except CommandError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _latency_rows(path: Path, model: str) -> dict[str, list[dict[str, str]]]:
    """The rows of a model on a CPU with the most threads, by precision."""
    rows = [r for r in latest_rows(read_rows(path)) if r["model"] == model and not on_gpu(r)]
    rows = _with_most_threads(rows)
    groups = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in dtypes("cpu")}
    return {dtype: group for dtype, group in groups.items() if group or dtype == "float32"}


def _with_most_threads(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    threads = max((int(row["threads"]) for row in rows), default=0)
    return [row for row in rows if int(row["threads"]) == threads]


def plot_growth(rows: Sequence[Row], path: Path) -> None:
    """Draws time and memory against batch, resolution and threads, one line a provider.

    Args:
        rows: Rows of growth.csv, of one model.
        path: Image to write; the suffix chooses the format.

    Raises:
        CommandError: There is nothing to draw, or the file cannot be written.
    """
    rows = [row for row in rows if row["status"] == "ok" and not on_gpu(row)]
    if not rows:
        raise CommandError(f"nothing to plot in {path}: no provider was timed")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    panels = _panels(max(int(row["threads"]) for row in rows))
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7.6), layout="constrained")
    colors = _colors(rows)
    drawn: dict[tuple[str, str], Line2D] = {}
    for axis, panel in zip(axes.flat, panels, strict=True):
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x_label, fontsize=9)
        axis.set_ylabel(panel.y_label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        shown = [row for row in rows if panel.shows(row)]
        if not shown:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center")
            axis.set_xticks([])
            axis.set_yticks([])
            continue
        for dtype in dtypes("cpu"):
            for provider, color in colors.items():
                points = sorted(
                    (panel.x(row), panel.y(row))
                    for row in shown
                    if (row["dtype"], row["provider"]) == (dtype, provider)
                )
                if points:
                    (drawn[dtype, provider],) = axis.plot(
                        *zip(*points, strict=True),
                        color=color,
                        linestyle=_LINES[dtype],
                        marker=_MARKERS[dtype],
                        markersize=3.5,
                        linewidth=1.3,
                    )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = _spread([panel.x(row) for row in shown if _cell(row) not in ODD])
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3, linewidth=0.5)
    names = [f"{registry('cpu', dtype)[name].title}, {dtype}" for dtype, name in drawn]
    figure.legend(
        list(drawn.values()),
        names,
        loc="outside lower center",
        ncols=max(1, -(-len(names) // 2)),
        fontsize=9,
        frameon=False,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot write {path}: {reason}") from error
    finally:
        pyplot.close(figure)


def _panels(most: int) -> list[_Panel]:
    """The panels, row by row; all but those against threads show the most threads."""

    def images(row: Row) -> float:
        return float(row["batch"])

    def side(row: Row) -> float:
        return round((int(row["height"]) * int(row["width"])) ** 0.5, 1)

    def milliseconds(row: Row) -> float:
        return float(row["min_ms"])

    def megabytes(row: Row) -> float:
        return int(row["peak_bytes"]) / 1e6

    def size_is(size: int) -> Callable[[Row], bool]:
        return lambda row: (row["height"], row["width"]) == (str(size), str(size))

    def whole(row: Row) -> bool:
        return int(row["threads"]) == most

    def with_memory(row: Row) -> bool:
        return whole(row) and row["peak_bytes"] != ""

    def batch_panels(size: int) -> tuple[_Panel, _Panel]:
        inside = size_is(size)
        return (
            _Panel(
                f"{size}x{size}, {_threads(most)}",
                "images in a batch",
                "ms an image",
                lambda row: whole(row) and inside(row),
                images,
                lambda row: milliseconds(row) / images(row),
            ),
            _Panel(
                f"memory, {size}x{size}, {_threads(most)}",
                "images in a batch",
                "peak, MB",
                lambda row: with_memory(row) and inside(row),
                images,
                megabytes,
            ),
        )

    def thread_panel(size: int, batch: int) -> _Panel:
        inside = size_is(size)
        return _Panel(
            f"{size}x{size}, batch {batch}",
            "threads",
            "ms",
            lambda row: inside(row) and row["batch"] == str(batch),
            lambda row: float(row["threads"]),
            milliseconds,
        )

    small, small_memory = batch_panels(32)
    large, large_memory = batch_panels(224)
    sizes = _Panel(
        f"batch 1, {_threads(most)}",
        "root of height x width",
        "ns a pixel",
        lambda row: whole(row) and row["batch"] == "1",
        side,
        lambda row: 1e6 * milliseconds(row) / side(row) ** 2,
    )
    sizes_memory = _Panel(
        f"memory, batch 1, {_threads(most)}",
        "root of height x width",
        "peak, MB",
        lambda row: with_memory(row) and row["batch"] == "1",
        side,
        megabytes,
    )
    return [
        *(small, large, sizes, thread_panel(224, 1)),
        *(small_memory, large_memory, sizes_memory, thread_panel(32, 32)),
    ]


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(row["provider"] for row in rows))
    others = iter(_OTHER_COLORS * len(names))
    return {name: _COLORS.get(name) or next(others) for name in names}


def _spread(values: Sequence[float]) -> list[float]:
    """Those that are far enough apart to be labelled on a logarithmic axis."""
    kept: list[float] = []
    for value in sorted(set(values)):
        if not kept or value / kept[-1] > (max(values) / min(values)) ** (1 / 9):
            kept.append(value)
    return kept


def _cell(row: Row) -> tuple[int, int, int]:
    return int(row["height"]), int(row["width"]), int(row["batch"])


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


if __name__ == "__main__":
    sys.exit(main())
