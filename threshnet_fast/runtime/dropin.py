"""Runs a model's forward pass through a fused backend where that changes nothing but its speed.

The compiled plan and the packed weights are kept between calls. Before each call the model is
compared with what they were made from, so that they are never stale.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..engines import cpu, cuda_graphs, samples, select, triton
from ..engines.base import (
    CompilationFailed,
    Engine,
    Objection,
    PreparedPlan,
    Purpose,
    WantsGradients,
)
from ..engines.cache import CapturedWeights, NetworkPlans
from ..graph.settings import MODELESS, ModuleSettings
from ..models.validate import check_memory, has_memory
from ..plan.lower import PlanSource, UnsupportedModule
from .training import CannotTrain, FusedTraining

if TYPE_CHECKING:
    from ..models.network import Network

__all__ = ["FusedForward", "fused_forward"]

# What the CPU's checksum reads at each address.
_PROBE_BYTES = 4

_TRAINING = "the model, or a part of it, is in training mode"
_GRADIENTS = "gradients are wanted: use torch.no_grad() or torch.inference_mode()"

_version = operator.attrgetter("_version")
_data_ptr = Tensor.data_ptr


class FusedForward:
    """The fused forward pass of one model; an attribute of it.

    Copying or pickling a model gives the copy a new, empty one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot: _PackedModel | None = None
        self._captured = CapturedWeights()
        self._training = FusedTraining()

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        return FusedForward()

    def __reduce__(self) -> tuple[type[FusedForward], tuple[()]]:
        return FusedForward, ()

    def __call__(self, model: Network, x: Tensor, *, head: bool) -> Tensor | None:
        """Runs the model on a fused backend, or returns None where the plain path must run.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.
            head: Whether to return the logits rather than the last features.

        Raises:
            RuntimeError: A fused backend was asked for by name, and it cannot run this.
        """
        request = select.request()
        if request.plain or not (torch.jit.is_tracing() or x.shape[0]):
            return None
        while True:
            try:
                plan, packed = self.prepare(model, x, head=head)
            except WantsGradients as objection:
                try:
                    return self._train(model, x, head=head)
                except CannotTrain as error:
                    if request.automatic:
                        return None
                    raise request.refusal(f"{objection}; {error}") from None
            except Objection as objection:
                if request.automatic:
                    return None
                raise request.refusal(objection) from objection.__cause__
            self._training.release()
            if cuda_graphs.capturing(x.device):
                self._captured.keep(packed)
            try:
                return plan(x, packed)
            except CompilationFailed as error:
                if not request.automatic:
                    raise request.refusal(error) from error.__cause__
                # Another round takes the next engine.
                snapshot = self._snapshot
                if snapshot is None:
                    return None
                snapshot.unsupported[plan.backend] = str(error)

    def explain_training(self, model: Network, x: Tensor) -> tuple[Engine, list[str]]:
        """Returns what would run a call that wants gradients.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.

        Returns:
            The engine, and why parts of the model run plain, a line for each.

        Raises:
            CannotTrain: All of it does, for the reason that the message gives.
        """
        engine, parts = self._training.prepare(model, x, model.checkpoint)
        return engine, parts.reasons

    def _train(self, model: Network, x: Tensor, *, head: bool) -> Tensor:
        """Runs the model with a history for autograd.

        Raises:
            CannotTrain: The plain path must run.
        """
        features = self._training.features(model, x, model.checkpoint)
        return model.forward_head(features) if head else features

    def prepare(self, model: Network, x: Tensor, *, head: bool) -> tuple[PreparedPlan, Any]:
        """Returns the prepared plan for an input and the packed weights, both up to date.

        Args:
            model: The model that this belongs to.
            x: Its input, already checked.
            head: Whether to return the logits rather than the last features.

        Raises:
            Objection: The plain path must run; the message says why.
            RuntimeError: ``x`` or a weight spans memory that was freed.
        """
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            raise Objection(f"x is a {type(x).__name__}, a subclass of torch.Tensor")
        if _transformed():
            raise Objection("a tracer, a transform or a tensor mode is active")
        if x.device.type in ("cpu", "cuda"):
            check_memory("x", x)
        autocast = select.autocast_dtype(x)
        dtype, weights_dtype = (x.dtype, x.dtype) if autocast is None else (autocast, torch.float32)
        snapshot: _PackedModel | None = None
        objections: list[str] = []
        for name in select.network_backends(x):
            engine = select.engine(name)
            objection: Exception | None = engine.objection(x, autocast, Purpose.NETWORK)
            if objection is None:
                if snapshot is None:
                    snapshot = self._checked(model, x, weights_dtype)
                try:
                    return snapshot.prepared(engine, x, head, dtype)
                except Objection as error:
                    objection = error
            objections.append(str(objection))
        raise Objection("; ".join(objections))

    def _checked(self, model: Network, x: Tensor, dtype: torch.dtype) -> _PackedModel:
        """Returns the model's snapshot, where nothing about the model keeps it from running fused.

        Args:
            model: The model.
            x: Its input.
            dtype: Which the weights must have.

        Raises:
            Objection: The plain path must run on every backend.
        """
        # Before any snapshot, which every step of a training would make anew.
        if model.training:
            raise WantsGradients(_TRAINING)
        if torch.is_grad_enabled() and (x.requires_grad or model._first_weight.requires_grad):
            raise WantsGradients(_GRADIENTS)
        snapshot = self._current(model)
        snapshot.check(dtype)
        return snapshot

    def _current(self, model: Network) -> _PackedModel:
        snapshot = self._snapshot
        if snapshot is None or not snapshot.matches(model):
            with self._lock:
                snapshot = self._snapshot
                if snapshot is None or not snapshot.matches(model):
                    snapshot = self._snapshot = _PackedModel(model, self._captured)
        return snapshot


def fused_forward(model: Network) -> FusedForward:
    """Returns what runs a model fused.

    Args:
        model: A model of this package.
    """
    run = model._fused
    assert isinstance(run, FusedForward)
    return run


class _Snapshot:
    """What a model was when its weights were packed."""

    def __init__(self, model: Network) -> None:
        modules = list(model.modules())
        self._with_modes = [module for module in modules if type(module) not in MODELESS]
        self._model = model
        self._children = [module._modules for module in modules if module._modules]
        self._child_modules = [tuple(children.values()) for children in self._children]
        self._settings = ModuleSettings(modules, ("_forward_hooks", "_forward_pre_hooks"))
        self._hooks: list[dict[int, Any]] = [
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ]
        for module in modules:
            if module is not model:
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        self._slots = [
            (tensors, name)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name in tensors
            if name != "num_batches_tracked"
        ]
        self._contents = [tensors[name] for tensors, name in self._slots]
        self._tensors = [tensor for tensor in self._contents if tensor is not None]
        for tensor in self._tensors:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                kind = f"{type(tensor).__name__} of layout {tensor.layout}"
                raise Objection(f"the model has a parameter or buffer that is a {kind}")
        devices = sorted({str(tensor.device) for tensor in self._tensors})
        if len(devices) != 1:
            raise Objection(f"the model has weights on {' and '.join(devices)}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not has_memory(tensor):
                # Whoever took it may give it back in a hook of the module.
                raise Objection(f"{name} has no memory")
            check_memory(name, tensor)
        if any(tensor.is_inference() for tensor in self._tensors):
            raise Objection("parameters are inference tensors, whose changes cannot be noticed")
        self._versions = list(map(_version, self._tensors))
        self._pointers = list(map(_data_ptr, self._tensors))
        self._parameters = [t for t in self._tensors if isinstance(t, nn.Parameter)]
        self._dtypes = {tensor.dtype for tensor in self._tensors}
        self._probe = _Probe(self._tensors)

    def matches(self, model: Network) -> bool:
        """Whether a model is the one this was made of, and still what it was."""
        try:
            contents = [tensors[name] for tensors, name in self._slots]
        except KeyError:
            return False
        return (
            model is self._model
            and not any(map(operator.is_not, contents, self._contents))
            and list(map(_version, self._tensors)) == self._versions
            and list(map(_data_ptr, self._tensors)) == self._pointers
            and [tuple(children.values()) for children in self._children] == self._child_modules
            and self._settings.same()
            and self._probe.matches()
        )

    def check(self, dtype: torch.dtype) -> None:
        """Raises an Objection for what may differ from call to call.

        Args:
            dtype: Which the weights must have.
        """
        # Lists, as generators take twice the time.
        if any([module.training for module in self._with_modes]):  # noqa: C419
            raise WantsGradients(_TRAINING)
        if torch.is_grad_enabled() and any([p.requires_grad for p in self._parameters]):  # noqa: C419
            raise WantsGradients(_GRADIENTS)
        if any(self._hooks):
            raise Objection("a part of the model has forward hooks")
        if self._dtypes != {dtype}:
            others = ", ".join(sorted(str(other) for other in self._dtypes - {dtype}))
            raise Objection(f"the model has weights of dtype {others}, expected {dtype}")


class _PackedModel(_Snapshot):
    """A model's snapshot, with the plans and packed weights that were made of it.

    Attributes:
        plans: Those of every engine.
        unsupported: Why there will be none of an engine, by its name.
    """

    def __init__(self, model: Network, captured: CapturedWeights) -> None:
        super().__init__(model)
        self.plans = NetworkPlans(PlanSource(model), captured)
        self.unsupported: dict[str, str] = {}

    def prepared(
        self, engine: Engine, x: Tensor, head: bool, dtype: torch.dtype
    ) -> tuple[PreparedPlan, Any]:
        """The prepared plan of an engine for an input, and the packed weights."""
        if engine.name in self.unsupported:
            raise Objection(self.unsupported[engine.name])
        setting = engine.setting(x.device, dtype)
        try:
            return self.plans.of(engine).get(x.shape, head, setting)
        except (CompilationFailed, UnsupportedModule) as error:
            # On some engines it is of this shape, or of this device, and another may do.
            if engine.remembers_unsupported or isinstance(error, CompilationFailed):
                self.unsupported[engine.name] = str(error)
            raise Objection(str(error)) from None


class _Probe:
    """A sample of the tensors' contents, for the edits that PyTorch's version counters miss.

    ``parameter.data`` has a counter of its own: what is written through it changes neither the
    parameter's counter nor its address. A few elements of every tensor are compared, so that an
    edit of a whole tensor shows; one of a few elements may not. On a GPU, reading them waits for
    the device; a call that is being captured in a graph does not look.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        # Aliases keep the memory alive that the addresses point to.
        self._aliases = [tensor.detach() for tensor in tensors if _dense(tensor)]
        self._device = tensors[0].device
        self._read = self._reader()
        self._found = self._read()

    def matches(self) -> bool:
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                if torch.cuda.is_current_stream_capturing():
                    return True
        found = self._read()
        if isinstance(found, Tensor):
            return found.equal(cast(Tensor, self._found))
        return found == self._found

    def _reader(self) -> Callable[[], int | Tensor]:
        """Returns a function that reads the sample, or a checksum of it."""
        if self._device.type == "cuda":
            return _reader_on_a_gpu(self._aliases, self._device)
        if cpu.unavailable_reason() is not None:
            return lambda: 0
        self._aliases = [alias for alias in self._aliases if alias.nbytes >= _PROBE_BYTES]
        addresses = torch.tensor(
            [
                alias.data_ptr() + min(index * alias.element_size(), alias.nbytes - _PROBE_BYTES)
                for alias in self._aliases
                for index in (0, alias.numel() // 2, alias.numel() - 1)
            ],
            dtype=torch.int64,
        )
        return lambda: torch.ops.threshnet_fast_cpu.checksum_floats(addresses)


def _reader_on_a_gpu(tensors: list[Tensor], device: torch.device) -> Callable[[], int | Tensor]:
    if triton.unavailable_reason() is not None:
        views = samples.sample(tensors)
        return lambda: samples.read(views)
    # Imports triton.
    from ..kernels import checksum

    addresses = checksum.sample_addresses(tensors)

    def read() -> int:
        with torch.cuda.device(device):
            return checksum.checksum(addresses)

    return read


def _dense(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (
        tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _transformed() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )
