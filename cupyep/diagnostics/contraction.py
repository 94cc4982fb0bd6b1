"""How fast a phase comes to rest, and how many iterations it needs, read from the residuals of a probe.

An iteration that contracts multiplies what is left to go by some rho < 1: its residuals ``r_t`` fall by rho a step, and
after t iterations a layer still moves by ``r_(t+1) + r_(t+2) + ...`` at most, whose tail is ``r_T rho / (1 - rho)``.
All of it is relative to the size of the layer's state, of nudged phases to the response (as scaled deviations, both).
"""

from __future__ import annotations

import math

import numpy as np

from cupyep.diagnostics.probe import PhaseProbe

WANTED = 0.1  # of a layer's size may be left to go; seen: VGG-5 at lambda 0.1 has 0.05 after 2 sweeps


def most_steps(schedule: str) -> int:
    """Return the largest number of iterations that is worth while for a phase."""
    return 8 if schedule == "sweeps" else 200


def contraction(probe: PhaseProbe) -> float | None:
    """Return by what an iteration multiplies the residual, the largest over the layers; None where nothing moves.

    The geometric mean over the later half of the iterations that count: those up to the first in which the layer moves
    by less than a tenth of what may be left to go, or no more than rounding does. Of two iterations the larger move
    counts: synchronous layers may move in every second one only. It is infinite where residuals are not finite.
    """
    pairs = _pairs(_relative(probe))
    rates = [_rate(*column) for column in zip(pairs.T, _floor(probe, pairs), strict=True)]
    return max((rate for rate in rates if rate is not None), default=None)


def steps_to_rest(probe: PhaseProbe) -> int | None:
    """Return after how many iterations no layer has more than `WANTED` left to go; None if that is never.

    Within the recorded ones as these went, beyond them by the contraction.
    """
    residual, rho = _relative(probe), contraction(probe) or 0.0
    if not np.isfinite(residual).all():
        return None
    moving = np.where(residual > _floor(probe, _pairs(residual)), residual, 0.0)
    last = np.where(moving[-1] > 0, moving[-1], moving[-2])
    if last.any() and rho >= 1:
        return None
    tail = last * rho / (1 - rho) if last.any() else 0.0
    left = (moving[::-1].cumsum(axis=0)[::-1] - moving + tail).max(axis=1)  # after each iteration
    if left[-1] <= WANTED:
        return int(np.argmax(left <= WANTED)) + 1
    return len(left) + math.ceil(math.log(WANTED / left[-1]) / math.log(rho))


def _relative(probe: PhaseProbe) -> np.ndarray:
    """Return the residuals (T, L) in terms of the size of each layer, without the last, which is not over-relaxed.

    Where the size is not finite no residual is.
    """
    residual = probe.residual[:-1]
    with np.errstate(over="ignore", invalid="ignore"):
        relative = np.divide(residual, probe.size, out=np.zeros_like(residual), where=probe.size > 0)
    return np.where(np.isfinite(probe.size), relative, np.inf)


def _pairs(residual: np.ndarray) -> np.ndarray:
    """Return the larger of each residual and the one before."""
    return np.maximum(residual, np.vstack([residual[:1], residual[:-1]]))


def _floor(probe: PhaseProbe, pairs: np.ndarray) -> np.ndarray:
    """Return below what a residual does not count, shape (L,): not where it grows, and the size with it."""
    grows = pairs[-1] >= pairs[: len(pairs) // 2].max(axis=0)
    return np.where(grows, 0.0, np.maximum(probe.rounding, WANTED / 10))


def _rate(residual: np.ndarray, floor: float) -> float | None:
    if not np.isfinite(residual).all():
        return math.inf
    above = np.flatnonzero(residual > floor)
    if not above.size:
        return None
    last = min(above[-1] + 1, len(residual) - 1)  # the first that does not count any more, too
    first = max(last // 2, above[0])
    return float((residual[last] / residual[first]) ** (1 / (last - first))) if last > first else None
