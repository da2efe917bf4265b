"""PTX instructions of the tensor cores: fragments in registers, matrices in shared memory.

Products of 16-bit and TF32 operands are exact in float32; sums are taken in float32, in an order
that is not the hardware's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .ptx_parser import Immediate, Instruction, Operand
from .ptx_translator import Effect, Translator, effect, unsupported
from .ptx_types import PTXError, decode, encode, truncate_to_tf32

if TYPE_CHECKING:
    from .ptx_machine import Run

__all__ = ["PendingProducts"]

# Of a warp that holds an 8x8 matrix, lane 4 * group + quarter has two neighbouring elements of row
# `group`. Arrays of fragments therefore have the axes [register, warp, group, quarter, half].


@effect("ldmatrix")
def _load_matrices(t: Translator, it: Instruction) -> Effect:
    """Lane 8i + r has the address of row r of matrix i."""
    targets, (where,) = it.operands
    _check_matrices(it)
    t.granule = min(t.granule, 16)
    entries = [t.register(each) for each in targets]
    address = t.addresses(where)
    transposed = "trans" in it.modifiers
    count = len(entries)

    def load(run: Run, mask: np.ndarray | None) -> None:
        run.require_whole_warps(mask, it.text)
        rows = run.by_warp(address(run.registers))[..., : 8 * count]
        warps = rows.shape[1]
        chosen = _of_rows(run, mask, count)
        offsets = run.shared.locate(rows.reshape(len(rows), -1), 16, chosen, it.text)
        run.shared.note_read(offsets, 16, chosen, it.text, warps=run.warps_of_rows(8 * count))
        loaded = run.shared.gather(offsets, 16)
        blocks = len(loaded)
        if transposed:
            # Lane [group, quarter] has column `group` of rows 2 * quarter and the next.
            elements = loaded.view(np.uint16).reshape(blocks, warps, count, 4, 2, 8)
            elements = np.ascontiguousarray(elements.transpose(2, 0, 1, 5, 3, 4))
            registers = elements.view(np.uint32).reshape(count, blocks, -1)
        else:
            words = loaded.view(np.uint32).reshape(blocks, warps, count, 32)
            registers = words.transpose(2, 0, 1, 3).reshape(count, blocks, -1)
        for entry, bits in zip(entries, registers, strict=True):
            run.set(entry, bits, mask)

    return load


@effect("stmatrix")
def _store_matrices(t: Translator, it: Instruction) -> Effect:
    (where,), sources = it.operands
    _check_matrices(it)
    t.granule = min(t.granule, 16)
    readers = [t.reader(each, "b32") for each in sources]
    address = t.addresses(where)
    transposed = "trans" in it.modifiers
    count = len(readers)

    def store(run: Run, mask: np.ndarray | None) -> None:
        run.require_whole_warps(mask, it.text)
        rows = run.by_warp(address(run.registers))[..., : 8 * count]
        warps = rows.shape[1]
        chosen = _of_rows(run, mask, count)
        offsets = run.shared.locate(rows.reshape(len(rows), -1), 16, chosen, it.text)
        registers = _stacked(run, [read(run.registers) for read in readers])
        blocks = registers.shape[1]
        if transposed:
            elements = registers.view(np.uint16).reshape(count, blocks, warps, 8, 4, 2)
            data = np.ascontiguousarray(elements.transpose(1, 2, 0, 4, 5, 3))
        else:
            words = registers.reshape(count, blocks, warps, 8, 4)
            data = np.ascontiguousarray(words.transpose(1, 2, 0, 3, 4))
        vectors = data.reshape(blocks, -1).view("V16")
        run.shared.note_write(
            offsets,
            16,
            chosen,
            it.text,
            warps=run.warps_of_rows(8 * count),
            data=vectors[..., None],
        )
        run.shared.scatter(offsets, vectors, chosen)

    return store


def _check_matrices(it: Instruction) -> None:
    if "m8n8" not in it.modifiers or "b16" not in it.modifiers:
        raise unsupported(it)


def _of_rows(run: Run, mask: np.ndarray | None, count: int) -> np.ndarray | None:
    """The mask of the rows whose addresses some lanes have."""
    if mask is None:
        return None
    by_warp = run.by_warp(mask)[..., : 8 * count]
    return by_warp.reshape(len(by_warp), -1)


def _stacked(run: Run, registers: Sequence[np.ndarray]) -> np.ndarray:
    """Returns registers as one array ``[register, blocks or 1, threads]``."""
    rows = max(len(each) for each in registers)
    result = np.empty((len(registers), rows, run.threads), registers[0].dtype)
    for number, each in enumerate(registers):
        result[number] = each
    return result


def _split(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns the float32 values of ``[register, warp, lane]``: ``[..., half]`` if 16 bits."""
    if kind in ("f16", "bf16"):
        return decode(bits.view(np.uint16), kind).reshape(*bits.shape, 2)
    if kind == "tf32":
        return truncate_to_tf32(bits).view(np.float32)
    return bits.view(np.float32)


def _fragment_a(run: Run, registers: Sequence[np.ndarray], kind: str, depth: int) -> np.ndarray:
    """Returns the rows-by-depth matrix of every warp, ``[blocks or 1, warps, 16, depth]``.

    Registers alternate between the upper and the lower eight rows, then go along the depth.
    """
    stacked = _stacked(run, registers)
    rows, count = stacked.shape[1], len(registers)
    values = _split(stacked.reshape(count // 2, 2, -1, 8, 4), kind)
    if kind in ("f16", "bf16"):
        matrix = values.transpose(2, 1, 3, 0, 4, 5)
    else:
        matrix = values.transpose(2, 1, 3, 0, 4)
    return matrix.reshape(rows, run.threads // 32, 16, depth)


def _fragment_b(run: Run, registers: Sequence[np.ndarray], kind: str, depth: int) -> np.ndarray:
    """Returns the depth-by-columns matrix of every warp, ``[blocks or 1, warps, depth, 8]``."""
    stacked = _stacked(run, registers)
    rows, count = stacked.shape[1], len(registers)
    values = _split(stacked.reshape(count, -1, 8, 4), kind)
    if kind in ("f16", "bf16"):
        matrix = values.transpose(1, 0, 3, 4, 2)
    else:
        matrix = values.transpose(1, 0, 3, 2)
    return matrix.reshape(rows, run.threads // 32, depth, 8)


def _scattered(product: np.ndarray, run: Run) -> np.ndarray:
    """Returns sums ``[blocks or 1, warps, 16, columns]`` as registers ``[register, ..., threads]``.

    Of each eight columns there are four registers: two neighbours of the upper and of the lower
    eight rows.
    """
    rows, warps, _, columns = product.shape
    parts = product.reshape(rows * warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(parts).reshape(columns // 2, rows, run.threads)


_MMA_DEPTHS = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8)}


@effect("mma")
def _multiply(t: Translator, it: Instruction) -> Effect:
    shape = next((m for m in it.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    sums_kind, kind, b_kind, c_kind = it.modifiers[-4:]
    depth = int(shape.rpartition("k")[2] or 0)
    supported = (
        shape.startswith("m16n8")
        and sums_kind == c_kind
        and sums_kind in ("f32", "f16")
        and kind == b_kind
        and depth in _MMA_DEPTHS.get(kind, ())
        and {"row", "col"} <= set(it.modifiers)
    )
    if not supported:
        raise unsupported(it)
    targets, a, b, c = it.operands
    entries = [t.register(each) for each in targets]
    readers_a, readers_b, readers_c = (
        [t.reader(each, "b32") for each in operand] for operand in (a, b, c)
    )

    def multiply(run: Run, mask: np.ndarray | None) -> None:
        run.require_whole_warps(mask, it.text)
        registers = run.registers
        left = _fragment_a(run, [read(registers) for read in readers_a], kind, depth)
        right = _fragment_b(run, [read(registers) for read in readers_b], kind, depth)
        product = _scattered(np.matmul(left, right), run)
        before = [read(registers) for read in readers_c]
        if sums_kind == "f32":
            for number, entry in enumerate(entries):
                sums = product[number] + before[number].view(np.float32)
                run.set(entry, sums.view(np.uint32), mask)
            return
        for number, entry in enumerate(entries):
            pair = np.stack((product[2 * number], product[2 * number + 1]), -1)
            run.set(entry, encode(pair + decode(before[number], "f16x2"), "f16x2"), mask)

    return multiply


# Warp-group products are computed when they are issued, but until their wait the registers of their
# results are undefined, and the matrices they read must stay as they are.


class PendingProducts:
    """Results of warp-group products that nothing has waited for.

    Attributes:
        results: For each entry, the group (None before its commit) and the bits.
        operands: (group, addresses of 16-byte vectors, what they held, instruction).
        group: The next group.
    """

    def __init__(self) -> None:
        self.results: dict[int, tuple[int | None, np.ndarray]] = {}
        self.operands: list[tuple[int | None, np.ndarray, np.ndarray, str]] = []
        self.group = 0

    def select(self, rows: np.ndarray, blocks: int) -> PendingProducts:
        """Returns those of some of the blocks."""
        other = PendingProducts()
        other.group = self.group

        def part(array: np.ndarray) -> np.ndarray:
            return array[rows] if len(array) == blocks else array

        other.results = {
            entry: (group, part(bits)) for entry, (group, bits) in self.results.items()
        }
        other.operands = [
            (group, part(addresses), part(held), text)
            for group, addresses, held, text in self.operands
        ]
        return other

    def commit(self) -> None:
        """Gives the products since the last commit a group."""
        self.results = {
            entry: (self.group if group is None else group, bits)
            for entry, (group, bits) in self.results.items()
        }
        self.operands = [
            (self.group if group is None else group, *rest) for group, *rest in self.operands
        ]
        self.group += 1

    def wait(self, run: Run, pending: int) -> None:
        """Writes the results of all but the last ``pending`` groups."""
        last = self.group - pending
        for entry, (group, bits) in list(self.results.items()):
            if group is not None and group < last:
                run.set(entry, bits, None)
                del self.results[entry]
        remaining = []
        for group, addresses, held, text in self.operands:
            if group is None or group >= last:
                remaining.append((group, addresses, held, text))
                continue
            now = run.shared.gather(addresses, 16)
            if now.tobytes() != held.tobytes():
                raise PTXError(f"an operand changes before the product was waited for: {text}")
            # Each warp waits for its own part only: others may still be reading.
            _note_group_read(run, addresses, text)
        self.operands = remaining


@effect("wgmma")
def _group_multiply(t: Translator, it: Instruction) -> Effect:
    stage = it.modifiers[0]
    if stage == "mma_async":
        return _group_product(t, it)
    if stage == "fence":
        return lambda run, mask: _require_groups(run, mask, it)
    if stage == "commit_group":

        def commit(run: Run, mask: np.ndarray | None) -> None:
            _require_groups(run, mask, it)
            run.products.commit()

        return commit
    if stage != "wait_group":
        raise unsupported(it)
    (pending,) = it.operands[0]
    if not isinstance(pending, Immediate):
        raise unsupported(it)
    groups = int(pending.value)

    def wait(run: Run, mask: np.ndarray | None) -> None:
        _require_groups(run, mask, it)
        run.products.wait(run, groups)

    return wait


def _require_groups(run: Run, mask: np.ndarray | None, it: Instruction) -> None:
    if run.threads % 128:
        raise PTXError(f"{run.threads} threads are no whole warp groups: {it.text}")
    if mask is not None:
        raise PTXError(f"not supported, a product of some warp groups only: {it.text}")


def _group_product(t: Translator, it: Instruction) -> Effect:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", it.modifiers[3])
    sums_kind, kind, b_kind = it.modifiers[4:7]
    if shape is None or sums_kind != "f32" or kind != b_kind or kind not in _MMA_DEPTHS:
        raise unsupported(it)
    columns, depth = int(shape.group(1)), int(shape.group(2))
    targets, a, b, keep, *flags = it.operands
    sign_a, sign_b, *majors = (_integer(flag[0], it) for flag in flags)
    t.granule = min(t.granule, 16)
    t.proxies = True
    entries = [t.register(each) for each in targets]
    before = [t.reader(each, "b32") for each in targets]
    in_registers = len(a) > 1
    readers_a = [t.reader(each, "b32" if in_registers else "b64") for each in a]
    read_b, read_keep = t.reader(b[0], "b64"), t.reader(keep[0], "pred")
    a_by_columns = not in_registers and len(majors) == 2 and majors[0] == 1
    b_by_columns = bool(majors) and majors[-1] == 1
    layout_a = _SharedMatrix(64, depth, kind, a_by_columns, it.text)
    layout_b = _SharedMatrix(columns, depth, kind, b_by_columns, it.text)
    undefined = np.full((1, 1), 0xFFFFFFFF, np.uint32)

    def multiply(run: Run, mask: np.ndarray | None) -> None:
        _require_groups(run, mask, it)
        registers, pending = run.registers, run.products
        if in_registers:
            left = _fragment_a(run, [read(registers) for read in readers_a], kind, depth)
            left = left.reshape(len(left), -1, 64, depth)
        else:
            left = layout_a.load(run, readers_a[0](registers))
        right = layout_b.load(run, read_b(registers))
        if sign_a * sign_b < 0:
            left = -left
        sums_of_groups = np.matmul(left, right.swapaxes(2, 3))
        by_warp = sums_of_groups.reshape(len(sums_of_groups), -1, 16, columns)
        product = _scattered(by_warp, run)
        kept = read_keep(registers)
        for number, entry in enumerate(entries):
            sums = product[number]
            if kept.any():
                _, old = pending.results.get(entry, (None, before[number](registers)))
                start = old.view(np.float32)
                if not kept.all():
                    start = np.where(kept, start, np.float32(0))
                sums = sums + start
            pending.results[entry] = (None, sums.view(np.uint32))
            registers[entry] = undefined

    return multiply


def _integer(operand: Operand, it: Instruction) -> int:
    if not isinstance(operand, Immediate):
        raise unsupported(it)
    return int(operand.value)


def _note_group_read(run: Run, offsets: np.ndarray, text: str) -> None:
    """Notes that warp groups, one after the other, read vectors, as several of their warps."""
    groups = run.threads // 128
    first = np.repeat(4 * np.arange(groups), offsets.shape[1] // groups)[None, :]
    for warp in (0, 1):
        run.shared.note_read(offsets, 16, None, text, warps=first + warp)


class _SharedMatrix:
    """Reads a matrix that a descriptor means.

    See "Asynchronous warpgroup-level matrix" in the PTX manual: bits 0 to 13 are the address, 16 to
    29 the leading and 32 to 45 the stride byte offset, each divided by 16; 62 and 63 the swizzle.
    """

    def __init__(self, rows: int, depth: int, kind: str, by_columns: bool, text: str) -> None:
        self._rows = rows
        self._depth = depth
        self._kind = kind
        self._by_columns = by_columns
        self._text = text
        self._places: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def load(self, run: Run, descriptors: np.ndarray) -> np.ndarray:
        """Returns ``[blocks or 1, warp groups, rows, depth]`` in float32."""
        groups = run.threads // 128
        rows = len(descriptors)
        each = np.broadcast_to(descriptors, (rows, run.threads)).reshape(rows, groups, 128)[..., 0]
        places = [[self._find(int(one)) for one in row] for row in each]
        vectors = np.array([[one[0] for one in row] for row in places])
        within = np.array([[one[1] for one in row] for row in places])
        offsets = vectors.reshape(rows, -1)
        if offsets.min() < 0 or offsets.max() + 16 > run.shared.size:
            raise PTXError(f"matrix descriptor out of shared memory: {self._text}")
        run.shared.check_fenced(offsets, self._text)
        _note_group_read(run, offsets, self._text)
        loaded = run.shared.gather(offsets, 16)
        run.products.operands.append((None, offsets, loaded, self._text))
        blocks = len(loaded)
        size = 4 if self._kind == "tf32" else 2
        elements = loaded.view(np.uint32 if size == 4 else np.uint16).reshape(blocks, groups, -1)
        index = within.reshape(rows, groups, -1)
        if rows == 1:
            index = np.broadcast_to(index, (blocks, groups, index.shape[-1]))
        picked = np.take_along_axis(elements, index, 2)
        if size == 4:
            values = truncate_to_tf32(picked).view(np.float32)
        else:
            values = decode(picked, self._kind)
        return values.reshape(blocks, groups, self._rows, self._depth)

    def _find(self, descriptor: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the offsets of all 16-byte vectors, and where among them the elements are."""
        if descriptor not in self._places:
            size = 4 if self._kind == "tf32" else 2
            addresses = self._addresses(descriptor, size)
            vectors, position = np.unique(addresses >> 4, return_inverse=True)
            position = position.reshape(addresses.shape)
            self._places[descriptor] = (
                vectors << 4,
                position * (16 // size) + (addresses & 15) // size,
            )
        return self._places[descriptor]

    def _addresses(self, descriptor: int, size: int) -> np.ndarray:
        """Returns the byte address of each element, ``[rows, depth]``."""
        start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = {0: 1, 3: 2, 2: 4, 1: 8}[(descriptor >> 62) & 3]
        vector = 16 // size
        row, column = np.arange(self._rows)[:, None], np.arange(self._depth)[None, :]
        if not self._by_columns:
            offset = (row % 8 * swizzle * vector + column % vector) * size + row // 8 * stride
            offset = offset + column // vector * (leading if swizzle == 1 else 16)
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
        return address
