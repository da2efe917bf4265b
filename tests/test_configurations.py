"""The choice of tiles: total, deterministic, within limits, and sensible at the extremes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from emulation.architectures import ARCHITECTURES as EMULATED
from threshnet_fast.kernels import configurations
from threshnet_fast.kernels.architectures import ARCHITECTURES, find_architecture, precision_for
from threshnet_fast.kernels.configurations import Problem, choose

import threshnet_fast as tf
from threshnet_fast.engines.triton_plan import Target, _group
from threshnet_fast.plan.ir import Plan
from threshnet_fast.plan.lower import lower

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
        if precision_for(architecture, precision) != precision:
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
        ("gfx908", "gfx90a"),
        ("gfx1030", "gfx1100"),
        ("gfx9-4-generic", "gfx90a"),
    ],
)
def test_unknown_architectures_take_a_neighbour(name: str, expected: str) -> None:
    assert find_architecture(name).name == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sm_70", "ieee"),
        ("sm_75", "ieee"),
        ("sm_80", "tf32"),
        ("sm_121", "tf32"),
        ("gfx90a", "ieee"),
        ("gfx942", "tf32"),
        ("gfx950", "ieee"),
        ("gfx1100", "ieee"),
        ("interpreter", "tf32"),
    ],
)
def test_tf32_only_where_there_is_any(name: str, expected: str) -> None:
    assert precision_for(name, "tf32") == expected
    assert precision_for(name, "ieee") == "ieee"


def test_tf32_that_there_is_not_is_chosen_for_as_ieee() -> None:
    problem = Problem(3136, 128, 256, 9, torch.float32, "ieee")
    without = dataclasses.replace(problem, precision="tf32")
    for name in ("sm_75", "gfx90a", "gfx1100"):
        assert choose(without, name, 50) == choose(problem, name, 50)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_table_agrees_with_that_of_the_stand_in_driver(architecture: str) -> None:
    """Which has the limits that kernels are compiled and checked for."""
    ours, theirs = ARCHITECTURES[architecture], EMULATED[architecture]
    assert ours.shared_bytes == theirs.shared_bytes
    assert ours.multiprocessors == theirs.multiprocessors
    assert ours.warp_size == theirs.warp_size
    assert ours.backend == theirs.target.backend


def test_programs_at_once_by_hand() -> None:
    def at_once(architecture: str, num_stages: int) -> int:
        configuration = configurations.Configuration(64, 32, 64, 4, num_stages)
        return configurations.programs_at_once(
            configuration, torch.float16, ARCHITECTURES[architecture]
        )

    # 12 KiB of shared memory for a stage; 2048 sums, and 80 registers for each of 128 threads.
    assert at_once("sm_80", 3) == 166912 // (3 * 12288) == 4
    assert at_once("sm_80", 2) == 65536 // 12288 == 5
    assert at_once("sm_86", 3) == 101376 // (3 * 12288) == 2
    # A warp has twice as many threads.
    assert at_once("gfx90a", 1) == 65536 // 12288 == 5
    assert at_once("gfx90a", 6) == 1


@functools.cache
def plans() -> list[Plan]:
    model = tf.ThreshNet95(num_classes=10).eval()
    shapes = ((1, 224), (32, 224), (128, 224), (1, 32), (128, 32))
    return [lower(model, (batch, 3, size, size)) for batch, size in shapes]


def network_steps(architecture: str, dtype: torch.dtype, precision: str) -> Iterator[list[tuple]]:
    """For each of some input shapes, what tells the convolution kernels of ThreshNet95 apart."""
    multiprocessors = ARCHITECTURES[architecture].multiprocessors
    target = Target(torch.device("cpu"), dtype, precision, architecture, multiprocessors)
    for plan in plans():
        yield [
            (
                dataclasses.replace(prepared.configuration, split_k=1),
                prepared.configuration.split_k > 1,
                len(step.inputs),
                step.kernel,
                step.stride[0],
                step.prologue is not None,
            )
            for prepared in _group(plan, target)
            for step in prepared.steps[:1]
            if prepared.configuration is not None and len(prepared.steps) == 1
        ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("dtype", "precision"), CLASSES[1:])
def test_a_network_needs_few_kernels(architecture: str, dtype, precision: str) -> None:
    """Every kernel is a compilation that the first call waits for."""
    for steps in network_steps(architecture, dtype, precision):
        assert len({tile for tile, *_ in steps}) <= 6
        assert len(set(steps)) <= 25


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_tile_is_of_use(architecture: str) -> None:
    found = ARCHITECTURES[architecture]
    for dtype, precision in CLASSES:
        if precision_for(architecture, precision) != precision:
            continue
        chosen = {
            dataclasses.replace(
                choose(
                    Problem(pixels, out, channels, taps, dtype, precision),
                    architecture,
                    found.multiprocessors,
                ),
                split_k=1,
            )
            for pixels in (1, 49, 196, 784, 3136, 12544, 50176, 200704, 802816)
            for out in (16, 32, 64, 128, 160, 256)
            for channels in (16, 32, 64, 128, 256, 512, 1024)
            for taps in (1, 9)
        }
        assert chosen == set(configurations.candidates(found, dtype, precision))


def test_every_exception_is_of_a_tile_in_the_table() -> None:
    ordinary = ARCHITECTURES["sm_80"]
    tiles = {
        (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
        for dtype, precision in CLASSES
        for tile in configurations.candidates(ordinary, dtype, precision)
    }
    for architecture, exceptions in configurations._EXCEPTIONS.items():
        assert architecture in ARCHITECTURES
        assert set(exceptions) <= tiles
        assert all(tile != instead for tile, instead in exceptions.items())
