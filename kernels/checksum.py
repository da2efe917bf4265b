"""A checksum of a few elements of many tensors, to notice that weights were written to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["checksum", "sample_addresses"]

_SAMPLES = 16
_BLOCK = 4096


@triton.jit
def checksum_kernel(addresses_ptr, count, result_ptr, BLOCK: tl.constexpr):
    """Adds up 16-bit words at ``addresses``, each with a factor of its own; wraps around."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        exists = index < count
        addresses = tl.load(addresses_ptr + index, mask=exists, other=0)
        words = tl.load(addresses.to(tl.pointer_type(tl.int16)), mask=exists, other=0)
        total += (words.to(tl.int64) & 0xFFFF) * (2 * index + 1).to(tl.int64) * 0x9E3779B1
    tl.store(result_ptr, tl.sum(total, 0))


def sample_addresses(tensors: list[Tensor]) -> Tensor:
    """Returns the addresses of sixteen elements of each tensor, evenly spread from end to end.

    Args:
        tensors: Dense tensors on one device, of elements of at least two bytes. They have to stay
            alive for as long as the addresses are used.
    """
    addresses: list[int] = []
    for tensor in tensors:
        size = tensor.element_size()
        last = tensor.numel() - 1
        for sample in range(min(_SAMPLES, tensor.numel())):
            index = last * sample // max(1, min(_SAMPLES, tensor.numel()) - 1)
            start = tensor.data_ptr() + size * index
            addresses += range(start, start + size, 2)
    return torch.tensor(addresses, dtype=torch.int64, device=tensors[0].device)


def checksum(addresses: Tensor) -> int:
    """Reads the words at these addresses on the current stream, and waits for the result."""
    result = torch.empty(1, dtype=torch.int64, device=addresses.device)
    checksum_kernel[(1,)](addresses, len(addresses), result, BLOCK=_BLOCK, num_warps=8)
    return int(result.item())
