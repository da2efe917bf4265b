"""Measures how latency and peak memory grow: with the batch, the resolution and the threads.

    python benchmarks/bench_growth.py          # a quarter of an hour on two cores
    python benchmarks/bench_growth.py --quick  # less than a minute, to see that it works

ThreshNet95 by the fused engine and the best peers, in float32 and in bfloat16, in turns at every
point; by ``threshnet-fast bench``, which checks every result. Odd shapes are among the points:
benchmarks/table.py compares them with their regular neighbours. Rows are appended to
benchmarks/results/growth.csv, whose columns are those of models.csv; benchmarks/plot.py draws the
figure. Memory is measured at some of the points, as each provider takes a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from threshnet_fast.bench.machine import usable_processors
from threshnet_fast.bench.registry import dtypes

RESULTS = Path(__file__).resolve().parent / "results" / "growth.csv"
PROVIDERS = ("fused", "channels-last", "onnxruntime", "openvino")
SECONDS = 5.0

# Inputs are (height, width, batch).
Cell = tuple[int, int, int]
BATCHES = {32: (1, 2, 4, 8, 16, 32, 64), 224: (1, 2, 4, 8, 16)}
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448)
ODD: dict[Cell, Cell] = {
    (223, 223, 1): (224, 224, 1),
    (225, 225, 1): (224, 224, 1),
    (160, 288, 1): (224, 224, 1),
    (224, 224, 7): (224, 224, 8),
    (32, 32, 7): (32, 32, 8),
}
"""Shapes that no kernel was made for, and the regular neighbour of each."""
THREADED: tuple[Cell, ...] = ((224, 224, 1), (32, 32, 32))
"""What is measured with every number of threads; the rest with the most."""
WITH_MEMORY: tuple[Cell, ...] = (
    *((32, 32, 1), (32, 32, 8), (32, 32, 64)),
    *((224, 224, 1), (224, 224, 4), (224, 224, 16), (448, 448, 1)),
)
QUICK: tuple[Cell, ...] = ((32, 32, 1), (33, 33, 1))


def cells() -> list[Cell]:
    """All inputs, each once."""
    grown = [(size, size, batch) for size, batches in BATCHES.items() for batch in batches]
    return list(dict.fromkeys([*grown, *((size, size, 1) for size in SIZES), *ODD]))


def main() -> int:
    """Runs ``threshnet-fast bench``, in as many processes as it takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="threshnet95")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=dtypes("cpu"), default=dtypes("cpu"), help="default all"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", help="default 1 to the number of processors"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for each input in each precision"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--quick", action="store_true", help="two small inputs, 0.2 seconds each, one thread"
    )
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or list(range(1, usable_processors() + 1))
    if arguments.quick:
        arguments.threads, arguments.seconds, arguments.no_memory = [1], 0.2, True
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)

    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(arguments, Path(folder)):
            status |= subprocess.run(command).returncode
    return status


def commands(arguments: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """The command lines to run, one after the other; ``folder`` takes what is not kept."""
    common = [sys.executable, "-m", "threshnet_fast.cli", "bench", "--model", arguments.model]
    common += ["--dtype", ",".join(arguments.dtypes)]
    common += ["--providers", ",".join(arguments.providers)]
    common += ["--seconds", str(arguments.seconds), "--csv", str(arguments.csv)]
    common += ["--plot", str(folder / "growth.png")]
    for threads in arguments.threads:
        points = cells() if threads == max(arguments.threads) else list(THREADED)
        points = list(QUICK) if arguments.quick else points
        whole = threads == max(arguments.threads) and not arguments.no_memory
        measured = [cell for cell in points if whole and cell in WITH_MEMORY]
        for group, options in (
            ([cell for cell in points if cell not in measured], []),
            (measured, ["--memory"]),
        ):
            if group:
                inputs = [word for cell in group for word in ("--cell", _name(cell))]
                yield [*common, "--threads", str(threads), *inputs, *options]


def _name(cell: Cell) -> str:
    height, width, batch = cell
    return f"{height}x{width}:{batch}"


if __name__ == "__main__":
    sys.exit(main())
