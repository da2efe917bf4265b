"""A plan as one flat int64 tensor, the form in which the C++ engine compiles it.

Layout, every entry one int64:

- header: magic, version, batch, input channels, height, width, output channels, height, width,
  number of external inputs, number of external outputs, number of weights, elements in the arena,
  number of buffers, number of steps;
- for each buffer: height, width, channels, pitch, offset in the arena (-1: the network's input in
  any strides, -2: its output, from -3 on downward: external inputs, then external outputs);
- for each step: kind (0 convolution, 1 pool, 2 depthwise convolution, 3 pointwise, 4 resize), how
  many entries the step has, then
  for a convolution: number of segments, (buffer, channel, channels) of each, output buffer,
  channel, channels, distances of the pixels that it writes down and to the right, row and column of
  the first, window, activation, indices of weight, bias, scale and shift (-1: none),
  activation of the prologue;
  for a pool: buffer, channel, channels, output buffer, channel, channels, window, average, divisor
  (-1: pixels on the map, 0: on the padded map), indices of scale and shift (-1: none), activation
  of the prologue;
  for a depthwise convolution: buffer, channel, channels, output buffer, channel, channels, window,
  activation, indices of weight and bias (-1: none);
  for a pointwise step: number of segments, (buffer, channel, channels) of each, output buffer,
  channel, channels, indices of scale and shift (-1: none), activation, the bits of the slope;
  for a resize: buffer, channel, channels, output buffer, channel, channels, mode (0 nearest, 1
  nearest-exact, 2 bilinear), align_corners, the bits of the scale down and to the right.

A window is: kernel height, width, stride down, to the right, padding above, to the left, dilation
down, to the right. Codes of activations are those of :data:`.codes.ACTIVATIONS`; bits are those of
a float32. Where a plan has several inputs or outputs, all are external, but an image.

A head is written as an average pool over the whole map and a 1x1 convolution.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from .codes import (
    ACTIVATIONS,
    CONVOLUTION,
    DEPTHWISE,
    POINTWISE,
    POOL,
    RESIZE,
    RESIZE_MODES,
)
from .ir import FusedConv, Plan, Pointwise, Pool, Prologue, Resize
from .limits import GROUP
from .memory import Arena

__all__ = ["serialize"]

_MAGIC = 0x4E4C5046544E54
_VERSION = 3
_INPUT, _OUTPUT, _FIRST_EXTERNAL = -1, -2, -3


def serialize(plan: Plan, arena: Arena) -> Tensor:
    """Writes a plan's description; its weights are ``plan.weights()``, numbered in that order.

    Args:
        plan: The plan.
        arena: Where its buffers lie.

    Returns:
        An int64 vector, laid out as the module's text says.
    """
    batch = plan.input_shape[0]
    outside = _outside(plan)
    buffers: list[list[int]] = []
    for index, buffer in enumerate(plan.buffers):
        offset = arena.offsets[index]
        place = outside[index] if offset is None else offset
        buffers.append([buffer.height, buffer.width, buffer.channels, arena.pitches[index], place])
    arena_size = arena.size

    weights = 0

    def number(present: bool) -> int:
        nonlocal weights
        weights += present
        return weights - 1 if present else -1

    steps: list[list[int]] = []

    def add(kind: int, *entries: int) -> None:
        steps.append([kind, len(entries) + 2, *entries])

    for step in plan.steps:
        sources = [entry for s in step.inputs for entry in (s.buffer, s.channel, s.channels)]
        output = [step.output.buffer, step.output.channel, step.output.channels]
        if isinstance(step, Pointwise):
            affine = [number(step.scale is not None), number(step.shift is not None)]
            ending = [ACTIVATIONS[step.activation or ""], _bits(step.slope)]
            add(POINTWISE, len(step.inputs), *sources, *output, *affine, *ending)
            continue
        if isinstance(step, Resize):
            scales = map(_bits, step.scale)
            add(RESIZE, *sources, *output, RESIZE_MODES[step.mode], step.align_corners, *scales)
            continue
        if isinstance(step, FusedConv):
            window = [*step.kernel, *step.stride, *step.padding, *step.dilation]
            window.append(ACTIVATIONS[step.activation or ""])
            folded = [number(True), number(step.bias is not None)]
            if step.groups > 1:
                add(DEPTHWISE, *sources, *output, *window, *folded)
                continue
            affine = _prologue(step.prologue, number)
            output += [*step.output_stride, *step.output_start]
            add(CONVOLUTION, len(step.inputs), *sources, *output, *window, *folded, *affine)
            continue
        affine = _prologue(step.prologue, number)
        if isinstance(step, Pool):
            window = [*step.kernel, *step.stride, *step.padding, 1, 1, step.average]
            divisor = -1 if step.divisor is None else step.divisor
            add(POOL, *sources, *output, *window, divisor, *affine)
            continue
        size = plan.buffers[step.input.buffer]
        window = [size.height, size.width, 1, 1, 0, 0, 1, 1, 1, -1]
        if step.weight is None:
            add(POOL, *sources, *output, *window, *affine)
            continue
        pooled = [len(buffers), 0, step.input.channels]
        pitch = -(-step.input.channels // GROUP) * GROUP
        buffers.append([1, 1, step.input.channels, pitch, arena_size])
        arena_size += batch * pitch
        add(POOL, *sources, *pooled, *window, *affine)
        folded = [number(True), number(step.bias is not None)]
        plain = [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0]
        add(CONVOLUTION, 1, *pooled, *output, *plain, *folded, -1, -1, 0)

    out = plan.output
    externals = len(plan.inputs) - plan.image
    header = [
        _MAGIC,
        _VERSION,
        *plan.input_shape,
        out.channels,
        out.height,
        out.width,
        *((0, 0) if plan.classic else (externals, len(plan.output_buffers))),
        weights,
        arena_size,
        len(buffers),
        len(steps),
    ]
    flat = header + [entry for row in buffers + steps for entry in row]
    return torch.tensor(flat, dtype=torch.int64)


def _outside(plan: Plan) -> dict[int, int]:
    """What stands for the place of each buffer outside of the arena."""
    if plan.classic:
        return {0: _INPUT, len(plan.buffers) - 1: _OUTPUT}
    maps = [*plan.inputs[plan.image :], *plan.output_buffers]
    places = {buffer: _FIRST_EXTERNAL - index for index, buffer in enumerate(maps)}
    return places | ({plan.inputs[0]: _INPUT} if plan.image else {})


def _prologue(prologue: Prologue | None, number: Callable[[bool], int]) -> list[int]:
    if prologue is None:
        return [-1, -1, 0]
    return [number(True), number(True), ACTIVATIONS[prologue.activation or ""]]


def _bits(value: float) -> int:
    """The bits of a number in float32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits)
