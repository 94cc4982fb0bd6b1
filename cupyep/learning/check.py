"""How close EP's gradient is to the truth: layer by layer against BPTT from the same free state.

`compare_forms` says what a nudge form costs within one precision, `compare_precisions` what a precision costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupyep.augment import Augmenter
from cupyep.data.loader import Batch
from cupyep.dynamics import State
from cupyep.errors import DivergenceError
from cupyep.learning.bptt import ADJOINT_TOLERANCE, BackpropagationThroughTime
from cupyep.learning.equilibrium import FORMS, EquilibriumPropagation
from cupyep.learning.learner import StepResult
from cupyep.network import Network

Row = dict[str, Any]


def compare(estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return cosine, relative error ``|estimate - truth| / |truth|`` and sign agreement of two gradients.

    Sign agreement is the fraction of entries of equal sign, among those where the truth is not zero. A gradient that is
    zero throughout gives NaN.
    """
    a, b = np.asarray(estimate, np.float64).ravel(), np.asarray(truth, np.float64).ravel()
    # Scaled first: entries of 1e-20 must not underflow when squared.
    a_scale, b_scale = np.abs(a).max(initial=0), np.abs(b).max(initial=0)
    if b_scale == 0 or a_scale == 0:
        return {"cosine": np.nan, "relative_error": np.nan, "sign_agreement": np.nan}
    a_unit, b_unit = a / a_scale, b / b_scale
    cosine = a_unit @ b_unit / np.sqrt((a_unit @ a_unit) * (b_unit @ b_unit))
    error = np.linalg.norm((a - b) / b_scale) / np.linalg.norm(b_unit)
    known = b != 0
    return {
        "cosine": float(cosine),
        "relative_error": float(error),
        "sign_agreement": float((np.sign(a[known]) == np.sign(b[known])).mean()),
    }


def check_gradients(network: Network, x: Any, y: Any = None, *, nudge: str = "deviation", **settings: Any) -> list[Row]:
    """Compare the weight gradients of EP with those of BPTT from the same settled free state.

    Parameters
    ----------
    network, x, y, **settings
        See `compare_forms`.
    nudge : {"classical", "deviation"}

    Returns
    -------
    list of dict
        A row a weight, input side first: ``name``, ``cosine``, ``relative_error``, ``sign_agreement``,
        ``gradient_norm`` (of EP), ``nudge_response`` (mean |s+ - s-|; None for the readout).
    """
    return compare_forms(network, x, y, forms=(nudge,), **settings)[nudge]


def compare_forms(
    network: Network,
    x: Any,
    y: Any = None,
    *,
    forms: Sequence[str] = FORMS,
    beta: float = 0.05,
    free_steps: int = 60,
    nudged_steps: int = 20,
    scheme: str = "centered",
    schedule: str = "synchronous",
    unrolled_steps: int | None = None,
    tolerance: float | None = None,
    relaxation: float = 1.0,
    signals: Sequence[Augmenter] = (),
) -> dict[str, list[Row]]:
    """Compare several nudge forms of EP with BPTT, all from one settled free state.

    Parameters
    ----------
    network : Network
    x, y
        A `Batch`, or images (N, H, W, C) and labels (N,).
    forms : sequence of {"classical", "deviation"}
    beta, free_steps, nudged_steps, scheme, schedule, relaxation, signals
        See `EquilibriumPropagation`.
    unrolled_steps : int, optional
        Steps of BPTT. By default `nudged_steps` for the synchronous schedule, whose every step EP then mirrors
        (Ernoult et al. 2019), and for the others as many as change its gradient; see `bptt_gradients`.
    tolerance : float, optional
        End the free phase at this residual; EP's theorem asks for an equilibrium.

    Returns
    -------
    dict
        Form -> rows as `check_gradients` returns them.

    Raises
    ------
    DivergenceError
        See `bptt_gradients`.
    """
    batch = network.batch(x, y)
    if unrolled_steps is None and schedule == "synchronous":
        unrolled_steps = nudged_steps
    phases = {"schedule": schedule, "relaxation": relaxation}
    free = network.settle_free(batch, steps=free_steps, tolerance=tolerance, **phases).copy()
    truth = bptt_gradients(network, batch, free, signals, unrolled_steps)
    report = {}
    for form in forms:
        ep = EquilibriumPropagation(
            network, beta, free_steps, nudged_steps, scheme=scheme, nudge=form, signals=signals, **phases
        )
        report[form] = _rows(network, ep.step_from(batch, free), truth)
    return report


def bptt_gradients(
    network: Network,
    batch: Batch,
    free: State,
    signals: Sequence[Augmenter] = (),
    steps: int | None = None,
) -> dict[str, Any]:
    """Return the gradients of BPTT from a free state, over so many synchronous steps or as many as change them.

    Raises
    ------
    DivergenceError
        If they never stop changing, as at a state that is no stable equilibrium.
    """
    learner = BackpropagationThroughTime(network, unrolled_steps=steps or 1, signals=signals)
    if steps is not None:
        return learner.step_from(batch, free).gradients
    result, residual = learner.step_from_equilibrium(batch, free)
    if not residual <= ADJOINT_TOLERANCE:
        raise DivergenceError(
            "BPTT's gradient does not converge, the free state is no stable equilibrium; raise --free-steps, or lower "
            "--feedback or --gain"
        )
    return result.gradients


def compare_precisions(
    build: Callable[[str], tuple[Network, list[Augmenter]]],
    precision: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    betas: Sequence[float] = (0.05,),
    forms: Sequence[str] = FORMS,
    free_steps: int = 60,
    nudged_steps: int = 20,
    scheme: str = "centered",
    schedule: str = "synchronous",
    tolerance: float | None = None,
    relaxation: float = 1.0,
) -> dict[float, dict[str, list[Row]]]:
    """Compare EP in one precision with EP in float32 and with BPTT in float64.

    Parameters
    ----------
    build : callable
        Makes the network and its signals in the precision of the given name.
    precision : str
    images : array of shape (N, H, W, C)
    labels : array of shape (N,)
    betas : sequence of float
    forms, free_steps, nudged_steps, scheme, schedule, tolerance, relaxation
        See `compare_forms`.

    Returns
    -------
    dict
        Beta -> form -> rows as `check_gradients` returns them, and ``cosine_float32`` in each.

    Notes
    -----
    The network settles in its own precision, after over-relaxed updates by as many plain ones: rounded states flicker
    under the first and come to rest under the second. Its twins in float32 and float64 take up its parameters and its
    free state and settle on from there: three equilibria close to each other, where three cold starts might end in
    different ones. BPTT starts at that of float64.
    """
    network, signals = build(precision)
    how = {"steps": free_steps, "schedule": schedule, "tolerance": tolerance, "relaxation": relaxation}
    batch = network.batch(images, labels)
    free = network.settle_free(batch, **how).copy()
    if relaxation > 1:
        free = network.settle_free(batch, free, **how | {"relaxation": 1.0}).copy()
    single, double = (_Twin(*build(name), network, free, how, images, labels) for name in ("float32", "float64"))
    unrolled = nudged_steps if schedule == "synchronous" else None
    truth = bptt_gradients(double.network, double.batch, double.free, double.signals, unrolled)
    report: dict[float, dict[str, list[Row]]] = {}
    for beta in betas:
        report[beta] = {}
        for form in forms:
            settings = {"scheme": scheme, "nudge": form, "schedule": schedule, "relaxation": relaxation}
            own, other = (
                EquilibriumPropagation(each, beta, free_steps, nudged_steps, **settings, signals=their_signals)
                for each, their_signals in ((network, signals), (single.network, single.signals))
            )
            reference = other.step_from(single.batch, single.free).gradients
            report[beta][form] = _rows(network, own.step_from(batch, free), truth, reference)
    return report


class _Twin:
    """A network in another precision, with the parameters of the first, settled on from its free state."""

    def __init__(self, network, signals, other: Network, free: State, how: dict[str, Any], images, labels):
        host = other.device.to_numpy
        self.network, self.signals = network, signals
        network.load_parameters({path: host(array) for path, array in other.parameters().items()})
        start = State([network.device.asarray(host(s), network.precision.stored) for s in free.layers])
        self.batch = network.batch(images, labels)
        self.free = network.settle_free(self.batch, start, **how).copy()


def _rows(
    network: Network, estimate: StepResult, truth: dict[str, Any], reference: dict[str, Any] | None = None
) -> list[Row]:
    response = network.device.to_numpy(estimate.nudge_response)
    rows = []
    for path, gradient in estimate.gradients.items():
        if not path.endswith(".weight"):
            continue
        name = path.removesuffix(".weight")
        host = network.device.to_numpy(gradient)
        row = {"name": name, **compare(host, network.device.to_numpy(truth[path]))}
        if reference is not None:
            row["cosine_float32"] = compare(host, network.device.to_numpy(reference[path]))["cosine"]
        row["gradient_norm"] = float(np.linalg.norm(host.astype(np.float64)))
        row["nudge_response"] = float(response[int(name.split(".")[1]) - 1]) if name.startswith("layers.") else None
        rows.append(row)
    return rows
