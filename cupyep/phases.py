"""The two kinds of phase that settle: states of the energy itself, and deviations from a free state.

A node's state follows from its inputs by ``s^j <- sigma(sum of drives + sum over connections to k of (a_k / a_j) *
top-down product + force^j / a_j)``: see `cupyep.energy.HopfieldEnergy`, whose ``a_j`` these are. lambda = 1 is the
convolutional Hopfield network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cupyep.backend.cuda import identity
from cupyep.backend.graphs import Replays
from cupyep.energy import HopfieldEnergy
from cupyep.heads import LossTerm, Nudge
from cupyep.memory.layout import PhaseBuffers, PhaseShape
from cupyep.memory.workspace import Memory
from cupyep.program import Drive, Instruction, TopDown, Update, Value
from cupyep.state import State


class Phase:
    """What both kinds share: inputs of the nodes, nudges, the residual, captured iterations.

    There is one of `betas` a phase; phases are settled as one batch of ``len(betas) * N``. By the `divisors` a force on
    each node is divided. The `buffers` are those of the `shape`; a `warm` phase goes on from a given start.
    """

    form = ""  # as `Network.settle` names it
    scale = 1.0  # by which what moves is multiplied, and with it the residual before its square
    relaxation = 1.0  # how far an update goes, in terms of what the rule says; `cupyep.settling.settle` sets it
    drives_current = False  # whether inputs belong to the start already
    scales_drives = False  # which of its inputs a node takes with the weight of feedback
    tangent = False  # whether forces are made before the iterations, which they do not depend on
    winners: list[Any]  # of each connection, None for edges without

    def __init__(
        self,
        energy: HopfieldEnergy,
        memory: Memory,
        shape: PhaseShape,
        buffers: PhaseBuffers,
        warm: bool,
        nudges: Sequence[Nudge],
        betas: Sequence[float],
        divisors: Sequence[float],
    ):
        self.graph, self.edges, self.activation = energy.graph, energy.graph.edges, energy.activation
        self.weights, self.device, self.xp = energy.weights, energy.device, energy.device.xp
        self.feedback, self.shares = energy.drive_scales if self.scales_drives else energy.topdown_scales
        self.label, self.host = energy.graph.label, energy.device.to_numpy  # of nodes in messages; what copies arrays
        self.updates = energy.updates
        self.workspace = workspace = memory.workspace(shape.rows)
        self.buffers = buffers
        self.program = program = memory.layout.program(shape, warm)
        self.phases, self.samples = shape.phases, shape.samples
        self.precision = memory.precision
        self.residual = buffers.residual
        self.states = buffers.states
        started = program.start if self.drives_current else ()
        if program.unwritten or started:
            buffers.inputs[...] = 0
        self._nudges = self._loaded(nudges, betas, divisors)
        for term, *_ in nudges:
            workspace.effective.refresh(term)

    def _loaded(
        self, nudges: Sequence[Nudge], betas: Sequence[float], divisors: Sequence[float]
    ) -> dict[int, list[tuple[LossTerm, Any, Any]]]:
        """Copy targets and scales ``-beta * weight / divisor`` into buffers; return (term, target, scale) a layer."""
        loaded: dict[int, list[tuple[LossTerm, Any, Any]]] = {}
        targets: dict[int, Any] = {}
        for (term, weight, target), scale in zip(nudges, self.buffers.scales, strict=True):
            if target is not None and id(target) not in targets:  # several terms may have one target
                targets[id(target)] = self._tile(target, self.buffers.targets[len(targets)])
            for phase, beta in enumerate(betas):
                scale[phase * self.samples : (phase + 1) * self.samples] = -beta * weight / divisors[term.layer - 1]
            loaded.setdefault(term.layer, []).append((term, targets.get(id(target)), scale))
        return loaded

    def _tile(self, array: Any, out: Any) -> Any:
        """Write `array` (N, ...) into `out` (phases * N, ...), once a phase; return `out`."""
        out.reshape(self.phases, *array.shape)[...] = array
        return out

    def _force(self, n: int, part: slice) -> Any:
        """Return ``sum of scale * dloss/ds`` of layer n's nudges for some rows, None without nudges."""
        if n not in self._nudges:
            return None
        return self._put_force(n, part, self.buffers.force[n][: part.stop - part.start])

    def _put_force(self, n: int, part: slice, force: Any) -> Any:
        """Write ``sum of scale * dloss/ds`` of layer n's nudges for some rows into `force`; return that."""
        view, seen, scratch = None, None, self.buffers.scratch
        for number, (term, target, scale) in enumerate(self._nudges[n]):
            if view is None or term.view != view:
                view, seen = term.view, self._seen(n, part, *term.view)
            target = None if target is None else target[part]
            term.put_force(seen, target, scale[part], force, scratch, add=number > 0)
        return force

    def _seen(self, n: int, part: slice, pool: int | None, dtype: Any) -> Any:
        """Return some rows of layer n's state as a loss sees it: see `LossTerm.view`."""
        raise NotImplementedError

    def _see(self, n: int, rows: int, pool: int | None, dtype: Any, s: Any, scale: float, g: Any) -> Any:
        """Return ``sigma(g) + scale * s``, or `s`, as a loss sees it."""
        shape = self.graph.shapes[n - 1]
        if pool is not None:
            shape = (shape[0] // pool, shape[1] // pool, shape[2])
        memory = self.buffers.nudged[n].reshape(-1).view(self.precision.number if dtype is None else dtype)
        seen = memory[: rows * math.prod(shape)].reshape(rows, *shape)
        self.updates.see(s, scale, g, pool, seen, self.buffers.scratch)
        return seen

    def _drive(self, connection: int, out: Any) -> None:
        """Write the drive of a connection into `out`."""
        raise NotImplementedError

    def _topdown(self, connection: int, out: Any) -> None:
        """Write the top-down product of a connection into `out`."""
        node = self.graph.above[connection]
        ops, winners = self.workspace.ops[connection], self.winners[connection]
        self.edges[connection].topdown(self.states[node - 1], winners, out, ops)

    def _update(self, n: int, part: slice, drive: Any, topdown: Any, residual: Any) -> None:
        """Update some rows of node n."""
        raise NotImplementedError

    def run(self, instructions: Sequence[Instruction], measure: bool = False) -> None:
        """Do some instructions of a program; measured, the residual gains the changes of updates."""
        for instruction in instructions:
            if isinstance(instruction, Update):
                self.update(instruction, measure)
            else:
                self._take_up(instruction)

    def _take_up(self, instruction: Drive | TopDown) -> None:
        values, connection, out = self.buffers.values, instruction.connection, instruction.out
        is_drive = isinstance(instruction, Drive)
        product = self._drive if is_drive else self._topdown
        factor = self.shares[connection] if is_drive == self.scales_drives else 1.0
        if not instruction.add and factor == 1.0:
            product(connection, values[out])
            return
        term = values[out] if not instruction.add else values[instruction.term]
        product(connection, term)
        if factor != 1.0:
            term *= factor
        if instruction.add:
            values[out] += term

    def update(self, instruction: Update, measure: bool) -> None:
        n, values = instruction.node, self.buffers.values
        inputs = [None if value is None else values[value] for value in (instruction.drive, instruction.topdown)]
        row = self.residual[n - 1] if measure else None
        for part in self.buffers.parts[n - 1]:
            drive, topdown, residual = (None if array is None else array[part] for array in (*inputs, row))
            self._update(n, part, drive, topdown, residual)
            if instruction.keep is not None:
                values[Value("kept", n)][part] = values[instruction.keep][part]

    def _arrays(self) -> list[Any]:
        """Return the arrays that the iteration reads and writes, but for parameters and those of the operations."""
        return self.buffers.arrays()

    def _capture_key(self) -> tuple[Any, ...] | None:
        """Return all that an iteration depends on besides the content of arrays; None: it must not be captured."""
        parts = [self.activation.code, *(edge.capture_key() for edge in self.edges)]
        if not self.tangent:
            parts += [term.capture_key() for n, terms in self._nudges.items() for term, *_ in terms]
        if None in parts:
            return None
        arrays = (None if array is None else identity(array) for array in self._arrays())
        factors = (*self.feedback, *self.shares, *self.weights)
        return (self.form, self.scale, self.phases, self.program, *factors, tuple(self._nudges), *parts, *arrays)

    @functools.cached_property
    def _replays(self) -> Replays:
        return self.workspace.replayer.of(None if self.device.graphs is None else self._capture_key())

    def repeat(self, name: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, a part of the phase of that `name`, or replay what it did before (`cupyep.backend.graphs`)."""
        self._replays.run(name, work)

    def remember(self) -> None:
        """Keep a copy of the states for `distance_from_remembered`."""
        for kept, now in zip(self.buffers.remembered, self.buffers.states, strict=True):
            kept[...] = now

    def distance_from_remembered(self) -> float:
        """Return the largest root-mean-square distance of any layer and sample from the states remembered."""
        distances = []
        for kept, now in zip(self.buffers.remembered, self.buffers.states, strict=True):
            kept -= now
            kept *= kept
            distances.append(kept.reshape(len(now), -1).mean(axis=1).max())
        return math.sqrt(float(self.xp.stack(distances).max()))


class Classical(Phase):
    """States: ``s^j <- sigma(sum of drives + sum of (a_k / a_j) * top-down products - (beta / a_j) dL/ds^j)``.

    The `states` of `buffers` are the start; they are overwritten, and so are `drives` (those of measured updates) and
    `winners`. The connections from the `images` are done once for all phases. A free phase has no nudges.
    """

    form = "classical"

    def __init__(
        self,
        energy: HopfieldEnergy,
        memory: Memory,
        shape: PhaseShape,
        buffers: PhaseBuffers,
        warm: bool,
        images: Any,
        nudges: Sequence[Nudge] = (),
        betas: Sequence[float] = (0.0,),
    ):
        self.winners, self.drives = buffers.winners, buffers.drives or []
        image_ops = memory.workspace(shape.samples).ops
        super().__init__(energy, memory, shape, buffers, warm, nudges, betas, energy.weights)
        for connection in self.program.unfound:
            self.winners[connection][...] = 0
        for connection in self.graph.out_of[0]:
            self._drive_from_image(connection, images, image_ops[connection])

    def _drive_from_image(self, connection: int, images: Any, ops: Any) -> None:
        """Compute a drive that is constant for the whole phase, once for all phases."""
        drive = self.buffers.values[Value("constant", self.graph.above[connection])]
        winners, n = self.winners[connection], self.samples
        top = None if winners is None else winners[:n]
        self.edges[connection].drive(images, drive[:n], top, ops)
        for phase in range(1, self.phases):
            drive[phase * n : (phase + 1) * n] = drive[:n]
            if winners is not None:
                winners[phase * n : (phase + 1) * n] = top

    def _drive(self, connection: int, out: Any) -> None:
        node = self.graph.below[connection]
        if node == 0:
            out[...] = self.buffers.values[Value("constant", self.graph.above[connection])]
            return
        ops, winners = self.workspace.ops[connection], self.winners[connection]
        self.edges[connection].drive(self.states[node - 1], out, winners, ops)

    def _seen(self, n: int, part: slice, pool: int | None, dtype: Any) -> Any:
        s = self.states[n - 1][part]
        if pool is None and s.dtype == (self.precision.number if dtype is None else dtype):
            return s
        return self._see(n, len(s), pool, dtype, s, 1.0, None)

    def _update(self, n: int, part: slice, drive: Any, topdown: Any, residual: Any) -> None:
        s = self.states[n - 1][part]
        g = self.drives[n - 1][part] if self.drives and residual is not None else None
        feedback, force, scratch = self.feedback[n - 1], self._force(n, part), self.buffers.scratch
        self.updates.states(s, drive, topdown, feedback, force, g, residual, scratch, self.relaxation)


class Deviation(Phase):
    """Scaled deviations ``eps^j = a_j (s^j - s*^j)`` from a free state, at its pooling winners.

    ``eps^j <- a_j [sigma(g*^j + t^j / a_j) - s*^j]`` with ``t^j = sum over connections to k of w^T * U(eps^k) + sum
    over connections from i of (a_j / a_i) G(w * eps^i) - beta dL/ds^j(s* + eps / a)``, started at zero. Every node's
    eps is of order beta however small lambda and however deep the network. Stored in float16 it is multiplied by a
    power of two, which the iteration does not see: only the a_j and the forces have it.

    Of `free`, N samples with drives and winners, nothing else is looked at: ``s* = sigma(g*)``. The `tangent` is the
    limit beta -> 0, ``eps^j <- sigma'(g*^j) t^j`` with the loss gradient at s*: recurrent backpropagation.
    """

    drives_current = True  # all zero, as at the free state
    scales_drives = True

    def __init__(
        self,
        energy: HopfieldEnergy,
        memory: Memory,
        shape: PhaseShape,
        buffers: PhaseBuffers,
        free: State,
        nudges: Sequence[Nudge],
        betas: Sequence[float],
    ):
        strength = max((abs(weight) for _, weight, _ in nudges), default=1.0) * max(map(abs, betas))
        self.scale = memory.precision.scale(strength)
        divisors = [1 / self.scale] * len(energy.weights)
        super().__init__(energy, memory, shape, buffers, True, nudges, betas, divisors)
        self.weights = [self.scale * a for a in self.weights]
        self.form, self.tangent = shape.form, shape.form == "tangent"
        self.rest, self.slopes = free.drives, buffers.slopes or []
        self.winners = list(free.winners)
        if self.phases > 1:
            tiled = zip(free.winners, buffers.winners, strict=True)
            self.winners = [None if w is None else self._tile(w, out) for w, out in tiled]
        if self.tangent:
            for g, slope in zip(self.rest, self.slopes, strict=True):
                self.updates.slope(g, slope)
            for n, parts in buffers.term_parts.items():
                for part in parts:
                    self._put_force(n, part, buffers.force[n][part])

    def _arrays(self) -> list[Any]:
        return [*super()._arrays(), *self.winners, *self.rest]

    def _drive(self, connection: int, out: Any) -> None:
        node, ops = self.graph.below[connection], self.workspace.ops[connection]
        self.edges[connection].linear_drive(self.states[node - 1], out, self.winners[connection], ops)

    def _force(self, n: int, part: slice) -> Any:
        """Return the force on some rows: the tangent's is that at s*, which does not change."""
        if not self.tangent or n not in self._nudges:
            return super()._force(n, part)
        return self.buffers.force[n][part]

    def _at_rest(self, array: Any, part: slice) -> Any:
        """Return the rows of an array (N, ...) of the rest point that belong to a part: once, if it is all phases."""
        if part.stop - part.start > self.samples:
            return array
        return array[part.start % self.samples :][: part.stop - part.start]

    def _seen(self, n: int, part: slice, pool: int | None, dtype: Any) -> Any:
        """Return ``s* + eps / a``, s* in the tangent limit."""
        g, eps = self._at_rest(self.rest[n - 1], part), None if self.tangent else self.states[n - 1][part]
        return self._see(n, part.stop - part.start, pool, dtype, eps, 1 / self.weights[n - 1], g)

    def _update(self, n: int, part: slice, drive: Any, topdown: Any, residual: Any) -> None:
        shared = (self.states[n - 1][part], drive, topdown, self.feedback[n - 1], self._force(n, part))
        if self.tangent:
            slope = self._at_rest(self.slopes[n - 1], part)
            self.updates.tangents(*shared, slope, residual, self.buffers.scratch, self.relaxation)
        else:
            g = self._at_rest(self.rest[n - 1], part)
            self.updates.deviations(*shared, self.weights[n - 1], g, residual, self.buffers.scratch, self.relaxation)
