"""Whole networks through the Triton executor: step by step, interpreted and emulated."""

from __future__ import annotations

import threading

import pytest
import torch
from test_engine import separate_arena
from test_plan import small
from torch import Tensor

pytest.importorskip("triton")

from threshnet_fast.kernels import dense_layer

import threshnet_fast as tf
from emulation.driver import emulated
from emulation.interpreter import interpreted
from emulation.networks import check_steps, first_blocks_of_threshnet79, odd
from threshnet_fast.engines import triton, triton_plan
from threshnet_fast.engines.triton_plan import TritonPlan, pack_network
from threshnet_fast.plan import execute_reference, lower

CPU = torch.device("cpu")


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
    check_steps(plan, whole.algorithms, lambda segment: workspace._view(segment, x, y), y)
    return whole.algorithms


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
