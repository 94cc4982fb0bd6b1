"""The fixed-point loop: when to stop, how settled each node is.

This module knows no layer type, no energy and no order of update. A *phase* offers ``program``
(`cupyep.program.Program`), ``run(instructions, measure)``, and the array ``residual`` (nodes, B) into which a measured
update adds the mean squared change of each sample. What it moves may be multiplied by its ``scale``; its updates go
``relaxation`` times as far as the rule says; ``label`` names a node, ``host`` copies an array to the host. Its flag
``drives_current`` says that its inputs belong to its start already. Every iteration is done through its ``repeat(name,
work)``, which may call ``work`` or, on a GPU, replay what it did before under the same name. Where a tolerance is asked
of synchronous updates it may have to ``remember()`` its states, and to tell their ``distance_from_remembered()``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.errors import ConvergenceWarning, choose, flag, integer, number, outside, require
from cupyep.losses import SquaredError
from cupyep.program import SCHEDULES
from cupyep.showing import Shown


@dataclass(repr=False)
class SettleStats(Shown):
    """How a phase ended.

    Attributes
    ----------
    steps : int
        Iterations done.
    measured : array of shape (depth, B)
        For each layer and sample the residual at the last iteration: the undamped root-mean-square change
        ``sqrt(mean((sigma(g) - s)^2))`` of the layer's units in one iteration (for sweeps, of both halves together); in
        a deviation phase, of the scaled deviation. Without a tolerance it is on the device.
    per_sample : ndarray of shape (depth, B)
        The same on the host: the first look waits for the device.
    residual : ndarray of shape (depth,)
        Mean over samples, on the host likewise.
    converged : bool or None
        Whether the largest residual of any layer and sample fell to the tolerance; None where none was given.
    tolerance : float or None
    oscillating : bool
        Whether the states return after two iterations though each moves them (synchronous updates can do that).
    trace : list of ndarray of shape (depth,)
        Residual a layer at every iteration, if recorded.
    host : callable
        Copies `measured` to the host.
    """

    steps: int
    measured: Any
    converged: bool | None = None
    tolerance: float | None = None
    oscillating: bool = False
    trace: list[np.ndarray] = field(default_factory=list)
    host: Callable[[Any], np.ndarray] = field(default=np.asarray, repr=False, compare=False)

    @functools.cached_property
    def per_sample(self) -> np.ndarray:
        return self.host(self.measured)

    @property
    def residual(self) -> np.ndarray:
        return self.per_sample.mean(axis=1)

    def facts(self) -> dict[str, str]:
        word = {None: "", True: ", settled", False: ", not settled"}[self.converged]
        worst = self.per_sample.mean(axis=1).max(initial=0.0)
        return {"steps": str(self.steps), "residual": f"{worst:.1e}{word}{', swings' if self.oscillating else ''}"}

    def worst_layer(self) -> int:
        """Return the layer, counted from 1, with the largest residual of any sample."""
        return int(self.per_sample.max(axis=1).argmax()) + 1

    def joined(self, other: SettleStats, phases: int = 1) -> SettleStats:
        """Return the statistics of these samples and those of `other` together, for so many phases in one batch each.

        Without traces: two phases may have ended after different numbers of steps.
        """
        depth = len(self.measured)
        parts = [stats.measured.reshape(depth, phases, -1) for stats in (self, other)]
        measured = array_module(parts[0]).concatenate(parts, axis=2).reshape(depth, -1)
        converged = None if self.converged is None else self.converged and other.converged
        return SettleStats(
            max(self.steps, other.steps),
            measured,
            converged,
            self.tolerance,
            self.oscillating or other.oscillating,
            host=self.host,
        )


def _iterate(phase: Any, measure: bool) -> None:
    if measure:
        phase.residual[...] = 0
    phase.run(phase.program.body, measure)


def iterate(phase: Any, measure: bool, relaxation: float = 1.0) -> None:
    """Do one iteration; what it measures stays on the device. Arguments as `settle`."""
    phase.relaxation = relaxation
    phase.repeat((measure, relaxation), functools.partial(_iterate, phase, measure))


def stats_of(phase: Any, steps: int) -> SettleStats:
    """Return the statistics of a phase of so many steps, the last of them measured, without tolerance."""
    return SettleStats(steps, _residual(phase), host=phase.host)


def watched(schedule: str, steps: int, tolerance: float | None) -> bool:
    """Return whether a phase that misses its tolerance is asked whether it oscillates."""
    return tolerance is not None and schedule == "synchronous" and steps >= 2


WEAK = 0.01  # the default feedback: deep networks stay near to their feed-forward pass, and to rest
STRONG = 0.3  # feedback above this makes what a sweep leaves come back
SWEEPS = {0.03: (2, 1), STRONG: (2, 2), 1.0: (6, 4)}  # by default, of feedback up to so much
OVER_RELAXATION = 1.6  # docs/performance.md: VGG-5 at lambda 1 settles in a quarter of the iterations


def default_steps(schedule: str, feedback: float) -> tuple[int, int]:
    """Return the numbers of free and nudged steps for a schedule and feedback weight.

    A sweep crosses the whole network up and down, and the weaker the feedback, the less is left to settle; in the
    other schedules news moves on by one layer a step.
    """
    if schedule != "sweeps":
        return 60, UNROLLED_STEPS
    return next(steps for most, steps in SWEEPS.items() if feedback <= most)


def default_beta(feedback: float) -> float:
    """Return the strength of the nudge: a derivative where the feedback is weak, and where it is strong a bounded one.

    0.5 is too much of one for layers that are nearly silent (docs/diagnostics.md); but where a response grows for long
    before it settles, ends of the range bound it.
    """
    return 0.05 if feedback <= STRONG else 0.5


UNROLLED_STEPS = 20  # of BPTT, which are synchronous


def default_relaxation(schedule: str, feedback: float) -> float:
    """Return how far an update goes: over-relaxation shortens even/odd settling, the more the stronger the feedback."""
    return OVER_RELAXATION if schedule == "evenodd" and feedback > STRONG else 1.0


def check_relaxation(relaxation: float, schedule: str) -> None:
    """Raise ConfigurationError for a relaxation with which the schedule could not settle."""
    number("relaxation", relaxation, above=0, below=2)
    require(
        relaxation <= 1 or schedule != "synchronous",
        f"relaxation {relaxation:g} with synchronous updates would not settle: use schedule 'evenodd', or at most 1",
    )


def check_betas(betas: Sequence[float], loss: str, tangent: bool) -> None:
    """Raise ConfigurationError for nudges with which the output of squared error, a state, would not settle.

    In the tangent, the limit of weak nudges, any does.
    """
    require(
        loss != SquaredError.name or tangent or all(abs(beta) < 1 for beta in betas),
        f"squared error needs beta between -1 and 1, not {', '.join(map(str, betas))}: "
        "s <- d - beta (s - y) never settles beyond",
    )


def check_settling(
    schedule: str,
    steps: Mapping[str, int],
    tolerance: float | None = None,
    relaxation: float = 1.0,
    check_every: int = 10,
    record: bool = False,
) -> None:
    """Raise ConfigurationError for a phase that could not be settled so; `steps` are by the names they go by."""
    for name, value in steps.items():
        integer(name, value)
    choose("schedule", schedule, SCHEDULES)
    if tolerance is not None:
        number("tolerance", tolerance, above=0)
    check_relaxation(relaxation, schedule)
    integer("check_every", check_every)
    flag("record", record)


def reads_start(
    steps: int, tolerance: float | None = None, relaxation: float = 1.0, check_every: int = 10, record: bool = False
) -> bool:
    """Return whether the first iteration measures or goes on from the start, and so reads that of every node."""
    return record or steps == 1 or relaxation != 1.0 or (tolerance is not None and check_every == 1)


def settle(
    phase: Any,
    steps: int,
    *,
    tolerance: float | None = None,
    relaxation: float = 1.0,
    check_every: int = 10,
    record: bool = False,
    name: str = "free",
) -> SettleStats:
    """Iterate `phase` and report how settled it is.

    Parameters
    ----------
    phase : object
        See the module's docstring.
    steps : int
        Number of iterations; the maximum where a tolerance is given.
    tolerance : float, optional
        Stop as soon as no layer of any sample has a larger residual; looked at every `check_every` iterations,
        because on a GPU a look waits for the device.
    relaxation : float
        omega of ``s <- s + omega [sigma(g) - s]``, above 0 and below 2, at most 1 for synchronous updates. Above 1
        (successive over-relaxation) even/odd updates come to the same rest point in a fraction of the steps where
        feedback is strong. The last iteration, and each one that `tolerance` is asked at, is a plain update: what a
        phase leaves is ``sigma(g)`` of its drives, and within the range of sigma.
    record : bool
        Keep the residual of every iteration; the phase itself is the same, bit for bit.
    name : str
        Of the phase, for the warning.

    Warns
    -----
    ConvergenceWarning
        If a tolerance was given and not reached.
    """
    schedule = phase.program.schedule
    check_settling(schedule, {f"steps of the {name} phase": steps}, tolerance, relaxation, check_every, record)
    if not phase.drives_current:
        phase.run(phase.program.start)
    watch_period = watched(schedule, steps, tolerance)
    trace: list[np.ndarray] = []
    converged = False
    for step in range(1, steps + 1):
        asked = step == steps or (tolerance is not None and step % check_every == 0)
        measure = record or asked
        if watch_period and step == steps - 1:
            phase.remember()
        iterate(phase, measure, 1.0 if asked else relaxation)
        if record or (asked and tolerance is not None):
            per_sample = phase.host(_residual(phase))  # the only time that the host waits for the device
        if record:  # which must not change the phase: it stops where it would stop unwatched
            trace.append(per_sample.mean(axis=1))
        if tolerance is not None and asked and per_sample.max() <= tolerance:
            converged = True
            break
    if tolerance is None:
        return SettleStats(step, _residual(phase), trace=trace, host=phase.host)
    stats = SettleStats(step, per_sample, converged, tolerance, False, trace)
    if not converged:
        near = 0.1 * float(per_sample.max())
        stats.oscillating = watch_period and phase.distance_from_remembered() / phase.scale < near
        _warn(stats, name, phase.label)
    return stats


def _residual(phase: Any) -> Any:
    """Return the residual of every node and sample, an array of its own: the next phase takes this one's memory."""
    measured, factor = array_module(phase.residual).sqrt(phase.residual), phase.scale * phase.relaxation
    return measured if factor == 1 else measured / factor


def _warn(stats: SettleStats, phase: str, label: Callable[[int], str]) -> None:
    layer = stats.worst_layer()
    unsettled = int((stats.per_sample.max(axis=0) > stats.tolerance).sum())
    remedy = (
        "it oscillates with period two: use schedule 'evenodd' or 'sweeps'"
        if stats.oscillating
        else f"raise the {phase} steps, lower the gain or the feedback, or raise the tolerance"
    )
    warnings.warn(
        f"the {phase} phase did not settle in {stats.steps} steps: {label(layer)} has residual "
        f"{stats.per_sample[layer - 1].max():.2g} > {stats.tolerance:.2g} "
        f"({unsettled} of {stats.per_sample.shape[1]} samples); {remedy}",
        ConvergenceWarning,
        stacklevel=outside(),
    )
