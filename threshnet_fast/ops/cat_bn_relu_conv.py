"""``conv(relu(cat(xs) * scale + shift), weight)``: the first half of a dense layer.

A layer of a densely connected block normalizes the concatenation of all features before it, each
layer with a scale and shift of its own, and convolves the result. Fused, the features are read once
where they lie, and neither the concatenation nor the normalized copy is ever stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import registration, validate

_NAME = "cat_bn_relu_conv"

_LOWERED = (0, 3)
"""Positions of the arguments that autocast casts to its dtype."""


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

    Within functorch's transforms (``vmap``, ``torch.func.grad``, ``jvp``) and in forward-mode
    differentiation, plain PyTorch computes the same.

    On a GPU, Triton kernels compute the result and its gradients, always deterministically; plain
    PyTorch computes gradients of gradients. Sums are float32; float32 is multiplied in TF32 only
    where PyTorch allows it both for matrix products and for convolutions. Without Triton, or with
    ``backend="cuda"``, C++ kernels compute the result, float32 never in TF32; they have no
    gradients: those come from Triton where it is available, else from plain PyTorch.

    Args:
        xs: Feature maps ``[N, C_i, H, W]`` of one floating dtype on one device, in any memory
            format: contiguous, channels_last or a view with any strides.
        scale: ``[sum of C_i]``, of the dtype of ``xs`` or float32.
        shift: Like ``scale``.
        weight: ``[C_out, sum of C_i, K, K]``, of the dtype of ``xs``.
        stride: Step of the convolution, both ways.
        padding: Zero padding on each side.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None follows
            ``use_backend``.

    Returns:
        ``[N, C_out, (H + 2 * padding - K) // stride + 1, ...]`` of the dtype of ``xs``:
        channels_last where ``xs[0]`` is channels_last (or a slice of the channels of such a
        tensor) and not also contiguous, else contiguous.

    Raises:
        TypeError: If an argument has a wrong type or dtype, or one the backend asked for lacks.
        ValueError: If a shape, device, stride, padding or backend name is wrong,
            or sizes are beyond the limits of the backend asked for.
        RuntimeError: If the backend asked for is not available, or cannot run within a transform.
    """
    segments = validate.check_arguments(
        xs, {"scale": scale, "shift": shift, "weight": weight}, stride, padding, backend
    )
    if registration.differentiates_formulas([*segments, scale, shift, weight], backend):
        segments, scale, shift, weight = registration.autocast(
            (segments, scale, shift, weight), _LOWERED
        )
        validate.check_tensors(segments, weight, scale, shift, stride, padding, affine_of="input")
        return reference(segments, scale, shift, weight, stride, padding)
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
    shape = validate.check_tensors(xs, weight, scale, shift, stride, padding, affine_of="input")
    engine = registration.fused_engine(xs, weight, shape, padding, backend, [weight])
    if engine is None:
        y = reference(xs, scale, shift, weight, stride, padding)
    else:
        y = engine.operator(_NAME, xs, scale, shift, weight, stride, padding)
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
    xs, scale, shift, weight, stride, padding, backend = inputs
    ctx.save_for_backward(*xs, scale, shift, weight)
    ctx.stride, ctx.padding = stride, padding
    ctx.backend = registration.backend_of_backward(backend, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *xs, scale, shift, weight = ctx.saved_tensors
    needs_xs, *needs_others = ctx.needs_input_grad[:4]
    needs = [*needs_xs, *needs_others]
    args = grad, xs, scale, shift, weight, ctx.stride, ctx.padding, needs
    if registration.takes_kernels(grad, xs, weight, ctx.padding, ctx.backend):
        computed = iter(_gradients_operator(*args, ctx.backend))
        grads = [next(computed) if needed else None for needed in needs]
    else:
        grads = _formulas(*args)
    return grads[: len(xs)], *grads[len(xs) :]


def _formulas(
    grad: Tensor,
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Computes the gradients that are needed with plain PyTorch, differentiably."""
    *needs_xs, needs_scale, needs_shift, needs_weight = needs
    needs_affine = any(needs_xs) or needs_scale or needs_shift

    x = torch.cat(list(xs), 1)
    dtype = registration.affine_dtype(x, scale)
    activation = torch.relu(registration.affine(x, scale, shift))
    grad_activation, grad_weight = registration.convolution_backward(
        grad, activation.to(x.dtype), weight, stride, padding, (needs_affine, needs_weight)
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
    return [*registration.split(grad_x, xs), grad_scale, grad_shift, grad_weight]


def _gradients(
    grad: Tensor,
    xs: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    needs: list[bool],
    backend: str | None,
) -> list[Tensor]:
    engine = registration.gradient_engine(xs, weight, grad.shape, padding, backend)
    if engine is not None:
        return engine.operator_gradients(
            _NAME, grad, xs, scale, shift, weight, stride, padding, needs
        )
    # Traced where an engine had the kernels, run where none has.
    grads = _formulas(grad, xs, scale, shift, weight, stride, padding, needs)
    return registration.as_gradients(grads, xs, (scale, shift, weight), needs)


def _fake_gradients(
    grad: Tensor,
    xs: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    needs: list[bool],
    backend: str | None,
) -> list[Tensor]:
    return registration.empty_gradients(xs, (scale, shift, weight), needs)


_gradients_operator = registration.register_gradients(
    f"_{_NAME}_gradients",
    "(Tensor grad, Tensor[] xs, Tensor scale, Tensor shift, Tensor weight, int stride, "
    "int padding, bool[] needs, str? backend) -> Tensor[]",
    gradients=_gradients,
    fake=_fake_gradients,
)

_operator = registration.register(
    _NAME,
    "(Tensor[] xs, Tensor scale, Tensor shift, Tensor weight, int stride=1, int padding=0, "
    "str? backend=None) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    lowered=_LOWERED,
)
