"""Feed-forward backpropagation through the same edges: the limit lambda -> 0, the baseline, the teacher's trainer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupyep.augment import Augmenter
from cupyep.data.loader import Batch
from cupyep.dynamics import Nudge, State
from cupyep.kernels.buffers import Stack
from cupyep.layout import Layout
from cupyep.learning.gradients import Gradients
from cupyep.learning.learner import Learner, StepResult, term_scratch_size
from cupyep.network import Network
from cupyep.workspace import Needs


class Backpropagation(Learner):
    """BP of ``s^n = sigma(d^n(s^{n-1}))``: no top-down input, no settling.

    Parameters
    ----------
    network : Network
    signals : sequence of Augmenter
        Their losses are added as in deep supervision.
    micro_batch : int, optional
        See `Learner`.
    """

    def __init__(self, network: Network, signals: Sequence[Augmenter] = (), micro_batch: int | None = None):
        super().__init__(network, signals, micro_batch)

    def settled(self, batch: Batch) -> State:
        """Return the feed-forward states, in memory that the next call overwrites."""
        batch = self.network.batch(batch)
        return self._forward(batch, self._passes(batch))

    def needs(self, samples: int, nudges: Sequence[Nudge]) -> Needs:
        layout = self.network.memory.layout
        shape = PassesShape(samples, term_scratch_size(layout, nudges, samples))
        return Needs(None, samples, shape, functools.partial(lay_out_passes, layout, shape=shape))

    def _passes(self, batch: Batch, nudges: Sequence[Nudge] = ()) -> Passes:
        needs = self.needs(len(batch.images), nudges)
        return self.network.memory.laid_out(needs.key, 0, needs.lay_out)

    def _forward(self, batch: Batch, passes: Passes) -> State:
        network, state, below = self.network, passes.state, batch.images
        ops = network.memory.workspace(len(batch.images)).ops
        for n, edge in enumerate(network.layers):
            edge.drive(below, state.drives[n], state.winners[n], ops[n])
            network.activation.value(state.drives[n], state.layers[n])
            below = state.layers[n]
        return state

    def _add(self, gradients: Gradients, batch: Batch, total: int, draw: None) -> StepResult:
        network, samples = self.network, len(batch)
        nudges = network.nudges(batch, self.signals)
        scale = self._loss_scale(nudges)
        self._factors = [1 / (scale * total)] * network.depth
        passes = self._passes(batch, nudges)
        state, ops = self._forward(batch, passes), network.memory.workspace(samples).ops
        figures = self._figures(state.layers, batch, total, passes.mu[0])
        self._add_terms(gradients, nudges, lambda n: state.layers[n - 1], 1.0, total, passes.scratch)
        for n in range(network.depth, 0, -1):
            here, slope = passes.mu[n % 2][n - 1], state.drives[n - 1]
            if n == network.depth:
                here[...] = 0
            self._add_loss_gradient(nudges, state.layers, n, scale, here, passes.scratch)
            network.activation.slope(slope, slope)
            here *= slope
            winners = state.winners[n - 1]
            below = state.layers[n - 2] if n > 1 else batch.images
            q = self._as_factor(here, passes.q[n - 1])
            self._add_edge(gradients, n, below, q, winners, ops[n - 1])
            if n > 1:
                network.layers[n - 1].topdown(q, winners, passes.mu[(n - 1) % 2][n - 2], ops[n - 1])
        return StepResult(gradients, **figures)


@dataclass(frozen=True)
class PassesShape:
    """What decides on the memory of a pass: samples, and scratch for a term of the loss."""

    samples: int
    scratch: int


@dataclass
class Passes:
    """The memory of a pass up and one down.

    Attributes
    ----------
    state : State
        Its drives are slopes after the pass down.
    mu : pair of lists of arrays
        dL/ds of even and of odd layers: one layer's of each at a time.
    q : list of arrays
        One layer's as a factor of products, where that is stored in halves.
    scratch : array
        For one term of the loss.
    """

    state: State
    mu: tuple[list[Any], list[Any]]
    q: list[Any]
    scratch: Any


def lay_out_passes(layout: Layout, stack: Stack, shape: PassesShape) -> Passes:
    """Take the memory of a pass up and one down from `stack`."""
    samples = shape.samples
    batch = [(samples, *size) for size in layout.shapes]
    states = [stack.take("states", size, layout.stored) for size in batch]
    drives = [stack.take("drives", size, layout.number) for size in batch]
    winners = layout.winners(stack, samples)
    mu = tuple(stack.take_turns("adjoint states", batch, layout.number) for _ in range(2))
    q = layout.factors(stack, batch)
    scratch = stack.take("update scratch", (shape.scratch,), layout.number)
    return Passes(State(states, drives, winners), mu, q, scratch)
