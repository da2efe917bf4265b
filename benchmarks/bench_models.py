"""Measures whole networks: every model, input, precision and number of threads, engines in turns.

    python benchmarks/bench_models.py                  # two and a half hours on two cores
    python benchmarks/bench_models.py --quick          # a few minutes, to see that it works
    python benchmarks/bench_models.py --device cuda    # on a GPU
    python benchmarks/bench_models.py --device cuda --quick

Rows are appended to benchmarks/results/models.csv; benchmarks/table.py and benchmarks/plot.py make
the tables and figures of the documentation from that file. Every number of threads runs in a
process of its own, as some engines fix it when they are loaded. On a GPU, every model and precision
does, as after an error of one engine the others could not go on; how long it takes depends on
torch.compile, which tries many kernels for each of 48 inputs: --no-compile leaves it out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from threshnet_fast.bench.precision import PRECISIONS
from threshnet_fast.bench.registry import dtypes
from threshnet_fast.cli.arguments import check_device, device
from threshnet_fast.errors import CommandError

RESULTS = Path(__file__).resolve().parent / "results" / "models.csv"
MODELS = ("threshnet95", "threshnet79")
CELLS = ("224:1", "224:16", "32:1", "32:32")
CUDA_CELLS = ("224:1", "224:16", "224:128", "32:1", "32:32", "32:128")
SECONDS = 60.0
CUDA_SECONDS = 15.0


def main() -> int:
    """Runs ``threshnet-fast bench``, in as many processes as it takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="default 1 2, or with --device cuda 1"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--cells", nargs="+", metavar="SIZE:BATCH")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(PRECISIONS),
        help="precisions (default all that the device has, on the CPU float32 and bfloat16)",
    )
    parser.add_argument("--flush-l2", action="store_true", help="see threshnet-fast bench --help")
    parser.add_argument("--seconds", type=float, help="for each input in each precision")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--quick", action="store_true", help="two small cells, one second each, no torch.compile"
    )
    arguments = parser.parse_args()
    try:
        place = check_device(device(arguments.device))
    except (CommandError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    gpu = place.type != "cpu"
    if not gpu and arguments.flush_l2:
        parser.error("--flush-l2 belongs to a GPU: add --device cuda")
    possible = dtypes(place.type)
    arguments.dtypes = arguments.dtypes or possible
    for dtype in arguments.dtypes:
        if dtype not in possible:
            parser.error(f"--dtypes {dtype}: on the CPU expected {' or '.join(possible)}")
    arguments.threads = arguments.threads or ([1] if gpu else [1, 2])
    arguments.cells = arguments.cells or list(CUDA_CELLS if gpu else CELLS)
    arguments.seconds = arguments.seconds or (CUDA_SECONDS if gpu else SECONDS)
    if arguments.quick:
        arguments.cells, arguments.seconds = ["32:1", "32:2"], 1.0
        arguments.no_compile = arguments.no_memory = True
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)

    status = 0
    for command in commands(arguments, gpu):
        status |= subprocess.run(command).returncode
    return status


def commands(arguments: argparse.Namespace, gpu: bool) -> Iterator[list[str]]:
    """The command lines to run, one after the other."""
    for threads in arguments.threads:
        common = [sys.executable, "-m", "threshnet_fast.cli", "bench"]
        common += ["--threads", str(threads), "--seconds", str(arguments.seconds)]
        for cell in arguments.cells:
            common += ["--cell", cell]
        common += [] if arguments.no_compile else ["--compile"]
        common += [] if arguments.no_memory else ["--memory"]
        common += ["--csv", str(arguments.csv)]
        stem = arguments.csv.stem
        if not gpu:
            models = [word for model in arguments.models for word in ("--model", model)]
            plot = arguments.csv.with_name(f"{stem}-{threads}-threads.png")
            classes = ["--dtype", ",".join(arguments.dtypes)]
            yield [*common, *models, *classes, "--plot", str(plot)]
            continue
        common += ["--device", arguments.device]
        common += ["--flush-l2"] if arguments.flush_l2 else []
        for model in arguments.models:
            for dtype in arguments.dtypes:
                plot = arguments.csv.with_name(f"{stem}-cuda-{model}-{dtype}.png")
                yield [*common, "--model", model, "--dtype", dtype, "--plot", str(plot)]


if __name__ == "__main__":
    sys.exit(main())
