"""Prepared plans and packed weights that are kept for the next call.

They belong to a network that does not change. A plan is kept for each input shape, with and without
the head, and for each setting of its engine: the device, the dtype, the number of threads, the
instruction set, the algorithms, the precision, graphs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import cuda_graphs
from .base import Engine, PreparedPlan, Source

__all__ = ["CapturedWeights", "NetworkPlans", "PlanCache", "tensors_of"]

# Prepared plans kept for a network.
_MAX_PLANS = 16

# What the packed weights of a network may take together, in different layouts.
_MAX_PACKED_BYTES = 1 << 30

# Weights that none of the last so many prepared plans used make room for others.
_UNUSED_PLANS = 64

# Input shapes of which is remembered that they keep to direct convolution.
_MAX_DIRECT = 4096

_Key = tuple[torch.Size, bool, Hashable]


class _Cached:
    """A prepared plan, its packed weights, and when it was used last."""

    __slots__ = ("packed", "plan", "used")

    def __init__(self, plan: PreparedPlan, packed: Any, used: int) -> None:
        self.plan = plan
        self.packed = packed
        self.used = used


class PlanCache:
    """An engine's prepared plans and packed weights of a network that does not change.

    The sixteen plans that were used last are kept, fewer where what they keep for their next calls
    would take more than the engine allows.

    The layout of packed weights may depend on the algorithms of the steps, so on the input shape.
    Where weights in another layout would exceed 1 GB together, a shape keeps to those algorithms
    whose one layout serves all shapes, and goes on to do so.

    Calls may come from several threads at once.

    Args:
        engine: What prepares the plans.
        source: Makes the network's plans.
        captured: Where to look for memory that graphs of the caller read; None for nowhere.
    """

    def __init__(
        self, engine: Engine, source: Source, captured: CapturedWeights | None = None
    ) -> None:
        self._engine = engine
        self._source = source
        self._captured = captured
        self._lock = threading.Lock()
        self._plans: dict[_Key, _Cached] = {}
        # By what plans have in common that can share them.
        self._packed: dict[Hashable, Any] = {}
        # The number of the preparation that used them last.
        self._last_use: dict[Hashable, int] = {}
        self._direct: dict[_Key, None] = {}
        self._calls = itertools.count()
        self._preparations = 0

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(map(_bytes_of, self._packed.copy().values()))

    def get(self, shape: torch.Size, head: bool, setting: Hashable) -> tuple[PreparedPlan, Any]:
        """Returns the plan for an input shape, and its weights.

        Args:
            shape: ``(N, C, H, W)`` of the input.
            head: Whether to end with the logits rather than with the last features.
            setting: As :meth:`.base.Engine.setting` returns it.

        Raises:
            UnsupportedModule: The network has no plan, or it is beyond a limit of the engine.
            RuntimeError: Weights would have to be packed while a CUDA graph is captured.
        """
        key = (shape, head, setting)
        # Without the lock, which is held while another thread packs weights.
        cached = self._plans.get(key)
        if cached is None:
            with self._lock:
                cached = self._plans.get(key) or self._add(key)
        cached.used = next(self._calls)
        return cached.plan, cached.packed

    def _add(self, key: _Key) -> _Cached:
        shape, head, setting = key
        engine, source = self._engine, self._source
        self._preparations += 1
        direct = engine.direct(setting)
        if direct is not None and key in self._direct:
            setting, direct = direct, None
        plan = engine.prepare(source, shape, head=head, setting=setting)
        if direct is not None and not self._has_room(plan.packing):
            if len(self._direct) >= _MAX_DIRECT:
                self._direct.pop(next(iter(self._direct)))
            self._direct[key] = None
            setting = direct
            plan = engine.prepare(source, shape, head=head, setting=setting)
        packed = self._packed.get(plan.packing)
        if packed is None:
            packed = self._pack(plan, shape, head, setting)
        self._packed[plan.packing] = packed
        self._last_use[plan.packing] = self._preparations
        cached = self._plans[key] = _Cached(plan, packed, next(self._calls))
        self._forget()
        return cached

    def _pack(self, plan: PreparedPlan, shape: torch.Size, head: bool, setting: Hashable) -> Any:
        if cuda_graphs.capturing(plan.device):
            raise RuntimeError(
                f"weights cannot be packed in {plan.packing} while a CUDA graph is captured: call "
                "the network once before"
            )
        packed = self._engine.pack(self._source, plan, shape, head=head, setting=setting)
        if self._captured is not None:
            packed = self._captured.renewed(packed)
        if plan.device.type == "cuda":
            # The next call may be on another stream.
            torch.cuda.current_stream(plan.device).synchronize()
        return packed

    def _has_room(self, packing: Hashable) -> bool:
        """Whether weights in a layout are there or may be added; removes those long unused."""
        if packing in self._packed or not self._packed:
            return True
        # About as much as those that are there.
        needed = max(map(_bytes_of, self._packed.values()))
        in_use = {id(cached.packed) for cached in self._plans.values()}
        for other in sorted(self._packed, key=self._last_use.__getitem__):
            if self.packed_bytes + needed <= _MAX_PACKED_BYTES:
                break
            unused = self._preparations - self._last_use[other]
            if id(self._packed[other]) not in in_use and unused > _UNUSED_PLANS:
                del self._packed[other], self._last_use[other]
        return self.packed_bytes + needed <= _MAX_PACKED_BYTES

    def _forget(self) -> None:
        """Lets go of the plans that were used least recently."""
        oldest_first = sorted(self._plans, key=lambda key: self._plans[key].used)
        kept = sum(cached.plan.kept_bytes for cached in self._plans.values())
        for key in oldest_first[:-1]:
            if len(self._plans) <= _MAX_PLANS and kept <= self._engine.max_kept_bytes:
                break
            kept -= self._plans.pop(key).plan.kept_bytes


class NetworkPlans:
    """All engines' plans of a network that does not change.

    Args:
        source: Makes the network's plans.
        captured: Where to look for memory that graphs of the caller read; None for nowhere.
    """

    def __init__(self, source: Source, captured: CapturedWeights | None = None) -> None:
        self._source = source
        self._captured = captured
        self._caches: dict[str, PlanCache] = {}

    def of(self, engine: Engine) -> PlanCache:
        """Returns an engine's, which are empty at first.

        Args:
            engine: The engine.
        """
        cache = self._caches.get(engine.name)
        if cache is None:
            # Of two threads, one has made it.
            new = PlanCache(engine, self._source, self._captured)
            cache = self._caches.setdefault(engine.name, new)
        return cache


_Packed = TypeVar("_Packed")


class CapturedWeights:
    """Packed weights that graphs of the caller read whenever they are replayed.

    Nobody tells when such a graph is gone, so the weights stay as long as the model. Weights that
    are packed anew, in the same dtype and for the same shapes, are written over them: there is one
    copy, however often a model changes and is captured again.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, packed: Any) -> None:
        """Keeps weights that a graph of the caller has begun to read.

        Args:
            packed: A tensor, or tuples and dataclasses of tensors.
        """
        self._kept[_form(packed)] = packed

    def renewed(self, packed: _Packed) -> _Packed:
        """Returns packed weights in the memory that graphs read, where there is such.

        Args:
            packed: Weights that were packed just now.
        """
        kept: _Packed | None = self._kept.get(_form(packed))
        if kept is None:
            return packed
        old, new = tensors_of(kept), tensors_of(packed)
        for device in {tensor.device for tensor in old if tensor.device.type == "cuda"}:
            # Whatever has been launched before may still read them.
            torch.cuda.synchronize(device)
        with torch.inference_mode():
            for tensor, values in zip(old, new, strict=True):
                tensor.copy_(values)
        return kept


def tensors_of(packed: Any) -> list[Tensor]:
    """Returns the tensors that packed weights consist of."""
    return [leaf for leaf in _leaves(packed) if isinstance(leaf, Tensor)]


def _form(packed: Any) -> tuple[Hashable, ...]:
    """What packed weights are apart from their values."""
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in _leaves(packed)
    )


def _leaves(packed: Any) -> Iterator[Any]:
    if isinstance(packed, tuple):
        for item in packed:
            yield from _leaves(item)
    elif is_dataclass(packed):
        for field in fields(packed):
            yield from _leaves(getattr(packed, field.name))
    else:
        yield packed


def _bytes_of(packed: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(packed))
