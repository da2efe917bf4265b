"""The intermediate representation: buffers, segments and five kinds of steps.

A buffer holds the features of one block in NHWC. A concatenation is not a step: its parts are
written side by side, or read as several segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "Buffer",
    "FusedConv",
    "Head",
    "Plan",
    "Pointwise",
    "Pool",
    "Prologue",
    "Resize",
    "Segment",
    "Step",
    "table",
]

FLOAT_BYTES = 4
_MEGA = 1e6


@dataclass(frozen=True)
class Buffer:
    """A map of features, ``[N, height, width, channels]``.

    Attributes:
        height: Rows.
        width: Columns.
        channels: Channels, with the padding between slots that some buffers have.
        name: For people; the module whose features it holds.
        pitch: Elements between neighbouring pixels, of an input that is given in NHWC; None leaves
            it to :func:`.memory.plan_memory`.
    """

    height: int
    width: int
    channels: int
    name: str
    pitch: int | None = None

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.height * self.width


@dataclass(frozen=True)
class Segment:
    """Channels ``[channel, channel + channels)`` of the buffer with index ``buffer``."""

    buffer: int
    channel: int
    channels: int


@dataclass(frozen=True)
class Prologue:
    """``act(x * scale + shift)`` for every input channel, applied before the padding.

    Attributes:
        scale: ``[Ci]``.
        shift: ``[Ci]``.
        activation: ``"relu"``, ``"relu6"`` or None.
    """

    scale: Tensor
    shift: Tensor
    activation: str | None = "relu"


@dataclass(frozen=True)
class FusedConv:
    """Concatenate, normalise, convolve, activate: ``act(conv(prologue(cat(inputs))) + bias)``.

    A depthwise convolution has one input, no prologue, and as many groups as channels.

    Attributes:
        name: The module it comes from.
        inputs: What the convolution reads, in the order of the weight's input channels.
        output: Where it writes.
        weight: ``[Co, Ci / groups, kh, kw]``, with any following BatchNorm folded in.
        bias: ``[Co]`` or None.
        prologue: BatchNorm and ReLU of the inputs, or None.
        stride: Steps of the window, down and to the right.
        padding: Zeros above and to the left of the (normalised) input; the size of the output says
            how many there are below and to the right.
        activation: ``"relu"``, ``"relu6"`` or None.
        input_pixels: Pixels of the input of one image.
        output_pixels: Pixels that it writes of one image.
        valid_taps: Sum over output pixels of the taps that do not fall on padding.
        batch: Images.
        groups: 1, or the number of channels.
        module_pixels: Output pixels of the module's convolution where they are more, because the
            plan pools before it and the module behind it; else None.
        dilation: Distances of the window's taps, down and to the right.
        output_stride: Distances of the pixels that it writes, down and to the right; of a
            transposed convolution, which is as many convolutions as there are pixels in between.
        output_start: Row and column of the first of them.
    """

    name: str
    inputs: tuple[Segment, ...]
    output: Segment
    weight: Tensor
    bias: Tensor | None
    prologue: Prologue | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    activation: str | None
    input_pixels: int
    output_pixels: int
    valid_taps: int
    batch: int
    groups: int = 1
    module_pixels: int | None = None
    dilation: tuple[int, int] = (1, 1)
    output_stride: tuple[int, int] = (1, 1)
    output_start: tuple[int, int] = (0, 0)

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the window."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def input_channels(self) -> int:
        """Channels of the concatenation."""
        return sum(segment.channels for segment in self.inputs)

    @property
    def macs(self) -> int:
        """Multiply-adds of the module as usually counted, with those on padding."""
        pixels = self.output_pixels if self.module_pixels is None else self.module_pixels
        return self.batch * pixels * self.kernel[0] * self.kernel[1] * self._channel_pairs

    @property
    def valid_macs(self) -> int:
        """Multiply-adds that are needed: off the padding, of pixels that are not pooled."""
        return self.batch * self.valid_taps * self._channel_pairs

    @property
    def _channel_pairs(self) -> int:
        return self.input_channels // self.groups * self.output.channels

    @property
    def parameters(self) -> int:
        """Elements of the weight, bias and prologue."""
        count = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return count + (0 if self.prologue is None else 2 * self.prologue.scale.numel())

    @property
    def bytes_fused(self) -> int:
        """Bytes of features and weights that the fused step reads and writes, once each."""
        reads = self.input_pixels * self.input_channels
        writes = self.output_pixels * self.output.channels
        return FLOAT_BYTES * (self.batch * (reads + writes) + self.parameters)

    @property
    def bytes_unfused(self) -> int:
        """The same where concatenation, BatchNorm, ReLU and convolution are passes of their own.

        Each pass reads its input and writes its output; ReLU is counted as in place, and a
        concatenation of one part as nothing.
        """
        reads = self.input_pixels * self.input_channels
        writes = self.output_pixels * self.output.channels
        passes = 2 * reads if len(self.inputs) > 1 else 0
        passes += 4 * reads if self.prologue is not None else 0
        passes += 2 * writes if self.bias is not None else 0
        passes += 2 * writes if self.activation is not None else 0
        return self.bytes_fused + FLOAT_BYTES * self.batch * passes

    def describe(self) -> str:
        """One line: the operation, its window and what is fused into it."""
        parts = _described(self.prologue)
        if len(self.inputs) > 1:
            parts.insert(0, f"cat{len(self.inputs)}")
        depthwise = "dw" if self.groups > 1 else ""
        parts.append(f"{depthwise}conv{self.kernel[0]}x{self.kernel[1]}")
        if self.stride != (1, 1):
            parts[-1] += f"/{_pair(self.stride)}"
        if self.dilation != (1, 1):
            parts[-1] += f" dilated {_pair(self.dilation)}"
        if self.output_stride != (1, 1):
            row, column = self.output_start
            parts[-1] += f" to every {_pair(self.output_stride)} from {row},{column}"
        parts += ["bias"] if self.bias is not None else []
        parts += [self.activation] if self.activation is not None else []
        return " ".join(parts)


@dataclass(frozen=True)
class Pool:
    """Maximum or average over windows, of which an average may normalise its inputs first.

    Attributes:
        name: The module it comes from.
        input: What it reads.
        output: Where it writes; as many channels.
        kernel: Height and width of the window.
        stride: Steps of the window, down and to the right.
        padding: Pixels above and to the left of the input, never chosen, and zeros of an average;
            the size of the output says how many there are below and to the right.
        average: Average instead of maximum.
        input_pixels: Pixels of the input of one image.
        output_pixels: Pixels of the output of one image.
        batch: Images.
        prologue: BatchNorm and ReLU of the inputs of an average, or None.
        divisor: What an average divides its sum by. None: by the pixels of the window that lie on
            the map. 0: by those that lie on the map or its padding, of as many pixels below and to
            the right as above and to the left. Otherwise by this.
    """

    name: str
    input: Segment
    output: Segment
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    average: bool
    input_pixels: int
    output_pixels: int
    batch: int
    prologue: Prologue | None = None
    divisor: int | None = None

    macs = 0
    valid_macs = 0

    @property
    def parameters(self) -> int:
        """Elements of the prologue."""
        return 0 if self.prologue is None else 2 * self.prologue.scale.numel()

    @property
    def inputs(self) -> tuple[Segment, ...]:
        """The input, as for the other steps."""
        return (self.input,)

    @property
    def bytes_fused(self) -> int:
        """Bytes of features read and written, and of the prologue."""
        pixels = self.input_pixels + self.output_pixels
        return FLOAT_BYTES * (self.batch * pixels * self.input.channels + self.parameters)

    @property
    def bytes_unfused(self) -> int:
        """The same where BatchNorm and ReLU are passes of their own."""
        passes = 0 if self.prologue is None else 4 * self.input_pixels * self.input.channels
        return self.bytes_fused + FLOAT_BYTES * self.batch * passes

    def describe(self) -> str:
        """One line: the kind of pool, its window, and what is fused into it."""
        kind = "avgpool" if self.average else "maxpool"
        window = f"{kind}{self.kernel[0]}x{self.kernel[1]}/{_pair(self.stride)}"
        if self.kernel == (1, 1):
            return " ".join(_described(self.prologue)) or "copy"
        return " ".join([*_described(self.prologue), window])


@dataclass(frozen=True)
class Head:
    """Global average pooling, and a linear classifier where there is one.

    Attributes:
        name: The module it comes from.
        input: The last features.
        output: The logits, or the pooled features, in a 1x1 map.
        weight: ``[classes, C]`` or None.
        bias: ``[classes]`` or None.
        input_pixels: Pixels of the input of one image.
        batch: Images.
        prologue: BatchNorm and ReLU of the features, before pooling, or None.
    """

    name: str
    input: Segment
    output: Segment
    weight: Tensor | None
    bias: Tensor | None
    input_pixels: int
    batch: int
    prologue: Prologue | None = None

    @property
    def inputs(self) -> tuple[Segment, ...]:
        """The input, as for the other steps."""
        return (self.input,)

    @property
    def macs(self) -> int:
        """Multiply-adds of the classifier."""
        return 0 if self.weight is None else self.batch * self.weight.numel()

    @property
    def valid_macs(self) -> int:
        """Multiply-adds of the classifier."""
        return self.macs

    @property
    def parameters(self) -> int:
        """Elements of the weight, bias and prologue."""
        count = sum(t.numel() for t in (self.weight, self.bias) if t is not None)
        return count + (0 if self.prologue is None else 2 * self.prologue.scale.numel())

    @property
    def bytes_fused(self) -> int:
        """Bytes of features and weights read and written, once each."""
        features = self.input_pixels * self.input.channels + self.output.channels
        return FLOAT_BYTES * (self.batch * features + self.parameters)

    @property
    def bytes_unfused(self) -> int:
        """With the pooled features, and those normalised, written and read again in between."""
        between = 0 if self.weight is None else 2 * self.input.channels
        between += 0 if self.prologue is None else 4 * self.input_pixels * self.input.channels
        return self.bytes_fused + FLOAT_BYTES * self.batch * between

    def describe(self) -> str:
        """One line: what is fused into the average, the average, and the classifier."""
        parts = [*_described(self.prologue), "global avgpool"]
        return " ".join(parts + (["linear"] if self.weight is not None else []))


@dataclass(frozen=True)
class Pointwise:
    """``act(sum(inputs) * scale + shift)``, every pixel and channel on its own.

    Attributes:
        name: The module it comes from.
        inputs: Maps of as many channels, of which one may be the output itself.
        output: Where it writes.
        scale: ``[C]`` or None.
        shift: ``[C]`` where there is a scale.
        activation: One of :data:`.codes.ACTIVATIONS`, or None.
        slope: That of a leaky ReLU below zero.
        pixels: Of one image.
        batch: Images.
    """

    name: str
    inputs: tuple[Segment, ...]
    output: Segment
    scale: Tensor | None
    shift: Tensor | None
    activation: str | None
    pixels: int
    batch: int
    slope: float = 0.0

    macs = 0
    valid_macs = 0
    prologue = None

    @property
    def parameters(self) -> int:
        """Elements of scale and shift."""
        return sum(tensor.numel() for tensor in (self.scale, self.shift) if tensor is not None)

    @property
    def bytes_fused(self) -> int:
        """Bytes of features read and written, and of scale and shift."""
        maps = len(self.inputs) + 1
        return FLOAT_BYTES * (
            self.batch * self.pixels * maps * self.output.channels + self.parameters
        )

    @property
    def bytes_unfused(self) -> int:
        """The same where every sum, the normalisation and the activation are passes of their own.

        A sum reads two maps and writes one, the others are counted as in place.
        """
        maps = 3 * (len(self.inputs) - 1)
        maps += 2 * (self.scale is not None) + 2 * (self.activation is not None)
        elements = self.batch * self.pixels * self.output.channels * max(maps, 2)
        return FLOAT_BYTES * (elements + self.parameters)

    def describe(self) -> str:
        """One line: what is computed of every element."""
        parts = [f"add{len(self.inputs)}"] if len(self.inputs) > 1 else []
        parts += ["bn"] if self.scale is not None else []
        parts += [self.activation] if self.activation is not None else []
        return " ".join(parts) or "copy"


@dataclass(frozen=True)
class Resize:
    """A map of another size, each pixel one of the input's or interpolated of four.

    Output pixel ``i`` lies at ``s`` of the input, in each direction: ``i * scale`` for
    ``"nearest"``; ``(i + 0.5) * scale`` for ``"nearest-exact"``; for ``"bilinear"``
    ``(i + 0.5) * scale - 0.5``, at least 0, or ``i * scale`` with ``align_corners``. Rounded down
    and kept within the map, ``s`` is the pixel that the nearest ones take, and the first of the two
    between which bilinear interpolation weighs. All in float32, as in PyTorch, whose scale is 1
    where a size stays the same, but for ``"nearest-exact"``, and 1/2 where ``"nearest"`` doubles
    it.

    Attributes:
        name: The module it comes from.
        input: What it reads.
        output: Where it writes; as many channels.
        mode: ``"nearest"``, ``"nearest-exact"`` or ``"bilinear"``.
        align_corners: See above.
        scale: Pixels of the input to one of the output, down and to the right.
        input_pixels: Pixels of the input of one image.
        output_pixels: Pixels of the output of one image.
        batch: Images.
    """

    name: str
    input: Segment
    output: Segment
    mode: str
    align_corners: bool
    scale: tuple[float, float]
    input_pixels: int
    output_pixels: int
    batch: int

    macs = 0
    valid_macs = 0
    parameters = 0
    prologue = None

    @property
    def inputs(self) -> tuple[Segment, ...]:
        """The input, as for the other steps."""
        return (self.input,)

    @property
    def bytes_fused(self) -> int:
        """Bytes of features read and written."""
        pixels = self.input_pixels + self.output_pixels
        return FLOAT_BYTES * self.batch * pixels * self.input.channels

    @property
    def bytes_unfused(self) -> int:
        """As many."""
        return self.bytes_fused

    def describe(self) -> str:
        """One line: the kind of interpolation."""
        return f"{self.mode} resize" + (" aligned" if self.align_corners else "")


Step = FusedConv | Pool | Head | Pointwise | Resize


@dataclass(frozen=True)
class Plan:
    """A network for one input shape.

    Attributes:
        input_shape: ``(N, C, H, W)``.
        buffers: All buffers; the first is the network's input, the last its output.
        steps: What to do, in order.
        flat_output: Whether the result is ``[N, channels]`` rather than ``[N, C, H, W]``.
        inputs: Buffers that are given. The first may be in any strides and is read by convolutions
            without prologue alone, where ``image``; any other is given in NHWC, with the buffer's
            pitch.
        image: See above.
        outputs: What is returned, of buffers that are given to nobody else; None for all of the
            last one.
        flat_outputs: Of each of them whether it is returned as ``[N, channels]``.
    """

    input_shape: tuple[int, int, int, int]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    flat_output: bool
    inputs: tuple[int, ...] = (0,)
    image: bool = True
    outputs: tuple[Segment, ...] | None = None
    flat_outputs: tuple[bool, ...] = ()

    @property
    def input(self) -> Buffer:
        """The network's input."""
        return self.buffers[0]

    @property
    def output(self) -> Buffer:
        """The network's output."""
        return self.buffers[-1]

    @property
    def classic(self) -> bool:
        """Whether it is that of a network: an image in any strides, and all of the last buffer."""
        return self.inputs == (0,) and self.image and self.outputs is None

    @property
    def returned(self) -> tuple[Segment, ...]:
        """What is returned."""
        if self.outputs is not None:
            return self.outputs
        return (Segment(len(self.buffers) - 1, 0, self.output.channels),)

    @property
    def output_buffers(self) -> tuple[int, ...]:
        """Buffers of which something is returned, in the order in which it is."""
        return tuple(dict.fromkeys(segment.buffer for segment in self.returned))

    @property
    def macs(self) -> int:
        """Multiply-adds of the network as usually counted, with those on padding."""
        return sum(step.macs for step in self.steps)

    @property
    def valid_macs(self) -> int:
        """Multiply-adds of all steps that are needed."""
        return sum(step.valid_macs for step in self.steps)

    @property
    def parameters(self) -> int:
        """Elements of all folded weights."""
        return sum(step.parameters for step in self.steps)

    def weights(self) -> list[Tensor]:
        """All weights in the order in which :func:`serialize` numbers them."""
        tensors: list[Tensor | None] = []
        for step in self.steps:
            prologue = [] if step.prologue is None else [step.prologue.scale, step.prologue.shift]
            if isinstance(step, FusedConv):
                tensors += [step.weight, step.bias, *prologue]
            elif isinstance(step, Head):
                tensors += [*prologue, step.weight, step.bias]
            elif isinstance(step, Pointwise):
                tensors += [step.scale, step.shift]
            else:
                tensors += prologue
        return [tensor for tensor in tensors if tensor is not None]

    def __str__(self) -> str:
        """A table of the steps."""
        return table(self)


def _pair(values: tuple[int, int]) -> str:
    """Two numbers, or the one that they are."""
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


def _described(prologue: Prologue | None) -> list[str]:
    if prologue is None:
        return []
    return ["bn" if prologue.activation is None else f"bn-{prologue.activation}"]


def table(plan: Plan, algorithms: tuple[str | None, ...] = ()) -> str:
    """A plan as text: a row for each step.

    Args:
        plan: The plan.
        algorithms: One text a step, or nothing.
    """
    header = ("step", "module", "operation", "in", "out", "map", "MMAC", "algorithm")
    rows = [header]
    for index, step in enumerate(plan.steps):
        buffer = plan.buffers[step.output.buffer]
        rows.append(
            (
                str(index),
                step.name,
                step.describe(),
                "+".join(str(segment.channels) for segment in step.inputs),
                str(step.output.channels),
                f"{buffer.height}x{buffer.width}",
                f"{step.macs / _MEGA:.2f}",
                (algorithms[index] if algorithms else None) or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    shape = " x ".join(map(str, plan.input_shape))
    total = (
        f"{len(plan.steps)} steps for input {shape}: {plan.macs / _MEGA:.1f} MMAC, "
        f"{plan.valid_macs / _MEGA:.1f} of them needed"
    )
    return "\n".join([*lines, total])
