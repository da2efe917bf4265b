"""The ways to train that ``benchmarks/bench_train.py`` compares on a CPU.

A call is a whole step: forward pass, cross-entropy, backward pass, optimizer; then gradients are
set to None. Every provider trains its own copy of the weights, on the same images and classes, with
the same number of threads and the same optimizer, PyTorch's fused one. Dropout is left out: no two
of them would draw the same random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engines import select
from ..models.network import Network
from ..runtime.dropin import fused_forward
from .cpu_engines import (
    PROVIDERS,
    Job,
    Provider,
    Spec,
    Unavailable,
    build,
    plain_module,
    worst_error,
)

__all__ = [
    "OPTIMIZER",
    "TRAINING_PROVIDERS",
    "TrainingProvider",
    "checked_step",
    "reference_results",
    "relative_errors",
    "results_of",
]

OPTIMIZER = "SGD, momentum 0.9, fused"
_LEARNING_RATE = 1e-3

# Rounding errors turn the sign of some inputs of ReLU over, which changes a gradient by much more
# than rounding does: plain PyTorch in float32 is off by up to 0.04 in the norm of a gradient. In
# bfloat16 it is off by 0.7 to 1.3, and by 0.1 of the largest output.
_OUTPUT_LIMIT = 1e-3
_GRADIENT_LIMIT = 0.1

Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingProvider(Provider):
    """A provider whose call is a step of a training.

    Attributes:
        results: Runs the forward and the backward pass alone; returns what
            :func:`results_of` does.
        kept: The bytes that are kept from one step for the next, other than weights, the
            optimizer's state and what its kernels work in.
    """

    results: Callable[[], dict[str, Tensor]] = dict
    kept: Callable[[], int] = int


def targets(job: Job) -> Tensor:
    """The classes of a job's images: all of them in turns."""
    return torch.arange(len(job.x)) % _classes(job.model)


def results_of(model: nn.Module, compute: Compute, x: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Runs a forward and a backward pass.

    Args:
        model: The network, in training mode.
        compute: Returns its loss and its output.
        x: Images.
        classes: Their classes.

    Returns:
        Clones of the output, under ``""``, and, under their names, of the gradients of all
        parameters and of the floating-point buffers, which are the running statistics. A parameter
        without gradient is not there.
    """
    loss, output = compute(x, classes)
    loss.backward()
    results = {"": output.detach().clone()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[name] = parameter.grad.clone()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            results[name] = buffer.clone()
    model.zero_grad(set_to_none=True)
    return results


def reference_results(job: Job) -> dict[str, Tensor]:
    """What :func:`results_of` returns for the stock PyTorch modules in float64."""
    model = _for_training(job.model).double()
    compute = _compute(plain_module(model))
    with select.use_backend("reference"):
        return results_of(model, compute, job.x.double(), targets(job))


def relative_errors(results: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of every tensor of the reference, in the Euclidean norm.

    Infinite where a tensor is missing, of another shape, or not finite.
    """
    errors = {}
    for name, expected in reference.items():
        found = results.get(name)
        if found is None or found.shape != expected.shape or not found.isfinite().all():
            errors[name] = float("inf")
        else:
            difference = float((found.double() - expected.double()).norm())
            errors[name] = difference / max(float(expected.norm()), torch.finfo(torch.float64).tiny)
    return errors


def checked_step(
    name: str, job: Job, reference: dict[str, Tensor]
) -> tuple[TrainingProvider | None, dict[str, object]]:
    """Builds a provider, compares what it computes, and makes two steps, as compilers want.

    Args:
        name: A key of :data:`TRAINING_PROVIDERS`.
        job: The network and the images.
        reference: What :func:`reference_results` returned for them.

    Returns:
        The provider, None where it must not be timed; the columns of a row that say how it
        did.

    Raises:
        Unavailable: It cannot be used here.
    """
    limit = _OUTPUT_LIMIT * float(reference[""].abs().max())
    columns: dict[str, object] = {
        "status": "ok",
        "error_limit": f"{limit:.4g}",
        "gradient_limit": f"{_GRADIENT_LIMIT:.4g}",
    }
    try:
        built = build(name, job, "training")
        assert isinstance(built, TrainingProvider)
        results = built.results()
        for _ in range(2):
            built.run()
    except Unavailable:
        raise
    except Exception as problem:
        # Whatever a provider raises is a result: it is reported, and the others are measured.
        columns["status"] = (" ".join(str(problem).split()) or type(problem).__name__)[:300]
        return None, columns
    errors = relative_errors(results, reference)
    errors.pop("")
    worst = max(errors, key=lambda key: errors[key])
    error = worst_error(results[""], reference[""])
    columns |= {"error": f"{error:.4g}", "gradient_error": f"{errors[worst]:.4g}"}
    if not error <= limit:
        columns["status"] = "wrong result: the output"
    elif not errors[worst] <= _GRADIENT_LIMIT:
        columns["status"] = f"wrong result: {worst}"
    else:
        return built, columns
    return None, columns


def _classes(model: nn.Module) -> int:
    return int(getattr(model, "num_classes"))  # noqa: B009, it is no attribute of every Module


def _for_training(model: nn.Module) -> nn.Module:
    """A copy in training mode, without dropout."""
    model = copy.deepcopy(model).train()
    if hasattr(model, "drop_rate"):
        model.drop_rate = 0.0  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _compute(module: Callable[[Tensor], Tensor]) -> Compute:
    def compute(x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        output = module(x)
        return F.cross_entropy(output, classes), output

    return compute


def _provider(
    job: Job,
    *,
    backend: str = "reference",
    channels_last: bool = False,
    compiled: dict[str, Any] | None = None,
    checkpoint: str | None = None,
) -> Provider:
    """Prepares a step.

    Args:
        job: The network and the images.
        backend: What ``use_backend`` is to ask for; the stock modules run where it is
            ``"reference"``.
        channels_last: Whether weights and images are in that memory format.
        compiled: Options of torch.compile, for network and loss together; None leaves it out.
        checkpoint: What of the network's features is kept for the backward pass; None keeps all.
    """
    model = _for_training(job.model)
    x, classes = job.x, targets(job)
    if checkpoint is not None:
        _set_checkpoint(model, checkpoint)
    if channels_last:
        # torch annotates only the other forms of Module.to.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    compute = _compute(plain_module(model) if backend == "reference" else model)
    if compiled is not None:
        compute = torch.compile(compute, dynamic=False, options=compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9, fused=True)

    def step() -> None:
        with select.use_backend(backend):
            loss, _ = compute(x, classes)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def results() -> dict[str, Tensor]:
        with select.use_backend(backend):
            return results_of(model, compute, x, classes)

    def kept() -> int:
        return fused_forward(model)._training.kept_bytes if isinstance(model, Network) else 0

    return TrainingProvider(step, results=results, kept=kept)


def _set_checkpoint(model: nn.Module, checkpoint: str) -> None:
    if not hasattr(model, "checkpoint"):
        raise Unavailable(f"the model has no attribute checkpoint to set to {checkpoint!r}")
    model.checkpoint = checkpoint  # type: ignore[assignment]


def _spec(name: str, title: str, **arguments: Any) -> Spec:
    """A way to train whose code is that of a provider for inference."""
    like = PROVIDERS[name]
    return Spec(
        title,
        like.ours,
        like.by_default,
        partial(_provider, **arguments),
        like.objection,
        like.version,
        optional=arguments.get("checkpoint") is not None,
    )


TRAINING_PROVIDERS: dict[str, Spec] = {
    "fused": _spec("fused", "threshnet_fast", backend="auto"),
    "fused-checkpoint": _spec(
        "fused", 'threshnet_fast, checkpoint="features"', backend="auto", checkpoint="features"
    ),
    "eager": _spec("eager", "PyTorch eager"),
    "channels-last": _spec("channels-last", "PyTorch channels_last", channels_last=True),
    "compile": _spec("compile", "torch.compile", compiled={}),
    "compile-channels-last": _spec(
        "compile", "torch.compile, channels_last", channels_last=True, compiled={}
    ),
    "compile-max": _spec(
        "compile-max",
        "torch.compile, max-autotune, channels_last",
        channels_last=True,
        compiled={"max_autotune": True},
    ),
}
"""Ways to train in float32 on a CPU, by name, in the order of the tables."""
