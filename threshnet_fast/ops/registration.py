"""What the operators share: registration with PyTorch, memory formats, arithmetic.

The operators are registered with ``torch.library.Library`` rather than ``torch.library.custom_op``:
the first call of the latter imports the whole of TorchDynamo, about a second, into programs that
compile nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def _backward(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    def fit(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The dispatcher drops trailing arguments that equal their defaults, and autograd wants as
        # many gradients as arguments remain.
        grads = backward(ctx, grad)
        return grads + (None,) * (len(ctx.needs_input_grad) - len(grads))

    return fit


def _autocast(operator: Any, device_type: str, lowered: Sequence[int]) -> Callable[..., Tensor]:
    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return [cast(item, dtype) for item in value]
        # Autocast leaves float64 alone everywhere in PyTorch.
        eligible = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    def kernel(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return operator(
                *(cast(arg, dtype) if i in lowered else arg for i, arg in enumerate(args))
            )

    return kernel


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


def split(grad: Tensor | None, xs: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the part that each of the segments ``xs`` has in their concatenation's gradient."""
    if grad is None:
        return [None] * len(xs)
    return list(torch.split(grad, [x.shape[1] for x in xs], 1))
