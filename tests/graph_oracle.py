"""A network as a graph, once more: plain float64 NumPy over named nodes, after DESIGN, section 2.

The independent oracle of graphs, as `oracle.Oracle` is of chains: phases of all forms and schedules, energy, EP
gradients, BPTT and BP. Networks are read for names, sizes and parameters; depths, weights a_j and orders of update are
made here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from oracle import KINKS, POTENTIAL, SIGMA, SLOPE, Edge, Term
from small import signal_terms

IMAGE = "image"


class Same:
    """An identity."""

    def drive(self, s):
        return s, None

    def linear_drive(self, s, winners):
        return s

    topdown = linear_drive

    def gap(self, s):
        return np.inf

    def gradient(self, below, s, winners):
        return None, None


class Link:
    """A connection: names of its nodes, path of its parameters, an edge that computes."""

    def __init__(self, below, above, path, edge, shape_below, shape_above, has_bias):
        self.below, self.above, self.path, self.edge, self.has_bias = below, above, path, edge, has_bias
        self.shape_below, self.shape_above = shape_below, shape_above

    def _shaped(self, s, shape):
        return s.reshape(len(s), *shape)

    def drive(self, s):
        d, winners = self.edge.drive(s)
        return self._shaped(d, self.shape_above), winners

    def linear_drive(self, s, winners):
        return self._shaped(self.edge.linear_drive(s, winners), self.shape_above)

    def topdown(self, s, winners):
        return self._shaped(self.edge.topdown(s, winners), self.shape_below)

    def gradient(self, below, s, winners):
        """Return the derivatives of ``<s, d(below)>`` by parameter path."""
        weight, bias = self.edge.gradient(below, s, winners)
        if weight is None:
            return {}
        return {f"{self.path}.weight": weight} | ({f"{self.path}.bias": bias} if self.has_bias else {})


class GraphOracle:
    """The network `net`, re-implemented; `parameters` (by path, NumPy) may replace its own."""

    def __init__(self, net, parameters=None):
        to_numpy = net.device.to_numpy
        self.parameters = {path: np.array(to_numpy(p), np.float64) for path, p in net.parameters().items()}
        self.parameters.update(parameters or {})
        self.activation = net.activation.name
        self.sigma, self.slope = SIGMA[self.activation], SLOPE[self.activation]
        self.loss, self.classes, self.feedback = net.readout.criterion.name, net.classes, net.feedback
        self.shapes = {IMAGE: net.input_shape}
        for c in net.graph.connections:
            self.shapes[c.above] = c.edge.out_shape
        self.links, seen = [], set()
        for c in net.graph.connections:
            path = f"layers.{c.above}.{c.below}" if c.above in seen else f"layers.{c.above}"
            seen.add(c.above)
            self.links.append(self._link(c, path))
        self.depths = {name: self._depth(name) for name in self.shapes}
        self.names = sorted(seen, key=lambda name: (self.depths[name], name))
        self.numbers = list(net.graph.names)  # how the package numbers them, to compare
        self.colours = [[net.graph.names[node - 1] for node in colour] for colour in net.graph.colours]
        deepest = max(self.depths.values())
        self.a = {name: self.feedback ** -(deepest - self.depths[name]) for name in self.names}
        self.last = next(name for name in self.names if not self.above(name))

    def _link(self, c, path):
        ends = self.shapes[c.below], self.shapes[c.above]
        if f"{path}.weight" not in self.parameters:
            return Link(c.below, c.above, path, Same(), *ends, False)
        weight, geometry = self.parameters[f"{path}.weight"], {}
        bias = self.parameters.get(f"{path}.bias", np.zeros(weight.shape[-1]))
        if hasattr(c.edge, "kernel"):
            geometry = {name: getattr(c.edge, name) for name in ("stride", "padding", "pooling", "pool")}
        edge = Edge(weight, bias, c.edge.in_shape, **geometry)
        return Link(c.below, c.above, path, edge, *ends, f"{path}.bias" in self.parameters)

    def _depth(self, name):
        return max((1 + self._depth(link.below) for link in self.links if link.above == name), default=0)

    def into(self, name):
        return [link for link in self.links if link.above == name]

    def above(self, name):
        return [link for link in self.links if link.below == name]

    def ratio(self, link):
        """Return ``a_above / a_below``, by which top-down inputs and drives of deviations are multiplied."""
        return 0.0 if link.below == IMAGE else self.a[link.above] / self.a[link.below]

    def zeros(self, samples):
        return {name: np.zeros((samples, *self.shapes[name])) for name in self.names}

    def drive(self, name, s):
        """Return the sum of the drives into a node; `s` holds the image too."""
        return sum(link.drive(s[link.below])[0] for link in self.into(name))

    def energy(self, x, states, terms=(), beta=0.0):
        """Return F a sample."""
        total, s = np.zeros(len(x)), states | {IMAGE: x}
        for name in self.names:
            own = POTENTIAL[self.activation](s[name]) - s[name] * self.drive(name, s)
            total += self.a[name] * own.reshape(len(x), -1).sum(axis=1)
        return total + beta * self.loss_value(states, terms)

    def loss_value(self, states, terms):
        return sum(term.value(states[term.layer]) for term in terms)

    def forward(self, x):
        s = {IMAGE: x}
        for name in self.names:
            s[name] = self.sigma(self.drive(name, s))
        return {name: s[name] for name in self.names}

    def settle(self, x, steps, states=None):
        """Return the states after so many synchronous steps."""
        return GraphPhase(self, x, states).run("synchronous", steps).states

    def terms(self, net, batch, signals=(), parameters=None):
        """Return the loss of a nudge by path, its terms at named nodes."""
        target, own = np.eye(self.classes)[batch.labels], self.parameters
        readout = {"matrix": own["readout.weight"], "bias": own["readout.bias"]} if self.loss != "squared_error" else {}
        names = [net.graph.names[n - 1] for signal in signals for n in signal.layers]
        paths = [f"signals.{i}.layer{n}" for i, signal in enumerate(signals) for n in signal.layers]
        found = zip(signal_terms(net, batch, signals, parameters), names, strict=True)
        terms = [Term(self.last, self.loss, target, **readout), *(replace(term, layer=name) for term, name in found)]
        return dict(zip(["readout", *paths], terms, strict=True))


class GraphPhase:
    """A phase step by step: states (`rest` None), or scaled deviations and tangents from a `rest` point.

    `states` are by name; `g` are the arguments of sigma at the last update, `winners` a list, those of the last drive
    of each link. `kink` and `tie` say how near any unit came to a clip boundary or to the maximum of its window.
    """

    def __init__(self, oracle, x, start=None, terms=(), beta=0.0, rest=None, tangent=False):
        self.oracle, self.x, self.terms, self.beta, self.rest, self.tangent = oracle, x, terms, beta, rest, tangent
        self.warm = start is not None or rest is not None
        zeros = oracle.zeros(len(x))
        self.states = {name: s.copy() for name, s in (zeros if start is None else start).items()}
        self.kink = self.tie = np.inf
        self.g, self.winners = {}, [None] * len(oracle.links)
        self.old_drive = {name: self._drive(name) for name in oracle.names} if self.rest is None else dict(zeros)
        self.old_topdown = dict(zeros)

    def _below(self, link):
        return self.x if link.below == IMAGE else self.states[link.below]

    def _drive(self, name):
        total = 0.0
        for c, link in enumerate(self.oracle.links):
            if link.above != name:
                continue
            if self.rest is None:
                own, self.winners[c] = link.drive(self._below(link))
                self.tie = min(self.tie, link.edge.gap(self._below(link)))
            else:
                self.winners[c] = self.rest.winners[c]
                if link.below == IMAGE:
                    continue
                own = self.oracle.ratio(link) * link.linear_drive(self.states[link.below], self.winners[c])
            total = total + own
        return total if np.ndim(total) else np.zeros_like(self.states[name])

    def _topdown(self, name):
        total = np.zeros_like(self.states[name])
        for c, link in enumerate(self.oracle.links):
            if link.below == name:
                winners = link.drive(self.states[name])[1] if self.rest is None else self.rest.winners[c]
                weight = self.oracle.ratio(link) if self.rest is None else 1.0
                total += weight * link.topdown(self.states[link.above], winners)
        return total

    def state(self, name):
        """Return the state of a node as the loss sees it."""
        if self.rest is None:
            return self.states[name]
        s = self.oracle.sigma(self.rest.g[name])
        return s if self.tangent else s + self.states[name] / self.oracle.a[name]

    def _new(self, name, drive, topdown):
        oracle, a = self.oracle, self.oracle.a[name]
        force = -self.beta * sum((t.gradient(self.state(name)) for t in self.terms if t.layer == name), 0.0)
        if self.rest is None:
            self.g[name] = drive + topdown + force / a
            self._note(self.g[name])
            return oracle.sigma(self.g[name])
        t, g = drive + topdown + force, self.rest.g[name]
        if self.tangent:
            return oracle.slope(g) * t
        self._note(g + t / a)
        if oracle.activation in KINKS:  # a difference of two clips would lose the digits of a small response
            gain = 0.5 if oracle.activation == "half_hard_sigmoid" else 1.0
            s, (low, high) = oracle.sigma(g), oracle.sigma(np.array([-np.inf, np.inf]))
            return np.clip(gain * t + a * (gain * g - s), a * (low - s), a * (high - s))
        return a * self._increment(g, t / a)

    def _increment(self, g, step):
        """Return ``sigma(g + step) - sigma(g)``: of a small step the integral of the slope."""
        points, weights = np.polynomial.legendre.leggauss(8)
        mean = sum(w / 2 * self.oracle.slope(g + step * (1 + t) / 2) for t, w in zip(points, weights, strict=True))
        return np.where(np.abs(step) < 0.05, step * mean, self.oracle.sigma(g + step) - self.oracle.sigma(g))

    def _note(self, g):
        for kink in KINKS.get(self.oracle.activation, ()):
            self.kink = min(self.kink, np.abs(g - kink).min())

    def _move(self, name, new, omega):
        self.states[name] = self.states[name] + omega * (new - self.states[name])

    def run(self, schedule, steps, relaxation=1.0):
        """Do so many iterations, all but the last relaxed, and return self."""
        names = self.oracle.names
        groups = [names] if schedule == "synchronous" else self.oracle.colours
        for step in range(steps):
            omega = 1.0 if step == steps - 1 else relaxation
            if schedule == "sweeps":
                for down in (self.warm, not self.warm):
                    self._sweep(down, omega)
                continue
            for group in groups:  # all of a group from what was there before it
                new = {name: self._new(name, self._drive(name), self._topdown(name)) for name in group}
                for name in group:
                    self._move(name, new[name], omega)
        return self

    def _sweep(self, down, omega):
        names = self.oracle.names
        for name in reversed(names) if down else names:
            if down:
                self.old_topdown[name] = self._topdown(name)
            else:
                self.old_drive[name] = self._drive(name)
            self._move(name, self._new(name, self.old_drive[name], self.old_topdown[name]), omega)


def ep_gradients(free, phases):
    """Return the EP estimate of every connection's gradient, by path, in the form of the phases."""
    oracle, x, first, result = free.oracle, free.x, phases[0], {}
    span = (first.beta - (phases[1].beta if len(phases) > 1 else 0.0)) * len(x)
    for c, link in enumerate(oracle.links):
        parts = {}
        if first.rest is None:
            for sign, phase in ((1, first), (-1, phases[1] if len(phases) > 1 else free)):
                s = phase.states | {IMAGE: x}
                found = link.gradient(s[link.below], s[link.above], link.drive(s[link.below])[1])
                for path, gradient in found.items():
                    parts[path] = parts.get(path, 0.0) + sign * oracle.a[link.above] * gradient
        else:
            at_rest = {name: oracle.sigma(free.g[name]) for name in oracle.names}
            ends = [{name: p.state(name) for name in oracle.names} for p in phases]
            ends += [at_rest] if len(phases) == 1 and not first.tangent else []
            m = {name: sum(end[name] for end in ends) / len(ends) for name in oracle.names} | {IMAGE: x}
            e = {n: first.states[n] - (phases[1].states[n] if len(phases) > 1 else 0.0) for n in oracle.names}
            parts = link.gradient(m[link.below], e[link.above], free.winners[c])
            if link.below != IMAGE and parts:
                more = link.gradient(e[link.below], m[link.above], free.winners[c])[f"{link.path}.weight"]
                parts[f"{link.path}.weight"] = parts[f"{link.path}.weight"] + oracle.ratio(link) * more
        result |= {path: -gradient / span for path, gradient in parts.items()}
    return result


def bptt_gradients(oracle, x, start, steps, terms):
    """Return the gradient of the mean loss after `steps` synchronous steps from `start`, by path of connections."""
    history, s = [], start
    for _ in range(steps):
        phase = GraphPhase(oracle, x, s).run("synchronous", 1)
        history.append((s | {IMAGE: x}, phase.g, phase.winners))
        s = phase.states
    mu = {n: sum((t.gradient(s[n]) for t in terms if t.layer == n), np.zeros_like(s[n])) for n in oracle.names}
    result = {}
    for s, g, winners in reversed(history):
        q = {name: mu[name] * oracle.slope(g[name]) for name in oracle.names}
        mu = {name: np.zeros_like(q[name]) for name in oracle.names}
        for link, its in zip(oracle.links, winners, strict=True):
            found = link.gradient(s[link.below], q[link.above], its)
            if link.below != IMAGE:
                ratio = oracle.ratio(link)
                mu[link.below] += link.topdown(q[link.above], its)
                mu[link.above] += ratio * link.linear_drive(q[link.below], its)
                if found:
                    more = link.gradient(q[link.below], s[link.above], its)[f"{link.path}.weight"]
                    found[f"{link.path}.weight"] = found[f"{link.path}.weight"] + ratio * more
            for path, gradient in found.items():
                result[path] = result.get(path, 0.0) + gradient / len(x)
    return result
