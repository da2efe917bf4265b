"""Models by name, with weights where they are wanted, and from files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .features import FeatureExtractor
from .network import Network
from .registry import find_builder

if TYPE_CHECKING:
    from .weights_file import ModelInfo

__all__ = ["create_model", "load_model"]


def create_model(
    name: str,
    *,
    pretrained: str | bool | None = None,
    features_only: bool = False,
    out_indices: Iterable[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        name: One of :func:`list_models`.
        pretrained: Name of trained weights that come with the package, for example ``"cifar10"``,
            or True where there is only one choice. ``num_classes`` is then theirs by default; with
            another, the classifier is a new one. ``default_cfg`` says how they take their input,
            and the names of their ``classes``.
        features_only: Whether to return the maps of several stages rather than logits: the result
            is a :class:`~threshnet_fast.models.FeatureExtractor`.
        out_indices: Of which stages, as there; needs ``features_only``.
        **kwargs: Passed to the model, for example ``num_classes`` or ``in_chans``.

    Raises:
        TypeError: ``name`` or ``pretrained`` is of the wrong type, or the model takes no such
            keyword.
        ValueError: No model is called ``name``, or it has no such weights; the message suggests
            the nearest. Or the weights were trained on another number of channels, or
            ``out_indices`` names no stages.
    """
    builder = find_builder(name)
    if out_indices is not None and not features_only:
        raise ValueError("out_indices is given: expected features_only=True with it")
    if pretrained is None or pretrained is False:
        model = builder(**kwargs)
    else:
        # Not at import: hardly any use of the package needs it.
        from .pretrained import create_pretrained, find_pretrained

        model = create_pretrained(builder, find_pretrained(name, pretrained), kwargs)
    return FeatureExtractor(cast(Network, model), out_indices) if features_only else model


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, *, check: bool = True
) -> tuple[nn.Module, ModelInfo]:
    """Builds the model that a pair of files holds, in evaluation mode.

    Args:
        path: As in :func:`threshnet_fast.train.read_info`.
        dtype: Of the model's parameters.
        check: As in :func:`threshnet_fast.train.load_state`.

    Returns:
        The model and its description.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The files do not belong together, there is no such model, or it has other
            parameters.
    """
    from .checkpoints import load_checkpoint
    from .weights_file import load_state, read_info, weights_path

    info = read_info(path)
    state = load_state(path, dtype, check=check)
    file = weights_path(path)
    arguments = {"num_classes": len(info.classes), **info.arguments}
    try:
        model = create_model(info.model, **arguments).to(dtype)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file.with_suffix('.json')}: {error}") from error
    try:
        load_checkpoint(state, model)
    except ValueError as error:
        reason = str(error).partition(": ")[2]
        raise ValueError(f"{file} does not fit {info.model}: {reason}") from error
    return model.eval(), info
