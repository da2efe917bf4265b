"""Tile sizes by measurement, where ``THRESHNET_FAST_AUTOTUNE=1`` asks for it.

Without, :func:`.configurations.choose` takes them from a model, and nothing here runs. What was
measured is kept in a JSON file in the user's cache folder, so that a program measures once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from .. import environment
from . import configurations, implicit_gemm, launch, layout
from .architectures import find_architecture
from .configurations import Configuration, Problem

__all__ = ["Cache", "cache_path", "choose", "configuration_for", "enabled", "measure"]

# Of all configurations, those of the lowest estimates are measured.
_MEASURED = 8

_lock = threading.Lock()


def enabled() -> bool:
    """Returns whether tiles are to be measured."""
    return environment.switched_on(environment.AUTOTUNE)


def cache_path() -> Path:
    """Returns where measurements are kept: ``threshnet_fast/tiles.json`` in the cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "threshnet_fast" / "tiles.json"


class Cache:
    """Configurations by problem and device, in a JSON file.

    A file that cannot be read or written is as good as none: a warning says so. What this process
    has found is remembered without.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Configuration] = {}

    def get(self, key: str) -> Configuration | None:
        """Returns what was found for a key, or None."""
        known = self._known.get(key)
        return _configuration(self._read().get(key)) if known is None else known

    def put(self, key: str, configuration: Configuration, *, keep: bool = True) -> None:
        """Adds an entry; other processes see the file before or after, never in between.

        Args:
            key: What it was found for.
            configuration: What was found.
            keep: Whether to write it into the file.
        """
        self._known[key] = configuration
        if not keep:
            return
        entries = {**self._read(), key: dataclasses.asdict(configuration)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, suffix=".json")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(entries, file, indent=1, sort_keys=True)
                Path(name).replace(self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            warnings.warn(f"tile sizes cannot be kept in {self._path}: {error}", stacklevel=2)

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(f"{self._path} is ignored: {error}", stacklevel=2)
            return {}
        if not isinstance(entries, dict):
            warnings.warn(f"{self._path} is ignored: it holds no table", stacklevel=2)
            return {}
        return entries


def _configuration(fields: Any) -> Configuration | None:
    names = {field.name for field in dataclasses.fields(Configuration)}
    if not isinstance(fields, dict) or set(fields) != names:
        return None
    return Configuration(**fields) if all(type(v) is int for v in fields.values()) else None


@functools.lru_cache(maxsize=8)
def _cache(path: Path) -> Cache:
    return Cache(path)


def configuration_for(
    problem: Problem,
    architecture: str,
    multiprocessors: int,
    device: torch.device,
    *,
    measured: bool | None = None,
) -> Configuration:
    """Returns the configuration of a problem: measured where asked for, else that of the model.

    Args:
        problem: What to compute.
        architecture: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.
        multiprocessors: Of the device.
        device: What it is computed on; only GPUs are measured on.
        measured: Whether to measure; None means :func:`enabled`.
    """
    measured = enabled() if measured is None else measured
    if measured and device.type == "cuda":
        return choose(problem, architecture, multiprocessors, device)
    return configurations.choose(problem, architecture, multiprocessors)


def choose(
    problem: Problem,
    architecture: str,
    multiprocessors: int,
    device: torch.device,
    *,
    cache: Cache | None = None,
    time: Callable[[Problem, Configuration, torch.device], float] | None = None,
) -> Configuration:
    """Returns the fastest configuration, measured now or before.

    Where nothing can be measured, since a CUDA graph is being captured or nothing of the table
    runs, it is the model's choice.

    Args:
        problem: What to compute.
        architecture: ``"sm_90"``, ``"gfx942"``.
        multiprocessors: Of the device.
        device: What to measure on.
        cache: Where measurements are kept; None means :func:`cache_path`.
        time: Takes the time of a configuration; None means :func:`measure`.
    """
    cache = _cache(cache_path()) if cache is None else cache
    time = measure if time is None else time
    key = _key(problem, architecture, device)
    every = configurations.configurations_for(problem, find_architecture(architecture))
    with _lock:
        found = cache.get(key)
        # A file may have been edited, or be of another version's table.
        if found in every:
            return found
        if _capturing(device):
            return configurations.choose(problem, architecture, multiprocessors)
        times = {
            each: time(problem, each, device)
            for each in _considered(every, problem, architecture, multiprocessors)
        }
        found = min(times, key=times.__getitem__)
        if math.isfinite(times[found]):
            cache.put(key, found)
            return found
        found = configurations.choose(problem, architecture, multiprocessors)
        cache.put(key, found, keep=False)
        return found


def _key(problem: Problem, architecture: str, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    fields = "/".join(map(str, dataclasses.astuple(problem)))
    return f"triton {triton.__version__}/{architecture}/{name}/{fields}"


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _considered(
    every: list[Configuration], problem: Problem, architecture: str, multiprocessors: int
) -> list[Configuration]:
    found = find_architecture(architecture)
    return sorted(
        every, key=lambda each: configurations.estimate(problem, each, found, multiprocessors)
    )[:_MEASURED]


def measure(problem: Problem, configuration: Configuration, device: torch.device) -> float:
    """Times a convolution of a problem's sizes, on a square map, in milliseconds.

    Returns:
        The least of many calls; infinity where the configuration does not run on the device.
    """
    side = max(1, math.isqrt(problem.pixels))
    kernel = 1 if problem.taps <= 1 else 3
    options = {"dtype": problem.dtype, "device": device}
    x = torch.zeros(1, problem.channels, side, side, **options)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(1, problem.out_channels, side, side, **options)
    y = y.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(problem.out_channels, problem.channels, kernel, kernel, device=device)
    size = implicit_gemm.partials_size(y, configuration.split_k)
    launches = implicit_gemm.convolve(
        [x],
        layout.pack_weight(weight, [problem.channels], problem.dtype),
        y,
        stride=1,
        padding=kernel // 2,
        prologue=None,
        bias=None,
        relu=False,
        precision=problem.precision,
        configuration=configuration,
        partials=torch.empty(size, device=device) if size else None,
    )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            return float(triton.testing.do_bench(lambda: launch.run(launches), return_mode="min"))
        except TritonError:
            return math.inf
        except RuntimeError as error:
            # So the compiler reports what it cannot lower.
            if "PassManager" not in str(error):
                raise
            return math.inf
