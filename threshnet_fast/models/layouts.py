"""The names of parameters in published checkpoints, and which of this package's each stands for.

A layout says how another package calls the parameters of a network; a checkpoint is of that layout
if it holds every one of those names, behind one common prefix. Nothing is matched by order alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["COUNTER", "Match", "canonical", "is_dotted", "match", "rename_keys"]

COUNTER = "num_batches_tracked"
"""The name of the only buffer that a file may lack: no forward pass reads it."""

# What DataParallel, torch.compile, FSDP and checkpoint_wrapper put before the names of a module.
_WRAPPER = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# "norm.1" is how torchvision called "norm1" while modules' names could hold a dot.
_DOTTED = re.compile(r"(\bdenselayer\d+\.(?:layers\.)?(?:norm|conv))\.([12])\.")

_MOST_PREFIXES = 100


def canonical(name: str) -> str:
    """A parameter's name without what wrappers put into it, and without the dots of old files."""
    return _DOTTED.sub(r"\1\2.", _WRAPPER.sub("", name))


def is_dotted(name: str) -> bool:
    """Whether a name is of torchvision's first releases."""
    return _DOTTED.search(name) is not None


def rename_keys(module: nn.Module, state: MutableMapping[str, Any], prefix: str) -> None:
    """Gives a ``state_dict`` that is about to be loaded the module's own names.

    Names that are those of parameters but for a wrapper's prefix or a dot in them are replaced;
    batch counters are added where there is none at all, as in files that are older than them.

    Args:
        module: What the state is loaded into.
        state: Changed in place.
        prefix: What the names of the module begin with.
    """
    names = [name for name in state if name.startswith(prefix)]
    own = {prefix + name for name, _ in _named_tensors(module)}
    if not own.issuperset(names):
        by_canonical = {canonical(name.removeprefix(prefix)): name for name in own}
        for name in names:
            target = by_canonical.get(canonical(name.removeprefix(prefix)), name)
            if target not in state:
                state[target] = state.pop(name)
    if not any(name.endswith(COUNTER) for name in names):
        for name, buffer in module.named_buffers():
            if name.endswith(COUNTER) and prefix + name.replace(COUNTER, "running_mean") in state:
                value = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer
                state[prefix + name] = value


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


_Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _from_zero(template: str) -> Callable[[re.Match[str]], str]:
    """A replacement whose second number, of a layer, counts from 0."""
    return lambda found: template.format(found[1], int(found[2]) - 1)


@dataclass(frozen=True)
class _Layout:
    """How others call the parameters.

    Attributes:
        name: Of whom.
        rules: Patterns in this package's names, and what stands there instead.
        note: What else differs.
    """

    name: str
    rules: tuple[_Rule, ...]
    note: str = ""


def _cifar_rules(layer: str) -> tuple[_Rule, ...]:
    return (
        (r"^features\.conv0\.", "conv1."),
        (r"^features\.denseblock(\d+)\.denselayer(\d+)\.norm", _from_zero(layer + ".bn")),
        (r"^features\.denseblock(\d+)\.denselayer(\d+)\.conv", _from_zero(layer + ".conv")),
        (r"^features\.transition(\d+)\.norm\.", r"trans\1.bn1."),
        (r"^features\.transition(\d+)\.conv\.", r"trans\1.conv1."),
        (r"^features\.norm5\.", "bn1."),
    )


_LAYOUTS = (
    _Layout("MONAI", ((r"\bdenselayer(\d+)\.", r"denselayer\1.layers."),)),
    _Layout("efficient_densenet_pytorch", ((r"^features\.norm5\.", "features.norm_final."),)),
    _Layout(
        "densenet.pytorch",
        _cifar_rules("dense{}.{}"),
        "the published network ends in a log_softmax, this one returns the logits before it",
    ),
    _Layout("densenet-pytorch", _cifar_rules("block{}.layer.{}")),
)


def _layouts(names: Iterable[str]) -> list[_Layout]:
    """The layouts that a network with these names of its own may have elsewhere."""
    first = next(iter(names), "")
    own = "the model's own names"
    if first.startswith("features.conv0."):
        own = "torchvision"
    elif first.startswith("base.0."):
        own = "HarDNet and ThreshNet"
    return [_Layout(own, ()), *_LAYOUTS]


@dataclass(frozen=True)
class Match:
    """Which name of a file stands for which parameter.

    Attributes:
        layout: Of whom the names are.
        note: What else differs between that package's network and this one.
        prefix: What the file's names begin with.
        mapped: This package's name of each parameter that was found, by the file's.
        missing: Names, of this package, of parameters that the file lacks.
    """

    layout: str
    note: str
    prefix: str
    mapped: Mapping[str, str]
    missing: tuple[str, ...]


def match(found: Iterable[str], wanted: Iterable[str]) -> list[Match]:
    """Finds parameters in a file.

    Args:
        found: The names in the file, in their canonical form.
        wanted: This package's names of the parameters.

    Returns:
        Every way to find all of them, of which there should be one; else the one that finds most,
        if any finds a parameter.
    """
    names = set(found)
    wanted = list(wanted)
    complete: list[Match] = []
    best: Match | None = None
    for layout, foreign in _variants(wanted):
        for prefix in _prefixes(names, foreign[0]):
            pairs = {prefix + name: own for name, own in zip(foreign, wanted, strict=True)}
            mapped = {name: own for name, own in pairs.items() if name in names}
            missing = tuple(
                own for name, own in pairs.items() if name not in names and COUNTER not in own
            )
            candidate = Match(layout.name, layout.note, prefix, mapped, missing)
            if not missing and all(mapped != other.mapped for other in complete):
                complete.append(candidate)
            if best is None or len(mapped) > len(best.mapped):
                best = candidate
    return complete or ([best] if best is not None else [])


def _variants(wanted: list[str]) -> list[tuple[_Layout, list[str]]]:
    """The names of the parameters in each layout, with and without the module around them all."""
    variants: list[tuple[_Layout, list[str]]] = []
    if not wanted:
        return variants
    for layout in _layouts(wanted):
        foreign = wanted
        for pattern, replacement in layout.rules:
            rule = re.compile(pattern)
            foreign = [rule.sub(replacement, name) for name in foreign]
        if layout.rules and foreign == wanted:
            continue
        variants.append((layout, foreign))
        root = foreign[0].partition(".")[0] + "."
        if all(name.startswith(root) for name in foreign):
            variants.append((layout, [name.removeprefix(root) for name in foreign]))
    return variants


def _prefixes(names: Iterable[str], first: str) -> list[str]:
    """What may stand before the name of the first parameter, shortest first."""
    prefixes = {name.removesuffix(first) for name in names if name.endswith(first)}
    whole = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    # A network stands before its layers, whose names may end as that of its first parameter does.
    return sorted(whole, key=lambda prefix: (len(prefix), prefix))[:_MOST_PREFIXES]
