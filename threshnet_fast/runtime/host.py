"""A traced module whose islands run fused, and all else as plain PyTorch between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..engines.base import Engine
from ..graph.export import annotate, trace
from ..graph.ir import UnsupportedModule
from ..graph.islands import Island, find_islands, insert
from .island import FusedIsland

__all__ = ["Arguments", "Host", "NothingToFuse", "summary_of"]


class NothingToFuse(UnsupportedModule):
    """A module that was traced, and has no island.

    Args:
        foreign: Why each of its operations is in none.

    Attributes:
        foreign: As given.
    """

    def __init__(self, foreign: tuple[str, ...]) -> None:
        super().__init__(summary_of(foreign) or "the module computes nothing")
        self.foreign = foreign


class Arguments:
    """What a module is called with.

    Args:
        args: Positional arguments.
        kwargs: The others.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        self.args = args
        self.kwargs = dict(kwargs or {})

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among them, however deep."""
        leaves, _ = tree_flatten((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map(self, change: Any) -> Arguments:
        """The same with every tensor changed.

        Args:
            change: Takes a tensor and returns another.
        """

        def changed(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(changed, (self.args, self.kwargs))
        return Arguments(args, kwargs)

    def noise(self) -> Arguments:
        """The same with random numbers in the place of floating-point ones."""
        generator = torch.Generator().manual_seed(0)

        def random(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = torch.randn(tensor.shape, generator=generator)
            return noise.to(tensor.device, tensor.dtype)

        return self.map(random)

    def call(self, function: Any) -> Any:
        """Calls something with copies of them, to which it may write, without gradients."""
        copies = self.map(torch.clone)
        with torch.no_grad():
            return function(*copies.args, **copies.kwargs)


class Host:
    """A module with islands.

    Args:
        module: The module, in evaluation mode; it must not change from now on.
        example: What it is called with.
        engine: What computes the islands.
        dtype: Of the maps that islands take and make.
        winograd: As :func:`threshnet_fast.environment.winograd_by_default` returns it.
        export: As :func:`threshnet_fast.graph.export.trace` takes it.

    Raises:
        UnsupportedModule: The module cannot be traced, or has no island.

    Attributes:
        islands: In order.
        foreign: Why each other operation is in none, one line each.
        foreign_nodes: The same by the names of their nodes in ``traced``.
        traced: The module with its islands as submodules.
    """

    islands: tuple[FusedIsland, ...]
    foreign: tuple[str, ...]
    foreign_nodes: dict[str, str]
    traced: fx.GraphModule

    def __init__(
        self,
        module: nn.Module,
        example: Arguments,
        engine: Engine,
        dtype: torch.dtype,
        winograd: int,
        *,
        export: bool = True,
    ) -> None:
        traced = trace(module, example.args, example.kwargs, export=export)
        annotate(traced, example.args, example.kwargs)
        fused: dict[tuple[fx.Node, ...], FusedIsland] = {}

        def check(island: Island) -> None:
            if island.nodes not in fused:
                new = FusedIsland(island, engine, dtype, winograd)
                new.prepare()
                fused[island.nodes] = new

        found = find_islands(traced, check)
        if not found.islands:
            raise NothingToFuse(tuple(found.foreign.values()))
        insert(traced, found.islands)
        self.islands = tuple(fused[island.nodes] for island in found.islands)
        for island, whole in zip(found.islands, self.islands, strict=True):
            setattr(traced, island.name, whole)
            whole.name = island.name
        self.foreign_nodes = found.foreign
        self.foreign = tuple(found.foreign.values())
        self.traced = traced

    def replace(self, traced: fx.GraphModule) -> None:
        """Takes another module with the same islands in the place of the traced one.

        Args:
            traced: The module.
        """
        self.traced = traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self.traced(*args, **kwargs)


def summary_of(reasons: tuple[str, ...], most: int = 3) -> str:
    """Returns the first of some reasons, and how many others there are.

    Args:
        reasons: One line each.
        most: How many to name.
    """
    different = list(dict.fromkeys(reasons))
    text = "; ".join(different[:most])
    more = len(different) - most
    return text if more <= 0 else f"{text}; and {more} more"
