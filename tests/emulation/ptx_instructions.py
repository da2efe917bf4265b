"""Scalar PTX instructions: arithmetic, comparison, conversion, memory, shuffles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .ptx_memory import GLOBAL_BASE, chosen
from .ptx_parser import Immediate, Instruction, Operand, Parameter
from .ptx_translator import Effect, Translator, effect, provide, source, unsupported
from .ptx_types import (
    BYTES,
    FLOATS,
    PAIRS,
    SIGNED,
    UNSIGNED,
    WIDTH,
    PTXError,
    decode,
    encode,
    is_float,
)

if TYPE_CHECKING:
    from .ptx_machine import Run

__all__: list[str] = []


def _value_kind(kind: str) -> str:
    """The type whose numpy type the values of a kind are computed in."""
    return "f64" if kind == "f64" else "f32"


# What only computes: functions that write source. `t` gives entries to operands.


@source("mov", "cvta")
def _move(t: Translator, it: Instruction) -> list[str]:
    targets, sources = it.operands
    width = WIDTH[it.kind]
    if it.opcode == "cvta" or len(targets) == len(sources) == 1:
        return t.assign(targets[0], t.bits(sources[0], it.kind), width)
    if len(targets) == 1:
        part = width // len(sources)
        dtype = UNSIGNED[width].__name__
        terms = [f"{t.bits(sources[0], f'b{part}')}.astype({dtype})"]
        terms += [
            f"({t.bits(each, f'b{part}')}.astype({dtype}) << {dtype}({part * place}))"
            for place, each in enumerate(sources[1:], 1)
        ]
        return t.assign(targets[0], f"({' | '.join(terms)})", width)
    part = width // len(targets)
    dtype, whole = UNSIGNED[part].__name__, UNSIGNED[width].__name__
    statements = []
    read = t.bits(sources[0], it.kind)
    # The source may be among the targets: the first is written last.
    for place, target in reversed(list(enumerate(targets))):
        shifted = f"({read} >> {whole}({part * place}))" if place else read
        statements += t.assign(target, f"{shifted}.astype({dtype})", part)
    if any(not t.is_sink(each) and each == sources[0] for each in targets[1:]):
        raise unsupported(it)
    return statements


def _sum_kind(it: Instruction) -> str:
    """The type of the result, and of what is added last: in ``add.f32.f16`` wider than the rest."""
    return "f32" if it.kind in ("f16", "bf16") and "f32" in it.modifiers else it.kind


def _binary(operator: str) -> Callable[[Translator, Instruction], list[str]]:
    def write(t: Translator, it: Instruction) -> list[str]:
        (target,), (a,), (b,), *rest = it.operands
        if rest or "cc" in it.modifiers or (not is_float(it.kind) and "sat" in it.modifiers):
            raise unsupported(it)
        if is_float(it.kind) or it.kind in PAIRS:
            kind = _sum_kind(it)
            result = f"({t.values(a, it.kind)} {operator} {t.values(b, kind)})"
            return t.assign_values(target, _clamped(it, result), kind)
        result = f"({t.bits(a, it.kind)} {operator} {t.bits(b, it.kind)})"
        return t.assign(target, result, WIDTH[it.kind])

    return write


for _opcode, _operator in (("add", "+"), ("sub", "-"), ("and", "&"), ("or", "|"), ("xor", "^")):
    source(_opcode)(_binary(_operator))


def _clamped(it: Instruction, text: str) -> str:
    if "relu" in it.modifiers:
        text = f"rectify({text})"
    if "sat" in it.modifiers:
        text = f"saturate({text})"
    return text


@provide
def rectify(values: np.ndarray) -> np.ndarray:
    """The ``.relu`` of PTX: negative becomes 0, NaN stays."""
    return np.where(np.isnan(values), values, np.maximum(values, values.dtype.type(0)))


@provide
def saturate(values: np.ndarray) -> np.ndarray:
    """The ``.sat`` of PTX: within 0 and 1, NaN becomes 0."""
    return np.clip(np.nan_to_num(values, nan=0.0), 0, 1).astype(values.dtype, copy=False)


_UNARY = {
    "neg": "(-{})",
    "abs": "absolute({})",
    "ex2": "exp2({})",
    "lg2": "log2({})",
    "rcp": "reciprocal({})",
    "sqrt": "sqrt({})",
    "rsqrt": "reciprocal(sqrt({}))",
    "tanh": "tanh({})",
    "sin": "sin({})",
    "cos": "cos({})",
}
for _function in (np.absolute, np.exp2, np.log2, np.reciprocal, np.sqrt, np.tanh, np.sin, np.cos):
    provide(_function)


@source(*_UNARY)
def _unary(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,) = it.operands
    result = _UNARY[it.opcode].format(t.values(a, it.kind))
    if is_float(it.kind):
        result = _clamped(it, result)
    return t.assign_values(target, result, it.kind)


@source("copysign")
def _copy_sign(t: Translator, it: Instruction) -> list[str]:
    (target,), (sign,), (size,) = it.operands
    result = f"copysign({t.values(size, it.kind)}, {t.values(sign, it.kind)})"
    return t.assign_values(target, result, it.kind)


provide(np.copysign)


@source("not")
def _not(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,) = it.operands
    return t.assign(target, f"(~{t.bits(a, it.kind)})", WIDTH[it.kind])


for _function in (np.minimum, np.maximum, np.fmin, np.fmax):
    provide(_function)


@source("min", "max")
def _extremum(t: Translator, it: Instruction) -> list[str]:
    (target,), *sources = it.operands
    if "xorsign" in it.modifiers or "abs" in it.modifiers:
        raise unsupported(it)
    if "NaN" in it.modifiers or not is_float(it.kind):
        function = f"{it.opcode}imum"
    else:
        function = f"f{it.opcode}"
    result = t.values(sources[0][0], it.kind)
    for (other,) in sources[1:]:
        result = f"{function}({result}, {t.values(other, it.kind)})"
    if "relu" in it.modifiers and not is_float(it.kind):
        raise unsupported(it)
    return t.assign_values(target, _clamped(it, result), it.kind)


@provide
def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32, rounded once.

    The product is exact in float64. The sum is rounded there and again to float32, which differs
    from one rounding only where the first falls onto the middle between two float32.
    """
    product = np.multiply(a, b, dtype=np.float64)
    product = np.add(product, c)
    return product.astype(np.float32)


@source("mul", "mad", "fma")
def _multiply(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (b,), *third = it.operands
    kind = it.kind
    if is_float(kind):
        x, y = t.values(a, kind), t.values(b, kind)
        if not third:
            result = f"({x} * {y})"
        elif kind == "f64":
            # Twice rounded: numpy has no wider product.
            result = f"({x} * {y} + {t.values(third[0][0], kind)})"
        else:
            kind = _sum_kind(it)
            result = f"fused_multiply_add({x}, {y}, {t.values(third[0][0], kind)})"
        return t.assign_values(target, _clamped(it, result), kind)
    if "sat" in it.modifiers or "cc" in it.modifiers:
        raise unsupported(it)
    width = WIDTH[kind]
    if "wide" in it.modifiers:
        double = 2 * width
        dtype = (SIGNED if kind[0] == "s" else UNSIGNED)[double].__name__
        x, y = (f"{t.values(each, kind)}.astype({dtype})" for each in (a, b))
        result = f"({x} * {y})"
        if third:
            result = f"({result} + {t.values(third[0][0], f'{kind[0]}{double}')})"
        return t.assign_values(target, result, f"{kind[0]}{double}")
    if "hi" in it.modifiers:
        result = f"high_half({t.values(a, kind)}, {t.values(b, kind)})"
        if third:
            result = f"({result} + {t.values(third[0][0], kind)})"
        return t.assign_values(target, result, kind)
    result = f"({t.bits(a, kind)} * {t.bits(b, kind)})"
    if third:
        result = f"({result} + {t.bits(third[0][0], kind)})"
    return t.assign(target, result, width)


@provide
def high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the bits of a product of integers."""
    width = 8 * a.dtype.itemsize
    if width < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(width)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    exact = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a.flat, b.flat, strict=True)]
    return np.array(exact, np.uint64).view(a.dtype).reshape(a.shape)


@provide
def lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any function of three bits, bit by bit."""
    result = np.zeros((1, 1), np.uint32)
    for row in range(8):
        if table >> row & 1:
            term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            result = result | term
    return result


@source("lop3")
def _lop3(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (b,), (c,), (table,) = it.operands
    if not isinstance(table, Immediate):
        raise unsupported(it)
    operands = ", ".join(t.bits(each, "b32") for each in (a, b, c))
    return t.assign(target, f"lookup({operands}, {int(table.value)})", 32)


@provide
def shift_left(bits: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Shift by up to any number of bits."""
    width = 8 * bits.dtype.itemsize
    if by.size == 1 and by.flat[0] < width:
        return bits << bits.dtype.type(by.flat[0])
    shifted = bits << np.minimum(by, by.dtype.type(width - 1)).astype(bits.dtype)
    return np.where(by >= width, bits.dtype.type(0), shifted)


@provide
def shift_right(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Shift by up to any number of bits; signed integers keep their sign."""
    width = 8 * values.dtype.itemsize
    if by.size == 1 and by.flat[0] < width:
        return values >> values.dtype.type(by.flat[0])
    shifted = values >> np.minimum(by, by.dtype.type(width - 1)).astype(values.dtype)
    if values.dtype.kind == "i":
        return shifted
    return np.where(by >= width, values.dtype.type(0), shifted)


@source("shl", "shr")
def _shift(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (by,) = it.operands
    if it.opcode == "shl":
        result = f"shift_left({t.bits(a, it.kind)}, {t.bits(by, 'b32')})"
        return t.assign(target, result, WIDTH[it.kind])
    result = f"shift_right({t.values(a, it.kind)}, {t.bits(by, 'b32')})"
    return t.assign_values(target, result, it.kind)


@provide
def funnel_shift(
    low: np.ndarray, high: np.ndarray, by: np.ndarray, right: bool, wrap: bool
) -> np.ndarray:
    """Shifts 64 bits and returns the lower, or for a left shift the upper, 32."""
    value = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    count = by.astype(np.uint64)
    count = count & np.uint64(31) if wrap else np.minimum(count, np.uint64(32))
    return (value >> count if right else (value << count) >> np.uint64(32)).astype(np.uint32)


@source("shf")
def _funnel(t: Translator, it: Instruction) -> list[str]:
    (target,), (low,), (high,), (by,) = it.operands
    operands = ", ".join(t.bits(each, "b32") for each in (low, high, by))
    flags = f"{'r' in it.modifiers}, {'wrap' in it.modifiers}"
    return t.assign(target, f"funnel_shift({operands}, {flags})", 32)


@provide
def extract_bits(
    bits: np.ndarray, position: np.ndarray, length: np.ndarray, signed: bool
) -> np.ndarray:
    """``bfe``: some bits, moved to the lowest."""
    width = 8 * bits.dtype.itemsize
    value = bits.astype(np.uint64)
    start = np.minimum(position & np.uint32(255), np.uint32(width)).astype(np.int64)
    length = (length & np.uint32(255)).astype(np.int64)
    # What lies behind the last bit is 0, or a copy of the sign.
    count = np.minimum(length, width - start).astype(np.uint64)
    one = np.uint64(1)
    ones = np.where(count >= 64, ~np.uint64(0), (one << np.minimum(count, np.uint64(63))) - one)
    result = (value >> np.minimum(start, 63).astype(np.uint64)) & ones
    if signed:
        last = np.clip(start + length - 1, 0, width - 1).astype(np.uint64)
        negative = (length > 0) & ((value >> last) & one == 1)
        result = np.where(negative, result | ~ones, result)
    return result.astype(bits.dtype)


@source("bfe")
def _extract(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (position,), (length,) = it.operands
    operands = ", ".join((t.bits(a, it.kind), t.bits(position, "b32"), t.bits(length, "b32")))
    return t.assign(target, f"extract_bits({operands}, {it.kind[0] == 's'})", WIDTH[it.kind])


@provide
def insert_bits(
    bits: np.ndarray, into: np.ndarray, position: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """``bfi``: the lowest bits of one value put into another."""
    value, base = bits.astype(np.uint64), into.astype(np.uint64)
    start, count = ((each & np.uint32(255)).astype(np.uint64) for each in (position, length))
    one = np.uint64(1)
    ones = np.where(count >= 64, ~np.uint64(0), (one << np.minimum(count, np.uint64(63))) - one)
    window = np.where(start >= 64, np.uint64(0), ones << np.minimum(start, np.uint64(63)))
    moved = value << np.minimum(start, np.uint64(63))
    return ((base & ~window) | (moved & window)).astype(bits.dtype)


@source("bfi")
def _insert(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (into,), (position,), (length,) = it.operands
    operands = [t.bits(a, it.kind), t.bits(into, it.kind)]
    operands += [t.bits(position, "b32"), t.bits(length, "b32")]
    return t.assign(target, f"insert_bits({', '.join(operands)})", WIDTH[it.kind])


@provide
def permute_bytes(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt``: four of eight bytes, each as it is or its sign repeated."""
    pair = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    result = np.zeros((1, 1), np.uint32)
    for place in range(4):
        code = (selector >> np.uint32(4 * place)) & np.uint32(15)
        shift = ((code & np.uint32(7)) << np.uint32(3)).astype(np.uint64)
        byte = ((pair >> shift) & np.uint64(255)).astype(np.uint32)
        if (code & np.uint32(8)).any():
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            byte = np.where(code & np.uint32(8), sign, byte)
        result = result | (byte << np.uint32(8 * place))
    return result


@source("prmt")
def _permute(t: Translator, it: Instruction) -> list[str]:
    if len(it.modifiers) > 1:
        raise unsupported(it)
    (target,), (low,), (high,), (selector,) = it.operands
    operands = ", ".join(t.bits(each, "b32") for each in (low, high, selector))
    return t.assign(target, f"permute_bytes({operands})", 32)


@provide
def count_bits(bits: np.ndarray, what: str) -> np.ndarray:
    """``popc``, ``clz`` and ``brev``."""
    width = 8 * bits.dtype.itemsize
    digits = (bits[..., None] >> np.arange(width).astype(bits.dtype)) & bits.dtype.type(1)
    if what == "popc":
        return digits.sum(-1).astype(np.uint32)
    if what == "clz":
        leading = digits[..., ::-1].argmax(-1)
        return np.where(bits == 0, width, leading).astype(np.uint32)
    weights = np.uint64(1) << np.arange(width)[::-1].astype(np.uint64)
    return (digits.astype(np.uint64) * weights).sum(-1).astype(bits.dtype)


@source("popc", "clz", "brev")
def _count(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,) = it.operands
    width = WIDTH[it.kind] if it.opcode == "brev" else 32
    return t.assign(target, f"count_bits({t.bits(a, it.kind)}, {it.opcode!r})", width)


_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_OPPOSITE = {"equ": "!=", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}


@provide
def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether one of two values is NaN."""
    return np.isnan(a) | np.isnan(b)


def _comparison(t: Translator, it: Instruction, a: Operand, b: Operand) -> str:
    name = _UNSIGNED_NAMES.get(it.modifiers[0], it.modifiers[0])
    if not is_float(it.kind):
        if name in ("eq", "ne"):
            return f"({t.bits(a, it.kind)} {_COMPARISONS[name]} {t.bits(b, it.kind)})"
        return f"({t.values(a, it.kind)} {_COMPARISONS[name]} {t.values(b, it.kind)})"
    x, y = t.values(a, it.kind), t.values(b, it.kind)
    if name == "ne":
        # Ordered, unlike numpy's.
        return f"(({x} < {y}) | ({x} > {y}))"
    if name in _COMPARISONS:
        return f"({x} {_COMPARISONS[name]} {y})"
    if name == "neu":
        return f"({x} != {y})"
    if name in ("num", "nan"):
        return f"({'~' if name == 'num' else ''}unordered({x}, {y}))"
    if name == "equ":
        return f"(({x} == {y}) | unordered({x}, {y}))"
    return f"(~({x} {_OPPOSITE[name]} {y}))"


@source("setp")
def _set_predicate(t: Translator, it: Instruction) -> list[str]:
    targets, (a,), (b,), *other = it.operands
    result = _comparison(t, it, a, b)
    if it.kind in PAIRS:
        results = [f"{result}[..., 0]", f"{result}[..., 1]"]
    else:
        results = [result, f"(~{result})"]
    logic = next((each for each in it.modifiers[1:] if each in _LOGIC), None)
    if logic is not None:
        operand = t.bits(other[0][0], "pred")
        results = [f"({each} {_LOGIC[logic]} {operand})" for each in results]
    if len(targets) > 1 and targets[0] in (it.operands[3:] or [[]])[0]:
        raise unsupported(it)
    statements = []
    for target, text in zip(targets, results, strict=False):
        statements += t.assign(target, text, 1)
    return statements


@source("set")
def _set(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (b,) = it.operands
    to = it.modifiers[-2]
    if to not in ("u32", "s32"):
        raise unsupported(it)
    result = f"where({_comparison(t, it, a, b)}, uint32(0xFFFFFFFF), uint32(0))"
    return t.assign(target, result, 32)


@provide
def select(predicate: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``selp``."""
    if predicate.size == 1:
        return first if predicate[0, 0] else second
    return np.where(predicate, first, second)


@source("selp")
def _select(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,), (b,), (predicate,) = it.operands
    operands = f"{t.bits(a, it.kind)}, {t.bits(b, it.kind)}"
    result = f"select({t.bits(predicate, 'pred')}, {operands})"
    return t.assign(target, result, WIDTH[it.kind])


@source("testp")
def _test(t: Translator, it: Instruction) -> list[str]:
    (target,), (a,) = it.operands
    tests = {"finite": "isfinite", "infinite": "isinf", "notanumber": "isnan"}
    if it.modifiers[0] not in tests:
        raise unsupported(it)
    return t.assign(target, f"{tests[it.modifiers[0]]}({t.values(a, it.kind)})", 1)


for _function in (np.isfinite, np.isinf, np.isnan, np.rint, np.trunc, np.floor, np.ceil):
    provide(_function)

_ROUNDING = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


@provide
def to_integer(values: np.ndarray, kind: str) -> np.ndarray:
    """Converts whole floats to an integer type, clamped to its range; NaN becomes 0."""
    dtype = (SIGNED if kind[0] == "s" else UNSIGNED)[WIDTH[kind]]
    limits = np.iinfo(dtype)
    exact = np.nan_to_num(values.astype(np.float64), nan=0.0)
    result = np.clip(exact, float(limits.min), float(limits.max)).astype(dtype)
    if WIDTH[kind] == 64:
        # The greatest integer is no float64: it rounds up, out of the range.
        result = np.where(exact >= float(limits.max), limits.max, result)
    return result


@provide
def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Values ``[..., 2]`` of a packed register."""
    return np.stack(np.broadcast_arrays(low, high), -1)


@source("cvt")
def _convert(t: Translator, it: Instruction) -> list[str]:
    (target,), *sources = it.operands
    to, origin = it.modifiers[-2:]
    rounded = next((_ROUNDING[each] for each in it.modifiers if each in _ROUNDING), None)
    if "rz" in it.modifiers and is_float(to) and is_float(origin) and to != origin:
        raise unsupported(it)
    if to in ("f16x2", "bf16x2"):
        if origin != "f32" or len(sources) != 2:
            raise unsupported(it)
        high, low = (t.values(each[0], "f32") for each in sources)
        return t.assign_values(target, _clamped(it, f"pair({low}, {high})"), to)
    (a,) = sources[0]
    if to == "tf32":
        if "relu" in it.modifiers or not {"rna", "rn"} & set(it.modifiers):
            raise unsupported(it)
        text = f"round_to_tf32({t.bits(a, 'b32')}, ties_to_even={'rn' in it.modifiers})"
        return t.assign(target, text, 32)
    if origin in PAIRS or to in PAIRS or WIDTH[to] < 8:
        raise unsupported(it)
    if is_float(origin):
        values = t.values(a, origin)
        if rounded is not None:
            values = f"{rounded}({values})"
        if is_float(to):
            if _value_kind(to) != _value_kind(origin):
                values = f"{values}.astype({FLOATS[_value_kind(to)].__name__})"
            return t.assign_values(target, _clamped(it, values), to)
        text = f"to_integer({values}, {to!r})"
        if to[0] == "s":
            text = f"{text}.view({UNSIGNED[WIDTH[to]].__name__})"
        return t.assign(target, text, WIDTH[to], signed=to[0] == "s")
    values = t.values(a, origin)
    if is_float(to):
        return t.assign_values(target, f"{values}.astype({FLOATS[_value_kind(to)].__name__})", to)
    if "sat" in it.modifiers:
        raise unsupported(it)
    text = f"{values}.astype({UNSIGNED[WIDTH[to]].__name__})"
    return t.assign(target, text, WIDTH[to], signed=to[0] == "s")


# Effects: functions of the run and of a mask.


@effect("fence")
def _fence(t: Translator, it: Instruction) -> Effect:
    """Memory is in order in lockstep execution; only proxies have to be told of each other."""
    if it.modifiers[0] == "proxy" and "async" in it.modifiers[1]:
        return lambda run, mask: run.shared.fence()
    return lambda run, mask: None


@effect("membar", "griddepcontrol", "prefetch", "prefetchu", "nanosleep", "setmaxnreg")
def _nothing(t: Translator, it: Instruction) -> Effect:
    """Orders or hints what lockstep execution does anyway."""
    return lambda run, mask: None


@effect("bar", "barrier")
def _warp_barrier(t: Translator, it: Instruction) -> Effect:
    return lambda run, mask: None


@effect("createpolicy")
def _policy(t: Translator, it: Instruction) -> Effect:
    target = t.register(it.operands[0][0])
    policy = np.zeros((1, 1), np.uint64)
    return lambda run, mask: run.set(target, policy, mask)


@effect("trap")
def _trap(t: Translator, it: Instruction) -> Effect:
    def fail(run: Run, mask: np.ndarray | None) -> None:
        raise PTXError("the program trapped")

    return fail


@effect("call")
def _call(t: Translator, it: Instruction) -> Effect:
    def fail(run: Run, mask: np.ndarray | None) -> None:
        what = "a device assertion failed" if "__assertfail" in it.text else "not supported"
        raise PTXError(f"{what}: {it.text}")

    return fail


@effect("div", "rem")
def _divide(t: Translator, it: Instruction) -> Effect:
    (target,), (a,), (b,) = it.operands
    kind = it.kind
    entry, read_a, read_b = t.register(target), t.reader(a, kind), t.reader(b, kind)

    def divide(run: Run, mask: np.ndarray | None) -> None:
        x, y = (decode(read(run.registers), kind) for read in (read_a, read_b))
        if is_float(kind):
            run.set(entry, encode(x / y, kind), mask)
            return
        if not y.all():
            if not chosen(y, mask).all():
                raise PTXError(f"division by zero: {it.text}")
            y = np.where(y == 0, y.dtype.type(1), y)
        if WIDTH[kind] <= 32:
            # Exact: a quotient that is no integer is farther from one than float64 rounds.
            quotient = (x / y).astype(x.dtype)
            result = quotient if it.opcode == "div" else x - quotient * y
        else:
            remainder = np.fmod(x, y)
            result = remainder if it.opcode == "rem" else (x - remainder) // y
        run.set(entry, encode(result, kind), mask)

    return divide


def _space(it: Instruction) -> str:
    """``"global"``, ``"shared"`` or, where only the address tells, ``"generic"``."""
    if any(modifier.startswith("shared") for modifier in it.modifiers):
        return "shared"
    if "global" in it.modifiers:
        return "global"
    if "local" in it.modifiers or "const" in it.modifiers:
        raise unsupported(it)
    return "generic"


def _resolve_space(addresses: np.ndarray, mask: np.ndarray | None, it: Instruction) -> str:
    among = chosen(addresses, mask)
    low, high = int(among.min()), int(among.max())
    if low >= GLOBAL_BASE:
        return "global"
    if high < GLOBAL_BASE:
        return "shared"
    raise PTXError(f"not supported, one access to global and shared memory: {it.text}")


def _vector(size: int) -> tuple[int, int]:
    """Splits an access into units that numpy moves at once: their number and bytes."""
    return (size // 16, 16) if size > 16 else (1, size)


@effect("ld", "ldu")
def _load(t: Translator, it: Instruction) -> Effect:
    targets, (where,), *_ = it.operands
    width = WIDTH[it.kind]
    entries = [
        None if t.is_sink(each) else (t.register(each), UNSIGNED[t.width_of(each)])
        for each in targets
    ]
    places = []
    if isinstance(where, Parameter):
        places = [
            t.parameter(Parameter(where.name, where.offset + width // 8 * number), width)
            for number in range(len(targets))
        ]
    else:
        address = t.addresses(where)
    space = "param" if "param" in it.modifiers else _space(it)
    size = width // 8 * len(targets)
    constant = it.opcode == "ldu" or "nc" in it.modifiers
    t.constants |= constant
    if space in ("shared", "generic"):
        t.granule = min(t.granule, size)
    _units, _unit = _vector(size)

    def set_one(run: Run, number: int, bits: np.ndarray, mask: np.ndarray | None) -> None:
        destination = entries[number]
        if destination is None:
            return
        entry, dtype = destination
        if bits.dtype != dtype:
            bits = (bits.view(SIGNED[width]) if it.kind[0] == "s" else bits).astype(dtype)
        run.set(entry, bits, mask)

    def load_parameter(run: Run, mask: np.ndarray | None) -> None:
        for number, place in enumerate(places):
            set_one(run, number, run.registers[place], mask)

    def load(run: Run, mask: np.ndarray | None) -> None:
        addresses = address(run.registers)
        if space == "param":
            loaded = run.load_parameters(addresses, size, mask, it.text)
        elif (space if space != "generic" else _resolve_space(addresses, mask, it)) == "shared":
            loaded = run.load_shared(addresses, size, mask, it.text)
        else:
            loaded = run.load_global(addresses, size, mask, it.text, constant=constant)
        if len(entries) == 1:
            set_one(run, 0, loaded, mask)
            return
        parts = loaded.view(BYTES[width // 8]).reshape(*loaded.shape[:2], len(entries))
        for number in range(len(entries)):
            set_one(run, number, np.ascontiguousarray(parts[..., number]), mask)

    return load_parameter if places else load


@effect("st")
def _store(t: Translator, it: Instruction) -> Effect:
    (where,), sources, *_ = it.operands
    if "param" in it.modifiers:
        return lambda run, mask: None
    address = t.addresses(where)
    readers = [t.reader(each, it.kind) for each in sources]
    width = WIDTH[it.kind]
    size = width // 8 * len(sources)
    space = _space(it)
    if space in ("shared", "generic"):
        t.granule = min(t.granule, size)
    dtype = BYTES[width // 8]

    def store(run: Run, mask: np.ndarray | None) -> None:
        addresses = address(run.registers)
        data = [read(run.registers) for read in readers]
        if len(data) > 1:
            shape = np.broadcast_shapes(*(each.shape for each in data))
            packed = np.empty((*shape, len(data)), dtype)
            for number, each in enumerate(data):
                packed[..., number] = each
            vector = packed.view(BYTES[min(size, 16)])
        else:
            vector = data[0][..., None]
        if (space if space != "generic" else _resolve_space(addresses, mask, it)) == "shared":
            run.store_shared(addresses, vector, mask, it.text)
        else:
            run.store_global(addresses, vector, mask, it.text)

    return store


_ATOMIC = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
}


@effect("atom", "red")
def _atomic(t: Translator, it: Instruction) -> Effect:
    operands = list(it.operands)
    entry = None
    if it.opcode == "atom":
        (target,) = operands.pop(0)
        entry = None if t.is_sink(target) else t.register(target)
    (where,), *sources = operands
    address = t.addresses(where)
    readers = [t.reader(each[0], it.kind) for each in sources]
    name = next((each for each in it.modifiers if each in _ATOMIC or each == "cas"), "")
    kind = it.kind
    if not name or kind in PAIRS or _space(it) != "global":
        raise unsupported(it)
    size = WIDTH[kind] // 8

    def update(run: Run, mask: np.ndarray | None) -> None:
        addresses = address(run.registers)
        places = run.memory.locate(addresses, size, mask, it.text)
        index = run.spread(places >> (size.bit_length() - 1))
        data = [run.spread(read(run.registers)) for read in readers]
        memory = run.memory.view(size)
        before = np.zeros(index.shape, UNSIGNED[8 * size])
        active = np.ones(index.shape, bool) if mask is None else run.spread(mask)
        for thread in zip(*np.nonzero(active), strict=True):
            old = memory[index[thread] : index[thread] + 1]
            before[thread] = old[0]
            value = data[0][thread].reshape(1)
            if name == "cas":
                new = data[1][thread].reshape(1) if old[0] == value[0] else old
            else:
                given, operand = decode(old, kind)[0], decode(value, kind)[0]
                new = encode(np.array([_ATOMIC[name](given, operand)]), kind)
            memory[index[thread]] = new[0]
        if entry is not None:
            run.set(entry, before, mask)

    return update


@effect("cp")
def _copy(t: Translator, it: Instruction) -> Effect:
    if "async" not in it.modifiers or {"bulk", "mbarrier"} & set(it.modifiers):
        raise unsupported(it)
    if "commit_group" in it.modifiers:
        return lambda run, mask: run.commit_copies(mask)
    if "wait_all" in it.modifiers:
        return lambda run, mask: run.wait_for_copies(None, mask, it.text)
    if "wait_group" in it.modifiers:
        (pending,) = it.operands[0]
        if not isinstance(pending, Immediate):
            raise unsupported(it)
        groups = int(pending.value)
        return lambda run, mask: run.wait_for_copies(groups, mask, it.text)
    (where,), (origin,), (length,), *rest = it.operands
    if not isinstance(length, Immediate):
        raise unsupported(it)
    target, begin, size = t.addresses(where), t.addresses(origin), int(length.value)
    t.granule = min(t.granule, size)
    # A fourth operand is how many bytes to read, or a predicate to read none, or a cache policy.
    ignored = read_size = None
    if rest and t.width_of(rest[0][0]) == 1:
        ignored = t.reader(rest[0][0], "pred")
    elif rest and t.width_of(rest[0][0]) != 64:
        read_size = t.reader(rest[0][0], "b32")

    def copy(run: Run, mask: np.ndarray | None) -> None:
        registers = run.registers
        if read_size is not None:
            sizes = read_size(registers)
        elif ignored is not None:
            sizes = np.where(ignored(registers), np.uint32(0), np.uint32(size))
        else:
            sizes = np.full((1, 1), size, np.uint32)
        run.start_copy(target(registers), begin(registers), size, sizes, mask, it.text)

    return copy


# Effects across the threads of a warp.


@effect("shfl")
def _shuffle(t: Translator, it: Instruction) -> Effect:
    mode = it.modifiers[1]
    targets, (a,), (by,), (control,), *_ = it.operands
    value, count, bounds = (t.reader(each, "b32") for each in (a, by, control))
    entries = [None if t.is_sink(each) else t.register(each) for each in targets]

    def shuffle(run: Run, mask: np.ndarray | None) -> None:
        registers, lane = run.registers, run.lanes
        steps, limits = (read(registers).astype(np.int64) for read in (count, bounds))
        segment, clamp = (limits >> 8) & 31, limits & 31
        least = lane & segment
        most = least | (clamp & ~segment)
        if mode == "bfly":
            wanted = lane ^ steps
        elif mode == "idx":
            wanted = least | (steps & ~segment)
        else:
            wanted = lane + steps if mode == "down" else lane - steps
        valid = wanted >= most if mode == "up" else wanted <= most
        other = run.first_lanes + np.where(valid, wanted, lane)
        if mask is not None:
            active = run.spread(mask)
            reached = np.take_along_axis(active, np.broadcast_to(other, active.shape), 1)
            if not reached[active].all():
                raise PTXError(f"shuffle reads an inactive lane: {it.text}")
        data = value(registers)
        if data.shape[1] == 1:
            result = data
        elif len(other) == 1:
            result = data.take(other[0], axis=1)
        else:
            result = np.take_along_axis(np.broadcast_to(data, other.shape), other, 1)
        for entry, bits in zip(entries, (result, valid), strict=False):
            if entry is not None:
                run.set(entry, bits, mask)

    return shuffle


@effect("vote")
def _vote(t: Translator, it: Instruction) -> Effect:
    (target,), (predicate,), *_ = it.operands
    entry, read = t.register(target), t.reader(predicate, "pred")
    mode = it.modifiers[1]
    if mode not in ("ballot", "any", "all"):
        raise unsupported(it)

    def vote(run: Run, mask: np.ndarray | None) -> None:
        run.require_whole_warps(mask, it.text)
        votes = run.by_warp(read(run.registers))
        if mode == "ballot":
            result: Any = np.packbits(votes, axis=-1, bitorder="little").view(np.uint32)
        else:
            result = votes.any(-1, keepdims=True) if mode == "any" else votes.all(-1, keepdims=True)
        result = np.broadcast_to(result, votes.shape).reshape(len(votes), -1)
        run.set(entry, result, mask)

    return vote


@effect("elect")
def _elect(t: Translator, it: Instruction) -> Effect:
    entries = [None if t.is_sink(each) else t.register(each) for each in it.operands[0]]

    def elect(run: Run, mask: np.ndarray | None) -> None:
        active = run.by_warp(np.ones((1, 1), bool) if mask is None else mask)
        leader = active.argmax(-1, keepdims=True)
        first = active & (np.arange(32) == leader)
        leaders = np.broadcast_to(leader, active.shape).astype(np.uint32)
        for entry, bits in zip(entries, (leaders, first), strict=False):
            if entry is not None:
                run.set(entry, bits.reshape(len(bits), -1), mask)

    return elect
