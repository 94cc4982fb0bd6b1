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
from cupyep.kernels.update import UpdateOps
from cupyep.layers import Edge
from cupyep.layout import PhaseBuffers
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
        The a_n that belong to them, times a power of two in float16.
    buffers : PhaseBuffers or None
        Where these arrays are in the network's memory; None for arrays of its own.
    """

    layers: list[Any]
    drives: list[Any] | None = None
    winners: list[Any] | None = None
    stats: SettleStats | None = None
    deviations: list[Any] | None = None
    scales: list[float] | None = None
    buffers: PhaseBuffers | None = None

    @property
    def end(self) -> int:
        """Bytes of the network's memory that the next phase must leave alone."""
        return 0 if self.buffers is None else self.buffers.end

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"buffers": None}  # a pickled state's arrays are its own

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
    scale = 1.0  # by which what moves is multiplied, and with it the residual before its square
    relaxation = 1.0  # how far an update goes, in terms of what the rule says; `cupyep.settling.settle` sets it

    def __init__(
        self,
        edges: Sequence[Edge],
        activation: Activation,
        feedback: float,
        device: Device,
        workspace: Workspace,
        updates: UpdateOps,
        buffers: PhaseBuffers,
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
        self.updates = updates
        self.buffers = buffers
        self.depth = len(edges)
        self.weights = layer_weights(self.depth, feedback)
        self.phases = len(betas)
        self.samples = workspace.batch // self.phases
        self.precision = workspace.precision
        self.residual = buffers.residual
        self.flows = buffers.flows
        self.flows.clear()
        self._nudges = self._loaded(nudges, betas, divisors or [1.0] * self.depth)
        for term, *_ in nudges:
            term.refresh()

    def _loaded(
        self, nudges: Sequence[Nudge], betas: Sequence[float], divisors: Sequence[float]
    ) -> dict[int, list[tuple[LossTerm, Any, Any]]]:
        """Copy targets and scales ``-beta * weight / divisor`` into buffers; return (term, target, scale) a layer."""
        loaded: dict[int, list[tuple[LossTerm, Any, Any]]] = {}
        targets: dict[int, Any] = {}
        for (term, weight, target), scale in zip(nudges, self.buffers.scales, strict=True):
            if target is not None and id(target) not in targets:  # several terms may have one target
                targets[id(target)] = self._tile(target, self.buffers.targets[len(targets)])
            for phase, beta in enumerate(betas):
                scale[phase * self.samples : (phase + 1) * self.samples] = -beta * weight / divisors[term.layer - 1]
            loaded.setdefault(term.layer, []).append((term, targets.get(id(target)), scale))
        return loaded

    def _tile(self, array: Any, out: Any) -> Any:
        """Write `array` (N, ...) into `out` (phases * N, ...), once a phase; return `out`."""
        out.reshape(self.phases, *array.shape)[...] = array
        return out

    @property
    def host(self) -> Callable[[Any], np.ndarray]:
        """What copies an array to the host; it holds none of this phase's."""
        return self.device.to_numpy

    def _force(self, n: int, part: slice) -> Any:
        """Return ``sum of scale * dloss/ds`` of layer n's nudges for some rows."""
        force, scratch = self.buffers.force[n][: part.stop - part.start], self.buffers.scratch
        view = seen = None
        for number, (term, target, scale) in enumerate(self._nudges[n]):
            if view is None or term.view != view:
                view, seen = term.view, self._seen(n, part, *term.view)
            target = None if target is None else target[part]
            term.put_force(seen, target, scale[part], force, scratch, add=number > 0)
        return force

    def _seen(self, n: int, part: slice, pool: int | None, dtype: Any) -> Any:
        """Return some rows of layer n's state as a loss sees it: see `LossTerm.view`."""
        raise NotImplementedError

    def _see(self, n: int, rows: int, pool: int | None, dtype: Any, s: Any, scale: float, g: Any) -> Any:
        """Return ``sigma(g) + scale * s``, or `s`, as a loss sees it."""
        shape = self.edges[n - 1].out_shape
        if pool is not None:
            shape = (shape[0] // pool, shape[1] // pool, shape[2])
        memory = self.buffers.nudged[n].reshape(-1).view(self.precision.number if dtype is None else dtype)
        seen = memory[: rows * math.prod(shape)].reshape(rows, *shape)
        self.updates.see(s, scale, g, pool, seen, self.buffers.scratch)
        return seen

    def _take_up(self, n: int) -> None:
        """Compute the drive of layer n."""
        raise NotImplementedError

    def _take_down(self, n: int) -> None:
        """Compute the top-down input of layer n."""
        raise NotImplementedError

    def _update(self, n: int, part: slice, drive: Any, topdown: Any, residual: Any) -> None:
        """Update some rows of layer n."""
        raise NotImplementedError

    def forward(self, n: int) -> None:
        if n > 1:
            self._take_up(n)

    def backward(self, n: int) -> None:
        if n < self.depth:
            self._take_down(n)

    def prime(self, n: int) -> None:
        self.forward(n)
        self.flows.keep(n, slice(None))

    def update(self, n: int, measure: bool) -> None:
        row = self.residual[n - 1] if measure else None
        inputs = self.flows.inputs(n)
        for part in self.buffers.parts[n - 1]:
            drive, topdown, residual = (None if array is None else array[part] for array in (*inputs, row))
            self._update(n, part, drive, topdown, residual)
            self.flows.keep(n, part)

    def _arrays(self) -> list[Any]:
        """Return the arrays that the iteration reads and writes, but for parameters and those of the operations."""
        return self.buffers.arrays()

    def _capture_key(self) -> tuple[Any, ...] | None:
        """Return all that an iteration depends on besides the content of arrays; None: it must not be captured."""
        parts = [self.activation.code, *(edge.capture_key() for edge in self.edges)]
        parts += [term.capture_key() for n, terms in self._nudges.items() for term, *_ in terms]
        if None in parts:
            return None
        arrays = (None if array is None else identity(array) for array in self._arrays())
        return (self.form, self.scale, self.phases, self.feedback, tuple(self._nudges), *parts, *arrays)

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
        for kept, now in zip(self.buffers.remembered, self.buffers.states, strict=True):
            kept[...] = now

    def distance_from_remembered(self) -> float:
        """Return the largest root-mean-square distance of any layer and sample from the states remembered."""
        distances = []
        for kept, now in zip(self.buffers.remembered, self.buffers.states, strict=True):
            kept -= now
            kept *= kept
            distances.append(kept.reshape(len(now), -1).mean(axis=1).max())
        return math.sqrt(float(self.xp.stack(distances).max()))


class Classical(_System):
    """States of the energy: ``s^n <- sigma(d^n + lambda * topdown^n - (beta / a_n) dL/ds^n)``.

    Parameters
    ----------
    x : array of shape (N, H, W, C)
    input_ops : object
        The first edge's operations for N samples: it sees the input only once a phase.
    buffers : PhaseBuffers
        Its `states` are the start; they are overwritten, and so are `drives` (those of measured updates) and `winners`.
    nudges : sequence of Nudge
    betas : sequence of float
        One a phase; phases are settled as one batch of ``len(betas) * N``.
    """

    form = "classical"
    drives_current = False

    def __init__(
        self, edges, activation, feedback, device, workspace, updates, buffers, x, input_ops, nudges=(), betas=(0.0,)
    ):
        divisors = layer_weights(len(edges), feedback)
        super().__init__(edges, activation, feedback, device, workspace, updates, buffers, nudges, betas, divisors)
        self.states, self.drives, self.winners = buffers.states, buffers.drives, buffers.winners
        self._drive_from_input(x, input_ops)

    def _drive_from_input(self, x: Any, input_ops: Any) -> None:
        """Compute the first drive, constant for the whole phase, once for all phases."""
        drive, winners, n = self.flows.drive[0], self.winners[0], self.samples
        top = None if winners is None else winners[:n]
        self.edges[0].drive(x, drive[:n], top, input_ops)
        for phase in range(1, self.phases):
            drive[phase * n : (phase + 1) * n] = drive[:n]
            if winners is not None:
                winners[phase * n : (phase + 1) * n] = top

    def _take_up(self, n):
        out, ops = self.flows.below(n), self.workspace.ops[n - 1]
        self.edges[n - 1].drive(self.states[n - 2], out, self.winners[n - 1], ops)

    def _take_down(self, n):
        self.edges[n].topdown(self.states[n], self.winners[n], self.flows.above(n), self.workspace.ops[n])

    def _seen(self, n, part, pool, dtype):
        s = self.states[n - 1][part]
        if pool is None and s.dtype == (self.precision.number if dtype is None else dtype):
            return s
        return self._see(n, len(s), pool, dtype, s, 1.0, None)

    def _update(self, n, part, drive, topdown, residual):
        s = self.states[n - 1][part]
        g = None if self.drives is None or residual is None else self.drives[n - 1][part]
        force = self._force(n, part) if n in self._nudges else None
        self.updates.states(s, drive, topdown, self.feedback, force, g, residual, self.buffers.scratch, self.relaxation)


class Deviation(_System):
    """Scaled deviations ``eps^n = a_n (s^n - s*^n)`` from a free state, at its pooling winners.

    ``eps^n <- a_n [sigma(g*^n + t^n / a_n) - s*^n]`` with
    ``t^n = w_{n+1}^T * U(eps^{n+1}) + lambda G(w_n * eps^{n-1}) - beta dL/ds^n(s* + eps / a)``,
    started at zero. Every layer's eps is of order beta however small lambda and however deep the network. Stored in
    float16 it is multiplied by a power of two, which the iteration does not see: only the a_n and the forces have it.

    Parameters
    ----------
    free : State
        With drives and winners, N samples. Nothing else of it is looked at: ``s* = sigma(g*)``.
    tangent : bool
        Take the limit beta -> 0, ``eps^n <- sigma'(g*^n) t^n`` with the loss gradient at s*: recurrent
        backpropagation.
    """

    drives_current = True  # all zero, as at the free state

    def __init__(
        self, edges, activation, feedback, device, workspace, updates, buffers, free, nudges, betas, tangent=False
    ):
        strength = max((abs(weight) for _, weight, _ in nudges), default=1.0) * max(map(abs, betas))
        self.scale = workspace.precision.scale(strength)
        divisors = [1 / self.scale] * len(edges)
        super().__init__(edges, activation, feedback, device, workspace, updates, buffers, nudges, betas, divisors)
        self.weights = [self.scale * a for a in self.weights]
        self.tangent = tangent
        self.form = "tangent" if tangent else "deviation"
        self.rest = free.drives
        self.eps = buffers.states
        self.winners = list(free.winners)
        if self.phases > 1:
            tiled = zip(free.winners, buffers.winners, strict=True)
            self.winners = [None if w is None else self._tile(w, out) for w, out in tiled]
        if tangent:
            for g, slope in zip(self.rest, buffers.slopes, strict=True):
                activation.slope(g, slope)
        buffers.moving[...] = 0

    def _arrays(self):
        return [*super()._arrays(), *self.winners, *self.rest]

    def _take_up(self, n):
        out, ops = self.flows.below(n), self.workspace.ops[n - 1]
        self.edges[n - 1].linear_drive(self.eps[n - 2], out, self.winners[n - 1], ops)

    def _take_down(self, n):
        self.edges[n].topdown(self.eps[n], self.winners[n], self.flows.above(n), self.workspace.ops[n])

    def _at_rest(self, array: Any, part: slice) -> Any:
        """Return the rows of an array (N, ...) of the rest point that belong to a part: once, if it is all phases."""
        if part.stop - part.start > self.samples:
            return array
        return array[part.start % self.samples :][: part.stop - part.start]

    def _seen(self, n, part, pool, dtype):
        """Return ``s* + eps / a``, s* in the tangent limit."""
        g, eps = self._at_rest(self.rest[n - 1], part), None if self.tangent else self.eps[n - 1][part]
        return self._see(n, part.stop - part.start, pool, dtype, eps, 1 / self.weights[n - 1], g)

    def _update(self, n, part, drive, topdown, residual):
        force = self._force(n, part) if n in self._nudges else None
        shared = (self.eps[n - 1][part], drive, topdown, self.feedback, force)
        if self.tangent:
            slope = self._at_rest(self.buffers.slopes[n - 1], part)
            self.updates.tangents(*shared, slope, residual, self.buffers.scratch, self.relaxation)
        else:
            g = self._at_rest(self.rest[n - 1], part)
            self.updates.deviations(*shared, self.weights[n - 1], g, residual, self.buffers.scratch, self.relaxation)
