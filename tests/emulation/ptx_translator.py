"""Translates parsed PTX into Python functions on numpy arrays, one for each basic block.

Registers are the entries of one list, arrays ``[blocks or 1, threads or 1]`` of raw bits: what is
the same for all blocks or for all threads is kept and computed once. Constants, special registers
and parameters are further entries. Arrays are never changed in place, so entries may share one.

An instruction that only computes becomes a line of source such as ``R[7] = R[3] + R[5]``; one that
touches memory or other threads becomes a call of an effect, a function of the run and of the mask
of the threads that take part.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ptx_types
from .ptx_parser import Address, Immediate, Instruction, Operand, Parameter, Program, Register
from .ptx_types import FLOATS, PAIRS, SIGNED, UNSIGNED, WIDTH, PTXError, encode, is_float

if TYPE_CHECKING:
    from .ptx_machine import Run

__all__ = [
    "EFFECTS",
    "SOURCES",
    "Block",
    "Effect",
    "Operation",
    "Translation",
    "Translator",
    "effect",
    "source",
    "translate",
]

Effect = Callable[["Run", "np.ndarray | None"], None]
"""Executes an instruction for the threads in the mask, or for all where it is None."""

_CONTROL = ("bra", "ret", "exit", "bar", "barrier")

SOURCES: dict[str, Callable[[Translator, Instruction], list[str]]] = {}
"""By opcode: what writes the statements of an instruction that only computes."""

EFFECTS: dict[str, Callable[[Translator, Instruction], Effect]] = {}
"""By opcode: what makes the effect of another instruction."""


def source(*opcodes: str) -> Callable[[Any], Any]:
    """Registers a function as the one that writes the source of some opcodes."""

    def register(function: Any) -> Any:
        SOURCES.update(dict.fromkeys(opcodes, function))
        return function

    return register


def effect(*opcodes: str) -> Callable[[Any], Any]:
    """Registers a function as the one that makes the effect of some opcodes."""

    def register(function: Any) -> Any:
        EFFECTS.update(dict.fromkeys(opcodes, function))
        return function

    return register


@dataclass
class Operation:
    """An instruction, translated.

    Attributes:
        instruction: What it came from.
        guard: Entry of the predicate, or None.
        effect: Its effect, or None if it only computes or is control.
        statements: Its source, if it only computes.
        reads: Entries that it reads.
        targets: Entries that it writes.
        error: What executing it raises, if it is not supported.
        single: The source as a function of the registers, once it was needed.
    """

    instruction: Instruction
    guard: int | None = None
    effect: Effect | None = None
    statements: list[str] = field(default_factory=list)
    reads: frozenset[int] = frozenset()
    targets: frozenset[int] = frozenset()
    error: PTXError | None = None
    single: Callable[[list[Any]], None] | None = None

    @property
    def negated(self) -> bool:
        """Whether the guard is negated."""
        return self.instruction.negated


@dataclass
class Block:
    """A basic block: everything in it is executed, then the control operation, if there is one.

    Attributes:
        operations: Without the control operation.
        function: All of them, given the run and its registers.
        control: Branch, return or barrier that ends it, or None.
        target: Number of the block that a branch leads to.
    """

    operations: list[Operation]
    function: Callable[[Run, list[Any]], None]
    control: Operation | None
    target: int | None

    @property
    def steps(self) -> int:
        """Instructions in it."""
        return len(self.operations) + (self.control is not None)


@dataclass
class Translation:
    """A program that can be run.

    Attributes:
        program: What it came from.
        blocks: In order; the one behind the last means the end.
        initial: What each register holds in the beginning: undefined bits, or a constant.
        special: Entries of special registers, by name.
        parameters: (entry, offset, bits) of the parameters that are read.
        granule: Bytes of the smallest access to shared memory.
        proxies: Whether something reads shared memory through the asynchronous proxy.
        constants: Whether something reads global memory as what does not change.
        source: The Python source of all blocks.
    """

    program: Program
    blocks: list[Block]
    initial: list[np.ndarray]
    special: dict[str, int]
    parameters: list[tuple[int, int, int]]
    granule: int
    proxies: bool
    constants: bool
    source: str


class Translator:
    """Gives entries to operands and writes the source that reads and writes them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.initial: list[np.ndarray] = []
        self.special: dict[str, int] = {}
        self.parameters: list[tuple[int, int, int]] = []
        self.granule = 16
        self.proxies = False
        self.constants = False
        self.read: set[int] = set()
        self.written: set[int] = set()
        self._entries: dict[str, int] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._parameter_entries: dict[tuple[int, int], int] = {}

    # Entries.

    def _new(self, value: np.ndarray) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    def register(self, operand: Operand) -> int:
        """Returns the entry of a register that is written."""
        if not isinstance(operand, Register) or operand.name not in self.program.register_widths:
            raise PTXError(f"not a register: {operand}")
        entry = self._register(operand.name)
        self.written.add(entry)
        return entry

    def _register(self, name: str) -> int:
        if name not in self._entries:
            dtype = UNSIGNED[self.program.register_widths[name]]
            # NaN as a float, true as a predicate, a wild address as an integer.
            undefined = np.full((1, 1), np.iinfo(dtype).max if dtype != np.bool_ else True, dtype)
            self._entries[name] = self._new(undefined)
        return self._entries[name]

    def constant(self, bits: int, width: int) -> int:
        """Returns the entry of a constant."""
        if width > 1:
            bits &= (1 << width) - 1
        if (bits, width) not in self._constants:
            self._constants[bits, width] = self._new(np.full((1, 1), bits, UNSIGNED[width]))
        return self._constants[bits, width]

    def parameter(self, operand: Parameter, width: int) -> int:
        """Returns the entry of a parameter of the kernel."""
        if operand.name not in self.program.parameter_offsets:
            raise PTXError(f"there is no parameter {operand.name}")
        key = (self.program.parameter_offsets[operand.name] + operand.offset, width)
        if key not in self._parameter_entries:
            entry = self._new(np.zeros((1, 1), UNSIGNED[width]))
            self._parameter_entries[key] = entry
            self.parameters.append((entry, *key))
        return self._parameter_entries[key]

    def width_of(self, operand: Operand) -> int:
        """Returns the bits of a register, or 0 for anything else."""
        if isinstance(operand, Register):
            return self.program.register_widths.get(operand.name, 0)
        return 0

    def is_sink(self, operand: Operand) -> bool:
        """Returns whether the operand is ``_``, where results are thrown away."""
        return isinstance(operand, Register) and operand.name == "_"

    # Reading.

    def entry(self, operand: Operand, kind: str) -> tuple[int, int]:
        """Returns the entry of an operand that is read, and its bits."""
        entry, width = self._entry(operand, kind)
        self.read.add(entry)
        return entry, width

    def _entry(self, operand: Operand, kind: str) -> tuple[int, int]:
        if isinstance(operand, Register):
            name = operand.name
            if name in self.program.register_widths:
                return self._register(name), self.program.register_widths[name]
            if name.startswith("%"):
                if name not in self.special:
                    self.special[name] = self._new(np.zeros((1, 1), np.uint32))
                return self.special[name], 32
            for symbols in (self.program.shared_offsets, self.program.parameter_offsets):
                if name in symbols:
                    return self.constant(symbols[name], WIDTH[kind]), WIDTH[kind]
            raise PTXError(f"operand not understood: {name}")
        if isinstance(operand, Immediate):
            return self._immediate(operand, kind), WIDTH[kind]
        raise PTXError(f"operand not understood: {operand}")

    def _immediate(self, operand: Immediate, kind: str) -> int:
        value, width = operand.value, WIDTH[kind]
        if isinstance(value, float):
            if not is_float(kind):
                kind = {16: "f16", 32: "f32", 64: "f64"}[width]
            with np.errstate(all="ignore"):
                bits = encode(np.full((1, 1), value, np.float64), kind)
            return self.constant(int(bits[0, 0]), width)
        if operand.is_bits and width == 64:
            exact = np.full((1, 1), value, np.uint32).view(np.float32)
            return self.constant(int(encode(exact, "f64")[0, 0]), width)
        return self.constant(bool(value) if width == 1 else int(value), width)

    def bits(self, operand: Operand, kind: str) -> str:
        """Returns the source of an operand's raw bits in the width of a type."""
        if isinstance(operand, Register) and operand.name.startswith("!"):
            return f"(~{self.bits(Register(operand.name[1:]), kind)})"
        entry, width = self.entry(operand, kind)
        if width == WIDTH[kind]:
            return f"R[{entry}]"
        return f"R[{entry}].astype({UNSIGNED[WIDTH[kind]].__name__})"

    def values(self, operand: Operand, kind: str) -> str:
        """Returns the source of an operand's values."""
        bits = self.bits(operand, kind)
        if kind in ("f32", "f64", "tf32"):
            return f"{bits}.view({'float64' if kind == 'f64' else 'float32'})"
        if kind == "f16":
            return f"float16_to_float32({bits})"
        if kind == "bf16":
            return f"bfloat16_to_float32({bits})"
        if kind in PAIRS:
            return f"unpack({bits}, {kind!r})"
        if kind[0] == "s":
            return f"{bits}.view({SIGNED[WIDTH[kind]].__name__})"
        return bits

    def reader(self, operand: Operand, kind: str) -> Callable[[list[Any]], np.ndarray]:
        """Returns a function that reads the raw bits of an operand from the registers."""
        if isinstance(operand, Register) and operand.name.startswith("!"):
            read = self.reader(Register(operand.name[1:]), kind)
            return lambda registers: ~read(registers)
        entry, width = self.entry(operand, kind)
        if width == WIDTH[kind]:
            return lambda registers: registers[entry]
        dtype = UNSIGNED[WIDTH[kind]]
        return lambda registers: registers[entry].astype(dtype)

    def addresses(self, operand: Operand) -> Callable[[list[Any]], np.ndarray]:
        """Returns a function that reads ``[base + offset]`` as int64."""
        if not isinstance(operand, Address):
            raise PTXError(f"address not understood: {operand}")
        offset = operand.offset
        if operand.base is None:
            constant = np.full((1, 1), offset, np.int64)
            return lambda registers: constant
        entry, width = self.entry(operand.base, "b64")
        if width == 64:
            return lambda registers: registers[entry].view(np.int64) + offset
        return lambda registers: registers[entry].astype(np.int64) + offset

    # Writing.

    def assign(self, target: Operand, text: str, width: int, *, signed: bool = False) -> list[str]:
        """Returns the statement that writes raw bits of some width into a register.

        A register that is wider gets zeros, or copies of the sign.
        """
        if self.is_sink(target):
            return []
        own = self.program.register_widths[target.name]  # type: ignore[union-attr]
        if own != width:
            if signed and own > width:
                text = f"{text}.view({SIGNED[width].__name__})"
            text = f"{text}.astype({UNSIGNED[own].__name__})"
        return [f"R[{self.register(target)}] = {text}"]

    def assign_values(self, target: Operand, text: str, kind: str) -> list[str]:
        """Returns the statement that rounds values to a type and writes them.

        The values must be of the numpy type of :func:`.ptx_types.decode`.
        """
        if (is_float(kind) and kind not in FLOATS) or kind in PAIRS:
            text = f"encode({text}, {kind!r})"
        elif kind in FLOATS or kind[0] == "s":
            text = f"{text}.view({UNSIGNED[WIDTH[kind]].__name__})"
        return self.assign(target, text, WIDTH[kind])


def unsupported(instruction: Instruction) -> PTXError:
    """The error for a form of an instruction that nothing here executes."""
    return PTXError(f"not supported: {instruction.text}")


def _raising(error: PTXError) -> Effect:
    def fail(run: Run, mask: np.ndarray | None) -> None:
        raise error

    return fail


def _translate_one(translator: Translator, it: Instruction) -> Operation:
    operation = Operation(it)
    translator.read, translator.written = set(), set()
    if it.guard is not None:
        operation.guard, _ = translator.entry(Register(it.guard), "pred")
    if it.opcode in _CONTROL and not (it.opcode in ("bar", "barrier") and "warp" in it.modifiers):
        operation.reads = frozenset(translator.read)
        return operation
    try:
        if it.opcode in SOURCES:
            operation.statements = SOURCES[it.opcode](translator, it)
        elif it.opcode in EFFECTS:
            operation.effect = EFFECTS[it.opcode](translator, it)
        else:
            raise unsupported(it)
    except PTXError as error:
        text = str(error)
        operation.error = error if it.text in text else PTXError(f"{text}: {it.text}")
    except Exception as error:
        message = f"not supported ({type(error).__name__}: {error}): {it.text}"
        operation.error = PTXError(message)
    if operation.error is not None:
        # Only an error if it is executed.
        operation.effect = _raising(operation.error)
    operation.reads = frozenset(translator.read)
    operation.targets = frozenset(translator.written)
    return operation


_numbers = count()


def translate(program: Program) -> Translation:
    """Translates a program."""
    translator = Translator(program)
    operations = [_translate_one(translator, it) for it in program.instructions]
    first_of_block = sorted(
        {0, len(operations)}
        | set(program.labels.values())
        | {index + 1 for index, operation in enumerate(operations) if _is_control(operation)}
    )
    number = {first: index for index, first in enumerate(first_of_block)}
    name = f"<PTX {program.name} {next(_numbers)}>"
    lines: list[str] = []
    bounds = list(pairwise(first_of_block))
    namespace = dict(_NAMESPACE)
    temporaries = _temporaries(operations, bounds)
    for index, (first, last) in enumerate(bounds):
        lines.append(f"def b{index}(run, R):")
        body = operations[first:last]
        if body and _is_control(body[-1]):
            body = body[:-1]
        for offset, operation in enumerate(body):
            lines.append(_line(operation, first + offset, namespace, temporaries))
        if not body:
            lines.append("    pass")
    text = "\n".join(lines) + "\n"
    exec(compile(text, name, "exec"), namespace)
    # For tracebacks.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    blocks = []
    for index, (first, last) in enumerate(bounds):
        body, control, target = operations[first:last], None, None
        if body and _is_control(body[-1]):
            control = body.pop()
            if control.instruction.opcode == "bra":
                target = number[program.labels[_label(control.instruction)]]
        blocks.append(Block(body, namespace[f"b{index}"], control, target))
    return Translation(
        program,
        blocks,
        translator.initial,
        translator.special,
        translator.parameters,
        translator.granule,
        translator.proxies,
        translator.constants,
        text,
    )


def _label(it: Instruction) -> str:
    (operand,) = it.operands[0]
    return operand.name if isinstance(operand, Register) else str(operand)


def _is_control(operation: Operation) -> bool:
    return operation.effect is None and operation.instruction.opcode in _CONTROL


def _line(
    operation: Operation,
    index: int,
    namespace: dict[str, Any],
    temporaries: dict[int, list[int]],
) -> str:
    """Returns the source of an operation in its block, on one line."""
    if operation.guard is not None:
        namespace[f"o{index}"] = operation
        parts = [f"run.execute_guarded(o{index})"]
    elif operation.effect is not None:
        namespace[f"e{index}"] = operation.effect
        parts = [f"e{index}(run, None)"]
    else:
        parts = list(operation.statements)
    parts += [f"R[{entry}] = None" for entry in temporaries.get(index, ())]
    return "    " + ("; ".join(parts) or "pass")


def _temporaries(
    operations: list[Operation], bounds: list[tuple[int, int]]
) -> dict[int, list[int]]:
    """Finds, for each operation, the registers that nothing reads after it.

    Only those that live within one basic block are found; forgetting them keeps memory hot.
    """
    blocks: dict[int, set[int]] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for block, (begin, end) in enumerate(bounds):
        for index in range(begin, end):
            for entry in operations[index].reads | operations[index].targets:
                blocks.setdefault(entry, set()).add(block)
                first.setdefault(entry, index)
                last[entry] = index
    found: dict[int, list[int]] = {}
    for entry, where in blocks.items():
        operation = operations[first[entry]]
        defined = (
            entry in operation.targets and entry not in operation.reads and operation.guard is None
        )
        if len(where) == 1 and defined and not _is_control(operations[last[entry]]):
            found.setdefault(last[entry], []).append(entry)
    return found


def single(operation: Operation) -> Callable[[list[Any]], None]:
    """Returns the source of one operation as a function of the registers."""
    if operation.single is None:
        namespace = dict(_NAMESPACE)
        body = "; ".join(operation.statements) or "pass"
        exec(f"def single(R): {body}\n", namespace)
        operation.single = namespace["single"]
    assert operation.single is not None
    return operation.single


_NAMESPACE: dict[str, Any] = {
    **{dtype.__name__: dtype for dtype in (*UNSIGNED.values(), *SIGNED.values())},
    **{name: getattr(np, name) for name in ("float32", "float64", "where")},
    **{name: getattr(ptx_types, name) for name in ptx_types.__all__},
}


def provide(function: Any) -> Any:
    """Makes a function available to the source."""
    _NAMESPACE[function.__name__] = function
    return function
