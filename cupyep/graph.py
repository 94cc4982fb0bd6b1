"""The graph of a network: nodes, connections between them, and what follows from their order alone.

Node 0 is the image, nodes 1..L are states in topological order. A connection is an edge with the node below and the
node above; drives of connections into one node add up.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cupyep.errors import ConfigurationError, is_integer, items, nearest, require, shown
from cupyep.layers import Edge, Identity

IMAGE = "image"


@dataclass(frozen=True, eq=False)
class Connection:
    """An edge between two nodes.

    Attributes
    ----------
    below, above : str
        Names of the nodes; ``"image"`` is the clamped one.
    edge : Edge
    """

    below: str
    above: str
    edge: Edge


class Graph:
    """Nodes and connections.

    Parameters
    ----------
    layers : sequence of Edge, or sequence of Connection
        Edges are a chain, whose nodes are named ``"1"``, ``"2"``, ...: each takes the state that the one before gives.
        Connections may come in any order. Each node has one bias at most: that of one of the edges into it.

    Attributes
    ----------
    connections : list of Connection
        Ordered by the node above; those into one node as given.
    edges : list of Edge
        Theirs.
    names : list of str
        Of the nodes 1..L.
    shapes : list of tuple
        Of their states, without the batch axis.
    below, above : list of int
        The nodes of each connection, 0 for the image.
    into, out_of : list of list of int
        Connections into and out of each node, by its number.
    depths : list of int
        Length of the longest path from the image to each of the nodes 1..L.

    Raises
    ------
    ConfigurationError
        For cycles, nodes that the image does not reach, more than one node that leads nowhere, or shapes that do not
        fit.
    """

    def __init__(self, layers: Sequence[Edge] | Sequence[Connection]):
        given = items("layers", layers)
        require(len(given) > 0, "a network needs at least one layer")
        self.is_chain = all(isinstance(layer, Edge) for layer in given)
        if self.is_chain:
            below = [IMAGE, *map(str, range(1, len(given)))]
            given = [Connection(below[n], str(n + 1), edge) for n, edge in enumerate(given)]
        for layer in given:
            require(
                isinstance(layer, Connection) and isinstance(layer.edge, Edge),
                f"layers must be a sequence of Edge, or of Connection; it holds {shown(layer)}",
            )
        _check_names(given)
        _check_edges(given)
        self.names = _sorted_names(given)
        number = {name: n for n, name in enumerate([IMAGE, *self.names])}
        self.connections = sorted(given, key=lambda c: number[c.above])
        self.edges = [c.edge for c in self.connections]
        self.below = [number[c.below] for c in self.connections]
        self.above = [number[c.above] for c in self.connections]
        nodes = range(len(self.names) + 1)
        self.into = [[c for c, above in enumerate(self.above) if above == node] for node in nodes]
        self.out_of = [[c for c, below in enumerate(self.below) if below == node] for node in nodes]
        self._check_ends()
        self.shapes = [self.edges[self.into[node][0]].out_shape for node in nodes[1:]]
        self.input_shape = max((self.edges[c].in_shape for c in self.out_of[0]), key=len)
        self._check_shapes()
        depths = [0]
        for node in nodes[1:]:
            depths.append(1 + max(depths[self.below[c]] for c in self.into[node]))
        self.depths = depths[1:]

    @functools.cached_property
    def paths(self) -> list[str]:
        """Where the parameters of each connection are: ``layers.NODE``, of a further one ``layers.NODE.BELOW``."""
        first = {connections[0] for connections in self.into[1:]}
        return [
            f"layers.{c.above}" if n in first else f"layers.{c.above}.{c.below}" for n, c in enumerate(self.connections)
        ]

    @functools.cached_property
    def colours(self) -> list[list[int]]:
        """Nodes by colour: nodes of one colour share no connection. For a chain even nodes, then odd ones."""
        found: list[int] = []
        for node in range(1, len(self.names) + 1):
            taken = {found[self.below[c] - 1] for c in self.into[node] if self.below[c]}
            found.append(next(colour for colour in range(len(taken) + 1) if colour not in taken))
        return [[node for node, its in enumerate(found, 1) if its == colour] for colour in range(max(found), -1, -1)]

    def weights(self, feedback: float) -> list[float]:
        """Return ``a_j = feedback^-(D - depth_j)`` of the nodes 1..L, D the depth of the last."""
        return node_weights(self.depths, feedback)

    def feedback(self, feedback: float) -> list[float]:
        """Return ``a_above / a_below`` of each connection, 0 from the image: the weight of its top-down input."""
        depths = [0, *self.depths]
        pairs = zip(self.below, self.above, strict=True)
        return [feedback ** (depths[above] - depths[below]) if below else 0.0 for below, above in pairs]

    def label(self, node: int) -> str:
        """Return what a node is called in messages: ``layer 3``, or ``node NAME``."""
        return f"layer {node}" if self.is_chain else f"node {self.names[node - 1]}"

    def node(self, name: str | int) -> int:
        """Return the number of a node, 1..L, given by name or number.

        Raises
        ------
        ConfigurationError
            If there is none.
        """
        if not isinstance(name, str) and is_integer(name) and 1 <= name <= len(self.names):
            return int(name)
        if isinstance(name, str) and name in self.names:
            return self.names.index(name) + 1
        known = f"layers 1 to {len(self.names)}" if self.is_chain else f"nodes {', '.join(self.names)}"
        hint = nearest(name, self.names) if isinstance(name, str) else ""
        raise ConfigurationError(f"there is no layer {shown(name)}{hint}: the network has {known}")

    def named_depths(self) -> dict[str, int] | None:
        """Return the depth of each node by its name, in their order: what a run's records keep; None for a chain."""
        return None if self.is_chain else dict(zip(self.names, self.depths, strict=True))

    def describe(self) -> list[list[str]] | None:
        """Return the nodes below and above each connection, as plain values; None for a chain."""
        return None if self.is_chain else [[c.below, c.above] for c in self.connections]

    def _check_ends(self) -> None:
        ends = [name for name, out in zip(self.names, self.out_of[1:], strict=True) if not out]
        require(len(ends) == 1, f"one node must lead nowhere, the output; {' and '.join(ends)} do: connect all but one")
        for name, into in zip(self.names, self.into[1:], strict=True):
            require(
                not all(isinstance(self.edges[c], Identity) for c in into),
                f"node {name} has no weights: all that lead into it are identities; connect what is below it instead",
            )
            biased = [self.connections[c] for c in into if self.edges[c].has_bias]
            require(
                len(biased) <= 1,
                f"node {name} has {len(biased)} biases, those of its connections from "
                f"{' and '.join(c.below for c in biased)}; give bias=False to all but one",
            )

    def _check_shapes(self) -> None:
        shapes = [self.input_shape, *self.shapes]
        for c, below, above in zip(self.connections, self.below, self.above, strict=True):
            edge, given, wanted = c.edge, shapes[below], shapes[above]
            flat = len(edge.in_shape) == 1 and not isinstance(edge, Identity)  # weights may see a map as a vector
            fits = edge.in_shape == given or (flat and math.prod(edge.in_shape) == math.prod(given))
            where = self.label(above)
            source = "the image" if below == 0 else self.label(below)
            require(fits, f"{where} takes {edge.in_shape} but {source} gives {given}")
            require(
                edge.out_shape == wanted,
                f"{where} is {wanted}, but its connection from {source} gives {edge.out_shape}",
            )


def node_weights(depths: Sequence[int], feedback: float) -> list[float]:
    """Return ``a_j = feedback^-(D - depth_j)`` of nodes of some depths, D that of the last; infinite beyond floats."""
    try:
        return [feedback ** -(depths[-1] - depth) for depth in depths]
    except OverflowError:
        return [math.inf] * len(depths)


def _check_names(connections: Sequence[Connection]) -> None:
    seen: set[tuple[str, str]] = set()
    for c in connections:
        for name in (c.below, c.above):
            right = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
            require(bool(right), f"a node's name is made of letters, digits, _ and -, not {shown(name)}")
        require(c.above != IMAGE, f"the image is given: nothing leads into it, as the connection from {c.below} does")
        require((c.below, c.above) not in seen, f"there are two connections from {c.below} to {c.above}; one is enough")
        seen.add((c.below, c.above))


def _check_edges(connections: Sequence[Connection]) -> None:
    trained = [id(c.edge) for c in connections if not isinstance(c.edge, Identity)]
    for c in connections:
        require(
            trained.count(id(c.edge)) <= 1,
            f"the edge from {c.below} to {c.above} is that of another connection too; make one for each: weights are "
            "not shared",
        )


def _sorted_names(connections: Sequence[Connection]) -> list[str]:
    """Return the nodes in topological order, among equals in that of their first connection."""
    waiting = {c.above: {other.below for other in connections if other.above == c.above} for c in connections}
    known, names = {IMAGE}, []
    for c in connections:
        require(
            c.below in known or c.below in waiting,
            f"node {c.below} is not reached from the image: no connection leads into it",
        )
    while waiting:
        ready = next((name for name, below in waiting.items() if below <= known), "")
        require(
            ready != "",
            f"the nodes {', '.join(waiting)} are connected in a cycle, or wait for one; take one connection out",
        )
        names.append(ready)
        known.add(ready)
        del waiting[ready]
    return names
