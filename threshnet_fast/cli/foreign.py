"""Weights without a description: which network they are of, and what is assumed of its input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError
from ..models.imagenet import average
from .arguments import check_model

if TYPE_CHECKING:
    from torch import nn

    from ..models.checkpoints import CheckpointReport
    from ..models.weights_file import ModelInfo

__all__ = ["load_any", "load_foreign"]

# Networks of images this small are trained on whole images.
_WHOLE_UP_TO = 64
# torchxrayvision's pixels lie between -1024 and 1024.
_XRAY = ((0.5,), (1 / 2048,))


def load_foreign(
    path: str | Path,
    name: str | None,
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    crop_fraction: float | None = None,
) -> tuple[nn.Module, ModelInfo, CheckpointReport]:
    """Loads weights that others wrote, and describes them.

    Args:
        path: The file.
        name: Of the registered model; None for the only one that fits.
        classes: Their names; None for their numbers.
        mean: What is subtracted from each channel; None for ImageNet's, of one channel the average
            of that, and for torchxrayvision's files what that package uses.
        std: What each channel is divided by; None as for ``mean``.
        image_size: None for the model's own.
        crop_fraction: None for the model's own, and all of the image where that is small.

    Returns:
        The model, in evaluation mode, its description, and what was loaded.

    Raises:
        CommandError: There is no such model, or the values do not fit the network.
        OSError: The file cannot be read.
        ValueError: It does not hold the weights of the model.
    """
    from ..models.checkpoints import create_from_checkpoint
    from ..models.weights_file import ModelInfo

    if name is not None:
        check_model(name)
    name, model, report = create_from_checkpoint(path, name)
    network: Any = model
    outputs, channels = network.num_classes, network.in_chans
    if classes is None:
        classes = [str(number) for number in range(outputs)]
    if len(classes) != outputs:
        raise CommandError(f"--classes names {len(classes)} classes, the network has {outputs}", 2)
    defaults = network.default_cfg
    assumed = (defaults["mean"], defaults["std"])
    if channels == 1 and any(key.endswith("op_threshs") for key in report.ignored):
        assumed = _XRAY
    mean = _each_channel("--mean", mean, assumed[0], channels)
    std = _each_channel("--std", std, assumed[1], channels)
    size = tuple(defaults["input_size"][1:]) if image_size is None else image_size
    if crop_fraction is None:
        crop_fraction = 1.0 if max(size) <= _WHOLE_UP_TO else defaults["crop_pct"]
    info = ModelInfo(
        model=name,
        classes=tuple(classes),
        mean=mean,
        std=std,
        image_size=(size[0], size[1]),
        arguments={"num_classes": outputs, "in_chans": channels},
        interpolation=defaults["interpolation"],
        crop_fraction=crop_fraction,
        extra={"converted_from": Path(path).name, "layout": report.layout},
    )
    return model, info, report


def _each_channel(
    option: str, given: Sequence[float] | None, assumed: Sequence[float], channels: int
) -> tuple[float, ...]:
    """A value of each channel: those that were given, or else what is assumed or its average."""
    if given is None:
        given = assumed if len(assumed) == channels else average(assumed)
    elif len(given) not in (1, channels):
        raise CommandError(f"{option} has {len(given)} values: expected 1 or {channels}", status=2)
    return tuple(given) * (1 if len(given) == channels else channels)


def load_any(path: str | Path, name: str | None) -> tuple[nn.Module, ModelInfo, str | None]:
    """Loads what a command of this package wrote, or weights that others did.

    Args:
        path: As the user gave it.
        name: Of the registered model, for weights of others.

    Returns:
        The model, in evaluation mode, its description, and in one line what of it is assumed, or
        None where the file says it.

    Raises:
        CommandError: ``name`` is given where the file says what it is, or is no model.
        OSError: The file cannot be read.
        ValueError: It does not hold the weights of the model.
    """
    from ..models.create import load_model
    from ..models.weights_file import is_pair

    # A name that train would have written, but is not there, is a missing file of its kind.
    described = is_pair(path) or (Path(path).suffix == ".safetensors" and not Path(path).exists())
    if not described:
        model, info, report = load_foreign(path, name)
        return model, info, _assumptions(info, report)
    if name is not None:
        raise CommandError(f"--model: {path} says what it is, leave this out", status=2)
    return *load_model(path), None


def _assumptions(info: ModelInfo, report: CheckpointReport) -> str:
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (info.mean, info.std))
    height, width = info.image_size
    return (
        f"{info.model} with the names of {report.layout}; the file does not say, and it is "
        f"assumed: mean {mean}, std {std}, {height}x{width}, classes by number "
        "(threshnet-fast convert sets them)"
    )
