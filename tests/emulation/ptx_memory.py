"""Global and shared memory of the PTX machine, and what is remembered of the accesses to them.

Addresses are arrays ``[blocks or 1, threads or 1]``: what is the same for all blocks, or for all
threads, has one entry. A mask of the threads that take part is None where all do.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .ptx_types import BYTES, PTXError

__all__ = [
    "GLOBAL_BASE",
    "GlobalMemory",
    "GlobalRaces",
    "SharedMemory",
    "WarpRaces",
    "chosen",
    "harmless",
]

GLOBAL_BASE = 0x10_0000_0000
"""Addresses below this are not of global memory."""

_GUARD_BYTES = 512
# An address that is farther from all allocations has nothing to do with them.
_NEARBY_BYTES = 1 << 20
# Of a byte: who, block 0 being 1. Nobody is 0, so that memory that nothing touches costs nothing.
_NOBODY = 0
_SEVERAL = -2
_CONSTANT = np.full((1, 1), -3, np.int32)

# States of a granule of shared memory.
_UNWRITTEN, _WRITTEN, _IN_FLIGHT = range(3)

# An owner's tag is its warp plus this many times the epoch; the last tag of an epoch means several.
_TAGS = 64
_SEVERAL_WARPS = _TAGS - 1

# Arrays of granules.
_KEPT = ("_state", "_writer", "_reader", "_unfenced")

_MAX_LOGGED_BYTES = 100_000_000


def _spread(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    # numpy takes its time to find out that there is nothing to do.
    return values if values.shape == shape else np.broadcast_to(values, shape)


def chosen(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns the values of the threads in the mask: all as they are, or a flat selection."""
    if mask is None:
        return values
    if values.shape == mask.shape:
        return values[mask]
    shape = np.broadcast_shapes(values.shape, mask.shape)
    return _spread(values, shape)[_spread(mask, shape)]


def harmless(addresses: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns addresses with, for the threads outside the mask, that of one inside."""
    if mask is None:
        return addresses
    return np.where(mask, addresses, chosen(addresses, mask)[0])


def _check_alignment(addresses: np.ndarray, size: int, text: str) -> None:
    if size > 1 and int(np.bitwise_or.reduce(addresses, axis=None)) & (size - 1):
        raise PTXError(f"misaligned {size}-byte access: {text}")


def _grown(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros_like(array)])


class GlobalMemory:
    """Allocations with gaps between them that nothing may touch.

    What the program calls an address is where the allocation was asked to lie; what methods call a
    place is an index into ``bytes``, where allocations follow each other closely.
    """

    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 16, np.uint8)
        self.top = _GUARD_BYTES
        # In the order of addresses: first address, the one behind the last, address minus place.
        self._addresses: list[int] = []
        self._ends: list[int] = []
        self._shifts: list[int] = []
        self._labels: list[str] = []
        self._arrays: tuple[np.ndarray, ...] | None = None
        self._undefined: np.ndarray | None = None

    def allocate(
        self,
        contents: np.ndarray,
        *,
        address: int | None = None,
        alignment: int = 0,
        label: str = "",
    ) -> int:
        """Copies bytes into a new allocation.

        Args:
            contents: The bytes.
            address: Where the program sees them; by default an address is chosen.
            alignment: Of the address if it is chosen: its remainder modulo 256.
            label: A name for messages.

        Returns:
            The address.

        Raises:
            ValueError: The address is below :data:`GLOBAL_BASE`, or some of the bytes lie in
                another allocation.
        """
        start = -(-self.top // 256) * 256 + (alignment if address is None else address) % 256
        if address is None:
            address = GLOBAL_BASE + start
        end = address + len(contents)
        number = bisect_right(self._addresses, address)
        if address < GLOBAL_BASE:
            raise ValueError(f"address: expected at least {GLOBAL_BASE:#x}, got {address:#x}")
        if (number > 0 and self._ends[number - 1] > address) or (
            number < len(self._addresses) and end > self._addresses[number]
        ):
            raise ValueError(f"address: {address:#x} to {end:#x} lies in another allocation")
        self.top = start + len(contents) + _GUARD_BYTES
        # Room for a vector that begins at the last byte.
        while self.top + 256 > len(self.bytes):
            self.bytes = _grown(self.bytes)
            if self._undefined is not None:
                self._undefined = _grown(self._undefined)
        self.bytes[start : start + len(contents)] = contents
        self._addresses.insert(number, address)
        self._ends.insert(number, end)
        self._shifts.insert(number, address - start)
        self._labels.insert(number, label or f"allocation {len(self._labels)}")
        self._arrays = None
        return address

    def _place(self, address: int) -> int:
        return address - self._shifts[bisect_right(self._addresses, address) - 1]

    def read(self, address: int, count: int) -> np.ndarray:
        """Returns a view of ``count`` bytes."""
        start = self._place(address)
        return self.bytes[start : start + count]

    def mark_undefined(self, address: int, which: np.ndarray) -> None:
        """Makes reads of the bytes from an address on for which the mask is set an error."""
        if self._undefined is None:
            self._undefined = np.zeros(len(self.bytes), np.bool_)
        start = self._place(address)
        self._undefined[start : start + len(which)] = which

    def undefined(self, address: int, count: int) -> np.ndarray:
        """Returns which bytes are still undefined."""
        if self._undefined is None:
            return np.zeros(count, np.bool_)
        start = self._place(address)
        return self._undefined[start : start + count]

    def view(self, size: int) -> np.ndarray:
        """Returns the memory as units of ``size`` bytes."""
        return self.bytes.view(BYTES[size])

    def locate(
        self, addresses: np.ndarray, size: int, mask: np.ndarray | None, text: str
    ) -> np.ndarray:
        """Checks accesses of ``size`` bytes; returns the places where they begin.

        Threads outside the mask get the place of one inside.
        """
        addresses = harmless(addresses, mask)
        first = int(addresses.min())
        number = bisect_right(self._addresses, first) - 1
        if number >= 0 and int(addresses.max()) + size <= self._ends[number]:
            places = addresses - self._shifts[number]
        else:
            places = self._locate_each(addresses, size, text)
        _check_alignment(places, size, text)
        return places

    def _locate_each(self, addresses: np.ndarray, size: int, text: str) -> np.ndarray:
        if not self._addresses:
            raise PTXError(f"global access to a wild address (there are no allocations): {text}")
        if self._arrays is None:
            self._arrays = tuple(
                np.array(each, np.int64) for each in (self._addresses, self._ends, self._shifts)
            )
        starts, ends, shifts = self._arrays
        number = np.searchsorted(starts, addresses, "right") - 1
        # Below the first allocation is what lies behind the last, too: it has the number -1.
        outside = (number < 0) | (addresses > ends.take(number) - size)
        if outside.any():
            address = int(addresses[outside].flat[0])
            distance, where = self._describe(address)
            what = "out of bounds" if distance <= _NEARBY_BYTES else "to a wild address"
            raise PTXError(f"global access {what} ({where}): {text}")
        return addresses - shifts.take(number)

    def _describe(self, address: int) -> tuple[int, str]:
        """Returns how far from the nearest allocation an address is, and where that is."""
        distances = [
            max(start - address, address - end + 1, 0)
            for start, end in zip(self._addresses, self._ends, strict=True)
        ]
        number = int(np.argmin(distances))
        start, end = self._addresses[number], self._ends[number]
        where = f"byte {address - start} of the {end - start} of {self._labels[number]}"
        return distances[number], where

    def gather(self, places: np.ndarray, size: int, text: str) -> np.ndarray:
        """Reads ``size`` bytes at each place."""
        if self._undefined is not None:
            unit = min(size, 8)
            flags = self._undefined.view(BYTES[unit])
            first = places >> (unit.bit_length() - 1)
            if any(flags.take(first + number).any() for number in range(size // unit)):
                raise PTXError(f"uninitialised global memory is read: {text}")
        return self.view(size).take(places >> (size.bit_length() - 1))

    def scatter(
        self, places: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
    ) -> None:
        """Writes one element of the data at each place."""
        size = data.dtype.itemsize
        # What threads outside the mask write ends in the gap before the first allocation.
        if mask is not None:
            places = np.where(mask, places, 0)
        index = places >> (size.bit_length() - 1)
        if data.shape != index.shape:
            index = _spread(index, np.broadcast_shapes(data.shape, index.shape))
        self.view(size)[index] = data
        if self._undefined is not None:
            unit = min(size, 8)
            flags = self._undefined.view(BYTES[unit])
            first = places >> (unit.bit_length() - 1)
            for number in range(size // unit):
                flags[first + number] = 0

    def check_agreement(
        self, places: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
    ) -> None:
        """Checks, after a write, that no two threads wrote different data to one place."""
        size = data.dtype.itemsize
        stored = self.view(size).take(places >> (size.bit_length() - 1))
        _check_agreement(stored, data, mask, text)


def _same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns whether elements have the same bits."""
    if first.dtype.itemsize < 16:
        return first == second
    shape = np.broadcast_shapes(first.shape, second.shape)
    pairs = [
        np.ascontiguousarray(np.broadcast_to(each, shape)).view(np.uint64).reshape(*shape, 2)
        for each in (first, second)
    ]
    return (pairs[0] == pairs[1]).all(-1)


def _check_agreement(
    stored: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
) -> None:
    same = _same(stored, data)
    if mask is not None:
        same = same | ~mask
    if not same.all():
        raise PTXError(f"threads store different values to one place: {text}")


@dataclass
class _Reads:
    """One instruction's reads."""

    places: np.ndarray
    size: int
    owners: np.ndarray
    mask: np.ndarray | None
    text: str


class GlobalRaces:
    """Finds bytes that two blocks of a launch access, one of them writing.

    Blocks run in no particular order, so every such pair is a race. Writes are compared as they
    happen; reads are only noted, and compared with the writes of the whole launch at its end.
    """

    def __init__(self, size: int) -> None:
        self._writer = np.zeros(size, np.int32)
        # Of what is written.
        self._first, self._end = size, 0
        self._reads: list[_Reads] = []
        self._logged = 0
        self._reader: np.ndarray | None = None

    def write(
        self,
        places: np.ndarray,
        size: int,
        owners: np.ndarray,
        mask: np.ndarray | None,
        text: str,
    ) -> None:
        """Notes writes of ``size`` bytes at each place by the blocks ``owners``."""
        places, owners = np.broadcast_arrays(places, owners + 1)
        places, owners = chosen(places, mask).reshape(-1), chosen(owners, mask).reshape(-1)
        self._first = min(self._first, int(places.min()))
        self._end = max(self._end, int(places.max()) + size)
        for byte in range(size):
            index = places + byte
            before = self._writer.take(index)
            wrong = (before != owners) & (before != _NOBODY)
            if not wrong.any():
                self._writer[index] = owners
                before = self._writer.take(index)
                wrong = before != owners
            if wrong.any():
                raise PTXError(
                    f"global-memory race: blocks {before[wrong][0] - 1} and "
                    f"{owners[wrong][0] - 1} both write a byte: {text}"
                )

    def read(
        self,
        places: np.ndarray,
        size: int,
        owners: np.ndarray | None,
        mask: np.ndarray | None,
        text: str,
    ) -> None:
        """Notes reads of ``size`` bytes at each place, by blocks or, for None, as constant."""
        owners = _CONSTANT if owners is None else owners + 1
        self._reads.append(_Reads(places, size, owners, mask, text))
        self._logged += places.nbytes
        if self._logged > _MAX_LOGGED_BYTES:
            self._condense()

    def finish(self) -> None:
        """Compares the reads with the writes.

        Raises:
            PTXError: A block read what another wrote, or as constant what any wrote.
        """
        self._compare()
        if self._reader is not None:
            read, written = self._reader != _NOBODY, self._writer != _NOBODY
            if (read & written & (self._reader != self._writer)).any():
                raise PTXError("global-memory race: a block reads a byte that another writes")

    def _compare(self) -> None:
        if self._first >= self._end:
            return
        first, end = self._first, self._end
        written = np.zeros(end - first + 1, np.int32)
        np.cumsum(self._writer[first:end] != _NOBODY, out=written[1:])
        for reads in self._reads:
            if reads.places.min() >= end or reads.places.max() + reads.size <= first:
                continue
            begin = np.clip(reads.places - first, 0, end - first)
            stop = np.clip(reads.places + (reads.size - first), 0, end - first)
            suspect = written.take(stop) != written.take(begin)
            if reads.mask is not None:
                suspect = suspect & reads.mask
            if not suspect.any():
                continue
            places, owners = np.broadcast_arrays(reads.places, reads.owners)
            places, owners = chosen(places, suspect), chosen(owners, suspect)
            for byte in range(reads.size):
                writer = self._writer.take(places + byte)
                wrong = (writer != _NOBODY) & (writer != owners)
                if wrong.any():
                    reader = owners[wrong][0]
                    what = "a read as constant is of"
                    if reader > 0:
                        what = f"block {reader - 1} reads"
                    raise PTXError(
                        f"global-memory race: {what} a byte that block {writer[wrong][0] - 1} "
                        f"writes: {reads.text}"
                    )

    def _condense(self) -> None:
        """Replaces the list of reads by the reader of each byte."""
        self._compare()
        if self._reader is None:
            self._reader = np.zeros(len(self._writer), np.int32)
        for reads in self._reads:
            places, owners = np.broadcast_arrays(reads.places, reads.owners)
            places, owners = chosen(places, reads.mask), chosen(owners, reads.mask)
            for byte in range(reads.size):
                index = places + byte
                before = self._reader.take(index)
                others = (before != _NOBODY) & (before != owners)
                self._reader[index] = np.where(others, _SEVERAL, owners)
                self._reader[index[self._reader.take(index) != owners]] = _SEVERAL
        self._reads.clear()
        self._logged = 0


@dataclass
class _Access:
    """One instruction's accesses to global memory; the data, in units along the last axis."""

    places: np.ndarray
    size: int
    mask: np.ndarray | None
    text: str
    data: np.ndarray | None = None

    def without(self, rows: np.ndarray) -> _Access:
        """Returns the same without some blocks."""
        others = ~rows[:, None]
        mask = others if self.mask is None else self.mask & others
        return replace(self, mask=mask)

    def select(self, rows: np.ndarray) -> _Access:
        """Returns the same of some blocks alone."""

        def part(array: np.ndarray | None) -> np.ndarray | None:
            return array if array is None or len(array) != len(rows) else array[rows]

        return replace(self, places=part(self.places), mask=part(self.mask), data=part(self.data))


class WarpRaces:
    """Finds bytes of global memory that two warps of a block access between two barriers.

    One of them writing, that is, unless both write the same value. Accesses are noted, and compared
    when the barrier is reached.
    """

    def __init__(self, memory: GlobalMemory, owners: np.ndarray, warps: np.ndarray) -> None:
        """Begins for some blocks.

        Args:
            memory: Global memory.
            owners: ``[blocks, 1]``, the number of each block.
            warps: ``[1, threads]``, the warp of each thread.
        """
        self._memory = memory
        # Of no other warp of any block, and not 0.
        self._tags = (owners.astype(np.int64) * _TAGS + warps + 1).astype(np.int64)
        self._reads: list[_Access] = []
        self._writes: list[_Access] = []

    def select(self, rows: np.ndarray) -> WarpRaces:
        """Returns those of some of the blocks."""
        other = object.__new__(WarpRaces)
        other._memory, other._tags = self._memory, self._tags[rows]
        other._reads, other._writes = (
            [each.select(rows) for each in accesses] for accesses in (self._reads, self._writes)
        )
        return other

    def read(self, places: np.ndarray, size: int, mask: np.ndarray | None, text: str) -> None:
        """Notes reads of ``size`` bytes at each place."""
        self._reads.append(_Access(places, size, mask, text))

    def write(
        self, places: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
    ) -> None:
        """Notes writes of all units of the data at each place."""
        size = data.dtype.itemsize * data.shape[-1]
        self._writes.append(_Access(places, size, mask, text, data))

    def pass_barrier(self, rows: np.ndarray | None = None) -> None:
        """Compares the accesses before a barrier of all blocks, or of some.

        Raises:
            PTXError: There is a race.
        """
        if self._writes:
            self._compare()
        if rows is None:
            self._reads.clear()
            self._writes.clear()
        else:
            self._reads = [each.without(rows) for each in self._reads]
            self._writes = [each.without(rows) for each in self._writes]

    def _bytes(self, access: _Access) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first bytes and the tags of the threads that access something."""
        shape = np.broadcast_shapes(
            access.places.shape,
            self._tags.shape,
            () if access.mask is None else access.mask.shape,
        )
        places, tags = _spread(access.places, shape), _spread(self._tags, shape)
        if access.mask is None:
            return places.reshape(-1), tags.reshape(-1)
        return chosen(places, access.mask), chosen(tags, access.mask)

    def _compare(self) -> None:
        first = min(int(each.places.min()) for each in self._writes)
        end = max(int(each.places.max()) + each.size for each in self._writes)
        writer = np.zeros(end - first, np.int64)
        several = np.zeros(end - first, np.bool_)
        for access in self._writes:
            places, tags = self._bytes(access)
            for byte in range(access.size):
                index = places + (byte - first)
                before = writer.take(index)
                writer[index] = tags
                # Two in this very instruction, or one in an earlier one. Those of other blocks are
                # looked for elsewhere.
                conflict = (writer.take(index) != tags) | ((before != 0) & (before != tags))
                several[index[conflict]] = True
        if several.any():
            self._check_values(several, first)
        written = np.zeros(end - first + 1, np.int64)
        np.cumsum(writer != 0, out=written[1:])
        for access in self._reads:
            if access.places.min() >= end or access.places.max() + access.size <= first:
                continue
            places, tags = self._bytes(access)
            begin = np.clip(places - first, 0, end - first)
            stop = np.clip(places + (access.size - first), 0, end - first)
            suspect = written.take(stop) != written.take(begin)
            places, tags = places[suspect], tags[suspect]
            for byte in range(access.size if len(places) else 0):
                index = places + (byte - first)
                inside = (index >= 0) & (index < end - first)
                other = np.where(inside, writer.take(index, mode="clip"), 0)
                same_block = (other - 1) // _TAGS == (tags - 1) // _TAGS
                wrong = (other != 0) & same_block & (other != tags)
                if wrong.any():
                    one, two = ((int(tag[wrong][0]) - 1) % _TAGS for tag in (other, tags))
                    raise PTXError(
                        f"global-memory race: between two barriers, warp {one} writes and warp "
                        f"{two} of the same block reads a byte: {access.text}"
                    )

    def _check_values(self, several: np.ndarray, first: int) -> None:
        """Checks that what several warps wrote is what is there now."""
        for access in self._writes:
            assert access.data is not None
            shape = np.broadcast_shapes(
                access.places.shape,
                access.data.shape[:2],
                () if access.mask is None else access.mask.shape,
            )
            data = np.ascontiguousarray(
                np.broadcast_to(access.data, (*shape, access.data.shape[-1]))
            )
            data = data.view(np.uint8).reshape(*shape, access.size)
            places = _spread(access.places, shape)
            for byte in range(access.size):
                wrong = several.take(places + (byte - first), mode="clip")
                wrong = wrong & (data[..., byte] != self._memory.bytes.take(places + byte))
                if access.mask is not None:
                    wrong = wrong & access.mask
                if wrong.any():
                    raise PTXError(
                        "global-memory race: between two barriers, warps of a block write "
                        f"different values to a byte: {access.text}"
                    )


class SharedMemory:
    """The shared memory of some blocks: ``bytes`` is ``[blocks, pitch]``.

    What is remembered is kept for granules: as many bytes as the program's smallest access. As long
    as all blocks access it in the same way, it is kept for one block alone.
    """

    def __init__(
        self,
        blocks: int,
        size: int,
        granule: int,
        warps: np.ndarray,
        *,
        races: bool,
        proxies: bool,
    ) -> None:
        """Makes memory that nothing has written yet.

        Args:
            blocks: How many there are.
            size: Bytes of each.
            granule: Bytes of the smallest access.
            warps: ``[1, threads]``, the warp of each thread.
            races: Whether to look for races.
            proxies: Whether something reads through the asynchronous proxy, which sees what was
                written otherwise only behind a fence.
        """
        self.size = size
        # Behind the end is room for what threads outside the mask write.
        self._scratch = -(-size // 128) * 128
        self.pitch = self._scratch + 128
        self.bytes = np.full((blocks, self.pitch), 0xFF, np.uint8)
        self.races = races
        self.epoch: int | np.ndarray = 0
        self._warps = warps
        self._shift = granule.bit_length() - 1
        self._granules = self.pitch >> self._shift
        self._rows = np.arange(blocks)[:, None]
        self._state = np.full((1, self._granules), _UNWRITTEN, np.uint8)
        self._writer = np.full((1, self._granules), -1, np.int32)
        self._reader = np.full((1, self._granules), -1, np.int32)
        # Of no use, and not kept up, where there is only one proxy.
        self._proxies = proxies
        self._unfenced = np.zeros((1, self._granules), np.bool_)

    def select(self, rows: np.ndarray) -> SharedMemory:
        """Returns the memory of some of the blocks."""
        other = object.__new__(SharedMemory)
        other.__dict__.update(self.__dict__)
        other.bytes = self.bytes[rows]
        other._rows = np.arange(len(other.bytes))[:, None]
        for name in _KEPT:
            array = getattr(self, name)
            setattr(other, name, array[rows] if len(array) > 1 else array.copy())
        if isinstance(self.epoch, np.ndarray):
            other.epoch = self.epoch[rows]
        return other

    def pass_barrier(self, rows: np.ndarray | None = None) -> None:
        """Begins a new epoch, for all blocks or for some."""
        if rows is not None:
            self.epoch = np.broadcast_to(self.epoch, (len(self.bytes), 1)) + rows[:, None]
        else:
            self.epoch = self.epoch + 1

    def locate(
        self, addresses: np.ndarray, size: int, mask: np.ndarray | None, text: str
    ) -> np.ndarray:
        """Checks bounds and alignment of accesses of ``size`` bytes; returns the offsets.

        Threads outside the mask get the offset of one inside.
        """
        offsets = harmless(addresses, mask)
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > self.size:
            wrong = low if low < 0 else high
            raise PTXError(f"shared access out of bounds (byte {wrong} of {self.size}): {text}")
        _check_alignment(offsets, size, text)
        return offsets

    def gather(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Reads ``size`` bytes at each offset."""
        index = offsets >> (size.bit_length() - 1)
        memory = self.bytes.view(BYTES[size])
        if len(index) == 1:
            return memory.take(index[0], axis=1)
        return memory.reshape(-1).take(index + self._rows * (self.pitch // size))

    def scatter(self, offsets: np.ndarray, data: np.ndarray, mask: np.ndarray | None) -> None:
        """Writes one element of the data at each offset."""
        size = data.dtype.itemsize
        if mask is not None:
            offsets = np.where(mask, offsets, self._scratch)
        index = (offsets >> (size.bit_length() - 1)) + self._rows * (self.pitch // size)
        if data.shape != index.shape:
            index = _spread(index, np.broadcast_shapes(data.shape, index.shape))
        self.bytes.view(BYTES[size]).reshape(-1)[index] = data

    def note_read(
        self,
        offsets: np.ndarray,
        size: int,
        mask: np.ndarray | None,
        text: str,
        *,
        warps: np.ndarray | None = None,
    ) -> None:
        """Looks for reads of what was not written, and for races.

        Args:
            offsets: Where.
            size: Bytes of each.
            mask: Which of them.
            text: For messages.
            warps: ``[1, offsets]``, who reads, where that is not each thread.
        """
        granules, tags, base = self._granules_of(offsets, size, mask, warps)
        self.check_defined(granules, text)
        if self.races:
            self._note_read(granules, tags, base, text)

    def check_defined(self, granules: np.ndarray, text: str) -> None:
        """Checks that granules, as numbers within all that are kept, are written."""
        state = self._state.reshape(-1).take(granules)
        if np.count_nonzero(state != _WRITTEN):
            if np.count_nonzero(state == _IN_FLIGHT):
                raise PTXError(f"shared memory is read before its copy was waited for: {text}")
            raise PTXError(f"shared memory is read that nothing wrote: {text}")

    def note_write(
        self,
        offsets: np.ndarray,
        size: int,
        mask: np.ndarray | None,
        text: str,
        *,
        warps: np.ndarray | None = None,
        data: np.ndarray | None = None,
        stage: str = "store",
    ) -> None:
        """Looks for races of writes, and remembers that they are written.

        Args:
            offsets: Where.
            size: Bytes of each.
            mask: Which of them.
            text: For messages.
            warps: ``[1, offsets]``, who writes, where that is not each thread.
            data: What is going to be written: that two warps store the same value to one place is
                no race, compilers do so.
            stage: ``"store"``, ``"issue"`` of an asynchronous copy, or its ``"landing"``.
        """
        granules, tags, base = self._granules_of(offsets, size, mask, warps)
        state = self._state.reshape(-1)
        if stage != "landing" and np.count_nonzero(state.take(granules) == _IN_FLIGHT):
            raise PTXError(f"shared memory is written while a copy to it is in flight: {text}")
        state[granules] = _IN_FLIGHT if stage == "issue" else _WRITTEN
        if self._proxies:
            self._unfenced.reshape(-1)[granules] = True
        if not self.races:
            return
        writer, reader = self._writer.reshape(-1), self._reader.reshape(-1)
        before = writer.take(granules)
        wrong = (before >= base) & (before != tags)
        if np.count_nonzero(wrong) and not self._holds(offsets, data, mask, wrong):
            self._race("wrote", before[wrong], "writes", tags, wrong, text)
        before = reader.take(granules)
        wrong = (before >= base) & (before != tags)
        if np.count_nonzero(wrong):
            self._race("read", before[wrong], "writes", tags, wrong, text)
        writer[granules] = tags
        if data is None:
            after = writer.take(granules)
            wrong = after != tags
            if wrong.any():
                self._race("wrote", after[wrong], "writes", tags, wrong, text)

    def _holds(
        self,
        offsets: np.ndarray,
        data: np.ndarray | None,
        mask: np.ndarray | None,
        wrong: np.ndarray,
    ) -> bool:
        """Returns whether what is there already is what the accesses in question write."""
        if data is None:
            return False
        unit = data.dtype.itemsize
        same = np.ones((1, 1), bool)
        for number in range(data.shape[-1]):
            held = self.gather(offsets + unit * number, unit)
            same = same & _same(held, data[..., number])
        if len(self._state) == 1:
            same = same.all(0, keepdims=True)
        shape = np.broadcast_shapes(same.shape, offsets.shape)
        return not (wrong.any(-1) & ~chosen(np.broadcast_to(same, shape), mask)).any()

    def fence(self) -> None:
        """Makes what was written visible to the asynchronous proxy."""
        self._unfenced[:] = False

    def check_fenced(self, offsets: np.ndarray, text: str) -> None:
        """Checks that 16-byte vectors are visible to the asynchronous proxy."""
        granules, _, _ = self._granules_of(offsets, 16, None, np.zeros((1, 1), np.int64))
        if self._unfenced.reshape(-1).take(granules).any():
            raise PTXError(f"shared memory is read by another proxy without a fence: {text}")

    def _note_read(self, granules: np.ndarray, tags: Any, base: Any, text: str) -> None:
        writer, reader = self._writer.reshape(-1), self._reader.reshape(-1)
        before = writer.take(granules)
        wrong = (before >= base) & (before != tags)
        if np.count_nonzero(wrong):
            self._race("wrote", before[wrong], "reads", tags, wrong, text)
        before = reader.take(granules)
        others = (before >= base) & (before != tags)
        if np.count_nonzero(others):
            reader[granules] = np.where(others, base + _SEVERAL_WARPS, tags)
        else:
            reader[granules] = tags
        # Of several warps in this very instruction the last has been noted.
        several = reader.take(granules) != tags
        if np.count_nonzero(several):
            everyone = _spread(np.asarray(base + _SEVERAL_WARPS), granules.shape)
            reader[granules[several]] = everyone[several]

    def _race(
        self,
        did: str,
        others: np.ndarray,
        does: str,
        tags: Any,
        wrong: np.ndarray,
        text: str,
    ) -> None:
        other = int(others.flat[0]) % _TAGS
        first = "several warps" if other == _SEVERAL_WARPS else f"warp {other}"
        second = int(np.broadcast_to(tags, wrong.shape)[wrong].flat[0]) % _TAGS
        raise PTXError(
            f"shared-memory race: {first} {did} and warp {second} {does} the same byte: {text}"
        )

    def _granules_of(
        self, offsets: np.ndarray, size: int, mask: np.ndarray | None, warps: np.ndarray | None
    ) -> tuple[np.ndarray, Any, Any]:
        """Returns numbers of granules, tags of their accessors, and the least tag of the epoch."""
        numbers = offsets >> self._shift
        base = np.multiply(self.epoch, _TAGS)
        alike = (
            len(offsets) == 1
            and (mask is None or len(mask) == 1)
            and not isinstance(base, np.ndarray)
        )
        if not alike or len(self._state) > 1:
            self._keep_every_block()
            numbers = numbers + self._rows * self._granules
        tags = (self._warps if warps is None else warps) + base
        shape = np.broadcast_shapes(numbers.shape, tags.shape, () if mask is None else mask.shape)
        numbers, tags = _spread(numbers, shape), _spread(tags, shape)
        if mask is not None:
            if isinstance(base, np.ndarray):
                base = chosen(_spread(base, shape), mask)
            numbers, tags = chosen(numbers, mask), chosen(tags, mask)
        count = size >> self._shift
        # The granules of an access are the last axis.
        if isinstance(base, np.ndarray):
            base = base[..., None]
        numbers, tags = numbers[..., None], tags[..., None]
        return numbers + np.arange(count) if count > 1 else numbers, tags, base

    def _keep_every_block(self) -> None:
        if len(self._state) == len(self.bytes):
            return
        for name in _KEPT:
            setattr(self, name, np.repeat(getattr(self, name), len(self.bytes), axis=0))

    def check_agreement(
        self, offsets: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
    ) -> None:
        """Checks, after a write, that no two threads wrote different data to one place."""
        stored = self.gather(offsets, data.dtype.itemsize)
        _check_agreement(stored, data, mask, text)
