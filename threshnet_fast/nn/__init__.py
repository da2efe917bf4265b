"""Building blocks of ThreshNet and HarDNet as plain PyTorch modules."""

from .conv import ConvBNReLU
from .dense import DenseLayer
from .harmonic import HarmonicBlock, harmonic_channels, harmonic_links

__all__ = ["ConvBNReLU", "DenseLayer", "HarmonicBlock", "harmonic_channels", "harmonic_links"]
