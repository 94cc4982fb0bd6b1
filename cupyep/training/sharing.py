"""A training of several processes: a step whose batch is dealt out, and the run directory that rank 0 keeps for all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.batch import Batch, shared_out
from cupyep.data import Dataset
from cupyep.data.images import add_to_digest
from cupyep.errors import require
from cupyep.learning.learner import StepResult
from cupyep.optim import AVERAGE, Optimizer
from cupyep.parallel import Communicator
from cupyep.training.config import MACHINE, TrainConfig, option_name
from cupyep.training.run_directory import RunDirectory
from cupyep.training.statistics import means_of


def step(learner: Any, batch: Batch, communicator: Communicator) -> tuple[StepResult, Mapping[str, Any], int]:
    """Do a learner's step on this process's share of a batch.

    Returns its result, of which the gradients are the whole batch's and all else is this process's; `means_of` the
    whole batch; and the number of its samples. Gradients and means are the same on all ranks.
    """
    if communicator.size == 1:
        result = learner.step(batch)
        return result, means_of(result), result.count
    own, total = shared_out(batch)
    result = learner.step(batch, total=total)
    means, packed = means_of(result, total), result.gradients.packed
    figures = _packed(means, packed.dtype, learner.network.device)
    if own == 0:  # its sample only stands in, so that everything has its shape
        packed[...] = 0
        figures[...] = 0
    communicator.sum(packed, figures)
    return result, _unpacked(figures, means), total


def _packed(arrays: Mapping[str, Any], dtype: Any, device: Any) -> Any:
    """Return arrays as one; with a tolerance residuals are on the host."""
    return device.xp.concatenate([device.asarray(array, dtype).ravel() for array in arrays.values()])


def _unpacked(packed: Any, like: Mapping[str, Any]) -> dict[str, Any]:
    arrays, start = {}, 0
    for name, array in like.items():
        size = math.prod(array.shape)
        arrays[name] = packed[start : start + size].reshape(array.shape)
        start += size
    return arrays


def check_same(config: TrainConfig, dataset: Dataset, communicator: Communicator) -> None:
    """Raise ConfigurationError unless all ranks have the same package, options and data, and each one has work."""
    if communicator.size == 1:
        return
    communicator.same(version_of_cupyep=__version__, version_of_numpy=np.__version__)  # which draws the order of images
    communicator.same(**{option_name(name): value for name, value in vars(config).items() if name not in MACHINE})
    communicator.same(images_and_labels=_fingerprint(dataset))
    require(
        config.batch_size >= communicator.size,
        f"--batch-size {config.batch_size} is less than the {communicator.size} ranks: start fewer, or raise it",
    )


def _fingerprint(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for split in filter(None, (dataset.train, dataset.validation, dataset.test)):
        add_to_digest(digest, split.images, split.labels)
    return digest.hexdigest()[:12]


class SharedDirectory:
    """The run directory of rank 0: what all ranks ask of it, in the same order, it does, and all get the answer.

    Whatever a `RunDirectory` raises is raised on all ranks, which see none of the files. `make` returns that of rank 0.
    """

    def __init__(self, make: Callable[[], RunDirectory], communicator: Communicator):
        self._communicator = communicator
        self._directory: RunDirectory | None = None

        def begin() -> tuple[Any, TrainConfig]:
            self._directory = make()
            return self._directory.path, self._directory.config

        self.path, self._config = communicator.first(begin)

    @property
    def config(self) -> TrainConfig:
        return self._config

    @config.setter
    def config(self, config: TrainConfig) -> None:
        self._config = config
        if self._directory is not None:
            self._directory.config = config

    locked = RunDirectory.locked

    def unlock(self) -> None:
        """Let others write there; a rank that fails alone does it alone."""
        if self._directory is not None:
            self._directory.unlock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self._communicator.first(lambda: getattr(self._directory, name)(*arguments))


def run_directory(make: Callable[[], RunDirectory], communicator: Communicator) -> Any:
    """Return the `RunDirectory` that `make` makes, for several ranks as a `SharedDirectory`."""
    return make() if communicator.size == 1 else SharedDirectory(make, communicator)


def share_parameters(learner: Any, optimizer: Optimizer, communicator: Communicator) -> None:
    """Give all ranks the parameters of rank 0, and the average of them that it has, if any."""
    if communicator.size == 1:
        return
    averages = {name: array for name, array in optimizer.state_dict().items() if name.startswith(f"{AVERAGE}.")}
    device, arrays = learner.network.device, learner.parameters() | averages
    first = communicator.first(lambda: {path: device.to_numpy(array) for path, array in arrays.items()})
    for path, array in arrays.items():
        array[...] = device.asarray(first[path])
