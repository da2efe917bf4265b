"""What a provider is: the job that it is given, how it is built, why it cannot be used."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.network import Network
from ..models.onnx_file import write_onnx

__all__ = ["Job", "Provider", "Spec", "Unavailable", "float32_parts", "plain_module"]


class Unavailable(RuntimeError):
    """A provider that cannot be used here, with the reason."""


@dataclass
class Job:
    """What the providers run.

    Attributes:
        model: The network, in evaluation mode, of the dtype of ``x`` and on its device.
        x: The input, ``(N, C, H, W)``, contiguous; float32 or bfloat16 on the CPU.
        threads: Threads to use.
        onnx_path: The network as an ONNX file, in float32; exported when a provider first asks for
            it.
    """

    model: nn.Module
    x: Tensor
    threads: int
    onnx_path: Path | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def onnx(self) -> Path:
        """Path of the ONNX file, which lives as long as this object."""
        if self.onnx_path is None:
            path = self.folder() / "model.onnx"
            module, x = float32_parts(self)
            write_onnx(path, module, x)
            self.onnx_path = path
        return self.onnx_path

    def folder(self) -> Path:
        """Folder for files of this job, which lives as long as this object."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="threshnet-fast-")
        return Path(self._folder.name)


@dataclass(frozen=True)
class Provider:
    """A provider, ready to run on one input.

    Attributes:
        run: Runs the network once; this call is what is timed.
        as_tensor: Makes a tensor of what ``run`` returned.
    """

    run: Callable[[], Any]
    as_tensor: Callable[[Any], Tensor] = lambda result: result


@dataclass(frozen=True)
class Spec:
    """An entry of :func:`~.registry.registry`.

    Attributes:
        title: Name in tables and plots.
        ours: Whether it is this package rather than a peer.
        by_default: Whether ``bench`` takes it unasked, where it is available; those that are not
            need minutes to compile.
        build: Prepares a :class:`Provider`.
        objection: Says in one line why it cannot be used here; None where it can.
        version: Version of the code that runs.
        optional: Whether an installation may do without it, though it is this package's.
    """

    title: str
    ours: bool
    by_default: bool
    build: Callable[[Job], Provider]
    objection: Callable[[], str | None]
    version: Callable[[], str]
    optional: bool = False


def plain_module(model: nn.Module) -> nn.Module:
    """The network as a stock PyTorch module without any dispatch of this package.

    It shares the parameters with ``model``. A module of others is one already.
    """
    if not isinstance(model, Network):
        return model
    base, features = getattr(model, "base", None), getattr(model, "features", None)
    if isinstance(base, nn.ModuleList):
        return nn.Sequential(*base).train(model.training)
    if isinstance(features, nn.Sequential):
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.get_submodule("classifier"))
        return nn.Sequential(*features, *head).train(model.training)
    return model


def float32_parts(job: Job) -> tuple[nn.Module, Tensor]:
    """The network as :func:`plain_module` makes it, and the input, both in float32.

    For engines that round what they are given. In a job that is float32 already nothing is copied.
    """
    module = plain_module(job.model)
    if job.x.dtype is torch.float32:
        return module, job.x
    return copy.deepcopy(module).float(), job.x.float()
