"""One step of a training: forward, loss, backward and optimizer, over one batch or several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..data.images import generator
from .distributed import Processes
from .evaluation import widened
from .recipes import make_optimizer
from .settings import Settings

__all__ = ["Stepper"]

# The domain of the random numbers of a step, dropout's; data/images.py has those of the images.
_STEP = 3


class Stepper:
    """Makes the steps of a run, and adds up what they find.

    Args:
        settings: What the outcome depends on.
        model: The network, on its device, with synchronised statistics where they are wanted.
        processes: This process among those of the run.
        class_weights: ``(num_classes,)``, of each class in the loss; None weighs all alike.

    Attributes:
        optimizer: Changes the weights at the end of a step.
        scaler: Of the loss, so that gradients in float16 do not vanish; does nothing otherwise.
        sums: Of this process: the loss times images, right answers, images. ``[3]``, float64.
    """

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        processes: Processes,
        class_weights: Tensor | None,
    ) -> None:
        self.optimizer = make_optimizer(settings.recipe, model)
        self.scaler = torch.amp.GradScaler("cuda", enabled=settings.amp == "float16")
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        self._settings = settings
        self._model = model
        self._replica = processes.wrap(model, gathers_buffers=not settings.sync_batchnorm)
        self._processes = processes
        self._class_weights: Tensor | None = None
        if class_weights is not None:
            self._class_weights = class_weights.to(processes.device, torch.get_default_dtype())

    def begin(self) -> None:
        """Puts the network into training mode."""
        self._replica.train()

    def step(self, number: int, rate: float, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Makes a step.

        Args:
            number: Of the step in the run; its random numbers depend on this.
            rate: Learning rate.
            batches: What the step takes its images and labels from.

        Returns:
            The mean loss, a scalar in float64.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        settings, recipe = self._settings, self._settings.recipe
        device = self._processes.device
        # A step's random numbers depend on its number alone: that is what resuming repeats.
        torch.manual_seed(
            generator(settings.seed, _STEP, number, self._processes.rank).initial_seed()
        )
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in range(1, settings.accumulate + 1):
            images, labels = next(batches)
            with self._gradients_stay(batch < settings.accumulate):
                with self._autocast():
                    logits = self._replica(images)
                logits = widened(logits)
                loss = F.cross_entropy(
                    logits, labels, self._class_weights, label_smoothing=recipe.label_smoothing
                )
                self.scaler.scale(loss / settings.accumulate).backward()
            with torch.no_grad():
                right = (logits.argmax(1) == labels).sum()
                count = len(labels)
                sums = torch.stack([loss.detach().double() * count, right.double()])
                self.sums[:2] += sums
                self.sums[2] += count
                total += loss.detach() / settings.accumulate
        if recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _gradients_stay(self, stay: bool) -> contextlib.AbstractContextManager[Any]:
        """Leaves out the averaging over all processes where more gradients are added first."""
        if stay and isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        amp = self._settings.amp
        if not amp:
            return contextlib.nullcontext()
        return torch.autocast(self._processes.device.type, getattr(torch, amp))
