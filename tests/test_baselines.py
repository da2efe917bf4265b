"""HarDNet and DenseNet as plain PyTorch: layout, checkpoints, numbers, interface."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from architecture import check_feature_info, costs, torchvision_models
from data import photographs
from torch import nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.nn import (
    ConvBNReLU,
    DenseBlock,
    DenseTransition,
    DepthwiseConvBN,
    HarmonicBlock,
    PointwiseDepthwise,
)

Shapes = dict[str, tuple[int, ...]]

# Layers per block, growth rate, channels of the stem.
DENSENETS = {
    "densenet121": ((6, 12, 24, 16), 32, 64),
    "densenet161": ((6, 12, 36, 24), 48, 96),
    "densenet169": ((6, 12, 32, 32), 32, 64),
    "densenet201": ((6, 12, 48, 32), 32, 64),
    "densenet_bc_100": ((16, 16, 16), 12, 24),
}
# Channels of the stem, layers per block, growth rates, transitions, where downsampling follows.
HARDNETS = {
    "hardnet39ds": (
        (24, 48),
        (4, 16, 8, 4),
        (16, 20, 64, 160),
        (96, 320, 640, 1024),
        (True, True, True, False),
    ),
    "hardnet68": (
        (32, 64),
        (8, 16, 16, 16, 4),
        (14, 16, 20, 40, 160),
        (128, 256, 320, 640, 1024),
        (True, False, True, True, False),
    ),
    "hardnet68ds": (
        (32, 64),
        (8, 16, 16, 16, 4),
        (14, 16, 20, 40, 160),
        (128, 256, 320, 640, 1024),
        (True, False, True, True, False),
    ),
    "hardnet85": (
        (48, 96),
        (8, 16, 16, 16, 16, 4),
        (24, 24, 28, 36, 48, 256),
        (192, 256, 320, 480, 720, 1280),
        (True, False, True, False, True, False),
    ),
}
NAMES = [*DENSENETS, *HARDNETS]
# Convolutions that are padded, unlike pools, leave a pixel of any image.
LEAST = dict.fromkeys(NAMES, 29) | {"densenet_bc_100": 4, "hardnet39ds": 1, "hardnet68ds": 1}


def small_densenet(**kwargs) -> tf.DenseNet:
    arguments = {"first_channels": 10, "blocks": (2, 3), "growth_rate": 6, "num_classes": 10}
    return tf.DenseNet(**(arguments | kwargs))


def small_hardnet(**kwargs) -> tf.HarDNet:
    arguments = {
        "first_channels": (8, 12),
        "blocks": (2, 5),
        "transitions": (16, 24),
        "downsample": (True, False),
        "growth_rates": (6, 10),
        "num_classes": 10,
    }
    return tf.HarDNet(**(arguments | kwargs))


SMALL = {
    "densenet": small_densenet,
    "densenet with small stem": lambda **kwargs: small_densenet(small_stem=True, **kwargs),
    "densenet without bottlenecks": lambda **kwargs: small_densenet(
        small_stem=True, bottleneck=0, compression=1.0, **kwargs
    ),
    "hardnet": lambda **kwargs: small_hardnet(block_drop_rate=0.1, **kwargs),
    "hardnet ds": lambda **kwargs: small_hardnet(depthwise=True, **kwargs),
}


def norm_shapes(key: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{key}.{name}": (channels,) for name in vectors} | {f"{key}.num_batches_tracked": ()}


def densenet_shapes(name: str, num_classes: int) -> Shapes:
    """Every key and shape of torchvision's checkpoint, from its published layout."""
    blocks, growth, width = DENSENETS[name]
    small = name == "densenet_bc_100"
    shapes: Shapes = {"features.conv0.weight": (width, 3, 3, 3) if small else (width, 3, 7, 7)}
    if not small:
        shapes |= norm_shapes("features.norm0", width)
    for block, layers in enumerate(blocks, start=1):
        for layer in range(1, layers + 1):
            key = f"features.denseblock{block}.denselayer{layer}"
            shapes |= norm_shapes(f"{key}.norm1", width)
            shapes[f"{key}.conv1.weight"] = (4 * growth, width, 1, 1)
            shapes |= norm_shapes(f"{key}.norm2", 4 * growth)
            shapes[f"{key}.conv2.weight"] = (growth, 4 * growth, 3, 3)
            width += growth
        if block < len(blocks):
            key = f"features.transition{block}"
            shapes |= norm_shapes(f"{key}.norm", width)
            shapes[f"{key}.conv.weight"] = (width // 2, width, 1, 1)
            width //= 2
    shapes |= norm_shapes("features.norm5", width)
    shapes["classifier.weight"] = (num_classes, width)
    shapes["classifier.bias"] = (num_classes,)
    return shapes


def links(layer: int) -> list[int]:
    return [layer - 2**j for j in range(10) if layer % 2**j == 0 and layer >= 2**j]


def hardnet_shapes(name: str, num_classes: int) -> Shapes:
    """Every key and shape of a published HarDNet checkpoint."""
    (first, width), blocks, growth_rates, transitions, downsample = HARDNETS[name]
    depthwise = name.endswith("ds")
    multiplier = 1.6 if name == "hardnet39ds" else 1.7
    shapes: Shapes = {}

    def cbr(key: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{key}.conv.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update(norm_shapes(f"{key}.norm", outputs))

    def dw(key: str, channels: int) -> None:
        shapes[f"{key}.dwconv.weight"] = (channels, 1, 3, 3)
        shapes.update(norm_shapes(f"{key}.norm", channels))

    cbr("base.0", 3, first, 3)
    cbr("base.1", first, width, 1 if depthwise else 3)
    if depthwise:
        dw("base.2", width)
    position = 3
    for block, layers in enumerate(blocks):
        outputs = {0: width}
        for layer in range(1, layers + 1):
            channels = growth_rates[block] * multiplier ** (len(links(layer)) - 1)
            outputs[layer] = int(int(channels + 1) / 2) * 2
            inputs = sum(outputs[link] for link in links(layer))
            key = f"base.{position}.layers.{layer - 1}"
            if depthwise:
                cbr(f"{key}.layer1", inputs, outputs[layer], 1)
                dw(f"{key}.layer2", outputs[layer])
            else:
                cbr(key, inputs, outputs[layer], 3)
        inputs = sum(outputs[i] for i in range(1, layers + 1) if i % 2 or i == layers)
        # A dropout without parameters comes before the last transition of HarDNet-85.
        position += 2 if name == "hardnet85" and block == len(blocks) - 1 else 1
        width = transitions[block]
        cbr(f"base.{position}", inputs, width, 1)
        position += 1
        if downsample[block]:
            if depthwise:
                dw(f"base.{position}", width)
            position += 1
    shapes[f"base.{position}.3.weight"] = (num_classes, width)
    shapes[f"base.{position}.3.bias"] = (num_classes,)
    return shapes


def expected_shapes(name: str, num_classes: int) -> Shapes:
    shapes = densenet_shapes if name in DENSENETS else hardnet_shapes
    return shapes(name, num_classes)


class Functional:
    """A network written out from its checkpoint alone, in float64 and evaluation mode."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def __call__(self, x: torch.Tensor, classifier: str) -> torch.Tensor:
        x = self.densenet(x) if "features.conv0.weight" in self.state else self.hardnet(x)
        x = x.mean((2, 3))
        return F.linear(x, self.state[f"{classifier}.weight"], self.state[f"{classifier}.bias"])

    def norm(self, key: str, x: torch.Tensor) -> torch.Tensor:
        gamma, beta, mean, var = (
            self.state[f"{key}.{suffix}"].view(1, -1, 1, 1)
            for suffix in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    def conv(self, key: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.state[f"{key}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)

    def densenet(self, x: torch.Tensor) -> torch.Tensor:
        if "features.norm0.weight" in self.state:
            x = self.norm("features.norm0", self.conv("features.conv0", x, 2)).clamp(min=0)
            x = F.max_pool2d(x, 3, 2, 1)
        else:
            x = self.conv("features.conv0", x)
        block = 1
        while f"features.denseblock{block}.denselayer1.conv1.weight" in self.state:
            layer = 1
            while f"features.denseblock{block}.denselayer{layer}.conv1.weight" in self.state:
                key = f"features.denseblock{block}.denselayer{layer}"
                new = self.conv(f"{key}.conv1", self.norm(f"{key}.norm1", x).clamp(min=0))
                new = self.conv(f"{key}.conv2", self.norm(f"{key}.norm2", new).clamp(min=0))
                x = torch.cat([x, new], 1)
                layer += 1
            key = f"features.transition{block}"
            if f"{key}.conv.weight" in self.state:
                x = self.conv(f"{key}.conv", self.norm(f"{key}.norm", x).clamp(min=0))
                x = F.avg_pool2d(x, 2)
            block += 1
        return self.norm("features.norm5", x).clamp(min=0)

    def cbr(self, key: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return self.norm(f"{key}.norm", self.conv(f"{key}.conv", x, stride)).clamp(0, 6)

    def dw(self, key: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return self.norm(f"{key}.norm", self.conv(f"{key}.dwconv", x, stride))

    def hardnet(self, x: torch.Tensor) -> torch.Tensor:
        last = max(int(key.split(".")[1]) for key in self.state)
        depthwise = "base.2.dwconv.weight" in self.state
        for position in range(last):
            key = f"base.{position}"
            if f"{key}.conv.weight" in self.state:
                x = self.cbr(key, x, 2 if position == 0 else 1)
            elif f"{key}.dwconv.weight" in self.state:
                x = self.dw(key, x, 2)
            elif any(name.startswith(f"{key}.layers.0.") for name in self.state):
                outputs = [x]
                while any(n.startswith(f"{key}.layers.{len(outputs) - 1}.") for n in self.state):
                    layer = f"{key}.layers.{len(outputs) - 1}"
                    joined = torch.cat([outputs[link] for link in links(len(outputs))], 1)
                    if depthwise:
                        joined = self.cbr(f"{layer}.layer1", joined)
                        outputs.append(self.dw(f"{layer}.layer2", joined))
                    else:
                        outputs.append(self.cbr(layer, joined))
                count = len(outputs)
                x = torch.cat([outputs[i] for i in range(count) if i % 2 or i == count - 1], 1)
            elif position == 2:
                x = F.max_pool2d(x, 3, 2, 1)
            elif not any(n.startswith(f"base.{position - 1}.layers.") for n in self.state):
                x = F.max_pool2d(x, 2)
        return x


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "convolutions", "giga_macs"),
    [
        ("densenet121", 1000, 7_978_856, 120, 2.834),
        ("densenet161", 1000, 28_681_000, 160, 7.728),
        ("densenet169", 1000, 14_149_480, 168, 3.360),
        ("densenet201", 1000, 20_013_928, 200, 4.291),
        ("densenet_bc_100", 10, 769_162, 99, 0.288),
        ("hardnet39ds", 1000, 3_488_228, 74, 0.429),
        ("hardnet68", 1000, 17_565_348, 67, 4.246),
        ("hardnet68ds", 1000, 4_180_602, 131, 0.775),
        ("hardnet85", 1000, 36_670_212, 84, 9.074),
    ],
)
def test_published_cost(name, num_classes, parameters, convolutions, giga_macs):
    with torch.device("meta"):
        model = tf.create_model(name, num_classes=num_classes).eval()
    assert costs(model) == (parameters, convolutions, giga_macs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_state_dict_keys_and_shapes(name, num_classes):
    with torch.device("meta"):
        model = tf.create_model(name, num_classes=num_classes)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected_shapes(name, num_classes)


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_torchvision_checkpoints_load(name):
    published_model = getattr(torchvision_models(), name)
    with torch.device("meta"):
        published = published_model().state_dict()
        model = tf.create_model(name)
    assert list(model.state_dict()) == list(published)
    model.load_state_dict(published, strict=True, assign=True)


@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_the_network_written_out(name, randomised):
    model = randomised(tf.create_model(name, num_classes=7)).eval().double()
    x = photographs(40, 64, count=2).double()
    with torch.no_grad(), tf.use_backend("reference"):
        actual = model(x)
    wanted = Functional(model.state_dict())(x, model.default_cfg["classifier"])
    assert wanted.std() > 0.01
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_interface(build, randomised):
    model = randomised(build(drop_rate=0.5)).eval()
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        logits = model.forward_head(features)
        torch.testing.assert_close(logits, model.get_classifier()(pooled))
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-4)

        keys = list(model.state_dict())
        model.reset_classifier(4)
        assert list(model.state_dict()) == keys
        assert model.num_classes == model.default_cfg["num_classes"] == 4
        assert model(x).shape == (2, 4)
        assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled, rtol=1e-4, atol=1e-4)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="num_classes is -1: expected 0 or more"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_match_the_maps(name):
    with torch.device("meta"):
        model = tf.create_model(name).eval()
    check_feature_info(model)
    reductions = [info["reduction"] for info in model.feature_info]
    assert all(a <= b for a, b in pairwise(reductions))
    assert model.num_features == model.feature_info[-1]["num_chs"]
    size = model.default_cfg["input_size"][1]
    assert model.default_cfg["pool_size"] == (size // reductions[-1],) * 2
    first = model.get_submodule(model.default_cfg["first_conv"])
    assert isinstance(first, nn.Conv2d)
    assert first.in_channels == 3
    assert model.min_size == LEAST[name]


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_checkpoints_and_training(build, randomised):
    source = randomised(build()).eval()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    model = build().eval()
    x = photographs(32, count=4)
    with torch.no_grad():
        assert not torch.allclose(model(x), source(x))
        model.load_state_dict(torch.load(file, weights_only=True), strict=True)
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_published_dropout():
    drop_rates = {"hardnet39ds": 0.05, "hardnet68": 0.1, "hardnet68ds": 0.05, "hardnet85": 0.2}
    for name in NAMES:
        with torch.device("meta"):
            model = tf.create_model(name)
        assert model.drop_rate == drop_rates.get(name, 0.0)
        dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
        assert dropouts == ([0.1] if name == "hardnet85" else [])


def test_initial_values():
    for model in (small_densenet(), small_hardnet(depthwise=True)):
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 500:
                fan_in = module.weight[0].numel()
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.2)
        assert torch.equal(model.get_classifier().bias, torch.zeros(10))


# Modules


def test_depthwise_convolution_keeps_channels_apart(randomised):
    module = randomised(DepthwiseConvBN(3, stride=2)).eval()
    x = torch.randn(2, 3, 7, 10)
    with torch.no_grad():
        before = module(x)
        x[:, 1] += 1
        after = module(x)
    assert before.shape == (2, 3, 4, 5)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert before.min() < 0


def test_pointwise_depthwise_activates_between_its_convolutions(randomised):
    module = randomised(PointwiseDepthwise(5, 4, "relu6")).eval()
    assert module.layer1.activation == "relu6"
    x = 20 * torch.randn(2, 5, 6, 7)
    with torch.no_grad():
        middle = module.layer1(x)
        assert middle.min() == 0
        assert middle.max() == 6
        torch.testing.assert_close(module(x), module.layer2.norm(module.layer2.dwconv(middle)))


def test_harmonic_block_of_depthwise_layers():
    block = HarmonicBlock(6, 4, 1.7, 4, "relu6", depthwise=True)
    assert all(isinstance(layer, PointwiseDepthwise) for layer in block.layers)
    assert block.layers[3].layer1.conv.in_channels == 4 + 6 + 6
    assert isinstance(HarmonicBlock(6, 4, 1.7, 4, "relu6").layers[0], ConvBNReLU)


def test_dense_block_without_bottlenecks(randomised):
    """By hand: every layer normalises, activates and convolves all that is before it."""
    block = randomised(DenseBlock(5, 3, 4, bottleneck=0)).eval().double()
    assert [key for key in block.state_dict() if key.endswith("weight")] == [
        f"denselayer{layer}.{name}.weight" for layer in (1, 2, 3) for name in ("norm1", "conv1")
    ]
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    expected = x
    for index, layer in enumerate(block):
        assert layer.conv1.weight.shape == (4, 5 + 4 * index, 3, 3)
        norm = layer.norm1
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        active = (expected * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
        # Zeros around what is activated, not around what is normalised.
        patches = F.unfold(F.pad(active, (1, 1, 1, 1)), 3)
        new = torch.einsum("ok,nkp->nop", layer.conv1.weight.flatten(1), patches)
        expected = torch.cat([expected, new.view(2, 4, 7, 6)], 1)
    torch.testing.assert_close(block(x), expected)


def test_plain_densenet_of_40_layers():
    """The network of the paper: 1.0 M parameters, 40 layers with weights."""
    model = tf.DenseNet(
        first_channels=16,
        blocks=(12, 12, 12),
        growth_rate=12,
        bottleneck=0,
        compression=1.0,
        small_stem=True,
        num_classes=10,
    )
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 40
    assert sum(p.numel() for p in model.parameters()) == 1_019_722
    assert model.num_features == 448


def test_dense_block_and_transition(randomised):
    block = randomised(DenseBlock(5, 3, 4, bottleneck=2)).eval()
    transition = randomised(DenseTransition(17, 8)).eval()
    assert block.out_channels == 17
    assert [name for name, _ in block.named_children()] == [f"denselayer{i}" for i in (1, 2, 3)]
    x = torch.randn(2, 5, 7, 9)
    with torch.no_grad():
        y = block(x)
        assert torch.equal(y[:, :5], x)
        assert y.shape == (2, 17, 7, 9)
        z = F.conv2d(F.relu(transition.norm(y)), transition.conv.weight)
        torch.testing.assert_close(transition(y), F.avg_pool2d(z, 2))
    with pytest.raises(ValueError, match="num_layers is 0: expected 1 or more"):
        DenseBlock(5, 0, 4)


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": ()}, ValueError, "blocks is empty"),
        ({"blocks": (2, 0)}, ValueError, "blocks[1] is 0: expected 1 or more"),
        ({"blocks": 2}, TypeError, "blocks is 2: expected a sequence"),
        ({"first_channels": 0}, ValueError, "first_channels is 0"),
        ({"growth_rate": 1.5}, TypeError, "growth_rate is 1.5: expected an integer"),
        ({"bottleneck": -1}, ValueError, "bottleneck is -1: expected 0 or more"),
        ({"compression": 0}, ValueError, "compression is 0.0: expected a finite number above 0"),
        ({"compression": 1.5}, ValueError, "compression is 1.5: expected at most 1"),
        ({"compression": 0.001}, ValueError, "a transition would compress 22 channels to none"),
        ({"small_stem": 2}, ValueError, "small_stem is 2: expected True or False"),
        ({"in_chans": 0}, ValueError, "in_chans is 0: expected 1 or more"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate is 1.0"),
        ({"num_classes": -1}, ValueError, "num_classes is -1"),
        ({"global_pool": "max"}, ValueError, "global_pool is 'max'"),
    ],
)
def test_bad_arguments_of_densenet(arguments, error, message):
    with pytest.raises(error) as raised:
        small_densenet(**arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"first_channels": (8,)}, ValueError, "first_channels has 1 entries: expected 2"),
        ({"blocks": ()}, ValueError, "blocks is empty"),
        ({"transitions": (16,)}, ValueError, "transitions has 1 entries: expected 2"),
        ({"growth_rates": (4, 0)}, ValueError, "growth_rates[1] is 0: expected 1 or more"),
        ({"downsample": (True, 2)}, ValueError, "downsample[1] is 2: expected True or False"),
        ({"multiplier": math.inf}, ValueError, "multiplier is inf"),
        ({"depthwise": "yes"}, ValueError, "depthwise is 'yes': expected True or False"),
        ({"block_drop_rate": 1}, ValueError, "block_drop_rate is 1.0: expected 0 or more"),
        ({"global_pool": ""}, ValueError, "num_classes is 10: expected 0, as global_pool is ''"),
    ],
)
def test_bad_arguments_of_hardnet(arguments, error, message):
    with pytest.raises(error) as raised:
        small_hardnet(**arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_bad_input(build):
    model = build().eval()
    with torch.no_grad():
        with pytest.raises(ValueError, match="x has 1 channels"):
            model(torch.zeros(1, 1, 32, 32))
        least = model.min_size
        with pytest.raises(ValueError, match=f"expected at least {least} x {least}"):
            model(torch.zeros(1, 3, least - 1, 32))
        with pytest.raises(TypeError, match=r"x has dtype torch.float64: expected torch.float32"):
            model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
