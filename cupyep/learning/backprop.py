"""Feed-forward backpropagation through the same edges: the limit lambda -> 0, the baseline, the teacher's trainer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupyep.batch import Batch
from cupyep.heads import Nudge
from cupyep.learning.gradients import Gradients
from cupyep.learning.learner import Learner, StepResult, term_scratch_size
from cupyep.memory.layout import Layout, Stack
from cupyep.memory.workspace import Needs
from cupyep.state import State


class Backpropagation(Learner):
    """BP of ``s^j = sigma(sum of drives)`` in topological order: no top-down input, no settling.

    Parameters
    ----------
    network : Network
    signals : sequence of Augmenter
        Their losses are added as in deep supervision.
    micro_batch : int, optional
        See `Learner`.
    """

    def settled(self, batch: Batch) -> State:
        """Return the feed-forward states, in memory that the next call overwrites."""
        batch = self.network.batch(batch)
        return self._forward(batch, self._passes(batch))

    def needs(self, samples: int, nudges: Sequence[Nudge]) -> Needs:
        layout = self.network.memory.layout
        sizes = (samples, term_scratch_size(layout, nudges, samples))
        return Needs(None, samples, ("passes", *sizes), functools.partial(lay_out_passes, layout, sizes=sizes))

    def _passes(self, batch: Batch, nudges: Sequence[Nudge] = ()) -> Passes:
        needs = self.needs(len(batch.images), nudges)
        return self.network.memory.laid_out(needs.key, 0, needs.lay_out)

    def _forward(self, batch: Batch, passes: Passes) -> State:
        ops = self.network.memory.workspace(len(batch.images)).ops
        self.network.energy.pass_up(batch.images, passes.state, passes.terms, ops)
        return passes.state

    def _add(self, gradients: Gradients, batch: Batch, total: int, draw: None) -> StepResult:
        network, samples = self.network, len(batch)
        nudges = network.nudges(batch, self.signals)
        scale = self._loss_scale(nudges)
        self._factors = [1 / (scale * total)] * network.depth
        passes = self._passes(batch, nudges)
        state, ops = self._forward(batch, passes), network.memory.workspace(samples).ops
        figures = self._figures(state.layers, batch, total, passes.mu)
        self._add_terms(gradients, nudges, lambda n: state.layers[n - 1], 1.0, total, passes.scratch)
        passes.mu[-1][...] = 0
        for node in range(network.depth, 0, -1):
            here, slope = passes.mu[node - 1], state.drives[node - 1]
            self._add_loss_gradient(nudges, state.layers, node, scale, here, passes.scratch)
            network.energy.updates.slope(slope, slope)
            here *= slope
            self._send_down(node, self._as_factor(here, passes.q[node - 1]), batch.images, passes, ops, gradients)
        return StepResult(gradients, **figures)

    def _send_down(self, node: int, q: Any, x: Any, passes: Passes, ops: Sequence[Any], gradients: Gradients) -> None:
        """Add the gradients of the connections into a node, and what its ``dL/dg`` sends to the nodes below."""
        graph, state = self.network.graph, passes.state
        for c in graph.into[node]:
            below, winners = graph.below[c], state.winners[c]
            self.network.energy.correlate(c, state.layers[below - 1] if below else x, q, winners, gradients, ops[c])
            if below:
                is_first = node == max(graph.above[other] for other in graph.out_of[below])
                out = passes.mu[below - 1] if is_first else passes.terms[below - 1]
                graph.edges[c].topdown(q, winners, out, ops[c])
                if not is_first:
                    passes.mu[below - 1] += out


@dataclass
class Passes:
    """The memory of a pass up and one down."""

    state: State  # its drives are slopes after the pass down
    mu: list[Any]  # dL/ds of each node, from the turn of the last node above to its own
    terms: list[Any]  # a drive or top-down product that is about to be added, one node's at a time
    q: list[Any]  # one layer's as a factor of products, where that is stored in halves
    scratch: Any  # for one term of the loss


def lay_out_passes(layout: Layout, stack: Stack, sizes: tuple[int, int]) -> Passes:
    """Take the memory of a pass up and one down from `stack`; `sizes` are samples, and scratch for a term."""
    samples, scratch = sizes
    batch = [(samples, *size) for size in layout.shapes]
    states = [stack.take("states", size, layout.stored) for size in batch]
    drives = [stack.take("drives", size, layout.number) for size in batch]
    winners = layout.winners(stack, samples)
    mu = stack.take_all("adjoint states", layout.until_above(batch, layout.number))
    terms = stack.take_one_of("adjoint states", layout.with_several(batch), layout.number)
    q = layout.factors(stack, batch)
    scratch = stack.take("update scratch", (scratch,), layout.number)
    return Passes(State(states, drives, winners), mu, terms, q, scratch)
