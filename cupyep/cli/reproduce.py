"""`cupyep reproduce`: an experiment from its settings to its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from cupyep.backend.threads import set_threads
from cupyep.cli.shared import choice, config_options
from cupyep.cli.types import FilePath, Names
from cupyep.commands.plots.style import matplotlib_figure
from cupyep.errors import ConfigurationError, Interrupted, require
from cupyep.experiments import EXPERIMENTS, SCALES, Experiment, find, load_results, write_report
from cupyep.experiments import reproduce as run_experiment
from cupyep.experiments.cells import UNTRAINED
from cupyep.experiments.progress import status
from cupyep.experiments.report import open_text
from cupyep.experiments.runner import cells_of
from cupyep.training.config import MACHINE, option_name

EXAMPLES = """\b
Examples:
  cupyep reproduce --list                          what there is
  cupyep reproduce signals                         minutes on two cores
  cupyep reproduce signals --max-minutes 10        ten of them; the same command goes on later
  cupyep reproduce best-cifar10 --scale medium --estimate   how many hours here, by steps timed now
  cupyep reproduce best-cifar10 --scale medium     hours; stopped, the same command goes on
  cupyep reproduce best-cifar10 --scale medium --status     how far it is, by the rows' keys
  cupyep reproduce vgg7-kd-cifar10 --scale medium --rows bp,kd   some rows of the table first
  cupyep reproduce vgg7-kd-cifar10 --scale full    the paper's size, hours on a GPU
  cupyep reproduce baseline --precision float16    in halves
"""


@click.command(epilog=EXAMPLES)
@click.argument("name", required=False, type=Names("experiment", tuple(EXPERIMENTS)), metavar="[NAME]")
@click.option("--list", "show_list", is_flag=True, help="Show the experiments.")
@choice(
    "--scale",
    among=SCALES,
    default="small",
    text="small: narrow networks and few images, minutes on two cores; medium: all images as they are, hours on two "
    "cores; full: the paper's size, hours on a GPU. Not every experiment has every scale.",
)
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds.  [default: the experiment's]")
@click.option("--rows", help="Keys of rows to measure now, in this order, as a,b; others wait.  [default: all]")
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    help="Stop after that, at the end of a batch; go on by the same command.",
)
@click.option("--output", "--out", "output", type=FilePath(), help="Report folder.  [default: reports/NAME-SCALE]")
@config_options(("data_dir", "device", "precision"), {"precision": "float32, or what the row names"})
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Cells measured at the same time, with one BLAS thread each; on a CPU as many as it has cores.",
)
@click.option(
    "--status",
    "show_status",
    is_flag=True,
    help="Measure nothing; a line a cell: not started, or epoch, accuracy so far, hours left.",
)
@click.option(
    "--estimate",
    is_flag=True,
    help="As --status; of cells without an epoch, time some steps and tell the hours that they will take, for --jobs.",
)
@click.option("--report-only", is_flag=True, help="Measure nothing; write the report anew from results.json.")
@click.option("--quiet", is_flag=True, help="No line an epoch.")
def reproduce(
    name: str | None,
    show_list: bool,
    scale: str,
    seeds: int | None,
    rows: str | None,
    max_minutes: float | None,
    output: Path | None,
    jobs: int,
    show_status: bool,
    estimate: bool,
    report_only: bool,
    quiet: bool,
    given: dict[str, Any],
) -> None:
    """Run an experiment and write its report.

    The report folder holds REPORT.md (claim, setting, table beside the published figures, verdict), figures,
    results.json and work, the runs that the same command goes on with. Stopped by --max-minutes (exit code 0) or a
    signal (128 + its number), it reports the cells that are finished.

    A cell is a row with a seed; its run directory is work/ROW-seedK of the report folder, by the row's key. A run of
    `cupyep train` with the same options may be put there, finished or not, and is taken as it is.
    """
    if show_list:
        for experiment in EXPERIMENTS.values():
            click.echo(f"{experiment.name:<20} {experiment.title}")
        return
    if name is None:
        raise ConfigurationError("reproduce what? give the NAME of an experiment; --list shows them")
    experiment, folder = find(name), output or Path("reports") / f"{name}-{scale}"
    experiment.at(scale)
    place = {name: value for name, value in given.items() if name in MACHINE}
    defaults = {name: value for name, value in given.items() if name not in MACHINE}
    chosen = {"--seeds": seeds, **{option_name(name): value for name, value in defaults.items()}}
    modes = {"--status": show_status, "--estimate": estimate, "--report-only": report_only}
    mode = next((word for word, wanted in modes.items() if wanted), None)
    idle = {"--rows": rows, "--max-minutes": max_minutes}
    if mode == "--report-only":
        idle |= chosen | {option_name(name): value for name, value in place.items()}
    elif report_only:
        idle["--report-only"] = True
    for option, value in idle.items():
        require(mode is None or value is None, f"{mode} measures nothing: leave it or {option} out")
    if show_status or estimate:
        require(not estimate or experiment.measure not in UNTRAINED, f"experiment '{name}' trains nothing to estimate")
        if jobs > 1:
            set_threads(1)
        for line in status(cells_of(experiment, folder, scale, seeds, place, defaults), estimate, jobs):
            click.echo(line)
        return
    matplotlib_figure()  # said before hours of measuring
    if not report_only:
        words = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
        command = shlex.join(["cupyep", "reproduce", name, "--scale", scale, *words])
        how: dict[str, Any] = {"command": command, "quiet": quiet, "report": click.echo, "jobs": jobs}
        how |= {"defaults": defaults, "rows": [key.strip() for key in rows.split(",")] if rows else ()}
        try:
            run_experiment(experiment, folder, scale, seeds, max_minutes, place, **how)
        except Interrupted:
            _report(experiment, folder)
            raise
    _report(experiment, folder)


def _report(experiment: Experiment, folder: Path) -> None:
    """Write the report of what is measured, and say what it comes to."""
    results, about = load_results(experiment, folder)
    path = write_report(experiment, results, about, folder)
    click.echo(experiment.verdict(results) if results.complete else open_text(results))
    click.echo(f"report: {path}")
