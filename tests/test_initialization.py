"""LSUV. Oracle: standard deviations taken apart from it; a linear drive needs one scaling, by 1 / its deviation."""

from __future__ import annotations

import numpy as np
import pytest

import cupyep as ep
from cupyep.errors import ConfigurationError
from cupyep.initialization import lsuv
from cupyep.models import unit_drives
from cupyep.weights import Plain, Standardized


class Chain:
    """A feed-forward chain of dense maps with ReLU: what `lsuv` asks for."""

    def __init__(self, rng, make, gains=(0.01, 3.0, 0.2), bias=0.0):
        sizes = [20, 30, 12, 8]
        self.x = rng.standard_normal((400, sizes[0]))
        self.hows = {str(n): make() for n in range(3)}
        self.parameters, self.asked = {}, []
        for n, (name, how) in enumerate(self.hows.items()):
            self.parameters[name] = how.parameters(gains[n] * rng.standard_normal(sizes[n : n + 2]))
        self.bias = bias * np.linspace(-1, 1, 8)

    def drive(self, name):
        self.asked.append(name)
        u = self.x
        for known in list(self.hows)[: int(name) + 1]:
            w = np.empty_like(self.parameters[known]["weight"])
            self.hows[known].forward(self.parameters[known], w)
            u = (u if known == "0" else np.maximum(u, 0)) @ w
        return u + self.bias if name == "2" else u

    def scale(self, name, factor):
        self.hows[name].scale(self.parameters[name], factor)


@pytest.mark.parametrize("make", [Plain, Standardized, lambda: Standardized(trained=False)])
def test_every_drive_has_unit_variance(rng, make):
    chain = Chain(rng, make)
    first = chain.drive("0").std()
    chain.asked.clear()
    factors = lsuv(chain.hows, chain.drive, chain.scale, tolerance=1e-9)
    assert chain.asked == ["0", "0", "1", "1", "2", "2"], "in order, one scaling each, and a look at what it did"
    np.testing.assert_allclose([chain.drive(name).std() for name in chain.hows], 1, rtol=1e-9)
    np.testing.assert_allclose(factors["0"], 1 / first, rtol=1e-12)


def test_what_is_within_tolerance_is_left_alone(rng):
    chain = Chain(rng, Plain)
    lsuv(chain.hows, chain.drive, chain.scale, tolerance=1e-9)
    for name in chain.hows:
        chain.scale(name, 1.01)
    assert lsuv(["0"], chain.drive, chain.scale, tolerance=0.02) == {"0": 1.0}


def test_a_bias_needs_several_scalings_and_may_be_too_large(rng):
    chain = Chain(rng, Plain, bias=0.9)
    before = chain.parameters["2"]["weight"].copy()
    factors = lsuv(chain.hows, chain.drive, chain.scale, tolerance=0.01, tries=30)
    np.testing.assert_allclose(chain.drive("2").std(), 1, atol=0.01)
    assert chain.asked.count("2") > 3
    np.testing.assert_allclose(chain.parameters["2"]["weight"], factors["2"] * before, rtol=1e-12)
    chain = Chain(rng, Plain, bias=5.0)
    with pytest.raises(ConfigurationError, match="drive of '2' has a standard deviation of .* on this batch after 4"):
        lsuv(chain.hows, chain.drive, chain.scale, tries=4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_drive_that_no_scaling_mends(rng, value):
    chain = Chain(rng, Plain)
    chain.parameters["1"]["weight"][...] = value
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ConfigurationError, match="drive of '1' has a standard deviation"),
    ):
        lsuv(chain.hows, chain.drive, chain.scale)


@pytest.mark.parametrize(("how", "message"), [({"tolerance": 0}, "tolerance must be"), ({"tries": 0}, "tries must be")])
def test_settings(how, message):
    with pytest.raises(ConfigurationError, match=message):
        lsuv([], None, None, **how)


def test_a_network_of_convolutions(rng, device):
    """Drives after pooling, by backpropagation's pass up through the network's own layers."""
    edges = [
        ep.Conv2d((8, 8, 3), 6, pooling="max"),
        ep.Conv2d((4, 4, 6), 8, pooling="average"),
        ep.Linear((2, 2, 8), 10),
    ]
    net = ep.Network(edges, classes=4, activation="relu", gain=[0.1, 4.0, 0.5], seed=3, device=device, feedback=1.0)
    images, learner = rng.standard_normal((64, 8, 8, 3)), ep.Backpropagation(net)
    layers = {f"layers.{n}": edge for n, edge in enumerate(edges, 1)}

    def drives():
        return dict(zip(layers, learner.settled(images).drives, strict=True))

    def scale(name, factor):
        weight = layers[name].weight
        weight *= factor

    before = {name: edge.weight.copy() for name, edge in layers.items()}
    factors = lsuv(layers, lambda name: drives()[name], scale)
    for name, drive in drives().items():
        np.testing.assert_allclose(net.device.to_numpy(drive).std(), 1, atol=1e-4)
        found = net.device.to_numpy(layers[name].weight) / net.device.to_numpy(before[name])
        np.testing.assert_allclose(found, factors[name], rtol=1e-5)


@pytest.mark.parametrize("weights", ["plain", "standardized"])
def test_a_builder_starts_from_data(rng, weights):
    """Every node of a residual graph but the one that an identity leads into; two connections scaled alike."""
    images = rng.standard_normal((32, 8, 8, 3)).astype(np.float32)
    options = {
        "input_shape": (8, 8, 3),
        "activation": "relu",
        "weights": weights,
        "feedback": 1.0,
        "device": "cpu",
        "seed": 1,
    }
    plain, net = (ep.build("8 8+8 16s+16", 5, **options, lsuv=given) for given in (None, images))
    drives = dict(zip(net.graph.names, ep.Backpropagation(net).settled(net.batch(images)).drives, strict=True))
    for name in ("conv1", "block1_1", "block2_1", "block2_2"):
        assert abs(drives[name].std() - 1) < 0.02, name
    trained = "gain" if weights == "standardized" else "weight"
    before, after = plain.parameters(), net.parameters()
    for path in (f"layers.block2_2.{trained}", f"layers.block2_2.block1_2.{trained}"):
        factor = after[path] / before[path]
        np.testing.assert_allclose(factor, factor.flat[0], rtol=1e-5)
    np.testing.assert_array_equal(after[f"layers.block1_2.{trained}"], before[f"layers.block1_2.{trained}"])
    if weights == "standardized":
        np.testing.assert_array_equal(after["layers.conv1.weight"], before["layers.conv1.weight"])
    with pytest.raises(ConfigurationError, match="use weights standardized"):
        unit_drives(ep.build("8 8", 5, **options | {"weights": "standardized-fixed"}), images)
