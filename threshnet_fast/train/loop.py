"""The training loop: epochs of steps, evaluations, the log and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..engines.select import use_backend
from ..models.weights_file import BEST_NAME, DEFAULT_NAME, ModelInfo, read_info, save_model
from . import checkpoint
from .distributed import Processes, synchronise_batchnorm
from .ema import MovingAverage
from .evaluation import Evaluation, TestBatches, evaluate
from .log import write_log
from .progress import Progress
from .recipes import learning_rate
from .reporters import Reporter
from .settings import Settings
from .step import Stepper

__all__ = ["Options", "Stopped", "Trainer", "TrainingDiverged"]

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


@dataclass(frozen=True)
class Options:
    """What a run does beside training; none of it changes the weights of an epoch.

    Attributes:
        backend: As :func:`threshnet_fast.use_backend` takes it.
        checkpoint_seconds: Time between two checkpoints within an epoch.
        evaluate_every: Epochs between two evaluations; the last epoch is always evaluated.
        half: Whether the trained weights are written in half precision.
        patience: Epochs without a better test accuracy after which the run ends; None for any.
    """

    backend: str = "auto"
    checkpoint_seconds: float = 300.0
    evaluate_every: int = 1
    half: bool = False
    patience: int | None = None


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
        class_weights: ``(num_classes,)``, of each class in the loss; None weighs all alike.

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
        class_weights: Tensor | None = None,
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
        self._stepper = Stepper(settings, model, processes, class_weights)
        self._train, self._test = train, test
        self._info = info
        self._output = output
        self._options = options
        self._reporter = reporter
        self._processes = processes
        self._steps_per_epoch = len(train) // settings.accumulate
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
            ValueError: No checkpoint is whole, they belong to another network, or more epochs are
                done than are wanted.
        """
        found = checkpoint.load_latest(self._output, self._restore)
        if found is None:
            return False
        folder, problems = found
        for problem in problems:
            self._reporter.note(f"passed over {problem}")
        done = self.progress.epoch + (self.progress.batch > 0)
        if done > self._recipe.epochs:
            raise ValueError(
                f"{done} epochs of the run are done or begun: {self._recipe.epochs} is fewer"
            )
        self._reporter.note(f"resumed from {folder}")
        return True

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        """Takes over a checkpoint, or raises ValueError; the next one then replaces all of it."""
        progress = Progress.from_json(saved.state.get("progress"))
        progress.check(self._steps_per_epoch, self.settings.accumulate)
        updates = saved.state.get("average_updates", 0)
        scaler = saved.state.get("scaler")
        if not isinstance(updates, int) or updates < 0 or not isinstance(scaler, dict):
            raise ValueError("the state of the moving average or of the scaler is malformed")
        if any(len(row) != 1 + self.settings.num_classes for row in progress.class_rows):
            raise ValueError("its accuracies are those of other classes")
        checkpoint.load_module(self._model, saved.part("model"))
        checkpoint.restore_optimizer(self._stepper.optimizer, saved.part("optimizer"))
        if self._average is not None:
            checkpoint.load_module(self._average.module, saved.part("average"))
            self._average.updates = updates
        try:
            self._stepper.scaler.load_state_dict(scaler)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"the state of the scaler is malformed: {error}") from error
        self.progress = progress
        if self._processes.first:
            # A checkpoint has those of all processes together.
            self._stepper.sums.copy_(torch.tensor(progress.sums, dtype=torch.float64))

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            TrainingDiverged: The loss or a weight is no number.
        """
        self._read_sums()
        self._check_weights()
        if not self._processes.first:
            return
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        for name, value in checkpoint.optimizer_tensors(self._stepper.optimizer).items():
            tensors[f"optimizer.{name}"] = value
        state: dict[str, Any] = {
            "progress": vars(self.progress),
            "scaler": self._stepper.scaler.state_dict(),
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
            TrainingDiverged: The loss or a weight is no number.
        """
        with use_backend(self._options.backend):
            self._recover_best()
            while self.progress.epoch < self._recipe.epochs and not self._out_of_patience():
                self._epoch()
                self._finish_epoch()
                self.save()
                # After the checkpoint: a process that is killed in between makes it up.
                self._keep_best()
            if self.evaluation is None:
                self.evaluation = self._evaluate()

    def _out_of_patience(self) -> bool:
        progress, patience = self.progress, self._options.patience
        if patience is None or progress.best is None or progress.batch:
            return False
        waited = progress.epoch - progress.best["epoch"]
        if waited < patience or progress.rows[-1]["test_accuracy"] is None:
            return False
        self._reporter.note(
            f"stopped after epoch {progress.epoch}: the test accuracy has not risen for {waited} "
            f"epochs; the best was {progress.best['accuracy']:.2%} after epoch "
            f"{progress.best['epoch']}"
        )
        return True

    def _keep_best(self) -> None:
        """Writes the weights of the epoch that has just ended, where it is the best one."""
        best = self.progress.best
        if self._processes.first and best is not None and best["epoch"] == self.progress.epoch:
            self._export(BEST_NAME, **best)

    def _recover_best(self) -> None:
        """Sees to it that the best epoch's files are those of the epoch that the checkpoint names.

        They may be missing where the process was killed before they were written, and be those of
        a later epoch where that one's checkpoint was damaged.
        """
        best = self.progress.best
        missing = False
        if self._processes.first and best is not None:
            try:
                kept = read_info(self._output / BEST_NAME)
                missing = (kept.epochs, kept.accuracy) != (best["epoch"], best["accuracy"])
            except (OSError, ValueError):
                missing = True
        if best is None or not self._processes.any(missing)[0]:
            return
        if best["epoch"] == self.progress.epoch and not self.progress.batch:
            self.evaluation = self._evaluate()
            self._keep_best()
        else:
            self._reporter.note(
                f"the weights of the best epoch so far are not in {BEST_NAME}: it starts anew"
            )
            self.progress.best = None

    def _epoch(self) -> None:
        progress, accumulate = self.progress, self.settings.accumulate
        self._stepper.begin()
        self._reporter.epoch(progress.epoch, progress.batch // accumulate, self._steps_per_epoch)
        batches = self._train.epoch(progress.epoch, progress.batch)
        began = saved = time.perf_counter()
        while progress.batch < self._steps_per_epoch * accumulate:
            rate = learning_rate(self._recipe, progress.step, self._steps_per_epoch)
            loss = self._stepper.step(progress.step, rate, batches)
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

    def _read_sums(self) -> None:
        self.progress.sums = self._processes.sum(self._stepper.sums.clone()).tolist()
        if not math.isfinite(self.progress.sums[0]):
            raise self._diverged("the loss")

    def _check_weights(self) -> None:
        modules = [self._model] if self._average is None else [self._model, self._average.module]
        finite = [
            tensor.isfinite().all()
            for module in modules
            for tensor in module.state_dict().values()
            if tensor.is_floating_point()
        ]
        if not bool(torch.stack(finite).all()):
            raise self._diverged("a weight")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} is no number any more at step {self.progress.step}: lower the learning rate, "
            "or clip the gradient"
        )

    def _finish_epoch(self) -> None:
        progress = self.progress
        self._read_sums()
        loss, right, count = progress.sums
        epoch = progress.epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": progress.step,
            "learning_rate": self._stepper.optimizer.param_groups[0]["lr"],
            "train_loss": loss / count,
            "train_accuracy": right / count,
            "test_loss": None,
            "test_accuracy": None,
            "seconds": round(progress.epoch_seconds, 3),
            "images_per_second": round(count / max(progress.epoch_seconds, 1e-9), 2),
        }
        if epoch % self._options.evaluate_every == 0 or epoch == self._recipe.epochs:
            self.evaluation = self._evaluate()
            accuracy = self.evaluation.accuracy
            row["test_loss"], row["test_accuracy"] = self.evaluation.loss, accuracy
            progress.class_rows.append([epoch, *self.evaluation.class_accuracy])
            if progress.best is None or accuracy > progress.best["accuracy"]:
                progress.best = {"epoch": epoch, "accuracy": accuracy}
        progress.rows.append(row)
        progress.epoch, progress.batch, progress.epoch_seconds = epoch, 0, 0.0
        self._stepper.sums.zero_()
        if self._processes.first:
            write_log(self._output, progress, self._info.classes)
            if row["test_accuracy"] is not None:
                self._export(DEFAULT_NAME, epoch, row["test_accuracy"])
        self._reporter.row(row)

    def _evaluate(self) -> Evaluation:
        # Without synchronisation, each process has BatchNorm statistics of its own.
        self._processes.copy_from_first(self.trained)
        classes = self.settings.num_classes
        result = evaluate(self.trained, self._test, classes, self._processes)
        if not math.isfinite(result.loss):
            raise self._diverged("the loss on the test images")
        return result

    def _export(self, name: str, epoch: int, accuracy: float) -> None:
        extra = dict(self._info.extra)
        if self.evaluation is not None:
            extra |= self.evaluation.describe(self._info.classes)
        info = dataclasses.replace(self._info, epochs=epoch, accuracy=accuracy, extra=extra)
        dtype = torch.float16 if self._options.half else torch.float32
        save_model(self._output / name, self.trained, info, dtype)
