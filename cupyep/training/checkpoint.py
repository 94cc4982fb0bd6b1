"""Checkpoints, version 1: one HDF5 file with everything that a run needs to go on.

Root attributes: ``format="cupyep-checkpoint"``, ``version=1``, ``epoch`` (epochs done), ``best_accuracy`` and
``best_epoch`` (of the validation split where there is one, else of the test split), ``network`` (JSON: the keyword
arguments that rebuild it), ``generators`` (JSON: name -> bit generator state). Groups ``parameters`` (by path) and
``optimizer`` (`Optimizer.state_dict` by name). The file begins with a checksum (`cupyep.data.hdf5`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cupyep.data import hdf5
from cupyep.errors import CheckpointError, nearest

FORMAT = "cupyep-checkpoint"
VERSION = 1


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Attributes
    ----------
    parameters, optimizer : dict of str to host array
        By path, and by the names of `Optimizer.state_dict`.
    network : dict
        The configuration of the network that the parameters belong to.
    epoch : int
        Number of epochs done.
    best_accuracy, best_epoch : float, int
        The best accuracy so far, in [0, 1], and the epoch that reached it; of the validation split where there is one,
        else of the test split.
    generators : dict of str to dict
        States of the random generators, as ``Generator.bit_generator.state`` gives them.
    """

    parameters: dict[str, Any]
    optimizer: dict[str, Any]
    network: dict[str, Any]
    epoch: int = 0
    best_accuracy: float = 0.0
    best_epoch: int = 0
    generators: dict[str, dict] = field(default_factory=dict)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` durably, on failure it disappears."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def can_write(folder: Path) -> bool:
    """Return whether files can be made in `folder`, or, where there is none yet, the folder itself."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` (arrays on the host) to `path`, atomically: the old file stays until the new one is complete.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary, hdf5.writing(temporary) as file:
            file.attrs["format"] = FORMAT
            file.attrs["version"] = VERSION
            file.attrs["epoch"] = checkpoint.epoch
            file.attrs["best_accuracy"] = checkpoint.best_accuracy
            file.attrs["best_epoch"] = checkpoint.best_epoch
            file.attrs["network"] = json.dumps(checkpoint.network)
            file.attrs["generators"] = json.dumps(checkpoint.generators)
            for group in ("parameters", "optimizer"):
                arrays = file.create_group(group)
                for name, array in getattr(checkpoint, group).items():
                    arrays.create_dataset(name, data=np.asarray(array))
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint '{path}': {error}") from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read the checkpoint at `path`.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, of another format or version, or holds numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at '{path}'")
    try:
        with hdf5.open_file(path) as file:
            _check_format(path, file)
            checkpoint = Checkpoint(
                parameters=_read_arrays(file, "parameters"),
                optimizer=_read_arrays(file, "optimizer"),
                network=json.loads(hdf5.attribute(file, "network")),
                epoch=int(hdf5.attribute(file, "epoch")),
                best_accuracy=float(hdf5.attribute(file, "best_accuracy")),
                best_epoch=int(hdf5.attribute(file, "best_epoch")),
                generators=json.loads(hdf5.attribute(file, "generators")),
            )
    except CheckpointError:
        raise
    except hdf5.ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"'{path}' is not a readable checkpoint (truncated or damaged): {reason}") from error
    for name, array in checkpoint.parameters.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"checkpoint '{path}': parameter '{name}' holds numbers that are not finite")
    return checkpoint


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


def _check_format(path: Path, file: h5py.File) -> None:
    found = hdf5.attribute(file, "format")
    if not isinstance(found, str) or found != FORMAT:
        raise CheckpointError(f"'{path}' is an HDF5 file but not a cupyep checkpoint")
    version = hdf5.attribute(file, "version")
    if not isinstance(version, np.integer) or version != VERSION:
        raise CheckpointError(f"checkpoint '{path}' has version {version}; this cupyep reads version {VERSION}")


def restore_parameters(path: str | Path, saved: Mapping[str, Any], parameters: Mapping[str, Any], device: Any) -> None:
    """Copy the arrays of the checkpoint at `path` into the live `parameters` (on `device`), in place.

    Raises
    ------
    CheckpointError
        If a name is missing or unknown or a shape differs; nothing is changed then.
    """
    for name, array in saved.items():
        if name not in parameters:
            raise CheckpointError(f"checkpoint '{path}': '{name}' is no parameter here{nearest(name, parameters)}")
        if array.shape != parameters[name].shape:
            raise CheckpointError(
                f"checkpoint '{path}': '{name}' has shape {array.shape}, the network needs {parameters[name].shape}"
            )
    for name in parameters:
        if name not in saved:
            raise CheckpointError(f"checkpoint '{path}' lacks the parameter '{name}'")
    for name, array in saved.items():
        parameters[name][...] = device.asarray(array)
