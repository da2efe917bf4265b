"""The convolution kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The default run compiles a few tiles, the sweep all of the library.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emulation.cuda_cases import DTYPES, available, library, window
from emulation.cuda_library import (
    Configuration,
    Convolution,
    EmulationError,
    SanitizedLibrary,
    Segment,
    load,
    mutation,
)
from emulation.test_cuda_implicit_gemm import CASES as WHOLE_CASES
from emulation.test_cuda_implicit_gemm import Case, run
from emulation.test_cuda_mutations import (
    CASES,
    HEADER,
    LOOP_BARRIER,
    SOURCES,
    few_kernels,
)

pytestmark = [available, pytest.mark.usefixtures("one_thread")]

VARIANTS = ["address", "undefined", "thread"]


def few(variant: str, mutations: dict[str, str] | None = None) -> SanitizedLibrary:
    loaded = load(variant, SOURCES, mutations=few_kernels() | (mutations or {}))
    assert isinstance(loaded, SanitizedLibrary)
    return loaded


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_reports(case: Case, variant: str) -> None:
    run(case, torch.float16, few(variant))


def tight() -> Convolution:
    """Returns a convolution whose memory ends where its operands end."""
    x = torch.randn(1, 4, 4, 16).half().permute(0, 3, 1, 2)
    output = torch.empty(1, 4, 4, 16, dtype=torch.float16)
    return Convolution(
        dtype=torch.float16,
        segment_count=1,
        segments=[Segment(data=x, pitch=16, channels=16)],
        window=window(x, (3, 3), 1, 1),
        weight=torch.randn(3, 3, 16, 16).half(),
        weight_columns=16,
        out_channels=16,
        output=output,
        output_pitch=16,
    )


def misaligned_output() -> Convolution:
    convolution = tight()
    convolution.output = torch.empty(1 + 4 * 4 * 16, dtype=torch.float16)[1:]
    return convolution


# What is run, what the source says, what it says with the bug, and what is reported.
BUGS = {
    "address": (
        tight,
        "y >= 0 && y < p.in_height",
        "y >= 0 && y <= p.in_height",
        "heap-buffer-overflow",
    ),
    "undefined": (misaligned_output, "p.vector_store && count ==", "count ==", "misaligned"),
    "thread": (
        tight,
        LOOP_BARRIER,
        LOOP_BARRIER.replace("    __syncthreads();\n", ""),
        "data race",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reports(variant: str) -> None:
    operands, old, new, report = BUGS[variant]
    configuration = Configuration(tile=0, parts=1)
    few(variant).convolve(operands(), configuration)
    broken = few(variant, mutation(HEADER, old, new))
    with pytest.raises(EmulationError, match=report):
        broken.convolve(operands(), configuration)


@pytest.mark.sweep
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WHOLE_CASES, ids=str)
def test_every_tile_has_no_reports(case: Case, dtype: torch.dtype, variant: str) -> None:
    whole = load(variant)
    assert isinstance(whole, SanitizedLibrary)
    for tile in range(library().tile_count(dtype)):
        run(replace(case, tile=tile), dtype, whole)
