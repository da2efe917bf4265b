"""Latency of all providers on an input: each is checked, then all are timed in turns."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engines import cpu
from ..engines.select import is_plain
from ..errors import CommandError
from ..models import create_model
from ..models.network import Network
from ..plan import lower
from ..runtime.explain import explain
from ..text import enumerated
from . import machine, peak_memory, results
from .comparison import checked, classifier_of, output_scale, time_in_turns
from .cpu_engines import reset_compiler
from .job import Job
from .networks import reference_output, worst_error
from .photographs import Photograph, as_batch
from .precision import PRECISIONS, Precision
from .registry import registry
from .report import format_table
from .timing import CudaTimer, host_timer

__all__ = [
    "Run",
    "check_memory",
    "check_sizes",
    "classification",
    "input_of",
    "left_out",
    "measure",
    "memory_to_flush",
]

_SHOWN = 6
# A cache is as good as empty when a few times its size has been written.
_FLUSHED_CACHES = 4


@dataclass(frozen=True)
class Run:
    """What is the same for all inputs of a run.

    Attributes:
        names: Providers to measure by precision, in the order of the tables.
        classes: Outputs of the classifier.
        threads: Threads of every provider.
        seed: Of the weights, and of random inputs.
        photographs: What the inputs are made of; empty for random numbers.
        measure_memory: Whether to measure peak memory too.
        device: Where the networks run.
        flushed: Memory that is overwritten before every call; None for none.
        common: The columns that are the same in all rows.
        seconds: How long to time one input; None where ``rounds`` says when it ends.
        rounds: How often every provider is called; None where ``seconds`` says when it ends.
    """

    names: dict[str, list[str]]
    classes: int
    threads: int
    seed: int
    photographs: list[Photograph]
    measure_memory: bool
    device: torch.device
    flushed: Tensor | None
    common: dict[str, object]
    seconds: float | None
    rounds: int | None

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU that is measured."""
        return self.device.type != "cpu"


def input_of(shape: tuple[int, int, int], photographs: Sequence[Photograph], seed: int) -> Tensor:
    """Photographs, or random numbers where there are none.

    Args:
        shape: Height, width and batch.
        photographs: Repeated where the batch is larger.
        seed: Of random numbers.

    Returns:
        ``(batch, 3, height, width)``, float32, on the CPU.
    """
    height, width, batch = shape
    if photographs:
        return as_batch(photographs, height, width, batch)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def measure(
    model: nn.Module,
    name: str,
    shape: tuple[int, int, int],
    dtype: str,
    run: Run,
    columns: Iterable[str] = results.COLUMNS,
) -> list[dict[str, object]]:
    """Checks and times all providers on one input; returns a row for each.

    Args:
        model: The network, float32, on the CPU: one of this package, or a module of others that
            takes an image of three channels and returns a tensor.
        name: Its name.
        shape: Height, width and batch of the input.
        dtype: A key of ``PRECISIONS``.
        run: What is the same for all inputs.
        columns: The columns of the rows.
    """
    with PRECISIONS[dtype].active() if run.on_gpu else contextlib.nullcontext():
        rows = _measure(model, name, shape, dtype, run)
    return [{key: row.get(key, "") for key in columns} for row in rows]


def _measure(
    model: nn.Module, name: str, shape: tuple[int, int, int], dtype: str, run: Run
) -> list[dict[str, object]]:
    from tqdm import tqdm

    height, width, batch = shape
    precision = PRECISIONS[dtype]
    job = _job(model, input_of(shape, run.photographs, run.seed), precision, run)
    names = run.names[dtype]
    macs = _macs(model, (batch, 3, height, width))
    title = f"{name} {height}x{width} batch {batch} {dtype}"
    columns: dict[str, object] = {
        **run.common,
        "model": name,
        "classes": run.classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "height": height,
        "width": width,
        "batch": batch,
        "dtype": dtype,
        "threads": run.threads,
        "seed": run.seed,
        "macs": macs,
    }
    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    with tqdm(total=len(names) + 1, desc=title, unit="engine", disable=None) as bar:
        bar.set_postfix_str("float64 reference")
        reference = reference_output(job.model, job.x)
        limit = precision.error_limit * output_scale(job.model, reference)
        bar.update()
        for provider in names:
            bar.set_postfix_str(f"check {provider}")
            began = time.perf_counter()
            built, error, status = checked(provider, job, reference, limit)
            prepared = time.perf_counter() - began
            rows[provider] = {
                **columns,
                "provider": provider,
                "version": registry(run.device.type, dtype)[provider].version(),
                "error": "" if error is None else f"{error:.4g}",
                "error_limit": f"{limit:.4g}",
                "peak_bytes": "",
                "prepare_s": f"{prepared:.3f}",
                "status": status,
            }
            if built is not None:
                calls[provider] = built.run
            bar.update()

    time_in_turns(
        calls,
        rows,
        macs,
        title=title,
        threads=run.threads,
        seconds=run.seconds,
        rounds=run.rounds,
        timer=CudaTimer(run.device, run.flushed) if run.on_gpu else host_timer,
    )
    clocks = machine.clocks(run.device) if run.on_gpu else ""
    for provider in calls:
        rows[provider]["clocks"] = clocks
    if run.measure_memory:
        measured = list(calls)
        if run.on_gpu:
            # The processes that measure need the memory that this one holds.
            calls.clear()
            torch.cuda.empty_cache()
        for provider in tqdm(measured, desc=f"{title} memory", unit="engine", disable=None):
            used = peak_memory.measure(provider, job, name, run.classes, run.seed, dtype)
            if used is not None:
                rows[provider]["peak_bytes"] = used.peak
    return list(rows.values())


def _macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one call, those on padding included."""
    if isinstance(model, Network):
        return lower(model, shape, fold=False).macs
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


def _job(model: nn.Module, x: Tensor, precision: Precision, run: Run) -> Job:
    """The network and its input where they are to run, in the precision that is asked for."""
    if any(name.startswith("compile") for names in run.names.values() for name in names):
        reset_compiler()
    if not run.on_gpu and precision.dtype is torch.float32:
        return Job(model, x, run.threads)
    if run.on_gpu:
        torch.cuda.empty_cache()
    model = copy.deepcopy(model).to(run.device, precision.dtype)
    return Job(model, x.to(run.device, precision.dtype), run.threads)


def classification(model: nn.Module, name: str, shape: tuple[int, int, int], run: Run) -> str:
    """What the network makes of the photographs, by float64 PyTorch and by ``model(x)``: a table.

    Of several photographs, the classifier's bias is changed first so that no class wins on all.

    Args:
        model: The network, float32, on the CPU.
        name: Its name.
        shape: Height, width and batch of an input; the batch does not count.
        run: With photographs.
    """
    height, width, _ = shape
    shown = run.photographs[:_SHOWN]
    x = as_batch(shown, height, width, len(shown))
    reference = reference_output(model, x)
    if len(shown) > 1:
        reference = _balance(model, x, reference)
    precision = PRECISIONS["float32"]
    with precision.active() if run.on_gpu else contextlib.nullcontext(), torch.no_grad():
        job = _job(model, x, precision, run)
        output = job.model(job.x).cpu()
        engine = f"model(x), {_engine(job)}"
    lines = [
        [
            photograph.name,
            f"class {int(theirs.argmax())}, {float(theirs.max()):+.6f}",
            f"class {int(ours.argmax())}, {float(ours.max()):+.6f}",
            f"{worst_error(ours, theirs):.1e}",
        ]
        for photograph, ours, theirs in zip(shown, output, reference, strict=True)
    ]
    header = ["picture", "PyTorch in float64", engine, "largest difference"]
    same = int((output.argmax(1) == reference.argmax(1)).sum())
    return (
        f"{name} on photographs ({shown[0].source}), {height}x{width}:\n"
        f"{format_table(header, lines)}\n"
        f"{same} of {len(shown)} predictions agree. The weights are random, not trained (only the "
        "classifier's bias is set,\nso that no class wins everywhere): a class is a number without "
        "meaning.\n"
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


def left_out(run: Run) -> list[str]:
    """Which providers are not measured though they would be by default, and why: lines."""
    without: dict[str, list[str]] = {}
    for dtype, names in run.names.items():
        absent = [
            f"{name} ({reason})"
            for name, spec in registry(run.device.type, dtype).items()
            if name not in names and spec.by_default and (reason := spec.objection())
        ]
        if absent:
            without.setdefault("; ".join(absent), []).append(dtype)
    lines = []
    for text, classes in without.items():
        where = f" in {enumerated(classes, 'and')}" if len(run.names) > 1 else ""
        lines.append(f"Left out{where}: {text}")
    return lines


def memory_to_flush(device: torch.device) -> Tensor:
    """Memory that empties a GPU's cache when it is overwritten.

    Raises:
        CommandError: How large the cache is cannot be known.
    """
    size = machine.l2_bytes(device)
    if size == 0:
        raise CommandError("--flush-l2: torch does not tell how large this device's cache is", 2)
    return torch.empty(_FLUSHED_CACHES * size, dtype=torch.uint8, device=device)


def check_sizes(models: Sequence[str], shapes: Sequence[tuple[int, int, int]]) -> None:
    """Refuses sizes at which nothing would be left of a map.

    Args:
        models: Names of registered models.
        shapes: Heights, widths and batches.

    Raises:
        CommandError: A size is too small for a model.
    """
    for name in models:
        with torch.device("meta"):
            least = getattr(create_model(name), "min_size", 1)
        for height, width, _ in shapes:
            if min(height, width) < least:
                raise CommandError(
                    f"size {height}x{width} is too small for {name}: expected {least} or more", 2
                )


def check_memory(
    models: Sequence[str], shapes: Sequence[tuple[int, int, int]], device: torch.device
) -> None:
    """Refuses what would run out of memory after minutes, or be ended by the system.

    Args:
        models: Names of registered models.
        shapes: Heights, widths and batches.
        device: Where the networks run.

    Raises:
        CommandError: An input needs more memory than is available.
    """
    available = machine.available_memory()
    if available is None:
        return
    for name in models:
        with torch.device("meta"):
            model = create_model(name).eval()
        for height, width, batch in shapes:
            # The input, and on the CPU, in float64, the input and the largest map of the reference.
            image = 4 * 3 * height * width
            if device.type == "cpu":
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
