"""HarDNet and DenseNet in the C++ engine: depthwise convolution, ReLU6, averages with prologues."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import test_bfloat16 as narrow
import torch
from data import photographs
from test_baselines import SMALL, small_densenet, small_hardnet
from test_engine import (
    assert_error_at_most_twice_that_of_pytorch,
    check_every_step,
    compile_plan,
    isas,
    operators,
    run,
)

import threshnet_fast as tf
from threshnet_fast.bench.prediction import predict
from threshnet_fast.cli import main
from threshnet_fast.engines import cpu, cuda_plan
from threshnet_fast.plan import (
    Buffer,
    FusedConv,
    Head,
    Plan,
    Pool,
    Prologue,
    Segment,
    UnsupportedModule,
    execute_reference,
    limits,
    lower,
    plan_memory,
    save_plan,
    serialize,
)

needs_engine = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


# Plans


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("shape", [(2, 3, 45, 70), (1, 3, 32, 33)])
def test_plan_equals_the_module(build, shape, randomised):
    model = randomised(build()).eval().double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad(), tf.use_backend("reference"):
        logits, features = model(x), model.forward_features(x)
    # The plan's weights are float32.
    for head, expected in ((True, logits), (False, features)):
        actual = execute_reference(lower(model, shape, head=head), x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    shapes = lower(model, shape, fold=False)
    assert [step.describe() for step in shapes.steps] == [
        step.describe() for step in lower(model, shape).steps
    ]


def test_pooling_first_is_the_same_in_float64(randomised):
    """Also where the pooling drops a row and a column."""
    transition = randomised(tf.nn.DenseTransition(20, 9)).eval().double()
    x = torch.randn(2, 20, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        pooled = transition.pool(torch.relu(transition.norm(x)))
        torch.testing.assert_close(transition.conv(pooled), transition(x), rtol=1e-12, atol=1e-12)


def test_steps_of_densenet(randomised):
    model = randomised(small_densenet()).eval()
    plan = lower(model, (2, 3, 45, 70))
    steps = {step.name: step for step in plan.steps}
    stem = steps["features.conv0"]
    assert stem.describe() == "conv7x7/2 bias relu"
    pool, conv = steps["features.transition1.pool"], steps["features.transition1.conv"]
    assert isinstance(pool, Pool)
    assert pool.describe() == "bn-relu avgpool2x2/2"
    assert conv.describe() == "conv1x1"
    # The pools of the stem and of the transition round up and down.
    assert (pool.input_pixels, pool.output_pixels) == (12 * 18, 6 * 9)
    # Counted as in the module; a quarter is needed.
    assert conv.macs == 2 * 12 * 18 * 22 * 11
    assert conv.valid_macs == 2 * 6 * 9 * 22 * 11
    head = plan.steps[-1]
    assert isinstance(head, Head)
    assert head.describe() == "bn-relu global avgpool linear"
    scale = model.features.norm5.weight / torch.sqrt(model.features.norm5.running_var + 1e-5)
    torch.testing.assert_close(head.prologue.scale, scale.detach())
    assert lower(model, (2, 3, 45, 70), head=False).steps[-1].describe() == "bn relu"
    weights = plan.weights()
    assert weights[-2] is head.weight
    assert weights[-4] is head.prologue.scale


def test_steps_of_hardnet_ds(randomised):
    model = randomised(small_hardnet(depthwise=True, block_drop_rate=0.1)).eval()
    plan = lower(model, (1, 3, 45, 70))
    steps = {step.name: step for step in plan.steps}
    assert steps["base.1"].describe() == "conv1x1 bias relu6"
    down = steps["base.2"]
    assert down.describe() == "dwconv3x3/2 bias"
    assert down.groups == 12
    assert down.macs == 12 * 18 * 9 * 12
    assert down.parameters == 12 * 9 + 12
    block = [step.name for step in plan.steps if step.name.startswith("base.3.layers.1")]
    assert block == ["base.3.layers.1.layer1", "base.3.layers.1.layer2"]
    assert steps["base.3.layers.1.layer2"].output.buffer == down.output.buffer


def test_large_networks_count_what_is_published():
    with torch.device("meta"):
        model = tf.DenseNet121()
    plan = lower(model, (1, 3, 224, 224), fold=False)
    assert plan.macs == 2_834_161_664
    # Three transitions, of 102.8 million multiply-adds each.
    assert plan.valid_macs < plan.macs - 0.75 * 3 * 102_760_448 + 1


def change_conv(model):
    model.base[3].layers[0].layer2.dwconv = torch.nn.Conv2d(6, 6, 3, padding=1, bias=False)


def change_activation(model):
    model.base[3].layers[0].layer1.activation = "gelu"


def change_pool(model):
    model.base[-1][0] = torch.nn.AdaptiveAvgPool2d(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_conv, r"base\.3\.layers\.0\.layer2\.dwconv has groups 1, expected 6"),
        (change_activation, r"base\.3\.layers\.0\.layer1 has activation 'gelu'"),
        (change_pool, r"base\.8\.0 is no part of a global average pooling"),
    ],
)
def test_changed_hardnets_are_refused(change, message):
    model = small_hardnet(depthwise=True).eval()
    change(model)
    with pytest.raises(UnsupportedModule, match=message):
        lower(model, (1, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("relu0", torch.nn.GELU(), "features.relu0 is a GELU"),
        ("norm5", torch.nn.Identity(), "features.norm5 is a Identity"),
        ("transition1", torch.nn.AvgPool2d(2), "denselayer1.norm1 reads 11 channels, not 22"),
        ("denseblock2", torch.nn.BatchNorm2d(11), "features.norm5 reads 29 channels, not 11"),
    ],
)
def test_changed_densenets_are_refused(name, replacement, message):
    model = small_densenet().eval()
    setattr(model.features, name, replacement)
    with pytest.raises(UnsupportedModule, match=message):
        lower(model, (1, 3, 32, 32))


@pytest.mark.parametrize(
    ("attribute", "value"), [("kernel_size", 3), ("ceil_mode", True), ("divisor_override", 3)]
)
@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("pool0", torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        ("relu0", torch.nn.ReLU6()),
    ],
)
def test_changed_densenets(attribute, value, name, replacement, randomised):
    model = randomised(small_densenet()).eval()
    setattr(model.features, name, replacement)
    setattr(model.features.transition1.pool, attribute, value)
    x = torch.randn(1, 3, 35, 42)
    with tf.use_backend("reference"), torch.no_grad():
        expected = model.double()(x.double())
    actual = execute_reference(lower(model.float(), x.shape), x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Steps


@needs_engine
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("forced", "threads"), [(0, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 45, 70), (1, 3, 32, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_every_step(name, shape, forced, threads, isa, randomised):
    plan = lower(randomised(SMALL[name]()).eval(), shape)
    # So large that ReLU6 has something to do.
    x = 4 * torch.randn(shape)
    found = check_every_step(plan, x, isa, forced, threads)
    # Of depthwise convolutions, and of those that normalise what they read, there is none.
    never = ("hardnet ds", "densenet without bottlenecks")
    assert found == (set() if name in never else {forced} - {0})


@narrow.needs_bfloat16
@pytest.mark.parametrize(("forced", "threads"), [(0, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 45, 70), (1, 3, 32, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_every_step_in_bfloat16(name, shape, forced, threads, randomised):
    odd = {"growth_rate": 7} if name.startswith("densenet") else {"first_channels": (8, 13)}
    plan = lower(randomised(SMALL[name](**odd)).eval(), shape)
    x = (4 * torch.randn(shape)).bfloat16()
    check_every_step(plan, x, narrow.ISAS[0], forced, threads, narrow.run, narrow.rounded_step)


@dataclasses.dataclass(frozen=True)
class Window:
    """A depthwise convolution or an average behind a convolution that copies the input."""

    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 0
    batch: int = 2
    activation: str | None = None
    bias: bool = True

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        size = "x".join(map(str, self.size))
        return f"{self.channels}-{size}-k{kernel}s{self.stride}p{self.padding}-{self.activation}"

    def plan(self, *, average: bool) -> Plan:
        pairs = zip(self.size, self.kernel, strict=True)
        height, width = ((n + 2 * self.padding - k) // self.stride + 1 for n, k in pairs)
        channels, vector = self.channels, torch.randn(2, self.channels)
        pixels = {"input_pixels": math.prod(self.size), "output_pixels": height * width}
        copy_input = FusedConv(
            name="copy",
            inputs=(Segment(0, 0, channels),),
            # Between channels that nothing writes.
            output=Segment(1, 5, channels),
            weight=torch.eye(channels)[:, :, None, None],
            bias=None,
            prologue=None,
            stride=(1, 1),
            padding=(0, 0),
            activation=None,
            input_pixels=pixels["input_pixels"],
            output_pixels=pixels["input_pixels"],
            valid_taps=pixels["input_pixels"],
            batch=self.batch,
        )
        step: FusedConv | Pool
        if average:
            step = Pool(
                name="window",
                input=copy_input.output,
                output=Segment(2, 0, channels),
                kernel=self.kernel,
                stride=(self.stride, self.stride),
                padding=(0, 0),
                average=True,
                batch=self.batch,
                prologue=Prologue(*vector),
                **pixels,
            )
        else:
            step = FusedConv(
                name="window",
                inputs=(copy_input.output,),
                output=Segment(2, 0, channels),
                weight=torch.randn(channels, 1, *self.kernel),
                bias=vector[0] if self.bias else None,
                prologue=None,
                stride=(self.stride, self.stride),
                padding=(self.padding, self.padding),
                activation=self.activation,
                valid_taps=0,
                batch=self.batch,
                groups=channels,
                **pixels,
            )
        buffers = (
            Buffer(*self.size, channels, "input"),
            Buffer(*self.size, channels + 9, "middle"),
            Buffer(height, width, channels, "output"),
        )
        shape = (self.batch, channels, *self.size)
        return Plan(shape, buffers, (copy_input, step), False)


DEPTHWISE = [
    Window(16, (9, 11), padding=1),
    Window(1, (9, 11), padding=1, activation="relu6"),
    Window(37, (8, 7), padding=1, stride=2, activation="relu6"),
    Window(37, (7, 8), padding=1, stride=2, activation="relu", bias=False),
    Window(50, (1, 1), padding=1, activation="relu"),
    Window(5, (2, 1), padding=1, stride=2),
    Window(70, (14, 14), padding=1, batch=1),
    Window(24, (6, 9), padding=0),
    Window(9, (9, 6), (5, 3), padding=2, stride=3),
    Window(9, (4, 5), (1, 7), padding=3, activation="relu"),
    Window(12, (5, 5), (1, 1)),
    Window(7, (5, 6), (8, 8), padding=4),
]
AVERAGES = [
    Window(16, (8, 8), (2, 2), stride=2),
    Window(37, (9, 11), (2, 2), stride=2),
    Window(1, (7, 7), (7, 7)),
    Window(50, (3, 5), (3, 5)),
    Window(70, (5, 4), (1, 1)),
    Window(9, (10, 7), (3, 2), stride=2, batch=3),
]


def check_window(plan: Plan, threads: int) -> None:
    x = 4 * torch.randn(plan.input_shape)
    for isa in isas():
        check_every_step(plan, x, isa, -1, threads)
    for isa in narrow.ISAS:
        check_every_step(plan, x.bfloat16(), isa, -1, threads, narrow.run, narrow.rounded_step)


@needs_engine
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", DEPTHWISE, ids=str)
def test_depthwise_convolution(window, threads):
    check_window(window.plan(average=False), threads)


@needs_engine
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", AVERAGES, ids=str)
def test_average_of_normalised_features(window, threads):
    check_window(window.plan(average=True), threads)


@needs_engine
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("average", [False, True])
def test_nan_and_infinity_stay_where_they_are(isa, average):
    window = Window(18, (9, 10), (2, 2) if average else (3, 3), activation="relu6")
    plan = window.plan(average=average)
    x = torch.randn(plan.input_shape)
    x[0, 3, 4, 5], x[1, 17, 4, 5], x[1, 2, 4, 5] = torch.nan, torch.nan, torch.inf
    # Positive, so that the infinity is neither cut off nor becomes a NaN.
    step = plan.steps[1]
    (step.prologue.scale if average else step.weight).abs_()
    # The copy adds up zeros times what is not finite, over all channels.
    output, _ = run(plan, x, isa)
    expected = execute_reference(plan, x)
    assert output.isnan().equal(expected.isnan())
    assert output.isinf().equal(expected.isinf())


# Whole networks


@needs_engine
@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
@pytest.mark.parametrize(
    "name", ["densenet121", "densenet_bc_100", "hardnet39ds", "hardnet68", "hardnet68ds"]
)
def test_error_on_photographs(name, size, randomised):
    model = randomised(tf.create_model(name, num_classes=100).eval())
    assert_error_at_most_twice_that_of_pytorch(model, photographs(*size, count=2))


@narrow.needs_bfloat16
@pytest.mark.parametrize("name", ["densenet_bc_100", "hardnet39ds", "hardnet68"])
def test_error_in_bfloat16(name, randomised):
    model = randomised(tf.create_model(name, num_classes=100).eval())
    narrow.assert_error_at_most_twice_that_of_pytorch(model, photographs(64, count=3))


@needs_engine
@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_models_run_fused_and_are_never_stale(build, randomised):
    model = randomised(build()).eval()
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        for change in (lambda: None, lambda: next(iter(model.parameters())).mul_(1.5)):
            change()
            with tf.use_backend("reference"):
                logits, features = model(x), model.forward_features(x)
            with tf.use_backend("cpu"):
                assert tf.explain(model, x).backend == "cpu"
                torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(
                    model.forward_features(x), features, rtol=1e-4, atol=1e-4
                )
        for frozen in (tf.optimize(model, x), tf.optimize(model, x, exact=True)):
            assert frozen.backend == "cpu"
            torch.testing.assert_close(frozen(x), logits, rtol=1e-4, atol=1e-5)
            assert copy.deepcopy(frozen)(x).equal(frozen(x))
        model.features[0].train() if isinstance(model, tf.DenseNet) else model.base[2].train()
    assert model(x).requires_grad


@needs_engine
def test_dropout_of_a_part_in_training_mode_takes_the_plain_path():
    model = small_hardnet(block_drop_rate=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert tf.explain(model, x).backend == "cpu"
        model.base[7].train()
        assert "training mode" in tf.explain(model, x).reason
        assert not model(x).equal(model(x))


@needs_engine
def test_explanation_tells_depthwise_from_other_convolutions(randomised):
    model = randomised(small_hardnet(depthwise=True)).eval()
    with torch.no_grad():
        text = str(tf.explain(model, torch.randn(1, 3, 32, 32)))
    assert "dwconv3x3/2 bias" in text
    assert "conv1x1 bias relu6" in text


# Command line


@needs_engine
def test_commands(capsys, one_thread):
    assert main(["info", "densenet121"]) == 0
    assert "2.833 G an image, 2.546 G of them needed" in capsys.readouterr().out
    assert main(["info", "hardnet68ds", "--size", "64", "--device", "a100"]) == 0
    assert "dwconv3x3/2 bias" in capsys.readouterr().out
    arguments = ["--model", "hardnet39ds", "--cell", "32:1", "--random-input", "--no-files"]
    arguments += ["--threads", "1", "--repeats", "1"]
    assert main(["bench", *arguments, "--providers", "fused,eager"]) == 0
    assert "hardnet39ds, 32x32, batch 1" in capsys.readouterr().out
    assert main(["bench", *arguments, "--profile"]) == 0
    assert "dwconv3x3/2 bias" in capsys.readouterr().out


@needs_engine
def test_predictions_count_what_is_fused_into_a_pool():
    plan = lower(small_densenet().eval(), (1, 3, 64, 64), fold=False)
    predicted = {p.step.name: p for p in predict(plan, "a100").steps}
    pool = predicted["features.transition1.pool"]
    assert [kernel.operation for kernel in pool.unfused.kernels][:2] == ["batchnorm", "relu"]
    assert (pool.fused.launches, pool.unfused.launches) == (1, 3)
    head = predicted["classifier"]
    assert head.unfused.launches == head.fused.launches + 3


# What refuses


def test_gpus_decline(tmp_path):
    models = {
        "is depthwise": small_hardnet(depthwise=True),
        "has activation 'relu6'": small_hardnet(),
        "normalises what it pools": small_densenet(),
    }
    for message, model in models.items():
        plan = lower(model.eval(), (1, 3, 32, 32), fold=False)
        if message == "is depthwise":
            activations = [dataclasses.replace(s, activation="relu") for s in plan.steps[:2]]
            plan = dataclasses.replace(plan, steps=(*activations, *plan.steps[2:]))
        with pytest.raises(UnsupportedModule, match=message):
            limits.check_gpu(plan)
        target = cuda_plan.Target(torch.device("cpu"), torch.float32, 80, 108, 96 * 1024)
        with pytest.raises(UnsupportedModule, match=message):
            cuda_plan.compile_plan(plan, plan_memory(plan), target)
        path = tmp_path / "network.plan"
        with pytest.raises(UnsupportedModule):
            save_plan(model, (1, 3, 32, 32), path)
        assert not path.exists()


def edited(plan: Plan, old: list[int], new: list[int]) -> torch.Tensor:
    """The plan's description with the only occurrence of some entries replaced."""
    entries = serialize(plan, plan_memory(plan)).tolist()
    found = [i for i in range(len(entries)) if entries[i : i + len(old)] == old]
    assert len(found) == 1
    entries[found[0] : found[0] + len(old)] = new
    return torch.tensor(entries, dtype=torch.int64)


@needs_engine
def test_compile_refuses_an_inconsistent_description():
    depthwise = Window(16, (9, 11), padding=1, activation="relu6").plan(average=False)
    average = Window(16, (8, 8), (2, 2), stride=2).plan(average=True)
    large = Window(1, (20, 20), (9, 9), padding=4).plan(average=False)
    large = dataclasses.replace(
        large, steps=(large.steps[0], dataclasses.replace(large.steps[1], groups=1))
    )
    cases = {
        "unknown activation": edited(depthwise, [1, 1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1, 3]),
        "unknown kind of step": edited(depthwise, [2, 19, 1, 5, 16], [5, 19, 1, 5, 16]),
        "changes the number of channels": edited(depthwise, [1, 5, 16, 2], [1, 5, 15, 2]),
        "no such weight": edited(depthwise, [1, 1, 1, 1, 2, 1, 2], [1, 1, 1, 1, 2, 1, 3]),
        "reads the network's input": edited(depthwise, [2, 19, 1, 5, 16], [2, 19, 0, 0, 16]),
        "buffer that it reads": edited(depthwise, [1, 5, 16, 2, 0, 16], [1, 5, 16, 1, 0, 16]),
        "a maximum with a prologue": edited(average, [1, 1, 1, -1, 1, 2], [1, 1, 0, -1, 1, 2]),
        "wrong length": edited(average, [1, 21, 1, 5, 16], [1, 22, 1, 5, 16]),
        "over 64 taps": serialize(large, plan_memory(large)),
    }
    for message, description in cases.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            operators.compile_plan(description, 0, 2, -1)


@needs_engine
@pytest.mark.parametrize("average", [False, True])
def test_compile_survives_any_single_wrong_entry(average):
    plan = Window(16, (9, 11)).plan(average=average)
    description = serialize(plan, plan_memory(plan))
    refused = 0
    for index in range(len(description)):
        for value in (-(2**62), -5, -1, 0, 1, 2, 7, int(description[index]) + 1, 2**31, 2**62):
            changed = description.clone()
            changed[index] = value
            try:
                operators.compile_plan(changed, 0, 2, -1)
            except (RuntimeError, ValueError):
                refused += 1
    assert refused > 4 * len(description)


@needs_engine
def test_pack_refuses_wrong_weights():
    plan = Window(16, (9, 11)).plan(average=False)
    program = compile_plan(plan)
    weights = plan.weights()
    for index, message in ((1, "weight of step 1 has"), (2, "bias of step 1 has")):
        wrong = [w[:-1] if i == index else w for i, w in enumerate(weights)]
        with pytest.raises((RuntimeError, ValueError), match=message):
            operators.pack_weights(program, wrong)
    plan = Window(16, (9, 11)).plan(average=True)
    wrong = [plan.weights()[0], plan.weights()[1][:-1], plan.weights()[2]]
    with pytest.raises((RuntimeError, ValueError), match="scale of step 1 has"):
        operators.pack_weights(compile_plan(plan), wrong)
