"""A network with random weights, as if it had been trained, and pictures to show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from threshnet_fast.bench.networks import random_model
from threshnet_fast.models.weights_file import ModelInfo, save_model

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

INFO = ModelInfo(
    model="threshnet79",
    classes=CLASSES,
    mean=(0.49, 0.48, 0.45),
    std=(0.25, 0.24, 0.26),
    image_size=(48, 48),
    arguments={"num_classes": 10},
    source_size=(32, 32),
    dataset="cifar10",
    epochs=3,
    accuracy=0.5,
)


def save_random(path: Path, dtype: torch.dtype | None = None, **changes: object) -> nn.Module:
    """Writes a random network of 10 classes; returns it as it was written."""
    model = random_model("threshnet79", 10, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, model, dataclasses.replace(INFO, **changes), dtype)
    return model if dtype is None else model.to(dtype).float()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with an edge: ``(height, width, 3)``, uint8."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(2 * np.pi * (f * rows / height + g * columns / width + p))
        for f, g, p in random.uniform(0, 2, (3, 3))
    ]
    image = 128 + 100 * np.stack(waves, -1)
    image[height // 3 : height // 2, width // 4 :] = random.uniform(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)


def write_picture(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    """Writes a picture in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(height, width, seed)).save(path)
    return path
