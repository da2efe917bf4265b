"""Lowering: from modules and an input shape to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..models.threshnet import ThreshNet
from ..nn import ConvBNReLU, DenseLayer, HarmonicBlock
from .ir import Buffer, FusedConv, Head, Plan, Pool, Prologue, Segment, Step

__all__ = ["UnsupportedModule", "lower"]

# Slots of a block's buffer start at multiples of a cache line of fp32.
_SLOT = 16


class UnsupportedModule(ValueError):
    """A module, or a setting of it, that plans cannot express."""


@dataclass(frozen=True)
class _Features:
    """What the next module reads: segments of equal size."""

    segments: tuple[Segment, ...]
    height: int
    width: int

    @property
    def channels(self) -> int:
        return sum(segment.channels for segment in self.segments)


def lower(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    head: bool = True,
    fold: bool = True,
) -> Plan:
    """Lowers a network in evaluation mode.

    BatchNorm after a convolution is folded into its weight and bias, in float64; BatchNorm and ReLU
    before a convolution become its prologue. The weights are new tensors: the plan does not follow
    later changes of the module.

    Args:
        module: A :class:`threshnet_fast.ThreshNet`.
        input_shape: ``(N, C, H, W)`` of the input.
        head: Whether to end with the logits rather than with the last features.
        fold: Whether to calculate the weights; without, they are tensors on the meta device, which
            have a shape but no values, and lowering takes little time.

    Returns:
        The plan.

    Raises:
        UnsupportedModule: ``module``, or a part of it, is none that can be lowered.
        ValueError: ``input_shape`` is not one that the module takes.
    """
    _require(module, ThreshNet, "module", "forward", "forward_features", "forward_head")
    assert isinstance(module, ThreshNet)
    shape = tuple(int(size) for size in input_shape)
    if len(shape) != 4 or min(shape) < 1 or shape[1] != module.in_chans:
        raise ValueError(
            f"input_shape is {shape}: expected (N, {module.in_chans}, height, width), all positive"
        )
    if min(shape[2:]) < module.min_size:
        raise ValueError(
            f"input_shape is {shape}: expected a height and width of at least {module.min_size}"
        )
    lowering = _Lowering(shape, fold)
    with torch.no_grad():
        return lowering.network(module, head)


class _Lowering:
    def __init__(self, input_shape: tuple[int, int, int, int], fold: bool) -> None:
        self.input_shape = input_shape
        self.device = None if fold else torch.device("meta")
        self.batch, channels, height, width = input_shape
        self.buffers = [Buffer(height, width, channels, "input")]
        self.steps: list[Step] = []
        self.features = _Features((Segment(0, 0, channels),), height, width)

    def network(self, model: ThreshNet, head: bool) -> Plan:
        modules = list(model.base)
        body, tail = modules[:-1], cast(nn.Sequential, modules[-1])
        position = 0
        while position < len(body):
            position += self._entry(body, position)
        pooled = isinstance(tail[0], nn.AdaptiveAvgPool2d)
        if head and pooled:
            self._head(tail, f"base.{len(body)}")
        return self._finish(flat=head and pooled)

    def _entry(self, body: list[nn.Module], position: int) -> int:
        """Lowers the entry at a position, and those fused with it; returns how many."""
        module, name = body[position], f"base.{position}"
        if isinstance(module, DenseLayer):
            layers = [module]
            for other in body[position + 1 :]:
                if not isinstance(other, DenseLayer):
                    break
                layers.append(other)
            for index, layer in enumerate(layers, start=position):
                _require(layer, DenseLayer, f"base.{index}", "forward")
            self._dense_block(layers, position)
            return len(layers)
        if isinstance(module, HarmonicBlock):
            _require(module, HarmonicBlock, name, "forward")
            self._harmonic_block(module, name)
        elif isinstance(module, ConvBNReLU):
            self._conv_bn_relu(module, name, None)
        elif isinstance(module, nn.MaxPool2d):
            _require(module, nn.MaxPool2d, name, "forward")
            self._max_pool(module, name)
        else:
            raise UnsupportedModule(f"{name} is a {type(module).__name__}, which has no lowering")
        return 1

    def _buffer(self, height: int, width: int, channels: int, name: str) -> int:
        self.buffers.append(Buffer(height, width, channels, name))
        return len(self.buffers) - 1

    def _dense_block(self, layers: list[DenseLayer], position: int) -> None:
        height, width = self.features.height, self.features.width
        start = self.features.channels
        slot = self._move_into_block(layers[-1].out_channels, f"base.{position}", start)
        if start != layers[0].conv1.in_channels:
            raise UnsupportedModule(
                f"base.{position} reads {layers[0].conv1.in_channels} channels, not {start}"
            )
        written = start
        for index, layer in enumerate(layers):
            name = f"base.{position + index}"
            growth = layer.conv2.out_channels
            _require_plain(layer.conv1, f"{name}.conv1", 1)
            _require_plain(layer.conv2, f"{name}.conv2", 3)
            scale, shift = self._fold(layer.norm1, f"{name}.norm1")
            middle_scale, middle_shift = self._fold(layer.norm2, f"{name}.norm2")
            width_1x1 = layer.conv1.out_channels
            bottleneck = self._buffer(height, width, width_1x1, f"{name}.conv1")
            self._conv(
                f"{name}.conv1",
                (Segment(slot, 0, written),),
                Segment(bottleneck, 0, width_1x1),
                self._scaled(layer.conv1.weight, middle_scale),
                middle_shift,
                prologue=(scale, shift),
                relu=True,
            )
            self._conv(
                f"{name}.conv2",
                (Segment(bottleneck, 0, width_1x1),),
                Segment(slot, written, growth),
                self._double(layer.conv2.weight),
                None,
                padding=1,
            )
            written += growth
        self.features = _Features((Segment(slot, 0, written),), height, width)

    def _harmonic_block(self, block: HarmonicBlock, name: str) -> None:
        height, width = self.features.height, self.features.width
        offsets: list[int] = []
        end = 0
        for channels in block.channels:
            offsets.append(end)
            end += -(-channels // _SLOT) * _SLOT
        slot = self._move_into_block(end, name, self.features.channels)
        if self.features.channels != block.channels[0]:
            raise UnsupportedModule(
                f"{name} reads {block.channels[0]} channels, not {self.features.channels}"
            )
        segments = [
            Segment(slot, offset, channels)
            for offset, channels in zip(offsets, block.channels, strict=True)
        ]
        for index, layer in enumerate(block.layers, start=1):
            self.features = _Features(
                tuple(segments[link] for link in block.links[index]), height, width
            )
            self._conv_bn_relu(
                cast(ConvBNReLU, layer), f"{name}.layers.{index - 1}", segments[index]
            )
        self.features = _Features(
            tuple(segments[layer] for layer in block.out_layers), height, width
        )

    def _move_into_block(self, channels: int, name: str, start: int) -> int:
        """Makes the step that wrote the features write them into a block's first slot instead."""
        features = self.features
        source = features.segments[0]
        if len(features.segments) != 1 or not self.steps or self.steps[-1].output != source:
            raise UnsupportedModule(f"{name} does not follow a convolution or a pool")
        old = self.buffers[source.buffer]
        self.buffers[source.buffer] = Buffer(old.height, old.width, channels, name)
        return source.buffer

    def _conv_bn_relu(self, module: ConvBNReLU, name: str, output: Segment | None) -> None:
        _require(module, ConvBNReLU, name, "forward")
        if module.activation != "relu":
            raise UnsupportedModule(f"{name} has activation {module.activation!r}, not 'relu'")
        conv = module.conv
        _require_plain(conv, f"{name}.conv", conv.kernel_size[0], stride=conv.stride[0])
        scale, shift = self._fold(module.norm, f"{name}.norm")
        padding, stride = cast("int", conv.padding[0]), conv.stride[0]
        height = _out_size(self.features.height, conv.kernel_size[0], stride, padding)
        width = _out_size(self.features.width, conv.kernel_size[1], stride, padding)
        if self.features.channels != conv.in_channels:
            raise UnsupportedModule(
                f"{name} reads {conv.in_channels} channels, not {self.features.channels}"
            )
        if output is None:
            buffer = self._buffer(height, width, conv.out_channels, name)
            output = Segment(buffer, 0, conv.out_channels)
        self._conv(
            name,
            self.features.segments,
            output,
            self._scaled(conv.weight, scale),
            shift,
            stride=stride,
            padding=padding,
            relu=True,
        )
        self.features = _Features((output,), height, width)

    def _conv(
        self,
        name: str,
        inputs: tuple[Segment, ...],
        output: Segment,
        weight: Tensor,
        bias: Tensor | None,
        *,
        prologue: tuple[Tensor, Tensor] | None = None,
        stride: int = 1,
        padding: int = 0,
        relu: bool = False,
    ) -> None:
        source, target = self.buffers[inputs[0].buffer], self.buffers[output.buffer]
        valid = _valid(source.height, target.height, weight.shape[2], stride, padding) * _valid(
            source.width, target.width, weight.shape[3], stride, padding
        )
        self.steps.append(
            FusedConv(
                name=name,
                inputs=inputs,
                output=output,
                weight=_single(weight),
                bias=None if bias is None else _single(bias),
                prologue=None if prologue is None else Prologue(*map(_single, prologue)),
                stride=stride,
                padding=padding,
                relu=relu,
                input_pixels=source.pixels,
                output_pixels=target.pixels,
                valid_taps=valid,
                batch=self.batch,
            )
        )

    def _double(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.float64)

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight with each output channel scaled, in float64."""
        doubled = self._double(weight)
        # Arithmetic on the meta device imports a compiler at its first use, which takes a second.
        return doubled if doubled.is_meta else doubled * scale[:, None, None, None]

    def _fold(self, norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        """The float64 scale and shift of a BatchNorm in evaluation mode."""
        _require(norm, nn.BatchNorm2d, name, "forward")
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.running_mean is None or norm.running_var is None:
            raise UnsupportedModule(f"{name} keeps no running statistics, so it cannot be folded")
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

    def _max_pool(self, pool: nn.MaxPool2d, name: str) -> None:
        kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
        if (
            not isinstance(kernel, int)
            or not isinstance(stride, int)
            or not isinstance(padding, int)
            or pool.dilation not in (1, (1, 1))
            or pool.ceil_mode
            or pool.return_indices
        ):
            raise UnsupportedModule(f"{name} is not a plain square max pooling")
        source = self.features.segments[0]
        if len(self.features.segments) != 1:
            raise UnsupportedModule(f"{name} pools a concatenation")
        height = _out_size(self.features.height, kernel, stride, padding)
        width = _out_size(self.features.width, kernel, stride, padding)
        buffer = self._buffer(height, width, source.channels, name)
        output = Segment(buffer, 0, source.channels)
        self.steps.append(
            Pool(
                name=name,
                input=source,
                output=output,
                kernel=(kernel, kernel),
                stride=stride,
                padding=padding,
                average=False,
                input_pixels=self.features.height * self.features.width,
                output_pixels=height * width,
                batch=self.batch,
            )
        )
        self.features = _Features((output,), height, width)

    def _head(self, tail: nn.Sequential, name: str) -> None:
        classifier = tail[2]
        source = self.features.segments[0]
        _require(tail, nn.Sequential, name, "forward")
        linear = classifier if isinstance(classifier, nn.Linear) else None
        _require(classifier, nn.Identity if linear is None else nn.Linear, f"{name}.2", "forward")
        if linear is not None and linear.in_features != source.channels:
            raise UnsupportedModule(
                f"{name}.2 reads {linear.in_features} features, not {source.channels}"
            )
        channels = source.channels if linear is None else linear.out_features
        output = Segment(self._buffer(1, 1, channels, name), 0, channels)
        self.steps.append(
            Head(
                name=name,
                input=source,
                output=output,
                weight=None if linear is None else _single(self._double(linear.weight)),
                bias=(
                    None
                    if linear is None or linear.bias is None
                    else _single(self._double(linear.bias))
                ),
                input_pixels=self.features.height * self.features.width,
                batch=self.batch,
            )
        )

    def _finish(self, flat: bool) -> Plan:
        last = self.steps[-1].output
        if last.channel != 0 or last.channels != self.buffers[last.buffer].channels:
            raise UnsupportedModule("the network ends inside a block")
        if last.buffer != len(self.buffers) - 1:
            raise UnsupportedModule("the network's last step does not write its last buffer")
        return Plan(self.input_shape, tuple(self.buffers), tuple(self.steps), flat)


def _out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _valid(size: int, out_size: int, kernel: int, stride: int, padding: int) -> int:
    """Sum over output positions of the taps that fall inside, in one direction."""
    starts = (position * stride - padding for position in range(out_size))
    return sum(min(start + kernel, size) - max(start, 0) for start in starts)


def _single(tensor: Tensor) -> Tensor:
    """A float32 copy that shares nothing with the module's tensor."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def _require(module: nn.Module, expected: type[nn.Module], name: str, *methods: str) -> None:
    """Refuses a module that does not run exactly as its class does."""
    if not isinstance(module, expected):
        raise UnsupportedModule(
            f"{name} is a {type(module).__name__}: expected a {expected.__name__}"
        )
    for method in methods:
        if method in module.__dict__ or getattr(type(module), method) is not getattr(
            expected, method
        ):
            raise UnsupportedModule(f"{name} has a {method} of its own")


def _require_plain(conv: nn.Module, name: str, kernel: int, stride: int = 1) -> None:
    _require(conv, nn.Conv2d, name, "forward")
    expected = {
        "kernel_size": (kernel, kernel),
        "stride": (stride, stride),
        "padding": (kernel // 2, kernel // 2),
        "dilation": (1, 1),
        "groups": 1,
        "bias": None,
        "padding_mode": "zeros",
    }
    for attribute, value in expected.items():
        actual = getattr(conv, attribute)
        if actual is not value and actual != value:
            raise UnsupportedModule(f"{name} has {attribute} {actual}, expected {value}")
