"""What all comparisons share: the columns that say where they ran, the timing, the ratios."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import machine
from .cpu_engines import Job, Provider, build, registry, worst_error
from .timing import Sample, host_timer, interleave

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["checked", "classifier_of", "common_columns", "output_scale", "time_in_turns"]


def common_columns(source: str, place: torch.device, flush: bool = False) -> dict[str, object]:
    """The columns that are the same for all rows of a run.

    Args:
        source: Where the input is from.
        place: The device that it runs on.
        flush: Whether a GPU's cache is overwritten before every call.
    """
    gpu: dict[str, object] = {"device": place.type}
    if place.type != "cpu":
        gpu |= {
            "accelerator": machine.accelerator(place),
            "driver": machine.driver(place),
            "libraries": machine.accelerator_libraries(),
            "l2": "flushed" if flush else "kept",
        }
    return {
        "run": uuid.uuid4().hex[:12],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "input": source,
        "processor": machine.processor(),
        "processors": machine.usable_processors(),
        "flags": " ".join(machine.instruction_sets()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.release()}",
        **gpu,
    }


def classifier_of(model: nn.Module) -> nn.Linear | None:
    """The network's linear classifier, where it has one."""
    classifier = getattr(model, "get_classifier", nn.Identity)()
    return classifier if isinstance(classifier, nn.Linear) else None


def output_scale(model: nn.Module, reference: Tensor) -> float:
    """The largest output without the classifier's bias, which may cancel most of it.

    Rounding errors grow with what is added up, not with what a bias leaves of it.
    """
    bias = getattr(classifier_of(model), "bias", None)
    output = reference if bias is None else reference - bias.detach().to(reference)
    return float(output.abs().max())


def checked(
    name: str, job: Job, reference: Tensor, limit: float
) -> tuple[Provider | None, float | None, str]:
    """Builds a provider and compares its output.

    Args:
        name: A key of :func:`~.providers.registry`.
        job: What it is to run.
        reference: The output in float64.
        limit: The largest error that passes.

    Returns:
        The provider, None where it must not be timed; its error; ``"ok"`` or what is wrong.
    """
    try:
        provider = build(name, job)
        error = worst_error(provider.as_tensor(provider.run()), reference)
    except Exception as problem:
        # Whatever a peer raises is a result: it is reported, and the others are measured.
        text = " ".join(str(problem).split()) or type(problem).__name__
        return None, None, text[:300]
    if not error <= limit:
        return None, error, f"wrong result: error {error:.3g}, at most {limit:.3g} is allowed"
    return provider, error, "ok"


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    rows: Mapping[str, dict[str, object]],
    macs: int,
    *,
    title: str,
    threads: int,
    seconds: float | None,
    rounds: int | None,
    timer: Callable[[Callable[[], object]], int] = host_timer,
) -> None:
    """Times providers in turns under a progress bar, and fills in what the rows say of time.

    Args:
        calls: What to time, by name of the provider.
        rows: A row for every provider, also for those that are not timed.
        macs: Multiply-adds of one call.
        title: Before the progress bar.
        threads: Threads of every provider, as building one may have changed their number.
        seconds: As for :func:`~.timing.interleave`, ``rounds`` and ``timer`` too.
        rounds: Instead of ``seconds``.
        timer: Runs a call and returns its nanoseconds.
    """
    from tqdm import tqdm

    torch.set_num_threads(threads)
    others = machine.OtherLoad()
    with tqdm(
        total=100, desc=title, disable=None, bar_format="{desc}: {percentage:3.0f}%|{bar}|"
    ) as bar:
        samples = interleave(
            calls,
            seconds=seconds,
            rounds=rounds,
            progress=lambda part: _advance(bar, 100 * part),
            timer=timer,
        )
    load = others.stop()
    for provider, sample in samples.items():
        rows[provider]["other_load"] = "" if load is None else f"{load:.3f}"
        rows[provider].update(_times(sample, macs))
    _compare(list(rows.values()))


def _times(sample: Sample, macs: int) -> dict[str, object]:
    """The columns that say how long the calls of a provider took."""
    fractions = {"min_ms": 0.0, "p20_ms": 0.2, "p50_ms": 0.5, "p80_ms": 0.8}
    return {
        "calls": len(sample.nanoseconds),
        **{key: f"{sample.milliseconds(fraction):.4f}" for key, fraction in fractions.items()},
        "gflops": f"{2e-6 * macs / sample.milliseconds(0.0):.2f}",
    }


def _advance(bar: tqdm[Any], to: float) -> None:
    bar.update(max(0, int(to) - bar.n))


def _compare(rows: Sequence[dict[str, object]]) -> None:
    """Fills in how much faster than the best peer each provider is."""

    def ours(row: dict[str, object]) -> bool:
        task = str(row.get("task", "inference"))
        specs = registry(str(row["device"]), str(row["dtype"]), task)
        return specs[str(row["provider"])].ours

    for time, ratio in (("min_ms", "speedup_min"), ("p50_ms", "speedup_p50")):
        timed = [row for row in rows if row.get(time)]
        best = min((float(str(row[time])) for row in timed if not ours(row)), default=None)
        if best is not None:
            for row in timed:
                row[ratio] = f"{best / float(str(row[time])):.4f}"
