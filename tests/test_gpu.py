"""Networks and operators on a GPU: what only a GPU can show, and what must hold there too.

    pytest -m gpu

Most tests run twice there: on Triton, and on the CUDA C++ kernels as if Triton were not installed.
Tests that ask for a ``place`` also run without a GPU, with ``--sweep``: in Triton's interpreter and
on the emulated CUDA kernels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from emulation import operators
from op_cases import CASES, LAYOUTS, SMALL, Case, vectors
from test_plan import small
from torch import Tensor, nn

import threshnet_fast as tf
from threshnet_fast import environment
from threshnet_fast.engines import cuda, select, triton
from threshnet_fast.runtime.frozen import FrozenNetwork

GPU = torch.device("cuda")

gpu = pytest.mark.gpu

# About 20 ms on any GPU: longer than the host takes to enqueue what a test calls.
CYCLES = 40_000_000


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that ``"auto"`` takes on the GPU."""
    with taken_by_auto(request.param):
        yield request.param


@contextlib.contextmanager
def taken_by_auto(backend: str) -> Iterator[None]:
    """Has ``"auto"`` take a backend on the GPU: ``"cuda"`` by leaving Triton out."""
    if backend == "triton":
        yield
        return
    reason = cuda.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    with mock.patch.object(triton, "unavailable_reason", return_value="left out by the test"):
        yield


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.gpu),
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton interpreted", marks=pytest.mark.sweep),
        pytest.param("cuda emulated", marks=pytest.mark.sweep),
    ]
)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test's tensors are; a backend for a GPU runs the networks there."""
    backend, _, pretence = request.param.partition(" ")
    if not pretence:
        with taken_by_auto(backend):
            yield GPU
        return
    with pretended(backend), tf.use_backend(backend):
        yield torch.device("cpu")


@contextlib.contextmanager
def pretended(backend: str) -> Iterator[None]:
    """Runs a backend for a GPU on tensors in the CPU's memory."""
    if backend == "cuda":
        from emulation.cuda_operators import emulated_cuda, skip_reason

        reason = skip_reason()
        if reason is not None:
            pytest.skip(reason)
        with emulated_cuda():
            yield
        return
    pytest.importorskip("triton")
    from emulation.interpreter import interpreted

    for name in ("backends.triton_plan", "kernels.cat_bn_relu_conv", "kernels.cat_conv_bn_relu"):
        importlib.import_module(f"threshnet_fast.{name}")
    with interpreted():
        yield


def expected_backend() -> str:
    """The backend that has to run a network, as the fixtures above have set things up."""
    requested = select.requested_backend()
    if requested != "auto":
        return requested
    return "triton" if triton.unavailable_reason() is None else "cuda"


@contextlib.contextmanager
def multiplied(precision: str) -> Iterator[None]:
    """Has PyTorch multiply float32 in ``"ieee"`` or ``"tf32"`` arithmetic, and so Triton.

    The CUDA kernels never take TF32.
    """
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@pytest.fixture(autouse=True)
def ieee_arithmetic() -> Iterator[None]:
    """PyTorch's convolutions are in TF32 unless told otherwise, too coarse to compare with."""
    with multiplied("ieee"):
        yield


def plain(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), tf.use_backend("reference"):
        return model(x)


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """The output in float64, on the CPU."""
    return plain(copy.deepcopy(model).cpu().double(), x.cpu().double())


def fused(model: nn.Module, x: Tensor) -> Tensor:
    """The output of ``model(x)``, which a backend for a GPU computes."""
    with torch.no_grad():
        explanation = tf.explain(model, x)
        assert explanation.backend == expected_backend(), explanation.reason
        return model(x)


def assert_as_exact_as_pytorch(
    actual: Tensor, other: Tensor, expected: Tensor, unit_roundoff: float
) -> None:
    """The largest error is at most four times PyTorch's, or four roundings of the largest output.

    Args:
        actual: What is tested.
        other: The output of plain PyTorch in the same precision.
        expected: The output in float64.
        unit_roundoff: Of the precision of the products.
    """
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error, own = ((y.cpu().double() - expected).abs().max() for y in (actual, other))
    assert error <= 4 * own + 4 * unit_roundoff * expected.abs().max(), (error, own)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """For float32 outputs of two ways to compute the same."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * largest)


def captured_graphs(owner: object) -> int:
    """How many CUDA graphs a model or a frozen network replays."""
    frozen = isinstance(owner, FrozenNetwork)
    caches = [owner._plans] if frozen else owner._fused._snapshot.plans._caches.values()
    plans = [cached.plan for cache in caches for cached in cache._plans.values()]
    workspaces = [workspace for plan in plans for workspace in plan._workspaces.values()]
    return sum(workspace._graph is not None for workspace in workspaces)


def photograph_like(batch: int, height: int, width: int) -> Tensor:
    """Numbers in the range of normalised photographs, smooth and different in every image."""
    generator = torch.Generator().manual_seed(batch * height + width)
    coarse = torch.randn(batch, 3, 7, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


@pytest.fixture
def model(randomised, place: torch.device) -> tf.ThreshNet:
    return randomised(small()).to(place)


@pytest.fixture
def x(place: torch.device) -> Tensor:
    return photograph_like(2, 40, 36).to(place)


@pytest.fixture
def network(randomised, engine: str) -> tf.ThreshNet:
    """A small network on the GPU, for tests that need one."""
    return randomised(small()).cuda()


# What must hold on a GPU as it does in the interpreter.


@pytest.mark.parametrize(
    ("dtype", "precision", "unit_roundoff"),
    [
        (torch.float32, "ieee", 2.0**-24),
        (torch.float32, "tf32", 2.0**-11),
        (torch.float16, "ieee", 2.0**-11),
        (torch.bfloat16, "ieee", 2.0**-8),
    ],
)
def test_small_network(model, x, dtype, precision, unit_roundoff) -> None:
    model, x = model.to(dtype), x.to(dtype)
    with multiplied(precision):
        y, other = fused(model, x), plain(model, x)
    assert y.dtype == dtype
    assert_as_exact_as_pytorch(y, other, exact(model, x), unit_roundoff)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(model, x, dtype, place) -> None:
    with torch.autocast(place.type, dtype), torch.no_grad():
        assert tf.explain(model, x).backend == expected_backend()
        y = model(x)
    assert y.dtype == dtype
    expected = exact(model, x)
    unit_roundoff = torch.finfo(dtype).eps / 2
    low = copy.deepcopy(model).to(dtype)
    assert_as_exact_as_pytorch(y, plain(low, x.to(dtype)), expected, unit_roundoff)
    # Without autocast, the same model is float32 again.
    assert_close(fused(model, x), plain(model, x))


def test_any_strides(model, place) -> None:
    wide = photograph_like(3, 64, 72).to(place)
    for x in (
        wide.contiguous(memory_format=torch.channels_last),
        wide[:, :, ::2, 1::2],
        wide[:1].expand(2, -1, -1, -1),
        wide.transpose(2, 3),
        wide[1:, :, 3:40, 5:38],
    ):
        expected = plain(model, x)
        for _ in range(3):
            assert_close(fused(model, x), expected)


def test_outputs_are_not_overwritten_and_inputs_may_change(model, x) -> None:
    inputs = [x * (1 + i) for i in range(4)]
    outputs = [fused(model, each) for each in inputs]
    for each, output in zip(inputs, outputs, strict=True):
        assert_close(output, plain(model, each))
    pointers = {output.data_ptr() for output in outputs}
    assert len(pointers) == len(outputs)
    # The same memory with other contents.
    for scale in (0.5, -1.0, 3.0):
        x.mul_(scale)
        assert_close(fused(model, x), plain(model, x))


def test_output_may_be_written_to(model, x) -> None:
    expected = plain(model, x)
    for _ in range(4):
        y = fused(model, x)
        assert_close(y, expected)
        y.fill_(torch.nan)


def test_features_and_head(model, x) -> None:
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert_close(model.forward_head(features), fused(model, x))
    with torch.no_grad(), tf.use_backend("reference"):
        assert_close(features, model.forward_features(x))


def test_frozen(model, x, place) -> None:
    expected = plain(model, x)
    frozen = tf.optimize(model.train(), x)
    assert frozen.backend == expected_backend()
    with torch.no_grad():
        model.base[1].conv.weight.mul_(-2)
    for _ in range(3):
        assert_close(frozen(x), expected)
    half = tf.optimize(model.eval(), x, dtype=torch.float16)
    low = copy.deepcopy(model).half()
    other, expected = plain(low, x.half()), exact(low, x.half())
    assert_as_exact_as_pytorch(half(x.half()), other, expected, 2.0**-11)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float32"):
        half(x)


def optimizer_step(model: nn.Module, x: Tensor) -> None:
    with tf.use_backend("reference"):
        model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def load_state_dict(model: nn.Module, x: Tensor) -> None:
    other = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(other)


def load_and_assign(model: nn.Module, x: Tensor) -> None:
    other = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def in_place(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.base[3].conv1.weight.mul_(-2)


def one_element(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.base[0].conv.weight[1, 2, 0, 1] = 9


def running_statistics(model: nn.Module, x: Tensor) -> None:
    model.base[1].norm.running_var.mul_(9)


def training_mode_forward(model: nn.Module, x: Tensor) -> None:
    model.train()
    with torch.no_grad(), tf.use_backend("reference"):
        model(x * 5 + 3)
    model.eval()


def new_parameter(model: nn.Module, x: Tensor) -> None:
    convolution = model.base[4].conv2
    convolution.weight = nn.Parameter(torch.randn_like(convolution.weight))


def data_in_place(model: nn.Module, x: Tensor) -> None:
    model.base[4].conv1.weight.data.mul_(-3)


def data_filled(model: nn.Module, x: Tensor) -> None:
    model.base[1].norm.bias.data.fill_(3)


def data_assigned(model: nn.Module, x: Tensor) -> None:
    convolution = model.base[4].conv1
    convolution.weight.data = torch.randn_like(convolution.weight)


def replaced_module(model: nn.Module, x: Tensor) -> None:
    model.base[1].conv = nn.Conv2d(8, 12, 3, 1, 1, bias=False).to(x)


def half_and_back(model: nn.Module, x: Tensor) -> None:
    model.half()
    fused(model, x.half())
    with torch.no_grad():
        model.base[1].conv.weight.mul_(-2)
    model.float()


def channels_last_weights(model: nn.Module, x: Tensor) -> None:
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.base[1].conv.weight.mul_(-2)


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        load_state_dict,
        load_and_assign,
        in_place,
        one_element,
        running_statistics,
        training_mode_forward,
        new_parameter,
        data_in_place,
        data_filled,
        data_assigned,
        replaced_module,
        half_and_back,
        channels_last_weights,
    ],
)
def test_changed_weights_are_noticed(model, x, change, place) -> None:
    # Often enough that a graph is replayed by then.
    for _ in range(3):
        before = fused(model, x)
    change(model, x)
    expected = plain(model, x)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-3)
    for _ in range(3):
        assert_close(fused(model, x), expected)


def test_training_and_evaluation_take_turns(model, x, place) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    backend = "auto" if place.type == "cuda" else "reference"
    for _ in range(3):
        model.train()
        statistics = model.base[1].norm.running_mean.clone()
        with tf.use_backend(backend):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not model.base[1].norm.running_mean.equal(statistics)
        model.eval()
        assert_close(fused(model, x), plain(model, x))


def test_asking_for_a_backend_where_it_cannot_run_names_the_cause(model, x) -> None:
    with tf.use_backend(expected_backend()):
        with pytest.raises(RuntimeError, match="gradients are wanted"):
            model(x)
        with torch.no_grad():
            handle = model.base[3].register_forward_hook(lambda *_: None)
            with pytest.raises(RuntimeError, match="forward hooks"):
                model(x)
            handle.remove()
            with pytest.raises(RuntimeError, match=r"one of .* these tensors are torch\.float64"):
                copy.deepcopy(model).double()(x.double())
            with pytest.raises(RuntimeError, match="training mode"):
                copy.deepcopy(model).train()(x)


@pytest.mark.parametrize("name", ["cat_bn_relu_conv", "cat_conv_bn_relu"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_operators_in_any_layout(place, name, layout) -> None:
    """Result and gradients; tests/emulation/ has more shapes and every dtype."""
    case = Case((3, 20), 2, (6, 5), 12, (3, 3), 1, 1)
    _, arguments = operator_arguments(name, case)
    outputs = []
    for where, dtype, backend in (
        (place, torch.float32, expected_backend()),
        (torch.device("cpu"), torch.float64, "reference"),
    ):
        leaves = [t.to(where, dtype).requires_grad_() for t in arguments]
        xs = [moved(LAYOUTS[layout], t) for t in leaves[:2]]
        with multiplied("ieee"):
            y = getattr(tf.ops, name)(xs, *leaves[2:], padding=1, backend=backend)
            grads = torch.autograd.grad(y.square().sum(), leaves)
        outputs.append([t.cpu().double() for t in (y.detach(), *grads)])
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


@gpu
@pytest.mark.parametrize("case", [*CASES, *operators.SMALL], ids=str)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_operators_of_the_cuda_kernels(precision, case) -> None:
    """As tests/emulation/test_cuda_operators.py, whose Triton twins run on a GPU too."""
    with taken_by_auto("cuda"):
        options = {"device": "cuda", "backend": "cuda", "gradients": False}
        operators.check_cat_bn_relu_conv(precision, case, **options)
        operators.check_cat_conv_bn_relu(precision, case, **options)


def operator_arguments(name: str, case: Case) -> tuple[object, list[Tensor]]:
    """An operator, and its segments and other tensors in order, on the CPU in float32."""
    operator = getattr(torch.ops.threshnet_fast, name).default
    segments, weight = case.segments(), case.weight()
    if name == "cat_bn_relu_conv":
        return operator, [*segments, *vectors(sum(case.channels)), weight]
    return operator, [*segments, weight, *vectors(case.out)]


def moved(layout: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """A differentiable copy with the strides that a layout has on the CPU."""
    sample = layout(torch.zeros(t.shape, dtype=t.dtype))
    length = sample.storage_offset() + 1
    length += sum((n - 1) * s for n, s in zip(sample.shape, sample.stride(), strict=True))
    memory = torch.full((length,), torch.nan, dtype=t.dtype, device=t.device)
    index = torch.arange(length).as_strided(sample.shape, sample.stride(), sample.storage_offset())
    filled = memory.index_put((index.flatten().to(t.device),), t.flatten())
    return filled.as_strided(sample.shape, sample.stride(), sample.storage_offset())


# What needs a GPU.


@gpu
@pytest.mark.parametrize("name", ["threshnet95", "threshnet79"])
def test_runs_fused_by_itself(randomised, name, engine) -> None:
    model = randomised(tf.create_model(name, num_classes=10).eval()).cuda()
    x = photograph_like(1, 64, 64).cuda()
    with torch.no_grad():
        explanation = tf.explain(model, x)
    assert explanation.backend == engine, explanation.reason
    kernels = triton.architecture() if engine == "triton" else cuda.architecture(x.device)
    assert kernels in explanation.reason
    assert any("implicit GEMM" in algorithm for algorithm in explanation.algorithms)
    assert tf.optimize(model, x).backend == engine
    choice = tf.show_config()["backend"]
    assert choice.startswith(f"auto: {engine} on CUDA devices")


@gpu
def test_takes_triton_before_the_cuda_kernels(randomised) -> None:
    model, x = randomised(small()).cuda(), photograph_like(1, 32, 32).cuda()
    with torch.no_grad():
        assert tf.explain(model, x).backend == "triton"
        if cuda.unavailable_reason() is None:
            with tf.use_backend("cuda"):
                assert tf.explain(model, x).backend == "cuda"


@gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_both_backends_agree(randomised, precision) -> None:
    """Two implementations of one plan, on the same weights and input."""
    dtype, _, unit_roundoff = PRECISIONS[precision]
    model, x = randomised(small()).cuda().to(dtype), photograph_like(3, 64, 48).cuda().to(dtype)
    outputs = []
    for backend in ("triton", "cuda"):
        with taken_by_auto(backend):
            outputs.append(fused(model, x))
    expected = exact(model, x)
    for y in outputs:
        assert_as_exact_as_pytorch(y, plain(model, x), expected, unit_roundoff)


@functools.cache
def threshnet95() -> tuple[tf.ThreshNet, dict[tuple[object, ...], Tensor]]:
    """The network with statistics that are not trivial, on the CPU, and its outputs so far."""
    from threshnet_fast.bench.networks import random_model

    return random_model("threshnet95", 10, 0), {}


PRECISIONS = {
    "float32": (torch.float32, "ieee", 2.0**-24),
    "tf32": (torch.float32, "tf32", 2.0**-11),
    "float16": (torch.float16, "ieee", 2.0**-11),
    "bfloat16": (torch.bfloat16, "ieee", 2.0**-8),
}


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (225, 225), (160, 288)], ids=str)
def test_threshnet95(size, batch, precision, engine) -> None:
    """From a launch one by one to a replay, in both memory formats of the input."""
    dtype, arithmetic, unit_roundoff = PRECISIONS[precision]
    original, known = threshnet95()
    model = copy.deepcopy(original).cuda().to(dtype)
    x = photograph_like(batch, *size).cuda().to(dtype)
    key = size, batch, dtype
    if key not in known:
        known[key] = exact(model, x)
    with multiplied(arithmetic):
        other = plain(model, x)
        for each in (x, x.contiguous(memory_format=torch.channels_last), x):
            y = fused(model, each)
            assert y.dtype == dtype
            assert_as_exact_as_pytorch(y, other, known[key], unit_roundoff)
        frozen = tf.optimize(model, x)
        assert frozen.backend == engine
        for _ in range(3):
            assert_as_exact_as_pytorch(frozen(x), other, known[key], unit_roundoff)
    assert captured_graphs(model) == captured_graphs(frozen) == 1


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_threshnet95_under_autocast(dtype, engine) -> None:
    original, _ = threshnet95()
    model, x = copy.deepcopy(original).cuda(), photograph_like(3, 96, 96).cuda()
    with torch.autocast("cuda", dtype):
        other = plain(model, x)
        for _ in range(3):
            y = fused(model, x)
            assert y.dtype == dtype
            unit_roundoff = torch.finfo(dtype).eps / 2
            assert_as_exact_as_pytorch(y, other, exact_outside_autocast(model, x), unit_roundoff)


def exact_outside_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return exact(model, x)


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_replay_equals_launches_bit_by_bit(network, precision, monkeypatch) -> None:
    dtype, arithmetic, _ = PRECISIONS[precision]
    network = network.to(dtype)
    inputs = [(photograph_like(2, 64, 48) * (1 + i)).cuda().to(dtype) for i in range(4)]
    with multiplied(arithmetic):
        replayed = [fused(network, each) for each in inputs * 2]
        assert captured_graphs(network) == 1
        monkeypatch.setenv(environment.CUDA_GRAPHS, "0")
        twin = copy.deepcopy(network)
        launched = [fused(twin, each) for each in inputs * 2]
    assert captured_graphs(twin) == 0
    for actual, expected in zip(replayed, launched, strict=True):
        assert actual.equal(expected)
    assert replayed[0].equal(replayed[4])
    assert not replayed[0].equal(replayed[1])


@gpu
def test_same_bits_every_time(network) -> None:
    x = photograph_like(3, 225, 97).cuda()
    first = fused(network, x)
    assert all(fused(network, x).equal(first) for _ in range(30))


@gpu
def test_grad_modes_may_alternate(network) -> None:
    """A graph that was captured in inference mode also serves outside of it."""
    x = photograph_like(1, 32, 32).cuda()
    expected = plain(network, x)
    with torch.inference_mode():
        for _ in range(3):
            assert_close(network(x), expected)
    y = fused(network, x)
    assert not y.is_inference()
    assert_close(y, expected)
    network.requires_grad_(False)
    y = network(x)
    assert not y.requires_grad
    (y * torch.ones(1, device="cuda", requires_grad=True)).sum().backward()
    with torch.inference_mode():
        assert_close(network(x), expected)


@gpu
def test_runs_on_the_current_stream_behind_what_is_enqueued(network) -> None:
    """Input that is not there yet when the network is called."""
    x = photograph_like(2, 64, 64).cuda()
    frozen = tf.optimize(network, x)
    expected = frozen(x)
    stream = torch.cuda.Stream()
    for _ in range(4):
        late = torch.full_like(x, torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            late.copy_(x)
            y = frozen(late)
            z = fused(network, late)
        stream.synchronize()
        assert y.equal(expected)
        assert z.equal(expected)


@gpu
def test_two_streams_at_once(network) -> None:
    inputs = [(photograph_like(2, 64, 64) * (1 + i)).cuda() for i in range(2)]
    frozen = tf.optimize(network, inputs[0])
    expected = [frozen(each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outputs: list[tuple[int, Tensor]] = []
    for i in range(20):
        for index, (stream, each) in enumerate(zip(streams, inputs, strict=True)):
            with torch.cuda.stream(stream):
                if i % 5 == index:
                    torch.cuda._sleep(CYCLES // 20)
                outputs.append((index, frozen(each)))
    torch.cuda.synchronize()
    for index, output in outputs:
        assert output.equal(expected[index])


@gpu
def test_first_call_on_another_stream_waits_for_the_weights(network) -> None:
    """Weights are packed on the stream of the first call."""
    x = photograph_like(1, 64, 64).cuda()
    expected = plain(network, x)
    for _ in range(3):
        twin = copy.deepcopy(network)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            fused(twin, x)
        with torch.cuda.stream(torch.cuda.Stream()):
            y = fused(twin, x)
        torch.cuda.synchronize()
        assert_close(y, expected)


@gpu
def test_more_streams_than_are_remembered(network) -> None:
    x = photograph_like(1, 32, 32).cuda()
    frozen = tf.optimize(network, x)
    expected = frozen(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(7)]
    for _ in range(3):
        outputs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs += [frozen(x), frozen(x)]
        torch.cuda.synchronize()
        assert all(output.equal(expected) for output in outputs)


@gpu
@pytest.mark.parametrize("own_streams", [False, True])
@pytest.mark.parametrize("kind", ["model", "frozen"])
def test_eight_threads(network, own_streams, kind) -> None:
    """One network, nothing of which is compiled, packed or captured yet."""
    inputs = [
        (photograph_like(1 + i % 2, 32 + 16 * (i % 3), 32) * (1 + i)).cuda() for i in range(6)
    ]
    expected = [fused(network, each) for each in inputs]
    shared = copy.deepcopy(network)
    call = tf.optimize(shared, inputs[0]) if kind == "frozen" else shared
    torch.cuda.synchronize()
    barrier = threading.Barrier(8)

    def work(index: int) -> list[tuple[int, Tensor]]:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        results = []
        barrier.wait()
        with torch.cuda.stream(stream), torch.no_grad():
            for repeat in range(20):
                position = (index * 5 + repeat * 7) % len(inputs)
                results.append((position, call(inputs[position])))
        stream.synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for position, output in results:
                assert output.equal(expected[position])


@gpu
def test_captured_by_the_caller(network) -> None:
    """The caller's graph neither disturbs calls outside of it nor is disturbed by them."""
    static = photograph_like(2, 48, 48).cuda()
    inputs = [static * (1 + i) for i in range(4)]
    expected = [fused(network, each) for each in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fused(network, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = network(static)
        z = network(static) + 1
    for each, output in zip(inputs, expected, strict=True):
        static.copy_(each)
        graph.replay()
        between = fused(network, inputs[0])
        assert y.equal(output)
        assert z.equal(output + 1)
        assert between.equal(expected[0])


@gpu
def test_captured_weights_outlive_a_change(network) -> None:
    static = photograph_like(1, 48, 48).cuda()
    fused(network, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = network(static)
    graph.replay()
    before = y.clone()
    in_place(network, static)
    # The graph goes on with the weights as they were packed last.
    graph.replay()
    assert y.equal(before)
    after = fused(network, static)
    assert not after.equal(before)
    gc.collect()
    # Overwrites whatever was freed.
    rubbish = [torch.full((2**18,), torch.nan, device="cuda") for _ in range(64)]
    del rubbish
    graph.replay()
    assert y.equal(after)


@gpu
def test_weights_are_not_packed_while_the_caller_captures(network) -> None:
    """They would be there only after the graph has been replayed."""
    static = photograph_like(1, 32, 32).cuda()
    expected = fused(network, static)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="call the network once before"),
        torch.cuda.graph(graph),
        torch.no_grad(),
        torch.autocast("cuda", torch.float16),
    ):
        network(static)
    assert fused(network, static).equal(expected)


@gpu
def test_operators_captured_by_the_caller(engine) -> None:
    for name in tf.ops.__all__:
        operator, arguments = operator_arguments(name, SMALL)
        xs, others = split(arguments)
        expected = operator(xs, *others, 1, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = operator(xs, *others, 1, 1)
        graph.replay()
        assert y.equal(expected)


def split(arguments: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The segments of SMALL, and the other arguments, on the GPU."""
    moved_ones = [t.cuda() for t in arguments]
    return moved_ones[: len(SMALL.channels)], moved_ones[len(SMALL.channels) :]


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@gpu
@pytest.mark.parametrize("kind", ["model", "frozen"])
@pytest.mark.parametrize("graphs", ["1", "0"])
def test_memory_does_not_grow(network, kind, graphs, monkeypatch) -> None:
    monkeypatch.setenv(environment.CUDA_GRAPHS, graphs)
    inputs = [photograph_like(2, size, 48).cuda() for size in (32, 48)]
    call = tf.optimize(network, inputs[0]) if kind == "frozen" else network
    with torch.no_grad():
        for each in inputs * 4:
            call(each)
        before, reserved = allocated(), torch.cuda.memory_reserved()
        for _ in range(100):
            for each in inputs:
                call(each)
        assert allocated() == before
        assert torch.cuda.memory_reserved() <= reserved


@gpu
def test_memory_does_not_grow_as_weights_change(network) -> None:
    x = photograph_like(1, 48, 48).cuda()

    def changed() -> None:
        in_place(network, x)
        for _ in range(3):
            fused(network, x)

    for _ in range(5):
        changed()
    before = allocated()
    for _ in range(20):
        changed()
    assert allocated() <= before + 2**20


@gpu
def test_memory_is_given_back(randomised, engine) -> None:
    x = photograph_like(4, 64, 64).cuda()
    # What libraries and compiled kernels keep for good is allocated by the first one.
    for _ in range(2):
        before = allocated()
        model = randomised(small()).cuda()
        frozen = tf.optimize(model, x)
        for _ in range(3):
            fused(model, x)
            frozen(x)
        del model, frozen
    assert allocated() == before


@gpu
def test_fallbacks_say_why_and_compute_the_same(network) -> None:
    x = photograph_like(2, 40, 36).cuda()
    expected = exact(network, x)
    with torch.no_grad():
        double = copy.deepcopy(network).double()
        explanation = tf.explain(double, x.double())
        assert explanation.backend == "reference"
        assert "torch.float64" in explanation.reason
        torch.testing.assert_close(double(x.double()).cpu(), expected)

        seen = []
        handle = network.base[3].register_forward_hook(lambda *_: seen.append(1))
        assert "hooks" in tf.explain(network, x).reason
        network(x)
        assert seen
        handle.remove()
        assert tf.explain(network, x).backend == expected_backend()

        with tf.use_backend("reference"):
            assert tf.explain(network, x).backend == "reference"
    assert "gradients are wanted" in tf.explain(network, x).reason
    network(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    frozen = tf.optimize(copy.deepcopy(network).double(), x.double())
    assert frozen.backend == "reference"
    assert "torch.float64" in frozen.reason


@gpu
def test_wrong_devices_are_errors(network) -> None:
    x = photograph_like(1, 32, 32)
    frozen = tf.optimize(network, x.cuda())
    for call in (network, frozen):
        with pytest.raises(RuntimeError, match="x is on cpu"), torch.no_grad():
            call(x)
    with tf.use_backend("cpu"), torch.no_grad(), pytest.raises(RuntimeError, match="on the CPU"):
        network(x.cuda())
    _, arguments = operator_arguments("cat_conv_bn_relu", SMALL)
    xs, others = split(arguments)
    with pytest.raises(ValueError, match=r"xs\[1\] is on cpu"):
        tf.ops.cat_conv_bn_relu([xs[0], xs[1].cpu()], *others)
    with pytest.raises(ValueError, match="needs tensors on the CPU"):
        tf.ops.cat_conv_bn_relu(xs, *others, backend="cpu")
    with pytest.raises(ValueError, match="these are on cpu"):
        tf.ops.cat_conv_bn_relu(
            [t.cpu() for t in xs], *(t.cpu() for t in others), backend=expected_backend()
        )


@gpu
def test_to_the_cpu_and_back(network) -> None:
    x = photograph_like(1, 32, 32)
    expected = fused(network, x.cuda())
    network.cpu()
    with torch.no_grad():
        assert tf.explain(network, x).backend in ("cpu", "reference")
        assert_close(network(x), expected.cpu())
    network.cuda()
    assert_close(fused(network, x.cuda()), expected)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices(randomised, engine) -> None:
    """Whichever device is current."""
    model = randomised(small())
    x = photograph_like(2, 64, 64)
    places = [torch.device("cuda", 1), torch.device("cuda", 0)]
    models = [copy.deepcopy(model).to(where) for where in places]
    expected = exact(model, x)
    for current in (0, 1):
        with torch.cuda.device(current):
            for _ in range(3):
                outputs = [fused(m, x.to(where)) for m, where in zip(models, places, strict=True)]
                for output, where in zip(outputs, places, strict=True):
                    assert output.device == where
                    assert_close(output.cpu(), expected.float())
            _, arguments = operator_arguments("cat_conv_bn_relu", SMALL)
            results = []
            for where in (*places, torch.device("cpu")):
                tensors = [t.to(where).requires_grad_() for t in arguments]
                y = tf.ops.cat_conv_bn_relu(tensors[:2], *tensors[2:])
                results.append([t.cpu() for t in torch.autograd.grad(y.sum(), tensors)])
            for grads in results[:2]:
                torch.testing.assert_close(grads, results[2], rtol=1e-2, atol=1e-2)
    assert [captured_graphs(m) for m in models] == [1, 1]


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_model_that_moves_between_devices(network) -> None:
    x = photograph_like(1, 48, 48)
    expected = plain(network, x.cuda()).cpu()
    for index in (1, 0, 1):
        where = torch.device("cuda", index)
        network.to(where)
        for _ in range(3):
            assert_close(fused(network, x.to(where)).cpu(), expected)


@gpu
def test_compiles_in_one_graph(network) -> None:
    torch._dynamo.reset()
    x = photograph_like(2, 32, 32).cuda()
    compiled = torch.compile(network, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), plain(network, x))
    y = compiled(x)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@gpu
@pytest.mark.parametrize("name", ["cat_bn_relu_conv", "cat_conv_bn_relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name, layout, requires_grad, engine) -> None:
    operator, arguments = operator_arguments(name, SMALL)
    xs, others = split(arguments)
    xs = [LAYOUTS[layout](x.cpu()).cuda() for x in xs]
    for t in (*xs, *others):
        t.requires_grad_(requires_grad)
    torch.library.opcheck(operator, (xs, *others, 2, 1))


@gpu
@pytest.mark.parametrize("name", ["cat_bn_relu_conv", "cat_conv_bn_relu"])
def test_operators_compile_in_one_graph(name, engine) -> None:
    torch._dynamo.reset()
    _, arguments = operator_arguments(name, SMALL)
    xs, others = split([t.requires_grad_() for t in arguments])

    def function(xs: list[Tensor], *others: Tensor) -> Tensor:
        return getattr(tf.ops, name)(xs, *others, padding=1) * 2

    compiled = torch.compile(function, fullgraph=True)
    for call in (function, compiled):
        y = call(xs, *others)
        grads = torch.autograd.grad(y.sum(), [*xs, *others])
        if call is function:
            expected = [y, *grads]
    for actual, other in zip([y, *grads], expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("name", ["cat_bn_relu_conv", "cat_conv_bn_relu"])
def test_operators_run_on_the_current_stream(name, engine) -> None:
    """Forward and backward, behind what is enqueued."""
    _, arguments = operator_arguments(name, SMALL)
    xs, others = split(arguments)
    leaves = [t.requires_grad_() for t in (*xs, *others)]

    def gradients(segments: list[Tensor]) -> list[Tensor]:
        y = getattr(tf.ops, name)(segments, *others, padding=1)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected = gradients(xs)
    late = [torch.full_like(x, torch.nan).requires_grad_() for x in xs]
    leaves = [*late, *others]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        with torch.no_grad():
            for segment, x in zip(late, xs, strict=True):
                segment.copy_(x)
        actual = gradients(late)
    stream.synchronize()
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


@gpu
def test_a_training_step_with_operators_under_autocast_and_scaling(engine) -> None:
    """The operators as a layer: loss falls, gradients are finite, weights stay float32."""
    _, arguments = operator_arguments("cat_conv_bn_relu", SMALL)
    xs, (weight, scale, shift) = split(arguments)
    parameters = [nn.Parameter(t) for t in (0.1 * weight, torch.ones_like(scale), 0 * shift)]
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    target = torch.rand(2, 6, 5, 7, device="cuda")
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.float16):
            y = tf.ops.cat_conv_bn_relu(xs, *parameters)
            assert y.dtype == torch.float16
            loss = (y.float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)


@gpu
def test_more_elements_than_32_bits_count(randomised, engine) -> None:
    """Offsets within a feature map are 64-bit."""
    network = randomised(small()).cuda().half()
    size, batch = 4096, 34
    needed = batch * size * size * (3 + 16) * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    images = photograph_like(2, 256, 256).cuda().half().repeat(1, 1, size // 256, size // 256)
    x = images.repeat(batch // 2, 1, 1, 1)
    # The first map has 8 channels in 16, on a quarter of the pixels.
    assert batch * (size // 2) ** 2 * 16 > 2**31
    with torch.no_grad():
        explanation = tf.explain(network, x)
        assert explanation.backend == engine, explanation.reason
        y = network(x)
        expected = network(x[:2])
    largest = expected.abs().max().item()
    expected = expected.repeat(batch // 2, 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-2 * largest)
