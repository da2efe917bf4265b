"""Recipes: what an optimiser does, for how long, and to which images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "CLASS_WEIGHTS",
    "OPTIMIZERS",
    "RECIPES",
    "SAMPLINGS",
    "SCHEDULES",
    "Recipe",
    "balanced_weights",
    "learning_rate",
    "make_optimizer",
]

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("one-cycle", "steps")
CLASS_WEIGHTS = ("none", "balanced")
SAMPLINGS = ("uniform", "balanced")

# One-cycle starts at the peak over the first of these and ends at the peak over the second.
_START, _END = 25.0, 1e4
_HALVED = 0.5


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        name: What the recipe is called.
        optimizer: ``"sgd"`` (Nesterov's momentum), ``"adam"`` (weight decay in the gradient, as the
            paper's) or ``"adamw"``.
        learning_rate: The highest.
        schedule: ``"one-cycle"``: up in a straight line over ``warmup``, down to almost 0 along a
            cosine. ``"steps"``: halved at each of ``milestones``.
        warmup: Share of all steps; of one-cycle.
        milestones: Shares of all epochs; of steps.
        epochs: How often every training image is seen.
        batch_size: Images of one process's batch.
        momentum: Of ``"sgd"``.
        weight_decay: Of weights of convolutions and of the classifier; biases and BatchNorm have
            none.
        flip: Whether half of the images are mirrored.
        padding: Pixels by which images are shifted at most; of data sets in memory.
        crop_scale: Smallest share of its area that a random crop of a picture keeps; of folders.
        label_smoothing: Share of the target that all classes divide among them.
        ema_decay: Of the exponential moving average of the weights, which is what is evaluated and
            kept; 0 for none.
        clip_norm: Largest norm of the gradient, or 0 for any.
        drop_rate: Of the dropout before the classifier.
        class_weights: ``"balanced"`` weighs each image's loss by :func:`balanced_weights`,
            ``"none"`` all alike.
        sampling: ``"uniform"``: an epoch shows every image once. ``"balanced"``: as many images,
            of all classes alike.
    """

    name: str
    optimizer: str
    learning_rate: float
    schedule: str
    epochs: int
    batch_size: int
    warmup: float = 0.25
    milestones: tuple[float, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 0.0
    flip: bool = True
    padding: int = 0
    crop_scale: float = 1.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    clip_norm: float = 0.0
    drop_rate: float = 0.0
    class_weights: str = "none"
    sampling: str = "uniform"

    def check(self) -> None:
        """Raises ValueError where a value is out of range."""
        ranges = {
            "learning_rate": 0 < self.learning_rate < math.inf,
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "warmup": 0 <= self.warmup < 1,
            "milestones": all(0 < share < 1 for share in self.milestones),
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "padding": self.padding >= 0,
            "crop_scale": 0 < self.crop_scale <= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "ema_decay": 0 <= self.ema_decay < 1,
            "clip_norm": 0 <= self.clip_norm < math.inf,
            "drop_rate": 0 <= self.drop_rate < 1,
            "optimizer": self.optimizer in OPTIMIZERS,
            "schedule": self.schedule in SCHEDULES,
            "class_weights": self.class_weights in CLASS_WEIGHTS,
            "sampling": self.sampling in SAMPLINGS,
        }
        for name, sound in ranges.items():
            if not sound:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which is out of range")


RECIPES = {
    "paper": Recipe(
        name="paper",
        optimizer="adam",
        learning_rate=1e-3,
        schedule="steps",
        milestones=(75 / 200, 150 / 200),
        epochs=200,
        batch_size=100,
    ),
    "modern": Recipe(
        name="modern",
        optimizer="sgd",
        learning_rate=0.1,
        schedule="one-cycle",
        epochs=60,
        batch_size=128,
        weight_decay=5e-4,
        padding=4,
        crop_scale=0.25,
        label_smoothing=0.1,
        ema_decay=0.999,
    ),
}
"""The recipes by name."""


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights of the classes in the loss that make up for their numbers of images.

    ``images / (num_classes * images of the class)``, which scikit-learn calls balanced.

    Args:
        labels: ``(N,)``, int64, of the training images.
        num_classes: How many classes there are.

    Returns:
        ``(num_classes,)``, float64.

    Raises:
        ValueError: A class has no images.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if not bool(counts.all()):
        raise ValueError(f"class {int(counts.argmin())} has no training images to be weighed by")
    return torch.full_like(counts, len(labels), dtype=torch.float64) / (num_classes * counts)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, a function of its number alone.

    Args:
        recipe: The recipe.
        step: Number of the step, from 0.
        steps_per_epoch: Steps of an epoch.
    """
    total = recipe.epochs * steps_per_epoch
    peak = recipe.learning_rate
    if recipe.schedule == "steps":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= round(share * recipe.epochs) for share in recipe.milestones)
        return peak * _HALVED**passed
    rising = round(recipe.warmup * total)
    if step < rising:
        low = peak / _START
        return low + (peak - low) * step / rising
    low = peak / _END
    done = (step - rising) / max(1, total - 1 - rising)
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimiser of a recipe, in PyTorch's fused implementation.

    Args:
        recipe: The recipe.
        model: The network; parameters that want no gradient are left out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": recipe.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim <= 1],
            "weight_decay": 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    rate = recipe.learning_rate
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups, rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True
        )
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, rate, fused=True)
    return torch.optim.AdamW(groups, rate, fused=True)
