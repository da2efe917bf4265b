"""The backend of torch.compile: the same results, whatever changes between calls."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from threshnet_fast.engines import cpu
from threshnet_fast.runtime import compiler
from threshnet_fast.runtime.compiler import compile_graph

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())),
]


class Network(nn.Module):
    """Convolutions on both sides of what no plan has, sizes of maps, in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.norm(self.conv(x)))
        y = F.softmax(F.max_pool2d(y, 2), 1)
        y = self.last(F.interpolate(y, size=x.shape[2:], mode="bilinear"))
        y += 1
        return {"map": y, "mean": y.mean((2, 3))}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def islands(monkeypatch) -> list[int]:
    """How many islands each compilation has found."""
    found: list[int] = []
    host = compiler.Host

    def counted(*args, **kwargs):
        made = host(*args, **kwargs)
        found.append(len(made.islands))
        return made

    monkeypatch.setattr(compiler, "Host", counted)
    return found


@pytest.fixture
def network(randomised) -> Network:
    return randomised(Network()).eval()


def compiled(module: nn.Module, **options) -> nn.Module:
    return torch.compile(module, backend=compile_graph, options=options)


def assert_same(fast: nn.Module, module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        actual, expected = fast(x), module(x)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_any_batch_and_size(network, islands, rest):
    fast = compiled(network, rest=rest)
    for shape in ((2, 3, 8, 8), (4, 3, 8, 8), (5, 3, 12, 10), (1, 3, 9, 7)):
        assert_same(fast, network, torch.randn(shape))
    assert islands
    assert set(islands) == {2}


def test_changed_weights_are_followed(network):
    fast = compiled(network)
    x = torch.randn(2, 3, 8, 8)
    assert_same(fast, network, x)
    with torch.no_grad():
        network.conv.weight.mul_(2)
    assert_same(fast, network, x)
    network.norm.running_mean.data.add_(1)
    assert_same(fast, network, x)
    network.last.weight = nn.Parameter(torch.randn(4, 8, 1, 1))
    assert_same(fast, network, x)
    network.load_state_dict(Network().state_dict())
    assert_same(fast, network, x)


def test_training_is_left_alone(network, islands):
    network.train()
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)["map"].sum()
    expected.backward()
    grad = network.conv.weight.grad.clone()
    network.zero_grad()
    actual = compiled(network)(x)["map"].sum()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(network.conv.weight.grad, grad)
    assert not islands


def test_nothing_to_fuse():
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": torch.tanh(x)}

    assert_same(compiled(Plain()), Plain(), torch.randn(2, 3))


def test_by_name(network):
    names = torch.compiler.list_backends()
    if "threshnet_fast" not in names:
        pytest.skip("the package is not installed, so that its entry points are not known")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(1, 3, 8, 8)
        fast = torch.compile(network, backend="threshnet_fast")
        torch.testing.assert_close(fast(x)["map"], network(x)["map"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rest": "tvm"}, "option 'rest' is 'tvm': expected one of"),
        ({"exact": 1}, "option 'exact' is 1: expected True or False"),
        ({"fast": True}, r"has options \['fast'\]: expected 'rest' and 'exact'"),
    ],
)
def test_bad_options(network, options, message):
    with pytest.raises(Exception, match=message), torch.no_grad():
        compiled(network, **options)(torch.randn(1, 3, 8, 8))


def test_exact(network):
    assert_same(compiled(network, exact=True), network, torch.randn(1, 3, 20, 20))
