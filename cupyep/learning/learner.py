"""What every learner shares: parameters of network and signals, gradients by path, the result of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupyep.augment import Augmenter
from cupyep.data.loader import Batch
from cupyep.dynamics import Nudge
from cupyep.errors import choose, require
from cupyep.heads import LossTerm, accuracy_count
from cupyep.network import Network
from cupyep.settling import SCHEDULES, SettleStats

SATURATED = 0.99  # of the largest absolute value that the activation can take
DEAD = 1e-3


@dataclass
class StepResult:
    """Gradients and statistics of one batch.

    Attributes
    ----------
    gradients : dict
        Parameter path -> gradient of the batch mean of the loss, signals included; descend against it.
    loss : 0-d array
        Mean readout loss at the free state (at the last state for BPTT), without signals.
    correct : 0-d array of int
        Samples classified correctly there.
    count : int
        Samples in the batch.
    activity, saturated, dead : arrays of shape (L,)
        Of each layer: the mean absolute state; the fraction of units at the end of the activation's range (99 % of the
        largest absolute value or more); the fraction of channels that no image of the batch moves from zero (below
        0.001 everywhere).
    free, nudged : SettleStats or None
    nudge_response : array of shape (L,) or None
        Mean ``|s+ - s-|`` of each layer (``|s_beta - s*|`` one-sided; per unit of beta for the tangent).
    """

    gradients: dict[str, Any]
    loss: Any
    correct: Any
    count: int
    activity: Any
    saturated: Any
    dead: Any
    free: SettleStats | None = None
    nudged: SettleStats | None = None
    nudge_response: Any = None


class Learner:
    """Base of the three algorithms.

    Parameters
    ----------
    network : Network
    signals : sequence of Augmenter
    """

    def __init__(self, network: Network, signals: Sequence[Augmenter] = ()):
        self.network = network
        self.signals = [network.bind(signal) for signal in signals]
        self._paths: dict[int, str] = {id(network.readout): "readout"}
        for index, signal in enumerate(self.signals):
            for layer in signal.layers:
                self._paths[id(signal.term(layer))] = f"signals.{index}.layer{layer}"

    def parameters(self) -> dict[str, Any]:
        """Return all trained arrays by path: the network's, and learned maps as ``signals.0.layer3.weight``."""
        learned = {
            f"signals.{index}.{name}": array
            for index, signal in enumerate(self.signals)
            for name, array in signal.parameters().items()
        }
        return self.network.parameters() | learned

    def step(self, x: Any, targets: Any = None) -> StepResult:
        """Return gradients and statistics for a `Batch`, or for images (N, H, W, C) and labels (N,)."""
        return self._step(self.network.batch(x, targets))

    def _step(self, batch: Batch) -> StepResult:
        raise NotImplementedError

    def scores(self, batch: Batch) -> Any:
        """Return the readout's output (N, classes) as this algorithm predicts."""
        raise NotImplementedError

    def evaluate(self, x: Any, targets: Any = None) -> tuple[Any, Any]:
        """Return the summed readout loss and the number of correct samples, 0-d arrays."""
        batch = self.network.batch(x, targets)
        return self._judge(self.scores(batch), batch)

    def _judge(self, scores: Any, batch: Batch) -> tuple[Any, Any]:
        network = self.network
        loss = network.readout.criterion.value(scores, network.targets(batch.labels)).sum()
        return loss, accuracy_count(scores, network.device.asarray(batch.labels))

    def _result(
        self, gradients: dict[str, Any], top: Any, layers: Sequence[Any], batch: Batch, **more: Any
    ) -> StepResult:
        loss, correct = self._judge(self.network.readout.output(top), batch)
        return StepResult(gradients, loss / len(batch), correct, len(batch), *self._levels(layers), **more)

    def _levels(self, layers: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Return `StepResult.activity`, `saturated` and `dead` of the states `layers`."""
        xp, activation = self.network.device.xp, self.network.activation
        top = SATURATED * max(abs(activation.low), abs(activation.high))
        activity, saturated, dead = [], [], []
        for s in layers:
            size = xp.abs(s)
            activity.append(size.mean())
            saturated.append((size >= top).mean())
            dead.append((size.reshape(-1, s.shape[-1]).max(axis=0) <= DEAD).mean())
        return xp.stack(activity), xp.stack(saturated), xp.stack(dead)

    def _zero_gradients(self) -> dict[str, Any]:
        xp = self.network.device.xp
        return {path: xp.zeros_like(array) for path, array in self.parameters().items()}

    def _add_edge(self, gradients: dict[str, Any], n: int, below: Any, above: Any, winners: Any, ops: Any, bias=True):
        """Add ``corr(below, U_n(above))`` to edge n's gradient (and the sum of ``U_n(above)`` to its bias')."""
        path = f"layers.{n}"
        bias = gradients[f"{path}.bias"] if bias else None
        self.network.layers[n - 1].add_gradient(below, above, winners, gradients[f"{path}.weight"], bias, ops)

    def _add_terms(self, gradients: dict[str, Any], nudges: Sequence[Nudge], states: Any, share: float) -> None:
        """Add the direct derivative of the loss for readout and learned maps, batch mean times `share`.

        `states` maps a layer to its state (N, *shape).
        """
        network = self.network
        for term, weight, target in nudges:
            if not term.parameters():
                continue
            state = states(term.layer)
            scale = network.device.xp.full(len(state), share * weight / len(state), network.dtype)
            term.add_parameter_gradient(state, target, scale, self._of(term, gradients))

    def _of(self, term: LossTerm, gradients: dict[str, Any]) -> dict[str, Any]:
        path = self._paths[id(term)]
        return {name: gradients[f"{path}.{name}"] for name in term.parameters()}


def checked_settling(schedule: str, steps: dict[str, int]) -> str:
    """Return `schedule`, after checking it and the numbers of steps: learners fail when made, not when used."""

    for name, value in steps.items():
        require(int(value) == value and value >= 1, f"{name} must be a positive integer, not {value}")
    return choose("schedule", schedule, SCHEDULES)
