"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .augment import Augmentation, Preparation
from .cifar import CIFAR10, CIFAR100
from .dataset import DataSet
from .folder import FolderBatches, FolderSet, load_folder
from .images import ImageBatches, ImageSet, Shard
from .svhn import SVHN, SVHN_EXTRA

__all__ = ["NAMES", "load", "make_batches"]

_LOADERS: dict[str, Callable[..., DataSet]] = {
    source.name: source.load for source in (CIFAR10, CIFAR100, SVHN, SVHN_EXTRA)
}

NAMES = (*_LOADERS, "folder")
"""What ``--dataset`` takes."""


def load(name: str, root: Path, verify: bool = True, download: bool = False) -> DataSet:
    """Reads a data set, or finds the files of a folder of images.

    Args:
        name: One of :data:`NAMES`.
        root: Where it is.
        verify: Whether to insist on the published files.
        download: Whether to fetch what is missing.

    Raises:
        DataError: It is missing, incomplete or damaged.
    """
    if name == "folder":
        return load_folder(root)
    return _LOADERS[name](root, verify, download)


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
