from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training
from torch import nn

import threshnet_fast as tf
from threshnet_fast import files
from threshnet_fast.cli import main
from threshnet_fast.models import registry
from threshnet_fast.train import (
    ModelInfo,
    checkpoint,
    distributed,
    ema,
    figures,
    load_model,
    load_state,
    loop,
    progress,
    read_info,
    save_model,
)
from threshnet_fast.train.recipes import RECIPES, learning_rate, make_optimizer
from threshnet_fast.train.settings import Settings, differences

pytestmark = pytest.mark.usefixtures("one_thread")

INFO = ModelInfo(
    model="tiny",
    classes=tuple(f"class {number}" for number in range(10)),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    image_size=(32, 32),
    arguments={"num_classes": 10},
    source_size=(32, 32),
    dataset="cifar10",
    accuracy=0.5,
    extra={"note": "kept"},
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> str:
    monkeypatch.setitem(registry._REGISTRY, training.NAME, training.build)
    return training.NAME


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    training.write_cifar10(root)
    return root


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_times(output: Path) -> list[dict[str, str]]:
    times = ("seconds", "images_per_second")
    return [{name: row[name] for name in row if name not in times} for row in rows(output)]


class TestWeights:
    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
    def test_come_back(self, tmp_path, randomised, dtype):
        model = randomised(training.build()).eval()
        path = save_model(tmp_path / "a.safetensors", model, INFO, dtype)
        again, info = load_model(path)
        assert info.classes == INFO.classes
        assert info.source_size == (32, 32)
        assert info.extra["note"] == "kept"
        assert info.dtype == {None: "float32"}.get(dtype, str(dtype).removeprefix("torch."))
        for name, tensor in model.state_dict().items():
            stored = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            assert torch.equal(again.state_dict()[name], stored.to(tensor.dtype)), name
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), atol=0.1, rtol=0.05)

    def test_found_by_folder_and_by_json(self, tmp_path):
        save_model(tmp_path / "model.safetensors", training.build(), INFO)
        for path in (tmp_path, tmp_path / "model.json", str(tmp_path / "model.safetensors")):
            assert read_info(path).model == "tiny"

    def test_half_takes_half_the_space(self, tmp_path):
        model = training.build()
        sizes = [
            save_model(tmp_path / f"{number}.safetensors", model, INFO, dtype).stat().st_size
            for number, dtype in enumerate((None, torch.float16))
        ]
        assert sizes[1] < 0.6 * sizes[0]

    def test_memory_format_does_not_matter(self, tmp_path):
        model = training.build()
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.to(memory_format=torch.channels_last)
        state = load_state(save_model(tmp_path / "a.safetensors", model, INFO))
        assert all(torch.equal(state[name], expected[name]) for name in expected)

    def test_damage(self, tmp_path):
        path = save_model(tmp_path / "a.safetensors", training.build(), INFO)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checksums differ"):
            load_model(path)
        load_model(path, check=False)
        path.write_bytes(content[:100])
        with pytest.raises(ValueError, match="is no safetensors file"):
            load_state(path, check=False)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no .*model\.safetensors"):
            read_info(tmp_path)
        path = save_model(tmp_path / "a.safetensors", training.build(), INFO)
        path.with_suffix(".json").unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no .*a\.json"):
            read_info(path)
        with pytest.raises(ValueError, match=r"expected NAME\.safetensors"):
            read_info(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "does not describe a model"),
            ({"version": 2}, "version 2"),
            ({"classes": ["a"]}, "num_classes is 10, but 1 classes"),
            ({"std": [0.2, 0.2]}, "3 and 2 of 3"),
            ({"std": [0.2, 0.2, 0]}, "above 0"),
            ({"mean": None}, "TypeError"),
            ({"interpolation": "lanczos"}, "lanczos"),
            ({"crop_fraction": 2}, "crop_fraction"),
            ({"image_size": [0, 3]}, "image_size"),
        ],
    )
    def test_description_is_checked(self, tmp_path, change, message):
        path = save_model(tmp_path / "a.safetensors", training.build(), INFO)
        file = path.with_suffix(".json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ValueError, match=message):
            read_info(path)

    def test_no_json(self, tmp_path):
        path = save_model(tmp_path / "a.safetensors", training.build(), INFO)
        path.with_suffix(".json").write_text("{")
        with pytest.raises(ValueError, match="is no JSON"):
            read_info(path)

    def test_other_network(self, tmp_path):
        path = save_model(tmp_path / "a.safetensors", nn.Linear(2, 10), INFO)
        with pytest.raises(ValueError, match="does not fit tiny"):
            load_model(path)
        save_model(path, training.build(), dataclasses.replace(INFO, model="threshnet78"))
        with pytest.raises(ValueError, match="did you mean"):
            load_model(path)

    def test_refused(self, tmp_path):
        model = training.build()
        with pytest.raises(ValueError, match=r"NAME\.safetensors"):
            save_model(tmp_path / "a.pt", model, INFO)
        with pytest.raises(TypeError, match="float64"):
            save_model(tmp_path / "a.safetensors", model.double(), INFO)
        model.base[0].conv.weight.data.fill_(1e6)
        with pytest.raises(ValueError, match=r"base\.0\.conv\.weight does not fit"):
            save_model(tmp_path / "a.safetensors", model, INFO, torch.float16)
        assert list(tmp_path.iterdir()) == []


class TestRecipes:
    def test_paper(self):
        recipe = RECIPES["paper"]
        rates = [learning_rate(recipe, epoch * 500, 500) for epoch in (0, 74, 75, 149, 150, 199)]
        assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
        optimizer = make_optimizer(recipe, training.build())
        assert type(optimizer) is torch.optim.Adam
        assert recipe.batch_size == 100
        assert recipe.epochs == 200
        assert (recipe.padding, recipe.label_smoothing, recipe.ema_decay) == (0, 0, 0)

    def test_one_cycle(self):
        recipe = dataclasses.replace(RECIPES["modern"], epochs=4, learning_rate=1.0, warmup=0.25)
        rates = [learning_rate(recipe, step, 10) for step in range(40)]
        assert rates[0] == pytest.approx(1 / 25)
        assert rates[5] == pytest.approx((1 / 25 + 1) / 2)
        assert max(rates) == rates[10] == 1.0
        assert rates[39] == pytest.approx(1e-4)
        assert rates[10:] == sorted(rates[10:], reverse=True)
        # Halfway down a cosine.
        middle = (rates[24] + rates[25]) / 2
        assert middle == pytest.approx((1 + 1e-4) / 2, rel=1e-3)

    @pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
    def test_weights_alone_decay(self, optimizer):
        recipe = dataclasses.replace(RECIPES["modern"], optimizer=optimizer, weight_decay=0.1)
        model = training.build()
        decayed, plain = make_optimizer(recipe, model).param_groups
        assert decayed["weight_decay"] == 0.1
        assert plain["weight_decay"] == 0
        assert {p.ndim for p in decayed["params"]} == {2, 4}
        assert {p.ndim for p in plain["params"]} == {1}
        total = len(list(model.parameters()))
        assert len(decayed["params"]) + len(plain["params"]) == total

    @pytest.mark.parametrize(
        "change",
        [{"warmup": 1.0}, {"momentum": -0.1}, {"label_smoothing": 1.0}, {"crop_scale": 0.0}],
    )
    def test_out_of_range(self, change):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(RECIPES["modern"], **change).check()


class TestMovingAverage:
    def test_is_the_average(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
        average = ema.MovingAverage(model, 0.9, every=2)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(1, 61):
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor += 1
            average.update(step)
            if step == 1 or step % 2 == 0:
                updates = step // 2 + 1
                decay = min(0.9**2, updates / (updates + 9))
                for name, value in model.state_dict().items():
                    if value.is_floating_point():
                        expected[name] = decay * expected[name] + (1 - decay) * value
                    else:
                        expected[name] = value
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(value, expected[name])
        assert average.updates == 31
        assert not average.module.training


class TestCheckpoint:
    def save(self, output: Path, batch: int) -> Path:
        state = {"number": batch}
        tensors = {"model.a": torch.full((3,), float(batch))}
        return checkpoint.save(output, checkpoint.Checkpoint(tensors, state), 1, batch)

    def test_the_last_two_stay(self, tmp_path):
        assert checkpoint.load_latest(tmp_path) is None
        for batch in (8, 9, 10):
            self.save(tmp_path, batch)
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["epoch-0001-batch-000009", "epoch-0001-batch-000010"]
        found, folder, problems = checkpoint.load_latest(tmp_path)
        assert found.state["number"] == 10
        assert found.part("model")["a"].tolist() == [10.0] * 3
        assert folder.name == names[-1]
        assert problems == []

    def test_damage_is_passed_over(self, tmp_path):
        self.save(tmp_path, 1)
        (self.save(tmp_path, 2) / "state.safetensors").write_bytes(b"damaged")
        found, _, problems = checkpoint.load_latest(tmp_path)
        assert found.state["number"] == 1
        assert "batch-000002: state.safetensors is damaged" in problems[0]
        for path in (tmp_path / "checkpoints").iterdir():
            (path / "state.json").unlink()
        with pytest.raises(ValueError, match="no checkpoint is whole"):
            checkpoint.load_latest(tmp_path)

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        left = tmp_path / "checkpoints" / "epoch-0001-batch-000001.tmp"
        left.mkdir(parents=True)
        assert checkpoint.load_latest(tmp_path) is None
        self.save(tmp_path, 1)
        assert not left.exists()

    @pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
    def test_optimizer_goes_on(self, name, tmp_path):
        recipe = dataclasses.replace(RECIPES["modern"], optimizer=name)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
            for index, parameter in enumerate(model.parameters()):
                random = torch.Generator().manual_seed(100 * number + index)
                parameter.grad = torch.randn(parameter.shape, generator=random).to(
                    memory_format=torch.channels_last
                    if parameter.ndim == 4
                    else torch.preserve_format
                )
            optimizer.step()

        torch.manual_seed(0)
        model = training.build().to(memory_format=torch.channels_last)
        optimizer = make_optimizer(recipe, model)
        step(model, optimizer, 0)
        digest = files.write_tensors(
            tmp_path / "a.safetensors", checkpoint.optimizer_tensors(optimizer)
        )
        assert digest == files.sha256(tmp_path / "a.safetensors")
        from safetensors.torch import load_file

        other = training.build().to(memory_format=torch.channels_last)
        other.load_state_dict(model.state_dict())
        resumed = make_optimizer(recipe, other)
        checkpoint.restore_optimizer(resumed, load_file(tmp_path / "a.safetensors"))
        for number in (1, 2):
            step(model, optimizer, number)
            step(other, resumed, number)
        for (key, value), again in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(value, again), key

    def test_optimizer_of_other_parameters(self):
        optimizer = make_optimizer(RECIPES["modern"], training.build())
        with pytest.raises(ValueError, match="more parameters"):
            checkpoint.restore_optimizer(optimizer, {"999.momentum_buffer": torch.zeros(1)})
        with pytest.raises(ValueError, match="shape"):
            checkpoint.restore_optimizer(optimizer, {"0.momentum_buffer": torch.zeros(1)})
        with pytest.raises(ValueError, match="does not fit the network"):
            checkpoint.load_module(training.build(), {"a": torch.zeros(1)})


class TestWritingFiles:
    def test_old_content_until_the_new_is_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "a.json"
        files.write_json(path, {"a": 1})

        def fail(descriptor):
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            files.write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}


class TestRun:
    def test_learns_and_writes_everything(self, data, tmp_path, capsys):
        output = tmp_path / "new" / "run"
        options = ["--drop-rate", "0", "--padding", "0", "--learning-rate", "0.1"]
        arguments = training.command(data, output, "--epochs", "12", *options)
        more = ["--ema-decay", "0.5", "--half", "--evaluate-every", "5"]
        assert main([*arguments, *more]) == 0
        printed = capsys.readouterr().out
        assert printed.count("epoch ") == 12
        log = rows(output)
        assert [row["epoch"] for row in log] == [str(number) for number in range(1, 13)]
        assert [bool(row["test_accuracy"]) for row in log] == [
            number in (5, 10, 12) for number in range(1, 13)
        ]
        assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])
        # The classes are patterns that anything learns; chance is 0.1.
        assert float(log[-1]["test_accuracy"]) > 0.8
        for name in ("curves.png", "confusion.png"):
            assert (output / name).read_bytes().startswith(b"\x89PNG")
        with (output / "confusion.csv").open(encoding="utf-8", newline="") as file:
            matrix = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
        assert [sum(row) for row in matrix] == [2] * 10
        right = sum(matrix[number][number] for number in range(10))
        assert right / 20 == float(log[-1]["test_accuracy"])

        model, info = load_model(output)
        assert info.dtype == "float16"
        assert info.accuracy == right / 20
        assert info.epochs == 12
        assert info.recipe["name"] == "modern"
        images, labels = training.pictures(20, 10, seed=5)
        x = (torch.from_numpy(images) / 255 - torch.tensor(info.mean).view(3, 1, 1)) / (
            torch.tensor(info.std).view(3, 1, 1)
        )
        with torch.no_grad():
            predicted = model(x).argmax(1)
        assert (predicted == torch.from_numpy(labels)).sum() >= right - 1

    def test_seed_decides(self, data, tmp_path):
        digests = []
        for number, seed in enumerate(("3", "3", "4")):
            output = tmp_path / str(number)
            assert main([*training.command(data, output), "--seed", seed]) == 0
            digests.append(files.sha256(output / "model.safetensors"))
        assert digests[0] == digests[1] != digests[2]

    @pytest.mark.parametrize(
        "options",
        [
            ("--recipe", "paper"),
            ("--optimizer", "adamw", "--clip-norm", "1", "--ema-decay", "0"),
            ("--accumulate", "2", "--image-size", "40x36", "--interpolation", "bicubic"),
            ("--amp", "bfloat16", "--backend", "reference", "--deterministic"),
        ],
        ids=lambda options: options[1],
    )
    def test_options(self, data, tmp_path, options):
        output = tmp_path / "run"
        try:
            assert main([*training.command(data, output), *options]) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        log = rows(output)
        steps = 12 // 2 if "--accumulate" in options else 12
        assert log[-1]["step"] == str(steps)
        assert math.isfinite(float(log[-1]["train_loss"]))
        if "--image-size" in options:
            assert read_info(output).image_size == (40, 36)

    def test_accumulating_is_a_larger_batch(self, data, tmp_path, monkeypatch):
        """Exactly so without BatchNorm's statistics of each batch: here they are frozen."""
        monkeypatch.setattr(
            nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False)
        )
        common = ["--drop-rate", "0", "--padding", "0"]
        states = []
        for batch, accumulate in (("32", "1"), ("16", "2")):
            output = tmp_path / accumulate
            options = ["--batch-size", batch, "--accumulate", accumulate, "--seed", "1"]
            arguments = training.command(data, output, *common, *options)
            # Flips are drawn batch by batch, so a flip is a difference.
            monkeypatch.setattr(
                "threshnet_fast.data.augment.Augmentation.__call__", lambda _, x, __: x
            )
            assert main(arguments) == 0
            states.append(load_state(output))
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, atol=2e-4, rtol=2e-3)

    def test_folder_of_images(self, tmp_path):
        from PIL import Image

        for split in ("train", "test"):
            images, labels = training.pictures(24, 2, seed=len(split))
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                folder = tmp_path / "data" / split / f"kind {label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
        output = tmp_path / "run"
        arguments = training.command(tmp_path / "data", output, "--dataset", "folder")
        options = ["--image-size", "32", "--workers", "0", "--batch-size", "8", "--epochs", "4"]
        assert main([*arguments, *options]) == 0
        info = read_info(output)
        assert info.classes == ("kind 0", "kind 1")
        assert info.crop_fraction == 0.875
        assert info.source_size is None
        assert len(rows(output)) == 4

    def test_tensorboard(self, data, tmp_path):
        reading = pytest.importorskip(
            "tensorboard.backend.event_processing.event_accumulator",
            reason="TensorBoard is not installed",
        )
        output = tmp_path / "run"
        assert main([*training.command(data, output), "--tensorboard"]) == 0
        events = reading.EventAccumulator(str(output / "tensorboard"))
        events.Reload()
        points = events.Scalars("accuracy/test")
        assert [point.step for point in points] == [1, 2]
        assert points[-1].value == pytest.approx(float(rows(output)[-1]["test_accuracy"]))


class TestResume:
    """A run that was stopped, in whatever way, ends with the weights of one that was not."""

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, data, tmp_path_factory) -> Path:
        output = tmp_path_factory.mktemp("whole") / "run"
        run = training.start(*training.command(data, output))
        assert run.returncode == 0, run.stderr
        return output

    def same(self, whole: Path, output: Path) -> None:
        assert without_times(output) == without_times(whole)
        for name in ("model.safetensors", "checkpoints/epoch-0002-batch-000000/state.safetensors"):
            assert files.sha256(output / name) == files.sha256(whole / name), name

    def test_killed_at_several_moments(self, data, tmp_path, whole):
        output = tmp_path / "run"
        # Every step writes a checkpoint: two calls of sync_folder, one of the others.
        arguments = [*training.command(data, output), "--checkpoint-minutes", "1e-9", "--resume"]
        moments = {
            "sha256:3": "its tensors are written, and not yet renamed",
            "write_json:2": "its tensors are there without a state",
            "sync_folder:4": "the checkpoint is complete, and the old one is still there",
        }
        for moment, state in moments.items():
            run = training.start(*arguments, TEST_DIE_AT=moment)
            assert run.returncode == -signal.SIGKILL, f"{state}: {run.stderr}"
            assert (output / "checkpoints").is_dir(), state
        self.kill_from_outside(arguments, output)
        run = training.start(*arguments)
        assert run.returncode == 0, run.stderr
        assert "resumed from" in run.stderr
        self.same(whole, output)

    def kill_from_outside(self, arguments: list[str], output: Path) -> None:
        """Kills the process as soon as there is another checkpoint, whatever it is doing then."""

        def names() -> set[str]:
            return {path.name for path in (output / "checkpoints").iterdir()}

        before = names()
        with subprocess.Popen(
            [sys.executable, training.__file__, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=training.environment(),
        ) as process:
            deadline = time.monotonic() + 120
            while names() == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            process.kill()
        assert process.returncode in (-signal.SIGKILL, 0)

    def test_asked_to_stop(self, data, tmp_path, whole, monkeypatch, capsys):
        output = tmp_path / "run"
        original = loop.learning_rate

        def interrupt(recipe, step, steps_per_epoch):
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(recipe, step, steps_per_epoch)

        before = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "learning_rate", interrupt)
            assert main(training.command(data, output)) == 130
        assert signal.getsignal(signal.SIGTERM) is before
        assert "--resume goes on" in capsys.readouterr().err
        assert (output / "checkpoints" / "epoch-0001-batch-000003").is_dir()
        assert main([*training.command(data, output), "--resume"]) == 0
        self.same(whole, output)

    def test_after_the_end(self, data, tmp_path, whole):
        output = tmp_path / "run"
        arguments = training.command(data, output)
        assert main(arguments) == 0
        (output / "confusion.png").unlink()
        assert main([*arguments, "--resume"]) == 0
        assert (output / "confusion.png").exists()
        self.same(whole, output)


class TestErrors:
    def fails(self, capsys, arguments: list[str], status: int, *parts: str) -> None:
        assert main(arguments) == status
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for part in parts:
            assert part in error

    def test_before_anything_is_written(self, data, tmp_path, capsys):
        output = tmp_path / "run"
        arguments = training.command(data, output)

        def fails(options: list[str], status: int, *parts: str) -> None:
            self.fails(capsys, [*arguments, *options], status, *parts)
            assert not output.exists()

        fails(["--data", str(tmp_path)], 1, "no data_batch_1.bin", "--download")
        fails(["--batch-size", "101"], 2, "a step takes 101 images, and there are 100")
        fails(["--amp", "float16"], 2, "needs a GPU")
        fails(["--backend", "cpuu"], 2, "did you mean 'cpu'")
        fails(["--image-size", "16"], 2, "tiny cannot be trained so", "32")
        fails(["--label-smoothing", "1"], 2, "label_smoothing is 1.0")
        if not torch.cuda.is_available():
            fails(["--device", "cuda"], 2, "--device cuda")
        misspelt = ["train", "threshnet78", *arguments[2:]]
        self.fails(capsys, misspelt, 2, "did you mean 'threshnet79'")
        self.fails(capsys, [word for word in arguments if word != "--no-verify"], 1, "61460 bytes")

    def test_output(self, data, tmp_path, capsys):
        file = tmp_path / "file"
        file.touch()
        self.fails(capsys, training.command(data, file), 2, "is no folder")
        self.fails(capsys, training.command(data, file / "run"), 2, "is no folder")
        (tmp_path / "log.csv").touch()
        self.fails(capsys, training.command(data, tmp_path), 2, "has a log.csv")

    def test_other_run(self, data, tmp_path, capsys):
        output = tmp_path / "run"
        arguments = training.command(data, output, "--epochs", "1")
        assert main(arguments) == 0
        capsys.readouterr()
        self.fails(capsys, arguments, 2, "holds a run already", "--resume")
        changed = [*arguments, "--resume", "--epochs", "3", "--seed", "1"]
        self.fails(capsys, changed, 2, "recipe.epochs was 1, not 3", "seed was 0, not 1")
        (output / "config.json").write_text("{}")
        self.fails(capsys, [*arguments, "--resume"], 1, "does not describe a training run")

    def test_two_at_once(self, data, tmp_path, capsys):
        import fcntl

        output = tmp_path / "run"
        output.mkdir()
        with (output / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.fails(capsys, training.command(data, output), 1, "another process is training")

    def test_diverged(self, data, tmp_path, capsys):
        output = tmp_path / "run"
        arguments = training.command(data, output, "--learning-rate", "1e30", "--ema-decay", "0")
        self.fails(
            capsys, arguments, 1, "the loss is no number any more", "lower the learning rate"
        )
        assert not (output / "checkpoints").exists()

    def test_settings_of_a_newer_version(self):
        settings = Settings(
            "a", "b", 10, 100, RECIPES["modern"], (32, 32), "bilinear", 0, images_per_step=16
        )
        recorded = settings.to_json()
        assert differences(recorded, settings) == []
        del recorded["sync_batchnorm"], recorded["recipe"]["crop_scale"]
        recorded["recipe"]["momentum"] = 0.5
        assert differences(recorded, settings) == ["recipe.momentum was 0.5, not 0.9"]


def test_evaluation_counts():
    class Batches:
        def all(self):
            yield torch.tensor([[5.0, 0, 0], [0, 5, 0]]), torch.tensor([0, 2])
            yield torch.tensor([[0.0, 0, 5]]), torch.tensor([2])

    result = loop.evaluate(nn.Identity(), Batches(), 3)
    assert result.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert result.count == 3
    assert result.accuracy == pytest.approx(2 / 3)
    right = math.log(1 + 2 * math.exp(-5))
    assert result.loss == pytest.approx((3 * right + 5) / 3)
    with pytest.raises(ValueError, match="no test images"):
        loop.evaluate(nn.Identity(), type("Empty", (), {"all": lambda self: iter(())})(), 3)


def test_figures_of_many_classes(tmp_path):
    confusion = torch.randint(0, 9, (100, 100))
    figures.draw_confusion(tmp_path / "a.png", confusion, [str(number) for number in range(100)])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_reporter_draws_a_bar_on_a_terminal_only(monkeypatch, capsys):
    reporter = progress.ConsoleReporter(3)
    reporter.epoch(0, 0, 5)
    reporter.step(0.1, torch.tensor(1.0))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter.epoch(1, 2, 5)
    reporter.step(0.1, torch.tensor(1.0))
    reporter.note("noted")
    assert "epoch 2/3" in capsys.readouterr().err


def test_synchronised_batchnorm_alone_is_batchnorm():
    torch.manual_seed(0)
    plain = training.build()
    other = training.build()
    other.load_state_dict(plain.state_dict())
    other = distributed.synchronise_batchnorm(other, torch.device("cpu"))
    assert isinstance(other.base[0].norm, distributed.SyncBatchNorm)
    x = torch.randn(4, 3, 32, 32)
    with tf.use_backend("reference"):
        assert torch.equal(plain.train()(x), other.train()(x))


def test_train_is_not_imported_with_the_package():
    code = "import sys, threshnet_fast; print('threshnet_fast.train' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert "train" not in tf.__all__
