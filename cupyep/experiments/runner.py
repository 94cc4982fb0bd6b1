"""Runs the cells of an experiment, one after the other or side by side, and keeps each as soon as it is measured.

A report folder holds ``results.json`` with every measured cell and ``work/ROW-seedK`` (run directories, probes) for
those that go on later. Whoever runs the same command again measures what is missing, ``work`` kept or not.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cupyep.commands.system import system_report
from cupyep.errors import CheckpointError, DivergenceError, Interrupted, OutOfTime, choose, reporting, require
from cupyep.experiments.design import WORK, Cell, Experiment, Results, cell_name
from cupyep.experiments.processes import check_stop, side_by_side
from cupyep.files import FolderLock, is_leftover, read_json, write_json
from cupyep.training.config import MACHINE
from cupyep.training.interruption import Interruptions

RESULTS = "results.json"
JSON_BYTES = 1 << 28  # at most


def reproduce(
    experiment: Experiment,
    out: str | Path,
    scale: str = "small",
    seeds: int | None = None,
    max_minutes: float | None = None,
    overrides: dict[str, Any] | None = None,
    command: str = "",
    quiet: bool = False,
    report: Callable[[str], None] = print,
    jobs: int = 1,
    defaults: dict[str, Any] | None = None,
    rows: Sequence[str] = (),
) -> Results:
    """Measure every cell that the report folder `out` lacks and write its results.json.

    Parameters
    ----------
    experiment : Experiment
    out : path
        Report folder; one that another experiment, scale or option has written is refused.
    scale : {"small", "medium", "full"}
        One that the experiment has.
    seeds : int, optional
        Seeds 0 .. seeds - 1.
    max_minutes : float, optional
        Start nothing new after that; a training stops after the batch under way. What is done is kept.
    overrides : dict, optional
        Options for all rows: device, data folder.
    command : str
        What repeats this, for the report.
    jobs : int
        Cells measured at the same time, each in a process of its own with one BLAS thread; for experiments that
        `find` knows. Narrow networks leave a second core idle.
    defaults : dict, optional
        Options for the rows that do not name them: precision.
    rows : sequence of str
        Keys of the rows to measure now, in this order, the others are left for later; none named, all.

    Returns
    -------
    Results
        Incomplete where the minutes or the rows named did not suffice.

    Raises
    ------
    Interrupted
        If a signal came; results.json holds what is measured, and the cells under way are saved.
    CupyepError
        One clear line for whatever stands in the way.
    """
    require(jobs >= 1, f"--jobs must be at least 1 (got {jobs})")
    finite = max_minutes is None or math.isfinite(max_minutes)
    require(finite, f"--max-minutes must be a finite number (got {max_minutes}); leave it out for no end")
    folder, header = Path(out), {"experiment": experiment.name, "scale": scale}
    end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    cells = cells_of(experiment, folder, scale, seeds, overrides, defaults, report, quiet, partial(_in_time, end))
    plan, count = experiment.at(scale), cells[-1].seed + 1
    keys = [row.key for row in plan.rows]
    now = [choose("row", key, keys) for key in rows] or keys
    about = {**header, **_circumstances(command, cells[0].options.get("device", "auto"), jobs), "seeds": count}
    with _claimed(folder, header, count) as held, Interruptions(at_once=True):
        measured = kept(cells)
        left = [cell for cell in cells if cell.name not in measured and cell.row.key in now]
        left.sort(key=lambda cell: (cell.seed, now.index(cell.row.key)))
        told = [(experiment, cell) if jobs == 1 else
                (experiment.name, replace(cell, report=partial(_print, cell.place))) for cell in left]  # fmt: skip
        try:
            write_json(folder / RESULTS, {**about, "cells": held}, indent=1)
            with contextlib.closing(side_by_side(_measured, told, jobs)) as new:
                for name, content in filter(None, new):
                    held[name] = measured[name] = content
                    write_json(folder / RESULTS, {**about, "cells": held}, indent=1)
        except Interrupted as error:
            done = f"{len(measured)} of {len(cells)} cells are measured; the same command goes on"
            raise Interrupted(f"{error}: {done}", error.number) from None
    if any(cell.name not in measured for cell in left):
        report(f"{max_minutes:g} minutes are used up: {len(measured)} of {len(cells)} cells are measured")
    return Results(plan.rows, measured, count)


def cells_of(
    experiment: Experiment,
    out: Path,
    scale: str,
    seeds: int | None = None,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    report: Callable[[str], None] = print,
    quiet: bool = False,
    deadline: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """Return the cells of a report folder, all rows of a seed first: a first answer comes early; see `reproduce`."""
    plan, before, after = experiment.at(scale), defaults or {}, overrides or {}
    count = plan.seeds if seeds is None else seeds
    require(count >= 1, f"--seeds must be at least 1 (got {count})")
    return [
        Cell(row, seed, {**before, **row.options, "seed": seed, **after}, out, report, quiet, deadline)
        for seed in range(count)
        for row in plan.rows
    ]


def _in_time(end: float) -> None:
    check_stop()
    if time.monotonic() > end:
        raise OutOfTime


def _print(place: str, text: str) -> None:
    print(f"[{place}] {text}", flush=True)


def load_results(experiment: Experiment, out: str | Path) -> tuple[Results, dict[str, Any]]:
    """Return the results in a report folder, and all that results.json says besides.

    Raises
    ------
    CheckpointError
        If there are none, or they are damaged, or of another experiment.
    """
    path = Path(out) / RESULTS
    told = f"'{out}' holds no report: it has no {RESULTS}; leave out --report-only to measure first"
    _check(path.is_file(), told)
    content = _read_json(path)
    held = content.get("experiment")
    _check(held == experiment.name, f"'{path}' is of experiment '{held}', not '{experiment.name}'")
    scale, seeds, measured = content.get("scale", ""), content.get("seeds", ""), _cells(path, content)
    content.pop("cells")
    _check(scale in list(experiment.scales), f"'{path}' is damaged (no scale of '{held}'); give another --output")
    _check(type(seeds) is int, f"'{path}' is damaged (no seeds); leave out --report-only, and it is written anew")
    _check(seeds > 0, f"'{path}': nothing has been measured yet; leave out --report-only to measure")
    rows = experiment.at(scale).rows
    known = {cell_name(row.key, seed) for row in rows for seed in range(seeds)}
    return Results(rows, {name: cell for name, cell in measured.items() if name in known}, seeds), content


@contextlib.contextmanager
def _claimed(folder: Path, header: dict[str, Any], seeds: int) -> Iterator[dict[str, Any]]:
    """Keep other processes from measuring in the report folder, which is made, or checked to be of `header`.

    What it holds of cells, those of more seeds among them, is given.
    """
    path = folder / RESULTS
    if path.is_file():
        held = {name: _read_json(path).get(name) for name in header}
        told = f"'{folder}' holds experiment '{held['experiment']}' at scale '{held['scale']}'; give another --output"
        _check(held == header, told)
    else:
        ours = not folder.is_dir() or all(entry.name == WORK or is_leftover(entry) for entry in folder.iterdir())
        _check(ours, f"'{folder}' holds other files; give another --output")
        with reporting(CheckpointError, f"cannot write report folder '{folder}'"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**header, "seeds": seeds, "cells": {}}, indent=1)
    lock = FolderLock(folder)
    holder = lock.acquire()
    _check(not holder, f"'{folder}' is in use by {holder}; wait for it or give another --output")
    try:
        yield _cells(path, _read_json(path))
    finally:
        lock.release()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def kept(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return by name what earlier runs have measured of `cells`, which are of one report folder.

    `CheckpointError` if it was with other options.
    """
    path = cells[0].out / RESULTS
    held = _cells(path, _read_json(path)) if path.is_file() else {}
    for cell in cells:
        same = cell.name not in held or held[cell.name].get("options") == _options(cell)
        told = "was measured with other options; remove that entry, or give another --output"
        _check(same, f"'{path}': '{cell.name}' {told}")
    return {cell.name: held[cell.name] for cell in cells if cell.name in held}


def _cells(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cells in the content of the results.json at `path`."""
    cells = content.get("cells", "")
    whole = isinstance(cells, dict) and all(isinstance(cell, dict) and "minutes" in cell for cell in cells.values())
    _check(whole, f"'{path}' is damaged (no cells, or one without minutes); remove it to measure anew")
    return cells


def _options(cell: Cell) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in cell.options.items() if k not in MACHINE}))


def _measured(experiment: Experiment | str, cell: Cell) -> tuple[str, dict[str, Any]] | None:
    """Return the name of a cell and what it measures, or how it failed; None where the time is up.

    Another process knows experiments by their names.
    """
    if isinstance(experiment, str):
        from cupyep.experiments import find

        experiment = find(experiment)
    begin = time.monotonic()
    try:
        cell.deadline()
        cell.report(f"== {experiment.name}: {cell.row.label}, seed {cell.seed}")
        content = experiment.measure(cell)
    except DivergenceError as error:  # that a setting fails is a result
        content = {"failed": str(error)}
    except OutOfTime:
        return None
    content = {"options": _options(cell), "date": _today(), **content}
    content.setdefault("minutes", (time.monotonic() - begin) / 60)
    return cell.name, content


def _circumstances(command: str, device: str, jobs: int) -> dict[str, Any]:
    """Return what the figures depend on besides the options."""
    system = dict(system_report(name=device))
    system["device"] = system[f"device {device}"]
    if jobs > 1:
        system["threads"] = f"one thread each, {jobs} at a time"
    names = ("cupyep", "python", "device", "gpu", "numpy", "blas", "threads")
    return {"command": command, "date": _today(), "system": {name: system[name] for name in names}}


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged ({error}); remove it to measure anew") from error
    _check(isinstance(content, dict), f"'{path}' is damaged (no JSON object); remove it to measure anew")
    return content
