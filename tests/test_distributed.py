"""Several real processes, started by torchrun."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from torch import distributed as torch_distributed

from threshnet_fast.train import distributed, load_state, read_info

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch_distributed.is_available(), reason="torch without distributed"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    training.write_cifar10(root)
    return root


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_are_one_with_the_double_batch(data, tmp_path):
    """In float64, where rounding does not hide a wrong sum; no dropout, whose numbers differ."""
    options = ["--drop-rate", "0", "--sync-batchnorm", "--clip-norm", "1"]
    for count, batch in ((1, "32"), (2, "16")):
        output = tmp_path / str(count)
        arguments = training.command(data, output, "--batch-size", batch, *options)
        run = training.start(*arguments, processes=count, TEST_DTYPE="float64")
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("epoch 2/2") == 1, "the first process alone speaks"
    one, two = (load_state(tmp_path / str(count)) for count in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    for alone, together in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for name in ("train_loss", "test_loss"):
            assert float(together[name]) == pytest.approx(float(alone[name]), rel=1e-9)
        for name in ("step", "train_accuracy", "test_accuracy"):
            assert together[name] == alone[name]


def test_two_processes_share_a_folder(tmp_path):
    """Its pictures are checked by both, and balanced sampling is that of one process."""
    root = tmp_path / "data"
    training.write_folder(root, {"kind 0": 17, "kind 1": 9}, "train")
    training.write_folder(root, {"kind 0": 4, "kind 1": 5}, "val")
    damaged = root / "train" / "kind 1" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    options = ["--dataset", "folder", "--image-size", "32", "--workers", "0", "--drop-rate", "0"]
    options += ["--sync-batchnorm", "--sampling", "balanced", "--patience", "2"]
    for count, batch in ((1, "8"), (2, "4")):
        output = tmp_path / str(count)
        arguments = training.command(root, output, *options, "--batch-size", batch)
        run = training.start(*arguments, processes=count, TEST_DTYPE="float64")
        assert run.returncode == 0, run.stderr
        assert run.stderr.count(f"left out: {damaged}") == 1
        assert "truncated" in run.stderr
    for file in ("model.safetensors", "best.safetensors"):
        one, two = (load_state(tmp_path / str(count) / file) for count in (1, 2))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    accuracies = [
        (tmp_path / str(count) / "class_accuracy.csv").read_text(encoding="utf-8")
        for count in (1, 2)
    ]
    assert accuracies[0] == accuracies[1]
    refused = training.command(root, tmp_path / "3", *options, "--no-skip-unreadable")
    run = training.start(*refused, processes=2)
    assert run.returncode != 0
    assert f"process 0: 1 of 35 pictures cannot be read: {damaged}: " in run.stderr
    assert "process 1: process 0 has failed" in run.stderr
    assert not (tmp_path / "3").exists()


def test_module_runs_under_torchrun(data, tmp_path):
    """The documented command, with a network of the package."""
    output = tmp_path / "run"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "threshnet_fast.train", "densenet_bc_100"),
            *("--data", str(data), "--no-verify", "--output", str(output)),
            *("--epochs", "1", "--batch-size", "8"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=training.environment(),
    )
    assert run.returncode == 0, run.stderr
    assert read_info(output).model == "densenet_bc_100"
    assert rows(output)[0]["step"] == "6"
    with (output / "confusion.csv").open(encoding="utf-8", newline="") as file:
        matrix = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
    assert [sum(row) for row in matrix] == [2] * 10, "every test image counts once"


def test_failure_of_one_ends_all(data, tmp_path):
    output = tmp_path / "run"
    run = training.start(*training.command(data, output), processes=2, TEST_FAILING_RANK="1")
    assert run.returncode != 0
    assert "process 1: this process fails on purpose" in run.stderr


def test_errors_before_training_end_all(tmp_path):
    run = training.start(*training.command(tmp_path, tmp_path / "run"), processes=2)
    assert run.returncode != 0
    assert "process 0: cifar10: no data_batch_1.bin" in run.stderr
    assert "process 1: process 0 has failed" in run.stderr
    assert not (tmp_path / "run").exists()


def test_incomplete_environment(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(RuntimeError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"),
        distributed.join(None, 1.0),
    ):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with distributed.join(None, 1.0) as processes:
        assert processes.count == 1
        assert processes.any(True, False) == [True, False]
        assert processes.together(lambda: 3) == 3
        assert not torch_distributed.is_initialized()
    assert os.environ.get("WORLD_SIZE") is None
