"""Any module as a graph: traced to :mod:`torch.fx`, and from there to :mod:`.ir`."""

from __future__ import annotations

import contextlib
import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .ir import Graph, UnsupportedModule
from .normal import normalise
from .operators import Unsupported, name_for_people, operation
from .trace import META, copied, shape_of, symbolic

__all__ = ["OutsideOfTrace", "annotate", "convert", "interpret", "objection", "trace"]


class OutsideOfTrace(Exception):
    """That a traced module is called with sizes for which its trace does not hold."""


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    export: bool = True,
) -> fx.GraphModule:
    """Traces a module, which is run once and not modified, without in-place operations.

    The result takes and returns what the module does. It is that of the example: containers among
    the arguments have as many elements, and arguments that are no tensors are those values. Where
    :mod:`torch.export` knows it to hold for some sizes only, it raises :class:`OutsideOfTrace` for
    others before it does anything else. Hooks of the module itself are not part of it; a module
    inside that has hooks or a ``forward`` of its own is called as it is.

    Args:
        module: In evaluation mode.
        args: An example of what it is called with.
        kwargs: The same, by name.
        export: Whether :mod:`torch.export` may help, which :mod:`torch.compile` does not survive.

    Returns:
        A graph of torch.fx with the module's own parameters, buffers and submodules.

    Raises:
        UnsupportedModule: Neither :mod:`torch.fx` nor :mod:`torch.export` can trace it.
    """
    kwargs = kwargs or {}
    try:
        return normalise(symbolic(module, args, kwargs))
    except Exception as error:
        first = error
    if not export:
        raise UnsupportedModule(f"{type(module).__name__} cannot be traced: {_line(first)}")
    try:
        exported = _exported(module, args, kwargs)
        interpret(_Annotation(exported), args, kwargs)
        return normalise(exported)
    except Exception as error:
        raise UnsupportedModule(
            f"{type(module).__name__} cannot be traced: {_line(first)}; torch.export: "
            f"{_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Traces a module by :mod:`torch.export`, with any batch, height and width if it can."""
    attempts = [(False, True), (False, False)]
    # A batch of one would be taken for a constant.
    if any(_batch_of_one(value) for value in pytree.tree_leaves((args, kwargs))):
        attempts.insert(0, (True, True))
    error: Exception | None = None
    for two, dynamic in attempts:
        example, named = pytree.tree_map(_twice, (args, kwargs)) if two else (args, kwargs)
        given = inspect.signature(module.forward).bind(*example, **named).arguments
        try:
            with _quietly(), torch.inference_mode(False), torch.no_grad():
                program = torch.export.export(
                    module,
                    example,
                    named,
                    dynamic_shapes=pytree.tree_map(_dynamic, given) if dynamic else None,
                    strict=False,
                )
                return _guarded(_named(program.run_decompositions({}).module()))
        except Exception as raised:
            error = raised
    assert error is not None
    raise error


def _named(exported: fx.GraphModule) -> fx.GraphModule:
    """Has no node claim a module that it is not of."""
    for node in exported.graph.nodes:
        if node.op in ("call_module", "get_attr", "placeholder"):
            node.meta.pop("nn_module_stack", None)
    return exported


class _Guards(nn.Module):
    """What :mod:`torch.export` asserts of the inputs of a graph, with an error of its own.

    Args:
        asserted: A function that raises AssertionError.
    """

    def __init__(self, asserted: Callable[..., None]) -> None:
        super().__init__()
        self._asserted = asserted
        # Nobody reads what it returns: it is kept for what it raises.
        self._is_impure = True

    def forward(self, *inputs: Any) -> None:
        """Checks the inputs.

        Args:
            *inputs: Those of the graph.
        """
        try:
            self._asserted(*inputs)
        except AssertionError as error:
            raise OutsideOfTrace(str(error)) from None


def _guarded(exported: fx.GraphModule) -> fx.GraphModule:
    """Has a graph tell its guards from errors of what it runs."""
    guards = getattr(exported, "_guards_fn", None)
    if guards is not None:
        exported._guards_fn = _Guards(guards.forward)
    return exported


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Says nothing of attempts that may fail, which errors tell of."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _batch_of_one(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if _batch_of_one(value) else value


def _dynamic(value: Any) -> Any:
    """Which sizes of an argument may change."""
    if not isinstance(value, Tensor):
        return None
    auto = torch.export.Dim.AUTO
    return {dim: auto for dim in range(value.dim()) if dim != 1 or value.dim() < 3}


def annotate(traced: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Notes the shape of every value of a graph in ``node.meta``, and makes it the normal form.

    Shapes that :mod:`torch.compile` has noted are taken as they are; otherwise the graph is run
    once.

    Args:
        traced: The graph.
        args: An example of what it is called with.
        kwargs: The same, by name.
    """
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    if all(META in node.meta for node in nodes):
        return
    if all(_noted(node) is not None for node in nodes if node.op != "get_attr"):
        for node in nodes:
            value = _noted(node)
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(traced)
            node.meta[META] = shape_of(value)
    else:
        interpret(_Annotation(traced), args, kwargs)
    normalise(traced)


def interpret(interpreter: fx.Interpreter, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Has a graph interpreted once, on copies of its inputs.

    Args:
        interpreter: What interprets it.
        args: What the graph is called with.
        kwargs: The same, by name.
    """
    traced = cast(fx.GraphModule, interpreter.module)
    args, kwargs = pytree.tree_map(copied, (tuple(args), dict(kwargs)))
    given = list(args)
    if isinstance(traced.graph._codegen, fx.graph._PyTreeCodeGen):
        given = pytree.tree_leaves((args, kwargs))
    else:
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        for node in inputs[len(args) :]:
            given.append(kwargs[node.target] if node.target in kwargs else node.args[0])
    with torch.inference_mode(False), torch.no_grad():
        interpreter.run(*given, enable_io_processing=False)


def _noted(node: fx.Node) -> Any:
    """The value of a node that a compiler made up."""
    return node.meta.get("example_value", node.meta.get("val"))


class _Annotation(fx.Interpreter):
    """Runs a graph and notes the shapes of its values."""

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node."""
        value = super().run_node(n)
        n.meta[META] = shape_of(value)
        return value


def objection(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a node cannot be one of a graph.

    Args:
        traced: What has the node.
        node: A node with the shapes of what it reads; see :func:`annotate`. A parameter is taken
            where who reads it is.

    Returns:
        One line that begins with the node's module, or None.
    """
    if node.op == "get_attr":
        found = [objection(traced, user) for user in node.users]
        return next((reason for reason in found if reason is not None), None)
    if node.op in ("placeholder", "output"):
        return f"{node.name} is an {'input' if node.op == 'placeholder' else 'output'}"
    try:
        operation(traced, node)
    except Unsupported as reason:
        return f"{name_for_people(node)} {reason}"
    return None


def convert(island: fx.GraphModule, training: bool = False) -> Graph:
    """The graph of a module all of whose operations have no objection.

    Args:
        island: The module. Its inputs are maps or vectors of features with noted shapes.
        training: As :func:`.operators.operation` takes it.

    Returns:
        Its graph, with the very parameters; inputs and outputs in their order.

    Raises:
        UnsupportedModule: An operation has an objection, or reads other channels than there are.
    """
    values: dict[fx.Node, int] = {}
    graph: Graph | None = None
    for node in island.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta.get(META)
            channels = shape.shape[1] if shape is not None and len(shape.shape) > 1 else None
            if graph is None:
                graph, values[node] = Graph(channels), 0
            else:
                values[node] = graph.input(channels)
        elif node.op == "output":
            if graph is None:
                raise UnsupportedModule("a graph without inputs")
            results = node.args[0]
            results = results if isinstance(results, (tuple, list)) else (results,)
            if not all(isinstance(result, fx.Node) and result in values for result in results):
                raise UnsupportedModule("an output is none of the graph's values")
            graph.outputs = tuple(values[result] for result in results)
        elif node.op != "get_attr":
            try:
                made = operation(island, node, training)
            except Unsupported as reason:
                raise UnsupportedModule(f"{name_for_people(node)} {reason}") from None
            read = tuple(values[each] for each in made.reads)
            assert graph is not None
            known = len(graph.channels)
            values[node] = made.build(graph, name_for_people(node), read)
            graph.origins.update(dict.fromkeys(range(known, len(graph.channels)), node))
    assert graph is not None
    return graph
