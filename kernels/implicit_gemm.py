"""Convolution of a concatenation as one matrix product, with prologue and epilogue.

``y = act(conv(prologue(cat(xs))) * output_scale + bias)`` with
``prologue(x) = relu(x * scale + shift)`` or none.
A row of the product is an output pixel, a column an output channel; the reduction runs over the
taps of the window and, within a tap, over the channels of all segments in one loop. The
concatenation, the normalised input and the patches of the window are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .configurations import Configuration
from .launch import Launch
from .layout import GROUP, PackedWeight, group_starts, pitch, vector_width

__all__ = ["convolve", "live_taps", "output_pixel", "partials_size", "segment_pointers"]

SIZES = [
    "pixels",
    "in_height",
    "in_width",
    "out_height",
    "out_width",
    "stride",
    "pad_rows",
    "pad_columns",
    "tap_rows",
    "tap_columns",
    "kernel_columns",
]
"""Arguments of which no value deserves a compilation of its own."""

REDUCTION_TILE = 16, 64
"""Pixels and channels of a program that adds the parts of a split reduction."""


@triton.jit
def output_pixel(pixel, height, width):
    """Splits the index of a pixel into image, row and column."""
    row = pixel // width
    column = pixel - row * width
    image = row // height
    return image, row - image * height, column


@triton.jit
def segment_pointers(xs, pitches, starts, lengths, k, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """Finds, for channels ``k`` of the concatenation, their addresses at pixel 0.

    Returns pointers ``[BLOCK_K]``, the pitch of each one's segment, and whether it exists.
    ``VECTOR`` is that of :func:`.layout.vector_width`.
    """
    size: tl.constexpr = xs[0].dtype.element_ty.primitive_bitwidth // 8
    # Distances from the first segment: the compiler for AMD cannot select among pointers.
    first = xs[0].to(tl.int64)
    offsets = k.to(tl.int64)
    distances = tl.zeros((BLOCK_K,), tl.int32) + pitches[0]
    exists = k < lengths[0]
    for segment in tl.static_range(1, len(xs)):
        inside = k >= starts[segment]
        channel = k - starts[segment]
        offsets = tl.where(inside, (xs[segment].to(tl.int64) - first) // size + channel, offsets)
        exists = tl.where(inside, channel < lengths[segment], exists)
        if len(pitches) > 1:
            distances = tl.where(inside, pitches[segment], distances)
    pointers = xs[0] + offsets
    if len(xs) > 1:
        # Segments begin at multiples of the group, so a group lies within one of them.
        pointers = tl.max_contiguous(pointers, 16)
        distances = tl.max_constancy(distances, 16)
    pointers = tl.multiple_of(pointers, VECTOR * size)
    distances = tl.multiple_of(distances, VECTOR)
    exists = tl.max_constancy(exists, VECTOR)
    return pointers, distances, exists


@triton.jit(do_not_specialize=SIZES)
def implicit_gemm_kernel(
    xs,
    pitches,
    starts,
    lengths,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    output_scale_ptr,
    bias_ptr,
    y_ptr,
    y_pitch,
    partials_ptr,
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
    ONE_PITCH: tl.constexpr,
    PROLOGUE: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of ``BLOCK_M`` output pixels by ``BLOCK_N`` output channels.

    Axis 0 of the grid runs over the tiles, those of the same pixels next to each other; axis 1 over
    the parts of the reduction, each of which writes its float32 sums into ``partials``.
    """
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0)
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists = m < pixels
    n_exists = n < out_channels
    # A mask for whole groups, unlike that of the output's channels, lets vectors be loaded.
    n_is_packed = n < weight_columns
    if POINTWISE:
        origin = m
        top = m
        left = m
    else:
        image, row, column = output_pixel(m, out_height, out_width)
        top = row * stride - pad_rows
        left = column * stride - pad_columns
        # Of an image's first pixels this lies before the image; the taps there are masked.
        origin = (image * in_height + top) * in_width + left
    if ONE_PITCH:
        origin_offset = origin.to(tl.int64) * pitches[0]

    channel_blocks = tl.cdiv(in_channels, BLOCK_K)
    steps = tap_rows * tap_columns * channel_blocks
    first_step = 0
    last_step = steps
    if SPLIT:
        part = tl.program_id(1)
        first_step = part * steps // tl.num_programs(1)
        last_step = (part + 1) * steps // tl.num_programs(1)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first_step, last_step):
        if POINTWISE:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = m_exists
            shift_of_tap = 0
            weight_row = k
        else:
            tap = step // channel_blocks
            k = (step - tap * channel_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            tap_row = tap // tap_columns
            tap_column = tap - tap_row * tap_columns
            y_in = top + tap_row
            x_in = left + tap_column
            inside = m_exists & (y_in >= 0) & (y_in < in_height) & (x_in >= 0) & (x_in < in_width)
            shift_of_tap = tap_row * in_width + tap_column
            weight_row = (tap_row * kernel_columns + tap_column) * in_channels + k

        pointers, distances, exists = segment_pointers(
            xs, pitches, starts, lengths, k, BLOCK_K, VECTOR
        )
        k_exists = k < in_channels
        if RAGGED:
            exists &= k_exists
        else:
            exists = k_exists
        if ONE_PITCH:
            offsets = origin_offset[:, None]
            if not POINTWISE:
                offsets += shift_of_tap.to(tl.int64) * pitches[0]
        else:
            offsets = (origin + shift_of_tap).to(tl.int64)[:, None] * distances[None, :]
        mask = inside[:, None] & exists[None, :]
        x = tl.load(pointers[None, :] + offsets, mask=mask, other=0.0)
        if PROLOGUE:
            scale = tl.load(scale_ptr + k, mask=k_exists, other=0.0)
            shift = tl.load(shift_ptr + k, mask=k_exists, other=0.0)
            normalised = x.to(tl.float32) * scale[None, :] + shift[None, :]
            activation = tl.maximum(normalised, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # After the prologue: padding is 0, not relu(shift).
            x = tl.where(mask, activation, 0.0).to(x.dtype)
        weight = tl.load(
            weight_ptr + weight_row[:, None] * weight_columns + n[None, :],
            mask=k_exists[:, None] & n_is_packed[None, :],
            other=0.0,
        )
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)

    if SPLIT:
        rows = (m.to(tl.int64) + part * pixels) * out_channels
        tl.store(
            partials_ptr + rows[:, None] + n[None, :],
            sums,
            mask=m_exists[:, None] & n_exists[None, :],
        )
    else:
        if OUTPUT_SCALE:
            sums *= tl.load(output_scale_ptr + n, mask=n_exists, other=0.0)[None, :]
        store_tile(sums, bias_ptr, y_ptr, y_pitch, m, n, m_exists, n_exists, BIAS, RELU)


@triton.jit
def store_tile(
    sums, bias_ptr, y_ptr, y_pitch, m, n, m_exists, n_exists, BIAS: tl.constexpr, RELU: tl.constexpr
):
    """The epilogue: adds the bias, rectifies, rounds and stores a tile."""
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=n_exists, other=0.0)[None, :]
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        y_ptr + (m.to(tl.int64) * y_pitch)[:, None] + n[None, :],
        sums.to(y_ptr.dtype.element_ty),
        mask=m_exists[:, None] & n_exists[None, :],
    )


@triton.jit(do_not_specialize=["pixels", "parts"])
def split_k_reduction_kernel(
    partials_ptr,
    output_scale_ptr,
    bias_ptr,
    y_ptr,
    y_pitch,
    pixels,
    parts,
    out_channels,
    OUTPUT_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the parts of the reduction, always in the same order, and ends with the epilogue."""
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0)
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_exists = m < pixels
    n_exists = n < out_channels
    mask = m_exists[:, None] & n_exists[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(parts):
        rows = (m.to(tl.int64) + part * pixels) * out_channels
        sums += tl.load(partials_ptr + rows[:, None] + n[None, :], mask=mask, other=0.0)
    if OUTPUT_SCALE:
        sums *= tl.load(output_scale_ptr + n, mask=n_exists, other=0.0)[None, :]
    store_tile(sums, bias_ptr, y_ptr, y_pitch, m, n, m_exists, n_exists, BIAS, RELU)


def live_taps(size: int, out_size: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Returns the first tap, in one direction, that can meet a pixel, and how many from it on can.

    A padded 3x3 window on a map of one pixel has one such tap, not nine.
    """
    live = [
        tap
        for tap in range(kernel)
        if (first := max(0, -(-(padding - tap) // stride))) < out_size
        and first * stride - padding + tap < size
    ]
    return (live[0], live[-1] - live[0] + 1) if live else (0, 0)


def partials_size(y: Tensor, split_k: int) -> int:
    """Returns how many float32 a split reduction needs beside its output ``y``."""
    batch, channels, height, width = y.shape
    return split_k * batch * height * width * channels if split_k > 1 else 0


def convolve(
    xs: Sequence[Tensor],
    weight: PackedWeight,
    y: Tensor,
    *,
    stride: int,
    padding: int,
    prologue: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    relu: bool,
    precision: str,
    configuration: Configuration,
    partials: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> list[Launch]:
    """Prepares ``act(conv(prologue(cat(xs))) * output_scale + bias)``.

    Args:
        xs: Pitched segments ``[N, C_i, H, W]`` of one dtype, see :mod:`.layout`.
        weight: Packed for the channels of these segments, in their dtype.
        y: Pitched ``[N, C, Ho, Wo]``. It may have more channels than the weight, up to whole
            groups: those get ``act(0)``.
        stride: Step of the window.
        padding: Zeros around the normalised input.
        prologue: Scale and shift, float32, packed as :func:`.layout.pack_vector` does, or None.
        bias: float32 of whole groups, or None.
        relu: Whether to rectify the result.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        configuration: Tile sizes.
        partials: float32, at least :func:`partials_size` elements; None without ``split_k``.
        output_scale: float32 of whole groups, multiplied with the float32 sums; None for 1.

    Returns:
        One launch, or two where the reduction is split.
    """
    batch, _, in_height, in_width = xs[0].shape
    _, out_channels, out_height, out_width = y.shape
    kernel_height, kernel_width = weight.kernel
    first_row, tap_rows = live_taps(in_height, out_height, kernel_height, stride, padding)
    first_column, tap_columns = live_taps(in_width, out_width, kernel_width, stride, padding)
    pixels = batch * out_height * out_width
    pointwise = weight.kernel == (1, 1) and stride == 1 and padding == 0
    channels = [x.shape[1] for x in xs]
    pitches = tuple(pitch(x) for x in xs)
    same_pitch = len(set(pitches)) == 1
    split_k = configuration.split_k
    tiles = triton.cdiv(pixels, configuration.block_m) * triton.cdiv(
        out_channels, configuration.block_n
    )
    target = {"y_ptr": y, "y_pitch": pitch(y), "pixels": pixels, "out_channels": out_channels}
    epilogue = {
        "output_scale_ptr": output_scale,
        "bias_ptr": bias,
        "OUTPUT_SCALE": output_scale is not None,
        "BIAS": bias is not None,
        "RELU": relu,
    }
    # The parts of a split reduction have none, whatever the convolution's: one compilation for all.
    nothing = {
        "output_scale_ptr": None,
        "bias_ptr": None,
        "OUTPUT_SCALE": False,
        "BIAS": False,
        "RELU": False,
    }
    launches = [
        Launch(
            implicit_gemm_kernel,
            (tiles, split_k),
            {
                **target,
                **(nothing if split_k > 1 else epilogue),
                "xs": tuple(xs),
                "pitches": pitches[:1] if same_pitch else pitches,
                "starts": group_starts(channels),
                "lengths": tuple(channels),
                "weight_ptr": weight.data[first_row * kernel_width + first_column :],
                "scale_ptr": None if prologue is None else prologue[0],
                "shift_ptr": None if prologue is None else prologue[1],
                "partials_ptr": partials,
                "in_height": in_height,
                "in_width": in_width,
                "out_height": out_height,
                "out_width": out_width,
                "stride": stride,
                "pad_rows": padding - first_row,
                "pad_columns": padding - first_column,
                "tap_rows": tap_rows,
                "tap_columns": tap_columns,
                "kernel_columns": kernel_width,
                "in_channels": weight.data.shape[1],
                "weight_columns": weight.data.shape[2],
                "POINTWISE": pointwise,
                "RAGGED": any(count % GROUP for count in channels),
                "VECTOR": vector_width(xs),
                "ONE_PITCH": same_pitch,
                "PROLOGUE": prologue is not None,
                "PRECISION": precision,
                "SPLIT": split_k > 1,
                "BLOCK_M": configuration.block_m,
                "BLOCK_N": configuration.block_n,
                "BLOCK_K": configuration.block_k,
            },
            configuration.num_warps,
            configuration.num_stages,
        )
    ]
    if split_k > 1:
        block_m, block_n = REDUCTION_TILE
        tiles = triton.cdiv(pixels, block_m) * triton.cdiv(out_channels, block_n)
        launches.append(
            Launch(
                split_k_reduction_kernel,
                (tiles,),
                {
                    **target,
                    **epilogue,
                    "partials_ptr": partials,
                    "parts": split_k,
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                },
            )
        )
    return launches
