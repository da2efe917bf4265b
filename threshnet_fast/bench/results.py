"""The CSV file of measurements: one row for each provider, model and input shape of a run."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import CommandError

__all__ = [
    "COLUMNS",
    "FOREIGN_COLUMNS",
    "PROFILE_COLUMNS",
    "TRAINING_COLUMNS",
    "append_rows",
    "check_writable",
    "latest_rows",
    "read_rows",
]

COLUMNS: dict[str, str] = {
    "run": "identifier of the interleaved run that the row is part of",
    "time": "start of the run, UTC, ISO 8601",
    "commit": "commit of the source tree, + where it was edited; empty outside of one",
    "model": "name of the model",
    "classes": "outputs of the classifier",
    "parameters": "trainable parameters of the model",
    "height": "height of the input",
    "width": "width of the input",
    "batch": "images of the input",
    "dtype": "type of weights and input; tf32 is float32 that is multiplied in TF32",
    "threads": "threads of every provider; on a GPU, of the host",
    "seed": "seed of the weights",
    "input": "where the input is from: scikit-image, matplotlib, --image or random",
    "provider": "name of the provider, as --providers takes it",
    "version": "version of the provider; for this package also the instruction set or architecture",
    "status": "ok, or why there are no times",
    "macs": "multiply-adds of one call, those on padding included",
    "calls": "timed calls",
    "min_ms": "fastest call, milliseconds",
    "p20_ms": "20th percentile",
    "p50_ms": "median",
    "p80_ms": "80th percentile",
    "gflops": "2 * macs over the fastest call, in 10^9 a second",
    "speedup_min": "fastest call of the best peer over this one's",
    "speedup_p50": "median of the best peer over this one's",
    "error": "largest difference from the float64 reference",
    "error_limit": "the largest that would have passed",
    "peak_bytes": "memory added by the provider at the peak of a call, on a GPU as its allocator "
    "reserves it; empty where not measured",
    "other_load": "processors that other processes kept busy during the timing; empty if unknown",
    "processor": "processor",
    "processors": "processors that the process could use",
    "flags": "instruction sets of the processor",
    "python": "version of Python",
    "torch": "version of torch",
    "platform": "operating system",
    "device": "cpu or cuda",
    "accelerator": "name of the GPU; empty on the CPU, as all columns from here on are",
    "driver": "version of the GPU's driver; empty if unknown",
    "libraries": "versions of CUDA or HIP, cuDNN and Triton",
    "clocks": "clocks of the GPU after the timing, of its highest, and its power limit; empty if "
    "unknown",
    "l2": "kept, or flushed before every call",
}
"""Columns of the file, in order, and what they hold."""

TRAINING_COLUMNS: dict[str, str] = COLUMNS | {
    "macs": "multiply-adds of one step: forward, gradients of weights and of inputs",
    "calls": "timed steps",
    "min_ms": "fastest step, milliseconds",
    "error": "largest difference of the output from the float64 reference",
    "task": "training: a call is a whole step",
    "optimizer": "what the step ends with",
    "steps_per_second": "of the median step",
    "gradient_error": "largest relative error, in the Euclidean norm, of a parameter's gradient or "
    "of a running statistic",
    "gradient_limit": "the largest that would have passed",
    "live_bytes": "most that tensors allocated in one step or kept for it hold at once, from the "
    "profiler; empty where not measured",
}
"""The same of a file of training steps; what differs from :data:`COLUMNS` has the same name."""

FOREIGN_COLUMNS: dict[str, str] = COLUMNS | {
    "prepare_s": "seconds from the module to its first output: conversion, compilation, packing",
}
"""The same of a file of modules of others; what differs from :data:`COLUMNS` comes last."""

PROFILE_COLUMNS: dict[str, str] = {
    "run": "identifier of the run that the row is part of",
    "time": "start of the run, UTC, ISO 8601",
    "commit": "commit of the source tree, + where it was edited; empty outside of one",
    "model": "name of the model",
    "classes": "outputs of the classifier",
    "height": "height of the input",
    "width": "width of the input",
    "batch": "images of the input",
    "dtype": "type of weights and input",
    "threads": "threads that worked",
    "isa": "instruction set of the kernels",
    "exact": "1 where only direct convolution was allowed, else 0",
    "seed": "seed of the weights",
    "input": "where the input is from: scikit-image, matplotlib, --image or random",
    "calls": "profiled calls",
    "step": "number of the step, from 0",
    "name": "module that it comes from",
    "operation": "what it computes",
    "kind": "stem (the convolution that reads the image), a convolution's window, pool or head",
    "algorithm": "how: direct, packed (direct, on a gathered and normalised input) or winograd, "
    "with the size of its tiles",
    "macs": "multiply-adds as direct convolution counts them, those on padding included",
    "executed_macs": "multiplications that the algorithm does",
    "bytes": "features and weights read and written, once each",
    "min_us": "fastest of the calls, microseconds",
    "p50_us": "median of the calls",
    "transform_us": "of the median, about what transforming inputs in a pass before took",
    "reduction_us": "of the median, about what adding partial sums in a pass behind took",
    "gflops": "2 * macs over the fastest time, in 10^9 a second",
    "executed_gflops": "the same for executed_macs",
    "peak_share": "gflops over peak_gflops",
    "executed_peak_share": "executed_gflops over peak_gflops",
    "gbytes_per_second": "bytes over the fastest time, in 10^9 a second",
    "share": "fastest time over the sum of those of all steps",
    "peak_gflops": "what an FMA loop reached in this run on all threads, in 10^9 a second",
    "peak_gflops_one_thread": "the same on one thread",
    "read_gbytes_per_second": "what all threads reached in reading from memory, in 10^9 a second",
    "call_min_ms": "fastest call without the profiler, milliseconds",
    "call_p50_ms": "median call without the profiler",
    "other_load": "processors that other processes kept busy meanwhile; empty if unknown",
    "processor": "processor",
    "processors": "processors that the process could use",
    "flags": "instruction sets of the processor",
    "python": "version of Python",
    "torch": "version of torch",
    "platform": "operating system",
}
"""Columns of a CSV file of ``threshnet-fast profile``, in order, and what they hold."""

CELL = (
    *("model", "classes", "height", "width", "batch", "dtype", "threads"),
    *("device", "accelerator", "l2"),
)
"""The columns that say what was run, and on which GPU."""


def check_writable(path: Path, columns: Sequence[str] = tuple(COLUMNS)) -> None:
    """Raises unless rows can be appended to the file, before an hour is spent measuring.

    Args:
        path: The file, which need not exist.
        columns: The columns that it has or will have.

    Raises:
        CommandError: The folder does not exist, the file cannot be written, or has other columns.
    """
    try:
        with path.open("a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
        if header is None:
            path.unlink()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot write {path}: {reason}") from error
    if header is not None and header != list(columns):
        raise CommandError(
            f"cannot append to {path}: its columns are not those of this version; name another file"
        )


def append_rows(
    path: Path,
    rows: Iterable[Mapping[str, object]],
    columns: Sequence[str] = tuple(COLUMNS),
) -> None:
    """Appends rows, and the header before the first one.

    Args:
        path: The file.
        rows: Values by column; columns that are missing stay empty.
        columns: The columns of the file.

    Raises:
        ValueError: A row has a column that is not in ``columns``.
        CommandError: As :func:`check_writable`.
    """
    check_writable(path, columns)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, columns: Sequence[str] = tuple(COLUMNS)) -> list[dict[str, str]]:
    """Reads all rows.

    Args:
        path: The file.
        columns: The columns that it must have.

    Raises:
        CommandError: The file cannot be read, or its columns are not those of this version.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"cannot read {path}: {reason}") from error
    if list(reader.fieldnames or ()) != list(columns):
        raise CommandError(f"cannot use {path}: its columns are not those of this version")
    return rows


def latest_rows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Keeps, of what was run more than once, the last run; rows of one run stay together.

    Numbers of different runs are never mixed: a table shows, for a model and an input shape,
    providers that took turns.
    """
    last: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in CELL)
        kept = last.get(key)
        if kept is None or kept[0]["run"] != row["run"]:
            last[key] = kept = []
        kept.append(dict(row))
    return [row for group in last.values() for row in group]
