"""What predictions know of GPUs: published figures of products, and what is assumed of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..kernels.architectures import ARCHITECTURES

__all__ = ["DEVICES", "PRECISIONS", "Device", "find_device", "find_precision"]

PRECISIONS = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element in each precision. ``float32`` multiplies as IEEE 754 says, ``tf32`` keeps
float32 in memory and rounds what it multiplies; all of them add in float32."""

_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU.

    Arithmetic and memory bandwidth are peak figures of the vendor, without sparsity. The cache's
    bandwidth and the three times are assumptions, the same for all devices of a vendor.

    Attributes:
        name: How it is asked for.
        title: Product that the figures are those of.
        architecture: What kernels are compiled for.
        memory_bandwidth: Bytes a second from and to device memory.
        cache_bytes: Bytes of the last level of cache that all multiprocessors share.
        cache_bandwidth: Bytes a second that this cache sustains.
        multiprocessors: Streaming multiprocessors, or compute units.
        float32_flops: Operations a second in IEEE float32, two a multiply-add.
        tf32_flops: The same in TF32.
        float16_flops: The same in float16 on matrix units that add in float32.
        bfloat16_flops: The same in bfloat16.
        kernel_seconds: From the end of one kernel to the end of the next, in a stream or a graph,
            if that one had nothing to do.
        dispatch_seconds: Of the host, to enqueue one operation from eager PyTorch.
        graph_seconds: Of the host, to launch a graph.
    """

    name: str
    title: str
    architecture: str
    memory_bandwidth: float
    cache_bytes: int
    cache_bandwidth: float
    multiprocessors: int
    float32_flops: float
    tf32_flops: float
    float16_flops: float
    bfloat16_flops: float
    kernel_seconds: float = 1.5e-6
    dispatch_seconds: float = 5e-6
    graph_seconds: float = 6e-6

    def peak_flops(self, precision: str) -> float:
        """Returns operations a second in one of :data:`PRECISIONS`."""
        peaks = {
            "float32": self.float32_flops,
            "tf32": self.tf32_flops,
            "float16": self.float16_flops,
            "bfloat16": self.bfloat16_flops,
        }
        return peaks[find_precision(precision)]


DEVICES = (
    Device(
        name="rtx3050",
        title="NVIDIA GeForce RTX 3050 8 GB",
        architecture="sm_86",
        memory_bandwidth=224e9,
        cache_bytes=2 * 2**20,
        cache_bandwidth=1.1e12,
        multiprocessors=ARCHITECTURES["sm_86"].multiprocessors,
        float32_flops=9.1e12,
        tf32_flops=9.1e12,
        float16_flops=18.2e12,
        bfloat16_flops=18.2e12,
    ),
    Device(
        name="a100",
        title="NVIDIA A100 SXM4 80 GB",
        architecture="sm_80",
        memory_bandwidth=2039e9,
        cache_bytes=40 * 2**20,
        cache_bandwidth=4.9e12,
        multiprocessors=ARCHITECTURES["sm_80"].multiprocessors,
        float32_flops=19.5e12,
        tf32_flops=156e12,
        float16_flops=312e12,
        bfloat16_flops=312e12,
    ),
    Device(
        name="h100",
        title="NVIDIA H100 SXM5 80 GB",
        architecture="sm_90",
        memory_bandwidth=3350e9,
        cache_bytes=50 * 2**20,
        cache_bandwidth=7.7e12,
        multiprocessors=ARCHITECTURES["sm_90"].multiprocessors,
        float32_flops=66.9e12,
        tf32_flops=494.7e12,
        float16_flops=989.4e12,
        bfloat16_flops=989.4e12,
    ),
    Device(
        name="b200",
        title="NVIDIA B200 (HGX)",
        architecture="sm_100",
        memory_bandwidth=8000e9,
        cache_bytes=126 * 2**20,
        cache_bandwidth=8.8e12,
        multiprocessors=ARCHITECTURES["sm_100"].multiprocessors,
        float32_flops=80e12,
        tf32_flops=1100e12,
        float16_flops=2250e12,
        bfloat16_flops=2250e12,
    ),
    Device(
        name="mi300x",
        title="AMD Instinct MI300X",
        architecture="gfx942",
        memory_bandwidth=5300e9,
        cache_bytes=256 * 2**20,
        cache_bandwidth=12e12,
        multiprocessors=ARCHITECTURES["gfx942"].multiprocessors,
        float32_flops=163.4e12,
        tf32_flops=653.7e12,
        float16_flops=1307.4e12,
        bfloat16_flops=1307.4e12,
        kernel_seconds=3e-6,
    ),
)
"""The devices that :func:`~.prediction.predict` knows by name.

Published figures, dense, are from:

- RTX 3050: "NVIDIA Ampere GA102 GPU Architecture" (operations a clock and multiprocessor: 256 in
  float32, 256 in TF32, 512 in float16 and bfloat16 with sums in float32, which GeForce runs at half
  the rate of sums in float16) at the 20 multiprocessors, 1.777 GHz and 224 GB/s of the product
  page; 512 KB of L2 for each of four memory controllers.
- A100: "NVIDIA A100 Tensor Core GPU" data sheet, "NVIDIA A100 Tensor Core GPU Architecture".
- H100: "NVIDIA H100 Tensor Core GPU" data sheet, "NVIDIA H100 Tensor Core GPU Architecture".
- B200: "NVIDIA Blackwell Architecture Technical Brief", HGX B200. The number of multiprocessors and
  the size of the L2 are not in it; they are those that the driver reports.
- MI300X: "AMD Instinct MI300X Accelerator" data sheet, "AMD CDNA 3 Architecture".

Assumptions: the L2 of the NVIDIA devices sustains 32 bytes a clock and multiprocessor (the
published peak of the A100, 5120 bytes a clock in all, is 47). Each of the eight dies of the MI300X
has an L2 of its own, 4 MB, so what all share is the Infinity Cache: 256 MB, at 70% of its published
peak of 17.2 TB/s. A kernel of an NVIDIA device takes 1.5 microseconds on top of its work, one of
the MI300X 3; eager PyTorch enqueues an operation in 5, and a graph starts within 6.
"""


def find_device(name: str) -> Device:
    """Returns one of :data:`DEVICES` by its name, in upper or lower case.

    Raises:
        ValueError: There is no such device; the message lists them and suggests the nearest.
    """
    return _find(name, {device.name: device for device in DEVICES}, "device")


def find_precision(name: str | torch.dtype) -> str:
    """Returns one of :data:`PRECISIONS`.

    Args:
        name: Its name in upper or lower case, ``"fp32"``, ``"fp16"``, ``"bf16"``, or a dtype.

    Raises:
        ValueError: There is no such precision; the message lists them and suggests the nearest.
    """
    precisions = {precision: precision for precision in PRECISIONS}
    return _find(str(name).removeprefix("torch."), {**precisions, **_ALIASES}, "dtype")


def _find(name: str, known: Mapping[str, _Found], argument: str) -> _Found:
    found = known.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument} is {name!r}: expected one of {', '.join(known)}{hint}")
    return found
