"""Builds threshnet_fast/_C, one abi3 shared library, and maps kernels/ into the package.

Everything else about the package is in pyproject.toml. Environment variables:

- ``THRESHNET_FAST_NO_EXT=1``: leave the extension out, the package is pure Python.
- ``CXX``: the compiler; ``MAX_JOBS``: how many files it compiles at once.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import toolchain  # noqa: E402, the line above finds it

PACKAGE = "threshnet_fast"
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Contraction into FMA is decided by hand, in the kernels.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# A missing definition is an error here rather than when a user loads the library.
LINK_FLAGS = ["-Wl,-z,defs"] if sys.platform == "linux" else []


def relative(paths):
    """Returns the paths relative to this file's folder, sorted, as setuptools wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def warn_pure_python(reason):
    """Says, in the build's output, that the package will have no extension."""
    print(
        f"WARNING: {PACKAGE} is built without its C++ extension: {reason}. "
        "It works in pure PyTorch; the cpu backend is off.",
        file=sys.stderr,
        flush=True,
    )


def extension_arguments():
    """Returns the arguments of ``setup`` that build the extension; none for pure Python.

    Raises:
        RuntimeError: If the sources or torch are missing.
    """
    reason = toolchain.pure_python_reason()
    if reason is not None:
        warn_pure_python(reason)
        return {}
    csrc = ROOT / "csrc"
    bindings = csrc / "bindings.cpp"
    if not bindings.is_file():
        raise RuntimeError(f"{bindings} is missing: the source tree is incomplete")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        raise RuntimeError(
            f"building the C++ extension needs torch >= 2.10, which cannot be imported ({error}): "
            "install it first, build with isolation, or set THRESHNET_FAST_NO_EXT=1 for pure Python"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise RuntimeError(
            f"building the C++ extension needs torch >= 2.10, found {torch.__version__}: update "
            "it, build with isolation, or set THRESHNET_FAST_NO_EXT=1 for pure Python"
        )

    # torch and setuptools read the compiler from here, the former with a default of its own.
    os.environ["CXX"] = toolchain.find_compiler()

    class BuildExt(BuildExtension):
        """Keeps the objects of an editable install, so that the next one compiles what changed."""

        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:
                self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}")

    extension = Extension(
        f"{PACKAGE}._C",
        relative([bindings, *csrc.glob("cpu/**/*.cpp")]),
        include_dirs=[str(csrc)],
        depends=relative(path for path in csrc.rglob("*") if path.suffix in (".h", ".inc")),
        # As system headers, torch's are not held to our warnings.
        extra_compile_args=[*CXX_FLAGS, *(f"-isystem{path}" for path in include_paths())],
        extra_link_args=LINK_FLAGS,
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        language="c++",
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExt},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def remove_stale_library():
    """Removes what an earlier editable install left: older operators are worse than none."""
    for path in (ROOT / PACKAGE).glob("_C*.so"):
        print(f"removing {path}", file=sys.stderr)
        path.unlink()


packages = find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])
package_dir = {}
if (ROOT / "kernels").is_dir():
    packages.append(f"{PACKAGE}.kernels")
    package_dir[f"{PACKAGE}.kernels"] = "kernels"

arguments = extension_arguments() if COMPILING & set(sys.argv[1:]) else {}
if "editable_wheel" in sys.argv[1:] and not arguments:
    remove_stale_library()

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={PACKAGE: ["py.typed"]},
    **arguments,
)
