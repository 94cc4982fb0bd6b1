"""Weights with the names, axes and flattening order that a PyTorch user expects.

=============  ========================  ===========================================
here           there                     axes there
=============  ========================  ===========================================
layers.1 ..    ``layers.0`` ..           as an ``nn.ModuleList`` of the connections counts
Conv2d         ``weight`` (K, C, h, w)   here (h, w, C, K)
Linear         ``weight`` (out, in)      here (in, out); `in` is (C, H, W) flattened, here (H, W, C)
readout        ``readout.weight``        a Linear
=============  ========================  ===========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupyep.errors import ConfigurationError, require
from cupyep.layers import Conv2d, Identity, Linear
from cupyep.network import Network


def torch_layout(network: Network) -> dict[str, np.ndarray]:
    """Return the parameters of `network` as the state dict of a PyTorch module would name and lay them out.

    Returns
    -------
    dict of str to ndarray of float32 (float64 for a float64 network), on the host
        ``layers.0.weight``, ``layers.0.bias`` (where there is one), .., and with a softmax readout ``readout.weight``,
        ``readout.bias``.

    Raises
    ------
    ConfigurationError
        If a layer is of a class of the user's own, whose layout is not known here.
    """
    host, arrays = network.device.to_numpy, {}
    network.make_weights()
    shapes, graph = [network.input_shape, *network.state_shapes], network.graph
    for n, (edge, below, above) in enumerate(zip(graph.edges, graph.below, graph.above, strict=True)):
        if type(edge) is Identity:
            continue
        arrays[f"layers.{n}.weight"] = _weight(graph.label(above), edge, host(edge.weight), shapes[below])
        if edge.has_bias:
            arrays[f"layers.{n}.bias"] = host(edge.bias).copy()
    readout = network.readout
    if not readout.identity:
        arrays["readout.weight"] = _dense(host(readout.weight), readout.inner_shape)
        arrays["readout.bias"] = host(readout.bias).copy()
    return arrays


def load_torch_layout(network: Network, arrays: Mapping[str, np.ndarray]) -> None:
    """Take arrays as `torch_layout` names and lays them out as the weights of `network`, whatever these are made of.

    `ConfigurationError` if a name is missing or unknown or a shape differs (nothing is changed then), or the
    parametrisation of the network's weights cannot give a weight.
    """
    own = torch_layout(network)
    missing, unknown = sorted(own.keys() - arrays.keys()), sorted(arrays.keys() - own.keys())
    require(not missing and not unknown, f"weights do not fit this network: missing {missing}, unknown {unknown}")
    for name, array in own.items():
        found = arrays[name].shape
        require(found == array.shape, f"{name} has shape {found}, that of this network {array.shape}")
    shapes, graph = [network.input_shape, *network.state_shapes], network.graph
    for n, (edge, below) in enumerate(zip(graph.edges, graph.below, strict=True)):
        if type(edge) is Identity:
            continue
        weight = arrays[f"layers.{n}.weight"]
        weight = weight.transpose(2, 3, 1, 0) if type(edge) is Conv2d else _dense_here(weight, shapes[below])
        try:
            edge.parametrisation.assign(edge.parameters(), np.ascontiguousarray(weight))
        except ConfigurationError as error:
            raise ConfigurationError(f"layers.{n}.weight: {error}") from error
        if edge.has_bias:
            edge.bias[...] = network.device.asarray(arrays[f"layers.{n}.bias"])
    readout = network.readout
    if not readout.identity:
        readout.weight[...] = network.device.asarray(_dense_here(arrays["readout.weight"], readout.inner_shape))
        readout.bias[...] = network.device.asarray(arrays["readout.bias"])
    network.make_weights()


def _weight(where: str, edge: Any, weight: np.ndarray, below: tuple[int, ...]) -> np.ndarray:
    if type(edge) is Conv2d:
        return np.ascontiguousarray(weight.transpose(3, 2, 0, 1))
    if type(edge) is Linear:
        return _dense(weight, below)
    raise ConfigurationError(f"{where} is a {type(edge).__name__}; only Conv2d and Linear can be exported")


def _dense(weight: np.ndarray, below: tuple[int, ...]) -> np.ndarray:
    """Return an (in, out) weight as (out, in), its input flattened from (C, H, W) instead of (H, W, C)."""
    if len(below) == 3:
        weight = weight.reshape(*below, -1).transpose(2, 0, 1, 3).reshape(weight.shape)
    return np.ascontiguousarray(weight.T)


def _dense_here(weight: np.ndarray, below: tuple[int, ...]) -> np.ndarray:
    """Return what `_dense` was given."""
    weight = weight.T
    if len(below) == 3:
        height, width, channels = below
        weight = weight.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(weight.shape)
    return np.ascontiguousarray(weight)
