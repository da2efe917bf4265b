"""Chooses the engine, and says why.

A request comes from an argument (``backend="cpu"``) or from :func:`use_backend`. An explicit
request is served or refused with an error; ``"auto"`` takes the first engine that has no objection
and keeps the objections of those it passed over, in the order in which they are registered for the
device: on a GPU ``"triton"``, then ``"cuda"``.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import cpu, cuda, reference, registry, triton  # noqa: F401  Engines register themselves.
from .base import Engine, Purpose
from .registry import engine

__all__ = [
    "AUTO",
    "Choice",
    "Request",
    "autocast_dtype",
    "check_name",
    "choose",
    "dtypes_of_networks",
    "engine",
    "is_for",
    "is_plain",
    "names",
    "network_backends",
    "request",
    "requested_backend",
    "training_engine",
    "use_backend",
]

AUTO = "auto"
"""What is asked for where nothing is."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        name: An engine's, or :data:`AUTO`.
        automatic: Whether nothing is asked for, so that plain PyTorch runs what no engine can.
        plain: Whether plain PyTorch is asked for.
    """

    name: str
    automatic: bool
    plain: bool

    def refusal(self, reason: object) -> RuntimeError:
        """Returns the error of a call that cannot run as it was asked for.

        Args:
            reason: Why.
        """
        return RuntimeError(f"backend {self.name!r} cannot run this call: {reason}")


_NOTHING = Request(AUTO, True, False)

_requested: contextvars.ContextVar[Request] = contextvars.ContextVar(
    "threshnet_fast_backend", default=_NOTHING
)


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for taking it.

    Attributes:
        backend: Name of the backend that runs, never ``"auto"``.
        reason: One line: what was asked for, and what objected to the backends passed over.
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def check_name(name: object, argument: str = "backend") -> str:
    """Returns ``name`` when it is a backend that can be asked for.

    Args:
        name: What the caller passed.
        argument: The argument's name, for the message.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If no backend has that name; the nearest one is suggested.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} is a {type(name).__name__}: expected one of {_listed()}")
    if name not in names():
        nearest = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{argument} is {name!r}: expected one of {_listed()}{hint}")
    return name


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Asks for a backend within a ``with`` block, or within a function it decorates.

    The setting belongs to the current thread and to the current asynchronous task: others keep
    their own. Blocks nest. A compiled function reads the setting when it runs, so the block goes
    around the call of the compiled function, not inside of it.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``: the C++ kernels,
            which compute results but no gradients.

    Returns:
        A context manager that restores the previous setting at its end.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If no backend has that name.
    """
    return _scope(check_name(name, "name"))


@contextlib.contextmanager
def _scope(name: str) -> Iterator[None]:
    token = _requested.set(_request_for(name))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """Returns what :func:`use_backend` asks for here, ``"auto"`` outside of any."""
    return _requested.get().name


def request(backend: str | None = None) -> Request:
    """Returns what is asked for here.

    Args:
        backend: A name that goes before what :func:`use_backend` asks for.
    """
    return _requested.get() if backend is None else _request_for(backend)


def is_plain(name: str) -> bool:
    """Returns whether a name is that of plain PyTorch.

    Args:
        name: One of :func:`names`.
    """
    return _request_for(name).plain


def is_for(name: str, device_type: str) -> bool:
    """Returns whether an engine is one that ``"auto"`` asks on a type of device.

    Args:
        name: One of :func:`names`.
        device_type: As of :class:`torch.device`.
    """
    return name in registry.automatic(device_type)


def names() -> tuple[str, ...]:
    """Returns every name that can be asked for."""
    return (AUTO, *registry.names())


def choose(xs: Sequence[torch.Tensor], requested: str | None = None) -> Choice:
    """Chooses the backend of an operator.

    Args:
        xs: The tensors that the operator reads, all of one dtype and on one device.
        requested: A backend's name; None takes what :func:`use_backend` asks for.

    Returns:
        The backend and the reason for it.

    Raises:
        TypeError: If the backend asked for does not compute in this dtype.
        ValueError: If there is no such backend, or it does not run on this device.
        RuntimeError: If the backend asked for is not built or cannot be loaded.
    """
    asked_by = "use_backend" if requested is None else "the argument backend"
    wanted = request(None if requested is None else check_name(requested))
    if wanted.plain:
        return Choice(wanted.name, f"asked for by {asked_by}")
    passed_over: list[str] = []
    for name in _fused_backends(wanted.name, xs[0]):
        error = engine(name).objection(xs[0])
        if error is None:
            how = "first of 'auto'" if wanted.automatic else f"asked for by {asked_by}"
            if passed_over:
                how = f"{'; '.join(passed_over)}; next of 'auto'"
            return Choice(name, f"{how}; {engine(name).describe(xs[0])}")
        if not wanted.automatic:
            raise error
        passed_over.append(str(error))
    return Choice(reference.ENGINE.name, "; ".join(passed_over))


def network_backends(x: torch.Tensor) -> tuple[str, ...]:
    """Returns the fused engines to try for a network's input, in order, by name.

    Args:
        x: The input; :func:`use_backend` does not ask for ``"reference"``.
    """
    return _fused_backends(_requested.get().name, x)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Returns what autocast has a network compute in, or None where that is not enabled.

    Args:
        x: The network's input.
    """
    device_type = x.device.type
    try:
        enabled = torch.is_autocast_enabled(device_type)
    except RuntimeError:
        # There is no autocast for such a device.
        return None
    return torch.get_autocast_dtype(device_type) if enabled else None


def dtypes_of_networks() -> tuple[torch.dtype, ...]:
    """Returns what any engine computes networks in, by name."""
    dtypes = {
        dtype
        for name in registry.names()
        if engine(name).fused
        for dtype in engine(name).dtypes.get(Purpose.NETWORK, ())
    }
    return tuple(sorted(dtypes, key=str))


def training_engine(x: torch.Tensor) -> tuple[Engine | None, str]:
    """Returns the engine that trains a network, or None and why none does.

    Args:
        x: The network's input; :func:`use_backend` does not ask for ``"reference"``.
    """
    objections = []
    for name in network_backends(x):
        error = engine(name).objection(x, autocast_dtype(x), Purpose.TRAINING)
        if error is None:
            return engine(name), ""
        objections.append(str(error))
    return None, "; ".join(objections)


def _fused_backends(name: str, x: torch.Tensor) -> tuple[str, ...]:
    return registry.automatic(x.device.type) if name == AUTO else (name,)


def _request_for(name: str) -> Request:
    return _NOTHING if name == AUTO else Request(name, False, not engine(name).fused)


def _listed() -> str:
    return ", ".join(map(repr, names()))
