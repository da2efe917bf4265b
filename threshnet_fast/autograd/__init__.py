"""Training: chains of modules whose forward and backward pass run fused."""

from .chain import Chain
from .training import FusedTraining

__all__ = ["Chain", "FusedTraining"]
