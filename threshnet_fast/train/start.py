"""What a run starts with: the network, and the trained weights that it begins from, if any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engines.select import use_backend
from ..errors import CommandError
from ..files import sha256
from ..models import create_model, load_checkpoint
from ..models.pretrained import find_pretrained
from ..models.weights_file import DEFAULT_NAME, ModelInfo, is_pair, read_info
from . import checkpoint
from .reporters import Reporter
from .settings import Settings

__all__ = ["Start", "build_model", "find_start", "network_arguments"]


@dataclass(frozen=True)
class Start:
    """The trained weights that a run starts from.

    Attributes:
        path: The file or folder; None where there are none, or a checkpoint goes before them.
        sha256: Of the file of weights; also of those that a resumed run has started from.
        info: What is known of them, if anything is.
    """

    path: Path | None = None
    sha256: str = ""
    info: ModelInfo | None = None


def find_start(
    weights: str | None,
    model: str,
    in_chans: int,
    output: Path,
    recorded: dict[str, Any] | None,
) -> Start:
    """Finds the trained weights that a run is to start from.

    Args:
        weights: What ``--weights`` says; None for none.
        model: Name of the network.
        in_chans: Channels of its input.
        output: The run's folder.
        recorded: What :func:`~.run_folder.recorded` says of it.

    Raises:
        CommandError: There are none of that name, they are those of another network, or the run
            has started from others.
    """
    before = "" if recorded is None else str(recorded.get("weights", ""))
    if recorded is not None and checkpoint.exists(output):
        return Start(sha256=before)
    if weights is None:
        if before:
            raise CommandError(
                f"--output {output} has no checkpoint yet: its run starts from weights, "
                "which --weights must name again",
                status=2,
            )
        return Start()
    path = Path(weights)
    try:
        if not path.exists():
            if len(path.parts) > 1 or path.suffix:
                raise FileNotFoundError("there is no such file or folder")
            path = find_pretrained(model, weights).path
        file = path / DEFAULT_NAME if path.is_dir() else path.with_suffix(".safetensors")
        described = is_pair(path)
        info = read_info(path) if described else None
        digest = sha256(file if described else path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--weights {weights}: {error}", status=2) from error
    if info is not None:
        _check_description(weights, info, model, in_chans)
    if recorded is not None and digest != before:
        raise CommandError(
            f"--weights {weights}: the run in {output} starts from others",
            status=2,
        )
    return Start(path, digest, info)


def _check_description(weights: str, info: ModelInfo, model: str, in_chans: int) -> None:
    problem = None
    if info.model != model:
        problem = f"they are those of {info.model}, not of {model}"
    elif len(info.mean) != in_chans:
        problem = f"they are for {len(info.mean)} channels: expected --in-chans {len(info.mean)}"
    if problem is not None:
        raise CommandError(f"--weights {weights}: {problem}", status=2)


def build_model(
    settings: Settings, start: Start, reporter: Reporter, device: torch.device
) -> nn.Module:
    """Builds the network, and sees that it takes what it is going to be given.

    Args:
        settings: What the outcome depends on.
        start: The weights to load into it.
        reporter: Is told what was loaded.
        device: Where the network is going to be.

    Raises:
        CommandError: The network cannot be trained so.
    """
    torch.manual_seed(settings.seed)
    arguments = network_arguments(settings)
    if settings.recipe.drop_rate:
        arguments["drop_rate"] = settings.recipe.drop_rate
    try:
        model = create_model(settings.model, **arguments)
        if start.path is not None:
            _load_weights(model, start.path, reporter)
        model.to(device)
        # Missing from the annotations of Module.to.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        image = torch.zeros(1, settings.in_chans, *settings.image_size, device=device)
        with use_backend("reference"), torch.no_grad():
            outputs = model.eval()(image)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{settings.model} cannot be trained so: {error}", status=2) from error
    if outputs.shape != (1, settings.num_classes):
        raise CommandError(
            f"{settings.model} gives {tuple(outputs.shape)} for one image: expected "
            f"{settings.num_classes} classes"
        )
    return model


def network_arguments(settings: Settings) -> dict[str, Any]:
    """Keywords for ``create_model``, as the description of the trained model has them."""
    channels = {} if settings.in_chans == 3 else {"in_chans": settings.in_chans}
    return {"num_classes": settings.num_classes, **channels}


def _load_weights(model: nn.Module, path: Path, reporter: Reporter) -> None:
    try:
        report = load_checkpoint(path, model, new_classifier=True)
    except (OSError, TypeError, ValueError) as error:
        raise CommandError(f"--weights {path}: {error}", status=2) from error
    new = f"; new: {', '.join(report.initialised)}" if report.initialised else ""
    reporter.note(f"starts from {len(report.mapped)} tensors of {report.source}{new}")
