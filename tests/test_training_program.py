"""Whole passes of training as programs: against float64, on poisoned memory, and refusals."""

from __future__ import annotations

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import threshnet_fast as tf
from threshnet_fast.autograd import Chain
from threshnet_fast.engines import cpu
from threshnet_fast.engines.cpu_training import Use
from threshnet_fast.engines.reference_training import ReferencePass
from threshnet_fast.engines.training import Held, Shape, shapes_of
from threshnet_fast.nn import (
    ConvBNReLU,
    DenseBlock,
    DenseTransition,
    DepthwiseConvBN,
    HarmonicBlock,
)
from threshnet_fast.plan.serialize_raw import serialize_raw

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

operators = torch.ops.threshnet_fast_cpu
SHAPES = [Shape(1, 9, 7), Shape(2, 16, 13), Shape(3, 5, 31)]
FORWARD_ONLY = Use(False, False, False, False)
STEP = Use(True, False, False, True)
CHECKPOINT, REPEATABLE = replace(STEP, checkpoint=True), replace(STEP, repeatable=True)


def dense():
    return [nn.BatchNorm2d(5), nn.ReLU(), DenseBlock(5, 3, 4, 2), DenseTransition(17, 6)]


def plain_dense():
    return [DenseBlock(5, 3, 3, bottleneck=0), nn.BatchNorm2d(14), nn.ReLU()]


def harmonic():
    block = HarmonicBlock(5, 4, 1.7, 5)
    pool = nn.MaxPool2d(2, 2)
    return [ConvBNReLU(5, 5, 1), block, pool, ConvBNReLU(block.out_channels, 3, 3)]


def harmonic_depthwise():
    block = HarmonicBlock(5, 4, 1.7, 4, "relu6", depthwise=True)
    return [block, ConvBNReLU(block.out_channels, 7, 1, activation="relu6"), DepthwiseConvBN(7)]


STAGES = [dense, plain_dense, harmonic, harmonic_depthwise]


@dataclass
class Problem:
    """A chain with an input, a gradient of its output, and what the operators take."""

    chain: Chain
    shape: Shape
    rows: Tensor
    gradient: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.chain.parameters()]

    @property
    def settings(self) -> Tensor:
        """Norms that take the batch's statistics, and leave the running ones."""
        rows = [[1.0, norm.module.eps, torch.nan] for norm in self.chain.plan.norms]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 3)

    def compile(self, use: Use, threads: int = 1, isa: int | None = None) -> Tensor:
        return operators.training_compile(
            serialize_raw(self.chain.plan),
            *(self.shape.batch, self.shape.height, self.shape.width),
            *(use.backward, use.checkpoint, use.repeatable, use.input_gradient),
            *(threads, -1, cpu.isa_code() if isa is None else isa),
        )

    def forward(self, program: Tensor, fill: float = torch.nan) -> tuple[list, list]:
        """What the operator is given: to be read, and to be written, full of some value."""
        kept, scratch, workspace, input_statistics = operators.training_layout(program)[:4].tolist()
        memory = torch.full((kept + scratch,), fill)
        variance, mean = torch.var_mean(self.rows, 0, correction=0)
        channels = self.rows.shape[1]
        memory[input_statistics : input_statistics + 2 * channels] = torch.cat([mean, variance])
        output = torch.full_like(self.gradient, fill)
        running = [torch.empty(0)] * (3 * len(self.chain.plan.norms))
        given = [program, self.rows, self.parameters, running, self.settings]
        return given, [memory, output, aligned(workspace, fill)]

    def backward(self, program: Tensor, kept: Tensor, output: Tensor, fill=torch.nan) -> list:
        _, scratch, workspace = operators.training_layout(program)[:3].tolist()
        needs = torch.ones(len(self.parameters), dtype=torch.bool)
        return [
            *(program, self.rows, output, self.gradient.clone(), self.parameters, self.settings),
            *(needs, kept, torch.full((scratch,), fill), aligned(workspace, fill)),
        ]

    def run(self, use: Use, threads=1, isa=None, fill=torch.nan) -> list[Tensor]:
        """The output's map and the gradients of parameters and input."""
        program = self.compile(use, threads, isa)
        given, (kept, output, workspace) = self.forward(program, fill)
        operators.training_forward(*given, kept, output, workspace)
        return [output, *operators.training_backward(*self.backward(program, kept, output, fill))]

    def expected(self) -> list[Tensor]:
        """The same in float64, a node at a time in plain PyTorch."""
        parameters = [parameter.double() for parameter in self.parameters]
        run = ReferencePass(self.chain.plan, self.shape, self.rows.double(), parameters, {})
        held = Held(self.rows.double(), parameters, run.output)
        rows, gradients = run.backward(
            held, run.kept, self.gradient.double(), True, [True] * len(parameters), False
        )
        return [run.output, *gradients, rows]


def aligned(floats: int, fill: float) -> Tensor:
    memory = torch.full((floats + 16,), fill)
    return memory[-(memory.data_ptr() // 4) % 16 :][:floats]


def problem(make, shape: Shape) -> Problem:
    torch.manual_seed(1)
    stages = make()
    for module in itertools.chain.from_iterable(stage.modules() for stage in stages):
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    chain = Chain([(str(i), stage.train()) for i, stage in enumerate(stages)], 5)
    of_output = chain.output_shape(shape)
    channels = chain.plan.buffers[chain.plan.output].channels
    rows = torch.randn(shape.pixels, chain.plan.buffers[0].channels)
    return Problem(chain, shape, rows, torch.randn(of_output.pixels, channels))


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Within what sums of float32 leave: each tensor by its norm, or the largest gradient's."""
    assert len(actual) == len(expected)
    largest = max(tensor.norm() for tensor in expected)
    for index, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        difference = (found.double() - wanted).norm()
        assert difference <= 2e-5 * (wanted.norm() + 0.01 * largest), index


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(one.equal(two) for one, two in zip(actual, expected, strict=True))


def isas() -> list[int]:
    return cpu.isa_codes() if cpu.unavailable_reason() is None else [0]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", STAGES)
def test_a_step_on_poisoned_memory(make, shape, isa):
    """Right, and the same bits however memory began, is divided, or is used again."""
    given = problem(make, shape)
    found = given.run(STEP, isa=isa)
    assert_close(found, given.expected())
    assert_equal(given.run(STEP, isa=isa, fill=1e30), found)
    assert_equal(given.run(CHECKPOINT, isa=isa), found)
    assert_equal(given.run(REPEATABLE, isa=isa), found)
    assert_equal(given.run(replace(REPEATABLE, checkpoint=True), isa=isa), found)


@pytest.mark.parametrize("make", STAGES)
def test_a_pass_forward_alone(make):
    given = problem(make, SHAPES[1])
    program = given.compile(FORWARD_ONLY)
    arguments, written = given.forward(program)
    operators.training_forward(*arguments, *written)
    assert written[1].equal(given.run(STEP)[0])
    with pytest.raises(RuntimeError, match="forward alone"):
        operators.training_backward(*given.backward(program, *written[:2]))


@pytest.mark.parametrize("make", STAGES)
def test_a_repeatable_pass_leaves_what_is_kept(make):
    given = problem(make, SHAPES[1])
    program = given.compile(replace(REPEATABLE, checkpoint=True))
    arguments, (kept, output, workspace) = given.forward(program, fill=0.0)
    operators.training_forward(*arguments, kept, output, workspace)
    before = kept.clone()
    first = operators.training_backward(*given.backward(program, kept, output))
    assert kept.equal(before)
    assert_equal(operators.training_backward(*given.backward(program, kept, output)), first)


@pytest.mark.parametrize("threads", [2, 3])
def test_another_number_of_threads_on_the_way_back(threads):
    """What is kept lies in the same places."""
    given = problem(harmonic, SHAPES[1])
    program, other = given.compile(STEP), given.compile(STEP, threads)
    arguments, (kept, output, workspace) = given.forward(program)
    operators.training_forward(*arguments, kept, output, workspace)
    found = operators.training_backward(*given.backward(other, kept, output))
    assert_close([output, *found], given.expected())
    again = given.run(STEP, threads)
    assert_equal(given.run(STEP, threads), again)


def test_several_python_threads_at_once():
    given = problem(dense, SHAPES[1])
    program = given.compile(STEP, 2)
    expected = given.run(STEP, 2)

    def step(_):
        arguments, (kept, output, workspace) = given.forward(program)
        operators.training_forward(*arguments, kept, output, workspace)
        return [output, *operators.training_backward(*given.backward(program, kept, output))]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(step, range(12)):
            assert_equal(found, expected)


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_flushed_by_all_threads_or_none(flush):
    """Of maximum and average pools, whose sums do not depend on the number of threads."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    tiny = torch.finfo(torch.float32).tiny
    stages = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, 1)]
    chain = Chain([(str(i), stage) for i, stage in enumerate(stages)], 5)
    shape = Shape(3, 40, 40)
    after = chain.output_shape(shape)
    rows = (torch.rand(shape.pixels, 5) + 0.5) / 2 * tiny
    given = Problem(chain, shape, rows, (torch.rand(after.pixels, 5) + 0.5) / 2 * tiny)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_flush_denormal(flush)
        found = [given.run(STEP, threads) for threads in (1, 3, 3)]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    for tensors in found:
        assert_equal(tensors, found[0])
        assert (tensors[0] == 0).all() == flush
        assert (tensors[1] == 0).all() == flush


# Memory


@pytest.mark.parametrize("use", [FORWARD_ONLY, STEP, CHECKPOINT, REPEATABLE], ids=str)
@pytest.mark.parametrize("make", STAGES)
def test_what_is_needed_at_once_does_not_overlap(make, use):
    """Places of maps and gradients, by lifetimes that are found anew."""
    given = problem(make, SHAPES[1])
    plan = given.chain.plan
    layout = operators.training_layout(given.compile(use)).tolist()
    kept, scratch = layout[:2]
    places = torch.tensor(layout[4 + len(plan.norms) :]).view(-1, 3, 2).tolist()
    shapes = shapes_of(plan, given.shape)
    last = 2 * len(plan.nodes) - 1
    needed = []
    for index, buffer in enumerate(plan.buffers):
        if index in (0, plan.output):
            continue
        readers = [
            number
            for number, node in enumerate(plan.nodes)
            if any(read.buffer == index for read in node.reads)
        ]
        writer = buffer.writers[0]
        back = (last - readers[-1], last - writer)
        spans = {0: (writer, last - writer), 2: back}
        if not use.backward:
            spans = {0: (writer, readers[-1])}
        elif use.checkpoint and buffer.temporary:
            spans = {0: (writer, readers[-1]), 1: back, 2: back}
        for kind, span in spans.items():
            memory, offset = places[index][kind]
            assert memory == (4 if kind == 2 or (kind == 1 and len(spans) == 3) else 3)
            begin = offset if memory == 3 else kept + offset
            if use.repeatable and memory == 4:
                assert offset >= 0
            size = shapes[index].pixels * buffer.channels
            assert begin >= 0
            assert begin + size <= kept + scratch
            if memory == 3:
                assert begin + size <= kept
            needed.append((span, (begin, begin + size)))
    assert needed
    for (span, place), (other_span, other_place) in itertools.combinations(needed, 2):
        together = span[0] <= other_span[1] and other_span[0] <= span[1]
        overlapping = place[0] < other_place[1] and other_place[0] < place[1]
        assert not (together and overlapping)


def test_gradients_take_the_places_of_maps():
    """A step takes little more than its maps, and far less where bottlenecks are not kept."""
    model = tf.DenseNet(first_channels=12, blocks=(8, 8), growth_rate=6, small_stem=True)
    model.train()(torch.randn(4, 3, 40, 36)).sum().backward()
    part = model._fused._training._parts._parts[0]
    shape = Shape(4, 40, 36)
    shapes = shapes_of(part.plan, shape)
    maps = sum(s.pixels * b.channels for s, b in zip(shapes, part.plan.buffers, strict=True))

    def floats(use):
        return sum(operators.training_layout(part.programs.get(shape, use).program)[:2].tolist())

    step = floats(Use(True, False, False, False))
    assert step < 1.2 * maps
    assert floats(Use(True, True, False, False)) < 0.6 * step
    assert floats(Use(True, False, True, False)) > step
    assert floats(FORWARD_ONLY) < 0.6 * maps


# What a step leaves


def test_running_statistics_are_known_to_have_changed():
    """To autograd, and so to what was packed of the model for inference."""
    model = tf.DenseNet(first_channels=8, blocks=(2, 2), growth_rate=4, small_stem=True).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    versions = [buffer._version for buffer in buffers]
    with tf.use_backend("cpu"):
        model(torch.randn(2, 3, 32, 32))
    assert all(buffer._version > old for buffer, old in zip(buffers, versions, strict=True))
    assert all(norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_counted_in_another_dtype(momentum):
    """As they are where somebody has made all buffers floating-point numbers."""
    model = tf.DenseNet(first_channels=8, blocks=(2, 2), growth_rate=4, small_stem=True).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
        norm.num_batches_tracked = norm.num_batches_tracked.float()
    x = torch.randn(2, 3, 32, 32)
    with tf.use_backend("cpu"):
        model(x)
        first = norms[0].running_mean.clone()
        model(2 * x)
    assert all(norm.num_batches_tracked == 2 for norm in norms)
    # The first convolution is linear, and its mean began at 0.
    mean = first / (0.1 if momentum else 1)
    expected = first.lerp(2 * mean, 0.1 if momentum else 0.5)
    torch.testing.assert_close(norms[0].running_mean, expected)


def test_gradients_have_memory_of_their_own():
    model = tf.DenseNet(first_channels=8, blocks=(2, 2), growth_rate=4, small_stem=True).train()
    model = model.to(memory_format=torch.channels_last)
    with tf.use_backend("cpu"):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
        assert parameter.grad.untyped_storage().nbytes() == parameter.nbytes


# What is refused


def description() -> list[int]:
    return serialize_raw(problem(harmonic, SHAPES[0]).chain.plan).tolist()


def compile_description(numbers: list[int], batch=2, height=12, width=11, use=STEP) -> Tensor:
    return operators.training_compile(
        torch.tensor(numbers, dtype=torch.int64),
        *(batch, height, width),
        *(use.backward, use.checkpoint, use.repeatable, use.input_gradient),
        *(1, -1, 0),
    )


def test_a_description_of_any_numbers():
    """Each entry is changed to what a plan does not have; none may end the process."""
    numbers = description()
    refused = 0
    for index in range(len(numbers)):
        for value in (-1, 0, 1, 3, 9, 2**20, 2**31, 2**62, -(2**63)):
            changed = [*numbers[:index], value, *numbers[index + 1 :]]
            with contextlib.suppress(ValueError):
                compile_description(changed)
                refused -= 1
            refused += 1
    assert refused > 4 * len(numbers)
    for length in range(len(numbers)):
        with pytest.raises(ValueError, match="invalid plan"):
            compile_description(numbers[:length])
    with pytest.raises(ValueError, match="longer than its nodes"):
        compile_description([*numbers, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"height": -1}, "height is -1"),
        ({"width": 2**40}, "width is"),
        ({"batch": 2**31 - 1, "height": 2**31 - 1}, "over 2\\^48 elements"),
        ({"height": 1, "width": 1}, "larger than the padded map"),
    ],
)
def test_a_shape_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        compile_description(description(), **change)


def test_a_gradient_that_cannot_be_led_back():
    chain = Chain([("0", ConvBNReLU(3, 4, 3, stride=2)), ("1", ConvBNReLU(4, 4, 1))], 3)
    numbers = serialize_raw(chain.plan).tolist()
    compile_description(numbers, use=replace(STEP, input_gradient=False))
    with pytest.raises(ValueError, match="changes the size"):
        compile_description(numbers)


def test_a_program_that_was_changed():
    given = problem(harmonic, SHAPES[0])
    program = given.compile(STEP)
    for position in range(0, len(program), 97):
        changed = program.clone()
        changed[position] ^= 1
        arguments, written = given.forward(program)
        with pytest.raises(ValueError, match="was changed"):
            operators.training_forward(changed, *arguments[1:], *written)
        assert written[1].isnan().all()
    for other in (program[:-1], program[:8], torch.empty(0, dtype=torch.uint8), program.float()):
        with pytest.raises((RuntimeError, ValueError), match="program"):
            operators.training_layout(other)


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


CHANGES = {
    "freed": freed,
    "short": lambda tensor: tensor[:-1].clone() if tensor.dim() else tensor,
    "of another dtype": lambda tensor: tensor.to(torch.float16),
    "with gaps": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("back", [False, True])
def test_tensors_that_do_not_fit(change, back):
    given = problem(harmonic, SHAPES[0])
    program = given.compile(REPEATABLE)
    floats = operators.training_layout(program)[0]
    arguments, (memory, output, workspace) = given.forward(program)
    operator = operators.training_forward
    operator(*arguments, memory[:floats], output, workspace)
    if back:
        operator = operators.training_backward
        arguments, written = given.backward(program, memory[:floats], output), []
    else:
        arguments, (memory, *written) = given.forward(program)
        written = [memory[:floats], *written]
    every = [*arguments, *written]
    for index, argument in enumerate(every):
        several = argument if isinstance(argument, list) else [argument]
        for place in range(0, len(several), 5):
            if several[place].numel() == 0:
                continue
            changed = CHANGES[change](several[place])
            # A weight may have any strides.
            if change == "with gaps" and changed.dim() == 4:
                continue
            replaced = [*several[:place], changed, *several[place + 1 :]]
            new = replaced if isinstance(argument, list) else changed
            with pytest.raises((RuntimeError, ValueError), match="threshnet_fast"):
                operator(*every[:index], new, *every[index + 1 :])
    if not back:
        assert written[1].isnan().all()


def test_running_statistics_that_do_not_fit():
    given = problem(harmonic, SHAPES[0])
    arguments, written = given.forward(given.compile(STEP))
    arguments[4][0] = torch.tensor([1.0, 1e-5, 0.1])
    channels = given.chain.plan.norms[0].channels
    vector, count = torch.zeros(channels), torch.zeros((), dtype=torch.int64)
    wrong = [
        [vector[1:], vector, count],
        [vector, torch.empty(0), count],
        [vector, vector.double(), count],
        [freed(vector), vector, count],
        [vector, vector, count.int()],
        [vector, vector, torch.zeros(2, dtype=torch.int64)],
    ]
    for running in wrong:
        arguments[3] = [*running, *arguments[3][3:]]
        with pytest.raises(RuntimeError, match="running"):
            operators.training_forward(*arguments, *written)
    # Without the batch's statistics there must be others.
    arguments[4][0, 0] = 0
    arguments[3] = [torch.empty(0)] * len(arguments[3])
    with pytest.raises(RuntimeError, match=r"running\[0\] is empty"):
        operators.training_forward(*arguments, *written)
    assert written[1].isnan().all()
