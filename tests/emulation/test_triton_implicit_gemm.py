"""The convolution kernel alone, with what only the executor of plans asks of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from threshnet_fast.kernels import implicit_gemm, launch, layout
from threshnet_fast.kernels.configurations import Configuration

from emulation.driver import emulated
from emulation.interpreter import interpreted

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDOFF = {
    (torch.float32, "ieee"): 0.0,
    # Tensor cores truncate what they are given as TF32.
    (torch.float32, "tf32"): 2.0**-10,
    (torch.float16, "ieee"): 2.0**-11,
    (torch.bfloat16, "ieee"): 2.0**-8,
}
"""Of the factors of a product, for each dtype and precision."""

SMALL_TILE = Configuration(16, 32, 32, 4, 3)


@dataclass(frozen=True)
class Case:
    """A convolution of segments, all in one buffer unless they are ``apart``."""

    channels: tuple[int, ...]
    batch: int
    size: tuple[int, int]
    out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    prologue: bool = False
    relu: bool = True
    apart: bool = False
    configuration: Configuration = SMALL_TILE

    def __str__(self) -> str:
        n, (h, w) = self.batch, self.size
        flags = "-prologue" * self.prologue + "-apart" * self.apart
        parts = f"-split{self.configuration.split_k}" if self.configuration.split_k > 1 else ""
        return (
            f"{'+'.join(map(str, self.channels))}to{self.out}-{n}x{h}x{w}-k{self.kernel}"
            f"s{self.stride}p{self.padding}{flags}{parts}"
        )


def split(parts: int) -> Configuration:
    return Configuration(16, 32, 32, 4, 3, split_k=parts)


CASES = [
    Case((64,), 1, (7, 7), 128, 1, padding=0, prologue=True),
    Case((76,), 3, (5, 3), 12, 1, padding=0, prologue=True),
    Case((128,), 1, (7, 7), 32, relu=False),
    Case((68, 40, 16, 116, 24), 1, (4, 4), 68),
    Case((48, 16), 2, (13, 17), 40, apart=True),
    Case((40, 3, 17), 1, (5, 7), 33, stride=2, apart=True, prologue=True),
    Case((196,), 1, (2, 2), 40, configuration=split(3)),
    Case((272, 160), 2, (1, 1), 40, configuration=split(4)),
    Case((16,), 1, (1, 1), 16, stride=2, padding=2, configuration=split(2)),
]

WIDE = [
    Case((480,), 3, (7, 7), 68, 1, padding=0, configuration=Configuration(64, 64, 64, 4, 3)),
    Case((16, 32, 48, 64, 80), 2, (13, 17), 40, configuration=Configuration(64, 64, 32, 4, 3)),
    Case((20, 12), 2, (9, 5), 24, 5, padding=2, apart=True),
    Case((24,), 1, (6, 6), 8, 3, stride=3, padding=0),
    Case((33,), 2, (3, 3), 17, 1, padding=2, prologue=True, apart=True),
    Case((96,), 1, (14, 14), 128, 1, padding=0, prologue=True, configuration=split(2)),
    Case((64,), 1, (3, 3), 16, 7, padding=3),
    Case((4,), 1, (1, 2), 8, 1, stride=5, padding=3, apart=True),
]


def run(case: Case, dtype: torch.dtype, precision: str) -> None:
    """Runs the kernel on poisoned memory and compares all of it with float64."""
    xs = [torch.randn(case.batch, count, *case.size).to(dtype) for count in case.channels]
    total = sum(case.channels)
    length = total * case.kernel**2
    weight = (torch.randn(case.out, total, case.kernel, case.kernel) / length**0.5).to(dtype)
    bias = torch.randn(case.out)
    scale, shift = torch.randn(total), torch.randn(total)

    views = [pitched(x) for x in xs] if case.apart else in_one_buffer(xs)
    size = [(extent + 2 * case.padding - case.kernel) // case.stride + 1 for extent in case.size]
    whole = case.out if case.apart else layout.padded(case.out)
    memory = poison((case.batch, whole + 48, *size), dtype)
    y = memory[:, 16 : 16 + whole]
    partials = torch.full(
        (max(1, implicit_gemm.partials_size(y, case.configuration.split_k)),), torch.nan
    )
    prologue = None
    if case.prologue:
        prologue = (
            layout.pack_vector(scale, case.channels),
            layout.pack_vector(shift, case.channels),
        )
    launch.run(
        implicit_gemm.convolve(
            views,
            layout.pack_weight(weight, case.channels, dtype),
            y,
            stride=case.stride,
            padding=case.padding,
            prologue=prologue,
            bias=layout.pack_vector(bias, [case.out]),
            relu=case.relu,
            precision=precision,
            configuration=case.configuration,
            partials=partials,
        )
    )

    x = torch.cat(xs, 1).double()
    size_of_x = x.abs()
    if case.prologue:
        affine = scale.double()[:, None, None], shift.double()[:, None, None]
        size_of_x = size_of_x * affine[0].abs() + affine[1].abs()
        x = functional.relu(x * affine[0] + affine[1])
    convolve = {"stride": case.stride, "padding": case.padding}
    exact = functional.conv2d(x, weight.double(), bias.double(), **convolve)
    magnitude = functional.conv2d(size_of_x, weight.double().abs(), bias.double().abs(), **convolve)
    energy = functional.conv2d(size_of_x.square(), weight.double().square(), **convolve)
    exact_factors = not case.prologue and precision == "ieee"
    bound = accumulated_bound(
        exact,
        energy,
        magnitude,
        length + 1,
        store=torch.finfo(dtype).eps / 2,
        factor=0.0 if exact_factors else ROUNDOFF[dtype, precision],
    )
    expected = functional.relu(exact) if case.relu else exact
    assert_within(y[:, : case.out], expected, bound)
    assert (y[:, case.out :] == 0).all(), "the rest of the last group is not 0"
    assert memory[:, :16].isnan().all(), "channels before the output were written"
    assert memory[:, 16 + whole :].isnan().all(), "channels behind the output were written"


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    memory = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return memory.fill_(torch.nan)


def pitched(x: Tensor) -> Tensor:
    """Copies a map into the middle of poisoned pixels, aligned as nothing wants it."""
    memory = poison((x.shape[0], x.shape[1] + 5, *x.shape[2:]), x.dtype)
    memory[:, 3 : 3 + x.shape[1]] = x
    return memory[:, 3 : 3 + x.shape[1]]


def in_one_buffer(xs: list[Tensor]) -> list[Tensor]:
    """Places segments in slots of whole groups, padded with zeros, in reverse order."""
    slots = [layout.padded(x.shape[1]) for x in xs]
    memory = poison((xs[0].shape[0], sum(slots) + 16, *xs[0].shape[2:]), xs[0].dtype)
    views = []
    end = sum(slots)
    for x, slot in zip(xs, slots, strict=True):
        view = memory[:, end - slot : end]
        view.zero_()
        view[:, : x.shape[1]] = x
        views.append(view)
        end -= slot
    return views


ALL_DTYPES = list(ROUNDOFF)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, architecture: str) -> None:
    with emulated(architecture):
        run(case, torch.float16, "ieee")


@pytest.mark.parametrize(("dtype", "precision"), [k for k in ALL_DTYPES if k[0] != torch.float16])
@pytest.mark.parametrize(
    ("case", "architecture"),
    [(CASES[3], "sm_80"), (CASES[5], "sm_90"), (CASES[6], "sm_90")],
    ids=str,
)
def test_other_dtypes(case: Case, architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture):
        run(case, dtype, precision)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize(("dtype", "precision"), ALL_DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_everything(case: Case, architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture):
        run(case, dtype, precision)


@pytest.mark.parametrize(("dtype", "precision"), ALL_DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_interpreted(case: Case, dtype: torch.dtype, precision: str) -> None:
    # A program takes its time here, whatever its tile.
    large = replace(case.configuration, block_m=64, block_n=64, block_k=64)
    with interpreted():
        run(replace(case, configuration=large), dtype, precision)


@pytest.mark.parametrize(
    ("size", "out", "kernel", "stride", "padding", "expected"),
    [
        (7, 7, 3, 1, 1, (0, 3)),
        (1, 1, 3, 1, 1, (1, 1)),
        (2, 2, 3, 1, 1, (0, 3)),
        (2, 2, 5, 1, 2, (1, 3)),
        (1, 2, 3, 2, 2, (0, 3)),
        (1, 2, 1, 5, 3, (0, 0)),
        (112, 112, 1, 1, 0, (0, 1)),
    ],
)
def test_live_taps(size, out, kernel, stride, padding, expected) -> None:
    taps = implicit_gemm.live_taps(size, out, kernel, stride, padding)
    assert taps == expected
    first, count = taps
    met = {
        tap
        for tap in range(kernel)
        for position in range(out)
        if 0 <= position * stride - padding + tap < size
    }
    assert met <= set(range(first, first + count))
