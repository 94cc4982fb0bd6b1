"""What the command line does, as functions: start a run, resume one, evaluate one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import Device, get_device
from cupyep.data import Dataset
from cupyep.data.sources import absolute_name
from cupyep.errors import CheckpointError, require
from cupyep.files import expanded
from cupyep.initialization import lsuv
from cupyep.network import Network
from cupyep.parallel import Communicator
from cupyep.persistence.checkpoint import versions
from cupyep.signals import Augmenter
from cupyep.training.build import (
    build_dataset,
    build_network,
    build_signals,
    build_trainer,
    evaluation_batches,
    first_images,
    rest_batches,
)
from cupyep.training.config import OPTIONS, RESUME_OPTIONS, TrainConfig, option_name, require_used
from cupyep.training.display import Display
from cupyep.training.initial import load_initial
from cupyep.training.options import checked
from cupyep.training.results import at_rest, evaluate, rest_text
from cupyep.training.run_directory import RunDirectory, check_free, claim_path, default_path
from cupyep.training.sharing import check_same, run_directory
from cupyep.training.teacher import cached_teacher, is_teacher_of, keep_teacher, kept_teacher, teacher_path
from cupyep.training.trained import load_trained
from cupyep.training.trainer import Trainer

SHOWN_CLASSES = 10


def start_run(
    config: TrainConfig,
    path: str | Path | None = None,
    display: Display | None = None,
    communicator: Communicator | None = None,
) -> Trainer:
    """Prepare a new run; its directory is created when everything else is known to be in order.

    Parameters
    ----------
    config : TrainConfig
    path : path, optional
        Run directory; ``runs/<arch>-<aug>-<dataset>-seed<seed>``, numbered if taken, by default.
    display : Display, optional
        Shows what is going on.
    communicator : Communicator, optional
        Of several processes (`cupyep.parallel.join`) that all call this: rank 0 has the run directory.

    Returns
    -------
    Trainer
        Call its `run`.

    Raises
    ------
    CupyepError
        One clear line for whatever stands in the way.
    """
    ranks = communicator or Communicator()

    def create() -> RunDirectory:  # under a path that is free still: others may have started meanwhile
        return RunDirectory.create(claim_path(config) if path is None else path, config)

    with ranks.together():
        ranks.first(lambda: check_free(default_path(config) if path is None else path))
        trainer, teacher = prepare(config, display or Display(), ranks)
        trainer.directory = run_directory(create, ranks)
        if teacher:
            ranks.first(lambda: keep_teacher(teacher, trainer.directory.path))
    show_start(trainer, f"run directory {trainer.directory.path}")
    return trainer


def resume_run(
    path: str | Path,
    given: Mapping[str, Any],
    display: Display | None = None,
    stretch: bool = False,
    communicator: Communicator | None = None,
) -> Trainer:
    """Prepare to go on with a run where its last checkpoint left it.

    Parameters
    ----------
    path : path
        Run directory.
    given : mapping
        Options given now; only `RESUME_OPTIONS` may differ from the run's own.
    display, communicator : optional
        As in `start_run`; there may be more or fewer processes than before.
    stretch : bool
        Let learning rate and kappa of a run that had finished rise again, where more epochs stretch their schedules.

    Returns
    -------
    Trainer
        Call its `run`.

    Raises
    ------
    CupyepError
        One clear line for whatever stands in the way; a schedule that would be stretched without `stretch` is one.
    """
    ranks = communicator or Communicator()
    with ranks.together():
        directory = run_directory(lambda: _opened(path), ranks)
        epochs = directory.config.epochs
        _change_options(directory, given)
        ranks.first(lambda: _check_teacher(directory.path, given))
        trainer, teacher = prepare(directory.config, display or Display(), ranks, directory.path)
        trainer.directory = directory
        trainer.resume(lambda: _show_stretch(trainer, epochs, stretch))
        directory.write_config()
        if teacher:
            ranks.first(lambda: keep_teacher(teacher, directory.path))
    batch = f", batch {trainer.batches_done} of {len(trainer.train)}" if trainer.batches_done else ""
    show_start(trainer, f"resuming {path} after epoch {trainer.epochs_done} of {trainer.epochs}{batch}")
    return trainer


def _opened(path: str | Path) -> RunDirectory:
    if not Path(path).exists():
        raise CheckpointError(f"'{path}' is not a run directory: nothing is there; leave out --resume to start a run")
    return RunDirectory.open(path)


def _change_options(directory: RunDirectory, given: Mapping[str, Any]) -> None:
    """Take the options `given` over those of a run, where that may be."""
    for name, value in given.items():
        old = getattr(directory.config, name)
        value = checked(OPTIONS[name], value, option_name(name))  # as the run has it: a list of one is a number
        value = absolute_name(value) if name == "dataset" else value
        same = value == old or name in RESUME_OPTIONS
        allowed = ", ".join(map(option_name, RESUME_OPTIONS))
        require(same, f"{option_name(name)} {value} is not the run's {old}; a resumed run may only change {allowed}")
    directory.config = dataclasses.replace(directory.config, **given)
    require_used(given, vars(directory.config))


def _check_teacher(path: Path, given: Mapping[str, Any]) -> None:
    other = expanded(given.get("teacher") or "")
    same = not other.is_file() or is_teacher_of(path, other)
    require(same, f"--teacher {other} is not the one that the run started with; leave it out, or start a new run")


def _show_stretch(trainer: Trainer, epochs: int, asked: bool) -> None:
    """Say what other `epochs` than before do to the next step; refuse it after the last one unless `asked`."""
    text = stretch_text(trainer, epochs)
    if not text:
        return
    require(
        _done(trainer) < epochs or asked,
        f"the run has finished; {text}; add --stretch-schedule if that is what you want",
    )
    trainer.display.show("note" if asked else "warning", text)


def stretch_text(trainer: Trainer, epochs: int) -> str:
    """Return what other `epochs` than before do to the next step; empty if nothing."""
    done = _done(trainer)
    before, now = (trainer.schedules.values(done, total, trainer.halvings) for total in (epochs, trainer.epochs))
    if done == 0 or before == now:
        return ""
    parts = [f"{name.replace('_', ' ')} {_short(before[name])} -> {_short(now[name])}" for name in now if now[name]]
    return f"{trainer.epochs} epochs in place of {epochs} stretch the schedules: {', '.join(parts)}"


def _done(trainer: Trainer) -> float:
    return trainer.epochs_done + trainer.batches_done / len(trainer.train)


def _short(value: float | list[float]) -> str:
    return " ".join(f"{number:.3g}" for number in (value if isinstance(value, list) else [value]))


def show_start(trainer: Trainer, text: str) -> None:
    trainer.display.show(
        "start",
        text,
        run_dir=str(trainer.directory.path),
        epoch=trainer.epochs_done,
        batch=trainer.batches_done,
        epochs=trainer.epochs,
        batches=len(trainer.train),
        device=trainer.device.name,
        config=dataclasses.asdict(trainer.directory.config),
        versions=versions(),
    )


def evaluate_run(
    path: str | Path, which: str, given: Mapping[str, Any], display: Display | None = None, split: str = "test"
) -> list[str]:
    """Measure a trained network on a split of its data set; no images are augmented, the training images neither.

    Parameters
    ----------
    path : path
        Run directory.
    which : {"best", "last", "previous"}
        Checkpoint.
    given : mapping
        Options that are to differ from the run's.
    display : Display, optional
        Shows progress.
    split : {"test", "validation", "train"}

    Returns
    -------
    list of str
        Lines: what was measured; accuracy and loss, for 100 classes or more also the top-5 accuracy; unless it was
        trained by BP, `at_rest` of `REST_IMAGES` images.

    Raises
    ------
    CupyepError
        If run, checkpoint or data set cannot be read, or an option given has no effect.
    """
    run = load_trained(path, which, given)
    config = run.config
    dataset = run.dataset()
    batches = evaluation_batches(config, dataset, run.network, split)
    top = 5 if run.network.classes >= 100 else 0
    display = display or Display()
    loss, accuracy, *of_top = evaluate(run.learner, display.over(batches, f"{split} images"), top=top)
    chosen = f"best, chosen by {'test' if dataset.validation is None else 'validation'} accuracy"
    lines = [
        f"{config.arch} on the {len(batches.split)} {split} images of {config.dataset}, epoch {run.epoch} "
        f"({chosen if which == 'best' else which})",
        f"{split} accuracy {accuracy:.2%}, loss {loss:.4f}",
    ]
    lines[1] += "".join(f", top-{top} accuracy {fraction:.2%}" for fraction in of_top)
    if config.algorithm != "bp":
        few = rest_batches(config, dataset, run.network, split)
        lines.append(rest_text(at_rest(run.learner, few, watched=lambda shown: display.over(shown, "at rest"))))
    return lines


def prepare(
    config: TrainConfig,
    display: Display,
    ranks: Communicator,
    run: Path | None = None,
    dataset: Dataset | None = None,
    network: Network | None = None,
    signals: Sequence[Augmenter] = (),
) -> tuple[Trainer, Path | None]:
    """Return the trainer of `config`, without a run directory, and the file of its teacher; `run` is to go on.

    Data set and network are those of `config` unless given, signals too.
    """
    with ranks.together():
        name = ranks.own_device(config.device)
        device = get_device(name, config.scratch_mb) if network is None else network.device
        dataset = build_dataset(config) if dataset is None else dataset
    ranks.use(device)
    check_same(config, dataset, ranks)
    if network is None:
        network = build_network(config, dataset, device)
        if config.init_from and run is None:
            load_initial(network, expanded(config.init_from))
        elif config.lsuv and run is None:
            lsuv(network, first_images(dataset, network, config.batch_size))
    display.show("note", _headline(config, dataset, network))
    if counts := _unequal(dataset):
        display.show("note", counts)
    several = f"{ranks.size} ranks, " if ranks.size > 1 else ""
    display.show("note", f"{several}device {device.name}" + (f": {device.reason}" if device.reason else ""))
    if config.aug == "kd":
        # Whatever else is wrong is said before a teacher is trained; le takes the same layers and needs none.
        trial = copy.copy(config)  # of a network and images by any name
        trial.aug, trial.teacher = "le", None
        build_trainer(trial, dataset, network, build_signals(trial, network, dataset, None))
    teacher = _teacher(config, dataset, device, display, ranks, run)
    signals = signals or build_signals(config, network, dataset, teacher, display)
    return build_trainer(config, dataset, network, signals, display=display, communicator=ranks), teacher


def _teacher(
    config: TrainConfig, dataset: Dataset, device: Device, display: Display, ranks: Communicator, run: Path | None
) -> Path | None:
    if config.aug != "kd":
        return None

    given = expanded(config.teacher) if config.teacher else None
    if run is not None and (path := ranks.first(lambda: kept_teacher(run, given or teacher_path(config, dataset)))):
        return path
    return given or cached_teacher(config, dataset, device, display, ranks)


def _headline(config: TrainConfig, dataset: Dataset, network: Network) -> str:
    size = "x".join(map(str, dataset.image_shape))
    count = sum(p.size for p in network.parameters().values())
    held = f", {len(dataset.validation)} validation" if dataset.validation else ""
    return (
        f"{config.arch}, {count:,} parameters, {config.algorithm}, signals {config.aug}; "
        f"{config.dataset} {size}, {len(dataset.train)} training{held} and {len(dataset.test)} test images"
    )


def _unequal(dataset: Dataset) -> str:
    """Return how many training images there are of each class, where some classes have far more than others."""
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if counts.max() <= counts.min() + 1:
        return ""
    shown = [f"{dataset.classes[c]} {counts[c]}" for c in np.argsort(-counts, kind="stable")]
    if len(shown) > SHOWN_CLASSES:
        shown[SHOWN_CLASSES // 2 : -SHOWN_CLASSES // 2] = ["..."]
    return f"classes of unequal size: {', '.join(shown)} training images"
