"""What each step of a network takes on the CPU, beside what the processor can do at best."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engines import cpu
from ..errors import CommandError
from ..models.network import Network
from ..plan import FusedConv, Head, Plan, Pool, Step, lower
from ..plan.ir import Pointwise, Resize
from ..plan.lower import PlanSource
from . import machine
from .report import thread_count
from .timing import percentile, progress_bar

__all__ = [
    "Machine",
    "Measurement",
    "Profile",
    "StepProfile",
    "measure",
    "measure_again",
    "measure_machine",
    "profile",
]

_MIN_CALLS = 3
_WARM_UP_CALLS = 3
# How often the processor is measured at most, after the steps, until all threads together reach
# this part of one thread's peak times their number. Threads that share a core never do.
_MEASUREMENTS = 4
_UNDISTURBED = 0.9
# Far beyond any last level cache, and still quick to read.
_MEMORY_BYTES = 256 << 20
# What a step of the description is made of, in the order of the operator's columns.
_PARTS = ("transform", "itself", "reduction")
_MAIN_KINDS = ("1x1", "3x3")


@dataclass(frozen=True)
class Machine:
    """What the processor can do at best.

    Attributes:
        peak: Floating-point operations a second of all threads, by an FMA loop.
        peak_one_thread: The same of one.
        bandwidth: Bytes a second of all threads, reading from memory.
    """

    peak: float
    peak_one_thread: float
    bandwidth: float

    def best(self, other: Machine) -> Machine:
        """The better of two measurements, number by number."""
        return Machine(
            max(self.peak, other.peak),
            max(self.peak_one_thread, other.peak_one_thread),
            max(self.bandwidth, other.bandwidth),
        )


@dataclass(frozen=True)
class StepProfile:
    """One step, or the sum of several.

    Attributes:
        name: The module that it comes from.
        operation: What it computes.
        kind: ``"stem"``, ``"pool"``, ``"head"``, or the window of a convolution.
        algorithm: As :attr:`threshnet_fast.engines.cpu.CompiledPlan.algorithms` has it.
        macs: Multiply-adds of direct convolution, those on padding included.
        executed_macs: Multiplications that the algorithm does.
        bytes: Features and weights read and written, once each.
        fastest: Its fastest time, seconds.
        median: Its median time.
        transform: The part of the median that transforms inputs in a pass of its own.
        reduction: The part of the median that adds up partial sums in a pass of its own.
        steps: How many steps these are.
    """

    name: str
    operation: str
    kind: str
    algorithm: str
    macs: int
    executed_macs: int
    bytes: int
    fastest: float
    median: float
    transform: float = 0.0
    reduction: float = 0.0
    steps: int = 1

    @property
    def flops(self) -> float:
        """Floating-point operations a second, as direct convolution counts them."""
        return 2 * self.macs / self.fastest

    @property
    def executed_flops(self) -> float:
        """Floating-point operations a second that the algorithm really does."""
        return 2 * self.executed_macs / self.fastest


@dataclass(frozen=True)
class Profile:
    """A network's steps on one input.

    Attributes:
        steps: All of them, in order.
        calls: How many calls the times are of.
        call_fastest: The fastest call without the profiler, seconds.
        call_median: The median call without the profiler.
    """

    steps: tuple[StepProfile, ...]
    calls: int
    call_fastest: float
    call_median: float

    @property
    def total(self) -> StepProfile:
        """The sum of all steps."""
        return _sum("all", self.steps)

    def sums(self) -> list[StepProfile]:
        """The sums by kind of step, in the order in which the kinds first occur."""
        kinds = dict.fromkeys(step.kind for step in self.steps)
        return [_sum(kind, [s for s in self.steps if s.kind == kind]) for kind in kinds]

    def convolutions(self) -> StepProfile:
        """The sum of all convolutions of 1x1 and 3x3 windows behind the stem."""
        return _sum(" + ".join(_MAIN_KINDS), [s for s in self.steps if s.kind in _MAIN_KINDS])


@dataclass(frozen=True)
class Measurement:
    """A profile, and what it was measured beside.

    Attributes:
        title: Network, input, threads and instruction set, in one line.
        profile: What the steps took.
        limits: What the processor can do.
        threads: Threads that worked.
        isa: Name of the instruction set of the kernels.
        exact: Whether only direct convolution was allowed.
        other_load: Processors that other processes kept busy meanwhile; None if unknown.
    """

    title: str
    profile: Profile
    limits: Machine
    threads: int
    isa: str
    exact: bool
    other_load: float | None


def _sum(kind: str, steps: Sequence[StepProfile]) -> StepProfile:
    return StepProfile(
        name="",
        operation="",
        kind=kind,
        algorithm="",
        macs=sum(step.macs for step in steps),
        executed_macs=sum(step.executed_macs for step in steps),
        bytes=sum(step.bytes for step in steps),
        fastest=sum(step.fastest for step in steps),
        median=sum(step.median for step in steps),
        transform=sum(step.transform for step in steps),
        reduction=sum(step.reduction for step in steps),
        steps=len(steps),
    )


def measure_machine(isa: int, threads: int) -> Machine:
    """Measures what the processor can do now; takes about half a second.

    Args:
        isa: As :func:`threshnet_fast.engines.cpu.isa_code` returns it.
        threads: Threads to use, at most torch's.

    Raises:
        RuntimeError: An argument is out of range.
    """
    operators = torch.ops.threshnet_fast_cpu
    peak = operators.peak_flops(isa, threads)
    one = peak if threads == 1 else operators.peak_flops(isa, 1)
    # Written before it is read: pages that were never touched are all one page of zeros.
    memory = torch.ones(_MEMORY_BYTES // 4)
    return Machine(peak, one, operators.read_bandwidth(memory, threads))


def measure_again(limits: Machine, isa: int, threads: int) -> Machine:
    """Measures what the processor can do until nothing seems to have disturbed it.

    Args:
        limits: What was measured before.
        isa: As for :func:`measure_machine`, ``threads`` too.
        threads: Threads to use.

    Returns:
        The best of all measurements.
    """
    for _ in range(_MEASUREMENTS):
        limits = limits.best(measure_machine(isa, threads))
        if limits.peak >= _UNDISTURBED * threads * limits.peak_one_thread:
            break
    return limits


def measure(
    module: nn.Module,
    name: str,
    x: Tensor,
    *,
    seconds: float | None = None,
    calls: int | None = None,
) -> Measurement:
    """Profiles a network on an input under a progress bar, and what the processor can do.

    The engine has the instruction set and the algorithms that the environment allows, and as many
    threads as torch.

    Args:
        module: The network, in evaluation mode.
        name: What error messages and the title call it.
        x: float32 images.
        seconds: As for :func:`profile`.
        calls: Instead of ``seconds``.

    Raises:
        CommandError: The engine is unavailable, or the network is nothing that it runs.
    """
    reason = cpu.unavailable_reason()
    if reason is not None:
        raise CommandError(f"a profile needs the C++ engine: {reason}")
    if not isinstance(module, Network):
        raise CommandError(f"{name} is nothing that the C++ engine runs", 2)
    isa, winograd = cpu.isa_code(), cpu.winograd_by_default()
    threads = torch.get_num_threads()
    batch, _, height, width = x.shape
    title = f"{name}, {height}x{width}, batch {batch}, float32, {thread_count(threads)}"
    others = machine.OtherLoad()
    limits = measure_machine(isa, threads)
    with torch.inference_mode(), progress_bar(title) as progress:
        found = profile(
            module,
            x,
            isa=isa,
            winograd=winograd,
            seconds=seconds,
            calls=calls,
            progress=progress,
        )
    limits = measure_again(limits, isa, threads)
    exact = winograd == 0
    title += f", {cpu.isa()}" + (", exact" if exact else "")
    return Measurement(title, found, limits, threads, cpu.isa(), exact, others.stop())


def profile(
    module: Network,
    x: Tensor,
    *,
    isa: int,
    winograd: int,
    seconds: float | None = None,
    calls: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Profile:
    """Profiles a network on an input; calls with and without the profiler take turns.

    Args:
        module: The network, in evaluation mode.
        x: float32 images.
        isa: As :func:`threshnet_fast.engines.cpu.isa_code` returns it.
        winograd: As :func:`threshnet_fast.engines.cpu.winograd_by_default` returns it.
        seconds: Goes on until this time is over, three calls at least.
        calls: Number of profiled calls; exactly one of the two is given.
        progress: Called after every turn with the part of the work that is done, 0 to 1.

    Raises:
        ValueError: Not exactly one of ``seconds`` and ``calls`` is given.
        RuntimeError: The profiled calls return something else than the others.
    """
    if (seconds is None) == (calls is None):
        raise ValueError("expected exactly one of seconds and calls")
    source = PlanSource(module)
    threads = torch.get_num_threads()
    compiled = cpu.compile_network(
        source, x.shape, head=True, isa=isa, threads=threads, winograd=winograd
    )
    packed = cpu.pack_network(source, compiled)
    operators = torch.ops.threshnet_fast_cpu
    workspace = operators.create_workspace(compiled.program, threads)

    def profiled() -> tuple[Tensor, Tensor]:
        output, times = operators.profile_plan(x, compiled.program, packed, workspace)
        return output.flatten(1) if compiled.flat_output else output, times

    for _ in range(_WARM_UP_CALLS):
        expected, (output, _) = compiled(x, packed), profiled()
    if not torch.equal(output, expected):
        raise RuntimeError("the profiled calls return something else than ordinary ones")
    clock = time.perf_counter_ns
    plain: list[float] = []
    parts: list[Tensor] = []
    start = clock()
    while True:
        elapsed = (clock() - start) / 1e9
        done = len(parts) / (calls or _MIN_CALLS)
        if seconds is not None:
            done = min(done, elapsed / seconds)
        if progress is not None:
            progress(min(done, 1.0))
        if done >= 1:
            break
        before = clock()
        compiled(x, packed)
        plain.append((clock() - before) / 1e9)
        parts.append(profiled()[1])
    plan = lower(module, x.shape, fold=False)
    return Profile(
        tuple(_steps(plan, compiled.algorithms, torch.stack(parts).double() / 1e9)),
        len(parts),
        min(plain),
        percentile(plain, 0.5),
    )


def _steps(plan: Plan, algorithms: Sequence[str], times: Tensor) -> list[StepProfile]:
    """Puts together what is known of a plan's steps.

    Args:
        plan: The plan, of the whole batch.
        algorithms: Of each step of the description; a head may be two.
        times: Seconds, ``[calls, steps of the description, parts]``.
    """
    steps = []
    end = 0
    for step in plan.steps:
        # Only a head with a classifier is more than one step of the description.
        first, end = end, end + (1 + (isinstance(step, Head) and step.weight is not None))
        parts = times[:, first:end].sum(1)
        whole = parts.sum(1)
        medians = dict(zip(_PARTS, parts.quantile(0.5, 0).tolist(), strict=True))
        algorithm = algorithms[first]
        steps.append(
            StepProfile(
                name=step.name,
                operation=step.describe(),
                kind=_kind(step),
                algorithm=algorithm,
                macs=step.macs,
                executed_macs=_executed_macs(plan, step, algorithm),
                bytes=step.bytes_fused,
                fastest=float(whole.min()),
                median=float(whole.quantile(0.5)),
                transform=medians["transform"],
                reduction=medians["reduction"],
            )
        )
    return steps


_KINDS = {Pool: "pool", Head: "head", Pointwise: "pointwise", Resize: "resize"}


def _kind(step: Step) -> str:
    if isinstance(step, FusedConv):
        # The image is the first buffer.
        if any(segment.buffer == 0 for segment in step.inputs):
            return "stem"
        return "x".join(map(str, step.kernel))
    return _KINDS[type(step)]


def _executed_macs(plan: Plan, step: Step, algorithm: str) -> int:
    """The multiplications of the products, without those of Winograd's transforms."""
    winograd = re.match(r"winograd\D*(\d*)", algorithm)
    if winograd is None or not isinstance(step, FusedConv):
        # A gathered input holds the zeros of the padding too.
        return step.macs if algorithm == "packed" else step.valid_macs
    size = int(winograd[1] or 2)
    output = plan.buffers[step.output.buffer]
    tiles = step.batch * -(-output.height // size) * -(-output.width // size)
    positions = (size + step.kernel[0] - 1) * (size + step.kernel[1] - 1)
    return tiles * positions * step.input_channels * step.output.channels
