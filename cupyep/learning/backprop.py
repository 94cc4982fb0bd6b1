"""Feed-forward backpropagation through the same edges: the limit lambda -> 0, the baseline, the teacher's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupyep.augment import Augmenter
from cupyep.data.loader import Batch
from cupyep.dynamics import State
from cupyep.learning.learner import Learner, StepResult
from cupyep.network import Network
from cupyep.workspace import Workspace


class Backpropagation(Learner):
    """BP of ``s^n = sigma(d^n(s^{n-1}))``: no top-down input, no settling.

    Parameters
    ----------
    network : Network
    signals : sequence of Augmenter
        Their losses are added as in deep supervision.
    """

    def __init__(self, network: Network, signals: Sequence[Augmenter] = ()):
        super().__init__(network, signals)

    def forward(self, batch: Batch) -> State:
        """Return the feed-forward states, in buffers that the next call overwrites."""
        return self._forward(batch, self.network.workspace(len(batch.images)))

    def _forward(self, batch: Batch, workspace: Workspace) -> State:
        network = self.network
        state = State(
            workspace.states("forward"), workspace.states("forward drive"), workspace.winners("forward winners")
        )
        below = batch.images
        for n, edge in enumerate(network.layers):
            edge.drive(below, state.drives[n], state.winners[n], workspace.ops[n])
            network.activation.value(state.drives[n], state.layers[n])
            below = state.layers[n]
        return state

    def scores(self, batch: Batch) -> Any:
        return self.network.readout.output(self.forward(batch).layers[-1])

    def _step(self, batch: Batch) -> StepResult:
        network, xp, samples = self.network, self.network.device.xp, len(batch)
        workspace = network.workspace(samples)
        state = self._forward(batch, workspace)
        nudges = network.nudges(batch, self.signals)
        gradients = self._zero_gradients()
        self._add_terms(gradients, nudges, lambda n: state.layers[n - 1], 1.0)
        mu, slope, down = workspace.states("mu"), workspace.states("slope"), None
        for n in range(network.depth, 0, -1):
            here = mu[n - 1]
            here[...] = 0 if down is None else down
            for term, weight, target in nudges:
                if term.layer == n:
                    scale = xp.full(samples, weight / samples, network.dtype)
                    term.add_force(state.layers[n - 1], target, scale, here)
            network.activation.slope(state.drives[n - 1], slope[n - 1])
            here *= slope[n - 1]
            winners, ops = state.winners[n - 1], workspace.ops[n - 1]
            below = state.layers[n - 2] if n > 1 else batch.images
            self._add_edge(gradients, n, below, here, winners, ops)
            if n > 1:
                down = slope[n - 2]
                network.layers[n - 1].topdown(here, winners, down, ops)
        return self._result(gradients, state.layers[-1], state.layers, batch)
