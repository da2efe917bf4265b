"""The first convolution of a network, whose input comes in any strides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from op_cases import LAYOUTS
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from threshnet_fast.kernels import launch, layout, stem_convolution
from threshnet_fast.kernels.architectures import ARCHITECTURES
from threshnet_fast.kernels.configurations import Configuration, candidates

from emulation.driver import compiled_for, emulated
from emulation.interpreter import interpreted
from emulation.mutation import mutated
from emulation.ptx_types import PTXError
from emulation.resources import resources
from emulation.test_triton_implicit_gemm import ALL_DTYPES, ROUNDOFF, poison

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_TILE = Configuration(16, 16, 32, 4, 3)


@dataclass(frozen=True)
class Case:
    """A convolution of an image with some layout."""

    channels: int
    batch: int
    size: tuple[int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 2
    padding: int = 1
    layout: str = "contiguous"
    relu: bool = True
    bias: bool = True
    ragged: bool = False
    configuration: Configuration = SMALL_TILE

    def __str__(self) -> str:
        n, (h, w), (kh, kw) = self.batch, self.size, self.kernel
        return (
            f"{self.channels}to{self.out}-{n}x{h}x{w}-k{kh}x{kw}s{self.stride}p{self.padding}"
            f"-{self.layout}"
        )


CASES = [
    Case(3, 1, (19, 23), 32, configuration=Configuration(64, 32, 32, 4, 3)),
    Case(3, 2, (13, 17), 20, layout="channels_last"),
    Case(3, 3, (7, 7), 33, layout="cropped_channels_last", ragged=True, relu=False),
    Case(1, 2, (7, 5), 16, (5, 5), 1, 2, layout="every_second_column", bias=False),
    Case(16, 1, (5, 7), 24, (3, 3), 1, 1, layout="transposed"),
    Case(3, 2, (7, 9), 16, (7, 7), 2, 3, layout="expanded_batch"),
    Case(5, 1, (1, 1), 7, (1, 1), 1, 0, layout="narrowed"),
]

WIDE = [
    *(Case(3, 2, (7, 7), 16, layout=name) for name in LAYOUTS),
    Case(3, 1, (35, 41), 64, (7, 7), 2, 3, configuration=Configuration(128, 128, 64, 8, 3)),
    Case(17, 1, (7, 5), 40, (3, 3), 1, 1),
    Case(40, 2, (5, 3), 8, (3, 3), 3, 2, layout="channels_last"),
    Case(4, 3, (2, 29), 12, (1, 5), 1, 2, layout="narrowed_channels_last"),
    Case(2, 1, (3, 3), 4, (3, 3), 5, 4),
]


def run(case: Case, dtype: torch.dtype, precision: str) -> None:
    """Runs the kernel on poisoned memory and compares all of it with float64."""
    x = LAYOUTS[case.layout](torch.randn(case.batch, case.channels, *case.size).to(dtype))
    length = case.channels * case.kernel[0] * case.kernel[1]
    weight = (torch.randn(case.out, case.channels, *case.kernel) / length**0.5).to(dtype)
    bias = torch.randn(case.out) if case.bias else None
    size = [
        (extent + 2 * case.padding - tap) // case.stride + 1
        for extent, tap in zip(case.size, case.kernel, strict=True)
    ]
    whole = case.out if case.ragged else layout.padded(case.out)
    before = 3 if case.ragged else 16
    memory = poison((case.batch, before + whole + 16, *size), dtype)
    y = memory[:, before : before + whole]
    launch.run(
        stem_convolution.convolve_stem(
            x,
            stem_convolution.pack_stem(weight, dtype),
            y,
            stride=case.stride,
            padding=case.padding,
            bias=None if bias is None else layout.pack_vector(bias, [case.out]),
            relu=case.relu,
            precision=precision,
            configuration=case.configuration,
        )
    )

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.double()
        return functional.conv2d(x, weight, bias, case.stride, case.padding)

    x, weight = x.double(), weight.double()
    exact = convolve(x, weight, bias)
    bound = accumulated_bound(
        exact,
        convolve(x.square(), weight.square(), None),
        convolve(x.abs(), weight.abs(), None if bias is None else bias.abs()),
        length + 1,
        store=torch.finfo(dtype).eps / 2,
        factor=ROUNDOFF[dtype, precision] if precision == "tf32" else 0.0,
    )
    expected = functional.relu(exact) if case.relu else exact
    assert_within(y[:, : case.out], expected, bound)
    assert (y[:, case.out :] == 0).all(), "the rest of the last group is not 0"
    assert memory[:, :before].isnan().all(), "channels before the output were written"
    assert memory[:, before + whole :].isnan().all(), "channels behind the output were written"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, architecture: str) -> None:
    with emulated(architecture):
        run(case, torch.float16, "ieee")


@pytest.mark.parametrize(("dtype", "precision"), [k for k in ALL_DTYPES if k[0] != torch.float16])
@pytest.mark.parametrize(
    ("case", "architecture"), [(CASES[1], "sm_80"), (CASES[5], "sm_90")], ids=str
)
def test_other_dtypes(case: Case, architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture):
        run(case, dtype, precision)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize(("dtype", "precision"), ALL_DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_everything(case: Case, architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture):
        run(case, dtype, precision)


@pytest.mark.parametrize(("dtype", "precision"), ALL_DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_interpreted(case: Case, dtype: torch.dtype, precision: str) -> None:
    with interpreted():
        run(case, dtype, precision)


def test_offsets_beyond_32_bits() -> None:
    """Images, rows and pixels that lie more than 2^31 elements apart; the gaps stay untouched."""
    far = 2**31 + 64
    x = torch.empty(far + 64, dtype=torch.float16).as_strided((2, 3, 3, 3), (far, 1, 12, 4))
    y = torch.empty(far + 64, dtype=torch.float16).as_strided((2, 16, 1, 1), (far, 1, far, far))
    x.copy_(torch.randn(2, 3, 3, 3))
    y.fill_(torch.nan)
    weight = torch.randn(16, 3, 3, 3).half()
    with interpreted():
        launch.run(
            stem_convolution.convolve_stem(
                x,
                stem_convolution.pack_stem(weight, torch.float16),
                y,
                stride=1,
                padding=0,
                bias=None,
                relu=False,
                precision="ieee",
                configuration=SMALL_TILE,
            )
        )
    exact = functional.conv2d(x.double(), weight.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        (2, "left = column * stride - padding", "left = column * stride"),
        (2, "& (x_in >= 0) & (x_in < in_width)", "& (x_in >= 0)"),
        (2, "k_exists = k < LENGTH", "k_exists = k < LENGTH - 1"),
        (2, "tap_column = tap - tap_row * KERNEL_COLUMNS", "tap_column = tap_row"),
        (4, "channel.to(tl.int64) * channel_stride", "channel.to(tl.int64)"),
    ],
)
def test_planted_bugs(case: int, old: str, new: str) -> None:
    noticed = pytest.raises((AssertionError, PTXError))
    with mutated(stem_convolution, old, new), emulated("sm_80"), noticed:
        run(CASES[case], torch.float16, "ieee")


LARGE_TILE = Configuration(128, 128, 128, 8, 3)


def compile_tiles(architecture: str, tiles: set[Configuration]) -> None:
    """Compiles a 3x3 window on 3 channels and a 7x7 one, and holds them to their resources."""
    with compiled_for(architecture) as log:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for tile in tiles:
                for kernel, out in ((3, 32), (7, 64)):
                    weight = torch.empty(out, 3, kernel, kernel)
                    launch.run(
                        stem_convolution.convolve_stem(
                            torch.empty(1, 3, 18, 18, dtype=dtype),
                            stem_convolution.pack_stem(weight, dtype),
                            torch.empty(1, 9, 9, out, dtype=dtype).permute(0, 3, 1, 2),
                            stride=2,
                            padding=kernel // 2,
                            bias=torch.empty(out),
                            relu=True,
                            precision="ieee",
                            configuration=tile,
                        )
                    )
    for compiled in {entry.compiled.hash: entry.compiled for entry in log}.values():
        used = resources(compiled)
        assert used.spills == 0, (compiled.src.constants, used)
        assert used.fits


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_large_tile_does_not_spill(architecture: str) -> None:
    compile_tiles(architecture, {LARGE_TILE})


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_tile_spills(architecture: str) -> None:
    found = ARCHITECTURES[architecture]
    classes = ((torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
    tiles = {tile for each in classes for tile in candidates(found, *each)}
    compile_tiles(architecture, tiles | {LARGE_TILE})
