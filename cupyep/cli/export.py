"""`cupyep export`."""

from __future__ import annotations

from pathlib import Path

import click

from cupyep.cli.shared import FilePath, Names
from cupyep.commands.export import FORMS, export_run
from cupyep.errors import require
from cupyep.training.run_directory import CHECKPOINT_FILES

EXAMPLES = """\b
Examples:
  cupyep export runs/mine --format npz --output mine.npz       arrays, laid out as PyTorch expects
  cupyep export runs/mine --format torch --output mine.pt      a state dict
  cupyep export runs/mine --format onnx --output mine.onnx     the settled network, pixels in, scores out
"""


@click.command(epilog=EXAMPLES)
@click.argument("run", type=FilePath())
@click.option("--format", "form", type=Names("--format", tuple(FORMS)), required=True, help="What to write.")
@click.option("--output", type=FilePath(), required=True, help="The file to write.")
@click.option(
    "--checkpoint",
    type=Names("--checkpoint", tuple(sorted(CHECKPOINT_FILES))),
    default="best",
    show_default=True,
    help="Which of the run's checkpoints.",
)
@click.option("--steps", type=int, help="Settling steps written out (onnx).  [default: the run's --free-steps]")
def export(run: Path, form: str, output: Path, checkpoint: str, steps: int | None) -> None:
    """Write a run's network for other programs.

    RUN is a run directory; its data set is not needed. Weights are named layers.0.weight, .., readout.bias;
    convolutions are (K, C, kh, kw), dense maps (out, in) of an input flattened as (C, H, W).

    npz also holds mean, std, classes and settings; torch holds the weights only, and needs PyTorch; onnx (extra onnx)
    is the free phase with its steps written out, and takes pixels in [0, 1], which it normalises.
    """
    require(output.parent.is_dir(), f"--output: there is no folder '{output.parent}'")
    require(not output.is_dir(), f"--output: '{output}' is a folder, not a file")
    for line in export_run(run, form, output, checkpoint, steps):
        click.echo(line)
