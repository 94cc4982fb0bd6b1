"""The commands that look at trained runs: evaluate, predict, export, diagnose, plot, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cupyep.cli.help import SectionedCommand
from cupyep.cli.shared import (
    checkpoint_option,
    choice,
    is_given,
    json_option,
    run_options,
    run_plugin_option,
    write_json,
)
from cupyep.cli.types import FilePath, Names, NewFile, NewJson
from cupyep.commands import compare as comparing
from cupyep.commands import diagnose as diagnosing
from cupyep.commands.export import FORMS, export_run
from cupyep.commands.plots import draw_runs, learning_of
from cupyep.commands.plots.diagnosis import diagnosis
from cupyep.commands.plots.style import FORMATS, matplotlib_figure, save
from cupyep.commands.predict import Prediction, predict_pictures
from cupyep.commands.release import release_run
from cupyep.data.pictures import find_pictures
from cupyep.errors import ConfigurationError, DataError, require
from cupyep.files import can_write, write_file
from cupyep.training.display import Display
from cupyep.training.runs import evaluate_run
from cupyep.training.trained import load_trained

EVALUATE_EXAMPLES = """\b
Examples:
  cupyep evaluate runs/mine                             the test images, with the best epoch
  cupyep evaluate runs/mine --split validation          the images held out by --validation
  cupyep evaluate runs/mine --checkpoint last --device cpu
"""


@click.command(epilog=EVALUATE_EXAMPLES)
@click.argument("run", type=FilePath())
@checkpoint_option("best")
@choice(
    "--split",
    among=("test", "validation", "train"),
    default="test",
    text="Which images: validation needs a run with --validation; train are the training images, not augmented.",
)
@run_options("data_dir", "limit_test", "batch_size", "device")
@run_plugin_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(run: Path, checkpoint: str, split: str, quiet: bool, given: dict[str, Any]) -> None:
    """Show the accuracy of a run.

    RUN is a run directory. A network that settles is also shown 1000 images for ten times as long: what is left there
    is the accuracy at rest.
    """
    require("limit_test" not in given or split == "test", "--limit-test needs --split test")
    for line in evaluate_run(run, checkpoint, given, Display(quiet), split):
        click.echo(line)


PREDICT_EXAMPLES = """\b
Examples:
  cupyep predict runs/mine cat.png                     the three likeliest classes
  cupyep predict runs/mine photos --top 1 --json       every picture of a folder, an object a line
  cupyep predict runs/mine photos --json photos.json   the same lines, in a file
  cupyep predict runs/mine cat.png --free-steps 200 --tolerance 1e-4
"""


@click.command(epilog=PREDICT_EXAMPLES)
@click.argument("run", type=FilePath())
@click.argument("pictures", nargs=-1, required=True, type=FilePath(), metavar="PICTURE|FOLDER...")
@click.option("--top", type=int, help="Number of classes shown.  [default: 3, or all of fewer]")
@click.option(
    "--json",
    "json_path",
    type=NewJson(),
    is_flag=False,
    flag_value="-",
    help="Also write a JSON object a picture, a line each, to this file; without PATH print these lines only.",
)
@checkpoint_option("best")
@run_options("free_steps", "tolerance", "batch_size", "device")
@run_plugin_option
def predict(
    run: Path,
    pictures: tuple[Path, ...],
    top: int | None,
    json_path: Path | None,
    checkpoint: str,
    given: dict[str, Any],
) -> None:
    """Classify pictures with a trained run.

    RUN is a run directory; its data set is not needed. Pictures become what the run's images were: upright, grey or
    colour, the largest square in the middle, the data set's size, normalised. Transparent parts become white. With a
    tolerance each line says whether the network settled, and always how far from rest its worst layer was.

    PNG, JPEG, BMP, GIF (first frame), WebP, TIFF and PPM are read, up to 50 million pixels. Needs the extra images:
    pip install "cupyep[images]". Of a FOLDER all files but hidden ones are tried; one that is no picture is reported,
    as a picture that cannot be read is, the others are classified, and the exit code is 1.
    """
    files = find_pictures(list(pictures))
    trained, failed = load_trained(run, checkpoint, given), 0
    width, lines, alone = max(len(str(file)) for file in files), [], json_path == Path("-")
    for prediction in predict_pictures(trained, files, top):
        failed += bool(prediction.error)
        lines.append(json.dumps(prediction.to_json(), allow_nan=False) + "\n")
        click.echo(lines[-1] if alone else _line(prediction, width), nl=not alone)
    if json_path is not None and not alone:
        write_file(json_path, "".join(lines).encode())
        click.echo(f"written to {json_path}")
    if failed:
        raise DataError(f"{failed} of {len(files)} pictures could not be classified; see above")


def _line(prediction: Prediction, width: int) -> str:
    if prediction.error:
        return prediction.error
    shown = [
        f"{name} {score:.3f}" if probability is None else f"{name} {probability:.1%}"
        for name, score, probability in prediction.classes
    ]
    settled = {None: "", True: " (settled)", False: " (not settled)"}[prediction.settled]
    rest = "" if prediction.residual is None else f"  residual {prediction.residual:.1e}{settled}"
    return f"{prediction.file!s:<{width}}  {', '.join(shown)}{rest}"


EXPORT_EXAMPLES = """\b
Examples:
  cupyep export runs/mine --format npz --output mine.npz       arrays, laid out as PyTorch expects
  cupyep export runs/mine --format torch --output mine.pt      a state dict
  cupyep export runs/mine --format onnx --output mine.onnx     the settled network, pixels in, scores out
  cupyep export runs/mine --format run --output mine           a small run directory to pass on, with a card
"""


@click.command(epilog=EXPORT_EXAMPLES)
@click.argument("run", type=FilePath())
@click.option("--format", "form", type=Names("--format", (*FORMS, "run")), required=True, help="What to write.")
@click.option("--output", type=NewFile(), required=True, help="The file to write; for run a new folder.")
@checkpoint_option("best")
@click.option("--steps", type=int, help="Settling steps written out (onnx).  [default: the run's --free-steps]")
@run_plugin_option
def export(run: Path, form: str, output: Path, checkpoint: str, steps: int | None) -> None:
    """Write a run's network for others.

    RUN is a run directory; only run needs its data set. Weights are named layers.0.weight, .., readout.bias;
    convolutions are (K, C, kh, kw), dense maps (out, in) of an input flattened as (C, H, W).

    npz also holds mean, std, classes and settings; torch (needs PyTorch) and safetensors (needs safetensors) hold the
    weights only. cupyep train --init-from takes npz and safetensors back. onnx (extra onnx) is the free phase with its
    steps written out, and takes pixels in [0, 1], which it normalises.

    run is a run directory again, but of a twentieth of the size or less: the parameters as float16, and README.md with
    accuracies of the test images by these files, options, settling, licence. evaluate, predict, plot, export
    and diagnose --checkpoint best take it, train --init-from its best.h5.
    """
    if form == "run":
        require(steps is None, "--steps is for --format onnx")
        lines = release_run(run, output, checkpoint, Display())
    else:
        lines = export_run(run, form, output, checkpoint, steps)
    for line in lines:
        click.echo(line)


DIAGNOSE_EXAMPLES = """\b
Examples:
  cupyep diagnose runs/mine                             the last checkpoint, with a picture in runs/mine/plots
  cupyep diagnose runs/mine --free-steps 20 --bptt      would more steps help? is the gradient right?
  cupyep diagnose best.h5 --plot best.png --json best.json
"""


DIAGNOSE_COMMON = ("checkpoint", "bptt", "plot_path", "json_path", "free_steps", "tolerance", "batch_size", "device")


@click.command(cls=SectionedCommand, common=DIAGNOSE_COMMON, epilog=DIAGNOSE_EXAMPLES)
@click.argument("path", metavar="RUN|CHECKPOINT", type=FilePath())
@checkpoint_option("last", of="a run's")
@click.option("--bptt", is_flag=True, help="Compare the gradient with backpropagation through time (slower).")
@click.option("--plot", "plot_path", type=NewFile(),
              help="Picture, .png or .svg.  [default: plots/diagnosis.png in the run directory]")  # fmt: skip
@json_option("everything")
@run_options(
    "beta", "free_steps", "nudged_steps", "schedule", "relaxation", "tolerance", "scheme", "nudge", "data_dir",
    "batch_size", "device",
)  # fmt: skip
@run_plugin_option
def diagnose(
    path: Path, checkpoint: str, bptt: bool, plot_path: Path | None, json_path: Path | None, given: dict[str, Any]
) -> None:
    """Look at a run layer by layer.

    Do its phases settle, does the nudge reach every layer, do units respond?

    Settles as many training images as the run's batches hold, as long as the run does and as long again, and prints a
    line a layer: residual at the end of a phase, how far the layer still has to go, the samples that are unsettled (too
    far from rest, or above the tolerance), response to the nudge (also times a_n = lambda^-(L-n), which makes layers
    comparable), norm of the gradient, units at the end of their range, dead channels. Verdicts follow in words. The
    exit code is 0 for an unhealthy network, too.
    """
    check_picture(plot_path)
    require(not (is_given("checkpoint") and path.is_file()), f"--checkpoint is for a run: '{path}' is one checkpoint")
    report = diagnosing.diagnose(path, checkpoint, given, bptt)
    for line in report.lines():
        click.echo(line)
    write_json(report, json_path)
    for file in _draw(report, path, plot_path):
        click.echo(f"drawn in {file}")


def check_picture(path: Path | None) -> None:
    """Raise `ConfigurationError` if the picture that --plot asks for could not be written at the end."""
    if path is not None:
        require(path.suffix in (".png", ".svg"), f"--plot must end in .png or .svg (got '{path}')")
        matplotlib_figure()


def _draw(report: diagnosing.Diagnosis, path: Path, plot_path: Path | None) -> list[Path]:
    """Draw the diagnosis where it was asked for, else in the run directory; a checkpoint alone has no place for it."""
    if plot_path is None:
        if not (path.is_dir() and can_write(path)):
            return []
        plot_path = path / "plots" / "diagnosis.png"
    try:
        figure = diagnosis(report.rows, report.trace, report.title, report.verdicts())
    except ConfigurationError as error:
        click.echo(f"not drawn: {error}")
        return []
    plot_path.parent.mkdir(exist_ok=True)
    return save(figure, plot_path.with_suffix(""), (plot_path.suffix[1:],))


PLOT_EXAMPLES = """\b
Examples:
  cupyep plot runs/mine                         pictures in runs/mine/plots
  cupyep plot runs/ep runs/bp --output figures  loss and accuracy of both in one picture
  cupyep plot runs/mine --format both           PNG and SVG
"""


@click.command(epilog=PLOT_EXAMPLES)
@click.argument("run", nargs=-1, required=True, type=FilePath(), metavar="RUN...")
@click.option(
    "--output",
    "--out",
    "output",
    type=FilePath(file_okay=False),
    help="Folder of the pictures.  [default: plots in the run directory; plots here for several runs]",
)
@choice("--format", "form", among=FORMATS, default="png", text="Kind of picture.")
@run_options("data_dir", "batch_size", "device")
@run_plugin_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
def plot(run: tuple[Path, ...], output: Path | None, form: str, quiet: bool, given: dict[str, Any]) -> None:
    """Draw runs, finished or not.

    Pictures: learning (loss and accuracy, up to eight runs in one), overview (of a run: loss, accuracy, residuals,
    responses, and whether it settles), response and gradient (what reaches each layer, over the epochs), distance (how
    far from rest the phases end), units (saturated and dead ones), settling (residuals step by step), filters (of the
    first layer), filters_by_epoch (of at most nine epochs), confusion (which class is taken for which; settles the test
    images once).

    Needs the extra plot: pip install "cupyep[plot]".
    """
    for line in draw_runs(run, output, FORMATS[form], given, Display(quiet)):
        click.echo(line)


COMPARE_EXAMPLES = """\b
Examples:
  cupyep compare runs/ep runs/bp                          what differs, and what came of it
  cupyep compare runs/* --sort best_accuracy              the best first
  cupyep compare runs/* --csv runs.csv --plot runs.png    for a spreadsheet, and as curves
"""


@click.command(epilog=COMPARE_EXAMPLES)
@click.argument("runs", nargs=-1, required=True, type=FilePath(), metavar="RUN...")
@click.option(
    "--sort",
    "column",
    type=Names("--sort", comparing.COLUMNS),
    metavar="COLUMN",
    help="Order by a column or an option: accuracies from the highest, all else from the lowest.  [default: as given]",
)
@click.option("--csv", "csv_path", type=NewFile(), help="Also write the table to this file, with all digits.")
@click.option(
    "--plot", "plot_path", type=NewFile(), help="Also draw loss and accuracy of the first eight, .png or .svg."
)
@run_plugin_option
def compare(runs: tuple[Path, ...], column: str | None, csv_path: Path | None, plot_path: Path | None) -> None:
    """Compare runs, finished or not.

    A line a run: the options in which the runs differ, epochs done, test accuracy after the best epoch (chosen by the
    validation images where there are some) and after the last one, losses after the last one, minutes, and whether its
    phases settled.
    """
    check_picture(plot_path)
    show_comparison(comparing.compare(runs), column, csv_path, plot_path)


def show_comparison(
    table: comparing.Comparison, column: str | None = None, csv_path: Path | None = None, plot_path: Path | None = None
) -> None:
    """Print the table, and write and draw it where it was asked for."""
    table = table if column is None else table.sorted(column)
    for line in table.lines():
        click.echo(line)
    if csv_path is not None:
        table.write_csv(csv_path)
        click.echo(f"written to {csv_path}")
    if plot_path is not None:
        figure = learning_of([Path(row["path"]) for row in table.rows])
        for file in save(figure, plot_path.with_suffix(""), (plot_path.suffix[1:],)):
            click.echo(f"drawn in {file}")
