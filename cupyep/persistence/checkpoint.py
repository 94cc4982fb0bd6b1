"""Checkpoints, version 2: one HDF5 file with everything that a run needs to go on, from the middle of an epoch too.

Groups ``parameters`` (by path), ``optimizer`` (`Optimizer.state_dict` by name) and ``statistics`` (running sums of the
epoch under way). Root attributes: ``format="cupyep-checkpoint"``, ``version=2``; numbers, ``epoch`` (epochs done),
``batch`` (batches done of the epoch after), ``best_accuracy`` and ``best_epoch``, ``elapsed_s`` and ``epoch_s``,
``halvings``; JSON texts, ``network`` (`Network.describe`), ``generators`` (name -> bit generator
state), ``config`` (options of the run), ``images`` (`ImageFormat`), ``settling`` (steps and feedback of a run that
chooses them) and ``versions`` (of cupyep, Python and libraries).
The file begins with a checksum (`cupyep.persistence.hdf5`).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cupyep._version import __version__
from cupyep.errors import CheckpointError, nearest, reporting
from cupyep.files import write_file
from cupyep.persistence import hdf5

KIND = "checkpoint"
VERSION = 2
GROUPS = ("parameters", "optimizer", "statistics")
TEXTS = ("network", "generators", "config", "images", "versions", "settling")


def versions() -> dict[str, str]:
    """Return the versions of all that can change the numbers of a run."""
    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "h5py")}
    return {"cupyep": __version__, "python": platform.python_version(), **libraries}


@dataclass
class Checkpoint:
    """What a checkpoint file holds."""

    parameters: dict[str, Any]  # by path; like all arrays here on the host
    optimizer: dict[str, Any]  # by the names of `Optimizer.state_dict`
    network: dict[str, Any]  # `Network.describe` of the network that the parameters belong to
    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the epoch after; 0 between epochs
    # the best accuracy so far, in [0, 1], and the epoch that reached it; of the validation split where there is one,
    # else of the test split
    best_accuracy: float = 0.0
    best_epoch: int = 0
    elapsed_s: float = 0.0  # seconds that the finished epochs took, and training in the epoch under way
    epoch_s: float = 0.0
    halvings: int = 0  # how often the learning rates have been halved
    statistics: dict[str, Any] = field(default_factory=dict)  # by the names of `EpochStatistics.state_dict`
    # states of the random generators, as ``Generator.bit_generator.state`` gives them; of the one that draws an epoch's
    # order and crops, the state at the beginning of that epoch
    generators: dict[str, dict] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # the options of the run
    # `ImageFormat.to_json` of the data set; empty where a trainer was not told it
    images: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    # of a run that chooses its steps: ``free_steps``, ``nudged_steps``, ``feedback`` that it settles with, and the same
    # as ``next_free_steps`` and so on from the next epoch on. Empty for others
    settling: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Any]:
        """Return what the network is used with: its parameters, or their running average, where the run kept one."""
        own = {path: array for path, array in self.parameters.items() if not path.startswith("signals.")}
        return {path: self.optimizer.get(f"average.{path}", array) for path, array in own.items()}


#: The plain numbers of a checkpoint: name -> kind.
NUMBERS = {
    spec.name: {"int": int, "float": float}[spec.type] for spec in fields(Checkpoint) if spec.type in ("int", "float")
}


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, keep_as: Path | None = None) -> None:
    """Write `checkpoint` (arrays on the host) to `path`, atomically: the old file stays until the new one is complete.

    The file that is replaced goes to `keep_as`, if given. `CheckpointError` if the file cannot be written.
    """

    def fill(file: h5py.File) -> None:
        file.attrs["format"], file.attrs["version"] = f"cupyep-{KIND}", VERSION
        for name in NUMBERS:
            file.attrs[name] = getattr(checkpoint, name)
        for name in TEXTS:
            file.attrs[name] = json.dumps(getattr(checkpoint, name))
        for group in GROUPS:
            arrays = file.create_group(group)
            for name, array in getattr(checkpoint, group).items():
                arrays.create_dataset(name, data=np.asarray(array))

    with reporting(CheckpointError, f"cannot write checkpoint '{path}'"):
        write_file(Path(path), hdf5.image(fill), keep_as)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read the checkpoint at `path`.

    `CheckpointError` if the file is missing, truncated, of another format or version, or holds numbers not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at '{path}'")
    try:
        with hdf5.open_file(path) as file:
            hdf5.check_format(file, path, KIND, VERSION)
            values: dict[str, Any] = {group: _read_arrays(file, group) for group in GROUPS}
            values |= {name: _read_number(file, name) for name in NUMBERS}
            values |= {name: _read_text(file, name) for name in TEXTS}
            checkpoint = Checkpoint(**values)
    except CheckpointError:
        raise
    except hdf5.ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"'{path}' is not a readable checkpoint ({hdf5.blame(error)}): {reason}") from error
    for name, array in (checkpoint.parameters | checkpoint.optimizer).items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"checkpoint '{path}': '{name}' holds numbers that are not finite")
    return checkpoint


def _read_number(file: h5py.File, name: str) -> int | float:
    value, kind = hdf5.attribute(file, name), NUMBERS[name]
    # The best accuracy is minus infinity before there is one; nothing else is below 0.
    least = -np.inf if name == "best_accuracy" else 0
    good = isinstance(value, np.integer if kind is int else np.floating) and value >= least  # which nan is not
    if not good:
        raise ValueError(f"{name} is {value}")
    return kind(value)


def _read_text(file: h5py.File, name: str) -> dict[str, Any]:
    value = json.loads(hdf5.attribute(file, name))
    if not isinstance(value, dict):
        raise TypeError(f"'{name}' is not an object")
    for key, number in value.items() if name == "settling" else ():
        is_steps = key.endswith("_steps") and type(number) is int and number >= 1
        if not (is_steps or (key.endswith("feedback") and type(number) is float and 0 < number <= 1)):
            raise ValueError(f"'{name}' has {key} {number!r}")
    return value


def _read_arrays(file: h5py.File, group_name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a group; only numbers that lie in this very file are accepted."""
    arrays = {}
    group = hdf5.find(file, group_name)
    if not isinstance(group, h5py.Group):
        raise TypeError(f"it has no group '{group_name}'")
    for name in group:
        array = hdf5.find_array(group, name)
        if array is None or array.dtype.kind not in "fiu":
            raise TypeError(f"'{group_name}/{name}' is not an array of numbers")
        arrays[name] = array[()]
    return arrays


def restore_parameters(path: str | Path, saved: Mapping[str, Any], parameters: Mapping[str, Any], device: Any) -> None:
    """Copy the arrays of the checkpoint at `path` into the live `parameters` (on `device`), in place.

    `CheckpointError` if a name is missing or unknown or a shape differs; nothing is changed then.
    """
    for name, array in saved.items():
        if name not in parameters:
            raise CheckpointError(f"checkpoint '{path}': '{name}' is no parameter here{nearest(name, parameters)}")
        if array.shape != parameters[name].shape:
            raise CheckpointError(
                f"checkpoint '{path}': '{name}' has shape {array.shape}, the network needs {parameters[name].shape}"
            )
        if np.abs(array).max(initial=0) > np.finfo(parameters[name].dtype).max:
            raise CheckpointError(f"checkpoint '{path}': '{name}' holds numbers too large for {parameters[name].dtype}")
    for name in parameters:
        if name not in saved:
            raise CheckpointError(f"checkpoint '{path}' lacks the parameter '{name}'")
    for name, array in saved.items():
        parameters[name][...] = device.asarray(array)
