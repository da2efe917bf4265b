"""A plan of training as one flat int64 tensor, the form in which C++ compiles it.

Layout, every entry one int64:

- header: magic, version, number of buffers, of norms, of nodes, index of the output's buffer;
- for each buffer: channels, whether it is temporary;
- for each norm: buffer, first channel, channels;
- for each node: kind (0 convolution, 1 depthwise convolution, 2 maximum, 3 average), activation,
  output buffer, first channel, channels, side, stride and padding of the window, number of reads,
  and buffer, first channel, channels and norm (-1: none) of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .raw import FUSED_ACTIVATIONS, AveragePool, Depthwise, MaxPool, Node, RawPlan

__all__ = ["serialize_raw"]

_MAGIC = 0x574152464E54
_VERSION = 1
_CONVOLUTION, _DEPTHWISE, _MAX_POOL, _AVERAGE_POOL = range(4)


def serialize_raw(plan: RawPlan) -> Tensor:
    """Writes a plan's description.

    Args:
        plan: The plan; its parameters are the weights of its convolutions in the order of the
            nodes, then gamma and beta of each norm.

    Returns:
        An int64 vector, laid out as the module's text says.
    """
    flat = [_MAGIC, _VERSION, len(plan.buffers), len(plan.norms), len(plan.nodes), plan.output]
    for buffer in plan.buffers:
        flat += [buffer.channels, buffer.temporary]
    for norm in plan.norms:
        flat += [norm.buffer, norm.channel, norm.channels]
    for node in plan.nodes:
        flat += [_kind(node), FUSED_ACTIVATIONS[node.activation], node.buffer, node.channel]
        flat += [node.channels, node.kernel, node.stride, node.padding, len(node.reads)]
        for read in node.reads:
            norm_index = -1 if read.norm is None else read.norm
            flat += [read.buffer, read.channel, read.channels, norm_index]
    return torch.tensor(flat, dtype=torch.int64)


def _kind(node: Node) -> int:
    if isinstance(node, MaxPool):
        return _MAX_POOL
    if isinstance(node, AveragePool):
        return _AVERAGE_POOL
    return _DEPTHWISE if isinstance(node, Depthwise) else _CONVOLUTION
