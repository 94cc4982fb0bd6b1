"""`cupyep plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cupyep.cli.shared import FilePath, Names, config_options, given_options
from cupyep.commands.plots import draw_runs
from cupyep.commands.plots.style import FORMATS
from cupyep.training.display import Display

DEFAULTS = dict.fromkeys(("data_dir", "batch_size", "device"), "as the run")
EXAMPLES = """\b
Examples:
  cupyep plot runs/mine                         pictures in runs/mine/plots
  cupyep plot runs/ep runs/bp --out figures     loss and accuracy of both in one picture
  cupyep plot runs/mine --format both           PNG and SVG
"""


@click.command(epilog=EXAMPLES)
@click.argument("run", nargs=-1, required=True, type=FilePath(), metavar="RUN...")
@click.option(
    "--out",
    type=FilePath(file_okay=False),
    help="Folder of the pictures.  [default: plots in the run directory; plots here for several runs]",
)
@click.option(
    "--format",
    "form",
    type=Names("--format", tuple(FORMATS)),
    default="png",
    show_default=True,
    help="Kind of picture.",
)
@config_options(DEFAULTS, DEFAULTS)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def plot(run: tuple[Path, ...], out: Path | None, form: str, quiet: bool, **options: Any) -> None:
    """Draw runs, finished or not.

    Pictures: learning (loss and accuracy, all runs in one), response and gradient (what reaches each layer, over the
    epochs), distance (how far from rest the phases end), units (saturated and dead ones), settling (residuals step by
    step), filters (of the first layer), confusion (which class is taken for which; settles the test images once).

    Needs the extra plot: pip install "cupyep[plot]".
    """
    for line in draw_runs(run, out, FORMATS[form], given_options(options), Display(quiet)):
        click.echo(line)
