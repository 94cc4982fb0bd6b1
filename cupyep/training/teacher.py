"""Teachers for knowledge distillation: train one by backpropagation, export a teacher's logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import Device
from cupyep.data import VIEWS, Dataset, Loader, TeacherWriter
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.learning import Backpropagation
from cupyep.models import Architecture, architecture
from cupyep.network import Network
from cupyep.training.build import build_network, build_trainer, feature_name
from cupyep.training.config import TrainConfig
from cupyep.training.display import Display
from cupyep.training.run_directory import CONFIG, PREVIOUS, RunDirectory
from cupyep.training.trainer import Trainer

# What a teacher has in common with its student ...
SHARED = (
    "arch",
    "width",
    "pooling",
    "weights",
    "readout_pool",
    "dataset",
    "data_dir",
    "image_size",
    "limit_train",
    "limit_test",
    "validation",
    "test_fraction",
    "class_weights",
    "crop",
    "flip",
    "batch_size",
    "seed",
    "device",
    "scratch_mb",
    "checkpoint_minutes",
    "on_divergence",
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
    followed has those of the student, one of blocks the gain of its architecture.
    """
    own: dict[str, Any] = {} if architecture(config.arch).gains == Architecture.gains else {"gain": None}
    own |= {"activation": config.activation, "gain": None} if config.teacher_features else {}
    return TrainConfig(**{**config.take(*SHARED), **TEACHER_SETTINGS, **own}, epochs=config.teacher_epochs)


def train_teacher(
    config: TrainConfig,
    dataset: Dataset,
    device: Device | str = "auto",
    display: Display | None = None,
    path: Path | None = None,
) -> Network:
    """Train a teacher by backpropagation and return its network.

    Parameters
    ----------
    config : TrainConfig
        Of the teacher itself, as `teacher_config` gives it.
    dataset : Dataset
    device, display
        See `Trainer`.
    path : Path, optional
        Run directory; the training that was broken off there goes on. Without one nothing is written.

    Raises
    ------
    Interrupted
        If a signal came; with a run directory, the training has been saved.
    CheckpointError
        If the run directory cannot be written, or what lies there is of no use.
    """
    network = build_network(config, dataset, device)
    trainer = build_trainer(config, dataset, network, display=display)
    if path is not None:
        _take_up(trainer, path, config)
    if trainer.epochs_done < trainer.epochs:
        trainer.run()
    return network


def _take_up(trainer: Trainer, path: Path, config: TrainConfig) -> None:
    """Give `trainer` the run directory `path`, and what a training that was broken off there has done."""
    if not (path / CONFIG).is_file():
        if path.exists():  # killed while it was made
            shutil.rmtree(path)
        trainer.directory = RunDirectory.create(path, config)
        return
    try:
        trainer.directory = RunDirectory.open(path)
        trainer.directory.config = config  # a checkpoint of another teacher is refused
        problem = trainer.restore()
    except (CheckpointError, ConfigurationError) as error:
        raise CheckpointError(f"{error}; remove '{path}' to train the teacher anew") from error
    if problem:
        trainer.display.show("warning", f"{problem}; going on from {PREVIOUS}")
    trainer.display.show("note", f"going on in {path} after epoch {trainer.epochs_done} of {trainer.epochs}")
    if trainer.epochs_done == trainer.epochs:
        trainer.directory.unlock()


def feedforward(network: Network, layers: Sequence[int] = ()) -> Callable[[Any], Any]:
    """Return the function from images (B, H, W, C) to the logits (B, classes) that `network` gives without settling.

    With `layers` it returns a pair, as `export_logits` takes it: logits, and the activations by `feature_name`.
    """
    learner = Backpropagation(network)

    def predict(images: Any) -> Any:
        state = learner.settled(network.batch(images))
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
