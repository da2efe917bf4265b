"""The operators of ``torch.ops.threshnet_fast_cuda`` on the emulated library.

``csrc/cuda/bindings.cpp`` is compiled by g++ and linked with the library of ``cuda_library``. Its
operators are registered for tensors on the CPU, so that the whole of the Python backend runs there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from emulation import cuda_library
from threshnet_fast import extension
from threshnet_fast.engines import cuda

__all__ = ["DEVICES", "emulated_cuda", "skip_reason"]

DEVICES = {
    "sm_75": cuda.Properties(75, 40, 64 * 1024),
    "sm_80": cuda.Properties(80, 108, 163 * 1024),
    "sm_86": cuda.Properties(86, 84, 99 * 1024),
    "sm_89": cuda.Properties(89, 76, 99 * 1024),
    "sm_90": cuda.Properties(90, 132, 227 * 1024),
    "sm_100": cuda.Properties(100, 148, 227 * 1024),
    "sm_120": cuda.Properties(120, 84, 99 * 1024),
}
"""Typical devices of each architecture."""

_BINDINGS = cuda_library.CSRC / "cuda" / "bindings.cpp"
_FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared"),
    *("-DTHRESHNET_FAST_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
)


def skip_reason() -> str | None:
    """Returns why the operators cannot be built or called, or None."""
    if torch.cuda.is_available():
        # torch takes one implementation of each operator, and loads libraries in such a way that
        # functions of the first one take the place of the same of the second.
        return "a process cannot have the operators both of the emulated and of the real library"
    return cuda_library.skip_reason() or extension.unavailable_reason()


@contextlib.contextmanager
def emulated_cuda(architecture: str = "sm_90") -> Iterator[cuda_library.Library]:
    """Makes the backend ``"cuda"`` compute on tensors in the CPU's memory, as if on a device.

    Args:
        architecture: A key of :data:`DEVICES`.
    """
    library = _library()
    properties = DEVICES[architecture]
    with (
        library.device(cuda_library.Device(**properties._asdict())),
        mock.patch.object(cuda, "unavailable_reason", return_value=None),
        mock.patch.object(cuda, "_device_type", return_value="cpu"),
        mock.patch.object(cuda, "_properties", return_value=properties),
    ):
        yield library


@functools.cache
def _library() -> cuda_library.Library:
    """Loads the operators, once in a process: torch takes one implementation of each."""
    # They are defined by the extension for the CPU.
    assert extension.load(), extension.unavailable_reason()
    library = cuda_library.load()
    assert isinstance(library, cuda_library.Library)
    torch.ops.load_library(_build(library.path))
    return library


def _build(library: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    command = [
        str(cuda_library.compiler()),
        *_FLAGS,
        f"-I{cuda_library.CSRC}",
        *("-isystem", str(torch_folder / "include")),
        str(_BINDINGS),
        str(library),
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        f"-Wl,-rpath,{library.parent}",
    ]
    digest = hashlib.sha256("\0".join([*command, torch.__version__]).encode())
    headers = [*cuda_library.CSRC.glob("*.h"), *cuda_library.CSRC.glob("cuda/*.h")]
    for path in (_BINDINGS, *sorted(headers)):
        digest.update(path.read_bytes())
    target = library.parent / f"operators-{digest.hexdigest()[:24]}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / target.name
            done = subprocess.run(
                [*command, "-o", str(built)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            built.replace(target)
    return target
