"""Runs a model's forward pass through a fused backend where that changes nothing but its speed.

The compiled plan and the packed weights are kept between calls. Before each call the model is
compared with what they were made from, so that they are never stale.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engines import cuda_graphs, select
from ..engines.base import (
    CompilationFailed,
    Engine,
    Objection,
    PreparedPlan,
    Purpose,
    WantsGradients,
)
from ..engines.cache import CapturedWeights, NetworkPlans
from ..models.validate import check_memory
from ..plan.lower import PlanSource, UnsupportedModule
from .fingerprint import Fingerprint
from .training import CannotTrain, FusedTraining
from .transforms import transformed

if TYPE_CHECKING:
    from ..models.network import Network

__all__ = ["FusedForward", "fused_forward"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_TRAINING = "the model, or a part of it, is in training mode"
_GRADIENTS = "gradients are wanted: use torch.no_grad() or torch.inference_mode()"


class FusedForward:
    """The fused forward pass of one model; an attribute of it.

    Copying or pickling a model gives the copy a new, empty one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot: _PackedModel | None = None
        self._captured = CapturedWeights()
        self._training = FusedTraining()

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        return FusedForward()

    def __reduce__(self) -> tuple[type[FusedForward], tuple[()]]:
        return FusedForward, ()

    def __call__(self, model: Network, x: Tensor, *, head: bool) -> Tensor | None:
        """Runs the model on a fused backend, or returns None where the plain path must run.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.
            head: Whether to return the logits rather than the last features.

        Raises:
            RuntimeError: A fused backend was asked for by name, and it cannot run this.
        """
        request = select.request()
        if request.plain or not (torch.jit.is_tracing() or x.shape[0]):
            return None
        while True:
            try:
                plan, packed = self.prepare(model, x, head=head)
            except WantsGradients as objection:
                try:
                    return self._train(model, x, head=head)
                except CannotTrain as error:
                    if request.automatic:
                        return None
                    raise request.refusal(f"{objection}; {error}") from None
            except Objection as objection:
                if request.automatic:
                    return None
                raise request.refusal(objection) from objection.__cause__
            self._training.release()
            if cuda_graphs.capturing(x.device):
                self._captured.keep(packed)
            try:
                return plan(x, packed)
            except CompilationFailed as error:
                if not request.automatic:
                    raise request.refusal(error) from error.__cause__
                # Another round takes the next engine.
                snapshot = self._snapshot
                if snapshot is None:
                    return None
                snapshot.unsupported[plan.backend] = str(error)

    def explain_training(self, model: Network, x: Tensor) -> tuple[Engine, list[str]]:
        """Returns what would run a call that wants gradients.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.

        Returns:
            The engine, and why parts of the model run plain, a line for each.

        Raises:
            CannotTrain: All of it does, for the reason that the message gives.
        """
        engine, parts = self._training.prepare(model, x, model.checkpoint)
        return engine, parts.reasons

    def _train(self, model: Network, x: Tensor, *, head: bool) -> Tensor:
        """Runs the model with a history for autograd.

        Raises:
            CannotTrain: The plain path must run.
        """
        features = self._training.features(model, x, model.checkpoint)
        return model.forward_head(features) if head else features

    def prepare(self, model: Network, x: Tensor, *, head: bool) -> tuple[PreparedPlan, Any]:
        """Returns the prepared plan for an input and the packed weights, both up to date.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.
            head: Whether to return the logits rather than the last features.

        Raises:
            Objection: The plain path must run; the message says why.
            RuntimeError: ``x`` or a weight spans memory that was freed.
        """
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            raise Objection(f"x is a {type(x).__name__}, a subclass of torch.Tensor")
        if transformed():
            raise Objection("a tracer, a transform or a tensor mode is active")
        if x.device.type in ("cpu", "cuda"):
            check_memory("x", x)
        autocast = select.autocast_dtype(x)
        dtype, weights_dtype = (x.dtype, x.dtype) if autocast is None else (autocast, torch.float32)
        snapshot: _PackedModel | None = None
        objections: list[str] = []
        for name in select.network_backends(x):
            engine = select.engine(name)
            objection: Exception | None = engine.objection(x, autocast, Purpose.NETWORK)
            if objection is None:
                if snapshot is None:
                    snapshot = self._checked(model, x, weights_dtype)
                try:
                    return snapshot.prepared(engine, x, head, dtype)
                except Objection as error:
                    objection = error
            objections.append(str(objection))
        raise Objection("; ".join(objections))

    def _checked(self, model: Network, x: Tensor, dtype: torch.dtype) -> _PackedModel:
        """Returns the model's snapshot, where nothing about the model keeps it from running fused.

        Args:
            model: The model.
            x: Its input.
            dtype: Which the weights must have.

        Raises:
            Objection: The plain path must run on every backend.
        """
        # Before any snapshot, which every step of a training would make anew.
        if model.training:
            raise WantsGradients(_TRAINING)
        if torch.is_grad_enabled() and (x.requires_grad or model._first_weight.requires_grad):
            raise WantsGradients(_GRADIENTS)
        snapshot = self._snapshot
        unchanged = snapshot is not None and snapshot.unchanged(model)
        if snapshot is None or not unchanged:
            snapshot = self._current(model)
        snapshot.check(dtype, unchanged)
        return snapshot

    def _current(self, model: Network) -> _PackedModel:
        snapshot = self._snapshot
        if snapshot is None or not snapshot.matches(model):
            with self._lock:
                snapshot = self._snapshot
                if snapshot is None or not snapshot.matches(model):
                    snapshot = self._snapshot = _PackedModel(model, self._captured)
        return snapshot


def fused_forward(model: Network) -> FusedForward:
    """Returns what runs a model fused.

    Args:
        model: A model of this package.
    """
    run = model._fused
    assert isinstance(run, FusedForward)
    return run


class _PackedModel:
    """What a model was when its weights were packed, and the plans and weights made of it.

    Attributes:
        plans: Those of every engine.
        unsupported: Why there will be none of an engine, by its name.
    """

    def __init__(self, model: Network, captured: CapturedWeights) -> None:
        self._model = model
        self._fingerprint = Fingerprint(model.named_modules(), _HOOKS, contents=True, outer=model)
        tensors = self._fingerprint.tensors
        for tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                kind = f"{type(tensor).__name__} of layout {tensor.layout}"
                raise Objection(f"the model has a parameter or buffer that is a {kind}")
        devices = sorted({str(tensor.device) for tensor in tensors})
        if len(devices) != 1:
            raise Objection(f"the model has weights on {' and '.join(devices)}")
        if any(tensor.is_inference() for tensor in tensors):
            raise Objection("parameters are inference tensors, whose changes cannot be noticed")
        self._fingerprint.take()
        if self._fingerprint.without_memory is not None:
            raise Objection(f"{self._fingerprint.without_memory} has no memory")
        self._parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
        self._dtypes = {tensor.dtype for tensor in tensors}
        self.plans = NetworkPlans(PlanSource(model), captured)
        self.unsupported: dict[str, str] = {}

    def unchanged(self, model: Network) -> bool:
        """Whether :meth:`matches` is true, as far as a quick look tells."""
        return model is self._model and self._fingerprint.unchanged()

    def matches(self, model: Network) -> bool:
        """Whether a model is the one this was made of, and still what it was."""
        return model is self._model and self._fingerprint.same()

    def check(self, dtype: torch.dtype, unchanged: bool) -> None:
        """Raises an Objection for what may differ from call to call.

        Args:
            dtype: Which the weights must have.
            unchanged: What :meth:`unchanged` has said.
        """
        if not unchanged and self._fingerprint.training():
            raise WantsGradients(_TRAINING)
        # A list, as a generator takes twice the time.
        if torch.is_grad_enabled() and any([p.requires_grad for p in self._parameters]):  # noqa: C419
            raise WantsGradients(_GRADIENTS)
        if not unchanged and self._fingerprint.hooked():
            raise Objection("a part of the model has forward hooks")
        if self._dtypes != {dtype}:
            others = ", ".join(sorted(str(other) for other in self._dtypes - {dtype}))
            raise Objection(f"the model has weights of dtype {others}, expected {dtype}")

    def prepared(
        self, engine: Engine, x: Tensor, head: bool, dtype: torch.dtype
    ) -> tuple[PreparedPlan, Any]:
        """The prepared plan of an engine for an input, and the packed weights."""
        if engine.name in self.unsupported:
            raise Objection(self.unsupported[engine.name])
        setting = engine.setting(x.device, dtype)
        try:
            return self.plans.of(engine).get(x.shape, head, setting)
        except (CompilationFailed, UnsupportedModule) as error:
            # On some engines it is of this shape, or of this device, and another may do.
            if engine.remembers_unsupported or isinstance(error, CompilationFailed):
                self.unsupported[engine.name] = str(error)
            raise Objection(str(error)) from None
