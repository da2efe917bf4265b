"""The C++ engine for the CPU: which instruction set it uses, and compiled plans ready to run."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import environment, extension
from ..environment import AUTOMATIC_WINOGRAD, winograd_by_default
from ..graph.ir import UnsupportedModule
from ..plan.codes import ALGORITHMS, ISAS
from ..plan.ir import FusedConv, Head, Plan, Segment, Step
from ..plan.limits import of_convolution_on_the_cpu
from ..plan.memory import plan_memory
from ..plan.serialize import serialize
from ..plan.shapes import Shape, batch_of, with_batch
from .base import Engine, PreparedPlan, Purpose, Source
from .registry import register

__all__ = [
    "DTYPES",
    "ENGINE",
    "CompiledPlan",
    "CpuEngine",
    "CpuSetting",
    "compile_network",
    "describe",
    "isa",
    "isa_code",
    "isa_codes",
    "pack_network",
    "unavailable_reason",
    "winograd_by_default",
]

DTYPES = (torch.float32, torch.bfloat16)
"""What networks may be of."""

# What the workspaces of a network's compiled plans may take together.
_MAX_WORKSPACE_BYTES = 1 << 30

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
    return tuple(torch.ops.threshnet_fast_cpu.isas(dtype is torch.bfloat16).tolist())


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
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return _isa_code(dtype, environment.value(environment.CPU_ISA))


@functools.cache
def _isa_code(dtype: torch.dtype, wanted: str) -> int:
    """What :func:`isa_code` returns for a value of the variable; found once, as calls need it."""
    codes, codes_bfloat16 = _supported(torch.float32), _supported(torch.bfloat16)
    if wanted:
        if wanted not in ISAS:
            raise ValueError(
                f"{environment.CPU_ISA} is {wanted!r}: expected one of {', '.join(ISAS)}"
            )
        cap = ISAS.index(wanted)
        if cap not in codes + codes_bfloat16:
            has = ", ".join(ISAS[code] for code in codes + codes_bfloat16)
            raise ValueError(f"{environment.CPU_ISA} is {wanted!r}: this processor has only {has}")
        if cap == _AVX512_BF16:
            cap = _AVX512
        else:
            codes_bfloat16 = ()
        codes = (cap,)
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
        layout: Number that is the same for plans of one instruction set that can share packed
            weights.
        dtype: What it computes in.
        device: The CPU.
    """

    backend = "cpu"
    device = torch.device("cpu")

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
        self._run_island = operators.run_island.default
        self._classic = plan.classic
        self._pitches = tuple(
            0 if plan.image and index == 0 else arena.pitches[buffer]
            for index, buffer in enumerate(plan.inputs)
        )
        flat = plan.flat_outputs or (plan.flat_output,) * len(plan.returned)
        self._outputs = tuple(
            _Output.of(plan, segment, flat)
            for segment, flat in zip(plan.returned, flat, strict=True)
        )
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
    def packing(self) -> tuple[int, int]:
        """Equal for plans of one network that can share packed weights."""
        return self._isa, self.layout

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
        workspace = self._take_workspace()
        output: Tensor = self._run(x, self.program, packed, workspace)
        self._keep_workspace(workspace)
        return output.flatten(1) if self.flat_output else output

    def run(self, xs: Sequence[Tensor], packed: Tensor) -> list[Tensor]:
        """Runs a plan of any number of inputs and outputs.

        Args:
            xs: The plan's inputs, ``[N, C, H, W]``: an image in any strides, all others in NHWC
                with the pitch that the plan has; at least ``batch`` images each.
            packed: The plan's packed weights, see :func:`pack_network`.

        Returns:
            The plan's outputs, of the dtype of the first input: views of new NHWC maps as
            ``[N, C, H, W]``, or ``[N, C]`` of those that are flat.

        Raises:
            RuntimeError: An input is not what the plan was compiled for, or has no memory.
        """
        dtype = xs[0].dtype if xs else self.dtype
        if dtype is not self.dtype:
            inputs = [
                _converted(x, self.dtype, pitch) for x, pitch in zip(xs, self._pitches, strict=True)
            ]
            return [output.to(dtype) for output in self.run(inputs, packed)]
        if self._classic:
            (x,) = xs
            return [self(x, packed)]
        workspace = self._take_workspace()
        maps: list[Tensor] = self._run_island(xs, self.program, packed, workspace)
        self._keep_workspace(workspace)
        return [output.view(maps) for output in self._outputs]

    def _take_workspace(self) -> Tensor:
        try:
            return self._workspaces.pop()
        except IndexError:
            created: Tensor = torch.ops.threshnet_fast_cpu.create_workspace(
                self.program, self._threads
            )
            return created

    def _keep_workspace(self, workspace: Tensor) -> None:
        if not self._workspaces or self.kept_bytes + workspace.nbytes <= _SPARE_BYTES:
            self._workspaces.append(workspace)


class _Output(NamedTuple):
    """Which part of which of the maps that a run returns is an output."""

    position: int
    channel: int
    channels: int
    whole: bool
    flat: bool

    @classmethod
    def of(cls, plan: Plan, segment: Segment, flat: bool) -> _Output:
        whole = segment.channels == plan.buffers[segment.buffer].channels
        position = plan.output_buffers.index(segment.buffer)
        return cls(position, segment.channel, segment.channels, whole, flat)

    def view(self, maps: list[Tensor]) -> Tensor:
        output = maps[self.position]
        if not self.whole:
            output = output.narrow(1, self.channel, self.channels)
        return output.flatten(1) if self.flat else output


def _converted(x: Tensor, dtype: torch.dtype, pitch: int) -> Tensor:
    """An input in another dtype, its pixels as far apart as before: 0 stands for any strides."""
    if pitch == 0:
        return x.to(dtype)
    batch, channels, height, width = x.shape
    memory = torch.empty(batch, height, width, pitch, dtype=dtype)
    return memory[..., :channels].permute(0, 3, 1, 2).copy_(x)


def compile_network(
    source: Source,
    input_shape: Shape,
    *,
    head: bool,
    isa: int,
    threads: int,
    winograd: int,
) -> CompiledPlan:
    """Lowers and compiles a network for one input shape, without the values of its weights.

    Large batches are compiled in equal parts that fit in a bounded arena.

    Args:
        source: Makes the network's plans.
        input_shape: ``(N, C, H, W)``, or a row for each of several inputs.
        head: Whether to end with the logits rather than with the last features.
        isa: As :func:`isa_code` returns it.
        threads: How many threads to split the work for.
        winograd: As :func:`winograd_by_default` returns it.

    Raises:
        UnsupportedModule: The network cannot be lowered.
    """
    batch = batch_of(input_shape)
    plan = source(with_batch(input_shape, 1), head=head, values=False)
    if batch > 1:
        elements = plan_memory(plan).size
        if not plan.classic:
            maps = [plan.buffers[index] for index in plan.output_buffers]
            elements += sum(buffer.pixels * buffer.channels for buffer in maps)
        at_once = max(1, _ARENA_BYTES // max(1, elements * _dtype_of(isa).itemsize))
        parts = -(-batch // at_once)
        plan = source(with_batch(input_shape, -(-batch // parts)), head=head, values=False)
    return CompiledPlan(plan, isa, threads, winograd)


def pack_network(source: Source, compiled: CompiledPlan) -> Tensor:
    """Folds a network's BatchNorms into its weights and packs them for the micro-kernels.

    One packing serves every compiled plan of the same instruction set and ``layout``, whatever its
    input shape, and its beginning the network without its head.

    Args:
        source: Makes the network's plans.
        compiled: A plan of it, with its head.

    Raises:
        UnsupportedModule: The network cannot be lowered, or has a weight that is not finite.
    """
    plan = source(None, head=True, values=True)
    for step in plan.steps:
        if isinstance(step, FusedConv) and skips_products([step.weight], _padding(step)):
            raise UnsupportedModule(
                f"the weight of {step.name} is not finite, and products of padding are left out"
            )
    packed: Tensor = torch.ops.threshnet_fast_cpu.pack_weights(compiled.program, plan.weights())
    return packed


def _padding(step: FusedConv) -> int:
    """The zeros above or to the left of a convolution's input, or 1 where others alone are."""
    taps = step.kernel[0] * step.kernel[1]
    return max(*step.padding, int(step.valid_taps < taps * step.output_pixels))


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


def _algorithm(step: Step, name: str) -> str:
    if not isinstance(step, FusedConv):
        return "direct"
    if name.startswith("winograd"):
        return name
    if name == "packed":
        prologue = step.prologue is not None
        return "direct, input packed" + (" with its prologue" if prologue else "")
    skipped = 1 - step.valid_macs / step.macs
    return f"direct, {skipped:.0%} of the taps skipped" if skipped >= 0.005 else "direct"


class CpuSetting(NamedTuple):
    """What a plan is compiled for.

    Attributes:
        isa: As :func:`isa_code` returns it, which decides on the dtype.
        winograd: As :func:`winograd_by_default` returns it.
        threads: How many threads to split the work for.
    """

    isa: int
    winograd: int
    threads: int


# Every call needs one, and there are few.
_setting = functools.lru_cache(maxsize=256)(CpuSetting)


class CpuEngine(Engine):
    """The C++ engine for the CPU."""

    name = "cpu"
    place = "the CPU"
    dtypes: ClassVar = {
        Purpose.NETWORK: DTYPES,
        Purpose.OPERATOR: (torch.float32,),
        Purpose.TRAINING: (torch.float32,),
    }
    islands = True
    remembers_unsupported = True
    max_kept_bytes = _MAX_WORKSPACE_BYTES

    def unavailable_reason(self) -> str | None:
        """See :meth:`.base.Engine.unavailable_reason`."""
        return unavailable_reason()

    def device_type(self) -> str:
        """See :meth:`.base.Engine.device_type`."""
        return "cpu"

    def describe(self, x: Tensor) -> str:
        """See :meth:`.base.Engine.describe`."""
        return describe(x.dtype)

    def _place_objection(self, x: Tensor, dtype: torch.dtype) -> Exception | None:
        return self._elsewhere(x) or self._unavailability()

    def setting(
        self, device: torch.device, dtype: torch.dtype, frozen: tuple[int, int] | None = None
    ) -> CpuSetting:
        """See :meth:`.base.Engine.setting`."""
        isa, winograd = (isa_code(dtype), winograd_by_default()) if frozen is None else frozen
        return _setting(isa, winograd, torch.get_num_threads())

    def freeze(self, dtype: torch.dtype, winograd: int) -> tuple[int, int]:
        """See :meth:`.base.Engine.freeze`."""
        return isa_code(dtype), winograd

    def direct(self, setting: CpuSetting) -> CpuSetting | None:
        """See :meth:`.base.Engine.direct`."""
        return setting._replace(winograd=0) if setting.winograd == AUTOMATIC_WINOGRAD else None

    def prepare(
        self, source: Source, shape: Shape, *, head: bool, setting: CpuSetting
    ) -> CompiledPlan:
        """See :meth:`.base.Engine.prepare`."""
        return compile_network(source, shape, head=head, **setting._asdict())

    def pack(
        self,
        source: Source,
        prepared: CompiledPlan,
        shape: Shape,
        *,
        head: bool,
        setting: CpuSetting,
    ) -> Tensor:
        """See :meth:`.base.Engine.pack`."""
        whole = prepared if head else self.prepare(source, shape, head=True, setting=setting)
        return pack_network(source, whole)

    def algorithms(self, prepared: PreparedPlan, plan: Plan) -> tuple[str, ...]:
        """See :meth:`.base.Engine.algorithms`."""
        names = iter(prepared.algorithms)
        found = []
        for step in plan.steps:
            found.append(_algorithm(step, next(names)))
            if isinstance(step, Head) and step.weight is not None:
                # Its classifier's.
                next(names)
        return tuple(found)

    def operator_objection(
        self,
        xs: Sequence[Tensor],
        weight: Tensor,
        shape: Sequence[int],
        padding: int,
        factors: Sequence[Tensor],
    ) -> str | None:
        """See :meth:`.base.Engine.operator_objection`."""
        problem = super().operator_objection(xs, weight, shape, padding, factors)
        if problem is None and skips_products(factors, padding):
            problem = "backend 'cpu' leaves out products of padding, and takes finite weights only"
        return problem

    def _limits(
        self, xs: Sequence[Tensor], weight: Tensor, shape: Sequence[int], padding: int
    ) -> dict[str, tuple[int, int]]:
        return of_convolution_on_the_cpu(xs, weight, shape, padding)

    def operator(self, name: str, xs: list[Tensor], *arguments: Any) -> Tensor:
        """See :meth:`.base.Engine.operator`."""
        run = getattr(torch.ops.threshnet_fast_cpu, name)
        result: Tensor = run(xs, *arguments, isa_code())
        return result


ENGINE = register(CpuEngine(), auto_on="cpu")
"""The one engine of this file."""
