"""Executes parsed PTX: many blocks at once, all their threads in lockstep, with checks on the way.

Threads run by the smallest program counter first, so that those which took different branches meet
again. Found and reported as :class:`PTXError`:

- global and shared accesses out of bounds (to the byte) or misaligned;
- reads of shared memory that nothing wrote, or whose asynchronous copy has not been waited for;
- barriers that not all threads of a block reach, or reach at different places; deadlock;
- warp-wide instructions with inactive lanes;
- between barriers, accesses of two warps to the same byte of shared memory, one of them a write;
- within a launch, accesses of two blocks to the same byte of global memory, one of them a write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import ptx_instructions, ptx_matrix
from .ptx_parser import Address, Immediate, Instruction, Operand, Parameter, Program, Register
from .ptx_types import UNSIGNED, WIDTH, PTXError, decode, encode, is_float

__all__ = ["Memory", "Run", "launch"]

_BASE = 0x10_0000_0000
_GUARD_BYTES = 512
_MAX_THREADS = 4096

_NOBODY = -1
_SEVERAL = -2

Handler = Callable[["Run", Instruction, np.ndarray, bool], None]


class Memory:
    """Global memory: allocations with gaps between them that nothing may touch."""

    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 16, np.uint8)
        self.allocated = np.zeros(1 << 16, np.bool_)
        self.top = _GUARD_BYTES

    def allocate(self, contents: np.ndarray) -> int:
        """Copies bytes into a new allocation and returns its address."""
        start = self.top
        self.top = -(-(start + len(contents) + _GUARD_BYTES) // 256) * 256
        while self.top > len(self.bytes):
            self.bytes = np.concatenate([self.bytes, np.zeros_like(self.bytes)])
            self.allocated = np.concatenate([self.allocated, np.zeros_like(self.allocated)])
        self.bytes[start : start + len(contents)] = contents
        self.allocated[start : start + len(contents)] = True
        return _BASE + start

    def read(self, address: int, count: int) -> np.ndarray:
        """Returns a view of ``count`` bytes."""
        return self.bytes[address - _BASE : address - _BASE + count]

    def index(self, addresses: np.ndarray, count: int, text: str) -> np.ndarray:
        """Returns the index of the first byte of accesses of ``count`` bytes each, checked."""
        start = addresses - _BASE
        if len(start) == 0:
            return start
        if start.min() < 0 or start.max() + count > len(self.bytes):
            raise PTXError(f"global access to a wild address: {text}")
        # Gaps are wider than an access, so what begins and ends inside is inside.
        if not (self.allocated[start].all() and self.allocated[start + count - 1].all()):
            raise PTXError(f"global access out of bounds: {text}")
        return start


class _Owners:
    """Who wrote and read each byte since the last synchronisation."""

    def __init__(self, size: int) -> None:
        self.write_epoch = np.full(size, -1, np.int32)
        self.writer = np.full(size, _NOBODY, np.int32)
        self.read_epoch = np.full(size, -1, np.int32)
        self.reader = np.full(size, _NOBODY, np.int32)

    def record(
        self,
        start: np.ndarray,
        count: int,
        owner: np.ndarray,
        epoch: np.ndarray,
        write: bool,
        harmless: np.ndarray | None = None,
    ) -> bool:
        """Records accesses; returns whether one of them races.

        Args:
            start: First byte of each access.
            count: Bytes of each access.
            owner: Who accesses.
            epoch: Accesses of other epochs are no conflict.
            write: Whether they write.
            harmless: Bytes, ``[accesses, count]``, where writing again what is there already is no
                race: programs store values that several warps hold.
        """
        index = start[:, None] + np.arange(count)
        owner, epoch = owner[:, None], epoch[:, None]
        others_wrote = (self.write_epoch[index] == epoch) & (self.writer[index] != owner)
        if harmless is not None:
            others_wrote &= ~harmless
        if others_wrote.any():
            return True
        readers = self.reader[index]
        read = self.read_epoch[index] == epoch
        if write:
            if (read & (readers != owner)).any():
                return True
            self.write_epoch[index] = epoch
            self.writer[index] = owner
            return False
        self.reader[index] = np.where(read & (readers != owner), _SEVERAL, owner)
        self.read_epoch[index] = epoch
        several = self.reader[index] != owner
        self.reader[index[several]] = _SEVERAL
        return False


# Distance of the addresses that parameters have where a program takes them.
_PARAMETER_BYTES = 16


@dataclass
class _Copies:
    """Asynchronous copies that have not landed: one thread's each."""

    thread: np.ndarray
    target: np.ndarray
    group: np.ndarray
    data: np.ndarray

    def select(self, which: np.ndarray) -> _Copies:
        return _Copies(self.thread[which], self.target[which], self.group[which], self.data[which])


def launch(
    program: Program,
    memory: Memory,
    grid: Sequence[int],
    threads: int,
    arguments: Sequence[int | float],
    *,
    dynamic_shared: int = 0,
    races: bool = False,
) -> int:
    """Runs a kernel.

    Args:
        program: The kernel.
        memory: Global memory, which it reads and writes.
        grid: Blocks along x, y and z.
        threads: Threads of a block, along x.
        arguments: Values of the parameters; those beyond get 0.
        dynamic_shared: Bytes of shared memory beside what the program declares.
        races: Whether to look for races.

    Returns:
        Instructions executed, each for many threads at once.

    Raises:
        PTXError: Something was found; the message names the instruction.
    """
    if threads % 32:
        raise PTXError(f"a block has {threads} threads: expected a multiple of 32")
    if program.threads not in (None, threads):
        raise PTXError(f"a block has {threads} threads: the program requires {program.threads}")
    x, y, z = (*grid, 1, 1)[:3]
    blocks = x * y * z
    at_once = max(1, _MAX_THREADS // threads)
    owners = _Owners(memory.top) if races and blocks > 1 else None
    steps = 0
    with np.errstate(all="ignore"):
        for first in range(0, blocks, at_once):
            batch = range(first, min(blocks, first + at_once))
            run = Run(program, memory, (x, y, z), threads, arguments, dynamic_shared, batch, races)
            run.global_owners = owners
            steps += run.execute()
    return steps


class Run:
    """Some blocks of a launch; the state that instructions change."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[int | float],
        dynamic_shared: int,
        blocks: range,
        races: bool,
    ) -> None:
        self.program = program
        self.memory = memory
        self.block_threads = threads
        self.blocks = len(blocks)
        self.threads = total = threads * self.blocks
        self.lanes = np.arange(total) % 32
        self.warps = np.arange(total) // 32
        self.block_of_thread = np.repeat(np.arange(self.blocks), threads)
        self._block_ids = np.repeat(np.array(blocks), threads)
        self._special = self._special_registers(grid)
        self.registers = {
            name: np.zeros(total, UNSIGNED[width])
            for name, width in program.register_widths.items()
        }
        self._parameters = {
            name: (kind, arguments[index] if index < len(arguments) else 0)
            for index, (kind, name) in enumerate(program.parameters)
        }
        self._constants: dict[tuple[Operand, str], np.ndarray] = {}

        self.shared_size = program.static_shared + dynamic_shared
        self.shared_pitch = -(-max(1, self.shared_size) // 128) * 128
        self.shared = np.zeros(self.blocks * self.shared_pitch, np.uint8)
        self.shared_written = np.zeros(len(self.shared), np.bool_)
        self._shared_in_flight = np.zeros(len(self.shared), np.bool_)
        self._shared_owners = _Owners(len(self.shared)) if races else None
        self.global_owners: _Owners | None = None
        self.epoch = np.zeros(self.blocks, np.int32)

        # Where all live threads are at one place, `place` is it; else `places` says for each.
        self.place = 0
        self.places: np.ndarray | None = None
        self.live = np.ones(total, np.bool_)
        self.waiting = np.zeros(total, np.bool_)
        self._everybody = np.ones(total, np.bool_)

        self.copy_group = np.zeros(total, np.int32)
        self._copies: list[_Copies] = []
        self.matrix_group = 0
        self.matrix_results: dict[str, tuple[int | None, np.ndarray]] = {}

        self._handlers = [_handler(instruction) for instruction in program.instructions]

    def _special_registers(self, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        thread = np.arange(self.threads) % self.block_threads
        x, y, z = grid
        ids = self._block_ids
        values = {
            "%tid.x": thread,
            "%tid.y": 0 * thread,
            "%tid.z": 0 * thread,
            "%ntid.x": self.block_threads + 0 * thread,
            "%ntid.y": 1 + 0 * thread,
            "%ntid.z": 1 + 0 * thread,
            "%ctaid.x": ids % x,
            "%ctaid.y": ids // x % y,
            "%ctaid.z": ids // (x * y),
            "%nctaid.x": x + 0 * thread,
            "%nctaid.y": y + 0 * thread,
            "%nctaid.z": z + 0 * thread,
            "%laneid": self.lanes,
            "%warpid": thread // 32,
        }
        return {name: value.astype(np.uint32) for name, value in values.items()}

    # Operands.

    def bits(self, operand: Operand, kind: str) -> np.ndarray:
        """Returns the raw bits of an operand for all threads, in the width of a type."""
        if isinstance(operand, Register):
            name = operand.name
            found = self.registers.get(name)
            if found is None:
                return self._named(operand, kind)
            wanted = UNSIGNED[WIDTH[kind]]
            return found if found.dtype == wanted else found.astype(wanted)
        constant = self._constants.get((operand, kind))
        if constant is None:
            constant = self._constants[operand, kind] = self._constant(operand, kind)
        return constant

    def values(self, operand: Operand, kind: str) -> np.ndarray:
        """Returns the values of an operand for all threads."""
        return decode(self.bits(operand, kind), kind)

    def _named(self, operand: Register, kind: str) -> np.ndarray:
        name = operand.name
        if name.startswith("!"):
            return ~self.bits(Register(name[1:]), kind)
        if name in self._special:
            return self._special[name].astype(UNSIGNED[WIDTH[kind]])
        if name in self.program.shared_offsets:
            offset = self.program.shared_offsets[name]
            return np.full(self.threads, offset, UNSIGNED[WIDTH[kind]])
        if name in self._parameters:
            place = list(self._parameters).index(name) * _PARAMETER_BYTES
            return np.full(self.threads, place, UNSIGNED[WIDTH[kind]])
        raise PTXError(f"operand not understood: {name}")

    def _constant(self, operand: Operand, kind: str) -> np.ndarray:
        if not isinstance(operand, Immediate):
            raise PTXError(f"operand not understood: {operand}")
        value, width = operand.value, WIDTH[kind]
        if isinstance(value, float):
            return encode(np.full(self.threads, value), kind if is_float(kind) else f"f{width}")
        if operand.is_bits and width == 64:
            return encode(np.full(self.threads, value, np.uint32).view(np.float32), "f64")
        if width == 1:
            return np.full(self.threads, bool(value))
        return np.full(self.threads, value & ((1 << width) - 1), UNSIGNED[width])

    def set_bits(self, operand: Operand, bits: np.ndarray, mask: np.ndarray, full: bool) -> None:
        """Writes a register where the mask is set. Arrays are never changed in place."""
        assert isinstance(operand, Register)
        name = operand.name
        if name == "_":
            return
        old = self.registers[name]
        if bits.dtype != old.dtype:
            bits = bits.astype(old.dtype)
        self.registers[name] = bits if full else np.where(mask, bits, old)

    def set_values(
        self, operand: Operand, values: np.ndarray, kind: str, mask: np.ndarray, full: bool
    ) -> None:
        """Rounds values to a type and writes them."""
        self.set_bits(operand, encode(values, kind), mask, full)

    def width_of(self, operand: Operand) -> int:
        """Returns the bits of a register."""
        assert isinstance(operand, Register)
        return self.program.register_widths.get(operand.name, 32)

    def addresses(self, operand: Operand) -> np.ndarray:
        """Returns the addresses that ``[base + offset]`` means, for all threads."""
        if not isinstance(operand, Address):
            raise PTXError(f"address not understood: {operand}")
        if operand.base is None:
            return np.full(self.threads, operand.offset, np.int64)
        return self.bits(operand.base, "b64").astype(np.int64) + operand.offset

    def parameter(self, operand: Operand, kind: str, mask: np.ndarray) -> np.ndarray:
        """Returns the raw bits of a kernel's parameter, which may be named by its address."""
        if isinstance(operand, Address):
            bits = np.zeros(self.threads, UNSIGNED[WIDTH[kind]])
            addresses = self.addresses(operand)
            names = list(self._parameters)
            for address in np.unique(addresses[mask]):
                index, offset = divmod(int(address), _PARAMETER_BYTES)
                if offset or not 0 <= index < len(names):
                    raise PTXError(f"there is no parameter at address {address}")
                chosen = addresses == address
                bits[chosen] = self.parameter(Parameter(names[index], 0), kind, mask)[chosen]
            return bits
        if not isinstance(operand, Parameter):
            raise PTXError(f"parameter not understood: {operand}")
        _, value = self._parameters[operand.name]
        width = WIDTH[kind]
        if isinstance(value, float):
            return encode(np.full(self.threads, value), "f32" if width == 32 else f"f{width}")
        return np.full(self.threads, int(value) & ((1 << width) - 1), UNSIGNED[width])

    # Memory.

    def global_index(
        self, addresses: np.ndarray, count: int, mask: np.ndarray, text: str, write: bool
    ) -> np.ndarray:
        """Checks global accesses of the threads in the mask and returns their byte indices."""
        chosen = addresses if mask.all() else addresses[mask]
        index = self.memory.index(chosen, count, text)
        if self.global_owners is not None:
            owner = self._block_ids[mask]
            epoch = np.zeros(len(owner), np.int32)
            if self.global_owners.record(index, count, owner, epoch, write):
                raise PTXError(f"global-memory race between blocks: {text}")
        return index

    def shared_index(
        self, addresses: np.ndarray, count: int, mask: np.ndarray, text: str
    ) -> np.ndarray:
        """Checks the bounds of shared accesses and returns their byte indices."""
        chosen = addresses[mask]
        if len(chosen) and (chosen.min() < 0 or chosen.max() + count > self.shared_size):
            raise PTXError(
                f"shared access out of bounds ({chosen.max()} of {self.shared_size}): {text}"
            )
        return chosen + self.block_of_thread[mask] * self.shared_pitch

    def shared_access(
        self,
        index: np.ndarray,
        count: int,
        mask: np.ndarray,
        text: str,
        *,
        write: bool,
        data: np.ndarray | None = None,
    ) -> None:
        """Looks for reads of what nothing wrote and for races; stores ``data`` if it is given."""
        every_byte = index[:, None] + np.arange(count)
        harmless = None
        if data is not None:
            content = np.ascontiguousarray(data).view(np.uint8)
            harmless = self.shared[every_byte] == content
            self.shared[every_byte] = content
            if (self.shared[every_byte] != content).any():
                raise PTXError(f"threads write different values to one place: {text}")
        if write:
            if self._shared_in_flight[every_byte].any():
                raise PTXError(f"written while an asynchronous copy to it is pending: {text}")
            self.shared_written[every_byte] = True
        elif not self.shared_written[every_byte].all():
            raise PTXError(f"shared memory is read that nothing wrote: {text}")
        if self._shared_owners is not None:
            epoch = self.epoch[self.block_of_thread[mask]]
            owner = self.warps[mask]
            if self._shared_owners.record(index, count, owner, epoch, write, harmless):
                raise PTXError(f"shared-memory race between warps: {text}")

    def check_alignment(
        self, addresses: np.ndarray, count: int, mask: np.ndarray, text: str
    ) -> None:
        """Checks that the threads in the mask access multiples of ``count`` bytes."""
        if (addresses[mask] % count).any():
            raise PTXError(f"misaligned {count}-byte access: {text}")

    def load(
        self, space: str, addresses: np.ndarray, width: int, count: int, mask: np.ndarray, text: str
    ) -> np.ndarray:
        """Loads ``count`` elements for each thread in the mask: ``[threads in mask, count]``."""
        size = width // 8
        self.check_alignment(addresses, size * count, mask, text)
        if space == "shared":
            index = self.shared_index(addresses, size * count, mask, text)
            self.shared_access(index, size * count, mask, text, write=False)
            source = self.shared
        else:
            index = self.global_index(addresses, size * count, mask, text, write=False)
            source = self.memory.bytes
        return source.view(UNSIGNED[width])[(index // size)[:, None] + np.arange(count)]

    def store(
        self, space: str, addresses: np.ndarray, data: np.ndarray, mask: np.ndarray, text: str
    ) -> None:
        """Stores ``[threads in mask, count]`` elements."""
        size, count = data.dtype.itemsize, data.shape[1]
        self.check_alignment(addresses, size * count, mask, text)
        if space == "shared":
            index = self.shared_index(addresses, size * count, mask, text)
            self.shared_access(index, size * count, mask, text, write=True, data=data)
            return
        index = self.global_index(addresses, size * count, mask, text, write=True)
        self.memory.bytes.view(data.dtype)[(index // size)[:, None] + np.arange(count)] = data

    def start_copy(
        self,
        target: np.ndarray,
        source: np.ndarray,
        count: int,
        sizes: np.ndarray,
        mask: np.ndarray,
        text: str,
    ) -> None:
        """Begins asynchronous copies of ``count`` bytes, of which ``sizes`` come from memory."""
        self.check_alignment(target, count, mask, text)
        index = self.shared_index(target, count, mask, text)
        self.shared_access(index, count, mask, text, write=True)
        self.shared_written[index[:, None] + np.arange(count)] = False
        self._shared_in_flight[index[:, None] + np.arange(count)] = True
        data = np.zeros((len(index), count), np.uint8)
        for size in np.unique(sizes[mask]):
            if size == 0:
                continue
            chosen = mask & (sizes == size)
            self.check_alignment(source, count, chosen, text)
            start = self.global_index(source, int(size), chosen, text, write=False)
            data[sizes[mask] == size, : int(size)] = self.memory.bytes[
                start[:, None] + np.arange(int(size))
            ]
        thread = np.flatnonzero(mask)
        self._copies.append(_Copies(thread, index, np.full(len(thread), -1, np.int32), data))

    def commit_copies(self, mask: np.ndarray) -> None:
        """Gives the copies that threads have begun since their last commit a group."""
        for copies in self._copies:
            fresh = (copies.group < 0) & mask[copies.thread]
            copies.group[fresh] = self.copy_group[copies.thread[fresh]]
        self.copy_group = self.copy_group + mask

    def wait_for_copies(self, pending: int | None, mask: np.ndarray, text: str) -> None:
        """Lets copies land; all for None, else all but those of the last ``pending`` groups."""
        remaining = []
        for copies in self._copies:
            landed = mask[copies.thread]
            if pending is not None:
                last = self.copy_group[copies.thread] - pending
                landed = landed & (copies.group >= 0) & (copies.group < last)
            if landed.any():
                done = copies.select(landed)
                count = done.data.shape[1]
                every_byte = done.target[:, None] + np.arange(count)
                self.shared[every_byte] = done.data
                self._shared_in_flight[every_byte] = False
                threads = np.zeros(self.threads, np.bool_)
                threads[done.thread] = True
                # In the order of threads, as the mask selects them.
                order = np.argsort(done.thread, kind="stable")
                self.shared_access(done.target[order], count, threads, text, write=True)
            if not landed.all():
                remaining.append(copies.select(~landed))
        self._copies = remaining

    # Control.

    def execute(self) -> int:
        """Runs until every thread has ended; returns the number of instructions."""
        instructions, handlers = self.program.instructions, self._handlers
        end = len(instructions)
        steps = 0
        while True:
            if self.places is None:
                place, mask = self.place, self.live
                if place >= end or not mask.any():
                    return steps
                full = bool(mask.all())
                self.place = place + 1
            else:
                running = self.live & ~self.waiting
                if not running.any():
                    if not self.live.any():
                        return steps
                    self._release()
                    continue
                place = int(self.places[running].min())
                mask = running & (self.places == place)
                full = False
                if place >= end:
                    self.live = self.live & ~mask
                    continue
                self.places = np.where(mask, place + 1, self.places)
            instruction = instructions[place]
            steps += 1
            if instruction.guard is not None:
                guard = self.registers[instruction.guard]
                mask = mask & (guard ^ instruction.negated)
                count = np.count_nonzero(mask)
                full = count == self.threads
                if count == 0 and instruction.opcode != "bra":
                    continue
            handler = handlers[place]
            if handler is None:
                raise PTXError(f"not supported: {instruction.text}")
            try:
                handler(self, instruction, mask, full)
            except PTXError:
                raise
            except Exception as error:
                raise PTXError(
                    f"{type(error).__name__} ({error}) in: {instruction.text}"
                ) from error
            if self.places is not None:
                self._converge()

    def branch(self, instruction: Instruction, mask: np.ndarray) -> None:
        """Sends the threads in the mask to a label."""
        (label,) = instruction.operands[0]
        name = label.name if isinstance(label, Register) else str(label)
        target = self.program.labels[name]
        if self.places is None:
            if not mask.any():
                return
            if np.array_equal(mask, self.live):
                self.place = target
                return
            self.places = np.full(self.threads, self.place)
        self.places = np.where(mask, target, self.places)

    def end(self, mask: np.ndarray) -> None:
        """Ends the threads in the mask."""
        self.live = self.live & ~mask
        if self.places is not None:
            self._release()

    def barrier(self, instruction: Instruction, mask: np.ndarray) -> None:
        """Makes the threads in the mask wait for the others of their block."""
        if self.places is None:
            if not np.array_equal(mask, self.live):
                raise PTXError(f"divergent barrier: not all threads reach {instruction.text}")
            by_block = self.live.reshape(self.blocks, -1)
            partly = by_block.any(1) & ~by_block.all(1)
            if partly.any():
                raise PTXError("divergent barrier: some threads have ended")
            self.epoch = self.epoch + 1
            return
        self.waiting = self.waiting | mask
        self._release()

    def _release(self) -> None:
        assert self.places is not None
        by_block = self.waiting.reshape(self.blocks, -1)
        arrived = (by_block | ~self.live.reshape(self.blocks, -1)).all(1) & by_block.any(1)
        if not arrived.any():
            if self.live.any() and not (self.live & ~self.waiting).any():
                raise PTXError("deadlock: every thread waits at a barrier")
            return
        if not self.live.reshape(self.blocks, -1)[arrived].all():
            raise PTXError("divergent barrier: some threads have ended")
        for block in np.flatnonzero(arrived):
            first = block * self.block_threads
            places = self.places[first : first + self.block_threads]
            if (places != places[0]).any():
                raise PTXError("divergent barrier: threads wait at different barriers")
        self.waiting = self.waiting & ~np.repeat(arrived, self.block_threads)
        self.epoch = self.epoch + arrived

    def _converge(self) -> None:
        assert self.places is not None
        if self.waiting.any() or not self.live.any():
            return
        places = self.places[self.live]
        if (places == places[0]).all():
            self.place, self.places = int(places[0]), None

    def require_whole_warps(self, mask: np.ndarray, text: str, lanes: int = 32) -> None:
        """Checks that the mask has all or none of each warp, or of each ``lanes`` threads."""
        groups = mask.reshape(-1, lanes)
        if (groups.any(1) != groups.all(1)).any():
            raise PTXError(f"warp-wide instruction with inactive lanes: {text}")


def _handler(instruction: Instruction) -> Handler | None:
    for module in (ptx_instructions, ptx_matrix):
        handler: Handler | None = module.HANDLERS.get(instruction.opcode)
        if handler is not None:
            return handler
    return None
