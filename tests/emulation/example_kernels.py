"""Triton kernels for the tests of the emulation itself, none of which the project runs."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_kernel",
    "convolution_kernel",
    "gather_kernel",
    "matmul_kernel",
    "softmax_kernel",
    "tuned_add_kernel",
]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """``out = x + y``; the pointer of y may be None."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.load(x_ptr + i, mask=mask)
    if y_ptr is not None:
        x += tl.load(y_ptr + i, mask=mask)
    tl.store(out_ptr + i, x, mask=mask)


tuned_add_kernel = triton.autotune(
    [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((64, 2), (128, 4))],
    key=["size"],
)(add_kernel)


@triton.jit
def gather_kernel(xs, sizes, out_ptr, BLOCK: tl.constexpr):
    """Writes the tensors of a tuple one after the other."""
    i = tl.arange(0, BLOCK)
    start = 0
    for number in tl.static_range(len(xs)):
        mask = i < sizes[number]
        x = tl.load(xs[number] + i, mask=mask)
        tl.store(out_ptr + start + i, x, mask=mask)
        start += sizes[number]


@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """The softmax of each row, one program a row."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < columns
    x = tl.load(x_ptr + row * columns + i, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * columns + i, x / tl.sum(x, 0), mask=mask)


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    rows,
    columns,
    depth,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``c = a @ b`` of contiguous matrices."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (m < rows)[:, None] & (k < depth)[None, :]
        a = tl.load(a_ptr + m[:, None] * depth + k[None, :], mask=mask, other=0.0)
        mask = (k < depth)[:, None] & (n < columns)[None, :]
        b = tl.load(b_ptr + k[:, None] * columns + n[None, :], mask=mask, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(c_ptr + m[:, None] * columns + n[None, :], sums.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def convolution_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    y_ptr,
    pixels,
    height,
    width,
    in_channels,
    out_channels,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = conv3x3(relu(x * scale + shift))``, padded with zeros, of contiguous NHWC.

    The weight is ``[3, 3, in_channels, out_channels]``.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m // width % height
    column = m % width
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, 9 * tl.cdiv(in_channels, BLOCK_K)):
        tap = step // tl.cdiv(in_channels, BLOCK_K)
        k = step % tl.cdiv(in_channels, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        down = tap // 3 - 1
        right = tap % 3 - 1
        inside = (row + down >= 0) & (row + down < height) & (m < pixels)
        inside &= (column + right >= 0) & (column + right < width)
        mask = inside[:, None] & (k < in_channels)[None, :]
        pixel = m + down * width + right
        x = tl.load(x_ptr + pixel[:, None] * in_channels + k[None, :], mask=mask, other=0.0)
        scale = tl.load(scale_ptr + k, mask=k < in_channels, other=0.0)
        shift = tl.load(shift_ptr + k, mask=k < in_channels, other=0.0)
        activation = tl.maximum(x.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
        # After the activation: padding is 0, not relu(shift).
        x = tl.where(mask, activation, 0.0).to(x.dtype)
        weight = tl.load(
            weight_ptr + (tap * in_channels + k)[:, None] * out_channels + n[None, :],
            mask=(k < in_channels)[:, None] & (n < out_channels)[None, :],
            other=0.0,
        )
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    tl.store(
        y_ptr + m[:, None] * out_channels + n[None, :],
        sums.to(y_ptr.dtype.element_ty),
        mask=(m < pixels)[:, None] & (n < out_channels)[None, :],
    )
