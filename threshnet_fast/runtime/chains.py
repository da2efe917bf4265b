"""The parts of a traced module that can be trained as chains: one map in, one map out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from ..autograd.chain import Chain
from ..graph import ir
from ..graph.export import convert
from ..graph.ir import Graph, UnsupportedModule
from ..graph.islands import ORIGIN, Island, extract
from ..graph.operators import Unsupported, name_for_people, operation
from ..graph.trace import META
from ..plan.raw import FUSED_ACTIVATIONS, raw
from .transforms import transformed

__all__ = ["ChainModule", "Chains", "find_chains"]

_HEAD = (ir.Mean, ir.Flatten, ir.Linear)


class ChainModule(nn.Module):
    """Takes a map and returns a tuple of one; what its chain cannot run, it runs as plain PyTorch.

    Args:
        island: The operations.
        chain: What computes them.
    """

    plain: fx.GraphModule
    chain: Chain

    def __init__(self, island: Island, chain: Chain) -> None:
        super().__init__()
        # Beside the submodules, as its parameters are those of the module that was traced.
        self.__dict__.update(plain=island.module, chain=chain)
        self._channels = island.graph.channels[0]
        self._differentiable = chain.differentiable_input

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Runs the operations.

        Args:
            x: ``[N, C, H, W]``.
        """
        wanted = torch.is_grad_enabled() and x.requires_grad
        if transformed() or not self._takes(x) or (wanted and not self._differentiable):
            return cast("tuple[Tensor]", self.plain(x))
        return (self.chain(x),)

    def _takes(self, x: object) -> bool:
        return (
            type(x) is Tensor
            and x.dtype is torch.float32
            and x.ndim == 4
            and x.shape[1] == self._channels
            and x.device.type == "cpu"
            and x.layout is torch.strided
            and x.numel() > 0
        )


@dataclass(frozen=True)
class Chains:
    """How a traced module divides.

    Attributes:
        islands: What each chain takes the place of, in order.
        chains: Of each, what computes it.
        foreign: Of every other operation that makes a tensor, its name and why it is in no chain.
        slow: Those of them that read a map of several pixels, and not for its average alone.
    """

    islands: tuple[Island, ...]
    chains: tuple[Chain, ...]
    foreign: tuple[str, ...]
    slow: tuple[str, ...]


def find_chains(traced: fx.GraphModule) -> Chains:
    """Divides a traced and annotated module, whose norms may be in training mode.

    Args:
        traced: The module, which is not modified.

    Returns:
        Chains that are as long as possible, each with a convolution and with a gradient of its
        input where there is one.
    """
    return _Division(traced).chains()


class _Division:
    def __init__(self, traced: fx.GraphModule) -> None:
        self._traced = traced
        self._nodes = list(traced.graph.nodes)
        # Why a node can be in no chain.
        self._reasons: dict[fx.Node, str] = {}
        # What takes no time: no large map is read, or but for its average.
        self._small: set[fx.Node] = set()
        self._convolutions: set[fx.Node] = set()
        # What can only be what a chain begins with.
        self._first: set[fx.Node] = set()
        self._taken: set[fx.Node] = set()
        # What depends on parameters, and so may want a gradient.
        self._learned: set[fx.Node] = set()
        for node in self._nodes:
            if _called(node):
                self._examine(node)

    def chains(self) -> Chains:
        islands: list[Island] = []
        chains: list[Chain] = []
        inside: set[fx.Node] = set()
        for value in self._nodes:
            # What is made inside of a chain is read there alone.
            if value.op in ("get_attr", "output") or value in inside:
                continue
            while (found := self._longest(value, f"chain_{len(islands)}")) is not None:
                island, chain = found
                islands.append(island)
                chains.append(chain)
                self._taken.update(island.nodes)
                inside.update(set(island.nodes) - set(island.makes))
        foreign: list[str] = []
        slow: list[str] = []
        for node in self._nodes:
            if not _called(node) or node in self._taken or node.meta.get(META) is None:
                continue
            default = f"{name_for_people(node)} is in no chain with a convolution"
            foreign.append(self._reasons.get(node, default))
            if node not in self._small:
                slow.append(foreign[-1])
        return Chains(tuple(islands), tuple(chains), tuple(foreign), tuple(slow))

    def _examine(self, node: fx.Node) -> None:
        """Notes what a node is by itself."""
        reads = node.all_input_nodes
        module = self._traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if (module is not None and next(module.parameters(), None) is not None) or any(
            read.op == "get_attr" or read in self._learned for read in reads
        ):
            self._learned.add(node)
        if not any(_is_large(read) for read in reads):
            self._small.add(node)
        try:
            made = operation(self._traced, node, training=True)
            channels = [read.meta[META].shape[1] for read in made.reads]
            graph = Graph(channels[0])
            values = [0, *(graph.input(each) for each in channels[1:])]
            made.build(graph, name_for_people(node), tuple(values))
            if not graph.nodes or any(isinstance(each, _HEAD) for each in graph.nodes):
                self._small.add(node)
            for each in graph.nodes:
                if isinstance(each, ir.Conv | ir.Pool):
                    raw(graph)
                elif isinstance(each, ir.Activate) and each.kind not in FUSED_ACTIVATIONS:
                    raise Unsupported(f"has activation {each.kind!r}, which no chain can express")
                elif not isinstance(each, ir.Norm | ir.Activate | ir.Concat):
                    raise Unsupported(f"is a {type(each).__name__}, which no chain can express")
        except Unsupported as reason:
            self._reasons[node] = f"{name_for_people(node)} {reason}"
        except UnsupportedModule as error:
            self._reasons[node] = str(error)
        else:
            if any(isinstance(each, ir.Conv) for each in graph.nodes):
                self._convolutions.add(node)

    def _longest(self, value: fx.Node, name: str) -> tuple[Island, Chain] | None:
        """The longest chain that reads a value, or None."""
        while True:
            nodes = self._candidate(value)
            if nodes is None:
                return None
            found = self._chain(value, nodes, name)
            if found is not None:
                return found

    def _candidate(self, value: fx.Node) -> list[fx.Node] | None:
        """Most operations of which one is read by others, that read one value and each other."""
        begin = self._nodes.index(value) + 1
        index: dict[fx.Node, int] = {}
        # Sets of nodes are the bits of integers.
        needed: list[int] = []
        for node in self._nodes[begin:]:
            reads = _reads(node)
            if (
                not _called(node)
                or node in self._reasons
                or node in self._taken
                or not reads
                or not all(read is value or read in index for read in reads)
                or (node in self._first and reads != [value])
            ):
                continue
            index[node] = len(index)
            needed.append(1 << index[node])
            for read in reads:
                if read is not value:
                    needed[-1] |= needed[index[read]]
        members = list(index)
        readers = [
            # Who is none of them has the bit that no set has.
            sum({1 << index.get(user, len(index)) for user in node.users})
            for node in members
        ]
        convolutions = sum(1 << index[node] for node in index if node in self._convolutions)
        for last in sorted(range(len(members)), key=lambda each: -needed[each].bit_count()):
            inside = needed[last]
            among = [each for each in range(last + 1) if inside >> each & 1]
            if inside & convolutions and not any(
                readers[each] & ~inside for each in among if each != last
            ):
                return [members[each] for each in among]
        return None

    def _chain(
        self, value: fx.Node, nodes: list[fx.Node], name: str
    ) -> tuple[Island, Chain] | None:
        """The chain of some operations; where there is none, notes which of them is to blame."""
        reads = dict.fromkeys(read for node in nodes for read in node.all_input_nodes)
        constants = [read for read in reads if read.op == "get_attr"]
        module, _, inputs, makes = extract(self._traced, [*constants, *nodes], name)
        graph: Graph | None = None
        try:
            graph = convert(module, training=True)
            _check_norms(graph)
            chain = Chain.of_graph(graph)
            if value in self._learned:
                _check_gradient(graph, chain)
        except UnsupportedModule as error:
            culprit = nodes[-1]
            if graph is not None and error.value is not None:
                culprit = graph.origins[error.value].meta[ORIGIN]
            if culprit in self._first or _reads(culprit) == [value]:
                self._reasons[culprit] = str(error)
            else:
                self._first.add(culprit)
            return None
        found = value.meta[META]
        island = Island(
            name,
            (*constants, *nodes),
            module,
            graph,
            (found.shape,),
            found.device,
            inputs,
            makes,
        )
        return island, chain


def _called(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function", "call_method")


def _is_large(node: fx.Node) -> bool:
    """Whether a value is a map of several pixels."""
    record = node.meta.get(META)
    return node.op != "get_attr" and record is not None and math.prod(record.shape[2:]) > 1


def _reads(node: fx.Node) -> list[fx.Node]:
    """The values that a node reads, without parameters."""
    return [read for read in node.all_input_nodes if read.op != "get_attr"]


def _check_norms(graph: Graph) -> None:
    """Refuses a norm that is used twice: each use reads the statistics that the others write."""
    seen: set[nn.Module] = set()
    for node in graph.nodes:
        if isinstance(node, ir.Norm):
            if node.module in seen:
                raise _at(node, f"{node.name} is used more than once")
            seen.add(node.module)


def _check_gradient(graph: Graph, chain: Chain) -> None:
    """Refuses a chain without a gradient of its input."""
    for node in graph.nodes:
        if isinstance(node, ir.Conv) and any(
            node.module is other.module for other in chain.without_input_gradient
        ):
            raise _at(node, f"{node.name} changes the size of a map whose gradient is wanted")


def _at(node: ir.Node, text: str) -> UnsupportedModule:
    error = UnsupportedModule(text)
    error.value = node.output
    return error
