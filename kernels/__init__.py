"""Triton kernels for feature maps that lie in pitched NHWC buffers, one file an operation.

Every file has the kernel itself, with ``@triton.jit``, and a function that launches it on tensors.
The launching functions take what has been checked already: tensors ``[N, C, H, W]`` whose memory is
``[N, H, W, pitch]``, see :mod:`.layout`. Importing this package imports triton.
"""
