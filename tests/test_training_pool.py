"""The pools of training, forward and back, and the arithmetic of its norms, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within, dot_bound
from torch import nn
from torch.nn import functional as F
from training_cases import (
    AFTER,
    BEFORE,
    Case,
    Operands,
    Poisoned,
    Workspace,
    aligned_workspace,
    check_fails,
    check_statistics,
    isas,
    ones,
    operands,
    operators,
    to_nchw,
)

from threshnet_fast.engines import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
UNIT = torch.finfo(torch.float32).eps


def pool(channels, batch, size, kernel, stride, padding=0, activation="relu"):
    return Case((channels,), 0, batch, size, kernel, stride, padding, activation)


CASES = [
    pool(1, 1, (1, 1), 1, 1, activation=""),
    pool(13, 3, (5, 7), 1, 1, activation="relu6"),
    pool(334, 30, (4, 4), 1, 1),
    pool(64, 2, (14, 14), 3, 2, 1),
    pool(32, 5, (9, 10), 3, 2, 1, activation=""),
    pool(130, 7, (7, 7), 2, 2, activation="relu6"),
    pool(48, 30, (2, 2), 2, 2),
    pool(3, 2, (1, 40), 3, 2, 1),
    pool(17, 1, (40, 2), 2, 2, activation="relu6"),
    pool(40, 2, (6, 5), 3, 1, 1, activation=""),
    pool(7, 3, (11, 9), 5, 3, 2),
    pool(700, 2, (7, 7), 3, 2, 1, activation="relu6"),
    pool(20, 2, (50, 45), 3, 2, 1),
    pool(64, 1, (33, 64), 2, 3),
    pool(64, 2, (41, 40), 1, 4, activation="relu6"),
]


def run_forward(case: Case, given: Operands, isa: int):
    width = BEFORE + case.channels[0] + AFTER
    output, statistics = Poisoned(case.pixels_after, width), Poisoned(2, width)
    workspace = Workspace(operators.training_pool_workspace(case.window, case.channels[0], isa))
    operators.training_pool_forward(
        given.maps[0],
        case.segments,
        given.prologue,
        case.code,
        case.window,
        output.tensor,
        BEFORE,
        statistics.tensor,
        workspace.tensor,
        isa,
    )
    workspace.check()
    return output, statistics


def run_backward(case: Case, given: Operands, isa: int, *, accumulate: bool):
    memory, found = given.input_gradients()
    if accumulate:
        middle = slice(BEFORE, BEFORE + case.channels[0])
        memory[0].tensor[:, middle] = found[0][:, middle] = given.earlier[0][:, middle]
    sums = Poisoned(2, case.channels[0])
    workspace = Workspace(operators.training_pool_workspace(case.window, case.channels[0], isa))
    operators.training_pool_backward(
        given.maps[0],
        case.segments,
        given.prologue,
        case.code,
        case.window,
        given.output,
        given.gradient,
        BEFORE,
        given.correction,
        memory[0].tensor,
        int(accumulate),
        sums.tensor,
        workspace.tensor,
        isa,
    )
    workspace.check()
    return memory, found, sums


def scattered(x: torch.Tensor, values: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
    """Adds a value for every window to the first of its maxima."""
    _, indices = F.max_pool2d(x, *window, return_indices=True)
    return (
        torch.zeros_like(x)
        .flatten(2)
        .scatter_add_(2, indices.flatten(2), values.flatten(2))
        .view_as(x)
    )


@pytest.mark.parametrize("tied", [False, True], ids=["", "ties"])
@pytest.mark.parametrize(
    ("case", "isa"), [(case, isa) for case in CASES for isa in isas()], ids=str
)
def test_forward_and_backward(case, isa, tied):
    given = operands(case, tied)
    window = (case.kernel, case.stride, case.pad)
    output, statistics = run_forward(case, given, isa)
    rows = output.written(BEFORE, case.channels[0])
    assert_within(
        to_nchw(rows, case.batch, *case.after),
        F.max_pool2d(given.activated, *window),
        dot_bound(F.max_pool2d(given.magnitude, *window), 2, torch.float32),
    )
    check_statistics(statistics.written(BEFORE, case.channels[0]), rows)

    gradient = scattered(given.activated, given.dz, window)
    magnitude = scattered(given.activated, given.dz_magnitude, window)
    for accumulate in (False, True):
        memory, found, sums = run_backward(case, given, isa, accumulate=accumulate)
        given.check_input_gradients(
            memory, found, sums.written(), gradient, magnitude, case.kernel**2 + 3
        )


@pytest.mark.parametrize("isa", isas())
def test_threads(isa):
    """The number of threads changes no bit: an image is one thread's."""
    case = CASES[5]
    given = operands(case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            written = [memory.tensor for memory in run_forward(case, given, isa)]
            memory, _, sums = run_backward(case, given, isa, accumulate=False)
            results.append([*written, memory[0].tensor, sums.tensor])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("isa", isas())
def test_values_that_are_no_numbers(isa, activation, value):
    """They are chosen, and passed a gradient, as PyTorch does."""
    case = pool(5, 2, (7, 8), 3, 2, 1, activation)
    given = Operands(case)
    given.prologue[:2] = torch.tensor([[1.0], [0.5]])
    given.correction.nan_to_num_()[:] = 0
    x = given.x.float()
    # Of the last, a whole window.
    x[0, 1, 3, 4] = x[1, 4, 0, 0] = value
    x[1, 2, :2, :2] = value
    given.maps[0][:, BEFORE:-AFTER] = x.permute(0, 2, 3, 1).flatten(0, 2)

    x.requires_grad_()
    act = {"": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6()}[activation]
    y = F.max_pool2d(act(x + 0.5), 3, 2, 1)
    middle = slice(BEFORE, BEFORE + 5)
    (expected,) = torch.autograd.grad(y, x, to_nchw(given.gradient[:, middle], 2, *case.after))

    output, _ = run_forward(case, given, isa)
    actual = to_nchw(output.tensor[:, middle], 2, *case.after)
    torch.testing.assert_close(actual, y.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    memory, _, sums = run_backward(case, given, isa, accumulate=False)
    actual = to_nchw(memory[0].tensor[:, middle], 2, *case.size)
    if value != value:
        # Of several, PyTorch takes the last one, here it is the first; and its ReLU6 passes none.
        for gradient in (actual, expected):
            gradient[1, 2, 0, 0] = gradient[1, 2, :2, :2].sum()
            gradient[1, 2].flatten()[[1, 8, 9]] = 0
            if activation == "relu6":
                gradient[x.isnan()] = 0
        assert activation == "relu6" or expected[x.isnan()].abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if activation == "relu6" and value != value:
        return
    torch.testing.assert_close(
        sums.tensor[0], expected.sum((0, 2, 3)), rtol=1e-4, atol=1e-4, equal_nan=True
    )


WINDOW = [2, 5, 6, 3, 3, 2, 1]


def pool_arguments():
    isa = isas()[-1]
    return {
        "map": ones(60, 9),
        "segment": [2, 6],
        "prologue": ones(3, 6),
        "activation": 1,
        "window": WINDOW,
        "output": torch.full((18, 8), torch.nan),
        "output_channel": 1,
        "statistics": torch.full((2, 8), torch.nan),
        "workspace": aligned_workspace(operators.training_pool_workspace(WINDOW, 6, isa)),
        "isa": isa,
    }


def pool_backward_arguments():
    forward = pool_arguments()
    return {
        **{name: forward[name] for name in list(forward)[:5]},
        "output": ones(18, 8),
        "gradient": ones(18, 8),
        "output_channel": 1,
        "correction": ones(2, 8),
        "input_gradient": torch.full((60, 9), torch.nan),
        "accumulate": 0,
        "sums": torch.full((2, 6), torch.nan),
        "workspace": forward["workspace"],
        "isa": forward["isa"],
    }


POOL_FAILURES = {
    "map-dtype": {"map": ones(60, 9).double()},
    "map-pixels": {"map": ones(59, 9)},
    "map-not-contiguous": {"map": ones(9, 60).T},
    "segment-count": {"segment": [2]},
    "segment-two": {"segment": [2, 3, 5, 3]},
    "segment-end": {"segment": [4, 6]},
    "segment-negative": {"segment": [-1, 6]},
    "prologue-channels": {"prologue": ones(3, 5)},
    "prologue-empty": {"prologue": torch.empty(0)},
    "activation": {"activation": 3},
    "window-count": {"window": [2, 5, 6]},
    "window-batch": {"window": [-2, *WINDOW[1:]]},
    "window-stride": {"window": [2, 5, 6, 3, 3, -1, 1]},
    "window-padding": {"window": [2, 5, 6, 3, 3, 2, 3]},
    "window-larger-than-map": {"window": [2, 5, 6, 8, 8, 2, 1]},
    "output-pixels": {"output": ones(17, 8)},
    "output-channels": {"output": ones(18, 6)},
    "output-dtype": {"output": ones(18, 8).half()},
    "output-channel": {"output_channel": 3},
    "workspace-small": {"workspace": aligned_workspace(16)},
    "workspace-misaligned": {"workspace": aligned_workspace(1 << 16)[1:]},
    "isa": {"isa": 99},
}
POOL_FORWARD_FAILURES = {
    "statistics-channels": {"statistics": ones(2, 6)},
    "statistics-dtype": {"statistics": ones(2, 8).double()},
}
POOL_BACKWARD_FAILURES = {
    "gradient-pixels": {"gradient": ones(60, 8)},
    "gradient-channels": {"gradient": ones(18, 6)},
    "correction-empty": {"correction": torch.empty(0)},
    "correction-channels": {"correction": ones(2, 6)},
    "input-gradient-pixels": {"input_gradient": ones(18, 9)},
    "input-gradient-channels": {"input_gradient": ones(60, 7)},
    "input-gradient-dtype": {"input_gradient": ones(60, 9).double()},
    "input-gradient-empty": {"input_gradient": torch.empty(0)},
    "sums-empty": {"sums": torch.empty(0)},
    "sums-channels": {"sums": ones(2, 8)},
}


@pytest.mark.parametrize("name", [*POOL_FAILURES, *POOL_FORWARD_FAILURES])
def test_forward_refuses(name):
    change = {**POOL_FAILURES, **POOL_FORWARD_FAILURES}[name]
    check_fails(operators.training_pool_forward, pool_arguments, change)


@pytest.mark.parametrize("name", [*POOL_FAILURES, *POOL_BACKWARD_FAILURES])
def test_backward_refuses(name):
    change = {**POOL_FAILURES, **POOL_BACKWARD_FAILURES}[name]
    check_fails(operators.training_pool_backward, pool_backward_arguments, change)


@pytest.mark.parametrize(
    "arguments", [(WINDOW, 0, 0), (WINDOW, 6, -1), (WINDOW[:6], 6, 0), ([0, *WINDOW[1:]], 6, 0)]
)
def test_workspace_refuses(arguments):
    with pytest.raises(RuntimeError, match="threshnet_fast: "):
        operators.training_pool_workspace(*arguments)


def norm_operands(channels: int, *, affine: bool):
    """Statistics of a map with more channels, among them one of variance 0; gamma and beta."""
    statistics = torch.full((2, channels + 5), torch.nan)
    middle = slice(3, 3 + channels)
    statistics[0, middle] = 3 * torch.randn(channels)
    statistics[1, middle] = torch.rand(channels) * 4
    statistics[1, 3] = 0
    if not affine:
        return statistics, torch.empty(0), torch.empty(0)
    return statistics, torch.randn(channels), torch.randn(channels)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("channels", "eps"), [(1, 1e-5), (13, 1e-5), (130, 1e-3), (334, 0.5)])
def test_prologue(channels, eps, affine):
    statistics, gamma, beta = norm_operands(channels, affine=affine)
    prologue = Poisoned(3, channels + 9)
    operators.normalization_prologue(statistics, 3, channels, gamma, beta, eps, prologue.tensor, 4)
    scale, shift, mean = prologue.written(4, channels)
    expected_mean, variance = statistics[:, 3 : 3 + channels].double()
    factor = (gamma.double() if affine else 1) / (variance + eps).sqrt()
    offset = beta.double() if affine else torch.zeros(channels, dtype=torch.float64)
    assert_within(scale, factor, UNIT * factor.abs())
    magnitude = offset.abs() + (expected_mean * factor).abs()
    assert_within(shift, offset - expected_mean * factor, UNIT * magnitude)
    assert mean.equal(expected_mean)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("count", [1, 7, 100_000])
@pytest.mark.parametrize("channels", [1, 13, 130])
def test_norm_backward(channels, count, affine):
    statistics, gamma, _ = norm_operands(channels, affine=affine)
    eps, start = 1e-3, 2
    sums = F.pad(torch.randn(2, channels) * count, (start, 1), value=torch.nan)
    gradients = [Poisoned(1, channels) for _ in range(2)]
    correction = Poisoned(2, channels + 5)
    middle = slice(3, 3 + channels)
    earlier = correction.tensor[:, middle] = torch.randn(2, channels)
    operators.normalization_backward(
        statistics,
        3,
        channels,
        gamma,
        eps,
        sums,
        start,
        count,
        *(gradient.tensor[0] for gradient in gradients),
        correction.tensor,
    )
    mean, variance = statistics[:, middle].double()
    total, moment = sums[:, start : start + channels].double()
    reciprocal = (variance + eps).rsqrt()
    factor = (gamma.double() if affine else 1) * reciprocal / count
    slope = factor * reciprocal**2 * moment
    assert_within(
        gradients[0].written()[0], moment * reciprocal, UNIT * (moment * reciprocal).abs()
    )
    assert_within(gradients[1].written()[0], total, torch.zeros_like(total))
    expected = earlier.double() + torch.stack([slope, mean * slope - factor * total])
    magnitude = torch.stack([slope.abs(), (mean * slope).abs() + (factor * total).abs()])
    bound = UNIT * (earlier.abs().double() + 2 * magnitude)
    assert_within(correction.written(3, channels), expected, bound)


def test_norm_backward_may_be_asked_for_less():
    statistics, gamma, _ = norm_operands(5, affine=True)
    none = torch.empty(0)
    arguments = (statistics, 3, 5, gamma, 1e-5, torch.randn(2, 5), 0, 9)
    gradients = [Poisoned(1, 5) for _ in range(2)]
    correction = Poisoned(2, 10)
    operators.normalization_backward(*arguments, none, none, none)
    operators.normalization_backward(*arguments, gradients[0].tensor[0], none, none)
    operators.normalization_backward(*arguments, none, gradients[1].tensor[0], none)
    assert not any(gradient.written().isnan().any() for gradient in gradients)
    correction.tensor[:, 3:8] = 0
    operators.normalization_backward(*arguments, none, none, correction.tensor)
    assert correction.written(3, 5).abs().min() > 0


def prologue_arguments():
    return {
        "statistics": ones(2, 9),
        "first": 2,
        "channels": 6,
        "gamma": ones(6),
        "beta": ones(6),
        "eps": 1e-5,
        "prologue": torch.full((3, 8), torch.nan),
        "to": 1,
    }


def norm_backward_arguments():
    return {
        "statistics": ones(2, 9),
        "first": 2,
        "channels": 6,
        "gamma": ones(6),
        "eps": 1e-5,
        "sums": ones(2, 7),
        "start": 1,
        "count": 4,
        "gamma_gradient": torch.full((6,), torch.nan),
        "beta_gradient": torch.full((6,), torch.nan),
        "correction": ones(2, 9),
    }


NORM_FAILURES = {
    "statistics-rows": {"statistics": ones(3, 9)},
    "statistics-dtype": {"statistics": ones(2, 9).double()},
    "statistics-not-contiguous": {"statistics": ones(9, 2).T},
    "statistics-empty": {"statistics": torch.empty(0)},
    "first-negative": {"first": -1},
    "first-large": {"first": 4},
    "channels-none": {"channels": 0},
    "gamma-length": {"gamma": ones(5)},
    "gamma-dtype": {"gamma": ones(6).double()},
}
PROLOGUE_FAILURES = {
    "beta-length": {"beta": ones(7)},
    "prologue-rows": {"prologue": ones(2, 8)},
    "prologue-channels": {"prologue": ones(3, 6)},
    "prologue-dtype": {"prologue": ones(3, 8).double()},
    "to-negative": {"to": -1},
    "to-large": {"to": 3},
}
NORM_BACKWARD_FAILURES = {
    "sums-rows": {"sums": ones(1, 7)},
    "sums-channels": {"sums": ones(2, 6)},
    "sums-dtype": {"sums": ones(2, 7).half()},
    "start-negative": {"start": -1},
    "count": {"count": 0},
    "gamma-gradient-length": {"gamma_gradient": ones(5)},
    "beta-gradient-dtype": {"beta_gradient": ones(6).double()},
    "correction-channels": {"correction": ones(2, 8)},
}


@pytest.mark.parametrize("name", [*NORM_FAILURES, *PROLOGUE_FAILURES])
def test_prologue_refuses(name):
    change = {**NORM_FAILURES, **PROLOGUE_FAILURES}[name]
    check_fails(operators.normalization_prologue, prologue_arguments, change)


@pytest.mark.parametrize("name", [*NORM_FAILURES, *NORM_BACKWARD_FAILURES])
def test_norm_backward_refuses(name):
    change = {**NORM_FAILURES, **NORM_BACKWARD_FAILURES}[name]
    check_fails(operators.normalization_backward, norm_backward_arguments, change)
