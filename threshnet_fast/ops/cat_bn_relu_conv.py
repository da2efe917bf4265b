"""``conv(relu(cat(xs) * scale + shift), weight)``: the first half of a dense layer.

A layer of a densely connected block normalizes the concatenation of all features before it, each
layer with a scale and shift of its own, and convolves the result. Fused, the features are read once
where they lie, and neither the concatenation nor the normalized copy is ever stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.select import choose
from . import registration, validate


def cat_bn_relu_conv(
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Convolves the normalized, rectified concatenation of feature maps.

    Computes ``conv(relu(cat(xs, 1) * scale + shift), weight)``, where ``scale`` and ``shift`` hold
    a folded batch normalization: ``scale = gamma / sqrt(variance + eps)`` and
    ``shift = beta - mean * scale``. The zero padding is applied after the rectifier, as in the
    unfused network, so padded pixels are 0 and not ``relu(shift)``. NaN stays NaN.

    Differentiable in ``xs``, ``scale``, ``shift`` and ``weight``, twice. Under autocast, ``xs`` and
    ``weight`` are cast to its dtype, ``scale`` and ``shift`` keep theirs.

    Args:
        xs: Feature maps ``[N, C_i, H, W]`` of one floating dtype on one device, in any memory
            format: contiguous, channels_last or a view with any strides.
        scale: ``[sum of C_i]``, of the dtype of ``xs`` or float32.
        shift: Like ``scale``.
        weight: ``[C_out, sum of C_i, K, K]``, of the dtype of ``xs``.
        stride: Step of the convolution, both ways.
        padding: Zero padding on each side.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``; None follows ``use_backend``.

    Returns:
        ``[N, C_out, (H + 2 * padding - K) // stride + 1, ...]`` of the dtype of ``xs``:
        channels_last where ``xs[0]`` is channels_last (or a slice of the channels of such a
        tensor) and not also contiguous, else contiguous.

    Raises:
        TypeError: If an argument has a wrong type or dtype, or one the backend asked for lacks.
        ValueError: If a shape, device, stride, padding or backend name is wrong.
        RuntimeError: If the backend asked for is not available, or in forward-mode differentiation.
    """
    segments = validate.check_arguments(
        xs, {"scale": scale, "shift": shift, "weight": weight}, stride, padding, backend
    )
    return _operator(segments, scale, shift, weight, stride, padding, backend)


def reference(
    xs: Sequence[Tensor], scale: Tensor, shift: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    """Computes the operator with plain PyTorch, in the dtype of ``xs``, without any check."""
    return registration.convolution(_prologue(xs, scale, shift), weight, stride, padding)


def _prologue(xs: Sequence[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    x = torch.cat(list(xs), 1)
    return torch.relu(registration.affine(x, scale, shift)).to(x.dtype)


def _forward(
    xs: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    backend: str | None = None,
) -> Tensor:
    validate.check_tensors(xs, weight, scale, shift, stride, padding, affine_of="input")
    if choose(xs, backend).backend == "cpu":
        y = torch.ops.threshnet_fast_cpu.cat_bn_relu_conv(
            xs, scale, shift, weight, stride, padding, cpu.isa_code()
        )
    else:
        y = reference(xs, scale, shift, weight, stride, padding)
    return registration.as_output(y, xs[0])


def _fake(
    xs: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    backend: str | None = None,
) -> Tensor:
    shape = validate.check_tensors(xs, weight, scale, shift, stride, padding, affine_of="input")
    return registration.empty_output(shape, xs[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, scale, shift, weight, stride, padding, _ = inputs
    ctx.save_for_backward(*xs, scale, shift, weight)
    ctx.stride, ctx.padding = stride, padding


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *xs, scale, shift, weight = ctx.saved_tensors
    needs_xs, needs_scale, needs_shift, needs_weight = ctx.needs_input_grad[:4]
    needs_affine = any(needs_xs) or needs_scale or needs_shift

    x = torch.cat(xs, 1)
    dtype = registration.affine_dtype(x, scale)
    activation = torch.relu(registration.affine(x, scale, shift))
    grad_activation, grad_weight = registration.convolution_backward(
        grad,
        activation.to(x.dtype),
        weight,
        ctx.stride,
        ctx.padding,
        (needs_affine, needs_weight),
    )

    grad_x = grad_scale = grad_shift = None
    if grad_activation is not None:
        # The mask by threshold_backward passes the gradient where the activation is NaN, as the
        # derivative of torch.relu does.
        grad_affine = torch.ops.aten.threshold_backward.default(
            grad_activation.to(dtype), activation, 0
        )
        if needs_shift:
            grad_shift = grad_affine.sum((0, 2, 3)).to(shift.dtype)
        if needs_scale:
            grad_scale = (grad_affine * x.to(dtype)).sum((0, 2, 3)).to(scale.dtype)
        if any(needs_xs):
            grad_x = (grad_affine * registration.per_channel(scale, dtype)).to(x.dtype)
    return registration.split(grad_x, xs), grad_scale, grad_shift, grad_weight


_operator = registration.register(
    "cat_bn_relu_conv",
    "(Tensor[] xs, Tensor scale, Tensor shift, Tensor weight, int stride=1, int padding=0, "
    "str? backend=None) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    lowered=(0, 3),
)
