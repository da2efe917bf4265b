"""Networks of other packages, written anew with the names that their checkpoints have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS, GROWTH, FIRST, CLASSES = (2, 3, 2), 4, 8, 5
"""Of every DenseNet here: layers of each block, and channels."""


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **more)


class Concatenating(nn.Sequential):
    """Adds what its modules make of the input to the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def dense_layer(inputs: int, names: tuple[str, ...] = ("norm", "relu", "conv")) -> Concatenating:
    norm, relu, convolution = names
    layer = Concatenating()
    width = 4 * GROWTH
    for number, (fan_in, fan_out, kernel) in enumerate(
        ((inputs, width, 1), (width, GROWTH, 3)), start=1
    ):
        layer.add_module(f"{norm}{number}", nn.BatchNorm2d(fan_in))
        layer.add_module(f"{relu}{number}", nn.ReLU())
        layer.add_module(f"{convolution}{number}", conv(fan_in, fan_out, kernel))
    return layer


class MonaiLayer(nn.Module):
    """The same, its modules one level further down."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(dense_layer(inputs).named_children()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def dense_features(
    in_chans: int,
    layer: Callable[[int], nn.Module] = dense_layer,
    last: str = "norm5",
    small: bool = False,
) -> tuple[nn.Sequential, int]:
    """The modules of torchvision's DenseNet before the classifier, and their channels."""
    features = nn.Sequential()
    if small:
        features.add_module("conv0", conv(in_chans, FIRST))
    else:
        features.add_module("conv0", conv(in_chans, FIRST, 7, 2))
        features.add_module("norm0", nn.BatchNorm2d(FIRST))
        features.add_module("relu0", nn.ReLU())
        features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
    channels = FIRST
    for number, count in enumerate(BLOCKS, start=1):
        block = nn.Sequential()
        for index in range(count):
            block.add_module(f"denselayer{index + 1}", layer(channels))
            channels += GROWTH
        features.add_module(f"denseblock{number}", block)
        if number < len(BLOCKS):
            transition = nn.Sequential()
            transition.add_module("norm", nn.BatchNorm2d(channels))
            transition.add_module("relu", nn.ReLU())
            transition.add_module("conv", conv(channels, channels // 2, 1))
            transition.add_module("pool", nn.AvgPool2d(2))
            features.add_module(f"transition{number}", transition)
            channels //= 2
    features.add_module(last, nn.BatchNorm2d(channels))
    return features, channels


class Torchvision(nn.Module):
    """torchvision's and timm's, and with one channel torchxrayvision's."""

    def __init__(self, in_chans: int = 3, last: str = "norm5", small: bool = False) -> None:
        super().__init__()
        self.features, channels = dense_features(in_chans, last=last, small=small)
        self.classifier: nn.Module = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Xray(Torchvision):
    """torchxrayvision's, with thresholds in its state."""

    op_threshs: Tensor

    def __init__(self) -> None:
        super().__init__(in_chans=1)
        self.register_buffer("op_threshs", torch.rand(CLASSES))


class CheXNet(nn.Module):
    """Sigmoids of a torchvision network whose classifier is a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.densenet121 = Torchvision()
        linear = self.densenet121.classifier
        self.densenet121.classifier = nn.Sequential(linear, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.densenet121(x)


class Monai(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, channels = dense_features(3, MonaiLayer)
        self.class_layers = nn.Sequential(
            OrderedDict(
                relu=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(1),
                out=nn.Linear(channels, CLASSES),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.class_layers(self.features(x))


class CifarTransition(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class BlockOfLayers(nn.Module):
    """densenet-pytorch's block, whose layers are those of another module."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layer = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Cifar(nn.Module):
    """densenet.pytorch (bamos), and with ``nested`` densenet-pytorch (andreasveit)."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.nested = nested
        self.conv1 = conv(3, FIRST)
        channels = FIRST
        for number, count in enumerate(BLOCKS, start=1):
            layers = nn.Sequential(
                *(
                    dense_layer(channels + index * GROWTH, ("bn", "relu", "conv"))
                    for index in range(count)
                )
            )
            channels += count * GROWTH
            if nested:
                self.add_module(f"block{number}", BlockOfLayers(layers))
            else:
                self.add_module(f"dense{number}", layers)
            if number < len(BLOCKS):
                self.add_module(f"trans{number}", CifarTransition(channels))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name, module in self.named_children():
            if name.startswith(("dense", "block", "trans")):
                x = module(x)
        x = self.fc(F.avg_pool2d(F.relu(self.bn1(x)), x.shape[-1]).flatten(1))
        return x if self.nested else F.log_softmax(x, 1)


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def conv_layer(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, six: bool = True
) -> nn.Sequential:
    relu = nn.ReLU6() if six else nn.ReLU()
    return named(
        conv=conv(inputs, outputs, kernel, stride), norm=nn.BatchNorm2d(outputs), relu=relu
    )


def depthwise(channels: int, stride: int = 1) -> nn.Sequential:
    return named(
        dwconv=conv(channels, channels, 3, stride, groups=channels), norm=nn.BatchNorm2d(channels)
    )


class HarDBlock(nn.Module):
    """A harmonic block whose links are searched for as the published code does."""

    def __init__(
        self, inputs: int, growth: int, multiplier: float, count: int, six: bool, ds: bool
    ):
        super().__init__()
        channels, self.links, layers = [inputs], [], []
        for layer in range(1, count + 1):
            width, links = float(growth), []
            for power in range(10):
                if layer % 2**power == 0:
                    links.append(layer - 2**power)
                    width *= multiplier if power else 1
            outputs = int(int(width + 1) / 2) * 2
            fan_in = sum(channels[link] for link in links)
            layers.append(
                named(layer1=conv_layer(fan_in, outputs, 1), layer2=depthwise(outputs))
                if ds
                else conv_layer(fan_in, outputs, six=six)
            )
            channels.append(outputs)
            self.links.append(links)
        self.layers = nn.ModuleList(layers)
        self.kept = [layer for layer in range(1, count + 1) if layer % 2 or layer == count]
        self.outputs = sum(channels[layer] for layer in self.kept)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for links, layer in zip(self.links, self.layers, strict=True):
            features.append(layer(torch.cat([features[link] for link in links], 1)))
        return torch.cat([features[layer] for layer in self.kept], 1)


class Flat(nn.Module):
    """Runs a list of modules in order."""

    base: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        for module in self.base:
            x = module(x)
        return x


STAGES = {
    "first_channels": (6, 8),
    "blocks": (2, 4),
    "transitions": (10, 12),
    "downsample": (True, False),
    "growth_rates": (4, 6),
}
"""Of the HarDNet and the ThreshNet here."""


class HarDNet(Flat):
    def __init__(self, ds: bool = False) -> None:
        super().__init__()
        one, channels = STAGES["first_channels"]
        base: list[nn.Module] = [
            conv_layer(3, one, 3, 2),
            conv_layer(one, channels, 1 if ds else 3),
            depthwise(channels, 2) if ds else nn.MaxPool2d(3, 2, 1),
        ]
        for index, count in enumerate(STAGES["blocks"]):
            block = HarDBlock(channels, STAGES["growth_rates"][index], 1.7, count, True, ds)
            channels = STAGES["transitions"][index]
            base += [block, conv_layer(block.outputs, channels, 1)]
            if STAGES["downsample"][index]:
                base.append(depthwise(channels, 2) if ds else nn.MaxPool2d(2))
        base.append(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, CLASSES)
            )
        )
        self.base = nn.ModuleList(base)


class ThreshLayer(Concatenating):
    """A dense layer of width 4 times the growth rate."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(inputs),
                relu1=nn.ReLU(),
                conv1=conv(inputs, 4 * growth, 1),
                norm2=nn.BatchNorm2d(4 * growth),
                relu2=nn.ReLU(),
                conv2=conv(4 * growth, growth),
            )
        )


class ThreshNet(Flat):
    """One block of dense layers, then a harmonic one."""

    def __init__(self) -> None:
        super().__init__()
        one, channels = STAGES["first_channels"]
        base: list[nn.Module] = [
            conv_layer(3, one, 3, 2, six=False),
            conv_layer(one, channels, six=False),
            nn.MaxPool2d(3, 2, 1),
        ]
        growth, last = STAGES["growth_rates"]
        for _ in range(STAGES["blocks"][0]):
            base.append(ThreshLayer(channels, growth))
            channels += growth
        base += [conv_layer(channels, STAGES["transitions"][0], 1, six=False), nn.MaxPool2d(2)]
        block = HarDBlock(STAGES["transitions"][0], last, 1.7, STAGES["blocks"][1], False, False)
        channels = STAGES["transitions"][1]
        base += [block, conv_layer(block.outputs, channels, 1, six=False)]
        head = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(channels, CLASSES)
        )
        self.base = nn.ModuleList([*base, head])
