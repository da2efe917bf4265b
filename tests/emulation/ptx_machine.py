"""Executes translated PTX: many blocks at once, all their threads in lockstep, with checks.

Where all threads of some blocks go one way and all of the others another, the run is split in two.
Where threads of a block do, they run by the smallest program counter first, so that those which
took different branches meet again. Found and reported as :class:`PTXError`:

- global and shared accesses out of bounds (to the byte) or misaligned;
- reads of global memory that was marked as uninitialised and that nothing wrote;
- on request, reads as constant (``ld.global.nc``) of what the same launch writes;
- reads of shared memory that nothing wrote, or whose asynchronous copy has not been waited for, and
  writes of shared memory to which a copy is in flight;
- barriers that not all threads of a block reach, or reach at different places; endless loops;
- warp-wide instructions with inactive lanes;
- operands of asynchronous matrix products that no fence made visible to them, or that change
  before their wait;
- on request, between barriers, accesses of two warps to the same byte of shared memory, one of them
  a write; the same of global memory; within a launch, accesses of two blocks to the same byte of
  global memory, one of them a write and not both atomic; and threads that store different values to
  one place at once.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import ptx_instructions, ptx_matrix  # noqa: F401 - they register the instructions
from .ptx_memory import GlobalMemory, GlobalRaces, SharedMemory, WarpRaces, chosen, harmless
from .ptx_parser import Program
from .ptx_translator import Block, Operation, Translation, single
from .ptx_types import BYTES, UNSIGNED, PTXError, encode

__all__ = ["Argument", "Launch", "Run", "launch"]

Argument = int | float | bytes
"""Of a kernel; bytes are a struct that is passed by value."""

_MAX_THREADS = 8192

# Kernels in tests take some hundred thousand.
_MAX_STEPS = 3_000_000


def launch(
    translation: Translation,
    memory: GlobalMemory,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Argument],
    *,
    dynamic_shared: int = 0,
    races: bool = False,
    threads_at_once: int = _MAX_THREADS,
) -> int:
    """Runs a kernel.

    Args:
        translation: The kernel.
        memory: Global memory, which it reads and writes.
        grid: Blocks along x, y and z; missing axes are 1.
        block: Threads of a block along x, y and z.
        arguments: Values of the parameters; those beyond get 0.
        dynamic_shared: Bytes of shared memory beside what the program declares.
        races: Whether to look for races.
        threads_at_once: Blocks run together up to this many threads, or one block.

    Returns:
        Instructions executed, each for many threads at once.

    Raises:
        PTXError: Something was found; the message names the instruction.
    """
    program = translation.program
    x, y, z = (*grid, 1, 1)[:3]
    width, height, depth = (*block, 1, 1)[:3]
    threads = width * height * depth
    if threads % 32:
        raise PTXError(f"a block has {threads} threads: expected a multiple of 32")
    if program.threads not in (None, threads):
        raise PTXError(f"a block has {threads} threads: the program requires {program.threads}")
    if program.most_threads is not None and threads > program.most_threads:
        most = program.most_threads
        raise PTXError(f"a block has {threads} threads: the program is for at most {most}")
    blocks = x * y * z
    if min(x, y, z) < 0 or x >= 2**31 or max(y, z) >= 2**16:
        raise PTXError(f"the grid is {x}, {y}, {z}: expected less than 2**31, 2**16, 2**16 blocks")
    started = Launch(
        translation,
        memory,
        (x, y, z),
        (width, height, depth),
        _parameter_memory(program, arguments),
        program.static_shared + dynamic_shared,
        races,
        GlobalRaces(memory.top) if races and (blocks > 1 or translation.constants) else None,
    )
    at_once = max(1, threads_at_once // threads)
    steps = 0
    with np.errstate(all="ignore"):
        for first in range(0, blocks, at_once):
            runs = [Run(started, np.arange(first, min(blocks, first + at_once)))]
            while runs:
                run = runs.pop()
                run.execute(runs)
                steps += run.steps
        if started.global_races is not None:
            started.global_races.finish()
    return steps


@dataclass
class Launch:
    """What the blocks of a launch have in common."""

    translation: Translation
    memory: GlobalMemory
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: np.ndarray
    shared_size: int
    races: bool
    global_races: GlobalRaces | None

    @property
    def threads(self) -> int:
        """Threads of a block."""
        width, height, depth = self.block
        return width * height * depth


def _parameter_memory(program: Program, arguments: Sequence[Argument]) -> np.ndarray:
    """Lays out the arguments as the program's parameters."""
    offsets = list(program.parameter_offsets.values())
    # Whole vectors of 16 bytes.
    memory = np.zeros(-(-program.parameter_end // 16) * 16, np.uint8)
    for offset, size, value in zip(offsets, program.parameters, arguments, strict=False):
        if isinstance(value, bytes):
            if len(value) != size:
                raise PTXError(f"an argument has {len(value)} bytes: the parameter has {size}")
            content = value
        elif isinstance(value, float):
            kind = {2: "f16", 4: "f32", 8: "f64"}[size]
            with np.errstate(all="ignore"):
                content = encode(np.full(1, value), kind).tobytes()
        else:
            content = (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        memory[offset : offset + size] = np.frombuffer(content, np.uint8)
    return memory


@dataclass
class _Copies:
    """What one instruction copies asynchronously, until it lands.

    Attributes:
        offsets: Where to, in shared memory.
        data: What.
        mask: By which threads, or None for all.
        group: Of each thread; -1 before it is committed.
        text: The instruction.
    """

    offsets: np.ndarray
    data: np.ndarray
    mask: np.ndarray | None
    group: np.ndarray
    text: str


@dataclass
class _Divergence:
    """Where threads are that are not all at one place: arrays ``[blocks or 1, threads]``."""

    places: np.ndarray
    live: np.ndarray
    waiting: np.ndarray

    def blocks(self, blocks: int) -> None:
        """Keeps every block on its own."""
        self.places, self.live, self.waiting = (
            np.repeat(each, blocks, axis=0) if len(each) == 1 else each
            for each in (self.places, self.live, self.waiting)
        )


class Run:
    """Some blocks of a launch; the state that instructions change.

    Attributes:
        registers: Arrays ``[blocks or 1, threads or 1]``.
        lanes: ``[1, threads]``, the lane of each thread.
        first_lanes: ``[1, threads]``, the first thread of each thread's warp.
        steps: Instructions executed.
    """

    def __init__(self, launch: Launch, block_ids: np.ndarray) -> None:
        translation = launch.translation
        self.launch = launch
        self.memory = launch.memory
        self.block_ids = block_ids[:, None].astype(np.int32)
        self.threads = launch.threads
        thread = np.arange(self.threads)[None, :]
        self.lanes = thread % 32
        self.first_lanes = thread - self.lanes
        self.registers: list[np.ndarray] = list(translation.initial)
        for name, entry in translation.special.items():
            self.registers[entry] = self._special(name, thread)
        for entry, offset, width in translation.parameters:
            bits = launch.parameters[offset : offset + width // 8].view(UNSIGNED[width])
            self.registers[entry] = bits.reshape(1, 1)
        self.shared = SharedMemory(
            len(block_ids),
            launch.shared_size,
            translation.granule,
            thread // 32,
            races=launch.races,
            proxies=translation.proxies,
        )
        self.warp_races = (
            WarpRaces(self.memory, self.block_ids, thread // 32) if launch.races else None
        )
        self.place = 0
        self.steps = 0
        self._divergence: _Divergence | None = None
        self._copy_group = np.zeros((1, 1), np.int32)
        self._copies: list[_Copies] = []
        self.products = ptx_matrix.PendingProducts()

    def _special(self, name: str, thread: np.ndarray) -> np.ndarray:
        (x, y, _), (width, height, depth) = self.launch.grid, self.launch.block
        ids = self.block_ids.astype(np.int64)
        one = np.ones((1, 1), np.int64)
        values = {
            "%tid.x": thread % width,
            "%tid.y": thread // width % height,
            "%tid.z": thread // (width * height),
            "%ntid.x": one * width,
            "%ntid.y": one * height,
            "%ntid.z": one * depth,
            "%ctaid.x": ids % x,
            "%ctaid.y": ids // x % y,
            "%ctaid.z": ids // (x * y),
            "%nctaid.x": one * self.launch.grid[0],
            "%nctaid.y": one * self.launch.grid[1],
            "%nctaid.z": one * self.launch.grid[2],
            "%laneid": self.lanes,
            "%warpid": thread // 32,
        }
        if name not in values:
            raise PTXError(f"special register not supported: {name}")
        return values[name].astype(np.uint32)

    @property
    def blocks(self) -> int:
        """How many blocks run."""
        return len(self.block_ids)

    # What effects use.

    def set(self, entry: int, bits: np.ndarray, mask: np.ndarray | None) -> None:
        """Writes a register where the mask is set."""
        old = self.registers[entry]
        # It was forgotten if nothing reads it unless it is written again.
        self.registers[entry] = bits if mask is None or old is None else np.where(mask, bits, old)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns values for every thread of every block."""
        return np.broadcast_to(values, (self.blocks, self.threads))

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        """Returns values as ``[blocks or 1, warps, 32]``."""
        rows = len(values)
        return np.broadcast_to(values, (rows, self.threads)).reshape(rows, -1, 32)

    def require_whole_warps(self, mask: np.ndarray | None, text: str, lanes: int = 32) -> None:
        """Checks that the mask has all or none of each warp, or of each ``lanes`` threads."""
        if mask is None:
            return
        groups = np.broadcast_to(mask, (len(mask), self.threads)).reshape(len(mask), -1, lanes)
        if (groups.any(-1) != groups.all(-1)).any():
            raise PTXError(f"warp-wide instruction with inactive lanes: {text}")

    def load_global(
        self,
        addresses: np.ndarray,
        size: int,
        mask: np.ndarray | None,
        text: str,
        *,
        constant: bool = False,
    ) -> np.ndarray:
        """Loads ``size`` bytes for each thread, as one element or as a last axis of several.

        What is loaded as ``constant``, nothing may write in the same launch.
        """
        places = self.memory.locate(addresses, size, mask, text)
        if self.launch.global_races is not None:
            owners = None if constant else self.block_ids
            self.launch.global_races.read(places, size, owners, mask, text)
        if self.warp_races is not None:
            self.warp_races.read(places, size, mask, text)
        if size <= 16:
            return self.memory.gather(places, size, text)
        units = [self.memory.gather(places + first, 16, text) for first in range(0, size, 16)]
        return np.stack(units, -1)

    def load_parameters(
        self, addresses: np.ndarray, size: int, mask: np.ndarray | None, text: str
    ) -> np.ndarray:
        """Loads ``size`` bytes of the parameters for each thread."""
        addresses = harmless(addresses, mask)
        low, high = int(addresses.min()), int(addresses.max())
        if low < 0 or high + size > self.launch.translation.program.parameter_end or size > 16:
            raise PTXError(f"parameter out of bounds: {text}")
        if (addresses % size).any():
            raise PTXError(f"misaligned {size}-byte access: {text}")
        return self.launch.parameters.view(BYTES[size]).take(addresses // size)

    def store_global(
        self, addresses: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
    ) -> None:
        """Stores the units along the last axis of the data one after the other."""
        unit, count = data.dtype.itemsize, data.shape[-1]
        places = self.memory.locate(addresses, unit * count, mask, text)
        if self.launch.global_races is not None:
            self.launch.global_races.write(places, unit * count, self.block_ids, mask, text)
        if self.warp_races is not None:
            self.warp_races.write(places, data, mask, text)
        for number in range(count):
            start = places + unit * number
            self.memory.scatter(start, data[..., number], mask, text)
            if self.launch.races:
                self.memory.check_agreement(start, data[..., number], mask, text)

    def load_shared(
        self, addresses: np.ndarray, size: int, mask: np.ndarray | None, text: str
    ) -> np.ndarray:
        """Loads ``size`` bytes for each thread, as one element or as a last axis of several."""
        offsets = self.shared.locate(addresses, size, mask, text)
        self.shared.note_read(offsets, size, mask, text)
        if size <= 16:
            return self.shared.gather(offsets, size)
        units = [self.shared.gather(offsets + first, 16) for first in range(0, size, 16)]
        return np.stack(units, -1)

    def store_shared(
        self, addresses: np.ndarray, data: np.ndarray, mask: np.ndarray | None, text: str
    ) -> None:
        """Stores the units along the last axis of the data one after the other."""
        unit, count = data.dtype.itemsize, data.shape[-1]
        offsets = self.shared.locate(addresses, unit * count, mask, text)
        self.shared.note_write(offsets, unit * count, mask, text, data=data)
        for number in range(count):
            self.shared.scatter(offsets + unit * number, data[..., number], mask)
            if self.launch.races:
                self.shared.check_agreement(offsets + unit * number, data[..., number], mask, text)

    def warps_of_rows(self, count: int) -> np.ndarray:
        """Returns ``[1, rows]``, the warp that accesses each row, ``count`` rows a warp."""
        return np.repeat(np.arange(self.threads // 32), count)[None, :]

    def start_copy(
        self,
        target: np.ndarray,
        begin: np.ndarray,
        size: int,
        sizes: np.ndarray,
        mask: np.ndarray | None,
        text: str,
    ) -> None:
        """Begins copies of ``size`` bytes: ``sizes`` come from memory, the rest is 0."""
        offsets = self.shared.locate(target, size, mask, text)
        self.shared.note_write(offsets, size, mask, text, stage="issue")
        data = np.zeros((1, 1), BYTES[size])
        wanted = chosen(sizes, mask)
        counts = {size} if np.count_nonzero(wanted == size) else set()
        if np.count_nonzero((wanted != 0) & (wanted != size)):
            counts.update(np.unique(wanted[wanted != 0]).tolist())
        for count in sorted(counts):
            if count > size:
                raise PTXError(f"an asynchronous copy reads more than it writes: {text}")
            reading: np.ndarray | None = sizes == count
            if mask is not None:
                reading = reading & mask
            if np.count_nonzero(reading) == reading.size:
                reading = None
            data = self._copied(begin, size, count, reading, data, text)
        self._copies.append(_Copies(offsets, data, mask, np.full((1, 1), -1, np.int32), text))

    def _copied(
        self,
        begin: np.ndarray,
        size: int,
        count: int,
        reading: np.ndarray | None,
        data: np.ndarray,
        text: str,
    ) -> np.ndarray:
        if count == size:
            read = self.load_global(begin, size, reading, text)
        else:
            # Aligned for the whole vector, in bounds for the part that is read.
            if (chosen(begin, reading) % size).any():
                raise PTXError(f"misaligned {size}-byte access: {text}")
            parts = [self.load_global(begin + byte, 1, reading, text) for byte in range(count)]
            whole = np.zeros((*parts[0].shape, size), np.uint8)
            whole[..., :count] = np.stack(parts, -1)
            read = whole.view(BYTES[size])[..., 0]
        return read if reading is None else np.where(reading, read, data)

    def commit_copies(self, mask: np.ndarray | None) -> None:
        """Gives the copies that threads have begun since their last commit a group."""
        for copies in self._copies:
            if copies.group.size == 1 and mask is None:
                if copies.group[0, 0] < 0:
                    copies.group = self._copy_group
            else:
                fresh = copies.group < 0
                if mask is not None:
                    fresh = fresh & mask
                copies.group = np.where(fresh, self._copy_group, copies.group)
        self._copy_group = self._copy_group + np.int32(1) * (True if mask is None else mask)

    def wait_for_copies(self, pending: int | None, mask: np.ndarray | None, text: str) -> None:
        """Lets copies land; all for None, else all but those of the last ``pending`` groups."""
        remaining = []
        for copies in self._copies:
            if pending is None:
                landed = np.ones((1, 1), bool)
            else:
                landed = (copies.group >= 0) & (copies.group < self._copy_group - pending)
            if mask is not None:
                landed = landed & mask
            if not landed.any():
                remaining.append(copies)
                continue
            if landed.all():
                self._land(copies, copies.mask)
                continue
            if copies.mask is not None:
                landed = landed & copies.mask
            if landed.any():
                self._land(copies, landed)
            left = ~landed if copies.mask is None else copies.mask & ~landed
            if left.any():
                copies.mask = left
                remaining.append(copies)
        self._copies = remaining

    def _land(self, copies: _Copies, mask: np.ndarray | None) -> None:
        size = copies.data.dtype.itemsize
        self.shared.note_write(copies.offsets, size, mask, copies.text, stage="landing")
        self.shared.scatter(copies.offsets, copies.data, mask)

    # Control.

    def execute(self, others: list[Run]) -> None:
        """Runs until every thread has ended.

        Args:
            others: Gets the runs that this splits off.
        """
        blocks = self.launch.translation.blocks
        end = len(blocks)
        while self.place < end:
            if self._divergence is not None:
                if not self._step_diverged(blocks):
                    break
                continue
            block = blocks[self.place]
            self._execute_block(block)
            self._count(block)
            control = block.control
            if control is None:
                self.place += 1
            elif control.guard is None:
                self._obey(block)
            else:
                self._branch(block, others)
        if self.warp_races is not None:
            self.warp_races.pass_barrier()

    def _pass_barrier(self, rows: np.ndarray | None = None) -> None:
        self.shared.pass_barrier(rows)
        if self.warp_races is not None:
            self.warp_races.pass_barrier(rows)

    def _execute_block(self, block: Block) -> None:
        try:
            block.function(self, self.registers)
        except PTXError:
            raise
        except Exception as error:
            raise PTXError(_explain(error, block)) from error

    def _count(self, block: Block) -> None:
        self.steps += block.steps
        if self.steps > _MAX_STEPS:
            raise PTXError(f"still running after {self.steps} instructions: an endless loop?")

    def _guard(self, operation: Operation) -> np.ndarray:
        assert operation.guard is not None
        predicate = self.registers[operation.guard]
        return ~predicate if operation.negated else predicate

    def _obey(self, block: Block) -> None:
        """Executes the control operation of a block for all threads."""
        assert block.control is not None
        opcode = block.control.instruction.opcode
        if opcode == "bra":
            assert block.target is not None
            self.place = block.target
        elif opcode in ("ret", "exit"):
            self.place = len(self.launch.translation.blocks)
        else:
            _check_barrier(block.control)
            self._pass_barrier()
            self.place += 1

    def _branch(self, block: Block, others: list[Run]) -> None:
        """Executes the guarded control operation of a block."""
        assert block.control is not None
        taken = self._guard(block.control)
        count = np.count_nonzero(taken)
        if count == 0:
            self.place += 1
            return
        if count == taken.size:
            self._obey(block)
            return
        rows = taken.all(1)
        if len(taken) == self.blocks and (rows == taken.any(1)).all():
            other = self._select(~rows)
            other.place = self.place + 1
            others.append(other)
            part = self._select(rows)
            part.steps = self.steps
            self.__dict__.update(part.__dict__)
            self._obey(block)
            return
        taken = np.broadcast_to(taken, (len(taken), self.threads))
        self._divergence = _Divergence(
            np.full(taken.shape, self.place),
            np.ones(taken.shape, bool),
            np.zeros(taken.shape, bool),
        )
        self._control_diverged(block, np.ones(taken.shape, bool), taken)

    def _select(self, rows: np.ndarray) -> Run:
        """Returns a run of some of the blocks that goes on from here."""
        other = object.__new__(Run)
        other.__dict__.update(self.__dict__)
        blocks = self.blocks

        def part(array: np.ndarray | None) -> np.ndarray | None:
            return array if array is None or len(array) != blocks else array[rows]

        other.steps = 0
        other.block_ids = self.block_ids[rows]
        other.registers = [part(each) for each in self.registers]  # type: ignore[misc]
        other.shared = self.shared.select(rows)
        if self.warp_races is not None:
            other.warp_races = self.warp_races.select(rows)
        other._copy_group = part(self._copy_group)  # type: ignore[assignment]
        other._copies = [
            _Copies(
                *(part(each) for each in (copies.offsets, copies.data, copies.mask, copies.group)),  # type: ignore[arg-type]
                copies.text,
            )
            for copies in self._copies
        ]
        other.products = self.products.select(rows, blocks)
        return other

    def execute_guarded(self, operation: Operation) -> None:
        """Executes an operation for the threads whose guard is set."""
        mask = self._guard(operation)
        count = np.count_nonzero(mask)
        if count:
            self._execute_masked(operation, None if count == mask.size else mask)

    def _execute_masked(self, operation: Operation, mask: np.ndarray | None) -> None:
        if operation.effect is not None:
            operation.effect(self, mask)
            return
        function = single(operation)
        if mask is None:
            function(self.registers)
            return
        before = {entry: self.registers[entry] for entry in operation.targets}
        function(self.registers)
        for entry, old in before.items():
            new = self.registers[entry]
            self.registers[entry] = old
            self.set(entry, new, mask)

    def _step_diverged(self, blocks: list[Block]) -> bool:
        """Executes one block for the threads that are farthest behind; False at the end."""
        state = self._divergence
        assert state is not None
        running = state.live & ~state.waiting
        if not running.any():
            if not state.live.any():
                return False
            self._release()
            return True
        place = int(state.places[running].min())
        mask = running & (state.places == place)
        if place >= len(blocks):
            state.live = state.live & ~mask
            return True
        if mask.all():
            self._divergence, self.place = None, place
            return True
        block = blocks[place]
        self._count(block)
        for operation in block.operations:
            active = mask if operation.guard is None else mask & self._guard(operation)
            if active.any():
                try:
                    self._execute_masked(operation, active)
                except PTXError:
                    raise
                except Exception as error:
                    text = operation.instruction.text
                    raise PTXError(f"{type(error).__name__} ({error}) in: {text}") from error
        taken = mask
        if block.control is not None and block.control.guard is not None:
            taken = mask & self._guard(block.control)
        state.places = np.where(mask, place, state.places)
        self._control_diverged(block, mask, taken)
        return True

    def _control_diverged(self, block: Block, mask: np.ndarray, taken: np.ndarray) -> None:
        """Moves the threads in the mask on from a block, whose control some of them take."""
        state = self._divergence
        assert state is not None
        if len(taken) > len(state.places):
            state.blocks(len(taken))
        if block.control is None:
            state.places = np.where(mask, state.places + 1, state.places)
            return
        opcode = block.control.instruction.opcode
        if opcode == "bra":
            state.places = np.where(
                taken, block.target, np.where(mask, state.places + 1, state.places)
            )
        elif opcode in ("ret", "exit"):
            state.places = np.where(mask, state.places + 1, state.places)
            state.live = state.live & ~taken
            self._release()
        else:
            _check_barrier(block.control)
            state.places = np.where(mask, state.places + 1, state.places)
            state.waiting = state.waiting | taken
            self._release()

    def _release(self) -> None:
        """Lets blocks go on of which every thread waits at the same barrier."""
        state = self._divergence
        assert state is not None
        shape = np.broadcast_shapes(state.places.shape, state.live.shape, state.waiting.shape)
        places, live, waiting = (
            np.broadcast_to(each, shape) for each in (state.places, state.live, state.waiting)
        )
        arrived = (waiting | ~live).all(1) & (waiting & live).any(1)
        if not arrived.any():
            return
        if not live[arrived].all():
            raise PTXError("divergent barrier: some threads of the block have ended")
        if (places[arrived] != places[arrived][:, :1]).any():
            raise PTXError("divergent barrier: threads of a block wait at different barriers")
        state.waiting = waiting & ~arrived[:, None]
        everyone = arrived.all()
        self._pass_barrier(None if everyone else np.broadcast_to(arrived, (self.blocks,)))


def _check_barrier(operation: Operation) -> None:
    it = operation.instruction
    if "sync" not in it.modifiers or len(it.operands) > 1 or "red" in it.modifiers:
        raise PTXError(f"not supported: {it.text}")


def _explain(error: Exception, block: Block) -> str:
    """Names the instruction whose source raised an error."""
    what = f"{type(error).__name__} ({error})"
    code = block.function.__code__  # type: ignore[attr-defined]
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == code.co_filename and frame.lineno is not None:
            number = frame.lineno - code.co_firstlineno - 1
            return f"{what} in: {block.operations[number].instruction.text}"
    return what
