"""Predictive coding as a second energy: what of the core serves any energy, and what it takes to add one.

``F(s) = sum_j 1/2 |s^j - sigma(sum over connections into j of d(s^i))|^2 + beta * sum_i weight_i L_i(s)`` (Whittington
& Bogacz 2017, in the form with sigma around the whole prediction). At beta = 0 its minimum is the feed-forward pass, so
equilibrium propagation by it estimates the gradient of backpropagation. Plain NumPy, classical form, no memory of its
own: graph, edges, programs, nudges and the settling loop are the package's.
"""

import numpy as np

from cupyep.memory.workspace import Memory
from cupyep.program import Drive, Update, Value


class PredictiveCoding:
    """The energy of the states of `net`, of whose graph, activation and precision it is made."""

    def __init__(self, net):
        self.graph, self.activation, self.precision, self.device = net.graph, net.activation, net.precision, net.device

    def ops(self, samples):
        return Memory(self.graph, self.device, self.precision).workspace(samples).ops

    def errors(self, g, s):
        """Return ``s - sigma(g)``, and what it says to the drive, ``sigma'(g) (s - sigma(g))``."""
        sigma, slope = np.empty_like(g), np.empty_like(g)
        self.activation.value(g, sigma)
        self.activation.slope(g, slope)
        return s - sigma, slope * (s - sigma)

    def drives(self, x, layers, ops):
        nodes, drives, winners = [x, *layers], [np.zeros_like(s) for s in layers], []
        for c, edge in enumerate(self.graph.edges):
            own = np.empty_like(nodes[self.graph.above[c]])
            winners.append(np.empty(own.shape, np.uint8) if edge.has_winners else None)
            edge.drive(nodes[self.graph.below[c]], own, winners[c], ops[c])
            drives[self.graph.above[c] - 1] += own
        return drives, winners

    def value(self, x, layers, nudges=(), beta=0.0):
        """Return F a sample, shape (B,)."""
        drives, _ = self.drives(x, layers, self.ops(len(x)))
        squares = (self.errors(g, s)[0].reshape(len(x), -1) ** 2 for g, s in zip(drives, layers, strict=True))
        losses = (weight * term.loss(layers[term.layer - 1], target) for term, weight, target in nudges)
        return sum(0.5 * square.sum(axis=1) for square in squares) + beta * sum(losses)

    def parameter_gradient(self, x, layers):
        """Return dF/dtheta, summed over the batch, by path."""
        ops, nodes, gradients = self.ops(len(x)), [x, *layers], {}
        drives, winners = self.drives(x, layers, ops)
        for c, (edge, path) in enumerate(zip(self.graph.edges, self.graph.paths, strict=True)):
            own = {name: np.zeros_like(array) for name, array in edge.parameters().items()}
            if own:
                below, above = self.graph.below[c], self.graph.above[c]
                sent = -self.errors(drives[above - 1], nodes[above])[1]
                edge.add_gradient(nodes[below], sent, winners[c], own["weight"], own.get("bias"), ops[c])
            gradients |= {f"{path}.{name}": array for name, array in own.items()}
        return gradients


class Phase:
    """Descent on F: ``s^j <- s^j - omega dF/ds^j``, at omega = 1 ``sigma(g^j) + top-down input - beta dL/ds^j``.

    What a connection sends down is not the state above, as in a Hopfield network, but its error, of when it was
    updated last. At rest nothing is older than anything else, so that every program comes to the same rest.
    """

    scale, relaxation, drives_current, host = 1.0, 1.0, False, staticmethod(np.asarray)

    def __init__(self, energy, program, x, start, nudges=(), beta=0.0):
        self.energy, self.graph, self.program, self.nudges = energy, energy.graph, program, nudges
        self.label, self.betas = energy.graph.label, np.full(len(x), beta)
        self.nodes, self.ops = [x, *(s.copy() for s in start)], energy.ops(len(x))
        self.sent = [np.zeros_like(s) for s in self.nodes]
        drives, self.winners = energy.drives(x, [np.zeros_like(s) for s in start], self.ops)
        fixed = (n for n, into in enumerate(self.graph.into) if into and not any(self.graph.below[c] for c in into))
        self.values = {Value("constant", n): drives[n - 1] for n in fixed}
        self.residual = np.zeros((len(start), len(x)))

    def run(self, instructions, measure=False):
        for instruction in instructions:
            if isinstance(instruction, Update):
                self.update(instruction, measure)
                continue
            c, out = instruction.connection, instruction.out
            below, above = self.graph.below[c], self.graph.above[c]
            if isinstance(instruction, Drive):
                product = np.empty_like(self.nodes[above])
                self.graph.edges[c].drive(self.nodes[below], product, self.winners[c], self.ops[c])
            else:
                product = np.empty_like(self.nodes[below])
                self.graph.edges[c].topdown(self.sent[above], self.winners[c], product, self.ops[c])
            self.values[out] = self.values[out] + product if instruction.add else product

    def update(self, instruction, measure):
        n, s = instruction.node, self.nodes[instruction.node]
        g, topdown = (self.values.get(value, np.zeros_like(s)) for value in (instruction.drive, instruction.topdown))
        change = topdown - self.energy.errors(g, s)[0]
        for term, weight, target in self.nudges:
            if term.layer == n:
                term.add_force(s, target, -weight * self.betas, change)
        s += self.relaxation * change
        self.sent[n] = self.energy.errors(g, s)[1]
        if instruction.keep is not None:
            self.values[Value("kept", n)] = self.values[instruction.keep]
        if measure:
            self.residual[n - 1] += ((self.relaxation * change) ** 2).reshape(len(s), -1).mean(axis=1)

    def repeat(self, name, work):
        work()

    def remember(self):
        self.remembered = [s.copy() for s in self.nodes]

    def distance_from_remembered(self):
        return max(abs(now - then).max() for now, then in zip(self.nodes, self.remembered, strict=True))
