"""``threshnet-fast export --onnx``: the file, what it says of itself, and what refuses it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import threshnet_fast as tf
from threshnet_fast.cli import main
from threshnet_fast.models import onnx_file
from threshnet_fast.models.weights_file import ModelInfo, save_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

CLASSES = ("aeroplane", "Müller", "c")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as training leaves it, and its network."""
    torch.manual_seed(0)
    model = tf.create_model("hardnet39ds", num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    info = ModelInfo("hardnet39ds", CLASSES, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (64, 96),
                     {"num_classes": 3})  # fmt: skip
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_model(path, model, info, torch.float32)
    return path, model


@pytest.mark.parametrize("opset", [None, 18, onnx.defs.onnx_opset_version()])
def test_any_batch_in_onnx_runtime(trained, tmp_path, capsys, opset):
    path, model = trained
    output = tmp_path / "net.onnx"
    chosen = [] if opset is None else ["--opset", str(opset)]
    assert main(["export", str(path), str(output), "--onnx", *chosen]) == 0
    assert f"operator set {opset or 17}" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]
    proto = onnx.load(output)
    onnx.checker.check_model(proto, full_check=True)
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", opset or 17)]
    assert [each.name for each in proto.graph.input] == ["input"]
    assert [each.name for each in proto.graph.output] == ["output"]
    assert "BatchNormalization" not in {each.op_type for each in proto.graph.node}
    said = {each.key: each.value for each in proto.metadata_props}
    assert json.loads(said["classes"]) == list(CLASSES)
    assert json.loads(said["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(said["std"]) == [0.5, 0.6, 0.7]
    assert json.loads(said["image_size"]) == [64, 96]
    assert said["model"] == "hardnet39ds"
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(output))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 96)
        with torch.inference_mode():
            expected = model(x).numpy()
        (actual,) = session.run(["output"], {"input": x.numpy()})
        np.testing.assert_allclose(actual, expected, 1e-4, 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("net.safetensors", "--onnx"), "expected NAME.onnx"),
        (("net.onnx",), "expected NAME.safetensors"),
        (("net.onnx", "--onnx", "--opset", "16"), "--opset is 16: expected 17 to"),
        (("net.onnx", "--onnx", "--opset", "99"), "--opset is 99: expected 17 to"),
        (("net.safetensors", "--opset", "17"), "add --onnx"),
        (("net.onnx", "--onnx", "--dtype", "float16"), "not with --onnx"),
    ],
)
def test_wrong_arguments(trained, tmp_path, capsys, arguments, expected):
    name, *rest = arguments
    assert main(["export", str(trained[0]), str(tmp_path / name), *rest]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_the_extra_where_a_package_is_missing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(trained[0]), str(tmp_path / "net.onnx"), "--onnx"]) == 1
    assert "pip install 'threshnet_fast[onnx]'" in capsys.readouterr().err


def test_a_file_that_differs_is_not_kept(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    write = onnx_file.write_onnx

    def damaged(path, *args, **kwargs):
        write(path, *args, **kwargs)
        proto = onnx.load(path)
        weight = proto.graph.initializer[0]
        values = onnx.numpy_helper.to_array(weight) + 1
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        path.write_bytes(proto.SerializeToString())

    monkeypatch.setattr(onnx_file, "write_onnx", damaged)
    assert main(["export", str(trained[0]), str(tmp_path / "net.onnx"), "--onnx"]) == 1
    assert "differs from the network" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_refuses_training(trained, tmp_path):
    model = tf.create_model("hardnet39ds", num_classes=3).train()
    info = ModelInfo("hardnet39ds", CLASSES, (0.0,) * 3, (1.0,) * 3, (64, 64))
    with pytest.raises(ValueError, match="training mode"):
        onnx_file.save_onnx(tmp_path / "a.onnx", model, info)
