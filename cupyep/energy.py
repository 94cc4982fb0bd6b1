"""The energy that settles, as an explicit object: value a sample, forces, updates, parameter gradients, adjoint.

``F(s) = sum_j a_j (sum potential(s^j) - <s^j, sum over connections into j of d(s^i)>) + beta * sum_i weight_i L_i(s)``
with ``a_j = lambda^-(D - depth_j)``, depth the longest path from the image and D the deepest. For a chain with
lambda = 1 and a clip of slope one this is ``E = 1/2 sum |s|^2 - Phi`` of Scellier & Bengio (2017) and Laborieux et al.
(2021). Settling never evaluates F; it is the definition that gradients refer to.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.activations import Activation
from cupyep.backend.device import Device
from cupyep.backend.precision import Precision, get_precision
from cupyep.batch import checked_images
from cupyep.errors import instance, is_number, items, number, require, shown
from cupyep.graph import Graph
from cupyep.heads import Nudge
from cupyep.memory.workspace import Memory, Workspace
from cupyep.ops.update import SOURCE, CudaUpdateOps, UpdateOps
from cupyep.state import State


class Change:
    """The scaled difference of two states of a node on its way into gradients: an array, multiplied in place."""

    def __init__(self, array: Any):
        self.array, self._factor = array, 1.0

    def scaled(self, factor: float) -> Any:
        """Return the difference times `factor`."""
        if factor != self._factor:
            self.array *= factor / self._factor
            self._factor = factor
        return self.array


class HopfieldEnergy:
    """Energy of the states of a graph.

    Parameters
    ----------
    layers : Graph, sequence of Edge, or sequence of Connection
    activation : Activation
    feedback : float
        lambda.
    device : Device
    precision : Precision
        Of phases. `value`, `phi`, `force` and `parameter_gradient`, which define, store nothing in halves; their units,
        too, are direct sums if it is exact.

    Attributes
    ----------
    edges : list of Edge
        Of each connection.
    weights : list of float
        a_j of each node.
    ratios : list of float
        ``a_above / a_below`` of each connection, 0 from the image.
    """

    def __init__(
        self,
        layers: Graph | Sequence[Any],
        activation: Activation,
        feedback: float,
        device: Device,
        precision: Precision,
    ):
        self.graph = layers if isinstance(layers, Graph) else Graph(layers)
        self.edges = self.graph.edges
        self.activation = instance("activation", activation, Activation)
        self.feedback = number("feedback", feedback, above=0, high=1)
        self.weights, self.ratios = self.graph.weights(self.feedback), self.graph.feedback(self.feedback)
        self.device = instance("device", device, Device)
        self.precision = instance("precision", precision, Precision)
        self.dtype = precision.number

    @functools.cached_property
    def updates(self) -> UpdateOps:
        """What updates states."""
        device = self.device
        if device.is_gpu and self.activation.code is not None:
            return CudaUpdateOps(device.xp, self.activation, device.launcher(SOURCE))
        return UpdateOps(device.xp, self.activation)

    @functools.cached_property
    def topdown_scales(self) -> tuple[list[float], list[float]]:
        """Weight of each node's top-down input as a whole, and what is left of that of each connection."""
        return self._scales(self.graph.below)

    @functools.cached_property
    def drive_scales(self) -> tuple[list[float], list[float]]:
        """Weight of the drive of each node's deviation as a whole, and what is left of that of each connection."""
        return self._scales(self.graph.above)

    def _scales(self, ends: Sequence[int]) -> tuple[list[float], list[float]]:
        nodes = range(1, len(self.weights) + 1)
        whole = [max((r for r, end in zip(self.ratios, ends, strict=True) if end == n), default=0.0) for n in nodes]
        whole = [scale or 1.0 for scale in whole]
        return whole, [r / whole[end - 1] if r else 1.0 for r, end in zip(self.ratios, ends, strict=True)]

    def pass_up(self, images: Any, state: State, terms: Sequence[Any], ops: Sequence[Any]) -> None:
        """Write feed-forward states, drives and winners into `state`: node by node, no top-down input, no settling.

        Parameters
        ----------
        images : array of shape (N, H, W, C)
        state : State
        terms : sequence of arrays
            For the second drive into a node and those behind it.
        ops : sequence
            What computes each connection's products.
        """
        nodes = [images]
        for node, (drive, layer) in enumerate(zip(state.drives, state.layers, strict=True), 1):
            for turn, c in enumerate(self.graph.into[node]):
                out = terms[node - 1] if turn else drive
                self.edges[c].drive(nodes[self.graph.below[c]], out, state.winners[c], ops[c])
                if turn:
                    drive += out
            self.updates.value(drive, layer)
            nodes.append(layer)

    def correlate(
        self,
        connection: int,
        below: Any,
        above: Any,
        winners: Any,
        gradients: Mapping[str, Any],
        ops: Any,
        bias: bool = True,
    ) -> None:
        """Add ``corr(below, U(above))`` to a connection's gradients by path, the sum of ``U(above)`` to its bias'."""
        path, edge = self.graph.paths[connection], self.edges[connection]
        if edge.parameters():
            of_bias = gradients.get(f"{path}.bias") if bias else None
            edge.add_gradient(below, above, winners, gradients[f"{path}.weight"], of_bias, ops)

    def add_gradients(
        self,
        node: int,
        nodes: Sequence[Any],
        above: Any,
        winners: Sequence[Any] | Mapping[int, Any],
        gradients: Mapping[str, Any],
        ops: Sequence[Any],
    ) -> None:
        """Add ``corr(s^i, U(above))`` of every connection into a node; `nodes` are the image and the states s^i."""
        for c in self.graph.into[node]:
            self.correlate(c, nodes[self.graph.below[c]], above, winners[c], gradients, ops[c])

    def add_gradients_of_change(
        self,
        node: int,
        means: Sequence[Any],
        changes: Mapping[int, Change],
        winners: Sequence[Any],
        gradients: Mapping[str, Any],
        ops: Sequence[Any],
    ) -> None:
        """Add ``corr(m^i, U(e^j)) + (a_j / a_i) corr(e^i, U(m^j))`` of every connection from i into node j.

        The difference of the correlations of two states of means m, the image first, and scaled differences
        ``e = a (s_1 - s_2)`` by node: take nodes in topological order, differences are scaled in place.
        """
        self.add_gradients(node, means, changes[node].array, winners, gradients, ops)
        for c in self.graph.into[node]:
            if self.graph.below[c]:
                below = changes[self.graph.below[c]].scaled(self.ratios[c])
                self.correlate(c, below, means[node], winners[c], gradients, ops[c], bias=False)

    def winners_at(
        self, node: int, nodes: Sequence[Any], constant: Sequence[Any], winners: Sequence[Any], work: Any, ops: Any
    ) -> dict[int, Any]:
        """Return the winners of the connections into a node at some states; those from the image are constant."""
        found = {}
        for c in self.graph.into[node]:
            below, edge = self.graph.below[c], self.edges[c]
            found[c] = winners[c] if below and edge.has_winners else constant[c]
            if below and edge.has_winners:
                edge.drive(nodes[below], work, winners[c], ops[c])
        return found

    def _wide(self, x: Any, layers: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return images and states in the type to compute in, after the gate: images as `Network.batch` takes them."""
        x = checked_images(x, self.graph.input_shape, self.dtype)
        layers = items("layers", layers)
        found, shapes = [getattr(s, "shape", None) for s in layers], [(len(x), *size) for size in self.graph.shapes]
        require(found == shapes, f"layers must be states of shapes {shapes}, not {found}")
        return self.device.asarray(x, self.dtype), [self.device.asarray(s, self.dtype) for s in layers]

    def _beta(self, beta: Any, samples: int) -> Any:
        """Return a beta for all samples, or one each, after a look at it."""
        if is_number(beta):
            return number("beta", beta)
        right = getattr(beta, "shape", None) == (samples,) and beta.dtype.kind == "f"
        require(right, f"beta must be a number or {samples} floats, one a sample, not {shown(beta)}")
        return beta

    def _workspace(self, x: Any) -> Workspace:
        precision = get_precision(self.dtype.name, self.precision.exact)
        return Memory(self.graph, self.device, precision).workspace(len(x))

    def _drives(self, x: Any, layers: Sequence[Any], workspace: Workspace) -> tuple[list[Any], list[Any]]:
        """Return the drive of each node and the winners of each connection."""
        xp, nodes, winners = self.device.xp, [x, *layers], []
        drives = [xp.zeros_like(s) for s in layers]
        for c, edge in enumerate(self.edges):
            above = self.graph.above[c]
            own = xp.empty_like(nodes[above])
            winners.append(xp.empty(own.shape, np.uint8) if edge.has_winners else None)
            edge.drive(nodes[self.graph.below[c]], own, winners[c], workspace.ops[c])
            drives[above - 1] += own
        return drives, winners

    def phi(self, x: Any, layers: Sequence[Any]) -> Any:
        """Return ``<s^j, drive^j>`` node by node, shape (L, B); arguments and errors as `value`."""
        x, layers = self._wide(x, layers)
        drives, _ = self._drives(x, layers, self._workspace(x))
        xp = self.device.xp
        return xp.stack([(s * d).reshape(len(s), -1).sum(axis=1) for s, d in zip(layers, drives, strict=True)])

    def value(self, x: Any, layers: Sequence[Any], nudges: Sequence[Nudge] = (), beta: Any = 0.0) -> Any:
        """Return F a sample, shape (B,).

        Parameters
        ----------
        x : array of shape (B, H, W, C)
        layers : sequence of arrays (B, *shape)
            Inside the range of the activation.
        nudges : sequence of Nudge
        beta : float or array of shape (B,)

        Raises
        ------
        ConfigurationError
            If images, states, nudges or beta are none, or of other shapes; or the activation has no potential.
        """
        x, layers = self._wide(x, layers)
        beta = self._beta(beta, len(x))
        total = self.device.xp.zeros(len(x), self.dtype)
        for s, phi, a in zip(layers, self.phi(x, layers), self.weights, strict=True):
            total += a * (self.activation.potential(s).reshape(len(s), -1).sum(axis=1) - phi)
        for term, weight, target in items("nudges", nudges, Nudge):
            total += beta * weight * term.loss(layers[term.layer - 1], target)
        return total

    def force(self, x: Any, layers: Sequence[Any], nudges: Sequence[Nudge] = (), beta: Any = 0.0) -> list[Any]:
        """Return ``a_j g^j`` of each node, g^j the sum of its inputs: the part of -dF/ds^j not from the potential.

        -dF/ds^j is this minus ``a_j sigma^-1(s^j)`` (``a_j s^j`` for a clip of slope one). An array (B, *shape) of each
        node; arguments and errors as `value`.
        """
        x, layers = self._wide(x, layers)
        workspace = self._workspace(x)
        drives, winners = self._drives(x, layers, workspace)
        forces = [a * drive for drive, a in zip(drives, self.weights, strict=True)]
        for c, edge in enumerate(self.edges):
            below, above = self.graph.below[c], self.graph.above[c]
            if below:
                topdown = self.device.xp.empty_like(layers[below - 1])
                edge.topdown(layers[above - 1], winners[c], topdown, workspace.ops[c])
                forces[below - 1] += self.weights[above - 1] * topdown
        scale = -self._beta(beta, len(x)) * self.device.xp.ones(len(x), self.dtype)
        for term, weight, target in items("nudges", nudges, Nudge):
            term.add_force(layers[term.layer - 1], target, weight * scale, forces[term.layer - 1])
        return forces

    def parameter_gradient(self, x: Any, layers: Sequence[Any]) -> dict[str, Any]:
        """Return dF/dtheta summed over the batch, ``-a_j corr(s^i, U(s^j))``, by path: ``layers.1.weight`` and so on.

        Of the weights that multiply, and of biases; each has the shape of its parameter. Arguments and errors as
        `value`.
        """
        x, layers = self._wide(x, layers)
        workspace, nodes = self._workspace(x), [x, *layers]
        _, winners = self._drives(x, layers, workspace)
        gradients: dict[str, Any] = {}
        for c, (edge, path) in enumerate(zip(self.edges, self.graph.paths, strict=True)):
            arrays = {name: array for name, array in edge.parameters().items() if name in ("weight", "bias")}
            gradients |= {f"{path}.{name}": self.device.xp.zeros_like(array) for name, array in arrays.items()}
            above = self.graph.above[c]
            signed = -self.weights[above - 1] * nodes[above]
            self.correlate(c, nodes[self.graph.below[c]], signed, winners[c], gradients, workspace.ops[c])
        return gradients
