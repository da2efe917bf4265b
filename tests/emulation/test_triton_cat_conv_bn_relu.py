"""act(conv(cat(xs), weight) * scale + shift) and its gradients on Triton, without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from op_cases import Case

from emulation.driver import emulated
from emulation.interpreter import interpreted
from emulation.operators import (
    EMULATED,
    INTERPRETED,
    INTERPRETED_SWEEP,
    SWEEP,
    check_cat_conv_bn_relu,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("architecture", "precision", "case"), EMULATED, ids=str)
def test_emulated(architecture: str, precision: str, case: Case) -> None:
    with emulated(architecture):
        check_cat_conv_bn_relu(precision, case)


@pytest.mark.parametrize(("precision", "case"), INTERPRETED, ids=str)
def test_interpreted(precision: str, case: Case) -> None:
    with interpreted():
        check_cat_conv_bn_relu(precision, case)


@pytest.mark.sweep
@pytest.mark.parametrize(("architecture", "precision", "case"), SWEEP, ids=str)
def test_emulated_everywhere(architecture: str, precision: str, case: Case) -> None:
    with emulated(architecture):
        check_cat_conv_bn_relu(precision, case)


@pytest.mark.sweep
@pytest.mark.parametrize(("precision", "case"), INTERPRETED_SWEEP, ids=str)
def test_interpreted_in_every_dtype(precision: str, case: Case) -> None:
    with interpreted():
        check_cat_conv_bn_relu(precision, case)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "case"), INTERPRETED_SWEEP, ids=str)
def test_on_a_device(precision: str, case: Case) -> None:
    check_cat_conv_bn_relu(precision, case, device="cuda")
