"""`cupyep teacher`: the logits of a model for every image of a data set, as a teacher file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cupyep._version import __version__
from cupyep.backend import get_device
from cupyep.cli.help import LongCommand
from cupyep.cli.shared import choice, config_options, is_given
from cupyep.cli.types import FilePath, Names, NewFile, Numbers
from cupyep.commands.teacher import DTYPES, LAYOUTS, fed, onnx_teacher, torch_teacher
from cupyep.data import Dataset, TeacherFile
from cupyep.errors import require
from cupyep.models import ARCHITECTURES, architecture
from cupyep.training.build import build_dataset
from cupyep.training.config import make_config, option_name, require_used
from cupyep.training.display import Display
from cupyep.training.teacher import export_logits, feedforward, teacher_config, train_teacher

EXAMPLES = """\b
Examples:
  cupyep teacher --dataset cifar10 --onnx resnet.onnx --output teacher.h5
  cupyep teacher --dataset cifar10 --torch mymodels:resnet18 --weights resnet18.pt --output teacher.h5
  cupyep teacher --dataset folder:photos --torch mymodels:pretrained --resize 224 --output teacher.h5
  cupyep teacher --dataset cifar10 --train-bp vgg7 --epochs 30 --output teacher.h5
"""
# Options that would say nothing about another kind of teacher.
FOREIGN, OWN = ("--onnx", "--torch"), ("--train-bp",)
ONLY_WITH = {
    **dict.fromkeys(("layout", "mean", "std", "resize", "input_dtype", "logits"), FOREIGN),
    "weights": ("--torch",),
    **dict.fromkeys(("epochs", "width", "plugin"), OWN),
}
DATA = ("dataset", "data_dir", "image_size", "limit_train", "limit_test", "test_fraction")


COMMON = ("dataset", "onnx", "torch", "weights", "train_bp", "epochs", "resize", "mean", "std", "device", "output")


@click.command(cls=LongCommand, common=COMMON, epilog=EXAMPLES)
@config_options((*DATA, "batch_size", "seed", "device", "plugin"))
@click.option("--onnx", type=FilePath(), help="Teacher: an ONNX model, images in, logits out.")
@click.option("--torch", metavar="PACKAGE.MODULE:FACTORY", help="Teacher: the PyTorch module that this returns.")
@click.option(
    "--weights",
    type=FilePath(),
    help="State dict for --torch, or a checkpoint or .safetensors file with it; no code in it is run.  "
    "[default: the factory loads its own]",
)
@click.option(
    "--train-bp",
    type=Names("--train-bp", ARCHITECTURES, architecture),
    help="Teacher: train this network by backpropagation first.",
)
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="Epochs of --train-bp.")
@click.option("--width", type=float, default=1.0, show_default=True, help="Channel multiplier of --train-bp.")
@choice("--layout", among=LAYOUTS, default="nchw", text="Axis order that an ONNX or PyTorch teacher expects.")
@click.option(
    "--resize", type=click.IntRange(1, 4096), metavar="N", help="Give such a teacher N x N pixels (bilinear), as 224."
)
@choice(
    "--input-dtype",
    among=DTYPES,
    text="Numbers that it takes; uint8: pixels as they are.  [default: what an ONNX model says, else float32]",
)
@click.option(
    "--logits",
    metavar="NAME|INDEX",
    help="Which of its outputs are the logits.  [default: what is called logits, else the first]",
)
@click.option(
    "--mean", type=Numbers(), help="Channel means that such a teacher was trained with.  [default: the data set's]"
)
@click.option(
    "--std",
    type=Numbers(),
    help="Standard deviations likewise; --mean 0,0,0 --std 1,1,1 means pixels in [0, 1].  [default: the data set's]",
)
@click.option("--teacher-name", help="Free text kept in the file.  [default: what was exported]")
@click.option("--output", type=NewFile(), required=True, help="The teacher file to write (HDF5).")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def teacher(
    onnx: Path | None,
    torch: str | None,
    weights: Path | None,
    train_bp: str | None,
    epochs: int,
    width: float,
    logits: str | None,
    teacher_name: str | None,
    output: Path,
    quiet: bool,
    given: dict[str, Any],
    layout: str,
    resize: int | None,
    input_dtype: str | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> None:
    """Make a teacher file of a model.

    Writes the logits of a teacher for every image of a data set, as it is and mirrored: what cupyep train --aug kd
    --teacher takes. The teacher is one of --onnx, --torch, --train-bp. The code of --torch is imported and run, from
    the folder where you are, too.
    """
    _check_usage({"--onnx": onnx, "--torch": torch, "--train-bp": train_bp}, output)
    display = Display(quiet)
    arch = {} if train_bp is None else {"arch": train_bp, "width": width, "teacher_epochs": epochs}
    config = make_config(given, arch)
    require_used(given, vars(config))
    if train_bp is not None:
        dataset = build_dataset(config)
        network = train_teacher(teacher_config(config), dataset, config.device, display)
        predict, device = feedforward(network), network.device
        name = f"{train_bp} trained by backpropagation, {epochs} epochs"
    else:
        if onnx is not None:
            model, name = onnx_teacher(onnx, config.device, logits), onnx.name
        elif torch is not None:  # the only one left
            model = torch_teacher(torch, weights, config.device, logits)
            name = f"{torch} with {'its own weights' if weights is None else weights.name}"
        dataset = build_dataset(config)
        predict = fed(model, dataset, layout, input_dtype, resize, mean, std)
        device = get_device("cpu")  # the loader's; the model itself may run elsewhere
    accuracy = export_logits(
        predict,
        dataset,
        output,
        teacher=teacher_name or f"{name}, cupyep {__version__}",
        device=device,
        batch_size=config.batch_size,
        display=display,
    )
    click.echo(f"{output}: train accuracy {accuracy['train']:.2%}, test accuracy {accuracy['test']:.2%}")
    _warn_of_chance(output, dataset, display)


def _check_usage(teachers: dict[str, Any], output: Path) -> None:
    """Refuse, before anything is loaded, what cannot end well."""
    kinds = [flag for flag, value in teachers.items() if value is not None]
    require(len(kinds) == 1, "name one teacher: --onnx FILE, or --torch PACKAGE.MODULE:FACTORY, or --train-bp ARCH")
    for name, flags in ONLY_WITH.items():
        right = not is_given(name) or kinds[0] in flags
        require(right, f"{option_name(name)} is for {' and '.join(flags)}, not for {kinds[0]}")
    require(os.access(output.parent, os.W_OK), f"--output: folder {output.parent} cannot be written")


def _warn_of_chance(output: Path, dataset: Dataset, display: Display) -> None:
    with TeacherFile(output) as file:
        file.check(dataset)
        if file.by_chance():
            display.show(
                "warning",
                "this teacher knows no more of the labels than chance; look at its weights, the order of its classes, "
                "--mean, --std, --layout, --resize, --input-dtype and --logits",
            )
