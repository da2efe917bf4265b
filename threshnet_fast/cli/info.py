"""``threshnet-fast info``: what a network costs, layer by layer."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from ..bench.networks import random_model
from ..bench.prediction import (
    DEVICES,
    Device,
    Prediction,
    StepPrediction,
    find_device,
    find_precision,
    predict,
)
from ..bench.report import check_plot, format_table
from ..bench.roofline import draw_roofline
from ..errors import CommandError
from ..plan import Plan, lower
from ..plan.ir import Step
from .arguments import check_model, image_size, positive_integer

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "layers, multiply-adds and bytes moved of a network; predicted times on GPUs"

DESCRIPTION = """\
Lists the fused steps of a network for one input. "unfused" are the bytes of features and weights
that separate passes for concatenation, BatchNorm, ReLU and convolution would move, "fused" those
that one pass moves, each read or written once. Parameters are those of the step with BatchNorm
folded in; the total of the model itself follows below the table. "needed" are the multiply-adds
off the padding, after the average pooling of a transition rather than before it.

With --device it predicts, by formulas, launches and times on a GPU that need not be there, fused
against unfused; docs/prediction.md has the formulas. No number of it is a measurement."""

_COLUMNS = (
    "name",
    "operation",
    "output_channels",
    "output_height",
    "output_width",
    "parameters",
    "macs",
    "bytes_unfused",
    "bytes_fused",
)

_PREDICTION_COLUMNS = (
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

_LIST = "list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model", nargs="?", default="threshnet95", help="model (default %(default)s)"
    )
    parser.add_argument(
        "--size", type=image_size, default=(224, 224), help="224 or 160x288 (default 224)"
    )
    parser.add_argument(
        "--batch", type=positive_integer, default=1, metavar="N", help="images (default 1)"
    )
    parser.add_argument(
        "--classes", type=positive_integer, default=10, metavar="N", help="classes (default 10)"
    )
    parser.add_argument(
        "--csv", metavar="PATH", help="write the table as CSV instead; - for standard output"
    )
    parser.add_argument(
        "--device",
        type=_device,
        metavar="NAME",
        help="predict times on " + ", ".join(device.name for device in DEVICES) + "; list shows "
        "what is known of them",
    )
    parser.add_argument(
        "--dtype",
        type=_precision,
        metavar="NAME",
        help="float32 (IEEE, the default), tf32, float16 or bfloat16; with --device",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="PATH",
        help="draw the prediction over the device's roofline, .png, .svg or .pdf; with --device",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    if arguments.device == _LIST:
        print(_device_table())
        return 0
    if arguments.device is None and (arguments.dtype or arguments.picture):
        option = "--dtype" if arguments.dtype else "--picture"
        raise CommandError(f"{option} belongs to a prediction: add --device", 2)
    if arguments.picture is not None:
        check_plot(arguments.picture)
    check_model(arguments.model)
    model = random_model(arguments.model, arguments.classes, seed=0)
    height, width = arguments.size
    least = getattr(model, "min_size", 1)
    if min(height, width) < least:
        raise CommandError(
            f"size {height}x{width} is too small for {arguments.model}: expected {least} or more", 2
        )
    plan = lower(model, (arguments.batch, 3, height, width))
    if arguments.device is not None:
        _run_prediction(predict(plan, arguments.device, arguments.dtype or "float32"), arguments)
        return 0
    if arguments.csv is not None:
        _write_csv([_COLUMNS, *(_row(plan, step) for step in plan.steps)], arguments.csv)
        return 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.model}, 3x{height}x{width}, batch {arguments.batch}, float32\n")
    print(_table(plan), end="\n\n")
    print(_totals(plan, parameters))
    return 0


def _row(plan: Plan, step: Step) -> list[str | int]:
    buffer = plan.buffers[step.output.buffer]
    return [
        step.name,
        step.describe(),
        step.output.channels,
        buffer.height,
        buffer.width,
        step.parameters,
        step.macs,
        step.bytes_unfused,
        step.bytes_fused,
    ]


def _table(plan: Plan) -> str:
    header = ["layer", "operation", "output", "parameters", "MMACs", "unfused MB", "fused MB"]
    lines = []
    for step in plan.steps:
        name, operation, channels, height, width, parameters, macs, unfused, fused = _row(
            plan, step
        )
        lines.append(
            [
                str(name),
                str(operation),
                f"{channels}x{height}x{width}",
                f"{parameters:,}",
                f"{int(macs) / 1e6:,.2f}",
                f"{int(unfused) / 1e6:,.2f}",
                f"{int(fused) / 1e6:,.2f}",
            ]
        )
    lines.append(
        [
            "total",
            f"{len(plan.steps)} steps",
            "",
            f"{plan.parameters:,}",
            f"{plan.macs / 1e6:,.2f}",
            f"{_unfused(plan) / 1e6:,.2f}",
            f"{_fused(plan) / 1e6:,.2f}",
        ]
    )
    return format_table(header, lines, left=2)


def _totals(plan: Plan, parameters: int) -> str:
    unfused, fused = _unfused(plan), _fused(plan)
    images = "an image" if plan.input_shape[0] == 1 else f"a batch of {plan.input_shape[0]}"
    return "\n".join(
        [
            f"parameters            {parameters:,} ({plan.parameters:,} with BatchNorm folded in)",
            f"multiply-adds         {plan.macs / 1e9:.3f} G {images}, "
            f"{plan.valid_macs / 1e9:.3f} G of them needed",
            f"bytes moved, unfused  {unfused / 1e6:.1f} MB",
            f"bytes moved, fused    {fused / 1e6:.1f} MB, {unfused / fused:.2f} times fewer",
        ]
    )


def _unfused(plan: Plan) -> int:
    return sum(step.bytes_unfused for step in plan.steps)


def _fused(plan: Plan) -> int:
    return sum(step.bytes_fused for step in plan.steps)


def _write_csv(rows: Sequence[Sequence[str | int]], path: str) -> None:
    if path == "-":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"Written: {path}")


def _device(name: str) -> Device | str:
    if name.lower() == _LIST:
        return _LIST
    try:
        return find_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _precision(name: str) -> str:
    try:
        return find_precision(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device_table() -> str:
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


def _run_prediction(prediction: Prediction, arguments: argparse.Namespace) -> None:
    if arguments.csv is not None:
        rows = [_prediction_row(prediction, step) for step in prediction.steps]
        _write_csv([_PREDICTION_COLUMNS, *rows], arguments.csv)
    else:
        height, width = arguments.size
        device = prediction.device
        print(
            f"Prediction, not a measurement: {arguments.model}, 3x{height}x{width}, "
            f"batch {arguments.batch}, {prediction.precision} on {device.title} "
            f"({device.architecture})\n"
        )
        print(_prediction_table(prediction), end="\n\n")
        print(_prediction_totals(prediction))
    if arguments.picture is not None:
        draw_roofline(prediction, arguments.model, arguments.picture)
        if arguments.csv != "-":
            print(f"Written: {arguments.picture}")


def _prediction_row(prediction: Prediction, step: StepPrediction) -> list[str | int]:
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


def _prediction_table(prediction: Prediction) -> str:
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


def _prediction_totals(prediction: Prediction) -> str:
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
