"""What the tests of the CUDA kernels share: maps in guarded memory, and operands made of them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from . import cuda_library
from .cuda_library import Library, Operands, Segment, Window

__all__ = [
    "DTYPES",
    "GROUP",
    "SCHEDULES",
    "Bad",
    "Guarded",
    "PlantedBug",
    "available",
    "bits",
    "change",
    "fenced",
    "library",
    "misaligned",
    "output_map",
    "pitch",
    "pitched",
    "segment",
    "strides",
    "whole",
    "window",
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
"""In the order in which a test that takes one of them only is most useful."""

SCHEDULES = ["forward", "shuffled"]
"""Orders in which the threads of a launch run."""

GROUP = 16
"""Channels that a map has a multiple of."""

_NEIGHBOUR = 123.0
"""Beside outputs: unlike NaN, it shows also when NaN is written over it."""

_GUARD = 4096
"""Elements before and behind: more than planted bugs reach, and a multiple of 16 bytes."""


available = pytest.mark.skipif(
    cuda_library.skip_reason() is not None, reason=str(cuda_library.skip_reason())
)


def whole(channels: int) -> int:
    """Returns the channels of all groups that ``channels`` take."""
    return -(-channels // GROUP) * GROUP


@functools.cache
def library() -> Library:
    """Returns the emulated library."""
    loaded = cuda_library.load()
    assert isinstance(loaded, Library)
    return loaded


def bits(tensor: Tensor) -> Tensor:
    """Returns the elements as integers, by which also NaNs and zeros can be compared."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@dataclass(frozen=True)
class PlantedBug:
    """A kernel with one text instead of another.

    Attributes:
        name: What is wrong.
        old: What the source says.
        new: What it says with the bug.
        header: The source, of ``csrc/cuda``.
    """

    name: str
    old: str
    new: str
    header: str

    def __str__(self) -> str:
        return self.name

    def library(self, launcher: str) -> Library:
        """Returns the launchers of one source of ``csrc/cuda``, compiled with the bug."""
        bug = cuda_library.mutation(f"csrc/cuda/{self.header}", self.old, self.new)
        loaded = cuda_library.load(sources=[cuda_library.CSRC / "cuda" / launcher], mutations=bug)
        assert isinstance(loaded, Library)
        return loaded


@dataclass(frozen=True)
class Guarded:
    """An output full of NaN within memory that must stay as it is.

    Attributes:
        memory: All of it, flat.
        view: The output.
    """

    memory: Tensor
    view: Tensor

    @staticmethod
    def empty(
        shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, shift: int = 0
    ) -> Guarded:
        """Returns an output that begins ``shift`` elements behind an address aligned to 16."""
        extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        memory = torch.full((2 * _GUARD + shift + extent + 1,), _NEIGHBOUR, dtype=dtype)
        view = memory.as_strided(shape, strides, _GUARD + shift)
        view.fill_(torch.nan)
        return Guarded(memory, view)

    def assert_rest_untouched(self) -> None:
        """Asserts that nothing but the output was written."""
        rest = self.memory.clone()
        view = self.view
        rest.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(_NEIGHBOUR)
        assert (rest == _NEIGHBOUR).all(), "memory beside the output was written"


@dataclass(frozen=True)
class Bad:
    """Operands that a launcher must refuse.

    Attributes:
        message: Regular expression that finds what it must say.
        changes: Values of fields, whose names may lead into structs: ``"window.stride"``.
    """

    message: str
    changes: dict[str, Any]

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in self.changes.items())


def change(operands: Operands, changes: Mapping[str, Any]) -> Operands:
    """Returns ``operands`` after these changes to its fields."""
    for path, value in changes.items():
        name, _, inner = path.partition(".")
        if inner:
            part = getattr(operands, name)
            start = getattr(type(operands), name).offset
            fields = {each: getattr(part, each) for each, _ in part._fields_}
            for each, kind in part._fields_:
                if kind is ctypes.c_void_p:
                    fields[each] = operands.tensors[start + getattr(type(part), each).offset]
            value = type(part)(**(fields | {inner: value}))
        setattr(operands, name, value)
    return operands


def misaligned(offset: int) -> Tensor:
    """Returns memory that begins ``offset`` bytes behind an address aligned to 64."""
    memory = torch.zeros(256, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 64 + offset :]


def output_map(
    shape: Sequence[int], dtype: torch.dtype, *, gap: int = 0, shift: int = 0
) -> Guarded:
    """Returns a map ``[N, C, H, W]`` with ``gap`` elements between neighbouring pixels."""
    _, channels, height, width = shape
    distance = channels + gap
    strides = (height * width * distance, 1, width * distance, distance)
    return Guarded.empty(shape, strides, dtype, shift)


def fenced(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy, aligned to 16 bytes, between NaNs."""
    memory = torch.full((2 * _GUARD + tensor.numel(),), torch.nan, dtype=tensor.dtype)
    view = memory[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def pitched(values: Tensor, *, gap: int = 0) -> Tensor:
    """Returns a map as the kernels read it: whole groups of channels, zeros behind, NaN around.

    Args:
        values: ``[N, C, H, W]``.
        gap: Elements between neighbouring pixels.
    """
    n, c, h, w = values.shape
    memory = torch.full((n, h, w, whole(c) + gap), torch.nan, dtype=values.dtype)
    memory[..., : whole(c)] = 0
    memory[..., :c] = values.permute(0, 2, 3, 1)
    return fenced(memory).permute(0, 3, 1, 2)[:, : whole(c)]


def pitch(x: Tensor) -> int:
    """Returns the distance of neighbouring pixels of a map of this module, in elements."""
    return x.stride(3)


def segment(x: Tensor) -> Segment:
    """Returns the segment that a map of :func:`pitched` is."""
    return Segment(data=x, pitch=pitch(x), channels=x.shape[1])


def strides(x: Tensor) -> dict[str, int]:
    """Returns the strides of ``[N, C, H, W]`` by their names in structs."""
    names = ("batch_stride", "channel_stride", "height_stride", "width_stride")
    return dict(zip(names, x.stride(), strict=True))


def window(x: Tensor, kernel: tuple[int, int], stride: int, padding: int) -> Window:
    """Returns how a window moves over ``[N, C, H, W]``."""
    n, _, h, w = x.shape
    return Window(
        batch=n,
        in_height=h,
        in_width=w,
        out_height=(h + 2 * padding - kernel[0]) // stride + 1,
        out_width=(w + 2 * padding - kernel[1]) // stride + 1,
        kernel_height=kernel[0],
        kernel_width=kernel[1],
        stride=stride,
        padding=padding,
    )
