"""What the executors of plans on a GPU share: memory for each stream, CUDA graphs, caches.

A segment of the arena is always whole groups of 16 channels: every step writes zeros behind its own
channels up to the next multiple of 16, so that no step has to mask channels.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..plan.ir import Plan
from ..plan.limits import check_gpu, of_convolution_on_a_gpu
from ..plan.memory import Arena, plan_memory
from . import cuda_graphs
from .base import Engine, GpuTarget, Purpose, Source

__all__ = ["DTYPES", "GpuEngine", "GpuPlan", "GpuSetting", "Workspace"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels compute in."""


# Workspaces kept for a plan, one for each stream that it was called on.
_MAX_WORKSPACES = 4

# What the features of a network's prepared plans may take together.
_MAX_BYTES = 4 << 30


class GpuSetting(NamedTuple):
    """What a plan is prepared for.

    Attributes:
        target: The device, the dtype, and what else decides on the kernels.
        graphs: Whether launches are captured in CUDA graphs.
    """

    target: GpuTarget
    graphs: bool


class GpuEngine(Engine):
    """What the engines for GPUs have in common."""

    dtypes: ClassVar = {Purpose.NETWORK: DTYPES, Purpose.OPERATOR: DTYPES}
    converts = True
    max_kept_bytes = _MAX_BYTES

    def setting(self, device: torch.device, dtype: torch.dtype, frozen: Any = None) -> GpuSetting:
        """See :meth:`.base.Engine.setting`."""
        return GpuSetting(self._target(device, dtype), cuda_graphs.enabled())

    def prepare(
        self, source: Source, shape: Sequence[int], *, head: bool, setting: GpuSetting
    ) -> GpuPlan:
        """See :meth:`.base.Engine.prepare`."""
        plan = source(shape, head=head, values=False)
        return self._prepare(plan, setting.target, graphs=setting.graphs)

    def pack(
        self,
        source: Source,
        prepared: GpuPlan,
        shape: Sequence[int],
        *,
        head: bool,
        setting: GpuSetting,
    ) -> Any:
        """See :meth:`.base.Engine.pack`."""
        return self._pack(source(None, head=True, values=True), setting.target)

    @abstractmethod
    def _target(self, device: torch.device, dtype: torch.dtype) -> GpuTarget:
        """What to prepare for on a device."""

    @abstractmethod
    def _prepare(self, plan: Plan, target: Any, *, graphs: bool) -> GpuPlan:
        """Prepares a plan without the values of its weights."""

    @abstractmethod
    def _pack(self, whole: Plan, target: Any) -> Any:
        """Packs the weights of a plan with its head, for every input shape."""

    def _limits(
        self, xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
    ) -> dict[str, tuple[int, int]]:
        return of_convolution_on_a_gpu(xs, weight, shape, padding)


class GpuPlan(ABC):
    """A plan prepared for one device.

    Calls may come from several threads and on any stream: each stream has a workspace of its own,
    and a lock keeps the launches of two threads on one stream apart.

    Args:
        plan: The plan, with or without the values of its weights.
        target: What to prepare for.
        graphs: Whether to capture the launches in a CUDA graph at the second call on a stream, and
            to replay it from then on.
        arena: Where the buffers lie; None plans it.

    Attributes:
        plan: The plan.
        flat_output: Whether the result is ``[N, channels]``.
        arena: Where the buffers lie.

    Raises:
        UnsupportedModule: The kernels cannot execute the plan.
    """

    backend: str

    def __init__(self, plan: Plan, target: GpuTarget, *, graphs: bool, arena: Arena | None) -> None:
        check_gpu(plan)
        self.plan = plan
        self.flat_output = plan.flat_output
        self.arena = plan_memory(plan) if arena is None else arena
        self._device = target.device
        self._dtype = target.dtype
        self._graphs = graphs and target.device.type == "cuda"
        self._lock = threading.Lock()
        self._workspaces: OrderedDict[int, Workspace] = OrderedDict()

    @abstractmethod
    def describe(self) -> str:
        """One line: dtype, device, kernels, memory."""

    @property
    @abstractmethod
    def algorithms(self) -> list[str]:
        """How each of the plan's steps is computed."""

    @abstractmethod
    def _new_workspace(self, packed: Any, *, graphs: bool) -> Workspace: ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._device

    @property
    def packing(self) -> Hashable:
        """Packed weights serve all plans of one dtype."""
        return self._dtype

    @property
    def arena_bytes(self) -> int:
        """Memory for features."""
        return self.arena.size * self._dtype.itemsize

    @property
    def kept_bytes(self) -> int:
        """Memory for features that is kept for the next call, on all streams; at least on one."""
        return self.arena_bytes * max(1, len(self._workspaces))

    def __call__(self, x: Tensor, packed: Any) -> Tensor:
        """Runs the plan on the current stream.

        Args:
            x: ``[N, C, H, W]`` of the plan's shape, on the target's device, in any strides and any
                floating dtype.
            packed: The plan's packed weights.

        Returns:
            ``[N, channels]``, or ``[N, C, H, W]`` in channels_last format, in the target's dtype.
        """
        if self._device.type != "cuda":
            return self._workspace(0, packed).run(x)
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                # Memory of the capturing graph's own pool: a replay may overlap with other calls.
                return self._new_workspace(packed, graphs=False).run(x)
            stream = torch.cuda.current_stream().cuda_stream
            return self._workspace(stream, packed).run(x)

    def _workspace(self, stream: int, packed: Any) -> Workspace:
        with self._lock:
            workspace = self._workspaces.get(stream)
            if workspace is None or workspace.packed is not packed:
                workspace = self._new_workspace(packed, graphs=self._graphs)
                self._workspaces[stream] = workspace
            self._workspaces.move_to_end(stream)
            if len(self._workspaces) > _MAX_WORKSPACES:
                self._workspaces.popitem(last=False)
            return workspace


class Workspace(ABC):
    """The memory of one call at a time, and what runs in it.

    Args:
        input_shape: ``(N, C, H, W)``.
        target: What its plan is prepared for.
        packed: The plan's packed weights.
        graphs: Whether to capture the launches at the second call.

    Attributes:
        packed: The plan's packed weights.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int, int],
        target: GpuTarget,
        packed: Any,
        *,
        graphs: bool,
    ) -> None:
        self.packed = packed
        self._input_shape = input_shape
        self._device = target.device
        self._dtype = target.dtype
        self._graphs = graphs
        self._calls = 0
        self._graph: cuda_graphs.Graph | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def launch(self, x: Tensor) -> Tensor:
        """Enqueues all steps for an input of the target's dtype; the result is a new tensor."""

    def run(self, x: Tensor) -> Tensor:
        """Runs all steps, replaying a graph where there is one; the result is a new tensor."""
        with self._lock:
            if not self._graphs:
                return self.launch(x.to(self._dtype))
            self._calls += 1
            if self._graph is None:
                # The first call compiles, which a capture must not.
                if self._calls == 1:
                    return self.launch(x.to(self._dtype))
                self._graph = cuda_graphs.Graph(self.launch, self._static_input())
            return self._graph(x)

    def _empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        # Written outside of inference mode later on, which inference tensors refuse.
        with torch.inference_mode(False):
            return torch.empty(elements, dtype=dtype, device=self._device)

    def _static_input(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(self._input_shape, dtype=self._dtype, device=self._device)
