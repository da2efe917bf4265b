"""Weights that come with the package, and what writes them."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from trained import CLASSES, INFO, picture, save_random

import threshnet_fast as tf
from threshnet_fast.cli import main
from threshnet_fast.data.preprocessing import preprocess
from threshnet_fast.models import pretrained
from threshnet_fast.models.create import load_model
from threshnet_fast.models.pretrained import find_pretrained, list_pretrained
from threshnet_fast.models.weights_file import load_state, read_info

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("THRESHNET_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))
LARGEST = 30_000_000


@pytest.fixture(autouse=True)
def quiet(one_thread) -> None:
    """One thread."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights as they are shipped."""
    folder = tmp_path_factory.mktemp("weights")
    path = folder / "threshnet79_cifar10.safetensors"
    save_random(path, torch.float16, extra={"license": "MIT", "note": "Random."})
    return folder


@pytest.fixture
def shipped(folder, monkeypatch) -> Path:
    """The package's folder of weights is another one."""
    monkeypatch.setattr(pretrained, "_FOLDER", folder)
    return folder / "threshnet79_cifar10.safetensors"


class TestCreate:
    @pytest.mark.parametrize("tag", ["cifar10", True])
    def test_weights_of_the_file(self, shipped, tag):
        model = tf.create_model("threshnet79", pretrained=tag)
        assert model.training
        assert model.num_classes == 10
        state = load_state(shipped)
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert value.dtype in (torch.float32, torch.int64)
            assert torch.equal(value, state[name]), name
        expected, info = load_model(shipped)
        x = torch.randn(2, 3, *info.image_size)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), expected(x))

    def test_says_how_it_takes_pictures(self, shipped):
        cfg = tf.create_model("threshnet79", pretrained="cifar10").default_cfg
        assert cfg["input_size"] == (3, 48, 48)
        assert (cfg["mean"], cfg["std"]) == (INFO.mean, INFO.std)
        assert (cfg["interpolation"], cfg["crop_pct"]) == ("bilinear", 1.0)
        assert cfg["classes"] == CLASSES

    def test_half_precision(self, shipped):
        assert read_info(shipped).dtype == "float16"
        assert shipped.stat().st_size < LARGEST

    @pytest.mark.parametrize("classes", [3, 0])
    def test_other_classes(self, shipped, classes):
        torch.manual_seed(1)
        model = tf.create_model("threshnet79", pretrained="cifar10", num_classes=classes)
        torch.manual_seed(1)
        new = tf.create_model("threshnet79", num_classes=classes)
        state, prefix = load_state(shipped), model.default_cfg["classifier"] + "."
        for name, value in model.state_dict().items():
            expected = new.state_dict() if name.startswith(prefix) else state
            assert torch.equal(value, expected[name]), name
        assert "classes" not in model.default_cfg
        assert model.default_cfg["mean"] == INFO.mean
        with torch.no_grad():
            shape = model.eval()(torch.randn(1, 3, 48, 48)).shape
        assert shape == (1, classes or model.num_features)

    def test_features_without_pooling(self, shipped):
        model = tf.create_model(
            "threshnet79", pretrained="cifar10", num_classes=0, global_pool=""
        ).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 48, 48)).shape[:2] == (1, model.num_features)

    def test_dropout(self, shipped):
        model = tf.create_model("threshnet79", pretrained="cifar10", drop_rate=0.2)
        assert model.drop_rate == 0.2

    @pytest.mark.parametrize("tag", [None, False])
    def test_none(self, shipped, tag):
        assert tf.create_model("threshnet79", pretrained=tag).num_classes == 1000

    def test_other_channels(self, shipped):
        with pytest.raises(ValueError, match="in_chans is 1: expected 3"):
            tf.create_model("threshnet79", pretrained="cifar10", in_chans=1)

    @pytest.mark.parametrize(
        ("name", "tag", "message"),
        [
            ("threshnet79", "cifar-10", "did you mean 'cifar10'"),
            ("threshnet79", "qqq", "expected one of cifar10"),
            ("threshnet95", "cifar10", r"no trained weights of threshnet95.*threshnet79 \(cifar10"),
            ("threshnet95", True, "no trained weights of threshnet95"),
            ("threshnet78", "cifar10", "did you mean 'threshnet79'"),
        ],
    )
    def test_no_such_weights(self, shipped, name, tag, message):
        with pytest.raises(ValueError, match=message) as error:
            tf.create_model(name, pretrained=tag)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("tag", [1, b"cifar10", ["cifar10"]])
    def test_bad_type(self, shipped, tag):
        with pytest.raises(TypeError, match="pretrained"):
            tf.create_model("threshnet79", pretrained=tag)

    def test_installation_without_weights(self, monkeypatch, tmp_path):
        monkeypatch.setattr(pretrained, "_FOLDER", tmp_path / "none")
        assert list_pretrained() == []
        with pytest.raises(ValueError, match="none of any model in this installation"):
            tf.create_model("threshnet79", pretrained="cifar10")

    def test_damaged_file(self, monkeypatch, tmp_path, shipped):
        monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
        for path in (shipped, shipped.with_suffix(".json")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        with (tmp_path / shipped.name).open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x11\x22")
        with pytest.raises(ValueError, match="checksums differ"):
            tf.create_model("threshnet79", pretrained="cifar10")

    def test_weights_of_another_network(self, monkeypatch, tmp_path):
        monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
        save_random(tmp_path / "threshnet95_cifar10.safetensors", model="threshnet95")
        with pytest.raises((ValueError, RuntimeError)):
            tf.create_model("threshnet95", pretrained="cifar10")


class TestList:
    def test_what_is_shipped(self, shipped):
        (weights,) = list_pretrained()
        assert (weights.model, weights.tag) == ("threshnet79", "cifar10")
        assert weights.path == shipped
        assert weights.sha256 == hashlib.sha256(shipped.read_bytes()).hexdigest()
        assert (weights.license, weights.note) == ("MIT", "Random.")
        assert weights.info.classes == CLASSES
        assert list_pretrained("threshnet79") == [weights]
        assert list_pretrained("threshnet95") == []
        assert find_pretrained("threshnet79") == find_pretrained("threshnet79", "cifar10")

    def test_several_of_a_model(self, monkeypatch, tmp_path):
        monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
        for tag in ("b", "a"):
            save_random(tmp_path / f"threshnet79_{tag}.safetensors", torch.float16)
        assert [weights.tag for weights in list_pretrained()] == ["a", "b"]
        assert find_pretrained("threshnet79", "b").tag == "b"
        with pytest.raises(ValueError, match="expected one of a, b"):
            find_pretrained("threshnet79", True)

    def test_name_of_another_model(self, monkeypatch, tmp_path):
        monkeypatch.setattr(pretrained, "_FOLDER", tmp_path)
        save_random(tmp_path / "threshnet95_a.safetensors", torch.float16)
        with pytest.raises(ValueError, match="holds a threshnet79"):
            list_pretrained()

    def test_bad_type(self):
        with pytest.raises(TypeError, match="model is a int"):
            list_pretrained(3)
        with pytest.raises(TypeError, match="model is a int"):
            find_pretrained(3)


def write_cifar(folder: Path, count: int) -> np.ndarray:
    """CIFAR-10's files with a few records each; returns the labels of the test images."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    for name in (*names, "test_batch.bin"):
        records = []
        for index in range(count):
            pixels = picture(32, 32, seed=index).transpose(2, 0, 1)
            records.append(np.concatenate([np.array([index % 10], np.uint8), pixels.ravel()]))
        np.concatenate(records).tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")
    return np.arange(count) % 10


class TestExport:
    def test_half_precision(self, tmp_path, capsys):
        model = save_random(tmp_path / "run" / "model.safetensors", recipe={"name": "modern"})
        output = tmp_path / "threshnet79_cifar10.safetensors"
        more = ["--license", "MIT", "--note", "Two words."]
        assert main(["export", str(tmp_path / "run"), str(output), *more]) == 0
        assert capsys.readouterr().out.startswith(f"Written: {output} (28.")
        info = read_info(output)
        assert (info.dtype, info.accuracy, info.epochs) == ("float16", 0.5, 3)
        assert info.recipe == {"name": "modern"}
        assert info.extra["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
        assert (info.extra["license"], info.extra["note"]) == ("MIT", "Two words.")
        half = load_state(output, None)
        for name, value in model.state_dict().items():
            expected = value.half() if value.is_floating_point() else value
            assert torch.equal(half[name], expected), name

    def test_accuracy_of_what_was_written(self, tmp_path):
        save_random(tmp_path / "run" / "model.safetensors")
        labels = write_cifar(tmp_path, 20)
        output = tmp_path / "half.safetensors"
        more = ["--data", str(tmp_path), "--no-verify"]
        assert main(["export", str(tmp_path / "run"), str(output), *more]) == 0
        model, info = load_model(output)
        images = [torch.from_numpy(picture(32, 32, seed=i)).permute(2, 0, 1) for i in range(20)]
        with torch.no_grad(), tf.use_backend("reference"):
            x = torch.cat([preprocess(image, info) for image in images])
            right = model(x).argmax(1).numpy() == labels
        assert info.accuracy == right.mean() != 0.5
        assert info.extra["test_images"] == 20
        by_class = info.extra["class_accuracy"]
        assert list(by_class) == list(CLASSES)
        assert list(by_class.values()) == [right[i::10].mean() for i in range(10)]

    @pytest.mark.parametrize(
        ("changes", "more", "message"),
        [
            ({}, [], "there is no"),
            ({"dataset": "svhn"}, ["--data", "."], "only cifar10 and cifar100"),
            ({}, ["--data", "."], "no data_batch_1.bin"),
        ],
    )
    def test_errors(self, tmp_path, capsys, monkeypatch, changes, more, message):
        monkeypatch.chdir(tmp_path)
        if more:
            save_random(tmp_path / "model.safetensors", **changes)
        assert main(["export", ".", "half.safetensors", *more]) != 0
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_bad_output(self, tmp_path, capsys):
        for output in ("half.pt", "none/half.safetensors"):
            assert main(["export", str(tmp_path), str(tmp_path / output)]) == 2
            assert output in capsys.readouterr().err


real = list_pretrained()
with_weights = pytest.mark.skipif(not real, reason="no trained weights are in this source tree")


@with_weights
@pytest.mark.parametrize("weights", real, ids=lambda w: f"{w.model}-{w.tag}")
class TestShipped:
    def test_file(self, weights):
        assert weights.path.stat().st_size <= LARGEST
        assert weights.sha256 == hashlib.sha256(weights.path.read_bytes()).hexdigest()
        assert weights.info.dtype == "float16"
        for value in load_state(weights.path).values():
            assert value.isfinite().all()

    def test_description(self, weights):
        info = weights.info
        assert weights.license
        assert weights.note
        assert info.recipe
        assert info.epochs > 0
        assert info.extra["test_images"] >= 10_000
        assert 0.88 <= info.accuracy <= 1
        by_class = info.extra["class_accuracy"]
        assert tuple(by_class) == info.classes
        assert np.mean(list(by_class.values())) == pytest.approx(info.accuracy, abs=1e-6)
        json.loads(weights.path.with_suffix(".json").read_text(encoding="utf-8"))

    def test_fused_and_reference_agree_on_pictures(self, weights):
        model = tf.create_model(weights.model, pretrained=weights.tag).eval()
        images = [picture(200 + 10 * i, 300, seed=i) for i in range(8)]
        x = torch.cat(
            [preprocess(torch.from_numpy(i).permute(2, 0, 1), weights.info) for i in images]
        )
        with torch.no_grad():
            fused = model(x)
            with tf.use_backend("reference"):
                reference = model(x)
        assert torch.equal(fused.argmax(1), reference.argmax(1))
        torch.testing.assert_close(fused, reference, rtol=1e-3, atol=1e-3)

    def test_all_test_images(self, weights):
        """Fused and plain PyTorch agree on all of them, and are as good as the description says."""
        path = DATA / "cifar10_test_jpeg.npz"
        if weights.info.dataset != "cifar10" or not path.is_file():
            pytest.skip(f"no {path}")
        images, labels = read_jpeg(path)
        model = tf.create_model(weights.model, pretrained=weights.tag).eval()
        answers: dict[str, list[torch.Tensor]] = {"auto": [], "reference": []}
        for part in images.split(100):
            x = torch.cat([preprocess(image, weights.info) for image in part])
            for backend, found in answers.items():
                with torch.inference_mode(), tf.use_backend(backend):
                    found.append(model(x).argmax(1))
        fused, reference = (torch.cat(found) for found in answers.values())
        assert torch.equal(fused, reference)
        accuracy = float((fused == labels).double().mean())
        # Another processor's kernels may round one close call the other way.
        assert accuracy >= weights.info.accuracy - 5e-4


def read_jpeg(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(N, 3, 32, 32)``, uint8, and labels of a file of JPEG pictures end to end."""
    import io

    from PIL import Image

    with np.load(path) as content:
        data, offsets, labels = (content[name] for name in ("jpeg", "offset", "label"))
    images = [
        np.asarray(Image.open(io.BytesIO(data[begin:end].tobytes())).convert("RGB"))
        for begin, end in pairwise(offsets)
    ]
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return tensor, torch.from_numpy(labels.astype(np.int64))
