"""Global average pooling with a classifier by the CUDA kernel, against float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from tolerance import accumulated_bound, assert_within
from torch import Tensor

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
    pitched,
    segment,
    whole,
)
from emulation.cuda_library import EmulationError, Head, Packing

pytestmark = [available, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Case:
    """A head whose output begins ``shift`` elements behind an aligned address."""

    channels: int
    batch: int
    size: tuple[int, int]
    classes: int
    bias: bool = True
    shift: int = 0

    def __str__(self) -> str:
        n, (h, w) = self.batch, self.size
        return f"{n}x{self.channels}x{h}x{w}-{self.classes}+{self.shift}"


CASES = [
    Case(320, 1, (7, 7), 10),
    Case(37, 3, (5, 3), 33, shift=1),
    Case(296, 2, (1, 1), 10, bias=False),
    Case(960, 2, (7, 7), 100),
    Case(40, 1, (13, 17), 7, shift=3),
    Case(1, 1, (1, 1), 1),
    Case(17, 3, (9, 9), 65, bias=False),
    Case(5000, 1, (3, 1), 17),
    Case(8192, 1, (1, 2), 3),
    Case(20, 600, (1, 1), 20),
    Case(48, 40, (2, 2), 130),
]


def operands(x: Tensor, weight: Tensor, bias: Tensor | None, output: Guarded) -> Head:
    return Head(
        dtype=x.dtype,
        batch=x.shape[0],
        pixels=x.shape[2] * x.shape[3],
        input=segment(x),
        weight=weight,
        classes=weight.shape[0],
        bias=bias,
        output=output.view,
    )


def packed(weight: Tensor) -> Tensor:
    """Returns ``[classes, C]`` with whole groups of channels."""
    classes, channels = weight.shape
    result = torch.zeros(classes, whole(channels), dtype=weight.dtype)
    result[:, :channels] = weight
    return fenced(result)


def classify(x: Tensor, weight: Tensor, bias: Tensor | None, shift: int = 0) -> Tensor:
    """Runs the kernel on dense tensors."""
    classes = weight.shape[0]
    output = Guarded.empty((x.shape[0], classes), (classes, 1), x.dtype, shift)
    bias = None if bias is None else fenced(bias)
    library().head(operands(pitched(x, gap=8), packed(weight), bias, output))
    output.assert_rest_untouched()
    return output.view


def run(case: Case, dtype: torch.dtype) -> None:
    """Runs the kernel and compares all that it wrote with float64."""
    n, c = case.batch, case.channels
    # Means that are not all close to 0.
    x = (torch.randn(n, c, *case.size) + torch.randn(n, c, 1, 1)).to(dtype)
    weight = (torch.randn(case.classes, c) / c**0.5).to(dtype)
    bias = torch.randn(case.classes) if case.bias else None
    y = classify(x, weight, bias, case.shift)

    values, weight = x.double(), weight.double()
    added = torch.zeros(()) if bias is None else bias.double()
    means, sizes = values.mean((2, 3)), values.abs().mean((2, 3))
    exact = means @ weight.T + added
    bound = accumulated_bound(
        exact,
        means.square() @ weight.square().T,
        sizes @ weight.abs().T + added.abs(),
        c * case.size[0] * case.size[1] + 1,
        store=torch.finfo(dtype).eps / 2,
        factor=0.0,
    )
    assert_within(y, exact, bound)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_head(case: Case, dtype: torch.dtype, schedule: str) -> None:
    with library().schedule(schedule):
        run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_image(dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, 2, 2).to(dtype)
    x[1, 3, 0, 1], x[2, 5, 1, 1] = torch.nan, torch.inf
    y = classify(x, torch.rand(4, 16).to(dtype) + 0.1, None)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2] == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Classes are cut into slices by the batch, which must not change any sum."""
    x, weight = torch.randn(40, 48, 3, 3).to(dtype), torch.randn(150, 48).to(dtype)
    bias = torch.randn(150)
    together = classify(x, weight, bias)
    with library().schedule("shuffled", 3):
        assert torch.equal(classify(x[7:8], weight, bias)[0], together[7])


def test_offsets_beyond_32_bits() -> None:
    """Pixels that lie more than 2^31 elements from the first; the gaps stay untouched."""
    far = 2**30 + 64
    x = torch.empty(3 * far + 16, dtype=torch.float16).as_strided(
        (2, 16, 1, 2), (2 * far, 1, 0, far)
    )
    x.copy_(torch.randn(x.shape))
    weight = torch.randn(33, 16).half()
    output = Guarded.empty((2, 33), (33, 1), torch.float16)
    library().head(operands(x, packed(weight), None, output))
    exact = x.double().mean((2, 3)) @ weight.double().T
    torch.testing.assert_close(output.view.double(), exact, rtol=2**-10, atol=2**-8)


def test_weight_of_pack_weight() -> None:
    """What pack_weight makes for a head is what the head reads."""
    x, weight = torch.randn(2, 37, 3, 3).half(), torch.randn(10, 37)
    given = torch.full((10, 48), torch.nan, dtype=torch.float16)
    library().pack_weight(
        Packing(
            source_dtype=torch.float32,
            dtype=torch.float16,
            segment_count=1,
            channels=[37],
            padded_in=16,
            taps=1,
            out_channels=10,
            columns=10,
            rows_are_outputs=1,
            source=weight,
            output=given,
        )
    )
    output = Guarded.empty((2, 10), (10, 1), x.dtype)
    library().head(operands(pitched(x), given, None, output))
    assert torch.equal(output.view, classify(x, weight.half(), None))


BAD = [
    Bad("dtype is 7, expected 0", {"dtype": 7}),
    Bad("batch is 0, expected a positive", {"batch": 0}),
    Bad("height is -1, expected a positive", {"pixels": -1}),
    Bad("input has more than 2147482624 pixels", {"batch": 2**16, "pixels": 2**16}),
    Bad("input is null", {"input.data": None}),
    Bad("input is not aligned to 16 bytes", {"input.data": misaligned(8)}),
    Bad("channels of the input is 36, expected a multiple of 16", {"input.channels": 36}),
    Bad("channels of the input is -16, expected a positive", {"input.channels": -16}),
    Bad(
        "channels of the input is 8208, expected at most 8192",
        {"input.pitch": 8208, "input.channels": 8208},
    ),
    Bad("pitch of the input is 40, expected at least 48", {"input.pitch": 40}),
    Bad("pitch of the input is 52, expected a multiple of 8", {"input.pitch": 52}),
    Bad("weight is null", {"weight": None}),
    Bad("weight is not aligned to 16 bytes", {"weight": misaligned(8)}),
    Bad("classes is 0, expected a positive", {"classes": 0}),
    Bad("classes is 1073741825, expected at most", {"classes": 2**30 + 1}),
    Bad("bias is not aligned to 4 bytes", {"bias": misaligned(2)}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 2 bytes", {"output": misaligned(1)}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments(bad: Bad) -> None:
    x, weight = pitched(torch.randn(2, 37, 5, 7).half()), packed(torch.randn(10, 37).half())
    output = Guarded.empty((2, 10), (10, 1), x.dtype)
    given = operands(x, weight, torch.randn(10), output)
    with pytest.raises(ValueError, match=bad.message):
        library().head(change(given, bad.changes))
    assert output.view.isnan().all()
    output.assert_rest_untouched()


PLANTED = [
    PlantedBug(
        "no barrier before the sums are added up",
        "  __syncthreads();\n  // Always",
        "  // Always",
        "head.cuh",
    ),
    PlantedBug(
        "no barrier before the means are read",
        "  __syncthreads();\n\n  const int lane",
        "\n  const int lane",
        "head.cuh",
    ),
    PlantedBug(
        "the last pixel counts more than once",
        "if (first + i * p.parts < head.pixels)",
        "if (first < head.pixels)",
        "head.cuh",
    ),
    PlantedBug(
        "every part adds all pixels",
        "int first = part; first < head.pixels",
        "int first = 0; first < head.pixels",
        "head.cuh",
    ),
    PlantedBug(
        "the first image only",
        "int64_t{image} * head.pixels *",
        "int64_t{0} * head.pixels *",
        "head.cuh",
    ),
    PlantedBug("sums instead of means", "total.x * p.reciprocal", "total.x", "head.cuh"),
    PlantedBug("a part is left out", "other < p.parts", "other < p.parts - 1", "head.cuh"),
    PlantedBug(
        "one plane's means for both",
        "sums[plane * vectors + first + 32 * i]",
        "sums[first + 32 * i]",
        "head.cuh",
    ),
    PlantedBug(
        "lanes left out of the sum",
        "distance > 0; distance /= 2",
        "distance > 1; distance /= 2",
        "head.cuh",
    ),
    PlantedBug(
        "a class of the next block",
        "first_class + p.classes_of_block, head.classes)",
        "first_class + p.classes_of_block, head.classes) + 1",
        "head.cuh",
    ),
    PlantedBug(
        "vectors behind the last",
        "if (first + 32 * i < vectors)",
        "if (first < vectors)",
        "head.cuh",
    ),
]


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_planted_bugs(bug: PlantedBug, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = bug.library("head.cu")
    monkeypatch.setattr(sys.modules[__name__], "library", lambda: mutated)

    def check() -> None:
        for case in CASES:
            for order in ("forward", "reverse"):
                with library().schedule(order):
                    run(case, torch.float16)

    with pytest.raises((AssertionError, EmulationError)):
        check()
