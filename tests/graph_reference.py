"""Graphs run node by node in plain PyTorch, in float64: what plans of them are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threshnet_fast.graph import ir

__all__ = ["run_graph"]


def run_graph(graph: ir.Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Runs a graph in evaluation.

    Args:
        graph: What to run.
        inputs: Its inputs, in order; taken as float64.

    Returns:
        Its outputs, in float64.
    """
    assert len(inputs) == len(graph.inputs)
    values = {
        value: given.detach().double() for value, given in zip(graph.inputs, inputs, strict=True)
    }
    with torch.no_grad():
        for node in graph.nodes:
            values[node.output] = _run(node, [values[value] for value in node.inputs])
            channels = graph.channels[node.output]
            assert channels is None or values[node.output].shape[1] == channels, node.name
    return [values[value] for value in graph.outputs]


def _double(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double()


def _run(node: ir.Node, read: list[Tensor]) -> Tensor:
    x = read[0]
    if isinstance(node, ir.Conv):
        conv = node.module
        padding = conv.padding
        settings = conv.stride, padding, conv.dilation, conv.groups
        return F.conv2d(x, _double(conv.weight), _double(conv.bias), *settings)
    if isinstance(node, ir.ConvTranspose):
        conv = node.module
        settings = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        return F.conv_transpose2d(x, _double(conv.weight), _double(conv.bias), *settings)
    if isinstance(node, ir.Norm):
        norm = node.module
        assert not norm.training
        tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return F.batch_norm(x, *map(_double, tensors), False, 0.0, norm.eps)
    if isinstance(node, ir.Activate):
        if node.kind == "leaky_relu":
            return F.leaky_relu(x, node.slope)
        return getattr(F, node.kind)(x)
    if isinstance(node, ir.Concat):
        return torch.cat(read, 1)
    if isinstance(node, ir.Add):
        assert len({each.shape for each in read}) == 1
        return torch.stack(read).sum(0)
    if isinstance(node, ir.Slice):
        assert 0 <= node.begin < node.end <= x.shape[1]
        return x[:, node.begin : node.end]
    if isinstance(node, ir.Resize):
        size = read[1].shape[2:] if len(read) > 1 else node.size
        corners = node.align_corners if node.mode == "bilinear" else None
        factors = node.factors if size is None else None
        recompute = (node.recompute or None) if size is None else None
        return F.interpolate(x, size, factors, node.mode, corners, recompute)
    if isinstance(node, ir.Pad):
        (top, left), (bottom, right) = node.before, node.after
        return F.pad(x, (left, right, top, bottom))
    if isinstance(node, ir.Pool):
        assert isinstance(node.module, (nn.MaxPool2d, nn.AvgPool2d))
        return node.module(x)
    if isinstance(node, ir.Mean):
        return x.mean((2, 3), keepdim=True)
    if isinstance(node, ir.Flatten):
        assert x.shape[2:] == (1, 1)
        return x.flatten(1)
    if isinstance(node, ir.Linear):
        return F.linear(x, _double(node.module.weight), _double(node.module.bias))
    if isinstance(node, ir.Dropout):
        return x
    raise AssertionError(f"{node.name} is a {type(node).__name__}")
