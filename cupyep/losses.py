"""Losses of a head's output z against a target: value a sample and gradient with respect to z.

Targets are arrays (N, classes): one-hot labels, a teacher's softened probabilities, or a teacher's logits.
"""

from __future__ import annotations

from typing import Any

from cupyep.backend import array_module
from cupyep.errors import choose, number


def log_softmax(z: Any) -> Any:
    """Return ``log(softmax(z))`` along the last axis."""
    xp = array_module(z)
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(z: Any, out: Any, column: Any) -> None:
    """Write ``softmax(z)`` along the last axis into `out`; `column` (N, 1) is scratch."""
    xp = array_module(z)
    xp.max(z, axis=-1, keepdims=True, out=column)
    xp.subtract(z, column, out=out)
    xp.exp(out, out=out)
    xp.sum(out, axis=-1, keepdims=True, out=column)
    out /= column


class CrossEntropy:
    """``T^2 * CE(target, softmax(z / T))``; the factor keeps gradients of one size over T (Hinton et al. 2015)."""

    name = "cross_entropy"

    def __init__(self, temperature: float = 1.0):
        self.temperature = number("temperature", temperature, above=0)

    def value(self, z: Any, target: Any) -> Any:
        """Return the loss a sample, shape (N,)."""
        return -(self.temperature**2) * (target * log_softmax(z / self.temperature)).sum(axis=-1)

    def gradient(self, z: Any, target: Any, out: Any, column: Any) -> None:
        """Write dL/dz ``= T (softmax(z / T) - target)`` into `out` (N, classes); `column` (N, 1) is scratch."""
        if self.temperature == 1.0:
            softmax(z, out, column)
            out -= target
            return
        array_module(z).multiply(z, 1 / self.temperature, out=out)
        softmax(out, out, column)
        out -= target
        out *= self.temperature

    def soften(self, logits: Any) -> Any:
        """Return the target for a teacher's raw logits: ``softmax(logits / T)``."""
        return array_module(logits).exp(log_softmax(logits / self.temperature))


class SquaredError:
    """``1/2 |z - target|^2``, summed over classes."""

    name = "squared_error"
    temperature = 1.0

    def value(self, z: Any, target: Any) -> Any:
        """Return the loss a sample, shape (N,)."""
        return 0.5 * ((z - target) ** 2).sum(axis=-1)

    def gradient(self, z: Any, target: Any, out: Any, column: Any) -> None:
        """Write dL/dz ``= z - target`` into `out`."""
        array_module(z).subtract(z, target, out=out)

    def soften(self, logits: Any) -> Any:
        """Return the target for a teacher's raw logits: the logits themselves."""
        return logits


LOSSES = (CrossEntropy.name, SquaredError.name)


def get_loss(name: str, temperature: float = 1.0) -> CrossEntropy | SquaredError:
    """Return the loss called ``cross_entropy`` or ``squared_error``."""
    choose("loss", name, LOSSES)
    return CrossEntropy(temperature) if name == CrossEntropy.name else SquaredError()
