"""Interleaved timing: providers take turns, so that all see the same noise."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CudaTimer", "Sample", "host_timer", "interleave", "percentile", "progress_bar"]

# The threads of the previous provider go on spinning for a while after its last call. Nothing is
# timed before they have gone to sleep.
_SETTLE_NS = 5_000_000
_TIMED_NS = 20_000_000
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """The timed calls of one provider, in nanoseconds, in the order in which they ran."""

    nanoseconds: tuple[int, ...]

    def milliseconds(self, fraction: float) -> float:
        """The time below which a fraction of the calls lies; 0 is the fastest call."""
        return percentile(self.nanoseconds, fraction) / 1e6


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks.

    Args:
        values: At least one value, in any order.
        fraction: 0 for the smallest to 1 for the largest.

    Raises:
        ValueError: ``values`` is empty, or ``fraction`` out of range.
    """
    if not values:
        raise ValueError("values is empty: expected at least one")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}: expected 0 to 1")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def host_timer(call: Callable[[], object]) -> int:
    """Runs a call that is finished when it returns.

    Returns:
        The nanoseconds that it took.
    """
    clock = time.perf_counter_ns
    before = clock()
    call()
    return clock() - before


class CudaTimer:
    """Times calls that a GPU works on, between two events of its own clock.

    The device is idle when a call begins, and the next one does not begin before it has finished:
    the time is a latency, with all that the host does before the last kernel can run. The first
    event is reached at once, as nothing is queued before it.

    Args:
        device: The device whose current stream the calls run on.
        flushed: Memory that is overwritten before every call (and that waited for), which evicts
            weights and features from a smaller cache. None leaves the cache as the call before
            left it.
        event: Makes an event that can be timed.
        synchronize: Waits for the device.
    """

    def __init__(
        self,
        device: torch.device,
        flushed: Tensor | None = None,
        *,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[torch.device], None] | None = None,
    ) -> None:
        self._device = device
        self._synchronize = torch.cuda.synchronize if synchronize is None else synchronize
        make_event = _timed_event if event is None else event
        self._start, self._end = make_event(), make_event()
        self._flushed = flushed

    def __call__(self, call: Callable[[], object]) -> int:
        """Runs a call and waits for it.

        Returns:
            The nanoseconds from its beginning to the end of its last kernel.
        """
        if self._flushed is not None:
            self._flushed.zero_()
        self._synchronize(self._device)
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return round(self._start.elapsed_time(self._end) * 1e6)


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    progress: Callable[[float], None] | None = None,
    timer: Callable[[Callable[[], object]], int] = host_timer,
) -> dict[str, Sample]:
    """Times callables in turns: A B C A B C and so on.

    A turn is at least one call, and at least 5 ms of calls, that is not timed (it brings the
    weights back into the caches and outlasts the spinning threads of the provider before), then
    calls that are timed one by one for at least 20 ms.

    Args:
        calls: What to time, by name; called once before, by whoever checked the result.
        seconds: Rounds go on until this time is over, three rounds at least.
        rounds: Number of rounds; exactly one of the two is given.
        progress: Called after every turn with the part of the work that is done, 0 to 1.
        timer: Runs a call and returns the nanoseconds that it took.

    Returns:
        The timed calls of each.

    Raises:
        ValueError: Not exactly one of ``seconds`` and ``rounds`` is given.
    """
    if (seconds is None) == (rounds is None):
        raise ValueError("expected exactly one of seconds and rounds")
    times: dict[str, list[int]] = {name: [] for name in calls}
    clock = time.perf_counter_ns
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        finished = 0
        while calls:
            elapsed = (clock() - start) / 1e9
            if rounds is not None and finished >= rounds:
                break
            if seconds is not None and finished >= _MIN_ROUNDS and elapsed >= seconds:
                break
            for turn, (name, call) in enumerate(calls.items(), 1):
                _turn(call, times[name], timer)
                if progress is not None:
                    part = finished + turn / len(calls)
                    if rounds is not None:
                        progress(part / rounds)
                    elif seconds is not None:
                        spent = (clock() - start) / 1e9 / seconds if seconds > 0 else 1.0
                        progress(min(spent, part / _MIN_ROUNDS, 1.0))
            finished += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Sample(tuple(values)) for name, values in times.items()}


def _turn(
    call: Callable[[], object], times: list[int], timer: Callable[[Callable[[], object]], int]
) -> None:
    clock = time.perf_counter_ns
    settled = clock() + _SETTLE_NS
    timer(call)
    while clock() < settled:
        timer(call)
    finished = clock() + _TIMED_NS
    while True:
        times.append(timer(call))
        if clock() >= finished:
            break


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; yields what moves it to a part of its length, from 0 to 1.

    Args:
        title: Stands before the bar.
    """
    from tqdm import tqdm

    with tqdm(
        total=100, desc=title, disable=None, bar_format="{desc}: {percentage:3.0f}%|{bar}|"
    ) as bar:

        def advance(part: float) -> None:
            bar.update(max(0, int(100 * part) - bar.n))

        yield advance
