"""Windows of convolutions and pools: what they are, and how large a map they make."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..graph.ir import UnsupportedModule

__all__ = ["Phase", "Window", "of_convolution", "of_pool", "of_transposed_convolution"]

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


@dataclass(frozen=True)
class Phase:
    """The pixels of a transposed convolution's result that lie its stride apart: a convolution.

    Attributes:
        window: Its window; padding below and to the right follows from the size.
        taps: Of each row and each column of the window, which one of the transposed convolution's
            it is; None for zeros.
        start: Row and column of the first of the pixels.
        stride: Their distances.
        size: How many rows and columns of them there are.
    """

    window: Window
    taps: tuple[tuple[int | None, ...], tuple[int | None, ...]]
    start: _Pair
    stride: _Pair
    size: _Pair

    def weight(self, weight: Tensor) -> Tensor:
        """Returns the weight of the convolution.

        Args:
            weight: ``[Co, Ci, kh, kw]``, that of the transposed convolution.
        """
        for axis, taps in zip((2, 3), self.taps, strict=True):
            zero = torch.zeros_like(weight.narrow(axis, 0, 1))
            parts = [zero if tap is None else weight.narrow(axis, tap, 1) for tap in taps]
            weight = torch.cat(parts, axis)
        return weight


def of_transposed_convolution(
    conv: nn.ConvTranspose2d, name: str, sizes: _Pair
) -> tuple[_Pair, list[Phase]]:
    """Divides a transposed convolution into convolutions.

    Input pixel ``i`` adds ``x[i] * w[k]`` to output pixel ``i * stride + k * dilation - padding``,
    in each direction. So of the output pixels ``start + stride * q`` each reads the input pixels
    ``q + (start + padding - k * dilation) / stride`` of all taps ``k`` for which that is a whole
    number: windows of those taps, the last one first.

    Args:
        conv: The convolution.
        name: Its name in the network.
        sizes: Height and width of the map that it reads.

    Returns:
        Height and width of its result, and the convolutions, each of which writes pixels of its
        own.

    Raises:
        UnsupportedModule: It makes nothing of the map, or its settings are none that PyTorch takes.
    """
    stride = _pair(conv.stride, "stride", name, 1)
    dilation = _pair(conv.dilation, "dilation", name, 1)
    padding = _pair(conv.padding, "padding", name, 0)
    more = _pair(conv.output_padding, "output_padding", name, 0)
    kernel = conv.weight.shape[2:]
    if conv.padding_mode != "zeros":
        raise UnsupportedModule(f"{name} has padding_mode {conv.padding_mode!r}, expected 'zeros'")
    for axis in range(2):
        if more[axis] >= max(stride[axis], dilation[axis]):
            raise UnsupportedModule(f"{name} has output_padding {more}, expected less than stride")
    if stride == (1, 1) and any(
        padding[axis] > dilation[axis] * (kernel[axis] - 1) for axis in range(2)
    ):
        raise UnsupportedModule(f"{name} cuts off more than its window adds to the map")
    out = [
        (sizes[axis] - 1) * stride[axis]
        - 2 * padding[axis]
        + dilation[axis] * (kernel[axis] - 1)
        + more[axis]
        + 1
        for axis in range(2)
    ]
    if min(out) < 1:
        raise UnsupportedModule(f"{name} makes nothing of a map of {sizes[0]}x{sizes[1]}")
    rows, columns = (
        [
            _phase(start, out[axis], kernel[axis], stride[axis], padding[axis], dilation[axis])
            for start in range(min(stride[axis], out[axis]))
        ]
        for axis in range(2)
    )
    phases = []
    for top, row in enumerate(rows):
        for left, column in enumerate(columns):
            window = Window(
                (len(row.taps), len(column.taps)),
                (1, 1),
                (row.before, column.before),
                (0, 0),
                (row.dilation, column.dilation),
            )
            taps, size = (row.taps, column.taps), (row.pixels, column.pixels)
            phases.append(Phase(window, taps, (top, left), stride, size))
    return (out[0], out[1]), phases


class _Direction(NamedTuple):
    """A phase in one direction."""

    taps: tuple[int | None, ...]
    before: int
    dilation: int
    pixels: int


def _phase(
    start: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> _Direction:
    count = -(-(out - start) // stride)
    found = [tap for tap in range(kernel) if (start + padding - tap * dilation) % stride == 0]
    if not found:
        return _Direction((None,), 0, 1, count)
    # Neighbouring ones are stride / gcd taps apart.
    distance = dilation // math.gcd(dilation, stride) if len(found) > 1 else 1
    first = (start + padding - found[-1] * dilation) // stride
    # Zeros take the place of what would be a negative padding.
    missing = max(-(-first // distance), 0)
    taps = (*(None,) * missing, *reversed(found))
    return _Direction(taps, missing * distance - first, distance, count)


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
