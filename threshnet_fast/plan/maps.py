"""Maps of a plan that is being made: where they lie, and what is not stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .affine import Affine
from .ir import Segment

__all__ = ["Map", "Pending", "bounds_of", "joined", "pairs", "spans"]


@dataclass(frozen=True)
class Map:
    """Where a value lies: segments of equal size.

    Attributes:
        segments: They, in the order of its channels.
        height: Rows.
        width: Columns.
    """

    segments: tuple[Segment, ...]
    height: int
    width: int

    @property
    def channels(self) -> int:
        """Channels of all segments."""
        return sum(segment.channels for segment in self.segments)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.height * self.width

    def part(self, begin: int, end: int) -> Map:
        """Returns channels ``[begin, end)``."""
        parts = []
        first = 0
        for segment in self.segments:
            low, high = max(begin - first, 0), min(end - first, segment.channels)
            if low < high:
                parts.append(Segment(segment.buffer, segment.channel + low, high - low))
            first += segment.channels
        return Map(tuple(parts), self.height, self.width)


@dataclass(frozen=True)
class Pending:
    """A value that is not stored: ``act(source * scale + shift)``, to be applied by its readers.

    Attributes:
        source: What is stored.
        affine: Scale and shift, or None.
        activation: What follows them, or None.
        slope: That of a leaky ReLU below zero.
    """

    source: Map
    affine: Affine | None
    activation: str | None = None
    slope: float = 0.0

    def part(self, begin: int, end: int) -> Pending:
        """Returns channels ``[begin, end)``."""
        affine = None if self.affine is None else self.affine.part(begin, end)
        return Pending(self.source.part(begin, end), affine, self.activation, self.slope)


def bounds_of(*maps: Map) -> list[int]:
    """The channels at which a segment of some map begins or ends."""
    bounds = {0}
    for found in maps:
        end = 0
        for segment in found.segments:
            end += segment.channels
            bounds.add(end)
    return sorted(bounds)


def spans(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Returns what lies between neighbouring bounds."""
    return list(itertools.pairwise(bounds))


def pairs(*maps: Map) -> Iterator[tuple[Segment, ...]]:
    """The segments of maps of as many channels, each cut where a segment of any of them ends."""
    for begin, end in spans(bounds_of(*maps)):
        yield tuple(found.part(begin, end).segments[0] for found in maps)


def joined(segments: list[Segment], growing: set[int]) -> tuple[Segment, ...]:
    """Segments, with those that lie side by side in the buffer of a growing block made one."""
    result = segments[:1]
    for segment in segments[1:]:
        last = result[-1]
        adjacent = (segment.buffer, segment.channel) == (last.buffer, last.channel + last.channels)
        if adjacent and segment.buffer in growing:
            result[-1] = Segment(last.buffer, last.channel, last.channels + segment.channels)
        else:
            result.append(segment)
    return tuple(result)
