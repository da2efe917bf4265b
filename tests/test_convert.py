"""``threshnet-fast convert``, and what else of the command line takes weights of other packages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from foreign import HarDNet
from torch import nn
from trained import save_random, write_picture

import threshnet_fast as tf
from threshnet_fast.cli import main
from threshnet_fast.models.checkpoints import create_from_checkpoint
from threshnet_fast.models.create import load_model
from threshnet_fast.models.weights_file import read_info


@pytest.fixture(autouse=True)
def quiet(one_thread) -> None:
    """One thread."""


def cifar_names(name: str) -> str:
    """A name of densenet.pytorch for one of this package."""
    name = re.sub(
        r"features\.denseblock(\d)\.denselayer(\d+)\.(?:(norm)|(conv))",
        lambda m: f"dense{m[1]}.{int(m[2]) - 1}.{'bn' if m[3] else 'conv'}",
        name,
    )
    name = re.sub(r"features\.transition(\d)\.norm", r"trans\1.bn1", name)
    name = re.sub(r"features\.transition(\d)\.conv", r"trans\1.conv1", name)
    for own, theirs in (
        ("features.conv0", "conv1"),
        ("features.norm5", "bn1"),
        ("classifier", "fc"),
    ):
        name = name.replace(own, theirs)
    return name


def old_names(name: str) -> str:
    return "module." + re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name)


@pytest.fixture
def checkpoint(tmp_path, randomised):
    """Function that writes a file of CIFAR weights as others name them; the file and the model."""

    def write(name="a.pth.tar", rename=cifar_names, classes=4, channels=3, **more):
        model = randomised(tf.DenseNetBC100(num_classes=classes, in_chans=channels)).eval()
        state = {rename(key): value for key, value in model.state_dict().items()}
        torch.save({"state_dict": {**state, **more}, "epoch": 7}, tmp_path / name)
        return tmp_path / name, model

    return write


MODEL = ("--model", "densenet_bc_100")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def one_line(result: tuple[int, str, str], message: str) -> None:
    status, output, error = result
    assert status in (1, 2)
    assert output == ""
    assert error.count("\n") == 1
    assert len(error) < 900
    assert re.search(message, error), error


class TestConvert:
    @pytest.mark.parametrize(("model", "rename"), [(MODEL, cifar_names), ((), old_names)])
    def test_same_network(self, capsys, tmp_path, checkpoint, model, rename):
        path, expected = checkpoint(rename=rename)
        output = tmp_path / "out.safetensors"
        status, text, error = run(capsys, "convert", path, output, *model)
        assert (status, error) == (0, "")
        for part in (str(path), "layout ", "'epoch'", f"Written: {output}", "4 classes"):
            assert part in text
        actual, info = load_model(output)
        for name, value in expected.state_dict().items():
            assert torch.equal(actual.state_dict()[name], value), name
        assert (info.model, info.classes) == ("densenet_bc_100", ("0", "1", "2", "3"))
        assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (info.image_size, info.crop_fraction) == ((32, 32), 1.0)
        assert info.extra["converted_from"] == path.name
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(actual(x), expected(x))

    def test_what_the_file_does_not_say(self, capsys, tmp_path, checkpoint):
        path, _ = checkpoint()
        names = tmp_path / "names.txt"
        names.write_text("\ufeffcat\nred fox\ndog \n\u00e9lan\n\n", encoding="utf-8")
        options = [*MODEL, "--classes", names, "--mean", "0.1,0.2,0.3", "--std", "0.5"]
        options += ["--image-size", "40x36", "--crop-fraction", "0.9"]
        assert run(capsys, "convert", path, tmp_path / "b.safetensors", *options)[0] == 0
        info = read_info(tmp_path / "b.safetensors")
        assert info.classes == ("cat", "red fox", "dog", "\u00e9lan")
        assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
        assert (info.image_size, info.crop_fraction) == ((40, 36), 0.9)

    def test_one_channel(self, capsys, tmp_path, checkpoint):
        path, _ = checkpoint(channels=1)
        output = tmp_path / "b.safetensors"
        assert run(capsys, "convert", path, output, *MODEL)[0] == 0
        info = read_info(output)
        assert info.arguments == {"num_classes": 4, "in_chans": 1}
        assert info.mean == pytest.approx([0.449])
        assert info.std == pytest.approx([0.226])
        status, text, _ = run(
            capsys, "predict", write_picture(tmp_path / "a.png"), "--checkpoint", output
        )
        assert status == 0
        assert text.count("%") == 4

    def test_radiographs(self, capsys, tmp_path, checkpoint):
        path, _ = checkpoint(rename=str, channels=1, op_threshs=torch.rand(4))
        output = tmp_path / "b.safetensors"
        status, text, _ = run(capsys, "convert", path, output, *MODEL)
        assert status == 0
        assert "'op_threshs': thresholds" in text
        info = read_info(output)
        # The package maps pixels from 0 to 255 to -1024 to 1024.
        pixel = 51
        assert (pixel / 255 - info.mean[0]) / info.std[0] == pytest.approx(
            (2 * pixel / 255 - 1) * 1024
        )

    def test_wrong_arguments(self, capsys, tmp_path, checkpoint):
        path, _ = checkpoint()
        output = tmp_path / "b.safetensors"
        (tmp_path / "names.txt").write_text("cat\ndog\n")
        (tmp_path / "control.txt").write_text("a\nb\nc\n\x1b[2J\n")
        (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
        for arguments, message in (
            ([tmp_path / "b.pth"], r"expected NAME\.safetensors"),
            ([tmp_path / "none" / "b.safetensors"], "there is no folder"),
            ([output, "--model", "densenet"], "unknown model 'densenet'"),
            ([output, "--model", "threshnet79"], "does not fit ThreshNet79"),
            (
                [output, *MODEL, "--classes", tmp_path / "names.txt"],
                "names 2 classes, the network has 4",
            ),
            ([output, *MODEL, "--classes", tmp_path / "control.txt"], "line 4"),
            ([output, *MODEL, "--classes", tmp_path / "bytes.txt"], "no text in UTF-8"),
            ([output, *MODEL, "--classes", tmp_path / "none.txt"], "No such file"),
            ([output, *MODEL, "--mean", "0.1,0.2"], "--mean has 2 values: expected 1 or 3"),
            ([output, "--mean", "a"], "expected numbers"),
            ([output, *MODEL, "--std", "0"], "std is"),
            ([output, *MODEL, "--mean", "nan"], "mean is"),
            ([output, *MODEL, "--crop-fraction", "2"], "crop_fraction is 2"),
        ):
            one_line(run(capsys, "convert", path, *arguments), message)
        assert not output.exists()
        assert not output.with_suffix(".json").exists()

    def test_wrong_files(self, capsys, tmp_path, checkpoint):
        output = tmp_path / "b.safetensors"
        one_line(run(capsys, "convert", tmp_path / "none.pth", output), "there is no .*none.pth")
        save_random(tmp_path / "run" / "model.safetensors")
        one_line(run(capsys, "convert", tmp_path / "run", output), "export reads")
        torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
        one_line(run(capsys, "convert", tmp_path / "code.pth", output), r"asks for torch\.nn")
        torch.save(HarDNet().state_dict(), tmp_path / "small.pth")
        one_line(run(capsys, "convert", tmp_path / "small.pth", output), "no registered model")
        state = tf.DenseNetBC100(num_classes=0).state_dict()
        torch.save(state, tmp_path / "features.pth")
        one_line(
            run(capsys, "convert", tmp_path / "features.pth", output, *MODEL), "has no classifier"
        )
        # A classifier of 2^40 outputs in a file of a few megabytes.
        state["classifier.weight"] = torch.zeros(1, 1).expand(1 << 40, 342)
        state["classifier.bias"] = torch.zeros(1).expand(1 << 40)
        torch.save(state, tmp_path / "large.pth")
        one_line(run(capsys, "convert", tmp_path / "large.pth", output, *MODEL), "has fewer values")
        assert not output.exists()

    def test_does_not_write_over_what_it_reads(self, capsys, tmp_path):
        from safetensors.torch import save_file

        path = tmp_path / "a.safetensors"
        save_file(tf.DenseNetBC100().state_dict(), path)
        before = path.read_bytes()
        one_line(run(capsys, "convert", path, path), "it is what is read")
        assert path.read_bytes() == before
        assert run(capsys, "convert", path, tmp_path / "b.safetensors", *MODEL)[0] == 0


class TestGuess:
    def test_every_registered_model(self):
        for name in ("densenet121", "hardnet39ds"):
            state = tf.create_model(name, num_classes=3, in_chans=2).state_dict()
            found, model, report = create_from_checkpoint(state)
            assert found == name
            assert (model.num_classes, model.in_chans) == (3, 2)
            assert not model.training
            assert not report.initialised

    def test_several(self, monkeypatch):
        from threshnet_fast.models import registry

        monkeypatch.setitem(registry._REGISTRY, "another", tf.DenseNetBC100)
        state = tf.DenseNetBC100().state_dict()
        with pytest.raises(ValueError, match="another, densenet_bc_100: say which"):
            create_from_checkpoint(state)
        assert create_from_checkpoint(state, "another")[0] == "another"


class TestOtherCommands:
    def test_predict(self, capsys, tmp_path, checkpoint):
        path, _ = checkpoint("a.pt")
        picture = write_picture(tmp_path / "a.png")
        status, output, error = run(
            capsys, "predict", picture, "--checkpoint", path, "--json", *MODEL
        )
        assert status == 0
        assert error.count("\n") == 1
        assert "assumed: mean 0.485" in error
        found = json.loads(output)
        assert (found["model"], found["classes"]) == ("densenet_bc_100", ["0", "1", "2", "3"])
        converted = tmp_path / "b.safetensors"
        assert run(capsys, "convert", path, converted, *MODEL)[0] == 0
        status, output, error = run(capsys, "predict", picture, "--checkpoint", converted, "--json")
        assert (status, error) == (0, "")
        assert json.loads(output)["results"] == found["results"]

    def test_safetensors_without_description(self, capsys, tmp_path):
        save_random(tmp_path / "a.safetensors")
        (tmp_path / "a.json").unlink()
        picture = write_picture(tmp_path / "a.png")
        status, output, _ = run(
            *(capsys, "predict", picture, "--checkpoint", tmp_path / "a.safetensors"),
            *("--model", "threshnet79"),
        )
        assert status == 0
        assert output.count("%") == 5

    def test_export(self, capsys, tmp_path, checkpoint):
        path, model = checkpoint("a.pth", old_names)
        output = tmp_path / "half.safetensors"
        status, text, error = run(capsys, "export", path, output, *MODEL, "--license", "MIT")
        assert status == 0
        assert text.startswith(f"Written: {output}")
        assert "assumed" in error
        half, info = load_model(output)
        assert (info.dtype, info.extra["license"]) == ("float16", "MIT")
        for name, value in model.state_dict().items():
            expected = value.half().float() if value.is_floating_point() else value
            assert torch.equal(half.state_dict()[name], expected), name

    def test_wrong_arguments(self, capsys, tmp_path, checkpoint):
        path, _ = checkpoint("a.pth")
        picture = write_picture(tmp_path / "a.png")
        save_random(tmp_path / "model.safetensors")
        predict = ("predict", picture, "--checkpoint")
        for arguments, message in (
            ((*predict, path, "--model", "threshnet95"), "does not fit ThreshNet95"),
            ((*predict, path, "--model", "none"), "unknown model"),
            ((*predict, path, "--pretrained", "cifar10"), "--pretrained"),
            ((*predict, tmp_path, "--model", "threshnet79"), "--model"),
            ((*predict, tmp_path / "none.pth"), "there is no"),
            ((*predict, tmp_path / "none.safetensors"), "there is no"),
            (("export", path, tmp_path / "b.safetensors", "--model", "none"), "unknown model"),
            (("export", tmp_path, tmp_path / "b.safetensors", "--model", "threshnet79"), "--model"),
            (("export", tmp_path / "none.pth", tmp_path / "b.safetensors"), "there is no"),
        ):
            one_line(run(capsys, *arguments), message)

    def test_not_finite(self, capsys, tmp_path, checkpoint):
        path, model = checkpoint("a.pth", str)
        state = model.state_dict()
        state["features.conv0.weight"][0] = float("nan")
        torch.save(state, path)
        picture = write_picture(tmp_path / "a.png")
        result = run(capsys, "predict", picture, "--checkpoint", path, *MODEL)
        one_line(result, r"features\.conv0\.weight holds NaN")


def test_help_names_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["--help"]) == 0
    assert "convert" in capsys.readouterr().out
