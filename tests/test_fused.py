"""The fused forward pass of a model: when it runs, never stale, and from many threads."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from data import photographs
from test_plan import small
from torch import nn

import threshnet_fast as tf
from threshnet_fast import environment
from threshnet_fast.engines import cache as engine_cache
from threshnet_fast.engines import cpu
from threshnet_fast.plan.lower import PlanSource

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


@pytest.fixture
def model(randomised):
    return randomised(small())


@pytest.fixture
def x():
    return torch.randn(2, 3, 40, 36)


def plain(model, x):
    with torch.no_grad(), tf.use_backend("reference"):
        return model(x)


def fused(model, x):
    """The model's output, having made sure that it comes from the fused engine."""
    with torch.no_grad(), tf.use_backend("cpu"):
        return model(x)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_follows(model, x, before):
    """The fused output is that of the model as it is now, which is not what it was."""
    expected = plain(model, x)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-4)
    assert_same(fused(model, x), expected)


def test_runs_by_itself_in_eval_mode_without_grad(model, x):
    with torch.no_grad():
        assert tf.explain(model, x).backend == "cpu"
        output = model(x)
    assert output.equal(fused(model, x))
    assert_same(output, plain(model, x))
    with torch.inference_mode():
        assert model(x).equal(output)


def test_agrees_on_photographs(randomised):
    model = randomised(tf.ThreshNet95(num_classes=10).eval())
    x = photographs(96)
    actual, expected = fused(model, x), plain(model, x)
    assert_same(actual, expected)
    assert actual.argmax(1).equal(expected.argmax(1))


def test_frozen_parameters_run_fused_with_grad_enabled(model, x):
    model.requires_grad_(False)
    assert tf.explain(model, x).backend == "cpu"
    assert not model(x).requires_grad


def test_grad_takes_the_autograd_path(model, x):
    explanation = tf.explain(model, x)
    assert explanation.backend == "cpu"
    assert "gradients are wanted" in explanation.reason
    output = model(x)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False)
    x.requires_grad_()
    assert model(x).requires_grad


@pytest.mark.parametrize("wanted", ["base.3.norm1.bias", "base.6.2.weight", "base.1.conv.weight"])
def test_a_graph_is_made_for_the_one_parameter_that_is_not_frozen(model, x, wanted):
    """Not only where the first weight wants a gradient."""
    wanted = wanted if wanted in dict(model.named_parameters()) else list(model.state_dict())[-1]
    fused(model, x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == wanted)
    y = model(x)
    assert y.requires_grad
    y.square().sum().backward()
    gradient = model.get_parameter(wanted).grad
    with tf.use_backend("reference"):
        (expected,) = torch.autograd.grad(model(x).square().sum(), [model.get_parameter(wanted)])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_training_mode_updates_the_running_statistics(model, x):
    model.train()
    before = model.base[0].norm.running_mean.clone()
    with torch.no_grad():
        model(x)
    assert not model.base[0].norm.running_mean.equal(before)
    with torch.no_grad():
        assert "training mode" in tf.explain(model, x).reason


def test_one_part_in_training_mode_updates_its_running_statistics(model, x):
    fused(model, x)
    model.base[4].norm1.train()
    before = model.base[4].norm1.running_mean.clone()
    with torch.no_grad():
        model(x)
    assert not model.base[4].norm1.running_mean.equal(before)


def test_hooks_take_the_plain_path(model, x):
    fused(model, x)
    seen = []
    handle = model.base[3].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(x)
        assert seen
        assert "hooks" in tf.explain(model, x).reason
        handle.remove()
        assert tf.explain(model, x).backend == "cpu"


def test_double_and_autocast_take_the_plain_path(model, x):
    with torch.no_grad():
        assert copy.deepcopy(model).double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
            assert "autocast" in tf.explain(model, x).reason


def test_transforms_and_modes_take_the_plain_path(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() > 0
        batched = torch.func.vmap(model)(x[:, None])
    assert_same(batched[:, 0], plain(model, x))
    model.requires_grad_(False)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() > 0


def test_compiles_without_the_engine(model, x):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x), plain(model, x))


def test_asking_for_the_engine_where_it_cannot_run_is_an_error(model, x):
    with tf.use_backend("cpu"):
        with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this call: gradients"):
            model(x.clone().requires_grad_())
        with (
            pytest.raises(RuntimeError, match=r"these tensors are torch\.float16"),
            torch.no_grad(),
        ):
            model.eval().half()(x.half())


def test_features_and_head(model, x):
    with torch.no_grad():
        with tf.use_backend("cpu"):
            features = model.forward_features(x)
        assert_same(model.forward_head(features), fused(model, x))
        with tf.use_backend("reference"):
            assert_same(features, model.forward_features(x))


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}])
def test_without_classifier(randomised, x, arguments):
    model = randomised(small(**arguments))
    assert_same(fused(model, x), plain(model, x))


def test_many_shapes_keep_a_bounded_number_of_plans(model):
    for size in range(32, 56):
        x = torch.randn(1, 3, size, 32)
        assert_same(fused(model, x), plain(model, x))
    assert len(model._fused._snapshot.plans.of(cpu.ENGINE)) <= 16


def test_plans_used_last_are_kept(model, x):
    fused(model, x)
    plans = model._fused._snapshot.plans.of(cpu.ENGINE)
    (first,) = plans._plans.values()
    for size in range(32, 60):
        fused(model, torch.randn(1, 3, size, 32))
        fused(model, x)
    assert len(plans) == 16
    assert first in plans._plans.values()


def sizes_of_other_layouts(model, count):
    """Input shapes of which each has a layout of packed weights of its own."""
    layouts = {}
    for height in range(32, 500, 12):
        shape = torch.Size((1, 3, height, 40))
        arguments = {"isa": cpu.isa_code(), "threads": torch.get_num_threads(), "winograd": -1}
        compiled = cpu.compile_network(PlanSource(model), shape, head=True, **arguments)
        if compiled.layout != 0:
            # 0 is that of direct convolution.
            layouts.setdefault(compiled.layout, shape)
        if len(layouts) == count:
            return list(layouts.values())
    pytest.skip(f"only {len(layouts)} layouts on this processor")


def test_packed_weights_of_many_layouts_are_bounded(model, monkeypatch):
    shapes = sizes_of_other_layouts(model, 3)
    monkeypatch.setenv(environment.WINOGRAD, "auto")
    frozen = tf.optimize(model, torch.randn(shapes[0]))
    for cache, call in (
        (frozen._plans, frozen),
        (None, lambda x: fused(model, x)),
    ):
        call(torch.randn(shapes[0]))
        cache = cache or model._fused._snapshot.plans.of(cpu.ENGINE)
        one = cache.packed_bytes
        monkeypatch.setattr(engine_cache, "_MAX_PACKED_BYTES", 2 * one + one // 2)
        first = [call(torch.ones(shape)) for shape in shapes]
        # Two that were first, and direct convolution for all others.
        assert len(cache._packed) <= 3
        assert cache.packed_bytes <= 3.5 * one
        for shape, output in zip(shapes, first, strict=True):
            assert_same(output, plain(model, torch.ones(shape)))
        for size in range(32, 60):
            call(torch.randn(1, 3, size, 44))
        assert len(cache._packed) <= 3
        assert len(cache) <= 16
        # The same bits, although all plans were made again.
        for shape, output in zip(shapes, first, strict=True):
            assert call(torch.ones(shape)).equal(output)


def test_packed_weights_that_are_not_used_make_room(model, monkeypatch):
    shapes = sizes_of_other_layouts(model, 3)
    fused(model, torch.randn(shapes[0]))
    cache = model._fused._snapshot.plans.of(cpu.ENGINE)
    (first,) = cache._packed
    monkeypatch.setattr(engine_cache, "_MAX_PACKED_BYTES", cache.packed_bytes + 1)
    monkeypatch.setattr(engine_cache, "_MAX_PLANS", 2)
    monkeypatch.setattr(engine_cache, "_UNUSED_PLANS", 4)
    fused(model, torch.randn(shapes[1]))
    assert first in cache._packed
    assert len(cache._direct) == 1
    setting = cpu.CpuSetting(cpu.isa_code(), 0, torch.get_num_threads())
    for width in range(41, 46):
        cache.get(torch.Size((1, 3, 40, width)), True, setting)
    monkeypatch.setattr(engine_cache, "_MAX_PACKED_BYTES", cache.packed_bytes + 1)
    fused(model, torch.randn(shapes[2]))
    assert first not in cache._packed
    assert_same(fused(model, torch.ones(shapes[0])), plain(model, torch.ones(shapes[0])))


def test_workspaces_are_bounded(model, x, monkeypatch):
    fused(model, x)
    cache = model._fused._snapshot.plans.of(cpu.ENGINE)
    (cached,) = cache._plans.values()
    one = cached.plan.kept_bytes
    monkeypatch.setattr(cpu, "_SPARE_BYTES", 3 * one)
    spare = [torch.empty_like(workspace) for workspace in cached.plan._workspaces * 3]
    cached.plan._workspaces.extend(spare)
    assert len(cached.plan._workspaces) == 4
    fused(model, x)
    assert cached.plan.kept_bytes == 3 * one
    monkeypatch.setattr(cpu.ENGINE, "max_kept_bytes", 2 * one)
    for width in range(32, 40):
        fused(model, torch.randn(2, 3, 40, width))
    assert len(cache) < 4


def test_threads_race_for_more_plans_than_are_kept(model, monkeypatch):
    monkeypatch.setattr(engine_cache, "_MAX_PLANS", 2)
    monkeypatch.setattr(engine_cache, "_MAX_PACKED_BYTES", 1)
    inputs = [torch.randn(1, 3, 32 + 12 * i, 40) for i in range(12)]
    expected = [fused(model, x) for x in inputs]

    def work(index):
        return [(i % 12, fused(model, inputs[i % 12])) for i in range(index, index + 24)]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for position, output in results:
                assert output.equal(expected[position])
    cache = model._fused._snapshot.plans.of(cpu.ENGINE)
    assert len(cache) <= 2
    assert len(cache._packed) <= 2


def test_large_batches_run_in_parts(randomised):
    model = randomised(small())
    x = torch.randn(301, 3, 64, 64)
    assert_same(fused(model, x), plain(model, x))
    compiled, _ = model._fused._snapshot.prepared(cpu.ENGINE, x, True, x.dtype)
    assert compiled.batch < 301


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()


def load_state_dict(model):
    other = small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.load_state_dict(other.state_dict())


def load_and_assign(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def in_place(model):
    with torch.no_grad():
        model.base[3].conv1.weight.mul_(-2)


def one_element(model):
    with torch.no_grad():
        model.base[0].conv.weight[1, 2, 0, 1] = 9


def running_statistics(model):
    model.base[1].norm.running_var.mul_(9)


def train_mode_forward(model):
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32) * 5 + 3)
    model.eval()


def new_parameter(model):
    conv = model.base[4].conv2
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def data_assigned(model):
    conv = model.base[4].conv1
    conv.weight.data = torch.randn_like(conv.weight)


def data_in_place(model):
    model.base[4].conv1.weight.data.mul_(-3)


def data_filled(model):
    model.base[1].norm.bias.data.fill_(3)


def detached_in_place(model):
    model.base[4].conv1.weight.detach().mul_(-3)


def through_numpy(model):
    model.base[4].conv1.weight.detach().numpy()[...] *= -3


def replaced_module(model):
    model.base[1].conv = nn.Conv2d(8, 12, 3, 1, 1, bias=False)


def replaced_entry(model):
    model.base[3] = copy.deepcopy(model.base[3])
    nn.init.normal_(model.base[3].conv2.weight)


def reset_classifier(model):
    model.reset_classifier(7)
    nn.init.ones_(model.get_classifier().bias)


def double_and_back(model):
    model.half().float()
    model.double()
    with torch.no_grad():
        model.base[1].conv.weight.mul_(-2)
    model.float()


def other_eps(model):
    model.base[0].norm.eps = 5.0


def own_forward(model):
    # Replaced on the instance, as some libraries do.
    original = model.base[1].forward
    model.base[1].forward = lambda x: 2 * original(x) + 1


def parametrised(model):
    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    nn.utils.parametrize.register_parametrization(model.base[1].conv, "weight", Negative())
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        load_state_dict,
        load_and_assign,
        in_place,
        one_element,
        running_statistics,
        train_mode_forward,
        new_parameter,
        data_assigned,
        data_in_place,
        data_filled,
        detached_in_place,
        through_numpy,
        replaced_module,
        replaced_entry,
        reset_classifier,
        double_and_back,
        other_eps,
    ],
)
def test_never_stale(model, x, change):
    before = fused(model, x)
    change(model)
    assert_follows(model, x, before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(own_forward, "forward of its own"), (parametrised, "weight of its own")],
)
def test_never_stale_where_the_change_cannot_run_fused(model, x, change, reason):
    before = fused(model, x)
    change(model)
    with torch.no_grad():
        assert reason in tf.explain(model, x).reason
        output = model(x)
    assert not torch.allclose(output, before)
    assert output.equal(plain(model, x))


def test_parametrised_first_convolution(model, x):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    before = fused(model, x)
    nn.utils.parametrize.register_parametrization(model.base[0].conv, "weight", Doubled())
    model.eval()
    expected = plain(model, x)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert_same(model(x), expected)
    frozen = tf.optimize(model, x)
    assert frozen.backend == "cpu"
    assert_same(frozen(x), expected)
    assert_same(plain(model, x), expected)
    assert model(x).requires_grad


def test_untouched_weights_are_packed_once(model, x, monkeypatch):
    calls = []
    original = cpu.pack_network
    monkeypatch.setattr(cpu, "pack_network", lambda *a: calls.append(1) or original(*a))
    for _ in range(3):
        fused(model, x)
    fused(model, torch.randn(1, 3, 40, 36))
    assert len(calls) == 1
    in_place(model)
    fused(model, x)
    assert len(calls) == 2


def test_weights_made_in_inference_mode_take_the_plain_path(x):
    with torch.inference_mode():
        model = small()
        assert "inference tensors" in tf.explain(model, x).reason
        before = model(x)
        model.base[1].conv.weight.mul_(-2)
        assert not model(x).equal(before)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_instruction_set_is_taken_from_the_environment(model, x, isa, monkeypatch):
    expected = plain(model, x)
    monkeypatch.setenv(environment.CPU_ISA, isa)
    try:
        cpu.isa()
    except ValueError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        assert f"{isa} kernels" in tf.explain(model, x).reason
    assert_same(fused(model, x), expected)


def test_wrong_instruction_set_is_an_error(model, x, monkeypatch):
    monkeypatch.setenv(environment.CPU_ISA, "avx1024")
    with pytest.raises(ValueError, match=r"THRESHNET_FAST_CPU_ISA is 'avx1024': expected one of"):
        fused(model, x)


def test_copies_and_pickles_are_independent(model, x):
    before = fused(model, x)
    twin = copy.deepcopy(model)
    assert fused(twin, x).equal(before)
    in_place(twin)
    assert_follows(twin, x, before)
    assert fused(model, x).equal(before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = small()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert fused(other, x).equal(before)


def test_eight_threads_give_the_results_of_one(randomised):
    model = randomised(tf.ThreshNet79(num_classes=10).eval())
    inputs = [torch.randn(1 + i % 2, 3, 32 + 16 * (i % 3), 32) for i in range(24)]
    expected = [fused(model, x) for x in inputs]
    model = copy.deepcopy(model)  # Nothing compiled or packed yet.
    barrier = threading.Barrier(8)

    def work(index):
        barrier.wait()
        results = []
        for repeat in range(6):
            position = (index * 5 + repeat * 7) % len(inputs)
            results.append((position, fused(model, inputs[position])))
        return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for position, output in results:
                assert output.equal(expected[position])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(model, x, threads):
    expected = plain(model, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(fused(model, x), expected)
    finally:
        torch.set_num_threads(before)


def test_exact_by_the_environment(model, x, monkeypatch):
    monkeypatch.setenv("THRESHNET_FAST_WINOGRAD", "2")
    expected = plain(model, x)
    with torch.no_grad():
        assert "winograd" in str(tf.explain(model, x))
        assert_same(fused(model, x), expected)
        monkeypatch.setenv(environment.EXACT, "1")
        assert "winograd" not in str(tf.explain(model, x))
        exact = fused(model, x)
        monkeypatch.delenv(environment.EXACT)
    assert_same(exact, expected)
    assert not exact.equal(fused(model, x))
    assert tf.optimize(model, x, exact=True)(x).equal(exact)


@pytest.mark.parametrize(
    ("value", "size"), [("0", None), ("2", "2x2"), ("4", "4x4"), ("auto", None), ("", None)]
)
def test_winograd_by_the_environment(model, x, monkeypatch, value, size):
    expected = plain(model, x)
    monkeypatch.setenv("THRESHNET_FAST_WINOGRAD", value)
    with torch.no_grad():
        text = str(tf.explain(model, x))
        assert_same(fused(model, x), expected)
    others = {"2x2", "4x4"} - {size}
    if value in ("0", "2", "4"):
        assert not any(f"winograd F({other}, 3x3)" in text for other in others)
    assert size is None or f"winograd F({size}, 3x3)" in text
    monkeypatch.setenv("THRESHNET_FAST_EXACT", "1")
    with torch.no_grad():
        assert "winograd" not in str(tf.explain(model, x))


def test_winograd_by_the_environment_is_checked(model, x, monkeypatch):
    monkeypatch.setenv("THRESHNET_FAST_WINOGRAD", "3")
    with pytest.raises(ValueError, match="THRESHNET_FAST_WINOGRAD is '3': expected one of auto, 0"):
        tf.optimize(model, x)


FREED = """
import itertools
import sys
import torch
import threshnet_fast as tf
from test_plan import small

mode = sys.argv[1]
names = {"base.3.conv1.weight", "base.1.norm.running_var"} if mode != "frozen" else set()
for name, size, first in itertools.product({"x", *names}, (0, 4), ("before", "after")):
    model, x = small().train(mode == "train"), torch.randn(2, 3, 64, 64)
    call = tf.optimize(model, x) if mode == "frozen" else model
    with torch.set_grad_enabled(mode == "train"):
        if first == "after":
            call(x)
        tensors = {"x": x, **model.state_dict(keep_vars=True)}
        tensors[name].untyped_storage().resize_(size)
        print(name, size, first, end=" ", flush=True)
        try:
            call(x)
            print("passed")
        except RuntimeError as error:
            print("said" if size == 0 or f"{name} spans" in str(error) else error)
"""


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
def test_freed_memory_is_an_error(mode):
    # A process of its own, as it is one that could crash.
    result = subprocess.run(
        [sys.executable, "-c", FREED, mode],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == (4 if mode == "frozen" else 12)
    assert all(line.endswith(" said") for line in lines), result.stdout


def test_memory_that_was_freed_and_is_there_again(model, x):
    before = fused(model, x)
    weight = model.base[3].conv1.weight
    values = weight.detach().clone()
    weight.untyped_storage().resize_(0)
    with torch.no_grad():
        assert "has no memory" in tf.explain(model, x).reason
        weight.untyped_storage().resize_(values.nbytes)
        weight.copy_(values)
    assert fused(model, x).equal(before)


class TestOptimize:
    def test_copies_and_pickles(self, model, x):
        frozen = tf.optimize(model, x, exact=True)
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert repr(other) == repr(frozen)
            assert other(x).equal(frozen(x))

    def test_is_frozen(self, model, x):
        expected = plain(model, x)
        frozen = tf.optimize(model.train(), x)
        assert frozen.backend == "cpu"
        in_place(model)
        assert_same(frozen(x), expected)
        assert model.training

    def test_other_sizes_and_layouts(self, model, x):
        frozen = tf.optimize(model, x)
        for other in (torch.randn(1, 3, 33, 64), torch.randn(5, 3, 32, 32)):
            assert_same(frozen(other), plain(model, other))
            assert_same(frozen(other.to(memory_format=torch.channels_last)), plain(model, other))

    def test_from_many_threads(self, model):
        frozen = tf.optimize(model, torch.randn(1, 3, 32, 32))
        inputs = [torch.randn(1, 3, 32 + i % 4, 32) for i in range(40)]
        expected = [frozen(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            assert all(map(torch.equal, pool.map(frozen, inputs), expected))

    def test_refuses_what_it_cannot_give(self, model, x):
        frozen = tf.optimize(model, x)
        with pytest.raises(RuntimeError, match="x requires a gradient"):
            frozen(x.clone().requires_grad_())
        with torch.no_grad():
            frozen(x.clone().requires_grad_())
        with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
            frozen(x.double())
        with pytest.raises(ValueError, match="x has 4 channels"):
            frozen(torch.randn(1, 4, 32, 32))
        with pytest.raises(RuntimeError, match="x is on meta"):
            frozen(x.to("meta"))

    def test_bad_arguments(self, model, x):
        with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
            tf.optimize(model, x, dtype=torch.int8)
        with pytest.raises(TypeError, match="exact is 1"):
            tf.optimize(model, x, exact=1)
        with pytest.raises(TypeError, match="x has dtype"):
            tf.optimize(model, x.long())

    def test_plain_path_where_there_is_no_plan(self, model, x):
        own_forward(model)
        with pytest.warns(UserWarning, match=r"base\.1 is a ConvBNReLU") as warned:
            frozen = tf.optimize(model, x)
        assert len(warned) == 1
        assert warned[0].filename == __file__
        assert frozen.islands
        assert [line.partition(" ")[0] for line in frozen.foreign] == ["base.1"]
        assert_same(frozen(x), plain(model, x))
