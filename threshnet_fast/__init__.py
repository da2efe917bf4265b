"""ThreshNet and its relatives, run fused: one plan, several executors."""

from . import nn, ops, plan
from .backends.select import use_backend
from .config import show_config
from .models import ThreshNet, ThreshNet79, ThreshNet95, create_model, list_models
from .optimize import optimize
from .plan import explain, save_plan

__all__ = [
    "ThreshNet",
    "ThreshNet79",
    "ThreshNet95",
    "__version__",
    "create_model",
    "explain",
    "list_models",
    "nn",
    "ops",
    "optimize",
    "plan",
    "save_plan",
    "show_config",
    "use_backend",
]

__version__ = "0.1.0"
