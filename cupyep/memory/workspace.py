"""The memory of a network beside its parameters, and the operations of its edges for one batch size."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.backend.device import Device
from cupyep.backend.graphs import Replayer
from cupyep.backend.precision import Precision
from cupyep.errors import require
from cupyep.graph import Graph
from cupyep.layers import Edge
from cupyep.memory.layout import Layout, PhaseBuffers, PhaseShape, Stack
from cupyep.ops.buffers import Arena


class Workspace:
    """The operations of a network's edges for one batch size: chunk plans, and views of memory that all sizes share.

    `batch` are the samples processed together (2N for two nudged phases in one batch).
    """

    def __init__(self, edges: Sequence[Edge], batch: int, device: Device, precision: Precision):
        self.edges, self.batch, self.device, self.precision = edges, batch, device, precision
        self.ops = [edge.prepare(batch, device.scratch_bytes, precision, device) for edge in edges]
        self.nbytes = max(ops.nbytes for ops in self.ops)  # wanted from the arena

    def bind(self, arena: Arena, effective: Effective) -> None:
        """Take views of the arena, and the arrays that each edge's operations make of the weights."""
        self.forget()
        self.effective = effective
        for n, ops in enumerate(self.ops):
            ops.bind(arena, effective.arrays(n, ops))

    def forget(self) -> None:
        """Forget the iterations that were captured: they are of memory that is no more."""
        self.replayer = Replayer(self.device.graphs)

    def refresh(self, is_due: Callable[[Hashable], bool]) -> None:
        """Take up the current weights; `is_due` says, by its key, whether to make what is derived of them."""
        for n, (edge, ops) in enumerate(zip(self.edges, self.ops, strict=True)):
            if ops.derived:
                ops.derives = is_due(derived_key(n, ops))
            edge.refresh(ops)


class Effective:
    """What is made of the parameters, for all memories that settle with them: each thing once while they are constant.

    The weights of edges, what operations make of them (mirrored, transformed, rounded), the maps of heads.
    """

    def __init__(self, edges: Sequence[Edge], xp: Any):
        self.edges, self.xp = edges, xp
        self.derived: dict[Hashable, list[Any]] = {}
        self._current: set[Hashable] | None = None  # what is made of the parameters of the scope
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def constant(self) -> Iterator[None]:
        """Promise that no parameter changes within this scope: all is made once, not at every call."""
        outer = self._current
        self._current = set() if outer is None else outer
        try:
            yield
        finally:
            self._current = outer

    def arrays(self, n: int, ops: Any) -> list[Any]:
        """Return the arrays of ``ops.derived``, shared by all operations of edge n that derive the same."""
        with self.lock:
            key = derived_key(n, ops)
            if key not in self.derived:
                self.derived[key] = [self.xp.zeros(shape, dtype) for shape, dtype in ops.derived]
            return self.derived[key]

    def take_up(self, workspace: Workspace) -> None:
        """Let the operations of a workspace have the current weights."""
        with self.lock:
            if self._is_due("weights"):
                for edge in self.edges:
                    edge.make_weight()
            if self._is_due(workspace):
                workspace.refresh(self._is_due)

    def refresh(self, term: Any) -> None:
        """Let a term of the loss have its current parameters."""
        with self.lock:
            if self._is_due(id(term)):
                term.refresh()

    def _is_due(self, what: Hashable) -> bool:
        """Return whether something must be made, which is done then."""
        if self._current is None:
            return True
        if what in self._current:
            return False
        self._current.add(what)
        return True


class Memory:
    """What settling and learning need beside parameters, each allocated once and shared by all that can share it.

    Workspaces of all batch sizes share one arena of scratch for products and what is made of the weights (mirrored,
    transformed, rounded). The arrays of all phases lie in one block, which grows when a phase needs more. Several
    memories of one network, a thread each, share its `effective`.
    """

    # An epoch's: N and 2N of each of the two lengths that the parts of a batch have, of those of the last, ragged one,
    # and of the checkup's images; N of the batches of two other splits and of their last ones.
    WORKSPACES_KEPT = 16
    LAYOUTS_KEPT = 64

    def __init__(self, graph: Graph, device: Device, precision: Precision, effective: Effective | None = None):
        self.edges, self.device, self.precision = graph.edges, device, precision
        self.effective = Effective(graph.edges, device.xp) if effective is None else effective
        self.layout = Layout(graph, precision, device.is_gpu)
        self._arena: Arena | None = None
        self._block: Any = None
        self._workspaces: OrderedDict[int, Workspace] = OrderedDict()
        self._laid_out: OrderedDict[Hashable, Any] = OrderedDict()
        self._at_work = False

    @contextlib.contextmanager
    def at_work(self, at_work: bool = True) -> Iterator[None]:
        """Say that states are in here within this scope, or are not yet: what settles others meanwhile is refused.

        A signal might: its gradient is asked for while the network settles, its target before.
        """
        require(
            not (at_work and self._at_work),
            "this network is in the middle of a step: a signal's gradient must not settle it; ask it in `target`, or "
            "another network, made before by copy.deepcopy",
        )
        before, self._at_work = self._at_work, at_work
        try:
            yield
        finally:
            self._at_work = before

    def workspace(self, batch: int) -> Workspace:
        """Return the operations for a batch size, the current weights taken up; those of the last few sizes are kept.

        Get it anew after every change of the weights. Within `Effective.constant` they are taken up the first time.
        """
        self._prepare([batch])
        workspace = self._workspaces[batch]
        self.effective.take_up(workspace)
        return workspace

    def _prepare(self, batches: Sequence[int]) -> None:
        """Make workspaces of some sizes, with an arena that is large enough for all of them."""
        fresh = {batch: self._new(batch) for batch in batches if batch not in self._workspaces}
        needed = max((workspace.nbytes for workspace in fresh.values()), default=0)
        if self._arena is None or self._arena.block.nbytes < needed:
            self._workspaces.clear()  # they hold the old arena
            self._arena = None
            self._arena = Arena(self.device.xp, needed)
            fresh = {batch: fresh[batch] if batch in fresh else self._new(batch) for batch in batches}
        for batch, workspace in fresh.items():
            self._workspaces[batch] = workspace
            workspace.bind(self._arena, self.effective)
        for batch in batches:
            self._workspaces.move_to_end(batch)
        while len(self._workspaces) > self.WORKSPACES_KEPT:
            self._workspaces.popitem(last=False)

    def _new(self, batch: int) -> Workspace:
        return Workspace(self.edges, batch, self.device, self.precision)

    def phase(self, shape: PhaseShape) -> PhaseBuffers:
        """Return the arrays of a phase."""
        return self.laid_out(shape, shape.base, functools.partial(self.layout.lay_out, shape=shape))

    def laid_out(self, key: Hashable, base: int, lay_out: Callable[[Stack], Any]) -> Any:
        """Return what `lay_out` takes from a stack that begins at byte `base` of the block.

        Calls with an equal `key` get the same arrays, as long as the block does not have to grow.
        """
        if key not in self._laid_out:
            plan = Stack(base=base)
            lay_out(plan)
            self.reserve(plan.peak)
            self._laid_out[key] = lay_out(Stack(self._block, base))
            while len(self._laid_out) > self.LAYOUTS_KEPT:
                self._laid_out.popitem(last=False)
        self._laid_out.move_to_end(key)
        return self._laid_out[key]

    def reserve(self, nbytes: int) -> None:
        """Make the block at least so large. Arrays handed out before keep their memory, and share it no more."""
        if self._block is None or self._block.nbytes < nbytes:
            self._laid_out.clear()
            for workspace in self._workspaces.values():
                workspace.forget()
            self._block = None
            self._block = self.device.xp.empty(nbytes, np.uint8)

    def expect(self, needs: Needs) -> None:
        """Make room for all that a step needs, before its first phase: once for all steps of this shape."""
        key = ("expected", needs.free, needs.rows, needs.key)
        if key not in self._laid_out:
            self._prepare(needs.batches)
            self.reserve(needs.stack(self.layout).peak)
            self._laid_out[key] = None


@dataclass(frozen=True)
class Needs:
    """What a learning step needs of a network's memory."""

    free: PhaseShape | None  # its free phase, if it has one
    rows: int  # samples that are processed together afterwards
    key: Hashable  # tells what follows from anything else
    lay_out: Callable[[Stack], Any]  # takes from a stack what is laid over all that the free phase does not leave

    @property
    def batches(self) -> list[int]:
        """The numbers of samples that are processed together."""
        return sorted({self.rows} | ({self.free.rows} if self.free else set()))

    def stack(self, layout: Layout) -> Stack:
        """Return, without memory, the stack of the free phase or that of what follows, whichever is higher."""
        first, second = Stack(), Stack()
        if self.free is not None:
            end = layout.lay_out(first, self.free).end
            layout.retained(second, self.free)
            second.release(end)
        self.lay_out(second)
        return max(first, second, key=lambda stack: stack.peak)


def derived_key(n: int, ops: Any) -> Hashable:
    """Return what operations of edge n have in common that share what they make of its weights."""
    return (n, type(ops), *((shape, np.dtype(dtype)) for shape, dtype in ops.derived))
