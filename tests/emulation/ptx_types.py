"""Scalar types of PTX as numpy arrays of raw bits and of values."""

from __future__ import annotations

import numpy as np

__all__ = [
    "UNSIGNED",
    "WIDTH",
    "PTXError",
    "bfloat16_to_float32",
    "decode",
    "encode",
    "float32_to_bfloat16",
    "is_float",
    "truncate_to_tf32",
]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
"""The numpy type that holds the raw bits of a register, by its width."""

WIDTH = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "tf32", "f16x2", "bf16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 64),
    "b128": 128,
}
"""Bits of each type."""

_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}
_PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}


class PTXError(Exception):
    """The program did what a GPU forbids or leaves undefined, or what this cannot execute."""


def is_float(kind: str) -> bool:
    """Returns whether a type is of floating point, packed or not."""
    return kind in _FLOATS or kind in _PAIRS or kind == "bf16"


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Returns the values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even, and returns the bits."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + rounding) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def truncate_to_tf32(bits: np.ndarray) -> np.ndarray:
    """Returns float32 bits as the tensor cores read a TF32 operand: without the last 13."""
    return bits & np.uint32(0xFFFFE000)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns the values of raw bits; packed types get a last axis of two."""
    if kind in _FLOATS:
        return bits.view(_FLOATS[kind])
    if kind[0] == "s":
        return bits.view(_SIGNED[WIDTH[kind]])
    if kind == "bf16":
        return bfloat16_to_float32(bits)
    if kind in _PAIRS:
        part = _PAIRS[kind]
        halves = np.ascontiguousarray(bits).view(UNSIGNED[WIDTH[part]])
        return decode(halves.reshape(*bits.shape, 2), part)
    return bits


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns the raw bits of values, rounded to the type."""
    if kind in _FLOATS:
        return np.ascontiguousarray(values.astype(_FLOATS[kind], copy=False)).view(
            UNSIGNED[WIDTH[kind]]
        )
    if kind == "bf16":
        return float32_to_bfloat16(values)
    if kind in _PAIRS:
        parts = np.ascontiguousarray(encode(values, _PAIRS[kind]))
        return parts.view(UNSIGNED[WIDTH[kind]]).reshape(values.shape[:-1])
    if kind == "pred":
        return values.astype(np.bool_, copy=False)
    width = WIDTH[kind]
    if values.dtype.kind == "i":
        return values.astype(_SIGNED[width], copy=False).view(UNSIGNED[width])
    return values.astype(UNSIGNED[width], copy=False)
