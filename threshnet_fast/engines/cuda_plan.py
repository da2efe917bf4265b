"""Plans as programs of the CUDA executor, which launches a whole network in one operator call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.ir import Head, Plan
from ..plan.limits import check_gpu
from ..plan.memory import Arena, plan_memory
from ..plan.serialize import serialize
from .gpu_plan import GpuPlan, Workspace

__all__ = ["CudaPlan", "CudaWorkspace", "Target", "compile_plan", "pack_network"]

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Kinds of steps, as program_algorithms returns them.
_CONVOLUTION = 0


@dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    Attributes:
        device: Where the tensors are.
        dtype: Of features and weights.
        architecture: Compute capability of the device, 90 for 9.0.
        multiprocessors: Of the device.
        shared_bytes: Shared memory that one thread block may have.
    """

    device: torch.device
    dtype: torch.dtype
    architecture: int
    multiprocessors: int
    shared_bytes: int


def compile_plan(plan: Plan, arena: Arena, target: Target) -> Tensor:
    """Compiles a plan for the executor.

    Args:
        plan: The plan, with or without the values of its weights.
        arena: Where its buffers lie.
        target: What to compile for.

    Returns:
        The program, uint8 on the CPU.

    Raises:
        UnsupportedModule: The kernels cannot execute the plan.
    """
    check_gpu(plan)
    program: Tensor = torch.ops.threshnet_fast_cuda.compile_plan(
        serialize(plan, arena),
        _DTYPE_CODES[target.dtype],
        target.architecture,
        target.multiprocessors,
        target.shared_bytes,
    )
    return program


def pack_network(plan: Plan, target: Target) -> Tensor:
    """Packs the weights of a plan that was lowered with their values.

    One packing serves every input shape in the target's dtype, and its beginning the network
    without its head.

    Args:
        plan: The plan, with its head.
        target: Whose dtype to pack in.

    Returns:
        The packed weights, uint8 on the device of the plan's weights.
    """
    program = compile_plan(plan, plan_memory(plan), target)
    weights = [weight.contiguous() for weight in plan.weights()]
    packed: Tensor = torch.ops.threshnet_fast_cuda.pack_weights(program, weights)
    return packed


class CudaPlan(GpuPlan):
    """A plan compiled for the CUDA executor of one device.

    Args:
        plan: The plan, with or without the values of its weights.
        target: What to compile for.
        graphs: Whether to capture the launches in a CUDA graph at the second call on a stream, and
            to replay it from then on.
        arena: Where the buffers lie; None plans it.

    Attributes:
        program: What the executor runs, uint8 on the CPU.
        workspace_bytes: Memory for features and partial sums.

    Raises:
        UnsupportedModule: The kernels cannot execute the plan.
    """

    backend = "cuda"

    def __init__(
        self, plan: Plan, target: Target, *, graphs: bool = True, arena: Arena | None = None
    ) -> None:
        super().__init__(plan, target, graphs=graphs, arena=arena)
        self.target = target
        self.program = compile_plan(plan, self.arena, target)
        self.workspace_bytes: int = torch.ops.threshnet_fast_cuda.workspace_bytes(self.program)

    def describe(self) -> str:
        """One line: dtype, device, kernels, memory."""
        target = self.target
        return (
            f"{target.dtype} on {target.device}, CUDA C++ kernels for sm_{target.architecture}, "
            f"{self.arena_bytes / 1e6:.1f} MB of features"
        )

    @property
    def algorithms(self) -> list[str]:
        """How each of the plan's steps is computed."""
        rows = torch.ops.threshnet_fast_cuda.program_algorithms(self.program).tolist()
        names = [_describe(*row) for row in rows]
        algorithms = []
        for step in self.plan.steps:
            algorithms.append(names.pop(0))
            if isinstance(step, Head) and step.weight is not None:
                # A pool and a convolution in the description.
                names.pop(0)
        return algorithms

    def _new_workspace(self, packed: Tensor, *, graphs: bool) -> CudaWorkspace:
        return CudaWorkspace(self, packed, graphs=graphs)


def _describe(kind: int, pixels: int, columns: int, depth: int, parts: int) -> str:
    if kind != _CONVOLUTION or pixels == 0:
        return "direct"
    split = f", reduction in {parts} parts" if parts > 1 else ""
    return f"implicit GEMM {pixels}x{columns}x{depth}{split}"


class CudaWorkspace(Workspace):
    """The memory of one call at a time."""

    packed: Tensor

    def __init__(self, owner: CudaPlan, packed: Tensor, *, graphs: bool) -> None:
        super().__init__(owner.plan.input_shape, owner.target, packed, graphs=graphs)
        self._program = owner.program
        self._flat_output = owner.flat_output
        self._memory = self._empty(owner.workspace_bytes, torch.uint8)
        self._run = torch.ops.threshnet_fast_cuda.run_plan.default

    def launch(self, x: Tensor) -> Tensor:
        """Enqueues all steps for an input of the target's dtype; the result is a new tensor."""
        output: Tensor = self._run(x, self._program, self.packed, self._memory)
        return output.flatten(1) if self._flat_output else output
