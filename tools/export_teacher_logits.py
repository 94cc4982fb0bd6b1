#!/usr/bin/env python3
"""Export a teacher's logits for a data set, in both views, to a teacher file for knowledge distillation."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from cupyep import __version__
from cupyep.backend import get_device
from cupyep.cli.shared import FilePath, Names, Numbers, OneLineErrors, config_options
from cupyep.data import Dataset
from cupyep.errors import ConfigurationError, CupyepError, DeviceError, TeacherError, one_line, require
from cupyep.models import ARCHITECTURES, architecture
from cupyep.training.build import build_dataset
from cupyep.training.config import make_config, option_name
from cupyep.training.display import Display
from cupyep.training.teacher import export_logits, feedforward, teacher_config, train_teacher

EXAMPLES = """\b
Examples:
  export_teacher_logits.py --dataset cifar10 --onnx resnet.onnx --output teacher.h5
  export_teacher_logits.py --dataset cifar10 --torch mymodels:resnet18 --weights resnet18.pt --output teacher.h5
  export_teacher_logits.py --dataset cifar10 --train-bp vgg7 --epochs 30 --output teacher.h5
"""
# Options that would say nothing about another kind of teacher.
FOREIGN, OWN = ("--onnx", "--torch"), ("--train-bp",)
ONLY_WITH = {"layout": FOREIGN, "mean": FOREIGN, "std": FOREIGN, "weights": ("--torch",), "epochs": OWN, "width": OWN}
SHOWN = 4  # names of a kind in a message
DEPTH = 4  # wrappers around a state dict
# Where training programs keep the state dict in a checkpoint, and what wrappers of modules put before its names.
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
Predict = Callable[[np.ndarray], np.ndarray]


@contextlib.contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Turn whatever a model that is not ours raises into one line that begins with `what`."""
    try:
        yield
    except (CupyepError, MemoryError):
        raise
    except Exception as error:  # such code raises anything
        raise TeacherError(f"{what}: {one_line(error, 300)}") from error


def gpu_chosen(device: str, usable: bool, reason: str) -> bool:
    """Return whether a foreign model runs on the GPU, given the option ``--device`` and whether its library can.

    Raises
    ------
    ConfigurationError, DeviceError
        If there is no such device, or a GPU is asked for that the library cannot use for `reason`.
    """
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device)
    require(known is not None, f"unknown device '{device}' (choose from auto, cpu, cuda, cuda:N)")
    if device.startswith("cuda") and not usable:
        raise DeviceError(f"device '{device}' cannot be used for this teacher: {reason}; use --device cpu")
    return usable and device != "cpu"


def onnx_predictor(path: Path, layout: str, device: str) -> Predict:
    """Return the function from images (B, H, W, C) to logits (B, classes) of an ONNX model.

    Raises
    ------
    ConfigurationError
        If onnxruntime is not installed, or there is no such file or device.
    TeacherError
        If the file is no model that onnxruntime can run, with one image input.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigurationError('--onnx needs onnxruntime: pip install "cupyep[teacher]"') from None
    require(path.is_file(), f"--onnx: there is no file {path}")
    usable = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu_chosen(device, usable, "this onnxruntime was built without CUDA"):
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    with foreign_code(f"{path} is not an ONNX model that can be run"):
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise TeacherError(f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); one is needed")
    first = next((output.name for output in outputs if output.name == "logits"), outputs[0].name)
    name, size = inputs[0].name, (inputs[0].shape or [None])[0]

    def predict(images: np.ndarray) -> np.ndarray:
        images = _laid_out(images, layout)
        # A model exported for a fixed batch gets that many images at a time, the last ones padded.
        step = size if isinstance(size, int) else len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), part.dtype)])
            with foreign_code(f"{path} cannot run on images of shape {padded.shape}"):
                parts.append(np.asarray(session.run([first], {name: padded})[0], np.float32)[: len(part)])
        return np.concatenate(parts)

    return predict


def torch_predictor(factory: str, weights: Path, layout: str, device: str) -> Predict:
    """Return the function from images (B, H, W, C) to logits (B, classes) of a PyTorch module.

    Parameters
    ----------
    factory : str
        ``package.module:callable``; called without arguments it returns the module.
    weights : path
        A state dict, alone or in a checkpoint (`unwrapped`), of PyTorch or safetensors.

    Raises
    ------
    ConfigurationError
        If PyTorch is not installed, or there is no such factory, file or device.
    TeacherError
        If the module cannot be made, or the file does not hold its weights, or holds more than weights.
    """
    try:
        import torch
    except ImportError:
        raise ConfigurationError("--torch needs PyTorch, which is yours to install (https://pytorch.org)") from None
    require(weights.is_file(), f"--weights: there is no file {weights}")
    on_gpu = gpu_chosen(device, torch.cuda.is_available(), "PyTorch finds no CUDA device")
    model = _call_factory(factory)
    if not isinstance(model, torch.nn.Module):
        raise TeacherError(f"--torch {factory} returned {type(model).__name__}, not a torch.nn.Module")
    _load_weights(model, unwrapped(read_weights(weights), model.state_dict().keys(), weights), f"{weights}", factory)
    target = "cpu" if not on_gpu else "cuda" if device == "auto" else device
    with foreign_code(f"{factory} cannot be moved to {target}"):
        model = model.to(target).eval()

    def predict(images: np.ndarray) -> np.ndarray:
        images = _laid_out(images, layout)
        with foreign_code(f"{factory} cannot run on images of shape {images.shape}"), torch.inference_mode():
            return logits_of(model(torch.from_numpy(images).to(target)), factory).float().cpu().numpy()

    return predict


def logits_of(output: Any, factory: str) -> Any:
    """Return the logits in what a module returns: itself, or what is called ``logits`` in it, or the first of several.

    Raises
    ------
    TeacherError
        If there is no tensor in that place.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", next(iter(output.values())) if len(output) == 1 else None)
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not hasattr(found, "float"):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TeacherError(
            f"{factory} returns {type(output).__name__}{keys}; wanted: a tensor of logits, or something with 'logits'"
        )
    return found


def read_weights(path: Path) -> Any:
    """Return what a file of weights holds; no code in it is run.

    Raises
    ------
    ConfigurationError
        If it is a safetensors file and safetensors is not installed.
    TeacherError
        If it is damaged, or holds anything but tensors, numbers, texts and containers of them.
    """
    import torch

    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ConfigurationError(f"{path} needs safetensors: pip install safetensors") from None
        with foreign_code(f"{path} is not a readable safetensors file"):
            return load_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the refusal below says all
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, runtime errors; PyTorch's own text advises to trust the file
        named = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
        what = f" ({named[1] or named[2]})" if named else ""
        raise TeacherError(
            f"{path} is damaged or holds more than weights{what}; save them by torch.save(model.state_dict(), ...)"
        ) from error


def unwrapped(found: Any, names: Collection[str], path: Path) -> dict[str, Any]:
    """Return the state dict in `found`, a state dict or a checkpoint that holds one, for the parameters `names`.

    Prefixes that wrappers of modules put before every name are taken off, unless `names` have them, too.

    Raises
    ------
    TeacherError
        If there is no state dict; the message says what there is.
    """
    for _ in range(DEPTH):
        if isinstance(found, Mapping) and not found.keys() & set(names):
            found = next((found[key] for key in HOLDERS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not any(hasattr(value, "shape") for value in found.values()):
        holds = f"'{_few(found)}'" if isinstance(found, Mapping) else type(found).__name__
        raise TeacherError(f"{path} holds {holds} and no state dict (looked for below {', '.join(HOLDERS)})")
    state = {str(name): value for name, value in found.items() if name != "n_averaged"}  # of torch's AveragedModel
    for _ in range(DEPTH):
        if not state.keys() & set(names):
            prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), "")
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load_weights(model: Any, state: dict[str, Any], path: str, factory: str) -> None:
    """Give the module the weights; say, shortly, which do not fit."""
    with foreign_code(f"{path} does not hold the weights of {factory}"):
        wanted = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
        problems = {
            "missing": [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")],
            "unexpected": [n for n in state if n not in wanted],
            "of another shape": [
                f"{n} {tuple(state[n].shape)} for {tuple(shape)}"
                for n, shape in wanted.items()
                if shape is not None and n in state and state[n].shape != shape
            ],
        }
        texts = [f"{what}: {_few(names)}" for what, names in problems.items() if names]
        if texts:
            raise TeacherError(f"{path} does not hold the weights of {factory}; {'; '.join(texts)}")
        model.load_state_dict(state, strict=False)  # only counters of batches may be missing


def _few(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _call_factory(factory: str) -> Any:
    name, colon, attribute = factory.partition(":")
    require(
        bool(colon and attribute and all(part.isidentifier() for part in name.split("."))),
        f"--torch takes package.module:factory, not '{factory}'",
    )
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        with foreign_code(f"--torch {factory}"):
            try:
                call = getattr(importlib.import_module(name), attribute)
            except (ImportError, AttributeError) as error:
                text = f"--torch {factory}: {one_line(error)}; run from the folder that holds {name.split('.')[0]}"
                raise ConfigurationError(text) from error
            return call()
    finally:
        sys.path.remove(folder)


def _laid_out(images: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if layout == "nchw" else images)


def renormalized(predict: Predict, dataset: Dataset, mean: list[float] | None, std: list[float] | None) -> Predict:
    """Return `predict` for images normalised by the data set's own statistics, given a model that wants others."""
    channels = dataset.image_shape[2]
    for flag, numbers in (("--mean", mean), ("--std", std)):
        fits = numbers is None or (len(numbers) == channels and all(map(math.isfinite, numbers)))
        require(fits, f"{flag} needs {channels} numbers for {dataset.name}, one a channel (got {numbers})")
    require(std is None or min(std) > 0, f"--std must be above 0 (got {std})")
    if mean is None and std is None:
        return predict
    mean = dataset.mean if mean is None else np.asarray(mean)
    std = dataset.std if std is None else np.asarray(std)
    scale = (dataset.std / std).astype(np.float32)
    shift = ((dataset.mean - mean) / std).astype(np.float32)
    return lambda images: predict(images * scale + shift)


@click.command(cls=OneLineErrors, epilog=EXAMPLES)
@config_options(("dataset", "data_dir", "image_size", "limit_train", "limit_test", "batch_size", "seed", "device"))
@click.option("--onnx", type=FilePath(), help="Teacher: an ONNX model, images in, logits out.")
@click.option("--torch", metavar="PACKAGE.MODULE:FACTORY", help="Teacher: the PyTorch module that this returns.")
@click.option(
    "--weights",
    type=FilePath(),
    help="State dict for --torch, or a checkpoint or .safetensors file with it; no code in it is run.",
)
@click.option(
    "--train-bp",
    type=Names("--train-bp", ARCHITECTURES, architecture),
    help="Teacher: train this network by backpropagation first.",
)
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="Epochs of --train-bp.")
@click.option("--width", type=float, default=1.0, show_default=True, help="Channel multiplier of --train-bp.")
@click.option(
    "--layout",
    type=Names("--layout", ("nchw", "nhwc")),
    default="nchw",
    show_default=True,
    help="Axis order that an ONNX or PyTorch teacher expects.",
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
@click.option("--output", type=FilePath(), required=True, help="The teacher file to write (HDF5).")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(onnx, torch, weights, train_bp, epochs, width, layout, mean, std, teacher_name, output, quiet, given):
    """Write the logits of a teacher for every image of a data set, as it is and mirrored.

    The teacher is one of --onnx, --torch with --weights, --train-bp.
    """
    _check_usage({"--onnx": onnx, "--torch": torch, "--train-bp": train_bp}, weights, output)
    display = Display(quiet)
    arch = {} if train_bp is None else {"arch": train_bp, "width": width, "teacher_epochs": epochs}
    config = make_config(given, arch)
    if train_bp is not None:
        dataset = build_dataset(config)
        network = train_teacher(teacher_config(config), dataset, config.device, display)
        predict, device = feedforward(network), network.device
        name = f"{train_bp} trained by backpropagation, {epochs} epochs"
    else:
        if onnx is not None:
            predict, name = onnx_predictor(onnx, layout, config.device), onnx.name
        else:
            predict, name = torch_predictor(torch, weights, layout, config.device), f"{torch} with {weights.name}"
        dataset = build_dataset(config)
        predict = renormalized(predict, dataset, mean, std)
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


def _check_usage(teachers: dict[str, Any], weights: Path | None, output: Path) -> None:
    """Refuse, before anything is loaded, what cannot end well."""
    kinds = [flag for flag, value in teachers.items() if value is not None]
    require(
        len(kinds) == 1,
        "name one teacher: --onnx FILE, or --torch PACKAGE.MODULE:FACTORY with --weights FILE, or --train-bp ARCH",
    )
    require(kinds != ["--torch"] or weights is not None, "--torch needs --weights, the file of its state dict")
    for name, flags in ONLY_WITH.items():
        given = click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
        require(not given or kinds[0] in flags, f"{option_name(name)} is for {' and '.join(flags)}, not for {kinds[0]}")
    require(output.parent.is_dir(), f"--output: there is no folder {output.parent}")
    require(not output.is_dir(), f"--output: {output} is a folder")
    require(os.access(output.parent, os.W_OK), f"--output: folder {output.parent} cannot be written")


if __name__ == "__main__":
    main()
