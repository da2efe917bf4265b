"""The depthwise convolutions of training, forward and back, against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from tolerance import assert_within, dot_bound
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


def depthwise(
    channels, batch, size, kernel=3, stride=1, padding=None, activation="relu", **options
):
    return Case((channels,), 0, batch, size, kernel, stride, padding, activation, **options)


CASES = [
    depthwise(1, 1, (1, 1), activation=""),
    depthwise(1, 1, (1, 1), kernel=1),
    depthwise(13, 3, (5, 7), activation="relu6"),
    depthwise(64, 2, (14, 14), stride=2, activation="relu6"),
    depthwise(334, 3, (9, 10), stride=2, activation=""),
    depthwise(48, 2, (56, 40)),
    depthwise(48, 2, (57, 41), stride=2, channels_last=True),
    depthwise(130, 7, (7, 7), kernel=2, stride=2, padding=0),
    depthwise(20, 2, (9, 7), kernel=2, stride=2, padding=0, activation=""),
    depthwise(7, 2, (50, 3), kernel=5, channels_last=True),
    depthwise(40, 1, (45, 64), kernel=2, stride=3, padding=0),
    depthwise(64, 1, (41, 40), kernel=1, stride=4, activation="relu6"),
    depthwise(6, 2, (9, 11), kernel=8, stride=3, padding=7),
    depthwise(700, 2, (7, 7), activation="relu6"),
]
THREADED = [CASES[i] for i in (3, 5, 6, 10)]


class Depthwise:
    """A case with its weight and its solution in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.operands = operands(case)
        (channels,) = case.channels
        shape = (channels, 1, case.kernel, case.kernel)
        generator = torch.Generator().manual_seed(channels)
        self.weight = torch.randn(shape, generator=generator) / case.kernel
        if case.channels_last:
            # A weight of one input is the same in either layout; so of taps in another order.
            self.weight = self.weight.transpose(2, 3).contiguous().transpose(2, 3)
        window = {"stride": case.stride, "padding": case.pad, "groups": channels}
        given, weight = self.operands, self.weight.double()
        self.y = F.conv2d(given.activated, weight, **window)
        self.y_magnitude = F.conv2d(given.magnitude, weight.abs(), **window)
        gradient = functools.partial(torch.nn.grad.conv2d_weight, weight_size=shape, **window)
        self.dw = gradient(given.activated, grad_output=given.dz)
        self.dw_magnitude = gradient(given.magnitude, grad_output=given.dz_magnitude)
        back = functools.partial(torch.nn.grad.conv2d_input, given.x.shape, **window)
        self.dx = back(weight, given.dz)
        self.dx_magnitude = back(weight.abs(), given.dz_magnitude)

    def given(self) -> list[object]:
        """What both operators are called with first."""
        case, given = self.case, self.operands
        prologue = given.prologue
        return [given.maps[0], case.segments, prologue, case.code, self.weight, case.window]

    def workspace(self, isa: int) -> Workspace:
        (channels,) = self.case.channels
        return Workspace(operators.training_depthwise_workspace(self.case.window, channels, isa))

    def forward(self, isa: int, *, with_statistics: bool = True):
        """Output and statistics of the operator, in poisoned memory."""
        case = self.case
        width = BEFORE + case.channels[0] + AFTER
        output, statistics = Poisoned(case.pixels_after, width), Poisoned(2, width)
        workspace = self.workspace(isa)
        operators.training_depthwise_forward(
            *self.given(),
            output.tensor,
            BEFORE,
            statistics.tensor if with_statistics else torch.empty(0),
            workspace.tensor,
            isa,
        )
        workspace.check()
        return output, statistics

    def backward(self, isa: int, *, accumulate=False, inputs: bool = True, weight: bool = True):
        """Gradient of the input with what was there before, sums and gradient of the weight."""
        case, given = self.case, self.operands
        memory, found = given.input_gradients()
        if accumulate:
            middle = slice(BEFORE, BEFORE + case.channels[0])
            memory[0].tensor[:, middle] = found[0][:, middle] = given.earlier[0][:, middle]
        sums = Poisoned(2, case.channels[0])
        weight_gradient = torch.full_like(self.weight, torch.nan)
        workspace = self.workspace(isa)
        operators.training_depthwise_backward(
            *self.given(),
            given.output,
            given.gradient,
            BEFORE,
            given.correction,
            memory[0].tensor if inputs else torch.empty(0),
            int(accumulate),
            sums.tensor if inputs else torch.empty(0),
            weight_gradient if weight else torch.empty(0),
            workspace.tensor,
            isa,
        )
        workspace.check()
        return memory, found, sums, weight_gradient

    def check_output(self, output: Poisoned) -> None:
        case = self.case
        y = to_nchw(output.written(BEFORE, case.channels[0]), case.batch, *case.after)
        assert_within(y, self.y, dot_bound(self.y_magnitude, case.kernel**2 + 1, torch.float32))

    def check_weight_gradient(self, gradient: torch.Tensor) -> None:
        bound = dot_bound(self.dw_magnitude, self.case.pixels_after + 3, torch.float32)
        assert_within(gradient, self.dw, bound)

    def check_input_gradient(self, memory, found, sums) -> None:
        self.operands.check_input_gradients(
            memory, found, sums.written(), self.dx, self.dx_magnitude, self.case.kernel**2 + 3
        )


@functools.lru_cache(maxsize=2)
def problem_of(case: Case) -> Depthwise:
    return Depthwise(case)


@pytest.mark.parametrize(
    ("case", "isa"), [(case, isa) for case in CASES for isa in isas()], ids=str
)
def test_forward_and_backward(case, isa):
    problem = problem_of(case)
    output, statistics = problem.forward(isa)
    problem.check_output(output)
    rows = output.written(BEFORE, case.channels[0])
    check_statistics(statistics.written(BEFORE, case.channels[0]), rows)
    for accumulate in (False, True):
        memory, found, sums, gradient = problem.backward(isa, accumulate=accumulate)
        problem.check_input_gradient(memory, found, sums)
        problem.check_weight_gradient(gradient)
        assert gradient.stride() == problem.weight.stride()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_what_is_not_wanted_is_left_out(case, isa):
    problem = problem_of(case)
    output, statistics = problem.forward(isa, with_statistics=False)
    problem.check_output(output)
    assert statistics.written(0, 0).numel() == 0
    memory, _, sums, gradient = problem.backward(isa, inputs=False)
    problem.check_weight_gradient(gradient)
    assert sums.written(0, 0).numel() == 0
    assert memory[0].tensor[:, BEFORE].isnan().all()
    memory, found, sums, gradient = problem.backward(isa, weight=False)
    problem.check_input_gradient(memory, found, sums)
    assert gradient.isnan().all()
    problem.backward(isa, inputs=False, weight=False)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_threads(case, isa):
    """The number of threads changes no bit: bands depend on the map alone."""
    problem = problem_of(case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            written = [memory.tensor for memory in problem.forward(isa)]
            memory, _, sums, gradient = problem.backward(isa)
            results.append([*written, memory[0].tensor, sums.tensor, gradient])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", isas())
def test_not_a_number_stays_one(isa):
    """And reaches no channel or image that it is not part of."""
    case = depthwise(5, 2, (7, 8), activation="relu6")
    problem = Depthwise(case)
    problem.operands = Operands(case)
    problem.operands.maps[0][case.pixels // 2, BEFORE + 3] = torch.nan
    output, _ = problem.forward(isa)
    values = to_nchw(output.tensor[:, BEFORE : BEFORE + 5], 2, 7, 8)
    reached = torch.zeros(2, 5, 7, 8, dtype=torch.bool)
    reached[1, 3, :2, :2] = True
    assert values.isnan().equal(reached)
    _, _, sums, gradient = problem.backward(isa)
    assert gradient.isnan().flatten(1).any(1).tolist() == [False, False, False, True, False]
    assert sums.tensor[1].isnan().tolist() == [False, False, False, True, False]


WINDOW = [2, 5, 6, 3, 3, 2, 1]


def forward_arguments():
    isa = isas()[-1]
    return {
        "map": ones(60, 9),
        "segment": [2, 6],
        "prologue": ones(3, 6),
        "activation": 1,
        "weight": ones(6, 1, 3, 3),
        "window": WINDOW,
        "output": torch.full((18, 8), torch.nan),
        "output_channel": 1,
        "statistics": torch.full((2, 8), torch.nan),
        "workspace": aligned_workspace(operators.training_depthwise_workspace(WINDOW, 6, isa)),
        "isa": isa,
    }


def backward_arguments():
    forward = forward_arguments()
    return {
        **{name: forward[name] for name in list(forward)[:6]},
        "output": ones(18, 8),
        "gradient": ones(18, 8),
        "output_channel": 1,
        "correction": ones(2, 8),
        "input_gradient": torch.full((60, 9), torch.nan),
        "accumulate": 0,
        "sums": torch.full((2, 6), torch.nan),
        "weight_gradient": torch.full((6, 1, 3, 3), torch.nan),
        "workspace": forward["workspace"],
        "isa": forward["isa"],
    }


COMMON_FAILURES = {
    "map-pixels": {"map": ones(59, 9)},
    "map-dtype": {"map": ones(60, 9).double()},
    "segment-count": {"segment": [2, 6, 1, 1]},
    "segment-end": {"segment": [4, 6]},
    "prologue-channels": {"prologue": ones(3, 7)},
    "activation": {"activation": 3},
    "weight-channels": {"weight": ones(7, 1, 3, 3)},
    "weight-groups": {"weight": ones(6, 6, 3, 3)},
    "weight-window": {"weight": ones(6, 1, 3, 2)},
    "weight-dtype": {"weight": ones(6, 1, 3, 3).bfloat16()},
    "window-count": {"window": WINDOW[:6]},
    "window-stride": {"window": [2, 5, 6, 3, 3, 0, 1]},
    "window-batch": {"window": [3, *WINDOW[1:]]},
    "output-pixels": {"output": ones(17, 8)},
    "output-channel": {"output_channel": 3},
    "workspace-small": {"workspace": aligned_workspace(64)},
    "isa": {"isa": 99},
}
FORWARD_FAILURES = {"statistics": {"statistics": ones(2, 7)}}
BACKWARD_FAILURES = {
    "gradient-pixels": {"gradient": ones(17, 8)},
    "correction": {"correction": ones(2, 7)},
    "input-gradient": {"input_gradient": torch.full((61, 9), torch.nan)},
    "sums": {"sums": torch.full((2, 7), torch.nan)},
    "sums-missing": {"sums": torch.empty(0)},
    "weight-gradient": {"weight_gradient": torch.full((6, 1, 3, 2), torch.nan)},
    "weight-gradient-channels": {"weight_gradient": torch.full((5, 1, 3, 3), torch.nan)},
}


@pytest.mark.parametrize("change", [*COMMON_FAILURES, *FORWARD_FAILURES])
def test_forward_refuses(change):
    changes = {**COMMON_FAILURES, **FORWARD_FAILURES}
    check_fails(operators.training_depthwise_forward, forward_arguments, changes[change])


@pytest.mark.parametrize("change", [*COMMON_FAILURES, *BACKWARD_FAILURES])
def test_backward_refuses(change):
    changes = {**COMMON_FAILURES, **BACKWARD_FAILURES}
    check_fails(operators.training_depthwise_backward, backward_arguments, changes[change])


@pytest.mark.parametrize("arguments", [(WINDOW[:6], 6, 0), (WINDOW, 0, 0), (WINDOW, 6, -1)])
def test_workspace_refuses(arguments):
    with pytest.raises(RuntimeError):
        operators.training_depthwise_workspace(*arguments)
