"""What an engine is: what it takes, why it objects, what it prepares and computes.

Every engine is one object, which its file registers (:mod:`.registry`). What is asked of engines
elsewhere is asked through these methods; the names of engines are compared nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..plan.ir import Plan

__all__ = [
    "CompilationFailed",
    "Engine",
    "GpuTarget",
    "Objection",
    "PreparedPlan",
    "Purpose",
    "Source",
    "WantsGradients",
]


class Objection(Exception):
    """Why a call cannot run fused, in one line."""


class WantsGradients(Objection):
    """Why a call cannot run as a plan: it is one of a training."""


class CompilationFailed(RuntimeError):
    """Triton cannot compile a kernel for this device, or the device cannot hold it."""


class Purpose(Enum):
    """What an engine is to compute."""

    NETWORK = "networks"
    OPERATOR = "operators"
    TRAINING = "training"


class Source(Protocol):
    """Makes the plans of one network."""

    def __call__(self, shape: Sequence[int] | None, *, head: bool, values: bool) -> Plan:
        """Returns a plan; see :class:`threshnet_fast.plan.lower.PlanSource`."""


class PreparedPlan(Protocol):
    """A plan that an engine has prepared; call it with images and the weights packed for it."""

    backend: str

    def describe(self) -> str:
        """One line: what runs it."""

    @property
    def algorithms(self) -> list[str]:
        """How each step is computed."""

    @property
    def device(self) -> torch.device:
        """Where its weights and its input are."""

    @property
    def packing(self) -> Hashable:
        """Equal for plans of one network that can share packed weights."""

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept for the next calls."""

    def __call__(self, x: Tensor, packed: Any) -> Tensor:
        """Runs the plan."""


class GpuTarget(Protocol):
    """What a plan is prepared for on a GPU; equal where one prepared plan serves for another."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of features and weights."""

    def __hash__(self) -> int: ...


class Engine(ABC):
    """What runs plans, operators or trainings on tensors that are on one type of device.

    Attributes:
        name: What ``use_backend`` calls it.
        fused: Whether it has kernels of its own; plain PyTorch has none.
        place: What messages call its devices, where that is not their type.
        dtypes: What it computes in, for each purpose that it serves.
        converts: Whether it computes in another dtype than a network's input has, for autocast.
        islands: Whether it runs plans of several inputs and outputs, in NHWC at any pitch.
        remembers_unsupported: Whether a network that has no plan for one shape has none for any.
        max_kept_bytes: What prepared plans of one network may keep for their next calls together.
    """

    name: ClassVar[str]
    fused: ClassVar[bool] = True
    place: ClassVar[str | None] = None
    dtypes: ClassVar[Mapping[Purpose, tuple[torch.dtype, ...]]]
    converts: ClassVar[bool] = False
    islands: ClassVar[bool] = False
    remembers_unsupported: ClassVar[bool] = False
    max_kept_bytes: int

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Returns one line saying why this engine cannot run, or None when it can."""

    @abstractmethod
    def device_type(self) -> str:
        """Returns the type of the devices whose tensors it takes; asked where it can run."""

    @abstractmethod
    def describe(self, x: Tensor) -> str:
        """Returns what it computes with, in one line.

        Args:
            x: A tensor that a kernel would read, to which it has no objection.
        """

    def objection(
        self,
        x: Tensor,
        dtype: torch.dtype | None = None,
        purpose: Purpose = Purpose.OPERATOR,
    ) -> Exception | None:
        """Returns the error that this engine would raise for a tensor, or None.

        Its text is the reason wherever one is given, whoever asks.

        Args:
            x: A tensor that a kernel would read: an input, or a weight.
            dtype: What autocast has it compute in; None means the dtype of ``x``.
            purpose: What to compute.
        """
        wanted = x.dtype if dtype is None else dtype
        return self._dtype_objection(x, dtype, purpose) or self._place_objection(x, wanted)

    def _dtype_objection(
        self, x: Tensor, autocast: torch.dtype | None, purpose: Purpose
    ) -> Exception | None:
        allowed = self.dtypes.get(purpose)
        if allowed is None:
            lacks = "trains single operations only"
            if purpose is not Purpose.TRAINING:
                lacks = f"computes no {purpose.value}"
            return RuntimeError(f"backend {self.name!r} {lacks}")
        if autocast is not None and not self.converts:
            return TypeError(
                f"backend {self.name!r} computes in the dtype of its tensors, and autocast is "
                f"enabled: it asks for {autocast}, these are {x.dtype}"
            )
        dtype = x.dtype if autocast is None else autocast
        if dtype in allowed:
            return None
        if len(allowed) == 1:
            return TypeError(f"backend {self.name!r} needs {allowed[0]} tensors, these are {dtype}")
        names = ", ".join(map(str, allowed))
        return TypeError(f"backend {self.name!r} needs one of {names}: these tensors are {dtype}")

    def _place_objection(self, x: Tensor, dtype: torch.dtype) -> Exception | None:
        return self._unavailability() or self._elsewhere(x)

    def _unavailability(self) -> Exception | None:
        reason = self.unavailable_reason()
        if reason is None:
            return None
        return RuntimeError(f"backend {self.name!r} is unavailable: {reason}")

    def _elsewhere(self, x: Tensor) -> Exception | None:
        device_type = self.device_type()
        if x.device.type == device_type:
            return None
        place = self.place or device_type
        return ValueError(
            f"backend {self.name!r} needs tensors on {place}, these are on {x.device}"
        )

    # Networks.

    def setting(self, device: torch.device, dtype: torch.dtype, frozen: Any = None) -> Hashable:
        """Returns what a plan has to be prepared for now, besides its shape.

        Args:
            device: The device of the input.
            dtype: What to compute in.
            frozen: What :meth:`freeze` returned; None follows the environment.
        """
        raise NotImplementedError

    def freeze(self, dtype: torch.dtype, winograd: int) -> Any:
        """Returns what stays the same for all calls of a frozen network.

        Args:
            dtype: Of the network.
            winograd: As :func:`threshnet_fast.environment.winograd_by_default` returns it.
        """
        return None

    def direct(self, setting: Any) -> Hashable | None:
        """Returns a setting whose packed weights serve every shape, where another may be chosen.

        Args:
            setting: As :meth:`setting` returns it; None is returned where it is that already.
        """
        return None

    def prepare(
        self, source: Source, shape: Sequence[int], *, head: bool, setting: Any
    ) -> PreparedPlan:
        """Prepares a network for one input shape, without the values of its weights.

        Args:
            source: Makes the network's plans.
            shape: ``(N, C, H, W)`` of the input.
            head: Whether to end with the logits rather than with the last features.
            setting: As :meth:`setting` returns it.

        Raises:
            UnsupportedModule: The network has no plan, or it is beyond a limit.
        """
        raise NotImplementedError

    def pack(
        self,
        source: Source,
        prepared: Any,
        shape: Sequence[int],
        *,
        head: bool,
        setting: Any,
    ) -> Any:
        """Packs a network's weights for a plan and all others of the same ``packing``.

        Args:
            source: As for :meth:`prepare`.
            prepared: What that returned for the same.
            shape: As there.
            head: As there; weights are always those of the network with its head.
            setting: As there.

        Returns:
            A tensor, or tuples and dataclasses of tensors.

        Raises:
            UnsupportedModule: The network has no plan, or weights that the kernels do not take.
        """
        raise NotImplementedError

    def algorithms(self, prepared: PreparedPlan, plan: Plan) -> tuple[str, ...]:
        """Returns how each step is computed, for people.

        Args:
            prepared: A prepared plan.
            plan: The same plan for the whole batch.
        """
        return tuple(prepared.algorithms)

    # Operators.

    def operator_objection(
        self,
        xs: Sequence[Tensor],
        weight: Tensor,
        shape: Sequence[int],
        padding: int,
        factors: Sequence[Tensor],
    ) -> str | None:
        """Returns what an operator's arguments have that no kernel takes, or None.

        Args:
            xs: The segments.
            weight: The convolution's weight.
            shape: Of the result.
            padding: The convolution's zero padding.
            factors: Weight and scale as far as they are multiplied by padding, where they have
                values.
        """
        for what, (count, most) in self._limits(xs, weight, shape, padding).items():
            if count > most:
                return f"backend {self.name!r} takes at most {most} {what}, these are {count}"
        return None

    def _limits(
        self, xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
    ) -> dict[str, tuple[int, int]]:
        """What is limited: how many there are, and how many there may be."""
        return {}

    def operator(self, name: str, xs: list[Tensor], *arguments: Any) -> Tensor:
        """Computes an operator of :mod:`threshnet_fast.ops`, whose arguments have been checked.

        Args:
            name: Of the operator.
            xs: The segments.
            *arguments: All others, in the operator's order, an activation as whether it is ReLU.
        """
        raise NotImplementedError

    def gradient_engine(self, x: Tensor) -> Engine | None:
        """Returns the engine that has kernels for the gradients of what this one computed.

        Args:
            x: A segment; None is returned where formulas in plain PyTorch have to do.
        """
        return None

    def operator_gradients(
        self, name: str, grad: Tensor, xs: list[Tensor], *arguments: Any
    ) -> list[Tensor]:
        """Computes the gradients that are needed of an operator.

        Args:
            name: Of the operator.
            grad: The gradient of its result.
            xs: The segments.
            *arguments: What the operator saved for its backward pass, and which gradients are
                needed.
        """
        raise NotImplementedError
