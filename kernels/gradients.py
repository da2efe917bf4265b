"""Gradients of a convolution of a concatenation: to its input, its weight, its affine.

With ``y = conv(a, w)`` and the gradient ``g`` of ``y``:

- input: ``da[p] = sum over taps t, outputs n of g[(p + padding - t) / stride, n] * w[t, :, n]``, a
  matrix product like the convolution itself, over the taps whose division leaves no remainder;
- weight: ``dw[t, k, n] = sum over pixels m of a[m * stride - padding + t, k] * g[m, n]``, a matrix
  product for each tap whose reduction runs over pixels.

Around these two, the prologue ``a = relu(x * scale + shift)`` is recomputed from ``x`` where it is
needed, its own gradient is the epilogue of the first product, and the rectifier behind a
convolution is a mask that is applied while ``g`` is loaded.

Always deterministic: nothing is added atomically. Sums that several programs share go to float32
memory in parts, which another kernel adds in a fixed order. Repeating a call on the same device
gives the same bits, so ``torch.use_deterministic_algorithms`` has nothing to switch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Configuration
from .implicit_gemm import live_taps, output_pixel, segment_pointers
from .launch import Launch
from .layout import GROUP, PackedWeight, group_starts, pitch, vector_width

__all__ = [
    "Gate",
    "Window",
    "choose_input_gradient",
    "choose_weight_gradient",
    "column_sums",
    "input_gradient",
    "input_gradient_parts",
    "weight_gradient",
    "weight_gradient_products",
    "weight_gradient_size",
]

COLUMN_TILE = 32, 32
"""Pixels and channels that a program of :func:`column_sums_kernel` adds at a time."""

PIXELS_OF_A_PART = 1024
"""Pixels that one program adds up, where there are more of them."""

REDUCTION_TILE = 32, 32
"""Input and output channels of a program that adds the parts of a weight's gradient."""

# No value of these deserves a compilation of its own, unlike a stride of 1, which divides nothing.
_SIZES = [
    "pixels",
    "in_height",
    "in_width",
    "out_height",
    "out_width",
    "pad_rows",
    "pad_columns",
    "tap_rows",
    "tap_columns",
]

_LARGEST_TILE = 64
_SMALLEST_TILE = 32

_PROGRAMS_PER_MULTIPROCESSOR = 4

# Fewer pixels in a part than this would spend more on storing the part than on computing it.
_LEAST_PIXELS_OF_A_PART = 256


@triton.jit
def load_gated(
    grad_ptr,
    grad_pitch,
    y_ptr,
    y_pitch,
    pixel,
    inside,
    n,
    channels,
    GATE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Loads a gradient, with zeros where the rectifier behind the convolution gave none.

    As in PyTorch's ``threshold_backward``, the gradient passes where the result is NaN.
    """
    exists = tl.max_constancy(n < channels, VECTOR)
    mask = inside[:, None] & exists[None, :]
    pixel = pixel.to(tl.int64)
    offsets = tl.multiple_of(pixel * grad_pitch, VECTOR)[:, None] + n[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    if GATE:
        offsets = tl.multiple_of(pixel * y_pitch, VECTOR)[:, None] + n[None, :]
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
        grad = tl.where(y.to(tl.float32) <= 0.0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=[*_SIZES, "kernel_columns"])
def input_gradient_kernel(
    grad_ptr,
    grad_pitch,
    y_ptr,
    y_pitch,
    output_scale_ptr,
    weight_ptr,
    xs,
    x_pitches,
    scale_ptr,
    shift_ptr,
    dxs,
    dx_pitches,
    starts,
    lengths,
    sums_ptr,
    pixels,
    in_height,
    in_width,
    out_height,
    out_width,
    stride,
    pad_rows,
    pad_columns,
    tap_rows,
    tap_columns,
    kernel_columns,
    in_channels,
    out_channels,
    weight_columns,
    POINTWISE: tl.constexpr,
    RAGGED: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    GATE: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    STORE: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the gradient of ``BLOCK_M`` input pixels by ``BLOCK_N`` input channels.

    With ``PROLOGUE``, the gradient goes on through ``relu(x * scale + shift)`` to ``x``. ``SUMS``
    adds up, over the pixels of the tile, the gradients of the shift and of the scale into
    ``sums[tile of pixels, 2, in_channels]``.
    """
    column_tiles = tl.cdiv(in_channels, BLOCK_N)
    tile = tl.program_id(0)
    row_tile = tile // column_tiles
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists = m < pixels
    k_exists = k < in_channels
    if not POINTWISE:
        image, row, column = output_pixel(m, in_height, in_width)
        bottom = row + pad_rows
        right = column + pad_columns
        image_origin = image * out_height

    blocks = tl.cdiv(out_channels, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tap_rows * tap_columns * blocks):
        if POINTWISE:
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = m_exists
            pixel = m
            weight_row = k
        else:
            tap = step // blocks
            n = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            tap_row = tap // tap_columns
            tap_column = tap - tap_row * tap_columns
            y_scaled = bottom - tap_row
            x_scaled = right - tap_column
            y_out = y_scaled // stride
            x_out = x_scaled // stride
            inside = m_exists & (y_scaled >= 0) & (x_scaled >= 0)
            inside &= (y_out < out_height) & (x_out < out_width)
            inside &= (y_out * stride == y_scaled) & (x_out * stride == x_scaled)
            pixel = (image_origin + y_out) * out_width + x_out
            weight_row = (tap_row * kernel_columns + tap_column) * in_channels + k
        n_is_packed = n < weight_columns
        grad = load_gated(
            grad_ptr, grad_pitch, y_ptr, y_pitch, pixel, inside, n, out_channels, GATE, GRAD_VECTOR
        )
        if OUTPUT_SCALE:
            factor = tl.load(output_scale_ptr + n, mask=n_is_packed, other=0.0)
            grad = (grad.to(tl.float32) * factor[None, :]).to(grad.dtype)
        weight = tl.load(
            weight_ptr + weight_row[None, :] * weight_columns + n[:, None],
            mask=n_is_packed[:, None] & k_exists[None, :],
            other=0.0,
        )
        sums = tl.dot(grad, weight, sums, input_precision=PRECISION)

    m_offset = m.to(tl.int64)[:, None]
    if PROLOGUE:
        pointers, distances, exists = segment_pointers(
            xs, x_pitches, starts, lengths, k, BLOCK_N, VECTOR
        )
        if RAGGED:
            exists &= k_exists
        else:
            exists = k_exists
        x = tl.load(
            pointers[None, :] + m_offset * distances[None, :],
            mask=m_exists[:, None] & exists[None, :],
            other=0.0,
        ).to(tl.float32)
        scale = tl.load(scale_ptr + k, mask=k_exists, other=0.0)
        shift = tl.load(shift_ptr + k, mask=k_exists, other=0.0)
        sums = tl.where(x * scale[None, :] + shift[None, :] <= 0.0, 0.0, sums)
        if SUMS:
            # Pixels that do not exist: 0 but for an infinite weight, which makes them NaN.
            counted = tl.where(m_exists[:, None], sums, 0.0)
            target = sums_ptr + row_tile.to(tl.int64) * 2 * in_channels + k
            tl.store(target, tl.sum(counted, 0), mask=k_exists)
            tl.store(target + in_channels, tl.sum(counted * x, 0), mask=k_exists)
        sums *= scale[None, :]
    if STORE:
        pointers, distances, exists = segment_pointers(
            dxs, dx_pitches, starts, lengths, k, BLOCK_N, VECTOR
        )
        if RAGGED:
            exists &= k_exists
        else:
            exists = k_exists
        tl.store(
            pointers[None, :] + m_offset * distances[None, :],
            sums.to(dxs[0].dtype.element_ty),
            mask=m_exists[:, None] & exists[None, :],
        )


@triton.jit(do_not_specialize=[*_SIZES, "blocks_of_a_part"])
def weight_gradient_kernel(
    xs,
    pitches,
    starts,
    lengths,
    scale_ptr,
    shift_ptr,
    grad_ptr,
    grad_pitch,
    y_ptr,
    y_pitch,
    partials_ptr,
    pixels,
    blocks_of_a_part,
    in_height,
    in_width,
    out_height,
    out_width,
    stride,
    pad_rows,
    pad_columns,
    tap_rows,
    tap_columns,
    in_channels,
    out_channels,
    POINTWISE: tl.constexpr,
    RAGGED: tl.constexpr,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    GATE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes, of one tap, ``BLOCK_M`` input by ``BLOCK_N`` output channels of the gradient.

    Axis 0 of the grid runs over the tiles, axis 1 over parts of the pixels, each of which writes
    its sums into ``partials[part, tap, in_channels, out_channels]``.
    """
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    row_tiles = tl.cdiv(in_channels, BLOCK_M)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tile // column_tiles
    k = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = tile // row_tiles
    tap_row = tap // tap_columns
    tap_column = tap - tap_row * tap_columns
    n_exists = n < out_channels
    k_exists = k < in_channels
    pointers, distances, exists = segment_pointers(xs, pitches, starts, lengths, k, BLOCK_M, VECTOR)
    if RAGGED:
        exists &= k_exists
    else:
        exists = k_exists
    if PROLOGUE:
        scale = tl.load(scale_ptr + k, mask=k_exists, other=0.0)
        shift = tl.load(shift_ptr + k, mask=k_exists, other=0.0)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_block = part * blocks_of_a_part
    last_block = tl.minimum(first_block + blocks_of_a_part, tl.cdiv(pixels, BLOCK_K))
    for block in range(first_block, last_block):
        m = block * BLOCK_K + tl.arange(0, BLOCK_K)
        m_exists = m < pixels
        if POINTWISE:
            inside = m_exists
            pixel = m
        else:
            image, row, column = output_pixel(m, out_height, out_width)
            y_in = row * stride - pad_rows + tap_row
            x_in = column * stride - pad_columns + tap_column
            inside = m_exists & (y_in >= 0) & (y_in < in_height) & (x_in >= 0) & (x_in < in_width)
            pixel = (image * in_height + y_in) * in_width + x_in
        mask = inside[:, None] & exists[None, :]
        x = tl.load(
            pointers[None, :] + pixel.to(tl.int64)[:, None] * distances[None, :],
            mask=mask,
            other=0.0,
        )
        if PROLOGUE:
            normalised = x.to(tl.float32) * scale[None, :] + shift[None, :]
            activation = tl.maximum(normalised, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # After the prologue: padding is 0, not relu(shift).
            x = tl.where(mask, activation, 0.0).to(x.dtype)
        grad = load_gated(
            grad_ptr, grad_pitch, y_ptr, y_pitch, m, m_exists, n, out_channels, GATE, GRAD_VECTOR
        )
        sums = tl.dot(tl.trans(x), grad, sums, input_precision=PRECISION)

    taps = tap_rows * tap_columns
    rows = ((part * taps + tap).to(tl.int64) * in_channels + k) * out_channels
    tl.store(
        partials_ptr + rows[:, None] + n[None, :],
        sums,
        mask=k_exists[:, None] & n_exists[None, :],
    )


@triton.jit(do_not_specialize=["parts", "first_row", "first_column", "tap_rows", "tap_columns"])
def weight_gradient_reduction_kernel(
    partials_ptr,
    parts,
    dw_ptr,
    dw_strides,
    starts,
    lengths,
    firsts,
    weight_ptr,
    weight_columns,
    output_scale_ptr,
    products_ptr,
    first_row,
    first_column,
    tap_rows,
    tap_columns,
    kernel_columns,
    in_channels,
    out_channels,
    OUTPUT_SCALE: tl.constexpr,
    STORE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the parts of a weight's gradient, always in the same order, and stores it unpacked.

    The grid runs over tiles of channels and over all taps: those that meet no pixel have no parts,
    their gradient is 0. ``PRODUCTS`` adds up the products of gradient and weight, over the input
    channels of the tile, into ``products[tap, tile of input channels, output]``.
    """
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    row_tiles = tl.cdiv(in_channels, BLOCK_M)
    tile = tl.program_id(0)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tile // column_tiles
    row_tile = tile % row_tiles
    tap = tile // row_tiles
    k = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n_exists = n < out_channels
    mask = (k < in_channels)[:, None] & n_exists[None, :]
    kernel_row = tap // kernel_columns
    kernel_column = tap - kernel_row * kernel_columns
    tap_row = kernel_row - first_row
    tap_column = kernel_column - first_column
    live = (tap_row >= 0) & (tap_row < tap_rows) & (tap_column >= 0) & (tap_column < tap_columns)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if live:
        taps = tap_rows * tap_columns
        tap_of_part = tap_row * tap_columns + tap_column
        for part in range(parts):
            rows = ((part * taps + tap_of_part).to(tl.int64) * in_channels + k) * out_channels
            sums += tl.load(partials_ptr + rows[:, None] + n[None, :], mask=mask, other=0.0)

    if PRODUCTS:
        weight = tl.load(
            weight_ptr + (tap * in_channels + k)[:, None] * weight_columns + n[None, :],
            mask=mask,
            other=0.0,
        )
        products = tl.sum(weight.to(tl.float32) * sums, 0)
        tl.store(
            products_ptr + (tap * row_tiles + row_tile) * out_channels + n, products, mask=n_exists
        )
    if STORE:
        if OUTPUT_SCALE:
            sums *= tl.load(output_scale_ptr + n, mask=n_exists, other=0.0)[None, :]
        channel = k
        exists = k < lengths[0]
        for segment in tl.static_range(1, len(starts)):
            inside = k >= starts[segment]
            channel = tl.where(inside, firsts[segment] + k - starts[segment], channel)
            exists = tl.where(inside, k - starts[segment] < lengths[segment], exists)
        offsets = n.to(tl.int64)[None, :] * dw_strides[0] + channel[:, None] * dw_strides[1]
        offsets += kernel_row * dw_strides[2] + kernel_column * dw_strides[3]
        tl.store(dw_ptr + offsets, sums.to(dw_ptr.dtype.element_ty), mask=mask & exists[:, None])


@triton.jit(do_not_specialize=["pixels", "blocks_of_a_part"])
def column_sums_kernel(
    x_ptr,
    x_pitch,
    y_ptr,
    y_pitch,
    sums_ptr,
    pixels,
    channels,
    blocks_of_a_part,
    GATE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds up a part of the pixels of a map into ``sums[part, channels]``."""
    column_tiles = tl.cdiv(channels, BLOCK_N)
    tile = tl.program_id(0)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tile // column_tiles
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_block = part * blocks_of_a_part
    last_block = tl.minimum(first_block + blocks_of_a_part, tl.cdiv(pixels, BLOCK_M))
    for block in range(first_block, last_block):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        x = load_gated(x_ptr, x_pitch, y_ptr, y_pitch, m, m < pixels, n, channels, GATE, VECTOR)
        sums += x.to(tl.float32)
    tl.store(sums_ptr + part.to(tl.int64) * channels + n, tl.sum(sums, 0), mask=n < channels)


@dataclass(frozen=True)
class Window:
    """How a convolution's window moves over its input.

    Attributes:
        kernel: Height and width.
        stride: Its step, both ways.
        padding: Zeros on each side.
        size: Height and width of the input.
        out_size: Height and width of the output.
    """

    kernel: tuple[int, int]
    stride: int
    padding: int
    size: tuple[int, int]
    out_size: tuple[int, int]

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel reads one input pixel, the same."""
        return self.kernel == (1, 1) and self.stride == 1 and self.padding == 0

    @property
    def live(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """First tap that can meet a pixel and number of them, for rows and for columns."""
        rows, columns = (
            live_taps(size, out_size, kernel, self.stride, self.padding)
            for size, out_size, kernel in zip(self.size, self.out_size, self.kernel, strict=True)
        )
        return rows, columns

    def arguments(self) -> dict[str, object]:
        """Arguments of the kernels."""
        (first_row, tap_rows), (first_column, tap_columns) = self.live
        return {
            "in_height": self.size[0],
            "in_width": self.size[1],
            "out_height": self.out_size[0],
            "out_width": self.out_size[1],
            "stride": self.stride,
            "pad_rows": self.padding - first_row,
            "pad_columns": self.padding - first_column,
            "tap_rows": tap_rows,
            "tap_columns": tap_columns,
            "POINTWISE": self.pointwise,
        }


@dataclass(frozen=True)
class Gate:
    """What lies between a convolution and its result: ``y = relu(conv * scale + shift)``.

    Attributes:
        y: Pitched result whose zeros stop the gradient, None without a rectifier.
        scale: float32 of whole groups, None for 1.
    """

    y: Tensor | None = None
    scale: Tensor | None = None

    def vector_width(self, grad: Tensor) -> int:
        """How many channels of the result and of its gradient can be loaded at once."""
        return vector_width([grad] if self.y is None else [grad, self.y])

    def arguments(self) -> dict[str, object]:
        """Arguments of the kernels."""
        return {
            "y_ptr": self.y,
            "y_pitch": 0 if self.y is None else pitch(self.y),
            "GATE": self.y is not None,
        }


OPEN = Gate()
"""Nothing between the convolution and its result."""


def choose_input_gradient(
    window: Window, batch: int, weight: PackedWeight, architecture: str, multiprocessors: int
) -> Configuration:
    """Chooses tile sizes of :func:`input_gradient`: rows are pixels, columns input channels."""
    pixels = batch * window.size[0] * window.size[1]
    in_channels = weight.data.shape[1]
    block_m, block_n = _LARGEST_TILE, _fit(in_channels)
    while (
        max(block_m, block_n) > _SMALLEST_TILE
        and triton.cdiv(pixels, block_m) * triton.cdiv(in_channels, block_n) < multiprocessors
    ):
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    return _configuration(block_m, block_n, weight.data.dtype, architecture)


def choose_weight_gradient(
    window: Window, batch: int, weight: PackedWeight, architecture: str, multiprocessors: int
) -> Configuration:
    """Chooses tile sizes of :func:`weight_gradient`, and the parts of its reduction.

    Tiles cover channels, of which there are few, and the reduction runs over pixels, of which there
    are many: only parts of the reduction fill a device.
    """
    (_, tap_rows), (_, tap_columns) = window.live
    _, in_channels, out_channels = weight.data.shape
    block_m, block_n = _fit(in_channels), _fit(out_channels)
    tiles = tap_rows * tap_columns
    tiles *= triton.cdiv(in_channels, block_m) * triton.cdiv(out_channels, block_n)
    pixels = batch * window.out_size[0] * window.out_size[1]
    wanted = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, max(1, tiles))
    parts = max(1, min(wanted, pixels // _LEAST_PIXELS_OF_A_PART))
    return _configuration(block_m, block_n, weight.data.dtype, architecture, parts)


def _fit(channels: int) -> int:
    return min(_LARGEST_TILE, max(GROUP, int(triton.next_power_of_2(channels))))


def _configuration(
    block_m: int, block_n: int, dtype: torch.dtype, architecture: str, split_k: int = 1
) -> Configuration:
    # In float32 without tensor cores, more for each thread would not fit in registers.
    full = dtype == torch.float32
    num_warps = 8 if full and block_m * block_n > _SMALLEST_TILE * _LARGEST_TILE else 4
    num_stages = 2 if architecture.startswith("gfx") else 3
    if full and architecture.startswith("gfx11"):
        # What a pipeline needs of scalar registers is more than there are.
        num_warps, num_stages = 8, 1
    return Configuration(block_m, block_n, 16 if full else 32, num_warps, num_stages, split_k)


def input_gradient(
    grad: Tensor,
    weight: PackedWeight,
    window: Window,
    dxs: Sequence[Tensor] | None,
    *,
    gate: Gate = OPEN,
    xs: Sequence[Tensor] | None = None,
    prologue: tuple[Tensor, Tensor] | None = None,
    sums: Tensor | None = None,
    precision: str,
    configuration: Configuration,
) -> list[Launch]:
    """Prepares the gradient to the input of a convolution.

    Args:
        grad: Gradient of the result, pitched ``[N, Co, Ho, Wo]``.
        weight: Packed as for the convolution itself.
        window: The convolution's window.
        dxs: Results: pitched ``[N, C_i, H, W]``, one for each segment; None to store none.
        gate: What follows the convolution.
        xs: The segments, pitched; only needed with a prologue.
        prologue: Packed scale and shift of ``relu(x * scale + shift)``, or None.
        sums: Float32 result of at least :func:`input_gradient_parts` times twice the packed
            channels, or None: gradients of shift and of scale, each added up over a part of the
            pixels, one part after the other.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        configuration: Tile sizes.

    Returns:
        One launch.
    """
    described = xs if dxs is None else dxs
    assert described is not None
    channels = [x.shape[1] for x in described]
    batch = grad.shape[0]
    pixels = batch * window.size[0] * window.size[1]
    in_channels = weight.data.shape[1]
    (first_row, _), (first_column, _) = window.live
    tiles = triton.cdiv(pixels, configuration.block_m) * triton.cdiv(
        in_channels, configuration.block_n
    )
    touched = [*(xs or ()), *(dxs or ())]
    return [
        Launch(
            input_gradient_kernel,
            (tiles,),
            {
                "grad_ptr": grad,
                "grad_pitch": pitch(grad),
                **gate.arguments(),
                "output_scale_ptr": gate.scale,
                "weight_ptr": weight.data[first_row * window.kernel[1] + first_column :],
                "xs": None if xs is None else tuple(xs),
                "x_pitches": None if xs is None else tuple(map(pitch, xs)),
                "scale_ptr": None if prologue is None else prologue[0],
                "shift_ptr": None if prologue is None else prologue[1],
                "dxs": None if dxs is None else tuple(dxs),
                "dx_pitches": None if dxs is None else tuple(map(pitch, dxs)),
                "starts": group_starts(channels),
                "lengths": tuple(channels),
                "sums_ptr": sums,
                "pixels": pixels,
                **window.arguments(),
                "kernel_columns": window.kernel[1],
                "in_channels": in_channels,
                "out_channels": grad.shape[1],
                "weight_columns": weight.data.shape[2],
                "RAGGED": any(count % GROUP for count in channels),
                "VECTOR": vector_width(touched),
                "GRAD_VECTOR": gate.vector_width(grad),
                "OUTPUT_SCALE": gate.scale is not None,
                "PROLOGUE": prologue is not None,
                "STORE": dxs is not None,
                "SUMS": sums is not None,
                "PRECISION": precision,
                "BLOCK_M": configuration.block_m,
                "BLOCK_N": configuration.block_n,
                "BLOCK_K": configuration.block_k,
            },
            configuration.num_warps,
            configuration.num_stages,
        )
    ]


def input_gradient_parts(batch: int, window: Window, configuration: Configuration) -> int:
    """Returns into how many parts :func:`input_gradient` adds up the gradients of an affine."""
    return int(triton.cdiv(batch * window.size[0] * window.size[1], configuration.block_m))


def weight_gradient(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: PackedWeight,
    window: Window,
    dw: Tensor | None,
    *,
    gate: Gate = OPEN,
    prologue: tuple[Tensor, Tensor] | None = None,
    partials: Tensor,
    products: Tensor | None = None,
    precision: str,
    configuration: Configuration,
) -> list[Launch]:
    """Prepares the gradient to the weight of a convolution.

    With ``y = conv(x, w) * scale + shift``, the sum over pixels of ``x * g`` is both: times the
    scale, the gradient of the weight; times the weight and added up over input channels and taps,
    the gradient of the scale, since ``conv`` is linear in ``w``. So neither the convolution nor
    its result without the affine is needed.

    Args:
        grad: Gradient of the result, pitched ``[N, Co, Ho, Wo]``.
        xs: The segments, pitched.
        weight: Packed as for the convolution itself.
        window: The convolution's window.
        dw: Result ``[Co, sum of C_i, kh, kw]`` in any dtype and strides, or None to store none.
        gate: What follows the convolution. The scale goes to ``dw`` only.
        prologue: Packed scale and shift of ``relu(x * scale + shift)``, or None.
        partials: float32, at least :func:`weight_gradient_size` elements.
        products: Float32 result ``[weight_gradient_products, Co]`` or None: rows whose sum is the
            gradient to the scale of the gate.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        configuration: Tile sizes: rows are input channels, columns output channels, the reduction
            runs over pixels, in ``split_k`` parts.

    Returns:
        Two launches.
    """
    channels = [x.shape[1] for x in xs]
    starts = group_starts(channels)
    firsts = [sum(channels[:i]) for i in range(len(channels))]
    pixels = grad.shape[0] * window.out_size[0] * window.out_size[1]
    in_channels = weight.data.shape[1]
    out_channels = grad.shape[1]
    (first_row, tap_rows), (first_column, tap_columns) = window.live
    blocks = triton.cdiv(pixels, configuration.block_k)
    channels_of_both = {
        "starts": starts,
        "lengths": tuple(channels),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "partials_ptr": partials,
    }
    rows, columns = configuration.block_m, configuration.block_n
    product = Launch(
        weight_gradient_kernel,
        (
            tap_rows
            * tap_columns
            * triton.cdiv(in_channels, rows)
            * triton.cdiv(out_channels, columns),
            configuration.split_k,
        ),
        {
            **channels_of_both,
            "xs": tuple(xs),
            "pitches": tuple(map(pitch, xs)),
            "scale_ptr": None if prologue is None else prologue[0],
            "shift_ptr": None if prologue is None else prologue[1],
            "grad_ptr": grad,
            "grad_pitch": pitch(grad),
            **gate.arguments(),
            "pixels": pixels,
            "blocks_of_a_part": triton.cdiv(blocks, configuration.split_k),
            **window.arguments(),
            "RAGGED": any(count % GROUP for count in channels),
            "VECTOR": vector_width(xs),
            "GRAD_VECTOR": gate.vector_width(grad),
            "PROLOGUE": prologue is not None,
            "PRECISION": precision,
            "BLOCK_M": rows,
            "BLOCK_N": columns,
            "BLOCK_K": configuration.block_k,
        },
        configuration.num_warps,
        configuration.num_stages,
    )
    rows, columns = REDUCTION_TILE
    reduction = Launch(
        weight_gradient_reduction_kernel,
        (
            window.kernel[0]
            * window.kernel[1]
            * triton.cdiv(in_channels, rows)
            * triton.cdiv(out_channels, columns),
        ),
        {
            **channels_of_both,
            "parts": configuration.split_k,
            "dw_ptr": dw,
            "dw_strides": (0, 0, 0, 0) if dw is None else dw.stride(),
            "firsts": tuple(firsts),
            "weight_ptr": weight.data,
            "weight_columns": weight.data.shape[2],
            "output_scale_ptr": gate.scale,
            "products_ptr": products,
            "first_row": first_row,
            "first_column": first_column,
            "tap_rows": tap_rows,
            "tap_columns": tap_columns,
            "kernel_columns": window.kernel[1],
            "OUTPUT_SCALE": gate.scale is not None,
            "STORE": dw is not None,
            "PRODUCTS": products is not None,
            "BLOCK_M": rows,
            "BLOCK_N": columns,
        },
    )
    # A window that only ever meets padding has no tap, and a grid of nothing cannot be launched.
    return [product, reduction] if tap_rows * tap_columns else [reduction]


def weight_gradient_size(weight: PackedWeight, window: Window, configuration: Configuration) -> int:
    """Returns how many float32 :func:`weight_gradient` needs for the parts of its sums."""
    (_, tap_rows), (_, tap_columns) = window.live
    taps = tap_rows * tap_columns
    return configuration.split_k * taps * weight.data.shape[1] * weight.out_channels


def weight_gradient_products(weight: PackedWeight) -> int:
    """Returns into how many parts :func:`weight_gradient` adds up the gradient of a scale."""
    taps, in_channels, _ = weight.data.shape
    return taps * int(triton.cdiv(in_channels, REDUCTION_TILE[0]))


def column_sums(x: Tensor, gate: Gate = OPEN) -> tuple[list[Launch], Tensor]:
    """Prepares the sum over all pixels of each channel of a map.

    Args:
        x: Pitched ``[N, C, H, W]``.
        gate: What follows the convolution whose result's gradient ``x`` is. Its scale is not
            looked at.

    Returns:
        The launches, and the float32 ``[C]`` that they compute.
    """
    block_m, block_n = COLUMN_TILE
    launches = []
    while True:
        batch, channels, height, width = x.shape
        pixels = batch * height * width
        parts = int(triton.cdiv(pixels, PIXELS_OF_A_PART))
        sums = torch.empty(parts, channels, dtype=torch.float32, device=x.device)
        launches.append(
            Launch(
                column_sums_kernel,
                (triton.cdiv(channels, block_n) * parts,),
                {
                    "x_ptr": x,
                    "x_pitch": pitch(x),
                    **gate.arguments(),
                    "sums_ptr": sums,
                    "pixels": pixels,
                    "channels": channels,
                    "blocks_of_a_part": PIXELS_OF_A_PART // block_m,
                    "VECTOR": gate.vector_width(x),
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                },
            )
        )
        if parts == 1:
            return launches, sums[0]
        x, gate = sums[:, :, None, None], OPEN
