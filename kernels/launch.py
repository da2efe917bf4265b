"""A kernel with everything that its launch needs, prepared once and run many times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Launch", "run"]


@dataclass(frozen=True)
class Launch:
    """One launch on the current device and stream.

    Attributes:
        kernel: A function decorated with ``@triton.jit``.
        grid: Programs along each axis.
        arguments: All arguments by name; the tensors among them are kept alive.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def __call__(self) -> None:
        """Enqueues the kernel; compiles it at its first use for these types of arguments."""
        self.kernel[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
        )


def run(launches: list[Launch]) -> None:
    """Enqueues launches in order."""
    for launch in launches:
        launch()
