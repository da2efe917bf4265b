"""Pooling, against PyTorch's own in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_within, dot_bound
from torch.nn import functional

pytest.importorskip("triton")

from threshnet_fast.kernels import launch, pool
from threshnet_fast.kernels.architectures import ARCHITECTURES

from emulation.driver import compiled_for, emulated
from emulation.interpreter import interpreted
from emulation.mutation import mutated
from emulation.ptx_types import PTXError
from emulation.resources import resources
from emulation.test_triton_implicit_gemm import poison

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float16, torch.float32, torch.bfloat16]

NEIGHBOUR = 123.0
"""In channels beside the output: unlike NaN, it shows also when NaN is written over it."""


@dataclass(frozen=True)
class Case:
    """A pooling between slices of two buffers, ``before`` channels into each."""

    channels: int
    batch: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: int
    padding: int = 0
    average: bool = False
    before: int = 16
    special: bool = False

    def __str__(self) -> str:
        n, (h, w), (kh, kw) = self.batch, self.size, self.kernel
        kind = "average" if self.average else "special" if self.special else "maximum"
        return f"{kind}-{n}x{self.channels}x{h}x{w}-k{kh}x{kw}s{self.stride}p{self.padding}"


CASES = [
    Case(64, 1, (19, 23), (3, 3), 2, 1),
    Case(80, 2, (7, 7), (2, 2), 2, special=True),
    Case(37, 3, (5, 7), (3, 3), 2, 1, before=3, special=True),
    Case(160, 1, (7, 7), (7, 7), 1, average=True),
    Case(20, 2, (6, 7), (2, 3), 2, average=True, before=1),
]

WIDE = [
    Case(480, 2, (13, 17), (2, 2), 2),
    Case(16, 2, (13, 17), (3, 3), 2, 1, special=True),
    Case(1, 3, (1, 1), (1, 1), 1),
    Case(1, 1, (1, 1), (3, 3), 2, 1, before=0, special=True),
    Case(17, 2, (9, 4), (5, 3), 3, 1, special=True),
    Case(960, 3, (1, 1), (1, 1), 1, average=True),
    Case(40, 2, (13, 17), (13, 17), 1, average=True),
    Case(3, 1, (8, 8), (4, 4), 4, average=True, before=5),
]


def run(case: Case, dtype: torch.dtype) -> None:
    """Runs the kernel on poisoned memory and compares all of it with float64."""
    n, c, before = case.batch, case.channels, case.before
    # Negative numbers, which a zero for padding would exceed.
    values = torch.randn(n, c, *case.size) - 3
    if case.special:
        for number, share in ((torch.nan, 0.05), (-torch.inf, 0.2), (torch.inf, 0.05)):
            values[torch.rand(values.shape) < share] = number
    source = poison((n, before + c + 5, *case.size), dtype)
    x = source[:, before : before + c]
    x.copy_(values)
    exact = (
        functional.avg_pool2d(x.double(), case.kernel, case.stride)
        if case.average
        else functional.max_pool2d(x.double(), case.kernel, case.stride, case.padding)
    )
    memory = poison((n, before + c + 16, *exact.shape[2:]), dtype).fill_(NEIGHBOUR)
    y = memory[:, before : before + c].fill_(torch.nan)
    launch.run(
        pool.pool(
            x,
            y,
            kernel=case.kernel,
            stride=case.stride,
            padding=case.padding,
            average=case.average,
        )
    )
    bound = torch.zeros_like(exact)
    if case.average:
        taps = case.kernel[0] * case.kernel[1]
        magnitude = functional.avg_pool2d(x.double().abs(), case.kernel, case.stride)
        bound = dot_bound(magnitude, taps, torch.float32) + torch.finfo(dtype).eps * exact.abs()
    assert_within(y, exact, bound)
    assert (memory[:, :before] == NEIGHBOUR).all(), "channels before the output were written"
    assert (memory[:, before + c :] == NEIGHBOUR).all(), "channels behind the output were written"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, architecture: str) -> None:
    with emulated(architecture):
        run(case, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "architecture"), [(CASES[1], "sm_90"), (CASES[4], "sm_80")], ids=str
)
def test_other_dtypes(case: Case, architecture: str, dtype: torch.dtype) -> None:
    with emulated(architecture):
        run(case, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_everything(case: Case, architecture: str, dtype: torch.dtype) -> None:
    with emulated(architecture):
        run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_interpreted(case: Case, dtype: torch.dtype) -> None:
    with interpreted():
        run(case, dtype)


@pytest.mark.parametrize("average", [False, True])
def test_offsets_beyond_32_bits(average: bool) -> None:
    """Pixels more than 2^31 elements apart; the gaps stay untouched."""
    far = 2**31 + 64
    x = torch.empty(far + 16, dtype=torch.float16).as_strided((1, 16, 1, 2), (far, 1, far, far))
    y = torch.empty(far + 16, dtype=torch.float16).as_strided((1, 16, 1, 2), (far, 1, far, far))
    x.copy_(torch.randn(1, 16, 1, 2))
    y.fill_(torch.nan)
    with interpreted():
        launch.run(pool.pool(x, y, kernel=(1, 1), stride=1, padding=0, average=average))
    assert torch.equal(x, y)


PLANTED = {
    "padding chosen": (
        0,
        'neutral: tl.constexpr = 0.0 if AVERAGE else float("-inf")',
        "neutral = 0.0",
    ),
    "NaN lost": (
        1,
        "tl.maximum(result, x, propagate_nan=tl.PropagateNan.ALL)",
        "tl.maximum(result, x)",
    ),
    "a tap missing": (
        4,
        "inside = m_exists & (first + tap < taps)",
        "inside = m_exists & (first + tap < taps - 1)",
    ),
    "padding wraps around": (0, "& (x_in >= 0) & (x_in < in_width)", "& (x_in < in_width)"),
    "channels not masked": (2, "c_exists = c < channels", "c_exists = c < channels + 1"),
    "rows of the wrong length": (
        0,
        "+ tap_row * in_width + tap_column",
        "+ tap_row * out_width + tap_column",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug: str) -> None:
    case, old, new = PLANTED[bug]
    noticed = pytest.raises((AssertionError, PTXError))
    with mutated(pool, old, new), emulated("sm_80"), noticed:
        run(CASES[case], torch.float16)


def compile_cases(architecture: str, dtypes: list[torch.dtype]) -> None:
    """No spills; the aligned slices of a network are loaded and stored as whole vectors."""
    with compiled_for(architecture) as log:
        for dtype in dtypes:
            for case in (CASES[0], CASES[2], CASES[3], WIDE[0]):
                x = poison((1, case.channels + 5 * (case.before % 16), 40, 40), dtype)
                y = poison((1, case.channels, 19, 19), dtype)
                options = {"kernel": case.kernel, "stride": 2, "padding": case.padding}
                launch.run(pool.pool(x[:, : case.channels], y, average=case.average, **options))
    for entry in log:
        used = resources(entry.compiled)
        assert used.spills == 0, (entry.compiled.src.constants, used)
    if architecture.startswith("sm_"):
        ptx = log[0].compiled.asm["ptx"]
        assert ptx.count("ld.global.v4.b32") >= 9, "loads are not vectors of 16 bytes"
        assert "st.global.v4.b32" in ptx, "stores are not vectors of 16 bytes"


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_resources(architecture: str) -> None:
    compile_cases(architecture, DTYPES[:1])


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources_everywhere(architecture: str) -> None:
    compile_cases(architecture, DTYPES)
