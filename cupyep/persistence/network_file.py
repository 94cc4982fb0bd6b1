"""What a network is, in plain values, and a network as one file, version 1 (HDF5). Nothing is ever executed.

`describe` is the identity of a network: model files and checkpoints keep it, and `difference` says what another one is
not. A file holds the structure as JSON and the parameters as arrays.

Root attributes: ``format="cupyep-network"``, ``version=1``, ``cupyep`` (version of the writer) and ``network`` (JSON:
``layers``, a list of objects with type and arguments; ``options``, the other arguments of `Network`; ``gains``, where
they are fixed; ``config``, that of the builder, if one was used). Group ``parameters``: arrays by path,
``layers.1.weight`` .. ``readout.bias``.
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
from cupyep.activations import ACTIVATIONS, BUILT_IN
from cupyep.errors import CheckpointError, ConfigurationError, one_line, reporting, require
from cupyep.files import write_file
from cupyep.graph import Connection, Graph
from cupyep.layers import Conv2d, Edge, Identity, Linear
from cupyep.persistence import hdf5

KIND, VERSION = "network", 1
LAYERS: dict[str, type[Edge]] = {"Conv2d": Conv2d, "Linear": Linear, "Identity": Identity}
OPTIONS = ("classes", "activation", "loss", "feedback", "precision", "weights", "readout_pool")
FIXED = "standardized-fixed"


def describe(network: Any) -> dict[str, Any]:
    """Return what sets `network` apart from others, the values of its parameters and its device aside, as JSON has it.

    Returns
    -------
    dict
        ``layers`` (of each edge its type and arguments; of a user's own all its plain attributes), ``connections`` (the
        nodes below and above each edge; none of a chain), ``activation`` (name, range and parameters), ``feedback``,
        ``loss``, ``classes``, ``input_shape``, ``precision``, ``weights``, ``readout_pool``; of weights with
        fixed gains, which are no parameters, ``gains``, one an edge.
    """
    description = {
        "input_shape": network.input_shape,
        "classes": network.classes,
        "layers": [_describe_edge(edge) for edge in network.layers],
        "activation": _attributes(network.activation, ("name", "low", "high")),
        "feedback": network.feedback,
        "loss": network.readout.criterion.name,
        "precision": network.precision.name,
        "weights": network.weights,
        "readout_pool": network.readout.pool,
    }
    if network.weights == FIXED:
        description["gains"] = [getattr(edge.parametrisation, "gain", 1.0) for edge in network.layers]
    if not network.graph.is_chain:
        description["connections"] = network.graph.describe()
    return json.loads(json.dumps(description))


def _describe_edge(edge: Edge) -> dict[str, Any]:
    if type(edge) in LAYERS.values():
        return {"type": type(edge).__name__} | {name: getattr(edge, name) for name in edge.arguments}
    return _attributes(edge, ("in_shape", "out_shape", *edge.parameters()))


def _attributes(part: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the type of an edge or activation, the attributes of some names and all other public plain ones."""
    found = {name: getattr(part, name) for name in names} | vars(part)
    found.pop("code", None)  # for kernels, made of the others
    plain = {name: _plain(value) for name, value in sorted(found.items()) if not name.startswith("_")}
    return {"type": type(part).__name__} | {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return a number, text or sequence of these as JSON has them, None for all else; of an array its shape."""
    if isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return list(value.shape) if hasattr(value, "shape") else None


def difference(saved: Any, own: Any, where: str = "") -> str:
    """Return in what the description `own` differs first from the one `saved`, empty if in nothing.

    What `saved` says nothing of, as descriptions by other versions may, makes no difference.
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        pairs = [(f"{where} {key}".strip(), saved[key], own[key]) for key in own if key in saved]
    elif isinstance(saved, list) and isinstance(own, list) and any(isinstance(item, dict) for item in saved + own):
        if len(saved) != len(own):
            return f"number of {where}: saved {len(saved)}, this network {len(own)}"
        pairs = [(f"{where} {n}", *pair) for n, pair in enumerate(zip(saved, own, strict=True), 1)]
    else:
        return "" if saved == own else f"{where}: saved {saved}, this network {own}"
    return next(filter(None, (difference(*pair[1:], pair[0]) for pair in pairs)), "")


def write_network(path: str | Path, network: Any) -> None:
    """Write a `Network` to `path`; what was there before stays until the new file is complete.

    `ConfigurationError` if a layer or the activation is of a class of the user's own, which a file cannot hold;
    `CheckpointError` if the file cannot be written.
    """
    remedy = "keep the parameters with numpy.savez, and give them to load_parameters of a network built by your code"
    for edge, above in zip(network.layers, network.graph.above, strict=True):
        what = f"{network.graph.label(above)} is a {type(edge).__name__}"
        require(type(edge) in LAYERS.values(), f"{what}, which a file cannot hold; {remedy}")
    name, description = network.activation.name, describe(network)
    known = name in BUILT_IN and description["activation"] == _attributes(ACTIVATIONS[name], ("name", "low", "high"))
    require(known, f"activation '{name}' is not one of cupyep's; {remedy}")
    structure: dict[str, Any] = {
        **{name: description[name] for name in ("layers", "connections", "gains") if name in description},
        "options": {key: description[key] for key in OPTIONS} | {"activation": name},
        "settling": network.settling,
        "config": {key: value for key, value in network.config.items() if key != "device"},
    }

    def fill(file: h5py.File) -> None:
        file.attrs.update(format=f"cupyep-{KIND}", version=VERSION, cupyep=__version__, network=json.dumps(structure))
        group = file.create_group("parameters")
        for path, array in network.parameters().items():
            group[path] = network.device.to_numpy(array)

    with reporting(CheckpointError, f"cannot write network '{path}'"):
        write_file(Path(path), hdf5.image(fill))


def read_network(path: str | Path, build: Callable[..., Any]) -> Any:
    """Return what `write_network` wrote; `build` makes a `Network` from its layers and, by name, the `OPTIONS`.

    `CheckpointError` if the file is missing, truncated, of another format or version, or its parts do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no network at '{path}'")
    try:
        with hdf5.open_file(path) as file:
            hdf5.check_format(file, path, KIND, VERSION)
            structure = json.loads(hdf5.attribute(file, "network"))
            graph = _graph(structure)
            options = {name: structure["options"][name] for name in OPTIONS}
            parameters = {name: _array(file, name, shape) for name, shape in _shapes(graph, options)}
        network = build(graph, gain=structure.get("gains", 1.0), **options)
        network.load_parameters(parameters)
        network.config = dict(structure["config"])
        network.settling = structure["settling"]
    except CheckpointError:
        raise
    except ConfigurationError as error:
        raise CheckpointError(f"network '{path}' does not fit together: {error}") from error
    except (*hdf5.ERRORS, AttributeError, IndexError) as error:
        reason = one_line(error)
        raise CheckpointError(f"'{path}' is not a readable network ({hdf5.blame(error)}): {reason}") from error
    return network


def _layer(values: dict[str, Any]) -> Edge:
    kind = LAYERS[values["type"]]
    arguments = {name: values[name] for name in kind.arguments if name != "has_bias"}
    numbers = [*arguments["in_shape"], *(v for name, v in arguments.items() if name not in ("in_shape", "pooling"))]
    if "has_bias" in kind.arguments:
        arguments["bias"] = values["has_bias"]
    if type(arguments.get("bias", True)) is not bool or not all(type(number) is int for number in numbers):
        raise TypeError(f"{values['type']} with {arguments}")
    return kind(**arguments | {"in_shape": tuple(arguments["in_shape"])})


def _graph(structure: dict[str, Any]) -> Graph:
    layers, ends = [_layer(values) for values in structure["layers"]], structure.get("connections")
    if ends is None:
        return Graph(layers)
    return Graph([Connection(below, above, edge) for (below, above), edge in zip(ends, layers, strict=True)])


def _shapes(graph: Graph, options: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the path and shape of every parameter, so that sizes are compared before memory is taken for a network."""
    for path, edge in zip(graph.paths, graph.edges, strict=True):
        for name, shape in edge.parameter_shapes(options["weights"]).items():
            yield f"{path}.{name}", shape
    if options["loss"] == "cross_entropy":
        seen, pool = graph.shapes[-1], options["readout_pool"]
        if pool is not None:
            seen = (seen[0] // max(pool, 1), seen[1] // max(pool, 1), seen[2])
        yield "readout.weight", (math.prod(seen), options["classes"])
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
