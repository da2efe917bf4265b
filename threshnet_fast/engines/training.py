"""What the engines of training have in common.

A map is ``[pixels, channels]`` in NHWC order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..plan.raw import Node, Norm, RawPlan

__all__ = [
    "Held",
    "Normalization",
    "Pass",
    "Shape",
    "check_values",
    "shapes_of",
    "uses_batch",
]


@dataclass(frozen=True)
class Shape:
    """Images, height and width of the maps that a node reads."""

    batch: int
    height: int
    width: int

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


def shapes_of(plan: RawPlan, first: Shape) -> list[Shape]:
    """The shape of every buffer.

    Args:
        plan: What is computed.
        first: Of the input.
    """
    shapes = [first] * len(plan.buffers)
    for node in plan.nodes:
        shapes[node.buffer] = shapes[node.reads[0].buffer].after(node)
    return shapes


@dataclass(frozen=True)
class Held:
    """Tensors of a pass that others hold too.

    Attributes:
        rows: The map of the input.
        parameters: Weights of the convolutions in the order of the nodes, then gamma and beta of
            the norms; None for those that are not there.
        output: The map of the output.
    """

    rows: Tensor
    parameters: Sequence[Tensor | None]
    output: Tensor


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


class Pass(Protocol):
    """A pass forward that has been run.

    Attributes:
        output: The map of the output; whoever made the pass takes it out.
        kept: What the pass backward needs and nobody else holds.
        from_batch: Whether each norm took the batch's statistics.
        eps: What each norm adds to the variance.
    """

    output: Tensor | None
    kept: list[Tensor | None]
    from_batch: list[bool]
    eps: list[float]

    def fixed_statistics(self, index: int, kept: Sequence[Tensor | None]) -> Tensor:
        """``[2, channels]``: what a norm that takes no batch's statistics took."""

    def backward(
        self,
        held: Held,
        kept: Sequence[Tensor | None],
        gradient: Tensor,
        needs_input: bool,
        needs: Sequence[bool],
        keeps: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Runs the pass backward.

        Args:
            held: The tensors that others hold.
            kept: What :attr:`kept` was.
            gradient: Of the map of the output; is written to where nodes read the output.
            needs_input: Whether the gradient of the input is wanted.
            needs: Whether that of each parameter is.
            keeps: Whether the same pass may be run backward again.

        Returns:
            The gradients of the input's map and of the parameters, None where not wanted.
        """


def uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm takes the batch's mean and variance rather than the running ones."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def check_values(norm: Norm, shape: Shape) -> None:
    """Refuses a norm of the batch's statistics where there is one value for each channel.

    Args:
        norm: The norm.
        shape: Of what it normalises.

    Raises:
        ValueError: There is only one, as PyTorch says it.
    """
    if shape.pixels == 1:
        size = [shape.batch, norm.channels, shape.height, shape.width]
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size "
            f"torch.Size({size})"
        )
