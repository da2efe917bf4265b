"""Training fused: chains against ``gradcheck`` and plain PyTorch, whole networks, and when not."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import mmap
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_plan import small
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import threshnet_fast as tf
from threshnet_fast.autograd import Chain
from threshnet_fast.autograd import chain as chain_module
from threshnet_fast.autograd import map_pool as memory_module
from threshnet_fast.engines import cpu
from threshnet_fast.engines.cpu_training import CpuPass, Use
from threshnet_fast.engines.training import shapes_of
from threshnet_fast.graph import UnsupportedModule, split_stages
from threshnet_fast.nn import (
    ConvBNReLU,
    DenseBlock,
    DenseLayer,
    DenseTransition,
    DepthwiseConvBN,
    HarmonicBlock,
)

pytestmark = [
    pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())),
    # Small networks again and again: several threads would mostly wait for each other.
    pytest.mark.usefixtures("one_thread"),
]

ROUNDING = 2e-5
"""Largest error of a tensor relative to it, where no activation is decided by rounding: PyTorch's
own, in float32, is 1e-5 for the networks below."""


@pytest.fixture
def two_threads(one_thread) -> None:
    """Runs the test on two PyTorch threads, however many cores there are."""
    torch.set_num_threads(2)


@pytest.fixture
def model(randomised):
    return randomised(small()).train()


@pytest.fixture
def x():
    return torch.randn(3, 3, 40, 36)


def step(model, x, backend="cpu", seed=5):
    """Output, gradients of the parameters by name and buffers of one step, all detached.

    ``cpu`` raises where the step cannot run fused.
    """
    model.zero_grad()
    with tf.use_backend(backend):
        output = model(x)
    torch.manual_seed(seed)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), gradients, dict(model.named_buffers())


def error(actual, expected):
    """Norm of the difference relative to that of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-12)).item()


def assert_close(actual, expected, tolerance=ROUNDING):
    """Two results of :func:`step` are the same within rounding."""
    assert error(actual[0], expected[0]) < tolerance
    assert actual[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values() if g is not None)
    for name, gradient in expected[1].items():
        assert (actual[1][name] is None) == (gradient is None), name
        if gradient is not None:
            # Of a gradient that is nothing but cancellation, no digit is right in float32.
            difference = (actual[1][name].double() - gradient.double()).norm()
            assert difference <= tolerance * (gradient.norm() + 1e-2 * largest), name
    for name, buffer in expected[2].items():
        found = actual[2][name]
        if buffer.dtype == torch.int64:
            assert found.equal(buffer), name
        elif name.endswith("mean"):
            deviation = expected[2][name.replace("mean", "var")].double().sqrt()
            assert ((found - buffer).abs() <= tolerance * (deviation + buffer.abs())).all(), name
        else:
            torch.testing.assert_close(found.to(buffer), buffer, rtol=tolerance, atol=1e-30)


def assert_equal(actual, expected):
    """Two results of :func:`step` are the same to the last bit."""
    assert actual[0].equal(expected[0])
    for found, wanted in zip(actual[1:], expected[1:], strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name] is tensor is None or found[name].equal(tensor), name


def copied(result):
    """A result of :func:`step` that later steps do not write to."""
    output, gradients, buffers = result
    return (
        output.clone(),
        {name: None if g is None else g.clone() for name, g in gradients.items()},
        {name: buffer.clone() for name, buffer in buffers.items()},
    )


def plain_step(model, x, dtype=torch.float64):
    """The step of a copy in plain PyTorch."""
    return step(copy.deepcopy(model).to(dtype), x.to(dtype), "reference")


# Chains


def stem():
    return [ConvBNReLU(3, 4, stride=2), ConvBNReLU(4, 6), nn.MaxPool2d(3, 2, 1)]


def dense():
    return [ConvBNReLU(3, 5, 1), DenseLayer(5, 3, 2), DenseLayer(8, 3, 2), ConvBNReLU(11, 4, 1)]


def dense_block_alone():
    return [DenseBlock(3, 2, 4, 2)]


def plain_dense():
    return [ConvBNReLU(3, 4, 1), DenseBlock(4, 3, 3, bottleneck=0), nn.BatchNorm2d(13), nn.ReLU()]


def harmonic(activation="relu"):
    return [
        ConvBNReLU(3, 5, 1, activation=activation),
        HarmonicBlock(5, 4, 1.7, 5, activation),
        ConvBNReLU(HarmonicBlock(5, 4, 1.7, 5).out_channels, 4, 1, activation=activation),
    ]


def harmonic_with_relu6():
    return harmonic("relu6")


def harmonic_output():
    return [ConvBNReLU(3, 5), nn.MaxPool2d(2, 2), HarmonicBlock(5, 4, 1.7, 4)]


def pools():
    return [
        nn.Conv2d(3, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
    ]


def transition():
    return [ConvBNReLU(3, 4, 1), nn.MaxPool2d(2, 2), DenseLayer(4, 3, 2)]


def dense_transition():
    return [DenseBlock(3, 2, 4, 2), DenseTransition(11, 5)]


def average():
    return [ConvBNReLU(3, 4, 1), nn.AvgPool2d(2, 1), DenseLayer(4, 3, 2)]


def depthwise():
    return [DepthwiseConvBN(3, stride=2)]


def harmonic_depthwise():
    block = HarmonicBlock(5, 4, 1.7, 4, "relu6", depthwise=True)
    return [
        ConvBNReLU(3, 5, 1, activation="relu6"),
        DepthwiseConvBN(5, stride=2),
        block,
        ConvBNReLU(block.out_channels, 4, 1, activation="relu6"),
        DepthwiseConvBN(4),
    ]


def depthwise_after_activation():
    """The block reads values that are activated, its own are not."""
    block = HarmonicBlock(4, 4, 1.7, 3, depthwise=True)
    return [ConvBNReLU(3, 4, 1), block, DepthwiseConvBN(block.out_channels, stride=2)]


def norm_first():
    return [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5)]


def norm_first_for_many_readers():
    return [nn.BatchNorm2d(3), nn.ReLU(), HarmonicBlock(3, 4, 1.7, 4)]


STAGES = [
    stem,
    dense,
    dense_block_alone,
    plain_dense,
    harmonic,
    harmonic_with_relu6,
    harmonic_output,
    pools,
    transition,
    dense_transition,
    average,
    depthwise,
    harmonic_depthwise,
    depthwise_after_activation,
    norm_first,
    norm_first_for_many_readers,
]


def as_built(stages):
    pass


def frozen_norms(stages):
    """All norms take the running statistics."""
    for norm in norms(stages):
        norm.eval()


def half_frozen_norms(stages):
    for norm in norms(stages)[::2]:
        norm.eval()


def norms_without_affine(stages):
    for norm in norms(stages):
        norm.weight = norm.bias = None


def norms_without_statistics(stages):
    """Of the batch, even in evaluation mode."""
    for norm in norms(stages):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.eval()


def norms(stages):
    modules = [module for stage in stages for module in stage.modules()]
    return [module for module in modules if isinstance(module, nn.BatchNorm2d)]


def named(stages):
    """Names and modules."""
    return split_stages([(str(index), stage) for index, stage in enumerate(stages)])


def parameters(stages):
    return [parameter for stage in stages for parameter in stage.parameters()]


def randomise(stages):
    for norm in norms(stages):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        with torch.no_grad():
            norm.weight[::3] *= -1
    return stages


@pytest.mark.parametrize("checkpoint", [None, "features"])
@pytest.mark.parametrize(
    "change",
    [as_built, frozen_norms, half_frozen_norms, norms_without_affine, norms_without_statistics],
)
@pytest.mark.parametrize("make", STAGES)
def test_gradcheck(make, change, checkpoint):
    stages = randomise(make())
    change(stages)
    for stage in stages:
        stage.double()
    chain = Chain(named(stages), 3)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=chain.differentiable_input)
    inputs = [x, *parameters(named_modules(stages))]
    assert torch.autograd.gradcheck(
        lambda x, *_: chain(x, checkpoint, reference=True), inputs, fast_mode=True
    )


def named_modules(stages):
    return [part for _, part in named(stages)]


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("size", [(7, 9), (16, 12), (2, 3)])
@pytest.mark.parametrize(
    "change",
    [as_built, frozen_norms, half_frozen_norms, norms_without_affine, norms_without_statistics],
)
@pytest.mark.parametrize("make", STAGES)
def test_chain_is_what_its_modules_are(make, change, size, needs_input):
    """In C++, and in the reference, with the same running statistics."""
    stages = randomise(make())
    change(stages)
    plain = copy.deepcopy(stages)
    double = copy.deepcopy(stages)
    for stage in plain + double:
        stage.double()
    chains = Chain(named(stages), 3), Chain(named(double), 3)
    images = torch.randn(5, 3, *size)
    needs_input = needs_input and chains[0].differentiable_input

    x = [images.double().requires_grad_(needs_input)]
    y = x[0]
    for part in named_modules(plain):
        y = part(y)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    for chain, parts, reference in ((chains[0], stages, False), (chains[1], double, True)):
        dtype = torch.float64 if reference else torch.float32
        tolerance = 1e-10 if reference else ROUNDING
        x.append(images.detach().to(dtype, copy=True).requires_grad_(needs_input))
        actual = chain(x[-1], None, reference)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        actual.backward(gradient.to(dtype))
        assert error(actual, y) < tolerance
        if needs_input:
            assert error(x[-1].grad, x[0].grad) < tolerance
        for found, wanted in zip(
            parameters(named_modules(parts)), parameters(named_modules(plain)), strict=True
        ):
            assert (found.grad is None) == (wanted.grad is None)
            difference = (found.grad.double() - wanted.grad).norm()
            assert difference < tolerance * (wanted.grad.norm() + 1e-1 * gradient.norm())
        for found, wanted in zip(norms(parts), norms(plain), strict=True):
            assert found.num_batches_tracked == wanted.num_batches_tracked
            if wanted.running_mean is not None:
                torch.testing.assert_close(
                    found.running_mean.double(), wanted.running_mean, rtol=1e-5, atol=1e-6
                )
                torch.testing.assert_close(
                    found.running_var.double(), wanted.running_var, rtol=1e-5, atol=1e-6
                )


def test_one_value_for_each_channel_is_refused_before_anything_has_changed():
    stages = [ConvBNReLU(3, 4), nn.MaxPool2d(2, 2), ConvBNReLU(4, 5, 1)]
    chain = Chain(named(stages), 3)
    before = [norm.running_mean.clone() for norm in norms(stages)]
    for reference in (True, False):
        with pytest.raises(ValueError, match="xpected more than 1 value per channel"):
            chain(torch.randn(1, 3, 2, 3), None, reference)
    for norm, mean in zip(norms(stages), before, strict=True):
        assert norm.running_mean.equal(mean)
        assert norm.num_batches_tracked == 0
    chain(torch.randn(1, 3, 4, 2))
    norms(stages)[1].eval()
    chain(torch.randn(1, 3, 2, 3))
    norms(stages)[1].running_mean = norms(stages)[1].running_var = None
    with pytest.raises(ValueError, match="xpected more than 1 value per channel"):
        chain(torch.randn(1, 3, 2, 3))


@pytest.mark.parametrize(
    "stages",
    [
        [nn.Conv2d(3, 4, 3, padding=1)],
        [nn.Conv2d(3, 4, 3, padding="same", bias=False)],
        [nn.Conv2d(3, 4, 3, padding=1, bias=False, padding_mode="reflect")],
        [nn.Conv2d(3, 6, 3, padding=1, bias=False, groups=3)],
        [nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False)],
        [nn.Conv2d(3, 4, (3, 1), bias=False)],
        [nn.Conv2d(3, 4, 9, bias=False)],
        [nn.Conv2d(4, 4, 1, bias=False)],
        [ConvBNReLU(3, 4), ConvBNReLU(4, 4, stride=2)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.LeakyReLU()],
        [nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d(2, 2, ceil_mode=True)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d(2, 2, return_indices=True)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d(2, 2, dilation=2)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d((2, 1))],
        [nn.Conv2d(3, 4, 1, bias=False), nn.AvgPool2d(3, padding=1)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.AvgPool2d(2, divisor_override=3)],
        [nn.Conv2d(3, 4, 1, bias=False), nn.AvgPool2d(2, ceil_mode=True)],
        [ConvBNReLU(3, 4), HarmonicBlock(4, 4, 1.7, 2, "relu6")],
        [DepthwiseConvBN(4)],
        [nn.Conv2d(3, 4, 1, bias=False), HarmonicBlock(4, 4, 1.7, 2)],
        [nn.Dropout()],
        [],
    ],
    ids=lambda stages: "-".join(str(stage).partition("(")[0] for stage in stages),
)
def test_what_no_chain_can_hold(stages):
    with pytest.raises(UnsupportedModule):
        Chain([(str(index), stage) for index, stage in enumerate(stages)], 3)


def test_a_module_of_its_own_kind_is_in_no_chain():
    class Doubled(ConvBNReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UnsupportedModule, match="not exactly a ConvBNReLU"):
        Chain([("conv", Doubled(3, 4))], 3)
    layer = DenseLayer(3, 4)
    layer.forward = lambda x: x
    with pytest.raises(UnsupportedModule, match="not exactly a DenseLayer"):
        Chain([("layer", layer)], 3)


# Whole networks


def total_error(gradients, expected):
    """Norm of the error of all gradients together, relative to that of them."""
    errors = [(gradients[name].double() - g).square().sum() for name, g in expected.items()]
    return (sum(errors) / sum(g.square().sum() for g in expected.values())).sqrt().item()


@pytest.mark.parametrize(
    ("shape", "checkpoint"), [((8, 3, 32, 32), None), ((2, 3, 72, 56), "features")]
)
def test_threshnet79_is_as_exact_as_plain_pytorch(shape, checkpoint):
    """Against float64, as both round. Activations are away from zero here, as rounding would
    otherwise decide some of them and the one or the other would be off by thousandths."""
    model = tf.ThreshNet79(num_classes=10).train()
    with torch.no_grad():
        for norm in norms([model]):
            norm.weight.uniform_(0.3, 0.6)
            norm.bias.fill_(6)
    model.checkpoint = checkpoint
    x = torch.randn(shape)
    expected = plain_step(model, x)
    plain = plain_step(model, x, torch.float32)
    actual = step(model, x)

    assert error(actual[0], expected[0]) < 4 * error(plain[0], expected[0])
    whole = sum(g.square().sum() for g in expected[1].values()).sqrt()
    for name, gradient in expected[1].items():
        limit = 4 * (plain[1][name] - gradient).norm() + 1e-6 * whole
        assert (actual[1][name] - gradient).norm() < limit, name
    assert total_error(actual[1], expected[1]) < 4 * total_error(plain[1], expected[1])
    for name, buffer in expected[2].items():
        if buffer.dtype == torch.int64:
            assert actual[2][name].equal(buffer)
        else:
            limit = 4 * (plain[2][name] - buffer).norm() + ROUNDING * buffer.norm()
            assert (actual[2][name] - buffer).norm() < limit, name


def test_threshnet79_with_its_activations():
    model = tf.ThreshNet79(num_classes=10).train()
    x = torch.randn(6, 3, 48, 32)
    expected = plain_step(model, x)
    plain = plain_step(model, x, torch.float32)
    actual = step(model, x)
    assert error(actual[0], expected[0]) < 4 * error(plain[0], expected[0]) + ROUNDING
    # One activation that rounding decides makes a difference of 2e-3.
    assert total_error(actual[1], expected[1]) < 4 * total_error(plain[1], expected[1]) + 5e-3


NETWORKS = {
    "densenet": lambda: tf.models.DenseNet(
        first_channels=12, blocks=(2, 3), growth_rate=6, num_classes=5
    ),
    "densenet of 32x32": lambda: tf.models.DenseNet(
        first_channels=8, blocks=(2, 2), growth_rate=6, small_stem=True, num_classes=5
    ),
    "hardnet": lambda: tf.models.HarDNet(
        first_channels=(8, 12),
        blocks=(4, 5),
        transitions=(20, 24),
        downsample=(True, False),
        growth_rates=(6, 8),
        num_classes=5,
    ),
    "densenet with many layers": lambda: tf.DenseNet(
        first_channels=12, blocks=(8, 8), growth_rate=6, small_stem=True, num_classes=5
    ),
    "densenet without bottlenecks": lambda: tf.DenseNet(
        first_channels=12,
        blocks=(3, 2, 3),
        growth_rate=5,
        bottleneck=0,
        compression=1.0,
        small_stem=True,
        num_classes=5,
    ),
    "hardnet with dropout": lambda: tf.models.HarDNet(
        first_channels=(8, 12),
        blocks=(4, 5),
        transitions=(20, 24),
        downsample=(True, False),
        growth_rates=(6, 8),
        block_drop_rate=0.2,
        drop_rate=0.1,
        num_classes=5,
    ),
    "hardnet ds": lambda: tf.models.HarDNet(
        first_channels=(8, 12),
        blocks=(4, 5),
        transitions=(20, 24),
        downsample=(True, True),
        growth_rates=(6, 8),
        depthwise=True,
        num_classes=5,
    ),
    "dense blocks only": lambda: small(threshold=4),
    "harmonic blocks only": lambda: small(threshold=0),
    "without classifier": lambda: small(num_classes=0),
    "without pooling": lambda: small(num_classes=0, global_pool=""),
    "four channels": lambda: small(in_chans=4),
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("checkpoint", [None, "features"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network(randomised, name, checkpoint, calls):
    model = randomised(NETWORKS[name]()).train()
    model.checkpoint = checkpoint
    x = torch.randn(4, model.in_chans, 40, 36)
    # Dropout draws its numbers in the order of memory.
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = step(plain, x.contiguous(memory_format=torch.channels_last), "reference")
    assert not calls
    torch.manual_seed(1)
    actual = step(model, x)
    assert calls
    assert_close(actual, expected, 5 * ROUNDING)


def test_step_after_step(model, calls):
    """Losses of a short training, fused and plain."""
    losses = []
    images, labels = torch.randn(8, 3, 40, 40), torch.arange(8) % 7
    for network, backend in ((copy.deepcopy(model), "cpu"), (model, "reference")):
        optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
        losses.append([])
        for _ in range(6):
            optimizer.zero_grad()
            with tf.use_backend(backend):
                loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert len(calls) == 6


# Modes and settings of the modules


def in_evaluation_mode(model):
    model.eval()


def some_norms_frozen(model):
    for norm in norms([model])[::3]:
        norm.eval()


def cumulative_average(model):
    for norm in norms([model]):
        norm.momentum = None


def several_momenta(model):
    for index, norm in enumerate(norms([model])):
        norm.momentum = (0.0, 0.3, 1.0, None)[index % 4]


def other_eps(model):
    for index, norm in enumerate(norms([model])):
        norm.eps = (1e-3, 0.5)[index % 2]


def untracked(model):
    for norm in norms([model]):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.track_running_stats = False


def no_longer_tracked(model):
    """With statistics that stay as they are."""
    for norm in norms([model]):
        norm.track_running_stats = False


def no_longer_tracked_in_evaluation(model):
    no_longer_tracked(model)
    model.eval()


def without_affine(model):
    for norm in norms([model])[1::2]:
        norm.weight = norm.bias = None


def zero_scales(model):
    with torch.no_grad():
        for norm in norms([model]):
            norm.weight[1::3] = 0


def frozen_stem(model):
    """A frozen prefix: the first chain's parameters and, of the rest, some."""
    for parameter in list(model.parameters())[:20]:
        parameter.requires_grad_(False)


def frozen_weights(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("conv" not in name)


def frozen_norm_parameters(model):
    for norm in norms([model]):
        norm.weight.requires_grad_(False)
    norms([model])[3].bias.requires_grad_(False)


def only_the_first_weight(model):
    model.requires_grad_(False)
    model.base[0].conv.weight.requires_grad_()


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def strange_strides(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            module.weight = nn.Parameter(weight.permute(3, 1, 0, 2).clone().permute(2, 1, 3, 0))


CHANGES = [
    in_evaluation_mode,
    some_norms_frozen,
    cumulative_average,
    several_momenta,
    other_eps,
    untracked,
    no_longer_tracked,
    no_longer_tracked_in_evaluation,
    without_affine,
    zero_scales,
    frozen_stem,
    frozen_weights,
    frozen_norm_parameters,
    only_the_first_weight,
    channels_last,
    strange_strides,
]


@pytest.mark.parametrize("when", ["before the first step", "between steps"])
@pytest.mark.parametrize("change", CHANGES)
def test_modes_and_settings(model, x, change, when):
    if when == "between steps":
        step(model, x)
    change(model)
    for _ in range(2):
        expected = plain_step(model, x)
        assert_close(step(model, x), expected, 5 * ROUNDING)


@pytest.mark.parametrize("size", [(1, 3, 64, 64), (1, 3, 33, 47), (30, 3, 32, 32), (2, 3, 32, 96)])
def test_shapes(model, size):
    x = torch.randn(size)
    expected = plain_step(model, x)
    assert_close(step(model, x), expected, 5 * ROUNDING)


def test_frozen_parts_before_a_norm(randomised):
    """What a plain part gives, without a history, is normalised with parameters that learn."""
    model = tf.models.DenseNet(first_channels=8, blocks=(2, 2), growth_rate=6, num_classes=5)
    model = randomised(model).train()
    layer = model.features.denseblock1.denselayer2
    layer.forward = lambda x: DenseLayer.forward(layer, x)
    for module in (model.features.conv0, model.features.norm0, model.features.denseblock1):
        module.requires_grad_(False)
    x = torch.randn(4, 3, 40, 36)
    double = copy.deepcopy(model).double()
    del double.features.denseblock1.denselayer2.__dict__["forward"]
    expected = step(double, x.double(), "reference")
    assert_close(step(model, x), expected, 5 * ROUNDING)


def test_a_value_for_each_channel_alone_is_refused_as_pytorch_does():
    model = small(downsample=(True, True, True, False)).train()
    x = torch.randn(1, 3, 32, 32)
    messages = []
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="1 value per channel") as caught:
            step(model, x, backend)
        messages.append(str(caught.value))
    assert step(model.eval(), x)[0].isfinite().all()
    assert messages[0] == messages[1]


def test_inputs_of_any_strides(model):
    x = torch.randn(3, 3, 40, 36)
    expected = copied(step(copy.deepcopy(model), x))
    wide = torch.randn(3, 40, 72, 5)
    wide[:, :, ::2, 1:4] = x.permute(0, 2, 3, 1)
    for strided in (
        x.contiguous(memory_format=torch.channels_last),
        wide[:, :, ::2, 1:4].permute(0, 3, 1, 2),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_equal(step(copy.deepcopy(model), strided), expected)
    flat = torch.randn(3, 1, 40, 36).expand(3, 3, 40, 36)
    assert_close(step(copy.deepcopy(model), flat), plain_step(model, flat))


@pytest.mark.parametrize("reduction", ["sum", "mean", "one channel", "one image"])
def test_losses_of_features(model, x, reduction):
    def gradients(model, x):
        features = model.forward_features(x)
        loss = {
            "sum": lambda: features.sum(),
            "mean": lambda: features.mean((2, 3)).square().sum(),
            "one channel": lambda: features[:, 3].square().sum(),
            "one image": lambda: features[1].square().sum(),
        }[reduction]()
        return torch.autograd.grad(loss, list(model.parameters())[:-2])

    double = copy.deepcopy(model).double()
    with tf.use_backend("reference"):
        expected = gradients(double, x.double())
    with tf.use_backend("cpu"):
        actual = gradients(model, x)
    largest = max(gradient.norm() for gradient in expected)
    for one, another in zip(actual, expected, strict=True):
        assert (one - another).norm() < 5 * ROUNDING * (another.norm() + 0.01 * largest)


@pytest.mark.parametrize("threads", [2, 3])
def test_number_of_threads(model, x, threads):
    expected = plain_step(model, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = copied(step(copy.deepcopy(model), x))
        for _ in range(3):
            assert_equal(step(copy.deepcopy(model), x), actual)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, expected, 5 * ROUNDING)


def test_number_of_threads_changes_before_the_backward_pass(model, x):
    expected = plain_step(model, x)[1]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = model(x)
        torch.set_num_threads(3)
        torch.manual_seed(5)
        output.backward(torch.randn(output.shape, dtype=torch.float64).float())
    finally:
        torch.set_num_threads(before)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert total_error(gradients, expected) < ROUNDING


def test_many_shapes_keep_a_bounded_number_of_workspaces(model, calls):
    for size in range(32, 52):
        step(model, torch.randn(2, 3, size, 32))
    assert len(calls[0].programs) <= 8
    x = torch.randn(2, 3, 32, 32)
    expected = plain_step(model, x)
    assert_close(step(model, x), expected, 5 * ROUNDING)


# Memory


def saved_bytes(model, x):
    """Bytes of all tensors that a step keeps for its backward pass, each memory counted once."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(sizes.values())


def test_checkpoint_of_features_changes_no_bit(model, x):
    expected = copied(step(copy.deepcopy(model), x))
    model.set_grad_checkpointing()
    assert model.checkpoint == "features"
    assert_equal(step(model, x), expected)
    model.set_grad_checkpointing(False)
    assert model.checkpoint is None


def test_checkpoint_of_what_does_not_exist_is_refused(model, x):
    model.checkpoint = "everything"
    with pytest.raises(ValueError, match="everything"):
        model(x)


def test_memory_that_is_kept(x):
    x = torch.randn(2, 3, 64, 64)
    model = small(blocks=(6, 6, 2, 2)).train()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept = saved_bytes(model, x) - weights
    model.set_grad_checkpointing()
    with_checkpoint = saved_bytes(model, x) - weights
    with tf.use_backend("reference"):
        plain = saved_bytes(model, x) - weights
    assert with_checkpoint < 0.6 * kept
    assert kept < 0.4 * plain


def pools_of(model):
    return [part.pool for part in model._fused._training._parts._parts if isinstance(part, Chain)]


@pytest.fixture
def all_pooled(monkeypatch):
    """Small maps are used again too."""
    monkeypatch.setattr(chain_module, "_POOLED_BYTES", 0)


@pytest.mark.parametrize("mode", ["checkpoint", "no_grad", "inference_mode"])
def test_bottlenecks_are_let_go_of(model, x, mode, calls, monkeypatch):
    """The place of each is taken by the next, where no backward pass will want them."""
    uses = []
    original = CpuPass.__init__

    def spy(self, programs, shape, rows, parameters, use, memory):
        uses.append((shape, use))
        original(self, programs, shape, rows, parameters, use, memory)

    monkeypatch.setattr(CpuPass, "__init__", spy)
    if mode == "checkpoint":
        model.set_grad_checkpointing()
        model(x)
    else:
        with getattr(torch, mode)():
            model(x)
    (chain,), ((shape, use),) = calls, uses
    assert use == Use(mode == "checkpoint", mode == "checkpoint", False, False)
    places = map_places(chain, shape, use)
    bottlenecks, alive = [], []
    for node in chain.plan.nodes:
        place = places[node.buffer]
        bottlenecks = [other for other in bottlenecks if not overlap(other, place)]
        if node.name.endswith("conv1"):
            bottlenecks.append(place)
            alive.append(len(bottlenecks))
    assert len(alive) == 5
    assert max(alive) == 1


def overlap(one, other):
    """Whether two places, ``(memory, first, last)``, have floats in common."""
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


def map_places(chain, shape, use):
    """Where the map of each buffer lies in a pass forward."""
    plan = chain.plan
    program = chain.programs.get(shape, use).program
    places = torch.ops.threshnet_fast_cpu.training_layout(program)[4 + len(plan.norms) :]
    return [
        (memory, offset, offset + of.pixels * buffer.channels)
        for buffer, of, (memory, offset) in zip(
            plan.buffers, shapes_of(plan, shape), places.view(-1, 6)[:, :2].tolist(), strict=True
        )
    ]


class CountedMemory(mmap.mmap):
    """Memory of the system, of which the bytes in use and their most are counted."""

    now = most = 0

    def __new__(cls, number, length, **arguments):
        self = super().__new__(cls, number, length, **arguments)
        CountedMemory.now += length
        CountedMemory.most = max(CountedMemory.most, CountedMemory.now)
        weakref.finalize(self, cls.let_go, length)
        return self

    @staticmethod
    def let_go(length):
        CountedMemory.now -= length


def test_checkpoints_need_less_memory_from_the_first_step_on(x, monkeypatch, randomised):
    """Maps lie in memory of their own, which the system has back after the step."""
    monkeypatch.setattr(chain_module, "_POOLED_BYTES", 0)
    monkeypatch.setattr(chain_module, "_THRIFTY_BYTES", 0)
    monkeypatch.setattr(CountedMemory, "now", 0)
    monkeypatch.setattr(CountedMemory, "most", 0)
    monkeypatch.setattr(memory_module.mmap, "mmap", CountedMemory)
    model = randomised(NETWORKS["densenet with many layers"]()).train()
    thrifty = copy.deepcopy(model)
    thrifty.set_grad_checkpointing()
    expected = copied(step(model, x))
    assert CountedMemory.most == 0
    # Nothing of it was in use twice at once.
    without = sum(pool.nbytes for pool in pools_of(model))
    for _ in range(2):
        found = copied(step(copy.deepcopy(thrifty), x))
        assert_equal(found, expected)
        assert 0 < CountedMemory.most < 0.6 * without
        assert CountedMemory.now == 0


@pytest.mark.parametrize("checkpoint", [None, "features"])
@pytest.mark.parametrize("kept_by", [None, "graph", "hooks"])
def test_maps_are_let_go_of_on_the_way_back(model, x, kept_by, checkpoint, monkeypatch):
    """Gradients take their places, unless someone may want them again."""
    model.checkpoint = checkpoint
    kept, changed = [], []
    backward = CpuPass.backward

    def spy(self, held, given, *arguments):
        (memory,) = given
        kept.append(weakref.ref(memory))
        before = memory.clone()
        result = backward(self, held, given, *arguments)
        # As bits: some of it may be NaN.
        changed.append(not memory.view(torch.int32).equal(before.view(torch.int32)))
        return result

    monkeypatch.setattr(CpuPass, "backward", spy)
    hooks = contextlib.nullcontext()
    if kept_by == "hooks":
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda kept: kept)
    with hooks:
        output = model(x).square().sum()
    output.backward(retain_graph=kept_by == "graph")
    assert len(kept) == 1
    if kept_by is None:
        assert changed == [True]
        assert kept[0]() is None
    else:
        assert changed == [False]


@pytest.mark.usefixtures("all_pooled")
def test_maps_are_used_again(model, x):
    """In the next step all of them, which gives the same bits as new ones."""
    expected = [copied(step(copy.deepcopy(model), images)) for images in (x, x + 1)]
    assert_equal(step(model, x), expected[0])
    (pool,) = pools_of(model)
    kept = pool.nbytes
    assert kept > 0
    for maps in pool._free.values():
        for map in maps:
            map.fill_(torch.nan)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    again = copied(step(model, x + 1))
    assert pool.nbytes == kept
    fresh = copy.deepcopy(model)
    for name, buffer in fresh.named_buffers():
        buffer.copy_(statistics[name])
    assert_equal(again, step(fresh, x + 1))


def test_small_maps_are_left_to_the_allocator(model, x):
    step(model, x)
    (pool,) = pools_of(model)
    assert pool.nbytes == 0


@pytest.mark.usefixtures("all_pooled")
def test_memory_of_another_step_is_let_go_of(model, x):
    step(model, x)
    (pool,) = pools_of(model)
    kept = pool.nbytes
    step(model, x[:1])
    assert 0 < pool.nbytes < kept
    model.set_grad_checkpointing()
    step(model, x)
    assert pool.nbytes == 0
    model.set_grad_checkpointing(False)
    step(model, x)
    assert pool.nbytes == kept
    model.eval()
    with torch.no_grad():
        model(x)
    assert pool.nbytes == 0


@pytest.mark.usefixtures("all_pooled")
def test_what_may_be_wanted_again_is_not_used_again(model, x):
    output = model(x).square().sum()
    first = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
    (pool,) = pools_of(model)
    other = model(x + 1).square().sum()
    for maps in pool._free.values():
        for map in maps:
            map.fill_(torch.nan)
    other.backward()
    second = torch.autograd.grad(output, list(model.parameters()))
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda kept: kept):
        step(copied_model := copy.deepcopy(model), x)
    assert pools_of(copied_model)[0].nbytes == 0


def test_a_model_that_has_trained_is_freed_at_once(x):
    model = small().train()
    model(x).sum().backward()
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


# Autograd's own features


def test_a_retained_graph_gives_the_same_again(model, x):
    for checkpoint in (None, "features"):
        model.checkpoint = checkpoint
        output = model(x)
        first, second, third = (
            torch.autograd.grad(output.sum(), list(model.parameters()), retain_graph=retain)
            for retain in (True, True, False)
        )
        for one, two, three in zip(first, second, third, strict=True):
            assert one.equal(two)
            assert one.equal(three)
        with pytest.raises(RuntimeError, match="second time"):
            output.sum().backward()


def test_gradients_of_two_batches_add_up(model, x):
    other = torch.randn(2, 3, 32, 48)
    gradients = [step(copy.deepcopy(model), images)[1] for images in (x, other)]
    for images in (x, other):
        output = model(images)
        torch.manual_seed(5)
        output.backward(torch.randn(output.shape, dtype=torch.float64).float())
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(gradients[0][name] + gradients[1][name])


@pytest.mark.parametrize("change", [as_built, half_frozen_norms, norms_without_affine])
@pytest.mark.parametrize("make", STAGES)
def test_second_derivative_of_a_chain(make, change):
    """Numerically, with the same first derivative as otherwise and no other running statistics."""
    stages = randomise(make())
    change(stages)
    for stage in stages:
        stage.double()
    chain = Chain(named(stages), 3)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=chain.differentiable_input)
    inputs = [x, *parameters(named_modules(stages))]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    y = chain(x, reference=True)
    before = copy.deepcopy([dict(norm.named_buffers()) for norm in norms(stages)])
    weight = torch.randn_like(y)
    first = torch.autograd.grad(y, wanted, weight, create_graph=True)
    for norm, buffers in zip(norms(stages), before, strict=True):
        for name, buffer in norm.named_buffers():
            assert buffer.equal(buffers[name])
    again = torch.autograd.grad(chain(x, reference=True), wanted, weight)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert torch.autograd.gradgradcheck(
        lambda x, *_: chain(x, reference=True), inputs, fast_mode=True
    )


def penalised(model, x, backend, penalty):
    """Gradients of a loss that depends on gradients; and the model's buffers after it."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_(penalty == "images")
    with tf.use_backend(backend):
        y = model(x)
        loss = y.square().mean()
        of = [x] if penalty == "images" else list(model.parameters())
        found = torch.autograd.grad(loss, of, create_graph=True)
        (loss + sum(g.square().sum() for g in found)).backward()
    return [p.grad for p in model.parameters()], list(model.buffers())


@pytest.mark.parametrize("name", ["densenet", "densenet without bottlenecks", "hardnet ds"])
@pytest.mark.parametrize("penalty", ["images", "parameters"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty(name, penalty, training, randomised, calls):
    model = randomised(NETWORKS[name]()).train(training)
    x = torch.randn(4, 3, 40, 36)
    expected = penalised(model.double(), x.double(), "reference", penalty)
    with torch.no_grad():
        model.float()
    plain = penalised(model, x, "reference", penalty)
    calls.clear()
    found = penalised(model, x, "auto", penalty)
    # No chain gives the gradient of images that a strided convolution reads.
    assert bool(calls) == (penalty == "parameters" or name == "densenet without bottlenecks")
    for actual, other, wanted in zip(found[0], plain[0], expected[0], strict=True):
        scale = wanted.norm() + 1e-12
        of_pytorch = (other.double() - wanted).norm() / scale
        assert (actual.double() - wanted).norm() / scale < 4 * of_pytorch + 20 * ROUNDING
    for actual, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_hooks_of_parameters_run_once_in_a_second_derivative(model, x):
    seen = []
    weight = model.base[3].conv1.weight
    weight.register_hook(lambda gradient: seen.append(gradient))
    (gradient,) = torch.autograd.grad(model(x).square().sum(), [weight], create_graph=True)
    assert len(seen) == 1
    gradient.square().sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize(
    "name", ["base.3.conv1.weight", "base.3.norm1.weight", "base.3.norm2.bias"]
)
def test_a_parameter_that_changes_before_the_backward_pass_is_noticed(model, x, name):
    output = model(x)
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_input_that_changes_before_the_backward_pass_is_noticed_or_copied(model, x):
    expected = copied(step(copy.deepcopy(model), x))
    for images in (x.clone(), x.clone(memory_format=torch.channels_last)):
        network = copy.deepcopy(model)
        output = network(images)
        images.zero_()
        torch.manual_seed(5)
        gradient = torch.randn(output.shape, dtype=torch.float64).float()
        try:
            output.backward(gradient)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            for name, parameter in network.named_parameters():
                assert parameter.grad.equal(expected[1][name])


def test_running_statistics_may_change_before_the_backward_pass(model, x):
    model.eval()
    expected = copied(step(copy.deepcopy(model), x))
    output = model(x)
    for norm in norms([model]):
        norm.running_mean.add_(1)
    torch.manual_seed(5)
    output.backward(torch.randn(output.shape, dtype=torch.float64).float())
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(expected[1][name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_by_torch(model, x, reentrant):
    expected = copied(step(copy.deepcopy(model), x))
    plain = copy.deepcopy(model)
    for network, backend in ((model, "cpu"), (plain, "reference")):
        # Without an input that needs one there is no gradient from the reentrant kind.
        images = x.clone()
        scale = torch.ones(1, requires_grad=True)

        def run(scale, network=network, images=images, backend=backend):
            with tf.use_backend(backend):
                return network(images) * scale

        output = recompute(run, scale, use_reentrant=reentrant)
        torch.manual_seed(5)
        output.backward(torch.randn(output.shape, dtype=torch.float64).float())
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(expected[1][name])
    for found, wanted in zip(norms([model]), norms([plain]), strict=True):
        assert found.num_batches_tracked == wanted.num_batches_tracked == 2
        torch.testing.assert_close(found.running_mean, wanted.running_mean, rtol=1e-4, atol=1e-5)


def test_tensors_that_are_kept_elsewhere(model, x):
    expected = copied(step(copy.deepcopy(model), x))
    with torch.autograd.graph.save_on_cpu():
        output = model(x)
    torch.manual_seed(5)
    output.backward(torch.randn(output.shape, dtype=torch.float64).float())
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(expected[1][name])


def test_hooks_of_parameters_run(model, x, calls):
    seen = []
    weight = model.base[3].conv1.weight
    weight.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    expected = step(copy.deepcopy(model), x)[1]["base.3.conv1.weight"]
    step(model, x)
    assert len(calls) == 2
    assert len(seen) == 2
    assert seen[1].equal(2 * expected) or seen[1].equal(expected)
    assert weight.grad.equal(2 * seen[0])


def test_anomaly_mode(model, x):
    expected = copied(step(copy.deepcopy(model), x))
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        anomalies = torch.autograd.detect_anomaly(check_nan=True)
    with anomalies:
        assert_equal(step(model, x), expected)


def test_without_gradients_in_training_mode(model, x, calls):
    """Statistics are those of the batch, running ones go on, and there is no history."""
    plain = copy.deepcopy(model).double()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = model(x)
            with tf.use_backend("reference"):
                expected = plain(x.double())
        assert not output.requires_grad
        assert error(output, expected) < ROUNDING
    assert len(calls) == 2
    for found, wanted in zip(norms([model]), norms([plain]), strict=True):
        assert found.num_batches_tracked == wanted.num_batches_tracked == 2
        torch.testing.assert_close(
            found.running_var.double(), wanted.running_var, rtol=1e-5, atol=0
        )


def test_training_and_evaluation_by_turns(model, x):
    """The engine of inference packs what training has changed."""
    for _ in range(2):
        model.train()
        with tf.use_backend("cpu"):
            model(x).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
        model.eval()
        with torch.no_grad(), tf.use_backend("cpu"):
            actual = model(x)
        with torch.no_grad(), tf.use_backend("reference"):
            expected = model(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        with tf.use_backend("cpu"):
            torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-4)


# When plain PyTorch runs


def test_input_that_wants_a_gradient(model, x, calls):
    x.requires_grad_()
    model(x).sum().backward()
    assert not calls
    expected = x.grad.clone()
    x.grad = None
    with tf.use_backend("reference"):
        model(x).sum().backward()
    assert error(x.grad, expected) < ROUNDING
    with tf.use_backend("cpu"), pytest.raises(RuntimeError, match="gradient of the images"):
        model(x)


@pytest.mark.usefixtures("two_threads")
def test_input_that_wants_a_gradient_without_a_stride(randomised, calls):
    model = randomised(NETWORKS["densenet of 32x32"]()).train()
    x = torch.randn(3, 3, 32, 32)
    images = [x.clone().requires_grad_(), x.double().requires_grad_()]
    expected = step(copy.deepcopy(model).double(), images[1], "reference")
    assert_close(step(model, images[0]), expected, 5 * ROUNDING)
    assert calls
    assert error(images[0].grad, images[1].grad) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(model, x, calls, dtype):
    output, gradients, _ = step(model.to(dtype), x.to(dtype), "auto")
    assert not calls
    assert output.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in gradients.values())
    with tf.use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' cannot run"):
        model(x.to(dtype))


def test_autocast_and_scaled_losses(model, x, calls):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = step(copy.deepcopy(model), x)
    fused = copy.deepcopy(model)
    output = fused(x)
    torch.manual_seed(5)
    gradient = torch.randn(output.shape, dtype=torch.float64).float()
    scaler.scale((output * gradient).sum()).backward()
    scaler.unscale_(torch.optim.SGD(fused.parameters(), 0.1))
    assert len(calls) == 2
    for name, parameter in fused.named_parameters():
        assert error(parameter.grad, expected[1][name]) < ROUNDING

    results = []
    for backend in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(copy.deepcopy(model), x, backend))
    assert len(calls) == 2
    assert_equal(*results)


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_hook(hook),
        lambda module, hook: module.register_forward_pre_hook(hook),
        lambda module, hook: module.register_full_backward_hook(hook),
        lambda module, hook: module.register_full_backward_pre_hook(hook),
        lambda module, hook: nn.modules.module.register_module_forward_hook(hook),
    ],
    ids=["forward", "forward pre", "backward", "backward pre", "global"],
)
def test_hooks_of_modules_run(model, x, calls, register):
    step(model, x)
    seen = []
    part = model.base[3].conv1
    handle = register(part, lambda module, *_: seen.append(module) if module is part else None)
    expected = plain_step(model, x) if "global" not in str(handle) else None
    seen.clear()
    step(model, x, "auto")
    assert len(calls) == 1
    assert seen == [part]
    handle.remove()
    step(model, x)
    assert len(calls) == 2
    assert expected is not None


def test_a_hook_of_the_model_itself_runs(model, x, calls):
    seen = []
    model.register_forward_hook(lambda *_: seen.append("forward"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    step(model, x)
    assert seen == ["forward", "backward"]
    assert calls


def test_transforms(model, x, calls):
    model.eval()
    values = dict(model.named_parameters())

    def loss(values):
        return torch.func.functional_call(model, values, x).square().sum()

    gradients = torch.func.grad(loss)(values)
    assert not calls
    with tf.use_backend("reference"):
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for gradient, wanted in zip(gradients.values(), expected, strict=True):
        assert error(gradient, wanted) < ROUNDING


def test_functional_calls_use_their_own_tensors(model, x, calls):
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with torch.no_grad():
        values["base.3.conv1.weight"] *= 3
    torch.func.functional_call(model, values, x).square().sum().backward()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base[3].conv1.weight.mul_(3)
    with tf.use_backend("reference"):
        other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert error(values[name].grad, parameter.grad) < 5 * ROUNDING
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiles(calls):
    model = small(blocks=(1, 1, 2, 1)).train()
    x = torch.randn(2, 3, 32, 32)
    expected = step(copy.deepcopy(model), x, "reference")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).backward(torch.ones(2, 7))
    assert not calls
    output, gradients, _ = step(model, x, "reference")
    assert output.isfinite().all()
    assert gradients.keys() == expected[1].keys()


# Changes of the model


def parametrised(model):
    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    nn.utils.parametrize.register_parametrization(model.base[1].conv, "weight", Negative())


def weight_norm(model):
    conv = model.base[3].conv1
    nn.utils.parametrizations.weight_norm(conv)
    with torch.no_grad():
        direction = conv.parametrizations.weight.original1
        direction += torch.randn_like(direction) * direction.std()


def replaced_module(model):
    model.base[1].conv = nn.Conv2d(8, 12, 3, 1, 1, bias=False)


def replaced_by_another_kind(model):
    model.base[1].norm = nn.GroupNorm(3, 12)


def replaced_entry(model):
    model.base[3] = copy.deepcopy(model.base[3])
    nn.init.normal_(model.base[3].conv2.weight)


def loaded(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def own_forward(model):
    layer = model.base[1]
    layer.forward = lambda x: 2 * ConvBNReLU.forward(layer, x)


def other_padding(model):
    conv = model.base[1].conv
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_activation(model):
    model.base[0].activation = "relu6"
    with torch.no_grad():
        model.base[0].norm.weight.mul_(10)


def data_assigned(model):
    conv = model.base[4].conv1
    conv.weight.data = torch.randn_like(conv.weight)


def new_head(model):
    model.reset_classifier(4)


@pytest.mark.parametrize(
    "change",
    [
        parametrised,
        weight_norm,
        replaced_module,
        replaced_by_another_kind,
        replaced_entry,
        loaded,
        own_forward,
        other_padding,
        other_activation,
        data_assigned,
        new_head,
    ],
)
def test_a_changed_model_trains_as_it_is_now(model, x, change):
    before = step(model, x)[0]
    plain = copy.deepcopy(model)
    torch.manual_seed(2)
    change(model)
    torch.manual_seed(2)
    change(plain)
    expected = step(plain, x, "reference")
    actual = step(model, x, "auto")
    assert before.shape != actual[0].shape or error(actual[0], before) > 1e-3
    assert_close(actual, expected, 5 * ROUNDING)


def test_copies_and_pickles_after_training(model, x):
    step(model, x)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    expected = copied(step(model, x))
    for other in copies:
        assert_equal(step(other, x), expected)
        assert other.base[0].conv.weight is not model.base[0].conv.weight


# Python threads


def test_threads_that_train_copies(model):
    batches = [torch.randn(3, 3, 32 + 4 * index, 40) for index in range(6)]
    expected = [copied(step(copy.deepcopy(model), x)) for x in batches]
    copies = [copy.deepcopy(model) for _ in batches]

    def train(index):
        # Not step, whose random numbers are those of all threads.
        network = copies[index]
        for _ in range(3):
            network.load_state_dict(model.state_dict())
            network.zero_grad()
            output = network(batches[index])
            generator = torch.Generator().manual_seed(5)
            shape = output.shape
            output.backward(torch.randn(shape, dtype=torch.float64, generator=generator).float())
        return (
            output.detach(),
            {name: parameter.grad for name, parameter in network.named_parameters()},
            dict(network.named_buffers()),
        )

    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(train, range(6)), expected, strict=True):
            assert_equal(actual, wanted)


def test_threads_that_share_a_model(model):
    """As data-parallel training in one process does."""
    model.eval()
    batches = [torch.randn(2, 3, 32 + 4 * (index % 10), 36) for index in range(20)]
    parameters = list(model.parameters())

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), parameters)

    expected = [gradients(x) for x in batches]
    fresh = copy.deepcopy(model)
    parameters = list(fresh.parameters())
    model = fresh
    barrier = threading.Barrier(2)

    def work(order):
        barrier.wait()
        return {index: gradients(batches[index]) for index in order}

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, [range(20), range(19, -1, -1)]))
    for result in results:
        for index, found in result.items():
            for one, another in zip(found, expected[index], strict=True):
                assert one.equal(another)


def test_the_backward_pass_in_another_thread(model, x):
    expected = copied(step(copy.deepcopy(model), x))
    output = model(x)
    torch.manual_seed(5)
    gradient = torch.randn(output.shape, dtype=torch.float64).float()
    thread = threading.Thread(target=output.backward, args=(gradient,))
    thread.start()
    thread.join()
    for name, parameter in model.named_parameters():
        assert parameter.grad.equal(expected[1][name])
