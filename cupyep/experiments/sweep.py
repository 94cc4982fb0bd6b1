"""A sweep: a run for every combination of values of some options, each in a folder that is named by its values."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyep.commands.compare import best_record, measures
from cupyep.errors import CheckpointError, ConfigurationError, CupyepError, Interrupted, require
from cupyep.experiments.processes import check_stop, side_by_side
from cupyep.plugins import load_plugin
from cupyep.training.config import RESUME_OPTIONS, TrainConfig, differing, make_config, option_name, require_used
from cupyep.training.display import Display
from cupyep.training.interruption import Interruptions, stopped_by
from cupyep.training.run_directory import CONFIG, RunDirectory, check_free
from cupyep.training.runs import resume_run, start_run
from cupyep.training.tensorboard import FOLDER, EventLog

LENGTH = 40  # characters of a value in a folder's name


@dataclass(frozen=True)
class Point:
    """A run of a sweep: its folder, called by the values, and all its options."""

    folder: Path
    config: TrainConfig

    @property
    def name(self) -> str:
        return self.folder.name


def grid(
    values: Mapping[str, Sequence[Any]],
    folder: Path,
    given: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> list[Point]:
    """Return the runs of a sweep, the last option changing fastest.

    Parameters
    ----------
    values : mapping
        Option -> its values.
    folder : Path
        Where the runs are.
    given, recipe : mapping, optional
        Options that are the same in all runs; those of the recipe come last.

    Raises
    ------
    ConfigurationError
        If a value breaks the rule of its option, an option has no effect in a run that it names, or one given in none.
    """
    given, recipe, points = given or {}, recipe or {}, []
    for combination in itertools.product(*values.values()):
        own = dict(zip(values, combination, strict=True))
        name = ",".join(f"{option}={_name(value)}" for option, value in own.items())
        try:
            config = make_config(recipe, given, own)
            require_used(own, vars(config))
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from error
        points.append(Point(folder / name, config))
    settings = [vars(point.config) for point in points]
    require_used(given, *settings)
    require_used(recipe, recipe, *settings, where="the recipe: ")
    names = [point.name for point in points]
    double = next((name for name in names if names.count(name) > 1), "")
    require(
        not double, f"two runs of the sweep would be called '{double}': their values differ too late, or not at all"
    )
    return points


def _name(value: Any) -> str:
    """Return a value as a part of a folder's name."""
    if isinstance(value, list):
        return "_".join(map(_name, value))
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    text = "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[:LENGTH]


def sweep(
    points: Sequence[Point],
    jobs: int = 1,
    resume: bool = False,
    display: Display | None = None,
    how: Mapping[str, Any] | None = None,
) -> int:
    """Train the runs of a sweep that are not finished, and show a line for each that ends.

    Parameters
    ----------
    points : sequence of Point
        From `grid`.
    jobs : int
        Runs at the same time, each in a process of its own with one thread.
    resume : bool
        Go on with a sweep in the same folder: what is finished is left, what was begun goes on.
    display : Display, optional
    how : mapping, optional
        ``stretch``: as `resume_run` has it; ``tensorboard``: write event files; ``plugin``: what was given as that.

    Returns
    -------
    int
        How many runs have failed; what is wrong has been shown.

    Raises
    ------
    CheckpointError
        Before anything starts, if the folder holds other files.
    ConfigurationError
        Before anything starts, if it holds runs with other options.
    Interrupted
        If a signal came; every run is saved.
    """
    display, failed, done = display or Display(), 0, 0
    _check_folder(points, resume)
    works = [(point, dict(how or {})) for point in points]
    with Interruptions(at_once=True):
        try:
            with contextlib.closing(side_by_side(train_point, works, jobs)) as ended:
                for name, right, text in ended:
                    done, failed = done + right, failed + (not right)
                    line = f"[{done + failed}/{len(points)}] {name}: {text}"
                    display.show("epoch" if right else "warning", line)
        except Interrupted as error:
            told = f"{done} of {len(points)} runs are finished; go on with the same command and --resume"
            raise Interrupted(f"{error}: {told}", error.number) from None
    return failed


def _check_folder(points: Sequence[Point], resume: bool) -> None:
    """Raise `CheckpointError` or `ConfigurationError` unless the runs can be trained where they are to be."""
    folder = points[0].folder.parent
    there = [point for point in points if (point.folder / CONFIG).is_file()]
    if there and not resume:
        raise CheckpointError(f"'{folder}' holds runs of such a sweep; go on with --resume or choose another --run-dir")
    if not resume:
        check_free(folder)
    elif not folder.is_dir():
        raise CheckpointError(f"there is no sweep in '{folder}' to go on with; leave out --resume to start one")
    for point in there:
        for name in differing(point.config, RunDirectory.open(point.folder).config):
            told = f"'{point.folder}' was trained with another {option_name(name)}; choose another --run-dir"
            require(name in RESUME_OPTIONS, told)


def train_point(point: Point, how: Mapping[str, Any]) -> tuple[str, bool, str]:
    """Train one run of a sweep, or go on with it; return its name, whether it is finished, and what is to be said."""
    display = _Few(quiet=True, subject=point.name)
    with warnings.catch_warnings(), stopped_by(check_stop):
        warnings.showwarning = lambda message, *_: display.show("warning", str(message))
        check_stop()
        try:
            return point.name, True, _trained(point, display, **how)
        except Interrupted:
            raise
        except (CupyepError, MemoryError, OSError) as error:
            return point.name, False, f"failed: {error}"


class _Few(Display):
    """Leaves out what runs say of single epochs: metrics.jsonl has it, and the table at the end sums it up."""

    def show(self, event: str, text: str = "", **values: Any) -> None:
        if "signature" not in values:
            super().show(event, text, **values)


def _trained(
    point: Point, display: Display, stretch: bool = False, tensorboard: bool = False, plugin: str | None = None
) -> str:
    if plugin is not None:  # a process of its own has not imported it yet
        load_plugin(plugin)
    if not (point.folder / CONFIG).is_file():
        run = start_run(point.config, point.folder, display)
    else:
        directory = RunDirectory.open(point.folder)
        given = {name: getattr(point.config, name) for name in differing(point.config, directory.config)}
        directory.config = point.config
        if is_finished(directory):
            return f"finished before, test accuracy {measures(directory.metrics())['last_accuracy']:.2%}"
        run = resume_run(point.folder, given, display, stretch)
    if tensorboard:
        run.events = EventLog(point.folder / FOLDER, run.records)
    summary = run.run()
    assert summary is not None  # without callbacks a run ends after an epoch
    return str(dataclasses.replace(summary, path=None))


def is_finished(run: RunDirectory) -> bool:
    """Return whether a run has done all epochs, or ended early by its options, and its last checkpoint says so."""
    records, config = run.metrics(), run.config
    done, best = len(records), best_record(records)
    stale = best is not None and config.patience is not None and done - best["epoch"] >= config.patience
    found = records[-1].get("findings") or () if records else ()
    stopped = config.on_unsettled == "stop" and any(each["signature"] == "contraction" for each in found)
    try:
        return (done >= config.epochs or stale or stopped) and run.load("last").epoch >= done
    except CheckpointError:
        return False  # `resume_run` says what is wrong, or goes on from checkpoint.previous.h5
