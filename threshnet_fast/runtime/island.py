"""An island at work: a part of a traced module that an engine computes in one call."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..engines.base import CompilationFailed, Engine
from ..engines.cache import PlanCache
from ..graph.ir import Graph, UnsupportedModule
from ..graph.islands import Island
from ..plan.fuse import Shape, fuse, reads_image
from ..plan.ir import Plan
from .transforms import transformed

__all__ = ["FusedIsland", "IslandSource"]

Row = tuple[int, int, int, int, int]


class IslandSource:
    """Makes the plans of one graph.

    Args:
        graph: The graph.
        example: Shapes of its inputs, as :func:`threshnet_fast.plan.fuse.fuse` takes them.
    """

    def __init__(self, graph: Graph, example: Shape) -> None:
        self.graph = graph
        self._example = example

    def __call__(self, shape: Any, *, head: bool, values: bool) -> Plan:
        """Fuses the graph.

        Args:
            shape: Those of the inputs; None for the example's, as weights are the same for all.
            head: Nothing, as a graph has no head.
            values: Whether to calculate the weights.

        Raises:
            UnsupportedModule: As :func:`threshnet_fast.plan.fuse.fuse`.
        """
        return fuse(self.graph, cast(Shape, shape or self._example), fold=values)


class FusedIsland(nn.Module):
    """Takes maps and returns maps, a tuple; what it cannot run fused, it runs as plain PyTorch.

    The first sizes for which there is no plan are worth a warning.

    Args:
        island: The island.
        engine: What computes it.
        dtype: Of its inputs and weights.
        winograd: As :func:`threshnet_fast.environment.winograd_by_default` returns it.

    Attributes:
        name: Which it is of the module's islands.
        graph: What it computes.
        nodes: How many operations it holds.
    """

    plain: fx.GraphModule

    def __init__(self, island: Island, engine: Engine, dtype: torch.dtype, winograd: int) -> None:
        super().__init__()
        self._engine = engine
        self.name = island.name
        self.graph = island.graph
        self.nodes = len(island.graph.nodes)
        # Beside the submodules, as its parameters are those of the module that was traced.
        self.__dict__["plain"] = island.module
        self._dtype = dtype
        self._frozen = engine.freeze(dtype, winograd)
        self._image = reads_image(island.graph)
        self._device = island.device
        self._channels = [island.graph.channels[value] for value in island.graph.inputs]
        self.example = self._example(island)
        self.source = IslandSource(island.graph, self.example)
        self._plans = PlanCache(engine, self.source)
        # Why there is no plan for some shapes.
        self.refused: dict[Hashable, str] = {}

    def _example(self, island: Island) -> Shape:
        if not self._engine.islands:
            if not self._image or len(island.shapes) != 1 or len(island.makes) != 1:
                raise UnsupportedModule(
                    f"backend {self._engine.name!r} runs parts that read one image and make one map"
                )
            return island.shapes[0]
        rows = [(*shape, shape[1]) for shape in island.shapes]
        if self._image:
            rows[0] = (*island.shapes[0], 0)
        return tuple(rows)

    def prepare(self) -> None:
        """Compiles the plan for the example, and packs the weights.

        Raises:
            UnsupportedModule: There is none.
            CompilationFailed: The engine cannot compile it.
        """
        self._plans.get(cast(Any, self.example), True, self._setting())

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Runs the island.

        Args:
            *xs: ``[N, C, H, W]`` each.

        Returns:
            What :attr:`graph` makes, as views of maps in channels_last format.
        """
        if transformed() or not all(map(self._takes, xs, self._channels)):
            return self._plainly(xs)
        maps, rows = self._given(xs)
        if rows in self.refused:
            return self._plainly(xs)
        try:
            plan, packed = self._plans.get(cast(Any, rows), True, self._setting())
        except (CompilationFailed, UnsupportedModule) as error:
            if not self.refused:
                sizes = ", ".join("x".join(map(str, x.shape)) for x in xs)
                warnings.warn(
                    f"{self.name}, {self.nodes} operations that run fused for other sizes, runs as "
                    f"plain PyTorch for inputs of {sizes}: {error}",
                    UserWarning,
                    stacklevel=2,
                )
            self.refused[rows] = str(error)
            return self._plainly(xs)
        if not self._engine.islands:
            return (plan(xs[0], packed),)
        return tuple(cast(Any, plan).run(maps, packed))

    def explain(self, *xs: Tensor) -> tuple[Plan, tuple[str, ...]]:
        """Returns the plan for some inputs, without the values of weights, and its algorithms.

        Args:
            *xs: As :meth:`forward` takes them.

        Raises:
            UnsupportedModule: There is none.
            CompilationFailed: The engine cannot compile it.
        """
        if not all(map(self._takes, xs, self._channels)):
            raise UnsupportedModule("the inputs are no maps of the island's dtype and channels")
        _, rows = self._given(xs)
        prepared, _ = self._plans.get(cast(Any, rows), True, self._setting())
        plan = self.source(rows, head=True, values=False)
        return plan, self._engine.algorithms(prepared, plan)

    def _setting(self) -> Hashable:
        return self._engine.setting(self._device, self._dtype, self._frozen)

    def _given(self, xs: tuple[Tensor, ...]) -> tuple[list[Tensor], Shape]:
        """The inputs in the layout that a plan reads, and what a plan is made for."""
        if not self._engine.islands:
            return list(xs), cast(Shape, tuple(xs[0].shape))
        maps = list(xs)
        rows: list[Row] = []
        for index, x in enumerate(xs):
            pitch = 0
            if index or not self._image:
                pitch = _pitch(x)
                if not pitch:
                    x = maps[index] = x.contiguous(memory_format=torch.channels_last)
                    pitch = _pitch(x)
            rows.append((*cast("tuple[int, int, int, int]", x.shape), pitch))
        return maps, tuple(rows)

    def _takes(self, x: object, channels: int | None) -> bool:
        return (
            type(x) is Tensor
            and x.dtype is self._dtype
            and x.ndim == 4
            and x.shape[1] == channels
            and x.device == self._device
            and x.layout is torch.strided
            and x.numel() > 0
        )

    def _plainly(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", self.plain(*xs))


def _pitch(x: Tensor) -> int:
    """Elements between neighbouring pixels of a map whose channels are innermost; 0 for others."""
    batch, channels, height, width = x.shape
    image, channel, row, pixel = x.stride()
    if width > 1:
        pitch = pixel
    elif height > 1:
        pitch = row
    else:
        pitch = image if batch > 1 else channels
    dense = (
        (channels == 1 or channel == 1)
        and pitch >= channels
        and (height == 1 or row == width * pitch)
        and (batch == 1 or image == height * width * pitch)
    )
    return pitch if dense else 0
