"""The convolutions of training, forward and back, against float64."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading

import pytest
import torch
from tolerance import assert_within, dot_bound
from torch.nn import functional as F
from training_cases import (
    AFTER,
    BEFORE,
    Case,
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
    within_nan,
)

from threshnet_fast.engines import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

CASES = [
    Case((1,), 1, 1, (1, 1), kernel=1, activation=""),
    Case((1,), 1, 2, (1, 1)),
    Case((13,), 20, 2, (9, 11), kernel=1),
    Case((13, 6), 20, 2, (9, 11), activation="relu6"),
    Case((13, 6), 20, 2, (9, 11), channels_last=True),
    Case((5,), 7, 1, (1, 1), channels_last=True),
    Case((40, 17), 50, 9, (2, 2), activation="relu6"),
    Case((32, 13, 3), 32, 30, (1, 1), activation="relu6"),
    Case((130,), 13, 7, (7, 7)),
    Case((64,), 32, 20, (8, 8)),
    Case((128,), 32, 3, (14, 14), channels_last=True),
    Case((150, 80, 70), 130, 2, (14, 14), activation=""),
    Case((300, 80), 334, 30, (4, 4)),
    Case((334,), 130, 11, (4, 4), kernel=1, channels_last=True),
    Case((700,), 300, 2, (7, 7), kernel=1),
    Case((16,), 16, 1, (150, 3)),
    Case((16,), 16, 2, (1, 150), activation="relu6"),
    Case((24,), 16, 1, (56, 40)),
    Case((8,), 12, 3, (9, 6), kernel=5),
    Case((3,), 32, 3, (30, 28), stride=2, activation=""),
    Case((3,), 24, 1, (30, 28), kernel=7, stride=2, activation="", channels_last=True),
    Case((6, 3), 10, 12, (7, 8), stride=2),
    Case((7,), 9, 5, (9, 8), padding=0),
    Case((7,), 9, 9, (6, 4), kernel=2, stride=2, padding=0),
    Case((7,), 9, 2, (6, 9), kernel=1, stride=3),
]
THREADED = [CASES[i] for i in (4, 6, 9, 12, 14, 20)]


class Convolution:
    """A case with its weight and its solution in float64."""

    def __init__(self, case: Case, winograd: int = -1) -> None:
        self.case = case
        self.winograd = winograd
        self.operands = operands(case)
        channels = sum(case.channels)
        generator = torch.Generator().manual_seed(channels)
        shape = (case.out, channels, case.kernel, case.kernel)
        self.weight = torch.randn(shape, generator=generator) / (channels * case.kernel**2) ** 0.5
        if case.channels_last:
            self.weight = self.weight.to(memory_format=torch.channels_last)
        window = {"stride": case.stride, "padding": case.pad}
        weight, x, dz = self.weight.double(), self.operands.activated, self.operands.dz
        x_magnitude, dz_magnitude = self.operands.magnitude, self.operands.dz_magnitude
        self.y = F.conv2d(x, weight, **window)
        self.y_magnitude = F.conv2d(x_magnitude, weight.abs(), **window)
        self.dw = torch.nn.grad.conv2d_weight(x, shape, dz, **window)
        self.dw_magnitude = torch.nn.grad.conv2d_weight(x_magnitude, shape, dz_magnitude, **window)
        if case.same_size:
            self.dx = torch.nn.grad.conv2d_input(x.shape, weight, dz, **window)
            self.dx_magnitude = torch.nn.grad.conv2d_input(
                x.shape, weight.abs(), dz_magnitude, **window
            )

    def workspace(self, isa: int) -> Workspace:
        case = self.case
        channels = sum(case.channels)
        return Workspace(
            operators.training_convolution_workspace(
                case.window, channels, case.out, case.same_size, self.winograd, isa
            )
        )

    def forward(self, isa: int, *, with_statistics: bool = True):
        """Output and statistics of the operator, in poisoned memory."""
        case, given = self.case, self.operands
        width = BEFORE + case.out + AFTER
        output, statistics = Poisoned(case.pixels_after, width), Poisoned(2, width)
        workspace = self.workspace(isa)
        operators.training_convolution_forward(
            given.maps,
            case.segments,
            given.prologue,
            case.code,
            self.weight,
            case.window,
            output.tensor,
            BEFORE,
            statistics.tensor if with_statistics else torch.empty(0),
            workspace.tensor,
            self.winograd,
            isa,
        )
        workspace.check()
        return output, statistics

    def backward(self, isa: int, *, inputs: bool = True, weight: bool = True):
        """Gradients of the inputs with what was there before, sums and gradient of the weight."""
        case, given = self.case, self.operands
        memory, found = given.input_gradients()
        sums = Poisoned(2, sum(case.channels))
        weight_gradient = torch.full_like(self.weight, torch.nan)
        workspace = self.workspace(isa)
        operators.training_convolution_backward(
            given.maps,
            case.segments,
            given.prologue,
            case.code,
            self.weight,
            case.window,
            given.output,
            given.gradient,
            BEFORE,
            given.correction,
            [part.tensor for part in memory] if inputs else [],
            [i % 2 for i in range(len(memory))] if inputs else [],
            sums.tensor if inputs else torch.empty(0),
            weight_gradient if weight else torch.empty(0),
            workspace.tensor,
            self.winograd,
            isa,
        )
        workspace.check()
        return memory, found, sums, weight_gradient

    def check_output(self, output: Poisoned) -> None:
        case = self.case
        y = to_nchw(output.written(BEFORE, case.out), case.batch, *case.after)
        length = self.weight[0].numel() + 1
        assert_within(y, self.y, dot_bound(self.y_magnitude, length, torch.float32))

    def check_weight_gradient(self, gradient: torch.Tensor) -> None:
        bound = dot_bound(self.dw_magnitude, self.case.pixels_after + 3, torch.float32)
        assert_within(gradient, self.dw, bound)

    def check_input_gradients(self, memory, found, sums) -> None:
        length = self.case.out * self.case.kernel**2 + 3
        self.operands.check_input_gradients(
            memory, found, sums.written(), self.dx, self.dx_magnitude, length
        )


@functools.lru_cache(maxsize=2)
def convolution(case: Case, winograd: int = -1) -> Convolution:
    return Convolution(case, winograd)


@pytest.mark.parametrize(
    ("case", "isa"), [(case, isa) for case in CASES for isa in isas()], ids=str
)
def test_forward_and_backward(case, isa):
    check_forward_and_backward(convolution(case), isa)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("winograd", [0, 2, 4])
@pytest.mark.parametrize("case", [CASES[10], CASES[11], CASES[15], CASES[16], CASES[17]], ids=str)
def test_every_size_of_tiles(case, winograd, isa):
    check_forward_and_backward(convolution(case, winograd), isa)


@pytest.mark.parametrize("isa", isas())
def test_sizes_of_tiles_differ(isa):
    """And by default the larger ones are taken where a map has enough of them."""
    for case, default in ((CASES[17], 4), (CASES[10], 2)):
        outputs = {
            winograd: Convolution(case, winograd).forward(isa)[0].written(BEFORE, case.out)
            for winograd in (-1, 0, 2, 4)
        }
        for winograd in (0, 2, 4):
            assert outputs[winograd].equal(outputs[-1]) == (winograd == default)


def check_forward_and_backward(problem, isa):
    case = problem.case
    output, statistics = problem.forward(isa)
    problem.check_output(output)
    check_statistics(statistics.written(BEFORE, case.out), output.written(BEFORE, case.out))

    memory, found, sums, weight_gradient = problem.backward(isa, inputs=case.same_size)
    problem.check_weight_gradient(weight_gradient)
    if case.same_size:
        problem.check_input_gradients(memory, found, sums)


@pytest.mark.parametrize(
    ("case", "isa"), [(case, isa) for case in THREADED[:-1] for isa in isas()], ids=str
)
def test_gradients_may_be_left_out(case, isa):
    problem = convolution(case)
    memory, _, sums, weight_gradient = problem.backward(isa, inputs=False)
    problem.check_weight_gradient(weight_gradient)
    assert sums.written(0, 0).numel() == 0
    assert all(part.tensor[:, BEFORE].isnan().all() for part in memory[::2])
    memory, found, sums, weight_gradient = problem.backward(isa, weight=False)
    problem.check_input_gradients(memory, found, sums)
    assert weight_gradient.isnan().all()
    problem.backward(isa, inputs=False, weight=False)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dimensions", [(0, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("case", [CASES[8], CASES[12], CASES[13], CASES[17]], ids=str)
def test_weights_in_any_order_of_memory(case, dimensions, isa):
    """And the gradient of one is laid out as it is."""
    problem = Convolution(case)
    expected, _ = problem.forward(isa)
    *_, expected_gradient = problem.backward(isa)
    weight = problem.weight
    problem.weight = weight.transpose(*dimensions).contiguous().transpose(*dimensions)
    output, _ = problem.forward(isa)
    assert output.written(BEFORE, case.out).equal(expected.written(BEFORE, case.out))
    *_, gradient = problem.backward(isa)
    assert gradient.equal(expected_gradient)
    assert gradient.stride() == problem.weight.stride()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_statistics_may_be_left_out(case, isa):
    problem = convolution(case)
    output, statistics = problem.forward(isa, with_statistics=False)
    assert statistics.written(0, 0).numel() == 0
    expected, _ = problem.forward(isa)
    assert output.written(BEFORE, case.out).equal(expected.written(BEFORE, case.out))


@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("isa", isas())
def test_not_a_number_stays_one(isa, activation):
    """It is not hidden by an activation, and reaches no channel or image that it is not part of."""
    case = Case((5, 3), 6, 3, (4, 5), kernel=1, activation=activation)
    problem = Convolution(case)
    problem.operands.maps = [part.clone() for part in problem.operands.maps]
    problem.operands.maps[1][7, BEFORE + 1] = torch.nan
    output, statistics = problem.forward(isa)
    values = output.tensor[:, BEFORE : BEFORE + case.out]
    assert values[7].isnan().all()
    assert not values[torch.arange(case.pixels) != 7].isnan().any()
    assert statistics.tensor[:, BEFORE : BEFORE + case.out].isnan().all()
    memory, _, sums, weight_gradient = problem.backward(isa)
    assert sums.tensor[1, 6].isnan()
    assert not sums.tensor[:, [0, 1, 2, 3, 4, 5, 7]].isnan().any()
    assert weight_gradient[:, 6].isnan().all()
    assert not weight_gradient[:, [0, 1, 2, 3, 4, 5, 7]].isnan().any()
    assert not memory[0].tensor[:, BEFORE : BEFORE + 5].isnan().any()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("offset", [30.0, -1000.0, 1e5])
@pytest.mark.parametrize("case", [CASES[5], CASES[8], CASES[13], CASES[17], CASES[21]], ids=str)
def test_variance_of_a_map_far_from_zero_does_not_cancel(case, offset, isa):
    """A channel of ones, times ``offset``: a variance from mean squares would be all rounding."""
    problem = Convolution(case)
    given = problem.operands
    given.maps = [part.clone() for part in given.maps]
    given.prologue = given.prologue.clone()
    given.maps[0][:, BEFORE] = 1
    given.prologue[:2, 0] = torch.tensor([1.0, 0.0])
    problem.weight = problem.weight.clone(memory_format=torch.preserve_format)
    problem.weight[:, 0] = 0
    problem.weight[:, 0, case.kernel // 2, case.kernel // 2] = offset
    output, statistics = problem.forward(isa)
    rows = output.written(BEFORE, case.out)
    assert (rows.mean(0) / offset - 1).abs().max() < 0.5
    check_statistics(statistics.written(BEFORE, case.out), rows)


def test_a_constant_map_has_no_variance():
    case = Case((4,), 5, 6, (5, 5), kernel=1)
    problem = Convolution(case)
    problem.operands.maps = [within_nan(torch.full((case.pixels, 4), 0.3))]
    for isa in isas():
        _, statistics = problem.forward(isa)
        assert (statistics.written(BEFORE, 5)[1] == 0).all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_more_threads(case, threads, isa):
    """Correct with any number of threads, and the same number gives the same bits each time, also
    where others want the processor's cores."""
    problem = convolution(case)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    stop = threading.Event()

    def contend():
        torch.set_num_threads(2)
        while not stop.is_set():
            torch.ones(1 << 16).sum()

    other = threading.Thread(target=contend)
    try:
        results = []
        for repetition in range(4):
            if repetition == 2:
                other.start()
                torch.set_num_threads(threads)
            output, statistics = problem.forward(isa)
            memory, found, sums, weight_gradient = problem.backward(isa, inputs=case.same_size)
            written = [output, statistics, *memory, sums]
            results.append([*(part.tensor for part in written), weight_gradient])
    finally:
        stop.set()
        other.join()
        torch.set_num_threads(before)
    problem.check_output(output)
    check_statistics(statistics.written(BEFORE, case.out), output.written(BEFORE, case.out))
    problem.check_weight_gradient(weight_gradient)
    if case.same_size:
        problem.check_input_gradients(memory, found, sums)
    for others in results[:-1]:
        for one, another in zip(results[-1], others, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=0, equal_nan=True)


WINDOW = [2, 5, 6, 3, 3, 1, 1]
"""Of the calls that must fail; each differs from a call that succeeds in one argument."""


def forward_arguments():
    isa = isas()[-1]
    return {
        "maps": [ones(60, 7), ones(60, 5)],
        "segments": [1, 4, 2, 3],
        "prologue": ones(3, 7),
        "activation": 1,
        "weight": ones(6, 7, 3, 3),
        "window": WINDOW,
        "output": torch.full((60, 9), torch.nan),
        "output_channel": 2,
        "statistics": torch.full((2, 9), torch.nan),
        "workspace": aligned_workspace(
            operators.training_convolution_workspace(WINDOW, 7, 6, True, -1, isa)
        ),
        "winograd": -1,
        "isa": isa,
    }


def backward_arguments():
    forward = forward_arguments()
    return {
        **{name: forward[name] for name in list(forward)[:6]},
        "output": ones(60, 9),
        "gradient": ones(60, 9),
        "output_channel": 2,
        "correction": ones(2, 9),
        "input_gradients": [torch.full((60, 7), torch.nan), torch.full((60, 5), torch.nan)],
        "accumulate": [0, 1],
        "sums": torch.full((2, 7), torch.nan),
        "weight_gradient": torch.full((6, 7, 3, 3), torch.nan),
        "workspace": forward["workspace"],
        "winograd": -1,
        "isa": forward["isa"],
    }


COMMON_FAILURES = {
    "maps-empty": {"maps": [], "segments": []},
    "maps-dtype": {"maps": [ones(60, 7), ones(60, 5).double()]},
    "maps-pixels": {"maps": [ones(60, 7), ones(59, 5)]},
    "maps-dimensions": {"maps": [ones(60, 7), ones(2, 5, 6, 5)]},
    "maps-not-contiguous": {"maps": [ones(60, 7), ones(5, 60).T]},
    "maps-device": {"maps": [ones(60, 7), torch.empty(60, 5, device="meta")]},
    "segments-count": {"segments": [1, 4, 2]},
    "segments-end": {"segments": [1, 4, 3, 3]},
    "segments-negative": {"segments": [-1, 4, 2, 3]},
    "segments-no-channels": {"segments": [1, 7, 2, 0]},
    "segments-huge": {"segments": [1, 4, 2**62, 3]},
    "prologue-channels": {"prologue": ones(3, 8)},
    "prologue-rows": {"prologue": ones(2, 7)},
    "prologue-empty": {"prologue": torch.empty(0)},
    "prologue-dtype": {"prologue": ones(3, 7).half()},
    "prologue-not-contiguous": {"prologue": ones(7, 3).T},
    "activation-negative": {"activation": -1},
    "activation-large": {"activation": 3},
    "weight-channels": {"weight": ones(6, 8, 3, 3)},
    "weight-window": {"weight": ones(6, 7, 3, 1)},
    "weight-dimensions": {"weight": ones(6, 63)},
    "weight-none": {"weight": ones(0, 7, 3, 3)},
    "weight-dtype": {"weight": ones(6, 7, 3, 3).double()},
    "window-count": {"window": WINDOW[:6]},
    "window-batch": {"window": [0, *WINDOW[1:]]},
    "window-other-batch": {"window": [3, *WINDOW[1:]]},
    "window-height": {"window": [2, -5, *WINDOW[2:]]},
    "window-kernel": {"window": [2, 5, 6, 0, 3, 1, 1]},
    "window-stride": {"window": [2, 5, 6, 3, 3, 0, 1]},
    "window-padding": {"window": [2, 5, 6, 3, 3, 1, 3]},
    "window-negative-padding": {"window": [2, 5, 6, 3, 3, 1, -1]},
    "window-too-large": {"window": [2, 5, 6, 9, 9, 1, 0], "weight": ones(6, 7, 9, 9)},
    "window-larger-than-map": {"window": [2, 5, 6, 7, 7, 1, 0], "weight": ones(6, 7, 7, 7)},
    "window-overflow": {"window": [2**30, 2**30, 2**30, 3, 3, 1, 1]},
    "output-pixels": {"output": ones(61, 9)},
    "output-channels": {"output": ones(60, 7)},
    "output-dtype": {"output": ones(60, 9).double()},
    "output-not-contiguous": {"output": ones(9, 60).T},
    "output-other-window": {"window": [2, 5, 6, 3, 3, 1, 0]},
    "output-channel-negative": {"output_channel": -1},
    "output-channel-large": {"output_channel": 4},
    "workspace-small": {"workspace": aligned_workspace(64)},
    "workspace-empty": {"workspace": torch.empty(0)},
    "workspace-dtype": {"workspace": torch.empty(1 << 20, dtype=torch.float64)},
    "winograd": {"winograd": 3},
    "isa-negative": {"isa": -1},
    "isa-large": {"isa": 99},
    "isa-of-bfloat16": {"isa": 4},
}
FORWARD_FAILURES = {
    "statistics-channels": {"statistics": ones(2, 8)},
    "statistics-rows": {"statistics": ones(3, 9)},
    "statistics-dtype": {"statistics": ones(2, 9).double()},
}
BACKWARD_FAILURES = {
    "gradient-pixels": {"gradient": ones(59, 9)},
    "gradient-channels": {"gradient": ones(60, 7)},
    "gradient-dtype": {"gradient": ones(60, 9).bfloat16()},
    "gradient-not-contiguous": {"gradient": ones(9, 60).T},
    "correction-channels": {"correction": ones(2, 6)},
    "correction-empty": {"correction": torch.empty(0)},
    "correction-dtype": {"correction": ones(2, 9).double()},
    "input-gradients-count": {"input_gradients": [ones(60, 7)]},
    "input-gradients-pixels": {"input_gradients": [ones(60, 7), ones(30, 5)]},
    "input-gradients-channels": {"input_gradients": [ones(60, 7), ones(60, 4)]},
    "input-gradients-dtype": {"input_gradients": [ones(60, 7), ones(60, 5).double()]},
    "accumulate-count": {"accumulate": [0]},
    "sums-empty": {"sums": torch.empty(0)},
    "sums-channels": {"sums": ones(2, 9)},
    "sums-dtype": {"sums": ones(2, 7).double()},
    "weight-gradient-outputs": {"weight_gradient": ones(5, 7, 3, 3)},
    "weight-gradient-channels": {"weight_gradient": ones(6, 6, 3, 3)},
    "weight-gradient-dtype": {"weight_gradient": ones(6, 7, 3, 3).double()},
    "stride-with-input-gradients": {
        "window": [2, 5, 6, 3, 3, 2, 1],
        "output": ones(18, 9),
        "gradient": ones(18, 9),
    },
    "smaller-output-with-input-gradients": {
        "window": [2, 5, 6, 3, 3, 1, 0],
        "output": ones(24, 9),
        "gradient": ones(24, 9),
    },
}


@pytest.mark.parametrize("name", [*COMMON_FAILURES, *FORWARD_FAILURES])
def test_forward_refuses(name):
    change = {**COMMON_FAILURES, **FORWARD_FAILURES}[name]
    check_fails(operators.training_convolution_forward, forward_arguments, change)


@pytest.mark.parametrize("name", [*COMMON_FAILURES, *BACKWARD_FAILURES])
def test_backward_refuses(name):
    change = {**COMMON_FAILURES, **BACKWARD_FAILURES}[name]
    check_fails(operators.training_convolution_backward, backward_arguments, change)


def test_refuses_a_misaligned_workspace():
    for operator, arguments in (
        (operators.training_convolution_forward, forward_arguments),
        (operators.training_convolution_backward, backward_arguments),
    ):
        floats = arguments()["workspace"].numel()
        change = {"workspace": aligned_workspace(floats + 16)[1:]}
        check_fails(operator, arguments, change)


def test_refuses_a_workspace_one_float_short():
    """Of the two calls, one at least needs all that was asked for."""
    messages = []
    for operator, arguments in (
        (operators.training_convolution_forward, forward_arguments()),
        (operators.training_convolution_backward, backward_arguments()),
    ):
        arguments["workspace"] = arguments["workspace"][:-1]
        try:
            operator(*arguments.values())
        except RuntimeError as error:
            messages.append(str(error))
    assert messages
    assert all("floats, expected" in message for message in messages)


@pytest.mark.parametrize(
    "arguments",
    [
        (WINDOW, 0, 6, True, False, 0),
        (WINDOW, 7, -1, True, False, 0),
        (WINDOW[:5], 7, 6, True, False, 0),
        ([2, 5, 6, 3, 3, 1, 3], 7, 6, True, False, 0),
        (WINDOW, 7, 6, True, False, 99),
    ],
)
def test_workspace_refuses(arguments):
    with pytest.raises(RuntimeError, match="threshnet_fast: "):
        operators.training_convolution_workspace(*arguments)


HUGE = """
import torch
from threshnet_fast.engines import cpu

isa = cpu.isa_code(torch.float32)
operators = torch.ops.threshnet_fast_cpu
none = torch.empty(0)
for window in ([2**22, 2**21, 2**21, 1, 1, 1, 0], [2**30, 2**30, 2**30, 3, 3, 1, 1]):
    operands = [none.view(0, 7)], [0, 7], torch.ones(3, 7), 1, torch.ones(6, 7, *window[3:5])
    for call in (
        lambda: operators.training_convolution_workspace(window, 7, 6, True, -1, isa),
        lambda: operators.training_convolution_forward(
            *operands, window, none.view(0, 6), 0, none, torch.empty(1 << 20), False, isa
        ),
        lambda: operators.training_pool_workspace(window, 7, isa),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "window" in str(error), error
        else:
            raise AssertionError(window)
"""


def test_windows_beyond_memory_are_refused():
    """Their pixels, multiplied in 64 bits, may be none; in a process of its own, that a crash is
    not the end of all tests."""
    result = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
