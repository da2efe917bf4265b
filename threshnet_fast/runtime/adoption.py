"""Networks of other packages, taken over as networks of this one by their parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.create import create_model
from ..models.densenet import DenseNet
from ..models.network import Network
from ..models.registry import list_models

__all__ = ["Adopted", "NotAdopted", "adopt"]

# The first parameters of the networks that are recognised: DenseNets, and those of a flat list.
_DENSE, _FLAT = "features.conv0.weight", "base.0.conv.weight"
_FIRST = {_DENSE, _FLAT}

# Of the largest output; float32 on different orders of additions stays far below.
_TOLERANCE = 1e-3


class NotAdopted(Exception):
    """Why no network of this package stands for a module, in one line."""


class Adopted(NamedTuple):
    """What computes the same as a module.

    Attributes:
        network: A network of this package with the module's parameters.
        head: What the module does with the network's output, a copy of a part of it; None for
            nothing.
    """

    network: Network
    head: nn.Module | None


def adopt(module: nn.Module, example: Tensor) -> Adopted:
    """Builds the network of this package that has a module's parameters, and computes the same.

    Parameters are recognised by their names and shapes: any DenseNet with those of torchvision's,
    and every registered network, with any head. Both run on the example and on random images of
    its size, in float32 and evaluation mode, as names alone do not tell how parameters are used.

    Args:
        module: A network for images, which stays as it is; perhaps as the only part of another.
        example: An input, ``[N, C, H, W]``.

    Returns:
        A network with copies of the parameters, of their dtype, on their device, in evaluation
        mode, and the head.

    Raises:
        NotAdopted: No network has such parameters, or those that have compute something else.
    """
    kind = type(module).__name__
    inner = module
    while not _FIRST.intersection(list(inner.state_dict())[:1]) and _is_wrapper(inner):
        (inner,) = inner.children()
    state = {key: value.detach() for key, value in inner.state_dict().items()}
    found: tuple[Network, str] | None = None
    for candidate in _candidates(inner, state):
        difference = _difference(module, candidate, example)
        if difference is None:
            return candidate
        found = candidate.network, difference
    if found is None:
        raise NotAdopted(
            f"the module is a {kind}, which is neither a model of threshnet_fast nor has the "
            "parameters of a DenseNet or of a registered model"
        )
    network, difference = found
    raise NotAdopted(
        f"the module is a {kind} with the parameters of a {type(network).__name__}, but "
        f"{difference}"
    )


def _is_wrapper(module: nn.Module) -> bool:
    return len(list(module.children())) == 1 and not (module._parameters or module._buffers)


def _candidates(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[Adopted]:
    """Networks with a module's parameters and their values, and heads that may go with them."""
    keys = list(state)
    if not keys or state[keys[0]].ndim != 4:
        return
    in_chans = state[keys[0]].shape[1]
    if keys[0] == _DENSE:
        yield from _densenets(module, state, in_chans)
    elif keys[0] == _FLAT:
        base = getattr(module, "base", None)
        classes = len(state[keys[-1]]) if keys[-1].endswith(".bias") else 0
        for name in list_models():
            options: list[tuple[dict[str, Any], nn.Module | None]] = [
                ({"num_classes": classes}, None),
                ({"num_classes": 0, "global_pool": ""}, None),
            ]
            if isinstance(base, nn.ModuleList | nn.Sequential):
                options.append(({"num_classes": 0, "global_pool": ""}, base[-1]))
            for arguments, head in options:
                with torch.device("meta"):
                    network = create_model(name, in_chans=in_chans, **arguments)
                if isinstance(network, Network) and _fill(
                    network, state, head, f"base.{_last(base)}"
                ):
                    yield Adopted(network, _frozen(head))


def _last(modules: object) -> int:
    return len(modules) - 1 if isinstance(modules, nn.ModuleList | nn.Sequential) else 0


def _densenets(module: nn.Module, state: Mapping[str, Tensor], in_chans: int) -> Iterator[Adopted]:
    classifier = getattr(module, "classifier", None)
    head = classifier if isinstance(classifier, nn.Module) else None
    linear = _as_linear(head)
    prefix = "classifier"
    if linear is not None:
        # A dropout, say, is nothing in evaluation mode.
        state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}.")}
        for name, value in linear.state_dict().items():
            state[f"{prefix}.{name}"] = value.detach()
        head = None
    elif isinstance(head, nn.Identity):
        head = None
    with torch.device("meta"):
        network = _densenet(state, 0 if linear is None else linear.out_features, in_chans)
        if network is not None and linear is not None and "classifier.bias" not in state:
            network.classifier = nn.Linear(linear.in_features, linear.out_features, bias=False)
    if network is not None and _fill(network, state, head, prefix):
        yield Adopted(network, _frozen(head))


def _as_linear(head: nn.Module | None) -> nn.Linear | None:
    """The one linear layer that a head is in evaluation mode, or None."""
    parts = list(head) if type(head) is nn.Sequential else [head]
    parts = [part for part in parts if type(part) not in (nn.Dropout, nn.Identity)]
    return parts[0] if len(parts) == 1 and type(parts[0]) is nn.Linear else None


def _frozen(head: nn.Module | None) -> nn.Module | None:
    return None if head is None else copy.deepcopy(head).eval()


def _fill(
    network: Network, state: Mapping[str, Tensor], head: nn.Module | None, prefix: str
) -> bool:
    """Gives a network on the meta device its values; False where others are left, or missing."""
    own = network.state_dict()
    left = {key: value for key, value in state.items() if key not in own}
    if head is None and left:
        return False
    if any(not key.startswith(f"{prefix}.") for key in left):
        return False
    mine = {key: value for key, value in state.items() if key not in left}
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in own.items()}:
        return False
    weight = next(iter(mine.values()))
    network.to_empty(device=weight.device)
    network.to(weight.dtype).load_state_dict(mine)
    network.eval()
    return True


def _densenet(state: Mapping[str, Tensor], classes: int, in_chans: int) -> DenseNet | None:
    blocks: list[int] = []
    while f"features.denseblock{len(blocks) + 1}.denselayer1.conv1.weight" in state:
        block = f"features.denseblock{len(blocks) + 1}.denselayer"
        layers = 1
        while f"{block}{layers + 1}.conv1.weight" in state:
            layers += 1
        blocks.append(layers)
    first = "features.denseblock1.denselayer1"
    conv2 = state.get(f"{first}.conv2.weight")
    if conv2 is None or conv2.ndim != 4:
        return None
    growth_rate, width = conv2.shape[:2]
    transitions = [state.get(f"features.transition{i}.conv.weight") for i in range(1, len(blocks))]
    if any(transition is None for transition in transitions):
        return None
    return DenseNet(
        first_channels=len(state["features.conv0.weight"]),
        blocks=blocks,
        growth_rate=growth_rate,
        bottleneck=max(width // growth_rate, 1),
        transitions=[len(transition) for transition in transitions if transition is not None],
        small_stem="features.norm0.weight" not in state,
        num_classes=classes,
        in_chans=in_chans,
    )


def _difference(module: nn.Module, adopted: Adopted, example: Tensor) -> str | None:
    """What a module and what may stand for it differ in, or None."""
    network, head = copy.deepcopy(adopted.network), copy.deepcopy(adopted.head)
    if not isinstance(example, Tensor) or example.ndim != 4:
        return "its input is no batch of images"
    if min(example.shape[2:]) < network.min_size:
        return f"its input is smaller than {network.min_size}x{network.min_size}"
    # An example may be all zeros.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(1, len(example)), *example.shape[1:], generator=generator)
    from ..engines.select import use_backend

    network.float()
    module = copy.deepcopy(module).float().eval()
    with torch.no_grad(), use_backend("reference"):
        for x in (noise.to(example.device), example.float()):
            if not len(x):
                continue
            expected = module(x)
            try:
                actual = network(x)
                actual = actual if head is None else head.float()(actual)
            except (RuntimeError, TypeError, ValueError) as error:
                return f"it does not run as one: {str(error).partition(chr(10))[0]}"
            if not isinstance(expected, Tensor) or actual.shape != expected.shape:
                return "it returns something else"
            limit = _TOLERANCE * expected.abs().max()
            if not torch.allclose(actual, expected, rtol=0, atol=float(limit), equal_nan=True):
                return "it computes something else"
    return None
