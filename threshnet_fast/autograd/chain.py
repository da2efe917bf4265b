"""A chain of modules as one differentiable function.

Forward, every convolution normalises and activates what it reads, and finds the mean and variance
of what it writes: once for each map, however many read it. Kept for the backward pass are the raw
maps alone.

Backward, what reads a map adds ``scale * d`` to the map's gradient, in place, d being the gradient
before the norm's scale. With m pixels, the norms of the map's readers l together give

    dx = sum_l scale_l * d_l - sum_l scale_l * sum(d_l) / m
         - (x - mean) * sum_l scale_l / (variance + eps_l) * sum(d_l * (x - mean)) / m

("Memory-Efficient Implementation of DenseNets", merged over the readers), whose last two terms are
linear in x: they are applied while the gradient is read, once for each map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engines.cpu_training import CpuPass, Programs, Use
from ..engines.reference_training import ReferencePass
from ..engines.training import Held, Normalization, Pass, Shape
from ..graph.ir import Graph
from ..graph.modules import graph_of_stages
from ..plan.raw import Convolution, Depthwise, Node, RawPlan, raw
from .map_pool import Pool, of_the_system
from .recomputation import recompute

__all__ = ["CHECKPOINTS", "Chain"]

CHECKPOINTS = (None, "features")
# Memory of fewer bytes is left to the C library, which keeps what it gets back of it.
_POOLED_BYTES = 8 << 20
# Where memory counts for more than time, only that of fewer bytes than these.
_THRIFTY_BYTES = 1 << 18


class Chain:
    """Modules that run one after the other, as one function of their input and parameters.

    Args:
        stages: Their names and themselves, see :func:`threshnet_fast.graph.graph_of_stages`.
        in_channels: Channels of the first one's input; None for those that it reads.

    Raises:
        UnsupportedModule: One of them cannot be part of a chain.
    """

    def __init__(self, stages: Sequence[tuple[str, nn.Module]], in_channels: int | None) -> None:
        self._prepare(graph_of_stages(stages, in_channels))

    @classmethod
    def of_graph(cls, graph: Graph) -> Chain:
        """Makes a chain of what computes one map of one other.

        Args:
            graph: The graph.

        Raises:
            UnsupportedModule: A node cannot be part of a chain, which the error's ``value`` tells.
        """
        chain = cls.__new__(cls)
        chain._prepare(graph)
        return chain

    def _prepare(self, graph: Graph) -> None:
        self.plan: RawPlan = raw(graph)
        self.programs = Programs(self.plan)
        # The nodes that lead from the output to the input, by which its size is known.
        self._path: list[Node] = []
        buffer = self.plan.output
        while buffer != 0:
            self._path.insert(0, self.plan.nodes[self.plan.buffers[buffer].writers[0]])
            buffer = self._path[0].reads[0].buffer
        self.pool = Pool()
        nodes = [node for node in self.plan.nodes if isinstance(node, Convolution)]
        self._parameters: list[tuple[nn.Module, str]] = [(node.module, "weight") for node in nodes]
        for norm in self.plan.norms:
            self._parameters += [(norm.module, "weight"), (norm.module, "bias")]

    @property
    def differentiable_input(self) -> bool:
        """Whether there is a gradient of the input: not through a stride or a smaller output."""
        return not self.without_input_gradient

    @property
    def without_input_gradient(self) -> list[Convolution]:
        """The convolutions that read the input and give it no gradient."""
        return [
            node
            for node in self.plan.nodes
            if isinstance(node, Convolution)
            and not isinstance(node, Depthwise)
            and any(read.buffer == 0 for read in node.reads)
            and not (node.stride == 1 and 2 * node.padding == node.kernel - 1)
        ]

    def __call__(self, x: Tensor, checkpoint: str | None = None, reference: bool = False) -> Tensor:
        """Runs the modules.

        Args:
            x: ``[N, C, H, W]`` in any strides.
            checkpoint: ``"features"`` to keep no bottleneck for the backward pass, which then
                calculates them again; None to keep all.
            reference: Whether to run in plain PyTorch, in any dtype and on any device, rather than
                in float32 on the CPU by the C++ kernels.

        Returns:
            ``[N, channels, h, w]`` in channels_last format.

        Raises:
            ValueError: A norm in training mode has only one value for each channel.
        """
        return cast(
            Tensor,
            _ChainFunction.apply(
                self, x, checkpoint, reference, torch.is_grad_enabled(), *self.parameters()
            ),
        )

    def output_shape(self, shape: Shape) -> Shape:
        """The output's shape, of an input of some shape."""
        for node in self._path:
            shape = shape.after(node)
        return shape

    def parameters(self) -> list[Tensor | None]:
        """Weights of the convolutions, then gamma and beta of the norms, None where they lack."""
        # Modules look attributes up in these by far slower means.
        return [
            module._parameters[name] if name in module._parameters else getattr(module, name)
            for module, name in self._parameters
        ]

    def run(
        self,
        shape: Shape,
        held: tuple[Tensor, Sequence[Tensor | None]],
        use: Use,
        reference: bool,
    ) -> Pass:
        """Runs the pass forward.

        Args:
            shape: Of the input.
            held: The input's map and the parameters.
            use: What the pass is for.
            reference: As of a call.
        """
        if not reference:
            memory = _Memory(self.pool, use.backward and not use.repeatable, use.checkpoint)
            return CpuPass(self.programs, shape, *held, use, memory)
        plan = self.plan
        last_reader = {
            read.buffer: index for index, node in enumerate(plan.nodes) for read in node.reads
        }
        dropped = {
            last_reader[index]: index
            for index, buffer in enumerate(plan.buffers)
            if buffer.temporary and (use.checkpoint or not use.backward)
        }
        return ReferencePass(plan, shape, *held, dropped)


@dataclass(frozen=True)
class _Memory:
    """Memory of a pass.

    Attributes:
        pool: Of the chain.
        pooled: Whether large pieces come from there and go back there.
        thrifty: Whether it keeps as little as it can.
    """

    pool: Pool
    pooled: bool
    thrifty: bool

    def take(self, floats: int) -> Tensor:
        """Returns a vector in float32, of any values."""
        nbytes = floats * torch.float32.itemsize
        if self.pooled and self.thrifty and nbytes >= _THRIFTY_BYTES:
            return of_the_system(floats)
        return self.pool.take(floats) if self._pools(nbytes) else torch.empty(floats)

    def give(self, memory: Tensor) -> None:
        """Takes back what :meth:`take` returned, which nobody uses any more."""
        if self._pools(memory.nbytes):
            self.pool.give(memory)

    def _pools(self, nbytes: int) -> bool:
        return self.pooled and not self.thrifty and nbytes >= _POOLED_BYTES


def _has_hooks_on_saved_tensors() -> bool:
    """Whether someone else decides what becomes of the tensors that autograd saves."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _keeps_graph() -> bool:
    """Whether the graph that is run backward may be run backward again."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        x: Tensor,
        checkpoint: str | None,
        reference: bool,
        differentiating: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        wanted = differentiating and any(ctx.needs_input_grad)
        ctx.everything = _has_hooks_on_saved_tensors()
        # Who asks for checkpoints would rather have the memory than the time.
        thrifty = checkpoint == "features"
        shape = Shape(x.shape[0], x.shape[2], x.shape[3])
        if wanted and not ctx.everything and not reference and not thrifty:
            chain.pool.begin(shape)
        elif wanted:
            chain.pool.clear()
        rows = _rows(x)
        # Who is given all tensors may keep them.
        use = Use(wanted, thrifty, ctx.everything, ctx.needs_input_grad[1])
        run = chain.run(shape, (rows, parameters), use, reference)
        output, run.output = cast(Tensor, run.output), None
        if wanted:
            # Autograd notices where one that it saves is changed before the backward pass, but lets
            # go of none of them before the end of it.
            # The input itself, unlike its map, has a history, for a second derivative.
            given = x if ctx.needs_input_grad[1] else None
            kept: list[Tensor | None] = []
            if ctx.everything:
                kept, run.kept = run.kept, []
            ctx.save_for_backward(given, rows, output, *parameters, *kept)
            ctx.run, ctx.chain, ctx.shape = run, chain, shape
        return _images(output, chain.output_shape(shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        run: Pass = ctx.run
        _, needs_input, _, _, _, *needs = ctx.needs_input_grad
        x, rows, output, *saved = ctx.saved_tensors
        held = Held(rows, saved[: len(needs)], output)
        kept = saved[len(needs) :] if ctx.everything else run.kept
        if torch.is_grad_enabled():
            if x is None:
                x = _images(rows, ctx.shape)
            return _differentiable_gradients(
                chain, run, held, kept, x, ctx.needs_input_grad, gradient
            )
        keeps = _keeps_graph()
        if not keeps:
            run.kept = []
        of_output = _rows(gradient)
        plan = chain.plan
        if any(read.buffer == plan.output for node in plan.nodes for read in node.reads):
            # It is going to be added to.
            of_output = of_output.clone()
        rows_gradient, gradients = run.backward(held, kept, of_output, needs_input, needs, keeps)
        x_gradient = None if rows_gradient is None else _images(rows_gradient, ctx.shape)
        return None, x_gradient, None, None, None, *gradients


def _rows(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[pixels, C]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _images(rows: Tensor, shape: Shape) -> Tensor:
    """``[pixels, C]`` to ``[N, C, H, W]``."""
    return rows.view(shape.batch, shape.height, shape.width, -1).permute(0, 3, 1, 2)


def _differentiable_gradients(
    chain: Chain,
    run: Pass,
    held: Held,
    kept: Sequence[Tensor | None],
    x: Tensor,
    needs: Sequence[bool],
    gradient: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of what the chain's function was called with, with a history of their own.

    Args:
        chain: The chain.
        run: The pass forward.
        held: The tensors of it that others hold.
        kept: Those that it kept.
        x: The chain's input.
        needs: Which gradients are wanted.
        gradient: Of the chain's output.
    """
    plan = chain.plan

    def view(tensor: Tensor | None) -> Tensor | None:
        # Its gradient is that of this use alone, and runs no hooks of the tensor.
        return None if tensor is None else tensor.view_as(tensor)

    x = x.view_as(x)
    parameters = list(map(view, held.parameters))
    given = iter(parameters)
    weights = [next(given) if isinstance(node, Convolution) else None for node in plan.nodes]
    norms = [
        Normalization(
            x.new_empty(2, 0) if batch else run.fixed_statistics(index, kept),
            0,
            norm.channels,
            next(given),
            next(given),
            eps,
        )
        for index, (norm, batch, eps) in enumerate(
            zip(plan.norms, run.from_batch, run.eps, strict=True)
        )
    ]
    y = recompute(plan, x, weights, norms, run.from_batch)
    inputs = [None, x, None, None, None, *parameters]
    wanted = [index for index, needed in enumerate(needs) if needed]
    found = torch.autograd.grad(
        y, [cast(Tensor, inputs[index]) for index in wanted], gradient, create_graph=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for index, value in zip(wanted, found, strict=True):
        gradients[index] = value
    return tuple(gradients)
