"""Whole networks through the CUDA executor, on its kernels as g++ compiles and fibers run them."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_engine import separate_arena
from test_plan import small
from torch import Tensor

import threshnet_fast as tf
from emulation.cuda_operators import emulated_cuda, skip_reason
from emulation.networks import check_steps, first_blocks_of_threshnet79, odd
from threshnet_fast import environment
from threshnet_fast.engines import base, cuda, cuda_graphs, samples, select, triton
from threshnet_fast.engines.cuda_plan import CudaPlan, Target, pack_network
from threshnet_fast.plan import UnsupportedModule, limits, lower
from threshnet_fast.plan.ir import Segment
from threshnet_fast.plan.lower import PlanSource

pytestmark = [
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
    pytest.mark.usefixtures("one_thread"),
]

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GROUP = 16
POISON = 0xFF
"""A byte that makes NaN of every dtype."""


def check_step_by_step(model, x: Tensor, dtype: torch.dtype) -> list[str]:
    """Runs a network in poisoned memory and compares each step with float64 on its own input.

    Returns the algorithms.
    """
    plan = lower(model, x.shape)
    target = cuda.target(CPU, dtype)
    whole = CudaPlan(plan, target, arena=separate_arena(plan))
    packed = pack_network(plan, target)
    memory = whole._workspace(0, packed)._memory.fill_(POISON)
    x = x.to(dtype)
    y = whole(x, packed)

    def view(segment: Segment) -> Tensor:
        """A segment with all of its last group."""
        buffer = plan.buffers[segment.buffer]
        offset = whole.arena.offsets[segment.buffer]
        if offset is None:
            return x if segment.buffer == 0 else y[:, :, None, None]
        pitch = whole.arena.pitches[segment.buffer]
        channels = -(-(segment.channel + segment.channels) // GROUP) * GROUP - segment.channel
        row = buffer.width * pitch
        return (
            memory[: whole.arena_bytes]
            .view(dtype)
            .as_strided(
                (x.shape[0], channels, buffer.height, buffer.width),
                (buffer.height * row, 1, row, pitch),
                offset + segment.channel,
            )
        )

    check_steps(plan, whole.algorithms, view, y)
    return whole.algorithms


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_steps(randomised, architecture: str, dtype: torch.dtype) -> None:
    if architecture == "sm_75" and dtype is torch.bfloat16:
        pytest.skip("sm_75 has no bfloat16")
    with emulated_cuda(architecture):
        check_step_by_step(randomised(odd()), torch.randn(2, 4, 40, 36), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_steps_of_threshnet79(randomised, dtype: torch.dtype) -> None:
    model = randomised(tf.ThreshNet79(num_classes=10).eval())
    with emulated_cuda():
        algorithms = check_step_by_step(model, torch.randn(1, 3, 32, 32), dtype)
    assert any("reduction in" in name for name in algorithms)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_120"])
def test_first_blocks_of_threshnet79(randomised, architecture: str) -> None:
    model = randomised(first_blocks_of_threshnet79())
    with emulated_cuda(architecture):
        check_step_by_step(model, torch.randn(2, 3, 32, 33), torch.float16)


def plain(model, x: Tensor) -> Tensor:
    with torch.no_grad(), tf.use_backend("reference"):
        return model(x)


def exact(model, x: Tensor) -> Tensor:
    return plain(copy.deepcopy(model).double(), x.double())


@pytest.fixture
def model(randomised) -> tf.ThreshNet:
    return randomised(small())


@pytest.fixture
def on_cuda() -> Iterator[None]:
    """Runs networks on the CUDA executor, or refuses to."""
    with torch.no_grad(), emulated_cuda(), tf.use_backend("cuda"):
        yield


def assert_as_exact_as_pytorch(actual: Tensor, other: Tensor, expected: Tensor) -> None:
    """The error is at most twice that of PyTorch in the same precision, both root mean square."""
    assert actual.shape == expected.shape
    error, own = ((y.double() - expected).square().mean().sqrt() for y in (actual, other))
    assert error <= 2 * own, (error, own)


def check(model, x: Tensor) -> Tensor:
    y = model(x)
    assert y.dtype == x.dtype
    assert_as_exact_as_pytorch(y, plain(model, x), exact(model, x))
    return y


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_threshnet79(randomised, dtype: torch.dtype) -> None:
    """As a user calls it."""
    model = randomised(tf.ThreshNet79(num_classes=10).eval()).to(dtype)
    check(model, torch.randn(4, 3, 32, 32).to(dtype))


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 47), (5, 64, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shapes_and_batches(model, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, height, width = shape
    check(model.to(dtype), torch.randn(batch, 3, height, width).to(dtype))


@pytest.mark.sweep
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("name", ["threshnet79", "threshnet95"])
def test_larger_inputs(randomised, name: str, dtype: torch.dtype) -> None:
    model = randomised(tf.create_model(name, num_classes=10).eval()).to(dtype)
    for shape in ((2, 3, 64, 64), (3, 3, 96, 33)):
        check(model, torch.randn(shape).to(dtype))


@pytest.mark.usefixtures("on_cuda")
def test_results_are_the_same_every_time(model) -> None:
    x = torch.randn(2, 3, 40, 36)
    first = model(x)
    assert all(model(x).equal(first) for _ in range(3))


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_results_do_not_depend_on_the_order_of_threads(model, order: str) -> None:
    x = torch.randn(1, 3, 32, 32).half()
    with torch.no_grad(), emulated_cuda() as library, tf.use_backend("cuda"):
        model = model.half()
        expected = model(x)
        with library.schedule(order, 7):
            assert model(x).equal(expected)


@pytest.mark.usefixtures("on_cuda")
def test_calls_do_not_share_outputs(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    first = model(x)
    before = first.clone()
    check(model, 2 * x)
    assert first.equal(before)


@pytest.mark.usefixtures("on_cuda")
def test_features_have_the_format_of_channels_last(model) -> None:
    """And share packed weights with the network that ends with its logits."""
    x = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    logits, features = model(x), model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, model._plain_features(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_head(features), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}])
def test_without_classifier(randomised, arguments) -> None:
    check(randomised(small(**arguments)), torch.randn(2, 3, 40, 36))


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1::2],
        lambda x: x[:1].expand(3, -1, -1, -1)[..., :32, :32],
        lambda x: x.transpose(2, 3)[..., :40],
        lambda x: x.contiguous(memory_format=torch.channels_last)[1:],
    ],
)
def test_inputs_of_any_strides(model, view) -> None:
    check(model, view(torch.randn(2, 3, 64, 80)))


@pytest.mark.usefixtures("on_cuda")
def test_changed_weights_are_packed_again(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    model.base[1].conv.weight.data.mul_(2)
    assert not torch.allclose(before, check(model, x), rtol=1e-2)


@pytest.mark.usefixtures("on_cuda")
def test_weights_are_packed_once_for_all_shapes(model) -> None:
    for size in (32, 40, 48):
        check(model, torch.randn(1, 3, size, 32))
    plans = model._fused._snapshot.plans.of(cuda.ENGINE)
    assert len(plans) == 3
    assert list(plans._packed) == [torch.float32]


@pytest.mark.usefixtures("on_cuda")
def test_explain_names_the_kernels(model) -> None:
    explanation = tf.explain(model, torch.randn(1, 3, 32, 32))
    assert explanation.backend == "cuda"
    assert "CUDA C++ kernels for sm_90" in explanation.reason
    assert len(explanation.algorithms) == len(explanation.plan.steps)
    assert any("implicit GEMM" in name for name in explanation.algorithms)


def test_auto_stays_on_the_cpu_for_tensors_there(model) -> None:
    with torch.no_grad(), emulated_cuda():
        assert tf.explain(model, torch.randn(1, 3, 32, 32)).backend != "cuda"


@pytest.mark.usefixtures("on_cuda")
def test_autocast_computes_in_its_dtype(model) -> None:
    x = torch.randn(8, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    low = copy.deepcopy(model).bfloat16()
    assert_as_exact_as_pytorch(y, plain(low, x.bfloat16()), exact(model, x))


@pytest.mark.usefixtures("on_cuda")
def test_frozen(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    fast = tf.optimize(model, x, dtype=torch.float16)
    assert fast.backend == "cuda"
    assert "CUDA C++ kernels for sm_90" in fast.reason
    y = fast(x.half())
    model.base[1].conv.weight.data.mul_(2)
    assert fast(x.half()).equal(y)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float32"):
        fast(x)


def test_objections_name_the_cause(model) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), tf.use_backend("cuda"):
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=r"'cuda' cannot run this call: .*unavailable"):
                model(x)
        with emulated_cuda("sm_75"):
            with pytest.raises(RuntimeError, match=r"sm_80 or newer for torch\.bfloat16"):
                copy.deepcopy(model).bfloat16()(x.bfloat16())
            with pytest.raises(RuntimeError, match=r"one of .* these tensors are torch\.float64"):
                copy.deepcopy(model).double()(x.double())
            with torch.enable_grad(), pytest.raises(RuntimeError, match="gradients are wanted"):
                model(x)
            model.half().base[0].norm.float()
            with pytest.raises(RuntimeError, match=r"weights of dtype torch\.float32, expected"):
                model(x.half())


def test_threads_take_turns(model) -> None:
    xs = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    results: dict[int, Tensor] = {}

    def call(index: int) -> None:
        with torch.no_grad(), tf.use_backend("cuda"):
            results[index] = model(xs[index])

    with emulated_cuda():
        threads = [threading.Thread(target=call, args=(index,)) for index in range(len(xs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, x in enumerate(xs):
        torch.testing.assert_close(results[index], plain(model, x), rtol=1e-4, atol=1e-5)


def test_more_pixels_than_indices_reach_are_refused(model) -> None:
    plan = lower(model, (2**31 // (32 * 32), 3, 32, 32), fold=False)
    with pytest.raises(UnsupportedModule, match=r"2147483648 pixels"):
        CudaPlan(plan, Target(CPU, torch.float16, 90, 132, 227 * 1024))


class TestOperators:
    """What the executor's own operators refuse, before they touch memory."""

    @pytest.fixture
    def parts(self, model) -> Iterator[dict[str, Tensor]]:
        plan = lower(model, (2, 3, 32, 32))
        with emulated_cuda():
            target = cuda.target(CPU, torch.float16)
            compiled = CudaPlan(plan, target)
            yield {
                "x": torch.randn(2, 3, 32, 32).half(),
                "program": compiled.program,
                "packed": pack_network(plan, target),
                "workspace": torch.empty(compiled.workspace_bytes, dtype=torch.uint8),
            }

    def test_runs(self, parts) -> None:
        assert torch.ops.threshnet_fast_cuda.run_plan(**parts).isfinite().all()

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("x", Tensor.float, "x has another dtype than the program"),
            ("x", lambda x: x[:1], r"x has shape \[1, 3, 32, 32\], which is not what"),
            ("x", lambda x: x[0], "x has shape .* expected four dimensions"),
            ("program", lambda t: t[:-1], "program is not one"),
            ("program", lambda t: t.int(), "program has the wrong dtype"),
            ("packed", lambda t: t[:-1], "packed does not belong to program"),
            ("packed", lambda t: t.view(torch.half), "packed has the wrong dtype"),
            ("workspace", lambda t: t[1:], "workspace is too small"),
            ("workspace", lambda t: t[::2], "workspace is not contiguous"),
        ],
    )
    def test_bad_input(self, parts, name: str, change, message: str) -> None:
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.threshnet_fast_cuda.run_plan(**{**parts, name: change(parts[name])})

    def test_weights_of_another_network(self, parts) -> None:
        plan = lower(small(num_classes=9), (2, 3, 32, 32))
        pack = torch.ops.threshnet_fast_cuda.pack_weights
        with pytest.raises((RuntimeError, ValueError), match=r"elements, expected"):
            pack(parts["program"], plan.weights())
        with pytest.raises((RuntimeError, ValueError), match=r"weights has 1 tensors, expected"):
            pack(parts["program"], plan.weights()[:1])


def test_takes_over_where_triton_cannot_compile(model, monkeypatch) -> None:
    """On a GPU; here both backends have their tensors on the CPU."""
    pytest.importorskip("triton")
    from emulation.interpreter import interpreted
    from threshnet_fast.engines.triton_plan import TritonWorkspace

    calls: list[str] = []

    def fail(self, x: Tensor) -> Tensor:
        calls.append("triton")
        raise base.CompilationFailed("Triton cannot compile this")

    monkeypatch.setattr(select, "_fused_backends", lambda name, x: ("triton", "cuda"))
    monkeypatch.setattr(TritonWorkspace, "launch", fail)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), interpreted(), emulated_cuda():
        for _ in range(2):
            check(model, x)
        # What failed once is not tried again.
        assert calls == ["triton"]
        assert tf.explain(model, x).backend == "cuda"
        fast = tf.optimize(model, x)
    assert fast.backend == "cuda"
    assert fast.reason.startswith("Triton cannot compile this; torch.float32 on cpu, CUDA C++")


def test_plain_pytorch_where_neither_can(model, monkeypatch) -> None:
    monkeypatch.setattr(select, "_fused_backends", lambda name, x: ("triton", "cuda"))
    monkeypatch.setattr(limits, "MAX_PIXELS", 100)
    for module in (triton, cuda):
        monkeypatch.setattr(module.ENGINE, "objection", lambda *_: None)
    monkeypatch.setattr(triton, "target", lambda *_: Target(CPU, torch.float32, 90, 132, 0))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), emulated_cuda():
        explanation = tf.explain(model, x)
        assert model(x).equal(plain(model, x))
    assert explanation.backend == "reference"
    assert explanation.reason.count("pixels, more than 100") == 2


def test_kernels_that_do_not_start_are_an_objection(monkeypatch) -> None:
    """As where the library was built for other devices."""
    x = torch.ones(1, 1, 1, 1)
    with emulated_cuda():
        cuda._first_launch_failure.cache_clear()
        assert cuda.ENGINE.objection(x) is None
        cuda._first_launch_failure.cache_clear()
        operator = mock.Mock(side_effect=RuntimeError("no kernel image is available\nhere"))
        monkeypatch.setattr(torch.ops.threshnet_fast_cuda, "cat_conv_bn_relu", operator)
        try:
            for _ in range(2):
                with pytest.raises(
                    RuntimeError, match=r"do not start on cpu: no kernel image .*e$"
                ):
                    raise cuda.ENGINE.objection(x)
            operator.assert_called_once()
            monkeypatch.setattr(cuda_graphs, "capturing", lambda device: True)
            assert cuda.ENGINE.objection(x) is None
        finally:
            cuda._first_launch_failure.cache_clear()


def test_runs_where_triton_is_not_installed() -> None:
    code = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "tests")
import torch
from emulation.cuda_operators import emulated_cuda
from test_plan import small
import threshnet_fast as tf
from threshnet_fast import environment
from threshnet_fast.engines import triton
assert triton.unavailable_reason() == "triton is not installed"
model, x = small(), torch.randn(1, 3, 32, 32)
with torch.no_grad(), emulated_cuda(), tf.use_backend("cuda"):
    y = model(x)
    assert tf.explain(model, x).backend == "cuda"
with torch.no_grad(), tf.use_backend("reference"):
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    weight, one = torch.randn(2, 3, 1, 1, requires_grad=True), torch.ones(2)
with emulated_cuda():
    y = tf.ops.cat_conv_bn_relu([x], weight, one, one, padding=0, backend="cuda")
    y.sum().backward()
assert weight.grad is not None
print("done")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.stdout == "done\n", run.stderr


def test_samples_notice_what_is_written(randomised) -> None:
    """Which stands in for Triton's kernel where there is none."""
    parameters = [p.detach() for p in randomised(small()).parameters()]
    parameters += [parameters[0].half(), parameters[0].to(memory_format=torch.channels_last)]
    views = samples.sample(parameters)
    before = samples.read(views)
    assert samples.read(views).equal(before)
    for parameter in parameters:
        kept = parameter.clone()
        for change in (Tensor.neg_, lambda t: t.add_(1)):
            change(parameter)
            # Both zeros are different bits.
            assert not samples.read(views).equal(before)
            parameter.copy_(kept)
            assert samples.read(views).equal(before)
    parameters[0].flatten()[0] = torch.nan
    found = samples.read(views)
    assert found.equal(samples.read(views))
    assert not found.equal(before)


def test_graphs_follow_the_switch(monkeypatch) -> None:
    monkeypatch.setenv(environment.CUDA_GRAPHS, "0")
    source = PlanSource(small())
    with emulated_cuda():
        for graphs in (False, True):
            setting = cuda.ENGINE.setting(torch.device("cuda", 0), torch.float16)
            prepared = cuda.ENGINE.prepare(source, (1, 3, 32, 32), head=True, setting=setting)
            assert prepared._graphs == graphs
            monkeypatch.delenv(environment.CUDA_GRAPHS, raising=False)
