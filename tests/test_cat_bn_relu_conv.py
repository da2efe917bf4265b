"""conv(relu(cat(xs) * scale + shift), weight), on every backend."""

from collections.abc import Iterator

import pytest
import torch
from op_cases import (
    BACKENDS,
    CASES,
    LAYOUT_SHAPES,
    LAYOUTS,
    MIXED_LAYOUTS,
    SMALL,
    Case,
    ConvolutionGradients,
    activated,
    bad_inputs,
    bad_types,
    dense_strides,
    vectors,
)
from tolerance import assert_within, dot_bound
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from threshnet_fast import use_backend
from threshnet_fast.ops import cat_bn_relu_conv

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with activated(request.param, monkeypatch) as name:
        yield name


def operator():
    return torch.ops.threshnet_fast.cat_bn_relu_conv.default


def plain(xs, scale, shift, weight, stride=1, padding=0) -> Tensor:
    x = torch.cat(list(xs), 1)
    x = functional.relu(x * scale[:, None, None] + shift[:, None, None])
    return functional.conv2d(x, weight, stride=stride, padding=padding)


def oracle(xs, scale, shift, weight, stride=1, padding=0) -> tuple[Tensor, Tensor]:
    """Returns the result in float64, and the largest error allowed in the dtype of xs."""
    dtype = xs[0].dtype
    xs, scale, shift, weight = [x.double() for x in xs], scale.double(), shift.double(), weight
    exact = plain(xs, scale, shift, weight.double(), stride, padding)
    magnitude = plain(
        [x.abs().nan_to_num() for x in xs],
        scale.abs(),
        shift.abs(),
        weight.double().abs(),
        stride,
        padding,
    )
    return exact, dot_bound(magnitude, weight[0].numel(), dtype)


def arguments(case: Case, dtype: torch.dtype = torch.float32):
    return case.segments(dtype), *vectors(sum(case.channels), dtype), case.weight(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, backend: str) -> None:
    args = arguments(case)
    y = cat_bn_relu_conv(*args, stride=case.stride, padding=case.padding, backend=backend)
    assert y.dtype == torch.float32
    assert_within(y, *oracle(*args, case.stride, case.padding))


def test_default_is_no_padding(backend: str) -> None:
    args = arguments(SMALL)
    assert_within(cat_bn_relu_conv(*args, backend=backend), *oracle(*args, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_run_on_the_reference(dtype: torch.dtype) -> None:
    xs, scale, shift, weight = arguments(SMALL, dtype)
    y = cat_bn_relu_conv(xs, scale, shift, weight, padding=1)
    assert y.dtype == dtype
    assert_within(y, *oracle(xs, scale, shift, weight, 1, 1))
    scale, shift = vectors(7)
    y = cat_bn_relu_conv(xs, scale, shift, weight, padding=1)
    assert y.dtype == dtype
    assert_within(y, *oracle(xs, scale, shift, weight, 1, 1))


def test_padding_comes_after_the_prologue(backend: str) -> None:
    xs = [torch.zeros(1, 2, 1, 1)]
    scale, shift, weight = torch.ones(2), torch.full((2,), 3.0), torch.ones(1, 2, 3, 3)
    y = cat_bn_relu_conv(xs, scale, shift, weight, padding=1, backend=backend)
    assert y.item() == 6.0


def test_half_precision_rounds_after_the_affine() -> None:
    """In half precision throughout, the product would round to the shift and leave 0."""
    x = torch.full((1, 1, 1, 1), 1 + 2**-10, dtype=torch.float16)
    scale, shift = x.view(1), torch.tensor([-(1 + 2**-9)], dtype=torch.float16)
    assert cat_bn_relu_conv([x], scale, shift, torch.ones_like(x)).item() == 2**-20


@pytest.mark.parametrize("names", MIXED_LAYOUTS, ids="+".join)
@pytest.mark.parametrize("shape", LAYOUT_SHAPES, ids=str)
def test_layouts(names: tuple[str, str], shape: tuple[int, ...], backend: str) -> None:
    xs = [LAYOUTS[name](torch.randn(shape)) for name in names]
    before = [x.clone() for x in xs]
    scale, shift = vectors(2 * shape[1])
    weight = torch.randn(5, 2 * shape[1], 3, 3)
    args = xs, scale, shift, weight
    y = cat_bn_relu_conv(*args, padding=1, backend=backend)
    assert_within(y, *oracle(*args, 1, 1))
    for x, copy in zip(xs, before, strict=True):
        assert torch.equal(x, copy)

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in xs]
        rest = [mode.from_tensor(t) for t in (scale, shift, weight)]
        fake = cat_bn_relu_conv(fakes, *rest, padding=1, backend=backend)
    assert fake.shape == y.shape
    assert fake.dtype == y.dtype
    assert fake.stride() == y.stride()


@pytest.mark.parametrize(
    ("layout", "channels_last"),
    [
        ("contiguous", False),
        ("channels_last", True),
        ("narrowed", False),
        ("narrowed_channels_last", True),
        ("transposed", False),
        ("expanded_pixels", False),
    ],
)
def test_memory_format_follows_the_first_segment(
    layout: str, channels_last: bool, backend: str
) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    for other in ("contiguous", "channels_last"):
        segments = [LAYOUTS[layout](xs[0]), LAYOUTS[other](xs[1])]
        y = cat_bn_relu_conv(segments, scale, shift, weight, backend=backend)
        assert y.stride() == dense_strides(y.shape, channels_last)


def test_one_channel_in_both_formats_gives_contiguous(backend: str) -> None:
    x = torch.randn(2, 1, 5, 7).to(memory_format=torch.channels_last)
    assert x.is_contiguous()
    scale, shift = vectors(1)
    y = cat_bn_relu_conv([x], scale, shift, torch.randn(6, 1, 3, 3), backend=backend)
    assert y.stride() == dense_strides(y.shape, False)


def test_parameters_need_not_be_contiguous(backend: str) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    expected, bound = oracle(xs, scale, shift, weight, 1, 1)
    strided = torch.stack([scale, shift], 1)
    weights = weight.to(memory_format=torch.channels_last), weight.mT.contiguous().mT
    for layout in weights:
        y = cat_bn_relu_conv(xs, strided[:, 0], strided[:, 1], layout, padding=1, backend=backend)
        assert_within(y, expected, bound)
    one = scale[:1].expand(7)
    args = xs, one, one, weight
    assert_within(cat_bn_relu_conv(*args, padding=1, backend=backend), *oracle(*args, 1, 1))


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_stays_nan(kernel: int, backend: str) -> None:
    case = Case((16, 20), 2, (7, 7), 33, (kernel, kernel), 1, kernel // 2)
    xs, scale, shift, weight = arguments(case)
    xs[1][1, 3, 2, 4] = torch.nan
    expected, bound = oracle(xs, scale, shift, weight, 1, case.padding)
    assert expected.isnan().sum() == 33 * kernel * kernel
    y = cat_bn_relu_conv(xs, scale, shift, weight, padding=case.padding, backend=backend)
    assert_within(y, expected, bound)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity(value: float, backend: str) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    xs[0][0, 1, 2, 3] = value
    scale[1] = 1.0
    args = xs, scale, shift, weight
    exact = plain(*[[x.double() for x in xs], *(t.double() for t in args[1:])], 1, 1)
    y = cat_bn_relu_conv(*args, padding=1, backend=backend)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


def test_nan_in_the_shift_reaches_every_pixel(backend: str) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    shift[2] = torch.nan
    assert cat_bn_relu_conv(xs, scale, shift, weight, backend=backend).isnan().all()


@pytest.mark.parametrize("path", ["public", "direct"])
@pytest.mark.parametrize(("change", "error", "message"), bad_inputs("input"))
def test_bad_input(change: dict, error: type[Exception], message: str, path: str) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    good = {"xs": xs, "scale": scale, "shift": shift, "weight": weight}
    call = cat_bn_relu_conv if path == "public" else operator()
    with pytest.raises(error, match=message) as caught:
        call(**{**good, "padding": 1, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), bad_types())
def test_bad_type(change: dict, message: str) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    good = {"xs": xs, "scale": scale, "shift": shift, "weight": weight}
    with pytest.raises(TypeError, match=message):
        cat_bn_relu_conv(**{**good, **change})


def test_checks_come_before_memory() -> None:
    """A tensor of 4 exabytes: reading or concatenating it could not go unnoticed."""
    huge = torch.zeros(()).expand(1 << 20, 1 << 10, 1 << 15, 1 << 15)
    with pytest.raises(ValueError, match="scale has shape"):
        cat_bn_relu_conv([huge], torch.ones(3), torch.ones(3), torch.ones(()).expand(1, 1024, 1, 1))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(kernel: int, stride: int) -> None:
    case = Case((1, 2), 2, (4, 3), 2, (kernel, kernel), stride, kernel // 2)
    xs, *rest = arguments(case, torch.float64)
    inputs = [t.requires_grad_() for t in (*xs, *rest)]

    def function(a: Tensor, b: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        return cat_bn_relu_conv([a, b], scale, shift, weight, stride=stride, padding=case.padding)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded_batch", "narrowed"])
def test_gradients_equal_plain_pytorch(layout: str, backend: str) -> None:
    case = Case((16, 3, 40), 3, (7, 5), 17, (3, 3), 2, 1)
    xs, *rest = arguments(case)
    leaves = [t.requires_grad_() for t in (*xs, *rest)]
    y = cat_bn_relu_conv(
        [LAYOUTS[layout](x) for x in xs], *rest, stride=2, padding=1, backend=backend
    )
    cotangent = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, cotangent)

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(
        plain([LAYOUTS[layout](x) for x in doubles[:3]], *doubles[3:], 2, 1),
        doubles,
        cotangent.double(),
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * e.abs().max().item())


@pytest.mark.parametrize("wanted", [(i,) for i in range(5)] + [(0, 4), (2, 3)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...]) -> None:
    xs, *rest = arguments(SMALL)
    tensors = [*xs, *rest]
    for i in wanted:
        tensors[i].requires_grad_()
    y = cat_bn_relu_conv(tensors[:2], *tensors[2:], padding=1)
    y.square().sum().backward()
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    plain(twins[:2], *twins[2:], 1, 1).square().sum().backward()
    for i, (t, twin) in enumerate(zip(tensors, twins, strict=True)):
        assert (t.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(t.grad, twin.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [(1, [(True, False)]), (2, [(True, False)]), (3, [(True, False)]), (4, [(False, True)])],
)
def test_computes_no_other_gradient(wanted: int, asked: list[tuple[bool, bool]]) -> None:
    xs, *rest = arguments(SMALL)
    tensors = [*xs, *rest]
    tensors[wanted].requires_grad_()
    y = cat_bn_relu_conv(tensors[:2], *tensors[2:])
    with ConvolutionGradients() as convolutions:
        y.sum().backward()
    assert convolutions.asked == asked


def test_gradient_passes_where_the_activation_is_nan() -> None:
    """As the derivative of torch.relu does: a NaN is not hidden from training either."""
    x = torch.tensor([[[[torch.nan, 1.0, -1.0]]]], requires_grad=True)
    one = torch.ones(1)
    cat_bn_relu_conv([x], one, 0 * one, torch.ones(1, 1, 1, 1)).sum().backward()
    assert x.grad.tolist() == [[[[1.0, 1.0, 0.0]]]]


def test_in_place_change_before_backward_is_an_error() -> None:
    xs, scale, shift, weight = arguments(SMALL)
    weight.requires_grad_()
    y = cat_bn_relu_conv(xs, scale, shift, weight)
    xs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, requires_grad: bool, backend: str) -> None:
    xs, *rest = arguments(SMALL)
    xs = [LAYOUTS[layout](x).requires_grad_(requires_grad) for x in xs]
    rest = [t.requires_grad_(requires_grad) for t in rest]
    torch.library.opcheck(operator(), (xs, *rest, 2, 1, backend))


def test_opcheck_with_defaults() -> None:
    xs, *rest = arguments(SMALL)
    torch.library.opcheck(operator(), ([x.requires_grad_() for x in xs], *rest))


def test_compile(backend: str) -> None:
    check_compiled(backend, dynamic=False)


def test_compile_for_any_shape() -> None:
    check_compiled("auto", dynamic=True)


def check_compiled(backend: str, dynamic: bool) -> None:
    def function(xs: list[Tensor], scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        y = cat_bn_relu_conv(xs, scale, shift, weight, padding=1, backend=backend)
        return cat_bn_relu_conv([y, xs[0]], scale[:9], shift[:9], weight[:, :1].repeat(1, 9, 1, 1))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for case in (
        Case((7, 5), 2, (6, 7), 2, (3, 3), 1, 1),
        Case((7, 5), 3, (9, 5), 2, (3, 3), 1, 1),
    ):
        xs, *rest = arguments(case)
        leaves = [t.requires_grad_() for t in (*xs, *rest)]
        eager = function(xs, *rest)
        traced = compiled(xs, *rest)
        assert traced.stride() == eager.stride()
        torch.testing.assert_close(traced, eager)
        for a, b in zip(
            torch.autograd.grad(traced.sum(), leaves),
            torch.autograd.grad(eager.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_compiled_function_follows_use_backend() -> None:
    """The setting is read when the function runs, so one compilation serves all of them."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: cat_bn_relu_conv(*args), backend="aot_eager", fullgraph=True
    )
    args = arguments(SMALL, torch.float64)
    with use_backend("reference"):
        compiled(*args)
    with use_backend("cpu"), pytest.raises(TypeError, match=r"needs torch\.float32 tensors"):
        compiled(*args)
    torch.testing.assert_close(compiled(*args), plain(*args))


def test_export_keeps_the_operator(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
            return cat_bn_relu_conv([x], scale, shift, weight, backend=backend)

    args = (torch.randn(2, 7, 5, 5), *vectors(7), torch.randn(6, 7, 3, 3))
    program = torch.export.export(Layer(), args)
    assert operator() in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(*args), Layer()(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    xs, scale, shift, weight = arguments(SMALL)
    xs[1] = xs[1].to(dtype)
    leaves = [t.requires_grad_() for t in (*xs, scale, shift, weight)]
    with torch.autocast("cpu", dtype=dtype):
        y = cat_bn_relu_conv(xs, scale, shift, weight, padding=1)
        grads = torch.autograd.grad(y.float().sum(), leaves)
    lowered = [x.to(dtype) for x in xs]
    expected = cat_bn_relu_conv(lowered, scale, shift, weight.to(dtype), padding=1)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    for leaf, a, b in zip(
        leaves, grads, torch.autograd.grad(expected.float().sum(), leaves), strict=True
    ):
        assert a.dtype == leaf.dtype
        assert torch.equal(a, b)


def test_autocast_leaves_float64_alone() -> None:
    args = arguments(SMALL, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cat_bn_relu_conv(*args)
    assert y.dtype == torch.float64


def test_meta_tensors_have_a_shape() -> None:
    xs, *rest = arguments(SMALL)
    y = cat_bn_relu_conv([x.to("meta") for x in xs], *(t.to("meta") for t in rest), stride=2)
    assert y.is_meta
    assert y.shape == (2, 6, 2, 3)


def test_inference_mode(backend: str) -> None:
    args = arguments(SMALL)
    with torch.inference_mode():
        y = cat_bn_relu_conv(*args, backend=backend)
    assert_within(y.clone(), *oracle(*args))
