"""``threshnet-fast train``: trains a network on a data set."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .arguments import (
    check_device,
    check_model,
    device,
    image_size,
    positive_float,
    positive_integer,
)
from .errors import CommandError

if TYPE_CHECKING:
    from ..data.dataset import DataSet
    from ..train.loop import Trainer
    from ..train.recipes import Recipe

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "train a network on CIFAR, SVHN or a folder of images"

DESCRIPTION = """\
Trains a network and writes, into one folder, its weights (model.safetensors and model.json), a
log (log.csv) and checkpoints. A run that was interrupted, however abruptly, goes on with --resume
as if it had not been."""

_DATASETS = ("cifar10", "cifar100")


def _number(text: str) -> float:
    """A finite number from 0 up."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 up")
    return number


def _integer(text: str) -> int:
    """An integer from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from 0 up")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model", nargs="?", default="threshnet79", help="model (default %(default)s)"
    )
    what = parser.add_argument_group("data")
    what.add_argument("--dataset", choices=_DATASETS, default="cifar10", help="default %(default)s")
    what.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="its folder (default data)"
    )
    what.add_argument(
        "--no-verify",
        action="store_true",
        help="accept files of the data set that are not as large as the published ones",
    )
    what.add_argument(
        "--image-size",
        type=image_size,
        metavar="SIZE",
        help="of the network's input, 48 or 48x64 (default: that of the data set's pictures)",
    )
    what.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic"),
        default="bilinear",
        help="of the resizing to that (default %(default)s)",
    )

    how = parser.add_argument_group("recipe")
    how.add_argument(
        "--recipe",
        choices=("modern", "paper"),
        default="modern",
        help="what the options below default to (default %(default)s)",
    )
    how.add_argument("--epochs", type=positive_integer, metavar="N")
    how.add_argument(
        "--batch-size", type=positive_integer, metavar="N", help="images of each process's batch"
    )
    how.add_argument("--optimizer", choices=("sgd", "adam", "adamw"))
    how.add_argument("--schedule", choices=("one-cycle", "steps"))
    how.add_argument("--learning-rate", type=positive_float, metavar="X", help="the highest")
    how.add_argument("--warmup", type=_number, metavar="SHARE", help="of all steps, of one-cycle")
    how.add_argument("--momentum", type=_number, metavar="X")
    how.add_argument("--weight-decay", type=_number, metavar="X")
    how.add_argument(
        "--padding", type=_integer, metavar="N", help="pixels of random shifts; 0 for none"
    )
    how.add_argument("--label-smoothing", type=_number, metavar="X")
    how.add_argument(
        "--ema-decay", type=_number, metavar="X", help="of the weights' average; 0 for none"
    )
    how.add_argument("--clip-norm", type=_number, metavar="X", help="of the gradient; 0 for none")
    how.add_argument("--drop-rate", type=_number, metavar="X", help="dropout before the classifier")
    how.add_argument("--seed", type=_integer, default=0, metavar="N", help="default 0")
    how.add_argument(
        "--accumulate",
        type=positive_integer,
        default=1,
        metavar="N",
        help="batches whose gradients make a step (default 1)",
    )
    how.add_argument(
        "--amp", choices=("bfloat16", "float16"), help="mixed precision; float16 on a GPU only"
    )

    where = parser.add_argument_group("where and how fast")
    where.add_argument(
        "--device", type=device, metavar="DEVICE", help="cpu (the default), cuda or cuda:1"
    )
    where.add_argument("--threads", type=positive_integer, metavar="N", help="default: torch's")
    where.add_argument("--backend", default="auto", metavar="NAME", help="as use_backend takes it")

    files = parser.add_argument_group("files")
    files.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the run"
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on from the folder's last checkpoint; start where there is none",
    )
    files.add_argument(
        "--checkpoint-minutes",
        type=positive_float,
        default=5.0,
        metavar="X",
        help="between checkpoints within an epoch (default 5); every epoch ends with one",
    )
    files.add_argument(
        "--evaluate-every", type=positive_integer, default=1, metavar="N", help="epochs (default 1)"
    )
    files.add_argument(
        "--half", action="store_true", help="write the trained weights in half precision"
    )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from ..train.recipes import RECIPES

    recipe = RECIPES[arguments.recipe]
    names = {field.name for field in dataclasses.fields(recipe)} - {"name"}
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in names and value is not None
    }
    try:
        recipe = dataclasses.replace(recipe, **given)
        recipe.check()
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    return recipe


def _load_data(arguments: argparse.Namespace) -> DataSet:
    from ..data.cifar import CIFAR10, CIFAR100
    from ..data.errors import DataError

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[arguments.dataset]
    try:
        return source.load(arguments.data, verify=not arguments.no_verify)
    except DataError as error:
        raise CommandError(str(error)) from error


def _size(arguments: argparse.Namespace, data: DataSet) -> tuple[int, int]:
    size: tuple[int, int] | None = arguments.image_size or data.source_size
    if size is None:
        raise CommandError("--image-size is missing: the pictures have no size in common", status=2)
    return size


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ..backends.select import check_name
    from ..data.augment import Augmentation, Preparation
    from ..data.images import ImageBatches, Shard
    from ..models import create_model
    from ..train.distributed import Processes
    from ..train.loop import Options, Stopped, Trainer, TrainingDiverged
    from ..train.progress import ConsoleReporter
    from ..train.settings import Settings, differences, read_settings, write_settings
    from ..train.weights import ModelInfo

    check_model(arguments.model)
    recipe = _recipe(arguments)
    place = check_device(arguments.device or torch.device("cpu"))
    if arguments.amp == "float16" and place.type == "cpu":
        raise CommandError("--amp float16 needs a GPU: on the CPU, take bfloat16", status=2)
    try:
        check_name(arguments.backend, "--backend")
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    output: Path = arguments.output
    try:
        recorded = read_settings(output)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if recorded is not None and not arguments.resume:
        raise CommandError(
            f"--output {output} holds a run already: --resume goes on with it, another folder "
            "starts anew",
            status=2,
        )
    data = _load_data(arguments)
    processes = Processes(device=place)
    images_per_step = recipe.batch_size * processes.count * arguments.accumulate
    size = _size(arguments, data)
    settings = Settings(
        model=arguments.model,
        dataset=data.name,
        num_classes=len(data.classes),
        train_images=len(data.train),
        recipe=recipe,
        image_size=size,
        interpolation=arguments.interpolation,
        seed=arguments.seed,
        images_per_step=images_per_step,
        accumulate=arguments.accumulate,
        amp=arguments.amp or "",
    )
    if len(data.train) < images_per_step:
        raise CommandError(
            f"a step takes {images_per_step} images, and there are {len(data.train)} to train on",
            status=2,
        )
    if recorded is not None:
        differing = differences(recorded, settings)
        if differing:
            raise CommandError(
                f"--output {output} holds a run with other settings: {'; '.join(differing)}",
                status=2,
            )
    output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(arguments.seed)
    keywords: dict[str, Any] = {"num_classes": len(data.classes)}
    dropout: dict[str, Any] = {"drop_rate": recipe.drop_rate} if recipe.drop_rate else {}
    model = create_model(arguments.model, **keywords, **dropout)
    model.to(place)
    # Missing from the annotations of Module.to.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    preparation = Preparation(data.mean, data.std, size, arguments.interpolation)
    shard = Shard(processes.rank, processes.count)
    train = ImageBatches(
        data.train,
        preparation,
        recipe.batch_size * processes.count,
        shard,
        arguments.seed,
        Augmentation(recipe.flip, recipe.padding),
        place,
    )
    test = ImageBatches(data.test, preparation, 250, shard, device=place)
    info = ModelInfo(
        model=arguments.model,
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        image_size=size,
        arguments=keywords,
        source_size=data.source_size,
        interpolation=arguments.interpolation,
        dataset=data.name,
        recipe=settings.to_json()["recipe"],
    )
    reporter = ConsoleReporter(recipe.epochs)
    trainer = Trainer(
        settings,
        model,
        train,
        test,
        info,
        output,
        Options(
            backend=arguments.backend,
            checkpoint_seconds=60 * arguments.checkpoint_minutes,
            evaluate_every=arguments.evaluate_every,
            half=arguments.half,
        ),
        reporter,
        processes,
    )
    try:
        if recorded is not None:
            trainer.resume()
        else:
            write_settings(output, settings)
        with _signals(trainer):
            trainer.run()
    except Stopped:
        raise CommandError(
            f"stopped; --resume goes on from the checkpoint in {output}", status=130
        ) from None
    except (TrainingDiverged, ValueError) as error:
        raise CommandError(str(error)) from error
    print(f"wrote {output / 'model.safetensors'}")
    return 0


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Lets the signals that ask a process to end do so after the step that is being made."""

    def stop(number: int, frame: object) -> None:
        # A second one ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        trainer.request_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
