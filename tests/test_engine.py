"""The C++ engine against the float64 reference: step by step, whole networks, failure paths."""

import copy
from pathlib import Path
from random import Random

import pytest
import torch
from alone import run_alone
from data import photographs
from test_plan import small
from tolerance import assert_within, dot_bound
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.plan import (
    Arena,
    FusedConv,
    Pool,
    execute_reference,
    lower,
    plan_memory,
    serialize,
)
from threshnet_fast.plan.reference import activate

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
operators = torch.ops.threshnet_fast_cpu
# Algorithms, and the outputs of their tiles in one direction.
WINOGRAD = {2: 2, 3: 4}

A, B = 0.5**0.5, 2**0.5
WINOGRAD_MATRICES = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [1, 0, -2.5, 0, 1, 0],
            [0, -2 * A, -2, A, 1, 0],
            [0, 2 * A, -2, -A, 1, 0],
            [0, -B / 2, -0.5, B, 1, 0],
            [0, B / 2, -0.5, -B, 1, 0],
            [0, 1, 0, -2.5, 0, 1],
        ],
        [
            [1, 0, 0],
            [-2 / 3, -2 / 3 * A, -1 / 3],
            [-2 / 3, 2 / 3 * A, -1 / 3],
            [1 / 6, B / 6, 1 / 3],
            [1 / 6, -B / 6, 1 / 3],
            [0, 0, 1],
        ],
        [
            [1, 1, 1, 1, 1, 0],
            [0, A, -A, B, -B, 0],
            [0, 0.5, 0.5, 2, 2, 0],
            [0, A / 2, -A / 2, 2 * B, -2 * B, 1],
        ],
    ),
}
"""Of F(m x m, 3x3): B^T, G and A^T, in ``A^T ((G w G^T) * (B^T x B)) A``."""


def winograd(x, weight, size, absolute=False):
    """A 3x3 convolution by tiles of ``size`` x ``size`` outputs; of absolute values, all of them
    added, where ``absolute`` asks for a bound on what is rounded."""
    matrices = (torch.tensor(m, dtype=torch.float64) for m in WINOGRAD_MATRICES[size])
    inputs, weights, outputs = (m.abs() if absolute else m for m in matrices)
    x, weight = (x.abs(), weight.abs()) if absolute else (x, weight)
    height, width = x.shape[2:]
    x = F.pad(x, (1, 1 + -width % size, 1, 1 + -height % size))
    tiles = x.unfold(2, size + 2, size).unfold(3, size + 2, size)
    products = torch.einsum(
        "ncyxij,ocij->noyxij", inputs @ tiles @ inputs.T, weights @ weight @ weights.T
    )
    y = (outputs @ products @ outputs.T).transpose(3, 4)
    return y.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


@pytest.mark.parametrize("size", [2, 4])
def test_winograd(size):
    """The matrices are those of a convolution; so is what the bounds below are made of."""
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    exact = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(winograd(x, weight, size), exact, rtol=0, atol=1e-12)
    assert (winograd(x, weight, size, absolute=True) >= exact.abs()).all()


def isas():
    """Codes of the instruction sets that can be tested here."""
    return cpu.isa_codes() if cpu.unavailable_reason() is None else [0]


def separate_arena(plan):
    """An arena in which no two buffers share memory, so that all can be looked at afterwards."""
    shared = plan_memory(plan)
    offsets, size = [], 0
    for buffer, offset, pitch in zip(plan.buffers, shared.offsets, shared.pitches, strict=True):
        offsets.append(None if offset is None else size)
        if offset is not None:
            size += -(-plan.input_shape[0] * buffer.pixels * pitch // 16) * 16
    return Arena(tuple(offsets), shared.pitches, size)


def feature_maps(plan, arena, memory, x, output):
    """Function that returns the features of a segment in float64, of a plan that has been run.

    Args:
        plan: The plan.
        arena: As :func:`separate_arena` returns it.
        memory: What the arena held afterwards, flat, in the dtype of the features.
        x: The plan's input.
        output: Its output.
    """
    maps = []
    for buffer, offset, pitch in zip(plan.buffers, arena.offsets, arena.pitches, strict=True):
        size = (len(x), buffer.height, buffer.width, pitch)
        if offset is None:
            maps.append(None)
        else:
            flat = memory[offset : offset + torch.Size(size).numel()]
            maps.append(flat.view(size).permute(0, 3, 1, 2).double())
    maps[0] = x.double()
    maps[-1] = output.double().reshape(len(x), -1, plan.output.height, plan.output.width)
    return lambda segment: maps[segment.buffer].narrow(1, segment.channel, segment.channels)


def compile_plan(plan, isa=None, arena=None, threads=2, winograd=-1):
    description = serialize(plan, arena or plan_memory(plan))
    isa = operators.best_isa() if isa is None else isa
    return operators.compile_plan(description, isa, threads, winograd)


def run(plan, x, isa, arena=None, winograd=-1):
    """Runs a plan in a poisoned workspace; returns the output and the workspace."""
    threads = torch.get_num_threads()
    program = compile_plan(plan, isa, arena, threads, winograd)
    packed = operators.pack_weights(program, plan.weights())
    workspace = operators.create_workspace(program, threads).fill_(torch.nan)
    output = operators.run_plan(x, program, packed, workspace)
    return output.flatten(1) if plan.flat_output else output, workspace


def normalised(step, x):
    """What a step computes on, after its prologue if it has one, and the magnitude of its terms."""
    if step.prologue is None:
        return x, x.abs()
    prologue = step.prologue
    scale, shift = (t.double()[:, None, None] for t in (prologue.scale, prologue.shift))
    return activate(x * scale + shift, prologue.activation), x.abs() * scale.abs() + shift.abs()


def double_step(step, x):
    """One step in float64, and the bound on the error of computing it in float32."""
    x, magnitude = normalised(step, x)
    if isinstance(step, FusedConv):
        weight = step.weight.double()
        bias = None if step.bias is None else step.bias.double()
        window = {"stride": step.stride, "padding": step.padding, "groups": step.groups}
        y = F.conv2d(x, weight, bias, **window)
        absolute = None if bias is None else bias.abs()
        bound = F.conv2d(magnitude, weight.abs(), absolute, **window)
        length = weight[0].numel() + 1
        return activate(y, step.activation), dot_bound(bound, length, torch.float32)
    if isinstance(step, Pool):
        if step.average:
            y, bound = (F.avg_pool2d(t, step.kernel, step.stride) for t in (x, magnitude))
            return y, dot_bound(bound, step.kernel[0] * step.kernel[1] + 1, torch.float32)
        y = F.max_pool2d(x, step.kernel, step.stride, step.padding)
        return y, torch.zeros_like(y)
    mean, magnitude = x.mean((2, 3)), magnitude.mean((2, 3))
    length = x.shape[2] * x.shape[3]
    if step.weight is not None:
        bias = None if step.bias is None else step.bias.double()
        mean = F.linear(mean, step.weight.double(), bias)
        magnitude = F.linear(
            magnitude, step.weight.double().abs(), None if bias is None else bias.abs()
        )
        length += x.shape[1] + 1
    return mean[:, :, None, None], dot_bound(magnitude, length, torch.float32)[:, :, None, None]


def single_step(step, x, algorithm):
    """One step in float64, and the bound on the error of an algorithm in float32."""
    expected, bound = double_step(step, x)
    if algorithm in WINOGRAD:
        size = WINOGRAD[algorithm]
        weight = step.weight.double()
        magnitude = winograd(x, weight, size, absolute=True)
        magnitude += step.bias.double().abs()[:, None, None] if step.bias is not None else 0
        # Sums over the channels, and those of four transforms of a tile.
        length = weight.shape[1] + 4 * (size + 2)
        bound = dot_bound(magnitude, length, torch.float32)
    return expected, bound


def check_every_step(plan, x, isa, forced, threads, run=run, expect=single_step):
    """Each step is given what the engine's own earlier steps wrote, so errors do not add up.

    Returns the sizes of the tiles of the steps that used Winograd.
    """
    arena = separate_arena(plan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output, workspace = run(plan, x, isa, arena, forced)
    finally:
        torch.set_num_threads(before)

    read = feature_maps(plan, arena, workspace, x, output)
    algorithms = operators.program_algorithms(compile_plan(plan, isa, arena, threads, forced))
    for step, algorithm in zip(plan.steps, algorithms.tolist(), strict=False):
        inputs = torch.cat([read(s) for s in step.inputs], 1)
        assert_within(read(step.output), *expect(step, inputs, algorithm))
    return {WINOGRAD[algorithm] for algorithm in algorithms.tolist() if algorithm in WINOGRAD}


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("forced", [0, 2, 4])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "growth"),
    [((1, 3, 32, 32), 10), ((2, 3, 45, 33), 10), ((3, 3, 64, 96), 10), ((2, 3, 69, 118), 40)],
)
def test_every_step(randomised, isa, forced, threads, shape, growth):
    plan = lower(randomised(small(growth_rates=(8, 8, growth, 14))), shape)
    assert check_every_step(plan, torch.randn(shape), isa, forced, threads) == {forced} - {0}


def assert_error_at_most_twice_that_of_pytorch(model, x):
    """Largest error against the module in float64, of the engine and of PyTorch's own float32."""
    with torch.no_grad(), tf.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
        eager = (model(x) - expected).abs().max().item()
    plan = lower(model, x.shape)
    for isa in isas():
        for forced in (-1, 0):
            fused = (run(plan, x, isa, winograd=forced)[0] - expected).abs().max().item()
            case = f"instruction set {isa}, Winograd {forced}"
            assert fused <= 2 * eager, f"{case}: {fused:.3g}, PyTorch {eager:.3g}"


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 96)])
def test_error_on_small_photographs(randomised, size, batch):
    model = randomised(tf.ThreshNet95(num_classes=1000).eval())
    assert_error_at_most_twice_that_of_pytorch(model, photographs(*size, count=batch))


@pytest.mark.parametrize("size", [(224, 224), (225, 225), (160, 288)])
def test_error_on_large_photographs(randomised, size):
    model = randomised(tf.ThreshNet95(num_classes=1000).eval())
    assert_error_at_most_twice_that_of_pytorch(model, photographs(*size, count=1))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("size", [(224, 224), (225, 225), (160, 288)])
def test_error_on_batches_of_large_photographs(randomised, size, batch):
    model = randomised(tf.ThreshNet95(num_classes=1000).eval())
    assert_error_at_most_twice_that_of_pytorch(model, photographs(*size, count=batch))


def test_error_on_random_input(randomised):
    model = randomised(tf.ThreshNet79(num_classes=1000).eval())
    assert_error_at_most_twice_that_of_pytorch(model, torch.randn(3, 3, 64, 80))


@pytest.mark.parametrize("isa", isas())
def test_features_without_head(randomised, isa):
    model = randomised(small())
    x = torch.randn(2, 3, 50, 38)
    plan = lower(model, x.shape, head=False)
    output, _ = run(plan, x, isa)
    assert output.shape == (2, 48, 3, 2)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output.double(), execute_reference(plan, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
@pytest.mark.parametrize("isa", isas())
def test_any_number_of_input_channels(randomised, isa, channels):
    model = randomised(small(in_chans=channels))
    x = torch.randn(2, channels, 33, 40)
    plan = lower(model, x.shape)
    output, _ = run(plan, x, isa)
    torch.testing.assert_close(output.double(), execute_reference(plan, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 3)[..., ::2][..., : x.shape[3]],
        lambda x: x[:1].expand(x.shape),
        lambda x: torch.cat([x, x], 1)[:, 1:4],
    ],
    ids=["nchw", "channels_last", "transposed", "strided", "expanded", "narrowed"],
)
def test_input_strides(randomised, layout):
    model = randomised(small())
    x = layout(torch.randn(3, 3, 40, 40))
    plan = lower(model, x.shape)
    for isa in isas():
        output, _ = run(plan, x, isa)
        torch.testing.assert_close(
            output.double(), execute_reference(plan, x), rtol=1e-5, atol=1e-5
        )


def test_results_do_not_depend_on_what_the_workspace_held(randomised):
    plan = lower(randomised(small()), (2, 3, 40, 40))
    x = torch.randn(2, 3, 40, 40)
    program = compile_plan(plan)
    packed = operators.pack_weights(program, plan.weights())
    workspace = operators.create_workspace(program, torch.get_num_threads())
    first = operators.run_plan(x, program, packed, workspace.fill_(torch.nan))
    second = operators.run_plan(x, program, packed, workspace.fill_(1e30))
    assert first.equal(second)


def test_batches_in_parts(randomised):
    """A batch larger than the program's runs in parts, the last one overlapping."""
    model = randomised(small())
    x = torch.randn(7, 3, 32, 32)
    plan = lower(model, (3, 3, 32, 32))
    output, _ = run(plan, x, operators.best_isa())
    expected = execute_reference(lower(model, x.shape), x)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_pass_through(randomised):
    model = randomised(small())
    for value in (torch.nan, torch.inf):
        x = torch.randn(2, 3, 32, 32)
        x[1, 0, 5, 7] = value
        for isa in isas():
            output, _ = run(lower(model, x.shape), x, isa)
            assert output[0].isfinite().all()
            assert not output[1].isfinite().any()


@pytest.fixture
def compiled(randomised):
    plan = lower(randomised(small()), (2, 3, 32, 32))
    program = compile_plan(plan)
    packed = operators.pack_weights(program, plan.weights())
    workspace = operators.create_workspace(program, torch.get_num_threads())
    return plan, program, packed, workspace


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 3, 32), "four dimensions"),
        (torch.randn(2, 4, 32, 32), r"\[2, 4, 32, 32\]"),
        (torch.randn(1, 3, 32, 32), r"\[1, 3, 32, 32\]"),
        (torch.randn(2, 3, 32, 33), r"\[2, 3, 32, 33\]"),
        (torch.randn(2, 3, 32, 32, dtype=torch.float64), "float32"),
        (torch.randn(2, 3, 32, 32).half(), "float32"),
    ],
)
def test_run_plan_refuses_a_wrong_input(compiled, x, message):
    _, program, packed, workspace = compiled
    with pytest.raises(RuntimeError, match=message):
        operators.run_plan(x, program, packed, workspace)


def test_run_plan_refuses_what_does_not_belong_together(compiled):
    plan, program, packed, workspace = compiled
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="packed does not belong"):
        operators.run_plan(x, program, packed[:-16], workspace)
    with pytest.raises(RuntimeError, match="workspace is too small"):
        operators.run_plan(x, program, packed, workspace[:16])
    with pytest.raises(RuntimeError, match="workspace is not aligned"):
        operators.run_plan(x, program, packed, torch.cat([workspace, workspace])[1:])
    with pytest.raises((RuntimeError, ValueError), match="program is not one that"):
        operators.run_plan(x, program[:-8].clone(), packed, workspace)
    with pytest.raises((RuntimeError, ValueError), match="program is not one that"):
        operators.run_plan(x, torch.zeros(4096, dtype=torch.uint8), packed, workspace)
    with pytest.raises((RuntimeError, ValueError), match=r"weights has 3 tensors, expected"):
        operators.pack_weights(program, plan.weights()[:3])
    wrong = plan.weights()
    wrong[0] = wrong[0][:-1]
    with pytest.raises((RuntimeError, ValueError), match="weight of step 0 has"):
        operators.pack_weights(program, wrong)


def _edit(description, index, value):
    edited = description.clone()
    edited[index] = value
    return edited


def test_compile_refuses_an_inconsistent_description(randomised):
    plan = lower(randomised(small()), (2, 3, 32, 32))
    description = serialize(plan, plan_memory(plan))
    isa = operators.best_isa()
    cases = {
        "not a plan's description": _edit(description, 0, 1),
        "another version": _edit(description, 1, 99),
        "dimension": _edit(description, 2, 0),
        "ends too early": description[:-1],
        "longer than its steps": torch.cat([description, description[:1]]),
        "does not fit in the arena": _edit(description, 12, 16),
    }
    for message, case in cases.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            operators.compile_plan(case.contiguous(), isa, 2, -1)
    with pytest.raises((RuntimeError, ValueError), match="instruction set 9"):
        operators.compile_plan(description, 9, 2, -1)
    with pytest.raises((RuntimeError, ValueError), match="threads"):
        operators.compile_plan(description, isa, 0, -1)
    with pytest.raises((RuntimeError, ValueError), match="winograd must be -1, 0, 2 or 4"):
        operators.compile_plan(description, isa, 2, 3)


def test_compile_survives_any_single_wrong_entry(randomised):
    """Every entry changed in turn, to values near and far: compiled or refused, never a crash."""
    plan = lower(randomised(small()), (1, 3, 32, 32))
    description = serialize(plan, plan_memory(plan))
    refused = 0
    for index in range(len(description)):
        for value in (-(2**62), -5, -1, 0, 1, 7, int(description[index]) + 1, 2**31, 2**62):
            try:
                operators.compile_plan(_edit(description, index, value), 0, 2, -1)
            except (RuntimeError, ValueError):
                refused += 1
    assert refused > 4 * len(description)


def convolution(channels, out, kernel, size, *, segments=1, padding=0):
    """A description of one convolution that reads external inputs."""
    window = (size + 2 * padding - kernel) + 1
    header = [0x4E4C5046544E54, 3, 1, channels, size, size, out, window, window]
    header += [segments, 0, 1, 0, segments + 1, 1]
    maps = range(segments)
    buffers = [number for i in maps for number in (size, size, channels, channels, -3 - i)]
    buffers += [window, window, out, out, -2]
    inputs = [number for i in range(segments) for number in (i, 0, channels)]
    step = [segments, *inputs, segments, 0, out, 1, 1, 0, 0, kernel, kernel, 1, 1]
    step += [padding, padding, 1, 1, 0, 0, -1, -1, -1, 0]
    return torch.tensor([*header, *buffers, 0, len(step) + 2, *step])


@pytest.mark.parametrize(
    ("description", "message"),
    [
        # 2^30 * 2^10 channels * 64 taps * 2^18 outputs: 2^64 weights, as many as none.
        (convolution(2**30, 2**18, 8, 8, segments=2**10), "step 0 reads over 2\\^24 channels"),
        (convolution(2**24, 2**24, 8, 8), "the weight of step 0 has over 2\\^48 elements"),
        (convolution(16, 2**31 - 1, 1, 1), "step 0 writes over 2\\^24 channels"),
        (convolution(2**31 - 1, 1, 1, 2**15), "buffer 0 has over 2\\^48 elements"),
    ],
)
def test_compile_refuses_sizes_beyond_any_memory(description, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        operators.compile_plan(description, operators.best_isa(), 2, -1)


@pytest.mark.parametrize("threads", [0, -1, 4097, 2**31, 2**62])
def test_numbers_of_threads_beyond_any_machine(compiled, threads):
    _, program, *_ = compiled
    with pytest.raises((RuntimeError, ValueError), match="threads"):
        operators.create_workspace(program, threads)
    with pytest.raises((RuntimeError, ValueError), match="threads must be 1 to 4096"):
        operators.compile_plan(convolution(4, 4, 1, 4), operators.best_isa(), threads, -1)


HOSTILE = (0, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))


def test_no_description_crashes():
    run_alone(run_hostile_descriptions)


def run_hostile_descriptions() -> None:
    """Compiles, packs and runs descriptions of which one entry is another."""
    random = Random(0)
    torch.set_num_threads(2)
    x = torch.randn(2, 3, 64, 64)
    accepted = refused = 0
    for model, stride in ((small(), 1), (tf.create_model("hardnet39ds"), 19)):
        plan = lower(model.eval(), x.shape)
        description = serialize(plan, plan_memory(plan))
        for index in range(0, len(description), stride):
            near = int(description[index]) + random.choice((-16, -1, 1, 2, 16))
            for value in (*HOSTILE, random.getrandbits(63), random.randrange(64), near):
                try:
                    run_description(_edit(description, index, value), plan.weights(), x)
                    accepted += 1
                except (RuntimeError, ValueError):
                    refused += 1
    assert accepted > 100
    assert refused > 8 * accepted


def run_description(description, weights, x) -> None:
    program = operators.compile_plan(description, operators.best_isa(), 2, -1)
    packed = operators.pack_weights(program, weights)
    operators.run_plan(x, program, packed, operators.create_workspace(program, 2))


def test_no_changed_program_runs(tmp_path):
    for function in (save_program, run_changed_programs):
        run_alone(function, str(tmp_path))


def program_and_operands():
    x = torch.randn(1, 3, 32, 32)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    plan = lower(small().eval(), x.shape)
    program = compile_plan(plan, threads=2)
    packed = operators.pack_weights(program, plan.weights())
    return x, program, packed, operators.create_workspace(program, 2), plan.weights()


def save_program(folder: str) -> None:
    torch.save(program_and_operands()[1], Path(folder) / "program.pt")


def run_changed_programs(folder: str) -> None:
    random = Random(0)
    x, program, packed, workspace, weights = program_and_operands()
    expected = operators.run_plan(x, program, packed, workspace)
    assert operators.run_plan(x, program.clone(), packed, workspace).equal(expected)

    def refused(changed: torch.Tensor) -> None:
        for call in (
            lambda: operators.run_plan(x, changed, packed, workspace),
            lambda: operators.pack_weights(changed, weights),
            lambda: operators.create_workspace(changed, 2),
            lambda: operators.program_layout(changed),
            lambda: operators.program_algorithms(changed),
        ):
            with pytest.raises((RuntimeError, ValueError), match="program is not one that this"):
                call()

    bits = 8 * len(program)
    for bit in [*range(8 * 64), *(random.randrange(bits) for _ in range(1000)), bits - 1]:
        changed = program.clone()
        changed[bit // 8] ^= 1 << bit % 8
        refused(changed)
    for _ in range(200):
        changed = program.clone()
        first, count = random.randrange(len(program) - 8), random.randrange(1, 9)
        changed[first : first + count] = torch.randint(0, 256, (count,), dtype=torch.uint8)
        if not changed.equal(program):
            refused(changed)
    # Of another process, of no program, of a part of one, and where it is not aligned.
    refused(torch.load(Path(folder) / "program.pt"))
    refused(torch.zeros_like(program))
    refused(program[:-8].clone())
    refused(program[:0])
    refused(torch.cat([program[:1], program])[1:])
    assert operators.run_plan(x, program, packed, workspace).equal(expected)
