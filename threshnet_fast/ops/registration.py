"""What the operators share: registration with PyTorch, memory formats, arithmetic.

The operators are registered with ``torch.library.Library`` rather than ``torch.library.custom_op``:
the first call of the latter imports the whole of TorchDynamo, about a second, into programs that
compile nothing. ``torch.library.triton_op`` is a ``custom_op`` and costs the same. It would show
``torch.compile`` the kernels inside of an operator, but fails to capture these: PyTorch 2.13 traces
no kernel that is given its tensors in a tuple, as these are given their segments.

The gradients that Triton computes are operators of their own, so that a traced backward holds them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..engines import select
from ..engines.base import Engine

LIBRARY = torch.library.Library("threshnet_fast", "FRAGMENT")
"""Owner of the registrations of ``torch.ops.threshnet_fast``."""

_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register(
    name: str,
    schema: str,
    *,
    forward: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    lowered: Sequence[int],
) -> Any:
    """Registers an operator for every device, with its fake, autograd and autocast rules.

    Args:
        name: The operator's name within ``threshnet_fast``.
        schema: Arguments and result, as in ``"(Tensor x) -> Tensor"``.
        forward: Computes the result.
        fake: Computes the result's shape, dtype, device and strides only.
        setup_context: Saves what the backward needs.
        backward: Computes the gradients of the arguments that may have one, in order and from the
            first on.
        lowered: Positions of the arguments that autocast casts to its dtype; the others keep
            theirs, as the parameters of batch normalization do in PyTorch.

    Returns:
        The operator.
    """
    # Strides matter: those of the first segment decide the result's memory format.
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    qualified = f"threshnet_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(
        qualified, _backward(backward), setup_context=setup_context, lib=LIBRARY
    )
    operator = getattr(torch.ops.threshnet_fast, name).default
    for device_type, key in _AUTOCAST_DEVICES.items():
        LIBRARY.impl(name, _autocast(operator, device_type, lowered), key)
    return operator


def register_gradients(
    name: str,
    schema: str,
    *,
    gradients: Callable[..., list[Tensor]],
    fake: Callable[..., list[Tensor]],
) -> Any:
    """Registers an operator that computes gradients of another and has none itself.

    Args:
        name: The operator's name within ``threshnet_fast``.
        schema: Arguments, and ``"-> Tensor[]"``: those gradients that are needed.
        gradients: Computes them.
        fake: Computes their shapes, dtypes and strides only.

    Returns:
        The operator.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, gradients, "CompositeExplicitAutograd")
    torch.library.register_fake(f"threshnet_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.threshnet_fast, name).default


def choose(
    xs: Sequence[Tensor],
    weight: Tensor,
    shape: Sequence[int],
    padding: int,
    backend: str | None,
    factors: Sequence[Tensor] = (),
) -> str:
    """Chooses the engine of an operator, as :func:`..engines.select.choose` does.

    Args:
        xs: The segments.
        weight: The convolution's weight.
        shape: Of the result.
        padding: The convolution's zero padding.
        backend: What was asked for; None takes what ``use_backend`` asks for.
        factors: Weight and scale as far as they are multiplied by padding, where they have values:
            a backward may be traced.

    Returns:
        The engine's name.

    Raises:
        ValueError: If a fused engine was asked for that has an objection to the sizes, or to a
            weight; others as from :func:`..engines.select.choose`.
    """
    chosen = select.choose(xs, backend).backend
    if select.is_plain(chosen):
        return chosen
    engine = select.engine(chosen)
    problem = engine.operator_objection(xs, weight, shape, padding, factors)
    if problem is None:
        return chosen
    if not select.request(backend).automatic:
        raise ValueError(problem)
    # On a GPU, what is too large for Triton is for CUDA C++ too.
    return "reference"


def fused_engine(
    xs: Sequence[Tensor],
    weight: Tensor,
    shape: Sequence[int],
    padding: int,
    backend: str | None,
    factors: Sequence[Tensor] = (),
) -> Engine | None:
    """Returns the engine that :func:`choose` chooses, None for plain PyTorch; as there."""
    engine = select.engine(choose(xs, weight, shape, padding, backend, factors))
    return engine if engine.fused else None


def backend_of_backward(backend: str | None, output: Tensor) -> str | None:
    """Returns what the backward of an operator has to ask for.

    The setting of ``use_backend`` where the forward runs: the backward may run elsewhere, and on a
    GPU does so in another thread. While an operator is traced, the setting is not known yet.
    """
    traced = type(output) is not Tensor
    return select.requested_backend() if backend is None and not traced else backend


def takes_kernels(
    grad: Tensor, xs: Sequence[Tensor], weight: Tensor, padding: int, backend: str | None
) -> bool:
    """Returns whether kernels compute the gradients, rather than formulas in PyTorch.

    Formulas are for engines that have none, for gradients that are to be differentiated once more,
    and for a batch of them (``is_grads_batched``), for which operators of this library have no
    rule.
    """
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
        return False
    return has_gradient_kernels(xs, weight, grad.shape, padding, backend)


def has_gradient_kernels(
    xs: Sequence[Tensor],
    weight: Tensor,
    shape: Sequence[int],
    padding: int,
    backend: str | None,
) -> bool:
    """Returns whether an engine has kernels for the gradients of an operator.

    Arguments are those of :func:`choose`.
    """
    return gradient_engine(xs, weight, shape, padding, backend) is not None


def gradient_engine(
    xs: Sequence[Tensor],
    weight: Tensor,
    shape: Sequence[int],
    padding: int,
    backend: str | None,
) -> Engine | None:
    """Returns the engine with kernels for the gradients of an operator, None for formulas.

    Arguments are those of :func:`choose`.
    """
    engine = fused_engine(xs, weight, shape, padding, backend)
    return None if engine is None else engine.gradient_engine(xs[0])


def differentiates_formulas(tensors: Sequence[Tensor], backend: str | None) -> bool:
    """Returns whether a call has to run as formulas in plain PyTorch that are differentiated.

    So it has within functorch's transforms (``vmap``, ``torch.func.grad``, ``jvp``) and in
    forward-mode differentiation, neither of which looks into an operator. While a call is traced
    they are left to the tracer.

    Args:
        tensors: All that the operator reads.
        backend: What was asked for; None takes what ``use_backend`` asks for.

    Raises:
        RuntimeError: If they are active and a fused backend was asked for.
    """
    if torch.compiler.is_compiling():
        return False
    if not torch._C._are_functorch_transforms_active() and not _has_tangents(tensors):
        return False
    request = select.request(backend)
    if not (request.automatic or request.plain):
        raise request.refusal("a functorch transform or forward-mode differentiation is active")
    return True


def _has_tangents(tensors: Sequence[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def autocast(arguments: Sequence[Any], lowered: Sequence[int]) -> list[Any]:
    """Returns an operator's arguments as autocast hands them to it, where it is enabled.

    Args:
        arguments: Of the operator, tensors and lists of them.
        lowered: As for :func:`register`.
    """
    device_type = arguments[0][0].device.type
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return list(arguments)
    return _cast_all(arguments, device_type, lowered)


def _backward(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    def fit(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The dispatcher drops trailing arguments that equal their defaults, and autograd wants as
        # many gradients as arguments remain.
        grads = backward(ctx, grad)
        return grads + (None,) * (len(ctx.needs_input_grad) - len(grads))

    return fit


def _autocast(operator: Any, device_type: str, lowered: Sequence[int]) -> Callable[..., Tensor]:
    def kernel(*args: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return operator(*_cast_all(args, device_type, lowered))

    return kernel


def _cast_all(args: Sequence[Any], device_type: str, lowered: Sequence[int]) -> list[Any]:
    dtype = torch.get_autocast_dtype(device_type)

    def cast(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [cast(item) for item in value]
        # Autocast leaves float64 alone everywhere in PyTorch.
        eligible = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    return [cast(arg) if i in lowered else arg for i, arg in enumerate(args)]


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns the memory format of a result whose first segment is ``x``.

    channels_last where the pixels of ``x`` are rows of channels, one after another or with a
    constant pitch (a slice of the channels of a channels_last tensor), and ``x`` is not also
    contiguous; else contiguous.
    """
    _, channels, height, width = x.shape
    image, channel, row, pixel = x.stride()
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    pitched = channel == 1 and pixel >= channels and row >= width * pixel and image >= height * row
    return torch.channels_last if pitched else torch.contiguous_format


def empty_output(shape: Sequence[int], first: Tensor) -> Tensor:
    """Returns an uninitialised result of this shape for a first segment ``first``."""
    return torch.empty(
        shape, dtype=first.dtype, device=first.device, memory_format=memory_format(first)
    )


def as_output(y: Tensor, first: Tensor) -> Tensor:
    """Returns ``y`` with exactly the strides of :func:`empty_output`, copied only if it must be.

    ``Tensor.contiguous`` would not do: it takes any stride for a dimension of size 1, and the
    strides would differ from those that the fake implementation promised.
    """
    _, c, h, w = y.shape
    if memory_format(first) == torch.channels_last:
        strides = (h * w * c, 1, w * c, c)
    else:
        strides = (c * h * w, h * w, w, 1)
    return y if y.stride() == strides else empty_output(y.shape, first).copy_(y)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns ``x * scale + shift`` per channel, in the dtype of :func:`affine_dtype`."""
    dtype = affine_dtype(x, scale)
    return x.to(dtype) * per_channel(scale, dtype) + per_channel(shift, dtype)


def affine_dtype(x: Tensor, scale: Tensor) -> torch.dtype:
    """Returns the dtype of the affine: at least float32, so that half precision rounds once."""
    return torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)


def per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a vector over channels as ``[1, C, 1, 1]``."""
    return vector.to(dtype).view(1, -1, 1, 1)


def convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Convolves with zero padding, in the dtype of ``x`` even where autocast is on."""
    return torch.ops.aten.convolution.default(
        x, weight, None, [stride, stride], [padding, padding], [1, 1], False, [0, 0], 1
    )


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients to ``x`` and ``weight``, None where ``mask`` is False."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [*mask, False],
    )
    return grad_x, grad_weight


def empty_gradients(
    xs: Sequence[Tensor], others: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Returns uninitialised gradients in the layout that those of Triton have.

    Args:
        xs: Segments; their gradients are channels_last.
        others: Other arguments: vectors, and a weight, whose gradient has its strides where these
            are dense.
        needs: Whether each of ``xs`` and ``others`` needs its gradient.

    Returns:
        The gradients that are needed.
    """
    results = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for x, needed in zip(xs, needs, strict=False)
        if needed
    ]
    results += [
        torch.empty_like(other)
        if other.dim() > 1
        else torch.empty(other.shape, dtype=other.dtype, device=other.device)
        for other, needed in zip(others, needs[len(xs) :], strict=True)
        if needed
    ]
    return results


def as_gradients(
    grads: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    others: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Returns the gradients that are needed with the strides of :func:`empty_gradients`."""
    needed = [grad for grad, wanted in zip(grads, needs, strict=True) if wanted]
    empty = empty_gradients(xs, others, needs)
    return [
        result if grad is None else result.copy_(grad)
        for result, grad in zip(empty, needed, strict=True)
    ]


def split(grad: Tensor | None, xs: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the part that each of the segments ``xs`` has in their concatenation's gradient."""
    if grad is None:
        return [None] * len(xs)
    return list(torch.split(grad, [x.shape[1] for x in xs], 1))
