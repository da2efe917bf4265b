"""The choice of tiles: total, deterministic, within limits, and sensible at the extremes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from threshnet_fast.kernels import configurations
from threshnet_fast.kernels.configurations import ARCHITECTURES, Problem, choose

CLASSES = [
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
]
SIZES = [
    (pixels, out, channels, taps)
    for pixels in (1, 49, 3136, 10**6, 2**31 - 1)
    for out in (16, 32, 128, 960)
    for channels in (16, 480, 2000)
    for taps in (0, 1, 9)
]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_choice_fits(architecture: str) -> None:
    found = ARCHITECTURES[architecture]
    for dtype, precision in CLASSES:
        if configurations.precision_for(architecture, precision) != precision:
            continue
        allowed = configurations.candidates(found, dtype, precision)
        for pixels, out, channels, taps in SIZES:
            problem = Problem(pixels, out, channels, taps, dtype, precision)
            chosen = choose(problem, architecture, found.multiprocessors)
            tile = configurations.Configuration(
                chosen.block_m,
                chosen.block_n,
                chosen.block_k,
                chosen.num_warps,
                chosen.num_stages,
            )
            assert tile in allowed
            assert configurations.shared_bytes(chosen, dtype) <= found.shared_bytes
            # The reduction of a split sum counts in 32 bits.
            assert chosen.split_k * pixels < 2**31


def test_few_pixels_split_the_reduction() -> None:
    problem = Problem(49, 160, 1024, 9, torch.float16)
    assert choose(problem, "sm_90", 132).split_k > 1


def test_many_pixels_do_not() -> None:
    problem = Problem(10**6, 160, 1024, 9, torch.float16)
    chosen = choose(problem, "sm_90", 132)
    assert chosen.split_k == 1
    assert chosen.block_m == 128


def test_estimate_by_hand() -> None:
    """One program: 4 steps of 64x64x64 in float16 on sm_80, each bound by latency."""
    configuration = configurations.Configuration(64, 64, 64, 4, 3)
    problem = Problem(64, 64, 256, 1, torch.float16)
    cycles = configurations.estimate(problem, configuration, ARCHITECTURES["sm_80"], 108)
    arithmetic, traffic = 2 * 64**3 / 2048, 2 * 64 * 64 * 2 / 32
    step = max(arithmetic, traffic, 600 / 2)
    assert cycles == 2000 + 4 * step + 64 * 64 * 2 / 32


def test_more_work_never_takes_less() -> None:
    def least(pixels: int, channels: int) -> float:
        problem = Problem(pixels, 128, channels, 9, torch.float16)
        chosen = choose(problem, "sm_90", 132)
        return configurations.estimate(problem, chosen, ARCHITECTURES["sm_90"], 132)

    for pixels in (49, 196, 3136, 50176):
        assert least(pixels, 256) <= least(pixels, 512) <= least(4 * pixels, 512)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sm_90", "sm_90"),
        ("sm_87", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_70", "sm_75"),
        ("gfx950", "gfx942"),
        ("gfx1201", "gfx1100"),
        ("gfx906", "gfx90a"),
        ("gfx9-4-generic", "gfx90a"),
    ],
)
def test_unknown_architectures_take_a_neighbour(name: str, expected: str) -> None:
    assert configurations.find_architecture(name).name == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sm_75", "ieee"), ("gfx90a", "ieee"), ("gfx1100", "ieee"), ("sm_80", "tf32")],
)
def test_tf32_only_where_there_is_any(name: str, expected: str) -> None:
    assert configurations.precision_for(name, "tf32") == expected
    assert configurations.precision_for(name, "ieee") == "ieee"


def test_a_network_needs_few_tiles() -> None:
    """Every tile is a compilation that the first call waits for."""
    for dtype, precision in CLASSES:
        for architecture in ARCHITECTURES.values():
            assert len(configurations.candidates(architecture, dtype, precision)) <= 7
