"""How far from rest do the phases of a learner end? A look at one batch, by letting the phases go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.batch import Batch, shared_out
from cupyep.errors import ConvergenceWarning
from cupyep.learning.learner import Learner
from cupyep.parallel import Communicator
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
    nonlinearity : ndarray of shape (L,), or None
        What part of a layer's response is no multiple of that to half the nudge, ``min_c |z - c z_half| / |z|``,
        Euclidean norms over the samples; 0 of a linear response. None without finite nudges of a known sign.
    """

    steps: int
    residual: np.ndarray
    per_sample: np.ndarray
    distance: np.ndarray
    oscillating: np.ndarray
    size: np.ndarray
    rounding: np.ndarray
    nonlinearity: np.ndarray | None = None

    @property
    def growing(self) -> np.ndarray:
        """Whether each layer moves more and more, in the end more than after the learner's own steps, shape (L,).

        Of two iterations the larger move counts, because synchronous layers may move in every second one only.
        """
        pairs = np.maximum(self.residual[1:], self.residual[:-1])
        return (pairs[-1] > pairs[max(self.steps - 2, 0)]) & (pairs[-1] > pairs[-3])


def probe_settling(learner: Learner, batch: Batch, ranks: Communicator | None = None) -> dict[str, PhaseProbe]:
    """Let the phases of `learner` settle on `batch` and go on; return ``free`` and ``nudged``, those that there are.

    Parameters and generators stay as they are. Backpropagation has no phases, BPTT a free one only. Of several `ranks`
    each looks at its share of the batch (`Batch.share`), and all see the whole.
    """
    if not hasattr(learner, "settle_free"):
        return {}
    ranks, own = ranks or Communicator(), shared_out(batch)[0]
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller sees it in the result
        seen, state, _ = _look(learner, learner.free_steps, lambda **how: _free(learner, batch, **how))
        phases = {"free": _judge(learner, seen, own, ranks)}
        if hasattr(learner, "nudged_steps"):
            seen, _, response = _look(
                learner, learner.nudged_steps, lambda **how: _nudged(learner, batch, state, **how)
            )
            phases["nudged"] = _judge(learner, seen, own, ranks)
            phases["nudged"].nonlinearity = _nonlinearity(learner, batch, state, response, own, ranks)
    return phases


def _look(
    learner: Any, steps: int, settle: Callable[..., tuple[State, list[Any]]]
) -> tuple[_Seen, State, list[np.ndarray]]:
    """Return what `settle`, called with its own and with more steps, shows, and what it returns after its own."""
    more = max(MORE_STEPS, steps, 0 if learner.schedule == "sweeps" else 2 * learner.network.depth)  # news gets round
    total = steps + (more | 1)  # odd: an oscillation of period two is not back where it was
    late, after = settle(steps=total, tolerance=None, record=True)
    size = np.array([_rms(a) for a in after])
    phases = late.stats.per_sample.shape[1] // size.shape[1]
    held = size / phases if late.deviations else np.array([_rms(a) for a in _hosts(learner, late.layers)])
    back = None
    if learner.schedule == "synchronous":
        _, earlier = settle(steps=total - 2, tolerance=None)
        back = np.array([_rms(a - b) for a, b in zip(after, earlier, strict=True)])
    own, now = settle()
    distance = [_relative(_rms(a - b), np.maximum(_rms(a), _rms(b))) for a, b in zip(after, now, strict=True)]
    per_sample = own.stats.per_sample.reshape(len(now), -1, size.shape[1]).max(axis=1)
    trace, steps = np.array(late.stats.trace), own.stats.steps
    return _Seen(steps, trace, per_sample, np.array(distance), size, phases, held, back), own, now


@dataclass
class _Seen:
    """What a phase showed of some samples; arrays of shape (L, N) as in `PhaseProbe`, but for the trace (T, L)."""

    steps: int
    residual: np.ndarray
    per_sample: np.ndarray
    distance: np.ndarray
    size: np.ndarray  # of the state or of the response, of all phases together
    phases: int
    held: np.ndarray  # the size of what was rounded: of the state of each phase
    back: np.ndarray | None  # how far synchronous layers are from where they were two iterations before


def _judge(learner: Any, seen: _Seen, own: int, ranks: Communicator) -> PhaseProbe:
    """Return what all ranks saw, each of its `own` samples, as one probe: rank 0's, so that all decide alike."""
    every = [(part, n) for part, n in ranks.gather((seen, own)) if n]
    return ranks.first(lambda: _joined(learner, *zip(*every, strict=True)))


def _joined(learner: Any, every: Sequence[_Seen], counts: Sequence[int]) -> PhaseProbe:
    def samples(name: str) -> np.ndarray:
        return np.concatenate([getattr(seen, name) for seen in every], axis=1)

    residual = np.sum([seen.residual * n for seen, n in zip(every, counts, strict=True)], axis=0) / sum(counts)
    size = samples("size").mean(axis=1) / every[0].phases
    rounding = _relative(ROUNDING * learner.network.precision.spacing * samples("held").mean(axis=1), size)
    oscillating = np.zeros(len(size), bool)
    if every[0].back is not None:
        moves = samples("size").max(axis=1) * 1e-3 < residual[-1]
        oscillating = (samples("back").max(axis=1) < 0.1 * residual[-1]) & moves
    steps = max(seen.steps for seen in every)
    return PhaseProbe(steps, residual, samples("per_sample"), samples("distance"), oscillating, size, rounding)


def _nonlinearity(
    learner: Any, batch: Batch, free: State, response: list[np.ndarray], own: int, ranks: Communicator
) -> np.ndarray | None:
    if learner.scheme not in ("centered", "onesided"):
        return None
    _, halves = _nudged(learner, batch, free, 0.5)
    pairs = [(z[:own], h[:own]) for z, h in zip(response, halves, strict=True)]
    products = ranks.gather(np.array([[(z * z).sum(), (h * h).sum(), (z * h).sum()] for z, h in pairs]))
    whole, half, both = ranks.first(lambda: sum(products)).T  # of two vectors: sin^2 = 1 - cos^2
    return np.sqrt(np.maximum(_relative(whole - _relative(both, half) * both, whole), 0.0))


def _free(learner: Any, batch: Batch, **how: Any) -> tuple[State, list[np.ndarray]]:
    state = learner.settle_free(batch, retain="both", **how)
    return state, _hosts(learner, state.layers)


def _nudged(learner: Any, batch: Batch, free: State, share: float = 1.0, **how: Any) -> tuple[State, list[np.ndarray]]:
    """Return the nudged state and the response of each layer, (N, *shape), to some `share` of the nudge."""
    betas = [learner.beta] if learner.scheme == "random" else learner.betas()  # no draw: training goes on as without
    betas = [share * beta for beta in betas]
    state = learner.settle_nudged(batch, free, betas, learner.network.nudges(batch, learner.signals), **how)
    if state.deviations:  # a of the last node is 1: what is left of its scale is that of the number format
        parts = [eps / state.scales[-1] for eps in _hosts(learner, state.deviations)]
        rest: list[Any] = [0.0] * len(free.layers)
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
