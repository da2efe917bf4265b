"""Networks of other packages, taken over as networks of this one by their parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .densenet import DenseNet
from .network import Network
from .registry import create_model, list_models

__all__ = ["adopt"]

_PROBE_IMAGES = 2
# Of the largest output; float32 on different orders of additions stays far below.
_TOLERANCE = 1e-3


def adopt(module: nn.Module) -> Network:
    """Builds the network of this package that has a module's parameters, and computes the same.

    Parameters are recognised by their names and shapes: any DenseNet with those of torchvision's,
    and every registered network. Both then run once on random images, in float32 and evaluation
    mode, as names alone do not tell how parameters are used.

    Args:
        module: A classifier of images, which stays as it is.

    Returns:
        A network with copies of the parameters, of their dtype, on their device, in evaluation
        mode.

    Raises:
        TypeError: No network has such parameters, or the one that has computes something else.
    """
    kind = type(module).__name__
    state = {key: value.detach() for key, value in module.state_dict().items()}
    network = _with_parameters(state)
    if network is None:
        raise TypeError(
            f"module is a {kind}: expected a model of threshnet_fast, or one with the parameters "
            "of a DenseNet or of a registered model"
        )
    weight = next(iter(state.values()))
    network.to_empty(device=weight.device)
    network.to(weight.dtype).load_state_dict(state)
    difference = _difference(module, network.eval())
    if difference is not None:
        found = type(network).__name__
        raise TypeError(f"module is a {kind} with the parameters of a {found}, but {difference}")
    return network


def _with_parameters(state: Mapping[str, Tensor]) -> Network | None:
    """The network with parameters of these names and shapes, without values; or None."""
    shapes = {key: value.shape for key, value in state.items()}
    with torch.device("meta"):
        for network in _candidates(state):
            if {key: value.shape for key, value in network.state_dict().items()} == shapes:
                return network
    return None


def _candidates(state: Mapping[str, Tensor]) -> Iterator[Network]:
    keys = list(state)
    if not keys or not keys[-1].endswith(".bias") or state[keys[0]].ndim != 4:
        return
    classes, in_chans = len(state[keys[-1]]), state[keys[0]].shape[1]
    if keys[0] == "features.conv0.weight":
        densenet = _densenet(state, classes, in_chans)
        if densenet is not None:
            yield densenet
    elif keys[0] == "base.0.conv.weight":
        for name in list_models():
            yield cast(Network, create_model(name, num_classes=classes, in_chans=in_chans))


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
    if conv2 is None:
        return None
    growth_rate, width = conv2.shape[:2]
    transition = state.get("features.transition1.conv.weight")
    outputs, inputs = (1, 1) if transition is None else transition.shape[:2]
    return DenseNet(
        first_channels=len(state["features.conv0.weight"]),
        blocks=blocks,
        growth_rate=growth_rate,
        bottleneck=max(width // growth_rate, 1),
        compression=min(outputs / inputs, 1.0),
        small_stem="features.norm0.weight" not in state,
        num_classes=classes,
        in_chans=in_chans,
    )


def _difference(module: nn.Module, network: Network) -> str | None:
    """What two modules differ in on random images, or None."""
    size = 2 * network.min_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_IMAGES, network.in_chans, size, size, generator=generator)
    x = x.to(network._first_weight.device)
    from ..backends.select import use_backend

    with torch.no_grad(), use_backend("reference"):
        expected = copy.deepcopy(network).float()(x)
        try:
            actual = copy.deepcopy(module).float().eval()(x)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            return f"it does not run on images of {size}x{size}: {reason}"
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return "it returns something else than logits"
    if not (actual - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        return "it computes something else"
    return None
