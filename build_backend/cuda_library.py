"""The CUDA kernels' shared library, which knows nothing of torch, and what is installed with it."""

import os
import sys
from pathlib import Path

import nvcc
import toolchain


class CudaLibrary:
    """What nvcc makes of ``csrc``, or why it makes nothing.

    Attributes:
        name: Of the library, as a linker takes it.
        left_out: Why it is left out; None where it is going to be built.
    """

    def __init__(self, root, package):
        """Takes the folder of the source tree and the name of the package.

        Raises:
            RuntimeError: If THRESHNET_FAST_CUDA asks for the library and it cannot be built.
        """
        self.name = f"{package}_cuda"
        self._root = root
        self._csrc = root / "csrc"
        self._header = self._csrc / f"{package}.h"
        if (self._csrc / "cuda/bindings.cpp").is_file():
            self.left_out = nvcc.left_out_reason()
        else:
            self.left_out = "their sources are not in csrc/cuda"

    @property
    def file_name(self):
        """Name of the library's file."""
        return f"lib{self.name}.so"

    def build(self, folder):
        """Returns the path of the library, made in ``folder``.

        Raises:
            RuntimeError: If nvcc fails.
            ValueError: If TORCH_CUDA_ARCH_LIST is not understood.
        """
        compiler = nvcc.find_nvcc()
        architectures = nvcc.choose_architectures(
            os.environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc.known_architectures(compiler)
        )
        csrc = self._csrc
        sources = {*csrc.glob("*.cpp"), *csrc.glob("cuda/*.cpp"), *csrc.glob("cuda/*.cu")}
        # These alone know torch.
        sources -= {csrc / "schemas.cpp", csrc / "cuda/bindings.cpp"}
        host = nvcc.host_compiler_options(os.environ["CXX"])
        options = [
            *nvcc.FLAGS,
            *(["-Werror=all-warnings"] if toolchain.warnings_are_errors() else []),
            *host,
            "-Icsrc",
            *(architecture.flag for architecture in architectures),
        ]
        link_options = [*nvcc.LINK_FLAGS, *host]
        builder = nvcc.Builder(
            compiler, self._root, folder, options, link_options, toolchain.jobs()
        )
        print(f"CUDA kernels for {' '.join(map(str, architectures))}", flush=True)
        return builder.build(toolchain.relative(self._root, sources), self.file_name)

    def installed_files(self, library):
        """Yields what is installed beside the extensions: a file, and its path in the package.

        The header is for programs in C and C++.
        """
        yield library, f"lib/{Path(library).name}"
        if self._header.is_file():
            yield self._header, f"include/{self._header.name}"

    @staticmethod
    def remove(package):
        """Removes the CUDA half from a folder of the package."""
        remove_files(package, "_C_cuda*.so", "lib/*.so", "include/*.h")


def remove_files(folder, *patterns):
    """Removes what an earlier build left: older operators are worse than none."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        print(f"removing {path}", file=sys.stderr)
        path.unlink()
