"""The command line, a module a command: options in, one call, lines out. No numerics here."""

from __future__ import annotations

import click

from cupyep._version import __version__
from cupyep.cli import data, reports, reproduce, runs, teacher, train
from cupyep.cli.shared import Commands

EXAMPLES = """\b
Examples:
  cupyep train --recipe digits-kd                  a first run, on bundled images
  cupyep train --arch vgg7 --aug kd                CIFAR-10, teacher included
  cupyep train --run-dir runs/mine --resume        go on where a run stopped
  cupyep check --arch vgg5 --dataset digits        is the gradient right?
  cupyep evaluate runs/mine                        test accuracy of its best epoch
  cupyep diagnose runs/mine                        does it settle? does the nudge reach every layer?
  cupyep plot runs/mine                            pictures of the run
  cupyep compare runs/mine runs/other              options that differ, accuracies, losses
  cupyep predict runs/mine cat.png                 what is in a picture?
  cupyep export runs/mine --format onnx --output mine.onnx
  cupyep teacher --onnx resnet.onnx --output t.h5  a model of yours as a teacher
  cupyep data list                                 data sets: classes, sizes, which are here
  cupyep recipes                                   settings of the papers, ready to train
  cupyep reproduce --list                          experiments, each with its report

Every command explains itself: cupyep COMMAND --help. Completion of commands, options and names in bash (zsh and fish:
docs/cli.md):

\b
  eval "$(_CUPYEP_COMPLETE=bash_source cupyep)"
"""


@click.group(cls=Commands, invoke_without_command=True, epilog=EXAMPLES)
@click.version_option(__version__, prog_name="cupyep", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Train deep convolutional networks by Equilibrium Propagation, with intermediate learning signals."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (train.train, runs.evaluate, runs.predict, runs.export, runs.diagnose, runs.plot, runs.compare) + (
    reports.check,
    teacher.teacher,
    data.data,
    reports.recipes,
    reproduce.reproduce,
    reports.memory,
    reports.info,
)
for command in COMMANDS:
    main.add_command(command)
