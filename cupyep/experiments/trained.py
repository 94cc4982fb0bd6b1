"""The commonest measurement: train one network, keep the course of its losses and of its layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cupyep.experiments.design import Cell, Column, Results
from cupyep.files import read_text, replacing
from cupyep.learning import Learner
from cupyep.network import Network
from cupyep.training.config import TrainConfig, make_config
from cupyep.training.display import Display
from cupyep.training.interruption import stopped_by
from cupyep.training.run_directory import CONFIG, RunDirectory
from cupyep.training.runs import resume_run, start_run
from cupyep.training.trainer import Trainer

COURSES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
LAYER_COURSES = ("nudge_response", "gradient_norm", "activity")
PROBES, PROBES_BYTES = "probes.json", 1 << 28
PORTABLE = ("device", "scratch_mb", "data_dir", "teacher")  # may change when a training goes on

Probe = Callable[[Network, TrainConfig], dict[str, Any]]


def train_cell(
    cell: Cell,
    probe: Probe | None = None,
    every_epoch: bool = False,
    prepare: Callable[[Learner], None] | None = None,
) -> dict[str, Any]:
    """Train the cell's network in its folder, or go on with it there; return its courses.

    Parameters
    ----------
    cell : Cell
    probe : callable, optional
        Takes the network and the run's configuration and returns plain numbers, texts and lists.
    every_epoch : bool
        Probe after every epoch instead of after the last one.
    prepare : callable, optional
        Takes the learner before it is trained (further).

    Returns
    -------
    dict
        ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy``, ``elapsed_minutes``: a number an epoch;
        ``nudge_response``, ``gradient_norm``, ``activity``: a list an epoch with a number a layer; ``minutes``,
        ``peak_memory_bytes``; ``probes``: what `probe` returned, and the ``epoch``.
    """
    with stopped_by(cell.deadline):
        _train(cell, probe, every_epoch, prepare)
    return _courses(RunDirectory.open(cell.folder).metrics(), _probes(cell.folder))


def _train(cell: Cell, probe: Probe | None, every_epoch: bool, prepare: Callable[[Learner], None] | None) -> None:
    display, trainer = Display(cell.quiet, cell.report), None
    if (cell.folder / CONFIG).is_file():
        given = {name: cell.options[name] for name in PORTABLE if name in cell.options}
        if _epochs_left(cell.folder):
            trainer = resume_run(cell.folder, given, display)
    else:
        trainer = start_run(make_config(cell.options), cell.folder, display)
    if trainer is not None:
        trainer.display = _Watch(cell, trainer, probe, every_epoch)
        if prepare:
            prepare(trainer.learner)
        trainer.run()


class _Watch(Display):
    """Shows a cell's training and keeps its probes."""

    def __init__(self, cell: Cell, trainer: Trainer, probe: Probe | None, every_epoch: bool):
        super().__init__(cell.quiet, cell.report)
        self.cell, self.trainer, self.probe, self.every_epoch = cell, trainer, probe, every_epoch

    def show(self, event: str, text: str = "", **values: Any) -> None:
        super().show(event, text, **values)
        if event != "epoch":  # which comes when the epoch is safely kept
            return
        if self.probe and (self.every_epoch or values["epoch"] == self.trainer.epochs):
            found = self.probe(self.trainer.network, self.trainer.directory.config)
            _keep_probe(self.cell.folder, {"epoch": values["epoch"], **found})


def _epochs_left(folder: Path) -> bool:
    directory = RunDirectory.open(folder)
    return len(directory.metrics()) < directory.config.epochs


def _courses(records: list[dict[str, Any]], probes: list[dict[str, Any]]) -> dict[str, Any]:
    last = records[-1]
    return {
        **{name: [_short(record[name]) for record in records] for name in COURSES},
        **{name: [[_short(number) for number in record[name] or []] for record in records] for name in LAYER_COURSES},
        "free_residual": _short(last["free_residual"]),
        "elapsed_minutes": [_short(record["elapsed_s"] / 60) for record in records],
        "minutes": _short(last["elapsed_s"] / 60),
        "images_per_s": _short(last["images_per_s"]),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "probes": probes,
    }


def _probes(folder: Path) -> list[dict[str, Any]]:
    path = folder / PROBES
    return json.loads(read_text(path, PROBES_BYTES)) if path.is_file() else []


def _keep_probe(folder: Path, record: dict[str, Any]) -> None:
    """Add a probe to those kept, in place of those of this epoch and later ones (of a run that went back)."""
    kept = [probe for probe in _probes(folder) if probe["epoch"] < record["epoch"]]
    with replacing(folder / PROBES) as temporary:
        temporary.write_text(json.dumps([*kept, record], allow_nan=False), encoding="utf-8")


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.5g}")


def last(name: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], float | None]:
    """Return the function from a cell to `name` after its last epoch, times `scale`; None where it failed."""
    return lambda cell: None if "failed" in cell else cell[name][-1] * scale


def first_layer(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Return the function from a cell to the first layer's `name` after the last epoch, over that of the last layer."""

    def ratio(cell: Mapping[str, Any]) -> float | None:
        layers = [] if "failed" in cell else cell[name][-1]
        return layers[0] / layers[-1] if layers and layers[-1] else None

    return ratio


TRAIN_LOSS = Column("training loss", last("train_loss"))
TEST_ACCURACY = Column("test accuracy, %", last("test_accuracy", 100), ".1f")
MINUTES = Column("minutes", lambda cell: cell["minutes"], ".1f")
COLUMNS = (TRAIN_LOSS, TEST_ACCURACY, MINUTES)


def loss(results: Results, key: str) -> float:
    """Return the mean training loss of a row in its last epoch, infinite where it failed."""
    value = results.mean(key, TRAIN_LOSS.value)
    return math.inf if math.isnan(value) else value


def accuracy(results: Results, key: str) -> float:
    """Return the mean test accuracy of a row after its last epoch in percent, 0 where it failed."""
    value = results.mean(key, TEST_ACCURACY.value)
    return 0.0 if math.isnan(value) else value
