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

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engines import cpu
from ..engines.training import (
    CppKernels,
    Gradients,
    Kernels,
    Normalization,
    ReferenceKernels,
    Shape,
    Step,
)
from ..graph.modules import graph_of_stages
from ..plan.raw import Convolution, Depthwise, Node, RawPlan, Read, raw
from .map_pool import Pool
from .recomputation import recompute

__all__ = ["CHECKPOINTS", "Chain"]

CHECKPOINTS = (None, "features")
_MAX_SHAPES = 8
# Maps of fewer bytes are left to the C library, which keeps what it gets back of them.
_POOLED_BYTES = 8 << 20
# Where memory counts for more than time, only maps of fewer bytes than these.
_THRIFTY_BYTES = 1 << 18
_PARAMETERS = ("weights", "gammas", "betas")
_TENSORS = (*_PARAMETERS, "maps", "statistics", "fixed", "prologues")


class Chain:
    """Modules that run one after the other, as one function of their input and parameters.

    Args:
        stages: Their names and themselves, see :func:`threshnet_fast.graph.graph_of_stages`.
        in_channels: Channels of the first one's input; None for those that it reads.

    Raises:
        UnsupportedModule: One of them cannot be part of a chain.
    """

    def __init__(self, stages: Sequence[tuple[str, nn.Module]], in_channels: int | None) -> None:
        self.plan: RawPlan = raw(graph_of_stages(stages, in_channels))
        self._norm_readers = [0] * len(self.plan.norms)
        for node in self.plan.nodes:
            for read in node.reads:
                if read.norm is not None:
                    self._norm_readers[read.norm] += 1
        self._lock = threading.Lock()
        # Workspaces that no call uses, by what they depend on. Calls may come from several threads
        # at once.
        self._workspaces: dict[tuple[Any, ...], list[Tensor]] = {}
        self.pool = Pool()

    @property
    def differentiable_input(self) -> bool:
        """Whether there is a gradient of the input: not through a stride or a smaller output."""
        return all(
            node.stride == 1 and 2 * node.padding == node.kernel - 1
            for node in self.plan.nodes
            if isinstance(node, Convolution)
            and not isinstance(node, Depthwise)
            and any(read.buffer == 0 for read in node.reads)
        )

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
                self, x, checkpoint, reference, torch.is_grad_enabled(), *self._parameters()
            ),
        )

    def _parameters(self) -> list[Tensor | None]:
        """Weights of the convolutions, then gamma and beta of the norms, None where they lack."""
        parameters: list[Tensor | None] = [
            node.module.weight for node in self.plan.nodes if isinstance(node, Convolution)
        ]
        for norm in self.plan.norms:
            parameters += [norm.module.weight, norm.module.bias]
        return parameters

    def shapes(self, batch: int, height: int, width: int) -> list[Shape]:
        """The shape of every buffer.

        Args:
            batch: Images.
            height: Rows of the chain's input.
            width: Columns of it.
        """
        shapes: list[Shape] = [Shape(batch, height, width)] * len(self.plan.buffers)
        for node in self.plan.nodes:
            shapes[node.buffer] = shapes[node.reads[0].buffer].after(node)
        return shapes

    @contextmanager
    def kernels(self, shapes: list[Shape], reference: bool) -> Iterator[Kernels]:
        """What executes the nodes on maps of some shapes."""
        if reference:
            yield ReferenceKernels()
            return
        isa = cpu.isa_code(torch.float32)
        winograd = cpu.winograd_by_default()
        key = (shapes[0], isa, winograd, torch.get_num_threads())
        with self._lock:
            # The last one used is the last to be forgotten.
            free = self._workspaces.pop(key, [])
            self._workspaces[key] = free
            while len(self._workspaces) > _MAX_SHAPES:
                self._workspaces.pop(next(iter(self._workspaces)))
            workspace = free.pop() if free else None
        if workspace is None:
            nodes = [(node, shapes[node.reads[0].buffer]) for node in self.plan.nodes]
            workspace = CppKernels.create_workspace(isa, winograd, nodes)
        yield CppKernels(isa, winograd, workspace)
        free.append(workspace)

    def norm_readers(self) -> list[int]:
        """How many nodes read through each norm."""
        return list(self._norm_readers)


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm takes the batch's mean and variance rather than the running ones."""
    return norm.training or norm.running_mean is None or norm.running_var is None


class _Pass:
    """The tensors of one pass forward, and what the pass backward needs of them."""

    def __init__(
        self, chain: Chain, x: Tensor, parameters: Sequence[Tensor | None], reference: bool
    ) -> None:
        plan = chain.plan
        self.chain = chain
        self.reference = reference
        self.shapes = chain.shapes(x.shape[0], x.shape[2], x.shape[3])
        weights = iter(parameters)
        self.weights = [
            next(weights) if isinstance(node, Convolution) else None for node in plan.nodes
        ]
        self.gammas: list[Tensor | None] = []
        self.betas: list[Tensor | None] = []
        for _ in plan.norms:
            self.gammas.append(next(weights))
            self.betas.append(next(weights))
        self.options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        self.from_batch = [_uses_batch(norm.module) for norm in plan.norms]
        self.eps = [norm.module.eps for norm in plan.norms]
        self.maps: list[Tensor | None] = [None] * len(plan.buffers)
        # Whether large maps come from the chain's pool and go back there.
        self.pooled = False
        # Whether it keeps as little as it can.
        self.thrifty = False
        self.maps[0] = x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        self.statistics: list[Tensor | None] = [None] * len(plan.buffers)
        self.fixed: list[Tensor | None] = [None] * len(plan.norms)
        self.prologues: list[Tensor | None] = [None] * len(plan.nodes)
        self._find_statistics()

    def _find_statistics(self) -> None:
        """Makes room for the batch's statistics, and takes the running ones of norms that use them.

        Raises:
            ValueError: A norm in training mode has only one value for each channel.
        """
        plan = self.chain.plan
        for index, norm in enumerate(plan.norms):
            module, shape = norm.module, self.shapes[norm.buffer]
            if not self.from_batch[index]:
                running = [cast(Tensor, module.running_mean), cast(Tensor, module.running_var)]
                self.fixed[index] = torch.stack(running).to(**self.options)
                continue
            if shape.pixels == 1:
                size = torch.Size([shape.batch, norm.channels, shape.height, shape.width])
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got input size {size}"
                )
            if self.statistics[norm.buffer] is None:
                channels = plan.buffers[norm.buffer].channels
                self.statistics[norm.buffer] = torch.empty(2, channels, **self.options)
        if self.statistics[0] is not None:
            assert self.maps[0] is not None
            variance, mean = torch.var_mean(self.maps[0], 0, correction=0)
            self.statistics[0] = torch.stack([mean, variance])

    def normalization(self, index: int) -> Normalization:
        """A norm with the statistics that it takes."""
        norm, fixed = self.chain.plan.norms[index], self.fixed[index]
        batch = self.statistics[norm.buffer]
        return Normalization(
            cast(Tensor, batch) if fixed is None else fixed,
            norm.channel if fixed is None else 0,
            norm.channels,
            self.gammas[index],
            self.betas[index],
            self.eps[index],
        )

    def step(self, index: int) -> Step:
        """A node with its tensors, which are there."""
        node = self.chain.plan.nodes[index]
        return Step(
            node,
            self.shapes[node.reads[0].buffer],
            [self.map_of(read.buffer) for read in node.reads],
            cast(Tensor, self.prologues[index]),
            self.weights[index],
            self.map_of(node.buffer),
        )

    def map_of(self, index: int) -> Tensor:
        """The map of a buffer, which a node before wrote."""
        return cast(Tensor, self.maps[index])

    def new_map(self, index: int) -> Tensor:
        """Memory for the map of a buffer, or for its gradient."""
        pixels, channels = self.shapes[index].pixels, self.chain.plan.buffers[index].channels
        if self._pools(index):
            return self.chain.pool.take(pixels, channels, self.thrifty)
        return torch.empty(pixels, channels, **self.options)

    def drop(self, index: int, map: Tensor | None) -> None:
        """Lets go of a map or gradient of a buffer that :meth:`new_map` made."""
        if map is not None and self._pools(index):
            self.chain.pool.give(map)

    def _pools(self, index: int) -> bool:
        # Others see the chain's input and output.
        floats = self.shapes[index].pixels * self.chain.plan.buffers[index].channels
        return (
            self.pooled
            and 4 * floats >= (_THRIFTY_BYTES if self.thrifty else _POOLED_BYTES)
            and index not in (0, self.chain.plan.output)
        )

    def prepare_prologue(self, index: int, kernels: Kernels) -> None:
        """Makes the prologue of a node, once the statistics of what it reads are known."""
        node = self.chain.plan.nodes[index]
        prologue = torch.empty(3, sum(read.channels for read in node.reads), **self.options)
        start = 0
        for read in node.reads:
            if read.norm is None:
                part = prologue[:, start : start + read.channels]
                part.zero_()
                part[0] = 1
            else:
                kernels.prologue(self.normalization(read.norm), prologue, start)
            start += read.channels
        self.prologues[index] = prologue

    def run(self, index: int, kernels: Kernels, *, again: bool = False) -> None:
        """Runs a node forward; ``again`` where the statistics of what it writes are known."""
        plan = self.chain.plan
        node = plan.nodes[index]
        if self.maps[node.buffer] is None:
            self.maps[node.buffer] = self.new_map(node.buffer)
        kernels.forward(self.step(index), None if again else self.statistics[node.buffer])

    def update_running_statistics(self) -> None:
        """Takes the batch's statistics into the running ones, as BatchNorm does."""
        means: dict[float, list[list[Tensor]]] = {}
        for index, norm in enumerate(self.chain.plan.norms):
            module = norm.module
            if not module.training or not module.track_running_stats:
                continue
            momentum = module.momentum
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
                if momentum is None:
                    momentum = 1.0 / float(module.num_batches_tracked)
            if module.running_mean is None or module.running_var is None:
                continue
            given = self.normalization(index)
            mean, variance = given.statistics[:, given.channel : given.channel + norm.channels]
            count = self.shapes[norm.buffer].pixels
            lists = means.setdefault(0.0 if momentum is None else momentum, [[], [], []])
            lists[0] += [module.running_mean, module.running_var]
            lists[1] += [mean, variance]
            lists[2] += [count / (count - 1)]  # type: ignore[list-item]
        for momentum, (running, batch, unbiased) in means.items():
            scaled = torch._foreach_mul(batch[1::2], cast("list[float]", unbiased))
            batch[1::2] = list(scaled)
            torch._foreach_lerp_(running, batch, momentum)

    def copy(self) -> _Pass:
        """Another pass of the same tensors."""
        other = object.__new__(_Pass)
        other.__dict__.update(self.__dict__)
        for name in _TENSORS:
            setattr(other, name, list(getattr(self, name)))
        return other

    def take(self, everything: bool) -> list[Tensor | None]:
        """Takes tensors out, to be kept by autograd: those that others hold too, or all."""
        tensors = []
        for values, index in self._places(everything):
            tensors.append(values[index])
            values[index] = None
        return tensors

    def put(self, tensors: Sequence[Tensor | None], everything: bool) -> None:
        """Puts back what :meth:`take` returned."""
        for (values, index), tensor in zip(self._places(everything), tensors, strict=True):
            values[index] = tensor

    def _places(self, everything: bool) -> Iterator[tuple[list[Tensor | None], int]]:
        for name in _TENSORS:
            values = getattr(self, name)
            for index in range(len(values)):
                shared = name in _PARAMETERS or (
                    name == "maps" and index in (0, self.chain.plan.output)
                )
                if everything or shared:
                    yield values, index


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
        plan = chain.plan
        run = _Pass(chain, x, parameters, reference)
        wanted = differentiating and any(ctx.needs_input_grad)
        ctx.everything = _has_hooks_on_saved_tensors()
        # Who asks for checkpoints would rather have the memory than the time.
        run.thrifty = checkpoint == "features"
        run.pooled = wanted and not ctx.everything and not reference
        if run.pooled and not run.thrifty:
            chain.pool.begin(run.shapes[0])
        elif wanted:
            chain.pool.clear()
        last_reader = {
            read.buffer: index for index, node in enumerate(plan.nodes) for read in node.reads
        }
        dropped = {
            last_reader[index]: index
            for index, buffer in enumerate(plan.buffers)
            if buffer.temporary and (checkpoint == "features" or not wanted)
        }
        with chain.kernels(run.shapes, reference) as kernels:
            for index in range(len(plan.nodes)):
                run.prepare_prologue(index, kernels)
                run.run(index, kernels)
                if index in dropped:
                    run.drop(dropped[index], run.maps[dropped[index]])
                    run.maps[dropped[index]] = None
        if run.thrifty:
            chain.pool.clear()
        run.update_running_statistics()
        output = run.map_of(plan.output)
        if wanted:
            # Autograd notices where one that it saves is changed before the backward pass, but lets
            # go of none of them before the end of it.
            # The input itself, unlike its map, has a history, for a second derivative.
            given = x if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(given, *run.take(ctx.everything))
            ctx.run = run
        shape = run.shapes[plan.output]
        return output.view(shape.batch, shape.height, shape.width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        run = ctx.run.copy()
        x, *saved = ctx.saved_tensors
        run.put(saved, ctx.everything)
        if torch.is_grad_enabled():
            return _differentiable_gradients(run, x, needs, gradient)
        keeps = _keeps_graph()
        if not keeps:
            ctx.run.take(everything=True)
        gradients = _Backward(run, needs[1], needs[5:], keeps).run(gradient)
        if run.thrifty:
            run.chain.pool.clear()
        return gradients


def _differentiable_gradients(
    run: _Pass, x: Tensor | None, needs: Sequence[bool], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of what the chain's function was called with, with a history of their own.

    Args:
        run: The pass forward.
        x: The chain's input, or None where its gradient is not wanted.
        needs: Which gradients are wanted.
        gradient: Of the chain's output.
    """
    plan = run.chain.plan

    def view(tensor: Tensor | None) -> Tensor | None:
        # Its gradient is that of this use alone, and runs no hooks of the tensor.
        return None if tensor is None else tensor.view_as(tensor)

    if x is None:
        shape = run.shapes[0]
        rows = run.map_of(0).view(shape.batch, shape.height, shape.width, -1)
        x = rows.permute(0, 3, 1, 2)
    run.weights = list(map(view, run.weights))
    run.gammas, run.betas = list(map(view, run.gammas)), list(map(view, run.betas))
    x = x.view_as(x)
    norms = [run.normalization(index) for index in range(len(plan.norms))]
    y = recompute(plan, x, run.weights, norms, run.from_batch)
    parameters = [
        weight
        for node, weight in zip(plan.nodes, run.weights, strict=True)
        if isinstance(node, Convolution)
    ]
    for norm in norms:
        parameters += [norm.gamma, norm.beta]
    inputs = [None, x, None, None, None, *parameters]
    wanted = [index for index, needed in enumerate(needs) if needed]
    found = torch.autograd.grad(
        y, [cast(Tensor, inputs[index]) for index in wanted], gradient, create_graph=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for index, value in zip(wanted, found, strict=True):
        gradients[index] = value
    return tuple(gradients)


class _Backward:
    """One pass backward.

    Args:
        run: The pass forward, whose tensors it lets go of as soon as it can.
        needs_input: Whether the gradient of the input is wanted.
        needs: Whether that of each parameter is.
        keeps: Whether others may run the same pass backward again.
    """

    def __init__(
        self,
        run: _Pass,
        needs_input: bool,
        needs: Sequence[bool],
        keeps: bool,
    ) -> None:
        self.keeps = keeps
        self.forward = run
        self.plan = run.chain.plan
        self.needs_input = needs_input
        needed = iter(needs)
        self.needs_weight = [
            next(needed) if isinstance(node, Convolution) else False for node in self.plan.nodes
        ]
        self.needs_norm = [(next(needed), next(needed)) for _ in self.plan.norms]
        self.gradients: list[Tensor | None] = [None] * len(self.plan.buffers)
        # Channels of each map whose gradient has been written.
        self.written = [bytearray(buffer.channels) for buffer in self.plan.buffers]
        self.corrections = [
            torch.zeros(2, buffer.channels, **run.options) for buffer in self.plan.buffers
        ]
        self.norm_sums: list[Tensor | None] = [None] * len(self.plan.norms)
        self.readers = run.chain.norm_readers()
        self.weight_gradients: list[Tensor | None] = [None] * len(self.plan.nodes)
        self.norm_gradients: list[Tensor | None] = [None] * (2 * len(self.plan.norms))

    def run(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of what the chain's function was called with."""
        plan, run = self.plan, self.forward
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        if any(read.buffer == plan.output for node in plan.nodes for read in node.reads):
            # It is going to be added to.
            rows = rows.clone()
        self.gradients[plan.output] = rows
        self.written[plan.output][:] = b"\1" * len(self.written[plan.output])
        with run.chain.kernels(run.shapes, run.reference) as kernels:
            for index in reversed(range(len(plan.nodes))):
                self._node(index, kernels)
        x_gradient = None
        if self.needs_input:
            x_gradient = self._input_gradient()
        weights = [
            gradient
            for node, gradient in zip(plan.nodes, self.weight_gradients, strict=True)
            if isinstance(node, Convolution)
        ]
        return None, x_gradient, None, None, None, *weights, *self.norm_gradients

    def _input_gradient(self) -> Tensor:
        """The gradient of the chain's input, after what its norms add to it."""
        run, shape = self.forward, self.forward.shapes[0]
        slope, offset = self.corrections[0]
        rows = cast(Tensor, self.gradients[0])
        rows = rows.sub_(run.map_of(0) * slope).add_(offset)
        return rows.view(shape.batch, shape.height, shape.width, -1).permute(0, 3, 1, 2)

    def _node(self, index: int, kernels: Kernels) -> None:
        plan, run = self.plan, self.forward
        node = plan.nodes[index]
        for read in node.reads:
            if run.maps[read.buffer] is None:
                for writer in plan.buffers[read.buffer].writers:
                    run.run(writer, kernels, again=True)
        weight_gradient = None
        if self.needs_weight[index]:
            weight_gradient = torch.empty_like(cast(Tensor, run.weights[index]))
            self.weight_gradients[index] = weight_gradient
        inputs = None
        if self.needs_input or any(
            read.buffer != 0 or read.norm is not None for read in node.reads
        ):
            inputs = Gradients(
                [self._gradient(read.buffer) for read in node.reads],
                [self._claim(read) for read in node.reads],
                torch.empty(2, sum(read.channels for read in node.reads), **run.options),
            )
        kernels.backward(
            run.step(index),
            cast(Tensor, self.gradients[node.buffer]),
            self.corrections[node.buffer],
            inputs,
            weight_gradient,
        )
        if inputs is not None:
            self._add_to_norms(node, inputs.sums, kernels)
        if index == plan.buffers[node.buffer].writers[0]:
            run.drop(node.buffer, self.gradients[node.buffer])
            if not self.keeps:
                run.drop(node.buffer, run.maps[node.buffer])
            self.gradients[node.buffer] = run.maps[node.buffer] = None

    def _gradient(self, buffer: int) -> Tensor:
        gradient = self.gradients[buffer]
        if gradient is None:
            gradient = self.gradients[buffer] = self.forward.new_map(buffer)
        return gradient

    def _claim(self, read: Read) -> bool:
        """Says whether to add to the gradient of what is read, and notes that it is written."""
        written = self.written[read.buffer]
        channels = slice(read.channel, read.channel + read.channels)
        before = written[channels]
        written[channels] = b"\1" * read.channels
        if not any(before):
            return False
        if not all(before):
            gradient = cast(Tensor, self.gradients[read.buffer])[:, channels]
            missing = [channel for channel, flag in enumerate(before) if not flag]
            gradient[:, missing] = 0
        return True

    def _add_to_norms(self, node: Node, sums: Tensor, kernels: Kernels) -> None:
        start = 0
        for read in node.reads:
            part = sums[:, start : start + read.channels]
            start += read.channels
            if read.norm is None:
                continue
            total = self.norm_sums[read.norm]
            if total is None:
                total = self.norm_sums[read.norm] = part.contiguous()
            else:
                total += part
            self.readers[read.norm] -= 1
            if self.readers[read.norm] == 0:
                self._finish_norm(read.norm, total, kernels)

    def _finish_norm(self, index: int, sums: Tensor, kernels: Kernels) -> None:
        """Turns what all readers of a norm found into its gradients and the map's correction."""
        run, norm = self.forward, self.plan.norms[index]
        needs_gamma, needs_beta = self.needs_norm[index]
        gamma, beta = run.gammas[index], run.betas[index]
        gamma_gradient = torch.empty_like(cast(Tensor, gamma)) if needs_gamma else None
        beta_gradient = torch.empty_like(cast(Tensor, beta)) if needs_beta else None
        self.norm_gradients[2 * index : 2 * index + 2] = [gamma_gradient, beta_gradient]
        kernels.norm_backward(
            run.normalization(index),
            sums,
            run.shapes[norm.buffer].pixels,
            gamma_gradient,
            beta_gradient,
            self.corrections[norm.buffer] if run.from_batch[index] else None,
        )
