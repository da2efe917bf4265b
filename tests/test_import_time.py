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


def test_loads_no_shared_library_and_no_device(imported):
    assert imported["libraries"] == []
    assert imported["mapped"] is False
    assert imported["cuda"] is False
