"""``threshnet-fast export``: weights for others, in half precision."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError
from ..models.onnx_file import OLDEST_OPSET
from ..models.weights_file import DTYPES
from .arguments import positive_integer

if TYPE_CHECKING:
    from torch import nn

    from ..models.weights_file import ModelInfo

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "write a trained model in half precision with its accuracy, or as an ONNX file"

DESCRIPTION = """\
Reads a trained model and writes it again, as NAME.safetensors and NAME.json: in half precision,
with its accuracy on the test images as the written weights have it, and with what else there is to
say about it. threshnet-fast predict --checkpoint reads the result, threshnet_fast.train.load_model
does so in Python. It takes weights of other packages too (.pth, .pt, .safetensors), whose classes
are then numbers, and pictures normalised as ImageNet's; threshnet-fast convert sets both.

With --onnx it writes an ONNX file instead, in float32, for any batch: input "input", output
"output", and the classes, mean, std and size as metadata. It needs the packages onnx and
onnxscript; where ONNX Runtime is installed, the file is run and compared before it is kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="MODEL",
        help="folder of a run, NAME.safetensors, or weights of others (.pth, .pt)",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUTPUT",
        help="NAME.safetensors to write, with --onnx NAME.onnx",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="which network weights of others are (default: the only one that fits)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default float16; an ONNX file is in float32"
    )
    parser.add_argument("--onnx", action="store_true", help="write an ONNX file")
    parser.add_argument(
        "--opset",
        type=positive_integer,
        metavar="N",
        help=f"version of ONNX's operators, {OLDEST_OPSET} (default) or newer; with --onnx",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the data set that the model was trained on: measures the accuracy anew",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="accept files of the data set that are not as large as the published ones",
    )
    parser.add_argument("--license", metavar="NAME", help="under which the weights may be used")
    parser.add_argument("--note", metavar="TEXT", help="what to know about them")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ..models.weights_file import load_state, save_model

    output: Path = arguments.output
    suffix = ".onnx" if arguments.onnx else ".safetensors"
    if output.suffix != suffix:
        raise CommandError(f"cannot write {output}: expected NAME{suffix}", status=2)
    if not output.parent.is_dir():
        raise CommandError(f"cannot write {output}: there is no folder {output.parent}", status=2)
    if arguments.onnx:
        return _write_onnx(arguments)
    if arguments.opset is not None:
        raise CommandError("--opset is of an ONNX file: add --onnx", status=2)
    dtype = DTYPES[arguments.dtype or "float16"]
    try:
        model, info = _load(arguments)
        extra: dict[str, Any] = {
            name: value for name, value in info.extra.items() if name != "sha256"
        }
        extra |= {
            name: value
            for name in ("license", "note")
            if (value := getattr(arguments, name)) is not None
        }
        info = dataclasses.replace(info, extra=extra)
        save_model(output, model, info, dtype)
        if arguments.data is not None:
            model.load_state_dict(load_state(output))
            info = _with_accuracy(model, info, arguments)
            save_model(output, model, info, dtype)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error
    size = output.stat().st_size / 1e6
    accuracy = "" if info.accuracy is None else f", accuracy {info.accuracy:.2%}"
    print(f"Written: {output} ({size:.1f} MB{accuracy})")
    return 0


def _write_onnx(arguments: argparse.Namespace) -> int:
    from ..models import onnx_file

    output: Path = arguments.output
    for option in ("dtype", "data", "license", "note"):
        if getattr(arguments, option) is not None:
            raise CommandError(f"--{option} is of NAME.safetensors: not with --onnx", status=2)
    if (reason := onnx_file.objection()) is not None:
        raise CommandError(f"cannot write {output}: {reason}")
    model, info = _load(arguments)
    opset = OLDEST_OPSET if arguments.opset is None else arguments.opset
    newest = onnx_file.newest_opset()
    if not OLDEST_OPSET <= opset <= newest:
        raise CommandError(f"--opset is {opset}: expected {OLDEST_OPSET} to {newest}", status=2)
    try:
        onnx_file.save_onnx(output, model.eval(), info, opset)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"cannot write {output}: {error}") from error
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error
    print(f"Written: {output} ({output.stat().st_size / 1e6:.1f} MB, operator set {opset})")
    return 0


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, ModelInfo]:
    from .foreign import load_any

    source: Path = arguments.source
    try:
        model, info, assumed = load_any(source, arguments.model)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot read {source}: {error.strerror}") from error
    if assumed is not None:
        print(f"threshnet-fast export: {assumed}", file=sys.stderr)
    return model, info


def _with_accuracy(model: nn.Module, info: ModelInfo, arguments: argparse.Namespace) -> ModelInfo:
    """The description with the accuracy on the test images, of all and of each class."""
    from ..data.augment import Preparation
    from ..data.cifar import CIFAR10, CIFAR100
    from ..data.images import Shard
    from ..data.sources import make_batches
    from ..train.evaluation import evaluate

    sources = {source.name: source for source in (CIFAR10, CIFAR100)}
    if info.dataset not in sources:
        raise CommandError(
            f"--data: the model was trained on {info.dataset or 'an unknown data set'}, and only "
            f"{' and '.join(sources)} can be read here",
            status=2,
        )
    data = sources[info.dataset].load(arguments.data, verify=not arguments.no_verify)
    if data.classes != info.classes:
        raise CommandError(f"--data {arguments.data}: its classes are not those of the model")
    prepare = Preparation(info.mean, info.std, info.image_size, info.interpolation)
    test = make_batches(data.test, prepare, 250, Shard())
    result = evaluate(model, test, len(info.classes))
    extra = {**info.extra, **result.describe(info.classes)}
    return dataclasses.replace(info, accuracy=result.accuracy, extra=extra)
