"""Initialisation from data: layer-sequential unit variance (LSUV), Mishkin & Matas, arXiv 1511.06422."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupyep.errors import ConfigurationError, require
from cupyep.layers import Edge, Identity
from cupyep.learning import Backpropagation
from cupyep.network import Network

TOLERANCE = 0.02  # of the standard deviation of a drive
TRIES = 10  # one is enough for a drive that is linear in the weights, without a bias


def lsuv(network: Network, images: Any) -> dict[str, float]:
    """Scale weights until the drive of each node, feed-forward, has unit variance on some images.

    Node by node in topological order, all connections into a node alike; a node that an identity leads into is left as
    it is, for its drive is not that of its weights alone.

    Parameters
    ----------
    network : Network
    images : array of shape (N, H, W, C), or Batch
        Normalised.

    Returns
    -------
    dict
        The factor of each node that was scaled, by its name.

    Raises
    ------
    ConfigurationError
        If a drive is constant or not finite, or does not come to unit variance, or gains are fixed: they are not saved.
    """
    require(network.weights != "standardized-fixed", "LSUV scales gains; fixed ones stay: use weights standardized")
    graph, feed_forward, batch = network.graph, Backpropagation(network), network.batch(images)
    factors = {}
    for node, name in enumerate(graph.names, 1):
        edges = [graph.edges[c] for c in graph.into[node]]
        if not any(isinstance(edge, Identity) for edge in edges):
            factors[name] = _unit_drive(name, edges, lambda: feed_forward.settled(batch).drives, node)
    return factors


def _unit_drive(name: str, edges: Sequence[Edge], drives: Callable[[], Sequence[Any]], node: int) -> float:
    factor = 1.0
    for left in range(TRIES, -1, -1):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
            deviation = math.sqrt(float(drives()[node - 1].var(dtype=np.float64)))
        found = f"the drive of '{name}' has a standard deviation of {deviation:.3g} on this batch"
        if abs(deviation - 1) <= TOLERANCE:
            return factor
        if not 0 < deviation < math.inf:
            raise ConfigurationError(f"{found}, and no scaling makes it 1; look for equal images, weights of 0 or NaN")
        if left:
            for edge in edges:
                edge.parametrisation.scale(edge.parameters(), 1 / deviation)
            factor /= deviation
    raise ConfigurationError(f"{found} after {TRIES} scalings, not 1; start with smaller biases")
