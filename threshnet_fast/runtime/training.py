"""Runs the part of a model that makes its features through chains, where gradients are wanted."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..autograd.chain import CHECKPOINTS, Chain
from ..engines import select
from ..engines.base import Engine
from ..graph.ir import UnsupportedModule
from ..graph.modules import split_stages
from ..graph.settings import ModuleSettings
from ..models.validate import check_memory, has_memory
from ..plan.raw import Convolution

if TYPE_CHECKING:
    from ..models.network import Network

__all__ = ["CannotTrain", "FusedTraining"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


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
        if parts is None or not parts.match(model):
            with self._lock:
                parts = self._parts = _Parts(model)
        parts.check(x)
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
        modules: list[nn.Module] = [container for _, container in model._containers()]
        modules += [module for _, stage in model._stages() for module in stage.modules()]
        self._stages = [module for _, module in model._stages()]
        self._settings = ModuleSettings(modules, _HOOKS)
        self._children = [module._modules for module in modules]
        self._child_modules = [tuple(children.values()) for children in self._children]
        self._hooks: list[dict[int, Any]] = [
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
            torch_module._global_backward_hooks,
            torch_module._global_backward_pre_hooks,
        ]
        self._hooks += [getattr(module, name) for module in modules for name in _HOOKS]
        slots = [
            (f"{stage}.{path}.{name}".replace("..", "."), tensors, name)
            for stage, root in model._stages()
            for path, module in root.named_modules()
            for tensors in (module._parameters, module._buffers)
            for name in tensors
            if name != "num_batches_tracked"
        ]
        self._names = [path for path, _, _ in slots]
        self._slots = [(tensors, name) for _, tensors, name in slots]
        # Where all of them had memory.
        self._addresses: list[int | None] | None = None
        self._shapes = self._find_shapes()
        self._parts, self.reasons = _divide(split_stages(model._stages()))
        if not any(isinstance(part, Chain) for part in self._parts):
            raise CannotTrain("no part of the model can be trained fused")

    def match(self, model: Network) -> bool:
        """Whether the model is still made of the same modules, and they of the same settings."""
        return (
            [module for _, module in model._stages()] == self._stages
            and [tuple(children.values()) for children in self._children] == self._child_modules
            and self._settings.same()
            and self._find_shapes() == self._shapes
        )

    def _find_shapes(self) -> list[torch.Size | None]:
        """The shapes of parameters and buffers, None for those that are not there."""
        tensors = [tensors.get(name) for tensors, name in self._slots]
        return [None if tensor is None else tensor.shape for tensor in tensors]

    def check(self, x: Tensor) -> None:
        """Refuses what may differ from call to call.

        Args:
            x: The input.

        Raises:
            CannotTrain: Plain PyTorch must run.
        """
        if any(self._hooks):
            raise CannotTrain("a part of the model has hooks")
        first = self._parts[0]
        wanted = torch.is_grad_enabled() and x.requires_grad
        if wanted and isinstance(first, Chain) and not first.differentiable_input:
            raise CannotTrain("the gradient of the images is wanted, through a stride")
        for tensors, name in self._slots:
            tensor = tensors.get(name)
            if tensor is None:
                continue
            if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
                raise CannotTrain(
                    f"the model has a {name} of dtype {tensor.dtype} on {tensor.device}, expected "
                    "float32 on the CPU"
                )
            if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
                raise CannotTrain(f"the model has a {name} of type {type(tensor).__name__}")
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise CannotTrain("the model has inference tensors")
        self._check_memory()

    def _check_memory(self) -> None:
        """Refuses parameters and buffers whose memory was freed.

        Raises:
            CannotTrain: One has none, which a hook may change.
            RuntimeError: One spans more than there is.
        """
        found = [tensors.get(name) for tensors, name in self._slots]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in found]
        if addresses == self._addresses:
            return
        for name, tensor in zip(self._names, found, strict=True):
            if tensor is not None:
                if not has_memory(tensor):
                    raise CannotTrain(f"{name} has no memory")
                check_memory(name, tensor)
        self._addresses = addresses

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
