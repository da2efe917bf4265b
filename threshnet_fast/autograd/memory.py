"""Memory of maps that is used again, in the same step of a training and in the next.

What a pass backward lets go of, a later layer's gradient needs, and the next step needs all of it.
Given back to the system in between, its pages would be mapped and filled with zeros each time.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["Pool"]


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

    def take(self, pixels: int, channels: int) -> Tensor:
        """Returns a map in float32, of any values."""
        with self._lock:
            free = self._free.get(pixels * channels)
            map = free.pop() if free else None
        if map is None:
            return torch.empty(pixels, channels)
        return map.view(pixels, channels)

    def give(self, map: Tensor) -> None:
        """Takes back a map that :meth:`take` returned, which nobody uses any more."""
        with self._lock:
            self._free.setdefault(map.numel(), []).append(map)

    def clear(self) -> None:
        """Lets go of all that is free."""
        self.begin(None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is free."""
        with self._lock:
            return sum(map.nbytes for maps in self._free.values() for map in maps)
