"""Trained weights that come with the package.

``weights/`` beside this file holds, for each of them, ``MODEL_TAG.safetensors`` in half precision
and ``MODEL_TAG.json``, which says what they are; ``threshnet-fast export`` writes both. They are
found by looking there: this module knows no weights by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .weights_file import ModelInfo

__all__ = ["Pretrained", "create_pretrained", "find_pretrained", "list_pretrained"]

_FOLDER = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Pretrained:
    """Weights that are shipped.

    Attributes:
        model: Name of the model, for :func:`threshnet_fast.create_model`.
        tag: What its argument ``pretrained`` takes.
        path: The file of weights.
        sha256: Its checksum, which is compared when it is read.
        info: Classes, normalisation, input size, recipe, accuracy.
        license: Under which the weights may be used.
        note: What to know about them, in a few sentences.
    """

    model: str
    tag: str
    path: Path
    sha256: str
    info: ModelInfo
    license: str
    note: str


def list_pretrained(model: str | None = None) -> list[Pretrained]:
    """The weights that are shipped, sorted by model and tag.

    Args:
        model: Name of a model whose weights are wanted; None for all.

    Raises:
        TypeError: ``model`` is no string.
        ValueError: A file of the installation is damaged.
    """
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model is a {type(model).__name__}: expected a str or None")
    from .weights_file import read_info

    found = []
    for path in sorted(_FOLDER.glob("*.safetensors")):
        info = read_info(path)
        prefix = f"{info.model}_"
        if not path.stem.startswith(prefix):
            raise ValueError(f"{path} holds a {info.model}: expected a name with {prefix!r}")
        found.append(
            Pretrained(
                info.model,
                path.stem.removeprefix(prefix),
                path,
                str(info.extra.get("sha256", "")),
                info,
                str(info.extra.get("license", "")),
                str(info.extra.get("note", "")),
            )
        )
    return [weights for weights in found if model in (None, weights.model)]


def find_pretrained(model: str, tag: str | bool = True) -> Pretrained:
    """Finds weights.

    Args:
        model: Name of the model.
        tag: Which of its weights; True where there is only one choice.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There are none of that name; the message says which there are.
    """
    if not isinstance(model, str):
        raise TypeError(f"model is a {type(model).__name__}: expected a str")
    if tag is not True and not isinstance(tag, str):
        raise TypeError(f"pretrained is {tag!r}: expected the name of weights, True or None")
    everything = list_pretrained()
    by_tag = {weights.tag: weights for weights in everything if weights.model == model}
    if tag is True and len(by_tag) == 1:
        return next(iter(by_tag.values()))
    if tag in by_tag:
        return by_tag[str(tag)]
    if not by_tag:
        shipped = ", ".join(f"{weights.model} ({weights.tag})" for weights in everything)
        raise ValueError(
            f"pretrained is {tag!r}, but no trained weights of {model} are shipped; there are "
            + (f"some of {shipped}" if shipped else "none of any model in this installation")
        )
    near = difflib.get_close_matches(str(tag).lower(), by_tag, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(by_tag)}"
    raise ValueError(f"pretrained is {tag!r}, which is not among the weights of {model}: {hint}")


def create_pretrained(
    builder: Callable[..., nn.Module], weights: Pretrained, arguments: Mapping[str, Any]
) -> nn.Module:
    """Builds a model with trained weights, in float32.

    Where ``num_classes`` is not that of the weights, the classifier is left as the model
    initialised it. The model's ``default_cfg`` is that of the weights, with their ``classes`` where
    the classifier is theirs.

    Args:
        builder: Builds the model.
        weights: What :func:`find_pretrained` returned.
        arguments: Keywords for ``builder``; ``num_classes`` is by default that of the weights.

    Raises:
        ValueError: ``in_chans`` is not that of the weights, or a file is damaged.
    """
    from .checkpoints import load_checkpoint
    from .weights_file import load_state

    info = weights.info
    classes, channels = len(info.classes), len(info.mean)
    model: Any = builder(**{"num_classes": classes, **info.arguments, **arguments})
    if model.in_chans != channels:
        raise ValueError(
            f"in_chans is {model.in_chans}: expected {channels}, which the weights "
            f"{weights.tag!r} of {weights.model} were trained on"
        )
    with_classifier = model.num_classes == classes
    try:
        load_checkpoint(load_state(weights.path), model, new_classifier=not with_classifier)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error
    model.default_cfg.update(
        input_size=(channels, *info.image_size),
        interpolation=info.interpolation,
        crop_pct=info.crop_fraction,
        mean=info.mean,
        std=info.std,
    )
    if with_classifier:
        model.default_cfg["classes"] = info.classes
    return model
