"""Figures of runs for notebooks and papers, as matplotlib's: ``ep.plots.overview("runs/mine")``.

Every function takes a run directory, or what has a run's records: a `Trainer`, a result of `fit`. Needs the extra plot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cupyep.commands import plots as drawing
from cupyep.commands.compare import run_names
from cupyep.errors import ConfigurationError, require, wrong
from cupyep.errors import path as checked_path
from cupyep.training.display import Display

__all__ = [
    "confusion",
    "distance",
    "filters",
    "filters_by_epoch",
    "gradient",
    "learning",
    "overview",
    "response",
    "settling",
    "units",
]


def overview(run: Any) -> Any:
    """Return the figure of a run in one: loss, accuracy, residuals, responses, and whether it settles.

    Parameters
    ----------
    run : path, Trainer or FitResult
        As in all functions here.

    Raises
    ------
    ConfigurationError
        As in all functions here: if matplotlib or what is to be shown is missing.
    CheckpointError
        If there is no run at a path, or its files are damaged.
    """
    return _figure("overview", drawing.overview_of(_of(run)))


def learning(*runs: Any) -> Any:
    """Return the figure of loss and accuracy over the epochs, of the first eight of some runs."""
    require(len(runs) > 0, "learning needs a run at least")
    known = [_of(run) for run in runs]
    paths = [Path(run.name) if run.directory is None else run.directory.path for run in known]
    named = zip(known, run_names(paths), strict=True)
    return drawing.learning_of_runs([run._replace(name=name) for run, name in named])


def response(run: Any) -> Any:
    """Return the figure of the scaled response of each layer to the nudge, over the epochs."""
    return _map("response", run)


def gradient(run: Any) -> Any:
    """Return the figure of the norm of each layer's gradient, over the epochs."""
    return _map("gradient", run)


def distance(run: Any) -> Any:
    """Return the figure of how far from rest each layer ends, over the epochs."""
    return _map("distance", run)


def units(run: Any) -> Any:
    """Return the figure of saturated units and units of dead channels, over the epochs."""
    return _map("units", run)


def settling(run: Any) -> Any:
    """Return the figure of the residuals of the last epoch's phases, step by step; of a run directory."""
    return _figure("settling", drawing.settling_of(_saved("settling", run)))


def filters(run: Any) -> Any:
    """Return the figure of the first layer's filters in the best epoch; of a run directory."""
    return _figure("filters", drawing.filters_of(_saved("filters", run)))


def filters_by_epoch(run: Any) -> Any:
    """Return the figure of the first layer's filters at some epochs, a row each; of a run directory."""
    return _figure("filters_by_epoch", drawing.filters_by_epoch_of(_saved("filters_by_epoch", run)))


def confusion(run: Any, **given: Any) -> Any:
    """Return the figure of which class is taken for which; of a run directory.

    The test images are settled once, with the options `given` in place of the run's: ``data_dir``, ``batch_size``,
    ``device``.
    """
    made = drawing.confusion_figure(_saved("confusion", run), given, Display(quiet=True))
    return _figure("confusion", made)


def _map(kind: str, run: Any) -> Any:
    return _figure(kind, drawing.map_of(kind, _of(run)))


def _figure(kind: str, made: Any) -> Any:
    if isinstance(made, str):
        raise ConfigurationError(f"no picture of {kind}: {made}")
    return made


def _saved(kind: str, run: Any) -> drawing.Run:
    known = _of(run)
    require(known.directory is not None, f"no picture of {kind}: it needs a run directory")
    return known


def _of(run: Any) -> drawing.Run:
    records = getattr(run, "history", getattr(run, "records", None))
    if records is None:
        if not isinstance(run, (str, Path)):
            raise wrong("run", "a run directory, or a result with records", run)
        return drawing.opened([checked_path("run", run)])[0]
    directory = getattr(run, "directory", None)
    name = "run" if directory is None else directory.path.resolve().name
    return drawing.Run(name, records, run.network.feedback, run.network.readout.criterion.name, directory)
