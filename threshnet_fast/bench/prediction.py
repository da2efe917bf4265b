"""An analytic model of a plan's cost on GPUs. It predicts; it measures nothing and needs no GPU.

Every step is predicted twice. *Fused*, it is one kernel, and a second one that adds partial sums
where the reduction of a convolution is split. *Unfused*, concatenation, BatchNorm, ReLU,
convolution, pooling and linear are kernels of their own, as in the module that was lowered; that
includes the concatenation behind every layer of a dense block, which a plan turns into an offset.

A convolution of a batch of ``M`` output pixels, ``N`` output channels and ``K`` products a sum is
cut into tiles of ``m x n``, its reduction into ``s`` parts. With ``P`` multiprocessors, each of
which has an equal share of the peak arithmetic ``F`` and of the cache's bandwidth ``C``, and with
``e`` bytes an element::

    waves   = ceil(ceil(M / m) * ceil(N / n) * s / P)
    compute = waves * 2 * m * n * (K / s) / (F / P)
    cache   = waves * (e * (m + n) * (K / s) + e' * m * n) / (C / P)    e' = e, or 4 if s > 1
    memory  = bytes from and to device memory / its bandwidth
    seconds = max(compute, cache, memory) + kernel_seconds

``K`` has the channels of every segment rounded up to whole groups of 16 in ``compute``, not in
``cache``, and fused only the taps that can meet a pixel. The tile and ``s`` are those of a short
list that take the least time, the addition of the parts included. Every other kernel only moves
bytes: ``seconds = max(bytes / C, memory) + kernel_seconds``.

This leaves out the caches within a multiprocessor, the latency of dependent loads, the arithmetic
of BatchNorm, ReLU and pooling, and whatever keeps real kernels from peak figures; see
``docs/prediction.md``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..plan.ir import FusedConv, Head, Plan, Pointwise, Pool, Resize, Step
from ..plan.limits import GROUP, live_taps
from .gpus import PRECISIONS, Device, find_device, find_precision

__all__ = [
    "Execution",
    "Kernel",
    "Prediction",
    "StepPrediction",
    "predict",
]

_TILE_SIZES = (16, 32, 64, 128, 256)
_LARGEST_TILE = 128 * 256
_SPLITS = (1, 2, 4, 8, 16)
_PARTIAL_BYTES = 4
_SUM_OF_PARTS = "sum of parts"


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        operation: What it does.
        flops: Operations that it executes, with those on the padding of its tiles; 0 where it only
            moves bytes.
        bytes: Features and weights that it must read and write, each once.
        compute_seconds: Time of the arithmetic, whole waves of tiles.
        cache_seconds: Time of the traffic between multiprocessors and the shared cache.
        memory_seconds: Time of the traffic with device memory.
        tile: Tile and split of the reduction, ``"64x32x4"``; empty where there is none.
    """

    operation: str
    flops: int
    bytes: int
    compute_seconds: float
    cache_seconds: float
    memory_seconds: float
    tile: str = ""

    @property
    def seconds(self) -> float:
        """Time of its work: the longest of the three, as they overlap."""
        return max(self.compute_seconds, self.cache_seconds, self.memory_seconds)


@dataclass(frozen=True)
class Execution:
    """The kernels of one step, fused or unfused.

    Attributes:
        kernels: In order.
        kernel_seconds: That of the device.
    """

    kernels: tuple[Kernel, ...]
    kernel_seconds: float

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return len(self.kernels)

    @property
    def flops(self) -> int:
        """Operations that the kernels execute, with those on padding."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Features and weights that the kernels must read and write."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """Time on the device, kernels one after the other."""
        return sum(kernel.seconds + self.kernel_seconds for kernel in self.kernels)

    @property
    def bound(self) -> str:
        """What most of the time goes into: ``"compute"``, ``"cache"``, ``"memory"``, ``"launch"``.

        ``"launch"`` is what a kernel takes on top of its work.
        """
        parts = dict.fromkeys(("launch", "compute", "cache", "memory"), 0.0)
        for kernel in self.kernels:
            parts["launch"] += self.kernel_seconds
            for name in ("compute", "cache", "memory"):
                if getattr(kernel, f"{name}_seconds") == kernel.seconds:
                    parts[name] += kernel.seconds
                    break
        return max(parts, key=lambda name: parts[name])

    @property
    def tile(self) -> str:
        """Tile of the convolution or linear layer, if there is one."""
        return next((kernel.tile for kernel in self.kernels if kernel.tile), "")


@dataclass(frozen=True)
class StepPrediction:
    """Prediction of one step; times are the growth of the time since the beginning of the call.

    Attributes:
        step: The step.
        output_shape: Channels, height and width of its output.
        fused: Its kernels on this package's executor.
        unfused: Its kernels, one an operation.
        fused_graph_seconds: Fused, in a graph; the first step includes the launch of the graph.
        unfused_graph_seconds: Unfused, in a graph.
        fused_eager_seconds: Fused, enqueued one by one; waiting for the host included.
        unfused_eager_seconds: Unfused, enqueued one by one.
    """

    step: Step
    output_shape: tuple[int, int, int]
    fused: Execution
    unfused: Execution
    fused_graph_seconds: float
    unfused_graph_seconds: float
    fused_eager_seconds: float
    unfused_eager_seconds: float

    @property
    def flops(self) -> int:
        """Operations as usually counted: two a multiply-add, those on padding included."""
        return 2 * self.step.macs


@dataclass(frozen=True)
class Prediction:
    """Prediction of one call of a network. Not a measurement.

    Attributes:
        device: Where.
        precision: One of :data:`PRECISIONS`.
        input_shape: ``(N, C, H, W)``.
        steps: In the plan's order. Every total is the sum over them.
    """

    device: Device
    precision: str
    input_shape: tuple[int, int, int, int]
    steps: tuple[StepPrediction, ...]

    @property
    def flops(self) -> int:
        """Operations as usually counted."""
        return sum(step.flops for step in self.steps)

    @property
    def fused_bytes(self) -> int:
        """Features and weights that the fused kernels must read and write."""
        return sum(step.fused.bytes for step in self.steps)

    @property
    def unfused_bytes(self) -> int:
        """Features and weights that the unfused kernels must read and write."""
        return sum(step.unfused.bytes for step in self.steps)

    @property
    def fused_launches(self) -> int:
        """Kernels of the fused network."""
        return sum(step.fused.launches for step in self.steps)

    @property
    def unfused_launches(self) -> int:
        """Kernels of the unfused network."""
        return sum(step.unfused.launches for step in self.steps)

    @property
    def fused_graph_seconds(self) -> float:
        """Time of a call, fused, in one graph."""
        return sum(step.fused_graph_seconds for step in self.steps)

    @property
    def unfused_graph_seconds(self) -> float:
        """Time of a call, unfused, in one graph."""
        return sum(step.unfused_graph_seconds for step in self.steps)

    @property
    def fused_eager_seconds(self) -> float:
        """Time of a call, fused, enqueued kernel by kernel."""
        return sum(step.fused_eager_seconds for step in self.steps)

    @property
    def unfused_eager_seconds(self) -> float:
        """Time of a call, unfused, enqueued kernel by kernel."""
        return sum(step.unfused_eager_seconds for step in self.steps)


def predict(plan: Plan, device: Device | str, dtype: str | torch.dtype = "float32") -> Prediction:
    """Predicts what every step of a plan costs on a GPU, fused and unfused.

    Formulas and assumptions are those of this module's docstring and of :data:`DEVICES`.

    *Features* pass through the shared cache only if everything that the step reads and writes,
    copies of the unfused execution included, fits in it; else they are read from and written to
    device memory. *Weights* are read from device memory once a call.

    A kernel begins when the one before it has ended and it has been enqueued. In a graph all are
    enqueued after ``graph_seconds``; eagerly, those of the ``i``-th operation after
    ``i * dispatch_seconds``, so that long kernels hide the host's work and short ones wait for it.
    The device is idle at the beginning.

    Args:
        plan: The plan; lowering without folding is enough.
        device: One of :data:`DEVICES`, its name, or a device of your own.
        dtype: One of :data:`PRECISIONS` or a dtype.

    Returns:
        The prediction.

    Raises:
        TypeError: ``plan`` or ``device`` is something else.
        ValueError: There is no such device or precision.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}: expected a Plan")
    if isinstance(device, str):
        device = find_device(device)
    if not isinstance(device, Device):
        raise TypeError(f"device is a {type(device).__name__}: expected a Device or its name")
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(f"dtype is a {type(dtype).__name__}: expected a name or a torch.dtype")
    precision = find_precision(dtype)
    model = _Model(plan, device, precision)
    fused = [model.fused(step) for step in plan.steps]
    unfused = [model.unfused(index) for index in range(len(plan.steps))]
    steps = itertools.starmap(
        StepPrediction,
        zip(
            plan.steps,
            map(model.output_shape, plan.steps),
            fused,
            unfused,
            _elapsed(fused, device, graph=True),
            _elapsed(unfused, device, graph=True),
            _elapsed(fused, device, graph=False),
            _elapsed(unfused, device, graph=False),
            strict=True,
        ),
    )
    return Prediction(device, precision, plan.input_shape, tuple(steps))


def _elapsed(executions: Sequence[Execution], device: Device, *, graph: bool) -> list[float]:
    """Time from the end of each step's predecessor to its own end, on an idle device."""
    times = []
    now = 0.0
    operations = 0
    for execution in executions:
        begin = now
        for kernel in execution.kernels:
            # One call of a library enqueues a convolution and the addition of its parts.
            operations += kernel.operation != _SUM_OF_PARTS
            enqueued = device.graph_seconds if graph else operations * device.dispatch_seconds
            now = max(now, enqueued) + kernel.seconds + device.kernel_seconds
        times.append(now - begin)
    return times


@dataclass(frozen=True)
class _Traffic:
    """What a kernel must move: bytes of features and weights, and whether features stay cached."""

    features: int
    weights: int
    cached: bool

    @property
    def memory(self) -> int:
        return self.weights + (0 if self.cached else self.features)


class _Model:
    """Formulas for one plan, device and precision."""

    def __init__(self, plan: Plan, device: Device, precision: str) -> None:
        self.plan = plan
        self.device = device
        self.size = PRECISIONS[precision]
        self.peak = device.peak_flops(precision)
        self.appended = _appended(plan)

    def output_shape(self, step: Step) -> tuple[int, int, int]:
        buffer = self.plan.buffers[step.output.buffer]
        return step.output.channels, buffer.height, buffer.width

    def fused(self, step: Step) -> Execution:
        reads, writes = self._features(step)
        if isinstance(step, Pool | Pointwise | Resize) or (
            isinstance(step, FusedConv) and step.groups > 1
        ):
            traffic = self._traffic(reads + writes, self.size * step.parameters)
            return self._execution(self._stream(step.describe(), traffic))
        if isinstance(step, Head):
            weights = self.size * step.parameters
            traffic = self._traffic(reads + writes, weights)
            if step.weight is None:
                return self._execution(self._stream(step.describe(), traffic))
            columns, depth = step.weight.shape
            return self._execution(
                *self._product(
                    step.describe(), (step.batch, columns), depth, depth, traffic, pooled=reads
                )
            )
        taps, live = step.kernel[0] * step.kernel[1], self._live_taps(step)
        # Taps that no pixel meets are neither multiplied nor are their weights read.
        dead = step.weight.numel() // taps * (taps - live)
        weights = self.size * (step.parameters - dead)
        depth = live * sum(_whole_groups(segment.channels) for segment in step.inputs)
        return self._execution(
            *self._product(
                step.describe(),
                (step.batch * step.output_pixels, step.output.channels),
                depth,
                live * step.input_channels,
                self._traffic(reads + writes, weights),
            )
        )

    def unfused(self, index: int) -> Execution:
        step = self.plan.steps[index]
        reads, writes = self._features(step)
        if isinstance(step, Pool):
            return self._execution(*self._normalised(step, reads), *self.fused(step).kernels)
        if isinstance(step, Pointwise):
            return self._unfused_pointwise(step, writes)
        if isinstance(step, Resize):
            return self.fused(step)
        if isinstance(step, Head):
            head = self._unfused_head(step, reads, writes)
            return self._execution(*self._normalised(step, reads), *head.kernels)
        weights = self.size * step.parameters
        concatenated = len(step.inputs) > 1
        grown = 0
        if index in self.appended:
            channels = step.output.channel + step.output.channels
            grown = self.size * step.batch * step.output_pixels * channels
        maps = reads * (1 + concatenated + (step.prologue is not None))
        maps += writes * (1 + (step.bias is not None))
        maps += 2 * grown - writes if grown else 0
        cached = maps + weights <= self.device.cache_bytes

        def each(operation: str, features: int) -> Kernel:
            return self._stream(operation, _Traffic(2 * features, 0, cached))

        before, after = [], []
        if concatenated:
            before.append(each("cat", reads))
        if step.prologue is not None:
            before += [each("batchnorm", reads), each("relu", reads)]
        if step.bias is not None:
            after.append(each("batchnorm", writes))
        if step.activation is not None:
            after.append(each(step.activation, writes))
        if grown:
            after.append(each("cat", grown))
        taps = step.kernel[0] * step.kernel[1]
        if step.groups > 1:
            depthwise = self._stream("dwconv", _Traffic(reads + writes, weights, cached))
            return self._execution(depthwise, *after)
        convolution = self._product(
            f"conv{step.kernel[0]}x{step.kernel[1]}",
            (step.batch * step.output_pixels, step.output.channels),
            taps * _whole_groups(step.input_channels),
            taps * step.input_channels,
            _Traffic(reads + writes, weights, cached),
        )
        return self._execution(*before, *convolution, *after)

    def _normalised(self, step: Pool | Head, features: int) -> list[Kernel]:
        """BatchNorm and ReLU before a pool."""
        if step.prologue is None:
            return []
        traffic = _Traffic(2 * features, 0, 2 * features <= self.device.cache_bytes)
        return [self._stream("batchnorm", traffic), self._stream("relu", traffic)]

    def _unfused_pointwise(self, step: Pointwise, features: int) -> Execution:
        """Every sum, BatchNorm and activation a kernel of its own."""
        operations = [("add", 3)] * (len(step.inputs) - 1)
        operations += [("batchnorm", 2)] if step.scale is not None else []
        operations += [(step.activation, 2)] if step.activation is not None else []
        cached = 3 * features <= self.device.cache_bytes
        return self._execution(
            *(
                self._stream(operation, _Traffic(maps * features, 0, cached))
                for operation, maps in operations or [("copy", 2)]
            )
        )

    def _unfused_head(self, step: Head, reads: int, writes: int) -> Execution:
        pooled = self.size * step.batch * step.input.channels
        weights = self.size * step.parameters
        cached = reads + pooled + writes + weights <= self.device.cache_bytes
        pool = self._stream("global avgpool", _Traffic(reads + pooled, 0, cached))
        if step.weight is None:
            return self._execution(pool)
        columns, depth = step.weight.shape
        traffic = _Traffic(pooled + writes, weights, cached)
        linear = self._product("linear", (step.batch, columns), depth, depth, traffic)
        return self._execution(pool, *linear)

    def _execution(self, *kernels: Kernel) -> Execution:
        return Execution(kernels, self.device.kernel_seconds)

    def _features(self, step: Step) -> tuple[int, int]:
        """Bytes of all input and of all output features."""
        output = self.plan.buffers[step.output.buffer].pixels * step.output.channels
        pixels = self.plan.buffers[step.inputs[0].buffer].pixels
        channels = sum(segment.channels for segment in step.inputs)
        return (
            self.size * step.batch * pixels * channels,
            self.size * step.batch * output,
        )

    def _traffic(self, features: int, weights: int) -> _Traffic:
        return _Traffic(features, weights, features + weights <= self.device.cache_bytes)

    def _live_taps(self, step: FusedConv) -> int:
        source = self.plan.buffers[step.inputs[0].buffer]
        target = self.plan.buffers[step.output.buffer]
        sizes = ((source.height, target.height), (source.width, target.width))
        rows, columns = (
            live_taps(*size, *window)
            for size, *window in zip(sizes, step.kernel, step.stride, step.padding, strict=True)
        )
        return (rows[1] - rows[0]) * (columns[1] - columns[0])

    def _stream(self, operation: str, traffic: _Traffic) -> Kernel:
        """A kernel that only moves bytes, all multiprocessors at work."""
        moved = traffic.features + traffic.weights
        return Kernel(
            operation,
            0,
            moved,
            0.0,
            moved / self.device.cache_bandwidth,
            traffic.memory / self.device.memory_bandwidth,
        )

    def _product(
        self,
        operation: str,
        shape: tuple[int, int],
        depth: int,
        loaded_depth: int,
        traffic: _Traffic,
        pooled: int = 0,
    ) -> tuple[Kernel, ...]:
        """A matrix product in the tiles that take the least time.

        Args:
            operation: For people.
            shape: Rows and columns of the result.
            depth: Products a sum, with the padding to whole groups of channels.
            loaded_depth: Products a sum without it: padding is not loaded.
            traffic: What it must move.
            pooled: Bytes that are averaged into its rows first; it is then one kernel.
        """
        rows, columns = shape
        splits = (1,) if pooled else tuple(s for s in _SPLITS if s == 1 or depth >= 4 * GROUP * s)
        candidates = (
            self._tiled(operation, shape, (m, n, split), depth, loaded_depth, traffic, pooled)
            for m, n, split in itertools.product(_TILE_SIZES, _TILE_SIZES, splits)
            if m * n <= _LARGEST_TILE and m < 2 * max(rows, GROUP) and n < 2 * max(columns, GROUP)
        )
        return min(candidates, key=lambda kernels: self._execution(*kernels).seconds)

    def _tiled(
        self,
        operation: str,
        shape: tuple[int, int],
        tile: tuple[int, int, int],
        depth: int,
        loaded_depth: int,
        traffic: _Traffic,
        pooled: int,
    ) -> tuple[Kernel, ...]:
        device = self.device
        (rows, columns), (m, n, split) = shape, tile
        tiles = _blocks(rows, m) * _blocks(columns, n) * split
        waves = _blocks(tiles, device.multiprocessors)
        part = GROUP * _blocks(depth, GROUP * split)
        written = m * n * (_PARTIAL_BYTES if split > 1 else self.size)
        loaded = self.size * (m + n) * loaded_depth / split
        share = device.multiprocessors / device.cache_bandwidth
        kernel = Kernel(
            operation,
            2 * m * n * part * tiles,
            traffic.features + traffic.weights,
            waves * 2 * m * n * part * device.multiprocessors / self.peak,
            waves * (loaded + written) * share + pooled / device.cache_bandwidth,
            traffic.memory / device.memory_bandwidth,
            f"{m}x{n}" + (f"x{split}" if split > 1 else ""),
        )
        if split == 1:
            return (kernel,)
        partials = (split * _PARTIAL_BYTES + self.size) * rows * columns
        addition = Kernel(_SUM_OF_PARTS, 0, 0, 0.0, partials / device.cache_bandwidth, 0.0)
        return (kernel, addition)


def _appended(plan: Plan) -> frozenset[int]:
    """Steps whose output a dense layer's module would concatenate with the features before it.

    Their output lies behind other channels that a later step reads together with it.
    """
    return frozenset(
        index
        for index, step in enumerate(plan.steps)
        if any(
            segment.buffer == step.output.buffer
            and segment.channel < step.output.channel
            and segment.channel + segment.channels >= step.output.channel + step.output.channels
            for later in plan.steps[index + 1 :]
            for segment in later.inputs
        )
    )


def _whole_groups(channels: int) -> int:
    return GROUP * _blocks(channels, GROUP)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
