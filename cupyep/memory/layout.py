"""Where the arrays of a phase lie, and which of them share memory.

A phase needs arrays that outlast it, on which the next one builds, and arrays that are dead when it ends. They are laid
into one block of memory in this order, and the next phase is laid over the dead ones. The same code counts what a step
will need, for a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cupyep.backend.precision import Precision
from cupyep.graph import Graph
from cupyep.ops.buffers import carve, padded_bytes
from cupyep.ops.conv import chunked
from cupyep.ops.update import UpdateOps
from cupyep.program import Program, Value, make_program

PART_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # scratch of an update; on a CPU it stays in cache
MAP_READS = 2  # the rows whose force is made at once take so many times the numbers of the map that is read for them
ALWAYS = -1  # all bits
Shape = tuple[int, ...]


class Request(NamedTuple):
    """An array that is wanted, and when it is alive: bit n for moment n."""

    shape: tuple[int, ...]
    dtype: Any
    alive: int = ALWAYS


def allot(requests: Sequence[Request]) -> tuple[list[int], int]:
    """Return the place in bytes of each array, and the bytes of all: what is alive at the same time does not overlap.

    The largest first, each in the lowest place that is free whenever it is alive.
    """
    sizes = [padded_bytes(request.shape, request.dtype) for request in requests]
    places = [0] * len(requests)
    placed: list[int] = []
    for n in sorted(range(len(requests)), key=lambda n: -sizes[n]):
        taken = sorted((places[m], places[m] + sizes[m]) for m in placed if requests[m].alive & requests[n].alive)
        for start, end in taken:
            if places[n] + sizes[n] <= start:
                break
            places[n] = max(places[n], end)
        placed.append(n)
    return places, max((place + size for place, size in zip(places, sizes, strict=True)), default=0)


class Stack:
    """Arrays laid into one block of memory, each on top of those before.

    What is released may be laid over by what comes next: so phases that follow one another share memory. Without a
    block, an array of bytes, only sizes and places are counted, and what is taken is None: a plan. The first `base`
    bytes of the block are left alone. `top` are the bytes in use, `peak` is the largest top so far, and `at_peak` tells
    the bytes by purpose then.
    """

    def __init__(self, block: Any = None, base: int = 0):
        self._block = block
        self._taken: list[tuple[int, int, str]] = []  # from, to, what for
        self.top = self.peak = base
        self._at_peak: dict[str, int] | None = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array whose content is whatever was last written there."""
        return self.take_all(purpose, [Request(shape, dtype)])[0]

    def take_one_of(self, purpose: str, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Any]:
        """Return one array a shape, all in the same place: only one of them holds data at a time."""
        return self.take_all(purpose, [Request(shape, dtype, 1 << n) for n, shape in enumerate(shapes)])

    def take_all(self, purpose: str, requests: Sequence[Request]) -> list[Any]:
        """Return one array a request; those that are never alive together share memory."""
        places, nbytes = allot(requests)
        start, self.top = self.top, self.top + nbytes
        self._taken.append((start, self.top, purpose))
        if self.top > self.peak:
            self.peak, self._at_peak = self.top, None  # as things are now, until some are given back
        if self._block is None:
            return [None] * len(requests)
        return [
            carve(self._block[start + place :], [(request.shape, request.dtype)])[0]
            for place, request in zip(places, requests, strict=True)
        ]

    def since(self, top: int, dtype: Any) -> Any:
        """Return all that lies above `top`, a former value of the attribute, as one array: to fill it at once."""
        return None if self._block is None else self._block[top : self.top].view(dtype)

    def release(self, top: int) -> None:
        """Give back what was taken above `top`, a former value of the attribute."""
        self._at_peak = self.at_peak
        self.top = top
        self._taken = [taken for taken in self._taken if taken[1] <= top]

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by purpose when the top was highest."""
        if self._at_peak is not None:
            return self._at_peak
        sizes: dict[str, int] = {}
        for start, end, purpose in self._taken:
            sizes[purpose] = sizes.get(purpose, 0) + end - start
        return {purpose: size for purpose, size in sizes.items() if size}


class TermShape(NamedTuple):
    """What the layout must know of one summand of the loss, see `cupyep.heads.LossTerm`; scratch by samples."""

    layer: int
    scratch_size: Callable[[int], int]
    gradient_scratch_size: Callable[[int], int]
    view: tuple[int | None, Any] = (None, None)
    map_size: int = 0

    @classmethod
    def of(cls, term: Any) -> TermShape:
        return cls(term.layer, term.scratch_size, term.gradient_scratch_size, term.view, term.map_size)


@dataclass(frozen=True)
class PhaseShape:
    """All that decides which arrays a phase needs, and how large they are."""

    form: str  # "free", "classical", "deviation", "tangent"
    samples: int  # N
    schedule: str
    phases: int = 1  # nudged ones, settled as one batch of phases * N rows
    retain: str = "both"  # "states", "drives", "both": what outlasts a free or classical phase
    terms: tuple[TermShape, ...] = ()  # of the loss that nudges
    targets: tuple[tuple[Shape, Any], ...] = ()  # shapes, without the batch axis, and types of their different targets
    watched: bool = False  # are states remembered, to tell whether they oscillate?
    base: int = 0  # bytes at the start of the block that belong to a phase before
    update_scratch: Callable[[int, int], int] = UpdateOps.scratch_size

    @property
    def has_images(self) -> bool:
        """Whether the image drives: states it does, deviations not."""
        return self.form in ("free", "classical")

    @property
    def rows(self) -> int:
        """Samples of all phases together."""
        return self.phases * self.samples


@dataclass
class PhaseBuffers:
    """The arrays of a phase: lists have one a node, or a connection; those of work are for when the phase is over."""

    states: list[Any]  # (rows, *shape): states, or scaled deviations
    moving: Any  # the memory of all of them
    drives: list[Any] | None  # total drives, where they are kept
    winners: list[Any]  # uint8, one a connection, None for edges without
    slopes: list[Any] | None  # (N, *shape), of a tangent phase
    remembered: list[Any]  # states; empty where the phase is not watched
    values: dict[Value, Any]  # of the program
    inputs: Any  # the memory of all of them, but for the constant ones
    residual: Any  # (nodes, rows)
    parts: list[list[slice]]  # rows of each node that are updated at once
    term_parts: dict[int, list[slice]]  # node -> its rows whose force is made at once; of a tangent phase other ones
    scratch: Any  # for an update, or one term of the loss
    force: dict[int, Any]  # node -> the force of its terms on the rows of a part, in a tangent phase on all rows
    nudged: dict[int, Any]  # node -> room for the states of a part as a term sees them
    targets: list[Any]
    scales: list[Any]  # for each term a factor a row
    # Lists of arrays in one place, a node's at a time: one list of N rows after a free phase, two after a deviation,
    # one of all rows and of the type of the states after a classical phase.
    work: list[list[Any]]
    means: list[Any]  # after one deviation, (N, *shape) like states: its node's until drives from there are correlated
    images: Any  # (rows, *shape), after a classical phase
    work_winners: list[Any]  # (N, *shape), of the connections into one node at a time
    term_work: Any  # for the parameter gradient of one term of the loss
    end: int  # of the arrays that outlast the phase
    top: int  # of those that are still there when it is over

    def arrays(self) -> list[Any]:
        """Return all that an iteration may read or write."""
        groups = (self.states, self.drives or [], self.winners, self.slopes or [], self.values.values())
        singles = [self.residual, self.scratch, *self.force.values(), *self.nudged.values()]
        return [array for group in groups for array in group] + singles + self.targets + self.scales


class Layout:
    """Lays out the phases of one network."""

    def __init__(self, graph: Graph, precision: Precision, is_gpu: bool):
        self.graph, self.edges = graph, graph.edges
        self.stored, self.number, self.halves = precision.stored, precision.number, precision.half
        self.shapes = graph.shapes
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self._programs: dict[tuple[str, bool, bool], Program] = {}
        self.part_bytes = PART_BYTES["cuda" if is_gpu else "cpu"]

    def lay_out(self, stack: Stack, shape: PhaseShape) -> PhaseBuffers:
        """Take the arrays of a phase from `stack`, whose top is ``shape.base``."""
        (states, moving), drives, winners, slopes, end = self.retained(stack, shape)
        top = stack.top
        remembered = self.nodes(stack, "remembered states", shape.rows, self.number) if shape.watched else []
        if not shape.has_images and shape.phases > 1:
            winners = self.winners(stack, shape.rows)
        values, inputs = self._values(stack, shape)
        residual = stack.take("residual", (len(self.shapes), shape.rows), self.number)
        update = self._update(stack, shape)
        stack.release(top)
        return PhaseBuffers(
            states, moving, drives, winners, slopes, remembered, values, inputs, residual,
            **update, **self._work(stack, shape),
            end=end, top=top,
        )  # fmt: skip

    def program(self, shape: PhaseShape, warm: bool = False) -> Program:
        """Return one iteration of a phase. Places follow from that of a cold start; a warm one is the same, turned."""
        key = (shape.schedule, warm, shape.has_images)
        if key not in self._programs:
            self._programs[key] = make_program(self.graph, *key)
        return self._programs[key]

    def _values(self, stack: Stack, shape: PhaseShape) -> tuple[dict[Value, Any], Any]:
        """Take the drives from the image, constant for a whole phase, and what lies between products and updates.

        The latter are returned as one array, too.
        """
        constant = [Value("constant", self.graph.above[c]) for c in self.graph.out_of[0] if shape.has_images]
        found: dict[Value, Any] = {}
        for lives in (dict.fromkeys(constant, ALWAYS), self.program(shape).lifetimes()):
            top = stack.top
            requests = [Request((shape.rows, *self._value_shape(v)), self.stored, alive) for v, alive in lives.items()]
            found |= dict(zip(lives, stack.take_all("drives and feedback", requests), strict=True))
        return found, stack.since(top, self.stored)

    def _value_shape(self, value: Value) -> Shape:
        ends = {"drive term": self.graph.above, "topdown term": self.graph.below}.get(value.kind)
        return self.shapes[(value.index if ends is None else ends[value.index]) - 1]

    def nodes(self, stack: Stack, purpose: str, rows: int, dtype: Any) -> list[Any]:
        """Take one array a node."""
        return [stack.take(purpose, (rows, *shape), dtype) for shape in self.shapes]

    def _states(self, stack: Stack, purpose: str, rows: int) -> tuple[list[Any], Any]:
        """Take what moves; return an array a node, and all of them as one."""
        top, states = stack.top, self.nodes(stack, purpose, rows, self.stored)
        return states, stack.since(top, self.stored)

    def winners(self, stack: Stack, rows: int, purpose: str = "winners") -> list[Any]:
        """Take one array of winners a max-pooling connection, None for the others."""
        return [
            stack.take(purpose, (rows, *edge.out_shape), "uint8") if edge.has_winners else None for edge in self.edges
        ]

    def retained(self, stack: Stack, shape: PhaseShape) -> tuple[Any, Any, Any, Any, int]:
        """Take what outlasts a phase and its states; return `_states`, drives, winners, slopes, where the first end."""
        if not shape.has_images:
            deviations = self._states(stack, "deviations", shape.rows)
            tangent = shape.form == "tangent"
            slopes = self.nodes(stack, "slopes", shape.samples, self.number) if tangent else None
            return deviations, None, [None] * len(self.edges), slopes, stack.top
        name = "free" if shape.form == "free" else "nudged"
        states = self._states(stack, f"{name} states", shape.rows) if shape.retain != "drives" else None
        drives = self.nodes(stack, f"{name} drives", shape.rows, self.number) if shape.retain != "states" else None
        winners = self.winners(stack, shape.rows)
        end = stack.top
        return states or self._states(stack, f"{name} states", shape.rows), drives, winners, None, end

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
        return stack.take_one_of("adjoint states", batch if self.halves else [(0,)] * len(batch), self.stored)

    def _update(self, stack: Stack, shape: PhaseShape) -> dict[str, Any]:
        """Return rows of the parts of updates and of forces, their scratch, forces, targets and factors.

        Forces of a tangent phase do not change: they are made once, for all rows. In others a part's are made when the
        part is updated, so its states are read once for both.
        """
        parts, term_parts, scratch, force, nudged = [], {}, 0, {}, {}
        once = shape.form == "tangent"
        for n, size in enumerate(self.sizes, 1):
            terms = [term for term in shape.terms if term.layer == n]
            row = shape.update_scratch(1, size)
            parts.append(self._rows(shape, row))
            if terms:
                seen = max(self.seen_size(term, not shape.has_images) for term in terms)
                row += size + seen + max(term.scratch_size(1) for term in terms)
                term_parts[n] = self._rows(shape, row, MAP_READS * max(term.map_size for term in terms))
                longest = _longest(term_parts[n])
                scratch = max(scratch, *(term.scratch_size(longest) for term in terms))
                force[n] = (shape.rows if once else longest, *self.shapes[n - 1])
                if seen:
                    nudged[n] = (longest, seen)
                if not once:
                    parts[-1] = term_parts[n]
            scratch = max(scratch, shape.update_scratch(_longest(parts[-1]), size))
        forces = []
        for sizes, kept in ((force, once), (nudged, False)):
            requests = [Request(size, self.number, ALWAYS if kept else 1 << n) for n, size in sizes.items()]
            forces.append(dict(zip(sizes, stack.take_all("forces", requests), strict=True)))
        return {
            "parts": parts,
            "term_parts": term_parts,
            "force": forces[0],
            "nudged": forces[1],
            "scratch": stack.take("update scratch", (scratch,), self.number),
            "targets": [stack.take("targets", (shape.rows, *size), dtype) for size, dtype in shape.targets],
            "scales": [stack.take("targets", (shape.rows,), self.number) for _ in shape.terms],
        }

    def _rows(self, shape: PhaseShape, row: int, least: int = 0) -> list[slice]:
        """Return the rows that are taken at once where each takes `row` numbers: `part_bytes`, or `least` numbers."""
        most = max(self.part_bytes // self.number.itemsize, least) // row
        return rows_of_parts(shape.samples, shape.phases, most)

    def _work(self, stack: Stack, shape: PhaseShape) -> dict[str, Any]:
        classical = shape.form == "classical"
        rows = shape.rows if classical else shape.samples
        batch, top = [(rows, *size) for size in self.shapes], stack.top
        single = not shape.has_images and shape.phases == 1
        dtype = self.stored if classical else self.number
        work = [] if shape.has_images else [stack.take_one_of("work", batch, dtype)]
        below = stack.top
        work.insert(0, stack.take_one_of("work", batch, dtype))
        if single and not self.halves:
            stack.release(below)  # means are made when the first list is used no more
        means = stack.take_all("work", self.until_above(batch, self.stored)) if single else []
        images, winners = None, [None] * len(self.edges)
        if classical:
            images = stack.take("work", (rows, *self.graph.input_shape), self.stored)
            winners = self.winners_of_a_node(stack, shape.samples)
        copied = self.copied if classical else lambda *_: 0  # deviations are made states of the type to compute in
        sizes = (copied(t.layer, shape.samples) + t.gradient_scratch_size(shape.samples) for t in shape.terms)
        terms = stack.take("work", (max(sizes, default=0),), self.number)
        stack.release(top)
        return {"work": work, "means": means, "images": images, "work_winners": winners, "term_work": terms}

    def until_above(self, batch: Sequence[Shape], dtype: Any) -> list[Request]:
        """Return requests of an array a node, alive from the turn of the node to that of the last one above it."""
        lives = []
        for node in range(1, len(batch) + 1):
            last = max((self.graph.above[c] for c in self.graph.out_of[node]), default=node)
            lives.append((2 << last) - (1 << node))
        return [Request(shape, dtype, alive) for shape, alive in zip(batch, lives, strict=True)]

    def with_several(self, batch: Sequence[Shape]) -> list[Shape]:
        """Return the shape of each node to or from which several connections lead, an empty one of the others."""
        both = zip(self.graph.into[1:], self.graph.out_of[1:], batch, strict=True)
        return [shape if max(len(into), len(out)) > 1 else (0,) for into, out, shape in both]

    def winners_of_a_node(self, stack: Stack, samples: int) -> list[Any]:
        """Take winners for the connections into one node at a time, None for edges without."""
        pooled = [c for c, edge in enumerate(self.edges) if edge.has_winners]
        requests = [Request((samples, *self.edges[c].out_shape), "uint8", 1 << self.graph.above[c]) for c in pooled]
        arrays = dict(zip(pooled, stack.take_all("work", requests), strict=True))
        return [arrays.get(c) for c in range(len(self.edges))]


def _longest(parts: Sequence[slice]) -> int:
    return max(part.stop - part.start for part in parts)


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
