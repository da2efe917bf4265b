"""A few elements of many tensors, read by PyTorch alone, for where Triton is not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["read", "sample"]

# As many as the kernel of kernels/checksum.py reads.
_SAMPLES = 16


def sample(tensors: list[Tensor]) -> list[Tensor]:
    """Returns views of up to sixteen elements of each tensor, evenly spread.

    Args:
        tensors: Dense tensors on one device.
    """
    views = []
    for tensor in tensors:
        count = min(_SAMPLES, tensor.numel())
        step = max(1, (tensor.numel() - 1) // max(1, count - 1))
        views.append(tensor.as_strided((count,), (step,), tensor.storage_offset()))
    return views


def read(views: list[Tensor]) -> Tensor:
    """Returns the bytes of all elements, on their device, without waiting for it.

    Args:
        views: As :func:`sample` returns them.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for view in views:
        by_dtype.setdefault(view.dtype, []).append(view)
    # A concatenation takes one launch for many tensors.
    return torch.cat([torch.cat(group).view(torch.uint8) for group in by_dtype.values()])
