"""The networks that are measured, with random weights, and their outputs in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .job import plain_module

__all__ = ["random_model", "randomise", "reference_output", "tiny_model", "worst_error"]

# Images that the reference takes at once on a GPU: float64 needs much memory.
_REFERENCE_IMAGES = 8


def tiny_model() -> nn.Module:
    """A random network of two small blocks, which is built and run in no time."""
    from ..models import ThreshNet

    model = ThreshNet(
        first_channels=(8, 16),
        blocks=(2, 2),
        transitions=(16, 16),
        downsample=(True, False),
        threshold=1,
        growth_rates=(8, 16),
        num_classes=2,
    )
    return randomise(model, 0)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Gives every BatchNorm statistics that change something, and the classifier a bias, in place.

    Means and shifts are away from 0, variances and scales away from 1, some scales are negative,
    none is 0: an engine that skips or reorders any of them fails the check.

    Returns:
        The same model, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                draw(module.running_mean, -0.4, 0.4)
                draw(module.running_var, 0.5, 1.8)
                draw(module.weight, 0.6, 1.4)
                if module.affine:
                    module.weight[::8] *= -1
                draw(module.bias, -0.3, 0.5)
            elif isinstance(module, nn.Linear):
                draw(module.bias, -0.5, 0.5)
    return model.eval()


def random_model(name: str, classes: int, seed: int) -> nn.Module:
    """A registered model with random weights and statistics; equal seeds give equal models."""
    from ..models import create_model

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = create_model(name, num_classes=classes)
    return randomise(model, seed)


def reference_output(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the stock PyTorch module in float64, computed where ``x`` is; on the CPU."""
    module = copy.deepcopy(plain_module(model)).double()
    with torch.inference_mode():
        if x.device.type == "cpu":
            return module(x.double())
        parts = x.split(_REFERENCE_IMAGES)
        return torch.cat([module(part.double()).cpu() for part in parts])


def worst_error(output: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or a value is not finite."""
    if output.shape != reference.shape:
        return float("inf")
    difference = (output.detach().cpu().double() - reference.cpu().double()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max())
