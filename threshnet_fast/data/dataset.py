"""A data set: training and test images, and what their classes are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .images import ImageSet

if TYPE_CHECKING:
    from .folder import FolderSet

__all__ = ["DataSet"]


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
