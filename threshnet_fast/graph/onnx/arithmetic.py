"""Operators that compute every element by itself, of maps and of shapes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .file import Operation, dtype_of
from .translation import TO_NHWC, Permuted, Scalars, Translation, Value, rule

__all__ = ["aligned", "inverse", "wrapped"]


def inverse(dims: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes one."""
    return tuple(sorted(range(len(dims)), key=lambda axis: dims[axis]))


def aligned(
    t: Translation, values: Sequence[Value], *, broadcast: bool = True
) -> tuple[tuple[int, ...] | None, list[Any]]:
    """Values of which an operator computes every element by itself, all before one permutation.

    Only that from NCHW to NHWC is put off: towards NCHW it belongs before the layers that follow.

    Args:
        t: What is written.
        values: What the operator reads.
        broadcast: Whether constants of other shapes may be among them.

    Returns:
        The permutation that the result needs, or None; and the operands.
    """
    permuted = [value for value in values if isinstance(value, Permuted)]
    constants = [value for value in values if isinstance(value, Tensor)]
    if (
        not permuted
        or any(value.dims != TO_NHWC for value in permuted)
        or len(permuted) + len(constants) < len(values)
        or any(value.ndim > 4 for value in constants)
        or (constants and not broadcast)
    ):
        return None, [t.plain(value) for value in values]
    back = inverse(TO_NHWC)
    operands: list[Any] = []
    for value in values:
        if isinstance(value, Permuted):
            operands.append(value.base)
        elif isinstance(value, Tensor):
            whole = value.reshape((1,) * (4 - value.ndim) + tuple(value.shape))
            operands.append(whole.permute(back).contiguous() if value.numel() > 1 else value)
    return TO_NHWC, operands


def wrapped(value: Any, dims: tuple[int, ...] | None) -> Value:
    """The result of an operator on what :func:`aligned` returned."""
    return value if dims is None or not isinstance(value, fx.Node) else Permuted(value, dims)


def _unary(t: Translation, node: Operation, function: Callable[..., Any], *args: Any) -> Value:
    dims, (x,) = aligned(t, [t.given(node, 0)])
    return wrapped(t.call(function, x, *args), dims)


_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}


# Of numbers that describe a shape.
_OF_SCALARS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Ceil": math.ceil,
    "Floor": math.floor,
    "Mul": operator.mul,
    "Neg": operator.neg,
    "Sub": operator.sub,
}


@rule(*_UNARY)
def unary(t: Translation, node: Operation) -> Value:
    """A function of one map."""
    value = t.given(node, 0)
    if isinstance(value, Scalars) and node.kind in _OF_SCALARS:
        whole = node.kind in ("Ceil", "Floor")
        elements = tuple(
            each if whole and isinstance(each, int) else t.call(_OF_SCALARS[node.kind], each)
            for each in value.elements
        )
        return Scalars(elements, value.vector)
    return _unary(t, node, _UNARY[node.kind])


@rule("Identity")
def identity(t: Translation, node: Operation) -> Value:
    """The value itself."""
    return t.given(node, 0)


@rule("Dropout")
def dropout(t: Translation, node: Operation) -> Value:
    """The value itself: this is inference."""
    training = t.constant(node, 2)
    if training is not None and bool(training.any()):
        raise ValueError("it is in training mode: expected a network for inference")
    if len(node.outputs) > 1 and t.uses[node.outputs[1]]:
        raise ValueError("its mask is used: expected its first result alone")
    return t.given(node, 0)


@rule("LeakyRelu")
def leaky_relu(t: Translation, node: Operation) -> Value:
    """``max(x, 0) + alpha min(x, 0)``."""
    return _unary(t, node, F.leaky_relu, node.attributes.get("alpha", 0.01))


@rule("PRelu")
def prelu(t: Translation, node: Operation) -> Value:
    """``max(x, 0) + slope min(x, 0)``."""
    dims, (x, slope) = aligned(t, [t.given(node, 0), t.given(node, 1)])
    each = t.channels_of(x, slope)
    if each is not None:
        return wrapped(t.call(F.prelu, x, each.contiguous()), dims)
    negative = t.call(torch.mul, t.call(torch.clamp, x, None, 0), slope)
    return wrapped(t.call(torch.add, t.call(F.relu, x), negative), dims)


@rule("Elu")
def elu(t: Translation, node: Operation) -> Value:
    """``x`` above zero, ``alpha (exp(x) - 1)`` below."""
    return _unary(t, node, F.elu, node.attributes.get("alpha", 1.0))


@rule("Celu")
def celu(t: Translation, node: Operation) -> Value:
    """``max(0, x) + min(0, alpha (exp(x / alpha) - 1))``."""
    return _unary(t, node, F.celu, node.attributes.get("alpha", 1.0))


@rule("Selu")
def selu(t: Translation, node: Operation) -> Value:
    """``gamma (x above zero, alpha (exp(x) - 1) below)``."""
    alpha = node.attributes.get("alpha", 1.67326319217681884765625)
    gamma = node.attributes.get("gamma", 1.05070102214813232421875)
    dims, (x,) = aligned(t, [t.given(node, 0)])
    return wrapped(t.call(torch.mul, t.call(F.elu, x, alpha), gamma), dims)


@rule("ThresholdedRelu")
def thresholded_relu(t: Translation, node: Operation) -> Value:
    """``x`` above ``alpha``, else 0."""
    return _unary(t, node, F.threshold, node.attributes.get("alpha", 1.0), 0.0)


@rule("Gelu")
def gelu(t: Translation, node: Operation) -> Value:
    """``x Phi(x)``."""
    dims, (x,) = aligned(t, [t.given(node, 0)])
    kind = node.attributes.get("approximate", "none")
    return wrapped(t.call(F.gelu, x, approximate=kind), dims)


@rule("Swish")
def swish(t: Translation, node: Operation) -> Value:
    """``x sigmoid(alpha x)``."""
    alpha = node.attributes.get("alpha", 1.0)
    dims, (x,) = aligned(t, [t.given(node, 0)])
    if alpha == 1:
        return wrapped(t.call(F.silu, x), dims)
    return wrapped(t.call(torch.mul, x, t.call(torch.sigmoid, t.call(torch.mul, x, alpha))), dims)


@rule("HardSigmoid")
def hard_sigmoid(t: Translation, node: Operation) -> Value:
    """``alpha x + beta`` within 0 and 1."""
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return _unary(t, node, F.hardsigmoid)
    dims, (x,) = aligned(t, [t.given(node, 0)])
    line = t.call(torch.add, t.call(torch.mul, x, alpha), beta)
    return wrapped(t.call(torch.clamp, line, 0.0, 1.0), dims)


@rule("Clip")
def clip(t: Translation, node: Operation) -> Value:
    """``x`` within bounds, which are attributes before operator set 11, then inputs."""
    if t.opset < 11:
        # By default the largest numbers that there are.
        low = node.attributes.get("min", -math.inf)
        high = node.attributes.get("max", math.inf)
        bounds = [None if abs(each) > 3.4e38 else each for each in (low, high)]
    else:
        known = [t.constant(node, index) for index in (1, 2)]
        if any(each is not None and each.numel() != 1 for each in known):
            raise ValueError("a bound is no single number")
        bounds = [None if each is None else each.item() for each in known]
    if bounds == [None, None]:
        return t.given(node, 0)
    dims, (x,) = aligned(t, [t.given(node, 0)])
    if bounds == [0, 6]:
        return wrapped(t.call(F.relu6, x), dims)
    if bounds == [0, None]:
        return wrapped(t.call(F.relu, x), dims)
    lowest, highest = bounds
    if lowest is not None and highest is not None and lowest > highest:
        raise ValueError(f"its bounds are {lowest} and {highest}: expected them in order")
    return wrapped(t.call(torch.clamp, x, *bounds), dims)


_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Div": torch.div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}


@rule(*_BINARY)
def binary(t: Translation, node: Operation) -> Value:
    """A function of two maps, or of the numbers of shapes."""
    values = [t.given(node, 0), t.given(node, 1)]
    if any(isinstance(value, Scalars) for value in values):
        numbers = _of_scalars(t, node.kind, values)
        if numbers is not None:
            return numbers
    dims, (x, y) = aligned(t, values)
    short = _recognised(t, node, x, y)
    if short is not None:
        return wrapped(short, dims)
    function = _BINARY[node.kind]
    if node.kind == "Div" and not _floating(t, x):
        return wrapped(t.call(torch.div, x, y, rounding_mode="trunc"), dims)
    if node.kind == "Pow":
        # The result is of the type of the base.
        number = y.item() if isinstance(y, Tensor) and y.numel() == 1 and y.ndim == 0 else None
        if number is not None and _floating(t, x):
            return wrapped(t.call(torch.pow, x, number), dims)
    if isinstance(y, Tensor) and y.ndim == 0 and isinstance(x, fx.Node) and _floating(t, x):
        y = y.item()
    return wrapped(t.call(function, x, y), dims)


def _floating(t: Translation, value: Any) -> bool:
    both = t.example(value)
    if both is not None:
        return bool(both[0].is_floating_point())
    return True


def _of_scalars(t: Translation, kind: str, values: Sequence[Value]) -> Value | None:
    """Arithmetic with shapes, or None where it is with a map."""
    if any(isinstance(value, (fx.Node, Permuted)) for value in values):
        return None
    x, y = (t.scalars(value) for value in values)
    count = max(len(x.elements), len(y.elements))
    if any(len(each.elements) not in (1, count) for each in (x, y)):
        raise ValueError("it joins shapes of different lengths")
    pairs = zip(
        x.elements * (count // len(x.elements)),
        y.elements * (count // len(y.elements)),
        strict=True,
    )
    vector = x.vector or y.vector
    results = []
    for a, b in pairs:
        known = not isinstance(a, fx.Node) and not isinstance(b, fx.Node)
        if kind == "Equal":
            # A size is never negative, which is what exporters ask.
            negative = [each for each in (a, b) if not isinstance(each, fx.Node) and each < 0]
            if not known and not negative:
                return None
            results.append(known and a == b)
        elif kind == "Div":
            real = any(isinstance(each, float) for each in (a, b)) or (
                not known and any(_real(t, each) for each in (a, b))
            )
            if known and not b:
                raise ValueError("it divides by zero")
            results.append(t.call(operator.truediv if real else operator.floordiv, a, b))
        elif kind in _OF_SCALARS:
            results.append(t.call(_OF_SCALARS[kind], a, b))
        else:
            return None
    return Scalars(tuple(results), vector)


def _real(t: Translation, value: Any) -> bool:
    both = t.example(value)
    return both is not None and isinstance(both[0], float)


def _recognised(t: Translation, node: Operation, x: Any, y: Any) -> Any:
    """Two operators that are one in PyTorch, as its users write it, or None."""
    if node.kind == "Mul":
        for a, b in ((x, y), (y, x)):
            if not (isinstance(b, fx.Node) and b.op == "call_function" and t.sole(b)):
                continue
            if b.args[:1] == (a,) and b.target is torch.sigmoid:
                return t.call(F.silu, a)
            if b.args[:1] == (a,) and b.target is F.hardsigmoid:
                return t.call(F.hardswish, a)
    if isinstance(y, fx.Node) and isinstance(x, Tensor) and node.kind in ("Add", "Mul"):
        return _with_constant(t, node, y, x)
    if isinstance(x, fx.Node) and isinstance(y, Tensor):
        if node.kind == "Sub" and y.is_floating_point():
            return _with_constant(t, node, x, -y, "Add")
        if node.kind in ("Add", "Mul"):
            return _with_constant(t, node, x, y)
    return None


def _with_constant(
    t: Translation, node: Operation, x: fx.Node, constant: Tensor, kind: str = ""
) -> Any:
    """A bias of the layer before, or a scale and shift of every channel as a BatchNorm."""
    kind = kind or node.kind
    module = t.module_of(x)
    each = t.channels_of(x, constant)
    if kind == "Add" and t.sole(x) and module is not None:
        bias = each
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            bias = None
            both = t.example(x)
            count = module.out_features
            if (
                both is not None
                and both[0].ndim >= constant.ndim
                and constant.numel() == count
                and constant.shape[-1:] == (count,)
            ):
                bias = constant.reshape(-1)
        if bias is not None and weight is not None and bias.dtype == weight.dtype:
            layer: Any = module
            known = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
            if known and layer.bias is None:
                module.bias = nn.Parameter(bias.clone())
                return x
            if x in t.scales:
                module.bias = nn.Parameter(bias.clone())
                t.scales.discard(x)
                return x
    if kind == "Mul" and each is not None:
        count = each.numel()
        zeros, ones = torch.zeros_like(each), torch.ones_like(each)
        made = t.call_module(
            node,
            lambda: nn.BatchNorm2d(count, eps=0.0),
            x,
            weight=each,
            bias=zeros,
            running_mean=zeros.clone(),
            running_var=ones,
        )
        t.scales.add(made)
        return made
    return None


@rule("Max", "Min", "Sum", "Mean")
def several(t: Translation, node: Operation) -> Value:
    """A function of any number of maps."""
    values = [t.given(node, index) for index in range(len(node.inputs))]
    if node.kind in ("Max", "Min") and any(isinstance(value, Scalars) for value in values):
        numbers = [t.scalars(value) for value in values]
        if all(len(each.elements) == 1 for each in numbers) and all(each.known for each in numbers):
            function: Any = max if node.kind == "Max" else min
            return Scalars((function(each.elements[0] for each in numbers),), numbers[0].vector)
    dims, operands = aligned(t, values)
    function = {"Max": torch.maximum, "Min": torch.minimum}.get(node.kind, torch.add)
    result = operands[0]
    for operand in operands[1:]:
        result = t.call(function, result, operand)
    if node.kind == "Mean":
        result = t.call(torch.div, result, len(operands))
    return wrapped(result, dims)


@rule("Mod")
def mod(t: Translation, node: Operation) -> Value:
    """The remainder, of the sign of the divisor, or of the dividend where it is ``fmod``."""
    function = torch.fmod if node.attributes.get("fmod", 0) else torch.remainder
    return t.call(function, t.operand(node, 0), t.operand(node, 1))


@rule("Where")
def where(t: Translation, node: Operation) -> Value:
    """Elements of one value or of another."""
    values = [t.given(node, index) for index in range(3)]
    if any(isinstance(value, Scalars) and not value.known for value in values):
        condition, x, y = (t.scalars(value) for value in values)
        if condition.known:
            count = max(len(each.elements) for each in (condition, x, y))
            columns = [each.elements * (count // len(each.elements)) for each in (condition, x, y)]
            return Scalars(tuple(a if c else b for c, a, b in zip(*columns, strict=True)))
    return t.call(torch.where, *(t.plain(value) for value in values))


@rule("Cast")
def cast(t: Translation, node: Operation) -> Value:
    """Elements of another type."""
    return _cast(t, t.given(node, 0), dtype_of(node.attributes["to"], "the result"))


@rule("CastLike")
def cast_like(t: Translation, node: Operation) -> Value:
    """Elements of the type of another value."""
    both = t.example(t.operand(node, 1))
    if both is None:
        raise ValueError("the type of its second input is not known")
    return _cast(t, t.given(node, 0), both[0].dtype)


def _cast(t: Translation, value: Value, dtype: torch.dtype) -> Value:
    if isinstance(value, Scalars):
        function = float if dtype.is_floating_point else int
        symbolic: Any = torch.sym_float if dtype.is_floating_point else torch.sym_int
        if dtype is not torch.bool:
            return Scalars(
                tuple(
                    t.call(symbolic, each) if isinstance(each, fx.Node) else function(each)
                    for each in value.elements
                ),
                value.vector,
            )
    dims, (x,) = aligned(t, [value])
    both = t.example(x)
    if both is not None and both[0].dtype == dtype:
        return value
    return wrapped(t.call_method("to", x, dtype), dims)
