"""The network once more, differentiated by PyTorch: gradients of unrolled steps without finite differences.

The drive of a state is the derivative of the scalar Phi by it, taken by autograd as the field's own codes do; Phi reads
pooled units where they are largest. In float64.
"""

from __future__ import annotations

import numpy as np
import torch
from oracle import EQUAL, SIGMA

CLIPS = {"hard_sigmoid": (1, 0, 1), "half_hard_sigmoid": (0.5, 0, 1), "relu6": (1, 0, 6), "relu": (1, 0, None)}
SMOOTH = {
    "sigmoid": lambda g: torch.sigmoid(4 * g - 2),
    "tanh": torch.tanh,
    "gelu": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
    "identity": lambda g: g,
}
assert SIGMA.keys() == CLIPS.keys() | SMOOTH.keys()


def sigma(name, g):
    if name in SMOOTH:
        return SMOOTH[name](g)
    slope, low, high = CLIPS[name]
    return torch.clamp(slope * g, low, high)


def windows(u, p):
    n, height, width, c = u.shape
    parts = u[:, : height // p * p, : width // p * p].reshape(n, height // p, p, width // p, p, c)
    return parts.permute(0, 1, 3, 5, 2, 4).reshape(n, height // p, width // p, c, p * p)


def drive(edge, weight, bias, s):
    if not edge.stride:
        return s.reshape(len(s), -1) @ weight + bias
    u = torch.nn.functional.conv2d(
        s.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1).contiguous(), bias, edge.stride, edge.padding
    ).permute(0, 2, 3, 1)
    if edge.pooling == "none":
        return u
    u = windows(u, edge.pool)
    if edge.pooling == "average":
        return u.mean(dim=4)
    most = u.amax(dim=4, keepdim=True).detach()
    winners = (u >= most - EQUAL * most.abs().clamp(min=1)).int().argmax(dim=4, keepdim=True)
    return torch.gather(u, 4, winners)[..., 0]


def loss(term, parameters, path, s):
    if term.pool > 1:
        s = windows(s, term.pool).mean(dim=4)
    z, target = s.reshape(len(s), -1), torch.from_numpy(term.target)
    if term.matrix is not None:
        z = z @ parameters.get(f"{path}.weight", torch.from_numpy(term.matrix)) + parameters.get(f"{path}.bias", 0.0)
    if term.loss == "squared_error":
        return term.weight * ((z - target) ** 2).sum(dim=1) / 2
    t = term.temperature
    return -term.weight * t**2 * (target * torch.log_softmax(z / t, dim=1)).sum(dim=1)


def gradients(oracle, x, terms, parameters, steps=0, start=None):
    """Return the gradient of the mean loss by path: at the end of `steps` from `start`, or of a forward pass.

    `terms` are loss terms by path, `parameters` all that is trained.
    """
    parameters = {path: torch.tensor(np.asarray(p, float), requires_grad=True) for path, p in parameters.items()}
    x, layers = torch.from_numpy(x), []

    def drives(layers):
        pairs = zip(oracle.edges, [x, *layers[:-1]], strict=True)
        own = [(parameters[f"layers.{n}.weight"], parameters[f"layers.{n}.bias"]) for n in range(1, oracle.depth + 1)]
        return [drive(edge, *p, below) for (edge, below), p in zip(pairs, own, strict=True)]

    if start is None:
        for n, edge in enumerate(oracle.edges, 1):
            weight, bias = parameters[f"layers.{n}.weight"], parameters[f"layers.{n}.bias"]
            layers.append(sigma(oracle.activation, drive(edge, weight, bias, layers[-1] if layers else x)))
    else:
        layers = [torch.tensor(s, requires_grad=True) for s in start]
    for _ in range(steps):
        phi = sum(a * (s * d).sum() for a, s, d in zip(oracle.scales, layers, drives(layers), strict=True))
        total = torch.autograd.grad(phi, layers, create_graph=True)
        layers = [sigma(oracle.activation, g / a) for g, a in zip(total, oracle.scales, strict=True)]
    value = sum(loss(term, parameters, path, layers[term.layer - 1]).mean() for path, term in terms.items())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {path: np.zeros(p.shape) if g is None else g.numpy() for (path, p), g in pairs}


def graph_gradients(oracle, x, terms, parameters, steps=0, start=None):
    """Return what `gradients` does, of a `graph_oracle.GraphOracle`; `start` by name."""
    parameters = {path: torch.tensor(np.asarray(p, float), requires_grad=True) for path, p in parameters.items()}
    x = torch.from_numpy(x)

    def drive_into(name, s):
        total = torch.zeros((len(x), *oracle.shapes[name]), dtype=torch.float64)
        for link in oracle.into(name):
            weight = parameters.get(f"{link.path}.weight")
            bias = parameters.get(f"{link.path}.bias", torch.zeros(oracle.shapes[name][-1], dtype=torch.float64))
            own = s[link.below] if weight is None else drive(link.edge, weight, bias, s[link.below])
            total = total + own.reshape(total.shape)
        return total

    s = {"image": x} | {name: torch.tensor(state, requires_grad=True) for name, state in (start or {}).items()}
    if start is None:
        for name in oracle.names:
            s[name] = sigma(oracle.activation, drive_into(name, s))
    for _ in range(steps):
        phi = sum(oracle.a[name] * (s[name] * drive_into(name, s)).sum() for name in oracle.names)
        total = torch.autograd.grad(phi, [s[name] for name in oracle.names], create_graph=True)
        pairs = zip(oracle.names, total, strict=True)
        s = {"image": x} | {name: sigma(oracle.activation, g / oracle.a[name]) for name, g in pairs}
    value = sum(loss(term, parameters, path, s[term.layer]).mean() for path, term in terms.items())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {path: np.zeros(p.shape) if g is None else g.numpy() for (path, p), g in pairs}
