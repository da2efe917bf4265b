"""A module divided: it, or parts of it, are traced and run in islands."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..engines.base import CompilationFailed, Engine
from ..graph.export import OutsideOfTrace
from ..graph.ir import UnsupportedModule
from ..graph.trace import hooked
from .host import Arguments, Host, NothingToFuse, summary_of
from .island import FusedIsland

__all__ = ["Division", "Part", "divide", "restore"]

# Of the largest output. Float32 in different orders of additions stays far below; bfloat16 keeps
# eight bits of each feature map.
_TOLERANCE = {torch.float32: 1e-3}
_COARSE = 5e-2


class _Forward:
    """The forward of a part: its host, where it is called as on the example.

    Args:
        host: What runs it.
        module: The part.
        example: What it was called with.
    """

    def __init__(self, host: Host, module: nn.Module, example: Arguments) -> None:
        self.host, self._module = host, module
        self._others = _others(example.args, example.kwargs)
        self._warned = False

    def objection(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why a call is none that was traced: containers, or what is no tensor, are others."""
        if _others(args, kwargs) == self._others:
            return None
        return "its arguments are not as in the example"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self.objection(args, kwargs)
        if reason is None:
            try:
                return self.host(*args, **kwargs)
            except OutsideOfTrace as error:
                reason = str(error)
        if not self._warned:
            self._warned = True
            name = type(self._module).__name__
            warnings.warn(f"{name} runs as plain PyTorch: {reason}", UserWarning, stacklevel=2)
        return type(self._module).forward(self._module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A copy is divided anew.
        return _removed, ()


class Part(NamedTuple):
    """A module that runs in islands.

    Attributes:
        path: Its path in the whole, empty for the whole.
        module: It.
        forward: What runs it.
    """

    path: str
    module: nn.Module
    forward: _Forward

    @property
    def host(self) -> Host:
        """The module with its islands."""
        return self.forward.host


_REMOVED = object()


def _removed() -> object:
    return _REMOVED


class Division:
    """A module whose own code, or a trace of it, runs with islands.

    Args:
        module: The module, in evaluation mode; it must not change from now on.
        parts: Modules in it that are not within each other, or within hooked ones; of those that
            are not the whole, the forward has been replaced.
        plain: Why what is in no part runs as plain PyTorch, one line for each operation.

    Attributes:
        parts: As given.
        islands: Of all parts.
        foreign: Why each other operation is in none, one line each.
        plain: As given.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: tuple[Part, ...],
        plain: tuple[str, ...],
    ) -> None:
        self.parts = parts
        self.plain = plain
        self._module = module
        self._run: Any = module
        for part in parts:
            if part.module is module:
                self._run = part.forward
        self.islands: tuple[FusedIsland, ...] = tuple(
            island for part in parts for island in part.host.islands
        )
        for number, island in enumerate(self.islands):
            island.name = f"island_{number}"
        self.foreign = (*plain, *(line for part in parts for line in part.host.foreign))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self._run(*args, **kwargs)

    def undo(self) -> None:
        """Gives parts of the module their own forwards back."""
        for part in self.parts:
            part.module.__dict__.pop("forward", None)

    def calls(self, args: tuple[Any, ...]) -> Iterator[tuple[Part, Arguments]]:
        """Returns the parts that run when the module does, and what they are called with first.

        Args:
            args: What the module is called with.
        """
        whole = Arguments(args)
        others = [part.module for part in self.parts if part.module is not self._module]
        found = _calls(self, whole, others) if others else {}
        for part in self.parts:
            if part.module is self._module:
                yield part, whole
            elif part.module in found:
                yield part, found[part.module]

    def summary(self) -> str:
        """One line: how much of the module is fused."""
        held = sum(island.nodes for island in self.islands)
        count = len(self.islands)
        text = f"{held} operations in {count} island{'s' if count != 1 else ''}"
        foreign = summary_of(self.foreign)
        return text if not foreign else f"{text}; as plain PyTorch: {foreign}"

    def difference(self, example: Arguments, expected: Any) -> str | None:
        """Returns what it and the module itself differ in on an input, or None.

        Args:
            example: The input.
            expected: What the module returns for it.
        """
        actual = example.call(self)
        ours, form = tree_flatten(actual)
        theirs, other_form = tree_flatten(expected)
        if form != other_form:
            return "it returns something else"
        for a, b in zip(ours, theirs, strict=True):
            if not isinstance(b, Tensor):
                if not isinstance(a, type(b)) or a != b:
                    return "it returns something else"
                continue
            if not isinstance(a, Tensor) or a.shape != b.shape:
                return "it returns something else"
            if not b.is_floating_point():
                continue
            wide, limit = b.float(), _TOLERANCE.get(a.dtype, _COARSE)
            largest = float(wide.abs().nan_to_num(0, 0, 0).max()) if wide.numel() else 0.0
            if not torch.allclose(a.float(), wide, rtol=0, atol=limit * largest, equal_nan=True):
                return "it computes something else"
        return None


def divide(
    module: nn.Module, example: Arguments, engine: Engine, dtype: torch.dtype, winograd: int
) -> Division:
    """Divides a module.

    It is traced as a whole. Where that fails, because its code depends on values say, its own code
    runs, and each of the modules that it calls is divided in the same way. So is a module in it
    that has hooks, which run around it.

    Args:
        module: A copy that belongs to what is made here, in evaluation mode.
        example: What it is called with.
        engine: What computes the islands.
        dtype: Of the maps that islands take and make.
        winograd: As :func:`threshnet_fast.environment.winograd_by_default` returns it.

    Raises:
        UnsupportedModule: It has no island.
    """
    parts: list[Part] = []
    plain: list[str] = []

    def visit(path: str, part: nn.Module, called: Arguments) -> str | None:
        """Adds a module, or what is in it; returns why it is not traced as a whole."""
        inside = _outermost(part, hooked)
        examples = _calls(part, called, inside.values()) if inside else {}
        for name, child in inside.items():
            if child in examples:
                visit(f"{path}.{name}".lstrip("."), child, examples[child])
        if part is not module and "forward" in part.__dict__:
            return f"{path} has a forward of its own"
        try:
            host = Host(part, called, engine, dtype, winograd)
        except NothingToFuse as error:
            plain.extend(error.foreign)
            return None
        except (CompilationFailed, UnsupportedModule) as error:
            reason = str(error)
        else:
            forward = _Forward(host, part, called)
            parts.append(Part(path, part, forward))
            if part is not module:
                part.__dict__["forward"] = forward
            return None
        children = _outermost(part, lambda child: child not in inside.values())
        examples = _calls(part, called, children.values())
        for name, child in _called(part, examples):
            visit(f"{path}.{name}".lstrip("."), child, examples[child])
        return reason

    reason = visit("", module, example)
    if not parts:
        raise UnsupportedModule(reason or summary_of(tuple(plain)) or "the module computes nothing")
    if reason is not None:
        plain.insert(0, f"the module's own code runs: {reason}")
    return Division(module, tuple(parts), tuple(plain))


def restore(module: nn.Module) -> nn.Module:
    """Returns a copy of a divided module with the forwards that its parts had.

    Args:
        module: The copy.
    """
    for part in module.modules():
        if part.__dict__.get("forward") is _REMOVED:
            del part.__dict__["forward"]
    return module


def _outermost(module: nn.Module, wanted: Any) -> dict[str, nn.Module]:
    """Modules in another that are wanted and not within each other, by their paths."""
    found: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        within = any(path.startswith(f"{other}.") for other in found)
        if path and not within and wanted(part):
            found[path] = part
    return found


def _called(module: nn.Module, examples: dict[nn.Module, Arguments]) -> Iterator[tuple[str, Any]]:
    """The outermost modules in another that were called, by their paths."""
    yield from _outermost(module, examples.__contains__).items()


def _calls(module: Any, example: Arguments, parts: Any) -> dict[nn.Module, Arguments]:
    """What parts of a module are called with first, when it runs on an example."""
    found: dict[nn.Module, Arguments] = {}

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(part, Arguments(args, kwargs).map(torch.clone))

    every = {child for part in parts for child in part.modules()}
    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in every]
    try:
        example.call(module)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _others(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What some arguments are apart from tensors."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return ()
    leaves, form = tree_flatten((args, kwargs))
    return (str(form), *(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves))
