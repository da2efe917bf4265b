"""Pictures: which files are some, and the one way in which they are read.

Training, evaluation, ``predict`` and ``bench`` read a picture by :func:`read_picture`:

- A photograph is turned as its camera's orientation mark (EXIF, XMP) says.
- What is transparent lies on white: an alpha channel, a transparent entry of a palette, a colour
  that the file declares transparent.
- CMYK becomes RGB by the colour profile of the file, and by Pillow's plain formula where there is
  none. A profile of an RGB or grey picture is not applied, as in torchvision.
- Integers of 16 bits (or of 12, as the file says) are scaled to 8, the nearest level each. Integers
  of 32 bits that are at most 255 are taken as they are, at most 65535 as ones of 16 bits, and
  others are stretched from their lowest to their highest.
- Floats between 0 and 1 are scaled to 255, those between 0 and 255 are taken as they are, and
  others are stretched as integers are. NaN counts as the lowest.
- Of several pages or frames, the first is read.
- One channel is brightness, 0.299 red + 0.587 green + 0.114 blue.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..text import printable
from .errors import DataError, PictureError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image, ImageFile

__all__ = [
    "MAX_PIXELS",
    "check_pictures",
    "is_picture",
    "list_folders",
    "list_pictures",
    "picture_suffixes",
    "quiet_decoder",
    "read_picture",
    "read_pixels",
]

MAX_PIXELS = 178_956_970
"""Pixels of the largest picture that is read, which is where Pillow suspects an attack."""

# Raster formats that Pillow decodes by itself. EPS and the like, which it hands to other programs,
# must never be among them.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI"),
    *("TIFF", "WEBP"),
)
# It has no mark of its own: a file is one if its name says so.
_BY_NAME = ("TGA",)
_ORIENTATION = 0x0112
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0
_LARGEST = 65535
# Their integers have 16 bits, though Pillow may keep them in 32.
_SIXTEEN_BITS = ("JPEG2000", "PNG", "PPM")
# What Pillow multiplies samples of fewer bits by, but not the transparent one.
_SCALE = {"L;2": 85, "L;4": 17}
# Files of a check that are handed to a thread at once.
_CHUNK = 32


@functools.cache
def _suffixes() -> dict[str, str]:
    """The format of each suffix."""
    from PIL import Image

    Image.init()
    # HEIF is known to Pillow where this package is installed.
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return {
        suffix: name
        for suffix, name in sorted(Image.registered_extensions().items())
        if name in (*_FORMATS, *_BY_NAME) and (name in Image.OPEN or name == "MPO")
    }


def picture_suffixes() -> frozenset[str]:
    """Suffixes of files that are taken for pictures, in lower case and with their dot."""
    return frozenset(_suffixes())


def is_picture(path: Path) -> bool:
    """Whether a file's name says that it is a picture."""
    return path.suffix.lower() in _suffixes()


@contextmanager
def quiet_decoder() -> Iterator[None]:
    """Silences Pillow's warnings; not for several threads at once, as Python's filters are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_picture(path: str | Path, channels: int = 3) -> Image.Image:
    """Reads a picture; the module says how.

    Args:
        path: The file.
        channels: 3 for RGB, 1 for grey.

    Returns:
        A picture of Pillow's mode ``"RGB"`` or ``"L"``.

    Raises:
        PictureError: The file cannot be read, is damaged, is no picture, or is one of more than
            :data:`MAX_PIXELS` pixels.
        ValueError: ``channels`` is neither 1 nor 3.
    """
    from PIL import Image, UnidentifiedImageError

    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}: expected 1 or 3")
    by_name = _suffixes().get(Path(path).suffix.lower())
    formats = [name for name in _FORMATS if name in Image.OPEN]
    formats += [name for name in _BY_NAME if name == by_name]
    try:
        # By the file rather than its name: Pillow would map it into memory, and a file that is cut
        # off meanwhile would then end the process.
        with Path(path).open("rb") as file, Image.open(file, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(
                    path, f"has {width}x{height} pixels: expected at most {MAX_PIXELS}"
                )
            if not width * height:
                raise PictureError(path, f"has no pixels: it is {width}x{height}")
            return _decode(image).convert("L" if channels == 1 else "RGB")
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        empty = not Path(path).stat().st_size
        reason = "it is empty" if empty else "or of a format that is not read"
        raise PictureError(path, f"not a picture, {reason}") from error
    except Image.DecompressionBombError as error:
        raise PictureError(path, f"has too many pixels: {_line(error)}") from error
    except OSError as error:
        raise PictureError(path, f"cannot be read: {error.strerror or _line(error)}") from error
    except MemoryError as error:
        raise PictureError(path, "cannot be read: there is not enough memory") from error
    except Exception as error:  # Pillow raises whatever the damage leads to.
        raise PictureError(path, f"is damaged: {_line(error)}") from error


def read_pixels(path: str | Path, channels: int = 3) -> torch.Tensor:
    """Reads a picture by :func:`read_picture`, without Pillow's warnings.

    Args:
        path: The file.
        channels: 3 for RGB, 1 for grey.

    Returns:
        ``(channels, height, width)``, uint8.

    Raises:
        PictureError: As :func:`read_picture`.
        ValueError: ``channels`` is neither 1 nor 3.
    """
    with quiet_decoder():
        pixels = torch.from_numpy(np.array(read_picture(path, channels)))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _decode(file: ImageFile.ImageFile) -> Image.Image:
    """The first frame, upright and on white, in three channels of 8 bits."""
    from PIL import Image

    # Loading removes both.
    sample = file.tile[0][3] if file.tile else None
    tags = dict(getattr(file, "tag_v2", {}))
    file.load()
    orientation = _orientation(file)
    image: Image.Image = file
    if image.mode == "La":
        image = image.convert("LA")
    alpha = None
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or (
        image.mode == "P" and image.has_transparency_data
    ):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif "transparency" in image.info:
        alpha = _opaque(image, image.info.pop("transparency"), sample)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, file.format in _SIXTEEN_BITS, tags)
    elif image.mode == "CMYK":
        image = _from_cmyk(image)
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image if orientation is None else image.transpose(orientation)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture as its camera says it was held."""
    from PIL import Image

    try:
        number = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Whatever the damage leads to; the pixels may well be sound.
        return None
    turn = Image.Transpose
    return {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }.get(number)


def _opaque(image: Image.Image, colour: object, sample: object) -> Image.Image | None:
    """Where a picture has another colour than the one declared transparent.

    Args:
        image: Of one channel, or RGB.
        colour: A number for each channel, as the file has it.
        sample: What Pillow calls the samples of the file.
    """
    from PIL import Image

    if isinstance(colour, bytes) or image.mode not in ("1", "L", "RGB", "I", "I;16", "I;16B"):
        return None
    wanted = np.atleast_1d(np.asarray(colour))
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if len(wanted) != pixels.shape[2]:
        return None
    if image.mode == "1":
        wanted = wanted != 0
    elif sample == "RGB;16B":
        # Pillow has dropped the lower halves of the samples.
        wanted = wanted >> 8
    else:
        wanted = wanted * _SCALE.get(str(sample), 1)
    return Image.fromarray(((pixels != wanted).any(2) * 255).astype(np.uint8))


def _eight_bits(image: Image.Image, sixteen: bool, tags: dict[int, Any]) -> Image.Image:
    """A grey picture of larger integers or of floats, in 8 bits."""
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
        values = np.where(np.isnan(values), low, values.clip(low, high))
    else:
        low, high = values.min(), values.max()
    inside = low >= 0
    if image.mode.startswith("I;16"):
        levels = _scale(values, (1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1)
    elif image.mode == "I" and (sixteen or (inside and 255 < high <= _LARGEST)):
        levels = _scale(values, _LARGEST)
    elif image.mode == "F" and inside and high <= 1:
        levels = np.rint(values * 255)
    elif inside and high <= 255:
        levels = np.rint(values)
    else:
        span = float(high) - float(low)
        levels = np.rint((values.astype(np.float64) - float(low)) * (255 / span if span else 0.0))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8))


def _scale(values: NDArray[Any], largest: int) -> NDArray[Any]:
    """The nearest of 256 levels to integers from 0 to ``largest``."""
    levels = (np.arange(largest + 1) * 510 + largest) // (2 * largest)
    result: NDArray[Any] = levels.astype(np.uint8)[values.clip(0, largest)]
    return result


def _from_cmyk(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, ImportError):
            # Damaged, of another colour space, or Pillow has no LittleCMS.
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def list_pictures(folder: Path) -> tuple[list[Path], int]:
    """Finds the pictures in a folder and below, by their names.

    Links are followed, but a folder is looked at once, and a link to one that it lies in leads
    nowhere. Names that begin with a dot, and what macOS adds to archives, are left alone.

    Args:
        folder: Where to look.

    Returns:
        The pictures, sorted, and the number of other files. A link to nothing counts as what its
        name says.

    Raises:
        DataError: A folder cannot be read.
    """
    pictures: list[Path] = []
    others = 0
    real = Path(os.path.realpath(folder))
    seen = {real}
    waiting = [(folder, real)]
    while waiting:
        place, real = waiting.pop()
        for entry, is_folder in _entries(place):
            path = place / entry.name
            if not is_folder:
                wanted = is_picture(path) and (path.is_file() or not path.exists())
                pictures += [path] if wanted else []
                others += not wanted
                continue
            target = Path(os.path.realpath(path)) if entry.is_symlink() else real / entry.name
            if target not in seen and not real.is_relative_to(target):
                seen.add(target)
                waiting.append((path, target))
    return sorted(pictures), others


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, and of links to some, sorted; the same are left alone.

    Raises:
        DataError: The folder cannot be read.
    """
    return [entry.name for entry, is_folder in _entries(folder) if is_folder]


def _entries(folder: Path) -> list[tuple[os.DirEntry[str], bool]]:
    """What is in a folder, sorted, and whether it is a folder."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
            return [
                (entry, _is_folder(entry))
                for entry in entries
                if not entry.name.startswith(".") and entry.name != "__MACOSX"
            ]
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{printable(folder)}: the folder cannot be read: {reason}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def check_pictures(
    paths: Sequence[Path], workers: int | None = None, channels: int = 3, progress: bool = True
) -> list[tuple[Path, str]]:
    """Reads pictures to the end, in threads, to find those that cannot be read.

    Args:
        paths: The files.
        workers: Number of threads; by default, as many as torch uses.
        channels: As of :func:`read_picture`.
        progress: Whether a terminal is shown a bar.

    Returns:
        The unreadable ones, in the order of ``paths``, each with its reason.
    """
    from tqdm import tqdm

    def check(start: int) -> tuple[int, list[tuple[int, Path, str]]]:
        unreadable = []
        chunk = paths[start : start + _CHUNK]
        for number, path in enumerate(chunk, start):
            try:
                read_picture(path, channels)
            except PictureError as error:
                unreadable.append((number, path, error.reason))
        return len(chunk), unreadable

    found: list[tuple[int, Path, str]] = []
    pool = ThreadPoolExecutor(workers or torch.get_num_threads())
    bar = tqdm(
        *(),
        total=len(paths),
        desc="check",
        unit="picture",
        leave=False,
        disable=None if progress else True,
    )
    with quiet_decoder(), bar:
        try:
            waiting = [pool.submit(check, start) for start in range(0, len(paths), _CHUNK)]
            for future in as_completed(waiting):
                count, unreadable = future.result()
                found += unreadable
                bar.update(count)
        finally:
            # Where the user interrupts it, what has not begun never does.
            pool.shutdown(cancel_futures=True)
    return [(path, reason) for _, path, reason in sorted(found, key=lambda item: item[0])]
