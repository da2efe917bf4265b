"""What rules for operators stand on: the values of a file, and the fx graph that is being written.

A value is a tensor known already (:class:`torch.Tensor`), the result of an fx node, numbers that
describe a shape (:class:`Scalars`), or the permutation of a node that nothing has asked for yet
(:class:`Permuted`). What depends on no input is computed at once.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .file import Model, Operation

__all__ = [
    "TO_NCHW",
    "TO_NHWC",
    "Permuted",
    "Rule",
    "Scalars",
    "Translation",
    "Value",
    "rule",
]

TO_NHWC = (0, 2, 3, 1)
TO_NCHW = (0, 3, 1, 2)

# What folding may add to the bytes that the file has.
_FOLDED = 64 << 20
# What stands for a size that is not fixed, twice: what differs depends on it. A multiple of 32, so
# that networks which halve a map and double it again work.
_BATCH = (2, 3)
_SIZE = (448, 672)


@dataclass(frozen=True)
class Scalars:
    """Whole or real numbers, each known or the result of an fx node.

    Attributes:
        elements: The numbers.
        vector: Whether it is of one dimension rather than of none.
    """

    elements: tuple[Any, ...]
    vector: bool = True

    @property
    def known(self) -> bool:
        """Whether all numbers are."""
        return not any(isinstance(each, fx.Node) for each in self.elements)


@dataclass(frozen=True)
class Permuted:
    """A permutation of an fx node's result, written only where something needs it as it is."""

    base: fx.Node
    dims: tuple[int, ...]


Value: TypeAlias = "Tensor | fx.Node | Scalars | Permuted"
Rule: TypeAlias = "Callable[[Translation, Operation], Value | tuple[Value, ...]]"

RULES: dict[str, Rule] = {}
"""How each operator is written in PyTorch."""


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Registers what writes operators of these kinds."""

    def register(function: Rule) -> Rule:
        for kind in kinds:
            RULES[kind] = function
        return function

    return register


class Translation:
    """An fx graph that is being written.

    Args:
        model: What the file holds.

    Attributes:
        model: The same.
        opset: Version of the operators.
        root: The module that has the submodules and constants.
        graph: The graph.
        values: By name in the file.
        uses: How often each name is read, as a result too.
        names: Those of each fx node's result in the file, permuted or not.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.opset = model.opset
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Value] = dict(model.tensors)
        self.uses = Counter(name for each in model.operations for name in each.inputs)
        self.uses.update(model.outputs)
        self.names: defaultdict[fx.Node, list[str]] = defaultdict(list)
        # Both results of each node, on the meta device, or None where they are not known.
        self.examples: dict[fx.Node, tuple[Any, Any] | None] = {}
        self.ranks: dict[fx.Node, int] = {}
        self.dynamic = False
        # Modules that scale channels, and may yet shift them.
        self.scales: set[fx.Node] = set()
        self._written: dict[Permuted, fx.Node] = {}
        self._parameters: dict[int, tuple[Tensor, nn.Parameter]] = {}
        self._constants: dict[int, tuple[Tensor, fx.Node]] = {}
        self._folded = _FOLDED + 4 * sum(map(_bytes, model.tensors.values()))
        for given in model.inputs:
            node = self.graph.placeholder(f"input_{_identifier(given.name)}")
            self.values[given.name] = node
            self.examples[node] = None
            if given.dims is not None:
                self.dynamic |= None in given.dims
                self.ranks[node] = len(given.dims)
                self.examples[node] = tuple(
                    torch.empty(
                        [
                            (_SIZE if axis else _BATCH)[which] if dim is None else dim
                            for axis, dim in enumerate(given.dims)
                        ],
                        dtype=given.dtype,
                        device="meta",
                    )
                    for which in (0, 1)
                )  # type: ignore[assignment]

    # What a rule reads

    def value(self, node: Operation, index: int) -> Value | None:
        """An input, or None where it is left out."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        return self.values[node.inputs[index]]

    def given(self, node: Operation, index: int) -> Value:
        """An input that there must be."""
        value = self.value(node, index)
        if value is None:
            raise ValueError(f"input {index} is missing")
        return value

    def operand(self, node: Operation, index: int) -> Any:
        """An input, as something that :meth:`call` takes: a tensor, or a node that makes one."""
        return self.plain(self.given(node, index))

    def constant(self, node: Operation, index: int) -> Tensor | None:
        """An input that must be known, or None where it is left out."""
        value = self.value(node, index)
        if isinstance(value, Scalars) and value.known:
            return _tensor(value)
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"input {index} depends on the network's input: expected a constant")
        return value

    def integers(self, node: Operation, index: int) -> list[int] | None:
        """A constant input of whole numbers, or None where it is left out."""
        value = self.constant(node, index)
        if value is None:
            return None
        if value.ndim > 1 or value.is_floating_point() or value.numel() > 1000:
            raise ValueError(f"input {index} is no short list of whole numbers")
        return [int(each) for each in value.reshape(-1).tolist()]

    def axes(self, node: Operation, attribute_until: int, index: int = 1) -> list[int] | None:
        """Axes, which are an attribute up to an operator set, then an input."""
        if self.opset <= attribute_until:
            return node.attributes.get("axes")
        return self.integers(node, index)

    def scalars(self, value: Value) -> Scalars:
        """Numbers of a shape, from what is one or is known."""
        if isinstance(value, Scalars):
            return value
        if isinstance(value, Tensor) and value.ndim <= 1 and value.numel() <= 1000:
            return Scalars(tuple(value.reshape(-1).tolist()), value.ndim == 1)
        raise ValueError("a shape is computed from elements of a map: expected one of sizes alone")

    def plain(self, value: Value) -> Any:
        """The value as a tensor or as a node that makes one."""
        if isinstance(value, Scalars):
            if value.known:
                return _tensor(value)
            elements = list(value.elements) if value.vector else value.elements[0]
            return self.call(torch.tensor, elements)
        if isinstance(value, Permuted):
            if value not in self._written:
                self._written[value] = self.call(torch.permute, value.base, value.dims)
            return self._written[value]
        return value

    def example(self, value: Any) -> tuple[Any, Any] | None:
        """What a value may look like, twice, on the meta device; None where it is not known."""
        if isinstance(value, fx.Node):
            return self.examples.get(value)
        if isinstance(value, Permuted):
            both = self.examples.get(value.base)
            return both and (both[0].permute(value.dims), both[1].permute(value.dims))
        return value, value

    def rank(self, value: Any) -> int:
        """The number of dimensions.

        Raises:
            ValueError: Neither the file says it nor what made the value.
        """
        both = self.example(value)
        if both is not None:
            return int(both[0].ndim)
        if isinstance(value, Permuted):
            return len(value.dims)
        if value in self.ranks:
            return self.ranks[value]
        raise ValueError("the number of dimensions of what it reads is not known")

    def axis(self, value: Any, axis: int) -> int:
        """An axis, counted from the front."""
        rank = self.rank(value)
        if not -rank <= axis < max(rank, 1):
            raise ValueError(f"axis {axis} of a value of {rank} dimensions")
        return axis % rank if rank else 0

    def fixed(self, value: Any, axis: int) -> int | None:
        """The size along an axis where it is the same for every input, else None."""
        both = self.example(value)
        if both is None or both[0].shape[axis] != both[1].shape[axis]:
            return None
        return int(both[0].shape[axis])

    def size(self, value: Any, axis: int) -> Any:
        """The size along an axis: a number where it is fixed, else a node."""
        if isinstance(value, Permuted):
            value, axis = value.base, value.dims[axis]
        fixed = self.fixed(value, axis)
        return self.call_method("size", value, axis) if fixed is None else fixed

    def channels_of(self, value: Any, constant: Any) -> Tensor | None:
        """A constant as one number for each channel of a map, or None where it is not that."""
        if not (isinstance(constant, Tensor) and constant.is_floating_point()):
            return None
        both = self.example(value)
        if both is None or both[0].ndim != 4 or both[0].dtype != constant.dtype:
            return None
        channels = int(both[0].shape[1])
        shape = (1,) * (4 - constant.ndim) + tuple(constant.shape)
        if shape != (1, channels, 1, 1) or self.fixed(value, 1) is None:
            return None
        return constant.reshape(-1)

    def sole(self, node: fx.Node) -> bool:
        """Whether a node's result is read once only, by what is being written, under all names."""
        return not node.users and all(self.uses[name] == 1 for name in self.names[node])

    # What a rule writes

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Writes a call of a function, or makes it at once where all that it reads is known."""
        dynamic = False

        def look(node: fx.Node) -> fx.Node:
            nonlocal dynamic
            dynamic = True
            return node

        map_arg((args, kwargs), look)
        if not dynamic:
            return self._fold(function, args, kwargs)
        args, kwargs = self._with_constants(args), self._with_constants(kwargs)
        node = self.graph.call_function(function, args, kwargs)
        return self._made(node, function)

    def call_method(self, name: str, value: Any, *args: Any) -> Any:
        """Writes a call of a tensor's method, or makes it at once."""
        if not isinstance(value, fx.Node):
            return self.call(getattr(Tensor, name), value, *args)
        node = self.graph.call_method(name, (value, *self._with_constants(args)))
        return self._made(node, getattr(Tensor, name))

    def call_module(
        self,
        node: Operation,
        make: Callable[[], nn.Module],
        x: Any,
        **tensors: Tensor | None,
    ) -> Any:
        """Writes a call of a module.

        Args:
            node: Whose name it gets.
            make: Makes the module; called on the meta device.
            x: What the module reads.
            **tensors: Its parameters and buffers.
        """
        with torch.device("meta"):
            module = make().eval()
        for name, tensor in tensors.items():
            mine = getattr(module, name)
            if tensor is not None and (mine is None or mine.shape != tensor.shape):
                shape = None if mine is None else list(mine.shape)
                raise ValueError(f"its {name} has shape {list(tensor.shape)}: expected {shape}")
        if not isinstance(x, fx.Node):
            x = self.constant_node(x)
        dtype = next((each.dtype for each in tensors.values() if each is not None), None)
        example = self._example_of(module if dtype is None else module.to(dtype), (x,), {})
        for name, tensor in tensors.items():
            if tensor is not None:
                parameter = isinstance(getattr(module, name), nn.Parameter)
                setattr(module, name, self._parameter(tensor) if parameter else tensor)
        for name, buffer in list(module.named_buffers()):
            if buffer.device.type == "meta":
                module.get_buffer(name)
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        target = self._free_name(_identifier(node.name))
        self.root.add_module(target, module)
        made = self.graph.call_module(target, (x,))
        self.examples[made] = example
        return made

    def module_of(self, value: Any) -> nn.Module | None:
        """The module whose call a value is, or None."""
        if isinstance(value, fx.Node) and value.op == "call_module":
            return self.root.get_submodule(str(value.target))
        return None

    def constant_node(self, tensor: Any) -> fx.Node:
        """A node for a known tensor, which becomes a buffer."""
        if id(tensor) not in self._constants:
            name = self._free_name("constant")
            self.root.register_buffer(name, tensor)
            node = self.graph.get_attr(name)
            meta = tensor.to("meta")
            self.examples[node] = (meta, meta)
            self._constants[id(tensor)] = (tensor, node)
        return self._constants[id(tensor)][1]

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        # What is shared in the file is shared in the module. The tensor is kept with it: another
        # could otherwise get its id.
        kept = self._parameters.setdefault(
            id(tensor), (tensor, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        )
        return kept[1]

    def _free_name(self, name: str) -> str:
        taken = name
        count = 0
        while hasattr(self.root, taken):
            count += 1
            taken = f"{name}_{count}"
        return taken

    def _with_constants(self, args: Any) -> Any:
        """Arguments of a node, in which tensors are nodes as well."""
        if isinstance(args, Tensor):
            return self.constant_node(args)
        if isinstance(args, (list, tuple)):
            return type(args)(self._with_constants(each) for each in args)
        if isinstance(args, dict):
            return {name: self._with_constants(each) for name, each in args.items()}
        return args

    def _made(self, node: fx.Node, function: Callable[..., Any]) -> fx.Node:
        self.examples[node] = self._example_of(function, node.args, node.kwargs)
        return node

    def _example_of(
        self, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        results = []
        for which in (0, 1):
            missing = False

            def example(node: fx.Node, which: int = which) -> Any:
                nonlocal missing
                both = self.examples.get(node)
                missing |= both is None
                return None if both is None else both[which]

            known = map_arg((args, kwargs), example)
            if missing:
                return None
            try:
                with torch.no_grad():
                    result = function(*known[0], **known[1])
            except Exception as error:
                # A size that stands for one that is not fixed may not suit the network.
                if self.dynamic:
                    return None
                raise ValueError(f"it cannot be computed: {error}") from error
            results.append(_to_meta(result))
        return results[0], results[1]

    def _fold(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            if any(isinstance(each, Tensor) for each in _flat((args, kwargs))):
                expected = function(*_to_meta(args), **_to_meta(kwargs))
                self.spend(sum(map(_bytes, _flat(expected))))
            result = function(*args, **kwargs)
        return result

    def spend(self, size: int) -> None:
        """Refuses to make more bytes of constants than a file of this size can need."""
        self._folded -= size
        if self._folded < 0:
            raise ValueError("it makes larger constants than the file can need")


def _tensor(value: Scalars) -> Tensor:
    dtype = torch.int64 if all(isinstance(each, int) for each in value.elements) else torch.float32
    if value.elements and all(isinstance(each, bool) for each in value.elements):
        dtype = torch.bool
    tensor = torch.tensor(value.elements, dtype=dtype)
    return tensor if value.vector else tensor.reshape(())


def _bytes(tensor: Any) -> int:
    if not isinstance(tensor, Tensor):
        return 0
    return math.prod(tensor.shape) * tensor.element_size()


def _flat(values: Any) -> Sequence[Any]:
    if isinstance(values, (list, tuple)):
        return [each for value in values for each in _flat(value)]
    if isinstance(values, dict):
        return _flat(list(values.values()))
    return [values]


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(each) for each in value)
    if isinstance(value, dict):
        return {name: _to_meta(each) for name, each in value.items()}
    return value


def _identifier(name: str) -> str:
    """A name of a submodule for one of the file: letters, digits and underscores."""
    return (
        "n_" + found
        if (found := re.sub(r"[^0-9a-zA-Z]+", "_", name)[:80].strip("_"))[:1].isdigit()
        else found or "unnamed"
    )
