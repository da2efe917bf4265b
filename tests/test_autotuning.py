"""Measured tiles: kept, found again, and never in the way."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest
import torch

pytest.importorskip("triton")

from threshnet_fast.kernels import autotuning, configurations
from threshnet_fast.kernels.autotuning import Cache, choose

from threshnet_fast import environment

CPU = torch.device("cpu")
PROBLEM = configurations.Problem(196, 160, 512, 9, torch.float16)


class Clock:
    """Times configurations by a rule, and counts."""

    def __init__(self, best: configurations.Configuration | None = None) -> None:
        self.best = best
        self.timed: list[configurations.Configuration] = []

    def __call__(self, problem, configuration, device) -> float:
        self.timed.append(configuration)
        return 0.0 if configuration == self.best else 1.0


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "folder" / "tiles.json")


def pick(cache: Cache | None, clock: Clock, problem=PROBLEM, architecture="sm_90"):
    return choose(problem, architecture, 132, CPU, cache=cache, time=clock)


def test_takes_the_fastest_and_keeps_it(cache: Cache) -> None:
    everything = Clock()
    pick(cache, everything, dataclasses.replace(PROBLEM, pixels=197))
    assert 1 < len(everything.timed) <= 8
    best = everything.timed[-1]
    clock = Clock(best)
    assert pick(cache, clock) == best
    again = Clock()
    assert pick(cache, again) == best
    assert again.timed == []


def test_other_problems_and_devices_are_measured_anew(cache: Cache) -> None:
    pick(cache, Clock())
    for changed in ({"architecture": "sm_80"}, {"problem": dataclasses.replace(PROBLEM, taps=1)}):
        clock = Clock()
        pick(cache, clock, **changed)
        assert clock.timed


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00"])
def test_a_broken_file_is_ignored(tmp_path, content: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    clock = Clock()
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored"):
        pick(Cache(path), clock)
    assert clock.timed
    assert json.loads(path.read_text())


def tile(**fields: object) -> dict[str, object]:
    best = configurations.choose(PROBLEM, "sm_90", 132)
    return {**dataclasses.asdict(best), **fields}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        {"block_m": "x"},
        {"unknown": 1},
        {},
        tile(unknown=1),
        tile(block_m="64"),
        tile(block_m=64.5),
        tile(split_k=True),
        tile(block_m=48),
        tile(block_m=-64),
        tile(split_k=10**9),
    ],
)
def test_a_broken_entry_is_measured_again(cache: Cache, tmp_path, entry: object) -> None:
    pick(cache, Clock())
    path = tmp_path / "folder" / "tiles.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(dict.fromkeys(entries, entry)))
    clock = Clock()
    pick(Cache(path), clock)
    assert clock.timed
    assert json.loads(path.read_text()) == entries


def test_a_folder_that_cannot_be_written_only_warns(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.warns(UserWarning, match=r"tiles\.json"):
        assert pick(Cache(file / "tiles.json"), Clock())


def test_a_folder_that_cannot_be_written_does_not_measure_again(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    cache = Cache(file / "tiles.json")
    with pytest.warns(UserWarning, match=r"tiles\.json"):
        best = pick(cache, Clock())
    clock = Clock()
    assert pick(cache, clock) == best
    assert not clock.timed


def test_nothing_is_left_behind(cache: Cache, tmp_path) -> None:
    pick(cache, Clock())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tiles.json"]


def test_another_process_finds_what_was_kept(cache: Cache, tmp_path) -> None:
    best = pick(cache, Clock(configurations.choose(PROBLEM, "sm_90", 132)))
    clock = Clock()
    assert pick(Cache(tmp_path / "folder" / "tiles.json"), clock) == best
    assert not clock.timed


def test_nothing_that_runs_leaves_the_choice_to_the_model(cache: Cache, tmp_path) -> None:
    class Broken(Clock):
        def __call__(self, problem, configuration, device) -> float:
            super().__call__(problem, configuration, device)
            return float("inf")

    assert pick(cache, Broken()) == configurations.choose(PROBLEM, "sm_90", 132)
    assert not (tmp_path / "folder").exists()
    clock = Clock()
    pick(cache, clock)
    assert not clock.timed


def test_nothing_is_measured_while_a_graph_is_captured(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotuning, "_capturing", lambda device: True)
    clock = Clock()
    assert pick(cache, clock) == configurations.choose(PROBLEM, "sm_90", 132)
    assert not clock.timed
    monkeypatch.setattr(autotuning, "_capturing", lambda device: False)
    pick(cache, clock)
    assert clock.timed


@pytest.mark.parametrize(
    ("variable", "argument", "device", "expected"),
    [
        ("1", None, "cuda", True),
        ("1", False, "cuda", False),
        ("0", None, "cuda", False),
        ("0", True, "cuda", True),
        ("1", True, "cpu", False),
    ],
)
def test_the_variable_and_the_argument(
    monkeypatch: pytest.MonkeyPatch, variable: str, argument, device: str, expected: bool
) -> None:
    measured = configurations.Configuration(1, 2, 3, 4, 5)
    monkeypatch.setenv(environment.AUTOTUNE, variable)
    monkeypatch.setattr(autotuning, "choose", lambda *_: measured)
    found = autotuning.configuration_for(
        PROBLEM, "sm_90", 132, torch.device(device), measured=argument
    )
    assert (found == measured) is expected
    if not expected:
        assert found == configurations.choose(PROBLEM, "sm_90", 132)


def test_threads_lose_no_entry(cache: Cache) -> None:
    problems = [dataclasses.replace(PROBLEM, pixels=pixels) for pixels in range(100, 108)]
    threads = [
        threading.Thread(target=pick, args=(cache, Clock(), problem)) for problem in problems
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem in problems:
        clock = Clock()
        pick(cache, clock, problem)
        assert not clock.timed


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.AUTOTUNE, raising=False)
    assert not autotuning.enabled()
    monkeypatch.setenv(environment.AUTOTUNE, "0")
    assert not autotuning.enabled()
    monkeypatch.setenv(environment.AUTOTUNE, "1")
    assert autotuning.enabled()


def test_the_file_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotuning.cache_path() == tmp_path / "threshnet_fast" / "tiles.json"


def test_what_does_not_compile_is_never_the_fastest() -> None:
    from emulation.driver import compiled_for

    problem = dataclasses.replace(PROBLEM, pixels=9, channels=32, out_channels=16)
    # More shared memory than the architecture has.
    configuration = configurations.Configuration(128, 256, 128, 8, 4)
    with compiled_for("sm_86"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotuning.triton.testing, "do_bench", lambda function, **_: function())
        assert autotuning.measure(problem, configuration, CPU) == float("inf")


def test_measuring_runs_the_problem() -> None:
    from emulation.driver import emulated

    problem = dataclasses.replace(PROBLEM, pixels=9, channels=32, out_channels=16)
    configuration = configurations.Configuration(16, 32, 32, 4, 3, split_k=2)
    with emulated("sm_80") as log, pytest.MonkeyPatch.context() as patch:
        # Its own would wait for a device.
        patch.setattr(
            autotuning.triton.testing, "do_bench", lambda function, **_: (function(), 0.5)[1]
        )
        assert autotuning.measure(problem, configuration, CPU) == 0.5
    assert [entry.name for entry in log] == ["implicit_gemm_kernel", "split_k_reduction_kernel"]
