"""A network as one file, version 1 (HDF5): its structure as JSON, its parameters as arrays. Nothing is ever executed.

Root attributes: ``format="cupyep-network"``, ``version=1``, ``cupyep`` (version of the writer) and ``network`` (JSON:
``layers``, a list of objects with type and arguments; ``options``, the other arguments of `Network`; ``config``, that
of the builder, if one was used). Group ``parameters``: arrays by path, ``layers.1.weight`` .. ``readout.bias``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cupyep._version import __version__
from cupyep.activations import ACTIVATIONS
from cupyep.data import hdf5
from cupyep.data.files import one_line
from cupyep.errors import CheckpointError, ConfigurationError, require
from cupyep.files import write_file
from cupyep.layers import Conv2d, Edge, Linear

FORMAT, VERSION = "cupyep-network", 1
#: The arguments that make a layer, by its class.
LAYERS: dict[str, tuple[type[Edge], tuple[str, ...]]] = {
    "Conv2d": (Conv2d, ("in_shape", "channels", "kernel", "stride", "padding", "pooling", "pool")),
    "Linear": (Linear, ("in_shape", "units")),
}
OPTIONS = ("classes", "activation", "loss", "feedback", "precision")


def write_network(path: str | Path, network: Any) -> None:
    """Write a `Network` to `path`; what was there before stays until the new file is complete.

    Raises
    ------
    ConfigurationError
        If a layer or the activation is of a class of the user's own, which a file cannot hold.
    CheckpointError
        If the file cannot be written.
    """
    remedy = "keep the parameters with numpy.savez, and give them to load_parameters of a network built by your code"
    for n, edge in enumerate(network.layers, 1):
        known = LAYERS.get(type(edge).__name__, (None,))[0] is type(edge)
        require(known, f"layer {n} is a {type(edge).__name__}, which a file cannot hold; {remedy}")
    name = network.activation.name
    require(ACTIVATIONS.get(name) is network.activation, f"activation '{name}' is not one of cupyep's; {remedy}")
    structure = {
        "layers": [_arguments(edge) for edge in network.layers],
        "options": {
            "classes": network.classes,
            "activation": name,
            "loss": network.readout.criterion.name,
            "feedback": network.feedback,
            "precision": network.precision.name,
        },
        "config": {key: value for key, value in network.config.items() if key != "device"},
    }

    def fill(file: h5py.File) -> None:
        file.attrs.update(format=FORMAT, version=VERSION, cupyep=__version__, network=json.dumps(structure))
        group = file.create_group("parameters")
        for path, array in network.parameters().items():
            group[path] = network.device.to_numpy(array)

    try:
        write_file(Path(path), hdf5.image(fill))
    except OSError as error:
        raise CheckpointError(f"cannot write network '{path}': {error.strerror}") from error


def _arguments(edge: Edge) -> dict[str, Any]:
    kind = type(edge).__name__
    values = {"channels": edge.out_shape[-1], "units": edge.out_shape[-1]}
    return {"type": kind} | {name: values.get(name, getattr(edge, name, None)) for name in LAYERS[kind][1]}


def read_network(path: str | Path, build: Callable[..., Any]) -> Any:
    """Return what `write_network` wrote.

    Parameters
    ----------
    path : path
    build : callable
        Makes a `Network` from its layers and, by name, the `OPTIONS`.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, of another format or version, or its parts do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no network at '{path}'")
    try:
        with hdf5.open_file(path) as file:
            _check_format(path, file)
            structure = json.loads(hdf5.attribute(file, "network"))
            layers = [_layer(values) for values in structure["layers"]]
            options = {name: structure["options"][name] for name in OPTIONS}
            parameters = {name: _array(file, name, shape) for name, shape in _shapes(layers, options)}
        network = build(layers, **options)
        network.load_parameters(parameters)
        network.config = dict(structure["config"])
    except CheckpointError:
        raise
    except ConfigurationError as error:
        raise CheckpointError(f"network '{path}' does not fit together: {error}") from error
    except (*hdf5.ERRORS, AttributeError, IndexError) as error:
        reason = one_line(error)
        raise CheckpointError(f"'{path}' is not a readable network ({hdf5.blame(error)}): {reason}") from error
    return network


def _check_format(path: Path, file: h5py.File) -> None:
    found, version = hdf5.attribute(file, "format"), hdf5.attribute(file, "version")
    if not isinstance(found, str) or found != FORMAT:
        what = found if isinstance(found, str) else "something else"
        raise CheckpointError(f"'{path}' is an HDF5 file but not a network saved by cupyep (it is {what})")
    if not isinstance(version, np.integer) or version != VERSION:
        raise CheckpointError(f"network '{path}' has version {version}; this cupyep reads version {VERSION}")


def _layer(values: dict[str, Any]) -> Edge:
    kind, names = LAYERS[values["type"]]
    arguments = {name: values[name] for name in names}
    numbers = [*arguments["in_shape"], *(v for name, v in arguments.items() if name not in ("in_shape", "pooling"))]
    if not all(type(number) is int for number in numbers):
        raise TypeError(f"{values['type']} with {arguments}")
    return kind(**arguments | {"in_shape": tuple(arguments["in_shape"])})


def _shapes(layers: Sequence[Edge], options: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the path and shape of every parameter, so that sizes are compared before memory is taken for a network."""
    for n, edge in enumerate(layers, 1):
        yield f"layers.{n}.weight", edge.weight_shape
        yield f"layers.{n}.bias", edge.weight_shape[-1:]
    if options["loss"] == "cross_entropy":
        yield "readout.weight", (math.prod(layers[-1].out_shape), options["classes"])
        yield "readout.bias", (options["classes"],)


def _array(file: h5py.File, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = hdf5.find_array(file, f"parameters/{name}")
    if array is None or array.dtype.kind != "f" or array.shape != shape:
        found = "missing" if array is None else f"{array.dtype} {array.shape}"
        raise TypeError(f"parameter '{name}' should be numbers of shape {shape}, it is {found}")
    values = array[()]
    if not np.isfinite(values).all():
        raise ValueError(f"parameter '{name}' holds numbers that are not finite")
    return values
