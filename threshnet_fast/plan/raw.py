"""From a graph to what training computes: convolutions and pools over raw feature maps.

A feature map is kept as its convolution left it. BatchNorm and activation belong to who reads it:
they are applied while it is read. So a concatenation is several reads, or one read of channels that
were written side by side, and no normalised map is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from ..graph import ir
from ..graph.ir import UnsupportedModule
from .codes import FUSED_ACTIVATIONS
from .concatenations import Block, find_blocks

__all__ = [
    "FUSED_ACTIVATIONS",
    "AveragePool",
    "Buffer",
    "Convolution",
    "Depthwise",
    "MaxPool",
    "Node",
    "Norm",
    "RawPlan",
    "Read",
    "raw",
]

# Largest side of a window.
_MAX_WINDOW = 8


@dataclass
class Buffer:
    """Feature maps side by side, ``[N * height * width, channels]``, as their writers left them.

    Attributes:
        channels: Channels of all of them.
        writers: Indices of the nodes that write to it.
        temporary: Whether a node wrote it for one other alone: a bottleneck.
    """

    channels: int
    writers: list[int] = field(default_factory=list)
    temporary: bool = False


@dataclass(frozen=True)
class Norm:
    """BatchNorm of channels ``[channel, channel + channels)`` of a buffer.

    Attributes:
        module: What has its parameters and statistics.
        name: Its name in the network.
        buffer: Index of the buffer.
        channel: The first channel.
        channels: How many.
    """

    module: nn.BatchNorm2d
    name: str
    buffer: int
    channel: int
    channels: int


@dataclass(frozen=True)
class Read:
    """Channels ``[channel, channel + channels)`` of a buffer, normalised.

    Attributes:
        buffer: Index of the buffer.
        channel: The first channel.
        channels: How many.
        norm: Index of the norm, or None.
    """

    buffer: int
    channel: int
    channels: int
    norm: int | None = None


@dataclass(frozen=True)
class Convolution:
    """``conv(act(cat(norm(read) for each)))``, written raw.

    Attributes:
        module: The convolution, without bias.
        name: Its name in the network.
        reads: What it reads, in the order of the weight's input channels.
        activation: One of ``FUSED_ACTIVATIONS``.
        buffer: Index of the buffer that it writes to.
        channel: First channel there.
    """

    module: nn.Conv2d
    name: str
    reads: tuple[Read, ...]
    activation: str
    buffer: int
    channel: int

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.module.out_channels

    @property
    def kernel(self) -> int:
        """Side of the window."""
        return self.module.kernel_size[0]

    @property
    def stride(self) -> int:
        """Step of the window."""
        return self.module.stride[0]

    @property
    def padding(self) -> int:
        """Zeros around the activated input."""
        return cast("int", self.module.padding[0])


@dataclass(frozen=True)
class Depthwise(Convolution):
    """``dwconv(act(norm(read)))``, every channel with itself alone, of one read, written raw."""


@dataclass(frozen=True)
class _Pool:
    """A pool of one read.

    Attributes:
        name: The name of the module in the network.
        reads: The one read.
        activation: One of ``FUSED_ACTIVATIONS``.
        buffer: Index of the buffer that it writes to.
        channel: First channel there.
        kernel: Side of the window.
        stride: Step of the window.
        padding: Pixels around the input, never chosen.
    """

    name: str
    reads: tuple[Read]
    activation: str
    buffer: int
    channel: int
    kernel: int
    stride: int
    padding: int

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.reads[0].channels


@dataclass(frozen=True)
class MaxPool(_Pool):
    """``maxpool(act(norm(read)))``; with a window of one pixel, what the activation gives."""


@dataclass(frozen=True)
class AveragePool(_Pool):
    """``avgpool(act(norm(read)))``, without padding."""


Node = Convolution | MaxPool | AveragePool


@dataclass
class RawPlan:
    """Nodes in the order in which they run.

    Attributes:
        buffers: The first is the chain's input, ``output`` its result.
        norms: All norms.
        nodes: All nodes.
        output: Index of the buffer with the result, all of it.
    """

    buffers: list[Buffer]
    norms: list[Norm]
    nodes: list[Node]
    output: int


def raw(graph: ir.Graph) -> RawPlan:
    """Says how training computes a graph.

    Args:
        graph: What to compute, of which the channels of the input are known.

    Returns:
        The plan, which refers to the modules of the graph.

    Raises:
        UnsupportedModule: A node, or a setting of it, is none that training can run fused.
    """
    return _Raw(graph).plan()


@dataclass
class _Features:
    """What reads a value: reads, and the activation that is applied to all of them.

    Attributes:
        reads: Of its parts, in order.
        activation: One of ``FUSED_ACTIVATIONS``.
        activated_by: The activation that its values have had already, where they are stored.
    """

    reads: tuple[Read, ...]
    activation: str = ""
    activated_by: str = ""

    @property
    def channels(self) -> int:
        return sum(read.channels for read in self.reads)


class _Raw:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        for node in graph.nodes:
            if isinstance(node, ir.Foreign):
                raise UnsupportedModule(node.reason)
            if isinstance(node, ir.Dropout):
                raise UnsupportedModule(f"{node.name} is a {type(node.module).__name__}")
            if isinstance(node, ir.Activate) and node.kind not in FUSED_ACTIVATIONS:
                raise UnsupportedModule(
                    f"{node.name} has activation {node.kind!r}, which no engine computes"
                )
        channels = graph.channels[0]
        if channels is None:
            name = graph.nodes[0].name if graph.nodes else "nothing"
            raise UnsupportedModule(f"{name} does not tell how many channels it reads")
        self.raw = RawPlan([Buffer(channels)], [], [], 0)
        self.features = {0: _Features((Read(0, 0, channels),))}
        self.blocks, self.slots = find_blocks(graph, 1)
        # The buffer that holds the members of each block that has begun, but perhaps the first.
        self.block_buffers: dict[int, int] = {}
        self.begun: set[int] = set()

    def plan(self) -> RawPlan:
        for node in self.graph.nodes:
            try:
                self.graph.check(node)
                for value in node.inputs:
                    self._begin_block(node, value)
                self._node(node)
            except UnsupportedModule as error:
                error.value = node.output
                raise
        output = self.graph.output
        if not self.raw.nodes:
            raise UnsupportedModule("there is nothing to compute")
        if not self._stored(output):
            self._store("output", output)
        self.raw.output = self.features[output].reads[0].buffer
        return self.raw

    def _node(self, node: ir.Node) -> None:
        if isinstance(node, ir.Conv):
            self._conv(node)
        elif isinstance(node, ir.Norm):
            self._normalise(node)
        elif isinstance(node, ir.Activate):
            self._activate(node)
        elif isinstance(node, ir.Concat):
            self._concat(node)
        elif isinstance(node, ir.Pool):
            self._pool(node)
        else:
            raise UnsupportedModule(f"{node.name} is a {type(node).__name__}")

    def _buffer(self, channels: int) -> int:
        self.raw.buffers.append(Buffer(channels))
        return len(self.raw.buffers) - 1

    def _write(self, node: Node) -> Read:
        self.raw.buffers[node.buffer].writers.append(len(self.raw.nodes))
        self.raw.nodes.append(node)
        return Read(node.buffer, node.channel, node.channels)

    def _stored(self, value: int) -> bool:
        """Whether a value is all of one buffer, as it is."""
        features = self.features[value]
        first, *others = features.reads
        return (
            not others
            and first.norm is None
            and not features.activation
            and first.channels == self.raw.buffers[first.buffer].channels
        )

    def _store(self, name: str, value: int) -> None:
        """Writes a value, normalised and activated, to a buffer of its own."""
        features = self.features[value]
        buffer = self._buffer(features.channels)
        channel = 0
        for read in features.reads:
            self._write(MaxPool(name, (read,), features.activation, buffer, channel, 1, 1, 0))
            channel += read.channels
        activated_by = features.activation or features.activated_by
        self.features[value] = _Features((Read(buffer, 0, channel),), activated_by=activated_by)

    def _begin_block(self, node: ir.Node, value: int) -> None:
        """Stores the first member of a block where the others need that, before it is read."""
        slot = self.slots.get(value)
        if slot is None or slot.block in self.begun or self.blocks[slot.block].members[0] != value:
            return
        self.begun.add(slot.block)
        block = self.blocks[slot.block]
        if self._grows_raw(block):
            if not self._stored(value) or self.features[value].reads[0].buffer == 0:
                self._store(block.name, value)
            buffer = self.block_buffers[slot.block] = self.features[value].reads[0].buffer
            self.raw.buffers[buffer].channels = block.channels
            return
        # Stored values that were activated stay what they are when they are activated again.
        several = len(self.features[value].reads) > 1
        other = self.features[value].activation != self._activation(block)
        if (several or other) and not self._stored(value):
            self._store(block.name, value)

    def _grows_raw(self, block: Block) -> bool:
        """Whether what a growing block appends is what convolutions leave."""
        return block.growing and all(
            isinstance(self.graph.makers[member], ir.Conv) for member in block.members[1:]
        )

    def _activation(self, block: Block) -> str:
        """What the members of a block but the first are activated by."""
        makers = [self.graph.makers[member] for member in block.members[1:]]
        kinds = {node.kind if isinstance(node, ir.Activate) else "" for node in makers}
        if len(kinds) > 1:
            raise UnsupportedModule(f"{block.name} has layers of different activations")
        return kinds.pop()

    def _place(self, value: int) -> tuple[int, int, bool]:
        """Where a convolution writes.

        Args:
            value: What it makes.

        Returns:
            The buffer, the first channel there, and whether that is a place among others.
        """
        channels = self.graph.channels[value]
        assert channels is not None
        slot = self.slots.get(value)
        reader: ir.Node | None = None
        while slot is None:
            reader = self.graph.sole_reader(value)
            if not isinstance(reader, ir.Norm | ir.Activate):
                break
            value = reader.output
            slot = self.slots.get(value)
        if slot is None or self.blocks[slot.block].members[0] == value:
            return self._buffer(channels), 0, False
        block = self.blocks[slot.block]
        first = self.graph.channels[block.members[0]] or 0
        if slot.block not in self.block_buffers:
            self.block_buffers[slot.block] = self._buffer(block.channels - first)
        channel = slot.channel if self._grows_raw(block) else slot.channel - first
        return self.block_buffers[slot.block], channel, True

    def _norm(self, node: ir.Norm, read: Read) -> Read:
        channels = node.module.num_features
        self.raw.norms.append(Norm(node.module, node.name, read.buffer, read.channel, channels))
        return Read(read.buffer, read.channel, channels, len(self.raw.norms) - 1)

    def _normalise(self, node: ir.Norm) -> None:
        features = self.features[node.input]
        if len(features.reads) > 1 or features.activation:
            self._store(node.name, node.input)
        (read,) = self.features[node.input].reads
        if read.norm is not None:
            raise UnsupportedModule(f"{node.name} follows another BatchNorm")
        self.features[node.output] = _Features((self._norm(node, read),))

    def _activate(self, node: ir.Activate) -> None:
        features = self.features[node.input]
        if features.activation:
            raise UnsupportedModule(f"{node.name} follows another activation")
        self.features[node.output] = _Features(features.reads, node.kind)

    def _concat(self, node: ir.Concat) -> None:
        parts = [self.features[value] for value in node.inputs]
        activation = max((part.activation for part in parts), key=bool)
        for part in parts:
            if activation not in (part.activation, part.activated_by):
                raise UnsupportedModule(
                    f"{node.name} reads values that {activation!r} was not applied to"
                )
        reads = [read for part in parts for read in part.reads]
        self.features[node.output] = _Features(_joined(reads), activation)

    def _conv(self, node: ir.Conv) -> None:
        depthwise = node.depthwise
        if depthwise and len(self.features[node.input].reads) > 1:
            self._store(node.name, node.input)
        conv, features = self._checked(node), self.features[node.input]
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], cast(int, conv.padding[0])
        changes_size = stride != 1 or 2 * padding != kernel - 1
        if self.raw.nodes and changes_size and not depthwise:
            raise UnsupportedModule(f"{node.name} changes the size of a map inside of a chain")
        buffer, channel, among_others = self._place(node.output)
        kind = Depthwise if depthwise else Convolution
        read = self._write(
            kind(conv, node.name, features.reads, features.activation, buffer, channel)
        )
        self.features[node.output] = _Features((read,))
        if among_others:
            self._mark_bottleneck(node)

    def _mark_bottleneck(self, node: ir.Conv) -> None:
        """Notes that the map that a convolution of a block reads is read by no other."""
        value = node.input
        maker = self.graph.makers.get(value)
        while isinstance(maker, ir.Activate | ir.Norm) and self.graph.sole_reader(value):
            value = maker.input
            maker = self.graph.makers.get(value)
        if isinstance(maker, ir.Conv) and self.graph.sole_reader(value):
            (read,) = self.features[value].reads
            if len(self.raw.buffers[read.buffer].writers) == 1:
                self.raw.buffers[read.buffer].temporary = True

    def _checked(self, node: ir.Conv) -> nn.Conv2d:
        """A convolution whose window is a square one."""
        conv, name = node.module, node.name
        for attribute in ("kernel_size", "stride", "padding"):
            if not isinstance(getattr(conv, attribute), tuple):
                raise UnsupportedModule(f"{name} has {attribute} {getattr(conv, attribute)!r}")
        if tuple(conv.weight.shape[2:]) != conv.kernel_size:
            raise UnsupportedModule(f"{name} has a weight of shape {tuple(conv.weight.shape)}")
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        for attribute, expected in {
            "kernel_size": (kernel, kernel),
            "stride": (stride, stride),
            "padding": (padding, padding),
            "dilation": (1, 1),
            "groups": conv.in_channels if node.depthwise else 1,
            "bias": None,
            "padding_mode": "zeros",
        }.items():
            found = getattr(conv, attribute)
            if isinstance(found, Tensor):
                raise UnsupportedModule(f"{name} has a {attribute}")
            if found != expected:
                raise UnsupportedModule(f"{name} has {attribute} {found}, expected {expected}")
        if not isinstance(padding, int) or padding >= kernel or kernel > _MAX_WINDOW:
            raise UnsupportedModule(f"{name} has a window of {kernel} with padding {padding}")
        return conv

    def _pool(self, node: ir.Pool) -> None:
        module = node.module
        kernel, stride, padding = module.kernel_size, module.stride, module.padding
        if isinstance(module, nn.AvgPool2d):
            plain = module.divisor_override is None and padding == 0
        else:
            plain = module.dilation in (1, (1, 1)) and not module.return_indices
        if (
            not isinstance(kernel, int)
            or not isinstance(stride, int)
            or not isinstance(padding, int)
            or not plain
            or module.ceil_mode
            or not 0 < kernel <= _MAX_WINDOW
            or not stride > 0
        ):
            raise UnsupportedModule(f"{node.name} is not a plain square pooling")
        if len(self.features[node.input].reads) > 1:
            self._store(node.name, node.input)
        features = self.features[node.input]
        (read,) = features.reads
        buffer = self._buffer(read.channels)
        kind = AveragePool if node.average else MaxPool
        written = self._write(
            kind(node.name, (read,), features.activation, buffer, 0, kernel, stride, padding)
        )
        # Averages of what is not negative are not either, those of what is at most 6 at most that.
        activation = features.activation or features.activated_by
        self.features[node.output] = _Features((written,), activated_by=activation)


def _joined(reads: Sequence[Read]) -> tuple[Read, ...]:
    """Reads, with those of channels that lie side by side as they are made one."""
    result = list(reads[:1])
    for read in reads[1:]:
        last = result[-1]
        adjacent = (last.buffer, last.channel + last.channels) == (read.buffer, read.channel)
        if adjacent and last.norm is None and read.norm is None:
            result[-1] = Read(last.buffer, last.channel, last.channels + read.channels)
        else:
            result.append(read)
    return tuple(result)
