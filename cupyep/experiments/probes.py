"""Gradients looked at: EP against BPTT and BP, on a network as it is or as a training left it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cupyep.batch import Batch
from cupyep.data import Loader
from cupyep.errors import DivergenceError
from cupyep.learning import Backpropagation, EquilibriumPropagation
from cupyep.learning.check import bptt_gradients, compare
from cupyep.network import Network
from cupyep.phases import State
from cupyep.training.build import build_dataset
from cupyep.training.config import TrainConfig, default_relaxation

PROBE_IMAGES = 32
SETTLE = 300  # iterations before gradients are compared


def first_images(config: TrainConfig, network: Network) -> Batch:
    """Return the first training images, as they are."""
    dataset = build_dataset(replace(config, limit_test=1))
    return next(iter(Loader(dataset, "train", PROBE_IMAGES, network.device, network.dtype)))


def cosines(network: Network, config: TrainConfig) -> dict[str, Any]:
    """Return `gradient_cosines` on the first training images; nothing for an algorithm other than EP."""
    if config.algorithm != "ep":
        return {}
    return gradient_cosines(network, first_images(config, network), config)


def gradient_cosines(network: Network, batch: Batch, config: TrainConfig) -> dict[str, list[float | None]]:
    """Return the cosines of EP's weight gradients with BPTT's, from the same free state, and with BP's, a layer each.

    EP as `config` says, from a state that is settled well: a comparison of gradients where nothing is at rest says
    little. Where no stable equilibrium is found, there is no cosine with BPTT.
    """
    ep = EquilibriumPropagation(
        network,
        config.beta,
        config.free_steps,
        config.nudged_steps,
        scheme=config.scheme,
        nudge=config.nudge,
        schedule=config.schedule,
        relaxation=config.relaxation,
    )
    well = {"schedule": "evenodd", "relaxation": default_relaxation(replace(config, schedule="evenodd"))}
    free = ep.settle_free(batch, steps=SETTLE, tolerance=None, **well).copy()
    estimate = ep.step_from(batch, free).gradients
    estimate = {path: network.device.to_numpy(g).copy() for path, g in estimate.items() if path.endswith(".weight")}
    return {
        "bptt": _cosines(network, estimate, _bptt(network, batch, free)),
        "bp": _cosines(network, estimate, Backpropagation(network).step(batch).gradients),
    }


def _bptt(network: Network, batch: Batch, free: State) -> dict[str, Any] | None:
    try:
        return bptt_gradients(network, batch, free)
    except DivergenceError:
        return None


def _cosines(network: Network, estimate: Mapping[str, Any], truth: Mapping[str, Any] | None) -> list[float | None]:
    if truth is None:
        return [None] * len(estimate)
    return [_finite(compare(found, network.device.to_numpy(truth[path]))["cosine"]) for path, found in estimate.items()]


def _finite(number: float) -> float | None:
    return float(f"{number:.5g}") if math.isfinite(number) else None
