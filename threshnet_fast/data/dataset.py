"""A data set: training and test images, and what their classes are called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .images import ImageSet

__all__ = ["DataSet", "FolderSet"]


@dataclass(frozen=True)
class FolderSet:
    """Labelled image files.

    Attributes:
        paths: The files.
        labels: ``(N,)``, int64.
        channels: 3 if they are read as RGB, 1 if as grey.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    channels: int = 3

    def __len__(self) -> int:
        return len(self.paths)

    def without(self, paths: Collection[Path]) -> FolderSet:
        """The set without some of its pictures, in the same order."""
        kept = [number for number, path in enumerate(self.paths) if path not in paths]
        return FolderSet(
            tuple(self.paths[number] for number in kept), self.labels[kept], self.channels
        )


@dataclass(frozen=True)
class DataSet:
    """Training and test images.

    Attributes:
        name: What it is called.
        classes: Names of the classes, in the order of the labels.
        mean: Of each channel of the training images, of pixels between 0 and 1.
        std: Likewise the standard deviation.
        source_size: Height and width of all pictures, or None where they differ.
        train: The training images.
        test: The test images.
        skipped: Files in a folder of images that are not taken for pictures, by their names.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source_size: tuple[int, int] | None
    train: ImageSet | FolderSet
    test: ImageSet | FolderSet
    skipped: int = 0
