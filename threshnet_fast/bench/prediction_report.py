"""A prediction, and what it is made from, as tables. No number of them is a measurement."""

from __future__ import annotations

from .gpus import DEVICES
from .prediction import Prediction, StepPrediction
from .report import format_table

__all__ = ["COLUMNS", "device_table", "row", "table", "totals"]

COLUMNS = (
    "name",
    "operation",
    "output_channels",
    "output_height",
    "output_width",
    "device",
    "dtype",
    "flops",
    "executed_flops_unfused",
    "executed_flops_fused",
    "bytes_unfused",
    "bytes_fused",
    "launches_unfused",
    "launches_fused",
    "bound_unfused",
    "bound_fused",
    "tile_unfused",
    "tile_fused",
    "predicted_unfused_eager_us",
    "predicted_unfused_graph_us",
    "predicted_fused_eager_us",
    "predicted_fused_graph_us",
)
"""Columns of a step, in the order of :func:`row`."""


def device_table() -> str:
    """What is known of every device."""
    header = ["device", "product", "compiled for", "processors", "memory GB/s", "cache MB"]
    header += ["cache GB/s (assumed)", "TFLOP/s: float32", "tf32", "float16", "bfloat16"]
    lines = [
        [
            device.name,
            device.title,
            device.architecture,
            str(device.multiprocessors),
            f"{device.memory_bandwidth / 1e9:,.0f}",
            f"{device.cache_bytes / 2**20:,.0f}",
            f"{device.cache_bandwidth / 1e9:,.0f}",
            f"{device.float32_flops / 1e12:,.1f}",
            f"{device.tf32_flops / 1e12:,.1f}",
            f"{device.float16_flops / 1e12:,.1f}",
            f"{device.bfloat16_flops / 1e12:,.1f}",
        ]
        for device in DEVICES
    ]
    return format_table(header, lines, left=3)


def row(prediction: Prediction, step: StepPrediction) -> list[str | int]:
    """The numbers of a step, as :data:`COLUMNS` names them."""
    return [
        step.step.name,
        step.step.describe(),
        *step.output_shape,
        prediction.device.name,
        prediction.precision,
        step.flops,
        step.unfused.flops,
        step.fused.flops,
        step.unfused.bytes,
        step.fused.bytes,
        step.unfused.launches,
        step.fused.launches,
        step.unfused.bound,
        step.fused.bound,
        step.unfused.tile,
        step.fused.tile,
        f"{1e6 * step.unfused_eager_seconds:.4f}",
        f"{1e6 * step.unfused_graph_seconds:.4f}",
        f"{1e6 * step.fused_eager_seconds:.4f}",
        f"{1e6 * step.fused_graph_seconds:.4f}",
    ]


def table(prediction: Prediction) -> str:
    """A line for every step, fused against unfused, and their total."""
    header = ["layer", "operation", "output", "MFLOP", "unfused MB", "fused MB", "launches"]
    header += ["bound by", "unfused eager us", "unfused graph us", "fused graph us"]
    lines = [
        [
            step.step.name,
            step.step.describe(),
            "x".join(map(str, step.output_shape)),
            f"{step.flops / 1e6:,.2f}",
            f"{step.unfused.bytes / 1e6:,.2f}",
            f"{step.fused.bytes / 1e6:,.2f}",
            f"{step.unfused.launches} > {step.fused.launches}",
            f"{step.unfused.bound} > {step.fused.bound}",
            f"{1e6 * step.unfused_eager_seconds:,.2f}",
            f"{1e6 * step.unfused_graph_seconds:,.2f}",
            f"{1e6 * step.fused_graph_seconds:,.2f}",
        ]
        for step in prediction.steps
    ]
    lines.append(
        [
            "total",
            f"{len(prediction.steps)} steps",
            "",
            f"{prediction.flops / 1e6:,.2f}",
            f"{prediction.unfused_bytes / 1e6:,.2f}",
            f"{prediction.fused_bytes / 1e6:,.2f}",
            f"{prediction.unfused_launches} > {prediction.fused_launches}",
            "",
            f"{1e6 * prediction.unfused_eager_seconds:,.2f}",
            f"{1e6 * prediction.unfused_graph_seconds:,.2f}",
            f"{1e6 * prediction.fused_graph_seconds:,.2f}",
        ]
    )
    return format_table(header, lines, left=3)


def totals(prediction: Prediction) -> str:
    """Time and kernels of a call, eager and in a graph, fused against unfused."""
    unfused = prediction.unfused_eager_seconds, prediction.unfused_graph_seconds
    fused = prediction.fused_eager_seconds, prediction.fused_graph_seconds
    kernels = prediction.unfused_launches, prediction.fused_launches

    def microseconds(seconds: float) -> str:
        return f"{1e6 * seconds:,.0f} us"

    header = ["predicted time of a call", "kernels", "eager", "in one graph", "by the graph"]
    lines = [
        [
            name,
            f"{count:,}",
            *map(microseconds, times),
            f"{times[0] / times[1]:.2f}x",
        ]
        for name, count, times in (("unfused", kernels[0], unfused), ("fused", kernels[1], fused))
    ]
    lines.append(
        [
            "by fusing",
            f"{kernels[0] / kernels[1]:.2f}x",
            *(f"{before / after:.2f}x" for before, after in zip(unfused, fused, strict=True)),
            f"{unfused[0] / fused[1]:.2f}x both",
        ]
    )
    return "\n".join(
        [
            format_table(header, lines),
            "",
            "All times are predictions at the vendor's peak figures: docs/prediction.md says what "
            "they leave out.",
        ]
    )
