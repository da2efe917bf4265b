"""How far from a float64 reference a result may be, from the arithmetic rather than by taste.

A dot product of length K, summed in any order in a precision with unit roundoff u, is off by at
most about ``K * u * sum(|a| * |b|)``; rounding errors being of both signs, the error that occurs
grows like ``sqrt(K)``. The bound here is

    error <= FACTOR * sqrt(K) * u * sum(|a| * |b|)

for each element, where the sum is over the same K products. Where a factor is itself computed, as
``a = relu(x * scale + shift)``, its rounding error is relative to ``|x * scale| + |shift|``, so
that is what takes the place of ``|a|``: the bound then holds under cancellation too. The factor
leaves room for the few roundings around the sum (the affine, a folded weight, the store), and no
room for a lower precision, a missing term or a wrong weight.
"""

import math

import torch
from torch import Tensor

FACTOR = 4.0


def dot_bound(magnitude: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Returns the largest error allowed in each element of a result.

    Args:
        magnitude: Sum of the absolute products, in float64.
        length: Number of products in each sum.
        dtype: The precision computed in.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    return FACTOR * math.sqrt(length) * unit_roundoff * magnitude


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Asserts that every element of ``actual`` is within ``bound`` of ``expected``.

    NaN and infinity must be in the same places in both.
    """
    assert actual.shape == expected.shape
    actual = actual.detach().to(torch.float64)
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True)
    error = (actual - expected)[finite].abs()
    ratio = error / bound[finite].clamp_min(torch.finfo(torch.float64).tiny)
    # Not `ratio.max() <= 1`: a NaN where a number is expected must fail.
    assert (ratio <= 1).all(), f"error is {ratio.max().item():.3g} times the bound"


def accumulated_bound(
    exact: Tensor, energy: Tensor, magnitude: Tensor, length: int, *, store: float, factor: float
) -> Tensor:
    """Returns the largest error of sums kept in float32 of products of rounded factors.

    Three errors add up: the store rounds the result, relative to it; rounded factors (a normalised
    input in half precision, both factors in TF32) err independently of each other, so that their
    errors add as squares do; and the float32 sum errs as in :func:`dot_bound`.

    Args:
        exact: The result, in float64.
        energy: Sum of the squared products, in float64.
        magnitude: Sum of the absolute products, in float64.
        length: Number of products in each sum.
        store: Unit roundoff of the result's dtype.
        factor: Unit roundoff of the factors; 0 where they are exact.
    """
    return (
        2 * store * exact.abs()
        + FACTOR * factor * energy.sqrt()
        + dot_bound(magnitude, length, torch.float32)
    )
