"""The engines that ``bench`` compares on a CPU, one function each, and what all providers share.

Every provider runs the same weights on the same input with the same number of threads, in the
layout it likes best, and is otherwise set up as its documentation recommends for latency. In
bfloat16, a class of its own, weights and input are rounded before: PyTorch and this package take
and return bfloat16; the other engines take the rounded numbers in float32, round inside, and return
float32. Those for a GPU are in ``cuda_providers``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .machine import distribution_version
from .precision import PRECISIONS
from .timing import host_timer

__all__ = [
    "BFLOAT16_PROVIDERS",
    "CPU_PROVIDERS",
    "ERROR_LIMIT",
    "PROVIDERS",
    "Job",
    "Provider",
    "Spec",
    "Unavailable",
    "build",
    "dtypes",
    "float32_parts",
    "plain_module",
    "random_model",
    "randomise",
    "reference_output",
    "registry",
    "reset_compiler",
    "tiny_model",
    "worst_error",
]

ERROR_LIMIT = PRECISIONS["float32"].error_limit
"""Largest error that passes for float32, as a part of the largest output without the classifier's
bias. Reduced precision, such as bfloat16 or TF32, does not pass."""


# Images that the reference takes at once on a GPU: float64 needs much memory.
_REFERENCE_IMAGES = 8


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
            with _silence(), torch.no_grad():
                torch.onnx.export(
                    module,
                    (x,),
                    path,
                    input_names=["input"],
                    output_names=["output"],
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
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
    """An entry of :func:`registry`.

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


def build(name: str, job: Job, task: str = "inference") -> Provider:
    """Prepares a provider for a job.

    Args:
        name: A key of :func:`registry` for the job's device, its dtype, and the task.
        job: What it is to run.
        task: ``"inference"``, or ``"training"`` for whole steps of a training.

    Raises:
        Unavailable: It cannot be used here.
    """
    spec = registry(job.x.device.type, str(job.x.dtype).removeprefix("torch."), task)[name]
    reason = spec.objection()
    if reason is not None:
        raise Unavailable(reason)
    torch.set_num_threads(job.threads)
    return spec.build(job)


def plain_module(model: nn.Module) -> nn.Module:
    """The network as a stock PyTorch module without any dispatch of this package.

    It shares the parameters with ``model``.
    """
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


def tiny_model() -> nn.Module:
    """A random network of two small blocks, which is built and run in no time."""
    from ..models import ThreshNet

    model = ThreshNet(
        first_channels=(8, 16),
        blocks=(2, 2),
        transitions=(16, 16),
        downsample=(True, False),
        threshold=1,
        growth_rates=(8, 16),
        num_classes=2,
    )
    return randomise(model, 0)


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


def reset_compiler() -> None:
    """Makes torch.compile forget what it has compiled.

    Between two inputs: it gives up on code that it has compiled too many times. Never between two
    providers of one input, which would have the first compile again while it is timed.
    """
    import torch._dynamo

    torch._dynamo.reset()


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


def _compile(job: Job, **options: Any) -> Provider:
    from torch._inductor import config as inductor

    module = copy.deepcopy(plain_module(job.model))
    # What is an option here is part of what tells compiled code apart: two providers of one input
    # never share any.
    compiled = torch.compile(module, dynamic=False, options={"freezing": True, **options})

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(job.x)

    # As an option it reaches the code generator; the tracer, which must take parameters for
    # constants, reads the global setting.
    with inductor.patch(freezing=True):
        run()
    return Provider(run)


def _compile_max(job: Job) -> Provider:
    return _compile(job, max_autotune=True)


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
    feed = {session.get_inputs()[0].name: job.x.float().numpy()}
    return Provider(lambda: session.run(None, feed)[0], torch.from_numpy)


def _openvino(job: Job) -> Provider:
    import openvino

    bfloat16 = job.x.dtype is torch.bfloat16
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(str(job.onnx())),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": 1,
        },
    )
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if bfloat16 and taken != "bf16":
        raise Unavailable(f"OpenVINO calculates in {taken} on this processor, not in bfloat16")
    request = compiled.create_infer_request()
    feed = [job.x.float().numpy()]
    return Provider(
        lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda result: torch.from_numpy(result.copy()),
    )


def _ncnn(job: Job) -> Provider:
    ncnn, pnnx = importlib.import_module("ncnn"), importlib.import_module("pnnx")
    module, x = float32_parts(job)
    bfloat16 = job.x.dtype is torch.bfloat16
    images, channels, height, width = x.shape
    stem = job.folder() / "ncnn"
    with _silence(), torch.no_grad():
        torch.jit.trace(module, x[:1]).save(f"{stem}.pt")
    shape = f"inputshape=[1,{channels},{height},{width}]f32"
    _convert([pnnx.EXEC_PATH, f"{stem}.pt", shape, "fp16=0"], Path(f"{stem}.ncnn.bin"))

    # It takes one image at a time. Where there is one for every thread, that is faster than images
    # one after the other, divided among the threads.
    workers = job.threads if images >= job.threads else 1

    def load(winograd: bool) -> Any:
        net = ncnn.Net()
        net.opt.num_threads = job.threads // workers
        net.opt.use_vulkan_compute = False
        net.opt.use_winograd_convolution = winograd
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_packed = net.opt.use_bf16_storage = bfloat16
        if net.load_param(f"{stem}.ncnn.param") or net.load_model(f"{stem}.ncnn.bin"):
            raise RuntimeError("ncnn cannot load the network that pnnx converted")
        return net

    def compute(net: Any, image: Any) -> Any:
        with net.create_extractor() as extractor:
            extractor.input("in0", image)
            return extractor.extract("out0")[1]

    # Without a copy they would not own what they read.
    inputs = [ncnn.Mat(image.numpy()).clone() for image in x]
    # Winograd's convolution, which it takes unasked, halves the time of a large image. A small one
    # takes several times as long with it, as transformed weights are several times as many.
    net = _fastest([load(True), load(False)], lambda net: compute(net, inputs[0]))

    def part(worker: int) -> list[Any]:
        return [compute(net, image) for image in inputs[worker::workers]]

    pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def run() -> list[list[Any]]:
        return [part(0)] if pool is None else list(pool.map(part, range(workers)))

    def as_tensor(results: list[list[Any]]) -> Tensor:
        ordered = [results[index % workers][index // workers] for index in range(images)]
        return torch.stack([torch.tensor(mat.numpy()) for mat in ordered])

    return Provider(run, as_tensor)


def _mnn(job: Job) -> Provider:
    path = job.folder() / "model.mnn"
    # The module that the package has for this installs other packages and reports usage when it is
    # imported: only what it calls is called.
    script = "import sys, MNN, _tools; _tools.mnnconvert(sys.argv)"
    command = [sys.executable, "-c", script, "-f", "ONNX", "--modelFile", str(job.onnx())]
    _convert([*command, "--MNNModel", str(path), "--bizCode", "none"], path)
    with _no_output():
        MNN = importlib.import_module("MNN")
        interpreter = MNN.Interpreter(str(path))
        session = interpreter.createSession(
            {
                "backend": "CPU",
                "numThread": job.threads,
                "precision": "high",
                "memory": "high",
                "power": "high",
            }
        )
    entry, result = interpreter.getSessionInput(session), interpreter.getSessionOutput(session)
    kind, layout = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe
    source = MNN.Tensor(tuple(job.x.shape), kind, job.x.numpy(), layout)
    shape = tuple(result.getShape())
    target = MNN.Tensor(shape, kind, torch.zeros(shape).numpy(), layout)

    def run() -> Any:
        entry.copyFrom(source)
        interpreter.runSession(session)
        result.copyToHostTensor(target)
        return target

    return Provider(run, lambda tensor: torch.tensor(tensor.getNumpyData()).reshape(shape))


def _opencv(job: Job) -> Provider:
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(job.threads)
    # Its newer engine is faster with more threads than one and on small inputs.
    net = cv2.dnn.readNetFromONNX(str(job.onnx()), getattr(cv2.dnn, "ENGINE_NEW", 0))
    x = job.x.numpy()

    def run() -> Any:
        net.setInput(x)
        return net.forward()

    return Provider(run, lambda result: torch.tensor(result))


class _Named(nn.Module):
    """A network under a name: ExecuTorch loses parameters whose names begin with a digit."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _executorch(job: Job) -> Provider:
    exir = importlib.import_module("executorch.exir")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    library = importlib.import_module("executorch.extension.pybindings.portable_lib")
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    with _silence(), torch.no_grad():
        exported = torch.export.export(_Named(plain_module(job.model)).eval(), (job.x,))
        edge = exir.to_edge_transform_and_lower(
            exported, partitioner=[xnnpack.XnnpackPartitioner()]
        )
        lowered = edge.to_executorch()
    library._unsafe_reset_threadpool(job.threads)
    buffer = lowered.buffer
    program = runtime.load_program(buffer)
    method = program.load_method("forward")

    # The method reads the buffer without owning it.
    def run(owner: object = (buffer, program)) -> Any:
        return method.execute([job.x])

    return Provider(run, lambda results: results[0].clone())


def _fused(job: Job) -> Provider:
    from ..runtime.frozen import optimize

    call = optimize(job.model, job.x, dtype=job.x.dtype)
    if call.backend != "cpu":
        raise Unavailable(call.reason)
    return Provider(lambda: call(job.x))


def _drop_in(job: Job) -> Provider:
    from ..runtime.explain import explain

    model = job.model
    with torch.no_grad():
        explanation = explain(model, job.x)
    if explanation.backend != "cpu":
        raise Unavailable(explanation.reason)

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


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Keeps what C and C++ code writes to the standard output off it."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _convert(command: list[str], expected: Path) -> None:
    """Runs a converter, and raises with its last words where it does not write what is expected."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=expected.parent)
    if result.returncode or not expected.exists():
        words = " ".join((result.stdout + result.stderr).split())[-200:]
        raise RuntimeError(f"the network cannot be converted: {words or result.returncode}")


def _fastest(candidates: list[Any], call: Callable[[Any], object], calls: int = 5) -> Any:
    """The candidate whose fastest call is the fastest of all; they take turns."""
    times = [float("inf")] * len(candidates)
    for _ in range(calls):
        for index, candidate in enumerate(candidates):
            times[index] = min(times[index], host_timer(partial(call, candidate)))
    return candidates[times.index(min(times))]


def _needs(*modules: str) -> Callable[[], str | None]:
    def objection() -> str | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        return f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})"

    return objection


def _needs_opencv() -> str | None:
    reason = _needs("cv2")()
    if reason is not None:
        return "not installed: cv2 (pip install opencv-python-headless)"
    return _needs("onnx", "onnxscript")()


def _always() -> None:
    return None


def _no_engine() -> str | None:
    from ..engines import cpu

    return cpu.unavailable_reason()


def _no_compiler() -> str | None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, none was found"
    return None


def _own_version(dtype: torch.dtype = torch.float32) -> str:
    from ..engines import cpu
    from ..version import __version__

    if cpu.unavailable_reason() is not None:
        return __version__
    return f"{__version__} {cpu.isa(dtype)}"


def _torch_version() -> str:
    return str(torch.__version__)


def _version_of(distribution: str) -> Callable[[], str]:
    return lambda: distribution_version(distribution) or ""


def _opencv_version() -> str:
    names = ("opencv-python-headless", "opencv-python")
    return next(filter(None, map(distribution_version, names)), "")


def registry(device_type: str, dtype: str = "float32", task: str = "inference") -> dict[str, Spec]:
    """All providers by name, in the order of the tables.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: A key of ``PRECISIONS``. On a GPU all providers calculate in any of them; on a CPU
            there are none for some.
        task: ``"inference"``, or ``"training"``, which is measured in float32 on the CPU.
    """
    if task == "training":
        from .training_steps import TRAINING_PROVIDERS

        return TRAINING_PROVIDERS if (device_type, dtype) == ("cpu", "float32") else {}
    if device_type == "cpu":
        return CPU_PROVIDERS.get(dtype, {})
    from .gpu_engines import CUDA_PROVIDERS

    return CUDA_PROVIDERS


def dtypes(device_type: str) -> list[str]:
    """The keys of ``PRECISIONS`` that there are providers for on ``"cpu"`` or ``"cuda"``."""
    return [dtype for dtype in PRECISIONS if registry(device_type, dtype)]


PROVIDERS: dict[str, Spec] = {
    "fused": Spec("threshnet_fast", True, True, _fused, _no_engine, _own_version),
    "drop-in": Spec("threshnet_fast, model(x)", True, True, _drop_in, _no_engine, _own_version),
    "eager": Spec("PyTorch eager", False, True, _eager, _always, _torch_version),
    "channels-last": Spec(
        "PyTorch channels_last", False, True, _channels_last, _always, _torch_version
    ),
    "compile": Spec("torch.compile", False, False, _compile, _no_compiler, _torch_version),
    "compile-max": Spec(
        "torch.compile, max-autotune", False, False, _compile_max, _no_compiler, _torch_version
    ),
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
    "ncnn": Spec("ncnn", False, True, _ncnn, _needs("ncnn", "pnnx"), _version_of("ncnn")),
    "executorch": Spec(
        "ExecuTorch, XNNPACK",
        False,
        True,
        _executorch,
        _needs("executorch"),
        _version_of("executorch"),
    ),
    "mnn": Spec("MNN", False, True, _mnn, _needs("MNN", "onnx", "onnxscript"), _version_of("MNN")),
    "opencv": Spec("OpenCV", False, True, _opencv, _needs_opencv, _opencv_version),
}
"""Providers for a CPU by the name that the command line takes, in the order of the tables. All
calculate in float32."""


BFLOAT16_PROVIDERS: dict[str, Spec] = {
    **{
        name: replace(PROVIDERS[name], version=partial(_own_version, torch.bfloat16))
        for name in ("fused", "drop-in")
    },
    **{
        name: PROVIDERS[name]
        for name in ("eager", "channels-last", "compile", "compile-max", "openvino", "ncnn")
    },
}
"""Those that calculate in bfloat16: a class of its own, never compared with float32.

The others do not on x86: ONNX Runtime has no such convolution, OpenCV no such target, MNN takes its
mode for bfloat16 and calculates in float32, ExecuTorch loops over elements where XNNPACK does not.
"""


CPU_PROVIDERS = {"float32": PROVIDERS, "bfloat16": BFLOAT16_PROVIDERS}
"""Providers for a CPU, by the precision that they calculate in."""
