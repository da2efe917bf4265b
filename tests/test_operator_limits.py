"""What is beyond the limits of the engine on the CPU: plain PyTorch runs it, or an error says why.

Calls that once crashed run in a process of their own, so that a crash is a failed test.
"""

from __future__ import annotations

import pytest
import torch
from alone import run_alone
from torch import Tensor
from training import build

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.ops import registration

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def before(xs: list[Tensor], weight: Tensor, stride: int, padding: int, backend: str) -> Tensor:
    ones, zeros = torch.ones(weight.shape[1]), torch.zeros(weight.shape[1])
    return tf.ops.cat_bn_relu_conv(
        xs, ones, zeros, weight, stride=stride, padding=padding, backend=backend
    )


def after(xs: list[Tensor], weight: Tensor, stride: int, padding: int, backend: str) -> Tensor:
    ones, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0])
    return tf.ops.cat_conv_bn_relu(
        xs, weight, ones, zeros, stride=stride, padding=padding, backend=backend
    )


def engine(call, xs: list[Tensor], weight: Tensor, stride: int, padding: int) -> Tensor:
    """The operator in C++ itself, past the checks in Python."""
    ops = torch.ops.threshnet_fast_cpu
    length = weight.shape[1] if call is before else weight.shape[0]
    affine = (torch.ones(length), torch.zeros(length))
    if call is before:
        return ops.cat_bn_relu_conv(xs, *affine, weight, stride, padding, cpu.isa_code())
    return ops.cat_conv_bn_relu(xs, weight, *affine, stride, padding, True, cpu.isa_code())


CASES = {
    "taps of a kernel": ((1, 2, 12, 12), (3, 2, 9, 9), 1, 4),
    "rows and columns of padding": ((1, 1, 2, 2), (1, 1, 1, 1), 2**18, 2**20),
    "pixels to where a window begins": ((1, 1, 1, 2**26), (1, 1, 64, 1), 64, 63),
}


@pytest.mark.parametrize("limit", CASES)
def test_beyond_a_limit(limit):
    if "pixels" in limit:
        run_alone(check_beyond_a_limit, limit)
    else:
        check_beyond_a_limit(limit)


def check_beyond_a_limit(limit: str) -> None:
    torch.manual_seed(0)
    shape, kernel, stride, padding = CASES[limit]
    x, weight = torch.randn(shape), torch.randn(kernel)
    for call in (before, after):
        check_refused(call, limit, x, weight, stride, padding)
        expected = call([x], weight, stride, padding, "reference")
        assert call([x], weight, stride, padding, "auto").equal(expected)


def check_refused(call, limit: str, x: Tensor, weight: Tensor, stride: int, padding: int) -> None:
    with pytest.raises(ValueError, match=f"takes at most .* {limit}, these are"):
        call([x], weight, stride, padding, "cpu")
    with tf.use_backend("cpu"), pytest.raises(ValueError, match=limit):
        call([x], weight, stride, padding, None)
    # Whoever calls it past Python is refused too, before any memory is touched.
    with pytest.raises((RuntimeError, ValueError), match="threshnet_fast: invalid plan"):
        engine(call, [x], weight, stride, padding)


@pytest.mark.parametrize("call", [before, after])
@pytest.mark.parametrize(
    ("limit", "shape", "kernel"),
    [
        ("channels of xs", (1, 2**24 + 1, 1, 1), (1, 2**24 + 1, 1, 1)),
        ("channels of the result", (1, 1, 1, 1), (2**24 + 1, 1, 1, 1)),
        ("output pixels", (1, 1, 2**13 + 1, 2**14), (1, 1, 1, 1)),
    ],
)
def test_beyond_a_limit_of_size(call, limit, shape, kernel):
    """What takes plain PyTorch long is refused, and left to it, but not computed here."""
    x, weight = torch.zeros(1).expand(shape), torch.zeros(1).expand(kernel)
    check_refused(call, limit, x, weight, 1, 0)
    result = [shape[0], kernel[0], *shape[2:]]
    assert registration.choose([x], weight, result, 0, "auto") == "reference"


INSIDE = {
    "taps": ((1, 2, 12, 12), (3, 2, 8, 8), 1, 4),
    # A top left pixel almost 2^31 before the map's first one.
    "pixels": ((1, 1, 1, 2**25 - 1), (1, 1, 64, 1), 64, 63),
    "padding": ((1, 1, 2, 2), (1, 1, 1, 1), 2**18, 2**20 - 1),
}


@pytest.mark.parametrize("limit", INSIDE)
def test_within_the_limits(limit):
    if "pixels" in limit:
        run_alone(check_within_the_limits, limit)
    else:
        check_within_the_limits(limit)


def check_within_the_limits(limit: str) -> None:
    torch.manual_seed(0)
    shape, kernel, stride, padding = INSIDE[limit]
    x, weight = torch.randn(shape), torch.randn(kernel)
    for call in (before, after):
        expected = call([x], weight, stride, padding, "reference")
        torch.testing.assert_close(call([x], weight, stride, padding, "cpu"), expected)
        assert cpu.ENGINE.operator_objection([x], weight, expected.shape, padding, []) is None


def test_slices_that_lie_far_apart():
    """Pixels further apart than a description can say are copied."""
    x = torch.empty(1).as_strided((1, 1, 1, 1), (2**40, 1, 1, 1)).fill_(2.0)
    weight = torch.full((1, 1, 1, 1), 3.0)
    assert after([x], weight, 1, 0, "cpu").item() == 6.0


def test_network_beyond_a_limit_runs_as_plain_pytorch():
    model = build().eval()
    # Of the image, and of each channel on its own, windows may be larger.
    name, first = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 3 and module.groups == 1
    )
    stride = first.stride
    wide = torch.nn.Conv2d(first.in_channels, first.out_channels, 9, stride, 4, bias=False)
    model.set_submodule(name, wide)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        with tf.use_backend("reference"):
            expected = model(x)
        assert model(x).equal(expected)
        assert "a kernel has over 64 taps" in str(tf.explain(model, x))
        with tf.use_backend("cpu"), pytest.raises(RuntimeError, match="over 64 taps"):
            model(x)
        with pytest.warns(UserWarning, match="a kernel has over 64 taps"):
            frozen = tf.optimize(model, x)
        assert frozen.backend == "reference"
        assert frozen(x).equal(expected)
