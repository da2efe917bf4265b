"""What all comparisons share: where they ran, the checks against float64, timing, ratios."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from ..engines import select
from ..version import __version__
from . import machine
from .job import Job, Provider, Unavailable, plain_module
from .networks import worst_error
from .registry import build, registry
from .report import thread_count
from .timing import Sample, host_timer, interleave, progress_bar
from .training_steps import TrainingProvider, for_training, results_of, targets, with_loss

__all__ = [
    "checked",
    "checked_step",
    "classifier_of",
    "common_columns",
    "introduction",
    "output_scale",
    "reference_results",
    "relative_errors",
    "time_in_turns",
]

# Rounding errors turn the sign of some inputs of ReLU over, which changes a gradient by much more
# than rounding does: plain PyTorch in float32 is off by up to 0.04 in the norm of a gradient. In
# bfloat16 it is off by 0.7 to 1.3, and by 0.1 of the largest output.
_OUTPUT_LIMIT = 1e-3
_GRADIENT_LIMIT = 0.1


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


def introduction(common: Mapping[str, object], threads: int) -> list[str]:
    """The lines before the tables: processor, threads, versions, and the GPU where it is one.

    Args:
        common: What :func:`common_columns` returned.
        threads: Threads of every provider.
    """
    lines = [
        f"{common['processor']}, {common['processors']} processors usable, "
        + thread_count(threads),
        f"threshnet_fast {__version__}, torch {common['torch']}, Python {common['python']}"
        + (f", commit {common['commit']}" if common["commit"] else ""),
    ]
    if "accelerator" in common:
        driver = f", driver {common['driver']}" if common["driver"] else ""
        lines.append(
            f"{common['accelerator']}, {common['libraries']}{driver}, L2 cache {common['l2']}"
        )
    return lines


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
        name: A key of :func:`~.registry.registry`.
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


def reference_results(job: Job) -> dict[str, Tensor]:
    """What :func:`~.training_steps.results_of` returns for the stock PyTorch modules in float64."""
    model = for_training(job.model).double()
    compute = with_loss(plain_module(model))
    with select.use_backend("reference"):
        return results_of(model, compute, job.x.double(), targets(job))


def relative_errors(results: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of every tensor of the reference, in the Euclidean norm.

    Infinite where a tensor is missing, of another shape, or not finite.
    """
    errors = {}
    for name, expected in reference.items():
        found = results.get(name)
        if found is None or found.shape != expected.shape or not found.isfinite().all():
            errors[name] = float("inf")
        else:
            difference = float((found.double() - expected.double()).norm())
            errors[name] = difference / max(float(expected.norm()), torch.finfo(torch.float64).tiny)
    return errors


def checked_step(
    name: str, job: Job, reference: dict[str, Tensor]
) -> tuple[TrainingProvider | None, dict[str, object]]:
    """Builds a provider, compares what it computes, and makes two steps, as compilers want.

    Args:
        name: A key of :data:`~.training_steps.TRAINING_PROVIDERS`.
        job: The network and the images.
        reference: What :func:`reference_results` returned for them.

    Returns:
        The provider, None where it must not be timed; the columns of a row that say how it
        did.

    Raises:
        Unavailable: It cannot be used here.
    """
    limit = _OUTPUT_LIMIT * float(reference[""].abs().max())
    columns: dict[str, object] = {
        "status": "ok",
        "error_limit": f"{limit:.4g}",
        "gradient_limit": f"{_GRADIENT_LIMIT:.4g}",
    }
    try:
        built = build(name, job, "training")
        assert isinstance(built, TrainingProvider)
        results = built.results()
        for _ in range(2):
            built.run()
    except Unavailable:
        raise
    except Exception as problem:
        # Whatever a provider raises is a result: it is reported, and the others are measured.
        columns["status"] = (" ".join(str(problem).split()) or type(problem).__name__)[:300]
        return None, columns
    errors = relative_errors(results, reference)
    errors.pop("")
    worst = max(errors, key=lambda key: errors[key])
    error = worst_error(results[""], reference[""])
    columns |= {"error": f"{error:.4g}", "gradient_error": f"{errors[worst]:.4g}"}
    if not error <= limit:
        columns["status"] = "wrong result: the output"
    elif not errors[worst] <= _GRADIENT_LIMIT:
        columns["status"] = f"wrong result: {worst}"
    else:
        return built, columns
    return None, columns


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
    torch.set_num_threads(threads)
    others = machine.OtherLoad()
    with progress_bar(title) as progress:
        samples = interleave(calls, seconds=seconds, rounds=rounds, progress=progress, timer=timer)
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
