"""Measures cat_bn_relu_conv against concatenation, BatchNorm, ReLU, convolution one by one.

    python benchmarks/bench_cat_bn_relu_conv.py --seconds 2
    python benchmarks/bench_cat_bn_relu_conv.py --device cuda

Shapes are those of the network. The operator packs its weights on every call, as its weights are
ordinary tensors; a compiled network packs them once, so it gains more than this shows.
"""

from __future__ import annotations

import sys

import operators
import torch
from torch import Tensor
from torch.nn import functional as F

import threshnet_fast as tf


def build(
    shape: operators.Shape, batch: int, place: operators.Place
) -> tuple[operators.Calls, Tensor]:
    """Makes the calls to compare, and the float64 result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    channels = sum(shape.segments)
    xs = place.put(*(draw(batch, c, shape.height, shape.width) for c in shape.segments))
    (weight,) = place.put(draw(shape.out_channels, channels, shape.kernel, shape.kernel))
    norm = draw(channels), draw(channels, low=0.5, high=1.8)
    affine = draw(channels, low=0.6, high=1.4), draw(channels)
    mean, variance, gamma, beta = place.put_parameters(*norm, *affine)
    padding = shape.kernel // 2
    scale = gamma * torch.rsqrt(variance + 1e-5)
    shift = beta - mean * scale

    def unfused(parts: list[Tensor], w: Tensor) -> Tensor:
        x = F.batch_norm(torch.cat(parts, 1), mean, variance, gamma, beta)
        return F.conv2d(F.relu(x, inplace=True), w, None, shape.stride, padding)

    last = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    last_weight = weight.contiguous(memory_format=torch.channels_last)
    calls: operators.Calls = {
        "fused": lambda: tf.ops.cat_bn_relu_conv(
            last, scale, shift, weight, stride=shape.stride, padding=padding, backend=place.backend
        ),
        "eager": lambda: unfused(xs, weight),
        "channels-last": lambda: unfused(last, last_weight),
    }
    wide = F.batch_norm(
        torch.cat(xs, 1).double(), mean.double(), variance.double(), gamma.double(), beta.double()
    )
    return calls, F.conv2d(F.relu(wide), weight.double(), None, shape.stride, padding)


if __name__ == "__main__":
    sys.exit(operators.run("cat_bn_relu_conv", __doc__, True, build))
