"""A dense layer in one kernel: BN-ReLU-conv1x1-BN-ReLU-conv3x3, the second BN folded.

``y = conv3x3(relu(conv1x1(relu(x * scale + shift)) + bias))``. The map in between, the bottleneck,
has several times the channels of ``y``. Here it never leaves the cache: a program walks along
consecutive pixels, a tile at a time, with a ring of as many bottleneck pixels as the windows of one
tile touch::

    bottleneck   .. [ oldest tile ][             ][ newest tile ] ..    a ring in scratch memory
    output       ..                      [ tile ] ..                    width + 1 pixels behind

Each step computes the newest tile of the bottleneck with the 1x1 convolution, waits until all
threads have stored it, computes the output tile ``width + 1`` pixels behind it with the 3x3
convolution, and waits until all threads have read what it needed. Pixels are counted through rows
and images alike, so no map wastes parts of tiles, and only taps outside of the image are masked:
those read 0, whatever the ring holds there.

The ring of a program is ``1 + ceil(2 (width + 1) / tile)`` tiles. It lies in global memory, private
to the program, and is small enough to stay in the cache: 48 KiB for 128 channels in half precision
at 56 pixels and tiles of 64. It is written once and read nine times, like the bottleneck of two
kernels. Shared memory would need the compiler's gather of a register tile, which writes the tile
to shared memory and reads it back for each tap, and then once more into the product's layout: four
passes where asynchronous copies from the ring make two; and a two-dimensional tile of 8x16 pixels
would compute 10x18 pixels of the bottleneck, 41% more than it needs.

What is computed twice: the ``ceil(2 (width + 1) / tile)`` tiles before a program's first output,
so ``lead / tiles`` of the 1x1 convolution, where ``tiles`` is a program's number of output tiles:
at 56 pixels 7% for a batch of 128 on 108 multiprocessors, and twice as much work as needed where a
program has only two tiles. What is saved: writing and reading the bottleneck in the device's memory
(unless it fits in the cache, two kernels do as well), and that the two kernels wait for memory and
for arithmetic in turn instead of together. :func:`pays` weighs the two by a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architectures import find_architecture, precision_for
from .configurations import Configuration
from .implicit_gemm import output_pixel, store_tile
from .launch import Launch
from .layout import PackedWeight, padded, pitch, vector_width

__all__ = ["Problem", "choose", "dense_layer", "pays", "scratch_size"]

_MAX_BLOCK_N = 64
"""Output channels of a tile at most."""

_PROGRAMS = 2
"""Programs for each multiprocessor: one multiplies while another one waits."""

# block_m, bottleneck channels, block_k, num_warps, num_stages; none spills registers.
_HALF = Configuration(64, 128, 32, 4, 3)
_HALF_ON_SM_120 = Configuration(64, 128, 32, 8, 3)
_HALF_ON_AMD = Configuration(64, 64, 16, 8, 2)
_TF32 = Configuration(64, 64, 16, 8, 2)
_FULL = Configuration(64, 64, 16, 8, 2)
_FULL_ON_SM_100 = Configuration(32, 64, 16, 4, 1)
_INTERPRETER = Configuration(64, 128, 64, 4, 1)


@triton.jit(do_not_specialize=["pixels", "height", "width", "tiles"])
def dense_layer_kernel(
    x_ptr,
    x_pitch,
    weight1_ptr,
    scale_ptr,
    shift_ptr,
    bias_ptr,
    weight2_ptr,
    weight2_columns,
    y_ptr,
    y_pitch,
    scratch_ptr,
    pixels,
    height,
    width,
    tiles,
    in_channels,
    out_channels,
    VECTOR: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    LEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    BLOCK_K2: tl.constexpr,
):
    """Computes ``tiles`` tiles of ``BLOCK_M`` output pixels, with ``LEAD`` more of the bottleneck.

    ``BOTTLENECK`` channels are computed ``BLOCK_B`` at a time; ``BLOCK_K1`` and ``BLOCK_K2`` are
    the products that the two convolutions add at a time.
    """
    program = tl.program_id(0)
    ring_ptr = scratch_ptr + program.to(tl.int64) * ((LEAD + 1) * BLOCK_M * BOTTLENECK)
    first_output = program * tiles * BLOCK_M
    first = first_output + width + 1 - LEAD * BLOCK_M
    steps = LEAD + tl.minimum(tiles, tl.cdiv(pixels - first_output, BLOCK_M))
    lanes = tl.arange(0, BLOCK_M)
    for step in range(0, steps):
        slot = step % (LEAD + 1) * BLOCK_M
        for column in range(0, BOTTLENECK, BLOCK_B):
            bottleneck_tile(
                x_ptr,
                x_pitch,
                weight1_ptr,
                scale_ptr,
                shift_ptr,
                bias_ptr,
                ring_ptr,
                slot + lanes,
                first + step * BLOCK_M + lanes,
                column + tl.arange(0, BLOCK_B),
                pixels,
                in_channels,
                VECTOR,
                BIAS,
                PRECISION,
                BOTTLENECK,
                BLOCK_M,
                BLOCK_B,
                BLOCK_K1,
            )
        # The other threads read what this one has stored.
        tl.debug_barrier()
        if step >= LEAD:
            for output_column in range(0, out_channels, BLOCK_N):
                output_tile(
                    ring_ptr,
                    slot + lanes - width - 1,
                    weight2_ptr,
                    weight2_columns,
                    y_ptr,
                    y_pitch,
                    first_output + (step - LEAD) * BLOCK_M + lanes,
                    output_column + tl.arange(0, BLOCK_N),
                    pixels,
                    height,
                    width,
                    out_channels,
                    PRECISION,
                    BOTTLENECK,
                    (LEAD + 1) * BLOCK_M,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K2,
                )
        # The next tile takes the place of the oldest.
        tl.debug_barrier()


@triton.jit
def bottleneck_tile(
    x_ptr,
    x_pitch,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    bias_ptr,
    ring_ptr,
    place,
    m,
    n,
    pixels,
    in_channels,
    VECTOR: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes channels ``n`` of the bottleneck at pixels ``m`` into the ring at ``place``.

    Pixels before the first image and behind the last one get some number that nothing reads.
    """
    m_exists = (m >= 0) & (m < pixels)
    n_exists = n < BOTTLENECK
    rows = m.to(tl.int64) * x_pitch
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, in_channels, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        # No channels behind: other programs may be writing the output there.
        k_exists = tl.max_constancy(k < in_channels, VECTOR)
        x = tl.load(
            x_ptr + rows[:, None] + k[None, :],
            mask=m_exists[:, None] & k_exists[None, :],
            other=0.0,
        )
        scale = tl.load(scale_ptr + k, mask=k_exists, other=0.0)
        shift = tl.load(shift_ptr + k, mask=k_exists, other=0.0)
        normalised = x.to(tl.float32) * scale[None, :] + shift[None, :]
        activation = tl.maximum(normalised, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.load(
            weight_ptr + k[:, None] * BOTTLENECK + n[None, :],
            mask=k_exists[:, None] & n_exists[None, :],
            other=0.0,
        )
        sums = tl.dot(activation.to(x.dtype), weight, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=n_exists, other=0.0)[None, :]
    sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        ring_ptr + place[:, None] * BOTTLENECK + n[None, :],
        sums.to(ring_ptr.dtype.element_ty),
        mask=n_exists[None, :],
    )


@triton.jit
def output_tile(
    ring_ptr,
    place,
    weight_ptr,
    weight_columns,
    y_ptr,
    y_pitch,
    m,
    n,
    pixels,
    height,
    width,
    out_channels,
    PRECISION: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes channels ``n`` of the output at pixels ``m``, which the ring has at ``place``.

    The place may be negative, by less than the length of the ring.
    """
    m_exists = m < pixels
    n_exists = n < out_channels
    # A mask for whole groups, unlike that of the output's channels, lets vectors be loaded.
    n_is_packed = n < weight_columns
    _, row, column = output_pixel(m, height, width)
    channel_blocks: tl.constexpr = (BOTTLENECK + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, 9 * channel_blocks):
        tap = step // channel_blocks
        k = (step - tap * channel_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_exists = k < BOTTLENECK
        down = tap // 3 - 1
        right = tap % 3 - 1
        y_in = row + down
        x_in = column + right
        inside = m_exists & (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width)
        source = place + down * width + right
        source = tl.where(source < 0, source + RING, source)
        x = tl.load(
            ring_ptr + source[:, None] * BOTTLENECK + k[None, :],
            mask=inside[:, None] & k_exists[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + (tap * BOTTLENECK + k)[:, None] * weight_columns + n[None, :],
            mask=k_exists[:, None] & n_is_packed[None, :],
            other=0.0,
        )
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    store_tile(sums, None, y_ptr, y_pitch, m, n, m_exists, n_exists, False, False)


@dataclass(frozen=True)
class Problem:
    """A dense layer, and what it is to run on.

    Attributes:
        batch: Images.
        height: Rows of a map.
        width: Columns of a map.
        channels: Input channels.
        bottleneck: Channels in between.
        growth: Output channels.
        dtype: Of the feature maps.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        architecture: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.
        multiprocessors: Of the device.
    """

    batch: int
    height: int
    width: int
    channels: int
    bottleneck: int
    growth: int
    dtype: torch.dtype
    precision: str
    architecture: str
    multiprocessors: int

    @property
    def pixels(self) -> int:
        """Of the whole batch."""
        return self.batch * self.height * self.width


def choose(dtype: torch.dtype, precision: str, architecture: str) -> Configuration:
    """Returns the tile sizes for a class of arithmetic.

    Args:
        dtype: Of the feature maps.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        architecture: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    if dtype == torch.float32:
        if precision == "tf32":
            return _TF32
        return _FULL_ON_SM_100 if architecture == "sm_100" else _FULL
    if architecture == "sm_120":
        return _HALF_ON_SM_120
    return _HALF_ON_AMD if architecture.startswith("gfx") else _HALF


def _lead(width: int, block_m: int) -> int:
    """Tiles that the bottleneck is ahead of the output: its windows reach that far around it."""
    return triton.cdiv(2 * (width + 1), block_m)


def _ring_size(width: int, bottleneck: int, block_m: int) -> int:
    return (_lead(width, block_m) + 1) * block_m * padded(bottleneck)


def _tiles_each(pixels: int, block_m: int, programs: int) -> int:
    return triton.cdiv(triton.cdiv(pixels, block_m), programs)


def scratch_size(problem: Problem, configuration: Configuration) -> int:
    """Returns how many elements of scratch memory make the best use of the device."""
    tiles = triton.cdiv(problem.pixels, configuration.block_m)
    programs = min(tiles, _PROGRAMS * problem.multiprocessors)
    return programs * _ring_size(problem.width, problem.bottleneck, configuration.block_m)


_EFFICIENCY = 0.5
"""Of the arithmetic's peak that is reached."""

_MARGIN = 0.9
"""A gain smaller than what such a model can tell is none."""


def pays(problem: Problem) -> bool:
    """Returns whether one kernel is predicted to take clearly less time than two.

    A kernel takes the longer of its arithmetic, at half of the peak rate, and its traffic with the
    device's memory, in which the bottleneck counts only where the cache does not hold it::

        two:  max(a1, x + b) + max(a3, b)      one:  max(a1 * (1 + again) + a3, x * (1 + again))

    with ``a1`` and ``a3`` for the arithmetic of the convolutions, ``x`` and ``b`` for the traffic
    of the input and the bottleneck, and ``again`` for the part of the 1x1 convolution that is
    computed twice. The rings have to fit in half of the cache. This is a prediction from data
    sheets, not a measurement; where it is true, maps are large and so is the batch.
    """
    architecture = find_architecture(problem.architecture)
    if problem.architecture == "interpreter" or not architecture.memory_bytes:
        return False
    bytes_a_clock = architecture.memory_bytes * problem.multiprocessors
    cache_bytes = architecture.cache_bytes * problem.multiprocessors
    size = problem.dtype.itemsize
    configuration = choose(problem.dtype, problem.precision, problem.architecture)
    if 2 * size * scratch_size(problem, configuration) > cache_bytes:
        return False

    rate = architecture.half
    if problem.dtype == torch.float32:
        is_tf32 = precision_for(architecture.name, problem.precision) == "tf32"
        rate = architecture.tf32 if is_tf32 else architecture.full
    a_pixel = 2 * problem.pixels * problem.bottleneck
    a_pixel /= _EFFICIENCY * rate * problem.multiprocessors
    arithmetic1 = a_pixel * problem.channels
    arithmetic3 = a_pixel * 9 * problem.growth
    x = problem.pixels * problem.channels * size / bytes_a_clock
    bottleneck_bytes = problem.pixels * problem.bottleneck * size
    b = bottleneck_bytes / bytes_a_clock if bottleneck_bytes > cache_bytes else 0.0

    programs = _PROGRAMS * problem.multiprocessors
    again = _lead(problem.width, configuration.block_m) / _tiles_each(
        problem.pixels, configuration.block_m, programs
    )
    two = max(arithmetic1, x + b) + max(arithmetic3, b)
    one = max(arithmetic1 * (1 + again) + arithmetic3, x * (1 + again))
    return one < _MARGIN * two


def dense_layer(
    x: Tensor,
    weight1: PackedWeight,
    prologue: tuple[Tensor, Tensor],
    bias1: Tensor | None,
    weight2: PackedWeight,
    y: Tensor,
    *,
    scratch: Tensor,
    precision: str,
    configuration: Configuration,
) -> list[Launch]:
    """Prepares ``conv3x3(relu(conv1x1(relu(x * scale + shift)) + bias1))``, padded by 1.

    Args:
        x: Pitched ``[N, C, H, W]``; ``C`` as of ``weight1``, or up to whole groups, which are not
            read.
        weight1: ``[bottleneck, C, 1, 1]``, packed in the dtype of ``x``, without more columns than
            whole groups.
        prologue: Scale and shift, float32, packed as :func:`.layout.pack_vector` does.
        bias1: float32 of whole groups, or None.
        weight2: ``[growth, bottleneck, 3, 3]``, packed likewise.
        y: Pitched ``[N, growth, H, W]``, possibly a slice of the buffer of ``x``. It may have more
            channels than ``weight2``, up to those that are packed: those get 0.
        scratch: For the rings, in the dtype of ``x``: best :func:`scratch_size` elements; as many
            programs run as have room, at least one.
        precision: ``"ieee"`` or ``"tf32"``, how float32 is multiplied.
        configuration: Tile sizes. ``block_n`` is that of the bottleneck; in half precision the 3x3
            convolution adds twice ``block_k`` products at a time. The reduction is never split.

    Returns:
        One launch.
    """
    batch, _, height, width = x.shape
    (in_channels,) = weight1.channels
    _, bottleneck, _ = weight2.data.shape
    out_channels = y.shape[1]
    pixels = batch * height * width
    block_m = configuration.block_m
    programs = scratch.numel() // _ring_size(width, bottleneck, block_m)
    tiles = _tiles_each(pixels, block_m, programs)
    return [
        Launch(
            dense_layer_kernel,
            (triton.cdiv(pixels, tiles * block_m),),
            {
                "x_ptr": x,
                "x_pitch": pitch(x),
                "weight1_ptr": weight1.data,
                "scale_ptr": prologue[0],
                "shift_ptr": prologue[1],
                "bias_ptr": bias1,
                "weight2_ptr": weight2.data,
                "weight2_columns": weight2.data.shape[2],
                "y_ptr": y,
                "y_pitch": pitch(y),
                "scratch_ptr": scratch,
                "pixels": pixels,
                "height": height,
                "width": width,
                "tiles": tiles,
                "in_channels": in_channels,
                "out_channels": out_channels,
                "VECTOR": vector_width([x[:, :in_channels]]),
                "BIAS": bias1 is not None,
                "PRECISION": precision,
                "BOTTLENECK": bottleneck,
                "LEAD": _lead(width, block_m),
                "BLOCK_M": block_m,
                "BLOCK_B": min(configuration.block_n, triton.next_power_of_2(bottleneck)),
                "BLOCK_N": min(triton.next_power_of_2(padded(out_channels)), _MAX_BLOCK_N),
                "BLOCK_K1": configuration.block_k,
                "BLOCK_K2": configuration.block_k * 4 // x.element_size(),
            },
            configuration.num_warps,
            configuration.num_stages,
        )
    ]
