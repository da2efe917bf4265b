"""Networks drawn at random, of all that a graph can say: strategies of hypothesis.

A network is a list of steps, of which each reads maps that are there already and adds one. What a
step says is numbers alone, which are taken modulo what there is to choose from, and a step that
does not fit is none: whatever is taken away from a list, or made smaller in it, leaves a network,
and so a failing one shrinks to the few steps that matter. Zeros are the plainest choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 5
"""Of the input."""
_MOST_CHANNELS, _LARGEST, _FEWEST_PIXELS = 48, 40, 2


@dataclass(frozen=True)
class Step:
    """One operation, as numbers.

    Attributes:
        kind: Which, by its name in ``KINDS``.
        source: The map that it reads, counted back from the last.
        other: Another map, for what reads several.
        choices: What else there is to choose, in the order in which it is asked for.
    """

    kind: str
    source: int
    other: int
    choices: tuple[int, ...]


class Chooser:
    """Hands out the choices of a step, zeros when there are no more."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.choices = list(choices)

    def of(self, *options):
        return options[(self.choices.pop(0) if self.choices else 0) % len(options)]


class Operation(nn.Module):
    """A function of one or more maps that has no parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *maps: Tensor) -> Tensor:
        return self.function(*maps)


def convolution(choose: Chooser, x: Tensor) -> nn.Module | None:
    kernel = choose.of((3, 3), (1, 1), (1, 3), (3, 1), (2, 2), (5, 5), (1, 7), (4, 3))
    stride = choose.of((1, 1), (2, 2), (1, 2), (3, 3))
    dilation = choose.of((1, 1), (2, 2), (1, 3))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    half = tuple(r // 2 for r in reach)
    padding = choose.of(half, (0, 0), (1, 0), "same" if stride == (1, 1) else half)
    channels = x.shape[1]
    groups = choose.of(1, channels, *(n for n in (2, 3, 4) if channels % n == 0))
    multiple = choose.of(8, 4, 3, 12, 5, 16, 21)
    outputs = groups * max(1, multiple // groups)
    bias = choose.of(False, True)
    if outputs > _MOST_CHANNELS:
        return None
    return nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias)


def transposed(choose: Chooser, x: Tensor) -> nn.Module:
    kernel, stride, padding, more = choose.of((2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0))
    outputs = choose.of(6, 4, 9)
    return nn.ConvTranspose2d(x.shape[1], outputs, kernel, stride, padding, more)


def norm(choose: Chooser, x: Tensor) -> nn.Module:
    return nn.BatchNorm2d(
        x.shape[1], eps=choose.of(1e-5, 1e-3), affine=choose.of(True, False), momentum=0.1
    )


def activation(choose: Chooser, x: Tensor) -> nn.Module:
    return choose.of(
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.LeakyReLU(0.1),
        nn.Hardswish(),
        nn.SiLU(),
        nn.Sigmoid(),
        nn.LeakyReLU(0.2, inplace=True),
        nn.SiLU(inplace=True),
        Operation(F.relu),
        Operation(torch.relu_),
        Operation(torch.sigmoid),
        nn.Identity(),
        nn.Dropout(0.5),
    )


def pool(choose: Chooser, x: Tensor) -> nn.Module:
    average = choose.of(False, True)
    kernel, stride, padding = choose.of(
        (2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, 0), (2, 1, 0), ((2, 3), (2, 1), (1, 0))
    )
    up = choose.of(False, True)
    if not average:
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=up)
    return nn.AvgPool2d(kernel, stride, padding, up, count_include_pad=choose.of(True, False))


def resize(choose: Chooser, x: Tensor) -> nn.Module:
    height, width = x.shape[2:]
    options: dict[str, object] = choose.of(
        {"scale_factor": 2.0},
        {"size": (height + 3, 2 * width)},
        {"size": (max(1, height // 2), width)},
        {"scale_factor": 1.5, "recompute_scale_factor": True},
    )
    options |= choose.of(
        {"mode": "nearest"},
        {"mode": "bilinear", "align_corners": False},
        {"mode": "bilinear", "align_corners": True},
        {"mode": "nearest-exact"},
    )
    return Operation(lambda value: F.interpolate(value, **options))


def part(choose: Chooser, x: Tensor) -> nn.Module | None:
    channels = x.shape[1]
    if channels < 2:
        return None
    middle = channels // 2
    pieces = choose.of(2, 3)
    return choose.of(
        Operation(lambda value: value[:, :middle]),
        Operation(lambda value: value[:, 1:]),
        Operation(lambda value: value.chunk(pieces, 1)[-1]),
        Operation(lambda value: torch.split(value, [middle, channels - middle], 1)[1]),
    )


def pad(choose: Chooser, x: Tensor) -> nn.Module:
    sides = choose.of((0, 1, 0, 1), (1, 0, 2, 1), (2, 2, 0, 0))
    return Operation(lambda value: F.pad(value, sides))


def concatenation(choose: Chooser, x: Tensor, y: Tensor) -> nn.Module | None:
    if x.shape[2:] != y.shape[2:] or 2 * x.shape[1] + y.shape[1] > _MOST_CHANNELS:
        return None
    return choose.of(
        Operation(lambda a, b: torch.cat([a, b], 1)),
        Operation(lambda a, b: torch.cat((b, a), dim=1)),
        Operation(lambda a, b: torch.cat([a, torch.cat([b, a], 1)], 1)),
        Operation(lambda a, b: torch.concat([a, b], -3)),
    )


def addition(choose: Chooser, x: Tensor, y: Tensor) -> nn.Module | None:
    if x.shape != y.shape:
        return None
    return choose.of(
        Operation(lambda a, b: a + b),
        Operation(torch.add),
        Operation(lambda a, b: a.add_(b)),
    )


KINDS: dict[str, tuple[int, Callable[..., nn.Module | None]]] = {
    "convolution": (1, convolution),
    "norm": (1, norm),
    "activation": (1, activation),
    "concatenation": (2, concatenation),
    "pool": (1, pool),
    "addition": (2, addition),
    "resize": (1, resize),
    "slice": (1, part),
    "pad": (1, pad),
    "transposed": (1, transposed),
}
"""How many maps each kind of step reads, and what makes its module: None where it does not fit."""


class RandomNetwork(nn.Module):
    """What a list of steps says.

    Args:
        steps: In order.
        size: Height and width for which they are to fit.
        results: How the outputs are returned: ``"map"``, ``"head"``, ``"list"`` or ``"dict"``.
    """

    def __init__(self, steps: Sequence[Step], size: tuple[int, int], results: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.reads: list[tuple[int, ...]] = []
        self.size, self.results = size, results
        maps = [torch.empty(1, CHANNELS, *size, device="meta")]
        for step in steps:
            arity, make = KINDS[step.kind]
            reads = tuple(
                len(maps) - 1 - back % len(maps) for back in (step.source, step.other)[:arity]
            )
            layer = make(Chooser(step.choices), *(maps[index] for index in reads))
            made = None if layer is None else self.shape_of(layer, [maps[i] for i in reads])
            if layer is None or made is None:
                continue
            maps.append(made)
            self.layers.append(layer)
            self.reads.append(reads)
        self.head = nn.Linear(maps[-1].shape[1], 4)

    @staticmethod
    def shape_of(layer: nn.Module, maps: list[Tensor]) -> Tensor | None:
        """A map of the shape that the layer makes; None where it is too small or too large."""
        try:
            made = layer.to("meta").eval()(*(map_.clone() for map_ in maps))
        except (RuntimeError, ValueError):
            # A window that is larger than the map, or padding that is larger than half a window.
            return None
        sizes = made.shape[2:]
        return made if min(sizes) >= _FEWEST_PIXELS and max(sizes) <= _LARGEST else None

    def forward(self, x: Tensor):
        maps = [x]
        for reads, layer in zip(self.reads, self.layers, strict=True):
            maps.append(layer(*[maps[index] for index in reads]))
        last = maps[-1]
        if self.results == "map":
            return last
        if self.results == "list":
            return [last, maps[len(maps) // 2]]
        logits = self.head(last.mean((2, 3)))
        if self.results == "head":
            return logits
        return {"logits": logits, "map": last, "middle": maps[len(maps) // 2]}


def _materialised(network: RandomNetwork) -> RandomNetwork:
    """Gives parameters, which have shapes alone, the values that PyTorch starts with."""
    network.to_empty(device="cpu")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(len(network.layers))
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return network


def _network(steps: list[Step], size: tuple[int, int], results: str) -> RandomNetwork:
    return _materialised(RandomNetwork(steps, size, results))


_NUMBERS = st.integers(0, 13)

networks = st.builds(
    _network,
    st.lists(
        st.builds(
            Step,
            # What networks have most of is drawn more often.
            st.sampled_from(["convolution", "norm", "activation", "concatenation", *KINDS]),
            st.sampled_from([0, 0, 0, 1, 2, 3, 5]),
            st.sampled_from([1, 2, 3, 4, 0]),
            st.tuples(*[_NUMBERS] * 7),
        ),
        min_size=6,
        max_size=18,
    ),
    st.sampled_from([(16, 16), (15, 22), (9, 32)]),
    st.sampled_from(["map", "head", "list", "dict"]),
)
"""Networks in training mode, whose parameters depend on nothing but the steps."""
