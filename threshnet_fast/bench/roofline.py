"""Roofline plots: of a prediction on a GPU, and of a profile on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from ..plan import FusedConv
from .gpus import PRECISIONS, Device
from .prediction import Execution, Prediction, StepPrediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MeasuredPoint", "MeasuredRoofline", "draw_measured_rooflines", "draw_roofline"]

_FUSED = "#c44e52"
_UNFUSED = "#8c9bb0"
_ROOF = "#333333"
_TERA = 1e12
_GIGA = 1e9
_KINDS = {"1x1": "#4c72b0", "3x3": "#c44e52", "stem": "#55a868", "head": "#8172b3"}
_OTHER_KIND = "#937860"


@dataclass(frozen=True)
class MeasuredPoint:
    """A step that was measured.

    Attributes:
        kind: What its color tells.
        algorithm: What its shape tells.
        intensity: Operations a byte, as direct convolution counts them.
        flops: Operations a second, counted in the same way.
        executed_flops: Operations a second that its algorithm really does.
        share: Its part of the time of all steps, which its size tells.
    """

    kind: str
    algorithm: str
    intensity: float
    flops: float
    executed_flops: float
    share: float


@dataclass(frozen=True)
class MeasuredRoofline:
    """The steps of one network on one input, and the roofs over them.

    Attributes:
        title: What was measured.
        peak: Operations a second of all threads.
        peak_one_thread: The same of one thread.
        bandwidth: Bytes a second from memory, of all threads.
        points: The steps, those without arithmetic left out.
    """

    title: str
    peak: float
    peak_one_thread: float
    bandwidth: float
    points: tuple[MeasuredPoint, ...]


def draw_measured_rooflines(panels: Sequence[MeasuredRoofline], path: Path) -> None:
    """Draws measured steps under measured roofs, one panel for each network and input.

    Args:
        panels: What to draw.
        path: Image to write; the suffix chooses the format.

    Raises:
        CommandError: There is nothing to draw, or the file cannot be written.
    """
    panels = [panel for panel in panels if panel.points]
    if not panels:
        raise CommandError(f"nothing to draw in {path}: no step has any arithmetic")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(7.2 * columns, 5.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_measured(axis, panel)
    _save(figure, path)


def _draw_measured(axis: Axes, panel: MeasuredRoofline) -> None:
    intensities = [point.intensity for point in panel.points]
    speeds = [speed for p in panel.points for speed in (p.flops, p.executed_flops)]
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(0.5 * min(intensities), 2 * max(*intensities, panel.peak / panel.bandwidth)),
        ylim=(0.6 * min(speeds) / _GIGA, 2 * max(*speeds, panel.peak) / _GIGA),
    )
    left, right = axis.get_xlim()
    ridge = panel.peak / panel.bandwidth
    axis.plot(
        [left, ridge, right],
        [left * panel.bandwidth / _GIGA, panel.peak / _GIGA, panel.peak / _GIGA],
        color=_ROOF,
        linewidth=1.6,
        zorder=2,
        label=f"FMA loop {panel.peak / _GIGA:.0f} GFLOP/s, memory {panel.bandwidth / _GIGA:.0f} "
        "GB/s",
    )
    if panel.peak_one_thread < panel.peak:
        axis.axhline(
            panel.peak_one_thread / _GIGA,
            color=_ROOF,
            linewidth=0.7,
            linestyle="--",
            zorder=2,
            label=f"one thread {panel.peak_one_thread / _GIGA:.0f} GFLOP/s",
        )
    algorithms = list(dict.fromkeys(point.algorithm for point in panel.points))
    markers = dict(zip(algorithms, "os^vDP", strict=False))
    for kind, algorithm in dict.fromkeys((p.kind, p.algorithm) for p in panel.points):
        chosen = [p for p in panel.points if (p.kind, p.algorithm) == (kind, algorithm)]
        color = _KINDS.get(kind, _OTHER_KIND)
        for point in chosen:
            speeds = [point.executed_flops / _GIGA, point.flops / _GIGA]
            axis.plot([point.intensity] * 2, speeds, color="#d8d8d8", linewidth=0.5, zorder=1)
        sizes = [16 + 1500 * point.share for point in chosen]
        marker = markers.get(algorithm, "X")
        axis.scatter(
            [point.intensity for point in chosen],
            [point.executed_flops / _GIGA for point in chosen],
            s=sizes,
            marker=marker,
            facecolors="none",
            edgecolors=color,
            linewidths=0.5,
            alpha=0.6,
            zorder=3,
        )
        axis.scatter(
            [point.intensity for point in chosen],
            [point.flops / _GIGA for point in chosen],
            s=sizes,
            marker=marker,
            color=color,
            edgecolors="white",
            linewidths=0.5,
            zorder=4,
            label=f"{kind}, {algorithm}",
        )
    axis.set_xlabel("FLOP per byte of features and weights", fontsize=9)
    axis.set_ylabel("GFLOP/s, hollow: of the multiplications done", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(panel.title, fontsize=9)
    legend = axis.legend(loc="lower right", fontsize=7, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([26])


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot write {path}: {reason}") from error
    finally:
        pyplot.close(figure)


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
    _save(figure, path)


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
