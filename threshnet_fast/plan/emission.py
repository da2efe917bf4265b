"""Steps of plans, as fusion writes them one behind the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph.ir import Activate, Conv, ConvTranspose, Linear
from .affine import Affine, single
from .codes import FUSED_ACTIVATIONS
from .ir import Buffer, FusedConv, Pointwise, Pool, Prologue, Segment, Step
from .maps import Map, Pending, pairs
from .windows import Phase, Window

__all__ = ["EPILOGUES", "Emission"]

EPILOGUES = tuple(kind for kind in FUSED_ACTIVATIONS if kind)
"""Activations that a convolution applies to its sums, and to what it reads."""


class Emission:
    """The buffers and steps of a plan that is being made.

    Args:
        batch: Images.
        device: Where weights are made: None for where they are, or the meta device.

    Attributes:
        buffers: All buffers.
        steps: All steps.
    """

    def __init__(self, batch: int, device: torch.device | None) -> None:
        self.batch = batch
        self.device = device
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []

    def map(self, name: str, channels: int, size: tuple[int, int]) -> Map:
        """Adds a buffer of its own for a map.

        Args:
            name: For people.
            channels: Its channels.
            size: Its height and width.
        """
        self.buffers.append(Buffer(*size, channels, name))
        return Map((Segment(len(self.buffers) - 1, 0, channels),), *size)

    def convolve(
        self,
        node: Conv | Linear,
        window: Window,
        source: Map,
        target: Map,
        weight: Tensor,
        bias: Tensor | None,
        prologue: Pending | None,
        activation: Activate | None,
        *,
        groups: int = 1,
        name: str | None = None,
        module_pixels: int | None = None,
    ) -> None:
        """Adds a convolution, and what an activation that it does not apply itself takes.

        Args:
            node: What it comes from.
            window: Its window.
            source: What it reads.
            target: Where it writes.
            weight: ``[Co, Ci / groups, kh, kw]``, float64.
            bias: ``[Co]``, float64, or None.
            prologue: What it calculates of its inputs first, or None.
            activation: What follows it, or None.
            groups: 1, or the number of channels.
            name: For people; None takes that of the node.
            module_pixels: See :class:`.ir.FusedConv`.
        """
        name = name or (node.unit if isinstance(node, Conv) else node.name)
        self.steps.append(
            FusedConv(
                name=name,
                inputs=source.segments,
                output=target.segments[0],
                weight=single(weight),
                bias=None if bias is None else single(bias),
                prologue=self.prologue(prologue),
                stride=window.stride,
                padding=window.padding,
                activation=_applied(activation),
                input_pixels=source.pixels,
                output_pixels=target.pixels,
                valid_taps=window.valid_taps(source.size, target.size),
                batch=self.batch,
                groups=groups,
                module_pixels=module_pixels,
                dilation=window.dilation,
            )
        )
        self._activate(activation, target)

    def convolve_transposed(
        self,
        node: ConvTranspose,
        phases: Sequence[Phase],
        source: Map,
        target: Map,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activate | None,
    ) -> None:
        """Adds a transposed convolution: a convolution for each phase, and then what follows.

        Args:
            node: What it comes from.
            phases: Those that :func:`.windows.of_transposed_convolution` returns.
            source: What it reads.
            target: Where it writes.
            weight: ``[Co, Ci, kh, kw]``, float64.
            bias: ``[Co]``, float64, or None.
            activation: What follows it, or None.
        """
        for phase in phases:
            window = phase.window
            self.steps.append(
                FusedConv(
                    name=node.name,
                    inputs=source.segments,
                    output=target.segments[0],
                    weight=single(phase.weight(weight)),
                    bias=None if bias is None else single(bias),
                    prologue=None,
                    stride=window.stride,
                    padding=window.padding,
                    activation=_applied(activation),
                    input_pixels=source.pixels,
                    output_pixels=math.prod(phase.size),
                    valid_taps=window.valid_taps(source.size, phase.size),
                    batch=self.batch,
                    dilation=window.dilation,
                    output_stride=phase.stride,
                    output_start=phase.start,
                )
            )
        self._activate(activation, target)

    def _activate(self, activation: Activate | None, target: Map) -> None:
        """Adds an activation that no convolution applies itself."""
        if activation is None or activation.kind in EPILOGUES:
            return
        (there,) = target.segments
        self.pointwise(
            activation.name,
            (there,),
            there,
            target.pixels,
            activation=activation.kind,
            slope=activation.slope,
        )

    def pointwise(
        self,
        name: str,
        inputs: tuple[Segment, ...],
        output: Segment,
        pixels: int,
        *,
        affine: Affine | None = None,
        activation: str | None = None,
        slope: float = 0.0,
    ) -> None:
        """Adds what is calculated of every element on its own.

        Args:
            name: For people.
            inputs: What is added up.
            output: Where it writes.
            pixels: Of one image.
            affine: Scale and shift of the sum, or None.
            activation: What follows, or None.
            slope: That of a leaky ReLU.
        """
        self.steps.append(
            Pointwise(
                name=name,
                inputs=inputs,
                output=output,
                scale=None if affine is None else single(affine.scale),
                shift=None if affine is None else single(affine.shift),
                activation=activation,
                pixels=pixels,
                batch=self.batch,
                slope=slope,
            )
        )

    def pool(
        self,
        name: str,
        window: Window,
        source: Map,
        target: Map,
        prologue: Pending | None,
        *,
        average: bool,
        divisor: int | None = None,
    ) -> None:
        """Adds pools, one for each segment.

        Args:
            name: For people.
            window: Their window.
            source: What they read.
            target: Where they write.
            prologue: What averages calculate of their inputs first, or None.
            average: Average instead of maximum.
            divisor: See :class:`.ir.Pool`.
        """
        first = 0
        for read, written in pairs(source, target):
            part = None if prologue is None else prologue.part(first, first + read.channels)
            self.steps.append(
                Pool(
                    name=name,
                    input=read,
                    output=written,
                    kernel=window.kernel,
                    stride=window.stride,
                    padding=window.padding,
                    average=average,
                    input_pixels=source.pixels,
                    output_pixels=target.pixels,
                    batch=self.batch,
                    prologue=self.prologue(part),
                    divisor=divisor,
                )
            )
            first += read.channels

    def prologue(self, pending: Pending | None) -> Prologue | None:
        """Returns what a step calculates of its inputs first.

        Args:
            pending: What it reads, where that is not stored.
        """
        if pending is None:
            return None
        affine = pending.affine or Affine.identity(pending.source.channels, self.device)
        return Prologue(single(affine.scale), single(affine.shift), pending.activation)


def _applied(activation: Activate | None) -> str | None:
    """What a convolution applies to its sums."""
    return activation.kind if activation is not None and activation.kind in EPILOGUES else None
