"""What runs each step of a network, and why."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch import Tensor, nn

from ..plan.ir import Plan, table
from ..plan.lower import UnsupportedModule, lower

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """How a model would run on an input; prints as a table.

    Attributes:
        backend: The backend that runs the whole network: ``"cpu"``, ``"triton"``, ``"cuda"`` or
            ``"reference"``.
        reason: Why that one.
        algorithms: The algorithm of each step, in the plan's order; all None for the reference.
        plan: The fused steps, or None where the network has no plan.
    """

    backend: str
    reason: str
    algorithms: tuple[str | None, ...]
    plan: Plan | None

    def __str__(self) -> str:
        text = f"{self.backend}: {self.reason}"
        return text if self.plan is None else f"{text}\n{table(self.plan, self.algorithms)}"

    __repr__ = __str__


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Tells which backend and algorithm would run each step of ``model(x)``, and why.

    Takes the gradient mode, the autocast state and :func:`threshnet_fast.use_backend` into account,
    and runs nothing.

    Args:
        model: A model of this package.
        x: An input of it.

    Returns:
        An object that prints as a table.

    Raises:
        TypeError: ``model`` is no model of this package, or ``x`` is nothing that it takes.
        ValueError: ``x`` has a wrong shape.
        RuntimeError: ``x`` is on another device than the model, or a backend was asked for by name
            that cannot run this.
    """
    from ..engines import select
    from ..engines.base import Objection, WantsGradients
    from ..models.network import Network
    from .dropin import fused_forward
    from .training import CannotTrain

    if not isinstance(model, Network):
        raise TypeError(f"model is a {type(model).__name__}: expected a model of threshnet_fast")
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
