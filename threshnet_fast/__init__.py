"""ThreshNet and its relatives, run fused: one plan, several executors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import nn
from .models import ThreshNet, ThreshNet79, ThreshNet95, create_model, list_models
from .optimize import optimize

if TYPE_CHECKING:
    from . import ops, plan
    from .backends.select import use_backend
    from .config import show_config
    from .plan import explain

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
    "show_config",
    "use_backend",
]

__version__ = "0.1.0"

# Module and name in it; None is the module itself. Resolved at first use to keep the import cheap.
_LAZY: dict[str, tuple[str, str | None]] = {
    "explain": (".plan", "explain"),
    "ops": (".ops", None),
    "plan": (".plan", None),
    "show_config": (".config", "show_config"),
    "use_backend": (".backends.select", "use_backend"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    value: Any = importlib.import_module(module_name, __name__)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
