"""Shows how far a run is: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

__all__ = ["ConsoleReporter", "Reporter", "SilentReporter", "TensorBoardReporter"]


class Reporter(Protocol):
    """Where a run shows how far it is."""

    def epoch(self, epoch: int, done: int, total: int) -> None:
        """An epoch begins, or goes on after ``done`` of its ``total`` steps."""

    def step(self, rate: float, loss: Tensor) -> None:
        """A step is done."""

    def row(self, row: dict[str, Any]) -> None:
        """An epoch is done."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class SilentReporter:
    """Shows nothing; of the processes that are not the first."""

    def epoch(self, epoch: int, done: int, total: int) -> None:
        """Is told that an epoch begins, of which some steps may be done already."""

    def step(self, rate: float, loss: Tensor) -> None:
        """A step is done."""

    def row(self, row: dict[str, Any]) -> None:
        """An epoch is done."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class ConsoleReporter(SilentReporter):
    """Writes to the standard streams.

    Args:
        epochs: Epochs of the run.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._bar: Any = None

    def epoch(self, epoch: int, done: int, total: int) -> None:
        """Starts a bar where the error stream is a terminal."""
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        title = f"epoch {epoch + 1}/{self._epochs}"
        self._bar = tqdm(total=total, initial=done, desc=title, unit="step", leave=False)

    def step(self, rate: float, loss: Tensor) -> None:
        """Moves the bar by one step, and shows loss and learning rate beside it now and then."""
        if self._bar is not None:
            self._bar.update()
            if self._bar.n % 20 == 0:
                self._bar.set_postfix(loss=f"{float(loss):.3f}", rate=f"{rate:.2g}", refresh=False)

    def row(self, row: dict[str, Any]) -> None:
        """Prints the results of an epoch, above the bar."""
        self._close()
        width = len(str(self._epochs))
        text = (
            f"epoch {row['epoch']:{width}}/{self._epochs}  loss {row['train_loss']:.4f}  "
            f"train {row['train_accuracy']:.2%}"
        )
        if row["test_accuracy"] is not None:
            text += f"  test {row['test_accuracy']:.2%} (loss {row['test_loss']:.4f})"
        print(
            f"{text}  {row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s", flush=True
        )

    def note(self, text: str) -> None:
        """Prints a line to the error stream."""
        self._close()
        print(text, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TensorBoardReporter(ConsoleReporter):
    """Writes a TensorBoard log as well.

    Args:
        epochs: Epochs of the run.
        folder: Where the log goes.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, epochs: int, folder: Path) -> None:
        super().__init__(epochs)
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def row(self, row: dict[str, Any]) -> None:
        """Adds a point to each curve."""
        super().row(row)
        step = row["epoch"]
        if self._writer is None:
            # Opened now, as what an interrupted run has logged beyond its checkpoint is void.
            self._writer = self._make(self._folder, purge_step=step)
        for name, value in row.items():
            if value is not None and name not in ("epoch", "step"):
                split, _, quantity = name.partition("_")
                tag = f"{quantity}/{split}" if split in ("train", "test") else name
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()
