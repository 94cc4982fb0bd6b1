"""The network: what is there (`cupyep.structure`) settles, and predicts from the settled state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cupyep import errors
from cupyep.backend import Device, get_device
from cupyep.batch import Batch, checked_images, checked_labels
from cupyep.errors import choose, flag, integer, is_number, items, number, require
from cupyep.heads import Nudge, ranked
from cupyep.memory.layout import PhaseBuffers, PhaseShape, TermShape
from cupyep.persistence.network_file import describe, read_network, write_network
from cupyep.phases import Classical, Deviation, Phase
from cupyep.settling import check_betas, check_settling, reads_start, settle, watched
from cupyep.signals import Augmenter
from cupyep.state import State, joined
from cupyep.structure import Structure, exclusive

NUDGES = ("classical", "deviation", "tangent")
RETAINED = ("states", "drives", "both")


class Network(Structure):
    """A deep convergent recurrent network.

    Parameters
    ----------
    layers : sequence of Edge, sequence of Connection, or Graph
        A chain of edges (`Conv2d`, `Linear`, `Identity`), each taking the shape that the one before gives, or edges
        with the names of the nodes that they connect (`cupyep.graph`). With ``loss="squared_error"`` the last must be
        a `Linear` to `classes` units.
    classes : int
    activation : str or Activation
    loss : {"cross_entropy", "squared_error"}
        ``cross_entropy``: softmax readout ``w_o s^L + b_o``, not part of the state. ``squared_error``: the output layer
        is the last state.
    feedback : float
        Weight lambda of the top-down input, 0 < lambda <= 1; 1 is the Hopfield network of the papers.
    gain : float or sequence of float
        Weights are drawn from N(0, gain^2 / fan_in), one gain or one for each edge.
    weights : {"plain", "standardized", "standardized-fixed"}
        How weights are made of what is trained: themselves, or standardized filter by filter with a gain of each
        channel that is trained or fixed, `gain` at the start (`cupyep.weights`).
    seed : int
        Of the weights.
    device : str or Device
    precision : {"float32", "tf32", "float16", "bfloat16", "float64"}
        Of states and products; parameters are float32 in all but float64 (`cupyep.backend.precision`).
    readout_pool : int or "global", optional
        The softmax readout sees averages of the last map over windows of that side, or of all of it (a square one).
    exact : bool
        Let every unit be a direct sum of products: slower than Winograd's, which a CPU takes in float32, with a tenth
        of its rounding. For nudges so weak that states in classical form hardly differ.

    Raises
    ------
    ConfigurationError
        If shapes do not fit, a value is out of range, or another network has one of the edges.

    Notes
    -----
    Threads may share a network: they take turns, for its memory is one. To use many cores give each process a network;
    networks and learners are pickled without that memory, their device by its name.
    """

    def describe(self) -> dict[str, Any]:
        """Return what this network is, parameters aside: see `cupyep.persistence.network_file.describe`."""
        return describe(self)

    def save(self, path: str | Path) -> None:
        """Write structure and parameters to one HDF5 file: for its form and the errors see `cupyep.persistence`."""
        write_network(errors.path("path", path), self)

    @classmethod
    def load(cls, path: str | Path, device: str | Device = "auto") -> Network:
        """Return the network that `save` wrote to `path`; see `cupyep.persistence.network_file` for the errors."""
        return read_network(errors.path("path", path), functools.partial(cls, device=get_device(device)))

    def batch(self, x: Any, targets: Any = None) -> Batch:
        """Return images, or a `Batch`, as a checked `Batch` on the device: the gate of every entry.

        Parameters
        ----------
        x : array of float, shape (N, H, W, C), or Batch
            Normalised images. Their values are looked at once: what this returns can be passed on without another look.
        targets : array of int, shape (N,), or Batch, optional
            Labels, instead of those of `x`.

        Raises
        ------
        ConfigurationError
            If images are not finite floats of this network's shape, or labels not as many integers from 0 to
            ``classes - 1``.
        """
        self.device.use()  # another network may have used another GPU, or another thread this one
        batch = x if isinstance(x, Batch) else Batch(x, None)
        if isinstance(targets, Batch):
            batch = replace(targets, images=batch.images, checked=batch.checked)
        elif targets is not None:
            batch = replace(batch, labels=targets)
        stored = self.precision.stored
        images = checked_images(batch.images, self.input_shape, stored, values=not batch.checked)
        labels = batch.labels
        if labels is not None:
            labels = checked_labels(labels, len(images), self.classes)
        images = self.device.xp.ascontiguousarray(self.device.asarray(images, stored))
        return replace(batch, images=images, labels=labels, checked=True)

    def labelled(self, x: Any, targets: Any = None) -> Batch:
        """Return what `batch` does, with labels: those that learn and judge need them."""
        batch = self.batch(x, targets)
        require(batch.labels is not None, "targets are missing: give labels with the images, or a Batch that has them")
        return batch

    def nudges(self, batch: Batch, signals: Sequence[Augmenter] = ()) -> list[Nudge]:
        """Return the summands of the nudging loss: the readout's with weight 1, the signals' with their kappa."""
        require(batch.labels is not None, "a nudge needs targets (labels)")
        readout = Nudge(self.readout, 1.0, self.targets(batch))
        with self.effective.lock, self.memory.at_work(False):  # a signal that looks up targets need not know of this
            return [readout, *(nudge for signal in signals for nudge in self.bind(signal).nudges(batch))]

    def targets(self, batch: Batch) -> Any:
        """Return the labels of a batch as the readout's target, one-hot rows (N, classes) on the device."""
        return batch.one_hot(self.classes, self.dtype, self.device)

    def bind(self, signal: Augmenter) -> Augmenter:
        """Fit a signal to this network's layers (once) and return it.

        Raises
        ------
        ConfigurationError
            If a layer does not exist, or the signal is that of another network: its maps would be drawn anew.
        """
        require(
            signal.network in (None, self),
            f"this {type(signal).__name__} belongs to another network, whose maps it holds: make one for each network",
        )
        if signal.network is None:
            self.device.use()
            signal.layers = [self.graph.node(layer) for layer in signal.layers]
            signal.bind(self.state_shapes, self.classes, self.device, self.dtype)
            for layer in signal.layers:
                signal.term(layer).prepare(self.precision)
            signal.network = self
        return signal

    @exclusive
    def settle(
        self,
        x: Any,
        start: State | None = None,
        *,
        steps: int | None = None,
        schedule: str | None = None,
        tolerance: float | None = None,
        relaxation: float | None = None,
        check_every: int = 10,
        targets: Any = None,
        beta: float | Sequence[float] = 0.0,
        nudge: str = "classical",
        signals: Sequence[Augmenter] = (),
        record: bool = False,
        copy: bool = True,
    ) -> State:
        """Settle the free phase, or nudged phases from a free state.

        Parameters
        ----------
        x : array of shape (N, H, W, C), or Batch
        start : State, optional
            Where to start, zeros otherwise. Nudged phases start at the free state.
        steps, schedule, tolerance, relaxation, check_every, record
            See `cupyep.settling.settle`. By default as this network settles: `settling`, where it says nothing sweeps,
            as many as `cupyep.settling.default_steps` of its feedback.
        targets : array of shape (N,) or Batch, optional
            Labels. With them the phase is nudged.
        beta : float or sequence of float
            Strength of the nudge; 0, for the free phase, where there are no targets. Several betas are settled as one
            batch; the state then holds the phases one after the other.
        nudge : {"classical", "deviation", "tangent"}
            How nudged states are represented; the last two give ``State.deviations`` too (`cupyep.phases`).
        signals : sequence of Augmenter
            Intermediate signals of the nudged phase.
        copy : bool
            With False the arrays are the network's own memory, valid until it settles from another start, learns or
            scores, in any thread: threads take turns, and each needs copies.

        Returns
        -------
        State
            With `stats`: residual a layer and sample, steps, converged.

        Warns
        -----
        ConvergenceWarning
            If a tolerance was given and not reached.
        """
        steps, schedule, relaxation = self.settles(steps, schedule, relaxation)
        how: dict[str, Any] = {
            "steps": steps,
            "schedule": schedule,
            "tolerance": tolerance,
            "relaxation": relaxation,
            "check_every": check_every,
            "record": record,
        }
        batch = self.batch(x, targets)
        if start is not None:
            self.check_start(start, len(batch.images))
        flag("copy", copy)
        flag("record", record)
        choose("nudge", nudge, NUDGES)
        signals = items("signals", signals, Augmenter)
        betas: list[Any] = [beta] if is_number(beta) else items("beta", beta)
        if targets is None and not isinstance(x, Batch):
            require(betas == [0], "a nudged phase (beta not 0) needs targets")
        is_free = is_number(beta) and beta == 0
        require(not is_free or targets is None, "a nudged phase (targets given) needs a beta that is not 0")
        require(is_free or start is not None, "a nudged phase starts at a free state: settle without targets first")

        def settled(batch: Batch, start: State | None) -> State:
            if is_free or start is None:
                return self.settle_free(batch, start, **how)
            state = self.settle_nudged(batch, start, betas, self.nudges(batch, signals), nudge, **how)
            return state if nudge == "classical" else state.moved_from(start, self.dtype)

        if not copy:
            return settled(batch, start)
        if record or (start is not None and start.buffers is not None):  # which is this thread's alone
            return settled(batch, start).copy()
        rows = self.parts(len(batch))
        starts = [None if start is None else start.part(part) for part in rows]
        states = self.run_parts(batch, lambda part, number, _: settled(part, starts[number]).copy())
        return joined(states, [part.stop - part.start for part in rows], len(betas))

    @exclusive
    def settle_free(self, batch: Batch, start: State | None = None, retain: str = "both", **how: Any) -> State:
        """Settle the free phase into this network's memory; see `settle` for the arguments.

        Parameters
        ----------
        retain : {"states", "drives", "both"}
            What the nudged phases leave alone: classical ones need the states, deviations the drives. Without drives
            the state has none.
        """
        batch = self.batch(batch)
        samples = len(batch.images)
        shape = self.free_shape(samples, retain, **how)
        buffers = self.memory.phase(shape)
        if start is not None:
            self.check_start(start, samples)
            if start.buffers is not None and start.buffers is not buffers:  # it lies where this phase would
                shape = replace(shape, base=start.buffers.top)
                buffers = self.memory.phase(shape)
        self._fill(buffers, start, shape, how)
        phase = Classical(self.energy, self.memory, shape, buffers, start is not None, batch.images)
        return State.of(buffers, settle(phase, **_loop(how), name="free"))

    @exclusive
    def settle_nudged(
        self,
        batch: Batch,
        free: State,
        betas: Sequence[float],
        nudges: Sequence[Nudge],
        form: str,
        retain: str = "both",
        **how: Any,
    ) -> State:
        """Settle one nudged phase a beta, as one batch, into this network's memory; see `settle` and `settle_free`."""
        choose("form of the nudge", form, NUDGES)
        nudges = items("nudges", nudges, Nudge)
        betas = [number("beta", beta) for beta in items("betas", betas)]
        require(len(betas) > 0 and 0 not in betas, f"each beta must be a number other than 0, not {betas}")
        check_betas(betas, self.readout.criterion.name, form == "tangent")
        batch = self.batch(batch)
        samples, phases = len(batch.images), len(betas)
        phase: Phase
        self.check_start(free, samples, "free")
        shape = self.nudged_shape(form, samples, phases, nudges, retain, free.end, **how)
        buffers = self.memory.phase(shape)
        if form == "classical":
            self._fill(buffers, free, shape, how)
            phase = Classical(self.energy, self.memory, shape, buffers, True, batch.images, nudges, betas)
            state = State.of(buffers)
        else:
            require(
                bool(free.drives and free.winners),
                "deviations start at a settled state with its drives and winners: pass what settle() returned",
            )
            self._fill(buffers, None, shape, how)
            phase = Deviation(self.energy, self.memory, shape, buffers, free, nudges, betas)
            state = State([], [], free.winners, deviations=buffers.states, scales=phase.weights, buffers=buffers)
        state.stats = settle(phase, **_loop(how), name="nudged")
        return state

    def free_shape(self, samples: int, retain: str = "both", **how: Any) -> PhaseShape:
        """Return what decides on the memory of a free phase; arguments as `settle_free`."""
        return PhaseShape("free", samples, retain=choose("retain", retain, RETAINED), **self._shared_shape(**how))

    def nudged_shape(
        self,
        form: str,
        samples: int,
        phases: int,
        nudges: Sequence[Nudge],
        retain: str = "both",
        base: int = 0,
        **how: Any,
    ) -> PhaseShape:
        """Return what decides on the memory of nudged phases; `base` is the `end` of the state that they start at."""
        targets = {id(target): (tuple(target.shape[1:]), target.dtype) for *_, target in nudges if target is not None}
        terms = tuple(TermShape.of(term) for term, *_ in nudges)
        return PhaseShape(
            form,
            samples,
            phases=phases,
            retain=choose("retain", retain, RETAINED),
            terms=terms,
            targets=tuple(targets.values()),
            base=base,
            **self._shared_shape(**how),
        )

    def _shared_shape(self, steps: int, schedule: str, tolerance: float | None = None, **how: Any) -> dict[str, Any]:
        check_settling(schedule, {"steps": steps}, tolerance, **how)
        return {
            "schedule": schedule,
            "watched": watched(schedule, steps, tolerance),
            "update_scratch": self.energy.updates.scratch_size,
        }

    def _fill(self, buffers: PhaseBuffers, start: State | None, shape: PhaseShape, how: dict[str, Any]) -> None:
        """Write the start of a phase, zeros without one, as far as the phase reads it."""
        if start is not None:
            for s, first in zip(buffers.states, start.layers, strict=True):
                if first is not s:
                    s.reshape(shape.phases, *first.shape)[...] = first
            return
        zero = min(max(0.0, self.activation.low), self.activation.high) if shape.has_images else 0.0
        read = {*self.memory.layout.program(shape, not shape.has_images).unmoved, *(t.layer for t in shape.terms)}
        if reads_start(**_loop(how)) or len(read) == self.depth:
            buffers.moving[...] = zero
            return
        for node in read:
            buffers.states[node - 1][...] = zero

    @exclusive
    def scores(self, x: Any, start: State | None = None, **how: Any) -> Any:
        """Return what the readout says of the settled state, shape (N, classes).

        `how` are ``steps``, ``schedule``, ``tolerance``, ``relaxation``, ``check_every`` and ``record``, all as in
        `settle`. Without them the network judges as its training did, see `settling`. `ConfigurationError` for others.
        """
        batch, how = self.batch(x), self.judges(how, start is None)
        if start is not None:
            return self._scores(batch, start, **how)
        return self.device.xp.concatenate(self.run_parts(batch, lambda part, *_: self._scores(part, None, **how)))

    def _scores(self, batch: Batch, start: State | None, **how: Any) -> Any:
        unrolled, feedforward = how.pop("unrolled_steps", 0), how.pop("feedforward", False)
        if feedforward:
            return self.outputs(self._passed_up(batch).layers[-1]).copy()
        retain = {"retain": "states"} if unrolled else {}
        state = self.settle_free(batch, start, **how, **retain)
        if unrolled:
            state = self.settle_free(batch, state, steps=unrolled, schedule="synchronous", **retain)
        return self.outputs(state.layers[-1]).copy()

    def _passed_up(self, batch: Batch) -> State:
        """Return the feed-forward states, in the memory of a free phase."""
        buffers = self.memory.phase(self.free_shape(len(batch.images), steps=1, schedule="sweeps"))
        state = State.of(buffers)
        several = [len(into) > 1 for into in self.graph.into[1:]]
        terms = [self.device.xp.empty_like(d) if more else None for d, more in zip(state.drives, several, strict=True)]
        self.energy.pass_up(batch.images, state, terms, self.memory.workspace(len(batch.images)).ops)
        return state

    def predict(self, x: Any, k: int = 1, **how: Any) -> np.ndarray:
        """Return the most likely classes on the host, (N,), or (N, k) in falling order; the rest as `scores`.

        `DivergenceError` for an image whose scores are not finite.
        """
        k = integer("k", k, 1, self.classes)
        order = ranked(self.device.to_numpy(self.scores(x, **how)))[:, :k]
        return order[:, 0] if k == 1 else order


def _loop(how: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of a phase that its loop takes; its program has the order of updates."""
    return {name: value for name, value in how.items() if name != "schedule"}
