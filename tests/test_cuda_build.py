"""How the CUDA kernels are built, and what their library promises to those who load it.

Nothing here needs a GPU. What compiles needs nvcc, and what looks at the library needs the package
to be installed with it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import threshnet_fast
from threshnet_fast import extension
from threshnet_fast.plan.file import save_plan

ROOT = Path(__file__).resolve().parents[1]

KNOWN = [75, 80, 86, 89, 90, 100, 103, 120, 121]
VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "NVCC_CCBIN",
    "THRESHNET_FAST_CUDA",
    "TORCH_CUDA_ARCH_LIST",
)


@pytest.fixture
def nvcc(monkeypatch):
    """The module of the build backend, in an environment that steers nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    monkeypatch.delitem(sys.modules, "nvcc", raising=False)
    import nvcc

    return nvcc


def put_nvcc(folder, version="13.0", architectures=KNOWN):
    """Makes a toolkit's folder with a program that answers as nvcc does."""
    path = folder / "bin/nvcc"
    path.parent.mkdir(parents=True)
    names = " ".join(f"compute_{number}" for number in architectures)
    path.write_text(
        "#!/bin/sh\n"
        f"if [ $1 = --version ]; then echo 'Cuda tools, release {version}, V{version}.88'; fi\n"
        f"if [ $1 = --list-gpu-arch ]; then printf '%s\\n' {names}; fi\n"
    )
    path.chmod(0o755)
    return path


class TestArchitectures:
    @pytest.mark.parametrize(
        ("known", "expected"),
        [
            (KNOWN, "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
            ([50, 60, 70, 75, 80, 86, 87, 89, 90], "7.5 8.0 8.6 9.0+PTX"),
            ([90, 100, 140], "9.0 10.0+PTX"),
        ],
    )
    @pytest.mark.parametrize("text", ["", " ", ";"])
    def test_default_is_what_nvcc_knows(self, nvcc, known, expected, text):
        chosen = nvcc.choose_architectures(text, known)
        assert " ".join(map(str, chosen)) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8.0", "8.0"),
            ("8.0;9.0+PTX", "8.0 9.0+PTX"),
            (" 8.0 8.6,12.0 ", "8.0 8.6 12.0"),
            ("9.0a", "9.0a"),
            ("10.0f+PTX", "10.0f+PTX"),
            ("9.0 9.0a 9.0+PTX", "9.0+PTX 9.0a"),
            ("8.0+PTX;8.0", "8.0+PTX"),
            # As in images whose torch serves older GPUs than the kernels do.
            ("5.2 6.0 7.0 8.0", "8.0"),
        ],
    )
    def test_list(self, nvcc, text, expected):
        assert " ".join(map(str, nvcc.choose_architectures(text, KNOWN))) == expected

    @pytest.mark.parametrize("entry", ["Hopper", "90", "sm_90", "8.0+ptx", "9.0b", "All", "8."])
    def test_entry_that_is_not_understood(self, nvcc, entry):
        with pytest.raises(ValueError, match="is not understood") as caught:
            nvcc.choose_architectures(f"8.0;{entry}", KNOWN)
        assert repr(entry) in str(caught.value)
        assert "TORCH_CUDA_ARCH_LIST" in str(caught.value)

    def test_architecture_that_nvcc_does_not_know(self, nvcc):
        with pytest.raises(ValueError, match=r"nvcc does not compile for '13\.0', only for 7\.5"):
            nvcc.choose_architectures("8.0 13.0", KNOWN)

    def test_nothing_left(self, nvcc):
        with pytest.raises(ValueError, match=r"names no architecture of 7\.5 or newer"):
            nvcc.choose_architectures("6.0;7.0+PTX", KNOWN)
        with pytest.raises(ValueError, match="compiles for none of"):
            nvcc.choose_architectures("", [50, 60])

    def test_flags(self, nvcc):
        chosen = nvcc.choose_architectures("8.0;9.0a;12.0+PTX", KNOWN)
        assert [architecture.flag for architecture in chosen] == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_120,code=[compute_120,sm_120]",
        ]


class TestDiscovery:
    def test_order(self, nvcc, monkeypatch, tmp_path):
        home, path, searched = (put_nvcc(tmp_path / name) for name in ("home", "path", "searched"))
        monkeypatch.setenv("PATH", str(searched.parent))
        assert nvcc.find_nvcc() == str(searched)
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
        assert nvcc.find_nvcc() == str(path)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert nvcc.find_nvcc() == str(home)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "without"))
        assert nvcc.find_nvcc() == str(path)

    def test_what_it_knows(self, nvcc, tmp_path):
        path = str(put_nvcc(tmp_path, "12.4", [90, 75, 80]))
        assert nvcc.version_of(path) == (12, 4)
        assert nvcc.known_architectures(path) == [75, 80, 90]

    def test_used_where_it_is_found(self, nvcc, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        put_nvcc(tmp_path, "12.0")
        assert nvcc.left_out_reason() is None
        monkeypatch.setenv("THRESHNET_FAST_CUDA", "1")
        assert nvcc.left_out_reason() is None
        monkeypatch.setenv("THRESHNET_FAST_CUDA", "0")
        assert nvcc.left_out_reason() == "THRESHNET_FAST_CUDA=0 is set"

    def test_switch_that_is_not_understood(self, nvcc, monkeypatch):
        monkeypatch.setenv("THRESHNET_FAST_CUDA", "yes")
        with pytest.raises(RuntimeError, match="THRESHNET_FAST_CUDA=yes is not understood"):
            nvcc.left_out_reason()

    @pytest.mark.parametrize("case", ["none", "old", "broken"])
    def test_no_usable_nvcc(self, nvcc, monkeypatch, tmp_path, case):
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        if case != "none":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path))
            path = put_nvcc(tmp_path, "11.8")
            if case == "broken":
                path.write_text("#!/bin/sh\nexit 1\n")
        expected = {
            "none": "no nvcc was found (by CUDA_HOME, CUDA_PATH and PATH)",
            "old": f"{tmp_path}/bin/nvcc is of CUDA 11.8, and 12.0 or newer is needed",
            "broken": f"{tmp_path}/bin/nvcc does not run",
        }[case]
        assert nvcc.left_out_reason() == expected
        monkeypatch.setenv("THRESHNET_FAST_CUDA", "1")
        with pytest.raises(RuntimeError) as caught:
            nvcc.left_out_reason()
        assert str(caught.value) == (
            f"THRESHNET_FAST_CUDA=1 asks for the CUDA kernels, but {expected}"
        )

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("g++", ["-ccbin=g++"]),
            ("/opt/bin/ccache g++-12 -m64", ["-ccbin=g++-12", "-Xcompiler=-m64"]),
            ("ccache", ["-ccbin=ccache"]),
        ],
    )
    def test_host_compiler(self, nvcc, monkeypatch, command, expected):
        assert nvcc.host_compiler_options(command) == expected
        monkeypatch.setenv("NVCC_CCBIN", "g++-11")
        assert nvcc.host_compiler_options(command) == []


class TestBuilder:
    """The compilation, with a tiny kernel for one architecture."""

    @pytest.fixture
    def build(self, nvcc, tmp_path, capsys):
        """Function that builds and returns the library and the names of what was made for it."""
        compiler = nvcc.find_nvcc()
        if compiler is None:
            pytest.skip("no nvcc")
        (tmp_path / "a source").mkdir()
        (tmp_path / "a source/value.h").write_text("#define VALUE 3\n")
        (tmp_path / "a source/kernel.cu").write_text(
            '#include "value.h"\n'
            "__global__ void kernel(float* x) { *x = VALUE; }\n"
            "void hidden(float* x) { kernel<<<1, 1>>>(x); }\n"
        )
        (tmp_path / "a source/host.cpp").write_text(
            "void hidden(float*);\n"
            '__attribute__((visibility("default"))) void shown(float* x) { hidden(x); }\n'
        )

        def run(*options):
            builder = nvcc.Builder(
                compiler,
                tmp_path,
                tmp_path / "objects",
                [*nvcc.FLAGS, "-gencode=arch=compute_80,code=sm_80", *options],
                nvcc.LINK_FLAGS,
                2,
            )
            capsys.readouterr()
            library = builder.build(["a source/host.cpp", "a source/kernel.cu"], "libtiny.so")
            made = re.findall(r" -o .*?([\w.]+)\.\d+'?$", capsys.readouterr().out, re.MULTILINE)
            return library, set(made)

        return run

    def test_only_what_changed_is_made(self, build, tmp_path):
        host, kernel, linked = "source.host.cpp.o", "source.kernel.cu.o", "libtiny.so"
        library, made = build()
        assert made == {host, kernel, linked}
        assert library == tmp_path / "objects/libtiny.so"
        assert build()[1] == set()
        (tmp_path / "a source/value.h").write_text("#define VALUE 4\n")
        assert build()[1] == {kernel, linked}
        (tmp_path / "objects/a source.host.cpp.o").unlink()
        assert build()[1] == {host, linked}
        assert build("-DOTHER")[1] == {host, kernel, linked}
        assert build("-DOTHER")[1] == set()
        names = {path.name for path in (tmp_path / "objects").iterdir()}
        assert {name for name in names if re.search(r"\.\d+$", name)} == set()

    def test_error(self, build, tmp_path):
        with (tmp_path / "a source/kernel.cu").open("a") as file:
            file.write("#error this does not compile\n")
        with pytest.raises(RuntimeError, match="this does not compile") as caught:
            build()
        assert "THRESHNET_FAST_CUDA=0 leaves them out" in str(caught.value)
        assert not (tmp_path / "objects/libtiny.so").exists()

    def test_missing_definition(self, build, tmp_path):
        with (tmp_path / "a source/host.cpp").open("a") as file:
            file.write("void missing(); void user() { missing(); }\n")
        with pytest.raises(RuntimeError, match=r"missing\(\)"):
            build()

    def test_spilled_registers(self, build, nvcc, tmp_path):
        (tmp_path / "a source/kernel.cu").write_text(
            "__global__ void __launch_bounds__(1024) kernel(float* x) {\n"
            "  float a[100];\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 100; ++i) a[i] = x[i * 1024 + threadIdx.x];\n"
            "  __syncthreads();\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 100; ++i) x[i * 1024 + threadIdx.x] = a[i] * a[i * 7 % 100];\n"
            "}\n"
            "void hidden(float* x) { kernel<<<1, 1>>>(x); }\n"
        )
        with pytest.raises(RuntimeError, match="Registers are spilled"):
            build("-Werror=all-warnings")
        assert build()[0].is_file()


def read(*command):
    """What a tool of the binary utilities prints."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(library):
    """The libraries that a library asks the loader for."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", read("readelf", "-d", library))


def run_python(code):
    """Runs ``code`` in a fresh interpreter, which sees no device, and returns what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


class TestInstalledLibrary:
    """What the package was installed with."""

    @pytest.fixture
    def library(self):
        path = extension.cuda_library_path()
        if path is None:
            pytest.skip(str(extension.cuda_left_out_reason()))
        return path

    @pytest.fixture
    def operators(self, library):
        path = extension._CUDA.path()
        assert path is not None
        return path

    def test_exports_its_interfaces_alone(self, library):
        """The C API, the few C++ functions that the operators call, and what all export of std."""
        lines = read("nm", "-D", "--defined-only", library).splitlines()
        kinds = {name: kind for _, kind, name in map(str.split, lines)}
        own = {name for name in kinds if not re.match(r"_ZZ?N?K?S|_ZN9__gnu_cxx", name)}
        # Neither data nor a template's or an inline function, of which others may have their own.
        assert {name: kind for name, kind in kinds.items() if name in own and kind != "T"} == {}
        header = (ROOT / "csrc/threshnet_fast.h").read_text(encoding="utf-8")
        interface = set(re.findall(r"^THRESHNET_FAST_API [^;]*?\b(\w+)\(", header, re.MULTILINE))
        assert {"threshnet_fast_version", "threshnet_fast_load"} <= interface
        assert {name for name in own if not name.startswith("_Z")} == interface
        functions = own - interface
        assert any(name.startswith("_ZN14threshnet_fast4cuda7compile") for name in functions)
        for name in functions:
            assert re.match("_ZNK?14threshnet_fast4cuda", name), name

    def test_needs_neither_torch_nor_a_toolkit(self, library):
        names = [name for name in needed(library) if not name.startswith("ld-linux")]
        allowed = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+"
        assert names
        assert [name for name in names if not re.fullmatch(allowed, name)] == []

    def test_operators_need_no_cuda_of_torch(self, operators, library):
        """So they load beside the torch without CUDA, and one build serves every torch."""
        names = needed(operators)
        assert library.name in names
        assert "libtorch_cpu.so" in names
        assert [name for name in names if "cuda" in name] == [library.name]
        assert re.search(r"\(RUNPATH\).*\[\$ORIGIN/lib\]", read("readelf", "-d", operators))

    def test_operators_use_only_the_stable_abi(self, operators):
        lines = read("nm", "-D", "--undefined-only", operators).splitlines()
        symbols = [line.split()[-1].split("@")[0] for line in lines]
        assert [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
        unstable = re.compile(r"^_Z\w*(2at|3c10|5torch)|^_?Py|^cuda|^cu[A-Z]")
        assert [name for name in symbols if unstable.match(name)] == []

    def test_loads_without_a_device(self, operators):
        loaded = "from threshnet_fast import extension\nprint(extension.cuda_unavailable_reason())"
        assert run_python(loaded) == "None"

    def test_registers(self, operators):
        """For CUDA what has tensors on the device, for every device what has none."""
        code = (
            "import torch\n"
            "from threshnet_fast import extension\n"
            "assert extension.load_cuda(), extension.cuda_unavailable_reason()\n"
            "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
            "for name in extension.schemas()[extension.CUDA_NAMESPACE]:\n"
            "    operator = f'{extension.CUDA_NAMESPACE}::{name}'\n"
            "    keys = ('CPU', 'CUDA', 'CompositeExplicitAutograd', 'CompositeImplicitAutograd')\n"
            "    print(name, *(key for key in keys if has(operator, key)))"
        )
        registered = dict(line.split(" ", 1) for line in run_python(code).splitlines())
        on_device = {"cat_bn_relu_conv", "cat_conv_bn_relu", "pack_weights", "run_plan"}
        assert on_device < set(registered)
        assert registered == {
            name: "CUDA" if name in on_device else "CompositeExplicitAutograd"
            for name in registered
        }

    def test_refuses_tensors_on_the_cpu(self, operators):
        message = run_python(
            "import torch\n"
            "from threshnet_fast import extension\n"
            "assert extension.load_cuda(), extension.cuda_unavailable_reason()\n"
            "x, ones = torch.randn(1, 16, 4, 4), torch.ones(16)\n"
            "try:\n"
            "    torch.ops.threshnet_fast_cuda.cat_bn_relu_conv(\n"
            "        [x], ones, ones, torch.randn(16, 16, 1, 1), 1, 0)\n"
            "except NotImplementedError as error:\n"
            "    print(error)"
        )
        assert "threshnet_fast_cuda::cat_bn_relu_conv" in message
        assert "only available for these backends: [CUDA" in message

    def test_says_what_cuda_says_without_a_device(self, library, tmp_path):
        """A program without torch gets CUDA's own words."""
        network = threshnet_fast.ThreshNet(
            first_channels=(8, 16),
            blocks=(2,),
            transitions=(16,),
            downsample=(False,),
            threshold=1,
            growth_rates=(8,),
            num_classes=3,
        )
        path = tmp_path / "network.plan"
        save_plan(network.eval(), (1, 3, 32, 32), path)
        status, network, message = run_python(
            "import ctypes\n"
            f"library = ctypes.CDLL({str(library)!r})\n"
            "library.threshnet_fast_last_error.restype = ctypes.c_char_p\n"
            "network = ctypes.c_void_p(1)\n"
            f"print(library.threshnet_fast_load({str(path).encode()!r}, 0, 0, "
            "ctypes.byref(network)))\n"
            "print(network.value)\n"
            "print(library.threshnet_fast_last_error().decode())"
        ).splitlines()
        assert int(status) == 2
        assert network == "None"
        words = "no CUDA-capable device is detected|CUDA driver version is insufficient .*"
        assert re.fullmatch(f"threshnet_fast: .+: ({words})", message), message
