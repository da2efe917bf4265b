"""Interleaved timing: providers take turns, so that all see the same noise."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Sample", "interleave", "percentile"]

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


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    progress: Callable[[float], None] | None = None,
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
                _turn(call, times[name])
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


def _turn(call: Callable[[], object], times: list[int]) -> None:
    clock = time.perf_counter_ns
    settled = clock() + _SETTLE_NS
    call()
    while clock() < settled:
        call()
    finished = clock() + _TIMED_NS
    before = clock()
    while True:
        call()
        after = clock()
        times.append(after - before)
        if after >= finished:
            break
        before = clock()
