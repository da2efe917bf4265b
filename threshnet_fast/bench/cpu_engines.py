"""The engines that ``bench`` compares on a CPU, one function each.

Every provider runs the same weights on the same input with the same number of threads, in the
layout it likes best, and is otherwise set up as its documentation recommends for latency. In
bfloat16, a class of its own, weights and input are rounded before: PyTorch and this package take
and return bfloat16; the other engines take the rounded numbers in float32, round inside, and return
float32. Those for a GPU are in ``gpu_engines``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.onnx_file import silence
from .job import Job, Provider, Spec, Unavailable, float32_parts, plain_module
from .machine import distribution_version
from .precision import PRECISIONS
from .timing import host_timer

__all__ = ["BFLOAT16_PROVIDERS", "CPU_PROVIDERS", "ERROR_LIMIT", "PROVIDERS", "reset_compiler"]

ERROR_LIMIT = PRECISIONS["float32"].error_limit
"""Largest error that passes for float32, as a part of the largest output without the classifier's
bias. Reduced precision, such as bfloat16 or TF32, does not pass."""


def reset_compiler() -> None:
    """Makes torch.compile forget what it has compiled.

    Between two inputs: it gives up on code that it has compiled too many times. Never between two
    providers of one input, which would have the first compile again while it is timed.
    """
    import torch._dynamo

    torch._dynamo.reset()


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
    with silence(), torch.no_grad():
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
    with silence(), torch.no_grad():
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
    from ..engines.select import is_for
    from ..runtime.frozen import optimize

    call = optimize(job.model, job.x, dtype=job.x.dtype)
    if not is_for(call.backend, "cpu"):
        raise Unavailable(call.reason)
    return Provider(lambda: call(job.x))


def _drop_in(job: Job) -> Provider:
    from ..engines.select import is_for
    from ..runtime.explain import explain

    model = job.model
    with torch.no_grad():
        explanation = explain(model, job.x)
    if not is_for(explanation.backend, "cpu"):
        raise Unavailable(explanation.reason)

    def run() -> Tensor:
        with torch.no_grad():
            return model(job.x)

    return Provider(run)


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
