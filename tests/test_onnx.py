"""ONNX files: read as modules of PyTorch, whoever wrote them, and refused where hostile."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import threshnet_fast as tf

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from threshnet_fast.graph.onnx import load_onnx  # noqa: E402

NEWEST = min(onnx.defs.onnx_opset_version(), 26)
OPSETS = (11, 13, 17, NEWEST)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    names = [each if each != "-" else "" for each in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), name=f"node.{outputs}", **attributes)


def model_of(
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    opset: int,
    shape: Any = ("N", 4, 9, 11),
    outputs: str = "y",
) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return model


def expected_of(model: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    feed = dict(zip((each.name for each in model.graph.input), inputs, strict=True))
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(model).run(None, feed)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, feed)


def check(tmp_path: Any, model: Any, *inputs: np.ndarray, tolerance: float = 1e-5) -> Any:
    """The module of a file, which computes what the file says."""
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    module = load_onnx(path)
    actual = module(*(torch.from_numpy(each) for each in inputs))
    results = actual if isinstance(actual, tuple) else (actual,)
    for result, expected in zip(results, expected_of(model, *inputs), strict=True):
        assert tuple(result.shape) == expected.shape
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(result.detach().numpy(), expected, 0, tolerance * scale)
    return module


def called(module: Any) -> list[Any]:
    """What a module calls, in order: classes of submodules, functions, names of methods."""
    return [
        type(module.get_submodule(each.target)) if each.op == "call_module" else each.target
        for each in module.graph.nodes
        if each.op.startswith("call")
    ]


W = {"w": array(6, 4, 3, 3), "b": array(6)}
I64 = lambda *values: np.array(values, np.int64)  # noqa: E731
F32 = lambda *values: np.array(values, np.float32)  # noqa: E731
ONE = {"c": np.array(0.5, np.float32)}

# Name: kind, inputs, weights, attributes, oldest operator set.
CASES: dict[str, tuple[str, str, dict[str, np.ndarray], dict[str, Any], int]] = {
    "conv": ("Conv", "x w b", W, {"pads": [1, 1, 1, 1], "strides": [2, 1]}, 1),
    "conv_dilated": ("Conv", "x w", W, {"dilations": [2, 2]}, 1),
    "conv_uneven": ("Conv", "x w b", W, {"pads": [0, 1, 1, 2], "strides": [2, 2]}, 1),
    "conv_groups": ("Conv", "x w", {"w": array(4, 1, 3, 3)}, {"group": 4}, 1),
    "conv_upper": ("Conv", "x w", W, {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, 1),
    "conv_lower": ("Conv", "x w", W, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, 1),
    "conv_valid": ("Conv", "x w", W, {"auto_pad": "VALID"}, 1),
    "transposed": ("ConvTranspose", "x w", {"w": array(4, 3, 3, 3)},
                   {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, 1),
    "transposed_uneven": ("ConvTranspose", "x w b", {"w": array(4, 3, 3, 3), "b": array(3)},
                          {"strides": [2, 2], "pads": [0, 1, 1, 0]}, 1),
    "batch_norm": ("BatchNormalization", "x s t m v", {"s": array(4), "t": array(4, seed=1),
                   "m": array(4, seed=2), "v": np.abs(array(4, seed=3)) + 0.1},
                   {"epsilon": 1e-3}, 1),
    "relu": ("Relu", "x", {}, {}, 1),
    "leaky_relu": ("LeakyRelu", "x", {}, {"alpha": 0.2}, 1),
    "prelu": ("PRelu", "x s", {"s": array(4, 1, 1)}, {}, 1),
    "prelu_maps": ("PRelu", "x s", {"s": array(9, 11)}, {}, 1),
    "clip": ("Clip", "x a c", {"a": np.float32(-0.3), **ONE}, {}, 11),
    "clip_below": ("Clip", "x a", {"a": np.float32(0)}, {}, 11),
    "relu6": ("Clip", "x a c", {"a": np.float32(0), "c": np.float32(6)}, {}, 11),
    "sigmoid": ("Sigmoid", "x", {}, {}, 1),
    "hard_sigmoid": ("HardSigmoid", "x", {}, {"alpha": 0.3, "beta": 0.4}, 1),
    "hard_swish": ("HardSwish", "x", {}, {}, 14),
    "mish": ("Mish", "x", {}, {}, 18),
    "elu": ("Elu", "x", {}, {"alpha": 0.7}, 1),
    "selu": ("Selu", "x", {}, {}, 1),
    "softplus": ("Softplus", "x", {}, {}, 1),
    "tanh": ("Tanh", "x", {}, {}, 1),
    "erf": ("Erf", "x", {}, {}, 9),
    "gelu": ("Gelu", "x", {}, {"approximate": "tanh"}, 20),
    "softmax": ("Softmax", "x", {}, {}, 1),
    "softmax_channels": ("Softmax", "x", {}, {"axis": 1}, 1),
    "log_softmax": ("LogSoftmax", "x", {}, {"axis": 2}, 1),
    "concat": ("Concat", "x x", {}, {"axis": 1}, 1),
    "concat_last": ("Concat", "x x", {}, {"axis": -1}, 1),
    "add": ("Add", "x c", {"c": array(4, 1, 1)}, {}, 1),
    "sub": ("Sub", "x c", {"c": array(4, 1, 1)}, {}, 1),
    "sub_from": ("Sub", "c x", {"c": array(4, 1, 1)}, {}, 1),
    "mul": ("Mul", "x c", {"c": array(1, 4, 1, 1)}, {}, 1),
    "mul_number": ("Mul", "c x", ONE, {}, 1),
    "div": ("Div", "x c", {"c": array(4, 1, 1)}, {}, 1),
    "pow": ("Pow", "x c", {"c": np.float32(2)}, {}, 12),
    "neg": ("Neg", "x", {}, {}, 1),
    "abs": ("Abs", "x", {}, {}, 1),
    "exp": ("Exp", "x", {}, {}, 1),
    "min": ("Min", "x c", ONE, {}, 8),
    "max": ("Max", "x c x", ONE, {}, 8),
    "sum": ("Sum", "x x c", ONE, {}, 8),
    "mean": ("Mean", "x x c", ONE, {}, 8),
    "max_pool": ("MaxPool", "x", {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                 "pads": [1, 1, 1, 1]}, 8),
    "max_pool_ceil": ("MaxPool", "x", {}, {"kernel_shape": [2, 2], "strides": [2, 2],
                      "ceil_mode": 1}, 10),
    "max_pool_uneven": ("MaxPool", "x", {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                        "pads": [0, 0, 1, 1]}, 8),
    "max_pool_uneven_ceil": ("MaxPool", "x", {}, {"kernel_shape": [3, 2], "strides": [2, 3],
                             "pads": [0, 0, 1, 1], "ceil_mode": 1}, 10),
    "max_pool_same": ("MaxPool", "x", {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                      "auto_pad": "SAME_UPPER"}, 8),
    "average_pool": ("AveragePool", "x", {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                     "pads": [1, 1, 1, 1]}, 7),
    "average_pool_padding": ("AveragePool", "x", {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                             "pads": [1, 1, 1, 1], "count_include_pad": 1}, 7),
    "average_pool_uneven": ("AveragePool", "x", {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                            "pads": [0, 1, 1, 0]}, 7),
    "average_pool_uneven_padding": ("AveragePool", "x", {}, {"kernel_shape": [3, 3],
                                    "pads": [0, 1, 1, 0], "count_include_pad": 1}, 7),
    "average_pool_ceil": ("AveragePool", "x", {}, {"kernel_shape": [2, 2], "strides": [2, 2],
                          "ceil_mode": 1}, 10),
    "average_pool_same": ("AveragePool", "x", {}, {"kernel_shape": [2, 2], "strides": [2, 2],
                          "auto_pad": "SAME_LOWER"}, 7),
    "global_average": ("GlobalAveragePool", "x", {}, {}, 1),
    "global_max": ("GlobalMaxPool", "x", {}, {}, 1),
    "flatten": ("Flatten", "x", {}, {}, 9),
    "flatten_2": ("Flatten", "x", {}, {"axis": 2}, 9),
    "flatten_0": ("Flatten", "x", {}, {"axis": 0}, 9),
    "flatten_last": ("Flatten", "x", {}, {"axis": 4}, 9),
    "reshape": ("Reshape", "x c", {"c": I64(0, -1)}, {}, 5),
    "reshape_batch": ("Reshape", "x c", {"c": I64(-1, 2, 2, 99)}, {}, 5),
    "transpose": ("Transpose", "x", {}, {"perm": [0, 2, 3, 1]}, 1),
    "transpose_all": ("Transpose", "x", {}, {}, 1),
    "identity": ("Identity", "x", {}, {}, 1),
    "dropout": ("Dropout", "x", {}, {}, 12),
    "pad": ("Pad", "x c v", {"c": I64(0, 0, 1, 2, 0, 0, 0, 3), "v": np.float32(1.5)}, {}, 11),
    "pad_channels": ("Pad", "x c", {"c": I64(0, 2, 0, 0, 0, 1, 0, 0)}, {}, 11),
    "pad_reflect": ("Pad", "x c", {"c": I64(0, 0, 1, 2, 0, 0, 0, 3)}, {"mode": "reflect"}, 11),
    "pad_edge": ("Pad", "x c", {"c": I64(0, 0, 1, 2, 0, 0, 0, 3)}, {"mode": "edge"}, 11),
    "pad_axes": ("Pad", "x c - a", {"c": I64(1, 2, 0, 3), "a": I64(3, -2)}, {}, 18),
    "slice": ("Slice", "x s e", {"s": I64(0, 1), "e": I64(1 << 40, 3)}, {}, 10),
    "slice_steps": ("Slice", "x s e a p", {"s": I64(-1, 1), "e": I64(-(1 << 40), 9),
                    "a": I64(1, 3), "p": I64(-1, 2)}, {}, 10),
    "gather": ("Gather", "x c", {"c": I64(2, -1)}, {"axis": 1}, 1),
    "gather_one": ("Gather", "x c", {"c": np.array(-1, np.int64)}, {"axis": 2}, 1),
    "instance_norm": ("InstanceNormalization", "x s t", {"s": array(4), "t": array(4, seed=1)},
                      {}, 6),
    "layer_norm": ("LayerNormalization", "x s t", {"s": array(11), "t": array(11, seed=1)}, {}, 17),
    "depth_to_space": ("DepthToSpace", "x", {}, {"blocksize": 2}, 11),
    "depth_to_space_crd": ("DepthToSpace", "x", {}, {"blocksize": 2, "mode": "CRD"}, 11),
    "matmul": ("MatMul", "x c", {"c": array(11, 5)}, {}, 1),
    "tile": ("Tile", "x c", {"c": I64(1, 2, 1, 3)}, {}, 6),
    "expand": ("Expand", "x c", {"c": I64(2, 1, 1, 1, 1)}, {}, 8),
    "upsample": ("Resize", "x r s", {"r": F32(), "s": F32(1, 1, 2, 2)},
                 {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
                  "nearest_mode": "floor"}, 11),
}  # fmt: skip


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", CASES)
def test_operators(tmp_path, name, opset):
    kind, inputs, weights, attributes, oldest = CASES[name]
    if opset < oldest:
        pytest.skip(f"since operator set {oldest}")
    model = model_of([node(kind, inputs, **attributes)], weights, opset)
    check(tmp_path, model, array(3, 4, 9, 11))


RESIZE = [
    (mode, kind, rounding)
    for mode in ("nearest", "linear", "cubic")
    for kind in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    if mode == "nearest" or rounding == "floor"
]


@pytest.mark.parametrize("scale", [(2.0, 2.0), (3.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize(("mode", "kind", "rounding"), RESIZE)
def test_resizing(tmp_path, mode, kind, rounding, scale):
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": kind,
        "nearest_mode": rounding,
    }
    shape, x = ("N", 2, 6, 10), array(2, 2, 6, 10)
    scales = {"c": F32(1, 1, *scale), "r": F32()}
    for opset in (11, 13, 19):
        model = model_of([node("Resize", "x r c", **attributes)], scales, opset, (2, *shape[1:]))
        check(tmp_path, model, x)
    sizes = {"c": I64(2, 2, *(int(side * s) for side, s in zip((6, 10), scale, strict=True)))}
    model = model_of([node("Resize", "x - - c", **attributes)], sizes, 13, (2, *shape[1:]))
    check(tmp_path, model, x)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])
def test_reductions(tmp_path, kind, keep, opset):
    by_input = opset >= (13 if kind == "ReduceSum" else 18)
    made = (
        node(kind, "x a", keepdims=keep)
        if by_input
        else node(kind, "x", axes=[2, -1], keepdims=keep)
    )
    check(tmp_path, model_of([made], {"a": I64(2, -1)} if by_input else {}, opset),
          array(3, 4, 9, 11))  # fmt: skip


@pytest.mark.parametrize("opset", OPSETS)
def test_squeezing_and_splitting(tmp_path, opset):
    old = opset < 13
    nodes = [
        node("GlobalAveragePool", "x", "p"),
        node("Squeeze", "p", "q", axes=[2, 3]) if old else node("Squeeze", "p a", "q"),
        node("Unsqueeze", "q", "r", axes=[2, 3]) if old else node("Unsqueeze", "q a", "r"),
        node("Split", "x", "s t", axis=1, split=[1, 3])
        if old
        else node("Split", "x n", "s t", axis=1),
        node("Mul", "x r", "y"),
    ]
    weights = {} if old else {"a": I64(2, 3), "n": I64(1, 3)}
    check(tmp_path, model_of(nodes, weights, opset, outputs="q r s t y"), array(3, 4, 9, 11))


def test_gemm_becomes_a_linear_layer(tmp_path):
    weights = {"w": array(5, 6), "b": array(5)}
    nodes = [node("Gemm", "x w b", transB=1, alpha=0.5, beta=2.0)]
    module = check(tmp_path, model_of(nodes, weights, 13, ("N", 6)), array(3, 6))
    assert called(module) == [nn.Linear]
    nodes = [node("MatMul", "x w", "p"), node("Add", "b p")]
    weights = {"w": array(6, 5), "b": array(5)}
    module = check(tmp_path, model_of(nodes, weights, 13, ("N", 6)), array(3, 6))
    assert called(module) == [nn.Linear]


def test_shapes_are_computed_as_numbers(tmp_path):
    """What exporters write for ``x.view(x.size(0), -1)`` and for a size of another map."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Unsqueeze", "n", "n1", axes=[0]),
        node("Concat", "n1 rest", "to", axis=0),
        node("Reshape", "x to"),
    ]
    weights = {"zero": np.array(0, np.int64), "rest": I64(-1)}
    module = check(tmp_path, model_of(nodes, weights, 11), array(3, 4, 9, 11))
    assert called(module) == [torch.flatten]
    nodes = [
        node("MaxPool", "x", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", "x", "s"),
        node("Slice", "s two four", "hw"),
        node("Shape", "p", "sp"),
        node("Slice", "sp zero two", "nc"),
        node("Concat", "nc hw", "to", axis=0),
        node("Resize", "p - - to", coordinate_transformation_mode="asymmetric",
             mode="nearest", nearest_mode="floor"),
    ]  # fmt: skip
    weights = {"zero": I64(0), "two": I64(2), "four": I64(4)}
    module = check(tmp_path, model_of(nodes, weights, 13, ("N", 4, "H", "W")), array(2, 4, 9, 11))
    assert F.interpolate in called(module)


def test_channels_last_files_lose_their_transpositions(tmp_path):
    """As tf2onnx writes them: NHWC, with the transpositions around every layer."""
    to_nchw, to_nhwc = [0, 3, 1, 2], [0, 2, 3, 1]
    nodes = [
        node("Transpose", "x", "a", perm=to_nchw),
        node("Conv", "a w", "c1", pads=[1, 1, 1, 1]),
        node("Transpose", "c1", "c2", perm=to_nhwc),
        node("Mul", "c2 scale", "c3"),
        node("Add", "c3 shift", "c4"),
        node("Relu", "c4", "c5"),
        node("Transpose", "c5", "d1", perm=to_nchw),
        node("Conv", "d1 w2 b2", "d2"),
        node("Transpose", "d2", "d3", perm=to_nhwc),
        node("Concat", "c5 d3", "e", axis=-1),
        node("Pad", "e pads", "e1"),
        node("Transpose", "e1", "f1", perm=to_nchw),
        node("AveragePool", "f1", "f2", kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", "f2", "f3", perm=to_nhwc),
        node("ReduceMean", "f3", "g", axes=[1, 2], keepdims=0),
        node("MatMul", "g dense", "h"),
        node("Add", "h bias", "i"),
        node("Softmax", "i", "y", axis=-1),
    ]
    weights = {
        "w": array(6, 3, 3, 3),
        "scale": array(6, seed=1),
        "shift": array(1, 1, 1, 6, seed=2),
        "w2": array(5, 6, 1, 1, seed=3),
        "b2": array(5),
        "pads": I64(0, 1, 0, 0, 0, 1, 0, 0),
        "dense": array(11, 7),
        "bias": array(7),
    }
    model = model_of(nodes, weights, 13, ("N", 8, 10, 3))
    module = check(tmp_path, model, array(2, 8, 10, 3))
    assert called(module) == [
        torch.permute, nn.Conv2d, nn.BatchNorm2d, F.relu, nn.Conv2d, torch.cat, F.pad,
        nn.AvgPool2d, torch.mean, nn.Linear, F.softmax,
    ]  # fmt: skip


def test_files_of_paddle(tmp_path):
    """Constants as nodes, chains of Identity, names with dots and signs."""
    weights = {"conv2d_0.w_0": array(6, 4, 3, 3), "bn@mean": array(6), "bn.s": array(6, seed=1)}
    weights["bn@var"] = np.abs(array(6, seed=2)) + 0.5
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in weights.items()
    ]
    nodes += [
        helper.make_node("Identity", ["conv2d_0.w_0"], ["p2o.id.0"]),
        helper.make_node("Identity", ["p2o.id.0"], ["p2o.id.1"]),
        helper.make_node("Conv", ["x", "p2o.id.1"], ["conv2d_0.tmp_0"], pads=[1, 1, 1, 1]),
        helper.make_node(
            "BatchNormalization",
            ["conv2d_0.tmp_0", "bn.s", "bn.s", "bn@mean", "bn@var"],
            ["batch_norm_0.tmp_2@GRAD"],
        ),
        helper.make_node("Relu", ["batch_norm_0.tmp_2@GRAD"], ["relu.0"]),
        helper.make_node("Identity", ["relu.0"], ["y"]),
    ]
    for opset in (11, 16):
        module = check(tmp_path, model_of(nodes, {}, opset), array(2, 4, 9, 11))
        assert called(module) == [nn.Conv2d, nn.BatchNorm2d, F.relu]


class DenseNetAsPublished(nn.Module):
    """Layers that concatenate what they are given, as in torchvision, small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(8 + 4 * i), nn.ReLU(True), nn.Conv2d(8 + 4 * i, 16, 1, bias=False),
                nn.BatchNorm2d(16), nn.ReLU(True), nn.Conv2d(16, 4, 3, 1, 1, bias=False),
            )
            for i in range(3)
        )  # fmt: skip
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.norm = nn.BatchNorm2d(10)
        self.classifier = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.stem(x)]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        x = F.relu(self.norm(self.transition(torch.cat(maps, 1))), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "as published": DenseNetAsPublished(),
        "densenet": tf.DenseNet(blocks=(2, 3), growth_rate=8, num_classes=10),
        "hardnet": tf.create_model("hardnet39ds", num_classes=10),
    }


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", networks())
@pytest.mark.filterwarnings("ignore")
def test_networks_exported_by_torch(tmp_path, name, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript")
    network = networks()[name].eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    path = tmp_path / "net.onnx"
    dynamic: Any = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "opset_version": 18}
        if dynamo
        else {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"], "opset_version": 13}
    )
    with tf.use_backend("reference"):
        torch.onnx.export(network, (x,), path, dynamo=dynamo, verbose=False, **dynamic)
        expected = network(x)
    module = load_onnx(path)
    actual = module(x)
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    kinds = set(called(module))
    assert kinds <= {
        nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear,
        F.relu, F.relu6, torch.cat, torch.flatten, torch.mean,
    }  # fmt: skip
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(x), actual)
    assert torch.equal(copy.deepcopy(module)(x[:1]), module(x[:1]))
    assert sum(p.numel() for p in module.parameters()) > 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_types(tmp_path, dtype):
    numbers = {torch.float64: 11, torch.float16: 10, torch.bfloat16: 16}
    weight = torch.randn(2, 4, 1, 1).to(dtype)
    tensor = helper.make_tensor(
        "w", numbers[dtype], (2, 4, 1, 1), weight.view(torch.uint8).numpy().tobytes(), raw=True
    )
    kind = numbers[dtype]
    graph = helper.make_graph(
        [node("Conv", "x w")], "g",
        [helper.make_tensor_value_info("x", kind, (1, 4, 3, 3))],
        [helper.make_tensor_value_info("y", kind, None)], [tensor],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)]).SerializeToString()
    )
    x = torch.randn(1, 4, 3, 3).to(dtype)
    assert torch.equal(load_onnx(path)(x), F.conv2d(x, weight))


def test_a_bias_is_not_added_for_other_readers(tmp_path):
    """The result of the convolution is read under two names, with the bias and without."""
    nodes = [
        node("Conv", "x w", "p"),
        node("Identity", "p", "q"),
        node("Add", "q b", "r"),
        node("Mul", "p r"),
    ]
    weights = {"w": array(6, 4, 3, 3), "b": array(6, 1, 1)}
    check(tmp_path, model_of(nodes, weights, 13), array(2, 4, 9, 11))


@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_a_constant_for_each_channel_behind_other_layers(tmp_path, kind):
    pool = node("GlobalAveragePool", "x", "p")
    check(
        tmp_path, model_of([pool, node(kind, "p c")], {"c": array(4, 1, 1)}, 13), array(2, 4, 9, 11)
    )
    # Behind a linear layer, whose bias is for the last dimension, not for the channels.
    weights = {"w": array(4, 4), "c": array(4, 1, 1)}
    nodes = [node("MatMul", "x w", "p"), node(kind, "p c")]
    check(tmp_path, model_of(nodes, weights, 13, ("N", 4, 4, 4)), array(2, 4, 4, 4))


def test_zeros_before_a_convolution_become_its_padding(tmp_path):
    nodes = [node("Pad", "x pads", "p"), node("Conv", "p w", "y", strides=[2, 2])]
    weights = {"pads": I64(0, 0, 1, 1, 0, 0, 1, 1), "w": array(6, 4, 3, 3)}
    module = check(tmp_path, model_of(nodes, weights, 13), array(2, 4, 9, 11))
    assert called(module) == [nn.Conv2d]


@pytest.mark.parametrize("size", [(9, 11), (8, 7), (10, 12)])
def test_windows_of_any_size(tmp_path, size):
    """Paddings that depend on a size that the file leaves open."""
    nodes = [
        node("Conv", "x w", "p", auto_pad="SAME_UPPER", strides=[2, 3]),
        node("MaxPool", "p", "q", kernel_shape=[3, 2], strides=[2, 2], pads=[0, 0, 1, 1],
             ceil_mode=1),
        node("AveragePool", "q", auto_pad="SAME_LOWER", kernel_shape=[2, 2], strides=[2, 1]),
    ]  # fmt: skip
    model = model_of(nodes, {"w": W["w"]}, 13, ("N", 4, "H", "W"))
    check(tmp_path, model, array(2, 4, *size))


# Hostile files


def conv_model(**changes: Any) -> Any:
    return model_of([node("Conv", "x w b", **changes)], W, 17)


def refuse(tmp_path: Any, model: Any, expected: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(ValueError, match=expected) as caught:
        load_onnx(path)
    assert "net.onnx" in str(caught.value)


def external(tmp_path: Any, **entries: str) -> Any:
    """A model whose weight lies in another file."""
    model = conv_model()
    tensor = model.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(b"12345678" + tensor.raw_data)
    entries = {"location": "w.bin", "offset": "8", "length": str(len(tensor.raw_data)), **entries}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def test_external_data(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(external(tmp_path).SerializeToString())
    x = torch.randn(1, 4, 5, 5)
    expected = F.conv2d(x, torch.from_numpy(W["w"]), torch.from_numpy(W["b"]))
    torch.testing.assert_close(load_onnx(path)(x), expected)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"location": "../w.bin"}, "expected a file in the model's folder"),
        ({"location": "a/../../w.bin"}, "expected a file in the model's folder"),
        ({"location": "/etc/passwd"}, "expected a file in the model's folder"),
        ({"location": ""}, "expected a file in the model's folder"),
        ({"location": "none.bin"}, "cannot be read"),
        ({"location": "link.bin"}, "leads out of the model's folder"),
        ({"location": "pipe"}, "or is no file"),
        ({"offset": "9"}, "which has"),
        ({"offset": "-1"}, "offset is '-1'"),
        ({"offset": "9" * 30}, "offset is"),
        ({"length": "4"}, "has 4 bytes of data"),
    ],
)
def test_external_data_outside(tmp_path, entries, expected):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(b"0" * 1000)
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    os.mkfifo(folder / "pipe")
    refuse(folder, external(folder, **entries), expected)


def changed(change: Any) -> Any:
    model = conv_model()
    change(model)
    return model


def _two_outputs(model: Any) -> None:
    model.graph.node.append(node("Relu", "x"))


def _unsorted(model: Any) -> None:
    model.graph.node.insert(0, node("Relu", "y", "z"))


def _cycle(model: Any) -> None:
    del model.graph.node[:]
    model.graph.node.extend([node("Add", "x z", "y"), node("Relu", "y", "z")])


def _negative(model: Any) -> None:
    model.graph.initializer[0].dims[0] = -6


def _huge(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 1 << 40


def _short(model: Any) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def _strings(model: Any) -> None:
    del model.graph.initializer[1]
    model.graph.initializer.append(helper.make_tensor("b", TensorProto.STRING, [1], [b"a"]))


def _twice(model: Any) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _nodes(*nodes: Any, **weights: np.ndarray) -> Any:
    return model_of(list(nodes), weights, 17)


def _loop() -> Any:
    body = helper.make_graph([], "b", [], [])
    return _nodes(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))


def _recursive() -> Any:
    model = _nodes(helper.make_node("f", ["x"], ["y"], domain="mine"))
    inside = [helper.make_node("f", ["a"], ["b"], domain="mine")]
    imports = [helper.make_opsetid("mine", 1)]
    model.functions.append(helper.make_function("mine", "f", ["a"], ["b"], inside, imports))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return model


def _doubling() -> Any:
    model = _nodes(helper.make_node("f40", ["x"], ["y"], domain="mine"))
    imports = [helper.make_opsetid("mine", 1), helper.make_opsetid("", 17)]
    for level in range(41):
        inner = [
            helper.make_node(f"f{level - 1}", [a], [b], domain="mine")
            if level
            else helper.make_node("Relu", [a], [b])
            for a, b in (("a", "b"), ("b", "c"))
        ]
        function = helper.make_function("mine", f"f{level}", ["a"], ["c"], inner, imports)
        model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: b"no protobuf", "is no ONNX file"),
        (lambda: b"", "is no ONNX file"),
        (lambda: changed(_two_outputs), "makes 'y', which there is already"),
        (lambda: changed(_unsorted), "which only a later node makes"),
        (lambda: changed(_cycle), "without cycles"),
        (lambda: changed(lambda m: m.graph.initializer.pop(0)), "reads 'w', which nothing makes"),
        (lambda: changed(_negative), "sizes .-6, .*expected natural numbers"),
        (lambda: changed(_huge), "expected natural numbers below"),
        (lambda: changed(_short), "has 860 bytes of data: expected 864"),
        (lambda: changed(_strings), "of type STRING"),
        (lambda: changed(_twice), "no name of its own"),
        (lambda: conv_model(nonsense=1), "is no valid node"),
        (lambda: conv_model(pads=[1, -1, 1, 1]), "expected four natural numbers"),
        (lambda: conv_model(group=3), "reads 4 channels: expected 12, in 3 groups"),
        (lambda: model_of([node("Relu", "x")], {}, 8), "operator set 8: expected"),
        (lambda: model_of([node("Relu", "x")], {}, 99), "operator set 99: expected"),
        (lambda: model_of([node("Conv", "x w")], {"w": array(2, 4, 3)}, 17, (1, 4, 9)),
         "expected 4, of a map of pixels"),
        (_loop, "branches and loops are not taken"),
        (_recursive, "calls itself"),
        (_doubling, "nodes with its functions put in"),
        (lambda: _nodes(helper.make_node("F", ["x"], ["y"], domain="com.microsoft")),
         r"node y \(F\) is of the domain com.microsoft"),
        (lambda: _nodes(node("QuantizeLinear", "x s z"), s=F32(1)[0], z=np.uint8(0)),
         "quantized network .QuantizeLinear"),
        (lambda: _nodes(node("NonZero", "x")), "not known here: NonZero"),
        (lambda: _nodes(node("Dropout", "x r t"), r=np.float32(0.5), t=np.array(True)),
         "training mode"),
        (lambda: _nodes(node("ConstantOfShape", "c"), c=I64(1 << 20, 1 << 20)),
         "larger constants than"),
        (lambda: _nodes(node("Expand", "c s", "a"), node("Relu", "a"), c=F32(1), s=I64(1 << 40)),
         "larger constants than"),
        (lambda: _nodes(node("Reshape", "x s", "a"), node("Shape", "a", "b"),
                        node("Reshape", "x x"), s=I64(-1)),
         "is no valid|computed from elements"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path, make, expected):
    refuse(tmp_path, make(), expected)


def test_functions_of_a_file_are_put_in(tmp_path):
    model = _nodes(helper.make_node("f", ["x"], ["y"], domain="mine"))
    inside = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "f", ["a"], ["c"], inside, imports))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    module = check(tmp_path, model, array(1, 4, 9, 11))
    assert called(module) == [F.relu, torch.neg]


def test_names_of_a_file_are_no_code(tmp_path):
    evil = "a'); import os; os.abort() #"
    nodes = [
        helper.make_node("Conv", ["x", evil], [f"{evil}1"], name=evil),
        helper.make_node("Relu", [f"{evil}1"], ["y"], name="forward"),
    ]
    model = model_of(nodes, {evil: W["w"]}, 17)
    model.graph.input[0].name = "__class__"
    model.graph.node[0].input[0] = "__class__"
    check(tmp_path, model, array(1, 4, 9, 11))


def test_names_the_extra_where_the_package_is_missing(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RuntimeError, match="pip install 'threshnet_fast"):
        load_onnx(tmp_path / "net.onnx")
