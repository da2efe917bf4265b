"""``threshnet-fast train``: trains a network on a data set."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.errors import DataError
from ..errors import CommandError
from ..models import imagenet
from .arguments import (
    check_device,
    check_model,
    device,
    image_size,
    natural_number,
    positive_float,
    positive_integer,
    threads,
)
from .unreadable import add_reading_arguments, find_unreadable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.dataset import DataSet
    from ..train.distributed import Processes
    from ..train.loop import Trainer
    from ..train.recipes import Recipe
    from ..train.reporters import SilentReporter
    from ..train.settings import Settings
    from ..train.start import Start

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "train a network on CIFAR, SVHN or a folder of images"

DESCRIPTION = """\
Trains a network and writes, into one folder, its weights (model.safetensors and model.json), a
log (log.csv) and checkpoints. A run that was interrupted, however abruptly, goes on with --resume
as if it had not been."""

# Of the images of a folder.
_FOLDER_SIZE = (224, 224)
_TEST_BATCH = 250
# Seconds that a process waits for another, which may be downloading.
_TIMEOUT = 1800.0


def _number(text: str) -> float:
    """A finite number from 0 up."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 up")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model", nargs="?", default="threshnet79", help="model (default %(default)s)"
    )
    _add_data_arguments(parser.add_argument_group("data"))
    _add_recipe_arguments(parser.add_argument_group("recipe"))
    _add_place_arguments(parser.add_argument_group("where and how fast"))
    _add_file_arguments(parser.add_argument_group("files"))


def _add_data_arguments(what: argparse._ArgumentGroup) -> None:
    from ..data.sources import NAMES
    from ..models.weights_file import INTERPOLATIONS

    what.add_argument("--dataset", choices=NAMES, default="cifar10", help="default %(default)s")
    what.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="its folder (default data)"
    )
    what.add_argument(
        "--download", action="store_true", help="fetch what is missing of it, into that folder"
    )
    add_reading_arguments(what)
    what.add_argument(
        "--in-chans",
        type=int,
        choices=(1, 3),
        default=3,
        help="channels of the pictures and of the network's input: 3 colours (default), or 1, grey",
    )
    what.add_argument(
        "--image-size",
        type=image_size,
        metavar="SIZE",
        help="of the network's input, 48 or 48x64 (default: that of the data set's pictures)",
    )
    what.add_argument(
        "--interpolation",
        choices=INTERPOLATIONS,
        default="bilinear",
        help="of the resizing to that (default %(default)s)",
    )


def _add_recipe_arguments(how: argparse._ArgumentGroup) -> None:
    from ..train.recipes import CLASS_WEIGHTS, OPTIMIZERS, RECIPES, SAMPLINGS, SCHEDULES

    how.add_argument(
        "--weights",
        metavar="PATH|NAME",
        help="start from trained weights, with a new classifier where they have another number of "
        "classes: a file or a folder of a run, of another package, or the name of shipped ones, "
        "such as cifar10",
    )
    how.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="modern",
        help="what the options below default to (default %(default)s)",
    )
    how.add_argument(
        "--epochs", type=positive_integer, metavar="N", help="can be raised with --resume"
    )
    how.add_argument(
        "--patience",
        type=positive_integer,
        metavar="N",
        help="stop after N epochs without a better test accuracy (default: never)",
    )
    how.add_argument(
        "--batch-size", type=positive_integer, metavar="N", help="images of each process's batch"
    )
    how.add_argument("--optimizer", choices=OPTIMIZERS)
    how.add_argument("--schedule", choices=SCHEDULES)
    how.add_argument("--learning-rate", type=positive_float, metavar="X", help="the highest")
    how.add_argument("--warmup", type=_number, metavar="SHARE", help="of all steps, of one-cycle")
    how.add_argument("--momentum", type=_number, metavar="X")
    how.add_argument("--weight-decay", type=_number, metavar="X")
    how.add_argument(
        "--padding", type=natural_number, metavar="N", help="pixels of random shifts; 0 for none"
    )
    how.add_argument(
        "--crop-scale",
        type=_number,
        metavar="X",
        help="smallest share of its area that a random crop keeps; of folders",
    )
    how.add_argument("--label-smoothing", type=_number, metavar="X")
    how.add_argument(
        "--ema-decay", type=_number, metavar="X", help="of the weights' average; 0 for none"
    )
    how.add_argument("--clip-norm", type=_number, metavar="X", help="of the gradient; 0 for none")
    how.add_argument("--drop-rate", type=_number, metavar="X", help="dropout before the classifier")
    how.add_argument(
        "--class-weights",
        choices=CLASS_WEIGHTS,
        help="of the loss: balanced makes up for the classes' numbers of images",
    )
    how.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        help="of an epoch's images: balanced shows as many of each class",
    )
    how.add_argument("--seed", type=natural_number, default=0, metavar="N", help="default 0")
    how.add_argument(
        "--accumulate",
        type=positive_integer,
        default=1,
        metavar="N",
        help="batches whose gradients make a step (default 1)",
    )
    how.add_argument(
        "--sync-batchnorm",
        action="store_true",
        help="BatchNorm takes the statistics of all processes",
    )
    how.add_argument(
        "--deterministic",
        action="store_true",
        help="the same result every time on a GPU too, at some cost; the CPU's always is",
    )
    how.add_argument(
        "--amp", choices=("bfloat16", "float16"), help="mixed precision; float16 on a GPU only"
    )


def _add_place_arguments(where: argparse._ArgumentGroup) -> None:
    where.add_argument(
        "--device",
        type=device,
        metavar="DEVICE",
        help="cpu (default), cuda or cuda:1; of several processes each takes a GPU of its own",
    )
    where.add_argument("--threads", type=threads, metavar="N", help="default: torch's")
    where.add_argument("--backend", default="auto", metavar="NAME", help="as use_backend takes it")


def _add_file_arguments(files: argparse._ArgumentGroup) -> None:
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
    files.add_argument("--tensorboard", action="store_true", help="write a TensorBoard log too")
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


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ..engines.select import check_name
    from ..train.distributed import Processes, join

    check_model(arguments.model)
    recipe = _recipe(arguments)
    if arguments.device is not None:
        checked = check_device(arguments.device)
        # Without a number, each of several processes takes a GPU of its own.
        if "WORLD_SIZE" not in os.environ:
            arguments.device = checked
    try:
        check_name(arguments.backend, "--backend")
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.deterministic:
        # Read when the first matrix is multiplied on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    processes = Processes()
    try:
        with join(arguments.device, _TIMEOUT) as processes, contextlib.ExitStack() as stack:
            _train(arguments, recipe, processes, stack)
    except Exception as error:
        if processes.count == 1:
            raise
        status = error.status if isinstance(error, CommandError) else 1
        raise CommandError(f"process {processes.rank}: {error}", status) from error
    return 0


def _train(
    arguments: argparse.Namespace,
    recipe: Recipe,
    processes: Processes,
    stack: contextlib.ExitStack,
) -> None:
    from ..train import run_folder
    from ..train.loop import Stopped, TrainingDiverged
    from ..train.settings import write_settings
    from ..train.start import build_model, find_start

    output: Path = arguments.output
    if arguments.amp == "float16" and processes.device.type == "cpu":
        raise CommandError("--amp float16 needs a GPU: on the CPU, take bfloat16", status=2)
    # Everything that can be wrong is found before anything is written.
    recorded = processes.together(lambda: run_folder.recorded(output, arguments.resume))
    if arguments.epochs is None and recorded is not None:
        epochs = run_folder.recorded_epochs(recorded, recipe.epochs)
        recipe = dataclasses.replace(recipe, epochs=epochs)
    reporter = processes.together(lambda: _reporter(arguments, recipe, processes))
    data = processes.after_first(lambda: _load_data(arguments))
    data = _checked(arguments, data, processes)
    start = processes.together(
        lambda: find_start(arguments.weights, arguments.model, arguments.in_chans, output, recorded)
    )
    settings = processes.together(
        lambda: _settings(arguments, recipe, data, processes, recorded, start)
    )
    weights = processes.together(lambda: _class_weights(recipe, data))
    model = processes.together(lambda: build_model(settings, start, reporter, processes.device))
    processes.together(lambda: run_folder.lock(output, stack) if processes.first else None)
    try:
        trainer = _trainer(arguments, settings, data, model, weights, reporter, processes)
        if recorded is not None:
            processes.together(trainer.resume)
        if processes.first and recorded != settings.to_json():
            write_settings(output, settings)
        with _signals(trainer):
            trainer.run()
    except Stopped:
        raise CommandError(
            f"stopped; --resume goes on from the checkpoint in {output}", status=130
        ) from None
    except (TrainingDiverged, ValueError) as error:
        raise CommandError(str(error)) from error
    if processes.first:
        assert trainer.evaluation is not None
        run_folder.write_figures(output, trainer.progress, trainer.evaluation, data.classes)


def _reporter(
    arguments: argparse.Namespace, recipe: Recipe, processes: Processes
) -> SilentReporter:
    from ..train.reporters import ConsoleReporter, SilentReporter, TensorBoardReporter

    if not processes.first:
        return SilentReporter()
    if not arguments.tensorboard:
        return ConsoleReporter(recipe.epochs)
    try:
        return TensorBoardReporter(recipe.epochs, arguments.output / "tensorboard")
    except ImportError as error:
        raise CommandError("--tensorboard needs TensorBoard: pip install tensorboard") from error


def _load_data(arguments: argparse.Namespace) -> DataSet:
    from ..data import sources

    try:
        return sources.load(
            arguments.dataset,
            arguments.data,
            not arguments.no_verify,
            arguments.download,
            arguments.in_chans,
        )
    except DataError as error:
        raise CommandError(str(error)) from error


def _checked(arguments: argparse.Namespace, data: DataSet, processes: Processes) -> DataSet:
    """The data set without pictures that cannot be read, where those are to be left out."""
    from ..data.dataset import FolderSet
    from ..data.folder import leave_out_unreadable

    if not isinstance(data.train, FolderSet) or not isinstance(data.test, FolderSet):
        return data
    if data.skipped and processes.first:
        print(f"{data.skipped} files are no pictures by their names", file=sys.stderr)
    paths = (*data.train.paths, *data.test.paths)
    unreadable = find_unreadable(arguments, paths, data.train.channels, processes)
    try:
        return processes.together(lambda: leave_out_unreadable(data, unreadable=unreadable)[0])
    except DataError as error:
        raise CommandError(str(error)) from error


def _settings(
    arguments: argparse.Namespace,
    recipe: Recipe,
    data: DataSet,
    processes: Processes,
    recorded: dict[str, Any] | None,
    start: Start,
) -> Settings:
    from ..train import run_folder
    from ..train.settings import Settings, differences

    mean, std = data.mean, data.std
    if start.info is not None:
        mean, std = start.info.mean, start.info.std
    elif start.path is None and recorded is not None and start.sha256:
        mean, std = (run_folder.recorded_numbers(recorded, name) for name in ("mean", "std"))
    settings = Settings(
        model=arguments.model,
        dataset=data.name,
        num_classes=len(data.classes),
        train_images=len(data.train),
        recipe=recipe,
        image_size=arguments.image_size or data.source_size or _FOLDER_SIZE,
        interpolation=arguments.interpolation,
        seed=arguments.seed,
        images_per_step=recipe.batch_size * processes.count * arguments.accumulate,
        accumulate=arguments.accumulate,
        amp=arguments.amp or "",
        sync_batchnorm=arguments.sync_batchnorm,
        classes=data.classes,
        in_chans=arguments.in_chans,
        mean=mean,
        std=std,
        weights=start.sha256,
    )
    if settings.train_images < settings.images_per_step:
        raise CommandError(
            f"a step takes {settings.images_per_step} images, and there are "
            f"{settings.train_images} to train on: lower --batch-size",
            status=2,
        )
    differing = differences(recorded, settings) if recorded is not None else []
    if differing:
        raise CommandError(
            f"--output {arguments.output} holds a run with other settings: {'; '.join(differing)}",
            status=2,
        )
    return settings


def _class_weights(recipe: Recipe, data: DataSet) -> Tensor | None:
    from ..train.recipes import balanced_weights

    if recipe.class_weights != "balanced":
        return None
    try:
        return balanced_weights(data.train.labels, len(data.classes))
    except ValueError as error:
        raise CommandError(f"--class-weights balanced: {error}", status=2) from error


def _trainer(
    arguments: argparse.Namespace,
    settings: Settings,
    data: DataSet,
    model: nn.Module,
    class_weights: Tensor | None,
    reporter: SilentReporter,
    processes: Processes,
) -> Trainer:
    from ..data.augment import Augmentation, Preparation
    from ..data.images import Shard
    from ..data.sources import make_batches
    from ..models.weights_file import ModelInfo
    from ..train.loop import Options, Trainer
    from ..train.start import network_arguments

    recipe, device = settings.recipe, processes.device
    preparation = Preparation(
        settings.mean, settings.std, settings.image_size, settings.interpolation
    )
    shard = Shard(processes.rank, processes.count)
    train = make_batches(
        data.train,
        preparation,
        recipe.batch_size * processes.count,
        shard,
        settings.seed,
        Augmentation(recipe.flip, recipe.padding, recipe.crop_scale),
        device,
        arguments.workers,
        balanced=recipe.sampling == "balanced",
    )
    test = make_batches(
        data.test, preparation, _TEST_BATCH, shard, device=device, workers=arguments.workers
    )
    info = ModelInfo(
        model=settings.model,
        classes=data.classes,
        mean=settings.mean,
        std=settings.std,
        image_size=settings.image_size,
        arguments=network_arguments(settings),
        source_size=data.source_size,
        interpolation=settings.interpolation,
        crop_fraction=imagenet.CROP_FRACTION if data.source_size is None else 1.0,
        dataset=data.name,
        recipe=settings.to_json()["recipe"],
        extra={"initial_weights_sha256": settings.weights} if settings.weights else {},
    )
    options = Options(
        backend=arguments.backend,
        checkpoint_seconds=60 * arguments.checkpoint_minutes,
        evaluate_every=arguments.evaluate_every,
        half=arguments.half,
        patience=arguments.patience,
    )
    return Trainer(
        settings,
        model,
        train,
        test,
        info,
        arguments.output,
        options,
        reporter,
        processes,
        class_weights,
    )


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
