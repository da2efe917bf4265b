"""Chooses the backend, and says why.

A request comes from an argument (``backend="cpu"``) or from :func:`use_backend`. An explicit
request is served or refused with an error; ``"auto"`` takes the first backend that has no objection
and keeps the objections of those it passed over.
"""

import contextlib
import contextvars
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import cpu, triton

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
"""Every name that can be asked for."""

_NOT_BUILT = ("cuda",)

_requested: contextvars.ContextVar[str] = contextvars.ContextVar(
    "threshnet_fast_backend", default="auto"
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
        RuntimeError: If the backend exists in name only, because no kernels are built for it.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} is a {type(name).__name__}: expected one of {_names()}")
    if name not in NAMES:
        nearest = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{argument} is {name!r}: expected one of {_names()}{hint}")
    if name in _NOT_BUILT:
        raise RuntimeError(
            f"{argument} is {name!r}: this version of threshnet_fast has no {name} kernels; "
            "use 'auto', 'reference', 'cpu' or 'triton'"
        )
    return name


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Asks for a backend within a ``with`` block, or within a function it decorates.

    The setting belongs to the current thread and to the current asynchronous task: others keep
    their own. Blocks nest. A compiled function reads the setting when it runs, so the block goes
    around the call of the compiled function, not inside of it.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        A context manager that restores the previous setting at its end.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If no backend has that name.
        RuntimeError: If no kernels are built for that backend.
    """
    return _scope(check_name(name, "name"))


@contextlib.contextmanager
def _scope(name: str) -> Iterator[None]:
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """Returns what :func:`use_backend` asks for here, ``"auto"`` outside of any."""
    return _requested.get()


def cpu_objection(xs: Sequence[torch.Tensor]) -> Exception | None:
    """Returns the error that the C++ CPU backend would raise for these tensors, or None.

    Args:
        xs: The tensors that the operator reads, all of one dtype and on one device.
    """
    x = xs[0]
    if x.device.type != "cpu":
        return ValueError(f"backend 'cpu' needs tensors on the CPU, these are on {x.device}")
    if x.dtype != torch.float32:
        return TypeError(f"backend 'cpu' needs torch.float32 tensors, these are {x.dtype}")
    reason = cpu.unavailable_reason()
    if reason is not None:
        return RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return None


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
    name = check_name(requested_backend() if requested is None else requested)
    if name == "reference":
        return Choice("reference", f"asked for by {asked_by}")
    backend = _fused_backend(name, xs[0])
    objection = cpu_objection(xs) if backend == "cpu" else triton.objection(xs[0])
    if objection is None:
        how = "first of 'auto'" if name == "auto" else f"asked for by {asked_by}"
        if backend == "triton":
            what = f"{xs[0].dtype} on {xs[0].device}, {triton.architecture()} kernels"
        else:
            what = f"float32 on the CPU, {cpu.isa()} kernels"
        return Choice(backend, f"{how}; {what}")
    if name != "auto":
        raise objection
    return Choice("reference", str(objection))


def network_backend(x: torch.Tensor) -> str:
    """Returns the fused backend for a network's input, ``"cpu"`` or ``"triton"``.

    Args:
        x: The input; :func:`use_backend` does not ask for ``"reference"``.
    """
    return _fused_backend(requested_backend(), x)


def _fused_backend(name: str, x: torch.Tensor) -> str:
    # An emulated or interpreted GPU has its tensors on the CPU: there, "auto" means the CPU.
    if name == "auto":
        return "triton" if x.device.type == "cuda" else "cpu"
    return name


def _names() -> str:
    return ", ".join(repr(name) for name in NAMES)
