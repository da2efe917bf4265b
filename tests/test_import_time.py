"""What importing the package costs, measured in what it loads: the time is printed, not judged."""

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({{
    "new": sorted(set(sys.modules) - before),
    "ours": sorted(name for name in sys.modules if name.split(".")[0] == "threshnet_fast"),
    "seconds": seconds,
    "libraries": [str(path) for path in torch.ops.loaded_libraries],
    "mapped": "/_C.abi3.so" in maps,
    "cuda": torch.cuda.is_initialized(),
}}))
"""


@pytest.fixture(scope="module", params=["threshnet_fast", "threshnet_fast.cli"])
def imported(request):
    """What a fresh interpreter reports after ``import torch`` and then the package."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=request.param)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert "threshnet_fast.models" in result["ours"]
    return result


def test_adds_no_third_party_module(imported, capsys):
    """Beyond what ``import torch`` loads, only the package itself and the standard library."""
    with capsys.disabled():
        print(f"\nimport over torch: {imported['seconds'] * 1e3:.1f} ms, ", end="")
        print(f"{len(imported['new'])} modules, {len(imported['ours'])} of them ours", end=" ")
    top = {name.split(".")[0] for name in imported["new"]}
    assert top - sys.stdlib_module_names == {"threshnet_fast"}


@pytest.mark.parametrize(
    "name",
    [
        "importlib.metadata",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "openvino",
        "skimage",
        "torch._dynamo",
        "torch._inductor",
        "torch.utils.cpp_extension",
        "tqdm",
        "triton",
    ],
)
def test_leaves_alone(imported, name):
    assert [new for new in imported["new"] if new == name or new.startswith(f"{name}.")] == []


def test_leaves_other_programs_hook_alone():
    program = "import sys, threshnet_fast; sys.exit(sys.excepthook is not sys.__excepthook__)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("module", "interrupted"),
    [
        ("threshnet_fast.cli", "nn"),
        ("threshnet_fast.train", "nn"),
        ("threshnet_fast.cli", "cli.bench"),
    ],
)
def test_interruption_of_a_command_that_still_imports_is_one_line(tmp_path, module, interrupted):
    """A finder of modules takes the place of the user who presses Ctrl-C."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *others):\n"
        f"        if name == 'threshnet_fast.{interrupted}':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", module, *(["info", "threshnet79"] if "cli" in module else [])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert (run.returncode, run.stderr) == (130, "threshnet-fast: error: interrupted\n")


def test_loads_no_shared_library_and_no_device(imported):
    assert imported["libraries"] == []
    assert imported["mapped"] is False
    assert imported["cuda"] is False
