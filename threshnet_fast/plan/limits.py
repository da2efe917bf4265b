"""What the kernels of an engine take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..graph.ir import UnsupportedModule
from .ir import FusedConv, Plan, Pointwise, Pool, Resize, Step

__all__ = [
    "GROUP",
    "MAX_PIXELS",
    "MAX_TAPS",
    "check_gpu",
    "live_taps",
    "of_convolution_on_a_gpu",
    "of_convolution_on_the_cpu",
    "reads_input",
]

# csrc/kernel_limits.h has the same numbers, and kernels/layout.py the first.
GROUP = 16
"""Channels come in groups of as many, and buffers are aligned to as many elements."""

# Indices of pixels are 32-bit in the kernels, those behind the last pixel in the last tile too;
# offsets are 64-bit.
MAX_PIXELS = 2**31 - 1024
"""The most pixels of a map on a GPU."""

MAX_TAPS = 64
"""The most taps of a kernel on the CPU."""

# The C++ engine for the CPU counts pixels in 32 bits, and reads the channels of a plan up to these.
_MAX_CPU_PIXELS = 2**31 - 1
_MAX_CHANNELS = 2**24


def check_gpu(plan: Plan) -> None:
    """Raises an error for what no kernel executes.

    Args:
        plan: The plan, with or without the values of its weights.

    Raises:
        UnsupportedModule: A map is too large, a segment begins within a group of channels, the
            input is read by anything but a plain convolution at the beginning, there are several
            inputs or outputs, or a step is of a kind, or has a window, that only the CPU's engine
            has.
    """
    if not plan.classic:
        raise UnsupportedModule(
            "the plan has several inputs or outputs, or one that is no image, which no GPU takes"
        )
    for step in plan.steps:
        if isinstance(step, Pointwise | Resize):
            raise UnsupportedModule(
                f"{step.name} is {step.describe()!r} on its own, for which no GPU has a kernel"
            )
        if isinstance(step, FusedConv | Pool):
            _check_window(plan, step)
        if isinstance(step, FusedConv):
            if step.prologue is not None and step.prologue.activation != "relu":
                raise UnsupportedModule(
                    f"{step.name} normalises its input without ReLU, for which no GPU has a kernel"
                )
            if step.groups > 1:
                raise UnsupportedModule(f"{step.name} is depthwise, for which no GPU has a kernel")
            if step.activation not in (None, "relu"):
                raise UnsupportedModule(
                    f"{step.name} has activation {step.activation!r}, which no GPU kernel has"
                )
        elif step.prologue is not None:
            raise UnsupportedModule(
                f"{step.name} normalises what it pools, for which no GPU has a kernel"
            )
    pixels = plan.input_shape[0] * max(buffer.pixels for buffer in plan.buffers)
    if pixels > MAX_PIXELS:
        raise UnsupportedModule(f"a feature map has {pixels} pixels, more than {MAX_PIXELS}")
    first, *others = plan.steps
    if not (
        isinstance(first, FusedConv)
        and reads_input(first)
        and len(first.inputs) == 1
        and first.prologue is None
    ):
        raise UnsupportedModule("the network does not begin with a plain convolution")
    if any(map(reads_input, others)):
        raise UnsupportedModule("the network reads its input more than once")
    for step in others:
        for segment in step.inputs:
            if segment.channel % GROUP:
                raise UnsupportedModule(f"{step.name} reads from channel {segment.channel}")


def _check_window(plan: Plan, step: FusedConv | Pool) -> None:
    """Raises an error for windows that differ in their directions, or go on behind the padding."""
    source, target = plan.buffers[step.inputs[0].buffer], plan.buffers[step.output.buffer]
    stride, padding = step.stride[0], step.padding[0]
    expected = tuple(
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel in zip((source.height, source.width), step.kernel, strict=True)
    )
    sparse = isinstance(step, FusedConv) and (step.dilation, step.output_stride) != ((1, 1), (1, 1))
    if (
        sparse
        or step.stride != (stride, stride)
        or step.padding != (padding, padding)
        or (target.height, target.width) != expected
    ):
        raise UnsupportedModule(
            f"{step.name} has a window that is dilated, or moves or is padded differently in its "
            "directions, or writes some of the pixels, for which no GPU has a kernel"
        )
    if isinstance(step, Pool) and step.average and (padding or step.divisor):
        raise UnsupportedModule(
            f"{step.name} is an average with padding or a divisor of its own, for which no GPU has "
            "a kernel"
        )


def reads_input(step: Step) -> bool:
    """Returns whether a step reads the network's input."""
    return any(segment.buffer == 0 for segment in step.inputs)


def of_convolution_on_the_cpu(
    xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
) -> dict[str, tuple[int, int]]:
    """Returns what is limited of an operator on the CPU, how many there are and may be.

    Its kernels check the same before they touch any memory, but what they refuse is an error.
    Offsets within a feature map have 64 bits, so that a map may have any number of elements.

    Args:
        xs: The segments of the convolution's input.
        weight: ``[C_out, channels of xs, kernel height, kernel width]``.
        shape: Of the result.
        padding: The zero padding.
    """
    batch, _, height, width = xs[0].shape
    out_channels, channels, rows, columns = weight.shape
    # Windows begin at a pixel that may lie on the padding, before or behind all of the map's own.
    before = padding * (width + 1)
    row, column = max(height + padding - rows, 0), max(width + padding - columns, 0)
    behind = ((batch - 1) * height + row) * width + column
    return {
        "taps of a kernel": (rows * columns, MAX_TAPS),
        "channels of xs": (channels, _MAX_CHANNELS),
        "channels of the result": (out_channels, _MAX_CHANNELS),
        "segments": (len(xs), 2**20 - 2),
        "rows and columns of padding": (padding, 2**20 - 1),
        "pixels of xs": (batch * height * width, _MAX_CPU_PIXELS),
        "output pixels": (batch * shape[2] * shape[3], 2**27),
        "pixels to where a window begins": (max(before, behind), _MAX_CPU_PIXELS - 14),
    }


def of_convolution_on_a_gpu(
    xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
) -> dict[str, tuple[int, int]]:
    """Returns the same of one on a GPU; see :func:`of_convolution_on_the_cpu`."""
    batch, _, height, width = xs[0].shape
    rows, columns = weight.shape[2:]
    out_channels = weight.shape[0] + GROUP - 1
    channels = weight.shape[1] + (GROUP - 1) * len(xs)
    elements = out_channels * channels * rows * columns
    sizes = {
        "pixels of xs": batch * height * width,
        "output pixels": batch * shape[2] * shape[3],
        "padded rows": height + 2 * padding,
        "padded columns": width + 2 * padding,
        "pixels under a window": rows * (width + columns),
        f"elements of weight, channels in groups of {GROUP}": elements,
    }
    return {what: (count, MAX_PIXELS) for what, count in sizes.items()}


def live_taps(size: int, out_size: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Returns the taps, in one direction, that can meet a pixel, from the first to the last.

    A padded 3x3 window on a map of one pixel has one such tap, not nine.

    Args:
        size: Pixels of the input.
        out_size: Pixels of the output.
        kernel: Taps of the window.
        stride: Distance of windows.
        padding: Zeros before the first pixel and behind the last.

    Returns:
        The first of them, and the one behind the last; ``(0, 0)`` where there are none.
    """
    live = [
        tap
        for tap in range(kernel)
        if (first := max(0, -(-(padding - tap) // stride))) < out_size
        and first * stride - padding + tap < size
    ]
    return (live[0], live[-1] + 1) if live else (0, 0)
