"""Orders of update as programs: one iteration of a schedule, an instruction after the other.

Whoever needs to know what a phase does reads the same list: the loop executes it, memory is allotted from the lifetimes
of its values, products are counted from it, and CUDA graphs are told apart by it. One iteration of every schedule has
one drive and one top-down product a connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cupyep.errors import choose
from cupyep.graph import Graph

SCHEDULES = ("synchronous", "evenodd", "sweeps")


class Value(NamedTuple):
    """What products give and updates take: the drive or the top-down input of a node.

    Of kind ``drive`` or ``topdown``; ``constant``, the drive from the image; ``kept``, the older of a node's two inputs
    in a sweep; ``drive term`` or ``topdown term``, a product that is about to be added, by its connection.
    """

    kind: str
    index: int  # type: ignore[assignment]  # a tuple has a method of that name, which nobody asks a value for


class Drive(NamedTuple):
    """Write the drive of a connection, or add it."""

    connection: int
    out: Value
    add: bool

    @property
    def term(self) -> Value:
        """Where a product is that is to be added."""
        return Value("drive term", self.connection)


class TopDown(NamedTuple):
    """Write the top-down product of a connection, or add it."""

    connection: int
    out: Value
    add: bool

    @property
    def term(self) -> Value:
        """Where a product is that is to be added."""
        return Value("topdown term", self.connection)


class Update(NamedTuple):
    """Set the state of a node from its inputs (None for nothing there); then copy the one to be kept."""

    node: int
    drive: Value | None
    topdown: Value | None
    keep: Value | None = None


Instruction = Drive | TopDown | Update


@dataclass(frozen=True)
class Program:
    """One iteration of a schedule."""

    schedule: str
    body: tuple[Instruction, ...]
    # what makes inputs and winners belong to a given start, as far as the body reads them before it renews them
    start: tuple[Drive, ...]
    unwritten: tuple[Value, ...]  # what the body reads before anything has been written there: nothing, zeros
    unfound: tuple[int, ...]  # connections whose pooling winners are read before they are found
    unmoved: tuple[int, ...]  # nodes whose states products take before the body has updated them: the start

    def lifetimes(self) -> dict[Value, int]:
        """Return when each value is alive, as a set of bits: bit n for instruction n of an iteration that repeats."""
        values = dict.fromkeys(value for instruction in self.body for value in _written(instruction))
        return {value: self._alive(value) for value in values}

    def _alive(self, value: Value) -> int:
        length = len(self.body)
        fresh = [n for n, instruction in enumerate(self.body) if value in _begun(instruction)]
        if not fresh or value.kind == "kept":
            return (1 << length) - 1
        alive = 0
        for first in fresh:
            span = last = 0
            for step in range(length):
                place = (first + step) % length
                if step and place in fresh:
                    break
                span |= 1 << place
                if value in _read(self.body[place]) or value in _written(self.body[place]):
                    last = span
            alive |= last
        return alive


def _written(instruction: Instruction) -> tuple[Value, ...]:
    if isinstance(instruction, Update):
        return () if instruction.keep is None else (Value("kept", instruction.node),)
    return (instruction.out, instruction.term) if instruction.add else (instruction.out,)


def _begun(instruction: Instruction) -> tuple[Value, ...]:
    """Return what an instruction writes anew."""
    if isinstance(instruction, Update):
        return _written(instruction)
    return _written(instruction)[1:] if instruction.add else (instruction.out,)


def _read(instruction: Instruction) -> tuple[Value | None, ...]:
    if isinstance(instruction, Update):
        return (instruction.drive, instruction.topdown)
    return (instruction.out,) if instruction.add else ()


class _Writer:
    """Writes the instructions of one graph; with `image`, for states, connections from the image give drives."""

    def __init__(self, graph: Graph, image: bool):
        self.graph, self.image = graph, image
        self.nodes = range(1, len(graph.names) + 1)
        self.varies = {node: any(graph.below[c] for c in graph.into[node]) for node in self.nodes}
        self._count: Counter[Value] = Counter()

    def _adds(self, out: Value, of: int) -> bool:
        """Return whether the next product into `out`, of so many an iteration, is added to those before."""
        self._count[out] += 1
        return (self._count[out] - 1) % of > 0

    def into(self, node: int) -> list[int]:
        """Return the connections whose drives an iteration takes up, that of the image last."""
        found = self.graph.into[node] if self.varies[node] else []
        inner = [c for c in found if self.graph.below[c]]
        return inner + [c for c in found if not self.graph.below[c] and self.image]

    def drive(self, connection: int, kind: str = "drive") -> Drive:
        node = self.graph.above[connection]
        out = Value(kind, node)
        return Drive(connection, out, self._adds(out, len(self.into(node))))

    def topdown(self, connection: int) -> TopDown:
        node = self.graph.below[connection]
        out = Value("topdown", node)
        return TopDown(connection, out, self._adds(out, len(self.graph.out_of[node])))

    def drives(self, node: int, kind: str = "drive") -> Iterator[Drive]:
        return (self.drive(c, kind) for c in self.into(node))

    def topdowns(self, node: int) -> Iterator[TopDown]:
        return map(self.topdown, self.graph.out_of[node])

    def update(self, node: int, fresh: str = "") -> Update:
        """Return the update of a node; of a sweep's two inputs one is `fresh`, and the other one was kept."""
        constant = Value("constant", node) if self.image and self.graph.into[node] else None
        drive = Value("drive", node) if self.varies[node] else constant
        topdown = Value("topdown", node) if self.graph.out_of[node] else None
        if not (fresh and self.keeps(node)):
            return Update(node, drive, topdown)
        kept = Value("kept", node)
        if fresh == "drive":
            return Update(node, drive, kept, drive)
        return Update(node, kept, topdown, topdown)

    def keeps(self, node: int) -> bool:
        """Return whether a sweep takes up one input of a node while it needs the older other one."""
        return self.varies[node] and bool(self.graph.out_of[node])


def _synchronous(writer: _Writer, warm: bool) -> Iterator[Instruction]:
    # All nodes from the old states, in place: a node is updated as soon as nobody needs its old state any more.
    graph = writer.graph
    yield from (writer.drive(c) for c in graph.out_of[0] if c in writer.into(graph.above[c]))
    for node in writer.nodes:
        yield from (writer.drive(c) for c in graph.out_of[node])
        yield from writer.topdowns(node)
        yield writer.update(node)


def _coloured(writer: _Writer, warm: bool) -> Iterator[Instruction]:
    # The winners that a node's top-down products see are current: they were found when the node above was last updated,
    # and this one has not moved since.
    for nodes in writer.graph.colours:
        for node in nodes:
            yield from writer.drives(node)
            yield from writer.topdowns(node)
            yield writer.update(node)


def _sweeps(writer: _Writer, warm: bool) -> Iterator[Instruction]:
    for down in (warm, not warm):
        for node in reversed(writer.nodes) if down else writer.nodes:
            yield from writer.topdowns(node) if down else writer.drives(node)
            yield writer.update(node, "topdown" if down else "drive")


_BODIES = {"synchronous": _synchronous, "evenodd": _coloured, "sweeps": _sweeps}


def make_program(graph: Graph, schedule: str, warm: bool, image: bool) -> Program:
    """Return the program of a schedule.

    Parameters
    ----------
    graph : Graph
    schedule : {"synchronous", "evenodd", "sweeps"}
        All nodes from the old states; one colour of `Graph.colours` after the other; in topological order and back.
    warm : bool
        Whether the start is a given state. Sweeps then go down first.
    image : bool
        Whether there are drives from the image.
    """
    body = tuple(_BODIES[choose("schedule", schedule, SCHEDULES)](_Writer(graph, image), warm))
    unwritten, unfound = _before(graph, body)
    unmoved = _unmoved(graph, body)
    if not warm:
        return Program(schedule, body, (), unwritten, unfound, unmoved)
    writer = _Writer(graph, image)
    start: list[Drive] = []
    for node in writer.nodes:
        wanted = [value for value in unwritten if value.index == node and value.kind in ("drive", "kept")]
        if wanted or any(c in unfound for c in graph.into[node]):
            start += writer.drives(node, "kept" if wanted and wanted[0].kind == "kept" else "drive")
    done = {drive.out for drive in start}
    return Program(schedule, body, tuple(start), tuple(v for v in unwritten if v not in done), (), unmoved)


def _before(graph: Graph, body: tuple[Instruction, ...]) -> tuple[tuple[Value, ...], tuple[int, ...]]:
    """Return which values are read before they are written, and which winners before they are found."""
    written: set[Value] = set()
    found: set[int] = set()
    unwritten: dict[Value, None] = {}
    unfound: dict[int, None] = {}
    for instruction in body:
        for value in _read(instruction):
            if value is not None and value.kind != "constant" and value not in written:
                unwritten[value] = None
        if isinstance(instruction, Drive):
            found.add(instruction.connection)
        if isinstance(instruction, TopDown) and instruction.connection not in found:
            unfound |= {instruction.connection: None} if graph.edges[instruction.connection].has_winners else {}
        written.update(_written(instruction))
    return tuple(unwritten), tuple(unfound)


def _unmoved(graph: Graph, body: tuple[Instruction, ...]) -> tuple[int, ...]:
    """Return the nodes, the image aside, whose states are read before they are updated."""
    moved, found = {0}, set()
    for instruction in body:
        if isinstance(instruction, Update):
            moved.add(instruction.node)
            continue
        source = graph.below if isinstance(instruction, Drive) else graph.above
        found |= {source[instruction.connection]} - moved
    return tuple(sorted(found))
