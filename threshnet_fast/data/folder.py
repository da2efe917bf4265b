"""Any folder of images: ``ROOT/train/CLASS/picture.jpg`` and ``ROOT/val/CLASS/picture.jpg``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from ..models import imagenet
from ..text import printable
from .augment import Augmentation, Preparation
from .dataset import DataSet, FolderSet
from .errors import DataError, PictureError
from .images import Shard, augmentation_generator, epoch_order, generator, visits
from .pictures import check_pictures, list_folders, list_pictures, quiet_decoder, read_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = [
    "FolderBatches",
    "leave_out_unreadable",
    "load_folder",
    "load_test_folder",
]

_TRAIN = ("train",)
_TEST = ("val", "test", "valid", "validation")
# Mean and standard deviation by channels.
_IMAGENET: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: (imagenet.average(imagenet.MEAN), imagenet.average(imagenet.STD)),
    3: (imagenet.MEAN, imagenet.STD),
}
_KINDS = "pictures such as .jpg, .png or .tif"
_Box = tuple[float, float, float, float]
# Of a random crop, as is customary.
_RATIO = 4 / 3
_ATTEMPTS = 10


def load_folder(root: Path, name: str = "folder", channels: int = 3) -> DataSet:
    """Finds the images of a folder; every folder of ``train`` is a class.

    Args:
        root: The folder that has ``train`` and ``val`` (or ``test``, ``valid``, ``validation``),
            which may lack classes.
        name: What the data set is called.
        channels: Of the pictures: 3 for RGB, 1 for grey.

    Raises:
        DataError: A folder is missing or cannot be read, a class has no training images, there are
            no test images, or some are of a class that ``train`` does not have.
        ValueError: ``channels`` is neither 1 nor 3.
    """
    if channels not in _IMAGENET:
        raise ValueError(f"channels is {channels}: expected 1 or 3")
    folders = []
    for names in (_TRAIN, _TEST):
        found = [root / name for name in names if (root / name).is_dir()]
        if not found:
            raise DataError(f"{root} has no folder {' or '.join(names)}")
        folders.append(found[0])
    train, test = folders
    classes = list_folders(train)
    if not classes:
        raise DataError(f"{train} has no folders: expected one for each class")
    tested = list_folders(test)
    unknown = sorted(set(tested) - set(classes))
    if unknown:
        raise DataError(
            f"{test} has classes that {train} does not: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}"
        )
    train_set, train_others = _scan(train, classes, classes, channels)
    test_set, test_others = _scan(test, tested, classes, channels)
    without = set(range(len(classes))) - set(train_set.labels.tolist())
    if without:
        raise DataError(f"{train / classes[min(without)]} has no images: expected {_KINDS}")
    if not len(test_set):
        raise DataError(f"{test} has no images: expected {_KINDS}, in a folder for each class")
    mean, std = _IMAGENET[channels]
    return DataSet(
        name=name,
        classes=tuple(classes),
        mean=mean,
        std=std,
        source_size=None,
        train=train_set,
        test=test_set,
        skipped=train_others + test_others,
    )


def load_test_folder(root: Path, classes: Sequence[str], channels: int = 3) -> FolderSet:
    """Finds the images of a folder for the evaluation of a network that knows some classes.

    Args:
        root: The folder that has a folder for each class, or one that has ``val`` (or ``test``,
            ``valid``, ``validation``) with those.
        classes: Names of the network's classes, in the order of its outputs, which the labels
            follow; some may have no folder.
        channels: Of the pictures: 3 for RGB, 1 for grey.

    Raises:
        DataError: A folder is missing or cannot be read, has no images, or is none of the classes.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {printable(root)}")
    folder = next((root / name for name in _TEST if (root / name).is_dir()), root)
    present = list_folders(folder)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        names = ", ".join(map(printable, unknown[:5]))
        raise DataError(
            f"{printable(folder)} has folders that are no classes of the model: {names}"
            f"{', ...' if len(unknown) > 5 else ''}"
        )
    images, _ = _scan(folder, present, classes, channels)
    if not len(images):
        raise DataError(
            f"{printable(folder)} has no images: expected {_KINDS}, in a folder for each class"
        )
    return images


def _scan(
    folder: Path, present: Sequence[str], classes: Sequence[str], channels: int
) -> tuple[FolderSet, int]:
    """The pictures of the classes that are present, and the number of other files."""
    paths: list[Path] = []
    labels: list[int] = []
    others = 0
    for name in present:
        pictures, rest = list_pictures(folder / name)
        paths += pictures
        labels += [classes.index(name)] * len(pictures)
        others += rest
    return FolderSet(tuple(paths), torch.tensor(labels, dtype=torch.int64), channels), others


def leave_out_unreadable(
    data: DataSet,
    workers: int | None = None,
    progress: bool = True,
    unreadable: Sequence[tuple[Path, str]] | None = None,
) -> tuple[DataSet, list[PictureError]]:
    """Reads all pictures of a folder, and leaves out those that cannot be read.

    Args:
        data: What :func:`load_folder` returned.
        workers: As of :func:`threshnet_fast.data.pictures.check_pictures`.
        progress: Whether to show a bar.
        unreadable: What that function returned, where it was called already.

    Returns:
        The rest, and what was left out and why. Without any of it, ``data`` itself.

    Raises:
        DataError: No training image of a class, or no test image, can be read.
        TypeError: ``data`` is not of a folder.
    """
    if not isinstance(data.train, FolderSet) or not isinstance(data.test, FolderSet):
        raise TypeError(f"data is {data.name}: expected a folder of images")
    sets = (data.train, data.test)
    if unreadable is None:
        paths = [path for part in sets for path in part.paths]
        unreadable = check_pictures(paths, workers, data.train.channels, progress)
    if not unreadable:
        return data, []
    train, test = (part.without({path for path, _ in unreadable}) for part in sets)
    errors = [PictureError(path, reason) for path, reason in unreadable]
    for label, name in enumerate(data.classes):
        if label not in train.labels:
            raise DataError(f"no training image of {name} can be read, for example {errors[0]}")
    if not len(test):
        raise DataError(f"no test image can be read, for example {errors[0]}")
    return replace(data, train=train, test=test), errors


def _pillow_loader(path: str, channels: int = 3) -> Image.Image:
    with quiet_decoder():
        return read_picture(path, channels)


def middle(width: int, height: int, size: tuple[int, int], fraction: float) -> _Box:
    """The largest box of the shape of ``size`` in the middle of a picture, reduced by a fraction.

    Args:
        width: Of the picture.
        height: Of the picture.
        size: Height and width of what the box shall become.
        fraction: Of the sides of the box.

    Returns:
        Left, top, right, bottom.
    """
    scale = fraction * min(width / size[1], height / size[0])
    box_width, box_height = scale * size[1], scale * size[0]
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def cut_out(
    picture: Image.Image, box: _Box, size: tuple[int, int], interpolation: str
) -> NDArray[np.uint8]:
    """Resizes a box of a picture.

    Args:
        picture: RGB or grey.
        box: Left, top, right, bottom.
        size: Height and width of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        ``(*size, C)``.
    """
    from PIL import Image

    resampling = Image.Resampling[interpolation.upper()]
    pixels = np.array(picture.resize((size[1], size[0]), resampling, box))
    return pixels.reshape(*size, len(picture.getbands()))


def random_box(
    width: int, height: int, size: tuple[int, int], smallest: float, random: torch.Generator
) -> _Box:
    """A random box of at least a share of a picture's area, of about the shape of ``size``.

    Args:
        width: Of the picture.
        height: Of the picture.
        size: Height and width of what the box shall become.
        smallest: Smallest share.
        random: Where chance comes from.

    Returns:
        Left, top, right, bottom.
    """
    for _ in range(_ATTEMPTS):
        share, shape, x, y = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = size[1] / size[0] * _RATIO ** (2 * shape - 1)
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left, top = x * (width - box_width), y * (height - box_height)
            return left, top, left + box_width, top + box_height
    return middle(width, height, size, 1.0)


def _collate(items: list[tuple[Tensor, int] | DataError]) -> Any:
    """A batch, or the first error: raised in a worker, its traceback would become its message."""
    for item in items:
        if isinstance(item, DataError):
            return item
    return default_collate(items)


class _Pictures(TorchDataset["tuple[Tensor, int] | DataError"]):
    """Reads pictures; the key of one is its epoch, its index, and its visit in the epoch."""

    def __init__(
        self,
        data: FolderSet,
        size: tuple[int, int],
        interpolation: str,
        seed: int,
        augmentation: Augmentation | None,
        crop_fraction: float,
    ) -> None:
        self._crop_fraction = crop_fraction
        self._paths = [str(path) for path in data.paths]
        self._labels = data.labels.tolist()
        self._size = size
        self._interpolation = interpolation
        self._seed = seed
        self._augmentation = augmentation
        self._channels = data.channels

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int] | DataError:
        """The pixels and the label, or why there are none."""
        try:
            return self._read(key)
        except DataError as error:
            return error

    def _read(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        epoch, index, visit = key
        picture = _pillow_loader(self._paths[index], self._channels)
        width, height = picture.size
        mirrored = False
        if self._augmentation is None:
            box = middle(width, height, self._size, self._crop_fraction)
        else:
            random = augmentation_generator(self._seed, epoch, index, visit)
            box = random_box(width, height, self._size, self._augmentation.smallest, random)
            mirrored = self._augmentation.flip and bool(
                torch.randint(0, 2, (), generator=random).item()
            )
        pixels = cut_out(picture, box, self._size, self._interpolation)
        if mirrored:
            pixels = pixels[:, ::-1].copy()
        return torch.from_numpy(pixels), self._labels[index]


class FolderBatches:
    """Batches of a :class:`FolderSet`, read by worker processes.

    What happens to a picture depends on the seed, the epoch and the picture alone.

    Args:
        data: The files.
        preparation: Turns pixels into the network's input, of the size that it names.
        batch_size: Images of a batch, all processes together.
        shard: Which part of each batch is wanted.
        seed: Of the order and the augmentation.
        augmentation: None for evaluation.
        device: Where the batches are wanted.
        workers: Processes that read; 0 reads in this one.
        balanced: As :func:`~threshnet_fast.data.images.epoch_order` takes it.
        crop_fraction: Share of a picture's shorter side that an evaluation looks at.
    """

    def __init__(
        self,
        data: FolderSet,
        preparation: Preparation,
        batch_size: int,
        shard: Shard = Shard(),  # noqa: B008, it is immutable
        seed: int = 0,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        balanced: bool = False,
        crop_fraction: float = imagenet.CROP_FRACTION,
    ) -> None:
        self._labels = data.labels
        self._balanced = balanced
        self._count = len(data)
        self._preparation = preparation
        self._batch_size = batch_size
        self._shard = shard
        self._seed = seed
        self._device = torch.device(device)
        self._workers = workers
        self._pictures = _Pictures(
            data,
            preparation.size,
            preparation.interpolation,
            seed,
            augmentation,
            crop_fraction,
        )

    def __len__(self) -> int:
        """Full batches of an epoch."""
        return self._count // self._batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's part of each full batch of an epoch, in random order.

        Args:
            epoch: Number of the epoch.
            start: Number of the first batch that is wanted.
        """
        order = epoch_order(self._labels, self._seed, epoch, self._balanced)
        keys = [(epoch, index, visit) for index, visit in visits(order.tolist())]
        return self._read(
            [keys[self._shard.of(batch, self._batch_size)] for batch in range(start, len(self))]
        )

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image of this process's part once, in order, without augmentation."""
        indices = range(self._count)[self._shard.rank :: self._shard.count]
        return self._read(
            [
                [(0, index, 0) for index in indices[first : first + self._batch_size]]
                for first in range(0, len(indices), self._batch_size)
            ]
        )

    def _read(self, batches: list[list[tuple[int, int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._pictures,
            batch_sampler=batches,
            num_workers=min(self._workers, len(batches)),
            pin_memory=self._device.type == "cuda",
            # The loader seeds its workers by it: the default one is the network's, of dropout.
            generator=generator(self._seed),
            collate_fn=_collate,
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            images = images.to(self._device, non_blocking=True)
            yield self._preparation(images), labels.to(self._device, non_blocking=True)
