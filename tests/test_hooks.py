"""Hooks on any module, and methods that a subclass or an instance has instead of the library's."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.autograd import Chain
from threshnet_fast.engines import cpu

BUILD = {
    "densenet": lambda: tf.DenseNet(
        first_channels=8, blocks=(2, 2), growth_rate=4, num_classes=5, drop_rate=0.2
    ),
    "threshnet": lambda: tf.ThreshNet(
        first_channels=(8, 12),
        blocks=(2, 3),
        transitions=(16, 20),
        downsample=(True, False),
        threshold=1,
        growth_rates=(4, 6),
        num_classes=5,
        drop_rate=0.2,
    ),
    "hardnet ds": lambda: tf.HarDNet(
        first_channels=(8, 12),
        blocks=(2, 3),
        transitions=(16, 20),
        downsample=(True, False),
        growth_rates=(4, 6),
        depthwise=True,
        num_classes=5,
        drop_rate=0.2,
    ),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    # Small networks again and again: several threads would mostly wait for each other.
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=BUILD, ids=list(BUILD))
def model(request, randomised):
    return randomised(BUILD[request.param]()).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 48)


def called(model):
    """Names and modules that a forward pass calls: all but those that only hold others."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    }


def out_of_place(model, x):
    """What every module returned and the gradient of that, with nothing done in place.

    In float64; gradients are of the sum of the squares of the logits.
    """
    model = copy.deepcopy(model).double()
    maps = {}
    original = F.relu, F.relu6
    F.relu = lambda x, inplace=False: original[0](x)
    F.relu6 = lambda x, inplace=False: original[1](x)
    try:
        for name, module in called(model).items():
            module.register_forward_hook(
                lambda _, __, output, name=name: maps.__setitem__(name, output)
            )
        logits = model(x.double())
    finally:
        F.relu, F.relu6 = original
    gradients = torch.autograd.grad(logits.pow(2).sum(), list(maps.values()))
    return maps, dict(zip(maps, gradients, strict=True))


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_hooks_on_every_module_see_its_own_output_and_gradient(model, x):
    expected, expected_gradients = out_of_place(model, x)
    assert len(expected) == len(called(model))
    maps, gradients = {}, {}
    for name, module in called(model).items():
        module.register_forward_hook(lambda _, __, y, name=name: maps.__setitem__(name, y))
        module.register_full_backward_hook(
            lambda _, __, g, name=name: gradients.__setitem__(name, g[0])
        )
    model(x).pow(2).sum().backward()
    assert set(maps) == set(gradients) == set(expected)
    for name in expected:
        assert_close(maps[name], expected[name])
        assert_close(gradients[name], expected_gradients[name])


def test_a_hook_on_any_one_module_sees_its_own_output_and_gradient(model):
    x = torch.randn(2, 3, 24, 24)
    expected, expected_gradients = out_of_place(model, x)
    for name, module in called(model).items():
        seen = []
        forward = module.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
        backward = module.register_full_backward_hook(lambda _, __, g, seen=seen: seen.append(g[0]))
        model(x).pow(2).sum().backward()
        forward.remove()
        backward.remove()
        assert len(seen) == 2, name
        assert_close(seen[0], expected[name])
        assert_close(seen[1], expected_gradients[name])


@pytest.mark.parametrize("grad", [False, True])
def test_an_output_that_a_hook_keeps_is_not_overwritten(model, x, grad):
    expected, _ = out_of_place(model, x)
    norms = {n: m for n, m in called(model).items() if isinstance(m, nn.BatchNorm2d)}
    maps = {}
    for name, module in norms.items():
        module.register_forward_hook(lambda _, __, y, name=name: maps.__setitem__(name, y))
    with torch.set_grad_enabled(grad):
        model(x)
    assert set(maps) == set(norms)
    for name in norms:
        assert_close(maps[name], expected[name])
        assert (maps[name] < 0).any()


@pytest.mark.parametrize("grad", [False, True])
def test_global_hooks_see_every_module(model, x, grad):
    expected, _ = out_of_place(model, x)
    names = {module: name for name, module in called(model).items()}
    maps = {}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: maps.__setitem__(names[module], y) if module in names else None
    )
    try:
        with torch.set_grad_enabled(grad):
            model(x)
    finally:
        handle.remove()
    assert set(maps) == set(expected)
    for name in expected:
        assert_close(maps[name], expected[name])


REGISTER = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward, kwargs": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "always": lambda module, hook: module.register_forward_hook(hook, always_call=True),
    "pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "pre, kwargs": lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_containers_run(randomised, x, register, training):
    model = randomised(BUILD["densenet"]()).train(training)
    seen = []
    for name in ("features", "features.denseblock1", "features.denseblock1.denselayer2"):
        register(model.get_submodule(name), lambda *_, name=name: seen.append(name))
    model(x).sum().backward()
    assert sorted(seen) == [
        "features",
        "features.denseblock1",
        "features.denseblock1.denselayer2",
    ]
    assert "hooks" in tf.explain(model, x).reason


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_the_head_run(x, training):
    model = BUILD["threshnet"]().train(training)
    seen = []
    model.base[-1].register_forward_hook(lambda _, __, y: seen.append(y))
    assert model(x) is seen[0]


def test_a_hook_may_replace_what_features_returns(randomised, x):
    model = randomised(BUILD["densenet"]()).eval()
    model.features.register_forward_hook(lambda _, __, y: y * 0)
    with torch.no_grad():
        assert_close(model(x), model.classifier.bias.double().expand(2, -1))


def test_gradcam(randomised, x):
    """The weights of a class activation map, by hand from the float64 features."""
    model = randomised(BUILD["densenet"]()).eval()
    twin = copy.deepcopy(model).double()
    features = twin.features(x.double()).detach().requires_grad_()
    F.linear(features.mean((2, 3)), twin.classifier.weight, twin.classifier.bias)[:, 1].sum()
    expected = (features * twin.classifier.weight[1][:, None, None]).sum(1) / features[0, 0].numel()
    kept = {}
    model.features.register_forward_hook(lambda _, __, y: kept.update(map=y))
    model.features.register_full_backward_hook(lambda _, __, g: kept.update(gradient=g[0]))
    model(x)[:, 1].sum().backward()
    weights = kept["gradient"].mean((2, 3), keepdim=True)
    assert_close((weights * kept["map"]).sum(1), expected)


def test_replaced_norms_are_not_overwritten(randomised, x):
    """An identity returns its input, which others read too."""
    model = randomised(BUILD["densenet"]()).eval()
    model.features.denseblock1.denselayer1.norm1 = nn.Identity()
    expected, _ = out_of_place(model, x)
    with torch.no_grad():
        assert_close(model(x), expected["classifier"])


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the C++ extension")
def test_without_hooks_everything_runs_fused(model, x):
    for training in (False, True):
        assert tf.explain(model.train(training), x).backend == "cpu"
    with torch.no_grad():
        assert tf.explain(model.eval(), x).backend == "cpu"
    part = called(model)["features" if hasattr(model, "features") else "base.3"]
    handle = part.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert tf.explain(model, x).backend == "reference"
        handle.remove()
        assert tf.explain(model, x).backend == "cpu"


# Overridden methods


class Doubled(tf.DenseNet):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


class Normalised(tf.DenseNet):
    def forward_head(self, x, pre_logits=False):
        x = F.normalize(x.mean((2, 3)))
        return x if pre_logits else self.classifier(x)


class SecondClassifier(tf.DenseNet):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.other = nn.Linear(self.num_features, 3)

    def get_classifier(self):
        return self.other


class WithoutTheLastBlock(tf.DenseNet):
    def _plain_features(self, x):
        for name, module in self.features.named_children():
            if name == "denseblock2":
                x = F.pad(x, (0, 0, 0, 0, 0, module.out_channels - x.shape[1]))
            else:
                x = module(x)
        return x


def doubled(model, features):
    return model.classifier((2 * features).mean((2, 3)))


def normalised(model, features):
    return model.classifier(F.normalize(features.mean((2, 3))))


def by_another(model, features):
    return model.other(features.mean((2, 3)))


ARGUMENTS = {"first_channels": 8, "blocks": (2, 2), "growth_rate": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Doubled, doubled), (Normalised, normalised), (SecondClassifier, by_another)],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_overridden_method_is_honoured(randomised, x, kind, expected, training):
    model = randomised(kind(**ARGUMENTS)).train(training)
    with tf.use_backend("reference"):
        wanted = expected(model, copy.deepcopy(model).features(x))
    for enabled in (False, True):
        twin = copy.deepcopy(model)
        with torch.set_grad_enabled(enabled):
            assert_close(twin(x), wanted.double())
    assert "of its own" in tf.explain(model, x).reason
    with pytest.raises(tf.plan.UnsupportedModule, match="of its own"):
        tf.plan.lower(model, x.shape)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("kind", [Doubled, Normalised, SecondClassifier])
def test_the_librarys_own_features_train_fused_below(randomised, x, kind, monkeypatch):
    model = randomised(kind(**ARGUMENTS)).train()
    calls = []
    original = Chain.__call__
    monkeypatch.setattr(Chain, "__call__", lambda *a, **k: calls.append(1) or original(*a, **k))
    model(x).sum().backward()
    assert calls


def test_overridden_features_are_not_fused(randomised, x):
    model = randomised(WithoutTheLastBlock(**ARGUMENTS)).eval()
    expected = model._plain_features(x).double()
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert_close(model.forward_features(x), expected)
            assert_close(model(x), model.forward_head(expected.float()).double())
    with pytest.raises(tf.plan.UnsupportedModule, match="_plain_features of its own"):
        tf.plan.lower(model, x.shape, head=False)


@pytest.mark.parametrize("where", ["instance", "class", "wrapped"])
def test_a_method_that_is_replaced_later_is_honoured(model, x, where, monkeypatch):
    with torch.no_grad():
        before = model(x)
        original = type(model).forward_features

        def replacement(self, x):
            return original(self, x) * 0

        if where == "instance":
            monkeypatch.setattr(model, "forward_features", functools.partial(replacement, model))
        elif where == "class":
            monkeypatch.setattr(type(model), "forward_features", replacement)
        else:
            monkeypatch.setattr(
                type(model), "forward_features", functools.wraps(original)(replacement)
            )
        bias = model.get_classifier().bias
        assert_close(model(x), bias.double().expand(2, -1))
        monkeypatch.undo()
        assert_close(model(x), before.double())


def test_a_container_with_a_forward_of_its_own_is_called(randomised, x):
    class Halved(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / 2

    model = randomised(BUILD["densenet"]()).eval()
    with torch.no_grad():
        features = model.forward_features(x).double()
        model.features = Halved(OrderedDict(model.features.named_children()))
        assert_close(model.forward_features(x), features / 2)
    assert_close(model.forward_features(x), features / 2)
    assert "features" in tf.explain(model, x).reason
