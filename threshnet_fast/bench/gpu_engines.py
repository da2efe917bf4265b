"""The engines that ``bench`` compares on a GPU, one function each.

All run the same weights on the same input, which is on the device already, in the same dtype.
Libraries are set up by ``Precision.active``. A provider has run three times when it is returned:
what compiles, tries algorithms or captures a graph has done so.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .job import Job, Provider, Spec, Unavailable, plain_module

__all__ = ["CUDA_PROVIDERS", "graphed"]

_WARM_UP_CALLS = 3


def graphed(
    call: Callable[[], Tensor],
    *,
    new_graph: Callable[[], Any] | None = None,
    capture: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
) -> Callable[[], Tensor]:
    """Captures a call in a CUDA graph, after three calls that compile and choose algorithms.

    Args:
        call: What to capture: reads the same memory each time.
        new_graph: Makes a graph.
        capture: Captures what is enqueued within its context in a graph.

    Returns:
        A function that replays the graph and returns the graph's own output, which the next replay
        overwrites.
    """
    for _ in range(_WARM_UP_CALLS):
        call()
    graph = (torch.cuda.CUDAGraph if new_graph is None else new_graph)()
    with (torch.cuda.graph if capture is None else capture)(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _warm(run: Callable[[], Tensor]) -> Provider:
    for _ in range(_WARM_UP_CALLS):
        run()
    return Provider(run)


def _eager_parts(job: Job) -> tuple[nn.Module, Tensor]:
    return plain_module(job.model), job.x


def _channels_last_parts(job: Job) -> tuple[nn.Module, Tensor]:
    module = copy.deepcopy(plain_module(job.model))
    # torch annotates only the other forms of Module.to.
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module, job.x.contiguous(memory_format=torch.channels_last)


def _plain(parts: Callable[[Job], tuple[nn.Module, Tensor]]) -> Callable[[Job], Provider]:
    def build(job: Job) -> Provider:
        module, x = parts(job)

        def run() -> Tensor:
            with torch.inference_mode():
                return module(x)

        return _warm(run)

    return build


def _in_graph(parts: Callable[[Job], tuple[nn.Module, Tensor]]) -> Callable[[Job], Provider]:
    return lambda job: _replayed(*parts(job))


def _replayed(function: Callable[[Tensor], Tensor], x: Tensor) -> Provider:
    """A function in a CUDA graph: the input is copied in, the output stays where it is."""
    static = x.clone()
    with torch.no_grad():
        replay = graphed(lambda: function(static))

    def run() -> Tensor:
        static.copy_(x)
        return replay()

    return _warm(run)


def _compiled_module(job: Job, mode: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A compiled network that has run once, with its BatchNorms folded into its weights."""
    import torch._inductor.config as inductor

    compiled = torch.compile(copy.deepcopy(plain_module(job.model)), dynamic=False, mode=mode)
    # The first call compiles; afterwards the setting no longer matters.
    with inductor.patch(freezing=True), torch.no_grad():
        compiled(job.x)
    return compiled, job.x


def _compile(mode: str) -> Callable[[Job], Provider]:
    def build(job: Job) -> Provider:
        compiled, x = _compiled_module(job, mode)

        def run() -> Tensor:
            with torch.no_grad():
                return compiled(x)

        return _warm(run)

    return build


def _compile_in_graph(job: Job) -> Provider:
    return _replayed(*_compiled_module(job, "default"))


def _fused(job: Job) -> Provider:
    from ..engines.select import is_for
    from ..runtime.frozen import optimize

    call = optimize(job.model, job.x)
    if not is_for(call.backend, "cuda"):
        raise Unavailable(call.reason)
    return _warm(lambda: call(job.x))


def _fused_cuda(job: Job) -> Provider:
    from ..engines.select import use_backend

    with use_backend("cuda"):
        return _fused(job)


def _drop_in(job: Job) -> Provider:
    from ..engines.select import is_for
    from ..runtime.explain import explain

    model, x = job.model, job.x
    with torch.no_grad():
        explanation = explain(model, x)
    if not is_for(explanation.backend, "cuda"):
        raise Unavailable(explanation.reason)

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return _warm(run)


def _always() -> None:
    return None


def _no_kernels() -> str | None:
    from ..engines import cuda, triton

    reason = triton.unavailable_reason()
    return reason if cuda.unavailable_reason() is not None else None


def _no_cuda_kernels() -> str | None:
    from ..engines import cuda

    return cuda.unavailable_reason()


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    return None


def _own_version() -> str:
    from ..engines import triton
    from ..version import __version__

    if triton.unavailable_reason() is not None:
        return _cuda_version()
    from ..kernels import autotuning

    tiles = " measured tiles" if autotuning.enabled() else ""
    return f"{__version__} {triton.architecture()}{tiles}"


def _cuda_version() -> str:
    from ..engines import cuda
    from ..version import __version__

    if cuda.unavailable_reason() is not None:
        return __version__
    return f"{__version__} CUDA C++ {cuda.architecture(torch.device('cuda'))}"


def _torch_version() -> str:
    return str(torch.__version__)


def _peer(
    title: str, build: Callable[[Job], Provider], *, by_default: bool, needs_triton: bool = False
) -> Spec:
    objection = _no_triton if needs_triton else _always
    return Spec(title, False, by_default, build, objection, _torch_version)


CUDA_PROVIDERS: dict[str, Spec] = {
    "fused": Spec("threshnet_fast", True, True, _fused, _no_kernels, _own_version),
    "drop-in": Spec("threshnet_fast, model(x)", True, True, _drop_in, _no_kernels, _own_version),
    "fused-cuda": Spec(
        "threshnet_fast, CUDA C++",
        True,
        True,
        _fused_cuda,
        _no_cuda_kernels,
        _cuda_version,
        optional=True,
    ),
    "eager": _peer("PyTorch eager", _plain(_eager_parts), by_default=True),
    "channels-last": _peer("PyTorch channels_last", _plain(_channels_last_parts), by_default=True),
    "eager-graph": _peer("eager in a CUDA graph", _in_graph(_eager_parts), by_default=True),
    "channels-last-graph": _peer(
        "channels_last in a CUDA graph", _in_graph(_channels_last_parts), by_default=True
    ),
    "compile": _peer("torch.compile", _compile("default"), by_default=False, needs_triton=True),
    "compile-graph": _peer(
        "torch.compile in a CUDA graph", _compile_in_graph, by_default=False, needs_triton=True
    ),
    "compile-max": _peer(
        "torch.compile max-autotune",
        _compile("max-autotune"),
        by_default=False,
        needs_triton=True,
    ),
}
"""Providers for a GPU by the name that the command line takes, in the order of the tables."""
