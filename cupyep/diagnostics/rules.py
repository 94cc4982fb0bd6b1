"""The ways in which EP fails without the loss saying so, found in the numbers of an epoch and put into words.

Convergence failure: a phase ends before it is at rest. Nonlinear response: the nudge is too strong for a derivative.
Vanishing response: it dies out on its way down. Collapse: units saturate or die, or the accuracy falls (after arXiv
2508.15989).

What is judged is the learning, not the response itself: with feedback weight lambda layer n responds by lambda^(L - n)
of what it would with lambda = 1, by design, and its part of the gradient is multiplied by ``a_n = lambda^-(L - n)``. So
responses are compared as scaled deviations ``a_n |s_+ - s_-|``, which are of one order however weak the feedback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupyep.diagnostics.contraction import contraction
from cupyep.diagnostics.probe import PhaseProbe

Record = dict[str, Any]


class Limit(NamedTuple):
    """A threshold and where it comes from; "seen" are networks of 4 to 15 layers, narrow, on CIFAR-10 and digits."""

    value: float
    why: str


LIMITS = {
    "free distance": Limit(0.5, "a sample whose state still moves by half its size; seen: up to 0.4 where EP trains "
                                "like BP, 0.4 to 0.9 where its gradient has a cosine below 0.5 with BPTT's"),
    "nudged distance": Limit(0.75, "a sample whose response still changes by three quarters; seen: up to 0.65 where "
                                   "EP trains well, 0.7 to 1 where it does not"),
    "unsettled samples": Limit(0.25, "so many samples too far from rest, or above the tolerance, spoil the mean"),
    "response": Limit(1e-3, "Euclidean norm of a layer's scaled response against the last layer's; seen: 3e-3 and "
                            "more where EP trains, 6e-4 to 5e-5 where it stays at chance"),
    "gradient": Limit(1e-3, "norm of a layer's gradient against the last layer's; seen: 1e-2 and more where EP trains"),
    "rounding": Limit(100, "response of a state against its size, in units of its number format's precision: below "
                           "it a difference of two states (classical form) is noise"),
    "idle": Limit(0.75, "fraction of a layer's units that do not respond, at the end of their range or in channels "
                        "that no image moves; seen: up to 0.61 in the last layer of networks that learn, 0.77 to 1 in "
                        "collapsed ones"),
    "accuracy": Limit(0.75, "training accuracy against its best epoch"),
    "nonlinearity": Limit(0.5, "part of a response that is no multiple of that to half the nudge; seen at beta 0.5: up "
                               "to 0.12 (squared error: 0.35) where EP trains well, 0.75 and more in VGG-11 on "
                               "CIFAR-100, far behind BP"),
    "relaxation": Limit(0.1, "what an iteration leaves of the way, beyond relaxation - 1; seen: 0.05 to 0.07 in VGG-11 "
                             "at 1.6, which takes twice the iterations of 1.4, 0.11 in VGG-7, where 1.6 is best"),
    "kappa": Limit(1.0, "a signal that weighs as much as the readout"),
}  # fmt: skip
DEAD_IMAGES = 16  # in smaller batches many channels are still by chance


class Finding(NamedTuple):
    """One of the failures."""

    signature: str  # "convergence", "nonlinearity", "vanishing", "collapse"; of a pace also "contraction"
    layers: tuple[int, ...]  # where, counted from 1; empty for the whole network
    message: str  # one line: what is wrong, how badly, which option to turn and which way


@dataclass(frozen=True)
class Setting:
    """What the rules need to know of a learner."""

    weights: tuple[float, ...]  # the a_n
    units: tuple[int, ...]  # size of each layer's state
    batch_size: int
    form: str | None = None  # how nudged phases are represented; None without any
    precision: float = 2.0**-23  # spacing of the numbers at 1
    schedule: str = "sweeps"
    tolerance: float | None = None
    free_steps: int = 0
    nudged_steps: int = 0
    relaxation: float = 1.0
    signals: bool = False  # whether there are intermediate ones
    plain: bool = False  # whether weights are trained as they are, without a parametrisation
    names: tuple[str, ...] = ()  # of the nodes; empty for a chain, whose layers have numbers

    @classmethod
    def of(cls, learner: Any, batch_size: int) -> Setting:
        """Return the setting of `learner`."""
        network = learner.network
        phases = ("form", "schedule", "relaxation", "tolerance", "free_steps", "nudged_steps")
        return cls(
            tuple(network.energy.weights),
            tuple(math.prod(shape) for shape in network.state_shapes),
            batch_size,
            precision=float(np.finfo(network.dtype).eps),
            signals=bool(learner.signals),
            plain=network.weights == "plain",
            names=() if network.graph.is_chain else tuple(network.graph.names),
            **{name: getattr(learner, name) for name in phases if hasattr(learner, name)},
        )


def probe_record(probes: Mapping[str, PhaseProbe], tolerance: float | None) -> Record:
    """Return what an epoch's record takes from its probes, but for contractions lists with a number a layer.

    ``free_contraction`` and ``nudged_contraction`` (`cupyep.diagnostics.contraction`; None where there is none),
    ``free_distance`` and ``nudged_distance`` (means over the samples), without a tolerance ``free_unsettled`` and
    ``nudged_unsettled``, the fractions of samples too far from rest, and, of finite nudges, ``nonlinearity``.
    """
    record: Record = {}
    for phase, probe in probes.items():
        record[f"{phase}_contraction"] = finite(contraction(probe))
        record[f"{phase}_distance"] = probe.distance.mean(axis=1).tolist()
        if tolerance is None:
            limit = LIMITS[f"{phase} distance"].value
            record[f"{phase}_unsettled"] = (probe.distance > limit).mean(axis=1).tolist()
        if probe.nonlinearity is not None:
            record["nonlinearity"] = probe.nonlinearity.tolist()
    return record


def finite(value: float | None) -> float | None:
    """Return a number as JSON can have it."""
    return value if value is not None and math.isfinite(value) else None


def find(
    record: Record, setting: Setting, probes: Mapping[str, PhaseProbe], history: Sequence[Record] = ()
) -> list[Finding]:
    """Return what is wrong, the cause before its consequences.

    The `record` holds the numbers of an epoch as metrics.jsonl has them, `probe_record` included; what is None or
    missing is not judged. `probes` are the two phases, as far as they were probed; `history` the records of the epochs
    before.
    """
    found = [_unsettled(phase, record, setting, probes.get(phase)) for phase in ("free", "nudged")]
    found += [_nonlinear(record, setting), _vanishing(record, setting), _rounding(record, setting)]
    found += [_idle(record, setting, history), _falling(record, history)]
    return [finding for finding in found if finding is not None]


def scaled_response(record: Record, weights: Sequence[float]) -> np.ndarray:
    """Return ``a_n`` times the mean response of each layer."""
    return np.asarray(record["nudge_response"]) * np.asarray(weights)


def shares_of_last(record: Record, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Return the Euclidean norms of scaled response and gradient of each layer, as shares of the last layer's."""
    response = scaled_response(record, setting.weights) * np.sqrt(setting.units)
    gradient = np.asarray(record["gradient_norm"][: len(response)])
    return response / (response[-1] or 1), gradient / (gradient[-1] or 1)


def is_settled(record: Record) -> bool | None:
    """Return whether the phases of an epoch came to rest; None where nothing settles, or nobody has looked."""
    if not record.get("free_distance"):
        return None
    return all(finding.get("signature") != "convergence" for finding in record.get("findings") or ())


def unsettled_layers(fractions: Sequence[float] | np.ndarray) -> tuple[int, ...]:
    """Return the layers, counted from 1, in which too large a fraction of the samples is unsettled."""
    return _numbers(np.asarray(fractions) > LIMITS["unsettled samples"].value)


# --- convergence ---------------------------------------------------------------------------------------------------


def _unsettled(phase: str, record: Record, setting: Setting, probe: PhaseProbe | None) -> Finding | None:
    fractions = np.asarray(record.get(f"{phase}_unsettled") or [0.0])
    layers = unsettled_layers(fractions)
    if not layers:
        return None
    worst = int(fractions.argmax())
    where = spans([worst + 1], setting.names)
    steps, unit = getattr(setting, f"{phase}_steps"), "sweep" if setting.schedule == "sweeps" else "step"
    samples = f"in {fractions[worst]:.0%} of the samples"
    if setting.tolerance is not None:
        residual = (record.get(f"{phase}_residual_per_layer") or [math.nan] * len(fractions))[worst]
        what = f"{where} has residual {residual:.1e}, above the tolerance {setting.tolerance:.0e} {samples}"
    elif phase == "free":
        what = f"{where} has {record['free_distance'][worst]:.0%} of its size left to go, too much {samples}"
    else:
        change = record["nudged_distance"][worst]
        what = f"the response of {where} would still change by {change:.0%}, too much {samples}"
    message = (
        f"the {phase} phase does not settle: after {steps} {unit}{'s' if steps > 1 else ''} {what} "
        f"({spans(layers, setting.names)}); {_remedy(phase, setting, probe)}"
    )
    return Finding("convergence", layers, message)


def _remedy(phase: str, setting: Setting, probe: PhaseProbe | None) -> str:
    if probe is not None and probe.oscillating.any():
        return "it swings between two states: use --schedule evenodd or sweeps"
    if phase == "nudged" and probe is not None and (probe.distance[0] == 1).all():
        return f"raise --nudged-steps, the nudge has not reached {spans([1], setting.names)} yet"
    if phase == "nudged" and probe is not None and probe.growing[0]:
        standardized = ", or train anew with --weights standardized" if setting.plain else ""
        return f"it grows all the time: lower --feedback or --gain, or raise --free-steps{standardized}"
    tolerance = "" if setting.tolerance is None else ", or raise --tolerance"
    over = probe is not None and _over_relaxed(setting.relaxation, probe)
    lower = "--relaxation, --feedback" if over else "--feedback"
    return f"raise --{phase}-steps, or lower {lower} or --gain{tolerance}"


def _over_relaxed(relaxation: float, probe: PhaseProbe) -> bool:
    """Return whether an iteration leaves about ``relaxation - 1``, the least that it can: less of it may do more.

    So it is at the best relaxation and above (Young 1954).
    """
    rate = contraction(probe)
    return relaxation > 1 and rate is not None and rate < relaxation - 1 + LIMITS["relaxation"].value


# --- nonlinear response ----------------------------------------------------------------------------------------------


def _nonlinear(record: Record, setting: Setting) -> Finding | None:
    off = np.asarray(record.get("nonlinearity") or 0.0)
    layers = _numbers(off > LIMITS["nonlinearity"].value)
    if not layers:
        return None
    form = "use --nudge deviation, or " if setting.form == "classical" else ""
    message = (
        f"the nudge is too strong for a derivative: {off.max():.0%} of the response of "
        f"{spans([int(off.argmax()) + 1], setting.names)} is no multiple of that to half the nudge "
        f"({spans(layers, setting.names)}); {form}lower --beta, or use --scheme tangent, its limit"
    )
    return Finding("nonlinearity", layers, message)


# --- vanishing response --------------------------------------------------------------------------------------------


def _vanishing(record: Record, setting: Setting) -> Finding | None:
    if not record.get("nudge_response"):
        return None
    response, gradient = shares_of_last(record, setting)
    if response[-1] == 0:
        message = (
            "no layer responds to the nudge, all units of the last layer are at the ends of their ranges; start anew "
            "with a lower --learning-rate or --gain"
        )
        return Finding("vanishing", (), message)
    weak = (response < LIMITS["response"].value) | (gradient < LIMITS["gradient"].value)
    unsettled = np.asarray(record.get("nudged_unsettled") or 0.0) > LIMITS["unsettled samples"].value
    weak &= ~(unsettled & (response == 0))  # the nudge has not got there yet, which `_unsettled` says
    layers = _numbers(weak)
    if not layers:
        return None
    worst = layers[int(response[[n - 1 for n in layers]].argmin())] - 1
    knob = "raise --kappa" if setting.signals else "add signals (--aug le or kd)"
    form = ", or use --nudge deviation" if setting.form == "classical" else ""
    message = (
        f"the nudge vanishes on its way down: {spans([worst + 1], setting.names)} responds with "
        f"{_percent(response[worst])} of the last layer's strength, its gradient has {_percent(gradient[worst])} "
        f"({spans(layers, setting.names)}); {knob}, or lower --feedback{form}"
    )
    return Finding("vanishing", layers, message)


def _rounding(record: Record, setting: Setting) -> Finding | None:
    if setting.form != "classical" or not record.get("nudge_response"):
        return None
    activity = np.asarray(record["activity"])
    share = np.asarray(record["nudge_response"]) / np.where(activity > 0, activity, 1)
    limit = LIMITS["rounding"].value * setting.precision
    layers = _numbers((activity > 0) & (share < limit))
    if not layers:
        return None
    message = (
        f"the nudge is lost in rounding: the states of {spans(layers, setting.names)} respond by "
        f"{share[layers[0] - 1]:.0e} of their size and hold {setting.precision:.0e}; use --nudge deviation, or "
        "raise --beta"
    )
    return Finding("vanishing", layers, message)


# --- collapse ------------------------------------------------------------------------------------------------------


def _idle(record: Record, setting: Setting, history: Sequence[Record]) -> Finding | None:
    if "saturated" not in record:
        return None
    saturated, dead = np.asarray(record["saturated"]), np.asarray(record["dead"])
    if setting.batch_size < DEAD_IMAGES:
        dead = np.zeros_like(saturated)
    layers = _numbers(saturated + dead > LIMITS["idle"].value)
    if not layers:
        return None
    worst = int((saturated + dead).argmax())
    parts = {"units are saturated": saturated[worst], "channels are dead": dead[worst]}
    what = " and ".join(f"{share:.0%} of the {words}" for words, share in parts.items() if share >= 0.005)
    knob = _idle_remedy(record, setting, history, saturated[worst] > dead[worst] / 4)
    where = spans([worst + 1], setting.names)
    message = f"units do not respond: in {where} {what} ({spans(layers, setting.names)}); {knob}"
    return Finding("collapse", layers, message)


def _idle_remedy(record: Record, setting: Setting, history: Sequence[Record], high: bool) -> str:
    if _kappa(record) >= LIMITS["kappa"].value:
        return "lower --kappa, or --learning-rate"
    if history and _idle(history[0], setting, ()) is None:
        return "they did respond in the first epoch: lower --learning-rate"
    return "lower --gain, or --learning-rate" if high else "raise --gain, or lower --learning-rate"


def _falling(record: Record, history: Sequence[Record]) -> Finding | None:
    now, best = record.get("train_accuracy"), max(history, key=lambda r: r["train_accuracy"], default=None)
    if now is None or best is None or now >= LIMITS["accuracy"].value * best["train_accuracy"]:
        return None
    kappa = _kappa(record)
    cause = f" with kappa at {kappa:.2g}; lower --kappa" if kappa > 0 else "; lower --learning-rate"
    message = (
        f"the training accuracy fell from {best['train_accuracy']:.1%} in epoch {best['epoch']} to {now:.1%}{cause}"
    )
    return Finding("collapse", (), message)


def _kappa(record: Record) -> float:
    kappa = record.get("kappa") or 0.0
    return max(kappa) if isinstance(kappa, list) else kappa


# --- words ---------------------------------------------------------------------------------------------------------


def _numbers(found: np.ndarray) -> tuple[int, ...]:
    """Return the layers, counted from 1, that are `found`."""
    return tuple((np.flatnonzero(found) + 1).tolist())


def spans(layers: Sequence[int], names: Sequence[str] = ()) -> str:
    """Return ``layer 3``, ``layers 2-5`` or ``layers 1, 3-4``; with the `names` of nodes ``nodes a, b``."""
    if names:
        return f"node{'s' if len(layers) > 1 else ''} {', '.join(names[n - 1] for n in layers)}"
    found: list[list[int]] = []
    for n in layers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
