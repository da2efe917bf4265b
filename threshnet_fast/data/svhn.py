"""SVHN, cropped digits, in its MATLAB files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .dataset import DataSet
from .download import Published, fetch
from .errors import DataError
from .images import ImageSet

__all__ = ["SVHN", "SVHN_EXTRA", "Svhn"]

_SIDE = 32
_DIGITS = 10
_URL = "https://ufldl.stanford.edu/housenumbers/"


@dataclass(frozen=True)
class Svhn:
    """Which files of SVHN are read.

    Attributes:
        name: As ``--dataset`` takes it.
        train: Files of the training images, with their sizes and checksums.
        test: Likewise of the test images.
    """

    name: str
    train: dict[str, Published]
    test: dict[str, Published]

    def load(self, root: Path, verify: bool = True, download: bool = False) -> DataSet:
        """Reads the data set.

        Args:
            root: The folder of the files, or the one that has them in a folder ``svhn``.
            verify: Whether to insist on the published files.
            download: Whether to fetch what is missing, into ``root``.

        Raises:
            DataError: A file is missing or damaged, or SciPy, which reads it, is.
        """
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise DataError(
                f"{self.name} needs SciPy, which reads its files: pip install scipy"
            ) from error
        folder = root / "svhn" if (root / "svhn").is_dir() else root
        files = {**self.train, **self.test}
        for name, expected in files.items():
            path = folder / name
            if download:
                fetch(_URL + name, path, expected)
            elif not path.is_file():
                raise DataError(
                    f"{self.name}: no {name} in {folder} (--download fetches it from {_URL})"
                )
            elif verify:
                expected.check(path)

        def read(names: dict[str, Published]) -> ImageSet:
            parts = [_read(folder / name, loadmat) for name in names]
            return ImageSet(
                torch.cat([part.images for part in parts]),
                torch.cat([part.labels for part in parts]),
            )

        return DataSet(
            name=self.name,
            classes=tuple(map(str, range(_DIGITS))),
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            source_size=(_SIDE, _SIDE),
            train=read(self.train),
            test=read(self.test),
        )


def _read(path: Path, loadmat) -> ImageSet:  # type: ignore[no-untyped-def]
    try:
        content = loadmat(path)
        pixels, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # SciPy raises whatever the damage leads to.
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    count = len(labels)
    if pixels.dtype != np.uint8 or pixels.shape != (_SIDE, _SIDE, 3, count):
        raise DataError(
            f"{path} has images {pixels.dtype} {pixels.shape} and {count} labels: expected uint8 "
            f"({_SIDE}, {_SIDE}, 3, N) and N labels"
        )
    if count and not 1 <= labels.min() <= labels.max() <= _DIGITS:
        raise DataError(
            f"{path} is damaged: its labels are {labels.min()} to {labels.max()}, expected 1 to "
            f"{_DIGITS}"
        )
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)))
    # The digit 0 is stored as 10.
    return ImageSet(images, torch.from_numpy(labels % _DIGITS))


SVHN = Svhn(
    name="svhn",
    train={
        "train_32x32.mat": Published(
            182040794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
        )
    },
    test={
        "test_32x32.mat": Published(
            64275384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"
        )
    },
)

SVHN_EXTRA = Svhn(
    name="svhn-extra",
    train={
        **SVHN.train,
        "extra_32x32.mat": Published(
            1329278602, "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3"
        ),
    },
    test=SVHN.test,
)
