"""Fusion: from a graph and the shapes of its inputs to a plan of inference.

BatchNorm behind a convolution is folded into its weight and bias, in float64, and a ReLU behind
that is applied to its sums. BatchNorm and ReLU before a convolution, an average or the mean become
the prologue of each that reads them. A concatenation is no step: where each extends the one before,
as in a dense block, its parts are written side by side into one buffer; otherwise each part has a
slot of a buffer, and whoever reads them reads several segments. Average pooling comes before a 1x1
convolution rather than behind it, which is the same and multiplies less often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..graph.ir import (
    Activate,
    Add,
    Concat,
    Conv,
    ConvTranspose,
    Dropout,
    Flatten,
    Graph,
    Linear,
    Mean,
    Node,
    Norm,
    Pad,
    Slice,
    UnsupportedModule,
)
from ..graph.ir import Pool as PoolNode
from ..graph.ir import Resize as ResizeNode
from .affine import Affine, folded, of_norm, single
from .codes import ACTIVATIONS
from .concatenations import find_blocks
from .emission import EPILOGUES, Emission
from .ir import Buffer, Head, Plan, Resize, Segment
from .limits import GROUP
from .maps import Map, Pending, bounds_of, joined, pairs, spans
from .shapes import Shape
from .windows import Window, of_convolution, of_pool, of_transposed_convolution

__all__ = ["fuse", "reads_image"]

# A convolution of more groups than these has few channels a group, and is no product of matrices.
_MOST_GROUPS = 32


def fuse(graph: Graph, input_shape: Shape, *, fold: bool = True) -> Plan:
    """Fuses a graph, taken in evaluation.

    Args:
        graph: What to compute.
        input_shape: ``(N, C, H, W)`` of the input, all positive, for a plan that reads its input in
            any strides and has one output. Or a row ``(N, C, H, W, pitch)`` for each input: with as
            many elements between neighbouring pixels in NHWC; 0 for any strides, which only the
            first may have, where convolutions alone read it (:func:`reads_image`).
        fold: Whether to calculate the weights; without, they are tensors on the meta device, which
            have a shape but no values, and fusing takes little time.

    Returns:
        The plan. Its weights are new tensors, which do not follow those of the graph.

    Raises:
        UnsupportedModule: A node, or a setting of it, is none that plans can express; its attribute
            ``value`` is that node's output, where it is of one.
    """
    island = isinstance(input_shape[0], tuple)
    rows = input_shape if island else ((*input_shape, 0),)
    with torch.no_grad():
        return _Fusion(graph, cast("Any", rows), fold, island).plan()


class _Fusion:
    def __init__(
        self,
        graph: Graph,
        rows: tuple[tuple[int, int, int, int, int], ...],
        fold: bool,
        island: bool,
    ) -> None:
        self.graph = graph
        self.island = island
        self.device = None if fold else torch.device("meta")
        self.batch = rows[0][0]
        self.shape = rows[0][:4]
        self.image = rows[0][4] == 0
        self.emit = Emission(self.batch, self.device)
        # Where the values lie that have been written, and those that whoever reads them calculates.
        self.values: dict[int, Map | Pending] = {}
        # Those of [N, C] instead of [N, C, 1, 1].
        self.flat: set[int] = set()
        for value, (_, channels, height, width, pitch) in zip(graph.inputs, rows, strict=True):
            self.values[value] = Map((Segment(len(self.emit.buffers), 0, channels),), height, width)
            name = f"input {len(self.emit.buffers)}" if len(rows) > 1 else "input"
            self.emit.buffers.append(Buffer(height, width, channels, name, pitch or None))
        for foreign in graph.foreign():
            raise _at(foreign, UnsupportedModule(foreign.reason))
        self.blocks, self.slots = find_blocks(graph, GROUP, _fixed(graph))
        # The buffer of each block, once its first value has been written.
        self.block_buffers: dict[int, int] = {}
        # Zeros around values, above and to the left, below and to the right.
        self.pads: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        # Nodes that an earlier one took in.
        self.done: set[int] = set()

    def plan(self) -> Plan:
        for node in self.graph.nodes:
            if node.output in self.done:
                continue
            try:
                self.graph.check(node)
                self._handlers[type(node)](self, node)
            except UnsupportedModule as error:
                raise _at(node, error) from None
        outputs = [self._returned(value) for value in self.graph.outputs]
        if not self.emit.steps:
            raise UnsupportedModule("there is nothing to compute")
        flat = tuple(value in self.flat for value in self.graph.outputs)
        buffers, steps = tuple(self.emit.buffers), tuple(self.emit.steps)
        if not self.island:
            return Plan(self.shape, buffers, steps, flat[0])
        inputs = tuple(range(len(self.graph.inputs)))
        return Plan(self.shape, buffers, steps, False, inputs, self.image, tuple(outputs), flat)

    def _returned(self, value: int) -> Segment:
        """One segment with a result, copied where it is none or belongs to somebody else."""
        found = self._stored(value)
        first = found.segments[0]
        alone = len(found.segments) == 1 and first.buffer >= len(self.graph.inputs)
        if not self.island:
            whole = (
                first.channel == 0 and first.channels == self.emit.buffers[first.buffer].channels
            )
            last = len(self.emit.buffers) - 1
            alone &= whole and first.buffer == last == self.emit.steps[-1].output.buffer
        if alone:
            return first
        copy = self._write(None, "output", found.channels, found.size)
        for source, target in pairs(found, copy):
            self.emit.pointwise("output", (source,), target, found.pixels)
        return copy.segments[0]

    # What nodes become.

    def _norm(self, node: Norm) -> None:
        value = self.values[node.input]
        if node.input in self.flat:
            self.flat.add(node.output)
        affine = self._affine(node)
        if isinstance(value, Pending) and value.activation is None:
            affine = affine if value.affine is None else value.affine.then(affine)
            self._postpone(node.output, Pending(value.source, affine), node.name)
        else:
            self._postpone(node.output, Pending(self._stored(node.input), affine), node.name)

    def _activate(self, node: Activate) -> None:
        _check_activation(node)
        value = self.values[node.input]
        if isinstance(value, Pending) and value.activation is None:
            pending = Pending(value.source, value.affine, node.kind, node.slope)
        else:
            pending = Pending(self._stored(node.input), None, node.kind, node.slope)
        if node.input in self.flat:
            self.flat.add(node.output)
        self._postpone(node.output, pending, node.name)

    def _postpone(self, value: int, pending: Pending, name: str) -> None:
        """Leaves a value to its readers, where all of them can calculate it."""
        self.values[value] = pending
        readers = self.graph.readers[value]
        if (
            value in self.graph.outputs
            or value in self.slots
            or not all(self._takes(reader, pending) for reader in readers)
        ):
            self._stored(value, name)

    def _takes(self, reader: Node, pending: Pending) -> bool:
        """Whether a node can calculate what it reads."""
        if isinstance(reader, Norm | Activate):
            return pending.activation is None
        if isinstance(reader, Dropout | Pad | Slice):
            return True
        if pending.activation not in (None, *EPILOGUES) or self._reads_image(pending.source):
            return False
        if isinstance(reader, Conv):
            return reader.module.groups == 1
        return isinstance(reader, Mean | Linear) or (
            isinstance(reader, PoolNode) and reader.average
        )

    def _reads_image(self, source: Map) -> bool:
        return self.image and any(segment.buffer == 0 for segment in source.segments)

    def _stored(self, value: int, name: str = "norm") -> Map:
        """Where a value lies; calculates it where nobody has."""
        found = self.values[value]
        if isinstance(found, Map):
            return found
        source = found.source
        if self._reads_image(source):
            raise UnsupportedModule(f"{name} reads the images, as no convolution does before it")
        target = self._write(value, name, source.channels, source.size)
        first = 0
        for read, written in pairs(source, target):
            affine = found.affine
            if affine is not None:
                affine = affine.part(first, first + read.channels)
            self.emit.pointwise(
                name,
                (read,),
                written,
                source.pixels,
                affine=affine,
                activation=found.activation,
                slope=found.slope,
            )
            first += read.channels
        self.values[value] = target
        return target

    def _alias(self, node: Node) -> None:
        """Makes a node's output another name of its input."""
        self.values[node.output] = self.values[node.input]
        if node.input in self.flat:
            self.flat.add(node.output)

    def _flatten(self, node: Flatten) -> None:
        source = self._stored(node.input)
        if source.size != (1, 1):
            size = f"{source.height}x{source.width}"
            raise UnsupportedModule(f"{node.name} flattens a map of {size}, expected 1x1")
        self.values[node.output] = source
        self.flat.add(node.output)

    def _pad(self, node: Pad) -> None:
        """Zeros, which belong to the windows of the convolutions behind it."""
        readers = self.graph.readers[node.output]
        if node.output in self.graph.outputs or not all(
            isinstance(reader, Conv | Pad) for reader in readers
        ):
            raise UnsupportedModule(f"{node.name} pads what is not only convolved")
        self.values[node.output] = self.values[node.input]
        before, after = self.pads.get(node.input, ((0, 0), (0, 0)))
        self.pads[node.output] = (
            (before[0] + node.before[0], before[1] + node.before[1]),
            (after[0] + node.after[0], after[1] + node.after[1]),
        )

    def _slice(self, node: Slice) -> None:
        self.values[node.output] = self.values[node.input].part(node.begin, node.end)
        if node.input in self.flat:
            self.flat.add(node.output)

    def _concat(self, node: Concat) -> None:
        parts = [self._stored(value) for value in node.inputs]
        if any(map(self._reads_image, parts)):
            raise UnsupportedModule(f"{node.name} does not follow a convolution or a pool")
        sizes = {part.size for part in parts}
        if len(sizes) != 1:
            raise UnsupportedModule(f"{node.name} concatenates maps of sizes {sorted(sizes)}")
        if any(value in self.flat for value in node.inputs):
            self.flat.add(node.output)
        segments = [segment for part in parts for segment in part.segments]
        growing = {
            self.block_buffers[index]
            for index, block in enumerate(self.blocks)
            if block.growing and index in self.block_buffers
        }
        self.values[node.output] = Map(joined(segments, growing), parts[0].height, parts[0].width)

    def _add(self, node: Add) -> None:
        parts = [self._stored(value) for value in node.inputs]
        if any(map(self._reads_image, parts)):
            raise UnsupportedModule(f"{node.name} adds the images themselves")
        if len({(part.channels, *part.size) for part in parts}) != 1:
            raise UnsupportedModule(f"{node.name} adds maps of different shapes")
        last, affine, activation = self._epilogue(node.output, None)
        if node.inputs[0] in self.flat:
            self.flat |= {node.output, last}
        target = self._write(last, node.name, parts[0].channels, parts[0].size)
        self.values[last] = target
        first = 0
        for *read, written in pairs(*parts, target):
            self.emit.pointwise(
                node.name,
                tuple(read),
                written,
                target.pixels,
                affine=None if affine is None else affine.part(first, first + written.channels),
                activation=None if activation is None else activation.kind,
                slope=0.0 if activation is None else activation.slope,
            )
            first += written.channels

    def _epilogue(
        self, value: int, affine: Affine | None
    ) -> tuple[int, Affine | None, Activate | None]:
        """The norms and the activation that alone follow a value, and the value behind them."""
        reader = self.graph.sole_reader(value)
        while isinstance(reader, Norm):
            self.graph.check(reader)
            following = self._affine(reader)
            affine = following if affine is None else affine.then(following)
            value = reader.output
            self.done.add(value)
            reader = self.graph.sole_reader(value)
        if not isinstance(reader, Activate):
            return value, affine, None
        _check_activation(reader)
        self.done.add(reader.output)
        return reader.output, affine, reader

    def _conv(self, node: Conv) -> None:
        """A convolution, with the norms, the activation or the pool behind it."""
        conv = node.module
        window = self._window(node)
        reader = self.graph.sole_reader(node.output)
        if self._pools_before(node, window, reader):
            self._pooled_conv(node, cast(PoolNode, reader))
            return
        weight, bias = self._double(conv.weight), self._optional(conv.bias)
        last, affine, activation = self._epilogue(node.output, None)
        weight, bias = folded(weight, bias, affine)
        source, prologue = self._source(node.input, conv.groups)
        target = self._write(last, node.unit, conv.out_channels, self._sized(source, window, node))
        self.values[last] = target
        self._convs(node, window, source, target, weight, bias, prologue, activation)

    def _convs(
        self,
        node: Conv,
        window: Window,
        source: Map,
        target: Map,
        weight: Tensor,
        bias: Tensor | None,
        prologue: Pending | None,
        activation: Activate | None,
    ) -> None:
        """The steps of a convolution: one, or one for each group or segment of channels."""
        groups = node.module.groups
        if groups == 1:
            self.emit.convolve(node, window, source, target, weight, bias, prologue, activation)
            return
        if self._reads_image(source):
            raise UnsupportedModule(f"{node.name} reads the images in {groups} groups")
        bounds = bounds_of(source) if node.depthwise else _groups(node, source.channels)
        ratio = target.channels // source.channels if node.depthwise else 1
        outputs = bounds if node.depthwise else _even(target.channels, groups)
        for (begin, end), (first, last) in zip(spans(bounds), spans(outputs), strict=True):
            self.emit.convolve(
                node,
                window,
                source.part(begin, end),
                target.part(first * ratio, last * ratio),
                weight[first:last],
                None if bias is None else bias[first:last],
                None,
                activation,
                groups=end - begin if node.depthwise else 1,
            )

    def _conv_transpose(self, node: ConvTranspose) -> None:
        """As many convolutions as there are pixels of the output to one of the input."""
        conv = node.module
        source = self._stored(node.input)
        if self._reads_image(source):
            raise UnsupportedModule(f"{node.name} reads the images themselves")
        size, phases = of_transposed_convolution(conv, node.name, source.size)
        inputs, outputs = (
            _groups(node, channels) for channels in (conv.in_channels, conv.out_channels)
        )
        weight = self._double(conv.weight)
        weight = torch.cat([weight[begin:end].transpose(0, 1) for begin, end in spans(inputs)])
        last, affine, activation = self._epilogue(node.output, None)
        weight, bias = folded(weight, self._optional(conv.bias), affine)
        target = self._write(last, node.name, conv.out_channels, size)
        self.values[last] = target
        for (begin, end), (first, behind) in zip(spans(inputs), spans(outputs), strict=True):
            self.emit.convolve_transposed(
                node,
                phases,
                source.part(begin, end),
                target.part(first, behind),
                weight[first:behind],
                None if bias is None else bias[first:behind],
                activation,
            )

    def _window(self, node: Conv) -> Window:
        window = of_convolution(node.module, node.name)
        return window.padded(*self.pads[node.input]) if node.input in self.pads else window

    def _pools_before(self, node: Conv, window: Window, reader: Node | None) -> bool:
        """Whether the average behind a convolution of single pixels can come before it."""
        if not isinstance(reader, PoolNode) or not reader.average:
            return False
        pool = of_pool(reader.module, reader.name)
        return (
            node.module.groups == 1
            and (window.kernel, window.stride) == ((1, 1), (1, 1))
            and (window.padding, window.end) == ((0, 0), (0, 0))
            and (pool.padding, pool.ceil) == ((0, 0), False)
            and cast(nn.AvgPool2d, reader.module).divisor_override is None
            and not self._reads_image(self._unread(node.input))
        )

    def _unread(self, value: int) -> Map:
        found = self.values[value]
        return found if isinstance(found, Map) else found.source

    def _pooled_conv(self, node: Conv, pool: PoolNode) -> None:
        source, prologue = self._source(node.input, 1)
        window = of_pool(pool.module, pool.name)
        pooled = self._write(None, pool.name, source.channels, self._sized(source, window, pool))
        self._pools(pool, window, source, pooled, prologue)
        self.done.add(pool.output)
        out = self._write(pool.output, node.unit, node.module.out_channels, pooled.size)
        self.values[pool.output] = out
        self.emit.convolve(
            node,
            self._window(node),
            pooled,
            out,
            self._double(node.module.weight),
            self._optional(node.module.bias),
            None,
            None,
            name=node.name,
            module_pixels=source.pixels,
        )

    def _pool(self, node: PoolNode) -> None:
        window = of_pool(node.module, node.name)
        if node.average:
            source, prologue = self._source(node.input, 1)
        else:
            source, prologue = self._stored(node.input), None
        if self._reads_image(source):
            raise UnsupportedModule(f"{node.name} pools the images themselves")
        size = self._sized(source, window, node)
        target = self._write(node.output, node.name, source.channels, size)
        self.values[node.output] = target
        self._pools(node, window, source, target, prologue)

    def _pools(
        self,
        node: PoolNode,
        window: Window,
        source: Map,
        target: Map,
        prologue: Pending | None,
    ) -> None:
        divisor = None
        if node.average:
            module = cast(nn.AvgPool2d, node.module)
            if module.divisor_override is not None:
                divisor = module.divisor_override
            elif module.count_include_pad and window.padding != (0, 0):
                divisor = 0
        self.emit.pool(
            node.name,
            window,
            source,
            target,
            prologue,
            average=node.average,
            divisor=divisor,
        )

    def _resize(self, node: ResizeNode) -> None:
        source = self._stored(node.input)
        if self._reads_image(source):
            raise UnsupportedModule(f"{node.name} resizes the images themselves")
        if len(node.inputs) > 1:
            size = self._unread(node.inputs[1]).size
        elif node.size is not None:
            size = node.size
        else:
            assert node.factors is not None
            size = (
                int(source.height * node.factors[0]),
                int(source.width * node.factors[1]),
            )
        if min(size) < 1:
            raise UnsupportedModule(f"{node.name} makes a map of {size}")
        factors = None if node.recompute or len(node.inputs) > 1 else node.factors
        down, right = (
            _resize_scale(node, axis, source.size[axis], size[axis], factors) for axis in (0, 1)
        )
        target = self._write(node.output, node.name, source.channels, size)
        self.values[node.output] = target
        for read, written in pairs(source, target):
            self.emit.steps.append(
                Resize(
                    name=node.name,
                    input=read,
                    output=written,
                    mode=node.mode,
                    align_corners=node.align_corners,
                    scale=(down, right),
                    input_pixels=source.pixels,
                    output_pixels=target.pixels,
                    batch=self.batch,
                )
            )

    def _mean(self, node: Mean) -> None:
        """The mean of whole maps, as a head where a classifier or the end follows."""
        source, prologue = self._source(node.input, 1)
        if self._reads_image(source):
            raise UnsupportedModule(f"{node.name} averages the images themselves")
        flatten = self.graph.sole_reader(node.output)
        if isinstance(flatten, Flatten) and len(source.segments) == 1:
            linear = self.graph.sole_reader(flatten.output)
            ends = not self.graph.readers[flatten.output]
            following = None if linear is None else self.graph.sole_reader(linear.output)
            if ends or (isinstance(linear, Linear) and not isinstance(following, Activate | Norm)):
                self._head(node, flatten, cast("Linear | None", linear), source, prologue)
                return
        window = Window(source.size, (1, 1), (0, 0), (0, 0))
        target = self._write(node.output, node.name, source.channels, (1, 1))
        self.values[node.output] = target
        self.emit.pool(node.name, window, source, target, prologue, average=True)

    def _head(
        self,
        node: Mean,
        flatten: Flatten,
        linear: Linear | None,
        source: Map,
        prologue: Pending | None,
    ) -> None:
        last: Node = flatten
        weight = bias = None
        channels = source.channels
        if linear is not None:
            self.graph.check(linear)
            last, module = linear, linear.module
            channels = module.weight.shape[0]
            weight = single(self._double(module.weight))
            bias = None if module.bias is None else single(self._double(module.bias))
        self.done |= {flatten.output, last.output}
        target = self._write(last.output, node.name, channels, (1, 1))
        self.values[last.output] = target
        self.flat.add(last.output)
        self.emit.steps.append(
            Head(
                name=node.name,
                input=source.segments[0],
                output=target.segments[0],
                weight=weight,
                bias=bias,
                input_pixels=source.pixels,
                batch=self.batch,
                prologue=self.emit.prologue(prologue),
            )
        )

    def _linear(self, node: Linear) -> None:
        """A linear layer of what is flat: a convolution of one pixel."""
        if node.input not in self.flat:
            raise UnsupportedModule(f"{node.name} is a Linear on its own")
        source, prologue = self._source(node.input, 1)
        weight = self._double(node.module.weight)[:, :, None, None]
        last, affine, activation = self._epilogue(node.output, None)
        weight, bias = folded(weight, self._optional(node.module.bias), affine)
        target = self._write(last, node.name, weight.shape[0], (1, 1))
        self.values[last] = target
        self.flat |= {node.output, last}
        window = Window((1, 1), (1, 1), (0, 0), (0, 0))
        self.emit.convolve(node, window, source, target, weight, bias, prologue, activation)

    # Parts of those.

    def _source(self, value: int, groups: int) -> tuple[Map, Pending | None]:
        """What a node reads, and what it has to calculate of it."""
        found = self.values[value]
        if isinstance(found, Map):
            return found, None
        if groups > 1 or found.activation not in (None, *EPILOGUES):
            return self._stored(value), None
        return found.source, found

    def _sized(self, source: Map, window: Window, node: Node) -> tuple[int, int]:
        size = window.size(*source.size)
        if min(size) < 1:
            shown = f"{source.height}x{source.width}"
            raise UnsupportedModule(f"{node.name} makes nothing of a map of {shown}")
        return size

    def _write(self, value: int | None, name: str, channels: int, size: tuple[int, int]) -> Map:
        """Gives a value its place: a slot of a block's buffer, or a buffer of its own."""
        height, width = size
        slot = None if value is None else self.slots.get(value)
        if slot is None:
            return self.emit.map(name, channels, size)
        block = self.blocks[slot.block]
        buffer = self.block_buffers.get(slot.block)
        if buffer is None:
            self.emit.buffers.append(Buffer(height, width, block.channels, block.name))
            buffer = self.block_buffers[slot.block] = len(self.emit.buffers) - 1
        there = self.emit.buffers[buffer]
        if (there.height, there.width) != size:
            sizes = sorted({(there.height, there.width), size})
            raise UnsupportedModule(f"{block.name} concatenates maps of sizes {sizes}")
        return Map((Segment(buffer, slot.channel, channels),), height, width)

    def _double(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.float64)

    def _optional(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._double(tensor)

    def _affine(self, node: Norm) -> Affine:
        return of_norm(node.module, node.name, self._double)

    _handlers: dict[type[Node], Callable[[_Fusion, Any], None]] = {  # noqa: RUF012
        Activate: _activate,
        Add: _add,
        Concat: _concat,
        Conv: _conv,
        ConvTranspose: _conv_transpose,
        Dropout: _alias,
        Flatten: _flatten,
        Linear: _linear,
        Mean: _mean,
        Norm: _norm,
        Pad: _pad,
        PoolNode: _pool,
        ResizeNode: _resize,
        Slice: _slice,
    }


def reads_image(graph: Graph) -> bool:
    """Whether the first input of a graph may be given in any strides: convolutions alone read it.

    Args:
        graph: The graph.
    """
    image = graph.inputs[0]
    readers = graph.readers[image]
    return (
        bool(readers)
        and image not in graph.outputs
        and all(
            isinstance(reader, Conv)
            and reader.module.groups == 1
            and reader.module.dilation in (1, (1, 1))
            for reader in readers
        )
    )


def _fixed(graph: Graph) -> set[int]:
    """Values that nobody writes anew: inputs, parts and other names of values."""
    return set(graph.inputs) | {
        node.output for node in graph.nodes if isinstance(node, Slice | Dropout | Flatten | Pad)
    }


def _at(node: Node, error: UnsupportedModule) -> UnsupportedModule:
    if error.value is None:
        error.value = node.output
    return error


def _check_activation(node: Activate) -> None:
    if node.kind not in ACTIVATIONS:
        raise UnsupportedModule(
            f"{node.name} has activation {node.kind!r}, which no engine computes"
        )


def _groups(node: Conv | ConvTranspose, channels: int) -> list[int]:
    """Where the groups of some channels begin, and the last one ends."""
    groups = node.module.groups
    if groups > _MOST_GROUPS:
        raise UnsupportedModule(f"{node.name} has {groups} groups, expected {_MOST_GROUPS}")
    return _even(channels, groups)


def _even(channels: int, parts: int) -> list[int]:
    return [channels // parts * part for part in range(parts + 1)]


def _resize_scale(
    node: ResizeNode, axis: int, size: int, out_size: int, factors: tuple[float, float] | None
) -> float:
    """Pixels of the input to one of the output, in one direction, as PyTorch has them."""
    if node.mode == "bilinear" and node.align_corners:
        return (size - 1) / (out_size - 1) if out_size > 1 else 0.0
    return size / out_size if factors is None else 1 / factors[axis]
