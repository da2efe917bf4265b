"""Runs the part of a model that makes its features through chains, where gradients are wanted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..autograd.chain import CHECKPOINTS, Chain
from ..engines import select
from ..engines.base import Engine
from ..graph.ir import UnsupportedModule
from ..graph.modules import split_stages
from ..plan.raw import Convolution
from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from ..models.network import Network

__all__ = ["HOOKS", "CannotTrain", "FusedTraining", "objection_to"]

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes of modules with hooks that chains would not run."""


class CannotTrain(Exception):
    """Why a model's features cannot be calculated by chains, in one line."""


class FusedTraining:
    """The chains of one model; an attribute of it.

    They are made again when the model's modules have changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: _Parts | None = None
        self._has_run = False

    def features(self, model: Network, x: Tensor, checkpoint: str | None) -> Tensor:
        """The last feature map of a model, with a history for autograd.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.
            checkpoint: As :meth:`Chain.__call__` takes it.

        Raises:
            CannotTrain: Plain PyTorch must run.
            ValueError: ``checkpoint`` is neither None nor ``"features"``, or a norm in training
                mode has only one value for each channel.
        """
        _, parts = self.prepare(model, x, checkpoint)
        self._has_run = True
        return parts.run(x, checkpoint)

    def release(self) -> None:
        """Lets go of the memory that is kept for the next step."""
        if self._has_run:
            self._has_run = False
            if self._parts is not None:
                self._parts.release()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the memory that is kept for the next step."""
        return 0 if self._parts is None else self._parts.kept_bytes

    def prepare(self, model: Network, x: Tensor, checkpoint: str | None) -> tuple[Engine, _Parts]:
        """Makes sure that :meth:`features` can run, and runs nothing.

        Args:
            model: As there.
            x: As there.
            checkpoint: As there.

        Returns:
            What runs the chains, and the chains with the modules between them.

        Raises:
            CannotTrain: As there.
            ValueError: ``checkpoint`` is neither None nor ``"features"``.
        """
        if checkpoint not in CHECKPOINTS:
            raise ValueError(f"checkpoint is {checkpoint!r}: expected one of {CHECKPOINTS}")
        engine, reason = select.training_engine(x)
        if engine is None:
            raise CannotTrain(reason)
        parts = self._parts
        if parts is None or not parts.unchanged(model):
            if parts is None or not parts.match(model):
                with self._lock:
                    parts = self._parts = _Parts(model)
            parts.check()
        parts.check_input(x)
        return engine, parts


class _Parts:
    """A model's stages, as chains and as the modules between them.

    Attributes:
        reasons: Why each of the modules is in no chain.
    """

    def __init__(self, model: Network) -> None:
        for name, container in model._containers():
            if type(container) is not nn.Sequential or "forward" in container.__dict__:
                raise CannotTrain(f"{name} is not exactly a Sequential")
        modules: list[tuple[str, nn.Module]] = list(model._containers())
        for stage, root in model._stages():
            modules += [
                (f"{stage}.{path}".rstrip("."), part) for path, part in root.named_modules()
            ]
        # Weakly, so that a model without other owners is gone at once.
        self._model = weakref.ref(model)
        self._fingerprint = Fingerprint(
            modules, HOOKS, contents=False, holders=[model, *model.children()]
        )
        found = self._fingerprint
        self._objection = objection_to(zip(found.names, found.tensors, strict=True))
        self._with_inference = any(t.is_inference() for t in self._fingerprint.tensors)
        if self._objection is None and not self._with_inference:
            self._fingerprint.take()
        self._parts, self.reasons = _divide(split_stages(model._stages()))
        if not any(isinstance(part, Chain) for part in self._parts):
            raise CannotTrain("no part of the model can be trained fused")

    def unchanged(self, model: Network) -> bool:
        """Whether :meth:`match` is true and :meth:`check` passes, as far as a quick look tells."""
        return model is self._model() and self._fingerprint.unchanged()

    def match(self, model: Network) -> bool:
        """Whether the model is still made of the same modules, and they of the same settings.

        Raises:
            RuntimeError: A parameter or buffer spans memory that was freed.
        """
        return model is self._model() and self._fingerprint.same()

    def check(self) -> None:
        """Refuses what the model is, or what may differ from call to call.

        Raises:
            CannotTrain: Plain PyTorch must run.
        """
        if self._fingerprint.hooked():
            raise CannotTrain("a part of the model has hooks")
        if self._objection is not None:
            raise CannotTrain(self._objection)
        if self._with_inference and not torch.is_inference_mode_enabled():
            raise CannotTrain("the model has inference tensors")
        if self._fingerprint.without_memory is not None:
            raise CannotTrain(f"{self._fingerprint.without_memory} has no memory")

    def check_input(self, x: Tensor) -> None:
        """Refuses an input whose gradient is wanted where there is none.

        Args:
            x: The input.

        Raises:
            CannotTrain: Plain PyTorch must run.
        """
        first = self._parts[0]
        wanted = torch.is_grad_enabled() and x.requires_grad
        if wanted and isinstance(first, Chain) and not first.differentiable_input:
            raise CannotTrain("the gradient of the images is wanted, through a stride")

    @property
    def kept_bytes(self) -> int:
        """Bytes of the memory that is kept for the next step."""
        return sum(part.pool.nbytes for part in self._parts if isinstance(part, Chain))

    def release(self) -> None:
        """Lets go of the memory that is kept for the next step."""
        for part in self._parts:
            if isinstance(part, Chain):
                part.pool.clear()

    def run(self, x: Tensor, checkpoint: str | None) -> Tensor:
        """The last feature map."""
        after_chain = False
        for part in self._parts:
            if isinstance(part, Chain):
                x = part(x, checkpoint)
            elif after_chain and _works_in_place(part):
                # The chain's own memory, which its backward pass reads.
                x = part(x.clone())
            else:
                x = part(x)
            after_chain = isinstance(part, Chain)
        return x


def objection_to(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """What keeps chains from reading some tensors of a model, or None.

    Args:
        tensors: Their names and themselves.
    """
    for path, tensor in tensors:
        name = path.rpartition(".")[2]
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
            return (
                f"the model has a {name} of dtype {tensor.dtype} on {tensor.device}, expected "
                "float32 on the CPU"
            )
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"the model has a {name} of type {type(tensor).__name__}"
    return None


def _works_in_place(module: nn.Module) -> bool:
    return any(getattr(part, "inplace", False) for part in module.modules())


def _divide(stages: list[tuple[str, nn.Module]]) -> tuple[list[Chain | nn.Module], list[str]]:
    """Makes chains that are as long as possible of modules that run one after the other.

    Returns:
        The chains and the modules between them, and of each of those why it is in none.
    """
    parts: list[Chain | nn.Module] = []
    reasons: list[str] = []
    position = 0
    while position < len(stages):
        chain, end, reason = _longest_chain(stages, position, differentiable=position > 0)
        if chain is None:
            parts.append(stages[position][1])
            reasons.append(reason)
            position += 1
        else:
            parts.append(chain)
            position = end
    return parts, reasons


def _longest_chain(
    stages: list[tuple[str, nn.Module]], begin: int, *, differentiable: bool
) -> tuple[Chain | None, int, str]:
    """The longest chain from a stage on, and where the stages begin that are not part of it.

    Returns:
        Those two, or None, the stage itself, and why it begins no chain.
    """
    best: Chain | None = None
    end = begin
    reason = f"{stages[begin][0]} begins no chain with a convolution and a gradient of its input"
    # Most networks are one chain, which is quickly found where it is looked for first.
    for last in (len(stages), *range(begin + 1, len(stages))):
        try:
            chain = Chain(stages[begin:last], None)
        except UnsupportedModule as error:
            if last == begin + 1:
                reason = str(error)
            if last == len(stages):
                continue
            # A stage that cannot end a chain may be part of one: a BatchNorm before its ReLU can
            # do both, so none that fails is passed over.
            break
        useful = any(isinstance(node, Convolution) for node in chain.plan.nodes)
        if useful and (chain.differentiable_input or not differentiable):
            best, end = chain, last
            if last == len(stages):
                break
    return best, end, reason
