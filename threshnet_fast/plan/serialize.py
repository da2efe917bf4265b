"""A plan as one flat int64 tensor, the form in which the C++ engine compiles it.

Layout, every entry one int64:

- header: magic, version, batch, input channels, height, width, output channels, height, width,
  number of external inputs, number of weights, elements in the arena, number of buffers, number of
  steps;
- for each buffer: height, width, pitch, offset in the arena (-1: the network's input, -2: its
  output);
- for each step: kind (0 convolution, 1 pool, 2 depthwise convolution), number of entries of the
  step, then
  for a convolution: number of segments, (buffer, channel, channels) of each, output buffer,
  channel, channels, kernel height, width, stride, padding, activation (0 none, 1 ReLU, 2 ReLU6),
  indices of weight, bias, scale and shift (-1: none);
  for a pool: buffer, channel, channels, output buffer, channel, channels, kernel height, width,
  stride, padding, average, and, where it normalises its input, indices of scale and shift;
  for a depthwise convolution: buffer, channel, channels, output buffer, channel, channels, kernel
  height, width, stride, padding, activation, indices of weight and bias (-1: none).

A head is written as an average pool over the whole map and a 1x1 convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import ACTIVATIONS, CONVOLUTION, DEPTHWISE, POOL
from .ir import FusedConv, Plan, Pool
from .limits import GROUP
from .memory import Arena

__all__ = ["serialize"]

_MAGIC = 0x4E4C5046544E54
_VERSION = 1
_INPUT, _OUTPUT = -1, -2


def serialize(plan: Plan, arena: Arena) -> Tensor:
    """Writes a plan's description; its weights are ``plan.weights()``, numbered in that order.

    Args:
        plan: The plan.
        arena: Where its buffers lie.

    Returns:
        An int64 vector, laid out as the module's text says.
    """
    batch = plan.input_shape[0]
    last = len(plan.buffers) - 1
    buffers: list[list[int]] = []
    for index, buffer in enumerate(plan.buffers):
        offset = arena.offsets[index]
        if offset is None:
            offset = _INPUT if index == 0 else _OUTPUT
        buffers.append([buffer.height, buffer.width, arena.pitches[index], offset])
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
        prologue = step.prologue is not None
        if isinstance(step, FusedConv):
            window = [
                *step.kernel,
                step.stride[0],
                step.padding[0],
                ACTIVATIONS[step.activation or ""],
            ]
            folded = [number(True), number(step.bias is not None)]
            if step.groups > 1:
                add(DEPTHWISE, *sources, *output, *window, *folded)
                continue
            affine = [number(prologue), number(prologue)]
            add(CONVOLUTION, len(step.inputs), *sources, *output, *window, *folded, *affine)
            continue
        affine = [number(True), number(True)] if prologue else []
        if isinstance(step, Pool):
            window = [*step.kernel, step.stride[0], step.padding[0], step.average]
            add(POOL, *sources, *output, *window, *affine)
            continue
        size = plan.buffers[step.input.buffer]
        window = [size.height, size.width, 1, 0, 1]
        if step.weight is None:
            add(POOL, *sources, *output, *window, *affine)
            continue
        pooled = [len(buffers), 0, step.input.channels]
        pitch = -(-step.input.channels // GROUP) * GROUP
        buffers.append([1, 1, pitch, arena_size])
        arena_size += batch * pitch
        add(POOL, *sources, *pooled, *window, *affine)
        folded = [number(True), number(step.bias is not None)]
        add(CONVOLUTION, 1, *pooled, *output, 1, 1, 1, 0, 0, *folded, -1, -1)

    out = plan.buffers[last]
    header = [
        _MAGIC,
        _VERSION,
        *plan.input_shape,
        out.channels,
        out.height,
        out.width,
        0,
        weights,
        arena_size,
        len(buffers),
        len(steps),
    ]
    flat = header + [entry for row in buffers + steps for entry in row]
    return torch.tensor(flat, dtype=torch.int64)
