"""How close EP's gradient is to the truth: layer by layer against BPTT from the same free state.

`compare_forms` says what a nudge form costs within one precision, `compare_precisions` what a precision costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.batch import Batch
from cupyep.errors import DivergenceError, choose, instance, items
from cupyep.learning.bptt import ADJOINT_TOLERANCE, BackpropagationThroughTime
from cupyep.learning.custom import check_parts
from cupyep.learning.equilibrium import FORMS, EquilibriumPropagation
from cupyep.learning.gradients import layer_of
from cupyep.learning.learner import StepResult
from cupyep.network import Network
from cupyep.signals import Augmenter
from cupyep.state import State

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
        ``gradient_norm`` (of EP), ``nudge_response`` (mean |s+ - s-| of the layer; None for the readout).
    """
    return compare_forms(network, x, y, forms=(choose("nudge", nudge, FORMS),), **settings)[nudge]


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
    ConfigurationError
        If a signal, an activation or an edge of the user's own is not what it says: EP and BPTT share it and would
        agree on what is wrong. See `check_signal`, `check_activation` and `check_edge`.
    DivergenceError
        See `bptt_gradients`.
    """
    batch = instance("network", network, Network).labelled(x, y)
    signals = items("signals", signals, Augmenter)
    check_parts(network, signals, batch)
    if unrolled_steps is None and schedule == "synchronous":
        unrolled_steps = nudged_steps
    phases: dict[str, Any] = {"schedule": schedule, "relaxation": relaxation}
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
    network: Network, batch: Batch, free: State, signals: Sequence[Augmenter] = (), steps: int | None = None
) -> Mapping[str, Any]:
    """Return the gradients of BPTT from a free state, over so many synchronous steps or as many as change them.

    `DivergenceError` if they never stop changing, as at a state that is no stable equilibrium.
    """
    learner = BackpropagationThroughTime(network, unrolled_steps=1 if steps is None else steps, signals=signals)
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
    images: Any,
    labels: Any,
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
        Beta -> form -> rows as `check_gradients` returns them. ``cosine`` is with BPTT in float64, ``cosine_float32``
        with EP in float32, ``cosine_from_zeros`` that of a free state which the precision found by itself.

    Notes
    -----
    First what the precision holds: float32 settles from zeros, float64 and `precision` take up its parameters and its
    free state and settle on from there: three equilibria close to each other, where three cold starts might end in
    different ones. BPTT starts at that of float64. Then what it finds: `precision` settles from zeros, float32 on from
    there, and their gradients are compared. Rounded states flicker under over-relaxed updates and come to rest under
    plain ones: so they end with as many of these.
    """
    single, double, own = (_Side(*build(name), images, labels) for name in ("float32", "float64", precision))
    host = single.network.device.to_numpy
    parameters = {path: host(array) for path, array in single.network.parameters().items()}
    double.network.load_parameters(parameters)
    own.network.load_parameters(parameters)
    how = {"steps": free_steps, "schedule": schedule, "tolerance": tolerance, "relaxation": relaxation}
    rest = how | {"relaxation": min(relaxation, 1.0)}
    free = single.settle(None, **how)
    flickering = own.settle(None, **how | {"tolerance": None})
    held, found = own.settle(free, **rest), own.settle(flickering, **rest)
    beside = single.settle(found, **how)
    unrolled = nudged_steps if schedule == "synchronous" else None
    truth = bptt_gradients(double.network, double.batch, double.settle(free, **how), double.signals, unrolled)
    report: dict[float, dict[str, list[Row]]] = {}
    for beta in betas:
        report[beta] = {}
        for form in forms:
            phases = {"scheme": scheme, "nudge": form, "schedule": schedule, "relaxation": relaxation}
            settings = {"beta": beta, "free_steps": free_steps, "nudged_steps": nudged_steps, **phases}
            estimate = own.estimate(held, **settings)
            pairs = {
                "cosine_float32": (estimate, single.estimate(free, **settings)),
                "cosine_from_zeros": (own.estimate(found, **settings), single.estimate(beside, **settings)),
            }
            report[beta][form] = rows = _rows(own.network, estimate, truth)
            for row in rows:
                path = f"{row['name']}.weight"
                row |= {
                    key: compare(*(host(side.gradients[path]) for side in pair))["cosine"]
                    for key, pair in pairs.items()
                }
    return report


class _Side:
    """A network in one of the precisions compared, with its signals and the batch as it sees it."""

    def __init__(self, network: Network, signals: list[Augmenter], images: Any, labels: Any):
        self.network, self.signals = network, signals
        self.batch = network.batch(images, labels)

    def settle(self, start: State | None, **how: Any) -> State:
        """Return the free state, settled from zeros or on from that of any side."""
        network = self.network
        if start is not None:
            host, stored = network.device.to_numpy, network.precision.stored
            start = State([network.device.asarray(host(s), stored) for s in start.layers])
        return network.settle_free(self.batch, start, **how).copy()

    def estimate(self, free: State, **settings: Any) -> StepResult:
        """Return the gradients of EP from a free state of this side."""
        return EquilibriumPropagation(self.network, signals=self.signals, **settings).step_from(self.batch, free)


def _rows(network: Network, estimate: StepResult, truth: Mapping[str, Any]) -> list[Row]:
    response = network.device.to_numpy(estimate.nudge_response)
    rows, layers = [], [f"layers.{name}" for name in network.graph.names]
    for path, gradient in estimate.gradients.items():
        if not path.endswith(".weight"):
            continue
        name = path.removesuffix(".weight")
        host = network.device.to_numpy(gradient)
        row = {"name": name, **compare(host, network.device.to_numpy(truth[path]))}
        row["gradient_norm"] = float(np.linalg.norm(host.astype(np.float64)))
        layer = layer_of(path)  # of whatever connection into it
        row["nudge_response"] = float(response[layers.index(layer)]) if layer in layers else None
        rows.append(row)
    return rows
