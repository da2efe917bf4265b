"""The reference executor: a plan in plain PyTorch, the oracle of every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .ir import FusedConv, Plan, Pool, Segment, Step

__all__ = ["activate", "execute_reference"]


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
    batch = plan.input_shape[0]
    buffers = [
        torch.full((batch, b.channels, b.height, b.width), torch.nan, dtype=dtype, device=x.device)
        for b in plan.buffers
    ]
    buffers[0] = x.to(dtype)

    def view(segment: Segment) -> Tensor:
        end = segment.channel + segment.channels
        return buffers[segment.buffer][:, segment.channel : end]

    for step in plan.steps:
        result = _execute(step, torch.cat([view(segment) for segment in step.inputs], 1), dtype)
        view(step.output).copy_(result)
        if observe is not None:
            observe(step, result)
    return buffers[-1].flatten(1) if plan.flat_output else buffers[-1]


def _execute(step: Step, x: Tensor, dtype: torch.dtype) -> Tensor:
    if step.prologue is not None:
        scale, shift = step.prologue.scale.to(dtype), step.prologue.shift.to(dtype)
        x = torch.relu(x * scale[:, None, None] + shift[:, None, None])
    if isinstance(step, FusedConv):
        bias = None if step.bias is None else step.bias.to(dtype)
        weight = step.weight.to(dtype)
        x = F.conv2d(x, weight, bias, step.stride, step.padding, groups=step.groups)
        return activate(x, step.activation)
    if isinstance(step, Pool):
        if step.average:
            return F.avg_pool2d(x, step.kernel, step.stride)
        return F.max_pool2d(x, step.kernel, step.stride, step.padding)
    x = x.mean((2, 3))
    if step.weight is not None:
        x = F.linear(x, step.weight.to(dtype), None if step.bias is None else step.bias.to(dtype))
    return x[:, :, None, None]


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Returns what a convolution's activation makes of its sums."""
    if activation is None:
        return x
    return torch.relu(x) if activation == "relu" else F.relu6(x)
