"""Networks in bfloat16 on the CPU: step by step, whole networks, and without the instruction."""

import copy

import pytest
import torch
from data import photographs
from test_engine import (
    WINOGRAD,
    WINOGRAD_MATRICES,
    check_every_step,
    compile_plan,
    normalised,
    winograd,
)
from test_plan import small
from tolerance import accumulated_bound
from torch.nn import functional as F

import threshnet_fast as tf
from threshnet_fast.engines import cpu
from threshnet_fast.plan import FusedConv, Pool, lower
from threshnet_fast.plan.reference import activate

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
operators = torch.ops.threshnet_fast_cpu
ROUNDOFF = torch.finfo(torch.bfloat16).eps / 2

ISAS = cpu.isa_codes(torch.bfloat16) if cpu.unavailable_reason() is None else []
needs_bfloat16 = pytest.mark.skipif(not ISAS, reason="the processor does not multiply bfloat16")


def run(plan, x, isa, arena=None, winograd=-1):
    """Runs a plan in a poisoned workspace; returns the output and the workspace, in bfloat16."""
    threads = torch.get_num_threads()
    program = compile_plan(plan, isa, arena, threads, winograd)
    packed = operators.pack_weights(program, plan.weights())
    workspace = operators.create_workspace(program, threads).fill_(torch.nan)
    output = operators.run_plan(x, program, packed, workspace)
    output = output.flatten(1) if plan.flat_output else output
    return output, workspace.view(torch.bfloat16)


def winograd_energy(x, weight, size):
    """The sum of the squared parts of each output: what the roundings of both factors grow with."""
    inputs, weights, outputs = (torch.tensor(m, dtype=x.dtype) for m in WINOGRAD_MATRICES[size])
    height, width = x.shape[2:]
    x = F.pad(x, (1, 1 + -width % size, 1, 1 + -height % size))
    tiles = inputs @ x.unfold(2, size + 2, size).unfold(3, size + 2, size) @ inputs.T
    kernels = weights @ weight @ weights.T
    products = torch.einsum("ncyxij,ocij->noyxij", tiles.square(), kernels.square())
    y = (outputs.square() @ products @ outputs.square().T).transpose(3, 4)
    return y.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def rounded_step(step, x, algorithm):
    """One step in float64, and the bound on the error of rounding its factors and its result."""
    x, magnitude = normalised(step, x)
    if isinstance(step, Pool):
        if step.average:
            # Sums and prologue are float32.
            y, bound = (F.avg_pool2d(t, step.kernel, step.stride) for t in (x, magnitude))
            length = step.kernel[0] * step.kernel[1] + 1
            return y, accumulated_bound(
                y, torch.zeros_like(y), bound, length, store=ROUNDOFF, factor=0
            )
        y = F.max_pool2d(x, step.kernel, step.stride, step.padding)
        return y, torch.zeros_like(y)
    if not isinstance(step, FusedConv):
        # The mean is rounded where it is stored, then the classifier is a 1x1 convolution.
        weight = step.weight.double()[:, :, None, None]
        bias, window = step.bias.double(), {"stride": 1, "padding": 0}
        x, magnitude = (t.mean((2, 3), keepdim=True) for t in (x, magnitude))
    else:
        weight = step.weight.double()
        window = {"stride": step.stride, "padding": step.padding, "groups": step.groups}
        bias = torch.zeros(len(weight)).double() if step.bias is None else step.bias.double()
    exact = F.conv2d(x, weight, bias, **window)
    length = weight[0].numel() + 1
    if algorithm in WINOGRAD:
        size = WINOGRAD[algorithm]
        energy = winograd_energy(x, weight, size)
        magnitude = winograd(x, weight, size, absolute=True) + bias.abs()[:, None, None]
        length = weight.shape[1] + 4 * (size + 2)
    else:
        energy = F.conv2d(x.square(), weight.square(), **window)
        magnitude = F.conv2d(magnitude, weight.abs(), bias.abs(), **window)
    bound = accumulated_bound(exact, energy, magnitude, length, store=ROUNDOFF, factor=ROUNDOFF)
    return activate(exact, getattr(step, "activation", None)), bound


@needs_bfloat16
@pytest.mark.parametrize("forced", [0, 2, 4])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "growth"),
    [
        ((1, 3, 32, 32), (8, 8, 10, 14)),
        ((2, 3, 45, 33), (7, 9, 10, 14)),
        ((3, 4, 64, 96), (8, 7, 10, 14)),
        ((2, 1, 69, 118), (8, 8, 40, 14)),
    ],
)
def test_every_step(randomised, forced, threads, shape, growth):
    """Odd growth rates make segments that begin or end in the middle of a pair of channels."""
    (isa,) = ISAS
    plan = lower(randomised(small(growth_rates=growth, in_chans=shape[1])), shape)
    x = torch.randn(shape).bfloat16()
    found = check_every_step(plan, x, isa, forced, threads, run, rounded_step)
    assert found == {forced} - {0}


def assert_error_at_most_twice_that_of_pytorch(model, x):
    """Root mean square error of logits against float64 on the same weights, rounded already."""
    model, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    with torch.no_grad(), tf.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())

        def error(y):
            assert y.dtype == torch.bfloat16
            return (y.double() - expected).square().mean().sqrt().item()

        eager = error(model(x))
    for exact in (False, True):
        fused = error(tf.optimize(model, x, exact=exact)(x))
        assert fused <= 2 * eager, f"exact {exact}: {fused:.3g}, PyTorch {eager:.3g}"


@pytest.mark.parametrize("cap", ["avx512_bf16", "avx512", "scalar"])
@pytest.mark.parametrize(
    ("name", "size", "batch"), [("threshnet95", (32, 32), 7), ("threshnet79", (225, 160), 1)]
)
def test_error_of_whole_networks(randomised, monkeypatch, cap, name, size, batch):
    """Without the instruction, too."""
    monkeypatch.setenv("THRESHNET_FAST_CPU_ISA", cap)
    try:
        cpu.isa()
    except ValueError as reason:
        pytest.skip(str(reason))
    model = randomised(tf.create_model(name, num_classes=1000).eval())
    assert_error_at_most_twice_that_of_pytorch(model, photographs(*size, count=batch))


def test_the_module_runs_fused(randomised):
    """model.bfloat16() is the same as tf.optimize(dtype=torch.bfloat16), whatever the strides."""
    model = randomised(small())
    x = torch.randn(3, 3, 40, 56)
    frozen = tf.optimize(model, x, dtype=torch.bfloat16)
    assert frozen.backend == "cpu"
    assert "bfloat16" in frozen.reason
    expected = frozen(x.bfloat16())
    model = model.bfloat16()
    for strided in (x, x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, 3:]):
        with torch.no_grad(), tf.use_backend("cpu"):
            assert model(strided.bfloat16()).equal(expected)
            features = model.forward_features(strided.bfloat16())
    assert features.dtype == torch.bfloat16
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_large_batches_run_in_parts(randomised):
    model = randomised(small()).bfloat16()
    x = torch.randn(301, 3, 64, 64).bfloat16()
    frozen = tf.optimize(model, x)
    one = tf.optimize(model, x[:1])
    output = frozen(x)
    for index in (0, 150, 300):
        torch.testing.assert_close(
            output[index], one(x[index : index + 1])[0], rtol=0.05, atol=0.05
        )


def test_edits_of_weights_are_noticed(randomised):
    model = randomised(small()).bfloat16()
    x = torch.randn(1, 3, 32, 32).bfloat16()
    with torch.no_grad(), tf.use_backend("cpu"):
        model(x)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
            assert model(x).equal(copy.deepcopy(model)(x))


@needs_bfloat16
def test_nan_and_infinity_pass_through(randomised):
    model = randomised(small(growth_rates=(7, 9, 10, 14)))
    for value in (torch.nan, torch.inf):
        x = torch.randn(2, 3, 32, 32).bfloat16()
        x[1, 0, 5, 7] = value
        output, _ = run(lower(model, x.shape), x, ISAS[0])
        assert output[0].isfinite().all()
        assert not output[1].isfinite().any()


@needs_bfloat16
def test_results_do_not_depend_on_what_the_workspace_held(randomised):
    plan = lower(randomised(small(growth_rates=(7, 9, 10, 14))), (2, 3, 40, 40))
    x = torch.randn(2, 3, 40, 40).bfloat16()
    program = compile_plan(plan, ISAS[0])
    packed = operators.pack_weights(program, plan.weights())
    workspace = operators.create_workspace(program, torch.get_num_threads())
    first = operators.run_plan(x, program, packed, workspace.fill_(torch.nan))
    second = operators.run_plan(x, program, packed, workspace.fill_(1e30))
    assert first.equal(second)


@needs_bfloat16
def test_wrong_dtypes_are_refused(randomised):
    plan = lower(randomised(small()), (1, 3, 32, 32))
    program = compile_plan(plan, ISAS[0])
    packed = operators.pack_weights(program, plan.weights())
    workspace = operators.create_workspace(program, torch.get_num_threads())
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(RuntimeError, match="x has the wrong dtype, expected bfloat16"):
            operators.run_plan(torch.zeros(1, 3, 32, 32, dtype=dtype), program, packed, workspace)
    xs, weight, vector = [torch.zeros(1, 2, 4, 4)], torch.zeros(3, 2, 1, 1), torch.zeros(3)
    with pytest.raises(RuntimeError, match="expected one that computes in float32"):
        operators.cat_conv_bn_relu(xs, weight, vector, vector, 1, 0, False, ISAS[0])
