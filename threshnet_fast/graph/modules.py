"""Graphs of this package's modules: the one place that knows them by their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import nn

from ..models.network import Network
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
from .activations import ACTIVATIONS, kind_of, slope_of
from .ir import (
    Activate,
    Concat,
    Conv,
    Dropout,
    Flatten,
    Foreign,
    Graph,
    Linear,
    Mean,
    Norm,
    Pool,
    UnsupportedModule,
)
from .settings import override

__all__ = ["graph_of_network", "graph_of_stages", "split_stages"]


def graph_of_network(network: nn.Module, *, head: bool = True) -> Graph:
    """The graph of a network of this package.

    Args:
        network: The network.
        head: Whether to end with the logits rather than with the last features.

    Raises:
        UnsupportedModule: It is no network of this package, or does not run as its class says.
    """
    if not isinstance(network, Network):
        raise UnsupportedModule(
            f"module is a {type(network).__name__}: expected a {Network.__name__}"
        )
    own = "forward" if "forward" in network.__dict__ else network._overridden(head=True)
    if own is not None or type(network).forward is not Network.forward:
        raise UnsupportedModule(f"module has a {own or 'forward'} of its own")
    for name, container in network._containers():
        own = override(container, nn.Sequential)
        if own is not None:
            raise UnsupportedModule(f"{name} has a {own} of its own")
    graph = graph_of_stages(network._stages(), network.in_chans)
    if head:
        _Builder(graph).head(network)
    return graph


def graph_of_stages(stages: Iterable[tuple[str, nn.Module]], in_channels: int | None) -> Graph:
    """The graph of modules that run one after the other.

    Args:
        stages: Their names and themselves.
        in_channels: Channels of the first one's input; None for those that it reads.
    """
    stages = list(stages)
    if in_channels is None:
        in_channels = _in_channels(stages)
    graph = Graph(in_channels)
    builder = _Builder(graph)
    value = 0
    for name, module in stages:
        value = builder.module(name, module, value)
    return graph


def split_stages(stages: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Takes those modules apart of which a plan of training may hold a part.

    Args:
        stages: Names and modules that run one after the other.
    """
    result: list[tuple[str, nn.Module]] = []
    for name, module in stages:
        if isinstance(module, DenseTransition) and override(module, DenseTransition) is None:
            parts = module.norm, nn.ReLU(), module.conv, module.pool
            names = "norm", "relu", "conv", "pool"
            result += [(f"{name}.{part}", child) for part, child in zip(names, parts, strict=True)]
        else:
            result.append((name, module))
    return result


class _Builder:
    """Adds what modules compute to a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def module(self, name: str, module: nn.Module, value: int) -> int:
        """Adds a module that reads a value; returns the value that it makes."""
        for kind, add in _KINDS.items():
            if isinstance(module, kind):
                own = override(module, kind)
                if own is not None:
                    reason = f"is not exactly a {kind.__name__}: it has a {own} of its own"
                    return self.foreign(name, module, value, reason)
                return add(self, name, module, value)
        reason = f"is a {type(module).__name__}, which no plan can express"
        return self.foreign(name, module, value, reason)

    def foreign(self, name: str, module: nn.Module, value: int, reason: str) -> int:
        """Adds a module as it is."""
        output = self.graph.value(_out_channels(module))
        return self.graph.add(Foreign(name, (value,), output, module, f"{name} {reason}"))

    def sequence(self, name: str, module: nn.Module, value: int) -> int:
        """Adds the children of a module, one after the other."""
        for child, part in module.named_children():
            value = self.module(f"{name}.{child}", part, value)
        return value

    def conv(self, name: str, module: nn.Module, value: int, unit: str = "") -> int:
        conv = cast(nn.Conv2d, module)
        output = self.graph.value(conv.out_channels)
        return self.graph.add(Conv(name, (value,), output, conv, unit or name))

    def conv_of(self, unit: str, name: str, module: nn.Module, value: int) -> int:
        """Adds the convolution that is the main part of a module."""
        if isinstance(module, nn.Conv2d) and override(module, nn.Conv2d) is None:
            return self.conv(name, module, value, unit)
        return self.module(name, module, value)

    def norm(self, name: str, module: nn.Module, value: int) -> int:
        norm = cast(nn.BatchNorm2d, module)
        return self.graph.add(Norm(name, (value,), self.graph.value(norm.num_features), norm))

    def activate(self, name: str, kind: str, value: int, slope: float = 0.0) -> int:
        return self.graph.add(Activate(name, (value,), self._like(value), kind, slope))

    def concat(self, name: str, values: list[int]) -> int:
        if len(values) == 1:
            return values[0]
        channels = [self.graph.channels[value] for value in values]
        total = None if None in channels else sum(cast("list[int]", channels))
        return self.graph.add(Concat(name, tuple(values), self.graph.value(total)))

    def activation(self, name: str, module: nn.Module, value: int) -> int:
        return self.activate(name, kind_of(module), value, slope_of(module))

    def pool(self, name: str, module: nn.Module, value: int) -> int:
        pool = cast("nn.MaxPool2d | nn.AvgPool2d", module)
        return self.graph.add(Pool(name, (value,), self._like(value), pool))

    def dropout(self, name: str, module: nn.Module, value: int) -> int:
        return self.graph.add(Dropout(name, (value,), self._like(value), module))

    def conv_bn_relu(self, name: str, module: nn.Module, value: int) -> int:
        unit = cast(ConvBNReLU, module)
        value = self.conv_of(name, f"{name}.conv", unit.conv, value)
        value = self.module(f"{name}.norm", unit.norm, value)
        return self.activate(name, unit.activation, value)

    def depthwise_conv_bn(self, name: str, module: nn.Module, value: int) -> int:
        unit = cast(DepthwiseConvBN, module)
        conv, channels = unit.dwconv, self.graph.channels[value]
        if isinstance(conv, nn.Conv2d) and conv.groups != channels:
            reason = f"has groups {conv.groups}, expected {channels}"
            return self.foreign(f"{name}.dwconv", module, value, reason)
        value = self.conv_of(name, f"{name}.dwconv", unit.dwconv, value)
        return self.module(f"{name}.norm", unit.norm, value)

    def pointwise_depthwise(self, name: str, module: nn.Module, value: int) -> int:
        unit = cast(PointwiseDepthwise, module)
        value = self.module(f"{name}.layer1", unit.layer1, value)
        return self.module(f"{name}.layer2", unit.layer2, value)

    def dense_layer(self, name: str, module: nn.Module, value: int) -> int:
        new = value
        for number in (1,) if isinstance(module, PlainDenseLayer) else (1, 2):
            norm, conv = f"norm{number}", f"conv{number}"
            new = self.module(f"{name}.{norm}", getattr(module, norm), new)
            new = self.activate(f"{name}.{norm}", "relu", new)
            new = self.module(f"{name}.{conv}", getattr(module, conv), new)
        return self.concat(name, [value, new])

    def transition(self, name: str, module: nn.Module, value: int) -> int:
        transition = cast(DenseTransition, module)
        value = self.module(f"{name}.norm", transition.norm, value)
        value = self.activate(f"{name}.relu", "relu", value)
        value = self.module(f"{name}.conv", transition.conv, value)
        return self.module(f"{name}.pool", transition.pool, value)

    def harmonic_block(self, name: str, module: nn.Module, value: int) -> int:
        block = cast(HarmonicBlock, module)
        if self.graph.channels[value] not in (block.channels[0], None):
            reason = f"reads {block.channels[0]} channels, not {self.graph.channels[value]}"
            return self.foreign(name, module, value, reason)
        if not len(block.links) == len(block.channels) == len(block.layers) + 1:
            reason = f"has {len(block.layers)} layers, but other links"
            return self.foreign(name, module, value, reason)
        values = [value]
        for index, layer in enumerate(block.layers):
            part = f"{name}.layers.{index}"
            read = self.concat(part, [values[link] for link in block.links[index + 1]])
            values.append(self.module(part, layer, read))
        return self.concat(name, [values[layer] for layer in block.out_layers])

    def head(self, network: Network) -> int:
        """Adds pooling and the classifier of a network."""
        value = self.graph.output
        name, classifier = network.default_cfg["classifier"], network.get_classifier()
        if _pools(network):
            # Of the module that pools too, where there is one.
            whole = name.rpartition(".")[0] or name
            value = self.graph.add(Mean(whole, (value,), self._like(value)))
            value = self.graph.add(Flatten(whole, (value,), self._like(value)))
        elif not isinstance(classifier, nn.Identity):
            reason = f"is a {type(classifier).__name__} behind no pooling"
            return self.foreign(name, classifier, value, reason)
        if isinstance(classifier, nn.Identity) and override(classifier, nn.Identity) is None:
            return value
        return self.module(name, classifier, value)

    def linear(self, name: str, module: nn.Module, value: int) -> int:
        linear = cast(nn.Linear, module)
        return self.graph.add(
            Linear(name, (value,), self.graph.value(linear.weight.shape[0]), linear)
        )

    def _like(self, value: int) -> int:
        """A new value with as many channels as another."""
        return self.graph.value(self.graph.channels[value])


def _in_channels(stages: Sequence[tuple[str, nn.Module]]) -> int | None:
    """Channels that the first module reads, where it tells."""
    for module in stages[0][1].modules() if stages else ():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, nn.BatchNorm2d):
            return module.num_features
    return None


def _out_channels(module: nn.Module) -> int | None:
    """Channels of what a module makes, where it tells."""
    for attribute in ("out_channels", "num_features", "out_features"):
        channels = getattr(module, attribute, None)
        if isinstance(channels, int):
            return channels
    return None


def _pools(network: Network) -> bool:
    """Whether a network ends with an average over whole maps; refuses any other pooling."""
    pooling = network._pooling()
    if not pooling:
        return network.global_pool == "avg"
    parts = []
    for name, module in pooling:
        kind = next((k for k in (nn.Dropout, nn.Identity) if isinstance(module, k)), None)
        if kind is None:
            parts.append((name, module))
        elif override(module, kind) is not None:
            raise UnsupportedModule(f"{name} is not exactly a {kind.__name__}")
    for (name, module), (expected, settings) in zip(parts, _AVERAGE, strict=False):
        if not (
            isinstance(module, expected)
            and override(module, expected) is None
            and all(getattr(module, key) in values for key, values in settings.items())
        ):
            raise UnsupportedModule(f"{name} is no part of a global average pooling")
    if len(parts) not in (0, len(_AVERAGE)):
        raise UnsupportedModule(f"{pooling[0][0]} is no part of a global average pooling")
    return bool(parts)


# The modules of an average over whole maps, in order, with the settings that they must have.
_AVERAGE: tuple[tuple[type[nn.Module], dict[str, tuple[object, ...]]], ...] = (
    (nn.AdaptiveAvgPool2d, {"output_size": (1, (1, 1))}),
    (nn.Flatten, {"start_dim": (1,), "end_dim": (-1, 3)}),
)

_KINDS: dict[type[nn.Module], Callable[[_Builder, str, Any, int], int]] = {
    ConvBNReLU: _Builder.conv_bn_relu,
    DenseBlock: _Builder.sequence,
    DenseLayer: _Builder.dense_layer,
    DenseTransition: _Builder.transition,
    DepthwiseConvBN: _Builder.depthwise_conv_bn,
    HarmonicBlock: _Builder.harmonic_block,
    PlainDenseLayer: _Builder.dense_layer,
    PointwiseDepthwise: _Builder.pointwise_depthwise,
    nn.AvgPool2d: _Builder.pool,
    nn.BatchNorm2d: _Builder.norm,
    nn.Conv2d: _Builder.conv,
    nn.Dropout: _Builder.dropout,
    nn.Linear: _Builder.linear,
    nn.MaxPool2d: _Builder.pool,
    nn.Sequential: _Builder.sequence,
    **dict.fromkeys(ACTIVATIONS, _Builder.activation),
}
