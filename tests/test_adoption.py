"""Networks of other packages: recognised by their parameters, and only if they compute the same."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from architecture import torchvision_models
from torch import Tensor, nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.models.adoption import adopt


class OtherLayer(nn.Module):
    """A dense layer that returns what it adds, and has its activations as modules."""

    def __init__(self, inputs: int, growth: int, width: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class OtherBlock(nn.ModuleDict):
    """Keeps the features of its layers in a list."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class OtherDenseNet(nn.Module):
    """A DenseNet written as torchvision writes it, with the same names."""

    def __init__(self, growth: int = 6, blocks=(2, 3, 1), channels: int = 10, classes: int = 5):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv0"] = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        layers["norm0"] = nn.BatchNorm2d(channels)
        layers["relu0"] = nn.ReLU()
        layers["pool0"] = nn.MaxPool2d(3, 2, 1)
        for number, count in enumerate(blocks, start=1):
            block = OtherBlock()
            for layer in range(count):
                inputs = channels + layer * growth
                block[f"denselayer{layer + 1}"] = OtherLayer(inputs, growth, 4 * growth)
            layers[f"denseblock{number}"] = block
            channels += count * growth
            if number < len(blocks):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(channels))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                layers[f"transition{number}"] = transition
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def other(randomised) -> OtherDenseNet:
    return randomised(OtherDenseNet())


def test_densenets_of_others_are_optimized(other):
    x = torch.randn(2, 3, 45, 70)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    other.train()
    frozen = tf.optimize(other, x)
    assert frozen.backend in ("cpu", "reference")
    assert other.training
    for key, value in other.state_dict().items():
        assert value.equal(before[key])
    with torch.no_grad():
        expected = other.eval()(x)
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
        other.classifier.weight.zero_()
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    assert "DenseNet" in repr(frozen)


def test_adopted_networks_keep_dtype_and_layout(other):
    network = adopt(other.bfloat16())
    assert type(network) is tf.DenseNet
    assert not network.training
    assert list(network.state_dict()) == list(other.state_dict())
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    blocks = [m for m in network.modules() if isinstance(m, tf.nn.DenseBlock)]
    assert [len(block) for block in blocks] == [2, 3, 1]


def test_flat_networks_are_recognised(randomised):
    class Renamed(nn.Module):
        def __init__(self, base: nn.ModuleList) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            for module in self.base:
                x = module(x)
            return x

    for name in ("hardnet39ds", "threshnet79"):
        model = randomised(tf.create_model(name, num_classes=4, in_chans=1)).eval()
        network = adopt(Renamed(copy.deepcopy(model.base)))
        assert type(network) is type(model)
        x = torch.randn(1, 1, 48, 48)
        with torch.no_grad(), tf.use_backend("reference"):
            torch.testing.assert_close(network(x), model(x))


def activate_twice(module: OtherDenseNet) -> None:
    module.features.relu0 = nn.Softplus()


def pool_by_maximum(module: OtherDenseNet) -> None:
    module.features.transition2.pool = nn.MaxPool2d(2)


def change_eps(module: OtherDenseNet) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1


def return_features(module: OtherDenseNet) -> None:
    module.forward = module.features.forward


def fail(module: OtherDenseNet) -> None:
    module.features.pool0 = nn.MaxPool2d(100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (activate_twice, "it computes something else"),
        (pool_by_maximum, "it computes something else"),
        (change_eps, "it computes something else"),
        (return_features, "it returns something else than logits"),
        (fail, "it does not run on images of 64x64"),
    ],
)
def test_what_computes_something_else_is_refused(other, change, message):
    change(other)
    with pytest.raises(TypeError, match=message) as raised:
        tf.optimize(other, torch.randn(1, 3, 32, 32))
    assert "is a OtherDenseNet with the parameters of a DenseNet" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_has_other_parameters_is_refused(other):
    x = torch.randn(1, 3, 32, 32)
    other.features.denseblock1.denselayer1.conv1 = nn.Conv2d(10, 25, 1, bias=False)
    others = (other, nn.Sequential(), nn.Conv2d(3, 4, 3), nn.Linear(2, 3), nn.ModuleDict())
    for module in others:
        with pytest.raises(TypeError, match=r"expected a model of threshnet_fast, or one with"):
            tf.optimize(module, x)
    with pytest.raises(TypeError, match=r"module is a function: expected a torch\.nn\.Module"):
        tf.optimize(lambda x: x, x)


@pytest.mark.parametrize("name", ["densenet121", "densenet169"])
def test_torchvision(name, randomised):
    module = randomised(getattr(torchvision_models(), name)()).eval()
    x = torch.randn(1, 3, 64, 64)
    frozen = tf.optimize(module, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=1e-4)
