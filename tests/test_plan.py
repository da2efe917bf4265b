"""Lowering, memory planning, serialisation and the reference executor."""

import copy
import re

import pytest
import torch
from data import photographs
from torch import nn

import threshnet_fast as tf
from threshnet_fast.plan import (
    FusedConv,
    Head,
    Pool,
    UnsupportedModule,
    execute_reference,
    lower,
    plan_memory,
    serialize,
)

SHAPES = [(1, 3, 32, 32), (2, 3, 33, 47), (1, 3, 64, 96)]


def small(**arguments):
    """A network with every kind of block, small enough for float64."""
    defaults = {
        "first_channels": (8, 12),
        "blocks": (2, 3, 5, 4),
        "transitions": (24, 20, 40, 48),
        "downsample": (True, False, True, False),
        "threshold": 2,
        "growth_rates": (8, 8, 10, 14),
        "num_classes": 7,
    }
    return tf.ThreshNet(**{**defaults, **arguments}).eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", [True, False])
def test_reference_executor_equals_the_module(randomised, shape, head):
    model = randomised(small())
    x = torch.randn(shape)
    with torch.no_grad(), tf.use_backend("reference"):
        double = copy.deepcopy(model).double()
        expected = double(x.double()) if head else double.forward_features(x.double())
    actual = execute_reference(lower(model, shape, head=head), x)
    assert actual.shape == expected.shape
    # Only the folded weights were rounded to float32.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_reference_executor_equals_the_module_on_photographs(randomised):
    model = randomised(tf.ThreshNet79(num_classes=10).eval())
    x = photographs(64, count=2)
    with torch.no_grad(), tf.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
    actual = execute_reference(lower(model, x.shape), x)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    assert actual.argmax(1).equal(expected.argmax(1))


def test_reference_executor_notices_unwritten_features(randomised):
    model = randomised(small())
    plan = lower(model, SHAPES[0])
    without = copy.copy(plan)
    object.__setattr__(without, "steps", plan.steps[:5] + plan.steps[6:])
    assert execute_reference(without, torch.randn(SHAPES[0])).isnan().any()


def test_reference_executor_checks_the_shape():
    plan = lower(small(), SHAPES[0])
    with pytest.raises(
        ValueError, match=r"x has shape \(1, 3, 33, 32\): expected \(1, 3, 32, 32\)"
    ):
        execute_reference(plan, torch.randn(1, 3, 33, 32))


@pytest.mark.parametrize(
    ("name", "steps", "gmac", "valid_mmac_at_32"), [("threshnet95", 100, 4.027, 58.5)]
)
def test_published_costs(name, steps, gmac, valid_mmac_at_32):
    model = tf.create_model(name, num_classes=10).eval()
    plan = lower(model, (1, 3, 224, 224), fold=False)
    assert len(plan.steps) == steps
    assert round(plan.macs / 1e9, 3) == gmac
    tiny = lower(model, (1, 3, 32, 32), fold=False)
    assert abs(tiny.valid_macs / 1e6 - valid_mmac_at_32) < 0.1
    assert round(tiny.macs / 1e6, 1) == 82.2


def test_steps_of_a_dense_and_a_harmonic_block():
    model = small()
    plan = lower(model, (1, 3, 32, 32), fold=False)
    steps = {step.name: step for step in plan.steps}
    # base: 2 convolutions, pool, 2 dense layers, transition, pool, 3 dense layers, transition,
    # harmonic block, transition, pool, harmonic block, transition, head.
    assert isinstance(steps["base.2"], Pool)
    first = steps["base.3.conv1"]
    assert isinstance(first, FusedConv)
    assert first.prologue is not None
    assert first.activation == "relu"
    assert first.kernel == (1, 1)
    second = steps["base.4.conv1"]
    # No copy: the second layer reads one segment, which grew by what the first appended.
    assert [s.channels for s in second.inputs] == [20]
    assert second.inputs[0].buffer == first.inputs[0].buffer
    assert steps["base.3.conv2"].output.channel == 12
    assert steps["base.3.conv2"].activation is None
    assert steps["base.3.conv2"].bias is None
    # Layer 4 of a harmonic block reads layers 3, 2 and 0.
    growth = [10, 18, 10, 28, 10]
    assert [s.channels for s in steps["base.11.layers.3"].inputs] == [growth[2], growth[1], 20]
    assert [s.channels for s in steps["base.12"].inputs] == [growth[0], growth[2], growth[4]]
    for step in plan.steps:
        if isinstance(step, FusedConv) and step.name.startswith("base.11.layers"):
            assert step.output.channel % 16 == 0
    assert isinstance(plan.steps[-1], Head)
    assert len({step.name for step in plan.steps}) == len(plan.steps)


def test_valid_taps_are_counted_exactly():
    plan = lower(small(), (2, 3, 37, 51), fold=False)
    for step in plan.steps:
        if not isinstance(step, FusedConv):
            continue
        source = plan.buffers[step.inputs[0].buffer]
        ones = torch.ones(1, 1, source.height, source.width)
        taps = nn.functional.conv2d(
            ones, torch.ones(1, 1, *step.kernel), None, step.stride, step.padding
        )
        assert step.valid_taps == int(taps.sum())
        assert step.output_pixels == taps.numel()


def test_bytes_of_a_step():
    plan = lower(small(), (2, 3, 32, 32), fold=False)
    step = next(s for s in plan.steps if s.name == "base.4.conv1")
    pixels = 8 * 8
    reads, writes, weights = 2 * pixels * 20, 2 * pixels * 32, 32 * 20 + 32 + 2 * 20
    assert step.bytes_fused == 4 * (reads + writes + weights)
    # BatchNorm and ReLU before, BatchNorm and ReLU after: each reads and writes its map.
    assert step.bytes_unfused == step.bytes_fused + 4 * (4 * reads + 4 * writes)
    assert all(step.bytes_unfused >= step.bytes_fused for step in plan.steps)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 65, 40)])
def test_buffers_that_live_together_do_not_overlap(shape):
    plan = lower(tf.ThreshNet79(num_classes=10).eval(), shape, fold=False)
    arena = plan_memory(plan)
    written: dict[int, int] = {}
    last_read: dict[int, int] = {}
    for index, step in enumerate(plan.steps):
        written.setdefault(step.output.buffer, index)
        for segment in step.inputs:
            last_read[segment.buffer] = index
    places = []
    for buffer, start in written.items():
        if arena.offsets[buffer] is None:
            continue
        size = shape[0] * plan.buffers[buffer].pixels * arena.pitches[buffer]
        begin = arena.offsets[buffer]
        assert begin % 16 == 0
        assert arena.pitches[buffer] % 16 == 0
        assert arena.pitches[buffer] >= plan.buffers[buffer].channels
        assert begin + size <= arena.size
        places.append((start, last_read[buffer], begin, begin + size))
    for i, (start, end, low, high) in enumerate(places):
        for other_start, other_end, other_low, other_high in places[:i]:
            if start <= other_end and other_start <= end:
                assert high <= other_low or other_high <= low
    naive = sum(high - low for _, _, low, high in places)
    assert arena.size < naive / 3


def test_description_is_flat_and_complete():
    model = small()
    plan = lower(model, SHAPES[0])
    description = serialize(plan, plan_memory(plan))
    assert description.dtype == torch.int64
    assert description.dim() == 1
    assert description[2:6].tolist() == list(SHAPES[0])
    assert description[11] == len(plan.weights())


def test_lowering_without_folding_has_the_same_description():
    model = small()
    folded = lower(model, SHAPES[1])
    shapes = lower(model, SHAPES[1], fold=False)
    assert serialize(folded, plan_memory(folded)).equal(serialize(shapes, plan_memory(shapes)))
    assert all(weight.is_meta for weight in shapes.weights())
    assert [w.shape for w in shapes.weights()] == [w.shape for w in folded.weights()]


def test_a_plan_does_not_follow_its_module():
    model = small()
    plan = lower(model, SHAPES[0])
    before = [weight.clone() for weight in plan.weights()]
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert all(a.equal(b) for a, b in zip(before, plan.weights(), strict=True))


def test_a_plan_prints_as_a_table():
    text = str(lower(small(), SHAPES[0], fold=False))
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["step", "module", "operation"]
    assert re.search(r"base\.3\.conv1 +bn-relu conv1x1 bias relu +12 +32 +8x8", text)
    assert "base.11.layers.3" in text
    assert lines[-1].startswith("29 steps for input 1 x 3 x 32 x 32")


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace_conv(model):
    model.base[3].conv2 = Doubled(32, 8, 3, padding=1, bias=False)


def _dilate(model):
    model.base[3].conv2.dilation = (2, 2)


def _bias(model):
    model.base[0].conv = nn.Conv2d(3, 8, 3, 2, 1)


def _no_statistics(model):
    model.base[0].norm = nn.BatchNorm2d(8, track_running_stats=False)


def _another_norm(model):
    model.base[4].norm1 = nn.GroupNorm(1, 20)


def _unknown_activation(model):
    model.base[5].activation = "gelu"


def _ceil_mode(model):
    model.base[6].ceil_mode = True


def _identity(model):
    model.base[6] = nn.Identity()


def _own_forward(model):
    model.base[1].forward = lambda x: x


def _circular(model):
    model.base[1].conv.padding_mode = "circular"


@pytest.mark.parametrize("change", [_bias, _ceil_mode])
def test_settings_of_modules_are_those_of_plans(change):
    model = small()
    change(model)
    x = torch.randn(2, 3, 41, 38)
    plan = lower(model, x.shape)
    with torch.no_grad(), tf.use_backend("reference"):
        expected = model.double()(x.double())
    torch.testing.assert_close(execute_reference(plan, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        _replace_conv,
        _dilate,
        _no_statistics,
        _another_norm,
        _unknown_activation,
        _identity,
        _own_forward,
        _circular,
    ],
)
def test_modules_that_a_plan_cannot_express_are_refused(change):
    model = small()
    change(model)
    with pytest.raises(UnsupportedModule, match=r"base\.\d+"):
        lower(model, (1, 3, 32, 32))


def test_bad_arguments():
    model = small()
    with pytest.raises(UnsupportedModule, match="module is a Linear: expected a Network"):
        lower(nn.Linear(1, 1), (1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"input_shape is \(1, 4, 32, 32\): expected \(N, 3"):
        lower(model, (1, 4, 32, 32))
    with pytest.raises(ValueError, match="input_shape is"):
        lower(model, (0, 3, 32, 32))
    with pytest.raises(ValueError, match=f"at least {model.min_size}"):
        lower(model, (1, 3, model.min_size - 1, 32))
