"""What a settled phase leaves: states, drives, winners of samples, as a whole and in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cupyep.backend import array_module
from cupyep.memory.layout import PhaseBuffers
from cupyep.settling import SettleStats
from cupyep.showing import Shown


@dataclass(repr=False)
class State(Shown):
    """States of a settled phase.

    Attributes
    ----------
    layers : list of arrays (B, *shape)
        s^1 .. s^L, of the nodes in topological order. With several phases in one batch, B = phases * N, phase-major.
        None of them where `settle_nudged` leaves deviations alone.
    drives : list of arrays
        Total drive g^n of the last update, ``s^n = sigma(g^n)``. This list and those below are empty where there are
        none.
    winners : list of uint8 arrays
        Max-pooling winners of the last drive of each connection, None for edges without. After a phase in deviation
        form those of the free state, of N samples however many phases.
    stats : SettleStats
        None of a state that was not settled, but made of arrays.
    deviations : list of arrays
        Scaled deviations ``eps^n = a_n (s^n - s*^n)`` of a nudged phase in deviation form.
    scales : list of float
        The a_n that belong to them, times a power of two in float16.
    buffers : PhaseBuffers or None
        Where these arrays are in the network's memory; None for arrays of its own.
    """

    layers: list[Any]
    drives: list[Any] = field(default_factory=list)
    winners: list[Any] = field(default_factory=list)
    stats: SettleStats = None  # type: ignore[assignment]  # so that what settled can be used as it is
    deviations: list[Any] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    buffers: PhaseBuffers | None = None

    @classmethod
    def of(cls, buffers: PhaseBuffers, stats: Any = None) -> State:
        """Return the state that a free or classical phase leaves in these arrays."""
        return cls(buffers.states, buffers.drives or [], buffers.winners, stats, buffers=buffers)

    def facts(self) -> dict[str, str]:
        arrays = self.layers or self.deviations
        states = ", ".join("x".join(map(str, s.shape[1:])) for s in arrays)
        ended = {} if self.stats is None else self.stats.facts()
        form = {"form": "deviations from the free state"} if self.deviations else {}
        return {"samples": str(len(arrays[0]) if arrays else 0), "layers": states, **form, **ended}

    @property
    def end(self) -> int:
        """Bytes of the network's memory that the next phase must leave alone."""
        return 0 if self.buffers is None else self.buffers.end

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"buffers": None}  # a pickled state's arrays are its own

    def copy(self) -> State:
        """Return a state whose arrays are its own."""
        own = (self.layers, self.drives, self.winners, self.deviations)
        layers, drives, winners, deviations = (_each(arrays, lambda a: a.copy()) for arrays in own)
        return State(layers, drives, winners, self.stats, deviations, self.scales)

    def moved_from(self, free: State, dtype: Any) -> State:
        """Return this state with the layers that its deviations from `free` make, in the type to compute in."""
        self.layers = []
        for eps, a, s in zip(self.deviations, self.scales, free.layers, strict=True):
            delta = (eps.astype(dtype) / a).reshape(-1, *s.shape)
            self.layers.append((delta + s).reshape(eps.shape))
        return self

    def part(self, rows: slice) -> State:
        """Return the state of some of the samples, which shares its memory."""
        own = (self.layers, self.drives, self.winners)
        layers, drives, winners = (_each(arrays, lambda a: a[rows]) for arrays in own)
        return State(layers, drives, winners, buffers=self.buffers)


def _each(arrays: Sequence[Any], of: Callable[[Any], Any]) -> list[Any]:
    """Return what `of` makes of each of some arrays, those that are there."""
    return [None if array is None else of(array) for array in arrays]


def joined(states: Sequence[State], samples: Sequence[int], phases: int) -> State:
    """Return the state of all samples from those of parts of so many samples, each of some phases in one batch."""

    def join(name: str) -> list[Any]:
        arrays = [getattr(state, name) for state in states]
        return [_joined(parts, samples) for parts in zip(*arrays, strict=True)]

    if len(states) == 1:
        return states[0]
    stats = functools.reduce(lambda one, other: one.joined(other, phases), (state.stats for state in states))
    layers, drives, winners, deviations = map(join, ("layers", "drives", "winners", "deviations"))
    return State(layers, drives, winners, stats, deviations, states[0].scales)


def _joined(parts: Sequence[Any], samples: Sequence[int]) -> Any:
    if parts[0] is None:
        return None
    shape = parts[0].shape[1:]
    by_phase = [part.reshape(-1, n, *shape) for part, n in zip(parts, samples, strict=True)]
    return array_module(parts[0]).concatenate(by_phase, axis=1).reshape(-1, *shape)
