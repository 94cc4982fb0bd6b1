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
    micro_batch : int, optional
        See `Learner`.

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
        micro_batch: int | None = None,
    ):
        super().__init__(network, signals, micro_batch)
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

    @property
    def form(self) -> str:
        """How nudged phases are represented: ``classical``, ``deviation`` or ``tangent``."""
        return "tangent" if self.scheme == "tangent" else self.nudge

    def _how(self, steps: int) -> dict[str, Any]:
        return {"steps": steps, "schedule": self.schedule, "tolerance": self.tolerance}

    @property
    def _free(self) -> dict[str, Any]:
        """How the free phase settles; deviations build on its drives alone, states on its states."""
        return {"keeps": "states" if self.form == "classical" else "drives", **self._how(self.free_steps)}

    @property
    def _nudged(self) -> dict[str, Any]:
        return {"keeps": "states", **self._how(self.nudged_steps)}

    def settle_free(self, batch: Batch) -> State:
        """Return the free state of a batch, in memory that the nudged phases take over but for what they build on."""
        return self.network.settle_free(batch, **self._free)

    def scores(self, batch: Batch) -> Any:
        return self.network.readout.output(self.settle_free(batch).layers[-1])

    def _draw(self) -> list[float]:
        """Return beta of each nudged phase."""
        if self.scheme == "centered":
            return [self.beta, -self.beta]
        if self.scheme == "random":
            return [self.beta if self.generator.random() < 0.5 else -self.beta]
        return [1.0] if self.scheme == "tangent" else [self.beta]

    def _add(self, gradients: dict[str, Any], part: Batch, total: int, betas: list[float]) -> StepResult:
        network, nudges, samples = self.network, self.network.nudges(part, self.signals), len(part)
        nudged = network.nudged_shape(self.form, samples, len(betas), nudges, **self._nudged)
        network.memory.expect(network.free_shape(samples, **self._free), nudged)
        return self._nudge(gradients, part, total, self.settle_free(part), betas, nudges)

    def step_from(self, batch: Batch, free: State) -> StepResult:
        """Return gradients and statistics of the nudged phases that start at the given free state, in one part."""
        nudges = self.network.nudges(batch, self.signals)
        return self._nudge(self._zero_gradients(), batch, len(batch), free, self._draw(), nudges)

    def _nudge(
        self, gradients: dict[str, Any], batch: Batch, total: int, free: State, betas: list[float], nudges: list[Nudge]
    ) -> StepResult:
        figures = self._figures(free.layers, batch, total, None if free.buffers is None else free.buffers.work[0])
        nudged = self.network.settle_nudged(batch, free, betas, nudges, self.form, **self._nudged)
        add = self._add_classical if self.form == "classical" else self._add_deviation
        response = self.network.device.xp.stack(add(gradients, batch, total, free, nudged, betas, nudges))
        response = response * (len(batch) / total)
        return StepResult(gradients, **figures, free=free.stats, nudged=nudged.stats, nudge_response=response)

    def _add_classical(
        self,
        gradients: dict[str, Any],
        batch: Batch,
        total: int,
        free: State,
        nudged: State,
        betas: list[float],
        nudges: list[Nudge],
    ) -> list[Any]:
        """Add ``-a_n [dPhi(s_1) - dPhi(s_2)] / ((beta_1 - beta_2) total)``, s_2 the second phase or the free state.

        Each at the pooling winners of the states themselves: those that a phase leaves are of its last drives. While
        winners still change the two differ, and with them the gradient of Phi. The first edge's are constant.
        """
        network, xp, samples = self.network, self.network.device.xp, len(batch)
        buffers, ops = nudged.buffers, network.memory.workspace(len(betas) * samples).ops
        two = len(betas) == 2
        span = betas[0] - (betas[1] if two else 0.0)
        below, free_below, response = batch.images, batch.images, []
        if two:
            below = buffers.images
            below.reshape(2, *batch.images.shape)[...] = batch.images
        for n, edge in enumerate(network.layers, 1):
            factor = -network.energy.weights[n - 1] / (span * total)
            s, winners, work = nudged.layers[n - 1], nudged.winners[n - 1], buffers.work[0][n - 1]
            first, second = s[:samples], s[samples:] if two else free.layers[n - 1]
            difference = xp.subtract(first, second, out=work[:samples])
            response.append(xp.abs(difference, out=difference).mean())
            if n > 1 and edge.has_winners:
                edge.drive(below, work, winners, ops[n - 1])
            xp.multiply(first, factor, out=work[:samples])
            if two:
                xp.multiply(second, -factor, out=work[samples:])  # one product over both phases
            self._add_edge(gradients, n, below, work, winners, ops[n - 1])
            if not two:
                winners = free.winners[n - 1]
                if n > 1 and edge.has_winners:
                    winners = buffers.work_winners[n - 1]
                    edge.drive(free_below, work, winners, ops[n - 1])
                xp.multiply(second, -factor, out=work)
                self._add_edge(gradients, n, free_below, work, winners, ops[n - 1])
            below, free_below = s, second
        for phase in range(len(betas)):
            part = slice(phase * samples, (phase + 1) * samples)
            self._add_terms(gradients, nudges, lambda n, part=part: nudged.layers[n - 1][part], 1 / len(betas), total)
        return response

    def _add_deviation(
        self,
        gradients: dict[str, Any],
        batch: Batch,
        total: int,
        free: State,
        nudged: State,
        betas: list[float],
        nudges: list[Nudge],
    ) -> list[Any]:
        """Add ``-[corr(m^{n-1}, U(e^n)) + lambda corr(e^{n-1}, U(m^n))] / ((beta_1 - beta_2) total)``.

        e = eps_1 - eps_2 is the difference of the scaled deviations, m = s* + (delta_1 + delta_2) / 2 the mean of the
        two nudged states. For products, ``p_1 q_1 - p_2 q_2 = mean(p) diff(q) + diff(p) mean(q)``: exact, and never a
        difference of two large sums. In the tangent limit m = s*.
        """
        network, samples = self.network, len(batch)
        span = betas[0] - (betas[1] if len(betas) == 2 else 0.0)
        self._add_deviation_terms(gradients, nudges, total, free, nudged, samples)
        response = []
        below, difference_below, ops = batch.images, None, network.memory.workspace(samples).ops
        for n in range(1, network.depth + 1):
            mean, difference, size = self._mean_and_difference(n, free, nudged, samples)
            response.append(size)
            difference *= -1 / (span * total)
            winners = free.winners[n - 1]
            self._add_edge(gradients, n, below, difference, winners, ops[n - 1])
            if n > 1:
                difference_below *= network.feedback
                self._add_edge(gradients, n, difference_below, mean, winners, ops[n - 1], bias=False)
            below, difference_below = mean, difference
        return response

    def _mean_and_difference(self, n: int, free: State, nudged: State, samples: int) -> tuple[Any, Any, Any]:
        """Return m^n, e^n and the mean ``|e^n| / a_n``, made in the place of the deviations where there are two phases.

        Otherwise m^n is in memory that m^{n+2} takes over.
        """
        xp, value = self.network.device.xp, self.network.activation.value
        eps, a, g = nudged.deviations[n - 1], nudged.scales[n - 1], free.drives[n - 1]
        work = [arrays[n - 1] for arrays in nudged.buffers.work]
        if len(eps) == samples:
            mean, half = work[n % 2], work[2]
            size = xp.abs(eps, out=mean).mean() / a
            value(g, mean)
            if self.form != "tangent":
                mean += xp.multiply(eps, 0.5 / a, out=half)
            return mean, eps, size
        first, second, half = eps[:samples], eps[samples:], work[0]
        xp.add(first, second, out=half)
        difference = xp.subtract(first, second, out=second)
        size = xp.abs(difference, out=first).mean() / a
        value(g, first)
        half *= 0.5 / a
        first += half
        return first, difference, size

    def _add_deviation_terms(self, gradients, nudges, total: int, free: State, nudged: State, samples: int) -> None:
        """Add the direct derivative at ``s* + eps / a`` of each phase, at s* in the tangent limit."""
        xp, value, work = self.network.device.xp, self.network.activation.value, nudged.buffers.work
        phases = len(nudged.deviations[0]) // samples

        def state(n: int, phase: int) -> Any:
            s, delta = work[0][n - 1], work[1][n - 1]
            value(free.drives[n - 1], s)
            if self.form != "tangent":
                eps = nudged.deviations[n - 1][phase * samples : (phase + 1) * samples]
                s += xp.multiply(eps, 1 / nudged.scales[n - 1], out=delta)
            return s

        for phase in range(phases):
            self._add_terms(gradients, nudges, lambda n, phase=phase: state(n, phase), 1 / phases, total)
