"""``threshnet-fast info``: what a network costs, layer by layer."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..bench import plan_report, prediction_report
from ..bench.gpus import DEVICES, Device, find_device, find_precision
from ..bench.latency import check_sizes
from ..bench.networks import random_model
from ..bench.prediction import Prediction, predict
from ..bench.report import check_plot
from ..bench.roofline import draw_roofline
from ..errors import CommandError
from ..graph.onnx import load_onnx
from ..plan import lower
from ..runtime.explain import explain
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

_LIST = "list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        default="threshnet95",
        help="model (default %(default)s), or an .onnx file: then which parts of it run fused "
        "here, and why others do not",
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
        print(prediction_report.device_table())
        return 0
    if arguments.device is None and (arguments.dtype or arguments.picture):
        option = "--dtype" if arguments.dtype else "--picture"
        raise CommandError(f"{option} belongs to a prediction: add --device", 2)
    if arguments.picture is not None:
        check_plot(arguments.picture)
    if arguments.model.endswith(".onnx"):
        return _explain_file(arguments)
    check_model(arguments.model)
    height, width = arguments.size
    check_sizes([arguments.model], [(height, width, arguments.batch)])
    model = random_model(arguments.model, arguments.classes, seed=0)
    plan = lower(model, (arguments.batch, 3, height, width))
    if arguments.device is not None:
        _run_prediction(predict(plan, arguments.device, arguments.dtype or "float32"), arguments)
        return 0
    if arguments.csv is not None:
        rows = [plan_report.row(plan, step) for step in plan.steps]
        _write_csv([plan_report.COLUMNS, *rows], arguments.csv)
        return 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.model}, 3x{height}x{width}, batch {arguments.batch}, float32\n")
    print(plan_report.table(plan), end="\n\n")
    print(plan_report.totals(plan, parameters))
    return 0


def _explain_file(arguments: argparse.Namespace) -> int:
    if arguments.device is not None or arguments.csv is not None:
        raise CommandError("--device and --csv are for models, not for .onnx files", 2)
    try:
        module = load_onnx(arguments.model)
        channels = next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
        print(explain(module, torch.zeros(arguments.batch, channels, *arguments.size)))
    except StopIteration:
        raise CommandError(f"{arguments.model} has no convolution") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CommandError(f"{arguments.model}: {error}") from error
    return 0


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


def _run_prediction(prediction: Prediction, arguments: argparse.Namespace) -> None:
    if arguments.csv is not None:
        rows = [prediction_report.row(prediction, step) for step in prediction.steps]
        _write_csv([prediction_report.COLUMNS, *rows], arguments.csv)
    else:
        height, width = arguments.size
        device = prediction.device
        print(
            f"Prediction, not a measurement: {arguments.model}, 3x{height}x{width}, "
            f"batch {arguments.batch}, {prediction.precision} on {device.title} "
            f"({device.architecture})\n"
        )
        print(prediction_report.table(prediction), end="\n\n")
        print(prediction_report.totals(prediction))
    if arguments.picture is not None:
        draw_roofline(prediction, arguments.model, arguments.picture)
        if arguments.csv != "-":
            print(f"Written: {arguments.picture}")
