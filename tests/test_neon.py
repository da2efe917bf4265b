"""The CPU engine on 64-bit ARM, in an emulator; and by the same driver on this machine.

What runs here natively shows that a failure on ARM is not one of the driver.
"""

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from cpu_cross.engine import Driver, find_target
from data import photographs
from test_baselines import SMALL as BASELINES
from test_engine import WINOGRAD, double_step, feature_maps, separate_arena, winograd
from test_plan import small
from test_plan_steps import bound_of, plan_of_step, resize, sum_of
from tolerance import assert_within, dot_bound
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.plan import (
    Buffer,
    Segment,
    execute_reference,
    lower,
    plan_memory,
    serialize,
)
from threshnet_fast.plan.codes import ACTIVATIONS
from threshnet_fast.plan.ir import Resize
from threshnet_fast.plan.reference import reference_step

ENGINES = ("aarch64-neon", "aarch64-scalar", "native-avx512", "native-avx2", "native-scalar")
DIRECT, PACKED, WINOGRAD_2, WINOGRAD_4 = range(4)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Function that returns the driver for an architecture, or skips the test."""
    built = {}

    def get(architecture):
        if architecture not in built:
            target = find_target(architecture)
            if isinstance(target, str):
                built[architecture] = target
            else:
                built[architecture] = Driver(target, tmp_path_factory.mktemp(architecture))
        if isinstance(built[architecture], str):
            pytest.skip(built[architecture])
        return built[architecture]

    return get


@pytest.fixture(params=ENGINES)
def engine(request, drivers):
    """Function that runs a plan on one architecture and instruction set."""
    architecture, isa = request.param.split("-")
    driver = drivers(architecture)
    if isa not in driver.isas:
        pytest.skip(f"this machine has no {isa}")
    return lambda *arguments, **options: driver(*arguments, isa, **options)


def winograd_bound(x, weight, bias, size):
    """Bound on the error of a 3x3 convolution by tiles of ``size`` x ``size`` outputs."""
    magnitude = winograd(x, weight, size, absolute=True)
    if bias is not None:
        magnitude += bias.double().abs()[:, None, None]
    # Sums over the channels, and those of four transforms of a tile.
    return dot_bound(magnitude, weight.shape[1] + 4 * (size + 2), torch.float32)


@dataclass(frozen=True)
class Convolution:
    """A convolution over segments, which the caller holds."""

    channels: tuple[int, ...]
    size: tuple[int, int]
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int = 0
    batch: int = 1
    prologue: bool = False
    relu: bool = True
    threads: int = 1
    algorithm: int = DIRECT

    def __str__(self):
        channels = "+".join(map(str, self.channels))
        window = f"k{self.kernel[0]}x{self.kernel[1]}s{self.stride}p{self.padding}"
        shape = f"{self.batch}x{self.size[0]}x{self.size[1]}"
        kind = ("direct", "packed", "winograd2", "winograd4")[self.algorithm]
        return f"{channels}to{self.out}-{shape}-{window}-{kind}-{self.threads}"

    def output_size(self):
        return [
            (extent + 2 * self.padding - kernel) // self.stride + 1
            for extent, kernel in zip(self.size, self.kernel, strict=True)
        ]

    def description(self, pitches):
        size = self.output_size()
        count = len(self.channels)
        header = [0x4E4C5046544E54, 3, self.batch, sum(self.channels), *self.size, self.out, *size]
        header += [count, 0, 4 if self.prologue else 2, 0, count + 1, 1]
        buffers = []
        for i, (channels, pitch) in enumerate(zip(self.channels, pitches, strict=True)):
            buffers += [*self.size, channels, pitch, -3 - i]
        buffers += [*size, self.out, self.out, -2]
        step = [count]
        for i, channels in enumerate(self.channels):
            step += [i, 0, channels]
        step += [count, 0, self.out, 1, 1, 0, 0, *self.kernel, self.stride, self.stride]
        step += [self.padding, self.padding, 1, 1, self.relu, 0, 1]
        step += [2, 3, 1] if self.prologue else [-1, -1, 0]
        entries = [*header, *buffers, 0, len(step) + 2, *step]
        return torch.tensor(entries, dtype=torch.int64)

    def run(self, engine, *, winograd=None, values=torch.randn):
        """Returns what the engine computed, by its own algorithm unless told, and the operands.

        Segments lie in wider pixels, of which what belongs to nobody is NaN.
        """
        pitches = [channels + 5 * i for i, channels in enumerate(self.channels)]
        externals = []
        for channels, pitch in zip(self.channels, pitches, strict=True):
            external = torch.full((self.batch, *self.size, pitch), torch.nan)
            external[..., :channels] = values(self.batch, *self.size, channels)
            externals.append(external)
        pairs = zip(externals, self.channels, strict=True)
        x = torch.cat([external[..., :channels] for external, channels in pairs], 3)
        weights = [values(self.out, x.shape[3], *self.kernel), values(self.out)]
        if self.prologue:
            weights += [values(x.shape[3]), values(x.shape[3])]
        result = engine(
            self.description(pitches),
            weights,
            threads=self.threads,
            winograd=WINOGRAD.get(self.algorithm, 0) if winograd is None else winograd,
            externals=[external.flatten() for external in externals],
        )
        return result, x.permute(0, 3, 1, 2), weights

    def check(self, result, x, weights):
        """Compares with float64."""
        x, weight, bias, *affine = (t.double() for t in (x, *weights))
        magnitude = x.abs()
        if affine:
            scale, shift = (t[:, None, None] for t in affine)
            magnitude = magnitude * scale.abs() + shift.abs()
            x = torch.relu(x * scale + shift)
        window = self.stride, self.padding
        expected = F.conv2d(x, weight, bias, *window)
        expected = torch.relu(expected) if self.relu else expected
        length = weight[0].numel() + 1
        bound = F.conv2d(magnitude, weight.abs(), bias.abs(), *window)
        bound = dot_bound(bound, length, torch.float32)
        if result.algorithms[0] in WINOGRAD:
            bound = winograd_bound(x, weight, bias, WINOGRAD[result.algorithms[0]])
        assert_within(result.output, expected, bound)


CONVOLUTIONS = [
    Convolution((1,), (1, 1), 1),
    Convolution((5,), (3, 7), 7),
    Convolution((4, 9, 3), (5, 6), 13, relu=False),
    Convolution((300,), (3, 5), 20, batch=2),
    Convolution((17, 4, 30), (7, 5), 33, batch=2, prologue=True, algorithm=PACKED),
    Convolution((6, 5), (6, 7), 9, (3, 3), padding=1, prologue=True, algorithm=PACKED, threads=3),
    Convolution((3, 6, 1), (7, 9), 13, (3, 3), padding=1, threads=2),
    Convolution((16, 10), (8, 11), 9, (3, 3), stride=2, padding=1, batch=2),
    Convolution((7,), (13, 12), 5, (5, 3), stride=3, padding=2),
    Convolution((11, 2), (15, 14), 6, (7, 7), stride=2, padding=3, threads=3),
    Convolution((40, 24), (1, 1), 70, (3, 3), padding=1, threads=2),
    Convolution((256,), (2, 2), 64, (3, 3), padding=1, threads=2, batch=2),
    Convolution((190, 70), (9, 9), 12, (3, 3), stride=2, padding=1),
    Convolution((16,), (8, 9), 14, (3, 3), padding=1, algorithm=WINOGRAD_2),
    Convolution((5, 18), (11, 9), 7, (3, 3), padding=1, batch=2, threads=3, algorithm=WINOGRAD_2),
    Convolution((20, 23), (13, 11), 60, (3, 3), padding=1, algorithm=WINOGRAD_2, threads=2),
    Convolution((130, 150), (10, 11), 9, (3, 3), padding=1, relu=False, algorithm=WINOGRAD_2),
    Convolution((16,), (32, 31), 12, (3, 3), padding=1, algorithm=WINOGRAD_4),
    Convolution((9, 8), (15, 27), 7, (3, 3), padding=1, batch=3, threads=3, algorithm=WINOGRAD_4),
    Convolution((20, 23), (16, 30), 60, (3, 3), padding=1, batch=2, algorithm=WINOGRAD_4),
    Convolution((130, 150), (28, 27), 9, (3, 3), padding=1, threads=2, algorithm=WINOGRAD_4),
]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_convolution(engine, convolution):
    result, *operands = convolution.run(engine)
    assert result.algorithms == [convolution.algorithm]
    convolution.check(result, *operands)
    if convolution.algorithm in WINOGRAD:
        result, *operands = convolution.run(engine, winograd=0)
        assert result.algorithms == [DIRECT]
        convolution.check(result, *operands)


@pytest.mark.parametrize("engine", ["aarch64-neon", "native-avx2"], indirect=True)
@pytest.mark.parametrize("pixels", range(1, 16))
def test_every_tile(engine, pixels):
    """Every number of pixels and of output channels that a tile may have, and some more."""
    for channels in range(1, 14):
        convolution = Convolution((channels + pixels,), (1, pixels), channels, relu=pixels % 2 == 0)
        convolution.check(*convolution.run(engine))


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 129])
def test_pools(engine, channels):
    """Maxima are exact and a NaN wins; averages are sums in one order and a product."""
    size, kernel, padding = (9, 7), 3, 1
    for average in (False, True):
        x = torch.randn(2, *size, channels)
        x[1, 4, 3, channels // 2] = torch.nan
        padding = 0 if average else 1
        output = [(extent + 2 * padding - kernel) // 2 + 1 for extent in size]
        header = [0x4E4C5046544E54, 3, 2, channels, *size, channels, *output, 1, 0, 0, 0, 2, 1]
        buffers = [*size, channels, channels, -3, *output, channels, channels, -2]
        step = [1, 21, 0, 0, channels, 1, 0, channels, kernel, kernel, 2, 2, padding, padding, 1, 1]
        step += [average, -1, -1, -1, 0]
        description = torch.tensor([*header, *buffers, *step], dtype=torch.int64)
        actual = engine(description, [], externals=[x.flatten()]).output
        x = x.permute(0, 3, 1, 2)
        if average:
            expected = F.avg_pool2d(x.double(), kernel, 2)
            magnitude = F.avg_pool2d(x.double().abs(), kernel, 2)
            assert_within(actual, expected, dot_bound(magnitude, kernel**2, torch.float32))
        else:
            expected = F.max_pool2d(x, kernel, 2, padding)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prologue", [False, True])
def test_bits_of_sums_in_one_order(drivers, prologue):
    """1x1 convolutions add products in one order, so all fused multiply-adds give one result."""
    convolution = Convolution((150, 3), (5, 9), 29, prologue=prologue, algorithm=PACKED)
    cross, native = drivers("aarch64"), drivers("native")

    def run(driver, isa):
        torch.manual_seed(0)
        return convolution.run(lambda *arguments, **options: driver(*arguments, isa, **options))[0]

    neon = run(cross, "neon").output
    scalar = run(cross, "scalar").output
    assert not neon.equal(scalar)
    assert scalar.equal(run(native, "scalar").output)
    for isa in set(native.isas) - {"scalar"}:
        assert neon.equal(run(native, isa).output), isa


def test_bits_of_transforms(drivers):
    """F(2x2, 3x3) adds and halves only; on small integers all of it is exact."""

    def integers(*size):
        return torch.randint(-8, 9, size).float() * 4

    convolution = Convolution((19, 6), (11, 10), 21, (3, 3), padding=1, algorithm=WINOGRAD_2)
    for architecture in ("native", "aarch64"):
        driver = drivers(architecture)
        for isa in driver.isas:

            def engine(*arguments, driver=driver, isa=isa, **options):
                return driver(*arguments, isa, **options)

            result, x, (weight, bias) = convolution.run(engine, values=integers)
            assert result.algorithms == [WINOGRAD_2]
            expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
            assert result.output.double().equal(expected), (architecture, isa)


@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_infinity_pass_through(engine, relu):
    for kernel, padding, prologue in [((1, 1), 0, False), ((3, 3), 1, True), ((3, 3), 1, False)]:
        convolution = Convolution(
            (17,), (9, 8), 6, kernel, padding=padding, prologue=prologue, relu=relu, batch=3
        )

        def values(*size):
            result = torch.rand(size) + 0.5
            if size == (3, 9, 8, 17):
                result[1, 2, 3, 4] = torch.nan
                result[2, 5, 6, 16] = torch.inf
            return result

        for forced in (0, 2, 4):
            output = convolution.run(engine, winograd=forced, values=values)[0].output
            assert output[0].isfinite().all()
            assert output[1, :, 2, 3].isnan().all()
            assert not output[2, :, 5, 6].isfinite().any()


@pytest.mark.parametrize("forced", [0, 2, 4])
@pytest.mark.parametrize(
    ("shape", "growth", "threads"), [((2, 3, 69, 118), 40, 3), ((1, 3, 128, 117), 10, 1)]
)
def test_every_step(engine, randomised, forced, shape, growth, threads):
    model = randomised(small(growth_rates=(8, 8, growth, 14)))
    assert check_every_step(engine, model, shape, forced, threads) == {forced} - {0}


@pytest.mark.parametrize("forced", [0, 2, 4])
@pytest.mark.parametrize("name", BASELINES)
def test_every_step_of_baselines(engine, randomised, name, forced):
    check_every_step(engine, randomised(BASELINES[name]()).eval(), (2, 3, 45, 70), forced, 2)


def check_every_step(engine, model, shape, forced, threads):
    """Each step is given what the engine's own earlier steps wrote, so errors do not add up.

    Returns the sizes of the tiles of the steps that used Winograd.
    """
    plan = lower(model, shape)
    arena = separate_arena(plan)
    x = torch.randn(shape).to(
        memory_format=torch.preserve_format if forced else torch.channels_last
    )
    result = engine(serialize(plan, arena), plan.weights(), threads=threads, winograd=forced, x=x)
    read = feature_maps(plan, arena, result.arena, x, result.output)
    for step, algorithm in zip(plan.steps, result.algorithms, strict=False):
        inputs = torch.cat([read(s) for s in step.inputs], 1)
        expected, bound = double_step(step, inputs)
        if algorithm in WINOGRAD:
            weight = step.weight.double()
            bound = winograd_bound(inputs, weight, step.bias, WINOGRAD[algorithm])
        assert_within(read(step.output), expected, bound)
    return {WINOGRAD[algorithm] for algorithm in result.algorithms if algorithm in WINOGRAD}


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 4), (3, 2)])
def test_network(engine, randomised, batch, threads):
    """ThreshNet79 errs at most twice as much as PyTorch's own float32."""
    model = randomised(tf.ThreshNet79(num_classes=100).eval())
    x = photographs(32, count=batch)
    with torch.no_grad(), tf.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
        eager = (model(x) - expected).abs().max().item()
    plan = lower(model, x.shape)
    for forced in (-1, 0):
        result = engine(
            serialize(plan, plan_memory(plan)),
            plan.weights(),
            threads=threads,
            winograd=forced,
            x=x,
        )
        error = (result.output.flatten(1) - expected).abs().max().item()
        assert error <= 2 * eager, f"Winograd {forced}: {error:.3g}, PyTorch {eager:.3g}"


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
def test_input_channels_and_strides(engine, randomised, channels):
    model = randomised(small(in_chans=channels))
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        inverse = [order.index(dimension) for dimension in range(4)]
        size = (2, channels, 33, 40)
        x = torch.randn([size[dimension] for dimension in order]).permute(inverse)
        plan = lower(model, x.shape, head=False)
        result = engine(serialize(plan, plan_memory(plan)), plan.weights(), x=x)
        expected = execute_reference(plan, x)
        torch.testing.assert_close(result.output.double(), expected, rtol=1e-5, atol=1e-5)


def test_instruction_sets_of_arm(drivers):
    driver = drivers("aarch64")
    assert driver.isas == ["scalar", "neon"]
    assert driver.best == "neon"
    for isa in ("avx2", "avx512"):
        with pytest.raises(RuntimeError, match=f"no instruction set {isa}"):
            Convolution((1,), (1, 1), 1).run(lambda *a, isa=isa, **o: driver(*a, isa, **o))


@pytest.mark.parametrize("channels", [1, 21, 48])
def test_sums_and_resizing(engine, channels):
    steps = [
        (count, sum_of(count, channels, name or None, scaled, slope=0.25))
        for name in ACTIVATIONS
        for count, scaled in ((1, True), (3, False))
    ]
    for mode, aligned in (("nearest", False), ("nearest-exact", False), ("bilinear", True)):
        steps.append((1, resize((7, 5), (11, 9), mode, aligned)))
    for count, step in steps:
        size = (11, 9) if isinstance(step, Resize) else (7, 5)
        plan = plan_of_step(step, [(channels, 7, 5)] * count, (channels, *size), 2)
        output = Segment(count, 0, channels)
        last = Buffer(*size, channels, "y")
        plan = dataclasses.replace(
            plan,
            buffers=(*plan.buffers[:-1], last),
            steps=(dataclasses.replace(plan.steps[0], output=output),),
            outputs=(output,),
        )
        description = serialize(plan, plan_memory(plan))
        # The driver knows a network's output alone.
        description[10] = 0
        description[15 + 5 * count + 4] = -2
        maps = [torch.full((2, 7, 5, b.pitch), torch.nan) for b in plan.buffers[:-1]]
        for memory in maps:
            memory[..., :channels] = 4 * torch.randn(2, 7, 5, channels)
        xs = [memory[..., :channels].permute(0, 3, 1, 2).double() for memory in maps]
        # What lies behind the last pixel's channels nobody may read.
        externals = [memory.flatten()[: channels - memory.shape[3] or None] for memory in maps]
        weights = plan.weights()
        actual = engine(description, weights, externals=externals, threads=2).output
        expected = reference_step(plan.steps[0], xs, size)
        assert_within(actual, expected, bound_of(plan.steps[0], xs, expected, torch.float32))
