"""Networks as other packages and authors have published them, written anew: what users bring.

Structures, names of parameters and the way in which ``forward`` is put are theirs; nothing of this
package is used. ``NETWORKS`` names those that bench_foreign.py measures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "NETWORKS",
    "DenseNet",
    "DenseNetEncoder",
    "FCHarDNet",
    "HarDBlock",
    "HarDNet",
    "Unet",
    "densenet121",
    "fc_hardnet70",
    "hardnet39ds",
    "hardnet68",
    "hardnet85",
    "unet_densenet121",
]


class DenseLayer(nn.Module):
    """A layer of torchvision's DenseNet, which is given a list of maps.

    Args:
        inputs: Channels of all maps together.
        growth: Channels of the new map.
        width: Channels between the convolutions, as a multiple of ``growth``.
        drop_rate: Probability of dropout, in training.
        memory_efficient: Whether training computes the first half twice.
    """

    def __init__(
        self,
        inputs: int,
        growth: int,
        width: int = 4,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, width * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def bottleneck(self, *maps: Tensor) -> Tensor:
        """The first half of the layer."""
        return self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        """The new map."""
        given = [maps] if isinstance(maps, Tensor) else maps
        if self.memory_efficient and any(each.requires_grad for each in given):
            reduced = checkpoint(self.bottleneck, *given, use_reentrant=False)
        else:
            reduced = self.bottleneck(*given)
        new = self.conv2(self.relu2(self.norm2(reduced)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads all maps before it."""

    def __init__(self, count: int, inputs: int, growth: int, **options: float) -> None:
        super().__init__()
        for index in range(count):
            layer = DenseLayer(inputs + index * growth, growth, **options)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """All maps, concatenated."""
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Halves size and channels between two blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)


class DenseNet(nn.Module):
    """torchvision's DenseNet.

    Args:
        growth: Channels of the map that a layer adds.
        blocks: Layers of each block.
        first: Channels of the first convolution.
        num_classes: Outputs.
        in_chans: Channels of the input.
        **options: As for :class:`DenseLayer`.
    """

    def __init__(
        self,
        growth: int = 32,
        blocks: Sequence[int] = (6, 12, 24, 16),
        first: int = 64,
        num_classes: int = 1000,
        in_chans: int = 3,
        **options: float,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_chans, first, 7, 2, 3, bias=False),
                norm0=nn.BatchNorm2d(first),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, 2, 1),
            )
        )
        channels = first
        for number, count in enumerate(blocks, start=1):
            block = DenseBlock(count, channels, growth, **options)
            self.features.add_module(f"denseblock{number}", block)
            channels += count * growth
            if number < len(blocks):
                self.features.add_module(f"transition{number}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier: nn.Module = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[N, num_classes]``."""
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


class ConvLayer(nn.Sequential):
    """HarDNet's convolution with what follows it; ReLU6 in HarDNet, ReLU in FC-HarDNet."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, six: bool = True
    ) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(outputs))
        self.add_module("relu", nn.ReLU6(True) if six else nn.ReLU(True))


class DWConvLayer(nn.Sequential):
    """A depthwise convolution and its BatchNorm."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.add_module("dwconv", conv)
        self.add_module("norm", nn.BatchNorm2d(channels))


class CombConvLayer(nn.Sequential):
    """A layer of the DS variants."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.add_module("layer1", ConvLayer(inputs, outputs, 1))
        self.add_module("layer2", DWConvLayer(outputs))


class HarDBlock(nn.Module):
    """A harmonic block, as published: a loop over layers, and in it one over their links."""

    def __init__(
        self,
        inputs: int,
        growth: int,
        multiplier: float,
        count: int,
        dwconv: bool = False,
        six: bool = True,
    ) -> None:
        super().__init__()
        self.links: list[list[int]] = []
        self.out_channels = 0
        layers: list[nn.Module] = []
        for index in range(count):
            outputs, fan_in, link = self.get_link(index + 1, inputs, growth, multiplier)
            self.links.append(link)
            layer = (
                CombConvLayer(fan_in, outputs) if dwconv else ConvLayer(fan_in, outputs, six=six)
            )
            layers.append(layer)
            if index % 2 == 0 or index == count - 1:
                self.out_channels += outputs
        self.layers = nn.ModuleList(layers)

    def get_link(
        self, layer: int, base: int, growth: int, multiplier: float
    ) -> tuple[int, int, list[int]]:
        """Channels that a layer makes and reads, and the layers that it reads."""
        if layer == 0:
            return base, 0, []
        width, link = float(growth), []
        for power in range(10):
            step = 2**power
            if layer % step == 0:
                link.append(layer - step)
                if power > 0:
                    width *= multiplier
        fan_in = sum(self.get_link(other, base, growth, multiplier)[0] for other in link)
        return int(int(width + 1) / 2) * 2, fan_in, link

    def forward(self, x: Tensor) -> Tensor:
        """The odd layers and the last one, concatenated."""
        layers_ = [x]
        for layer in range(len(self.layers)):
            tin = []
            for i in self.links[layer]:
                tin.append(layers_[i])
            if len(tin) > 1:
                x = torch.cat(tin, 1)
            else:
                x = tin[0]
            layers_.append(self.layers[layer](x))
        t = len(layers_)
        out_ = []
        for i in range(t):
            if i == t - 1 or i % 2 == 1:
                out_.append(layers_[i])
        return torch.cat(out_, 1)


class HarDNet(nn.Module):
    """HarDNet, as published.

    Args:
        first: Channels of the first two convolutions.
        blocks: Layers of each block.
        growth: Growth rate of each block.
        channels: Channels behind each block.
        down: Whether each block is followed by downsampling.
        multiplier: Channel multiplier of the blocks.
        depth_wise: Whether it is a DS variant.
        drop: Probability of dropout before the last convolution; 0 for no module.
        num_classes: Outputs.
    """

    def __init__(
        self,
        first: Sequence[int],
        blocks: Sequence[int],
        growth: Sequence[int],
        channels: Sequence[int],
        down: Sequence[int],
        multiplier: float = 1.7,
        depth_wise: bool = False,
        drop: float = 0.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.base = nn.ModuleList()
        self.base.append(ConvLayer(3, first[0], 3, 2))
        self.base.append(ConvLayer(first[0], first[1], 1 if depth_wise else 3))
        self.base.append(DWConvLayer(first[1], 2) if depth_wise else nn.MaxPool2d(3, 2, 1))
        current = first[1]
        for index, count in enumerate(blocks):
            block = HarDBlock(current, growth[index], multiplier, count, depth_wise)
            self.base.append(block)
            if drop and index == len(blocks) - 1:
                self.base.append(nn.Dropout(drop))
            self.base.append(ConvLayer(block.out_channels, channels[index], 1))
            current = channels[index]
            if down[index]:
                self.base.append(DWConvLayer(current, 2) if depth_wise else nn.MaxPool2d(2, 2))
        self.base.append(
            nn.Sequential(
                nn.AdaptiveAvgPool2d((1, 1)),
                nn.Flatten(),
                nn.Dropout(0.1),
                nn.Linear(current, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[N, num_classes]``."""
        for layer in self.base:
            x = layer(x)
        return x


class TransitionUp(nn.Module):
    """FC-HarDNet's way up: the map at the size of the one beside it, and both concatenated."""

    def forward(self, x: Tensor, skip: Tensor, concat: bool = True) -> Tensor:
        """The map, and behind it ``skip``."""
        size = (skip.size(2), skip.size(3))
        out = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        if concat:
            out = torch.cat([out, skip], 1)
        return out


class FCHarDNet(nn.Module):
    """FC-HarDNet for semantic segmentation, as published.

    Args:
        num_classes: Channels of the output.
        first: Channels of the first four convolutions.
        channels: Channels behind each block on the way down.
        growth: Growth rate of each block.
        blocks: Layers of each block.
        multiplier: Channel multiplier of the blocks.
    """

    def __init__(
        self,
        num_classes: int = 19,
        first: Sequence[int] = (16, 24, 32, 48),
        channels: Sequence[int] = (64, 96, 160, 224, 320),
        growth: Sequence[int] = (10, 16, 18, 24, 32),
        blocks: Sequence[int] = (4, 4, 8, 8, 8),
        multiplier: float = 1.7,
    ) -> None:
        super().__init__()
        self.shortcut_layers: list[int] = []
        self.base = nn.ModuleList()
        current = 3
        for index, width in enumerate(first):
            stride = 2 - index % 2
            self.base.append(ConvLayer(current, width, 3, stride, six=False))
            current = width
        skips: list[int] = []
        for index, count in enumerate(blocks):
            block = HarDBlock(current, growth[index], multiplier, count, six=False)
            self.base.append(block)
            skips.append(block.out_channels)
            last = index == len(blocks) - 1
            if not last:
                self.shortcut_layers.append(len(self.base) - 1)
            self.base.append(ConvLayer(block.out_channels, channels[index], 1, six=False))
            current = channels[index]
            if not last:
                self.base.append(nn.AvgPool2d(2, 2))
        self.n_blocks = len(blocks) - 1
        self.transUpBlocks = nn.ModuleList()
        self.conv1x1_up = nn.ModuleList()
        self.denseBlocksUp = nn.ModuleList()
        for index in reversed(range(self.n_blocks)):
            self.transUpBlocks.append(TransitionUp())
            current += skips[index]
            self.conv1x1_up.append(ConvLayer(current, current // 2, 1, six=False))
            block = HarDBlock(current // 2, growth[index], multiplier, blocks[index], six=False)
            self.denseBlocksUp.append(block)
            current = block.out_channels
        self.finalConv = nn.Conv2d(current, num_classes, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel, ``[N, num_classes, H, W]``."""
        skip_connections = []
        size_in = x.size()
        for i in range(len(self.base)):
            x = self.base[i](x)
            if i in self.shortcut_layers:
                skip_connections.append(x)
        out = x
        for i in range(self.n_blocks):
            skip = skip_connections.pop()
            out = self.transUpBlocks[i](out, skip, True)
            out = self.conv1x1_up[i](out)
            out = self.denseBlocksUp[i](out)
        out = self.finalConv(out)
        size = (size_in[2], size_in[3])
        return F.interpolate(out, size=size, mode="bilinear", align_corners=True)


class DenseNetEncoder(DenseNet):
    """segmentation_models_pytorch's: a DenseNet that returns the maps of all sizes, the input too.

    Of a transition, the map before its convolution is returned, which is then pooled.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        del self.classifier

    def apply_transition(self, transition: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a transition makes, and the map before its convolution."""
        skip = x
        for module in transition:
            x = module(x)
            if isinstance(module, nn.ReLU):
                skip = x
        return x, skip

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, the largest first."""
        features = [x]
        x = self.features.conv0(x)
        x = self.features.norm0(x)
        x = self.features.relu0(x)
        features.append(x)
        x = self.features.pool0(x)
        number = 1
        while hasattr(self.features, f"transition{number}"):
            x = self.features.get_submodule(f"denseblock{number}")(x)
            transition = self.features.get_submodule(f"transition{number}")
            x, skip = self.apply_transition(transition, x)
            features.append(skip)
            number += 1
        x = self.features.get_submodule(f"denseblock{number}")(x)
        features.append(self.features.norm5(x))
        return features


class Conv2dReLU(nn.Sequential):
    """A convolution of segmentation_models_pytorch's decoders."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class DecoderBlock(nn.Module):
    """A size of the U-Net's way up."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = Conv2dReLU(inputs + skip, outputs)
        self.attention1 = nn.Identity()
        self.conv2 = Conv2dReLU(outputs, outputs)
        self.attention2 = nn.Identity()

    def forward(self, x: Tensor, height: int, width: int, skip: Tensor | None) -> Tensor:
        """The map at the next size."""
        x = F.interpolate(x, size=(height, width), mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
            x = self.attention1(x)
        return self.attention2(self.conv2(self.conv1(x)))


class UnetDecoder(nn.Module):
    """The way up."""

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int]) -> None:
        super().__init__()
        head, *skips = encoder[:0:-1]
        inputs = [head, *decoder[:-1]]
        self.center = nn.Identity()
        self.blocks = nn.ModuleList(
            DecoderBlock(fan_in, skip, outputs)
            for fan_in, skip, outputs in zip(inputs, [*skips, 0], decoder, strict=True)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """A map of the size of the input."""
        shapes = [feature.shape[2:] for feature in features][::-1]
        features = features[1:][::-1]
        x = self.center(features[0])
        skips = features[1:]
        for index, block in enumerate(self.blocks):
            height, width = shapes[index + 1]
            x = block(x, height, width, skips[index] if index < len(skips) else None)
        return x


class Unet(nn.Module):
    """segmentation_models_pytorch's U-Net around a DenseNet.

    Args:
        classes: Channels of the output.
        decoder: Channels of each size of the way up.
        **options: Of the encoder, as for :class:`DenseNet`.
    """

    def __init__(
        self, classes: int = 1, decoder: Sequence[int] = (256, 128, 64, 32, 16), **options: object
    ) -> None:
        super().__init__()
        self.encoder = DenseNetEncoder(**options)
        self.decoder = UnetDecoder(map_channels(self.encoder), decoder)
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(decoder[-1], classes, 3, padding=1), nn.Identity(), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """A mask of the size of the input."""
        features = self.encoder(x)
        return self.segmentation_head(self.decoder(features))


def map_channels(encoder: DenseNetEncoder) -> list[int]:
    """Channels of the maps that an encoder returns."""
    features = encoder.features
    norms = [m.norm for m in features if isinstance(m, Transition)]
    channels = [norm.num_features for norm in (features.norm0, *norms, features.norm5)]
    return [features.conv0.in_channels, *channels]


def densenet121(**options: object) -> DenseNet:
    """DenseNet-121 as torchvision has it."""
    return DenseNet(**options)  # type: ignore[arg-type]


def hardnet68(num_classes: int = 1000) -> HarDNet:
    """HarDNet-68."""
    return HarDNet(
        (32, 64),
        (8, 16, 16, 16, 4),
        (14, 16, 20, 40, 160),
        (128, 256, 320, 640, 1024),
        (1, 0, 1, 1, 0),
        num_classes=num_classes,
    )


def hardnet85(num_classes: int = 1000) -> HarDNet:
    """HarDNet-85."""
    return HarDNet(
        (48, 96),
        (8, 16, 16, 16, 16, 4),
        (24, 24, 28, 36, 48, 256),
        (192, 256, 320, 480, 720, 1280),
        (1, 0, 1, 0, 1, 0),
        drop=0.1,
        num_classes=num_classes,
    )


def hardnet39ds(num_classes: int = 1000) -> HarDNet:
    """HarDNet-39DS."""
    return HarDNet(
        (24, 48),
        (4, 16, 8, 4),
        (16, 20, 64, 160),
        (96, 320, 640, 1024),
        (1, 1, 1, 0),
        multiplier=1.6,
        depth_wise=True,
        num_classes=num_classes,
    )


def fc_hardnet70(num_classes: int = 19) -> FCHarDNet:
    """FC-HarDNet-70."""
    return FCHarDNet(num_classes)


def unet_densenet121(classes: int = 1) -> Unet:
    """The U-Net with a DenseNet-121 as its encoder."""
    return Unet(classes)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision-densenet121": (densenet121, 224),
    "published-hardnet68": (hardnet68, 224),
    "published-hardnet85": (hardnet85, 224),
    "published-hardnet39ds": (hardnet39ds, 224),
    "fc-hardnet70": (fc_hardnet70, 512),
    "unet-densenet121": (unet_densenet121, 256),
}
"""Networks by name, and the height and width of the input that each is measured at."""
