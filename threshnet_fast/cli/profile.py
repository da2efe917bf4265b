"""``threshnet-fast profile``: what each step of a network takes on the CPU, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..bench import results
from ..bench.comparison import common_columns, introduction
from ..bench.latency import check_memory, check_sizes, input_of
from ..bench.networks import random_model
from ..bench.profile import measure
from ..bench.profile_report import measured_roofline, step_rows, tables
from ..bench.report import check_plot, disturbance
from ..bench.roofline import draw_measured_rooflines
from .arguments import (
    add_budget_arguments,
    add_file_arguments,
    add_input_arguments,
    cells,
    check_model,
    models,
    photographs,
    threads,
)

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "what each step of the fused engine takes on the CPU"

DESCRIPTION = """\
Runs the fused engine alone, on the CPU, in float32, step by step: the time of each, GFLOP/s, their
share of the processor's peak, bytes; as a table, a CSV file and a roofline plot.

Without arguments: ThreshNet95 at 224x224 batch 1, 32x32 batch 1 and 32x32 batch 32, about 5 seconds
each."""

_CSV = Path("threshnet-fast-profile.csv")
_DEFAULT_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_input_arguments(parser)
    how = parser.add_argument_group("how to run it")
    how.add_argument("--threads", type=threads, metavar="N", help="default: torch's")
    add_budget_arguments(how, f"{_DEFAULT_SECONDS:g}", "calls that are profiled")
    add_file_arguments(parser, str(_CSV))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    names, shapes, place = models(arguments), cells(arguments), torch.device("cpu")
    for name in names:
        check_model(name)
    check_sizes(names, shapes)
    check_memory(names, shapes, place)
    path: Path = arguments.csv or _CSV
    picture: Path = arguments.plot or path.with_suffix(".png")
    if not arguments.no_files:
        results.check_writable(path, tuple(results.PROFILE_COLUMNS))
        check_plot(picture)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = photographs(arguments)
    common = common_columns(found[0].source if found else "random", place)
    count = torch.get_num_threads()
    print("\n".join(introduction(common, count)), end="\n\n")
    panels = []
    for name in names:
        model = random_model(name, arguments.classes, arguments.seed)
        for height, width, batch in shapes:
            measured = measure(
                model,
                name,
                input_of((height, width, batch), found, arguments.seed),
                seconds=None if arguments.repeats else arguments.seconds or _DEFAULT_SECONDS,
                calls=arguments.repeats,
            )
            cell: dict[str, object] = {
                "model": name,
                "classes": arguments.classes,
                "height": height,
                "width": width,
                "batch": batch,
                "seed": arguments.seed,
            }
            rows = step_rows(measured, common | cell)
            print(f"{measured.title}\n{tables(measured)}")
            busy = disturbance([{k: str(v) for k, v in (rows[0] | {"device": "cpu"}).items()}])
            if busy is not None:
                print(
                    f"Other processes kept {busy:.1f} processors busy meanwhile: do not trust "
                    "these times."
                )
            print(flush=True)
            if not arguments.no_files:
                results.append_rows(path, rows, tuple(results.PROFILE_COLUMNS))
            panels.append(measured_roofline(measured))
    if not arguments.no_files:
        draw_measured_rooflines(panels, picture)
        print(f"Written: {path}, {picture}")
    return 0
