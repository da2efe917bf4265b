"""``threshnet-fast bench``: latency of the fused engine against its peers."""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bench import machine, peak_memory, results
from ..bench.comparison import checked, classifier_of, common_columns, output_scale, time_in_turns
from ..bench.cpu_engines import reset_compiler
from ..bench.job import Job, Spec
from ..bench.networks import random_model, reference_output, worst_error
from ..bench.precision import PRECISIONS, Precision
from ..bench.registry import dtypes, registry
from ..bench.report import check_plot, format_table, plot, text_table
from ..bench.timing import CudaTimer, host_timer
from ..engines import cpu
from ..engines.select import is_plain
from ..errors import CommandError
from ..models import create_model
from ..plan import lower
from ..runtime.explain import explain
from ..version import __version__
from . import pictures, profile
from .arguments import (
    check_device,
    check_model,
    device,
    image_size,
    positive_float,
    positive_integer,
    threads,
)
from .pictures import Picture

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
the next one begins.

With --profile: the fused engine alone, on the CPU, step by step: the time of each, GFLOP/s, their
share of the processor's peak, bytes; as a table, a CSV file and a roofline plot."""

_DEFAULT_CELLS = ((224, 224, 1), (32, 32, 1), (32, 32, 32))
_DEFAULT_SECONDS = 20.0
_CSV = Path("threshnet-fast-bench.csv")
_SHOWN = 6
# A cache is as good as empty when a few times its size has been written.
_FLUSHED_CACHES = 4
_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class _Run:
    """What is the same for all cells; ``names`` are those of providers by precision."""

    names: dict[str, list[str]]
    classes: int
    threads: int
    seed: int
    pictures: list[Picture]
    measure_memory: bool
    device: torch.device
    flushed: Tensor | None
    common: dict[str, object]

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"


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
    budget = how.add_mutually_exclusive_group()
    budget.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help=f"time for each input of each model (default {_DEFAULT_SECONDS:g}, with --profile "
        f"{profile.DEFAULT_SECONDS:g})",
    )
    budget.add_argument(
        "--repeats", type=positive_integer, metavar="N", help="instead: rounds of all engines"
    )
    how.add_argument(
        "--profile",
        action="store_true",
        help="no comparison: what each step of the fused engine takes, on the CPU",
    )
    how.add_argument(
        "--memory", action="store_true", help="measure peak memory too, each in a new process"
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--csv",
        type=Path,
        metavar="PATH",
        help=f"file to append to (default {_CSV}, with --profile {profile.CSV})",
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
    if arguments.profile:
        profile.check(arguments)
    place = check_device(arguments.device)
    _check_precisions(arguments, place)
    for name in models:
        check_model(name)
    shapes = _cells(arguments)
    _check_sizes(models, shapes)
    _check_memory(models, shapes, place)
    names = {} if arguments.profile else _providers(arguments)
    arguments.csv = arguments.csv or (profile.CSV if arguments.profile else _CSV)
    picture: Path = arguments.plot or arguments.csv.with_suffix(".png")
    if not arguments.no_files:
        columns = results.PROFILE_COLUMNS if arguments.profile else results.COLUMNS
        results.check_writable(arguments.csv, tuple(columns))
        check_plot(picture)

    count = arguments.threads or (torch.get_num_threads() if place.type == "cpu" else 1)
    torch.set_num_threads(count)
    photographs: list[Picture] = []
    if arguments.image:
        photographs = [pictures.load_picture(path) for path in arguments.image]
    elif not arguments.random_input:
        photographs = pictures.find_pictures()
    setting = _Run(
        names,
        arguments.classes,
        count,
        arguments.seed,
        photographs,
        arguments.memory,
        place,
        _memory_to_flush(place) if arguments.flush_l2 else None,
        common_columns(
            photographs[0].source if photographs else "random", place, arguments.flush_l2
        ),
    )
    print(_introduction(setting))
    if arguments.profile:
        networks = {name: random_model(name, setting.classes, setting.seed) for name in models}
        inputs = {shape: _input(shape, setting) for shape in shapes}
        return profile.run(arguments, networks, inputs, count, setting.common, picture)
    with torch.cuda.device(place) if setting.on_gpu else contextlib.nullcontext():
        return _run(models, shapes, arguments, setting, picture)


def _run(
    models: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    arguments: argparse.Namespace,
    setting: _Run,
    picture: Path,
) -> int:
    """Measures every model and input on the current device; returns the exit status."""
    rows: list[dict[str, object]] = []
    failed = False
    for name in models:
        model = random_model(name, setting.classes, setting.seed)
        if setting.pictures:
            _classify(model, name, shapes[0], setting)
        elif not arguments.random_input:
            print(
                "No photograph is available (install scikit-image, or name one with --image): "
                "the input is random.\n"
            )
        for shape, dtype in [(shape, dtype) for shape in shapes for dtype in arguments.dtype]:
            with PRECISIONS[dtype].active() if setting.on_gpu else contextlib.nullcontext():
                cell = _bench_cell(model, name, shape, dtype, arguments, setting)
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


def _input(shape: tuple[int, int, int], setting: _Run) -> Tensor:
    """Photographs, or random numbers where there are none."""
    height, width, batch = shape
    if setting.pictures:
        return pictures.as_batch(setting.pictures, height, width, batch)
    generator = torch.Generator().manual_seed(setting.seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def _bench_cell(
    model: nn.Module,
    name: str,
    shape: tuple[int, int, int],
    dtype: str,
    arguments: argparse.Namespace,
    setting: _Run,
) -> list[dict[str, object]]:
    """Checks and times all providers on one input; returns a row for each.

    Args:
        model: The network, float32, on the CPU.
        name: Its name.
        shape: Height, width and batch of the input.
        dtype: A key of ``PRECISIONS``; whoever calls has set PyTorch's switches for it.
        arguments: Of the command line.
        setting: What is the same for all inputs.
    """
    from tqdm import tqdm

    height, width, batch = shape
    x = _input(shape, setting)
    precision = PRECISIONS[dtype]
    job = _job(model, x, precision, setting)
    specs = registry(setting.device.type, dtype)
    names = setting.names[dtype]
    macs = lower(model, (batch, 3, height, width), fold=False).macs
    title = f"{name} {height}x{width} batch {batch} {dtype}"

    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    with tqdm(total=len(names) + 1, desc=title, unit="engine", disable=None) as bar:
        bar.set_postfix_str("float64 reference")
        reference = reference_output(job.model, job.x)
        limit = precision.error_limit * output_scale(job.model, reference)
        bar.update()
        for provider in names:
            bar.set_postfix_str(f"check {provider}")
            row: dict[str, object] = {
                **setting.common,
                "model": name,
                "classes": setting.classes,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "height": height,
                "width": width,
                "batch": batch,
                "dtype": dtype,
                "threads": setting.threads,
                "seed": setting.seed,
                "provider": provider,
                "version": specs[provider].version(),
                "macs": macs,
                "error": "",
                "error_limit": f"{limit:.4g}",
                "peak_bytes": "",
            }
            rows[provider] = row
            built, error, status = checked(provider, job, reference, limit)
            row["status"] = status
            if error is not None:
                row["error"] = f"{error:.4g}"
            if built is not None:
                calls[provider] = built.run
            bar.update()

    time_in_turns(
        calls,
        rows,
        macs,
        title=title,
        threads=setting.threads,
        seconds=None if arguments.repeats else arguments.seconds or _DEFAULT_SECONDS,
        rounds=arguments.repeats,
        timer=CudaTimer(setting.device, setting.flushed) if setting.on_gpu else host_timer,
    )
    clocks = machine.clocks(setting.device) if setting.on_gpu else ""
    for provider in calls:
        rows[provider]["clocks"] = clocks
    if setting.measure_memory:
        measured = list(calls)
        if setting.on_gpu:
            # The processes that measure need the memory that this one holds.
            calls.clear()
            torch.cuda.empty_cache()
        for provider in tqdm(measured, desc=f"{title} memory", unit="engine", disable=None):
            used = peak_memory.measure(provider, job, name, setting.classes, setting.seed, dtype)
            if used is not None:
                rows[provider]["peak_bytes"] = used.peak
    return [{key: row.get(key, "") for key in results.COLUMNS} for row in rows.values()]


def _job(model: nn.Module, x: Tensor, precision: Precision, setting: _Run) -> Job:
    """The network and its input where they are to run, in the precision that is asked for."""
    if any(name.startswith("compile") for names in setting.names.values() for name in names):
        reset_compiler()
    if not setting.on_gpu and precision.dtype is torch.float32:
        return Job(model, x, setting.threads)
    if setting.on_gpu:
        torch.cuda.empty_cache()
    model = copy.deepcopy(model).to(setting.device, precision.dtype)
    return Job(model, x.to(setting.device, precision.dtype), setting.threads)


def _classify(model: nn.Module, name: str, shape: tuple[int, int, int], setting: _Run) -> None:
    """Prints what the network makes of the pictures, by float64 PyTorch and by ``model(x)``."""
    height, width, _ = shape
    shown = setting.pictures[:_SHOWN]
    x = pictures.as_batch(shown, height, width, len(shown))
    reference = reference_output(model, x)
    if len(shown) > 1:
        reference = _balance(model, x, reference)
    precision = PRECISIONS["float32"]
    with precision.active() if setting.on_gpu else contextlib.nullcontext(), torch.no_grad():
        job = _job(model, x, precision, setting)
        output = job.model(job.x).cpu()
        engine = f"model(x), {_engine(job)}"
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


def _engine(job: Job) -> str:
    """What runs ``model(x)``."""
    if job.x.device.type == "cpu":
        reason = cpu.unavailable_reason()
        return f"fused on {cpu.isa()}" if reason is None else "not fused"
    backend = explain(job.model, job.x).backend
    return "not fused" if is_plain(backend) else f"fused by {backend} on {job.x.device}"


def _balance(model: nn.Module, x: Tensor, reference: Tensor) -> Tensor:
    """Moves the classifier's bias so that no class wins on all pictures; returns the new output."""
    classifier = classifier_of(model)
    if classifier is None:
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
    if setting.on_gpu:
        driver = f", driver {common['driver']}" if common["driver"] else ""
        lines.append(
            f"{common['accelerator']}, {common['libraries']}{driver}, L2 cache {common['l2']}"
        )
    without: dict[str, list[str]] = {}
    for dtype, names in setting.names.items():
        absent = [
            f"{name} ({reason})"
            for name, spec in registry(setting.device.type, dtype).items()
            if name not in names and spec.by_default and (reason := spec.objection())
        ]
        if absent:
            without.setdefault("; ".join(absent), []).append(dtype)
    for text, classes in without.items():
        where = f" in {_enumerated(classes, 'and')}" if len(setting.names) > 1 else ""
        lines.append(f"Left out{where}: {text}")
    return "\n".join(lines) + "\n"


def _memory_to_flush(place: torch.device) -> Tensor:
    size = machine.l2_bytes(place)
    if size == 0:
        raise CommandError("--flush-l2: torch does not tell how large this device's cache is", 2)
    return torch.empty(_FLUSHED_CACHES * size, dtype=torch.uint8, device=place)


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


def _check_memory(
    models: Sequence[str], shapes: Sequence[tuple[int, int, int]], place: torch.device
) -> None:
    """Refuses what would run out of memory after minutes, or be ended by the system."""
    available = machine.available_memory()
    if available is None:
        return
    for name in models:
        with torch.device("meta"):
            model = create_model(name).eval()
        for height, width, batch in shapes:
            # The input, and on the CPU, in float64, the input and the largest map of the reference.
            image = 4 * 3 * height * width
            if place.type == "cpu":
                buffers = lower(model, (1, 3, height, width), fold=False).buffers
                largest = max(buffer.pixels * buffer.channels for buffer in buffers)
                image += 8 * (3 * height * width + largest)
            if batch * image > available:
                size = f"{height}" if height == width else f"{height}x{width}"
                raise CommandError(
                    f"{size}:{batch} needs at least {batch * image / 1e9:,.1f} GB of memory with "
                    f"{name}: {available / 1e9:,.1f} GB are available",
                    status=2,
                )


def _check_precisions(arguments: argparse.Namespace, place: torch.device) -> None:
    if place.type != "cpu":
        return
    possible = dtypes("cpu")
    for dtype in arguments.dtype:
        if dtype not in possible:
            expected = _enumerated(possible, "or")
            raise CommandError(f"--dtype {dtype}: on the CPU expected {expected}", 2)
    if arguments.profile and arguments.dtype != ["float32"]:
        raise CommandError("--profile is of float32: leave --dtype out", 2)
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
    return f"it does not run on {kind} in {_enumerated(names_of_dtypes, 'or')}"


def _usable(spec: Spec) -> bool:
    # The engine itself stays in the list where it is broken: that is a failure, not an absence.
    return _expected(spec) or spec.objection() is None


def _expected(spec: Spec) -> bool:
    return spec.ours and not spec.optional


def _names(text: str) -> list[str]:
    known = list(dict.fromkeys(name for kind in _DEVICE_TYPES for name in registry(kind)))
    return _listed(text, known, "provider")


def _dtypes(text: str) -> list[str]:
    return _listed(text, list(PRECISIONS), "dtype")


def _enumerated(words: Sequence[str], conjunction: str) -> str:
    """For example ``"a, b or c"``."""
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


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


def _cell(text: str) -> tuple[int, int, int]:
    size, colon, batch = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected SIZE:BATCH, for example 224:1")
    return (*image_size(size), positive_integer(batch))
