"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .augment import Augmentation, Preparation
from .cifar import CIFAR10, CIFAR100
from .dataset import DataSet, FolderSet
from .folder import FolderBatches, load_folder
from .images import ImageBatches, ImageSet, Shard, to_grey
from .svhn import SVHN, SVHN_EXTRA

__all__ = ["NAMES", "load", "make_batches"]

_LOADERS: dict[str, Callable[..., DataSet]] = {
    source.name: source.load for source in (CIFAR10, CIFAR100, SVHN, SVHN_EXTRA)
}

# Images that are made grey at once.
_CHUNK = 1000

NAMES = (*_LOADERS, "folder")
"""What ``--dataset`` takes."""


def load(
    name: str, root: Path, verify: bool = True, download: bool = False, channels: int = 3
) -> DataSet:
    """Reads a data set, or finds the files of a folder of images.

    Args:
        name: One of :data:`NAMES`.
        root: Where it is.
        verify: Whether to insist on the published files.
        download: Whether to fetch what is missing.
        channels: Of the images: 3 for RGB, 1 for grey.

    Raises:
        DataError: It is missing, incomplete or damaged.
        ValueError: ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}: expected 1 or 3")
    if name == "folder":
        return load_folder(root, channels=channels)
    data = _LOADERS[name](root, verify, download)
    return _grey(data) if channels == 1 else data


def _grey(data: DataSet) -> DataSet:
    assert isinstance(data.train, ImageSet)
    assert isinstance(data.test, ImageSet)
    train, test = (
        ImageSet(torch.cat([to_grey(part) for part in images.images.split(_CHUNK)]), images.labels)
        for images in (data.train, data.test)
    )
    # How often each level occurs says the same as all pixels, exactly and in no memory.
    share = torch.bincount(train.images.flatten(), minlength=256).double() / train.images.numel()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * levels).sum()
    std = (share * (levels - mean).square()).sum().sqrt()
    return replace(data, mean=(mean.item(),), std=(std.item(),), train=train, test=test)


def make_batches(
    images: ImageSet | FolderSet,
    preparation: Preparation,
    batch_size: int,
    shard: Shard,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    balanced: bool = False,
) -> ImageBatches | FolderBatches:
    """Batches of the training or the test images of a data set; arguments as of the two classes."""
    if isinstance(images, FolderSet):
        return FolderBatches(
            images, preparation, batch_size, shard, seed, augmentation, device, workers, balanced
        )
    return ImageBatches(
        images, preparation, batch_size, shard, seed, augmentation, device, balanced
    )
