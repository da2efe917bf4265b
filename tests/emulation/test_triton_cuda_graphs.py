"""What the executor does around CUDA graphs and streams, with stand-ins for both.

A stand-in of a graph keeps the launches of its capture and runs them again when it is replayed, as
a graph does: nothing runs while it is captured, and a replay reads and writes the same memory. What
CUDA itself does with graphs and streams is for tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_plan import small
from torch import Tensor

pytest.importorskip("triton")

from threshnet_fast.kernels import launch

import threshnet_fast as tf
from emulation.interpreter import interpreted
from threshnet_fast.backends import cuda_graphs, gpu_plan, triton, triton_plan
from threshnet_fast.backends.triton_plan import Target, TritonPlan, pack_network
from threshnet_fast.plan import lower

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = torch.device("cuda", 0)


class Graph:
    def __init__(self) -> None:
        self.launches: list[launch.Launch] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for each in self.launches:
            each()


@dataclass
class Device:
    """What happens on a GPU that is not there.

    Attributes:
        stream: The current stream.
        recording: The graph that is being captured.
        recorder: The thread that captures; others go on launching.
        graphs: Every graph so far.
        launches: How many kernels have run.
        streams: Devices of the streams that were made.
    """

    stream: int = 0
    recording: Graph | None = None
    recorder: int | None = None
    graphs: list[Graph] = field(default_factory=list)
    launches: int = 0
    streams: list[torch.device] = field(default_factory=list)

    def new_graph(self) -> Graph:
        self.graphs.append(Graph())
        return self.graphs[-1]

    def new_stream(self, device: torch.device) -> str:
        self.streams.append(device)
        return f"stream on {device}"

    @contextlib.contextmanager
    def capture(
        self, graph: Graph, *, stream: str | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert self.recording is None, "PyTorch captures one graph at a time"
        self.recording, self.recorder = graph, threading.get_ident()
        try:
            yield
        finally:
            self.recording = self.recorder = None

    def capturing(self) -> bool:
        return self.recorder == threading.get_ident()


class Torch:
    """PyTorch, but for its GPUs, whose memory is on the CPU."""

    def __init__(self, device: Device) -> None:
        self.cuda = SimpleNamespace(
            device=lambda _: contextlib.nullcontext(),
            current_stream=lambda _=None: SimpleNamespace(
                cuda_stream=device.stream, synchronize=lambda: None
            ),
            is_current_stream_capturing=device.capturing,
            CUDAGraph=device.new_graph,
            Stream=device.new_stream,
            graph=device.capture,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> Tensor:
        assert device == GPU
        return torch.empty(*size, dtype=dtype, **options).fill_(torch.nan)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    run = launch.Launch.__call__

    def launched(each: launch.Launch) -> None:
        if device.capturing():
            assert device.recording is not None
            device.recording.launches.append(each)
        else:
            device.launches += 1
            run(each)

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    for module in (cuda_graphs, gpu_plan, triton_plan):
        monkeypatch.setattr(module, "torch", Torch(device))
    with interpreted():
        yield device


@pytest.fixture
def model(randomised) -> tf.ThreshNet:
    return randomised(
        small(
            blocks=(2, 2),
            transitions=(16, 16),
            downsample=(True, False),
            threshold=1,
            growth_rates=(8, 8),
        )
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32)


class Network:
    """A prepared network and its weights."""

    def __init__(self, model: tf.ThreshNet, x: Tensor, **options: Any) -> None:
        target = Target(GPU, torch.float32, "ieee", "interpreter", 1)
        plan = lower(model, x.shape)
        self.model = model
        self.plan = TritonPlan(plan, target, **options)
        self.packed = pack_network(plan, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        return self.plan(x, self.packed)

    def check(self, x: Tensor) -> Tensor:
        """Runs it, and compares with PyTorch."""
        with torch.no_grad(), tf.use_backend("reference"):
            expected = self.model(x)
        y = self(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        return y


def test_second_call_captures_and_later_ones_replay(model, x, device) -> None:
    network = Network(model, x)
    network.check(x)
    count = device.launches
    assert (len(device.graphs), count) == (0, len(network.plan._steps))
    network.check(2 * x)
    (graph,) = device.graphs
    assert len(graph.launches) == count
    assert graph.replays == 1
    # The stand-in's memory is on the CPU; a stream is made where the input is.
    assert device.streams == [x.device]
    for scale in (-1.0, 0.5):
        network.check(scale * x)
    assert device.graphs == [graph]
    assert graph.replays == 3
    # The first call, one before the capture, three replays.
    assert device.launches == 5 * count


def test_kernels_run_before_they_are_captured(model, x, device, monkeypatch) -> None:
    """With the very arguments, so that nothing is compiled within a capture."""
    network = Network(model, x)
    seen: list[tuple[bool, tuple[int, ...]]] = []
    convolve = triton_plan.stem_convolution.convolve_stem

    def spy(source: Tensor, *args: Any, **options: Any) -> list[launch.Launch]:
        seen.append((device.recording is not None, source.stride()))
        return convolve(source, *args, **options)

    monkeypatch.setattr(triton_plan.stem_convolution, "convolve_stem", spy)
    last = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        network.check(last)
    assert seen == [(False, last.stride()), (False, x.stride()), (True, x.stride())]


def test_outputs_are_copies(model, x, device) -> None:
    network = Network(model, x)
    outputs = [network.check(scale * x) for scale in (1.0, 2.0, 3.0, 4.0)]
    assert len({y.data_ptr() for y in outputs}) == 4
    for y in outputs:
        y.fill_(torch.nan)
    network.check(x)


def test_inputs_of_other_strides_and_dtypes(model, x, device) -> None:
    network = Network(model, x)
    for _ in range(2):
        network.check(x)
    network.check(x.contiguous(memory_format=torch.channels_last))
    network.check(torch.randn(2, 3, 64, 64)[:, :, ::2, 1::2])
    network.check(x[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(network(x.double()), network(x))


def test_streams_have_memory_of_their_own(model, x, device) -> None:
    network = Network(model, x)
    for _ in range(3):
        for device.stream in (0, 7):
            network.check(x)
    assert len(device.graphs) == 2
    first, second = network.plan._workspaces.values()
    assert first._arena.data_ptr() != second._arena.data_ptr()
    written = [
        {
            tensor.untyped_storage().data_ptr()
            for each in graph.launches
            for tensor in each.arguments.values()
            if isinstance(tensor, Tensor)
        }
        for graph in device.graphs
    ]
    for workspace, others in ((first, written[1]), (second, written[0])):
        assert workspace._arena.data_ptr() not in others


def test_memory_of_the_oldest_stream_is_given_up(model, x, device) -> None:
    network = Network(model, x)
    most = gpu_plan._MAX_WORKSPACES
    for device.stream in range(most + 1):
        network.check(x)
    assert list(network.plan._workspaces) == list(range(1, most + 1))
    device.stream = 1
    network.check(x)
    device.stream = 0
    network.check(x)
    assert list(network.plan._workspaces) == [*range(3, most + 1), 1, 0]


def test_within_a_capture_of_the_caller(model, x, device) -> None:
    """Launches go to the caller's graph, on memory that nobody else uses."""
    network = Network(model, x)
    for _ in range(2):
        network.check(x)
    (own,) = device.graphs
    callers = Graph()
    static = x.clone()
    with device.capture(callers):
        y = network(static)
    assert len(callers.launches) == len(own.launches)
    assert own.replays == 1
    assert len(device.graphs) == 1
    for scale in (1.0, -2.0):
        static.copy_(scale * x)
        callers.replay()
        between = network.check(3 * x)
        with torch.no_grad(), tf.use_backend("reference"):
            torch.testing.assert_close(y, model(static), rtol=1e-4, atol=1e-4)
        assert not between.equal(y)


def test_other_weights_are_captured_anew(model, x, device) -> None:
    network = Network(model, x)
    for _ in range(2):
        network.check(x)
    with torch.no_grad():
        model.base[1].conv.weight.mul_(-2)
    network.packed = pack_network(lower(model, x.shape), torch.float32)
    for _ in range(3):
        network.check(x)
    assert len(device.graphs) == 2


def test_without_graphs(model, x, device) -> None:
    network = Network(model, x, graphs=False)
    for _ in range(3):
        network.check(x)
    assert device.graphs == []


@pytest.mark.parametrize(("value", "wanted"), [("0", False), ("", False), ("1", True)])
def test_switch(monkeypatch, value: str, wanted: bool) -> None:
    monkeypatch.setenv(cuda_graphs.VARIABLE, value)
    assert cuda_graphs.enabled() is wanted
    monkeypatch.delenv(cuda_graphs.VARIABLE)
    assert cuda_graphs.enabled() is True


def test_captured_in_inference_mode(model, x, device) -> None:
    network = Network(model, x)
    with torch.inference_mode():
        for _ in range(2):
            network(x)
    y = network(x)
    assert not y.is_inference()
    network.check(x)


def test_one_capture_at_a_time(model, x, device, monkeypatch) -> None:
    """Two threads that reach their second calls together; the stand-in refuses a second capture."""
    networks = [Network(model, x) for _ in range(2)]
    for network in networks:
        network.check(x)
    barrier, errors = threading.Barrier(2), []
    capture = device.capture
    inside = threading.Event()

    @contextlib.contextmanager
    def slow(graph: Graph, **options: Any) -> Iterator[None]:
        with capture(graph, **options):
            # Time for the other one to come here, if it can.
            inside.wait(0.2)
            yield

    monkeypatch.setattr(cuda_graphs.torch.cuda, "graph", slow)
    # Only captures matter here, and the interpreter runs one kernel at a time.
    monkeypatch.setattr(launch.Launch, "__call__", lambda each: None)

    def call(network: Network) -> None:
        barrier.wait()
        try:
            network(x)
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(network,)) for network in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(device.graphs) == 2


def test_weights_are_not_packed_within_a_capture(model, x, device, monkeypatch) -> None:
    goal = Target(GPU, torch.float16, "ieee", "interpreter", 1)
    monkeypatch.setattr(triton, "target", lambda *_: goal)
    cache = triton.PlanCache()
    with (
        device.capture(Graph()),
        pytest.raises(
            RuntimeError, match=r"packed in torch\.float16 while .*call the network once"
        ),
    ):
        cache.get(model, x, head=True, dtype=torch.float16)
    _, packed = cache.get(model, x, head=True, dtype=torch.float16)
    with device.capture(Graph()):
        assert cache.get(model, x, head=True, dtype=torch.float16)[1] is packed


def test_weights_of_a_captured_call_are_kept(model, x, monkeypatch) -> None:
    """The caller's graph goes on reading them after the model has changed."""
    with interpreted(), torch.no_grad(), tf.use_backend("triton"):
        model(x)
        kept = model._fused._captured
        assert not kept
        monkeypatch.setattr(cuda_graphs, "capturing", lambda _: True)
        model(x)
        model(x)
        (packed,) = kept.values()
        monkeypatch.setattr(cuda_graphs, "capturing", lambda _: False)
        model.base[1].conv.weight.mul_(-2)
        model(x)
        assert list(kept.values()) == [packed]
        assert model._fused._snapshot._gpu_plans["triton"]._packed[torch.float32] is not packed
