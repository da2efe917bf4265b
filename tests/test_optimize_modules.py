"""Modules of others: optimized by what they compute, and only if it stays the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from architecture import torchvision_models
from torch import Tensor, nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.runtime import division

# Small networks again and again: several threads would mostly wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")


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

    def __init__(
        self,
        growth: int = 6,
        blocks=(2, 3, 1),
        channels: int = 10,
        classes: int = 5,
        compressed: int | None = None,
    ):
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
                outputs = compressed or channels // 2
                transition.add_module("conv", nn.Conv2d(channels, outputs, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                layers[f"transition{number}"] = transition
                channels = outputs
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


def activate_twice(module: OtherDenseNet) -> None:
    module.features.relu0 = nn.Softplus()


def pool_by_maximum(module: OtherDenseNet) -> None:
    module.features.transition2.pool = nn.MaxPool2d(2)


def change_eps(module: OtherDenseNet) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1


@pytest.mark.parametrize("change", [activate_twice, pool_by_maximum, change_eps])
def test_names_say_nothing(other, change):
    """What has the parameters of a DenseNet and computes something else is fused as what it is."""
    change(other)
    x = torch.randn(1, 3, 33, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = tf.optimize(other, x)
    noise = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(frozen(noise), other.eval()(noise), rtol=1e-4, atol=1e-4)
    assert bool(frozen.foreign) == (change is activate_twice)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y + 0.1, "it computes something else"),
        (lambda y: y[:1], "it returns something else"),
        (lambda y: (y,), "it returns something else"),
    ],
)
def test_what_does_not_come_out_the_same_runs_as_it_is(other, monkeypatch, wrong, message):
    run = division.Division.__call__
    monkeypatch.setattr(division.Division, "__call__", lambda self, *args: wrong(run(self, *args)))
    x = torch.zeros(2, 3, 33, 32)
    with pytest.warns(UserWarning, match=message) as warned:
        frozen = tf.optimize(other, x)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert frozen.backend == "reference"
    assert "\n" not in frozen.reason
    noise = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert frozen(noise).equal(other.eval()(noise))


def test_what_has_nothing_to_fuse_runs_as_it_is(other):
    images, vectors = torch.randn(1, 3, 32, 32), torch.randn(5, 2)
    for module, x in (
        (nn.Sequential(), images),
        (nn.Conv3d(3, 4, 3), torch.randn(1, 3, 8, 8, 8)),
        (nn.Linear(2, 3), vectors),
        (nn.LSTM(2, 3), vectors),
        (nn.Embedding(4, 2), torch.tensor([1, 2])),
    ):
        module.train()
        with pytest.warns(UserWarning, match="the module is left to plain PyTorch") as warned:
            frozen = tf.optimize(module, x)
        assert len(warned) == 1
        assert module.training
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), module.eval()(x), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"module is a function: expected a torch\.nn\.Module"):
        tf.optimize(lambda x: x, images)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tf.optimize(nn.Linear(3, 1), vectors)


def test_dtype_of_what_runs_as_it_is():
    module, x = nn.Conv2d(3, 4, 3, padding_mode="circular"), torch.randn(1, 3, 32, 32)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        frozen = tf.optimize(module, x, dtype=torch.bfloat16)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    assert module.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        tf.optimize(module, x, dtype=torch.int8)


class Wrapper(nn.Module):
    """Another module's only part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def no_change(module: OtherDenseNet) -> nn.Module:
    return module


def dropout_and_linear(module: OtherDenseNet) -> nn.Module:
    module.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(module.classifier.in_features, 4))
    return module


def no_bias(module: OtherDenseNet) -> nn.Module:
    module.classifier = nn.Linear(module.classifier.in_features, 4, bias=False)
    return module


def sigmoid(module: OtherDenseNet) -> nn.Module:
    module.classifier = nn.Sequential(module.classifier, nn.Sigmoid())
    return module


def two_layers(module: OtherDenseNet) -> nn.Module:
    width = module.classifier.in_features
    module.classifier = nn.Sequential(
        nn.Linear(width, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3)
    )
    return module


def embeddings(module: OtherDenseNet) -> nn.Module:
    module.classifier = nn.Identity()
    return module


@pytest.mark.parametrize("wrap", [None, Wrapper])
@pytest.mark.parametrize(
    "change", [no_change, dropout_and_linear, no_bias, sigmoid, two_layers, embeddings]
)
def test_any_head_within_any_wrapper(other, change, wrap):
    module = change(other).eval()
    wrapped = module if wrap is None else wrap(module)
    x = torch.randn(2, 3, 45, 51)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = tf.optimize(wrapped, x)
    assert len(frozen.islands) == 1
    assert not frozen.foreign
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=1e-5)
        assert frozen(x[:0]).shape == module(x)[:0].shape
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert twin(x).equal(frozen(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("place", [nn.utils, nn.utils.parametrizations], ids=["hooks", "new"])
def test_parametrised_weights(other, kind, place):
    getattr(place, kind)(other.features.conv0)
    getattr(place, kind)(other.classifier)
    other.eval()
    x = torch.randn(2, 3, 40, 40)
    expected = other(x).detach()
    names = list(other.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        frozen = tf.optimize(other, x)
    assert len(frozen.islands) == 1
    assert list(other.state_dict()) == names
    assert other(x).equal(expected)
    for twin in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
        twin.load_state_dict(frozen.state_dict())


class _Outputs(torch.utils.data.Dataset):
    """What a network makes of each of some images."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.images = network, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.network(self.images[index : index + 1])[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(other, method):
    images = torch.randn(3, 3, 40, 40)
    frozen = tf.optimize(other, images)
    loader = torch.utils.data.DataLoader(
        _Outputs(frozen, images), batch_size=3, num_workers=1, multiprocessing_context=method
    )
    (outputs,) = loader
    with torch.no_grad():
        torch.testing.assert_close(outputs, other.eval()(images), rtol=1e-4, atol=1e-5)


def test_nested_wrappers(other):
    x = torch.randn(1, 3, 40, 40)
    frozen = tf.optimize(nn.DataParallel(torch.compile(nn.DataParallel(other))), x)
    assert len(frozen.islands) == 1
    again = tf.optimize(frozen, x)
    assert again(x).equal(frozen(x))


def test_transitions_of_any_width(randomised):
    module = randomised(OtherDenseNet(channels=9, compressed=11)).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(tf.optimize(module, x)(x), module(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="transitions has 1 entries: expected 2"):
        tf.DenseNet(blocks=(1, 1, 1), transitions=[4])


@pytest.mark.parametrize("name", ["hardnet39ds", "threshnet79"])
def test_flat_networks_with_other_heads(name, randomised):
    model = randomised(tf.create_model(name, num_classes=4)).eval()
    x = torch.randn(1, 3, 48, 48)
    for head in (
        nn.Identity(),
        nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(model.num_features, 3)),
    ):
        module = Flat(nn.ModuleList([*copy.deepcopy(model.base)[:-1], head])).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen = tf.optimize(module, x)
        assert len(frozen.islands) == 1
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=1e-4)


class Flat(nn.Module):
    """Modules one after the other."""

    def __init__(self, base: nn.ModuleList) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        for module in self.base:
            x = module(x)
        return x


class TestFrozenAsModule:
    @pytest.fixture
    def frozen(self, other):
        return tf.optimize(other, torch.randn(1, 3, 40, 40))

    def test_is_part_of_others(self, frozen):
        x = torch.randn(2, 3, 40, 40)
        whole = nn.Sequential(frozen, nn.Dropout(), nn.Linear(5, 2))
        whole.train()
        assert not frozen.training
        assert whole[1].training
        whole.eval()
        assert whole(x).equal(whole[2](frozen(x)))
        whole(x).sum().backward()
        assert whole[2].weight.grad is not None
        assert [p.shape for p in whole.parameters() if p.requires_grad] == [(2, 5), (2,)]
        seen: list[torch.Size] = []
        frozen.register_forward_hook(lambda *call: seen.append(call[2].shape))
        whole(x)
        assert seen == [(2, 5)]

    def test_state_dict_is_that_of_the_network(self, frozen, other):
        state = frozen.state_dict()
        assert list(state) == list(other.state_dict())
        assert all(value.equal(other.state_dict()[key]) for key, value in state.items())
        assert [name for name, _ in frozen.named_children()] == ["features", "classifier"]
        frozen.load_state_dict(state)
        nn.Sequential(frozen).load_state_dict(nn.Sequential(frozen).state_dict())
        state["classifier.bias"] = state["classifier.bias"] + 1
        with pytest.raises(RuntimeError, match=r"classifier\.bias differs from that of a frozen"):
            frozen.load_state_dict(state)

    def test_stays_where_it_is(self, frozen):
        x = torch.randn(1, 3, 40, 40)
        before = frozen(x)
        assert frozen.to("cpu") is frozen
        assert frozen.float() is frozen
        assert nn.Sequential(frozen).to(memory_format=torch.channels_last)(x).equal(before)
        if frozen.backend == "reference":
            assert frozen.double()(x.double()).dtype == torch.float64
            return
        for move in (frozen.double, frozen.half, lambda: frozen.to("meta")):
            with pytest.raises(RuntimeError, match=r"a frozen network stays torch\.float32 on cpu"):
                move()
        assert frozen(x).equal(before)

    def test_what_runs_as_it_is_moves(self):
        with pytest.warns(UserWarning, match="plain PyTorch"):
            frozen = tf.optimize(nn.Linear(2, 3), torch.randn(1, 2))
        assert frozen.double()(torch.randn(1, 2, dtype=torch.float64)).dtype == torch.float64

    def test_no_images(self, frozen):
        output = frozen(torch.empty(0, 3, 40, 40))
        assert output.shape == (0, 5)
        assert output.dtype == torch.float32
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
            frozen(torch.empty(0, 4, 40, 40))

    def test_an_example_of_no_images(self, other):
        frozen = tf.optimize(other, torch.empty(0, 3, 40, 40))
        x = torch.randn(1, 3, 40, 40)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), other.eval()(x), rtol=1e-4, atol=1e-5)


class _ByHeight(nn.Module):
    """Computes something else on low maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.shape[2] > 6 else self.second(x)


def test_sizes_outside_of_a_trace_run_as_the_module_does(randomised):
    module = randomised(_ByHeight()).eval()
    fast = tf.optimize(module, torch.randn(1, 3, 8, 8))
    assert fast.islands
    for size in ((2, 3, 8, 8), (1, 3, 7, 11), (3, 3, 12, 5)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
    low = torch.randn(1, 3, 6, 9)
    with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outputs = [fast(low), fast(low)]
        assert outputs[0].equal(module(low))
    (warning,) = warned
    assert str(warning.message).startswith("_ByHeight runs as plain PyTorch: Guard failed: ")
    found = tf.explain(fast, low)
    assert found.islands == ()
    assert found.foreign[0].reason.startswith("_ByHeight runs its own code: Guard failed: ")


@pytest.mark.parametrize("name", ["densenet121", "densenet169"])
def test_torchvision(name, randomised):
    module = randomised(getattr(torchvision_models(), name)()).eval()
    x = torch.randn(1, 3, 64, 64)
    frozen = tf.optimize(module, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=1e-4)
