"""What the kernels of an engine take."""

from __future__ import annotations

from ..graph.ir import UnsupportedModule
from .ir import FusedConv, Plan, Step

__all__ = ["GROUP", "MAX_PIXELS", "MAX_TAPS", "check_gpu", "live_taps", "reads_input"]

# csrc/kernel_limits.h has the same numbers, and kernels/layout.py the first.
GROUP = 16
"""Channels come in groups of as many, and buffers are aligned to as many elements."""

# Indices of pixels are 32-bit in the kernels, those behind the last pixel in the last tile too;
# offsets are 64-bit.
MAX_PIXELS = 2**31 - 1024
"""The most pixels of a map on a GPU."""

MAX_TAPS = 64
"""The most taps of a kernel on the CPU."""


def check_gpu(plan: Plan) -> None:
    """Raises an error for what no kernel executes.

    Args:
        plan: The plan, with or without the values of its weights.

    Raises:
        UnsupportedModule: A map is too large, a segment begins within a group of channels, the
            input is read by anything but a plain convolution at the beginning, or a step is of a
            kind that only the CPU's engine has.
    """
    for step in plan.steps:
        if isinstance(step, FusedConv):
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


def reads_input(step: Step) -> bool:
    """Returns whether a step reads the network's input."""
    return any(segment.buffer == 0 for segment in step.inputs)


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
