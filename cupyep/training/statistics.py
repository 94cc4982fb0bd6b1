"""What an epoch leaves behind: running sums on the device, read back only when someone looks.

Every number of a batch stays a device array until `EpochStatistics.read`; the training loop waits for the GPU only when
the progress bar refreshes and at the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cupyep.backend.device import Device
from cupyep.errors import DivergenceError


def layer_of(path: str) -> str:
    """Return the layer that a parameter belongs to: ``layers.1.weight`` -> ``layers.1``."""
    return path.rpartition(".")[0]


def layer_names(paths: Iterable[str]) -> list[str]:
    """Return the layers of the parameter `paths`, each once, in their order."""
    return list(dict.fromkeys(layer_of(path) for path in paths))


def gradient_norms(gradients: Mapping[str, Any], xp: Any) -> Any:
    """Return the Euclidean norm of each layer's gradient (weight and bias together), in the order of `layer_names`."""
    squares: dict[str, Any] = {}
    for path, gradient in gradients.items():
        flat = gradient.reshape(-1)
        squares[layer_of(path)] = squares.get(layer_of(path), 0) + xp.dot(flat, flat)
    return xp.sqrt(xp.stack(list(squares.values())))


class EpochStatistics:
    """Running sums over the batches of one epoch.

    Parameters
    ----------
    device : Device
    epoch : int
        For the message when something stops being finite.
    """

    def __init__(self, device: Device, epoch: int):
        self.device = device
        self.epoch = epoch
        self.count = 0
        self._sums: dict[str, Any] = {}
        self._layers: list[str] = []

    def add(self, result: Any) -> None:
        """Add one `StepResult` of a learner, weighted by its number of images."""
        xp = self.device.xp
        norms = gradient_norms(result.gradients, xp)
        self._layers = layer_names(result.gradients)
        self.count += result.count
        self._add("loss", result.loss * result.count)
        self._add("correct", result.correct)
        self._add("gradient_norm", norms * result.count)
        self._add("activity", result.activity * result.count)
        if result.nudge_response is not None:
            self._add("nudge_response", result.nudge_response * result.count)
        for phase in ("free", "nudged"):
            stats = getattr(result, phase)
            if stats is not None:
                self._add(f"{phase}_residual", stats.residual * result.count)
        # A sum that stopped being finite stays so: the number of batches after which it was finite gives the bad one.
        self._add("batches", 1)
        self._add("finite_losses", (xp.isfinite(self._sums["loss"]) & xp.isfinite(self._sums["activity"]).all()) * 1)
        self._add("finite_gradients", xp.isfinite(self._sums["gradient_norm"]).all() * 1)

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> dict[str, Any]:
        """Return the means so far, as plain numbers and lists.

        Returns
        -------
        dict
            ``loss``, ``accuracy``; ``free_residual`` and ``nudged_residual`` (that of the worst layer; None where the
            algorithm has no such phase); a layer: ``activity``, ``nudge_response`` (None likewise), ``gradient_norm``.

        Raises
        ------
        DivergenceError
            If the loss or a gradient stopped being finite; names epoch, batch and what to change.
        """
        host = {
            name: np.asarray(self.device.to_numpy(value)) for name, value in self._sums.items() if name != "batches"
        }
        self._check_finite(int(host["finite_losses"]), int(host["finite_gradients"]))
        mean = {name: host[name] / self.count for name in host if not name.startswith("finite")}
        residual = {
            phase: float(mean[phase].max()) if phase in mean else None for phase in ("free_residual", "nudged_residual")
        }
        # Learned maps of signals belong to no layer; their gradients are only looked at for being finite.
        norms = zip(self._layers, mean["gradient_norm"].tolist(), strict=True)
        response = mean["nudge_response"].tolist() if "nudge_response" in mean else None
        return {
            "loss": float(mean["loss"]),
            "accuracy": float(mean["correct"]),
            **residual,
            "activity": mean["activity"].tolist(),
            "nudge_response": response,
            "gradient_norm": [norm for layer, norm in norms if not layer.startswith("signals.")],
        }

    def _check_finite(self, losses: int, gradients: int) -> None:
        finite = min(losses, gradients)
        if finite == self._sums["batches"]:
            return
        where = f"epoch {self.epoch}, batch {finite + 1}"
        if gradients < losses:
            raise DivergenceError(f"the gradient is not finite in {where}; lower --beta")
        knob = "--gain" if self.epoch == 1 and finite == 0 else "--learning-rate"
        raise DivergenceError(f"the loss is not finite in {where}; lower {knob}")
