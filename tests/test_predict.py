"""``threshnet-fast predict``, and how a picture becomes a network's input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from trained import CLASSES, INFO, picture, save_random, write_picture

from threshnet_fast.bench.job import plain_module
from threshnet_fast.bench.networks import random_model
from threshnet_fast.cli import main
from threshnet_fast.cli.pictures import load_picture
from threshnet_fast.data.augment import Preparation
from threshnet_fast.data.errors import PictureError
from threshnet_fast.data.folder import FolderBatches, load_folder
from threshnet_fast.data.pictures import read_pixels
from threshnet_fast.data.preprocessing import preprocess
from threshnet_fast.errors import CommandError
from threshnet_fast.models import imagenet, pretrained
from threshnet_fast.models.create import load_model
from threshnet_fast.models.weights_file import save_model


@pytest.fixture(autouse=True)
def quiet(one_thread) -> None:
    """One thread."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The folder of a training run."""
    folder = tmp_path_factory.mktemp("run")
    save_random(folder / "model.safetensors", torch.float16)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of pictures, some in a folder of their own, and a file that is none."""
    folder = tmp_path / "pictures"
    write_picture(folder / "a.png", seed=1)
    write_picture(folder / "inside" / "b.JPG", 100, 70, seed=2)
    write_picture(folder / "c.bmp", 32, 32, seed=3)
    (folder / "notes.txt").write_text("no picture")
    return folder


def predict(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["predict", *map(str, arguments)])
    return (status, *capsys.readouterr())


def expected_probabilities(pixels: np.ndarray, model: torch.nn.Module) -> torch.Tensor:
    """What stock PyTorch in float64 says to a picture, prepared by Pillow and numpy."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).double()
    image = image.permute(2, 0, 1)[None]
    if side > 32:
        image = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (INFO.mean, INFO.std))
    image = F.interpolate((image / 255 - mean) / std, INFO.image_size, mode="bilinear")
    with torch.no_grad():
        return plain_module(model).double()(image)[0].softmax(0)


class TestPreprocess:
    def test_picture_of_the_data_set_is_only_normalised(self):
        info = dataclasses.replace(INFO, image_size=(32, 32))
        pixels = torch.from_numpy(picture(32, 32)).permute(2, 0, 1)
        x = preprocess(pixels, info)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (info.mean, info.std))
        torch.testing.assert_close(x, (pixels[None] / 255 - mean) / std, rtol=1e-5, atol=1e-5)
        assert x.is_contiguous()

    def test_square_in_the_middle(self):
        info = dataclasses.replace(INFO, image_size=(8, 8), source_size=None, crop_fraction=0.5)
        pixels = torch.zeros(3, 20, 16, dtype=torch.uint8)
        pixels[:, 6:14, 4:12] = torch.randint(0, 256, (3, 8, 8)).to(torch.uint8)
        x = preprocess(pixels, info)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (info.mean, info.std))
        expected = (pixels[None, :, 6:14, 4:12] / 255 - mean) / std
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)

    def test_photograph_is_reduced_to_the_size_of_the_data_set_first(self):
        pixels = torch.from_numpy(picture(320, 320)).permute(2, 0, 1)
        by_way_of_32 = preprocess(pixels, dataclasses.replace(INFO, image_size=(64, 64)))
        directly = preprocess(
            pixels, dataclasses.replace(INFO, image_size=(64, 64), source_size=None)
        )
        assert by_way_of_32.shape == directly.shape == (1, 3, 64, 64)
        roughness = [float(x.diff(dim=-1).abs().max()) for x in (by_way_of_32, directly)]
        assert roughness[0] < 0.7 * roughness[1]

    def test_small_picture_is_not_reduced(self):
        info = dataclasses.replace(INFO, image_size=(20, 20), source_size=(32, 32))
        pixels = torch.from_numpy(picture(20, 20)).permute(2, 0, 1)
        same = preprocess(pixels, dataclasses.replace(info, source_size=None))
        assert torch.equal(preprocess(pixels, info), same)

    def test_network_of_one_channel_sees_brightness(self):
        info = dataclasses.replace(INFO, mean=(0.0,), std=(1.0,), image_size=(32, 32))
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        pixels[1] = 255
        x = preprocess(pixels, info)
        assert x.shape == (1, 1, 32, 32)
        # As Pillow rounds 0.587 * 255.
        torch.testing.assert_close(x, torch.full_like(x, 150 / 255))

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_folder_is_predicted_as_it_is_evaluated(self, tmp_path, channels, interpolation):
        for split in ("train", "val"):
            for number, size in enumerate([(90, 60), (31, 200), (24, 24)]):
                write_picture(tmp_path / split / "a" / f"{number}.png", *size, seed=number)
        data = load_folder(tmp_path, channels=channels)
        info = dataclasses.replace(
            *(INFO,),
            **{"mean": data.mean, "std": data.std, "image_size": (32, 24), "source_size": None},
            **{"crop_fraction": imagenet.CROP_FRACTION, "interpolation": interpolation},
        )
        preparation = Preparation(data.mean, data.std, info.image_size, interpolation)
        images, _ = next(FolderBatches(data.test, preparation, 3).all())
        for path, image in zip(data.test.paths, images, strict=True):
            for read in {channels, 3}:
                pixels = read_pixels(path, channels=read)
                assert torch.equal(preprocess(pixels, info), image[None])

    @pytest.mark.parametrize(
        ("pixels", "error"),
        [
            (torch.zeros(3, 8, 8), TypeError),
            (np.zeros((3, 8, 8), np.uint8), TypeError),
            (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError),
            (torch.zeros(3, 0, 8, dtype=torch.uint8), ValueError),
        ],
    )
    def test_bad_pixels(self, pixels, error):
        with pytest.raises(error, match="pixels"):
            preprocess(pixels, INFO)

    def test_network_of_other_channels(self):
        info = dataclasses.replace(INFO, mean=(0.0,) * 4, std=(1.0,) * 4)
        with pytest.raises(ValueError, match="4 channels"):
            preprocess(torch.zeros(3, 8, 8, dtype=torch.uint8), info)


class TestPictures:
    def test_orientation_of_a_camera(self, tmp_path):
        image = Image.fromarray(picture(20, 30))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.png", exif=exif)
        pixels = read_pixels(tmp_path / "a.png")
        upright = torch.from_numpy(picture(20, 30)).permute(2, 0, 1).flip(1).transpose(1, 2)
        assert torch.equal(pixels, upright)

    def test_transparent_is_white(self, tmp_path):
        image = np.zeros((4, 4, 4), np.uint8)
        image[:2, :, 3] = 255
        Image.fromarray(image, "RGBA").save(tmp_path / "a.png")
        pixels = read_pixels(tmp_path / "a.png")
        assert pixels[:, :2].max() == 0
        assert pixels[:, 2:].min() == 255

    def test_sixteen_bits(self, tmp_path):
        values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        pixels = read_pixels(tmp_path / "a.png")
        assert pixels.tolist() == [[[0, 1, 128, 255]]] * 3

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK"])
    def test_other_modes(self, tmp_path, mode):
        path = tmp_path / "a.tiff"
        Image.fromarray(picture(6, 7)).convert(mode).save(path)
        pixels = read_pixels(path)
        assert pixels.shape == (3, 6, 7)
        assert pixels.dtype is torch.uint8

    def test_argument_that_named_it(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"nothing")
        with pytest.raises(CommandError, match=r"^--image /.*a.png: not a picture"):
            load_picture(str(tmp_path / "a.png"))
        with pytest.raises(PictureError, match=r"^/.*a.png: not a picture"):
            read_pixels(tmp_path / "a.png")


class TestPredict:
    def test_agrees_with_float64(self, capsys, run_folder, pictures):
        status, output, error = predict(
            capsys, pictures, "--checkpoint", run_folder, "--json", "--top", 10
        )
        assert (status, error) == (0, "")
        answer = json.loads(output)
        assert (answer["model"], answer["checkpoint"]) == ("threshnet79", str(run_folder))
        assert tuple(answer["classes"]) == CLASSES
        names = [Path(result["picture"]).name for result in answer["results"]]
        assert names == ["a.png", "c.bmp", "b.JPG"]
        model, _ = load_model(run_folder)
        for result in answer["results"]:
            pixels = np.asarray(Image.open(result["picture"]).convert("RGB"))
            expected = expected_probabilities(pixels, model)
            found = [entry["probability"] for entry in result["predictions"]]
            assert found == sorted(found, reverse=True)
            assert sum(found) == pytest.approx(1)
            for entry in result["predictions"]:
                assert entry["class"] == CLASSES[entry["index"]]
                assert entry["probability"] == pytest.approx(
                    float(expected[entry["index"]]), abs=1e-4
                )

    def test_reference_backend_says_the_same(self, capsys, run_folder, pictures):
        answers = [
            json.loads(predict(capsys, pictures, "--checkpoint", run_folder, "--json", *more)[1])
            for more in ((), ("--backend", "reference", "--threads", 1))
        ]
        for ours, theirs in zip(*(answer["results"] for answer in answers), strict=True):
            for one, other in zip(ours["predictions"], theirs["predictions"], strict=True):
                assert one["class"] == other["class"]
                assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)

    def test_text(self, capsys, run_folder, pictures):
        status, output, _ = predict(
            capsys, pictures / "a.png", pictures / "c.bmp", "--checkpoint", run_folder, "--top", 2
        )
        assert status == 0
        lines = output.splitlines()
        assert [lines[0], lines[3]] == [str(pictures / "a.png"), str(pictures / "c.bmp")]
        assert len(lines) == 6
        for line in (*lines[1:3], *lines[4:]):
            name, probability = line.split()
            assert name in CLASSES
            assert 0 < float(probability.removesuffix("%")) <= 100

    def test_more_pictures_than_a_batch(self, capsys, run_folder, tmp_path):
        paths = [write_picture(tmp_path / f"{i:02}.png", 33, 33, seed=i) for i in range(35)]
        arguments = ("--checkpoint", run_folder / "model.json", "--json", "--top", 1)
        _, output, _ = predict(capsys, tmp_path, *arguments)
        together = json.loads(output)["results"]
        assert [result["picture"] for result in together] == list(map(str, paths))
        alone = json.loads(predict(capsys, paths[34], *arguments)[1])["results"]
        for result in (together[34]["predictions"][0], alone[0]["predictions"][0]):
            assert result["index"] == alone[0]["predictions"][0]["index"]
            assert result["probability"] == pytest.approx(
                alone[0]["predictions"][0]["probability"], abs=1e-4
            )

    def test_what_is_no_picture_is_reported_and_the_rest_predicted(
        self, capsys, run_folder, pictures
    ):
        (pictures / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
        status, output, error = predict(capsys, pictures, "--checkpoint", run_folder)
        assert status == 1
        assert error.count("\n") == 1
        assert f"{pictures / 'b.png'}: " in error
        assert [str(pictures / name) in output for name in ("a.png", "b.png", "c.bmp")] == [
            *(True, False, True)
        ]
        status, output, error = predict(capsys, pictures, "--checkpoint", run_folder, "--json")
        assert (status, error) == (1, "")
        results = {Path(r["picture"]).name: r for r in json.loads(output)["results"]}
        assert "error" in results["b.png"]
        assert "predictions" not in results["b.png"]
        assert len(results) == 4

    def test_nothing_but_what_is_no_picture(self, capsys, run_folder, pictures):
        status, output, error = predict(capsys, pictures / "notes.txt", "--checkpoint", run_folder)
        assert (status, output) == (1, "")
        assert "not a picture" in error

    def test_same_picture_twice(self, capsys, run_folder, pictures):
        path = pictures / "a.png"
        _, output, _ = predict(capsys, path, path, "--checkpoint", run_folder)
        assert output.count("a.png") == 1

    def test_folder_is_searched_as_in_training(self, capsys, run_folder, pictures):
        (pictures / "._a.png").write_bytes(b"AppleDouble")
        (pictures / ".hidden").mkdir()
        write_picture(pictures / ".hidden" / "x.png")
        (pictures / "a.png").rename(pictures / "a.JFIF")
        (pictures / "inside" / "loop").symlink_to(pictures)
        status, output, error = predict(
            capsys, pictures, "--checkpoint", run_folder, "--json", "--top", 1
        )
        assert (status, error) == (0, "")
        names = [Path(result["picture"]).name for result in json.loads(output)["results"]]
        assert names == ["a.JFIF", "c.bmp", "b.JPG"]

    def test_pretrained(self, capsys, tmp_path, monkeypatch, pictures):
        monkeypatch.setattr(pretrained, "_FOLDER", tmp_path / "weights")
        path = tmp_path / "weights" / "threshnet79_cifar10.safetensors"
        save_random(path, torch.float16)
        outputs = [
            json.loads(predict(capsys, pictures, "--json", *more)[1])
            for more in ((), ("--model", "threshnet79", "--pretrained", "cifar10"))
        ]
        assert outputs[0] == outputs[1]
        assert outputs[0]["pretrained"] == "cifar10"
        by_path = json.loads(predict(capsys, pictures, "--json", "--checkpoint", path)[1])
        assert by_path["results"] == outputs[0]["results"]


class TestNames:
    """Names of files that a terminal would obey, or that are no text."""

    NAMES = ("a\x1b[31m.png", "b\udcff.png", "c\n\r.png", "d\u202e.png", "Größe.png")
    SHOWN = (r"a\x1b[31m.png", r"b\udcff.png", r"c\n\r.png", r"d\u202e.png", "Größe.png")

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for number, name in enumerate(self.NAMES):
            write_picture(tmp_path / "good.png", seed=number).rename(tmp_path / name)
        return tmp_path

    def test_text(self, capsys, run_folder, folder):
        status, output, error = predict(capsys, folder, "--checkpoint", run_folder, "--top", 1)
        assert (status, error) == (0, "")
        names = output.splitlines()[::2]
        assert sorted(names) == sorted(f"{folder}/{name}" for name in self.SHOWN)

    def test_json(self, capsys, run_folder, folder):
        status, output, error = predict(capsys, folder, "--checkpoint", run_folder, "--json")
        assert (status, error) == (0, "")
        output.encode("ascii")
        found = [Path(result["picture"]) for result in json.loads(output)["results"]]
        assert sorted(found) == sorted(folder / name for name in self.NAMES)
        assert all(path.exists() for path in found)

    def test_damaged_ones_are_a_line_each(self, capsys, run_folder, folder):
        for name in self.NAMES[:-1]:
            (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        status, output, error = predict(capsys, folder, "--checkpoint", run_folder, "--top", 1)
        assert status == 1
        assert output.startswith(f"{folder}/Größe.png\n")
        lines = error.splitlines()
        assert len(lines) == 4
        for name in self.SHOWN[:-1]:
            assert sum(f"{folder}/{name}: not a picture" in line for line in lines) == 1

    def test_names_of_classes(self, capsys, tmp_path, pictures):
        classes = ("\x1b]0;title\x07", *CLASSES[1:])
        save_random(tmp_path / "run" / "model.safetensors", classes=classes)
        arguments = (pictures / "a.png", "--checkpoint", tmp_path / "run", "--top", 10)
        _, output, _ = predict(capsys, *arguments)
        assert r"\x1b]0;title\x07 " in output
        assert "\x1b" not in output

    @pytest.mark.slow
    def test_process(self, run_folder, tmp_path):
        """As a program, in a terminal that knows ASCII alone."""
        name = os.fsencode(tmp_path) + b"/\xff\xe9.png"
        write_picture(tmp_path / "good.png").rename(os.fsdecode(name))
        write_picture(tmp_path / "Größe.png")
        run = subprocess.run(
            [
                *(sys.executable, "-m", "threshnet_fast.cli", "predict"),
                *(os.fsencode(tmp_path), "--checkpoint", run_folder, "--top", "1"),
            ],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        )
        assert (run.returncode, run.stderr) == (0, b"")
        assert rb"/\udcff\udce9.png" in run.stdout
        assert rb"/Gr\xf6\xdfe.png" in run.stdout


class TestErrors:
    def fails(self, capsys, *arguments: object) -> str:
        status, output, error = predict(capsys, *arguments)
        assert (status, output) == (2, "")
        assert error.startswith("threshnet-fast predict: error: ")
        assert error.count("\n") == 1
        return error

    def test_missing(self, capsys, tmp_path, run_folder):
        error = self.fails(capsys, tmp_path / "none.png", "--checkpoint", run_folder)
        assert "none.png: there is no such file or folder" in error

    def test_empty_name(self, capsys, tmp_path, monkeypatch, run_folder, pictures):
        monkeypatch.chdir(pictures)
        error = self.fails(capsys, "", "--checkpoint", run_folder)
        assert "'': expected the name of a picture or of a folder" in error

    def test_name_that_cannot_be_looked_up(self, capsys, run_folder):
        error = self.fails(capsys, "x" * 300, "--checkpoint", run_folder)
        assert "File name too long" in error

    def test_answers_that_are_no_numbers(self, capsys, tmp_path, pictures):
        model = random_model("threshnet79", 10, 0)
        # Finite, as others are refused when they are read, and too large to be added up.
        with torch.no_grad():
            model.get_classifier().weight.fill_(3e38)
            model.get_classifier().weight[0].neg_()
            model.get_classifier().bias.zero_()
        path = tmp_path / "nan" / "model.safetensors"
        path.parent.mkdir()
        save_model(path, model, INFO)
        status, output, error = predict(capsys, pictures / "a.png", "--checkpoint", path)
        assert (status, output) == (1, "")
        assert "a.png: the network answers with NaN" in error
        status, output, error = predict(capsys, pictures, "--checkpoint", path, "--json")
        assert (status, error) == (1, "")
        assert all("NaN" in result["error"] for result in json.loads(output)["results"])

    def test_folder_without_pictures(self, capsys, tmp_path, run_folder):
        (tmp_path / "notes.txt").touch()
        error = self.fails(capsys, tmp_path, "--checkpoint", run_folder)
        assert "there is no picture in this folder" in error

    def test_no_checkpoint(self, capsys, tmp_path, pictures):
        error = self.fails(capsys, pictures, "--checkpoint", tmp_path)
        assert "there is no" in error
        assert "model.safetensors" in error

    def test_damaged_checkpoint(self, capsys, tmp_path, pictures, run_folder):
        for name in ("model.safetensors", "model.json"):
            (tmp_path / name).write_bytes((run_folder / name).read_bytes())
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        error = self.fails(capsys, pictures, "--checkpoint", tmp_path)
        assert "checksums differ" in error

    @pytest.mark.parametrize("option", ["--model", "--pretrained"])
    def test_checkpoint_and_model(self, capsys, pictures, run_folder, option):
        error = self.fails(capsys, pictures, "--checkpoint", run_folder, option, "threshnet79")
        assert option in error

    def test_unknown_model(self, capsys, pictures):
        error = self.fails(capsys, pictures, "--model", "threshnet78")
        assert "did you mean 'threshnet79'" in error

    def test_unknown_weights(self, capsys, pictures):
        error = self.fails(capsys, pictures, "--pretrained", "imagenet")
        assert "'imagenet'" in error

    def test_unknown_backend(self, capsys, pictures, run_folder):
        error = self.fails(capsys, pictures, "--checkpoint", run_folder, "--backend", "cpuu")
        assert "did you mean 'cpu'" in error

    @pytest.mark.parametrize("arguments", [["--top", "0"], ["--device", "tpu"]])
    def test_bad_values(self, capsys, pictures, arguments):
        assert main(["predict", str(pictures), *arguments]) == 2
        assert arguments[0] in capsys.readouterr().err
