"""Measures the peak memory of an inference: the fused engine against PyTorch.

    python benchmarks/bench_memory.py --size 224 --batch 16

Two ways that know nothing of each other:

- live tensors: the largest sum of what one call allocates, from the profiler's record of every
  allocation and release. Weights are in place before the call and do not count, packed ones
  neither; the fused engine's buffers are allocated in the call and do.
- resident memory, from the kernel's high-water mark in a process of its own (see
  threshnet_fast/bench/peak_memory.py): all that a provider adds to the model at the peak of a call,
  packed weights, caches of libraries and memory that the allocator keeps included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import threshnet_fast as tf
from threshnet_fast.bench import machine
from threshnet_fast.bench.cpu_engines import PROVIDERS
from threshnet_fast.bench.job import Job
from threshnet_fast.bench.networks import random_model
from threshnet_fast.bench.peak_memory import live_bytes, measure
from threshnet_fast.bench.registry import build
from threshnet_fast.bench.report import format_table
from threshnet_fast.bench.results import append_rows

RESULTS = Path(__file__).resolve().parent / "results" / "memory.csv"
COLUMNS = (
    *("commit", "model", "size", "batch", "threads", "provider", "version", "kept_bytes"),
    *("peak_bytes", "live_bytes", "processor", "torch"),
)


def live_tensors(job: Job, provider: str) -> int:
    """The largest number of bytes that tensors allocated in one call hold at the same time.

    Args:
        job: What to run.
        provider: One of this package's or of PyTorch's; for this package's, ``job`` has a batch of
            two images or more.
    """
    if PROVIDERS[provider].ours:
        # Half of the batch packs the weights; the whole one is a new shape, whose buffers are
        # allocated in the call.
        torch.set_num_threads(job.threads)
        half = job.x[: len(job.x) // 2]
        engine = tf.optimize(job.model, half) if provider == "fused" else job.model

        def call(x: torch.Tensor = job.x) -> object:
            with torch.no_grad():
                return engine(x)

        call(half)
    else:
        call = build(provider, job).run
        call()
    return live_bytes(call)


def main() -> int:
    """Measures, prints a table and appends to the CSV file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="threshnet95")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--providers", nargs="+", default=["fused", "drop-in", "eager", "channels-last"]
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error("--batch must be 2 or more")
    model = random_model(arguments.model, classes=10, seed=0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    job = Job(model, x, arguments.threads)

    rows: list[dict[str, object]] = []
    for name in arguments.providers:
        row: dict[str, object] = {
            "commit": machine.commit(),
            "model": arguments.model,
            "size": arguments.size,
            "batch": arguments.batch,
            "threads": arguments.threads,
            "provider": name,
            "version": PROVIDERS[name].version(),
            "processor": machine.processor(),
            "torch": torch.__version__,
        }
        memory = measure(name, job, arguments.model, classes=10, seed=0)
        if memory is None:
            print(f"{name}: resident memory could not be measured", file=sys.stderr)
        else:
            row |= {"kept_bytes": memory.built, "peak_bytes": memory.peak}
        row["live_bytes"] = live_tensors(job, name)
        rows.append(row)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    append_rows(arguments.csv, rows, COLUMNS)

    columns = ("live_bytes", "peak_bytes", "kept_bytes")
    lines = [
        [
            str(row["provider"]),
            *(f"{int(str(row[c])) / 1e6:.1f}" if c in row else "-" for c in columns),
        ]
        for row in rows
    ]
    print(f"{arguments.model}, {arguments.size}x{arguments.size}, batch {arguments.batch}, MB")
    print(format_table(["provider", "live tensors", "resident peak", "resident kept"], lines))
    live = {str(row["provider"]): int(str(row["live_bytes"])) for row in rows}
    if "fused" in live and "eager" in live:
        print(f"live tensors, fused over eager: {live['fused'] / live['eager']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
