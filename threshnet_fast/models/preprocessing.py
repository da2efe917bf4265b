"""From a picture to the input of a trained network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..train.weights import ModelInfo

__all__ = ["preprocess"]


def preprocess(pixels: Tensor, info: ModelInfo) -> Tensor:
    """Turns a picture into what a network was trained on.

    The square in the middle is cut out (its side is ``info.crop_fraction`` of the shorter side); a
    square larger than the pictures of the data set, ``info.source_size``, is reduced to that; then
    it is normalised and resized to ``info.image_size``, as in training.

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
    from ..data.augment import Preparation
    from ..data.images import to_grey

    side = max(1, round(info.crop_fraction * min(pixels.shape[1:])))
    top, left = ((length - side) // 2 for length in pixels.shape[1:])
    image = pixels[:, top : top + side, left : left + side]
    if channels < image.shape[0]:
        image = to_grey(image.permute(1, 2, 0)).permute(2, 0, 1)
    image = image.to(torch.float32)[None]
    if info.source_size is not None and side > max(info.source_size):
        image = F.interpolate(
            image, info.source_size, mode="bilinear", antialias=True, align_corners=False
        )
    prepare = Preparation(info.mean, info.std, info.image_size, info.interpolation)
    return prepare(image.permute(0, 2, 3, 1)).contiguous()
