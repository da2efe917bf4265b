from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from torch import nn

import threshnet_fast as tf
from threshnet_fast import files
from threshnet_fast.cli import build_parser, main
from threshnet_fast.data import images
from threshnet_fast.models import registry
from threshnet_fast.train import (
    ModelInfo,
    checkpoint,
    distributed,
    ema,
    evaluation,
    figures,
    load_model,
    load_state,
    loop,
    progress,
    read_info,
    recipes,
    reporters,
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

FOLDER = ("--dataset", "folder", "--image-size", "32", "--workers", "0", "--batch-size", "8")


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> str:
    monkeypatch.setitem(registry._REGISTRY, training.NAME, training.build)
    return training.NAME


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    training.write_cifar10(root)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twice as many pictures of one class as of the other."""
    root = tmp_path_factory.mktemp("pictures")
    training.write_folder(root, {"kind 0": 16, "kind 1": 8}, "train")
    return training.write_folder(root, {"kind 0": 4, "kind 1": 4}, "val")


def write_damaged(root: Path) -> Path:
    """Writes a folder with a picture that is cut off; returns that."""
    for split in ("train", "val"):
        training.write_folder(root, {"a": 6, "b": 6}, split)
    picture = root / "train" / "b" / "2.png"
    picture.write_bytes(picture.read_bytes()[:1000])
    return picture


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Asks this process to end when a step begins."""
    original = loop.learning_rate

    def interrupt(recipe, number, steps_per_epoch):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(recipe, number, steps_per_epoch)

    monkeypatch.setattr(loop, "learning_rate", interrupt)


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
            ({"mean": None}, "mean is None, expected a list of finite numbers"),
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


class TestBalance:
    def test_weights(self):
        labels = torch.tensor([0] * 6 + [1] * 3 + [2])
        weights = recipes.balanced_weights(labels, 3)
        # images / (classes * images of the class)
        assert weights.tolist() == [10 / 18, 10 / 9, 10 / 3]
        assert weights[labels].sum().item() == pytest.approx(10)
        with pytest.raises(ValueError, match="class 1 has no training images"):
            recipes.balanced_weights(torch.tensor([0, 2]), 3)

    def test_loss_is_weighed(self, folder, tmp_path, monkeypatch):
        """The first step's loss, from the logits that it was taken of."""
        seen = []
        original = nn.functional.cross_entropy

        def keep(logits, labels, *more, **options):
            loss = original(logits, labels, *more, **options)
            if logits.requires_grad:
                seen.append((logits.detach(), labels, loss.detach()))
            return loss

        monkeypatch.setattr(nn.functional, "cross_entropy", keep)
        options = (*FOLDER, "--class-weights", "balanced", "--label-smoothing", "0")
        assert main([*training.command(folder, tmp_path / "run", *options), "--epochs", "1"]) == 0
        for logits, labels, loss in seen:
            # 16 and 8 of 24 images: 24 / (2 * 16) and 24 / (2 * 8).
            weights = torch.tensor([0.75, 1.5])[labels].double()
            losses = -logits.double().log_softmax(1).gather(1, labels[:, None]).flatten()
            expected = (weights * losses).sum() / weights.sum()
            torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
        assert len(seen) == 3
        assert read_info(tmp_path / "run").recipe["class_weights"] == "balanced"

    def test_order_shows_all_classes_alike(self):
        labels = torch.tensor([0] * 14 + [1] * 5 + [3] * 2)[torch.randperm(21)]
        orders = [images.epoch_order(labels, 3, epoch, balanced=True) for epoch in range(4)]
        for order in orders:
            assert len(order) == 21
            assert torch.bincount(labels[order]).tolist() == [7, 7, 0, 7]
            times = torch.bincount(order, minlength=21)
            assert times[labels == 0].max() == 1
            assert sorted(times[labels == 1].tolist()) == [1, 1, 1, 2, 2]
            assert sorted(times[labels == 3].tolist()) == [3, 4]
        assert len({tuple(order.tolist()) for order in orders}) == 4
        again = images.epoch_order(labels, 3, 2, balanced=True)
        assert torch.equal(again, orders[2])
        assert not torch.equal(images.epoch_order(labels, 4, 2, balanced=True), again)
        # One image more or less where the classes do not divide the images.
        counts = torch.bincount(images.epoch_order(labels[:20], 3, 0, balanced=True), minlength=20)
        parts = [int(counts[labels[:20] == label].sum()) for label in (0, 1, 3)]
        assert sorted(parts) == [6, 7, 7]

    def test_order_is_shared_out(self, folder):
        """Parts of two processes are what one process sees, pictures and augmentation."""
        from threshnet_fast.data import augment
        from threshnet_fast.data import folder as pictures

        data = pictures.load_folder(folder).train
        prepare = augment.Preparation((0.5,) * 3, (0.5,) * 3, (32, 32))
        shown = augment.Augmentation(smallest=0.25)

        def batches(shard: images.Shard) -> pictures.FolderBatches:
            return pictures.FolderBatches(data, prepare, 8, shard, 0, shown, balanced=True)

        whole = list(batches(images.Shard()).epoch(1))
        parts = [list(batches(images.Shard(rank, 2)).epoch(1)) for rank in (0, 1)]
        for (x, labels), *halves in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat([half for half, _ in halves]), x)
            assert torch.equal(torch.cat([half for _, half in halves]), labels)
        labels = torch.cat([labels for _, labels in whole])
        assert torch.bincount(labels).tolist() == [12, 12]
        # Of 8 pictures of the small class some come twice, each time otherwise.
        small = torch.cat([x for x, _ in whole])[labels == 1].flatten(1)
        assert len(small.unique(dim=0)) == 12
        rest = list(batches(images.Shard()).epoch(1, start=2))
        assert len(rest) == 1
        assert torch.equal(rest[0][0], whole[2][0])

    def test_visits(self):
        assert list(images.visits([4, 2, 4, 4, 2])) == [(4, 0), (2, 0), (4, 1), (4, 2), (2, 1)]

    def test_sampling_of_a_run(self, data, tmp_path, monkeypatch):
        seen = []
        original = images.epoch_order

        def keep(labels, seed, epoch, balanced):
            seen.append(balanced)
            return original(labels, seed, epoch, balanced)

        monkeypatch.setattr(images, "epoch_order", keep)
        arguments = training.command(data, tmp_path / "run", "--sampling", "balanced")
        assert main([*arguments, "--epochs", "1"]) == 0
        assert seen == [True]


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

    def load(self, output: Path) -> tuple[checkpoint.Checkpoint, Path, list[str]] | None:
        taken = []
        found = checkpoint.load_latest(output, taken.append)
        return None if found is None else (taken[-1], *found)

    def names(self, output: Path) -> list[str]:
        return sorted(path.name for path in (output / "checkpoints").iterdir())

    def test_the_last_two_stay(self, tmp_path):
        assert self.load(tmp_path) is None
        for batch in (8, 9, 10):
            self.save(tmp_path, batch)
        names = self.names(tmp_path)
        assert names == ["epoch-0001-batch-000009", "epoch-0001-batch-000010"]
        found, folder, problems = self.load(tmp_path)
        assert found.state["number"] == 10
        assert found.part("model")["a"].tolist() == [10.0] * 3
        assert folder.name == names[-1]
        assert problems == []

    def test_damage_is_passed_over(self, tmp_path):
        self.save(tmp_path, 1)
        (self.save(tmp_path, 2) / "state.safetensors").write_bytes(b"damaged")
        found, _, problems = self.load(tmp_path)
        assert found.state["number"] == 1
        assert "batch-000002: state.safetensors is damaged" in problems[0]
        for path in (tmp_path / "checkpoints").iterdir():
            (path / "state.json").unlink()
        with pytest.raises(ValueError, match="no checkpoint is whole"):
            self.load(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is no JSON"),
            ("[1, 2]", "holds a list"),
            ("[" * 100000, "is no JSON"),
            ("{}", "version None"),
            (b"\xff", "is no JSON"),
            ({"number": 3}, "its checksum is another"),
            ({"sha256": None}, "its checksum is another"),
            ({"tensors_sha256": "0"}, "its checksum is another"),
            ({"version": 3}, "version 3"),
            ({"version": 1}, "that of None"),
        ],
        ids=str,
    )
    def test_changed_state_is_passed_over(self, tmp_path, content, message):
        self.save(tmp_path, 1)
        state = self.save(tmp_path, 2) / "state.json"
        if isinstance(content, dict):
            content = json.dumps({**json.loads(state.read_text()), **content})
        state.write_bytes(content if isinstance(content, bytes) else content.encode())
        found, folder, problems = self.load(tmp_path)
        assert found.state["number"] == 1
        assert folder.name.endswith("000001")
        assert message in problems[0]
        assert len(problems) == 1

    def test_what_cannot_be_restored_is_passed_over(self, tmp_path):
        self.save(tmp_path, 1)
        self.save(tmp_path, 2)

        def restore(saved: checkpoint.Checkpoint) -> None:
            if saved.state["number"] == 2:
                raise ValueError("of another run")

        folder, problems = checkpoint.load_latest(tmp_path, restore)
        assert folder.name.endswith("000001")
        assert problems == [f"{folder.with_name('epoch-0001-batch-000002')}: of another run"]

    def test_further_ones_are_void_after_an_older_one(self, tmp_path):
        for batch in (1, 2):
            self.save(tmp_path, batch)
        (tmp_path / "checkpoints" / "epoch-0001-batch-000002" / "state.safetensors").unlink()
        (self.save(tmp_path, 9) / "state.safetensors").write_bytes(b"damaged")
        self.save(tmp_path, 4)
        assert self.names(tmp_path) == ["epoch-0001-batch-000002", "epoch-0001-batch-000004"]

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        left = tmp_path / "checkpoints" / "epoch-0001-batch-000001.tmp"
        left.mkdir(parents=True)
        (left / "state.safetensors.tmp").touch()
        assert self.load(tmp_path) is None
        self.save(tmp_path, 2)
        assert not left.exists()

    def test_what_the_user_keeps_there_stays(self, tmp_path):
        parent = tmp_path / "checkpoints"
        first = self.save(tmp_path, 1)
        copies = [parent / name for name in ("mine", "epoch-0001-batch-000001-good", "a.tmp")]
        # Under a checkpoint's name, but not its own.
        copies += [parent / "epoch-0000-batch-000007", parent / "epoch-9999-batch-000007"]
        for copy in copies:
            shutil.copytree(first, copy)
        noted = self.save(tmp_path, 2)
        (noted / "notes.txt").write_text("the good one")
        (parent / "notes.txt").write_text("mine")
        (parent / "epoch-0001-batch-000003").symlink_to(tmp_path)
        (parent / "epoch-0001-batch-000004.tmp").mkdir()
        (parent / "epoch-0001-batch-000004.tmp" / "mine.txt").touch()
        before = {path.relative_to(parent) for path in parent.rglob("*")}
        for batch in range(3, 9):
            self.save(tmp_path, batch)
        after = {path.relative_to(parent) for path in parent.rglob("*")}
        lost = {str(path) for path in before - after if path.parent == Path()}
        moved = {"epoch-0001-batch-000003", "epoch-0001-batch-000004.tmp"}
        assert lost == {first.name, *moved}
        assert (parent / "epoch-0001-batch-000003.kept-1").is_symlink()
        assert (parent / "epoch-0001-batch-000004.tmp.kept-1" / "mine.txt").exists()
        assert (noted / "notes.txt").exists()
        found, folder, _ = self.load(tmp_path)
        assert folder.name == "epoch-0001-batch-000008"
        assert found.state["number"] == 8

    def test_progress_is_checked(self):
        row = {"epoch": 1}
        good = {"epoch": 1, "batch": 2, "step": 7, "sums": [1.5, 2, 3], "rows": [row]}
        good |= {"seconds": 1.5, "epoch_seconds": 0.5}
        good |= {"best": {"epoch": 1, "accuracy": 0.5}, "class_rows": [[1, 0.5, None]]}
        progress.Progress.from_json(good).check(6, 2)
        for wrong in (
            *(None, [], {}, {**good, "more": 1}, {**good, "epoch": True}, {**good, "step": -1}),
            *({**good, "batch": "2"}, {**good, "batch": 2.0}, {**good, "seconds": math.nan}),
            *({**good, "sums": [1, 2]}, {**good, "sums": ["a", 1, 2]}, {**good, "rows": [1]}),
            *({**good, "rows": {}}, {**good, "rows": [row, {"a": 1}]}),
            *({**good, "best": {}}, {**good, "best": {"epoch": 1, "accuracy": "1"}}),
            *({**good, "class_rows": {}}, {**good, "class_rows": [1]}),
            {name: value for name, value in good.items() if name != "seconds"},
        ):
            with pytest.raises(ValueError, match="of the run"):
                progress.Progress.from_json(wrong)
        for wrong in ({"epoch": 2}, {"batch": 3}, {"batch": 14}, {"step": 8}, {"rows": []}):
            with pytest.raises(ValueError, match="contradict"):
                progress.Progress.from_json({**good, **wrong}).check(6, 2)

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
        with pytest.raises(ValueError, match="does not fit the network") as caught:
            checkpoint.load_module(training.build(), {"a": torch.zeros(1)})
        assert len(str(caught.value)) < 200


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
        for split in ("train", "test"):
            training.write_folder(tmp_path / "data", {"kind 0": 12, "kind 1": 12}, split)
        output = tmp_path / "run"
        arguments = training.command(tmp_path / "data", output, *FOLDER)
        assert main([*arguments, "--epochs", "4"]) == 0
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

    def test_killed_at_several_moments(self, data, tmp_path, whole, capsys):
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
        assert main(arguments) == 0
        assert "resumed from" in capsys.readouterr().err
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
        before = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            stop_at(patch, 8)
            assert main(training.command(data, output)) == 130
        assert signal.getsignal(signal.SIGTERM) is before
        assert "--resume goes on" in capsys.readouterr().err
        assert (output / "checkpoints" / "epoch-0001-batch-000003").is_dir()
        assert main([*training.command(data, output), "--resume"]) == 0
        self.same(whole, output)

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_folder_within_an_epoch(self, folder, tmp_path, workers, monkeypatch):
        """The network has dropout, whose numbers a loader of pictures must not shift."""
        options = (*FOLDER, "--workers", workers)
        assert main(training.command(folder, tmp_path / "whole", *options)) == 0
        arguments = training.command(folder, tmp_path / "run", *options)
        for step in (1, 4):
            with monkeypatch.context() as patch:
                stop_at(patch, step)
                assert main([*arguments, "--resume"]) == 130
        assert main([*arguments, "--resume"]) == 0
        self.same(tmp_path / "whole", tmp_path / "run")

    def test_changed_checkpoints(self, data, tmp_path, whole, capsys):
        """Counters that were changed are not believed; with no checkpoint left, that is said."""
        output = tmp_path / "run"
        arguments = [*training.command(data, output), "--resume"]
        assert main(arguments) == 0
        capsys.readouterr()
        first, last = sorted((output / "checkpoints").iterdir())
        state = json.loads((last / "state.json").read_text())
        state["progress"]["step"] = 3
        (last / "state.json").write_text(json.dumps(state))
        assert main(arguments) == 0
        notes = capsys.readouterr().err.splitlines()
        assert f"passed over {last}: state.json is damaged" in notes[0]
        assert notes[1] == f"resumed from {first}"
        self.same(whole, output)
        for path in (output / "checkpoints").iterdir():
            (path / "state.json").write_text("[]")
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no checkpoint is whole" in error

    def test_checkpoint_of_the_first_version(self, data, tmp_path, whole, capsys):
        """It has no checksum of its own: its counters are compared with each other."""
        output = tmp_path / "run"
        arguments = [*training.command(data, output), "--resume"]
        assert main(arguments) == 0
        first, last = sorted((output / "checkpoints").iterdir())
        shutil.rmtree(last)
        state = json.loads((first / "state.json").read_text())
        for name in ("format", "name", "sha256"):
            del state[name]
        state["version"] = 1
        (first / "state.json").write_text(json.dumps(state))
        assert main(arguments) == 0
        assert f"resumed from {first}" in capsys.readouterr().err
        self.same(whole, output)
        shutil.rmtree(last)
        state["progress"]["step"] += 1
        (first / "state.json").write_text(json.dumps(state))
        assert main(arguments) == 1
        assert "contradict each other" in capsys.readouterr().err

    @pytest.mark.parametrize("recipe", ["modern", "paper"])
    def test_more_epochs(self, data, tmp_path, recipe):
        """The schedule is that of the new number of epochs, from the next step on."""
        output = tmp_path / "run"
        arguments = training.command(data, output, "--recipe", recipe)
        assert main(arguments) == 0
        assert main([*arguments, "--resume", "--epochs", "4"]) == 0
        used = dataclasses.replace(RECIPES[recipe], learning_rate=0.02)
        expected = [
            learning_rate(dataclasses.replace(used, epochs=epochs), 6 * epoch + 5, 6)
            for epoch, epochs in enumerate((2, 2, 4, 4))
        ]
        assert [float(row["learning_rate"]) for row in rows(output)] == expected
        assert json.loads((output / "config.json").read_text())["recipe"]["epochs"] == 4
        assert read_info(output).epochs == 4
        assert read_info(output).recipe["epochs"] == 4

    def test_more_epochs_keep_the_optimizer(self, data, tmp_path, monkeypatch):
        """At a constant rate they are the same as if they had been wanted from the start."""
        monkeypatch.setattr(loop, "learning_rate", lambda *arguments: 0.02)
        output, whole = tmp_path / "run", tmp_path / "whole"
        assert main([*training.command(data, output), "--epochs", "1"]) == 0
        assert main([*training.command(data, output), "--resume"]) == 0
        assert main(training.command(data, whole)) == 0
        self.same(whole, output)

    def test_epochs_are_those_of_the_run_by_default(self, data, tmp_path, whole, monkeypatch):
        arguments = training.command(data, tmp_path / "run")
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            assert main(arguments) == 130
        number = arguments.index("--epochs")
        assert main([*arguments[:number], *arguments[number + 2 :], "--resume"]) == 0
        self.same(whole, tmp_path / "run")

    def test_fewer_epochs(self, data, tmp_path, capsys):
        arguments = training.command(data, tmp_path / "run")
        assert main(arguments) == 0
        capsys.readouterr()
        before = (tmp_path / "run" / "config.json").read_bytes()
        assert main([*arguments, "--resume", "--epochs", "1"]) == 1
        assert "2 epochs of the run are done or begun: 1 is fewer" in capsys.readouterr().err
        assert (tmp_path / "run" / "config.json").read_bytes() == before

    def test_after_the_end(self, data, tmp_path, whole):
        output = tmp_path / "run"
        arguments = training.command(data, output)
        assert main(arguments) == 0
        (output / "confusion.png").unlink()
        assert main([*arguments, "--resume"]) == 0
        assert (output / "confusion.png").exists()
        self.same(whole, output)


class TestStartingWeights:
    @pytest.fixture
    def first_state(self, monkeypatch) -> list[dict[str, torch.Tensor]]:
        """The weights that each run begins with."""
        seen = []
        original = loop.Trainer.run

        def run(trainer):
            state = trainer._model.state_dict()
            seen.append({name: tensor.clone() for name, tensor in state.items()})
            original(trainer)

        monkeypatch.setattr(loop.Trainer, "run", run)
        return seen

    @pytest.mark.parametrize("kind", ["run", "safetensors", "json", "pth", "bare"])
    def test_other_number_of_classes(self, folder, tmp_path, randomised, first_state, kind, capsys):
        model = randomised(training.build())
        info = dataclasses.replace(INFO, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
        source = tmp_path / "from" / "model.safetensors"
        source.parent.mkdir()
        save_model(source, model, info)
        if kind == "pth":
            source = tmp_path / "a.pth.tar"
            wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
            torch.save({"state_dict": wrapped, "epoch": 3}, source)
        if kind == "bare":
            source.with_suffix(".json").unlink()
        if kind == "json":
            source = source.with_suffix(".json")
        if kind == "run":
            source = source.parent
        output = tmp_path / "run"
        arguments = training.command(folder, output, *FOLDER, "--weights", str(source))
        assert main(arguments) == 0
        assert "; new: base.9.2.weight, base.9.2.bias" in capsys.readouterr().err
        fresh = training.build(2).state_dict()
        for name, tensor in first_state[0].items():
            if fresh[name].shape == model.state_dict()[name].shape:
                assert torch.equal(tensor, model.state_dict()[name]), name
            else:
                assert tensor.shape == fresh[name].shape
        described = kind in ("run", "safetensors", "json")
        assert read_info(output).mean == (info.mean if described else (0.485, 0.456, 0.406))
        assert read_info(output).std == (info.std if described else (0.229, 0.224, 0.225))

    def test_same_classes_keep_the_classifier(self, data, tmp_path, randomised, first_state):
        model = randomised(training.build())
        source = save_model(tmp_path / "a.safetensors", model, INFO)
        assert main(training.command(data, tmp_path / "run", "--weights", str(source))) == 0
        for name, tensor in model.state_dict().items():
            assert torch.equal(first_state[0][name], tensor), name

    def test_shipped(self, tmp_path, first_state, data):
        arguments = training.command(data, tmp_path / "run", "--epochs", "1")
        arguments[1] = "threshnet79"
        assert main([*arguments, "--weights", "cifar10", "--batch-size", "50"]) == 0
        shipped = tf.create_model("threshnet79", pretrained="cifar10").state_dict()
        assert all(torch.equal(first_state[0][name], shipped[name]) for name in shipped)

    def test_resuming_needs_them_only_at_the_start(
        self, folder, tmp_path, randomised, monkeypatch, capsys
    ):
        source = tmp_path / "a.safetensors"
        info = dataclasses.replace(INFO, mean=(0.4, 0.5, 0.6))
        save_model(source, randomised(training.build()), info)
        output, whole = tmp_path / "run", tmp_path / "whole"
        arguments = training.command(folder, output, *FOLDER)
        given = ["--weights", str(source)]
        assert main([*training.command(folder, whole, *FOLDER), *given]) == 0
        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "run", lambda trainer: (_ for _ in ()).throw(OSError()))
            assert main([*arguments, *given]) == 1
        capsys.readouterr()
        assert main([*arguments, "--resume"]) == 2
        assert "--weights must name again" in capsys.readouterr().err
        other = save_model(tmp_path / "b.safetensors", training.build(), info)
        assert main([*arguments, "--resume", "--weights", str(other)]) == 2
        assert "starts from others" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            stop_at(patch, 4)
            assert main([*arguments, "--resume", *given]) == 130
        source.unlink()
        assert main([*arguments, "--resume"]) == 0
        assert files.sha256(output / "model.safetensors") == files.sha256(
            whole / "model.safetensors"
        )
        assert (output / "model.json").read_bytes() == (whole / "model.json").read_bytes()

    def test_refused(self, data, tmp_path, capsys):
        output = tmp_path / "run"
        arguments = training.command(data, output)

        def fails(weights: object, *parts: str, options: tuple[str, ...] = ()) -> None:
            assert main([*arguments, "--weights", str(weights), *options]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert len(error) < 1000
            for part in parts:
                assert part in error
            assert not output.exists()

        fails(tmp_path / "none.pth", "none.pth", "no such file")
        fails("cifar100", "no trained weights of tiny are shipped")
        fails(tmp_path, "model.safetensors")
        info = dataclasses.replace(INFO, model="threshnet79")
        source = save_model(tmp_path / "a.safetensors", training.build(), info)
        fails(source, "those of threshnet79, not of tiny")
        save_model(source, training.build(), INFO)
        fails(source, "expected --in-chans 3", options=("--in-chans", "1"))
        content = bytearray(source.read_bytes())
        source.write_bytes(content[:200])
        fails(source, "a.safetensors")
        torch.save({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "a.pth")
        fails(tmp_path / "a.pth", "a.pth")


class TestGrey:
    @pytest.mark.parametrize("kind", ["folder", "cifar10"])
    def test_one_channel(self, kind, folder, data, tmp_path, capsys):
        output = tmp_path / "run"
        options = (*FOLDER, "--workers", "2") if kind == "folder" else ()
        root = folder if kind == "folder" else data
        assert main([*training.command(root, output, *options), "--in-chans", "1"]) == 0
        model, info = load_model(output)
        assert info.arguments["in_chans"] == 1
        assert len(info.mean) == len(info.std) == 1
        if kind == "folder":
            assert info.mean[0] == pytest.approx(sum((0.485, 0.456, 0.406)) / 3, abs=1e-3)
        assert model.in_chans == 1
        assert model(torch.randn(1, 1, 32, 32)).shape == (1, len(info.classes))
        if kind == "folder":
            picture = folder / "val" / "kind 1" / "1.png"
            capsys.readouterr()
            assert main(["predict", str(picture), "--checkpoint", str(output), "--json"]) == 0
            answer = json.loads(capsys.readouterr().out)["results"][0]["predictions"]
            from PIL import Image

            # 0.875 of 32 pixels in the middle, enlarged to 32, grey and normalised.
            grey = torch.from_numpy(np.array(Image.open(picture).convert("L"))[2:30, 2:30])
            x = grey[None, None].float()
            x = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear")
            with torch.no_grad():
                shares = model((x / 255 - info.mean[0]) / info.std[0]).softmax(1)[0]
            for entry in answer:
                expected = shares[entry["index"]].item()
                assert entry["probability"] == pytest.approx(expected, abs=1e-3)

    def test_other_channels_do_not_resume(self, folder, tmp_path, capsys):
        arguments = training.command(folder, tmp_path / "run", *FOLDER, "--epochs", "1")
        assert main([*arguments, "--in-chans", "1"]) == 0
        capsys.readouterr()
        assert main([*arguments, "--resume"]) == 2
        assert "in_chans was 1, not 3" in capsys.readouterr().err


class Scripted:
    """Evaluations with accuracies of the test's choice, epoch by epoch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, right: list[int]) -> None:
        self.right = right

        def evaluate(trainer: loop.Trainer) -> evaluation.Evaluation:
            epoch = trainer.progress.step // 6
            number = right[epoch - 1]
            # Class 9 has no images.
            confusion = torch.zeros(10, 10, dtype=torch.int64)
            confusion[0, 0], confusion[8, 0] = number, 20 - number
            return evaluation.Evaluation(1.0, confusion)

        monkeypatch.setattr(loop.Trainer, "_evaluate", evaluate)


class TestBestEpoch:
    def test_earliest_best_is_kept(self, data, tmp_path, monkeypatch):
        Scripted(monkeypatch, [5, 12, 12, 3])
        output = tmp_path / "run"
        arguments = training.command(data, output, "--epochs", "4", "--ema-decay", "0")
        states = {}
        original = loop.Trainer.save

        def save(trainer):
            original(trainer)
            states[trainer.progress.epoch] = {
                name: tensor.clone() for name, tensor in trainer.trained.state_dict().items()
            }

        monkeypatch.setattr(loop.Trainer, "save", save)
        assert main(arguments) == 0
        for name, epoch, accuracy in (("best", 2, 0.6), ("model", 4, 0.15)):
            path = output / f"{name}.safetensors"
            info = read_info(path)
            assert (info.epochs, info.accuracy) == (epoch, accuracy)
            assert info.extra["test_images"] == 20
            assert info.extra["class_accuracy"]["class 0"] == 1.0
            assert info.extra["class_accuracy"]["class 9"] is None
            state = load_state(path)
            for key, tensor in states[epoch].items():
                assert torch.equal(state[key], tensor), key
        assert "NaN" not in (output / "best.json").read_text()
        with (output / "class_accuracy.csv").open(encoding="utf-8", newline="") as file:
            classes = list(csv.DictReader(file))
        assert [row["epoch"] for row in classes] == ["1", "2", "3", "4"]
        assert {row["class 0"] for row in classes} == {"1.0"}
        assert {row["class 8"] for row in classes} == {"0.0"}
        assert {row["class 9"] for row in classes} == {""}

    @pytest.mark.parametrize("moment", ["killed before it was written", "of a later epoch"])
    def test_after_resuming(self, data, tmp_path, monkeypatch, capsys, moment):
        Scripted(monkeypatch, [5, 12, 3])
        output = tmp_path / "run"
        arguments = [*training.command(data, output, "--epochs", "3"), "--resume"]
        whole = tmp_path / "whole"
        assert main(training.command(data, whole, "--epochs", "3")) == 0
        with monkeypatch.context() as patch:
            stop_at(patch, 13)
            assert main(arguments) == 130
        if moment.startswith("killed"):
            # As if the process had ended between the second checkpoint and the best epoch's files.
            shutil.rmtree(output / "checkpoints" / "epoch-0002-batch-000002")
            for name in ("best.safetensors", "best.json"):
                (output / name).unlink()
        else:
            info = json.loads((output / "best.json").read_text())
            info["epochs"], info["accuracy"] = 3, 0.9
            (output / "best.json").write_text(json.dumps(info))
        capsys.readouterr()
        assert main(arguments) == 0
        if moment.startswith("killed"):
            for name in ("best.safetensors", "best.json"):
                assert (output / name).read_bytes() == (whole / name).read_bytes()
        else:
            assert "the best epoch so far are not in best.safetensors" in capsys.readouterr().err
            assert read_info(output / "best.safetensors").epochs == 3

    def test_patience(self, data, tmp_path, monkeypatch, capsys):
        Scripted(monkeypatch, [5, 12, 12, 3, 12, 13, 1, 1, 1, 1])
        output = tmp_path / "run"
        arguments = training.command(data, output, "--epochs", "10")
        assert main([*arguments, "--patience", "3"]) == 0
        assert "has not risen for 3 epochs; the best was 60.00% after epoch 2" in (
            capsys.readouterr().err
        )
        assert len(rows(output)) == 5
        # The same again ends at once; more patience goes on, and counts from the best so far.
        assert main([*arguments, "--patience", "3", "--resume"]) == 0
        assert len(rows(output)) == 5
        with monkeypatch.context() as patch:
            stop_at(patch, 40)
            assert main([*arguments, "--patience", "4", "--resume"]) == 130
        assert main([*arguments, "--patience", "4", "--resume"]) == 0
        assert len(rows(output)) == 10
        assert read_info(output / "best.safetensors").epochs == 6

    def test_patience_looks_at_evaluations(self, data, tmp_path, monkeypatch):
        Scripted(monkeypatch, [0, 12, 0, 3, 0, 2, 0, 1])
        output = tmp_path / "run"
        arguments = training.command(data, output, "--epochs", "8", "--evaluate-every", "2")
        assert main([*arguments, "--patience", "3"]) == 0
        assert len(rows(output)) == 6


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
        fails(["--image-size", "4"], 2, "tiny cannot be trained so", "at least 5 x 5")
        fails(["--label-smoothing", "1"], 2, "label_smoothing is 1.0")
        if not torch.cuda.is_available():
            fails(["--device", "cuda"], 2, "--device cuda")
        misspelt = ["train", "threshnet78", *arguments[2:]]
        self.fails(capsys, misspelt, 2, "did you mean 'threshnet79'")
        self.fails(capsys, [word for word in arguments if word != "--no-verify"], 1, "61460 bytes")

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_unreadable_picture(self, tmp_path, capsys, workers):
        """Unchecked, its error is that of the step that it belongs to, in whatever process."""
        picture = write_damaged(tmp_path)
        arguments = training.command(tmp_path, tmp_path / "run", *FOLDER, "--workers", workers)
        self.fails(capsys, [*arguments, "--no-check"], 1, str(picture))
        assert (tmp_path / "run").exists()
        shutil.rmtree(tmp_path / "run")
        assert main([*arguments, "--no-check"]) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert len(error) < 300 + len(str(picture))

    def test_unreadable_picture_is_found_first(self, tmp_path, capsys):
        picture = write_damaged(tmp_path)
        other = tmp_path / "val" / "a" / "1.png"
        other.write_bytes(b"")
        arguments = training.command(tmp_path, tmp_path / "run", *FOLDER)
        expected = ("2 of 24 pictures cannot be read", f"{picture}: ", f"{other}: ")
        self.fails(capsys, [*arguments, "--no-skip-unreadable"], 1, *expected)
        assert not (tmp_path / "run").exists()
        assert main(arguments) == 0
        listed = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[:2] for line in listed] == [
            ["left out", str(picture)],
            ["left out", str(other)],
        ]
        with (tmp_path / "run" / "confusion.csv").open(encoding="utf-8", newline="") as file:
            matrix = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
        assert [sum(row) for row in matrix] == [5, 6]
        assert json.loads((tmp_path / "run" / "config.json").read_text())["train_images"] == 11
        contradicting = [*arguments, "--skip-unreadable", "--no-check"]
        with pytest.raises(SystemExit):
            build_parser().parse_args(contradicting)
        for path in (tmp_path / "train" / "b").iterdir():
            path.write_bytes(b"")
        assert main([*arguments, "--skip-unreadable", "--resume"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "no training image of b can be read" in error
        assert "--debug" not in error

    def test_class_missing_from_the_test_images(self, tmp_path, capsys):
        training.write_folder(tmp_path, {"a": 6, "b": 6, "c": 6}, "train")
        training.write_folder(tmp_path, {"a": 4, "c": 4}, "val")
        (tmp_path / "val" / "b").mkdir()
        output = tmp_path / "run"
        assert main(training.command(tmp_path, output, *FOLDER)) == 0
        for name in ("model.json", "best.json"):
            info = json.loads((output / name).read_text())
            assert info["classes"] == ["a", "b", "c"]
            assert info["test_images"] == 8
            assert info["class_accuracy"]["b"] is None
            right = info["class_accuracy"]["a"] + info["class_accuracy"]["c"]
            assert info["accuracy"] == pytest.approx(right / 2)
        with (output / "class_accuracy.csv").open(encoding="utf-8", newline="") as file:
            assert [row["b"] for row in csv.DictReader(file)] == ["", ""]
        for name in ("class_accuracy.csv", "log.csv", "confusion.csv", "model.json"):
            assert "nan" not in (output / name).read_text().lower(), name
        assert "nan" not in capsys.readouterr().out.lower()

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
        changed = [*arguments, "--resume", "--seed", "1", "--sampling", "balanced"]
        messages = ("seed was 0, not 1", "recipe.sampling was 'uniform', not 'balanced'")
        self.fails(capsys, changed, 2, *messages)
        recorded = json.loads((output / "config.json").read_text())
        recorded["classes"].reverse()
        (output / "config.json").write_text(json.dumps(recorded))
        self.fails(capsys, [*arguments, "--resume"], 2, "classes was ['class 9'")
        (output / "config.json").write_text("{}")
        self.fails(capsys, [*arguments, "--resume"], 1, "does not describe a training run")

    def test_two_at_once(self, data, tmp_path, capsys):
        import fcntl

        output = tmp_path / "run"
        output.mkdir()
        with (output / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.fails(capsys, training.command(data, output), 1, "another process is training")

    def test_weight_that_is_no_number(self, data, tmp_path, capsys, monkeypatch):
        """After the last step of an epoch, of which no loss tells."""
        original = loop.Trainer._read_sums

        def spoil(trainer):
            original(trainer)
            if trainer.progress.step == 12:
                trainer._model.base[0].conv.weight.data[0] = math.nan

        monkeypatch.setattr(loop.Trainer, "_read_sums", spoil)
        output = tmp_path / "run"
        arguments = training.command(data, output, "--ema-decay", "0", "--evaluate-every", "2")
        self.fails(capsys, arguments, 1, "the loss on the test images is no number any more")
        assert not (output / "model.safetensors").exists()
        assert [path.name for path in (output / "checkpoints").iterdir()] == [
            "epoch-0001-batch-000000"
        ]
        # With an average of the weights, which is what is evaluated, the weights alone are wrong.
        arguments = training.command(data, tmp_path / "other")
        self.fails(capsys, arguments, 1, "a weight is no number any more at step 12")

    def test_class_without_training_images(self, tmp_path, capsys):
        training.write_cifar10(tmp_path, 9)
        arguments = training.command(tmp_path, tmp_path / "run", "--class-weights", "balanced")
        self.fails(capsys, arguments, 2, "class 9 has no training images")
        assert not (tmp_path / "run").exists()

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
        # Known to have been otherwise before there was the setting.
        recorded = settings.to_json()
        del recorded["recipe"]["sampling"], recorded["in_chans"]
        balanced = dataclasses.replace(RECIPES["modern"], sampling="balanced")
        other = dataclasses.replace(settings, recipe=balanced, in_chans=1)
        assert len(differences(recorded, other)) == 2


def test_evaluation_counts():
    class Batches:
        def all(self):
            yield torch.tensor([[5.0, 0, 0], [0, 5, 0]]), torch.tensor([0, 2])
            yield torch.tensor([[0.0, 0, 5]]), torch.tensor([2])

    result = evaluation.evaluate(nn.Identity(), Batches(), 3)
    assert result.top5_accuracy == 1.0
    assert result.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert result.count == 3
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.class_accuracy == [1.0, None, 0.5]
    assert result.describe("abc")["class_accuracy"] == {"a": 1.0, "b": None, "c": 0.5}
    right = math.log(1 + 2 * math.exp(-5))
    assert result.loss == pytest.approx((3 * right + 5) / 3)
    with pytest.raises(ValueError, match="no test images"):
        evaluation.evaluate(nn.Identity(), type("Empty", (), {"all": lambda self: iter(())})(), 3)


def test_figures_of_many_classes(tmp_path):
    confusion = torch.randint(0, 9, (100, 100))
    figures.draw_confusion(tmp_path / "a.png", confusion, [str(number) for number in range(100)])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_reporter_draws_a_bar_on_a_terminal_only(monkeypatch, capsys):
    reporter = reporters.ConsoleReporter(3)
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
