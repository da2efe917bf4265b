"""The kernels that a chain is made of: in C++ for the CPU, and in plain PyTorch.

A map is ``[pixels, channels]`` in NHWC order. A prologue is ``[3, channels]``: scale, shift and the
mean that its norm subtracts, so that ``norm(x) = x * scale + shift``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ..plan.raw import ACTIVATIONS, AveragePool, Depthwise, MaxPool, Node

__all__ = [
    "CppKernels",
    "Gradients",
    "Kernels",
    "Normalization",
    "ReferenceKernels",
    "Shape",
    "Step",
]

_ALIGNMENT = 16  # floats


@dataclass(frozen=True)
class Shape:
    """Images, height and width of the maps that a node reads."""

    batch: int
    height: int
    width: int

    def window(self, node: Node) -> list[int]:
        """``[N, H, W, kh, kw, stride, padding]``, as the operators take it."""
        kernel = node.kernel
        return [self.batch, self.height, self.width, kernel, kernel, node.stride, node.padding]

    def after(self, node: Node) -> Shape:
        """Those of what a node writes."""
        return Shape(
            self.batch,
            (self.height + 2 * node.padding - node.kernel) // node.stride + 1,
            (self.width + 2 * node.padding - node.kernel) // node.stride + 1,
        )

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.batch * self.height * self.width


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of what a node reads go.

    Attributes:
        maps: One for each read, or none where they are not wanted.
        accumulate: For each, whether they are added to what is there.
        sums: ``[2, channels]``: of the gradient d before the prologue's scale, the sums over all
            pixels of ``d`` and of ``d * (x - mean)``.
    """

    maps: Sequence[Tensor]
    accumulate: Sequence[bool]
    sums: Tensor


@dataclass(frozen=True)
class Step:
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

    @property
    def segments(self) -> list[int]:
        """First channel and channels of each read, as the operators take them."""
        return [number for read in self.node.reads for number in (read.channel, read.channels)]

    @property
    def activation(self) -> int:
        """Its code."""
        return ACTIVATIONS[self.node.activation]


@dataclass(frozen=True)
class Normalization:
    """A norm with the statistics that it takes.

    Attributes:
        statistics: ``[2, channels]`` of a map: mean and biased variance.
        channel: The norm's first channel in them.
        channels: How many it has.
        gamma: Its scale, or None for 1.
        beta: Its shift, or None for 0.
        eps: What it adds to the variance.
    """

    statistics: Tensor
    channel: int
    channels: int
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class Kernels(Protocol):
    """What executes the nodes of a chain."""

    def forward(self, step: Step, statistics: Tensor | None) -> None:
        """Runs a node.

        Args:
            step: The node and its tensors.
            statistics: ``[2, channels]`` of the output's map: mean and biased variance, to be
                written.
        """

    def backward(
        self,
        step: Step,
        gradient: Tensor,
        correction: Tensor,
        inputs: Gradients | None,
        weight_gradient: Tensor | None,
    ) -> None:
        """Runs a node backward.

        Args:
            step: The node and its tensors, after :meth:`forward`.
            gradient: Of the output, from all that read it, less what their norms add through its
                mean and variance.
            correction: ``[2, channels]`` of the output's map, slope and offset of that:
                the whole gradient is ``gradient - output * slope + offset``.
            inputs: Where the gradients of the reads go, or None.
            weight_gradient: Where that of the weight goes, or None.
        """

    def prologue(self, norm: Normalization, prologue: Tensor, to: int) -> None:
        """Writes the norm's channels of a prologue, from channel ``to`` on."""

    def norm_backward(
        self,
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


class CppKernels:
    """The kernels of csrc/cpu/training, in float32.

    Args:
        isa: As :func:`threshnet_fast.engines.cpu.isa_code` returns it.
        winograd: As :func:`threshnet_fast.engines.cpu.winograd_by_default` returns it.
        workspace: What :meth:`create_workspace` returned for the same.
    """

    def __init__(self, isa: int, winograd: int, workspace: Tensor) -> None:
        self._isa = isa
        self._winograd = winograd
        self._workspace = workspace
        self._none = torch.empty(0)
        self._ops = torch.ops.threshnet_fast_cpu

    @staticmethod
    def create_workspace(isa: int, winograd: int, nodes: Sequence[tuple[Node, Shape]]) -> Tensor:
        """Returns memory for the largest of some nodes, for the number of threads in use."""
        ops = torch.ops.threshnet_fast_cpu
        floats = 0
        for node, shape in nodes:
            window = shape.window(node)
            if isinstance(node, MaxPool):
                needed = ops.training_pool_workspace(window, node.channels, isa)
            elif isinstance(node, (Depthwise, AveragePool)):
                needed = ops.training_depthwise_workspace(window, node.channels, isa)
            else:
                unchanged = shape.after(node) == shape
                inputs = node.module.in_channels
                needed = ops.training_convolution_workspace(
                    window, inputs, node.channels, unchanged, winograd, isa
                )
            floats = max(floats, needed)
        memory = torch.empty(floats + _ALIGNMENT)
        skipped = -(memory.data_ptr() // memory.element_size()) % _ALIGNMENT
        return memory[skipped : skipped + floats]

    def forward(self, step: Step, statistics: Tensor | None) -> None:
        """See :meth:`Kernels.forward`."""
        node = step.node
        where = (
            step.shape.window(node),
            step.output,
            node.channel,
            self._or_none(statistics),
            self._workspace,
        )
        given = (step.segments, step.prologue, step.activation)
        if isinstance(node, MaxPool):
            self._ops.training_pool_forward(step.maps[0], *given, *where, self._isa)
        elif isinstance(node, (Depthwise, AveragePool)):
            self._ops.training_depthwise_forward(
                step.maps[0], *given, _channel_weight(step), *where, self._isa
            )
        else:
            self._ops.training_convolution_forward(
                step.maps, *given, step.weight, *where, self._winograd, self._isa
            )

    def backward(
        self,
        step: Step,
        gradient: Tensor,
        correction: Tensor,
        inputs: Gradients | None,
        weight_gradient: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.backward`."""
        node = step.node
        given = (step.segments, step.prologue, step.activation)
        where = (step.shape.window(node), step.output, gradient, node.channel, correction)
        if isinstance(node, MaxPool):
            if inputs is not None:
                self._ops.training_pool_backward(
                    step.maps[0],
                    *given,
                    *where,
                    inputs.maps[0],
                    int(inputs.accumulate[0]),
                    inputs.sums,
                    self._workspace,
                    self._isa,
                )
            return
        if isinstance(node, (Depthwise, AveragePool)):
            self._ops.training_depthwise_backward(
                step.maps[0],
                *given,
                _channel_weight(step),
                *where,
                self._or_none(None if inputs is None else inputs.maps[0]),
                int(inputs is not None and inputs.accumulate[0]),
                self._or_none(None if inputs is None else inputs.sums),
                self._or_none(weight_gradient),
                self._workspace,
                self._isa,
            )
            return
        self._ops.training_convolution_backward(
            step.maps,
            *given,
            step.weight,
            *where,
            [] if inputs is None else inputs.maps,
            [] if inputs is None else [int(flag) for flag in inputs.accumulate],
            self._or_none(None if inputs is None else inputs.sums),
            self._or_none(weight_gradient),
            self._workspace,
            self._winograd,
            self._isa,
        )

    def prologue(self, norm: Normalization, prologue: Tensor, to: int) -> None:
        """See :meth:`Kernels.prologue`."""
        self._ops.normalization_prologue(
            norm.statistics,
            norm.channel,
            norm.channels,
            self._or_none(norm.gamma),
            self._or_none(norm.beta),
            norm.eps,
            prologue,
            to,
        )

    def norm_backward(
        self,
        norm: Normalization,
        sums: Tensor,
        count: int,
        gamma_gradient: Tensor | None,
        beta_gradient: Tensor | None,
        correction: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.norm_backward`."""
        self._ops.normalization_backward(
            norm.statistics,
            norm.channel,
            norm.channels,
            self._or_none(norm.gamma),
            norm.eps,
            sums,
            0,
            count,
            self._or_none(gamma_gradient),
            self._or_none(beta_gradient),
            self._or_none(correction),
        )

    def _or_none(self, tensor: Tensor | None) -> Tensor:
        """As the operators take a tensor that may be missing."""
        return self._none if tensor is None else tensor


class ReferenceKernels:
    """The same in plain PyTorch, in any dtype and on any device."""

    def forward(self, step: Step, statistics: Tensor | None) -> None:
        """See :meth:`Kernels.forward`."""
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

    def backward(
        self,
        step: Step,
        gradient: Tensor,
        correction: Tensor,
        inputs: Gradients | None,
        weight_gradient: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.backward`."""
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

    def prologue(self, norm: Normalization, prologue: Tensor, to: int) -> None:
        """See :meth:`Kernels.prologue`."""
        mean, variance = norm.statistics[:, norm.channel : norm.channel + norm.channels]
        scale = torch.rsqrt(variance + norm.eps)
        if norm.gamma is not None:
            scale = scale * norm.gamma
        shift = -mean * scale
        if norm.beta is not None:
            shift = shift + norm.beta
        prologue[:, to : to + norm.channels] = torch.stack([scale, shift, mean])

    def norm_backward(
        self,
        norm: Normalization,
        sums: Tensor,
        count: int,
        gamma_gradient: Tensor | None,
        beta_gradient: Tensor | None,
        correction: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.norm_backward`."""
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


def _channel_weight(step: Step) -> Tensor:
    """What every channel alone is multiplied by, ``[C, 1, k, k]``: of a pool, the same."""
    if step.weight is not None:
        return step.weight
    kernel = step.node.kernel
    return step.output.new_full((step.node.channels, 1, kernel, kernel), 1 / kernel**2)


def _concatenate(step: Step) -> Tensor:
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
