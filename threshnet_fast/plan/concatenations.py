"""Which values of a graph are concatenated with each other, and how they can share a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from ..graph.ir import Concat, Graph, UnsupportedModule

__all__ = ["Block", "Slot", "find_blocks"]


@dataclass(frozen=True)
class Slot:
    """A value's place among those that are concatenated with it.

    Attributes:
        block: Index of the block.
        channel: Its first channel there.
    """

    block: int
    channel: int


@dataclass(frozen=True)
class Block:
    """Values that are concatenated with each other, directly or by way of others.

    Attributes:
        name: The module that the first or the last concatenation comes from.
        members: They, in the order of their channels.
        channels: From the first channel of the first to the end of the last.
        growing: Whether each concatenation extends the one before, as in a dense block: every one
            is then a run of channels. Otherwise the members are in the order in which they are
            made.
    """

    name: str
    members: tuple[int, ...]
    channels: int
    growing: bool


def find_blocks(
    graph: Graph, alignment: int, fixed: Set[int] = frozenset()
) -> tuple[list[Block], dict[int, Slot]]:
    """Finds the values that can share a buffer, so that a concatenation is an offset.

    Args:
        graph: The graph.
        alignment: Of the first channel of each member of a block that is not growing.
        fixed: Values that have a place of their own, and are no members.

    Returns:
        The blocks, in the order of their first concatenations, and the slot of each member.

    Raises:
        UnsupportedModule: The channels of a member are not known.
    """
    blocks: list[Block] = []
    slots: dict[int, Slot] = {}
    leaves: dict[int, tuple[int, ...]] = {}

    def add(name: str, members: Sequence[int], growing: bool) -> None:
        members = [member for member in members if member not in fixed]
        end = 0
        for member in members:
            channels = graph.channels[member]
            if channels is None:
                raise UnsupportedModule(f"{name} reads a map of unknown channels")
            slots[member] = Slot(len(blocks), end)
            end += channels if growing else -(-channels // alignment) * alignment
        if members:
            blocks.append(Block(name, tuple(members), end, growing))

    for concats in _connected(graph, leaves):
        runs = [leaves[concat.output] for concat in concats]
        chains = _chains(runs)
        if len(chains) == 1 and len(set(runs[-1])) == len(runs[-1]):
            add(concats[0].name, runs[-1], growing=True)
            continue
        for chain in chains:
            longest = runs[chain[-1]]
            if len(chain) > 1 and slots.keys().isdisjoint(longest):
                add(concats[chain[0]].name, longest, growing=True)
        rest = sorted({leaf for run in runs for leaf in run} - slots.keys())
        add(concats[-1].name, rest, growing=False)
    return blocks, slots


def _chains(runs: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Concatenations, by their indices, each of which extends the one before in its chain."""
    chains: list[list[int]] = []
    for index, run in enumerate(runs):
        for chain in chains:
            before = runs[chain[-1]]
            # A value that is there twice has no one place.
            if run[: len(before)] == before and len(set(run)) == len(run):
                chain.append(index)
                break
        else:
            chains.append([index])
    return chains


def _connected(graph: Graph, leaves: dict[int, tuple[int, ...]]) -> Iterator[list[Concat]]:
    """Concatenations that share parts, in order; notes the parts of each that are none."""
    concats = [node for node in graph.nodes if isinstance(node, Concat)]
    # The set that each part belongs to, as the index of its first concatenation.
    group_of: dict[int, int] = {}
    for index, concat in enumerate(concats):
        run = tuple(leaf for value in concat.inputs for leaf in leaves.get(value, (value,)))
        leaves[concat.output] = run
        joined = {group_of[leaf] for leaf in run if leaf in group_of}
        first = min(joined, default=index)
        for leaf, group in group_of.items():
            if group in joined:
                group_of[leaf] = first
        group_of.update(dict.fromkeys(run, first))
    for first in dict.fromkeys(group_of[leaves[concat.output][0]] for concat in concats):
        yield [concat for concat in concats if group_of[leaves[concat.output][0]] == first]
