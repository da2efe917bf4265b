"""``threshnet-fast bench --profile``: what each step of a network takes on the CPU, and why."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ..bench import machine, results
from ..bench.profile import (
    Machine,
    Profile,
    StepProfile,
    measure_again,
    measure_machine,
    measured_roofline,
    profile,
    step_rows,
)
from ..bench.report import disturbance, format_table
from ..bench.roofline import draw_measured_rooflines
from ..engines import cpu
from ..errors import CommandError
from ..models.network import Network

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["CSV", "DEFAULT_SECONDS", "check", "run"]

CSV = Path("threshnet-fast-profile.csv")
"""The file that rows are appended to unless told otherwise."""

DEFAULT_SECONDS = 5.0
"""Time for each input of each model unless told otherwise."""


def run(
    arguments: argparse.Namespace,
    models: Mapping[str, nn.Module],
    inputs: Mapping[tuple[int, int, int], Tensor],
    threads: int,
    common: Mapping[str, object],
    picture: Path,
) -> int:
    """Runs the command; returns its exit status.

    Args:
        arguments: Of the command line.
        models: Networks by name, in evaluation mode.
        inputs: Images by height, width and batch.
        threads: Threads, the same as torch's.
        common: Values of columns that are the same in all rows.
        picture: Plot to write.

    Raises:
        CommandError: The engine is unavailable, or a model is nothing that it runs.
    """
    from tqdm import tqdm

    reason = cpu.unavailable_reason()
    if reason is not None:
        raise CommandError(f"--profile needs the C++ engine: {reason}")
    isa, winograd = cpu.isa_code(), cpu.winograd_by_default()
    exact = winograd == 0
    panels = []
    for name, model in models.items():
        if not isinstance(model, Network):
            raise CommandError(f"--profile: {name} is nothing that the C++ engine runs", 2)
        for (height, width, batch), x in inputs.items():
            title = f"{name}, {height}x{width}, batch {batch}, float32, {_threads(threads)}"
            others = machine.OtherLoad()
            limits = measure_machine(isa, threads)
            with (
                torch.inference_mode(),
                tqdm(
                    total=100,
                    desc=title,
                    disable=None,
                    bar_format="{desc}: {percentage:3.0f}%|{bar}|",
                ) as bar,
            ):
                measured = profile(
                    model,
                    x,
                    isa=isa,
                    winograd=winograd,
                    seconds=None if arguments.repeats else arguments.seconds or DEFAULT_SECONDS,
                    calls=arguments.repeats,
                    progress=functools.partial(_advance, bar),
                )
            limits = measure_again(limits, isa, threads)
            load = others.stop()
            rows = step_rows(measured, limits)
            cell: dict[str, object] = {
                **{key: value for key, value in common.items() if key in results.PROFILE_COLUMNS},
                "model": name,
                "classes": arguments.classes,
                "height": height,
                "width": width,
                "batch": batch,
                "dtype": "float32",
                "threads": threads,
                "isa": cpu.isa(),
                "exact": int(exact),
                "seed": arguments.seed,
                "other_load": "" if load is None else f"{load:.3f}",
            }
            rows = [{**cell, **row} for row in rows]
            title += f", {cpu.isa()}" + (", exact" if exact else "")
            print(f"{title}\n{_text(measured, limits)}")
            busy = disturbance([{k: str(v) for k, v in (rows[0] | {"device": "cpu"}).items()}])
            if busy is not None:
                print(
                    f"Other processes kept {busy:.1f} processors busy meanwhile: do not trust "
                    "these times."
                )
            print(flush=True)
            if not arguments.no_files:
                results.append_rows(arguments.csv, rows, tuple(results.PROFILE_COLUMNS))
            panels.append(measured_roofline(title, measured, limits))
    if not arguments.no_files:
        draw_measured_rooflines(panels, picture)
        print(f"Written: {arguments.csv}, {picture}")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Checks what else the command line asks for.

    Raises:
        CommandError: An option does not go with ``--profile``.
    """
    if arguments.device.type != "cpu":
        raise CommandError("--profile is of the CPU's engine: leave --device out", 2)
    for option in ("providers", "compile", "memory"):
        if getattr(arguments, option):
            raise CommandError(
                f"--profile looks at the fused engine alone: leave --{option} out", 2
            )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _advance(bar: tqdm[NoReturn], part: float) -> None:
    bar.update(max(0, int(100 * part) - bar.n))


_NUMBERS = (
    *("min us", "p50 us", "GFLOP/s", "of peak", "executed", "of peak"),
    *("MB", "GB/s", "of total"),
)


def _numbers(step: StepProfile, limits: Machine, total: StepProfile) -> list[str]:
    arithmetic = ["-"] * 4
    if step.macs > 0:
        arithmetic = [
            f"{step.flops / 1e9:.1f}",
            f"{step.flops / limits.peak:.1%}",
            f"{step.executed_flops / 1e9:.1f}",
            f"{step.executed_flops / limits.peak:.1%}",
        ]
    return [
        f"{1e6 * step.fastest:.1f}",
        f"{1e6 * step.median:.1f}",
        *arithmetic,
        f"{step.bytes / 1e6:.2f}",
        f"{step.bytes / step.fastest / 1e9:.1f}",
        f"{step.fastest / total.fastest:.1%}",
    ]


def _text(measured: Profile, limits: Machine) -> str:
    """The tables of one network on one input."""
    total = measured.total
    lines = []
    for index, step in enumerate(measured.steps):
        algorithm = step.algorithm
        for part, seconds in (("transform", step.transform), ("reduction", step.reduction)):
            if seconds > 0:
                algorithm += f", {part} {seconds / step.median:.0%}"
        line = [step.name, step.operation, algorithm, str(index)]
        lines.append([*line, *_numbers(step, limits, total)])
    table = format_table(["module", "operation", "algorithm", "step", *_NUMBERS], lines, left=3)
    sums = [*measured.sums(), measured.convolutions(), total]
    kinds = format_table(
        ["kind", "steps", *_NUMBERS],
        [[s.kind, str(s.steps), *_numbers(s, limits, total)] for s in sums if s.steps],
    )
    return (
        f"{table}\n\n{kinds}\n\n"
        f"{measured.calls} calls: {1e3 * measured.call_fastest:.3f} ms, median "
        f"{1e3 * measured.call_median:.3f}, without the profiler; the steps' minima add up to "
        f"{1e3 * total.fastest:.3f} ms.\n"
        f"Peak of an FMA loop: {limits.peak / 1e9:.1f} GFLOP/s, "
        f"{limits.peak_one_thread / 1e9:.1f} on one thread. Reading from memory: "
        f"{limits.bandwidth / 1e9:.1f} GB/s.\n"
        "GFLOP/s count direct convolution, so Winograd's may exceed the peak; executed are the "
        "multiplications done."
    )
