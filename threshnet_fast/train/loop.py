"""The training loop."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..backends.select import use_backend
from ..data.images import generator
from ..files import write_text
from . import checkpoint
from .distributed import Processes, synchronise_batchnorm
from .ema import MovingAverage
from .recipes import learning_rate, make_optimizer
from .settings import Settings
from .weights import DEFAULT_NAME, ModelInfo, save_model

__all__ = ["Evaluation", "Options", "Stopped", "Trainer", "TrainingDiverged", "evaluate"]

# The domain of the random numbers of a step, dropout's; data/images.py has those of the images.
_STEP = 3
_EMA_EVERY = 4
# Steps between two looks at whether the loss is a number, each of which waits for the device.
_CHECK_EVERY = 50
# Steps between two agreements of several processes on a GPU, likewise.
_AGREE_EVERY = 10


class TrainingDiverged(RuntimeError):
    """The loss is no number any more."""


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


class TrainBatches(Protocol):
    """Batches to train on."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch from the given one on."""


class TestBatches(Protocol):
    """Batches to evaluate on."""

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image of this process once."""


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


@dataclass(frozen=True)
class Options:
    """What a run does beside training; none of it changes the weights.

    Attributes:
        backend: As :func:`threshnet_fast.use_backend` takes it.
        checkpoint_seconds: Time between two checkpoints within an epoch.
        evaluate_every: Epochs between two evaluations; the last epoch is always evaluated.
        half: Whether the trained weights are written in half precision.
    """

    backend: str = "auto"
    checkpoint_seconds: float = 300.0
    evaluate_every: int = 1
    half: bool = False


@dataclass(frozen=True)
class Evaluation:
    """How well a network does on test images.

    Attributes:
        loss: Mean cross entropy.
        confusion: ``confusion[i, j]`` images of class i were taken for class j.
    """

    loss: float
    confusion: Tensor

    @property
    def count(self) -> int:
        """Images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return int(self.confusion.diagonal().sum()) / self.count


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
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def _wide(logits: Tensor) -> Tensor:
    """In a precision in which a loss can be added up."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: TestBatches, num_classes: int, processes: Processes | None = None
) -> Evaluation:
    """Evaluates a network, which is left in evaluation mode.

    Args:
        model: The network.
        batches: This process's part of the test images.
        num_classes: Outputs of the network.
        processes: Adds up the counts of all processes.

    Raises:
        ValueError: There are no images.
    """
    processes = processes or Processes()
    model.eval()
    device = processes.device
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for images, labels in batches.all():
        logits = _wide(model(images))
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        pairs = labels * num_classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes * num_classes)
    processes.sum(confusion)
    processes.sum(loss)
    count = int(confusion.sum())
    if not count:
        raise ValueError("there are no test images")
    return Evaluation(loss.item() / count, confusion.view(num_classes, num_classes).cpu())


class Trainer:
    """Trains a network, and keeps all that it knows in the run's folder.

    Args:
        settings: What the outcome depends on.
        model: The network, on its device.
        train: Batches to train on.
        test: Batches to evaluate on.
        info: Description of the network that is written beside its weights.
        output: The run's folder.
        options: The rest.
        reporter: Shows how far the run is.
        processes: This process among those of the run.

    Attributes:
        progress: How far the run is.
        evaluation: The last evaluation, or None.
    """

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        train: TrainBatches,
        test: TestBatches,
        info: ModelInfo,
        output: Path,
        options: Options,
        reporter: Reporter,
        processes: Processes,
    ) -> None:
        self.settings = settings
        self.progress = Progress()
        self.evaluation: Evaluation | None = None
        self._recipe = settings.recipe
        # Of the network as it was built: evaluation needs no synchronised statistics.
        self._average = (
            MovingAverage(model, self._recipe.ema_decay, _EMA_EVERY)
            if self._recipe.ema_decay
            else None
        )
        if settings.sync_batchnorm and processes.count > 1:
            model = synchronise_batchnorm(model, processes.device)
        self._model = model
        self._replica = processes.wrap(model, gathers_buffers=not settings.sync_batchnorm)
        self._train, self._test = train, test
        self._info = info
        self._output = output
        self._options = options
        self._reporter = reporter
        self._processes = processes
        self._optimizer = make_optimizer(self._recipe, model)
        self._scaler = torch.amp.GradScaler("cuda", enabled=settings.amp == "float16")
        self._steps_per_epoch = len(train) // settings.accumulate
        self._sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        self._stop_requested = False

    @property
    def trained(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average where there is one."""
        return self._model if self._average is None else self._average.module

    def request_stop(self) -> None:
        """Asks for a checkpoint and an end after the step that is being made."""
        self._stop_requested = True

    def resume(self) -> bool:
        """Goes back to the run's last checkpoint; returns whether there is one.

        Raises:
            ValueError: No checkpoint is whole, or they belong to another network.
        """
        found = checkpoint.load_latest(self._output)
        if found is None:
            return False
        saved, folder, problems = found
        for problem in problems:
            self._reporter.note(f"passed over {problem}")
        checkpoint.load_module(self._model, saved.part("model"))
        checkpoint.restore_optimizer(self._optimizer, saved.part("optimizer"))
        if self._average is not None:
            checkpoint.load_module(self._average.module, saved.part("average"))
            self._average.updates = saved.state["average_updates"]
        self._scaler.load_state_dict(saved.state["scaler"])
        self.progress = Progress(**saved.state["progress"])
        if self._processes.first:
            # A checkpoint has those of all processes together.
            self._sums.copy_(torch.tensor(self.progress.sums, dtype=torch.float64))
        self._reporter.note(f"resumed from {folder}")
        return True

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            TrainingDiverged: The loss is no number.
        """
        self._read_sums()
        if not self._processes.first:
            return
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        for name, value in checkpoint.optimizer_tensors(self._optimizer).items():
            tensors[f"optimizer.{name}"] = value
        state: dict[str, Any] = {
            "progress": vars(self.progress),
            "scaler": self._scaler.state_dict(),
        }
        if self._average is not None:
            for name, value in self._average.module.state_dict().items():
                tensors[f"average.{name}"] = value
            state["average_updates"] = self._average.updates
        checkpoint.save(
            self._output,
            checkpoint.Checkpoint(tensors, state),
            self.progress.epoch,
            self.progress.batch,
        )

    def run(self) -> None:
        """Trains until the last epoch is done, and sees to it that there is an evaluation.

        Raises:
            Stopped: :meth:`request_stop` was called.
            TrainingDiverged: The loss is no number.
        """
        with use_backend(self._options.backend):
            while self.progress.epoch < self._recipe.epochs:
                self._epoch()
                self._finish_epoch()
                self.save()
            if self.evaluation is None:
                self.evaluation = self._evaluate()

    def _epoch(self) -> None:
        progress, accumulate = self.progress, self.settings.accumulate
        self._replica.train()
        self._reporter.epoch(progress.epoch, progress.batch // accumulate, self._steps_per_epoch)
        batches = self._train.epoch(progress.epoch, progress.batch)
        began = saved = time.perf_counter()
        while progress.batch < self._steps_per_epoch * accumulate:
            rate = learning_rate(self._recipe, progress.step, self._steps_per_epoch)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            loss = self._step(batches)
            progress.batch += accumulate
            progress.step += 1
            if self._average is not None:
                self._average.update(progress.step)
            self._reporter.step(rate, loss)
            now = time.perf_counter()
            self._count_seconds(now - began)
            began = now
            if progress.step % _CHECK_EVERY == 0:
                self._read_sums()
            due, stop = self._agree(
                now - saved >= self._options.checkpoint_seconds, self._stop_requested
            )
            # The last step of an epoch is followed by a checkpoint anyway.
            last = progress.batch == self._steps_per_epoch * accumulate
            if stop or (due and not last):
                self.save()
                if stop:
                    raise Stopped
                # Neither the time that a checkpoint takes nor the next is training.
                began = saved = time.perf_counter()

    def _agree(self, *flags: bool) -> list[bool]:
        on_gpu = self._processes.device.type == "cuda"
        if self._processes.count > 1 and on_gpu and self.progress.step % _AGREE_EVERY:
            return [False] * len(flags)
        return self._processes.any(*flags)

    def _count_seconds(self, seconds: float) -> None:
        self.progress.seconds += seconds
        self.progress.epoch_seconds += seconds

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        settings, recipe, progress = self.settings, self._recipe, self.progress
        device = self._processes.device
        # A step's random numbers depend on its number alone: that is what resuming repeats.
        torch.manual_seed(
            generator(settings.seed, _STEP, progress.step, self._processes.rank).initial_seed()
        )
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number in range(1, settings.accumulate + 1):
            images, labels = next(batches)
            with self._gradients_stay(number < settings.accumulate):
                with self._autocast():
                    logits = self._replica(images)
                logits = _wide(logits)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                self._scaler.scale(loss / settings.accumulate).backward()
            with torch.no_grad():
                right = (logits.argmax(1) == labels).sum()
                count = len(labels)
                sums = torch.stack([loss.detach().double() * count, right.double()])
                self._sums[:2] += sums
                self._sums[2] += count
                total += loss.detach() / settings.accumulate
        if recipe.clip_norm:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), recipe.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _gradients_stay(self, stay: bool) -> contextlib.AbstractContextManager[Any]:
        """Leaves out the averaging over all processes where more gradients are added first."""
        if stay and isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        amp = self.settings.amp
        if not amp:
            return contextlib.nullcontext()
        return torch.autocast(self._processes.device.type, getattr(torch, amp))

    def _read_sums(self) -> None:
        self.progress.sums = self._processes.sum(self._sums.clone()).tolist()
        if not math.isfinite(self.progress.sums[0]):
            raise TrainingDiverged(
                f"the loss is no number any more at step {self.progress.step}: lower the learning "
                "rate, or clip the gradient"
            )

    def _finish_epoch(self) -> None:
        progress = self.progress
        self._read_sums()
        loss, right, count = progress.sums
        epoch = progress.epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": progress.step,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "train_loss": loss / count,
            "train_accuracy": right / count,
            "test_loss": None,
            "test_accuracy": None,
            "seconds": round(progress.epoch_seconds, 3),
            "images_per_second": round(count / max(progress.epoch_seconds, 1e-9), 2),
        }
        if epoch % self._options.evaluate_every == 0 or epoch == self._recipe.epochs:
            self.evaluation = self._evaluate()
            row["test_loss"] = self.evaluation.loss
            row["test_accuracy"] = self.evaluation.accuracy
        progress.rows.append(row)
        progress.epoch, progress.batch, progress.epoch_seconds = epoch, 0, 0.0
        self._sums.zero_()
        if self._processes.first:
            self._write_log()
            if self.evaluation is not None and row["test_loss"] is not None:
                self._export(epoch, self.evaluation.accuracy)
        self._reporter.row(row)

    def _evaluate(self) -> Evaluation:
        # Without synchronisation, each process has BatchNorm statistics of its own.
        self._processes.copy_from_first(self.trained)
        return evaluate(self.trained, self._test, self.settings.num_classes, self._processes)

    def _write_log(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.progress.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.progress.rows)
        write_text(self._output / "log.csv", text.getvalue())

    def _export(self, epoch: int, accuracy: float) -> None:
        info = dataclasses.replace(self._info, epochs=epoch, accuracy=accuracy)
        dtype = torch.float16 if self._options.half else torch.float32
        save_model(self._output / DEFAULT_NAME, self.trained, info, dtype)
