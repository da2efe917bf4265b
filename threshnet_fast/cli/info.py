"""``threshnet-fast info``: what a network costs, layer by layer."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from ..plan import Plan, lower
from ..plan.ir import Step
from .arguments import check_model, image_size, positive_integer
from .errors import CommandError
from .providers import random_model
from .report import format_table

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "layers, parameters, multiply-adds and bytes moved of a network"

DESCRIPTION = """\
Lists the fused steps of a network for one input. "unfused" are the bytes of features and weights
that separate passes for concatenation, BatchNorm, ReLU and convolution would move, "fused" those
that one pass moves, each read or written once. Parameters are those of the step with BatchNorm
folded in; the total of the model itself follows below the table."""

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


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    check_model(arguments.model)
    model = random_model(arguments.model, arguments.classes, seed=0)
    height, width = arguments.size
    least = getattr(model, "min_size", 1)
    if min(height, width) < least:
        raise CommandError(
            f"size {height}x{width} is too small for {arguments.model}: expected {least} or more", 2
        )
    plan = lower(model, (arguments.batch, 3, height, width))
    if arguments.csv is not None:
        _write_csv(plan, arguments.csv)
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
            f"{plan.valid_macs / 1e9:.3f} G of them not on padding",
            f"bytes moved, unfused  {unfused / 1e6:.1f} MB",
            f"bytes moved, fused    {fused / 1e6:.1f} MB, {unfused / fused:.2f} times fewer",
        ]
    )


def _unfused(plan: Plan) -> int:
    return sum(step.bytes_unfused for step in plan.steps)


def _fused(plan: Plan) -> int:
    return sum(step.bytes_fused for step in plan.steps)


def _write_csv(plan: Plan, path: str) -> None:
    rows = [_COLUMNS, *(_row(plan, step) for step in plan.steps)]
    if path == "-":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"Written: {path}")
