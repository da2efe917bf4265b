"""From a picture to the input of a trained network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..models.weights_file import ModelInfo

__all__ = ["preprocess"]


def preprocess(pixels: Tensor, info: ModelInfo) -> Tensor:
    """Turns a picture into what a network was trained on.

    It sees what an evaluation sees. Of a network trained on a folder of pictures, that is the
    middle of the picture, of the shape of ``info.image_size`` and reduced by
    ``info.crop_fraction``, resized by Pillow. Of others, it is the square in the middle (its side
    is ``info.crop_fraction`` of the shorter side); a square larger than the pictures of the data
    set, ``info.source_size``, is reduced to that, and the normalised picture is resized.

    Args:
        pixels: ``(3, H, W)``, uint8; for a network of one channel also ``(1, H, W)``.
        info: What :func:`threshnet_fast.train.read_info` returned.

    Returns:
        ``(1, C, h, w)``, float32.

    Raises:
        TypeError: ``pixels`` is no tensor of uint8.
        ValueError: ``pixels`` has another shape, or the network takes neither 1 nor 3 channels.
    """
    if not isinstance(pixels, Tensor) or pixels.dtype is not torch.uint8:
        kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"pixels is of {kind}: expected a tensor of torch.uint8")
    channels = len(info.mean)
    if channels not in (1, 3):
        raise ValueError(f"info is of a network that takes {channels} channels: expected 1, 3")
    if pixels.ndim != 3 or pixels.shape[0] not in (3, channels) or not pixels.numel():
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}: expected (3, H, W)")
    from .augment import Preparation
    from .folder import cut_out, middle
    from .images import to_grey

    pixels = pixels.permute(1, 2, 0)
    if channels < pixels.shape[2]:
        pixels = to_grey(pixels)
    height, width, _ = pixels.shape
    prepare = Preparation(info.mean, info.std, info.image_size, info.interpolation)
    if info.source_size is None:
        from PIL import Image

        picture = Image.fromarray(pixels.squeeze(2).numpy(force=True))
        box = middle(width, height, info.image_size, info.crop_fraction)
        cut = cut_out(picture, box, info.image_size, info.interpolation)
        return prepare(torch.from_numpy(cut)[None]).contiguous()
    side = max(1, round(info.crop_fraction * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    image = pixels[top : top + side, left : left + side].permute(2, 0, 1)[None].to(torch.float32)
    if side > max(info.source_size):
        image = F.interpolate(
            image, info.source_size, mode="bilinear", antialias=True, align_corners=False
        )
    return prepare(image.permute(0, 2, 3, 1)).contiguous()
