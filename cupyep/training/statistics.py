"""What an epoch leaves behind: running sums on the device, read back only when someone looks.

Every number of a batch stays a device array until `EpochStatistics.read`; the training loop waits for the GPU only when
the progress bar refreshes and at the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.backend.device import Device
from cupyep.errors import CheckpointError
from cupyep.learning.gradients import Gradients, layer_of
from cupyep.training.divergence import WATCHED, check_finite, check_means

LEVELS = ("activity", "saturated", "dead")
OF_PHASES = {f"{phase}_{name}" for phase in ("free", "nudged") for name in ("residual", "unsettled")}


def layer_names(paths: Iterable[str]) -> list[str]:
    """Return the layers of the parameter `paths`, each once, in their order."""
    return list(dict.fromkeys(layer_of(path) for path in paths))


def means_of(result: Any, total: int | None = None) -> dict[str, Any]:
    """Return the statistics of a `StepResult` as arrays by name: means over its batch, and the number of correct ones.

    Of a part of a batch of `total` samples they are what it contributes to those of the batch.
    """
    means = {name: getattr(result, name) for name in ("loss", "correct", *LEVELS)}
    if result.nudge_response is not None:
        means["nudge_response"] = result.nudge_response
    for phase in ("free", "nudged"):
        stats = getattr(result, phase)
        if stats is not None:
            means[f"{phase}_residual"] = stats.measured.mean(axis=1)
            if stats.tolerance is not None:
                means[f"{phase}_unsettled"] = (stats.per_sample > stats.tolerance).mean(axis=1)
    if total is not None:
        for name in means.keys() & OF_PHASES:
            means[name] = means[name] * (result.count / total)
    return means


class EpochStatistics:
    """Running sums over the batches of one epoch; `layers` are `layer_names` of the gradients to come."""

    def __init__(self, device: Device, epoch: int, layers: Sequence[str]):
        self.device = device
        self.epoch = epoch
        self.layers = list(layers)
        self.count = 0
        self.batches = 0
        self._sums: dict[str, Any] = {}

    def add(self, result: Any) -> None:
        """Add one `StepResult` of a learner, weighted by its number of images."""
        self.add_means(means_of(result), result.gradients, result.count)

    def add_means(self, means: Mapping[str, Any], gradients: Gradients, count: int) -> None:
        """Add the statistics `means_of` a batch of `count` images, weighted by them, and the norms of its gradients."""
        xp = self.device.xp
        self.count += count
        self.batches += 1
        for name, value in {**means, "gradient_norm": gradients.norms()}.items():
            self._add(name, value if name == "correct" else value * count)
        # A sum that stopped being finite stays so: the number of batches after which it was finite gives the bad one.
        for name in WATCHED:
            if name in self._sums:
                self._add(f"finite_{name}", xp.isfinite(self._sums[name]) * 1)

    def _add(self, name: str, value: Any) -> None:
        if name in self._sums:
            before = self._sums[name]
            if before.shape != value.shape:
                raise CheckpointError(f"the sums of '{name}' were taken over another network")
            if isinstance(before, np.ndarray) and not isinstance(value, (np.ndarray, np.generic)):
                before = self.device.asarray(before)  # as loaded; with a tolerance residuals are on the host
            value = before + value
        self._sums[name] = value

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the sums, on the host, as `load_state_dict` takes them."""
        counts = {"count": np.asarray(self.count), "batches": np.asarray(self.batches)}
        return {**counts, **self._host_sums()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from the sums of `state`; KeyError or ValueError if these are none."""
        counts = [state[name] for name in ("count", "batches")]
        if not all(array.shape == () and array.dtype.kind in "iu" and array >= 1 for array in counts):
            raise ValueError("its batches are not counted")
        for name, array in state.items():
            if not np.isfinite(array).all() or (name.startswith("finite_") and array.dtype.kind not in "iu"):
                raise ValueError(f"its '{name}' is no sum of numbers")
        self.count, self.batches = map(int, counts)
        self._sums = {name: value for name, value in state.items() if name not in ("count", "batches")}

    def _host_sums(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(self.device.to_numpy(value)) for name, value in self._sums.items()}

    def read(self) -> dict[str, Any]:
        """Return the means so far, as plain numbers and lists by name.

        ``loss``, ``accuracy``; ``free_residual`` and ``nudged_residual`` (that of the worst layer; None where the
        algorithm has no such phase); lists with a number a layer (None likewise): both as ``free_residual_per_layer``
        and ``nudged_residual_per_layer``; where there is a tolerance ``free_unsettled`` and ``nudged_unsettled``, the
        fractions of samples above it; ``activity``, ``saturated``, ``dead``, ``nudge_response``, ``gradient_norm`` (of
        the readout, too).

        `DivergenceError` if the loss, a state, a gradient or another statistic stopped being finite; it names layer,
        epoch, batch (where it is known) and what to change.
        """
        host = self._host_sums()
        finite = {name: host.pop(f"finite_{name}") for name in WATCHED if name in host}
        check_finite(finite, self.batches, self.epoch, self.layers, _unrest(host))
        means = {name: (value / self.count).tolist() for name, value in host.items()}
        check_means(means, self.epoch, self.layers)
        # Learned maps of signals belong to no layer; their gradients are only looked at for being finite.
        norms = zip(self.layers, means["gradient_norm"], strict=True)
        residuals = {phase: means.get(f"{phase}_residual") for phase in ("free", "nudged")}
        return {
            "loss": means["loss"],
            "accuracy": means["correct"],
            **{f"{phase}_residual": residual and max(residual) for phase, residual in residuals.items()},
            **{f"{phase}_residual_per_layer": residual for phase, residual in residuals.items()},
            **{f"{phase}_unsettled": means.get(f"{phase}_unsettled") for phase in residuals},
            **{name: means[name] for name in LEVELS},
            "nudge_response": means.get("nudge_response"),
            "gradient_norm": [norm for layer, norm in norms if not layer.startswith("signals.")],
        }


def _unrest(sums: Mapping[str, np.ndarray]) -> float:
    """Return the largest free residual of a layer in terms of its activity; 0 where there is none, or it is unknown."""
    if "free_residual" not in sums:
        return 0.0
    parts = sums["free_residual"] / np.maximum(sums["activity"], np.finfo(np.float32).tiny)
    return float(np.nan_to_num(parts, nan=0.0, posinf=np.inf).max())
