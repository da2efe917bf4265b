"""The engines that ``bench`` compares on a CPU, one function each, and what all providers share.

Every provider runs the same weights on the same float32 input with the same number of threads, in
the layout it likes best, and is otherwise set up as its documentation recommends for latency.
Those for a GPU are in ``cuda_providers``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .machine import distribution_version
from .precision import PRECISIONS

__all__ = [
    "ERROR_LIMIT",
    "PROVIDERS",
    "Job",
    "Provider",
    "Spec",
    "Unavailable",
    "build",
    "plain_module",
    "random_model",
    "randomise",
    "reference_output",
    "registry",
    "worst_error",
]

ERROR_LIMIT = PRECISIONS["float32"].error_limit
"""Largest error that passes for float32, as a part of the largest output. Reduced precision, such
as bfloat16 or TF32, does not pass."""


# Images that the reference takes at once on a GPU: float64 needs much memory.
_REFERENCE_IMAGES = 8


class Unavailable(RuntimeError):
    """A provider that cannot be used here, with the reason."""


@dataclass
class Job:
    """What the providers run.

    Attributes:
        model: The network, in evaluation mode, of the dtype of ``x`` and on its device.
        x: The input, ``(N, C, H, W)``, contiguous; float32 on the CPU.
        threads: Threads to use.
        onnx_path: The network as an ONNX file; exported when a provider first asks for it.
    """

    model: nn.Module
    x: Tensor
    threads: int
    onnx_path: Path | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def onnx(self) -> Path:
        """Path of the ONNX file, which lives as long as this object."""
        if self.onnx_path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="threshnet-fast-")
            path = Path(self._folder.name) / "model.onnx"
            with _silence(), torch.no_grad():
                torch.onnx.export(
                    plain_module(self.model),
                    (self.x,),
                    path,
                    input_names=["input"],
                    output_names=["output"],
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
            self.onnx_path = path
        return self.onnx_path


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
    """An entry of :data:`PROVIDERS`.

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


def build(name: str, job: Job) -> Provider:
    """Prepares a provider for a job.

    Args:
        name: A key of :func:`registry` for the job's device.
        job: What it is to run.

    Raises:
        Unavailable: It cannot be used here.
    """
    spec = registry(job.x.device.type)[name]
    reason = spec.objection()
    if reason is not None:
        raise Unavailable(reason)
    torch.set_num_threads(job.threads)
    return spec.build(job)


def plain_module(model: nn.Module) -> nn.Module:
    """The network as a stock PyTorch module without any dispatch of this package.

    It shares the parameters with ``model``.
    """
    base = getattr(model, "base", None)
    if isinstance(base, nn.ModuleList):
        return nn.Sequential(*base).train(model.training)
    return model


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Gives every BatchNorm statistics that change something, and the classifier a bias, in place.

    Means and shifts are away from 0, variances and scales away from 1, some scales are negative,
    none is 0: an engine that skips or reorders any of them fails the check.

    Returns:
        The same model, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                draw(module.running_mean, -0.4, 0.4)
                draw(module.running_var, 0.5, 1.8)
                draw(module.weight, 0.6, 1.4)
                module.weight[::8] *= -1
                draw(module.bias, -0.3, 0.5)
            elif isinstance(module, nn.Linear):
                draw(module.bias, -0.5, 0.5)
    return model.eval()


def random_model(name: str, classes: int, seed: int) -> nn.Module:
    """A registered model with random weights and statistics; equal seeds give equal models."""
    from ..models import create_model

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = create_model(name, num_classes=classes)
    return randomise(model, seed)


def reference_output(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the stock PyTorch module in float64, computed where ``x`` is; on the CPU."""
    module = copy.deepcopy(plain_module(model)).double()
    with torch.inference_mode():
        if x.device.type == "cpu":
            return module(x.double())
        parts = x.split(_REFERENCE_IMAGES)
        return torch.cat([module(part.double()).cpu() for part in parts])


def worst_error(output: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or a value is not finite."""
    if output.shape != reference.shape:
        return float("inf")
    difference = (output.detach().cpu().double() - reference.cpu().double()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max())


def _eager(job: Job) -> Provider:
    module = plain_module(job.model)

    def run() -> Tensor:
        with torch.inference_mode():
            return module(job.x)

    return Provider(run)


def _channels_last(job: Job) -> Provider:
    module = copy.deepcopy(plain_module(job.model))
    # torch annotates only the other forms of Module.to.
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = job.x.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return Provider(run)


def _compile(job: Job) -> Provider:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    module = copy.deepcopy(plain_module(job.model))
    compiled = torch.compile(module, dynamic=False)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(job.x)

    # The first call compiles; afterwards the setting no longer matters.
    with inductor.patch(freezing=True):
        run()
    return Provider(run)


def _onnxruntime(job: Job) -> Provider:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        str(job.onnx()), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: job.x.numpy()}
    return Provider(lambda: session.run(None, feed)[0], torch.from_numpy)


def _openvino(job: Job) -> Provider:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(str(job.onnx())),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": 1,
        },
    )
    request = compiled.create_infer_request()
    feed = [job.x.numpy()]
    return Provider(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda result: torch.from_numpy(result.copy()),
    )


def _fused(job: Job) -> Provider:
    from ..optimize import optimize

    call = optimize(job.model, job.x)
    return Provider(lambda: call(job.x))


def _drop_in(job: Job) -> Provider:
    model = job.model

    def run() -> Tensor:
        with torch.no_grad():
            return model(job.x)

    return Provider(run)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the exporter's progress and warnings, meant for who exports, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _needs(*modules: str) -> Callable[[], str | None]:
    def objection() -> str | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        return f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})"

    return objection


def _always() -> None:
    return None


def _no_engine() -> str | None:
    from ..backends import cpu

    return cpu.unavailable_reason()


def _no_compiler() -> str | None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, none was found"
    return None


def _own_version() -> str:
    from .. import __version__
    from ..backends import cpu

    if cpu.unavailable_reason() is not None:
        return __version__
    return f"{__version__} {cpu.isa()}"


def _torch_version() -> str:
    return str(torch.__version__)


def _version_of(distribution: str) -> Callable[[], str]:
    return lambda: distribution_version(distribution) or ""


def registry(device_type: str) -> dict[str, Spec]:
    """All providers for ``"cpu"`` or ``"cuda"`` by name, in the order of the tables."""
    if device_type == "cpu":
        return PROVIDERS
    from .cuda_providers import CUDA_PROVIDERS

    return CUDA_PROVIDERS


PROVIDERS: dict[str, Spec] = {
    "fused": Spec("threshnet_fast", True, True, _fused, _no_engine, _own_version),
    "drop-in": Spec("threshnet_fast, model(x)", True, True, _drop_in, _no_engine, _own_version),
    "eager": Spec("PyTorch eager", False, True, _eager, _always, _torch_version),
    "channels-last": Spec(
        "PyTorch channels_last", False, True, _channels_last, _always, _torch_version
    ),
    "compile": Spec("torch.compile", False, False, _compile, _no_compiler, _torch_version),
    "onnxruntime": Spec(
        "ONNX Runtime",
        False,
        True,
        _onnxruntime,
        _needs("onnxruntime", "onnx", "onnxscript"),
        _version_of("onnxruntime"),
    ),
    "openvino": Spec(
        "OpenVINO",
        False,
        True,
        _openvino,
        _needs("openvino", "onnx", "onnxscript"),
        _version_of("openvino"),
    ),
}
"""Providers for a CPU by the name that the command line takes, in the order of the tables."""
