"""Pictures of a run: curves of loss and accuracy, and the confusion matrix."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["draw_confusion", "draw_curves", "write_confusion"]

# More cells than that have no number written into them, more classes no name at their axis.
_NUMBERED = 20
_NAMED = 50
_DOTS_PER_INCH = 120


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no window is wanted, and no display needed.
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss and error against the epoch.

    Args:
        path: The PNG file.
        rows: Rows of the log.
    """
    figure, (left, right) = _axes(10, 4, columns=2)
    for split, style in (("train", "--"), ("test", "-")):
        seen = [row for row in rows if row[f"{split}_loss"] is not None]
        epochs = [row["epoch"] for row in seen]
        left.plot(epochs, [row[f"{split}_loss"] for row in seen], style, label=split, marker=".")
        errors = [100 * (1 - row[f"{split}_accuracy"]) for row in seen]
        right.plot(epochs, errors, style, label=split, marker=".")
    for axes, title in ((left, "loss"), (right, "error, %")):
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Draws a confusion matrix, each row as shares of its class; blank where it has no images.

    Args:
        path: The PNG file.
        confusion: ``confusion[i, j]`` images of class i were taken for class j.
        classes: Their names.
    """
    count = len(classes)
    shares = (confusion / confusion.sum(1, keepdim=True)).numpy()
    side = min(16.0, 3 + 0.5 * count)
    figure, axes = _axes(side + 1, side)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true class")
    if count <= _NAMED:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= _NUMBERED:
        for row in range(count):
            for column in range(count):
                number = int(confusion[row, column])
                if number:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, number, ha="center", va="center", color=colour, size=7)
    figure.savefig(path)


def write_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Writes a confusion matrix as CSV: a row for each true class."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["true class", *classes])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])
