"""Builds the package's shared libraries and maps kernels/ and the schemas into the package.

- ``threshnet_fast/_C``: the CPU engine and the operators' schemas.
- ``threshnet_fast/_fingerprint``: a Python module that compares a model with what it was.
- Where there is nvcc, ``threshnet_fast/lib/libthreshnet_fast_cuda.so``, CUDA kernels that know
  nothing of torch, and ``threshnet_fast/_C_cuda``, which registers them as operators.

All three extensions are abi3. Everything else about the package is in pyproject.toml. Environment
variables:

- ``THRESHNET_FAST_NO_EXT=1``: leave all of them out, the package is pure Python.
- ``THRESHNET_FAST_CUDA=0``: leave the CUDA kernels out; ``1``: fail where they cannot be built.
- ``TORCH_CUDA_ARCH_LIST``: the GPUs to compile for, as ``8.0;9.0+PTX``.
- ``CUDA_HOME``, ``CUDA_PATH``, ``NVCC_CCBIN``: where nvcc is, and its C++ compiler.
- ``CXX``: the compiler; ``MAX_JOBS``: how many files are compiled at once.
- ``THRESHNET_FAST_WERROR=1``: warnings end the build.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_library import CudaLibrary, remove_files  # noqa: E402, the line above finds it
from extensions import PACKAGE, setup_arguments  # noqa: E402

COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

packages = find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])
package_dir = {}
if (ROOT / "kernels").is_dir():
    packages.append(f"{PACKAGE}.kernels")
    package_dir[f"{PACKAGE}.kernels"] = "kernels"
if (ROOT / "csrc").is_dir():
    # Only the schemas, by which the package checks what it loads.
    packages.append(f"{PACKAGE}.csrc")
    package_dir[f"{PACKAGE}.csrc"] = "csrc"

arguments = setup_arguments(ROOT) if COMPILING & set(sys.argv[1:]) else {}
if "editable_wheel" in sys.argv[1:] and not arguments:
    remove_files(ROOT / PACKAGE, "_C.*so", "_fingerprint.*so")
    CudaLibrary.remove(ROOT / PACKAGE)

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        PACKAGE: ["py.typed", "models/weights/*.safetensors", "models/weights/*.json"],
        f"{PACKAGE}.csrc": ["schemas.cpp"],
    },
    **arguments,
)
