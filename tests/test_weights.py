"""Malformed descriptions of models, and weights that are not finite: errors of one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from trained import CLASSES, INFO, save_random, write_picture

from threshnet_fast.cli import main
from threshnet_fast.models.create import load_model
from threshnet_fast.models.weights_file import ModelInfo, read_info, save_model

NAN, INFINITY = float("nan"), float("inf")

# What a key holds instead. All others stay as they are.
MALFORMED = {
    "model": [None, 3, [], {}, "\ud800", ["threshnet79"]],
    "classes": [
        *(None, 3, "abcdefghij", {}, [], [1] * 10, [None] * 10, [["a"]] * 10, [NAN] * 10),
        *(["\udc80"] * 10, dict.fromkeys(CLASSES, 1)),
    ],
    "mean": [
        *(None, 0.5, "0.5", {}, [], [0.5], [0.5] * 4, ["0.5"] * 3, [None] * 3, [True] * 3),
        *([NAN] * 3, [0.5, 0.5, INFINITY], [[0.5]] * 3, [10**400] * 3),
    ],
    "std": [
        *(None, 0.5, {}, [], [0.5], ["0.5"] * 3, [NAN] * 3, [INFINITY] * 3, [0] * 3, [-1] * 3),
        *([10**400] * 3, [False] * 3),
    ],
    "image_size": [
        *(None, 32, "3232", [], [32], [32, 32, 32], [32.5, 32], ["32", "32"], [0, 32], [-1, 32]),
        *([INFINITY, 32], [NAN, 32], [1e400, 32], [10**9, 10**9], [10**400, 1], [True, 32], {}),
    ],
    "source_size": [32, [], [32], [0, 0], [32.0, 32.0], [INFINITY] * 2, "ab", [10**12, 1], {}],
    "arguments": [
        *(None, 3, "num_classes", [], [["num_classes", 10]], {"num_classes": 10**9}),
        *({"num_classes": "10"}, {"num_classes": [10]}, {"num_classes": NAN}, {"num_classes": -1}),
        *({"num_classes": 10.5}, {"in_chans": 10**9}, {"in_chans": None}, {"in_chans": "3"}),
        *({"unknown": 1}, {"self": 1}, {"pretrained": True}, {"name": "x"}, {"drop_rate": 2}),
        *({"drop_rate": NAN}, {"drop_rate": 10**400}, {"drop_rate": []}, {"global_pool": []}),
        *({"global_pool": ""}, {"blocks": [10**9]}, {"": 1}, {"multiplier": 1e300}),
    ],
    "interpolation": [None, 3, [], "lanczos", "bilinear" * 10**5, {}],
    "crop_fraction": [None, "1", [], NAN, INFINITY, -INFINITY, 0, -1, 2, 10**400, True, {}],
    "dataset": [None, 3, [], {}],
    "recipe": [None, 3, "sgd", []],
    "epochs": [None, "3", 3.5, NAN, -1, [], True],
    "accuracy": ["0.5", NAN, INFINITY, [], {}, True, 10**400],
    "dtype": [None, "float8", 3, [], {}],
    "sha256": [None, 3, [], {}],
    "version": [None, 2, "1", [], {}, NAN, "x" * 10**5],
    "format": [None, 3, [], "other", {}],
}

DOCUMENTS = {
    "nothing": "",
    "no object": "[]",
    "a string": '"threshnet_fast model"',
    "no end": '{"format": ',
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": '{"format": "threshnet_fast model", "version": 1' + "0" * 10_000 + "}",
    "no UTF-8": b"\xff\xfe{}",
}


@pytest.fixture(autouse=True)
def quiet(one_thread) -> None:
    """One thread."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_random(path)
    return path


@pytest.fixture
def described(saved, tmp_path):
    """Function that writes another description beside the weights, which are linked."""

    def write(document: str | bytes) -> Path:
        path = tmp_path / "model.safetensors"
        if not path.exists():
            path.symlink_to(saved)
        data = document.encode() if isinstance(document, str) else document
        path.with_suffix(".json").write_bytes(data)
        return path

    return write


def assert_one_line(error: pytest.ExceptionInfo[ValueError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


class TestDescription:
    @pytest.mark.parametrize("key", MALFORMED)
    def test_malformed_values(self, saved, described, key):
        content = json.loads(saved.with_suffix(".json").read_text())
        for value in MALFORMED[key]:
            if key == "arguments" and isinstance(value, dict) and "num_classes" not in value:
                value = {"num_classes": 10, **value}
            path = described(json.dumps({**content, key: value}))
            with pytest.raises(ValueError, match=r"model\.(json|safetensors)") as error:
                load_model(path)
            assert_one_line(error)

    @pytest.mark.parametrize("key", ["model", "classes", "mean", "std", "image_size"])
    def test_missing_keys(self, saved, described, key):
        content = json.loads(saved.with_suffix(".json").read_text())
        del content[key]
        with pytest.raises(ValueError, match=f"{key} is missing"):
            read_info(described(json.dumps(content)))

    @pytest.mark.parametrize("name", DOCUMENTS)
    def test_malformed_documents(self, described, name):
        with pytest.raises(ValueError, match=r"model\.json") as error:
            read_info(described(DOCUMENTS[name]))
        assert_one_line(error)

    def test_a_key_twice(self, saved, described):
        text = saved.with_suffix(".json").read_text()
        with pytest.raises(ValueError, match="repeats a key"):
            read_info(described(text.replace("{", '{"model": "threshnet95",', 1)))

    def test_too_large(self, described):
        path = described("{}")
        with path.with_suffix(".json").open("r+b") as file:
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match="is larger than"):
            read_info(path)

    def test_what_is_written_is_read(self, saved):
        info = read_info(saved)
        assert ModelInfo.from_json({**info.to_json(), **info.extra}) == info

    def test_a_loss_of_nan_in_the_recipe_is_no_reason(self, saved, described):
        content = json.loads(saved.with_suffix(".json").read_text())
        path = described(json.dumps({**content, "recipe": {"loss": NAN}, "note": [INFINITY]}))
        assert load_model(path)[1].extra["note"] == [INFINITY]

    def test_not_written_either(self, tmp_path):
        for change in ({"mean": (NAN, 0, 0)}, {"std": (INFINITY, 1, 1)}, {"crop_fraction": NAN}):
            with pytest.raises(ValueError, match=next(iter(change))):
                save_model(tmp_path / "a.safetensors", {}, dataclasses.replace(INFO, **change))
        assert not list(tmp_path.iterdir())

    def test_predict_fails_in_one_line(self, saved, described, tmp_path, capsys):
        content = json.loads(saved.with_suffix(".json").read_text())
        picture = write_picture(tmp_path / "a.png")
        for document in (json.dumps({**content, "mean": [NAN] * 3}), DOCUMENTS["lists"]):
            path = described(document)
            assert main(["predict", str(picture), "--checkpoint", str(path)]) == 2
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.count("\n") == 1
            assert str(path.with_suffix(".json")) in captured.err


class TestWeights:
    def test_not_finite(self, tmp_path, capsys):
        picture = write_picture(tmp_path / "a.png")
        model = save_random(tmp_path / "run" / "model.safetensors")
        for value, name in (
            (NAN, "base.0.conv.weight"),
            (INFINITY, "base.1.norm.bias"),
            (-1.0, "base.1.norm.running_var"),
        ):
            state = {n: v.clone() for n, v in model.state_dict().items()}
            state[name].view(-1)[1] = value
            save_model(tmp_path / "run" / "model.safetensors", state, INFO)
            assert main(["predict", str(picture), "--checkpoint", str(tmp_path / "run")]) == 2
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.count("\n") == 1
            assert name in captured.err

    def test_of_other_types(self, tmp_path):
        model = save_random(tmp_path / "model.safetensors")
        for dtype in (torch.int32, torch.complex64, torch.bool):
            state = {n: v.clone() for n, v in model.state_dict().items()}
            state["base.0.conv.weight"] = state["base.0.conv.weight"].to(dtype)
            save_model(tmp_path / "model.safetensors", state, INFO)
            with pytest.raises(ValueError, match=f"base.0.conv.weight.*{dtype}") as error:
                load_model(tmp_path)
            assert_one_line(error)

    def test_of_another_network(self, tmp_path):
        state = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(1000))).state_dict()
        save_model(tmp_path / "model.safetensors", state, INFO)
        with pytest.raises(ValueError, match="does not fit threshnet79") as error:
            load_model(tmp_path)
        assert_one_line(error)
