"""Measures modules of others, as they are published, through ``tf.optimize`` and by its peers.

    python benchmarks/bench_foreign.py          # half an hour on two cores
    python benchmarks/bench_foreign.py --quick  # a minute, to see that it works

Each network of benchmarks/foreign_networks.py in float32, one image: the engines that are installed
take turns, and each output is compared with that of the module in float64 before anything is timed.
DenseNet-121 is torchvision's own where that is installed. Rows are appended to
benchmarks/results/foreign.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from foreign_networks import NETWORKS
from torch import nn

from threshnet_fast.bench import latency
from threshnet_fast.bench.comparison import common_columns, introduction
from threshnet_fast.bench.networks import randomise
from threshnet_fast.bench.registry import registry
from threshnet_fast.bench.report import text_table
from threshnet_fast.bench.results import FOREIGN_COLUMNS, append_rows, check_writable

RESULTS = Path(__file__).resolve().parent / "results" / "foreign.csv"
PROVIDERS = (
    *("fused", "eager", "channels-last", "compile", "onnxruntime", "openvino", "ncnn", "mnn"),
)
SECONDS = 60.0


def network(name: str, seed: int = 0) -> nn.Module:
    """A network of ``NETWORKS`` in evaluation mode; equal seeds give equal ones."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = NETWORKS[name][0]()
        if name == "torchvision-densenet121":
            try:
                from torchvision.models import densenet121
            except ImportError:
                pass
            else:
                model = densenet121(weights=None)
    return randomise(model, seed)


def main() -> int:
    """Measures, prints a table for each network and appends to the CSV file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default all installed")
    parser.add_argument("--size", type=int, help="height and width (default as each is published)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each network")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick", action="store_true", help="64x64, one second each, no torch.compile"
    )
    arguments = parser.parse_args()
    specs = registry("cpu")
    names = [
        name
        for name in arguments.providers or PROVIDERS
        if arguments.providers or name == "fused" or specs[name].objection() is None
    ]
    if arguments.quick:
        arguments.size, arguments.seconds = arguments.size or 64, 1.0
        names = [name for name in names if name != "compile"]
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    check_writable(arguments.csv, tuple(FOREIGN_COLUMNS))

    torch.set_num_threads(arguments.threads)
    place = torch.device("cpu")
    common = common_columns("random", place)
    print("\n".join(introduction(common, arguments.threads)), end="\n\n")
    for name in PROVIDERS:
        if name not in names and (reason := specs[name].objection()):
            print(f"Left out: {name} ({reason})")
    failed = False
    for name in arguments.networks:
        model, size = network(name), arguments.size or NETWORKS[name][1]
        with torch.no_grad():
            outputs = model(torch.zeros(1, 3, size, size)).shape[1]
        run = latency.Run(
            names={"float32": names},
            classes=outputs,
            threads=arguments.threads,
            seed=0,
            photographs=[],
            measure_memory=False,
            device=place,
            flushed=None,
            common=common,
            seconds=arguments.seconds,
            rounds=None,
        )
        cell = latency.measure(model, name, (size, size, 1), "float32", run, FOREIGN_COLUMNS)
        rows = [{key: str(value) for key, value in row.items()} for row in cell]
        print(text_table(rows), flush=True)
        prepared = ", ".join(f"{row['provider']} {float(row['prepare_s']):.2f} s" for row in rows)
        print(f"From the module to its first output: {prepared}", end="\n\n", flush=True)
        append_rows(arguments.csv, cell, tuple(FOREIGN_COLUMNS))
        failed |= any(row["status"] != "ok" for row in rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
