"""Training in plain PyTorch, a node at a time: in any dtype and on any device.

A prologue is ``[3, channels]``: scale, shift and the mean that its norm subtracts, so that
``norm(x) = x * scale + shift``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ..plan.raw import AveragePool, Convolution, MaxPool, Node, RawPlan, Read
from .training import Held, Normalization, Shape, check_values, shapes_of, uses_batch

__all__ = ["ReferencePass"]


@dataclass(frozen=True)
class _Gradients:
    """Where the gradients of what a node reads go.

    Attributes:
        maps: One for each read.
        accumulate: For each, whether they are added to what is there.
        sums: ``[2, channels]``: of the gradient d before the prologue's scale, the sums over all
            pixels of ``d`` and of ``d * (x - mean)``.
    """

    maps: Sequence[Tensor]
    accumulate: Sequence[bool]
    sums: Tensor


@dataclass(frozen=True)
class _Step:
    """A node with the tensors that it works on.

    Attributes:
        node: The node.
        shape: Of the maps that it reads.
        maps: The map of each read.
        prologue: Of all channels that it reads.
        weight: Of a convolution.
        output: The map that it writes to.
    """

    node: Node
    shape: Shape
    maps: Sequence[Tensor]
    prologue: Tensor
    weight: Tensor | None
    output: Tensor


class ReferencePass:
    """A pass forward, which it runs; see :class:`threshnet_fast.engines.training.Pass`.

    Args:
        plan: What is computed.
        shape: Of the input.
        rows: The map of the input.
        parameters: As of :class:`Held`.
        dropped: Of each node, the temporary map that is let go of after it, or None.

    Raises:
        ValueError: A norm in training mode has only one value for each channel.
    """

    def __init__(
        self,
        plan: RawPlan,
        shape: Shape,
        rows: Tensor,
        parameters: Sequence[Tensor | None],
        dropped: dict[int, int],
    ) -> None:
        self._plan = plan
        self._shapes = shapes_of(plan, shape)
        self.from_batch = [uses_batch(norm.module) for norm in plan.norms]
        self.eps = [norm.module.eps for norm in plan.norms]
        run = _Run(self, rows, parameters)
        run.find_statistics()
        for index in range(len(plan.nodes)):
            run.prepare_prologue(index)
            run.run(index)
            if index in dropped:
                run.maps[dropped[index]] = None
        run.update_running_statistics()
        self.output: Tensor | None = run.maps[plan.output]
        run.maps[0] = run.maps[plan.output] = None
        self.kept = [*run.maps, *run.statistics, *run.fixed, *run.prologues]

    def _resume(self, held: Held, kept: Sequence[Tensor | None]) -> _Run:
        """The pass with the tensors that it left."""
        plan = self._plan
        run = _Run(self, held.rows, held.parameters)
        left = iter(kept)
        for values in (run.maps, run.statistics, run.fixed, run.prologues):
            values[:] = [next(left) for _ in values]
        run.maps[0], run.maps[plan.output] = held.rows, held.output
        return run

    def fixed_statistics(self, index: int, kept: Sequence[Tensor | None]) -> Tensor:
        """See :meth:`Pass.fixed_statistics`."""
        return cast(Tensor, kept[2 * len(self._plan.buffers) + index])

    def backward(
        self,
        held: Held,
        kept: Sequence[Tensor | None],
        gradient: Tensor,
        needs_input: bool,
        needs: Sequence[bool],
        keeps: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """See :meth:`Pass.backward`; its tensors are never written to."""
        return _RunBack(self._resume(held, kept), needs_input, needs).run(gradient)


class _Run:
    """The tensors of a pass."""

    def __init__(
        self, of: ReferencePass, rows: Tensor, parameters: Sequence[Tensor | None]
    ) -> None:
        plan = self.plan = of._plan
        self.shapes = of._shapes
        self.from_batch = of.from_batch
        self.eps = of.eps
        given = iter(parameters)
        self.weights = [
            next(given) if isinstance(node, Convolution) else None for node in plan.nodes
        ]
        self.gammas: list[Tensor | None] = []
        self.betas: list[Tensor | None] = []
        for _ in plan.norms:
            self.gammas.append(next(given))
            self.betas.append(next(given))
        self.options: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
        self.maps: list[Tensor | None] = [rows, *[None] * (len(plan.buffers) - 1)]
        self.statistics: list[Tensor | None] = [None] * len(plan.buffers)
        self.fixed: list[Tensor | None] = [None] * len(plan.norms)
        self.prologues: list[Tensor | None] = [None] * len(plan.nodes)

    def find_statistics(self) -> None:
        """Makes room for the batch's statistics, and takes the running ones of norms that use them.

        Raises:
            ValueError: A norm in training mode has only one value for each channel.
        """
        plan = self.plan
        for index, norm in enumerate(plan.norms):
            module, shape = norm.module, self.shapes[norm.buffer]
            if not self.from_batch[index]:
                running = [cast(Tensor, module.running_mean), cast(Tensor, module.running_var)]
                self.fixed[index] = torch.stack(running).to(**self.options)
                continue
            check_values(norm, shape)
            if self.statistics[norm.buffer] is None:
                channels = plan.buffers[norm.buffer].channels
                self.statistics[norm.buffer] = torch.empty(2, channels, **self.options)
        if self.statistics[0] is not None:
            assert self.maps[0] is not None
            variance, mean = torch.var_mean(self.maps[0], 0, correction=0)
            self.statistics[0] = torch.stack([mean, variance])

    def normalization(self, index: int) -> Normalization:
        """A norm with the statistics that it takes."""
        norm, fixed = self.plan.norms[index], self.fixed[index]
        batch = self.statistics[norm.buffer]
        return Normalization(
            cast(Tensor, batch) if fixed is None else fixed,
            norm.channel if fixed is None else 0,
            norm.channels,
            self.gammas[index],
            self.betas[index],
            self.eps[index],
        )

    def step(self, index: int) -> _Step:
        """A node with its tensors, which are there."""
        node = self.plan.nodes[index]
        return _Step(
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
        pixels, channels = self.shapes[index].pixels, self.plan.buffers[index].channels
        return torch.empty(pixels, channels, **self.options)

    def prepare_prologue(self, index: int) -> None:
        """Makes the prologue of a node, once the statistics of what it reads are known."""
        node = self.plan.nodes[index]
        prologue = torch.empty(3, sum(read.channels for read in node.reads), **self.options)
        start = 0
        for read in node.reads:
            if read.norm is None:
                part = prologue[:, start : start + read.channels]
                part.zero_()
                part[0] = 1
            else:
                _write_prologue(self.normalization(read.norm), prologue, start)
            start += read.channels
        self.prologues[index] = prologue

    def run(self, index: int, *, again: bool = False) -> None:
        """Runs a node forward; ``again`` where the statistics of what it writes are known."""
        plan = self.plan
        node = plan.nodes[index]
        if self.maps[node.buffer] is None:
            self.maps[node.buffer] = self.new_map(node.buffer)
        _forward(self.step(index), None if again else self.statistics[node.buffer])

    def update_running_statistics(self) -> None:
        """Takes the batch's statistics into the running ones, as BatchNorm does."""
        means: dict[float, list[list[Tensor]]] = {}
        for index, norm in enumerate(self.plan.norms):
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


class _RunBack:
    """One pass backward.

    Args:
        run: The pass forward.
        needs_input: Whether the gradient of the input is wanted.
        needs: Whether that of each parameter is.
    """

    def __init__(
        self,
        run: _Run,
        needs_input: bool,
        needs: Sequence[bool],
    ) -> None:
        self.forward = run
        self.plan = run.plan
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
        # How many nodes are still to read through each norm.
        self.readers = [0] * len(self.plan.norms)
        for node in self.plan.nodes:
            for read in node.reads:
                if read.norm is not None:
                    self.readers[read.norm] += 1
        self.weight_gradients: list[Tensor | None] = [None] * len(self.plan.nodes)
        self.norm_gradients: list[Tensor | None] = [None] * (2 * len(self.plan.norms))

    def run(self, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Returns the gradients of the input's map and of the parameters."""
        plan = self.plan
        self.gradients[plan.output] = gradient
        self.written[plan.output][:] = b"\1" * len(self.written[plan.output])
        for index in reversed(range(len(plan.nodes))):
            self._node(index)
        weights = [
            gradient
            for node, gradient in zip(plan.nodes, self.weight_gradients, strict=True)
            if isinstance(node, Convolution)
        ]
        x_gradient = self._input_gradient() if self.needs_input else None
        return x_gradient, [*weights, *self.norm_gradients]

    def _input_gradient(self) -> Tensor:
        """The gradient of the input's map, after what its norms add to it."""
        slope, offset = self.corrections[0]
        rows = cast(Tensor, self.gradients[0])
        return rows.sub_(self.forward.map_of(0) * slope).add_(offset)

    def _node(self, index: int) -> None:
        plan, run = self.plan, self.forward
        node = plan.nodes[index]
        for read in node.reads:
            if run.maps[read.buffer] is None:
                for writer in plan.buffers[read.buffer].writers:
                    run.run(writer, again=True)
        weight_gradient = None
        if self.needs_weight[index]:
            weight_gradient = torch.empty_like(cast(Tensor, run.weights[index]))
            self.weight_gradients[index] = weight_gradient
        inputs = None
        if self.needs_input or any(
            read.buffer != 0 or read.norm is not None for read in node.reads
        ):
            inputs = _Gradients(
                [self._gradient(read.buffer) for read in node.reads],
                [self._claim(read) for read in node.reads],
                torch.empty(2, sum(read.channels for read in node.reads), **run.options),
            )
        _backward(
            run.step(index),
            cast(Tensor, self.gradients[node.buffer]),
            self.corrections[node.buffer],
            inputs,
            weight_gradient,
        )
        if inputs is not None:
            self._add_to_norms(node, inputs.sums)
        if index == plan.buffers[node.buffer].writers[0]:
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

    def _add_to_norms(self, node: Node, sums: Tensor) -> None:
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
                self._finish_norm(read.norm, total)

    def _finish_norm(self, index: int, sums: Tensor) -> None:
        """Turns what all readers of a norm found into its gradients and the map's correction."""
        run, norm = self.forward, self.plan.norms[index]
        needs_gamma, needs_beta = self.needs_norm[index]
        gamma, beta = run.gammas[index], run.betas[index]
        gamma_gradient = torch.empty_like(cast(Tensor, gamma)) if needs_gamma else None
        beta_gradient = torch.empty_like(cast(Tensor, beta)) if needs_beta else None
        self.norm_gradients[2 * index : 2 * index + 2] = [gamma_gradient, beta_gradient]
        _norm_backward(
            run.normalization(index),
            sums,
            run.shapes[norm.buffer].pixels,
            gamma_gradient,
            beta_gradient,
            self.corrections[norm.buffer] if run.from_batch[index] else None,
        )


def _forward(step: _Step, statistics: Tensor | None) -> None:
    """Runs a node.

    Args:
        step: The node and its tensors.
        statistics: ``[2, channels]`` of the output's map: mean and biased variance, to be written.
    """
    node = step.node
    x = _activate(_normalise(_concatenate(step), step.prologue), node.activation)
    if isinstance(node, MaxPool):
        y = F.max_pool2d(x, node.kernel, node.stride, node.padding)
    elif isinstance(node, AveragePool):
        y = F.avg_pool2d(x, node.kernel, node.stride)
    else:
        assert step.weight is not None
        groups = x.shape[1] // step.weight.shape[1]
        y = F.conv2d(x, step.weight, None, node.stride, node.padding, 1, groups)
    channels = slice(node.channel, node.channel + node.channels)
    step.output[:, channels] = _rows(y)
    if statistics is not None:
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        statistics[0, channels] = mean
        statistics[1, channels] = variance


def _backward(
    step: _Step,
    gradient: Tensor,
    correction: Tensor,
    inputs: _Gradients | None,
    weight_gradient: Tensor | None,
) -> None:
    """Runs a node backward.

    Args:
        step: The node and its tensors, after :func:`_forward`.
        gradient: Of the output, from all that read it, less what their norms add through its
            mean and variance.
        correction: ``[2, channels]`` of the output's map, slope and offset of that:
            the whole gradient is ``gradient - output * slope + offset``.
        inputs: Where the gradients of the reads go, or None.
        weight_gradient: Where that of the weight goes, or None.
    """
    node, weight = step.node, step.weight
    if isinstance(node, AveragePool):
        weight = _channel_weight(step)
    after = step.shape.after(node)
    channels = slice(node.channel, node.channel + node.channels)
    slope, offset = correction[:, channels]
    whole = gradient[:, channels] - step.output[:, channels] * slope + offset
    dy = whole.view(after.batch, after.height, after.width, -1).permute(0, 3, 1, 2)
    x = _concatenate(step)
    before = _normalise(x, step.prologue)
    activated = _activate(before, node.activation)
    if isinstance(node, MaxPool):
        _, indices = F.max_pool2d(
            activated, node.kernel, node.stride, node.padding, return_indices=True
        )
        dx = torch.zeros_like(activated).flatten(2)
        dx.scatter_add_(2, indices.flatten(2), dy.flatten(2))
        dx = dx.view_as(activated)
    else:
        assert weight is not None
        window = (node.stride, node.padding, 1, activated.shape[1] // weight.shape[1])
        if weight_gradient is not None:
            weight_gradient.copy_(conv2d_weight(activated, list(weight.shape), dy, *window))
        if inputs is None:
            return
        dx = conv2d_input(list(activated.shape), weight, dy, *window)
    if inputs is None:
        return
    passed = dx
    if node.activation:
        passed = passed.masked_fill(before <= 0, 0)
    if node.activation == "relu6":
        passed = passed.masked_fill(before >= 6, 0)
    scale, _, mean = step.prologue[:, None, :, None, None]
    inputs.sums[0] = passed.sum((0, 2, 3))
    inputs.sums[1] = (passed * (x - mean)).sum((0, 2, 3))
    rows = _rows(passed * scale)
    start = 0
    for read, to, accumulate in zip(node.reads, inputs.maps, inputs.accumulate, strict=True):
        part = rows[:, start : start + read.channels]
        start += read.channels
        target = to[:, read.channel : read.channel + read.channels]
        if accumulate:
            target += part
        else:
            target.copy_(part)


def _write_prologue(norm: Normalization, prologue: Tensor, to: int) -> None:
    """Writes the norm's channels of a prologue, from channel ``to`` on."""
    mean, variance = norm.statistics[:, norm.channel : norm.channel + norm.channels]
    scale = torch.rsqrt(variance + norm.eps)
    if norm.gamma is not None:
        scale = scale * norm.gamma
    shift = -mean * scale
    if norm.beta is not None:
        shift = shift + norm.beta
    prologue[:, to : to + norm.channels] = torch.stack([scale, shift, mean])


def _norm_backward(
    norm: Normalization,
    sums: Tensor,
    count: int,
    gamma_gradient: Tensor | None,
    beta_gradient: Tensor | None,
    correction: Tensor | None,
) -> None:
    """Turns a prologue's sums, over ``count`` pixels, into gradients of gamma and beta.

    Adds to the correction what the norm does through the mean and variance, unless it is None.
    """
    mean, variance = norm.statistics[:, norm.channel : norm.channel + norm.channels]
    reciprocal = torch.rsqrt(variance + norm.eps)
    total, moment = sums
    if gamma_gradient is not None:
        gamma_gradient.copy_(moment * reciprocal)
    if beta_gradient is not None:
        beta_gradient.copy_(total)
    if correction is None:
        return
    scale = reciprocal / count if norm.gamma is None else norm.gamma * reciprocal / count
    slope = scale * reciprocal * reciprocal * moment
    to = correction[:, norm.channel : norm.channel + norm.channels]
    to += torch.stack([slope, mean * slope - scale * total])


def _channel_weight(step: _Step) -> Tensor:
    """What every channel alone is multiplied by, ``[C, 1, k, k]``: of a pool, the same."""
    if step.weight is not None:
        return step.weight
    kernel = step.node.kernel
    return step.output.new_full((step.node.channels, 1, kernel, kernel), 1 / kernel**2)


def _concatenate(step: _Step) -> Tensor:
    """What a node reads, ``[N, C, H, W]``."""
    shape = step.shape
    parts = [
        map[:, read.channel : read.channel + read.channels]
        for read, map in zip(step.node.reads, step.maps, strict=True)
    ]
    joined = torch.cat(parts, 1)
    return joined.view(shape.batch, shape.height, shape.width, -1).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[pixels, C]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _normalise(x: Tensor, prologue: Tensor) -> Tensor:
    scale, shift, _ = prologue[:, None, :, None, None]
    return x * scale + shift


def _activate(x: Tensor, activation: str) -> Tensor:
    return x.clamp(0, 6 if activation == "relu6" else math.inf) if activation else x
