"""Equilibrium Propagation: gradients from the difference of two settled states (Scellier & Bengio 2017).

With ``F = E + beta L`` and its equilibrium ``s_beta``, ``dL/dtheta = d/dbeta [dF/dtheta(s_beta)]`` at beta = 0. The
centered estimate (Laborieux et al. 2021) is ``-[dPhi/dtheta(s_+beta) - dPhi/dtheta(s_-beta)] / (2 beta N)``, plus the
direct derivative of L for the readout and learned maps. Feedback weight lambda multiplies edge n's part by a_n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.augment import Augmenter
from cupyep.data.loader import Batch
from cupyep.dynamics import Nudge, State
from cupyep.errors import ConfigurationError, choose, require
from cupyep.learning.learner import Learner, StepResult, checked_settling
from cupyep.network import Network

SCHEMES = ("centered", "onesided", "random", "tangent")
FORMS = ("classical", "deviation")


class EquilibriumPropagation(Learner):
    """EP with a free and one or two nudged phases.

    Parameters
    ----------
    network : Network
    beta : float
        Strength of the nudge, positive; unused by the tangent scheme.
    free_steps, nudged_steps : int
        Iterations of each phase (the maximum, where a tolerance is given).
    scheme : {"centered", "onesided", "random", "tangent"}
        Nudged with +beta and -beta as one batch of 2N; with +beta alone; with a sign drawn for every batch; or the
        limit beta -> 0 in one linear phase (recurrent backpropagation).
    nudge : {"classical", "deviation"}
        How nudged phases are represented: as states, or as scaled deviations from the free state at its pooling
        winners (`cupyep.dynamics.Deviation`). The tangent scheme is a deviation.
    schedule : {"synchronous", "evenodd", "sweeps"}
    tolerance : float, optional
        Stop a phase at this residual (see `cupyep.settling.SettleStats`).
    signals : sequence of Augmenter
    generator : numpy.random.Generator, optional
        For the random scheme.

    Raises
    ------
    ConfigurationError
        If a value is out of range.
    """

    def __init__(
        self,
        network: Network,
        beta: float = 0.5,
        free_steps: int = 60,
        nudged_steps: int = 20,
        scheme: str = "centered",
        nudge: str = "deviation",
        schedule: str = "synchronous",
        tolerance: float | None = None,
        signals: Sequence[Augmenter] = (),
        generator: np.random.Generator | None = None,
    ):
        super().__init__(network, signals)
        require(beta > 0 and math.isfinite(beta), f"beta must be positive, not {beta}: it is the strength of the nudge")
        self.beta = float(beta)
        self.free_steps, self.nudged_steps = free_steps, nudged_steps
        self.scheme = choose("scheme", scheme, SCHEMES)
        self.nudge = choose("nudge", nudge, FORMS)
        if scheme == "tangent" and nudge == "classical":
            raise ConfigurationError("the tangent scheme is the limit of the deviation form; use nudge 'deviation'")
        self.schedule = checked_settling(schedule, {"free_steps": free_steps, "nudged_steps": nudged_steps})
        self.tolerance = tolerance
        self.generator = np.random.default_rng(0) if generator is None else generator

    def settle_free(self, batch: Batch, **how: Any) -> State:
        """Return the free state of a batch, in buffers that the next step overwrites.

        `how` replaces this learner's ``steps``, ``schedule`` or ``tolerance``, or asks to ``record`` the residuals.
        """
        how = {"steps": self.free_steps, "schedule": self.schedule, "tolerance": self.tolerance} | how
        return self.network.settle_free(batch, **how)

    def settle_nudged(
        self, batch: Batch, free: State, betas: list[float], nudges: Sequence[Nudge], **how: Any
    ) -> State:
        """Return the nudged states from `free`, one phase a beta, as `settle_free` returns the free ones."""
        how = {"steps": self.nudged_steps, "schedule": self.schedule, "tolerance": self.tolerance} | how
        return self.network.settle_nudged(batch, free, betas, nudges, self.form, **how)

    @property
    def form(self) -> str:
        """How nudged phases are represented: ``classical``, ``deviation`` or ``tangent``."""
        return "tangent" if self.scheme == "tangent" else self.nudge

    def scores(self, batch: Batch) -> Any:
        return self.network.readout.output(self.settle_free(batch).layers[-1])

    def betas(self) -> list[float]:
        """Return beta of each nudged phase of a step; the random scheme draws its sign."""
        if self.scheme == "centered":
            return [self.beta, -self.beta]
        if self.scheme == "random":
            return [self.beta if self.generator.random() < 0.5 else -self.beta]
        return [1.0] if self.scheme == "tangent" else [self.beta]

    def _step(self, batch: Batch) -> StepResult:
        free = self.settle_free(batch)
        return self.step_from(batch, free)

    def step_from(self, batch: Batch, free: State) -> StepResult:
        """Return gradients and statistics of the nudged phases that start at the given free state."""
        betas, nudges = self.betas(), self.network.nudges(batch, self.signals)
        nudged = self.settle_nudged(batch, free, betas, nudges)
        gradients = self._zero_gradients()
        if self.form == "classical":
            response = self._classical_gradients(gradients, batch, free, nudged, betas, nudges)
        else:
            response = self._deviation_gradients(gradients, batch, free, nudged, betas, nudges)
        return self._result(
            gradients,
            free.layers[-1],
            free.layers,
            batch,
            free=free.stats,
            nudged=nudged.stats,
            nudge_response=self.network.device.xp.stack(response),
        )

    def _classical_gradients(
        self, gradients: dict, batch: Batch, free: State, nudged: State, betas: list[float], nudges: list[Nudge]
    ) -> list[Any]:
        """Add ``-a_n [dPhi(s_1) - dPhi(s_2)] / ((beta_1 - beta_2) N)``, s_2 the second phase or the free state."""
        network, xp, samples = self.network, self.network.device.xp, len(batch)
        two = len(betas) == 2
        span = betas[0] - (betas[1] if two else 0.0)
        weights = network.energy.weights
        ops = network.workspace(len(betas) * samples).ops
        nudged_winners = self._winners_at(nudged, ops)
        free_winners = None if two else self._winners_at(free, ops)
        response = []
        for n in range(1, network.depth + 1):
            factor = -weights[n - 1] / (span * samples)
            s, winners = nudged.layers[n - 1], nudged_winners[n - 1]
            below = nudged.layers[n - 2] if n > 1 else self._repeated(batch.images, len(betas))
            first = s[:samples]
            second = s[samples:] if two else free.layers[n - 1]
            signed = xp.empty_like(s)
            signed[:samples] = first * factor
            if two:
                signed[samples:] = second * -factor  # one product over both phases
            self._add_edge(gradients, n, below, signed, winners, ops[n - 1])
            if not two:
                below = free.layers[n - 2] if n > 1 else batch.images
                self._add_edge(gradients, n, below, second * -factor, free_winners[n - 1], ops[n - 1])
            response.append(xp.abs(first - second).mean())
        for phase in range(len(betas)):
            part = slice(phase * samples, (phase + 1) * samples)
            self._add_terms(gradients, nudges, lambda n, part=part: nudged.layers[n - 1][part], 1 / len(betas))
        return response

    def _winners_at(self, state: State, ops: list[Any]) -> list[Any]:
        """Return the pooling winners of the states themselves: those that a phase leaves are of its last drives.

        While winners still change the two differ, and with them the gradient of Phi. The first edge's are constant.
        """
        found = list(state.winners)
        for n, edge in enumerate(self.network.layers[1:], 1):
            if edge.has_winners:
                found[n] = state.winners[n].copy()
                drive = self.network.device.xp.empty_like(state.layers[n])
                edge.drive(state.layers[n - 1], drive, found[n], ops[n])
        return found

    def _repeated(self, array: Any, times: int) -> Any:
        return array if times == 1 else self.network.device.xp.concatenate([array] * times)

    def _deviation_gradients(
        self, gradients: dict, batch: Batch, free: State, nudged: State, betas: list[float], nudges: list[Nudge]
    ) -> list[Any]:
        """Add ``-[corr(m^{n-1}, U(e^n)) + lambda corr(e^{n-1}, U(m^n))] / ((beta_1 - beta_2) N)``.

        e = eps_1 - eps_2 is the difference of the scaled deviations, m = s* + (delta_1 + delta_2) / 2 the mean of the
        two nudged states. For products, ``p_1 q_1 - p_2 q_2 = mean(p) diff(q) + diff(p) mean(q)``: exact, and never a
        difference of two large sums. In the tangent limit m = s*.
        """
        network, xp, samples = self.network, self.network.device.xp, len(batch)
        workspace = network.workspace(samples)
        span = betas[0] - (betas[1] if len(betas) == 2 else 0.0)
        tangent = self.scheme == "tangent"
        means, differences, response = [batch.images], [None], []
        for eps, a, s in zip(nudged.deviations, nudged.scales, free.layers, strict=True):
            if len(betas) == 2:
                difference, total = eps[:samples] - eps[samples:], eps[:samples] + eps[samples:]
            else:
                difference, total = eps, eps
            means.append(s if tangent else s + total * (0.5 / a))
            differences.append(difference * (-1 / (span * samples)))
            response.append(xp.abs(difference).mean() / a)
        for n in range(1, network.depth + 1):
            winners, ops = free.winners[n - 1], workspace.ops[n - 1]
            self._add_edge(gradients, n, means[n - 1], differences[n], winners, ops)
            if n > 1:
                below = differences[n - 1] * network.feedback
                self._add_edge(gradients, n, below, means[n], winners, ops, bias=False)
        self._add_term_gradients(gradients, nudges, free, nudged, samples)
        return response

    def _add_term_gradients(self, gradients, nudges, free: State, nudged: State, samples: int) -> None:
        if self.scheme == "tangent":
            self._add_terms(gradients, nudges, lambda n: free.layers[n - 1], 1.0)
            return
        phases = len(nudged.deviations[0]) // samples

        def state(n: int, phase: int) -> Any:
            eps = nudged.deviations[n - 1][phase * samples : (phase + 1) * samples]
            return free.layers[n - 1] + eps * (1 / nudged.scales[n - 1])

        for phase in range(phases):
            self._add_terms(gradients, nudges, lambda n, phase=phase: state(n, phase), 1 / phases)
