"""Frozen networks: weights packed once, no checks of the model on each call."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .backends import cpu, select, triton
from .models.adoption import adopt
from .models.network import Network
from .models.validate import check_input, check_memory
from .plan.lower import UnsupportedModule, lower

__all__ = ["FrozenNetwork", "optimize"]


class FrozenNetwork:
    """A network whose weights are fixed, for inference only; what :func:`optimize` returns.

    Call it with ``[N, C, H, W]`` images of any size that the network takes: each new size is
    compiled once. Calls may come from several threads.

    Attributes:
        backend: ``"cpu"``, ``"triton"``, ``"cuda"``, or ``"reference"`` for plain PyTorch.
        reason: One line that says why.
    """

    def __init__(self, module: Network, backend: str, reason: str, winograd: int) -> None:
        self.backend = backend
        self.reason = reason
        self._winograd = winograd
        self._module = module
        self._weight = module._first_weight
        self._cpu_plans = cpu.PlanCache()
        self._gpu_plans = select.gpu_plan_caches()
        if backend == "cpu":
            self._isa = cpu.isa_code(self._weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the network.

        Args:
            x: Images, ``[N, C, H, W]``, in any memory format.

        Returns:
            What the module returns, without a graph.

        Raises:
            TypeError: ``x`` is not a dense tensor of the network's dtype.
            ValueError: ``x`` has the wrong rank, number of channels, or size.
            RuntimeError: ``x`` is on another device, or requires a gradient that a frozen network
                cannot give.
        """
        module = self._module
        check_input(x, module.in_chans, module.min_size, self._weight)
        check_memory("x", x)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x requires a gradient: expected an input without, as a frozen network has no "
                "backward pass; use torch.no_grad() or x.detach()"
            )
        if self.backend == "reference":
            with torch.no_grad():
                output: Tensor = module(x)
                return output
        if self.backend != "cpu":
            plan, weights = self._gpu_plans[self.backend].get(module, x, head=True, dtype=x.dtype)
            return plan(x, weights)
        compiled, packed = self._cpu_plans.get(
            module, x.shape, head=True, isa=self._isa, winograd=self._winograd
        )
        return compiled(x, packed)

    def __reduce__(self) -> tuple[type[FrozenNetwork], tuple[Network, str, str, int]]:
        """Copies and pickles the network; the copy compiles its plans anew."""
        return FrozenNetwork, (self._module, self.backend, self.reason, self._winograd)

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
            that has the same parameters and computes the same.
        example_input: An input, ``[N, C, H, W]``; its size is compiled now.
        dtype: What to compute in, and the dtype of inputs: None keeps the module's. On the CPU
            float32 or bfloat16, on a GPU also float16. Where the processor cannot multiply
            bfloat16, its kernels compute in float32 on weights and inputs in bfloat16.
        exact: Keep to direct convolution, as a GPU always does. Otherwise Winograd's F(2x2, 3x3)
            and F(4x4, 3x3) serve where they are faster, with an error that is still about that of
            PyTorch's own convolutions, but not the same everywhere: an infinity spreads over a tile
            of 2x2 or 4x4 outputs. ``THRESHNET_FAST_EXACT=1`` has the same effect.

    Returns:
        A callable that takes images and returns what ``module`` would. Where no fused backend is
        available, or the module has parts that plans cannot express, it runs plain PyTorch and
        its ``reason`` says why.

    Raises:
        TypeError: ``module`` is no such model, or ``example_input`` is not a tensor that it takes.
        ValueError: ``dtype`` is not supported, or ``example_input`` has a wrong shape.
        RuntimeError: ``example_input`` requires a gradient or is on another device.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: expected a torch.nn.Module")
    if not isinstance(exact, bool):
        raise TypeError(f"exact is {exact!r}: expected True or False")
    if not isinstance(module, Network):
        module = adopt(module)
    module._check_input(example_input)
    weight = module._first_weight
    backends = select.network_backends(weight)
    if backends == ("reference",):
        with select.use_backend("auto"):
            backends = select.network_backends(weight)
    allowed = cpu.DTYPES if backends == ("cpu",) else triton.DTYPES
    if dtype is not None and dtype not in allowed:
        raise ValueError(f"dtype is {dtype}: expected None or {' or '.join(map(str, allowed))}")
    module = copy.deepcopy(module).eval()
    if dtype is not None:
        module, example_input = module.to(dtype), example_input.to(dtype)
    winograd = 0 if exact else cpu.winograd_by_default()
    objections: list[str] = []
    for backend in backends:
        objection = _objection(module, backend)
        if objection is None:
            reason = "; ".join([*objections, select.describe(backend, module._first_weight)])
            frozen = FrozenNetwork(module, backend, reason, winograd)
            try:
                frozen(example_input)
                return frozen
            except (UnsupportedModule, triton.CompilationFailed) as error:
                if backend == "cpu":
                    raise
                objection = str(error)
        objections.append(objection)
    frozen = FrozenNetwork(module, "reference", "; ".join(dict.fromkeys(objections)), winograd)
    frozen(example_input)
    return frozen


def _objection(module: Network, backend: str) -> str | None:
    weight = module._first_weight
    if backend != "cpu":
        error = select.objection(backend, weight)
        if error is not None:
            return str(error)
    elif weight.device.type != "cpu":
        return f"the module is on {weight.device}, and backend 'cpu' needs it on the CPU"
    elif cpu.unavailable_reason() is not None:
        return cpu.unavailable_reason()
    dtype = weight.dtype
    if backend == "cpu" and dtype not in cpu.DTYPES:
        dtypes = " and ".join(map(str, cpu.DTYPES))
        return f"the module has weights of dtype {dtype}, and the backend takes {dtypes}"
    other = next((p.dtype for p in module.parameters() if p.dtype is not dtype), None)
    if other is not None:
        return f"the module has weights of dtype {other}, and the backend takes {dtype}"
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return "a part of the module has forward hooks"
    try:
        lower(module, (1, module.in_chans, module.min_size, module.min_size), fold=False)
    except UnsupportedModule as error:
        return str(error)
    return None
