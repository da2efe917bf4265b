"""What both operators promise on Triton, beside the right numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from op_cases import LAYOUTS, SMALL, Case, vectors
from threshnet_fast.kernels import cat_bn_relu_conv, cat_conv_bn_relu, gradients, launch, operands

import threshnet_fast as tf
from emulation.driver import compiled_for
from emulation.interpreter import interpreted
from emulation.mutation import mutated
from emulation.operators import check_cat_bn_relu_conv, check_cat_conv_bn_relu
from threshnet_fast.engines import triton
from threshnet_fast.ops import registration

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Operator:
    """One of the two, called with segments, weight, scale and shift."""

    name: str

    def __str__(self) -> str:
        return self.name

    def __call__(self, xs: list[Tensor], *parameters: Tensor, **options: Any) -> Tensor:
        weight, scale, shift = parameters
        if self.name == "cat_bn_relu_conv":
            return tf.ops.cat_bn_relu_conv(xs, scale, shift, weight, **options)
        return tf.ops.cat_conv_bn_relu(xs, weight, scale, shift, **options)

    def arguments(self, case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Segments, weight, scale, shift."""
        length = sum(case.channels) if self.name == "cat_bn_relu_conv" else case.out
        return [*case.segments(dtype), case.weight(dtype), *vectors(length)]

    def check(self, precision: str, case: Case) -> None:
        if self.name == "cat_bn_relu_conv":
            check_cat_bn_relu_conv(precision, case)
        else:
            check_cat_conv_bn_relu(precision, case)

    @property
    def kernels(self) -> Any:
        return cat_bn_relu_conv if self.name == "cat_bn_relu_conv" else cat_conv_bn_relu


@pytest.fixture(params=["cat_bn_relu_conv", "cat_conv_bn_relu"])
def operator(request: pytest.FixtureRequest) -> Operator:
    return Operator(request.param)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were launched, in the interpreter."""
    names: list[str] = []
    original = launch.run

    def run(launches: list[launch.Launch]) -> None:
        names.extend(each.kernel.__name__ for each in launches)
        original(launches)

    monkeypatch.setattr(launch, "run", run)
    with interpreted():
        yield names


def gradients_of(operator: Operator, tensors: list[Tensor], backend: str, **options) -> Any:
    """Result, leaves, and the gradients of those that require them."""
    leaves = [t for t in tensors if t.requires_grad]
    y = operator(tensors[:-3], *tensors[-3:], padding=1, backend=backend)
    return torch.autograd.grad(y.square().sum(), leaves, **options)


FORWARD = ["implicit_gemm_kernel"]
TO_INPUT = ["input_gradient_kernel"]
SUMS = ["column_sums_kernel"]
TO_WEIGHT = ["weight_gradient_kernel", "weight_gradient_reduction_kernel"]

LAUNCHES = {
    ("cat_bn_relu_conv", "x"): TO_INPUT,
    ("cat_bn_relu_conv", "weight"): TO_WEIGHT,
    ("cat_bn_relu_conv", "scale"): TO_INPUT + SUMS,
    ("cat_bn_relu_conv", "shift"): TO_INPUT + SUMS,
    ("cat_conv_bn_relu", "x"): TO_INPUT,
    ("cat_conv_bn_relu", "weight"): TO_WEIGHT,
    ("cat_conv_bn_relu", "scale"): TO_WEIGHT + SUMS,
    ("cat_conv_bn_relu", "shift"): SUMS,
}


@pytest.mark.parametrize("wanted", ["x", "weight", "scale", "shift"])
def test_launches_only_what_is_needed(wanted: str, operator: Operator, launched: list[str]) -> None:
    tensors = operator.arguments(SMALL)
    index = {"x": 1, "weight": 2, "scale": 3, "shift": 4}[wanted]
    tensors[index].requires_grad_()
    (actual,) = gradients_of(operator, tensors, "triton")
    assert launched == FORWARD + LAUNCHES[operator.name, wanted]
    (expected,) = gradients_of(operator, tensors, "reference")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wanted", [(1,), (0, 2), (1, 3), (2, 4), (0, 5), (3, 4, 5)])
def test_any_gradients_together(
    wanted: tuple[int, ...], operator: Operator, launched: list[str]
) -> None:
    tensors = operator.arguments(Case((3, 20, 4), 2, (5, 4), 6, (3, 3), 1, 1))
    for i in wanted:
        tensors[i].requires_grad_()
    actual = gradients_of(operator, tensors, "triton")
    expected = gradients_of(operator, tensors, "reference")
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_many_segments_are_concatenated(operator: Operator) -> None:
    count = operands.MAX_SEGMENTS + 2
    with interpreted():
        operator.check("float16", Case((3, 1) * (count // 2), 2, (4, 3), 5, (3, 3), 1, 1))
        tensors = operator.arguments(Case((2,) * count, 1, (3, 3), 4, (1, 1), 1, 0))
        tensors[3].requires_grad_()
        (actual,) = gradients_of(operator, tensors, "triton")
        (expected,) = gradients_of(operator, tensors, "reference")
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_long_reductions_are_split(
    operator: Operator, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts of pixels in the gradient of the weight, and two levels of column sums."""
    monkeypatch.setattr(gradients, "_LEAST_PIXELS_OF_A_PART", 20)
    monkeypatch.setattr(gradients, "PIXELS_OF_A_PART", 32)
    monkeypatch.setattr(gradients, "_PROGRAMS_PER_MULTIPROCESSOR", 30)
    operator.check("float32", Case((5, 4), 1, (13, 17), 6, (3, 3), 1, 1))
    if operator.name == "cat_conv_bn_relu":
        assert launched[-2:] == ["column_sums_kernel"] * 2


def test_batch_of_more_than_a_tile(operator: Operator) -> None:
    with interpreted():
        operator.check("float32", Case((70,), 3, (5, 7), 66, (1, 1), 1, 0))


def test_gradient_passes_where_the_rectifier_saw_nan(operator: Operator) -> None:
    """As the derivative of torch.relu does, in the input's, scale's and shift's gradients."""
    tensors = [torch.tensor([[[[torch.nan, 1.0, -1.0]]]]), torch.ones(1, 1, 1, 1)]
    tensors += [torch.ones(1), torch.zeros(1)]
    for t in tensors:
        t.requires_grad_()
    with interpreted():
        y = operator(tensors[:1], *tensors[1:], padding=0, backend="triton")
        grad_x, _, grad_scale, grad_shift = torch.autograd.grad(y.sum(), tensors)
    assert grad_x.tolist() == [[[[1.0, 1.0, 0.0]]]]
    assert grad_scale.isnan().all()
    assert grad_shift.tolist() == [2.0]


@pytest.mark.parametrize("scale", [0.0, torch.inf, torch.nan])
def test_scale_that_is_no_plain_number(scale: float) -> None:
    """The scale multiplies the sums, so that nothing overflows or vanishes before its time."""
    xs = [torch.full((1, 2, 1, 1), 200.0, dtype=torch.float16)]
    weight = torch.full((1, 2, 1, 1), 200.0, dtype=torch.float16)
    with interpreted():
        for factor, expected in ((1e-4, 9.0), (scale, scale * 80000.0 + 1.0)):
            y = tf.ops.cat_conv_bn_relu(
                xs,
                weight,
                torch.tensor([factor]),
                torch.ones(1),
                padding=0,
                act="none",
                backend="triton",
            )
            torch.testing.assert_close(
                y.float().flatten(), torch.tensor([expected]), rtol=1e-3, atol=0, equal_nan=True
            )


def test_differentiates_twice(operator: Operator) -> None:
    tensors = [
        t.double().float() for t in operator.arguments(Case((2, 3), 2, (4, 3), 4, (3, 3), 1, 1))
    ]
    for t in tensors:
        t.requires_grad_()
    second = []
    with interpreted():
        for backend in ("triton", "reference"):
            first = gradients_of(operator, tensors, backend, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for a, e in zip(*second, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


def test_batch_of_gradients(operator: Operator) -> None:
    tensors = [t.requires_grad_() for t in operator.arguments(SMALL)]
    with interpreted():
        y = operator(tensors[:-3], *tensors[-3:], padding=1, backend="triton")
        batch = torch.randn(3, *y.shape)
        together = torch.autograd.grad(y, tensors, batch, retain_graph=True, is_grads_batched=True)
        for i, grad in enumerate(batch):
            alone = torch.autograd.grad(y, tensors, grad, retain_graph=True)
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-3)


def test_backward_follows_the_setting_of_the_forward(
    operator: Operator, launched: list[str]
) -> None:
    tensors = operator.arguments(SMALL)
    tensors[0].requires_grad_()
    with tf.use_backend("triton"):
        y = operator(tensors[:-3], *tensors[-3:], padding=1)
    y.sum().backward()
    assert launched == FORWARD + TO_INPUT
    with tf.use_backend("reference"):
        y = operator(tensors[:-3], *tensors[-3:], padding=1)
    with tf.use_backend("triton"):
        y.sum().backward()
    assert launched == FORWARD + TO_INPUT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, operator: Operator, launched: list[str]) -> None:
    tensors = [t.requires_grad_() for t in operator.arguments(SMALL)]
    with torch.autocast("cpu", dtype=dtype):
        y = operator(tensors[:-3], *tensors[-3:], padding=1, backend="triton")
        grads = torch.autograd.grad(y.float().sum(), tensors)
    assert y.dtype == dtype
    assert set(TO_INPUT + TO_WEIGHT) <= set(launched)
    for tensor, grad in zip(tensors, grads, strict=True):
        assert grad.dtype == tensor.dtype


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, False, True]], ids=str)
def test_gradients_are_operators(needs: list[bool], backend: str) -> None:
    """Traced, with the strides that they really have, also when they run on the reference."""
    xs = [LAYOUTS["narrowed"](x) for x in SMALL.segments()]
    weight = SMALL.weight().to(memory_format=torch.channels_last)
    grad = torch.randn(2, 6, 5, 7)
    library = torch.ops.threshnet_fast
    calls = [
        (library._cat_bn_relu_conv_gradients, (*vectors(7), weight, 1, 1)),
        (library._cat_conv_bn_relu_gradients, (weight, vectors(6)[0], grad, 1, 1, "relu")),
    ]
    with interpreted():
        for packet, rest in calls:
            torch.library.opcheck(
                packet.default,
                (grad, xs, *rest, needs, backend),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_nothing_is_added_atomically(architecture: str, operator: Operator) -> None:
    """So that the same call gives the same bits, whatever order programs run in."""
    tensors = [t.requires_grad_() for t in operator.arguments(SMALL, torch.float16)]
    with compiled_for(architecture) as log:
        gradients_of(operator, tensors, "triton")
    assert {entry.name for entry in log} == set(FORWARD + TO_INPUT + SUMS + TO_WEIGHT)
    for entry in log:
        assembly = next(entry.compiled.asm[k] for k in ("ptx", "amdgcn") if k in entry.compiled.asm)
        assert (
            re.findall(r"^\s*(?:@\S+\s+)?((?:atom|red)\b\S*|\w+_atomic_\w+)", assembly, re.M) == []
        )


HUGE = {
    "pixels of xs": ((2**16, 1, 2**8, 2**8), (1, 1, 1, 1), {}),
    "output pixels": ((2**10, 1, 1, 1), (1, 1, 1, 1), {"padding": 2**10}),
    "padded rows": ((1, 1, 1, 1), (1, 1, 1, 1), {"padding": 2**30, "stride": 2**30}),
    "elements of weight": ((1, 2**16, 1, 1), (2**16, 2**16, 1, 1), {"padding": 0}),
}


@pytest.mark.parametrize("what", HUGE)
def test_more_than_32_bits_can_index(what: str, operator: Operator) -> None:
    shape, window, options = HUGE[what]
    xs, weight = [torch.zeros(()).expand(shape)], torch.zeros(()).expand(window)
    length = shape[1] if operator.name == "cat_bn_relu_conv" else window[0]
    vector = torch.zeros(()).expand(length)
    with interpreted(), pytest.raises(ValueError, match=f"takes at most 2147482624 {what}"):
        operator(xs, weight, vector, vector, **{"padding": 0, **options, "backend": "triton"})


def test_offsets_have_64_bits(operator: Operator, tmp_path: Path) -> None:
    """Pixels of the input and of the gradient that lie gigabytes apart, in files full of holes."""
    case = Case((16,), 1, (1, 3), 16, (1, 3), 1, 1)
    tensors = [t.requires_grad_() for t in operator.arguments(case, torch.float16)]
    results = []
    with interpreted():
        for spread in (False, True):
            x = _far_apart(tensors[0], tmp_path / "x") if spread else tensors[0]
            y = operator([x], *tensors[1:], padding=1, backend="triton")
            grad = torch.arange(y.numel(), dtype=y.dtype).view(y.shape) / 64
            grad = _far_apart(grad[:, :, 1:2], tmp_path / "g") if spread else grad[:, :, 1:2]
            results.append([y, *torch.autograd.grad(y[:, :, 1:2], [x, *tensors[1:]], grad)])
    for dense, far in zip(*results, strict=True):
        assert torch.equal(dense, far)


def _far_apart(x: Tensor, path: Path) -> Tensor:
    """Copies a map of one row into a file, 2**30 elements from one pixel to the next."""
    _, channels, _, width = x.shape
    pitch = 2**30
    size = (width - 1) * pitch + channels
    memory = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    view = memory.as_strided(x.shape, (size, 1, size, pitch))
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def test_auto_passes_over_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(()).expand(2**16, 1, 2**8, 2**8)
    weight = torch.zeros(1, 1, 1, 1)
    monkeypatch.setattr(
        registration.select, "choose", lambda *_: registration.select.Choice("triton", "")
    )
    assert registration.choose([x], weight, x.shape, 0, None) == "reference"
    assert registration.choose([x[:1]], weight, x[:1].shape, 0, None) == "triton"


def test_tensors_elsewhere_are_refused(operator: Operator) -> None:
    tensors = [t.to("meta") for t in operator.arguments(SMALL)]
    xs, parameters = tensors[:-3], tensors[-3:]
    with interpreted():
        assert operator(xs, *parameters, backend="triton").is_meta
        objection = triton.ENGINE.objection(tensors[0])
    assert isinstance(objection, ValueError)
    assert "needs tensors on cpu, these are on meta" in str(objection)


def test_tf32_only_where_pytorch_allows_it_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    try:
        found = []
        for of_matmul in ("ieee", "tf32"):
            for of_convolution in ("ieee", "tf32"):
                matmul.fp32_precision = of_matmul
                convolution.fp32_precision = of_convolution
                found.append(triton.float32_precision())
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
    assert found == ["ieee", "ieee", "ieee", "tf32"]


BUGS = {
    "rectifier ignored in the backward": (
        gradients,
        "sums = tl.where(x * scale[None, :] + shift[None, :] <= 0.0, 0.0, sums)",
        "pass",
        "cat_bn_relu_conv",
    ),
    "rectifier behind the convolution ignored": (
        gradients,
        "grad = tl.where(y.to(tl.float32) <= 0.0, 0.0, grad)",
        "pass",
        "cat_conv_bn_relu",
    ),
    "scale ignored in the input's gradient": (
        gradients,
        "sums *= scale[None, :]",
        "pass",
        "cat_bn_relu_conv",
    ),
    "scale ignored behind the convolution": (
        gradients,
        "grad = (grad.to(tl.float32) * factor[None, :]).to(grad.dtype)",
        "pass",
        "cat_conv_bn_relu",
    ),
    "scale ignored in the weight's gradient": (
        gradients,
        "sums *= tl.load(output_scale_ptr + n, mask=n_exists, other=0.0)[None, :]",
        "pass",
        "cat_conv_bn_relu",
    ),
    "mask before the prologue": (
        gradients,
        "x = tl.where(mask, activation, 0.0).to(x.dtype)",
        "x = activation.to(x.dtype)",
        "cat_bn_relu_conv",
    ),
    "halo off by one in the input's gradient": (
        gradients,
        "right = column + pad_columns",
        "right = column + pad_columns - 1",
        "both",
    ),
    "halo off by one in the weight's gradient": (
        gradients,
        "y_in = row * stride - pad_rows + tap_row",
        "y_in = row * stride - pad_rows + tap_row + 1",
        "both",
    ),
    "halo not masked": (
        gradients,
        "inside &= (y_out < out_height) & (x_out < out_width)",
        "inside &= y_out < out_height",
        "both",
    ),
    "taps not mirrored": (
        gradients,
        "bottom - tap_row",
        "bottom - (tap_rows - 1 - tap_row)",
        "both",
    ),
    "remainder of the stride ignored": (
        gradients,
        "inside &= (y_out * stride == y_scaled) & (x_out * stride == x_scaled)",
        "pass",
        "both",
    ),
    "a segment missing in the weight's gradient": (
        gradients,
        "for segment in tl.static_range(1, len(starts)):",
        "for segment in tl.static_range(1, len(starts) - 1):",
        "both",
    ),
    "a part of the pixels missing": (
        gradients,
        "for part in range(parts):",
        "for part in range(parts - 1):",
        "both",
    ),
    "parts of the affine's gradients overlap": (
        gradients,
        "row_tile.to(tl.int64) * 2 * in_channels",
        "row_tile.to(tl.int64) * in_channels",
        "cat_bn_relu_conv",
    ),
    "products of one tap only": (
        gradients,
        "products_ptr + (tap * row_tiles + row_tile) * out_channels + n",
        "products_ptr + row_tile * out_channels + n",
        "cat_conv_bn_relu",
    ),
    "columns summed over the first pixels only": (
        gradients,
        "sums += x.to(tl.float32)",
        "sums = x.to(tl.float32)",
        "cat_conv_bn_relu",
    ),
    "gradients of scale and shift swapped": (
        cat_bn_relu_conv,
        "dshift, dscale = sum_rows(sums).split(width)",
        "dscale, dshift = sum_rows(sums).split(width)",
        "cat_bn_relu_conv",
    ),
    "affine not applied to the sums": (
        cat_conv_bn_relu,
        "output_scale=pack_vector(scale, out)",
        "output_scale=None",
        "cat_conv_bn_relu",
    ),
}
"""What is changed, to what, and which operator has to notice."""

PLANTED = Case((17, 4), 3, (7, 6), 18, (3, 3), 2, 1)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, noticed_by = BUGS[bug]
    names = ["cat_bn_relu_conv", "cat_conv_bn_relu"] if noticed_by == "both" else [noticed_by]
    for name in names:
        with mutated(module, old, new), interpreted():
            _split_everything(monkeypatch)
            with pytest.raises(Exception) as caught:  # noqa: PT011, what is raised is looked at
                Operator(name).check("float32", PLANTED)
        assert isinstance(caught.value, AssertionError) or "bounds" in str(caught.value), caught


def test_nothing_planted(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterpart: without a bug, the same checks pass, also in a copy of the source."""
    old, new = "sums += x.to(tl.float32)", "sums += x.to(tl.float32) + 0"
    with mutated(gradients, old, new), interpreted():
        _split_everything(monkeypatch)
        operator.check("float32", PLANTED)


def _split_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_LEAST_PIXELS_OF_A_PART", 5)
    monkeypatch.setattr(gradients, "_PROGRAMS_PER_MULTIPROCESSOR", 30)
