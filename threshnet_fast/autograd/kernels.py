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

from .graph import ACTIVATIONS, MaxPool, Node

__all__ = ["CppKernels", "Gradients", "Kernels", "ReferenceKernels", "Shape"]

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


class Kernels(Protocol):
    """What executes the nodes of a chain."""

    def forward(
        self,
        node: Node,
        shape: Shape,
        maps: Sequence[Tensor],
        prologue: Tensor,
        weight: Tensor | None,
        output: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """Runs a node.

        Args:
            node: The node.
            shape: Of the maps that it reads.
            maps: The map of each read.
            prologue: Of all channels that it reads.
            weight: Of a convolution.
            output: The map that it writes to.
            statistics: ``[2, channels]`` of that map: mean and biased variance, to be written.
        """

    def backward(
        self,
        node: Node,
        shape: Shape,
        maps: Sequence[Tensor],
        prologue: Tensor,
        weight: Tensor | None,
        output: Tensor,
        gradient: Tensor,
        correction: Tensor,
        inputs: Gradients | None,
        weight_gradient: Tensor | None,
    ) -> None:
        """Runs a node backward.

        Args:
            node: The node.
            shape: As for :meth:`forward`.
            maps: As there.
            prologue: As there.
            weight: As there.
            output: What :meth:`forward` wrote.
            gradient: Of the output, from all that read it, less what their norms add through its
                mean and variance.
            correction: ``[2, channels]`` of the output's map, slope and offset of that:
                the whole gradient is ``gradient - output * slope + offset``.
            inputs: Where the gradients of the reads go, or None.
            weight_gradient: Where that of the weight goes, or None.
        """

    def prologue(
        self,
        statistics: Tensor,
        channel: int,
        channels: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        prologue: Tensor,
        to: int,
    ) -> None:
        """Writes channels ``[to, to + channels)`` of a prologue, from a map's statistics."""

    def norm_backward(
        self,
        statistics: Tensor,
        channel: int,
        channels: int,
        gamma: Tensor | None,
        eps: float,
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
    """The kernels of csrc/cpu/training*.cpp, in float32.

    Args:
        isa: As :func:`threshnet_fast.backends.cpu.isa_code` returns it.
        winograd: As :func:`threshnet_fast.backends.cpu.winograd_by_default` returns it.
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

    def forward(
        self,
        node: Node,
        shape: Shape,
        maps: Sequence[Tensor],
        prologue: Tensor,
        weight: Tensor | None,
        output: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.forward`."""
        where = (
            shape.window(node),
            output,
            node.channel,
            self._none if statistics is None else statistics,
            self._workspace,
        )
        activation = ACTIVATIONS[node.activation]
        segments = _segments(node)
        if isinstance(node, MaxPool):
            self._ops.training_pool_forward(
                maps[0], segments, prologue, activation, *where, self._isa
            )
        else:
            self._ops.training_convolution_forward(
                maps, segments, prologue, activation, weight, *where, self._winograd, self._isa
            )

    def backward(
        self,
        node: Node,
        shape: Shape,
        maps: Sequence[Tensor],
        prologue: Tensor,
        weight: Tensor | None,
        output: Tensor,
        gradient: Tensor,
        correction: Tensor,
        inputs: Gradients | None,
        weight_gradient: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.backward`."""
        activation = ACTIVATIONS[node.activation]
        segments = _segments(node)
        where = (shape.window(node), output, gradient, node.channel, correction)
        if isinstance(node, MaxPool):
            if inputs is not None:
                self._ops.training_pool_backward(
                    maps[0],
                    segments,
                    prologue,
                    activation,
                    *where,
                    inputs.maps[0],
                    int(inputs.accumulate[0]),
                    inputs.sums,
                    self._workspace,
                    self._isa,
                )
            return
        self._ops.training_convolution_backward(
            maps,
            segments,
            prologue,
            activation,
            weight,
            *where,
            [] if inputs is None else inputs.maps,
            [] if inputs is None else [int(flag) for flag in inputs.accumulate],
            self._none if inputs is None else inputs.sums,
            self._none if weight_gradient is None else weight_gradient,
            self._workspace,
            self._winograd,
            self._isa,
        )

    def prologue(
        self,
        statistics: Tensor,
        channel: int,
        channels: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        prologue: Tensor,
        to: int,
    ) -> None:
        """See :meth:`Kernels.prologue`."""
        self._ops.normalization_prologue(
            statistics,
            channel,
            channels,
            self._none if gamma is None else gamma,
            self._none if beta is None else beta,
            eps,
            prologue,
            to,
        )

    def norm_backward(
        self,
        statistics: Tensor,
        channel: int,
        channels: int,
        gamma: Tensor | None,
        eps: float,
        sums: Tensor,
        count: int,
        gamma_gradient: Tensor | None,
        beta_gradient: Tensor | None,
        correction: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.norm_backward`."""
        none = self._none
        self._ops.normalization_backward(
            statistics,
            channel,
            channels,
            none if gamma is None else gamma,
            eps,
            sums,
            0,
            count,
            none if gamma_gradient is None else gamma_gradient,
            none if beta_gradient is None else beta_gradient,
            none if correction is None else correction,
        )


class ReferenceKernels:
    """The same in plain PyTorch, in any dtype and on any device."""

    def forward(
        self,
        node: Node,
        shape: Shape,
        maps: Sequence[Tensor],
        prologue: Tensor,
        weight: Tensor | None,
        output: Tensor,
        statistics: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.forward`."""
        x = _activate(_normalise(_concatenate(node, shape, maps), prologue), node.activation)
        if isinstance(node, MaxPool):
            y = F.max_pool2d(x, node.kernel, node.stride, node.padding)
        else:
            assert weight is not None
            y = F.conv2d(x, weight, stride=node.stride, padding=node.padding)
        channels = slice(node.channel, node.channel + node.channels)
        output[:, channels] = _rows(y)
        if statistics is not None:
            variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            statistics[0, channels] = mean
            statistics[1, channels] = variance

    def backward(
        self,
        node: Node,
        shape: Shape,
        maps: Sequence[Tensor],
        prologue: Tensor,
        weight: Tensor | None,
        output: Tensor,
        gradient: Tensor,
        correction: Tensor,
        inputs: Gradients | None,
        weight_gradient: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.backward`."""
        after = shape.after(node)
        channels = slice(node.channel, node.channel + node.channels)
        slope, offset = correction[:, channels]
        whole = gradient[:, channels] - output[:, channels] * slope + offset
        dy = whole.view(after.batch, after.height, after.width, -1).permute(0, 3, 1, 2)
        x = _concatenate(node, shape, maps)
        before = _normalise(x, prologue)
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
            window = (node.stride, node.padding)
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
        scale, _, mean = prologue[:, None, :, None, None]
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

    def prologue(
        self,
        statistics: Tensor,
        channel: int,
        channels: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        prologue: Tensor,
        to: int,
    ) -> None:
        """See :meth:`Kernels.prologue`."""
        mean, variance = statistics[:, channel : channel + channels]
        scale = torch.rsqrt(variance + eps)
        if gamma is not None:
            scale = scale * gamma
        shift = -mean * scale
        if beta is not None:
            shift = shift + beta
        prologue[:, to : to + channels] = torch.stack([scale, shift, mean])

    def norm_backward(
        self,
        statistics: Tensor,
        channel: int,
        channels: int,
        gamma: Tensor | None,
        eps: float,
        sums: Tensor,
        count: int,
        gamma_gradient: Tensor | None,
        beta_gradient: Tensor | None,
        correction: Tensor | None,
    ) -> None:
        """See :meth:`Kernels.norm_backward`."""
        mean, variance = statistics[:, channel : channel + channels]
        reciprocal = torch.rsqrt(variance + eps)
        total, moment = sums
        if gamma_gradient is not None:
            gamma_gradient.copy_(moment * reciprocal)
        if beta_gradient is not None:
            beta_gradient.copy_(total)
        if correction is None:
            return
        scale = reciprocal / count if gamma is None else gamma * reciprocal / count
        slope = scale * reciprocal * reciprocal * moment
        to = correction[:, channel : channel + channels]
        to += torch.stack([slope, mean * slope - scale * total])


def _segments(node: Node) -> list[int]:
    return [number for read in node.reads for number in (read.channel, read.channels)]


def _concatenate(node: Node, shape: Shape, maps: Sequence[Tensor]) -> Tensor:
    """What a node reads, ``[N, C, H, W]``."""
    parts = [
        map[:, read.channel : read.channel + read.channels]
        for read, map in zip(node.reads, maps, strict=True)
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
