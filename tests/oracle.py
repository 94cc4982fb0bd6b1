"""The core once more, in plain float64 NumPy: the independent oracle of its tests.

Nothing here calls the package: networks are read for their sizes and parameters only. Convolutions loop over kernel
offsets, pooling over windows, gradients are finite differences. Slow, and short enough to be read against the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

EQUAL = 16 * np.finfo(float).eps  # relative to the larger of the maximum and 1: half of the package's margin


def conv(x, w, stride=1, padding=0):
    """Return the cross-correlation of x (N, H, W, C) with w (k, k, C, K), zero padded."""
    k = w.shape[0]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    ho, wo = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    out = np.zeros((len(x), ho, wo, w.shape[3]))
    for i in range(k):
        for j in range(k):
            seen = x[:, i : i + (ho - 1) * stride + 1 : stride, j : j + (wo - 1) * stride + 1 : stride]
            out += np.einsum("nyxc,ck->nyxk", seen, w[i, j])
    return out


def conv_adjoint(u, w, in_shape, stride=1, padding=0):
    """Return the transpose of `conv` applied to u (N, Ho, Wo, K): every output pays back to the inputs that it saw."""
    (height, width, _), k, (ho, wo) = in_shape, w.shape[0], u.shape[1:3]
    out = np.zeros((len(u), height + 2 * padding, width + 2 * padding, w.shape[2]))
    for i in range(k):
        for j in range(k):
            seen = out[:, i : i + (ho - 1) * stride + 1 : stride, j : j + (wo - 1) * stride + 1 : stride]
            seen += np.einsum("nyxk,ck->nyxc", u, w[i, j])
    return out[:, padding : padding + height, padding : padding + width]


def windows(shape, p):
    """Yield the (y, x) of every full window of a map, and the slices of its units."""
    for y in range(shape[0] // p):
        for x in range(shape[1] // p):
            yield y, x, slice(y * p, y * p + p), slice(x * p, x * p + p)


def shortfall(flat):
    """Return how far units (N, p * p, C) are below their maximum, relative to the larger of its size and 1."""
    most = flat.max(axis=1, keepdims=True)
    return (most - flat) / np.maximum(abs(most), 1)


def max_pool(u, p):
    """Return maxima and winners (offset dy * p + dx, the first in row order of those `EQUAL`) of u (N, H, W, C)."""
    n, c = len(u), u.shape[3]
    shape = (n, u.shape[1] // p, u.shape[2] // p, c)
    d, winners = np.zeros(shape), np.zeros(shape, int)
    for y, x, rows, columns in windows(u.shape[1:], p):
        flat = u[:, rows, columns].reshape(n, p * p, c)
        winners[:, y, x] = (shortfall(flat) <= EQUAL).argmax(axis=1)  # NumPy's argmax takes the first of equals
        d[:, y, x] = flat.max(axis=1)
    return d, winners


def average_pool(u, p):
    d = np.zeros((len(u), u.shape[1] // p, u.shape[2] // p, u.shape[3]))
    for y, x, rows, columns in windows(u.shape[1:], p):
        d[:, y, x] = u[:, rows, columns].sum(axis=(1, 2)) / p**2
    return d


def gather(u, p, winners):
    """Return the units of u at the winners."""
    out = np.zeros(winners.shape)
    for (n, y, x, c), offset in np.ndenumerate(winners):
        out[n, y, x, c] = u[n, y * p + offset // p, x * p + offset % p, c]
    return out


def scatter(s, p, winners, map_shape):
    """Return the map that holds s at the winners and zero elsewhere."""
    out = np.zeros((len(s), *map_shape))
    for (n, y, x, c), offset in np.ndenumerate(winners):
        out[n, y * p + offset // p, x * p + offset % p, c] = s[n, y, x, c]
    return out


def average_scatter(s, p, map_shape):
    out = np.zeros((len(s), *map_shape))
    for y, x, rows, columns in windows(map_shape, p):
        out[:, rows, columns] = s[:, y, x][:, None, None] / p**2
    return out


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(z, target, temperature=1.0):
    """Return ``T^2 CE(target, softmax(z / T))`` a sample."""
    return -(temperature**2) * (target * np.log(softmax(z / temperature))).sum(axis=1)


def squared_error(z, target, temperature=1.0):
    return ((z - target) ** 2).sum(axis=1) / 2


LOSSES = {"cross_entropy": cross_entropy, "squared_error": squared_error}

SIGMA = {
    "hard_sigmoid": lambda g: np.clip(g, 0, 1),
    "half_hard_sigmoid": lambda g: np.clip(g / 2, 0, 1),
    "relu6": lambda g: np.clip(g, 0, 6),
    "relu": lambda g: np.maximum(g, 0),
    "sigmoid": lambda g: 1 / (1 + np.exp(2 - 4 * g)),
    "tanh": np.tanh,
    "gelu": lambda g: g * expit(2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)),
    "identity": lambda g: g,
}

INVERSE = {
    "hard_sigmoid": lambda s: s,
    "half_hard_sigmoid": lambda s: 2 * s,
    "relu6": lambda s: s,
    "relu": lambda s: s,
    "sigmoid": lambda s: (2 + np.log(s / (1 - s))) / 4,
    "tanh": lambda s: np.log((1 + s) / (1 - s)) / 2,
    "identity": lambda s: s,
}

POTENTIAL = {  # integrals of INVERSE, each up to a constant
    "hard_sigmoid": lambda s: s**2 / 2,
    "half_hard_sigmoid": lambda s: s**2,
    "relu6": lambda s: s**2 / 2,
    "relu": lambda s: s**2 / 2,
    "sigmoid": lambda s: s / 2 + (s * np.log(s) + (1 - s) * np.log(1 - s)) / 4,
    "tanh": lambda s: ((1 + s) * np.log(1 + s) + (1 - s) * np.log(1 - s)) / 2,
    "identity": lambda s: s**2 / 2,
}


def _gelu_slope(g):
    c = 2 * np.sqrt(2 / np.pi)
    e = expit(c * (g + 0.044715 * g**3))
    return e + g * e * (1 - e) * c * (1 + 3 * 0.044715 * g**2)


SLOPE = {
    "hard_sigmoid": lambda g: 1.0 * ((g > 0) & (g < 1)),
    "half_hard_sigmoid": lambda g: 0.5 * ((g > 0) & (g < 2)),
    "relu6": lambda g: 1.0 * ((g > 0) & (g < 6)),
    "relu": lambda g: 1.0 * (g > 0),
    "sigmoid": lambda g: 4 * SIGMA["sigmoid"](g) * (1 - SIGMA["sigmoid"](g)),
    "tanh": lambda g: 1 - np.tanh(g) ** 2,
    "gelu": _gelu_slope,
    "identity": np.ones_like,
}

RANGE = {  # of sigma
    "hard_sigmoid": (0, 1),
    "half_hard_sigmoid": (0, 1),
    "relu6": (0, 6),
    "relu": (0, np.inf),
    "sigmoid": (0, 1),
    "tanh": (-1, 1),
    "gelu": (-0.17, np.inf),
    "identity": (-np.inf, np.inf),
}

KINKS = {"hard_sigmoid": (0, 1), "half_hard_sigmoid": (0, 2), "relu6": (0, 6), "relu": (0,)}


@dataclass
class Edge:
    """One edge; `stride` 0 marks a dense map."""

    weight: np.ndarray
    bias: np.ndarray
    in_shape: tuple
    stride: int = 0
    padding: int = 0
    pooling: str = "none"
    pool: int = 1

    def u(self, s):
        if not self.stride:
            return np.einsum("ni,ik->nk", s.reshape(len(s), -1), self.weight)
        return conv(s, self.weight, self.stride, self.padding)

    def drive(self, s):
        """Return d and winners."""
        u = self.u(s) + self.bias
        if self.pooling == "max":
            return max_pool(u, self.pool)
        return (average_pool(u, self.pool), None) if self.pooling == "average" else (u, None)

    def linear_drive(self, s, winners):
        u = self.u(s)
        if self.pooling == "max":
            return gather(u, self.pool, winners)
        return average_pool(u, self.pool) if self.pooling == "average" else u

    def gap(self, s):
        """Return how near any unit of a max-pooling window, but for those that tie, is to the maximum."""
        if self.pooling != "max" or self.pool == 1:
            return np.inf
        u, gap = self.u(s) + self.bias, np.inf
        for _, _, rows, columns in windows(u.shape[1:], self.pool):
            short = shortfall(u[:, rows, columns].reshape(len(u), -1, u.shape[3]))
            gap = min(gap, short[short > EQUAL].min(initial=np.inf))
        return gap

    def gradient(self, below, s, winners):
        """Return the derivatives of ``<s, d(below)>`` by weight and bias, winners fixed."""
        if not self.stride:
            return np.einsum("ni,nk->ik", below.reshape(len(below), -1), s), s.sum(axis=0)
        u = self.unpool(s, winners, self.u(np.zeros((1, *self.in_shape))).shape[1:])
        p, k, (ho, wo) = self.padding, self.weight.shape[0], u.shape[1:3]
        x, out = np.pad(below, ((0, 0), (p, p), (p, p), (0, 0))), np.zeros(self.weight.shape)
        for i in range(k):
            for j in range(k):
                rows = slice(i, i + (ho - 1) * self.stride + 1, self.stride)
                seen = x[:, rows, j : j + (wo - 1) * self.stride + 1 : self.stride]
                out[i, j] = np.einsum("nyxc,nyxk->ck", seen, u)
        return out, u.sum(axis=(0, 1, 2))

    def unpool(self, s, winners, map_shape):
        if self.pooling == "max":
            return scatter(s, self.pool, winners, map_shape)
        return average_scatter(s, self.pool, map_shape) if self.pooling == "average" else s

    def topdown(self, s, winners):
        if not self.stride:
            return np.einsum("nk,ik->ni", s, self.weight).reshape(len(s), *self.in_shape)
        map_shape = self.u(np.zeros((1, *self.in_shape))).shape[1:]
        return conv_adjoint(self.unpool(s, winners, map_shape), self.weight, self.in_shape, self.stride, self.padding)


@dataclass
class Term:
    """``weight * loss(matrix^T pool(s^layer) + bias, target)``; no matrix means the state itself."""

    layer: int
    loss: str
    target: np.ndarray
    weight: float = 1.0
    matrix: np.ndarray | None = None
    bias: float | np.ndarray = 0.0
    temperature: float = 1.0
    pool: int = 1

    def output(self, s):
        if self.pool > 1:
            s = average_pool(s, self.pool)
        flat = s.reshape(len(s), -1)
        return flat if self.matrix is None else np.einsum("ni,ik->nk", flat, self.matrix) + self.bias

    def error(self, s):
        """Return ``weight * dloss/doutput``."""
        z, t = self.output(s), self.temperature
        return self.weight * (z - self.target if self.loss == "squared_error" else t * (softmax(z / t) - self.target))

    def gradient(self, s):
        """Return the derivative of `value` by s."""
        error = self.error(s)
        back = error if self.matrix is None else np.einsum("nk,ik->ni", error, self.matrix)
        if self.pool == 1:
            return back.reshape(s.shape)
        pooled = (len(s), s.shape[1] // self.pool, s.shape[2] // self.pool, s.shape[3])
        return average_scatter(back.reshape(pooled), self.pool, s.shape[1:])

    def map_gradient(self, s):
        """Return the derivatives of the sum of `value` by matrix and bias."""
        flat = (average_pool(s, self.pool) if self.pool > 1 else s).reshape(len(s), -1)
        return np.einsum("ni,nk->ik", flat, self.error(s)), self.error(s).sum(axis=0)

    def value(self, s):
        return self.weight * LOSSES[self.loss](self.output(s), self.target, self.temperature)


class Oracle:
    """The network `net`, re-implemented; `parameters` (by path, NumPy) may replace its own."""

    def __init__(self, net, parameters=None, activation=None):
        to_numpy = net.device.to_numpy
        self.parameters = {path: np.array(to_numpy(p), np.float64) for path, p in net.parameters().items()}
        self.parameters.update(parameters or {})
        self.activation = activation or net.activation.name
        self.feedback = net.feedback
        self.loss = net.readout.criterion.name
        self.classes = net.classes
        self.edges = []
        for n, layer in enumerate(net.layers, 1):
            geometry = {}
            if hasattr(layer, "kernel"):
                geometry = {name: getattr(layer, name) for name in ("stride", "padding", "pooling", "pool")}
            weight, bias = self.parameters[f"layers.{n}.weight"], self.parameters[f"layers.{n}.bias"]
            self.edges.append(Edge(weight, bias, layer.in_shape, **geometry))
        self.depth = len(self.edges)
        self.scales = [self.feedback ** (n - self.depth) for n in range(1, self.depth + 1)]

    def zeros(self, samples):
        shapes = [self.edges[n + 1].in_shape for n in range(self.depth - 1)]
        top = self.edges[-1].drive(np.zeros((1, *self.edges[-1].in_shape)))[0].shape[1:]
        return [np.zeros((samples, *shape)) for shape in [*shapes, top]]

    def drives(self, x, layers):
        """Return (d^n, winners) of every edge."""
        return [edge.drive(below) for edge, below in zip(self.edges, [x, *layers[:-1]], strict=True)]

    def totals(self, x, layers):
        """Return g^n = d^n + lambda * top-down."""
        drives = self.drives(x, layers)
        g = [d.copy() for d, _ in drives]
        for n in range(self.depth - 1):
            g[n] += self.feedback * self.edges[n + 1].topdown(layers[n + 1], drives[n + 1][1])
        return g

    def settle(self, x, steps, layers=None):
        """Return the states after so many synchronous steps."""
        layers = self.zeros(len(x)) if layers is None else layers
        for _ in range(steps):
            layers = [SIGMA[self.activation](g) for g in self.totals(x, layers)]
        return layers

    def forward(self, x):
        """Return the states of the feed-forward network, without feedback."""
        layers = []
        for edge in self.edges:
            layers.append(SIGMA[self.activation](edge.drive(layers[-1] if layers else x)[0]))
        return layers

    def energy(self, x, layers, terms=(), beta=0.0):
        """Return F a sample: sum_n a_n (potential - <s, d>) + beta * loss."""
        total = np.zeros(len(x))
        for a, s, (d, _) in zip(self.scales, layers, self.drives(x, layers), strict=True):
            total += a * (POTENTIAL[self.activation](s) - s * d).reshape(len(x), -1).sum(axis=1)
        return total + beta * self.loss_value(layers, terms)

    def loss_value(self, layers, terms):
        return sum((term.value(layers[term.layer - 1]) for term in terms), np.zeros(len(layers[0])))

    def readout_term(self, labels):
        target = np.eye(self.classes)[labels]
        if self.loss == "squared_error":
            return Term(self.depth, "squared_error", target)
        return Term(
            self.depth,
            "cross_entropy",
            target,
            matrix=self.parameters["readout.weight"],
            bias=self.parameters["readout.bias"],
        )


def iterate(oracle, x, start, schedule, steps, warm, relaxation=1.0):
    """Return all states that a schedule goes through, as lists of layers; each half of a sweep counts.

    Every update but those of the last step goes `relaxation` times as far.
    """
    sigma, states = SIGMA[oracle.activation], [start]
    layers = [s.copy() for s in start]
    drives = [d for d, _ in oracle.drives(x, layers)]
    winners = [w for _, w in oracle.drives(x, layers)]
    feedback = [np.zeros_like(s) for s in layers]

    def from_below(n):
        drives[n], winners[n] = oracle.edges[n].drive(layers[n - 1] if n else x)

    def from_above(n):
        if n + 1 < oracle.depth:
            feedback[n] = oracle.feedback * oracle.edges[n + 1].topdown(layers[n + 1], winners[n + 1])

    def moved(n, g):
        return layers[n] + (1.0 if last else relaxation) * (sigma(g) - layers[n])

    def update(n):
        layers[n] = moved(n, drives[n] + feedback[n])

    everything = range(oracle.depth)
    for step in range(steps):
        last = step == steps - 1
        if schedule == "synchronous":
            layers[:] = [moved(n, g) for n, g in enumerate(oracle.totals(x, layers))]
        elif schedule == "evenodd":
            for n in [*everything[1::2], *everything[0::2]]:  # even layers counted from 1, then odd ones
                layers[n] = moved(n, oracle.totals(x, layers)[n])
        else:
            for down in (warm, not warm):
                for n in reversed(everything) if down else everything:
                    (from_above if down else from_below)(n)
                    update(n)
                states.append([s.copy() for s in layers])
            continue
        states.append([s.copy() for s in layers])
    return states


class Phase:
    """A phase step by step: free or nudged states (`rest` None), deviations or tangents from a `rest` point.

    `layers` are states, or scaled deviations ``eps^n = a_n (s^n - s*^n)``. `g` are the arguments of sigma at the last
    update and `winners` those of the last drive. `kink` and `tie` say how near any unit came to a clip boundary, and
    any that does not tie with the maximum of its window to it.
    """

    def __init__(self, oracle, x, start=None, terms=(), beta=0.0, rest=None, tangent=False):
        self.oracle, self.x, self.terms, self.beta, self.rest, self.tangent = oracle, x, terms, beta, rest, tangent
        cold = start is None or rest is not None
        self.warm = not cold or rest is not None
        self.layers = [s.copy() for s in (oracle.zeros(len(x)) if cold else start)]
        self.kink = self.tie = np.inf
        self.sigma, self.a = SIGMA[oracle.activation], oracle.scales
        self.g, self.drives, self.winners = ([None] * oracle.depth for _ in range(3))
        self.above = [np.zeros_like(s) for s in self.layers]
        for n in range(oracle.depth):
            self._from_below(n)

    def _from_below(self, n):
        edge = self.oracle.edges[n]
        if self.rest is None:
            below = self.layers[n - 1] if n else self.x
            self.drives[n], self.winners[n] = edge.drive(below)
            self.tie = min(self.tie, edge.gap(below))
        else:
            self.winners[n] = self.rest.winners[n]
            below = self.layers[n - 1] if n else np.zeros_like(self.x)
            self.drives[n] = self.oracle.feedback * edge.linear_drive(below, self.winners[n])

    def _from_above(self, n):
        if n + 1 < self.oracle.depth:
            edge = self.oracle.edges[n + 1]
            winners = edge.drive(self.layers[n])[1] if self.rest is None else self.rest.winners[n + 1]
            weight = self.oracle.feedback if self.rest is None else 1.0
            self.above[n] = weight * edge.topdown(self.layers[n + 1], winners)

    def state(self, n):
        """Return the state of layer n as the loss sees it."""
        if self.rest is None:
            return self.layers[n]
        s = self.sigma(self.rest.g[n])
        return s if self.tangent else s + self.layers[n] / self.a[n]

    def _new(self, n):
        force = -self.beta * sum((t.gradient(self.state(n)) for t in self.terms if t.layer == n + 1), 0.0)
        a = self.a[n]
        if self.rest is None:
            self.g[n] = self.drives[n] + self.above[n] + force / a
            self._note(self.g[n])
            return self.sigma(self.g[n])
        total, g = self.drives[n] + self.above[n] + force, self.rest.g[n]
        if self.tangent:
            return SLOPE[self.oracle.activation](g) * total
        self._note(g + total / a)
        if self.oracle.activation in KINKS:  # a difference of two clips would lose the digits of a small response
            scale = 2.0 if self.oracle.activation == "half_hard_sigmoid" else 1.0
            low, high = self.sigma(np.array([-np.inf, np.inf]))
            s = self.sigma(g)
            return np.clip((total + a * (g - scale * s)) / scale, a * (low - s), a * (high - s))
        return a * self._increment(g, total / a)

    def _increment(self, g, step):
        """Return ``sigma(g + step) - sigma(g)``: of a small step the integral of the slope, which keeps its digits."""
        points, weights = np.polynomial.legendre.leggauss(8)
        slope = SLOPE[self.oracle.activation]
        mean = sum(w / 2 * slope(g + step * (1 + t) / 2) for t, w in zip(points, weights, strict=True))
        return np.where(np.abs(step) < 0.05, step * mean, self.sigma(g + step) - self.sigma(g))

    def _note(self, g):
        for kink in KINKS.get(self.oracle.activation, ()):
            self.kink = min(self.kink, np.abs(g - kink).min())

    def _update(self, layers, relaxation):
        for n, new in [(n, self._new(n)) for n in layers]:
            self.layers[n] = self.layers[n] + relaxation * (new - self.layers[n])

    def run(self, schedule, steps, relaxation=1.0):
        """Do so many iterations, all but the last relaxed, and return self."""
        everything = range(self.oracle.depth)
        for step in range(steps):
            omega = 1.0 if step == steps - 1 else relaxation
            if schedule == "sweeps":
                for down in (self.warm, not self.warm):
                    for n in reversed(everything) if down else everything:
                        (self._from_above if down else self._from_below)(n)
                        self._update([n], omega)
                continue
            for group in [everything] if schedule == "synchronous" else [everything[1::2], everything[0::2]]:
                for n in group:
                    self._from_below(n)
                    self._from_above(n)
                self._update(group, omega)
        return self


def levels(s, top):
    """Return mean |s|, the share of units with |s| of 0.99 `top` or more, the share of channels never above 0.001."""
    size = np.abs(s).reshape(-1, s.shape[-1])
    return size.mean(), (size >= 0.99 * top).mean(), (size.max(axis=0) <= 0.001).mean()


def responses(free, phases):
    """Return the mean ``|s^n_+ - s^n_-|``, or ``|s^n_beta - s*^n|``, of every layer."""
    pairs = zip(phases[0].layers, phases[1].layers if len(phases) > 1 else free.layers, strict=True)
    if phases[0].rest is None:
        return [np.abs(a - b).mean() for a, b in pairs]
    divided = zip(pairs, free.oracle.scales, strict=True)
    return [np.abs(p - q if len(phases) > 1 else p).mean() / a for (p, q), a in divided]


def ep_gradients(free, phases):
    """Return the EP estimate of every edge's gradient, by path: DESIGN, section 2, in the form of the phases."""
    oracle, x, first = free.oracle, free.x, phases[0]
    span, result = (first.beta - (phases[1].beta if len(phases) > 1 else 0.0)) * len(x), {}
    for n, edge in enumerate(oracle.edges):
        if first.rest is None:
            parts = []
            for phase in (first, phases[1] if len(phases) > 1 else free):
                below = phase.layers[n - 1] if n else x
                parts.append(edge.gradient(below, phase.layers[n], edge.drive(below)[1]))
            weight, bias = (oracle.scales[n] * (p - q) for p, q in zip(*parts, strict=True))
        else:
            eps = [[np.zeros_like(x), *p.layers] for p in phases]
            e = [p - q for p, q in zip(*eps, strict=True)] if len(phases) > 1 else eps[0]
            ends = phases if len(phases) > 1 or first.tangent else [first, Phase(oracle, x, rest=free)]
            mean = [x, *(sum(p.state(m) for p in ends) / len(ends) for m in range(oracle.depth))]
            winners = free.winners[n]
            weight, bias = edge.gradient(mean[n], e[n + 1], winners)
            weight = weight + oracle.feedback * edge.gradient(e[n], mean[n + 1], winners)[0]
        result[f"layers.{n + 1}.weight"], result[f"layers.{n + 1}.bias"] = -weight / span, -bias / span
    return result


def finite_difference(function, array, step=1e-5, entries=None):
    """Return d function / d array by central differences, at all or the given flat `entries` (others NaN)."""
    gradient = np.full(array.size, np.nan)
    flat = array.reshape(-1)
    assert np.shares_memory(flat, array), "needs an array that can be changed in place"
    for i in range(array.size) if entries is None else entries:
        kept = flat[i]
        flat[i] = kept + step
        above = function()
        flat[i] = kept - step
        below = function()
        flat[i] = kept
        gradient[i] = (above - below) / (2 * step)
    return gradient.reshape(array.shape)


def relative_error(estimate, truth):
    return np.linalg.norm(np.asarray(estimate) - truth) / np.linalg.norm(truth)
