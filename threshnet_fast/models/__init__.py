"""Networks, and the registry that builds them by name."""

from .registry import create_model, list_models, register_model
from .threshnet import ThreshNet, ThreshNet79, ThreshNet95
from .validate import check_input

__all__ = [
    "ThreshNet",
    "ThreshNet79",
    "ThreshNet95",
    "check_input",
    "create_model",
    "list_models",
    "register_model",
]
