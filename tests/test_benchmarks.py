"""The scripts of benchmarks/ run, and the fused engine needs less memory than PyTorch."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch

from threshnet_fast.backends import cpu
from threshnet_fast.cli import providers

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

    def build(shape, batch):
        calls, reference = module.build(shape, batch)
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
    job = providers.Job(model, torch.randn(1, 3, 100, 100), 1)
    one_map = 4 * 3 * 100 * 100
    assert memory.live_tensors(job, "eager") == pytest.approx(2 * one_map, rel=0.01)


def test_fused_inference_takes_less_than_half_of_the_memory():
    memory = importlib.import_module("bench_memory")
    model = providers.random_model("threshnet95", 10, 0)
    job = providers.Job(model, torch.randn(16, 3, 224, 224), torch.get_num_threads())
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
