"""Networks of other packages and people, random ones too, come out of optimize as they went in.

Each is compared with itself: in its own float32 and, in exact mode, in float64. The packages are
those of the extra ``interop``; what is not installed is skipped.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from foreign_structures import STRUCTURES, Structure
from torch import Tensor, nn

import threshnet_fast as tf
from threshnet_fast.bench.networks import randomise
from threshnet_fast.engines import cpu
from threshnet_fast.graph.export import trace
from threshnet_fast.runtime.frozen import FrozenNetwork

TOLERANCE = 1e-4
"""Largest difference from the module itself, as a part of the largest output."""

islands = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="nothing is fused here")


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return importlib.import_module("timm").create_model(name, pretrained=False, **options)

    return make


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("torchvision").models, name)(weights=None)


def monai() -> nn.Module:
    networks = importlib.import_module("monai.networks.nets")
    return networks.DenseNet121(spatial_dims=2, in_channels=1, out_channels=3)


def torchxrayvision(thresholds: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = importlib.import_module("torchxrayvision").models
        network = models.DenseNet(weights=None, num_classes=18)
        if thresholds:
            # As those that are published with the weights: some have none.
            values = torch.linspace(0.05, 0.7, 18)
            values[[3, 11]] = float("nan")
            network.op_threshs = values
        return network

    return make


def segmentation(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = importlib.import_module("segmentation_models_pytorch")
        return getattr(package, name)("densenet121", encoder_weights=None, classes=2)

    return make


GRAY = ((1, 64, 64),)
XRAY: dict[str, Any] = {"shapes": ((1, 224, 224),), "sizes": (), "doubles": False}

PACKAGES: dict[str, tuple[str, Structure]] = {
    **{
        f"torchvision-{name}": ("torchvision", Structure(torchvision(name)))
        for name in ("densenet121", "densenet161", "densenet169", "densenet201")
    },
    "timm-densenet121": ("timm", Structure(timm("densenet121"))),
    "timm-densenetblur121d": ("timm", Structure(timm("densenetblur121d"), foreign=4)),
    "timm-densenet264d": ("timm", Structure(timm("densenet264d"))),
    "timm-features": ("timm", Structure(timm("densenet121", features_only=True))),
    "monai": ("monai", Structure(monai, GRAY)),
    "torchxrayvision": (
        "torchxrayvision",
        Structure(torchxrayvision(False), **XRAY, foreign=None),
    ),
    "torchxrayvision-operations": (
        "torchxrayvision",
        Structure(torchxrayvision(True), **XRAY, foreign=None),
    ),
    "smp-unet": ("segmentation_models_pytorch", Structure(segmentation("Unet"))),
    "smp-fpn": ("segmentation_models_pytorch", Structure(segmentation("FPN"), foreign=23)),
}
"""Networks of installed packages, by name: the package, and the network."""

EVERYTHING = [
    *STRUCTURES,
    *(f"package-{name}" for name in PACKAGES),
]


@pytest.fixture
def structure(request) -> Structure:
    """The structure that the test is given by name."""
    name: str = request.param
    if not name.startswith("package-"):
        found = STRUCTURES[name]
    else:
        package, found = PACKAGES[name.removeprefix("package-")]
        pytest.importorskip(package)
    return found


KINDS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.Linear)
"""Layers that are fused wherever they can be."""

every = pytest.mark.parametrize("structure", EVERYTHING, indirect=True)


def made(structure: Structure) -> nn.Module:
    """The network in training mode, with statistics and weights that leave nothing out."""
    return randomise(structure.make(), 0).train()


def inputs_of(
    structure: Structure, batch: int, size: tuple[int, int] | None = None
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    return tuple(
        torch.randn(batch, channels, *(size or own), generator=generator)
        for channels, *own in structure.shapes
    )


def optimized(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> FrozenNetwork:
    """What optimize makes of it; that it may have to leave parts to PyTorch is told elsewhere.

    The example is a copy, as a module that works in place may write to it.
    """
    inputs = tuple(x.clone() for x in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tf.optimize(module, inputs[0] if len(inputs) == 1 else inputs, **options)


def parts(value: Any) -> tuple[Any, list[Tensor]]:
    """How an output is put together, and the tensors in it, in order."""
    if isinstance(value, Tensor):
        return Tensor, [value]
    if isinstance(value, dict):
        keys, values = list(value), list(value.values())
    else:
        assert isinstance(value, list | tuple), type(value)
        keys, values = None, list(value)
    found = [parts(each) for each in values]
    return (type(value), keys, [each for each, _ in found]), [t for _, ts in found for t in ts]


def largest(tensor: Tensor) -> float:
    """The largest finite element."""
    return float(tensor[tensor.isfinite()].abs().max()) if tensor.numel() else 0.0


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest; infinite where one has a number and the other does not."""
    assert actual.shape == expected.shape
    if not actual.isfinite().equal(expected.isfinite()):
        return float("inf")
    return largest(actual.double() - expected.double())


def assert_same(actual: Any, expected: Any) -> None:
    """Asserts that outputs are put together alike, and their tensors differ by rounding alone."""
    assert parts(actual)[0] == parts(expected)[0]
    for ours, theirs in zip(parts(actual)[1], parts(expected)[1], strict=True):
        assert ours.dtype == theirs.dtype
        error, scale = difference(ours, theirs), largest(theirs)
        assert error <= TOLERANCE * scale, f"off by {error / max(scale, 1e-30):.2g}"


def assert_same_bits(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(parts(actual)[1], parts(expected)[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_exact(
    actual: Any, expected: Any, reference: Any, slack: float = 4 * torch.finfo(torch.float32).eps
) -> None:
    """Asserts errors at most twice PyTorch's own, and a few roundings of the largest output.

    Of few numbers, PyTorch's own may be off by less than one.
    """
    tensors = (parts(value)[1] for value in (actual, expected, reference))
    for ours, theirs, exact in zip(*tensors, strict=True):
        allowed = 2 * difference(theirs, exact) + slack * largest(exact)
        assert difference(ours, exact) <= allowed


def states(module: nn.Module) -> list[Any]:
    """All that optimize might have changed."""
    modes = [(name, type(part), part.training) for name, part in module.named_modules()]
    hooks = [list(part._forward_hooks.values()) for part in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    kept = [(id(t), t._version, t.requires_grad, t.data_ptr(), t.stride()) for t in tensors]
    return [modes, hooks, kept, list(module.state_dict())]


def compare(module: nn.Module, structure: Structure) -> FrozenNetwork:
    """Optimizes a network and compares every call with the module's own; returns what was made."""
    inputs = inputs_of(structure, 1)
    before = states(module)
    values = copy.deepcopy(module.state_dict())
    fast = optimized(module, inputs)
    assert states(module) == before
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0, equal_nan=True)
    module.eval()
    for batch, size in ((1, None), (3, None), *((2, size) for size in structure.sizes)):
        inputs = inputs_of(structure, batch, size)
        written = [x.clone() for x in inputs]
        with torch.no_grad():
            expected = module(*written)
        given = [x.clone() for x in inputs]
        first = fast(*given)
        assert_same(first, expected)
        # A module that works in place may write to its input. What was frozen may do the same, or
        # write nothing.
        for x, after, theirs in zip(inputs, given, written, strict=True):
            if not after.equal(x):
                assert_same(after, theirs)
        assert_same_bits(fast(*(x.clone() for x in inputs)), first)
    return fast


@every
def test_equal_to_the_module(structure):
    compare(made(structure), structure)


@every
def test_exact(structure):
    if not structure.doubles:
        pytest.skip("the module does not take float64")
    module = made(structure).eval()
    inputs = inputs_of(structure, 2)
    with torch.no_grad():
        reference = copy.deepcopy(module).double()(*(x.double() for x in inputs))
        expected = module(*(x.clone() for x in inputs))
    assert_exact(optimized(module, inputs, exact=True)(*inputs), expected, reference)


def layers_called(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """How many convolutions, BatchNorms, pools and linear layers one call runs."""
    calls: list[nn.Module] = []
    handles = [
        part.register_forward_hook(lambda part, *_: calls.append(part))
        for part in module.modules()
        if isinstance(part, KINDS)
    ]
    with torch.no_grad():
        module(*(x.clone() for x in inputs))
    for handle in handles:
        handle.remove()
    return len(calls)


@islands
@every
def test_what_is_fused(structure):
    module = made(structure).eval()
    inputs = inputs_of(structure, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fast = tf.optimize(module, inputs[0] if len(inputs) == 1 else inputs)
    ours = [each for each in told if "optimize" in str(each.message)]
    assert len(ours) == (1 if fast.foreign else 0), [str(each.message) for each in ours]
    fused = sum(island.nodes for island in fast.islands)
    assert fused, fast.foreign
    assert all(island.name for island in fast.islands)
    if structure.foreign is None:
        # Whatever is not fused is said, and most of the network is.
        assert fused + len(fast.foreign) >= layers_called(module, inputs)
        assert fused > len(fast.foreign)
    else:
        assert len(fast.foreign) <= structure.foreign, fast.foreign
        assert fused >= layers_called(module, inputs) - len(fast.foreign)
    text = str(tf.explain(fast, inputs[0] if len(inputs) == 1 else inputs))
    for line in fast.foreign:
        name, _, reason = line.partition(" ")
        assert name
        assert reason
        assert line in text


def test_a_hook_keeps_what_it_kept():
    module = made(STRUCTURES["grad-cam-hook"]).eval()
    record: list[Tensor] = []
    module.model.features.norm5.register_forward_hook(lambda *call: record.append(call[-1].clone()))
    (x,) = inputs_of(STRUCTURES["grad-cam-hook"], 1)
    with torch.no_grad():
        module(x)
    expected = record.pop()
    assert not record
    fast = optimized(module, (x,))
    record.clear()
    fast(x)
    (kept,) = record
    assert_same(kept, expected)


def test_a_part_of_another_module():
    """As a child of a module that goes on to be the user's own."""
    structure = STRUCTURES["torchvision"]
    module = made(structure).eval()
    whole = nn.Sequential(module, nn.LogSoftmax(1))
    (x,) = inputs_of(structure, 2)
    with torch.no_grad():
        expected = whole(x)
    whole[0] = optimized(module, (x,))
    assert_same(whole.eval()(x), expected)


def takes(module: nn.Module, x: Tensor) -> bool:
    """Whether a network can run on an input of that size."""
    try:
        copy.deepcopy(module).to("meta")(x.to("meta"))
    except (RuntimeError, ValueError):
        return False
    return True


def test_random_networks():
    hypothesis = pytest.importorskip("hypothesis")
    from random_networks import CHANNELS, RandomNetwork, networks

    drawn: list[int] = []

    @hypothesis.settings(
        max_examples=100,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(networks)
    def check(network: RandomNetwork) -> None:
        randomise(network, len(network.layers))
        height, width = network.size
        larger = (height + 5, width + 8)
        sizes = (larger,) if takes(network, torch.empty(2, CHANNELS, *larger)) else ()
        structure = Structure(lambda: network, ((CHANNELS, height, width),), sizes)
        network.train()
        drawn.append(len(network.layers))
        fast = compare(network, structure)
        inputs = inputs_of(structure, 2)
        with torch.no_grad():
            reference = copy.deepcopy(network).double()(*(x.double() for x in inputs))
            expected = network(*(x.clone() for x in inputs))
        ours = optimized(network, inputs, exact=True)(*inputs)
        # Of a few numbers, PyTorch's own may be off by less than their rounding.
        assert_exact(ours, expected, reference, slack=16 * torch.finfo(torch.float32).eps)
        if fast.islands:
            fused = sum(island.nodes for island in fast.islands)
            # Layers of which nothing is returned are no part of a trace.
            live = [node.target for node in trace(network, inputs).graph.nodes]
            layers = [name for name, part in network.named_modules() if isinstance(part, KINDS)]
            assert fused + len(fast.foreign) >= sum(name in live for name in layers)

    check()
    assert len(drawn) >= 100
    assert sum(count >= 4 for count in drawn) >= 50, "most are networks, not single layers"
