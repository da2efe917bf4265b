"""The CUDA kernels as nvcc compiles them for several architectures, against float64."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from op_cases import LAYOUTS

pytest.importorskip("triton")

import threshnet_fast as tf
from emulation import (
    cuda_library,
    cuda_operators,
    cuda_ptx,
    test_cuda_gather,
    test_cuda_head,
    test_cuda_implicit_gemm,
    test_cuda_packing,
    test_cuda_pool,
    test_cuda_stem_convolution,
)
from emulation.cuda_cases import DTYPES, available, library, output_map, pitched, window
from emulation.cuda_ptx import Rewrite, kernels, ptx_launches, ptx_operators
from emulation.mutation import without_instruction
from emulation.networks import first_blocks_of_threshnet79, odd
from emulation.ptx import PTXError, unsupported
from emulation.test_cuda_network import check_step_by_step

pytestmark = [
    available,
    pytest.mark.skipif(cuda_ptx.nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.usefixtures("one_thread"),
]

ARCHITECTURES = ["sm_80", "sm_90"]
MORE_ARCHITECTURES = ["sm_75", "sm_86", "sm_120"]


def sweep(*values: Any) -> list[Any]:
    """Returns values of a parameter, or tuples of several, that only the sweep takes."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.sweep)
        for value in values
    ]


# The convolution, by the cases of the test of its source.

Case = test_cuda_implicit_gemm.Case
CASES = test_cuda_implicit_gemm.CASES
TILES = test_cuda_implicit_gemm.TILES
convolve = test_cuda_implicit_gemm.run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case: Case, architecture: str) -> None:
    with ptx_launches(architecture):
        convolve(case, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("case", "architecture"),
    [(CASES[3], "sm_80"), (CASES[5], "sm_90"), (CASES[7], "sm_90"), (CASES[9], "sm_80")],
    ids=str,
)
def test_convolution_in_other_dtypes(case: Case, architecture: str, dtype: torch.dtype) -> None:
    with ptx_launches(architecture):
        convolve(case, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_every_tile(case: Case, dtype: torch.dtype, architecture: str) -> None:
    for tile in range(library().tile_count(dtype)):
        with ptx_launches(architecture) as log:
            convolve(replace(case, tile=tile), dtype)
        (launch,) = log
        assert launch.threads == library().tile_of(dtype, tile).threads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_reduction(dtype: torch.dtype, architecture: str) -> None:
    case = replace(TILES[1], tile=-1, parts=5, prologue=True, output_scale=True)
    with ptx_launches(architecture) as log:
        convolve(case, dtype)
    assert [launch.grid[1] for launch in log] == [5, 1]


@pytest.mark.parametrize("architecture", ["sm_80", *sweep("sm_90")])
@pytest.mark.parametrize("dtype", [torch.float16, *sweep(*DTYPES[1:])], ids=str)
def test_nan_and_infinity(dtype: torch.dtype, architecture: str) -> None:
    """ReLU is an instruction from sm_80 on, in the prologue a conversion."""
    with ptx_launches(architecture, races=False):
        test_cuda_implicit_gemm.nan_and_infinity(dtype, True, library())


# The other kernels, by the tests of their sources.


def gather(layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 37, 13, 17), (1, 130, 3, 5), (3, 3, 5, 7)):
        test_cuda_gather.run(LAYOUTS[layout](test_cuda_gather.special(shape, dtype)), gap=8)


def pack_weight(case: test_cuda_packing.Case, dtype: torch.dtype) -> None:
    test_cuda_packing.test_weight(case, torch.float32, dtype, "forward")


def rearrange_weight(case: test_cuda_packing.Case, dtype: torch.dtype) -> None:
    test_cuda_packing.test_weight(case, dtype, dtype, "forward")


def pack_vector(channels: tuple[int, ...], dtype: torch.dtype) -> None:
    test_cuda_packing.test_vector(channels, 16, dtype)


OPERATIONS = {
    "stem": (test_cuda_stem_convolution.run, test_cuda_stem_convolution.CASES),
    "pool": (test_cuda_pool.run, test_cuda_pool.CASES),
    "head": (test_cuda_head.run, test_cuda_head.CASES),
    "gather": (gather, LAYOUTS),
    "float32 weight": (pack_weight, test_cuda_packing.CASES),
    "weight": (rearrange_weight, test_cuda_packing.CASES),
    "vector": (pack_vector, [(40,), (40, 3, 17), (1,) * 16]),
}
"""What runs a case, and the cases."""

ALL = [(name, case) for name, (_, cases) in OPERATIONS.items() for case in cases]


def run(name: str, case: Any, dtype: torch.dtype) -> None:
    function, _ = OPERATIONS[name]
    function(case, dtype)


@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [
        (torch.float16, "sm_80"),
        (torch.float16, "sm_90"),
        (torch.bfloat16, "sm_90"),
        (torch.float32, "sm_80"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "case"), ALL, ids=str)
def test_other_kernels(name: str, case: Any, dtype: torch.dtype, architecture: str) -> None:
    with ptx_launches(architecture):
        run(name, case, dtype)


# Whole networks: every launch of the executor, with its arguments.

NETWORKS = {
    "odd": (odd, (2, 4, 40, 36)),
    "first blocks": (first_blocks_of_threshnet79, (2, 3, 32, 33)),
    "threshnet79": (lambda: tf.ThreshNet79(num_classes=10).eval(), (1, 3, 32, 32)),
}
"""What makes a model, and the shape of its input."""


@pytest.mark.skipif(
    cuda_operators.skip_reason() is not None, reason=str(cuda_operators.skip_reason())
)
@pytest.mark.parametrize(
    ("name", "dtype", "architecture"),
    [
        ("odd", torch.float16, "sm_80"),
        ("first blocks", torch.float16, "sm_90"),
        *sweep(
            ("odd", torch.float16, "sm_75"),
            ("odd", torch.bfloat16, "sm_80"),
            ("odd", torch.float32, "sm_90"),
            ("first blocks", torch.float16, "sm_75"),
            ("first blocks", torch.bfloat16, "sm_120"),
            ("first blocks", torch.float32, "sm_80"),
            ("threshnet79", torch.float16, "sm_90"),
            ("threshnet79", torch.float32, "sm_86"),
        ),
    ],
    ids=str,
)
def test_network(
    randomised: Callable[[torch.nn.Module], torch.nn.Module],
    name: str,
    dtype: torch.dtype,
    architecture: str,
) -> None:
    make, shape = NETWORKS[name]
    model = randomised(make())
    with (
        cuda_operators.emulated_cuda(architecture) as emulated,
        ptx_operators(emulated, architecture) as operators,
    ):
        algorithms = check_step_by_step(model, torch.randn(shape), dtype)
    assert len(operators.log) > len(algorithms)


def test_only_operands_are_in_bounds() -> None:
    """To the byte, also within a storage."""
    case = test_cuda_pool.Case(16, 1, (4, 4), (2, 2), 2, gap=0)
    x, output = (
        pitched(torch.randn(1, 16, 4, 4).half(), gap=8),
        output_map((1, 16, 2, 2), torch.half),
    )
    with ptx_launches("sm_80"):
        library().pool(test_cuda_pool.operands(case, x, output))
        for given in (
            test_cuda_pool.operands(case, x[..., :3], output),
            test_cuda_pool.operands(case, x, replace(output, view=output.view[:, :, :1])),
        ):
            given.window = window(x, (2, 2), 2, 0)
            with pytest.raises(PTXError, match="global access out of bounds"):
                library().pool(given)


# What holds for all of them.


def test_every_kernel_is_run() -> None:
    """The cases of this module reach all that nvcc compiles."""
    launched = set()
    call = cuda_library.Library.call

    def record(*arguments: Any, result: Any = None) -> Any:
        with library().recorded() as launches:
            returned = call(*arguments, result=result)
        launched.update(launch.kernel for launch in launches)
        return returned

    split = [replace(TILES[1], tile=0, parts=2)]
    tiles = [replace(case, tile=tile) for case in TILES for tile in range(6)]
    with mock.patch.object(cuda_library.Library, "call", record):
        for dtype in DTYPES:
            for case in [*split, *tiles]:
                # Nothing was computed.
                with contextlib.suppress(AssertionError):
                    convolve(case, dtype)
            for name, case in ALL:
                with contextlib.suppress(AssertionError):
                    run(name, case, dtype)
    assert launched == set(kernels("sm_80"))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *sweep(*MORE_ARCHITECTURES)])
def test_every_instruction_is_known(architecture: str) -> None:
    """Also those that no test reaches."""
    for name, text in kernels(architecture).items():
        assert unsupported(text, name) == [], name


@pytest.mark.sweep
def test_what_the_launchers_refuse_traps() -> None:
    assert library().objection(torch.bfloat16, 75) is not None
    with ptx_launches("sm_75"), pytest.raises(PTXError, match="the program trapped"):
        convolve(CASES[0], torch.bfloat16)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    CASES + test_cuda_implicit_gemm.WIDE + test_cuda_implicit_gemm.NETWORK,
    ids=str,
)
def test_all_convolutions(case: Case, dtype: torch.dtype, architecture: str) -> None:
    reason = library().objection(dtype, int(architecture.removeprefix("sm_")))
    if reason is not None:
        pytest.skip(reason)
    for tile in range(library().tile_count(dtype)):
        with ptx_launches(architecture):
            convolve(replace(case, tile=tile), dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), ALL, ids=str)
def test_all_other_kernels(name: str, case: Any, dtype: torch.dtype, architecture: str) -> None:
    with ptx_launches(architecture):
        run(name, case, dtype)


# Planted bugs.

NOTICED = (AssertionError, PTXError)
"""What a test may report: a wrong number, or something that a GPU forbids."""


def weakened(pattern: str, number: int) -> Rewrite:
    """Returns a rewriting that lets one wait leave one more group pending."""

    def rewrite(text: str, name: str) -> str:
        match = list(re.finditer(pattern, text))[number]
        pending = int(match.group(1)) + 1
        return text[: match.start(1)] + str(pending) + text[match.end(1) :]

    return rewrite


BARRIER = r"bar\.sync[ \t]+0"
WAIT = r"cp\.async\.wait_group[ \t]+(\d+)"
COMMIT = r"cp\.async\.commit_group"
SHUFFLE = r"shfl\.sync\.bfly\.b32[ \t][^;]*"


def unnoticed(architecture: str, run: Callable[[], None]) -> dict[str, list[int]]:
    """Drops and weakens each synchronisation of a launch; returns those that nothing needs."""
    with ptx_launches(architecture) as log:
        run()
    (launch,) = log
    found: dict[str, list[int]] = {}
    for pattern in (BARRIER, WAIT, COMMIT, SHUFFLE):
        for number in range(len(re.findall(pattern, launch.text))):
            rewritings = [without_instruction(pattern, number)]
            if pattern == WAIT:
                rewritings.append(weakened(pattern, number))
            for rewrite in rewritings:
                try:
                    with ptx_launches(architecture, rewrite=rewrite):
                        run()
                except NOTICED:
                    continue
                found.setdefault(pattern, []).append(number)
    return found


@pytest.mark.parametrize(
    ("dtype", "number", "prologue", "architecture"),
    [
        (torch.float16, 0, True, "sm_80"),
        (torch.float16, 5, False, "sm_90"),
        (torch.float32, 3, True, "sm_90"),
        *sweep(
            *(
                (torch.float16, number, prologue, "sm_90")
                for number in range(6)
                for prologue in (False, True)
            ),
            *((torch.bfloat16, number, True, "sm_80") for number in range(6)),
            *(
                (torch.float32, number, prologue, "sm_80")
                for number in range(4)
                for prologue in (False, True)
            ),
        ),
    ],
    ids=str,
)
def test_synchronisation_of_convolutions(
    dtype: torch.dtype, number: int, prologue: bool, architecture: str
) -> None:
    tile = library().tile_of(dtype, number)
    # The pipeline is full, and its last step is in the memory that results are rounded into.
    channels = (tile.stages + 1) * tile.depth
    case = Case((channels,), 1, (5, 7), 40, 1, padding=0, prologue=prologue, tile=number)
    # In float32, each thread stores the results that it rounded itself.
    expected = {BARRIER: [2]} if dtype == torch.float32 else {}
    assert unnoticed(architecture, lambda: convolve(case, dtype)) == expected


SYNCHRONISED = {
    "head": lambda: run("head", test_cuda_head.Case(37, 2, (5, 3), 33), torch.float16),
    "gather_pixels": lambda: test_cuda_gather.run(torch.randn(2, 37, 5, 7).half(), gap=0),
    "pack_weight": lambda: run("weight", test_cuda_packing.Case((40, 3), 33, 9), torch.float16),
}
"""Of the other kernels, those whose threads wait for each other."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SYNCHRONISED)
def test_synchronisation_of_other_kernels(name: str, architecture: str) -> None:
    assert unnoticed(architecture, SYNCHRONISED[name]) == {}


def test_other_kernels_need_no_synchronisation() -> None:
    patterns = (BARRIER, WAIT, COMMIT, SHUFFLE)
    synchronised = "|".join(["implicit_gemm", *SYNCHRONISED])
    for name, text in kernels("sm_80").items():
        if not re.search(f"({synchronised})_kernel", name):
            assert not any(re.search(pattern, text) for pattern in patterns), name


def swapped(pattern: str) -> Rewrite:
    """Returns a rewriting that swaps the two groups of the first match."""

    def rewrite(text: str, name: str) -> str:
        match = re.search(pattern, text)
        if match is None:
            raise ValueError(f"{name} has no {pattern!r}")
        (first, first_end), (second, second_end) = match.span(1), match.span(2)
        return (
            text[:first]
            + text[second:second_end]
            + text[first_end:second]
            + text[first:first_end]
            + text[second_end:]
        )

    return rewrite


def replaced(old: str, new: str) -> Rewrite:
    """Returns a rewriting of all matches."""

    def rewrite(text: str, name: str) -> str:
        changed, count = re.subn(old, new, text)
        if count == 0:
            raise ValueError(f"{name} has no {old!r}")
        return changed

    return rewrite


MMA = r"mma\.sync\S+\s*"
REGISTER = r"(%\w+)"

WRONG = {
    "rows of the left operand": swapped(MMA + r"\{[^}]*\}, \{" + REGISTER + ", " + REGISTER),
    "depth of the left operand": swapped(
        MMA + r"\{[^}]*\}, \{" + REGISTER + r", %\w+, " + REGISTER
    ),
    "depth of the right operand": swapped(
        MMA + r"\{[^}]*\}, \{[^}]*\}, \{" + REGISTER + ", " + REGISTER
    ),
    "neighbouring sums": swapped(MMA + r"\{" + REGISTER + ", " + REGISTER),
    "rows of the sums": swapped(MMA + r"\{" + REGISTER + r", %\w+, " + REGISTER),
    "right operand not transposed": replaced(r"(ldmatrix\S*)\.trans", r"\1"),
    "left operand transposed": replaced(r"(ldmatrix\S*\.x4)\.shared", r"\1.trans.shared"),
    "padding copied": replaced(r"(cp\.async\.cg\S+ [^;]*, 16, )%r\d+;", r"\g<1>16;"),
    "copies of 8 bytes": replaced(r"(cp\.async\.c)g(\S+ [^;]*), 16, %r\d+;", r"\1a\2, 8;"),
    "rounded to another dtype": replaced(r"cvt\.rn\.f16\.f32", "cvt.rn.bf16.f32"),
}


@pytest.mark.parametrize("bug", WRONG)
def test_wrong_instructions(bug: str) -> None:
    case = replace(TILES[1], tile=-1)
    with ptx_launches("sm_80", rewrite=WRONG[bug]), pytest.raises(NOTICED) as caught:
        convolve(case, torch.float16)
    assert "not supported" not in str(caught.value)
