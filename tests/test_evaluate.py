from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trained
import training
from PIL import Image

from threshnet_fast.cli import main
from threshnet_fast.data import folder as folders
from threshnet_fast.data.preprocessing import preprocess
from threshnet_fast.models import registry
from threshnet_fast.train import ModelInfo, load_model, read_info, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = ("--dataset", "folder", "--image-size", "32", "--workers", "0", "--batch-size", "8")
CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    monkeypatch.setitem(registry._REGISTRY, training.NAME, training.build)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    training.write_folder(root, {"a": 8, "b": 8, "c": 8}, "train")
    return training.write_folder(root, {"a": 4, "b": 6, "c": 5}, "val")


@pytest.fixture
def model(tmp_path, randomised) -> Path:
    """A network that knows three classes, with random weights."""
    info = ModelInfo(
        model=training.NAME,
        classes=CLASSES,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_size=(32, 32),
        arguments={"num_classes": 3},
        crop_fraction=0.875,
    )
    return save_model(tmp_path / "a.safetensors", randomised(training.build(3)), info)


def evaluated(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json", "--workers", "0"]) == 0
    return json.loads(capsys.readouterr().out)


def matrix(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def fails(capsys, status: int, message: str, *arguments: object) -> None:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_run_has_the_accuracy_that_training_says(data, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(training.command(data, output, *FOLDER)) == 0
    result = evaluated(capsys, output, "--data", data, "--output", tmp_path / "new" / "out")
    info = read_info(output)
    assert result["top1"] == info.accuracy
    assert result["images"] == 15
    accuracies = {name: entry["accuracy"] for name, entry in result["classes"].items()}
    assert accuracies == info.extra["class_accuracy"]
    with (output / "log.csv").open(encoding="utf-8", newline="") as file:
        loss = float(list(csv.DictReader(file))[-1]["test_loss"])
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    written = tmp_path / "new" / "out"
    assert matrix(written / "confusion.csv") == matrix(output / "confusion.csv")
    assert (written / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((written / "evaluation.json").read_text()) == result
    best = evaluated(capsys, output / "best.safetensors", "--data", data / "val")
    assert best["top1"] == read_info(output / "best.safetensors").accuracy


def test_numbers(data, model, capsys):
    """All of them, from logits by the network itself."""
    result = evaluated(capsys, model, "--data", data, "--backend", "reference", "--batch-size", 4)
    network, info = load_model(model)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    right, losses, five = {}, [], 0
    for label, name in enumerate(CLASSES):
        for path in sorted((data / "val" / name).iterdir()):
            with Image.open(path) as picture:
                cut = picture.resize((32, 32), Image.Resampling.BILINEAR, (2, 2, 30, 30))
            x = torch.from_numpy(np.array(cut)).float()
            with torch.no_grad():
                logits = network(((x.permute(2, 0, 1) / 255 - mean) / std)[None]).double()
            losses.append(-logits.log_softmax(1)[0, label])
            right.setdefault(name, []).append(int(logits.argmax()) == label)
            five += 1
    for name, answers in right.items():
        entry = result["classes"][name]
        assert entry == {"images": len(answers), "accuracy": sum(answers) / len(answers)}
    assert result["loss"] == pytest.approx(float(sum(losses)) / five, rel=1e-4)
    # Of three classes, all are among the five best.
    assert result["top5"] == 1.0
    assert result["left_out"] == []


def test_classes_go_by_name(data, model, tmp_path, capsys):
    """The same weights with their outputs in another order do as well."""
    expected = evaluated(capsys, model, "--data", data)
    network, info = load_model(model)
    state = network.state_dict()
    order = [2, 0, 1]
    for name in ("base.9.2.weight", "base.9.2.bias"):
        state[name] = state[name][order]
    classes = tuple(info.classes[number] for number in order)
    other = tmp_path / "b.safetensors"
    save_model(other, state, dataclasses.replace(info, classes=classes, extra={}))
    result = evaluated(capsys, other, "--data", data)
    assert list(result["classes"]) == ["c", "a", "b"]
    assert result["classes"] == expected["classes"]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_missing_and_unknown_classes(data, model, tmp_path, capsys):
    shutil.copytree(data / "val", tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "b")
    result = evaluated(capsys, model, "--data", tmp_path / "some")
    assert result["images"] == 9
    assert result["classes"]["b"] == {"images": 0, "accuracy": None}
    assert main(["evaluate", str(model), "--data", str(tmp_path / "some"), "--workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 images: top-1 ")
    assert lines[2].split() == ["b", "no", "images"]
    (tmp_path / "some" / "d").mkdir()
    message = "has folders that are no classes of the model: d"
    fails(capsys, 1, message, model, "--data", tmp_path / "some")


def test_unreadable_pictures(data, model, tmp_path, capsys):
    shutil.copytree(data / "val", tmp_path / "some")
    picture = tmp_path / "some" / "b" / "2.png"
    picture.write_bytes(picture.read_bytes()[:1000])
    result = evaluated(capsys, model, "--data", tmp_path / "some")
    assert result["classes"]["b"]["images"] == 5
    assert [entry["picture"] for entry in result["left_out"]] == [str(picture)]
    arguments = (model, "--data", tmp_path / "some")
    fails(capsys, 1, str(picture), *arguments, "--no-skip-unreadable")
    fails(capsys, 1, str(picture), *arguments, "--no-check")


def test_shipped_weights_on_cifar(tmp_path, capsys):
    """Their classes have other names than the test's files: first refused, then matched."""
    root = training.write_cifar10(tmp_path)
    arguments = ("threshnet79", "--data", tmp_path, "--dataset", "cifar10", "--no-verify")
    fails(capsys, 1, "cifar10 has classes that the model does not: class 0", *arguments)
    names = list(reversed(trained.CLASSES))
    (root / "batches.meta.txt").write_text("\n".join(names))
    result = evaluated(capsys, *arguments)
    assert result["images"] == 20
    assert {entry["images"] for entry in result["classes"].values()} == {2}
    assert list(result["classes"]) == list(trained.CLASSES)
    assert result["top1"] <= result["top5"] <= 1
    # The file's label 0 is now a truck, the network's last class.
    from threshnet_fast.data import sources

    found = sources.load("cifar10", tmp_path, verify=False).test
    network, info = load_model(Path(registry.__file__).parent / "weights/threshnet79_cifar10.json")
    x = torch.cat([preprocess(image.permute(2, 0, 1), info) for image in found.images])
    with torch.no_grad():
        logits = network(x)
    labels = 9 - found.labels
    assert result["top1"] == (logits.argmax(1) == labels).sum().item() / 20
    five = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    assert result["top5"] == five / 20


def test_pictures_are_seen_as_by_predict(tmp_path, capsys):
    """A network trained on small pictures, shown photographs: cut and reduced as predict does."""
    for seed in range(6):
        for number, name in enumerate(("cat", "dog")):
            path = tmp_path / "data" / name / f"{seed}.png"
            trained.write_picture(path, 90, 120, seed=2 * seed + number)
    weights = tmp_path / "a.safetensors"
    trained.save_random(weights)
    result = evaluated(capsys, weights, "--data", tmp_path / "data")
    assert main(["predict", str(tmp_path / "data"), "--checkpoint", str(weights), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["results"]
    for name in ("cat", "dog"):
        right = [
            answer["predictions"][0]["class"] == name
            for answer in answers
            if Path(answer["picture"]).parent.name == name
        ]
        assert result["classes"][name] == {"images": 6, "accuracy": sum(right) / 6}
    found = folders.load_test_folder(tmp_path / "data", trained.CLASSES)
    assert found.labels.tolist() == [3] * 6 + [5] * 6


def test_weights_of_others(data, tmp_path, capsys):
    """They do not say what their classes are called: folders by number are theirs."""
    import threshnet_fast as tf

    network = tf.create_model("densenet_bc_100", num_classes=2)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "a.pth.tar")
    for number, name in enumerate("ab"):
        shutil.copytree(data / "val" / name, tmp_path / "data" / str(number))
    result = evaluated(capsys, tmp_path / "a.pth.tar", "--data", tmp_path / "data")
    assert result["model"] == "densenet_bc_100"
    assert {name: entry["images"] for name, entry in result["classes"].items()} == {"0": 4, "1": 6}


def test_errors(data, model, tmp_path, capsys):
    fails(capsys, 2, "did you mean 'threshnet79'", "threshnet78", "--data", data)
    fails(capsys, 2, "no trained weights of hardnet68", "hardnet68", "--data", data)
    fails(capsys, 2, "none.safetensors", tmp_path / "none.safetensors", "--data", data)
    fails(capsys, 2, "leave this out", model, "--data", data, "--pretrained", "cifar10")
    fails(capsys, 1, "there is no folder", model, "--data", tmp_path / "none")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    fails(capsys, 1, "has no images", model, "--data", tmp_path / "empty")
    fails(capsys, 2, "is no folder", model, "--data", data, "--output", model)
    fails(capsys, 1, "no images", model, "--data", data / "train" / "a")
    network, info = load_model(model)
    network.base[0].conv.weight.data.fill_(float("nan"))
    save_model(tmp_path / "nan.safetensors", network, dataclasses.replace(info, extra={}))
    fails(capsys, 2, "holds NaN", tmp_path / "nan.safetensors", "--data", data)
