#!/usr/bin/env python3
"""Export a teacher's logits for a data set, in both views, to a teacher file for knowledge distillation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from cupyep import __version__
from cupyep.backend import get_device
from cupyep.cli import OneLineErrors, config_options
from cupyep.data import Dataset
from cupyep.errors import ConfigurationError, TeacherError, require
from cupyep.training.build import build_dataset
from cupyep.training.config import make_config
from cupyep.training.teacher import export_logits, feedforward, teacher_config, train_teacher

EXAMPLES = """\b
Examples:
  export_teacher_logits.py --dataset cifar10 --onnx resnet.onnx --output teacher.h5
  export_teacher_logits.py --dataset cifar10 --torch mymodels:resnet18 --weights resnet18.pt --output teacher.h5
  export_teacher_logits.py --dataset cifar10 --train-bp vgg7 --epochs 30 --output teacher.h5
"""
Predict = Callable[[np.ndarray], np.ndarray]


def onnx_predictor(path: Path, layout: str) -> Predict:
    """Return the function from images (B, H, W, C) to logits (B, classes) of an ONNX model.

    Raises
    ------
    ConfigurationError
        If onnxruntime is not installed.
    TeacherError
        If the file is no model that onnxruntime can run, with one image input.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigurationError('--onnx needs onnxruntime: pip install "cupyep[teacher]"') from None
    require(path.is_file(), f"--onnx: there is no file {path}")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TeacherError(f"{path} is not an ONNX model that can be run: {error}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise TeacherError(f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); one is needed")
    name, first, size = inputs[0].name, outputs[0].name, inputs[0].shape[0]

    def predict(images: np.ndarray) -> np.ndarray:
        images = _laid_out(images, layout)
        # A model exported for a fixed batch gets that many images at a time, the last ones padded.
        step = size if isinstance(size, int) else len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), part.dtype)])
            try:
                parts.append(session.run([first], {name: padded})[0][: len(part)])
            except Exception as error:  # as above
                raise TeacherError(f"{path} cannot run on images of shape {padded.shape}: {error}") from None
        return np.concatenate(parts)

    return predict


def torch_predictor(factory: str, weights: Path, layout: str, device: str) -> Predict:
    """Return the function from images (B, H, W, C) to logits (B, classes) of a PyTorch module.

    Parameters
    ----------
    factory : str
        ``package.module:callable``; called without arguments it returns the module.
    weights : path
        A state dict; loaded with ``weights_only=True``, which runs no code from the file.
    """
    try:
        import torch
    except ImportError:
        raise ConfigurationError("--torch needs PyTorch, which is yours to install (https://pytorch.org)") from None
    model = _call_factory(factory)
    require(weights.is_file(), f"--weights: there is no file {weights}")
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises pickle, runtime, key and zip errors here
        raise TeacherError(f"{weights} does not hold the weights of {factory}: {error}") from None
    target = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model = model.to(target).eval()

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(_laid_out(images, layout)).to(target)).float().cpu().numpy()

    return predict


def _call_factory(factory: str) -> Any:
    module, colon, name = factory.partition(":")
    require(bool(module and colon and name), f"--torch takes package.module:factory, not '{factory}'")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"--torch {factory}: {error}; run from the folder that holds {module}.py") from None
    finally:
        sys.path.pop(0)


def _laid_out(images: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if layout == "nchw" else images)


def renormalized(predict: Predict, dataset: Dataset, mean: list[float] | None, std: list[float] | None) -> Predict:
    """Return `predict` for images normalised by the data set's own statistics, given a model that wants others."""
    if mean is None and std is None:
        return predict
    channels = dataset.image_shape[2]
    mean = np.zeros(channels) if mean is None else np.asarray(mean)
    std = np.ones(channels) if std is None else np.asarray(std)
    require(
        len(mean) == channels and len(std) == channels and (std > 0).all(),
        f"--mean and --std need {channels} numbers each, one a channel, --std positive",
    )
    scale = (dataset.std / std).astype(np.float32)
    shift = ((dataset.mean - mean) / std).astype(np.float32)
    return lambda images: predict(images * scale + shift)


@click.command(cls=OneLineErrors, epilog=EXAMPLES)
@config_options(("dataset", "data_dir", "image_size", "limit_train", "limit_test", "batch_size", "seed", "device"))
@click.option("--onnx", type=click.Path(path_type=Path), help="Teacher: an ONNX model, images in, logits out.")
@click.option("--torch", "factory", metavar="PACKAGE.MODULE:FACTORY", help="Teacher: the PyTorch module this returns.")
@click.option("--weights", type=click.Path(path_type=Path), help="State dict for --torch (loaded as weights only).")
@click.option("--train-bp", metavar="ARCH", help="Teacher: train this architecture by backpropagation first.")
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="Epochs of --train-bp.")
@click.option("--width", type=float, default=1.0, show_default=True, help="Channel multiplier of --train-bp.")
@click.option(
    "--layout",
    type=click.Choice(("nchw", "nhwc")),
    default="nchw",
    show_default=True,
    help="Axis order that an ONNX or PyTorch teacher expects.",
)
@click.option("--mean", help="Means, comma separated, that the teacher was trained with.  [default: the data set's]")
@click.option("--std", help="Standard deviations likewise; with --mean 0,0,0 --std 1,1,1 pixels are in [0, 1].")
@click.option("--teacher-name", help="Free text kept in the file.  [default: what was exported]")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The teacher file to write (HDF5).")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(onnx, factory, weights, train_bp, epochs, width, layout, mean, std, teacher_name, output, quiet, **options):
    """Write the logits of a teacher for every image of a data set, as it is and mirrored.

    The teacher is one of --onnx, --torch with --weights, --train-bp.
    """
    given = {name: value for name, value in options.items() if value is not None}
    require(
        sum(choice is not None for choice in (onnx, factory, train_bp)) == 1,
        "name one teacher: --onnx FILE, or --torch PACKAGE.MODULE:FACTORY with --weights FILE, or --train-bp ARCH",
    )
    require((factory is None) == (weights is None), "--torch and --weights go together")
    require(output.parent.is_dir(), f"--output: there is no folder {output.parent}")
    arch = {} if train_bp is None else {"arch": train_bp, "width": width, "teacher_epochs": epochs}
    config = make_config({}, given | arch)
    dataset = build_dataset(config)
    if train_bp is not None:
        network = train_teacher(teacher_config(config), dataset, config.device, quiet, click.echo)
        predict, name = feedforward(network), f"{train_bp} trained by backpropagation, {epochs} epochs"
        device = network.device
    else:
        device = get_device("cpu")  # the loader's; the model itself may run elsewhere
        if onnx is not None:
            predict, name = onnx_predictor(onnx, layout), onnx.name
        else:
            predict, name = torch_predictor(factory, weights, layout, config.device), f"{factory} with {weights.name}"
        predict = renormalized(predict, dataset, _numbers("--mean", mean), _numbers("--std", std))
    name = teacher_name or f"{name}, cupyep {__version__}"
    accuracy = export_logits(
        predict, dataset, output, teacher=name, device=device, batch_size=config.batch_size, quiet=quiet
    )
    click.echo(f"{output}: train accuracy {accuracy['train']:.2%}, test accuracy {accuracy['test']:.2%}")


def _numbers(flag: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{flag} takes numbers with commas between them, not '{text}'") from None


if __name__ == "__main__":
    main()
