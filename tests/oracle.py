"""The core once more, in plain float64 NumPy: the independent oracle of its tests.

Nothing here calls the package: networks are read for their sizes and parameters only. Convolutions loop over kernel
offsets, pooling over windows, gradients are finite differences. Slow, and short enough to be read against the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit


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


def max_pool(u, p):
    """Return maxima and winners (offset dy * p + dx, ties to the first in row order) of u (N, H, W, C)."""
    n, c = len(u), u.shape[3]
    shape = (n, u.shape[1] // p, u.shape[2] // p, c)
    d, winners = np.zeros(shape), np.zeros(shape, int)
    for y, x, rows, columns in windows(u.shape[1:], p):
        flat = u[:, rows, columns].reshape(n, p * p, c)
        winners[:, y, x] = flat.argmax(axis=1)  # NumPy's argmax takes the first of equals
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
