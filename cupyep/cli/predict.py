"""`cupyep predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cupyep.cli.shared import FilePath, Names, config_options, given_options
from cupyep.commands.predict import Prediction, predict_pictures
from cupyep.data.pictures import find_pictures
from cupyep.errors import DataError
from cupyep.training.run_directory import CHECKPOINT_FILES
from cupyep.training.trained import load_trained

DEFAULTS = dict.fromkeys(("free_steps", "tolerance", "batch_size", "device"), "as the run")
EXAMPLES = """\b
Examples:
  cupyep predict runs/mine cat.png                     the three likeliest classes
  cupyep predict runs/mine photos --top 1 --json       every picture of a folder, an object a line
  cupyep predict runs/mine cat.png --free-steps 200 --tolerance 1e-4
"""


@click.command(epilog=EXAMPLES)
@click.argument("run", type=FilePath())
@click.argument("pictures", nargs=-1, required=True, type=FilePath(), metavar="PICTURE|FOLDER...")
@click.option("--top", type=int, default=3, show_default=True, help="Number of classes shown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a picture.")
@click.option(
    "--checkpoint",
    type=Names("--checkpoint", tuple(sorted(CHECKPOINT_FILES))),
    default="best",
    show_default=True,
    help="Which of the run's checkpoints.",
)
@config_options(DEFAULTS, DEFAULTS)
def predict(run: Path, pictures: tuple[Path, ...], top: int, as_json: bool, checkpoint: str, **options: Any) -> None:
    """Classify pictures with a trained run.

    RUN is a run directory; its data set is not needed. Pictures become what the run's images were: upright, grey or
    colour, the largest square in the middle, the data set's size, normalised. Transparent parts become white. With a
    tolerance each line says whether the network settled, and always how far from rest its worst layer was.

    PNG, JPEG, BMP, GIF (first frame), WebP, TIFF and PPM are read, up to 50 million pixels. Needs the extra images:
    pip install "cupyep[images]". Of a FOLDER all files but hidden ones are tried; one that is no picture is reported,
    as a picture that cannot be read is, the others are classified, and the exit code is 1.
    """
    files = find_pictures(list(pictures))
    trained, failed = load_trained(run, checkpoint, given_options(options)), 0
    width = max(len(str(file)) for file in files)
    for prediction in predict_pictures(trained, files, top):
        failed += bool(prediction.error)
        click.echo(json.dumps(prediction.to_json(), allow_nan=False) if as_json else _line(prediction, width))
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
