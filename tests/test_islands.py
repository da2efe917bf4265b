"""How modules are divided, and how the maps of islands share buffers."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.graph.export import annotate, convert, trace
from threshnet_fast.graph.ir import UnsupportedModule
from threshnet_fast.graph.islands import find_islands, insert
from threshnet_fast.plan.fuse import fuse, reads_image
from threshnet_fast.plan.ir import FusedConv, Pointwise

pytestmark = pytest.mark.usefixtures("one_thread")

needs_engine = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def divided(module: nn.Module, *xs: Tensor, check=lambda island: None):
    traced = trace(module.eval(), xs)
    annotate(traced, xs, {})
    return traced, find_islands(traced, check)


class Diamond(nn.Module):
    """What no plan has, between two convolutions that are also connected."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + torch.tanh(y)


def test_no_island_waits_for_itself():
    """The sum reads what no plan has, and so cannot be with what that reads."""
    x = torch.randn(2, 3, 5, 6)
    module = Diamond().eval()
    traced, found = divided(module, x)
    names = [
        {node.name for node in island.nodes if node.op != "get_attr"} for island in found.islands
    ]
    assert names == [{"first", "second"}]
    assert [line.partition(" ")[0] for line in found.foreign.values()] == ["tanh", "add"]
    insert(traced, found.islands)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), module(x))


def test_what_the_check_refuses_alone_is_left_out():
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    def check(island) -> None:
        for node in island.graph.nodes:
            if node.name == "b":
                error = UnsupportedModule("b is refused")
                error.value = node.output
                raise error

    x = torch.randn(1, 4, 3, 3)
    module = Three().eval()
    traced, found = divided(module, x, check=check)
    assert [[n.name for n in island.nodes if n.op != "get_attr"] for island in found.islands] == [
        ["a"],
        ["c"],
    ]
    assert list(found.foreign.values()) == ["b is refused"]
    insert(traced, found.islands)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), module(x))


class Skips(nn.Module):
    """A dense block whose features a decoder reads again behind new ones, as in a U-Net."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Conv2d(16 + 8 * index, 8, 3, padding=1) for index in range(layers)
        )
        total = 16 + 8 * layers
        self.down, self.up = nn.Conv2d(total, 24, 1), nn.Conv2d(24 + total, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        low = F.max_pool2d(self.down(x), 2)
        return self.up(torch.cat([F.interpolate(low, scale_factor=2.0), x], 1))


def test_a_dense_block_stays_one_run_where_others_read_it_too():
    x = torch.randn(1, 3, 8, 8)
    module = Skips().eval()
    graph = convert(trace(module, (x,)))
    plan = fuse(graph, ((*x.shape, 0),))
    convs = {step.name: step for step in plan.steps if isinstance(step, FusedConv)}
    assert [len(convs[f"layers.{index}"].inputs) for index in range(5)] == [1] * 5
    assert [segment.channels for segment in convs["up"].inputs] == [24, 56]
    assert not any(isinstance(step, Pointwise) for step in plan.steps)


def test_an_input_is_concatenated_where_it_lies():
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(9, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([x, self.a(x)], 1))

    x = torch.randn(1, 5, 4, 4)
    graph = convert(trace(Tail().eval(), (x,)))
    assert not reads_image(graph)
    plan = fuse(graph, ((*x.shape, 5),))
    first, last = plan.steps
    assert [segment.buffer for segment in last.inputs] == [0, first.output.buffer]
    assert plan.buffers[0].pitch == 5


@needs_engine
class TestDropIn:
    @pytest.fixture
    def module(self, randomised) -> nn.Module:
        return randomised(Skips()).eval()

    @pytest.fixture
    def fast(self, module) -> nn.Module:
        return tf.optimize(module, torch.randn(2, 3, 16, 16))

    def test_maps_in_any_layout(self, module):
        class Between(nn.Module):
            """Hands islands maps that are not in channels_last format, or slices of others."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 3, padding=1)

            def forward(self, x: Tensor, layout: str) -> Tensor:
                y = torch.tanh(self.first(x))
                y = y.contiguous() if layout == "nchw" else y
                return self.last(torch.abs(y)[:, 2:6] if layout != "flip" else y.flip(3)[:, 2:6])

        between = Between().eval()
        x = torch.randn(2, 3, 7, 5)
        for layout in ("nchw", "nhwc", "flip"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fast = tf.optimize(between, (x, layout))
            assert len(fast.islands) == 2
            for value in (x, x.contiguous(memory_format=torch.channels_last), x.flip(2), x[:1]):
                with torch.no_grad():
                    expected = between(value, layout)
                torch.testing.assert_close(fast(value, layout), expected, rtol=1e-4, atol=1e-5)
        # Another argument than the trace was made for.
        with pytest.warns(UserWarning, match="Between runs as plain PyTorch"), torch.no_grad():
            assert fast(x, "nchw").equal(between(x, "nchw"))
        assert "Between runs its own code: its arguments" in str(tf.explain(fast, (x, "nchw")))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtypes(self, module, dtype):
        x = torch.randn(2, 3, 16, 16)
        fast = tf.optimize(module, x, dtype=dtype)
        actual = fast(x.to(dtype))
        with torch.no_grad():
            expected = module(x)
        assert actual.dtype == dtype
        limit = 1e-4 if dtype == torch.float32 else 5e-2
        assert (actual.float() - expected).abs().max() <= limit * expected.abs().max()

    def test_sizes_without_a_plan_run_as_plain_pytorch(self, module, fast):
        plainly = pytest.warns(UserWarning, match="as plain PyTorch for inputs of 1x3x15x15: ")
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"), plainly:
            fast(torch.randn(1, 3, 15, 15))
        x = torch.randn(1, 3, 6, 10)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="to have 3 channels"):
            fast(torch.randn(1, 4, 16, 16))
        assert fast(torch.empty(0, 3, 16, 16)).shape == (0, 8, 16, 16)
        with pytest.raises(RuntimeError, match="x requires a gradient"):
            fast(torch.randn(1, 3, 16, 16, requires_grad=True))

    def test_copies_and_wrappers(self, fast):
        x = torch.randn(2, 3, 16, 16)
        expected = fast(x)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), nn.DataParallel(fast)):
            assert twin(x).equal(expected)
        assert tf.optimize(fast, x)(x).equal(expected)

    def test_results_are_new_memory(self, fast):
        x, other = torch.randn(2, 2, 3, 16, 16)
        first = fast(x)
        kept = first.clone()
        fast(other).zero_()
        assert first.equal(kept)

    def test_under_transforms(self, module, fast):
        x = torch.randn(4, 3, 16, 16)
        with torch.no_grad():
            expected = module(x)
            mapped = torch.func.vmap(lambda one: fast(one[None])[0])(x)
            torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)
            traced = torch.jit.trace(fast, x, check_trace=False)
            torch.testing.assert_close(traced(x[:2]), expected[:2], rtol=1e-4, atol=1e-5)

    def test_explained(self, fast, module):
        x = torch.randn(1, 3, 12, 8)
        found = tf.explain(fast, x)
        (island,) = found.islands
        assert island.macs > 0
        assert island.bytes_fused < island.bytes_unfused
        assert len(island.algorithms) == len(island.plan.steps)
        assert island.plan.input_shape == tuple(x.shape)
        assert "island_0: " in str(found)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert str(tf.explain(module, x)).splitlines()[1:] == str(found).splitlines()[1:]

    def test_foreign_operations_are_measured(self):
        reflecting = nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")
        module = nn.Sequential(nn.Conv2d(3, 4, 1), reflecting).eval()
        with pytest.warns(UserWarning, match="1 has padding_mode 'reflect'") as warned:
            fast = tf.optimize(module, torch.randn(1, 3, 6, 6))
        assert len(warned) == 1
        (operation,) = tf.explain(fast, torch.randn(2, 3, 6, 6)).foreign
        assert operation.macs == 2 * 36 * 9 * 4 * 5
        assert operation.bytes == 4 * 2 * (36 * 4 + 36 * 5)


class Loud(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = Skips()

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        if x.max() > 100:
            x = x / 100
        return self.features(x) * gain


@needs_engine
def test_code_that_depends_on_values_runs_with_parts_fused(randomised):
    module = randomised(Loud()).eval()
    x = torch.randn(1, 3, 16, 16)
    with pytest.warns(UserWarning, match="the module's own code runs"):
        fast = tf.optimize(module, x)
    assert len(fast.islands) == 1
    for value, gain in ((x, 1.0), (1000 * x, 1.0), (x, 2.0)):
        with torch.no_grad():
            expected = module(value, gain)
        torch.testing.assert_close(fast(value, gain), expected, rtol=1e-4, atol=1e-4)
    twin = pickle.loads(pickle.dumps(fast))
    assert twin(1000 * x).equal(fast(1000 * x))
    assert "features" not in fast._module.__dict__
    assert len(tf.explain(fast, x).islands) == 1
