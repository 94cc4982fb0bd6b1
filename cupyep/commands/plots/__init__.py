"""The pictures of runs: `draw_runs` writes them all; one function a figure in the modules beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.commands.compare import run_names
from cupyep.commands.confusion import confusion_of
from cupyep.commands.plots import curves, maps
from cupyep.commands.plots.overview import layer_course, overview, scaled_responses
from cupyep.commands.plots.style import matplotlib_figure, save
from cupyep.diagnostics.rules import LIMITS
from cupyep.errors import CheckpointError, CupyepError
from cupyep.training.display import Display
from cupyep.training.run_directory import BEST, RunDirectory
from cupyep.training.snapshot import first_filters, saved_filters

Record = dict[str, Any]
NO_EPOCH = "no epoch is done yet"
NO_FILTERS = "the first layer is not a convolution"
FIRST = "filters of the first layer"


def draw_runs(
    paths: Sequence[Path],
    out: Path | None = None,
    formats: Sequence[str] = ("png",),
    given: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Iterator[str]:
    """Draw runs, finished or not, and yield a line for every figure: where it is, or why there is none.

    Loss and accuracy of all run directories `paths` go into one figure; of the others every run has its own. They lie
    in the folder `out`, made if missing; by default ``plots`` in the run directory of one run, ``plots`` here for
    several. `formats` are "png", "svg". Options `given` are for the confusion matrix, which settles the test images:
    ``data_dir``, ``batch_size``, ``device``.

    `ConfigurationError` if matplotlib is missing, `CheckpointError` if there is no run at a path or its records are
    damaged.
    """
    matplotlib_figure()
    runs, records = _opened(paths)
    out = out or (paths[0] / "plots" if len(paths) == 1 else Path("plots"))
    out.mkdir(parents=True, exist_ok=True)
    yield from map(str, save(_learning(runs, records), out / "learning", formats))
    for name, run in runs.items():
        prefix = "" if len(runs) == 1 else f"{name}-"
        for kind, made in _figures(name, run, records[name], given or {}, display or Display()):
            if isinstance(made, str):
                yield f"{name}: no picture of {kind}: {made}"
            else:
                yield from map(str, save(made, out / f"{prefix}{kind}", formats))


def learning_of(paths: Sequence[Path]) -> Any:
    """Return the figure of loss and accuracy of the runs in some directories."""
    return _learning(*_opened(paths))


def _opened(paths: Sequence[Path]) -> tuple[dict[str, RunDirectory], dict[str, list[Record]]]:
    """Return the runs in some directories and their records, by their names in figures."""
    runs = {name: RunDirectory.open(path) for name, path in zip(run_names(paths), paths, strict=True)}
    return runs, {name: run.metrics() for name, run in runs.items()}


def _learning(runs: Mapping[str, RunDirectory], records: Mapping[str, list[Record]]) -> Any:
    return curves.learning(records, [run.config.loss for run in runs.values()])


def _figures(
    name: str, run: RunDirectory, records: list[Record], given: Mapping[str, Any], display: Display
) -> Iterator[tuple[str, Any]]:
    """Yield (kind, figure, or why there is none) of one run."""
    yield "overview", overview_of(name, records, run.config.feedback)
    for kind in MAPS:
        yield kind, map_of(kind, name, records, run.config.feedback)
    yield "settling", settling_of(name, run)
    yield "filters", filters_of(name, run, records)
    yield "filters_by_epoch", filters_by_epoch_of(name, run, records)
    yield "confusion", confusion_figure(name, run, given, display)


def overview_of(name: str, records: Sequence[Record], feedback: float) -> Any:
    """Return the overview of a run, or why there is none."""
    return overview(name, records, feedback) if records else NO_EPOCH


def settling_of(name: str, run: RunDirectory) -> Any:
    """Return the figure of how the phases of the last epoch settled, or why there is none."""
    trace = run.settling()
    if not (trace and "free" in trace):
        return "no phases are recorded"
    return curves.settling(trace, f"{name}: settling of {trace['images']} training images, epoch {trace['epoch']}")


def filters_of(name: str, run: RunDirectory, records: Sequence[Record]) -> Any:
    """Return the figure of the first layer's filters in the best epoch, or why there is none."""
    try:
        saved = run.load("best" if (run.path / BEST).exists() else "last")
    except CheckpointError as error:
        return str(error)
    weight = first_filters(saved, records[-1].get("nodes") if records else None)
    return NO_FILTERS if weight is None else maps.filters(weight, f"{name}: {FIRST}, epoch {saved.epoch}")


def filters_by_epoch_of(name: str, run: RunDirectory, records: Sequence[Record]) -> Any:
    """Return the figure of the first layer's filters at the epochs that a run keeps, or why there is none."""
    try:
        saved = run.load("last")
        kept = saved_filters(saved)
    except (CheckpointError, ValueError) as error:
        return str(error)
    weight = first_filters(saved, records[-1].get("nodes") if records else None)
    if weight is None:
        return NO_FILTERS
    shown = {epoch: kept[epoch] for epoch in sorted(kept) if kept[epoch].shape == weight.shape}
    if not saved.batch:
        shown[saved.epoch] = weight
    return maps.filters_by_epoch(shown, f"{name}: {FIRST} over the epochs") if shown else NO_EPOCH


def confusion_figure(name: str, run: RunDirectory, given: Mapping[str, Any], display: Display) -> Any:
    """Return the figure of which class the best epoch takes for which, or why there is none."""
    if not (run.path / BEST).exists():
        return NO_EPOCH
    try:
        matrix, classes = confusion_of(run, given, display)
    except CupyepError as error:
        return str(error)
    share = np.trace(matrix) / matrix.sum()
    return maps.confusion(
        matrix, classes, f"{name}: {matrix.sum()} test images, epoch {run.load('best').epoch}, {share:.1%} right"
    )


def _limited(phase: str) -> str:
    """Return the title of a panel that says which distances are too far."""
    return f"{phase} phase (too far: above {LIMITS[f'{phase} distance'].value:.0%})"


#: Kind of a map -> its panels (title -> what a record calls it), label with unit, title, whether it is logarithmic.
MAPS = {
    "response": ({"": "nudge_response"}, "mean $|s_+-s_-|$", "response of the layers to the nudge", True),
    "gradient": ({"": "gradient_norm"}, "norm of the gradient", "gradient of the layers", True),
    "distance": ({_limited(phase): f"{phase}_distance" for phase in ("free", "nudged")},
                 "left to go, % of the layer's size", "how far from rest the phases end", False),
    "units": ({"saturated": "saturated", "in dead channels": "dead"}, "% of the units",
              "units that do not respond", False),
}  # fmt: skip


def map_of(kind: str, name: str, records: Sequence[Record], feedback: float) -> Any:
    """Return a figure of `MAPS`, values a layer over the epochs, or why there is none."""
    keys, label, title, log = MAPS[kind]
    nodes = records[-1].get("nodes") if records else None
    panels = {panel: key for panel, key in keys.items() if records and records[-1].get(key)}
    if not panels:
        return "nothing is recorded" if records else NO_EPOCH
    shown = [record for record in records if all(record.get(key) for key in panels.values())]
    values = {panel: (1 if log else 100) * layer_course(shown, key) for panel, key in panels.items()}
    if kind == "response":
        values[""] = scaled_responses(shown, feedback)
        label = label if feedback == 1 else rf"$a_n\,$ {label}"
    readout = kind == "gradient" and len(shown[-1]["gradient_norm"]) > len(shown[-1]["activity"])
    epochs = [record["epoch"] for record in shown]
    return maps.over_epochs(values, epochs, label, f"{name}: {title}", log, readout, list(nodes or ()))
