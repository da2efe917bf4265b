"""Training: chains of modules whose forward and backward pass run fused."""

from .chain import Chain

__all__ = ["Chain"]
