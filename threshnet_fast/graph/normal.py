"""The normal form of graphs of torch.fx, in which every operation reads and makes maps alone.

Parts of a split are operations of their own, sizes that are another map's are read of that map, and
each parameter has one reader. The operations compute what they did, whatever the sizes.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from .operators import SPLITS, piece, resize_like
from .trace import META, hooked

__all__ = ["normalise"]

_SPLIT_BY = {function: name for name, function in SPLITS.items()}


def normalise(traced: fx.GraphModule) -> fx.GraphModule:
    """Brings a graph with noted shapes into its normal form, in place.

    Args:
        traced: A graph without in-place operations.

    Returns:
        The same.
    """
    for node in list(traced.graph.nodes):
        if node.op in ("call_function", "call_method"):
            _pieces(node)
            _resize(node)
            _exported_resize(node)
            _flatten(node)
    _drop_dead(traced)
    _one_reader_each(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


def _pieces(node: fx.Node) -> None:
    """Makes each part of a split an operation of its own."""
    if node.op == "call_method":
        split = str(node.target) if node.target in SPLITS else None
    else:
        split = _SPLIT_BY.get(cast(Any, node.target))
    users = list(node.users)
    if split is None or not all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in users
    ):
        return
    for user in users:
        user.target, user.kwargs = piece, dict(node.kwargs)
        user.args = (user.args[1], split, *node.args)


def _resize(node: fx.Node) -> None:
    """Has a resizing to the size of another map read that map."""
    if node.target is not F.interpolate:
        return
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("scale_factor") is not None:
        return
    like = _map_of_size(given.get("size"))
    if like is None or like.meta.get(META) is None or len(like.meta[META].shape) != 4:
        return
    node.target = resize_like
    node.args = (given["input"], like)
    settings = ("mode", "align_corners", "antialias")
    node.kwargs = {name: given[name] for name in settings if given.get(name) is not None}


_RESIZING = {
    torch.ops.aten.upsample_nearest2d.vec: {"mode": "nearest"},
    torch.ops.aten._upsample_nearest_exact2d.vec: {"mode": "nearest-exact"},
    torch.ops.aten.upsample_bilinear2d.vec: {"mode": "bilinear"},
}


def _exported_resize(node: fx.Node) -> None:
    """The same of an exported graph, whose sizes are expressions of the input's."""
    settings: dict[str, Any] | None = _RESIZING.get(cast(Any, node.target))
    if settings is None or not isinstance(node.args[1], (tuple, list)):
        return
    wanted = [_expression(side) for side in node.args[1]]
    if None in wanted:
        return
    other: Any = node.prev
    while other.op != "root":
        shape = getattr(other.meta.get("val"), "shape", ())
        if len(shape) == 4 and [str(side) for side in shape[2:]] == wanted:
            break
        other = other.prev
    else:
        return
    if settings["mode"] == "bilinear":
        settings = {**settings, "align_corners": bool(node.args[2])}
    node.target, node.args, node.kwargs = resize_like, (node.args[0], other), settings


def _expression(size: Any) -> str | None:
    """What a size is in terms of the input's; None of a number."""
    value = size.meta.get("val") if isinstance(size, fx.Node) else None
    return None if value is None else str(value)


def _map_of_size(size: Any) -> fx.Node | None:
    """The map whose height and width a size is."""
    if isinstance(size, (tuple, list)) and len(size) == 2:
        sides = [_dimension(each) for each in size]
        if None in sides:
            return None
        (first, rows), (second, columns) = cast("list[tuple[fx.Node, int]]", sides)
        return first if first is second and (rows, columns) == (2, 3) else None
    if not isinstance(size, fx.Node) or size.target is not operator.getitem:
        return None
    value, index = _shape(size.args[0]), size.args[1]
    spatial = (slice(2, None), slice(-2, None), slice(2, 4))
    return value if isinstance(index, slice) and index in spatial else None


def _dimension(size: Any) -> tuple[fx.Node, int] | None:
    """The map of which a number is a size, and which size that is."""
    if not isinstance(size, fx.Node):
        return None
    if size.target is operator.getitem and isinstance(size.args[1], int):
        inner, index = size.args[0], size.args[1]
        whole = _shape(inner)
        if whole is not None:
            return whole, index % 4
        # One of the last two sizes.
        like = _map_of_size(inner)
        return None if like is None else (like, 2 + index % 2)
    if size.target in ("size", torch.ops.aten.sym_size.int) and len(size.args) == 2:
        value, dim = size.args
        if isinstance(value, fx.Node) and isinstance(dim, int):
            return value, dim % 4
    return None


def _shape(size: Any) -> fx.Node | None:
    """The map of which something is the shape."""
    if not isinstance(size, fx.Node) or not isinstance(size.args[0], fx.Node):
        return None
    whole = size.op == "call_method" and size.target == "size" and len(size.args) == 1
    named = size.target is getattr and size.args[1] == "shape"
    return size.args[0] if (whole or named) and not size.kwargs else None


def _flatten(node: fx.Node) -> None:
    """Makes a view that drops a height and width of 1 a flattening, whatever the batch."""
    views = ("view", "reshape", torch.reshape, torch.ops.aten.view.default)
    if node.target not in (*views, torch.ops.aten.reshape.default) or node.kwargs:
        return
    value, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    before = value.meta.get(META) if isinstance(value, fx.Node) else None
    if before is None or len(before.shape) != 4 or before.shape[2:] != (1, 1) or len(sizes) != 2:
        return
    batch, channels = sizes
    follows = isinstance(batch, fx.Node) and channels in (-1, before.shape[1])
    computed = batch == -1 and channels == before.shape[1]
    if follows or computed or (isinstance(batch, fx.Node) and isinstance(channels, fx.Node)):
        node.op, node.target, node.args = "call_function", torch.flatten, (value, 1)


def _drop_dead(traced: fx.GraphModule) -> None:
    """Drops what nobody reads, but for what may have effects."""

    def lasting(node: fx.Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if node.op == "call_module":
            module = traced.get_submodule(str(node.target))
            return hooked(module) or not type(module).__module__.startswith("torch.nn.")
        # What it asserts, of dtypes, holds for any batch and size.
        proven = node.target is torch.ops.aten._assert_tensor_metadata.default
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        return node.op == "call_function" and (writes or node.is_impure()) and not proven

    traced.graph.eliminate_dead_code(lasting)


def _one_reader_each(graph: fx.Graph) -> None:
    """Gives each reader of a parameter a node of its own, right before it."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                own = graph.get_attr(str(node.target))
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
        graph.erase_node(node)
