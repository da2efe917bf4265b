"""``threshnet-fast evaluate``: how well a trained network does on images with known classes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CommandError
from .arguments import add_run_arguments, check_model, positive_integer, prepare_run
from .unreadable import add_reading_arguments, find_unreadable

if TYPE_CHECKING:
    from ..data.dataset import FolderSet
    from ..data.images import ImageSet
    from ..models.weights_file import ModelInfo
    from ..train.evaluation import Evaluation, TestBatches

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "measure a trained network on images with known classes"

DESCRIPTION = """\
Runs a trained network on test images and prints its accuracy, of all images and of each class. The
images are those of a folder (DIR/val/CLASS/*, or DIR/CLASS/*), or the test images of CIFAR or SVHN.
Classes are matched by their names: the data may lack some of the network's, but have no other."""

# More classes are not listed, but are in what --json and --output write.
_LISTED = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    from ..data.sources import NAMES

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a run, NAME.safetensors, weights of others (.pth, .pt), or the name of a "
        "model with shipped weights",
    )
    parser.add_argument(
        "--pretrained", metavar="NAME", help="which of the shipped weights, where there are several"
    )
    what = parser.add_argument_group("data")
    what.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder of the images"
    )
    what.add_argument("--dataset", choices=NAMES, default="folder", help="default %(default)s")
    add_reading_arguments(what)
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--batch-size", type=positive_integer, default=64, metavar="N", help="default %(default)s"
    )
    add_run_arguments(how)
    results = parser.add_argument_group("results")
    results.add_argument("--json", action="store_true", help="print JSON")
    results.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write evaluation.json, confusion.csv and confusion.png to",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ..engines.select import use_backend
    from ..train.evaluation import evaluate

    place = prepare_run(arguments)
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise CommandError(f"--output {arguments.output} is no folder", status=2)
    model, info = _load(arguments)
    model.to(place)
    try:
        images, left_out = _images(arguments, info)
        with use_backend(arguments.backend):
            batches = _batches(images, info, arguments, place)
            result = evaluate(model, batches, len(info.classes), _on(place))
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not math.isfinite(result.loss):
        raise CommandError(f"{arguments.model} gives no numbers: its loss is {result.loss}")
    content = _as_json(arguments, info, result, left_out)
    if arguments.output is not None:
        _write(arguments.output, content, result, info)
    if arguments.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print(content)
    return 0


def _on(place: torch.device) -> Any:
    from ..train.distributed import Processes

    return Processes(device=place)


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, ModelInfo]:
    from ..models import create_model
    from ..models.pretrained import find_pretrained
    from ..models.weights_file import check_finite
    from .foreign import load_any

    path = Path(arguments.model)
    try:
        if path.exists() or len(path.parts) > 1 or path.suffix:
            if arguments.pretrained is not None:
                raise CommandError("--pretrained: MODEL is a file, leave this out", status=2)
            model, info, assumed = load_any(path, None)
            check_finite(model)
            if assumed is not None:
                print(f"threshnet-fast evaluate: {assumed}", file=sys.stderr)
            return model, info
        check_model(arguments.model)
        weights = find_pretrained(arguments.model, arguments.pretrained or True)
        return create_model(arguments.model, pretrained=weights.tag).eval(), weights.info
    except (OSError, ValueError) as error:
        raise CommandError(f"{arguments.model}: {error}", status=2) from error


def _images(
    arguments: argparse.Namespace, info: ModelInfo
) -> tuple[FolderSet | ImageSet, list[tuple[Path, str]]]:
    """The test images, labelled by the model's classes, and the pictures that were left out."""
    from ..data import sources
    from ..data.errors import DataError
    from ..data.folder import load_test_folder
    from ..data.images import ImageSet
    from ..train.distributed import Processes

    channels = len(info.mean)
    if arguments.dataset == "folder":
        found = load_test_folder(arguments.data, info.classes, channels)
        unreadable = find_unreadable(arguments, found.paths, channels, Processes())
        rest = found.without({path for path, _ in unreadable})
        if not len(rest):
            raise DataError(f"{arguments.data}: none of its {len(found)} pictures can be read")
        return rest, unreadable
    data = sources.load(
        arguments.dataset, arguments.data, not arguments.no_verify, channels=channels
    )
    unknown = sorted(set(data.classes) - set(info.classes))
    if unknown:
        raise DataError(
            f"{data.name} has classes that the model does not: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}"
        )
    assert isinstance(data.test, ImageSet)
    labels = torch.tensor([info.classes.index(name) for name in data.classes])
    return replace(data.test, labels=labels[data.test.labels]), []


class _Photographs:
    """Pictures of any size for a network that was trained on small ones, seen as by ``predict``."""

    def __init__(self, images: FolderSet, info: ModelInfo, size: int, place: torch.device) -> None:
        self._images = images
        self._info = info
        self._size = size
        self._place = place

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image once, in order."""
        from ..data.pictures import read_pixels
        from ..data.preprocessing import preprocess

        channels = self._images.channels
        for start in range(0, len(self._images), self._size):
            part = slice(start, start + self._size)
            inputs = [
                preprocess(read_pixels(path, channels), self._info)
                for path in self._images.paths[part]
            ]
            yield torch.cat(inputs).to(self._place), self._images.labels[part].to(self._place)


def _batches(
    images: FolderSet | ImageSet,
    info: ModelInfo,
    arguments: argparse.Namespace,
    place: torch.device,
) -> TestBatches:
    from ..data.augment import Preparation
    from ..data.dataset import FolderSet
    from ..data.folder import FolderBatches
    from ..data.images import ImageBatches

    preparation = Preparation(info.mean, info.std, info.image_size, info.interpolation)
    size = arguments.batch_size
    if isinstance(images, FolderSet) and info.source_size is not None:
        return _Photographs(images, info, size, place)
    if isinstance(images, FolderSet):
        return FolderBatches(
            images,
            preparation,
            size,
            device=place,
            workers=arguments.workers,
            crop_fraction=info.crop_fraction,
        )
    return ImageBatches(images, preparation, size, device=place)


def _as_json(
    arguments: argparse.Namespace,
    info: ModelInfo,
    result: Evaluation,
    left_out: list[tuple[Path, str]],
) -> dict[str, Any]:
    counts = result.confusion.sum(1).tolist()
    accuracies = result.describe(info.classes)["class_accuracy"]
    return {
        "model": info.model,
        "weights": arguments.model,
        "dataset": arguments.dataset,
        "data": str(arguments.data),
        "images": result.count,
        "loss": result.loss,
        "top1": result.accuracy,
        "top5": result.top5_accuracy,
        "classes": {
            name: {"images": count, "accuracy": accuracies[name]}
            for name, count in zip(info.classes, counts, strict=True)
        },
        "left_out": [{"picture": str(path), "error": reason} for path, reason in left_out],
    }


def _write(output: Path, content: dict[str, Any], result: Evaluation, info: ModelInfo) -> None:
    from ..files import write_json
    from ..train import figures

    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "evaluation.json", content)
        figures.write_confusion(output / "confusion.csv", result.confusion, info.classes)
        figures.draw_confusion(output / "confusion.png", result.confusion, info.classes)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    except OSError as error:
        raise CommandError(f"cannot write to {output}: {error.strerror}") from error


def _print(content: dict[str, Any]) -> None:
    from ..text import printable

    print(
        f"{content['images']} images: top-1 {content['top1']:.2%}, top-5 {content['top5']:.2%}, "
        f"loss {content['loss']:.4f}"
    )
    classes = content["classes"]
    if len(classes) > _LISTED:
        return
    names = {name: printable(name) for name in classes}
    width = max(map(len, names.values()))
    for name, entry in classes.items():
        share = "no images" if entry["accuracy"] is None else f"{entry['accuracy']:7.2%}"
        of = f" of {entry['images']}" if entry["images"] else ""
        print(f"  {names[name].ljust(width)}  {share}{of}")
