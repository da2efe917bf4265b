"""Fused operators over the concatenation of feature maps, one file each.

Each is also registered with PyTorch as ``torch.ops.threshnet_fast.<name>``, for autograd, autocast,
``torch.compile`` and ``torch.export``.
"""

from .cat_bn_relu_conv import cat_bn_relu_conv
from .cat_conv_bn_relu import cat_conv_bn_relu

__all__ = ["cat_bn_relu_conv", "cat_conv_bn_relu"]
