"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]

# After t updates the decay is at most (1 + t) / (_RAMP + t): the first weights are soon forgotten.
_RAMP = 10


class MovingAverage:
    """Keeps the average of a network's weights and of its BatchNorm statistics.

    ``average += (1 - decay) * (weights - average)``, for all tensors in a few operators. As that
    reads every weight twice, it is done every few steps, with the decay of as many.

    Args:
        model: The network.
        decay: Of one step.
        every: Steps between two updates.

    Attributes:
        module: A copy of the network that holds the averages.
        updates: Updates so far.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.updates = 0
        self._decay = decay**every
        self._every = every
        averages, values = _tensors(self.module), _tensors(model)
        pairs = list(zip(averages, values, strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, where it is the turn of one.

        Args:
            step: Steps that have been made.
        """
        # The first at once: there must be something to evaluate after the shortest run.
        if self.updates and step % self._every:
            return
        decay = min(self._decay, (1 + self.updates) / (_RAMP + self.updates))
        averages, values = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)
        self.updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in itertools.chain(model.parameters(), model.buffers())]
