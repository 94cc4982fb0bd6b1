"""`fit`: a training in one call, from a network and a data set to a trained network and its history."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.activations import ACTIVATIONS
from cupyep.data import DATASETS, Dataset, TeacherFile
from cupyep.data.sources import absolute_name, is_own
from cupyep.errors import CheckpointError, choose, flag, instance, items, require, shown
from cupyep.errors import path as checked_path
from cupyep.network import Network
from cupyep.parallel import Communicator
from cupyep.signals import Augmenter
from cupyep.training.config import AUTO, OPTIONS, TrainConfig, make_config, require_used
from cupyep.training.display import Display
from cupyep.training.results import TrainSummary
from cupyep.training.run_directory import CONFIG, RunDirectory, check_free
from cupyep.training.runs import prepare, show_start, stretch_text
from cupyep.training.teacher import keep_teacher

OF_THE_NETWORK = {name for name, spec in OPTIONS.items() if spec.metadata["group"] == "Network"}
OF_THE_NETWORK |= {"device", "scratch_mb", "precision", "exact"}
OWN = "own"  # a network that no builder made
OF_THE_DATA = {"dataset", "data_dir", "image_size", "limit_train", "limit_test", "validation", "test_fraction"}
KEPT = ("data_dir", "plugin")  # of a run that the command line began, which asks for them again


@dataclass
class FitResult:
    """What `fit` returns.

    Attributes
    ----------
    network : Network
        The one that was given, trained; with ``ema`` it has the average.
    best : Network
        A copy with the weights of the best epoch, None if no epoch was finished.
    history : list of dict
        A record an epoch, as in metrics.jsonl.
    summary : TrainSummary or None
        Accuracies, epochs and seconds; None if no epoch was finished.
    """

    network: Network
    best: Network | None
    history: list[dict[str, Any]] = field(repr=False)
    summary: TrainSummary | None

    @property
    def curves(self) -> dict[str, list[Any]]:
        """The history by name: a list with a value an epoch."""
        names = dict.fromkeys(name for record in self.history for name in record)
        return {name: [record.get(name) for record in self.history] for name in names}

    def __repr__(self) -> str:
        return f"FitResult({self.summary or 'no epoch finished'})"


def fit(
    net: Network,
    data: Dataset,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    signals: Sequence[Augmenter] = (),
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    on_batch: Callable[[Any], Any] | None = None,
    quiet: bool = False,
    **options: Any,
) -> FitResult:
    """Train a network as ``cupyep train`` does.

    Parameters
    ----------
    net : Network
        Trained in place; layers and activation may be of your own. It settles as its `settling` says, unless
        options say otherwise, and from then on as it was trained.
    data : Dataset, or tuple of images and labels
        A pair becomes ``Dataset.from_arrays(images, labels)``. The validation split, where there is one, chooses the
        best epoch.
    run_dir : path, optional
        A new folder for config.toml, metrics, checkpoints; without one nothing is written.
    resume : bool, default False
        Go on with the run in `run_dir`, if there is one: same network, data, signals and options. Other `epochs`
        stretch the schedules, which is warned of.
    signals : sequence of Augmenter, optional
        Intermediate signals; or give the options of some, such as ``aug="le"``.
    on_epoch, on_batch : callable, optional
        Called with the record of each epoch, the `StepResult` of each batch; True or ``"stop"`` ends the run.
    quiet : bool, default False
        Show nothing but warnings.
    **options
        Options of ``cupyep train`` by name (``epochs=5, optimizer="adamw"``); those that say what network and data are
        belong to `net` and `data`.

    Returns
    -------
    FitResult

    Raises
    ------
    ConfigurationError
        For an unknown option, a value that breaks its rule, or one without an effect.
    CupyepError
        As `Trainer.run`; `CheckpointError` if the folder holds another run.
    """
    instance("net", net, Network)
    data = Dataset.from_arrays(*data) if isinstance(data, tuple) and len(data) == 2 else data
    instance("data", data, Dataset, "a Dataset, or a pair of arrays (images, labels)")
    for name, call in (("on_epoch", on_epoch), ("on_batch", on_batch)):
        require(call is None or callable(call), f"{name} must be a function, not {shown(call)}")
    signals = items("signals", signals, Augmenter, "Augmenters")
    require(not flag("resume", resume) or run_dir is not None, "resume needs run_dir")
    needs = {"checkpoint_minutes": "checkpoint_minutes" in options}
    needs["on_divergence='halve-lr'"] = options.get("on_divergence") == "halve-lr"
    for name, there in needs.items():
        require(run_dir is not None or not there, f"{name} needs run_dir, the folder of the checkpoints")
    path, display = None if run_dir is None else checked_path("run_dir", run_dir), Display(flag("quiet", quiet))
    old = path if path is not None and resume and (path / CONFIG).is_file() else None  # the run to go on with
    begun = {} if old is None else _as_begun(net, RunDirectory(old, TrainConfig()))
    config = _config(net, data, {name: begun.get(name) for name in KEPT}, options)
    require(not signals or config.aug == "none", "give either signals or the option aug")
    known = config.arch != OWN and (config.dataset in DATASETS or is_own(config.dataset))
    require(
        known or config.aug != "kd" or config.teacher is not None,
        "aug='kd' trains a teacher of networks and data sets that have a name; give one for others: teacher=...",
    )
    for teacher in (getattr(signal, "teacher", None) for signal in signals):
        if isinstance(teacher, TeacherFile):
            teacher.check(data)
    net.settling = config.settling
    if path is not None and old is None:
        check_free(path)
    trainer, teacher = prepare(config, display, Communicator(), old, data, net, signals)
    if old is not None:
        trainer.directory = RunDirectory(old, config)
        trainer.resume()
        if text := stretch_text(trainer, begun.get("epochs", trainer.epochs)):
            display.show("warning", text)
        trainer.directory.write_config()
    elif path is not None:
        trainer.directory = RunDirectory.create(path, config)
    if path is not None:
        if teacher:
            keep_teacher(teacher, path)
        show_start(trainer, f"run directory {path}")
    kept: dict[str, Any] = {}
    trainer.on_batch = on_batch
    trainer.on_epoch = partial(_on_epoch, trainer, kept, on_epoch)
    summary = trainer.run()
    with trainer.optimizer.averaged():
        weights = _copies(net)
    net.load_parameters(weights)
    steps = getattr(trainer.learner, "free_steps", None)  # as auto ones have become
    net.settling = net.settling | ({} if steps is None else {"steps": steps})
    if not kept and path is not None and trainer.best_epoch:  # before the run was taken up
        kept.update(trainer.directory.load("best").weights())
    best = copy.deepcopy(net) if kept else None
    if best is not None:
        best.load_parameters(kept)
        record = trainer.records[trainer.best_epoch - 1]
        best.feedback = record.get("feedback", best.feedback)
        best.settling = best.settling | ({} if steps is None else {"steps": record.get("free_steps", steps)})
    return FitResult(net, best, trainer.records, summary)


def _config(net: Network, data: Dataset, kept: dict[str, Any], options: dict[str, Any]) -> TrainConfig:
    """Return the options of a training: those `kept`, those of network and data as far as the table has words for them.

    Then `options`, which come last.
    """
    for name in options:
        choose("option", name, OPTIONS)
        require(name not in OF_THE_NETWORK, f"the option {name} belongs to the network; build it so")
        require(name not in OF_THE_DATA, f"the option {name} belongs to the data set; load it so")
    built = {name: value for name, value in net.config.items() if name in ("arch", "width", "pooling", "gain", "seed")}
    own = {"loss": net.readout.criterion.name, "feedback": net.feedback, "precision": net.precision.name}
    own |= {"weights": net.weights, "device": net.device.name}
    pool = net.readout.pool
    own |= {"readout_pool": None if pool is None else str(pool)}
    own |= {"activation": net.activation.name} if net.activation.name in ACTIVATIONS else {}
    schedule = net.settling.get("schedule", "sweeps")
    if options.get("schedule", schedule) == schedule:
        names = {"steps": "free_steps", "schedule": "schedule", "relaxation": "relaxation", "tolerance": "tolerance"}
        own |= {names[name]: value for name, value in net.settling.items() if name in names}
        if AUTO in (options.get("free_steps"), options.get("nudged_steps")):
            own.pop("tolerance", None)
    config = make_config(kept, built, own, options)
    used = {name: value for name, value in options.items() if name != "flip"}
    require_used(used, vars(config))
    require("flip" not in options or data.flip or not config.flip, "this data set forbids flip")
    # Names that the table does not know are kept as they are: only this function can go on with such a run.
    config.arch, config.dataset = net.config.get("arch", OWN), absolute_name(data.name)
    config.validation = None if data.validation is None or data.name not in DATASETS else len(data.validation)
    return config


def _as_begun(net: Network, run: RunDirectory) -> dict[str, Any]:
    """Give `net` the feedback that a run began with, where it has one to which ``on_unsettled`` lowered it since.

    Returned are the options of the run, as its last checkpoint has them; nothing if there is none of use.
    """
    for which in ("last", "previous"):
        with contextlib.suppress(CheckpointError):  # what is wrong with the run is said where it is taken up
            saved = run.load(which)
            lowered = [record.get("feedback") for record in run.metrics()] + [saved.settling.get("feedback")]
            if net.feedback in lowered:
                net.feedback = saved.config.get("feedback", net.feedback)
            return saved.config
    return {}


def _copies(net: Network) -> dict[str, np.ndarray]:
    return {path: net.device.to_numpy(p).copy() for path, p in net.parameters().items()}


def _on_epoch(trainer: Any, kept: dict[str, Any], on_epoch: Callable[..., Any] | None, record: dict[str, Any]) -> Any:
    """Keep the weights of the epoch that has just been done if it was the best; return what `on_epoch` does."""
    if trainer.best_epoch == record["epoch"]:
        with trainer.optimizer.averaged():
            kept.update(_copies(trainer.network))
    return on_epoch and on_epoch(record)
