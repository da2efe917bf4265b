"""Checks an installed threshnet_fast: python smoke.py with|without TREE.

The first argument tells whether it must have its C++ extension; TREE must hold none of what runs.
"""

import importlib.util
import sys
from pathlib import Path

import torch

import threshnet_fast as tf
from threshnet_fast import extension


def refusal(model, x):
    """Returns what the cpu backend says when it is asked for without its extension."""
    try:
        with tf.use_backend("cpu"):
            model(x)
    except RuntimeError as error:
        if extension.unavailable_reason() in str(error):
            return error
        raise
    raise AssertionError("the cpu backend ran without its extension")


def main():
    """Runs the checks."""
    expected, tree = sys.argv[1] == "with", Path(sys.argv[2]).resolve()
    package = Path(tf.__file__).resolve()
    assert tree not in package.parents, f"{package} is in the source tree"
    # Not imported: triton is no dependency of the base installation.
    kernels = importlib.util.find_spec("threshnet_fast.kernels.implicit_gemm")
    assert kernels is not None, "the Triton kernels were not installed"
    reason = extension.unavailable_reason()
    assert extension.load() == (reason is None) == expected, reason

    torch.manual_seed(0)
    model = tf.ThreshNet95(num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        actual = model(x)
        with tf.use_backend("reference"):
            reference = model(x)
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
        if expected:
            with tf.use_backend("cpu"):
                torch.testing.assert_close(model(x), reference, rtol=1e-4, atol=1e-4)
        else:
            print(f"cpu backend refused: {refusal(model, x)}")
    print(f"{package.parent}: extension {extension.library_path()}, network checked")


main()
