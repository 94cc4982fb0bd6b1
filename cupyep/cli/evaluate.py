"""`cupyep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cupyep.cli.shared import FilePath, Names, config_options, given_options
from cupyep.errors import require
from cupyep.training import runs
from cupyep.training.display import Display
from cupyep.training.run_directory import CHECKPOINT_FILES

EVALUATE_DEFAULTS = dict.fromkeys(("data_dir", "limit_test", "batch_size", "device"), "as the run")
EXAMPLES = """\b
Examples:
  cupyep evaluate runs/mine                             the test images, with the best epoch
  cupyep evaluate runs/mine --split validation          the images held out by --validation
  cupyep evaluate runs/mine --checkpoint last --device cpu
"""


@click.command(epilog=EXAMPLES)
@click.argument("run", type=FilePath())
@click.option(
    "--checkpoint",
    type=Names("--checkpoint", tuple(sorted(CHECKPOINT_FILES))),
    default="best",
    show_default=True,
    help="Which of the run's checkpoints.",
)
@click.option(
    "--split",
    type=Names("--split", ("test", "validation", "train")),
    default="test",
    show_default=True,
    help="Which images: validation needs a run with --validation; train are the training images, not augmented.",
)
@config_options(EVALUATE_DEFAULTS, EVALUATE_DEFAULTS)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(run: Path, checkpoint: str, split: str, quiet: bool, **options: Any) -> None:
    """Show the accuracy of a run.

    RUN is a run directory.
    """
    given = given_options(options)
    require("limit_test" not in given or split == "test", "--limit-test needs --split test")
    for line in runs.evaluate_run(run, checkpoint, given, Display(quiet), split):
        click.echo(line)
