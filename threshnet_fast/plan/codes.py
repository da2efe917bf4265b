"""Numbers by which Python and C++ call the same things; ``csrc/codes.h`` has the same ones."""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "ALGORITHMS",
    "CONVOLUTION",
    "DEPTHWISE",
    "FUSED_ACTIVATIONS",
    "ISAS",
    "POINTWISE",
    "POOL",
    "RESIZE",
    "RESIZE_MODES",
]

CONVOLUTION, POOL, DEPTHWISE, POINTWISE, RESIZE = range(5)
"""What a step of a serialized plan is."""

FUSED_ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}
"""Codes of what follows a convolution or a norm: nothing, or the activation of this name."""

ACTIVATIONS = {**FUSED_ACTIVATIONS, "leaky_relu": 3, "silu": 4, "hardswish": 5, "sigmoid": 6}
"""Those and the codes of what a pointwise step can compute besides."""

RESIZE_MODES = {"nearest": 0, "nearest-exact": 1, "bilinear": 2}
"""Codes of how a map is resized."""

ISAS = ("scalar", "avx2", "avx512", "neon", "avx512_bf16")
"""Instruction sets of the CPU engine, by their codes.

0 is everywhere, 1 and 2 each where all before it are, 3 on 64-bit ARM alone; 4 extends 2 by
products of bfloat16.
"""

ALGORITHMS = ("direct", "packed", "winograd F(2x2, 3x3)", "winograd F(4x4, 3x3)")
"""How the CPU engine computes a step, by its codes."""
