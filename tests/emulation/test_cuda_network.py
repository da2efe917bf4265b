"""Whole networks through the CUDA executor, on its kernels as g++ compiles and fibers run them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from test_engine import separate_arena
from test_plan import small
from torch import Tensor

import threshnet_fast as tf
from emulation.cuda_operators import emulated_cuda, skip_reason
from emulation.networks import check_steps, first_blocks_of_threshnet79, odd
from threshnet_fast.backends import cuda, cuda_plan
from threshnet_fast.backends.cuda_plan import CudaPlan, Target, pack_network
from threshnet_fast.plan import lower
from threshnet_fast.plan.ir import Segment

pytestmark = [
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
    pytest.mark.usefixtures("one_thread"),
]

CPU = torch.device("cpu")
GROUP = 16
POISON = 0xFF
"""A byte that makes NaN of every dtype."""


def check_step_by_step(model, x: Tensor, dtype: torch.dtype) -> list[str]:
    """Runs a network in poisoned memory and compares each step with float64 on its own input.

    Returns the algorithms.
    """
    plan = lower(model, x.shape)
    target = cuda.target(CPU, dtype)
    whole = CudaPlan(plan, target, arena=separate_arena(plan))
    packed = pack_network(plan, target)
    memory = whole._workspace(0, packed)._memory.fill_(POISON)
    x = x.to(dtype)
    y = whole(x, packed)

    def view(segment: Segment) -> Tensor:
        """A segment with all of its last group."""
        buffer = plan.buffers[segment.buffer]
        offset = whole.arena.offsets[segment.buffer]
        if offset is None:
            return x if segment.buffer == 0 else y[:, :, None, None]
        pitch = whole.arena.pitches[segment.buffer]
        channels = -(-(segment.channel + segment.channels) // GROUP) * GROUP - segment.channel
        row = buffer.width * pitch
        return (
            memory[: whole.arena_bytes]
            .view(dtype)
            .as_strided(
                (x.shape[0], channels, buffer.height, buffer.width),
                (buffer.height * row, 1, row, pitch),
                offset + segment.channel,
            )
        )

    check_steps(plan, whole.algorithms, view, y)
    return whole.algorithms


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_steps(randomised, architecture: str, dtype: torch.dtype) -> None:
    if architecture == "sm_75" and dtype is torch.bfloat16:
        pytest.skip("sm_75 has no bfloat16")
    with emulated_cuda(architecture):
        check_step_by_step(randomised(odd()), torch.randn(2, 4, 40, 36), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_steps_of_threshnet79(randomised, dtype: torch.dtype) -> None:
    model = randomised(tf.ThreshNet79(num_classes=10).eval())
    with emulated_cuda():
        algorithms = check_step_by_step(model, torch.randn(1, 3, 32, 32), dtype)
    assert any("reduction in" in name for name in algorithms)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_120"])
def test_first_blocks_of_threshnet79(randomised, architecture: str) -> None:
    model = randomised(first_blocks_of_threshnet79())
    with emulated_cuda(architecture):
        check_step_by_step(model, torch.randn(2, 3, 32, 33), torch.float16)
