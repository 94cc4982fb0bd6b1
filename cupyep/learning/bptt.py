"""Backpropagation through time: the gradient of L at the last of T synchronous steps, the last K of them unrolled.

The adjoint of ``s_{t+1} = sigma(g_t)``, ``g^n_t = d^n(s^{n-1}_t) + lambda w_{n+1}^T * U_{n+1}(s^{n+1}_t)`` is explicit.
With mu = dL/ds_{t+1} and ``q^n = mu^n sigma'(g^n_t)``: mu^{n-1} gains ``w_n^T * U_n(q^n)``, mu^{n+1} gains
``lambda G_{n+1}(w_{n+1} * q^n)``, both at the winners of step t. This is the ground truth for EP (Ernoult et al. 2019),
and it stores states, drives and winners of K steps: the memory that EP does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupyep.augment import Augmenter
from cupyep.data.loader import Batch
from cupyep.dynamics import Classical, State
from cupyep.learning.learner import Learner, StepResult, checked_settling
from cupyep.network import Network
from cupyep.settling import settle
from cupyep.workspace import Workspace


class BackpropagationThroughTime(Learner):
    """BPTT over the last `unrolled_steps` of ``free_steps + unrolled_steps`` iterations.

    Parameters
    ----------
    network : Network
    free_steps : int
        Iterations before the unrolled ones, by `schedule`.
    unrolled_steps : int
        K, synchronous.
    schedule, tolerance
        Of the iterations before; see `EquilibriumPropagation`.
    signals : sequence of Augmenter
        Their losses at the last state are part of L, as in the nudged phase of EP.
    """

    def __init__(
        self,
        network: Network,
        free_steps: int = 60,
        unrolled_steps: int = 20,
        schedule: str = "synchronous",
        tolerance: float | None = None,
        signals: Sequence[Augmenter] = (),
    ):
        super().__init__(network, signals)
        self.free_steps, self.unrolled_steps = free_steps, unrolled_steps
        self.schedule = checked_settling(schedule, {"free_steps": free_steps, "unrolled_steps": unrolled_steps})
        self.tolerance = tolerance

    def settle_free(self, batch: Batch, **how: Any) -> State:
        """Return the state before the unrolled steps; `how` as in `EquilibriumPropagation.settle_free`."""
        how = {"steps": self.free_steps, "schedule": self.schedule, "tolerance": self.tolerance} | how
        return self.network.settle_free(batch, **how)

    def scores(self, batch: Batch) -> Any:
        return self.network.readout.output(self.settle_free(batch).layers[-1])

    def _step(self, batch: Batch) -> StepResult:
        return self.step_from(batch, self.settle_free(batch))

    def step_from(self, batch: Batch, start: State) -> StepResult:
        """Return the gradients of unrolling `unrolled_steps` steps from `start`."""
        workspace = self.network.workspace(len(batch))
        history, last, stats = self._unroll(batch, start, workspace)
        nudges = self.network.nudges(batch, self.signals)
        gradients = self._zero_gradients()
        self._add_terms(gradients, nudges, lambda n: last[n - 1], 1.0)
        mu = self._loss_gradient(last, nudges, len(batch))
        for state in reversed(history):
            mu = self._step_back(batch.images, state, mu, gradients, workspace.ops)
        return self._result(gradients, last[-1], last, batch, free=stats)

    def _unroll(self, batch: Batch, start: State, workspace: Workspace) -> tuple[list[State], list[Any], Any]:
        """Return (s_t, g_t, winners of s_t) for every unrolled step, the last state, and the statistics."""
        network = self.network
        state = State(
            workspace.states("unrolled"), workspace.states("unrolled drive"), workspace.winners("unrolled winners")
        )
        for s, first in zip(state.layers, start.layers, strict=True):
            s[...] = first
        parts = (network.layers, network.activation, network.feedback, network.device, workspace)
        system = Classical(*parts, batch.images, state)
        history = []
        for _ in range(self.unrolled_steps):
            before = [s.copy() for s in state.layers]
            stats = settle(system, 1, "synchronous", warm=True, phase="unrolled")
            now = state.copy()
            history.append(State(before, now.drives, now.winners))
        return history, state.layers, stats

    def _loss_gradient(self, layers: Sequence[Any], nudges: Sequence[Any], samples: int) -> list[Any]:
        xp = self.network.device.xp
        mu = [xp.zeros_like(s) for s in layers]
        for term, weight, target in nudges:
            scale = xp.full(samples, weight / samples, self.network.dtype)
            term.add_force(layers[term.layer - 1], target, scale, mu[term.layer - 1])
        return mu

    def _step_back(
        self, x: Any, state: State, mu: list[Any], gradients: dict[str, Any], ops: Sequence[Any]
    ) -> list[Any]:
        """Return dL/ds_t from dL/ds_{t+1} and add this step's parameter gradients."""
        network, xp, feedback = self.network, self.network.device.xp, self.network.feedback
        q = []
        for g, m in zip(state.drives, mu, strict=True):
            slope = xp.empty_like(g)
            network.activation.slope(g, slope)
            q.append(m * slope)
        before = [xp.zeros_like(s) for s in state.layers]
        for n, edge in enumerate(network.layers, 1):
            winners = state.winners[n - 1]
            below = state.layers[n - 2] if n > 1 else x
            self._add_edge(gradients, n, below, q[n - 1], winners, ops[n - 1])
            if n == 1:
                continue
            down = xp.empty_like(state.layers[n - 2])
            edge.topdown(q[n - 1], winners, down, ops[n - 1])
            before[n - 2] += down
            up = xp.empty_like(state.layers[n - 1])
            scaled = q[n - 2] * feedback
            edge.linear_drive(scaled, up, winners, ops[n - 1])
            before[n - 1] += up
            self._add_edge(gradients, n, scaled, state.layers[n - 1], winners, ops[n - 1], bias=False)
        return before
