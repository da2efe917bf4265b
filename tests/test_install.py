"""Packaging: metadata, the build backend, what the archives hold, what happens without a compiler.

The builds here take a copy of the tree whose C++ is one tiny operator: the question is how things
are built, and the real sources take long. ``.ci/run`` installs the real ones in every way.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

import threshnet_fast

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "build_backend"

TINY_BINDINGS = """
#include <torch/csrc/stable/library.h>
#include "cpu/value.h"
int64_t value() { return VALUE; }
STABLE_TORCH_LIBRARY(threshnet_fast_tiny, m) { m.def("value() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_tiny, CompositeExplicitAutograd, m) {
  m.impl("value", TORCH_BOX(&value));
}
"""

TINY_CUDA_BINDINGS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include "threshnet_fast.h"
int64_t run(const torch::stable::Tensor&) { return threshnet_fast_run(); }
STABLE_TORCH_LIBRARY(threshnet_fast_tiny_cuda, m) { m.def("run(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(threshnet_fast_tiny_cuda, CUDA, m) { m.impl("run", TORCH_BOX(&run)); }
"""

TINY_KERNEL = """
#include "threshnet_fast.h"
__global__ void kernel() {}
int threshnet_fast_run() { kernel<<<1, 1>>>(); return cudaGetLastError(); }
"""

WEIGHTS = {
    f"threshnet_fast/models/weights/tiny_example.{suffix}" for suffix in ("json", "safetensors")
}

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    or not shutil.which("nvcc")
    or sys.platform != "linux",
    reason="no nvcc",
)


def environment(**changes):
    """This process's environment without what steers a build, then with ``changes``."""
    steering = {"CXX", "CC", "CFLAGS", "CXXFLAGS", "LDFLAGS", "THRESHNET_FAST_NO_EXT", "PYTHONPATH"}
    steering |= {"CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST"}
    steering |= {"THRESHNET_FAST_CUDA", "THRESHNET_FAST_WERROR"}
    result = {name: text for name, text in os.environ.items() if name not in steering}
    return {**result, **changes}


def call_backend(tree, expression, **changes):
    """Evaluates an expression on the backend as a front end does: in the tree, in a new process."""
    return subprocess.run(
        [sys.executable, "-c", f"import backend; print(backend.{expression})"],
        cwd=tree,
        env=environment(PYTHONPATH=str(tree / "build_backend"), **changes),
        capture_output=True,
        text=True,
    )


def output_of(run):
    """The text of a finished command, which must have succeeded."""
    text = run.stdout + run.stderr
    assert run.returncode == 0, text
    return text


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree with one tiny operator and one module in kernels/."""
    folder = tmp_path / "tree"
    # Large weights would have every archive take long: small files stand for them.
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "*.safetensors")
    folder.mkdir()
    for name in ("build_backend", "threshnet_fast", "tests", "csrc", "kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    shutil.rmtree(folder / "csrc")
    (folder / "csrc/cpu").mkdir(parents=True)
    (folder / "csrc/schemas.cpp").write_text(TINY_BINDINGS)
    (folder / "csrc/cpu/value.h").write_text("#pragma once\n#define VALUE 3\n")
    (folder / "kernels").mkdir(exist_ok=True)
    (folder / "kernels/__init__.py").touch()
    (folder / "kernels/example.py").write_text("ANSWER = 42\n")
    (folder / "threshnet_fast/models/weights").mkdir(exist_ok=True)
    for name in WEIGHTS:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def cuda_tree(tree):
    """The same with one tiny kernel."""
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/bindings.cpp").write_text(TINY_CUDA_BINDINGS)
    (tree / "csrc/cuda/kernel.cu").write_text(TINY_KERNEL)
    (tree / "csrc/threshnet_fast.h").write_text(
        '__attribute__((visibility("default"))) int threshnet_fast_run();\n'
    )
    return tree


@pytest.fixture
def backend(monkeypatch):
    """The build backend, imported into this process."""
    monkeypatch.syspath_prepend(str(BACKEND))
    monkeypatch.delenv("THRESHNET_FAST_NO_EXT", raising=False)
    for name in ("backend", "toolchain"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import backend

    monkeypatch.setattr(backend.toolchain, "find_compiler", lambda: "c++")
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")
    return backend


def put_torch(folder, version):
    """Makes a site-packages folder look as if it had this torch."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    return str(folder)


class TestMetadata:
    metadata = importlib.metadata.metadata("threshnet_fast")

    def test_version(self):
        assert self.metadata["Version"] == threshnet_fast.__version__
        assert re.fullmatch(r"\d+\.\d+\.\d+", threshnet_fast.__version__)

    def test_license_and_python(self):
        assert self.metadata["License-Expression"] == "MIT"
        assert self.metadata["Requires-Python"] == ">=3.10"

    def test_dependencies(self):
        requires = importlib.metadata.requires("threshnet_fast")
        base = {text for text in requires if "extra ==" not in text}
        assert base == {"torch>=2.10", "numpy", "matplotlib", "pillow", "safetensors", "tqdm"}
        extras = {"bench", "data", "interop", "onnx", "test", "triton"}
        assert set(self.metadata.get_all("Provides-Extra")) == extras

    def test_every_import_is_declared(self):
        """What the package imports, anywhere in it, is a dependency or in an extra."""
        distributions = {"PIL": "pillow", "skimage": "scikit-image"}
        distributions["typing_extensions"] = "typing-extensions"
        imported = set()
        for path in (ROOT / "threshnet_fast").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
        # Pictures are read by pillow_heif too, where users have it.
        third_party = imported - sys.stdlib_module_names - {"threshnet_fast", "pillow_heif"}
        requires = importlib.metadata.requires("threshnet_fast")
        declared = {re.match(r"[\w.-]+", text).group().lower() for text in requires}
        assert "torch" in third_party
        assert {distributions.get(name, name) for name in third_party} - declared == set()

    def test_command(self):
        (command,) = (
            entry
            for entry in importlib.metadata.entry_points(group="console_scripts")
            if entry.name == "threshnet-fast"
        )
        assert command.value == "threshnet_fast.cli:main"
        assert callable(command.load())

    def test_header_has_the_version(self):
        text = (ROOT / "csrc/threshnet_fast.h").read_text(encoding="utf-8")
        assert f'#define THRESHNET_FAST_VERSION "{threshnet_fast.__version__}"\n' in text

    def test_changelog_has_the_version(self):
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        assert f"## [{threshnet_fast.__version__}]" in text


class TestConstraints:
    lines = tuple(
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )

    def test_are_exact_versions_only(self):
        pattern = r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version >= "3\.\d+")?'
        assert [line for line in self.lines if not re.fullmatch(pattern, line)] == []

    def test_cover_every_direct_dependency(self):
        pinned = {line.split("==")[0] for line in self.lines}
        requires = importlib.metadata.requires("threshnet_fast")
        names = {re.match(r"[\w.-]+", text).group().lower() for text in requires}
        assert names - pinned == set()

    def test_name_the_torch_that_the_backend_asks_for(self, backend):
        assert backend.TORCH_REQUIREMENT in self.lines


class TestBackendRequirements:
    hooks = ("get_requires_for_build_wheel", "get_requires_for_build_editable")

    @pytest.fixture
    def sites(self, backend, monkeypatch, tmp_path):
        """Lets a test say which site-packages folders there are."""

        def set_sites(*folders):
            monkeypatch.setattr(backend, "_site_folders", lambda: iter(folders))

        set_sites(str(tmp_path / "empty"))
        return set_sites

    @pytest.mark.parametrize("hook", hooks)
    def test_asks_for_torch_where_there_is_none(self, backend, sites, hook):
        assert getattr(backend, hook)() == ["torch==2.13.0"]

    @pytest.mark.parametrize("hook", hooks)
    @pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
    def test_takes_the_torch_that_is_there(self, backend, sites, tmp_path, hook, version):
        folder = put_torch(tmp_path / "site", version)
        sites(str(tmp_path / "empty"), folder)
        assert getattr(backend, hook)() == []
        assert backend.find_torch() == folder

    @pytest.mark.parametrize("version", ["2.9.1", "1.13.1+cu117", "unknown"])
    def test_old_torch_is_no_torch(self, backend, sites, tmp_path, version):
        newer = put_torch(tmp_path / "behind", "2.13.0")
        sites(put_torch(tmp_path / "site", version), newer)
        assert backend.get_requires_for_build_wheel() == ["torch==2.13.0"]

    def test_pure_python_needs_nothing(self, backend, sites, monkeypatch):
        monkeypatch.setenv("THRESHNET_FAST_NO_EXT", "1")
        assert backend.get_requires_for_build_wheel() == []

    def test_no_compiler_needs_nothing(self, backend, sites, monkeypatch):
        monkeypatch.setattr(backend.toolchain, "find_compiler", lambda: None)
        assert backend.get_requires_for_build_wheel() == []

    def test_asks_for_ninja_where_there_is_none(self, backend, sites, monkeypatch):
        monkeypatch.setattr(backend.shutil, "which", lambda name: None)
        assert backend.get_requires_for_build_wheel() == ["torch==2.13.0", "ninja"]

    def test_sdist_needs_nothing(self, backend, sites):
        assert backend.get_requires_for_build_sdist() == []

    def test_looks_into_this_environment(self, backend):
        """The environment of the tests has torch; it is found where Python imports it from."""
        assert Path(backend.find_torch()) == Path(torch.__file__).parents[1]

    @pytest.mark.parametrize("sees_system", [True, False])
    def test_environment_that_sees_the_system_packages(
        self, backend, monkeypatch, tmp_path, sees_system
    ):
        prefix, base = tmp_path / "venv", tmp_path / "base"
        prefix.mkdir()
        flag = "true" if sees_system else "false"
        (prefix / "pyvenv.cfg").write_text(f"home = x\ninclude-system-site-packages = {flag}\n")
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folder = put_torch(base / sys.platlibdir / python / "site-packages", "2.12.0")
        real_path = backend.sysconfig.get_path

        def path_in_prefix(name, scheme, vars):
            return real_path(name, scheme, {"base": str(prefix), "platbase": str(prefix), **vars})

        monkeypatch.setattr(backend.sysconfig, "get_path", path_in_prefix)
        monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path / "user"))
        monkeypatch.setattr(sys, "prefix", str(prefix))
        monkeypatch.setattr(sys, "base_prefix", str(base))
        assert backend.find_torch() == (folder if sees_system else None)

    def test_does_not_run_setup_py(self, tree):
        (tree / "setup.py").write_text("raise SystemExit('setup.py ran')\n")
        for hook in (*self.hooks, "get_requires_for_build_sdist"):
            assert output_of(call_backend(tree, f"{hook}()")).startswith("[")

    def test_metadata_does_not_import_torch(self, tree):
        """Preparing metadata is part of resolving: it must work before torch is there."""
        text = (tree / "setup.py").read_text(encoding="utf-8")
        (tree / "setup.py").write_text("import sys\nsys.modules['torch'] = None\n" + text)
        for kind in ("wheel", "editable"):
            run = call_backend(tree, f"prepare_metadata_for_build_{kind}('.')")
            assert "threshnet_fast-0.1.0.dist-info" in output_of(run)


class TestArchives:
    def test_sdist_holds_what_it_takes_to_build(self, tree, tmp_path):
        (tree / "csrc/cuda").mkdir()
        sources = {f"csrc/cuda/{name}" for name in ("a.cu", "a.cuh", "a.h", "bindings.cpp")}
        for name in sources:
            (tree / name).touch()
        for name in (
            "csrc/cpu/value.o",
            "threshnet_fast/_C.abi3.so",
            "threshnet_fast/include/threshnet_fast.h",
            "threshnet_fast/lib/libthreshnet_fast_cuda.so",
        ):
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_bytes(b"stale")
        output_of(call_backend(tree, f"build_sdist({str(tmp_path)!r})"))
        (archive,) = tmp_path.glob("threshnet_fast-*.tar.gz")
        with tarfile.open(archive) as file:
            names = {name.partition("/")[2] for name in file.getnames()}
        wanted = {
            *sources,
            *WEIGHTS,
            "build_backend/backend.py",
            "build_backend/nvcc.py",
            "build_backend/toolchain.py",
            "constraints.txt",
            "csrc/schemas.cpp",
            "csrc/cpu/value.h",
            "kernels/example.py",
            "LICENSE",
            "pyproject.toml",
            "setup.py",
            "tests/test_install.py",
            "threshnet_fast/extension.py",
            "threshnet_fast/py.typed",
        }
        assert wanted - names == set()
        assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []
        assert [name for name in names if name.startswith("threshnet_fast/include")] == []

    def test_pure_wheel(self, tree, tmp_path):
        (tree / "threshnet_fast/_C.abi3.so").write_bytes(b"stale")
        run = call_backend(tree, f"build_wheel({str(tmp_path)!r})", THRESHNET_FAST_NO_EXT="1")
        text = output_of(run)
        assert text.count("WARNING: threshnet_fast is built without its C++ extension") == 1
        (archive,) = tmp_path.glob("*.whl")
        assert archive.name == "threshnet_fast-0.1.0-py3-none-any.whl"
        names = set(zipfile.ZipFile(archive).namelist())
        modules = {
            path.relative_to(tree).as_posix() for path in (tree / "threshnet_fast").rglob("*.py")
        }
        assert modules - names == set()
        assert {"threshnet_fast/py.typed", "threshnet_fast/kernels/example.py"} - names == set()
        assert WEIGHTS - names == set()
        assert {name.split("/")[0] for name in names} == {
            "threshnet_fast",
            "threshnet_fast-0.1.0.dist-info",
        }
        assert [name for name in names if name.endswith(".so")] == []

    @needs_compiler
    def test_wheel_with_the_extension(self, tree, tmp_path):
        text = output_of(call_backend(tree, f"build_wheel({str(tmp_path)!r})"))
        assert "without its C++ extension" not in text
        (archive,) = tmp_path.glob("*.whl")
        assert re.fullmatch(r"threshnet_fast-0\.1\.0-cp310-abi3-\w+\.whl", archive.name)
        with zipfile.ZipFile(archive) as file:
            libraries = [name for name in file.namelist() if name.endswith(".so")]
            assert libraries == ["threshnet_fast/_C.abi3.so"]
            # Of the sources, what a loaded library is compared with.
            sources = [name for name in file.namelist() if "csrc" in name]
            assert sources == ["threshnet_fast/csrc/schemas.cpp"]
            file.extractall(tmp_path / "site")
        schemas = (tmp_path / "site/threshnet_fast/csrc/schemas.cpp").read_text()
        assert schemas == (tree / "csrc/schemas.cpp").read_text()
        code = (
            "import torch\n"
            f"torch.ops.load_library({str(tmp_path / 'site/threshnet_fast/_C.abi3.so')!r})\n"
            "print(torch.ops.threshnet_fast_tiny.value())"
        )
        assert output_of(run_python(code)).strip() == "3"

    def test_editable_maps_kernels_into_the_package(self, tree, tmp_path):
        (tree / "threshnet_fast/_C.abi3.so").write_bytes(b"stale")
        run = call_backend(tree, f"build_editable({str(tmp_path)!r})", THRESHNET_FAST_NO_EXT="1")
        output_of(run)
        assert not (tree / "threshnet_fast/_C.abi3.so").exists()
        (archive,) = tmp_path.glob("*.whl")
        site_folder = tmp_path / "site"
        zipfile.ZipFile(archive).extractall(site_folder)
        # Without site, the editable install that runs this test is not seen; torch still is.
        code = (
            "import importlib.util, site, sys\n"
            f"site.addsitedir({str(site_folder)!r})\n"
            f"sys.path.append({str(Path(torch.__file__).parents[1])!r})\n"
            "import threshnet_fast.kernels.example as example\n"
            "print(example.__file__, example.ANSWER, importlib.util.find_spec('kernels'))"
        )
        expected = f"{tree / 'kernels/example.py'} 42 None"
        assert output_of(run_python(code, "-S", cwd=tmp_path)).strip() == expected


def run_python(code, *options, cwd=None):
    """Runs ``code`` in a fresh interpreter."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)


class TestCompiler:
    def test_none_means_pure_python(self, tree, tmp_path):
        run = call_backend(tree, f"build_wheel({str(tmp_path)!r})", PATH=str(tmp_path))
        text = output_of(run)
        assert text.count("WARNING") == 1
        assert "without its C++ extension: no C++17 compiler was found" in text
        assert [path.name for path in tmp_path.glob("*.whl")] == [
            "threshnet_fast-0.1.0-py3-none-any.whl"
        ]

    def test_broken_one_means_pure_python(self, tree, tmp_path):
        """A compiler that is there but compiles nothing, as without its headers."""
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "c++").write_text("#!/bin/sh\nexit 1\n")
        (tools / "c++").chmod(0o755)
        run = call_backend(tree, f"build_wheel({str(tmp_path)!r})", PATH=str(tools))
        assert "no C++17 compiler was found" in output_of(run)

    def test_named_one_must_work(self, tree, tmp_path):
        for hook in ("get_requires_for_build_wheel()", f"build_wheel({str(tmp_path)!r})"):
            run = call_backend(tree, hook, CXX="/nowhere/c++")
            assert run.returncode != 0
            assert "CXX=/nowhere/c++ does not compile C++17" in run.stderr

    @needs_compiler
    def test_error_in_our_sources_is_an_error(self, tree, tmp_path):
        (tree / "csrc/cpu/broken.cpp").write_text("#error this does not compile\n")
        run = call_backend(tree, f"build_wheel({str(tmp_path)!r})")
        text = run.stdout + run.stderr
        assert run.returncode != 0
        assert "this does not compile" in text
        assert "without its C++ extension" not in text
        assert list(tmp_path.glob("*.whl")) == []

    @needs_compiler
    def test_missing_definition_is_an_error(self, tree, tmp_path):
        with (tree / "csrc/schemas.cpp").open("a") as file:
            file.write("int missing();\nint user() { return missing(); }\n")
        text = (tree / "csrc/schemas.cpp").read_text()
        (tree / "csrc/schemas.cpp").write_text(text.replace("return VALUE", "return user()"))
        (tree / "csrc/cpu/value.h").write_text("int user();\n")
        run = call_backend(tree, f"build_wheel({str(tmp_path)!r})")
        assert run.returncode != 0
        assert "missing()" in run.stdout + run.stderr

    @needs_compiler
    def test_missing_sources_are_an_error(self, tree, tmp_path):
        (tree / "csrc/schemas.cpp").unlink()
        run = call_backend(tree, f"build_wheel({str(tmp_path)!r})")
        assert run.returncode != 0
        assert "schemas.cpp is missing" in run.stderr

    @needs_compiler
    def test_missing_torch_is_an_error(self, tree):
        """As without build isolation in an environment that has no torch."""
        text = (tree / "setup.py").read_text(encoding="utf-8")
        (tree / "setup.py").write_text("import sys\nsys.modules['torch'] = None\n" + text)
        run = call_backend(tree, "build_wheel('.')")
        assert run.returncode != 0
        assert "needs torch >= 2.10" in run.stderr
        assert "THRESHNET_FAST_NO_EXT=1" in run.stderr

    @needs_compiler
    @pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no-ninja"])
    def test_changed_header_is_compiled(self, tree, tmp_path, ninja):
        if ninja and shutil.which("ninja") is None:
            pytest.skip("no ninja")
        changes = {}
        if not ninja:
            tools = tmp_path / "bin"
            tools.mkdir()
            for name in ("c++", "g++", "clang++", "as", "ld"):
                if shutil.which(name):
                    (tools / name).symlink_to(shutil.which(name))
            changes["PATH"] = str(tools)
        library = tree / "threshnet_fast/_C.abi3.so"

        def build():
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            run = subprocess.run(
                command, cwd=tree, env=environment(**changes), capture_output=True, text=True
            )
            return output_of(run)

        def value():
            code = (
                f"import torch; torch.ops.load_library({str(library)!r}); "
                "print(torch.ops.threshnet_fast_tiny.value())"
            )
            return int(output_of(run_python(code)))

        assert "schemas.cpp" in build()
        assert value() == 3
        assert "schemas.cpp" not in build()
        # Time stamps of some file systems are coarse.
        time.sleep(0.1)
        (tree / "csrc/cpu/value.h").write_text("#pragma once\n#define VALUE 4\n")
        assert "schemas.cpp" in build()
        assert value() == 4


class TestCuda:
    """The whole way through setup.py; tests/test_cuda_build.py looks at its parts."""

    libraries = frozenset(
        {
            "threshnet_fast/_C.abi3.so",
            "threshnet_fast/_C_cuda.abi3.so",
            "threshnet_fast/include/threshnet_fast.h",
            "threshnet_fast/lib/libthreshnet_fast_cuda.so",
        }
    )

    def compiled_files(self, folder):
        """What a build leaves in the package's folder."""
        package = folder / "threshnet_fast"
        paths = (path for path in package.rglob("*") if path.suffix in (".so", ".h"))
        return {path.relative_to(folder).as_posix() for path in paths}

    @needs_nvcc
    def test_wheel(self, cuda_tree, tmp_path):
        hook = f"build_wheel({str(tmp_path)!r})"
        run = call_backend(cuda_tree, hook, THRESHNET_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
        assert "CUDA kernels for 8.0\n" in output_of(run)
        (archive,) = tmp_path.glob("threshnet_fast-0.1.0-cp310-abi3-*.whl")
        site_folder = tmp_path / "site"
        zipfile.ZipFile(archive).extractall(site_folder)
        assert self.compiled_files(site_folder) == self.libraries
        # The next wheel is put together in the same folder; nothing of this one is in it.
        other = tmp_path / "other"
        output_of(call_backend(cuda_tree, f"build_wheel({str(other)!r})", THRESHNET_FAST_CUDA="0"))
        (archive,) = other.glob("threshnet_fast-0.1.0-cp310-abi3-*.whl")
        names = set(zipfile.ZipFile(archive).namelist())
        assert self.libraries & names == {"threshnet_fast/_C.abi3.so"}
        # Away from where it was linked, the one still finds the other.
        shutil.rmtree(cuda_tree / "build")
        code = (
            "import torch\n"
            f"torch.ops.load_library({str(site_folder / 'threshnet_fast/_C_cuda.abi3.so')!r})\n"
            "print(torch._C._dispatch_has_kernel_for_dispatch_key("
            "'threshnet_fast_tiny_cuda::run', 'CUDA'))"
        )
        assert output_of(run_python(code)).strip() == "True"

    @needs_nvcc
    def test_editable_and_then_without(self, cuda_tree, tmp_path):
        hook = f"build_editable({str(tmp_path)!r})"
        run = call_backend(cuda_tree, hook, TORCH_CUDA_ARCH_LIST="8.0")
        assert "-c csrc/cuda/kernel.cu" in output_of(run)
        assert self.compiled_files(cuda_tree) == self.libraries
        run = call_backend(cuda_tree, hook, TORCH_CUDA_ARCH_LIST="8.0")
        assert "-c csrc/cuda/kernel.cu" not in output_of(run)
        assert self.compiled_files(cuda_tree) == self.libraries
        text = output_of(call_backend(cuda_tree, hook, THRESHNET_FAST_CUDA="0"))
        assert "built without its CUDA kernels: THRESHNET_FAST_CUDA=0 is set" in text
        assert self.compiled_files(cuda_tree) == {"threshnet_fast/_C.abi3.so"}

    @needs_nvcc
    def test_failure_is_an_error(self, cuda_tree, tmp_path):
        with (cuda_tree / "csrc/cuda/kernel.cu").open("a") as file:
            file.write("#error this does not compile\n")
        hook = f"build_wheel({str(tmp_path)!r})"
        run = call_backend(cuda_tree, hook, TORCH_CUDA_ARCH_LIST="8.0")
        assert run.returncode != 0
        assert "this does not compile" in run.stdout + run.stderr
        assert "THRESHNET_FAST_CUDA=0 leaves them out" in run.stderr
        assert list(tmp_path.glob("*.whl")) == []

    @needs_compiler
    def test_no_nvcc(self, cuda_tree, tmp_path):
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in ("c++", "g++", "clang++", "as", "ld"):
            if shutil.which(name):
                (tools / name).symlink_to(shutil.which(name))
        hook = f"build_wheel({str(tmp_path)!r})"
        text = output_of(call_backend(cuda_tree, hook, PATH=str(tools)))
        assert text.count("NOTE: threshnet_fast is built without its CUDA kernels: no nvcc") == 1
        assert "WARNING" not in text
        (archive,) = tmp_path.glob("*.whl")
        names = zipfile.ZipFile(archive).namelist()
        assert self.libraries & set(names) == {"threshnet_fast/_C.abi3.so"}
        run = call_backend(cuda_tree, hook, PATH=str(tools), THRESHNET_FAST_CUDA="1")
        assert run.returncode != 0
        assert "THRESHNET_FAST_CUDA=1 asks for the CUDA kernels, but no nvcc" in run.stderr

    def test_asked_for_in_pure_python(self, cuda_tree, tmp_path):
        changes = {"THRESHNET_FAST_CUDA": "1", "THRESHNET_FAST_NO_EXT": "1"}
        run = call_backend(cuda_tree, f"build_wheel({str(tmp_path)!r})", **changes)
        assert run.returncode != 0
        assert "THRESHNET_FAST_CUDA=1 needs the C++ extension" in run.stderr
