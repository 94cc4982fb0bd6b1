"""Teachers for knowledge distillation that were trained elsewhere: ONNX models and PyTorch modules as functions."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyep import errors
from cupyep.data import Dataset
from cupyep.data.images import bilinear
from cupyep.errors import DeviceError, TeacherError, few, needing, require
from cupyep.plugins import imported, is_module_name, working_folder

SHOWN = 4  # names of a kind in a message
DEPTH = 4  # wrappers around a state dict
# Where training programs keep the state dict in a checkpoint, and what wrappers of modules put before its names.
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
SAFE_TORCH = (2, 6)  # in versions before, a crafted file runs code in spite of weights_only (CVE-2025-32434)
LAYOUTS = ("nchw", "nhwc")
# Kinds of images that models take, by what ONNX calls them.
ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}
DTYPES = tuple(ONNX_TYPES.values())
Predict = Callable[[np.ndarray], np.ndarray]
foreign_code = partial(errors.foreign_code, kind=TeacherError)


def gpu_chosen(device: str, usable: bool, reason: str) -> bool:
    """Return whether a foreign model runs on the GPU, given the option ``--device`` and whether its library can.

    `ConfigurationError` or `DeviceError` if there is no such device, or a GPU is asked for that the library cannot use
    for `reason`.
    """
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device)
    require(known is not None, f"unknown device '{device}' (choose from auto, cpu, cuda, cuda:N)")
    if device.startswith("cuda") and not usable:
        raise DeviceError(f"device '{device}' cannot be used for this teacher: {reason}; use --device cpu")
    return usable and device != "cpu"


@dataclass(frozen=True)
class Teacher:
    """A model that is not ours."""

    predict: Predict  # from images, as `fed` lays them out, to logits (B, classes)
    dtype: str = "float32"  # the images that it takes, of `DTYPES`, as far as it tells


def onnx_teacher(path: Path, device: str = "auto", chosen: str | None = None) -> Teacher:
    """Return the teacher in the file of an ONNX model.

    `device` is the option ``--device``; `chosen` is name or number, from 0, of the output with the logits, by default
    what is called logits, else the first. `ConfigurationError` if onnxruntime is not installed, or there is no such
    file, device or output; `TeacherError` if the file is no model that onnxruntime can run, with one image input.
    """
    with needing('--onnx needs onnxruntime: pip install "cupyep[teacher]"'):
        import onnxruntime
    require(path.is_file(), f"--onnx: there is no file {path}")
    usable = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu_chosen(device, usable, "this onnxruntime was built without CUDA"):
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    with foreign_code(f"{path} is not an ONNX model that can be run"):
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise TeacherError(f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); one is needed")
    name, size = inputs[0].name, (inputs[0].shape or [None])[0]
    first = "logits" if "logits" in outputs else outputs[0]
    if chosen is not None:
        number = None if chosen in outputs else _number(chosen, outputs)
        first = chosen if number is None else outputs[number]
    require(first in outputs, f"--logits: {path} has no output '{chosen}', but {few(outputs, SHOWN)}")

    def predict(images: np.ndarray) -> np.ndarray:
        # A model exported for a fixed batch gets that many images at a time, the last ones padded.
        step = size if isinstance(size, int) else len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), part.dtype)])
            with foreign_code(f"{path} cannot run on images of shape {padded.shape}"):
                parts.append(np.asarray(session.run([first], {name: padded})[0], np.float32)[: len(part)])
        return np.concatenate(parts)

    return Teacher(predict, ONNX_TYPES.get(inputs[0].type, "float32"))


def _number(chosen: str, outputs: Sequence[Any]) -> int | None:
    """Return which of some outputs is chosen by its number, None if none is."""
    is_number = chosen.isdecimal() and len(chosen) < 7 and int(chosen) < len(outputs)
    return int(chosen) if is_number else None


def torch_teacher(factory: str, weights: Path | None, device: str = "auto", chosen: str | None = None) -> Teacher:
    """Return the teacher that is a PyTorch module.

    The `factory` is a ``package.module:callable`` which, called without arguments, returns the module. `weights` are a
    state dict, alone or in a checkpoint (`unwrapped`), of PyTorch or safetensors; None if the factory loads its own.
    `device` and `chosen` are as in `onnx_teacher`; `chosen` may be a key or an attribute of what the module returns.

    `ConfigurationError` if PyTorch is not installed or not safe, or there is no such factory, file or device;
    `TeacherError` if the module cannot be made, or the file does not hold its weights, or holds more than weights.
    """
    with needing("--torch needs PyTorch, which is yours to install (https://pytorch.org)"):
        import torch
    require(weights is None or weights.is_file(), f"--weights: there is no file {weights}")
    on_gpu = gpu_chosen(device, torch.cuda.is_available(), "PyTorch finds no CUDA device")
    model = _call_factory(factory)
    if not isinstance(model, torch.nn.Module):
        raise TeacherError(f"--torch {factory} returned {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        state = unwrapped(read_weights(weights), model.state_dict().keys(), weights)
        _load_weights(model, state, f"{weights}", factory)
    target = "cpu" if not on_gpu else "cuda" if device == "auto" else device
    with foreign_code(f"{factory} cannot be moved to {target}"):
        model = model.to(target).eval()

    def predict(images: np.ndarray) -> np.ndarray:
        with foreign_code(f"{factory} cannot run on images of shape {images.shape}"), torch.inference_mode():
            return logits_of(model(torch.from_numpy(images).to(target)), factory, chosen).float().cpu().numpy()

    return Teacher(predict)


def logits_of(output: Any, factory: str, chosen: str | None = None) -> Any:
    """Return the logits in what a module returns.

    That is `chosen`, by key, attribute or number; else the output itself, or what is called ``logits`` in it, or the
    first of several.

    `TeacherError` if there is no tensor in that place.
    """
    found, wanted = output, "a tensor of logits, or something with 'logits'; or choose one by --logits"
    if chosen is not None:
        found, wanted = _part(output, chosen), f"something with --logits {chosen}"
    elif isinstance(output, Mapping):
        found = output.get("logits", next(iter(output.values())) if len(output) == 1 else None)
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not hasattr(found, "float"):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        keys = f" of {len(output)}" if isinstance(output, (tuple, list)) else keys
        raise TeacherError(f"{factory} returns {type(output).__name__}{keys}; wanted: {wanted}")
    return found


def _part(output: Any, chosen: str) -> Any:
    if isinstance(output, Mapping) and chosen in output:
        return output[chosen]
    several = list(output.values()) if isinstance(output, Mapping) else output
    parts = several if isinstance(several, (tuple, list)) else []
    number = _number(chosen, parts)
    return getattr(output, chosen, None) if number is None else parts[number]


def read_weights(path: Path) -> Any:
    """Return what a file of weights holds; no code in it is run.

    `ConfigurationError` if it is a safetensors file and safetensors is not installed, or another one and PyTorch could
    be made to run code in it; `TeacherError` if it is damaged, or holds anything but tensors, numbers, texts and
    containers of them.
    """
    import torch

    if path.suffix == ".safetensors":
        with needing(f"{path} needs safetensors: pip install safetensors"):
            from safetensors.torch import load_file
        with foreign_code(f"{path} is not a readable safetensors file"):
            return load_file(path)
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    require(
        version is not None and tuple(map(int, version.groups())) >= SAFE_TORCH,
        f"{path} could run code in PyTorch {torch.__version__} (CVE-2025-32434): update PyTorch to 2.6, or give a "
        ".safetensors file",
    )
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

    `TeacherError` if there is no state dict; the message says what there is.
    """
    for _ in range(DEPTH):
        if isinstance(found, Mapping) and not found.keys() & set(names):
            found = next((found[key] for key in HOLDERS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not any(hasattr(value, "shape") for value in found.values()):
        holds = f"'{few(found, SHOWN)}'" if isinstance(found, Mapping) else type(found).__name__
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
        texts = [f"{what}: {few(names, SHOWN)}" for what, names in problems.items() if names]
        if texts:
            raise TeacherError(f"{path} does not hold the weights of {factory}; {'; '.join(texts)}")
        model.load_state_dict(state, strict=False)  # only counters of batches may be missing


def _call_factory(factory: str) -> Any:
    name, colon, attribute = factory.partition(":")
    right = bool(colon and attribute and is_module_name(name))
    require(right, f"--torch takes package.module:factory, not '{factory}'")
    with working_folder(), foreign_code(f"--torch {factory}"):
        return imported(name, f"--torch {factory}", attribute)()


def fed(
    teacher: Teacher,
    dataset: Dataset,
    layout: str = "nchw",
    dtype: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Predict:
    """Return the function from a data set's normalised images (B, H, W, C) to the logits of a teacher.

    The teacher expects axes as `layout` says, "nchw" or "nhwc", and the type `dtype` of `DTYPES`, by default its own;
    ``uint8`` are the pixels as they are, from 0 to 255. `size` is height and width of the images that it takes, where
    they are others (`bilinear`); `mean` and `std` are the statistics of a channel that it was trained with, where they
    are not the data set's.
    """
    dtype = dtype or teacher.dtype
    scale, shift = _rescaling(dataset, dtype, mean, std)

    def predict(images: np.ndarray) -> np.ndarray:
        images = images * scale + shift
        images = images if size is None else bilinear(images, size)
        images = np.rint(images).clip(0, 255) if dtype == "uint8" else images
        images = images.transpose(0, 3, 1, 2) if layout == "nchw" else images
        return teacher.predict(np.ascontiguousarray(images, dtype))

    return predict


def _rescaling(
    dataset: Dataset, dtype: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift, float32 (C,), that make of images normalised by the data set those that are wanted."""
    channels = dataset.image_shape[2]
    for flag, numbers in (("--mean", mean), ("--std", std)):
        fits = numbers is None or (len(numbers) == channels and all(map(math.isfinite, numbers)))
        require(fits, f"{flag} needs {channels} numbers for {dataset.name}, one a channel (got {numbers})")
    require(std is None or min(std) > 0, f"--std must be above 0 (got {std})")
    if dtype == "uint8":
        require(dataset.unit == 255, f"images of {dataset.name} are floats: a teacher that takes uint8 cannot see them")
        require(mean is None and std is None, "a teacher that takes uint8 gets pixels as they are: no --mean, no --std")
        mean, std = [0.0] * channels, [1 / 255] * channels
    centre = dataset.mean if mean is None else np.asarray(mean)
    spread = dataset.std if std is None else np.asarray(std)
    return (dataset.std / spread).astype(np.float32), ((dataset.mean - centre) / spread).astype(np.float32)
