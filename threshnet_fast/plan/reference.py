"""The reference executor: a plan in plain PyTorch, the oracle of every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .ir import FusedConv, Plan, Pointwise, Pool, Resize, Segment, Step

__all__ = ["activate", "execute_reference", "reference_outputs", "reference_step"]


def execute_reference(
    plan: Plan,
    x: Tensor,
    dtype: torch.dtype = torch.float64,
    observe: Callable[[Step, Tensor], None] | None = None,
) -> Tensor:
    """Executes a plan step by step, with concatenations and padding as PyTorch does them.

    Buffers start as NaN, so that a step which reads what no step wrote shows in the result.

    Args:
        plan: The plan.
        x: The input, ``[N, C, H, W]`` as in ``plan.input_shape``.
        dtype: What to calculate in.
        observe: Called after each step with the step and its output, ``[N, C, H, W]``.

    Returns:
        ``[N, classes]`` or ``[N, C, H, W]``, in ``dtype``.

    Raises:
        ValueError: ``x`` does not have the plan's input shape.
    """
    if tuple(x.shape) != plan.input_shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected {plan.input_shape}")
    buffers = _execute(plan, [x], dtype, observe)
    return buffers[-1].flatten(1) if plan.flat_output else buffers[-1]


def reference_outputs(
    plan: Plan, xs: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Executes a plan of any number of inputs and outputs.

    Args:
        plan: The plan.
        xs: Its inputs, ``[N, C, H, W]``.
        dtype: What to calculate in.

    Returns:
        Its outputs, ``[N, C, H, W]`` or, where flat, ``[N, C]``, in ``dtype``.

    Raises:
        ValueError: There are more or fewer ``xs`` than inputs, or one has another shape.
    """
    if len(xs) != len(plan.inputs):
        raise ValueError(f"xs has {len(xs)} tensors: expected {len(plan.inputs)}")
    for index, x in zip(plan.inputs, xs, strict=True):
        buffer = plan.buffers[index]
        expected = (plan.input_shape[0], buffer.channels, buffer.height, buffer.width)
        if tuple(x.shape) != expected:
            raise ValueError(f"an x has shape {tuple(x.shape)}: expected {expected}")
    buffers = _execute(plan, xs, dtype, None)
    flat = plan.flat_outputs or (plan.flat_output,) * len(plan.returned)
    found = [_view(buffers, segment) for segment in plan.returned]
    return [y.flatten(1) if flat else y for y, flat in zip(found, flat, strict=True)]


def _execute(
    plan: Plan,
    xs: Sequence[Tensor],
    dtype: torch.dtype,
    observe: Callable[[Step, Tensor], None] | None,
) -> list[Tensor]:
    """All buffers of a plan that has been executed."""
    batch = plan.input_shape[0]
    buffers = [
        torch.full(
            (batch, b.channels, b.height, b.width), torch.nan, dtype=dtype, device=xs[0].device
        )
        for b in plan.buffers
    ]
    for index, x in zip(plan.inputs, xs, strict=True):
        buffers[index] = x.to(dtype)
    for step in plan.steps:
        output = _written(_view(buffers, step.output), step)
        _, _, height, width = output.shape
        inputs = [_view(buffers, segment) for segment in step.inputs]
        result = reference_step(step, inputs, (height, width))
        output.copy_(result)
        if observe is not None:
            observe(step, result)
    return buffers


def _view(buffers: Sequence[Tensor], segment: Segment) -> Tensor:
    return buffers[segment.buffer].narrow(1, segment.channel, segment.channels)


def _written(output: Tensor, step: Step) -> Tensor:
    """The pixels of a map that a step writes."""
    if not isinstance(step, FusedConv):
        return output
    (row, column), (down, right) = step.output_start, step.output_stride
    return output[:, :, row::down, column::right]


def reference_step(step: Step, inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Executes one step.

    Args:
        step: The step.
        inputs: What it reads, ``[N, C, H, W]`` each, in the dtype to calculate in.
        size: Height and width of what it writes.

    Returns:
        What it writes.
    """
    dtype = inputs[0].dtype
    if isinstance(step, Pointwise):
        total = torch.stack(list(inputs)).sum(0)
        if step.scale is not None and step.shift is not None:
            scale, shift = step.scale.to(dtype), step.shift.to(dtype)
            total = total * scale[:, None, None] + shift[:, None, None]
        return activate(total, step.activation, step.slope)
    x = torch.cat(list(inputs), 1)
    if isinstance(step, Resize):
        return _resize(step, x, size)
    if step.prologue is not None:
        scale, shift = step.prologue.scale.to(dtype), step.prologue.shift.to(dtype)
        x = activate(x * scale[:, None, None] + shift[:, None, None], step.prologue.activation)
    if isinstance(step, FusedConv):
        bias = None if step.bias is None else step.bias.to(dtype)
        x = _padded(x, step.kernel, step.stride, step.padding, step.dilation, size)
        weight = step.weight.to(dtype)
        x = F.conv2d(x, weight, bias, step.stride, 0, step.dilation, step.groups)
        return activate(x, step.activation)
    if isinstance(step, Pool):
        return _pool(step, x, size)
    x = x.mean((2, 3))
    if step.weight is not None:
        x = F.linear(x, step.weight.to(dtype), None if step.bias is None else step.bias.to(dtype))
    return x[:, :, None, None]


def _padded(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    value: float = 0.0,
) -> Tensor:
    """A map with its padding above and to the left, and as much behind as its windows reach."""
    (top, left), (rows, columns) = padding, x.shape[2:]
    reached = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(size, stride, kernel, dilation, strict=True)
    ]
    # A negative padding cuts off what no window reaches.
    behind = (0, reached[1] - left - columns, 0, reached[0] - top - rows)
    return F.pad(F.pad(x, (left, 0, top, 0), value=value), behind, value=value)


def _pool(step: Pool, x: Tensor, size: tuple[int, int]) -> Tensor:
    def padded(t: Tensor, value: float = 0.0) -> Tensor:
        return _padded(t, step.kernel, step.stride, step.padding, (1, 1), size, value)

    if not step.average:
        return F.max_pool2d(padded(x, -torch.inf), step.kernel, step.stride)
    total = F.avg_pool2d(padded(x), step.kernel, step.stride, divisor_override=1)
    if step.divisor:
        return total / step.divisor
    ones = torch.ones_like(x[:1, :1])
    if step.divisor == 0:
        (top, left) = step.padding
        ones = F.pad(ones, (left, left, top, top), value=1.0)
        reached = [(n - 1) * s + k for n, s, k in zip(size, step.stride, step.kernel, strict=True)]
        height, width = ones.shape[2:]
        ones = F.pad(ones, (0, reached[1] - width, 0, reached[0] - height))
    else:
        ones = padded(ones)
    return total / F.avg_pool2d(ones, step.kernel, step.stride, divisor_override=1)


def _resize(step: Resize, x: Tensor, size: tuple[int, int]) -> Tensor:
    """By gathering the pixels: where they lie is decided in float32, whatever is calculated in."""
    for dimension in (2, 3):
        extent, out = x.shape[dimension], size[dimension - 2]
        scale = torch.tensor(step.scale[dimension - 2], dtype=torch.float32)
        if step.mode != "nearest-exact" and out == extent:
            scale = torch.tensor(1.0)
        elif step.mode == "nearest" and out == 2 * extent:
            scale = torch.tensor(0.5)
        index = torch.arange(out, dtype=torch.float32)
        if step.mode == "nearest" or step.align_corners:
            position = index * scale
        else:
            position = (index + 0.5) * scale
        if step.mode == "bilinear" and not step.align_corners:
            position = (position - 0.5).clamp_min(0)
        first = position.floor().clamp_max(extent - 1).long()
        near = x.index_select(dimension, first.to(x.device))
        if step.mode != "bilinear":
            x = near
            continue
        weight = (position - first).clamp(0, 1).to(x.device, x.dtype)
        weight = weight[:, None] if dimension == 2 else weight
        far = x.index_select(dimension, (first + 1).clamp_max(extent - 1).to(x.device))
        x = near * (1 - weight) + far * weight
    return x


def activate(x: Tensor, activation: str | None, slope: float = 0.0) -> Tensor:
    """Returns what an activation makes of what a step computed.

    Args:
        x: What it computed.
        activation: One of :data:`.codes.ACTIVATIONS`, or None.
        slope: Of a leaky ReLU below zero.
    """
    if activation is None:
        return x
    if activation == "leaky_relu":
        return F.leaky_relu(x, slope)
    return _ACTIVATIONS[activation](x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}
