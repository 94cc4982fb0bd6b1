"""LSUV. Oracle: standard deviations by NumPy; a linear drive needs one scaling, by 1 / its deviation."""

from __future__ import annotations

import numpy as np
import pytest

import cupyep as ep
from cupyep import initialization
from cupyep.errors import ConfigurationError
from cupyep.initialization import lsuv


class Chain:
    """A network of dense maps with ReLU and images for it; its drives by NumPy alone."""

    def __init__(self, rng, weights="plain", bias=0.0):
        edges = [ep.Linear((20,), 30), ep.Linear((30,), 12), ep.Linear((12,), 8)]
        options = {"activation": "relu", "weights": weights, "device": "cpu", "precision": "float64"}
        self.net = ep.Network(edges, 4, gain=[0.01, 3.0, 0.2], seed=3, **options)
        self.x = rng.standard_normal((400, 20))
        self.net.parameters()["layers.3.bias"][...] = bias * np.linspace(-1, 1, 8)

    def drives(self):
        self.net.make_weights()
        drives, s = {}, self.x
        for name, edge in zip("123", self.net.layers, strict=True):
            drives[name] = s @ edge.weight + edge.bias
            s = np.maximum(drives[name], 0)
        return drives


@pytest.fixture
def passes(monkeypatch):
    """The passes up so far."""
    made, settled = [], ep.Backpropagation.settled
    monkeypatch.setattr(ep.Backpropagation, "settled", lambda *args: made.append(1) or settled(*args))
    return made


@pytest.mark.parametrize("weights", ["plain", "standardized"])
def test_every_drive_has_unit_variance(rng, weights, passes, monkeypatch):
    monkeypatch.setattr(initialization, "TOLERANCE", 1e-9)
    chain = Chain(rng, weights)
    first = chain.drives()["1"].std()
    factors = lsuv(chain.net, chain.x)
    assert len(passes) == 6, "one scaling each, and a look at what it did"
    np.testing.assert_allclose([drive.std() for drive in chain.drives().values()], 1, rtol=1e-9)
    np.testing.assert_allclose(factors["1"], 1 / first, rtol=1e-12)


def test_what_is_within_tolerance_is_left_alone(rng):
    chain = Chain(rng)
    lsuv(chain.net, chain.x)
    kept = {path: array.copy() for path, array in chain.net.parameters().items()}
    kept["layers.1.weight"] *= 1.01
    chain.net.load_parameters(kept)
    assert lsuv(chain.net, chain.x)["1"] == 1.0
    np.testing.assert_array_equal(chain.net.parameters()["layers.1.weight"], kept["layers.1.weight"])


def test_a_bias_needs_several_scalings_and_may_be_too_large(rng, passes, monkeypatch):
    monkeypatch.setattr(initialization, "TOLERANCE", 0.01)
    chain = Chain(rng, bias=0.9)
    before = chain.net.layers[2].weight.copy()
    monkeypatch.setattr(initialization, "TRIES", 30)
    factors = lsuv(chain.net, chain.x)
    np.testing.assert_allclose(chain.drives()["3"].std(), 1, atol=0.01)
    assert len(passes) > 2 + 2 + 3
    np.testing.assert_allclose(chain.net.layers[2].weight, factors["3"] * before, rtol=1e-12)
    chain = Chain(rng, bias=5.0)
    monkeypatch.setattr(initialization, "TRIES", 4)
    with pytest.raises(ConfigurationError, match="drive of '3' has a standard deviation of .* on this batch after 4"):
        lsuv(chain.net, chain.x)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_drive_that_no_scaling_mends(rng, value):
    chain = Chain(rng)
    chain.net.layers[1].weight[...] = value
    with pytest.raises(ConfigurationError, match="drive of '2' has a standard deviation"):
        lsuv(chain.net, chain.x)


def test_a_network_of_convolutions(rng, device):
    """Drives after pooling, by backpropagation's pass up through the network's own layers."""
    edges = [
        ep.Conv2d((8, 8, 3), 6, pooling="max"),
        ep.Conv2d((4, 4, 6), 8, pooling="average"),
        ep.Linear((2, 2, 8), 10),
    ]
    net = ep.Network(edges, classes=4, activation="relu", gain=[0.1, 4.0, 0.5], seed=3, device=device, feedback=1.0)
    images, learner = rng.standard_normal((64, 8, 8, 3)), ep.Backpropagation(net)
    before = [edge.weight.copy() for edge in edges]
    factors = lsuv(net, images)
    assert list(factors) == ["1", "2", "3"]
    drives = learner.settled(images).drives
    for edge, drive, weight, factor in zip(edges, drives, before, factors.values(), strict=True):
        np.testing.assert_allclose(device.to_numpy(drive).std(), 1, atol=1e-4)
        np.testing.assert_allclose(device.to_numpy(edge.weight) / device.to_numpy(weight), factor, rtol=1e-5)


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
    paths = (f"layers.block2_2.{trained}", f"layers.block2_2.block1_2.{trained}")
    one, other = (after[path] / before[path] for path in paths)
    assert abs(one.flat[0] - 1) > 0.05
    np.testing.assert_allclose(one, one.flat[0], rtol=1e-5)
    np.testing.assert_allclose(other, one.flat[0], rtol=1e-5)
    np.testing.assert_array_equal(after[f"layers.block1_2.{trained}"], before[f"layers.block1_2.{trained}"])
    if weights == "standardized":
        np.testing.assert_array_equal(after["layers.conv1.weight"], before["layers.conv1.weight"])
    with pytest.raises(ConfigurationError, match="use weights standardized"):
        lsuv(ep.build("8 8", 5, **options | {"weights": "standardized-fixed"}), images)
