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

from typing import Any

import numpy as np

from cupyep.errors import ConfigurationError
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
