"""How close EP's gradient is to the truth: layer by layer against BPTT unrolled from the same free state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.augment import Augmenter
from cupyep.learning.bptt import BackpropagationThroughTime
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
    signals: Sequence[Augmenter] = (),
) -> dict[str, list[Row]]:
    """Compare several nudge forms of EP with BPTT, all from one settled free state.

    Parameters
    ----------
    network : Network
    x, y
        A `Batch`, or images (N, H, W, C) and labels (N,).
    forms : sequence of {"classical", "deviation"}
    beta, free_steps, nudged_steps, scheme, schedule, signals
        See `EquilibriumPropagation`.
    unrolled_steps : int, optional
        Steps of BPTT. By default `nudged_steps` for the synchronous schedule, whose every step EP then mirrors
        (Ernoult et al. 2019), and for the others enough for an error to cross the network twice, up and down.
    tolerance : float, optional
        End the free phase at this residual; EP's theorem asks for an equilibrium.

    Returns
    -------
    dict
        Form -> rows as `check_gradients` returns them.
    """
    batch = network.batch(x, y)
    if unrolled_steps is None:
        unrolled_steps = nudged_steps if schedule == "synchronous" else max(nudged_steps, 4 * network.depth)
    free = network.settle_free(batch, steps=free_steps, schedule=schedule, tolerance=tolerance).copy()
    bptt = BackpropagationThroughTime(network, free_steps, unrolled_steps, schedule=schedule, signals=signals)
    truth = bptt.step_from(batch, free).gradients
    report = {}
    for form in forms:
        ep = EquilibriumPropagation(
            network, beta, free_steps, nudged_steps, scheme=scheme, nudge=form, schedule=schedule, signals=signals
        )
        report[form] = _rows(network, ep.step_from(batch, free), truth)
    return report


def _rows(network: Network, estimate: StepResult, truth: dict[str, Any]) -> list[Row]:
    response = network.device.to_numpy(estimate.nudge_response)
    rows = []
    for path, gradient in estimate.gradients.items():
        if not path.endswith(".weight"):
            continue
        name = path.removesuffix(".weight")
        host = network.device.to_numpy(gradient)
        row = {"name": name, **compare(host, network.device.to_numpy(truth[path]))}
        row["gradient_norm"] = float(np.linalg.norm(host.astype(np.float64)))
        row["nudge_response"] = float(response[int(name.split(".")[1]) - 1]) if name.startswith("layers.") else None
        rows.append(row)
    return rows
