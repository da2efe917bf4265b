"""What both executors for a GPU do around CUDA graphs and streams, with stand-ins for these.

A stand-in of a graph keeps the launches of its capture and runs them again when it is replayed, as
a graph does: nothing runs while it is captured, and a replay reads and writes the same memory. What
CUDA itself does with graphs and streams is for tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_plan import small
from torch import Tensor

import threshnet_fast as tf
from emulation import cuda_operators
from threshnet_fast import environment
from threshnet_fast.engines import cache, cuda, cuda_graphs, cuda_plan, gpu_plan, triton
from threshnet_fast.engines.gpu_plan import GpuPlan, Workspace
from threshnet_fast.plan import Plan, lower
from threshnet_fast.plan.lower import PlanSource

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = torch.device("cuda", 0)
OPERATORS = ("compile_plan", "pack_weights", "workspace_bytes")


@dataclass(frozen=True)
class Recorded:
    """A launch that a graph holds.

    Attributes:
        run: Runs it.
        tensors: What it reads and writes.
    """

    run: Callable[[], None]
    tensors: list[Tensor]


class Graph:
    def __init__(self) -> None:
        self.launches: list[Recorded] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for each in self.launches:
            each.run()


@dataclass
class Device:
    """What happens on a GPU that is not there.

    Attributes:
        stream: The current stream.
        recording: The graph that is being captured.
        recorder: The thread that captures; others go on launching.
        graphs: Every graph so far.
        launches: How many kernels have run, those of replayed graphs not counted.
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

    def launch(self, run: Callable[[], None], tensors: list[Tensor]) -> None:
        """Runs a kernel, or keeps it in the graph that is being captured."""
        if self.capturing():
            assert self.recording is not None
            self.recording.launches.append(Recorded(run, tensors))
        else:
            self.launches += 1
            run()


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
        poison = torch.nan if dtype.is_floating_point else 0xFF
        return torch.empty(*size, dtype=dtype, **options).fill_(poison)


def operators(device: Device) -> SimpleNamespace:
    """The executor's operators in C++, the last of which launches kernels."""

    def run_plan(x: Tensor, program: Tensor, packed: Tensor, workspace: Tensor) -> Tensor:
        operator = torch.ops.threshnet_fast_cuda.run_plan
        # The result is allocated at once, and computed when the launch runs.
        y = operator(x, program, packed, workspace).fill_(torch.nan)
        workspace.fill_(0xFF)

        def run() -> None:
            with torch.inference_mode(y.is_inference()):
                y.copy_(operator(x, program, packed, workspace))

        device.launch(run, [x, packed, workspace])
        return y

    others = {name: getattr(torch.ops.threshnet_fast_cuda, name) for name in OPERATORS}
    return SimpleNamespace(**others, run_plan=SimpleNamespace(default=run_plan))


@dataclass(frozen=True)
class Executor:
    """One of the two.

    Attributes:
        backend: Its module.
        target: What it prepares for, by dtype.
        prepare: Prepares a plan.
        pack: Packs weights.
        memory: Name of what a workspace has to itself.
    """

    backend: ModuleType
    target: Callable[[torch.dtype], Any]
    prepare: Callable[..., GpuPlan]
    pack: Callable[[Plan, torch.dtype], Any]
    memory: str

    @property
    def name(self) -> str:
        return self.backend.__name__.rpartition(".")[2]


@pytest.fixture(params=["triton", "cuda"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """An executor, whose kernels run on the CPU."""
    if request.param == "cuda":
        if (reason := cuda_operators.skip_reason()) is not None:
            pytest.skip(reason)

        def target(dtype: torch.dtype) -> cuda_plan.Target:
            return cuda_plan.Target(GPU, dtype, *cuda_operators.DEVICES["sm_90"])

        def pack(plan: Plan, dtype: torch.dtype) -> Tensor:
            return cuda_plan.pack_network(plan, target(dtype))

        with cuda_operators.emulated_cuda():
            yield Executor(cuda, target, cuda_plan.CudaPlan, pack, "_memory")
        return
    pytest.importorskip("triton")
    from emulation.interpreter import interpreted
    from threshnet_fast.engines import triton_plan

    with interpreted():
        yield Executor(
            triton,
            lambda dtype: triton_plan.Target(GPU, dtype, "ieee", "interpreter", 1),
            triton_plan.TritonPlan,
            triton_plan.pack_network,
            "_arena",
        )


@pytest.fixture
def device(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    standin = Torch(device)
    modules = [cache, cuda_graphs, gpu_plan]
    if executor.name == "cuda":
        standin.ops = SimpleNamespace(threshnet_fast_cuda=operators(device))
        modules.append(cuda_plan)
    else:
        from threshnet_fast.kernels import launch

        from threshnet_fast.engines import triton_plan

        modules.append(triton_plan)
        run = launch.Launch.__call__

        def launched(each: launch.Launch) -> None:
            tensors = [value for value in each.arguments.values() if isinstance(value, Tensor)]
            device.launch(lambda: run(each), tensors)

        monkeypatch.setattr(launch.Launch, "__call__", launched)
    for module in modules:
        monkeypatch.setattr(module, "torch", standin)
    return device


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

    def __init__(self, executor: Executor, model: tf.ThreshNet, x: Tensor, **options: Any) -> None:
        self.executor = executor
        self.model = model
        self.lowered = lower(model, x.shape)
        self.plan = executor.prepare(self.lowered, executor.target(torch.float32), **options)
        self.pack()

    def pack(self) -> None:
        """Packs the model's weights as they are now."""
        self.packed = self.executor.pack(lower(self.model, self.lowered.input_shape), torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        return self.plan(x, self.packed)

    def check(self, x: Tensor) -> Tensor:
        """Runs it, and compares with PyTorch."""
        with torch.no_grad(), tf.use_backend("reference"):
            expected = self.model(x)
        y = self(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        return y


def test_second_call_captures_and_later_ones_replay(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    network.check(x)
    count = device.launches
    assert (len(device.graphs), count) == (
        0,
        1 if executor.name == "cuda" else len(network.plan._steps),
    )
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
    # The first call, and one before the capture; the rest are replays.
    assert device.launches == 2 * count


def test_kernels_run_before_they_are_captured(executor, model, x, device, monkeypatch) -> None:
    """With the very arguments, so that nothing is compiled within a capture."""
    network = Network(executor, model, x)
    seen: list[tuple[bool, tuple[int, ...]]] = []
    workspace = type(network.plan._workspace(0, network.packed))
    run = workspace.launch

    def spy(self: Workspace, source: Tensor) -> Tensor:
        seen.append((device.recording is not None, source.stride()))
        return run(self, source)

    monkeypatch.setattr(workspace, "launch", spy)
    last = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        network.check(last)
    assert seen == [(False, last.stride()), (False, x.stride()), (True, x.stride())]


def test_outputs_are_copies(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    outputs = [network.check(scale * x) for scale in (1.0, 2.0, 3.0, 4.0)]
    assert len({y.data_ptr() for y in outputs}) == 4
    for y in outputs:
        y.fill_(torch.nan)
    network.check(x)


def test_inputs_of_other_strides_and_dtypes(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    for _ in range(2):
        network.check(x)
    network.check(x.contiguous(memory_format=torch.channels_last))
    network.check(torch.randn(2, 3, 64, 64)[:, :, ::2, 1::2])
    network.check(x[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(network(x.double()), network(x))


def test_streams_have_memory_of_their_own(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    for _ in range(3):
        for device.stream in (0, 7):
            network.check(x)
    assert len(device.graphs) == 2
    first, second = network.plan._workspaces.values()
    one, other = (
        getattr(workspace, executor.memory).untyped_storage().data_ptr()
        for workspace in (first, second)
    )
    used = [
        {tensor.untyped_storage().data_ptr() for each in graph.launches for tensor in each.tensors}
        for graph in device.graphs
    ]
    assert one in used[0] - used[1]
    assert other in used[1] - used[0]


def test_memory_of_the_oldest_stream_is_given_up(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    most = gpu_plan._MAX_WORKSPACES
    for device.stream in range(most + 1):
        network.check(x)
    assert list(network.plan._workspaces) == list(range(1, most + 1))
    device.stream = 1
    network.check(x)
    device.stream = 0
    network.check(x)
    assert list(network.plan._workspaces) == [*range(3, most + 1), 1, 0]


def test_within_a_capture_of_the_caller(executor, model, x, device) -> None:
    """Launches go to the caller's graph, on memory that nobody else uses."""
    network = Network(executor, model, x)
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


def test_other_weights_are_captured_anew(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    for _ in range(2):
        network.check(x)
    with torch.no_grad():
        model.base[1].conv.weight.mul_(-2)
    network.pack()
    for _ in range(3):
        network.check(x)
    assert len(device.graphs) == 2


def test_without_graphs(executor, model, x, device) -> None:
    network = Network(executor, model, x, graphs=False)
    for _ in range(3):
        network.check(x)
    assert device.graphs == []


@pytest.mark.parametrize(("value", "wanted"), [("0", False), ("", False), ("1", True)])
def test_switch(monkeypatch, value: str, wanted: bool) -> None:
    monkeypatch.setenv(environment.CUDA_GRAPHS, value)
    assert cuda_graphs.enabled() is wanted
    monkeypatch.delenv(environment.CUDA_GRAPHS)
    assert cuda_graphs.enabled() is True


def test_captured_in_inference_mode(executor, model, x, device) -> None:
    network = Network(executor, model, x)
    with torch.inference_mode():
        for _ in range(2):
            network(x)
    y = network(x)
    assert not y.is_inference()
    network.check(x)


def test_one_capture_at_a_time(executor, model, x, device, monkeypatch) -> None:
    """Two threads that reach their second calls together; the stand-in refuses a second capture."""
    networks = [Network(executor, model, x) for _ in range(2)]
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
    monkeypatch.setattr(device, "launch", lambda run, tensors: None)

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


def test_weights_are_not_packed_within_a_capture(executor, model, x, device, monkeypatch) -> None:
    monkeypatch.setattr(executor.backend, "target", lambda _, dtype: executor.target(dtype))
    engine = executor.backend.ENGINE
    plans, setting = cache.PlanCache(engine, PlanSource(model)), engine.setting(GPU, torch.float16)
    with (
        device.capture(Graph()),
        pytest.raises(
            RuntimeError, match=r"packed in torch\.float16 while .*call the network once"
        ),
    ):
        plans.get(x.shape, True, setting)
    _, packed = plans.get(x.shape, True, setting)
    with device.capture(Graph()):
        assert plans.get(x.shape, True, setting)[1] is packed


def test_weights_of_a_captured_call_are_kept(executor, model, x, monkeypatch) -> None:
    """The caller's graph goes on reading them after the model has changed: from one memory."""

    def tensors() -> list[Tensor]:
        plans = model._fused._snapshot.plans.of(executor.backend.ENGINE)
        return cache.tensors_of(plans._packed[torch.float32])

    with torch.no_grad(), tf.use_backend(executor.name):
        model(x)
        kept = model._fused._captured
        assert len(kept) == 0
        before = [tensor.clone() for tensor in tensors()]
        addresses = [tensor.data_ptr() for tensor in tensors()]
        for _ in range(5):
            monkeypatch.setattr(cuda_graphs, "capturing", lambda _: True)
            model(x)
            model(x)
            assert len(kept) == 1
            monkeypatch.setattr(cuda_graphs, "capturing", lambda _: False)
            model.base[1].conv.weight.mul_(-2)
            y = model(x)
            assert len(kept) == 1
            assert [tensor.data_ptr() for tensor in tensors()] == addresses
        assert not all(map(torch.equal, tensors(), before))
        with tf.use_backend("reference"):
            torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
        # Weights of other shapes have memory of their own.
        model.reset_classifier(9)
        assert model(x).shape == (len(x), 9)
        assert len(kept) == 1
        assert [tensor.data_ptr() for tensor in tensors()] != addresses


def test_weights_that_nobody_captured_are_packed_into_new_memory(executor, model, x) -> None:
    with torch.no_grad(), tf.use_backend(executor.name):
        model(x)
        plans = model._fused._snapshot.plans.of(executor.backend.ENGINE)
        packed = plans._packed[torch.float32]
        model.base[1].conv.weight.mul_(-2)
        model(x)
        plans = model._fused._snapshot.plans.of(executor.backend.ENGINE)
        assert plans._packed[torch.float32] is not packed


def test_plans_used_last_are_kept(executor, model, x, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_MAX_PLANS", 3)
    with torch.no_grad(), tf.use_backend(executor.name):
        model(x)
        plans = model._fused._snapshot.plans.of(executor.backend.ENGINE)
        (first,) = plans._plans.values()
        for width in (33, 34, 35, 36):
            model(torch.randn(1, 3, 32, width))
            model(x)
        assert len(plans) == 3
        assert first in plans._plans.values()
        monkeypatch.setattr(executor.backend.ENGINE, "max_kept_bytes", first.plan.arena_bytes - 1)
        model(torch.randn(1, 3, 32, 37))
        assert len(plans) == 1
