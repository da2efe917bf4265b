"""The precisions that ``bench`` measures in, and how far off a result may be in each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["PRECISIONS", "Precision"]


@dataclass(frozen=True)
class Precision:
    """What weights and inputs are stored in, and how they are multiplied.

    Attributes:
        dtype: Of weights, input and output.
        tf32: Whether float32 is multiplied in TF32 on a GPU.
        error_limit: Largest error that passes, as a part of the largest output without the
            classifier's bias: the difference from float64 on the same, already rounded, weights and
            input.
    """

    dtype: torch.dtype
    tf32: bool
    error_limit: float

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Sets PyTorch's switches for a GPU, for matrices and convolutions alike.

        Libraries choose their algorithms by trying them (``cudnn.benchmark``), as is best for
        inputs of one size. The older names of the switches serve, as PyTorch refuses to read one
        under both, and its own compiler reads the older one.
        """
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
        try:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = self.tf32, self.tf32, True
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


# In plain PyTorch with the factors of all products rounded, both networks at 32x32 and 224x224 on
# photographs and on random numbers are off by up to 1.1e-3 in TF32, 1.5e-3 in float16 and 1.1e-2 in
# bfloat16; with all features rounded too, as on a CPU, by up to 1.6e-2 in bfloat16. The limits
# leave two to three times as much.
PRECISIONS = {
    "float32": Precision(torch.float32, tf32=False, error_limit=1e-4),
    "tf32": Precision(torch.float32, tf32=True, error_limit=5e-3),
    "float16": Precision(torch.float16, tf32=False, error_limit=5e-3),
    "bfloat16": Precision(torch.bfloat16, tf32=False, error_limit=4e-2),
}
"""Precisions by the name that ``--dtype`` takes; a CPU has float32 and bfloat16."""
