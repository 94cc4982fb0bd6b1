"""The teacher that ``--aug kd`` trains when none is given, kept in the cache; the teacher that a run keeps with it.

A run holds the teacher that it started with, ``teacher.h5``, and in ``teacher.sha256`` its checksum, as ``sha256sum``
writes it: it goes on with this one and no other, whatever became of cache and data folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cupyep._version import __version__
from cupyep.backend import Device
from cupyep.data import Dataset, cache_directory, data_directory
from cupyep.data.images import add_to_digest
from cupyep.errors import CheckpointError, Interrupted, TeacherError, reporting
from cupyep.files import FolderLock, can_write, link, read_text, remove_leftovers, replacing, write_file
from cupyep.models import slug
from cupyep.network import Network
from cupyep.training.build import feature_name, signal_layers
from cupyep.training.config import TrainConfig
from cupyep.training.display import Display
from cupyep.training.interruption import Interruptions
from cupyep.training.teacher import SHARED, TEACHER_SETTINGS, export_logits, feedforward, teacher_config, train_teacher

# To what becomes of a teacher, beside the images that it is trained on.
NO_MATTER = {"device", "scratch_mb", "data_dir", "checkpoint_minutes", "on_divergence", "dataset", "test_fraction"}
WAIT_S = 1.0
KEPT, CHECKSUM = "teacher.h5", "teacher.sha256"  # in the folder of a run


def teacher_path(config: TrainConfig, dataset: Dataset) -> Path:
    """Return where the teacher file for the student `config` is kept if none is given.

    It lies in the folder ``teachers`` of the cache (`cache_directory`), or of the data folder, where they were kept in
    earlier versions, if it is found there. Its name holds a hash of all that determines it: options, images, labels and
    the version of cupyep.
    """
    own = teacher_config(config)
    digest = _digest(own, dataset, config.signal_layers if config.teacher_features else "")
    name = Path("teachers") / f"{slug(own.arch)}-{slug(dataset.name)}-{digest}.h5"
    old = data_directory(config.data_dir) / name
    return old if old.is_file() else cache_directory() / name


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


def kept_teacher(run: Path, others: Sequence[Path] = ()) -> Path | None:
    """Return the file of the teacher that the run in the folder `run` started with; None if the run does not tell.

    It may be in one of `others`, should the run's own copy be gone; `TeacherError` if none has the run's checksum.
    """
    if not (run / CHECKSUM).is_file():
        return None
    places = [run / KEPT, *others]
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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached_teacher(
    config: TrainConfig,
    dataset: Dataset,
    device: Device | str = "auto",
    display: Display | None = None,
) -> Path:
    """Return the teacher file for the student `config`, training the teacher first where `teacher_path` has none.

    The training is a run of its own, in the folder beside the file that is called like it. It survives like any run:
    whoever asks for the same teacher again goes on with it, and the folder goes when the file is there.

    Raises
    ------
    Interrupted
        If a signal came; the training has been saved.
    TeacherError, CheckpointError
        If no teacher can be kept there.
    """
    path, display = teacher_path(config, dataset), (display or Display()).about("teacher")
    folder = path.with_suffix("")
    if path.is_file():
        display.show("note", f"{path} from an earlier run")
    else:
        if not can_write(path.parent):
            raise TeacherError(
                f"cannot keep a teacher in {path.parent}: no permission, or a file on the way to it; name another "
                "folder by CUPYEP_CACHE, or give a --teacher made by tools/export_teacher_logits.py"
            )
        with _alone(folder, display):
            if path.is_file():
                display.show("note", f"{path} from an earlier run")
            else:
                _make_teacher(config, dataset, device, display, path)
    shutil.rmtree(folder, ignore_errors=True)  # nobody needs it now; another process may be removing it
    return path


@contextlib.contextmanager
def _alone(folder: Path, display: Display) -> Iterator[None]:
    """Make `folder` and keep other processes out of it; wait for one that is there."""
    lock, told = FolderLock(folder), False
    with Interruptions() as interruptions:
        while holder := _acquire(lock, folder):
            if not told:
                display.show("note", f"waiting for {holder}, which trains the same one")
                told = True
            time.sleep(WAIT_S)
            interruptions.check()
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FolderLock, folder: Path) -> str:
    """Take `lock` in `folder`; return ``""``, or who else holds it."""
    with reporting(TeacherError, f"cannot keep a teacher in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)  # whoever held it has removed it
        return lock.acquire()


def _make_teacher(config: TrainConfig, dataset: Dataset, device: Device | str, display: Display, path: Path) -> None:
    """Train the teacher of the student `config`, or go on with its training, and write its file to `path`."""
    own, folder = teacher_config(config), path.with_suffix("")
    display.show("note", f"none given, so {own.arch} is trained by backpropagation for {own.epochs} epochs first")
    remove_leftovers(folder)
    try:
        network = train_teacher(own, dataset, device, display, folder / "run")
        layers = signal_layers(config, network) if config.teacher_features else []
        _export(network, layers, dataset, folder / path.name, own, display)
    except Interrupted as error:
        raise type(error)(f"{error} while the teacher is trained; the same command goes on", error.number) from None
    os.replace(folder / path.name, path)
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
        for array in (split.images, split.labels):
            add_to_digest(digest, array)
    return digest.hexdigest()[:12]
