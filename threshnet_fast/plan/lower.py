"""Lowering: from a network and an input shape to a plan, by way of its graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..graph.ir import UnsupportedModule
from ..graph.modules import graph_of_network
from ..models.network import Network
from .fuse import fuse
from .ir import Plan

__all__ = ["PlanSource", "UnsupportedModule", "lower"]


def lower(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    head: bool = True,
    fold: bool = True,
) -> Plan:
    """Lowers a network in evaluation mode.

    Args:
        module: A model of this package.
        input_shape: ``(N, C, H, W)`` of the input.
        head: Whether to end with the logits rather than with the last features.
        fold: Whether to calculate the weights; see :func:`threshnet_fast.plan.fuse.fuse`.

    Returns:
        The plan. Its weights are new tensors, which do not follow later changes of the module.

    Raises:
        UnsupportedModule: ``module``, or a part of it, is none that can be lowered.
        ValueError: ``input_shape`` is not one that the module takes.
    """
    graph = graph_of_network(module, head=head)
    assert isinstance(module, Network)
    batch, channels, height, width = shape = _four(input_shape, module)
    if min(height, width) < module.min_size:
        raise ValueError(
            f"input_shape is {shape}: expected a height and width of at least {module.min_size}"
        )
    return fuse(graph, (batch, channels, height, width), fold=fold)


class PlanSource:
    """Makes the plans of one network, as it is when it is called.

    Args:
        module: A model of this package.
    """

    def __init__(self, module: Network) -> None:
        self._module = module

    def __call__(self, shape: Sequence[int] | None, *, head: bool, values: bool) -> Plan:
        """Lowers the network.

        Args:
            shape: ``(N, C, H, W)`` of the input; None for the smallest one, as weights are the same
                for all.
            head: Whether to end with the logits rather than with the last features.
            values: Whether to calculate the weights.

        Raises:
            UnsupportedModule: As :func:`lower`.
        """
        module = self._module
        if shape is None:
            size = module.min_size
            shape = (1, module.in_chans, size, size)
        return lower(module, shape, head=head, fold=values)


def _four(input_shape: Sequence[int], module: Network) -> tuple[int, ...]:
    shape = tuple(int(size) for size in input_shape)
    if len(shape) != 4 or min(shape) < 1 or shape[1] != module.in_chans:
        raise ValueError(
            f"input_shape is {shape}: expected (N, {module.in_chans}, height, width), all positive"
        )
    return shape
