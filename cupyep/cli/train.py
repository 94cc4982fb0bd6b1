"""`cupyep train`: options in, one call into `cupyep.training`, lines out."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from cupyep.cli.help import SectionedCommand
from cupyep.cli.runs import show_comparison
from cupyep.cli.shared import (
    ALIASES,
    choice,
    chosen_config,
    config_options,
    recipe_option,
    show_once,
    value_type,
)
from cupyep.cli.types import FilePath
from cupyep.commands.compare import compare
from cupyep.errors import ConfigurationError, CupyepError, Interrupted, require
from cupyep.experiments.sweep import grid, sweep
from cupyep.parallel import join
from cupyep.recipes import read_recipe
from cupyep.training import runs
from cupyep.training.config import OPTIONS, check_option, option_name
from cupyep.training.display import DISPLAYS, Display
from cupyep.training.options import checked
from cupyep.training.run_directory import CONFIG
from cupyep.training.tensorboard import FOLDER, EventLog, writer_class

EXAMPLES = """\b
Examples:
  cupyep train --recipe digits-kd                  a first run, on bundled images
  cupyep train --arch vgg7 --aug kd                CIFAR-10, teacher included
  cupyep train --run-dir runs/mine --resume        go on where a run stopped
  cupyep train --sweep kappa=0.1,0.3 --sweep seed=0,1 --aug le --run-dir runs/kappa --jobs 2
"""


COMMON = ("recipe", "arch", "width", "dataset", "limit_train", "aug", "epochs", "batch_size", "learning_rate", "device")


@click.command(cls=SectionedCommand, common=(*COMMON, "run_dir", "resume"), epilog=EXAMPLES)
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
    text="json: an object a line on stdout (start, estimate, progress, epoch, checkpoint, warning, end), for programs.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Also write event files to the folder tensorboard of the run; with --resume give it again.",
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="OPTION=VALUE,VALUE...",
    help="Train a run for each of these values, in folders named by them below --run-dir; several: for every "
    "combination. Values with commas in them are divided by ;.  [default: one run]",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs of a --sweep at the same time, with one thread each; on a CPU as many as it has cores.  [default: 1]",
)
def train(
    recipe: str | None,
    run_dir: Path | None,
    resume: bool,
    stretch_schedule: bool,
    quiet: bool,
    log_format: str,
    tensorboard: bool,
    sweeps: tuple[str, ...],
    jobs: int | None,
    given: dict[str, Any],
) -> None:
    """Train a network in a new run directory.

    The directory holds config.toml, metrics.jsonl, settling.json, checkpoint.h5 and best.h5. Ctrl-C finishes the batch
    and saves, --resume goes on; a second Ctrl-C leaves at once. With --aug kd and no --teacher, a teacher is trained
    first; stopped there, the same command goes on.
    """
    display = DISPLAYS[log_format](quiet)
    display.advises = not resume  # a run that goes on is of one size
    warnings.showwarning = show_once(partial(display.show, "warning"))
    ranks = join()
    with _ending(display):
        if tensorboard:
            writer_class()  # its absence is said before anything is made
        stretches = not stretch_schedule or (resume and "epochs" in given)
        require(stretches, "--stretch-schedule needs --resume and --epochs")
        require(jobs is None or bool(sweeps), "--jobs needs --sweep")
        if sweeps:
            require(ranks.size == 1, "--sweep is for one process: start it without mpirun; --jobs runs several")
            require(
                log_format == "text", "--sweep writes no --log-format json; the runs' metrics.jsonl is for programs"
            )
            if run_dir is None:
                raise ConfigurationError("--sweep needs --run-dir, the folder of its runs")
            points = grid(swept_values(sweeps, given), run_dir, given, {} if recipe is None else read_recipe(recipe))
            how = {"stretch": stretch_schedule, "tensorboard": tensorboard, "plugin": given.get("plugin")}
            failed = sweep(points, jobs or 1, resume, display, how)
            show_comparison(compare([p.folder for p in points if (p.folder / CONFIG).is_file()]))
            if failed:
                again = "see above; the same command with --resume goes on"
                raise CupyepError(f"{failed} of {len(points)} runs failed, {again}")
            return
        if resume:
            if run_dir is None or recipe is not None:
                raise ConfigurationError("--resume needs --run-dir and takes no --recipe: options come from the run")
            run = runs.resume_run(run_dir, given, display, stretch_schedule, ranks)
        else:
            run = runs.start_run(chosen_config(given, recipe), run_dir, display, ranks)
        words = ["cupyep", "train", "--run-dir", str(run.directory.path), "--resume"]
        words += ["--plugin", given["plugin"]] if "plugin" in given else []
        ranks.remedy = f"go on with: {shlex.join(words)}"
        if tensorboard and ranks.rank == 0:
            run.events = EventLog(run.directory.path / FOLDER, run.records)
        try:
            summary = run.run()
        except Interrupted as error:
            raise Interrupted(f"{error}; {ranks.remedy}", error.number) from None
        assert summary is not None  # without callbacks a run ends after an epoch
        display.show("end", str(summary), status="done", **summary.values())


def swept_values(texts: Iterable[str], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values by option of ``--sweep kappa=0.1,0.3``, one text an option; ``unset`` where it may be unset."""
    also = {flag.strip("-"): name for name, flags in ALIASES.items() for flag in flags}
    found: dict[str, list[Any]] = {}
    for text in texts:
        word, equals, values = text.partition("=")
        word = word.strip().removeprefix("--")
        name = also.get(word, word.replace("-", "_"))
        require(bool(equals and values), f"--sweep must be like kappa=0.1,0.3 (got '{text}')")
        check_option(name)
        require(name != "plugin", "--plugin cannot be swept: give it once, and sweep a name that it registers")
        require(name not in found, f"--sweep names {name} twice; give all its values at once")
        require(name not in given, f"{option_name(name)} is swept, leave it out; or leave out its --sweep")
        parts = [part.strip() for part in values.split(";" if ";" in values else ",")]
        found[name] = [_swept_value(name, part) for part in parts]
        double = next((part for k, part in enumerate(parts) if found[name][k] in found[name][:k]), None)
        require(double is None, f"--sweep {name} holds {double} twice")
    return found


def _swept_value(name: str, text: str) -> Any:
    if text == "unset" and OPTIONS[name].default is None:
        return None
    try:
        value = value_type(name).convert(text, None, None)
        return checked(OPTIONS[name], value, option_name(name))
    except click.BadParameter as error:
        raise ConfigurationError(f"--sweep {name}: {error.message}") from error


@contextlib.contextmanager
def _ending(display: Display) -> Iterator[None]:
    """Show the end of a command that fails, too; its error line is written elsewhere."""
    try:
        yield
    except (CupyepError, MemoryError, OSError, KeyboardInterrupt) as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        display.show("end", status="interrupted" if stopped else "failed", message=str(error))
        raise
