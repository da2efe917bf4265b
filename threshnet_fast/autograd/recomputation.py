"""A chain in plain PyTorch, for gradients that are to be differentiated themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engines.training import Normalization
from ..plan.raw import AveragePool, MaxPool, Node, RawPlan, Read

__all__ = ["recompute"]

_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}


def recompute(
    plan: RawPlan,
    x: Tensor,
    weights: Sequence[Tensor | None],
    norms: Sequence[Normalization],
    from_batch: Sequence[bool],
) -> Tensor:
    """Returns what a chain returned, as a differentiable function of its input and parameters.

    No running statistics change.

    Args:
        plan: What the chain computes.
        x: ``[N, C, H, W]``, its input.
        weights: Of each node, None for pools.
        norms: Each norm; its statistics matter where they are not the batch's.
        from_batch: Whether each norm takes the batch's statistics.
    """
    # Of each buffer, the channels that nodes wrote, by the first of them.
    written: list[dict[int, Tensor]] = [{} for _ in plan.buffers]
    written[0][0] = x

    def read_normalised(read: Read) -> Tensor:
        parts = written[read.buffer]
        channels = range(read.channel, read.channel + read.channels)
        values = torch.cat([parts[first] for first in sorted(parts) if first in channels], 1)
        if read.norm is None:
            return values
        norm, batch = norms[read.norm], from_batch[read.norm]
        mean, variance = (None, None) if batch else norm.statistics.unbind()
        return F.batch_norm(values, mean, variance, norm.gamma, norm.beta, batch, 0.0, norm.eps)

    for node, weight in zip(plan.nodes, weights, strict=True):
        values = torch.cat([read_normalised(read) for read in node.reads], 1)
        if node.activation:
            values = _ACTIVATIONS[node.activation](values)
        written[node.buffer][node.channel] = _run(node, values, weight)
    channels = plan.buffers[plan.output].channels
    return read_normalised(Read(plan.output, 0, channels))


def _run(node: Node, x: Tensor, weight: Tensor | None) -> Tensor:
    if isinstance(node, MaxPool):
        return F.max_pool2d(x, node.kernel, node.stride, node.padding)
    if isinstance(node, AveragePool):
        return F.avg_pool2d(x, node.kernel, node.stride)
    assert weight is not None
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, None, node.stride, node.padding, 1, groups)
