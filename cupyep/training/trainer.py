"""The training loop: epochs, schedules, evaluation, the record of every epoch, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cupyep.errors import DivergenceError, Interrupted, choose, require
from cupyep.optim import LR_SCHEDULES, Optimizer
from cupyep.training.divergence import ON_DIVERGENCE, LossWatch
from cupyep.training.interruption import Interruptions
from cupyep.training.run_directory import RunDirectory
from cupyep.training.snapshot import check_same_run, restore_snapshot, take_snapshot
from cupyep.training.statistics import EpochStatistics, layer_names, layer_of

REFRESH_S = 0.5  # the bar shows new numbers this often; each time the device is waited for
MOST_HALVINGS = 5


@dataclass
class TrainSummary:
    """How a run ended.

    Attributes
    ----------
    test_accuracy, test_loss : float
        After the last epoch; the accuracy in [0, 1].
    best_accuracy, best_epoch : float, int
        Of the validation images where there are some, else of the test images.
    best_split : {"validation", "test"}
        Which of the two.
    elapsed_s : float
        All epochs together, those before a resume included.
    path : Path or None
        The run directory.
    """

    test_accuracy: float
    test_loss: float
    best_accuracy: float
    best_epoch: int
    best_split: str
    elapsed_s: float
    path: Path | None

    def __str__(self) -> str:
        text = (
            f"test accuracy {self.test_accuracy:.2%} (best.h5: epoch {self.best_epoch}, chosen by {self.best_split} "
            f"accuracy {self.best_accuracy:.2%}), {self.elapsed_s / 60:.1f} minutes"
        )
        return text if self.path is None else f"{text}, run directory {self.path}"


def evaluate(learner: Any, batches: Any, bar_text: str = "testing", quiet: bool = True) -> tuple[float, float]:
    """Return (mean loss, accuracy) of `learner` over `batches` (a `Loader` without augmentation)."""
    loss, correct, count = 0.0, 0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for batch in tqdm(batches, desc=bar_text, unit=" batches", leave=False, disable=True if quiet else None):
            batch_loss, batch_correct = learner.evaluate(batch)
            loss, correct, count = loss + batch_loss, correct + batch_correct, count + len(batch)
    return float(loss) / count, int(correct) / count


class Trainer:
    """Trains a learner and keeps its run directory.

    Parameters
    ----------
    learner : EquilibriumPropagation, BackpropagationThroughTime or Backpropagation
    optimizer : Optimizer
        Over ``learner.parameters()``.
    train, test : Loader
        The training batches (shuffled, augmented) and the test batches.
    validation : Loader, optional
        Batches of samples held out of training: the best epoch is chosen by them, and by the test batches without.
    epochs : int
        At least 1.
    lr_schedule : {"constant", "cosine", "step"}
        Factor of the learning rates, set anew at every step from the fraction of all steps that is done; so is the
        signals' kappa.
    directory : RunDirectory, optional
        Without one nothing is written.
    generators : mapping of str to numpy.random.Generator
        Every generator that the training draws from besides that of `train`; their states belong to the checkpoint.
    checkpoint_minutes : float
        A checkpoint is written when so many minutes have passed since the last one, and after every epoch; 0: after
        every batch.
    on_divergence : {"stop", "halve-lr"}
        What a `DivergenceError` does: end the run, or take it back to the end of the last epoch (as the directory has
        it) and halve all learning rates, at most `MOST_HALVINGS` times.
    quiet : bool
        No progress bar and no line an epoch.
    report : callable
        Takes the line that sums up an epoch.

    Notes
    -----
    A resumed run repeats a straight one bit for bit on the CPU: a checkpoint holds parameters, optimizer, generator
    states, the place in the epoch and the sums of its statistics, and both schedules depend on the step only. For the
    same reason a divergence takes a run back to the end of an epoch, wherever it was saved or looked at in between.
    """

    def __init__(
        self,
        learner: Any,
        optimizer: Optimizer,
        train: Any,
        test: Any,
        *,
        validation: Any = None,
        epochs: int,
        lr_schedule: str = "constant",
        directory: RunDirectory | None = None,
        generators: Mapping[str, np.random.Generator] | None = None,
        checkpoint_minutes: float = 10.0,
        on_divergence: str = "stop",
        quiet: bool = False,
        report: Callable[[str], None] = print,
    ):
        require(epochs >= 1, f"epochs must be at least 1 (got {epochs})")
        self.learner = learner
        self.network = learner.network
        self.device = self.network.device
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self.validation = validation
        self.best_split = "test" if validation is None else "validation"
        self.epochs = epochs
        self.schedule = LR_SCHEDULES[lr_schedule]
        self.directory = directory
        self.generators = {"data": train.generator, **(generators or {})}
        self.checkpoint_s = 60 * checkpoint_minutes
        self.on_divergence = choose("on_divergence", on_divergence, ON_DIVERGENCE)
        self.quiet = quiet
        self.report = report
        self.interruptions = Interruptions()
        self.epochs_done, self.batches_done = 0, 0
        self.best_accuracy, self.best_epoch = -math.inf, 0
        self.elapsed_s, self.epoch_s = 0.0, 0.0
        self.halvings = 0
        self.watch = LossWatch(self.device)
        self._saved = time.monotonic()

    def run(self) -> TrainSummary:
        """Train until `epochs` epochs are done and return how it ended.

        Raises
        ------
        DivergenceError
            If the loss, a state, a gradient or a parameter stops being finite, or the loss stays far above its start;
            the last good checkpoint stays.
        CheckpointError
            If the run directory cannot be written, or another process writes there.
        Interrupted
            If a signal came; the run has been saved.
        """
        self.check_unfinished()
        if self.directory is None:
            return self._train()
        with self.directory.locked(), self.interruptions:
            try:
                return self._train()
            except Interrupted as signal:
                self._save()
                hint = f"interrupted; go on with: cupyep train --run-dir {self.directory.path} --resume"
                raise Interrupted(hint, signal.number) from None

    def check_unfinished(self) -> None:
        """Raise `ConfigurationError` if no epoch is left to do."""
        require(self.epochs_done < self.epochs, f"all {self.epochs} epochs are done; give more --epochs to go on")

    def resume(self) -> str:
        """Take up the run of `directory` where its last checkpoint left it, and lock the directory until `run` ends.

        Returns
        -------
        str
            Why checkpoint.previous.h5 had to do, or empty.

        Raises
        ------
        CheckpointError
            If no checkpoint is of use: damaged, or of another network or run.
        """
        self.directory.lock()
        try:
            path, saved, problem = self.directory.rewind(partial(check_same_run, self))
            if saved is not None:
                restore_snapshot(self, path, saved)
            self.check_unfinished()
        except BaseException:
            self.directory.unlock()
            raise
        return problem

    def begin_epoch(self) -> None:
        """Start the statistics of the epoch after `epochs_done`, and remember where its draws begin."""
        layers = layer_names(self.learner.parameters())
        self.statistics = EpochStatistics(self.device, self.epochs_done + 1, layers)
        self.epoch_start = self.generators["data"].bit_generator.state

    def _train(self) -> TrainSummary:
        if self.directory is not None and self.epochs_done == self.batches_done == 0:
            self._save()  # where a divergence in the first epoch goes back to
        while self.epochs_done < self.epochs:
            try:
                record = self._run_epoch(self.epochs_done + 1)
            except DivergenceError as error:
                self._take_back(error)
        path = None if self.directory is None else self.directory.path
        best = (self.best_accuracy, self.best_epoch, self.best_split)
        return TrainSummary(record["test_accuracy"], record["test_loss"], *best, self.elapsed_s, path)

    def _take_back(self, error: DivergenceError) -> None:
        """Go back to the end of the last epoch with half the learning rates, or raise `error`."""
        halvings = self.halvings + 1
        if self.on_divergence == "stop" or self.directory is None or halvings > MOST_HALVINGS:
            raise error
        restore_snapshot(self, *self.directory.epoch_start())
        self.halvings = halvings
        self.watch.forgive()
        self.report(
            f"{error}; back to the end of epoch {self.epochs_done} with half the learning rate "
            f"(time {halvings} of at most {MOST_HALVINGS})"
        )

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train what is left of an epoch, evaluate, write it down; return its record."""
        factor = self._set_progress((epoch - 1) / self.epochs)
        settings = {"learning_rate": self._rates(factor), "kappa": _one_or_list(s.kappa for s in self.learner.signals)}
        means = self._train_epoch(epoch)
        begin = time.monotonic()
        held_out = self._evaluate(epoch)
        self.elapsed_s += self.epoch_s + time.monotonic() - begin
        record = {
            "epoch": epoch,
            "train_loss": means.pop("loss"),
            "train_accuracy": means.pop("accuracy"),
            **held_out,
            **settings,
            "halvings": self.halvings,
            "images_per_s": self.statistics.count / self.epoch_s,
            "elapsed_s": self.elapsed_s,
            "peak_memory_bytes": self.device.peak_memory_bytes(),
            **means,
        }
        self._end_epoch(record)
        return record

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """Step through the training batches that are left; return the epoch's means."""
        if self.batches_done == 0:
            self.begin_epoch()
        bar = tqdm(
            total=len(self.train.split),
            initial=self.statistics.count,
            desc=f"epoch {epoch}/{self.epochs}",
            unit=" images",
            leave=False,
            disable=True if self.quiet else None,
        )
        with bar, np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named later
            shown = clock = time.monotonic()
            for batch in self._stoppable(self.train.batches(self.batches_done)):
                self._step(epoch, batch)
                bar.update(len(batch))
                if time.monotonic() - shown >= REFRESH_S:
                    bar.set_postfix_str(_bar_text(self._means(epoch)), refresh=False)
                    shown = time.monotonic()
                self.epoch_s, clock = self.epoch_s + time.monotonic() - clock, time.monotonic()
                if self.directory is not None and clock - self._saved >= self.checkpoint_s:
                    self._save()
                    clock = time.monotonic()
        return self._means(epoch)

    def _step(self, epoch: int, batch: Any) -> None:
        factor = self._set_progress((epoch - 1 + self.batches_done / len(self.train)) / self.epochs)
        result = self.learner.step(batch)
        self.optimizer.step(result.gradients, factor)
        self.statistics.add(result)
        self.watch.add(result.loss)
        self.batches_done += 1

    def _stoppable(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield `batches`; raise `Interrupted` when one is done and a signal has come."""
        for batch in batches:
            yield batch
            self.interruptions.check()

    def _means(self, epoch: int) -> dict[str, Any]:
        """Read the statistics of the epoch, which waits for the device; raise `DivergenceError` if they say so."""
        means = self.statistics.read()
        self.watch.check(epoch)
        return means

    def _end_epoch(self, record: dict[str, Any]) -> None:
        accuracy = record[f"{self.best_split}_accuracy"]
        is_best = accuracy > self.best_accuracy
        if is_best:
            self.best_accuracy, self.best_epoch = accuracy, record["epoch"]
        self.epochs_done, self.batches_done, self.epoch_s = record["epoch"], 0, 0.0
        if self.directory is not None:
            self.directory.commit(record, take_snapshot(self), is_best)
            self._saved = time.monotonic()
        if not self.quiet:
            self.report(_epoch_line(record, self.epochs))

    def _save(self) -> None:
        if self.batches_done:
            self._means(self.epochs_done + 1)  # what has diverged is not saved
        self.directory.save(take_snapshot(self))
        self._saved = time.monotonic()

    def _evaluate(self, epoch: int) -> dict[str, float | None]:
        """Return loss and accuracy of the validation and the test batches; None where there are none."""
        record: dict[str, float | None] = {}
        for split, batches in (("validation", self.validation), ("test", self.test)):
            if batches is None:
                record |= {f"{split}_loss": None, f"{split}_accuracy": None}
                continue
            loss, accuracy = evaluate(self.learner, self._stoppable(batches), f"epoch {epoch} {split}", self.quiet)
            if not math.isfinite(loss):
                raise DivergenceError(f"the {split} loss is not finite after epoch {epoch}; lower --learning-rate")
            record |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        return record

    def _set_progress(self, progress: float) -> float:
        """Set kappa for `progress` in [0, 1) and return the factor of the learning rates."""
        for signal in self.learner.signals:
            signal.anneal(progress)
        return self.schedule(progress) * 0.5**self.halvings

    def _rates(self, factor: float) -> float | list[float]:
        """Return the learning rate, or one a layer (in the order of ``gradient_norm``) if they differ."""
        rates = {path: rate for path, rate in self.optimizer.rates.items() if not path.startswith("signals.")}
        by_layer = {layer_of(path): rate * factor for path, rate in rates.items()}
        return _one_or_list(by_layer.values())


def _bar_text(means: dict[str, Any]) -> str:
    text = f"loss {means['loss']:.3f}, acc {means['accuracy']:.1%}"
    return text if means["free_residual"] is None else f"{text}, residual {means['free_residual']:.1e}"


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    splits = [split for split in ("train", "validation", "test") if record[f"{split}_loss"] is not None]
    losses = [f"{s} loss {record[f'{s}_loss']:.4f}  acc {record[f'{s}_accuracy']:6.2%}" for s in splits]
    residual = [] if record["free_residual"] is None else [f"residual {record['free_residual']:.1e}"]
    number = f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"
    return "  ".join([number, *losses, *residual, f"{record['images_per_s']:.0f} images/s"])


def _one_or_list(values: Iterable[float]) -> float | list[float] | None:
    """Return None for no value, the value if all are the same, else all of them."""
    values = list(values)
    if len(set(values)) > 1:
        return values
    return values[0] if values else None
