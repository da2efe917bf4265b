"""``threshnet-fast predict``: what is in a picture."""

from __future__ import annotations

import argparse
import json
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CommandError, print_error
from ..text import printable
from .arguments import add_run_arguments, check_model, positive_integer, prepare_run

if TYPE_CHECKING:
    from ..models.weights_file import ModelInfo

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "classify pictures"

DESCRIPTION = """\
Prints the most probable classes of each picture. Of a folder, all pictures in it and below are
taken. The model is one that comes with the package, by default ThreshNet79 trained on CIFAR-10,
or, with --checkpoint, one that threshnet-fast train, export or convert has written, or a file of
weights of another package (.pth, .pt, .safetensors; docs/checkpoints.md), whose network --model
names.

A network answers with one of its classes whatever it is shown: the default one knows airplane,
automobile, bird, cat, deer, dog, frog, horse, ship and truck, and nothing else."""

_MODEL, _PRETRAINED = "threshnet79", "cifar10"
_TOP = 5
_BATCH = 32


@dataclass(frozen=True)
class _Answer:
    """What the network says about a picture, or why it says nothing."""

    picture: str
    probabilities: Tensor | None = None
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture, or folder of them")
    which = parser.add_argument_group("model")
    which.add_argument("--model", metavar="NAME", help=f"default {_MODEL}")
    which.add_argument(
        "--pretrained", metavar="NAME", help=f"its trained weights (default {_PRETRAINED})"
    )
    which.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="instead: folder of a run, NAME.safetensors, or weights of others (.pth, .pt)",
    )
    how = parser.add_argument_group("how to run it")
    how.add_argument("--top", type=positive_integer, default=_TOP, metavar="N", help="default 5")
    how.add_argument("--json", action="store_true", help="print JSON")
    add_run_arguments(how)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ..engines.select import use_backend

    place = prepare_run(arguments)
    paths = _find(arguments.pictures)
    model, info, source = _load(arguments)
    model.to(place)
    with use_backend(arguments.backend):
        answers = list(_classify(model, info, paths, place))
    if arguments.json:
        print(json.dumps(_as_json(answers, info, source, arguments.top), indent=2))
    else:
        _print(answers, info, arguments.top)
    for answer in answers:
        if answer.error and not arguments.json:
            print_error("predict", answer.error)
    return int(any(answer.error for answer in answers))


def _find(names: Sequence[str]) -> list[Path]:
    """The pictures that were named, and those in folders that were, without repetition.

    Raises:
        CommandError: There is no such file or folder, or no picture in a folder.
    """
    from ..data.errors import DataError
    from ..data.pictures import list_pictures

    found: list[Path] = []
    for name in names:
        # An empty name would be that of the current folder.
        if not name:
            raise CommandError("'': expected the name of a picture or of a folder", status=2)
        path = Path(name)
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
            inside, others = list_pictures(path) if is_folder else ([path], 0)
        except DataError as error:
            raise CommandError(str(error), status=2) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, FileNotFoundError):
                reason = "there is no such file or folder"
            raise CommandError(f"{printable(name)}: {reason}", status=2) from error
        if not inside:
            files = f", only {others} other files" if others else ""
            raise CommandError(
                f"{printable(name)}: there is no picture in this folder{files}", status=2
            )
        found += inside
    return list(dict.fromkeys(found))


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, ModelInfo, dict[str, str]]:
    """The network, its description, and where it is from."""
    from ..models import create_model
    from ..models.pretrained import find_pretrained

    if arguments.checkpoint is not None:
        model, info = _load_checkpoint(arguments)
        return model, info, {"checkpoint": arguments.checkpoint}
    name = arguments.model or _MODEL
    check_model(name)
    try:
        weights = find_pretrained(name, arguments.pretrained or _PRETRAINED)
        model = create_model(name, pretrained=weights.tag).eval()
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    return model, weights.info, {"pretrained": weights.tag}


def _load_checkpoint(arguments: argparse.Namespace) -> tuple[nn.Module, ModelInfo]:
    from ..models.weights_file import check_finite
    from .foreign import load_any

    path = arguments.checkpoint
    if arguments.pretrained is not None:
        raise CommandError("--pretrained: leave this out or --checkpoint", status=2)
    try:
        model, info, assumed = load_any(path, arguments.model)
        check_finite(model)
    except (OSError, ValueError) as error:
        raise CommandError(f"--checkpoint {path}: {error}", status=2) from error
    if assumed is not None:
        print(f"threshnet-fast predict: {assumed}", file=sys.stderr)
    return model, info


def _classify(
    model: nn.Module, info: ModelInfo, paths: Sequence[Path], place: torch.device
) -> Iterator[_Answer]:
    """Yields an answer for each picture, in order."""
    from tqdm import tqdm

    from ..data.errors import PictureError
    from ..data.pictures import read_pixels
    from ..data.preprocessing import preprocess

    channels = 1 if len(info.mean) == 1 else 3
    # The bar would stand between the answers, and is of no use for a few pictures.
    hidden = True if len(paths) <= _BATCH else None
    with tqdm(total=len(paths), desc="predict", unit="picture", disable=hidden, leave=False) as bar:
        for start in range(0, len(paths), _BATCH):
            answers, images = [], []
            for path in paths[start : start + _BATCH]:
                try:
                    images.append(preprocess(read_pixels(path, channels), info))
                    answers.append(_Answer(str(path)))
                except PictureError as error:
                    answers.append(_Answer(str(path), error=str(error)))
            if images:
                with torch.inference_mode():
                    logits = model(torch.cat(images).to(place))
                rows = iter(logits.double().softmax(1).cpu())
                answers = [a if a.error else _judge(a.picture, next(rows)) for a in answers]
            yield from answers
            bar.update(len(answers))


def _judge(picture: str, probabilities: Tensor) -> _Answer:
    if not probabilities.isfinite().all():
        return _Answer(picture, error=f"{printable(picture)}: the network answers with NaN")
    return _Answer(picture, probabilities)


def _best(answer: _Answer, info: ModelInfo, top: int) -> list[tuple[int, str, float]]:
    """Number, name and probability of the most probable classes."""
    assert answer.probabilities is not None
    values, indices = answer.probabilities.topk(min(top, len(info.classes)))
    return [
        (index, info.classes[index], value)
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def _as_json(
    answers: Sequence[_Answer], info: ModelInfo, source: dict[str, str], top: int
) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    for answer in answers:
        result: dict[str, Any] = {"picture": answer.picture}
        if answer.error:
            result["error"] = answer.error
        else:
            result["predictions"] = [
                {"class": name, "index": index, "probability": probability}
                for index, name, probability in _best(answer, info, top)
            ]
        results.append(result)
    return {"model": info.model, **source, "classes": list(info.classes), "results": results}


def _print(answers: Sequence[_Answer], info: ModelInfo, top: int) -> None:
    width = max(len(printable(name)) for name in info.classes)
    blocks = []
    for answer in answers:
        if not answer.error:
            lines = [
                f"  {printable(name).ljust(width)}  {probability:7.2%}"
                for _, name, probability in _best(answer, info, top)
            ]
            blocks.append("\n".join([printable(answer.picture), *lines]))
    if blocks:
        print("\n".join(blocks))
