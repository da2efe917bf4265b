"""Several processes that train one network, as torchrun starts them."""

from __future__ import annotations

import datetime
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["OtherProcessFailed", "Processes", "SyncBatchNorm", "join", "synchronise_batchnorm"]

_Result = TypeVar("_Result")


class OtherProcessFailed(RuntimeError):
    """Another process of the run has failed, and has said why."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        device: Where it computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process."""
        if self.count == 1:
            return list(flags)
        counts = torch.tensor([int(flag) for flag in flags], device=self.device)
        return [number > 0 for number in self.sum(counts).tolist()]

    def copy_from_first(self, module: nn.Module) -> None:
        """Gives a network's parameters and buffers the values of the first process."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, 0)

    def together(self, action: Callable[[], _Result]) -> _Result:
        """Runs something that may fail; where it fails in one process, no other goes on.

        Args:
            action: Called in every process.

        Returns:
            What it returned here.

        Raises:
            OtherProcessFailed: It failed in a process of a lower rank.
            Exception: What it raised here.
        """
        if self.count == 1:
            return action()
        result: _Result | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        failed = torch.full((self.count,), 0, dtype=torch.int64, device=self.device)
        failed[self.rank] = int(failure is not None)
        ranks = self.sum(failed).nonzero().flatten().tolist()
        if ranks and (failure is None or ranks[0] != self.rank):
            raise OtherProcessFailed(f"process {ranks[0]} has failed") from failure
        if failure is not None:
            raise failure
        return cast(_Result, result)

    def after_first(self, action: Callable[[], _Result]) -> _Result:
        """Runs something in the first process, and in the others only when that is done.

        Args:
            action: As in :meth:`together`; what the first has downloaded, the others find.
        """
        if self.count == 1:
            return action()
        first: list[_Result] = []
        self.together(lambda: first.append(action()) if self.first else None)
        rest: list[_Result] = []
        self.together(lambda: None if self.first else rest.append(action()))
        return (first + rest)[0]

    def wrap(self, model: nn.Module, gathers_buffers: bool) -> nn.Module:
        """Makes a network average its gradients over all processes.

        Args:
            model: The network, the same in all processes.
            gathers_buffers: Whether each forward pass starts from the first process's BatchNorm
                statistics; needless where all processes have the same.
        """
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        options: dict[str, Any] = {}
        if not gathers_buffers:
            # Renamed in torch 2.13, which warns of the old name.
            known = inspect.signature(DistributedDataParallel).parameters
            new = "forward_sync_buffers"
            options[new if new in known else "broadcast_buffers"] = False
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, **options
        )


@contextmanager
def join(device: torch.device | None, timeout: float) -> Iterator[Processes]:
    """Joins the other processes of a run, where a launcher such as torchrun started several.

    Args:
        device: Where to compute; None takes the CPU, or, where there are several processes and as
            many GPUs as this machine has of them, a GPU for each.
        timeout: Seconds after which a process that waits for another gives up.

    Yields:
        This process among them. The group is left at the end.

    Raises:
        RuntimeError: The environment is incomplete, or the others cannot be reached.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=device or torch.device("cpu"))
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set: start the processes with "
            "torchrun"
        )
    rank = int(os.environ["RANK"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if device is None and local_count <= torch.cuda.device_count():
        device = torch.device("cuda", local)
    device = device or torch.device("cpu")
    if device.type == "cuda":
        if device == torch.device("cuda"):
            device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout)
    )
    yield Processes(rank, count, device)
    # Not where this process has failed: the others, which it would wait for, do not leave.
    distributed.barrier()
    # A network in a reference cycle keeps the group's threads alive until the interpreter is gone,
    # which ends the process with an error.
    gc.collect()
    distributed.destroy_process_group()


class _Normalise(torch.autograd.Function):
    """Batch normalisation by the statistics of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        wide = x.double()
        count = x.new_full((1,), x.numel() // channels, dtype=torch.float64)
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count])
        distributed.all_reduce(sums)
        count = sums[-1]
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean.square()).clamp_(min=0)
        inverse = (variance + eps).rsqrt()
        normal = (x - _column(mean.to(x.dtype))) * _column(inverse.to(x.dtype))
        ctx.save_for_backward(normal, weight, inverse.to(x.dtype), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normal * _column(weight) + _column(bias), mean, variance, count

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, *unused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        normal, weight, inverse, count = ctx.saved_tensors
        weight_gradient = (gradient * normal).sum((0, 2, 3))
        bias_gradient = gradient.sum((0, 2, 3))
        sums = torch.stack([bias_gradient, weight_gradient]).double()
        distributed.all_reduce(sums)
        mean, slope = (sums / count).to(gradient.dtype)
        inner = gradient - _column(mean) - normal * _column(slope)
        # The parameters' gradients stay local: averaging them is the wrapped network's business.
        return inner * _column(weight * inverse), weight_gradient, bias_gradient, None


def _column(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all processes together.

    As :class:`torch.nn.SyncBatchNorm`, which runs on GPUs only, but on the CPU: two all-reductions
    of two numbers a channel, one in the forward and one in the backward pass. Sums are taken in
    float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        if not (self.training and distributed.is_initialized()):
            return super().forward(x)
        weight, bias = self.weight, self.bias
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            y, mean, variance, count = _Normalise.apply(wide, weight, bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            self._track(mean, variance * (count / (count - 1).clamp(min=1)))
        return cast(Tensor, y.to(x.dtype))

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        factor = self.momentum
        if factor is None:
            factor = 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Makes a network's BatchNorms take the statistics of all processes; parameters stay.

    Args:
        model: The network, changed in place.
        device: Where it runs: on a GPU :class:`torch.nn.SyncBatchNorm` serves.

    Returns:
        The network.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            if module.weight is None:
                raise ValueError("a BatchNorm without weight cannot be synchronised")
            # Only the forward pass differs, so that references to the module stay good.
            module.__class__ = SyncBatchNorm
    return model
