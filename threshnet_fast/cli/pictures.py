"""Picture files that a command is given."""

from __future__ import annotations

from pathlib import Path

from ..bench.photographs import Photograph
from ..errors import CommandError

__all__ = ["load_picture"]


def load_picture(path: str, argument: str = "--image", channels: int = 3) -> Photograph:
    """Reads a picture file, as :mod:`threshnet_fast.data.pictures` says.

    Args:
        path: The file.
        argument: What it was named by, which error messages begin with.
        channels: 3 for RGB, 1 for grey.

    Returns:
        The picture, with ``(channels, H, W)`` pixels in uint8.

    Raises:
        CommandError: The file cannot be read as a picture.
    """
    from ..data.errors import PictureError
    from ..data.pictures import read_pixels

    try:
        return Photograph(Path(path).name, argument, read_pixels(path, channels))
    except PictureError as error:
        raise CommandError(f"{argument} {error}".strip(), status=2) from error
