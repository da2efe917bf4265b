"""Islands: the parts of a traced module that plans can express, each as one graph.

An island is a set of operations that can run as one: nothing outside of it both reads what it makes
and makes what it reads. All else stays as it is and runs between the islands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from .export import convert, objection
from .ir import Conv, ConvTranspose, Graph, UnsupportedModule
from .operators import name_for_people
from .trace import META

__all__ = ["ORIGIN", "Island", "Islands", "extract", "find_islands", "insert"]

ORIGIN = "threshnet_fast_origin"
"""Where a node that was extracted has the one that it was copied from, in ``node.meta``."""

_ALONE = "is beside no convolution that runs fused"

# A module needs few rounds: each refuses one more operation, or a whole island.
_MOST_ROUNDS = 64


@dataclass(frozen=True)
class Island:
    """Operations that run as one.

    Attributes:
        name: That of the submodule that takes their place.
        nodes: They, in order, in the graph that was divided.
        module: They alone, as plain PyTorch.
        graph: What they compute.
        shapes: ``(N, C, H, W)`` of each input, on the example.
        device: Where the inputs are.
        reads: The nodes that make the inputs.
        makes: The nodes whose values are read elsewhere.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    module: fx.GraphModule
    graph: Graph
    shapes: tuple[tuple[int, int, int, int], ...]
    device: torch.device
    reads: tuple[fx.Node, ...]
    makes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Islands:
    """How a traced module divides.

    Attributes:
        islands: What runs as one each, in order.
        foreign: Of every other operation that makes a tensor, by the name of its node, its name for
            people and why it is in no island.
    """

    islands: tuple[Island, ...]
    foreign: dict[str, str]


def find_islands(traced: fx.GraphModule, check: Callable[[Island], None]) -> Islands:
    """Divides a traced and annotated module.

    Args:
        traced: The module; only its constants are written anew, one for each reader.
        check: Raises UnsupportedModule for an island that cannot run; where the error's ``value``
            is known, that operation alone is left out, and the rest is divided again.

    Returns:
        Islands that pass the check. Those without a convolution are left to plain PyTorch.
    """
    _separate_constants(traced)
    reasons: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            reason = objection(traced, node)
            if reason is not None:
                reasons[node] = reason
    for _ in range(_MOST_ROUNDS):
        islands: list[Island] = []
        complete = True
        for nodes in _divide(traced, reasons):
            name = f"island_{len(islands)}"
            refused = _examine(traced, name, nodes, check, islands)
            if refused:
                reasons.update(refused)
                complete = False
        if complete:
            break
    else:
        islands = []
    inside = {node for island in islands for node in island.nodes}
    foreign = {
        node.name: reasons.get(node, f"{name_for_people(node)} {_ALONE}")
        for node in traced.graph.nodes
        if node not in inside and _computes(node)
    }
    return Islands(tuple(islands), foreign)


def extract(
    traced: fx.GraphModule, nodes: Iterable[fx.Node], name: str
) -> tuple[fx.GraphModule, tuple[fx.Node, ...], tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Copies operations into a module of their own.

    Args:
        traced: What has them.
        nodes: They, and the constants that they read.
        name: That of the module.

    Returns:
        The module, which returns a tuple; the nodes in an order in which they can run; those that
        make its inputs; and those that make its outputs.
    """
    # What import torch does not load is loaded where it is needed.
    from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule, topo_sort

    nodes = list(nodes)
    for node in nodes:
        node.meta[ORIGIN] = node
    ordered = topo_sort(nodes)
    module, reads, makes = fuse_as_graphmodule(traced, ordered, name, always_return_tuple=True)
    return module, tuple(ordered), tuple(reads), tuple(makes)


def insert(traced: fx.GraphModule, islands: Iterable[Island]) -> None:
    """Puts islands in the place of their operations, as submodules that return tuples.

    Args:
        traced: The module that was divided.
        islands: What :func:`find_islands` found in it.
    """
    from torch.fx.passes.tools_common import stable_topological_sort
    from torch.fx.passes.utils.fuser_utils import erase_nodes, insert_subgm

    replaced: dict[fx.Node, fx.Node] = {}
    for island in islands:
        reads = tuple(replaced.get(node, node) for node in island.reads)
        insert_subgm(traced, island.module, reads, island.makes, island.nodes[-1])
        call = next(
            node
            for node in reversed(traced.graph.nodes)
            if node.op == "call_module" and node.target == island.name
        )
        for user in call.users:
            replaced[island.makes[cast(int, user.args[1])]] = user
        erase_nodes(traced, list(island.nodes))
    stable_topological_sort(traced)
    traced.graph.lint()
    traced.recompile()


def _examine(
    traced: fx.GraphModule,
    name: str,
    nodes: list[fx.Node],
    check: Callable[[Island], None],
    islands: list[Island],
) -> Mapping[fx.Node, str]:
    """Adds an island that passes the check; else returns what is to be left out, and why."""
    module, ordered, reads, makes = extract(traced, nodes, name)
    graph: Graph | None = None
    try:
        graph = convert(module)
        if not any(isinstance(node, Conv | ConvTranspose) for node in graph.nodes):
            return {}
        shapes = []
        for node in reads:
            record = node.meta.get(META)
            if record is None or len(record.shape) != 4:
                readers = [reader for reader in node.users if reader in set(nodes)]
                return {
                    reader: f"{name_for_people(reader)} reads {node.name}, which is no map"
                    for reader in readers
                }
            shapes.append(cast("tuple[int, int, int, int]", record.shape))
        devices = {node.meta[META].device for node in reads}
        if len(devices) != 1:
            raise UnsupportedModule("maps are on several devices")
        (device,) = devices
        island = Island(name, ordered, module, graph, tuple(shapes), device, reads, makes)
        check(island)
    except UnsupportedModule as error:
        culprit = None
        if graph is not None and error.value is not None:
            culprit = graph.origins.get(error.value)
        if culprit is None:
            return {node: f"{name_for_people(node)}: {error}" for node in nodes}
        return {culprit.meta[ORIGIN]: str(error)}
    islands.append(island)
    return {}


def _computes(node: fx.Node) -> bool:
    """Whether a node calculates a tensor."""
    called = node.op in ("call_module", "call_function", "call_method")
    return called and node.meta.get(META) is not None


def _separate_constants(traced: fx.GraphModule) -> None:
    """Gives each reader of a constant a node of its own, so that islands need not share one."""
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        for user in list(node.users)[1:]:
            with traced.graph.inserting_before(node):
                copy = traced.graph.node_copy(node)
            user.replace_input_with(node, copy)


def _divide(traced: fx.GraphModule, reasons: Mapping[fx.Node, str]) -> list[list[fx.Node]]:
    """Sets of operations without a reason against them, as large as they become one by one.

    Nodes are taken in order. A node joins the sets of what it reads, and makes them one, unless a
    path from one of them through something else leads back: then there would be no order in which
    to run them.
    """
    units = _Units()
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        fusable = node not in reasons
        unit = units.add(node, fusable)
        if fusable:
            for read in node.all_input_nodes:
                other = units.of.get(read)
                if other is not None and units.fusable[other]:
                    unit = units.joined(unit, other)
    found = [nodes for unit, nodes in units.nodes.items() if units.fusable[unit]]
    for nodes in found:
        inside = set(nodes)
        constants = [
            read
            for node in nodes
            for read in node.all_input_nodes
            if read.op == "get_attr" and inside.issuperset(read.users)
        ]
        nodes.extend(dict.fromkeys(constants))
    return found


class _Units:
    """Sets of nodes that run as one, and which of them read which."""

    def __init__(self) -> None:
        self.of: dict[fx.Node, int] = {}
        self.nodes: dict[int, list[fx.Node]] = {}
        self.fusable: dict[int, bool] = {}
        self.readers: dict[int, set[int]] = {}

    def add(self, node: fx.Node, fusable: bool) -> int:
        """A set of one node, behind those of what it reads."""
        unit = len(self.of)
        self.of[node] = unit
        self.nodes[unit] = [node]
        self.fusable[unit] = fusable
        self.readers[unit] = set()
        for read in node.all_input_nodes:
            if read in self.of:
                self.readers[self.of[read]].add(unit)
        return unit

    def joined(self, a: int, b: int) -> int:
        """Makes two sets one where that leaves an order to run all of them; returns a's."""
        if a == b or self._leads(a, b) or self._leads(b, a):
            return a
        if len(self.nodes[a]) < len(self.nodes[b]):
            a, b = b, a
        self.nodes[a] += self.nodes.pop(b)
        for node in self.nodes[a]:
            self.of[node] = a
        self.readers[a] = (self.readers[a] | self.readers.pop(b)) - {a, b}
        for readers in self.readers.values():
            if b in readers:
                readers.discard(b)
                readers.add(a)
        self.readers[a].discard(a)
        return a

    def _leads(self, first: int, last: int) -> bool:
        """Whether there is a way from a set to another by way of a third one."""
        seen = {first, last}
        waiting = [unit for unit in self.readers[first] if unit != last]
        while waiting:
            unit = waiting.pop()
            if last in self.readers[unit]:
                return True
            if unit not in seen:
                seen.add(unit)
                waiting += self.readers[unit]
        return False
