"""Memory planning: every buffer's place in one arena, by lifetime."""

from __future__ import annotations

from dataclasses import dataclass

from .ir import FLOAT_BYTES, Plan
from .limits import GROUP

__all__ = ["Arena", "plan_memory"]

_PAGE = 4096


@dataclass(frozen=True)
class Arena:
    """Places in an arena, in elements.

    Attributes:
        offsets: Start of each buffer; None for the inputs and outputs, which lie outside.
        pitches: Distance between neighbouring pixels of each buffer.
        size: Elements in the arena.
    """

    offsets: tuple[int | None, ...]
    pitches: tuple[int, ...]
    size: int


def plan_memory(plan: Plan) -> Arena:
    """Gives buffers that are alive at the same time different places.

    Buffers are placed from the largest to the smallest, each at the lowest offset that is free
    during its whole life: from the first step that writes it to the last that reads it.

    Args:
        plan: The plan.

    Returns:
        Offsets and pitches, multiples of 16 elements in the arena. There a pitch is 16 elements
        more than the channels where pixels of float32 would otherwise lie a multiple of 1024 bytes
        apart and share few of the cache's sets.
    """
    outside = {*plan.inputs, *plan.output_buffers}
    lives: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(plan.steps):
        for segment in (*step.inputs, step.output):
            first, _ = lives.get(segment.buffer, (index, index))
            lives[segment.buffer] = (first, index)

    pitches = [buffer.pitch or buffer.channels for buffer in plan.buffers]
    sizes: dict[int, int] = {}
    for buffer in lives:
        if buffer in outside:
            continue
        pitch = -(-plan.buffers[buffer].channels // GROUP) * GROUP
        if FLOAT_BYTES * pitch % 1024 == 0:
            pitch += GROUP
        pitches[buffer] = pitch
        size = plan.input_shape[0] * plan.buffers[buffer].pixels * pitch
        sizes[buffer] = -(-size // (_PAGE // FLOAT_BYTES)) * (_PAGE // FLOAT_BYTES)

    offsets: list[int | None] = [None] * len(plan.buffers)
    placed: list[int] = []
    for buffer in sorted(sizes, key=lambda index: (-sizes[index], index)):
        offset = 0
        neighbours = [other for other in placed if _overlap(lives[buffer], lives[other])]
        for other in sorted(neighbours, key=lambda index: offsets[index] or 0):
            start = offsets[other] or 0
            if offset + sizes[buffer] <= start:
                break
            offset = max(offset, start + sizes[other])
        offsets[buffer] = offset
        placed.append(buffer)
    size = max(((offsets[buffer] or 0) + sizes[buffer] for buffer in sizes), default=0)
    return Arena(tuple(offsets), tuple(pitches), size)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]
