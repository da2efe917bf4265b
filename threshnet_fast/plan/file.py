"""Plans as files, which C and C++ programs run without Python: see ``threshnet_fast.h``.

Layout, little-endian, every number before the weights' elements an int64: the eight bytes
``TNFPLAN1``; the number of entries of the description and the number of weights; the description
(see :mod:`.serialize`); the number of elements of each weight; their elements, float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..files import replacing
from ..models.network import Network
from .limits import check_gpu
from .lower import lower
from .memory import plan_memory
from .serialize import serialize

__all__ = ["save_plan"]

_MAGIC = b"TNFPLAN1"


def save_plan(module: Network, input_shape: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Writes a network for one input shape to a file that the C interface reads.

    The file holds the plan and its folded weights in float32, whatever the module computes in: the
    dtype is chosen where the file is loaded. It holds nothing that is executed.

    Args:
        module: The network, in evaluation mode; on any device.
        input_shape: ``(N, C, H, W)`` of the images.
        path: Where to write; an existing file is replaced once the new one is complete.

    Raises:
        UnsupportedModule: ``module``, or a part of it, is none that can be lowered, or that a GPU
            has kernels for.
        ValueError: ``input_shape`` is not one that the network takes.
        RuntimeError: ``module`` is in training mode, which a file has no use for.
        OSError: The file cannot be written.
    """
    plan = lower(module, input_shape)
    check_gpu(plan)
    if module.training:
        raise RuntimeError("module is in training mode: expected it after module.eval()")
    weights = [
        weight.to("cpu", torch.float32).contiguous().numpy().reshape(-1)
        for weight in plan.weights()
    ]
    description = serialize(plan, plan_memory(plan)).numpy()
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC)
        for numbers in (
            [len(description), len(weights)],
            description,
            [weight.size for weight in weights],
        ):
            file.write(np.asarray(numbers, "<i8").tobytes())
        for weight in weights:
            file.write(weight.astype("<f4", copy=False).tobytes())
