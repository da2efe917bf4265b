"""Checks an installed threshnet_fast: python smoke.py without|cpu|cuda TREE.

The first argument tells what was compiled: nothing, the CPU engine, or the CUDA kernels too. TREE
must hold none of what runs.
"""

import importlib.util
import sys
from pathlib import Path

import torch

import threshnet_fast as tf
from threshnet_fast import extension


def refusal(backend, model, x, reason):
    """Returns what a backend says that must refuse for a reason."""
    try:
        with tf.use_backend(backend):
            model(x)
    except RuntimeError as error:
        if reason in str(error):
            return error
        raise
    raise AssertionError(f"the {backend} backend ran, though {reason}")


def check_cuda(expected):
    """Checks that the CUDA kernels load beside this torch exactly where they were compiled."""
    reason = extension.cuda_unavailable_reason()
    assert extension.load_cuda() == (reason is None) == expected, reason
    paths = extension.cuda_library_path(), extension.cuda_include_path()
    assert [path is not None for path in paths] == [expected, expected], paths
    if not expected:
        return
    x, ones = torch.randn(1, 16, 4, 4), torch.ones(16)
    weight = torch.randn(16, 16, 1, 1)
    try:
        torch.ops.threshnet_fast_cuda.cat_bn_relu_conv([x], ones, ones, weight, 1, 0)
    except NotImplementedError as error:
        if "only available for these backends: [CUDA" in str(error):
            return
        raise
    raise AssertionError("a CUDA kernel took tensors on the CPU")


def main():
    """Runs the checks."""
    compiled, tree = sys.argv[1], Path(sys.argv[2]).resolve()
    expected = compiled != "without"
    package = Path(tf.__file__).resolve()
    assert tree not in package.parents, f"{package} is in the source tree"
    # Not imported: triton is no dependency of the base installation.
    kernels = importlib.util.find_spec("threshnet_fast.kernels.implicit_gemm")
    assert kernels is not None, "the Triton kernels were not installed"
    reason = extension.unavailable_reason()
    assert extension.load() == (reason is None) == expected, reason
    check_cuda(compiled == "cuda")

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
            print(f"cpu backend refused: {refusal('cpu', model, x, reason)}")
        if not torch.cuda.is_available():
            reason = extension.cuda_left_out_reason() or "torch finds no CUDA device"
            print(f"cuda backend refused: {refusal('cuda', model, x, reason)}")
    print(f"{package.parent}: compiled: {compiled}, network checked")


main()
