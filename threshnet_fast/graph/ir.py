"""The graph of a network: values, and the nodes that make one of others.

Nothing is fused in it, nothing has a place in memory, and of the shapes only channels are known, so
that one graph serves every input size, inference and training. Parameters are those of the modules
that the nodes refer to: a graph copies none, and follows what an optimizer writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

__all__ = [
    "Activate",
    "Add",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Dropout",
    "Flatten",
    "Foreign",
    "Graph",
    "Linear",
    "Mean",
    "Node",
    "Norm",
    "Pad",
    "Pool",
    "Resize",
    "Slice",
    "UnsupportedModule",
]


class UnsupportedModule(ValueError):
    """A module, or a setting of it, that plans cannot express.

    Attributes:
        value: What the node makes that it is about, in the graph that was to be a plan; None where
            it is about none.
    """

    value: int | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """What makes one value of others.

    Attributes:
        name: The module that it comes from, for people.
        inputs: Indices of the values that it reads.
        output: Index of the value that it makes.
    """

    name: str
    inputs: tuple[int, ...]
    output: int

    @property
    def input(self) -> int:
        """The first value that it reads."""
        return self.inputs[0]


@dataclass(frozen=True, eq=False)
class Conv(Node):
    """``conv2d(x)``.

    Attributes:
        module: The convolution, whose weight, bias and settings these are.
        unit: Name of the module that is this convolution and what belongs to it; its own where
            it stands alone.
    """

    module: nn.Conv2d
    unit: str

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel, its own."""
        conv = self.module
        return 1 < conv.groups == conv.in_channels == conv.out_channels


@dataclass(frozen=True, eq=False)
class ConvTranspose(Node):
    """``conv_transpose2d(x)``.

    Attributes:
        module: The convolution, whose weight, bias and settings these are.
    """

    module: nn.ConvTranspose2d


@dataclass(frozen=True, eq=False)
class Norm(Node):
    """``batch_norm(x)``, by the running statistics or by those of the batch, as the module has it.

    Attributes:
        module: The normalisation.
    """

    module: nn.BatchNorm2d


@dataclass(frozen=True, eq=False)
class Activate(Node):
    """A function of every element.

    Attributes:
        kind: Its name in :mod:`torch.nn.functional`.
        slope: That of a leaky ReLU below zero.
    """

    kind: str
    slope: float = 0.0


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """Channels of several values, one after the other."""


@dataclass(frozen=True, eq=False)
class Add(Node):
    """The sum of values of one shape."""


@dataclass(frozen=True, eq=False)
class Slice(Node):
    """Channels ``[begin, end)`` of a value.

    Attributes:
        begin: The first.
        end: The one behind the last.
    """

    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Pad(Node):
    """Zeros around a map.

    Attributes:
        before: Rows above and columns to the left.
        after: Rows below and columns to the right.
    """

    before: tuple[int, int]
    after: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Resize(Node):
    """``interpolate(x)``; a second input, where there is one, has the size of the result.

    Attributes:
        mode: ``"nearest"``, ``"nearest-exact"`` or ``"bilinear"``.
        align_corners: Whether the centres of the corner pixels coincide, in bilinear mode.
        size: Height and width of the result, or None.
        factors: Height and width of the result over those of the input, where neither ``size`` nor
            a second input is given, or None.
        recompute: Whether pixels lie by the sizes alone, not by ``factors``.
    """

    mode: str
    align_corners: bool
    size: tuple[int, int] | None
    factors: tuple[float, float] | None
    recompute: bool = False


@dataclass(frozen=True, eq=False)
class Pool(Node):
    """Maximum or average over windows.

    Attributes:
        module: The pool, whose window and settings these are.
    """

    module: nn.MaxPool2d | nn.AvgPool2d

    @property
    def average(self) -> bool:
        """Average rather than maximum."""
        return isinstance(self.module, nn.AvgPool2d)


@dataclass(frozen=True, eq=False)
class Mean(Node):
    """The average over the whole map, ``[N, C, 1, 1]``."""


@dataclass(frozen=True, eq=False)
class Flatten(Node):
    """``[N, C, 1, 1]`` to ``[N, C]``."""


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """``linear(x)``.

    Attributes:
        module: The layer, whose weight and bias these are.
    """

    module: nn.Linear


@dataclass(frozen=True, eq=False)
class Dropout(Node):
    """The value itself in evaluation; in training, chance decides about its elements.

    Attributes:
        module: What drops them.
    """

    module: nn.Module


@dataclass(frozen=True, eq=False)
class Foreign(Node):
    """Something that no plan can express, run as it is.

    Attributes:
        module: What it is.
        reason: Why no plan can express it, in one line that begins with its name.
    """

    module: nn.Module
    reason: str


class Graph:
    """Nodes in an order in which they can run.

    Args:
        in_channels: Channels of the input, which is value 0.

    Attributes:
        channels: Channels of every value; None where what made it does not tell.
        nodes: All nodes.
        inputs: Indices of what is given.
        outputs: Indices of the results: at first the one value that was made last.
        origins: What a front end made values of, where it says so.
    """

    def __init__(self, in_channels: int | None) -> None:
        self.channels: list[int | None] = [in_channels]
        self.nodes: list[Node] = []
        self.inputs = [0]
        self.outputs: tuple[int, ...] = (0,)
        self.origins: dict[int, Any] = {}
        self._made = {0}

    @property
    def output(self) -> int:
        """Index of the last of the results."""
        return self.outputs[-1]

    def input(self, channels: int | None) -> int:
        """Adds another input.

        Args:
            channels: As many as it has.

        Returns:
            The value.
        """
        value = self.value(channels)
        self.inputs.append(value)
        self._made.add(value)
        return value

    def value(self, channels: int | None) -> int:
        """A new value, to be the output of the node that is added next."""
        self.channels.append(channels)
        return len(self.channels) - 1

    def add(self, node: Node) -> int:
        """Appends a node, which becomes the graph's result for now.

        Returns:
            The value that it makes.

        Raises:
            ValueError: The node reads a value that no node before it makes, or makes one that
                another made.
        """
        if not self._made.issuperset(node.inputs) or node.output in self._made:
            raise ValueError(
                f"{node.name} reads values {node.inputs} and makes value {node.output}: expected "
                "to read what nodes before it make, and to make what none of them does"
            )
        self._made.add(node.output)
        self.nodes.append(node)
        self.outputs = (node.output,)
        self.__dict__.pop("readers", None)
        self.__dict__.pop("makers", None)
        return node.output

    @cached_property
    def makers(self) -> dict[int, Node]:
        """The node that makes each value but the inputs."""
        return {node.output: node for node in self.nodes}

    @cached_property
    def readers(self) -> dict[int, list[Node]]:
        """The nodes that read each value, in order."""
        found: dict[int, list[Node]] = {value: [] for value in range(len(self.channels))}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found[value].append(node)
        return found

    def sole_reader(self, value: int) -> Node | None:
        """The one node that reads a value, or None; the result is read by others too."""
        readers = self.readers[value]
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def check(self, node: Node) -> None:
        """Refuses a node whose module does not read the channels that there are.

        PyTorch goes by the shapes of weights, whatever a module says of itself: so must they agree.

        Raises:
            UnsupportedModule: Its parameters are of other shapes, or it reads other channels.
        """
        actual = self.channels[node.input]
        if isinstance(node, Conv):
            conv = node.module
            outputs, inputs, *_ = conv.weight.shape
            if outputs != conv.out_channels or inputs * conv.groups != conv.in_channels:
                raise UnsupportedModule(
                    f"{node.name} has a weight of shape {tuple(conv.weight.shape)}"
                )
            self._expect(node, conv.in_channels, "channels")
        elif isinstance(node, ConvTranspose):
            transposed = node.module
            inputs, outputs, *_ = transposed.weight.shape
            if (inputs, outputs * transposed.groups) != (
                transposed.in_channels,
                transposed.out_channels,
            ):
                raise UnsupportedModule(
                    f"{node.name} has a weight of shape {tuple(transposed.weight.shape)}"
                )
            self._expect(node, transposed.in_channels, "channels")
        elif isinstance(node, Norm):
            norm = node.module
            self._expect(node, norm.num_features, "channels")
            tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
            shapes = {tuple(tensor.shape) for tensor in tensors if tensor is not None}
            if not shapes <= {(actual,)}:
                raise UnsupportedModule(f"{node.name} does not normalise {actual} channels")
        elif isinstance(node, Linear):
            self._expect(node, node.module.weight.shape[1], "features")

    def _expect(self, node: Node, expected: int, what: str) -> None:
        actual = self.channels[node.input]
        if actual is not None and expected != actual:
            raise UnsupportedModule(f"{node.name} reads {expected} {what}, not {actual}")

    def foreign(self) -> Iterable[Foreign]:
        """The nodes that no plan can express."""
        return (node for node in self.nodes if isinstance(node, Foreign))
