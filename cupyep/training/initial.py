"""Weights to start a training from: of a network file, a checkpoint, or what ``cupyep export`` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.data.files import ARRAY_ERRORS
from cupyep.errors import CheckpointError, ConfigurationError, needing, one_line, reporting, require
from cupyep.export import load_torch_layout
from cupyep.network import Network
from cupyep.persistence import hdf5, load_checkpoint, network_file

ABOUT = ("mean", "std", "classes", "settings")  # what an exported npz holds besides weights


def load_initial(network: Network, path: Path) -> None:
    """Copy the weights in the file `path` into `network`; nothing in the file is ever executed.

    The network has the architecture that the weights are of; activation, feedback, precision and loss may be others.
    Read are ``.h5``: `Network.save`, or a checkpoint, of which an average counts where there is one; ``.npz`` and
    ``.safetensors`` as ``cupyep export`` writes them.

    `CheckpointError` if the file cannot be read or holds numbers that are not finite, `ConfigurationError` if its
    weights do not fit, or it is of another kind.
    """
    if path.suffix not in READERS:
        raise ConfigurationError(f"--init-from '{path}' is none of {', '.join(READERS)}{OTHERS.get(path.suffix, '')}")
    with reporting(CheckpointError, f"cannot read '{path}'"):
        arrays = READERS[path.suffix](path)
    if path.suffix == ".h5":
        about, arrays = arrays
        _check_weights(path, about, network)
    for name, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise CheckpointError(f"'{path}': '{name}' is no array of finite numbers")
    try:
        network.load_parameters(arrays) if path.suffix == ".h5" else load_torch_layout(network, arrays)
    except ConfigurationError as error:
        raise ConfigurationError(f"--init-from '{path}': {error}") from error


def _check_weights(path: Path, about: Mapping[str, Any], network: Network) -> None:
    """Raise `ConfigurationError` unless a network described so makes its weights of parameters as `network` does."""
    own = network.describe()
    theirs = about.get("weights", "plain")
    remedy = "give the options of its network, or what `cupyep export --format npz` makes of it"
    require(
        theirs == own["weights"],
        f"--init-from '{path}': its weights are {theirs}, those of this network {own['weights']}; {remedy}",
    )
    gains = about.get("gains", own.get("gains"))
    require(
        gains == own.get("gains"),
        f"--init-from '{path}': its gains are fixed at {gains}, those of this network at {own.get('gains')}; {remedy}",
    )


def _read_h5(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the description of a network, and its parameters."""
    try:
        with hdf5.open_file(path) as file:
            form = hdf5.attribute(file, "format")
    except hdf5.ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CheckpointError(f"'{path}' is not readable ({hdf5.blame(error)}): {one_line(error)}") from error
    if isinstance(form, str) and form == f"cupyep-{network_file.KIND}":
        network = Network.load(path, device="cpu")
        return network.describe(), network.parameters()
    saved = load_checkpoint(path)
    return saved.network, saved.weights()


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name not in ABOUT}
    except ARRAY_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CheckpointError(f"'{path}' is not a readable .npz file: {one_line(error)}") from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    with needing(f"'{path}' needs safetensors: pip install safetensors"):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError) as error:  # types that NumPy has not
        raise CheckpointError(f"'{path}' is not a readable .safetensors file: {one_line(error)}") from error


READERS: dict[str, Callable[[Path], Any]] = {
    ".h5": _read_h5,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}
PICKLED = (
    ": such files can run code; write it anew, by safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
    "'weights.safetensors'), or by cupyep export --format safetensors"
)
OTHERS = dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), PICKLED)
