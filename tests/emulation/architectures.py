"""The GPUs that are emulated or compiled for."""

from __future__ import annotations

from dataclasses import dataclass

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


def _nvidia(capability: int, shared_bytes: int, multiprocessors: int) -> Architecture:
    target = GPUTarget("cuda", capability, 32)
    return Architecture(f"sm_{capability}", target, shared_bytes, multiprocessors)


def _amd(name: str, warp_size: int, multiprocessors: int) -> Architecture:
    return Architecture(name, GPUTarget("hip", name, warp_size), 65536, multiprocessors)


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _nvidia(75, 65536, 40),
        _nvidia(80, 166912, 108),
        _nvidia(86, 101376, 20),
        _nvidia(89, 101376, 76),
        _nvidia(90, 232448, 132),
        _nvidia(100, 232448, 148),
        _nvidia(120, 101376, 84),
        _amd("gfx90a", 64, 104),
        _amd("gfx942", 64, 304),
        _amd("gfx1100", 32, 96),
    )
}
