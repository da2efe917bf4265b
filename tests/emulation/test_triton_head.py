"""Global average pooling with a classifier, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerance import accumulated_bound, assert_within

pytest.importorskip("triton")

from threshnet_fast.kernels import head, launch, layout
from threshnet_fast.kernels.architectures import ARCHITECTURES

from emulation.driver import compiled_for, emulated
from emulation.interpreter import interpreted
from emulation.mutation import mutated
from emulation.ptx_types import PTXError
from emulation.resources import resources
from emulation.test_triton_implicit_gemm import ALL_DTYPES, ROUNDOFF, poison

pytestmark = pytest.mark.usefixtures("one_thread")

ONE, MANY = "one_image_kernel", "many_images_kernel"

BEHIND = 7
"""Elements behind the output, which must stay NaN."""


@dataclass(frozen=True)
class Case:
    """A head, and which kernel it should be: whole groups of input channels, or ragged ones."""

    channels: int
    batch: int
    size: tuple[int, int]
    classes: int
    kernel: str = ONE
    whole: bool = True
    bias: bool = True

    def __str__(self) -> str:
        n, (h, w) = self.batch, self.size
        return f"{self.kernel[:4]}-{n}x{self.channels}x{h}x{w}-{self.classes}"


CASES = [
    Case(320, 1, (7, 7), 10),
    Case(37, 3, (5, 3), 33, whole=False),
    Case(296, 2, (1, 1), 10, bias=False),
    Case(20, 51, (1, 1), 128, MANY),
    Case(37, 126, (3, 3), 100, MANY, whole=False, bias=False),
]

WIDE = [
    Case(960, 2, (7, 7), 1000),
    Case(40, 1, (13, 17), 7),
    Case(1, 1, (1, 1), 1, whole=False),
    Case(17, 3, (9, 9), 65, whole=False, bias=False),
    Case(40, 161, (5, 3), 97, MANY),
    Case(96, 320, (1, 1), 17, MANY, bias=False),
]


def run(case: Case, dtype: torch.dtype, precision: str) -> None:
    """Runs the kernel on poisoned memory and compares all of it with float64."""
    n, c = case.batch, case.channels
    whole = layout.padded(c) if case.whole else c
    before = 16 if case.whole else 3
    x = poison((n, before + whole + 16, *case.size), dtype)[:, before : before + whole]
    x[:, c:] = 0
    # Means that are not all close to 0.
    x[:, :c] = torch.randn(n, c, *case.size) + torch.randn(n, c, 1, 1)
    weight = (torch.randn(case.classes, c) / c**0.5).to(dtype)
    bias = torch.randn(case.classes) if case.bias else None
    memory = torch.full((n * case.classes + BEHIND,), torch.nan, dtype=dtype)
    y = memory[:-BEHIND].view(n, case.classes)
    (prepared,) = head.head(x, head.pack_head(weight, dtype), bias, y, precision=precision)
    assert prepared.kernel.__name__ == case.kernel
    prepared()

    values, weight = x[:, :c].double(), weight.double()
    added = 0 if bias is None else bias.double()
    means, sizes = values.mean((2, 3)), values.abs().mean((2, 3))
    exact = means @ weight.T + added
    bound = accumulated_bound(
        exact,
        means.square() @ weight.square().T,
        sizes @ weight.abs().T + (0 if bias is None else bias.double().abs()),
        c * case.size[0] * case.size[1] + 1,
        store=torch.finfo(dtype).eps / 2,
        factor=ROUNDOFF[dtype, precision] if case.kernel == MANY else 0.0,
    )
    assert_within(y, exact, bound)
    assert memory[-BEHIND:].isnan().all(), "memory behind the output was written"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, architecture: str) -> None:
    with emulated(architecture):
        run(case, torch.float16, "ieee")


@pytest.mark.parametrize(("dtype", "precision"), [k for k in ALL_DTYPES if k[0] != torch.float16])
@pytest.mark.parametrize(
    ("case", "architecture"), [(CASES[1], "sm_80"), (CASES[3], "sm_90")], ids=str
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


# Infinity meets the zeros of padded classes, which are not stored.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_image() -> None:
    x = torch.randn(3, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    x[1, 3, 0, 1], x[2, 5, 1, 1] = torch.nan, torch.inf
    weight = torch.rand(4, 16)
    y = torch.empty(3, 4)
    with interpreted():
        launch.run(head.head(x, head.pack_head(weight, x.dtype), None, y, precision="ieee"))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2] == torch.inf).all()


@pytest.mark.parametrize(
    ("kernel", "images", "far"), [(ONE, 2, 2**31 + 64), (MANY, 51, 43 * 10**6)]
)
def test_offsets_beyond_32_bits(kernel: str, images: int, far: int) -> None:
    """Images that lie more than 2^31 elements from the first; the gaps stay untouched."""
    memory = torch.empty((images - 1) * far + 16, dtype=torch.float16)
    x = memory.as_strided((images, 16, 1, 1), (far, 1, far, far))
    x.copy_(torch.randn(x.shape))
    weight = torch.randn(128, 16).half()
    y = torch.full((images, 128), torch.nan, dtype=torch.float16)
    with interpreted():
        (prepared,) = head.head(x, head.pack_head(weight, x.dtype), None, y, precision="ieee")
        assert prepared.kernel.__name__ == kernel
        prepared()
    exact = x[:, :, 0, 0].double() @ weight.double().T
    torch.testing.assert_close(y.double(), exact, rtol=2**-10, atol=2**-8)


@pytest.mark.parametrize(
    ("images", "classes", "size", "kernel"),
    [
        (1, 10, (7, 7), ONE),
        (1, 1000, (7, 7), ONE),
        (32, 10, (1, 1), ONE),
        (8, 1000, (7, 7), ONE),
        (256, 1000, (7, 7), MANY),
        (32, 1000, (1, 1), MANY),
    ],
)
def test_choice(images: int, classes: int, size: tuple[int, int], kernel: str) -> None:
    x, y = poison((images, 16, *size), torch.float16), torch.empty(images, classes)
    weight = torch.empty(16, layout.padded(classes), dtype=torch.float16)
    (prepared,) = head.head(x, weight, None, y, precision="ieee")
    assert prepared.kernel.__name__ == kernel


CHANNELS_OF_ONE = """c_exists = c < channels
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)"""
CHANNELS_OF_MANY = """c_exists = c < channels
        mask = m_exists[:, None] & c_exists[None, :]"""

PLANTED = {
    "a channel too many": (1, CHANNELS_OF_ONE, CHANNELS_OF_ONE.replace("channels", "channels + 1")),
    "a channel too few": (1, CHANNELS_OF_ONE, CHANNELS_OF_ONE.replace("channels", "channels - 1")),
    "a channel too many, many images": (
        4,
        CHANNELS_OF_MANY,
        CHANNELS_OF_MANY.replace("channels", "channels + 1"),
    ),
    "sum instead of mean": (1, "mean = tl.sum(sums, 0) / map_pixels", "mean = tl.sum(sums, 0)"),
    "a pixel of the next image": (
        1,
        "mask=(p < map_pixels)[:, None]",
        "mask=(p <= map_pixels)[:, None]",
    ),
    "a pixel of the next image, many images": (
        4,
        "mask=mask & (first + p < map_pixels)",
        "mask=mask & (first + p <= map_pixels)",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug: str) -> None:
    case, old, new = PLANTED[bug]
    noticed = pytest.raises((AssertionError, PTXError))
    with mutated(head, old, new), emulated("sm_80"), noticed:
        run(CASES[case], torch.float16, "ieee")


def compile_cases(architecture: str, dtypes: list[torch.dtype]) -> None:
    """No spills, within shared memory, and tensor cores where there are many images."""
    with compiled_for(architecture) as log:
        for dtype in dtypes:
            for images, channels, size, classes in (
                (1, 960, 7, 10),
                (1, 960, 7, 1000),
                (1, 960, 1, 10),
                (256, 960, 7, 1000),
                (1024, 37, 1, 1000),
            ):
                x = poison((1, 1024, size, size), dtype)[:, :channels]
                x = x.as_strided((images, *x.shape[1:]), (0, *x.stride()[1:]))
                weight = torch.empty(layout.padded(channels), layout.padded(classes), dtype=dtype)
                y = torch.empty(images, classes, dtype=dtype)
                bias = torch.empty(classes)
                launch.run(head.head(x, weight, bias, y, precision="ieee"))
    for entry in log:
        used = resources(entry.compiled)
        assert used.spills == 0, (entry.compiled.src.constants, used)
        assert used.fits
        if entry.name == MANY and not entry.compiled.src.signature["x_ptr"].endswith("fp32"):
            assert used.uses_tensor_cores


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_resources(architecture: str) -> None:
    compile_cases(architecture, [torch.float16])


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_75"])
def test_resources_everywhere(architecture: str) -> None:
    compile_cases(architecture, [torch.float16, torch.bfloat16, torch.float32])
