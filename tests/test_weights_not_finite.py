"""Infinities and NaN in weights: what meets the padding is what plain PyTorch makes of it."""

from __future__ import annotations

import pytest
import torch
from test_plan import small

import threshnet_fast as tf
from threshnet_fast.engines import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:TF32 acceleration")]
VALUES = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("operator", ["cat_bn_relu_conv", "cat_conv_bn_relu"])
def test_operators(operator, value):
    torch.manual_seed(0)
    x, weight = torch.rand(2, 4, 6, 7), torch.rand(3, 4, 3, 3)
    weight[1, 2, 0, 1] = value
    if operator == "cat_bn_relu_conv":
        arguments = ([x], torch.ones(4), torch.zeros(4), weight)
    else:
        arguments = ([x], weight, torch.ones(3), torch.zeros(3))
    call = getattr(tf.ops, operator)
    expected = call(*arguments, padding=1, backend="reference")
    torch.testing.assert_close(call(*arguments, padding=1), expected, equal_nan=True)
    # oneDNN leaves padding out for some shapes, as the engine does for all; the row above the map
    # is 0 * inf where every product is calculated.
    with torch.backends.mkldnn.flags(enabled=False):
        assert call(*arguments, padding=1)[:, 1, 0].isnan().all()
    with pytest.raises(ValueError, match="takes finite weights only"):
        call(*arguments, padding=1, backend="cpu")
    # Without padding nothing is left out.
    torch.testing.assert_close(
        call(*arguments, padding=0, backend="cpu"),
        call(*arguments, padding=0, backend="reference"),
        equal_nan=True,
    )


def test_scale_of_the_operator():
    """A scale is multiplied into the weight, which may overflow by it."""
    torch.manual_seed(0)
    x, weight, shift = torch.rand(1, 4, 6, 7), torch.rand(3, 4, 3, 3), torch.zeros(3)
    scale = torch.tensor([1.0, torch.inf, 1.0])
    y = tf.ops.cat_conv_bn_relu([x], weight, scale, shift)
    expected = tf.ops.cat_conv_bn_relu([x], weight, scale, shift, backend="reference")
    assert y.equal(expected)
    assert y[:, 1].isinf().all()


@pytest.mark.parametrize("value", VALUES)
def test_networks(randomised, value):
    torch.manual_seed(0)
    model = randomised(small()).eval()
    name, padded = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1)
    ][2]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(x)
        before = padded.weight.clone()
        padded.weight[0, 0, 0, 0] = value
        with tf.use_backend("reference"):
            expected = model(x)
        torch.testing.assert_close(model(x), expected, equal_nan=True)
        assert "is not finite" in str(tf.explain(model, x))
        with tf.use_backend("cpu"), pytest.raises(RuntimeError, match="is not finite"):
            model(x)
        padded.weight.copy_(before)
        with tf.use_backend("cpu"):
            assert model(x).isfinite().all()
    assert name


def test_all_finite():
    operator = torch.ops.threshnet_fast_cpu.all_finite
    largest = torch.finfo(torch.float32).max
    plain = torch.tensor([0.0, -0.0, 1e-45, largest, -largest])
    assert operator([plain, torch.empty(0)])
    for value in VALUES:
        for size in (1, 7, 64, 1001):
            for place in (0, size // 2, size - 1):
                x = torch.zeros(size)
                x[place] = value
                assert not operator([plain, x])
    with pytest.raises(RuntimeError, match="float32"):
        operator([plain.double()])
