"""Photographs to run on: files of the user's, or those that installed packages carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import imagenet

__all__ = ["Photograph", "as_batch", "installed_photographs"]

_SKIMAGE = ("astronaut", "coffee", "chelsea", "rocket")


@dataclass(frozen=True)
class Photograph:
    """A photograph.

    Attributes:
        name: For people.
        source: Where it is from.
        pixels: ``(3, H, W)``, uint8.
    """

    name: str
    source: str
    pixels: Tensor


def installed_photographs() -> list[Photograph]:
    """The photographs that installed packages carry, possibly none.

    scikit-image has several; matplotlib, which this package depends on, has the portrait of Grace
    Hopper, from which two crops are taken as well.
    """
    return _from_skimage() or _from_matplotlib()


def _from_skimage() -> list[Photograph]:
    try:
        from skimage import data
    except ImportError:
        return []
    found = []
    for name in _SKIMAGE:
        try:
            pixels = torch.from_numpy(getattr(data, name)().copy())
        except (AttributeError, OSError, ValueError):
            # Versions differ in which photographs are in the wheel and which need a download.
            continue
        found.append(Photograph(name, "scikit-image", pixels.permute(2, 0, 1)))
    return found


def _from_matplotlib() -> list[Photograph]:
    from ..data.errors import PictureError
    from ..data.pictures import read_pixels

    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        whole = read_pixels(path)
    except (ImportError, PictureError):
        return []
    _, height, width = whole.shape
    views = {
        "Grace Hopper": whole,
        "Grace Hopper, upper half": whole[:, : height // 2],
        "Grace Hopper, left half": whole[:, :, : width // 2],
    }
    return [Photograph(name, "matplotlib", pixels) for name, pixels in views.items()]


def as_batch(photographs: Sequence[Photograph], height: int, width: int, batch: int) -> Tensor:
    """Photographs, resized to fill the frame and normalised; repeated where the batch is larger.

    Every other repetition is mirrored, and each is a little darker than the one before, so that no
    two images of a batch of up to a few hundred are equal.

    Returns:
        ``(batch, 3, height, width)``, float32, contiguous.
    """
    images = []
    for index in range(batch):
        repetition, which = divmod(index, len(photographs))
        image = photographs[which].pixels[None].to(torch.float32) / 255
        image = F.interpolate(
            image, (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        image = image * 0.97**repetition
        images.append(image.flip(-1) if repetition % 2 else image)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (imagenet.MEAN, imagenet.STD))
    return ((torch.cat(images) - mean) / std).contiguous()
