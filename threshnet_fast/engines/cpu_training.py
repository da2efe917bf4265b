"""Training on the CPU in float32: plans compiled in C++, run in one call forward and one back."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..plan.raw import RawPlan
from ..plan.serialize_raw import serialize_raw
from . import cpu
from .training import Held, Shape, check_values, shapes_of

__all__ = ["CpuPass", "PassMemory", "Programs", "Use"]

_ALIGNMENT = 16  # floats
_MAX_PROGRAMS = 8
_NOT_UPDATED = math.nan


class PassMemory(Protocol):
    """Where a pass has memory from."""

    def take(self, floats: int) -> Tensor:
        """Returns a vector in float32, of any values."""

    def give(self, memory: Tensor) -> None:
        """Takes back what :meth:`take` returned, which nobody uses any more."""


@dataclass(frozen=True)
class Use:
    """What a plan is compiled for beside the shape.

    Attributes:
        backward: Whether there is a pass backward.
        checkpoint: Whether that calculates temporary maps again.
        repeatable: Whether it leaves all as it is.
        input_gradient: Whether the gradient of the input is wanted.
    """

    backward: bool
    checkpoint: bool
    repeatable: bool
    input_gradient: bool


class Programs:
    """A plan, compiled for the last few shapes, uses and numbers of threads."""

    def __init__(self, plan: RawPlan) -> None:
        self.plan = plan
        self._description: Tensor | None = None
        self._lock = threading.Lock()
        # Calls may come from several threads at once. The last one used is the last to be
        # forgotten.
        self._programs: dict[tuple[Any, ...], _Program] = {}
        self._none = torch.empty(0)

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, shape: Shape, use: Use) -> _Program:
        """The program for the number of threads in use."""
        threads = torch.get_num_threads()
        isa, winograd = cpu.isa_code(torch.float32), cpu.winograd_by_default()
        key = (shape, use, threads, winograd, isa)
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                if self._description is None:
                    self._description = serialize_raw(self.plan)
                program = _Program(self.plan, self._description, *key)
            self._programs[key] = program
            while len(self._programs) > _MAX_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
        return program

    def given(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Tensors as the operators take them: an empty one where there is none."""
        return [self._none if tensor is None else tensor for tensor in tensors]


class _Program:
    """A compiled plan and the workspaces that no call uses."""

    def __init__(
        self,
        plan: RawPlan,
        description: Tensor,
        shape: Shape,
        use: Use,
        threads: int,
        winograd: int,
        isa: int,
    ) -> None:
        ops = torch.ops.threshnet_fast_cpu
        self.program: Tensor = ops.training_compile(
            description,
            *(shape.batch, shape.height, shape.width),
            *(use.backward, use.checkpoint, use.repeatable, use.input_gradient),
            *(threads, winograd, isa),
        )
        layout: list[int] = ops.training_layout(self.program).tolist()
        kept_floats, scratch_floats, self._workspace_floats, *offsets = layout
        # What follows what a pass forward leaves is for the one backward, or in a piece of its own.
        self.floats = kept_floats + (0 if use.repeatable else scratch_floats)
        self.scratch_floats = scratch_floats if use.repeatable else 0
        self.input_statistics, *offsets = offsets
        self.fixed = offsets[: len(plan.norms)]
        shapes = shapes_of(plan, shape)
        self.output = shapes[plan.output]
        self.single_values = [
            (index, shapes[norm.buffer])
            for index, norm in enumerate(plan.norms)
            if shapes[norm.buffer].pixels == 1
        ]
        self._free: list[Tensor] = []

    @contextmanager
    def workspace(self) -> Iterator[Tensor]:
        """Memory that nobody else uses meanwhile."""
        try:
            workspace = self._free.pop()
        except IndexError:
            memory = torch.empty(self._workspace_floats + _ALIGNMENT)
            skipped = -(memory.data_ptr() // memory.element_size()) % _ALIGNMENT
            workspace = memory[skipped : skipped + self._workspace_floats]
        yield workspace
        self._free.append(workspace)


class CpuPass:
    """A pass forward, which it runs; see :class:`threshnet_fast.engines.training.Pass`.

    Args:
        programs: The plan.
        shape: Of the input.
        rows: The map of the input.
        parameters: As of :class:`Held`.
        use: What it is for.
        memory: Where what it keeps lies.

    Raises:
        ValueError: A norm in training mode has only one value for each channel.
    """

    def __init__(
        self,
        programs: Programs,
        shape: Shape,
        rows: Tensor,
        parameters: Sequence[Tensor | None],
        use: Use,
        memory: PassMemory,
    ) -> None:
        self._programs = programs
        self._shape = shape
        self._use = use
        self._memory = memory
        self._find_settings()
        program = programs.get(shape, use)
        for index, of in program.single_values:
            if self.from_batch[index]:
                check_values(programs.plan.norms[index], of)
        kept = memory.take(program.floats)
        if any(
            norm.buffer == 0 and batch
            for norm, batch in zip(programs.plan.norms, self.from_batch, strict=True)
        ):
            channels = rows.shape[1]
            begin = program.input_statistics
            variance, mean = torch.var_mean(rows, 0, correction=0)
            torch.cat([mean, variance], out=kept[begin : begin + 2 * channels])
        plan = programs.plan
        self.output: Tensor | None = torch.empty(
            program.output.pixels, plan.buffers[plan.output].channels
        )
        with program.workspace() as workspace:
            torch.ops.threshnet_fast_cpu.training_forward(
                program.program,
                rows,
                programs.given(parameters),
                programs.given(self._running),
                self._settings,
                kept,
                self.output,
                workspace,
            )
        self._mark_written()
        self.kept: list[Tensor | None] = [kept]

    def _find_settings(self) -> None:
        """Reads what may differ from call to call: modes and settings of the norms."""
        self.from_batch: list[bool] = []
        self.eps: list[float] = []
        # Mean, variance and number of batches of each norm, where they are read or written.
        self._running: list[Tensor | None] = []
        self._written: list[Tensor] = []
        settings: list[float] = []
        for norm in self._programs.plan.norms:
            module = norm.module
            mean, variance = _buffer(module, "running_mean"), _buffer(module, "running_var")
            missing = mean is None or variance is None
            batch = module.training or missing
            momentum, count = _NOT_UPDATED, None
            if module.training and module.track_running_stats:
                count = _buffer(module, "num_batches_tracked")
                momentum = 0.0 if module.momentum is None else module.momentum
                if count is not None:
                    if module.momentum is None:
                        momentum = 1.0 / (float(count) + 1.0)
                    if count.dtype is torch.int64 and count.device.type == "cpu":
                        self._written.append(count)
                    else:
                        count.add_(1)
                        count = None
                if not missing:
                    self._written += [cast(Tensor, mean), cast(Tensor, variance)]
            self._running += [None, None, count] if missing else [mean, variance, count]
            settings += [batch, module.eps, momentum]
            self.from_batch.append(batch)
            self.eps.append(module.eps)
        self._settings = torch.tensor(settings, dtype=torch.float64).view(-1, 3)

    def _mark_written(self) -> None:
        """Lets autograd and plans of inference know of the running statistics that changed."""
        written = self._written
        if torch.is_inference_mode_enabled():
            written = [tensor for tensor in written if not tensor.is_inference()]
        increment_version(written)
        # Running statistics of a later pass are no business of this one.
        self._running, self._written = [], []

    def fixed_statistics(self, index: int, kept: Sequence[Tensor | None]) -> Tensor:
        """See :meth:`Pass.fixed_statistics`."""
        begin = self._programs.get(self._shape, self._use).fixed[index]
        channels = self._programs.plan.norms[index].channels
        return cast(Tensor, kept[0])[begin : begin + 2 * channels].view(2, channels)

    def backward(
        self,
        held: Held,
        kept: Sequence[Tensor | None],
        gradient: Tensor,
        needs_input: bool,
        needs: Sequence[bool],
        keeps: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """See :meth:`Pass.backward`."""
        repeatable = keeps or self._use.repeatable
        use = Use(True, self._use.checkpoint, repeatable, needs_input)
        program = self._programs.get(self._shape, use)
        (memory,) = cast("Sequence[Tensor]", kept)
        scratch = self._memory.take(program.scratch_floats) if repeatable else torch.empty(0)
        with program.workspace() as workspace:
            found: list[Tensor] = torch.ops.threshnet_fast_cpu.training_backward(
                program.program,
                held.rows,
                held.output,
                gradient,
                self._programs.given(held.parameters),
                self._settings,
                torch.tensor(needs, dtype=torch.bool),
                memory,
                scratch,
                workspace,
            )
        self._memory.give(scratch if repeatable else memory)
        rows_gradient = found.pop() if needs_input else None
        gradients = iter(found)
        return rows_gradient, [next(gradients) if needed else None for needed in needs]


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    buffers = module._buffers
    return buffers[name] if name in buffers else getattr(module, name)
