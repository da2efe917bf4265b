"""Plans as lists of Triton launches over one preallocated arena."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..kernels import (
    autotuning,
    configurations,
    dense_layer,
    head,
    implicit_gemm,
    layout,
    pool,
    stem_convolution,
)
from ..kernels.launch import Launch
from ..plan.ir import FusedConv, Head, Plan, Pool, Segment, Step
from ..plan.limits import reads_input
from ..plan.memory import Arena
from .base import CompilationFailed
from .gpu_plan import GpuPlan, Workspace

__all__ = ["PackedNetwork", "Target", "TritonPlan", "pack_network"]

_COMPILING = CompilationError, OutOfResources, PTXASError


@dataclass(frozen=True)
class Target:
    """What launches are prepared for.

    Attributes:
        device: Where the tensors are.
        dtype: Of features and weights.
        precision: How float32 is multiplied, ``"ieee"`` or ``"tf32"``.
        architecture: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``.
        multiprocessors: Of the device.
    """

    device: torch.device
    dtype: torch.dtype
    precision: str
    architecture: str
    multiprocessors: int


@dataclass(frozen=True)
class _PackedStep:
    weight: layout.PackedWeight | Tensor
    bias: Tensor | None
    prologue: tuple[Tensor, Tensor] | None = None


PackedNetwork = tuple[_PackedStep | None, ...]
"""The weights of each step of a plan, None for a pool; the same for every input shape."""


def pack_network(plan: Plan, dtype: torch.dtype) -> PackedNetwork:
    """Packs the weights of a plan that was lowered with their values.

    Args:
        plan: The plan, with its head.
        dtype: Of the packed weights; vectors over channels are float32.
    """
    return tuple(_pack(step, dtype) for step in plan.steps)


def _pack(step: Step, dtype: torch.dtype) -> _PackedStep | None:
    if isinstance(step, FusedConv):
        channels = [segment.channels for segment in step.inputs]
        columns = _stored_channels(step.output)
        bias = None
        if step.bias is not None:
            bias = step.bias.new_zeros(layout.padded(columns))
            bias[: len(step.bias)] = step.bias
        if reads_input(step):
            return _PackedStep(stem_convolution.pack_stem(step.weight, dtype), bias)
        prologue = None
        if step.prologue is not None:
            scale, shift = step.prologue.scale, step.prologue.shift
            prologue = layout.pack_vector(scale, channels), layout.pack_vector(shift, channels)
        weight = layout.pack_weight(step.weight, channels, dtype, columns)
        return _PackedStep(weight, bias, prologue)
    if isinstance(step, Head) and step.weight is not None:
        return _PackedStep(head.pack_head(step.weight, dtype), step.bias)
    return None


def _stored_channels(segment: Segment) -> int:
    """Returns a segment's channels with those behind it up to the next whole group."""
    return layout.padded(segment.channel + segment.channels) - segment.channel


class TritonPlan(GpuPlan):
    """A plan prepared as Triton launches for one device.

    Args:
        plan: The plan, with or without the values of its weights.
        target: What to prepare for.
        graphs: Whether to capture the launches in a CUDA graph at the second call on a stream, and
            to replay it from then on.
        arena: Where the buffers lie; None plans it.

    Raises:
        UnsupportedModule: The kernels cannot execute the plan.
    """

    backend = "triton"

    def __init__(
        self, plan: Plan, target: Target, *, graphs: bool = True, arena: Arena | None = None
    ) -> None:
        super().__init__(plan, target, graphs=graphs, arena=arena)
        self.target = target
        self._steps = _group(plan, target)

    def describe(self) -> str:
        """One line: dtype, device, kernels, memory."""
        target = self.target
        precision = " in TF32" if target.precision == "tf32" else ""
        return (
            f"{target.dtype}{precision} on {target.device}, {target.architecture} kernels, "
            f"{self.arena_bytes / 1e6:.1f} MB of features"
        )

    @property
    def algorithms(self) -> list[str]:
        """How each of the plan's steps is computed."""
        return [name for prepared in self._steps for name in prepared.algorithms]

    def _new_workspace(self, packed: PackedNetwork, *, graphs: bool) -> TritonWorkspace:
        return TritonWorkspace(self, packed, graphs=graphs)


@dataclass(frozen=True)
class _Prepared:
    """One operation on the device: a step of the plan, or two that run as one kernel."""

    steps: tuple[Step, ...]
    indices: tuple[int, ...]
    algorithms: tuple[str, ...]
    configuration: configurations.Configuration | None


def _group(plan: Plan, target: Target) -> list[_Prepared]:
    """Chooses configurations, and which layers run as one kernel."""
    readers: dict[int, int] = {}
    for step in plan.steps:
        for segment in step.inputs:
            readers[segment.buffer] = readers.get(segment.buffer, 0) + 1
    prepared: list[_Prepared] = []
    index = 0
    while index < len(plan.steps):
        step = plan.steps[index]
        following = plan.steps[index + 1] if index + 1 < len(plan.steps) else None
        layer = _dense_layer(step, following, readers)
        if layer is not None and dense_layer.pays(_dense_layer_problem(plan, *layer, target)):
            prepared.append(
                _Prepared(
                    layer,
                    (index, index + 1),
                    ("dense layer in one kernel", "with the one before"),
                    dense_layer.choose(target.dtype, target.precision, target.architecture),
                )
            )
            index += 2
            continue
        configuration = None
        algorithm = "direct"
        if isinstance(step, FusedConv):
            configuration = _choose(_problem(plan, step, target), target)
            if reads_input(step):
                configuration = replace(configuration, split_k=1)
            algorithm = _describe(configuration)
        prepared.append(_Prepared((step,), (index,), (algorithm,), configuration))
        index += 1
    return prepared


def _choose(problem: configurations.Problem, target: Target) -> configurations.Configuration:
    return autotuning.configuration_for(
        problem, target.architecture, target.multiprocessors, target.device
    )


def _dense_layer(
    first: Step, second: Step | None, readers: dict[int, int]
) -> tuple[FusedConv, FusedConv] | None:
    """Returns two steps if they are a dense layer whose bottleneck nothing else reads."""
    if not isinstance(first, FusedConv) or not isinstance(second, FusedConv):
        return None
    matches = (
        first.kernel == (1, 1)
        and first.prologue is not None
        and first.activation is not None
        and len(first.inputs) == 1
        and second.kernel == (3, 3)
        and second.padding == (1, 1)
        and second.stride == (1, 1)
        and second.prologue is None
        and second.bias is None
        and second.activation is None
        and second.inputs == (first.output,)
        and readers[first.output.buffer] == 1
    )
    return (first, second) if matches else None


def _problem(plan: Plan, step: FusedConv, target: Target) -> configurations.Problem:
    source = plan.buffers[step.inputs[0].buffer]
    goal = plan.buffers[step.output.buffer]
    taps = 1
    for size, out_size, kernel in zip(
        (source.height, source.width), (goal.height, goal.width), step.kernel, strict=True
    ):
        taps *= implicit_gemm.live_taps(size, out_size, kernel, step.stride[0], step.padding[0])[1]
    return configurations.Problem(
        pixels=step.batch * step.output_pixels,
        out_channels=layout.padded(step.output.channels),
        channels=sum(layout.padded(segment.channels) for segment in step.inputs),
        taps=taps,
        dtype=target.dtype,
        precision=target.precision,
    )


def _describe(configuration: configurations.Configuration) -> str:
    tile = f"{configuration.block_m}x{configuration.block_n}x{configuration.block_k}"
    parts = configuration.split_k
    return f"implicit GEMM {tile}" + (f", reduction in {parts} parts" if parts > 1 else "")


class TritonWorkspace(Workspace):
    """The memory of one call at a time, and the launches that use it."""

    packed: PackedNetwork

    def __init__(self, owner: TritonPlan, packed: PackedNetwork, *, graphs: bool) -> None:
        super().__init__(owner.plan.input_shape, owner.target, packed, graphs=graphs)
        self._plan = owner.plan
        self._steps = owner._steps
        self._target = owner.target
        self._arena_plan = owner.arena
        self._arena = self._empty(self._arena_plan.size, self._target.dtype)
        self._floats = self._empty(max(map(self._floats_of, self._steps)), torch.float32)
        self._scratch = self._empty(max(map(self._scratch_of, self._steps)), self._target.dtype)
        self._middle = [
            launch
            for prepared in self._steps[1:-1]
            for launch in self._launches(prepared, None, None)
        ]

    def launch(self, x: Tensor) -> Tensor:
        """Enqueues all steps for an input of the target's dtype; the result is a new tensor."""
        y = self._output()
        launches = self._launches(self._steps[0], x, y) + self._middle
        if len(self._steps) > 1:
            launches += self._launches(self._steps[-1], x, y)
        for launch in launches:
            try:
                launch()
            except (*_COMPILING, RuntimeError) as error:
                if not isinstance(error, _COMPILING) and "PassManager" not in str(error):
                    raise
                name = launch.kernel.__name__
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise CompilationFailed(
                    f"Triton cannot compile {name} for {self._target.architecture}: {lines[-1]}"
                ) from error
        return y

    def _output(self) -> Tensor:
        buffer = self._plan.output
        shape = (self._plan.input_shape[0], buffer.channels, buffer.height, buffer.width)
        if self._plan.flat_output:
            return torch.empty(shape[:2], dtype=self._target.dtype, device=self._target.device)
        return torch.empty(
            shape,
            dtype=self._target.dtype,
            device=self._target.device,
            memory_format=torch.channels_last,
        )

    def _floats_of(self, prepared: _Prepared) -> int:
        """Elements of float32 that a step needs for the parts of its reduction."""
        if prepared.configuration is None or prepared.configuration.split_k == 1:
            return 0
        step = prepared.steps[0]
        pixels = step.batch * self._plan.buffers[step.output.buffer].pixels
        return prepared.configuration.split_k * pixels * _stored_channels(step.output)

    def _scratch_of(self, prepared: _Prepared) -> int:
        if len(prepared.steps) == 1:
            return 0
        assert prepared.configuration is not None
        first, second = prepared.steps
        problem = _dense_layer_problem(self._plan, first, second, self._target)
        return dense_layer.scratch_size(problem, prepared.configuration)

    def _view(self, segment: Segment, x: Tensor | None, y: Tensor | None) -> Tensor:
        """A segment with all of its last group, ``[N, C, H, W]``."""
        buffer = self._plan.buffers[segment.buffer]
        offset = self._arena_plan.offsets[segment.buffer]
        if offset is None:
            view = x if segment.buffer == 0 else y
            assert view is not None
            return view if view.dim() == 4 else view[:, :, None, None]
        pitch = self._arena_plan.pitches[segment.buffer]
        row = buffer.width * pitch
        return self._arena.as_strided(
            (
                self._plan.input_shape[0],
                _stored_channels(segment),
                buffer.height,
                buffer.width,
            ),
            (buffer.height * row, 1, row, pitch),
            offset + segment.channel,
        )

    def _launches(self, prepared: _Prepared, x: Tensor | None, y: Tensor | None) -> list[Launch]:
        step = prepared.steps[0]
        weights = self.packed[prepared.indices[0]]
        source = self._view(step.inputs[0], x, y)
        if len(prepared.steps) == 2:
            return self._dense_layer_launches(prepared, source, y)
        target = self._view(step.output, x, y)
        if isinstance(step, FusedConv):
            assert weights is not None
            assert prepared.configuration is not None
            shared = {
                "stride": step.stride[0],
                "padding": step.padding[0],
                "bias": weights.bias,
                "relu": step.activation is not None,
                "precision": self._target.precision,
                "configuration": prepared.configuration,
            }
            if reads_input(step):
                return stem_convolution.convolve_stem(source, weights.weight, target, **shared)
            return implicit_gemm.convolve(
                [self._view(segment, x, y) for segment in step.inputs],
                weights.weight,
                target,
                prologue=weights.prologue,
                partials=self._floats if prepared.configuration.split_k > 1 else None,
                **shared,
            )
        if isinstance(step, Head):
            if weights is not None:
                assert y is not None
                return head.head(
                    source, weights.weight, weights.bias, y, precision=self._target.precision
                )
            size = source.shape[2:]
            return pool.pool(source, target, kernel=size, stride=1, padding=0, average=True)
        assert isinstance(step, Pool)
        return pool.pool(
            source,
            target,
            kernel=step.kernel,
            stride=step.stride[0],
            padding=step.padding[0],
            average=step.average,
        )

    def _dense_layer_launches(
        self, prepared: _Prepared, source: Tensor, y: Tensor | None
    ) -> list[Launch]:
        first, second = (self.packed[index] for index in prepared.indices)
        assert first is not None
        assert second is not None
        return dense_layer.dense_layer(
            source,
            first.weight,
            first.prologue,
            first.bias,
            second.weight,
            self._view(prepared.steps[1].output, None, y),
            scratch=self._scratch[: self._scratch_of(prepared)],
            precision=self._target.precision,
            configuration=prepared.configuration,
        )


def _dense_layer_problem(
    plan: Plan, first: Step, second: Step, target: Target
) -> dense_layer.Problem:
    buffer = plan.buffers[first.output.buffer]
    return dense_layer.Problem(
        batch=plan.input_shape[0],
        height=buffer.height,
        width=buffer.width,
        channels=first.inputs[0].channels,
        bottleneck=first.output.channels,
        growth=second.output.channels,
        dtype=target.dtype,
        precision=target.precision,
        architecture=target.architecture,
        multiprocessors=target.multiprocessors,
    )
