"""Networks, and the registry that builds them by name."""

from .checkpoints import CheckpointReport, load_checkpoint
from .create import create_model
from .densenet import (
    DenseNet,
    DenseNet121,
    DenseNet161,
    DenseNet169,
    DenseNet201,
    DenseNetBC100,
)
from .features import FeatureExtractor, FeatureInfo
from .hardnet import HarDNet, HarDNet39DS, HarDNet68, HarDNet68DS, HarDNet85
from .network import Network
from .registry import list_models, register_model
from .threshnet import ThreshNet, ThreshNet79, ThreshNet95
from .validate import check_input

__all__ = [
    "CheckpointReport",
    "DenseNet",
    "DenseNet121",
    "DenseNet161",
    "DenseNet169",
    "DenseNet201",
    "DenseNetBC100",
    "FeatureExtractor",
    "FeatureInfo",
    "HarDNet",
    "HarDNet39DS",
    "HarDNet68",
    "HarDNet68DS",
    "HarDNet85",
    "Network",
    "ThreshNet",
    "ThreshNet79",
    "ThreshNet95",
    "check_input",
    "create_model",
    "list_models",
    "load_checkpoint",
    "register_model",
]
