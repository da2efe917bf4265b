"""The backend of :func:`torch.compile`: islands run fused, the rest as it is or by inductor."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from .. import environment
from ..engines import select
from ..engines.base import CompilationFailed, Purpose
from ..graph.captured import unlift
from ..graph.ir import UnsupportedModule
from .fingerprint import Fingerprint
from .host import Arguments, Host
from .island import FusedIsland

__all__ = ["compile_graph"]

_REST = ("eager", "inductor")


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles what :func:`torch.compile` has captured; ``backend="threshnet_fast"``.

    What plans can express of it runs fused in inference; islands are compiled for each size of
    their inputs, so that a batch may change. Weights are compared with those that were packed
    before each call. Where gradients are wanted, or there is nothing to fuse, all of it is left to
    what ``rest`` names.

    Args:
        graph: What was captured.
        example_inputs: Its inputs.
        mode: Nothing that this backend knows; must be None.
        options: ``"rest"``, ``"eager"`` (the default) or ``"inductor"``: what runs all that is in
            no island; and ``"exact"``, as :func:`threshnet_fast.optimize` takes it.

    Returns:
        What takes the inputs and returns what ``graph`` does.

    Raises:
        ValueError: An option or the mode is none of these.
    """
    given = dict(options or {})
    rest, exact = given.pop("rest", "eager"), given.pop("exact", False)
    if given or mode is not None:
        other = f"mode {mode!r}" if mode is not None else f"options {sorted(given)}"
        raise ValueError(f"backend 'threshnet_fast' has {other}: expected 'rest' and 'exact'")
    if rest not in _REST:
        raise ValueError(f"option 'rest' is {rest!r}: expected one of {_REST}")
    if not isinstance(exact, bool):
        raise ValueError(f"option 'exact' is {exact!r}: expected True or False")
    wanted = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad
        for value in itertools.chain(example_inputs, graph.parameters())
    )
    if not wanted:
        winograd = 0 if exact else environment.winograd_by_default()
        try:
            return _Compiled(graph, example_inputs, winograd, rest)
        except (CompilationFailed, UnsupportedModule):
            pass
    return _left_alone(graph, example_inputs, rest)


def _left_alone(graph: fx.GraphModule, inputs: Sequence[Any], rest: str) -> Callable[..., Any]:
    if rest == "eager":
        return graph.forward
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(graph, list(inputs)))


class _Compiled:
    """A captured graph with islands, made anew when weights have changed.

    Args:
        graph: What was captured.
        inputs: Its inputs.
        winograd: As :func:`threshnet_fast.environment.winograd_by_default` returns it.
        rest: What runs all that is in no island.

    Raises:
        UnsupportedModule: There is nothing to fuse.
    """

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[Any], winograd: int, rest: str
    ) -> None:
        self._graph, self._winograd, self._rest = graph, winograd, rest
        self._lock = threading.Lock()
        self._prepare(inputs)

    def __call__(self, *inputs: Any) -> Any:
        if not self._current(inputs):
            with self._lock:
                if not self._current(inputs):
                    self._prepare(inputs)
        with torch.no_grad():
            return self._host(*[inputs[index] for index in self._positions])

    def _prepare(self, inputs: Sequence[Any]) -> None:
        """Packs the weights that are among some inputs, or belong to the graph."""
        traced, self._positions = unlift(self._graph, inputs)
        varying = set(self._positions)
        self._weights = [
            (index, value) for index, value in enumerate(inputs) if index not in varying
        ]
        self._fingerprint = Fingerprint(traced.named_modules(), (), contents=True)
        weight = next((t for t in self._fingerprint.tensors if t.is_floating_point()), None)
        if weight is None:
            raise UnsupportedModule("there are no weights")
        self._fingerprint.take()
        for name in select.network_backends(weight):
            engine = select.engine(name)
            if engine.objection(weight, purpose=Purpose.NETWORK) is None:
                break
        else:
            raise UnsupportedModule("no engine takes the weights")
        example = Arguments(tuple(inputs[index] for index in self._positions))
        host = Host(traced, example, engine, weight.dtype, self._winograd, export=False)
        if self._rest == "inductor":
            host.replace(_with_inductor(host.traced))
        self._host = host

    def _current(self, inputs: Sequence[Any]) -> bool:
        return all(inputs[index] is value for index, value in self._weights) and (
            self._fingerprint.unchanged() or self._fingerprint.same()
        )


def _with_inductor(traced: fx.GraphModule) -> fx.GraphModule:
    """Has inductor compile what lies between islands, once it is called."""
    # Each island is a part of its own, and so is each stretch of nodes between two.
    parts: dict[fx.Node, int] = {}
    current = 0
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if _is_island(traced, node):
            parts[node] = current + 1
            current += 2
        else:
            parts[node] = current
    split = split_module(traced, cast(nn.Module, traced), lambda node: parts[node])
    for name, child in list(split.named_children()):
        part = cast(fx.GraphModule, child)
        called = [node for node in part.graph.nodes if node.op.startswith("call")]
        if called and not any(_is_island(part, node) for node in called):
            setattr(split, name, torch.compile(part, backend="inductor"))
    return split


def _is_island(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), FusedIsland
    )
