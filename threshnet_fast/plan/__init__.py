"""Plans: a network lowered once into fused steps over a few feature buffers.

Every backend executes the same list of steps, so that one float64 reference,
:func:`execute_reference`, checks all of them, step by step.
"""

from .file import save_plan
from .ir import Buffer, FusedConv, Head, Plan, Pool, Prologue, Segment, Step
from .lower import UnsupportedModule, lower
from .memory import Arena, plan_memory
from .reference import execute_reference
from .serialize import serialize

__all__ = [
    "Arena",
    "Buffer",
    "FusedConv",
    "Head",
    "Plan",
    "Pool",
    "Prologue",
    "Segment",
    "Step",
    "UnsupportedModule",
    "execute_reference",
    "lower",
    "plan_memory",
    "save_plan",
    "serialize",
]
