"""How far from rest do the phases of a learner end? A look at one batch, by letting the phases go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.batch import Batch
from cupyep.errors import ConvergenceWarning
from cupyep.learning.learner import Learner
from cupyep.state import State

MORE_STEPS = 9  # at least, beyond the learner's own
ROUNDING = 8  # distances of a number to the next one: what a layer at rest still moves by, at most


@dataclass
class PhaseProbe:
    """One phase of a learner on one batch, as long as the learner settles and then as long again.

    Attributes
    ----------
    steps : int
        Iterations of the learner's own phase; fewer than it allows where the tolerance ended it.
    residual : ndarray of shape (T, L)
        Residual a layer (see `cupyep.settling.SettleStats`) at every iteration, mean over the samples; T is larger than
        `steps`.
    per_sample : ndarray of shape (L, N)
        Residual a sample after `steps`; the larger one of two nudged phases.
    distance : ndarray of shape (L, N)
        How far the layer still moves after `steps`, ``|z_T - z_steps| / max(|z_T|, |z_steps|)``, Euclidean norms a
        sample: z is the state of a free phase, and the response ``s_+ - s_-`` of nudged ones (``s_beta - s*`` of one).
        0 is at rest; 1 is all or nothing of it there yet.
    oscillating : ndarray of bool, shape (L,)
        Whether the layer is back after two iterations though each moves it (seen for the synchronous schedule).
    size : ndarray of shape (L,)
        What a residual is to be compared with: the root mean square of the state, or of the response of a phase (as
        scaled deviation), after all iterations, mean over the samples.
    rounding : ndarray of shape (L,)
        Residual by rounding alone, at most, as a part of the `size`.
    """

    steps: int
    residual: np.ndarray
    per_sample: np.ndarray
    distance: np.ndarray
    oscillating: np.ndarray
    size: np.ndarray
    rounding: np.ndarray

    @property
    def growing(self) -> np.ndarray:
        """Whether each layer moves more and more, in the end more than after the learner's own steps, shape (L,).

        Of two iterations the larger move counts, because synchronous layers may move in every second one only.
        """
        pairs = np.maximum(self.residual[1:], self.residual[:-1])
        return (pairs[-1] > pairs[max(self.steps - 2, 0)]) & (pairs[-1] > pairs[-3])


def probe_settling(learner: Learner, batch: Batch) -> dict[str, PhaseProbe]:
    """Let the phases of `learner` settle on `batch` and go on; return ``free`` and ``nudged``, those that there are.

    Parameters and generators stay as they are. Backpropagation has no phases, BPTT a free one only.
    """
    if not hasattr(learner, "settle_free"):
        return {}
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller sees it in the result
        free, state = _probe(learner, learner.free_steps, lambda **how: _free(learner, batch, **how))
        if not hasattr(learner, "settle_nudged"):
            return {"free": free}
        nudged, _ = _probe(learner, learner.nudged_steps, lambda **how: _nudged(learner, batch, state, **how))
    return {"free": free, "nudged": nudged}


def _probe(learner: Any, steps: int, settle: Callable[..., tuple[State, list[Any]]]) -> tuple[PhaseProbe, State]:
    """Return what `settle`, called with its own and with more steps, shows, and the state after its own."""
    more = max(MORE_STEPS, steps, 0 if learner.schedule == "sweeps" else 2 * learner.network.depth)  # news gets round
    total = steps + (more | 1)  # odd: an oscillation of period two is not back where it was
    late, after = settle(steps=total, tolerance=None, record=True)
    residual = np.array(late.stats.trace)
    phases = late.stats.per_sample.shape[1] // len(after[0])
    size = np.array([_rms(a).mean() for a in after]) / phases
    held = size if late.deviations is not None else [_rms(a).mean() for a in _hosts(learner, late.layers)]
    rounding = _relative(ROUNDING * learner.network.precision.spacing * np.array(held), size)
    oscillating = np.zeros(residual.shape[1], bool)
    if learner.schedule == "synchronous":
        _, earlier = settle(steps=total - 2, tolerance=None)
        back = [_rms(a - b).max() for a, b in zip(after, earlier, strict=True)]
        moves = np.array([_rms(a).max() for a in after]) * 1e-3 < residual[-1]
        oscillating = (np.array(back) < 0.1 * residual[-1]) & moves
    own, now = settle()
    distance = [_relative(_rms(a - b), np.maximum(_rms(a), _rms(b))) for a, b in zip(after, now, strict=True)]
    per_sample = own.stats.per_sample.reshape(len(now), -1, len(now[0])).max(axis=1)
    return PhaseProbe(own.stats.steps, residual, per_sample, np.array(distance), oscillating, size, rounding), own


def nonlinearity(learner: Learner, batch: Batch) -> float | None:
    """Return by how much the size of twice the response to half the nudge differs from that to the nudge, as a part.

    Euclidean norms over the batch, in the worst layer: 0 of a linear response. None without finite nudges of a known
    sign.
    """
    if getattr(learner, "scheme", None) not in ("centered", "onesided"):
        return None
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        state, _ = _free(learner, batch)
        whole, half = (_nudged(learner, batch, state, share)[1] for share in (1.0, 0.5))
        sizes = np.array([[np.linalg.norm(z) for z in response] for response in (whole, half)])
        return float(_relative(abs(2 * sizes[1] - sizes[0]), 2 * sizes[1]).max())


def _free(learner: Any, batch: Batch, **how: Any) -> tuple[State, list[np.ndarray]]:
    state = learner.settle_free(batch, retain="both", **how)
    return state, _hosts(learner, state.layers)


def _nudged(learner: Any, batch: Batch, free: State, share: float = 1.0, **how: Any) -> tuple[State, list[np.ndarray]]:
    """Return the nudged state and the response of each layer, (N, *shape), to some `share` of the nudge."""
    betas = [learner.beta] if learner.scheme == "random" else learner.betas()  # no draw: training goes on as without
    betas = [share * beta for beta in betas]
    state = learner.settle_nudged(batch, free, betas, learner.network.nudges(batch, learner.signals), **how)
    if state.deviations is not None:  # a of the last node is 1: what is left of its scale is that of the number format
        parts = [eps / state.scales[-1] for eps in _hosts(learner, state.deviations)]
        rest = [0.0] * len(free.layers)
    else:
        parts, rest = _hosts(learner, state.layers), _hosts(learner, free.layers)
    n = len(batch)
    return state, [z[:n] - (z[n:] if len(z) > n else s) for z, s in zip(parts, rest, strict=True)]


def _hosts(learner: Any, arrays: list[Any]) -> list[np.ndarray]:
    return [np.array(learner.network.device.to_numpy(a), np.float64) for a in arrays]


def _rms(z: np.ndarray) -> np.ndarray:
    """Return the root mean square of each sample, shape (N,)."""
    return np.sqrt((z**2).reshape(len(z), -1).mean(axis=1))


def _relative(change: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return ``change / size``: 0 for nothing of nothing, 1 for a state that grows without bounds."""
    ratio = np.divide(change, size, out=np.zeros_like(change), where=size != 0)
    return np.where(np.isfinite(ratio), ratio, 1.0)
