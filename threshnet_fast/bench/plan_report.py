"""What a plan costs, as tables: parameters, multiply-adds and bytes, step by step."""

from __future__ import annotations

from ..plan import Plan
from ..plan.ir import Step
from .report import format_table

__all__ = ["COLUMNS", "row", "table", "totals"]

COLUMNS = (
    "name",
    "operation",
    "output_channels",
    "output_height",
    "output_width",
    "parameters",
    "macs",
    "bytes_unfused",
    "bytes_fused",
)
"""Columns of a step, in the order of :func:`row`."""


def row(plan: Plan, step: Step) -> list[str | int]:
    """The numbers of a step, as :data:`COLUMNS` names them."""
    buffer = plan.buffers[step.output.buffer]
    return [
        step.name,
        step.describe(),
        step.output.channels,
        buffer.height,
        buffer.width,
        step.parameters,
        step.macs,
        step.bytes_unfused,
        step.bytes_fused,
    ]


def table(plan: Plan) -> str:
    """A line for every step, and their total."""
    header = ["layer", "operation", "output", "parameters", "MMACs", "unfused MB", "fused MB"]
    lines = []
    for step in plan.steps:
        name, operation, channels, height, width, parameters, macs, unfused, fused = row(plan, step)
        lines.append(
            [
                str(name),
                str(operation),
                f"{channels}x{height}x{width}",
                f"{parameters:,}",
                f"{int(macs) / 1e6:,.2f}",
                f"{int(unfused) / 1e6:,.2f}",
                f"{int(fused) / 1e6:,.2f}",
            ]
        )
    lines.append(
        [
            "total",
            f"{len(plan.steps)} steps",
            "",
            f"{plan.parameters:,}",
            f"{plan.macs / 1e6:,.2f}",
            f"{_unfused(plan) / 1e6:,.2f}",
            f"{_fused(plan) / 1e6:,.2f}",
        ]
    )
    return format_table(header, lines, left=2)


def totals(plan: Plan, parameters: int) -> str:
    """The sums of all steps in words.

    Args:
        plan: Of one input.
        parameters: Of the model, BatchNorm not folded in.
    """
    unfused, fused = _unfused(plan), _fused(plan)
    images = "an image" if plan.input_shape[0] == 1 else f"a batch of {plan.input_shape[0]}"
    return "\n".join(
        [
            f"parameters            {parameters:,} ({plan.parameters:,} with BatchNorm folded in)",
            f"multiply-adds         {plan.macs / 1e9:.3f} G {images}, "
            f"{plan.valid_macs / 1e9:.3f} G of them needed",
            f"bytes moved, unfused  {unfused / 1e6:.1f} MB",
            f"bytes moved, fused    {fused / 1e6:.1f} MB, {unfused / fused:.2f} times fewer",
        ]
    )


def _unfused(plan: Plan) -> int:
    return sum(step.bytes_unfused for step in plan.steps)


def _fused(plan: Plan) -> int:
    return sum(step.bytes_fused for step in plan.steps)
