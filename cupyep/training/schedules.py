"""The course of learning rates and of the signals' kappa over a training: functions of the fraction that is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cupyep.errors import number
from cupyep.learning.gradients import layer_of
from cupyep.optim import LR_SCHEDULES, Optimizer


class Schedules:
    """Sets what changes from step to step: the kappa of a learner's signals, the factor of an optimizer's rates.

    `lr_schedule` is a name of `LR_SCHEDULES`. In the `warmup` epochs the rates rise linearly: the factor is the
    schedule's, times that part of them which is over when a step is done. An epoch has so many `batches`.
    """

    def __init__(self, learner: Any, optimizer: Optimizer, lr_schedule: str, warmup: float = 0.0, batches: int = 1):
        self.signals = learner.signals
        self.optimizer = optimizer
        self.schedule = LR_SCHEDULES[lr_schedule]
        self.warmup = number("warmup", warmup, 0)
        self.step = 1 / batches

    def set(self, done: float, epochs: int, halvings: int = 0) -> float:
        """Set kappa where `done` of `epochs` are done; return the factor of the rates, halved `halvings` times."""
        progress = done / epochs
        for signal in self.signals:
            signal.anneal(progress)
        warm = min(1.0, (done + self.step) / self.warmup) if self.warmup else 1.0
        return self.schedule(progress) * warm * 0.5**halvings

    def values(self, done: float, epochs: int, halvings: int = 0) -> dict[str, Any]:
        """Return ``learning_rate`` and ``kappa`` where `done` of `epochs` are done, and set them.

        Each is one number, or, where they differ, a list: of rates one a layer (in the order of ``gradient_norm``), of
        kappas one a signal; None without signals.
        """
        factor = self.set(done, epochs, halvings)
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
