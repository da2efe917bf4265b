"""Building blocks of ThreshNet, HarDNet and DenseNet as plain PyTorch modules."""

from . import dispatch
from .conv import ConvBNReLU
from .dense import DenseBlock, DenseLayer, PlainDenseLayer
from .depthwise import DepthwiseConvBN, PointwiseDepthwise
from .harmonic import HarmonicBlock, harmonic_channels, harmonic_links
from .transition import DenseTransition

__all__ = [
    "ConvBNReLU",
    "DenseBlock",
    "DenseLayer",
    "DenseTransition",
    "DepthwiseConvBN",
    "HarmonicBlock",
    "PlainDenseLayer",
    "PointwiseDepthwise",
    "dispatch",
    "harmonic_channels",
    "harmonic_links",
]
