"""Loads the compiled operators, on first use.

The C++ engine is one shared library beside this file, ``threshnet_fast/_C.abi3.so``. It registers
the operators of the namespace ``threshnet_fast_cpu`` through LibTorch's stable ABI and is no Python
module: ``torch.ops.load_library`` loads it, not ``import``. It also says which operators
``threshnet_fast_cuda`` has. A second library, ``threshnet_fast/_C_cuda.abi3.so``, computes them
with the kernels of a third, ``threshnet_fast/lib/libthreshnet_fast_cuda.so``, which knows nothing
of torch and serves programs in C and C++ too; they are loaded only where there is a CUDA device.

The package works without any of them (pure PyTorch), so nothing here raises: callers ask
:func:`load` and report :func:`unavailable_reason`, or :func:`load_cuda` and
:func:`cuda_unavailable_reason`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

NAMESPACE = "threshnet_fast_cpu"
"""Namespace of the operators of the C++ engine."""

CUDA_NAMESPACE = "threshnet_fast_cuda"
"""Namespace of the operators that the CUDA kernels compute."""

_SUFFIXES = (".abi3.so", ".so", ".pyd", ".dylib")
_OPERATORS = (
    "best_bfloat16_isa",
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
    "training_backward",
    "training_compile",
    "training_forward",
    "training_layout",
)
_CUDA_OPERATORS = (
    "cat_bn_relu_conv",
    "cat_conv_bn_relu",
    "compile_plan",
    "pack_weights",
    "packed_bytes",
    "program_algorithms",
    "run_plan",
    "workspace_bytes",
)


class _Library:
    """A shared library of operators, which is loaded at most once in a process.

    Args:
        stem: Name of its file, without what follows the first point.
        title: What messages call it.
        namespace: The operators' namespace.
        operators: Their names.
        absence: Why there may be no such file.
        base: Another library that must be loaded before.
    """

    def __init__(
        self,
        stem: str,
        title: str,
        namespace: str,
        operators: tuple[str, ...],
        absence: str,
        base: _Library | None = None,
    ) -> None:
        self.stem = stem
        self.title = title
        self.namespace = namespace
        self.operators = operators
        self.absence = absence
        self.base = base
        self._lock = threading.Lock()
        self._done = False
        self._reason: str | None = None

    def path(self) -> Path | None:
        """Returns the file, or None where none was built."""
        candidates = (_folder() / f"{self.stem}{suffix}" for suffix in _SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)

    def left_out_reason(self) -> str | None:
        """Returns why there is nothing to load, or None; loads nothing."""
        if os.environ.get("THRESHNET_FAST_NO_EXT", "0") not in ("", "0"):
            return "the C++ extension is switched off by THRESHNET_FAST_NO_EXT"
        if self.path() is None:
            return (
                f"the {self.title} was not built when threshnet_fast was installed "
                f"({self.absence}): reinstall it, `pip install -v` says more"
            )
        return None

    def unavailable_reason(self) -> str | None:
        """Loads it on the first call; returns why its operators cannot be called, or None."""
        if not self._done:
            with self._lock:
                if not self._done:
                    self._reason = self._load()
                    self._done = True
        return self._reason

    def _load(self) -> str | None:
        reason = self.left_out_reason()
        if reason is None and self.base is not None:
            reason = self.base.unavailable_reason()
        path = self.path()
        if reason is not None or path is None:
            return reason
        import torch

        try:
            torch.ops.load_library(path)
        except OSError as error:
            # torch keeps the system loader's text as the cause; it may take several lines and
            # starts with the path.
            text = " ".join(str(error.__cause__ or error).split()).removeprefix(f"{path}: ")
            version = torch.__version__
            return f"the {self.title} {path} does not load beside torch {version}: {text}"
        missing = [name for name in self.operators if not _has_kernel(f"{self.namespace}::{name}")]
        if missing:
            return (
                f"the {self.title} {path} is not of this version: it has no operator "
                f"{', '.join(missing)}; reinstall threshnet_fast"
            )
        return None


_ENGINE = _Library(
    "_C",
    "C++ extension",
    NAMESPACE,
    _OPERATORS,
    "no C++17 compiler was found, or THRESHNET_FAST_NO_EXT was set",
)
_CUDA = _Library(
    "_C_cuda",
    "CUDA extension",
    CUDA_NAMESPACE,
    _CUDA_OPERATORS,
    "no nvcc of CUDA 12.0 or newer was found, or THRESHNET_FAST_CUDA=0 was set",
    base=_ENGINE,
)


def library_path() -> Path | None:
    """Returns the shared library's path, or None where none was built."""
    return _ENGINE.path()


def load() -> bool:
    """Loads the shared library, once in a process.

    Thread-safe, and free after the first call: a failure is remembered like a success.

    Returns:
        True when the operators of ``torch.ops.threshnet_fast_cpu`` can be called.
    """
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Returns one line saying why the operators cannot be called, or None when they can."""
    return _ENGINE.unavailable_reason()


def load_cuda() -> bool:
    """Loads the operators for CUDA, once in a process, after those of :func:`load`.

    Thread-safe, and free after the first call. It works without a device, on which the operators
    fail: callers make sure that there is one.

    Returns:
        True when the operators of ``torch.ops.threshnet_fast_cuda`` can be called.
    """
    return cuda_unavailable_reason() is None


def cuda_unavailable_reason() -> str | None:
    """Returns one line saying why CUDA's operators cannot be called, or None when they can."""
    return _CUDA.unavailable_reason()


def cuda_left_out_reason() -> str | None:
    """Returns one line saying why there is nothing to load for CUDA, or None; loads nothing."""
    return _CUDA.left_out_reason()


def cuda_library_path() -> Path | None:
    """Returns the path of the library that C and C++ programs link with for CUDA, or None.

    It holds the kernels and needs neither torch nor Python; :func:`cuda_include_path` is the folder
    of its header.
    """
    path = _folder() / "lib" / "libthreshnet_fast_cuda.so"
    return path if path.is_file() else None


def cuda_include_path() -> Path | None:
    """Returns the folder that holds ``threshnet_fast.h``, or None where it was not installed."""
    folder = _folder() / "include"
    return folder if (folder / "threshnet_fast.h").is_file() else None


def _folder() -> Path:
    return Path(__file__).resolve().parent


def _has_kernel(operator: str) -> bool:
    import torch

    try:
        return any(
            torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)
            for key in ("CPU", "CUDA")
        )
    except RuntimeError:
        # It is not even defined.
        return False
