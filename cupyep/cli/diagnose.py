"""`cupyep diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cupyep.cli.shared import FilePath, Names, SectionedCommand, config_options, given_options
from cupyep.commands import diagnose as diagnosing
from cupyep.commands.plots.diagnosis import diagnosis
from cupyep.commands.plots.style import matplotlib_figure, save
from cupyep.errors import ConfigurationError, require
from cupyep.files import can_write
from cupyep.training.run_directory import CHECKPOINT_FILES

OPTIONS = (
    "beta", "free_steps", "nudged_steps", "schedule", "relaxation", "tolerance", "scheme", "nudge", "data_dir",
    "batch_size",
)  # fmt: skip
DEFAULTS = dict.fromkeys((*OPTIONS, "device"), "as the run")
EXAMPLES = """\b
Examples:
  cupyep diagnose runs/mine                             the last checkpoint, with a picture in runs/mine/plots
  cupyep diagnose runs/mine --free-steps 20 --bptt      would more steps help? is the gradient right?
  cupyep diagnose best.h5 --plot best.png --json best.json
"""


@click.command(cls=SectionedCommand, epilog=EXAMPLES)
@click.argument("path", metavar="RUN|CHECKPOINT", type=FilePath())
@click.option(
    "--checkpoint",
    type=Names("--checkpoint", tuple(sorted(CHECKPOINT_FILES))),
    default="last",
    show_default=True,
    help="Which of a run's checkpoints.",
)
@click.option("--bptt", is_flag=True, help="Compare the gradient with backpropagation through time (slower).")
@click.option("--plot", "plot_path", type=FilePath(),
              help="Picture, .png or .svg.  [default: plots/diagnosis.png in the run directory]")  # fmt: skip
@click.option("--json", "json_path", type=FilePath(), help="Also write everything to this file.")
@config_options(DEFAULTS, DEFAULTS)
def diagnose(
    path: Path, checkpoint: str, bptt: bool, plot_path: Path | None, json_path: Path | None, **options: Any
) -> None:
    """Look at a run layer by layer.

    Do its phases settle, does the nudge reach every layer, do units respond?

    Settles as many training images as the run's batches hold, as long as the run does and as long again, and prints a
    line a layer: residual at the end of a phase, how far the layer still has to go, the samples that are unsettled (too
    far from rest, or above the tolerance), response to the nudge (also times a_n = lambda^-(L-n), which makes layers
    comparable), norm of the gradient, units at the end of their range, dead channels. Verdicts follow in words. The
    exit code is 0 for an unhealthy network, too.
    """
    _check_places(plot_path, json_path)
    report = diagnosing.diagnose(path, checkpoint, given_options(options), bptt)
    for line in report.lines():
        click.echo(line)
    if json_path is not None:
        report.write_json(json_path)
        click.echo(f"written to {json_path}")
    for file in _draw(report, path, plot_path):
        click.echo(f"drawn in {file}")


def _check_places(plot_path: Path | None, json_path: Path | None) -> None:
    for name, place in (("--plot", plot_path), ("--json", json_path)):
        if place is not None:
            require(place.parent.is_dir(), f"{name}: there is no folder '{place.parent}'")
            require(not place.is_dir(), f"{name}: '{place}' is a folder, not a file")
    if plot_path is not None:
        require(plot_path.suffix in (".png", ".svg"), f"--plot must end in .png or .svg (got '{plot_path}')")
        matplotlib_figure()


def _draw(report: diagnosing.Diagnosis, path: Path, plot_path: Path | None) -> list[Path]:
    """Draw the diagnosis where it was asked for, else in the run directory; a checkpoint alone has no place for it."""
    if plot_path is None:
        if not (path.is_dir() and can_write(path)):
            return []
        plot_path = path / "plots" / "diagnosis.png"
    try:
        lines = report.lines()
        verdicts = [line for line in lines if line.startswith(("warning:", "healthy:"))]
        figure = diagnosis(report.rows, report.trace, report.title, verdicts)
    except ConfigurationError as error:
        click.echo(f"not drawn: {error}")
        return []
    plot_path.parent.mkdir(exist_ok=True)
    return save(figure, plot_path.with_suffix(""), (plot_path.suffix[1:],))
