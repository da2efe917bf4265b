"""Operators that move elements, and those that exporters compute shapes with."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .file import Operation
from .translation import TO_NHWC, Permuted, Scalars, Translation, Value, rule

__all__: list[str] = []

_LAST = (1 << 31) - 1


@rule("Constant")
def constant(t: Translation, node: Operation) -> Value:
    """What its attribute says."""
    (attribute,) = node.attributes.items()
    match attribute:
        case ("value", Tensor() as tensor):
            return tensor
        case ("value_float" | "value_floats", found):
            return torch.tensor(found, dtype=torch.float32)
        case ("value_int" | "value_ints", found):
            return torch.tensor(found, dtype=torch.int64)
    raise ValueError(f"{attribute[0]} is not taken: expected numbers")


@rule("Shape")
def shape(t: Translation, node: Operation) -> Value:
    """The sizes of a value."""
    value = t.given(node, 0)
    if isinstance(value, Scalars):
        return torch.tensor([len(value.elements)] if value.vector else [], dtype=torch.int64)
    if isinstance(value, Tensor):
        sizes: list[Any] = list(value.shape)
    elif isinstance(value, Permuted):
        sizes = [t.size(value.base, axis) for axis in value.dims]
    else:
        sizes = [t.size(value, axis) for axis in range(t.rank(value))]
    part = sizes[node.attributes.get("start", 0) : node.attributes.get("end", len(sizes))]
    return Scalars(tuple(part))


@rule("Size")
def size(t: Translation, node: Operation) -> Value:
    """How many elements there are."""
    total: Any = 1
    value = t.operand(node, 0)
    for axis in range(t.rank(value)):
        total = t.call(operator.mul, total, t.size(value, axis))
    return Scalars((total,), False)


@rule("Reshape")
def reshape(t: Translation, node: Operation) -> Value:
    """The elements in another shape."""
    value, wanted = t.given(node, 0), t.scalars(t.given(node, 1))
    if isinstance(value, Scalars):
        if value.known:
            return t.call(torch.reshape, t.plain(value), list(wanted.elements))
        if len(wanted.elements) <= 1:
            return Scalars(value.elements, bool(wanted.elements))
    sizes: list[Any] = list(wanted.elements)
    if not node.attributes.get("allowzero", 0):
        for axis, size in enumerate(sizes):
            if isinstance(size, int) and size == 0:
                sizes[axis] = t.size(value, axis)
    x: Any = _whole(t, value)
    if not isinstance(x, fx.Node):
        return t.call(torch.reshape, x, sizes)
    unknown = [axis for axis, size in enumerate(sizes) if isinstance(size, fx.Node)]
    if len(unknown) == 1 and -1 not in sizes:
        # What is left over, so that a result of other sizes needs no computing.
        sizes[unknown[0]] = -1
    both = t.example(x)
    if len(sizes) == 2 and both is not None and both[0].ndim >= 2:
        flat = [(each.shape[0], each.shape[1:].numel()) for each in both]
        try:
            same = [
                each.reshape([_example(t, size, which) for size in sizes]).shape == flat[which]
                for which, each in enumerate(both)
            ]
        except RuntimeError:
            same = [False]
        if all(same):
            return x if both[0].ndim == 2 else t.call(torch.flatten, x, 1)
    return t.call(torch.reshape, x, sizes)


def _example(t: Translation, size: Any, which: int) -> Any:
    if not isinstance(size, fx.Node):
        return size
    both = t.example(size)
    return -1 if both is None else both[which]


def _whole(t: Translation, value: Any) -> Any:
    """The value; maps of one pixel, which lie alike in NCHW and in NHWC, are moved nowhere."""
    lies_alike = isinstance(value, Permuted) and value.dims == TO_NHWC
    if lies_alike and [t.fixed(value.base, axis) for axis in (2, 3)] == [1, 1]:
        return t.call(torch.flatten, value.base, 1)
    return t.plain(value)


@rule("Flatten")
def flatten(t: Translation, node: Operation) -> Value:
    """A matrix: the dimensions before the axis, and those from it on."""
    value = t.given(node, 0)
    axis = node.attributes.get("axis", 1)
    if axis == 1:
        x = _whole(t, value)
        return t.call(torch.flatten, x, 1) if t.rank(x) > 2 else _matrix(t, x)
    x = t.plain(value)
    rank = t.rank(x)
    if not -rank <= axis <= rank:
        raise ValueError(f"axis {axis} of a value of {rank} dimensions")
    axis += rank if axis < 0 else 0
    x = t.call(torch.unsqueeze, x, rank) if axis == rank else t.call(torch.flatten, x, axis)
    if not axis:
        return t.call(torch.unsqueeze, x, 0)
    return t.call(torch.flatten, x, 0, axis - 1)


def _matrix(t: Translation, x: Any) -> Any:
    return x if t.rank(x) == 2 else t.call(torch.unsqueeze, x, 1)


@rule("Transpose")
def transpose(t: Translation, node: Operation) -> Value:
    """The dimensions in another order."""
    value = t.given(node, 0)
    rank = t.rank(value)
    dims = tuple(node.attributes.get("perm", range(rank - 1, -1, -1)))
    if sorted(dims) != list(range(rank)):
        raise ValueError(f"perm is {list(dims)}: expected each of {rank} dimensions once")
    base: Any = value
    if isinstance(value, Permuted):
        base, dims = value.base, tuple(value.dims[axis] for axis in dims)
    if dims == tuple(range(rank)):
        return base
    if isinstance(base, fx.Node):
        return Permuted(base, dims)
    return t.call(torch.permute, t.plain(base), dims)


@rule("Squeeze")
def squeeze(t: Translation, node: Operation) -> Value:
    """Without dimensions of size 1."""
    value = t.given(node, 0)
    axes = t.axes(node, 12)
    if isinstance(value, Scalars):
        if len(value.elements) != 1:
            raise ValueError(f"it makes a number of {len(value.elements)}")
        return Scalars(value.elements, False)
    if axes is None:
        return t.call(torch.squeeze, t.plain(value))
    dims = sorted({t.axis(value, axis) for axis in axes})
    for axis in dims:
        fixed = t.fixed(value, axis)
        if fixed not in (None, 1):
            raise ValueError(f"it leaves out axis {axis} of size {fixed}: expected 1")
    if isinstance(value, Permuted):
        below = sorted(value.dims[axis] for axis in dims)
        left = [axis for axis in value.dims if axis not in below]
        if left == sorted(left):
            if below == [2, 3]:
                return t.call(torch.flatten, value.base, 1)
            return t.call(torch.squeeze, value.base, below)
    x = t.plain(value)
    both = t.example(x)
    if dims == [2, 3] and both is not None and both[0].ndim == 4:
        return (
            t.call(torch.flatten, x, 1)
            if t.fixed(x, 2) == t.fixed(x, 3) == 1
            else t.call(torch.squeeze, x, dims)
        )
    return t.call(torch.squeeze, x, dims)


@rule("Unsqueeze")
def unsqueeze(t: Translation, node: Operation) -> Value:
    """With more dimensions of size 1."""
    value = t.given(node, 0)
    axes = t.axes(node, 12)
    if axes is None:
        raise ValueError("its axes are missing")
    if isinstance(value, Scalars) and not value.vector and axes in ([0], [-1]):
        return Scalars(value.elements)
    x = t.plain(value)
    rank = t.rank(x) + len(axes)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(f"axes are {axes}, of {rank}")
    for axis in sorted(axis % rank for axis in axes):
        x = t.call(torch.unsqueeze, x, axis)
    return x


@rule("Concat")
def concat(t: Translation, node: Operation) -> Value:
    """Values one after the other."""
    values = [t.given(node, index) for index in range(len(node.inputs))]
    axis = node.attributes["axis"]
    if any(isinstance(value, Scalars) for value in values):
        numbers = [t.scalars(value) for value in values]
        return Scalars(tuple(each for value in numbers for each in value.elements))
    first = values[0]
    if isinstance(first, Permuted) and all(
        isinstance(value, Permuted) and value.dims == first.dims for value in values
    ):
        bases = [value.base for value in values if isinstance(value, Permuted)]
        return Permuted(t.call(torch.cat, bases, first.dims[t.axis(first, axis)]), first.dims)
    operands = [t.plain(value) for value in values]
    axis = t.axis(operands[0], axis) if axis < 0 else axis
    return t.call(torch.cat, operands, axis)


@rule("Slice")
def slices(t: Translation, node: Operation) -> Value:
    """A part along axes."""
    value = t.given(node, 0)
    if t.opset < 10:
        starts: Sequence[Any] = node.attributes["starts"]
        ends: Sequence[Any] = node.attributes["ends"]
        axes, steps = node.attributes.get("axes"), None
    else:
        starts = t.scalars(t.given(node, 1)).elements
        ends = t.scalars(t.given(node, 2)).elements
        axes, steps = t.integers(node, 3), t.integers(node, 4)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise ValueError("starts, ends, axes and steps do not belong together")
    if isinstance(value, Scalars):
        if len(starts) != 1 or not Scalars((*starts, *ends)).known:
            raise ValueError("it takes a part of a shape that is not known")
        return Scalars(value.elements[_slice(starts[0], ends[0], steps[0])])
    x = value.base if isinstance(value, Permuted) else t.plain(value)
    parts: list[Any] = [slice(None)] * t.rank(x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = t.axis(x, axis)
        if isinstance(value, Permuted):
            axis = value.dims[axis]
        if step > 0:
            parts[axis] = _slice(start, end, step)
            continue
        if not Scalars((start, end)).known:
            raise ValueError("it reverses a part of a size that is not known")
        length = t.fixed(x, axis)
        everything = start in (-1,) or start >= _LAST
        if length is None and not (everything and end <= -_LAST and step == -1):
            raise ValueError("it goes backwards along a size that is not fixed")
        if length is None:
            x = t.call(torch.flip, x, [axis])
            continue
        kept = range(length)[_slice(start, end, step)]
        x = t.call(torch.index_select, x, axis, torch.tensor(list(kept), dtype=torch.int64))
    while parts and parts[-1] == slice(None):
        parts.pop()
    if parts:
        x = t.call(operator.getitem, x, tuple(parts))
    return Permuted(x, value.dims) if isinstance(value, Permuted) else x


def _slice(start: Any, end: Any, step: int) -> slice:
    if isinstance(start, int) and (start == 0 and step > 0):
        start = None
    if isinstance(end, int) and (end >= _LAST if step > 0 else end <= -_LAST):
        end = None
    return slice(start, end, None if step == 1 else step)


@rule("Split")
def split(t: Translation, node: Operation) -> tuple[Value, ...]:
    """Parts along an axis."""
    value = t.given(node, 0)
    axis = t.axis(value, node.attributes.get("axis", 0))
    sizes = node.attributes.get("split") if t.opset < 13 else t.integers(node, 1)
    if isinstance(value, Scalars):
        value = t.plain(value)
    permuted = isinstance(value, Permuted)
    x: Any = value
    if isinstance(value, Permuted):
        x, axis = value.base, value.dims[axis]
    count = len(node.outputs)
    length = t.fixed(x, axis)
    if sizes is None:
        if length is None:
            raise ValueError("it splits a size that is not fixed in equal parts")
        each = -(-length // count)
        if (t.opset < 18 and each * count != length) or each * (count - 1) >= length:
            raise ValueError(f"it splits {length} in {count} parts")
        sizes = [*[each] * (count - 1), length - each * (count - 1)]
    if len(sizes) != count or length not in (None, sum(sizes)):
        raise ValueError(f"it splits {length} in {sizes}, for {count} results")
    parts = t.call(torch.split, x, sizes, axis)
    results = [t.call(operator.getitem, parts, index) for index in range(count)]
    if permuted:
        assert isinstance(value, Permuted)
        return tuple(Permuted(each, value.dims) for each in results)
    return tuple(results)


@rule("Gather")
def gather(t: Translation, node: Operation) -> Value:
    """What indices name along an axis."""
    value, indices = t.given(node, 0), t.given(node, 1)
    axis = node.attributes.get("axis", 0)
    if isinstance(value, Scalars):
        chosen = t.scalars(indices)
        if not chosen.known or any(
            not -len(value.elements) <= each < len(value.elements) for each in chosen.elements
        ):
            raise ValueError(f"it takes {chosen.elements} of {len(value.elements)} sizes")
        return Scalars(tuple(value.elements[each] for each in chosen.elements), chosen.vector)
    x = t.plain(value)
    axis = t.axis(x, axis)
    index = t.plain(indices)
    if isinstance(index, Tensor) and index.ndim == 0:
        index = int(index)
    elif isinstance(index, Tensor):
        index = index.to(torch.int64)
    elif isinstance(index, fx.Node):
        index = t.call_method("to", index, torch.int64)
    return t.call(operator.getitem, x, (*[slice(None)] * axis, index))


@rule("ConstantOfShape")
def constant_of_shape(t: Translation, node: Operation) -> Value:
    """One number everywhere."""
    sizes = list(t.scalars(t.given(node, 0)).elements)
    found = node.attributes.get("value", torch.zeros(1))
    if found.numel() != 1:
        raise ValueError(f"its value has {found.numel()} elements: expected 1")
    if Scalars(tuple(sizes)).known:
        total = found.element_size()
        for each in sizes:
            total *= each
        t.spend(total)
    return t.call(torch.full, sizes, found.item(), dtype=found.dtype)


@rule("Expand")
def expand(t: Translation, node: Operation) -> Value:
    """Sizes of 1 repeated."""
    x = t.operand(node, 0)
    sizes = list(t.scalars(t.given(node, 1)).elements)
    rank = t.rank(x)
    sizes = [1] * (rank - len(sizes)) + sizes
    for axis in range(rank):
        position = len(sizes) - rank + axis
        if not isinstance(sizes[position], fx.Node) and sizes[position] == 1:
            sizes[position] = -1
    return t.call_method("expand", x, sizes)


@rule("Tile")
def tile(t: Translation, node: Operation) -> Value:
    """The value several times."""
    return t.call(torch.tile, t.operand(node, 0), list(t.scalars(t.given(node, 1)).elements))


@rule("Range")
def arange(t: Translation, node: Operation) -> Value:
    """Numbers in steps."""
    bounds = [t.scalars(t.given(node, index)) for index in range(3)]
    if any(len(each.elements) != 1 for each in bounds):
        raise ValueError("its bounds are no single numbers")
    start, end, step = (each.elements[0] for each in bounds)
    if all(each.known for each in bounds):
        if not step:
            raise ValueError("its step is 0")
        t.spend(8 * max(0, int((end - start) / step) + 1))
    return t.call(torch.arange, start, end, step)


@rule("DepthToSpace")
def depth_to_space(t: Translation, node: Operation) -> Value:
    """Channels to pixels."""
    x = t.operand(node, 0)
    block = _block(node)
    if node.attributes.get("mode", "DCR") == "CRD":
        return t.call(F.pixel_shuffle, x, block)
    channels = t.fixed(x, 1)
    if channels is None or channels % (block * block):
        raise ValueError(f"{channels} channels in blocks of {block}")
    # The channels of pixel_shuffle are in the other order.
    order = torch.arange(channels).reshape(block * block, -1).t().reshape(-1)
    return t.call(F.pixel_shuffle, t.call(torch.index_select, x, 1, order), block)


@rule("SpaceToDepth")
def space_to_depth(t: Translation, node: Operation) -> Value:
    """Pixels to channels."""
    x = t.operand(node, 0)
    block = _block(node)
    channels = t.fixed(x, 1)
    if channels is None:
        raise ValueError("the number of channels that it reads is not fixed")
    order = torch.arange(channels * block * block).reshape(channels, -1).t().reshape(-1)
    return t.call(torch.index_select, t.call(F.pixel_unshuffle, x, block), 1, order)


def _block(node: Operation) -> int:
    block = int(node.attributes["blocksize"])
    if not 1 <= block < 1 << 12:
        raise ValueError(f"blocksize is {block}")
    return block
