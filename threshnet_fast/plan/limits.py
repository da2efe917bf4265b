"""What the kernels of an engine take."""

from __future__ import annotations

from ..graph.ir import UnsupportedModule
from ..kernels.layout import GROUP
from .ir import FusedConv, Plan, Step

__all__ = ["GROUP", "MAX_PIXELS", "check_gpu", "reads_input"]

# Indices of pixels are 32-bit in the kernels, those behind the last pixel in the last tile too;
# offsets are 64-bit.
MAX_PIXELS = 2**31 - 1024


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
