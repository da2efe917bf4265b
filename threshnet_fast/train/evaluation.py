"""How well a network does on test images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .distributed import Processes

__all__ = ["Evaluation", "TestBatches", "evaluate", "widened"]

# Of the most probable classes, how many are looked at beside the first.
_BEST = 5


class TestBatches(Protocol):
    """Batches to evaluate on."""

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image of this process once."""


@dataclass(frozen=True)
class Evaluation:
    """How well a network does on test images.

    Attributes:
        loss: Mean cross entropy.
        confusion: ``confusion[i, j]`` images of class i were taken for class j.
        among_best: Images whose class is among the five most probable.
    """

    loss: float
    confusion: Tensor
    among_best: int = 0

    @property
    def count(self) -> int:
        """Images that were evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return int(self.confusion.diagonal().sum()) / self.count

    @property
    def top5_accuracy(self) -> float:
        """Share of images whose class is among the five most probable."""
        return self.among_best / self.count

    @property
    def class_accuracy(self) -> list[float | None]:
        """Share of right answers among the images of each class; None where there are none."""
        counts = self.confusion.sum(1).tolist()
        right = self.confusion.diagonal().tolist()
        return [
            number / count if count else None for number, count in zip(right, counts, strict=True)
        ]

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """What the description of a model says of it beside the accuracy."""
        return {
            "test_images": self.count,
            "class_accuracy": dict(zip(classes, self.class_accuracy, strict=True)),
        }


def widened(logits: Tensor) -> Tensor:
    """Logits in a precision in which a loss can be added up."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: TestBatches, num_classes: int, processes: Processes | None = None
) -> Evaluation:
    """Evaluates a network, which is left in evaluation mode.

    Args:
        model: The network.
        batches: This process's part of the test images.
        num_classes: Outputs of the network.
        processes: Adds up the counts of all processes.

    Raises:
        ValueError: There are no images.
    """
    processes = processes or Processes()
    model.eval()
    device = processes.device
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    among_best = torch.zeros(1, dtype=torch.int64, device=device)
    for images, labels in batches.all():
        logits = widened(model(images))
        best = logits.topk(min(_BEST, num_classes), 1).indices
        among_best += (best == labels[:, None]).any(1).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        pairs = labels * num_classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes * num_classes)
    processes.sum(confusion)
    processes.sum(loss)
    processes.sum(among_best)
    count = int(confusion.sum())
    if not count:
        raise ValueError("there are no test images")
    return Evaluation(
        loss.item() / count,
        confusion.view(num_classes, num_classes).cpu(),
        int(among_best),
    )
