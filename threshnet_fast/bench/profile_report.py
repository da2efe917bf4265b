"""What a profile has found, as tables, rows of a CSV file and points of a roofline plot."""

from __future__ import annotations

from collections.abc import Mapping

from .profile import Machine, Measurement, StepProfile
from .report import format_table
from .results import PROFILE_COLUMNS
from .roofline import MeasuredPoint, MeasuredRoofline

__all__ = ["measured_roofline", "step_rows", "tables"]

_NUMBERS = (
    *("min us", "p50 us", "GFLOP/s", "of peak", "executed", "of peak"),
    *("MB", "GB/s", "of total"),
)


def _numbers(step: StepProfile, limits: Machine, total: StepProfile) -> list[str]:
    arithmetic = ["-"] * 4
    if step.macs > 0:
        arithmetic = [
            f"{step.flops / 1e9:.1f}",
            f"{step.flops / limits.peak:.1%}",
            f"{step.executed_flops / 1e9:.1f}",
            f"{step.executed_flops / limits.peak:.1%}",
        ]
    return [
        f"{1e6 * step.fastest:.1f}",
        f"{1e6 * step.median:.1f}",
        *arithmetic,
        f"{step.bytes / 1e6:.2f}",
        f"{step.bytes / step.fastest / 1e9:.1f}",
        f"{step.fastest / total.fastest:.1%}",
    ]


def tables(measurement: Measurement) -> str:
    """The tables of one network on one input: its steps, and their sums by kind."""
    measured, limits = measurement.profile, measurement.limits
    total = measured.total
    lines = []
    for index, step in enumerate(measured.steps):
        algorithm = step.algorithm
        for part, seconds in (("transform", step.transform), ("reduction", step.reduction)):
            if seconds > 0:
                algorithm += f", {part} {seconds / step.median:.0%}"
        line = [step.name, step.operation, algorithm, str(index)]
        lines.append([*line, *_numbers(step, limits, total)])
    table = format_table(["module", "operation", "algorithm", "step", *_NUMBERS], lines, left=3)
    sums = [*measured.sums(), measured.convolutions(), total]
    kinds = format_table(
        ["kind", "steps", *_NUMBERS],
        [[s.kind, str(s.steps), *_numbers(s, limits, total)] for s in sums if s.steps],
    )
    return (
        f"{table}\n\n{kinds}\n\n"
        f"{measured.calls} calls: {1e3 * measured.call_fastest:.3f} ms, median "
        f"{1e3 * measured.call_median:.3f}, without the profiler; the steps' minima add up to "
        f"{1e3 * total.fastest:.3f} ms.\n"
        f"Peak of an FMA loop: {limits.peak / 1e9:.1f} GFLOP/s, "
        f"{limits.peak_one_thread / 1e9:.1f} on one thread. Reading from memory: "
        f"{limits.bandwidth / 1e9:.1f} GB/s.\n"
        "GFLOP/s count direct convolution, so Winograd's may exceed the peak; executed are the "
        "multiplications done."
    )


def step_rows(measurement: Measurement, common: Mapping[str, object]) -> list[dict[str, object]]:
    """Rows of :data:`~.results.PROFILE_COLUMNS`, one for every step.

    Args:
        measurement: Of one network on one input.
        common: Columns that are the same in all rows; those that a profile lacks are left out.
    """
    measured, limits, load = measurement.profile, measurement.limits, measurement.other_load
    total = measured.total
    cell: dict[str, object] = {
        **{key: value for key, value in common.items() if key in PROFILE_COLUMNS},
        "dtype": "float32",
        "threads": measurement.threads,
        "isa": measurement.isa,
        "exact": int(measurement.exact),
        "other_load": "" if load is None else f"{load:.3f}",
    }
    return [
        {
            **cell,
            "calls": measured.calls,
            "step": index,
            "name": step.name,
            "operation": step.operation,
            "kind": step.kind,
            "algorithm": step.algorithm,
            "macs": step.macs,
            "executed_macs": step.executed_macs,
            "bytes": step.bytes,
            "min_us": f"{1e6 * step.fastest:.3f}",
            "p50_us": f"{1e6 * step.median:.3f}",
            "transform_us": f"{1e6 * step.transform:.3f}",
            "reduction_us": f"{1e6 * step.reduction:.3f}",
            "gflops": f"{step.flops / 1e9:.3f}",
            "executed_gflops": f"{step.executed_flops / 1e9:.3f}",
            "peak_share": f"{step.flops / limits.peak:.4f}",
            "executed_peak_share": f"{step.executed_flops / limits.peak:.4f}",
            "gbytes_per_second": f"{step.bytes / step.fastest / 1e9:.3f}",
            "share": f"{step.fastest / total.fastest:.6f}",
            "peak_gflops": f"{limits.peak / 1e9:.3f}",
            "peak_gflops_one_thread": f"{limits.peak_one_thread / 1e9:.3f}",
            "read_gbytes_per_second": f"{limits.bandwidth / 1e9:.3f}",
            "call_min_ms": f"{1e3 * measured.call_fastest:.4f}",
            "call_p50_ms": f"{1e3 * measured.call_median:.4f}",
        }
        for index, step in enumerate(measured.steps)
    ]


def measured_roofline(measurement: Measurement) -> MeasuredRoofline:
    """The points that a roofline plot has for the steps that multiply."""
    measured, limits = measurement.profile, measurement.limits
    total = measured.total
    return MeasuredRoofline(
        measurement.title,
        limits.peak,
        limits.peak_one_thread,
        limits.bandwidth,
        tuple(
            MeasuredPoint(
                step.kind,
                step.algorithm,
                2 * step.macs / step.bytes,
                step.flops,
                step.executed_flops,
                step.fastest / total.fastest,
            )
            for step in measured.steps
            if step.macs > 0
        ),
    )
