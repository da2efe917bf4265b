"""What a network without weights tells about its architecture."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

import threshnet_fast as tf


def torchvision_models() -> ModuleType:
    """torchvision's models; skips the test where it is missing, or made for another torch."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision: {error}")
    return models


def costs(model: tf.models.Network) -> tuple[int, int, float]:
    """Parameters, convolutions, and 10^9 multiply-adds, to three digits, of a model on meta."""
    macs = 0

    def count(module, _, output):
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    counted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for module in counted:
        module.register_forward_hook(count)
    model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, sum(isinstance(m, nn.Conv2d) for m in counted), round(macs / 1e9, 3)


def check_feature_info(model: tf.models.Network) -> None:
    """Asserts that ``feature_info`` of a model on meta has its maps' channels and sizes."""
    seen = {}

    def record(module, _, output):
        seen[module] = output.shape

    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(record)
    model(torch.empty(2, 3, 224, 448, device="meta"))
    for info in model.feature_info:
        wanted = (2, info["num_chs"], 224 // info["reduction"], 448 // info["reduction"])
        assert seen[model.get_submodule(info["module"])] == wanted
