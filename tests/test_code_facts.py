"""What Python and C++ both say: each has it in one place, and the two agree."""

import ast
import importlib
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from threshnet_fast.plan import codes, limits

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
# A function of this name hides the module in its package.
serialize = importlib.import_module("threshnet_fast.plan.serialize")


def enum(name):
    """The names and values of an enum of csrc/codes.h."""
    text = (CSRC / "codes.h").read_text(encoding="utf-8")
    (body,) = re.findall(rf"enum (?:class )?{name} : int64_t \{{(.*?)\}};", text, re.DOTALL)
    return {key: int(value) for key, value in re.findall(r"(k\w+) = (\d+)", body)}


def constants(header):
    """The constants of a header that are calculated from numbers alone."""
    text = (CSRC / header).read_text(encoding="utf-8")
    found = {}
    for name, value in re.findall(r"constexpr int64_t (k\w+) = ([^;]+);", text):
        expression = re.sub(r"int64_t\{(\d+)\}", r"\1", value)
        if re.fullmatch(r"[-\dxa-fA-F<()+* ]+", expression):
            found[name] = eval(compile(ast.parse(expression, mode="eval"), header, "eval"))
    return found


def python_constant(path, name):
    """A number of a module, which may need what is not installed."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no {name}")


def test_limits():
    numbers = constants("kernel_limits.h")
    assert numbers == {
        "kGroupChannels": limits.GROUP,
        "kMostPixels": limits.MAX_PIXELS,
        "kMostTaps": limits.MAX_TAPS,
    }
    assert python_constant("kernels/layout.py", "GROUP") == limits.GROUP


def test_description():
    numbers = constants("plan.h")
    assert numbers["kDescriptionMagic"] == serialize._MAGIC
    assert numbers["kDescriptionVersion"] == serialize._VERSION
    assert (numbers["kNetworkInput"], numbers["kNetworkOutput"]) == (
        serialize._INPUT,
        serialize._OUTPUT,
    )
    assert numbers["kMostChannels"] == limits._MAX_CHANNELS
    assert enum("PlanStepKind") == {
        "kConvolution": codes.CONVOLUTION,
        "kPool": codes.POOL,
        "kDepthwise": codes.DEPTHWISE,
        "kPointwise": codes.POINTWISE,
        "kResize": codes.RESIZE,
    }
    assert numbers["kFirstExternal"] == serialize._FIRST_EXTERNAL
    names = {mode.title().replace("-", ""): code for mode, code in codes.RESIZE_MODES.items()}
    assert {name[1:]: code for name, code in enum("ResizeMode").items()} == names


def test_activations():
    names = {"kIdentity": "", "kRelu": "relu", "kRelu6": "relu6", "kLeakyRelu": "leaky_relu"}
    names |= {"kSilu": "silu", "kHardswish": "hardswish", "kSigmoid": "sigmoid"}
    assert {names[name]: code for name, code in enum("Activation").items()} == codes.ACTIVATIONS


def test_algorithms():
    titles = {
        "kDirect": "direct",
        "kPacked": "packed",
        "kWinograd2": "winograd F(2x2, 3x3)",
        "kWinograd4": "winograd F(4x4, 3x3)",
    }
    found = enum("Algorithm")
    assert sorted(found.values()) == list(range(len(codes.ALGORITHMS)))
    assert {titles[name]: code for name, code in found.items()} == {
        title: code for code, title in enumerate(codes.ALGORITHMS)
    }


def test_instruction_sets():
    """Every code has one row of kinds, whose table has the name that Python calls it by."""
    folder = CSRC / "cpu/ukernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cpp")))
    tables = re.findall(r'UkernelTable<Element> (k\w+) =\s+table_of\(\{"(\w+)"', sources)
    rows = re.findall(r" kind\((k\w+), \w+, (k\w+),", (folder / "kinds.cpp").read_text("utf-8"))
    found = enum("Isa")
    assert sorted(found.values()) == list(range(len(codes.ISAS)))
    names = dict(tables)
    assert len(tables) == len(rows) == len(codes.ISAS)
    assert {codes.ISAS[found[isa]]: names[table] for isa, table in rows} == {
        name: name for name in codes.ISAS
    }


WINDOWS = [
    (size, (size + 2 * padding - kernel) // stride + 1, kernel, stride, padding)
    for size, kernel, stride, padding in product(range(1, 8), range(1, 8), range(1, 4), range(7))
    if size + 2 * padding >= kernel
]


def meeting(size, out_size, kernel, stride, padding):
    """The taps that meet a pixel, found one by one."""
    return [
        tap
        for tap in range(kernel)
        if any(0 <= output * stride - padding + tap < size for output in range(out_size))
    ]


def test_live_taps():
    for window in WINDOWS:
        taps = meeting(*window)
        expected = (taps[0], taps[-1] + 1) if taps else (0, 0)
        assert limits.live_taps(*window) == expected, window


def test_live_taps_of_triton():
    pytest.importorskip("triton")
    from threshnet_fast.kernels import implicit_gemm

    for window in WINDOWS:
        first, count = implicit_gemm.live_taps(*window)
        assert (first, first + count) == limits.live_taps(*window), window


def test_live_and_valid_taps_of_cpp(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "taps.cpp"
    source.write_text(
        '#include <cstdio>\n#include "kernel_limits.h"\n'
        "using namespace threshnet_fast;\n"
        "int main() {\n"
        "  long size, out, kernel, stride, padding;\n"
        '  while (std::scanf("%ld %ld %ld %ld %ld", &size, &out, &kernel, &stride, &padding) == 5) '
        "{\n"
        "    const TapRange live = live_taps(size, out, kernel, stride, padding);\n"
        '    std::printf("%ld %ld", long(live.begin), long(live.end));\n'
        "    for (long o = 0; o < out; ++o) {\n"
        "      const TapRange valid = valid_taps(o * stride - padding, size, kernel);\n"
        "      for (long tap = valid.begin; tap < valid.end; ++tap)\n"
        '        std::printf(" %ld", o * stride - padding + tap);\n'
        "    }\n"
        '    std::printf("\\n");\n'
        "  }\n"
        "}\n"
    )
    program = tmp_path / "taps"
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", source, "-o", program], check=True)
    lines = "".join(" ".join(map(str, window)) + "\n" for window in WINDOWS)
    run = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    for window, line in zip(WINDOWS, run.stdout.splitlines(), strict=True):
        begin, end, *pixels = map(int, line.split())
        assert (begin, end) == limits.live_taps(*window), window
        size, out_size, kernel, stride, padding = window
        assert pixels == [
            output * stride - padding + tap
            for output in range(out_size)
            for tap in range(kernel)
            if 0 <= output * stride - padding + tap < size
        ], window
