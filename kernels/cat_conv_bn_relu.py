"""``act(conv(cat(xs), weight) * scale + shift)`` and its gradients, for tensors of any strides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from . import gradients, launch, layout
from .gradients import Gate, Window
from .operands import (
    MAX_SEGMENTS,
    Target,
    convolve,
    empty_map,
    gather,
    of_segments,
    pack_vector,
    pack_weight,
    scatter,
    sum_pixels,
    sum_rows,
    weight_gradient,
    window_of,
)

__all__ = ["backward", "forward"]


def forward(
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    relu: bool,
    target: Target,
) -> Tensor:
    """Computes the operator, with the affine in float32, on sums that were not rounded before.

    Args:
        xs: Segments ``[N, C_i, H, W]`` of one dtype.
        weight: ``[Co, sum of C_i, kh, kw]``, of the dtype of ``xs``.
        scale: ``[Co]``.
        shift: Like ``scale``.
        stride: Step of the window.
        padding: Zeros around the input.
        relu: Whether to rectify the result.
        target: What to launch on.

    Returns:
        ``[N, Co, Ho, Wo]`` in channels_last format.
    """
    segments = gather(xs)
    out = [weight.shape[0]]
    return convolve(
        segments,
        pack_weight(weight, [x.shape[1] for x in segments]),
        window_of(xs[0], weight, stride, padding),
        target,
        output_scale=pack_vector(scale, out),
        bias=pack_vector(shift, out),
        relu=relu,
    )


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    output: Tensor,
    stride: int,
    padding: int,
    relu: bool,
    needs: Sequence[bool],
    target: Target,
) -> list[Tensor]:
    """Computes the gradients that are asked for, in this order, and no others.

    Args:
        grad: Gradient of the result.
        xs: As in :func:`forward`, like the following.
        weight: The convolution's weight.
        scale: A factor for each output channel.
        output: The result, in any strides; read only with ``relu``.
        stride: Step of the window.
        padding: Zeros around the input.
        relu: Whether the result was rectified.
        needs: Whether each of ``xs``, ``weight``, ``scale`` and the shift needs its gradient.
        target: What to launch on.

    Returns:
        Gradients of the dtypes of the arguments, the shift's of that of the scale: those of ``xs``
        in channels_last format, that of ``weight`` in the strides of ``torch.empty_like(weight)``.
    """
    *needs_xs, needs_weight, needs_scale, needs_shift = needs
    grad = layout.to_pitched(grad)
    window = window_of(xs[0], weight, stride, padding)
    out = weight.shape[0]
    gate = Gate(layout.to_pitched(output) if relu else None, pack_vector(scale, [out]))
    results = []
    if any(needs_xs):
        results += _input_gradients(
            grad,
            list(compress(xs, needs_xs)),
            of_segments(weight, 1, xs, needs_xs),
            window,
            gate,
            target,
        )
    if needs_weight or needs_scale:
        results += _parameter_gradients(
            grad, xs, weight, scale, window, gate, (needs_weight, needs_scale), target
        )
    if needs_shift:
        results.append(sum_pixels(grad, gate).to(scale.dtype))
    return results


def _input_gradients(
    grad: Tensor, xs: Sequence[Tensor], weight: Tensor, window: Window, gate: Gate, target: Target
) -> list[Tensor]:
    batch, _, height, width = xs[0].shape
    counts = [x.shape[1] for x in xs]
    channels = counts if len(xs) <= MAX_SEGMENTS else [sum(counts)]
    packed = pack_weight(weight, channels)
    configuration = gradients.choose_input_gradient(
        window, batch, packed, target.architecture, target.multiprocessors
    )
    dxs = [empty_map(xs[0], (batch, count, height, width)) for count in channels]
    launch.run(
        gradients.input_gradient(
            grad,
            packed,
            window,
            dxs,
            gate=gate,
            precision=target.precision,
            configuration=configuration,
        )
    )
    return scatter(dxs, xs)


def _parameter_gradients(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    window: Window,
    gate: Gate,
    needs: tuple[bool, bool],
    target: Target,
) -> list[Tensor]:
    segments = gather(xs)
    packed = pack_weight(weight, [x.shape[1] for x in segments])
    needs_weight, needs_scale = needs
    out = weight.shape[0]
    dw = torch.empty_like(weight) if needs_weight else None
    parts = gradients.weight_gradient_products(packed)
    products = (
        torch.empty(parts, out, dtype=torch.float32, device=grad.device) if needs_scale else None
    )
    weight_gradient(grad, segments, packed, window, target, dw=dw, gate=gate, products=products)
    results = [] if dw is None else [dw]
    if products is not None:
        results.append(sum_rows(products).to(scale.dtype))
    return results
