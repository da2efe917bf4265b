"""What operations of PyTorch are as nodes of graphs: one table for all their spellings.

A module of :mod:`torch.nn`, a function, a method of tensors and an operator of aten are one
operation here; the table has a row for each spelling, with the names of its arguments.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as modules

from .activations import ACTIVATIONS, kind_of, slope_of
from .ir import (
    Activate,
    Add,
    Concat,
    Conv,
    ConvTranspose,
    Flatten,
    Graph,
    Linear,
    Mean,
    Node,
    Norm,
    Pad,
    Pool,
    Resize,
)
from .ir import Slice as SliceNode
from .settings import DROPOUTS, SETTINGS, TENSORS, override
from .trace import META, Shape, hooked, name_of

__all__ = [
    "SPLITS",
    "Operation",
    "Unsupported",
    "name_for_people",
    "operation",
    "piece",
    "resize_like",
]


# What a gradient does not pass, though its value is the same.
_STOPS_GRADIENTS = frozenset(["data", "detach"])


class Unsupported(Exception):
    """Why a node is none of a graph: what follows its name."""


Build = Callable[[Graph, str, tuple[int, ...]], int]


@dataclass(frozen=True)
class Operation:
    """A node of torch.fx as one of a graph.

    Attributes:
        reads: The nodes whose values it reads.
        build: Adds it, given the graph, its name and the values; returns the value that it makes.
    """

    reads: tuple[fx.Node, ...]
    build: Build


SPLITS: dict[str, Callable[..., Any]] = {
    "chunk": torch.chunk,
    "split": torch.split,
    "split_with_sizes": torch.split_with_sizes,
    "aten.chunk": torch.ops.aten.chunk.default,
    "aten.split": torch.ops.aten.split.Tensor,
    "aten.split_with_sizes": torch.ops.aten.split_with_sizes.default,
    "aten.batch_norm": torch.ops.aten._native_batch_norm_legit_no_training.default,
    "aten.max_pool2d": torch.ops.aten.max_pool2d_with_indices.default,
}
"""Operations with several results, of which each can be an operation of its own."""


def piece(index: int, split: str, *args: Any, **kwargs: Any) -> Any:
    """One of the results of an operation of ``SPLITS``."""
    return SPLITS[split](*args, **kwargs)[index]


def resize_like(value: Tensor, like: Tensor, **settings: Any) -> Tensor:
    """``interpolate(value)`` to the height and width of another map."""
    return F.interpolate(value, size=like.shape[2:], **settings)


def name_for_people(node: fx.Node) -> str:
    """The path of the module that a node comes from, or its own name."""
    if node.op == "call_module":
        stack = node.meta.get("nn_module_stack")
        return str(_last(stack) or node.target)
    return str(_last(node.meta.get("nn_module_stack")) or node.name)


def _last(stack: Any) -> str | None:
    if not stack:
        return None
    path = str(next(reversed(stack.values()))[0]).removeprefix("L['self'].")
    # What torch.export made up itself is none of the module's.
    return None if path.startswith("_empty_nn_module_stack") else path or None


def operation(root: nn.Module, node: fx.Node, training: bool = False) -> Operation:
    """What a node is in a graph.

    Args:
        root: The module that has what the node refers to.
        node: A call, with the shapes of what it reads in its ``meta``.
        training: Whether the graph is to be trained: then norms may take the batch's statistics,
            and gradients stop where the module says so.

    Raises:
        Unsupported: It is none of a graph.
    """
    if node.op == "call_module":
        return _of_module(root, node, training)
    if training and name_of(node) in _STOPS_GRADIENTS:
        raise Unsupported("stops gradients")
    target: Any = node.target
    args: list[Any] = list(node.args)
    kwargs = dict(node.kwargs)
    index = 0
    if target is piece:
        index, split, *args = args
        target = SPLITS[split]
    if isinstance(target, torch._ops.OpOverload):
        row = _ATEN.get(target._schema.name.removeprefix("aten::"))
        names = [argument.name for argument in target._schema.arguments]
        defaults = {
            argument.name: argument.default_value
            for argument in target._schema.arguments
            if argument.has_default_value()
        }
    else:
        row, names, defaults = None, [], {}
        found = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(target)
        if found is not None:
            (names, defaults), row = found
    if row is None:
        raise Unsupported(f"is a {_describe(node)}, which no plan can express")
    if len(args) > len(names):
        raise Unsupported(f"is a {_describe(node)} with arguments that are not known")
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    if isinstance(target, torch._ops.OpOverload):
        given = {_RENAMED.get(name, name): value for name, value in given.items()}
    return row(_Context(root, node, index, training), given)


def _describe(node: fx.Node) -> str:
    target: Any = node.target
    if target is piece:
        target = SPLITS[str(node.args[1])]
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return str(getattr(target, "__name__", target)) if target is not getattr else name_of(node)


@dataclass(frozen=True)
class _Context:
    root: nn.Module
    node: fx.Node
    index: int = 0
    training: bool = False

    def tensor(self, value: Any, what: str) -> Tensor | None:
        """A parameter, buffer or constant that an operation reads."""
        if value is None:
            return None
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                raise Unsupported(f"has a {what} that is computed")
            value = operator.attrgetter(str(value.target))(self.root)
        if not isinstance(value, Tensor):
            raise Unsupported(f"has a {what} that is no tensor")
        return value

    def required(self, value: Any, what: str) -> Tensor:
        found = self.tensor(value, what)
        if found is None:
            raise Unsupported(f"has no {what}")
        return found

    def shape(self, value: Any, what: str = "input") -> Shape:
        """The record of a tensor that the graph computes."""
        found = value.meta.get(META) if isinstance(value, fx.Node) else None
        if found is None:
            raise Unsupported(f"has an {what} that is no tensor")
        if cast(fx.Node, value).op == "get_attr":
            raise Unsupported(f"has an {what} that is a constant")
        return cast(Shape, found)

    def map(self, value: Any) -> Shape:
        """The record of a map of features."""
        found = self.shape(value)
        if len(found.shape) != 4 or not found.dtype.is_floating_point:
            raise Unsupported(
                f"reads {found.dtype} of shape {list(found.shape)}: expected a map "
                "[N, C, H, W] of floating point"
            )
        return found

    def features(self, value: Any) -> Shape:
        """The record of a map of features, or of vectors of them."""
        found = self.shape(value)
        if len(found.shape) == 2 and found.dtype.is_floating_point:
            return found
        return self.map(value)

    def result(self) -> Shape:
        found = self.node.meta.get(META)
        if found is None:
            raise Unsupported("makes no tensor of a known shape")
        return cast(Shape, found)


Row = Callable[[_Context, dict[str, Any]], Operation]


def _like(graph: Graph, value: int) -> int:
    return graph.value(graph.channels[value])


def _alias(context: _Context, value: Any) -> Operation:
    context.shape(value)
    return Operation((value,), lambda graph, name, values: values[0])


def _plain(value: Any, what: str) -> Any:
    """A setting that must be known before anything runs."""
    leaves = value if isinstance(value, (tuple, list)) else [value]
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
            raise Unsupported(f"has a {what} that is computed")
    return tuple(value) if isinstance(value, list) else value


def _pair(value: Any, what: str) -> tuple[Any, Any]:
    value = _plain(value, what)
    if not isinstance(value, tuple):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    if len(value) != 2:
        raise Unsupported(f"has {what} {value}: expected two numbers")
    return value


# Convolutions


def _conv(context: _Context, given: dict[str, Any]) -> Operation:
    if given.get("transposed"):
        return _conv_transpose(context, given)
    context.map(given["input"])
    weight = context.required(given["weight"], "weight")
    bias = context.tensor(given["bias"], "bias")
    stride, dilation = _pair(given["stride"], "stride"), _pair(given["dilation"], "dilation")
    padding = _padding(_plain(given["padding"], "padding"), weight, dilation)
    groups = given["groups"]
    conv = _convolution(weight, bias, stride, padding, dilation, groups)
    return _conv_of(given["input"], conv)


def _convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> nn.Conv2d:
    """A convolution of given tensors."""
    if weight.dim() != 4:
        raise Unsupported(f"has a weight of shape {list(weight.shape)}")
    outputs, inputs, height, width = weight.shape
    conv = nn.Conv2d(
        inputs * groups,
        outputs,
        (height, width),
        stride,
        padding,
        dilation,
        groups,
        bias=bias is not None,
        device="meta",
    )
    return _with_tensors(conv, weight=weight, bias=bias)


_M = TypeVar("_M", bound=nn.Module)


def _with_tensors(module: _M, **tensors: Tensor | None) -> _M:
    """Gives a module the very tensors, in evaluation mode."""
    for name, tensor in tensors.items():
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        if tensor is None or isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
    return module.eval()


def _padding(padding: Any, weight: Tensor, dilation: tuple[int, int]) -> Any:
    """Rows of padding above and below, columns left and right; "same" where they differ."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        extents = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(extent % 2 for extent in extents):
            return padding
        return extents[0] // 2, extents[1] // 2
    return _pair(padding, "padding")


def _conv_of(value: fx.Node, conv: nn.Conv2d) -> Operation:
    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return _add(graph, Conv(name, values, graph.value(conv.out_channels), conv, name))

    return Operation((value,), build)


def _add(graph: Graph, node: Node) -> int:
    graph.check(node)
    return graph.add(node)


def _conv_module(context: _Context, module: nn.Conv2d, value: Any) -> Operation:
    context.map(value)
    if module.padding_mode != "zeros":
        raise Unsupported(f"has padding_mode {module.padding_mode!r}, which no plan can express")
    if isinstance(module.padding, str):
        dilation = _pair(module.dilation, "dilation")
        padding = _padding(module.padding, module.weight, dilation)
        stride = _pair(module.stride, "stride")
        return _conv_of(
            value,
            _convolution(module.weight, module.bias, stride, padding, dilation, module.groups),
        )
    return _conv_of(value, module)


def _conv_transpose(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["input"])
    weight = context.required(given["weight"], "weight")
    bias = context.tensor(given["bias"], "bias")
    if weight.dim() != 4:
        raise Unsupported(f"has a weight of shape {list(weight.shape)}")
    inputs, outputs, height, width = weight.shape
    conv = nn.ConvTranspose2d(
        inputs,
        outputs * given["groups"],
        (height, width),
        _pair(given["stride"], "stride"),
        _pair(given["padding"], "padding"),
        _pair(given["output_padding"], "output_padding"),
        given["groups"],
        bias is not None,
        _pair(given["dilation"], "dilation"),
        device="meta",
    )
    return _conv_transpose_of(given["input"], _with_tensors(conv, weight=weight, bias=bias))


def _conv_transpose_of(value: fx.Node, conv: nn.ConvTranspose2d) -> Operation:
    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return _add(graph, ConvTranspose(name, values, graph.value(conv.out_channels), conv))

    return Operation((value,), build)


def _conv_transpose_module(context: _Context, module: nn.ConvTranspose2d, value: Any) -> Operation:
    context.map(value)
    return _conv_transpose_of(value, module)


def _pad(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["input"])
    pads, mode, value = (_plain(given[name], name) for name in ("pad", "mode", "value"))
    if mode != "constant" or value not in (None, 0):
        raise Unsupported(f"pads by {mode} {value or ''}".rstrip() + ", not with zeros")
    if not isinstance(pads, tuple) or len(pads) > 4 or not all(pad >= 0 for pad in pads):
        raise Unsupported(f"pads by {pads}: expected rows and columns around a map")
    left, right, top, bottom = (*pads, 0, 0, 0, 0)[:4]

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return graph.add(Pad(name, values, _like(graph, values[0]), (top, left), (bottom, right)))

    return Operation((given["input"],), build)


def _pad_module(context: _Context, module: nn.ConstantPad2d, value: Any) -> Operation:
    given = {"input": value, "pad": module.padding, "mode": "constant", "value": module.value}
    return _pad(context, given)


# Normalisation


def _norm(context: _Context, given: dict[str, Any]) -> Operation:
    context.features(given["input"])
    if given.get("training"):
        if not context.training:
            raise Unsupported("normalises by the statistics of the batch")
        return _norm_of_batch(context, given)
    mean = context.required(given["running_mean"], "running_mean")
    var = context.required(given["running_var"], "running_var")
    weight, bias = (context.tensor(given[name], name) for name in ("weight", "bias"))
    norm = nn.BatchNorm2d(mean.numel(), _plain(given["eps"], "eps"), device="meta")
    return _norm_of(
        given["input"],
        _with_tensors(norm, weight=weight, bias=bias, running_mean=mean, running_var=var),
    )


def _norm_of_batch(context: _Context, given: dict[str, Any]) -> Operation:
    """A norm in training mode, whose batches somebody else counts."""
    names = "weight", "bias", "running_mean", "running_var"
    tensors = {name: context.tensor(given[name], name) for name in names}
    channels, momentum = context.map(given["input"]).shape[1], _plain(given["momentum"], "momentum")
    norm = nn.BatchNorm2d(channels, _plain(given["eps"], "eps"), momentum, device="meta")
    norm.num_batches_tracked = None
    norm.track_running_stats = tensors["running_mean"] is not None
    return _norm_of(given["input"], _with_tensors(norm, **tensors).train())


def _norm_of(value: fx.Node, norm: nn.BatchNorm2d) -> Operation:
    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return _add(graph, Norm(name, values, graph.value(norm.num_features), norm))

    return Operation((value,), build)


def _norm_module(
    context: _Context, module: nn.BatchNorm1d | nn.BatchNorm2d, value: Any
) -> Operation:
    if isinstance(module, nn.BatchNorm1d):
        if context.training:
            raise Unsupported("is a BatchNorm1d, which no training has")
        if len(context.shape(value).shape) != 2:
            raise Unsupported("normalises sequences, which no plan can express")
    context.features(value)
    if context.training:
        return _norm_of(value, cast(nn.BatchNorm2d, module))
    if module.running_mean is None or module.running_var is None:
        raise Unsupported("keeps no running statistics, so it cannot be folded")
    if module.training:
        raise Unsupported("normalises by the statistics of the batch")
    if isinstance(module, nn.BatchNorm2d):
        return _norm_of(value, module)
    tensors = {name: getattr(module, name) for name in TENSORS}
    norm = nn.BatchNorm2d(module.num_features, module.eps, device="meta")
    return _norm_of(value, _with_tensors(norm, **tensors))


# Activations


def _activate(kind: str, argument: str = "input") -> Row:
    def row(context: _Context, given: dict[str, Any]) -> Operation:
        return _activation(context, given[argument], kind)

    return row


def _activation(context: _Context, value: Any, kind: str, slope: float = 0.0) -> Operation:
    context.features(value)

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return graph.add(Activate(name, values, _like(graph, values[0]), kind, slope))

    return Operation((value,), build)


def _leaky_relu(context: _Context, given: dict[str, Any]) -> Operation:
    slope = float(_plain(given["negative_slope"], "negative_slope"))
    return _activation(context, given["input"], "leaky_relu", slope)


def _clamp(context: _Context, given: dict[str, Any]) -> Operation:
    low, high = (given[name] for name in ("min", "max"))
    limits = tuple(None if isinstance(each, (fx.Node, Tensor)) else each for each in (low, high))
    if low == 0 and high is None:
        return _activation(context, given["input"], "relu")
    if limits == (0, 6):
        return _activation(context, given["input"], "relu6")
    raise Unsupported(f"clamps to {low} and {high}, which no plan can express")


def _hardtanh(context: _Context, given: dict[str, Any]) -> Operation:
    return _clamp(context, {**given, "min": given["min_val"], "max": given["max_val"]})


def _activation_module(context: _Context, module: nn.Module, value: Any) -> Operation:
    if isinstance(module, nn.Hardtanh):
        limits = {"min": module.min_val, "max": module.max_val}
        return _clamp(context, {"input": value, **limits})
    return _activation(context, value, kind_of(module), slope_of(module))


# Concatenations, sums and slices


def _cat(context: _Context, given: dict[str, Any]) -> Operation:
    values, dim = given["tensors"], given["dim"]
    if not isinstance(values, (tuple, list)) or not values:
        raise Unsupported("concatenates a list that is computed")
    shapes = [context.features(value) for value in values]
    if dim not in (1, 1 - len(shapes[0].shape)):
        raise Unsupported(f"concatenates along dimension {dim}, expected 1")
    if len({shape.dtype for shape in shapes}) > 1:
        raise Unsupported("concatenates maps of different dtypes")

    def build(graph: Graph, name: str, read: tuple[int, ...]) -> int:
        if len(read) == 1:
            return read[0]
        channels = sum(shape.shape[1] for shape in shapes)
        return graph.add(Concat(name, read, graph.value(channels)))

    return Operation(tuple(values), build)


def _sum(context: _Context, given: dict[str, Any]) -> Operation:
    left, right = given["input"], given["other"]
    if given.get("alpha", 1) != 1:
        raise Unsupported(f"adds {given['alpha']} times a map")
    for value, other in ((left, right), (right, left)):
        if isinstance(value, fx.Node) and type(other) in (int, float) and other == 0:
            return _alias(context, value)
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        raise Unsupported("adds a number to a map")
    shapes = context.features(left), context.features(right)
    if shapes[0] != shapes[1]:
        raise Unsupported(
            f"adds shapes {list(shapes[0].shape)} and {list(shapes[1].shape)}: expected equal ones"
        )

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return graph.add(Add(name, values, _like(graph, values[0])))

    return Operation((left, right), build)


def _channels(context: _Context, value: Any, begin: int, end: int) -> Operation:
    channels = context.map(value).shape[1]
    begin, end, _ = slice(begin, end).indices(channels)
    if end <= begin:
        raise Unsupported("takes no channels")

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        if (begin, end) == (0, channels):
            return values[0]
        return graph.add(SliceNode(name, values, graph.value(end - begin), begin, end))

    return Operation((value,), build)


def _getitem(context: _Context, given: dict[str, Any]) -> Operation:
    value, index = given["input"], given["index"]
    context.map(value)
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [each for each in index if not isinstance(each, fx.Node)]:
        position = [each is Ellipsis for each in index].index(True)
        fill = (slice(None),) * (5 - len(index))
        index = (*index[:position], *fill, *index[position + 1 :])
    index = (*index, *(slice(None),) * (4 - len(index)))
    whole = slice(None)
    if len(index) != 4 or any(
        not isinstance(each, slice) or (dim != 1 and each not in (whole, slice(0, None)))
        for dim, each in enumerate(index)
    ):
        raise Unsupported("takes a part that is no slice of channels")
    part = index[1]
    _plain([part.start, part.stop, part.step], "slice")
    if part.step not in (None, 1):
        raise Unsupported(f"takes every {part.step}-th channel")
    return _channels(context, value, part.start, part.stop)


def _slice(context: _Context, given: dict[str, Any]) -> Operation:
    begin, end, step = (_plain(given[name], name) for name in ("start", "end", "step"))
    if given["dim"] not in (1, -3):
        shape = context.map(given["input"]).shape
        if begin in (None, 0) and (end is None or end >= 2**62) and step == 1:
            return _alias(context, given["input"])
        raise Unsupported(f"takes a part along dimension {given['dim']} of {list(shape)}")
    if step != 1:
        raise Unsupported(f"takes every {step}-th channel")
    return _channels(context, given["input"], begin, end)


def _narrow(context: _Context, given: dict[str, Any]) -> Operation:
    start, length = (_plain(given[name], name) for name in ("start", "length"))
    if given["dim"] not in (1, -3):
        raise Unsupported(f"takes a part along dimension {given['dim']}")
    start += context.map(given["input"]).shape[1] if start < 0 else 0
    return _channels(context, given["input"], start, start + length)


def _part(context: _Context, given: dict[str, Any], sizes: list[int]) -> Operation:
    """One of the parts into which channels are split."""
    if given["dim"] not in (1, -3):
        raise Unsupported(f"splits dimension {given['dim']}, expected 1")
    index = range(len(sizes))[context.index]
    begin = sum(sizes[:index])
    return _channels(context, given["input"], begin, begin + sizes[index])


def _split(context: _Context, given: dict[str, Any]) -> Operation:
    sizes, channels = _plain(given["sizes"], "size"), context.map(given["input"]).shape[1]
    if isinstance(sizes, int):
        sizes = [min(sizes, channels - begin) for begin in range(0, channels, sizes)]
    return _part(context, given, list(sizes))


def _chunk(context: _Context, given: dict[str, Any]) -> Operation:
    channels = context.map(given["input"]).shape[1]
    size = -(-channels // _plain(given["chunks"], "number of chunks"))
    return _split(context, {**given, "sizes": size})


# Pools


def _max_pool(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["input"])
    if given.get("return_indices"):
        raise Unsupported("returns indices, which no plan can express")
    settings = {name: _plain(given[name], name) for name in _MAX_POOL}
    return _pool_of(context, given["input"], nn.MaxPool2d(**_own_stride(settings)))


def _avg_pool(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["input"])
    settings = {name: _plain(given[name], name) for name in SETTINGS[nn.AvgPool2d]}
    return _pool_of(context, given["input"], nn.AvgPool2d(**_own_stride(settings)))


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _own_stride(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a pool where no stride is that of its window."""
    return {**settings, "stride": settings["stride"] or None}


def _pool_of(context: _Context, value: Any, pool: nn.Module) -> Operation:
    context.map(value)
    if isinstance(pool, nn.MaxPool2d):
        if pool.return_indices:
            raise Unsupported("returns indices, which no plan can express")
        if pool.dilation not in (1, (1, 1), [1, 1]):
            raise Unsupported(f"has dilation {pool.dilation}, which no plan can express")
    # The module's own keeps its mode.
    module = cast("nn.MaxPool2d | nn.AvgPool2d", copy.copy(pool).eval() if pool.training else pool)

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return graph.add(Pool(name, values, _like(graph, values[0]), module))

    return Operation((value,), build)


def _pool_module(context: _Context, module: nn.Module, value: Any) -> Operation:
    return _pool_of(context, value, module)


def _mean_of(context: _Context, value: Any, flat: bool) -> Operation:
    context.map(value)

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        mean = graph.add(Mean(name, values, _like(graph, values[0])))
        return graph.add(Flatten(name, (mean,), _like(graph, mean))) if flat else mean

    return Operation((value,), build)


def _adaptive_pool(context: _Context, given: dict[str, Any]) -> Operation:
    size = _plain(given["output_size"], "output_size")
    if size not in (1, (1, 1)):
        raise Unsupported(f"pools to {size}: expected 1x1")
    return _mean_of(context, given["input"], False)


def _adaptive_pool_module(context: _Context, module: Any, value: Any) -> Operation:
    return _adaptive_pool(context, {"input": value, "output_size": module.output_size})


def _mean(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["input"])
    dims = _plain(given["dim"], "dim")
    if given.get("dtype") not in (None, context.map(given["input"]).dtype):
        raise Unsupported("changes the dtype")
    dims = dims if isinstance(dims, tuple) else (dims,)
    if sorted(dim % 4 if isinstance(dim, int) else -1 for dim in dims) != [2, 3]:
        raise Unsupported(f"averages over dimensions {list(dims)}: expected 2 and 3")
    return _mean_of(context, given["input"], not given["keepdim"])


# Shapes


def _reshape(context: _Context, given: dict[str, Any]) -> Operation:
    """What changes nothing but perhaps drops a height and width of 1."""
    before, after = context.shape(given["input"]).shape, context.result().shape
    if before == after:
        return _alias(context, given["input"])
    if len(before) != 4 or before[2:] != (1, 1) or after != before[:2]:
        raise Unsupported(f"changes the shape from {list(before)} to {list(after)}")
    context.map(given["input"])

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return graph.add(Flatten(name, values, _like(graph, values[0])))

    return Operation((given["input"],), build)


def _flatten(context: _Context, given: dict[str, Any]) -> Operation:
    before = context.shape(given["input"]).shape
    if given["start_dim"] % len(before) != 1 or given["end_dim"] % len(before) != len(before) - 1:
        raise Unsupported("flattens other dimensions than all behind the first")
    return _reshape(context, given)


def _flatten_module(context: _Context, module: Any, value: Any) -> Operation:
    dims = {"start_dim": module.start_dim, "end_dim": module.end_dim}
    return _flatten(context, {"input": value, **dims})


def _view(context: _Context, given: dict[str, Any]) -> Operation:
    """A view of given sizes, of which a batch that is a number would not follow the input's."""
    if context.shape(given["input"]).shape == context.result().shape:
        raise Unsupported("changes the shape to given sizes")
    sizes = given["shape"]
    raise Unsupported(f"changes the shape to sizes {sizes}, which no plan can express")


def _squeeze(context: _Context, given: dict[str, Any]) -> Operation:
    dims = _plain(given["dim"], "dim")
    if not isinstance(dims, tuple) or sorted(dim % 4 for dim in dims) != [2, 3]:
        raise Unsupported("drops single dimensions")
    return _reshape(context, given)


def _identity(context: _Context, given: dict[str, Any]) -> Operation:
    value = given["input"]
    before, after = context.shape(value), context.result()
    if before != after:
        raise Unsupported(f"changes {before} to {after}")
    return _alias(context, value)


def _dropout(context: _Context, given: dict[str, Any]) -> Operation:
    if given.get("training", given.get("train", False)) and given["p"] != 0:
        raise Unsupported("drops elements by chance")
    return _identity(context, given)


def _dropout_module(context: _Context, module: nn.Module, value: Any) -> Operation:
    return _dropout(context, {"input": value, "p": module.p, "training": module.training})


def _identity_module(context: _Context, module: nn.Module, value: Any) -> Operation:
    return _identity(context, {"input": value})


# Linear layers


def _linear(context: _Context, given: dict[str, Any]) -> Operation:
    weight, bias = (
        context.required(given["weight"], "weight"),
        context.tensor(given["bias"], "bias"),
    )
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    return _linear_of(context, given["input"], _with_tensors(linear, weight=weight, bias=bias))


def _linear_of(context: _Context, value: Any, linear: nn.Linear) -> Operation:
    shape = context.shape(value)
    if len(shape.shape) != 2 or not shape.dtype.is_floating_point:
        raise Unsupported(f"reads shape {list(shape.shape)}: expected [N, C]")

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        return _add(graph, Linear(name, values, graph.value(linear.weight.shape[0]), linear))

    return Operation((value,), build)


def _linear_module(context: _Context, module: nn.Linear, value: Any) -> Operation:
    return _linear_of(context, value, module)


# Other sizes


def _resize(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["input"])
    size, factor = (_plain(given[name], name) for name in ("size", "scale_factor"))
    if size is not None:
        return _resize_of(context, given, size=_pair(size, "size"))
    factors = _pair(factor, "scale_factor")
    if None in factors:
        raise Unsupported("has neither a size nor a scale_factor")
    return _resize_of(context, given, factors=(float(factors[0]), float(factors[1])))


def _resize_like(context: _Context, given: dict[str, Any]) -> Operation:
    context.map(given["like"])
    return _resize_of(context, given, like=given["like"])


def _resize_of(
    context: _Context,
    given: dict[str, Any],
    *,
    size: tuple[int, int] | None = None,
    factors: tuple[float, float] | None = None,
    like: fx.Node | None = None,
) -> Operation:
    context.map(given["input"])
    mode = given.get("mode", "nearest")
    if mode not in ("nearest", "nearest-exact", "bilinear"):
        raise Unsupported(f"has mode {mode!r}, which no plan can express")
    if given.get("antialias"):
        raise Unsupported("has antialias, which no plan can express")
    corners, recompute = bool(given.get("align_corners")), bool(given.get("recompute_scale_factor"))

    def build(graph: Graph, name: str, values: tuple[int, ...]) -> int:
        output = _like(graph, values[0])
        return graph.add(Resize(name, values, output, mode, corners, size, factors, recompute))

    value = given["input"]
    return Operation((value,) if like is None else (value, like), build)


def _upsample(mode: str) -> Row:
    def row(context: _Context, given: dict[str, Any]) -> Operation:
        scales = [given.get(f"scales_{side}") for side in "hw"]
        if given.get("output_size") is not None and any(each is not None for each in scales):
            # The scales, not the sizes, then say where pixels lie.
            raise Unsupported("has a size and scales")
        return _resize(
            context,
            {
                **given,
                "size": given.get("output_size"),
                "scale_factor": given.get("scale_factors"),
                "mode": mode,
            },
        )

    return row


def _upsample_module(context: _Context, module: nn.Upsample, value: Any) -> Operation:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    return _resize(context, {"input": value, **{name: getattr(module, name) for name in names}})


# The table


def _signature(text: str) -> tuple[list[str], dict[str, Any]]:
    """Names of arguments and their defaults, of a text like ``"input dim=1"``."""
    parts = [part.partition("=") for part in text.split()]
    defaults = {name: ast.literal_eval(value) for name, equals, value in parts if equals}
    return [name for name, _, _ in parts], defaults


_Spellings = dict[Any, tuple[tuple[list[str], dict[str, Any]], Row]]
_FUNCTIONS: _Spellings = {}
_METHODS: _Spellings = {}
_ATEN: dict[str, Row] = {}


def _row(signature: str, row: Row, functions: Sequence[Any] = (), methods: str = "") -> None:
    """Adds an operation's functions and methods, which have the same arguments, to the table."""
    for function in functions:
        _FUNCTIONS[function] = _signature(signature), row
    for method in methods.split():
        _METHODS[method] = _signature(signature), row


_row(
    "input weight bias=None stride=1 padding=0 dilation=1 groups=1",
    _conv,
    [F.conv2d],
)
_row(
    "input weight bias=None stride=1 padding=0 output_padding=0 groups=1 dilation=1",
    _conv_transpose,
    [F.conv_transpose2d],
)
_row(
    "input running_mean running_var weight=None bias=None training=False momentum=0.1 eps=1e-5",
    _norm,
    [F.batch_norm],
)
_row(
    "input weight bias running_mean running_var training momentum eps cudnn_enabled",
    _norm,
    [torch.batch_norm],
)
_row("input inplace=False", _activate("relu"), [F.relu, torch.relu], "relu")
_row("input inplace=False", _activate("relu6"), [F.relu6])
_row("input inplace=False", _activate("hardswish"), [F.hardswish])
_row("input inplace=False", _activate("silu"), [F.silu])
_row("input", _activate("sigmoid"), [F.sigmoid, torch.sigmoid, torch.special.expit], "sigmoid")
_row("input negative_slope=0.01 inplace=False", _leaky_relu, [F.leaky_relu])
_row("input min_val=-1.0 max_val=1.0 inplace=False", _hardtanh, [F.hardtanh])
_row("input min=None max=None", _clamp, [torch.clamp, torch.clip], "clamp clip")
_row(
    "input min",
    lambda context, given: _clamp(context, {**given, "max": None}),
    [torch.clamp_min],
    "clamp_min",
)
_row("tensors dim=0", _cat, [torch.cat, torch.concat, torch.concatenate])
_row("input other alpha=1", _sum, [operator.add, torch.add], "add __add__")
_row("input index", _getitem, [operator.getitem], "__getitem__")
_row("input dim start length", _narrow, [torch.narrow], "narrow")
_row("input sizes dim=0", _split, [torch.split, torch.split_with_sizes])
_row("input chunks dim=0", _chunk, [torch.chunk])
_row(
    "input kernel_size stride=None padding=0 dilation=1 ceil_mode=False return_indices=False",
    _max_pool,
    [F.max_pool2d, torch.max_pool2d],
)
_row(
    "input kernel_size stride=None padding=0 ceil_mode=False count_include_pad=True "
    "divisor_override=None",
    _avg_pool,
    [F.avg_pool2d],
)
_row("input output_size", _adaptive_pool, [F.adaptive_avg_pool2d])
_row("input dim=None keepdim=False dtype=None", _mean, [torch.mean], "mean")
_row("input start_dim=0 end_dim=-1", _flatten, [torch.flatten], "flatten")
_row("input dim=None", _squeeze, [torch.squeeze], "squeeze")
_row(
    "input p=0.5 training=True inplace=False",
    _dropout,
    [F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout],
)
_row("input p=0.5 train=True", _dropout, [torch.dropout, torch.feature_dropout])
_row("input memory_format=None", _identity, [torch.clone], "contiguous clone")
_row("input", _identity, [torch.detach, torch.positive], "detach float double half bfloat16")
_row(
    "input a=None b=None c=None d=None dtype=None device=None non_blocking=None copy=None "
    "memory_format=None",
    _identity,
    [],
    "to type type_as",
)
_row("input weight bias=None", _linear, [F.linear])
_row("input pad mode='constant' value=None", _pad, [F.pad])
_row(
    "input size=None scale_factor=None mode='nearest' align_corners=None "
    "recompute_scale_factor=None antialias=False",
    _resize,
    [F.interpolate, F.upsample],
)
_row("input like mode='nearest' align_corners=None antialias=False", _resize_like, [resize_like])

# Arguments of operators have other names, which are made those of the functions.
_RENAMED = {"self": "input", "split_size": "sizes", "split_sizes": "sizes"}


def _aten(names: str, row: Row) -> None:
    for name in names.split():
        _ATEN[name] = row


_aten("conv2d convolution", _conv)
_aten("conv_transpose2d", _conv_transpose)
_aten("batch_norm _native_batch_norm_legit_no_training", _norm)
_aten("relu", _activate("relu"))
_aten("relu6", _activate("relu6"))
_aten("hardswish", _activate("hardswish"))
_aten("silu", _activate("silu"))
_aten("sigmoid", _activate("sigmoid"))
_aten("leaky_relu", _leaky_relu)
_aten("hardtanh", _hardtanh)
_aten("clamp", _clamp)
_aten("clamp_min", lambda context, given: _clamp(context, {**given, "max": None}))
_aten("cat concat concatenate", _cat)
_aten("add", _sum)
_aten("slice", _slice)
_aten("narrow", _narrow)
_aten("split split_with_sizes", _split)
_aten("chunk", _chunk)
_aten("max_pool2d max_pool2d_with_indices", _max_pool)
_aten("avg_pool2d", _avg_pool)
_aten("adaptive_avg_pool2d _adaptive_avg_pool2d", _adaptive_pool)
_aten("mean", _mean)
_aten("flatten", _flatten)
_aten("squeeze", _squeeze)
_aten("dropout feature_dropout", _dropout)
_aten("clone detach alias contiguous to _to_copy lift_fresh_copy positive", _identity)
_aten("linear", _linear)
_aten("pad", _pad)
_aten("constant_pad_nd", lambda context, given: _pad(context, {**given, "mode": "constant"}))
_aten("upsample_nearest2d", _upsample("nearest"))
_aten("_upsample_nearest_exact2d", _upsample("nearest-exact"))
_aten("upsample_bilinear2d", _upsample("bilinear"))

_MODULES: dict[type[nn.Module], Callable[[_Context, Any, Any], Operation]] = {
    nn.Conv2d: _conv_module,
    nn.ConvTranspose2d: _conv_transpose_module,
    nn.BatchNorm1d: _norm_module,
    nn.BatchNorm2d: _norm_module,
    nn.ConstantPad2d: _pad_module,
    nn.MaxPool2d: _pool_module,
    nn.AvgPool2d: _pool_module,
    nn.AdaptiveAvgPool2d: _adaptive_pool_module,
    nn.Flatten: _flatten_module,
    nn.Linear: _linear_module,
    nn.Upsample: _upsample_module,
    nn.Identity: _identity_module,
    **dict.fromkeys(DROPOUTS, _dropout_module),
    **dict.fromkeys(ACTIVATIONS, _activation_module),
    nn.Hardtanh: _activation_module,
}


def _of_module(root: nn.Module, node: fx.Node, training: bool) -> Operation:
    module = root.get_submodule(str(node.target))
    kind = next((kind for kind in _MODULES if isinstance(module, kind)), None)
    if kind is None:
        raise Unsupported(f"is a {type(module).__name__}, which no plan can express")
    own = override(module, kind)
    if own is not None:
        raise Unsupported(f"is not exactly a {kind.__name__}: it has a {own} of its own")
    if hooked(module) or _any_global_hook():
        raise Unsupported("has hooks, which a plan would not call")
    values = [*node.args, *node.kwargs.values()]
    if len(values) != 1:
        raise Unsupported(f"is called with {len(values)} arguments")
    return _MODULES[kind](_Context(root, node, training=training), module, values[0])


def _any_global_hook() -> bool:
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
