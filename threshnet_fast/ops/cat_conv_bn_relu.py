"""``act(conv(cat(xs), weight) * scale + shift)``: a layer of a harmonic block.

The layer reads up to a handful of earlier outputs and convolves their concatenation; the batch
normalization comes after the convolution. Fused, the concatenation is never stored and the affine
and the rectifier are applied to the accumulators before they are written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import registration, validate

_NAME = "cat_conv_bn_relu"

_LOWERED = (0, 1)
"""Positions of the arguments that autocast casts to its dtype."""

ACTIVATIONS = ("relu", "none")
"""Values of the argument ``act``."""


def cat_conv_bn_relu(
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    act: str = "relu",
    backend: str | None = None,
) -> Tensor:
    """Convolves the concatenation of feature maps, then normalizes and rectifies.

    Computes ``act(conv(cat(xs, 1), weight) * scale + shift)``, where ``scale`` and ``shift`` hold a
    folded batch normalization: ``scale = gamma / sqrt(variance + eps)`` and
    ``shift = beta - mean * scale``. NaN stays NaN.

    Differentiable in ``xs``, ``weight``, ``scale`` and ``shift``, twice. Under autocast, ``xs`` and
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
        weight: ``[C_out, sum of C_i, K, K]``, of the dtype of ``xs``.
        scale: ``[C_out]``, of the dtype of ``xs`` or float32.
        shift: Like ``scale``.
        stride: Step of the convolution, both ways.
        padding: Zero padding on each side.
        act: ``"relu"`` or ``"none"``.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None follows
            ``use_backend``.

    Returns:
        ``[N, C_out, (H + 2 * padding - K) // stride + 1, ...]`` of the dtype of ``xs``:
        channels_last where ``xs[0]`` is channels_last (or a slice of the channels of such a
        tensor) and not also contiguous, else contiguous.

    Raises:
        TypeError: If an argument has a wrong type or dtype, or one the backend asked for lacks.
        ValueError: If a shape, device, stride, padding, activation or backend name is wrong,
            or sizes are beyond the limits of the backend asked for.
        RuntimeError: If the backend asked for is not available, or cannot run within a transform.
    """
    segments = validate.check_arguments(
        xs, {"weight": weight, "scale": scale, "shift": shift}, stride, padding, backend
    )
    if not isinstance(act, str):
        raise TypeError(f"act is a {type(act).__name__}: expected 'relu' or 'none'")
    if registration.differentiates_formulas([*segments, weight, scale, shift], backend):
        segments, weight, scale, shift = registration.autocast(
            (segments, weight, scale, shift), _LOWERED
        )
        _check(segments, weight, scale, shift, stride, padding, act)
        return reference(segments, weight, scale, shift, stride, padding, act)
    return _operator(segments, weight, scale, shift, stride, padding, act, backend)


def reference(
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    act: str,
) -> Tensor:
    """Computes the operator with plain PyTorch, in the dtype of ``xs``, without any check."""
    x = torch.cat(list(xs), 1)
    y = registration.affine(registration.convolution(x, weight, stride, padding), scale, shift)
    return (torch.relu(y) if act == "relu" else y).to(x.dtype)


def _check(
    xs: list[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    act: str,
) -> list[int]:
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}: expected 'relu' or 'none'")
    return validate.check_tensors(xs, weight, scale, shift, stride, padding, affine_of="output")


def _forward(
    xs: list[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    padding: int = 1,
    act: str = "relu",
    backend: str | None = None,
) -> Tensor:
    shape = _check(xs, weight, scale, shift, stride, padding, act)
    engine = registration.fused_engine(xs, weight, shape, padding, backend, [weight, scale])
    if engine is None:
        y = reference(xs, weight, scale, shift, stride, padding, act)
    else:
        y = engine.operator(_NAME, xs, weight, scale, shift, stride, padding, act == "relu")
    return registration.as_output(y, xs[0])


def _fake(
    xs: list[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    padding: int = 1,
    act: str = "relu",
    backend: str | None = None,
) -> Tensor:
    shape = _check(xs, weight, scale, shift, stride, padding, act)
    return registration.empty_output(shape, xs[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, weight, scale, _shift, stride, padding, act, backend = inputs
    ctx.save_for_backward(*xs, weight, scale, output)
    ctx.stride, ctx.padding, ctx.act = stride, padding, act
    ctx.backend = registration.backend_of_backward(backend, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *xs, weight, scale, output = ctx.saved_tensors
    needs_xs, *needs_others = ctx.needs_input_grad[:4]
    needs = [*needs_xs, *needs_others]
    args = grad, xs, weight, scale, output, ctx.stride, ctx.padding, ctx.act, needs
    if registration.takes_kernels(grad, xs, weight, ctx.padding, ctx.backend):
        computed = iter(_gradients_operator(*args, ctx.backend))
        grads = [next(computed) if needed else None for needed in needs]
    else:
        grads = _formulas(*args)
    return grads[: len(xs)], *grads[len(xs) :]


def _formulas(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    output: Tensor,
    stride: int,
    padding: int,
    act: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Computes the gradients that are needed with plain PyTorch, differentiably."""
    *needs_xs, needs_weight, needs_scale, needs_shift = needs

    x = torch.cat(list(xs), 1)
    dtype = registration.affine_dtype(x, scale)
    if act == "relu":
        grad = torch.ops.aten.threshold_backward.default(grad, output, 0)
    grad = grad.to(dtype)

    grad_x = grad_weight = grad_scale = grad_shift = None
    if needs_shift:
        grad_shift = grad.sum((0, 2, 3)).to(scale.dtype)
    if needs_scale:
        # Recomputed, not divided out of the output: the scale may be 0, and the rectifier has
        # dropped half of it.
        product = registration.convolution(x, weight, stride, padding)
        grad_scale = (grad * product.to(dtype)).sum((0, 2, 3)).to(scale.dtype)
    if any(needs_xs) or needs_weight:
        grad_x, grad_weight = registration.convolution_backward(
            (grad * registration.per_channel(scale, dtype)).to(x.dtype),
            x,
            weight,
            stride,
            padding,
            (any(needs_xs), needs_weight),
        )
    return [*registration.split(grad_x, xs), grad_weight, grad_scale, grad_shift]


def _gradients(
    grad: Tensor,
    xs: list[Tensor],
    weight: Tensor,
    scale: Tensor,
    output: Tensor,
    stride: int,
    padding: int,
    act: str,
    needs: list[bool],
    backend: str | None,
) -> list[Tensor]:
    engine = registration.gradient_engine(xs, weight, grad.shape, padding, backend)
    if engine is not None:
        return engine.operator_gradients(
            _NAME, grad, xs, weight, scale, output, stride, padding, act == "relu", needs
        )
    # Traced where an engine had the kernels, run where none has.
    grads = _formulas(grad, xs, weight, scale, output, stride, padding, act, needs)
    return registration.as_gradients(grads, xs, (weight, scale, scale), needs)


def _fake_gradients(
    grad: Tensor,
    xs: list[Tensor],
    weight: Tensor,
    scale: Tensor,
    output: Tensor,
    stride: int,
    padding: int,
    act: str,
    needs: list[bool],
    backend: str | None,
) -> list[Tensor]:
    return registration.empty_gradients(xs, (weight, scale, scale), needs)


_gradients_operator = registration.register_gradients(
    f"_{_NAME}_gradients",
    "(Tensor grad, Tensor[] xs, Tensor weight, Tensor scale, Tensor output, int stride, "
    "int padding, str act, bool[] needs, str? backend) -> Tensor[]",
    gradients=_gradients,
    fake=_fake_gradients,
)

_operator = registration.register(
    _NAME,
    "(Tensor[] xs, Tensor weight, Tensor scale, Tensor shift, int stride=1, int padding=1, "
    'str act="relu", str? backend=None) -> Tensor',
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    lowered=_LOWERED,
)
