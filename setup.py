"""Builds the package's shared libraries and maps kernels/ and the schemas into the package.

- ``threshnet_fast/_C``: the CPU engine and the operators' schemas.
- Where there is nvcc, ``threshnet_fast/lib/libthreshnet_fast_cuda.so``, CUDA kernels that know
  nothing of torch, and ``threshnet_fast/_C_cuda``, which registers them as operators.

_C and _C_cuda are abi3. Everything else about the package is in pyproject.toml. Environment
variables:

- ``THRESHNET_FAST_NO_EXT=1``: leave all of them out, the package is pure Python.
- ``THRESHNET_FAST_CUDA=0``: leave the CUDA kernels out; ``1``: fail where they cannot be built.
- ``TORCH_CUDA_ARCH_LIST``: the GPUs to compile for, as ``8.0;9.0+PTX``.
- ``CUDA_HOME``, ``CUDA_PATH``, ``NVCC_CCBIN``: where nvcc is, and its C++ compiler.
- ``CXX``: the compiler; ``MAX_JOBS``: how many files are compiled at once.
- ``THRESHNET_FAST_WERROR=1``: warnings end the build.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import nvcc  # noqa: E402, the line above finds it
import toolchain  # noqa: E402

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
CUDA_LIBRARY = "threshnet_fast_cuda"


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


def cuda_left_out_reason():
    """Returns why the CUDA kernels are left out, or None where they are going to be built.

    Raises:
        RuntimeError: If THRESHNET_FAST_CUDA asks for them and they cannot be built.
    """
    if not (ROOT / "csrc/cuda/bindings.cpp").is_file():
        return "their sources are not in csrc/cuda"
    return nvcc.left_out_reason()


def build_cuda_library(folder):
    """Returns the path of the CUDA kernels' shared library, made in ``folder``.

    Raises:
        RuntimeError: If nvcc fails.
        ValueError: If TORCH_CUDA_ARCH_LIST is not understood.
    """
    compiler = nvcc.find_nvcc()
    architectures = nvcc.choose_architectures(
        os.environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc.known_architectures(compiler)
    )
    csrc = ROOT / "csrc"
    sources = [*csrc.glob("*.cpp"), *csrc.glob("cuda/*.cpp"), *csrc.glob("cuda/*.cu")]
    # These alone know torch.
    sources = set(sources) - {csrc / "schemas.cpp", csrc / "cuda/bindings.cpp"}
    host = nvcc.host_compiler_options(os.environ["CXX"])
    options = [
        *nvcc.FLAGS,
        *(["-Werror=all-warnings"] if toolchain.warnings_are_errors() else []),
        *host,
        "-Icsrc",
        *(architecture.flag for architecture in architectures),
    ]
    link_options = [*nvcc.LINK_FLAGS, *host]
    builder = nvcc.Builder(compiler, ROOT, folder, options, link_options, toolchain.jobs())
    print(f"CUDA kernels for {' '.join(map(str, architectures))}", flush=True)
    return builder.build(relative(sources), f"lib{CUDA_LIBRARY}.so")


def extension_arguments():
    """Returns the arguments of ``setup`` that build the extensions; none for pure Python.

    Raises:
        RuntimeError: If the sources or torch are missing, or what was asked for cannot be built.
    """
    reason = toolchain.pure_python_reason()
    if reason is not None:
        if os.environ.get("THRESHNET_FAST_CUDA") == "1":
            raise RuntimeError(f"THRESHNET_FAST_CUDA=1 needs the C++ extension, but {reason}")
        warn_pure_python(reason)
        return {}
    csrc = ROOT / "csrc"
    schemas = csrc / "schemas.cpp"
    if not schemas.is_file():
        raise RuntimeError(f"{schemas} is missing: the source tree is incomplete")
    without_cuda = cuda_left_out_reason()
    if without_cuda is not None:
        print(f"NOTE: {PACKAGE} is built without its CUDA kernels: {without_cuda}", flush=True)
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
        """Builds the CUDA kernels' library too, which the extension of the operators links with.

        Keeps the objects of an editable install, so that the next one compiles what changed.
        """

        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:
                self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}")

        def run(self):
            built = Path(self.build_lib, PACKAGE)
            if without_cuda is None:
                folder = Path(self.build_temp).resolve() / "cuda"
                library = build_cuda_library(folder)
                cuda_extension.library_dirs.append(str(folder))
                for source, name in self._cuda_files(library):
                    (built / name).parent.mkdir(parents=True, exist_ok=True)
                    self.copy_file(str(source), str(built / name))
            else:
                remove_cuda_files(built)
            super().run()

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            if without_cuda is not None:
                remove_cuda_files(ROOT / PACKAGE)
            for built, source in self._cuda_mapping().items():
                Path(source).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(built, source)

        def get_outputs(self):
            return [*super().get_outputs(), *self._cuda_mapping()]

        def get_output_mapping(self):
            mapping = self._cuda_mapping() if self.inplace else {}
            return {**super().get_output_mapping(), **mapping}

        def _cuda_mapping(self):
            """Returns each file of the CUDA half below ``build_lib`` with its path in the tree."""
            if without_cuda is not None:
                return {}
            names = [name for _, name in self._cuda_files(f"lib{CUDA_LIBRARY}.so")]
            return {
                str(Path(self.build_lib, PACKAGE, name)): str(ROOT / PACKAGE / name)
                for name in names
            }

        def _cuda_files(self, library):
            """Yields what is installed beside the extensions: a file, and its path in the package.

            The header is for programs in C and C++.
            """
            yield library, f"lib/{Path(library).name}"
            header = csrc / f"{PACKAGE}.h"
            if header.is_file():
                yield header, f"include/{header.name}"

    def extension(name, sources, headers, **arguments):
        return Extension(
            f"{PACKAGE}.{name}",
            relative(sources),
            include_dirs=[str(csrc)],
            depends=relative(path for path in headers if path.suffix in (".h", ".inc")),
            # As system headers, torch's are not held to our warnings.
            extra_compile_args=[
                *CXX_FLAGS,
                *(["-Werror"] if toolchain.warnings_are_errors() else []),
                *(f"-isystem{path}" for path in include_paths()),
            ],
            extra_link_args=LINK_FLAGS,
            language="c++",
            py_limited_api=True,
            **arguments,
        )

    torch_libraries = ["c10", "torch", "torch_cpu"]
    extensions = [
        extension(
            "_C",
            [*csrc.glob("*.cpp"), *csrc.glob("cpu/**/*.cpp")],
            [*csrc.glob("*"), *csrc.glob("cpu/**/*")],
            library_dirs=library_paths(),
            libraries=torch_libraries,
        )
    ]
    if without_cuda is None:
        cuda_extension = extension(
            "_C_cuda",
            [csrc / "cuda/bindings.cpp"],
            [*csrc.glob("*"), *csrc.glob("cuda/*")],
            library_dirs=library_paths(),
            libraries=[*torch_libraries, CUDA_LIBRARY],
            runtime_library_dirs=["$ORIGIN/lib"],
        )
        extensions.append(cuda_extension)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExt},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def remove_files(folder, *patterns):
    """Removes what an earlier build left: older operators are worse than none."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        print(f"removing {path}", file=sys.stderr)
        path.unlink()


def remove_cuda_files(package):
    """Removes the CUDA half from a folder of the package."""
    remove_files(package, "_C_cuda*.so", "lib/*.so", "include/*.h")


packages = find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])
package_dir = {}
if (ROOT / "kernels").is_dir():
    packages.append(f"{PACKAGE}.kernels")
    package_dir[f"{PACKAGE}.kernels"] = "kernels"
if (ROOT / "csrc").is_dir():
    # Only the schemas, by which the package checks what it loads.
    packages.append(f"{PACKAGE}.csrc")
    package_dir[f"{PACKAGE}.csrc"] = "csrc"

arguments = extension_arguments() if COMPILING & set(sys.argv[1:]) else {}
if "editable_wheel" in sys.argv[1:] and not arguments:
    remove_files(ROOT / PACKAGE, "_C.*so")
    remove_cuda_files(ROOT / PACKAGE)

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        PACKAGE: ["py.typed", "models/weights/*.safetensors", "models/weights/*.json"],
        f"{PACKAGE}.csrc": ["schemas.cpp"],
    },
    **arguments,
)
