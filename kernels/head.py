"""Global average pooling and the classifier behind it in one kernel.

``y[n, k] = sum_c mean_ij(x[n, c, i, j]) * weight[k, c] + bias[k]``. A program computes a tile of
classes, for one image or for sixteen. One image: all its threads lie along the channels, multiply
in float32, and add up across threads once, at the end. Sixteen images: a matrix product, for which
each tile of the weight is read once instead of sixteen times; the means are then rounded to the
dtype of the weight. Every tile of classes averages the map anew, from the cache, which costs less
than another kernel as long as the map is small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .layout import padded, pitch

__all__ = ["head", "pack_head"]

_ONE_IMAGE_CLASSES = 32
_MANY_IMAGES_TILE = 16, 64
"""Images and classes of a program, at most; sixteen images are the least a product can have."""

_ONE_IMAGE_TILE = 64, 256
"""Pixels and channels loaded at a time by 8 warps: 8 vectors in flight for each thread."""

_CHANNELS = 32
"""Channels reduced at a time for many images."""

_UNROLL = 8
"""Pixels loaded at a time for many images, so that their latencies overlap."""

_MULTIPROCESSORS = 100
"""Of the device, for the choice between the kernels: about right for those worth a choice."""


@triton.jit
def one_image_kernel(
    x_ptr,
    x_pitch,
    weight_ptr,
    bias_ptr,
    y_ptr,
    map_pixels,
    channels,
    classes,
    weight_columns,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes ``BLOCK_N`` classes of one image, reducing ``BLOCK_C`` channels at a time."""
    class_tiles = tl.cdiv(classes, BLOCK_N)
    image = tl.program_id(0) // class_tiles
    n = tl.program_id(0) % class_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_exists = n < classes
    first_pixel = image.to(tl.int64) * map_pixels

    products = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for first_channel in range(0, channels, BLOCK_C):
        c = first_channel + tl.arange(0, BLOCK_C)
        c_exists = c < channels
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, map_pixels, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            sums += tl.load(
                x_ptr + ((first_pixel + p) * x_pitch)[:, None] + c[None, :],
                mask=(p < map_pixels)[:, None] & c_exists[None, :],
                other=0.0,
            ).to(tl.float32)
        mean = tl.sum(sums, 0) / map_pixels
        weight = tl.load(
            weight_ptr + c[:, None] * weight_columns + n[None, :],
            mask=c_exists[:, None] & (n < weight_columns)[None, :],
            other=0.0,
        )
        products += mean[:, None] * weight.to(tl.float32)
    result = tl.sum(products, 0)
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n_exists, other=0.0)
    tl.store(
        y_ptr + image.to(tl.int64) * classes + n,
        result.to(y_ptr.dtype.element_ty),
        mask=n_exists,
    )


@triton.jit
def many_images_kernel(
    x_ptr,
    x_pitch,
    weight_ptr,
    bias_ptr,
    y_ptr,
    images,
    map_pixels,
    channels,
    classes,
    weight_columns,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes one tile of ``BLOCK_M`` images by ``BLOCK_N`` classes."""
    class_tiles = tl.cdiv(classes, BLOCK_N)
    m = tl.program_id(0) // class_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % class_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists = m < images
    n_exists = n < classes
    first_pixel = m.to(tl.int64) * map_pixels

    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_channel in range(0, channels, BLOCK_C):
        c = first_channel + tl.arange(0, BLOCK_C)
        c_exists = c < channels
        mask = m_exists[:, None] & c_exists[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, map_pixels, UNROLL):
            for p in tl.static_range(UNROLL):
                sums += tl.load(
                    x_ptr + ((first_pixel + first + p) * x_pitch)[:, None] + c[None, :],
                    mask=mask & (first + p < map_pixels),
                    other=0.0,
                ).to(tl.float32)
        weight = tl.load(
            weight_ptr + c[:, None] * weight_columns + n[None, :],
            mask=c_exists[:, None] & (n < weight_columns)[None, :],
            other=0.0,
        )
        means = (sums / map_pixels).to(weight.dtype)
        result = tl.dot(means, weight, result, input_precision=PRECISION)
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n_exists, other=0.0)[None, :]
    tl.store(
        y_ptr + (m.to(tl.int64) * classes)[:, None] + n[None, :],
        result.to(y_ptr.dtype.element_ty),
        mask=m_exists[:, None] & n_exists[None, :],
    )


def pack_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Packs ``[classes, C]`` as ``[C, classes]``, both padded to whole groups with zeros."""
    classes, channels = weight.shape
    data = torch.zeros(padded(channels), padded(classes), dtype=dtype, device=weight.device)
    data[:channels, :classes] = weight.detach().T
    return data


def _is_product_cheaper(images: int, classes: int, map_pixels: int) -> bool:
    """Whether sixteen images at a time make the busiest multiprocessor read less.

    It reads ``images * map_pixels + classes`` elements a channel for each of its programs: more
    images share a tile of the weight, but the maps are shared out among fewer programs.
    """

    def reads(block_m: int, block_n: int) -> int:
        programs = triton.cdiv(images, block_m) * triton.cdiv(classes, block_n)
        return triton.cdiv(programs, _MULTIPROCESSORS) * (block_m * map_pixels + block_n)

    return reads(*_MANY_IMAGES_TILE) < reads(1, _ONE_IMAGE_CLASSES)


def head(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, precision: str
) -> list[Launch]:
    """Prepares ``linear(global_average_pool(x))``.

    Args:
        x: Pitched ``[N, C, H, W]``; ``C`` as of the weight, or up to whole groups.
        weight: From :func:`pack_head`, in the dtype of ``x``.
        bias: float32 ``[classes]``, or None.
        y: ``[N, classes]``, contiguous.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied where it is a matrix product;
            one image at a time is always exact.

    Returns:
        One launch.
    """
    images, channels, height, width = x.shape
    classes = y.shape[1]
    map_pixels = height * width
    arguments = {
        "x_ptr": x,
        "x_pitch": pitch(x),
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": y,
        "map_pixels": map_pixels,
        "channels": channels,
        "classes": classes,
        "weight_columns": weight.shape[1],
        "BIAS": bias is not None,
    }
    if _is_product_cheaper(images, classes, map_pixels):
        block_m, block_n = _MANY_IMAGES_TILE
        programs = triton.cdiv(images, block_m) * triton.cdiv(classes, block_n)
        arguments |= {
            "images": images,
            "PRECISION": precision,
            "UNROLL": min(map_pixels, _UNROLL),
            "BLOCK_M": block_m,
            "BLOCK_C": _CHANNELS,
            "BLOCK_N": block_n,
        }
        return [Launch(many_images_kernel, (programs,), arguments)]
    block_p, block_c = _ONE_IMAGE_TILE
    block_n = min(padded(triton.next_power_of_2(classes)), _ONE_IMAGE_CLASSES)
    arguments |= {
        "BLOCK_P": min(triton.next_power_of_2(map_pixels), block_p),
        "BLOCK_C": block_c,
        "BLOCK_N": block_n,
    }
    programs = images * triton.cdiv(classes, block_n)
    return [Launch(one_image_kernel, (programs,), arguments, num_warps=8)]
