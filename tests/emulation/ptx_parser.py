"""Reads PTX into instructions whose operands are resolved once."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .ptx_types import WIDTH, PTXError

__all__ = ["Address", "Immediate", "Instruction", "Program", "Register", "parse"]


@dataclass(frozen=True)
class Register:
    """A register or special register, by a name that is unique in the program."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, a float, or the bits of a float32."""

    value: int | float
    is_bits: bool = False


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, or absent where the address is a constant."""

    base: Register | None
    offset: int


@dataclass(frozen=True)
class Parameter:
    """``[name + offset]`` of a kernel's parameters."""

    name: str
    offset: int


Operand = Register | Immediate | Address | Parameter | str


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        opcode: What comes before the first dot.
        modifiers: What comes between dots, the type last.
        operands: Each a list of one operand, or of those in braces.
        guard: Predicate register, or None.
        negated: Whether the guard is negated.
        text: The source, for messages.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: list[list[Operand]]
    guard: str | None
    negated: bool
    text: str

    @property
    def kind(self) -> str:
        """The last modifier, in most instructions the type."""
        return self.modifiers[-1]


@dataclass
class Program:
    """One kernel.

    Attributes:
        name: Of the entry.
        instructions: In order.
        labels: Index of the instruction behind each label.
        register_widths: Bits of each register.
        parameters: Bytes of each, in order.
        parameter_offsets: Where each begins in the memory of parameters, by its name.
        static_shared: Bytes of shared memory that the program declares, rounded up.
        shared_offsets: Where each shared variable begins.
        threads: Threads of a block if the program requires a number, or None.
        most_threads: The most threads of a block that the program is for, or None.
    """

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    register_widths: dict[str, int] = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)
    parameter_offsets: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    shared_offsets: dict[str, int] = field(default_factory=dict)
    threads: int | None = None
    most_threads: int | None = None

    @property
    def parameter_end(self) -> int:
        """Bytes of the memory of parameters."""
        if not self.parameters:
            return 0
        return max(self.parameter_offsets.values()) + self.parameters[-1]


_PARAMETER_ALIGNMENT = 16
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?"
    r"\s+([\w$]+)(?:\[(\d+)\])?$"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_DYNAMIC = re.compile(r"^\s*\.extern\s+\.shared\s+\.align\s+\d+\s+\.\w+\s+(\w+)\[\]", re.MULTILINE)
# A brace that is not within an instruction, a label, or an instruction.
_STATEMENT = re.compile(r"\s*(?:[{}]|[$%\w]+:(?!:)|[^;{}\s][^;]*;)")
_LABEL = re.compile(r"^([$%\w]+):\s*(?!:)")
_GUARD = re.compile(r"@(!?)([%$\w]+)\s+(.*)$", re.DOTALL)
_NAME = re.compile(r"[%$\w@.]+$")
_ADDRESS = re.compile(r"\[\s*([%$\w@.]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_DECIMAL = re.compile(r"-?\d*\.\d+([eE][-+]?\d+)?$")
_IGNORED = (".loc", ".pragma", ".file", ".section", ".branchtargets")


def parse(text: str, entry: str) -> Program:
    """Parses one kernel.

    Args:
        text: A PTX module.
        entry: The kernel's name.

    Raises:
        PTXError: There is no such kernel, or something in it is not understood.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    head = re.search(r"\.entry\s+" + re.escape(entry) + r"\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if head is None:
        raise PTXError(f"there is no entry {entry}")
    program = Program(entry)
    for declaration in head.group(1).split(","):
        if declaration.strip():
            _declare_parameter(program, declaration)
    program.threads = _threads("reqntid", head.group(2))
    program.most_threads = _threads("maxntid", head.group(2))
    for match in re.finditer(r"^\s*" + _SHARED.pattern + r"\s*;", text, re.MULTILINE):
        _declare_shared(program, *match.groups())
    dynamic = _DYNAMIC.findall(text)
    _Body(program, dynamic).read(_body(text, head.end()))
    program.static_shared = -(-program.static_shared // 128) * 128
    program.shared_offsets.update(dict.fromkeys(dynamic, program.static_shared))
    return program


def _threads(directive: str, text: str) -> int | None:
    """Returns the threads that a directive names, along all axes together."""
    match = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
    if match is None:
        return None
    return math.prod(int(each) for each in match.groups(default="1"))


def _declare_parameter(program: Program, declaration: str) -> None:
    match = _PARAMETER.match(declaration.strip())
    if match is None:
        raise PTXError(f"declaration not understood: {declaration}")
    kind, name, count = match.groups()
    # Each in a slot of its own, wide enough for any alignment.
    offset = sum(-(-size // _PARAMETER_ALIGNMENT) for size in program.parameters)
    program.parameter_offsets[name] = offset * _PARAMETER_ALIGNMENT
    program.parameters.append(WIDTH[kind] // 8 * int(count or 1))


def _declare_shared(program: Program, align: str, kind: str, name: str, count: str | None) -> None:
    if name in program.shared_offsets:
        return
    start = -(-program.static_shared // int(align)) * int(align)
    program.shared_offsets[name] = start
    program.static_shared = start + int(count or 1) * WIDTH[kind] // 8


def _body(text: str, start: int) -> str:
    """Returns the text from a place on, behind an opening brace, to the brace that closes it."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    raise PTXError("a brace is not closed")


def _statements(body: str) -> Iterator[str]:
    """Splits into statements, labels, and braces that open and close scopes."""
    place = 0
    for match in _STATEMENT.finditer(body):
        if match.start() != place:
            raise PTXError(f"not understood: {body[place : match.start()].strip()}")
        place = match.end()
        yield match.group().strip()
    if body[place:].strip():
        raise PTXError(f"not understood: {body[place:].strip()}")


def _split_operands(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return parts


class _Body:
    def __init__(self, program: Program, dynamic: Sequence[str]) -> None:
        self.program = program
        self.dynamic = dynamic
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0

    def read(self, body: str) -> None:
        for statement in _statements(body):
            if statement == "{":
                self.opened += 1
                self.scopes.append({})
            elif statement == "}":
                if len(self.scopes) > 1:
                    self.scopes.pop()
            else:
                self._statement(statement.rstrip(";").strip())

    def _statement(self, text: str) -> None:
        while (match := _LABEL.match(text)) is not None:
            self.program.labels[match.group(1)] = len(self.program.instructions)
            text = text[match.end() :]
        if not text or text.startswith(_IGNORED):
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            match = _SHARED.match(text)
            if match is None:
                raise PTXError(f"declaration not understood: {text}")
            _declare_shared(self.program, *match.groups())
        elif text.startswith("."):
            raise PTXError(f"directive not understood: {text}")
        else:
            self._instruction(text)

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s*(.*)", text, re.DOTALL)
        assert match is not None
        width = WIDTH[match.group(1)]
        for item in match.group(2).split(","):
            declared = re.match(r"([%$\w]+)(?:<(\d+)>)?", item.strip())
            assert declared is not None
            name, count = declared.groups()
            for each in [f"{name}{index}" for index in range(int(count))] if count else [name]:
                unique = each if len(self.scopes) == 1 else f"{each}@{self.opened}"
                self.scopes[-1][each] = unique
                self.program.register_widths[unique] = width

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _instruction(self, text: str) -> None:
        guard, negated = None, False
        match = _GUARD.match(text)
        body = text
        if match is not None:
            negated, guard, body = (
                match.group(1) == "!",
                self._resolve(match.group(2)),
                match.group(3),
            )
        opcode = re.match(r"[\w.:]+", body)
        if opcode is None:
            raise PTXError(f"not understood: {text}")
        name, *modifiers = opcode.group(0).replace("::", "_").split(".")
        operands = [
            [self._operand(part) for part in self._members(operand)]
            for operand in _split_operands(body[opcode.end() :].strip())
        ]
        # shfl.sync and setp may set a predicate beside the result: d|p.
        if operands and isinstance(operands[0][0], str) and "|" in operands[0][0]:
            operands[0] = [self._operand(part.strip()) for part in operands[0][0].split("|")]
        self.program.instructions.append(
            Instruction(name, tuple(modifiers), operands, guard, negated, text)
        )

    def _members(self, operand: str) -> list[str]:
        if operand.startswith("{"):
            return [part.strip() for part in operand.strip("{} ").split(",")]
        return [operand]

    def _operand(self, text: str) -> Operand:
        match = _ADDRESS.match(text)
        if match is not None:
            name, offset = match.group(1), int(match.group(2) or "0", 0)
            resolved = self._resolve(name)
            if resolved in self.program.register_widths or resolved in self.dynamic:
                return Address(Register(resolved), offset)
            if resolved in self.program.shared_offsets:
                return Address(Register(resolved), offset)
            if _INTEGER.match(name):
                return Address(None, int(name, 0) + offset)
            return Parameter(name, offset)
        if text[:2] in ("0f", "0F") and len(text) == 10:
            return Immediate(int(text[2:], 16), is_bits=True)
        if text[:2] in ("0d", "0D") and len(text) == 18:
            return Immediate(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if _DECIMAL.match(text):
            return Immediate(float(text))
        if text.startswith("!"):
            return Register("!" + self._resolve(text[1:].strip()))
        return Register(self._resolve(text)) if _NAME.match(text) else text
