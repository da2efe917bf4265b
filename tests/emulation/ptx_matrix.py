"""PTX instructions of the tensor cores: fragments in registers, matrices in shared memory.

Products of 16-bit and TF32 operands are exact in float32; sums are taken in float32 in numpy's
order, which is not the hardware's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .ptx_parser import Immediate, Instruction, Operand, Register
from .ptx_types import UNSIGNED, PTXError, decode, truncate_to_tf32

if TYPE_CHECKING:
    from .ptx_machine import Handler, Run

__all__ = ["HANDLERS"]

HANDLERS: dict[str, Handler] = {}

_LANES = np.arange(32)
_GROUP = _LANES // 4
_IN_GROUP = _LANES % 4

Place = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""Row and column of each lane's element, for a register and a half of it."""


def _handles(opcode: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[opcode] = handler
        return handler

    return register


def _unsupported(it: Instruction) -> PTXError:
    return PTXError(f"not supported: {it.text}")


@_handles("ldmatrix")
def _load_matrix(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    _matrices(run, it, mask, full, it.operands[0], it.operands[1][0], store=False)


@_handles("stmatrix")
def _store_matrix(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    _matrices(run, it, mask, full, it.operands[1], it.operands[0][0], store=True)


def _matrices(
    run: Run,
    it: Instruction,
    mask: np.ndarray,
    full: bool,
    registers: list[Operand],
    address: Operand,
    *,
    store: bool,
) -> None:
    """Moves 8x8 matrices of 16-bit elements: lane 8i + r has the address of row r of matrix i."""
    if "b16" not in it.modifiers:
        raise _unsupported(it)
    run.require_whole_warps(mask, it.text)
    transposed = "trans" in it.modifiers
    rows = run.addresses(address).reshape(-1, 32)
    for number, register in enumerate(registers):
        starts = rows[:, 8 * number : 8 * number + 8]
        run.check_alignment(np.repeat(starts, 4, 1).reshape(-1), 16, mask, it.text)
        halves = []
        given = run.bits(register, "b32") if store else None
        for half in range(2):
            row, column = _GROUP, 2 * _IN_GROUP + half
            if transposed:
                row, column = column, row
            element = (starts[:, row] + 2 * column).reshape(-1)
            if store:
                assert given is not None
                data = (given >> np.uint32(16 * half)).astype(np.uint16)[mask]
                run.store("shared", element, data[:, None], mask, it.text)
                continue
            loaded = np.zeros(run.threads, np.uint16)
            loaded[mask] = run.load("shared", element, 16, 1, mask, it.text)[:, 0]
            halves.append(loaded.astype(np.uint32))
        if not store:
            run.set_bits(register, halves[0] | halves[1] << np.uint32(16), mask, full)


def _place_a(kind: str) -> Place:
    if kind == "tf32":
        return lambda i, half: (_GROUP + 8 * (i % 2), _IN_GROUP + 4 * (i // 2))
    return lambda i, half: (_GROUP + 8 * (i % 2), 2 * _IN_GROUP + half + 8 * (i // 2))


def _place_b(kind: str) -> Place:
    if kind == "tf32":
        return lambda i, half: (_IN_GROUP + 4 * i, _GROUP)
    return lambda i, half: (2 * _IN_GROUP + half + 8 * i, _GROUP)


def _place_sums(i: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    return _GROUP + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * _IN_GROUP + i % 2


def _fragment(
    run: Run, registers: list[Operand], kind: str, shape: tuple[int, int], place: Place
) -> np.ndarray:
    """Collects a fragment of every warp: ``[warps, *shape]``."""
    matrix = np.zeros((run.threads // 32, *shape), np.float32)
    for number, register in enumerate(registers):
        bits = run.bits(register, "b32")
        if kind == "f32":
            parts = [bits.view(np.float32)]
        elif kind == "tf32":
            parts = [truncate_to_tf32(bits).view(np.float32)]
        else:
            parts = [
                decode((bits >> np.uint32(16 * half)).astype(np.uint16), kind) for half in range(2)
            ]
        for half, values in enumerate(parts):
            row, column = place(number, half)
            matrix[:, row, column] = values.reshape(-1, 32)
    return matrix


def _scatter(matrix: np.ndarray, number: int) -> np.ndarray:
    """Returns the bits of one register of a fragment of sums."""
    row, column = _place_sums(number, 0)
    return np.ascontiguousarray(matrix[:, row, column].reshape(-1)).view(np.uint32)


@_handles("mma")
def _multiply(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    run.require_whole_warps(mask, it.text)
    shape = next((m for m in it.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    sums_kind, a_kind, b_kind, c_kind = it.modifiers[-4:]
    supported = (
        shape.startswith("m16n8")
        and sums_kind == c_kind == "f32"
        and a_kind == b_kind
        and a_kind in ("f16", "bf16", "tf32")
        and "row" in it.modifiers
        and "col" in it.modifiers
    )
    if not supported:
        raise _unsupported(it)
    depth = int(shape.split("k")[1])
    targets, a, b, c = it.operands
    product = np.matmul(
        _fragment(run, a, a_kind, (16, depth), _place_a(a_kind)),
        _fragment(run, b, b_kind, (depth, 8), _place_b(b_kind)),
    )
    sums = product + _fragment(run, c, "f32", (16, 8), _place_sums)
    for number, target in enumerate(targets):
        run.set_bits(target, _scatter(sums, number), mask, full)


# Warp-group products. They are computed when they are issued, but their results reach the registers
# only at the wait, as those of asynchronous copies reach shared memory.


@_handles("wgmma")
def _group_multiply(run: Run, it: Instruction, mask: np.ndarray, full: bool) -> None:
    if run.block_threads % 128:
        raise PTXError(f"{run.block_threads} threads are no whole warp groups: {it.text}")
    run.require_whole_warps(mask, it.text, lanes=128)
    stage = it.modifiers[0]
    if stage == "fence":
        return
    if stage == "commit_group":
        for name, (group, bits) in run.matrix_results.items():
            if group is None:
                run.matrix_results[name] = (run.matrix_group, bits)
        run.matrix_group += 1
        return
    if stage == "wait_group":
        (pending,) = it.operands[0]
        assert isinstance(pending, Immediate)
        last = run.matrix_group - int(pending.value)
        for name, (group, bits) in list(run.matrix_results.items()):
            if group is not None and group < last:
                # For all, since blocks that are elsewhere lose nothing but the check of their wait.
                run.set_bits(Register(name), bits, np.ones(run.threads, np.bool_), True)
                del run.matrix_results[name]
        return
    _group_product(run, it, mask)


def _group_product(run: Run, it: Instruction, mask: np.ndarray) -> None:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", it.modifiers[3])
    if it.modifiers[0] != "mma_async" or shape is None:
        raise _unsupported(it)
    columns, depth = int(shape.group(1)), int(shape.group(2))
    sums_kind, a_kind, b_kind = it.modifiers[4:7]
    if sums_kind != "f32" or a_kind != b_kind or a_kind not in ("f16", "bf16", "tf32"):
        raise _unsupported(it)
    targets, a, b, keep, *flags = it.operands
    sign_a, sign_b, *majors = (int(flag[0].value) for flag in flags)
    groups = run.threads // 128
    in_registers = len(a) > 1
    a_by_columns = not in_registers and len(majors) == 2 and majors[0] == 1
    b_by_columns = bool(majors) and majors[-1] == 1
    if in_registers:
        left = _fragment(run, a, a_kind, (16, depth), _place_a(a_kind)).reshape(groups, 64, depth)
    else:
        left = _shared_matrix(run, a[0], 64, depth, a_kind, a_by_columns, mask, it.text)
    right = _shared_matrix(run, b[0], columns, depth, b_kind, b_by_columns, mask, it.text)
    product = np.matmul(left * np.float32(sign_a), (right * np.float32(sign_b)).transpose(0, 2, 1))
    product = product.reshape(groups * 4, 16, columns)
    kept = run.bits(keep[0], "pred")
    for number, target in enumerate(targets):
        assert isinstance(target, Register)
        _, before = run.matrix_results.get(target.name, (None, run.bits(target, "b32")))
        start = np.where(kept, before.view(np.float32), np.float32(0))
        sums = _scatter(product, number).view(np.float32) + start
        sums = np.where(mask, np.ascontiguousarray(sums).view(np.uint32), before)
        run.matrix_results[target.name] = (None, sums)


def _shared_matrix(
    run: Run,
    descriptor: Operand,
    rows: int,
    depth: int,
    kind: str,
    by_columns: bool,
    mask: np.ndarray,
    text: str,
) -> np.ndarray:
    """Reads the matrix that a descriptor means for every warp group: ``[groups, rows, depth]``.

    See "Asynchronous warpgroup-level matrix" in the PTX manual: bits 0 to 13 are the address, 16 to
    29 the leading and 32 to 45 the stride byte offset, each divided by 16; 62 and 63 the swizzle.
    """
    bits = run.bits(descriptor, "b64").reshape(-1, 128)[:, 0]
    here = mask.reshape(-1, 128)[:, 0]
    # Blocks that are elsewhere in the program read what the first of these reads.
    bits = np.where(here, bits, bits[here][0])

    def entry(shift: int) -> np.ndarray:
        value = (bits >> np.uint64(shift)) & np.uint64(0x3FFF)
        return value.astype(np.int64)[:, None, None] << 4

    start, leading, stride = entry(0), entry(16), entry(32)
    modes = set(((bits >> np.uint64(62)) & np.uint64(3)).astype(int).tolist())
    if len(modes) != 1:
        raise PTXError(f"descriptors with several swizzles: {text}")
    size = 4 if kind == "tf32" else 2
    vector = 16 // size
    swizzle = {0: 1, 3: 2, 2: 4, 1: 8}[modes.pop()]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if not by_columns:
        offset = (row % 8 * swizzle * vector + column % vector) * size + row // 8 * stride
        if swizzle == 1:
            offset = offset + column // vector * leading
        else:
            offset = offset + column // vector * 16
    elif swizzle == 1:
        offset = (row % vector + column % 8 * vector) * size
        offset = offset + row // vector * stride + column // 8 * leading
    else:
        width = vector * swizzle
        offset = (row % vector + row // vector % swizzle * vector + column % 8 * width) * size
        offset = offset + row // width * leading + column // 8 * stride
    address = start + offset
    if swizzle > 1:
        address = address ^ ((address >> 7 & (swizzle - 1)) << 4)
    if address.min() < 0 or address.max() + size > run.shared_size:
        raise PTXError(f"matrix descriptor out of shared memory: {text}")
    block = run.block_of_thread.reshape(-1, 128)[:, 0]
    address = address + (block * run.shared_pitch)[:, None, None]
    _check_written(run, address, size, mask, text)
    data = run.shared.view(UNSIGNED[8 * size])[address // size]
    if kind == "tf32":
        return truncate_to_tf32(data).view(np.float32)
    return decode(data, kind).astype(np.float32)


def _check_written(run: Run, address: np.ndarray, size: int, mask: np.ndarray, text: str) -> None:
    """A warp group reads for all of its four warps, as the first of them."""
    groups = address.shape[0]
    leaders = np.zeros(run.threads, np.bool_)
    leaders[::128] = mask[::128]
    flat = address.reshape(groups, -1)[mask[::128]]
    for column in range(0, flat.shape[1], 8):
        run.shared_access(flat[:, column], size, leaders, text, write=False)
