"""The course of learning rates and of the signals' kappa over a training: functions of the fraction that is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cupyep.learning.gradients import layer_of
from cupyep.optim import LR_SCHEDULES, Optimizer


class Schedules:
    """Sets what changes from step to step: kappa of the learner's signals, and the rates of the optimizer."""

    def __init__(self, learner: Any, optimizer: Optimizer, lr_schedule: str):
        self.signals = learner.signals
        self.optimizer = optimizer
        self.schedule = LR_SCHEDULES[lr_schedule]

    def set(self, progress: float, halvings: int = 0) -> float:
        """Set kappa for `progress` in [0, 1); return the factor of the learning rates, halved `halvings` times."""
        for signal in self.signals:
            signal.anneal(progress)
        return self.schedule(progress) * 0.5**halvings

    def values(self, progress: float, halvings: int = 0) -> dict[str, Any]:
        """Return ``learning_rate`` and ``kappa`` at `progress`, and set them.

        Each is one number, or, where they differ, a list: of rates one a layer (in the order of ``gradient_norm``), of
        kappas one a signal; None without signals.
        """
        factor = self.set(progress, halvings)
        rates = {path: rate for path, rate in self.optimizer.rates.items() if not path.startswith("signals.")}
        by_layer = {layer_of(path): rate * factor for path, rate in rates.items()}
        return {
            "learning_rate": _one_or_list(by_layer.values()),
            "kappa": _one_or_list(signal.kappa for signal in self.signals),
        }


def _one_or_list(values: Iterable[float]) -> float | list[float] | None:
    """Return None for no value, the value if all are the same, else all of them."""
    values = list(values)
    if len(set(values)) > 1:
        return values
    return values[0] if values else None
