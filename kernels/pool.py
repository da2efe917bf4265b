"""Maximum and average over windows.

``y[n, c, i, j] = max`` or ``mean over the window at (i, j) of x[n, c, :, :]``. Padding is never
chosen as a maximum and never part of an average; NaN in a window is its maximum, as in PyTorch.
Threads lie along the channels, which are next to each other in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .implicit_gemm import output_pixel
from .launch import Launch
from .layout import pitch

__all__ = ["pool"]

_CHANNELS = 64
"""Channels of a tile at most: 128 bytes, a line of the cache, in half precision."""

_PIXELS = 16
"""Pixels of a tile at most."""

_THREAD_ELEMENTS = 8
"""Of a tile, for each thread: a vector of 16 bytes in half precision."""

_UNROLL = 9
"""Taps loaded at a time, so that their latencies overlap: a whole 3x3 window."""


@triton.jit
def pool_kernel(
    x_ptr,
    x_pitch,
    y_ptr,
    y_pitch,
    pixels,
    channels,
    in_height,
    in_width,
    out_height,
    out_width,
    kernel_columns,
    taps,
    stride,
    padding,
    AVERAGE: tl.constexpr,
    PADDED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes one tile of ``BLOCK_M`` output pixels by ``BLOCK_C`` channels."""
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0)
    m = tile // channel_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    m_exists = m < pixels
    c_exists = c < channels
    image, row, column = output_pixel(m, out_height, out_width)
    top = row * stride - padding
    left = column * stride - padding
    origin = (image * in_height + top) * in_width + left

    neutral: tl.constexpr = 0.0 if AVERAGE else float("-inf")
    result = tl.full((BLOCK_M, BLOCK_C), neutral, tl.float32)
    for first in range(0, taps, UNROLL):
        for tap in tl.static_range(UNROLL):
            tap_row = (first + tap) // kernel_columns
            tap_column = first + tap - tap_row * kernel_columns
            inside = m_exists & (first + tap < taps)
            if PADDED:
                y_in = top + tap_row
                x_in = left + tap_column
                inside &= (y_in >= 0) & (y_in < in_height) & (x_in >= 0) & (x_in < in_width)
            offsets = (origin + tap_row * in_width + tap_column).to(tl.int64) * x_pitch
            x = tl.load(
                x_ptr + offsets[:, None] + c[None, :],
                mask=inside[:, None] & c_exists[None, :],
                other=neutral,
            ).to(tl.float32)
            if AVERAGE:
                result += x
            else:
                result = tl.maximum(result, x, propagate_nan=tl.PropagateNan.ALL)
    if AVERAGE:
        result /= taps
    tl.store(
        y_ptr + (m.to(tl.int64) * y_pitch)[:, None] + c[None, :],
        result.to(y_ptr.dtype.element_ty),
        mask=m_exists[:, None] & c_exists[None, :],
    )


def pool(
    x: Tensor,
    y: Tensor,
    *,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    average: bool,
) -> list[Launch]:
    """Prepares pooling over windows.

    Args:
        x: Pitched ``[N, C, H, W]``.
        y: Pitched ``[N, C, Ho, Wo]`` in the dtype of ``x``.
        kernel: Height and width of the window; the map's own for a global average.
        stride: Step of the window.
        padding: Pixels around ``x``, at most half of the window; 0 for averages.
        average: Average, added up in float32, instead of maximum.

    Returns:
        One launch.
    """
    _, _, in_height, in_width = x.shape
    batch, channels, out_height, out_width = y.shape
    taps = kernel[0] * kernel[1]
    pixels = batch * out_height * out_width
    block_c = min(triton.next_power_of_2(channels), _CHANNELS)
    block_m = min(triton.next_power_of_2(pixels), _PIXELS)
    tiles = triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_c)
    return [
        Launch(
            pool_kernel,
            (tiles,),
            {
                "x_ptr": x,
                "x_pitch": pitch(x),
                "y_ptr": y,
                "y_pitch": pitch(y),
                "pixels": pixels,
                "channels": channels,
                "in_height": in_height,
                "in_width": in_width,
                "out_height": out_height,
                "out_width": out_width,
                "kernel_columns": kernel[1],
                "taps": taps,
                "stride": stride,
                "padding": padding,
                "AVERAGE": average,
                "PADDED": padding > 0,
                "UNROLL": min(taps, _UNROLL),
                "BLOCK_M": block_m,
                "BLOCK_C": block_c,
            },
            num_warps=max(1, block_m * block_c // (32 * _THREAD_ELEMENTS)),
        )
    ]
