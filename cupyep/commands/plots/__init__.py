"""The pictures of runs: `draw_runs` writes them all; one function a figure in the modules beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.commands.confusion import confusion_of
from cupyep.commands.plots import curves, maps
from cupyep.commands.plots.style import matplotlib_figure, save
from cupyep.diagnostics.rules import LIMITS
from cupyep.errors import CheckpointError, CupyepError
from cupyep.graph import node_weights
from cupyep.training.display import Display
from cupyep.training.run_directory import BEST, RunDirectory

Record = dict[str, Any]
DISTANCE = "left to go, of the layer's size"


def draw_runs(
    paths: Sequence[Path],
    out: Path | None = None,
    formats: Sequence[str] = ("png",),
    given: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Iterator[str]:
    """Draw runs, finished or not, and yield a line for every figure: where it is, or why there is none.

    Parameters
    ----------
    paths : sequence of Path
        Run directories. Loss and accuracy of all go into one figure; of the others every run has its own.
    out : Path, optional
        Folder for the figures, made if missing; ``plots`` in the run directory of one run, ``plots`` here for several.
    formats : sequence of {"png", "svg"}
    given : mapping, optional
        Options for the confusion matrix, which settles the test images: ``data_dir``, ``batch_size``, ``device``.
    display : Display, optional

    Raises
    ------
    ConfigurationError
        If matplotlib is missing.
    CheckpointError
        If there is no run at a path or its records are damaged.
    """
    matplotlib_figure()
    runs = {name: RunDirectory.open(path) for name, path in zip(_names(paths), paths, strict=True)}
    records = {name: run.metrics() for name, run in runs.items()}
    out = out or (paths[0] / "plots" if len(paths) == 1 else Path("plots"))
    out.mkdir(parents=True, exist_ok=True)
    figure = curves.learning(records, [run.config.loss for run in runs.values()])
    yield from map(str, save(figure, out / "learning", formats))
    for name, run in runs.items():
        prefix = "" if len(runs) == 1 else f"{name}-"
        for kind, made in _figures(name, run, records[name], given or {}, display or Display()):
            if isinstance(made, str):
                yield f"{name}: no picture of {kind}: {made}"
            else:
                yield from map(str, save(made, out / f"{prefix}{kind}", formats))


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a short name a run, different ones for different paths."""
    names = [path.resolve().name for path in paths]
    longer = [f"{path.resolve().parent.name}-{path.resolve().name}" for path in paths]
    names = [longer[k] if names.count(name) > 1 else name for k, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name}-{k + 1}" for k, name in enumerate(names)]


def _figures(
    name: str, run: RunDirectory, records: list[Record], given: Mapping[str, Any], display: Display
) -> Iterator[tuple[str, Any]]:
    """Yield (kind, figure, or why there is none) of one run."""
    yield from _maps(name, run, records)
    trace = run.settling()
    if trace and "free" in trace:
        title = f"{name}: settling of {trace['images']} training images, epoch {trace['epoch']}"
        yield "settling", curves.settling(trace, title)
    else:
        yield "settling", "no phases are recorded"
    try:
        which = "best" if (run.path / BEST).exists() else "last"
        saved = run.load(which)
    except CheckpointError as error:
        yield "filters", str(error)
        yield "confusion", str(error)
        return
    first = next(iter(records[-1].get("nodes", ())), "1") if records else "1"
    weight = saved.weights().get(f"layers.{first}.weight")
    title = f"{name}: filters of the first layer, epoch {saved.epoch}"
    yield "filters", maps.filters(weight, title) if np.ndim(weight) == 4 else "the first layer is not a convolution"
    if which == "last":
        yield "confusion", "no epoch is done yet"
        return
    try:
        matrix, classes = confusion_of(run, given, display)
    except CupyepError as error:
        yield "confusion", str(error)
    else:
        title = f"{name}: {matrix.sum()} test images, epoch {saved.epoch}, {np.trace(matrix) / matrix.sum():.1%} right"
        yield "confusion", maps.confusion(matrix, classes, title)


def _limited(phase: str) -> str:
    """Return the title of a panel that says which distances are too far."""
    return f"{phase} phase (too far: above {LIMITS[f'{phase} distance'].value:g})"


def _maps(name: str, run: RunDirectory, records: list[Record]) -> Iterator[tuple[str, Any]]:
    """Yield the maps of values a layer over the epochs."""
    feedback, nodes = run.config.feedback, records[-1].get("nodes") if records else None
    scale = "" if feedback == 1 else r"$a_n\,$"
    wanted = {
        "response": ({"": "nudge_response"}, f"{scale}mean $|s_+-s_-|$", "response of the layers to the nudge", True),
        "gradient": ({"": "gradient_norm"}, "norm of the gradient", "gradient of the layers", True),
        "distance": ({_limited(phase): f"{phase}_distance" for phase in ("free", "nudged")}, DISTANCE,
                     "how far from rest the phases end", False),
        "units": ({"saturated": "saturated", "in dead channels": "dead"}, "fraction of the units",
                  "units that do not respond", False),
    }  # fmt: skip
    for kind, (keys, label, title, log) in wanted.items():
        panels = {panel: key for panel, key in keys.items() if records and records[-1].get(key)}
        if not panels:
            yield kind, "nothing is recorded" if records else "no epoch is done yet"
            continue
        shown = [record for record in records if all(record.get(key) for key in panels.values())]
        values = {panel: np.array([record[key] for record in shown], float) for panel, key in panels.items()}
        if kind == "response":
            depths = [*nodes.values()] if nodes else range(1, values[""].shape[1] + 1)
            values[""] *= np.array([node_weights(depths, record.get("feedback", feedback)) for record in shown])
        readout = kind == "gradient" and len(shown[-1][kind + "_norm"]) > len(shown[-1]["activity"])
        epochs = [record["epoch"] for record in shown]
        yield kind, maps.over_epochs(values, epochs, label, f"{name}: {title}", log, readout, list(nodes or ()))
