"""The environment variables that change what the package does, each said once.

All are read when they matter, not at import, so that a program may set them.
"""

from __future__ import annotations

import os

__all__ = [
    "AUTOMATIC_WINOGRAD",
    "AUTOTUNE",
    "CPU_ISA",
    "CUDA_GRAPHS",
    "DEBUG",
    "EXACT",
    "NO_EXTENSION",
    "WINOGRAD",
    "switched_on",
    "value",
    "values",
    "winograd_by_default",
]

NO_EXTENSION = "THRESHNET_FAST_NO_EXT"
"""Keeps the C++ extension from being loaded."""

CPU_ISA = "THRESHNET_FAST_CPU_ISA"
"""Caps the CPU's instruction set."""

EXACT = "THRESHNET_FAST_EXACT"
"""Keeps to direct convolution."""

WINOGRAD = "THRESHNET_FAST_WINOGRAD"
"""Overrides the choice of the algorithm of 3x3 convolutions."""

CUDA_GRAPHS = "THRESHNET_FAST_CUDA_GRAPHS"
"""At 0, keeps to launching the kernels one by one."""

AUTOTUNE = "THRESHNET_FAST_AUTOTUNE"
"""Asks for tiles of Triton's kernels by measurement."""

DEBUG = "THRESHNET_FAST_DEBUG"
"""Lets a command's errors pass as exceptions."""

AUTOMATIC_WINOGRAD = -1
"""Winograd's algorithm for those convolutions that it makes faster."""

_PREFIX = "THRESHNET_FAST_"
_WINOGRAD = {"": AUTOMATIC_WINOGRAD, "auto": AUTOMATIC_WINOGRAD, "0": 0, "2": 2, "4": 4}


def value(name: str) -> str:
    """Returns a variable's value, ``""`` where it is not set.

    Args:
        name: One of the names above.
    """
    return os.environ.get(name, "")


def values() -> dict[str, str]:
    """Returns all variables of this package that are set, known or not."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PREFIX)}


def switched_on(name: str, default: bool = False) -> bool:
    """Returns whether a variable is set to anything but ``""`` and ``"0"``.

    Args:
        name: One of the names above.
        default: What holds where it is not set.
    """
    return os.environ.get(name, "1" if default else "0") not in ("", "0")


def winograd_by_default() -> int:
    """Returns which 3x3 convolutions use Winograd's F(m x m, 3x3), as the environment has it.

    Returns:
        -1: those that it makes faster, by what each is expected to take; 0: none, by
        ``THRESHNET_FAST_EXACT=1`` or ``THRESHNET_FAST_WINOGRAD=0``; 2 or 4: all that can, with that
        m, by ``THRESHNET_FAST_WINOGRAD``.

    Raises:
        ValueError: If ``THRESHNET_FAST_WINOGRAD`` is none of these.
    """
    if switched_on(EXACT):
        return 0
    wanted = value(WINOGRAD)
    if wanted not in _WINOGRAD:
        allowed = ", ".join(filter(None, _WINOGRAD))
        raise ValueError(f"{WINOGRAD} is {wanted!r}: expected one of {allowed}")
    return _WINOGRAD[wanted]
