"""Memory layouts that the kernels read and write.

A feature map is a tensor ``[N, C, H, W]`` whose memory is ``[N, H, W, pitch]``, the pitch at least
``C``: a dense channels_last tensor, or a slice of the channels of one. Kernels take the channels of
a concatenation in groups of :data:`GROUP`: each segment begins a new group, and the weight has rows
of zeros where a segment's last group is not full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "PackedWeight",
    "group_starts",
    "is_pitched",
    "pack_vector",
    "pack_weight",
    "padded",
    "pitch",
    "to_pitched",
    "vector_width",
]

GROUP = 16
"""Channels in a group: 32 bytes of half precision, two vector loads."""

_VECTOR_BYTES = 16


def padded(channels: int) -> int:
    """Returns the channels of all groups that ``channels`` take."""
    return -(-channels // GROUP) * GROUP


def pitch(x: Tensor) -> int:
    """Returns the distance of neighbouring pixels of a pitched tensor, in elements."""
    _, channels, height, width = x.shape
    image, _, row, pixel = x.stride()
    if width > 1:
        return pixel
    if height > 1:
        return row
    return image if x.shape[0] > 1 else channels


def is_pitched(x: Tensor) -> bool:
    """Returns whether the memory of ``x``, ``[N, C, H, W]``, is ``[N, H, W, pitch]``."""
    batch, channels, height, width = x.shape
    image, channel, row, pixel = x.stride()
    distance = pitch(x)
    return (
        (channels == 1 or channel == 1)
        and distance >= channels
        and (width == 1 or pixel == distance)
        and (height == 1 or row == width * distance)
        and (batch == 1 or image == height * width * distance)
    )


def to_pitched(x: Tensor) -> Tensor:
    """Returns ``x``, or a channels_last copy of it where its memory is not pitched."""
    return x if is_pitched(x) else x.clone(memory_format=torch.channels_last)


def vector_width(xs: Sequence[Tensor]) -> int:
    """Returns how many channels of pitched tensors can be loaded and stored at once.

    A power of two that divides the number of channels and the pitch of each of ``xs``, and their
    addresses; at most 16 bytes. Sixteen divide the padded number of channels.
    """
    size = xs[0].element_size()
    width = _VECTOR_BYTES // size
    while width > 1 and any(
        x.data_ptr() % (width * size) or pitch(x) % width or x.shape[1] % width for x in xs
    ):
        width //= 2
    return width


def group_starts(channels: Sequence[int]) -> tuple[int, ...]:
    """Returns where each of a concatenation's segments begins, in channels of whole groups."""
    starts = [0]
    for count in channels:
        starts.append(starts[-1] + padded(count))
    return tuple(starts[:-1])


@dataclass(frozen=True)
class PackedWeight:
    """A convolution's weight as the kernels read it.

    Attributes:
        data: ``[kernel height * kernel width, input channels, output channels]``, both padded to
            whole groups with zeros.
        kernel: Height and width of the window.
        channels: Channels of each segment of the input.
        out_channels: Channels of the output, without padding.
    """

    data: Tensor
    kernel: tuple[int, int]
    channels: tuple[int, ...]
    out_channels: int


def pack_weight(
    weight: Tensor, channels: Sequence[int], dtype: torch.dtype, columns: int = 0
) -> PackedWeight:
    """Packs ``[Co, sum of channels, kh, kw]`` for segments of these numbers of channels.

    Args:
        weight: The weight.
        channels: Channels of each segment.
        dtype: Of the packed weight.
        columns: Channels that the output has at least, those behind ``Co`` being 0.
    """
    out_channels, _, height, width = weight.shape
    starts = group_starts(channels)
    rows = starts[-1] + padded(channels[-1])
    columns = padded(max(out_channels, columns))
    data = torch.zeros(height * width, rows, columns, dtype=dtype, device=weight.device)
    taps = weight.detach().permute(2, 3, 1, 0).reshape(height * width, -1, out_channels)
    first = 0
    for start, count in zip(starts, channels, strict=True):
        data[:, start : start + count, :out_channels] = taps[:, first : first + count]
        first += count
    return PackedWeight(data, (height, width), tuple(channels), out_channels)


def pack_vector(vector: Tensor, channels: Sequence[int]) -> Tensor:
    """Packs ``[sum of channels]`` as float32 in whole groups, padded with zeros."""
    starts = group_starts(channels)
    data = torch.zeros(starts[-1] + padded(channels[-1]), dtype=torch.float32, device=vector.device)
    first = 0
    for start, count in zip(starts, channels, strict=True):
        data[start : start + count] = vector.detach()[first : first + count]
        first += count
    return data
