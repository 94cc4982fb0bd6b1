"""`cupyep train`: options in, one call into `cupyep.training`, lines out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from cupyep.cli.shared import (
    FilePath,
    SectionedCommand,
    choice,
    chosen_config,
    config_options,
    recipe_option,
    show_once,
)
from cupyep.errors import CupyepError, Interrupted, require
from cupyep.parallel import join
from cupyep.training import runs
from cupyep.training.config import OPTIONS
from cupyep.training.display import DISPLAYS, Display
from cupyep.training.tensorboard import FOLDER, EventLog, writer_class

EXAMPLES = """\b
Examples:
  cupyep train --recipe digits-kd                  a first run, on bundled images
  cupyep train --arch vgg7 --aug kd                CIFAR-10, teacher included
  cupyep train --run-dir runs/mine --resume        go on where a run stopped
"""


@click.command(cls=SectionedCommand, epilog=EXAMPLES)
@config_options(OPTIONS)
@recipe_option(
    "Take the options that are not given from a recipe (cupyep recipes lists them) or a TOML file of your own."
)
@click.option(
    "--run-dir",
    type=FilePath(),
    help="Folder of this run.  [default: runs/ARCH-AUG-DATASET-seedSEED, numbered if taken]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir where it stopped.")
@click.option(
    "--stretch-schedule",
    is_flag=True,
    help="With --resume and more --epochs, let a run that had finished go on: learning rate and kappa rise again to "
    "where schedules over all epochs have them.",
)
@click.option("--quiet", is_flag=True, help="No progress bar and no line an epoch; only the result.")
@choice(
    "--log-format",
    among=DISPLAYS,
    default="text",
    text="json: an object a line on stdout (start, progress, epoch, checkpoint, warning, end), for programs.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Also write event files to the folder tensorboard of the run; with --resume give it again.",
)
def train(
    recipe: str | None,
    run_dir: Path | None,
    resume: bool,
    stretch_schedule: bool,
    quiet: bool,
    log_format: str,
    tensorboard: bool,
    given: dict[str, Any],
) -> None:
    """Train a network in a new run directory.

    The directory holds config.toml, metrics.jsonl, settling.json, checkpoint.h5 and best.h5. Ctrl-C finishes the batch
    and saves, --resume goes on; a second Ctrl-C leaves at once. With --aug kd and no --teacher, a teacher is trained
    first; stopped there, the same command goes on.
    """
    display = DISPLAYS[log_format](quiet)
    warnings.showwarning = show_once(partial(display.show, "warning"))
    ranks = join()
    with _ending(display):
        if tensorboard:
            writer_class()  # its absence is said before anything is made
        stretches = not stretch_schedule or (resume and "epochs" in given)
        require(stretches, "--stretch-schedule needs --resume and --epochs")
        if resume:
            given_right = run_dir is not None and recipe is None
            require(given_right, "--resume needs --run-dir and takes no --recipe: options come from the run")
            run = runs.resume_run(run_dir, given, display, stretch_schedule, ranks)
        else:
            run = runs.start_run(chosen_config(given, recipe), run_dir, display, ranks)
        if tensorboard and ranks.rank == 0:
            run.events = EventLog(run.directory.path / FOLDER, run.records)
        try:
            summary = run.run()
        except Interrupted as error:
            hint = f"{error}; go on with: cupyep train --run-dir {run.directory.path} --resume"
            hint += f" --plugin {given['plugin']}" if "plugin" in given else ""
            raise Interrupted(hint, error.number) from None
        finally:
            if run.events is not None:
                run.events.close()
        display.show("end", str(summary), status="done", **summary.values())


@contextlib.contextmanager
def _ending(display: Display) -> Iterator[None]:
    """Show the end of a command that fails, too; its error line is written elsewhere."""
    try:
        yield
    except (CupyepError, MemoryError, OSError, KeyboardInterrupt) as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        display.show("end", status="interrupted" if stopped else "failed", message=str(error))
        raise
