"""The training loop: epochs, schedules, evaluation, the record of every epoch, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cupyep.errors import CheckpointError, DivergenceError, require
from cupyep.optim import LR_SCHEDULES, Optimizer
from cupyep.training.checkpoint import Checkpoint, restore_parameters
from cupyep.training.run_directory import CHECKPOINT, RunDirectory
from cupyep.training.statistics import EpochStatistics, layer_of

REFRESH_S = 0.5  # the bar shows new numbers this often; each time the device is waited for


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


def check_same_network(path: Path, saved: Checkpoint, network: Any) -> None:
    """Raise `CheckpointError` unless the checkpoint `saved`, read from `path`, is of a network like `network`."""
    for key, value in _portable(network.config).items():
        if saved.network.get(key) != value:
            raise CheckpointError(
                f"checkpoint '{path}' belongs to a network with {key} = {saved.network.get(key)}, not {value}"
            )


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
        Every generator that the training draws from; their states belong to the checkpoint.
    quiet : bool
        No progress bar and no line an epoch.
    report : callable
        Takes the line that sums up an epoch.

    Notes
    -----
    A resumed run repeats a straight one bit for bit on the CPU, since parameters, optimizer and generator states are
    those of the end of the last epoch, and both schedules depend on the step only.
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
        quiet: bool = False,
        report: Callable[[str], None] = print,
    ):
        require(epochs >= 1, f"epochs must be at least 1 (got {epochs})")
        self.learner = learner
        self.network = learner.network
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self.validation = validation
        self.best_split = "test" if validation is None else "validation"
        self.epochs = epochs
        self.schedule = LR_SCHEDULES[lr_schedule]
        self.directory = directory
        self.generators = dict(generators or {})
        self.quiet = quiet
        self.report = report
        self.epochs_done = 0
        self.best_accuracy, self.best_epoch = -math.inf, 0
        self.elapsed_s = 0.0

    def run(self) -> TrainSummary:
        """Train until `epochs` epochs are done and return how it ended.

        Raises
        ------
        DivergenceError
            If the loss or a gradient stops being finite; the checkpoint of the epoch before stays.
        CheckpointError
            If the run directory cannot be written.
        """
        self.check_unfinished()
        record: dict[str, Any] = {}
        for epoch in range(self.epochs_done + 1, self.epochs + 1):
            record = self._run_epoch(epoch)
            accuracy = record[f"{self.best_split}_accuracy"]
            is_best = accuracy > self.best_accuracy
            if is_best:
                self.best_accuracy, self.best_epoch = accuracy, epoch
            self.epochs_done = epoch
            if self.directory is not None:
                self.directory.commit(record, self._checkpoint(), is_best)
            if not self.quiet:
                self.report(_epoch_line(record, self.epochs))
        path = None if self.directory is None else self.directory.path
        best = (self.best_accuracy, self.best_epoch, self.best_split)
        return TrainSummary(record["test_accuracy"], record["test_loss"], *best, self.elapsed_s, path)

    def check_unfinished(self) -> None:
        """Raise `ConfigurationError` if no epoch is left to do."""
        require(self.epochs_done < self.epochs, f"all {self.epochs} epochs are done; give more --epochs to go on")

    def resume(self) -> None:
        """Take up the run of `directory` where its last checkpoint left it.

        Raises
        ------
        CheckpointError
            If the checkpoint is damaged or belongs to another network, optimizer or algorithm.
        """
        saved, self.elapsed_s = self.directory.rewind()
        if saved is None:
            return
        path = self.directory.path / CHECKPOINT
        self._check_same_run(path, saved)
        restore_parameters(path, saved.parameters, self.learner.parameters(), self.network.device)
        self.optimizer.load_state_dict(saved.optimizer)
        for name, generator in self.generators.items():
            generator.bit_generator.state = saved.generators[name]
        self.epochs_done, self.best_accuracy, self.best_epoch = saved.epoch, saved.best_accuracy, saved.best_epoch

    def _check_same_run(self, path: Path, saved: Checkpoint) -> None:
        check_same_network(path, saved, self.network)
        if set(saved.generators) != set(self.generators):
            raise CheckpointError(
                f"checkpoint '{path}' lacks the state of a random generator; it is of another version"
            )

    def _checkpoint(self) -> Checkpoint:
        host = self.network.device.to_numpy
        return Checkpoint(
            parameters={path: host(p) for path, p in self.learner.parameters().items()},
            optimizer={name: host(a) for name, a in self.optimizer.state_dict().items()},
            network=_portable(self.network.config),
            epoch=self.epochs_done,
            best_accuracy=self.best_accuracy,
            best_epoch=self.best_epoch,
            generators={name: g.bit_generator.state for name, g in self.generators.items()},
        )

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, evaluate, and return the record for metrics.jsonl."""
        begin = time.monotonic()
        factor = self._set_progress((epoch - 1) / self.epochs)
        settings = {"learning_rate": self._rates(factor), "kappa": _one_or_list(s.kappa for s in self.learner.signals)}
        means, count = self._train_epoch(epoch)
        train_s = time.monotonic() - begin
        held_out = self._evaluate(epoch)
        self.elapsed_s += time.monotonic() - begin
        return {
            "epoch": epoch,
            "train_loss": means.pop("loss"),
            "train_accuracy": means.pop("accuracy"),
            **held_out,
            **settings,
            "images_per_s": count / train_s,
            "elapsed_s": self.elapsed_s,
            "peak_memory_bytes": self.network.device.peak_memory_bytes(),
            **means,
        }

    def _evaluate(self, epoch: int) -> dict[str, float | None]:
        """Return loss and accuracy of the validation and the test batches; None where there are none."""
        record: dict[str, float | None] = {}
        for split, batches in (("validation", self.validation), ("test", self.test)):
            if batches is None:
                record |= {f"{split}_loss": None, f"{split}_accuracy": None}
                continue
            loss, accuracy = evaluate(self.learner, batches, f"epoch {epoch} {split}", self.quiet)
            if not math.isfinite(loss):
                raise DivergenceError(f"the {split} loss is not finite after epoch {epoch}; lower --learning-rate")
            record |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        return record

    def _set_progress(self, progress: float) -> float:
        """Set kappa for `progress` in [0, 1) and return the factor of the learning rates."""
        for signal in self.learner.signals:
            signal.anneal(progress)
        return self.schedule(progress)

    def _rates(self, factor: float) -> float | list[float]:
        """Return the learning rate, or one a layer (in the order of ``gradient_norm``) if they differ."""
        rates = {path: rate for path, rate in self.optimizer.rates.items() if not path.startswith("signals.")}
        by_layer = {layer_of(path): rate * factor for path, rate in rates.items()}
        return _one_or_list(by_layer.values())

    def _train_epoch(self, epoch: int) -> tuple[dict[str, Any], int]:
        """Step through the training batches; return the epoch's means and its number of images."""
        statistics = EpochStatistics(self.network.device, epoch)
        bar = tqdm(
            total=len(self.train.split),
            desc=f"epoch {epoch}/{self.epochs}",
            unit=" images",
            leave=False,
            disable=True if self.quiet else None,
        )
        with (
            bar,
            np.errstate(over="ignore", invalid="ignore"),
        ):  # what is not finite is found and named by the statistics
            shown = time.monotonic()
            for number, batch in enumerate(self.train):
                factor = self._set_progress((epoch - 1 + number / len(self.train)) / self.epochs)
                result = self.learner.step(batch)
                self.optimizer.step(result.gradients, factor)
                statistics.add(result)
                bar.update(result.count)
                if time.monotonic() - shown >= REFRESH_S:
                    bar.set_postfix_str(_bar_text(statistics.read()), refresh=False)
                    shown = time.monotonic()
        return statistics.read(), statistics.count


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


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network's configuration as it comes back from JSON, without what may change between machines."""
    return json.loads(json.dumps({key: value for key, value in config.items() if key != "device"}))
