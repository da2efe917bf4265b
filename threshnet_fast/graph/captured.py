"""What :func:`torch.compile` captures, made a module: weights among its inputs become its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .ir import UnsupportedModule

__all__ = ["unlift"]


def unlift(captured: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """Makes a module of a captured graph.

    Args:
        captured: The graph, all of whose inputs are tensors or sizes of them.
        inputs: Its inputs; parameters and buffers are the very ones.

    Returns:
        A module that has the parameters and buffers, by reference, and takes the other tensors, in
        their order; and where among the inputs they are. Sizes are read of the tensors.

    Raises:
        UnsupportedModule: A size is that of no input.
    """
    tensors: dict[str, Tensor] = {}
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    positions: list[int] = []
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    sizes: list[fx.Node] = []
    for index, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if not isinstance(value, Tensor):
            sizes.append(node)
        elif _is_static(node, value):
            name = f"weight_{index}"
            tensors[name] = value
            copied[node] = graph.get_attr(name)
        else:
            positions.append(index)
            copied[node] = graph.node_copy(node)
    for node in sizes:
        if node.users:
            copied[node] = _size(graph, node, placeholders, copied)
    for node in captured.graph.nodes:
        if node.target is torch.Size:
            # Which takes numbers alone, not what stands for them in a trace.
            copied[node] = fx.map_arg(tuple(node.args[0]), copied.__getitem__)
        elif node.op not in ("placeholder", "output"):
            copied[node] = graph.node_copy(node, copied.__getitem__)
            # Made up with sizes that may be symbols; the module is traced anew on real tensors.
            copied[node].meta.pop("example_value", None)
    (output,) = (node for node in captured.graph.nodes if node.op == "output")
    graph.output(fx.map_arg(output.args[0], copied.__getitem__))
    module = fx.GraphModule(_holder(tensors), graph)
    for name, child in captured.named_children():
        module.add_module(name, child)
    for name, tensor in (*captured.named_parameters(recurse=False),):
        module.register_parameter(name, tensor)
    for name, buffer in (*captured.named_buffers(recurse=False),):
        module.register_buffer(name, buffer)
    return module.eval(), positions


def _holder(tensors: dict[str, Tensor]) -> nn.Module:
    holder = nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder.register_buffer(name, tensor)
    return holder


def _is_static(node: fx.Node, value: Tensor) -> bool:
    """Whether an input is a parameter or a buffer."""
    return isinstance(value, nn.Parameter) or "_dynamo_static_input_type" in node.meta.get(
        "tensor_dict", {}
    )


def _size(
    graph: fx.Graph,
    node: fx.Node,
    placeholders: Sequence[fx.Node],
    copied: dict[fx.Node, Any],
) -> fx.Node:
    """A node that reads a size of one of the inputs."""
    value: Any = node.meta.get("example_value")
    for other in placeholders:
        fake = other.meta.get("example_value")
        if other not in copied or not isinstance(fake, Tensor):
            continue
        sizes: Any = fake.shape
        for dimension, size in enumerate(sizes):
            symbols = isinstance(size, torch.SymInt) and isinstance(value, torch.SymInt)
            if symbols and size.node.expr == value.node.expr:
                return graph.call_method("size", (copied[other], dimension))
    raise UnsupportedModule(f"{node.name} is an input that is no tensor")
