"""The C++ CPU backend: which instruction set it uses, and compiled plans ready to run."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extension
from ..models.network import Network
from ..plan.codes import ALGORITHMS, ISAS
from ..plan.ir import FusedConv, Plan
from ..plan.lower import UnsupportedModule, lower
from ..plan.memory import plan_memory
from ..plan.serialize import serialize

__all__ = [
    "DTYPES",
    "CompiledPlan",
    "PlanCache",
    "compile_network",
    "describe",
    "isa",
    "isa_code",
    "isa_codes",
    "pack_network",
    "unavailable_reason",
]

DTYPES = (torch.float32, torch.bfloat16)
"""What networks may be of."""

ISA_VARIABLE = "THRESHNET_FAST_CPU_ISA"
"""Environment variable that caps the instruction set."""

EXACT_VARIABLE = "THRESHNET_FAST_EXACT"
"""Environment variable that keeps to direct convolution."""

WINOGRAD_VARIABLE = "THRESHNET_FAST_WINOGRAD"
"""Environment variable that overrides the choice of the algorithm of 3x3 convolutions."""

# Those that it makes faster.
_AUTOMATIC = -1
_WINOGRAD = {"": _AUTOMATIC, "auto": _AUTOMATIC, "0": 0, "2": 2, "4": 4}

# Compiled plans kept for a network, one for each input shape and number of threads; and what their
# workspaces may take together.
_MAX_PLANS = 16
_MAX_WORKSPACE_BYTES = 1 << 30

# What the packed weights of a network may take together, in different layouts.
_MAX_PACKED_BYTES = 1 << 30

# Weights that none of the last so many compiled plans used make room for others.
_UNUSED_PLANS = 64

# Input shapes of which is remembered that they keep to direct convolution.
_MAX_DIRECT = 4096

# Of the workspaces that concurrent calls of a plan have left, as many are kept as fit in this.
_SPARE_BYTES = 256 << 20

_AVX512, _AVX512_BF16 = ISAS.index("avx512"), ISAS.index("avx512_bf16")

# Of a batch, as many images are worked on at once as fit in this much memory: it keeps the memory
# of a large batch, and the traffic beyond the last level cache, that of a small one.
_ARENA_BYTES = 32 << 20


def unavailable_reason() -> str | None:
    """Returns one line saying why this backend cannot run, or None when it can."""
    return extension.unavailable_reason()


def isa(dtype: torch.dtype = torch.float32) -> str:
    """Returns the instruction set in use for a dtype.

    ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"scalar"``; for bfloat16 ``"avx512_bf16"``, or what
    float32 has: there, bfloat16 is computed in float32. It is the best one that the processor has,
    unless ``THRESHNET_FAST_CPU_ISA`` names another.

    Args:
        dtype: Of the network: float32 or bfloat16.

    Raises:
        ValueError: If ``THRESHNET_FAST_CPU_ISA`` is unknown, or the processor lacks it.
        RuntimeError: If the C++ extension is unavailable.
    """
    return ISAS[isa_code(dtype)]


@functools.cache
def _supported(dtype: torch.dtype) -> tuple[int, ...]:
    """What :func:`isa_codes` returns; asked of the processor once, as every call needs it."""
    if dtype is torch.bfloat16:
        code: int = torch.ops.threshnet_fast_cpu.best_bfloat16_isa()
        return (code,) if code >= 0 else ()
    best: int = torch.ops.threshnet_fast_cpu.best_isa()
    return (0, best) if ISAS[best] == "neon" else tuple(range(best + 1))


def isa_codes(dtype: torch.dtype = torch.float32) -> list[int]:
    """Returns all instruction sets that this processor has for a dtype, the best last.

    Args:
        dtype: float32, or bfloat16: then those alone that multiply bfloat16.

    Returns:
        Codes, as of :func:`isa_code`.

    Raises:
        RuntimeError: If the C++ extension is unavailable.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return list(_supported(dtype))


def isa_code(dtype: torch.dtype = torch.float32) -> int:
    """Returns the instruction set in use for a dtype as the operators take it.

    0 is scalar, 1 AVX2, 2 AVX-512, 3 NEON, all in float32, and 4 AVX-512 in bfloat16.

    Args:
        dtype: As for :func:`isa`.

    Raises:
        ValueError: As :func:`isa`.
        RuntimeError: As :func:`isa`.
    """
    codes = isa_codes()
    codes_bfloat16 = isa_codes(torch.bfloat16)
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        if wanted not in ISAS:
            raise ValueError(f"{ISA_VARIABLE} is {wanted!r}: expected one of {', '.join(ISAS)}")
        cap = ISAS.index(wanted)
        if cap not in [*codes, *codes_bfloat16]:
            has = ", ".join(ISAS[code] for code in [*codes, *codes_bfloat16])
            raise ValueError(f"{ISA_VARIABLE} is {wanted!r}: this processor has only {has}")
        if cap == _AVX512_BF16:
            cap = _AVX512
        else:
            codes_bfloat16 = []
        codes = [cap]
    return codes_bfloat16[-1] if dtype is torch.bfloat16 and codes_bfloat16 else codes[-1]


class CompiledPlan:
    """A plan compiled for one instruction set and number of threads.

    Calls may come from several threads at once: each takes a workspace of its own from a pool.

    Args:
        plan: The plan, with or without the values of its weights.
        isa: As :func:`isa_code` returns it.
        threads: How many threads to split the work for.
        winograd: As :func:`winograd_by_default` returns it.

    Raises:
        UnsupportedModule: A step is beyond a limit of the engine.

    Attributes:
        batch: Images that are worked on at once.
        flat_output: Whether the result is ``[N, channels]``.
        arena_bytes: Memory for features.
        layout: Number that is the same for plans that can share packed weights.
        dtype: What it computes in.
    """

    backend = "cpu"

    def __init__(self, plan: Plan, isa: int, threads: int, winograd: int) -> None:
        arena = plan_memory(plan)
        operators = torch.ops.threshnet_fast_cpu
        self.batch = plan.input_shape[0]
        self.flat_output = plan.flat_output
        self.dtype = _dtype_of(isa)
        self.arena_bytes = arena.size * self.dtype.itemsize
        try:
            self.program: Tensor = operators.compile_plan(
                serialize(plan, arena), isa, threads, winograd
            )
        except (RuntimeError, ValueError) as error:
            # The description is sound, so it is beyond a limit, such as that of a kernel's taps.
            raise UnsupportedModule(str(error)) from error
        self.layout: int = operators.program_layout(self.program)
        self._isa = isa
        self._threads = threads
        self._run = operators.run_plan.default
        self._workspaces: deque[Tensor] = deque()

    def describe(self) -> str:
        """One line: kernels, threads, memory."""
        memory = f"{self.arena_bytes / 1e6:.1f} MB of features"
        kernels = f"{ISAS[self._isa]} kernels, {self._threads} threads"
        return f"{_name(self.dtype)} on the CPU, {kernels}, {memory}"

    @property
    def algorithms(self) -> list[str]:
        """How each step is computed; a head with a classifier counts as two.

        ``"direct"``, ``"packed"`` (direct, on a gathered and normalised input), ``"winograd
        F(2x2, 3x3)"`` or ``"winograd F(4x4, 3x3)"``.
        """
        codes = torch.ops.threshnet_fast_cpu.program_algorithms(self.program)
        return [ALGORITHMS[code] for code in codes.tolist()]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the workspaces that are kept for the next calls."""
        return sum(workspace.nbytes for workspace in self._workspaces.copy())

    def __call__(self, x: Tensor, packed: Tensor) -> Tensor:
        """Runs the plan.

        Args:
            x: Images of the plan's size in any strides, at least ``batch`` of them.
            packed: The plan's packed weights, see :func:`pack_network`.

        Returns:
            ``[N, channels]``, or ``[N, C, H, W]`` in channels_last format, of the dtype of ``x``.
        """
        if x.dtype is not self.dtype:
            return self(x.to(self.dtype), packed).to(x.dtype)
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = torch.ops.threshnet_fast_cpu.create_workspace(self.program, self._threads)
        output: Tensor = self._run(x, self.program, packed, workspace)
        if not self._workspaces or self.kept_bytes + workspace.nbytes <= _SPARE_BYTES:
            self._workspaces.append(workspace)
        return output.flatten(1) if self.flat_output else output


def compile_network(
    module: Network,
    input_shape: Sequence[int],
    *,
    head: bool,
    isa: int,
    threads: int,
    winograd: int,
) -> CompiledPlan:
    """Lowers and compiles a network for one input shape, without the values of its weights.

    Large batches are compiled in equal parts that fit in a bounded arena.

    Args:
        module: The network.
        input_shape: ``(N, C, H, W)``.
        head: Whether to end with the logits rather than with the last features.
        isa: As :func:`isa_code` returns it.
        threads: How many threads to split the work for.
        winograd: As :func:`winograd_by_default` returns it.

    Raises:
        UnsupportedModule: The network cannot be lowered.
    """
    batch, *image = input_shape
    plan = lower(module, (1, *image), head=head, fold=False)
    if batch > 1:
        image_bytes = plan_memory(plan).size * _dtype_of(isa).itemsize
        at_once = max(1, _ARENA_BYTES // image_bytes)
        parts = -(-batch // at_once)
        plan = lower(module, (-(-batch // parts), *image), head=head, fold=False)
    return CompiledPlan(plan, isa, threads, winograd)


_Key = tuple[Sequence[int], bool, int, int, int]


class _Cached:
    """A compiled plan, its packed weights, and when it was used last."""

    __slots__ = ("compiled", "packed", "used")

    def __init__(self, compiled: CompiledPlan, packed: Tensor, used: int) -> None:
        self.compiled = compiled
        self.packed = packed
        self.used = used


class PlanCache:
    """Compiled plans and packed weights of a network that does not change.

    The sixteen plans that were used last are kept, fewer where their workspaces would take more
    than 1 GB. The layout of packed weights depends on the steps that take Winograd's algorithm, so
    on the input shape. Where weights in another layout would exceed 1 GB together, a shape keeps to
    direct convolution, whose one layout serves all of them, and goes on to do so.

    Calls may come from several threads at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: dict[_Key, _Cached] = {}
        # By instruction set and layout: the weights, and which compilation used them last.
        self._packed: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._direct: dict[_Key, None] = {}
        self._calls = itertools.count()
        self._compilations = 0

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(packed.nbytes for packed, _ in self._packed.copy().values())

    def get(
        self, module: Network, shape: torch.Size, *, head: bool, isa: int, winograd: int
    ) -> tuple[CompiledPlan, Tensor]:
        """Returns the plan for an input shape and the number of threads in use, and its weights.

        Args:
            module: The network, always the same.
            shape: ``(N, C, H, W)`` of the input.
            head: Whether to end with the logits rather than with the last features.
            isa: As :func:`isa_code` returns it.
            winograd: As :func:`winograd_by_default` returns it.

        Raises:
            UnsupportedModule: The network cannot be lowered.
        """
        key = (shape, head, isa, torch.get_num_threads(), winograd)
        # Without the lock, which is held while another thread packs weights.
        cached = self._plans.get(key)
        if cached is None:
            with self._lock:
                cached = self._plans.get(key) or self._add(module, key)
        cached.used = next(self._calls)
        return cached.compiled, cached.packed

    def _add(self, module: Network, key: _Key) -> _Cached:
        shape, head, isa, threads, winograd = key

        def compile_with(winograd: int, head: bool) -> CompiledPlan:
            return compile_network(
                module, shape, head=head, isa=isa, threads=threads, winograd=winograd
            )

        self._compilations += 1
        if key in self._direct:
            winograd = 0
        compiled = compile_with(winograd, head)
        if winograd == _AUTOMATIC and not self._has_room((isa, compiled.layout)):
            if len(self._direct) >= _MAX_DIRECT:
                self._direct.pop(next(iter(self._direct)))
            self._direct[key] = None
            compiled = compile_with(0, head)
        layout = (isa, compiled.layout)
        if layout in self._packed:
            packed = self._packed[layout][0]
        else:
            whole = compiled if head else compile_with(0 if key in self._direct else winograd, True)
            packed = pack_network(module, whole)
        self._packed[layout] = packed, self._compilations
        cached = self._plans[key] = _Cached(compiled, packed, next(self._calls))
        self._forget()
        return cached

    def _has_room(self, layout: tuple[int, int]) -> bool:
        """Whether weights in a layout are there or may be added; removes those long unused."""
        if layout in self._packed or not self._packed:
            return True
        # About as much as those that are there.
        needed = max(packed.nbytes for packed, _ in self._packed.values())
        in_use = {id(cached.packed) for cached in self._plans.values()}
        oldest_first = sorted(self._packed, key=lambda layout: self._packed[layout][1])
        for other in oldest_first:
            if self.packed_bytes + needed <= _MAX_PACKED_BYTES:
                break
            packed, used = self._packed[other]
            if id(packed) not in in_use and self._compilations - used > _UNUSED_PLANS:
                del self._packed[other]
        return self.packed_bytes + needed <= _MAX_PACKED_BYTES

    def _forget(self) -> None:
        """Lets go of the plans that were used least recently."""
        oldest_first = sorted(self._plans, key=lambda key: self._plans[key].used)
        kept = sum(cached.compiled.kept_bytes for cached in self._plans.values())
        for key in oldest_first[:-1]:
            if len(self._plans) <= _MAX_PLANS and kept <= _MAX_WORKSPACE_BYTES:
                break
            kept -= self._plans.pop(key).compiled.kept_bytes


def pack_network(module: Network, compiled: CompiledPlan) -> Tensor:
    """Folds a network's BatchNorms into its weights and packs them for the micro-kernels.

    One packing serves every compiled plan of the same instruction set and ``layout``, whatever its
    input shape, and its beginning the network without its head.

    Args:
        module: The network.
        compiled: A plan of it, with its head.

    Raises:
        UnsupportedModule: The network cannot be lowered, or has a weight that is not finite.
    """
    size = module.min_size
    plan = lower(module, (1, module.in_chans, size, size))
    for step in plan.steps:
        if isinstance(step, FusedConv) and skips_products([step.weight], step.padding):
            raise UnsupportedModule(
                f"the weight of {step.name} is not finite, and products of padding are left out"
            )
    packed: Tensor = torch.ops.threshnet_fast_cpu.pack_weights(compiled.program, plan.weights())
    return packed


def skips_products(weights: Sequence[Tensor], padding: int) -> bool:
    """Whether the engine leaves out products of padding that are not 0, but NaN.

    Args:
        weights: What a convolution multiplies by, in float32 on the CPU.
        padding: Its zero padding.
    """
    return padding > 0 and bool(weights) and not torch.ops.threshnet_fast_cpu.all_finite(weights)


def describe(dtype: torch.dtype) -> str:
    """Returns what a network of a dtype is computed with, in one line.

    Args:
        dtype: As for :func:`isa`.

    Raises:
        ValueError: As :func:`isa`.
        RuntimeError: As :func:`isa`.
    """
    inside = _dtype_of(isa_code(dtype))
    computed = "" if inside is dtype else f" computed in {_name(inside)}"
    return f"{_name(dtype)}{computed} on the CPU, {isa(dtype)} kernels"


def _dtype_of(isa: int) -> torch.dtype:
    return torch.bfloat16 if isa == _AVX512_BF16 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def winograd_by_default() -> int:
    """Returns which 3x3 convolutions use Winograd's F(m x m, 3x3), as the environment has it.

    Returns:
        -1: those that it makes faster, by what each is expected to take; 0: none, by
        ``THRESHNET_FAST_EXACT=1`` or ``THRESHNET_FAST_WINOGRAD=0``; 2 or 4: all that can, with that
        m, by ``THRESHNET_FAST_WINOGRAD``.

    Raises:
        ValueError: If ``THRESHNET_FAST_WINOGRAD`` is none of these.
    """
    if os.environ.get(EXACT_VARIABLE, "0") not in ("", "0"):
        return 0
    wanted = os.environ.get(WINOGRAD_VARIABLE, "")
    if wanted not in _WINOGRAD:
        values = ", ".join(filter(None, _WINOGRAD))
        raise ValueError(f"{WINOGRAD_VARIABLE} is {wanted!r}: expected one of {values}")
    return _WINOGRAD[wanted]
