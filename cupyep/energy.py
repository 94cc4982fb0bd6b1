"""The energy that settles, as an explicit function: value a sample, state gradient, parameter gradient.

``F(s) = sum_n a_n (sum potential(s^n) - <s^n, d^n(s^(n-1))>) + beta * sum_i weight_i L_i(s)`` with
``a_n = lambda^-(L - n)``. With lambda = 1 and a clip of slope one this is ``E = 1/2 sum |s|^2 - Phi`` of Scellier &
Bengio (2017) and Laborieux et al. (2021). Settling (`dynamics`) never evaluates F; it is the definition that gradients
refer to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.activations import Activation
from cupyep.backend.device import Device
from cupyep.backend.precision import Precision
from cupyep.batch import checked_images
from cupyep.dynamics import Nudge, layer_weights
from cupyep.errors import instance, is_number, items, number, require, shown
from cupyep.layers import Edge
from cupyep.workspace import Memory, Workspace


class Energy:
    """Energy of the states of given edges.

    Parameters
    ----------
    edges : sequence of Edge
    activation : Activation
    feedback : float
        lambda.
    device : Device
    precision : Precision
    """

    def __init__(
        self,
        edges: Sequence[Edge],
        activation: Activation,
        feedback: float,
        device: Device,
        precision: Precision,
    ):
        self.edges = items("edges", edges, Edge)
        require(len(self.edges) > 0, "an energy needs at least one of edges")
        self.activation = instance("activation", activation, Activation)
        self.weights = layer_weights(len(self.edges), number("feedback", feedback, above=0, high=1))
        self.device = instance("device", device, Device)
        self.precision = instance("precision", precision, Precision)
        self.dtype = precision.number

    def _wide(self, x: Any, layers: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return images and states in the type to compute in, after the gate: images as `Network.batch` takes them."""
        x = checked_images(x, self.edges[0].in_shape, self.dtype)
        layers = items("layers", layers)
        found, shapes = [getattr(s, "shape", None) for s in layers], [(len(x), *e.out_shape) for e in self.edges]
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
        return Memory(self.edges, self.device, self.precision).workspace(len(x))

    def _drives(self, x: Any, layers: Sequence[Any], workspace: Workspace) -> tuple[list[Any], list[Any]]:
        xp, drives, winners = self.device.xp, [], []
        for n, edge in enumerate(self.edges):
            drives.append(xp.empty_like(layers[n]))
            winners.append(xp.empty(layers[n].shape, np.uint8) if edge.has_winners else None)
            edge.drive(x if n == 0 else layers[n - 1], drives[n], winners[n], workspace.ops[n])
        return drives, winners

    def phi(self, x: Any, layers: Sequence[Any]) -> Any:
        """Return ``<s^n, d^n(s^(n-1))>`` layer by layer, shape (L, B)."""
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
        """Return ``a_n g^n`` a layer, g^n the total drive: the part of -dF/ds^n that is not from the potential.

        -dF/ds^n is this minus ``a_n sigma^-1(s^n)`` (``a_n s^n`` for a clip of slope one).
        """
        x, layers = self._wide(x, layers)
        workspace = self._workspace(x)
        drives, winners = self._drives(x, layers, workspace)
        forces = []
        for n, (drive, a) in enumerate(zip(drives, self.weights, strict=True)):
            force = a * drive
            if n + 1 < len(self.edges):
                topdown = self.device.xp.empty_like(layers[n])
                self.edges[n + 1].topdown(layers[n + 1], winners[n + 1], topdown, workspace.ops[n + 1])
                force += self.weights[n + 1] * topdown
            forces.append(force)
        scale = -self._beta(beta, len(x)) * self.device.xp.ones(len(x), self.dtype)
        for term, weight, target in items("nudges", nudges, Nudge):
            term.add_force(layers[term.layer - 1], target, weight * scale, forces[term.layer - 1])
        return forces

    def parameter_gradient(self, x: Any, layers: Sequence[Any]) -> dict[str, Any]:
        """Return dF/dtheta summed over the batch, ``-a_n corr(s^(n-1), U_n(s^n))`` for weights, by parameter path."""
        x, layers = self._wide(x, layers)
        workspace = self._workspace(x)
        _, winners = self._drives(x, layers, workspace)
        gradients = {}
        for n, edge in enumerate(self.edges):
            own = {name: self.device.xp.zeros_like(array) for name, array in edge.parameters().items()}
            below, above = x if n == 0 else layers[n - 1], -self.weights[n] * layers[n]
            edge.add_gradient(below, above, winners[n], own["weight"], own.get("bias"), workspace.ops[n])
            gradients |= {f"layers.{n + 1}.{name}": array for name, array in own.items()}
        return gradients
