"""What is known of GPUs: the one table that choices of tiles, reports and predictions read.

Figures are those of the vendors' architecture papers, programming guides and data sheets. Nothing
here imports Triton or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture", "precision_for"]


@dataclass(frozen=True)
class Architecture:
    """A family of GPUs.

    Attributes:
        name: ``"sm_90"``, ``"gfx942"``.
        multiprocessors: Of a typical device, where the device itself is not known.
        shared_bytes: Shared memory that one program may have, or local data share.
        registers: 32-bit registers of a multiprocessor.
        warps: That are at once on a multiprocessor, at most.
        half: Floating-point operations a clock and multiprocessor in float16 and bfloat16. Where
            16-bit products are not computed by tensor cores, as Triton does on sm_75, they are
            those of float32.
        tf32: The same in TF32; 0 where there is none.
        full: The same in float32.
        memory_bytes: Bytes a clock and multiprocessor of the device's memory, rounded: the ratio
            differs little within a family. 0 where it is not known.
        cache_bytes: Bytes of the last cache before that memory, a multiprocessor; rounded likewise.
        num_stages: Of the software pipeline; 2 where copies to shared memory are not asynchronous.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    registers: int
    warps: int
    half: int
    tf32: int
    full: int
    memory_bytes: float
    cache_bytes: int
    num_stages: int = 3

    @property
    def is_nvidia(self) -> bool:
        """Whether it is NVIDIA's rather than AMD's."""
        return self.name.startswith("sm_")

    @property
    def backend(self) -> str:
        """Triton's name for the vendor, ``"cuda"`` or ``"hip"``."""
        return "cuda" if self.is_nvidia else "hip"

    @property
    def warp_size(self) -> int:
        """Threads of a warp: AMD's data-center GPUs have twice as many as all others."""
        return 64 if self.name.startswith("gfx9") else 32

    @property
    def reserved_bytes(self) -> int:
        """Shared memory that the system takes for each program."""
        return 1024 if self.is_nvidia and self.num_stages > 2 else 0


# Columns: multiprocessors, shared memory, registers, warps; operations in half, TF32 and float32;
# bytes a clock of memory, cache; stages.
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_75", 40, 65536, 65536, 32, 128, 0, 128, 0.0, 0, 2),
        Architecture("sm_80", 108, 166912, 65536, 64, 2048, 1024, 128, 10.0, 370_000),
        Architecture("sm_86", 20, 101376, 65536, 48, 512, 256, 256, 6.0, 80_000),
        Architecture("sm_89", 76, 101376, 65536, 48, 512, 256, 256, 3.5, 600_000),
        Architecture("sm_90", 132, 232448, 65536, 64, 4096, 2048, 256, 14.0, 380_000),
        Architecture("sm_100", 148, 232448, 65536, 64, 8192, 4096, 256, 29.0, 850_000),
        Architecture("sm_120", 84, 101376, 65536, 48, 512, 256, 256, 4.4, 600_000),
        Architecture("gfx90a", 104, 65536, 131072, 32, 1024, 0, 256, 9.0, 80_000, 2),
        Architecture("gfx942", 304, 65536, 131072, 32, 2048, 1024, 256, 8.0, 840_000, 2),
        Architecture("gfx1100", 96, 65536, 98304, 32, 512, 0, 256, 4.0, 1_000_000, 2),
    )
}
"""Families that kernels are compiled and checked for; others take the nearest older one."""


def find_architecture(name: str) -> Architecture:
    """Returns an architecture, or the nearest older one of the same family.

    Families are NVIDIA's, AMD's for data centers, ``gfx9..``, and AMD's others.

    Args:
        name: ``"sm_90"``, ``"gfx942"``; those that are not in the table get the entry before them,
            or the first one of the family.
    """
    found = ARCHITECTURES.get(name)
    if found is not None:
        return found
    prefix, base = _family(name)
    family = [each for each in ARCHITECTURES.values() if _family(each.name) == (prefix, base)]

    def number(of: str) -> int:
        return int(of.removeprefix(prefix), base)

    try:
        older = [each for each in family if number(each.name) <= number(name)]
    except ValueError:
        return family[0]
    return max(older, default=family[0], key=lambda each: number(each.name))


def _family(name: str) -> tuple[str, int]:
    """Returns what the names of a family begin with, and the base of the number after it."""
    for prefix, base in (("gfx9", 16), ("gfx", 16)):
        if name.startswith(prefix):
            return prefix, base
    return "sm_", 10


def precision_for(name: str, precision: str) -> str:
    """Returns how float32 is multiplied where ``precision`` is allowed.

    TF32 falls back to IEEE arithmetic where the hardware has no TF32, and Triton compiles none:
    before sm_80, and on all of AMD's but gfx942. Later ones of AMD's no longer have it.
    """
    if precision != "tf32" or name == "interpreter":
        return precision
    has_any = find_architecture(name).tf32 and (name.startswith("sm_") or name in ARCHITECTURES)
    return "tf32" if has_any else "ieee"
