"""Scalar PTX instructions: control, memory, arithmetic, conversions, shuffles.

Each handler takes the run, the instruction, the mask of the threads that execute it, and whether
that is all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .ptx_parser import Immediate, Instruction, Register
from .ptx_types import UNSIGNED, WIDTH, PTXError, decode, encode, is_float, truncate_to_tf32

if TYPE_CHECKING:
    from .ptx_machine import Handler, Run

__all__ = ["HANDLERS"]

HANDLERS: dict[str, Handler] = {}


def _handles(*opcodes: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


def unsupported(instruction: Instruction) -> PTXError:
    """The error for a form of an instruction that nothing here executes."""
    return PTXError(f"not supported: {instruction.text}")


# Control.


@_handles("bra")
def _branch(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    run.branch(it, mask)


@_handles("ret", "exit")
def _return(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    run.end(mask)


@_handles("bar", "barrier")
def _barrier(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    if "warp" in it.modifiers:
        return
    if "sync" not in it.modifiers or len(it.operands) > 1 or "red" in it.modifiers:
        raise unsupported(it)
    run.barrier(it, mask)


@_handles("membar", "fence", "griddepcontrol", "prefetch", "prefetchu", "nanosleep", "setmaxnreg")
def _nothing(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    """Orders or hints what lockstep execution does anyway."""


@_handles("trap")
def _trap(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    raise PTXError("the program trapped: a device assertion failed")


# Memory.


def _space(it: Instruction) -> str:
    if any(modifier.startswith("shared") for modifier in it.modifiers):
        return "shared"
    if "local" in it.modifiers:
        raise unsupported(it)
    return "global"


@_handles("ld", "ldu")
def _load(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    targets, (source,) = it.operands[0], it.operands[1]
    if "param" in it.modifiers:
        run.set_bits(targets[0], run.parameter(source, it.kind, mask), mask, full)
        return
    width = WIDTH[it.kind]
    loaded = run.load(_space(it), run.addresses(source), width, len(targets), mask, it.text)
    for column, target in enumerate(targets):
        bits = np.zeros(run.threads, UNSIGNED[width])
        bits[mask] = loaded[:, column]
        _extend(run, target, bits, it.kind, mask, full)


def _extend(
    run: Run, target: Register, bits: np.ndarray, kind: str, mask: np.ndarray, full: bool
) -> None:
    """Writes a value into a register that may be wider: signed types carry their sign."""
    if target.name != "_" and kind[0] == "s" and run.width_of(target) > WIDTH[kind]:
        wide = UNSIGNED[run.width_of(target)]
        bits = decode(bits, kind).astype(np.int64).astype(wide)
    run.set_bits(target, bits, mask, full)


@_handles("st")
def _store(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    (target,), sources = it.operands
    data = np.stack([run.bits(source, it.kind)[mask] for source in sources], 1)
    run.store(_space(it), run.addresses(target), data, mask, it.text)


@_handles("cp")
def _copy(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    if "async" not in it.modifiers or "bulk" in it.modifiers or "mbarrier" in it.modifiers:
        raise unsupported(it)
    if "commit_group" in it.modifiers:
        run.commit_copies(mask)
        return
    if "wait_group" in it.modifiers:
        (pending,) = it.operands[0]
        assert isinstance(pending, Immediate)
        run.wait_for_copies(int(pending.value), mask, it.text)
        return
    if "wait_all" in it.modifiers:
        run.wait_for_copies(None, mask, it.text)
        return
    (target,), (source,), (count,), *size = it.operands
    assert isinstance(count, Immediate)
    if size:
        if isinstance(size[0][0], Register) and run.width_of(size[0][0]) == 1:
            raise unsupported(it)
        sizes = run.bits(size[0][0], "b32").astype(np.int64)
    else:
        sizes = np.full(run.threads, int(count.value))
    if (sizes[mask] > count.value).any():
        raise PTXError(f"an asynchronous copy reads more than it writes: {it.text}")
    run.start_copy(
        run.addresses(target), run.addresses(source), int(count.value), sizes, mask, it.text
    )


@_handles("mov")
def _move(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    targets, sources = it.operands
    width = WIDTH[it.kind]
    if len(sources) > 1:
        part = width // len(sources)
        packed = np.stack([run.bits(source, f"b{part}") for source in sources], 1)
        bits = np.ascontiguousarray(packed).view(UNSIGNED[width])[:, 0]
        run.set_bits(targets[0], bits, mask, full)
        return
    bits = run.bits(sources[0], it.kind)
    if len(targets) == 1:
        run.set_bits(targets[0], bits, mask, full)
        return
    parts = np.ascontiguousarray(bits).view(UNSIGNED[width // len(targets)])
    for column, target in enumerate(targets):
        run.set_bits(target, parts.reshape(run.threads, -1)[:, column], mask, full)


@_handles("cvta")
def _convert_address(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    run.set_bits(it.operands[0][0], run.bits(it.operands[1][0], it.kind), mask, full)


# Arithmetic on operands of one type.


def _elementwise(function: Callable[..., np.ndarray]) -> Handler:
    def handler(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
        sources = [run.values(operand[0], it.kind) for operand in it.operands[1:]]
        result = function(*sources)
        if is_float(it.kind):
            result = _clamp(it, result)
        elif "sat" in it.modifiers:
            raise unsupported(it)
        run.set_values(it.operands[0][0], result, it.kind, mask, full)

    return handler


def _clamp(it: Instruction, values: np.ndarray) -> np.ndarray:
    if "relu" in it.modifiers:
        values = np.where(np.isnan(values), values, np.maximum(values, 0))
    if "sat" in it.modifiers:
        values = np.clip(np.nan_to_num(values, nan=0.0), 0, 1)
    return values


HANDLERS["add"] = _elementwise(lambda a, b: a + b)
HANDLERS["sub"] = _elementwise(lambda a, b: a - b)
HANDLERS["neg"] = _elementwise(lambda a: -a)
HANDLERS["abs"] = _elementwise(np.abs)
HANDLERS["and"] = _elementwise(lambda a, b: a & b)
HANDLERS["or"] = _elementwise(lambda a, b: a | b)
HANDLERS["xor"] = _elementwise(lambda a, b: a ^ b)
HANDLERS["not"] = _elementwise(lambda a: ~a)
HANDLERS["ex2"] = _elementwise(np.exp2)
HANDLERS["lg2"] = _elementwise(np.log2)
HANDLERS["rcp"] = _elementwise(lambda a: 1 / a)
HANDLERS["sqrt"] = _elementwise(np.sqrt)
HANDLERS["rsqrt"] = _elementwise(lambda a: 1 / np.sqrt(a))
HANDLERS["tanh"] = _elementwise(np.tanh)


@_handles("min", "max")
def _extremum(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    sources = [run.values(operand[0], it.kind) for operand in it.operands[1:]]
    propagate = "NaN" in it.modifiers or not is_float(it.kind)
    functions = {
        ("min", True): np.minimum,
        ("min", False): np.fmin,
        ("max", True): np.maximum,
        ("max", False): np.fmax,
    }
    function = functions[it.opcode, propagate]
    result = sources[0]
    for other in sources[1:]:
        result = function(result, other)
    run.set_values(it.operands[0][0], result, it.kind, mask, full)


@_handles("mul", "mad", "fma")
def _multiply(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target, first, second, *third = (operand[0] for operand in it.operands)
    kind = it.kind
    if is_float(kind):
        a, b = run.values(first, kind), run.values(second, kind)
        if third:
            # The product of two float32 is exact in float64; one rounding is left, or two where
            # the sum needs more than 53 bits, which is within the tolerance of any test.
            wide = a.astype(np.float64) * b + run.values(third[0], kind)
            result = wide.astype(np.float32) if kind in ("bf16", "bf16x2") else wide
        else:
            result = a * b
        run.set_values(target, _clamp(it, result), kind, mask, full)
        return
    width = WIDTH[kind]
    wide = np.int64 if kind[0] == "s" else np.uint64
    a, b = run.values(first, kind).astype(wide), run.values(second, kind).astype(wide)
    if "hi" in it.modifiers:
        product = _high_half(a, b, width)
    else:
        product = a * b
    if "wide" in it.modifiers:
        kind = f"{kind[0]}{2 * width}"
    if third:
        product = product + run.values(third[0], kind).astype(wide)
    bits = product.view(np.uint64).astype(UNSIGNED[WIDTH[kind]])
    run.set_bits(target, bits, mask, full)


def _high_half(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    if width < 64:
        return (a * b) >> width
    exact = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
    return np.array(exact, np.uint64).view(a.dtype)


@_handles("div")
def _divide(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    a, b = (run.values(operand[0], it.kind) for operand in it.operands[1:3])
    if is_float(it.kind):
        result = a / b
    else:
        _check_divisor(b, mask, it)
        b = np.where(b == 0, 1, b).astype(b.dtype)
        # Rounded towards zero, unlike numpy's.
        result = (np.abs(a) // np.abs(b)) * np.sign(a) * np.sign(b) if it.kind[0] == "s" else a // b
    run.set_values(it.operands[0][0], result, it.kind, mask, full)


@_handles("rem")
def _remainder(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    a, b = (run.values(operand[0], it.kind) for operand in it.operands[1:3])
    _check_divisor(b, mask, it)
    result = np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))
    run.set_values(it.operands[0][0], result, it.kind, mask, full)


def _check_divisor(b: np.ndarray, mask: np.ndarray, it: Instruction) -> None:
    if (b[mask] == 0).any():
        raise PTXError(f"division by zero: {it.text}")


# Bits.


@_handles("lop3")
def _lookup(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    a, b, c = (run.bits(operand[0], "b32") for operand in it.operands[1:4])
    (table,) = it.operands[4]
    assert isinstance(table, Immediate)
    result = np.zeros(run.threads, np.uint32)
    for row in range(8):
        if int(table.value) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    run.set_bits(it.operands[0][0], result, mask, full)


@_handles("shl", "shr")
def _shift(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target, source, by = (operand[0] for operand in it.operands)
    width, signed = WIDTH[it.kind], it.kind[0] == "s"
    count = run.bits(by, "b32")
    value = run.values(source, it.kind)
    inside = np.minimum(count, width - 1).astype(value.dtype)
    result = value << inside if it.opcode == "shl" else value >> inside
    if it.opcode == "shl" or not signed:
        result = np.where(count >= width, 0, result).astype(value.dtype)
    run.set_values(target, result, it.kind, mask, full)


@_handles("shf")
def _funnel_shift(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target, low, high, by = (operand[0] for operand in it.operands)
    value = run.bits(low, "b32").astype(np.uint64)
    value |= run.bits(high, "b32").astype(np.uint64) << np.uint64(32)
    count = run.bits(by, "b32").astype(np.uint64)
    count = count & np.uint64(31) if "wrap" in it.modifiers else np.minimum(count, np.uint64(32))
    result = value >> count if "r" in it.modifiers else (value << count) >> np.uint64(32)
    run.set_bits(target, result.astype(np.uint32), mask, full)


@_handles("bfe")
def _extract(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target, source, position, length = (operand[0] for operand in it.operands)
    width = WIDTH[it.kind]
    value = run.bits(source, it.kind).astype(np.uint64)
    start = (run.bits(position, "b32") & np.uint32(255)).astype(np.uint64)
    count = (run.bits(length, "b32") & np.uint32(255)).astype(np.uint64)
    ones = np.where(
        count >= 64,
        ~np.uint64(0),
        (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1),
    )
    shifted = value >> np.minimum(start, np.uint64(63))
    result = np.where(start >= width, np.uint64(0), shifted & ones)
    if it.kind[0] == "s":
        last = np.minimum(start + count - np.uint64(1), np.uint64(width - 1))
        negative = (count > 0) & ((value >> last) & np.uint64(1) == 1)
        result = np.where(negative, result | ~ones, result)
    run.set_bits(target, result.astype(UNSIGNED[width]), mask, full)


@_handles("bfi")
def _insert(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target, source, into, position, length = (operand[0] for operand in it.operands)
    value, base = (run.bits(each, it.kind).astype(np.uint64) for each in (source, into))
    start, count = (
        (run.bits(each, "b32") & np.uint32(255)).astype(np.uint64) for each in (position, length)
    )
    window = ((np.uint64(1) << count) - np.uint64(1)) << start
    result = (base & ~window) | ((value << start) & window)
    run.set_bits(target, result.astype(UNSIGNED[WIDTH[it.kind]]), mask, full)


@_handles("prmt")
def _permute(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    if len(it.modifiers) > 1:
        raise unsupported(it)
    target, low, high, selector = (operand[0] for operand in it.operands)
    pair = np.stack([run.bits(low, "b32"), run.bits(high, "b32")], 1)
    source = np.ascontiguousarray(pair).view(np.uint8).reshape(run.threads, 8)
    control = run.bits(selector, "b32")
    chosen = np.empty((run.threads, 4), np.uint8)
    for byte in range(4):
        code = (control >> np.uint32(4 * byte)) & np.uint32(15)
        value = np.take_along_axis(source, (code & 7).astype(np.int64)[:, None], 1)[:, 0]
        sign = np.where(value & 128, np.uint8(255), np.uint8(0))
        chosen[:, byte] = np.where(code & 8, sign, value)
    run.set_bits(target, chosen.view(np.uint32)[:, 0], mask, full)


@_handles("popc", "clz", "brev")
def _count(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    bits = run.bits(it.operands[1][0], it.kind)
    width = WIDTH[it.kind]
    digits = (bits[:, None] >> np.arange(width).astype(bits.dtype)) & bits.dtype.type(1)
    if it.opcode == "popc":
        result = digits.sum(1)
    elif it.opcode == "clz":
        result = np.where(bits == 0, width, digits[:, ::-1].argmax(1))
    else:
        weights = np.uint64(1) << np.arange(width)[::-1].astype(np.uint64)
        result = (digits.astype(np.uint64) * weights).sum(1)
    kind = it.kind if it.opcode == "brev" else "b32"
    run.set_bits(it.operands[0][0], result.astype(UNSIGNED[WIDTH[kind]]), mask, full)


# Comparison and selection.

_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    name = _UNSIGNED_NAMES.get(name, name)
    if a.dtype.kind != "f":
        return _COMPARISONS[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name == "num":
        return ~unordered
    if name == "nan":
        return unordered
    if name in _COMPARISONS:
        return _COMPARISONS[name](a, b) & ~unordered
    return _COMPARISONS[name[:2]](a, b) | unordered


@_handles("setp")
def _set_predicate(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    a, b = (run.values(operand[0], it.kind) for operand in it.operands[1:3])
    result = _compare(it.modifiers[0], a, b)
    # The second target is the opposite, or, of packed halves, the result of the upper ones.
    is_packed = is_float(it.kind) and it.kind.endswith("x2")
    results = (result[..., 0], result[..., 1]) if is_packed else (result, ~result)
    for name, function in _LOGIC.items():
        if name in it.modifiers[1:]:
            other = run.bits(it.operands[3][0], "pred")
            results = function(results[0], other), function(results[1], other)
    for target, value in zip(it.operands[0], results, strict=False):
        run.set_bits(target, value, mask, full)


@_handles("selp")
def _select(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target, first, second, predicate = (operand[0] for operand in it.operands)
    chosen = np.where(
        run.bits(predicate, "pred"), run.bits(first, it.kind), run.bits(second, it.kind)
    )
    run.set_bits(target, chosen, mask, full)


# Conversion.

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@_handles("cvt")
def _convert(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    target = it.operands[0][0]
    to, origin = it.modifiers[-2:]
    if to in ("f16x2", "bf16x2"):
        high, low = (run.values(operand[0], "f32") for operand in it.operands[1:3])
        run.set_values(target, _clamp(it, np.stack([low, high], -1)), to, mask, full)
        return
    source = it.operands[1][0]
    if to == "tf32":
        bits = run.bits(source, "b32")
        if "rna" in it.modifiers:
            bits = bits + np.uint32(0x1000)
        elif "rn" in it.modifiers:
            bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        run.set_bits(target, truncate_to_tf32(bits), mask, full)
        return
    values = run.values(source, origin)
    rounding = next((_ROUND[each] for each in it.modifiers if each in _ROUND), None)
    if is_float(origin):
        if rounding is not None:
            values = rounding(values)
        if is_float(to):
            run.set_values(target, _clamp(it, values), to, mask, full)
            return
        limits = np.iinfo(np.dtype(f"{'i' if to[0] == 's' else 'u'}{WIDTH[to] // 8}"))
        exact = np.nan_to_num(values.astype(np.float64), nan=0.0)
        inside = np.clip(exact, float(limits.min), float(limits.max))
        integers = inside.astype(np.int64 if to[0] == "s" else np.uint64)
        _extend(run, target, encode(integers, to), to, mask, full)
        return
    if is_float(to):
        run.set_values(target, values.astype(np.float64), to, mask, full)
        return
    if "sat" in it.modifiers:
        raise unsupported(it)
    wide = values.astype(np.int64 if values.dtype.kind == "i" else np.uint64)
    bits = wide.view(np.uint64).astype(UNSIGNED[WIDTH[to]])
    _extend(run, target, bits, to, mask, full)


# Warp-wide.


@_handles("shfl")
def _shuffle(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    mode = it.modifiers[1]
    source, by, control = (operand[0] for operand in it.operands[1:4])
    value = run.bits(source, "b32")
    by_bits = run.bits(by, "b32").astype(np.int64)
    control_bits = run.bits(control, "b32").astype(np.int64)
    segment, clamp, lane = (control_bits >> 8) & 31, control_bits & 31, run.lanes
    least = lane & segment
    most = least | (clamp & ~segment)
    wanted = {
        "bfly": lambda: lane ^ by_bits,
        "down": lambda: lane + by_bits,
        "up": lambda: lane - by_bits,
        "idx": lambda: least | (by_bits & ~segment),
    }[mode]()
    valid = wanted >= most if mode == "up" else wanted <= most
    other = run.warps * 32 + np.where(valid, wanted, lane)
    if not mask[other][mask].all():
        raise PTXError(f"shuffle reads an inactive lane: {it.text}")
    for target, result in zip(it.operands[0], (value[other], valid), strict=False):
        run.set_bits(target, result, mask, full)


@_handles("vote")
def _vote(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    run.require_whole_warps(mask, it.text)
    predicate = run.bits(it.operands[1][0], "pred").reshape(-1, 32)
    mode = it.modifiers[1]
    if mode == "ballot":
        result = np.packbits(predicate, axis=1, bitorder="little").view(np.uint32)[:, 0]
    elif mode in ("any", "all"):
        result = predicate.any(1) if mode == "any" else predicate.all(1)
    else:
        raise unsupported(it)
    run.set_bits(it.operands[0][0], np.repeat(result, 32), mask, full)


@_handles("elect")
def _elect(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    first = mask & (np.cumsum(mask.reshape(-1, 32), 1).reshape(-1) == 1)
    leader = np.repeat(mask.reshape(-1, 32).argmax(1), 32).astype(np.uint32)
    for target, result in zip(it.operands[0], (leader, first), strict=False):
        run.set_bits(target, result, mask, full)
