"""Chooses the backend, and says why.

A request comes from an argument (``backend="cpu"``) or from :func:`use_backend`. An explicit
request is served or refused with an error; ``"auto"`` takes the first backend that has no objection
and keeps the objections of those it passed over: on a GPU ``"triton"``, then ``"cuda"``.
"""

import contextlib
import contextvars
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import cpu, cuda, triton
from .gpu_plan import CapturedWeights, GpuPlanCache

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
"""Every name that can be asked for."""

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
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} is a {type(name).__name__}: expected one of {_names()}")
    if name not in NAMES:
        nearest = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{argument} is {name!r}: expected one of {_names()}{hint}")
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
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """Returns what :func:`use_backend` asks for here, ``"auto"`` outside of any."""
    return _requested.get()


def objection(backend: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> Exception | None:
    """Returns the error that a fused backend would raise for a tensor, or None.

    Args:
        backend: ``"cpu"``, ``"triton"`` or ``"cuda"``.
        x: A tensor that a kernel would read.
        dtype: What to compute in; None means the dtype of ``x``.
    """
    if backend == "triton":
        return triton.objection(x, dtype)
    if backend == "cuda":
        return cuda.objection(x, dtype)
    if x.device.type != "cpu":
        return ValueError(f"backend 'cpu' needs tensors on the CPU, these are on {x.device}")
    dtype = x.dtype if dtype is None else dtype
    if dtype != torch.float32:
        return TypeError(f"backend 'cpu' needs torch.float32 tensors, these are {dtype}")
    reason = cpu.unavailable_reason()
    if reason is not None:
        return RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return None


def describe(backend: str, x: torch.Tensor) -> str:
    """Returns what a fused backend computes with, in one line.

    Args:
        backend: One that has no objection to ``x``.
        x: A tensor that a kernel would read.
    """
    if backend == "cpu":
        return cpu.describe(x.dtype)
    if backend == "triton":
        return f"{x.dtype} on {x.device}, {triton.architecture()} kernels"
    return f"{x.dtype} on {x.device}, CUDA C++ kernels for {cuda.architecture(x.device)}"


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
    passed_over: list[str] = []
    for backend in _fused_backends(name, xs[0]):
        error = objection(backend, xs[0])
        if error is None:
            how = f"asked for by {asked_by}" if name != "auto" else "first of 'auto'"
            if passed_over:
                how = f"{'; '.join(passed_over)}; next of 'auto'"
            return Choice(backend, f"{how}; {describe(backend, xs[0])}")
        if name != "auto":
            raise error
        passed_over.append(str(error))
    return Choice("reference", "; ".join(passed_over))


def network_backends(x: torch.Tensor) -> tuple[str, ...]:
    """Returns the fused backends to try for a network's input, in order.

    Args:
        x: The input; :func:`use_backend` does not ask for ``"reference"``.
    """
    return _fused_backends(requested_backend(), x)


def gpu_plan_caches(
    captured: CapturedWeights | None = None,
) -> dict[str, GpuPlanCache[Any, Any, Any]]:
    """Returns empty caches of one network's plans, by the name of the backend for a GPU.

    Args:
        captured: Where to look for weights that graphs of the caller read.
    """
    return {"triton": triton.PlanCache(captured), "cuda": cuda.PlanCache(captured)}


def _fused_backends(name: str, x: torch.Tensor) -> tuple[str, ...]:
    # An emulated or interpreted GPU has its tensors on the CPU: there, "auto" means the CPU.
    if name == "auto":
        return ("triton", "cuda") if x.device.type == "cuda" else ("cpu",)
    return (name,)


def _names() -> str:
    return ", ".join(repr(name) for name in NAMES)
