"""The roofline plot of a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..plan import FusedConv
from ..plan.prediction import PRECISIONS, Device, Execution, Prediction, StepPrediction
from .errors import CommandError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_roofline"]

_FUSED = "#c44e52"
_UNFUSED = "#8c9bb0"
_ROOF = "#333333"
_TERA = 1e12


def draw_roofline(prediction: Prediction, name: str, path: Path) -> None:
    """Draws the device's roofs, and every convolution as a point, fused and unfused.

    A point's height is the step's operations, as usually counted, over the predicted time of its
    kernels on the device; its place along the axis is the same operations over the bytes of
    features and weights that the kernels must move.

    Args:
        prediction: What to draw.
        name: Of the model, for the title.
        path: Image to write; the suffix chooses the format.

    Raises:
        CommandError: There is nothing to draw, or the file cannot be written.
    """
    steps = [step for step in prediction.steps if isinstance(step.step, FusedConv)]
    if not steps:
        raise CommandError(f"nothing to draw in {path}: the plan has no convolution")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.4, 6.0), layout="constrained")
    fused = [_point(step, step.fused) for step in steps]
    unfused = [_point(step, step.unfused) for step in steps]
    intensities, speeds = zip(*fused, *unfused, strict=True)
    device = prediction.device
    peak = device.peak_flops(prediction.precision)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(0.5 * min(intensities), 1.5 * max(*intensities, peak / device.memory_bandwidth)),
        ylim=(0.6 * min(speeds), 2.5 * max(map(device.peak_flops, PRECISIONS)) / _TERA),
    )
    _draw_roofs(axis, device, peak)
    for before, after in zip(unfused, fused, strict=True):
        axis.plot(*zip(before, after, strict=True), color="#d8d8d8", linewidth=0.5, zorder=1)
    windows = [_window(step) for step in steps]
    for window, marker in zip(sorted(set(windows)), "os^vD", strict=False):
        for points, color, label in ((unfused, _UNFUSED, "unfused"), (fused, _FUSED, "fused")):
            chosen = [i for i, other in enumerate(windows) if other == window]
            axis.scatter(
                [points[i][0] for i in chosen],
                [points[i][1] for i in chosen],
                s=26,
                marker=marker,
                color=color,
                edgecolors="white",
                linewidths=0.5,
                zorder=3,
                label=f"convolution {window}, {label}",
            )
    axis.set_xlabel("FLOP per byte of features and weights", fontsize=9)
    axis.set_ylabel("predicted TFLOP/s", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    batch, _, height, width = prediction.input_shape
    figure.suptitle(
        f"{name}, {height}x{width}, batch {batch}, {prediction.precision}: {device.title}",
        fontsize=11,
    )
    axis.set_title(
        "Prediction, not a measurement. A call, each in one graph: "
        f"{1e6 * prediction.unfused_graph_seconds:,.0f} us unfused, "
        f"{1e6 * prediction.fused_graph_seconds:,.0f} us fused",
        fontsize=9,
        color=_FUSED,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot write {path}: {reason}") from error
    finally:
        pyplot.close(figure)


def _point(step: StepPrediction, execution: Execution) -> tuple[float, float]:
    return step.flops / execution.bytes, step.flops / execution.seconds / _TERA


def _window(step: StepPrediction) -> str:
    assert isinstance(step.step, FusedConv)
    return "x".join(map(str, step.step.kernel))


def _draw_roofs(axis: Axes, device: Device, chosen: float) -> None:
    left, right = axis.get_xlim()
    peaks: dict[float, list[str]] = {}
    for precision in PRECISIONS:
        peaks.setdefault(device.peak_flops(precision), []).append(precision)
    for peak, names in peaks.items():
        color = _ROOF if peak == chosen else "#999999"
        axis.axhline(peak / _TERA, color=color, linewidth=0.7, zorder=2)
        axis.annotate(
            f"{', '.join(names)}: {peak / _TERA:g} TFLOP/s",
            (left, peak / _TERA),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )
    ridge = chosen / device.memory_bandwidth
    axis.plot(
        [left, ridge, right],
        [left * device.memory_bandwidth / _TERA, chosen / _TERA, chosen / _TERA],
        color=_ROOF,
        linewidth=1.6,
        zorder=2,
        label=f"device memory, {device.memory_bandwidth / _TERA:.3g} TB/s",
    )
    axis.plot(
        [left, chosen / device.cache_bandwidth],
        [left * device.cache_bandwidth / _TERA, chosen / _TERA],
        color=_ROOF,
        linewidth=1.0,
        linestyle="--",
        zorder=2,
        label=f"shared cache, {device.cache_bandwidth / _TERA:.3g} TB/s (assumed)",
    )
