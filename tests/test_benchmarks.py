"""The scripts of benchmarks/ run, and the fused engine needs less memory than PyTorch."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from threshnet_fast.bench import networks, peak_memory, results, training_steps
from threshnet_fast.bench.job import Job
from threshnet_fast.bench.precision import PRECISIONS
from threshnet_fast.bench.registry import build
from threshnet_fast.engines import cpu

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def engine(one_thread, monkeypatch) -> None:
    if cpu.unavailable_reason() is not None:
        pytest.skip(str(cpu.unavailable_reason()))
    monkeypatch.syspath_prepend(FOLDER)


def run(monkeypatch, name: str, *arguments: str) -> int:
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    if hasattr(module, "main"):
        return module.main()
    return module.operators.run(
        name.removeprefix("bench_"), module.__doc__, "cat_bn" in name, module.build
    )


def without_training(folder: Path) -> list[str]:
    """Arguments of plot.py that keep it from the published measurements."""
    return ["--training-csv", str(folder / "none.csv")]


@pytest.mark.parametrize("name", ["bench_cat_bn_relu_conv", "bench_cat_conv_bn_relu"])
def test_operators(monkeypatch, tmp_path, capsys, name):
    path = tmp_path / "ops.csv"
    arguments = ["--size", "32", "--seconds", "0.01", "--threads", "1", "--csv", str(path)]
    arguments += ["--limit", "3"]
    assert run(monkeypatch, name, *arguments) == 0
    assert "speed-up" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"fused", "eager", "channels-last"}
    assert len({row["layer"] for row in rows}) == 3
    for row in rows:
        assert sum(map(int, row["segments"].split("+"))) == int(row["in_channels"])
        assert 0 < float(row["min_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) < 1e-3


@pytest.mark.parametrize("name", ["bench_cat_bn_relu_conv", "bench_cat_conv_bn_relu"])
def test_operators_on_a_gpu(monkeypatch, tmp_path, capsys, name):
    """All but the GPU: kernels are interpreted, graphs are not captured, the host's clock runs."""
    pytest.importorskip("triton")
    from emulation.interpreter import interpreted

    operators = importlib.import_module("operators")
    place = torch.device("cuda", 0)
    captured = []
    monkeypatch.setattr(operators, "check_device", lambda asked: place)
    monkeypatch.setattr(operators, "graphed", lambda call: captured.append(1) or call)
    monkeypatch.setattr(operators, "CudaTimer", lambda device: operators.host_timer)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        operators.Place, "put", lambda self, *tensors: [t.to(self.dtype) for t in tensors]
    )
    monkeypatch.setattr(operators.Place, "put_parameters", lambda self, *tensors: list(tensors))
    for function, answer in {"accelerator": "Test GPU", "driver": "1", "clocks": "2"}.items():
        monkeypatch.setattr(operators.machine, function, lambda device, answer=answer: answer)
    path = tmp_path / "ops.csv"
    arguments = ["--size", "32", "--seconds", "0.01", "--limit", "1", "--csv", str(path)]
    arguments += ["--device", "cuda", "--dtypes", "tf32", "float16"]
    importlib.import_module("threshnet_fast.kernels.gradients")
    with interpreted():
        assert run(monkeypatch, name, *arguments) == 0
    assert "fused-graph ms" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["fused", "eager", "channels-last", *("fused-graph", "eager-graph")]
    names.append("channels-last-graph")
    assert [(row["dtype"], row["provider"]) for row in rows] == [
        (dtype, name) for dtype in ("tf32", "float16") for name in names
    ]
    assert len(captured) == 6
    for row in rows:
        assert (row["device"], row["accelerator"]) == ("cuda", "Test GPU")
        assert (row["driver"], row["clocks"]) == ("1", "2")


def test_published_operators_are_of_a_cpu_unless_they_say_otherwise():
    operators = importlib.import_module("operators")
    with operators.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == operators.COLUMNS
    assert all(row["device"] == "cpu" or row["accelerator"] for row in rows)


def test_measurements_on_gpus_have_a_table_of_their_own(monkeypatch, tmp_path):
    table, plots = importlib.import_module("table"), importlib.import_module("plot")
    common = dict.fromkeys(results.COLUMNS, "") | {
        **{"run": "1", "model": "threshnet95", "height": "32", "width": "32", "batch": "1"},
        **{"threads": "1", "status": "ok", "time": "2030-01-02T03:04:05+00:00", "min_ms": "8.0"},
        **{"p20_ms": "8.5", "p50_ms": "9.0", "p80_ms": "9.5", "dtype": "float32", "device": "cpu"},
    }
    gpu = {"device": "cuda", "accelerator": "H100", "l2": "kept", "libraries": "CUDA 13.0"}
    gpu |= {"driver": "580.1", "dtype": "tf32", "run": "2"}
    rows = [
        common | {"provider": "eager"},
        common | gpu | {"provider": "fused", "min_ms": "0.25", "p50_ms": "0.3"},
        common | gpu | {"provider": "compile-max", "min_ms": "0.2", "p50_ms": "0.2"},
        common | gpu | {"provider": "eager-graph", "status": "out of memory"},
    ]
    rows[1] |= {"speedup_min": "0.8", "speedup_p50": "0.6667"}
    text = table.gpu(rows)
    assert (
        "| threshnet95 | 32x32, batch 1 | tf32 | 0.25 / 0.30 | failed | **0.20** / 0.20 |" in text
    )
    assert "| 0.80x / 0.67x |" in text
    assert "H100, CUDA 13.0, driver 580.1, " in text
    for other in (table.summary(rows), table.full(rows)):
        assert "H100" not in other
        assert "| **8.00**" in other
    assert table.gpu(rows[:1]) == "No measurement on a GPU has been recorded."
    results.append_rows(tmp_path / "a.csv", rows)
    drawn = []
    monkeypatch.setattr(plots, "plot", lambda kept, path: drawn.extend(kept))
    arguments = ["plot.py", "--csv", str(tmp_path / "a.csv"), "--output", str(tmp_path / "a.png")]
    arguments += ["--growth-csv", str(tmp_path / "none.csv"), *without_training(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plots.main() == 0
    assert drawn == rows[:1]


def measured(**values: str) -> dict[str, str]:
    """A row of a measurement on a CPU."""
    row = dict.fromkeys(results.COLUMNS, "") | {
        **{"run": "1", "model": "threshnet95", "height": "32", "width": "32", "batch": "1"},
        **{"threads": "2", "status": "ok", "time": "2030-01-02T03:04:05+00:00", "min_ms": "8.0"},
        **{"p20_ms": "8.5", "p50_ms": "9.0", "p80_ms": "9.5", "dtype": "float32", "device": "cpu"},
        **{"provider": "fused", "version": "1", "processor": "Test", "processors": "2"},
    }
    return row | values


def test_precisions_of_a_cpu_have_tables_and_figures_of_their_own(monkeypatch, tmp_path):
    table, plots = importlib.import_module("table"), importlib.import_module("plot")
    half = {"dtype": "bfloat16", "run": "2"}
    rows = [
        measured(min_ms="2.0", speedup_min="1.5", speedup_p50="1.4"),
        measured(provider="onnxruntime", min_ms="3.0"),
        measured(**half, version="1 bf16", min_ms="1.0", speedup_min="2.5", speedup_p50="2.4"),
        measured(**half, provider="openvino", min_ms="2.5"),
        measured(**half, provider="eager", status="wrong result"),
    ]
    assert table.summary(rows).startswith(
        "**float32**\n\n"
        "| model | input | threads | threshnet_fast | ONNX Runtime | over the best peer |\n"
        "| :-- | :-- | --: | --: | --: | --: |\n"
        "| threshnet95 | 32x32, batch 1 | 2 | **2.00** | 3.00 | 1.50x |\n\n"
        "**bfloat16**\n\n"
        "| model | input | threads | threshnet_fast | PyTorch eager | OpenVINO | "
        "over the best peer |\n"
        "| :-- | :-- | --: | --: | --: | --: | --: |\n"
        "| threshnet95 | 32x32, batch 1 | 2 | **1.00** | failed | 2.50 | 2.50x |\n\n"
        "Test (2 processors), torch , threshnet_fast 1, "
    )
    assert "Test (2 processors), torch , threshnet_fast 1 bf16, OpenVINO 1, " in table.full(rows)
    assert "| **1.00** / 9.00 | failed | 2.50 / 9.00 | 2.50x / 2.40x |" in table.full(rows)
    assert "](figures/latency-bfloat16.png)" in table.full(rows)
    assert "bfloat16" not in table.full(rows[:2])
    results.append_rows(tmp_path / "a.csv", rows)
    drawn = {}
    monkeypatch.setattr(plots, "plot", lambda kept, path: drawn.update({path.name: kept}))
    arguments = ["plot.py", "--csv", str(tmp_path / "a.csv"), "--output", str(tmp_path / "a.png")]
    arguments += ["--growth-csv", str(tmp_path / "none.csv"), *without_training(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plots.main() == 0
    assert drawn == {"a.png": rows[:2], "a-bfloat16.png": rows[2:]}


def grown() -> list[dict[str, str]]:
    """Rows of all points: the time is 1 ns a pixel, three times that at 225x225 in bfloat16."""
    script = importlib.import_module("bench_growth")
    rows = []
    for threads, cells in {1: script.THREADED, 2: script.cells()}.items():
        for height, width, batch in cells:
            for dtype in ("float32", "bfloat16"):
                for provider in ("fused", "openvino", "channels-last"):
                    odd = height == 225 and dtype == "bfloat16" and provider == "fused"
                    time = 1e-6 * height * width * batch * (3 if odd else 1) * (3 - threads)
                    memory = threads == 2 and (height, width, batch) in script.WITH_MEMORY
                    rows.append(
                        measured(
                            **{"height": str(height), "width": str(width), "batch": str(batch)},
                            **{"dtype": dtype, "provider": provider, "threads": str(threads)},
                            **{"min_ms": str(time), "peak_bytes": "50000000" if memory else ""},
                        )
                    )
    return rows


def test_modules_of_others(monkeypatch, tmp_path, capsys):
    path = tmp_path / "foreign.csv"
    arguments = ["--networks", "torchvision-densenet121", "published-hardnet39ds"]
    arguments += ["--providers", "fused", "eager", "channels-last", "--size", "64"]
    arguments += ["--seconds", "0.05", "--threads", "1", "--csv", str(path)]
    assert run(monkeypatch, "bench_foreign", *arguments) == 0
    assert "From the module to its first output: fused " in capsys.readouterr().out
    rows = results.read_rows(path, tuple(results.FOREIGN_COLUMNS))
    assert [(row["model"], row["provider"]) for row in rows] == [
        (name, provider)
        for name in ("torchvision-densenet121", "published-hardnet39ds")
        for provider in ("fused", "eager", "channels-last")
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < float(row["min_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= float(row["error_limit"])
        assert float(row["prepare_s"]) > 0
    # 2.9 G multiply-adds at 224x224, of which 1 M in the classifier.
    macs = 1024 * 1000 + (2_834_161_664 // 49) * 4
    assert int(rows[0]["macs"]) == pytest.approx(macs, rel=1e-3)


def test_table_of_modules_of_others(monkeypatch, tmp_path):
    table = importlib.import_module("table")
    monkeypatch.setattr(table, "FOREIGN", tmp_path / "foreign.csv")
    assert table.foreign([]) == "No measurement has been recorded."
    common = measured(model="fc-hardnet70", height="512", width="512", min_ms="4.0")
    rows = [
        common | {"speedup_min": "1.5", "speedup_p50": "1.25", "prepare_s": "0.84"},
        common | {"provider": "openvino", "min_ms": "6.0", "prepare_s": "2.0"},
        measured(model="unet", status="nothing is fused", prepare_s="0.5"),
    ]
    results.append_rows(tmp_path / "foreign.csv", rows, tuple(results.FOREIGN_COLUMNS))
    text = table.foreign([])
    assert "| fc-hardnet70 | 512x512, batch 1 | 2 | **4.00** / 9.00 | 6.00 / 9.00 | 1.50x" in text
    assert "| unet | 32x32, batch 1 | 2 | failed |  |  |" in text
    assert "\n\nFrom the module to the first output of `optimize`: fc-hardnet70 0.8 s.\n\n" in text
    assert "Test (2 processors), torch " in text


def test_modules_of_others_are_measured_as_they_are():
    """By their names they look like networks of this package that are cut at other places."""
    networks_of_others = importlib.import_module("foreign_networks")
    for name in ("torchvision-densenet121", "fc-hardnet70"):
        model = networks_of_others.NETWORKS[name][0]().eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(x.double())
        assert torch.equal(networks.reference_output(model, x), expected)


def test_table_of_odd_shapes(monkeypatch, tmp_path):
    table = importlib.import_module("table")
    monkeypatch.setattr(table, "GROWTH", tmp_path / "growth.csv")
    assert table.growth([]) == "No measurement has been recorded."
    rows = grown()
    for row in rows:
        if (row["height"], row["batch"], row["provider"]) == ("224", "7", "openvino"):
            row["status"] = "wrong result"
        if (row["height"], row["batch"]) == ("32", "7"):
            row["min_ms"] = str(0.9 * float(row["min_ms"]))
    results.append_rows(tmp_path / "growth.csv", rows)
    titles = ("threshnet_fast", "PyTorch channels_last", "OpenVINO")
    columns = [f"{title}, {dtype}" for dtype in ("float32", "bfloat16") for title in titles]
    lines = table.growth([]).splitlines()
    assert lines[0] == "![Growth of time and memory](figures/growth.png)"
    assert lines[2:9] == [
        f"| input | beside | {' | '.join(columns)} |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
        "| 223x223, batch 1 | 224x224, batch 1 | +0% | +0% | +0% | +0% | +0% | +0% |",
        "| 225x225, batch 1 | 224x224, batch 1 | +0% | +0% | +0% | **+200%** | +0% | +0% |",
        "| 160x288, batch 1 | 224x224, batch 1 | +0% | +0% | +0% | +0% | +0% | +0% |",
        "| 224x224, batch 7 | 224x224, batch 8 | +0% | +0% |  | +0% | +0% |  |",
        "| 32x32, batch 7 | 32x32, batch 8 | -10% | -10% | -10% | -10% | -10% | -10% |",
    ]
    assert lines[10].startswith("Test (2 processors), ")


def test_figure_of_growth(monkeypatch, tmp_path):
    plots = importlib.import_module("plot")
    from matplotlib import figure, pyplot

    seen = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))
    )
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    rows = grown()
    results.append_rows(tmp_path / "growth.csv", rows)
    results.append_rows(tmp_path / "a.csv", [measured()])
    monkeypatch.setattr(plots, "plot", lambda rows, path: None)
    arguments = ["plot.py", "--csv", str(tmp_path / "a.csv"), "--output", str(tmp_path / "a.png")]
    arguments += ["--growth-csv", str(tmp_path / "growth.csv"), *without_training(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--growth-output", str(tmp_path / "new/g.png")])
    assert plots.main() == 0
    assert (tmp_path / "new" / "g.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    panels = {axis.get_title(): axis for axis in seen[0].axes}
    assert len(panels) == 8
    assert all(len(axis.get_lines()) == 6 for axis in panels.values())
    line = panels["32x32, 2 threads"].get_lines()[0]
    assert list(line.get_xdata()) == [1, 2, 4, 7, 8, 16, 32, 64]
    assert list(line.get_ydata()) == pytest.approx([1e-6 * 32 * 32] * 8), "an image"
    rate = panels["batch 1, 2 threads"].get_lines()
    assert len(rate[0].get_xdata()) == 11 + 3
    assert list(rate[0].get_ydata()) == pytest.approx([1.0] * 14, rel=1e-2), "nanoseconds a pixel"
    assert max(rate[3].get_ydata()) == pytest.approx(3.0, rel=1e-2)
    line = panels["224x224, batch 1"].get_lines()[0]
    assert list(line.get_xdata()) == [1, 2]
    assert line.get_ydata()[0] == 2 * line.get_ydata()[1]
    memory = panels["memory, 224x224, 2 threads"].get_lines()[0]
    assert list(memory.get_xdata()) == [1, 4, 16]
    assert set(memory.get_ydata()) == {50}
    monkeypatch.undo()
    pyplot.close("all")


def test_figure_of_growth_with_some_of_the_points(tmp_path):
    plots = importlib.import_module("plot")
    plots.plot_growth([measured(), measured(status="failed")], tmp_path / "g.png")
    assert (tmp_path / "g.png").exists()
    with pytest.raises(plots.CommandError, match="no provider was timed"):
        plots.plot_growth([measured(status="failed")], tmp_path / "h.png")


def test_growth_script(monkeypatch, tmp_path):
    script = importlib.import_module("bench_growth")
    calls = []

    class Result:
        returncode = 0

    monkeypatch.setattr(script.subprocess, "run", lambda command: calls.append(command) or Result)
    path = tmp_path / "new" / "growth.csv"
    monkeypatch.setattr(sys, "argv", ["a.py", "--threads", "1", "2", "--csv", str(path)])
    assert script.main() == 0
    from threshnet_fast.cli import build_parser
    from threshnet_fast.cli.arguments import cells

    parsed = [build_parser().parse_args(call[call.index("bench") :]) for call in calls]
    assert [(a.threads, a.memory) for a in parsed] == [(1, False), (2, False), (2, True)]
    points = [cells(a) for a in parsed]
    assert points[0] == list(script.THREADED)
    assert sorted(points[1] + points[2]) == sorted(script.cells())
    assert sorted(points[2]) == sorted(script.WITH_MEMORY)
    assert {*script.ODD, *script.ODD.values()} <= set(script.cells())
    for arguments in parsed:
        assert arguments.csv == path
        assert arguments.dtype == ["float32", "bfloat16"]
        assert arguments.providers == list(script.PROVIDERS)
        assert not arguments.plot.is_relative_to(path.parent)

    calls.clear()
    monkeypatch.setattr(sys, "argv", ["a.py", "--quick", "--csv", str(path)])
    assert script.main() == 0
    (quick,) = [build_parser().parse_args(call[call.index("bench") :]) for call in calls]
    assert (quick.threads, quick.memory, len(cells(quick))) == (1, False, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_everything_for_a_gpu_stops_without_one():
    result = subprocess.run(
        ["bash", str(FOLDER / "gpu.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == f"gpu.sh: error: torch {torch.__version__} finds no CUDA device\n"
    assert result.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["bench_cat_bn_relu_conv", "bench_models"])
def test_without_a_cuda_device(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, name, "--device", "cuda")
    assert stop.value.code == 2
    assert "error: --device cuda: torch " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bench_cat_conv_bn_relu", ["--dtypes", "float16"]),
        ("bench_models", ["--dtypes", "float16"]),
        ("bench_models", ["--flush-l2"]),
        ("bench_models", ["--device", "gpu"]),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, name, arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, name, *arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_operators_cover_every_convolution():
    operators = importlib.import_module("operators")
    dense = operators.shapes("threshnet95", 64, 1, prologue=True)
    assert len(dense) == 6 + 12 + 16, "a different number of channels in every dense layer"
    assert dense[5].segments == (64, 32, 32, 32, 32, 32)
    others = operators.shapes("threshnet95", 64, 1, prologue=False)
    assert {shape.kernel for shape in others} == {1, 3}
    assert max(len(shape.segments) for shape in others) >= 5
    assert (160, 480) in {shape.segments for shape in others}


def test_operator_that_is_wrong_is_reported(monkeypatch, tmp_path, capsys):
    module = importlib.import_module("bench_cat_conv_bn_relu")

    def build(shape, batch, place):
        calls, reference = module.build(shape, batch, place)
        return calls | {"eager": lambda: reference.float() * 1.01}, reference

    monkeypatch.setattr(sys, "argv", ["a.py", "--size", "32", "--csv", str(tmp_path / "a.csv")])
    assert module.operators.run("cat_conv_bn_relu", "", False, build) == 1
    assert "error: eager is wrong for " in capsys.readouterr().err


def test_memory_script(monkeypatch, tmp_path, capsys):
    path = tmp_path / "memory.csv"
    arguments = ["--size", "64", "--batch", "2", "--threads", "1", "--csv", str(path)]
    assert run(monkeypatch, "bench_memory", *arguments, "--providers", "fused", "eager") == 0
    assert "live tensors, fused over eager: " in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["fused", "eager"]
    assert all(int(row["live_bytes"]) > 100_000 for row in rows)


def test_live_tensors_counts_what_a_call_allocates():
    memory = importlib.import_module("bench_memory")
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid())
    job = Job(model, torch.randn(1, 3, 100, 100), 1)
    one_map = 4 * 3 * 100 * 100
    assert memory.live_tensors(job, "eager") == pytest.approx(2 * one_map, rel=0.01)


def test_fused_inference_takes_less_than_half_of_the_memory():
    memory = importlib.import_module("bench_memory")
    model = networks.random_model("threshnet95", 10, 0)
    job = Job(model, torch.randn(16, 3, 224, 224), torch.get_num_threads())
    assert memory.live_tensors(job, "fused") < 0.5 * memory.live_tensors(job, "eager")


def test_model_script(monkeypatch, tmp_path):
    script = importlib.import_module("bench_models")
    calls = []

    class Result:
        returncode = 1

    monkeypatch.setattr(script.subprocess, "run", lambda command: calls.append(command) or Result)
    path = tmp_path / "new" / "models.csv"
    monkeypatch.setattr(sys, "argv", ["a.py", "--threads", "1", "2", "--csv", str(path)])
    assert script.main() == 1
    assert [command[command.index("--threads") + 1] for command in calls] == ["1", "2"]
    from threshnet_fast.cli import build_parser

    arguments = build_parser().parse_args(calls[0][calls[0].index("bench") :])
    assert arguments.model == ["threshnet95", "threshnet79"]
    assert arguments.csv == path
    assert arguments.compile
    assert arguments.memory
    assert arguments.device == torch.device("cpu")
    assert arguments.dtype == ["float32", "bfloat16"]
    assert not any("--device" in command for command in calls)


def test_model_script_on_a_gpu(monkeypatch, tmp_path):
    script = importlib.import_module("bench_models")
    calls = []

    class Result:
        returncode = 0

    monkeypatch.setattr(script.subprocess, "run", lambda command: calls.append(command) or Result)
    monkeypatch.setattr(script, "check_device", lambda place: place)
    path = tmp_path / "models.csv"
    monkeypatch.setattr(
        sys, "argv", ["a.py", "--device", "cuda:1", "--flush-l2", "--csv", str(path)]
    )
    assert script.main() == 0
    from threshnet_fast.cli import bench, build_parser
    from threshnet_fast.cli.arguments import cells

    parsed = [build_parser().parse_args(call[call.index("bench") :]) for call in calls]
    assert [(a.model, a.dtype) for a in parsed] == [
        ([model], [dtype]) for model in script.MODELS for dtype in PRECISIONS
    ]
    assert len({a.plot for a in parsed}) == len(parsed)
    for arguments in parsed:
        assert arguments.device == torch.device("cuda:1")
        assert arguments.flush_l2
        assert arguments.compile
        assert arguments.memory
        assert [cell[::2] for cell in cells(arguments)] == [
            *((224, 1), (224, 16), (224, 128)),
            *((32, 1), (32, 32), (32, 128)),
        ]
        assert "compile-max" in bench._providers(arguments)[arguments.dtype[0]]


@pytest.fixture
def tiny_networks(monkeypatch):
    """A small network under any name, so that steps take no time."""
    script = importlib.import_module("bench_train")
    for module in (script, networks):
        monkeypatch.setattr(module, "random_model", lambda *_: networks.tiny_model())
    return script


def train(monkeypatch, path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    options = ["--models", "threshnet79", "--cells", "32:6", "--threads", "1", "--rounds", "3"]
    status = run(monkeypatch, "bench_train", *options, "--csv", str(path), *arguments)
    rows = results.read_rows(path, tuple(results.TRAINING_COLUMNS)) if path.exists() else []
    return status, rows


def test_training_steps(monkeypatch, tmp_path, capsys, tiny_networks):
    seen = []
    used = peak_memory.Memory(1, 123)
    monkeypatch.setattr(peak_memory, "measure", lambda *a, task: seen.append((a[0], task)) or used)
    status, rows = train(monkeypatch, tmp_path / "train.csv", "--no-compile")
    assert status == 0
    names = [row["provider"] for row in rows]
    assert [name for name in names if name != "fused-checkpoint"] == [
        *("fused", "eager", "channels-last")
    ]
    assert "steps/s" in capsys.readouterr().out
    for row in rows:
        assert row["status"] == "ok"
        assert (row["task"], row["threads"], row["batch"]) == ("training", "1", "6")
        assert 0 < float(row["min_ms"]) <= float(row["p80_ms"])
        rate = float(row["steps_per_second"])
        assert rate == pytest.approx(1e3 / float(row["p50_ms"]), rel=1e-3)
        assert float(row["error"]) <= float(row["error_limit"])
        assert 0 < float(row["gradient_error"]) < 1e-3, "float32 on a small network"
        assert int(row["live_bytes"]) > 0
        assert row["peak_bytes"] == "123"
    assert seen == [(name, "training") for name in names]
    peers = [float(row["min_ms"]) for row in rows if not row["provider"].startswith("fused")]
    fused = next(row for row in rows if row["provider"] == "fused")
    assert float(fused["speedup_min"]) == pytest.approx(
        min(peers) / float(fused["min_ms"]), rel=1e-3
    )


def test_memory_of_a_training_step():
    model = networks.random_model("threshnet79", 10, 0)
    job = Job(model, torch.randn(2, 3, 32, 32), 1)
    used = peak_memory.measure("eager", job, "threshnet79", 10, 0, task="training")
    if used is None:
        pytest.skip("this system cannot tell the peak of resident memory")
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert 1.9 * weights < used.built < 3 * weights, "its copy of the weights, and their momentum"
    assert 2.8 * weights < used.peak < 6 * weights, "and the gradients"


def test_training_step_changes_weights_as_the_optimizer_says():
    model = networks.tiny_model()
    x = torch.randn(4, 3, 32, 32)
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        plain = training_steps.plain_module
        patch.setattr(training_steps, "plain_module", lambda m: copies.append(m) or plain(m))
        provider = build("channels-last", Job(model, x, 1), "training")
    expected = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(3):
        provider.run()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(expected(x), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        optimizer.step()
    trained = dict(copies[0].named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-4, atol=1e-6)
        assert trained[name].grad is None
        assert not torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("wrong", ["output", "gradient", "missing", "statistic", "raises"])
def test_wrong_training_is_not_timed(monkeypatch, tmp_path, tiny_networks, wrong):
    spec = training_steps.TRAINING_PROVIDERS["channels-last"]

    def build(job):
        provider = spec.build(job)

        def results():
            found = provider.results()
            if wrong == "raises":
                raise RuntimeError("no such step")
            if wrong == "missing":
                del found["base.0.conv.weight"]
            else:
                name = {"output": "", "gradient": "base.0.conv.weight"}.get(wrong)
                found[name or "base.0.norm.running_mean"].mul_(1.2)
            return found

        return training_steps.TrainingProvider(provider.run, results=results)

    changed = dataclasses.replace(spec, build=build)
    monkeypatch.setitem(training_steps.TRAINING_PROVIDERS, "channels-last", changed)
    arguments = ["--no-memory", "--providers", "eager", "channels-last"]
    status, rows = train(monkeypatch, tmp_path / "train.csv", *arguments)
    assert status == 1
    assert [row["provider"] for row in rows] == ["eager", "channels-last"]
    assert rows[0]["status"] == "ok"
    expected = "no such step" if wrong == "raises" else "wrong result"
    assert rows[1]["status"].startswith(expected)
    assert rows[1]["min_ms"] == rows[1]["speedup_min"] == ""


def test_every_number_of_threads_is_a_process(monkeypatch, tmp_path):
    script = importlib.import_module("bench_train")
    calls = []

    class Result:
        returncode = 0

    monkeypatch.setattr(script.subprocess, "run", lambda command: calls.append(command) or Result)
    path = tmp_path / "train.csv"
    assert run(monkeypatch, "bench_train", "--cells", "32:4", "--csv", str(path)) == 0
    assert not path.exists()
    parsed = []
    for call in calls:
        monkeypatch.setattr(sys, "argv", call[1:])
        parsed.append(script.parse())
    assert [arguments.threads for arguments in parsed] == [[1], [2]]
    assert all(arguments.cells == [(32, 4)] for arguments in parsed)


def test_multiply_adds_of_a_step():
    script = importlib.import_module("bench_train")
    from torch.utils.flop_counter import FlopCounterMode

    model = networks.tiny_model().train()
    x = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    classifier = 3 * 2 * model.num_features * 2
    macs = script.step_macs(model.eval(), tuple(x.shape))
    assert macs in (counter.get_total_flops() // 2, counter.get_total_flops() // 2 - classifier)


def test_table_and_figure_of_training(monkeypatch, tmp_path):
    table, plots = importlib.import_module("table"), importlib.import_module("plot")
    path = tmp_path / "train.csv"
    monkeypatch.setattr(table, "TRAINING", path)
    assert table.training([]) == "No measurement has been recorded."
    common = measured(batch="100", min_ms="200.0", p20_ms="205.0", p50_ms="210.0", p80_ms="220.0")
    common |= {"task": "training", "optimizer": "SGD", "steps_per_second": "5"}
    memory = {"peak_bytes": "400000000", "live_bytes": "200000000"}
    rows = [
        common | {"provider": "eager"} | memory,
        common
        | {"min_ms": "100.0", "speedup_min": "1.6", "speedup_p50": "1.5"}
        | {"peak_bytes": "100000000", "live_bytes": "40000000"},
        common | {"provider": "compile", "min_ms": "160.0"},
    ]
    rows += [row | {"threads": "1"} for row in rows]
    results.append_rows(path, rows, tuple(results.TRAINING_COLUMNS))
    lines = table.training([]).splitlines()
    assert lines[0] == (
        "| model | input | threads | threshnet_fast | PyTorch eager | torch.compile | "
        "over the best peer |"
    )
    assert lines[2] == (
        "| threshnet95 | 32x32, batch 100 | 2 | **100** / 210 | 200 / 210 | 160 / 210 | "
        "1.60x / 1.50x |"
    )
    memory_lines = [line for line in lines if "resident" in line or "tensors" in line]
    assert memory_lines == [
        "| threshnet95 | 32x32, batch 100 | resident | 100 (0.25) | 400 |  |",
        "| threshnet95 | 32x32, batch 100 | tensors | 40 (0.20) | 200 |  |",
    ]
    drawn = {}
    monkeypatch.setattr(plots, "plot", lambda kept, path: drawn.update({path.name: kept}))
    results.append_rows(tmp_path / "a.csv", [measured()])
    arguments = ["plot.py", "--csv", str(tmp_path / "a.csv"), "--output", str(tmp_path / "a.png")]
    arguments += ["--growth-csv", str(tmp_path / "none.csv"), "--training-csv", str(path)]
    arguments += ["--training-output", str(tmp_path / "new" / "t.png")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plots.main() == 0
    assert [row["threads"] for row in drawn["t.png"]] == ["2"] * 3
    monkeypatch.undo()
    plots.plot(drawn["t.png"], tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_model_card(monkeypatch, tmp_path):
    from trained import save_random

    from threshnet_fast.models import pretrained

    table = importlib.import_module("table")
    monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
    assert table.card("threshnet79", "cifar10") == "These weights are not in this source tree."
    extra = {"license": "MIT", "note": "Random.", "test_images": 40}
    extra |= {"class_accuracy": {f"class {i}": i / 40 for i in range(10)}}
    path = tmp_path / "threshnet79_cifar10.safetensors"
    recipe = {"name": "modern", "epochs": 3, "learning_rate": 0.1, "clip_norm": 0.0}
    save_random(path, torch.float16, accuracy=0.9125, extra=extra, recipe=recipe)
    lines = table.card("threshnet79", "cifar10").splitlines()
    assert "| Model | `threshnet79`, 14.37 M parameters, 10 classes |" in lines
    assert f"| File | `{path.name}`, {path.stat().st_size / 1e6:.1f} MB, float16 |" in lines
    assert "| Recipe | `modern`: epochs 3, learning_rate 0.1 |" in lines
    assert "| Accuracy | 91.25% of 40 test images |" in lines
    assert (
        "| Input | the middle 100% of the shorter side, square; reduced to 32x32; resized to 48x48 "
        "(bilinear) |" in lines
    )
    assert lines[-2:] == ["| class 8 | 20.0% |", "| class 9 | 22.5% |"]


@pytest.fixture
def paper(monkeypatch):
    """The script of the paper's table, with a small network under any name."""
    script = importlib.import_module("paper")
    monkeypatch.setattr(script, "random_model", lambda *_: networks.tiny_model())
    return script


def test_costs_of_the_networks_in_the_paper(paper):
    from torch.utils.flop_counter import FlopCounterMode

    counted = paper.cost("threshnet95", 224)
    assert counted.parameters == 16_189_202
    assert counted.macs == pytest.approx(4.027e9, rel=1e-3)
    for name in ("densenet121", "hardnet85"):
        counted = paper.cost(name, 32)
        model = paper.create_model(name, num_classes=10).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model._plain_features(torch.randn(1, 3, 32, 32))
        assert counted.macs == counter.get_total_flops() // 2 + 10 * model.num_features
        assert counted.parameters == sum(p.numel() for p in model.parameters())
        assert 1e5 < counted.activation_bytes < 1e7


def test_times_of_the_networks_in_the_paper(monkeypatch, tmp_path, capsys, paper):
    path = tmp_path / "paper.csv"
    arguments = [
        "measure",
        "--quick",
        "--threads",
        "1",
        "--models",
        "threshnet79",
        "densenet_bc_100",
    ]
    assert run(monkeypatch, "paper", *arguments, "--csv", str(path)) == 0
    rows = results.read_rows(path, tuple(paper.COLUMNS))
    kinds = ["cost"] * 2 + ["inference"] * 6 + ["training"] * 6
    assert [row["kind"] for row in rows] == kinds
    assert {row["run"] for row in rows} == {rows[0]["run"]}
    for row in rows[2:]:
        assert row["status"] == "ok"
        assert 0 < float(row["min_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= float(row["error_limit"])
        assert (row["gradient_error"] != "") == (row["kind"] == "training")


def finished_run(folder: Path, model: str, accuracy: float, epochs: int = 2) -> Path:
    """What a run of training leaves."""
    import json

    folder.mkdir(parents=True)
    recipe = {"name": "modern", "epochs": epochs, "optimizer": "sgd"}
    config = {"model": model, "dataset": "cifar10", "num_classes": 10, "recipe": recipe}
    config |= {"image_size": [32, 32], "interpolation": "bilinear", "images_per_step": 128}
    config |= {"train_images": 20000, "seed": 0, "accumulate": 1, "amp": ""}
    (folder / "config.json").write_text(json.dumps(config))
    lines = ["epoch,test_accuracy,seconds", "1,,10.5", f"2,{accuracy},11.0"]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_errors_of_the_networks_in_the_paper(monkeypatch, tmp_path, capsys, paper):
    path = tmp_path / "paper.csv"
    folders = [finished_run(tmp_path / "a", "threshnet79", 0.75)]
    folders.append(finished_run(tmp_path / "b", "hardnet68", 0.7))
    arguments = ["errors", *map(str, folders), "--csv", str(path)]
    assert run(monkeypatch, "paper", *arguments) == 0
    rows = results.read_rows(path, tuple(paper.COLUMNS))
    assert [(row["model"], row["test_error"]) for row in rows] == [
        *(("threshnet79", "0.250000"), ("hardnet68", "0.300000"))
    ]
    assert (rows[0]["epochs"], rows[0]["train_seconds"]) == ("2", "21.5")
    assert rows[0]["recipe"] == rows[1]["recipe"]
    unfinished = finished_run(tmp_path / "c", "hardnet68", 0.7, epochs=3)
    for folder, message in ((unfinished, "not come to its end"), (tmp_path, "holds no run")):
        assert run(monkeypatch, "paper", "errors", str(folder), "--csv", str(path)) == 1
        assert message in capsys.readouterr().err
    assert len(results.read_rows(path, tuple(paper.COLUMNS))) == 2


def test_training_of_the_networks_in_the_paper(monkeypatch, tmp_path, paper):
    calls = []

    class Result:
        returncode = 0

    monkeypatch.setattr(paper, "common_columns", lambda *_: {})

    def train(command):
        calls.append(command)
        finished_run(Path(command[command.index("--output") + 1]), command[3], 0.5)
        return Result

    monkeypatch.setattr(paper.subprocess, "run", train)
    path = tmp_path / "paper.csv"
    arguments = ["train", "--data", "data", "--output", str(tmp_path / "runs"), "--epochs", "2"]
    arguments += ["--models", "threshnet79", "hardnet68", "--csv", str(path)]
    assert run(monkeypatch, "paper", *arguments, "--", "--image-size", "32") == 0
    assert [row["model"] for row in results.read_rows(path, tuple(paper.COLUMNS))] == [
        *("threshnet79", "hardnet68")
    ]
    from threshnet_fast.cli import build_parser

    for call, model in zip(calls, ("threshnet79", "hardnet68"), strict=True):
        parsed = build_parser().parse_args(["train", *call[3:]])
        assert (parsed.model, parsed.epochs, parsed.resume) == (model, 2, True)
        assert parsed.image_size == (32, 32)
    Result.returncode = 1
    monkeypatch.setattr(paper.subprocess, "run", lambda command: Result)
    assert run(monkeypatch, "paper", *arguments) == 1


def paper_rows(paper, fused_threshnet: float = 4.0) -> list[dict[str, str]]:
    """Rows as they are measured: PyTorch takes 10 ms for ThreshNet and 20 ms for the others."""
    common = dict.fromkeys(paper.COLUMNS, "") | {"run": "1", "time": "2030-01-02", "status": "ok"}
    common |= {"processors": "2", "threads": "2", "processor": "Test", "version": "1"}
    rows = []
    for model in paper.MODELS:
        ours = model in paper.THRESHNETS
        cost = {"kind": "cost", "parameters": "2000000", "macs": "3000000000"}
        size = "32" if model in paper.SMALL_ONLY else "224"
        rows.append(
            common
            | cost
            | {"model": model, "height": size, "activation_bytes": "5000000"}
            | {"width": size}
        )
        for kind, cells in (("inference", paper.INFERENCE), ("training", (paper.TRAINING,))):
            for size, batch in cells:
                if size == 224 and model in paper.SMALL_ONLY:
                    continue
                for engine, time in (
                    ("fused", fused_threshnet if ours else 6.0),
                    ("eager", 10.0 if ours else 20.0),
                    ("channels-last", 11.0),
                ):
                    row = {"kind": kind, "model": model, "height": str(size), "batch": str(batch)}
                    rows.append(common | row | {"provider": engine, "min_ms": str(time)})
        recipe = '{"name": "modern", "amp": ""}'
        error = {"kind": "error", "model": model, "data": "cifar10", "epochs": "2", "height": "32"}
        error |= {"recipe": recipe, "test_error": "0.3" if ours else "0.36"}
        rows.append(common | error)
    return rows


def test_claims_of_the_paper(monkeypatch, tmp_path, paper):
    assert paper.render(tmp_path / "none.csv") == "No measurement has been recorded."
    path = tmp_path / "paper.csv"
    rows = paper_rows(paper)
    older = [row | {"run": "0", "min_ms": "0.001"} for row in rows if row["min_ms"]]
    alone = next(row for row in rows if row["kind"] == "error") | {"epochs": "9"}
    results.append_rows(path, [*older, *rows, alone], tuple(paper.COLUMNS))
    text = paper.render(path)
    assert f"| ThreshNet79 | 2.00 M | 3.00 G | 5.0 MB{' | 4.00 ms / 10.0 ms' * 3} | 30.0% |" in text
    assert (
        "| DenseNet-BC-100 | 2.00 M | 3.00 G (at 32x32) | 5.0 MB (at 32x32) | - / -"
        f"{' | 6.00 ms / 11.0 ms' * 2} | 36.0% |" in text
    )
    assert "| ThreshNet95 | HarDNet-85 | -9% | -33% | -9% | -33% | -9% | -33% | -17% |" in text, (
        "PyTorch in its faster layout"
    )
    assert "| up to 60% less inference time than DenseNet | at best 33% less (" in text
    assert "4.00 of 6.00 ms, 67% | yes |" in text
    assert "4.00 of 11.0 ms, 36% | yes |" in text


def test_claims_that_hold_or_fail(paper):
    found = paper.findings(paper_rows(paper, fused_threshnet=2.0))
    lines = paper.claims(found).splitlines()[2:]
    assert [line.endswith("| yes |") for line in lines] == [True, True, False, *[True] * 4]
    found = paper.findings(paper_rows(paper, fused_threshnet=7.0))
    lines = paper.claims(found).splitlines()[2:]
    assert [line.endswith("| **no** |") for line in lines] == [True] * 7
    assert "at worst 17% more (" in lines[0]
    found = paper.findings([row for row in paper_rows(paper) if row["kind"] == "cost"])
    assert all("| not measured |" in line for line in paper.claims(found).splitlines()[2:])
