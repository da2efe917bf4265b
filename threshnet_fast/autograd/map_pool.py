"""Memory of maps that is used again, in the same step of a training and in the next.

What a pass backward lets go of, a later layer's gradient needs, and the next step needs all of it.
Given back to the system in between, its pages would be mapped and filled with zeros each time.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["Pool", "of_the_system"]

_BYTES = torch.float32.itemsize


class Pool:
    """Maps that nobody uses, for as long as steps are alike. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step: Hashable = None
        self._free: dict[int, list[Tensor]] = {}

    def begin(self, step: Hashable) -> None:
        """Begins a step; where it is another one than the last, what is free is let go of.

        Args:
            step: What the sizes of all maps depend on.
        """
        with self._lock:
            if step != self._step:
                self._step = step
                self._free.clear()

    def take(self, floats: int) -> Tensor:
        """Returns a vector in float32, of any values."""
        with self._lock:
            free = self._free.get(floats)
            memory = free.pop() if free else None
        return torch.empty(floats) if memory is None else memory

    def give(self, memory: Tensor) -> None:
        """Takes back what :meth:`take` returned, which nobody uses any more."""
        with self._lock:
            self._free.setdefault(memory.numel(), []).append(memory)

    def clear(self) -> None:
        """Lets go of all that is free."""
        self.begin(None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is free."""
        with self._lock:
            return sum(map.nbytes for maps in self._free.values() for map in maps)


def of_the_system(floats: int) -> Tensor:
    """Memory that bypasses the C library, which would keep what is freed, in pieces of all sizes.

    A large map does not fit where two small ones were, so that a step would take far more memory
    than it ever uses at once.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(floats)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, floats * _BYTES, flags=flags), dtype=torch.float32)
