"""``threshnet-fast bench``: latency of the fused engine against its peers."""

from __future__ import annotations

import argparse
import difflib
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..backends import cpu
from ..models import create_model
from ..plan import lower
from . import machine, memory, pictures, results
from .arguments import check_model, image_size, positive_float, positive_integer
from .errors import CommandError
from .pictures import Picture
from .providers import (
    ERROR_LIMIT,
    PROVIDERS,
    Job,
    Provider,
    build,
    random_model,
    reference_output,
    worst_error,
)
from .report import check_plot, format_table, plot, text_table
from .timing import interleave

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "latency of the fused engine against PyTorch and other engines"

DESCRIPTION = """\
Runs ThreshNet95 (or what --model names) on photographs, checks every engine against float64, then
times all of them in turns on the same weights and the same input. Weights are random: this is
about speed and about agreement, not about accuracy.

Without arguments: 224x224 batch 1, 32x32 batch 1 and 32x32 batch 32, about 20 seconds each."""

_DEFAULT_CELLS = ((224, 224, 1), (32, 32, 1), (32, 32, 32))
_DEFAULT_SECONDS = 20.0
_CSV = Path("threshnet-fast-bench.csv")
_SHOWN = 6


@dataclass(frozen=True)
class _Run:
    """What is the same for all cells."""

    names: list[str]
    classes: int
    threads: int
    seed: int
    pictures: list[Picture]
    measure_memory: bool
    common: dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--model", action="append", metavar="NAME", help="model, repeatable (default threshnet95)"
    )
    what.add_argument(
        "--cell",
        action="append",
        type=_cell,
        metavar="SIZE:BATCH",
        help="input, repeatable, for example 224:1, 32:32 or 160x288:4",
    )
    what.add_argument(
        "--size",
        nargs="+",
        type=image_size,
        metavar="SIZE",
        help="instead of --cell: sizes, for example 224 or 160x288; all are combined with --batch",
    )
    what.add_argument("--batch", nargs="+", type=positive_integer, metavar="N", help="batch sizes")
    what.add_argument(
        "--classes", type=positive_integer, default=10, metavar="N", help="classes (default 10)"
    )
    what.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--image", action="append", metavar="PATH", help="picture to run on, repeatable"
    )
    source.add_argument("--random-input", action="store_true", help="no pictures: random numbers")

    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--providers",
        type=_names,
        metavar="NAME,...",
        help="engines (default: all that are installed, except compile): " + ", ".join(PROVIDERS),
    )
    how.add_argument(
        "--compile", action="store_true", help="torch.compile as well; it takes minutes to compile"
    )
    how.add_argument(
        "--threads", type=positive_integer, metavar="N", help="threads (default: torch's)"
    )
    budget = how.add_mutually_exclusive_group()
    budget.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help=f"time for each input of each model (default {_DEFAULT_SECONDS:g})",
    )
    budget.add_argument(
        "--repeats", type=positive_integer, metavar="N", help="instead: rounds of all engines"
    )
    how.add_argument(
        "--memory", action="store_true", help="measure peak memory too, each in a new process"
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--csv",
        type=Path,
        default=_CSV,
        metavar="PATH",
        help="file to append to (default %(default)s)",
    )
    files.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="plot to write: .png, .svg or .pdf (default: beside the CSV file)",
    )
    files.add_argument("--no-files", action="store_true", help="write neither")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    models: list[str] = list(dict.fromkeys(arguments.model or ["threshnet95"]))
    for name in models:
        check_model(name)
    shapes = _cells(arguments)
    _check_sizes(models, shapes)
    names = _providers(arguments)
    picture: Path = arguments.plot or arguments.csv.with_suffix(".png")
    if not arguments.no_files:
        results.check_writable(arguments.csv)
        check_plot(picture)

    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    photographs: list[Picture] = []
    if arguments.image:
        photographs = [pictures.load_picture(path) for path in arguments.image]
    elif not arguments.random_input:
        photographs = pictures.find_pictures()
    setting = _Run(
        names,
        arguments.classes,
        threads,
        arguments.seed,
        photographs,
        arguments.memory,
        _common(photographs),
    )
    print(_introduction(setting))

    rows: list[dict[str, object]] = []
    failed = False
    for name in models:
        model = random_model(name, setting.classes, setting.seed)
        if photographs:
            _classify(model, name, shapes[0], setting)
        elif not arguments.random_input:
            print(
                "No photograph is available (install scikit-image, or name one with --image): "
                "the input is random.\n"
            )
        for shape in shapes:
            cell = _bench_cell(model, name, shape, arguments, setting)
            text = [{key: str(value) for key, value in row.items()} for row in cell]
            print(text_table(text), end="\n\n", flush=True)
            failed |= any(row["status"] != "ok" for row in cell)
            rows += cell
            if not arguments.no_files:
                results.append_rows(arguments.csv, cell)
    if not arguments.no_files:
        if any(row["status"] == "ok" for row in rows):
            plot([{key: str(value) for key, value in row.items()} for row in rows], picture)
            print(f"Written: {arguments.csv}, {picture}")
        else:
            print(f"Written: {arguments.csv}")
    if failed:
        raise CommandError("not everything could be measured, the tables say why")
    return 0


def _bench_cell(
    model: nn.Module,
    name: str,
    shape: tuple[int, int, int],
    arguments: argparse.Namespace,
    setting: _Run,
) -> list[dict[str, object]]:
    """Checks and times all providers on one input; returns a row for each."""
    from tqdm import tqdm

    height, width, batch = shape
    if setting.pictures:
        x = pictures.as_batch(setting.pictures, height, width, batch)
    else:
        generator = torch.Generator().manual_seed(setting.seed)
        x = torch.randn(batch, 3, height, width, generator=generator)
    job = Job(model, x, setting.threads)
    macs = lower(model, (batch, 3, height, width)).macs
    title = f"{name} {height}x{width} batch {batch}"

    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    with tqdm(total=len(setting.names) + 1, desc=title, unit="engine", disable=None) as bar:
        bar.set_postfix_str("float64 reference")
        reference = reference_output(model, x)
        limit = ERROR_LIMIT * float(reference.abs().max())
        bar.update()
        for provider in setting.names:
            bar.set_postfix_str(f"check {provider}")
            row: dict[str, object] = {
                **setting.common,
                "model": name,
                "classes": setting.classes,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "height": height,
                "width": width,
                "batch": batch,
                "dtype": "float32",
                "threads": setting.threads,
                "seed": setting.seed,
                "provider": provider,
                "version": PROVIDERS[provider].version(),
                "macs": macs,
                "error": "",
                "error_limit": f"{limit:.4g}",
                "peak_bytes": "",
            }
            rows[provider] = row
            built, error, status = _check(provider, job, reference, limit)
            row["status"] = status
            if error is not None:
                row["error"] = f"{error:.4g}"
            if built is not None:
                calls[provider] = built.run
            bar.update()

    # Building a provider may have changed the number of threads.
    torch.set_num_threads(setting.threads)
    others = machine.OtherLoad()
    with tqdm(
        total=100, desc=title, disable=None, bar_format="{desc}: {percentage:3.0f}%|{bar}|"
    ) as bar:
        samples = interleave(
            calls,
            seconds=None if arguments.repeats else arguments.seconds or _DEFAULT_SECONDS,
            rounds=arguments.repeats,
            progress=lambda part: _advance(bar, 100 * part),
        )
    load = others.stop()
    for provider, sample in samples.items():
        rows[provider].update(
            {
                "other_load": "" if load is None else f"{load:.3f}",
                "calls": len(sample.nanoseconds),
                **{
                    key: f"{sample.milliseconds(fraction):.4f}"
                    for key, fraction in (
                        ("min_ms", 0.0),
                        ("p20_ms", 0.2),
                        ("p50_ms", 0.5),
                        ("p80_ms", 0.8),
                    )
                },
                "gflops": f"{2e-6 * macs / sample.milliseconds(0.0):.2f}",
            }
        )
    _compare(list(rows.values()))
    if setting.measure_memory:
        for provider in tqdm(calls, desc=f"{title} memory", unit="engine", disable=None):
            used = memory.measure(provider, job, name, setting.classes, setting.seed)
            if used is not None:
                rows[provider]["peak_bytes"] = used.peak
    return [{key: row.get(key, "") for key in results.COLUMNS} for row in rows.values()]


def _advance(bar: tqdm[Any], to: float) -> None:
    bar.update(max(0, int(to) - bar.n))


def _check(
    name: str, job: Job, reference: Tensor, limit: float
) -> tuple[Provider | None, float | None, str]:
    """Builds a provider and compares its output.

    Returns:
        The provider, None where it must not be timed; its error; ``"ok"`` or what is wrong.
    """
    try:
        provider = build(name, job)
        error = worst_error(provider.as_tensor(provider.run()), reference)
    except Exception as problem:
        # Whatever a peer raises is a result: it is reported, and the others are measured.
        text = " ".join(str(problem).split()) or type(problem).__name__
        return None, None, text[:300]
    if not error <= limit:
        return None, error, f"wrong result: error {error:.3g}, at most {limit:.3g} is allowed"
    return provider, error, "ok"


def _compare(rows: Sequence[dict[str, object]]) -> None:
    """Fills in how much faster than the best peer each provider is."""
    for time, ratio in (("min_ms", "speedup_min"), ("p50_ms", "speedup_p50")):
        timed = [row for row in rows if row.get(time)]
        best = min(
            (float(str(row[time])) for row in timed if not PROVIDERS[str(row["provider"])].ours),
            default=None,
        )
        if best is not None:
            for row in timed:
                row[ratio] = f"{best / float(str(row[time])):.4f}"


def _classify(model: nn.Module, name: str, shape: tuple[int, int, int], setting: _Run) -> None:
    """Prints what the network makes of the pictures, by float64 PyTorch and by ``model(x)``."""
    height, width, _ = shape
    shown = setting.pictures[:_SHOWN]
    x = pictures.as_batch(shown, height, width, len(shown))
    reference = reference_output(model, x)
    if len(shown) > 1:
        reference = _balance(model, x, reference)
    with torch.no_grad():
        output = model(x)
    reason = cpu.unavailable_reason()
    engine = f"model(x), fused on {cpu.isa()}" if reason is None else "model(x), not fused"
    lines = []
    for index, picture in enumerate(shown):
        ours, theirs = output[index], reference[index]
        lines.append(
            [
                picture.name,
                f"class {int(theirs.argmax())}, {float(theirs.max()):+.6f}",
                f"class {int(ours.argmax())}, {float(ours.max()):+.6f}",
                f"{worst_error(ours, theirs):.1e}",
            ]
        )
    print(f"{name} on photographs ({shown[0].source}), {height}x{width}:")
    print(format_table(["picture", "PyTorch in float64", engine, "largest difference"], lines))
    same = int((output.argmax(1) == reference.argmax(1)).sum())
    print(
        f"{same} of {len(shown)} predictions agree. The weights are random, not trained (only the "
        "classifier's bias is set,\nso that no class wins everywhere): a class is a number without "
        "meaning.\n",
        flush=True,
    )


def _balance(model: nn.Module, x: Tensor, reference: Tensor) -> Tensor:
    """Moves the classifier's bias so that no class wins on all pictures; returns the new output."""
    classifier = getattr(model, "get_classifier", nn.Identity)()
    if not isinstance(classifier, nn.Linear):
        return reference
    with torch.no_grad():
        classifier.bias.sub_(reference.mean(0).to(classifier.bias.dtype))
    return reference_output(model, x)


def _introduction(setting: _Run) -> str:
    common = setting.common
    lines = [
        f"{common['processor']}, {common['processors']} processors usable, "
        + ("1 thread" if setting.threads == 1 else f"{setting.threads} threads"),
        f"threshnet_fast {__version__}, torch {common['torch']}, Python {common['python']}"
        + (f", commit {common['commit']}" if common["commit"] else ""),
    ]
    absent = {
        name: reason
        for name, spec in PROVIDERS.items()
        if name not in setting.names and spec.by_default and (reason := spec.objection())
    }
    if absent:
        lines.append("Left out: " + "; ".join(f"{n} ({r})" for n, r in absent.items()))
    return "\n".join(lines) + "\n"


def _common(photographs: Sequence[Picture]) -> dict[str, object]:
    return {
        "run": uuid.uuid4().hex[:12],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "input": photographs[0].source if photographs else "random",
        "processor": machine.processor(),
        "processors": machine.usable_processors(),
        "flags": " ".join(machine.instruction_sets()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.release()}",
    }


def _cells(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    if arguments.cell and (arguments.size or arguments.batch):
        raise CommandError("--cell already names sizes and batches: leave --size, --batch out", 2)
    if arguments.cell:
        return list(dict.fromkeys(arguments.cell))
    if arguments.size or arguments.batch:
        sizes = arguments.size or [(224, 224)]
        batches = arguments.batch or [1]
        return list(dict.fromkeys((*size, batch) for size in sizes for batch in batches))
    return list(_DEFAULT_CELLS)


def _check_sizes(models: Sequence[str], shapes: Sequence[tuple[int, int, int]]) -> None:
    for name in models:
        with torch.device("meta"):
            least = getattr(create_model(name), "min_size", 1)
        for height, width, _ in shapes:
            if min(height, width) < least:
                raise CommandError(
                    f"size {height}x{width} is too small for {name}: expected {least} or more", 2
                )


def _providers(arguments: argparse.Namespace) -> list[str]:
    asked: list[str] | None = arguments.providers
    if arguments.compile:
        asked = [*(asked or _installed()), "compile"]
    elif asked is None:
        return _installed()
    for name in asked:
        reason = PROVIDERS[name].objection()
        if reason is not None and not PROVIDERS[name].ours:
            raise CommandError(f"--providers {name}: {reason}", 2)
    return [name for name in PROVIDERS if name in asked]


def _installed() -> list[str]:
    # The engine itself stays in the list where it is broken: that is a failure, not an absence.
    return [
        name
        for name, spec in PROVIDERS.items()
        if spec.by_default and (spec.ours or spec.objection() is None)
    ]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected one name or more")
    for name in names:
        if name not in PROVIDERS:
            near = difflib.get_close_matches(name.lower(), PROVIDERS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(PROVIDERS)}"
            raise argparse.ArgumentTypeError(f"unknown provider {name!r}: {hint}")
    return names


def _cell(text: str) -> tuple[int, int, int]:
    size, colon, batch = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected SIZE:BATCH, for example 224:1")
    return (*image_size(size), positive_integer(batch))
