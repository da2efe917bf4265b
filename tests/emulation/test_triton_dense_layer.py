"""A dense layer in one kernel, inside the buffer of its block."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from tolerance import accumulated_bound, assert_within
from torch.nn import functional

pytest.importorskip("triton")

from threshnet_fast.kernels import dense_layer, launch, layout
from threshnet_fast.kernels.architectures import ARCHITECTURES, precision_for
from threshnet_fast.kernels.configurations import Configuration
from triton.runtime.errors import InterpreterError

from emulation.driver import Log, compiled_for, emulated
from emulation.interpreter import interpreted
from emulation.mutation import mutated
from emulation.ptx_types import PTXError
from emulation.resources import resources
from emulation.test_triton_implicit_gemm import ALL_DTYPES, ROUNDOFF, poison

pytestmark = pytest.mark.usefixtures("one_thread")

NEIGHBOUR = 123.0
"""In channels beside the output: unlike NaN, it shows also when NaN is written over it."""

SMALL_TILE = Configuration(16, 32, 16, 4, 3)


@dataclass(frozen=True)
class Case:
    """A layer that reads the first channels of a buffer and writes the next ones.

    ``programs`` is how many the scratch memory has room for.
    """

    channels: int
    batch: int
    size: tuple[int, int]
    bottleneck: int
    growth: int
    programs: int = 2
    bias: bool = True
    configuration: Configuration = SMALL_TILE

    def __str__(self) -> str:
        n, (h, w) = self.batch, self.size
        return f"{self.channels}to{self.bottleneck}to{self.growth}-{n}x{h}x{w}-p{self.programs}"


CASES = [
    Case(48, 1, (7, 7), 32, 16),
    # The first output channel is not at a whole group: the input's last group is written to.
    Case(40, 2, (5, 7), 48, 24, programs=3, configuration=Configuration(32, 32, 16, 4, 3)),
    Case(20, 3, (1, 1), 16, 12, programs=9, bias=False),
    Case(16, 1, (19, 23), 16, 16, configuration=Configuration(64, 16, 16, 4, 2)),
    Case(32, 1, (2, 29), 32, 80, programs=1, configuration=Configuration(16, 32, 32, 4, 1)),
]

WIDE = [
    Case(64, 2, (13, 17), 128, 32, programs=5, configuration=Configuration(32, 64, 32, 4, 3)),
    Case(100, 3, (7, 7), 160, 40, programs=4, configuration=Configuration(32, 128, 32, 4, 2)),
    Case(33, 2, (29, 2), 20, 5, programs=30),
    Case(7, 1, (1, 13), 12, 3, programs=1),
    Case(16, 1, (13, 1), 16, 16),
    Case(96, 1, (28, 28), 128, 32, programs=3, configuration=Configuration(64, 128, 32, 4, 3)),
]


def run(case: Case, dtype: torch.dtype, precision: str, log: Log | None = None) -> None:
    """Runs the kernel on poisoned memory and compares all of it with float64."""
    n, c, growth, bottleneck = case.batch, case.channels, case.growth, case.bottleneck
    # As in a network: zeros are written up to the end of the output's last group.
    stored = layout.padded(c + growth) - c
    memory = poison((n, c + stored + 16, *case.size), dtype).fill_(NEIGHBOUR)
    values = torch.randn(n, c, *case.size)
    memory[:, :c] = values
    memory[:, c : c + stored] = torch.nan
    x, y = memory[:, : layout.padded(c)], memory[:, c : c + stored]
    weight1 = (torch.randn(bottleneck, c, 1, 1) / c**0.5).to(dtype)
    weight2 = (torch.randn(growth, bottleneck, 3, 3) / (9 * bottleneck) ** 0.5).to(dtype)
    scale, shift = torch.randn(c), torch.randn(c)
    bias = torch.randn(bottleneck) if case.bias else None
    problem = dense_layer.Problem(
        n, *case.size, c, bottleneck, growth, dtype, precision, "sm_80", multiprocessors=1
    )
    tile = case.configuration
    whole = dense_layer.scratch_size(replace(problem, batch=1000), tile) // 2 * case.programs
    scratch = torch.full((whole,), torch.nan, dtype=dtype)
    if log is not None:
        log.mark_uninitialised(scratch, y)
    launch.run(
        dense_layer.dense_layer(
            x,
            layout.pack_weight(weight1, [c], dtype),
            (layout.pack_vector(scale, [c]), layout.pack_vector(shift, [c])),
            None if bias is None else layout.pack_vector(bias, [bottleneck]),
            layout.pack_weight(weight2, [bottleneck], dtype, stored),
            y,
            scratch=scratch,
            precision=precision,
            configuration=tile,
        )
    )

    features, weight1, weight2 = values.to(dtype).double(), weight1.double(), weight2.double()
    scale, shift = scale.double()[:, None, None], shift.double()[:, None, None]
    normalised = functional.relu(features * scale + shift)
    sizes = features.abs() * scale.abs() + shift.abs()
    inner = functional.conv2d(normalised, weight1, None if bias is None else bias.double())
    store, factor = torch.finfo(dtype).eps / 2, ROUNDOFF[dtype, precision]
    inner_bound = accumulated_bound(
        inner,
        functional.conv2d(sizes.square(), weight1.square()),
        functional.conv2d(sizes, weight1.abs(), None if bias is None else bias.double().abs()),
        c + 1,
        store=store,
        factor=factor,
    )
    inner = functional.relu(inner)
    exact = functional.conv2d(inner, weight2, padding=1)
    # Errors of the bottleneck are independent of each other, so their squares add.
    inherited = functional.conv2d(inner_bound.square(), weight2.square(), padding=1).sqrt()
    bound = inherited + accumulated_bound(
        exact,
        functional.conv2d(inner.square(), weight2.square(), padding=1),
        functional.conv2d(inner, weight2.abs(), padding=1),
        9 * bottleneck,
        store=store,
        factor=factor if precision == "tf32" else 0.0,
    )
    assert_within(y[:, :growth], exact, bound)
    assert (y[:, growth:] == 0).all(), "the rest of the last group is not 0"
    assert torch.equal(memory[:, :c], values.to(dtype)), "the input was written"
    assert (memory[:, c + stored :] == NEIGHBOUR).all(), "channels behind the output were written"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, architecture: str) -> None:
    with emulated(architecture) as log:
        run(case, torch.float16, "ieee", log)


@pytest.mark.parametrize(("dtype", "precision"), [k for k in ALL_DTYPES if k[0] != torch.float16])
@pytest.mark.parametrize(
    ("case", "architecture"), [(CASES[0], "sm_90"), (CASES[2], "sm_80")], ids=str
)
def test_other_dtypes(case: Case, architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture) as log:
        run(case, dtype, precision, log)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize(("dtype", "precision"), ALL_DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_everything(case: Case, architecture: str, dtype: torch.dtype, precision: str) -> None:
    with emulated(architecture) as log:
        run(case, dtype, precision, log)


@pytest.mark.parametrize(("dtype", "precision"), ALL_DTYPES)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_interpreted(case: Case, dtype: torch.dtype, precision: str) -> None:
    with interpreted():
        run(case, dtype, precision)


SHIPPED = [(torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


@pytest.mark.parametrize(
    ("architecture", "dtype", "precision"),
    [
        ("sm_90", *SHIPPED[0]),
        *(
            pytest.param(name, *each, marks=pytest.mark.sweep)
            for name in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120")
            for each in SHIPPED
        ),
    ],
)
def test_chosen_configuration(architecture: str, dtype: torch.dtype, precision: str) -> None:
    tile = dense_layer.choose(dtype, precision, architecture)
    with emulated(architecture) as log:
        run(Case(64, 1, (9, 11), 128, 32, 1, configuration=tile), dtype, precision, log)


def test_offsets_beyond_32_bits() -> None:
    """Pixels more than 2^31 elements apart; the gaps stay untouched."""
    far = 2**31 + 64
    x, y = (
        torch.empty(far + 16, dtype=torch.float16).as_strided((1, 16, 1, 2), (far, 1, far, far))
        for _ in range(2)
    )
    x.copy_(torch.rand(x.shape))
    y.fill_(torch.nan)
    weight1 = torch.rand(16, 16, 1, 1).half()
    weight2 = torch.rand(16, 16, 3, 3).half()
    affine = torch.ones(16), torch.zeros(16)
    with interpreted():
        launch.run(
            dense_layer.dense_layer(
                x,
                layout.pack_weight(weight1, [16], x.dtype),
                affine,
                None,
                layout.pack_weight(weight2, [16], x.dtype),
                y,
                scratch=torch.full((2 * 16 * 16,), torch.nan, dtype=x.dtype),
                precision="ieee",
                configuration=SMALL_TILE,
            )
        )
    exact = functional.conv2d(
        functional.conv2d(x.double(), weight1.double()), weight2.double(), padding=1
    )
    torch.testing.assert_close(y.double(), exact, rtol=2**-9, atol=0)


PLANTED = {
    "halo not masked at the right": (1, "& (x_in >= 0) & (x_in < width)", "& (x_in >= 0)"),
    "halo not masked at the left": (1, "& (x_in >= 0) & (x_in < width)", "& (x_in < width)"),
    "halo not masked above": (1, "(y_in >= 0) & (y_in < height)", "(y_in < height)"),
    "halo not masked below": (1, "(y_in >= 0) & (y_in < height)", "(y_in >= 0)"),
    "halo off by one": (0, "right = tap % 3 - 1", "right = tap % 3"),
    "output a pixel behind": (0, "slot + lanes - width - 1,", "slot + lanes - width,"),
    "bottleneck not far enough ahead": (4, "2 * (width + 1)", "width"),
    "ring not closed": (3, "tl.where(source < 0, source + RING, source)", "source"),
    "slots not in turn": (3, "step % (LEAD + 1) * BLOCK_M", "step % LEAD * BLOCK_M"),
    "programs share a ring": (
        0,
        "program.to(tl.int64) * ((LEAD + 1)",
        "program.to(tl.int64) * ((LEAD + 0)",
    ),
    "bias of another channel": (0, "bias_ptr + n", "bias_ptr + n // 2"),
    "channels behind the input read": (
        1,
        "tl.max_constancy(k < in_channels, VECTOR)",
        "k < in_channels + 8",
    ),
    "columns of the bottleneck missing": (
        1,
        "n_exists = n < BOTTLENECK",
        "n_exists = n < BOTTLENECK - 16",
    ),
    "a tile too few": (
        0,
        "steps = LEAD + tl.minimum(tiles,",
        "steps = LEAD - 1 + tl.minimum(tiles,",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_emulated(bug: str) -> None:
    case, old, new = PLANTED[bug]
    noticed = pytest.raises((AssertionError, PTXError))
    with mutated(dense_layer, old, new), emulated("sm_80") as log, noticed:
        run(CASES[case], torch.float16, "ieee", log)


# The interpreter runs one program after the other.
@pytest.mark.parametrize("bug", [bug for bug in PLANTED if bug != "programs share a ring"])
def test_planted_bugs_interpreted(bug: str) -> None:
    case, old, new = PLANTED[bug]
    noticed = pytest.raises((AssertionError, InterpreterError))
    with mutated(dense_layer, old, new), interpreted(), noticed:
        run(CASES[case], torch.float32, "ieee")


BARRIER = """        # The other threads read what this one has stored.
        tl.debug_barrier()
"""

# Where the compiler pipelines loads through shared memory, barriers of its own happen to stand
# between the store and the loads. Here, nothing else orders them.
UNPIPELINED = Case(32, 1, (5, 5), 32, 16, 1, configuration=Configuration(16, 32, 16, 4, 1))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_dropped_barrier(architecture: str) -> None:
    with emulated(architecture) as log:
        run(UNPIPELINED, torch.float16, "ieee", log)
    error = pytest.raises(PTXError, match="race")
    with mutated(dense_layer, BARRIER, ""), emulated(architecture) as log, error:
        run(UNPIPELINED, torch.float16, "ieee", log)


def is_ordered(assembly: str) -> bool:
    """Whether, in AMD's assembly, a barrier follows the first stores before anything is loaded."""
    pattern = r"^\s+(?:(?:buffer|global)_(load|store)_|s_(barrier))"
    kinds = [load or barrier for load, barrier in re.findall(pattern, assembly, re.MULTILINE)]
    after = kinds[kinds.index("store") :]
    return next(kind for kind in after if kind != "store") == "barrier"


@pytest.mark.parametrize("architecture", ["gfx942", "gfx90a", "gfx1100"])
def test_barrier_orders_memory_on_amd(architecture: str) -> None:
    """AMD's code cannot be emulated; there, no other barrier stands in for the kernel's own."""
    tile = dense_layer.choose(torch.float16, "ieee", architecture)
    # One tile of the bottleneck's channels: behind it, the text goes on with the barrier.
    layer = (64, tile.block_n, 32)
    compiled = compile_layer(architecture, torch.float16, "ieee", tile, *layer)
    assert is_ordered(compiled.asm["amdgcn"])
    with mutated(dense_layer, BARRIER, ""):
        compiled = compile_layer(architecture, torch.float16, "ieee", tile, *layer)
    assert not is_ordered(compiled.asm["amdgcn"])


def compile_layer(
    architecture: str,
    dtype: torch.dtype,
    precision: str,
    tile: Configuration,
    channels: int,
    bottleneck: int,
    growth: int,
):
    memory = poison((1, 512, 56, 56), dtype)
    with compiled_for(architecture) as log:
        launch.run(
            dense_layer.dense_layer(
                memory[:, : layout.padded(channels)],
                layout.pack_weight(torch.empty(bottleneck, channels, 1, 1), [channels], dtype),
                (torch.empty(layout.padded(channels)), torch.empty(layout.padded(channels))),
                torch.empty(layout.padded(bottleneck)),
                layout.pack_weight(torch.empty(growth, bottleneck, 3, 3), [bottleneck], dtype, 64),
                memory[:, channels : layout.padded(channels + growth)],
                scratch=torch.empty(2**20, dtype=dtype),
                precision=precision,
                configuration=tile,
            )
        )
    return log[0].compiled


def check_resources(architecture: str, layers: list[tuple[int, int, int]]) -> None:
    """No spills, within shared memory, tensor cores where there are some."""
    found = ARCHITECTURES[architecture]
    for dtype, precision in [*SHIPPED, (torch.bfloat16, "ieee")]:
        if precision_for(architecture, precision) != precision:
            continue
        tile = dense_layer.choose(dtype, precision, architecture)
        for layer in layers:
            if architecture == "gfx90a" and layer[0] % layout.GROUP:
                # Spills three scalar registers in bfloat16; nothing is predicted to pay there.
                continue
            used = resources(compile_layer(architecture, dtype, precision, tile, *layer))
            assert used.spills == 0, (dtype, precision, layer, used)
            assert used.fits
            rate = {"tf32": found.tf32}.get(precision, found.half)
            if (dtype, precision) != (torch.float32, "ieee") and rate != found.full:
                assert used.uses_tensor_cores


# Of ThreshNet; of DenseNet-161; with channels that are no whole groups.
LAYERS = [(160, 128, 32), (192, 192, 48), (100, 48, 12)]


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_resources(architecture: str) -> None:
    check_resources(architecture, LAYERS[:1])


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_75"])
def test_resources_everywhere(architecture: str) -> None:
    check_resources(architecture, LAYERS)


def problem(batch: int, size: int, **changes) -> dense_layer.Problem:
    layer = dense_layer.Problem(
        batch, size, size, 160, 128, 32, torch.float16, "ieee", "sm_90", multiprocessors=132
    )
    return replace(layer, **changes)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # Large maps in a large batch: the bottleneck does not fit in the cache.
        (problem(256, 56), True),
        (problem(256, 56, dtype=torch.bfloat16), True),
        (problem(256, 56, architecture="sm_80", multiprocessors=108), True),
        # It fits.
        (problem(1, 56), False),
        (problem(256, 7), False),
        # Bound by arithmetic, of which there would be more.
        (problem(256, 56, dtype=torch.float32), False),
        # The rings do not fit in the cache.
        (problem(256, 56, architecture="sm_86", multiprocessors=20), False),
        # Not in the table.
        (problem(256, 56, architecture="sm_75"), False),
        (problem(256, 56, architecture="interpreter"), False),
        (problem(256, 56, architecture="gfx90a", dtype=torch.float32, precision="tf32"), False),
    ],
)
def test_pays(layer: dense_layer.Problem, expected: bool) -> None:
    assert dense_layer.pays(layer) is expected


def test_scratch_is_for_programs_that_have_work() -> None:
    tile = Configuration(64, 128, 32, 4, 3)
    ring = 3 * 64 * 128
    assert dense_layer.scratch_size(problem(1, 56), tile) == 49 * ring
    assert dense_layer.scratch_size(problem(64, 56), tile) == 2 * 132 * ring
