"""Every kind of step on the CPU against the float64 reference, in plans of several inputs and
outputs: any window, any pitch, every instruction set, bfloat16, odd sizes, failure paths."""

import contextlib
import dataclasses
import itertools
from random import Random

import pytest
import torch
from alone import run_alone
from tolerance import accumulated_bound, assert_within
from torch.nn import functional as F

from threshnet_fast.engines import cpu, cuda_plan
from threshnet_fast.graph.ir import Activate, ConvTranspose, Graph, UnsupportedModule
from threshnet_fast.plan import (
    Buffer,
    FusedConv,
    Head,
    Plan,
    Pool,
    Prologue,
    Segment,
    plan_memory,
    serialize,
)
from threshnet_fast.plan.codes import ACTIVATIONS
from threshnet_fast.plan.fuse import fuse
from threshnet_fast.plan.ir import Pointwise, Resize
from threshnet_fast.plan.limits import check_gpu
from threshnet_fast.plan.reference import reference_outputs, reference_step

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
operators = torch.ops.threshnet_fast_cpu
# Channels of an output before and behind those that a step writes.
BEFORE, BEHIND = 5, 3


def isas():
    """Codes of all instruction sets, those for bfloat16 last."""
    return cpu.isa_codes() + cpu.isa_codes(torch.bfloat16)


@contextlib.contextmanager
def poisoned():
    """New memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def threads_of(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nhwc(batch, channels, height, width, pitch, dtype, scale=1.0):
    """A map whose pixels have gaps, of NaN."""
    memory = torch.full((batch, height, width, pitch), torch.nan, dtype=dtype)
    memory[..., :channels] = scale * torch.randn(batch, height, width, channels)
    return memory[..., :channels].permute(0, 3, 1, 2)


def compiled(plan, isa, threads, winograd=0):
    prepared = cpu.CompiledPlan(plan, isa, threads, winograd)
    return prepared, operators.pack_weights(prepared.program, plan.weights())


def bound_of(step, inputs, expected, dtype):
    """The largest error of a step whose factors and result are of a dtype, its sums of float32."""
    narrow = torch.finfo(torch.bfloat16).eps / 2 if dtype is torch.bfloat16 else 0.0
    store = narrow or torch.finfo(torch.float32).eps / 2
    size = tuple(expected.shape[2:])
    energy = torch.zeros_like(expected)
    if isinstance(step, Pointwise):
        magnitude = torch.stack([x.abs() for x in inputs]).sum(0)
        if step.scale is not None:
            scale, shift = (t.double().abs()[:, None, None] for t in (step.scale, step.shift))
            magnitude = magnitude * scale + shift
        # An activation is steep at most 1.5, and takes a few roundings of its own.
        magnitude = 1.5 * magnitude + 4 * expected.abs()
        return 1e-37 + accumulated_bound(
            expected, energy, magnitude, len(inputs) + 1, store=store, factor=0
        )
    if isinstance(step, Resize):
        magnitude = reference_step(step, [x.abs() for x in inputs], size)
        return accumulated_bound(expected, energy, magnitude, 8, store=store, factor=0)
    if isinstance(step, Pool) and not step.average:
        return energy
    x = torch.cat([x.abs() for x in inputs], 1)
    if step.prologue is not None:
        scale, shift = (
            t.double().abs()[:, None, None] for t in (step.prologue.scale, step.prologue.shift)
        )
        x = x * scale + shift
    if isinstance(step, Pool):
        magnitude = reference_step(dataclasses.replace(step, prologue=None), [x], size)
        length = step.kernel[0] * step.kernel[1] + 2
        return accumulated_bound(expected, energy, magnitude, length, store=store, factor=0)
    absolute = dataclasses.replace(
        step,
        weight=step.weight.abs(),
        bias=None if step.bias is None else step.bias.abs(),
        prologue=None,
        activation=None,
    )
    squared = dataclasses.replace(absolute, weight=step.weight.double().square(), bias=None)
    magnitude = reference_step(absolute, [x], size)
    if narrow and step.groups == 1:
        energy = reference_step(squared, [x.square()], size)
    length = step.weight[0].numel() + 2
    return accumulated_bound(expected, energy, magnitude, length, store=store, factor=narrow)


def plan_of_step(step, sizes, out, batch, gap=7):
    """A plan of one step that reads NHWC inputs and writes between channels of an output."""
    inputs = tuple(Segment(i, 0, size[0]) for i, size in enumerate(sizes))
    buffers = [Buffer(h, w, c, "x", c + gap * (i + 1)) for i, (c, h, w) in enumerate(sizes)]
    channels, height, width = out
    buffers.append(Buffer(height, width, BEFORE + channels + BEHIND, "y"))
    output = Segment(len(sizes), BEFORE, channels)
    named = {"inputs": inputs} if isinstance(step, FusedConv | Pointwise) else {"input": inputs[0]}
    step = dataclasses.replace(step, output=output, batch=batch, **named)
    return Plan(
        (batch, *sizes[0]),
        tuple(buffers),
        (step,),
        False,
        inputs=tuple(range(len(sizes))),
        image=False,
        outputs=(Segment(len(sizes), 0, BEFORE + channels + BEHIND), output),
        flat_outputs=(False, False),
    )


def check_step(step, sizes, out, batch=2, images=None, threads=2, scale=1.0):
    """A step in every instruction set; `images` may be more than the program's batch."""
    plan = plan_of_step(step, sizes, out, batch)
    images = batch if images is None else images
    rows, columns = slice(None), slice(None)
    if isinstance(step, FusedConv):
        rows, columns = (
            slice(start, None, stride)
            for start, stride in zip(step.output_start, step.output_stride, strict=True)
        )
    for isa in isas():
        dtype = torch.bfloat16 if isa in cpu.isa_codes(torch.bfloat16) else torch.float32
        xs = [
            nhwc(images, c, h, w, b.pitch, dtype, scale)
            for (c, h, w), b in zip(sizes, plan.buffers, strict=False)
        ]
        with threads_of(threads):
            prepared, packed = compiled(plan, isa, threads)
            with poisoned():
                whole, part = prepared.run(xs, packed)
        assert part.shape == (images, *out)
        assert whole.dtype is dtype
        assert whole.is_contiguous(memory_format=torch.channels_last)
        assert whole[:, :BEFORE].isnan().all()
        assert whole[:, BEFORE + out[0] :].isnan().all()
        assert part.data_ptr() == whole[:, BEFORE:].data_ptr()
        doubles = [x.double() for x in xs]
        (step,) = plan.steps
        written = part[:, :, rows, columns]
        assert part.isnan().sum() == part.numel() - written.numel()
        expected = reference_step(step, doubles, written.shape[2:])
        assert_within(written, expected, bound_of(step, doubles, expected, dtype))


def conv(
    weight,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation=None,
    bias=True,
    prologue=None,
    groups=1,
):
    return FusedConv(
        name="conv",
        inputs=(),
        output=Segment(0, 0, 1),
        weight=weight,
        bias=torch.randn(len(weight)) if bias else None,
        prologue=prologue,
        stride=stride,
        padding=padding,
        activation=activation,
        input_pixels=0,
        output_pixels=0,
        valid_taps=0,
        batch=1,
        groups=groups,
        dilation=dilation,
    )


def windows_of(size, kernel, stride, padding, dilation=(1, 1)):
    """Height and width of the output for padding (top, left, bottom, right)."""
    top, left, bottom, right = padding
    padded = (size[0] + top + bottom, size[1] + left + right)
    return tuple(
        (n - ((k - 1) * d + 1)) // s + 1
        for n, k, s, d in zip(padded, kernel, stride, dilation, strict=True)
    )


# Size, kernel, stride, padding (top, left, bottom, right), dilation.
WINDOWS = [
    ((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 1), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((1, 9), (1, 7), (1, 2), (0, 3, 0, 3), (1, 1)),
    ((7, 5), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((7, 5), (3, 3), (2, 2), (0, 0, 1, 1), (1, 1)),
    ((7, 5), (2, 4), (1, 1), (0, 1, 1, 2), (1, 1)),
    ((7, 5), (1, 3), (1, 1), (0, 1, 0, 1), (1, 1)),
    ((7, 5), (3, 1), (2, 1), (1, 0, 1, 0), (1, 1)),
    ((12, 10), (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    ((12, 10), (3, 2), (1, 2), (3, 0, 1, 4), (3, 2)),
    ((9, 14), (5, 5), (2, 3), (2, 1, 0, 3), (1, 2)),
    ((7, 5), (3, 3), (1, 1), (4, 4, 4, 4), (1, 1)),
    ((4, 4), (3, 3), (1, 1), (6, 6, 6, 6), (6, 6)),
    ((13, 11), (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((6, 6), (1, 1), (1, 1), (1, 1, 1, 1), (1, 1)),
]
# More taps than a mask has bits: of images and of each channel on its own.
LARGE = [
    ((20, 9), (11, 11), (4, 4), (2, 2, 2, 2), (1, 1)),
    ((20, 9), (9, 8), (1, 2), (4, 4, 4, 4), (2, 1)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("channels", "out"), [((3,), 21), ((33,), 48), ((48, 1, 21), 33)])
def test_convolution(window, channels, out):
    size, kernel, stride, padding, dilation = window
    weight = torch.randn(out, sum(channels), *kernel)
    step = conv(weight, stride=stride, padding=padding[:2], dilation=dilation, activation="relu6")
    result = windows_of(size, kernel, stride, padding, dilation)
    check_step(step, [(c, *size) for c in channels], (out, *result), threads=1 + out % 2)


# Size, kernel, padding, dilation; distances and first of the pixels that are written; output.
LATTICES = [
    ((1, 1), (1, 1), (0, 0), (1, 1), (2, 2), (1, 1), (2, 2)),
    ((7, 5), (1, 1), (0, 0), (1, 1), (2, 2), (0, 1), (14, 10)),
    ((7, 5), (2, 2), (1, 1), (1, 1), (2, 2), (1, 0), (14, 10)),
    ((7, 5), (3, 2), (2, 0), (1, 2), (3, 1), (2, 0), (19, 4)),
    ((7, 5), (3, 3), (1, 1), (1, 1), (1, 2), (0, 1), (7, 11)),
    ((20, 19), (2, 1), (1, 0), (1, 1), (2, 2), (0, 1), (39, 37)),
]


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
@pytest.mark.parametrize(("channels", "out"), [((3,), 21), ((33,), 48), ((48, 1, 21), 33)])
@pytest.mark.parametrize("prologue", [False, True])
def test_convolution_to_some_of_the_pixels(lattice, channels, out, prologue):
    size, kernel, padding, dilation, stride, start, result = lattice
    total = sum(channels)
    first = Prologue(torch.randn(total), 2 + torch.randn(total)) if prologue else None
    step = dataclasses.replace(
        conv(torch.randn(out, total, *kernel), padding=padding, dilation=dilation, prologue=first),
        activation="relu",
        output_stride=stride,
        output_start=start,
    )
    check_step(step, [(c, *size) for c in channels], (out, *result), threads=1 + out % 2)


# Kernel, stride, padding, output_padding, dilation, groups.
TRANSPOSED = [
    ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1),
    ((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1),
    ((4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    ((3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((1, 1), (2, 3), (0, 0), (1, 2), (1, 1), 1),
    ((2, 3), (3, 4), (0, 0), (2, 0), (1, 1), 2),
    ((5, 4), (3, 2), (2, 0), (0, 1), (1, 1), 1),
    ((3, 2), (2, 2), (0, 1), (0, 1), (2, 3), 1),
    ((5, 3), (4, 6), (3, 1), (0, 5), (2, 4), 4),
    ((2, 2), (2, 2), (1, 1), (1, 1), (1, 1), 1),
    ((1, 4), (3, 1), (2, 2), (2, 0), (1, 2), 2),
]


@pytest.mark.parametrize("settings", TRANSPOSED, ids=str)
@pytest.mark.parametrize(("channels", "out"), [(4, 8), (48, 20)])
@pytest.mark.parametrize("size", [(5, 4), (3, 7)], ids=str)
def test_transposed_convolution(settings, channels, out, size):
    kernel, stride, padding, more, dilation, groups = settings
    module = torch.nn.ConvTranspose2d(
        channels, out, kernel, stride, padding, more, groups, True, dilation
    )
    graph = Graph(channels)
    value = graph.add(ConvTranspose("up", (0,), graph.value(out), module))
    graph.add(Activate("act", (value,), graph.value(out), "silu"))
    plan = fuse(graph, ((2, channels, *size, channels + 3),))
    weight, bias = module.weight.double(), module.bias.double()
    options = stride, padding, more, groups, dilation
    for isa in isas():
        dtype = torch.bfloat16 if isa in cpu.isa_codes(torch.bfloat16) else torch.float32
        x = nhwc(2, channels, *size, channels + 3, dtype)
        with poisoned():
            prepared, packed = compiled(plan, isa, torch.get_num_threads())
            (y,) = prepared.run([x], packed)
        total = F.conv_transpose2d(x.double(), weight, bias, *options).detach()
        magnitude = F.conv_transpose2d(x.double().abs(), weight.abs(), bias.abs(), *options)
        assert y.shape == total.shape
        narrow = torch.finfo(torch.bfloat16).eps if dtype is torch.bfloat16 else 0.0
        length = channels * kernel[0] * kernel[1] + 8
        # SiLU is steep at most 1.1. In bfloat16 it reads rounded sums, of rounded weights.
        bound = (length * torch.finfo(torch.float32).eps + 2 * narrow) * 1.1 * magnitude.detach()
        assert_within(y, F.silu(total), bound + 1e-37)
        (exact,) = reference_outputs(plan, [x])
        torch.testing.assert_close(exact, F.silu(total), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 1, "padding": 2}, "cuts off more than its window adds"),
        ({"stride": 2, "padding": 5}, "makes nothing of a map of 4x4"),
        ({"stride": 2, "groups": 40}, "has 40 groups, expected 32"),
    ],
)
def test_transposed_convolutions_that_no_plan_has(options, message):
    graph = Graph(40)
    module = torch.nn.ConvTranspose2d(40, 40, 2, **options)
    graph.add(ConvTranspose("up", (0,), graph.value(40), module))
    with pytest.raises(UnsupportedModule, match=message):
        fuse(graph, ((1, 40, 4, 4, 40),))


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("channels", [(21,), (48, 3, 33)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_prologue_of_a_convolution(kernel, channels, activation):
    """Padding is zeros behind the prologue, whatever it makes of zeros."""
    total = sum(channels)
    prologue = Prologue(torch.randn(total), 2 + torch.randn(total), activation)
    step = conv(torch.randn(33, total, *kernel), padding=(1, 1), prologue=prologue, bias=False)
    result = windows_of((7, 5), kernel, (1, 1), (1, 1, 1, 1))
    check_step(step, [(c, 7, 5) for c in channels], (33, *result), scale=4)


@pytest.mark.parametrize(
    ("window", "channels"),
    [*itertools.product(WINDOWS, (1, 21, 48)), *itertools.product(LARGE, (21, 48))],
    ids=str,
)
def test_depthwise_convolution(window, channels):
    size, kernel, stride, padding, dilation = window
    weight = torch.randn(channels, 1, *kernel)
    step = conv(weight, stride=stride, padding=padding[:2], dilation=dilation, groups=channels)
    result = windows_of(size, kernel, stride, padding, dilation)
    check_step(step, [(channels, *size)], (channels, *result), threads=1 + channels % 2)


@pytest.mark.parametrize("window", WINDOWS + LARGE, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_convolution_of_an_image_in_any_strides(window, channels):
    size, kernel, stride, padding, dilation = window
    result = windows_of(size, kernel, stride, padding, dilation)
    step = dataclasses.replace(
        conv(
            torch.randn(21, channels, *kernel),
            stride=stride,
            padding=padding[:2],
            dilation=dilation,
        ),
        inputs=(Segment(0, 0, channels),),
        output=Segment(1, BEFORE, 21),
    )
    buffers = (Buffer(*size, channels, "x"), Buffer(*result, 21 + BEFORE, "y"))
    plan = Plan((2, channels, *size), buffers, (step,), False, outputs=(step.output,))
    for isa in isas():
        dtype = torch.bfloat16 if isa in cpu.isa_codes(torch.bfloat16) else torch.float32
        prepared, packed = compiled(plan, isa, torch.get_num_threads())
        dense = torch.randn(3, channels, *size).to(dtype)
        for x in (dense, dense.to(memory_format=torch.channels_last), dense.mT.contiguous().mT):
            (y,) = prepared.run([x], packed)
            expected = reference_step(step, [x.double()], result)
            assert_within(y, expected, bound_of(step, [x.double()], expected, dtype))


# Size, kernel, stride, padding (top, left), output; the last windows may reach beyond the padding.
POOLS = [
    ((1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 9), (1, 3), (1, 2), (0, 1), (1, 5)),
    ((7, 5), (2, 2), (2, 2), (0, 0), (3, 2)),
    ((7, 5), (2, 2), (2, 2), (0, 0), (4, 3)),
    ((7, 5), (3, 3), (2, 2), (1, 1), (4, 3)),
    ((8, 6), (3, 3), (2, 2), (0, 0), (4, 3)),
    ((8, 6), (3, 2), (1, 3), (1, 0), (8, 2)),
    ((8, 6), (5, 4), (2, 1), (2, 2), (4, 7)),
    ((5, 4), (5, 4), (1, 1), (0, 0), (1, 1)),
    ((6, 6), (3, 3), (3, 3), (1, 1), (3, 3)),
]
DIVISORS = [None, 0, 5]


@pytest.mark.parametrize("window", POOLS, ids=str)
@pytest.mark.parametrize("channels", [1, 21, 48])
@pytest.mark.parametrize("divisor", ["max", *DIVISORS])
def test_pool(window, channels, divisor):
    size, kernel, stride, padding, result = window
    average = divisor != "max"
    step = Pool(
        "pool",
        Segment(0, 0, 1),
        Segment(0, 0, 1),
        kernel,
        stride,
        padding,
        average,
        0,
        0,
        1,
        divisor=divisor if average else None,
    )
    check_step(step, [(channels, *size)], (channels, *result), threads=1 + channels % 2)
    if average:
        for activation in (None, "relu", "relu6"):
            prologue = Prologue(torch.randn(channels), torch.randn(channels), activation)
            normalised = dataclasses.replace(step, prologue=prologue)
            check_step(normalised, [(channels, *size)], (channels, *result), scale=4)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (s, k, t, p)
        for s in (7, 8)
        for k in (2, 3, 5)
        for t in (1, 2, 3)
        for p in (0, 1)
        if 2 * p <= k
    ],
)
def test_pools_are_those_of_torch(size, kernel, stride, padding, ceil_mode):
    """With padding, ceil_mode and all three divisors, to the last bit of what is representable."""
    x = torch.randint(-8, 8, (2, 16, size, size)).float()
    window = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    expected = {
        "max": F.max_pool2d(x, kernel, **window),
        None: F.avg_pool2d(x, kernel, **window, count_include_pad=False),
        0: F.avg_pool2d(x, kernel, **window),
        7: F.avg_pool2d(x, kernel, **window, divisor_override=7),
    }
    for divisor, y in expected.items():
        average = divisor != "max"
        step = Pool(
            "pool",
            Segment(0, 0, 1),
            Segment(0, 0, 1),
            (kernel,) * 2,
            (stride,) * 2,
            (padding,) * 2,
            average,
            0,
            0,
            1,
            divisor=divisor if average else None,
        )
        plan = plan_of_step(step, [(16, size, size)], tuple(y.shape[1:]), 2, gap=0)
        prepared, packed = compiled(plan, operators.best_isa(), torch.get_num_threads())
        part = prepared.run([x.to(memory_format=torch.channels_last)], packed)[1]
        torch.testing.assert_close(part, y, rtol=1e-6, atol=0 if not average else 1e-6)


def sum_of(count, channels, activation, scaled, slope=0.0):
    affine = (torch.randn(channels), torch.randn(channels)) if scaled else (None, None)
    return Pointwise("sum", (), Segment(0, 0, 1), *affine, activation, 0, 1, slope)


@pytest.mark.parametrize("activation", [None, *list(ACTIVATIONS)[1:]])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("channels", "size"), [(1, (1, 1)), (3, (1, 7)), (21, (7, 5)), (33, (1, 1)), (48, (6, 5))]
)
def test_pointwise(activation, scaled, channels, size):
    for count, threads in ((1, 2), (2, 1), (5, 2)):
        step = sum_of(count, channels, activation, scaled, slope=0.25)
        check_step(step, [(channels, *size)] * count, (channels, *size), threads=threads, scale=4)


@pytest.mark.parametrize("activation", [None, *list(ACTIVATIONS)[1:]])
def test_dense_sums(activation):
    """Without gaps, where a row of channels is all pixels."""
    step = sum_of(2, 21, activation, False, slope=-0.5)
    plan = plan_of_step(step, [(21, 7, 5)] * 2, (21, 7, 5), 3, gap=0)
    output = Segment(2, 0, 21)
    step = dataclasses.replace(plan.steps[0], output=output)
    buffers = (*plan.buffers[:2], Buffer(7, 5, 21, "y"))
    plan = dataclasses.replace(
        plan, buffers=buffers, steps=(step,), outputs=(output,), flat_outputs=()
    )
    xs = [torch.randn(3, 21, 7, 5).to(memory_format=torch.channels_last) for _ in range(2)]
    for isa in cpu.isa_codes():
        prepared, packed = compiled(plan, isa, torch.get_num_threads())
        (y,) = prepared.run(xs, packed)
        doubles = [x.double() for x in xs]
        expected = reference_step(step, doubles, (7, 5))
        assert_within(y, expected, bound_of(step, doubles, expected, torch.float32))


def run_sum(step, *xs, isa):
    plan = plan_of_step(step, [tuple(x.shape[1:]) for x in xs], tuple(xs[0].shape[1:]), 1, gap=0)
    prepared, packed = compiled(plan, isa, torch.get_num_threads())
    return prepared.run([x.to(memory_format=torch.channels_last) for x in xs], packed)[1]


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_exponentials_everywhere(activation):
    """A few units in the last place, from where they vanish to where they overflow."""
    x = torch.cat([torch.linspace(-110, 110, 44001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 3e38])])
    x = x.view(1, 1, 1, -1)
    expected = getattr(F, activation)(x.double())
    for isa in cpu.isa_codes():
        y = run_sum(sum_of(1, 1, activation, False), x, isa=isa)
        # What float32 calls denormal may vanish.
        error = (y.double() - expected).abs() - 2.4e-38 * (1 + x.abs().clamp_max(100))
        assert (error <= 4 * torch.finfo(torch.float32).eps * expected.abs()).all()


@pytest.mark.parametrize("activation", [None, *list(ACTIVATIONS)[1:]])
def test_sums_of_what_is_not_finite(activation):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 0.0, 7.0, -3.0])
    x = values.repeat(3).view(1, 24, 1, 1)
    step = sum_of(1, 24, activation, False, slope=0.5)
    expected = reference_step(step, [x], (1, 1))
    for isa in cpu.isa_codes():
        y = run_sum(step, x, isa=isa)
        torch.testing.assert_close(y, expected, equal_nan=True)


RESIZES = list(
    itertools.product(
        [
            ((1, 1), (3, 2)),
            ((1, 7), (4, 9)),
            ((7, 5), (14, 10)),
            ((12, 10), (5, 3)),
            ((7, 5), (7, 5)),
        ],
        [("nearest", False), ("nearest-exact", False), ("bilinear", False), ("bilinear", True)],
    )
)


def resize(size, result, mode, aligned, scale_factor=None):
    scale = [
        (n - 1) / (m - 1) if aligned and m > 1 else 0.0 if aligned else n / m
        for n, m in zip(size, result, strict=True)
    ]
    if scale_factor is not None:
        scale = [1 / scale_factor] * 2
    return Resize("up", Segment(0, 0, 1), Segment(0, 0, 1), mode, aligned, tuple(scale), 0, 0, 1)


@pytest.mark.parametrize(("sizes", "kind"), RESIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 21, 48])
def test_resize(sizes, kind, channels):
    size, result = sizes
    step = resize(size, result, *kind)
    for threads in (1, 2):
        check_step(step, [(channels, *size)], (channels, *result), threads=threads)


@pytest.mark.parametrize("kind", ["nearest", "nearest-exact", "bilinear", "aligned"])
def test_resizing_is_that_of_torch(kind):
    """The nearest pixels are the same ones for all sizes and factors, rounded as torch rounds."""
    mode, aligned = ("bilinear", True) if kind == "aligned" else (kind, False)
    options = {"align_corners": aligned} if mode == "bilinear" else {}
    cases = [(n, m, None) for n in (1, 3, 7, 28) for m in (1, 2, 5, 7, 11, 39, 56)]
    cases += [(n, int(n * f), f) for n in (3, 7, 29) for f in (0.7, 1.05, 1.3, 1.7, 2.02, 2.3, 3.1)]
    for n, m, factor in cases:
        if factor is not None and aligned:
            continue
        x = torch.randn(1, 8, n, n)
        target = {"size": (m, m)} if factor is None else {"scale_factor": factor}
        y = F.interpolate(x, **target, mode=mode, **options)
        step = resize((n, n), (m, m), mode, aligned, factor)
        plan = plan_of_step(step, [(8, n, n)], (8, m, m), 1)
        prepared, packed = compiled(plan, operators.best_isa(), torch.get_num_threads())
        actual = prepared.run([nhwc_like(x, plan.buffers[0].pitch)], packed)[1]
        tolerance = 1e-5 if mode == "bilinear" else 0
        torch.testing.assert_close(actual, y, rtol=tolerance, atol=tolerance)


# Several inputs and outputs


def island(batch=2, pitch=40):
    """Outputs that later steps read, and one that is a sum in place."""
    conv_image = dataclasses.replace(
        conv(torch.randn(16, 3, 3, 3), padding=(1, 1), activation="relu", bias=False),
        inputs=(Segment(0, 0, 3),),
        output=Segment(2, 0, 16),
        batch=batch,
    )
    conv_map = dataclasses.replace(
        conv(torch.randn(16, 17, 1, 1), prologue=Prologue(torch.randn(17), torch.randn(17))),
        inputs=(Segment(1, 0, 17),),
        output=Segment(2, 16, 16),
        batch=batch,
    )
    add = Pointwise(
        "add",
        (Segment(2, 0, 16), Segment(2, 16, 16)),
        Segment(2, 0, 16),
        None,
        None,
        "silu",
        63,
        batch,
    )
    double = Pointwise(
        "copy",
        (Segment(2, 0, 16), Segment(2, 0, 16)),
        Segment(3, 0, 16),
        torch.randn(16),
        torch.randn(16),
        None,
        63,
        batch,
    )
    pool = Pool(
        "pool", Segment(3, 0, 16), Segment(4, 0, 16), (2, 2), (2, 2), (0, 0), False, 63, 12, batch
    )
    up = Resize(
        "up", Segment(4, 0, 16), Segment(6, 0, 16), "bilinear", False, (0.5, 0.5), 12, 48, batch
    )
    depthwise = dataclasses.replace(
        conv(torch.randn(16, 1, 3, 3), padding=(1, 1), groups=16),
        inputs=(Segment(6, 0, 16),),
        output=Segment(6, 16, 16),
        batch=batch,
    )
    head = Head(
        "head", Segment(4, 0, 16), Segment(5, 0, 9), torch.randn(9, 16), torch.randn(9), 12, batch
    )
    buffers = (
        Buffer(9, 7, 3, "image"),
        Buffer(9, 7, 17, "map", pitch),
        Buffer(9, 7, 32, "block"),
        Buffer(9, 7, 16, "sum"),
        Buffer(4, 3, 16, "pooled"),
        Buffer(1, 1, 9, "logits"),
        Buffer(8, 6, 32, "up"),
        Buffer(8, 6, 16, "transposed"),
    )
    transposed = [
        dataclasses.replace(
            conv(torch.randn(16, 16, 1, 1)),
            inputs=(Segment(4, 0, 16),),
            output=Segment(7, 0, 16),
            batch=batch,
            output_stride=(2, 2),
            output_start=start,
        )
        for start in itertools.product(range(2), repeat=2)
    ]
    return Plan(
        (batch, 3, 9, 7),
        buffers,
        (conv_image, conv_map, add, double, pool, head, up, depthwise, *transposed),
        False,
        inputs=(0, 1),
        outputs=(
            Segment(2, 16, 16),
            Segment(2, 0, 32),
            Segment(5, 0, 9),
            Segment(3, 0, 16),
            Segment(6, 0, 32),
            Segment(7, 0, 16),
        ),
        flat_outputs=(False, False, True, False, False, False),
    )


def inputs_of(plan, images, dtype=torch.float32):
    x = torch.randn(images, 3, 9, 7).to(dtype)
    return [x, nhwc(images, 17, 9, 7, plan.buffers[1].pitch, dtype)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "images"), [(1, 1), (2, 2), (3, 3), (2, 5), (1, 4), (3, 4)])
def test_several_inputs_and_outputs(batch, images, threads):
    plan = island(batch)
    whole = dataclasses.replace(plan, input_shape=(images, 3, 9, 7))
    for isa in isas():
        dtype = torch.bfloat16 if isa in cpu.isa_codes(torch.bfloat16) else torch.float32
        xs = inputs_of(plan, images, dtype)
        with threads_of(threads), poisoned():
            prepared, packed = compiled(plan, isa, threads, -1)
            outputs = prepared.run(xs, packed)
            again = prepared.run(xs, packed)
        expected = reference_outputs(whole, xs)
        tolerance = 2e-5 if dtype is torch.float32 else 0.08
        for y, exact in zip(outputs, expected, strict=True):
            assert y.dtype is dtype
            error = (y.double() - exact).abs().max() / exact.abs().max()
            assert y.shape == exact.shape
            assert error <= tolerance
        # Views of one map.
        assert outputs[0].data_ptr() == outputs[1][:, 16:].data_ptr()
        assert all(map(torch.equal, outputs, again))
        assert outputs[1].data_ptr() != again[1].data_ptr()


def test_dtypes_are_converted():
    """Of a processor, or a setting, without bfloat16."""
    plan = island()
    xs = inputs_of(plan, 3, torch.bfloat16)
    prepared, packed = compiled(plan, operators.best_isa(), torch.get_num_threads())
    outputs = prepared.run(xs, packed)
    exact = prepared.run([xs[0].float(), nhwc_like(xs[1].float(), 40)], packed)
    for y, expected in zip(outputs, exact, strict=True):
        assert y.dtype is torch.bfloat16
        assert y.equal(expected.bfloat16())


def nhwc_like(x, pitch):
    memory = torch.full((len(x), *x.shape[2:], pitch), torch.nan)
    memory[..., : x.shape[1]] = x.permute(0, 2, 3, 1)
    return memory[..., : x.shape[1]].permute(0, 3, 1, 2)


def test_a_network_of_one_input_runs_as_ever():
    step = dataclasses.replace(
        conv(torch.randn(16, 3, 3, 3)),
        inputs=(Segment(0, 0, 3),),
        output=Segment(1, 0, 16),
        batch=2,
    )
    plan = Plan((2, 3, 9, 7), (Buffer(9, 7, 3, "x"), Buffer(7, 5, 16, "y")), (step,), False)
    prepared, packed = compiled(plan, operators.best_isa(), torch.get_num_threads())
    x = torch.randn(2, 3, 9, 7)
    (y,) = prepared.run([x], packed)
    assert y.equal(prepared(x, packed))


def test_compile_network_splits_rows_of_several_inputs():
    asked = []

    def source(shape, *, head, values):
        asked.append(shape)
        return island(2 if shape is None else shape[0][0])

    rows = ((7, 3, 9, 7, 0), (7, 17, 9, 7, 40))
    prepared = cpu.compile_network(
        source, rows, head=True, isa=operators.best_isa(), threads=1, winograd=-1
    )
    assert asked[0] == ((1, 3, 9, 7, 0), (1, 17, 9, 7, 40))
    assert asked[1] == rows
    assert prepared.batch == 7
    assert prepared.algorithms.count("direct") + prepared.algorithms.count("packed") == 13


# What is refused


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"dilation": (2, 2)}, "a has a window that is dilated"),
        (0, {"stride": (1, 2)}, "a has a window that is dilated, or moves"),
        (0, {"padding": (1, 0)}, "or is padded differently"),
        (1, {"output_stride": (1, 2)}, "or writes some of the pixels"),
        (1, {"prologue": Prologue(torch.ones(16), torch.ones(16), None)}, "without ReLU"),
        (1, {"prologue": Prologue(torch.ones(16), torch.ones(16), "relu6")}, "without ReLU"),
        (2, {"divisor": 3}, "a divisor of its own"),
        (2, {"kernel": (3, 3), "padding": (1, 1), "divisor": 0}, "an average with padding"),
        (3, {}, "c is 'relu' on its own"),
        (4, {}, "c is 'nearest resize' on its own"),
    ],
)
def test_gpus_decline(index, changes, message, tmp_path):
    first = dataclasses.replace(
        conv(torch.randn(16, 3, 3, 3), padding=(1, 1)),
        name="a",
        inputs=(Segment(0, 0, 3),),
        output=Segment(1, 0, 16),
    )
    second = dataclasses.replace(
        conv(torch.randn(16, 16, 1, 1), prologue=Prologue(torch.ones(16), torch.ones(16))),
        name="b",
        inputs=(Segment(1, 0, 16),),
        output=Segment(2, 0, 16),
    )
    average = Pool(
        "p", Segment(2, 0, 16), Segment(3, 0, 16), (2, 2), (2, 2), (0, 0), True, 64, 16, 1
    )
    relu = Pointwise("c", (Segment(2, 0, 16),), Segment(3, 0, 16), None, None, "relu", 64, 1)
    up = Resize("c", Segment(2, 0, 16), Segment(3, 0, 16), "nearest", False, (2.0, 2.0), 64, 16, 1)
    steps = [first, second, (average, average, average, relu, up)[index]]
    buffers = [Buffer(8, 8, 3, "x"), Buffer(8, 8, 16, "a"), Buffer(8, 8, 16, "b")]
    size = (8, 8) if index == 3 else (4, 4)
    plan = Plan((1, 3, 8, 8), (*buffers, Buffer(*size, 16, "y")), tuple(steps), False)
    target = cuda_plan.Target(torch.device("cpu"), torch.float32, 80, 108, 96 * 1024)
    if index < 3:
        check_gpu(plan)
        plan = replaced(plan, index, **changes)
    with pytest.raises(UnsupportedModule, match=message):
        check_gpu(plan)
    with pytest.raises(UnsupportedModule, match=message):
        cuda_plan.compile_plan(plan, plan_memory(plan), target)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": False},
        {"inputs": (0, 1)},
        {"outputs": (Segment(1, 0, 16),)},
    ],
)
def test_gpus_decline_plans_of_several_maps(changes):
    step = dataclasses.replace(
        conv(torch.randn(16, 3, 3, 3), padding=(1, 1)),
        inputs=(Segment(0, 0, 3),),
        output=Segment(1, 0, 16),
    )
    plan = Plan((1, 3, 8, 8), (Buffer(8, 8, 3, "x"), Buffer(8, 8, 16, "y")), (step,), False)
    check_gpu(plan)
    with pytest.raises(UnsupportedModule, match="several inputs or outputs"):
        check_gpu(dataclasses.replace(plan, **changes))


@pytest.fixture
def prepared_island():
    plan = island()
    return plan, *compiled(plan, operators.best_isa(), torch.get_num_threads())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: [x], "xs has 1 maps"),
        (lambda x, y: [x, y, y], "xs has 3 maps"),
        (lambda x, y: [x, y.contiguous()], r"xs\[1\] is not in NHWC with pixels 40 elements apart"),
        (lambda x, y: [x, nhwc_like(y, 39)], "pixels 40 elements apart"),
        (lambda x, y: [x, y[:, :16]], r"xs\[1\] has shape \[2, 16, 9, 7\]"),
        (lambda x, y: [x, y[:, :, :8]], r"xs\[1\] has shape \[2, 17, 8, 7\]"),
        (lambda x, y: [x[:, :2], y], r"xs\[0\] has shape \[2, 2, 9, 7\]"),
        (lambda x, y: [x[:1], y[:1]], r"xs\[0\] has shape \[1, 3, 9, 7\]"),
        (lambda x, y: [torch.cat([x, x]), y], r"xs\[1\] has 2 images, expected 4"),
        (lambda x, y: [x, y[0]], "four dimensions"),
        (lambda x, y: [x, y.double()], r"xs\[1\] has the wrong dtype, expected float32"),
        (lambda x, y: [x, y[:1].expand(2, -1, -1, -1)], "pixels 40 elements apart"),
        (lambda x, y: [x, y.to("meta")], "."),
        (lambda x, y: [], "xs has 0 maps"),
    ],
)
def test_wrong_inputs_are_refused(prepared_island, change, message):
    plan, prepared, packed = prepared_island
    xs = change(*inputs_of(plan, 2))
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        prepared.run(xs, packed)


def test_freed_memory_is_refused(prepared_island):
    plan, prepared, packed = prepared_island
    xs = inputs_of(plan, 2)
    xs[1].untyped_storage().resize_(64)
    with pytest.raises(RuntimeError, match=r"xs\[1\] has \d+ elements, but its storage"):
        prepared.run(xs, packed)


def test_programs_are_not_mixed_up(prepared_island):
    plan, prepared, packed = prepared_island
    xs = inputs_of(plan, 2)
    workspace = operators.create_workspace(prepared.program, torch.get_num_threads())
    with pytest.raises(RuntimeError, match="program is one with external maps"):
        operators.run_plan(xs[0], prepared.program, packed, workspace)
    with pytest.raises(RuntimeError, match="packed does not belong"):
        operators.run_island(xs, prepared.program, packed[:16], workspace)
    with pytest.raises(RuntimeError, match="workspace is too small"):
        operators.run_island(xs, prepared.program, packed, workspace[:16])


def replaced(plan, index, **changes):
    steps = list(plan.steps)
    steps[index] = dataclasses.replace(steps[index], **changes)
    return dataclasses.replace(plan, steps=tuple(steps))


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"output": Segment(1, 0, 16)}, "a step writes to an input"),
        (0, {"output": Segment(2, 17, 16)}, "an output leaves its buffer"),
        (0, {"dilation": (2**31 - 1, 1)}, "a window reaches over more than"),
        (0, {"dilation": (5, 1)}, None),
        (0, {"padding": (4, 1)}, "an output map has the wrong size"),
        (0, {"output_stride": (1, 2)}, "reads the network's input writes some of the pixels"),
        (1, {"output_start": (1, 0)}, "leaves out the first pixels"),
        (1, {"output_stride": (2, 0)}, "."),
        (8, {"output_start": (8, 0)}, "writes pixels beside its output"),
        (8, {"output_start": (0, -1)}, "writes pixels beside its output"),
        (8, {"output_stride": (2**31 - 1, 2)}, None),
        (0, {"padding": (2**20, 1)}, "padding"),
        (0, {"stride": (2**30, 1)}, "an output map has the wrong size"),
        (2, {"inputs": (Segment(2, 8, 16), Segment(2, 16, 16))}, "over a part of what it reads"),
        (2, {"inputs": (Segment(0, 0, 3),)}, "reads the network's input"),
        (2, {"inputs": (Segment(2, 0, 15),)}, "different numbers of channels"),
        (2, {"inputs": (Segment(6, 0, 16),)}, "segments of different sizes"),
        (2, {"slope": torch.inf}, "a number is not finite"),
        (4, {"padding": (3, 0), "kernel": (5, 2)}, "over half its window"),
        (4, {"output": Segment(3, 0, 16)}, "that it reads"),
        (6, {"scale": (-1.0, 1.0)}, "negative scale"),
        (6, {"scale": (torch.nan, 1.0)}, "a number is not finite"),
        (6, {"output": Segment(6, 0, 15)}, "changes the number of channels"),
        (7, {"output": Segment(6, 8, 16)}, "that it reads"),
    ],
)
def test_inconsistent_steps_are_refused(index, changes, message):
    plan = replaced(island(), index, **changes)
    if message is None:
        cpu.CompiledPlan(plan, operators.best_isa(), 2, -1)
        return
    with pytest.raises(UnsupportedModule, match=message):
        cpu.CompiledPlan(plan, operators.best_isa(), 2, -1)


def test_no_description_of_several_maps_crashes():
    run_alone(run_hostile_descriptions)


HOSTILE = (0, -1, -2, -3, -5, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))


def run_hostile_descriptions():
    """Compiles, packs and runs descriptions of which one entry is another."""
    random = Random(0)
    torch.set_num_threads(2)
    plan = island()
    xs = inputs_of(plan, 3)
    description = serialize(plan, plan_memory(plan))
    accepted = refused = 0
    for index in range(len(description)):
        near = [int(description[index]) + delta for delta in (-16, -1, 1, 2, 16)]
        for value in (*HOSTILE, random.getrandbits(63), random.randrange(64), *near):
            edited = description.clone()
            edited[index] = value
            try:
                program = operators.compile_plan(edited, operators.best_isa(), 2, -1)
                packed = operators.pack_weights(program, plan.weights())
                workspace = operators.create_workspace(program, 2)
                operators.run_island(xs, program, packed, workspace)
                accepted += 1
            except (RuntimeError, ValueError):
                refused += 1
    assert accepted > 100
    assert refused > 4 * accepted
