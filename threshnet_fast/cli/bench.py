"""``threshnet-fast bench``: latency of the fused engine against its peers."""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench import latency, results
from ..bench.comparison import common_columns, introduction
from ..bench.job import Spec
from ..bench.networks import random_model
from ..bench.precision import PRECISIONS
from ..bench.registry import dtypes, registry
from ..bench.report import check_plot, plot, text_table
from ..errors import CommandError
from ..text import enumerated
from . import profile
from .arguments import (
    add_budget_arguments,
    add_file_arguments,
    add_input_arguments,
    cells,
    check_device,
    check_model,
    device,
    models,
    photographs,
    threads,
)

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "latency of the fused engine against PyTorch and other engines"

DESCRIPTION = """\
Runs ThreshNet95 (or what --model names) on photographs, checks every engine against float64, then
times all of them in turns on the same weights and the same input. Weights are random: this is
about speed and about agreement, not about accuracy.

Without arguments: 224x224 batch 1, 32x32 batch 1 and 32x32 batch 32, about 20 seconds each.

With --dtype: in every precision that it names, each a class of its own: bfloat16 is checked against
float64 on the rounded weights and input, and compared with engines that calculate in bfloat16.

With --device cuda: the same on a GPU, timed by the GPU's own events; each call is waited for before
the next one begins."""

_DEFAULT_SECONDS = 20.0
_CSV = Path("threshnet-fast-bench.csv")
_DEVICE_TYPES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_input_arguments(parser)
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--device",
        type=device,
        default=torch.device("cpu"),
        metavar="DEVICE",
        help="cpu (default), cuda or cuda:N",
    )
    how.add_argument(
        "--dtype",
        type=_dtypes,
        default=["float32"],
        metavar="NAME,...",
        help="precisions (default float32): "
        + "; ".join(f"on {kind}: {', '.join(dtypes(kind))}" for kind in _DEVICE_TYPES),
    )
    how.add_argument(
        "--flush-l2",
        action="store_true",
        help="overwrite the GPU's cache before every call (default: what the call before left)",
    )
    how.add_argument(
        "--providers",
        type=_names,
        metavar="NAME,...",
        help="engines (default: all that are installed, except compile): "
        + "; ".join(f"on {kind}: {', '.join(registry(kind))}" for kind in _DEVICE_TYPES)
        + f"; in bfloat16 on cpu: {', '.join(registry('cpu', 'bfloat16'))}",
    )
    how.add_argument(
        "--compile", action="store_true", help="torch.compile as well; it takes minutes to compile"
    )
    how.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="threads (default: torch's; with --device cuda 1)",
    )
    add_budget_arguments(how, f"{_DEFAULT_SECONDS:g}", "rounds of all engines")
    how.add_argument(
        "--profile",
        action="store_true",
        help="the older way to write threshnet-fast profile, which has files and times of its own",
    )
    how.add_argument(
        "--memory", action="store_true", help="measure peak memory too, each in a new process"
    )
    add_file_arguments(parser, str(_CSV))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    if arguments.profile:
        _check_profile(arguments)
        return profile.run(arguments)
    names = models(arguments)
    place = check_device(arguments.device)
    _check_precisions(arguments, place)
    for name in names:
        check_model(name)
    shapes = cells(arguments)
    latency.check_sizes(names, shapes)
    latency.check_memory(names, shapes, place)
    providers = _providers(arguments)
    path: Path = arguments.csv or _CSV
    picture: Path = arguments.plot or path.with_suffix(".png")
    if not arguments.no_files:
        results.check_writable(path)
        check_plot(picture)

    count = arguments.threads or (torch.get_num_threads() if place.type == "cpu" else 1)
    torch.set_num_threads(count)
    found = photographs(arguments)
    setting = latency.Run(
        names=providers,
        classes=arguments.classes,
        threads=count,
        seed=arguments.seed,
        photographs=found,
        measure_memory=arguments.memory,
        device=place,
        flushed=latency.memory_to_flush(place) if arguments.flush_l2 else None,
        common=common_columns(found[0].source if found else "random", place, arguments.flush_l2),
        seconds=None if arguments.repeats else arguments.seconds or _DEFAULT_SECONDS,
        rounds=arguments.repeats,
    )
    lines = [*introduction(setting.common, count), *latency.left_out(setting)]
    print("\n".join(lines), end="\n\n")
    if not found and not arguments.random_input:
        print(
            "No photograph is available (install scikit-image, or name one with --image): the "
            "input is random.\n"
        )
    with torch.cuda.device(place) if setting.on_gpu else contextlib.nullcontext():
        rows = _measure(names, shapes, arguments, setting, path)
    if not arguments.no_files:
        written = [path]
        if any(row["status"] == "ok" for row in rows):
            plot(rows, picture)
            written.append(picture)
        print(f"Written: {', '.join(map(str, written))}")
    if any(row["status"] != "ok" for row in rows):
        raise CommandError("not everything could be measured, the tables say why")
    return 0


def _measure(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    arguments: argparse.Namespace,
    setting: latency.Run,
    path: Path,
) -> list[dict[str, str]]:
    """Measures and prints every model and input on the current device; returns all rows."""
    rows: list[dict[str, str]] = []
    for name in names:
        model = random_model(name, setting.classes, setting.seed)
        if setting.photographs:
            print(latency.classification(model, name, shapes[0], setting), flush=True)
        for shape in shapes:
            for dtype in arguments.dtype:
                cell = latency.measure(model, name, shape, dtype, setting)
                text = [{key: str(value) for key, value in row.items()} for row in cell]
                print(text_table(text), end="\n\n", flush=True)
                rows += text
                if not arguments.no_files:
                    results.append_rows(path, cell)
    return rows


def _check_profile(arguments: argparse.Namespace) -> None:
    """Refuses what does not go with ``--profile``."""
    if arguments.device.type != "cpu":
        raise CommandError("--profile is of the CPU's engine: leave --device out", 2)
    for option in ("providers", "compile", "memory"):
        if getattr(arguments, option):
            raise CommandError(
                f"--profile looks at the fused engine alone: leave --{option} out", 2
            )
    if arguments.dtype != ["float32"]:
        raise CommandError("--profile is of float32: leave --dtype out", 2)
    if arguments.flush_l2:
        raise CommandError("--profile is of the CPU's engine: leave --flush-l2 out", 2)


def _check_precisions(arguments: argparse.Namespace, place: torch.device) -> None:
    if place.type != "cpu":
        return
    possible = dtypes("cpu")
    for dtype in arguments.dtype:
        if dtype not in possible:
            expected = enumerated(possible, "or")
            raise CommandError(f"--dtype {dtype}: on the CPU expected {expected}", 2)
    if arguments.flush_l2:
        raise CommandError("--flush-l2 belongs to a GPU: add --device cuda", 2)


def _providers(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the providers to run, by precision, in the order of the tables."""
    kind: str = arguments.device.type
    named: list[str] = arguments.providers or []
    chosen = {}
    for dtype in arguments.dtype:
        specs = registry(kind, dtype)
        wanted = set(named or [name for name, spec in specs.items() if spec.by_default])
        if arguments.compile:
            wanted |= {name for name, spec in specs.items() if not spec.by_default}
        chosen[dtype] = [name for name, spec in specs.items() if name in wanted and _usable(spec)]
    if arguments.compile:
        specs = registry(kind, arguments.dtype[0])
        named = [*named, *(name for name, spec in specs.items() if not spec.by_default)]
    for name in named:
        if not any(name in names for names in chosen.values()):
            reason = _objection(name, kind, arguments.dtype)
            raise CommandError(f"--providers {name}: {reason}", 2)
    for dtype, names in chosen.items():
        if not names:
            which = ", ".join(named)
            raise CommandError(f"--providers {which}: none of them runs on {kind} in {dtype}", 2)
    return chosen


def _objection(name: str, kind: str, names_of_dtypes: Sequence[str]) -> str | None:
    for dtype in names_of_dtypes:
        if name in registry(kind, dtype):
            return registry(kind, dtype)[name].objection()
    return f"it does not run on {kind} in {enumerated(names_of_dtypes, 'or')}"


def _usable(spec: Spec) -> bool:
    # The engine itself stays in the list where it is broken: that is a failure, not an absence.
    return (spec.ours and not spec.optional) or spec.objection() is None


def _names(text: str) -> list[str]:
    known = list(dict.fromkeys(name for kind in _DEVICE_TYPES for name in registry(kind)))
    return _listed(text, known, "provider")


def _dtypes(text: str) -> list[str]:
    return _listed(text, list(PRECISIONS), "dtype")


def _listed(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected one name or more")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: {hint}")
    return list(dict.fromkeys(names))
