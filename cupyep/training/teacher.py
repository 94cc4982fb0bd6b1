"""Teachers for knowledge distillation: train one by backpropagation, export a teacher's logits, cache both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.backend import Device
from cupyep.data import VIEWS, Dataset, Loader, TeacherFile, TeacherWriter, data_directory
from cupyep.errors import TeacherError
from cupyep.files import can_write
from cupyep.learning import Backpropagation
from cupyep.network import Network
from cupyep.training.build import build_network, build_trainer, feature_name
from cupyep.training.config import TrainConfig, parse_layers
from cupyep.training.display import Display

# What a teacher has in common with its student ...
SHARED = (
    "arch",
    "width",
    "pooling",
    "dataset",
    "data_dir",
    "image_size",
    "limit_train",
    "limit_test",
    "validation",
    "crop",
    "flip",
    "batch_size",
    "seed",
    "device",
)
# ... and what not: it is trained feed-forward. This project's own choice: of VGG-7 teachers at one
# eighth width (5000 CIFAR-10 images, 10 epochs) those with ReLU or ReLU6 were 3 points better than with a hard sigmoid.
TEACHER_SETTINGS = {
    "algorithm": "bp",
    "loss": "cross_entropy",
    "activation": "relu",
    "gain": 1.4,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
}


def teacher_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration of the teacher that ``--aug kd`` trains for the student `config`.

    The same architecture, width, images, seed, batches and augmentation (`SHARED`), but feed-forward
    (`TEACHER_SETTINGS`), for ``teacher_epochs`` epochs; everything else as by default. A teacher whose activations are
    followed has those of the student.
    """
    shared = {name: getattr(config, name) for name in SHARED}
    own = {"activation": config.activation, "gain": None} if config.teacher_features else {}
    return TrainConfig(**{**shared, **TEACHER_SETTINGS, **own}, epochs=config.teacher_epochs)


def train_teacher(
    config: TrainConfig,
    dataset: Dataset,
    device: Device | str = "auto",
    display: Display | None = None,
) -> Network:
    """Train a teacher by backpropagation and return its network.

    Parameters
    ----------
    config : TrainConfig
        Of the teacher itself, as `teacher_config` gives it.
    dataset : Dataset
    device, display
        See `Trainer`.
    """
    network = build_network(config, dataset, device)
    build_trainer(config, dataset, network, display=display).run()
    return network


def feedforward(network: Network, layers: Sequence[int] = ()) -> Callable[[Any], Any]:
    """Return the function from images (B, H, W, C) to the logits (B, classes) that `network` gives without settling.

    With `layers` it returns a pair, as `export_logits` takes it: logits, and the activations by `feature_name`.
    """
    learner = Backpropagation(network)

    def predict(images: Any) -> Any:
        state = learner.forward(network.batch(images))
        logits = network.outputs(state.layers[-1])
        return (logits, {feature_name(n): network.wide(state.layers[n - 1]) for n in layers}) if layers else logits

    return predict


def export_logits(
    predict: Callable[[Any], Any],
    dataset: Dataset,
    path: str | Path,
    *,
    teacher: str,
    features: Mapping[str, tuple[int, ...]] | None = None,
    device: Device | str = "cpu",
    batch_size: int = 256,
    display: Display | None = None,
) -> dict[str, float]:
    """Write a teacher file: the logits of every training and test image, in every view that the data set allows.

    Parameters
    ----------
    predict : callable
        Takes normalised images (B, H, W, C), float32 on `device`; returns raw logits (B, classes), with `features` the
        pair of them and a dict of activations (B, *shape) by name.
    dataset : Dataset
        Where it forbids mirrored images, only the identity view is written.
    path : path
        Replaced when the new file is complete.
    teacher : str
        What made the logits; free text.
    features : mapping of str to (H, W, C), optional
        Activations to be written too, and their shapes.
    batch_size : int
        Images that `predict` gets at a time.
    display : Display, optional

    Returns
    -------
    dict
        Accuracy per split, in [0, 1].

    Raises
    ------
    TeacherError
        If logits are not finite or of the wrong shape, or the file cannot be written.
    """
    views = VIEWS if dataset.flip else VIEWS[:1]
    total = len(views) * (len(dataset.train) + len(dataset.test))
    with (
        (display or Display()).progress("exporting logits", total) as progress,
        TeacherWriter(path, dataset=dataset, teacher=teacher, views=views, features=features) as writer,
    ):
        for split in ("train", "test"):
            loader, start = Loader(dataset, split, batch_size, device, np.float32), 0
            for batch in loader:
                for view in views:
                    images = batch.images if view == "identity" else batch.images[:, :, ::-1]
                    found = predict(images)
                    logits, maps = found if features else (found, {})
                    maps = {name: loader.device.to_numpy(values) for name, values in maps.items()}
                    writer.write(split, view, start, loader.device.to_numpy(logits), maps)
                    progress.advance(len(logits))
                start += len(batch)
    return writer.accuracy


def teacher_path(config: TrainConfig, dataset: Dataset) -> Path:
    """Return where the teacher file for the student `config` is kept if none is given.

    It lies in the folder ``teachers`` below the data folder; its name holds a hash of all that determines it: options,
    images, labels and the version of cupyep.
    """
    own = teacher_config(config)
    digest = _digest(own, dataset, config.signal_layers if config.teacher_features else "")
    return data_directory(config.data_dir) / "teachers" / f"{own.arch}-{own.dataset}-{digest}.h5"


def cached_teacher(
    config: TrainConfig,
    dataset: Dataset,
    device: Device | str = "auto",
    display: Display | None = None,
) -> Path:
    """Return the teacher file for the student `config`, training the teacher first where `teacher_path` has none."""
    own, display = teacher_config(config), (display or Display()).about("teacher")
    wanted, path = config.signal_layers if config.teacher_features else "", teacher_path(config, dataset)
    if path.is_file():
        with TeacherFile(path) as file:
            display.show("note", f"{path} from an earlier run, test accuracy {file.accuracy('test'):.2%}")
        return path
    if not can_write(path.parent):
        raise TeacherError(
            f"cannot keep a teacher in {path.parent}: no permission, or a file on the way to it; give another "
            "--data-dir, or a --teacher made by tools/export_teacher_logits.py"
        )
    display.show("note", f"none given, so {own.arch} is trained by backpropagation for {own.epochs} epochs first")
    network = train_teacher(own, dataset, device, display)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{own.arch} trained by backpropagation, {own.epochs} epochs, cupyep {__version__}"
    layers = parse_layers(wanted, network.depth) if wanted else []
    features = {feature_name(n): network.state_shapes[n - 1] for n in layers}
    predict = feedforward(network, layers)
    accuracy = export_logits(predict, dataset, path, teacher=text, features=features, device=device, display=display)
    display.show("note", f"test accuracy {accuracy['test']:.2%}, kept in {path}")
    return path


def _digest(config: TrainConfig, dataset: Dataset, features: str) -> str:
    settled = {*SHARED, *TEACHER_SETTINGS, "epochs"} - {"device", "data_dir"}
    options = {name: getattr(config, name) for name in sorted(settled)}
    digest = hashlib.sha256(json.dumps([__version__, options, features], sort_keys=True).encode())
    for split in (dataset.train, dataset.test):
        for array in (split.images, split.labels):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]
