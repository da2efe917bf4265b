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
from .cpu_engines import PROVIDERS
from .job import Job, Provider, Spec, Unavailable, plain_module

__all__ = [
    "OPTIMIZER",
    "TRAINING_PROVIDERS",
    "TrainingProvider",
    "for_training",
    "results_of",
    "targets",
    "with_loss",
]

OPTIMIZER = "SGD, momentum 0.9, fused"
_LEARNING_RATE = 1e-3

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


def _classes(model: nn.Module) -> int:
    return int(getattr(model, "num_classes"))  # noqa: B009, it is no attribute of every Module


def for_training(model: nn.Module) -> nn.Module:
    """A copy in training mode, without dropout."""
    model = copy.deepcopy(model).train()
    if hasattr(model, "drop_rate"):
        model.drop_rate = 0.0  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def with_loss(module: Callable[[Tensor], Tensor]) -> Compute:
    """What returns the cross-entropy of a network, and its output, for images and classes."""

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
    model = for_training(job.model)
    x, classes = job.x, targets(job)
    if checkpoint is not None:
        _set_checkpoint(model, checkpoint)
    if channels_last:
        # torch annotates only the other forms of Module.to.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    compute = with_loss(plain_module(model) if select.is_plain(backend) else model)
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
