"""What both operators promise on the CUDA C++ kernels, beside what they do on every backend.

tests/test_cat_bn_relu_conv.py and tests/test_cat_conv_bn_relu.py have the rest, in float32: memory
layouts, NaN, gradients, opcheck, torch.compile, torch.export, bad input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from op_cases import CASES, LAYOUTS, SMALL, Case, vectors
from torch import Tensor

import threshnet_fast as tf
from emulation import operators
from emulation.cuda_operators import DEVICES, emulated_cuda, skip_reason
from emulation.operators import check_cat_bn_relu_conv, check_cat_conv_bn_relu
from threshnet_fast.engines import cuda
from threshnet_fast.ops import cat_bn_relu_conv, cat_conv_bn_relu, registration

pytestmark = [
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
    pytest.mark.usefixtures("one_thread"),
]

CHECKS = {
    "cat_bn_relu_conv": check_cat_bn_relu_conv,
    "cat_conv_bn_relu": check_cat_conv_bn_relu,
}
PRECISIONS = ("float16", "bfloat16", "float32")
EVERY_CASE = [*CASES, *operators.SMALL]
EACH_IN_ONE_PRECISION = [(PRECISIONS[i % 3], case) for i, case in enumerate(EVERY_CASE)]
NAMES = pytest.mark.parametrize("name", list(CHECKS))


@pytest.fixture
def on_cuda() -> Iterator[None]:
    with emulated_cuda():
        yield


def call(name: str, xs: list[Tensor], rest: list[Tensor], **options: Any) -> Tensor:
    """Calls an operator with its segments, and weight, scale and shift."""
    weight, scale, shift = rest
    if name == "cat_bn_relu_conv":
        return cat_bn_relu_conv(xs, scale, shift, weight, **options)
    return cat_conv_bn_relu(xs, weight, scale, shift, **options)


def arguments(
    name: str, case: Case, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Segments; weight, scale and shift."""
    length = sum(case.channels) if name == "cat_bn_relu_conv" else case.out
    return case.segments(dtype), [case.weight(dtype), *vectors(length)]


@NAMES
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(("precision", "case"), EACH_IN_ONE_PRECISION, ids=str)
def test_equals_float64(name: str, precision: str, case: Case) -> None:
    CHECKS[name](precision, case, backend="cuda", gradients=False)


@pytest.mark.sweep
@NAMES
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
@pytest.mark.parametrize("architecture", list(DEVICES))
def test_equals_float64_everywhere(name: str, architecture: str, case: Case) -> None:
    with emulated_cuda(architecture):
        for precision in PRECISIONS:
            if architecture != "sm_75" or precision != "bfloat16":
                CHECKS[name](precision, case, backend="cuda", gradients=False)


@NAMES
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
def test_on_older_devices(name: str, architecture: str) -> None:
    """Where tiles and splits are others, and sm_75 has no asynchronous copies."""
    with emulated_cuda(architecture):
        for precision in ("float16", "float32"):
            CHECKS[name](precision, operators.SMALL[1], backend="cuda", gradients=False)


@NAMES
@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_results_do_not_depend_on_the_order_of_threads(name: str, order: str) -> None:
    xs, rest = arguments(name, operators.SMALL[1], torch.float16)
    options = {"padding": 1, "backend": "cuda"}
    with emulated_cuda() as library:
        expected = call(name, xs, rest, **options)
        with library.schedule(order, 3):
            assert call(name, xs, rest, **options).equal(expected)


@NAMES
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_in_half_precision(name: str, layout: str) -> None:
    """Segments are read where they lie or copied; either way they are the same numbers."""
    case = Case((16, 3, 32), 2, (6, 5), 12, (3, 3), 1, 1)
    xs, rest = arguments(name, case, torch.float16)
    xs = [LAYOUTS[layout](x) for x in xs]
    options = {"padding": 1, "backend": "cuda"}
    expected = call(name, [x.clone() for x in xs], rest, **options)
    assert call(name, xs, rest, **options).equal(expected)


@NAMES
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("count", [16, 17, 40])
def test_many_segments(name: str, count: int) -> None:
    """Sixteen are read by one launch; more are concatenated first."""
    case = Case((3, 1) * (count // 2) + (16,) * (count % 2), 2, (4, 3), 5, (3, 3), 1, 1)
    CHECKS[name]("float16", case, backend="cuda", gradients=False)


@NAMES
@pytest.mark.usefixtures("on_cuda")
def test_float32_is_never_tf32(name: str) -> None:
    with operators.settings("tf32"):
        CHECKS[name]("float32", operators.SMALL[1], backend="cuda", gradients=False)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@NAMES
def test_parameters_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Scale and shift may have the dtype of the segments."""
    xs, rest = arguments(name, SMALL, dtype)
    low = [t.to(dtype) for t in rest]
    options = {"padding": 1, "backend": "cuda"}
    expected = call(name, xs, [low[0], *(t.float() for t in low[1:])], **options)
    assert call(name, xs, low, **options).equal(expected)


@NAMES
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck_in_half_precision(name: str, dtype: torch.dtype) -> None:
    xs, rest = arguments(name, SMALL, dtype)
    weight, scale, shift = (t.requires_grad_() for t in rest)
    operator = getattr(torch.ops.threshnet_fast, name).default
    if name == "cat_bn_relu_conv":
        torch.library.opcheck(operator, (xs, scale, shift, weight, 2, 1, "cuda"))
    else:
        torch.library.opcheck(operator, (xs, weight, scale, shift, 2, 1, "none", "cuda"))


@NAMES
@pytest.mark.usefixtures("on_cuda")
def test_autocast(name: str) -> None:
    xs, rest = arguments(name, SMALL)
    leaves = [t.requires_grad_() for t in (*xs, *rest)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(name, xs, rest, padding=1, backend="cuda")
        grads = torch.autograd.grad(y.float().sum(), leaves)
    assert y.dtype == torch.bfloat16
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == leaf.dtype


@NAMES
@pytest.mark.parametrize("with_triton", [False, True])
def test_gradients_come_from_triton_or_else_from_pytorch(name: str, with_triton: bool) -> None:
    if with_triton:
        pytest.importorskip("triton")
        from threshnet_fast.kernels import (  # noqa: F401
            cat_bn_relu_conv,
            cat_conv_bn_relu,
            launch,
        )

        from emulation.interpreter import interpreted

    asked: list[bool] = []
    original = registration.has_gradient_kernels

    def spy(*args: Any) -> bool:
        asked.append(original(*args))
        return asked[-1]

    check = CHECKS[name]
    with emulated_cuda(), mock.patch.object(registration, "has_gradient_kernels", spy):
        if with_triton:
            with interpreted():
                check("float16", operators.SMALL[1], backend="cuda")
        else:
            check("float32", operators.SMALL[1], backend="cuda")
    assert set(asked) == {with_triton}


@NAMES
def test_backward_follows_the_setting_of_the_forward(name: str) -> None:
    xs, rest = arguments(name, SMALL)
    rest[0].requires_grad_()
    with emulated_cuda(), tf.use_backend("cuda"):
        y = call(name, xs, rest, padding=1)
    # The kernels are gone, and the backward asks for them.
    with pytest.raises((RuntimeError, ValueError), match="backend 'cuda'"):
        y.sum().backward()


@NAMES
@pytest.mark.usefixtures("on_cuda")
def test_too_large_for_the_indices(name: str) -> None:
    x = torch.zeros(()).expand(2**16, 1, 2**8, 2**8)
    vector = torch.zeros(1)
    message = "backend 'cuda' takes at most 2147482624 pixels of xs"
    with pytest.raises(ValueError, match=message):
        call(name, [x], [torch.zeros(1, 1, 1, 1), vector, vector], padding=0, backend="cuda")


def test_auto_passes_over_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(()).expand(2**16, 1, 2**8, 2**8)
    weight = torch.zeros(1, 1, 1, 1)
    choice = registration.select.Choice("cuda", "")
    monkeypatch.setattr(registration.select, "choose", lambda *_: choice)
    assert registration.choose([x], weight, x.shape, 0, None) == "reference"
    assert registration.choose([x[:1]], weight, x[:1].shape, 0, None) == "cuda"


@pytest.mark.usefixtures("on_cuda")
def test_tensors_elsewhere_are_refused() -> None:
    x = torch.empty(1, 1, 1, 1, device="meta")
    objection = cuda.ENGINE.objection(x)
    assert isinstance(objection, ValueError)
    assert "needs tensors on cpu, these are on meta" in str(objection)


class TestOwnOperators:
    """Those of ``torch.ops.threshnet_fast_cuda``, which check what they are given themselves."""

    @pytest.fixture
    def good(self, on_cuda) -> dict[str, Any]:
        xs, (weight, scale, shift) = arguments("cat_conv_bn_relu", SMALL, torch.float16)
        return {
            "xs": xs,
            "weight": weight,
            "scale": scale,
            "shift": shift,
            "stride": 1,
            "padding": 1,
            "relu": True,
        }

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("xs", lambda xs: [], "xs is empty"),
            ("xs", lambda xs: [xs[0], xs[1].float()], "xs[1] has another dtype than xs[0]"),
            ("xs", lambda xs: [x.double() for x in xs], "xs[0] has the wrong dtype"),
            ("xs", lambda xs: [xs[0][0], xs[1]], "xs[0] has shape [3, 5, 7]"),
            ("xs", lambda xs: [xs[0], xs[1][:1]], "xs[1] has shape [1, 4, 5, 7]"),
            ("xs", lambda xs: [xs[0][:, :0], xs[1]], "xs[0] is empty"),
            ("xs", lambda xs: [xs[0]] * 17, "xs has 17 segments, expected at most 16"),
            ("weight", Tensor.float, "weight has another dtype than xs"),
            ("weight", lambda w: w[0], "weight has shape [7, 3, 3]"),
            ("weight", lambda w: w[:, 1:], "weight has shape [6, 6, 3, 3]"),
            ("weight", lambda w: w.new_zeros(6, 7, 8, 3), "larger than the padded input"),
            ("scale", lambda s: s[1:], "scale has shape [5], expected [6]"),
            ("scale", Tensor.double, "scale has the wrong dtype"),
            ("shift", lambda s: s[None], "shift has shape [1, 6], expected [6]"),
            ("stride", lambda s: 0, "stride or padding is out of range"),
            ("stride", lambda s: 2**40, "stride or padding is out of range"),
            ("padding", lambda s: -1, "stride or padding is out of range"),
        ],
    )
    def test_bad_input(self, good, name: str, change: Any, message: str) -> None:
        weights = good["weight"]
        changed = {**good, name: change(good[name])}
        if len(changed["xs"]) == 17:
            changed["weight"] = weights.new_zeros(6, 51, 3, 3)
        with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
            torch.ops.threshnet_fast_cuda.cat_conv_bn_relu(**changed)

    def test_good_input(self, good) -> None:
        y = torch.ops.threshnet_fast_cuda.cat_conv_bn_relu(**good)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.isfinite().all()

    def test_bfloat16_on_sm_75(self) -> None:
        x = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
        one = torch.ones(1)
        with emulated_cuda("sm_75"):
            with pytest.raises((RuntimeError, ValueError), match="bfloat16"):
                torch.ops.threshnet_fast_cuda.cat_conv_bn_relu([x], x, one, one, 1, 0, True)
            with pytest.raises(TypeError, match=r"sm_80 or newer for torch\.bfloat16"):
                cat_conv_bn_relu([x], x, one, one, padding=0, backend="cuda")
