"""Scalar types of PTX as numpy arrays of raw bits and of values.

Registers hold raw bits in unsigned integers (predicates: booleans). Values of 16-bit floating point
are computed with in float32 and rounded when they are written back.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = [
    "BYTES",
    "UNSIGNED",
    "WIDTH",
    "PTXError",
    "bfloat16_to_float32",
    "decode",
    "encode",
    "float16_to_float32",
    "float32_to_bfloat16",
    "float32_to_float16",
    "is_float",
    "pack",
    "round_to_tf32",
    "truncate_to_tf32",
    "unpack",
]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
"""The numpy type that holds the raw bits of a register, by its width."""

BYTES = {
    size: np.dtype(name) for size, name in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "V16"))
}
"""The numpy type that moves so many bytes at once."""

WIDTH = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "tf32"), 32),
    **dict.fromkeys(("f16x2", "bf16x2", "u16x2", "s16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 64),
    "b128": 128,
}
"""Bits of each type."""

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f32": np.float32, "tf32": np.float32, "f64": np.float64}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32", "u16x2": "u16", "s16x2": "s16"}


class PTXError(Exception):
    """The program did what a GPU forbids or leaves undefined, or what this cannot execute."""


def is_float(kind: str) -> bool:
    """Returns whether a type is of floating point, packed or not."""
    kind = PAIRS.get(kind, kind)
    return kind in FLOATS or kind in ("f16", "bf16")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Returns the values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even, and returns the bits."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + rounding) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FC0), rounded) if nan.any() else rounded


def float16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Returns the values of float16 bits."""
    return bits.view(np.float16).astype(np.float32)


def float32_to_float16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even, and returns the bits."""
    values = np.ascontiguousarray(values, np.float32)
    # PyTorch's conversion is two orders of magnitude faster than numpy's.
    return torch.from_numpy(values).to(torch.float16).view(torch.int16).numpy().view(np.uint16)


def truncate_to_tf32(bits: np.ndarray) -> np.ndarray:
    """Returns float32 bits as the tensor cores read a TF32 operand: without the last 13."""
    return bits & np.uint32(0xFFFFE000)


def round_to_tf32(bits: np.ndarray, *, ties_to_even: bool) -> np.ndarray:
    """Rounds float32 bits to nearest TF32, ties to even or away from zero; keeps infinity and NaN.

    The result is bits of float32 whose last 13 are 0.
    """
    if ties_to_even:
        rounding = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        rounding = np.uint32(0x1000)
    special = (bits & np.uint32(0x7F800000)) == 0x7F800000
    rounded = truncate_to_tf32(bits + rounding)
    if not special.any():
        return rounded
    kept = np.where((bits & np.uint32(0x7FFFFF)) != 0, bits | np.uint32(0x400000), bits)
    return np.where(special, truncate_to_tf32(kept), rounded)


def unpack(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns the two values of each packed register: ``[..., 2]``, the lower half first."""
    part = PAIRS[kind]
    halves = np.ascontiguousarray(bits).view(UNSIGNED[WIDTH[part]])
    return decode(halves.reshape(*bits.shape, 2), part)


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    """The reverse of :func:`unpack`, with rounding."""
    parts = np.ascontiguousarray(encode(values, PAIRS[kind]))
    return parts.view(UNSIGNED[WIDTH[kind]]).reshape(values.shape[:-1])


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns the values of raw bits; packed types get a last axis of two."""
    if kind in FLOATS:
        return bits.view(FLOATS[kind])
    if kind == "f16":
        return float16_to_float32(bits)
    if kind == "bf16":
        return bfloat16_to_float32(bits)
    if kind in PAIRS:
        return unpack(bits, kind)
    if kind[0] == "s":
        return bits.view(SIGNED[WIDTH[kind]])
    return bits


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns the raw bits of values, rounded to the type."""
    if kind in FLOATS:
        return values.astype(FLOATS[kind], copy=False).view(UNSIGNED[WIDTH[kind]])
    if kind == "f16":
        return float32_to_float16(values)
    if kind == "bf16":
        return float32_to_bfloat16(values)
    if kind in PAIRS:
        return pack(values, kind)
    if kind == "pred":
        return values.astype(np.bool_, copy=False)
    width = WIDTH[kind]
    if values.dtype.kind == "i":
        return values.astype(SIGNED[width], copy=False).view(UNSIGNED[width])
    return values.astype(UNSIGNED[width], copy=False)
