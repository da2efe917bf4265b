"""Modules of other packages whose training runs fused: what ``fuse_training`` returns."""

from __future__ import annotations

import operator
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten

from ..autograd.chain import Chain
from ..engines import select
from ..graph.export import annotate, trace
from ..graph.ir import UnsupportedModule
from ..graph.islands import insert
from ..graph.settings import DROPOUTS
from ..graph.trace import name_of
from ..models.network import Network
from ..plan.raw import Convolution
from .chains import ChainModule, find_chains
from .fingerprint import Fingerprint
from .host import Arguments
from .training import HOOKS, objection_to
from .transforms import transformed

__all__ = ["FusedModule", "fuse_training"]

# Divisions that are kept: one for each mode that a training goes through, say.
_MOST_DIVISIONS = 4
# Of the norm of a tensor. Float32 in different orders of additions stays far below, but a gradient
# may have another activation that is decided by rounding.
_TOLERANCE = 1e-3
_TOLERANCE_OF_GRADIENTS = 5e-2
# How many times as far as by rounding its input a step may be off by the order of its additions.
_AMPLIFIED = 20.0
_ROUNDING = 1e-6
_KNOWN = (type(None), bool, int, float, str)
# What modules have in dictionaries of their own.
_HOLDERS = ("_modules", "_parameters", "_buffers", *HOOKS)


class FusedModule(nn.Module):
    """A module that is trained fused; what :func:`fuse_training` returns.

    It has the children, parameters, buffers and state dict of the module, and sets attributes of
    that: only hooks on it are its own. In training mode, what chains can hold of the module runs in
    them, and all else between them as plain PyTorch; in evaluation mode the module runs itself.
    """

    _module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        self.__dict__["_module"] = module
        super().__init__()
        self.__dict__.update(
            _modules=module._modules,
            _parameters=module._parameters,
            _buffers=module._buffers,
            _non_persistent_buffers_set=module._non_persistent_buffers_set,
            _load_state_dict_post_hooks=module._load_state_dict_post_hooks,
            **_nothing_divided(),
        )

    @property
    def training(self) -> bool:
        """The mode of the module."""
        return self._module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_modules" in self.__dict__:
            self._module.training = mode

    @property
    def reasons(self) -> tuple[str, ...]:
        """What ran as plain PyTorch in the last call in training mode, one line each, and why."""
        return self.__dict__["_reasons"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module.

        Args:
            *args: What the module takes.
            **kwargs: As well.

        Returns:
            What the module returns.
        """
        if transformed() or not self._module.training:
            self._release()
            return self._module(*args, **kwargs)
        return self._prepare(args, kwargs)(*args, **kwargs)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """What runs a call in training mode."""
        reason = _objection_to_call(args, kwargs)
        if reason is not None:
            self.__dict__["_reasons"] = (reason,)
            return self._module
        form = _form(args, kwargs)
        divisions: list[_Division] = self.__dict__["_divisions"]
        for division in divisions:
            if division.holds(form):
                break
        else:
            with self.__dict__["_lock"]:
                # Each costs as much as a few steps.
                wasted = self.__dict__["_wasted"] + 1 if divisions and divisions[0].calls < 2 else 0
                if wasted > _MOST_DIVISIONS:
                    self.__dict__["_reasons"] = ("the module changes with every call",)
                    return self._module
                self.__dict__["_wasted"] = wasted
                division = _Division(self._module, form, args, kwargs)
                self.__dict__["_divisions"] = [division, *divisions][:_MOST_DIVISIONS]
        division.calls += 1
        reason = division.objection()
        self.__dict__["_reasons"] = division.reasons if reason is None else (reason,)
        if reason is not None or division.traced is None:
            return self._module
        self.__dict__["_has_run"] = True
        return division.traced

    def _release(self) -> None:
        """Lets go of the memory that is kept for the next step."""
        if self.__dict__["_has_run"]:
            self.__dict__["_has_run"] = False
            for division in self.__dict__["_divisions"]:
                division.release()

    def train(self, mode: bool = True) -> FusedModule:
        """Sets the mode of the module.

        Args:
            mode: Whether to train.
        """
        self._module.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedModule:
        self._module._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module."""
        return self._module.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._module._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_module")
        if module is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew for a copy."""
        return {**self.__dict__, **dict.fromkeys(_nothing_divided())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, **_nothing_divided())

    def __repr__(self) -> str:
        return f"FusedModule({self._module!r})"


def _nothing_divided() -> dict[str, Any]:
    return {
        "_divisions": [],
        "_reasons": (),
        "_has_run": False,
        "_wasted": 0,
        "_lock": threading.Lock(),
    }


def fuse_training(module: nn.Module, example_input: Any) -> nn.Module:
    """Has a module of any package run fused in training, on the CPU in float32.

    The module is traced on the example, in training mode. What chains can hold of it (convolutions
    without bias, BatchNorm, ReLU and ReLU6, pools and concatenations, with one map in and one out)
    runs forward and back in C++; all else as plain PyTorch between them. A step of what was made is
    compared with one of the module itself, gradients and running statistics too, and if they
    differ, the module stays as it is. Neither changes the module's tensors or PyTorch's random
    numbers.

    Parameters, buffers, children and the state dict stay the module's own: an optimizer made before
    goes on to work, and what happens to the module shows. Where a part of it is replaced, or a
    setting, a mode or a hook, it is divided anew in the next call. Dropout draws the numbers that
    it would draw anyway. What was under :mod:`torch.utils.checkpoint` is calculated once: unlike
    PyTorch, which updates the running statistics of its norms again on the way back.

    Args:
        module: Any module, on the CPU in float32.
        example_input: An input as in training, ``[N, C, H, W]``; batch and size may be others
            later. Or a tuple of all positional arguments.

    Returns:
        A module that takes and returns what ``module`` does, in evaluation mode by running that.
        Its ``reasons`` say what runs as plain PyTorch, and why; where that is more than an average
        over whole maps and what comes behind it, one ``UserWarning`` does too. A model of this
        package trains fused anyway, and is returned as it is.

    Raises:
        TypeError: ``module`` is no module.
        Exception: What the module itself raises on the example.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: expected a torch.nn.Module")
    if isinstance(module, Network | FusedModule):
        return module
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    fused = FusedModule(module)
    with _training(module):
        fused._prepare(args, {})
    divisions: list[_Division] = fused.__dict__["_divisions"]
    slow = divisions[0].slow if divisions else fused.reasons
    if slow:
        text = "; ".join(list(dict.fromkeys(slow))[:3])
        more = len(dict.fromkeys(slow)) - 3
        warnings.warn(
            f"fuse_training: runs as plain PyTorch: {text}" + (f"; and {more} more" * (more > 0)),
            UserWarning,
            stacklevel=2,
        )
    return fused


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Has a module in training mode for a while, if it is not."""
    if module.training:
        yield
        return
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _objection_to_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call has to run as plain PyTorch, or None."""
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return "no argument is a tensor"
    for leaf in leaves:
        if not isinstance(leaf, (*_KNOWN, Tensor)):
            return f"an argument is a {type(leaf).__name__}"
    engine, reason = select.training_engine(tensors[0])
    if engine is None:
        return reason
    if any(getattr(torch_module, f"_global{name}") for name in HOOKS):
        return "there are hooks of all modules"
    if torch.is_inference_mode_enabled():
        return "inference mode is on"
    return None


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What arguments have to have in common with those of another call to run the same graph."""
    leaves, spec = tree_flatten((args, kwargs))
    return [spec, *((x.ndim, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves)]


class _State:
    """Everything that decides what a module computes, but the values of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self._kept = self._read()
        self._values = self._frozen()

    def same(self) -> bool:
        """Whether all is as it was: the same objects, and the same values in lists."""
        found = self._read()
        return (
            len(found) == len(self._kept)
            and all(map(operator.is_, found, self._kept))
            and self._frozen() == self._values
        )

    def same_modules(self) -> bool:
        """Whether there are the same modules, whatever has become of them."""
        return list(self.modules[0].modules()) == self.modules

    def _read(self) -> list[Any]:
        found: list[Any] = []
        for module in self.modules:
            attributes = module.__dict__
            found.append(type(module))
            found.extend(attributes)
            found.extend(attributes.values())
            for name in _HOLDERS:
                held = attributes[name]
                found.extend(held)
                found.extend(held.values())
        return found

    def _frozen(self) -> list[Any]:
        return [
            _frozen(value)
            for module in self.modules
            for name, value in module.__dict__.items()
            if type(value) in (list, dict, set) and name not in _HOLDERS
        ]


def _frozen(value: Any) -> Any:
    """A value that shows whether another one is made of the same."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, tuple(map(_frozen, value))
    if kind is dict:
        return kind, tuple((_frozen(key), _frozen(each)) for key, each in value.items())
    if kind is set:
        return kind, frozenset(map(_frozen, value))
    return value if isinstance(value, _KNOWN) else (kind, id(value))


class _Division:
    """How a module divides in chains and what is between them, while it stays what it is.

    Args:
        module: The module.
        form: That of the arguments.
        args: What it is called with.
        kwargs: As well.

    Attributes:
        traced: The module with chains; None where the module itself has to run.
        reasons: What is in no chain, or why there is none.
        slow: Those that are worth a warning.
        calls: How many it has been found for.
    """

    traced: fx.GraphModule | None = None

    def __init__(
        self,
        module: nn.Module,
        form: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._form = form
        self.calls = 0
        self._state = _State(module)
        # Whether each call changes the module, which counts for nothing then.
        self._volatile = False
        self._chains: list[ChainModule] = []
        self._fingerprint: Fingerprint | None = None
        try:
            self.reasons, self.slow = self._divide(module, args, kwargs)
        except UnsupportedModule as error:
            self.traced, self._chains = None, []
            self.reasons = self.slow = (str(error),)

    def holds(self, form: list[Any]) -> bool:
        """Whether this is that of a call, and the module is what it was."""
        fingerprint = self._fingerprint
        if form != self._form:
            return False
        if self._volatile:
            return self._state.same_modules()
        return self._state.same() and (
            fingerprint is None or fingerprint.unchanged() or fingerprint.same()
        )

    def objection(self) -> str | None:
        """Why the module itself has to run now, or None."""
        if self._fingerprint is not None and self._fingerprint.without_memory is not None:
            return f"{self._fingerprint.without_memory} has no memory"
        return None

    def release(self) -> None:
        """Lets go of the memory that is kept for the next step."""
        for part in self._chains:
            part.chain.pool.clear()

    def _divide(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        named = list(module.named_modules())
        if any(part.__dict__[name] for part in self._state.modules for name in HOOKS):
            raise UnsupportedModule("a part of the module has hooks")
        fingerprint = Fingerprint(named, HOOKS, contents=False)
        if any(tensor.is_inference() for tensor in fingerprint.tensors):
            raise UnsupportedModule("the module has inference tensors")
        fingerprint.take()
        example = Arguments(args, kwargs)
        if any(map(_constant, example.tensors)):
            example = example.noise()
        with _untouched(module):
            expected = _Step(module, module, example)
        if not self._state.same():
            self._volatile = True
            raise UnsupportedModule("a forward pass changes attributes of the module")
        with _untouched(module):
            numbers = _other_random_numbers()
            traced = trace(module, example.args, example.kwargs, export=False)
            annotate(traced, example.args, example.kwargs)
            if numbers != _other_random_numbers():
                raise UnsupportedModule("the module draws random numbers outside of PyTorch")
        self._check_parts(traced)
        found = find_chains(traced)
        if not found.chains:
            reasons = found.slow or found.foreign
            raise UnsupportedModule(reasons[0] if reasons else "the module computes nothing")
        for chain in found.chains:
            reason = objection_to(_tensors(chain))
            if reason is not None:
                raise UnsupportedModule(reason)
        insert(traced, found.islands)
        for island, chain in zip(found.islands, found.chains, strict=True):
            part = ChainModule(island, chain)
            setattr(traced, island.name, part)
            self._chains.append(part)
        _take_any_format(traced)
        self._compare(module, traced, example, expected)
        self.release()
        self._fingerprint = fingerprint
        self.traced = traced
        return found.foreign, found.slow

    def _check_parts(self, traced: fx.GraphModule) -> None:
        """Refuses modules that are nowhere registered: nobody would notice where they change."""
        known = set(self._state.modules)
        for node in traced.graph.nodes:
            if node.op == "call_module":
                part = traced.get_submodule(str(node.target))
                # Those that work in place are replaced by copies that do not.
                if part not in known and not hasattr(part, "inplace"):
                    raise UnsupportedModule(f"{node.target} is a module that is not registered")

    def _compare(
        self, module: nn.Module, traced: fx.GraphModule, example: Arguments, expected: _Step
    ) -> None:
        """Refuses chains that compute something else.

        Raises:
            UnsupportedModule: They do.
        """
        try:
            with _untouched(module):
                actual = _Step(module, traced, example)
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise UnsupportedModule(f"it fails in chains: {type(error).__name__}: {text}") from None
        difference = actual.difference(expected)
        if difference > 1:
            with _untouched(module):
                rounded = _Step(module, module, example.map(_rounded))
            difference /= max(1.0, _AMPLIFIED * rounded.difference(expected))
        if not difference <= 1:
            raise UnsupportedModule("in chains it computes something else")


class _Step:
    """What a step computes: outputs, gradients and running statistics.

    Args:
        module: What has the parameters.
        run: What runs.
        example: What it is called with.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], example: Arguments) -> None:
        wanted: list[Tensor] = [p for p in module.parameters() if p.requires_grad]

        def given(x: Tensor) -> Tensor:
            """A copy that may be written to, without a history."""
            copy = x.detach().clone()
            if x.requires_grad:
                wanted.append(copy.requires_grad_())
                copy = copy.clone()
            return copy

        with torch.inference_mode(False), torch.enable_grad():
            example = example.map(given)
            outputs = Arguments((run(*example.args, **example.kwargs),)).tensors
            self.buffers = [buffer.detach().clone() for buffer in module.buffers()]
            generator = torch.Generator().manual_seed(0)
            loss: Any = 0
            for output in outputs:
                if output.requires_grad:
                    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
                    loss = loss + (output * weights).sum()
            self.gradients: tuple[Tensor | None, ...] = ()
            if isinstance(loss, Tensor) and wanted:
                self.gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        self.outputs = [output.detach() for output in outputs]

    def difference(self, expected: _Step) -> float:
        """The largest error of a tensor, of what is tolerated; infinite where others are given."""
        if [g is None for g in self.gradients] != [g is None for g in expected.gradients]:
            return float("inf")
        if [x.shape for x in self.outputs] != [x.shape for x in expected.outputs]:
            return float("inf")
        mine = [g for g in self.gradients if g is not None]
        theirs = [g for g in expected.gradients if g is not None]
        # Of a gradient that is nothing but cancellation, no digit is right in float32.
        floor = 1e-2 * max((float(g.norm()) for g in theirs), default=0.0)
        errors = [
            _error(a, b, floor) / _TOLERANCE_OF_GRADIENTS for a, b in zip(mine, theirs, strict=True)
        ]
        for a, b in zip(
            [*self.outputs, *self.buffers], [*expected.outputs, *expected.buffers], strict=True
        ):
            errors.append(_error(a, b, 0.0) / _TOLERANCE)
        return max(errors, default=0.0)


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    if bool(((actual == expected) | (actual.isnan() & expected.isnan())).all()):
        return 0.0
    if not actual.is_floating_point():
        return float("inf")
    difference = float((actual.double() - expected.double()).norm())
    size = float(expected.double().norm()) + floor
    error = difference / size if size else float("inf")
    return error if error == error else float("inf")


def _constant(x: Tensor) -> bool:
    """Whether a tensor tells nothing of what is computed of it."""
    return x.is_floating_point() and x.numel() > 0 and bool((x == x.flatten()[0]).all())


def _rounded(x: Tensor) -> Tensor:
    """A tensor with other last digits."""
    if not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(0)
    factors = 1 + _ROUNDING * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return (x.detach() * factors).requires_grad_(x.requires_grad)


def _tensors(chain: Chain) -> Iterator[tuple[str, Tensor]]:
    """What a chain reads of modules."""
    plan = chain.plan
    parts = [(node.name, node.module) for node in plan.nodes if isinstance(node, Convolution)]
    for name, part in (*parts, *((norm.name, norm.module) for norm in plan.norms)):
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(part, attribute, None)
            if isinstance(tensor, Tensor):
                yield f"{name}.{attribute}", tensor


def _take_any_format(traced: fx.GraphModule) -> None:
    """Has no operation depend on the memory format of a map: chains return channels_last."""
    for node in list(traced.graph.nodes):
        if node.op == "call_method" and node.target == "view":
            if not any(isinstance(size, torch.dtype) for size in node.args[1:]):
                node.target = "reshape"
        elif _draws(traced, node):
            # Random numbers fill memory in its order.
            for read in node.all_input_nodes:
                with traced.graph.inserting_before(node):
                    dense = traced.graph.call_method("contiguous", (read,))
                dense.meta = dict(read.meta)
                node.replace_input_with(read, dense)
    traced.recompile()


def _draws(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node draws a random number for each element of what it reads."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), (*DROPOUTS, nn.RReLU))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    return "dropout" in name or name in ("bernoulli", "rand_like", "randn_like", "rrelu")


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Puts buffers and random numbers back where they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for buffer, was in buffers:
                if not buffer.equal(was):
                    # Not noticed by a graph that is still to be run back.
                    buffer.data.copy_(was)


def _other_random_numbers() -> list[Any]:
    """The states of generators that PyTorch has nothing to do with."""
    states: list[Any] = [random.getstate()]
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        kind, keys, *rest = numpy.get_state()
        states.append((kind, keys.tolist(), *rest))
    return states
