"""Measures whole steps of a training on the CPU, in float32: all ways to train, in turns.

    python benchmarks/bench_train.py                 # two hours on two cores, half of it compiling
    python benchmarks/bench_train.py --no-compile
    python benchmarks/bench_train.py --quick         # a minute, to see that it works

A step is the forward pass, cross-entropy, the backward pass and the optimizer. Before anything is
timed, the output, the gradient of every parameter and the running statistics are compared with
those of plain PyTorch in float64. Rows are appended to benchmarks/results/train.csv;
benchmarks/table.py and benchmarks/plot.py make the tables and figures of the documentation from
that file. Every number of threads runs in a process of its own, as torch.compile writes it into
the code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from threshnet_fast.bench import peak_memory
from threshnet_fast.bench.comparison import (
    checked_step,
    common_columns,
    reference_results,
    time_in_turns,
)
from threshnet_fast.bench.cpu_engines import reset_compiler
from threshnet_fast.bench.job import Job, Unavailable
from threshnet_fast.bench.networks import random_model
from threshnet_fast.bench.report import text_table
from threshnet_fast.bench.results import TRAINING_COLUMNS, append_rows, check_writable
from threshnet_fast.bench.training_steps import OPTIMIZER, TRAINING_PROVIDERS
from threshnet_fast.cli.arguments import check_model
from threshnet_fast.errors import CommandError
from threshnet_fast.plan import FusedConv, lower

RESULTS = Path(__file__).resolve().parent / "results" / "train.csv"
MODELS = ("threshnet79", "threshnet95")
CELLS = ("32:100", "224:8")
SECONDS = 60.0
CLASSES = 10
SEED = 0


def main() -> int:
    """Measures in one process for each number of threads."""
    arguments = parse()
    if len(arguments.threads) > 1:
        status = 0
        for threads in arguments.threads:
            # The last of an option's values is the one that counts.
            command = [sys.executable, __file__, *sys.argv[1:], "--threads", str(threads)]
            status |= subprocess.run(command).returncode
        return status
    try:
        check_writable(arguments.csv, tuple(TRAINING_COLUMNS))
        for model in arguments.models:
            check_model(model)
        common = common_columns("random", torch.device("cpu"))
        failed = False
        for model in arguments.models:
            for size, batch in arguments.cells:
                rows = measure(model, size, batch, arguments, common)
                append_rows(arguments.csv, rows, tuple(TRAINING_COLUMNS))
                failed |= any(row["status"] != "ok" for row in rows)
                text = [{key: str(value) for key, value in row.items()} for row in rows]
                print(text_table(text), end="\n\n", flush=True)
    except CommandError as error:
        print(f"bench_train.py: error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.csv}")
    return int(failed)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--cells", nargs="+", metavar="SIZE:BATCH", default=list(CELLS))
    parser.add_argument("--providers", nargs="+", choices=list(TRAINING_PROVIDERS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=SECONDS, help="for each model and input")
    budget.add_argument("--rounds", type=int, help="instead: rounds of all providers")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick", action="store_true", help="a small input, a few steps, no torch.compile"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cells, arguments.rounds = ["32:8"], 3
        arguments.no_compile = arguments.no_memory = True
    try:
        arguments.cells = [cell(text) for text in arguments.cells]
    except ValueError:
        parser.error(f"--cells {' '.join(arguments.cells)}: expected SIZE:BATCH, as in 32:100")
    return arguments


def cell(text: str) -> tuple[int, int]:
    """``"32:100"``: size and batch.

    Raises:
        ValueError: It is not of that form.
    """
    size, batch = map(int, text.split(":"))
    if min(size, batch) < 1:
        raise ValueError(f"cell is {text!r}: expected positive numbers")
    return size, batch


def measure(
    name: str, size: int, batch: int, arguments: argparse.Namespace, common: dict[str, object]
) -> list[dict[str, object]]:
    """Checks and times all providers on one input; returns a row for each.

    Args:
        name: Name of the model.
        size: Height and width of the images.
        batch: Their number.
        arguments: Of the command line.
        common: The columns that are the same for all rows.
    """
    (threads,) = arguments.threads
    title = f"{name} {size}x{size} batch {batch}, " + (
        "1 thread" if threads == 1 else f"{threads} threads"
    )
    reset_compiler()
    torch.set_num_threads(threads)
    model = random_model(name, CLASSES, SEED)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, 3, size, size, generator=generator)
    job = Job(model, x, threads)
    macs = step_macs(model, (batch, 3, size, size))
    reference = reference_results(job)

    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    kept: dict[str, Callable[[], int]] = {}
    for provider in tqdm(chosen(arguments), desc=f"{title} check", unit="engine", disable=None):
        spec = TRAINING_PROVIDERS[provider]
        row = {
            **common,
            "model": name,
            "classes": CLASSES,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "height": size,
            "width": size,
            "batch": batch,
            "dtype": "float32",
            "threads": threads,
            "seed": SEED,
            "provider": provider,
            "version": spec.version(),
            "macs": macs,
            "task": "training",
            "optimizer": OPTIMIZER,
        }
        try:
            built, found = checked_step(provider, job, reference)
        except Unavailable as problem:
            print(f"Left out: {provider} ({problem})", flush=True)
            continue
        rows[provider] = {**row, **found}
        if built is not None:
            calls[provider] = built.run
            kept[provider] = built.kept

    time_in_turns(
        calls,
        rows,
        macs,
        title=title,
        threads=threads,
        seconds=None if arguments.rounds else arguments.seconds,
        rounds=arguments.rounds,
    )
    for provider, call in calls.items():
        row = rows[provider]
        row["steps_per_second"] = f"{1e3 / float(str(row['p50_ms'])):.4g}"
        if not arguments.no_memory:
            before = kept[provider]()
            row["live_bytes"] = before + peak_memory.live_bytes(call)
    names = list(calls)
    # The processes that measure need the memory that the copies of the weights hold.
    calls.clear()
    kept.clear()
    if not arguments.no_memory:
        for provider in tqdm(names, desc=f"{title} memory", unit="engine", disable=None):
            used = peak_memory.measure(provider, job, name, CLASSES, SEED, task="training")
            if used is not None:
                rows[provider]["peak_bytes"] = used.peak
    return [{key: row.get(key, "") for key in TRAINING_COLUMNS} for row in rows.values()]


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The providers to measure, in the order of the tables; says why those missing are."""
    names = []
    for name, spec in TRAINING_PROVIDERS.items():
        compiled = name.startswith("compile")
        if arguments.providers and name not in arguments.providers:
            continue
        if compiled and arguments.no_compile:
            continue
        reason = spec.objection()
        if reason is not None and not spec.ours:
            print(f"Left out: {name} ({reason})", flush=True)
            continue
        names.append(name)
    return names


def step_macs(model: torch.nn.Module, shape: tuple[int, int, int, int]) -> int:
    """Multiply-adds of one step, those on padding included.

    Both gradients of a convolution take as many as the convolution; the first has none of its
    input.
    """
    plan = lower(model, shape, fold=False)
    first = next(step for step in plan.steps if isinstance(step, FusedConv))
    return 3 * plan.macs - first.macs


if __name__ == "__main__":
    sys.exit(main())
