"""What a chain of modules computes in training: convolutions and pools over raw feature maps.

A feature map is kept as its convolution left it. BatchNorm and activation belong to who reads it:
they are applied while it is read. So a concatenation is several reads, or one read of channels that
were written side by side, and no normalised map is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from ..nn import (
    ConvBNReLU,
    DenseBlock,
    DenseLayer,
    DenseTransition,
    DepthwiseConvBN,
    HarmonicBlock,
    PlainDenseLayer,
    PointwiseDepthwise,
)
from ..plan.settings import override

__all__ = [
    "ACTIVATIONS",
    "AveragePool",
    "Buffer",
    "Convolution",
    "Depthwise",
    "Graph",
    "MaxPool",
    "Node",
    "Norm",
    "Read",
    "Unsupported",
    "split",
    "trace",
]

ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}


class Unsupported(ValueError):
    """A module, or a setting of it, that no chain can hold."""


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
        module: It.
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
        activation: One of ``ACTIVATIONS``.
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
        activation: One of ``ACTIVATIONS``.
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
class Graph:
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


def trace(stages: Sequence[tuple[str, nn.Module]], in_channels: int) -> Graph:
    """Says what modules that run one after the other compute.

    Args:
        stages: Their names and themselves.
        in_channels: Channels of the first one's input.

    Raises:
        Unsupported: One of them, or a setting of it, is none that a chain can hold.
    """
    tracer = _Tracer(in_channels)
    for name, module in stages:
        tracer.add(name, module)
    return tracer.finish()


@dataclass
class _Features:
    """What the next module reads: reads, and the activation that is applied to all of them.

    Attributes:
        reads: They.
        activation: One of ``ACTIVATIONS``.
        activated_by: The activation that its values have had already, where they are stored.
    """

    reads: tuple[Read, ...]
    activation: str = ""
    activated_by: str = ""

    @property
    def channels(self) -> int:
        return sum(read.channels for read in self.reads)


class _Tracer:
    def __init__(self, in_channels: int) -> None:
        self.graph = Graph([Buffer(in_channels)], [], [], 0)
        self.features = _Features((Read(0, 0, in_channels),))

    def add(self, name: str, module: nn.Module) -> None:
        """Adds one module.

        Raises:
            Unsupported: It cannot be part of a chain.
        """
        if isinstance(module, ConvBNReLU):
            _require(module, ConvBNReLU, name)
            self._conv_bn_relu(name, module, None)
        elif isinstance(module, DenseBlock):
            _require(module, DenseBlock, name)
            for child, layer in module.named_children():
                self._dense_layer(f"{name}.{child}", layer)
        elif isinstance(module, (DenseLayer, PlainDenseLayer)):
            self._dense_layer(name, module)
        elif isinstance(module, HarmonicBlock):
            _require(module, HarmonicBlock, name)
            self._harmonic_block(name, module)
        elif isinstance(module, nn.Conv2d):
            self.features = _Features(self._convolution(name, module, None))
        elif isinstance(module, nn.BatchNorm2d):
            if len(self.features.reads) > 1 or self.features.activation:
                self._store(name)
            self._normalise(name, module)
        elif isinstance(module, nn.ReLU):
            _require(module, nn.ReLU, name)
            if self.features.activation:
                raise Unsupported(f"{name} follows another activation")
            self.features.activation = "relu"
        elif isinstance(module, DepthwiseConvBN):
            self._depthwise_conv_bn(name, module, None)
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            self._pool(name, module)
        else:
            raise Unsupported(f"{name} is a {type(module).__name__}")

    def finish(self) -> Graph:
        """Returns the graph of what has been added.

        Raises:
            Unsupported: That is nothing.
        """
        if not self.graph.nodes:
            raise Unsupported("there is nothing to compute")
        if not self._stored():
            self._store("output")
        self.graph.output = self.features.reads[0].buffer
        return self.graph

    def _buffer(self, channels: int) -> int:
        self.graph.buffers.append(Buffer(channels))
        return len(self.graph.buffers) - 1

    def _write(self, node: Node) -> Read:
        self.graph.buffers[node.buffer].writers.append(len(self.graph.nodes))
        self.graph.nodes.append(node)
        return Read(node.buffer, node.channel, node.channels)

    def _norm(self, name: str, module: nn.Module, read: Read) -> Read:
        _require(module, nn.BatchNorm2d, name)
        norm = cast(nn.BatchNorm2d, module)
        if norm.num_features != read.channels:
            raise Unsupported(
                f"{name} normalises {norm.num_features} channels, not {read.channels}"
            )
        self.graph.norms.append(Norm(norm, name, read.buffer, read.channel, read.channels))
        return Read(read.buffer, read.channel, read.channels, len(self.graph.norms) - 1)

    def _normalise(self, name: str, module: nn.Module) -> None:
        (read,) = self.features.reads
        if read.norm is not None:
            raise Unsupported(f"{name} follows another BatchNorm")
        self.features = _Features((self._norm(name, module, read),))

    def _stored(self) -> bool:
        """Whether the features are all of one buffer, as it is."""
        first, *others = self.features.reads
        return (
            not others
            and first.norm is None
            and not self.features.activation
            and first.channels == self.graph.buffers[first.buffer].channels
        )

    def _store(self, name: str) -> None:
        """Writes the features, normalised and activated, to a buffer of their own."""
        features = self.features
        buffer = self._buffer(features.channels)
        channel = 0
        for read in features.reads:
            self._write(MaxPool(name, (read,), features.activation, buffer, channel, 1, 1, 0))
            channel += read.channels
        self.features = _Features((Read(buffer, 0, channel),), activated_by=features.activation)

    def _checked(self, name: str, module: nn.Module, groups: int) -> nn.Conv2d:
        """A convolution of the features, whose window is a square one."""
        _require(module, nn.Conv2d, name)
        conv = cast(nn.Conv2d, module)
        for attribute in ("kernel_size", "stride", "padding"):
            if not isinstance(getattr(conv, attribute), tuple):
                raise Unsupported(f"{name} has {attribute} {getattr(conv, attribute)!r}")
        # PyTorch goes by the weight, whatever the module says of itself.
        shape = (conv.out_channels, conv.in_channels // groups, *conv.kernel_size)
        if conv.weight.shape != shape:
            raise Unsupported(f"{name} has a weight of shape {tuple(conv.weight.shape)}")
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        for attribute, expected in {
            "kernel_size": (kernel, kernel),
            "stride": (stride, stride),
            "padding": (padding, padding),
            "dilation": (1, 1),
            "groups": groups,
            "bias": None,
            "padding_mode": "zeros",
        }.items():
            if getattr(conv, attribute) != expected:
                raise Unsupported(
                    f"{name} has {attribute} {getattr(conv, attribute)}, expected {expected}"
                )
        if not isinstance(padding, int) or padding >= kernel or kernel > 8:
            raise Unsupported(f"{name} has a window of {kernel} with padding {padding}")
        if self.features.channels != conv.in_channels:
            raise Unsupported(
                f"{name} reads {conv.in_channels} channels, not {self.features.channels}"
            )
        return conv

    def _convolution(self, name: str, module: nn.Module, to: tuple[int, int] | None) -> tuple[Read]:
        conv = self._checked(name, module, 1)
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], cast(int, conv.padding[0])
        needs_gradient = bool(self.graph.nodes)
        if needs_gradient and (stride != 1 or 2 * padding != kernel - 1):
            raise Unsupported(f"{name} changes the size of a map inside of a chain")
        buffer, channel = to or (self._buffer(conv.out_channels), 0)
        reads, activation = self.features.reads, self.features.activation
        return (self._write(Convolution(conv, name, reads, activation, buffer, channel)),)

    def _conv_bn_relu(self, name: str, module: ConvBNReLU, to: tuple[int, int] | None) -> None:
        (read,) = self._convolution(f"{name}.conv", module.conv, to)
        self.features = _Features(
            (self._norm(f"{name}.norm", module.norm, read),), module.activation
        )

    def _depthwise_conv_bn(
        self, name: str, module: DepthwiseConvBN, to: tuple[int, int] | None
    ) -> None:
        _require(module, DepthwiseConvBN, name)
        if len(self.features.reads) > 1:
            self._store(name)
        conv = self._checked(f"{name}.dwconv", module.dwconv, self.features.channels)
        if conv.out_channels != conv.in_channels:
            raise Unsupported(f"{name}.dwconv has several outputs for each channel")
        buffer, channel = to or (self._buffer(conv.out_channels), 0)
        features = self.features
        node = Depthwise(
            conv, f"{name}.dwconv", features.reads, features.activation, buffer, channel
        )
        self.features = _Features((self._norm(f"{name}.norm", module.norm, self._write(node)),))

    def _pointwise_depthwise(
        self, name: str, module: PointwiseDepthwise, to: tuple[int, int]
    ) -> None:
        self._conv_bn_relu(f"{name}.layer1", module.layer1, None)
        self.graph.buffers[self.features.reads[0].buffer].temporary = True
        self._depthwise_conv_bn(f"{name}.layer2", module.layer2, to)

    def _block_input(self, name: str) -> int:
        """Makes sure that the features are stored in a buffer that may grow, and returns it."""
        if not self._stored() or self.features.reads[0].buffer == 0:
            self._store(name)
        return self.features.reads[0].buffer

    def _dense_layer(self, name: str, module: nn.Module) -> None:
        plain = isinstance(module, PlainDenseLayer)
        _require(module, PlainDenseLayer if plain else DenseLayer, name)
        layer = cast("DenseLayer | PlainDenseLayer", module)
        buffer = self._block_input(name)
        before = self.features
        self.features = _Features(
            (self._norm(f"{name}.norm1", layer.norm1, before.reads[0]),), "relu"
        )
        last = "conv1"
        if isinstance(layer, DenseLayer):
            (middle,) = self._convolution(f"{name}.conv1", layer.conv1, None)
            self.graph.buffers[middle.buffer].temporary = True
            self.features = _Features((self._norm(f"{name}.norm2", layer.norm2, middle),), "relu")
            last = "conv2"
        start = before.channels
        conv = cast(nn.Conv2d, getattr(layer, last))
        self.graph.buffers[buffer].channels = start + conv.out_channels
        self._convolution(f"{name}.{last}", conv, (buffer, start))
        self.features = _Features((Read(buffer, 0, self.graph.buffers[buffer].channels),))

    def _harmonic_block(self, name: str, block: HarmonicBlock) -> None:
        kind = type(block.layers[0])
        if kind not in (ConvBNReLU, PointwiseDepthwise):
            raise Unsupported(f"{name}.layers.0 is a {kind.__name__}")
        # What the block's layers have been activated by, as others read them.
        activation = "" if kind is PointwiseDepthwise else cast(str, block.layers[0].activation)
        features = self.features
        if features.activation != activation or len(features.reads) > 1:
            # Stored values that were activated stay what they are when they are activated again.
            if not self._stored():
                self._store(name)
            if activation and self.features.activated_by != activation:
                raise Unsupported(f"{name} reads values that {activation!r} was not applied to")
            features = _Features(self.features.reads, activation, activation)
        if features.channels != block.channels[0]:
            raise Unsupported(f"{name} reads {block.channels[0]} channels, not {features.channels}")
        if not len(block.links) == len(block.channels) == len(block.layers) + 1:
            raise Unsupported(f"{name} has {len(block.layers)} layers, but other links")
        outputs = [features.reads[0]]
        buffer = self._buffer(sum(block.channels[1:]))
        channel = 0
        for index, module in enumerate(block.layers, start=1):
            layer_name = f"{name}.layers.{index - 1}"
            _require(module, kind, layer_name)
            self.features = _Features(
                tuple(outputs[link] for link in block.links[index]), activation
            )
            if isinstance(module, PointwiseDepthwise):
                self._pointwise_depthwise(layer_name, module, (buffer, channel))
            else:
                layer = cast(ConvBNReLU, module)
                if layer.activation != activation:
                    raise Unsupported(f"{layer_name} has another activation than its block")
                self._conv_bn_relu(layer_name, layer, (buffer, channel))
            outputs.append(self.features.reads[0])
            if self.features.channels != block.channels[index]:
                raise Unsupported(f"{layer_name} does not write {block.channels[index]} channels")
            channel += block.channels[index]
        self.features = _Features(tuple(outputs[layer] for layer in block.out_layers), activation)

    def _pool(self, name: str, module: nn.MaxPool2d | nn.AvgPool2d) -> None:
        average = isinstance(module, nn.AvgPool2d)
        _require(module, nn.AvgPool2d if average else nn.MaxPool2d, name)
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
            or not 0 < kernel <= 8
            or not stride > 0
        ):
            raise Unsupported(f"{name} is not a plain square pooling")
        if len(self.features.reads) > 1:
            self._store(name)
        (read,) = self.features.reads
        features = self.features
        buffer = self._buffer(read.channels)
        kind = AveragePool if average else MaxPool
        node = kind(name, (read,), features.activation, buffer, 0, kernel, stride, padding)
        # Averages of what is not negative are not either, those of what is at most 6 at most that.
        activation = features.activation or features.activated_by
        self.features = _Features((self._write(node),), activated_by=activation)


def _require(module: nn.Module, expected: type[nn.Module], name: str) -> None:
    """Refuses a module that does not run exactly as its class does."""
    if type(module) is not expected or override(module, expected) is not None:
        raise Unsupported(f"{name} is not exactly a {expected.__name__}")


def _children(transition: DenseTransition) -> list[tuple[str, nn.Module]]:
    return [("norm", transition.norm), ("relu", nn.ReLU()), ("conv", transition.conv)]


def split(stages: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Takes those modules apart of which a chain can hold a part.

    Args:
        stages: Names and modules that run one after the other.
    """
    result: list[tuple[str, nn.Module]] = []
    for name, module in stages:
        if type(module) is DenseTransition and override(module, DenseTransition) is None:
            result += [(f"{name}.{child}", part) for child, part in _children(module)]
            result.append((f"{name}.pool", module.pool))
        else:
            result.append((name, module))
    return result
