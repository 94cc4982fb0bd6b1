"""Teachers for knowledge distillation: trained by backpropagation, exported, kept in the cache and with a run.

A run holds the teacher that it started with, ``teacher.h5``, and in ``teacher.sha256`` its checksum, as ``sha256sum``
writes it: it goes on with this one and no other, whatever became of the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.backend import Device
from cupyep.data import VIEWS, Dataset, Loader, TeacherWriter, cache_directory
from cupyep.data.images import add_to_digest
from cupyep.errors import CheckpointError, ConfigurationError, Interrupted, TeacherError, reporting
from cupyep.files import FolderLock, can_write, link, read_text, remove_leftovers, replacing, write_file
from cupyep.learning import Backpropagation
from cupyep.models import Architecture, architecture, slug
from cupyep.network import Network
from cupyep.parallel import Communicator
from cupyep.persistence import hdf5
from cupyep.training.build import build_network, build_trainer, feature_name, signal_layers
from cupyep.training.config import MACHINE, TrainConfig
from cupyep.training.display import Display
from cupyep.training.interruption import Interruptions
from cupyep.training.run_directory import CONFIG, RunDirectory
from cupyep.training.sharing import run_directory
from cupyep.training.trainer import Trainer

# What a teacher has in common with its student ...
SHARED = (
    "arch", "width", "pooling", "weights", "readout_pool", "dataset", "data_dir", "image_size", "limit_train",
    "limit_test", "validation", "test_fraction", "class_weights", "crop", "flip", "cutout", "batch_size", "seed",
    "device", "scratch_mb", "checkpoint_minutes", "on_divergence",
)  # fmt: skip
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
# To what becomes of a teacher, beside the images that it is trained on.
NO_MATTER = {*MACHINE, "checkpoint_minutes", "on_divergence", "dataset", "test_fraction"}
WAIT_S = 1.0
KEPT, CHECKSUM = "teacher.h5", "teacher.sha256"  # in the folder of a run


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
    communicator: Communicator | None = None,
) -> Network:
    """Train a teacher by backpropagation and return its network.

    Parameters
    ----------
    config : TrainConfig
        Of the teacher itself, as `teacher_config` gives it.
    dataset : Dataset
    device, display, communicator : optional
        As in `Trainer`.
    path : path, optional
        Run directory; a training that was broken off there goes on. Without one nothing is written.

    Returns
    -------
    Network

    Raises
    ------
    Interrupted
        If a signal came; with a run directory, the training has been saved.
    CheckpointError
        If the run directory cannot be written, or what lies there is of no use.
    """
    network = build_network(config, dataset, device)
    trainer = build_trainer(config, dataset, network, display=display, communicator=communicator)
    if path is not None:
        _take_up(trainer, path, config)
        names = trainer.outlook.smaller  # of the run that it is for
        trainer.outlook.smaller = ["--teacher-epochs" if name == "--epochs" else name for name in names]
    if trainer.epochs_done < trainer.epochs:
        trainer.run()
    return network


def _take_up(trainer: Trainer, path: Path, config: TrainConfig) -> None:
    """Give `trainer` the run directory `path`, and what a training that was broken off there has done."""
    ranks = trainer.communicator

    def create() -> RunDirectory:
        if path.exists():  # killed while it was made
            shutil.rmtree(path)
        return RunDirectory.create(path, config)

    if not ranks.first((path / CONFIG).is_file):
        trainer.directory = run_directory(create, ranks)
        return
    try:
        trainer.directory = run_directory(lambda: RunDirectory.open(path), ranks)
        trainer.directory.config = config  # a checkpoint of another teacher is refused
        trainer.restore()
    except (CheckpointError, ConfigurationError) as error:
        raise CheckpointError(f"{error}; remove '{path}' to train the teacher anew") from error
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
        Takes normalised images (B, H, W, C), float32 on `device`, and returns raw logits (B, classes); with `features`
        the pair of logits and a dict of activations (B, *shape).
    dataset : Dataset
        One that forbids mirrored images gets the identity view only.
    path : path
        What is there stays until the new file is complete.
    teacher : str
        What made the logits, in free text.
    features : mapping of str to (H, W, C), optional
        Shapes of the activations by name that are to be written too.
    device : Device or str
    batch_size : int
        Images at a time.
    display : Display, optional
        Shows progress.

    Returns
    -------
    dict of str to float
        Accuracy of each split, in [0, 1].

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

    It lies in the folder ``teachers`` of the cache (`cache_directory`). Its name holds a hash of all that determines
    it: options, images, labels and the version of cupyep.
    """
    own = teacher_config(config)
    digest = _digest(own, dataset, config.signal_layers if config.teacher_features else "")
    return cache_directory() / "teachers" / f"{slug(own.arch)}-{slug(dataset.name)}-{digest}.h5"


def keep_teacher(path: Path, run: Path) -> None:
    """Keep the teacher file `path` with the run in the folder `run`, unless it is the run's own already."""
    kept = run / KEPT
    with reporting(CheckpointError, f"cannot keep the teacher in '{run}'"):
        if path != kept:
            with replacing(kept) as temporary:
                if os.access(path, os.W_OK):
                    link(path.resolve(), temporary)
                else:  # a link would be as hard to write, and to remove
                    shutil.copyfile(path, temporary)
        write_file(run / CHECKSUM, f"{_checksum(kept)}  {KEPT}\n".encode())


def kept_teacher(run: Path, other: Path) -> Path | None:
    """Return the file of the teacher that the run in the folder `run` started with; None if the run does not tell.

    It may be the `other`, should the run's own copy be gone; `TeacherError` if none has the run's checksum.
    """
    if not (run / CHECKSUM).is_file():
        return None
    places = [run / KEPT, other]
    found = next((path for path in places if path.is_file() and is_teacher_of(run, path)), None)
    if found is None:
        raise TeacherError(
            f"the teacher that the run in '{run}' started with is none of {', '.join(map(str, places))} (by its "
            f"checksum in {CHECKSUM}); put it there as {KEPT}, or start a new run"
        )
    return found


def is_teacher_of(run: Path, path: Path) -> bool:
    """Return whether `path` is the teacher file that the run in the folder `run` started with, as far as it tells."""
    if not (run / CHECKSUM).is_file():
        return True
    with reporting(TeacherError, f"cannot read the teacher of '{run}', or its checksum"):
        return read_text(run / CHECKSUM, 1 << 10, errors="replace").split(" ")[0] == _checksum(path)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hdf5.checksum(file)


def cached_teacher(
    config: TrainConfig,
    dataset: Dataset,
    device: Device | str = "auto",
    display: Display | None = None,
    communicator: Communicator | None = None,
) -> Path:
    """Return the teacher file for the student `config`, training the teacher first where `teacher_path` has none.

    The training is a run of its own, in the folder beside the file that is called like it. It survives like any run:
    whoever asks for the same teacher again goes on with it, and the folder goes when the file is there.

    With a `communicator` all its ranks train it together, and rank 0 keeps it. `Interrupted` if a signal came; the
    training has been saved. `TeacherError` or `CheckpointError` if no teacher can be kept there.
    """
    ranks, display = communicator or Communicator(), (display or Display()).about("teacher")
    path = ranks.first(lambda: teacher_path(config, dataset))
    folder = path.with_suffix("")
    there = ranks.first(path.is_file)
    if not there:
        if not ranks.first(lambda: can_write(path.parent)):
            raise TeacherError(
                f"cannot keep a teacher in {path.parent}: no permission, or a file on the way to it; name another "
                "folder by CUPYEP_CACHE, or give a --teacher made by cupyep teacher"
            )
        with _alone(folder, display, ranks):
            there = ranks.first(path.is_file)
            if not there:
                _make_teacher(config, dataset, device, display, path, ranks)
    if there:
        display.show("note", f"{path} from an earlier run")
    # Nobody needs it now; another process may be removing it.
    ranks.first(lambda: shutil.rmtree(folder, ignore_errors=True))
    return path


@contextlib.contextmanager
def _alone(folder: Path, display: Display, ranks: Communicator) -> Iterator[None]:
    """Make `folder` and keep processes other than `ranks` out of it; wait for one that is there."""
    lock = FolderLock(folder)
    ranks.first(lambda: _wait_for(lock, folder, display))
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: FolderLock, folder: Path, display: Display) -> None:
    told = False
    with Interruptions() as interruptions:
        while True:
            with reporting(TeacherError, f"cannot keep a teacher in {folder}"):
                folder.mkdir(parents=True, exist_ok=True)  # whoever held it has removed it
                holder = lock.acquire()
            if not holder:
                return
            if not told:
                display.show("note", f"waiting for {holder}, which trains the same one")
                told = True
            time.sleep(WAIT_S)
            interruptions.check()


def _make_teacher(
    config: TrainConfig, dataset: Dataset, device: Device | str, display: Display, path: Path, ranks: Communicator
) -> None:
    """Train the teacher of the student `config`, or go on with its training, and write its file to `path`."""
    own, folder = teacher_config(config), path.with_suffix("")
    display.show("note", f"none given, so {own.arch} is trained by backpropagation for {own.epochs} epochs first")
    ranks.first(lambda: remove_leftovers(folder))
    try:
        network = train_teacher(own, dataset, device, display, folder / "run", ranks)
        layers = signal_layers(config, network) if config.teacher_features else []
        ranks.first(lambda: _export(network, layers, dataset, folder / path.name, own, display))
    except Interrupted as error:
        raise type(error)(f"{error} while the teacher is trained; the same command goes on", error.number) from None
    ranks.first(lambda: os.replace(folder / path.name, path))
    display.show("note", f"kept in {path}")


def _export(
    network: Network, layers: Sequence[int], dataset: Dataset, path: Path, config: TrainConfig, display: Display
) -> None:
    """Write the teacher file of a network that was trained with `config`, unless a signal comes."""
    text = f"{config.arch} trained by backpropagation, {config.epochs} epochs, cupyep {__version__}"
    features = {feature_name(n): network.state_shapes[n - 1] for n in layers}
    predict = feedforward(network, layers)
    with Interruptions() as interruptions:

        def predict_or_stop(images: Any) -> Any:
            interruptions.check()
            return predict(images)

        export_logits(
            predict_or_stop, dataset, path, teacher=text, features=features, device=network.device, display=display
        )


def _digest(config: TrainConfig, dataset: Dataset, features: str) -> str:
    options = config.take(*sorted({*SHARED, *TEACHER_SETTINGS, "epochs"} - NO_MATTER))
    digest = hashlib.sha256(json.dumps([__version__, dataset.name, options, features], sort_keys=True).encode())
    for split in (dataset.train, dataset.test):
        add_to_digest(digest, split.images, split.labels)
    return digest.hexdigest()[:12]
