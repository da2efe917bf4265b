"""The engine's team of threads: however a user of PyTorch calls it, it ends, with the same bits.

A plan's result depends on the number of threads that it was compiled for, as sums may be split
among them, and on nothing else: not on how many threads there are, nor on which did what. So every
scenario compares with what the same number gave before. Each runs in a process of its own, as a
deadlock would otherwise be the end of all tests.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cpu_cross.engine import ROOT, find_target
from test_plan import small
from torch.utils.data import DataLoader, Dataset

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.plan import lower, plan_memory, serialize

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

needs_openmp = pytest.mark.skipif(
    sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="torch's threads are not those of an OpenMP that can be found in /proc",
)

THREADS = (1, 2, 3, 5, 8)
SECONDS = 60
"""After which a scenario counts as a deadlock; each takes a few."""


class Network:
    """What the scenarios run, as their parent process saved it.

    Attributes:
        model: A network with every kind of block.
        x: Its input.
        expected: Its output by plain PyTorch.
        outputs: Those of the engine, by the number of threads; empty until they are recorded.
    """

    def __init__(self, folder: Path) -> None:
        self._outputs = folder / "outputs.pt"
        self.model, self.x, self.expected = torch.load(folder / "network.pt", weights_only=False)
        self.outputs = torch.load(self._outputs) if self._outputs.exists() else {}

    def record(self, outputs: dict[int, torch.Tensor]) -> None:
        torch.save(outputs, self._outputs)

    def check(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The output of a call is that of the number of threads in use, to the last bit."""
        with torch.no_grad(), tf.use_backend("cpu"):
            output = call(self.x)
        threads = torch.get_num_threads()
        assert output.equal(self.outputs[threads]), f"other bits with {threads} threads"


class Alone:
    """Runs scenarios, which are functions of this module, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, scenario: Callable[..., None], *arguments: str, **environment: str) -> None:
        """Runs a scenario to its end.

        Args:
            scenario: Takes a Network, then the arguments.
            arguments: Of the scenario.
            environment: Variables that the process has beyond this one's, of which those of OpenMP
                are left out.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        path = [str(Path(__file__).parent), *filter(None, [inherited.get("PYTHONPATH")])]
        code = f"import {Path(__file__).stem} as module; module.main()"
        command = [sys.executable, "-c", code, scenario.__name__, str(self._folder), *arguments]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env={**inherited, "PYTHONPATH": os.pathsep.join(path), **environment},
                start_new_session=True,
            )
            try:
                # Later than the process itself gives up.
                status: int | str = process.wait(SECONDS + 15)
            except subprocess.TimeoutExpired:
                status = "a deadlock"
            finally:
                # Its own children too, which a deadlock would leave behind.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            if status != 0:
                pytest.fail(f"{scenario.__name__}{arguments} ended with {status}:\n{log.read()}")


def main() -> None:
    """Runs the scenario that the command line names."""
    name, folder, *arguments = sys.argv[1:]
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    globals()[name](Network(Path(folder)), *arguments)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, randomised):
    folder = tmp_path_factory.mktemp("threads")
    torch.manual_seed(0)
    model = randomised(small())
    x = torch.randn(2, 3, 69, 118)
    with torch.no_grad(), tf.use_backend("reference"):
        torch.save((model, x, model(x)), folder / "network.pt")
    run = Alone(folder)
    run(record)
    return run


def record(network: Network) -> None:
    outputs = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        with torch.no_grad(), tf.use_backend("cpu"):
            outputs[threads] = network.model(network.x)
        torch.testing.assert_close(outputs[threads], network.expected, rtol=1e-4, atol=1e-5)
    network.record(outputs)


TEAM = """
#include <chrono>
#include <cstdlib>
#include <thread>

#include "cpu/team.h"

// Threads come late, in any order, fewer than the team was made for, or one after the other; every
// task must be done once, and after all of the step before.
int main() {
  for (int round = 0; round < 300; ++round) {
    const int64_t threads = 1 + std::rand() % 8;
    const int64_t present = 1 + std::rand() % threads;
    const bool together = std::rand() % 2 == 0;
    std::vector<int64_t> tasks(1 + std::rand() % 12);
    std::vector<std::vector<int>> done;
    for (int64_t& count : tasks) {
      count = std::rand() % 20;
      done.emplace_back(count);
    }
    threshnet_fast::cpu::Team team(threads, tasks);
    const auto work = [&](int64_t thread) {
      team.work(thread, [&](int64_t step, int64_t task) {
        if (step > 0) {
          for (const int before : done[step - 1]) {
            if (before != 1) std::abort();
          }
        }
        ++done[step][task];
      });
    };
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < present; ++i) {
      const int64_t thread = round % 2 == 0 ? i : threads - 1 - i;
      const std::chrono::microseconds delay(std::rand() % 200);
      pool.emplace_back([=] {
        std::this_thread::sleep_for(delay);
        work(thread);
      });
      if (!together) pool.back().join();
    }
    for (std::thread& thread : pool) {
      if (thread.joinable()) thread.join();
    }
    for (const std::vector<int>& step : done) {
      for (const int times : step) {
        if (times != 1) std::abort();
      }
    }
  }
}
"""


def test_team_of_whoever_comes(tmp_path):
    target = find_target("native")
    if isinstance(target, str):
        pytest.skip(target)
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(TEAM)
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([target.compiler, *flags, str(source), "-o", str(program)], check=True)
    subprocess.run([str(program)], check=True, timeout=SECONDS)


@needs_openmp
@pytest.mark.parametrize(
    ("cores", "environment"),
    [
        ("all", {}),
        ("all", {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "2", "OMP_DYNAMIC": "true"}),
        ("one", {"OMP_WAIT_POLICY": "active"}),
    ],
    ids=str,
)
def test_every_way_of_calling(alone, cores, environment):
    alone(call_in_every_way, cores, **environment)


def call_in_every_way(network: Network, cores: str) -> None:
    if cores == "one":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    change_numbers_between_calls(network)
    call_from_python_threads(network)
    call_from_parallel_region(network)
    call_from_backward(network)


def change_numbers_between_calls(network: Network) -> None:
    frozen = tf.optimize(network.model, network.x)
    for _ in range(3):
        for threads in (*THREADS, *reversed(THREADS), 8, 1, 5, 2):
            torch.set_num_threads(threads)
            network.check(network.model)
            network.check(frozen)


def call_from_python_threads(network: Network) -> None:
    """Of models that nobody has called before, so that all compile them at once."""
    calls = [copy.deepcopy(network.model) for _ in range(2)]
    calls.append(tf.optimize(network.model, network.x))
    numbers = [THREADS[i % len(THREADS)] for i in range(8)]
    barrier = threading.Barrier(len(numbers))

    def work(threads: int) -> None:
        # A thread's first question, not its first answer, gives it the number last set by any.
        torch.get_num_threads()
        torch.set_num_threads(threads)
        barrier.wait()
        for i in range(24):
            network.check(calls[(i + threads) % len(calls)])
            assert torch.get_num_threads() == threads

    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(work, numbers))


def openmp_parallel(function: Callable[[], None], threads: int) -> int:
    """Calls a function from all threads of a region of torch's OpenMP; returns how many did."""
    maps = Path("/proc/self/maps").read_text().split()
    runtime = next(
        word for word in maps if Path(word).name.startswith(("libgomp", "libiomp", "libomp"))
    )
    calls: list[Future[None]] = []

    def body(_: int | None) -> None:
        call: Future[None] = Future()
        calls.append(call)
        try:
            call.set_result(function())
        except BaseException as error:
            call.set_exception(error)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)
    ctypes.CDLL(runtime).GOMP_parallel(callback, None, threads, 0)
    for call in calls:
        call.result()
    return len(calls)


def call_from_parallel_region(network: Network) -> None:
    """All threads of a region call at once; torch gives none of them a second thread."""
    frozen = tf.optimize(network.model, network.x)
    for threads in (3, 8, 2):
        torch.set_num_threads(threads)
        for call in (network.model, frozen):
            started = openmp_parallel(functools.partial(network.check, call), threads)
            if "OMP_THREAD_LIMIT" in os.environ:
                assert 1 <= started <= int(os.environ["OMP_THREAD_LIMIT"])
            else:
                assert started == threads
        network.check(network.model)


class Distil(torch.autograd.Function):
    """Has for a gradient what a network makes of its input."""

    @staticmethod
    def forward(ctx, x, network):
        ctx.network = network
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        for _ in range(4):
            ctx.network.check(ctx.network.model)
        return gradient.expand(ctx.network.x.shape), None


def call_from_backward(network: Network) -> None:
    torch.set_num_threads(3)
    leaves = [network.x.clone().requires_grad_() for _ in range(4)]

    def work(leaf: torch.Tensor) -> None:
        Distil.apply(leaf.relu(), network).backward()
        assert leaf.grad is not None

    with ThreadPoolExecutor(len(leaves)) as pool:
        list(pool.map(work, leaves))


def test_calls_from_tasks_of_torchscript(alone):
    alone(call_from_tasks)


def call_from_tasks(network: Network) -> None:
    operators = torch.ops.threshnet_fast_cpu
    torch.set_num_threads(3)
    torch.set_num_interop_threads(4)
    plan = lower(network.model, network.x.shape)
    description = serialize(plan, plan_memory(plan))
    program = operators.compile_plan(description, operators.best_isa(), 3, False)
    packed = operators.pack_weights(program, plan.weights())
    unit = torch.jit.CompilationUnit("""
def run(x: Tensor, program: Tensor, packed: Tensor):
    workspace = torch.ops.threshnet_fast_cpu.create_workspace(program, 3)
    return torch.ops.threshnet_fast_cpu.run_plan(x, program, packed, workspace)

def run_many(x: Tensor, program: Tensor, packed: Tensor):
    futures = [torch.jit.fork(run, x, program, packed) for i in range(16)]
    return [torch.jit.wait(future) for future in futures]
""")
    expected = operators.run_plan(
        network.x, program, packed, operators.create_workspace(program, 3)
    )
    for output in unit.run_many(network.x, program, packed):
        assert output.equal(expected)
    # torch aborts where a process that has used jit.fork ends in any other way.
    os._exit(0)


class Outputs(Dataset):
    """A network's output, again and again, and the number of threads that made it."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        self.call, self.x = call, x

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        with torch.no_grad(), tf.use_backend("cpu"):
            return torch.get_num_threads(), self.call(self.x)


def check_workers(network: Network, dataset: Outputs, threads: int = 1, **options: object) -> None:
    loader = DataLoader(dataset, batch_size=None, timeout=SECONDS / 2, **options)
    items = list(loader)
    assert len(items) == len(dataset)
    for number, output in items:
        assert number == threads
        assert output.equal(network.outputs[threads])


def two_threads(_: int) -> None:
    torch.set_num_threads(2)


def check_in_fork(network: Network, threads: int, *, in_new_thread: bool = False) -> None:
    """A process that os.fork makes runs the network with a number of threads."""

    def work() -> None:
        torch.set_num_threads(threads)
        network.check(network.model)
        network.check(copy.deepcopy(network.model))

    def work_in_new_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()

    target = work_in_new_thread if in_new_thread else work
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(SECONDS / 2)
    assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_processes(alone):
    alone(fork)


def fork(network: Network) -> None:
    torch.set_num_threads(1)
    frozen = tf.optimize(network.model, network.x)
    network.check(network.model)
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    # There has been no parallel region yet, so that a child may begin with several threads.
    check_in_fork(network, 3)
    check_workers(
        network, Outputs(network.model, network.x), 2, worker_init_fn=two_threads, **workers
    )
    torch.set_num_threads(3)
    for call in (network.model, frozen):
        network.check(call)
        check_workers(network, Outputs(call, network.x), **workers)
    check_in_fork(network, 1)
    check_in_fork(network, 3, in_new_thread=True)
    network.check(network.model)


def test_spawned_processes(alone):
    alone(spawn)


def spawn(network: Network) -> None:
    torch.set_num_threads(3)
    network.check(network.model)
    dataset = Outputs(network.model, network.x)
    check_workers(network, dataset, num_workers=1, multiprocessing_context="spawn")


def float_mode() -> tuple[bool, int]:
    """Whether the calling thread takes denormal numbers for zero; all of its mode on x86-64."""
    smallest = sys.float_info.min
    if platform.machine() != "x86_64":
        return smallest / 2 == 0, 0
    environment = (ctypes.c_uint32 * 8)()
    assert ctypes.CDLL("libm.so.6").fegetenv(environment) == 0
    # MXCSR without its lowest bits, which only record what has happened.
    return smallest / 2 == 0, environment[7] & ~0x3F


def float_modes(threads: int) -> list[tuple[bool, int]]:
    """Those of the caller and of the threads that work for it."""
    modes: list[tuple[bool, int]] = []
    openmp_parallel(lambda: modes.append(float_mode()), threads)
    return sorted(modes)


@needs_openmp
def test_denormals(alone):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such mode")
    alone(flush_denormals)


def flush_denormals(network: Network) -> None:
    """The caller's mode is that of all threads for as long as a call takes, and no longer."""
    tiny = torch.finfo(torch.float32).tiny
    model = copy.deepcopy(network.model)
    with torch.no_grad():
        for module in model.modules():
            for name in ("bias", "running_mean"):
                if isinstance(getattr(module, name, None), torch.Tensor):
                    getattr(module, name).zero_()
    # A network without any shift is homogeneous: it makes denormal numbers of denormal numbers.
    x = network.x.clamp(-1, 1) * 1e-38
    with torch.no_grad(), tf.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
    assert 0 < expected.abs().max() < tiny

    maps = torch.rand(1, 16, 256, 256) * tiny
    weight = torch.rand(16, 16, 1, 1) / 16
    ones, zeros = torch.ones(16), torch.zeros(16)
    mixed = torch.nn.functional.conv2d(maps.double(), weight.double())
    assert mixed.max() < tiny

    def check(flush: bool) -> None:
        for threads in reversed(THREADS):
            torch.set_num_threads(threads)
            before = float_modes(threads)
            torch.set_flush_denormal(flush)
            mode, modes = float_mode(), float_modes(threads)
            for _ in range(2):
                with torch.no_grad():
                    output = tf.ops.cat_conv_bn_relu(
                        [maps], weight, ones, zeros, padding=0, backend="cpu"
                    )
                    with tf.use_backend("cpu"):
                        logits = model(x)
                assert float_mode() == mode
                assert float_modes(threads) == modes
                if flush:
                    assert not output.any(), f"{threads} threads"
                    assert not logits.any(), f"{threads} threads"
                else:
                    # Every product is off by half a unit of the last place, of which all share one.
                    assert (output.double() - mixed).abs().max() <= 16 * 2.0**-149
                    error = (logits.double() - expected).abs().max() / expected.abs().max()
                    assert error < 1e-5, f"{threads} threads: {error}"
            assert mode[0] == flush
            torch.set_flush_denormal(False)
            assert float_modes(threads) == before

    check(False)
    check(True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, [False, True]))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with torch.no_grad(), tf.use_backend("reference"):
        assert not model(x).any()


def test_denormals_in_training(alone):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such mode")
    alone(flush_denormals_in_training)


def flush_denormals_in_training(network: Network) -> None:
    """The bits are those of one thread in the caller's mode, of everything that a chain runs."""
    del network
    results: dict[tuple[bool, int], dict[str, list[torch.Tensor]]] = {}
    # The pool's threads start in the first mode.
    for flush in (False, True):
        for threads in (2, 3, 1):
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            results[flush, threads] = training_of_denormals()
            torch.set_flush_denormal(False)
    for flush in (False, True):
        for name, expected in results[flush, 1].items():
            for threads in (2, 3):
                actual = results[flush, threads][name]
                for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
                    assert a.equal(b), f"{name}[{index}], flush={flush}, {threads} threads"
    for name, flushed in results[True, 1].items():
        kept = results[False, 1][name]
        assert any(not a.equal(b) for a, b in zip(flushed, kept, strict=True)), name


def training_of_denormals() -> dict[str, list[torch.Tensor]]:
    """What the operators of training write, from denormal maps and gradients."""
    ops = torch.ops.threshnet_fast_cpu
    isa = cpu.isa_code()
    generator = torch.Generator().manual_seed(0)
    tiny = torch.finfo(torch.float32).tiny
    batch, size, channels = 3, 60, 16
    pixels = batch * size * size

    def denormal(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) + 0.5) / 2 * tiny

    def workspace(floats: int) -> torch.Tensor:
        memory = torch.zeros(floats + 16)
        return memory[-(memory.data_ptr() // 4) % 16 :][:floats]

    rows, gradient = denormal(pixels, channels), denormal(pixels, channels)
    prologue = torch.stack([torch.full((channels,), value) for value in (0.5, 0.0, 0.0)])
    correction = torch.zeros(2, channels)
    none = torch.empty(0)
    window = [batch, size, size, 3, 3, 1, 1]
    segment = [0, channels]
    found: dict[str, list[torch.Tensor]] = {}

    def empty() -> torch.Tensor:
        return torch.zeros(pixels, channels)

    depthwise = torch.rand(channels, 1, 3, 3, generator=generator) / 9
    memory = workspace(ops.training_depthwise_workspace(window, channels, isa))
    output, statistics = empty(), torch.zeros(2, channels)
    given = (rows, segment, prologue, 0, depthwise, window)
    ops.training_depthwise_forward(*given, output, 0, statistics, memory, isa)
    found["depthwise forward"] = [output, statistics]
    dx, sums, dw = empty(), torch.zeros(2, channels), torch.zeros_like(depthwise)
    back = (output, gradient, 0, correction)
    ops.training_depthwise_backward(*given, *back, dx, 0, sums, dw, memory, isa)
    found["depthwise backward"] = [dx, sums]

    memory = workspace(ops.training_pool_workspace(window, channels, isa))
    output, statistics = empty(), torch.zeros(2, channels)
    given = (rows, segment, prologue, 0, window)
    ops.training_pool_forward(*given, output, 0, statistics, memory, isa)
    found["pool forward"] = [output, statistics]
    dx, sums = empty(), torch.zeros(2, channels)
    back = (output, gradient, 0, correction)
    ops.training_pool_backward(*given, *back, dx, 0, sums, memory, isa)
    found["pool backward"] = [dx, sums]

    weight = torch.rand(channels, channels, 3, 3, generator=generator) / 144
    memory = workspace(ops.training_convolution_workspace(window, channels, channels, True, 0, isa))
    output, statistics = empty(), torch.zeros(2, channels)
    given = ([rows], segment, prologue, 0, weight, window)
    ops.training_convolution_forward(*given, output, 0, statistics, memory, 0, isa)
    found["convolution forward"] = [output, statistics]
    dx, sums, dw = empty(), torch.zeros(2, channels), torch.zeros_like(weight)
    back = (output, gradient, 0, correction)
    ops.training_convolution_backward(*given, *back, [dx], [0], sums, dw, memory, 0, isa)
    # How the pixels are divided between threads decides the last bits of sums over all of them.
    found["convolution backward"] = [dx]

    written = torch.zeros(3, channels)
    statistics = torch.stack([denormal(channels), torch.ones(channels)])
    gamma = denormal(channels)
    ops.normalization_prologue(statistics, 0, channels, gamma, none, 1e-5, written, 0)
    found["normalization forward"] = [written]
    sums, correction = denormal(2, channels), torch.zeros(2, channels)
    dgamma, dbeta = torch.zeros(channels), torch.zeros(channels)
    norm = (statistics, 0, channels, gamma, 1e-5, sums, 0, 2, dgamma, dbeta, correction)
    ops.normalization_backward(*norm)
    found["normalization backward"] = [dgamma, dbeta, correction]
    return found
