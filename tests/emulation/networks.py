"""Networks that exercise an executor, and the comparison of each of their steps with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional

import threshnet_fast as tf
from threshnet_fast.plan import FusedConv, Head, Plan
from threshnet_fast.plan.ir import Segment, Step

__all__ = ["check_steps", "first_blocks_of_threshnet79", "odd"]


def first_blocks_of_threshnet79() -> tf.ThreshNet:
    return tf.ThreshNet(
        blocks=(6, 8),
        transitions=(128, 192),
        downsample=(True, True),
        growth_rates=(32, 32),
        threshold=2,
        num_classes=10,
    ).eval()


def odd() -> tf.ThreshNet:
    """Channels that fill no group, in dense and harmonic blocks."""
    return tf.ThreshNet(
        first_channels=(20, 36),
        blocks=(2, 3, 4),
        transitions=(44, 52, 60),
        downsample=(True, False, False),
        growth_rates=(12, 10, 14),
        threshold=1,
        num_classes=7,
        in_chans=4,
    ).eval()


def exact_step(step: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """One step in float64: result, squared and absolute products added up, products in a sum."""
    if isinstance(step, FusedConv):
        size = x.abs()
        if step.prologue is not None:
            scale, shift = (
                vector.double()[:, None, None]
                for vector in (step.prologue.scale, step.prologue.shift)
            )
            size = size * scale.abs() + shift.abs()
            x = functional.relu(x * scale + shift)
        weight = step.weight.double()
        bias = None if step.bias is None else step.bias.double()
        window = {"stride": step.stride, "padding": step.padding}
        y = functional.conv2d(x, weight, bias, **window)
        energy = functional.conv2d(size.square(), weight.square(), **window)
        magnitude = functional.conv2d(
            size, weight.abs(), None if bias is None else bias.abs(), **window
        )
        length = weight[0].numel() + 1
        return functional.relu(y) if step.activation else y, energy, magnitude, length
    if isinstance(step, Head):
        pooled, size = x.mean((2, 3)), x.abs().mean((2, 3))
        weight = step.weight.double()
        y = functional.linear(pooled, weight, step.bias.double())
        energy = functional.linear(size.square(), weight.square())
        magnitude = functional.linear(size, weight.abs(), step.bias.double().abs())
        return y, energy, magnitude, x[0].numel() + 1
    assert not step.average
    y = functional.max_pool2d(x, step.kernel, step.stride, step.padding)
    return y, torch.zeros_like(y), torch.zeros_like(y), 1


def check_steps(
    plan: Plan, algorithms: Sequence[str], view: Callable[[Segment], Tensor], y: Tensor
) -> None:
    """Compares each step of an executed plan with float64 on the step's own input.

    Args:
        plan: The plan, lowered with its weights, its buffers in places that nothing shares.
        algorithms: How each step was computed.
        view: Gives a segment with all of its last group, ``[N, C, H, W]``.
        y: The output.
    """

    def read(segment: Segment) -> Tensor:
        return view(segment)[:, : segment.channels].double()

    factor = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    fused_before = False
    for index, (step, algorithm) in enumerate(zip(plan.steps, algorithms, strict=True)):
        fused_with_next = algorithm.startswith("dense layer")
        if fused_with_next:
            fused_before = True
            continue
        inputs = [read(segment) for segment in step.inputs]
        extra = 0.0
        if fused_before:
            first = plan.steps[index - 1]
            exact, energy, magnitude, length = exact_step(
                first, torch.cat([read(segment) for segment in first.inputs], 1)
            )
            inner = accumulated_bound(exact, energy, magnitude, length, store=factor, factor=factor)
            inputs = [exact]
            extra = functional.conv2d(inner, step.weight.double().abs(), padding=step.padding)
            fused_before = False
        exact, energy, magnitude, length = exact_step(step, torch.cat(inputs, 1))
        # Weights are folded in float32 and rounded when they are packed.
        bound = extra + accumulated_bound(
            exact, energy, magnitude, length, store=factor, factor=2 * factor
        )
        if isinstance(step, Head):
            assert_within(y, exact, bound)
            continue
        assert_within(read(step.output), exact, bound)
        # Of a dense block's buffer the next layer overwrites what is behind a layer's channels.
        end = step.output.channel + step.output.channels
        if not any(
            other.output.buffer == step.output.buffer and other.output.channel == end
            for other in plan.steps
        ):
            behind = view(step.output)[:, step.output.channels :]
            assert (behind == 0).all()
