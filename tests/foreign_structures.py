"""Networks as users bring them, each small and in the words of those who published it.

``STRUCTURES`` has them by name, with the inputs that they take. The larger ones, which are measured
too, come from benchmarks/foreign_networks.py.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foreign import Concatenating, MonaiLayer, dense_features, dense_layer
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import foreign_networks as published

Shape = tuple[int, ...]
SMALL: dict[str, Any] = {"growth": 8, "blocks": (2, 3, 2, 2), "first": 16}
"""A DenseNet of torchvision's of four small blocks."""


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a BatchNorm with its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training or not self.track_running_stats:
            batch = True
        else:
            batch = self.running_mean is None and self.running_var is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, batch, 0.1, self.eps
        )
        return self.act(self.drop(x))


class BlurPool2d(nn.Module):
    """timm's: a depthwise convolution with a fixed filter over a reflected border."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        filt = (row[:, None] * row)[None, None].repeat(channels, 1, 1, 1)
        self.register_buffer("filt", filt, persistent=False)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [1, 1, 1, 1], mode="reflect")
        return F.conv2d(x, self.filt, stride=2, groups=self.channels)


class TimmLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.add_module("norm1", BatchNormAct2d(inputs))
        self.add_module("conv1", nn.Conv2d(inputs, 4 * growth, 1, bias=False))
        self.add_module("norm2", BatchNormAct2d(4 * growth))
        self.add_module("conv2", nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        return self.conv2(self.norm2(self.conv1(self.norm1(torch.cat(features, 1)))))


class TimmBlock(nn.ModuleDict):
    def __init__(self, count: int, inputs: int, growth: int) -> None:
        super().__init__()
        for index in range(count):
            self.add_module(f"denselayer{index + 1}", TimmLayer(inputs + index * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class TimmDenseNet(nn.Module):
    """timm's, also with a deep stem, blurred pools, or as a pyramid of features."""

    def __init__(self, deep: bool = False, blur: bool = False, features_only: bool = False) -> None:
        super().__init__()
        growth, channels, blocks = 8, 16, (2, 3, 2)
        self.features = nn.Sequential()
        if deep:
            self.features.add_module("conv0", nn.Conv2d(3, growth, 3, 2, 1, bias=False))
            self.features.add_module("norm0", BatchNormAct2d(growth))
            self.features.add_module("conv1", nn.Conv2d(growth, growth, 3, 1, 1, bias=False))
            self.features.add_module("norm1", BatchNormAct2d(growth))
            self.features.add_module("conv2", nn.Conv2d(growth, channels, 3, 1, 1, bias=False))
            self.features.add_module("norm2", BatchNormAct2d(channels))
        else:
            self.features.add_module("conv0", nn.Conv2d(3, channels, 7, 2, 3, bias=False))
            self.features.add_module("norm0", BatchNormAct2d(channels))
        pool = [nn.MaxPool2d(3, 1, 1), BlurPool2d(channels)]
        self.features.add_module("pool0", nn.Sequential(*pool) if blur else nn.MaxPool2d(3, 2, 1))
        self.taps = ["norm2" if deep else "norm0"]
        for number, count in enumerate(blocks, start=1):
            self.features.add_module(f"denseblock{number}", TimmBlock(count, channels, growth))
            channels += count * growth
            if number < len(blocks):
                self.taps.append(f"denseblock{number}")
                transition = nn.Sequential()
                transition.add_module("norm", BatchNormAct2d(channels))
                transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
                channels //= 2
                transition.add_module("pool", BlurPool2d(channels) if blur else nn.AvgPool2d(2, 2))
                self.features.add_module(f"transition{number}", transition)
        self.features.add_module("norm5", BatchNormAct2d(channels))
        self.taps.append("norm5")
        self.features_only = features_only
        self.head_drop = nn.Dropout(0.0)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            maps = []
            for name, module in self.features.named_children():
                x = module(x)
                if name in self.taps:
                    maps.append(x)
            return maps
        x = self.features(x).mean((2, 3))
        return self.classifier(self.head_drop(x))


class MonaiDenseNet(nn.Module):
    """MONAI's in two dimensions, for pictures of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.features, channels = dense_features(1, MonaiLayer)
        self.class_layers = nn.Sequential(
            OrderedDict(
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(1),
                out=nn.Linear(channels, 6),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.class_layers(x)
        return x


def op_norm(outputs: Tensor, thresholds: Tensor) -> Tensor:
    """torchxrayvision's calibration: at its threshold an output is a half."""
    thresholds = thresholds.expand(outputs.shape[0], -1)
    result = torch.zeros(outputs.shape, device=outputs.device) + 0.5
    below = (outputs < thresholds) & ~torch.isnan(thresholds)
    above = ~(outputs < thresholds) & ~torch.isnan(thresholds)
    result[below] = outputs[below] / (thresholds[below] * 2)
    result[above] = 1.0 - ((1.0 - outputs[above]) / ((1 - thresholds[above]) * 2))
    return result


class XrayDenseNet(published.DenseNet):
    """torchxrayvision's: one channel, sigmoids, thresholds, and a warning that looks at pixels."""

    op_threshs: Tensor

    def __init__(self) -> None:
        super().__init__(in_chans=1, num_classes=6, **SMALL)
        thresholds = torch.tensor([0.3, 0.5, float("nan"), 0.62, 0.4, 0.1])
        self.register_buffer("op_threshs", thresholds)
        self.warned = False

    def features2(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        return F.adaptive_avg_pool2d(out, (1, 1)).view(features.size(0), -1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.warned and (x.min() < -1025 or x.max() > 1025):
            self.warned = True
        out = self.classifier(self.features2(x))
        if self.op_threshs is not None:
            out = torch.sigmoid(out)
            # In double precision too, for which the published function has no masks.
            out = op_norm(out.float(), self.op_threshs.float()).to(out.dtype)
        return out


class GroupNormReLU(nn.Module):
    """A convolution of segmentation_models_pytorch's FPN."""

    def __init__(self, inputs: int, outputs: int, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.block = nn.Sequential(
            nn.Conv2d(inputs, outputs, (3, 3), stride=1, padding=1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return x


class FPNBlock(nn.Module):
    def __init__(self, channels: int, skip: int) -> None:
        super().__init__()
        self.skip_conv = nn.Conv2d(skip, channels, kernel_size=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x + self.skip_conv(skip)


class FPN(nn.Module):
    """segmentation_models_pytorch's FPN around a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = published.DenseNetEncoder(**SMALL)
        *_, c2, c3, c4, c5 = published.map_channels(self.encoder)
        self.p5 = nn.Conv2d(c5, 32, 1)
        self.p4, self.p3, self.p2 = FPNBlock(32, c4), FPNBlock(32, c3), FPNBlock(32, c2)
        self.seg_blocks = nn.ModuleList(
            nn.Sequential(
                *(GroupNormReLU(32 if i == 0 else 16, 16, count > 0) for i in range(count or 1))
            )
            for count in (3, 2, 1, 0)
        )
        self.dropout = nn.Dropout2d(0.2, inplace=True)
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(16, 3, 1), nn.UpsamplingBilinear2d(scale_factor=4), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        c2, c3, c4, c5 = self.encoder(x)[-4:]
        p5 = self.p5(c5)
        p4 = self.p4(p5, c4)
        p3 = self.p3(p4, c3)
        p2 = self.p2(p3, c2)
        maps = [block(p) for block, p in zip(self.seg_blocks, (p5, p4, p3, p2), strict=True)]
        x = self.dropout(torch.stack(maps).sum(dim=0))
        return self.segmentation_head(x)


class BamosBottleneck(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = torch.cat((x, out), 1)
        return out


class BamosTransition(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = F.avg_pool2d(out, 2)
        return out


class BamosDenseNet(nn.Module):
    """For CIFAR; of one picture the output has no batch, as squeezing takes it away."""

    def __init__(self, growth: int = 6, blocks: tuple[int, ...] = (2, 3, 2), pool: int = 8) -> None:
        super().__init__()
        channels = 2 * growth
        self.pool = pool
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        for number, count in enumerate(blocks, start=1):
            layers = []
            for _ in range(count):
                layers.append(BamosBottleneck(channels, growth))
                channels += growth
            self.add_module(f"dense{number}", nn.Sequential(*layers))
            if number < len(blocks):
                self.add_module(f"trans{number}", BamosTransition(channels, channels // 2))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.trans1(self.dense1(out))
        out = self.trans2(self.dense2(out))
        out = self.dense3(out)
        out = torch.squeeze(F.avg_pool2d(F.relu(self.bn1(out)), self.pool))
        return F.log_softmax(self.fc(out), dim=-1)


class KuangliuBottleneck(nn.Module):
    """The new map comes first."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = torch.cat([out, x], 1)
        return out


class KuangliuTransition(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(F.relu(self.bn(x)))
        out = F.avg_pool2d(out, 2)
        return out


class KuangliuDenseNet(nn.Module):
    """For CIFAR, in four blocks."""

    def __init__(self, growth: int = 6, blocks: tuple[int, ...] = (2, 2, 3, 2)) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        for number, count in enumerate(blocks, start=1):
            layers = [KuangliuBottleneck(channels + i * growth, growth) for i in range(count)]
            channels += count * growth
            self.add_module(f"dense{number}", nn.Sequential(*layers))
            if number < len(blocks):
                self.add_module(f"trans{number}", KuangliuTransition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.trans1(self.dense1(out))
        out = self.trans2(self.dense2(out))
        out = self.trans3(self.dense3(out))
        out = self.dense4(out)
        out = F.avg_pool2d(F.relu(self.bn(out)), 4)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class BasicBlock(nn.Module):
    """andreasveit's layer without a bottleneck."""

    def __init__(self, inputs: int, growth: int, rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, growth, kernel_size=3, stride=1, padding=1, bias=False)
        self.droprate = rate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        return torch.cat([x, out], 1)


class BottleneckBlock(nn.Module):
    def __init__(self, inputs: int, growth: int, rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, kernel_size=1, padding=0, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)
        self.droprate = rate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        out = self.conv2(self.relu(self.bn2(out)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        return torch.cat([x, out], 1)


class TransitionBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=1, stride=1, padding=0, bias=False)
        self.droprate = rate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        return F.avg_pool2d(out, 2)


class ContainerBlock(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class AndreasveitDenseNet(nn.Module):
    """For CIFAR: blocks are containers, dropout, with or without a bottleneck."""

    def __init__(
        self,
        blocks: tuple[int, ...] = (2, 3, 2),
        growth: int = 6,
        bottleneck: bool = True,
        reduction: float = 0.5,
        first: int = 12,
        rate: float = 0.2,
    ) -> None:
        super().__init__()
        kind = BottleneckBlock if bottleneck else BasicBlock
        channels = first
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
        for number, count in enumerate(blocks, start=1):
            layers = [kind(channels + i * growth, growth, rate) for i in range(count)]
            self.add_module(f"block{number}", ContainerBlock(layers))
            channels += count * growth
            if number < len(blocks):
                reduced = int(channels * reduction)
                self.add_module(f"trans{number}", TransitionBlock(channels, reduced, rate))
                channels = reduced
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, 10)
        self.in_planes = channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.trans1(self.block1(out))
        out = self.trans2(self.block2(out))
        out = self.block3(out)
        out = self.relu(self.bn1(out))
        out = F.avg_pool2d(out, 8)
        out = out.view(-1, self.in_planes)
        return self.fc(out)


class Keeping(nn.Module):
    """Grad-CAM's way: a hook keeps the last features of the network within."""

    def __init__(self) -> None:
        super().__init__()
        self.model = published.DenseNet(**SMALL, num_classes=6)
        self.kept: dict[str, Tensor] = {}
        self.model.features.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept["features"] = output.clone()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return logits, self.kept["features"]


class Split(nn.Module):
    """Grad-CAM's other way: the parts are called one by one, and the map between is a result."""

    def __init__(self) -> None:
        super().__init__()
        model = published.DenseNet(**SMALL, num_classes=6)
        self.features, self.classifier = model.features, model.classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = torch.relu(self.features(x))
        pooled = torch.flatten(F.adaptive_avg_pool2d(maps, 1), 1)
        return self.classifier(pooled), maps


class LargeHead(nn.Module):
    """A classifier of several layers, as for transfer learning."""

    def __init__(self) -> None:
        super().__init__()
        self.model = published.DenseNet(**SMALL)
        channels = self.model.classifier.in_features
        self.model.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(channels, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Linear(24, 5),
            nn.Softmax(dim=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Siamese(nn.Module):
    """Compares two pictures by one network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = published.DenseNet(**SMALL, num_classes=12)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = F.normalize(self.backbone(left)), F.normalize(self.backbone(right))
        return (a - b).abs().sum(1)


class Named(nn.Module):
    """Several results in a dict: maps, logits, and a list within."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = published.DenseNetEncoder(**SMALL)
        *_, last = published.map_channels(self.encoder)
        self.age, self.kind = nn.Linear(last, 1), nn.Linear(last, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps = self.encoder(x)
        pooled = maps[-1].relu().mean(dim=(2, 3))
        return {"maps": maps[2:], "age": self.age(pooled), "kind": self.kind(pooled).softmax(1)}


def conv_bn(inputs: int, outputs: int, kernel: Any = 3, stride: int = 1, **more: Any) -> list:
    padding = more.pop("padding", kernel // 2 if isinstance(kernel, int) else 0)
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False, **more),
        nn.BatchNorm2d(outputs),
    ]


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's ResNet-18, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8, 7, 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = 8
        for number, width in enumerate((8, 16, 24, 32), start=1):
            first = ResidualBlock(channels, width, 1 if number == 1 else 2)
            layers = nn.Sequential(first, ResidualBlock(width, width, 1))
            self.add_module(f"layer{number}", layers)
            channels = width
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.fc1(self.avgpool(x)), inplace=True)
        scale = F.hardsigmoid(self.fc2(scale)) * torch.sigmoid(self.fc2(scale))
        return scale * x


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, wide: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            nn.Sequential(*conv_bn(inputs, wide, 1), nn.Hardswish(inplace=True)),
            nn.Sequential(
                *conv_bn(wide, wide, kernel, stride, groups=wide), nn.Hardswish(inplace=True)
            ),
            SqueezeExcitation(wide),
            nn.Sequential(*conv_bn(wide, outputs, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNet(nn.Module):
    """Like MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*conv_bn(3, 8, 3, 2), nn.Hardswish(inplace=True)),
            InvertedResidual(8, 16, 8, 1, 3),
            InvertedResidual(8, 24, 12, 2, 5),
            InvertedResidual(12, 36, 12, 1, 5),
            nn.Sequential(*conv_bn(12, 40, 1), nn.Hardswish()),
        )
        self.classifier = nn.Sequential(
            nn.Linear(40, 20), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(20, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


class BasicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """A block of Inception with long kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 12, kernel_size=3, stride=2)
        self.branch1x1 = BasicConv2d(12, 8, kernel_size=1)
        self.branch7x7_1 = BasicConv2d(12, 6, kernel_size=1)
        self.branch7x7_2 = BasicConv2d(6, 7, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(7, 8, kernel_size=(7, 1), padding=(3, 0))
        self.branch_pool = BasicConv2d(12, 5, kernel_size=1)
        self.branch3x3_2a = BasicConv2d(8, 6, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(8, 6, kernel_size=(3, 1), padding=(1, 0))
        self.fc = nn.Linear(8 + 12 + 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        parts = torch.cat([self.branch3x3_2a(branch7x7), self.branch3x3_2b(branch7x7)], 1)
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        out = torch.cat([branch1x1, parts, self.branch_pool(branch_pool)], 1)
        out = torch.cat([F.max_pool2d(out, kernel_size=3, stride=2)], 1)
        return self.fc(F.adaptive_avg_pool2d(out, (1, 1)).flatten(1))


class ASPP(nn.Module):
    """DeepLab's pyramid of dilated convolutions, with a pooled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 10, 3, 2), nn.ReLU())
        self.convs = nn.ModuleList(
            [nn.Sequential(*conv_bn(10, 8, 1), nn.ReLU())]
            + [
                nn.Sequential(*conv_bn(10, 8, 3, padding=rate, dilation=rate), nn.ReLU())
                for rate in (2, 4, 6)
            ]
        )
        self.pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.project = nn.Sequential(*conv_bn(40, 12, 1), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        shape = x.shape[-2:]
        y = self.stem(x)
        parts = [conv(y) for conv in self.convs]
        size = y.shape[-2:]
        pooled = F.interpolate(self.pooling(y), size=size, mode="bilinear", align_corners=False)
        y = self.head(self.project(torch.cat([*parts, pooled], dim=1)))
        y = F.interpolate(y, size=shape, mode="bilinear", align_corners=False)
        return OrderedDict(out=y)


class Shuffled(nn.Module):
    """ShuffleNetV2's unit: halves of the channels, and channels in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn(3, 16, 3, 2), nn.ReLU(inplace=True))
        self.branch2 = nn.Sequential(
            *conv_bn(8, 8, 1),
            nn.ReLU(inplace=True),
            *conv_bn(8, 8, 3, groups=8),
            *conv_bn(8, 8, 1),
            nn.ReLU(inplace=True),
        )
        self.conv5 = nn.Sequential(*conv_bn(16, 12, 1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for _ in range(2):
            x1, x2 = x.chunk(2, dim=1)
            x = torch.cat((x1, self.branch2(x2)), dim=1)
            batch, channels, height, width = x.size()
            x = x.view(batch, 2, channels // 2, height, width)
            x = torch.transpose(x, 1, 2).contiguous()
            x = x.view(batch, channels, height, width)
        return self.fc(self.conv5(x).mean([2, 3]))


class Partial(nn.Module):
    """CSP's: slices and chunks of channels, SiLU and LeakyReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(*conv_bn(3, 18, 3, 2), nn.SiLU(inplace=True))
        self.first = nn.Sequential(*conv_bn(6, 6), nn.LeakyReLU(0.1, inplace=True))
        self.second = nn.Sequential(*conv_bn(6, 6), nn.SiLU())
        self.third = nn.Sequential(*conv_bn(5, 7, 1), nn.LeakyReLU(0.2))
        self.last = nn.Sequential(*conv_bn(18 + 12 + 7, 9, 1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        parts = list(x.chunk(3, 1))
        parts.append(self.first(parts[-1]))
        parts.append(self.second(parts[-1]))
        parts.append(self.third(x[:, 4:9]))
        return self.last(torch.cat(parts, 1))


class Transposed(nn.Module):
    """A decoder of transposed convolutions, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(*conv_bn(3, 8), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), *conv_bn(8, 12), nn.ReLU(inplace=True))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), *conv_bn(12, 16), nn.ReLU(inplace=True))
        self.up1 = nn.ConvTranspose2d(16, 12, kernel_size=2, stride=2)
        self.conv1 = nn.Sequential(*conv_bn(24, 12), nn.ReLU(inplace=True))
        self.up2 = nn.ConvTranspose2d(12, 8, 3, 2, padding=1, output_padding=1)
        self.conv2 = nn.Sequential(*conv_bn(16, 8), nn.ReLU(inplace=True))
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = self.down3(b)
        y = self.conv1(torch.cat([self.up1(c), b], 1))
        y = self.conv2(torch.cat([a, self.up2(y)], 1))
        return torch.sigmoid(self.out(y))


class Shared(nn.Module):
    """One block that runs three times, one BatchNorm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.block = nn.Sequential(*conv_bn(12, 12), nn.ReLU())
        self.left, self.right = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.norm(self.left(x)), self.norm(self.right(x)).relu()


class Unusual(nn.Module):
    """BatchNorm without affine, biases everywhere, padding to one side, pools that round up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 9, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(9, affine=False)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(9, 11, 3, padding="same", dilation=2)
        self.norm2 = nn.BatchNorm2d(11, eps=1e-3)
        self.pool2 = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.conv3 = nn.Conv2d(11, 10, (4, 2), padding="same")
        self.pool3 = nn.AvgPool2d(2, ceil_mode=True)
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        x = torch.relu_(self.norm1(self.conv1(x)))
        x = F.leaky_relu(self.norm2(self.conv2(self.pool1(x))), 0.05, inplace=True)
        x = self.conv3(F.pad(self.pool2(x), [1, 0, 2, 0]))
        return self.identity(self.pool3(F.relu6(x)))


@dataclass(frozen=True)
class Structure:
    """A network and what it takes.

    Attributes:
        make: Builds it.
        shapes: Of the example, one for each input, without the batch.
        sizes: Heights and widths that it takes too.
        foreign: The most operations of a call that may be left unfused; None for any number.
        doubles: Whether its ``double()`` takes float64.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...] = ((3, 64, 64),)
    sizes: tuple[tuple[int, int], ...] = ((96, 64),)
    foreign: int | None = 0
    doubles: bool = True


def small_hardnet(ds: bool = False) -> nn.Module:
    return published.HarDNet(
        (8, 12),
        (4, 8, 4),
        (6, 8, 16),
        (16, 24, 40),
        (1, 1, 0),
        multiplier=1.6 if ds else 1.7,
        depth_wise=ds,
        drop=0.0 if ds else 0.1,
        num_classes=10,
    )


def small_fc_hardnet() -> nn.Module:
    sizes: dict[str, Any] = {"channels": (16, 20, 24), "growth": (4, 6, 6), "blocks": (4, 4, 8)}
    return published.FCHarDNet(5, first=(6, 8, 10, 12), **sizes)


def dense(**options: Any) -> Callable[[], nn.Module]:
    return lambda: published.DenseNet(**{**SMALL, "num_classes": 10, **options})


def in_place_of_lists() -> nn.Module:
    """A CIFAR network of Sequentials alone, each of which adds to what it reads."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    layers += [dense_layer(8), dense_layer(12), Concatenating(*conv_bn(16, 5, 3), nn.ReLU())]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Conv2d(21, 6, 1), nn.Flatten())


CIFAR: dict[str, Any] = {"shapes": ((3, 32, 32),), "sizes": ()}

STRUCTURES: dict[str, Structure] = {
    "torchvision": Structure(dense()),
    "torchvision-memory-efficient": Structure(dense(memory_efficient=True, drop_rate=0.1)),
    "growth-21": Structure(dense(growth=21, first=42)),
    "growth-33": Structure(dense(growth=33, first=31)),
    "timm": Structure(TimmDenseNet),
    "timm-deep": Structure(lambda: TimmDenseNet(deep=True)),
    # A reflected border and the convolution behind it, for each pool.
    "timm-blur-deep": Structure(lambda: TimmDenseNet(deep=True, blur=True), foreign=6),
    "timm-features": Structure(lambda: TimmDenseNet(features_only=True)),
    "monai": Structure(MonaiDenseNet, ((1, 64, 64),)),
    # What looks at pixels, and the calibration of a few numbers.
    "torchxrayvision": Structure(XrayDenseNet, ((1, 64, 64),), foreign=None, doubles=False),
    "smp-unet": Structure(lambda: published.Unet(2, (32, 24, 16, 12, 8), **SMALL)),
    # Four sizes of GroupNorm and what follows it; the maps that are stacked and summed.
    "smp-fpn": Structure(FPN, foreign=7 * 3 + 2),
    "hardnet": Structure(small_hardnet),
    "hardnet-ds": Structure(lambda: small_hardnet(ds=True)),
    "fc-hardnet": Structure(small_fc_hardnet, sizes=((96, 64), (72, 88))),
    "bamos": Structure(BamosDenseNet, ((3, 32, 32),), ((40, 32),), foreign=3),
    "kuangliu": Structure(KuangliuDenseNet, **CIFAR),
    "andreasveit": Structure(AndreasveitDenseNet, **CIFAR, foreign=2),
    "l40-k12": Structure(
        lambda: AndreasveitDenseNet((12, 12, 12), 12, False, 1.0, 16, 0.0), **CIFAR, foreign=2
    ),
    "sequentials": Structure(in_place_of_lists, ((3, 32, 32),), ((24, 40),), foreign=1),
    # A hook stops what it hangs on from being fused with its surroundings, not what is within.
    "grad-cam-hook": Structure(Keeping, foreign=None),
    "grad-cam-split": Structure(Split),
    "large-head": Structure(LargeHead, foreign=3),
    "siamese": Structure(Siamese, ((3, 64, 64), (3, 64, 64)), foreign=None),
    "dict": Structure(Named, foreign=1),
    "resnet": Structure(ResNet),
    "mobilenet": Structure(MobileNet, foreign=None),
    "inception": Structure(Inception),
    "aspp": Structure(ASPP),
    "shuffle": Structure(Shuffled, foreign=8),
    "partial": Structure(Partial),
    "transposed": Structure(Transposed),
    "shared": Structure(Shared),
    "unusual": Structure(Unusual, sizes=((61, 47), (33, 70))),
}
"""Everything above, by name."""
