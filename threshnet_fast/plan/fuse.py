"""Fusion: from a graph and an input shape to a plan of inference.

BatchNorm behind a convolution is folded into its weight and bias, in float64. BatchNorm and ReLU
before a convolution, an average or the mean become the prologue of each that reads them. A
concatenation is no step: where each extends the one before, as in a dense block, its parts are
written side by side into one buffer; otherwise each part has a slot of a buffer, and whoever reads
them reads several segments. Average pooling comes before a 1x1 convolution rather than behind it,
which is the same and multiplies less often.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..graph.ir import (
    Activate,
    Concat,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Linear,
    Mean,
    Node,
    Norm,
    UnsupportedModule,
)
from ..graph.ir import Pool as PoolNode
from .codes import ACTIVATIONS
from .concatenations import find_blocks
from .ir import Buffer, FusedConv, Head, Plan, Pool, Prologue, Segment, Step
from .limits import GROUP

__all__ = ["fuse"]


def fuse(graph: Graph, input_shape: tuple[int, int, int, int], *, fold: bool = True) -> Plan:
    """Fuses a graph, taken in evaluation.

    Args:
        graph: What to compute.
        input_shape: ``(N, C, H, W)`` of the input, all positive.
        fold: Whether to calculate the weights; without, they are tensors on the meta device, which
            have a shape but no values, and fusing takes little time.

    Returns:
        The plan. Its weights are new tensors, which do not follow those of the graph.

    Raises:
        UnsupportedModule: A node, or a setting of it, is none that plans can express.
    """
    with torch.no_grad():
        return _Fusion(graph, input_shape, fold).plan()


@dataclass(frozen=True)
class _Map:
    """Where a value lies: segments of equal size."""

    segments: tuple[Segment, ...]
    height: int
    width: int

    @property
    def channels(self) -> int:
        return sum(segment.channels for segment in self.segments)

    @property
    def pixels(self) -> int:
        return self.height * self.width


class _Fusion:
    def __init__(self, graph: Graph, input_shape: tuple[int, int, int, int], fold: bool) -> None:
        self.graph = graph
        self.input_shape = input_shape
        self.device = None if fold else torch.device("meta")
        self.batch, channels, height, width = input_shape
        self.buffers = [Buffer(height, width, channels, "input")]
        self.steps: list[Step] = []
        # Where the values lie that have been written.
        self.maps = {0: _Map((Segment(0, 0, channels),), height, width)}
        # Values that are BatchNorm and ReLU of others, which whoever reads them applies.
        self.prologues: dict[int, tuple[int, Norm]] = {}
        # Norms without the ReLU that must follow.
        self.bare_norms: dict[int, Norm] = {}
        for foreign in graph.foreign():
            raise UnsupportedModule(foreign.reason)
        self.blocks, self.slots = find_blocks(graph, GROUP)
        # The buffer of each block, once its first value has been written.
        self.block_buffers: dict[int, int] = {}
        # Nodes that an earlier one took in.
        self.done: set[int] = set()

    def plan(self) -> Plan:
        for node in self.graph.nodes:
            if node.output not in self.done:
                self._node(node)
        result = self.graph.output
        if result in self.prologues:
            self._normalise(result)
        flat = isinstance(self.graph.makers.get(result), Flatten | Linear)
        return self._finish(flat)

    def _node(self, node: Node) -> None:
        self.graph.check(node)
        if isinstance(node, Conv):
            self._conv_node(node)
        elif isinstance(node, Norm):
            if node.input in self.prologues:
                raise _stands_alone(node.name)
            self.bare_norms[node.output] = node
            if not isinstance(self.graph.sole_reader(node.output), Activate):
                raise UnsupportedModule(
                    f"{node.name} is a {type(node.module).__name__}: expected one behind a "
                    "convolution or before a ReLU"
                )
        elif isinstance(node, Activate):
            self._activate(node)
        elif isinstance(node, Concat):
            self._concat(node)
        elif isinstance(node, PoolNode):
            self._pool_node(node)
        elif isinstance(node, Mean):
            self._head(node)
        elif isinstance(node, Dropout):
            self._alias(node)
        else:
            raise UnsupportedModule(f"{node.name} is a {type(node).__name__} on its own")

    def _alias(self, node: Node) -> None:
        """Makes a node's output another name of its input."""
        if node.input in self.prologues:
            self.prologues[node.output] = self.prologues[node.input]
        else:
            self.maps[node.output] = self.maps[node.input]

    def _source(self, node: Node) -> tuple[_Map, tuple[Tensor, Tensor] | None]:
        """What a node reads, and the scale and shift of its prologue in float64."""
        found = self.prologues.get(node.input)
        if found is None:
            return self.maps[node.input], None
        value, norm = found
        source = self.maps[value]
        if len(source.segments) != 1:
            raise UnsupportedModule(f"{norm.name} normalises a concatenation")
        return source, self._affine(norm)

    def _activate(self, node: Activate) -> None:
        if node.kind not in ACTIVATIONS:
            raise _unknown_activation(node)
        norm = self.bare_norms.pop(node.input, None)
        if norm is None or node.kind != "relu":
            raise UnsupportedModule(f"{node.name} has activation {node.kind!r} on its own")
        self.prologues[node.output] = norm.input, norm

    def _concat(self, node: Concat) -> None:
        parts = [self._part(node, value) for value in node.inputs]
        if any(segment.buffer == 0 for part in parts for segment in part.segments):
            raise UnsupportedModule(f"{node.name} does not follow a convolution or a pool")
        sizes = {(part.height, part.width) for part in parts}
        if len(sizes) != 1:
            raise UnsupportedModule(f"{node.name} concatenates maps of sizes {sorted(sizes)}")
        segments = [segment for part in parts for segment in part.segments]
        slot = self.slots.get(node.inputs[-1])
        growing = slot is not None and self.blocks[slot.block].growing
        self.maps[node.output] = _Map(
            _joined(segments) if growing else tuple(segments), parts[0].height, parts[0].width
        )

    def _part(self, node: Concat, value: int) -> _Map:
        if value in self.prologues:
            raise _stands_alone(node.name)
        return self.maps[value]

    def _conv_node(self, node: Conv) -> None:
        """A convolution, with the BatchNorm, the activation or the pool behind it."""
        conv = node.module
        groups = conv.in_channels if node.depthwise else 1
        kernel, stride = conv.weight.shape[2], _first(conv.stride)
        if stride < 1:
            raise UnsupportedModule(f"{node.name} has stride {stride}")
        _require_plain(conv, node.name, kernel, stride, groups)
        affine = activation = None
        name, last = node.unit, node.output
        norm = self.graph.sole_reader(last)
        if isinstance(norm, Norm):
            self.graph.check(norm)
            affine, last = self._affine(norm), norm.output
            self.done.add(last)
            activate = self.graph.sole_reader(last)
            if isinstance(activate, Activate):
                activation, last = activate.kind, activate.output
                self.done.add(last)
                if activation not in ACTIVATIONS:
                    raise _unknown_activation(activate)
        elif self._pools_before(node, norm):
            assert isinstance(norm, PoolNode)
            self._pooled_conv(node, norm)
            return
        source, prologue = self._source(node)
        if groups > 1 and (len(source.segments) != 1 or prologue is not None):
            raise UnsupportedModule(f"{name} reads a concatenation")
        size = _out_size(source, kernel, stride, kernel // 2)
        self.maps[last] = self._write(last, name, conv.out_channels, size)
        weight = self._double(conv.weight)
        self._conv(
            name,
            source,
            self.maps[last],
            weight if affine is None else _scaled(weight, affine[0]),
            None if affine is None else affine[1],
            prologue=prologue,
            stride=stride,
            padding=kernel // 2,
            activation=activation,
            groups=groups,
        )

    def _pools_before(self, conv: Conv, reader: Node | None) -> bool:
        """Whether the average behind a convolution of single pixels can come before it."""
        module = conv.module
        return (
            isinstance(reader, PoolNode)
            and reader.average
            and module.weight.shape[2:] == (1, 1)
            and _first(module.stride) == 1
        )

    def _pooled_conv(self, node: Conv, pool: PoolNode) -> None:
        source, prologue = self._source(node)
        if len(source.segments) != 1:
            raise UnsupportedModule(f"{node.name} reads a concatenation")
        pooled = self._pool(pool, pool.name, None, source, prologue)
        self.done.add(pool.output)
        size = pooled.height, pooled.width
        out = self._write(pool.output, node.unit, node.module.out_channels, size)
        self.maps[pool.output] = out
        weight = self._double(node.module.weight)
        self._conv(node.name, pooled, out, weight, None, module_pixels=source.pixels)

    def _pool_node(self, node: PoolNode) -> None:
        source, prologue = self._source(node)
        if prologue is not None and not node.average:
            raise _stands_alone(node.name)
        if len(source.segments) != 1:
            raise UnsupportedModule(f"{node.name} pools a concatenation")
        self.maps[node.output] = self._pool(node, node.name, node.output, source, prologue)

    def _pool(
        self,
        node: PoolNode,
        name: str,
        value: int | None,
        source: _Map,
        prologue: tuple[Tensor, Tensor] | None,
    ) -> _Map:
        """A pool; of a value of the graph, or of one between two steps."""
        kernel, stride, padding = _window(node, prologue is not None)
        size = _out_size(source, kernel, stride, padding)
        out = self._write(value, name, source.channels, size)
        self._pool_step(name, source, out, kernel, stride, padding, prologue)
        return out

    def _normalise(self, value: int) -> None:
        """Writes a value that is the BatchNorm and ReLU of another, as the result."""
        read, norm = self.prologues[value]
        source = self.maps[read]
        out = self._write(None, "norm", source.channels, (source.height, source.width))
        self._pool_step("norm", source, out, 1, 1, 0, self._affine(norm))

    def _pool_step(
        self,
        name: str,
        source: _Map,
        out: _Map,
        kernel: int,
        stride: int,
        padding: int,
        prologue: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.steps.append(
            Pool(
                name=name,
                input=source.segments[0],
                output=out.segments[0],
                kernel=(kernel, kernel),
                stride=(stride, stride),
                padding=(padding, padding),
                average=prologue is not None,
                input_pixels=source.pixels,
                output_pixels=out.pixels,
                batch=self.batch,
                prologue=_prologue(prologue),
            )
        )

    def _head(self, node: Mean) -> None:
        """The mean of whole maps, with the classifier behind it."""
        source, prologue = self._source(node)
        flatten = self.graph.readers[node.output][0]
        assert isinstance(flatten, Flatten)
        linear = next(iter(self.graph.readers[flatten.output]), None)
        last: Node = flatten
        weight = bias = None
        channels = source.channels
        if isinstance(linear, Linear):
            self.graph.check(linear)
            last, module = linear, linear.module
            channels = module.weight.shape[0]
            weight = _single(self._double(module.weight))
            bias = None if module.bias is None else _single(self._double(module.bias))
        elif linear is not None:
            raise UnsupportedModule(f"{linear.name} is no Linear")
        self.done |= {flatten.output, last.output}
        self.maps[last.output] = self._write(last.output, node.name, channels, (1, 1))
        self.steps.append(
            Head(
                name=node.name,
                input=source.segments[0],
                output=self.maps[last.output].segments[0],
                weight=weight,
                bias=bias,
                input_pixels=source.pixels,
                batch=self.batch,
                prologue=_prologue(prologue),
            )
        )

    def _write(self, value: int | None, name: str, channels: int, size: tuple[int, int]) -> _Map:
        """Gives a value its place: a slot of a block's buffer, or a buffer of its own."""
        height, width = size
        slot = None if value is None else self.slots.get(value)
        if slot is None:
            self.buffers.append(Buffer(height, width, channels, name))
            return _Map((Segment(len(self.buffers) - 1, 0, channels),), height, width)
        buffer = self.block_buffers.get(slot.block)
        if buffer is None:
            block = self.blocks[slot.block]
            self.buffers.append(Buffer(height, width, block.channels, block.name))
            buffer = self.block_buffers[slot.block] = len(self.buffers) - 1
        return _Map((Segment(buffer, slot.channel, channels),), height, width)

    def _conv(
        self,
        name: str,
        source: _Map,
        target: _Map,
        weight: Tensor,
        bias: Tensor | None,
        *,
        prologue: tuple[Tensor, Tensor] | None = None,
        stride: int = 1,
        padding: int = 0,
        activation: str | None = None,
        groups: int = 1,
        module_pixels: int | None = None,
    ) -> None:
        valid = _valid(source.height, target.height, weight.shape[2], stride, padding) * _valid(
            source.width, target.width, weight.shape[3], stride, padding
        )
        self.steps.append(
            FusedConv(
                name=name,
                inputs=source.segments,
                output=target.segments[0],
                weight=_single(weight),
                bias=None if bias is None else _single(bias),
                prologue=_prologue(prologue),
                stride=(stride, stride),
                padding=(padding, padding),
                activation=activation,
                input_pixels=source.pixels,
                output_pixels=target.pixels,
                valid_taps=valid,
                batch=self.batch,
                groups=groups,
                module_pixels=module_pixels,
            )
        )

    def _double(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.float64)

    def _affine(self, node: Norm) -> tuple[Tensor, Tensor]:
        """The float64 scale and shift of a BatchNorm in evaluation."""
        norm = node.module
        if norm.running_mean is None or norm.running_var is None:
            raise UnsupportedModule(
                f"{node.name} keeps no running statistics, so it cannot be folded"
            )
        scale = self._double(norm.running_var)
        if scale.is_meta:
            return scale, scale
        scale = torch.rsqrt(scale + norm.eps)
        if norm.weight is not None:
            scale = scale * self._double(norm.weight)
        shift = -self._double(norm.running_mean) * scale
        if norm.bias is not None:
            shift = shift + self._double(norm.bias)
        return scale, shift

    def _finish(self, flat: bool) -> Plan:
        if not self.steps:
            raise UnsupportedModule("there is nothing to compute")
        last = self.steps[-1].output
        if last.channel != 0 or last.channels != self.buffers[last.buffer].channels:
            raise UnsupportedModule("the network ends inside a block")
        if last.buffer != len(self.buffers) - 1:
            raise UnsupportedModule("the network's last step does not write its last buffer")
        return Plan(self.input_shape, tuple(self.buffers), tuple(self.steps), flat)


def _joined(segments: list[Segment]) -> tuple[Segment, ...]:
    """Segments, with those that lie side by side made one."""
    result = segments[:1]
    for segment in segments[1:]:
        last = result[-1]
        if (segment.buffer, segment.channel) == (last.buffer, last.channel + last.channels):
            result[-1] = Segment(last.buffer, last.channel, last.channels + segment.channels)
        else:
            result.append(segment)
    return tuple(result)


def _stands_alone(name: str) -> UnsupportedModule:
    return UnsupportedModule(f"{name} follows a BatchNorm and a ReLU that stand alone")


def _window(node: PoolNode, averages: bool) -> tuple[int, int, int]:
    """Kernel, stride and padding of a pool."""
    pool = node.module
    if isinstance(pool, nn.AvgPool2d):
        if not averages:
            raise UnsupportedModule(
                f"{node.name} is a {type(pool).__name__} that no BatchNorm and ReLU come before"
            )
        options = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
        if (*options, pool.divisor_override) != (2, 2, 0, False, None):
            raise UnsupportedModule(f"{node.name} is not a plain 2x2 average pooling")
        return 2, 2, 0
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    if (
        not isinstance(kernel, int)
        or not isinstance(stride, int)
        or not isinstance(padding, int)
        or pool.dilation not in (1, (1, 1))
        or pool.ceil_mode
        or pool.return_indices
        or not (kernel >= 1 and stride >= 1 and 0 <= padding <= kernel // 2)
    ):
        raise UnsupportedModule(f"{node.name} is not a plain square max pooling")
    return kernel, stride, padding


def _unknown_activation(node: Activate) -> UnsupportedModule:
    return UnsupportedModule(f"{node.name} has activation {node.kind!r}, which no engine computes")


def _out_size(source: _Map, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    height, width = (
        (size + 2 * padding - kernel) // stride + 1 for size in (source.height, source.width)
    )
    return height, width


def _valid(size: int, out_size: int, kernel: int, stride: int, padding: int) -> int:
    """Sum over output positions of the taps that fall inside, in one direction."""
    starts = (position * stride - padding for position in range(out_size))
    return sum(min(start + kernel, size) - max(start, 0) for start in starts)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight with each output channel scaled."""
    # Arithmetic on the meta device imports a compiler at its first use, which takes a second.
    return weight if weight.is_meta else weight * scale[:, None, None, None]


def _prologue(affine: tuple[Tensor, Tensor] | None) -> Prologue | None:
    return None if affine is None else Prologue(*map(_single, affine))


def _single(tensor: Tensor) -> Tensor:
    """A float32 copy that shares nothing with the module's tensor."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def _require_plain(conv: nn.Conv2d, name: str, kernel: int, stride: int, groups: int) -> None:
    window = list(conv.weight.shape[2:])
    if window != [kernel, kernel]:
        raise UnsupportedModule(f"{name} has a window of {window}, expected {kernel}x{kernel}")
    expected = {
        "stride": (stride, stride),
        "padding": (kernel // 2, kernel // 2),
        "dilation": (1, 1),
        "groups": groups,
        "bias": None,
        "padding_mode": "zeros",
    }
    for attribute, value in expected.items():
        actual = getattr(conv, attribute)
        # One number stands for both directions.
        if actual is not value and actual != value and (actual, actual) != value:
            raise UnsupportedModule(f"{name} has {attribute} {actual}, expected {value}")


def _first(value: object) -> int:
    """The first of two numbers, or the one that stands for both; 0 where it is neither."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, int) else 0
