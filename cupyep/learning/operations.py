"""The operations of learning, counted from the programs that settle: a multiply and an add are two.

Those of the large products, without the readout's and the signals'.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from cupyep.batch import Batch
from cupyep.learning.bptt import BackpropagationThroughTime
from cupyep.learning.equilibrium import EquilibriumPropagation
from cupyep.learning.gradients import Gradients
from cupyep.learning.learner import Learner, StepResult
from cupyep.network import Network
from cupyep.program import Instruction, Update, make_program
from cupyep.state import State


class Operations:
    """Counts the operations of phases and steps of a network with a `batch` of so many images.

    With `done` what is done is counted, and not the operations of direct convolutions: Winograd's algorithm does fewer,
    and where it is chosen depends on the batch.
    """

    def __init__(self, network: Network, batch: int, done: bool = False):
        self.graph = network.graph
        self.edges, self.pairs = (_of_edges(network, size, done) for size in (batch, 2 * batch))
        self.first = sum(self.edges[c] for c in self.graph.out_of[0])
        self.rest = sum(self.edges) - self.first

    def _of(self, instructions: Iterable[Instruction], products: Sequence[int]) -> int:
        """Return the operations of instructions; the drive from the image is constant, and only copied."""
        connections = (each.connection for each in instructions if not isinstance(each, Update))
        return sum(products[c] for c in connections if self.graph.below[c])

    def settle_step(self, schedule: str = "synchronous") -> int:
        """Return the operations of one iteration."""
        return self._of(make_program(self.graph, schedule, False, True).body, self.edges)

    def free_phase(self, steps: int, schedule: str = "synchronous") -> int:
        """Return the operations of a free phase from zeros."""
        return self.first + steps * self.settle_step(schedule)

    def ep_step(
        self, free_steps: int, nudged_steps: int, form: str, schedule: str = "synchronous", phases: int = 2
    ) -> int:
        """Return the operations of free phase, nudged phases and gradient of `EquilibriumPropagation`.

        `form` is that of `Network.settle_nudged`; of `phases`, 1 or 2 nudged ones, the tangent form has one.
        """
        classical, two = form == "classical", phases == 2 and form != "tangent"
        products, program = self.pairs if two else self.edges, make_program(self.graph, schedule, True, classical)
        settled = self.free_phase(free_steps, schedule) + nudged_steps * self._of(program.body, products)
        if not classical:
            return settled + self.first + 2 * self.rest
        # Winners are those of the nudged states themselves, found for the gradient; of one phase also of the free one.
        found = sum(products[c] for c, edge in enumerate(self.graph.edges) if edge.has_winners and self.graph.below[c])
        return settled + self.first + self._of(program.start, products) + (found + sum(products)) * (1 if two else 2)

    def bp_step(self) -> int:
        """Return the operations of a drive, a gradient and, but for the image's, a top-down product a connection."""
        return 2 * self.first + 3 * self.rest

    def bptt_step(self, free_steps: int, unrolled_steps: int, schedule: str = "synchronous") -> int:
        """Return the operations of `BackpropagationThroughTime`.

        A step back takes two gradients and two products a connection, of one from the image a gradient.
        """
        back = unrolled_steps * (self.first + 4 * self.rest)
        return self.free_phase(free_steps, schedule) + self.free_phase(unrolled_steps) + back

    def step(self, learner: Learner, free_steps: int | None = None, nudged_steps: int | None = None) -> int:
        """Return the operations of a step of `learner` with this batch, in one part; with its own numbers of steps."""
        if isinstance(learner, EquilibriumPropagation):
            free, nudged = free_steps or learner.free_steps, nudged_steps or learner.nudged_steps
            return self.ep_step(free, nudged, learner.form, learner.schedule, 2 if learner.scheme == "centered" else 1)
        if isinstance(learner, BackpropagationThroughTime):
            return self.bptt_step(free_steps or learner.free_steps, learner.unrolled_steps, learner.schedule)
        return self.bp_step()

    def prediction(self, learner: Learner, free_steps: int | None = None) -> int:
        """Return the operations of settling where `learner` predicts from."""
        if isinstance(learner, EquilibriumPropagation):
            return self.free_phase(free_steps or learner.free_steps, learner.schedule)
        if isinstance(learner, BackpropagationThroughTime):
            free = self.free_phase(free_steps or learner.free_steps, learner.schedule)
            return free + self.free_phase(learner.unrolled_steps)
        return self.first + self.rest


def _of_edges(network: Network, batch: int, done: bool) -> list[int]:
    if done:
        return [ops.flops * batch for ops in network.memory.workspace(batch).ops]
    return [edge.flops() * batch for edge in network.layers]


class OperationCounter:
    """Counts the operations of the steps and predictions that a learner does from now on, as long as its phases are.

    Where a tolerance ends the free phase of BPTT, those of all its steps. What only looks at a network (a checkup) is
    not counted. `operations` is the count so far; it may be set back.
    """

    def __init__(self, learner: Learner):
        self.operations = 0
        self._lock = threading.Lock()  # parts of a batch are counted by several threads
        self._of_batch = functools.cache(functools.partial(Operations, learner.network))
        add, settled = learner._add, learner.settled

        def counted_add(gradients: Gradients, part: Batch, total: int, draw: Any) -> StepResult:
            result = add(gradients, part, total, draw)
            steps = (result.free.steps, result.nudged.steps) if result.free and result.nudged else ()
            self._count(self._of_batch(len(part)).step(learner, *steps))
            return result

        def counted_settled(batch: Batch) -> State:
            state = settled(batch)
            steps = state.stats.steps if state.stats and isinstance(learner, EquilibriumPropagation) else None
            self._count(self._of_batch(len(state.layers[0])).prediction(learner, steps))
            return state

        learner._add, learner.settled = counted_add, counted_settled  # type: ignore[method-assign]

    def _count(self, operations: int) -> None:
        with self._lock:
            self.operations += operations
