"""Augmentation of whole batches: one gather flips and shifts every image of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation", "Preparation"]


class Preparation:
    """Turns a batch of pixels into the input of a network.

    ``(x / 255 - mean) / std``, then resized where the pictures have another size.

    Args:
        mean: Mean of each channel, of pixels between 0 and 1.
        std: What each channel is divided by.
        size: Height and width of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int],
        interpolation: str = "bilinear",
    ) -> None:
        scale = 255 * torch.tensor(std, dtype=torch.float64)
        dtype = torch.get_default_dtype()
        self._scale = (1 / scale).to(dtype)
        self._shift = (-255 * torch.tensor(mean, dtype=torch.float64) / scale).to(dtype)
        self.size = size
        self.interpolation = interpolation

    def __call__(self, images: Tensor) -> Tensor:
        """``(N, H, W, C)`` uint8 to ``(N, C, h, w)`` of torch's default dtype, channels_last."""
        if images.device != self._scale.device:
            self._scale = self._scale.to(images.device)
            self._shift = self._shift.to(images.device)
        x = torch.addcmul(self._shift, images.to(self._scale.dtype), self._scale)
        x = x.permute(0, 3, 1, 2)
        if x.shape[2:] != self.size:
            shrinks = x.shape[2] > self.size[0] or x.shape[3] > self.size[1]
            x = F.interpolate(
                x, self.size, mode=self.interpolation, align_corners=False, antialias=shrinks
            )
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Augmentation:
    """Random horizontal flips, and random shifts over a black border.

    Attributes:
        flip: Whether half of the images are mirrored.
        padding: Pixels by which an image is shifted at most, in each direction.
        smallest: Smallest share of its area that a random crop keeps of a picture of a folder.
    """

    flip: bool = True
    padding: int = 0
    smallest: float = 1.0

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Draws what happens to each image of a batch: ``(count, 3)``: mirrored, down, right."""
        mirrored = torch.randint(0, 2 if self.flip else 1, (count, 1), generator=random)
        shifts = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=random)
        return torch.cat([mirrored, shifts], 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Applies what was drawn to ``(N, H, W, C)`` images."""
        count, height, width, channels = images.shape
        device = images.device
        mirrored, down, right = drawn.to(device).unbind(1)
        rows = down[:, None] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device).expand(count, width)
        columns = torch.where(mirrored[:, None] == 1, columns.flip(1), columns) + right[:, None]
        pad = self.padding
        if pad:
            images = F.pad(images, (0, 0, pad, pad, pad, pad))
        padded_height, padded_width = images.shape[1:3]
        first = torch.arange(count, device=device)[:, None] * padded_height
        pixels = (first + rows)[:, :, None] * padded_width + columns[:, None, :]
        flat = images.reshape(-1, channels).index_select(0, pixels.reshape(-1))
        return flat.view(count, height, width, channels)
