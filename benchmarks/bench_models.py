"""Measures whole networks: every model, input and number of threads, all engines in turns.

    python benchmarks/bench_models.py            # about half an hour on two cores
    python benchmarks/bench_models.py --quick    # a minute or two, to see that it works

Rows are appended to benchmarks/results/models.csv; benchmarks/table.py and benchmarks/plot.py make
the tables and figures of the documentation from that file. Every number of threads runs in a
process of its own, as some engines fix it when they are loaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "models.csv"
MODELS = ("threshnet95", "threshnet79")
CELLS = ("224:1", "224:16", "32:1", "32:32")


def main() -> int:
    """Runs ``threshnet-fast bench`` once for each number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), metavar="SIZE:BATCH")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each cell")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--quick", action="store_true", help="two small cells, one second each, no torch.compile"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cells, arguments.seconds = ["32:1", "32:2"], 1.0
        arguments.no_compile = arguments.no_memory = True
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)

    status = 0
    for threads in arguments.threads:
        command = [sys.executable, "-m", "threshnet_fast.cli", "bench"]
        command += ["--threads", str(threads), "--seconds", str(arguments.seconds)]
        for model in arguments.models:
            command += ["--model", model]
        for cell in arguments.cells:
            command += ["--cell", cell]
        command += [] if arguments.no_compile else ["--compile"]
        command += [] if arguments.no_memory else ["--memory"]
        plot = arguments.csv.with_name(f"{arguments.csv.stem}-{threads}-threads.png")
        command += ["--csv", str(arguments.csv), "--plot", str(plot)]
        status |= subprocess.run(command).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
