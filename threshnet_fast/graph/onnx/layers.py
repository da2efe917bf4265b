"""Operators with weights or windows: convolutions, pools, norms, linear layers, reductions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .arithmetic import aligned, wrapped
from .file import Operation
from .translation import Permuted, Scalars, Translation, Value, rule

__all__: list[str] = []

_LARGEST_WINDOW = 1 << 16


class _Window:
    """Attributes of an operator with a window over a map of two dimensions.

    Args:
        t: What is written.
        node: The operator.
        x: What it reads.
        kernel: Height and width of the window.
    """

    def __init__(self, t: Translation, node: Operation, x: Any, kernel: Sequence[int]) -> None:
        self.t, self.x = t, x
        given = node.attributes
        shape = list(given.get("kernel_shape", kernel))
        if len(kernel) != 2 or len(shape) != 2:
            raise ValueError(f"its window has {len(kernel)} dimensions: expected 2")
        if shape != list(kernel):
            raise ValueError(f"kernel_shape is {shape}: expected {list(kernel)}, as its weight has")
        self.kernel = self._pair("kernel_shape", shape, 1)
        self.stride = self._pair("strides", given.get("strides", [1, 1]), 1)
        self.dilation = self._pair("dilations", given.get("dilations", [1, 1]), 1)
        self.ceil = bool(given.get("ceil_mode", 0))
        self.auto = given.get("auto_pad", "NOTSET")
        pads = given.get("pads", [0, 0, 0, 0])
        if len(pads) != 4 or any(not 0 <= each < _LARGEST_WINDOW for each in pads):
            raise ValueError(f"pads is {pads}: expected four natural numbers")
        if self.auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise ValueError(f"auto_pad is {self.auto!r}")
        if self.auto != "NOTSET":
            pads = [0, 0, 0, 0]
        self.begin: list[Any] = list(pads[:2])
        self.end: list[Any] = list(pads[2:])

    @staticmethod
    def _pair(name: str, values: Sequence[int], least: int) -> tuple[int, int]:
        if len(values) != 2 or any(not least <= each < _LARGEST_WINDOW for each in values):
            raise ValueError(f"{name} is {list(values)}: expected two numbers from {least}")
        return values[0], values[1]

    def span(self, axis: int) -> int:
        """Pixels from the first that a window reads to behind the last."""
        return (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def same(self) -> None:
        """Makes numbers, or nodes that compute them, of SAME_UPPER and SAME_LOWER."""
        if not self.auto.startswith("SAME"):
            return
        for axis in (0, 1):
            stride, span = self.stride[axis], self.span(axis)
            if stride == 1:
                total: Any = span - 1
            else:
                size = self.t.size(self.x, axis + 2)
                # size - 1 is as far as the last window's first pixel may lie.
                outputs = self._floor_divide(self._add(size, stride - 1), stride)
                last = self._multiply(self._add(outputs, -1), stride)
                total = self._add(last, self.t.call(operator.neg, size), span)
                total = self._positive(total)
            small = self._floor_divide(total, 2)
            large = self._add(total, self.t.call(operator.neg, small))
            upper = self.auto == "SAME_UPPER"
            self.begin[axis], self.end[axis] = (small, large) if upper else (large, small)

    def _add(self, *values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            result = self.t.call(operator.add, result, value)
        return result

    def _multiply(self, x: Any, factor: int) -> Any:
        return self.t.call(operator.mul, x, factor)

    def _floor_divide(self, x: Any, divisor: int) -> Any:
        return self.t.call(operator.floordiv, x, divisor)

    def _positive(self, x: Any) -> Any:
        return self.t.call(torch.sym_max, x, 0)

    @property
    def symmetric(self) -> bool:
        """Whether what is added on both sides is a number, and the same."""
        return self.begin == self.end and not any(
            isinstance(each, fx.Node) for each in (*self.begin, *self.end)
        )

    @property
    def padding(self) -> list[Any]:
        """As :func:`torch.nn.functional.pad` takes it."""
        return [self.begin[1], self.end[1], self.begin[0], self.end[0]]

    def padded(self, value: float) -> Any:
        """The map with its padding, where that is not symmetric."""
        if not any(self.padding):
            return self.x
        return self.t.call(F.pad, self.x, self.padding, "constant", value)

    def cover(self) -> list[Any]:
        """What ceil_mode reads behind the padding, as :func:`torch.nn.functional.pad` takes it."""
        extra: list[Any] = []
        for axis in (1, 0):
            stride, span = self.stride[axis], self.span(axis)
            size = self._add(self.t.size(self.x, axis + 2), self.begin[axis], self.end[axis])
            steps = self._floor_divide(self._add(size, stride - 1 - span), stride)
            # No window begins behind the map and what is before it.
            inside = self._add(size, self.t.call(operator.neg, self.end[axis]), -1)
            steps = self.t.call(torch.sym_min, steps, self._floor_divide(inside, stride))
            last = self._add(self._multiply(steps, stride), span)
            extra += [0, self._positive(self._add(last, self.t.call(operator.neg, size)))]
        return extra


def _merged_padding(t: Translation, x: Any) -> tuple[Any, list[int]]:
    """The map before zeros that a Pad right before a convolution adds, and how many."""
    nothing = [0, 0, 0, 0]
    if not isinstance(x, fx.Node) or x.target is not F.pad or not t.sole(x):
        return x, nothing
    if len(x.args) != 4 or x.args[2] != "constant" or x.args[3] != 0:
        return x, nothing
    # Both dimensions of pixels and none else; [left, right, top, bottom].
    pads: Any = [*x.args[1], *nothing][:4] if len(x.args[1]) <= 4 else None  # type: ignore[arg-type, misc]
    if pads is None or any(isinstance(each, fx.Node) or each < 0 for each in pads):
        return x, nothing
    return x.args[0], [pads[2], pads[0], pads[3], pads[1]]


@rule("Conv")
def conv(t: Translation, node: Operation) -> Value:
    """A convolution."""
    x, weight, bias = t.operand(node, 0), t.given(node, 1), t.value(node, 2)
    groups = node.attributes.get("group", 1)
    shape = _shape(t, weight)
    if len(shape) != 4:
        raise ValueError(f"its weight has {len(shape)} dimensions: expected 4, of a map of pixels")
    if node.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        x, before = _merged_padding(t, x)
    else:
        before = [0, 0, 0, 0]
    window = _Window(t, node, x, shape[2:])
    window.same()
    if any(before):
        window.begin = [a + b for a, b in zip(window.begin, before[:2], strict=True)]
        window.end = [a + b for a, b in zip(window.end, before[2:], strict=True)]
    if groups < 1 or shape[0] % groups or min(shape) < 1:
        raise ValueError(f"its weight has shape {shape}, in {groups} groups")
    if t.example(x) is not None and t.fixed(x, 1) not in (None, shape[1] * groups):
        raise ValueError(
            f"it reads {t.fixed(x, 1)} channels: expected {shape[1] * groups}, in {groups} groups"
        )
    padding = (window.begin[0], window.begin[1]) if window.symmetric else (0, 0)
    x = x if window.symmetric else window.padded(0.0)
    settings = window.stride, padding, window.dilation, groups
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        bias = None if bias is None else t.plain(bias)
        return t.call(F.conv2d, x, t.plain(weight), bias, *settings)
    return t.call_module(
        node,
        lambda: nn.Conv2d(
            shape[1] * groups, shape[0], window.kernel, *settings, bias=bias is not None
        ),
        x,
        weight=weight,
        bias=bias,
    )


def _shape(t: Translation, value: Value) -> list[int]:
    """The shape of a weight, which must not depend on the input's."""
    both = t.example(value)
    if both is None or both[0].shape != both[1].shape:
        raise ValueError("the shape of its weight is not known")
    return [int(each) for each in both[0].shape]


@rule("ConvTranspose")
def conv_transpose(t: Translation, node: Operation) -> Value:
    """A transposed convolution."""
    x, weight, bias = t.operand(node, 0), t.constant(node, 1), t.constant(node, 2)
    assert weight is not None
    shape = list(weight.shape)
    if len(shape) != 4:
        raise ValueError(f"its weight has {len(shape)} dimensions: expected 4, of a map of pixels")
    groups = node.attributes.get("group", 1)
    window = _Window(t, node, x, shape[2:])
    extra = node.attributes.get("output_padding", [0, 0])
    if len(extra) != 2 or min(extra) < 0 or max(extra) >= _LARGEST_WINDOW:
        raise ValueError(f"output_padding is {extra}: expected two natural numbers")
    wanted = node.attributes.get("output_shape")
    if wanted is not None or window.auto.startswith("SAME"):
        for axis in (0, 1):
            total = window.span(axis) + extra[axis] - window.stride[axis]
            if wanted is not None:
                size = t.fixed(x, axis + 2)
                if size is None:
                    raise ValueError("output_shape needs an input of a fixed size")
                total += window.stride[axis] * size - wanted[-2:][axis]
            if total < 0:
                raise ValueError("its result is larger than all its windows")
            small = total // 2
            upper = window.auto == "SAME_UPPER"
            first = small if upper else total - small
            window.begin[axis], window.end[axis] = first, total - first
    padding = (window.begin[0], window.begin[1]) if window.symmetric else (0, 0)
    made = t.call_module(
        node,
        lambda: nn.ConvTranspose2d(
            shape[0],
            shape[1] * groups,
            window.kernel,
            window.stride,
            padding,
            (extra[0], extra[1]),
            groups,
            bias is not None,
            window.dilation,
        ),
        x,
        weight=weight,
        bias=bias,
    )
    if window.symmetric:
        return made
    return t.call(F.pad, made, [-each for each in window.padding])


@rule("MaxPool", "AveragePool")
def pool(t: Translation, node: Operation) -> Value:
    """The largest or the average of every window."""
    if len(node.outputs) > 1 and t.uses[node.outputs[1]]:
        raise ValueError("its indices are used: expected its first result alone")
    value = t.given(node, 0)
    x = t.plain(value)
    if t.rank(x) != 4:
        raise ValueError(f"it reads {t.rank(x)} dimensions: expected 4, a map of pixels")
    window = _Window(t, node, x, node.attributes["kernel_shape"])
    window.same()
    average = node.kind == "AveragePool"
    if average and window.dilation != (1, 1):
        raise ValueError("an average with dilation is not taken")
    fits = window.symmetric and all(
        2 * pad <= size for pad, size in zip(window.begin, window.kernel, strict=True)
    )
    counts = bool(node.attributes.get("count_include_pad", 0))
    padding = (window.begin[0], window.begin[1]) if fits else (0, 0)
    if average:
        if fits:
            return t.call_module(
                node,
                lambda: nn.AvgPool2d(window.kernel, window.stride, padding, window.ceil, counts),
                x,
            )
        return _uneven_average(t, window, counts)
    if not fits:
        x = window.padded(-torch.inf)
        if window.ceil:
            x = t.call(F.pad, x, window.cover(), "constant", -torch.inf)
    ceil = window.ceil and fits
    return t.call_module(
        node,
        lambda: nn.MaxPool2d(
            window.kernel, window.stride, padding, window.dilation, ceil_mode=ceil
        ),
        x,
    )


def _uneven_average(t: Translation, window: _Window, counts: bool) -> Value:
    """Averages with another padding on each side: sums over what is there, and how many."""
    ones = t.call(torch.ones_like, window.x)
    total = window.padded(0.0)
    there = t.call(F.pad, ones, window.padding, "constant", 1.0 if counts else 0.0)
    if window.ceil:
        cover = window.cover()
        total = t.call(F.pad, total, cover, "constant", 0.0)
        there = t.call(F.pad, there, cover, "constant", 0.0)
    total, there = (
        t.call(F.avg_pool2d, each, window.kernel, window.stride) for each in (total, there)
    )
    return t.call(torch.div, total, there)


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(t: Translation, node: Operation) -> Value:
    """The average or the largest of a whole map."""
    x = t.operand(node, 0)
    average = node.kind == "GlobalAveragePool"
    rank = t.rank(x)
    if rank == 4:
        return t.call_module(
            node, lambda: nn.AdaptiveAvgPool2d(1) if average else nn.AdaptiveMaxPool2d(1), x
        )
    axes = list(range(2, rank))
    return t.call(torch.mean if average else torch.amax, x, axes, True)


@rule("BatchNormalization")
def batch_norm(t: Translation, node: Operation) -> Value:
    """BatchNorm by running statistics."""
    if node.attributes.get("training_mode", 0) or node.attributes.get("spatial", 1) != 1:
        raise ValueError("it is in training mode: expected a network for inference")
    x = t.operand(node, 0)
    names = ("weight", "bias", "running_mean", "running_var")
    values = [t.given(node, index) for index in range(1, 5)]
    epsilon = node.attributes.get("epsilon", 1e-5)
    if not all(isinstance(value, Tensor) for value in values):
        scale, shift, mean, variance = (t.plain(value) for value in values)
        return t.call(F.batch_norm, x, mean, variance, scale, shift, False, 0.0, epsilon)
    tensors: dict[str, Any] = dict(zip(names, values, strict=True))
    count = tensors["weight"].numel()
    classes: dict[int, Callable[..., nn.Module]] = {
        2: nn.BatchNorm1d,
        3: nn.BatchNorm1d,
        4: nn.BatchNorm2d,
        5: nn.BatchNorm3d,
    }
    rank = t.rank(x)
    if rank not in classes:
        raise ValueError(f"it reads {rank} dimensions: expected 2 to 5")
    return t.call_module(node, lambda: classes[rank](count, eps=epsilon), x, **tensors)


@rule("InstanceNormalization")
def instance_norm(t: Translation, node: Operation) -> Value:
    """Every map of every picture by its own statistics."""
    x, weight, bias = t.operand(node, 0), t.operand(node, 1), t.operand(node, 2)
    epsilon = node.attributes.get("epsilon", 1e-5)
    return t.call(F.instance_norm, x, None, None, weight, bias, True, 0.1, epsilon)


@rule("LayerNormalization")
def layer_norm(t: Translation, node: Operation) -> Value:
    """Every vector by its own statistics."""
    if any(t.uses[name] for name in node.outputs[1:] if name):
        raise ValueError("its mean or deviation is used: expected its first result alone")
    x, weight = t.operand(node, 0), t.operand(node, 1)
    bias = None if t.value(node, 2) is None else t.operand(node, 2)
    axis = t.axis(x, node.attributes.get("axis", -1))
    shape: list[Any] = [t.fixed(x, each) for each in range(axis, t.rank(x))]
    if any(size is None for size in shape):
        raise ValueError("what it normalises has no fixed size")
    weight, bias = (
        each.expand(shape) if isinstance(each, Tensor) else each for each in (weight, bias)
    )
    return t.call(F.layer_norm, x, shape, weight, bias, node.attributes.get("epsilon", 1e-5))


@rule("GroupNormalization")
def group_norm(t: Translation, node: Operation) -> Value:
    """Groups of channels by their own statistics."""
    x, weight, bias = t.operand(node, 0), t.operand(node, 1), t.operand(node, 2)
    groups = node.attributes["num_groups"]
    if t.opset < 21:
        channels = t.fixed(x, 1)
        if channels is None or groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels in {groups} groups")
        weight, bias = (
            t.call(torch.repeat_interleave, each, channels // groups) for each in (weight, bias)
        )
    return t.call(F.group_norm, x, groups, weight, bias, node.attributes.get("epsilon", 1e-5))


@rule("Gemm")
def gemm(t: Translation, node: Operation) -> Value:
    """``alpha A B + beta C``."""
    a, b, c = t.operand(node, 0), t.operand(node, 1), t.value(node, 2)
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    if node.attributes.get("transA", 0):
        a = t.call(torch.transpose, a, 0, 1)
    c = None if c is None else t.plain(c)
    transposed = bool(node.attributes.get("transB", 0))
    if isinstance(a, fx.Node) and isinstance(b, Tensor) and b.ndim == 2:
        weight = b if transposed else b.t().contiguous()
        if alpha != 1:
            weight = weight * alpha
        outputs, inputs = weight.shape
        row = isinstance(c, Tensor) and tuple(c.shape) in ((outputs,), (1, outputs), (1,), ())
        if c is None or row:
            bias = None
            if c is not None:
                bias = c.reshape(-1).expand(outputs)
                bias = (bias if beta == 1 else bias * beta).contiguous()
            return t.call_module(
                node,
                lambda: nn.Linear(inputs, outputs, bias is not None),
                a,
                weight=weight,
                bias=bias,
            )
    product = t.call(torch.matmul, a, t.call(torch.transpose, b, 0, 1) if transposed else b)
    if alpha != 1:
        product = t.call(torch.mul, product, alpha)
    if c is None:
        return product
    return t.call(torch.add, product, c if beta == 1 else t.call(torch.mul, c, beta))


@rule("MatMul")
def matmul(t: Translation, node: Operation) -> Value:
    """A product of matrices."""
    a, b = t.operand(node, 0), t.operand(node, 1)
    if isinstance(a, fx.Node) and isinstance(b, Tensor) and b.ndim == 2:
        inputs, outputs = b.shape
        return t.call_module(
            node, lambda: nn.Linear(inputs, outputs, False), a, weight=b.t().contiguous(), bias=None
        )
    return t.call(torch.matmul, a, b)


@rule("Softmax", "LogSoftmax")
def softmax(t: Translation, node: Operation) -> Value:
    """Softmax along an axis; before operator set 13, along all from it on, as one."""
    function = F.softmax if node.kind == "Softmax" else F.log_softmax
    x = t.operand(node, 0)
    axis = t.axis(x, node.attributes.get("axis", 1 if t.opset < 13 else -1))
    last = axis == t.rank(x) - 1
    if t.opset >= 13 or last:
        return t.call(function, x, -1 if last else axis)
    flat = t.call(function, t.call(torch.flatten, x, axis), -1)
    return t.call_method("reshape_as", flat, x)


def _product(x: Any, dims: Sequence[int], keep: bool) -> Any:
    for axis in sorted(dims, reverse=True):
        x = torch.prod(x, axis, keep)
    return x


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceL2": torch.linalg.vector_norm,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceSum": torch.sum,
}
# From which operator set on the axes are an input.
_AXES_INPUT = {"ReduceSum": 13}


@rule(*_REDUCTIONS, "ReduceProd")
def reduce(t: Translation, node: Operation) -> Value:
    """The sum, average, or largest along axes."""
    value = t.given(node, 0)
    axes = t.axes(node, _AXES_INPUT.get(node.kind, 18) - 1)
    keep = bool(node.attributes.get("keepdims", 1))
    if node.kind == "ReduceProd":
        if isinstance(value, Scalars):
            product: Any = 1
            for each in value.elements:
                product = t.call(operator.mul, product, each)
            return Scalars((product,), keep)
        value = t.plain(value)
        if isinstance(value, fx.Node):
            raise ValueError("a product of the elements of a map is not taken")
        return t.call(_product, value, _axes(t, value, axes), keep)
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return value
    if isinstance(value, Scalars):
        value = t.plain(value)
    dims = _axes(t, value, axes)
    function = _REDUCTIONS[node.kind]
    if isinstance(value, Permuted):
        below = [value.dims[axis] for axis in dims]
        left = [axis for axis in value.dims if axis not in below]
        if keep or left == sorted(left):
            made = t.call(function, value.base, dim=sorted(below), keepdim=keep)
            return Permuted(made, value.dims) if keep else made
    x = t.plain(value)
    if not dims:
        return x
    return t.call(function, x, dim=dims, keepdim=keep)


def _axes(t: Translation, value: Any, axes: Sequence[int] | None) -> list[int]:
    if not axes:
        return list(range(t.rank(value)))
    return sorted({t.axis(value, axis) for axis in axes})


@rule("ArgMax", "ArgMin")
def arg(t: Translation, node: Operation) -> Value:
    """Where the largest or the smallest is along an axis."""
    if node.attributes.get("select_last_index", 0):
        raise ValueError("select_last_index is not taken: expected the first")
    x = t.operand(node, 0)
    axis = t.axis(x, node.attributes.get("axis", 0))
    function = torch.argmax if node.kind == "ArgMax" else torch.argmin
    return t.call(function, x, axis, bool(node.attributes.get("keepdims", 1)))


@rule("Pad")
def pad(t: Translation, node: Operation) -> Value:
    """A map with more around it."""
    value = t.given(node, 0)
    rank = t.rank(value)
    mode = node.attributes.get("mode", "constant")
    if t.opset < 11:
        amounts: Any = node.attributes["pads"]
        fill = node.attributes.get("value", 0.0)
    else:
        amounts = list(t.scalars(t.given(node, 1)).elements)
        constant = t.constant(node, 2)
        fill = 0.0 if constant is None or not constant.numel() else constant.item()
    axes = t.integers(node, 3) if t.opset >= 18 else None
    axes = list(range(rank)) if axes is None else [t.axis(value, axis) for axis in axes]
    if len(amounts) != 2 * len(axes):
        raise ValueError(f"{len(amounts)} pads for {len(axes)} axes")
    pads: list[list[Any]] = [[0, 0] for _ in range(rank)]
    for position, axis in enumerate(axes):
        pads[axis] = [amounts[position], amounts[position + len(axes)]]
    x: Any = value
    dims: tuple[int, ...] | None = None
    if isinstance(value, Permuted):
        dims, (x,) = aligned(t, [value])
        if dims is not None:
            pads = [pads[dims.index(axis)] for axis in range(rank)]
    x = t.plain(x)
    while pads and pads[0] == [0, 0]:
        pads = pads[1:]
    if not pads:
        return value
    flat = [amount for pair in reversed(pads) for amount in pair]
    if mode == "constant":
        return wrapped(t.call(F.pad, x, flat, "constant", fill), dims)
    kinds = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in kinds or len(pads) > rank - 2:
        raise ValueError(f"mode {mode!r} along {len(pads)} of {rank} dimensions is not taken")
    # These modes take all dimensions of pixels.
    flat += [0] * (2 * (rank - 2) - len(flat))
    return wrapped(t.call(F.pad, x, flat, kinds[mode]), dims)
