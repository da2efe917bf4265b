"""Frozen networks: weights packed once, no checks of the model on each call."""

from __future__ import annotations

import copy
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import environment
from ..engines import select
from ..engines.base import CompilationFailed, Engine, Purpose
from ..engines.cache import PlanCache
from ..models.network import Network
from ..models.validate import check_input, check_memory
from ..plan.lower import PlanSource, UnsupportedModule, lower
from .division import Division, divide, restore
from .host import Arguments
from .island import FusedIsland

__all__ = ["FrozenNetwork", "optimize"]


class FrozenNetwork(nn.Module):
    """A module whose weights are fixed, for inference only; what :func:`optimize` returns.

    A model of this package takes ``[N, C, H, W]`` images of any size: each new size is compiled
    once. Any other module takes what it took before; its islands, the parts that run fused, are
    compiled for each new size, and a size for which one has no plan runs that one as plain PyTorch.
    Calls may come from several threads.

    It may be a part of other modules. It has the children, parameters and state dict of the module
    that was frozen, but what they hold was packed: to change them changes nothing, they want no
    gradients, and a state dict with other values is an error. It stays in evaluation mode, whatever
    ``train()`` says, and where and in what dtype it is: ``to()`` another device or dtype is an
    error, except of a module that runs as plain PyTorch. Hooks on it run. Those on its children do
    not, if they were added after it was frozen, with the same exception.

    Attributes:
        backend: ``"cpu"``, ``"triton"``, ``"cuda"``, or ``"reference"`` for plain PyTorch.
        reason: One line that says why.
        islands: The parts that run fused, of a module that does not as a whole.
        foreign: One line for each operation that runs as plain PyTorch beside them: its name and
            why.
    """

    islands: tuple[FusedIsland, ...] = ()
    foreign: tuple[str, ...] = ()
    _module: nn.Module
    _division: Division | None
    _weight: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        backend: str,
        reason: str,
        winograd: int,
        division: Division | None = None,
        example: Arguments | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.reason = reason
        if division is not None:
            self.islands, self.foreign = division.islands, division.foreign
        self.training = False
        self._winograd = winograd
        self._engine = select.engine(backend)
        self._example = None if example is None else example.map(lambda x: x.to("meta"))
        # Beside the modules, as their names are to be those of the module that was frozen.
        self.__dict__.update(_module=module, _division=division)
        self._modules, self._parameters = module._modules, module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.__dict__["_weight"] = _first_weight(module)
        self._whole = division is None and isinstance(module, Network)
        if self._whole:
            network = cast(Network, module)
            # Found in the settings of all modules, which takes as long as a small network.
            self._min_size = network.min_size
            if self._engine.fused:
                self._plans = PlanCache(self._engine, PlanSource(network))
                self._frozen = self._engine.freeze(network._first_weight.dtype, winograd)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module.

        Args:
            *args: What the module takes: images, ``[N, C, H, W]``, in any memory format, of a model
                of this package; of none, the result is empty.
            **kwargs: As well.

        Returns:
            What the module returns, without a graph.

        Raises:
            TypeError: Images are not a dense tensor of the network's dtype.
            ValueError: They have the wrong rank, number of channels, or size.
            RuntimeError: An input is on another device, requires a gradient that a frozen network
                cannot give, or spans memory that was freed.
        """
        if torch.is_grad_enabled():
            _refuse_gradients(args, kwargs)
        if self._whole:
            return self._images(*args, **kwargs)
        run: Any = self._module if self._division is None else self._division
        with torch.no_grad():
            return run(*args, **kwargs)

    @property
    def network(self) -> Network | None:
        """The model of this package that runs as a whole, or None."""
        return cast(Network, self._module) if self._whole else None

    @property
    def division(self) -> Division | None:
        """The module with its islands, or None where there are none."""
        return self._division

    def _images(self, x: Tensor) -> Tensor:
        network = cast(Network, self._module)
        image = _or_one_image(x)
        if image is not x:
            return self._images(image)[:0]
        check_input(x, network.in_chans, self._min_size, cast(Tensor, self._weight))
        check_memory("x", x)
        engine = self._engine
        if not engine.fused:
            with torch.no_grad(), select.use_backend(engine.name):
                output: Tensor = network(x)
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
        weight = self._weight
        if not self._engine.fused or weight is None:
            self._module._apply(fn)
            self.__dict__["_weight"] = _first_weight(self._module)
            return self
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

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Copies and pickles the network; the copy compiles its plans anew."""
        parts = self._module, self.backend, self.reason, self._winograd
        if self._division is None:
            return FrozenNetwork, parts
        return _with_islands, (*parts, self._example)

    def __repr__(self) -> str:
        return f"FrozenNetwork({type(self._module).__name__}, {self.backend}: {self.reason})"


def optimize(
    module: nn.Module | str | os.PathLike[str],
    example_input: Any,
    dtype: torch.dtype | None = None,
    exact: bool = False,
) -> FrozenNetwork:
    """Freezes a network for inference.

    The weights are folded and packed now; later changes of ``module`` have no effect. The network
    is taken in evaluation mode, whatever mode ``module`` is in, and runs on the device that it is
    on. On a GPU the launches of each input size are captured in a CUDA graph at its second call on
    a stream, and replayed from then on.

    A module of another package is known by what it computes, not by its class or names: it is
    traced on the example, and what plans can express of it runs fused, in islands, with the rest as
    it is between them. It and what was made of it both run on the example and on random numbers,
    and if they differ, the module stays as it is.

    Args:
        module: Any module; perhaps within ``DataParallel`` or ``torch.compile``. Or the name of an
            ONNX file, which :func:`threshnet_fast.graph.onnx.load_onnx` reads.
        example_input: An input, ``[N, C, H, W]``; its size is compiled now. Or a tuple of all
            positional arguments.
        dtype: What to compute in, and the dtype of inputs: None keeps the module's. On the CPU
            float32 or bfloat16, on a GPU also float16. Where the processor cannot multiply
            bfloat16, its kernels compute in float32 on weights and inputs in bfloat16.
        exact: Keep to direct convolution, as a GPU always does. Otherwise Winograd's F(2x2, 3x3)
            and F(4x4, 3x3) serve where they are faster, with an error that is still about that of
            PyTorch's own convolutions, but not the same everywhere: an infinity spreads over a tile
            of 2x2 or 4x4 outputs. ``THRESHNET_FAST_EXACT=1`` has the same effect.

    Returns:
        A module that takes and returns what ``module`` does. What no fused backend computes runs as
        plain PyTorch: ``reason`` and ``foreign`` say what and why, and if that is for the module's
        sake, one ``UserWarning`` does too.

    Raises:
        TypeError: ``module`` is neither a module nor a file's name, or ``example_input`` is nothing
            that it takes.
        ValueError: ``dtype`` is not supported, or ``example_input`` has a wrong shape.
        RuntimeError: ``example_input`` requires a gradient or is on another device, or a weight
            spans memory that was freed.
        OSError: The file cannot be read.
    """
    if isinstance(module, str | os.PathLike):
        # Where it is asked for: most who freeze networks have no use for the package onnx.
        from ..graph.onnx import load_onnx

        module = load_onnx(module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: expected a torch.nn.Module")
    if not isinstance(exact, bool):
        raise TypeError(f"exact is {exact!r}: expected True or False")
    module = _unwrapped(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda"):
            check_memory(name, tensor)
    winograd = 0 if exact else environment.winograd_by_default()
    module = restore(_baked(_copied(module))).eval()
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    example = Arguments(args)
    if isinstance(module, Network):
        module._check_input(_or_one_image(example_input))
        if _unsupported(module) is None:
            return _whole(module, example_input, dtype, winograd)
    return _divided(module, example, dtype, winograd)


def _whole(
    module: Network, example: Tensor, dtype: torch.dtype | None, winograd: int
) -> FrozenNetwork:
    """Freezes a model of this package, all of which plans can express."""
    engines = _engines(module._first_weight)
    _check_dtype(dtype, engines[0].dtypes.get(Purpose.NETWORK, ()))
    if dtype is not None:
        module, example = module.to(dtype), example.to(dtype)
    objections: list[str] = []
    unsupported: str | None = None
    for engine in engines:
        objection = _objection(module, engine)
        if objection is None:
            reason = "; ".join([*objections, engine.describe(module._first_weight)])
            frozen = FrozenNetwork(module, engine.name, reason, winograd)
            try:
                frozen(example)
                return frozen
            except (UnsupportedModule, CompilationFailed) as error:
                objection = str(error)
                if engine.remembers_unsupported:
                    unsupported = objection
        objections.append(objection)
    if unsupported is not None:
        _warn(f"the module is left to plain PyTorch: {unsupported}")
    reason = "; ".join(dict.fromkeys(objections))
    frozen = FrozenNetwork(module, "reference", reason, winograd)
    frozen(example)
    return frozen


def _divided(
    module: nn.Module, example: Arguments, dtype: torch.dtype | None, winograd: int
) -> FrozenNetwork:
    """Freezes a module whose islands run fused."""
    _refuse_gradients(example.args, example.kwargs)
    weight = _first_weight(module)
    engines = [] if weight is None else _engines(weight)
    allowed = select.dtypes_of_networks()
    _check_dtype(dtype, engines[0].dtypes.get(Purpose.NETWORK, ()) if engines else allowed)
    expected = [(example, example.call(module))]
    if dtype is not None:
        module = module.to(dtype)
        example = example.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
        weight = _first_weight(module)
        expected = [(example, expected[0][1])]
    if engines:
        expected += _on_noise(module, example)
    objections: list[str] = []
    for engine in engines:
        assert weight is not None
        error = engine.objection(weight, purpose=Purpose.NETWORK)
        if error is not None:
            objections.append(str(error))
            continue
        try:
            found = divide(module, example, engine, weight.dtype, winograd)
        except UnsupportedModule as error:
            objections.append(str(error))
            continue
        for x, result in expected:
            difference = found.difference(x, result)
            if difference is not None:
                objections.append(f"traced and fused, {difference}")
                found.undo()
                break
        else:
            reason = "; ".join([*objections, engine.describe(weight), found.summary()])
            if found.foreign:
                _warn(f"not all of the module runs fused: {found.summary()}")
            return FrozenNetwork(module, engine.name, reason, winograd, found, example)
    reason = "; ".join(dict.fromkeys(objections)) or "the module has no weights"
    frozen = FrozenNetwork(module, "reference", reason, winograd)
    _warn(f"the module is left to plain PyTorch: {reason}")
    return frozen


def _on_noise(module: nn.Module, example: Arguments) -> list[tuple[Arguments, Any]]:
    """Random numbers and what a module makes of them, as an example may be all zeros."""
    noise = example.noise()
    try:
        return [(noise, noise.call(module))]
    except (IndexError, RuntimeError, TypeError, ValueError):
        # What it takes has to be of a kind.
        return []


def _with_islands(
    module: nn.Module, backend: str, reason: str, winograd: int, example: Arguments
) -> FrozenNetwork:
    """Freezes a copy of a module that was frozen."""
    weight = _first_weight(module)
    assert weight is not None
    zeros = example.map(lambda x: torch.zeros(x.shape, dtype=x.dtype, device=weight.device))
    division = divide(restore(module), zeros, select.engine(backend), weight.dtype, winograd)
    return FrozenNetwork(module, backend, reason, winograd, division, zeros)


def _engines(weight: Tensor) -> list[Engine]:
    """The fused engines for a device, in order."""
    # Who asks for plain PyTorch around it still wants what is made here to be fast.
    asked = select.AUTO if select.request().plain else select.requested_backend()
    with select.use_backend(asked):
        return [select.engine(name) for name in select.network_backends(weight)]


def _first_weight(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter or buffer, which tells device and dtype."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def _refuse_gradients(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                "x requires a gradient: expected an input without, as a frozen network has no "
                "backward pass; use torch.no_grad() or x.detach()"
            )


def _or_one_image(x: Tensor) -> Tensor:
    """One image of zeros where there is none: a result of its shape is empty in the same way."""
    if isinstance(x, Tensor) and x.ndim == 4 and not x.shape[0]:
        return x.new_zeros(1, *x.shape[1:])
    return x


def _unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper that computes the same was made of."""
    while True:
        if isinstance(module, FrozenNetwork):
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


def _copied(module: nn.Module) -> nn.Module:
    """A copy, also of weights that hooks calculate of others, whose history has none."""
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(module, memo)


# How weights were parametrised before there were parametrisations.
_REMOVALS: dict[type, Callable[[nn.Module, str], nn.Module]] = {
    WeightNorm: nn.utils.remove_weight_norm,
    SpectralNorm: nn.utils.remove_spectral_norm,
}


def _baked(module: nn.Module) -> nn.Module:
    """Makes parametrised weights of a copy plain ones, of the values that they have."""
    for part in list(module.modules()):
        for hook in list(part._forward_pre_hooks.values()):
            if type(hook) in _REMOVALS:
                _REMOVALS[type(hook)](part, cast(Any, hook).name)
        if parametrize.is_parametrized(part):
            names = list(cast(nn.ModuleDict, part.parametrizations))
            values = {name: getattr(part, name).detach().clone() for name in names}
            # PyTorch's own removal would take the weight from the class, which the original shares.
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part._modules["parametrizations"]
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value, requires_grad=False))
        # They would look for the parametrisation in state dicts.
        for key, read in list(part._load_state_dict_pre_hooks.items()):
            if getattr(read, "hook", read).__module__.startswith("torch.nn.utils."):
                del part._load_state_dict_pre_hooks[key]
    return module


def _check_dtype(dtype: torch.dtype | None, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype is not None and dtype not in allowed:
        raise ValueError(f"dtype is {dtype}: expected None or {' or '.join(map(str, allowed))}")


def _warn(text: str) -> None:
    # Where optimize was called.
    warnings.warn(f"optimize: {text}", UserWarning, stacklevel=4)


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
