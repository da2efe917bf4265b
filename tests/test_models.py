from __future__ import annotations

import copy
import io
import math
import timeit

import pytest
import torch
from architecture import check_feature_info, costs
from data import photographs
from torch import nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.models import check_input
from threshnet_fast.nn import (
    ConvBNReLU,
    DenseLayer,
    HarmonicBlock,
    harmonic_channels,
    harmonic_links,
)

# Layers per block, transition widths, growth rates, and where 2x2 pooling follows the transition.
LAYOUTS = {
    "threshnet79": ((6, 8, 12, 16, 4), (128, 192, 288, 480, 960)),
    "threshnet95": ((6, 12, 16, 16, 4), (128, 256, 384, 480, 960)),
}
GROWTH = (32, 32, 32, 40, 160)
POOLED = (True, True, False, True, False)


def small(**kwargs) -> tf.ThreshNet:
    arguments = {
        "first_channels": (8, 12),
        "blocks": (2, 1, 5),
        "transitions": (16, 20, 24),
        "downsample": (True, False, True),
        "threshold": 2,
        "growth_rates": (4, 6, 10),
        "num_classes": 10,
    }
    return tf.ThreshNet(**(arguments | kwargs))


def expected_shapes(name: str, num_classes: int, in_chans: int = 3) -> dict[str, tuple[int, ...]]:
    """Every key and shape of a checkpoint, from the published description alone."""
    blocks, transitions = LAYOUTS[name]
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(key: str, channels: int) -> None:
        for suffix in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{key}.{suffix}"] = (channels,)
        shapes[f"{key}.num_batches_tracked"] = ()

    def cbr(key: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{key}.conv.weight"] = (outputs, inputs, kernel, kernel)
        norm(f"{key}.norm", outputs)

    cbr("base.0", in_chans, 32, 3)
    cbr("base.1", 32, 64, 3)
    position, width = 3, 64
    for block, layers in enumerate(blocks):
        if block < 3:
            for _ in range(layers):
                norm(f"base.{position}.norm1", width)
                shapes[f"base.{position}.conv1.weight"] = (128, width, 1, 1)
                norm(f"base.{position}.norm2", 128)
                shapes[f"base.{position}.conv2.weight"] = (32, 128, 3, 3)
                position += 1
                width += 32
        else:
            outputs = {0: width} | dict(enumerate(HAND_CHANNELS[GROWTH[block]][:layers], 1))
            for layer in range(1, layers + 1):
                inputs = sum(outputs[source] for source in HAND_LINKS[layer])
                cbr(f"base.{position}.layers.{layer - 1}", inputs, outputs[layer], 3)
            width = sum(outputs[i] for i in range(1, layers + 1) if i % 2 or i == layers)
            position += 1
        cbr(f"base.{position}", width, transitions[block], 1)
        width = transitions[block]
        position += 2 if POOLED[block] else 1
    shapes[f"base.{position}.2.weight"] = (num_classes, width)
    shapes[f"base.{position}.2.bias"] = (num_classes,)
    return shapes


HAND_LINKS = {
    1: [0],
    2: [1, 0],
    3: [2],
    4: [3, 2, 0],
    5: [4],
    6: [5, 4],
    7: [6],
    8: [7, 6, 4, 0],
    9: [8],
    10: [9, 8],
    11: [10],
    12: [11, 10, 8],
    13: [12],
    14: [13, 12],
    15: [14],
    16: [15, 14, 12, 8, 0],
}
HAND_CHANNELS = {
    40: [40, 68, 40, 116, 40, 68, 40, 196, 40, 68, 40, 116, 40, 68, 40, 334],
    160: [160, 272, 160, 462],
}


def functional_forward(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network written out from its checkpoint alone, in float64 and eval mode."""
    state = {key: value.double() for key, value in state.items()}
    x = x.double()

    def norm(key: str, value: torch.Tensor) -> torch.Tensor:
        gamma, beta, mean, var = (
            state[f"{key}.{suffix}"].view(1, -1, 1, 1)
            for suffix in ("weight", "bias", "running_mean", "running_var")
        )
        return (value - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    def conv(key: str, value: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{key}.weight"]
        return F.conv2d(value, weight, stride=stride, padding=weight.shape[-1] // 2)

    def cbr(key: str, value: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return norm(f"{key}.norm", conv(f"{key}.conv", value, stride)).clamp(min=0)

    last = max(int(key.split(".")[1]) for key in state)
    for index in range(last):
        key = f"base.{index}"
        if f"{key}.conv.weight" in state:
            x = cbr(key, x, stride=2 if index == 0 else 1)
        elif f"{key}.norm1.weight" in state:
            new = conv(f"{key}.conv1", norm(f"{key}.norm1", x).clamp(min=0))
            new = conv(f"{key}.conv2", norm(f"{key}.norm2", new).clamp(min=0))
            x = torch.cat([x, new], 1)
        elif f"{key}.layers.0.conv.weight" in state:
            outputs = {0: x}
            layer = 1
            while f"{key}.layers.{layer - 1}.conv.weight" in state:
                lowest_bit = layer & -layer
                sources = [layer - 2**j for j in range(10) if 2**j <= lowest_bit]
                joined = torch.cat([outputs[source] for source in sources], 1)
                outputs[layer] = cbr(f"{key}.layers.{layer - 1}", joined)
                layer += 1
            x = torch.cat([outputs[i] for i in range(1, layer) if i % 2 or i == layer - 1], 1)
        elif index == 2:
            x = F.max_pool2d(x, 3, 2, 1)
        else:
            x = F.max_pool2d(x, 2)
    return F.linear(x.mean((2, 3)), state[f"base.{last}.2.weight"], state[f"base.{last}.2.bias"])


@pytest.fixture(scope="module")
def net79() -> tf.ThreshNet79:
    torch.manual_seed(0)
    return tf.ThreshNet79(num_classes=10).eval()


# Size and layout


@pytest.mark.parametrize(
    ("name", "parameters", "convolutions", "giga_macs"),
    [("threshnet79", 14_371_858, 79, 3.423), ("threshnet95", 16_189_202, 95, 4.027)],
)
def test_published_cost(name, parameters, convolutions, giga_macs):
    with torch.device("meta"):
        model = tf.create_model(name, num_classes=10).eval()
    assert costs(model) == (parameters, convolutions, giga_macs)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize(("num_classes", "in_chans"), [(10, 3), (1000, 3), (3, 5)])
def test_state_dict_keys_and_shapes(name, num_classes, in_chans):
    with torch.device("meta"):
        model = tf.create_model(name, num_classes=num_classes, in_chans=in_chans)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected_shapes(name, num_classes, in_chans)
    assert list(model.base.children())[-1] is model.base[-1]
    assert model.get_classifier() is model.base[-1][2]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_modules_without_parameters_are_where_checkpoints_expect_them(name):
    with torch.device("meta"):
        base = tf.create_model(name).base
    pools = {i: m for i, m in enumerate(base) if isinstance(m, nn.MaxPool2d)}
    stem = pools.pop(2)
    assert (stem.kernel_size, stem.stride, stem.padding) == (3, 2, 1)
    assert len(pools) == 3
    assert all((m.kernel_size, m.stride, m.padding) == (2, 2, 0) for m in pools.values())
    assert [type(m) for m in base[-1]] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert base[-1][0].output_size == 1
    assert base[0].conv.stride == (2, 2)
    others = [m for m in base.modules() if isinstance(m, nn.Conv2d)][1:]
    assert all(m.stride == (1, 1) for m in others)
    assert all(m.padding == (m.kernel_size[0] // 2,) * 2 for m in others)


def test_strict_load_round_trip(randomised):
    source = randomised(tf.ThreshNet79(num_classes=10)).eval()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    target = tf.ThreshNet79(num_classes=10).eval()
    x = photographs(64, count=2)
    with torch.no_grad():
        wanted = source(x)
        assert not torch.allclose(target(x), wanted)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        torch.testing.assert_close(target(x), wanted, rtol=0, atol=0)


def test_copies_are_independent(randomised):
    model = randomised(small()).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(twin(x), before, rtol=0, atol=0)
        for parameter in twin.parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


# Harmonic block


def test_harmonic_links_by_hand():
    assert {i: harmonic_links(i) for i in HAND_LINKS} == HAND_LINKS
    assert harmonic_links(0) == []
    with pytest.raises(ValueError, match="layer is -1"):
        harmonic_links(-1)


@pytest.mark.parametrize("growth", sorted(HAND_CHANNELS))
def test_harmonic_channels_by_hand(growth):
    widths = HAND_CHANNELS[growth]
    assert [harmonic_channels(i, growth, 1.7) for i in range(1, len(widths) + 1)] == widths


def test_harmonic_block_tables():
    block = HarmonicBlock(288, 40, 1.7, 16)
    assert block.links == [[], *HAND_LINKS.values()]
    assert block.channels == [288, *HAND_CHANNELS[40]]
    assert block.out_layers == [1, 3, 5, 7, 9, 11, 13, 15, 16]
    assert block.out_channels == 8 * 40 + 334
    assert block.layers[15].conv.in_channels == 40 + 68 + 116 + 196 + 288
    assert HarmonicBlock(8, 4, 1.7, 5).out_layers == [1, 3, 5]
    assert HarmonicBlock(8, 4, 1.7, 1).out_layers == [1]


def test_harmonic_block_forward_by_hand(randomised):
    block = randomised(HarmonicBlock(6, 4, 1.7, 4)).eval().double()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        one = block.layers[0](x)
        two = block.layers[1](torch.cat([one, x], 1))
        three = block.layers[2](two)
        four = block.layers[3](torch.cat([three, two, x], 1))
        torch.testing.assert_close(block(x), torch.cat([one, three, four], 1), rtol=0, atol=0)


def test_modules_refuse_bad_arguments():
    with pytest.raises(ValueError, match="kernel_size is 2: expected an odd number"):
        ConvBNReLU(3, 4, kernel_size=2)
    with pytest.raises(ValueError, match="activation is 'gelu': expected one of"):
        ConvBNReLU(3, 4, activation="gelu")
    with pytest.raises(ValueError, match="num_layers is 0: expected 1 or more"):
        HarmonicBlock(8, 4, 1.7, 0)
    with pytest.raises(ValueError, match=r"layers of \[2, 0\] channels"):
        HarmonicBlock(8, 2, 0.1, 2)


def test_relu6_saturates():
    unit = ConvBNReLU(1, 1, 1, activation="relu6").eval()
    nn.init.constant_(unit.conv.weight, 1.0)
    x = torch.tensor([-1.0, 2.0, 50.0]).view(1, 1, 1, 3)
    with torch.no_grad():
        values = unit(x).flatten()
    torch.testing.assert_close(values, torch.tensor([0.0, 2.0, 6.0]), rtol=1e-4, atol=0)


def test_dense_layer_leaves_its_input_in_front(randomised):
    layer = randomised(DenseLayer(10, 3, bottleneck=2)).eval()
    x = torch.randn(2, 10, 5, 6)
    kept = x.clone()
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (2, 13, 5, 6)
    assert layer.conv1.out_channels == 6
    assert torch.equal(x, kept)
    assert torch.equal(y[:, :10], x)


# Forward


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_forward_equals_the_network_written_out(name, randomised):
    model = randomised(tf.create_model(name, num_classes=10)).eval().double()
    x = photographs(64, 96, count=2).double()
    with torch.no_grad(), tf.use_backend("reference"):
        actual = model(x)
    wanted = functional_forward(model.state_dict(), x)
    assert wanted.std() > 0.01
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (33, 33), (64, 64), (96, 96), (160, 288), (32, 75)])
def test_any_size(net79, size):
    with torch.no_grad():
        x = photographs(*size, count=1)
        features = net79.forward_features(x)
        logits = net79(x)
    assert features.shape == (1, 960, *(_last_map(side) for side in size))
    assert logits.shape == (1, 10)
    assert logits.isfinite().all()


def _last_map(side: int) -> int:
    side = math.ceil(math.ceil(side / 2) / 2)
    for _ in range(3):
        side //= 2
    return side


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_images_of_a_batch_do_not_mix(randomised, batch):
    model = randomised(small()).eval().double()
    x = photographs(48, count=batch).double()
    with torch.no_grad():
        single = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_in_chans(in_chans):
    model = small(in_chans=in_chans).eval()
    assert model.default_cfg["input_size"] == (in_chans, 224, 224)
    with torch.no_grad():
        assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, 10)


def test_memory_formats_agree(randomised):
    model = randomised(small()).eval().double()
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        strided = torch.randn(2, 3, 48, 80, dtype=torch.float64)[..., ::2].copy_(x)
        for same in (x.to(memory_format=torch.channels_last), strided):
            torch.testing.assert_close(model(same), wanted, rtol=1e-9, atol=1e-9)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_nan_is_not_hidden():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    x[1, 0, 16, 16] = math.nan
    with torch.no_grad():
        y = model(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().any()


# Head


def test_forward_head(randomised):
    model = randomised(small(drop_rate=0.5)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        logits = model.forward_head(features)
        torch.testing.assert_close(logits, model.get_classifier()(pooled))
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_classes", [0, 1, 2, 1000])
def test_num_classes(num_classes):
    model = small(num_classes=num_classes).eval()
    with torch.no_grad():
        y = model(torch.randn(2, 3, 32, 32))
    assert y.shape == (2, num_classes or 24)
    assert isinstance(model.get_classifier(), nn.Linear if num_classes else nn.Identity)
    assert model.num_classes == model.default_cfg["num_classes"] == num_classes


def test_no_pooling_returns_the_map():
    model = small(num_classes=0, global_pool="").eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_features(x))
        assert model(x).shape == (2, 24, 4, 6)


def test_reset_classifier():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    keys = set(model.state_dict())
    with torch.no_grad():
        features = model.forward_features(x)
    model.reset_classifier(4)
    assert set(model.state_dict()) == keys
    assert not model.base[-1].training
    assert model.default_cfg["num_classes"] == 4
    with torch.no_grad():
        assert model(x).shape == (2, 4)
        model.reset_classifier(0)
        assert set(model.state_dict()) < keys
        torch.testing.assert_close(model(x), features.mean((2, 3)), rtol=1e-4, atol=1e-4)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
        model.reset_classifier(6, "avg")
        assert model(x).shape == (2, 6)


def test_reset_classifier_keeps_the_dtype():
    model = small().double().eval()
    model.reset_classifier(3)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_refused_reset_leaves_the_model_alone():
    model = small().eval()
    with pytest.raises(ValueError, match="num_classes is -1: expected 0 or more"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="num_classes is 3: expected 0"):
        model.reset_classifier(3, "")
    assert (model.num_classes, model.global_pool) == (10, "avg")
    assert model.get_classifier().out_features == 10


def test_dropout_acts_in_training_only_and_owns_no_key():
    model = small(drop_rate=0.9)
    assert model.state_dict().keys() == small().state_dict().keys()
    features = torch.ones(64, 24, 2, 2)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert 0.8 < (dropped == 0).float().mean() < 0.97
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(64, 24))


# Descriptions


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_feature_info_matches_the_maps(name):
    with torch.device("meta"):
        model = tf.create_model(name).eval()
    check_feature_info(model)
    assert [info["num_chs"] for info in model.feature_info] == [64, *LAYOUTS[name][1]]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 16, 32]
    assert model.num_features == model.feature_info[-1]["num_chs"] == 960


def test_default_cfg_names_real_modules():
    with torch.device("meta"):
        model = tf.ThreshNet95()
    assert model.get_submodule(model.default_cfg["first_conv"]) is model.base[0].conv
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert model.default_cfg["pool_size"] == (7, 7)
    assert (model.num_classes, model.in_chans, model.min_size) == (1000, 3, 29)


def test_initial_values():
    model = tf.ThreshNet79(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    assert torch.equal(model.get_classifier().bias, torch.zeros(10))


# Training


def test_every_parameter_gets_a_gradient():
    model = tf.ThreshNet79(num_classes=10).train()
    model(photographs(64, count=2)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_training_lowers_the_loss():
    model = small(num_classes=6).train()
    x, labels = photographs(48), torch.arange(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model.base[0].norm.num_batches_tracked == 12


def test_single_pixel_statistics_are_refused_as_pytorch_does():
    model = tf.ThreshNet79(num_classes=10).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.randn(1, 3, 32, 32))


def test_training_step_of_autocast():
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 48, 48)).float().pow(2).mean()
    loss.backward()
    assert model.base[0].conv.weight.grad.dtype == torch.float32


# Bad input


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x is a list: expected a torch.Tensor"),
        (None, TypeError, "x is a NoneType: expected a torch.Tensor"),
        (torch.zeros(2, 3, 32, 32).numpy(), TypeError, "x is a ndarray: expected a torch.Tensor"),
        (torch.zeros(3, 32, 32), ValueError, "x has 3 dimensions, shape (3, 32, 32): expected 4"),
        (torch.zeros(1, 1, 3, 32, 32), ValueError, "x has 5 dimensions"),
        (torch.zeros(()), ValueError, "x has 0 dimensions, shape (): expected 4, (N, 3, "),
        (torch.zeros(1, 4, 32, 32), ValueError, "x has 4 channels, shape (1, 4, 32, 32): expect"),
        (torch.zeros(1, 32, 32, 3), ValueError, "x has 32 channels"),
        (torch.zeros(1, 0, 32, 32), ValueError, "x has 0 channels"),
        (torch.zeros(1, 3, 0, 32), ValueError, "x has height 0 and width 32: expected at least 13"),
        (torch.zeros(1, 3, 64, 0), ValueError, "x has height 64 and width 0"),
        (torch.zeros(1, 3, 12, 64), ValueError, "x has height 12 and width 64: expected at least"),
        (torch.zeros(0, 3, 64, 12), ValueError, "x has height 64 and width 12"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "x has dtype torch.uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.bool), TypeError, "x has dtype torch.bool"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), TypeError, "x has dtype torch.complex"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float16), TypeError, "expected torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16), TypeError, "expected torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), TypeError, "expected torch.float32"),
        (torch.zeros(1, 3, 32, 32).to_sparse(), TypeError, "x has layout torch.sparse_coo"),
        (torch.zeros(1, 3, 32, 32, device="meta"), RuntimeError, "x is on meta: expected cpu"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_input(x, error, message, training):
    model = small().train(training)
    with torch.set_grad_enabled(training), pytest.raises(error) as raised:
        model(x)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert model.base[0].norm.num_batches_tracked == 0


def test_autocast_allows_what_it_can_convert():
    model = small().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"x has dtype torch.float64: expected torch.float32"):
            model(torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_check_input_is_cheap(one_thread):
    x, weight = torch.randn(1, 3, 32, 32), torch.randn(32, 3, 3, 3)
    seconds = min(timeit.repeat(lambda: check_input(x, 3, 32, weight), number=200, repeat=20)) / 200
    assert seconds < 5e-6


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"first_channels": (8,)}, ValueError, "first_channels has 1 entries: expected 2"),
        ({"first_channels": 8}, TypeError, "first_channels is 8: expected a sequence"),
        ({"blocks": ()}, ValueError, "blocks is empty"),
        ({"blocks": (2, 0, 5)}, ValueError, "blocks[1] is 0: expected 1 or more"),
        ({"blocks": (2, 1.5, 5)}, TypeError, "blocks[1] is 1.5: expected an integer"),
        ({"blocks": "215"}, TypeError, "blocks is '215': expected a sequence"),
        ({"transitions": (16, 20)}, ValueError, "transitions has 2 entries: expected 3"),
        ({"transitions": (16, -2, 24)}, ValueError, "transitions[1] is -2: expected 1 or more"),
        ({"growth_rates": (4, 6, 10, 12)}, ValueError, "growth_rates has 4 entries: expected 3"),
        ({"downsample": (True, False)}, ValueError, "downsample has 2 entries: expected 3"),
        ({"downsample": (True, 2, False)}, ValueError, "downsample[1] is 2: expected True or"),
        ({"threshold": 4}, ValueError, "threshold is 4: expected 0 to 3"),
        ({"threshold": -1}, ValueError, "threshold is -1: expected 0 or more"),
        ({"threshold": None}, TypeError, "threshold is None: expected an integer"),
        ({"multiplier": 0}, ValueError, "multiplier is 0.0: expected a finite number above 0"),
        ({"multiplier": math.nan}, ValueError, "multiplier is nan"),
        ({"multiplier": "1.7"}, TypeError, "multiplier is '1.7': expected a number"),
        ({"num_classes": -1}, ValueError, "num_classes is -1: expected 0 or more"),
        ({"num_classes": 2.0}, TypeError, "num_classes is 2.0: expected an integer"),
        ({"in_chans": 0}, ValueError, "in_chans is 0: expected 1 or more"),
        ({"in_chans": True}, TypeError, "in_chans is True: expected an integer"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate is 1.0: expected 0 or more and less than 1"),
        ({"drop_rate": -0.1}, ValueError, "drop_rate is -0.1"),
        ({"global_pool": "max"}, ValueError, "global_pool is 'max': expected one of"),
        ({"global_pool": ""}, ValueError, "num_classes is 10: expected 0, as global_pool is ''"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as raised:
        small(**arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("threshold", [0, 1, 3])
def test_threshold_decides_the_kind_of_block(threshold):
    model = small(threshold=threshold)
    dense = sum(isinstance(m, DenseLayer) for m in model.base)
    harmonic = sum(isinstance(m, HarmonicBlock) for m in model.base)
    assert dense == sum((2, 1, 5)[:threshold])
    assert harmonic == 3 - threshold


@pytest.mark.parametrize(
    "build",
    [
        small,
        lambda: small(downsample=(True,) * 3),
        lambda: tf.DenseNet(blocks=(3, 2, 3), growth_rate=12, small_stem=True),
        lambda: tf.DenseNet(blocks=(1, 1, 1), growth_rate=8),
        lambda: tf.HarDNet(
            blocks=(1, 2),
            transitions=(8, 12),
            downsample=(True, True),
            growth_rates=(4, 6),
            depthwise=True,
        ),
        lambda: tf.HarDNet(
            blocks=(1, 2), transitions=(8, 12), downsample=(True, True), growth_rates=(4, 6)
        ),
    ],
    ids=["threshnet", "deeper", "small stem", "densenet", "hardnet ds", "hardnet"],
)
@pytest.mark.parametrize("mode", ["reference", "cpu", "training"])
def test_min_size_is_what_the_modules_need(build, mode, randomised):
    model = randomised(build()).train(mode == "training")
    least = model.min_size
    assert model.default_cfg["min_input_size"] == (3, least, least)
    expected = copy.deepcopy(model).double()
    for size in ((least, least), (least, least + 3), (least + 1, least)):
        x = torch.randn(16, 3, *size)
        with torch.set_grad_enabled(mode == "training"):
            backend = "cpu" if cpu.unavailable_reason() is None else "auto"
            with tf.use_backend("reference" if mode == "reference" else backend):
                y = model(x)
            with tf.use_backend("reference"):
                torch.testing.assert_close(y.double(), expected(x.double()), rtol=1e-3, atol=1e-4)
    for size in ((least - 1, 64), (64, least - 1)):
        with pytest.raises(ValueError, match=f"expected at least {least} x {least}"):
            model(torch.randn(3, 3, *size))
        if least > 1:
            # Nor do they run.
            with pytest.raises(RuntimeError, match=r"too small|larger than|can't be greater"):
                model._plain_features(torch.randn(3, 3, *size))


def test_min_size_grows_with_the_downsampling():
    model = small(
        blocks=(1,) * 5,
        transitions=(8,) * 5,
        growth_rates=(4,) * 5,
        downsample=(True,) * 5,
    ).eval()
    assert model.min_size == 125
    with torch.no_grad():
        assert model(torch.randn(1, 3, 125, 125)).shape == (1, 10)
        with pytest.raises(ValueError, match="expected at least 125 x 125"):
            model(torch.randn(1, 3, 124, 125))


def test_min_size_follows_the_modules():
    model = tf.DenseNet(first_channels=8, blocks=(2, 2, 2), growth_rate=4, num_classes=5).eval()
    assert model.min_size == 13
    model.features.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    assert model.min_size == 4
    with torch.no_grad():
        assert model(torch.randn(2, 3, 4, 4)).shape == (2, 5)
        with pytest.raises(ValueError, match="expected at least 4 x 4"):
            model(torch.randn(2, 3, 3, 4))
    model.features.conv0 = nn.Conv2d(3, 8, 3, padding="valid", dilation=2)
    model.features.pool0 = nn.MaxPool2d(2, ceil_mode=True)
    assert model.min_size == 11
    with torch.no_grad():
        assert model(torch.randn(2, 3, 11, 11)).shape == (2, 5)


# Empty batches


@pytest.mark.parametrize(
    "build", [small, lambda: tf.create_model("densenet_bc_100", num_classes=10)]
)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_an_empty_batch_gives_an_empty_result(build, backend):
    if backend == "cpu" and cpu.unavailable_reason() is not None:
        pytest.skip("needs the C++ extension")
    model = build().eval()
    x = torch.zeros(0, 3, 48, 40)
    with tf.use_backend(backend):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                assert model(x).shape == (0, 10)
                features = model.forward_features(x)
                assert features.shape[:2] == (0, model.num_features)
                assert model.forward_head(features, pre_logits=True).shape == (
                    0,
                    model.num_features,
                )
    assert features.shape == (0, *model.forward_features(torch.zeros(1, 3, 48, 40)).shape[1:])


def test_an_empty_batch_in_training_does_what_batch_norm_does():
    model, norm = small(), nn.BatchNorm2d(8)
    norm(torch.zeros(0, 8, 4, 4))
    model(torch.zeros(0, 3, 32, 32)).sum().backward()
    assert not model.base[0].conv.weight.grad.any()
    for name, buffer in model.base[0].norm.named_buffers():
        torch.testing.assert_close(buffer, norm.get_buffer(name))
    assert "no images" in tf.explain(model, torch.zeros(0, 3, 32, 32)).reason


# Compilers


def test_compile_in_one_graph(randomised):
    model = randomised(small()).train()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 48, 48)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))


def test_export_with_dynamic_batch_and_size(randomised):
    model = randomised(small()).eval()
    any_size = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 64, 64),),
        dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},),
    )
    x = torch.randn(5, 3, 96, 40)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
