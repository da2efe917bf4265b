"""Convolution of a few channels in any strides: the first layer of a network.

``y = act(conv(x) + bias)``. The input is the network's own, so it comes as it is: NCHW, NHWC,
sliced, expanded. With so few channels the taps do not fill a tile of the reduction; channels and
taps are therefore one axis, channels innermost, and the usual 3x3 window on 3 channels is a single
product of 32 columns, 27 of them used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Configuration
from .implicit_gemm import output_pixel, store_tile
from .launch import Launch
from .layout import PackedWeight, pack_weight, padded, pitch

__all__ = ["convolve_stem", "pack_stem"]

_MAX_BLOCK_K = 32
_MAX_BLOCK_N = 64
_MAX_ELEMENTS = 16
"""Of the input, and of the sums, that a thread holds at most: every element of the input has an
address of its own, 64 bits each, and more of them would spill."""


@triton.jit
def stem_kernel(
    x_ptr,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    weight_ptr,
    bias_ptr,
    y_ptr,
    y_pitch,
    pixels,
    in_height,
    in_width,
    out_height,
    out_width,
    stride,
    padding,
    out_channels,
    weight_columns,
    CHANNELS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of ``BLOCK_M`` output pixels by ``BLOCK_N`` output channels."""
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0)
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists = m < pixels
    n_exists = n < out_channels
    image, row, column = output_pixel(m, out_height, out_width)
    top = row * stride - padding
    left = column * stride - padding
    origins = x_ptr + (
        image.to(tl.int64) * image_stride
        + top.to(tl.int64) * row_stride
        + left.to(tl.int64) * column_stride
    )

    LENGTH: tl.constexpr = CHANNELS * KERNEL_ROWS * KERNEL_COLUMNS
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, LENGTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_exists = k < LENGTH
        tap = k // CHANNELS
        channel = k - tap * CHANNELS
        tap_row = tap // KERNEL_COLUMNS
        tap_column = tap - tap_row * KERNEL_COLUMNS
        offsets = (
            channel.to(tl.int64) * channel_stride
            + tap_row.to(tl.int64) * row_stride
            + tap_column.to(tl.int64) * column_stride
        )
        y_in = top[:, None] + tap_row[None, :]
        x_in = left[:, None] + tap_column[None, :]
        inside = (y_in >= 0) & (y_in < in_height) & (x_in >= 0) & (x_in < in_width)
        x = tl.load(
            origins[:, None] + offsets[None, :],
            mask=inside & m_exists[:, None] & k_exists[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + k[:, None] * weight_columns + n[None, :],
            mask=k_exists[:, None] & n_exists[None, :],
            other=0.0,
        )
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    store_tile(sums, bias_ptr, y_ptr, y_pitch, m, n, m_exists, n_exists, BIAS, RELU)


def pack_stem(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs ``[Co, Ci, kh, kw]`` with one axis for taps and channels, channels innermost.

    Returns:
        A weight whose ``data`` is ``[1, kh * kw * Ci, Co]``, both padded to whole groups.
    """
    out_channels, channels, height, width = weight.shape
    rows = weight.detach().permute(0, 2, 3, 1).reshape(out_channels, -1, 1, 1)
    data = pack_weight(rows, [rows.shape[1]], dtype).data
    return PackedWeight(data, (height, width), (channels,), out_channels)


def convolve_stem(
    x: Tensor,
    weight: PackedWeight,
    y: Tensor,
    *,
    stride: int,
    padding: int,
    bias: Tensor | None,
    relu: bool,
    precision: str,
    configuration: Configuration,
) -> list[Launch]:
    """Prepares ``act(conv(x) + bias)``.

    Args:
        x: ``[N, Ci, H, W]`` in any strides, in the dtype of the weight. Meant for a few channels;
            any number works.
        weight: From :func:`pack_stem`.
        y: Pitched ``[N, C, Ho, Wo]``. It may have more channels than the weight, up to whole
            groups: those get ``act(0)``.
        stride: Step of the window.
        padding: Zeros around the input.
        bias: float32 of whole groups, or None.
        relu: Whether to rectify the result.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        configuration: Tile sizes, an upper limit here; ``block_k`` follows from the weight, and the
            reduction is never split.

    Returns:
        One launch.
    """
    _, channels, in_height, in_width = x.shape
    batch, out_channels, out_height, out_width = y.shape
    height, width = weight.kernel
    pixels = batch * out_height * out_width
    threads = 32 * configuration.num_warps
    block_k = min(padded(channels * height * width), _MAX_BLOCK_K)
    block_n = min(configuration.block_n, _MAX_BLOCK_N)
    block_m = min(configuration.block_m, _MAX_ELEMENTS * threads // max(block_k, block_n))
    tiles = triton.cdiv(pixels, block_m) * triton.cdiv(out_channels, block_n)
    strides = x.stride()
    return [
        Launch(
            stem_kernel,
            (tiles,),
            {
                "x_ptr": x,
                "image_stride": strides[0],
                "channel_stride": strides[1],
                "row_stride": strides[2],
                "column_stride": strides[3],
                "weight_ptr": weight.data,
                "bias_ptr": bias,
                "y_ptr": y,
                "y_pitch": pitch(y),
                "pixels": pixels,
                "in_height": in_height,
                "in_width": in_width,
                "out_height": out_height,
                "out_width": out_width,
                "stride": stride,
                "padding": padding,
                "out_channels": out_channels,
                "weight_columns": weight.data.shape[2],
                "CHANNELS": channels,
                "KERNEL_ROWS": height,
                "KERNEL_COLUMNS": width,
                "BIAS": bias is not None,
                "RELU": relu,
                "PRECISION": precision,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
            },
            configuration.num_warps,
            configuration.num_stages,
        )
    ]
