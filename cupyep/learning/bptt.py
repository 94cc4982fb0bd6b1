"""Backpropagation through time: the gradient of L at the last of T synchronous steps, the last K of them unrolled.

The adjoint of ``s_{t+1} = sigma(g_t)`` is explicit. With mu = dL/ds_{t+1} and ``q^n = mu^n sigma'(g^n_t)``, a
connection from i to j gives mu^i ``w^T * U(q^j)`` and mu^j ``(a_j / a_i) G(w * q^i)``, both at the winners of step t.
This is the ground truth for EP (Ernoult et al. 2019), and it stores states, drives and winners of K steps: the memory
that EP does not need.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupyep.batch import Batch
from cupyep.errors import integer
from cupyep.heads import Nudge
from cupyep.learning.gradients import Gradients
from cupyep.learning.learner import Learner, StepResult, term_scratch_size
from cupyep.memory.layout import Layout, PhaseBuffers, PhaseShape, Stack
from cupyep.memory.workspace import Needs
from cupyep.network import Network
from cupyep.phases import Classical
from cupyep.settling import STRONG, UNROLLED_STEPS, SettleStats, check_settling, iterate, stats_of
from cupyep.signals import Augmenter
from cupyep.state import State
from cupyep.structure import exclusive

ADJOINT_TOLERANCE = 1e-5
ADJOINT_RELAXATION = 1.6  # of strong feedback: weak feedback needs few passes, and too large a step only adds to them


class BackpropagationThroughTime(Learner):
    """BPTT over the last `unrolled_steps` of ``free_steps + unrolled_steps`` iterations.

    Parameters
    ----------
    network : Network
    free_steps : int, optional
        Iterations before the unrolled ones, by `schedule`.
    unrolled_steps : int
        K, synchronous.
    schedule, tolerance, relaxation
        Of the iterations before; see `EquilibriumPropagation`.
    signals : sequence of Augmenter
        Their losses at the last state are part of L, as in the nudged phase of EP.
    micro_batch : int, optional
        See `Learner`.
    """

    def __init__(
        self,
        network: Network,
        free_steps: int | None = None,
        unrolled_steps: int = UNROLLED_STEPS,
        schedule: str | None = None,
        tolerance: float | None = None,
        signals: Sequence[Augmenter] = (),
        micro_batch: int | None = None,
        relaxation: float | None = None,
    ):
        super().__init__(network, signals, micro_batch)
        self._settle_by(free_steps, schedule, tolerance, relaxation)
        self.unrolled_steps = unrolled_steps
        steps = {"free_steps": self.free_steps, "unrolled_steps": unrolled_steps}
        check_settling(self.schedule, steps, tolerance, self.relaxation)

    def settle_free(self, batch: Batch, **how: Any) -> State:
        """Return the state before the unrolled steps; `how` as in `EquilibriumPropagation.settle_free`."""
        return self.network.settle_free(batch, **(self._how(self.free_steps) | how))

    def settled(self, batch: Batch) -> State:
        """Return the state after the unrolled steps, too: the loss of that one is lowered."""
        unrolled = {"steps": self.unrolled_steps, "schedule": "synchronous", "retain": "states"}
        return self.network.settle_free(batch, self.settle_free(batch), **unrolled)

    def _add(self, gradients: Gradients, part: Batch, total: int, draw: None) -> StepResult:
        nudges = self.network.nudges(part, self.signals)  # before its memory has states: a signal may ask the network
        self.network.memory.expect(self.needs(len(part), nudges))
        return self._unroll_and_back(gradients, part, nudges, total, self.settle_free(part))

    def needs(self, samples: int, nudges: Sequence[Nudge]) -> Needs:
        network, shape = self.network, self._shape(samples, nudges)
        lay_out = functools.partial(lay_out_unrolled, network.memory.layout, shape=shape)
        return Needs(network.free_shape(samples, **self._how(self.free_steps)), samples, shape, lay_out)

    @exclusive
    def step_from(self, batch: Batch, start: State) -> StepResult:
        """Return the gradients of unrolling `unrolled_steps` steps from `start`, in one part."""
        batch, gradients = self.network.labelled(batch), self._zero_gradients()
        self.network.check_start(start, len(batch))
        nudges = self.network.nudges(batch, self.signals)
        result = self._unroll_and_back(gradients, batch, nudges, len(batch), start)
        self._finish(gradients)
        return result

    @exclusive
    def step_from_equilibrium(self, batch: Batch, free: State, max_iterations: int = 1000) -> tuple[StepResult, float]:
        """Return the gradients of unrolling infinitely many steps from `free`, and what is left of their equation.

        At an equilibrium (the nearer `free` is to one, the better) all steps are the same step, so one is kept, and the
        sum of all adjoint states solves ``mu = dL/ds + J^T mu``, J the derivative of the step (Almeida 1987, Pineda
        1987): by even and odd layers in turn, over-relaxed, in at most `max_iterations` passes.

        What is left is the largest residual of the equation in any layer, relative to its mu: above `ADJOINT_TOLERANCE`
        where the sum does not converge, as at a state that is no stable equilibrium.
        """
        integer("max_iterations", max_iterations)
        batch, gradients = self.network.labelled(batch), self._zero_gradients()
        self.network.check_start(free, len(batch), "free")
        nudges = self.network.nudges(batch, self.signals)
        unrolled, ops, result = self._unrolled(gradients, batch, nudges, len(batch), free, steps=1)
        state = unrolled.history[0]
        self._slopes(state)
        mu, q, losses = unrolled.mu, unrolled.other, [array.copy() for array in unrolled.mu]
        for array, slope, product in zip(mu, state.drives, q, strict=True):
            self.network.device.xp.multiply(array, slope, out=product)
        with np.errstate(over="ignore", invalid="ignore"):  # where there is no solution
            for _ in range(max_iterations):
                residual = self._relax_adjoint(losses, mu, q, state, unrolled, ops)
                if not residual > ADJOINT_TOLERANCE:
                    break
            self._send_back(batch.images, state, mu, q, unrolled, ops, gradients)
            self._finish(gradients)
        return result, residual

    def _relax_adjoint(
        self, losses: Sequence[Any], mu: Sequence[Any], q: Sequence[Any], state: State, unrolled: Unrolled, ops: Any
    ) -> float:
        """Move mu towards ``dL/ds + J^T mu``, one colour of nodes after the other; return the largest residual.

        The drives of `state` are slopes, and `q` is their product with mu.
        """
        network, xp, residuals = self.network, self.network.device.xp, []
        graph = network.graph
        for n in (n for colour in sorted(graph.colours, key=max, reverse=True) for n in reversed(colour)):
            here, change = mu[n - 1], losses[n - 1] - mu[n - 1]
            for c in graph.out_of[n]:
                above = graph.above[c] - 1
                change += self._down(c, self._as_factor(q[above], unrolled.q[above]), state, unrolled, ops)
            for c in graph.into[n]:
                if graph.below[c]:
                    change += self._up(c, q[graph.below[c] - 1], state, unrolled, ops)
            size = abs(change).max()
            residuals.append(size / xp.maximum(xp.maximum(abs(here).max(), size), np.finfo(here.dtype).tiny))
            if network.feedback > STRONG:
                change *= ADJOINT_RELAXATION
            here += change
            xp.multiply(here, state.drives[n - 1], out=q[n - 1])
        return float(xp.stack(residuals).max())

    def _shape(self, samples: int, nudges: Sequence[Nudge], base: int = 0) -> UnrolledShape:
        step = self.network.free_shape(samples, steps=1, schedule="synchronous")
        scratch = term_scratch_size(self.network.memory.layout, nudges, samples)
        return UnrolledShape(replace(step, base=base), self.unrolled_steps, scratch)

    def _unroll_and_back(
        self, gradients: Gradients, batch: Batch, nudges: Sequence[Nudge], total: int, start: State
    ) -> StepResult:
        unrolled, ops, result = self._unrolled(gradients, batch, nudges, total, start, self.unrolled_steps)
        mu, other = unrolled.mu, unrolled.other
        for state in reversed(unrolled.history):
            self._slopes(state)
            self._send_back(batch.images, state, mu, other, unrolled, ops, gradients)
            mu, other = other, mu
        return result

    def _unrolled(
        self, gradients: Gradients, batch: Batch, nudges: Sequence[Nudge], total: int, start: State, steps: int
    ) -> tuple[Unrolled, Sequence[Any], StepResult]:
        """Unroll `steps` steps from `start`, and begin their adjoint: dL/ds of the last state in ``mu``."""
        network, memory = self.network, self.network.memory
        shape = replace(self._shape(len(batch), nudges, start.end), steps=steps)
        lay_out = functools.partial(lay_out_unrolled, memory.layout, shape=shape)
        unrolled = memory.laid_out(shape, start.end, lay_out)
        stats = self._unroll(batch, start, unrolled, shape.step)
        last = unrolled.phase.states
        figures = self._figures(last, batch, total, unrolled.down)
        self._add_terms(gradients, nudges, lambda n: last[n - 1], 1.0, total, unrolled.scratch)
        scale = self._loss_scale(nudges)
        self._factors = [1 / (scale * total)] * network.depth
        for n, array in enumerate(unrolled.mu, 1):
            array[...] = 0
            self._add_loss_gradient(nudges, last, n, scale, array, unrolled.scratch)
        return unrolled, memory.workspace(len(batch)).ops, StepResult(gradients, **figures, free=stats)

    def _unroll(self, batch: Batch, start: State, unrolled: Unrolled, step: PhaseShape) -> SettleStats:
        """Keep (s_t, g_t, winners of s_t) of every unrolled step; return the statistics of the last."""
        network, phase = self.network, unrolled.phase
        for s, first in zip(phase.states, start.layers, strict=True):
            s[...] = first
        settling = Classical(network.energy, network.memory, step, phase, True, batch.images)
        for before in unrolled.history:
            _copy(phase.states, before.layers)
            iterate(settling, measure=True)
            _copy(settling.drives, before.drives)
            _copy(phase.winners, before.winners)
        return stats_of(settling, 1)

    def _slopes(self, state: State) -> None:
        """Turn the drives of a step into the slopes of the activation there."""
        for g in state.drives:
            self.network.energy.updates.slope(g, g)

    def _send_back(
        self,
        x: Any,
        state: State,
        mu: Sequence[Any],
        before: Sequence[Any],
        unrolled: Unrolled,
        ops: Sequence[Any],
        gradients: Gradients,
    ) -> None:
        """Write dL/ds_t into `before`, from dL/ds_{t+1} in `mu`, and add this step's parameter gradients.

        The drives of `state` are slopes; `mu` is overwritten by its product with them.
        """
        network = self.network
        for slope, q, fresh in zip(state.drives, mu, before, strict=True):
            q *= slope
            fresh[...] = 0
        graph, energy, nodes = network.graph, network.energy, [x, *state.layers]
        for c, (below, above) in enumerate(zip(graph.below, graph.above, strict=True)):
            winners, q = state.winners[c], self._as_factor(mu[above - 1], unrolled.q[above - 1])
            energy.correlate(c, nodes[below], q, winners, gradients, ops[c])
            if below == 0:
                continue
            to_below, here = before[below - 1], before[above - 1]
            to_below += self._down(c, q, state, unrolled, ops)
            here += self._up(c, mu[below - 1], state, unrolled, ops)
            energy.correlate(c, unrolled.scaled[below - 1], nodes[above], winners, gradients, ops[c], bias=False)

    def _down(self, c: int, q: Any, state: State, unrolled: Unrolled, ops: Sequence[Any]) -> Any:
        """Return what ``q = mu sigma'`` of the node above sends down a connection."""
        graph = self.network.graph
        out = unrolled.down[graph.below[c] - 1]
        graph.edges[c].topdown(q, state.winners[c], out, ops[c])
        return out

    def _up(self, c: int, q: Any, state: State, unrolled: Unrolled, ops: Sequence[Any]) -> Any:
        """Return what q of the node below sends up; that times a_above / a_below is left in ``scaled``."""
        graph, xp = self.network.graph, self.network.device.xp
        scaled, out = unrolled.scaled[graph.below[c] - 1], unrolled.up[graph.above[c] - 1]
        xp.multiply(q, self.network.energy.ratios[c], out=scaled)
        graph.edges[c].linear_drive(scaled, out, state.winners[c], ops[c])
        return out


@dataclass(frozen=True)
class UnrolledShape:
    """What decides on the memory of unrolled steps: one of them, how many, and scratch for a term of the loss."""

    step: PhaseShape
    steps: int
    scratch: int


@dataclass
class Unrolled:
    """The memory of the unrolled steps."""

    phase: PhaseBuffers  # of the step that is being done
    history: list[State]  # states before each step, drives and winners in it
    mu: list[Any]  # dL/ds of two neighbouring steps
    other: list[Any]
    # what one edge sends down and up, and the adjoint state below times the feedback weight: one layer's at a time
    down: list[Any]
    up: list[Any]
    scaled: list[Any]
    q: list[Any]  # one layer's adjoint state as a factor of products, where that is stored in halves
    scratch: Any  # for one term of the loss


def lay_out_unrolled(layout: Layout, stack: Stack, shape: UnrolledShape) -> Unrolled:
    """Take the memory of unrolled steps from `stack`."""
    samples = shape.step.samples

    def nodes(purpose: str, dtype: Any) -> list[Any]:
        return layout.nodes(stack, purpose, samples, dtype)

    history = []
    for _ in range(shape.steps):
        states, drives = nodes("history", layout.stored), nodes("history", layout.number)
        history.append(State(states, drives, layout.winners(stack, samples, "history")))
    phase = layout.lay_out(stack, shape.step)
    batch = [(samples, *size) for size in layout.shapes]
    mu, other = nodes("adjoint states", layout.number), nodes("adjoint states", layout.number)
    types = (layout.number, layout.number, layout.stored)
    down, up, scaled = (stack.take_one_of("adjoint states", batch, dtype) for dtype in types)
    scratch = stack.take("update scratch", (shape.scratch,), layout.number)
    return Unrolled(phase, history, mu, other, down, up, scaled, layout.factors(stack, batch), scratch)


def _copy(arrays: Sequence[Any], into: Sequence[Any]) -> None:
    for source, target in zip(arrays, into, strict=True):
        if source is not None:
            target[...] = source
