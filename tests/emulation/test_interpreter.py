"""Triton's interpreter as the tests use it: honest, bounded, and leaving nothing behind."""

from __future__ import annotations

import sys

import pytest
import torch
from tolerance import dot_bound

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from emulation import example_kernels
from emulation.driver import emulated
from emulation.example_kernels import matmul_kernel
from emulation.interpreter import interpreted

THIS = sys.modules[__name__]


@triton.jit
def doubled(x):
    """A function that kernels call."""
    return x + x


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, size, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.load(x_ptr + i, mask=mask, other=0.0)
    y = tl.load(y_ptr + i, mask=mask, other=0.0)
    if WHAT == "add":
        result = x + y
    elif WHAT == "subtract":
        result = x - y
    elif WHAT == "multiply":
        result = x * y
    elif WHAT == "maximum":
        result = tl.maximum(x, y)
    elif WHAT == "maximum with NaN":
        result = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif WHAT == "minimum":
        result = tl.minimum(x, y)
    elif WHAT == "less":
        result = tl.where(x < y, 1.0, 0.0)
    elif WHAT == "constant":
        result = x + tl.full((BLOCK,), 1.5, x.dtype)
    elif WHAT == "fused":
        result = tl.fma(x, y, x)
    elif WHAT == "absolute":
        result = tl.abs(x)
    elif WHAT == "negative":
        result = -x
    elif WHAT == "doubled":
        result = doubled(x)
    else:
        result = x
    tl.store(out_ptr + i, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduction_kernel(x_ptr, out_ptr, WHAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    if WHAT == "sum":
        result = tl.sum(x, 1)
    elif WHAT == "max":
        result = tl.max(x, 1)
    else:
        result = tl.min(x, 1)
    tl.store(out_ptr + tl.arange(0, ROWS), result)


@triton.jit
def access_kernel(x_ptr, out_ptr, size, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < (BLOCK if not WRITE else size))
    tl.store(out_ptr + i, x, mask=i < (size if not WRITE else BLOCK))


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Uses what a masked load without ``other`` returns beside its mask."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size))


def numbers(count: int, *, special: bool = True, seed: int = 0) -> torch.Tensor:
    """float32 of many sizes, halfway between two bfloat16, and NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 2.0 ** torch.randint(
        -4, 5, (count,), generator=generator
    )
    ties = torch.arange(16, dtype=torch.int32) * 0x10000 + 0x3F808000
    x[:16] = ties.view(torch.float32) * torch.tensor([1.0, -1.0]).repeat(8)
    if special:
        x[16:22] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.3e38])
    return x


def run(
    what: str, x: torch.Tensor, y: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    out = torch.full((len(x),), 77).to(dtype or x.dtype)
    arithmetic_kernel[(2,)](x, x if y is None else y, out, len(x), what, BLOCK=64)
    return out


EXPECTED = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "maximum": torch.fmax,
    "maximum with NaN": torch.maximum,
    "minimum": torch.fmin,
    "less": lambda x, y: x < y,
    "constant": lambda x, y: x + 1.5,
    "fused": lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype),
    "absolute": lambda x, y: x.abs(),
    "negative": lambda x, y: -x,
    "doubled": lambda x, y: x + x,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("what", EXPECTED)
def test_arithmetic(what: str, dtype: torch.dtype) -> None:
    """As PyTorch's, which rounds to nearest, ties to even."""
    x, y = numbers(100).to(dtype), numbers(100, seed=1).flip(0).to(dtype)
    with interpreted(THIS):
        actual = run(what, x, y)
    expected = EXPECTED[what](x, y).to(dtype)
    if what == "fused":
        torch.testing.assert_close(actual, expected, equal_nan=True)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("origin", [*FLOATS, torch.int32])
@pytest.mark.parametrize("to", [*FLOATS, torch.int32])
def test_casts(origin: torch.dtype, to: torch.dtype) -> None:
    whole = torch.int32 in (origin, to)
    x = numbers(100, special=not whole)
    x = (100 * x).to(origin) if whole else x.to(origin)
    with interpreted(THIS):
        actual = run("", x, dtype=to)
    torch.testing.assert_close(actual, x.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("what", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(what: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 16).to(dtype)
    out = torch.full((4,), torch.nan, dtype=dtype)
    with interpreted(THIS):
        reduction_kernel[(1,)](x, out, what, ROWS=4, BLOCK=16)
    if what == "sum":
        exact = x.double().sum(1)
        # Whether the partial sums are rounded to the type is the compiler's choice.
        bound = 16 * torch.finfo(dtype).eps * x.double().abs().sum(1)
        assert ((out.double() - exact).abs() <= bound).all()
    else:
        assert torch.equal(out, x.amax(1) if what == "max" else x.amin(1))


def matmul(dtype: torch.dtype, precision: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = torch.randn(33, 40).to(dtype), torch.randn(40, 20).to(dtype)
    c = torch.full((33, 20), torch.nan)
    with interpreted(example_kernels, THIS):
        matmul_kernel[(3, 2)](a, b, c, 33, 20, 40, precision, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
    return a, b, c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot(dtype: torch.dtype) -> None:
    """Products of factors of any type are summed in float32."""
    a, b, c = matmul(dtype, "ieee")
    size = a.double().abs() @ b.double().abs()
    error = (c.double() - a.double() @ b.double()).abs()
    assert (error <= dot_bound(size, 40, torch.float32)).all()


def test_dot_rounds_to_tf32() -> None:
    a, b, c = matmul(torch.float32, "tf32")

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    size = a.double().abs() @ b.double().abs()
    error = (c.double() - rounded(a) @ rounded(b)).abs()
    assert (error <= dot_bound(size, 40, torch.float32)).all()
    # Unlike the exact product.
    assert ((c.double() - a.double() @ b.double()).abs() > dot_bound(size, 40, torch.float32)).any()


def test_emulation_agrees() -> None:
    """The other net, given the same numbers, gives the same up to the order of the sums."""
    torch.manual_seed(3)
    _, _, c = matmul(torch.bfloat16, "ieee")
    torch.manual_seed(3)
    a, b = torch.randn(33, 40).bfloat16(), torch.randn(40, 20).bfloat16()
    emulated_c = torch.full((33, 20), torch.nan)
    with emulated("sm_80"):
        matmul_kernel[(3, 2)](
            a, b, emulated_c, 33, 20, 40, "ieee", BLOCK_M=16, BLOCK_N=16, BLOCK_K=16
        )
    torch.testing.assert_close(emulated_c, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [False, True])
def test_out_of_bounds(write: bool) -> None:
    storage, out = torch.zeros(32), torch.zeros(32)
    with interpreted(THIS):
        access_kernel[(1,)](storage, out, 32, write, BLOCK=32)
        for wrong in (torch.zeros(31), storage[1:]):
            arguments = (storage, wrong) if write else (wrong, out)
            with pytest.raises(InterpreterError, match="out of the bounds"):
                access_kernel[(1,)](*arguments, 31, write, BLOCK=32)
        # Nothing outside the mask is accessed.
        access_kernel[(1,)](storage[1:], out[1:], 31, False, BLOCK=16)


def test_masked_loads_leave_nothing_to_use() -> None:
    """Beside the mask a GPU leaves what happens to be in its registers; here that is NaN."""
    x, out = torch.zeros(16), torch.zeros(16)
    with interpreted(THIS):
        unmasked_kernel[(1,)](x, out, 9, BLOCK=16)
    assert (out[:9] == 0).all()
    assert out[9:].isnan().all()


def test_nothing_is_left_behind() -> None:
    def state() -> list[object]:
        owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
        owners += (triton.runtime.interpreter, triton.runtime.interpreter.InterpreterBuilder)
        owners += (triton.runtime.interpreter.GridExecutor, InterpretedFunction)
        names = [{k: v for k, v in vars(owner).items() if k[:2] != "__"} for owner in owners]
        return [*names, triton.knobs.runtime.interpret]

    x = torch.zeros(100)
    before, kernels = state(), (arithmetic_kernel, doubled)
    with interpreted(THIS):
        assert isinstance(THIS.arithmetic_kernel, InterpretedFunction)
        run("doubled", x)
    assert (THIS.arithmetic_kernel, THIS.doubled) == kernels
    assert isinstance(arithmetic_kernel, JITFunction)
    with pytest.raises(InterpreterError), interpreted(THIS):
        access_kernel[(1,)](x, x, 100, False, BLOCK=128)
    after = state()
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        if isinstance(one, dict):
            assert one.keys() == other.keys(), index
            changed = [name for name in one if one[name] is not other[name]]
            assert not changed, index
        else:
            assert one == other
    # And kernels compile as before.
    with emulated("sm_80"):
        assert torch.equal(run("doubled", x + 1), x + 2)


def test_the_interpreter_still_needs_correction() -> None:
    """If this fails, a new Triton is honest by itself, and what replaces its parts can go."""
    triton.knobs.runtime.interpret, before = True, triton.knobs.runtime.interpret
    try:
        kernel = triton.jit(arithmetic_kernel.fn)
        x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
        wrong = torch.zeros(64).bfloat16()
        kernel[(1,)](x, y, wrong, 64, "add", BLOCK=64)
        rounded = torch.zeros(64).bfloat16()
        ties = numbers(64, special=False)
        kernel[(1,)](ties, ties, rounded, 64, "", BLOCK=64)
    finally:
        triton.knobs.runtime.interpret = before
    assert not torch.equal(wrong, x + y)
    assert not torch.equal(rounded, ties.bfloat16())
