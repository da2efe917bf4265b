"""What runs each step of a network, and why."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..engines.base import CompilationFailed
from ..graph.export import OutsideOfTrace, interpret
from ..plan.ir import Plan, table
from ..plan.lower import UnsupportedModule, lower
from .frozen import FrozenNetwork, optimize
from .host import Host
from .island import FusedIsland

__all__ = ["Explanation", "ForeignOperation", "IslandExplanation", "explain"]

_MEGA = 1e6


@dataclass(frozen=True)
class IslandExplanation:
    """A part of a module that runs fused.

    Attributes:
        name: Which it is of the module's islands.
        operations: How many operations of the module it holds.
        plan: The fused steps, or None where there are none for these shapes.
        algorithms: The algorithm of each step, in the plan's order.
        reason: Why there is no plan; else nothing.
    """

    name: str
    operations: int
    plan: Plan | None
    algorithms: tuple[str | None, ...]
    reason: str = ""

    @property
    def macs(self) -> int:
        """Multiply-adds as usually counted."""
        return 0 if self.plan is None else self.plan.macs

    @property
    def bytes_fused(self) -> int:
        """Bytes of features and weights that the fused steps read and write, in float32."""
        return 0 if self.plan is None else sum(step.bytes_fused for step in self.plan.steps)

    @property
    def bytes_unfused(self) -> int:
        """The same where concatenation, BatchNorm, activation are passes of their own."""
        return 0 if self.plan is None else sum(step.bytes_unfused for step in self.plan.steps)

    def __str__(self) -> str:
        if self.plan is None:
            return f"{self.name}: {self.operations} operations, as plain PyTorch: {self.reason}"
        traffic = f"{self.bytes_fused / _MEGA:.1f} MB read and written"
        return (
            f"{self.name}: {self.operations} operations, {self.macs / _MEGA:.1f} MMAC, {traffic} "
            f"({self.bytes_unfused / _MEGA:.1f} MB unfused)\n{table(self.plan, self.algorithms)}"
        )


@dataclass(frozen=True)
class ForeignOperation:
    """An operation of a module that runs as plain PyTorch.

    Attributes:
        reason: Its name and why.
        macs: Multiply-adds, as PyTorch counts them; 0 of what runs outside of traced parts.
        bytes: Of the tensors that it reads and makes, without weights of modules; as well.
    """

    reason: str
    macs: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.reason}: {self.macs / _MEGA:.1f} MMAC, {self.bytes / _MEGA:.1f} MB"


@dataclass(frozen=True)
class Explanation:
    """How a model would run on an input; prints as a table.

    Attributes:
        backend: The backend that runs the whole network: ``"cpu"``, ``"triton"``, ``"cuda"`` or
            ``"reference"``.
        reason: Why that one.
        algorithms: The algorithm of each step, in the plan's order; all None for the reference.
        plan: The fused steps, or None where the network has no plan as a whole.
        islands: Its fused parts, where it is divided.
        foreign: What runs as plain PyTorch between them.
    """

    backend: str
    reason: str
    algorithms: tuple[str | None, ...]
    plan: Plan | None
    islands: tuple[IslandExplanation, ...] = ()
    foreign: tuple[ForeignOperation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        if self.plan is not None:
            lines.append(table(self.plan, self.algorithms))
        lines += map(str, self.islands)
        if self.foreign:
            lines.append("as plain PyTorch:")
            lines += [f"  {operation}" for operation in self.foreign]
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: nn.Module, x: Any) -> Explanation:
    """Tells which backend and algorithm would run each step of ``model(x)``, and why.

    Of a model of this package it takes the gradient mode, the autocast state and
    :func:`threshnet_fast.use_backend` into account, and runs nothing. What
    :func:`threshnet_fast.optimize` returned is run once; any other module is optimized first, and
    told of as what that makes of it.

    Args:
        model: A module.
        x: An input of it, or a tuple of all positional arguments.

    Returns:
        An object that prints as a table.

    Raises:
        TypeError: ``model`` is no module, or ``x`` is nothing that it takes.
        ValueError: ``x`` has a wrong shape.
        RuntimeError: ``x`` is on another device than the model, or a backend was asked for by name
            that cannot run this.
    """
    from ..engines import select
    from ..engines.base import Objection, WantsGradients
    from ..models.network import Network
    from .dropin import fused_forward
    from .training import CannotTrain

    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if not isinstance(model, Network):
        return _of_any(model, x)
    model._check_input(x)
    plan: Plan | None = None
    if len(x):
        with contextlib.suppress(UnsupportedModule):
            plan = lower(model, x.shape, fold=False)
    nothing = () if plan is None else (None,) * len(plan.steps)
    request = select.request()
    method = model._overridden(head=True)
    if method is not None:
        return Explanation("reference", f"the model has a {method} of its own", nothing, plan)
    if not len(x):
        return Explanation("reference", "x has no images", nothing, plan)
    if request.plain:
        return Explanation("reference", "asked for by use_backend", nothing, plan)
    try:
        prepared, _ = fused_forward(model).prepare(model, x, head=True)
    except WantsGradients as wanted:
        try:
            engine, parts = fused_forward(model).explain_training(model, x)
        except CannotTrain as error:
            reason = str(error)
        else:
            how = f"{wanted}: chains of fused steps, forward and back"
            if parts:
                how += f"; as plain PyTorch: {'; '.join(parts)}"
            return Explanation(engine.name, how, nothing, plan)
        if not request.automatic:
            raise request.refusal(f"{wanted}; {reason}") from None
        return Explanation("reference", f"{wanted}; {reason}", nothing, plan)
    except Objection as objection:
        if not request.automatic:
            raise request.refusal(objection) from None
        return Explanation("reference", str(objection), nothing, plan)
    assert plan is not None
    algorithms = select.engine(prepared.backend).algorithms(prepared, plan)
    return Explanation(prepared.backend, prepared.describe(), algorithms, plan)


def _of_any(module: nn.Module, x: Any) -> Explanation:
    if not isinstance(module, FrozenNetwork):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            module = optimize(module, x)
    if module.network is not None:
        found = explain(module.network, x)
        return Explanation(module.backend, module.reason, found.algorithms, found.plan)
    division = module.division
    if division is None:
        return Explanation(module.backend, module.reason, (), None)
    islands: list[IslandExplanation] = []
    foreign: list[ForeignOperation] = []
    for part, args in division.calls(x if isinstance(x, tuple) else (x,)):
        run = _Run(part.host)
        reason = part.forward.objection(args.args, args.kwargs)
        if reason is None:
            try:
                interpret(run, args.args, args.kwargs)
            except OutsideOfTrace as error:
                reason = str(error)
        if reason is not None:
            name = part.path or type(part.module).__name__
            foreign.append(ForeignOperation(f"{name} runs its own code: {reason}", 0, 0))
            continue
        islands += run.islands
        foreign += run.foreign
    foreign = [*(ForeignOperation(line, 0, 0) for line in division.plain), *foreign]
    return Explanation(module.backend, module.reason, (), None, tuple(islands), tuple(foreign))


class _Run(fx.Interpreter):
    """Runs a module with islands once, and notes what each of its operations is.

    Args:
        host: The module.
    """

    def __init__(self, host: Host) -> None:
        super().__init__(host.traced)
        self._reasons = host.foreign_nodes
        self.islands: list[IslandExplanation] = []
        self.foreign: list[ForeignOperation] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node."""
        reason = self._reasons.get(n.name)
        if reason is None:
            return super().run_node(n)
        # It imports triton, which takes long.
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            result = super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        leaves = tree_leaves((args, kwargs, result))
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        self.foreign.append(ForeignOperation(reason, counter.get_total_flops() // 2, size))
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a submodule."""
        island = self.fetch_attr(target)
        if isinstance(island, FusedIsland):
            self.islands.append(_island(island, args))
        return super().call_module(target, args, kwargs)


def _island(island: FusedIsland, xs: tuple[Any, ...]) -> IslandExplanation:
    try:
        plan, algorithms = island.explain(*xs)
    except (CompilationFailed, UnsupportedModule) as error:
        return IslandExplanation(island.name, island.nodes, None, (), str(error))
    return IslandExplanation(island.name, island.nodes, plan, algorithms)
