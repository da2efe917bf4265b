"""The profiler: its operators, what it makes of their numbers, and the command."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_plan import small

import threshnet_fast as tf
from threshnet_fast import environment
from threshnet_fast.bench import profile, results, roofline
from threshnet_fast.cli import CommandError, main
from threshnet_fast.engines import cpu
from threshnet_fast.models import registry
from threshnet_fast.plan import FusedConv, lower, plan_memory, serialize

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
operators = torch.ops.threshnet_fast_cpu
PNG = b"\x89PNG\r\n\x1a\n"
TRANSFORM, ITSELF, REDUCTION = range(3)


def isas():
    return cpu.isa_codes() if cpu.unavailable_reason() is None else [0]


@pytest.fixture
def threads(request):
    """Runs the test on as many PyTorch threads as its parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prepare(plan, isa=None, winograd=-1):
    """A plan's program, packed weights and workspace."""
    count = torch.get_num_threads()
    isa = operators.best_isa() if isa is None else isa
    program = operators.compile_plan(serialize(plan, plan_memory(plan)), isa, count, winograd)
    packed = operators.pack_weights(program, plan.weights())
    return program, packed, operators.create_workspace(program, count)


class TestProfilePlan:
    @pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
    @pytest.mark.parametrize("winograd", [-1, 0])
    @pytest.mark.parametrize("isa", isas())
    def test_times_every_step_and_changes_no_result(self, randomised, threads, winograd, isa):
        plan = lower(randomised(small()), (2, 3, 64, 96))
        program, packed, workspace = prepare(plan, isa, winograd)
        x = torch.randn(2, 3, 64, 96)
        expected = operators.run_plan(x, program, packed, workspace)
        before = time.perf_counter_ns()
        output, times = operators.profile_plan(x, program, packed, workspace.fill_(torch.nan))
        elapsed = time.perf_counter_ns() - before
        assert output.equal(expected)
        assert output.stride() == expected.stride()
        assert times.dtype == torch.int64
        assert times.shape == (len(operators.program_algorithms(program)), 3)
        assert (times >= 0).all()
        assert (times.sum(1) > 0).all()
        # Steps follow each other within the call: together they cannot last longer.
        assert times.sum() <= elapsed

    def test_batch_in_parts(self, randomised):
        program, packed, workspace = prepare(lower(randomised(small()), (3, 3, 32, 32)))
        x = torch.randn(7, 3, 32, 32)
        output, times = operators.profile_plan(x, program, packed, workspace)
        assert output.equal(operators.run_plan(x, program, packed, workspace))
        assert times.shape == (len(operators.program_algorithms(program)), 3)
        assert (times.sum(1) > 0).all()

    @pytest.mark.parametrize("threads", [2], indirect=True)
    def test_passes_before_and_behind_belong_to_their_step(self, threads):
        """Transforms only for Winograd, reductions only for direct convolutions, both somewhere."""
        model = tf.ThreshNet79(num_classes=10).eval()
        found = torch.zeros(3, dtype=torch.bool)
        for size in (32, 160):
            plan = lower(model, (1, 3, size, size))
            program, packed, workspace = prepare(plan)
            x = torch.randn(1, 3, size, size)
            _, times = operators.profile_plan(x, program, packed, workspace)
            direct = operators.program_algorithms(program) == 0
            assert (times[:, ITSELF] > 0).all()
            assert (times[direct, TRANSFORM] == 0).all()
            assert (times[~direct, REDUCTION] == 0).all()
            found |= (times > 0).any(0)
        assert found.tolist() == [True, True, True]

    def test_refuses_what_run_plan_refuses(self, randomised):
        program, packed, workspace = prepare(lower(randomised(small()), (2, 3, 32, 32)))
        x = torch.randn(2, 3, 32, 32)
        for bad, message in (
            ((x[:, :2], program, packed, workspace), r"x has shape \[2, 2, 32, 32\]"),
            ((x.double(), program, packed, workspace), "x has the wrong dtype"),
            ((x, program, packed[:-16], workspace), "packed does not belong"),
            ((x, program, packed, workspace[:16]), "workspace is too small"),
        ):
            with pytest.raises(RuntimeError, match=message):
                operators.profile_plan(*bad)
        with pytest.raises((RuntimeError, ValueError), match="program is not one that"):
            operators.profile_plan(x, program[:-8].clone(), packed, workspace)


class TestMachine:
    @pytest.mark.parametrize("threads", [1, 2], indirect=True)
    def test_is_measured(self, threads):
        for isa in isas():
            for count in range(1, threads + 1):
                peak = operators.peak_flops(isa, count)
                assert 0 < peak < math.inf
        for count in (1, 5, 1 << 20):
            assert 0 < operators.read_bandwidth(torch.ones(count), threads) < math.inf

    @pytest.mark.parametrize("threads", [2], indirect=True)
    def test_bad_arguments(self, threads):
        for isa in (-1, operators.best_isa() + 1):
            with pytest.raises(RuntimeError, match=f"isa is {isa}, expected one that"):
                operators.peak_flops(isa, 1)
        memory = torch.ones(16)
        for count in (0, -1, 3):
            message = f"threads is {count}, expected 1 to 2"
            with pytest.raises(RuntimeError, match=message):
                operators.peak_flops(0, count)
            with pytest.raises(RuntimeError, match=message):
                operators.read_bandwidth(memory, count)
        for bad, message in (
            (memory.double(), "memory has the wrong dtype"),
            (memory[::2], "memory is not contiguous"),
            (memory[:0], "memory is empty"),
        ):
            with pytest.raises(RuntimeError, match=message):
                operators.read_bandwidth(bad, 1)

    def test_the_better_of_two(self):
        first, second = profile.Machine(3.0, 2.0, 1.0), profile.Machine(2.0, 4.0, 1.0)
        assert first.best(second) == profile.Machine(3.0, 4.0, 1.0)


@pytest.mark.usefixtures("one_thread")
class TestProfile:
    @pytest.fixture
    def model(self, randomised):
        return randomised(small())

    @pytest.mark.parametrize("winograd", [-1, 0])
    def test_sums_add_up(self, model, winograd):
        x = torch.randn(2, 3, 64, 64)
        measured = profile.profile(model, x, isa=operators.best_isa(), winograd=winograd, calls=4)
        plan = lower(model, x.shape)
        assert measured.calls == 4
        assert [step.name for step in measured.steps] == [step.name for step in plan.steps]
        assert [step.operation for step in measured.steps] == [s.describe() for s in plan.steps]
        assert [step.bytes for step in measured.steps] == [s.bytes_fused for s in plan.steps]
        total, sums = measured.total, measured.sums()
        assert total.macs == plan.macs
        assert total.bytes == sum(step.bytes_fused for step in plan.steps)
        assert total.steps == len(plan.steps) == sum(s.steps for s in sums)
        assert [s.kind for s in sums] == ["stem", "3x3", "pool", "1x1", "head"]
        for name in ("macs", "executed_macs", "bytes"):
            assert sum(getattr(s, name) for s in sums) == getattr(total, name)
        for name in ("fastest", "median", "transform", "reduction"):
            added = math.fsum(getattr(s, name) for s in sums)
            assert added == pytest.approx(getattr(total, name), rel=1e-9, abs=1e-15)
        both = measured.convolutions()
        assert both.steps == sum(s.steps for s in sums if s.kind in ("1x1", "3x3"))
        for step in measured.steps:
            assert 0 < step.fastest <= step.median
            assert 0 <= max(step.transform, step.reduction) < step.median
        found = {s.algorithm for s in measured.steps if s.algorithm.startswith("winograd")}
        assert winograd != 0 or not found
        assert 0 < measured.call_fastest <= measured.call_median

    def test_without_a_classifier(self, randomised):
        model = randomised(small(num_classes=0))
        x = torch.randn(1, 3, 32, 32)
        measured = profile.profile(model, x, isa=operators.best_isa(), winograd=-1, calls=1)
        assert len(measured.steps) == len(lower(model, x.shape).steps)
        assert measured.steps[-1].kind == "head"
        assert measured.steps[-1].macs == 0

    def test_time_budget_and_progress(self, model):
        seen: list[float] = []
        measured = profile.profile(
            model,
            torch.randn(1, 3, 32, 32),
            isa=operators.best_isa(),
            winograd=-1,
            seconds=1e-6,
            progress=seen.append,
        )
        assert measured.calls == 3, "at least three, however short the time is"
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == (0, 1)

    @pytest.mark.parametrize("budget", [{}, {"seconds": 1.0, "calls": 1}])
    def test_exactly_one_budget(self, model, budget):
        with pytest.raises(ValueError, match="exactly one of seconds and calls"):
            profile.profile(model, torch.randn(1, 3, 32, 32), isa=0, winograd=-1, **budget)

    def test_a_different_result_is_an_error(self, model, monkeypatch):
        def other(self, x, packed):
            return torch.zeros(1, 7)

        monkeypatch.setattr(cpu.CompiledPlan, "__call__", other)
        with pytest.raises(RuntimeError, match="something else"):
            profile.profile(model, torch.randn(1, 3, 32, 32), isa=0, winograd=-1, calls=1)

    @pytest.mark.parametrize(
        ("algorithm", "tile"),
        [("winograd", 2), ("winograd F(2x2, 3x3)", 2), ("winograd F(4x4, 3x3)", 4)],
    )
    def test_multiplications_of_winograd(self, model, algorithm, tile):
        plan = lower(model, (2, 3, 36, 52))
        convolutions = [s for s in plan.steps if isinstance(s, FusedConv) and s.stride == (1, 1)]
        step = next(s for s in convolutions if s.kernel == (3, 3))
        output = plan.buffers[step.output.buffer]
        tiles = 2 * math.ceil(output.height / tile) * math.ceil(output.width / tile)
        products = (tile + 2) ** 2 * step.input_channels * step.output.channels
        assert profile._executed_macs(plan, step, algorithm) == tiles * products

    def test_multiplications_without_winograd(self, model):
        plan = lower(model, (1, 3, 32, 32))
        step = next(s for s in plan.steps if s.valid_macs < s.macs)
        assert profile._executed_macs(plan, step, "direct") == step.valid_macs
        assert profile._executed_macs(plan, step, "packed") == step.macs


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> str:
    """Name of a network that is small enough for a test, in an empty folder."""

    def build(num_classes: int = 10) -> tf.ThreshNet:
        return small(num_classes=num_classes)

    monkeypatch.setitem(registry._REGISTRY, "tiny", build)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THRESHNET_FAST_DEBUG", raising=False)
    monkeypatch.delenv(environment.EXACT, raising=False)
    return "tiny"


def profiled(*arguments: str, command: Sequence[str] = ("profile",)) -> int:
    common = ["--model", "tiny", "--threads", "1", "--repeats", "2", "--random-input"]
    return main([*command, *common, *arguments])


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("tiny", "one_thread")
class TestCommand:
    def test_tables_csv_and_plot(self, capsys):
        assert profiled("--cell", "32:1", "--cell", "64x48:2") == 0
        out = capsys.readouterr().out
        assert "tiny, 32x32, batch 1, float32, 1 thread" in out
        assert "tiny, 64x48, batch 2, float32, 1 thread" in out
        assert "Left out" not in out, "no other engine is measured"
        assert "Peak of an FMA loop" in out
        assert Path("threshnet-fast-profile.png").read_bytes().startswith(PNG)
        rows = read("threshnet-fast-profile.csv")
        assert list(rows[0]) == list(results.PROFILE_COLUMNS)
        steps = lower(tf.create_model("tiny"), (1, 3, 32, 32)).steps
        assert len(rows) == 2 * len(steps)
        assert [row["step"] for row in rows[: len(steps)]] == [str(i) for i in range(len(steps))]
        for cell in (rows[: len(steps)], rows[len(steps) :]):
            assert sum(float(row["share"]) for row in cell) == pytest.approx(1, abs=1e-3)
            for row in cell:
                fastest = float(row["min_us"])
                assert 0 < fastest <= float(row["p50_us"])
                peak, gflops = float(row["peak_gflops"]), float(row["gflops"])
                assert gflops == pytest.approx(
                    2e-3 * int(row["macs"]) / fastest, rel=0.01, abs=1e-3
                )
                assert float(row["peak_share"]) == pytest.approx(gflops / peak, rel=0.01, abs=1e-3)
                speed = 1e-3 * int(row["bytes"]) / fastest
                assert float(row["gbytes_per_second"]) == pytest.approx(speed, rel=0.01, abs=1e-3)
                assert (row["calls"], row["threads"], row["exact"]) == ("2", "1", "0")
                assert row["isa"] == cpu.isa()
            assert f"\n{cell[-1]['name']}" in out

    def test_sums_are_those_of_the_steps(self, capsys):
        assert profiled("--cell", "48:1", "--csv", "a.csv") == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        start = next(i for i, line in enumerate(lines) if line[:2] == ["kind", "steps"])
        sums = {line[0]: line for line in lines[start + 2 :] if len(line) > 9}
        rows = read("a.csv")
        for kind in ("stem", "1x1", "3x3", "pool", "head", "all"):
            chosen = [row for row in rows if kind in (row["kind"], "all")]
            if kind == "1x1":
                # The line of both kinds of convolutions begins with the same word.
                chosen = [row for row in rows if row["kind"] == "1x1"]
                sums[kind] = next(line for line in lines[start:] if line[:1] == ["1x1"])
            assert sums[kind][1] == str(len(chosen))
            for column, name in ((2, "min_us"), (3, "p50_us")):
                added = sum(float(row[name]) for row in chosen)
                assert float(sums[kind][column]) == pytest.approx(added, abs=0.06)
        both = next(line for line in lines[start:] if line[:3] == ["1x1", "+", "3x3"])
        assert int(both[3]) == int(sums["1x1"][1]) + int(sums["3x3"][1])

    def test_appends_and_names_its_plot_after_the_csv_file(self):
        for _ in range(2):
            assert profiled("--cell", "32:1", "--csv", "all.csv") == 0
        rows = read("all.csv")
        assert len({row["run"] for row in rows}) == 2
        assert Path("all.png").is_file()
        assert profiled("--cell", "32:1", "--csv", "all.csv", "--plot", "other.svg") == 0
        assert "<svg" in Path("other.svg").read_text()

    def test_no_files(self, tmp_path, capsys):
        assert profiled("--cell", "32:1", "--no-files") == 0
        assert "Written" not in capsys.readouterr().out
        assert list(tmp_path.iterdir()) == []

    def test_exact(self, capsys, monkeypatch):
        monkeypatch.setenv(environment.EXACT, "1")
        assert profiled("--cell", "64:1", "--csv", "a.csv") == 0
        assert ", exact" in capsys.readouterr().out
        rows = read("a.csv")
        assert {row["exact"] for row in rows} == {"1"}
        assert not any(row["algorithm"].startswith("winograd") for row in rows)

    def test_instruction_set(self, monkeypatch):
        monkeypatch.setenv(environment.CPU_ISA, "scalar")
        assert profiled("--cell", "32:1", "--csv", "a.csv") == 0
        assert {row["isa"] for row in read("a.csv")} == {"scalar"}

    @pytest.mark.parametrize(
        ("arguments", "text", "expected"),
        [
            (("--providers", "eager"), "leave --providers out", 2),
            (("--compile",), "leave --compile out", 2),
            (("--memory",), "leave --memory out", 2),
            (("--device", "cuda"), "leave --device out", 2),
            (("--dtype", "float16"), "--dtype", 2),
            (("--flush-l2",), "--flush-l2", 2),
            (("--cell", "4:1"), "too small", 2),
            (("--csv", "missing/a.csv"), "cannot write", 1),
            (("--plot", "a.bmp"), "cannot write", 1),
        ],
    )
    def test_errors(self, capsys, arguments, text, expected):
        assert profiled(*arguments, command=("bench", "--profile")) == expected
        error = capsys.readouterr().err
        assert text in error
        assert len(error.splitlines()) == 1

    def test_option_of_bench_does_the_same(self, capsys):
        assert profiled("--cell", "32:1", command=("bench", "--profile")) == 0
        assert "tiny, 32x32, batch 1, float32, 1 thread" in capsys.readouterr().out
        steps = lower(tf.create_model("tiny"), (1, 3, 32, 32)).steps
        assert len(read("threshnet-fast-profile.csv")) == len(steps)
        assert Path("threshnet-fast-profile.png").is_file()

    @pytest.mark.parametrize("option", ["--providers", "--dtype", "--device"])
    def test_options_of_a_comparison_are_unknown(self, capsys, option):
        assert profiled(option, "cpu") == 2
        assert f"unrecognized arguments: {option} cpu" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "text", "expected"),
        [
            (("--cell", "4:1"), "too small", 2),
            (("--cell", "32:1", "--size", "32"), "--cell already names", 2),
            (("--csv", "missing/a.csv"), "cannot write", 1),
            (("--plot", "a.bmp"), "cannot write", 1),
        ],
    )
    def test_errors_of_the_command(self, capsys, arguments, text, expected):
        assert profiled(*arguments) == expected
        error = capsys.readouterr().err
        assert text in error
        assert len(error.splitlines()) == 1

    def test_csv_file_of_a_comparison_is_refused(self, capsys):
        results.append_rows(Path("a.csv"), [])
        assert profiled("--cell", "32:1", "--csv", "a.csv") == 1
        assert "its columns are not those" in capsys.readouterr().err

    def test_needs_the_engine(self, capsys, monkeypatch):
        monkeypatch.setattr(cpu, "unavailable_reason", lambda: "it is not built")
        assert profiled("--cell", "32:1") == 1
        assert "needs the C++ engine: it is not built" in capsys.readouterr().err


class TestRoofline:
    def panel(self, *points):
        return roofline.MeasuredRoofline("a title", 2e11, 1e11, 2e10, points)

    def test_draws_points_of_every_kind(self, tmp_path):
        from matplotlib import image

        kinds = [("1x1", "packed", "#4c72b0"), ("3x3", "winograd", "#c44e52")]
        points = [
            roofline.MeasuredPoint(kind, algorithm, 10.0 * (i + 1), 1e11, 5e10, 0.5)
            for i, (kind, algorithm, _) in enumerate(kinds)
        ]
        path = tmp_path / "a.png"
        roofline.draw_measured_rooflines([self.panel(*points)] * 4, path)
        pixels = image.imread(path)[..., :3]
        for _, _, color in kinds:
            wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            assert (abs(pixels - wanted).max(-1) < 0.02).sum() > 200, color

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(CommandError, match="nothing to draw"):
            roofline.draw_measured_rooflines([self.panel()], tmp_path / "a.png")
        assert not list(tmp_path.iterdir())
