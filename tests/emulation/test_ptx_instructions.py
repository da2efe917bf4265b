"""Scalar instructions of the PTX interpreter against numpy, exact fractions and plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch

from emulation.programs import assemble, elementwise, evaluate, kernel, module
from emulation.ptx import PTXError, run_ptx

THREADS = 128


def integers(dtype: Any, seed: int = 0) -> np.ndarray:
    """Random bits, small numbers and the ends of the range."""
    generator = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    values = generator.integers(limits.min, limits.max, THREADS, dtype, endpoint=True)
    small = generator.integers(0, 100, 48)
    values[:48] = small.astype(dtype) if limits.min == 0 else (small - 50).astype(dtype)
    values[48:54] = [limits.min, limits.max, limits.min, limits.max, 1, 0]
    return generator.permutation(values)


def floats(dtype: Any = np.float32, seed: int = 0, *, special: bool = True) -> np.ndarray:
    """Numbers of many sizes, halves, and NaN and infinity among them."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(THREADS) * 2.0 ** generator.integers(-6, 7, THREADS)
    values[:16] = np.arange(-8, 8) + 0.5
    if special:
        values[16:24] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, np.nan, -1.0]
    with np.errstate(over="ignore"):
        return generator.permutation(values).astype(dtype)


def python(function: Callable[..., int], dtype: Any) -> Callable[..., np.ndarray]:
    """An expected value in Python's exact integers, wrapped to a type."""

    def expected(*arrays: np.ndarray) -> np.ndarray:
        bits = 8 * np.dtype(dtype).itemsize
        wrapped = [
            function(*map(int, each)) & ((1 << bits) - 1) for each in zip(*arrays, strict=True)
        ]
        return np.array(wrapped, f"u{bits // 8}").view(dtype)

    return expected


def truncated_division(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def nearest(value: Fraction, dtype: Any) -> np.floating:
    """Rounds a fraction to nearest, ties to even, by trying the neighbours of a first guess."""
    guess = np.dtype(dtype).type(float(value))
    near = [guess, np.nextafter(guess, dtype(-np.inf)), np.nextafter(guess, dtype(np.inf))]
    near = [each for each in near if np.isfinite(each)]
    bits = f"u{np.dtype(dtype).itemsize}"
    return min(
        near,
        key=lambda each: (abs(Fraction(float(each)) - value), int(each.view(bits)) & 1),
    )


def fused(dtype: Any) -> Callable[..., np.ndarray]:
    def expected(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        exact = [
            Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        return np.array([nearest(each, dtype) for each in exact], dtype)

    return expected


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(values: np.ndarray, *, even: bool) -> np.ndarray:
    """By fractions of the spacing of TF32, 2**-10 of the power of two below."""
    result = []
    for value in values:
        if not np.isfinite(value) or value == 0:
            result.append(value)
            continue
        spacing = Fraction(2) ** (int(np.floor(np.log2(abs(value)))) - 10)
        units = Fraction(float(value)) / spacing
        below = units.numerator // units.denominator
        rest = units - below
        half = Fraction(1, 2)
        up = rest > half or (rest == half and (below % 2 == 1 if even else value > 0))
        result.append(float((below + up) * spacing))
    return np.array(result, np.float32)


@dataclass(frozen=True)
class Case:
    """A body that computes ``%o0`` from ``%i0``, ..., and what it should be."""

    body: str
    inputs: tuple[np.ndarray, ...]
    expected: Callable[..., np.ndarray]
    bits: Any = None

    def output(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            return self.expected(*self.inputs)


I32, J32, K32 = (integers(np.int32, seed) for seed in range(3))
U32, V32, W32 = (integers(np.uint32, seed) for seed in range(3))
I64, J64 = (integers(np.int64, seed) for seed in range(2))
U64, V64 = (integers(np.uint64, seed) for seed in range(2))
U16 = integers(np.uint16)
F32, G32, H32 = (floats(seed=seed) for seed in range(3))
PLAIN = tuple(floats(seed=seed, special=False) for seed in range(3))
F64 = floats(np.float64)
F16, G16, H16 = (floats(np.float16, seed) for seed in range(3))
SMALL = np.arange(THREADS, dtype=np.uint32) % 70
NONZERO = np.where(J32 == 0, 3, J32).astype(np.int32)
POSITIVE = np.abs(PLAIN[0]) + np.float32(0.1)


def halves(seed: int) -> np.ndarray:
    """Two float16 of each thread, as 32 bits."""
    pair = np.stack([floats(np.float16, seed), floats(np.float16, seed + 9)], 1)
    return pair.view(np.uint32)[:, 0]


def brain_halves(seed: int) -> np.ndarray:
    pair = np.stack([to_bfloat16(floats(seed=seed + k, special=False)) for k in (0, 9)], 1)
    return pair.view(np.uint32)[:, 0]


def singles(seed: int) -> np.ndarray:
    """Two float32 of each thread, as 64 bits."""
    pair = np.stack([floats(seed=seed, special=False), floats(seed=seed + 9, special=False)], 1)
    return pair.view(np.uint64)[:, 0]


def on_halves(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def expected(*words: np.ndarray) -> np.ndarray:
        return function(*(each.view(np.float16) for each in words)).view(np.uint32)

    return expected


def on_singles(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def expected(*words: np.ndarray) -> np.ndarray:
        return function(*(each.view(np.float32) for each in words)).view(np.uint64)

    return expected


def shift(left: bool, signed: bool) -> Callable[..., np.ndarray]:
    dtype = np.int32 if signed else np.uint32

    def one(value: int, by: int) -> int:
        return value << min(by, 32) if left else value >> min(by, 32)

    return python(one, dtype)


def bit_field(a: int, start: int, count: int, signed: bool) -> int:
    digits = [(a >> min(start + k, 31) if signed else a >> (start + k)) & 1 for k in range(count)]
    value = sum(digit << k for k, digit in enumerate(digits[:32]))
    if signed and count and digits[min(count, 32) - 1]:
        value |= -1 << min(count, 32)
    return value


def permuted(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    result = bytearray()
    for place in range(4):
        code = selector >> 4 * place & 15
        byte = source[code & 7]
        result.append((255 if byte & 128 else 0) if code & 8 else byte)
    return int.from_bytes(result, "little")


def looked_up(table: int) -> Callable[[int, int, int], int]:
    def one(a: int, b: int, c: int) -> int:
        index = [(a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1) for k in range(32)]
        return sum((table >> each & 1) << k for k, each in enumerate(index))

    return one


def to_signed(round_: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def expected(values: np.ndarray) -> np.ndarray:
        whole = round_(np.nan_to_num(values.astype(np.float64), nan=0.0))
        return np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int32)

    return expected


def compare(name: str) -> str:
    return f"setp.{name} %p1, %i0, %i1; selp.u32 %o0, 1, 0, %p1;"


def flags(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *arrays: function(*arrays).astype(np.uint32)


def either_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def relu(values: np.ndarray) -> np.ndarray:
    return np.where(values < 0, values.dtype.type(0), values)


RANDOM_BITS = integers(np.uint32, 7)

CASES = {
    # Integers.
    "add.s32": Case("add.s32 %o0, %i0, %i1;", (I32, J32), python(lambda a, b: a + b, np.int32)),
    "sub.u64": Case("sub.u64 %o0, %i0, %i1;", (U64, V64), python(lambda a, b: a - b, np.uint64)),
    "add.s32 immediate": Case("add.s32 %o0, %i0, -7;", (I32,), python(lambda a: a - 7, np.int32)),
    "neg.s32": Case("neg.s32 %o0, %i0;", (I32,), python(lambda a: -a, np.int32)),
    "abs.s32": Case("abs.s32 %o0, %i0;", (I32,), python(abs, np.int32)),
    "mul.lo.s32": Case("mul.lo.s32 %o0, %i0, %i1;", (I32, J32), python(lambda a, b: a * b, "i4")),
    "mul.hi.s32": Case(
        "mul.hi.s32 %o0, %i0, %i1;", (I32, J32), python(lambda a, b: a * b >> 32, "i4")
    ),
    "mul.hi.u32": Case(
        "mul.hi.u32 %o0, %i0, %i1;", (U32, V32), python(lambda a, b: a * b >> 32, "u4")
    ),
    "mul.hi.u64": Case(
        "mul.hi.u64 %o0, %i0, %i1;", (U64, V64), python(lambda a, b: a * b >> 64, "u8")
    ),
    "mul.wide.s32": Case(
        "mul.wide.s32 %o0, %i0, %i1;", (I32, J32), python(lambda a, b: a * b, "i8")
    ),
    "mul.wide.u32": Case(
        "mul.wide.u32 %o0, %i0, %i1;", (U32, V32), python(lambda a, b: a * b, "u8")
    ),
    "mul.wide.u16": Case("mul.wide.u16 %o0, %i0, 513;", (U16,), python(lambda a: a * 513, "u4")),
    "mad.lo.s32": Case(
        "mad.lo.s32 %o0, %i0, %i1, %i2;", (I32, J32, K32), python(lambda a, b, c: a * b + c, "i4")
    ),
    "mad.wide.s32": Case(
        "mad.wide.s32 %o0, %i0, %i1, %i2;", (I32, J32, I64), python(lambda a, b, c: a * b + c, "i8")
    ),
    "div.s32": Case("div.s32 %o0, %i0, %i1;", (I32, NONZERO), python(truncated_division, "i4")),
    "div.u32": Case("div.u32 %o0, %i0, %i1;", (U32, V32 | 1), python(lambda a, b: a // b, "u4")),
    "div.s64": Case(
        "div.s64 %o0, %i0, %i1;", (I64 // 2, J64 | 1), python(truncated_division, "i8")
    ),
    "rem.s32": Case(
        "rem.s32 %o0, %i0, %i1;",
        (I32, NONZERO),
        python(lambda a, b: a - truncated_division(a, b) * b, "i4"),
    ),
    "rem.u32": Case("rem.u32 %o0, %i0, %i1;", (U32, V32 | 1), python(lambda a, b: a % b, "u4")),
    "rem.u64": Case("rem.u64 %o0, %i0, %i1;", (U64, V64 | 1), python(lambda a, b: a % b, "u8")),
    "min.s32": Case("min.s32 %o0, %i0, %i1;", (I32, J32), np.minimum),
    "max.u32": Case("max.u32 %o0, %i0, %i1;", (U32, V32), np.maximum),
    "and.b32": Case("and.b32 %o0, %i0, %i1;", (U32, V32), np.bitwise_and),
    "or.b64": Case("or.b64 %o0, %i0, %i1;", (U64, V64), np.bitwise_or),
    "xor.b32": Case("xor.b32 %o0, %i0, %i1;", (U32, V32), np.bitwise_xor),
    "not.b32": Case("not.b32 %o0, %i0;", (U32,), np.invert),
    "shl.b32": Case("shl.b32 %o0, %i0, %i1;", (U32, SMALL), shift(True, False)),
    "shl.b32 immediate": Case("shl.b32 %o0, %i0, 5;", (U32,), python(lambda a: a << 5, "u4")),
    "shl.b64": Case("shl.b64 %o0, %i0, %i1;", (U64, SMALL), python(lambda a, b: a << b, "u8")),
    "shr.u32": Case("shr.u32 %o0, %i0, %i1;", (U32, SMALL), shift(False, False)),
    "shr.s32": Case("shr.s32 %o0, %i0, %i1;", (I32, SMALL), shift(False, True)),
    "shf.l.wrap": Case(
        "shf.l.wrap.b32 %o0, %i0, %i1, %i2;",
        (U32, V32, W32),
        python(lambda a, b, c: (b << 32 | a) << (c & 31) >> 32, "u4"),
    ),
    "shf.r.clamp": Case(
        "shf.r.clamp.b32 %o0, %i0, %i1, %i2;",
        (U32, V32, SMALL),
        python(lambda a, b, c: (b << 32 | a) >> min(c, 32), "u4"),
    ),
    "bfe.u32": Case(
        "bfe.u32 %o0, %i0, %i1, 7;",
        (U32, SMALL % 32),
        python(lambda a, b: bit_field(a, b, 7, False), "u4"),
    ),
    "bfe.s32": Case(
        "bfe.s32 %o0, %i0, 3, %i1;",
        (I32, SMALL % 33),
        python(lambda a, b: bit_field(a, 3, b, True), "i4"),
    ),
    "bfi.b32": Case(
        "bfi.b32 %o0, %i0, %i1, 9, 6;",
        (U32, V32),
        python(lambda a, b: b & ~(63 << 9) | (a & 63) << 9, "u4"),
    ),
    "prmt": Case(
        "prmt.b32 %o0, %i0, %i1, %i2;", (U32, V32, RANDOM_BITS), python(permuted, np.uint32)
    ),
    "prmt immediate": Case(
        "prmt.b32 %o0, %i0, %i1, 0x5410;",
        (U32, V32),
        python(lambda a, b: permuted(a, b, 0x5410), "u4"),
    ),
    "lop3": Case(
        "lop3.b32 %o0, %i0, %i1, %i2, 0xCA;", (U32, V32, W32), python(looked_up(0xCA), "u4")
    ),
    "lop3 parity": Case(
        "lop3.b32 %o0, %i0, %i1, %i2, 0x96;", (U32, V32, W32), lambda a, b, c: a ^ b ^ c
    ),
    "popc": Case("popc.b32 %o0, %i0;", (U32,), python(lambda a: a.bit_count(), "u4")),
    "clz": Case("clz.b32 %o0, %i0;", (U32,), python(lambda a: 32 - a.bit_length(), "u4")),
    "brev": Case("brev.b32 %o0, %i0;", (U32,), python(lambda a: int(f"{a:032b}"[::-1], 2), "u4")),
    "add.s16x2": Case(
        "add.s16x2 %o0, %i0, %i1;",
        (U32, V32),
        lambda a, b: (a.view(np.int16) + b.view(np.int16)).view(np.uint32),
    ),
    "max.s16x2": Case(
        "max.s16x2 %o0, %i0, %i1;",
        (U32, V32),
        lambda a, b: np.maximum(a.view(np.int16), b.view(np.int16)).view(np.uint32),
    ),
    "min.u16x2": Case(
        "min.u16x2 %o0, %i0, %i1;",
        (U32, V32),
        lambda a, b: np.minimum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32),
    ),
    # Moves.
    "mov pack": Case(
        "mov.b64 %o0, {%i0, %i1};", (U32, V32), python(lambda a, b: a | b << 32, np.uint64)
    ),
    "mov unpack": Case(
        "mov.b64 {%r1, %r2}, %i0; sub.u32 %o0, %r1, %r2;",
        (U64,),
        python(lambda a: (a & 0xFFFFFFFF) - (a >> 32), np.uint32),
    ),
    "mov four": Case(
        "mov.b64 {%h1, %h2, %h3, %h4}, %i0; mov.b64 %o0, {%h4, %h3, %h2, %h1};",
        (U64,),
        lambda a: np.ascontiguousarray(a.view(np.uint16).reshape(-1, 4)[:, ::-1]).view("u8")[:, 0],
    ),
    "mov to itself": Case(
        "mov.b32 %r1, %i0; mov.b32 {%h1, %h2}, %r1; mov.b32 %r1, {%h2, %h1}; mov.b32 %o0, %r1;",
        (U32,),
        python(lambda a: a >> 16 | (a & 0xFFFF) << 16, np.uint32),
    ),
    # Comparison.
    "setp.lt.s32": Case(compare("lt.s32"), (I32, J32), flags(np.less)),
    "setp.lt.u32": Case(compare("lt.u32"), (U32, V32), flags(np.less)),
    "setp.hs.u32": Case(compare("hs.u32"), (U32, V32), flags(np.greater_equal)),
    "setp.lt.f32": Case(compare("lt.f32"), (F32, G32), flags(np.less)),
    "setp.ltu.f32": Case(
        compare("ltu.f32"), (F32, G32), flags(lambda a, b: (a < b) | either_nan(a, b))
    ),
    "setp.ne.f32": Case(
        compare("ne.f32"), (F32, G32), flags(lambda a, b: (a != b) & ~either_nan(a, b))
    ),
    "setp.neu.f32": Case(compare("neu.f32"), (F32, G32), flags(np.not_equal)),
    "setp.equ.f32": Case(
        compare("equ.f32"), (F32, F32), flags(lambda a, b: (a == b) | either_nan(a, b))
    ),
    "setp.geu.f32": Case(
        compare("geu.f32"), (F32, G32), flags(lambda a, b: (a >= b) | either_nan(a, b))
    ),
    "setp.num.f32": Case(compare("num.f32"), (F32, G32), flags(lambda a, b: ~either_nan(a, b))),
    "setp.nan.f32": Case(compare("nan.f32"), (F32, G32), flags(either_nan)),
    "setp.and": Case(
        "setp.gt.s32 %p2, %i0, 0; setp.lt.and.s32 %p1, %i0, %i1, %p2; selp.u32 %o0, 1, 0, %p1;",
        (I32, J32),
        flags(lambda a, b: (a < b) & (a > 0)),
    ),
    "setp opposite": Case(
        "setp.lt.s32 %p1|%p2, %i0, %i1; selp.u32 %o0, 1, 0, %p2;",
        (I32, J32),
        flags(np.greater_equal),
    ),
    "setp.gt.f16x2": Case(
        "setp.gt.f16x2 %p1|%p2, %i0, %i1; selp.u32 %r1, 1, 0, %p1; selp.u32 %o0, 2, 0, %p2;"
        " add.u32 %o0, %o0, %r1;",
        (halves(0), halves(1)),
        lambda a, b: (a.view("f2") > b.view("f2")).reshape(-1, 2).astype("u4") @ np.array([1, 2]),
        np.uint32,
    ),
    "predicates": Case(
        "setp.lt.s32 %p1, %i0, 0; setp.lt.s32 %p2, %i1, 0; xor.pred %p3, %p1, %p2;"
        " not.pred %p3, %p3; and.pred %p3, %p3, %p1; selp.u32 %o0, 1, 0, %p3;",
        (I32, J32),
        flags(lambda a, b: (a < 0) & (b < 0)),
    ),
    "set.lt.u32.s32": Case(
        "set.lt.u32.s32 %o0, %i0, %i1;",
        (I32, J32),
        lambda a, b: np.where(a < b, np.uint32(0xFFFFFFFF), np.uint32(0)),
    ),
    "selp.f32": Case(
        "setp.lt.s32 %p1, %i2, 0; selp.f32 %o0, %i0, %i1, %p1;",
        (F32, G32, I32),
        lambda a, b, c: np.where(c < 0, a, b),
    ),
    # Float arithmetic.
    "add.f32": Case("add.f32 %o0, %i0, %i1;", (F32, G32), np.add),
    "sub.f64": Case("sub.f64 %o0, %i0, 0d3FF8000000000000;", (F64,), lambda a: a - 1.5),
    "mul.rn.f32": Case("mul.rn.f32 %o0, %i0, 0f40400000;", (F32,), lambda a: a * np.float32(3)),
    "div.full.f32": Case("div.full.f32 %o0, %i0, %i1;", (F32, G32), np.divide),
    "neg.f32": Case("neg.f32 %o0, %i0;", (F32,), np.negative),
    "abs.f32": Case("abs.f32 %o0, %i0;", (F32,), np.abs),
    "fma.rn.f32": Case("fma.rn.f32 %o0, %i0, %i1, %i2;", PLAIN, fused(np.float32)),
    "fma.rn.f16": Case(
        "fma.rn.f16 %o0, %i0, %i1, %i2;",
        tuple(each.astype(np.float16) for each in PLAIN),
        fused(np.float16),
    ),
    "mul.rn.sat.f32": Case(
        "mul.rn.sat.f32 %o0, %i0, %i1;",
        (F32, G32),
        lambda a, b: np.clip(np.nan_to_num(a * b, nan=0.0), 0, 1),
    ),
    "min.f32": Case("min.f32 %o0, %i0, %i1;", (F32, G32), np.fmin),
    "max.f32": Case("max.f32 %o0, %i0, %i1;", (F32, G32), np.fmax),
    "max.NaN.f32": Case("max.NaN.f32 %o0, %i0, %i1;", (F32, G32), np.maximum),
    "min.NaN.f32": Case("min.NaN.f32 %o0, %i0, %i1;", (F32, G32), np.minimum),
    "max.f16": Case("max.f16 %o0, %i0, %i1;", (F16, G16), np.fmax),
    "sqrt": Case("sqrt.rn.f32 %o0, %i0;", (POSITIVE,), np.sqrt),
    "rcp": Case("rcp.rn.f32 %o0, %i0;", (F32,), lambda a: np.float32(1) / a),
    "copysign": Case("copysign.f32 %o0, %i0, %i1;", (F32, G32), lambda a, b: np.copysign(b, a)),
    "testp": Case("testp.infinite.f32 %p1, %i0; selp.u32 %o0, 1, 0, %p1;", (F32,), flags(np.isinf)),
    "add.f16": Case("add.f16 %o0, %i0, %i1;", (F16, G16), np.add),
    "mul.f16x2": Case(
        "mul.rn.f16x2 %o0, %i0, %i1;", (halves(0), halves(1)), on_halves(np.multiply)
    ),
    "max.NaN.f16x2": Case(
        "max.NaN.f16x2 %o0, %i0, %i1;", (halves(0), halves(1)), on_halves(np.maximum)
    ),
    "fma.rn.relu.f16x2": Case(
        "fma.rn.relu.f16x2 %o0, %i0, %i1, %i2;",
        (halves(0), halves(1), halves(2)),
        on_halves(
            lambda a, b, c: relu(
                (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype(np.float16)
            )
        ),
    ),
    "fma.rn.bf16x2": Case(
        "fma.rn.bf16x2 %o0, %i0, %i1, %i2;",
        (brain_halves(0), brain_halves(1), brain_halves(2)),
        lambda *words: to_bfloat16(
            fused(np.float32)(*(from_bfloat16(each.view(np.uint16)) for each in words))
        ).view(np.uint32),
    ),
    "cvt.rn.f16x2.f32": Case(
        "cvt.rn.f16x2.f32 %o0, %i0, %i1;",
        (F32, G32),
        lambda high, low: np.stack([low, high], 1).astype(np.float16).view(np.uint32)[:, 0],
    ),
    "cvt.rn.relu.bf16x2.f32": Case(
        "cvt.rn.relu.bf16x2.f32 %o0, %i0, %i1;",
        (PLAIN[0], PLAIN[1]),
        lambda high, low: to_bfloat16(relu(np.stack([low, high], 1))).view(np.uint32)[:, 0],
    ),
    # Conversion.
    "cvt.rn.f16.f32": Case("cvt.rn.f16.f32 %o0, %i0;", (F32,), lambda a: a.astype(np.float16)),
    "cvt.f32.f16": Case("cvt.f32.f16 %o0, %i0;", (F16,), lambda a: a.astype(np.float32)),
    "cvt.rn.bf16.f32": Case("cvt.rn.bf16.f32 %o0, %i0;", (PLAIN[0],), to_bfloat16),
    "cvt.f32.bf16": Case("cvt.f32.bf16 %o0, %i0;", (to_bfloat16(PLAIN[0]),), from_bfloat16),
    "cvt.rna.tf32": Case(
        "cvt.rna.tf32.f32 %o0, %i0;", (F32,), lambda a: to_tf32(a, even=False), np.float32
    ),
    "cvt.rn.tf32": Case(
        "cvt.rn.tf32.f32 %o0, %i0;", (F32,), lambda a: to_tf32(a, even=True), np.float32
    ),
    "cvt.rzi.s32.f32": Case("cvt.rzi.s32.f32 %o0, %i0;", (F32 * 2**20,), to_signed(np.trunc)),
    "cvt.rni.s32.f32": Case("cvt.rni.s32.f32 %o0, %i0;", (F32,), to_signed(np.rint)),
    "cvt.rmi.s32.f32": Case("cvt.rmi.s32.f32 %o0, %i0;", (F32,), to_signed(np.floor)),
    "cvt.rpi.s32.f32": Case("cvt.rpi.s32.f32 %o0, %i0;", (F32,), to_signed(np.ceil)),
    "cvt.rmi.f32.f32": Case("cvt.rmi.f32.f32 %o0, %i0;", (F32,), np.floor),
    "cvt.rn.f32.s32": Case("cvt.rn.f32.s32 %o0, %i0;", (I32,), lambda a: a.astype(np.float32)),
    "cvt.rn.f32.u64": Case("cvt.rn.f32.u64 %o0, %i0;", (U64,), lambda a: a.astype(np.float32)),
    "cvt.f64.f32": Case("cvt.f64.f32 %o0, %i0;", (F32,), lambda a: a.astype(np.float64)),
    "cvt.rn.f32.f64": Case("cvt.rn.f32.f64 %o0, %i0;", (F64,), lambda a: a.astype(np.float32)),
    "cvt.s64.s32": Case("cvt.s64.s32 %o0, %i0;", (I32,), lambda a: a.astype(np.int64)),
    "cvt.u64.u32": Case("cvt.u64.u32 %o0, %i0;", (U32,), lambda a: a.astype(np.uint64)),
    "cvt.u32.u64": Case("cvt.u32.u64 %o0, %i0;", (U64,), lambda a: a.astype(np.uint32)),
    "cvt.s32.s8": Case(
        "cvt.s32.s8 %o0, %i0;", (U16,), lambda a: a.astype(np.uint8).view("i1").astype(np.int32)
    ),
    "cvt.u16.u32": Case("cvt.u16.u32 %o0, %i0;", (U32,), lambda a: a.astype(np.uint16)),
}

# Valid for newer targets only.
NEWER = {
    "fma.rn.f32x2": Case(
        "fma.rn.f32x2 %o0, %i0, %i1, %i2;",
        (singles(0), singles(1), singles(2)),
        on_singles(fused(np.float32)),
    ),
    "add.rn.f32x2": Case(
        "add.rn.f32x2 %o0, %i0, %i1;", (singles(0), singles(1)), on_singles(np.add)
    ),
    "mul.rn.f32x2": Case(
        "mul.rn.f32x2 %o0, %i0, %i1;", (singles(0), singles(1)), on_singles(np.multiply)
    ),
    "add.rn.f32.f16": Case(
        "add.rn.f32.f16 %o0, %i0, %i1;", (F16, F32), lambda a, c: a.astype(np.float32) + c
    ),
    "sub.rn.f32.bf16": Case(
        "sub.rn.f32.bf16 %o0, %i0, %i1;",
        (to_bfloat16(PLAIN[0]), F32),
        lambda a, c: from_bfloat16(a) - c,
    ),
    "fma.rn.f32.f16": Case(
        "fma.rn.f32.f16 %o0, %i0, %i1, %i2;",
        (PLAIN[0].astype(np.float16), PLAIN[1].astype(np.float16), PLAIN[2]),
        fused(np.float32),
    ),
}


@pytest.mark.parametrize("name", [*CASES, *NEWER])
def test_instruction(name: str) -> None:
    case = (CASES | NEWER)[name]
    expected = case.output()
    if case.bits is not None:
        expected = expected.astype(case.bits)
    (actual,) = evaluate(case.body, case.inputs, [expected.dtype])
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(actual, expected)
        assert (np.signbit(actual) == np.signbit(expected))[~np.isnan(expected)].all()
        return
    if "f16x2" in name and expected.dtype == np.uint32 and "setp" not in name:
        # Whatever NaN it is.
        np.testing.assert_array_equal(actual.view(np.float16), expected.view(np.float16))
        return
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("body", "function", "ulps"),
    [
        ("ex2.approx.f32 %o0, %i0;", np.exp2, 4),
        ("lg2.approx.f32 %o0, %i0;", np.log2, 4),
        ("rsqrt.approx.f32 %o0, %i0;", lambda a: 1 / np.sqrt(a), 4),
        ("tanh.approx.f32 %o0, %i0;", np.tanh, 4),
        ("sin.approx.f32 %o0, %i0;", np.sin, 4),
        ("cos.approx.f32 %o0, %i0;", np.cos, 4),
    ],
)
def test_approximations(body: str, function: Callable[..., np.ndarray], ulps: int) -> None:
    (actual,) = evaluate(body, [POSITIVE], [np.float32])
    exact = function(POSITIVE.astype(np.float64))
    assert (np.abs(actual - exact) <= ulps * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_programs_are_valid() -> None:
    """NVIDIA's assembler takes what is tested here."""
    kernels = []
    for number, case in enumerate(CASES.values()):
        expected = case.output()
        kinds = [each.dtype for each in case.inputs]
        output = np.dtype(case.bits) if case.bits is not None else expected.dtype
        kernels.append(elementwise(case.body, kinds, [output], name=f"kernel{number}"))
    assemble(module(*kernels))


def test_guard_keeps_other_threads() -> None:
    body = (
        "mov.u32 %o0, 5; setp.lt.s32 %p1, %i0, 0; @%p1 mov.u32 %o0, 6; @!%p1 add.u32 %o0, %o0, 2;"
    )
    (actual,) = evaluate(body, [I32], [np.uint32])
    np.testing.assert_array_equal(actual, np.where(I32 < 0, 6, 7))


def test_divergence_and_loop() -> None:
    """Collatz steps: threads leave the loop at different times and meet again behind it."""
    start = np.arange(1, THREADS + 1, dtype=np.uint32)
    body = """
    mov.u32 %r1, %i0; mov.u32 %o0, 0;
    LOOP: setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;
    and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0; @%p2 bra EVEN;
    mad.lo.u32 %r1, %r1, 3, 1; bra.uni NEXT;
    EVEN: shr.u32 %r1, %r1, 1;
    NEXT: add.u32 %o0, %o0, 1; bra LOOP;
    DONE: bar.sync 0; add.u32 %o0, %o0, 1000;
    """

    def steps(value: int) -> int:
        return 0 if value == 1 else 1 + steps(value // 2 if value % 2 == 0 else 3 * value + 1)

    (actual,) = evaluate(body, [start], [np.uint32])
    np.testing.assert_array_equal(actual, [1000 + steps(int(each)) for each in start])


def test_blocks_that_go_different_ways() -> None:
    """Each block adds its number that many times; some end early."""
    text = module(
        kernel(
            """
            setp.eq.u32 %p1, %c, 2; @%p1 ret;
            mov.u32 %r1, 0; mov.u32 %r2, 0;
            LOOP: setp.ge.u32 %p2, %r2, %c; @%p2 bra DONE;
            add.u32 %r1, %r1, %c; add.u32 %r2, %r2, 1; bar.sync 0; bra LOOP;
            DONE: mov.u32 %r3, %ntid.x; mad.lo.u32 %r3, %c, %r3, %t;
            mad.wide.u32 %d1, %r3, 4, %q0; st.global.u32 [%d1], %r1;
            """,
            pointers=1,
        )
    )
    assemble(text)
    y = torch.full((6, 64), -1, dtype=torch.int32)
    run_ptx(text, "kernel", (6,), (64,), [y])
    expected = torch.tensor([0, 1, -1, 9, 16, 25], dtype=torch.int32)[:, None].expand(6, 64)
    assert torch.equal(y, expected)


def test_three_dimensions() -> None:
    text = module(
        kernel(
            """
            mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z;
            mad.lo.u32 %r5, %r1, 10, %t; mad.lo.u32 %r5, %r2, 100, %r5;
            mad.lo.u32 %r5, %c, 1000, %r5; mad.lo.u32 %r5, %r3, 10000, %r5;
            mad.lo.u32 %r5, %r4, 100000, %r5;
            mov.u32 %r6, %nctaid.y; mad.lo.u32 %r6, %r4, %r6, %r3;
            mov.u32 %r7, %nctaid.x; mad.lo.u32 %r6, %r6, %r7, %c;
            mov.u32 %r7, %ntid.z; mad.lo.u32 %r6, %r6, %r7, %r2;
            mov.u32 %r7, %ntid.y; mad.lo.u32 %r6, %r6, %r7, %r1;
            mov.u32 %r7, %ntid.x; mad.lo.u32 %r6, %r6, %r7, %t;
            mad.wide.u32 %d1, %r6, 4, %q0; st.global.u32 [%d1], %r5;
            """,
            pointers=1,
        )
    )
    y = torch.zeros(3, 2, 4, 2, 4, 8, dtype=torch.int32)
    run_ptx(text, "kernel", (4, 2, 3), (8, 4, 2), [y])
    axes = torch.meshgrid(*(torch.arange(count) for count in y.shape), indexing="ij")
    weights = (100000, 10000, 1000, 100, 10, 1)
    assert torch.equal(y, sum(a * w for a, w in zip(axes, weights, strict=True)).int())


def test_vectors_and_narrow_registers() -> None:
    text = module(
        kernel(
            """
            mad.wide.u32 %d1, %t, 16, %q0; mad.wide.u32 %d2, %t, 16, %q1;
            ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];
            st.global.v2.b64 [%d2], {%d3, %d4};
            st.global.v4.b32 [%d2], {%r4, %r3, %r2, %r1};
            ld.global.s8 %r5, [%d1+3]; st.global.b32 [%d2+4], %r5;
            ld.global.u8 %h1, [%d1+3]; st.global.b16 [%d2+8], %h1;
            ld.global.s16 %d5, [%d1+14]; cvt.u32.u64 %r6, %d5; st.global.u8 [%d2+12], %r6;
            """
        )
    )
    assemble(text)
    x = torch.randint(-128, 128, (64, 16), dtype=torch.int8)
    y = torch.zeros_like(x)
    run_ptx(text, "kernel", (1,), (64,), [x, y])
    expected = x.view(torch.int32).flip(1).contiguous().view(torch.int8)
    expected[:, 4:8] = x[:, 3:4].to(torch.int32).view(torch.int8)
    expected[:, 8] = x[:, 3]
    expected[:, 9] = 0
    expected[:, 12] = x[:, 14]
    assert torch.equal(y, expected)


def test_wide_vectors() -> None:
    """Newer targets move 32 bytes at once."""
    text = module(
        kernel(
            """
            mad.wide.u32 %d1, %t, 32, %q0; mad.wide.u32 %d2, %t, 32, %q1;
            ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%d1];
            st.global.v8.b32 [%d2], {%r8, %r7, %r6, %r5, %r4, %r3, %r2, %r1};
            """
        )
    )
    x = torch.randint(-1000, 1000, (32, 8), dtype=torch.int32)
    y = torch.zeros_like(x)
    run_ptx(text, "kernel", (1,), (32,), [x, y])
    assert torch.equal(y, x.flip(1))


def test_structs_scalars_and_addresses_of_parameters() -> None:
    text = module(
        kernel(
            """
            ld.param.u32 %r1, [s+4]; ld.param.v2.u32 {%r2, %r3}, [s+8]; ld.param.f32 %f1, [a];
            mov.u64 %d1, s; setp.lt.u32 %p1, %t, 16; selp.u64 %d2, 0, 4, %p1;
            add.u64 %d1, %d1, %d2; ld.param.u32 %r4, [%d1];
            mad.wide.u32 %d3, %t, 16, %q0; cvt.rzi.u32.f32 %r5, %f1; add.u32 %r3, %r3, %r5;
            st.global.v4.u32 [%d3], {%r1, %r2, %r3, %r4};
            """,
            pointers=1,
            more=".param .align 8 .b8 s[16], .param .f32 a",
        )
    )
    assemble(text)
    y = torch.zeros(32, 4, dtype=torch.int32)
    struct = np.array([7, 8, 9, 10], np.uint32).tobytes()
    run_ptx(text, "kernel", (1,), (32,), [y, struct, 0.5 + 100])
    assert y[0].tolist() == [8, 9, 110, 7]
    assert y[31].tolist() == [8, 9, 110, 8]
    with pytest.raises(PTXError, match="an argument has 4 bytes: the parameter has 16"):
        run_ptx(text, "kernel", (1,), (32,), [y, b"abcd", 1.0])


def test_generic_addresses() -> None:
    text = module(
        kernel(
            """
            mov.u64 %d1, buffer; cvta.shared.u64 %d1, %d1; mad.wide.u32 %d1, %t, 4, %d1;
            mad.wide.u32 %d2, %t, 4, %q0; mul.lo.u32 %r1, %t, 3;
            st.u32 [%d1], %r1; ld.u32 %r2, [%d1]; st.u32 [%d2], %r2;
            """,
            pointers=1,
            declarations=".shared .align 4 .b8 buffer[128];",
        )
    )
    y = torch.zeros(32, dtype=torch.int32)
    run_ptx(text, "kernel", (1,), (32,), [y])
    assert torch.equal(y, 3 * torch.arange(32, dtype=torch.int32))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("atom.global.add.u32 %r2, [%q0], %t;", sum(range(64)) * 3),
        ("atom.global.max.s32 %r2, [%q0], %t;", 63),
        ("red.global.add.u32 [%q0], 2; mov.u32 %r2, 0;", 2 * 64 * 3),
        ("atom.global.cas.b32 %r2, [%q0], 0, 9;", 9),
        ("atom.global.exch.b32 %r2, [%q0], 4;", 4),
    ],
)
def test_atomics(operation: str, expected: int) -> None:
    """Blocks may update one place, and no update is lost."""
    text = module(kernel(operation, pointers=1))
    assemble(text)
    y = torch.zeros(1, dtype=torch.int32)
    run_ptx(text, "kernel", (3,), (64,), [y])
    assert y.item() == expected


def test_atomics_return_what_was_there() -> None:
    text = module(
        kernel(
            """
            atom.global.add.u32 %r1, [%q0], 1; mad.wide.u32 %d1, %r1, 4, %q1;
            st.global.u32 [%d1], 1;
            """
        )
    )
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(192, dtype=torch.int32)
    run_ptx(text, "kernel", (3,), (64,), [counter, seen])
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        ("bfly.b32 %r1|%p1, %t, 5, 31, -1", lambda lane: (lane ^ 5, True)),
        (
            "down.b32 %r1|%p1, %t, 3, 31, -1",
            lambda lane: (lane + 3, True) if lane < 29 else (lane, False),
        ),
        (
            "up.b32 %r1|%p1, %t, 4, 0, -1",
            lambda lane: (lane - 4, True) if lane > 3 else (lane, False),
        ),
        ("idx.b32 %r1|%p1, %t, 7, 31, -1", lambda lane: (7, True)),
        # Within segments of eight lanes.
        ("idx.b32 %r1|%p1, %t, 2, 0x181F, -1", lambda lane: (lane // 8 * 8 + 2, True)),
        (
            "down.b32 %r1|%p1, %t, 3, 0x1807, -1",
            lambda lane: (lane + 3, True) if lane % 8 < 5 else (lane, False),
        ),
    ],
)
def test_shuffle(operands: str, expected: Callable[[int], tuple[int, bool]]) -> None:
    text = module(
        kernel(
            f"""
            shfl.sync.{operands}; selp.u32 %r2, 1, 0, %p1;
            mad.wide.u32 %d1, %t, 8, %q0; st.global.v2.u32 [%d1], {{%r1, %r2}};
            """,
            pointers=1,
        )
    )
    assemble(text)
    y = torch.zeros(64, 2, dtype=torch.int32)
    run_ptx(text, "kernel", (1,), (64,), [y])
    for thread in range(64):
        lane, valid = expected(thread % 32)
        assert y[thread].tolist() == [thread // 32 * 32 + lane, valid], thread


def test_vote_and_elect() -> None:
    text = module(
        kernel(
            """
            setp.gt.u32 %p1, %t, 40; vote.sync.ballot.b32 %r1, %p1, -1;
            vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
            elect.sync %r5|%p4, -1;
            selp.u32 %r2, 1, 0, %p2; selp.u32 %r3, 1, 0, %p3; selp.u32 %r4, 1, 0, %p4;
            mad.wide.u32 %d1, %t, 16, %q0; st.global.v4.u32 [%d1], {%r1, %r2, %r3, %r4};
            """,
            pointers=1,
        )
    )
    assemble(text)
    y = torch.zeros(96, 4, dtype=torch.int32)
    run_ptx(text, "kernel", (1,), (96,), [y])
    ballots = [sum(1 << lane for lane in range(32) if 32 * warp + lane > 40) for warp in range(3)]
    for thread in range(96):
        warp = thread // 32
        signed = np.array(ballots[warp], np.uint32).view(np.int32).item()
        assert y[thread].tolist() == [signed, warp > 0, warp == 2, thread % 32 == 0]


@pytest.mark.parametrize(
    "instruction",
    [
        "dp4a.u32.u32 %o0, %i0, %i0, %i0;",
        "mbarrier.init.shared.b64 [%r1], 1;",
        "mul24.lo.u32 %o0, %i0, %i0;",
        "cvt.rz.f16.f32 %h1, %i0;",
    ],
)
def test_unsupported_instructions_are_named(instruction: str) -> None:
    with pytest.raises(PTXError, match=f"not supported.*{instruction.split('.')[0]}"):
        evaluate(f"mov.u32 %r1, 0; {instruction} mov.u32 %o0, 0;", [U32], [np.uint32])


def test_unsupported_instructions_that_are_not_reached_do_no_harm() -> None:
    body = "mov.u32 %o0, 1; bra END; dp4a.u32.u32 %o0, %i0, %i0, %i0; END: add.u32 %o0, %o0, 1;"
    (actual,) = evaluate(body, [U32], [np.uint32])
    assert (actual == 2).all()


def test_scopes() -> None:
    """Braces hide registers of the same name, as inline assembly relies on."""
    body = """
    mov.u32 %r1, %i0; { .reg .b32 %r1; .reg .pred %p1; mov.u32 %r1, 7;
    { .reg .b32 %r1, %r70; mov.u32 %r1, 100; add.u32 %r70, %r1, 0; mov.u32 %r2, %r70; }
    add.u32 %r2, %r2, %r1; } add.u32 %o0, %r1, %r2;
    """
    (actual,) = evaluate(body, [U32], [np.uint32])
    np.testing.assert_array_equal(actual, U32 + np.uint32(107))


def test_constants() -> None:
    body = """
    mov.f64 %d1, 0d3FF8000000000000; cvt.rn.f32.f64 %r1, %d1; add.f32 %r1, %r1, 0f3F000000;
    mov.b32 %r2, 0xFFFFFFFF; add.u32 %r2, %r2, 2; cvt.rn.f32.u32 %r3, %r2; add.f32 %o0, %r1, %r3;
    """
    (actual,) = evaluate(body, [U32], [np.float32])
    assert (actual == 3).all()


def test_errors_name_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the interpreter itself."""
    from emulation import ptx_translator

    monkeypatch.setitem(ptx_translator.SOURCES, "add", lambda t, it: ["R[0] = 1 / 0"])
    with pytest.raises(PTXError, match=r"ZeroDivisionError .* in: add\.s32 %o0, %i0, %i1"):
        evaluate("mov.u32 %r40, 1; add.s32 %o0, %i0, %i1;", [U32, V32], [np.uint32])
    apart = "setp.lt.u32 %p1, %t, 9; @%p1 bra A; add.s32 %o0, %i0, %i1; A: mov.u32 %o0, 1;"
    with pytest.raises(PTXError, match=r"ZeroDivisionError .* in: add\.s32 %o0, %i0, %i1"):
        evaluate(apart, [U32, V32], [np.uint32])


def test_malformed_programs() -> None:
    y = torch.zeros(32)
    with pytest.raises(PTXError, match="there is no entry other"):
        run_ptx(module(kernel("")), "other", (1,), (32,), [y, y])
    with pytest.raises(PTXError, match="a block has 33 threads"):
        run_ptx(module(kernel("")), "kernel", (1,), (33,), [y, y])
    with pytest.raises(PTXError, match="the grid is 1, 65536, 1"):
        run_ptx(module(kernel("")), "kernel", (1, 65536), (32,), [y, y])
    with pytest.raises(PTXError, match="a brace is not closed"):
        run_ptx(module(kernel(""))[:-4], "kernel", (1,), (32,), [y, y])
