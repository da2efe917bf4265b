"""Which values of a graph are concatenated with each other, and how they can share a buffer."""

from __future__ import annotations

from collections.abc import Iterator
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


def find_blocks(graph: Graph, alignment: int) -> tuple[list[Block], dict[int, Slot]]:
    """Finds the values that can share a buffer, so that a concatenation is an offset.

    Args:
        graph: The graph.
        alignment: Of the first channel of each member of a block that is not growing.

    Returns:
        The blocks, in the order of their first concatenations, and the slot of each member.

    Raises:
        UnsupportedModule: The channels of a member are not known.
    """
    blocks: list[Block] = []
    slots: dict[int, Slot] = {}
    leaves: dict[int, tuple[int, ...]] = {}
    for concats in _connected(graph, leaves):
        runs = [leaves[concat.output] for concat in concats]
        members = tuple(sorted({leaf for run in runs for leaf in run}))
        longest = runs[-1]
        growing = len(set(longest)) == len(longest) == len(members) and all(
            longest[: len(run)] == run for run in runs
        )
        if growing:
            members = longest
        end = 0
        for member in members:
            channels = graph.channels[member]
            if channels is None:
                raise UnsupportedModule(f"{concats[0].name} reads a map of unknown channels")
            slots[member] = Slot(len(blocks), end)
            end += channels if growing else -(-channels // alignment) * alignment
        name = concats[0 if growing else -1].name
        blocks.append(Block(name, members, end, growing))
    return blocks, slots


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
