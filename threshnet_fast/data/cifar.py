"""CIFAR-10 and CIFAR-100 in their binary version, and in the one for Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .dataset import DataSet
from .download import Published, fetch, unpack
from .errors import DataError
from .images import ImageSet
from .unpickling import load_dictionary

__all__ = ["CIFAR10", "CIFAR100", "Cifar"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
# Bytes that a pickle has beside pixels: labels and the names of files, which are not used.
_BESIDE = 64 << 20


@dataclass(frozen=True)
class _Pickles:
    """The version for Python.

    Attributes:
        folder: The folder in its archive.
        train: Files of the training images, with the records of each.
        test: Likewise of the test images.
        meta: File of the classes' names.
        names: Their key in it.
        labels: Key of the labels in the others.
    """

    folder: str
    train: dict[str, int]
    test: dict[str, int]
    meta: str
    names: str
    labels: str

    def read_names(self, folder: Path) -> list[str]:
        names = load_dictionary(folder / self.meta, _BESIDE).get(self.names)
        if not isinstance(names, list):
            raise DataError(f"{folder / self.meta} has no list {self.names!r}")
        return [str(name) for name in names]

    def read_records(self, path: Path, expected: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Labels, and rows of the red, the green and the blue plane."""
        # A text of bytes may take two each; so much more is no CIFAR.
        content = load_dictionary(path, 2 * expected * _PIXELS + _BESIDE)
        data, labels = content.get("data"), content.get(self.labels)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
            raise DataError(f"{path} has no 'data': expected an array of N rows of {_PIXELS} bytes")
        if (
            not isinstance(labels, list)
            or len(labels) != len(data)
            or not all(isinstance(label, int) and 0 <= label < 256 for label in labels)
        ):
            raise DataError(f"{path} has no {len(data)} {self.labels!r}")
        return np.array(labels, np.int64), data


@dataclass(frozen=True)
class Cifar:
    """How a version of CIFAR lies on the disk.

    Attributes:
        name: As ``--dataset`` takes it.
        folder: The folder in its archive.
        archive: Name of the archive.
        published: Its size and checksum.
        train: Files of the training images, with the records of each.
        test: Likewise of the test images.
        names: File of the classes' names, a line each.
        num_classes: How many there are.
        label_bytes: Bytes before a record's pixels; the last of them is the label.
        pickles: The version for Python, which is read where the binary one is missing.
        mean: Of the training images.
        std: Of the training images.
    """

    name: str
    folder: str
    archive: str
    published: Published
    train: dict[str, int]
    test: dict[str, int]
    names: str
    num_classes: int
    label_bytes: int
    pickles: _Pickles
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def url(self) -> str:
        """Where the archive is published."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"

    def load(self, root: Path, verify: bool = True, download: bool = False) -> DataSet:
        """Reads the data set.

        Args:
            root: The folder that holds the unpacked archive, or the unpacked folder itself: the
                binary version, or else the one for Python.
            verify: Whether to insist on the number of records that the published files have and,
                where the archive is there too, on its checksum.
            download: Whether to fetch and unpack the archive where files are missing.

        Raises:
            DataError: A file is missing, incomplete or damaged.
        """
        archive = root / self.archive
        folder, missing = self._find(root)
        pickled = self._find_pickles(root) if missing else None
        if pickled is not None:
            return self._load_pickles(pickled, verify)
        if missing and download:
            fetch(self.url, archive, self.published)
            unpack(archive, root / self.folder, (*self.train, *self.test, self.names))
            folder, missing = self._find(root)
        elif verify and archive.is_file():
            self.published.check(archive)
        if missing:
            raise DataError(
                f"{self.name}: no {missing[0]} in {root} or {root / self.folder}: expected the "
                f"files of {self.archive}, unpacked (--download fetches it from {self.url}), or "
                f"{self.pickles.folder}"
            )
        lines = (folder / self.names).read_text(encoding="utf-8").split("\n")
        classes = [line.strip() for line in lines if line.strip()]
        self._check_names(classes, folder / self.names)
        return self._make(
            classes, self._read(folder, self.train, verify), self._read(folder, self.test, verify)
        )

    def _find(self, root: Path) -> tuple[Path, list[str]]:
        """The folder of the binary version, and what is missing in it."""
        folder = root / self.folder if (root / self.folder).is_dir() else root
        names = (*self.train, *self.test, self.names)
        return folder, [name for name in names if not (folder / name).is_file()]

    def _find_pickles(self, root: Path) -> Path | None:
        names = (*self.pickles.train, *self.pickles.test, self.pickles.meta)
        for folder in (root / self.pickles.folder, root):
            if all((folder / name).is_file() for name in names):
                return folder
        return None

    def _load_pickles(self, folder: Path, verify: bool) -> DataSet:
        classes = self.pickles.read_names(folder)
        self._check_names(classes, folder / self.pickles.meta)

        def read(files: dict[str, int]) -> ImageSet:
            parts = []
            for name, expected in files.items():
                labels, planes = self.pickles.read_records(folder / name, expected)
                if not len(labels) or (verify and len(labels) != expected):
                    raise DataError(
                        f"{folder / name} has {len(labels)} records: expected {expected}"
                    )
                self._check_labels(labels, folder / name)
                parts.append((labels, planes))
            return _image_set(*map(np.concatenate, zip(*parts, strict=True)))

        return self._make(classes, read(self.pickles.train), read(self.pickles.test))

    def _make(self, classes: list[str], train: ImageSet, test: ImageSet) -> DataSet:
        return DataSet(
            name=self.name,
            classes=tuple(classes),
            mean=self.mean,
            std=self.std,
            source_size=(_SIDE, _SIDE),
            train=train,
            test=test,
        )

    def _check_names(self, classes: list[str], path: Path) -> None:
        if len(classes) != self.num_classes:
            raise DataError(f"{path} names {len(classes)} classes: expected {self.num_classes}")

    def _check_labels(self, labels: NDArray[Any], path: Path) -> None:
        worst = int(labels.max())
        if worst >= self.num_classes:
            raise DataError(
                f"{path} is damaged: it has a label {worst}, expected 0 to {self.num_classes - 1}"
            )

    def _read(self, folder: Path, files: dict[str, int], verify: bool) -> ImageSet:
        record = self.label_bytes + _PIXELS
        parts = []
        for name, expected in files.items():
            path = folder / name
            content = np.fromfile(path, np.uint8)
            count, rest = divmod(len(content), record)
            if rest or not count or (verify and count != expected):
                raise DataError(
                    f"{path} has {len(content)} bytes: expected {expected} records of {record} "
                    f"bytes, {expected * record} bytes"
                )
            parts.append(content.reshape(count, record))
            self._check_labels(parts[-1][:, self.label_bytes - 1], path)
        records = np.concatenate(parts)
        return _image_set(records[:, self.label_bytes - 1], records[:, self.label_bytes :])


def _image_set(labels: NDArray[Any], planes: NDArray[Any]) -> ImageSet:
    """Of the red, the green and the blue plane of each image, in a row."""
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(labels.astype(np.int64)),
    )


CIFAR10 = Cifar(
    name="cifar10",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    published=Published(
        170052171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
    train={f"data_batch_{number}.bin": 10000 for number in range(1, 6)},
    test={"test_batch.bin": 10000},
    names="batches.meta.txt",
    num_classes=10,
    label_bytes=1,
    pickles=_Pickles(
        folder="cifar-10-batches-py",
        train={f"data_batch_{number}": 10000 for number in range(1, 6)},
        test={"test_batch": 10000},
        meta="batches.meta",
        names="label_names",
        labels="labels",
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = Cifar(
    name="cifar100",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    published=Published(
        168513733, "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    ),
    train={"train.bin": 50000},
    test={"test.bin": 10000},
    names="fine_label_names.txt",
    num_classes=100,
    label_bytes=2,
    pickles=_Pickles(
        folder="cifar-100-python",
        train={"train": 50000},
        test={"test": 10000},
        meta="meta",
        names="fine_label_names",
        labels="fine_labels",
    ),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
