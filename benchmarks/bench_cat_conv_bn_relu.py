"""Measures cat_conv_bn_relu against concatenation, convolution, BatchNorm, ReLU one by one.

    python benchmarks/bench_cat_conv_bn_relu.py --seconds 2
    python benchmarks/bench_cat_conv_bn_relu.py --device cuda

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

    channels, out = sum(shape.segments), shape.out_channels
    xs = place.put(*(draw(batch, c, shape.height, shape.width) for c in shape.segments))
    (weight,) = place.put(draw(out, channels, shape.kernel, shape.kernel))
    norm = draw(out), draw(out, low=0.5, high=1.8)
    affine = draw(out, low=0.6, high=1.4), draw(out)
    mean, variance, gamma, beta = place.put_parameters(*norm, *affine)
    padding = shape.kernel // 2
    scale = gamma * torch.rsqrt(variance + 1e-5)
    shift = beta - mean * scale

    def unfused(parts: list[Tensor], w: Tensor) -> Tensor:
        x = F.conv2d(torch.cat(parts, 1), w, None, shape.stride, padding)
        return F.relu(F.batch_norm(x, mean, variance, gamma, beta), inplace=True)

    last = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    last_weight = weight.contiguous(memory_format=torch.channels_last)
    calls: operators.Calls = {
        "fused": lambda: tf.ops.cat_conv_bn_relu(
            last, weight, scale, shift, stride=shape.stride, padding=padding, backend=place.backend
        ),
        "eager": lambda: unfused(xs, weight),
        "channels-last": lambda: unfused(last, last_weight),
    }
    wide = F.conv2d(torch.cat(xs, 1).double(), weight.double(), None, shape.stride, padding)
    wide = F.batch_norm(wide, mean.double(), variance.double(), gamma.double(), beta.double())
    return calls, F.relu(wide)


if __name__ == "__main__":
    sys.exit(operators.run("cat_conv_bn_relu", __doc__, False, build))
