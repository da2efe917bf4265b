"""Convolution of segments by the CUDA kernels on fibers, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional

from emulation.cuda_cases import (
    DTYPES,
    SCHEDULES,
    Bad,
    Guarded,
    available,
    change,
    fenced,
    library,
    misaligned,
    output_map,
    pitch,
    pitched,
    segment,
    whole,
    window,
)
from emulation.cuda_library import Configuration, Convolution, Device, Library, Segment

pytestmark = [available, pytest.mark.usefixtures("one_thread")]

H100 = {"architecture": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}


@dataclass(frozen=True)
class Case:
    """A convolution of segments, all in one buffer unless they are ``apart``.

    Attributes:
        shift: Elements from an aligned address to the output.
        stored: Channels that are stored; 0 for whole groups.
        tile: A row of the table of tiles; None for what the launcher chooses for a large GPU.
        parts: Of the reduction, if there is a tile.
    """

    channels: tuple[int, ...]
    batch: int
    size: tuple[int, int]
    out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    prologue: bool = False
    relu: bool = True
    bias: bool = True
    output_scale: bool = False
    apart: bool = False
    shift: int = 0
    stored: int = 0
    tile: int | None = None
    parts: int = 1

    def __str__(self) -> str:
        n, (h, w) = self.batch, self.size
        flags = "-prologue" * self.prologue + "-apart" * self.apart
        tile = "" if self.tile is None else f"-tile{self.tile}in{self.parts}"
        return (
            f"{'+'.join(map(str, self.channels))}to{self.out}-{n}x{h}x{w}-k{self.kernel}"
            f"s{self.stride}p{self.padding}{flags}{tile}"
        )


CASES = [
    Case((64,), 1, (7, 7), 128, 1, padding=0, prologue=True),
    Case((76,), 3, (5, 3), 12, 1, padding=0, prologue=True, shift=1),
    Case((128,), 1, (7, 7), 32, relu=False),
    Case((68, 40, 16, 116, 24), 1, (4, 4), 68, output_scale=True),
    Case((48, 16), 2, (13, 17), 40, apart=True, stored=37, shift=3),
    Case((40, 3, 17), 1, (5, 7), 33, stride=2, apart=True, prologue=True, output_scale=True),
    Case((196,), 1, (2, 2), 40, tile=-1, parts=3),
    Case((272, 160), 2, (1, 1), 40, tile=-1, parts=4, output_scale=True, stored=39),
    Case((16,), 1, (1, 1), 16, stride=2, padding=2, tile=-1, parts=2, bias=False),
    Case((16,) * 16, 1, (3, 3), 16, bias=False),
]

WIDE = [
    Case((480,), 3, (7, 7), 68, 1, padding=0),
    Case((16, 32, 48, 64, 80), 2, (13, 17), 40),
    Case((20, 12), 2, (9, 5), 24, 5, padding=2, apart=True, shift=5),
    Case((24,), 1, (6, 6), 8, 3, stride=3, padding=0, stored=8),
    Case((33,), 2, (3, 3), 17, 1, padding=2, prologue=True, apart=True, stored=17, shift=7),
    Case((96,), 1, (14, 14), 128, 1, padding=0, prologue=True, tile=-1, parts=2),
    Case((64,), 1, (3, 3), 16, 7, padding=3),
    Case((4,), 1, (1, 2), 8, 1, stride=5, padding=3, apart=True),
]


def operands(
    case: Case, dtype: torch.dtype
) -> tuple[Convolution, Configuration, Callable[[], None]]:
    """Returns what the launcher is to be given, and the check of what it computed."""
    xs = [torch.randn(case.batch, count, *case.size).to(dtype) for count in case.channels]
    total = sum(case.channels)
    length = total * case.kernel**2
    weight = (torch.randn(case.out, total, case.kernel, case.kernel) / length**0.5).to(dtype)
    bias = torch.randn(case.out) if case.bias else torch.zeros(case.out)
    output_scale = torch.randn(case.out) if case.output_scale else torch.ones(case.out)
    scale, shift = torch.randn(total), torch.randn(total)

    if case.apart:
        segments = [segment(pitched(x, gap=8 * number)) for number, x in enumerate(xs)]
    else:
        segments = in_one_buffer(xs)
    size = [(extent + 2 * case.padding - case.kernel) // case.stride + 1 for extent in case.size]
    stored = case.stored or whole(case.out)
    gap = 5 if case.shift else 16
    output = output_map((case.batch, stored, *size), dtype, gap=gap, shift=case.shift)
    convolution = Convolution(
        dtype=dtype,
        segment_count=len(segments),
        segments=segments,
        window=window(xs[0], (case.kernel, case.kernel), case.stride, case.padding),
        weight=packed_weight(weight, case.channels),
        weight_columns=whole(case.out),
        out_channels=stored,
        scale=packed_vector(scale, case.channels) if case.prologue else None,
        shift=packed_vector(shift, case.channels) if case.prologue else None,
        output_scale=packed_vector(output_scale, [case.out]) if case.output_scale else None,
        bias=packed_vector(bias, [case.out]) if case.bias else None,
        output=output.view,
        output_pitch=pitch(output.view),
        relu=case.relu,
    )
    if case.tile is None:
        device = Device(architecture=90, multiprocessors=132, shared_bytes=227 * 1024)
        configuration = library().choose(convolution, device)
    else:
        tile = case.tile % library().tile_count(dtype)
        configuration = Configuration(tile=tile, parts=case.parts)
    partials = library().partial_floats(convolution, configuration)
    if partials:
        convolution.partials = torch.full((partials,), torch.nan)

    def check() -> None:
        x, magnitude = torch.cat(xs, 1).double(), torch.cat(xs, 1).double().abs()
        if case.prologue:
            affine = scale.double()[:, None, None], shift.double()[:, None, None]
            magnitude = magnitude * affine[0].abs() + affine[1].abs()
            x = functional.relu(x * affine[0] + affine[1])
        factor, added = output_scale.double()[:, None, None], bias.double()[:, None, None]

        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            return functional.conv2d(x, weight, None, case.stride, case.padding)

        exact = convolve(x, weight.double()) * factor + added
        energy = convolve(magnitude.square(), weight.double().square()) * factor.square()
        sizes = convolve(magnitude, weight.double().abs()) * factor.abs() + added.abs()
        bound = accumulated_bound(
            exact,
            energy,
            sizes,
            length + 1,
            store=torch.finfo(dtype).eps / 2,
            factor=torch.finfo(dtype).eps / 2 if case.prologue else 0.0,
        )
        expected = functional.relu(exact) if case.relu else exact
        used = min(stored, case.out)
        assert_within(output.view[:, :used], expected[:, :used], bound[:, :used])
        assert (output.view[:, used:] == 0).all(), "the rest of the last group is not 0"
        output.assert_rest_untouched()

    return convolution, configuration, check


def in_one_buffer(xs: list[Tensor]) -> list[Segment]:
    """Places segments beside each other in the pixels of one buffer, in reverse order."""
    slots = [functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % 16)) for x in reversed(xs)]
    whole_map = pitched(torch.cat(slots, 1))
    segments = []
    end = whole_map.shape[1]
    for x in xs:
        first = end - whole(x.shape[1])
        segments.append(segment(whole_map[:, first:end]))
        end = first
    return segments


def packed_weight(weight: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Returns ``[kernel height, kernel width, whole groups of channels, of output channels]``."""
    columns = functional.pad(weight.permute(2, 3, 1, 0), (0, -weight.shape[0] % 16))
    parts = [
        functional.pad(part, (0, 0, 0, -part.shape[2] % 16)) for part in columns.split(channels, 2)
    ]
    return fenced(torch.cat(parts, 2))


def packed_vector(vector: Tensor, channels: Sequence[int]) -> Tensor:
    """Returns whole groups of the channels of each segment."""
    parts = [functional.pad(part, (0, -len(part) % 16)) for part in vector.split(list(channels))]
    return fenced(torch.cat(parts))


def run(case: Case, dtype: torch.dtype, of: Library | None = None) -> None:
    """Runs the kernels and compares all that they wrote with float64.

    Args:
        case: What to compute.
        dtype: In what.
        of: The library, perhaps with a planted bug.
    """
    convolution, configuration, check = operands(case, dtype)
    (of or library()).convolve(convolution, configuration)
    check()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_convolution(case: Case, dtype: torch.dtype, schedule: str) -> None:
    with library().schedule(schedule):
        run(case, dtype)


TILES = [
    Case((40, 24), 1, (5, 6), 24, prologue=True),
    Case((36, 3), 3, (3, 7), 72, stride=2, apart=True, shift=1),
    Case((144,), 1, (13, 11), 136, 1, padding=0, prologue=True),
]
"""Run in each tile: fewer pixels and channels than most tiles have, and more than some."""


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_every_tile(case: Case, dtype: torch.dtype, parts: int) -> None:
    for tile in range(library().tile_count(dtype)):
        with library().schedule("shuffled", seed=tile):
            run(replace(case, tile=tile, parts=parts), dtype)


NETWORK = [
    Case((128,), 1, (28, 28), 32, tile=2),
    Case((320,), 1, (14, 14), 128, 1, padding=0, prologue=True),
    Case((40, 68, 116, 196), 1, (14, 14), 68),
    Case((160, 272, 462), 1, (7, 7), 272),
    Case((480,), 2, (7, 7), 160),
]
"""Layers of ThreshNet, at their real sizes."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NETWORK, ids=str)
def test_layers_of_the_network(case: Case, dtype: torch.dtype) -> None:
    run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [False, True])
def test_nan_and_infinity(dtype: torch.dtype, prologue: bool) -> None:
    nan_and_infinity(dtype, prologue, library())


def nan_and_infinity(dtype: torch.dtype, prologue: bool, of: Library) -> None:
    """They reach the outputs whose windows hold them, through ReLU too, and no others."""
    x = torch.randn(1, 16, 9, 9).to(dtype)
    x[0, 3, 2, 2], x[0, 5, 6, 7] = torch.nan, torch.inf
    weight = (0.1 + torch.rand(16, 16, 3, 3)).to(dtype)
    output = output_map((1, 16, 9, 9), dtype)
    ones, zeros = fenced(torch.ones(16)), fenced(torch.zeros(16))
    convolution = Convolution(
        dtype=dtype,
        segment_count=1,
        segments=[segment(pitched(x))],
        window=window(x, (3, 3), 1, 1),
        weight=packed_weight(weight, (16,)),
        weight_columns=16,
        out_channels=16,
        scale=ones if prologue else None,
        shift=zeros if prologue else None,
        output=output.view,
        output_pitch=pitch(output.view),
        relu=True,
    )
    for tile, parts in itertools.product(range(of.tile_count(dtype)), (1, 2)):
        configuration = Configuration(tile=tile, parts=parts)
        convolution.partials = torch.full((max(1, parts * 81 * 16),), torch.nan)
        output.view.fill_(torch.nan)
        of.convolve(convolution, configuration)
        near_nan = torch.zeros(9, 9, dtype=torch.bool)
        near_nan[1:4, 1:4] = True
        near_infinity = torch.zeros(9, 9, dtype=torch.bool)
        near_infinity[5:8, 6:9] = True
        assert torch.equal(output.view.isnan(), near_nan.expand(1, 16, 9, 9))
        assert torch.equal(output.view.isposinf(), near_infinity.expand(1, 16, 9, 9))


def test_offsets_beyond_32_bits() -> None:
    """Pixels more than 2^31 elements apart; the gaps stay untouched."""
    far = 2**30 + 64
    x = torch.empty(2 * far + 16, dtype=torch.float16).as_strided((1, 16, 1, 3), (0, 1, 0, far))
    y = torch.empty(2 * far + 16, dtype=torch.float16).as_strided(x.shape, x.stride())
    x.copy_(torch.randn(1, 16, 1, 3))
    y.fill_(torch.nan)
    identity = torch.eye(16, dtype=torch.float16)[:, :, None, None]
    convolution = Convolution(
        dtype=torch.float16,
        segment_count=1,
        segments=[Segment(data=x, pitch=far, channels=16)],
        window=window(x, (1, 1), 1, 0),
        weight=packed_weight(identity, (16,)),
        weight_columns=16,
        out_channels=16,
        output=y,
        output_pitch=far,
    )
    library().convolve(convolution, Configuration(tile=4, parts=1))
    assert torch.equal(x, y)


SMALL = Case((16, 20), 2, (5, 7), 24, prologue=True, tile=1, parts=2)

BAD = [
    Bad("dtype is unknown", {"dtype": 3}),
    Bad("segment_count is 0, expected a positive", {"segment_count": 0}),
    Bad("segment_count is 17, expected at most 16", {"segment_count": 17}),
    Bad("input is null", {"segment_count": 3}),
    Bad("weight is null", {"weight": None}),
    Bad("weight is not aligned to 16 bytes", {"weight": misaligned(8)}),
    Bad("weight_columns is 0, expected a positive", {"weight_columns": 0}),
    Bad("weight_columns is 24, expected a multiple of 16", {"weight_columns": 24}),
    Bad("out_channels is 0, expected a positive", {"out_channels": 0}),
    Bad("out_channels is 33, expected at most 32", {"out_channels": 33}),
    Bad("scale or shift is null, expected both or none", {"shift": None}),
    Bad("scale is not aligned to 16 bytes", {"scale": misaligned(4)}),
    Bad("shift is not aligned to 16 bytes", {"shift": misaligned(8)}),
    Bad("output_scale is not aligned to 16 bytes", {"output_scale": misaligned(4)}),
    Bad("bias is not aligned to 16 bytes", {"bias": misaligned(12)}),
    Bad("output is null", {"output": None}),
    Bad("output is not aligned to 2 bytes", {"output": misaligned(1)}),
    Bad("output_pitch is 31, expected at least 32", {"output_pitch": 31}),
    Bad("partials is null", {"partials": None}),
    Bad("partials is not aligned to 16 bytes", {"partials": misaligned(4)}),
    Bad("batch is 0, expected a positive", {"window.batch": 0}),
    Bad("input has more than 2147482624 pixels", {"window.batch": 2**27}),
    Bad("stride is 0, expected a positive", {"window.stride": 0}),
    Bad("padding is -1, expected at least 0", {"window.padding": -1}),
    Bad("extent of the kernel is 8, expected at most 7", {"window.kernel_height": 8}),
    Bad("out_height is 4, expected 5", {"window.out_height": 4}),
]


def bad_operands() -> tuple[Convolution, Configuration, Guarded]:
    convolution, configuration, _ = operands(SMALL, torch.float16)
    output = output_map((2, 32, 5, 7), torch.float16)
    convolution.output, convolution.output_pitch = output.view, pitch(output.view)
    return convolution, configuration, output


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments(bad: Bad) -> None:
    convolution, configuration, output = bad_operands()
    with pytest.raises(ValueError, match=bad.message):
        library().convolve(change(convolution, bad.changes), configuration)
    assert output.view.isnan().all()
    output.assert_rest_untouched()


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"tile": -1, "parts": 1}, "tile is -1, expected at least 0"),
        ({"tile": 99, "parts": 1}, "tile is 99, expected at most"),
        ({"tile": 0, "parts": 0}, "parts is 0, expected a positive"),
        ({"tile": 0, "parts": 65536}, "parts is 65536, expected at most 65535"),
    ],
)
def test_bad_configurations(configuration: dict[str, int], message: str) -> None:
    convolution, _, output = bad_operands()
    with pytest.raises(ValueError, match=message):
        library().convolve(convolution, Configuration(**configuration))
    assert output.view.isnan().all()


def problem(pixels: int, out: int, channels: int, taps: int = 1) -> Convolution:
    """Returns a convolution without memory, for the choice of its configuration."""
    kernel = 3 if taps == 9 else 1
    return Convolution(
        dtype=torch.float16,
        segment_count=1,
        segments=[Segment(pitch=channels, channels=channels)],
        window=window(
            torch.empty(1, channels, pixels, pixels, device="meta"),
            (kernel, kernel),
            1,
            kernel // 2,
        ),
        weight_columns=out,
        out_channels=out,
    )


def test_choice_of_tiles() -> None:
    """Large maps take large tiles whole, small ones small tiles, or a reduction in parts."""
    large = library().choose(problem(512, 128, 256), Device(**H100))
    small = library().choose(problem(7, 160, 480, taps=9), Device(**H100))
    wide = library().tile_of(torch.float16, large.tile)
    narrow = library().tile_of(torch.float16, small.tile)
    assert large.parts == 1
    assert small.parts > 1
    assert wide.pixels * wide.columns > narrow.pixels * narrow.columns
    alone = library().choose(
        problem(7, 160, 480, taps=9), Device(**(H100 | {"multiprocessors": 1}))
    )
    assert alone.parts == 1


def test_choice_of_tiles_fits_the_device() -> None:
    little = Device(architecture=75, multiprocessors=40, shared_bytes=36 * 1024)
    chosen = library().choose(problem(112, 128, 256), little)
    assert library().tile_of(torch.float16, chosen.tile).shared_bytes <= little.shared_bytes
    none = Device(architecture=75, multiprocessors=40, shared_bytes=1024)
    with pytest.raises(ValueError, match="too little shared memory for any tile"):
        library().choose(problem(112, 128, 256), none)
    with pytest.raises(ValueError, match="no multiprocessors"):
        library().choose(problem(7, 16, 16), Device(**(H100 | {"multiprocessors": 0})))


@pytest.mark.parametrize(
    ("dtype", "architecture", "message"),
    [
        (torch.float16, 70, "7.5 or newer"),
        (torch.bfloat16, 75, "bfloat16 needs tensor cores of compute capability 8.0"),
        (torch.float16, 75, None),
        (torch.float32, 75, None),
        (torch.bfloat16, 80, None),
    ],
)
def test_objections(dtype: torch.dtype, architecture: int, message: str | None) -> None:
    found = library().objection(dtype, architecture)
    assert (found is None) if message is None else (found is not None and message in found)
