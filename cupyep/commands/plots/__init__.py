"""The pictures of runs: `draw_runs` writes them all; one function a figure in the modules beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Run(NamedTuple):
    """What figures are made of."""

    name: str
    records: Sequence[Record]
    feedback: float
    loss: str
    directory: RunDirectory | None  # of a run that was saved

    @property
    def nodes(self) -> Any:
        """What the last epoch calls the nodes of a network that is no chain."""
        return self.records[-1].get("nodes") if self.records else None

    @property
    def files(self) -> RunDirectory:
        """The directory, for figures of what only a saved run has."""
        assert self.directory is not None  # or nobody asks for such a figure
        return self.directory


def opened(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in some directories, each by a name of its own."""
    found = zip(run_names(paths), [RunDirectory.open(path) for path in paths], strict=True)
    return [Run(name, run.metrics(), run.config.feedback, run.config.loss, run) for name, run in found]


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
    runs = opened(paths)
    out = out or (paths[0] / "plots" if len(paths) == 1 else Path("plots"))
    out.mkdir(parents=True, exist_ok=True)
    yield from map(str, save(learning_of_runs(runs), out / "learning", formats))
    for run in runs:
        prefix = "" if len(runs) == 1 else f"{run.name}-"
        for kind, made in _figures(run, given or {}, display or Display()):
            if isinstance(made, str):
                yield f"{run.name}: no picture of {kind}: {made}"
            else:
                yield from map(str, save(made, out / f"{prefix}{kind}", formats))


def learning_of(paths: Sequence[Path]) -> Any:
    """Return the figure of loss and accuracy of the runs in some directories."""
    return learning_of_runs(opened(paths))


def learning_of_runs(runs: Sequence[Run]) -> Any:
    """Return the figure of loss and accuracy of some runs, whose names differ."""
    return curves.learning({run.name: run.records for run in runs}, [run.loss for run in runs])


def _figures(run: Run, given: Mapping[str, Any], display: Display) -> Iterator[tuple[str, Any]]:
    """Yield (kind, figure, or why there is none) of one run."""
    yield "overview", overview_of(run)
    for kind in MAPS:
        yield kind, map_of(kind, run)
    yield "settling", settling_of(run)
    yield "filters", filters_of(run)
    yield "filters_by_epoch", filters_by_epoch_of(run)
    yield "confusion", confusion_figure(run, given, display)


def overview_of(run: Run) -> Any:
    """Return the overview of a run, or why there is none."""
    return overview(run.name, run.records, run.feedback) if run.records else NO_EPOCH


def settling_of(run: Run) -> Any:
    """Return the figure of how the phases of the last epoch settled, or why there is none."""
    trace = run.files.settling()
    if not (trace and "free" in trace):
        return "no phases are recorded"
    return curves.settling(trace, f"{run.name}: settling of {trace['images']} training images, epoch {trace['epoch']}")


def filters_of(run: Run) -> Any:
    """Return the figure of the first layer's filters in the best epoch, or why there is none."""
    try:
        saved = run.files.load("best" if (run.files.path / BEST).exists() else "last")
    except CheckpointError as error:
        return str(error)
    weight = first_filters(saved, run.nodes)
    return NO_FILTERS if weight is None else maps.filters(weight, f"{run.name}: {FIRST}, epoch {saved.epoch}")


def filters_by_epoch_of(run: Run) -> Any:
    """Return the figure of the first layer's filters at the epochs that a run keeps, or why there is none."""
    try:
        saved = run.files.load("last")
        kept = saved_filters(saved)
    except (CheckpointError, ValueError) as error:
        return str(error)
    weight = first_filters(saved, run.nodes)
    if weight is None:
        return NO_FILTERS
    shown = {epoch: kept[epoch] for epoch in sorted(kept) if kept[epoch].shape == weight.shape}
    if not saved.batch:
        shown[saved.epoch] = weight
    return maps.filters_by_epoch(shown, f"{run.name}: {FIRST} over the epochs") if shown else NO_EPOCH


def confusion_figure(run: Run, given: Mapping[str, Any], display: Display) -> Any:
    """Return the figure of which class the best epoch takes for which, or why there is none."""
    if not (run.files.path / BEST).exists():
        return NO_EPOCH
    try:
        matrix, classes = confusion_of(run.files, given, display)
    except CupyepError as error:
        return str(error)
    share, epoch = np.trace(matrix) / matrix.sum(), run.files.load("best").epoch
    title = f"{run.name}: {matrix.sum()} test images, epoch {epoch}, {share:.1%} right"
    return maps.confusion(matrix, classes, title)


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


def map_of(kind: str, run: Run) -> Any:
    """Return a figure of `MAPS`, values a layer over the epochs, or why there is none."""
    (keys, label, title, log), records = MAPS[kind], run.records
    panels = {panel: key for panel, key in keys.items() if records and records[-1].get(key)}
    if not panels:
        return "nothing is recorded" if records else NO_EPOCH
    shown = [record for record in records if all(record.get(key) for key in panels.values())]
    values = {panel: (1 if log else 100) * layer_course(shown, key) for panel, key in panels.items()}
    if kind == "response":
        values[""] = scaled_responses(shown, run.feedback)
        label = label if run.feedback == 1 else rf"$a_n\,$ {label}"
    readout = kind == "gradient" and len(shown[-1]["gradient_norm"]) > len(shown[-1]["activity"])
    epochs = [record["epoch"] for record in shown]
    return maps.over_epochs(values, epochs, label, f"{run.name}: {title}", log, readout, list(run.nodes or ()))
