"""The training loop: epochs, schedules, evaluation, the record of every epoch, checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np

from cupyep.backend.threads import get_threads
from cupyep.batch import shared_out
from cupyep.data import ImageFormat
from cupyep.diagnostics.checkup import Checkup
from cupyep.errors import ConvergenceWarning, DivergenceError, Interrupted, choose, integer, require
from cupyep.optim import Optimizer
from cupyep.parallel import Communicator
from cupyep.persistence.checkpoint import versions
from cupyep.training import sharing
from cupyep.training.display import Display, epoch_text, progress_text
from cupyep.training.divergence import ON_DIVERGENCE, LossWatch
from cupyep.training.interruption import Interruptions
from cupyep.training.outlook import Outlook
from cupyep.training.results import TrainSummary, at_rest, evaluate
from cupyep.training.run_directory import PREVIOUS
from cupyep.training.schedules import Schedules
from cupyep.training.snapshot import check_same_run, restore_snapshot, take_snapshot
from cupyep.training.statistics import EpochStatistics, layer_names
from cupyep.training.tensorboard import EventLog

SHOWN = ("loss", "accuracy", "free_residual")  # on the way through an epoch
MOST_HALVINGS = 5


class _Stopped(Exception):
    """A callback has ended the run within an epoch."""


def _ends(answer: Any) -> bool:
    """Return whether a callback ends the run: 1, as `write` returns, is not True, nor is an array."""
    return isinstance(answer, (bool, np.bool_, str)) and answer in (True, "stop")


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
    warmup : float
        Epochs in which the learning rates rise to those of the schedule.
    patience : int, optional
        The run ends after so many epochs that were no better than the best one.
    directory : RunDirectory or SharedDirectory, optional
        Without one nothing is written.
    generators : mapping of str to numpy.random.Generator
        Every generator that the training draws from besides that of `train`; their states belong to the checkpoint.
    checkpoint_minutes : float
        A checkpoint is written when so many minutes have passed since the last one, and after every epoch; 0: after
        every batch.
    on_divergence : {"stop", "halve-lr"}
        What a `DivergenceError` does: end the run, or take it back to the end of the last epoch (as the directory has
        it) and halve all learning rates, at most `MOST_HALVINGS` times.
    images : ImageFormat, optional
        Of the data set; kept in checkpoints, so that they can be used without it.
    checkup : Checkup, optional
        Looks at every finished epoch; what it finds is shown as warnings, and recorded.
    rest : Loader, optional
        Test images that a learner of phases is to settle far longer at the end, for `TrainSummary`.
    display : Display, optional
        Shows what is going on.
    on_epoch, on_batch : callable, optional
        Called with the record of every finished epoch, with the `StepResult` of every batch after its update. One that
        returns True or ``"stop"`` ends the run there; a batch's leaves a checkpoint from which it can go on.
    communicator : Communicator, optional
        Of several processes that train together: `train`, `test` and `validation` give each its share of every batch,
        and everything else is the same on all.

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
        warmup: float = 0.0,
        patience: int | None = None,
        directory: Any = None,
        generators: Mapping[str, np.random.Generator] | None = None,
        checkpoint_minutes: float = 10.0,
        on_divergence: str = "stop",
        images: ImageFormat | None = None,
        checkup: Checkup | None = None,
        rest: Any = None,
        display: Display | None = None,
        on_epoch: Callable[[dict[str, Any]], Any] | None = None,
        on_batch: Callable[[Any], Any] | None = None,
        communicator: Communicator | None = None,
    ):
        require(epochs >= 1, f"epochs must be at least 1 (got {epochs})")
        self.learner, self.optimizer = learner, optimizer
        self.network, self.device = learner.network, learner.network.device
        self.train, self.validation, self.test = train, validation, test
        self.best_split = "test" if validation is None else "validation"
        self.epochs = epochs
        self.schedules = Schedules(learner, optimizer, lr_schedule, warmup, len(train))
        self.patience = None if patience is None else integer("patience", patience)
        self.directory = directory
        self.generators = {"data": train.generator, **(generators or {})}
        self.checkpoint_s = 60 * checkpoint_minutes
        self.on_divergence = choose("on_divergence", on_divergence, ON_DIVERGENCE)
        self.images = images
        self.checkup = checkup
        self.rest = rest if hasattr(learner, "free_steps") else None
        self.display = display or Display()
        self.outlook = Outlook(self.display)
        self.on_epoch, self.on_batch, self._stopped = on_epoch, on_batch, False
        self.communicator = communicator or Communicator()
        self.events: EventLog | None = None  # made with the run directory
        self.records: list[dict[str, Any]] = []
        self.interruptions = Interruptions()
        self.epochs_done, self.batches_done = 0, 0
        self.best_accuracy, self.best_epoch = -math.inf, 0
        self.elapsed_s, self.epoch_s, self.halvings = 0.0, 0.0, 0
        self.filters: dict[int, np.ndarray] = {}  # of the first layer, by epoch
        self.watch = LossWatch(self.device)
        self._saved = time.monotonic()

    def run(self) -> TrainSummary | None:
        """Train until `epochs` epochs are done and return how it ended; None if no epoch was.

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
        try:
            self.check_unfinished()
            sharing.share_parameters(self.learner, self.optimizer, self.communicator)
            return self._train() if self.directory is None else self._train_and_save()
        finally:
            if self.events is not None:
                self.events.close()

    def _train_and_save(self) -> TrainSummary | None:
        with self.directory.locked(), self.interruptions:
            try:
                return self._train()
            except Interrupted as error:
                if self.communicator.is_agreed(error):
                    self._save()
                raise

    def check_unfinished(self) -> None:
        """Raise `ConfigurationError` if no epoch is left to do."""
        require(self.epochs_done < self.epochs, f"all {self.epochs} epochs are done; give more --epochs to go on")
        require(not self._is_stale(), f"the run has {self._ending()}; give more --patience to go on")

    def _is_stale(self) -> bool:
        return self.patience is not None and self.epochs_done - self.best_epoch >= self.patience

    def _ending(self) -> str:
        return f"stopped after epoch {self.epochs_done}: no better {self.best_split} accuracy since {self.best_epoch}"

    def resume(self, *checks: Callable[[], None]) -> None:
        """As `restore`, for a run that has epochs left; `ConfigurationError` if all are done."""
        self.restore(self.check_unfinished, *checks)

    def restore(self, *checks: Callable[[], None]) -> None:
        """Take up the run of `directory` where its last checkpoint left it, and lock the directory until `run` ends.

        A warning says why checkpoint.previous.h5 has to do. `CheckpointError` if no checkpoint is of use: damaged, or
        of another network or run. Then come the `checks`, whose errors leave the directory unlocked, too.
        """
        self.directory.lock()
        try:
            path, saved, problem = self.directory.rewind(partial(check_same_run, self))
            if saved is not None:
                restore_snapshot(self, path, saved)
                self._compare_versions(saved.versions)
                self.records = self.directory.metrics()
            for check in checks:
                check()
        except BaseException:
            self.directory.unlock()
            raise
        if problem:
            self.display.show("warning", f"{problem}; going on from {PREVIOUS}")

    def _compare_versions(self, saved: Mapping[str, str]) -> None:
        changed = [f"{name} {saved.get(name)} -> {now}" for name, now in versions().items() if saved.get(name) != now]
        if changed:
            text = f"the run began with other versions ({', '.join(changed)}); numbers may differ in their last digits"
            self.display.show("warning", text)

    def begin_epoch(self) -> None:
        """Start the statistics of the epoch after `epochs_done`, and remember where its draws begin."""
        layers = layer_names(self.learner.parameters())
        self.statistics = EpochStatistics(self.device, self.epochs_done + 1, layers)
        self.epoch_start = self.generators["data"].bit_generator.state

    def _train(self) -> TrainSummary | None:
        if self.directory is not None and self.epochs_done == self.batches_done == 0:
            self._save()  # where a divergence in the first epoch goes back to
        with warnings.catch_warnings():
            if self.checkup is not None:  # which says it once an epoch, for all batches
                warnings.simplefilter("ignore", ConvergenceWarning)
            while self.epochs_done < self.epochs and not (self._is_stale() or self._stopped):
                try:
                    self._run_epoch(self.epochs_done + 1)
                except DivergenceError as error:
                    self._take_back(error)
                except _Stopped:
                    if self.directory is not None:
                        self._save()
        if self.epochs_done < self.epochs and not self._stopped:
            self.display.show("note", self._ending())
        return self._summary() if self.records else None

    def _summary(self) -> TrainSummary:
        record = self.records[-1]
        path = None if self.directory is None else self.directory.path
        chosen = self.records[self.best_epoch - 1]["test_accuracy"]
        figures = (record["epoch"], record["test_accuracy"], record["test_loss"], self.best_accuracy, self.best_epoch)
        return TrainSummary(*figures, chosen, self.best_split, self.elapsed_s, path, self._rest())

    def _rest(self) -> dict[str, Any] | None:
        if self.rest is None or self._stopped:
            return None

        def watched(batches: Any) -> Iterator[Any]:
            return self._stoppable(self.display.over(batches, "at rest"))

        with self.optimizer.averaged():  # as the accuracies of the epochs
            return at_rest(self.learner, self.rest, self.communicator, watched)

    def _take_back(self, error: DivergenceError) -> None:
        """Go back to the end of the last epoch with half the learning rates, or raise `error`."""
        halvings = self.halvings + 1
        if self.on_divergence == "stop" or self.directory is None or halvings > MOST_HALVINGS:
            raise error
        restore_snapshot(self, *self.directory.epoch_start())
        self.halvings = halvings
        self.watch.forgive()
        self.display.show(
            "warning",
            f"{error}; back to the end of epoch {self.epochs_done} with half the learning rate "
            f"(time {halvings} of at most {MOST_HALVINGS})",
        )

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train what is left of an epoch, evaluate, write it down; return its record."""
        settings = self.schedules.values(epoch - 1, self.epochs, self.halvings)
        means = self._train_epoch(epoch)
        begin = time.monotonic()
        record = {
            "epoch": epoch,
            "train_loss": means.pop("loss"),
            "train_accuracy": means.pop("accuracy"),
            **self._evaluate(epoch),
            **settings,
            "halvings": self.halvings,
            **({"nodes": nodes} if (nodes := self.network.graph.named_depths()) else {}),
            **means,
        }
        if self.checkup is not None:
            self.schedules.set(epoch - 1, self.epochs)  # kappa as recorded, wherever the epoch was taken up
            record |= self.checkup.look(record, self.records, self.communicator)
        self.elapsed_s += self.epoch_s + time.monotonic() - begin
        record |= {"images_per_s": self.statistics.count / self.epoch_s, "threads": get_threads()}
        record |= {"elapsed_s": self.elapsed_s, "peak_memory_bytes": self.device.peak_memory_bytes()}
        self._end_epoch(record)
        return record

    def _look_before(self, checkup: Checkup) -> None:
        """Say what does not settle before anything is trained: after an epoch, the next look, may be in hours."""
        begin = time.monotonic()
        for finding in checkup.start(self.communicator):
            self.display.show("warning", f"before training: {finding.message}", epoch=0, **finding._asdict())
        self.elapsed_s += time.monotonic() - begin

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """Step through the training batches that are left; return the epoch's means."""
        if self.batches_done == 0:
            self.begin_epoch()
            if self.checkup is not None:
                if epoch == 1:
                    self._look_before(self.checkup)
                self.checkup.begin()
        title = f"epoch {epoch}/{self.epochs}"
        showing = self.display.progress(title, len(self.train.split), self.statistics.count, epoch=epoch)
        # What is not finite is found and named later.
        with showing as progress, np.errstate(over="ignore", invalid="ignore"):
            begin = time.monotonic()
            for batch in self._stoppable(self.train.batches(self.batches_done)):
                self._step(epoch, batch)
                progress.advance(shared_out(batch)[1])
                late = self.directory is not None and time.monotonic() - self._saved >= self.checkpoint_s
                shows, saves = self.communicator.any(progress.is_due(), late)
                if shows:
                    means = self._means(epoch)
                    progress.show(progress_text(means), **{name: means[name] for name in SHOWN})
                self.outlook.after_batch(self, shows)
                self.epoch_s, begin = self.epoch_s + time.monotonic() - begin, time.monotonic()
                if saves:
                    self._save()
                    begin = time.monotonic()
        return self._means(epoch)

    def _step(self, epoch: int, batch: Any) -> None:
        done = epoch - 1 + self.batches_done / len(self.train)
        factor = self.schedules.set(done, self.epochs, self.halvings)
        result, means, count = sharing.step(self.learner, batch, self.communicator)
        self.statistics.add_means(means, result.gradients, count)  # before a clip
        self.optimizer.step(result.gradients, factor)
        self.watch.add(means["loss"])
        self.batches_done += 1
        if self.on_batch is not None:
            self._stopped = _ends(self.on_batch(result))

    def _stoppable(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield `batches`; raise `Interrupted` when one is done and a signal has come."""
        for batch in batches:
            yield batch
            self.communicator.check(self.interruptions.check)
            if self.on_batch is not None and any(self.communicator.any(self._stopped)):
                raise _Stopped

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
            if self.checkup is not None:
                self.directory.write_settling(self.checkup.trace)
            self.directory.commit(record, take_snapshot(self), is_best)
            self._show_saved()
        self.records.append(record)  # behind the snapshot, which may find that the epoch has diverged
        if self.events is not None:
            self.events.write(record)
        left = self.elapsed_s / self.epochs_done * (self.epochs - self.epochs_done)
        self.display.show("epoch", epoch_text(record, self.epochs, left), **record, left_s=left)
        self.outlook.after_epoch(self, left)
        for finding in record.get("findings", ()):
            text = f"epoch {record['epoch']}: {finding['message']}"
            self.display.show("warning", text, epoch=record["epoch"], **finding)
        called = self.on_epoch is not None and _ends(self.on_epoch(deepcopy(record)))  # what is done to it is its own
        self._stopped = called or (self.checkup is not None and self.checkup.ends)

    def _save(self) -> None:
        if self.batches_done:
            self._means(self.epochs_done + 1)  # what has diverged is not saved
        self.directory.save(take_snapshot(self))
        self._show_saved()

    def _show_saved(self) -> None:
        self._saved = time.monotonic()
        self.display.show("checkpoint", epoch=self.epochs_done, batch=self.batches_done)

    def _evaluate(self, epoch: int) -> dict[str, float | None]:
        """Return loss and accuracy of the validation and the test batches; None where there are none."""
        record: dict[str, float | None] = {}
        for split, batches in (("validation", self.validation), ("test", self.test)):
            if batches is None:
                record |= {f"{split}_loss": None, f"{split}_accuracy": None}
                continue
            shown = self.display.over(batches, f"epoch {epoch}/{self.epochs} {split}")
            with self.optimizer.averaged():
                loss, accuracy = evaluate(self.learner, self._stoppable(shown), self.communicator)
            if not math.isfinite(loss):
                raise DivergenceError(f"the {split} loss is not finite after epoch {epoch}; lower --learning-rate")
            record |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        return record
