"""The loader of the compiled operators, and what the shared library promises to torch."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from threshnet_fast import extension

NAMES = set(extension.schemas()[extension.NAMESPACE])
SCHEMAS = {
    "best_isa": "() -> int",
    "cat_bn_relu_conv": "(Tensor[] xs, Tensor scale, Tensor shift, Tensor weight, int stride, "
    "int padding, int isa) -> Tensor",
    "cat_conv_bn_relu": "(Tensor[] xs, Tensor weight, Tensor scale, Tensor shift, int stride, "
    "int padding, bool relu, int isa) -> Tensor",
    "run_plan": "(Tensor x, Tensor program, Tensor packed, Tensor(a!) workspace) -> Tensor",
}


@pytest.fixture
def library():
    """The shared library's path; every test that needs it fails where it was not built."""
    path = extension.library_path()
    assert path is not None, extension.unavailable_reason()
    return path


@pytest.fixture
def unloaded(monkeypatch):
    """The loader as in a process that has not called it."""
    for part in (extension._ENGINE, extension._CUDA):
        monkeypatch.setattr(part, "_done", False)
        monkeypatch.setattr(part, "_reason", None)
    return monkeypatch


@pytest.fixture
def compile_empty():
    """Function that makes a shared library with nothing in it."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def compile_into(path):
        source = path.with_suffix(".cpp")
        source.write_text("int nothing = 0;\n")
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)

    return compile_into


def run_python(code, **environment):
    """Runs ``code`` in a fresh interpreter and returns what it printed."""
    inherited = {name: text for name, text in os.environ.items() if name != "THRESHNET_FAST_NO_EXT"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_loads():
    assert extension.load() is True
    assert extension.load() is True
    assert extension.unavailable_reason() is None


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert extension.load()
    operator = getattr(getattr(torch.ops, extension.NAMESPACE), name).default
    assert str(operator._schema) == f"{extension.NAMESPACE}::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_registers(name):
    assert extension.load()
    assert hasattr(getattr(torch.ops, extension.NAMESPACE), name)


def test_best_isa_is_a_known_level():
    assert extension.load()
    assert torch.ops.threshnet_fast_cpu.best_isa() in (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("part", "load", "reason"),
    [
        ("_ENGINE", extension.load, extension.unavailable_reason),
        ("_CUDA", extension.load_cuda, extension.cuda_unavailable_reason),
    ],
    ids=["engine", "cuda"],
)
def test_threads_load_it_once(unloaded, part, load, reason):
    calls = []

    def slow_load():
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return "a reason"

    unloaded.setattr(getattr(extension, part), "_load", slow_load)
    barrier = threading.Barrier(8)
    results = []

    def work():
        barrier.wait()
        results.append((load(), reason()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(False, "a reason")] * 8
    assert len(calls) == 1


@pytest.mark.parametrize("value", ["1", "true"])
def test_switched_off(unloaded, value):
    unloaded.setenv("THRESHNET_FAST_NO_EXT", value)
    assert extension.load() is False
    assert "THRESHNET_FAST_NO_EXT" in extension.unavailable_reason()
    assert extension.load_cuda() is False
    assert extension.cuda_unavailable_reason() == extension.unavailable_reason()
    assert extension.cuda_left_out_reason() == extension.unavailable_reason()


@pytest.mark.parametrize("value", ["", "0"])
def test_not_switched_off(unloaded, value):
    unloaded.setenv("THRESHNET_FAST_NO_EXT", value)
    assert extension.load() is True


def test_absent(unloaded, tmp_path):
    unloaded.delenv("THRESHNET_FAST_NO_EXT", raising=False)
    unloaded.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert extension.library_path() is None
    assert extension.load() is False
    reason = extension.unavailable_reason()
    assert "was not built" in reason
    assert "compiler" in reason
    assert "\n" not in reason


def test_cuda_absent(unloaded, tmp_path):
    unloaded.delenv("THRESHNET_FAST_NO_EXT", raising=False)
    unloaded.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert extension.cuda_library_path() is None
    assert extension.cuda_include_path() is None
    assert extension.load_cuda() is False
    reason = extension.cuda_unavailable_reason()
    assert "was not built" in reason
    assert "nvcc" in reason
    assert "THRESHNET_FAST_CUDA=0" in reason
    assert "\n" not in reason
    assert extension.cuda_left_out_reason() == reason


def test_cuda_without_the_engine(unloaded, tmp_path):
    """What is wrong with the library that it builds on is why it is unavailable."""
    unloaded.delenv("THRESHNET_FAST_NO_EXT", raising=False)
    (tmp_path / "_C_cuda.abi3.so").touch()
    unloaded.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert extension.cuda_left_out_reason() is None
    assert extension.load_cuda() is False
    assert extension.cuda_unavailable_reason() == extension.unavailable_reason()
    assert "compiler" in extension.cuda_unavailable_reason()


def test_cuda_paths(unloaded, tmp_path):
    unloaded.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    for name in ("lib/libthreshnet_fast_cuda.so", "include/threshnet_fast.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert extension.cuda_library_path() == tmp_path / "lib/libthreshnet_fast_cuda.so"
    assert extension.cuda_include_path() == tmp_path / "include"


@pytest.mark.parametrize("content", [b"", b"not a library" * 1000])
def test_broken(unloaded, tmp_path, content):
    unloaded.delenv("THRESHNET_FAST_NO_EXT", raising=False)
    path = tmp_path / "_C.abi3.so"
    path.write_bytes(content)
    unloaded.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert extension.load() is False
    reason = extension.unavailable_reason()
    assert f"{path} does not load beside torch {torch.__version__}: " in reason
    assert reason.count(str(path)) == 1
    assert "\n" not in reason


def test_library_of_another_version(tmp_path, compile_empty):
    """A library that loads but lacks operators; in a fresh process, where none is registered."""
    path = tmp_path / "_C.abi3.so"
    compile_empty(path)
    reason = run_python(
        "from threshnet_fast import extension\n"
        f"extension.__file__ = {str(tmp_path / 'extension.py')!r}\n"
        "assert extension.load() is False\n"
        "print(extension.unavailable_reason())"
    )
    assert f"{path} is not of this version" in reason
    assert all(name in reason for name in NAMES)


def load_changed(library, folder, changes):
    """Why a library of which parts of the schemas are replaced, as in an old one, is refused."""
    content = library.read_bytes()
    for old, new in changes.items():
        assert len(old) == len(new)
        assert content.count(f"{old}".encode()) == 1, old
        content = content.replace(old.encode(), new.encode())
    (folder / "_C.abi3.so").write_bytes(content)
    return run_python(
        "from threshnet_fast import extension\n"
        f"extension.__file__ = {str(folder / 'extension.py')!r}\n"
        "print(extension.load(), extension.unavailable_reason())"
    )


def test_unchanged_library(library, tmp_path):
    assert load_changed(library, tmp_path, {}) == "True None"


def test_old_library_without_an_operator(library, tmp_path):
    names = [name for name in extension.schemas()[extension.NAMESPACE] if "training_" in name]
    assert len(names) == 13
    changes = {f"{name}(": f"{name[:-1]}_(" for name in names}
    assert load_changed(library, tmp_path, changes) == (
        f"False the C++ extension {tmp_path / '_C.abi3.so'} is not of this version: it has no "
        f"operator {', '.join(names)}; reinstall threshnet_fast"
    )


def test_old_library_with_other_schemas(library, tmp_path):
    """Another argument, another type of one, another result; and one operator less."""
    changes = {
        "int threads, int winograd) -> Tensor": "int threads, int Winograd) -> Tensor",
        "read_bandwidth(Tensor memory, int threads)": "read_bandwidth(Tensor memory,bool threads)",
        "all_finite(Tensor[] tensors) -> bool": "all_finite(Tensor[] tensors) -> int ",
        "program_layout(": "program_Layout(",
    }
    assert load_changed(library, tmp_path, changes) == (
        f"False the C++ extension {tmp_path / '_C.abi3.so'} is not of this version: it has no "
        "operator program_layout and it has other arguments or results of the operator "
        "all_finite, compile_plan, read_bandwidth; reinstall threshnet_fast"
    )


def test_no_schemas_to_compare_with(library, tmp_path, unloaded):
    extension.schemas.cache_clear()
    unloaded.setattr(extension, "_SCHEMAS", (tmp_path / "csrc/schemas.cpp",))
    reason = extension.unavailable_reason()
    extension.schemas.cache_clear()
    assert f"there is no {tmp_path / 'csrc/schemas.cpp'} to compare it with" in reason
    assert "\n" not in reason


def test_reads_every_schema():
    """What is read of the sources is all that they define, and what the library registers."""
    schemas = extension.schemas()
    text = (Path(__file__).parents[1] / "csrc/schemas.cpp").read_text(encoding="utf-8")
    assert set(schemas) == {extension.NAMESPACE, extension.CUDA_NAMESPACE}
    assert sum(map(len, schemas.values())) == text.count("m.def(")
    assert extension.load()
    registered = torch._C._dispatch_get_all_op_names()
    for namespace, operators in schemas.items():
        assert {name for name in registered if name.startswith(f"{namespace}::")} == {
            f"{namespace}::{name}" for name in operators
        }


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "another version"])
def test_cuda_library_that_is_no_good(library, tmp_path, compile_empty, broken):
    """The engine's library works and defines the operators; nothing computes them."""
    shutil.copy(library, tmp_path)
    path = tmp_path / "_C_cuda.abi3.so"
    if broken:
        path.write_bytes(b"not a library" * 1000)
    else:
        compile_empty(path)
    reason = run_python(
        "from threshnet_fast import extension\n"
        f"extension.__file__ = {str(tmp_path / 'extension.py')!r}\n"
        "assert extension.load() is True, extension.unavailable_reason()\n"
        "assert extension.load_cuda() is False\n"
        "print(extension.cuda_unavailable_reason())"
    )
    if broken:
        assert f"{path} does not load beside torch {torch.__version__}: " in reason
        assert reason.count(str(path)) == 1
    else:
        assert f"{path} is not of this version" in reason
        assert all(name in reason for name in extension.schemas()[extension.CUDA_NAMESPACE])


def test_package_works_without_it(tmp_path):
    """A network runs in pure PyTorch, and asking for the cpu backend says why it is off."""
    output = run_python(
        "import torch, threshnet_fast as tf\n"
        "model = tf.ThreshNet79(num_classes=5).eval()\n"
        "with torch.no_grad():\n"
        "    print(tuple(model(torch.randn(1, 3, 32, 32)).shape))\n"
        "    try:\n"
        "        with tf.use_backend('cpu'):\n"
        "            model(torch.randn(1, 3, 32, 32))\n"
        "    except RuntimeError as error:\n"
        "        print(error)",
        THRESHNET_FAST_NO_EXT="1",
    )
    shape, _, message = output.partition("\n")
    assert shape == "(1, 5)"
    assert "THRESHNET_FAST_NO_EXT" in message


def test_links_no_python_and_no_second_openmp(library):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    text = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if name.startswith(("libpython", "libgomp", "libomp"))]
    assert "libtorch_python.so" not in needed


def test_uses_only_the_stable_abi(library):
    """One library serves every torch from 2.10: it may call torch's C functions, not its C++."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    command = [nm, "-D", "--undefined-only", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in text.splitlines() if line.split()]
    torch_calls = [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    assert torch_calls, symbols
    # Mangled names of the namespaces at, c10 and torch; Python's C API.
    unstable = re.compile(r"^_Z\w*(2at|3c10|5torch)|^_?Py")
    assert [name for name in symbols if unstable.match(name)] == []


def test_exports_nothing_of_its_own(library):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    command = [nm, "-D", "--defined-only", "--demangle", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line for line in text.splitlines() if "threshnet" in line] == []
