"""The operators within functorch's transforms and forward-mode differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import threshnet_fast as tf
from threshnet_fast.ops import cat_bn_relu_conv, cat_conv_bn_relu

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
OPERATORS = [cat_bn_relu_conv, cat_conv_bn_relu]


def operands(operator, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    length = 5 if operator is cat_bn_relu_conv else 3
    return {
        "x": normal(4, 2, 3, 6, 7),
        "y": normal(4, 2, 2, 6, 7),
        "scale": normal(length),
        "shift": normal(length),
        "weight": normal(3, 5, 3, 3),
    }


def call(operator, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, **options):
    if operator is cat_bn_relu_conv:
        return operator([x, y], scale, shift, weight, padding=1, stride=2, **options)
    return operator([x, y], weight, scale, shift, padding=1, stride=2, **options)


def plain(operator, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """The formula, written anew."""
    x = torch.cat([x, y], 1)
    scale, shift = scale[:, None, None], shift[:, None, None]
    if operator is cat_bn_relu_conv:
        return torch.conv2d(torch.relu(x * scale + shift), weight, None, 2, 1)
    return torch.relu(torch.conv2d(x, weight, None, 2, 1) * scale + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_equals_a_loop(operator, dtype):
    given = operands(operator, dtype)
    x, y, *others = given.values()
    mapped = vmap(lambda x, y: call(operator, x, y, *others))(x, y)
    looped = torch.stack([call(operator, *pair, *others) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(mapped, looped)
    # Of weights, as an ensemble has them.
    weights = torch.stack([others[2], 2 * others[2], -others[2]])
    mapped = vmap(lambda weight: call(operator, x[0], y[0], *others[:2], weight))(weights)
    looped = torch.stack([call(operator, x[0], y[0], *others[:2], weight) for weight in weights])
    torch.testing.assert_close(mapped, looped)


@pytest.mark.parametrize("name", ["x", "y", "scale", "shift", "weight"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_each_example_equal_a_loop(operator, name):
    given = operands(operator)
    x, y, *others = given.values()
    order = list(given).index(name)

    def loss(*tensors: Tensor) -> Tensor:
        return call(operator, *tensors).square().sum()

    dims = (0, 0, None, None, None)
    mapped = vmap(grad(loss, order), dims)(x, y, *others)
    for index in range(len(x)):
        tensors = [t.clone() for t in (x[index], y[index], *others)]
        tensors[order].requires_grad_()
        (expected,) = torch.autograd.grad(loss(*tensors), tensors[order])
        torch.testing.assert_close(mapped[index], expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_other_transforms_equal_the_formula(operator):
    given = operands(operator)
    tensors = [given["x"][0], given["y"][0], *list(given.values())[2:]]
    tangents = [torch.randn_like(t) for t in tensors]

    def fused(*tensors: Tensor) -> Tensor:
        return call(operator, *tensors)

    def formula(*tensors: Tensor) -> Tensor:
        return plain(operator, *tensors)

    for actual, expected in zip(
        jvp(fused, tuple(tensors), tuple(tangents)),
        jvp(formula, tuple(tensors), tuple(tangents)),
        strict=True,
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected)
    output, backward = vjp(fused, *tensors)
    expected_output, expected_backward = vjp(formula, *tensors)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(backward(output), expected_backward(output))
    scale = 2
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(
            transform(fused, scale)(*tensors), transform(formula, scale)(*tensors)
        )
    torch.testing.assert_close(
        hessian(lambda *t: fused(*t).square().sum(), scale)(*tensors),
        hessian(lambda *t: formula(*t).square().sum(), scale)(*tensors),
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode(operator):
    given = operands(operator)
    x, y, *others = given["x"][0], given["y"][0], *list(given.values())[2:]
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(
            call(operator, forward_ad.make_dual(x, tangent), y, *others)
        )
        expected = forward_ad.unpack_dual(
            plain(operator, forward_ad.make_dual(x, tangent), y, *others)
        )
        # Where none of the arguments has a tangent, the operator itself runs.
        assert call(operator, x, y, *others).shape == actual.primal.shape
    torch.testing.assert_close(actual.primal, expected.primal)
    torch.testing.assert_close(actual.tangent, expected.tangent)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_input_within_a_transform(operator):
    x, y, scale, shift, weight = operands(operator, torch.float32).values()
    with pytest.raises(ValueError, match="weight has shape"):
        vmap(lambda x, y: call(operator, x, y, scale, shift, weight[:, :4]))(x, y)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this call: a functorch"):
        vmap(lambda x, y: call(operator, x, y, scale, shift, weight, backend="cpu"))(x, y)
    with tf.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run this call"):
        grad(lambda x: call(operator, x, y[0], scale, shift, weight).sum())(x[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_within_a_transform(operator):
    x, y, *others = operands(operator, torch.float32).values()
    with torch.autocast("cpu", torch.bfloat16):
        mapped = vmap(lambda x, y: call(operator, x, y, *others))(x, y)
        looped = torch.stack([call(operator, *pair, *others) for pair in zip(x, y, strict=True)])
    assert mapped.dtype == looped.dtype == torch.bfloat16
    torch.testing.assert_close(mapped, looped)


def test_gradients_of_each_example_of_a_module():
    """As functional_call is used, by differential privacy for one."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 4, 1, 1))
            self.scale = torch.nn.Parameter(torch.rand(4))
            self.shift = torch.nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return cat_bn_relu_conv([x], self.scale, self.shift, self.weight)

    torch.manual_seed(0)
    layer = Layer().double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert each[name].shape == (5, *parameter.shape)
        torch.testing.assert_close(each[name].sum(0), parameter.grad)
