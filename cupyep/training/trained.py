"""A run that has been trained, ready for use: its network with the parameters of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import get_device
from cupyep.data import Dataset, ImageFormat
from cupyep.errors import CheckpointError
from cupyep.models import architecture, default_gain
from cupyep.network import Network
from cupyep.persistence.checkpoint import Checkpoint, restore_parameters
from cupyep.persistence.network_file import FIXED
from cupyep.training.build import build_dataset, build_learner, build_network
from cupyep.training.config import OPTIONS, TrainConfig, require_used
from cupyep.training.run_directory import CHECKPOINT_FILES, RunDirectory
from cupyep.training.snapshot import check_same_network, check_unchanged


@dataclass
class TrainedRun:
    """What `load_trained` returns."""

    config: TrainConfig  # without intermediate signals
    epoch: int  # epochs that the checkpoint has done
    images: ImageFormat  # classes, size and normalisation of the images
    network: Network  # with the checkpoint's parameters
    learner: Any  # its `scores` are those that the run's accuracies come from

    def dataset(self) -> Dataset:
        """Return the run's data set; `CheckpointError` if it has changed since."""
        dataset = build_dataset(self.config)
        check_unchanged("this checkpoint", self.images.fingerprint, dataset)
        return dataset


def load_trained(path: str | Path, which: str = "best", given: Mapping[str, Any] | None = None) -> TrainedRun:
    """Load the network of the run in the directory `path`, at the checkpoint `which`; its data set need not be there.

    Options `given` may differ from the run's. `CheckpointError` if there is no such run or checkpoint, it is damaged,
    or its parts do not belong together; `ConfigurationError` if an option given has no effect on such a run.
    """
    directory = RunDirectory.open(path)
    saved = directory.load(which)
    file = directory.path / CHECKPOINT_FILES[which]
    plain: dict[str, Any] = {"aug": "none", "teacher": None, "teacher_features": False}
    config = as_settled(dataclasses.replace(directory.config, **plain), saved, given or {})
    require_used(given or {}, vars(config))
    images = _image_format(file, saved, config)
    network = build_network(config, images, get_device(config.device))
    check_same_network(file, saved, network)
    restore_parameters(file, saved.weights(), network.parameters(), network.device)
    learner = build_learner(config, network, [], np.random.default_rng(config.seed))
    return TrainedRun(config, saved.epoch, images, network, learner)


def as_settled(config: TrainConfig, saved: Checkpoint, given: Mapping[str, Any]) -> TrainConfig:
    """Return the options with those `given`, else with the steps and the feedback that a checkpoint settles with.

    A fixed gain stays that of the feedback that the run began with: it is no parameter.
    """
    if config.weights == FIXED and config.gain is None:
        gain = default_gain(config.activation, config.feedback, architecture(config.arch).gains)
        config = dataclasses.replace(config, gain=gain)
    own = {name: value for name, value in saved.settling.items() if name in OPTIONS}
    return dataclasses.replace(config, **(own | dict(given)))


def _image_format(file: Path, saved: Checkpoint, config: TrainConfig) -> ImageFormat:
    if not saved.images:
        return ImageFormat.of(build_dataset(config))
    try:
        return ImageFormat.from_json(saved.images)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint '{file}' is damaged: it does not describe its images ({error})") from error
