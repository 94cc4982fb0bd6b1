"""What a cell measures: a training, gradients beside those of BPTT and BP, or memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import get_device
from cupyep.batch import Batch
from cupyep.commands.memory import memory_report
from cupyep.data import Dataset, Loader
from cupyep.diagnostics.checkup import PROBE_IMAGES
from cupyep.errors import CheckpointError, DivergenceError, one_line
from cupyep.experiments.design import Cell
from cupyep.experiments.sweep import is_finished
from cupyep.files import read_json, write_json
from cupyep.learning import Backpropagation, EquilibriumPropagation
from cupyep.learning.check import bptt_gradients, compare, compare_forms
from cupyep.learning.equilibrium import FORMS
from cupyep.learning.gradients import layer_of
from cupyep.learning.operations import OperationCounter, Operations
from cupyep.network import Network
from cupyep.settling import default_relaxation
from cupyep.training.build import (
    build_dataset,
    build_learner,
    build_network,
    build_signals,
    rest_batches,
)
from cupyep.training.config import AUTO, MACHINE, TrainConfig, differing, make_config, option_name
from cupyep.training.display import Display
from cupyep.training.interruption import stopped_by
from cupyep.training.results import at_rest
from cupyep.training.run_directory import CONFIG, RunDirectory
from cupyep.training.runs import resume_run, start_run
from cupyep.training.trained import load_trained
from cupyep.training.trainer import Trainer

COURSES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
LAYER_COURSES = ("nudge_response", "gradient_norm", "activity")
PROBES, PROBES_BYTES = "probes.json", 1 << 28
NO_MATTER = (*MACHINE, "checkpoint_minutes", "plugin")  # to what comes of a training
SETTLE = 300  # iterations before gradients are compared
STEPS = (10, 50, 250)  # T, of memory plans

Probe = Callable[[Network, TrainConfig], dict[str, Any]]


def train_cell(
    cell: Cell,
    probe: Probe | None = None,
    every_epoch: bool = False,
    prepare: Callable[[Trainer], None] | None = None,
) -> dict[str, Any]:
    """Train the cell's network in its folder, or go on with it there; return its courses.

    A run of ``cupyep train`` with the same options that was put there is taken as it is, finished or not.

    Parameters
    ----------
    cell : Cell
    probe : callable, optional
        Takes the network and the run's configuration and returns plain numbers, texts and lists.
    every_epoch : bool
        Probe the network after every epoch, instead of that of the last checkpoint (with `ema` the running average).
    prepare : callable, optional
        Takes the trainer before it trains (further).

    Returns
    -------
    dict
        ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy``, ``elapsed_minutes``, ``rates`` (images a
        second): a number an epoch; ``nudge_response``, ``gradient_norm``, ``activity``: a list an epoch with a number a
        layer; ``minutes``, ``threads`` (None where the run does not tell), ``peak_memory_bytes``; ``findings``: what
        checkups found, see `_found`; ``probes``: what `probe` returned, and the ``epoch``.

    Raises
    ------
    CheckpointError
        If the folder holds a run with other options, or one without what is measured after every epoch.
    """
    display, folder = _Watch(cell.quiet, cell.report), cell.folder
    with stopped_by(cell.deadline):
        if probe and every_epoch and (folder / CONFIG).is_file():
            _probe_cut_off(cell, probe)
        trainer = _trainer(cell, display)
        if trainer is not None:
            if probe and every_epoch:
                config = trainer.directory.config
                display.after = lambda epoch: _keep_probe(folder, epoch, probe(trainer.network, config))
            if prepare:
                prepare(trainer)
            trainer.rest = None  # `rest` measures it
            trainer.run()
    records = RunDirectory.open(folder).metrics()
    if probe and not every_epoch:
        _probe_kept(cell, probe, len(records))
    if probe and every_epoch and len(_probes(folder)) < len(records):
        raise _lacking(folder)
    return _courses(records, _probes(folder))


def _trainer(cell: Cell, display: Display) -> Trainer | None:
    """Return the trainer of a cell, begun or to go on; None where all epochs are done."""
    folder, config = cell.folder, make_config(cell.options)
    if not (folder / CONFIG).is_file():
        return start_run(config, folder, display)
    directory = RunDirectory.open(folder)
    check_same(config, directory)
    if is_finished(directory):
        return None
    return resume_run(folder, _of_machine(cell), display)


def _of_machine(cell: Cell, but: str = "") -> dict[str, Any]:
    """Return the options of a cell that the machine decides."""
    return {name: cell.options[name] for name in MACHINE if name in cell.options and name != but}


def check_same(config: TrainConfig, held: RunDirectory) -> None:
    """Raise `CheckpointError` unless the run that a cell's folder holds is one of the cell's options."""
    for name in differing(config, held.config):
        if name not in NO_MATTER:
            ours, theirs = (getattr(each, name) for each in (config, held.config))
            told = f"holds a run with {option_name(name)} {theirs}, not {ours}; remove it or give another --output"
            raise CheckpointError(f"'{held.path}' {told}")


def _probe_kept(cell: Cell, probe: Probe, epoch: int) -> None:
    """Probe the network of the last checkpoint, unless that was done."""
    if all(kept["epoch"] != epoch for kept in _probes(cell.folder)):
        given = _of_machine(cell, but="teacher")  # no network of a run asks it again
        run = load_trained(cell.folder, "last", given)
        _keep_probe(cell.folder, epoch, probe(run.network, run.config))


def _probe_cut_off(cell: Cell, probe: Probe) -> None:
    """Probe the last epoch of a run that was killed between checkpoint and probe; refuse one that lacks more."""
    directory = RunDirectory.open(cell.folder)
    check_same(make_config(cell.options), directory)
    try:
        saved = directory.load("last")
    except CheckpointError:
        return  # where the training goes on, it is said what is wrong
    lacking = set(range(1, saved.epoch + 1)) - {kept["epoch"] for kept in _probes(cell.folder)}
    if not lacking:
        return
    if lacking != {saved.epoch} or saved.batch > 0:
        raise _lacking(cell.folder)
    given = _of_machine(cell, but="teacher")
    network = load_trained(cell.folder, "last", given).network
    own = {path: saved.parameters[path] for path in network.parameters()}
    network.load_parameters(own)  # themselves, as after other epochs, and not their running average
    _keep_probe(cell.folder, saved.epoch, probe(network, replace(directory.config, **given)))


def _lacking(folder: Path) -> CheckpointError:
    told = "holds a run without what is measured after every epoch; remove it or give another --output"
    return CheckpointError(f"'{folder}' {told}")


class _Watch(Display):
    """Shows a cell's training and calls `after` with the number of every epoch that is safely kept."""

    after: Callable[[int], None] | None = None  # not yet in the epochs of a teacher, which is trained first

    def show(self, event: str, text: str = "", **values: Any) -> None:
        super().show(event, text, **values)
        if event == "epoch" and self.after is not None:
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
        "rates": [_short(record["images_per_s"]) for record in records],
        "threads": last.get("threads"),
        "findings": _found(records),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "probes": probes,
    }


def _probes(folder: Path) -> list[dict[str, Any]]:
    path = folder / PROBES
    if not path.is_file():
        return []
    try:
        probes = read_json(path, PROBES_BYTES)
        if not isinstance(probes, list) or any(type(probe["epoch"]) is not int for probe in probes):
            raise TypeError("not a list of epochs")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"'{path}' is damaged ({one_line(error)}); remove it to measure anew") from error
    return probes


def _keep_probe(folder: Path, epoch: int, probed: dict[str, Any]) -> None:
    """Add a probe to those kept, in place of those of this epoch and later ones (of a run that went back)."""
    kept = [probe for probe in _probes(folder) if probe["epoch"] < epoch]
    write_json(folder / PROBES, [*kept, {"epoch": epoch, **probed}])


def _found(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each signature that checkups found, in how many ``epochs``, with the ``last`` one and its ``message``."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        messages: dict[str, list[str]] = {}
        for each in record.get("findings") or []:  # of a signature one a phase, the cause first
            messages.setdefault(each["signature"], []).append(each["message"])
        for name, message in messages.items():
            epochs = found.get(name, {}).get("epochs", 0) + 1
            found[name] = {"signature": name, "epochs": epochs, "last": record["epoch"], "message": "; ".join(message)}
    return list(found.values())


def _short(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(f"{number:.5g}")


def operations_cell(cell: Cell) -> dict[str, Any]:
    """Train, counting the operations of every epoch (its evaluation included).

    Of batches before the training was stopped, those of all their steps: how many a tolerance took, nobody knows.
    """
    counters: list[OperationCounter] = []

    def begin(trainer: Trainer) -> None:
        counters.append(OperationCounter(trainer.learner))
        done = min(trainer.batches_done * trainer.train.batch_size, len(trainer.train.split))
        counters[-1].operations = Operations(trainer.network, done).step(trainer.learner)

    def count(network: Network, config: TrainConfig) -> dict[str, Any]:
        if not counters:  # nobody counted: the epoch was done when the training was killed
            if config.tolerance is not None or AUTO in (config.free_steps, config.nudged_steps):
                raise _lacking(cell.folder)
            return {"operations": _of_epoch(network, config)}
        found, counters[-1].operations = counters[-1].operations, 0
        return {"operations": found}

    return train_cell(cell, count, every_epoch=True, prepare=begin)


def _of_epoch(network: Network, config: TrainConfig) -> int:
    """Return the operations of an epoch whose phases do all their steps, and of its evaluation."""
    dataset, learner = build_dataset(config), build_learner(config, network, [], np.random.default_rng(config.seed))
    judged = len(dataset.test) + len(dataset.validation or ())
    return Operations(network, len(dataset.train)).step(learner) + Operations(network, judged).prediction(learner)


def cosines(network: Network, config: TrainConfig) -> dict[str, list[Any]]:
    """Return the cosines of EP's weight gradients with BPTT's, from the same free state, and with BP's, a layer each.

    EP as `config` says, on the first training images, from a state that is settled well: a comparison of gradients
    where nothing is at rest says little. Where no stable equilibrium is found, there is no cosine with BPTT. Nothing
    for an algorithm other than EP.

    Returns
    -------
    dict
        ``weights``, their names; ``bptt`` and ``bp``, the cosines; ``bp_trained``, those with BP of the gradient that
        training follows (no signals), after as many steps as it takes, and of that step ``response``, mean |s+ - s-| of
        the layer that the weight leads to (None of the readout).
    """
    if config.algorithm != "ep":
        return {}
    batch = _first_images(build_dataset(replace(config, limit_test=1)), network)
    how = config.take("beta", "free_steps", "nudged_steps", "scheme", "nudge", "schedule", "relaxation")
    ep = EquilibriumPropagation(network, **how)
    well = {"schedule": "evenodd", "relaxation": default_relaxation("evenodd", config.feedback)}
    free = ep.settle_free(batch, steps=SETTLE, tolerance=None, **well).copy()
    estimate = _weights(network, ep.step_from(batch, free).gradients)
    step = ep.step(batch)
    as_trained, response = _weights(network, step.gradients), network.device.to_numpy(step.nudge_response).tolist()
    bp = _weights(network, Backpropagation(network).step(batch).gradients)
    of_layers = dict(zip((f"layers.{name}" for name in network.graph.names), response, strict=True))
    found: dict[str, list[Any]] = {
        "weights": [path.removeprefix("layers.").removesuffix(".weight") for path in bp],
        "bp": _cosines(estimate, bp),
        "bp_trained": _cosines(as_trained, bp),
        "response": [_short(of_layers.get(layer_of(path))) for path in bp],
    }
    try:
        return {"bptt": _cosines(estimate, _weights(network, bptt_gradients(network, batch, free))), **found}
    except DivergenceError:
        return {"bptt": [None] * len(bp), **found}


def rest(network: Network, config: TrainConfig) -> dict[str, Any]:
    """Return `at_rest` of test images, under ``rest``; nothing for BP, which does not settle."""
    if config.algorithm == "bp":
        return {}
    learner = build_learner(config, network, [], np.random.default_rng(config.seed))
    return {"rest": at_rest(learner, rest_batches(config, build_dataset(config), network))}


def _weights(network: Network, gradients: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the gradients of weights, on the host: the next step writes over them."""
    host = network.device.to_numpy
    return {path: host(gradient).copy() for path, gradient in gradients.items() if path.endswith(".weight")}


def _cosines(estimate: Mapping[str, Any], truth: Mapping[str, Any]) -> list[float | None]:
    return [_short(compare(estimate[path], truth[path])["cosine"]) for path in truth]


def _first_images(dataset: Dataset, network: Network, count: int = PROBE_IMAGES) -> Batch:
    """Return the first training images, as they are."""
    return next(iter(Loader(dataset, "train", count, network.device, network.dtype)))


def fidelity_cell(cell: Cell) -> dict[str, Any]:
    """Compare both forms of the nudge with BPTT on an untrained network, well settled, layer by layer."""
    config = replace(make_config(cell.options), limit_train=PROBE_IMAGES, limit_test=1)
    dataset = build_dataset(config)
    network = build_network(config, dataset, get_device(config.device, config.scratch_mb))
    batch = _first_images(dataset, network, config.batch_size)
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


UNTRAINED = (fidelity_cell, memory_cell)  # measurements that train nothing
#: What an experiment's file may name as its measurement.
MEASURES: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "training": train_cell,
    "cosines": partial(train_cell, probe=cosines),
    "cosines and rest": partial(train_cell, probe=lambda *trained: cosines(*trained) | rest(*trained)),
    "cosines by epoch": partial(train_cell, probe=cosines, every_epoch=True),
    "operations": operations_cell,
    "fidelity": fidelity_cell,
    "memory": memory_cell,
}
