"""Networks under torch.jit, torch.fx and torch.export, and the maps of their stages."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from test_hooks import BUILD
from torch import nn

import threshnet_fast as tf
from threshnet_fast.engines import cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS = BUILD | {
    "densenet without bottlenecks": lambda: tf.DenseNet(
        first_channels=8, blocks=(2, 2), growth_rate=4, bottleneck=0, num_classes=5
    ),
    "hardnet": lambda: tf.HarDNet(
        first_channels=(8, 12),
        blocks=(2, 3),
        transitions=(16, 20),
        downsample=(True, False),
        growth_rates=(4, 6),
        block_drop_rate=0.1,
        num_classes=5,
    ),
    "without classifier": lambda: tf.DenseNet(
        first_channels=8, blocks=(2, 2), growth_rate=4, num_classes=0
    ),
    "without pooling": lambda: tf.HarDNet(
        blocks=(2,),
        transitions=(16,),
        downsample=(True,),
        growth_rates=(4,),
        num_classes=0,
        global_pool="",
    ),
}


@pytest.fixture(params=KINDS, ids=list(KINDS))
def model(request, randomised):
    return randomised(KINDS[request.param]()).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 40)


def reference(model, x):
    with torch.no_grad(), tf.use_backend("reference"):
        return model(x)


def test_script(model, x):
    scripted = torch.jit.script(model)
    expected = reference(model, x)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), expected)
        memory = io.BytesIO()
        torch.jit.save(scripted, memory)
        memory.seek(0)
        loaded = torch.jit.load(memory)
        torch.testing.assert_close(loaded(x), expected)
        # Of any size.
        other = torch.randn(3, 3, 36, 64)
        torch.testing.assert_close(loaded(other), reference(model, other))
    assert set(scripted.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", tf.list_models())
def test_every_registered_model_scripts(name):
    with torch.device("meta"):
        model = tf.create_model(name).eval()
    scripted = torch.jit.script(model)
    assert scripted(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, model.num_classes)


def test_a_scripted_model_trains_and_drops(randomised, x):
    model = randomised(KINDS["threshnet"]()).train()
    twin = copy.deepcopy(model)
    scripted = torch.jit.script(model)
    torch.manual_seed(3)
    scripted(x).sum().backward()
    torch.manual_seed(3)
    with tf.use_backend("reference"):
        twin(x).sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_script_with_a_replaced_head(randomised, x):
    model = randomised(KINDS["threshnet"]()).eval()
    model.base[-1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 7))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), reference(model, x))


@pytest.mark.parametrize("training", [False, True])
def test_symbolic_trace(model, x, training):
    model.train(training)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    torch.manual_seed(3)
    actual = traced(x)
    torch.manual_seed(3)
    with tf.use_backend("reference"):
        torch.testing.assert_close(actual, twin(x))
    names = dict(traced.named_modules())
    called = [names[node.target] for node in traced.graph.nodes if node.op == "call_module"]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m for m in called if isinstance(m, nn.Conv2d)] == convolutions


def test_a_map_taken_out_of_a_traced_graph_is_not_overwritten(randomised, x):
    model = randomised(KINDS["densenet"]()).eval()
    graph = torch.fx.symbolic_trace(model)
    kept = {}
    for name, module in graph.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, y, name=name: kept.__setitem__(name, y))
    with torch.no_grad():
        graph(x)
    assert all((y < 0).any() for y in kept.values())
    assert len(kept) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_jit_trace(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    other = torch.randn(3, 3, 36, 64)
    torch.testing.assert_close(traced(other), reference(model, other), rtol=1e-4, atol=1e-5)


def test_export(model, x):
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    other = torch.randn(5, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), reference(model, other))


def test_feature_extraction_of_torchvision(randomised, x):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = randomised(KINDS["densenet"]()).eval()
    nodes = ["features.norm0", "features.denseblock1", "features.relu5", "classifier"]
    kept = {}
    for name in nodes:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: kept.__setitem__(name, y)
        )
    maps = extraction.create_feature_extractor(copy.deepcopy(model), nodes)(x)
    model(x)
    for name in nodes:
        torch.testing.assert_close(maps[name], kept[name])


# The maps of several stages


def by_hooks(model, x):
    """The maps that feature_info names, in the order of the network."""
    maps = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda _, __, y: maps.append(y))
    with torch.no_grad():
        model(x)
    return maps


@pytest.mark.parametrize("name", ["densenet", "threshnet", "hardnet ds", "hardnet"])
@pytest.mark.parametrize("out_indices", [None, (0, 2), (-1,), (2, 1)])
def test_maps_of_the_stages(name, out_indices, randomised, x):
    model = randomised(KINDS[name]()).eval()
    extractor = tf.models.FeatureExtractor(copy.deepcopy(model), out_indices)
    count = len(model.feature_info)
    indices = sorted(i % count for i in (range(count) if out_indices is None else out_indices))
    every = by_hooks(model, x)
    expected = [every[index] for index in indices]
    for call in (extractor, torch.jit.script(extractor), torch.fx.symbolic_trace(extractor)):
        with torch.no_grad():
            maps = call(x)
        assert isinstance(maps, list)
        assert len(maps) == len(expected)
        for actual, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    info = extractor.feature_info
    assert info.out_indices == tuple(indices)
    assert info.channels() == [y.shape[1] for y in maps]
    assert info.reduction() == [model.feature_info[i]["reduction"] for i in indices]
    assert info.module_name() == [d["module"] for d in info.get_dicts()]
    assert (len(info), info.channels(0), info[1]) == (count, every[0].shape[1], info.info[1])
    assert info.reduction([1, 0]) == [info[1]["reduction"], info[0]["reduction"]]


def test_only_what_is_needed_is_kept_under_the_networks_names():
    extractor = tf.create_model("densenet121", features_only=True, out_indices=(1, 2))
    whole = tf.create_model("densenet121")
    found = extractor.load_state_dict(whole.state_dict(), strict=False)
    assert not found.missing_keys
    assert {key.split(".")[1] for key in extractor.state_dict()} == {
        *("conv0", "norm0", "denseblock1", "transition1", "denseblock2"),
    }
    # Every parameter gets a gradient.
    sum(y.sum() for y in extractor(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in extractor.parameters())


def test_maps_of_registered_models():
    extractor = tf.create_model("threshnet79", features_only=True, in_chans=1).eval()
    with torch.no_grad():
        maps = extractor(torch.randn(1, 1, 96, 64))
    assert [y.shape[1] for y in maps] == extractor.feature_info.channels()
    assert [tuple(y.shape[2:]) for y in maps] == [
        (96 // r, 64 // r) for r in extractor.feature_info.reduction()
    ]
    with pytest.raises(ValueError, match="x has 3 channels"):
        extractor(torch.randn(1, 3, 96, 64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out_indices": (0,)}, ValueError, "expected features_only=True"),
        ({"features_only": True, "out_indices": ()}, ValueError, "out_indices is"),
        ({"features_only": True, "out_indices": (6,)}, ValueError, "expected one or more of -4 to"),
        ({"features_only": True, "out_indices": (-7,)}, ValueError, r"out_indices\[0\] is -7"),
        ({"features_only": True, "out_indices": (1, -3)}, ValueError, "each index once"),
        ({"features_only": True, "out_indices": (0.5,)}, TypeError, r"out_indices\[0\] is 0.5"),
        ({"features_only": True, "out_indices": 1}, TypeError, "expected a sequence"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        tf.create_model("densenet_bc_100", **arguments)


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the C++ extension")
def test_a_model_that_was_traced_still_runs_fused(model, x):
    torch.jit.script(model)
    torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert tf.explain(model, x).backend == "cpu"
