"""``threshnet-fast convert``: checkpoints of other packages, as this one keeps them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CommandError
from .arguments import image_size, positive_float

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "turn a checkpoint of another package into files of this one"

DESCRIPTION = """\
Reads weights of torchvision, timm, MONAI, torchxrayvision and others (docs/checkpoints.md has the
list), checks that they are those of a network of this package, one by one, and writes them as
NAME.safetensors and NAME.json, which predict, export and train --weights read. Nothing but tensors
is read from the file: no code that is in it is run.

A file of weights does not say what the classes are called, nor how pictures are normalised:
--classes, --mean, --std and --image-size do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "source", type=Path, metavar="FILE", help=".pth, .pt, .pth.tar, .ckpt, .bin, .safetensors"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="NAME.safetensors to write")
    parser.add_argument(
        "--model", metavar="NAME", help="which network it is (default: the only one that fits)"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="their names, one a line (default: numbers)"
    )
    parser.add_argument(
        "--mean",
        type=_numbers,
        metavar="R,G,B",
        help="subtracted from pixels between 0 and 1 (default: ImageNet's)",
    )
    parser.add_argument(
        "--std", type=_numbers, metavar="R,G,B", help="by which they are divided (ImageNet's)"
    )
    parser.add_argument(
        "--image-size", type=image_size, metavar="SIZE", help="of the input (the network's own)"
    )
    parser.add_argument(
        "--crop-fraction",
        type=positive_float,
        metavar="SHARE",
        help="of the shorter side of a picture that is shown (0.875, of small images all)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from ..models.weights_file import is_pair, save_model
    from .foreign import load_foreign

    source, output = arguments.source, arguments.output
    if output.suffix != ".safetensors":
        raise CommandError(f"cannot write {output}: expected NAME.safetensors", status=2)
    if not output.parent.is_dir():
        raise CommandError(f"cannot write {output}: there is no folder {output.parent}", status=2)
    if output.exists() and source.exists() and output.samefile(source):
        raise CommandError(f"cannot write {output}: it is what is read", status=2)
    if is_pair(source):
        raise CommandError(
            f"{source}: expected a checkpoint of another package; this one's is what export reads",
            status=2,
        )
    classes = None if arguments.classes is None else _class_names(arguments.classes)
    try:
        model, info, report = load_foreign(
            source,
            arguments.model,
            classes=classes,
            mean=arguments.mean,
            std=arguments.std,
            image_size=arguments.image_size,
            crop_fraction=arguments.crop_fraction,
        )
    except FileNotFoundError as error:
        raise CommandError(f"there is no {source}") from error
    except OSError as error:
        raise CommandError(f"cannot read {source}: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        save_model(output, model, info)
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error
    print(report)
    height, width = info.image_size
    print(
        f"Written: {output} ({info.model}, {len(info.classes)} classes, "
        f"{len(info.mean)} channels, {height}x{width})"
    )
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    """``"0.5"`` or ``"0.485,0.456,0.406"``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers with commas between them"
        ) from None


def _class_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise CommandError(f"--classes {path}: {error.strerror}", status=2) from error
    except ValueError as error:
        raise CommandError(f"--classes {path}: is no text in UTF-8", status=2) from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, start=1):
        if not name or not name.isprintable():
            raise CommandError(
                f"--classes {path}: line {number} is {name!r}, expected a name", status=2
            )
    return names
