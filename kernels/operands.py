"""What the operators do with their tensors before and after a launch.

Operators take tensors of any strides and any number of segments; the kernels take a handful of
pitched segments and packed weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Protocol

import torch
from torch import Tensor

from . import autotuning, configurations, gradients, implicit_gemm, launch, layout
from .gradients import Gate, Window
from .layout import PackedWeight

__all__ = [
    "MAX_SEGMENTS",
    "Target",
    "convolve",
    "empty_map",
    "gather",
    "of_segments",
    "pack_affine",
    "pack_vector",
    "pack_weight",
    "scatter",
    "sum_pixels",
    "sum_rows",
    "unpack_vector",
    "weight_gradient",
    "window_of",
]

MAX_SEGMENTS = 8
"""Segments that a kernel reads where they lie; more are concatenated first.

Each number of segments is a kernel of its own, compiled at its first use.
"""


class Target(Protocol):
    """What launches are prepared for."""

    @property
    def precision(self) -> str:
        """How float32 is multiplied, ``"ieee"`` or ``"tf32"``."""

    @property
    def architecture(self) -> str:
        """What kernels are compiled for, for example ``"sm_90"``."""

    @property
    def multiprocessors(self) -> int:
        """How many the device has."""


def gather(xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns segments with the channels of ``xs`` that the kernels can read."""
    if len(xs) > MAX_SEGMENTS:
        return [layout.to_pitched(torch.cat(list(xs), 1))]
    return [layout.to_pitched(x) for x in xs]


def scatter(dxs: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the gradient of each of ``xs``, given those of :func:`gather`'s segments."""
    if len(dxs) == len(xs):
        return list(dxs)
    parts = torch.split(dxs[0], [x.shape[1] for x in xs], 1)
    return [part.clone(memory_format=torch.channels_last) for part in parts]


def empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns an uninitialised channels_last map of the dtype and on the device of ``like``."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def pack_weight(weight: Tensor, channels: Sequence[int]) -> PackedWeight:
    """Packs a weight for segments of these numbers of channels, in one copy where it can."""
    out_channels, in_channels, height, width = weight.shape
    if any(count % layout.GROUP for count in (*channels, out_channels)):
        return layout.pack_weight(weight, channels, weight.dtype)
    data = weight.detach().permute(2, 3, 1, 0).reshape(height * width, in_channels, out_channels)
    return PackedWeight(data.contiguous(), (height, width), tuple(channels), out_channels)


def pack_vector(vector: Tensor, channels: Sequence[int]) -> Tensor:
    """Packs a vector for segments of these numbers of channels; no copy where none is needed."""
    if any(count % layout.GROUP for count in channels):
        return layout.pack_vector(vector, channels)
    return vector.detach().to(torch.float32).contiguous()


def pack_affine(scale: Tensor, shift: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packs scale and shift for segments of these numbers of channels."""
    return pack_vector(scale, channels), pack_vector(shift, channels)


def unpack_vector(vector: Tensor, channels: Sequence[int]) -> Tensor:
    """Returns the entries of a packed vector without the padding of the segments."""
    starts = layout.group_starts(channels)
    return torch.cat([vector[i : i + count] for i, count in zip(starts, channels, strict=True)])


def of_segments(t: Tensor, dim: int, xs: Sequence[Tensor], chosen: Sequence[bool]) -> Tensor:
    """Returns the slices of ``t`` for some of ``xs``; its dimension ``dim`` runs over channels."""
    if all(chosen):
        return t
    parts = torch.split(t, [x.shape[1] for x in xs], dim)
    return torch.cat(list(compress(parts, chosen)), dim)


def window_of(x: Tensor, weight: Tensor, stride: int, padding: int) -> Window:
    """Returns the window of a convolution of ``x``."""
    height, width = x.shape[2:]
    rows, columns = weight.shape[2:]
    return Window(
        (rows, columns),
        stride,
        padding,
        (height, width),
        (
            (height + 2 * padding - rows) // stride + 1,
            (width + 2 * padding - columns) // stride + 1,
        ),
    )


def convolve(
    segments: Sequence[Tensor],
    weight: PackedWeight,
    window: Window,
    target: Target,
    *,
    prologue: tuple[Tensor, Tensor] | None = None,
    output_scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolves with the tiles that suit the target; see :func:`.implicit_gemm.convolve`.

    Returns:
        ``[N, Co, Ho, Wo]`` in channels_last format.
    """
    first = segments[0]
    (_, tap_rows), (_, tap_columns) = window.live
    problem = configurations.Problem(
        pixels=first.shape[0] * window.out_size[0] * window.out_size[1],
        out_channels=layout.padded(weight.out_channels),
        channels=weight.data.shape[1],
        taps=tap_rows * tap_columns,
        dtype=first.dtype,
        precision=target.precision,
    )
    configuration = autotuning.configuration_for(
        problem, target.architecture, target.multiprocessors, first.device
    )
    y = empty_map(first, (first.shape[0], weight.out_channels, *window.out_size))
    size = implicit_gemm.partials_size(y, configuration.split_k)
    launch.run(
        implicit_gemm.convolve(
            segments,
            weight,
            y,
            stride=window.stride,
            padding=window.padding,
            prologue=prologue,
            bias=bias,
            relu=relu,
            precision=target.precision,
            configuration=configuration,
            partials=torch.empty(size, dtype=torch.float32, device=y.device) if size else None,
            output_scale=output_scale,
        )
    )
    return y


def weight_gradient(
    grad: Tensor,
    segments: Sequence[Tensor],
    weight: PackedWeight,
    window: Window,
    target: Target,
    *,
    dw: Tensor | None,
    gate: Gate = gradients.OPEN,
    prologue: tuple[Tensor, Tensor] | None = None,
    products: Tensor | None = None,
) -> None:
    """Computes the gradient of a weight; see :func:`.gradients.weight_gradient`."""
    configuration = gradients.choose_weight_gradient(
        window, grad.shape[0], weight, target.architecture, target.multiprocessors
    )
    size = gradients.weight_gradient_size(weight, window, configuration)
    launch.run(
        gradients.weight_gradient(
            grad,
            segments,
            weight,
            window,
            dw,
            gate=gate,
            prologue=prologue,
            partials=torch.empty(size, dtype=torch.float32, device=grad.device),
            products=products,
            precision=target.precision,
            configuration=configuration,
        )
    )


def sum_pixels(x: Tensor, gate: Gate = gradients.OPEN) -> Tensor:
    """Adds up all pixels of a pitched map; see :func:`.gradients.column_sums`.

    Returns:
        float32, an entry for each channel.
    """
    launches, sums = gradients.column_sums(x, gate)
    launch.run(launches)
    return sums


def sum_rows(x: Tensor) -> Tensor:
    """Adds up the rows of a dense float32 matrix, always in the same order."""
    return sum_pixels(x[:, :, None, None])
