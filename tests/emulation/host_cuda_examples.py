"""The launchers of ``cuda/examples.cu``, on which the emulation is tested."""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cuda_library
from .cuda_library import Library, Operands, SanitizedLibrary

__all__ = [
    "EXAMPLES",
    "PATH",
    "Answer",
    "Bug",
    "Case",
    "Doubling",
    "Product",
    "Query",
    "Sizes",
    "Swap",
    "case",
    "poisoned",
    "product_case",
    "together",
]

PATH = "tests/emulation/cuda/examples.cu"
EXAMPLES = [cuda_library.ROOT / PATH]

_Int = ctypes.c_int32
_Pointer = ctypes.c_void_p


class Reverse(Operands):
    _fields_ = (("x", _Pointer), ("y", _Pointer), ("count", _Int))


class RowSums(Operands):
    _fields_ = (("x", _Pointer), ("y", _Pointer), ("rows", _Int), ("columns", _Int))


class Product(Operands):
    _fields_ = (
        ("dtype", _Int),
        ("a", _Pointer),
        ("b", _Pointer),
        ("partials", _Pointer),
        ("c", _Pointer),
        ("rows", _Int),
        ("depth", _Int),
        ("columns", _Int),
        ("parts", _Int),
    )


class Doubling(Operands):
    _fields_ = (("x", _Pointer), ("y", _Pointer), ("vectors", _Int))


class Query(Operands):
    _fields_ = (("device", _Int),)


class Answer(Operands):
    _fields_ = tuple(
        (name, _Int)
        for name in ("devices", "selected", "architecture", "multiprocessors", "shared_bytes")
    )


class Swap(Operands):
    _fields_ = (("x", _Pointer), ("y", _Pointer))


class Sizes(Operands):
    _fields_ = (("threads", _Int), ("shared_bytes", _Int))


@dataclass(frozen=True)
class Case:
    """A call of an example and what it has to compute.

    Attributes:
        name: The launcher.
        operands: What it is given; the output holds NaN.
        output: The output.
        expected: Computed by torch in float64.
        magnitude: Sum of the absolute products, and
        length: their number, for the tolerance.
    """

    name: str
    operands: Operands
    output: Tensor
    expected: Tensor
    magnitude: Tensor
    length: int

    def run(self, library: Library | SanitizedLibrary) -> Tensor:
        """Returns the output, poisoned before."""
        self.output.fill_(torch.nan)
        library.call(f"example_{self.name}", self.operands)
        return self.output


@dataclass(frozen=True)
class Bug:
    """A fault of an example.

    Attributes:
        name: Says what is wrong.
        example: The launcher whose kernel has it.
        old: Text of ``examples.cu``, there once.
        new: What the fault makes of it.
        message: Regular expression for the error that must be raised; None where the output must
            be wrong.
    """

    name: str
    example: str
    old: str
    new: str
    message: str | None = None

    def __str__(self) -> str:
        return self.name


def together(bugs: Sequence[Bug]) -> dict[Bug, dict[str, str]]:
    """Returns the mutations in which each bug is planted.

    Bugs of different examples share them, as long as none of an example is planted twice: fewer
    libraries have to be compiled.
    """
    source = cuda_library.ROOT.joinpath(PATH).read_text(encoding="utf-8")
    texts: dict[int, str] = defaultdict(lambda: source)
    turns: dict[str, int] = defaultdict(int)
    turn_of = {}
    for bug in bugs:
        # Raises where the text is not there once.
        cuda_library.mutation(PATH, bug.old, bug.new)
        turn = turn_of[bug] = turns[bug.example]
        turns[bug.example] += 1
        texts[turn] = texts[turn].replace(bug.old, bug.new)
    return {bug: {PATH: texts[turn]} for bug, turn in turn_of.items()}


def poisoned(*shape: int) -> Tensor:
    """Returns NaN."""
    return torch.full(shape, torch.nan)


def _reverse_case() -> Case:
    x = torch.randn(250)
    y = poisoned(250)
    expected = torch.cat([part.flip(0) for part in x.double().split(96)])
    return Case("reverse", Reverse(x=x, y=y, count=250), y, expected, expected.abs(), 1)


def _row_sums_case() -> Case:
    x = torch.randn(5, 301)
    y = poisoned(5)
    exact = x.double()
    operands = RowSums(x=x, y=y, rows=5, columns=301)
    return Case("row_sums", operands, y, exact.sum(1), exact.abs().sum(1), 301)


def product_case(
    rows: int = 37,
    depth: int = 136,
    columns: int = 40,
    parts: int = 2,
    dtype: torch.dtype = torch.float16,
) -> Case:
    """Returns a product of matrices, its reduction in parts."""
    a = torch.randn(rows, depth).to(dtype)
    b = torch.randn(depth, columns).to(dtype)
    c = poisoned(rows, columns)
    operands = Product(
        dtype=dtype,
        a=a,
        b=b,
        partials=poisoned(parts, rows, columns),
        c=c,
        rows=rows,
        depth=depth,
        columns=columns,
        parts=parts,
    )
    exact_a, exact_b = a.double(), b.double()
    return Case("product", operands, c, exact_a @ exact_b, exact_a.abs() @ exact_b.abs(), depth)


def _doubling_case(name: str = "doubling") -> Case:
    x = torch.randn(80)
    y = poisoned(80)
    expected = 2 * x.double()
    return Case(name, Doubling(x=x, y=y, vectors=20), y, expected, expected.abs(), 1)


def _swap_case() -> Case:
    x = torch.randn(64)
    y = poisoned(64)
    expected = x.double().view(32, 2).flip(1).flatten()
    return Case("swap", Swap(x=x, y=y), y, expected, expected.abs(), 1)


_CASES: dict[str, Callable[[], Case]] = {
    "reverse": _reverse_case,
    "row_sums": _row_sums_case,
    "product": product_case,
    "doubling": _doubling_case,
    "doubling_there": functools.partial(_doubling_case, "doubling_there"),
    "swap": _swap_case,
}


def case(name: str) -> Case:
    """Returns a call of an example."""
    return _CASES[name]()
