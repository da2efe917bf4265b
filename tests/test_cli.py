from __future__ import annotations

import contextlib
import copy
import csv
import io
import itertools
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import threshnet_fast as tf
from threshnet_fast import cli, environment
from threshnet_fast.bench import (
    comparison,
    cpu_engines,
    gpu_engines,
    gpus,
    latency,
    machine,
    networks,
    photographs,
    prediction_report,
    report,
    results,
    timing,
)
from threshnet_fast.bench.job import Job, Provider, Unavailable, float32_parts, plain_module
from threshnet_fast.bench.peak_memory import measure
from threshnet_fast.bench.precision import PRECISIONS
from threshnet_fast.bench.registry import build, dtypes, registry
from threshnet_fast.cli import CommandError, arguments, build_parser, doctor, info, main
from threshnet_fast.cli import bench as command
from threshnet_fast.cli.arguments import cells
from threshnet_fast.engines import cpu, cuda, triton
from threshnet_fast.plan.lower import lower

PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path) -> str:
    """Name of a network that is small enough to be timed in a test, in an empty folder."""

    def build(num_classes: int = 10) -> tf.ThreshNet:
        return tf.ThreshNet(
            first_channels=(8, 16),
            blocks=(2, 3),
            transitions=(24, 32),
            downsample=(True, False),
            threshold=1,
            growth_rates=(8, 12),
            num_classes=num_classes,
        )

    monkeypatch.setitem(tf.models.registry._REGISTRY, "tiny", build)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THRESHNET_FAST_DEBUG", raising=False)
    return "tiny"


@pytest.fixture
def needs_engine() -> None:
    if cpu.unavailable_reason() is not None:
        pytest.skip(str(cpu.unavailable_reason()))


def bfloat16_job(batch: int, height: int, width: int) -> Job:
    model = networks.random_model("tiny", 10, 0).bfloat16()
    return Job(model, torch.randn(batch, 3, height, width).bfloat16(), 1)


def bench(*arguments: str) -> int:
    common = ["--model", "tiny", "--threads", "1", "--repeats", "1", "--random-input"]
    return main(["bench", *common, *arguments])


def error_line(capsys, status: int, expected: int) -> str:
    """The only line on the standard error stream of a command that failed."""
    assert status == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("threshnet-fast")
    assert "error: " in lines[0]
    return lines[0]


@pytest.mark.usefixtures("needs_engine")
class TestBench:
    def test_table_csv_and_plot(self, capsys):
        assert bench("--cell", "32:1", "--cell", "40x48:2", "--providers", "fused,eager") == 0
        out = capsys.readouterr().out
        assert "tiny, 32x32, batch 1, float32, 1 thread" in out
        assert "tiny, 40x48, batch 2, float32, 1 thread" in out
        assert Path("threshnet-fast-bench.png").read_bytes().startswith(PNG)
        with Path("threshnet-fast-bench.csv").open(newline="") as file:
            assert next(csv.reader(file)) == list(results.COLUMNS)
        rows = results.read_rows(Path("threshnet-fast-bench.csv"))
        assert [(row["provider"], row["batch"]) for row in rows] == [
            ("fused", "1"),
            ("eager", "1"),
            ("fused", "2"),
            ("eager", "2"),
        ]
        assert len({row["run"] for row in rows}) == 1
        for row in rows:
            assert row["status"] == "ok"
            assert 0 < float(row["min_ms"]) <= float(row["p20_ms"]) <= float(row["p50_ms"])
            assert float(row["p50_ms"]) <= float(row["p80_ms"])
            assert 0 <= float(row["error"]) <= float(row["error_limit"])
            assert row["input"] == "random"
            assert row["torch"] == torch.__version__
            assert (row["device"], row["accelerator"], row["l2"]) == ("cpu", "", "")
            gflops = 2e-6 * int(row["macs"]) / float(row["min_ms"])
            assert float(row["gflops"]) == pytest.approx(gflops, rel=1e-2, abs=0.01)
        fused, eager = rows[:2]
        assert float(eager["speedup_min"]) == 1
        assert float(fused["speedup_min"]) == pytest.approx(
            float(eager["min_ms"]) / float(fused["min_ms"]), rel=1e-2
        )

    def test_appends_to_the_csv_file(self):
        for _ in range(2):
            assert bench("--cell", "32:1", "--providers", "eager", "--csv", "all.csv") == 0
        rows = results.read_rows(Path("all.csv"))
        assert len(rows) == 2
        assert rows[0]["run"] != rows[1]["run"]
        assert Path("all.png").is_file()

    def test_no_files(self, tmp_path):
        assert bench("--cell", "32:1", "--providers", "eager", "--no-files") == 0
        assert list(tmp_path.iterdir()) == []

    def test_sizes_are_combined_with_batches(self):
        sizes = ("--size", "32", "40", "--batch", "1", "3")
        assert bench(*sizes, "--providers", "eager", "--csv", "all.csv") == 0
        rows = results.read_rows(Path("all.csv"))
        shapes = [(row["height"], row["batch"]) for row in rows]
        assert shapes == [("32", "1"), ("32", "3"), ("40", "1"), ("40", "3")]

    def test_time_budget(self, capsys):
        arguments = ["bench", "--model", "tiny", "--threads", "1", "--seconds", "0.2"]
        arguments += ["--random-input", "--cell", "32:1", "--providers", "fused", "--csv", "a.csv"]
        assert main(arguments) == 0
        (row,) = results.read_rows(Path("a.csv"))
        assert int(row["calls"]) >= 3
        assert row["speedup_min"] == "", "without a peer there is nothing to compare with"

    def test_photographs(self, capsys):
        if not photographs.installed_photographs():
            pytest.skip("no photograph is installed")
        arguments = ["bench", "--model", "tiny", "--threads", "1", "--repeats", "1"]
        arguments += ["--cell", "48:2", "--providers", "fused,drop-in,eager", "--csv", "all.csv"]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        count = min(6, len(photographs.installed_photographs()))
        assert f"{count} of {count} predictions agree" in out
        assert "not trained" in out
        rows = results.read_rows(Path("all.csv"))
        assert {row["input"] for row in rows} == {photographs.installed_photographs()[0].source}

    def test_picture_of_the_user(self, capsys):
        from PIL import Image

        Image.new("RGB", (50, 40), (200, 30, 90)).save("mine.png")
        arguments = ["bench", "--model", "tiny", "--threads", "1", "--repeats", "1", "--no-files"]
        arguments += ["--cell", "32:1", "--providers", "eager", "--image", "mine.png"]
        assert main(arguments) == 0
        assert "mine.png" in capsys.readouterr().out

    def test_wrong_result_is_reported_and_not_timed(self, monkeypatch, capsys):
        def build_wrong(job):
            right = cpu_engines._eager(job)
            return Provider(lambda: right.run() * 1.001)

        wrong = replace(cpu_engines.PROVIDERS["channels-last"], build=build_wrong)
        monkeypatch.setitem(cpu_engines.PROVIDERS, "channels-last", wrong)
        status = bench("--cell", "32:1", "--providers", "fused,channels-last", "--csv", "all.csv")
        fused, peer = results.read_rows(Path("all.csv"))
        assert fused["status"] == "ok"
        assert peer["status"].startswith("wrong result: error ")
        assert float(peer["error"]) > float(peer["error_limit"])
        assert peer["min_ms"] == peer["calls"] == ""
        assert fused["speedup_min"] == ""
        assert "not everything could be measured" in error_line(capsys, status, 1)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_result_that_is_not_finite_is_wrong(self, monkeypatch, value):
        def build_wrong(job):
            right = cpu_engines._eager(job)
            return Provider(lambda: torch.full_like(right.run(), value))

        wrong = replace(cpu_engines.PROVIDERS["eager"], build=build_wrong)
        monkeypatch.setitem(cpu_engines.PROVIDERS, "eager", wrong)
        assert bench("--cell", "32:1", "--providers", "eager", "--csv", "all.csv") == 1
        (row,) = results.read_rows(Path("all.csv"))
        assert row["status"].startswith("wrong result")

    def test_provider_that_raises_does_not_stop_the_others(self, monkeypatch, capsys):
        def build_broken(job):
            raise RuntimeError("no such\nkernel")

        broken = replace(cpu_engines.PROVIDERS["channels-last"], build=build_broken)
        monkeypatch.setitem(cpu_engines.PROVIDERS, "channels-last", broken)
        names = "eager,channels-last"
        assert bench("--cell", "32:1", "--providers", names, "--csv", "all.csv") == 1
        eager, peer = results.read_rows(Path("all.csv"))
        assert eager["status"] == "ok"
        assert peer["status"] == "no such kernel"
        assert "channels-last: no such kernel" in capsys.readouterr().out

    def test_engine_that_is_not_built_is_a_failure(self, monkeypatch, capsys):
        broken = replace(cpu_engines.PROVIDERS["fused"], objection=lambda: "it was not built")
        monkeypatch.setitem(cpu_engines.PROVIDERS, "fused", broken)
        assert bench("--cell", "32:1", "--providers", "fused,eager", "--csv", "all.csv") == 1
        fused, eager = results.read_rows(Path("all.csv"))
        assert fused["status"] == "it was not built"
        assert eager["status"] == "ok"

    def test_default_is_the_main_job(self):
        parser = build_parser()
        arguments = parser.parse_args(["bench"])
        assert cells(arguments) == [(224, 224, 1), (32, 32, 1), (32, 32, 32)]
        names = command._providers(arguments)
        assert list(names) == ["float32"]
        assert {"fused", "drop-in", "eager", "channels-last"} <= set(names["float32"])
        assert "compile" not in names["float32"]
        arguments = parser.parse_args(["bench", "--compile", "--dtype", "float32,bfloat16"])
        if cpu_engines._no_compiler() is None:
            assert all("compile" in names for names in command._providers(arguments).values())

    def test_bfloat16_is_a_class_of_its_own(self, capsys):
        names = "eager,channels-last,onnxruntime"
        if cpu_engines.PROVIDERS["onnxruntime"].objection() is not None:
            names = "eager,channels-last"
        arguments = ["--cell", "32:2", "--dtype", "float32,bfloat16", "--csv", "all.csv"]
        assert bench(*arguments, "--providers", names) == 0
        rows = results.read_rows(Path("all.csv"))
        expected = [("float32", name) for name in names.split(",")]
        expected += [("bfloat16", "eager"), ("bfloat16", "channels-last")]
        assert [(row["dtype"], row["provider"]) for row in rows] == expected
        for dtype in ("float32", "bfloat16"):
            cell = [row for row in rows if row["dtype"] == dtype]
            best = min(float(row["min_ms"]) for row in cell)
            for row in cell:
                ratio = pytest.approx(best / float(row["min_ms"]), rel=1e-2)
                assert float(row["speedup_min"]) == ratio, "of the best in the same precision"
                assert float(row["error"]) <= float(row["error_limit"])
        limits = {row["dtype"]: float(row["error_limit"]) for row in rows}
        for row in rows:
            assert (float(row["error"]) > limits["float32"]) == (row["dtype"] == "bfloat16")
        out = capsys.readouterr().out
        assert "tiny, 32x32, batch 2, float32, 1 thread\n" in out
        assert "tiny, 32x32, batch 2, bfloat16, 1 thread\n" in out

    def test_bfloat16_reference_has_the_rounded_weights_and_input(self, monkeypatch):
        seen = []

        def reference(model, x):
            seen.append((model.base[0].conv.weight.clone(), x))
            return networks.reference_output(model, x)

        monkeypatch.setattr(latency, "reference_output", reference)
        arguments = ["--cell", "32:1", "--dtype", "bfloat16,float32", "--no-files"]
        assert bench(*arguments, "--providers", "eager") == 0
        (weight, x), (exact_weight, exact_x) = seen
        assert torch.equal(weight, exact_weight.bfloat16())
        assert torch.equal(x, exact_x.bfloat16())

    def test_bias_that_cancels_the_output_makes_no_error_larger(self, monkeypatch):
        def balanced(name, classes, seed):
            model = networks.random_model(name, classes, seed)
            x = latency.input_of((32, 32, 1), [], 0)
            classifier = model.get_classifier()
            with torch.no_grad():
                classifier.bias.sub_(networks.reference_output(model, x)[0].float())
            return model

        monkeypatch.setattr(command, "random_model", balanced)
        assert bench("--cell", "32:1", "--providers", "eager", "--csv", "all.csv") == 0
        (row,) = results.read_rows(Path("all.csv"))
        assert float(row["error_limit"]) > 1e-5, "of the output that the bias cancels"

    @pytest.mark.parametrize("how", ["refused", "not fused"])
    def test_engine_without_bfloat16_is_a_failure_with_its_reason(self, monkeypatch, how):
        def instead(model, x, dtype):
            if how == "refused":
                raise ValueError("dtype is torch.bfloat16: not here")
            assert model.base[0].conv.weight.dtype is x.dtype is dtype
            return SimpleNamespace(backend="reference", reason="dtype is torch.bfloat16: not here")

        module = sys.modules["threshnet_fast.runtime.frozen"]
        real = module.optimize
        monkeypatch.setattr(
            module,
            "optimize",
            lambda model, x, dtype: (real if dtype is torch.float32 else instead)(model, x, dtype),
        )
        arguments = ["--cell", "32:1", "--dtype", "float32,bfloat16", "--csv", "all.csv"]
        assert bench(*arguments, "--providers", "fused,eager") == 1
        rows = results.read_rows(Path("all.csv"))
        assert [(row["dtype"], row["provider"], row["status"]) for row in rows] == [
            ("float32", "fused", "ok"),
            ("float32", "eager", "ok"),
            ("bfloat16", "fused", "dtype is torch.bfloat16: not here"),
            ("bfloat16", "eager", "ok"),
        ]

    def test_model_that_is_not_fused_is_not_timed_as_if_it_were(self):
        with tf.use_backend("reference"), pytest.raises(Unavailable, match="use_backend"):
            build("drop-in", bfloat16_job(1, 32, 32))

    def test_peer_without_bfloat16_is_left_out_of_that_class(self, monkeypatch, capsys):
        peers = cpu_engines.BFLOAT16_PROVIDERS
        absent = replace(peers["channels-last"], objection=lambda: "because")
        monkeypatch.setitem(peers, "channels-last", absent)
        arguments = ["--cell", "32:1", "--providers", "eager,channels-last"]
        assert bench(*arguments, "--dtype", "float32,bfloat16", "--csv", "all.csv") == 0
        rows = results.read_rows(Path("all.csv"))
        assert [(row["dtype"], row["provider"]) for row in rows] == [
            ("float32", "eager"),
            ("float32", "channels-last"),
            ("bfloat16", "eager"),
        ]
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if "channels-last (b" in line
        ]
        assert line.startswith("Left out in bfloat16: ")
        status = bench(*arguments, "--dtype", "bfloat16")
        assert "--providers channels-last: because" in error_line(capsys, status, 2)


class TestBenchErrors:
    def test_unknown_model(self, capsys):
        status = main(["bench", "--model", "threshnet59"])
        assert "did you mean 'threshnet95'?" in error_line(capsys, status, 2)

    def test_unknown_provider(self, capsys):
        status = main(["bench", "--providers", "eagre"])
        assert "did you mean 'eager'?" in error_line(capsys, status, 2)

    def test_peer_that_is_not_installed(self, monkeypatch, capsys):
        absent = replace(
            cpu_engines.PROVIDERS["openvino"], objection=cpu_engines._needs("no_such_module")
        )
        monkeypatch.setitem(cpu_engines.PROVIDERS, "openvino", absent)
        status = main(["bench", "--providers", "openvino"])
        assert "not installed: no_such_module" in error_line(capsys, status, 2)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--cell", "224"], "expected SIZE:BATCH"),
            (["--cell", "32:0"], "expected a positive integer"),
            (["--cell", "axb:1"], "expected a size"),
            (["--cell", "4:1"], "size 4x4 is too small for tiny: expected 5 or more"),
            (["--size", "32x4"], "size 32x4 is too small"),
            (["--cell", "32:1", "--batch", "2"], "leave --size, --batch out"),
            (["--batch", "-1"], "expected a positive integer"),
            (["--threads", "0"], "expected a positive integer"),
            (["--threads", "100000"], "100000: expected at most "),
            (["--cell", "32:999999999", "--random-input"], "32:999999999 needs at least "),
            (["--size", "40x60000", "--batch", "1000000"], "40x60000:1000000 needs at least "),
            (["--repeats", "none"], "expected a positive integer"),
            (["--seconds", "nan"], "expected a positive number"),
            (["--seconds", "1", "--repeats", "1"], "not allowed with"),
            (["--providers", ","], "expected one name or more"),
            (["--image", "missing.png"], "missing.png: cannot be read: No such file"),
            (["--image", "text.png"], "text.png: not a picture"),
            (["--csv", "missing/all.csv"], "cannot write missing/all.csv: No such file"),
            (["--csv", "other.csv"], "its columns are not those of this version"),
            (["--plot", "missing/all.png"], "there is no folder missing"),
            (["--plot", "all.txt"], "expected a name that ends in .png"),
            (["--no-such-option"], "unrecognized arguments"),
            (["--device", "gpu"], "'gpu': expected cpu, cuda or cuda:N"),
            (["--device", "cuda:x"], "expected cpu, cuda or cuda:N"),
            (["--dtype", "float16"], "--dtype float16: on the CPU expected float32 or bfloat16"),
            (["--dtype", "bfloat16", "--profile"], "--profile is of float32: leave --dtype out"),
            (["--dtype", "float15"], "unknown dtype 'float15': did you mean 'float16'?"),
            (["--flush-l2"], "--flush-l2 belongs to a GPU: add --device cuda"),
            (["--providers", "eager-graph"], "--providers eager-graph: it does not run on cpu"),
            (
                ["--providers", "mnn", "--dtype", "bfloat16"],
                "--providers mnn: it does not run on cpu in bfloat16",
            ),
        ],
    )
    def test_one_line(self, capsys, arguments, text):
        Path("text.png").write_text("no picture")
        Path("other.csv").write_text("a,b\n1,2\n")
        status = main(["bench", "--model", "tiny", *arguments])
        expected = 1 if arguments[0] in ("--csv", "--plot") else 2
        assert text in error_line(capsys, status, expected)

    def test_csv_file_that_was_not_used_is_not_left_behind(self):
        assert main(["bench", "--model", "tiny", "--cell", "32:1", "--image", "none.png"]) == 2
        assert not Path("threshnet-fast-bench.csv").exists()

    @pytest.mark.parametrize("how", ["option", "environment"])
    def test_debug_lets_the_exception_pass(self, monkeypatch, how):
        if how == "environment":
            monkeypatch.setenv("THRESHNET_FAST_DEBUG", "1")
        with pytest.raises(CommandError, match="unknown model"):
            main(["bench", "--model", "none", *(["--debug"] if how == "option" else [])])

    def test_unexpected_error_is_one_line(self, monkeypatch, capsys):
        def fail(*_):
            raise KeyError("surprise")

        monkeypatch.setattr(command, "check_model", fail)
        assert "surprise" in error_line(capsys, main(["bench"]), 1)

    def test_interruption(self, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "check_model", interrupt)
        assert "interrupted" in error_line(capsys, main(["bench"]), 130)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU as bench sees it: its tensors are on the CPU, its graphs replay nothing.

    Returns what was asked of it, in order.
    """
    asked: list[str] = []

    class Graph:
        def replay(self):
            asked.append("replay")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.now = time.perf_counter()
            asked.append("record")

        def synchronize(self):
            asked.append("wait")

        def elapsed_time(self, end):
            return 1e3 * (end.now - self.now)

    class Properties:
        L2_cache_size = 1000
        uuid = None

    @contextlib.contextmanager
    def capture(graph):
        assert isinstance(graph, Graph)
        asked.append("capture")
        yield

    def job(model, x, precision, setting):
        assert setting.device == torch.device("cuda", 0)
        if precision.dtype is torch.float32:
            assert torch.backends.cuda.matmul.allow_tf32 is precision.tf32
            assert torch.backends.cudnn.allow_tf32 is precision.tf32
        model, x = copy.deepcopy(model).to(precision.dtype), x.to(precision.dtype)
        return Job(model, x, setting.threads)

    class Torch:
        """PyTorch, but for one function."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, size, *, dtype, device):
            assert device.type == "cuda"
            asked.append(f"memory of {size} bytes")
            return torch.zeros(size, dtype=dtype)

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device: "Test GPU",
        "get_device_properties": lambda device: Properties,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device: asked.append("wait"),
        "empty_cache": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(latency, "_job", job)
    monkeypatch.setattr(latency, "torch", Torch())
    monkeypatch.setattr(comparison, "build", lambda name, job: registry_of_gpu[name].build(job))
    monkeypatch.setattr(latency, "_engine", lambda job: "fused by triton on cuda:0")
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "not for this GPU")
    registry_of_gpu = gpu_engines.CUDA_PROVIDERS
    # Networks run on Triton without a GPU in tests/emulation/.
    for name in ("fused", "drop-in"):
        spec = replace(
            registry_of_gpu[name],
            build=lambda job: gpu_engines._warm(lambda: job.model(job.x)),
            objection=lambda: None,
            version=lambda: "9 sm_90",
        )
        monkeypatch.setitem(registry_of_gpu, name, spec)
    return asked


class TestBenchOnGPU:
    def bench(self, *arguments: str) -> list[dict[str, str]]:
        common = ["--model", "tiny", "--repeats", "1", "--csv", "a.csv", "--device", "cuda"]
        assert main(["bench", *common, *arguments]) == 0
        return results.read_rows(Path("a.csv"))

    def test_all_precisions(self, fake_gpu, capsys):
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
        rows = self.bench(
            *("--random-input", "--dtype", "float32,tf32,float16,bfloat16", "--cell", "32:2")
        )
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark) == before
        names = ["fused", "drop-in", "eager", "channels-last", "eager-graph", "channels-last-graph"]
        assert [(row["dtype"], row["provider"]) for row in rows] == [
            (dtype, name) for dtype in PRECISIONS for name in names
        ]
        assert len({row["run"] for row in rows}) == 1
        for row in rows:
            assert row["status"] == "ok", row
            assert 0 < float(row["min_ms"]) <= float(row["p80_ms"])
            assert float(row["error"]) <= float(row["error_limit"])
            assert (row["device"], row["accelerator"]) == ("cuda", "Test GPU")
            assert (row["l2"], row["driver"], row["clocks"]) == ("kept", "", "")
            assert row["threads"] == "1"
        assert [row["version"] for row in rows[:3]] == ["9 sm_90", "9 sm_90", torch.__version__]
        limits = [float(row["error_limit"]) for row in rows[:: len(names)]]
        assert limits[0] < limits[1] == pytest.approx(limits[2], rel=0.1)
        assert limits[2] < limits[3]
        out = capsys.readouterr().out
        assert "tiny, 32x32, batch 2, tf32, Test GPU\n" in out
        assert "Test GPU, " in out.splitlines()[2]
        assert Path("a.png").read_bytes().startswith(PNG)
        assert "capture" in fake_gpu
        assert not any(event.startswith("memory") for event in fake_gpu)

    def test_every_call_is_waited_for(self, fake_gpu):
        self.bench("--random-input", "--cell", "32:1", "--providers", "eager")
        turns = [fake_gpu[i : i + 4] for i in range(0, len(fake_gpu), 4)]
        assert turns
        assert all(turn == ["wait", "record", "record", "wait"] for turn in turns)

    def test_flushed_cache(self, fake_gpu, capsys):
        rows = self.bench("--random-input", "--cell", "32:1", "--providers", "eager", "--flush-l2")
        assert [row["l2"] for row in rows] == ["flushed"]
        assert "memory of 4000 bytes" in fake_gpu
        assert "tiny, 32x32, batch 1, float32, Test GPU, L2 flushed" in capsys.readouterr().out

    def test_photographs(self, fake_gpu, capsys):
        if not photographs.installed_photographs():
            pytest.skip("no photograph is installed")
        self.bench("--cell", "32:1", "--providers", "eager")
        out = capsys.readouterr().out
        assert "model(x), fused by triton on cuda:0" in out
        assert "predictions agree" in out

    def test_precision_that_a_provider_misses_is_a_wrong_result(self, fake_gpu, monkeypatch):
        def build_rounded(job):
            assert job.model.base[0].conv.weight.dtype is torch.float16
            module, x = copy.deepcopy(job.model).bfloat16(), job.x.bfloat16()
            return Provider(lambda: module(x))

        specs = gpu_engines.CUDA_PROVIDERS
        monkeypatch.setitem(specs, "eager", replace(specs["eager"], build=build_rounded))
        arguments = ["--random-input", "--cell", "64:4", "--dtype", "float16", "--repeats", "1"]
        arguments += ["--providers", "eager", "--device", "cuda", "--csv", "a.csv"]
        assert main(["bench", "--model", "threshnet79", *arguments]) == 1
        (row,) = results.read_rows(Path("a.csv"))
        assert row["status"].startswith("wrong result")

    def test_compilers_come_on_demand(self, fake_gpu):
        parser = build_parser()
        arguments = parser.parse_args(["bench", "--device", "cuda"])
        names = command._providers(arguments)["float32"]
        assert not any(name.startswith("compile") for name in names)
        arguments = parser.parse_args(["bench", "--device", "cuda", "--compile"])
        everything = list(gpu_engines.CUDA_PROVIDERS)
        if cuda.unavailable_reason() is not None:
            everything.remove("fused-cuda")
        assert command._providers(arguments) == {"float32": everything}

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--device", "cuda:1"], "--device cuda:1: there is 1 CUDA device"),
            (["--device", "cuda", "--providers", "openvino"], "openvino: it does not run on cuda"),
        ],
    )
    def test_errors(self, fake_gpu, capsys, options, text):
        assert text in error_line(capsys, main(["bench", "--model", "tiny", *options]), 2)

    def test_fused_engine_that_does_not_run_on_the_gpu_is_not_timed(self, monkeypatch):
        job = Job(networks.random_model("tiny", 10, 0), torch.randn(1, 3, 32, 32), 1)
        for prepare in (gpu_engines._fused, gpu_engines._drop_in):
            with (
                pytest.raises(Unavailable, match=r"CPU|use_backend"),
                tf.use_backend("reference"),
            ):
                prepare(job)

    def test_version_says_what_the_kernels_are_for(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
        monkeypatch.setattr(triton, "architecture", lambda: "sm_90")
        monkeypatch.delenv("THRESHNET_FAST_AUTOTUNE", raising=False)
        assert gpu_engines._own_version() == f"{tf.__version__} sm_90"
        monkeypatch.setenv("THRESHNET_FAST_AUTOTUNE", "1")
        assert gpu_engines._own_version() == f"{tf.__version__} sm_90 measured tiles"

    @pytest.mark.parametrize("name", ["eager", "channels-last", "eager-graph"])
    def test_providers_run_the_weights_of_the_job(self, fake_gpu, name):
        job = Job(networks.random_model("tiny", 10, 0), torch.randn(2, 3, 40, 48), 1)
        provider = gpu_engines.CUDA_PROVIDERS[name].build(job)
        reference = networks.reference_output(job.model, job.x)
        assert networks.worst_error(provider.run(), reference) <= 1e-4 * reference.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(capsys, monkeypatch):
    status = main(["bench", "--device", "cuda"])
    reason = "was built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    text = f"--device cuda: torch {torch.__version__} {reason}"
    assert error_line(capsys, status, 2) == f"threshnet-fast bench: error: {text}"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(CommandError, match="finds no CUDA device"):
        arguments.check_device(torch.device("cuda"))


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_reaches_the_kernels(name):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    expected = "tf32" if name == "tf32" else "ieee"
    with PRECISIONS[name].active():
        assert triton.float32_precision() == expected
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (name == "tf32", name == "tf32")
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == before


class TestMachine:
    class Properties:
        uuid = "8b0c-17"

    def smi(self, monkeypatch, answer):
        commands = []

        def run(command, **_):
            commands.append(command)
            if isinstance(answer, Exception):
                raise answer
            return subprocess.CompletedProcess(command, 0, stdout=answer, stderr="")

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self.Properties)
        monkeypatch.setattr(machine.subprocess, "run", run)
        return commands

    def test_driver_and_clocks(self, monkeypatch):
        place = torch.device("cuda", 1)
        commands = self.smi(monkeypatch, "580.65.06\n")
        assert machine.driver(place) == "580.65.06"
        assert commands[0][:2] == ["nvidia-smi", "--id=GPU-8b0c-17"]
        self.smi(monkeypatch, "1755, 1980, 2619, 2619, 700.00\n")
        expected = "SM 1755 of 1980 MHz, memory 2619 of 2619 MHz, 700.00 W"
        assert machine.clocks(place) == expected

    @pytest.mark.parametrize(
        "answer", [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi"), "a, b\n"]
    )
    def test_unknown(self, monkeypatch, answer):
        self.smi(monkeypatch, answer)
        assert machine.driver(torch.device("cuda")) == ""
        assert machine.clocks(torch.device("cuda")) == ""

    @pytest.mark.parametrize(
        ("number", "text"), [(91900, "cuDNN 9.19.0"), (90100, "cuDNN 9.1.0"), (8907, "cuDNN 8.9.7")]
    )
    def test_libraries(self, monkeypatch, number, text):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
        assert machine.accelerator_libraries().startswith(f"CUDA 13.0, {text}")


class TestProviders:
    @pytest.mark.parametrize(
        "name", [n for n in cpu_engines.PROVIDERS if not n.startswith("compile")]
    )
    @pytest.mark.filterwarnings("ignore")
    def test_agrees_with_float64(self, name):
        if (reason := cpu_engines.PROVIDERS[name].objection()) is not None:
            pytest.skip(reason)
        job = Job(networks.random_model("tiny", 10, 0), torch.randn(2, 3, 40, 48), 1)
        reference = networks.reference_output(job.model, job.x)
        provider = build(name, job)
        for _ in range(2):
            error = networks.worst_error(provider.as_tensor(provider.run()), reference)
            assert error <= cpu_engines.ERROR_LIMIT * float(reference.abs().max())
        assert cpu_engines.PROVIDERS[name].version()

    @pytest.mark.parametrize(
        "name", [n for n in cpu_engines.BFLOAT16_PROVIDERS if not n.startswith("compile")]
    )
    @pytest.mark.filterwarnings("ignore")
    def test_calculates_in_bfloat16(self, name):
        spec = cpu_engines.BFLOAT16_PROVIDERS[name]
        if (reason := spec.objection()) is not None:
            pytest.skip(reason)
        job = bfloat16_job(2, 40, 48)
        reference = networks.reference_output(job.model, job.x)
        try:
            provider = build(name, job)
        except Unavailable as reason:
            pytest.skip(str(reason))
        for _ in range(2):
            output = provider.as_tensor(provider.run())
            error = networks.worst_error(output, reference) / float(reference.abs().max())
            assert cpu_engines.ERROR_LIMIT < error <= PRECISIONS["bfloat16"].error_limit
        if spec.ours:
            assert spec.version() == f"{tf.__version__} {cpu.isa(torch.bfloat16)}"
        rounded = name not in ("openvino", "ncnn")
        assert output.dtype is (torch.bfloat16 if rounded else torch.float32)

    def test_openvino_that_takes_the_hint_and_float32_is_unavailable(self, monkeypatch):
        openvino = pytest.importorskip("openvino")

        class Core(openvino.Core):
            def compile_model(self, model, device, config):
                return super().compile_model(model, device, config | {hint: "f32"})

        hint = "INFERENCE_PRECISION_HINT"
        if (reason := cpu_engines.PROVIDERS["openvino"].objection()) is not None:
            pytest.skip(reason)
        monkeypatch.setattr(openvino, "Core", Core)
        with pytest.raises(Unavailable, match="calculates in f32 on this processor"):
            build("openvino", bfloat16_job(1, 32, 32))

    def test_precisions_of_a_device(self):
        assert dtypes("cpu") == ["float32", "bfloat16"]
        assert dtypes("cuda") == list(PRECISIONS)
        assert registry("cpu", "tf32") == {}
        assert registry("cpu") is cpu_engines.PROVIDERS
        for name, spec in cpu_engines.BFLOAT16_PROVIDERS.items():
            assert spec.ours == cpu_engines.PROVIDERS[name].ours
            assert spec.title == cpu_engines.PROVIDERS[name].title

    def test_float32_parts_leave_the_job_alone(self):
        job = bfloat16_job(1, 32, 32)
        module, x = float32_parts(job)
        assert {p.dtype for p in module.parameters()} == {x.dtype} == {torch.float32}
        assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16}
        assert torch.equal(module[0].conv.weight, job.model.base[0].conv.weight.float())
        exact = Job(module, x, 1)
        assert float32_parts(exact)[0] is module
        assert float32_parts(exact)[1] is x

    @pytest.mark.parametrize("images", [1, 5])
    @pytest.mark.filterwarnings("ignore")
    def test_ncnn_keeps_the_order_of_images_that_threads_share(self, images):
        if (reason := cpu_engines.PROVIDERS["ncnn"].objection()) is not None:
            pytest.skip(reason)
        x = torch.randn(images, 3, 32, 32)
        job = Job(networks.random_model("tiny", 10, 0), x, 2)
        reference = networks.reference_output(job.model, job.x)
        assert len(torch.unique(reference, dim=0)) == images
        provider = cpu_engines.PROVIDERS["ncnn"].build(job)
        error = networks.worst_error(provider.as_tensor(provider.run()), reference)
        assert error <= cpu_engines.ERROR_LIMIT * float(reference.abs().max())

    @pytest.mark.filterwarnings("ignore")
    def test_mnn_leaves_the_environment_and_the_output_alone(self, capfd):
        if (reason := cpu_engines.PROVIDERS["mnn"].objection()) is not None:
            pytest.skip(reason)
        job = Job(networks.random_model("tiny", 10, 0), torch.randn(1, 3, 32, 32), 1)
        cpu_engines.PROVIDERS["mnn"].build(job).run()
        assert capfd.readouterr().out == ""
        assert "MNN.tools.utils.log" not in sys.modules

    def test_missing_packages_are_named_with_what_installs_them(self, monkeypatch):
        monkeypatch.setattr(cpu_engines.importlib.util, "find_spec", lambda name: None)
        for name in ("ncnn", "executorch", "mnn", "opencv"):
            assert "pip install" in str(cpu_engines.PROVIDERS[name].objection())
        assert "opencv-python-headless" in str(cpu_engines.PROVIDERS["opencv"].objection())

    def test_converter_that_fails_is_reported_with_its_last_words(self, tmp_path):
        def convert(script: str) -> None:
            cpu_engines._convert([sys.executable, "-c", script], tmp_path / "model")

        with pytest.raises(RuntimeError, match=r"cannot be converted: no such layer$"):
            convert("import sys; sys.exit('no such layer')")
        with pytest.raises(RuntimeError, match=r"cannot be converted: done$"):
            convert("print('done')")
        convert("open('model', 'w').close()")

    def test_fastest_of_several_settings(self, monkeypatch):
        times = {"a": [9, 4], "b": [5, 5], "c": [8, 8]}
        taken = []
        monkeypatch.setattr(cpu_engines, "host_timer", lambda call: times[call()].pop())
        assert cpu_engines._fastest(list("abc"), lambda name: taken.append(name) or name, 2) == "a"
        assert taken == list("abcabc")

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        "name", ["compile", pytest.param("compile-max", marks=pytest.mark.sweep)]
    )
    def test_compile(self, name, dtype):
        if (reason := cpu_engines.PROVIDERS[name].objection()) is not None:
            pytest.skip(reason)
        job = Job(networks.random_model("tiny", 10, 0), torch.randn(2, 3, 32, 32), 1)
        job = bfloat16_job(2, 32, 32) if dtype == "bfloat16" else job
        reference = networks.reference_output(job.model, job.x)
        output = build(name, job).run()
        error = networks.worst_error(output, reference)
        assert error <= PRECISIONS[dtype].error_limit * float(reference.abs().max())

    @pytest.mark.slow
    def test_compiled_networks_are_not_compiled_again_after_another(self):
        if (reason := cpu_engines.PROVIDERS["compile"].objection()) is not None:
            pytest.skip(reason)
        from torch._dynamo.utils import counters

        job = Job(networks.random_model("tiny", 10, 0), torch.randn(1, 3, 32, 32), 1)
        before = counters["stats"]["unique_graphs"]
        built = [build(name, job) for name in ("compile", "compile-max")]
        assert counters["stats"]["unique_graphs"] == before + 2
        for provider in built:
            provider.run()
        assert counters["stats"]["unique_graphs"] == before + 2

    def test_bfloat16_does_not_pass(self):
        model = networks.random_model("tiny", 10, 0)
        x = torch.randn(2, 3, 32, 32)
        reference = networks.reference_output(model, x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = plain_module(model)(x)
        limit = cpu_engines.ERROR_LIMIT * float(reference.abs().max())
        assert networks.worst_error(output, reference) > limit

    def test_unavailable(self, monkeypatch):
        absent = replace(cpu_engines.PROVIDERS["eager"], objection=lambda: "because")
        monkeypatch.setitem(cpu_engines.PROVIDERS, "eager", absent)
        job = Job(networks.random_model("tiny", 10, 0), torch.randn(1, 3, 32, 32), 1)
        with pytest.raises(Unavailable, match="because"):
            build("eager", job)

    def test_no_statistic_is_trivial(self):
        model = networks.random_model("tiny", 10, 0)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) == 2 + 2 * 2 + 1 + 3 + 1
        for norm in norms:
            for tensor in (norm.running_mean, norm.bias, norm.weight, norm.running_var - 1):
                assert tensor.abs().max() > 0.05
                assert (tensor != 0).all()
        assert not model.training

    def test_equal_seeds_give_equal_models(self):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first = networks.random_model("tiny", 10, 3).state_dict()
        assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
        torch.manual_seed(6)
        second = networks.random_model("tiny", 10, 3).state_dict()
        other = networks.random_model("tiny", 10, 4).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["base.0.conv.weight"], other["base.0.conv.weight"])

    def test_memory(self):
        job = Job(networks.random_model("threshnet79", 10, 0), torch.randn(1, 3, 64, 64), 1)
        memory = measure("eager", job, "threshnet79", 10, 0)
        if memory is None:
            pytest.skip("this system cannot tell the peak of resident memory")
        assert memory.peak >= 300_000
        assert memory.peak < 500_000_000

    def test_memory_in_bfloat16(self):
        model = networks.random_model("threshnet79", 10, 0).bfloat16()
        job = Job(model, torch.randn(1, 3, 64, 64).bfloat16(), 1)
        memory = measure("channels-last", job, "threshnet79", 10, 0, "bfloat16")
        if memory is None:
            pytest.skip("this system cannot tell the peak of resident memory")
        weights = sum(2 * parameter.numel() for parameter in model.parameters())
        assert 0.8 * weights < memory.peak < 500_000_000, "its copy of the weights"


class TestTiming:
    def test_providers_take_turns(self):
        order: list[str] = []
        calls = {name: lambda name=name: order.append(name) for name in "abc"}
        samples = timing.interleave(calls, rounds=3)
        turns = [order[0]] + [b for a, b in itertools.pairwise(order) if a != b]
        assert "".join(turns) == "abcabcabc"
        assert all(len(sample.nanoseconds) < order.count(n) for n, sample in samples.items())

    def test_time_budget_is_kept_and_progress_ends_at_one(self):
        seen: list[float] = []
        samples = timing.interleave({"a": lambda: None}, seconds=0.2, progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(1.0, abs=0.2)
        assert sum(samples["a"].nanoseconds) < 2e9

    def test_at_least_three_rounds(self):
        turns: list[str] = []
        calls = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
        timing.interleave(calls, seconds=1e-6)
        assert sum(a != b for a, b in itertools.pairwise(turns)) == 5

    @pytest.mark.parametrize("budget", [{}, {"seconds": 1.0, "rounds": 1}])
    def test_exactly_one_budget(self, budget):
        with pytest.raises(ValueError, match="exactly one"):
            timing.interleave({"a": lambda: None}, **budget)

    def test_percentile(self):
        values = [40.0, 10.0, 30.0, 20.0, 50.0]
        assert timing.percentile(values, 0) == 10
        assert timing.percentile(values, 0.5) == 30
        assert timing.percentile(values, 0.2) == 18
        assert timing.percentile(values, 1) == 50
        assert timing.percentile([7.0], 0.8) == 7
        with pytest.raises(ValueError, match="empty"):
            timing.percentile([], 0.5)
        with pytest.raises(ValueError, match="fraction"):
            timing.percentile(values, 1.5)

    def test_timer_of_a_gpu(self):
        events = []

        class Event:
            def record(self):
                self.at = len(events)
                events.append("record")

            def synchronize(self):
                events.append("wait for event")

            def elapsed_time(self, end):
                assert end.at > self.at
                return 0.0015

        timer = timing.CudaTimer(
            torch.device("cuda"), event=Event, synchronize=lambda device: events.append(str(device))
        )
        assert timer(lambda: events.append("call")) == 1500
        assert events == ["cuda", "record", "call", "record", "wait for event"]
        samples = timing.interleave({"a": lambda: None}, rounds=1, timer=timer)
        assert samples["a"].milliseconds(0.5) == pytest.approx(0.0015)

    def test_cache_is_flushed_before_the_device_is_waited_for(self):
        memory = torch.ones(16, dtype=torch.uint8)
        seen = []

        class Event:
            record = synchronize = lambda self: None
            elapsed_time = lambda self, end: 1.0  # noqa: E731

        timer = timing.CudaTimer(
            torch.device("cuda"),
            memory[:10],
            event=Event,
            synchronize=lambda device: seen.append(int(memory.sum())),
        )
        timer(lambda: None)
        assert seen == [6], "the first ten bytes are zero by then"


class TestResults:
    def row(self, **values: str) -> dict[str, str]:
        return {**dict.fromkeys(results.COLUMNS, ""), **values}

    def test_latest_run_wins_as_a_whole(self):
        rows = [
            self.row(run="1", model="a", provider="fused", min_ms="3"),
            self.row(run="1", model="a", provider="openvino", min_ms="1"),
            self.row(run="1", model="b", provider="fused", min_ms="4"),
            self.row(run="2", model="a", provider="fused", min_ms="2"),
        ]
        kept = results.latest_rows(rows)
        assert [(row["run"], row["model"], row["provider"]) for row in kept] == [
            ("2", "a", "fused"),
            ("1", "b", "fused"),
        ]

    def test_devices_are_not_mixed(self):
        gpu = {"device": "cuda", "accelerator": "H100", "l2": "kept"}
        rows = [
            self.row(run="1", model="a", provider="fused", device="cpu"),
            self.row(run="2", model="a", provider="fused", **gpu),
            self.row(run="3", model="a", provider="fused", **gpu | {"accelerator": "A100"}),
        ]
        assert results.latest_rows(rows) == rows
        assert [len(group) for group in report.cells(rows)] == [1, 1, 1]

    def test_round_trip(self, tmp_path):
        row = self.row(run="1", status='failed: "x", y')
        results.append_rows(tmp_path / "a.csv", [row])
        results.append_rows(tmp_path / "a.csv", [row])
        assert results.read_rows(tmp_path / "a.csv") == [row, row]

    def test_unknown_column(self, tmp_path):
        with pytest.raises(ValueError, match="surprise"):
            results.append_rows(tmp_path / "a.csv", [{"surprise": 1}])

    def test_missing_file(self, tmp_path):
        with pytest.raises(CommandError, match="cannot read"):
            results.read_rows(tmp_path / "a.csv")


class TestErrorLine:
    """What any command prints when it fails."""

    def fails(self, capsys, monkeypatch, error: BaseException) -> str:
        def run(arguments):
            raise error

        monkeypatch.setattr(info, "run", run)
        return error_line(capsys, main(["info", "tiny"]), 1)

    def test_long_one_is_cut(self, capsys, monkeypatch):
        for error in (RuntimeError("Missing key\n\t" * 3000), CommandError("Missing key " * 3000)):
            line = self.fails(capsys, monkeypatch, error)
            assert len(line) < 1200
            assert line.startswith("threshnet-fast info: error: Missing key Missing key")
            assert "more letters (--debug shows all)" in line
            with pytest.raises(type(error), match=r"(Missing key\s+){3000}"):
                main(["info", "tiny", "--debug"])

    def test_what_a_terminal_would_obey(self, capsys, monkeypatch):
        line = self.fails(capsys, monkeypatch, CommandError("a\x1b[2J\udcff\u202eb"))
        assert line == r"threshnet-fast info: error: a\x1b[2J\udcff\u202eb"

    def test_in_arguments(self, capsys):
        line = error_line(capsys, main(["info", "tiny", "--\x1b[2J\udcff"]), 2)
        assert r"unrecognized arguments: --\x1b[2J\udcff" in line

    @pytest.mark.parametrize("name", ["predict", "bench", "train"])
    def test_threads(self, capsys, name):
        rest = {"predict": ["a.png"], "bench": [], "train": ["tiny", "--output", "run"]}[name]
        most = max(64, 4 * machine.usable_processors())
        for wrong in (most + 1, 100000, 10**30):
            line = error_line(capsys, main([name, *rest, "--threads", str(wrong)]), 2)
            assert f"{wrong}: expected at most {most} threads" in line
        assert arguments.threads(str(most)) == most

    def test_interruption_while_commands_are_imported(self, capsys, monkeypatch):
        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "build_parser", interrupt)
        assert main(["info", "tiny"]) == 130
        assert capsys.readouterr().err == "threshnet-fast: error: interrupted\n"


class TestAvailableMemory:
    def test_least_of_machine_and_container(self, tmp_path, monkeypatch):
        def write(name: str, text: str) -> Path:
            (tmp_path / name).write_text(text)
            return tmp_path / name

        free = write("meminfo", "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:   8000 kB\n")
        monkeypatch.setattr(machine, "_MEMINFO", free)
        usage = write("usage", "1000\n")
        for limit, expected in (("max", 8192000), ("5000", 4000), ("10", 0), ("9" * 19, 8192000)):
            monkeypatch.setattr(machine, "_CGROUPS", ((write("limit", limit), usage),))
            assert machine.available_memory() == expected
        monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "missing")
        monkeypatch.setattr(machine, "_CGROUPS", ())
        assert machine.available_memory() is None

    def test_what_is_needed(self, monkeypatch):
        """Of the input 12 bytes a number, and of the largest map 8: that of the first layer."""
        network = tf.create_model("tiny").eval()
        buffers = lower(network, (1, 3, 32, 32), fold=False).buffers
        largest = max(buffer.pixels * buffer.channels for buffer in buffers)
        needed = 5 * (12 * 3 * 32 * 32 + 8 * largest)
        shapes = [(32, 32, 5)]
        monkeypatch.setattr(machine, "available_memory", lambda: needed)
        latency.check_memory(["tiny"], shapes, torch.device("cpu"))
        monkeypatch.setattr(machine, "available_memory", lambda: needed - 1)
        with pytest.raises(
            CommandError, match=r"^32:5 needs at least 0\.\d GB of memory with tiny"
        ):
            latency.check_memory(["tiny"], shapes, torch.device("cpu"))
        latency.check_memory(["tiny"], shapes, torch.device("cuda"))
        monkeypatch.setattr(machine, "available_memory", lambda: None)
        latency.check_memory(["tiny"], [(65536, 65536, 10**9)], torch.device("cpu"))


class TestDisturbance:
    def row(self, load: str, processors: str = "2", threads: str = "2") -> dict[str, str]:
        return {"other_load": load, "processors": processors, "threads": threads}

    def test_limits(self):
        assert report.disturbance([self.row(""), self.row("0.05")]) is None
        assert report.disturbance([self.row("0.05"), self.row("0.7")]) == 0.7
        assert report.disturbance([self.row("0.7", threads="1")]) is None, "one is idle"
        assert report.disturbance([self.row("1.7", threads="1")]) == 1.7
        assert report.disturbance([self.row("0.5", threads="4")]) == 0.5, "more than there are"

    def test_processors_do_not_disturb_a_gpu(self):
        assert report.disturbance([self.row("5") | {"device": "cuda"}]) is None

    def test_own_work_does_not_count_and_that_of_others_does(self, monkeypatch):
        if machine._processor_seconds() is None:
            pytest.skip("this system does not tell")
        monkeypatch.setattr(machine, "usable_processors", os.cpu_count)
        seen = iter([10.0, 13.0])
        monkeypatch.setattr(machine, "_processor_seconds", lambda: next(seen))
        clock = iter([100.0, 102.0])
        monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
        assert machine.OtherLoad().stop() == 1.5

    def test_own_work_is_left_out(self):
        def everybody() -> float:
            fields = list(map(int, Path("/proc/stat").read_text().split()[1:9]))
            return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

        if machine._processor_seconds() is None:
            pytest.skip("this system does not tell")
        total, others, own = everybody(), machine._processor_seconds(), time.process_time()
        while time.process_time() < own + 0.5:
            pass
        others = machine._processor_seconds() - others
        total, own = everybody() - total, time.process_time() - own
        assert others == pytest.approx(total - own, abs=0.2)

    def test_unknown_on_a_part_of_the_processors(self, monkeypatch):
        monkeypatch.setattr(machine, "usable_processors", lambda: (os.cpu_count() or 1) + 1)
        assert machine.OtherLoad().stop() is None


class TestInfo:
    def test_totals(self, capsys):
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert "16,189,202" in out
        assert "4.027 G an image" in out
        assert "base.3.conv1" in out
        assert main(["info", "threshnet79"]) == 0
        out = capsys.readouterr().out
        assert "14,371,858" in out
        assert "3.423 G an image" in out

    def test_csv_sums_to_the_totals(self, capsys):
        assert main(["info", "threshnet95", "--csv", "-"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert round(sum(int(row["macs"]) for row in rows) / 1e9, 3) == 4.027
        assert sum("conv" in row["operation"] for row in rows) == 95
        fused = sum(int(row["bytes_fused"]) for row in rows)
        assert fused < sum(int(row["bytes_unfused"]) for row in rows)
        assert main(["info", "threshnet95", "--csv", "layers.csv"]) == 0
        with Path("layers.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == rows

    def test_batch_multiplies_the_work_but_not_the_parameters(self, capsys):
        totals = []
        for batch in ("1", "4"):
            assert main(["info", "tiny", "--size", "32x40", "--batch", batch, "--csv", "-"]) == 0
            rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
            totals.append([sum(int(row[c]) for row in rows) for c in ("macs", "parameters")])
        assert totals[1] == [4 * totals[0][0], totals[0][1]]

    @pytest.mark.parametrize(
        ("arguments", "text", "expected"),
        [
            (["threshnet96"], "did you mean 'threshnet95'?", 2),
            (["tiny", "--size", "4"], "too small", 2),
            (["tiny", "--size", "0"], "expected 1 to 65536", 2),
            (["tiny", "--size", "1x2x3"], "expected a size", 2),
            (["tiny", "--batch", "0"], "expected a positive integer", 2),
            (["tiny", "--csv", "missing/layers.csv"], "cannot write missing/layers.csv", 1),
            (["--device", "h200"], "expected one of rtx3050, a100, h100, b200, mi300x", 2),
            (["--device", "h10"], "did you mean 'h100'?", 2),
            (["--device", "h100", "--dtype", "float15"], "expected one of float32, tf32", 2),
            (["tiny", "--dtype", "float16"], "--dtype belongs to a prediction: add --device", 2),
            (["tiny", "--picture", "r.png"], "--picture belongs to a prediction", 2),
            (["tiny", "--device", "h100", "--picture", "missing/r.png"], "there is no folder", 1),
            (["tiny", "--device", "h100", "--picture", "r.txt"], "a name that ends in .png", 1),
            (["tiny", "--device", "h100", "--csv", "missing/a.csv"], "cannot write missing", 1),
        ],
    )
    def test_errors(self, capsys, arguments, text, expected):
        assert text in error_line(capsys, main(["info", *arguments]), expected)

    @pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
    def test_prediction_is_labelled_and_its_totals_are_those_of_the_csv_file(self, capsys, dtype):
        arguments = ["info", "tiny", "--size", "64", "--device", "A100", "--dtype", dtype]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        first = out.splitlines()[0]
        assert first.startswith("Prediction, not a measurement: tiny, 3x64x64, batch 1")
        assert f"{dtype} on NVIDIA A100 SXM4 80 GB (sm_80)" in first
        assert "All times are predictions" in out.splitlines()[-1]
        assert main([*arguments, "--csv", "-"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert tuple(rows[0]) == prediction_report.COLUMNS
        assert {(row["device"], row["dtype"]) for row in rows} == {("a100", dtype)}
        total = next(line for line in out.splitlines() if line.startswith("total"))
        for column in ("unfused_eager", "unfused_graph", "fused_graph"):
            seconds = sum(float(row[f"predicted_{column}_us"]) for row in rows)
            assert f"{seconds:,.2f}" in total.split()
        launches = [
            sum(int(row[f"launches_{way}"]) for row in rows) for way in ("unfused", "fused")
        ]
        assert f"{launches[0]} > {launches[1]}" in total
        for row in rows:
            assert int(row["bytes_fused"]) <= int(row["bytes_unfused"])
            assert {row["bound_fused"], row["bound_unfused"]} <= {
                "compute",
                "cache",
                "memory",
                "launch",
            }
            assert ("x" in row["tile_fused"]) == (int(row["flops"]) > 0)
        convolution = rows[0]
        assert int(convolution["flops"]) == 2 * 32 * 32 * 27 * 8
        assert int(convolution["executed_flops_fused"]) > int(convolution["flops"])

    def test_prediction_is_float32_unless_told_otherwise(self, capsys):
        assert main(["info", "tiny", "--size", "32", "--device", "mi300x"]) == 0
        assert "float32 on AMD Instinct MI300X (gfx942)" in capsys.readouterr().out

    def test_prediction_files(self, capsys):
        arguments = ["info", "tiny", "--size", "32", "--device", "rtx3050", "--dtype", "fp16"]
        assert main([*arguments, "--csv", "a.csv", "--picture", "a.png"]) == 0
        assert capsys.readouterr().out == "Written: a.csv\nWritten: a.png\n"
        with Path("a.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["dtype"] for row in rows} == {"float16"}
        assert main([*arguments, "--csv", "-", "--picture", "b.svg"]) == 0
        assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == rows
        assert "<svg" in Path("b.svg").read_text()

    def test_roofline_is_drawn_with_something_on_it(self):
        from matplotlib import image

        assert main(["info", "tiny", "--size", "64", "--device", "b200", "--picture", "r.png"]) == 0
        assert Path("r.png").read_bytes().startswith(PNG)
        pixels = image.imread("r.png")[..., :3]
        height, width, _ = pixels.shape
        assert min(height, width) > 600
        for color in ("#c44e52", "#8c9bb0"):
            wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            # Below the title and above the legend: points.
            middle = pixels[height // 8 : -height // 6]
            assert (abs(middle - wanted).max(-1) < 0.02).sum() > 200, color

    def test_list_of_devices(self, capsys):
        assert main(["info", "--device", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[2:]] == [d.name for d in gpus.DEVICES]


class TestDoctor:
    @pytest.mark.usefixtures("needs_engine")
    def test_sound(self, capsys):
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "Everything works." in out
        assert out.count("self-test") == 4
        assert "FAIL" not in out

    def test_says_what_serves_gpus(self, monkeypatch, capsys):
        main(["doctor"])
        out = capsys.readouterr().out
        if not torch.cuda.is_available():
            (line,) = [
                line for line in out.splitlines() if line.startswith("[note] CUDA kernels: ")
            ]
            assert str(cuda.unavailable_reason()) in line
            (line,) = [line for line in out.splitlines() if line.startswith("[note] Triton: ")]
            assert str(triton.unavailable_reason()) in line
        monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
        monkeypatch.setattr(triton, "architecture", lambda: "sm_90")
        main(["doctor"])
        monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
        main(["doctor"])
        out = capsys.readouterr().out
        assert f"[  ok] Triton: {triton.version()}, sm_90 kernels" in out
        assert "[  ok] CUDA kernels: loaded, taken by use_backend('cuda') only" in out

    def test_gpu_without_triton_is_a_warning(self, fake_gpu, monkeypatch, capsys):
        monkeypatch.setattr(triton, "unavailable_reason", lambda: "triton is not installed")
        monkeypatch.setattr(triton, "version", lambda: None)
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "[  ok] cuda:0: Test GPU" in out
        assert "[warn] Triton: triton is not installed" in out

    @pytest.mark.usefixtures("needs_engine")
    def test_wrong_results_are_found(self, monkeypatch, capsys):
        def build_wrong(job):
            right = cpu_engines._eager(job)
            return Provider(lambda: right.run() + 1e-4)

        wrong = replace(cpu_engines.PROVIDERS["fused"], build=build_wrong)
        monkeypatch.setitem(cpu_engines.PROVIDERS, "fused", wrong)
        status = main(["doctor"])
        captured = capsys.readouterr()
        assert status == 1
        assert captured.out.count("[FAIL] self-test, fused") == 2
        assert captured.err.strip() == "threshnet-fast doctor: error: 2 checks failed"

    @pytest.mark.usefixtures("needs_engine")
    def test_bad_instruction_set(self, monkeypatch, capsys):
        monkeypatch.setenv(environment.CPU_ISA, "mmx")
        assert main(["doctor"]) == 1
        assert "[FAIL] instruction set: THRESHNET_FAST_CPU_ISA is 'mmx'" in capsys.readouterr().out

    def test_extension_that_is_missing(self, monkeypatch, capsys):
        from threshnet_fast import extension

        monkeypatch.setattr(extension, "unavailable_reason", lambda: "it was not built")
        assert main(["doctor"]) == 1
        captured = capsys.readouterr()
        assert "[FAIL] C++ extension: it was not built" in captured.out
        assert "left out: there is no fused engine here" in captured.out

    @pytest.mark.parametrize("built", [True, False])
    def test_cuda_extension(self, monkeypatch, built):
        reason = None if built else "it was not built"
        monkeypatch.setattr(doctor.extension, "cuda_left_out_reason", lambda: reason)
        path = Path("lib/libthreshnet_fast_cuda.so")
        monkeypatch.setattr(doctor.extension, "cuda_library_path", lambda: path)
        findings = {finding.subject: finding for finding in doctor._extension()}
        assert findings["CUDA extension"].state == ("ok" if built else "note")
        assert findings["CUDA extension"].text == (str(path) if built else "it was not built")

    @pytest.mark.parametrize("built", [True, False])
    def test_cuda_kernels_that_are_off_beside_a_gpu(self, monkeypatch, built):
        reason = "the kernels are off"
        monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(doctor.triton, "unavailable_reason", lambda: "no Triton")
        monkeypatch.setattr(doctor.cuda, "unavailable_reason", lambda: reason)
        absent = None if built else reason
        monkeypatch.setattr(doctor.extension, "cuda_left_out_reason", lambda: absent)
        (finding,) = (item for item in doctor._gpu() if item.subject == "CUDA kernels")
        assert finding.state == ("warn" if built else "note")
        assert finding.text == f"off: {reason}"

    def test_too_many_threads(self, monkeypatch, capsys):
        torch.set_num_threads(2)
        monkeypatch.setattr(machine, "usable_processors", lambda: 1)
        main(["doctor"])
        assert "[warn] threads: 2 for 1 usable processors" in capsys.readouterr().out


class TestMain:
    @pytest.mark.parametrize("name", [[], ["bench"], ["info"], ["doctor"]])
    def test_help(self, capsys, name):
        assert main([*name, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: threshnet-fast")
        assert all(len(line) <= 100 for line in out.splitlines())

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"threshnet_fast {tf.__version__}\n"

    @pytest.mark.parametrize("arguments", [[], ["benhc"]])
    def test_no_such_command(self, capsys, arguments):
        error_line(capsys, main(arguments), 2)

    def test_process(self):
        result = subprocess.run(
            [sys.executable, "-m", "threshnet_fast.cli", "info", "threshnet59"],
            cwd=Path(tf.__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr == (
            "threshnet-fast info: error: unknown model 'threshnet59': did you mean 'threshnet95'?\n"
        )


def test_batch_of_pictures_is_normalised_and_has_no_equal_images():
    found = photographs.installed_photographs()
    if not found:
        pytest.skip("no photograph is installed")
    x = photographs.as_batch(found, 32, 40, 3 * len(found) + 1)
    assert x.shape == (3 * len(found) + 1, 3, 32, 40)
    assert x.is_contiguous()
    assert x.dtype is torch.float32
    assert x.isfinite().all()
    assert -2.2 < float(x.min()) < float(x.max()) < 2.7
    assert 0.3 < float(x.std()) < 2.0
    for i in range(len(x)):
        for j in range(i):
            assert not torch.equal(x[i], x[j])


def test_matplotlib_has_a_photograph():
    pytest.importorskip("matplotlib")
    found = photographs._from_matplotlib()
    assert [picture.pixels.dtype for picture in found] == [torch.uint8] * 3
    assert found[0].pixels.shape[0] == 3
