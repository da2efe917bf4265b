"""How far a run is: what a checkpoint holds of it beside tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Progress"]


@dataclass
class Progress:
    """How far a run is; what JSON can hold of a checkpoint.

    Attributes:
        epoch: Epoch of the next step, from 0.
        batch: Batches of it that are done.
        step: Steps that are done.
        sums: Of this epoch: the loss times images, right answers, images.
        seconds: Time that training has taken so far.
        epoch_seconds: Of that, in this epoch.
        rows: One for each epoch that is done.
        class_rows: The epoch, and after it the accuracy of each class or None, for each evaluation.
        best: ``epoch`` and ``accuracy`` of the epoch that did best on the test images, the earliest
            of several; None before the first evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    class_rows: list[list[float | None]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, content: Any) -> Progress:
        """What a checkpoint holds of it.

        Raises:
            ValueError: A value is missing, unknown, of another type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or not content.keys() <= fields.keys():
            raise ValueError("the progress of the run is malformed")
        missing = [name for name in (*_COUNTERS, *_SECONDS, "sums", "rows") if name not in content]
        if missing:
            raise ValueError(f"the progress of the run has no {', '.join(missing)}")
        rows, sums, best = content["rows"], content["sums"], content.get("best")
        class_rows = content.get("class_rows", [])
        sound = {
            **{name: _is_count(content[name]) for name in _COUNTERS},
            **{name: _is_amount(content[name]) for name in _SECONDS},
            "sums": isinstance(sums, list) and len(sums) == 3 and all(map(_is_amount, sums)),
            "rows": isinstance(rows, list)
            and all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows),
            "class_rows": isinstance(class_rows, list)
            and all(isinstance(row, list) for row in class_rows)
            and all(cell is None or _is_amount(cell) for row in class_rows for cell in row),
            "best": best is None
            or (
                isinstance(best, dict)
                and best.keys() == {"epoch", "accuracy"}
                and _is_count(best["epoch"])
                and _is_amount(best["accuracy"])
            ),
        }
        for name, good in sound.items():
            if not good:
                raise ValueError(f"{name} of the run is {content[name]!r:.80}: expected another")
        return cls(**content)

    def check(self, steps_per_epoch: int, accumulate: int) -> None:
        """Raises ValueError where the counters do not belong to one another."""
        steps, rest = divmod(self.batch, accumulate)
        if (
            rest
            or steps > steps_per_epoch
            or self.step != self.epoch * steps_per_epoch + steps
            or len(self.rows) != self.epoch
            or (self.best is not None and not 1 <= self.best["epoch"] <= self.epoch)
        ):
            raise ValueError(
                f"epoch {self.epoch}, batch {self.batch}, step {self.step} and {len(self.rows)} "
                f"rows of the log contradict each other at {steps_per_epoch} steps an epoch"
            )


# Of a run's progress, by what they must be.
_COUNTERS = ("epoch", "batch", "step")
_SECONDS = ("seconds", "epoch_seconds")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_amount(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < math.inf
