"""Checks of a model's input, in plain Python so that they trace under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_input", "check_memory", "has_memory"]


def check_input(x: Tensor, in_chans: int, min_size: int, weight: Tensor) -> None:
    """Raises a one-line error unless ``x`` is a batch of images that the model can run on.

    The batch may be empty.
    NaN and infinity are legal values and are not looked for.

    Args:
        x: The model's input, expected as ``(N, in_chans, H, W)``.
        in_chans: Channels the model takes.
        min_size: Smallest height and width the model takes.
        weight: A parameter of the model: ``x`` must have its device and, outside autocast, its
            dtype.

    Raises:
        TypeError: ``x`` is not a dense tensor, its dtype is not a floating one, or its dtype is
            not that of ``weight`` while autocast cannot convert it.
        ValueError: ``x`` has the wrong rank, number of channels, or size.
        RuntimeError: ``x`` is on another device than ``weight``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: expected a torch.Tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"x has layout {x.layout}: expected a dense tensor (torch.strided)")
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"x has dtype {dtype}: expected a floating-point image, {weight.dtype}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(
            f"x has {len(shape)} dimensions, shape {tuple(shape)}: "
            f"expected 4, (N, {in_chans}, height, width)"
        )
    _, channels, height, width = shape
    if channels != in_chans:
        raise ValueError(
            f"x has {channels} channels, shape {tuple(shape)}: expected {in_chans}, "
            f"(N, {in_chans}, height, width)"
        )
    if height < min_size or width < min_size:
        raise ValueError(
            f"x has height {height} and width {width}: expected at least {min_size} x {min_size}"
        )
    if x.device != weight.device:
        raise RuntimeError(
            f"x is on {x.device}: expected {weight.device}, where the model's parameters are"
        )
    if dtype != weight.dtype and not _autocast_converts(x, weight):
        raise TypeError(f"x has dtype {dtype}: expected {weight.dtype}, as the model's parameters")


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory at all, as it has not while it is sharded or offloaded.

    Args:
        tensor: A dense tensor.
    """
    return tensor.data_ptr() != 0 or tensor.numel() == 0


def check_memory(name: str, tensor: Tensor) -> None:
    """Raises a one-line error unless a tensor lies within its storage.

    A storage that was resized leaves its tensors as they are.

    Args:
        name: What to call it.
        tensor: A dense tensor.

    Raises:
        RuntimeError: It spans more than its storage has.
    """
    elements = tensor.numel()
    if elements == 0:
        return
    if tensor.is_contiguous():
        # As most are: looking at each dimension takes longer than all else here.
        last = elements - 1
    else:
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if needed > there:
        raise RuntimeError(
            f"{name} spans {needed} bytes of a storage of {there}: expected one that was not freed"
        )


def _autocast_converts(x: Tensor, weight: Tensor) -> bool:
    # Autocast leaves float64 alone, so it cannot reconcile it with anything else.
    return torch.float64 not in (x.dtype, weight.dtype) and torch.is_autocast_enabled(x.device.type)
