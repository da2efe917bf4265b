"""Real photographs as model inputs: those that the scikit-image wheel carries."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@functools.cache
def _original(name: str) -> Tensor:
    skimage_data = pytest.importorskip("skimage.data", reason="photographs need scikit-image")
    pixels = torch.from_numpy(np.array(getattr(skimage_data, name)()))
    return pixels.permute(2, 0, 1)[None].to(torch.float32) / 255


def photographs(height: int = 224, width: int | None = None, count: int = len(PHOTOGRAPHS)):
    """Photographs resized to ``height`` x ``width`` and normalised, ``(count, 3, H, W)`` float32.

    The test is skipped where scikit-image is missing. Counts above the number of photographs
    repeat them mirrored.
    """
    size = (height, height if width is None else width)
    images = []
    for index in range(count):
        image = _original(PHOTOGRAPHS[index % len(PHOTOGRAPHS)])
        image = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        images.append(image.flip(-1) if index // len(PHOTOGRAPHS) % 2 else image)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.cat(images) - mean) / std
