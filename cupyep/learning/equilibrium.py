"""Equilibrium Propagation: gradients from the difference of two settled states (Scellier & Bengio 2017).

With ``F = E + beta L`` and its equilibrium ``s_beta``, ``dL/dtheta = d/dbeta [dF/dtheta(s_beta)]`` at beta = 0. The
centered estimate (Laborieux et al. 2021) is ``-[dPhi/dtheta(s_+beta) - dPhi/dtheta(s_-beta)] / (2 beta N)``, plus the
direct derivative of L for the readout and learned maps. Feedback weight lambda multiplies edge n's part by a_n.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.backend import threads
from cupyep.batch import Batch
from cupyep.energy import Change
from cupyep.errors import ConfigurationError, PrecisionWarning, choose, instance, number, require
from cupyep.heads import Nudge
from cupyep.layers import Conv2d
from cupyep.learning.gradients import Gradients
from cupyep.learning.learner import Learner, StepResult
from cupyep.memory.layout import PhaseBuffers
from cupyep.memory.workspace import Needs
from cupyep.network import Network
from cupyep.ops.winograd import tile_size
from cupyep.settling import check_betas, check_settling, default_beta, default_steps
from cupyep.signals import Augmenter
from cupyep.state import State
from cupyep.structure import exclusive

SCHEMES = ("centered", "onesided", "random", "tangent")
FORMS = ("classical", "deviation")


class EquilibriumPropagation(Learner):
    """EP with a free and one or two nudged phases.

    Parameters
    ----------
    network : Network
    beta : float, optional
        Strength of the nudge, positive, with squared error below 1; unused by the tangent scheme. By default
        `cupyep.settling.default_beta` of the network's feedback.
    free_steps, nudged_steps : int, optional
        Iterations of each phase (the maximum, where a tolerance is given); by default as many as the network settles
        with (`Network.settling`), and `cupyep.settling.default_steps` of the nudged ones.
    scheme : {"centered", "onesided", "random", "tangent"}
        Nudged with +beta and -beta as one batch of 2N; with +beta alone; with a sign drawn for every batch; or the
        limit beta -> 0 in one linear phase (recurrent backpropagation).
    nudge : {"classical", "deviation"}
        How nudged phases are represented: as states, or as scaled deviations from the free state at its pooling
        winners (`cupyep.phases.Deviation`). The tangent scheme is a deviation.
    schedule : {"synchronous", "evenodd", "sweeps"}, optional
        That of the network by default.
    tolerance : float, optional
        Stop a phase at this residual (see `cupyep.settling.SettleStats`).
    relaxation : float, optional
        omega of both phases, see `cupyep.settling.settle`.
    signals : sequence of Augmenter
    generator : numpy.random.Generator, optional
        For the random scheme.
    micro_batch : int, optional
        See `Learner`.

    Raises
    ------
    ConfigurationError
        If a value is out of range.

    Warns
    -----
    PrecisionWarning
        If the network's precision does not go well with another setting: see `precision_risks`.
    """

    derives_maps = True

    def __init__(
        self,
        network: Network,
        beta: float | None = None,
        free_steps: int | None = None,
        nudged_steps: int | None = None,
        scheme: str = "centered",
        nudge: str = "deviation",
        schedule: str | None = None,
        tolerance: float | None = None,
        signals: Sequence[Augmenter] = (),
        generator: np.random.Generator | None = None,
        micro_batch: int | None = None,
        relaxation: float | None = None,
    ):
        super().__init__(network, signals, micro_batch)
        beta = default_beta(network.feedback) if beta is None else beta
        self.beta = number("beta, the strength of the nudge,", beta, above=0)
        self._settle_by(free_steps, schedule, tolerance, relaxation)
        default = default_steps(self.schedule, network.feedback)[1]
        self.nudged_steps = default if nudged_steps is None else nudged_steps
        self.scheme = choose("scheme", scheme, SCHEMES)
        self.nudge = choose("nudge", nudge, FORMS)
        if scheme == "tangent" and nudge == "classical":
            raise ConfigurationError("the tangent scheme is the limit of the deviation form; use nudge 'deviation'")
        self.takes_slopes = self.form == "tangent"
        check_betas([self.beta], network.readout.criterion.name, self.scheme == "tangent")
        steps = {"free_steps": self.free_steps, "nudged_steps": self.nudged_steps}
        check_settling(self.schedule, steps, tolerance, self.relaxation)
        generator = np.random.default_rng(0) if generator is None else generator
        self.generator = instance("generator", generator, np.random.Generator)
        for risk in precision_risks(self):
            warnings.warn(risk, PrecisionWarning, stacklevel=2)

    @property
    def form(self) -> str:
        """How nudged phases are represented: ``classical``, ``deviation`` or ``tangent``."""
        return "tangent" if self.scheme == "tangent" else self.nudge

    @property
    def _free(self) -> dict[str, Any]:
        """How the free phase settles; deviations build on its drives alone, states on its states."""
        return self._how(self.free_steps, "states" if self.form == "classical" else "drives")

    @property
    def _nudged(self) -> dict[str, Any]:
        return self._how(self.nudged_steps)

    def settle_free(self, batch: Batch, **how: Any) -> State:
        """Return the free state of a batch, in memory that the nudged phases take over but for what they build on.

        `how` replaces this learner's ``steps``, ``schedule``, ``tolerance`` or ``relaxation``, asks to ``record`` the
        residuals, or says what to ``retain`` (see `Network.settle_free`).
        """
        return self.network.settle_free(batch, **(self._free | how))

    def settle_nudged(
        self, batch: Batch, free: State, betas: list[float], nudges: Sequence[Nudge], **how: Any
    ) -> State:
        """Return the nudged states from `free`, one phase a beta, as `settle_free` returns the free ones."""
        return self.network.settle_nudged(batch, free, betas, nudges, self.form, **(self._nudged | how))

    def settled(self, batch: Batch) -> State:
        return self.settle_free(batch)

    def _draw(self) -> list[float]:
        return self.betas()

    def betas(self) -> list[float]:
        """Return beta of each nudged phase of a step; the random scheme draws its sign."""
        if self.scheme == "centered":
            return [self.beta, -self.beta]
        if self.scheme == "random":
            return [self.beta if self.generator.random() < 0.5 else -self.beta]
        return [1.0] if self.scheme == "tangent" else [self.beta]

    def _add(self, gradients: Gradients, batch: Batch, total: int, betas: list[float]) -> StepResult:
        nudges = self.network.nudges(batch, self.signals)
        self.network.memory.expect(self.needs(len(batch), nudges))
        return self._nudge(Part(gradients, batch, total, betas, nudges), self.settle_free(batch))

    def needs(self, samples: int, nudges: Sequence[Nudge]) -> Needs:
        network, phases = self.network, 2 if self.scheme == "centered" else 1
        shape = network.nudged_shape(self.form, samples, phases, nudges, **self._nudged)
        lay_out = functools.partial(network.memory.layout.lay_out, shape=shape)
        return Needs(network.free_shape(samples, **self._free), shape.rows, shape, lay_out)

    @exclusive
    def step_from(self, batch: Batch, free: State) -> StepResult:
        """Return gradients and statistics of the nudged phases that start at the given free state, in one part."""
        batch = self.network.labelled(batch)
        self.network.check_start(free, len(batch), "free")
        nudges = self.network.nudges(batch, self.signals)
        part = Part(self._zero_gradients(), batch, len(batch), self.betas(), nudges)
        with self.network.effective.constant():
            result = self._nudge(part, free)
        self._finish(part.gradients)
        return result

    def _nudge(self, part: Part, free: State) -> StepResult:
        work = None if free.buffers is None else free.buffers.work[0]
        figures = self._figures(free.layers, part.batch, part.total, work)
        nudged = self.network.settle_nudged(part.batch, free, part.betas, part.nudges, self.form, **self._nudged)
        add = self._add_classical if self.form == "classical" else self._add_deviation
        response = add(part, free, nudged)
        return StepResult(part.gradients, **figures, free=free.stats, nudged=nudged.stats, nudge_response=response)

    def _add_classical(self, part: Part, free: State, nudged: State) -> Any:
        """Add ``-a_j [dPhi(s_1) - dPhi(s_2)] / ((beta_1 - beta_2) total)``, s_2 the second phase or the free state.

        Each at the pooling winners of the states themselves: those that a phase leaves are of its last drives. While
        winners still change the two differ, and with them the gradient of Phi. Those of the image are constant.
        """
        network, samples, images = self.network, part.samples, part.batch.images
        energy, buffers, two = network.energy, _buffers(nudged), part.phases == 2
        require(bool(two or free.winners), "a settled state has winners: pass what settle() returned")
        ops, response = network.memory.workspace(part.phases * samples).ops, []
        free_nodes = [images, *(s[samples:] if two else free.layers[n] for n, s in enumerate(nudged.layers))]
        if two:
            buffers.images.reshape(2, *images.shape)[...] = images
        nodes = [buffers.images if two else images, *nudged.layers]
        for node in range(1, network.depth + 1):
            first, second, work = nodes[node][:samples], free_nodes[node], buffers.work[0][node - 1]
            response.append(self._response(first, second, work[:samples]))
            self._factors[node - 1] = -energy.weights[node - 1] / (part.span * part.total)
            winners = energy.winners_at(node, nodes, nudged.winners, nudged.winners, work, ops)
            work[:samples] = first
            if two:
                network.device.xp.multiply(second, -1, out=work[samples:])  # one product over both phases
            energy.add_gradients(node, nodes, work, winners, part.gradients, ops)
            if not two:
                winners = energy.winners_at(node, free_nodes, free.winners, buffers.work_winners, work, ops)
                network.device.xp.multiply(second, -1, out=work)
                energy.add_gradients(node, free_nodes, work, winners, part.gradients, ops)
        self._add_part_terms(part, nudged, lambda phase, n: nudged.layers[n - 1][part.rows(phase)])
        return network.device.xp.stack(response) * (part.samples / part.total)

    def _response(self, first: Any, second: Any, work: Any) -> Any:
        """Return the mean ``|s_1 - s_2|``."""
        xp = self.network.device.xp
        difference = xp.subtract(first, second, out=work)
        return xp.abs(difference, out=difference).mean(dtype=self.network.dtype)

    def _add_deviation(self, part: Part, free: State, nudged: State) -> Any:
        """Add ``-[corr(m^i, U(e^j)) + (a_j / a_i) corr(e^i, U(m^j))] / ((beta_1 - beta_2) total)``, i to j connected.

        e = eps_1 - eps_2 is the difference of the scaled deviations, m = s* + (delta_1 + delta_2) / 2 the mean of the
        two nudged states. For products, ``p_1 q_1 - p_2 q_2 = mean(p) diff(q) + diff(p) mean(q)``: exact, and never a
        difference of two large sums. In the tangent limit m = s*.
        """
        network, ops = self.network, self.network.memory.workspace(part.samples).ops
        response = network.device.xp.zeros(network.depth, network.dtype)
        self._add_part_terms(part, nudged, functools.partial(self._state_of_deviation, part, free, nudged))
        means, changes = [part.batch.images], {}
        for node in range(1, network.depth + 1):
            mean, difference = self._mean_and_difference(node, part, free, nudged, response[node - 1 : node])
            means.append(mean)
            changes[node] = Change(difference)
            self._factors[node - 1] = -1 / (part.span * part.total * nudged.scales[-1])  # a of the last node is 1
            network.energy.add_gradients_of_change(node, means, changes, free.winners, part.gradients, ops)
        return response

    def _mean_and_difference(self, n: int, part: Part, free: State, nudged: State, size: Any) -> tuple[Any, Any]:
        """Return m^n and e^n, made in the place of the deviations where there are two phases, and add the response.

        With one phase m^n is in memory that others take over after the turn of the last node above. `size` gains the
        response, the mean ``|e^n| / a_n``, as a part of that of the whole batch.
        """
        buffers, eps, a = _buffers(nudged), nudged.deviations[n - 1], nudged.scales[n - 1]
        phases = [eps[part.rows(phase)] for phase in range(part.phases)]
        first, second = phases if part.phases == 2 else (eps, None)
        mean = buffers.means[n - 1] if second is None else first
        share = 0.0 if self.form == "tangent" else 0.5 / a
        work, divisor = (buffers.work[0][n - 1], buffers.work[1][n - 1]), a * part.total / part.samples
        updates = self.network.energy.updates
        return mean, updates.compare(first, second, free.drives[n - 1], share, mean, size, divisor, work)

    def _state_of_deviation(self, part: Part, free: State, nudged: State, phase: int, n: int) -> Any:
        """Return ``s* + eps / a`` of one phase, s* in the tangent limit."""
        s, work = (arrays[n - 1] for arrays in _buffers(nudged).work)
        eps = None if self.form == "tangent" else nudged.deviations[n - 1][part.rows(phase)]
        updates, g = self.network.energy.updates, free.drives[n - 1]
        updates.see(eps, 1 / nudged.scales[n - 1], g, None, s, work.reshape(-1))
        return s

    def _add_part_terms(self, part: Part, nudged: State, states: Callable[[int, int], Any]) -> None:
        """Add the direct derivative of the loss, the mean over phases; `states` maps phase and layer to a state."""
        share, scratch = 1 / part.phases, _buffers(nudged).term_work
        for phase in range(part.phases):
            of_phase = functools.partial(states, phase)
            self._add_terms(part.gradients, part.nudges, of_phase, share, part.total, scratch)


def _buffers(nudged: State) -> PhaseBuffers:
    """Return where `Network.settle_nudged` left a state in the network's memory."""
    assert nudged.buffers is not None  # only copies have none
    return nudged.buffers


@dataclass
class Part:
    """A part of a batch on its way to gradients."""

    gradients: Gradients  # by parameter path; what the part contributes is added
    batch: Batch
    total: int  # samples of the whole batch
    betas: list[float]  # one a phase
    nudges: list[Nudge]

    @property
    def samples(self) -> int:
        return len(self.batch)

    @property
    def phases(self) -> int:
        return len(self.betas)

    @property
    def span(self) -> float:
        """Distance of the two states that are compared, in beta: of the phases, or of one from the free state."""
        return self.betas[0] - (self.betas[1] if self.phases == 2 else 0.0)

    def rows(self, phase: int) -> slice:
        """Return the rows of one phase."""
        return slice(phase * self.samples, (phase + 1) * self.samples)


def precision_risks(learner: EquilibriumPropagation) -> list[str]:
    """Return what does not go well with a network's precision, one line each (docs/precision.md)."""
    precision, activation, risks = learner.network.precision, learner.network.activation, []
    name, spacing, tolerance = f"precision {precision.name}", f"{precision.spacing:.1g}", learner.tolerance
    if precision.half and learner.form == "classical":
        risks.append(
            f"{name} with nudge 'classical': states near 1/2 are stored {spacing} apart, smaller responses are lost, "
            "and the gradient turns away from the true one as beta falls; use nudge 'deviation', or precision float32"
        )
    elif learner.form == "classical" and not learner.network.device.is_gpu and _takes_large_tiles(learner.network):
        risks.append(
            f"{name} with nudge 'classical': Winograd's products round ten times more than direct sums, and small "
            "responses are lost; build the network with exact=True (--exact), or use nudge 'deviation'"
        )
    if tolerance is not None and tolerance < precision.spacing:
        never = f"may never reach a tolerance of {tolerance:g}: rounded states can go on changing by {spacing}"
        if learner.schedule == "synchronous":
            risks.append(
                f"{name} with synchronous updates {never}; use schedule 'evenodd' or 'sweeps', or a tolerance of at "
                f"least {spacing}"
            )
        elif precision.half and learner.relaxation > 1:
            risks.append(
                f"{name} with relaxation {learner.relaxation:g} {never}; use relaxation 1, or a tolerance of at least "
                f"{spacing}"
            )
    if precision.name == "float16" and not math.isfinite(activation.high):
        risks.append(
            f"{name} ends at 65504 and activation '{activation.name}' has no upper bound; "
            "use precision bfloat16, or an activation with one"
        )
    return risks


def _takes_large_tiles(network: Network) -> bool:
    if network.precision.name != "float32":
        return False
    geometries = [edge.geometry for edge in network.layers if isinstance(edge, Conv2d)]
    return any(tile_size(geometry, threads.PART, network.precision) == 4 for geometry in geometries)
