"""Lowering: from modules and an input shape to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
from .ir import Buffer, FusedConv, Head, Plan, Pool, Prologue, Segment, Step
from .settings import override

__all__ = ["UnsupportedModule", "lower"]

# Modules in the order in which they run, with their names.
_Modules = Sequence[tuple[str, nn.Module]]

# The modules of an average over whole maps, in order, with the settings that they must have.
_AVERAGE: tuple[tuple[type[nn.Module], dict[str, tuple[object, ...]]], ...] = (
    (nn.AdaptiveAvgPool2d, {"output_size": (1, (1, 1))}),
    (nn.Flatten, {"start_dim": (1,), "end_dim": (-1, 3)}),
)

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
    before a convolution or an average become its prologue. The average pooling of a transition
    comes before its 1x1 convolution rather than behind it, which is the same and multiplies a
    quarter as often. The weights are new tensors: the plan does not follow later changes of the
    module.

    Args:
        module: A model of this package.
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
    _require(module, Network, "module", "forward")
    assert isinstance(module, Network)
    method = module._overridden(head=True)
    if method is not None:
        raise UnsupportedModule(f"module has a {method} of its own")
    for name, container in module._containers():
        _require(container, nn.Sequential, name, "forward")
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
        # BatchNorm and ReLU that no step has taken in yet.
        self.prologue: Prologue | None = None

    def network(self, model: Network, head: bool) -> Plan:
        stages = model._stages()
        position = 0
        while position < len(stages):
            position += self._entry(stages[position:])
        pooled = head and _pools(model)
        if pooled:
            self._head(model)
        elif self.prologue is not None:
            self._normalise()
        if head and not pooled:
            name = model.default_cfg["classifier"]
            _require(model.get_classifier(), nn.Identity, name, "forward")
        return self._finish(flat=pooled)

    def _entry(self, stages: _Modules) -> int:
        """Lowers the first module, and those that are fused with it; returns how many."""
        name, module = stages[0]
        if self.prologue is not None:
            raise UnsupportedModule(f"{name} follows a BatchNorm and a ReLU that stand alone")
        if isinstance(module, (DenseLayer, PlainDenseLayer)):
            return self._dense_layers(stages)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            return self._conv_or_norm(stages)
        if isinstance(module, nn.Dropout):
            _require(module, nn.Dropout, name, "forward")
        elif isinstance(module, DenseBlock):
            _require(module, DenseBlock, name, "forward")
            layers = [(f"{name}.{child}", layer) for child, layer in module.named_children()]
            if not layers or self._dense_layers(layers) != len(layers):
                raise UnsupportedModule(f"{name} has something else than dense layers")
        elif isinstance(module, DenseTransition):
            self._transition(module, name)
        elif isinstance(module, HarmonicBlock):
            _require(module, HarmonicBlock, name, "forward")
            self._harmonic_block(module, name)
        elif isinstance(module, ConvBNReLU):
            self._conv_bn_relu(module, name, None)
        elif isinstance(module, DepthwiseConvBN):
            self._depthwise(module, name, None)
        elif isinstance(module, nn.MaxPool2d):
            _require(module, nn.MaxPool2d, name, "forward")
            self._max_pool(module, name)
        else:
            raise UnsupportedModule(f"{name} is a {type(module).__name__}, which has no lowering")
        return 1

    def _dense_layers(self, stages: _Modules) -> int:
        """Lowers the dense layers at the beginning as one block; returns how many."""
        layers = []
        for name, module in stages:
            if not isinstance(module, (DenseLayer, PlainDenseLayer)):
                break
            kind = DenseLayer if isinstance(module, DenseLayer) else PlainDenseLayer
            _require(module, kind, name, "forward")
            layers.append((name, module))
        if layers:
            self._dense_block(layers)
        return len(layers)

    def _conv_or_norm(self, stages: _Modules) -> int:
        """Lowers a convolution with the BatchNorm and ReLU behind it, or those two alone."""
        kinds = [type(module) for _, module in stages[:3]]
        if kinds[:2] == [nn.BatchNorm2d, nn.ReLU]:
            name, norm = stages[0]
            if len(self.features.segments) != 1:
                raise UnsupportedModule(f"{name} normalises a concatenation")
            scale, shift = self._fold(norm, name, self.features.channels)
            self.prologue = Prologue(_single(scale), _single(shift))
            _require(stages[1][1], nn.ReLU, stages[1][0], "forward")
            return 2
        name, conv = stages[0]
        _require(conv, nn.Conv2d, name, "forward")
        assert isinstance(conv, nn.Conv2d)
        if kinds[1:2] != [nn.BatchNorm2d]:
            self._convolution(conv, name, name, None, None, None)
            return 1
        norm_name, norm = stages[1]
        affine = self._fold(norm, norm_name, conv.out_channels)
        if kinds[2:3] != [nn.ReLU]:
            self._convolution(conv, name, name, None, affine, None)
            return 2
        _require(stages[2][1], nn.ReLU, stages[2][0], "forward")
        self._convolution(conv, name, name, None, affine, "relu")
        return 3

    def _buffer(self, height: int, width: int, channels: int, name: str) -> int:
        self.buffers.append(Buffer(height, width, channels, name))
        return len(self.buffers) - 1

    def _dense_block(self, layers: Sequence[tuple[str, DenseLayer | PlainDenseLayer]]) -> None:
        height, width = self.features.height, self.features.width
        start = self.features.channels
        block = layers[0][0]
        slot = self._move_into_block(layers[-1][1].out_channels, block, start)
        written = start
        for name, layer in layers:
            if written != layer.conv1.in_channels:
                raise UnsupportedModule(
                    f"{name} reads {layer.conv1.in_channels} channels, not {written}"
                )
            scale, shift = self._fold(layer.norm1, f"{name}.norm1", written)
            if isinstance(layer, PlainDenseLayer):
                growth = layer.conv1.out_channels
                _require_plain(layer.conv1, f"{name}.conv1", 3)
                self._conv(
                    f"{name}.conv1",
                    (Segment(slot, 0, written),),
                    Segment(slot, written, growth),
                    self._double(layer.conv1.weight),
                    None,
                    prologue=(scale, shift),
                    padding=1,
                )
                written += growth
                continue
            growth = layer.conv2.out_channels
            _require_plain(layer.conv1, f"{name}.conv1", 1)
            _require_plain(layer.conv2, f"{name}.conv2", 3)
            width_1x1 = layer.conv1.out_channels
            if width_1x1 != layer.conv2.in_channels:
                raise UnsupportedModule(
                    f"{name}.conv2 reads {layer.conv2.in_channels} channels, not {width_1x1}"
                )
            middle_scale, middle_shift = self._fold(layer.norm2, f"{name}.norm2", width_1x1)
            bottleneck = self._buffer(height, width, width_1x1, f"{name}.conv1")
            self._conv(
                f"{name}.conv1",
                (Segment(slot, 0, written),),
                Segment(bottleneck, 0, width_1x1),
                self._scaled(layer.conv1.weight, middle_scale),
                middle_shift,
                prologue=(scale, shift),
                activation="relu",
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
        if written != layers[-1][1].out_channels:
            raise UnsupportedModule(
                f"{layers[-1][0]} has out_channels {layers[-1][1].out_channels}, expected {written}"
            )
        self.features = _Features((Segment(slot, 0, written),), height, width)

    def _harmonic_block(self, block: HarmonicBlock, name: str) -> None:
        height, width = self.features.height, self.features.width
        if not len(block.links) == len(block.channels) == len(block.layers) + 1:
            raise UnsupportedModule(f"{name} has {len(block.layers)} layers, but other links")
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
            part = f"{name}.layers.{index - 1}"
            if isinstance(layer, PointwiseDepthwise):
                _require(layer, PointwiseDepthwise, part, "forward")
                self._conv_bn_relu(layer.layer1, f"{part}.layer1", None)
                self._depthwise(layer.layer2, f"{part}.layer2", segments[index])
            else:
                self._conv_bn_relu(layer, part, segments[index])
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

    def _conv_bn_relu(self, module: nn.Module, name: str, output: Segment | None) -> None:
        _require(module, ConvBNReLU, name, "forward")
        assert isinstance(module, ConvBNReLU)
        affine = self._fold(module.norm, f"{name}.norm", module.conv.out_channels)
        self._convolution(module.conv, f"{name}.conv", name, output, affine, module.activation)

    def _depthwise(self, module: nn.Module, name: str, output: Segment | None) -> None:
        _require(module, DepthwiseConvBN, name, "forward")
        assert isinstance(module, DepthwiseConvBN)
        if len(self.features.segments) != 1:
            raise UnsupportedModule(f"{name} reads a concatenation")
        affine = self._fold(module.norm, f"{name}.norm", module.dwconv.out_channels)
        groups = self.features.channels
        self._convolution(module.dwconv, f"{name}.dwconv", name, output, affine, None, groups)

    def _convolution(
        self,
        conv: nn.Conv2d,
        conv_name: str,
        name: str,
        output: Segment | None,
        affine: tuple[Tensor, Tensor] | None,
        activation: str | None,
        groups: int = 1,
    ) -> None:
        """A convolution of the features, with the BatchNorm behind it folded in.

        Args:
            conv: The module.
            conv_name: Its name.
            name: That of the step.
            output: Where to write; None for a new buffer.
            affine: Scale and shift of the BatchNorm, or None.
            activation: As in :class:`FusedConv`.
            groups: That it must have.
        """
        if activation not in (None, "relu", "relu6"):
            raise UnsupportedModule(f"{name} has activation {activation!r}")
        kernel, stride = conv.weight.shape[2], _first(conv.stride)
        if stride < 1:
            raise UnsupportedModule(f"{conv_name} has stride {stride}")
        _require_plain(conv, conv_name, kernel, stride, groups)
        padding = kernel // 2
        height = _out_size(self.features.height, kernel, stride, padding)
        width = _out_size(self.features.width, kernel, stride, padding)
        if self.features.channels != conv.in_channels:
            raise UnsupportedModule(
                f"{name} reads {conv.in_channels} channels, not {self.features.channels}"
            )
        if output is None:
            buffer = self._buffer(height, width, conv.out_channels, name)
            output = Segment(buffer, 0, conv.out_channels)
        if output.channels != conv.out_channels:
            raise UnsupportedModule(
                f"{name} writes {conv.out_channels} channels, not {output.channels}"
            )
        weight, bias = self._double(conv.weight), None
        if affine is not None:
            weight, bias = self._scaled(conv.weight, affine[0]), affine[1]
        self._conv(
            name,
            self.features.segments,
            output,
            weight,
            bias,
            stride=stride,
            padding=padding,
            activation=activation,
            groups=groups,
        )
        self.features = _Features((output,), height, width)

    def _transition(self, module: DenseTransition, name: str) -> None:
        _require(module, DenseTransition, name, "forward")
        pool = module.pool
        _require(pool, nn.AvgPool2d, f"{name}.pool", "forward")
        plain = (2, 2, 0, False, None)
        options = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
        if (*options, pool.divisor_override) != plain:
            raise UnsupportedModule(f"{name}.pool is not a plain 2x2 average pooling")
        _require_plain(module.conv, f"{name}.conv", 1)
        if len(self.features.segments) != 1:
            raise UnsupportedModule(f"{name} reads a concatenation")
        if self.features.channels != module.conv.in_channels:
            raise UnsupportedModule(
                f"{name} reads {module.conv.in_channels} channels, not {self.features.channels}"
            )
        module_pixels = self.features.height * self.features.width
        affine = self._fold(module.norm, f"{name}.norm", self.features.channels)
        prologue = Prologue(*map(_single, affine))
        self._pool(f"{name}.pool", 2, 2, 0, prologue)
        output = Segment(
            self._buffer(self.features.height, self.features.width, module.conv.out_channels, name),
            0,
            module.conv.out_channels,
        )
        self._conv(
            f"{name}.conv",
            self.features.segments,
            output,
            self._double(module.conv.weight),
            None,
            module_pixels=module_pixels,
        )
        self.features = _Features((output,), self.features.height, self.features.width)

    def _normalise(self) -> None:
        """Writes the features after the BatchNorm and ReLU behind them."""
        self._pool("norm", 1, 1, 0, self.prologue)
        self.prologue = None

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
        activation: str | None = None,
        groups: int = 1,
        module_pixels: int | None = None,
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

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight with each output channel scaled, in float64."""
        doubled = self._double(weight)
        # Arithmetic on the meta device imports a compiler at its first use, which takes a second.
        return doubled if doubled.is_meta else doubled * scale[:, None, None, None]

    def _fold(self, norm: nn.Module, name: str, channels: int) -> tuple[Tensor, Tensor]:
        """The float64 scale and shift of a BatchNorm of so many channels in evaluation mode."""
        _require(norm, nn.BatchNorm2d, name, "forward")
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.running_mean is None or norm.running_var is None:
            raise UnsupportedModule(f"{name} keeps no running statistics, so it cannot be folded")
        shapes = {
            tensor.shape
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            if tensor is not None
        }
        if shapes != {(channels,)}:
            raise UnsupportedModule(f"{name} does not normalise {channels} channels")
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
            or not (kernel >= 1 and stride >= 1 and 0 <= padding <= kernel // 2)
        ):
            raise UnsupportedModule(f"{name} is not a plain square max pooling")
        if len(self.features.segments) != 1:
            raise UnsupportedModule(f"{name} pools a concatenation")
        self._pool(name, kernel, stride, padding, None)

    def _pool(
        self, name: str, kernel: int, stride: int, padding: int, prologue: Prologue | None
    ) -> None:
        """A pool of the features: an average where there is a prologue, else a maximum."""
        source = self.features.segments[0]
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
                average=prologue is not None,
                input_pixels=self.features.height * self.features.width,
                output_pixels=height * width,
                batch=self.batch,
                prologue=prologue,
            )
        )
        self.features = _Features((output,), height, width)

    def _head(self, model: Network) -> None:
        name, classifier = model.default_cfg["classifier"], model.get_classifier()
        source = self.features.segments[0]
        linear = classifier if isinstance(classifier, nn.Linear) else None
        _require(classifier, nn.Identity if linear is None else nn.Linear, name, "forward")
        outputs, inputs = (source.channels,) * 2 if linear is None else linear.weight.shape
        if inputs != source.channels:
            raise UnsupportedModule(f"{name} reads {inputs} features, not {source.channels}")
        # Of the module that pools too, where there is one.
        name = name.rpartition(".")[0] or name
        output = Segment(self._buffer(1, 1, outputs, name), 0, outputs)
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
                prologue=self.prologue,
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
    # The methods of networks are there to be overridden.
    own = None if expected is Network else override(module, expected)
    if own is not None:
        raise UnsupportedModule(f"{name} has a {own} of its own")


def _pools(model: Network) -> bool:
    """Whether a network ends with an average over whole maps; refuses any other pooling."""
    pooling = model._pooling()
    if not pooling:
        return model.global_pool == "avg"
    parts = []
    for name, module in pooling:
        if isinstance(module, nn.Dropout):
            _require(module, nn.Dropout, name, "forward")
        elif isinstance(module, nn.Identity):
            _require(module, nn.Identity, name, "forward")
        else:
            parts.append((name, module))
    for (name, module), (kind, settings) in zip(parts, _AVERAGE, strict=False):
        if isinstance(module, kind):
            _require(module, kind, name, "forward")
            if all(getattr(module, key) in values for key, values in settings.items()):
                continue
        raise UnsupportedModule(f"{name} is no part of a global average pooling")
    if len(parts) not in (0, len(_AVERAGE)):
        raise UnsupportedModule(f"{pooling[0][0]} is no part of a global average pooling")
    return bool(parts)


def _require_plain(
    conv: nn.Module, name: str, kernel: int, stride: int = 1, groups: int = 1
) -> None:
    _require(conv, nn.Conv2d, name, "forward")
    assert isinstance(conv, nn.Conv2d)
    # PyTorch goes by the weight, whatever the module says of itself.
    outputs, inputs, *window = conv.weight.shape
    if outputs != conv.out_channels or inputs * groups != conv.in_channels:
        raise UnsupportedModule(f"{name} has a weight of shape {tuple(conv.weight.shape)}")
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
