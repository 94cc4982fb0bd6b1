"""The two systems that settle: states of the energy itself, and deviations from a free state.

Feedback weight lambda: the energy ``E = sum_n a_n (potential(s^n) - <s^n, d^n>)``, ``a_n = lambda^-(L - n)``, gives
``s^n <- sigma(d^n + lambda * topdown^n + force^n / a_n)``. lambda = 1 is the convolutional Hopfield network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupyep.activations import Activation
from cupyep.backend.cuda import identity
from cupyep.backend.device import Device
from cupyep.backend.graphs import Replays
from cupyep.heads import LossTerm
from cupyep.layers import Edge
from cupyep.settling import SettleStats
from cupyep.workspace import Workspace


class Nudge(NamedTuple):
    """One summand ``weight * term.loss(s^layer, target)`` of the loss that nudges."""

    term: LossTerm
    weight: float
    target: Any


@dataclass
class State:
    """States of a settled phase.

    Attributes
    ----------
    layers : list of arrays (B, *shape)
        s^1 .. s^L, after pooling. With several phases in one batch, B = phases * N, phase-major.
    drives : list of arrays or None
        Total drive g^n of the last update, ``s^n = sigma(g^n)``.
    winners : list of uint8 arrays or None
        Max-pooling winners of the last drives, None for edges without.
    stats : SettleStats or None
    deviations : list of arrays or None
        Scaled deviations ``eps^n = a_n (s^n - s*^n)`` of a nudged phase in deviation form.
    scales : list of float or None
        The a_n that belong to them.
    """

    layers: list[Any]
    drives: list[Any] | None = None
    winners: list[Any] | None = None
    stats: SettleStats | None = None
    deviations: list[Any] | None = None
    scales: list[float] | None = None

    def copy(self) -> State:
        """Return a state whose arrays are its own."""

        def copied(arrays):
            return None if arrays is None else [None if a is None else a.copy() for a in arrays]

        return State(
            copied(self.layers),
            copied(self.drives),
            copied(self.winners),
            self.stats,
            copied(self.deviations),
            self.scales,
        )


def layer_weights(depth: int, feedback: float) -> list[float]:
    """Return ``a_n = feedback^-(depth - n)`` for n = 1..depth."""
    return [feedback ** -(depth - n) for n in range(1, depth + 1)]


class _System:
    """What both systems share: the network's parts, the nudges a layer, the residual."""

    form = ""  # of the phase, as `Network.settle` names it

    def __init__(
        self,
        edges: Sequence[Edge],
        activation: Activation,
        feedback: float,
        device: Device,
        workspace: Workspace,
        nudges: Sequence[Nudge],
        betas: Sequence[float],
        divisors: Sequence[float] | None = None,
    ):
        self.edges = edges
        self.activation = activation
        self.feedback = feedback
        self.device = device
        self.xp = device.xp
        self.workspace = workspace
        self.depth = len(edges)
        self.weights = layer_weights(self.depth, feedback)
        self.phases = len(betas)
        self.samples = workspace.batch // self.phases
        self.residual = workspace.buffers.get("residual", (self.depth, workspace.batch))
        self.drive = workspace.states("drive")
        self.topdown = workspace.states("topdown")
        self.updates = workspace.update_ops(activation)
        self.scratch = workspace.update_scratch(self.updates)
        self.force = workspace.one_at_a_time("force")
        self._nudges = self._loaded(nudges, betas, divisors or [1.0] * self.depth)
        self.term_scratch = self._term_scratch()

    def _loaded(
        self, nudges: Sequence[Nudge], betas: Sequence[float], divisors: Sequence[float]
    ) -> dict[int, list[tuple[LossTerm, Any, Any]]]:
        """Copy targets and scales ``-beta * weight / divisor`` into buffers; return (term, target, scale) a layer."""
        batch, buffers = self.workspace.batch, self.workspace.buffers
        loaded: dict[int, list[tuple[LossTerm, Any, Any]]] = {}
        targets: dict[int, Any] = {}
        for index, (term, weight, target) in enumerate(nudges):
            if target is not None and id(target) not in targets:  # several terms may have one target
                name = ("target", len(targets))
                targets[id(target)] = buffers.get(name, (batch, *target.shape[1:]), target.dtype)
                self._tile(target, targets[id(target)])
            scale = buffers.get(("scale", index), (batch,))
            for phase, beta in enumerate(betas):
                scale[phase * self.samples : (phase + 1) * self.samples] = -beta * weight / divisors[term.layer - 1]
            loaded.setdefault(term.layer, []).append((term, targets.get(id(target)), scale))
        return loaded

    def _tile(self, array: Any, out: Any) -> Any:
        """Write `array` (N, ...) into `out` (phases * N, ...), once a phase; return `out`."""
        out.reshape(self.phases, *array.shape)[...] = array
        return out

    def _term_scratch(self) -> Any:
        """Return scratch for one term at a time: that of the updates, where it is large enough."""
        batch = self.workspace.batch
        needed = max((term.scratch_size(batch) for terms in self._nudges.values() for term, *_ in terms), default=0)
        return self.scratch if needed <= self.scratch.size else self.workspace.buffers.get("term scratch", (needed,))

    def host(self, array: Any) -> np.ndarray:
        return self.device.to_numpy(array)

    def _residual_row(self, n: int, measure: bool) -> Any:
        return self.residual[n - 1] if measure else None

    def _force(self, n: int, s: Any) -> Any:
        """Return ``sum of scale * dloss/ds`` of layer n's nudges at `s`, None where it has none."""
        terms = self._nudges.get(n)
        if not terms:
            return None
        force = self.force[n - 1]
        force[...] = 0
        for term, target, scale in terms:
            term.add_force(s, target, scale, force, self.term_scratch)
        return force

    def _moving(self) -> list[Any]:
        """Return the arrays that the iteration moves."""
        raise NotImplementedError

    def _arrays(self) -> list[Any]:
        """Return the arrays that the iteration reads and writes, but for parameters and what the workspace holds."""
        own = [self.residual, self.scratch, self.term_scratch, *self.drive, *self.topdown, *self.force]
        return own + [array for terms in self._nudges.values() for _, *pair in terms for array in pair]

    def _capture_key(self) -> tuple[Any, ...] | None:
        """Return all that an iteration depends on besides the content of arrays; None: it must not be captured."""
        parts = [self.activation.code, *(edge.capture_key() for edge in self.edges)]
        parts += [term.capture_key() for n, terms in self._nudges.items() for term, *_ in terms]
        if None in parts:
            return None
        arrays = (None if array is None else identity(array) for array in self._arrays())
        return (self.form, self.phases, self.feedback, tuple(self._nudges), *parts, *arrays)

    @functools.cached_property
    def _replays(self) -> Replays:
        return self.workspace.replayer.of(None if self.device.graphs is None else self._capture_key())

    def repeat(self, name: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, a part of the phase told from others by its `name`, or replay what it did before.

        See `cupyep.backend.graphs`.
        """
        self._replays.run(name, work)

    def remember(self) -> None:
        """Keep a copy of the states for `distance_from_remembered`."""
        for kept, now in zip(self.workspace.states("remembered"), self._moving(), strict=True):
            kept[...] = now

    def distance_from_remembered(self) -> float:
        """Return the largest root-mean-square distance of any layer and sample from the states remembered."""
        distances = [
            ((now - kept) ** 2).reshape(len(now), -1).mean(axis=1).max()
            for kept, now in zip(self.workspace.states("remembered"), self._moving(), strict=True)
        ]
        return math.sqrt(float(self.xp.stack(distances).max()))


class Classical(_System):
    """States of the energy: ``s^n <- sigma(d^n + lambda * topdown^n - (beta / a_n) dL/ds^n)``.

    Parameters
    ----------
    x : array of shape (N, H, W, C)
    state : State
        Start, overwritten; its `drives` and `winners` are written too.
    nudges : sequence of Nudge
    betas : sequence of float
        One a phase; phases are settled as one batch of ``len(betas) * N``.
    """

    form = "classical"
    drives_current = False

    def __init__(self, edges, activation, feedback, device, workspace, x, state, nudges=(), betas=(0.0,)):
        divisors = layer_weights(len(edges), feedback)
        super().__init__(edges, activation, feedback, device, workspace, nudges, betas, divisors)
        self.state = state
        for topdown in self.topdown:
            topdown[...] = 0
        self._drive_from_input(x)

    def _drive_from_input(self, x: Any) -> None:
        """Compute the first drive, constant for the whole phase, once for all phases."""
        first, n = self.edges[0], self.samples
        winners = self.state.winners[0]
        top = None if winners is None else winners[:n]
        first.drive(x, self.drive[0][:n], top, self.workspace.input_ops(n))
        for phase in range(1, self.phases):
            self.drive[0][phase * n : (phase + 1) * n] = self.drive[0][:n]
            if winners is not None:
                winners[phase * n : (phase + 1) * n] = top

    def _moving(self):
        return self.state.layers

    def _arrays(self):
        return [*super()._arrays(), *self.state.layers, *self.state.drives, *self.state.winners]

    def forward(self, n: int) -> None:
        if n > 1:
            below, ops = self.state.layers[n - 2], self.workspace.ops[n - 1]
            self.edges[n - 1].drive(below, self.drive[n - 1], self.state.winners[n - 1], ops)

    def backward(self, n: int) -> None:
        if n < self.depth:
            above, winners = self.state.layers[n], self.state.winners[n]
            self.edges[n].topdown(above, winners, self.topdown[n - 1], self.workspace.ops[n])

    def update(self, n: int, measure: bool) -> None:
        s, topdown = self.state.layers[n - 1], self.topdown[n - 1] if n < self.depth else None
        self.updates.states(
            s,
            self.drive[n - 1],
            topdown,
            self.feedback,
            self._force(n, s),
            self.state.drives[n - 1],
            self._residual_row(n, measure),
            self.scratch,
        )


class Deviation(_System):
    """Scaled deviations ``eps^n = a_n (s^n - s*^n)`` from a free state, at its pooling winners.

    ``eps^n <- a_n [sigma(g*^n + t^n / a_n) - s*^n]`` with
    ``t^n = w_{n+1}^T * U(eps^{n+1}) + lambda G(w_n * eps^{n-1}) - beta dL/ds^n(s* + eps / a)``,
    started at zero. Every layer's eps is of order beta however small lambda and however deep the network.

    Parameters
    ----------
    free : State
        With drives and winners, N samples.
    tangent : bool
        Take the limit beta -> 0, ``eps^n <- sigma'(g*^n) t^n`` with the loss gradient at s*: recurrent
        backpropagation.
    """

    drives_current = True  # all zero, as at the free state

    def __init__(self, edges, activation, feedback, device, workspace, free, nudges, betas, tangent=False):
        super().__init__(edges, activation, feedback, device, workspace, nudges, betas)
        self.free = free
        self.tangent = tangent
        self.form = "tangent" if tangent else "deviation"
        self.eps = workspace.states("eps")
        self.nudged = workspace.one_at_a_time("nudged state")
        self.winners = list(free.winners)
        if self.phases > 1:
            tiled = zip(free.winners, workspace.winners("tiled winners"), strict=True)
            self.winners = [None if w is None else self._tile(w, out) for w, out in tiled]
        self.slopes = []
        for n, g in enumerate(free.drives if tangent else (), 1):
            slope = workspace.buffers.get(("slope at rest", n), g.shape)
            activation.slope(g, slope)
            self.slopes.append(slope)
        for arrays in (self.eps, self.drive, self.topdown):
            for array in arrays:
                array[...] = 0

    def _moving(self):
        return self.eps

    def _arrays(self):
        rest = [*self.slopes, *self.free.layers, *self.free.drives]
        return [*super()._arrays(), *self.eps, *self.nudged, *self.winners, *rest]

    def forward(self, n: int) -> None:
        if n > 1:
            ops = self.workspace.ops[n - 1]
            self.edges[n - 1].linear_drive(self.eps[n - 2], self.drive[n - 1], self.winners[n - 1], ops)

    def backward(self, n: int) -> None:
        if n < self.depth:
            self.edges[n].topdown(self.eps[n], self.winners[n], self.topdown[n - 1], self.workspace.ops[n])

    def _nudged(self, n: int) -> Any:
        """Return the state that layer n's losses see: ``s* + eps / a``, s* in the tangent limit."""
        if self.tangent or n not in self._nudges:
            return self.free.layers[n - 1]
        nudged = self.nudged[n - 1]
        self.xp.multiply(self.eps[n - 1], 1 / self.weights[n - 1], out=nudged)
        for start in range(0, len(nudged), self.samples):
            part = nudged[start : start + self.samples]
            part += self.free.layers[n - 1]
        return nudged

    def update(self, n: int, measure: bool) -> None:
        drive, topdown = self.drive[n - 1] if n > 1 else None, self.topdown[n - 1] if n < self.depth else None
        force, residual = self._force(n, self._nudged(n)), self._residual_row(n, measure)
        shared = (self.eps[n - 1], drive, topdown, self.feedback, force)
        if self.tangent:
            self.updates.tangents(*shared, self.slopes[n - 1], residual, self.scratch)
        else:
            rest, weight = self.free.drives[n - 1], self.weights[n - 1]
            self.updates.deviations(*shared, weight, rest, residual, self.scratch)
