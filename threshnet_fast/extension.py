"""Loads the compiled operators, on first use.

The C++ engine is one shared library beside this file, ``threshnet_fast/_C.abi3.so``. It registers
the operators of the namespace ``threshnet_fast_cpu`` through LibTorch's stable ABI and is no Python
module: ``torch.ops.load_library`` loads it, not ``import``. The package works without it (pure
PyTorch), so nothing here raises: callers ask :func:`load` and report :func:`unavailable_reason`.
"""

import os
import threading
from pathlib import Path

NAMESPACE = "threshnet_fast_cpu"
"""Namespace of the operators that the library registers."""

_SUFFIXES = (".abi3.so", ".so", ".pyd", ".dylib")
_OPERATORS = (
    "best_isa",
    "cat_bn_relu_conv",
    "cat_conv_bn_relu",
    "checksum_floats",
    "compile_plan",
    "create_workspace",
    "pack_weights",
    "program_algorithms",
    "program_layout",
    "run_plan",
)

_lock = threading.Lock()
_done = False
_reason: str | None = None


def library_path() -> Path | None:
    """Returns the shared library's path, or None where none was built."""
    folder = Path(__file__).resolve().parent
    candidates = (folder / f"_C{suffix}" for suffix in _SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def load() -> bool:
    """Loads the shared library, once in a process.

    Thread-safe, and free after the first call: a failure is remembered like a success.

    Returns:
        True when the operators of ``torch.ops.threshnet_fast_cpu`` can be called.
    """
    global _done, _reason
    if not _done:
        with _lock:
            if not _done:
                _reason = _load()
                _done = True
    return _reason is None


def unavailable_reason() -> str | None:
    """Returns one line saying why the operators cannot be called, or None when they can."""
    load()
    return _reason


def _load() -> str | None:
    if os.environ.get("THRESHNET_FAST_NO_EXT", "0") not in ("", "0"):
        return "the C++ extension is switched off by THRESHNET_FAST_NO_EXT"
    path = library_path()
    if path is None:
        return (
            "the C++ extension was not built when threshnet_fast was installed (no C++17 compiler "
            "was found, or THRESHNET_FAST_NO_EXT was set): reinstall it, `pip install -v` says more"
        )
    import torch

    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch keeps the system loader's text as the cause; it may take several lines and starts
        # with the path.
        text = " ".join(str(error.__cause__ or error).split()).removeprefix(f"{path}: ")
        return f"the C++ extension {path} does not load beside torch {torch.__version__}: {text}"
    namespace = getattr(torch.ops, NAMESPACE)
    missing = [name for name in _OPERATORS if not hasattr(namespace, name)]
    if missing:
        return (
            f"the C++ extension {path} is not of this version: it has no operator "
            f"{', '.join(missing)}; reinstall threshnet_fast"
        )
    return None
