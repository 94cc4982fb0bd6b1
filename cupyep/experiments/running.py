"""Runs the cells of an experiment, one after the other, and keeps each as soon as it is measured.

A report folder holds ``cells/ROW-seedK.json`` for every measured cell and ``work/ROW-seedK`` (run directories, probes)
for those that go on later. Whoever runs the same command again measures what is missing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cupyep.errors import CheckpointError, DivergenceError, require
from cupyep.experiments.design import SCALES, Cell, Experiment, OutOfTime, Results, cell_name
from cupyep.files import replacing
from cupyep.training.system import THREAD_VARIABLES, system_report

CELLS, RESULTS = "cells", "results.json"


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
) -> Results:
    """Measure every cell that the report folder `out` lacks and write its results.json.

    Parameters
    ----------
    experiment : Experiment
    out : path
        Report folder; one that another experiment, scale or option has written is refused.
    scale : {"small", "full"}
    seeds : int, optional
        Seeds 0 .. seeds - 1.
    max_minutes : float, optional
        Start nothing new after that; long trainings stop after an epoch. What is done is kept.
    overrides : dict, optional
        Options for all rows: device, data folder.
    command : str
        What repeats this, for the report.
    jobs : int
        Cells measured at the same time, each in a process of its own with one BLAS thread; for experiments that
        `find` knows. Narrow networks leave a second core idle.
    defaults : dict, optional
        Options for the rows that do not name them: precision.

    Returns
    -------
    Results
        Incomplete where the minutes did not suffice.

    Raises
    ------
    CupyepError
        One clear line for whatever stands in the way.
    """
    require(scale in SCALES, f"scale must be one of {', '.join(SCALES)} (got '{scale}')")
    count = experiment.seeds[scale] if seeds is None else seeds
    require(count >= 1, f"--seeds must be at least 1 (got {count})")
    require(jobs >= 1, f"--jobs must be at least 1 (got {jobs})")
    folder, rows = Path(out), experiment.rows[scale]
    header = {"experiment": experiment.name, "scale": scale}
    _claim(folder, header)
    end = math.inf if max_minutes is None else time.time() + 60 * max_minutes
    cells = [  # all rows of a seed first: a first answer comes early
        Cell(
            row,
            seed,
            {**(defaults or {}), **experiment.base[scale], **row.options, "seed": seed, **(overrides or {})},
            folder,
            report,
            quiet,
            partial(_check_time, end),
        )
        for seed in range(count)
        for row in rows
    ]
    measured = _in_turn(experiment, cells) if jobs == 1 else _side_by_side(experiment, scale, cells, end, jobs)
    if len(measured) < len(cells):
        report(f"{max_minutes:g} minutes are used up: {len(measured)} of {len(cells)} cells are measured")
    results = Results(rows, measured, count)
    _write_json(folder / RESULTS, {**header, **_circumstances(command), "seeds": count, "cells": measured})
    return results


def _check_time(end: float) -> None:
    if time.time() > end:
        raise OutOfTime


def _in_turn(experiment: Experiment, cells: Sequence[Cell]) -> dict[str, Any]:
    """Measure `cells` until all are done or the time is up; return what was measured."""
    measured = {}
    for cell in cells:
        try:
            measured[cell.name] = _measured(experiment, cell)
        except OutOfTime:  # cells measured earlier cost none
            continue
    return measured


def _side_by_side(experiment: Experiment, scale: str, cells: Sequence[Cell], end: float, jobs: int) -> dict[str, Any]:
    """As `_in_turn`, in `jobs` processes."""
    context = multiprocessing.get_context("spawn")
    ends = {"initializer": end_with, "initargs": (os.getpid(),)}
    with _one_thread_each(), ProcessPoolExecutor(jobs, mp_context=context, **ends) as pool:
        waiting = {
            cell.name: pool.submit(
                _measure_alone, experiment.name, scale, cell.row.key, cell.seed, cell.options, cell.out, cell.quiet, end
            )
            for cell in cells
        }
        try:
            found = {name: future.result() for name, future in waiting.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: content for name, content in found.items() if content is not None}


def end_with(parent: int) -> None:
    """Let this process end within a second of the process `parent`, which, when killed, cannot tell it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure_alone(
    name: str, scale: str, key: str, seed: int, options: dict[str, Any], out: Path, quiet: bool, end: float
) -> dict[str, Any] | None:
    """Measure one cell in this process; None where the time is up. Its lines name it."""
    from cupyep.experiments import find

    experiment = find(name)
    row = next(row for row in experiment.rows[scale] if row.key == key)

    def report(text: str) -> None:
        print(f"[{key}-seed{seed}] {text}", flush=True)

    cell = Cell(row, seed, options, out, report, quiet, partial(_check_time, end))
    return _in_turn(experiment, [cell]).get(cell.name)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that start now use one thread for matrix products."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def load_results(experiment: Experiment, out: str | Path) -> tuple[Results, dict[str, Any]]:
    """Return the results in a report folder, and all that results.json says besides.

    Raises
    ------
    CheckpointError
        If there are none, or they are of another experiment.
    """
    path = Path(out) / RESULTS
    if not path.is_file():
        raise CheckpointError(f"'{out}' holds no report: it has no {RESULTS}; leave out --report-only to measure first")
    content = _read_json(path)
    if content.get("experiment") != experiment.name:
        raise CheckpointError(f"'{path}' is of experiment '{content.get('experiment')}', not '{experiment.name}'")
    rows = experiment.rows[content["scale"]]
    known = {cell_name(row.key, seed) for row in rows for seed in range(content["seeds"])}
    cells = {name: cell for name, cell in content.pop("cells").items() if name in known}
    return Results(rows, cells, content["seeds"]), content


def _claim(folder: Path, header: dict[str, Any]) -> None:
    """Make the report folder, or check that it is of the same experiment and scale."""
    path = folder / RESULTS
    if path.is_file():
        held = {name: _read_json(path).get(name) for name in header}
        if held != header:
            raise CheckpointError(
                f"'{folder}' holds experiment '{held['experiment']}' at scale '{held['scale']}'; give another --out"
            )
        return
    if folder.is_dir() and not {entry.name for entry in folder.iterdir()} <= {CELLS}:
        raise CheckpointError(f"'{folder}' holds other files; give another --out")
    try:
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write report folder '{folder}': {error.strerror}") from error
    _write_json(path, {**header, "seeds": 0, "cells": {}})


def _measured(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Return what the cell measured, from an earlier run with the same options if there is one."""
    path = cell.out / CELLS / f"{cell.place}.json"
    options = json.loads(json.dumps({k: v for k, v in cell.options.items() if k not in ("device", "data_dir")}))
    if path.is_file():
        kept = _read_json(path)
        if kept["options"] == options:
            return kept
        raise CheckpointError(f"'{path}' was measured with other options; remove it or give another --out")
    cell.deadline()
    cell.report(f"== {experiment.name}: {cell.row.label}, seed {cell.seed}")
    begin = time.monotonic()
    try:
        content = experiment.measure(cell)
    except DivergenceError as error:  # that a setting fails is a result
        content = {"failed": str(error)}
    content = {"options": options, **content}
    content.setdefault("minutes", (time.monotonic() - begin) / 60)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, content)
    return content


def _circumstances(command: str) -> dict[str, Any]:
    """Return what the figures depend on besides the options."""
    system = dict(system_report())
    names = ("cupyep", "python", "device auto", "gpu", "numpy", "blas", "threads")
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"command": command, "date": now.date().isoformat(), "system": {name: system[name] for name in names}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged ({error}); remove it to measure anew") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is damaged (no JSON object); remove it to measure anew")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
