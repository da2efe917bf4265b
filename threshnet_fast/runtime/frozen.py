"""Frozen networks: weights packed once, no checks of the model on each call."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import environment
from ..engines import select
from ..engines.base import CompilationFailed, Engine, Purpose
from ..engines.cache import PlanCache
from ..models.network import Network
from ..models.validate import check_input, check_memory
from ..plan.lower import PlanSource, UnsupportedModule, lower
from .adoption import NotAdopted, adopt

__all__ = ["FrozenNetwork", "optimize"]


class FrozenNetwork(nn.Module):
    """A network whose weights are fixed, for inference only; what :func:`optimize` returns.

    Call it with ``[N, C, H, W]`` images of any size that the network takes: each new size is
    compiled once. Calls may come from several threads.

    It may be a part of other modules. It has the children, parameters and state dict of the network
    that was frozen, but what they hold was packed: to change them changes nothing, they want no
    gradients, and a state dict with other values is an error. It stays in evaluation mode, whatever
    ``train()`` says, and where and in what dtype it is: ``to()`` another device or dtype is an
    error, except of a module that runs as plain PyTorch. Hooks on it run, those on its children do
    not, with the same exception.

    Attributes:
        backend: ``"cpu"``, ``"triton"``, ``"cuda"``, or ``"reference"`` for plain PyTorch.
        reason: One line that says why.
    """

    _module: nn.Module
    _head: nn.Module | None
    _weight: Tensor

    def __init__(
        self, module: nn.Module, backend: str, reason: str, winograd: int, head: nn.Module | None
    ) -> None:
        super().__init__()
        self.backend = backend
        self.reason = reason
        self.training = False
        self._winograd = winograd
        self._engine = select.engine(backend)
        # Beside the modules, as their names are to be those of the module that was frozen.
        whole = module if head is None else nn.ModuleDict({"network": module, "head": head})
        self.__dict__.update(_module=module, _head=head)
        self._modules, self._parameters = whole._modules, whole._parameters
        self._buffers = whole._buffers
        self._non_persistent_buffers_set = whole._non_persistent_buffers_set
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        if isinstance(module, Network):
            self.__dict__["_weight"] = module._first_weight
            # Found in the settings of all modules, which takes as long as a small network.
            self._min_size = module.min_size
            if self._engine.fused:
                self._plans = PlanCache(self._engine, PlanSource(module))
                self._frozen = self._engine.freeze(self._weight.dtype, winograd)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the network.

        Args:
            x: Images, ``[N, C, H, W]``, in any memory format; of none, the result is empty. Where
                a module of another package runs as plain PyTorch, whatever it takes.

        Returns:
            What the module returns, without a graph.

        Raises:
            TypeError: ``x`` is not a dense tensor of the network's dtype.
            ValueError: ``x`` has the wrong rank, number of channels, or size.
            RuntimeError: ``x`` is on another device, requires a gradient that a frozen network
                cannot give, or spans memory that was freed.
        """
        module = self._module
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x requires a gradient: expected an input without, as a frozen network has no "
                "backward pass; use torch.no_grad() or x.detach()"
            )
        if not isinstance(module, Network):
            with torch.no_grad():
                output: Tensor = module(x)
                return output
        image = _or_one_image(x)
        if image is not x:
            return self.forward(image)[:0]
        check_input(x, module.in_chans, self._min_size, self._weight)
        check_memory("x", x)
        if self._head is None:
            return self._run(module, x)
        with torch.no_grad():
            output = self._head(self._run(module, x))
            return output

    def _run(self, module: Network, x: Tensor) -> Tensor:
        engine = self._engine
        if not engine.fused:
            with torch.no_grad(), select.use_backend(engine.name):
                output: Tensor = module(x)
                return output
        setting = engine.setting(x.device, x.dtype, self._frozen)
        plan, packed = self._plans.get(x.shape, True, setting)
        return plan(x, packed)

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stays in evaluation mode.

        Args:
            mode: Whatever; parts of a module that is trained may be frozen.
        """
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenNetwork:
        """Does nothing where that changes neither device nor dtype, as all of ``to()`` come here.

        Raises:
            RuntimeError: It would change one of them.
        """
        if not self._engine.fused:
            self._module._apply(fn)
            if self._head is not None:
                self._head._apply(fn)
            if isinstance(self._module, Network):
                self.__dict__["_weight"] = self._module._first_weight
            return self
        weight = self._weight
        other = fn(weight)
        if (other.device, other.dtype) != (weight.device, weight.dtype):
            raise RuntimeError(
                f"a frozen network stays {weight.dtype} on {weight.device}: expected that instead "
                f"of {other.dtype} on {other.device}; move the module and optimize it there"
            )
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, tensor in self.state_dict().items():
            given = state_dict.get(prefix + name)
            if given is not None and not (given.shape == tensor.shape and given.equal(tensor)):
                error_msgs.append(
                    f"{prefix}{name} differs from that of a frozen network: expected the same, as "
                    "its weights are packed; load the module and optimize it then"
                )
                # One says it for all.
                break

    def __reduce__(self) -> tuple[type[FrozenNetwork], tuple[Any, ...]]:
        """Copies and pickles the network; the copy compiles its plans anew."""
        parts = self._module, self.backend, self.reason, self._winograd, self._head
        return FrozenNetwork, parts

    def __repr__(self) -> str:
        return f"FrozenNetwork({type(self._module).__name__}, {self.backend}: {self.reason})"


def optimize(
    module: nn.Module,
    example_input: Tensor,
    dtype: torch.dtype | None = None,
    exact: bool = False,
) -> FrozenNetwork:
    """Freezes a network for inference.

    The weights are folded and packed now; later changes of ``module`` have no effect. The network
    is taken in evaluation mode, whatever mode ``module`` is in, and runs on the device that it is
    on. On a GPU the launches of each input size are captured in a CUDA graph at its second call on
    a stream, and replayed from then on.

    Args:
        module: A model of this package; or a DenseNet or HarDNet of another, say torchvision's,
            that has the same parameters and computes the same, whatever its head is; perhaps
            within ``DataParallel`` or ``torch.compile``. Any other module runs as it is.
        example_input: An input, ``[N, C, H, W]``; its size is compiled now.
        dtype: What to compute in, and the dtype of inputs: None keeps the module's. On the CPU
            float32 or bfloat16, on a GPU also float16. Where the processor cannot multiply
            bfloat16, its kernels compute in float32 on weights and inputs in bfloat16.
        exact: Keep to direct convolution, as a GPU always does. Otherwise Winograd's F(2x2, 3x3)
            and F(4x4, 3x3) serve where they are faster, with an error that is still about that of
            PyTorch's own convolutions, but not the same everywhere: an infinity spreads over a tile
            of 2x2 or 4x4 outputs. ``THRESHNET_FAST_EXACT=1`` has the same effect.

    Returns:
        A module that takes images and returns what ``module`` would. Where no fused backend is
        available, or the module has parts that plans cannot express, it runs plain PyTorch and
        its ``reason`` says why. If that is for the module's sake, a ``UserWarning`` does too.

    Raises:
        TypeError: ``module`` is no module, or ``example_input`` is not a tensor that it takes.
        ValueError: ``dtype`` is not supported, or ``example_input`` has a wrong shape.
        RuntimeError: ``example_input`` requires a gradient or is on another device, or a weight
            spans memory that was freed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: expected a torch.nn.Module")
    if not isinstance(exact, bool):
        raise TypeError(f"exact is {exact!r}: expected True or False")
    module = _unwrapped(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda"):
            check_memory(name, tensor)
    head: nn.Module | None = None
    winograd = 0 if exact else environment.winograd_by_default()
    if isinstance(module, Network):
        module = _baked(copy.deepcopy(module)).eval()
    else:
        try:
            module, head = adopt(_baked(copy.deepcopy(module)), example_input)
        except NotAdopted as error:
            return _as_it_is(module, example_input, dtype, str(error), winograd)
    assert isinstance(module, Network)
    module._check_input(_or_one_image(example_input))
    weight = module._first_weight
    # Who asks for plain PyTorch around it still wants what is made here to be fast.
    asked = select.AUTO if select.request().plain else select.requested_backend()
    with select.use_backend(asked):
        engines = [select.engine(name) for name in select.network_backends(weight)]
    _check_dtype(dtype, engines[0].dtypes.get(Purpose.NETWORK, ()))
    if dtype is not None:
        module, example_input = module.to(dtype), example_input.to(dtype)
        head = None if head is None else head.to(dtype)
    objections: list[str] = []
    unsupported: str | None = None
    for engine in engines:
        objection = _objection(module, engine)
        if objection is None:
            reason = "; ".join([*objections, engine.describe(module._first_weight)])
            frozen = FrozenNetwork(module, engine.name, reason, winograd, head)
            try:
                frozen(example_input)
                return frozen
            except (UnsupportedModule, CompilationFailed) as error:
                objection = str(error)
                if engine.remembers_unsupported:
                    unsupported = objection
        objections.append(objection)
    unsupported = unsupported or _unsupported(module)
    if unsupported is not None:
        _warn(unsupported)
    reason = "; ".join(dict.fromkeys(objections))
    frozen = FrozenNetwork(module, "reference", reason, winograd, head)
    frozen(example_input)
    return frozen


def _or_one_image(x: Tensor) -> Tensor:
    """One image of zeros where there is none: a result of its shape is empty in the same way."""
    if isinstance(x, Tensor) and x.ndim == 4 and not x.shape[0]:
        return x.new_zeros(1, *x.shape[1:])
    return x


def _unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper that computes the same was made of."""
    while True:
        if isinstance(module, FrozenNetwork) and module._head is None:
            module = module._module
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(module, _compiled_kind()):
            module = cast(nn.Module, module._orig_mod)
        else:
            return module


def _compiled_kind() -> tuple[type[nn.Module], ...]:
    """What torch.compile returns of modules, where it has been used: it takes long to import."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return () if frame is None else (frame.OptimizedModule,)


def _baked(module: nn.Module) -> nn.Module:
    """Makes parametrised weights of a copy plain ones, of the values that they have."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            names = list(cast(nn.ModuleDict, part.parametrizations))
            values = {name: getattr(part, name).detach().clone() for name in names}
            # PyTorch's own removal would take the weight from the class, which the original shares.
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part._modules["parametrizations"]
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


def _check_dtype(dtype: torch.dtype | None, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype is not None and dtype not in allowed:
        raise ValueError(f"dtype is {dtype}: expected None or {' or '.join(map(str, allowed))}")


def _as_it_is(
    module: nn.Module, example: Any, dtype: torch.dtype | None, reason: str, winograd: int
) -> FrozenNetwork:
    """Freezes a module of another package that plain PyTorch runs."""
    _check_dtype(dtype, select.dtypes_of_networks())
    module = copy.deepcopy(module).eval()
    if dtype is not None:
        module = module.to(dtype)
        example = example.to(dtype) if isinstance(example, Tensor) else example
    frozen = FrozenNetwork(module, "reference", reason, winograd, None)
    frozen(example)
    _warn(reason)
    return frozen


def _warn(reason: str) -> None:
    # Where optimize was called.
    warnings.warn(
        f"optimize leaves the module to plain PyTorch: {reason}", UserWarning, stacklevel=4
    )


def _unsupported(module: Network) -> str | None:
    """What a plan cannot express of a network, or None."""
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return "a part of the module has forward hooks"
    try:
        lower(module, (1, module.in_chans, module.min_size, module.min_size), fold=False)
    except UnsupportedModule as error:
        return str(error)
    return None


def _objection(module: Network, engine: Engine) -> str | None:
    weight = module._first_weight
    error = engine.objection(weight, purpose=Purpose.NETWORK)
    if error is not None:
        return str(error)
    other = next((p.dtype for p in module.parameters() if p.dtype is not weight.dtype), None)
    if other is not None:
        return f"the model has weights of dtype {other}, expected {weight.dtype}"
    return _unsupported(module)
