"""Where the arrays of a phase lie, and which of them share memory.

A phase needs arrays that outlast it, on which the next one builds, and arrays that are dead when it ends. They are laid
into one block of memory in this order, and the next phase is laid over the dead ones. The same code lays out on paper,
without memory, for a plan of what a step will need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cupyep.backend.precision import Precision
from cupyep.kernels.buffers import Stack
from cupyep.kernels.conv import chunked
from cupyep.kernels.update import UpdateOps
from cupyep.layers import Edge

PART_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # scratch of an update; on a CPU it stays in cache
FLOWS = "drives and feedback"
Shape = tuple[int, ...]


class TermShape(NamedTuple):
    """What the layout must know of one summand of the loss: its layer, and its scratch for a number of samples.

    See `cupyep.heads.LossTerm`.
    """

    layer: int
    scratch_size: Callable[[int], int]
    gradient_scratch_size: Callable[[int], int]
    view: tuple[int | None, Any] = (None, None)


@dataclass(frozen=True)
class PhaseShape:
    """All that decides which arrays a phase needs, and how large they are.

    Attributes
    ----------
    form : {"free", "classical", "deviation", "tangent"}
    samples : int
        N.
    schedule : {"synchronous", "evenodd", "sweeps"}
    phases : int
        Nudged phases settled as one batch of ``phases * N`` rows.
    keeps : {"states", "drives", "both"}
        What outlasts a free or classical phase.
    terms : tuple of TermShape
        Of the loss that nudges.
    targets : tuple of (shape, dtype)
        Their different targets, without the batch axis.
    watched : bool
        Whether states are remembered, to tell whether they oscillate.
    base : int
        Bytes at the start of the block that belong to a phase before.
    update_scratch : callable
        `UpdateOps.scratch_size` of the updates.
    """

    form: str
    samples: int
    schedule: str
    phases: int = 1
    keeps: str = "both"
    terms: tuple[TermShape, ...] = ()
    targets: tuple[tuple[Shape, Any], ...] = ()
    watched: bool = False
    base: int = 0
    update_scratch: Callable[[int, int], int] = UpdateOps.scratch_size

    @property
    def rows(self) -> int:
        """Samples of all phases together."""
        return self.phases * self.samples


class Flows:
    """Where drives and top-down inputs stay between the products that give them and the updates that need them.

    Synchronous updates follow the products by one layer: two layers have drives, one has a top-down input. Even/odd
    updates need both of one layer at a time. In a sweep one of the two is new and the other one is that of the sweep
    before, so each layer keeps one array, in turn for both; the new one is put there after the update. The outer layers
    keep none: there a sweep ends and the next one begins, with what the last product gave.

    Parameters
    ----------
    stack : Stack
    shapes : sequence of tuple
        Of the states, without the batch axis.
    rows : int
    schedule : {"synchronous", "evenodd", "sweeps"}
    dtype : dtype
    first : bool
        Whether the first layer has a drive, that of the input: it is constant for a whole phase.
    """

    def __init__(self, stack: Stack, shapes: Sequence[Shape], rows: int, schedule: str, dtype: Any, first: bool):
        batch, depth = [(rows, *shape) for shape in shapes], len(shapes)
        self._up = True
        self._carried: Any = None  # where an update may read before a product has given anything
        self.drive: list[Any] = [None] * depth
        self.topdown: list[Any] = [None] * depth
        self.kept: list[Any] = [None] * depth
        if first:
            self.drive[0] = stack.take("first drive", batch[0], dtype)
        if schedule == "sweeps":
            self._for_sweeps(stack, batch, dtype)
        else:
            self._for_steps(stack, batch, dtype, 2 if schedule == "synchronous" else 1)

    def _for_steps(self, stack: Stack, batch: list[Shape], dtype: Any, alive: int) -> None:
        for start in range(1, 1 + alive):  # so many layers have a drive at the same time
            self.drive[start::alive] = stack.take_turns(FLOWS, batch[start::alive], dtype)
        self.topdown[:-1] = stack.take_turns(FLOWS, batch[:-1], dtype)

    def _for_sweeps(self, stack: Stack, batch: list[Shape], dtype: Any) -> None:
        top, turns = stack.top, stack.take_turns(FLOWS, batch if len(batch) > 1 else [], dtype)
        self.drive[1:], self.topdown[:-1] = turns[1:], turns[:-1]
        self.kept[1:-1] = [stack.take(FLOWS, shape, dtype) for shape in batch[1:-1]]
        self._carried = stack.since(top, dtype)

    def clear(self) -> None:
        """Start without drives and feedback."""
        if self._carried is not None:
            self._carried[...] = 0

    def below(self, n: int) -> Any:
        """Return where the drive of layer n is to be written."""
        self._up = True
        return self.drive[n - 1]

    def above(self, n: int) -> Any:
        """Return where the top-down input of layer n is to be written."""
        self._up = False
        return self.topdown[n - 1]

    def inputs(self, n: int) -> tuple[Any, Any]:
        """Return drive and top-down input of layer n, None for nothing there."""
        kept = self.kept[n - 1]
        if kept is None:
            return self.drive[n - 1], self.topdown[n - 1]
        return (self.drive[n - 1], kept) if self._up else (kept, self.topdown[n - 1])

    def keep(self, n: int, part: slice) -> None:
        """Put away what is new of layer n, for some rows, after it has been used for them."""
        if self.kept[n - 1] is not None:
            self.kept[n - 1][part] = self.drive[n - 1][part]

    def arrays(self) -> list[Any]:
        """Return all of them; some lie in one place."""
        return [array for array in self.drive + self.topdown + self.kept if array is not None]


@dataclass
class PhaseBuffers:
    """The arrays of a phase.

    Attributes
    ----------
    states : list of arrays (rows, *shape)
        States, or scaled deviations.
    moving : array
        The memory of all states.
    drives : list of arrays, or None
        Total drives, where they are kept.
    winners : list of uint8 arrays
        None for edges without.
    slopes : list of arrays (N, *shape), or None
        Of a tangent phase.
    remembered : list of arrays
        Empty where the phase is not watched.
    flows : Flows
    residual : array of shape (depth, rows)
    parts : list of list of slice
        Rows of each layer that are updated at once.
    scratch : array
        For an update, or one term of the loss.
    force, nudged : dict
        Layer -> array for the rows of one part: the force of its terms, and room for the state as one of them sees it.
    targets, scales : list of arrays
        Targets of the terms, and a factor a row for each term.
    work : list of list of arrays
        What may be used when the phase is over, an array a layer, all in one place: one of N rows after a free phase,
        two or three after a deviation, one of all rows and of the type of the states after a classical phase.
    means : list of list of arrays
        Likewise, after one deviation: two of N rows, of the type of the states (the first and last work in float32).
    images : array of shape (rows, *shape of the input), or None
        Likewise, after a classical phase.
    work_winners : list of uint8 arrays (N, *shape)
        Likewise, all in one place, None for edges without.
    term_work : array
        Likewise, for the parameter gradient of one term of the loss.
    end, top : int
        Where the arrays end that outlast the phase, and those that are still there when it is over.
    """

    states: list[Any]
    moving: Any
    drives: list[Any] | None
    winners: list[Any]
    slopes: list[Any] | None
    remembered: list[Any]
    flows: Flows
    residual: Any
    parts: list[list[slice]]
    scratch: Any
    force: dict[int, Any]
    nudged: dict[int, Any]
    targets: list[Any]
    scales: list[Any]
    work: list[list[Any]]
    means: list[list[Any]]
    images: Any
    work_winners: list[Any]
    term_work: Any
    end: int
    top: int

    def arrays(self) -> list[Any]:
        """Return all that an iteration may read or write."""
        groups = (self.states, self.drives or [], self.winners, self.slopes or [], self.flows.arrays())
        singles = [self.residual, self.scratch, *self.force.values(), *self.nudged.values()]
        return [array for group in groups for array in group] + singles + self.targets + self.scales


class Layout:
    """Lays out the phases of one network.

    Parameters
    ----------
    edges : sequence of Edge
    precision : Precision
    is_gpu : bool
    """

    def __init__(self, edges: Sequence[Edge], precision: Precision, is_gpu: bool):
        self.edges = edges
        self.stored, self.number, self.halves = precision.stored, precision.number, precision.half
        self.shapes = [edge.out_shape for edge in edges]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.part_bytes = PART_BYTES["cuda" if is_gpu else "cpu"]

    def lay_out(self, stack: Stack, shape: PhaseShape) -> PhaseBuffers:
        """Take the arrays of a phase from `stack`, whose top is ``shape.base``."""
        (states, moving), drives, winners, slopes, end = self.lasting(stack, shape)
        top = stack.top
        remembered = self._layers(stack, "remembered states", shape.rows, self.number) if shape.watched else []
        if shape.form in ("deviation", "tangent") and shape.phases > 1:
            winners = self.winners(stack, shape.rows)
        flows = Flows(stack, self.shapes, shape.rows, shape.schedule, self.stored, shape.form in ("free", "classical"))
        residual = stack.take("residual", (len(self.edges), shape.rows), self.number)
        update = self._update(stack, shape)
        stack.release(top)
        return PhaseBuffers(
            states, moving, drives, winners, slopes, remembered, flows, residual, **update, **self._work(stack, shape),
            end=end, top=top,
        )  # fmt: skip

    def _layers(self, stack: Stack, purpose: str, rows: int, dtype: Any) -> list[Any]:
        return [stack.take(purpose, (rows, *shape), dtype) for shape in self.shapes]

    def _states(self, stack: Stack, purpose: str, rows: int) -> tuple[list[Any], Any]:
        """Take what moves; return an array a layer, and all of them as one."""
        top, states = stack.top, self._layers(stack, purpose, rows, self.stored)
        return states, stack.since(top, self.stored)

    def winners(self, stack: Stack, rows: int, purpose: str = "winners") -> list[Any]:
        """Take one array of winners a max-pooling edge, None for the others."""
        return [
            stack.take(purpose, (rows, *edge.out_shape), "uint8") if edge.has_winners else None for edge in self.edges
        ]

    def lasting(self, stack: Stack, shape: PhaseShape) -> tuple[Any, Any, Any, Any, int]:
        """Take what outlasts a phase and its states; return `_states`, drives, winners, slopes, where the first end."""
        if shape.form in ("deviation", "tangent"):
            states = self._states(stack, "deviations", shape.rows)
            tangent = shape.form == "tangent"
            slopes = self._layers(stack, "slopes", shape.samples, self.number) if tangent else None
            return states, None, [None] * len(self.edges), slopes, stack.top
        name = "free" if shape.form == "free" else "nudged"
        states = drives = None
        if shape.keeps != "drives":
            states = self._states(stack, f"{name} states", shape.rows)
        if shape.keeps != "states":
            drives = self._layers(stack, f"{name} drives", shape.rows, self.number)
        winners = self.winners(stack, shape.rows)
        end = stack.top
        if states is None:
            states = self._states(stack, f"{name} states", shape.rows)
        return states, drives, winners, None, end

    def copied(self, layer: int, samples: int) -> int:
        """Return the elements of a copy of a state in the type to compute in; none where it is stored in that."""
        return samples * self.sizes[layer - 1] if self.halves else 0

    def seen_size(self, term: TermShape, moved: bool) -> int:
        """Return the numbers that hold a sample as a term sees it; none where that is the state itself.

        `moved` says that the states are not there as such.
        """
        (pool, dtype), shape = term.view, self.shapes[term.layer - 1]
        dtype = self.number if dtype is None else dtype
        if pool is None and dtype == self.stored and not moved:
            return 0
        size = math.prod(shape) if pool is None else shape[0] // pool * (shape[1] // pool) * shape[2]
        return -(-size * dtype.itemsize // self.number.itemsize)

    def factors(self, stack: Stack, batch: Sequence[Shape]) -> list[Any]:
        """Take what adjoint states are rounded to before a product, one layer's at a time; nothing in float32."""
        return stack.take_turns("adjoint states", batch if self.halves else [(0,)] * len(batch), self.stored)

    def _update(self, stack: Stack, shape: PhaseShape) -> dict[str, Any]:
        """Return rows of the parts of an update, its scratch, targets and factors."""
        moved = shape.form in ("deviation", "tangent")
        by_layer: dict[int, list[TermShape]] = {}
        for term in shape.terms:
            by_layer.setdefault(term.layer, []).append(term)
        parts, scratch, lengths, seen = [], 0, {}, {}
        for n, size in enumerate(self.sizes, 1):
            terms = by_layer.get(n, [])
            row = shape.update_scratch(1, size)
            if terms:
                seen[n] = max(self.seen_size(term, moved) for term in terms)
                row += size + seen[n] + max(term.scratch_size(1) for term in terms)
            most = self.part_bytes // (row * self.number.itemsize)
            parts.append(rows_of_parts(shape.samples, shape.phases, most))
            lengths[n] = longest = max(part.stop - part.start for part in parts[-1])
            wanted = [shape.update_scratch(longest, size), *(term.scratch_size(longest) for term in terms)]
            scratch = max(scratch, *wanted)
        taken = {
            "force": {n: (lengths[n], *self.shapes[n - 1]) for n in by_layer},
            "nudged": {n: (lengths[n], width) for n, width in seen.items() if width},
        }
        found = {
            name: dict(zip(shapes, stack.take_turns("forces", list(shapes.values()), self.number), strict=True))
            for name, shapes in taken.items()
        }
        return {
            "parts": parts,
            "scratch": stack.take("update scratch", (scratch,), self.number),
            "targets": [stack.take("targets", (shape.rows, *size), dtype) for size, dtype in shape.targets],
            "scales": [stack.take("targets", (shape.rows,), self.number) for _ in shape.terms],
            **found,
        }

    def _work(self, stack: Stack, shape: PhaseShape) -> dict[str, Any]:
        classical = shape.form == "classical"
        rows = shape.rows if classical else shape.samples
        batch, top = [(rows, *size) for size in self.shapes], stack.top
        single = shape.form in ("deviation", "tangent") and shape.phases == 1
        lists = 1 if shape.form in ("free", "classical") else 3 if single and not self.halves else 2
        dtype = self.stored if classical else self.number
        work = [stack.take_turns("work", batch, dtype) for _ in range(lists)]
        means = [work[0], work[-1]]
        if single and self.halves:
            means = [stack.take_turns("work", batch, self.stored) for _ in range(2)]
        images, winners = None, [None] * len(self.edges)
        if classical:
            images = stack.take("work", (rows, *self.edges[0].in_shape), self.stored)
            pooled = [n for n, edge in enumerate(self.edges) if edge.has_winners]
            arrays = stack.take_turns("work", [(shape.samples, *self.shapes[n]) for n in pooled], "uint8")
            for n, array in zip(pooled, arrays, strict=True):
                winners[n] = array
        copied = self.copied if classical else lambda *_: 0  # deviations are made states of the type to compute in
        sizes = (copied(t.layer, shape.samples) + t.gradient_scratch_size(shape.samples) for t in shape.terms)
        size = max(sizes, default=0)
        terms = stack.take("work", (size,), self.number)
        stack.release(top)
        return {"work": work, "means": means, "images": images, "work_winners": winners, "term_work": terms}


def rows_of_parts(samples: int, phases: int, most: int) -> list[slice]:
    """Return slices of at most `most` of ``phases * samples`` rows: one of all, or several of nearly equal length.

    Where there are several, each lies within one phase.
    """
    if phases * samples <= most:
        return [slice(0, phases * samples)]
    parts = [part for part, _ in chunked(samples, most)]
    return [
        slice(phase * samples + part.start, phase * samples + part.stop) for phase in range(phases) for part in parts
    ]
