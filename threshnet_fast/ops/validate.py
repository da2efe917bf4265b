"""What the operators accept. Every check comes before any tensor's memory is read.

:func:`check_arguments` looks at Python types, which only a Python caller can get wrong;
:func:`check_tensors` runs inside of the registered operators, so that it also protects a caller of
``torch.ops.threshnet_fast``, and for the shapes that ``torch.compile`` propagates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engines.select import check_name
from ..plan.limits import GROUP, MAX_PIXELS, MAX_TAPS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that the operators compute in."""

# The C++ side counts in 32 bits; a larger number is a mistake in any case.
_LARGEST = 2**31 - 1

_MOST_CHANNELS = 2**24


def check_arguments(
    xs: object,
    tensors: dict[str, object],
    stride: object,
    padding: object,
    backend: object,
) -> list[Tensor]:
    """Checks the Python types of an operator's arguments.

    Args:
        xs: The segments.
        tensors: The other tensors, by argument name.
        stride: The convolution's stride.
        padding: The convolution's zero padding.
        backend: A backend's name or None.

    Returns:
        ``xs`` as a list.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no such backend.
    """
    if not isinstance(xs, list | tuple):
        raise TypeError(f"xs is a {type(xs).__name__}: expected a list or tuple of tensors")
    named = {**{f"xs[{i}]": x for i, x in enumerate(xs)}, **tensors}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a torch.Tensor")
    for name, number in (("stride", stride), ("padding", padding)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} is a {type(number).__name__}: expected an int")
    if backend is not None:
        check_name(backend)
    return list(xs)


def check_tensors(
    xs: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    *,
    affine_of: str,
) -> list[int]:
    """Checks dtypes, devices and shapes of an operator's arguments.

    Args:
        xs: Segments ``[N, C_i, H, W]``.
        weight: ``[C_out, sum of C_i, kernel height, kernel width]``.
        scale: One factor per channel.
        shift: One summand per channel.
        stride: The convolution's stride.
        padding: The convolution's zero padding.
        affine_of: ``"input"`` where scale and shift have an entry per channel of the
            concatenation, ``"output"`` where they have one per channel of the result.

    Returns:
        The result's shape, ``[N, C_out, output height, output width]``.

    Raises:
        TypeError: If a dtype or layout is not supported or does not match.
        ValueError: If a shape, a device, the stride or the padding is wrong.
    """
    if len(xs) == 0:
        raise ValueError("xs is empty: expected at least one tensor [N, C, H, W]")
    first = xs[0]
    channels = 0
    for i, x in enumerate(xs):
        name = f"xs[{i}]"
        _check_image(name, x)
        if i > 0:
            _check_same(name, x, first)
            if x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
                n, _, h, w = first.shape
                raise ValueError(
                    f"{name} has shape {_shape(x)}: expected [{n}, C, {h}, {w}], the batch, height "
                    "and width of xs[0]"
                )
        channels += x.shape[1]

    _check_layout("weight", weight)
    if weight.dim() != 4 or weight.shape[1] != channels or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {_shape(weight)}: expected [C_out, {channels}, K, K], where "
            f"{channels} is the number of channels of xs together"
        )
    _check_same("weight", weight, first)

    length = channels if affine_of == "input" else weight.shape[0]
    for name, vector in (("scale", scale), ("shift", shift)):
        _check_layout(name, vector)
        if vector.dim() != 1 or vector.shape[0] != length:
            raise ValueError(
                f"{name} has shape {_shape(vector)}: expected [{length}], an entry per {affine_of} "
                "channel"
            )
        if vector.device != first.device:
            raise ValueError(f"{name} is on {vector.device}: expected {first.device}, as xs[0]")
        if vector.dtype not in (torch.float32, first.dtype):
            wanted = " or ".join(dict.fromkeys((str(first.dtype), "torch.float32")))
            raise TypeError(f"{name} is {vector.dtype}: expected {wanted}")
    if scale.dtype != shift.dtype:
        raise TypeError(f"shift is {shift.dtype}: expected {scale.dtype}, as scale")

    if not 1 <= stride <= _LARGEST:
        raise ValueError(f"stride is {stride}: expected at least 1 and less than 2**31")
    if not 0 <= padding <= _LARGEST:
        raise ValueError(f"padding is {padding}: expected at least 0 and less than 2**31")
    kernel = weight.shape[2:]
    size = [
        (extent + 2 * padding - taps) // stride + 1
        for extent, taps in zip(first.shape[2:], kernel, strict=True)
    ]
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"weight has a {kernel[0]}x{kernel[1]} kernel: expected one that fits the "
            f"{first.shape[2]}x{first.shape[3]} images of xs padded by {padding}"
        )
    return [first.shape[0], weight.shape[0], *size]


def beyond_limits(
    backend: str, xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
) -> str | None:
    """Returns what is beyond the limits of a fused backend, or None.

    Its kernels check the same before they touch any memory, but what they refuse is an error.
    Offsets within a feature map have 64 bits, so that a map may have any number of elements.

    Args:
        backend: ``"cpu"``, or ``"triton"`` or ``"cuda"``, which have the same limits.
        xs: The segments.
        weight: The convolution's weight.
        shape: Of the result.
        padding: The convolution's zero padding.
    """
    limits = _cpu_limits if backend == "cpu" else _gpu_limits
    for what, (count, most) in limits(xs, weight, shape, padding).items():
        if count > most:
            return f"backend {backend!r} takes at most {most} {what}, these are {count}"
    return None


def _cpu_limits(
    xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
) -> dict[str, tuple[int, int]]:
    batch, _, height, width = xs[0].shape
    out_channels, channels, rows, columns = weight.shape
    # Windows begin at a pixel that may lie on the padding, before or behind all of the map's own.
    before = padding * (width + 1)
    row, column = max(height + padding - rows, 0), max(width + padding - columns, 0)
    behind = ((batch - 1) * height + row) * width + column
    return {
        "taps of a kernel": (rows * columns, MAX_TAPS),
        "channels of xs": (channels, _MOST_CHANNELS),
        "channels of the result": (out_channels, _MOST_CHANNELS),
        "segments": (len(xs), 2**20 - 2),
        "rows and columns of padding": (padding, 2**20 - 1),
        "pixels of xs": (batch * height * width, _LARGEST),
        "output pixels": (batch * shape[2] * shape[3], 2**27),
        "pixels to where a window begins": (max(before, behind), _LARGEST - 14),
    }


def _gpu_limits(
    xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
) -> dict[str, tuple[int, int]]:
    batch, _, height, width = xs[0].shape
    rows, columns = weight.shape[2:]
    whole_groups = (
        (weight.shape[0] + GROUP - 1) * (weight.shape[1] + (GROUP - 1) * len(xs)) * rows * columns
    )
    sizes = {
        "pixels of xs": batch * height * width,
        "output pixels": batch * shape[2] * shape[3],
        "padded rows": height + 2 * padding,
        "padded columns": width + 2 * padding,
        "pixels under a window": rows * (width + columns),
        "elements of weight, channels in groups of 16": whole_groups,
    }
    return {what: (count, MAX_PIXELS) for what, count in sizes.items()}


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} is {layout}: expected a dense (torch.strided) tensor")


def _check_image(name: str, x: Tensor) -> None:
    _check_layout(name, x)
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} is {x.dtype}: expected one of {wanted}")
    if x.dim() != 4:
        raise ValueError(
            f"{name} has {x.dim()} dimensions, shape {_shape(x)}: expected 4, [N, C, H, W]"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {_shape(x)}: expected [N, C, H, W] with no zero in it")


def _check_same(name: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {first.device}, as xs[0]")
    if tensor.dtype != first.dtype:
        raise TypeError(f"{name} is {tensor.dtype}: expected {first.dtype}, as xs[0]")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
