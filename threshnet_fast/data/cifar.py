"""CIFAR-10 and CIFAR-100 in their binary version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .dataset import DataSet
from .download import check_md5, fetch, unpack
from .errors import DataError
from .images import ImageSet

__all__ = ["CIFAR10", "CIFAR100", "Cifar"]

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class Cifar:
    """How a version of CIFAR lies on the disk.

    Attributes:
        name: As ``--dataset`` takes it.
        folder: The folder in its archive.
        archive: Name of the archive.
        md5: Checksum of the archive.
        train: Files of the training images, with the records of each.
        test: Likewise of the test images.
        names: File of the classes' names, a line each.
        num_classes: How many there are.
        label_bytes: Bytes before a record's pixels; the last of them is the label.
        mean: Of the training images.
        std: Of the training images.
    """

    name: str
    folder: str
    archive: str
    md5: str
    train: dict[str, int]
    test: dict[str, int]
    names: str
    num_classes: int
    label_bytes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def url(self) -> str:
        """Where the archive is published."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"

    def load(self, root: Path, verify: bool = True, download: bool = False) -> DataSet:
        """Reads the data set.

        Args:
            root: The folder that holds the unpacked archive, or the unpacked folder itself.
            verify: Whether to insist on the number of records that the published files have and,
                where the archive is there too, on its checksum.
            download: Whether to fetch and unpack the archive where files are missing.

        Raises:
            DataError: A file is missing, incomplete or damaged.
        """
        names = (*self.train, *self.test, self.names)
        archive = root / self.archive

        def find() -> tuple[Path, list[str]]:
            folder = root / self.folder if (root / self.folder).is_dir() else root
            return folder, [name for name in names if not (folder / name).is_file()]

        folder, missing = find()
        if missing and download:
            fetch(self.url, archive, self.md5)
            unpack(archive, root / self.folder, names)
            folder, missing = find()
        elif verify and archive.is_file():
            check_md5(archive, self.md5)
        if missing:
            raise DataError(
                f"{self.name}: no {missing[0]} in {root} or {root / self.folder}: expected the "
                f"files of {self.archive}, unpacked (--download fetches it from {self.url})"
            )
        lines = (folder / self.names).read_text(encoding="utf-8").split("\n")
        classes = tuple(line.strip() for line in lines if line.strip())
        if len(classes) != self.num_classes:
            raise DataError(
                f"{folder / self.names} names {len(classes)} classes: expected {self.num_classes}"
            )
        return DataSet(
            name=self.name,
            classes=classes,
            mean=self.mean,
            std=self.std,
            source_size=(_SIDE, _SIDE),
            train=self._read(folder, self.train, verify),
            test=self._read(folder, self.test, verify),
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
            worst = int(parts[-1][:, self.label_bytes - 1].max())
            if worst >= self.num_classes:
                raise DataError(
                    f"{path} is damaged: it has a label {worst}, expected 0 to "
                    f"{self.num_classes - 1}"
                )
        records = np.concatenate(parts)
        labels = torch.from_numpy(records[:, self.label_bytes - 1].astype(np.int64))
        planes = records[:, self.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
        return ImageSet(
            torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1))), labels
        )


CIFAR10 = Cifar(
    name="cifar10",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    train={f"data_batch_{number}.bin": 10000 for number in range(1, 6)},
    test={"test_batch.bin": 10000},
    names="batches.meta.txt",
    num_classes=10,
    label_bytes=1,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = Cifar(
    name="cifar100",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    train={"train.bin": 50000},
    test={"test.bin": 10000},
    names="fine_label_names.txt",
    num_classes=100,
    label_bytes=2,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
