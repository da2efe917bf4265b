"""The extensions of the package as setuptools is told of them, and how they are compiled."""

import os
import sys
from pathlib import Path

import toolchain
from cuda_library import CudaLibrary
from setuptools import Extension

PACKAGE = "threshnet_fast"

C_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS = [
    "-std=c++17",
    # Contraction into FMA is decided by hand, in the kernels.
    "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# A missing definition is an error here rather than when a user loads the library. Of Python itself
# definitions are missing until then: an extension that calls it cannot have this.
LINK_FLAGS = ["-Wl,-z,defs"] if sys.platform == "linux" else []
TORCH_LIBRARIES = ["c10", "torch", "torch_cpu"]


class Sources:
    """Makes extensions of what lies in ``csrc``."""

    def __init__(self, root, torch_extension):
        """Takes the folder of the source tree and the module ``torch.utils.cpp_extension``."""
        self.root = root
        self.csrc = root / "csrc"
        self._torch_includes = torch_extension.include_paths()
        self._torch_folders = torch_extension.library_paths()

    def extension(self, name, sources, depends=(), *, flags=(), **arguments):
        """Returns an extension of Python's limited API that knows nothing of torch.

        ``sources`` and ``depends`` are patterns within ``csrc``; of the latter, headers count.
        """
        headers = [path for path in self._files(depends) if path.suffix in (".h", ".inc")]
        return Extension(
            f"{PACKAGE}.{name}",
            toolchain.relative(self.root, self._files(sources)),
            include_dirs=[str(self.csrc)],
            depends=toolchain.relative(self.root, headers),
            extra_compile_args=[
                *C_FLAGS,
                *(["-Werror"] if toolchain.warnings_are_errors() else []),
                *flags,
            ],
            py_limited_api=True,
            **arguments,
        )

    def operators(self, name, sources, depends, *, libraries=(), **arguments):
        """Returns an extension in C++ that registers operators with torch."""
        return self.extension(
            name,
            sources,
            depends,
            # As system headers, torch's are not held to our warnings.
            flags=[*CXX_FLAGS, *(f"-isystem{path}" for path in self._torch_includes)],
            language="c++",
            library_dirs=list(self._torch_folders),
            libraries=[*TORCH_LIBRARIES, *libraries],
            extra_link_args=LINK_FLAGS,
            **arguments,
        )

    def fingerprint(self):
        """Returns the Python module that compares a model with what it was, in a list.

        The list is empty where its source is not there.
        """
        sources = ["python/fingerprint.cpp"]
        if sys.platform == "win32" or not self._files(sources):
            return []
        return [
            self.extension(
                "_fingerprint",
                sources,
                flags=["-std=c++17"],
                language="c++",
                library_dirs=list(self._torch_folders),
                libraries=["torch_cpu"],
            )
        ]

    def _files(self, patterns):
        return [path for pattern in patterns for path in self.csrc.glob(pattern)]


class BuildWithCuda:
    """Mixed into torch's command ``build_ext``: builds the CUDA kernels' library too.

    Keeps the objects of an editable install, so that the next one compiles what changed.
    """

    root: Path
    cuda: CudaLibrary

    def finalize_options(self):
        """Keeps the objects of an editable install in the source tree."""
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = str(self.root / "build" / f"temp.{self.plat_name}")

    def run(self):
        """Builds the CUDA library first, which an extension links with, or removes an older one."""
        built = Path(self.build_lib, PACKAGE)
        if self.cuda.left_out is None:
            folder = Path(self.build_temp).resolve() / "cuda"
            library = self.cuda.build(folder)
            for extension in self.extensions:
                if self.cuda.name in extension.libraries:
                    extension.library_dirs.append(str(folder))
            for source, name in self.cuda.installed_files(library):
                (built / name).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(built / name))
        else:
            self.cuda.remove(built)
        super().run()

    def copy_extensions_to_source(self):
        """Copies what belongs beside the extensions of an installation in place."""
        super().copy_extensions_to_source()
        if self.cuda.left_out is not None:
            self.cuda.remove(self.root / PACKAGE)
        for built, source in self._cuda_mapping().items():
            Path(source).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(built, source)

    def get_outputs(self):
        """Returns every file that is built."""
        return [*super().get_outputs(), *self._cuda_mapping()]

    def get_output_mapping(self):
        """Returns every file that is built in place, with where it is copied to."""
        mapping = self._cuda_mapping() if self.inplace else {}
        return {**super().get_output_mapping(), **mapping}

    def _cuda_mapping(self):
        """Returns each file of the CUDA half below ``build_lib`` with its path in the tree."""
        if self.cuda.left_out is not None:
            return {}
        names = [name for _, name in self.cuda.installed_files(self.cuda.file_name)]
        return {
            str(Path(self.build_lib, PACKAGE, name)): str(self.root / PACKAGE / name)
            for name in names
        }


def import_torch_extension():
    """Returns the module ``torch.utils.cpp_extension``.

    Raises:
        RuntimeError: If torch cannot be imported or is too old.
    """
    oldest = ".".join(map(str, toolchain.OLDEST_TORCH))
    what = f"building the C++ extension needs torch >= {oldest}"
    otherwise = "build with isolation, or set THRESHNET_FAST_NO_EXT=1 for pure Python"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(
            f"{what}, which cannot be imported ({error}): install it first, {otherwise}"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < toolchain.OLDEST_TORCH:
        raise RuntimeError(f"{what}, found {torch.__version__}: update it, {otherwise}")
    return cpp_extension


def setup_arguments(root):
    """Returns the arguments of ``setup`` that build the extensions; none for pure Python.

    Raises:
        RuntimeError: If the sources or torch are missing, or what was asked for cannot be built.
    """
    reason = toolchain.pure_python_reason()
    if reason is not None:
        if os.environ.get("THRESHNET_FAST_CUDA") == "1":
            raise RuntimeError(f"THRESHNET_FAST_CUDA=1 needs the C++ extension, but {reason}")
        print(
            f"WARNING: {PACKAGE} is built without its C++ extension: {reason}. "
            "It works in pure PyTorch; the cpu backend is off.",
            file=sys.stderr,
            flush=True,
        )
        return {}
    schemas = root / "csrc" / "schemas.cpp"
    if not schemas.is_file():
        raise RuntimeError(f"{schemas} is missing: the source tree is incomplete")
    cuda = CudaLibrary(root, PACKAGE)
    if cuda.left_out is not None:
        print(f"NOTE: {PACKAGE} is built without its CUDA kernels: {cuda.left_out}", flush=True)
    torch_extension = import_torch_extension()
    # torch and setuptools read the compiler from here, the former with a default of its own.
    os.environ["CXX"] = toolchain.find_compiler()

    command = type(
        "BuildExt", (BuildWithCuda, torch_extension.BuildExtension), {"root": root, "cuda": cuda}
    )
    sources = Sources(root, torch_extension)
    extensions = [
        sources.operators("_C", ["*.cpp", "cpu/**/*.cpp"], ["*", "cpu/**/*"]),
        *sources.fingerprint(),
    ]
    if cuda.left_out is None:
        extensions.append(
            sources.operators(
                "_C_cuda",
                ["cuda/bindings.cpp"],
                ["*", "cuda/*"],
                libraries=[cuda.name],
                runtime_library_dirs=["$ORIGIN/lib"],
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
