"""Networks as ONNX files, for other programs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing
from .weights_file import ModelInfo

__all__ = [
    "OLDEST_OPSET",
    "newest_opset",
    "objection",
    "save_onnx",
    "silence",
    "write_onnx",
]

OLDEST_OPSET = 17
"""The oldest operator set that is written."""
# The oldest that PyTorch's exporter writes: what is older is made of it.
_EXPORTED = 18
_INPUT, _OUTPUT = "input", "output"
# Largest difference that ONNX Runtime may make, of the largest output.
_TOLERANCE = 1e-4


def objection() -> str | None:
    """Why no ONNX file can be written here, in one line, or None."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            return f"{package} is not installed: pip install 'threshnet_fast[onnx]'"
    return None


def save_onnx(path: Path, model: nn.Module, info: ModelInfo, opset: int = OLDEST_OPSET) -> None:
    """Writes a trained network as one ONNX file, which is checked before it is there.

    Its input is ``input``, ``(N, C, H, W)``, float32, of any batch and of the size that ``info``
    has; its output is ``output``, ``(N, num_classes)``. BatchNorm is folded where it can be. The
    file says what ``info`` does, as texts: the classes as JSON, mean, std and size.

    Args:
        path: The file, which it replaces.
        model: The network, in evaluation mode.
        info: Its description.
        opset: Version of the operators.

    Raises:
        OSError: The file cannot be written.
        RuntimeError: A package is missing, or the file does not compute what the network does.
        ValueError: ``opset`` is none that can be written, or ``model`` is in training mode.
    """
    if (reason := objection()) is not None:
        raise RuntimeError(f"an ONNX file cannot be written: {reason}")
    if model.training:
        raise ValueError("model is in training mode: expected evaluation mode (model.eval())")
    newest = newest_opset()
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset is {opset}: expected {OLDEST_OPSET} to {newest}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, len(info.mean), *info.image_size), generator=generator)
    metadata = {
        "model": info.model,
        "classes": json.dumps(list(info.classes), ensure_ascii=False),
        "mean": json.dumps(list(info.mean)),
        "std": json.dumps(list(info.std)),
        "image_size": json.dumps(list(info.image_size)),
        "interpolation": info.interpolation,
        "crop_fraction": json.dumps(info.crop_fraction),
    }
    with replacing(path) as temporary:
        write_onnx(temporary, model, x, opset=opset, any_batch=True, metadata=metadata)
        _compare(temporary, model, x)


def newest_opset() -> int:
    """The newest operator set that the package ``onnx`` knows."""
    import onnx

    return int(onnx.defs.onnx_opset_version())


def write_onnx(
    path: Path,
    module: nn.Module,
    x: Tensor,
    *,
    opset: int = _EXPORTED,
    any_batch: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a module as one ONNX file, after ``onnx.checker`` has seen it.

    Args:
        path: The file.
        module: The module, in evaluation mode.
        x: An input.
        opset: Version of the operators.
        any_batch: Whether the file takes any batch, rather than that of ``x``.
        metadata: What else the file says.

    Raises:
        OSError: The file cannot be written.
        RuntimeError: The module cannot be exported.
        ValueError: It has no file of that operator set, or one of over 2 GB.
    """
    import onnx

    dynamic: Any = ({0: torch.export.Dim("batch")},) if any_batch else None
    with silence(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (x,),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamo=True,
            opset_version=max(opset, _EXPORTED),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if opset < _EXPORTED:
        _make_older(proto, opset)
    written = {entry.domain: entry.version for entry in proto.opset_import}.get("")
    if written != opset:
        raise ValueError(f"PyTorch writes operator set {written}: {opset} was asked for")
    # Names and lines of this machine's source files are nobody's business.
    for node in proto.graph.node:
        del node.metadata_props[:]
    for key, text in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=text)
    if proto.ByteSize() >= 1 << 31:
        raise ValueError("the network has over 2 GB, more than one ONNX file holds")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"the exported file is not valid: {error}") from error
    path.write_bytes(proto.SerializeToString())


def _make_older(proto: Any, opset: int) -> None:
    """Writes operators as the older set has them, where their axes were attributes."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("ReduceMean", "ReduceMax") and len(node.input) == 2:
            axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
            del node.input[1]
            kept = [each for each in node.attribute if each.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("axes", axes)])
        elif onnx.defs.get_schema(node.op_type, _EXPORTED).since_version > opset:
            raise ValueError(f"operator set {opset} cannot say {node.op_type}: expected a newer")
    read = {name for node in proto.graph.node for name in node.input}
    kept = [each for each in proto.graph.initializer if each.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = opset


def _compare(path: Path, model: nn.Module, x: Tensor) -> None:
    """Runs the file with ONNX Runtime, where that is installed, on one picture and on several."""
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for batch in (x[:1], x, torch.cat((x, x[:1]))):
        with torch.inference_mode():
            expected = model(batch)
        actual = torch.from_numpy(session.run([_OUTPUT], {_INPUT: batch.numpy()})[0])
        largest = float((actual - expected).abs().max())
        if not largest <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RuntimeError(
                f"the exported file differs from the network by {largest:.2g} in ONNX Runtime"
            )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps the exporter's progress and warnings, meant for who exports, off the terminal."""
    names = ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
