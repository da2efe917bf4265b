"""Photographs to run on: files of the user's, or those that installed packages carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CommandError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Picture", "as_batch", "find_pictures", "load_picture"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_SKIMAGE = ("astronaut", "coffee", "chelsea", "rocket")


@dataclass(frozen=True)
class Picture:
    """A photograph.

    Attributes:
        name: For people.
        source: Where it is from.
        pixels: ``(3, H, W)``, uint8.
    """

    name: str
    source: str
    pixels: Tensor


def load_picture(path: str, argument: str = "--image") -> Picture:
    """Reads a picture file of any format that Pillow knows, upright, on white where transparent.

    Args:
        path: The file.
        argument: What it was named by, which error messages begin with.

    Raises:
        CommandError: The file cannot be read as a picture.
    """
    from PIL import Image, UnidentifiedImageError

    name = f"{argument} {path}".strip()
    try:
        with Image.open(path) as image:
            pixels = _to_tensor(_as_rgb(image))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CommandError(f"{name}: not a picture: {error}", status=2) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"{name}: cannot be read: {reason}", status=2) from error
    return Picture(Path(path).name, argument or path, pixels)


def _as_rgb(image: Image.Image) -> Image.Image:
    """The picture as a camera's orientation mark shows it, in three channels of 8 bits."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would cut off what exceeds 8 bits.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def find_pictures() -> list[Picture]:
    """The photographs that installed packages carry, possibly none.

    scikit-image has several; matplotlib, which this package depends on, has the portrait of Grace
    Hopper, from which two crops are taken as well.
    """
    return _from_skimage() or _from_matplotlib()


def _from_skimage() -> list[Picture]:
    try:
        from skimage import data
    except ImportError:
        return []
    pictures = []
    for name in _SKIMAGE:
        try:
            pixels = torch.from_numpy(getattr(data, name)().copy())
        except (AttributeError, OSError, ValueError):
            # Versions differ in which photographs are in the wheel and which need a download.
            continue
        pictures.append(Picture(name, "scikit-image", pixels.permute(2, 0, 1)))
    return pictures


def _from_matplotlib() -> list[Picture]:
    try:
        import matplotlib
        from PIL import Image

        path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        with Image.open(path) as image:
            whole = _to_tensor(image.convert("RGB"))
    except (ImportError, OSError):
        return []
    _, height, width = whole.shape
    views = {
        "Grace Hopper": whole,
        "Grace Hopper, upper half": whole[:, : height // 2],
        "Grace Hopper, left half": whole[:, :, : width // 2],
    }
    return [Picture(name, "matplotlib", pixels) for name, pixels in views.items()]


def _to_tensor(image: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_batch(pictures: Sequence[Picture], height: int, width: int, batch: int) -> Tensor:
    """Pictures, resized to fill the frame and normalised; repeated where the batch is larger.

    Every other repetition is mirrored, and each is a little darker than the one before, so that no
    two images of a batch of up to a few hundred are equal.

    Returns:
        ``(batch, 3, height, width)``, float32, contiguous.
    """
    images = []
    for index in range(batch):
        repetition, which = divmod(index, len(pictures))
        image = pictures[which].pixels[None].to(torch.float32) / 255
        image = F.interpolate(
            image, (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        image = image * 0.97**repetition
        images.append(image.flip(-1) if repetition % 2 else image)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return ((torch.cat(images) - mean) / std).contiguous()
