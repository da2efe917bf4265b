"""Triton kernels on every architecture against float64, and faults planted in what is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tolerance import accumulated_bound, assert_within
from torch.nn import functional

pytest.importorskip("triton")

import triton
import triton.language as tl

from emulation.driver import emulated
from emulation.example_kernels import convolution_kernel, matmul_kernel, softmax_kernel
from emulation.ptx import PTXError

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]

ROUNDOFF = {
    (torch.float16, "ieee"): 2.0**-11,
    (torch.bfloat16, "ieee"): 2.0**-8,
    (torch.float32, "tf32"): 2.0**-10,
    (torch.float32, "ieee"): 0.0,
}
"""Of the factors of a product; TF32 is truncated where nothing rounds it."""

BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}


def check_matmul(
    dtype: torch.dtype, precision: str, *, shape: tuple[int, int, int] = (90, 40, 72)
) -> None:
    rows, columns, depth = shape
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    c = torch.full((rows, columns), torch.nan, dtype=dtype)
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 32))
    matmul_kernel[grid](a, b, c, rows, columns, depth, precision, **BLOCKS, num_stages=3)
    a, b = a.double(), b.double()
    factor = ROUNDOFF[dtype, precision] if dtype == torch.float32 else 0.0
    bound = accumulated_bound(
        a @ b,
        a.square() @ b.square(),
        a.abs() @ b.abs(),
        depth,
        store=torch.finfo(dtype).eps / 2,
        factor=2 * factor,
    )
    assert_within(c, a @ b, bound)


def check_convolution(dtype: torch.dtype, precision: str) -> None:
    batch, height, width, in_channels, out_channels = 2, 5, 7, 40, 24
    x = torch.randn(batch, height, width, in_channels).to(dtype)
    weight = (torch.randn(3, 3, in_channels, out_channels) / 19).to(dtype)
    scale, shift = torch.randn(in_channels), torch.randn(in_channels)
    y = torch.full((batch, height, width, out_channels), torch.nan, dtype=dtype)
    pixels = batch * height * width
    grid = (triton.cdiv(pixels, 64), triton.cdiv(out_channels, 32))
    sizes = (pixels, height, width, in_channels, out_channels)
    convolution_kernel[grid](x, scale, shift, weight, y, *sizes, precision, **BLOCKS, num_stages=3)

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = functional.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), padding=1)
        return y.permute(0, 2, 3, 1)

    size = x.double().abs() * scale.double().abs() + shift.double().abs()
    x = functional.relu(x.double() * scale.double() + shift.double())
    weight = weight.double()
    bound = accumulated_bound(
        convolve(x, weight),
        convolve(size.square(), weight.square()),
        convolve(size, weight.abs()),
        9 * in_channels,
        store=torch.finfo(dtype).eps / 2,
        factor=2 * ROUNDOFF[dtype, precision],
    )
    assert_within(y, convolve(x, weight), bound)


def sweep(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.sweep)


EVERYTHING = [(architecture, *kind) for architecture in ARCHITECTURES for kind in ROUNDOFF]
MATMULS = {(architecture, torch.float16, "ieee") for architecture in ARCHITECTURES} | {
    (architecture, *kind) for architecture in ("sm_80", "sm_90") for kind in ROUNDOFF
}
CONVOLUTIONS = {
    ("sm_75", torch.float16, "ieee"),
    ("sm_80", torch.bfloat16, "ieee"),
    ("sm_80", torch.float32, "ieee"),
    ("sm_90", torch.float16, "ieee"),
    ("sm_90", torch.float32, "tf32"),
    ("sm_120", torch.bfloat16, "ieee"),
}


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision"),
    [each if each in MATMULS else sweep(*each) for each in EVERYTHING],
)
def test_matmul(architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture):
        check_matmul(dtype, precision)


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision"),
    [each if each in CONVOLUTIONS else sweep(*each) for each in EVERYTHING],
)
def test_convolution(architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture):
        check_convolution(dtype, precision)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 32, 32), (65, 33, 33), (130, 96, 256)])
@pytest.mark.parametrize(("dtype", "precision"), ROUNDOFF)
def test_matmul_of_any_shape(
    architecture: str, shape: tuple[int, int, int], dtype: torch.dtype, precision: str
) -> None:
    with emulated(architecture):
        check_matmul(dtype, precision, shape=shape)


@pytest.mark.parametrize("architecture", ["sm_80", sweep("sm_75"), sweep("sm_90"), sweep("sm_120")])
def test_softmax(architecture: str) -> None:
    """Reductions across the lanes and warps of a program."""
    x = 5 * torch.randn(7, 300)
    y = torch.full_like(x, torch.nan)
    with emulated(architecture):
        softmax_kernel[(7,)](x, y, 300, BLOCK=512, num_warps=4)
    torch.testing.assert_close(y.double(), x.double().softmax(1), rtol=1e-5, atol=1e-8)


# Faults in the PTX of a pipelined matrix product.

NOTICED = (AssertionError, PTXError)


PIPELINED = (90, 48, 160)


def changed_once(pattern: str, replacement: str, number: int) -> Callable[[str, str], str]:
    """Returns a rewriting of the match of that number."""

    def rewrite(text: str, name: str) -> str:
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return rewrite


FAULTS = {
    "barrier dropped": (r"bar\.sync\s+0;", ""),
    "wait for copies dropped": (r"cp\.async\.wait_group\s+\w+;", ""),
    "wait for one group too few": (r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;"),
    "copies not committed": (r"cp\.async\.commit_group;", ""),
    "copy to another place": (r"(cp\.async\.c\S+\s+\[\s*%r\d+\s*\+\s*)0(\s*\])", r"\g<1>16\2"),
    "store one element further": (r"(st\.global\S*\s+\[\s*%rd\d+\s*\+\s*)0(\s*\])", r"\g<1>2\2"),
}
FAULTS_OF_WARPS = {
    "transposition dropped": (r"(ldmatrix\S+)\.trans", r"\1"),
    "registers swapped": (r"(mma\.sync\S+\s*\{[^}]*\},\s*\{\s*)(%r\d+), (%r\d+)", r"\1\3, \2"),
}
FAULTS_OF_WARP_GROUPS = {
    "wait for products dropped": (r"wgmma\.wait_group\S+\s+\d+;", ""),
    "wait for one product too few": (r"(wgmma\.wait_group\S+\s+)1;", r"\g<1>2;"),
    "products not committed": (r"wgmma\.commit_group\S+;", ""),
    "fence between proxies dropped": (r"fence\.proxy\.async\S*;", ""),
}

# What has no effect: a barrier between the first two prefetches, which write different stages, and
# that the first copies are a group of their own, not one with the next.
IDLE = {"barrier dropped": {0}, "copies not committed": {0}}


@pytest.mark.parametrize(
    ("architecture", "fault"),
    [
        *(("sm_80", fault) for fault in FAULTS | FAULTS_OF_WARPS),
        *(("sm_90", fault) for fault in FAULTS | FAULTS_OF_WARP_GROUPS),
        *(sweep("sm_120", fault) for fault in FAULTS | FAULTS_OF_WARPS),
    ],
)
def test_planted_fault(architecture: str, fault: str) -> None:
    """Every place where the fault can be is noticed."""
    pattern, replacement = (FAULTS | FAULTS_OF_WARPS | FAULTS_OF_WARP_GROUPS)[fault]
    with emulated(architecture) as log:
        check_matmul(torch.float16, "ieee", shape=PIPELINED)
    count = len(re.findall(pattern, log[0].compiled.asm["ptx"]))
    assert count > 0
    unnoticed = set()
    for number in range(count):
        try:
            with emulated(architecture, rewrite=changed_once(pattern, replacement, number)):
                check_matmul(torch.float16, "ieee", shape=PIPELINED)
        except NOTICED:
            continue
        unnoticed.add(number)
    assert unnoticed == IDLE.get(fault, set())


# Faults in the source.


@triton.jit
def careless_kernel(x_ptr, y_ptr, size, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """Copies ``size`` numbers, with a fault or without."""
    start = tl.program_id(0) * BLOCK
    if FAULT == "overlapping blocks":
        start = tl.program_id(0) * (BLOCK - 1)
    i = start + tl.arange(0, BLOCK)
    pointers = x_ptr + i
    if FAULT == "wrong divisibility":
        pointers = tl.multiple_of(pointers, 16)
    mask = i < size
    if FAULT == "out of bounds by one":
        mask = i <= size
    x = tl.load(pointers, mask=mask)
    if FAULT == "mask forgotten":
        tl.store(y_ptr + i, x)
    else:
        tl.store(y_ptr + i, x, mask=mask)
    if FAULT == "read of another block's result":
        other = (tl.program_id(0) + 1) % tl.num_programs(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x_ptr + i, tl.load(y_ptr + other, mask=other < size), mask=mask)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", ""),
        ("out of bounds by one", "global access out of bounds"),
        ("mask forgotten", "global access out of bounds"),
        ("wrong divisibility", "misaligned 16-byte access"),
        ("overlapping blocks", "global-memory race: blocks"),
        ("read of another block's result", "global-memory race: block . reads"),
    ],
)
def test_careless_source(fault: str, message: str) -> None:
    size = 1008
    x = torch.randn(size + 1)[1:] if fault == "wrong divisibility" else torch.randn(size)
    y = torch.full((size,), torch.nan)
    arguments = (x, y, size, fault, 512)
    grid = (3,) if fault == "overlapping blocks" else (2,)
    with emulated("sm_80"):
        if not fault:
            careless_kernel[grid](*arguments)
            assert torch.equal(x, y)
            return
        with pytest.raises(PTXError, match=message):
            careless_kernel[grid](*arguments)
    if "global-memory race" in message:
        with emulated("sm_80", races=False):
            careless_kernel[grid](*arguments)
