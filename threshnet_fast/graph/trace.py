"""From modules to graphs of torch.fx that hold no in-place operation.

Modules are traced by running them once on the example, with proxies that know the values that they
stand for: that tells which operations write to what they read and which values share memory, more
surely than their names do. What cannot be traced like that is left to :mod:`torch.export`.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

__all__ = ["META", "Shape", "copied", "hooked", "name_of", "shape_of", "symbolic"]

META = "threshnet_fast"
"""Where nodes have the :class:`Shape` of their value, in ``node.meta``."""

# Properties of a tensor that neither its batch nor its height and width decide.
_STATIC = frozenset(
    [
        "device",
        "dtype",
        "is_cpu",
        "is_cuda",
        "is_meta",
        "is_mkldnn",
        "is_mps",
        "is_nested",
        "is_quantized",
        "is_sparse",
        "is_sparse_csr",
        "is_xpu",
        "itemsize",
        "layout",
        "names",
        "ndim",
        "_is_param",
    ]
)
_STATIC_METHODS = frozenset(
    ["dim", "get_device", "has_names", "is_complex", "is_floating_point", "is_signed", "ndimension"]
)
_STATIC_FUNCTIONS: tuple[Any, ...] = (torch.is_complex, torch.is_floating_point, torch.is_tensor)

# Operations that return what they read, or a copy, as memory formats and sizes have it.
_PERHAPS_SHARED = frozenset(
    [
        "bfloat16",
        "broadcast_to",
        "contiguous",
        "double",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "half",
        "narrow",
        "reshape",
        "reshape_as",
        "to",
        "type",
        "type_as",
    ]
)
# Operations that return another tensor of the same elements.
_SAME = frozenset(["alias", "data", "detach"])

# Operations that change what a tensor says of its memory rather than its elements.
_RESHAPE_IN_PLACE = frozenset(
    [
        "as_strided_",
        "detach_",
        "requires_grad_",
        "resize_",
        "resize_as_",
        "set_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    ]
)
_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, function)
    for name, function in {
        **{
            each: each
            for each in [
                "add",
                "floordiv",
                "lshift",
                "matmul",
                "mod",
                "mul",
                "pow",
                "rshift",
                "sub",
                "xor",
            ]
        },
        "and": "and_",
        "or": "or_",
        "truediv": "truediv",
    }.items()
}


# Attributes of every instance of GraphModule.
_OWN = frozenset({"meta", "shape_env", *nn.Module().__dict__})


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor.

    Attributes:
        shape: Its sizes on the example.
        dtype: Its elements.
        device: Where it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def shape_of(value: object) -> Shape | None:
    """The record of a value, None of what is no tensor or has sizes that are not known."""
    if not isinstance(value, Tensor):
        return None
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    if None in sizes:
        return None
    return Shape(tuple(map(int, sizes)), value.dtype, value.device)


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class _CannotTrace(Exception):
    """Why a module's graph has to come from :mod:`torch.export`."""


def symbolic(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.GraphModule:
    """Traces a module by running it once.

    Args:
        module: In evaluation mode.
        args: What it is called with.
        kwargs: What it is called with by name.

    Returns:
        Its graph, every node of which has a :class:`Shape` in its ``meta``.

    Raises:
        Exception: Anything that the module's own code raises when it is given proxies.
    """
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        raise _CannotTrace("the module has a forward of its own")
    tracer = _Tracer(module, args, kwargs)
    with torch.inference_mode(False), torch.no_grad():
        graph = tracer.trace(module)
    return tracer.functional(graph)


class _Proxy(fx.Proxy):
    """Stands for a value of which it has an example."""

    def __init__(self, node: fx.Node, tracer: fx.proxy.TracerBase, example: Any) -> None:
        super().__init__(node, tracer)
        self.example = example

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor if isinstance(self.example, Tensor) else _Proxy

    def __getattr__(self, name: str) -> Any:
        if name == "example" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        example = self.example
        tracer = cast("_Tracer", self.tracer)
        if isinstance(example, Tensor):
            if name == "requires_grad":
                return False
            if name == "_is_param":
                return False
            if name in _STATIC:
                return getattr(example, name)
        found = getattr(example, name)
        if not callable(found):
            return tracer.create_proxy("call_function", getattr, (self, name), {})

        def method(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_method", name, (self, *args), kwargs)

        return method

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.example, torch.Size) or self._splits():
            return iter([self[index] for index in range(len(self.example))])
        return iter(super().__iter__())

    def __len__(self) -> int:
        if isinstance(self.example, (tuple, list, dict)):
            return len(self.example)
        return super().__len__()

    def _splits(self) -> bool:
        """Whether this is a sequence whose length no size decides."""
        if not isinstance(self.example, (tuple, list)):
            return False
        if self.node.op in ("placeholder", "call_module") or self.node.target is operator.getitem:
            return True
        dim = self.node.kwargs.get("dim", self.node.args[2] if len(self.node.args) > 2 else 0)
        return dim in (1, -3)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and self._splits():
            return type(self.example)([self[each] for each in range(len(self.example))[index]])
        tracer = cast("_Tracer", self.tracer)
        return tracer.create_proxy("call_function", operator.getitem, (self, index), {})


def _in_place(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in _OPERATORS:
    setattr(_Proxy, f"__{_function.__name__.strip('_')}__", _in_place(_function))


@dataclass
class _Written:
    """That a node writes to what it reads.

    Attributes:
        nodes: The arguments that it writes to.
        storages: Their memory.
    """

    nodes: list[fx.Node]
    storages: set[int]


class _Tracer(fx.Tracer):
    """Records a run.

    Args:
        root: What runs.
        args: What it is called with.
        kwargs: What it is called with by name.
    """

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._evaluating = 0
        self._autocast = _autocast()
        self._arguments = (args, kwargs)
        # What nodes refer to, by its name.
        self._objects: dict[str, Any] = {}
        self._modules = {module: name for name, module in root.named_modules()}
        self._paths = {name: module for module, name in self._modules.items()}
        named = [*root.named_parameters(), *root.named_buffers()]
        self._tensors = {id(tensor): name for name, tensor in named}
        self._kept = {id(tensor): tensor for _, tensor in named}
        self._parameters: dict[str, _Proxy] = {}
        # Memory that has been seen. An address is not used again while there is a reference to it.
        self._storages: dict[int, StorageWeakRef] = {}
        # What memory the tensors of a value have, and its first value that is the very same tensor.
        self._memory: dict[fx.Node, frozenset[int]] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, _Written] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or hooked(m)
            or "forward" in m.__dict__
            or isinstance(m, torch.jit.ScriptModule)
        )

    def path_of_module(self, mod: nn.Module) -> str:
        name = self._modules.get(mod)
        if name is None:
            # Made by a forward, or held where modules are not registered.
            name = self._fresh(type(mod).__name__.lower())
            self._modules[mod] = name
            for child, part in mod.named_modules(prefix=name):
                self._modules.setdefault(part, child)
                self._paths.setdefault(child, part)
        return name

    def _fresh(self, name: str) -> str:
        taken = {*self._objects, *self._modules.values()}
        number = 0
        while f"_{name}_{number}" in taken:
            number += 1
        return f"_{name}_{number}"

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if (
            self._evaluating
            or threading.get_ident() != self._thread
            or not isinstance(attr_val, Tensor)
        ):
            return attr_val
        name = self._tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._parameters:
            node = self._attribute(name, attr_val)
            # A copy, so that no run of an operation writes to the module.
            self._parameters[name] = self._proxy(node, attr_val.detach().clone())
        return self._parameters[name]

    def _attribute(self, name: str, value: Any) -> fx.Node:
        self._objects[name] = value
        return self.create_node("get_attr", name, (), {})

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Proxy:
            return a.node
        if isinstance(a, Tensor):
            name = self._tensors.get(id(a))
            if name is None:
                name = self._fresh("constant")
                self._tensors[id(a)], self._kept[id(a)] = name, a
                a = a.detach()
            return self._attribute(name, a)
        if isinstance(a, nn.Module):
            return self._attribute(self.path_of_module(a), a)
        kind = type(a)
        if kind in (tuple, list):
            return kind([self.create_arg(each) for each in a])
        if kind is OrderedDict:
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if kind is torch.Size:
            return tuple(a)
        if isinstance(a, dict) and kind is not dict:
            raise _CannotTrace(f"a {kind.__name__} is handed over")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        args, kwargs = self._arguments
        signature = inspect.signature(root_fn)
        bound = signature.bind(self.root, *args, **kwargs)
        own, *names = signature.parameters
        call = inspect.BoundArguments(signature, OrderedDict({own: self.root}))
        inputs: list[fx.Node] = []
        # Those by name come last, and of them those that may be left out.
        kinds = signature.parameters
        for name in sorted(names, key=lambda each: _order(kinds[each])):
            parameter = kinds[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                values = bound.arguments.get(name, ())
                call.arguments[name] = tuple(
                    self._input(f"{name}_{index}", value, (), inputs)
                    for index, value in enumerate(values)
                )
            elif parameter.kind is parameter.VAR_KEYWORD:
                values = bound.arguments.get(name, {})
                call.arguments[name] = {
                    key: self._input(key, value, (), inputs) for key, value in values.items()
                }
            else:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                value = bound.arguments.get(name, parameter.default)
                call.arguments[name] = self._input(name, value, default, inputs)
        # What comes before an argument that must be given was given.
        required = [position for position, node in enumerate(inputs) if not node.args]
        for node in inputs[: max(required, default=0)]:
            node.args = ()
        return lambda: root_fn(*call.args, **call.kwargs), []

    def _input(self, name: str, value: Any, default: tuple[Any, ...], inputs: list[fx.Node]) -> Any:
        """An input of the graph; what the module is to be called with in its place."""
        node = self.create_node("placeholder", name, default, {})
        inputs.append(node)
        if tensors_of(value):
            return self._proxy(node, pytree.tree_map(copied, value))
        node.meta[META] = None
        self._expect(node, name, value)
        return value

    def _expect(self, node: fx.Node, name: str, value: Any) -> None:
        """Has the graph refuse another value of an argument that is no tensor."""
        if value is None or isinstance(value, (bool, int, float, str)):
            compare = operator.is_ if value is None else operator.eq
            same = self.create_node("call_function", compare, (node, value), {})
            same.meta[META] = None
            message = f"{name} has another value than on the example: expected {value!r}"
            check = self.create_node("call_function", torch._assert, (same, message), {})
            check.meta[META] = None

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        if _autocast() != self._autocast:
            raise _CannotTrace("it changes autocasting")
        example_args, example_kwargs = _examples((args, kwargs))
        if target in _STATIC_FUNCTIONS or (kind == "call_method" and target in _STATIC_METHODS):
            return self._call(kind, target, example_args, example_kwargs)
        node = self.create_node(
            kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr
        )
        before = [(each, each._version) for each in tensors_of((example_args, example_kwargs))]
        self._evaluating += 1
        try:
            value = self._call(kind, target, example_args, example_kwargs)
        finally:
            self._evaluating -= 1
        changed = {self._storage(tensor) for tensor, was in before if tensor._version != was}
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        returned = len(example_args) > 0 and value is example_args[0]
        proxy = self._proxy(node, value, first, returned)
        if changed:
            written = [each for each in node.all_input_nodes if changed & self._memory[each]]
            self._written[node] = _Written(written, changed)
        return proxy

    def _call(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation on the example."""
        if kind == "call_module":
            self._objects[target] = self._paths[target]
            return self._paths[target](*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _proxy(
        self, node: fx.Node, value: Any, first: fx.Node | None = None, returned: bool = False
    ) -> _Proxy:
        """What stands for the value of a node, of which the memory is noted."""
        node.meta[META] = shape_of(value)
        self._memory[node] = frozenset(self._storage(tensor) for tensor in tensors_of(value))
        self._same[node] = node
        if first is not None and self._memory[node]:
            name = name_of(node)
            if name in _PERHAPS_SHARED:
                self._memory[node] |= self._memory[first]
            elif name in _SAME or (returned and isinstance(value, Tensor)):
                self._same[node] = self._same[first]
        return _Proxy(node, self, value)

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        return storage._cdata

    def functional(self, graph: fx.Graph) -> fx.GraphModule:
        """Replaces what works in place, so that nothing in the graph writes to what it reads."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        current: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if current:
                node.args = fx.map_arg(node.args, lambda each: current.get(each, each))
                node.kwargs = fx.map_arg(node.kwargs, lambda each: current.get(each, each))
            written = self._written.get(node)
            if written is None:
                continue
            roots = {self._same[each] for each in written.nodes}
            if len(roots) != 1:
                raise _CannotTrace(f"{node.name} writes to several values")
            (root,) = roots
            for other, memory in self._memory.items():
                if not memory & written.storages or order[other] >= order[node]:
                    continue
                if other.op in ("placeholder", "get_attr"):
                    raise _CannotTrace(f"{node.name} writes to {other.name}")
                if self._same[other] is not root and any(
                    order.get(user, -1) > order[node] for user in other.users
                ):
                    raise _CannotTrace(f"{node.name} writes to memory of {other.name}")
            values = [current.get(each, each) for each in written.nodes]
            result = self._without_writing(graph, node, values)
            for other, same in self._same.items():
                if same is root and order[other] < order[node]:
                    current[other] = result
        return graph_module(self.root, graph, self._objects)

    def _without_writing(self, graph: fx.Graph, node: fx.Node, values: list[fx.Node]) -> fx.Node:
        """Makes a node one that does not write; returns the node of what it wrote.

        Args:
            graph: Its graph.
            node: What writes.
            values: What it writes to, all of them the same tensor.
        """
        value = values[0]
        if node.op == "call_module":
            module = self._objects[str(node.target)]
            if (
                getattr(module, "inplace", False)
                and node.args[:1] == (value,)
                and type(module).__module__.startswith("torch.nn.modules.")
                and not hooked(module)
                and "forward" not in module.__dict__
            ):
                functional = copy.copy(module)
                functional.inplace = False
                self._objects[str(node.target)] = functional
                return node
            with graph.inserting_before(node):
                clone = graph.call_function(torch.clone, (value,))
            clone.meta = {key: each for key, each in value.meta.items() if key != "val"}
            for each in values:
                node.replace_input_with(each, clone)
            return clone
        dtypes = {each.meta[META].dtype for each in node.all_input_nodes if each.meta.get(META)}
        if len(dtypes) > 1:
            raise _CannotTrace(f"{node.name} mixes dtypes")
        if node.kwargs.get("out") is value:
            node.kwargs = {key: each for key, each in node.kwargs.items() if key != "out"}
            return node
        if node.args[:1] != (value,) or not _make_functional(node):
            raise _CannotTrace(f"{node.name} works in place")
        return node


def _make_functional(node: fx.Node) -> bool:
    """Has a node compute what it writes to its first argument; whether that is known."""
    target, name = node.target, name_of(node)
    if target in _OPERATORS:
        node.target = _OPERATORS[cast(Any, target)]
    elif name in _RESHAPE_IN_PLACE:
        return False
    elif name == "copy_" and node.op == "call_method" and len(node.args) == 2:
        node.op, node.target, node.kwargs = "call_function", torch.ops.aten.copy.default, {}
    elif name.endswith("_") and not name.endswith("__") and node.op == "call_method":
        if not hasattr(Tensor, name[:-1]):
            return False
        node.target = name[:-1]
    elif name.endswith("_") and not name.endswith("__"):
        found = [getattr(room, name[:-1], None) for room in (torch, nn.functional)]
        functional = next((each for each in found if each is not None), None)
        if functional is None or not any(
            getattr(room, name, None) is target for room in (torch, nn.functional)
        ):
            return False
        node.target = functional
    else:
        return _without_inplace(node)
    return True


def _without_inplace(node: fx.Node) -> bool:
    """Sets a function's parameter ``inplace`` to false."""
    try:
        bound = inspect.signature(cast(Any, node.target)).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False
    if not bound.arguments.get("inplace"):
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


def hooked(module: nn.Module) -> bool:
    """Whether code of others runs around a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def name_of(node: fx.Node) -> str:
    """The name of a node's operation."""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target))


def graph_module(root: nn.Module, graph: fx.Graph, objects: Mapping[str, Any]) -> fx.GraphModule:
    """A graph with what its nodes refer to.

    Args:
        root: The module that was traced, which is not modified.
        graph: Its graph.
        objects: What the nodes refer to, by names.
    """
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    found = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        value, target = objects[node.target], node.target
        first = target.partition(".")[0]
        within = any(target[: at.start()] in called for at in re.finditer(r"\.", target))
        if hasattr(fx.GraphModule, first) or first in _OWN or within:
            target = "module_" + target.replace(".", "_")
            node.target = target
        found[target] = value
    result = fx.GraphModule(found, graph, type(root).__name__)
    for module in result.modules():
        if type(module) is nn.Module:
            module.training = root.training
    result.training = root.training
    return result


def _order(parameter: inspect.Parameter) -> tuple[int, bool]:
    """Where a parameter of a forward is among the inputs of its graph."""
    order = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL")
    if parameter.kind.name in order:
        return order.index(parameter.kind.name), False
    return len(order), parameter.default is not parameter.empty


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def copied(value: Any) -> Any:
    """A tensor that shares nothing with another; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _examples(value: Any) -> Any:
    """Nested arguments with examples in place of proxies."""
    if type(value) is _Proxy:
        return value.example
    if type(value) in (tuple, list):
        return type(value)(map(_examples, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_examples, value))
    if isinstance(value, dict):
        return type(value)((key, _examples(each)) for key, each in value.items())
    if isinstance(value, slice):
        return slice(_examples(value.start), _examples(value.stop), _examples(value.step))
    return value
