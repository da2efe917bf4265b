"""Reading an ONNX file, which is hostile until checked: nothing of it is believed before.

What comes out are nodes with plain values, tensors, and names: no later step looks at the file.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...text import printable

__all__ = ["DTYPES", "Input", "Model", "Operation", "dtype_of", "read"]

OLDEST = 9
"""The oldest operator set that is read; 9 and 10 are those of files with Upsample."""
_LARGEST_FILE = (1 << 31) - 1
_MOST_NODES = 100_000
_LARGEST_DIMENSION = 1 << 31
_MOST_DIMENSIONS = 8
_DOMAINS = ("", "ai.onnx")

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""Types of elements, by the numbers of ``TensorProto.DataType``."""

# The field that has the elements of a tensor where raw_data has not.
_FIELDS = {
    torch.float32: "float_data",
    torch.float64: "double_data",
    torch.int64: "int64_data",
}


@dataclass(frozen=True)
class Input:
    """An input of the network.

    Attributes:
        name: As the file has it.
        dtype: Of its elements.
        dims: Its sizes, None for one that is not fixed; or None where the file says nothing.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Operation:
    """A node of the file.

    Attributes:
        kind: Name of the operator.
        name: Of the node, or of its first output where it has none.
        inputs: Names of the values that it reads; empty for one that is left out.
        outputs: Names of the values that it makes.
        attributes: Their values: numbers, text, lists of those, tensors.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"node {_short(self.name)} ({_short(self.kind)})"


@dataclass
class Model:
    """What a file holds.

    Attributes:
        opset: Version of the operators.
        inputs: What is given.
        outputs: Names of the results.
        tensors: Weights and other constants.
        operations: In an order in which they can run.
        ranks: Numbers of dimensions that the file says values to have.
    """

    opset: int
    inputs: list[Input] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)


def _short(text: object) -> str:
    shown = printable(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def read(path: str | os.PathLike[str]) -> Model:
    """Reads and checks a file.

    Args:
        path: The file. Tensors may lie in others of its folder.

    Raises:
        OSError: It cannot be read.
        RuntimeError: The package ``onnx`` is missing.
        ValueError: It is no ONNX file, or holds what is not taken; the message names the file.
    """
    try:
        import onnx
    except ImportError as error:
        raise RuntimeError(
            "reading an ONNX file needs the package onnx: pip install 'threshnet_fast[onnx]'"
        ) from error
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{_short(path)} is no file: expected an ONNX file")
    if size > _LARGEST_FILE:
        raise ValueError(f"{_short(path)} has {size} bytes: expected at most {_LARGEST_FILE}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own class, of one of its implementations
        raise ValueError(f"{_short(path)} is no ONNX file: {_short(error)}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ValueError(f"{_short(path)} is no ONNX file: it has no graph or no operator set")
    try:
        return _Reader(path, size).model(proto)
    except ValueError as error:
        raise ValueError(f"{_short(path)}: {error}") from error


class _Reader:
    def __init__(self, path: Path, size: int) -> None:
        self.folder = path.resolve().parent if not path.is_symlink() else path.parent.resolve()
        # As many bytes of tensors as there are in files: less is declared by whoever is honest.
        self.budget = size
        self.files: dict[Path, int] = {}
        self.regions: dict[tuple[Path, int, int], bytearray] = {}

    def model(self, proto: Any) -> Model:
        import onnx

        versions: dict[str, int] = {}
        for entry in proto.opset_import:
            domain = "" if entry.domain in _DOMAINS else entry.domain
            if versions.setdefault(domain, entry.version) != entry.version:
                raise ValueError(f"it imports two versions of the domain {_short(domain)!r}")
        newest = onnx.defs.onnx_opset_version()
        opset = versions.get("", 0)
        if not OLDEST <= opset <= newest:
            raise ValueError(f"operator set {opset}: expected {OLDEST} to {newest}")
        if proto.functions:
            proto = _without_functions(proto)
        graph = proto.graph
        if len(graph.node) > _MOST_NODES:
            raise ValueError(f"{len(graph.node)} nodes: expected at most {_MOST_NODES}")
        if graph.sparse_initializer:
            raise ValueError("sparse initializers are not taken: expected dense ones")
        model = Model(opset)
        for tensor in graph.initializer:
            if not tensor.name or tensor.name in model.tensors:
                raise ValueError(f"initializer {_short(tensor.name)!r} has no name of its own")
            model.tensors[tensor.name] = self.tensor(tensor, f"initializer {_short(tensor.name)}")
        self._inputs(graph, model)
        self._operations(graph, model, proto.ir_version, versions)
        for value in (*graph.value_info, *graph.output):
            if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
                model.ranks[value.name] = len(value.type.tensor_type.shape.dim)
        return model

    def _inputs(self, graph: Any, model: Model) -> None:
        names: set[str] = set()
        for value in graph.input:
            where = f"input {_short(value.name)}"
            if not value.name or value.name in names:
                raise ValueError(f"{where} has no name of its own")
            names.add(value.name)
            if value.name in model.tensors:
                continue  # how old files declare their weights
            if not value.type.HasField("tensor_type"):
                raise ValueError(f"{where} is no tensor")
            kind = value.type.tensor_type
            dims: tuple[int | None, ...] | None = None
            if kind.HasField("shape"):
                # -1 is how some exporters write a size that is not fixed.
                dims = tuple(
                    dim.dim_value if dim.HasField("dim_value") and dim.dim_value != -1 else None
                    for dim in kind.shape.dim
                )
                _check_dims([dim for dim in dims if dim is not None], where)
                if len(dims) > _MOST_DIMENSIONS:
                    raise ValueError(f"{where} has {len(dims)} dimensions")
            model.inputs.append(Input(value.name, dtype_of(kind.elem_type, where), dims))
        if not model.inputs:
            raise ValueError("it has no inputs: expected at least one that is no initializer")

    def _operations(
        self, graph: Any, model: Model, ir_version: int, versions: Mapping[str, int]
    ) -> None:
        from onnx import checker

        context = checker.C.CheckerContext()
        context.ir_version = ir_version
        context.opset_imports = {"": model.opset}
        scope = checker.C.LexicalScopeContext()
        made = {*model.tensors, *(value.name for value in model.inputs)}
        everything = {name for node in graph.node for name in node.output if name}
        for proto in graph.node:
            node = self._operation(proto, versions)
            for name in node.inputs:
                if name and name not in made:
                    reason = (
                        "only a later node makes: expected nodes in an order without cycles"
                        if name in everything
                        else "nothing makes"
                    )
                    raise ValueError(f"{node} reads {_short(name)!r}, which {reason}")
            for name in node.outputs:
                if name and name in made:
                    raise ValueError(f"{node} makes {_short(name)!r}, which there is already")
                made.add(name)
            try:
                if not (node.kind == "Upsample" and model.opset >= 10):
                    # As checker.check_node would, which does not take a scope.
                    checker.C.check_node(proto.SerializeToString(), context, scope)
            except checker.ValidationError as error:
                text = " ".join(str(error).split())
                raise ValueError(f"{node} is no valid node: {printable(text)[:300]}") from error
            model.operations.append(node)
        for value in graph.output:
            if value.name not in made:
                raise ValueError(f"output {_short(value.name)!r} is made by no node")
            model.outputs.append(value.name)
        if not model.outputs:
            raise ValueError("it has no outputs")

    def _operation(self, proto: Any, versions: Mapping[str, int]) -> Operation:
        name = proto.name or next(iter(proto.output), "")
        where = f"node {_short(name)} ({_short(proto.op_type)})"
        if proto.domain not in _DOMAINS:
            if proto.domain not in versions:
                raise ValueError(f"{where} is of the domain {_short(proto.domain)}, not imported")
            raise ValueError(
                f"{where} is an operator of the domain {_short(proto.domain)}: expected those of "
                "ONNX itself"
            )
        attributes: dict[str, Any] = {}
        for attribute in proto.attribute:
            if attribute.name in attributes:
                raise ValueError(f"{where} has two attributes {_short(attribute.name)}")
            attributes[attribute.name] = self._attribute(attribute, where)
        return Operation(proto.op_type, name, tuple(proto.input), tuple(proto.output), attributes)

    def _attribute(self, proto: Any, where: str) -> Any:
        from onnx import AttributeProto as Kind

        name = _short(proto.name)
        if proto.ref_attr_name:
            raise ValueError(f"{where}: attribute {name} refers to one of a function")
        match proto.type:
            case Kind.FLOAT:
                return float(proto.f)
            case Kind.INT:
                return int(proto.i)
            case Kind.STRING:
                return proto.s.decode("utf-8", "backslashreplace")
            case Kind.FLOATS:
                return [float(each) for each in proto.floats]
            case Kind.INTS:
                return [int(each) for each in proto.ints]
            case Kind.TENSOR:
                return self.tensor(proto.t, f"{where}: attribute {name}")
            case Kind.GRAPH | Kind.GRAPHS:
                raise ValueError(
                    f"{where} has a graph within, {name}: branches and loops are not taken"
                )
        raise ValueError(f"{where}: attribute {name} is of a type that is not taken")

    def tensor(self, proto: Any, where: str) -> Tensor:
        """Reads a tensor whose size is that of the data which there are."""
        dtype = dtype_of(proto.data_type, where)
        dims = [int(dim) for dim in proto.dims]
        _check_dims(dims, where)
        if len(dims) > _MOST_DIMENSIONS:
            raise ValueError(f"{where} has {len(dims)} dimensions")
        if proto.HasField("segment"):
            raise ValueError(f"{where} is in segments: expected it in one")
        count = math.prod(dims)
        size = count * dtype.itemsize
        data: bytearray
        if proto.data_location == type(proto).EXTERNAL:
            data = self._external(proto, size, where)
        elif proto.HasField("raw_data"):
            _expect_bytes(len(proto.raw_data), size, dims, dtype, where)
            data = bytearray(proto.raw_data)
        else:
            return _typed(proto, dims, count, dtype, where)
        if not count:
            return torch.empty(dims, dtype=dtype)
        if dtype is torch.bool and max(data) > 1:
            raise ValueError(f"{where} holds a truth value that is neither 0 nor 1")
        return torch.frombuffer(data, dtype=dtype).reshape(dims)

    def _external(self, proto: Any, size: int, where: str) -> bytearray:
        entries: dict[str, str] = {}
        for entry in proto.external_data:
            if entry.key in entries:
                raise ValueError(f"{where}: external data with two {_short(entry.key)}")
            entries[entry.key] = entry.value
        file = self._external_file(entries.get("location", ""), where)
        total = self.files[file]
        offset = _natural(entries.get("offset", "0"), f"{where}: offset")
        length = _natural(entries.get("length", str(size)), f"{where}: length")
        if offset + length > total:
            raise ValueError(
                f"{where}: bytes {offset} to {offset + length} of {_short(file.name)}, which has "
                f"{total}"
            )
        _expect_bytes(length, size, list(proto.dims), dtype_of(proto.data_type, where), where)
        region = (file, offset, length)
        if region not in self.regions:
            if length > self.budget:
                raise ValueError(f"{where}: more bytes of tensors than there are in files")
            self.budget -= length
            data = bytearray(length)
            with file.open("rb") as stream:
                stream.seek(offset)
                if stream.readinto(data) != length:
                    raise ValueError(f"{where}: {_short(file.name)} ends too early")
            self.regions[region] = data
        return self.regions[region]

    def _external_file(self, location: str, where: str) -> Path:
        parts = location.replace("\\", "/").split("/")
        outside = not location or location.startswith(("/", "\\")) or ".." in parts
        if outside or "\0" in location or ":" in parts[0]:
            raise ValueError(
                f"{where}: external data at {_short(location)!r}: expected a file in the "
                "model's folder"
            )
        try:
            file = (self.folder / location).resolve(strict=True)
            status = file.stat()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{where}: external data at {_short(location)!r}, which cannot be read"
            ) from error
        if not file.is_relative_to(self.folder) or not stat.S_ISREG(status.st_mode):
            raise ValueError(
                f"{where}: external data at {_short(location)!r}, which leads out of the "
                "model's folder or is no file"
            )
        if file not in self.files:
            self.files[file] = status.st_size
            self.budget += status.st_size
        return file


def dtype_of(number: int, where: str) -> torch.dtype:
    """The type of elements of which ONNX has the number.

    Raises:
        ValueError: It is none that is taken; the message begins with ``where``.
    """
    import onnx

    if number not in DTYPES:
        names = {value: name for name, value in onnx.TensorProto.DataType.items()}
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise ValueError(
            f"{where} has elements of type {names.get(number, number)}: expected one of {known}"
        )
    return DTYPES[number]


def _check_dims(dims: Sequence[int], where: str) -> None:
    if any(not 0 <= dim < _LARGEST_DIMENSION for dim in dims):
        raise ValueError(
            f"{where} has the sizes {list(dims)[:_MOST_DIMENSIONS]}: expected natural numbers "
            f"below {_LARGEST_DIMENSION}"
        )


def _natural(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{where} is {_short(text)!r}: expected a natural number")
    return int(text)


def _expect_bytes(
    actual: int, expected: int, dims: Sequence[int], dtype: torch.dtype, where: str
) -> None:
    if actual != expected:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{where} has {actual} bytes of data: expected {expected}, of {kind} {list(dims)}"
        )


def _typed(proto: Any, dims: list[int], count: int, dtype: torch.dtype, where: str) -> Tensor:
    values = getattr(proto, _FIELDS.get(dtype, "int32_data"))
    if len(values) != count:
        raise ValueError(f"{where} has {len(values)} elements: expected {count}, of {dims}")
    if dtype in (torch.float16, torch.bfloat16):
        # Their bits, as whole numbers.
        if any(not 0 <= value < 1 << 16 for value in values):
            raise ValueError(f"{where} holds a number of more than 16 bits")
        bits = [value - (1 << 16) if value >= 1 << 15 else value for value in values]
        return torch.tensor(bits, dtype=torch.int16).view(dtype).reshape(dims)
    try:
        return torch.tensor(list(values), dtype=dtype).reshape(dims)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"{where} holds a number that is no {dtype}") from error


def _without_functions(proto: Any) -> Any:
    """The model with its own functions put in, after it is known how large that makes it."""
    import onnx.inliner

    functions: dict[tuple[str, str, str], Any] = {}
    for function in proto.functions:
        key = (function.domain, function.name, getattr(function, "overload", ""))
        if key in functions or function.domain in _DOMAINS:
            raise ValueError(f"function {_short(function.name)} has no name of its own")
        functions[key] = function
    sizes: dict[tuple[str, str, str], int] = {}
    pending: set[tuple[str, str, str]] = set()

    def expanded(nodes: Iterable[Any], depth: int) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, getattr(node, "overload", ""))
            if key not in functions:
                total += 1
                continue
            if key in pending or depth > 100:
                raise ValueError(f"function {_short(node.op_type)} calls itself, or too deep")
            if key not in sizes:
                pending.add(key)
                sizes[key] = expanded(functions[key].node, depth + 1)
                pending.discard(key)
            total += sizes[key]
        return total

    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g") or attribute.graphs:
                    raise ValueError(
                        f"node {_short(node.name)} ({_short(node.op_type)}) has a graph within: "
                        "branches and loops are not taken"
                    )
    count = expanded(proto.graph.node, 0)
    if count > _MOST_NODES:
        raise ValueError(f"{count} nodes with its functions put in: expected at most {_MOST_NODES}")
    weights = proto.graph.initializer[:]
    del proto.graph.initializer[:]
    try:
        # Without the weights, which would be copied twice on the way.
        inlined = onnx.inliner.inline_local_functions(proto)
    except Exception as error:
        raise ValueError(f"its functions cannot be put in: {_short(error)}") from error
    inlined.graph.initializer.extend(weights)
    return inlined
