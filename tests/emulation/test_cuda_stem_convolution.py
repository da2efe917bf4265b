"""The CUDA kernel for a network's first convolution, against float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from op_cases import LAYOUTS
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional

from emulation.cuda_cases import (
    DTYPES,
    SCHEDULES,
    Bad,
    Guarded,
    PlantedBug,
    available,
    change,
    fenced,
    library,
    misaligned,
    output_map,
    pitch,
    strides,
    whole,
    window,
)
from emulation.cuda_library import EmulationError, StemConvolution

pytestmark = [available, pytest.mark.usefixtures("one_thread")]


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
    special: bool = False
    gap: int = 8
    shift: int = 0
    # Channels that are stored; otherwise whole groups of those of the weight.
    stored: int | None = None

    def __str__(self) -> str:
        n, (h, w), (kh, kw) = self.batch, self.size, self.kernel
        return (
            f"{self.channels}to{self.out}-{n}x{h}x{w}-k{kh}x{kw}s{self.stride}p{self.padding}"
            f"-{self.layout}-{self.gap}+{self.shift}"
        )


CASES = [
    Case(3, 1, (19, 23), 32),
    Case(3, 2, (13, 17), 20, layout="channels_last"),
    Case(3, 3, (7, 7), 33, layout="cropped_channels_last", stored=33, relu=False, gap=0, shift=3),
    Case(1, 2, (7, 5), 16, (5, 5), 1, 2, layout="every_second_column", bias=False),
    Case(16, 1, (5, 7), 24, (3, 3), 1, 1, layout="transposed", stored=21),
    Case(3, 2, (7, 9), 16, (7, 7), 2, 3, layout="expanded_batch"),
    Case(5, 1, (1, 1), 7, (1, 1), 1, 0, layout="narrowed"),
    Case(3, 2, (9, 7), 40, special=True, relu=False),
    Case(3, 2, (9, 7), 40, special=True),
    Case(3, 1, (5, 3), 16, (3, 3), 1, 5, shift=1),
    Case(2, 1, (3, 3), 4, (3, 3), 5, 4),
    Case(17, 1, (7, 5), 40, (3, 3), 1, 1, gap=3),
    Case(40, 2, (5, 3), 8, (3, 3), 3, 2, layout="channels_last", stored=8),
    Case(4, 3, (2, 29), 12, (1, 5), 1, 2, layout="narrowed_channels_last"),
    Case(4, 1, (6, 5), 12, (3, 2), 1, 1),
    Case(3, 1, (2, 2), 1100),
    *(Case(3, 2, (7, 7), 16, layout=name) for name in LAYOUTS),
]


def tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(case.batch, case.channels, *case.size)
    if case.special:
        for number, share in ((torch.nan, 0.02), (-torch.inf, 0.03), (torch.inf, 0.03)):
            x[torch.rand(x.shape) < share] = number
    length = case.channels * case.kernel[0] * case.kernel[1]
    weight = torch.randn(case.out, case.channels, *case.kernel) / length**0.5
    bias = torch.randn(case.out) if case.bias else None
    return LAYOUTS[case.layout](x.to(dtype)), weight.to(dtype), bias


def packed(weight: Tensor) -> Tensor:
    """Returns a weight as [kernel height, kernel width, input channels, whole groups]."""
    out, channels, height, width = weight.shape
    result = torch.zeros(height, width, channels, whole(out), dtype=weight.dtype)
    result[..., :out] = weight.permute(2, 3, 1, 0)
    return fenced(result)


def operands(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, output: Guarded
) -> StemConvolution:
    return StemConvolution(
        dtype=x.dtype,
        window=window(x, case.kernel, case.stride, case.padding),
        input=x,
        **strides(x),
        in_channels=x.shape[1],
        weight=weight,
        weight_columns=weight.shape[3],
        out_channels=output.view.shape[1],
        bias=bias,
        output=output.view,
        output_pitch=pitch(output.view),
        relu=case.relu,
    )


def run(case: Case, dtype: torch.dtype) -> None:
    """Runs the kernel and compares all that it wrote with float64."""
    x, weight, bias = tensors(case, dtype)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.double()
        return functional.conv2d(x, weight, bias, case.stride, case.padding)

    exact = convolve(x.double(), weight.double(), bias)
    energy = convolve(x.double().square(), weight.double().square(), None)
    magnitude = convolve(x.double().abs(), weight.double().abs(), None)
    magnitude += 0 if bias is None else bias.double().abs()[:, None, None]
    stored = case.stored or whole(case.out)
    shape = (case.batch, stored, *exact.shape[2:])
    output = output_map(shape, dtype, gap=case.gap, shift=case.shift)
    packed_weight = packed(weight)
    packed_bias = (
        None if bias is None else fenced(functional.pad(bias, (0, whole(case.out) - case.out)))
    )
    library().convolve_stem(operands(case, x, packed_weight, packed_bias, output))

    length = case.channels * case.kernel[0] * case.kernel[1] + 1
    bound = accumulated_bound(
        exact, energy, magnitude, length, store=torch.finfo(dtype).eps / 2, factor=0.0
    )
    # What is not finite is exact, also where -inf is rectified.
    bound = torch.where(exact.isfinite(), bound, 0)
    expected = functional.relu(exact) if case.relu else exact
    used = min(stored, case.out)
    assert_within(output.view[:, :used], expected[:, :used], bound[:, :used])
    if not case.special:
        assert (output.view[:, used:] == 0).all(), "the rest of the last group is not 0"
    output.assert_rest_untouched()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stem_convolution(case: Case, dtype: torch.dtype, schedule: str) -> None:
    with library().schedule(schedule):
        run(case, dtype)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("channels", [3, 4])
def test_offsets_beyond_32_bits(channels: int, axis: int) -> None:
    """An axis along which the input reaches beyond 2^31 elements, and so do the output's pixels."""
    shape = (2, channels, 3, 3)
    far = 2**31 + 64
    steps = list(torch.empty([1 if i == axis else size for i, size in enumerate(shape)]).stride())
    steps[axis] = far // (shape[axis] - 1)
    x = torch.empty(far + 256, dtype=torch.float16).as_strided(shape, steps)
    x.copy_(torch.randn(shape))
    y = torch.empty(far + 16, dtype=torch.float16).as_strided((2, 16, 1, 1), (far, 1, far, far))
    y.fill_(torch.nan)
    weight = torch.randn(16, *shape[1:]).half()
    case = Case(channels, 2, (3, 3), 16, stride=1, padding=0, relu=False, bias=False)
    library().convolve_stem(operands(case, x, packed(weight), None, Guarded(y, y)))
    exact = functional.conv2d(x.double(), weight.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-10, atol=2**-9)


BAD = [
    Bad("dtype is -1, expected 0", {"dtype": -1}),
    Bad("input is null", {"input": None}),
    Bad("input is not aligned to 2 bytes", {"input": misaligned(1)}),
    Bad("in_channels is 0, expected a positive", {"in_channels": 0}),
    Bad("weight is null", {"weight": None}),
    Bad("weight is not aligned to 16 bytes", {"weight": misaligned(8)}),
    Bad("weight_columns is 0, expected a positive", {"weight_columns": 0}),
    Bad("weight_columns is 24, expected a multiple of 16", {"weight_columns": 24}),
    Bad("out_channels is 0, expected a positive", {"out_channels": 0}),
    Bad("out_channels is 33, expected at most 32", {"out_channels": 33}),
    Bad("bias is not aligned to 4 bytes", {"bias": misaligned(2)}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 2 bytes", {"output": misaligned(1)}),
    Bad("output_pitch is 31, expected at least 32", {"output_pitch": 31}),
    Bad("out_height is 2, expected 3", {"window.out_height": 2}),
    Bad("stride is -2, expected a positive", {"window.stride": -2}),
    Bad("output has more than 2147482624 pixels", {"window.out_width": 2**30}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments(bad: Bad) -> None:
    case = Case(3, 2, (5, 7), 20)
    x, weight, bias = tensors(case, torch.float16)
    output = output_map((2, 32, 3, 4), x.dtype)
    given = operands(case, x, packed(weight), functional.pad(bias, (0, 12)), output)
    with pytest.raises(ValueError, match=bad.message):
        library().convolve_stem(change(given, bad.changes))
    assert output.view.isnan().all()
    output.assert_rest_untouched()


PLANTED = [
    PlantedBug(
        "no padding to the left",
        "const int left = position.column * window.stride - window.padding",
        "const int left = position.column * window.stride",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "a column behind the map",
        "x < 0 || x >= window.in_width",
        "x < 0 || x > window.in_width",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "padding not masked",
        "const bool inside = y >= 0 &&",
        "const bool inside =",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "the wrong tap's weights",
        "tap_row * window.kernel_width + tap_column",
        "tap_row * window.kernel_height + tap_column",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "a channel's stride of 1",
        "element += convolution.channel_stride",
        "element += 1",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "rows of the wrong length",
        "factors += convolution.weight_columns",
        "factors += convolution.out_channels",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "bias of other columns",
        "convolution.bias + column + element",
        "convolution.bias + first + element",
        "stem_convolution.cuh",
    ),
    PlantedBug(
        "not rectified", "if (convolution.relu) value = rectify(value);", "", "stem_convolution.cuh"
    ),
]


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs(bug: PlantedBug, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = bug.library("stem_convolution.cu")
    monkeypatch.setattr(sys.modules[__name__], "library", lambda: mutated)

    def check() -> None:
        for case in CASES:
            run(case, torch.float16)

    with pytest.raises((AssertionError, EmulationError)):
        check()
