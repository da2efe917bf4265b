"""Both operators on a GPU: what to run, and results and gradients in float64 to compare with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from op_cases import CASES, LAYOUTS, Case, vectors
from tolerance import accumulated_bound, assert_within
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from threshnet_fast.ops import cat_bn_relu_conv, cat_conv_bn_relu

ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120")


@dataclass(frozen=True)
class Precision:
    """How an operator multiplies.

    Attributes:
        dtype: Of the feature maps.
        factors: Unit roundoff of what a product is given, where that is rounded to the dtype.
        products: Unit roundoff with which the product reads any float32 at all.
    """

    dtype: torch.dtype
    factors: float
    products: float


PRECISIONS = {
    "float32": Precision(torch.float32, 0.0, 0.0),
    # Tensor cores truncate what they are given as TF32.
    "tf32": Precision(torch.float32, 2.0**-10, 2.0**-10),
    "float16": Precision(torch.float16, 2.0**-11, 0.0),
    "bfloat16": Precision(torch.bfloat16, 2.0**-8, 0.0),
}

# Ragged segments, odd maps, every stride, padding and kernel; small, since they are emulated.
SMALL = [
    Case((3, 20), 1, (7, 7), 12, (3, 3), 1, 1),
    Case((16, 1, 40, 3, 68), 1, (5, 3), 40, (3, 3), 1, 1),
    Case((480,), 2, (3, 3), 20, (1, 1), 1, 0),
    Case((40, 24), 2, (7, 5), 20, (3, 3), 2, 1),
    Case((24,), 1, (13, 17), 36, (1, 1), 2, 0),
    Case((33, 16), 3, (1, 1), 40, (5, 5), 2, 2),
    Case((17,), 1, (7, 7), 16, (5, 5), 3, 1),
    Case((4, 5), 1, (13, 17), 3, (3, 1), 1, 0),
]

EMULATED = [
    ("sm_80", "float32", SMALL[0]),
    ("sm_80", "tf32", SMALL[1]),
    ("sm_80", "float16", SMALL[2]),
    ("sm_80", "bfloat16", SMALL[3]),
    ("sm_90", "float32", SMALL[4]),
    ("sm_90", "tf32", SMALL[5]),
    ("sm_90", "float16", SMALL[6]),
    ("sm_90", "bfloat16", SMALL[1]),
]
"""One case for each dtype on two architectures."""

SWEEP = [
    (architecture, precision, case)
    for architecture in ARCHITECTURES
    for precision in PRECISIONS
    for case in SMALL
]

INTERPRETED = [
    (list(PRECISIONS)[i % 4], case) for i, case in enumerate(CASES) if case.kernel != (7, 7)
]
"""Cases of the operators, in one dtype after the other."""

INTERPRETED_SWEEP = [(precision, case) for case in [*CASES, *SMALL] for precision in PRECISIONS]


@dataclass(frozen=True)
class Expected:
    """A result in float64, and what its largest error follows from; see ``accumulated_bound``."""

    exact: Tensor
    energy: Tensor
    magnitude: Tensor
    length: float
    factor: float

    def check(self, actual: Tensor) -> None:
        bound = accumulated_bound(
            self.exact,
            self.energy,
            self.magnitude,
            self.length,
            store=torch.finfo(actual.dtype).eps / 2,
            factor=self.factor,
        )
        assert_within(actual, self.exact, bound)


@contextlib.contextmanager
def settings(precision: str) -> Iterator[None]:
    """Allows TF32 if that is asked for, and fills memory with NaN before it is written to."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        matmul.fp32_precision = before
        torch.use_deterministic_algorithms(False)


def check_cat_bn_relu_conv(
    precision: str,
    case: Case,
    device: str = "cpu",
    *,
    backend: str = "triton",
    gradients: bool = True,
) -> None:
    """Compares the result with float64, and every gradient or none."""
    kind = PRECISIONS[precision]
    xs, weight = _maps(case, kind.dtype, device)
    scale, shift = (t.to(device).requires_grad_() for t in vectors(sum(case.channels)))
    with settings(precision):
        y = cat_bn_relu_conv(
            _laid_out(xs),
            scale,
            shift,
            weight,
            stride=case.stride,
            padding=case.padding,
            backend=backend,
        )
        assert y.dtype == kind.dtype
        grad = torch.randn(y.shape).to(y)
        leaves = [*xs, scale, shift, weight]
        grads = torch.autograd.grad(y, leaves, grad) if gradients else ()

    x, s, t, w, g = (_double(each) for each in (torch.cat(xs, 1), scale, shift, weight, grad))
    s, t = s[:, None, None], t[:, None, None]
    step = case.stride, case.padding
    affine, size = x * s + t, x.abs() * s.abs() + t.abs()
    activation, mask = functional.relu(affine), affine > 0
    length = w[0].numel()
    Expected(
        functional.conv2d(activation, w, None, *step),
        functional.conv2d(size.square(), w.square(), None, *step),
        functional.conv2d(size, w.abs(), None, *step),
        length,
        kind.factors,
    ).check(y)

    if not gradients:
        return
    *grads_x, grad_scale, grad_shift, grad_weight = grads
    through = w[:, 0].numel()
    exact, energy, magnitude = (
        conv2d_input(x.shape, a, b, *step) * mask
        for a, b in ((w, g), (w.square(), g.square()), (w.abs(), g.abs()))
    )
    Expected(exact * s, energy * s.square(), magnitude * s.abs(), through, kind.products).check(
        torch.cat(grads_x, 1)
    )
    over_pixels = _nested(through, x[:, 0].numel())
    for actual, by in ((grad_scale, x), (grad_shift, torch.ones_like(x))):
        Expected(
            (exact * by).sum((0, 2, 3)),
            (energy * by.square()).sum((0, 2, 3)),
            (magnitude * by.abs()).sum((0, 2, 3)),
            over_pixels,
            kind.products,
        ).check(actual)
    Expected(
        conv2d_weight(activation, w.shape, g, *step),
        conv2d_weight(size.square(), w.shape, g.square(), *step),
        conv2d_weight(size, w.shape, g.abs(), *step),
        g[:, 0].numel(),
        kind.factors,
    ).check(grad_weight)


def check_cat_conv_bn_relu(
    precision: str,
    case: Case,
    act: str = "relu",
    device: str = "cpu",
    *,
    backend: str = "triton",
    gradients: bool = True,
) -> None:
    """Compares the result with float64, and every gradient or none."""
    kind = PRECISIONS[precision]
    xs, weight = _maps(case, kind.dtype, device)
    scale, shift = (t.to(device).requires_grad_() for t in vectors(case.out))
    with settings(precision):
        y = cat_conv_bn_relu(
            _laid_out(xs),
            weight,
            scale,
            shift,
            stride=case.stride,
            padding=case.padding,
            act=act,
            backend=backend,
        )
        assert y.dtype == kind.dtype
        grad = torch.randn(y.shape).to(y)
        leaves = [*xs, weight, scale, shift]
        grads = torch.autograd.grad(y, leaves, grad) if gradients else ()

    x, s, t, w, g = (_double(each) for each in (torch.cat(xs, 1), scale, shift, weight, grad))
    column = s[:, None, None]
    step = case.stride, case.padding
    length = w[0].numel()
    exact = functional.conv2d(x, w, None, *step) * column + t[:, None, None]
    Expected(
        functional.relu(exact) if act == "relu" else exact,
        functional.conv2d(x.square(), w.square(), None, *step) * column.square(),
        functional.conv2d(x.abs(), w.abs(), None, *step) * column.abs() + t.abs()[:, None, None],
        length,
        kind.products,
    ).check(y)

    if not gradients:
        return
    *grads_x, grad_weight, grad_scale, grad_shift = grads
    if act == "relu":
        # The mask is that of the result as it was rounded.
        g = g * (y > 0)
    scaled = g * column
    Expected(
        conv2d_input(x.shape, w, scaled, *step),
        conv2d_input(x.shape, w.square(), scaled.square(), *step),
        conv2d_input(x.shape, w.abs(), scaled.abs(), *step),
        w[:, 0].numel(),
        kind.factors,
    ).check(torch.cat(grads_x, 1))
    pixels = g[:, 0].numel()
    raw, energy, magnitude = (
        conv2d_weight(a, w.shape, b, *step)
        for a, b in ((x, g), (x.square(), g.square()), (x.abs(), g.abs()))
    )
    row = s[:, None, None, None]
    Expected(raw * row, energy * row.square(), magnitude * row.abs(), pixels, kind.products).check(
        grad_weight
    )
    Expected(
        (raw * w).sum((1, 2, 3)),
        (energy * w.square()).sum((1, 2, 3)),
        (magnitude * w.abs()).sum((1, 2, 3)),
        _nested(pixels, length),
        kind.products,
    ).check(grad_scale)
    Expected(
        g.sum((0, 2, 3)), g.square().sum((0, 2, 3)), g.abs().sum((0, 2, 3)), pixels, 0.0
    ).check(grad_shift)


def _maps(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    xs = [x.to(device).requires_grad_() for x in case.segments(dtype)]
    weight = (case.weight() / math.sqrt(case.length)).to(device, dtype)
    return xs, weight.requires_grad_()


def _laid_out(xs: list[Tensor]) -> list[Tensor]:
    """Segments in different layouts."""
    names = ("channels_last", "narrowed_channels_last", "contiguous")
    return [LAYOUTS[names[i % 3]](x) if x.device.type == "cpu" else x for i, x in enumerate(xs)]


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _nested(inner: int, outer: int) -> float:
    """Length of one sum as inexact as a sum of this many sums, each rounded to float32."""
    return (math.sqrt(inner) + math.sqrt(outer)) ** 2
