"""The GPUs that are emulated or compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from threshnet_fast.kernels import architectures
from triton.backends.compiler import GPUTarget

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """What the compiler and the launcher have to know of a GPU.

    Attributes:
        name: ``"sm_90"``, ``"gfx942"``.
        target: The same for Triton.
        shared_bytes: Shared memory that a program may have.
        multiprocessors: Of a typical device.
    """

    name: str
    target: GPUTarget
    shared_bytes: int
    multiprocessors: int

    @property
    def warp_size(self) -> int:
        """Threads of a warp."""
        return self.target.warp_size


def _emulated(family: architectures.Architecture) -> Architecture:
    name = family.name
    identifier = int(name.removeprefix("sm_")) if family.is_nvidia else name
    target = GPUTarget(family.backend, identifier, family.warp_size)
    return Architecture(name, target, family.shared_bytes, family.multiprocessors)


ARCHITECTURES = {name: _emulated(family) for name, family in architectures.ARCHITECTURES.items()}
