"""Frozen networks: weights packed once, no checks of the model on each call."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .backends import cpu
from .backends.cpu import PlanCache
from .models.threshnet import ThreshNet
from .models.validate import check_input
from .plan.lower import UnsupportedModule, lower

__all__ = ["FrozenNetwork", "optimize"]


class FrozenNetwork:
    """A network whose weights are fixed, for inference only; what :func:`optimize` returns.

    Call it with ``[N, C, H, W]`` images of any size that the network takes: each new size is
    compiled once. Calls may come from several threads.

    Attributes:
        backend: ``"cpu"``, or ``"reference"`` for plain PyTorch.
        reason: One line that says why.
    """

    def __init__(self, module: ThreshNet, backend: str, reason: str, exact: bool) -> None:
        self.backend = backend
        self.reason = reason
        self._exact = exact
        self._module = module
        self._weight = module._first_weight
        self._plans = PlanCache()
        if backend == "cpu":
            self._isa = cpu.isa_code()

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
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x requires a gradient: expected an input without, as a frozen network has no "
                "backward pass; use torch.no_grad() or x.detach()"
            )
        if self.backend == "reference":
            with torch.no_grad():
                output: Tensor = module(x)
                return output
        compiled, packed = self._plans.get(
            module, x.shape, head=True, isa=self._isa, exact=self._exact
        )
        return compiled(x, packed)

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
    is taken in evaluation mode, whatever mode ``module`` is in.

    Args:
        module: A :class:`threshnet_fast.ThreshNet`.
        example_input: An input, ``[N, C, H, W]``; its size is compiled now.
        dtype: What to compute in: None or ``torch.float32``.
        exact: Keep to direct convolution. Otherwise Winograd's F(2x2, 3x3) serves where it is
            faster, with an error that is still about that of PyTorch's own convolutions, but not
            the same everywhere: an infinity spreads over a tile of 2x2 outputs.
            ``THRESHNET_FAST_EXACT=1`` has the same effect.

    Returns:
        A callable that takes images and returns what ``module`` would. Where the C++ extension is
        unavailable, or the module has parts that plans cannot express, it runs plain PyTorch and
        its ``reason`` says why.

    Raises:
        TypeError: ``module`` is not a ThreshNet, or ``example_input`` is not a tensor it takes.
        ValueError: ``dtype`` is not supported, or ``example_input`` has a wrong shape.
        RuntimeError: ``example_input`` requires a gradient or is on another device.
    """
    if not isinstance(module, ThreshNet):
        raise TypeError(f"module is a {type(module).__name__}: expected a ThreshNet")
    if dtype not in (None, torch.float32):
        raise ValueError(f"dtype is {dtype}: expected None or torch.float32")
    if not isinstance(exact, bool):
        raise TypeError(f"exact is {exact!r}: expected True or False")
    module._check_input(example_input)
    module = copy.deepcopy(module).eval()
    exact = exact or cpu.exact_by_default()
    reason = _objection(module)
    if reason is None:
        frozen = FrozenNetwork(module, "cpu", f"float32 on the CPU, {cpu.isa()} kernels", exact)
    else:
        frozen = FrozenNetwork(module, "reference", reason, exact)
    frozen(example_input)
    return frozen


def _objection(module: ThreshNet) -> str | None:
    device = module._first_weight.device
    if device.type != "cpu":
        return f"the module is on {device}, and only the CPU has a fused backend"
    other = next((p.dtype for p in module.parameters() if p.dtype is not torch.float32), None)
    if other is not None:
        return f"the module has weights of dtype {other}, and the CPU backend takes torch.float32"
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return "a part of the module has forward hooks"
    if cpu.unavailable_reason() is not None:
        return cpu.unavailable_reason()
    try:
        lower(module, (1, module.in_chans, module.min_size, module.min_size), fold=False)
    except UnsupportedModule as error:
        return str(error)
    return None
