"""Settings of modules that change after a first call: followed, or left to plain PyTorch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_plan import small
from torch import nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.autograd.chain import Chain
from threshnet_fast.engines import cpu
from threshnet_fast.engines.training import Shape, shapes_of
from threshnet_fast.graph import split_stages
from threshnet_fast.graph.settings import SETTINGS, TENSORS, override, settings_of
from threshnet_fast.plan import UnsupportedModule, lower
from threshnet_fast.plan.serialize_raw import serialize_raw

# Networks of a few channels: several threads would mostly wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

needs_extension = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def densenet(**arguments: Any) -> tf.DenseNet:
    """Stem with pooling, dense blocks with transitions."""
    return tf.DenseNet(
        first_channels=10, blocks=(2, 3), growth_rate=6, **{"num_classes": 5, **arguments}
    ).eval()


def hardnet(depthwise: bool = False, **arguments: Any) -> nn.Module:
    """Harmonic blocks, with a dropout among the stages."""
    return tf.HarDNet(
        first_channels=(8, 12),
        blocks=(4, 3),
        transitions=(20, 24),
        downsample=(True, False),
        growth_rates=(6, 8),
        depthwise=depthwise,
        block_drop_rate=0.1,
        **{"num_classes": 5, **arguments},
    ).eval()


def depthwise(**arguments: Any) -> nn.Module:
    return hardnet(depthwise=True, **arguments)


def convolutions(model: nn.Module, kernel: int = 3) -> list[nn.Conv2d]:
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    return [conv for conv in found if conv.kernel_size == (kernel, kernel)]


def last(model: nn.Module, kernel: int = 3) -> nn.Conv2d:
    return convolutions(model, kernel)[-1]


def circular(model: nn.Module) -> None:
    for conv in convolutions(model):
        conv.padding_mode = "circular"


def dilate(model: nn.Module) -> None:
    last(model).dilation = last(model).padding = (2, 2)


def unpad_points(model: nn.Module) -> None:
    last(model, 1).padding = (1, 1)
    model.features.denseblock2.denselayer3.conv2.padding = (0, 0)


def stem_stride(model: nn.Module) -> None:
    convolutions(model, 7)[0].stride = (1, 1)


def stem_stride_is_a_number(model: nn.Module) -> None:
    convolutions(model, 7)[0].stride = 1


def flat_stem_stride(model: nn.Module) -> None:
    model.base[0].conv.stride = 1


def pool_stride(model: nn.Module) -> None:
    model.features.pool0.stride = 1


def pool_window(model: nn.Module) -> None:
    model.features.pool0.kernel_size, model.features.pool0.padding = 5, 2


def pool_pair(model: nn.Module) -> None:
    model.features.pool0.kernel_size = (3, 1)
    model.features.pool0.padding = (1, 0)


def pool_ceil(model: nn.Module) -> None:
    model.features.pool0.ceil_mode = True


def pool_dilation(model: nn.Module) -> None:
    model.features.pool0.dilation = 2


def average_window(model: nn.Module) -> None:
    model.features.transition1.pool.kernel_size = model.features.transition1.pool.stride = 1


def average_padding(model: nn.Module) -> None:
    pool = model.features.transition1.pool
    pool.padding, pool.count_include_pad = 1, False


def average_ceil(model: nn.Module) -> None:
    model.features.transition1.pool.ceil_mode = True


def divisor(model: nn.Module) -> None:
    model.features.transition1.pool.divisor_override = 3


def eps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 3.0


def convolution_bias(model: nn.Module) -> None:
    last(model).bias = nn.Parameter(torch.randn(last(model).out_channels))


def no_scale(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.weight = norm.bias = None


def no_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None


def statistics_not_tracked(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean.zero_()


def activation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, tf.nn.ConvBNReLU):
            module.activation = "relu6" if module.activation == "relu" else "relu"


def one_activation(model: nn.Module) -> None:
    model.base[1].activation = "relu6" if model.base[1].activation == "relu" else "relu"
    with torch.no_grad():
        model.base[1].norm.weight.mul_(5)


def activation_by_class(model: nn.Module) -> None:
    # As by deepcopy of a class that somebody edited.
    class Doubled(tf.nn.ConvBNReLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.base[1].__class__ = Doubled


def relu_by_class(model: nn.Module) -> None:
    model.features.relu0.__class__ = nn.SiLU
    with torch.no_grad():
        model.features.norm0.weight.mul_(20)


class ScaledConv(nn.Conv2d):
    """Runs by the forward of its base, which calls what is overridden."""

    def _conv_forward(self, *arguments: Any) -> torch.Tensor:
        return 2 * super()._conv_forward(*arguments)


def convolution_class(model: nn.Module) -> None:
    last(model).__class__ = ScaledConv


def convolution_method(model: nn.Module) -> None:
    last(model)._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias, padding=1)


class HalvedWeight(nn.Conv2d):
    @property
    def weight(self) -> torch.Tensor:
        return self._parameters["weight"] * 0.5


def weight_by_property(model: nn.Module) -> None:
    last(model).__class__ = HalvedWeight


def weight_as_attribute(model: nn.Module) -> None:
    conv = last(model)
    weight = conv.weight.detach() * 3
    del conv.weight
    conv.weight = weight


def own_forward(model: nn.Module) -> None:
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    conv.forward = lambda x: F.conv2d(x, torch.ones(conv.out_channels, 3, 5, 5), padding=2)


def forward_for_another_attribute(model: nn.Module) -> None:
    # As many attributes as before.
    del last(model).transposed
    own_forward(model)
    last(model).transposed = False


def links(model: nn.Module) -> None:
    block = next(m for m in model.modules() if isinstance(m, tf.nn.HarmonicBlock))
    # In place, and of as many channels.
    block.links[3][:] = [0] if block.channels[0] == block.channels[2] else block.links[3][::-1]
    block.links[4][:] = block.links[4][::-1]


def out_layers(model: nn.Module) -> None:
    block = next(m for m in model.modules() if isinstance(m, tf.nn.HarmonicBlock))
    block.out_layers.reverse()


def pool_of_head_by_maximum(model: nn.Module) -> None:
    model.base[-1][0] = nn.AdaptiveMaxPool2d(1)


def flatten_keeps_a_dimension(model: nn.Module) -> None:
    model.reset_classifier(0)
    model.base[-1][1].start_dim = 2


def no_pool_before_flatten(model: nn.Module) -> None:
    model.reset_classifier(0)
    model.base[-1][0] = nn.Identity()


def pool_of_head_to_2x2(model: nn.Module) -> None:
    model.reset_classifier(0)
    model.base[-1][0].output_size = 2


def global_pool(model: nn.Module) -> None:
    model.reset_classifier(0)
    model.global_pool = ""


def classifier_without_pooling(model: nn.Module) -> None:
    model.reset_classifier(0, "")
    model.classifier = nn.Conv2d(model.num_features, 3, 1)


def linear_class(model: nn.Module) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.get_classifier().__class__ = Scaled


def another_drop_rate(model: nn.Module) -> None:
    model.drop_rate = 0.9
    with torch.no_grad():
        model.get_classifier().weight.mul_(2)


CHANGES: list[tuple[Callable[..., nn.Module], Callable[[nn.Module], None]]] = [
    *((densenet, change) for change in (
        stem_stride,
        stem_stride_is_a_number,
        unpad_points,
        pool_stride,
        pool_window,
        pool_pair,
        pool_ceil,
        pool_dilation,
        average_window,
        average_padding,
        average_ceil,
        divisor,
        relu_by_class,
        global_pool,
        classifier_without_pooling,
    )),
    *((network, change) for network in (small, hardnet) for change in (
        flat_stem_stride,
        one_activation,
        activation_by_class,
        links,
        out_layers,
        pool_of_head_by_maximum,
        flatten_keeps_a_dimension,
        no_pool_before_flatten,
        pool_of_head_to_2x2,
        global_pool,
    )),
    (depthwise, activation),
    *((network, change) for network in (small, depthwise) for change in (
        circular,
        dilate,
        eps,
        convolution_bias,
        no_scale,
        no_statistics,
        statistics_not_tracked,
        convolution_class,
        convolution_method,
        weight_by_property,
        weight_as_attribute,
        own_forward,
        forward_for_another_attribute,
        linear_class,
        another_drop_rate,
    ) if not (network is depthwise and change in (circular, dilate, convolution_bias))),
]  # fmt: skip
NAMES = [f"{network.__name__}-{change.__name__}" for network, change in CHANGES]


def reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), tf.use_backend("reference"):
        return model(x)


@needs_extension
@pytest.mark.parametrize(("network", "change"), CHANGES, ids=NAMES)
def test_inference_follows(network, change, randomised) -> None:
    model = randomised(network())
    x = torch.randn(2, 3, 45, 51)
    with torch.no_grad():
        with tf.use_backend("cpu"):
            before = model(x)
        change(model)
        expected = reference(model, x)
        assert before.shape != expected.shape or not torch.allclose(before, expected, rtol=1e-3)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(fresh(x), expected, rtol=1e-4, atol=1e-4)


# What needs no change of the modules that a training runs through chains.
HEADS = {
    pool_of_head_by_maximum,
    flatten_keeps_a_dimension,
    no_pool_before_flatten,
    pool_of_head_to_2x2,
    global_pool,
    classifier_without_pooling,
    linear_class,
    another_drop_rate,
}


@needs_extension
@pytest.mark.parametrize(
    ("network", "change"),
    [pair for pair in CHANGES if pair[1] not in HEADS],
    ids=[name for name, pair in zip(NAMES, CHANGES, strict=True) if pair[1] not in HEADS],
)
def test_training_follows(network, change, randomised) -> None:
    model = randomised(network()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(4, 3, 45, 51)
    before = model(x)
    change(model)
    # PyTorch computes in float32 too; its gradients are those of the same function.
    other = copy.deepcopy(model)
    actual = model(x)
    with tf.use_backend("reference"):
        expected = other(x)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    if change is not eps and change is not statistics_not_tracked:
        assert before.shape == expected.shape
    for (name, parameter), reference_parameter in zip(
        model.named_parameters(), other.parameters(), strict=True
    ):
        if reference_parameter.grad is None:
            assert parameter.grad is None, name
            continue
        scale = float(reference_parameter.grad.abs().max()) + 1e-3
        difference = float((parameter.grad - reference_parameter.grad).abs().max())
        assert difference < 0.02 * scale, name
    for buffer, other_buffer in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, other_buffer, rtol=1e-3, atol=1e-3)


@needs_extension
def test_a_method_replaced_in_a_class_is_followed(randomised, monkeypatch) -> None:
    model, x = randomised(small()), torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        before = model(x)
        original = tf.nn.ConvBNReLU.forward
        monkeypatch.setattr(tf.nn.ConvBNReLU, "forward", lambda self, x: 1 + original(self, x))
        expected = reference(model, x)
        assert not torch.allclose(before, expected, rtol=1e-3)
        assert model(x).equal(expected)
        assert randomised(small())(x).isfinite().all()
        assert "forward of its own" in tf.explain(model, x).reason
        monkeypatch.undo()
        torch.testing.assert_close(model(x), before)


@needs_extension
def test_replaced_dictionaries_of_hooks_are_noticed(randomised) -> None:
    model, x = randomised(small()), torch.randn(1, 3, 40, 40)
    seen: list[int] = []
    with torch.no_grad():
        model(x)
        model.base[3]._forward_hooks = OrderedDict()
        model.base[3].register_forward_hook(lambda *_: seen.append(1))
        model(x)
    assert seen == [1]


@needs_extension
def test_a_shallow_copy_does_not_run_the_plan_of_the_original(randomised) -> None:
    model, x = randomised(small()), torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        before = model(x)
        other = copy.copy(model)
        other.__dict__["_modules"] = dict(model._modules)
        other.base = randomised(small(blocks=(1, 1, 1, 1))).base
        torch.testing.assert_close(other(x), reference(other, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x), before)


@needs_extension
def test_subclasses_that_compute_the_same_run_fused(randomised) -> None:
    class Named(nn.Conv2d):
        """Has a name, and is nothing else."""

        name = "conv"

        def extra_repr(self) -> str:
            return self.name

    model, x = randomised(small()), torch.randn(1, 3, 40, 40)
    model.base[1].conv.__class__ = Named
    with torch.no_grad(), tf.use_backend("cpu"):
        torch.testing.assert_close(model(x), reference(model, x), rtol=1e-4, atol=1e-4)
    assert override(model.base[1].conv, nn.Conv2d) is None


@needs_extension
def test_weights_on_another_device_are_left_to_pytorch(randomised) -> None:
    model, x = randomised(small()), torch.randn(1, 3, 40, 40)
    model.base[1].to("meta")
    with torch.no_grad():
        assert "weights on cpu and meta" in tf.explain(model, x).reason


class Recorder:
    """Records which attributes of modules are read, and from where they come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: set[tuple[type[nn.Module], str, str]] = set()
        original = object.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            value = original(module, name)
            own = original(module, "__dict__")
            if name in own:
                self.reads.add((type(module), name, "instance"))
            elif not callable(value) and not hasattr(nn.Module, name):
                self.reads.add((type(module), name, "class"))
            return value

        def read_child_or_tensor(module: nn.Module, name: str) -> Any:
            own = original(module, "__dict__")
            for kind in ("_parameters", "_buffers", "_modules"):
                if name in own[kind]:
                    self.reads.add((type(module), name, kind))
                    return own[kind][name]
            raise AttributeError(name)

        self._patch = monkeypatch
        monkeypatch.setattr(nn.Module, "__getattribute__", read)
        monkeypatch.setattr(nn.Module, "__getattr__", read_child_or_tensor)

    def stop(self) -> None:
        self._patch.undo()


# Parts of nn.Module that hold what is compared by itself: parameters, buffers, children, hooks. A
# network finds min_size in settings of its modules, which are compared.
_PARTS = {"_parameters", "_buffers", "_modules", "min_size"}

NETWORKS: list[Callable[[], nn.Module]] = [
    small,
    lambda: small(num_classes=0),
    lambda: small(num_classes=0, global_pool=""),
    densenet,
    lambda: densenet(small_stem=True, num_classes=0, global_pool=""),
    hardnet,
    depthwise,
]


def lower_it(model: nn.Module) -> None:
    for head in (True, False):
        for fold in (True, False):
            lower(model, (1, 3, 64, 64), head=head, fold=fold)


def trace_it(model: nn.Module) -> None:
    stages = split_stages(model._stages())
    for begin in range(len(stages)):
        for end in range(begin + 1, len(stages) + 1):
            try:
                chain = Chain(stages[begin:end], None)
            except UnsupportedModule:
                continue
            _ = chain.differentiable_input
            shapes_of(chain.plan, Shape(1, 64, 64))
            serialize_raw(chain.plan)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("use", [lower_it, trace_it])
def test_every_setting_that_is_read_is_compared(network, use, monkeypatch) -> None:
    model = network()
    recorder = Recorder(monkeypatch)
    use(model)
    recorder.stop()
    assert len(recorder.reads) > 10
    for kind, name, where in recorder.reads:
        if where in ("_parameters", "_buffers"):
            assert name in TENSORS, f"{kind.__name__}.{name}"
        elif where != "_modules" and name not in _PARTS:
            assert name in settings_of(kind), f"{kind.__name__}.{name} is read, and not compared"


def test_the_test_notices_what_is_not_compared(monkeypatch) -> None:
    model = small()
    monkeypatch.setitem(SETTINGS, nn.Conv2d, ("stride",))
    recorder = Recorder(monkeypatch)
    lower(model, (1, 3, 64, 64))
    monkeypatch.undo()
    assert (nn.Conv2d, "padding_mode", "instance") in recorder.reads
    assert "padding_mode" in settings_of(nn.Conv2d)


def test_a_convolution_whose_weight_was_cut_is_left_to_pytorch(randomised) -> None:
    """As pruning does that leaves the module's numbers as they were."""
    model, x = randomised(tf.DenseNetBC100()), torch.randn(1, 3, 32, 32)
    layer = model.eval().features.denseblock1.denselayer1
    layer.conv1.weight = nn.Parameter(layer.conv1.weight[:40].detach())
    layer.conv2.weight = nn.Parameter(layer.conv2.weight[:, :40].detach())
    for name in ("weight", "bias"):
        setattr(layer.norm2, name, nn.Parameter(getattr(layer.norm2, name)[:40].detach()))
    layer.norm2.running_mean = layer.norm2.running_mean[:40].clone()
    layer.norm2.running_var = layer.norm2.running_var[:40].clone()
    with pytest.raises(UnsupportedModule, match=r"conv1 has a weight of shape \(40, 24, 1, 1\)"):
        lower(model, x.shape)
    with torch.no_grad():
        assert model(x).equal(reference(model, x))
