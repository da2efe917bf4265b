"""What the executors of plans on a GPU share: memory for each stream, CUDA graphs, caches.

A segment of the arena is always whole groups of 16 channels: every step writes zeros behind its own
channels up to the next multiple of 16, so that no step has to mask channels.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..models.network import Network
from ..plan.ir import Plan
from ..plan.limits import check_gpu
from ..plan.lower import lower
from ..plan.memory import Arena, plan_memory
from . import cuda_graphs

__all__ = [
    "CapturedWeights",
    "GpuPlan",
    "GpuPlanCache",
    "GpuTarget",
    "Workspace",
]


# Workspaces kept for a plan, one for each stream that it was called on.
_MAX_WORKSPACES = 4

# Prepared plans kept for a network: one for each input shape, dtype and precision; and what their
# features may take together.
_MAX_PLANS = 16
_MAX_BYTES = 4 << 30


class GpuTarget(Protocol):
    """What a plan is prepared for; equal where one prepared plan can serve for another."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of features and weights."""

    def __hash__(self) -> int: ...


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


Target = TypeVar("Target", bound=GpuTarget)
Prepared = TypeVar("Prepared", bound=GpuPlan)
Packed = TypeVar("Packed")


class CapturedWeights:
    """Packed weights that graphs of the caller read whenever they are replayed.

    Nobody tells when such a graph is gone, so the weights stay as long as the model. Weights that
    are packed anew, in the same dtype and for the same shapes, are written over them: there is one
    copy, however often a model changes and is captured again.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, packed: Any) -> None:
        """Keeps weights that a graph of the caller has begun to read.

        Args:
            packed: A tensor, or tuples and dataclasses of tensors.
        """
        self._kept[_form(packed)] = packed

    def renewed(self, packed: Packed) -> Packed:
        """Returns packed weights in the memory that graphs read, where there is such.

        Args:
            packed: Weights that were packed just now.
        """
        kept: Packed | None = self._kept.get(_form(packed))
        if kept is None:
            return packed
        old, new = _tensors(kept), _tensors(packed)
        for device in {tensor.device for tensor in old if tensor.device.type == "cuda"}:
            # Whatever has been launched before may still read them.
            torch.cuda.synchronize(device)
        with torch.inference_mode():
            for tensor, values in zip(old, new, strict=True):
                tensor.copy_(values)
        return kept


def _tensors(packed: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(packed) if isinstance(leaf, Tensor)]


def _form(packed: Any) -> tuple[Hashable, ...]:
    """What packed weights are apart from their values."""
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in _leaves(packed)
    )


def _leaves(packed: Any) -> Iterator[Any]:
    if isinstance(packed, tuple):
        for item in packed:
            yield from _leaves(item)
    elif is_dataclass(packed):
        for field in fields(packed):
            yield from _leaves(getattr(packed, field.name))
    else:
        yield packed


class GpuPlanCache(ABC, Generic[Target, Prepared, Packed]):
    """Prepared plans and packed weights of a network that does not change.

    The plans that were used last are kept, sixteen at most, and as many as have their features in
    4 GB. Calls may come from several threads at once.

    Args:
        captured: Where to look for memory that graphs of the caller read; None for nowhere.
    """

    def __init__(self, captured: CapturedWeights | None = None) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[torch.Size, bool, Target], Prepared] = OrderedDict()
        self._packed: dict[torch.dtype, Packed] = {}
        self._captured = captured

    def __len__(self) -> int:
        return len(self._plans)

    @abstractmethod
    def _target(self, device: torch.device, dtype: torch.dtype) -> Target:
        """What to prepare for on a device."""

    @abstractmethod
    def _prepare(self, plan: Plan, target: Target) -> Prepared:
        """Prepares a plan without the values of its weights."""

    @abstractmethod
    def _pack(self, whole: Plan, target: Target) -> Packed:
        """Packs the weights of a plan with its head, for every input shape."""

    def get(
        self, module: Network, x: Tensor, *, head: bool, dtype: torch.dtype
    ) -> tuple[Prepared, Packed]:
        """Returns the plan for an input and the weights, packed once for each dtype.

        Args:
            module: The network, always the same.
            x: The input.
            head: Whether to end with the logits rather than with the last features.
            dtype: What to compute in.

        Raises:
            UnsupportedModule: The network cannot be lowered, or the kernels cannot execute it.
            RuntimeError: Weights would have to be packed while a CUDA graph is captured.
        """
        key = (x.shape, head, self._target(x.device, dtype))
        with self._lock:
            plan = self._plans.get(key) or self._add(module, key)
            self._plans.move_to_end(key)
            return plan, self._packed[dtype]

    def _add(self, module: Network, key: tuple[torch.Size, bool, Target]) -> Prepared:
        shape, head, target = key
        plan = self._prepare(lower(module, shape, head=head, fold=False), target)
        if target.dtype not in self._packed:
            if cuda_graphs.capturing(target.device):
                raise RuntimeError(
                    f"weights cannot be packed in {target.dtype} while a CUDA graph is captured: "
                    "call the network once before"
                )
            size = module.min_size
            whole = lower(module, (1, module.in_chans, size, size))
            packed = self._pack(whole, target)
            if self._captured is not None:
                packed = self._captured.renewed(packed)
            self._packed[target.dtype] = packed
            if target.device.type == "cuda":
                # The next call may be on another stream.
                torch.cuda.current_stream(target.device).synchronize()
        self._plans[key] = plan
        kept = sum(each.kept_bytes for each in self._plans.values())
        while len(self._plans) > 1 and (len(self._plans) > _MAX_PLANS or kept > _MAX_BYTES):
            _, oldest = self._plans.popitem(last=False)
            kept -= oldest.kept_bytes
        return plan
