"""The paper's table: ThreshNet, DenseNet and HarDNet by cost, speed and test error.

    python benchmarks/paper.py measure               # cost and times, a quarter of an hour
    python benchmarks/paper.py train --data DIR      # equal epochs on equal data, takes long
    python benchmarks/paper.py errors RUN [RUN ...]  # takes test errors from runs of training
    python benchmarks/table.py                       # writes docs/paper.md

``measure`` times all networks in turns, each with the fused engine and with plain PyTorch in both
memory layouts: inference, and whole steps of a training. Everything is checked against float64
before. ``train`` runs ``threshnet-fast train`` for each network and then does what ``errors`` does.
Rows are appended to benchmarks/results/paper.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from threshnet_fast.bench.comparison import (
    checked,
    checked_step,
    common_columns,
    output_scale,
    reference_results,
    time_in_turns,
)
from threshnet_fast.bench.cpu_engines import ERROR_LIMIT, PROVIDERS
from threshnet_fast.bench.job import Job
from threshnet_fast.bench.networks import random_model, reference_output
from threshnet_fast.bench.report import disturbance, milliseconds
from threshnet_fast.bench.results import append_rows, check_writable, read_rows
from threshnet_fast.cli.arguments import positive_float, positive_integer
from threshnet_fast.errors import CommandError
from threshnet_fast.models import create_model

RESULTS = Path(__file__).resolve().parent / "results" / "paper.csv"

COLUMNS = {
    "run": "identifier of the run that the row is part of",
    "time": "start of the run, UTC, ISO 8601",
    "commit": "commit of the source tree, + where it was edited; empty outside of one",
    "kind": "cost, inference, training (a whole step) or error",
    "model": "name of the model",
    "classes": "outputs of the classifier",
    "parameters": "trainable parameters",
    "macs": "multiply-adds of convolutions and classifier for one image",
    "activation_bytes": "outputs of convolutions and classifier for one image, in float32",
    "height": "height of the input",
    "width": "width of the input",
    "batch": "images of the input",
    "threads": "threads of every provider",
    "provider": "fused, eager or channels-last",
    "version": "version of the provider",
    "status": "ok, or why there are no times",
    "calls": "timed calls",
    "min_ms": "fastest call, milliseconds",
    "p20_ms": "20th percentile",
    "p50_ms": "median",
    "p80_ms": "80th percentile",
    "error": "largest difference of the output from the float64 reference",
    "error_limit": "the largest that would have passed",
    "gradient_error": "largest relative error of a gradient or a running statistic, in the norm",
    "gradient_limit": "the largest that would have passed",
    "other_load": "processors that other processes kept busy during the timing",
    "data": "data set of a training",
    "recipe": "how it was trained, as JSON",
    "train_images": "training images",
    "epochs": "how often each was seen",
    "seed": "of weights, order and augmentation",
    "test_error": "share of wrong answers on the test images after the last epoch",
    "train_seconds": "time that the steps took",
    "processor": "processor",
    "processors": "processors that the process could use",
    "flags": "instruction sets of the processor",
    "python": "version of Python",
    "torch": "version of torch",
    "platform": "operating system",
}
"""Columns of the file, in order, and what they hold."""

THRESHNETS = ("threshnet79", "threshnet95")
DENSENETS = ("densenet121", "densenet_bc_100")
HARDNETS = ("hardnet68", "hardnet85")
MODELS = (*THRESHNETS, *DENSENETS, *HARDNETS)
TITLES = {
    "threshnet79": "ThreshNet79",
    "threshnet95": "ThreshNet95",
    "densenet121": "DenseNet-121",
    "densenet_bc_100": "DenseNet-BC-100",
    "hardnet68": "HarDNet-68",
    "hardnet85": "HarDNet-85",
}
SMALL_ONLY = ("densenet_bc_100",)
"""Networks for images of 32x32 alone: without downsampling at their beginning, 49 times the work at
224x224."""

Cell = tuple[int, int]
INFERENCE: tuple[Cell, ...] = ((224, 1), (32, 32))
TRAINING: Cell = (32, 100)
COST_SIZE = 224
CLASSES = 10
SEED = 0
SECONDS = 60.0
ENGINES = ("fused", "eager", "channels-last")
PLAIN = ("eager", "channels-last")

Rows = Sequence[Mapping[str, str]]


def main() -> int:
    """Runs a command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="cost and times")
    measuring.add_argument("--seconds", type=positive_float, default=SECONDS, help="for each input")
    measuring.add_argument("--rounds", type=positive_integer, help="instead: rounds of all engines")
    measuring.add_argument(
        "--quick", action="store_true", help="small inputs, to see that it works"
    )
    training = commands.add_parser("train", help="equal epochs on equal data")
    training.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    training.add_argument("--epochs", type=positive_integer, default=10)
    training.add_argument("--output", type=Path, required=True, help="folder of the runs")
    training.add_argument(
        "options", nargs="*", help="after --, options for threshnet-fast train, the same for all"
    )
    reading = commands.add_parser("errors", help="test errors of runs of training")
    reading.add_argument("folders", nargs="+", type=Path)
    for command in (measuring, training):
        command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
        command.add_argument("--threads", type=positive_integer, default=2)
    for command in (measuring, training, reading):
        command.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        check_writable(arguments.csv, tuple(COLUMNS))
        common = common_columns("random", torch.device("cpu"))
        if arguments.command == "measure":
            rows = measure(arguments, common)
        elif arguments.command == "train":
            rows = errors(train(arguments), common)
        else:
            rows = errors(arguments.folders, common)
        append_rows(arguments.csv, rows, tuple(COLUMNS))
    except CommandError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.csv}")
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed:
        print(f"{row['model']}, {row['kind']}, {row['provider']}: {row['status']}", file=sys.stderr)
    return int(bool(failed))


def measure(arguments: argparse.Namespace, common: Mapping[str, object]) -> list[dict[str, object]]:
    """Returns a row for the cost of each network, and for each that is timed."""
    cost_size, inference, training = COST_SIZE, INFERENCE, TRAINING
    if arguments.quick:
        cost_size, inference, training = 32, ((32, 2),), (32, 4)
        arguments.rounds = 3
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    for name in arguments.models:
        size = 32 if name in SMALL_ONLY else cost_size
        counted = cost(name, size)
        rows.append(
            {
                "kind": "cost",
                "model": name,
                "height": size,
                "width": size,
                "parameters": counted.parameters,
                "macs": counted.macs,
                "activation_bytes": counted.activation_bytes,
                "status": "ok",
            }
        )
    for kind, cells in (("inference", inference), ("training", (training,))):
        for cell in cells:
            rows += times(kind, cell, arguments)
    columns = {name: common[name] for name in COLUMNS if name in common}
    return [
        {key: row.get(key, columns.get(key, "")) for key in COLUMNS}
        | {"classes": CLASSES, "seed": SEED}
        for row in rows
    ]


def times(kind: str, cell: Cell, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Checks all networks and engines on one input and times them in turns."""
    size, batch = cell
    title = f"{kind} {size}x{size} batch {batch}"
    names = [name for name in arguments.models if size <= 32 or name not in SMALL_ONLY]
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, 3, size, size, generator=generator)
    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name in tqdm(names, desc=f"{title} check", unit="network", disable=None):
        job = Job(random_model(name, CLASSES, SEED), x, arguments.threads)
        for engine, found, call in checked_engines(kind, job):
            key = f"{name} {engine}"
            rows[key] = {
                "kind": kind,
                "model": name,
                "height": size,
                "width": size,
                "batch": batch,
                "threads": arguments.threads,
                "provider": engine,
                "version": PROVIDERS[engine].version(),
                # What the columns of time are filled in by.
                "device": "cpu",
                "dtype": "float32",
                **found,
            }
            if call is not None:
                calls[key] = call
    time_in_turns(
        calls,
        rows,
        0,
        title=title,
        threads=arguments.threads,
        seconds=None if arguments.rounds else arguments.seconds,
        rounds=arguments.rounds,
    )
    return list(rows.values())


def checked_engines(
    kind: str, job: Job
) -> list[tuple[str, dict[str, object], Callable[[], object] | None]]:
    """For each engine its name, what the check found, and the call to time where it passed."""
    results: list[tuple[str, dict[str, object], Callable[[], object] | None]] = []
    if kind == "training":
        gradients = reference_results(job)
        for engine in ENGINES:
            trained, found = checked_step(engine, job, gradients)
            results.append((engine, found, None if trained is None else trained.run))
        return results
    reference = reference_output(job.model, job.x)
    limit = ERROR_LIMIT * output_scale(job.model, reference)
    for engine in ENGINES:
        built, error, status = checked(engine, job, reference, limit)
        found = {"status": status, "error_limit": f"{limit:.4g}"}
        found |= {} if error is None else {"error": f"{error:.4g}"}
        results.append((engine, found, None if built is None else built.run))
    return results


@dataclass
class Cost:
    """What a network is made of and computes for one image.

    Attributes:
        parameters: Trainable parameters.
        macs: Multiply-adds of convolutions and linear layers, those on padding included.
        activation_bytes: Outputs of the same layers, in float32.
    """

    parameters: int
    macs: int = 0
    activation_bytes: int = 0


def cost(name: str, size: int) -> Cost:
    """Counts, by running the network without data."""
    with torch.device("meta"):
        model = create_model(name, num_classes=CLASSES).eval()
        x = torch.empty(1, 3, size, size)
    counted = Cost(sum(p.numel() for p in model.parameters() if p.requires_grad))

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        del inputs
        weight = module.get_parameter("weight")
        counted.macs += output.numel() * weight[0].numel()
        counted.activation_bytes += 4 * output.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    return counted


def train(arguments: argparse.Namespace) -> list[Path]:
    """Trains each network in a folder of its own; returns the folders.

    A run that was interrupted goes on.

    Raises:
        CommandError: One of them fails.
    """
    folders = []
    for name in arguments.models:
        folder = arguments.output / name
        command = [sys.executable, "-m", "threshnet_fast.train", name, "--dataset", "cifar10"]
        command += ["--data", str(arguments.data), "--epochs", str(arguments.epochs)]
        command += ["--threads", str(arguments.threads), "--output", str(folder), "--resume"]
        print(f"{TITLES[name]}: {' '.join(command[1:])}", flush=True)
        if subprocess.run([*command, *arguments.options]).returncode:
            raise CommandError(f"the training of {name} failed")
        folders.append(folder)
    return folders


def errors(folders: Sequence[Path], common: Mapping[str, object]) -> list[dict[str, object]]:
    """Returns a row for each run of ``threshnet-fast train``.

    Raises:
        CommandError: A folder holds no run that has come to its end.
    """
    rows = []
    for folder in folders:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
                log = list(csv.DictReader(file))
            recipe = dict(config["recipe"])
            epochs = recipe.pop("epochs")
            if len(log) != epochs or not log[-1]["test_accuracy"]:
                raise CommandError(f"{folder}: the run has not come to its end")
            settings = ("image_size", "interpolation", "images_per_step", "accumulate", "amp")
            recipe |= {name: config[name] for name in settings}
            row = {
                "kind": "error",
                "status": "ok",
                "model": config["model"],
                "classes": config["num_classes"],
                "height": config["image_size"][0],
                "width": config["image_size"][1],
                "batch": config["images_per_step"],
                "data": config["dataset"],
                "recipe": json.dumps(recipe, sort_keys=True),
                "train_images": config["train_images"],
                "epochs": epochs,
                "seed": config["seed"],
                "test_error": f"{1 - float(log[-1]['test_accuracy']):.6f}",
                "train_seconds": f"{sum(float(line['seconds']) for line in log):.1f}",
            }
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{folder} holds no run: {error}") from error
        rows.append({key: row.get(key, common.get(key, "")) for key in COLUMNS})
    return rows


# What follows makes the tables of docs/paper.md.


@dataclass(frozen=True)
class Findings:
    """The last measurement of everything.

    Attributes:
        costs: A row for each network.
        times: Fastest call in milliseconds by kind and input, network, engine.
        timed: The rows that these are from.
        errors: A row for each network, all of one recipe, data set and number of epochs.
    """

    costs: dict[str, Mapping[str, str]]
    times: dict[tuple[str, Cell, str, str], float]
    timed: list[Mapping[str, str]]
    errors: dict[str, Mapping[str, str]]

    def plain(self, kind: str, cell: Cell, model: str) -> float | None:
        """The time of PyTorch, in whichever memory layout is faster."""
        found = [self.times.get((kind, cell, model, engine)) for engine in PLAIN]
        return min((time for time in found if time is not None), default=None)

    def fused(self, kind: str, cell: Cell, model: str) -> float | None:
        """The time of the fused engine."""
        return self.times.get((kind, cell, model, "fused"))

    def test_error(self, model: str) -> float | None:
        """The share of wrong answers."""
        row = self.errors.get(model)
        return None if row is None else float(row["test_error"])


def findings(rows: Rows) -> Findings:
    """Picks the last run of each measurement; numbers of different runs are never compared."""
    costs, last = {}, {}
    groups: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        if row["kind"] == "cost":
            costs[row["model"]] = row
        elif row["kind"] == "error":
            names = ("data", "recipe", "train_images", "epochs", "seed")
            groups.setdefault(tuple(row[name] for name in names), {})[row["model"]] = row
        else:
            last[row["kind"], row["height"], row["batch"]] = row["run"]
    timed = [
        row
        for row in rows
        if last.get((row["kind"], row["height"], row["batch"])) == row["run"]
        and row["kind"] in ("inference", "training")
    ]
    times = {
        (
            row["kind"],
            (int(row["height"]), int(row["batch"])),
            row["model"],
            row["provider"],
        ): float(row["min_ms"])
        for row in timed
        if row["status"] == "ok"
    }
    # Of groups of the same size, the last one.
    compared = max(reversed(list(groups.values())), key=len, default={})
    return Findings(costs, times, timed, compared)


def networks(found: Findings) -> str:
    """The table of networks: cost, times, error."""
    header = ["network", "parameters", "multiply-adds", "activations"]
    for size, batch in INFERENCE:
        header.append(f"inference {size}x{size}, batch {batch}: fused / PyTorch")
    size, batch = TRAINING
    header += [f"training step {size}x{size}, batch {batch}: fused / PyTorch", "test error"]
    lines = [header, [":--", *("--:" for _ in header[1:])]]
    for model in MODELS:
        row = found.costs.get(model)
        if row is None:
            continue
        mark = "" if int(row["height"]) == COST_SIZE else f" (at {row['height']}x{row['width']})"
        line = [TITLES[model], f"{int(row['parameters']) / 1e6:.2f} M"]
        line += [f"{int(row['macs']) / 1e9:.2f} G{mark}"]
        line += [f"{int(row['activation_bytes']) / 1e6:.1f} MB{mark}"]
        for kind, cell in (*(("inference", cell) for cell in INFERENCE), ("training", TRAINING)):
            pair = found.fused(kind, cell, model), found.plain(kind, cell, model)
            line.append(
                " / ".join("-" if t is None else f"{milliseconds(str(t))} ms" for t in pair)
            )
        error = found.test_error(model)
        lines.append([*line, "" if error is None else f"{error:.1%}"])
    return _markdown(lines)


def pairs(found: Findings) -> str:
    """What each ThreshNet saves against each other network."""
    header = ["", "against", *(title for title, _ in _savings(found, *MODELS[:2]))]
    lines = [header, [":--", ":--", *("--:" for _ in header[2:])]]
    for ours in THRESHNETS:
        for other in (*DENSENETS, *HARDNETS):
            values = [_percent(value) for _, value in _savings(found, ours, other)]
            lines.append([TITLES[ours], TITLES[other], *values])
    return _markdown(lines)


def _savings(found: Findings, ours: str, other: str) -> list[tuple[str, float | None]]:
    """Shares of the other's time and error that a network saves, with titles."""
    result = []
    for kind, cell in (*(("inference", cell) for cell in INFERENCE), ("training", TRAINING)):
        for engine, time in (("PyTorch", found.plain), ("fused", found.fused)):
            what = f"{kind} {cell[0]}x{cell[0]}, batch {cell[1]}, {engine}"
            result.append((what, _saved(time(kind, cell, ours), time(kind, cell, other))))
    result.append(("test error", _saved(found.test_error(ours), found.test_error(other))))
    return result


def _saved(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else 1 - value / other


def claims(found: Findings) -> str:
    """The claims of the paper and this package's own, with what was measured."""
    lines = [["claim", "measured", "holds"], [":--", ":--", ":--"]]
    for text, others, kind, asked in (
        ("up to 60% less inference time than DenseNet", DENSENETS, "inference", 0.60),
        ("up to 35% faster training than HarDNet", HARDNETS, "training", 0.35),
        ("20% lower error than HarDNet", HARDNETS, "test error", 0.20),
    ):
        saved = [
            (value, f"{TITLES[ours]} against {TITLES[other]}, {title}")
            for ours in THRESHNETS
            for other in others
            for title, value in _savings(found, ours, other)
            if title.startswith(kind) and value is not None
        ]
        if not saved:
            lines.append([text, "not measured", ""])
            continue
        best, where = max(saved)
        least, worst = min(saved)
        measured = f"at best {_difference(best)} ({where}); at worst {_difference(least)} ({worst})"
        lines.append([text, measured, _verdict(best >= asked)])
    for cell in INFERENCE:
        where = f"{cell[0]}x{cell[0]}, batch {cell[1]}"
        ours = found.fused("inference", cell, "threshnet95")
        for text, other, most in (
            ("at most 40% of PyTorch's DenseNet-121", found.plain, 0.40),
            ("below fused DenseNet-121", found.fused, 1.0),
        ):
            theirs = other("inference", cell, "densenet121")
            text = f"fused ThreshNet95 {text}, {where}"
            if ours is None or theirs is None:
                lines.append([text, "not measured", ""])
                continue
            both = f"{milliseconds(str(ours))} of {milliseconds(str(theirs))} ms"
            measured = f"{both}, {ours / theirs:.0%}"
            holds = ours < theirs if most == 1.0 else ours <= most * theirs
            lines.append([text, measured, _verdict(holds)])
    return _markdown(lines)


def conditions(found: Findings) -> str:
    """Where times and errors are from."""
    texts = []
    for row in {row["run"]: row for row in found.timed}.values():
        versions = [r["version"] for r in found.timed if r["provider"] == "fused"]
        texts.append(
            f"Times: {row['processor']} ({row['processors']} processors), "
            f"threads: {row['threads']}, torch {row['torch']}, threshnet_fast {versions[0]}, "
            f"{row['time'][:10]}, commit {row['commit']}"
            + _load([r for r in found.timed if r["run"] == row["run"]])
            + "."
        )
    failed = [row for row in found.timed if row["status"] != "ok"]
    texts += [
        f"Not timed: {TITLES[r['model']]}, {r['kind']}, {r['provider']}: {r['status']}."
        for r in failed
    ]
    if found.errors:
        row = next(iter(found.errors.values()))
        recipe = json.loads(row["recipe"])
        precision = recipe["amp"] or "float32"
        texts.append(
            f"Errors: {row['data']}, {row['train_images']} training images, {row['epochs']} epochs "
            f"of the recipe `{recipe['name']}` in {precision}, {row['height']}x{row['width']} "
            f"pixels, batches of {row['batch']}, seed {row['seed']}, {row['time'][:10]}, "
            f"commit {row['commit']}."
        )
    return "\n".join(texts)


def _load(rows: Rows) -> str:
    load = disturbance([dict(row) for row in rows])
    return "" if load is None else f"; other processes kept up to {load:.1f} processors busy"


def _percent(value: float | None) -> str:
    """A share that is saved, with a minus, or is needed in addition, with a plus."""
    return "" if value is None else f"{-value:+.0%}"


def _difference(saved: float) -> str:
    return f"{saved:.0%} less" if saved >= 0 else f"{-saved:.0%} more"


def _verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(path: Path = RESULTS) -> str:
    """All of it, from the file; one sentence where there is none."""
    if not path.exists():
        return "No measurement has been recorded."
    found = findings(read_rows(path, tuple(COLUMNS)))
    parts = [
        networks(found),
        conditions(found),
        "Time and error against those of others, minus is less:",
        pairs(found),
        claims(found),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
