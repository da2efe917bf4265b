"""Windows of convolutions and pools: what they are, and how large a map they make."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from ..graph.ir import UnsupportedModule

__all__ = ["Window", "of_convolution", "of_pool"]

_Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A window; every pair is down and to the right.

    Attributes:
        kernel: Taps.
        stride: Steps.
        padding: Pixels above and to the left of the map.
        end: Pixels below and to the right of the map.
        dilation: Distances of the taps.
        ceil: Whether a last window may reach beyond the padding.
    """

    kernel: _Pair
    stride: _Pair
    padding: _Pair
    end: _Pair
    dilation: _Pair = (1, 1)
    ceil: bool = False

    def padded(self, before: _Pair, after: _Pair) -> Window:
        """Returns the same with more padding.

        Args:
            before: Pixels above and to the left.
            after: Pixels below and to the right.
        """
        padding = self.padding[0] + before[0], self.padding[1] + before[1]
        end = self.end[0] + after[0], self.end[1] + after[1]
        return dataclasses.replace(self, padding=padding, end=end)

    def size(self, height: int, width: int) -> _Pair:
        """Returns the height and width of what it makes of a map; less than 1 for nothing."""
        return self._extent(0, height), self._extent(1, width)

    def valid_taps(self, sizes: _Pair, out_sizes: _Pair) -> int:
        """Returns the taps of all windows that fall on the map.

        Args:
            sizes: Height and width of the map.
            out_sizes: Those of what it makes.
        """
        return self._valid(0, sizes[0], out_sizes[0]) * self._valid(1, sizes[1], out_sizes[1])

    def _extent(self, axis: int, size: int) -> int:
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        free = size + self.padding[axis] + self.end[axis] - span
        stride = self.stride[axis]
        if free < 0 or not self.ceil:
            return free // stride + 1
        count = -(-free // stride) + 1
        # The last window has to begin on the map or on the padding before it.
        return count - ((count - 1) * stride >= size + self.padding[axis])

    def _valid(self, axis: int, size: int, out_size: int) -> int:
        starts = [position * self.stride[axis] - self.padding[axis] for position in range(out_size)]
        if self.dilation[axis] == 1:
            return sum(
                max(min(start + self.kernel[axis], size) - max(start, 0), 0) for start in starts
            )
        taps = range(0, self.kernel[axis] * self.dilation[axis], self.dilation[axis])
        return sum(0 <= start + tap < size for start in starts for tap in taps)


def of_convolution(conv: nn.Conv2d, name: str) -> Window:
    """Returns the window of a convolution.

    Args:
        conv: The convolution.
        name: Its name in the network.

    Raises:
        UnsupportedModule: Its settings are none of a convolution with zeros around the map.
    """
    kernel = conv.weight.shape[2], conv.weight.shape[3]
    if conv.padding_mode != "zeros":
        raise UnsupportedModule(f"{name} has padding_mode {conv.padding_mode!r}, expected 'zeros'")
    stride = _pair(conv.stride, "stride", name, 1)
    dilation = _pair(conv.dilation, "dilation", name, 1)
    padding: object = conv.padding
    if padding == "same":
        total = [space * (taps - 1) for space, taps in zip(dilation, kernel, strict=True)]
        before = total[0] // 2, total[1] // 2
        end = total[0] - before[0], total[1] - before[1]
        return Window(kernel, stride, before, end, dilation)
    before = (0, 0) if padding == "valid" else _pair(padding, "padding", name, 0)
    return Window(kernel, stride, before, before, dilation)


def of_pool(pool: nn.MaxPool2d | nn.AvgPool2d, name: str) -> Window:
    """Returns the window of a pool.

    Args:
        pool: The pool.
        name: Its name in the network.

    Raises:
        UnsupportedModule: It returns indices, has dilation, or settings that PyTorch refuses.
    """
    kernel = _pair(pool.kernel_size, "kernel_size", name, 1)
    stride = _pair(pool.stride, "stride", name, 1)
    padding = _pair(pool.padding, "padding", name, 0)
    if isinstance(pool, nn.MaxPool2d):
        if _pair(pool.dilation, "dilation", name, 1) != (1, 1):
            raise UnsupportedModule(f"{name} has dilation {pool.dilation}, expected 1")
        if pool.return_indices:
            raise UnsupportedModule(f"{name} returns indices")
    if any(2 * pad > taps for pad, taps in zip(padding, kernel, strict=True)):
        raise UnsupportedModule(f"{name} has padding {padding}, expected at most half of {kernel}")
    return Window(kernel, stride, padding, padding, ceil=bool(pool.ceil_mode))


def _pair(value: object, what: str, name: str, least: int) -> _Pair:
    """Two numbers, or the one that stands for both, twice."""
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, tuple | list) and len(value) == 1:
        value = (*value, *value)
    if (
        not isinstance(value, tuple | list)
        or len(value) != 2
        or not all(isinstance(number, int) and number >= least for number in value)
    ):
        raise UnsupportedModule(f"{name} has {what} {value!r}, expected two numbers from {least}")
    return value[0], value[1]
