"""A small residual network: two blocks, one with an identity and one with a strided 1 x 1 skip, one max pooling."""

from __future__ import annotations

import cupyep as ep


def connections(shape=(8, 8, 3), classes=3, loss="cross_entropy", pooling="max"):
    """Return the connections; the nodes are stem, a, b, c, d and, with squared error, out."""
    stem = ep.Conv2d(shape, 4, pooling=pooling)
    low = stem.out_shape
    strided = ep.Conv2d(low, 6, stride=2)
    layers = [
        ep.Connection("image", "stem", stem),
        ep.Connection("stem", "a", ep.Conv2d(low, 4)),
        ep.Connection("a", "b", ep.Conv2d(low, 4)),
        ep.Connection("stem", "b", ep.Identity(low)),
        ep.Connection("b", "c", strided),
        ep.Connection("c", "d", ep.Conv2d(strided.out_shape, 6)),
        ep.Connection("b", "d", ep.Conv2d(low, 6, kernel=1, stride=2, padding=0, bias=False)),
    ]
    if loss == "squared_error":
        layers.append(ep.Connection("d", "out", ep.Linear(strided.out_shape, classes)))
    return layers


def residual(shape=(8, 8, 3), classes=3, *, loss="cross_entropy", pooling="max", **options):
    """Return the network, with `options` as `cupyep.Network` takes them."""
    return ep.Network(
        connections(shape, classes, loss, pooling), classes, loss=loss, device="cpu", **{"feedback": 1.0, **options}
    )


def build(arch, classes, input_shape, device, loss="cross_entropy", pooling="max", gain=None, width=1.0, **options):
    """Return the network as `cupyep.models.build` returns its own, whatever `arch` says: to stand in for it."""
    layers = connections(tuple(input_shape), classes, loss, pooling)
    return ep.Network(layers, classes, loss=loss, gain=gain or 0.8, device=device, **options)
