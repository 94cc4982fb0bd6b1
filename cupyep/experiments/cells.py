"""What a cell measures: a training, gradients beside those of BPTT and BP, or memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cupyep.backend import get_device
from cupyep.batch import Batch
from cupyep.commands.memory import memory_report
from cupyep.data import Loader
from cupyep.errors import DivergenceError
from cupyep.experiments.design import Cell
from cupyep.files import read_text, write_json
from cupyep.learning import Backpropagation, EquilibriumPropagation, Learner
from cupyep.learning.check import bptt_gradients, compare, compare_forms
from cupyep.learning.operations import OperationCounter
from cupyep.network import Network
from cupyep.settling import default_relaxation
from cupyep.training.build import build_dataset, build_network, build_signals
from cupyep.training.config import TrainConfig, make_config
from cupyep.training.display import Display
from cupyep.training.interruption import stopped_by
from cupyep.training.run_directory import CONFIG, RunDirectory
from cupyep.training.runs import resume_run, start_run

COURSES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
LAYER_COURSES = ("nudge_response", "gradient_norm", "activity")
PROBES, PROBES_BYTES = "probes.json", 1 << 28
PORTABLE = ("device", "scratch_mb", "data_dir", "teacher")  # may change when a training goes on
FORMS = ("classical", "deviation")
PROBE_IMAGES = 32
SETTLE = 300  # iterations before gradients are compared
STEPS = (10, 50, 250)  # T, of memory plans

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
    display, trainer, folder = _Watch(cell.quiet, cell.report), None, cell.folder

    def after(epoch: int) -> None:
        if probe and (every_epoch or epoch == trainer.epochs):
            _keep_probe(folder, {"epoch": epoch, **probe(trainer.network, trainer.directory.config)})

    with stopped_by(cell.deadline):
        if not (folder / CONFIG).is_file():
            trainer = start_run(make_config(cell.options), folder, display)
        elif len((directory := RunDirectory.open(folder)).metrics()) < directory.config.epochs:
            given = {name: cell.options[name] for name in PORTABLE if name in cell.options}
            trainer = resume_run(folder, given, display)
        if trainer is not None:
            display.after = after
            if prepare:
                prepare(trainer.learner)
            trainer.run()
    return _courses(RunDirectory.open(folder).metrics(), _probes(folder))


class _Watch(Display):
    """Shows a cell's training and calls `after` with the number of every epoch that is safely kept."""

    def after(self, epoch: int) -> None:
        """Do nothing: the epochs of a teacher, which is trained first."""

    def show(self, event: str, text: str = "", **values: Any) -> None:
        super().show(event, text, **values)
        if event == "epoch":
            self.after(values["epoch"])


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
    write_json(folder / PROBES, [*kept, record])


def _short(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(f"{number:.5g}")


def operations_cell(cell: Cell) -> dict[str, Any]:
    """Train, counting the operations of every epoch (its evaluation included)."""
    counters: list[OperationCounter] = []

    def count(network: Network, config: TrainConfig) -> dict[str, Any]:
        found, counters[-1].operations = counters[-1].operations, 0
        return {"operations": found}

    return train_cell(cell, count, every_epoch=True, prepare=lambda learner: counters.append(OperationCounter(learner)))


def cosines(network: Network, config: TrainConfig) -> dict[str, list[float | None]]:
    """Return the cosines of EP's weight gradients with BPTT's, from the same free state, and with BP's, a layer each.

    EP as `config` says, on the first training images, from a state that is settled well: a comparison of gradients
    where nothing is at rest says little. Where no stable equilibrium is found, there is no cosine with BPTT. Nothing
    for an algorithm other than EP.
    """
    if config.algorithm != "ep":
        return {}
    batch = _first_images(replace(config, limit_test=1), network)
    how = config.take("beta", "free_steps", "nudged_steps", "scheme", "nudge", "schedule", "relaxation")
    ep = EquilibriumPropagation(network, **how)
    well = {"schedule": "evenodd", "relaxation": default_relaxation("evenodd", config.feedback)}
    free = ep.settle_free(batch, steps=SETTLE, tolerance=None, **well).copy()
    to_numpy = network.device.to_numpy
    estimate = {path: to_numpy(g).copy() for path, g in ep.step_from(batch, free).gradients.items()}

    def beside(truth: Mapping[str, Any]) -> list[float | None]:
        weights = (path for path in estimate if path.endswith(".weight"))
        return [_short(compare(estimate[path], to_numpy(truth[path]))["cosine"]) for path in weights]

    bp = beside(Backpropagation(network).step(batch).gradients)
    try:
        return {"bptt": beside(bptt_gradients(network, batch, free)), "bp": bp}
    except DivergenceError:
        return {"bptt": [None] * len(bp), "bp": bp}


def _first_images(config: TrainConfig, network: Network, count: int = PROBE_IMAGES) -> Batch:
    """Return the first training images, as they are."""
    return next(iter(Loader(build_dataset(config), "train", count, network.device, network.dtype)))


def fidelity_cell(cell: Cell) -> dict[str, Any]:
    """Compare both forms of the nudge with BPTT on an untrained network, well settled, layer by layer."""
    config = replace(make_config(cell.options), limit_train=PROBE_IMAGES, limit_test=1)
    dataset = build_dataset(config)
    network = build_network(config, dataset, get_device(config.device, config.scratch_mb))
    batch = _first_images(config, network, config.batch_size)
    signals = build_signals(config, network, dataset, None)
    how = config.take("beta", "free_steps", "nudged_steps", "scheme", "schedule", "relaxation", "tolerance")
    forms = compare_forms(network, batch, forms=FORMS, signals=signals, **how)
    return {
        form: {name: [_short(row[name]) for row in rows] for name in ("cosine", "nudge_response")}
        for form, rows in forms.items()
    }


def memory_cell(cell: Cell) -> dict[str, Any]:
    """Plan a step of each algorithm for a GPU; that of a narrowed network for the device at hand, and measure it."""
    config = make_config(cell.options)
    narrow = config.width < 1
    kind = None if narrow or get_device(config.device).is_gpu else "gpu"
    found: dict[str, Any] = {"planned": {}, "measured": {}}
    for row in memory_report(config, STEPS, kind, measure=narrow, report=cell.report).rows:
        found["planned"].setdefault(row.algorithm, []).append(row.total)
        if row.measured is not None:
            found["measured"].setdefault(row.algorithm, []).append(row.measured)
    return found


#: What an experiment's file may name as its measurement.
MEASURES: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "training": train_cell,
    "cosines": partial(train_cell, probe=cosines),
    "cosines by epoch": partial(train_cell, probe=cosines, every_epoch=True),
    "operations": operations_cell,
    "fidelity": fidelity_cell,
    "memory": memory_cell,
}
