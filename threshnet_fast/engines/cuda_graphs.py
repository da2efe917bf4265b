"""CUDA graphs: whether to use them, whether one is being captured, capture and replay."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from .. import environment

__all__ = ["Graph", "capturing", "enabled"]

# PyTorch captures one graph at a time in a process.
_one_capture = threading.Lock()


def enabled() -> bool:
    """Returns whether prepared networks capture their launches in CUDA graphs."""
    return environment.switched_on(environment.CUDA_GRAPHS, default=True)


def capturing(device: torch.device) -> bool:
    """Returns whether what is called now on a device is captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


class Graph:
    """A function's launches, captured once and replayed on other contents of the same memory.

    Args:
        function: Launches kernels on the current stream; reads its argument, returns a new tensor.
        x: The memory that it reads; every call copies its input there.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x
        self._graph = torch.cuda.CUDAGraph()
        # Kernels are compiled for an input of these strides, which a capture must not do.
        function(x)
        # PyTorch's own stream for captures is on the device that was the first to have one.
        stream = torch.cuda.Stream(x.device)
        # Other threads may go on allocating meanwhile.
        with (
            _one_capture,
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._y = function(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Replays the launches on a copy of ``x``; the result is a new tensor."""
        self._x.copy_(x)
        self._graph.replay()
        return self._y.clone()
