"""``conv(relu(cat(xs) * scale + shift), weight)`` and its gradients, for tensors of any strides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from . import gradients, launch, layout
from .operands import (
    Target,
    convolve,
    empty_map,
    gather,
    of_segments,
    pack_affine,
    pack_weight,
    scatter,
    sum_rows,
    unpack_vector,
    weight_gradient,
    window_of,
)

__all__ = ["backward", "forward"]


def forward(
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    target: Target,
) -> Tensor:
    """Computes the operator, with the affine in float32.

    Args:
        xs: Segments ``[N, C_i, H, W]`` of one dtype.
        scale: ``[sum of C_i]``.
        shift: Like ``scale``.
        weight: ``[Co, sum of C_i, kh, kw]``, of the dtype of ``xs``.
        stride: Step of the window.
        padding: Zeros around the normalised input.
        target: What to launch on.

    Returns:
        ``[N, Co, Ho, Wo]`` in channels_last format.
    """
    segments = gather(xs)
    channels = [x.shape[1] for x in segments]
    return convolve(
        segments,
        pack_weight(weight, channels),
        window_of(xs[0], weight, stride, padding),
        target,
        prologue=pack_affine(scale, shift, channels),
    )


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    needs: Sequence[bool],
    target: Target,
) -> list[Tensor]:
    """Computes the gradients that are asked for, in this order, and no others.

    Args:
        grad: Gradient of the result.
        xs: As in :func:`forward`, like the following.
        scale: A factor for each channel.
        shift: A summand for each channel.
        weight: The convolution's weight.
        stride: Step of the window.
        padding: Zeros around the normalised input.
        needs: Whether each of ``xs``, ``scale``, ``shift`` and ``weight`` needs its gradient.
        target: What to launch on.

    Returns:
        Gradients of the dtypes of the arguments: those of ``xs`` in channels_last format, that of
        ``weight`` in the strides of ``torch.empty_like(weight)``.
    """
    *needs_xs, needs_scale, needs_shift, needs_weight = needs
    grad = layout.to_pitched(grad)
    window = window_of(xs[0], weight, stride, padding)
    results = []
    if any(needs_xs) or needs_scale or needs_shift:
        results += _input_gradients(
            grad, xs, scale, shift, weight, window, needs_xs, (needs_scale, needs_shift), target
        )
    if needs_weight:
        results.append(_weight_gradient(grad, xs, scale, shift, weight, window, target))
    return results


def _input_gradients(
    grad: Tensor,
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    window: gradients.Window,
    needs_xs: Sequence[bool],
    needs_affine: tuple[bool, bool],
    target: Target,
) -> list[Tensor]:
    # Each segment has a gradient of its own, but those of scale and shift run over all of them.
    chosen = [needed or any(needs_affine) for needed in needs_xs]
    scale, shift = (of_segments(vector, 0, xs, chosen) for vector in (scale, shift))
    weight = of_segments(weight, 1, xs, chosen)
    xs = list(compress(xs, chosen))
    needs_xs = list(compress(needs_xs, chosen))

    segments = gather(xs)
    channels = [x.shape[1] for x in segments]
    packed = pack_weight(weight, channels)
    configuration = gradients.choose_input_gradient(
        window, grad.shape[0], packed, target.architecture, target.multiprocessors
    )
    parts = gradients.input_gradient_parts(grad.shape[0], window, configuration)
    width = packed.data.shape[1]
    dxs = [empty_map(x, x.shape) for x in segments] if any(needs_xs) else None
    sums = (
        torch.empty(parts, 2 * width, dtype=torch.float32, device=grad.device)
        if any(needs_affine)
        else None
    )
    launch.run(
        gradients.input_gradient(
            grad,
            packed,
            window,
            dxs,
            xs=segments,
            prologue=pack_affine(scale, shift, channels),
            sums=sums,
            precision=target.precision,
            configuration=configuration,
        )
    )
    results = [] if dxs is None else list(compress(scatter(dxs, xs), needs_xs))
    if sums is not None:
        dshift, dscale = sum_rows(sums).split(width)
        results += [
            unpack_vector(total, channels).to(vector.dtype)
            for total, vector, needed in zip(
                (dscale, dshift), (scale, shift), needs_affine, strict=True
            )
            if needed
        ]
    return results


def _weight_gradient(
    grad: Tensor,
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    window: gradients.Window,
    target: Target,
) -> Tensor:
    segments = gather(xs)
    channels = [x.shape[1] for x in segments]
    dw = torch.empty_like(weight)
    weight_gradient(
        grad,
        segments,
        pack_weight(weight, channels),
        window,
        target,
        dw=dw,
        prologue=pack_affine(scale, shift, channels),
    )
    return dw
