"""Whole networks through the Triton executor: step by step, interpreted and emulated."""

from __future__ import annotations

import threading

import pytest
import torch
from test_engine import separate_arena
from test_plan import small
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from threshnet_fast.kernels import dense_layer

import threshnet_fast as tf
from emulation.driver import emulated
from emulation.interpreter import interpreted
from threshnet_fast.backends import triton, triton_plan
from threshnet_fast.backends.triton_plan import TritonPlan, pack_network
from threshnet_fast.plan import FusedConv, Head, execute_reference, lower

CPU = torch.device("cpu")


def exact_step(step, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """One step in float64: result, squared and absolute products added up, products in a sum."""
    if isinstance(step, FusedConv):
        size = x.abs()
        if step.prologue is not None:
            scale, shift = (
                vector.double()[:, None, None]
                for vector in (step.prologue.scale, step.prologue.shift)
            )
            size = size * scale.abs() + shift.abs()
            x = functional.relu(x * scale + shift)
        weight = step.weight.double()
        bias = None if step.bias is None else step.bias.double()
        window = {"stride": step.stride, "padding": step.padding}
        y = functional.conv2d(x, weight, bias, **window)
        energy = functional.conv2d(size.square(), weight.square(), **window)
        magnitude = functional.conv2d(
            size, weight.abs(), None if bias is None else bias.abs(), **window
        )
        length = weight[0].numel() + 1
        return functional.relu(y) if step.relu else y, energy, magnitude, length
    if isinstance(step, Head):
        pooled, size = x.mean((2, 3)), x.abs().mean((2, 3))
        weight = step.weight.double()
        y = functional.linear(pooled, weight, step.bias.double())
        energy = functional.linear(size.square(), weight.square())
        magnitude = functional.linear(size, weight.abs(), step.bias.double().abs())
        return y, energy, magnitude, x[0].numel() + 1
    assert not step.average
    y = functional.max_pool2d(x, step.kernel, step.stride, step.padding)
    return y, torch.zeros_like(y), torch.zeros_like(y), 1


def check_step_by_step(model, x: Tensor, dtype: torch.dtype) -> list[str]:
    """Runs a network in poisoned memory and compares each step with float64 on its own input.

    Returns the algorithms.
    """
    plan = lower(model, x.shape)
    whole = TritonPlan(plan, triton.target(CPU, dtype), arena=separate_arena(plan))
    packed = pack_network(plan, dtype)
    workspace = whole._workspace(0, packed)
    for memory in (workspace._arena, workspace._floats, workspace._scratch):
        memory.fill_(torch.nan)
    x = x.to(dtype)
    y = whole(x, packed)

    def read(segment, channels: int) -> Tensor:
        view = workspace._view(segment, x, y)
        return view[:, :channels].double()

    factor = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    fused_before = False
    for index, (step, algorithm) in enumerate(zip(plan.steps, whole.algorithms, strict=True)):
        fused_with_next = algorithm.startswith("dense layer")
        if fused_with_next:
            fused_before = True
            continue
        inputs = [read(segment, segment.channels) for segment in step.inputs]
        extra = 0.0
        if fused_before:
            first = plan.steps[index - 1]
            exact, energy, magnitude, length = exact_step(
                first, torch.cat([read(s, s.channels) for s in first.inputs], 1)
            )
            inner = accumulated_bound(exact, energy, magnitude, length, store=factor, factor=factor)
            inputs = [exact]
            extra = functional.conv2d(inner, step.weight.double().abs(), padding=step.padding)
            fused_before = False
        exact, energy, magnitude, length = exact_step(step, torch.cat(inputs, 1))
        # Weights are folded in float32 and rounded when they are packed.
        bound = extra + accumulated_bound(
            exact, energy, magnitude, length, store=factor, factor=2 * factor
        )
        if isinstance(step, Head):
            assert_within(y, exact, bound)
            continue
        assert_within(read(step.output, step.output.channels), exact, bound)
        # Of a dense block's buffer the next layer overwrites what is behind a layer's channels.
        end = step.output.channel + step.output.channels
        if not any(
            other.output.buffer == step.output.buffer and other.output.channel == end
            for other in plan.steps
        ):
            behind = workspace._view(step.output, x, y)[:, step.output.channels :]
            assert (behind == 0).all()
    return whole.algorithms


def first_blocks_of_threshnet79() -> tf.ThreshNet:
    return tf.ThreshNet(
        blocks=(6, 8),
        transitions=(128, 192),
        downsample=(True, True),
        growth_rates=(32, 32),
        threshold=2,
        num_classes=10,
    ).eval()


def odd() -> tf.ThreshNet:
    """Channels that fill no group, in dense and harmonic blocks."""
    return tf.ThreshNet(
        first_channels=(20, 36),
        blocks=(2, 3, 4),
        transitions=(44, 52, 60),
        downsample=(True, False, False),
        growth_rates=(12, 10, 14),
        threshold=1,
        num_classes=7,
        in_chans=4,
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_steps_interpreted(randomised, dtype: torch.dtype) -> None:
    with interpreted():
        check_step_by_step(randomised(odd()), torch.randn(2, 4, 40, 36), dtype)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("sm_80", torch.float16), ("sm_90", torch.bfloat16)]
)
def test_steps_emulated(randomised, architecture: str, dtype: torch.dtype) -> None:
    with emulated(architecture):
        check_step_by_step(randomised(odd()), torch.randn(1, 4, 32, 33), dtype)


@pytest.fixture
def dense_layers_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_layer, "pays", lambda problem: True)


@pytest.mark.usefixtures("dense_layers_in_one_kernel")
def test_dense_layers_interpreted(randomised) -> None:
    with interpreted():
        algorithms = check_step_by_step(randomised(odd()), torch.randn(2, 4, 40, 36), torch.float32)
    assert algorithms.count("dense layer in one kernel") == 2


@pytest.mark.usefixtures("dense_layers_in_one_kernel")
def test_dense_layers_emulated(randomised) -> None:
    with emulated("sm_80"):
        check_step_by_step(randomised(odd()), torch.randn(2, 4, 32, 33), torch.float16)


@pytest.mark.parametrize(
    "architecture",
    [
        "sm_80",
        "sm_90",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("sm_75", "sm_89", "sm_120")),
    ],
)
def test_first_blocks_of_threshnet79_emulated(randomised, architecture: str) -> None:
    model = randomised(first_blocks_of_threshnet79())
    with emulated(architecture):
        check_step_by_step(model, torch.randn(1, 3, 32, 32), torch.float16)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.sweep)]
)
def test_threshnet79_interpreted(randomised, dtype: torch.dtype) -> None:
    """The whole network as a user calls it; float32 errs at most twice as PyTorch does."""
    model = randomised(tf.ThreshNet79(num_classes=10).eval())
    x = torch.randn(1, 3, 32, 32)
    exact = execute_reference(lower(model, x.shape), x)
    with torch.no_grad(), tf.use_backend("reference"):
        allowed = 2 * (model(x) - exact).abs().max()
    if dtype != torch.float32:
        allowed = 0.02 * exact.abs().max()
    with torch.no_grad(), interpreted(), tf.use_backend("triton"):
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= allowed


def plain(model, x: Tensor) -> Tensor:
    with torch.no_grad(), tf.use_backend("reference"):
        return model(x)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def model(randomised):
    return randomised(small())


def test_calls_do_not_share_outputs(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), interpreted(), tf.use_backend("triton"):
        first = model(x)
        before = first.clone()
        second = model(2 * x)
    assert first.equal(before)
    assert_same(second, plain(model, 2 * x))


def test_features_have_the_format_of_channels_last(model) -> None:
    x = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), interpreted(), tf.use_backend("triton"):
        features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_same(features, model._plain_features(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1::2],
        lambda x: x[:1].expand(3, -1, -1, -1)[..., :32, :32],
        lambda x: x.transpose(2, 3)[..., :40],
    ],
)
def test_inputs_of_any_strides(model, view) -> None:
    x = view(torch.randn(2, 3, 64, 80))
    with torch.no_grad(), interpreted(), tf.use_backend("triton"):
        assert_same(model(x), plain(model, x))


def test_changed_weights_are_packed_again(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), interpreted(), tf.use_backend("triton"):
        before = model(x)
        model.base[1].conv.weight.data.mul_(2)
        after = model(x)
    assert not torch.allclose(before, after, rtol=1e-2)
    assert_same(after, plain(model, x))


def test_explain_names_the_kernels(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), emulated("sm_90") as log, tf.use_backend("triton"):
        explanation = tf.explain(model, x)
        assert len(log) == 0
    assert explanation.backend == "triton"
    assert "sm_90" in explanation.reason
    assert any("implicit GEMM" in name for name in explanation.algorithms)


def test_auto_stays_on_the_cpu_for_tensors_there(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), emulated("sm_80"):
        assert tf.explain(model, x).backend != "triton"


def test_autocast_computes_in_its_dtype(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with (
        torch.no_grad(),
        interpreted(),
        tf.use_backend("triton"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = model(x)
    assert y.dtype == torch.bfloat16
    expected = plain(model, x)
    assert (y - expected).abs().max() <= 0.03 * expected.abs().max()


def test_frozen(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with interpreted(), tf.use_backend("triton"):
        fast = tf.optimize(model, x, dtype=torch.float16)
        y = fast(x.half())
    assert fast.backend == "triton"
    assert y.dtype == torch.float16
    expected = plain(model, x)
    assert (y - expected).abs().max() <= 0.01 * expected.abs().max()


def test_objections_name_the_cause(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), tf.use_backend("triton"):
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=r"'triton' cannot run this call.*no device"):
                model(x)
        with interpreted():
            with pytest.raises(RuntimeError, match=r"one of .* these tensors are torch.float64"):
                model.double()(x.double())
            model.half().base[0].norm.float()
            with pytest.raises(RuntimeError, match=r"weights of dtype torch\.float32, expected"):
                model(x.half())


def test_threads_take_turns(model) -> None:
    xs = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    results: dict[int, Tensor] = {}

    def call(index: int) -> None:
        with torch.no_grad(), tf.use_backend("triton"):
            results[index] = model(xs[index])

    with interpreted():
        threads = [threading.Thread(target=call, args=(index,)) for index in range(len(xs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, x in enumerate(xs):
        assert_same(results[index], plain(model, x))


def test_more_pixels_than_indices_reach_are_refused(model) -> None:
    plan = lower(model, (2**31 // (32 * 32), 3, 32, 32), fold=False)
    target = triton_plan.Target(CPU, torch.float16, "ieee", "sm_90", 132)
    with pytest.raises(ValueError, match=r"2147483648 pixels"):
        TritonPlan(plan, target)
