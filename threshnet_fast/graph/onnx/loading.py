"""From a file to a module."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import fx

from ...text import printable

# Each of these registers rules.
from . import arithmetic, layers, resizing, shapes
from .file import Model, Operation, read
from .translation import RULES, Permuted, Translation, Value

__all__ = ["load_onnx"]

_ROOMS = (arithmetic, layers, resizing, shapes)
# Operators of networks in whole numbers begin or end so.
_QUANTIZED = ("QLinear", "QuantizeLinear", "DequantizeLinear", "DynamicQuantize")
_INTEGER = ("ConvInteger", "MatMulInteger")
_SHOWN = 5


def load_onnx(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Reads the network of an ONNX file.

    It becomes a module of PyTorch's own layers and functions, in evaluation mode, whose parameters
    are those of the file. It takes the inputs in the file's order, of any size that the network can
    take, and returns the result, or a tuple of them. Nothing of the file is executed. Layers that
    are between a transposition and its inverse, as in files that were channels-last, are written
    without both.

    Args:
        path: The file, of operator set 9 or newer. Tensors may lie in other files of its folder.

    Returns:
        The network.

    Raises:
        OSError: The file cannot be read.
        RuntimeError: The package ``onnx`` is missing.
        ValueError: It is no such file, or holds what is not taken: other operators, graphs within
            graphs, quantized networks, data outside of its folder. The message names the node.
    """
    model = read(path)
    name = printable(os.fspath(path))
    _refuse_unknown(model, name)
    t = Translation(model)
    for node in model.operations:
        try:
            made = RULES[node.kind](t, node)
            _keep(t, node, made if isinstance(made, tuple) else (made,))
        except Exception as error:  # whatever PyTorch says of a node that cannot be
            text = printable(" ".join(str(error).split()))[:300] or type(error).__name__
            raise ValueError(f"{name}: {node}: {text}") from error
    results = [t.plain(t.values[output]) for output in model.outputs]
    nodes = [each if isinstance(each, fx.Node) else t.constant_node(each) for each in results]
    t.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
    module = fx.GraphModule(t.root, t.graph)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module.eval()


def _keep(t: Translation, node: Operation, values: Iterable[Value]) -> None:
    for output, value in zip(node.outputs, values, strict=False):
        if not output:
            continue
        t.values[output] = value
        base = value.base if isinstance(value, Permuted) else value
        if isinstance(base, fx.Node):
            t.names[base].append(output)
        if isinstance(value, fx.Node) and output in t.model.ranks:
            t.ranks.setdefault(value, t.model.ranks[output])


def _refuse_unknown(model: Model, name: str) -> None:
    unknown = [node for node in model.operations if node.kind not in RULES]
    if not unknown:
        return
    quantized = [
        node for node in unknown if node.kind.startswith(_QUANTIZED) or node.kind.endswith(_INTEGER)
    ]
    kinds = sorted({node.kind for node in quantized or unknown})
    more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
    listed = ", ".join(kinds[:_SHOWN]) + more
    if quantized:
        raise ValueError(
            f"{name}: {quantized[0]}: it is a quantized network ({listed}): expected one in "
            "floating point"
        )
    raise ValueError(f"{name}: {unknown[0]}: operators that are not known here: {listed}")
