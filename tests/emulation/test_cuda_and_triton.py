"""Two implementations check each other: CUDA C++, emulated, and Triton, interpreted.

Given equal inputs, both multiply the same factors exactly and add them up in float32, in orders of
their own, and round once. So they differ by at most the two roundings of the results, which is
twice the dtype's; by what the order of float32 sums makes out; and by factors that were rounded
apart, because CUDA normalises with one fused multiply-add and the interpreter with two operations.
The last is computed, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from op_cases import CASES, Case, vectors
from test_engine import separate_arena
from tolerance import dot_bound
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from threshnet_fast.kernels import dense_layer

import threshnet_fast as tf
from emulation.cuda_operators import emulated_cuda, skip_reason
from emulation.interpreter import interpreted
from emulation.networks import exact_step, first_blocks_of_threshnet79, odd
from emulation.operators import SMALL
from threshnet_fast.engines import cuda, cuda_plan, triton, triton_plan
from threshnet_fast.ops import cat_bn_relu_conv, cat_conv_bn_relu
from threshnet_fast.plan import FusedConv, Head, lower

pytestmark = [
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
    pytest.mark.usefixtures("one_thread"),
]

CPU = torch.device("cpu")
EACH_IN_ONE_DTYPE = [
    (case, cuda.DTYPES[i % 3]) for i, case in enumerate([*CASES, *SMALL]) if case.kernel != (7, 7)
]
EVERYTHING = [(case, dtype) for case in [*CASES, *SMALL] for dtype in cuda.DTYPES]


@pytest.fixture(autouse=True)
def both() -> Iterator[None]:
    with emulated_cuda(), interpreted():
        yield


def assert_agree(
    one: Tensor, other: Tensor, magnitude: Tensor, length: int, apart: Tensor | float = 0.0
) -> None:
    """Asserts what the text above says.

    Args:
        one: A result.
        other: The other one's.
        magnitude: Sum of the absolute products, in float64.
        length: Number of products in each sum.
        apart: What factors that were rounded apart make out.
    """
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    finfo = torch.finfo(one.dtype)
    one, other = one.double(), other.double()
    assert one.isfinite().all()
    assert other.isfinite().all()
    rounding = finfo.eps / 2 * (one.abs() + other.abs()) + finfo.eps * finfo.smallest_normal
    bound = rounding + 2 * dot_bound(magnitude, length, torch.float32) + apart
    ratio = (one - other).abs() / bound.clamp_min(torch.finfo(torch.float64).tiny)
    assert (ratio <= 1).all(), f"they differ by {ratio.max().item():.3g} times the bound"


def test_what_is_no_agreement() -> None:
    y = torch.tensor([1.5, -300.0, 0.25]).half()
    magnitude = y.double().abs()
    next_ones = torch.nextafter(y, torch.tensor(torch.inf).half())
    assert_agree(y, next_ones, magnitude, 100)
    further = torch.nextafter(next_ones, torch.tensor(torch.inf).half())
    for wrong in (further, torch.full_like(y, torch.nan)):
        with pytest.raises(AssertionError):
            assert_agree(y, wrong, magnitude, 100)


def rounded_apart(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart one fused multiply-add and two operations leave a normalised input.

    Args:
        x: ``[N, C, H, W]`` in float64, of values of the dtype.
        scale: ``[C]`` in float32.
        shift: As scale.
        dtype: What the normalised input is rounded to.
    """
    scale, shift = scale[:, None, None], shift[:, None, None]
    fused = (x * scale.double() + shift.double()).float()
    stepwise = x.float() * scale + shift
    return (fused.relu().to(dtype).double() - stepwise.relu().to(dtype).double()).abs()


def check_operators(case: Case, dtype: torch.dtype) -> None:
    xs = case.segments(dtype)
    weight = (case.weight() / math.sqrt(case.length)).to(dtype)
    step = {"stride": case.stride, "padding": case.padding}
    x, w = torch.cat(xs, 1).double(), weight.double()
    length = w[0].numel() + 1

    scale, shift = vectors(sum(case.channels))
    one, other = (
        cat_bn_relu_conv(xs, scale, shift, weight, **step, backend=name)
        for name in ("cuda", "triton")
    )
    size = x.abs() * scale.double().abs()[:, None, None] + shift.double().abs()[:, None, None]
    magnitude, apart = (
        functional.conv2d(factor, w.abs(), None, **step)
        for factor in (size, rounded_apart(x, scale, shift, dtype))
    )
    assert_agree(one, other, magnitude, length, apart)

    scale, shift = vectors(case.out)
    one, other = (
        cat_conv_bn_relu(xs, weight, scale, shift, **step, backend=name)
        for name in ("cuda", "triton")
    )
    magnitude = functional.conv2d(x.abs(), w.abs(), None, **step)
    magnitude = magnitude * scale.double().abs()[:, None, None]
    assert_agree(one, other, magnitude + shift.double().abs()[:, None, None], length)


@pytest.mark.parametrize(("case", "dtype"), EACH_IN_ONE_DTYPE, ids=str)
def test_operators(case: Case, dtype: torch.dtype) -> None:
    check_operators(case, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "dtype"), EVERYTHING, ids=str)
def test_operators_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check_operators(case, dtype)


def check_network(model: tf.ThreshNet, x: Tensor, dtype: torch.dtype) -> None:
    """Compares every step of both executors on the input that CUDA's step had."""
    plan, x = lower(model, x.shape), x.to(dtype)
    arena = separate_arena(plan)
    target = cuda.target(CPU, dtype)
    compiled = cuda_plan.CudaPlan(plan, target, arena=arena)
    packed = cuda_plan.pack_network(plan, target)
    y = compiled(x, packed)
    computed = compiled._workspace(0, packed)._memory[: compiled.arena_bytes].view(dtype)

    prepared = triton_plan.TritonPlan(plan, triton.target(CPU, dtype), arena=arena)
    workspace = prepared._workspace(0, triton_plan.pack_network(plan, dtype))
    assert len(prepared._steps) == len(plan.steps)
    for step, launches in zip(plan.steps, prepared._steps, strict=True):
        workspace._arena.copy_(computed)
        inputs = [workspace._view(s, x, y)[:, : s.channels].double() for s in step.inputs]
        other = torch.full_like(y, torch.nan)
        if isinstance(step, Head):
            expected = y
        else:
            channels = step.output.channels
            result = workspace._view(step.output, x, other)[:, :channels]
            expected = result.clone()
            result.fill_(torch.nan)
        for launch in workspace._launches(launches, x, other):
            launch()
        result = other if isinstance(step, Head) else result
        source = torch.cat(inputs, 1)
        _, _, magnitude, length = exact_step(step, source)
        apart: Tensor | float = 0.0
        if isinstance(step, FusedConv) and step.prologue is not None:
            factors = rounded_apart(source, step.prologue.scale, step.prologue.shift, dtype)
            weight = step.weight.to(dtype).double().abs()
            apart = functional.conv2d(factors, weight, None, step.stride, step.padding)
        assert_agree(expected, result, magnitude, length, apart)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_networks(randomised, monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(dense_layer, "pays", lambda problem: False)
    check_network(randomised(odd()), torch.randn(2, 4, 40, 36), dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_first_blocks_of_threshnet79(randomised, monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(dense_layer, "pays", lambda problem: False)
    check_network(randomised(first_blocks_of_threshnet79()), torch.randn(1, 3, 64, 64), dtype)
