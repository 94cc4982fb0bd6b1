"""What every learner shares: parameters of network and signals, gradients by path, the result of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cupyep.backend.threads import Turns, number_for
from cupyep.batch import Batch
from cupyep.errors import instance, integer, items, require
from cupyep.heads import LossTerm, Nudge, accuracy_count
from cupyep.learning.gradients import Gradients, packed_size
from cupyep.memory.layout import Layout
from cupyep.memory.workspace import Needs
from cupyep.network import Network
from cupyep.ops.conv import chunked
from cupyep.ops.reduction import levels
from cupyep.settling import SettleStats
from cupyep.showing import Shown
from cupyep.signals import Augmenter
from cupyep.state import State
from cupyep.structure import exclusive

SATURATED = 0.99  # of the largest absolute value that the activation can take
DEAD = 1e-3
ADDED_AT_ONCE = 1 << 19  # numbers of a part's gradients, before the next part may add its own to the same


@dataclass(repr=False)
class StepResult(Shown):
    """Gradients and statistics of one batch.

    Attributes
    ----------
    gradients : Gradients
        Parameter path -> gradient of the batch mean of the loss, signals included; descend against it. All of them also
        as one array, `Gradients.packed`. The arrays are the learner's, valid until its next step.
    loss : 0-d array
        Mean readout loss at the free state (at the last state for BPTT), without signals.
    correct : 0-d array of int
        Samples classified correctly there.
    count : int
        Samples in the batch.
    activity, saturated, dead : arrays of shape (L,)
        Of each layer: the mean absolute state; the fraction of units at the end of the activation's range (99 % of the
        largest absolute value or more); the fraction of channels that no image of the batch moves from zero (below
        0.001 everywhere; with micro-batches, no image of a part, and the mean over the parts).
    free, nudged : SettleStats or None
    nudge_response : array of shape (L,) or None
        Mean ``|s+ - s-|`` of each layer (``|s_beta - s*|`` one-sided; per unit of beta for the tangent).
    """

    gradients: Gradients
    loss: Any
    correct: Any
    count: int
    activity: Any
    saturated: Any
    dead: Any
    free: SettleStats | None = None
    nudged: SettleStats | None = None
    nudge_response: Any = None

    def facts(self) -> dict[str, str]:
        phases = {"free": self.free, "nudged": self.nudged}
        ended = {f"{name} phase": ", ".join(f"{key} {text}" for key, text in stats.facts().items())
                 for name, stats in phases.items() if stats is not None}  # fmt: skip
        right = {"correct": f"{int(self.correct)} of {self.count}"}
        return {"loss": f"{float(self.loss):.4f}", **right, **ended, "gradients": f"{len(self.gradients)} arrays"}


class Learner(Shown):
    """Base of the three algorithms.

    Parameters
    ----------
    network : Network
    signals : sequence of Augmenter
        Each once.
    micro_batch : int, optional
        Process a batch in equal parts of at most so many samples, one after the other, to save memory. Gradients and
        statistics are those of the whole batch (with a tolerance, each part stops by itself).
    """

    takes_slopes = True  # whether a step asks for the derivative of the activation
    derives_maps = False  # whether terms make something of their maps for it

    def __init__(self, network: Network, signals: Sequence[Augmenter] = (), micro_batch: int | None = None):
        self.network = instance("network", network, Network)
        self.micro_batch = None if micro_batch is None else integer("micro_batch", micro_batch)
        given = items("signals", signals, Augmenter)
        require(len({id(signal) for signal in given}) == len(given), "a signal is given twice; raise its kappa instead")
        self.signals = [network.bind(signal) for signal in given]
        self._gradients: dict[int, Gradients] = {}  # 0: of a batch; n: of the part that thread n - 1 has in hand
        # By what the gradients of each node are multiplied when all parts of a batch are in, the same for all. The
        # states must not be: halves might not hold them then.
        self._factors = [1.0] * network.depth

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_gradients": {}}

    def _settle_by(
        self, free_steps: int | None, schedule: str | None, tolerance: float | None, relaxation: float | None
    ) -> None:
        """Take up how phases settle, for algorithms that have some; as the network does where that is None."""
        self.free_steps, self.schedule, self.relaxation = self.network.settles(free_steps, schedule, relaxation)
        self.tolerance = tolerance

    def _how(self, steps: int, retain: str = "states") -> dict[str, Any]:
        """Return how a phase settles: the arguments of `Network.settle_free`."""
        shared = {"schedule": self.schedule, "tolerance": self.tolerance, "relaxation": self.relaxation}
        return {"steps": steps, "retain": retain, **shared}

    def facts(self) -> dict[str, str]:
        size = f"{len(self.network.layers)} layers, {sum(p.size for p in self.parameters().values()):,} parameters"
        names = ("beta", "scheme", "nudge", "schedule", "free_steps", "unrolled_steps", "nudged_steps", "tolerance")
        values = {name: getattr(self, name, None) for name in names}
        signals = [type(signal).__name__ for signal in self.signals]
        shown = {name.replace("_", " "): str(value) for name, value in values.items() if value is not None}
        return {"network": size, **shown, **({"signals": ", ".join(signals)} if signals else {})}

    def parameters(self) -> dict[str, Any]:
        """Return all trained arrays by path: the network's, and learned maps as ``signals.0.layer3.weight``."""
        learned = {
            f"signals.{index}.{name}": array
            for index, signal in enumerate(self.signals)
            for name, array in signal.parameters().items()
        }
        return self.network.parameters() | learned

    @exclusive
    def step(self, x: Any, targets: Any = None, total: int | None = None) -> StepResult:
        """Return gradients and statistics for a `Batch`, or for images (N, H, W, C) and labels (N,).

        Where these are a part of a batch of `total` samples, they are what the part contributes to the batch's.
        """
        batch = self._placed(x, targets)
        samples = len(batch.images)
        total = samples if total is None else integer("total", total, samples)
        gradients, draw = self._zero_gradients(), self._draw()
        on_gpu = self.network.device.is_gpu
        pieces = [] if on_gpu else chunked(len(gradients.packed), ADDED_AT_ONCE)

        def add(part: Batch, number: int, turns: Turns) -> StepResult:
            own = gradients if on_gpu or number == 0 else self._zero_gradients(number_for(self.network) + 1)
            result = self._add(own, part, total, draw)
            for stage, (piece, _) in enumerate(pieces):  # the next part is a piece behind
                with turns.turn(number, stage):
                    if own is not gradients:
                        gradients.packed[piece] += own.packed[piece]
            return result

        result = _sum(self.network.run_parts(batch, add, self.micro_batch))
        result.gradients = gradients
        self._finish(gradients)
        return result

    def _draw(self) -> Any:
        """Return what all parts of a batch must have in common."""

    def _placed(self, x: Any, targets: Any) -> Batch:
        return self.network.labelled(x, targets).placed(self.network.device)

    def parts(self, samples: int) -> list[slice]:
        """Return the rows of a batch that are processed together: see `Network.parts`."""
        return self.network.parts(samples, self.micro_batch)

    def _add(self, gradients: Gradients, part: Batch, total: int, draw: Any) -> StepResult:
        """Add the gradients of one of the parts that make a batch of `total` samples.

        Loss, activity and response of the result are what the part contributes to the batch's.
        """
        raise NotImplementedError

    def needs(self, samples: int, nudges: Sequence[Nudge]) -> Needs:
        """Return what a step with a part of so many samples, nudged by `nudges`, needs of the network's memory."""
        raise NotImplementedError

    @property
    def gradient_size(self) -> int:
        """The numbers of the gradients of all parameters, packed."""
        return packed_size({path: array.shape for path, array in self.parameters().items()})

    def settled(self, batch: Batch) -> State:
        """Return the state whose readout loss this algorithm lowers, and from which it predicts."""
        raise NotImplementedError

    @exclusive
    def scores(self, batch: Batch) -> Any:
        """Return the readout's output (N, classes) at the state `settled`."""
        batch = self.network.batch(batch)
        parts = self.network.run_parts(batch, lambda part, *_: self._scores(part).copy(), self.micro_batch)
        return self.network.device.xp.concatenate(parts)

    def _scores(self, part: Batch) -> Any:
        return self.network.outputs(self.settled(part).layers[-1])

    @exclusive
    def evaluate(self, x: Any, targets: Any = None) -> tuple[Any, Any]:
        """Return the summed readout loss and the number of correct samples, 0-d arrays."""
        batch = self._placed(x, targets)
        figures = self.network.run_parts(
            batch, lambda part, *_: self._judge(self._scores(part), part), self.micro_batch
        )
        loss, correct = figures[0]
        for more_loss, more_correct in figures[1:]:
            loss, correct = loss + more_loss, correct + more_correct
        return loss, correct

    def judge(self, scores: Any, batch: Batch) -> tuple[Any, Any]:
        """Return what `evaluate` does of a batch whose `scores` are known: nothing is settled."""
        return self._judge(scores, self._placed(batch, None))

    def _judge(self, scores: Any, batch: Batch) -> tuple[Any, Any]:
        network = self.network
        loss = network.readout.criterion.value(scores, network.targets(batch)).sum()
        return loss, accuracy_count(scores, network.device.asarray(batch.nearest_labels))

    def _figures(self, layers: Sequence[Any], batch: Batch, total: int, work: Sequence[Any] | None) -> dict[str, Any]:
        """Return loss, correct samples, count and levels at some states, as shares of a batch of `total` samples.

        `work` is an array for each layer.
        """
        loss, correct = self._judge(self.network.outputs(layers[-1]), batch)
        xp, share, activation = self.network.device.xp, len(batch) / total, self.network.activation
        top = SATURATED * max(abs(activation.low), abs(activation.high))
        figures = xp.empty((len(layers), 3), self.network.dtype)
        for n, s in enumerate(layers):
            levels(s, top, DEAD, figures[n], xp.empty(s.shape, self.network.dtype) if work is None else work[n])
        figures *= share
        names = ("activity", "saturated", "dead")
        return {
            "loss": loss / total,
            "correct": correct,
            "count": len(batch),
            **{name: figures[:, i] for i, name in enumerate(names)},
        }

    def _zero_gradients(self, number: int = 0) -> Gradients:
        """Return gradients that are zero: those of a batch, or with a `number` from 1 on those of a worker's part."""
        shapes = {path: array.shape for path, array in self.parameters().items()}
        if number not in self._gradients or self._gradients[number].shapes != shapes:
            network = self.network
            self._gradients[number] = Gradients(network.device.xp.zeros(packed_size(shapes), network.dtype), shapes)
        self._gradients[number].packed[...] = 0
        return self._gradients[number]

    def _finish(self, gradients: Gradients) -> None:
        """Multiply the gradients of edges, sums so far, by their factors; make those of what is trained of them."""
        graph = self.network.graph
        gradients.scale(dict(zip((f"layers.{name}" for name in graph.names), self._factors, strict=True)))
        for path, edge in zip(graph.paths, graph.edges, strict=True):
            edge.pull_back({name: gradients[f"{path}.{name}"] for name in edge.parameters()})

    def _add_terms(
        self,
        gradients: Gradients,
        nudges: Sequence[Nudge],
        states: Callable[[int], Any],
        share: float,
        total: int,
        scratch: Any,
    ) -> None:
        """Add the direct derivative of the loss for readout and learned maps, its sum times ``share / total``.

        `states` maps a layer to its state (N, *shape).
        """
        network = self.network
        for term, weight, target in nudges:
            if not term.parameters():
                continue
            state, rest = self._wide(states(term.layer), scratch)
            scale = network.device.xp.full(len(state), share * weight / total, network.dtype)
            term.add_parameter_gradient(state, target, scale, self._of(term, gradients), rest)

    def _loss_scale(self, nudges: Sequence[Nudge]) -> float:
        """Return by what to multiply dL/ds, of single samples, so that it can be stored."""
        return self.network.precision.scale(max(abs(weight) for _, weight, _ in nudges))

    def _add_loss_gradient(
        self, nudges: Sequence[Nudge], layers: Sequence[Any], n: int, scale: float, mu: Any, scratch: Any
    ) -> None:
        """Add dL/ds^n of single samples times `scale` to `mu`."""
        for term, weight, target in nudges:
            if term.layer == n:
                factor = self.network.device.xp.full(len(mu), scale * weight, mu.dtype)
                state, rest = self._wide(layers[n - 1], scratch)
                term.add_force(state, target, factor, mu, rest)

    def _wide(self, s: Any, scratch: Any) -> tuple[Any, Any]:
        """Return a state in the type to compute in, a copy of halves at the start of `scratch`; and what is left."""
        if s.dtype == self.network.dtype:
            return s, scratch
        copy = scratch[: s.size].reshape(s.shape)
        copy[...] = s
        return copy, scratch[s.size :]

    def _as_factor(self, array: Any, copy: Any) -> Any:
        """Return an array as products take it: itself, or rounded to halves, in `copy`."""
        if array.dtype == self.network.precision.stored:
            return array
        copy[...] = array
        return copy

    def _of(self, term: LossTerm, gradients: Gradients) -> dict[str, Any]:
        paths = {id(self.network.readout): "readout"}
        for index, signal in enumerate(self.signals):
            paths |= {id(signal.term(layer)): f"signals.{index}.layer{layer}" for layer in signal.layers}
        path = paths[id(term)]
        return {name: gradients[f"{path}.{name}"] for name in term.parameters()}


def _sum(parts: Sequence[StepResult]) -> StepResult:
    """Return the result of a batch from those of its parts."""
    whole = parts[0]
    for part in parts[1:]:
        for name in ("loss", "correct", "count", "activity", "saturated", "dead", "nudge_response"):
            value = getattr(part, name)
            setattr(whole, name, None if value is None else getattr(whole, name) + value)
        for name in ("free", "nudged"):
            stats = getattr(part, name)
            if stats is not None:
                phases = stats.measured.shape[1] // part.count
                setattr(whole, name, getattr(whole, name).joined(stats, phases))
    return whole


def term_scratch_size(layout: Layout, nudges: Sequence[Nudge], samples: int) -> int:
    """Return the elements of scratch for the force or the parameter gradient of one term at a time."""
    sizes = (
        layout.copied(term.layer, samples) + max(term.scratch_size(samples), term.gradient_scratch_size(samples))
        for term, *_ in nudges
    )
    return max(sizes, default=0)
