"""How far the cells of an experiment are, and how long they will take on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cupyep.backend import get_device
from cupyep.data import Dataset
from cupyep.errors import CheckpointError
from cupyep.experiments.cells import check_same
from cupyep.experiments.design import WORK, Cell
from cupyep.experiments.runner import kept
from cupyep.training.build import (
    build_dataset,
    build_learner,
    build_network,
    build_optimizer,
    build_signals,
    evaluation_batches,
    training_batches,
)
from cupyep.training.config import TrainConfig, make_config
from cupyep.training.run_directory import CONFIG, RunDirectory
from cupyep.training.teacher import teacher_config, teacher_path

SHORTEST = 1.0  # seconds that steps are timed


def status(cells: Sequence[Cell], estimate: bool = False, jobs: int = 1) -> Iterator[str]:
    """Yield a line a cell: finished, or after which epoch, how good so far, the hours left.

    Only reads files, unless `estimate` asks for the hours of cells that have no epoch yet: some steps of each are timed
    then, as `hours_of` says, and a last line sums up, for so many `jobs`.
    """
    width, left, measured = max(len(cell.name) for cell in cells), [], kept(cells)
    for cell in cells:
        text, hours = _state(cell, measured.get(cell.name))
        if hours is None and estimate:
            hours, rate = hours_of(make_config(cell.options))
            text += f", about {_time(hours)} by steps timed now ({rate:.0f} images/s)"
        left.append(hours)
        yield f"{cell.name:<{width}}  {text}"
    yield f"run directories: {cells[0].out / WORK}/ROW-seedK"
    known = [hours for hours in left if hours is not None]
    if len(known) == len(left) and any(known):
        told = "one after the other" if jobs == 1 else f"{jobs} at a time, each with one thread"
        yield f"left: {_time(longest(known, jobs))}, {told}"


def longest(hours: Sequence[float], jobs: int) -> float:
    """Return when the last of some cells ends, begun in their order by `jobs` processes."""
    ends = [0.0] * jobs
    for each in hours:
        ends[ends.index(min(ends))] += each
    return max(ends)


def _state(cell: Cell, measured: dict[str, Any] | None) -> tuple[str, float | None]:
    """Return how far a cell is, and the hours that are left; None where its run tells nothing."""
    if measured is not None:
        return f"done, {_measured(measured)}", 0.0
    if not (cell.folder / CONFIG).is_file():
        return "not started", None
    directory = RunDirectory.open(cell.folder)
    try:
        check_same(make_config(cell.options), directory)
    except CheckpointError as error:
        return f"refused: {error}", 0.0
    records, epochs = directory.metrics(), directory.config.epochs
    if not records:
        return f"epoch 0 of {epochs}", None
    last = records[-1]
    hours = last["elapsed_s"] / 3600
    text = f"epoch {last['epoch']} of {epochs}, accuracy {last['test_accuracy']:.2%}, {_time(hours)} so far"
    left = hours / last["epoch"] * (epochs - last["epoch"])
    return (f"{text}, {_time(left)} left" if left else f"{text}, to be measured"), left


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _measured(content: dict[str, Any]) -> str:
    if "failed" in content:
        return f"failed: {content['failed']}"
    accuracy = f"accuracy {content['test_accuracy'][-1]:.2%}, " if content.get("test_accuracy") else ""
    return f"{accuracy}{_time(content['minutes'] / 60)}"


def hours_of(config: TrainConfig) -> tuple[float, float]:
    """Return the hours that a training will take, a teacher that it needs first included, and its images a second.

    Steps of `SHORTEST` seconds at least are timed on the images of the run, and a batch of the evaluation. What phases
    take that end by a tolerance, or take steps that are chosen later, is as at the start.
    """
    dataset, hours = build_dataset(config), 0.0
    if config.aug == "kd" and config.teacher is None and not teacher_path(config, dataset).is_file():
        hours, _ = hours_of(teacher_config(config))
    step, test = _seconds(config, dataset)
    rate = min(config.batch_size, len(dataset.train)) / step
    return hours + config.epochs * (len(dataset.train) / rate + test) / 3600, rate


def _seconds(config: TrainConfig, dataset: Dataset) -> tuple[float, float]:
    """Return the seconds of a step with its images, and of the evaluation."""
    network = build_network(config, dataset, get_device(config.device, config.scratch_mb))
    plain = dataclasses.replace(config, aug="le", teacher=None) if config.aug == "kd" else config  # asks no teacher
    learner = build_learner(config, network, build_signals(plain, network, dataset, None), np.random.default_rng(0))
    optimizer = build_optimizer(config, learner.parameters())
    again = itertools.repeat(training_batches(config, dataset, network, np.random.default_rng(0)))
    batches = itertools.chain.from_iterable(again)  # epoch after epoch

    def step() -> Any:
        return optimizer.step(learner.step(next(batches)).gradients, 0.0)

    tests = evaluation_batches(config, dataset, network)
    batch = next(iter(tests))
    wait = network.device.synchronize
    return _timed(step, wait), len(tests) * _timed(lambda: learner.evaluate(batch), wait)


def _timed(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Return the seconds that `work` takes, done once before and for `SHORTEST` seconds; `wait` is for the device."""
    work()
    wait()
    begin, passed, times = time.monotonic(), 0.0, 0
    while passed < SHORTEST:
        work()
        wait()
        passed, times = time.monotonic() - begin, times + 1
    return passed / times
