"""Initialisation from data: layer-sequential unit variance (LSUV), Mishkin & Matas, arXiv 1511.06422."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cupyep.errors import ConfigurationError, integer, number


def lsuv(
    names: Iterable[str],
    drive: Callable[[str], Any],
    scale: Callable[[str, float], None],
    tolerance: float = 0.02,
    tries: int = 10,
) -> dict[str, float]:
    """Scale weights, node by node, until each node's drive has unit variance on one batch; return the factors.

    The nodes `names` come each after all that drive it. `drive` returns a node's drive (an array) on the batch, by the
    weights as they are by then; `scale` multiplies all weights into a node by a factor
    (`cupyep.weights.Parametrisation.scale`). The `tolerance` is of the standard deviation. A node may be scaled in so
    many `tries`; one is enough for a drive that is linear in the weights, without a bias.

    `ConfigurationError` if a drive is constant or not finite, or does not come to unit variance.
    """
    tolerance, tries = number("tolerance", tolerance, above=0), integer("tries", tries)
    return {name: _unit_drive(name, drive, scale, tolerance, tries) for name in names}


def _unit_drive(name: str, drive: Callable, scale: Callable, tolerance: float, tries: int) -> float:
    factor = 1.0
    for left in range(tries, -1, -1):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
            deviation = math.sqrt(float(drive(name).var(dtype=np.float64)))
        found = f"the drive of '{name}' has a standard deviation of {deviation:.3g} on this batch"
        if abs(deviation - 1) <= tolerance:
            return factor
        if not 0 < deviation < math.inf:
            raise ConfigurationError(f"{found}, and no scaling makes it 1; look for equal images, weights of 0 or NaN")
        if left:
            scale(name, 1 / deviation)
            factor /= deviation
    raise ConfigurationError(f"{found} after {tries} scalings, not 1; start with smaller biases, or allow more tries")
