"""ThreshNet and its relatives, run fused: one plan, several executors."""

# ruff: noqa: E402

from .interruption import expect_interruption

# Before what imports torch, which takes seconds.
expect_interruption()

# isort: split
from . import nn, ops, plan
from .engines.select import use_backend
from .installation import show_config
from .models import (
    CheckpointReport,
    DenseNet,
    DenseNet121,
    DenseNet161,
    DenseNet169,
    DenseNet201,
    DenseNetBC100,
    HarDNet,
    HarDNet39DS,
    HarDNet68,
    HarDNet68DS,
    HarDNet85,
    ThreshNet,
    ThreshNet79,
    ThreshNet95,
    create_model,
    list_models,
    load_checkpoint,
)
from .plan import save_plan
from .runtime.dropin import FusedForward
from .runtime.explain import explain
from .runtime.frozen import optimize
from .runtime.fuse_training import fuse_training
from .version import __version__

__all__ = [
    "CheckpointReport",
    "DenseNet",
    "DenseNet121",
    "DenseNet161",
    "DenseNet169",
    "DenseNet201",
    "DenseNetBC100",
    "HarDNet",
    "HarDNet39DS",
    "HarDNet68",
    "HarDNet68DS",
    "HarDNet85",
    "ThreshNet",
    "ThreshNet79",
    "ThreshNet95",
    "__version__",
    "create_model",
    "explain",
    "fuse_training",
    "list_models",
    "load_checkpoint",
    "nn",
    "ops",
    "optimize",
    "plan",
    "save_plan",
    "show_config",
    "use_backend",
]

nn.dispatch.fill(FusedForward)
