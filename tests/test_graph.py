"""Graphs of the package's modules, and the plans that are made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.graph import (
    Activate,
    Concat,
    Conv,
    Dropout,
    Flatten,
    Foreign,
    Graph,
    Linear,
    Mean,
    Node,
    Norm,
    Pool,
    UnsupportedModule,
    graph_of_network,
    graph_of_stages,
)
from threshnet_fast.nn import ConvBNReLU, DenseBlock, DenseLayer, HarmonicBlock
from threshnet_fast.plan import execute_reference, lower, plan_memory, serialize

needs_engine = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

# SHA-256, shortened, of the serialized plans that graphs must not change.
DIGESTS = json.loads((Path(__file__).parent / "plan_digests.json").read_text())
SIZES = ((32, 32), (64, 64), (225, 225), (160, 288))


def kinds(graph: Graph) -> list[str]:
    return [type(node).__name__ for node in graph.nodes]


@pytest.mark.parametrize("name", tf.list_models())
def test_plans_are_what_they_were(name):
    with torch.device("meta"):
        model = tf.create_model(name).eval()
    for height, width in SIZES:
        for head in (True, False):
            plan = lower(model, (2, 3, height, width), head=head, fold=False)
            description = serialize(plan, plan_memory(plan))
            digest = hashlib.sha256(description.numpy().tobytes()).hexdigest()[:32]
            key = f"{name} {height}x{width}" + ("" if head else " features")
            assert digest == DIGESTS[key], key


def test_the_graph_of_a_dense_layer():
    layer = DenseLayer(6, 4)
    graph = graph_of_stages([("layer", layer)], 6)
    assert kinds(graph) == ["Norm", "Activate", "Conv", "Norm", "Activate", "Conv", "Concat"]
    assert graph.nodes[-1].inputs == (0, graph.nodes[-2].output)
    assert graph.channels[graph.output] == 10
    conv = graph.nodes[2]
    assert isinstance(conv, Conv)
    assert conv.module is layer.conv1
    assert (conv.name, conv.unit) == ("layer.conv1", "layer.conv1")


def test_the_graph_of_a_harmonic_block():
    block = HarmonicBlock(6, 4, 1.7, 4)
    graph = graph_of_stages([("block", block)], 6)
    concats = [node for node in graph.nodes if isinstance(node, Concat)]
    outputs = [0, *(node.output for node in graph.nodes if isinstance(node, Activate))]
    # Layers 2 and 4, and the block; an odd layer reads one map as it is.
    assert [node.inputs for node in concats] == [
        (outputs[1], outputs[0]),
        (outputs[3], outputs[2], outputs[0]),
        (outputs[1], outputs[3], outputs[4]),
    ]
    units = [node.unit for node in graph.nodes if isinstance(node, Conv)]
    assert units == [f"block.layers.{index}" for index in range(4)]


def test_the_graph_of_a_network_ends_with_its_head():
    model = tf.DenseNet(blocks=(2, 2), growth_rate=4, first_channels=8, num_classes=5)
    graph = graph_of_network(model)
    assert [type(node) for node in graph.nodes[-3:]] == [Mean, Flatten, Linear]
    assert graph.channels[graph.output] == 5
    features = graph_of_network(model, head=False)
    assert kinds(features) == kinds(graph)[:-3]
    assert isinstance(features.nodes[-1], Activate)
    pools = [node for node in graph.nodes if isinstance(node, Pool)]
    assert [node.average for node in pools] == [False, True]


def test_readers_and_makers():
    graph = graph_of_stages([("layer", DenseLayer(6, 4))], 6)
    norm, concat = graph.nodes[0], graph.nodes[-1]
    assert graph.readers[0] == [norm, concat]
    assert graph.sole_reader(0) is None
    assert graph.sole_reader(norm.output) is graph.nodes[1]
    assert graph.sole_reader(graph.output) is None
    assert graph.makers[concat.output] is concat


@pytest.mark.parametrize("inputs", [(1,), (-1,), (0, 7)])
def test_a_node_reads_what_there_is(inputs):
    graph = Graph(3)
    with pytest.raises(ValueError, match="expected to read what nodes before it make"):
        graph.add(Activate("relu", inputs, graph.value(3), "relu"))
    graph.add(Activate("relu", (0,), 1, "relu"))
    with pytest.raises(ValueError, match="makes value 1"):
        graph.add(Activate("relu", (0,), 1, "relu"))


class Renamed(ConvBNReLU):
    """A subclass that computes what its base does."""


class Doubled(ConvBNReLU):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_without_a_forward_of_its_own_is_its_base(randomised):
    model = tf.ThreshNet79(num_classes=3).eval()
    model.base[1] = randomised(Renamed(32, 64)).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    plan = lower(model, x.shape)
    actual = execute_reference(plan, x)
    with torch.no_grad():
        expected = model.double().forward_head(model._plain_features(x))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_forward_of_its_own_makes_a_module_foreign():
    own, patched = Doubled(3, 4), nn.ReLU()
    patched.forward = lambda x: x
    stages = [("a", own), ("b", patched), ("c", nn.GELU()), ("d", nn.Dropout(0.5))]
    graph = graph_of_stages(stages, 3)
    assert kinds(graph) == ["Foreign", "Foreign", "Foreign", "Dropout"]
    reasons = [node.reason for node in graph.foreign()]
    assert reasons == [
        "a is not exactly a ConvBNReLU: it has a forward of its own",
        "b is not exactly a ReLU: it has a forward of its own",
        "c is a GELU, which no plan can express",
    ]
    assert [node.module for node in graph.nodes] == [own, patched, stages[2][1], stages[3][1]]


def test_a_foreign_part_inside_of_a_module_is_named():
    layer = DenseLayer(6, 4)
    layer.norm2 = nn.GroupNorm(1, 16)
    graph = graph_of_stages([("block", nn.Sequential(layer))], 6)
    assert [node.name for node in graph.foreign()] == ["block.0.norm2"]
    assert isinstance(next(iter(graph.foreign())), Foreign)


def test_channels_are_checked():
    graph = graph_of_stages([("a", nn.Conv2d(3, 5, 1)), ("b", nn.BatchNorm2d(4))], 3)
    conv, norm = graph.nodes
    graph.check(conv)
    with pytest.raises(UnsupportedModule, match="b reads 4 channels, not 5"):
        graph.check(norm)


def test_nested_sequences_are_walked_in_order():
    block = DenseBlock(6, 2, 4)
    stages = [("s", nn.Sequential(nn.Sequential(nn.ReLU()), block, nn.Dropout()))]
    graph = graph_of_stages(stages, 6)
    assert graph.nodes[0].name == "s.0.0"
    assert isinstance(graph.nodes[-1], Dropout)
    assert graph.channels[graph.output] == 14
    assert isinstance(graph.nodes[1], Norm)
    assert all(isinstance(node, Node) for node in graph.nodes)


@needs_engine
def test_explain_names_what_trains_as_plain_pytorch():
    x = torch.randn(2, 3, 64, 64)
    model = tf.HarDNet85().train()
    dropout = next(name for name, part in model.named_modules() if isinstance(part, nn.Dropout))
    assert tf.explain(model, x).reason.endswith(f"; as plain PyTorch: {dropout} is a Dropout")
    model = tf.ThreshNet79().train()
    assert "plain" not in tf.explain(model, x).reason
    model.base[4] = nn.Sequential(model.base[4], nn.GELU())
    reason = tf.explain(model, x).reason
    assert reason.endswith("; as plain PyTorch: base.4.1 is a GELU, which no plan can express")


@pytest.mark.parametrize(("kind", "module"), [("silu", nn.SiLU()), ("hardswish", nn.Hardswish())])
@needs_engine
def test_activations_without_training_run_as_plain_pytorch_there(randomised, kind, module):
    """A graph says what they are; plans of inference have them, those of training refuse them."""
    graph = graph_of_stages([("a", module)], 4)
    (node,) = graph.nodes
    assert isinstance(node, Activate)
    assert node.kind == kind
    value = torch.randn(2, 4, 3, 5)
    assert getattr(nn.functional, node.kind)(value).equal(module(value))

    model = tf.DenseNet(first_channels=10, blocks=(2, 3), growth_rate=6, num_classes=5)
    model = randomised(model).eval()
    x = torch.randn(2, 3, 45, 38)
    with torch.no_grad():
        model(x)
        model.features.relu0 = module
        assert any(step.describe() == kind for step in lower(model, x.shape).steps)
        with tf.use_backend("reference"):
            expected = model(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert tf.explain(model, x).backend == "cpu"

    reason = f"features.relu0 has activation '{kind}', which no engine computes"
    model.train()
    assert f"; as plain PyTorch: {reason};" in tf.explain(model, x).reason
    gradients = []
    for backend in ("cpu", "reference"):
        model.zero_grad()
        with tf.use_backend(backend):
            model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))
