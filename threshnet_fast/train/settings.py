"""Everything that the outcome of a run depends on, as its folder records it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from .recipes import Recipe

__all__ = ["Settings", "differences", "read_settings", "write_settings"]

_FILE = "config.json"
_FORMAT = "threshnet_fast training run"
_MAY_CHANGE = {"epochs", "batch_size", "weights"}
# What runs did before there was a setting for it.
_BEFORE = {"class_weights": "none", "sampling": "uniform", "in_chans": 3}


@dataclass(frozen=True)
class Settings:
    """What a run trains, on what, and how.

    Attributes:
        model: Name of the network.
        dataset: Name of the data set.
        num_classes: Its classes.
        train_images: Its training images.
        recipe: How the network is trained.
        image_size: Height and width of the network's input.
        interpolation: Of the resizing to that.
        seed: Of the weights, the order and the augmentation.
        images_per_step: Images of a step, of all processes and accumulated batches.
        accumulate: Batches whose gradients are added up before a step.
        amp: ``""``, ``"bfloat16"`` or ``"float16"``.
        sync_batchnorm: Whether BatchNorm takes the statistics of all processes.
        classes: Names of the classes, in the order of the outputs.
        in_chans: Channels of the network's input: 3 for colours, 1 for grey.
        mean: Of each channel, subtracted from pixels between 0 and 1; empty: the data set's.
        std: What each channel is divided by after that, likewise.
        weights: The weights that the run started from, by their SHA-256; empty: random ones.
    """

    model: str
    dataset: str
    num_classes: int
    train_images: int
    recipe: Recipe
    image_size: tuple[int, int]
    interpolation: str
    seed: int
    images_per_step: int
    accumulate: int = 1
    amp: str = ""
    sync_batchnorm: bool = False
    classes: tuple[str, ...] = ()
    in_chans: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weights: str = ""

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold, as JSON gives it back."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content


def write_settings(output: Path, settings: Settings) -> None:
    """Records the settings of a run in its folder."""
    write_json(output / _FILE, {"format": _FORMAT, **settings.to_json()})


def read_settings(output: Path) -> dict[str, Any] | None:
    """Returns the settings that a folder records, or None where it holds no run.

    Raises:
        ValueError: The file is none of ours.
    """
    path = output / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} does not describe a training run")
    return content


def differences(recorded: Mapping[str, Any], wanted: Settings) -> list[str]:
    """Names what differs between a recorded run and the settings that are wanted now.

    What may change is left out: the number of epochs, how a step's images are divided among
    processes, and the weights that the run started from, which only matter at the start. A setting
    that the record does not know is one that a newer version added: it is not compared, unless it
    is known what all runs did before.
    """
    found = []

    def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> None:
        old = {**_BEFORE, **old}
        for name in new:
            if name not in old or name in _MAY_CHANGE:
                continue
            if isinstance(old[name], dict) and isinstance(new[name], dict):
                compare(old[name], new[name], f"{prefix}{name}.")
            elif old[name] != new[name]:
                found.append(f"{prefix}{name} was {old[name]!r:.80}, not {new[name]!r:.80}")

    compare(recorded, wanted.to_json(), "")
    return found
