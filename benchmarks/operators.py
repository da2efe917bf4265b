"""What the two operator benchmarks share: shapes of the network, timing, CSV."""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import threshnet_fast as tf
from threshnet_fast.bench import machine
from threshnet_fast.bench.gpu_engines import graphed
from threshnet_fast.bench.networks import random_model, worst_error
from threshnet_fast.bench.precision import PRECISIONS
from threshnet_fast.bench.report import format_table
from threshnet_fast.bench.results import append_rows, check_writable
from threshnet_fast.bench.timing import CudaTimer, host_timer, interleave
from threshnet_fast.cli.arguments import check_device, device
from threshnet_fast.errors import CommandError
from threshnet_fast.nn import DenseLayer
from threshnet_fast.plan import FusedConv

RESULTS = Path(__file__).resolve().parent / "results" / "ops.csv"

COLUMNS = (
    *("run", "time", "commit", "operator", "layer", "batch", "height", "width", "segments"),
    *("in_channels", "out_channels", "kernel", "stride", "threads", "provider", "version"),
    *("macs", "calls", "min_ms", "p20_ms", "p50_ms", "p80_ms", "gflops", "speedup_min"),
    *("speedup_p50", "error", "processor", "flags", "python", "torch", "dtype", "device"),
    *("accelerator", "driver", "libraries", "clocks"),
)


@dataclass(frozen=True)
class Shape:
    """One convolution of the network.

    Attributes:
        layer: The module it comes from.
        segments: Channels of the tensors that are concatenated.
        out_channels: Channels of the output.
        kernel: Side of the window.
        stride: Its step.
        height: Height of the input.
        width: Width of the input.
        macs: Multiply-adds for the whole batch.
    """

    layer: str
    segments: tuple[int, ...]
    out_channels: int
    kernel: int
    stride: int
    height: int
    width: int
    macs: int


@dataclass(frozen=True)
class Place:
    """Where an operator runs.

    Attributes:
        device: Device of all tensors.
        dtype: Of feature maps and weights; batch normalization has float32 parameters.
        backend: Backend of the fused operator.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """Feature maps and weights, rounded and moved."""
        return [tensor.to(self.device, self.dtype) for tensor in tensors]

    def put_parameters(self, *tensors: Tensor) -> list[Tensor]:
        """Parameters of batch normalization, moved."""
        return [tensor.to(self.device) for tensor in tensors]


Calls = dict[str, Callable[[], Tensor]]
Build = Callable[[Shape, int, Place], tuple[Calls, Tensor]]


def shapes(model_name: str, size: int, batch: int, prologue: bool) -> list[Shape]:
    """The different convolutions of a model with or without a BatchNorm before them.

    Where a block keeps its features side by side, the segments are those that a framework would
    concatenate: the block's input and what each layer has added.
    """
    model = random_model(model_name, classes=10, seed=0)
    plan = tf.plan.lower(model, (batch, 3, size, size))
    found: dict[tuple[object, ...], Shape] = {}
    for step in plan.steps:
        if not isinstance(step, FusedConv) or (step.prologue is not None) != prologue:
            continue
        segments = tuple(segment.channels for segment in step.inputs)
        layer = _dense_layer(model, step.name)
        if layer is not None:
            growth = layer.conv2.out_channels
            first = segments[0] - growth * _layers_before(model, step.name)
            segments = (first, *[growth] * ((segments[0] - first) // growth))
        buffer = plan.buffers[step.inputs[0].buffer]
        key = (segments, step.output.channels, step.kernel, step.stride[0], buffer.height)
        found.setdefault(
            key,
            Shape(
                step.name,
                segments,
                step.output.channels,
                step.kernel[0],
                step.stride[0],
                buffer.height,
                buffer.width,
                step.macs,
            ),
        )
    return list(found.values())


def _dense_layer(model: torch.nn.Module, step_name: str) -> DenseLayer | None:
    name, _, child = step_name.rpartition(".")
    module = model.get_submodule(name)
    return module if isinstance(module, DenseLayer) and child == "conv1" else None


def _layers_before(model: torch.nn.Module, step_name: str) -> int:
    index = int(step_name.split(".")[1])
    base = model.get_submodule("base")
    before = 0
    while index > 0 and isinstance(base.get_submodule(str(index - 1)), DenseLayer):
        index -= 1
        before += 1
    return before


def run(operator: str, description: str, prologue: bool, build: Build) -> int:
    """Parses the command line, measures every shape, prints a table and appends to the CSV file.

    Args:
        operator: Name of the operator.
        description: Shown by ``--help``.
        prologue: Whether the operator is the one with a BatchNorm before the convolution.
        build: Makes, for a shape, a batch size and a place, the calls to compare and the float64
            result. On a GPU, each call is measured in a CUDA graph as well.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(PRECISIONS), help="precisions, on a GPU (default all)"
    )
    parser.add_argument("--model", default="threshnet95")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape")
    parser.add_argument("--limit", type=int, help="only so many shapes, evenly spread")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        place = check_device(device(arguments.device))
    except (CommandError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    gpu = place.type != "cpu"
    if arguments.dtypes and not gpu:
        parser.error("--dtypes belongs to a GPU: add --device cuda")
    dtypes = arguments.dtypes or (list(PRECISIONS) if gpu else ["float32"])
    torch.set_num_threads(arguments.threads)
    chosen = shapes(arguments.model, arguments.size, arguments.batch, prologue)
    if arguments.limit and arguments.limit < len(chosen):
        chosen = [chosen[len(chosen) * i // arguments.limit] for i in range(arguments.limit)]
    common = {
        "run": uuid.uuid4().hex[:12],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "operator": operator,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "processor": machine.processor(),
        "flags": " ".join(machine.instruction_sets()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": place.type,
    }
    if gpu:
        common |= {
            "accelerator": machine.accelerator(place),
            "driver": machine.driver(place),
            "libraries": machine.accelerator_libraries(),
        }
    try:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        check_writable(arguments.csv, COLUMNS)
        for dtype in dtypes:
            precision = PRECISIONS[dtype]
            target = Place(place, precision.dtype, "triton" if gpu else "cpu")
            rows = []
            with (
                torch.cuda.device(place) if gpu else contextlib.nullcontext(),
                precision.active() if gpu else contextlib.nullcontext(),
            ):
                for shape in tqdm(chosen, desc=f"{operator} {dtype}", unit="shape", disable=None):
                    rows += _measure(
                        shape,
                        arguments.batch,
                        arguments.seconds,
                        build,
                        target,
                        precision.error_limit,
                        common | {"dtype": dtype},
                    )
            append_rows(arguments.csv, rows, COLUMNS)
            print(_table(rows))
    except CommandError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(
    shape: Shape,
    batch: int,
    seconds: float,
    build: Build,
    place: Place,
    error_limit: float,
    common: dict[str, object],
) -> list[dict[str, object]]:
    gpu = place.device.type != "cpu"
    with torch.inference_mode():
        calls, reference = build(shape, batch, place)
        if gpu:
            calls |= {f"{name}-graph": graphed(call) for name, call in calls.items()}
        limit = error_limit * float(reference.abs().max())
        errors = {name: worst_error(call(), reference) for name, call in calls.items()}
        for name, error in errors.items():
            if not error <= limit:
                raise CommandError(f"{name} is wrong for {shape}: {error:.3g} > {limit:.3g}")
        timer = CudaTimer(place.device) if gpu else host_timer
        samples = interleave(calls, seconds=seconds, timer=timer)
        clocks = machine.clocks(place.device) if gpu else ""
    rows = []
    peers = [sample for name, sample in samples.items() if not name.startswith("fused")]
    for name, sample in samples.items():
        times = {
            key: sample.milliseconds(fraction)
            for key, fraction in (("min", 0.0), ("p20", 0.2), ("p50", 0.5), ("p80", 0.8))
        }
        best_min, best_p50 = (min(peer.milliseconds(f) for peer in peers) for f in (0.0, 0.5))
        rows.append(
            {
                **common,
                "layer": shape.layer,
                "height": shape.height,
                "width": shape.width,
                "segments": "+".join(map(str, shape.segments)),
                "in_channels": sum(shape.segments),
                "out_channels": shape.out_channels,
                "kernel": shape.kernel,
                "stride": shape.stride,
                "provider": name,
                "version": tf.__version__ if name.startswith("fused") else torch.__version__,
                "macs": shape.macs,
                "calls": len(sample.nanoseconds),
                **{f"{key}_ms": f"{value:.4f}" for key, value in times.items()},
                "gflops": f"{2e-6 * shape.macs / times['min']:.2f}",
                "speedup_min": f"{best_min / times['min']:.4f}",
                "speedup_p50": f"{best_p50 / times['p50']:.4f}",
                "error": f"{errors[name]:.4g}",
                "clocks": clocks,
            }
        )
    return rows


def _table(rows: list[dict[str, object]]) -> str:
    names = list(dict.fromkeys(str(row["provider"]) for row in rows))
    # In graphs all are free of the time that the host takes, where there are graphs.
    ours = "fused-graph" if "fused-graph" in names else "fused"
    header = ["layer", "window", "in", "out", "map", *(f"{name} ms" for name in names), "speed-up"]
    by_layer: dict[str, dict[str, dict[str, object]]] = {}
    for row in rows:
        by_layer.setdefault(str(row["layer"]), {})[str(row["provider"])] = row
    lines = []
    for layer, group in by_layer.items():
        row = group[ours]
        parts = str(row["segments"]).count("+") + 1
        lines.append(
            [
                layer,
                f"{row['kernel']}x{row['kernel']}/{row['stride']}",
                f"{row['in_channels']} in {parts}",
                str(row["out_channels"]),
                f"{row['height']}x{row['width']}",
                *(str(group[name]["min_ms"]) for name in names),
                f"{float(str(row['speedup_min'])):.2f}",
            ]
        )
    return format_table(header, lines, left=2)
