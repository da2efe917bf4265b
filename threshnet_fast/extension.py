"""Loads the compiled operators, on first use.

The C++ engine is one shared library beside this file, ``threshnet_fast/_C.abi3.so``. It registers
the operators of the namespace ``threshnet_fast_cpu`` through LibTorch's stable ABI and is no Python
module: ``torch.ops.load_library`` loads it, not ``import``. It also says which operators
``threshnet_fast_cuda`` has. A second library, ``threshnet_fast/_C_cuda.abi3.so``, computes them; it
is loaded only where there is a CUDA device. The package works without either (pure PyTorch), so
nothing here raises: callers ask :func:`load` and report :func:`unavailable_reason`, or
:func:`load_cuda` and :func:`cuda_unavailable_reason`.
"""

import os
import threading
from pathlib import Path

NAMESPACE = "threshnet_fast_cpu"
"""Namespace of the operators that the library registers."""

CUDA_NAMESPACE = "threshnet_fast_cuda"
"""Namespace of the operators that the library for CUDA registers."""

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

_SWITCHED_OFF = "the C++ extension is switched off by THRESHNET_FAST_NO_EXT"

_lock = threading.Lock()
_done = False
_reason: str | None = None
_cuda_done = False
_cuda_reason: str | None = None


def library_path() -> Path | None:
    """Returns the shared library's path, or None where none was built."""
    return _find("_C")


def cuda_library_path() -> Path | None:
    """Returns the path of the shared library for CUDA, or None where none was built."""
    return _find("_C_cuda")


def _find(stem: str) -> Path | None:
    folder = Path(__file__).resolve().parent
    candidates = (folder / f"{stem}{suffix}" for suffix in _SUFFIXES)
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


def load_cuda() -> bool:
    """Loads the shared library for CUDA, once in a process, after the other one.

    Thread-safe, and free after the first call. Callers make sure that there is a CUDA device.

    Returns:
        True when the operators of ``torch.ops.threshnet_fast_cuda`` can be called.
    """
    global _cuda_done, _cuda_reason
    if not _cuda_done:
        # Outside of the lock, which it takes itself.
        reason = unavailable_reason()
        with _lock:
            if not _cuda_done:
                _cuda_reason = reason or _load_cuda()
                _cuda_done = True
    return _cuda_reason is None


def cuda_unavailable_reason() -> str | None:
    """Returns one line saying why CUDA's operators cannot be called, or None when they can."""
    load_cuda()
    return _cuda_reason


def cuda_left_out_reason() -> str | None:
    """Returns one line saying why there is nothing to load for CUDA, or None; loads nothing."""
    if _switched_off():
        return _SWITCHED_OFF
    if cuda_library_path() is None:
        return (
            "the CUDA kernels were not built when threshnet_fast was installed (nvcc was not "
            "found, or THRESHNET_FAST_CUDA=0 was set): reinstall it, `pip install -v` says more"
        )
    return None


def _switched_off() -> bool:
    return os.environ.get("THRESHNET_FAST_NO_EXT", "0") not in ("", "0")


def _load() -> str | None:
    if _switched_off():
        return _SWITCHED_OFF
    path = library_path()
    if path is None:
        return (
            "the C++ extension was not built when threshnet_fast was installed (no C++17 compiler "
            "was found, or THRESHNET_FAST_NO_EXT was set): reinstall it, `pip install -v` says more"
        )
    import torch

    error = _open(path)
    if error is not None:
        return f"the C++ extension {path} does not load beside torch {torch.__version__}: {error}"
    namespace = getattr(torch.ops, NAMESPACE)
    missing = [name for name in _OPERATORS if not hasattr(namespace, name)]
    return _of_another_version("C++ extension", path, missing)


def _load_cuda() -> str | None:
    reason = cuda_left_out_reason()
    if reason is not None:
        return reason
    import torch

    path = cuda_library_path()
    assert path is not None
    error = _open(path)
    if error is not None:
        return f"the CUDA library {path} does not load beside torch {torch.__version__}: {error}"
    missing = [name for name in _CUDA_OPERATORS if not _has_kernel(f"{CUDA_NAMESPACE}::{name}")]
    return _of_another_version("CUDA library", path, missing)


def _has_kernel(name: str) -> bool:
    """Whether an operator is computed anywhere; the other library only defines those for CUDA."""
    import torch

    return torch._C._dispatch_has_kernel(name) and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        for key in ("CPU", "CUDA", "CompositeExplicitAutograd")
    )


def _open(path: Path) -> str | None:
    """Loads a library, and returns the system loader's complaint."""
    import torch

    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch keeps the system loader's text as the cause; it may take several lines and starts
        # with the path.
        return " ".join(str(error.__cause__ or error).split()).removeprefix(f"{path}: ")
    return None


def _of_another_version(what: str, path: Path, missing: list[str]) -> str | None:
    if not missing:
        return None
    return (
        f"the {what} {path} is not of this version: it has no operator "
        f"{', '.join(missing)}; reinstall threshnet_fast"
    )
