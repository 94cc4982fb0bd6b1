"""The energy. Oracle: the formula written out in oracle.py, and finite differences of the value."""

import numpy as np
import pytest
from oracle import INVERSE, Oracle, finite_difference
from residual import residual
from small import batch_of, network, oracle_terms, signals_of

import cupyep as ep

BETA = 0.35


def random_states(net, samples=3):
    """Return states well inside the range, on the host and on the device."""
    generator = np.random.default_rng(7)
    host = [generator.uniform(0.2, 0.8, (samples, *shape)) for shape in net.state_shapes]
    return host, [net.device.asarray(s) for s in host]


def case(kind, device, loss, pooling, feedback, signal, activation="sigmoid"):
    net = network(kind, device, loss=loss, pooling=pooling, feedback=feedback, activation=activation)
    batch, signals = batch_of(net), signals_of(signal)
    return net, batch, net.nudges(batch, signals), oracle_terms(net, batch, signals)


CASES = [
    ("conv", "cross_entropy", "max", 1.0, "plain"),
    ("conv", "cross_entropy", "average", 0.3, "le"),
    ("conv", "squared_error", "max", 0.3, "kd"),
    ("conv", "squared_error", "average", 1.0, "le"),
    ("dense", "cross_entropy", "none", 0.3, "kd"),
    ("dense", "squared_error", "none", 1.0, "plain"),
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("activation", ["sigmoid", "hard_sigmoid", "half_hard_sigmoid"])
def test_value_is_the_formula(device, options, activation):
    kind, loss, pooling, feedback, signal = options
    net, batch, nudges, terms = case(kind, device, loss, pooling, feedback, signal, activation)
    host, layers = random_states(net)
    oracle, images = Oracle(net), net.device.to_numpy(batch.images)
    for beta in (0.0, BETA, -BETA):
        found = net.device.to_numpy(net.energy.value(batch.images, layers, nudges, beta))
        expected = oracle.energy(images, host, terms, beta)
        if activation == "sigmoid":  # its potential is defined up to a constant
            shift = (found - expected)[0]
            np.testing.assert_allclose(found - expected, shift, rtol=1e-10)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("options", CASES)
def test_value_takes_a_beta_a_sample(device, options):
    net, batch, nudges, terms = case(options[0], device, *options[1:])
    host, layers = random_states(net)
    betas = np.array([0.5, -0.2, 0.1])
    with_nudge = net.energy.value(batch.images, layers, nudges, net.device.asarray(betas))
    without = net.energy.value(batch.images, layers)
    expected = betas * sum(term.value(host[term.layer - 1]) for term in terms)
    np.testing.assert_allclose(net.device.to_numpy(with_nudge - without), expected, rtol=1e-9)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "hard_sigmoid", "half_hard_sigmoid"])
def test_state_gradient(device, options, activation):
    """-dF/ds = force - a sigma^-1(s), with the force of readout and signals in it."""
    kind, loss, pooling, feedback, signal = options
    net, batch, nudges, _ = case(kind, device, loss, pooling, feedback, signal, activation)
    host, layers = random_states(net)
    energy = net.energy
    forces = energy.force(batch.images, layers, nudges, BETA)

    def value():
        return float(energy.value(batch.images, [net.device.asarray(s) for s in host], nudges, BETA).sum())

    generator = np.random.default_rng(0)
    for n, force in enumerate(forces):
        entries = generator.choice(host[n].size, min(host[n].size, 12), replace=False)
        numeric = finite_difference(value, host[n], 1e-5, entries).ravel()[entries]
        a = feedback ** -(net.depth - n - 1)
        expected = net.device.to_numpy(force).ravel()[entries] - a * INVERSE[activation](host[n].ravel()[entries])
        np.testing.assert_allclose(-numeric, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", CASES)
def test_parameter_gradient(device, options):
    net, batch, _, _ = case(options[0], device, *options[1:])
    _, layers = random_states(net)
    energy = net.energy
    gradients = energy.parameter_gradient(batch.images, layers)
    assert set(gradients) == {path for path in net.parameters() if not path.startswith("readout")}
    generator = np.random.default_rng(0)
    for path, gradient in gradients.items():
        parameter = net.parameters()[path]
        host = np.array(net.device.to_numpy(parameter))

        def value(parameter=parameter, host=host):
            parameter[...] = net.device.asarray(host)
            return float(energy.value(batch.images, layers).sum())

        entries = generator.choice(host.size, min(host.size, 12), replace=False)
        numeric = finite_difference(value, host, 1e-5, entries).ravel()[entries]
        parameter[...] = net.device.asarray(host)
        np.testing.assert_allclose(net.device.to_numpy(gradient).ravel()[entries], numeric, rtol=1e-6, atol=1e-7)


def test_phi_layer_by_layer(device):
    net = network("conv", device, pooling="max")
    batch = batch_of(net)
    host, layers = random_states(net)
    drives = Oracle(net).drives(net.device.to_numpy(batch.images), host)
    expected = [(s * d).reshape(3, -1).sum(axis=1) for s, (d, _) in zip(host, drives, strict=True)]
    np.testing.assert_allclose(net.device.to_numpy(net.energy.phi(batch.images, layers)), expected, rtol=1e-12)


def test_layer_weights():
    chain = [ep.Linear((2,), 2) for _ in range(4)]
    assert ep.Graph(chain).weights(0.5) == [8.0, 4.0, 2.0, 1.0]
    assert ep.Graph(chain[:3]).weights(1.0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("options", CASES[:2])
def test_the_equilibrium_is_a_stationary_point(device, options, beta):
    """Settling and the energy agree on what rest is: the force balances the potential there."""
    net, batch, nudges, _ = case(options[0], device, *options[1:])
    signals = signals_of(options[4])
    state = net.settle(batch, steps=100, schedule="synchronous")
    if beta:
        state = net.settle(batch, state, targets=batch, beta=beta, steps=100, signals=signals, schedule="synchronous")
    forces = net.energy.force(batch.images, state.layers, nudges, beta)
    for n, (s, force) in enumerate(zip(state.layers, forces, strict=True), 1):
        a = options[3] ** -(net.depth - n)
        at_rest = a * INVERSE["sigmoid"](net.device.to_numpy(s))
        np.testing.assert_allclose(net.device.to_numpy(force), at_rest, rtol=1e-9, atol=1e-9)


def test_what_a_node_takes_is_weighted_once_but_for_the_shares_of_skips():
    """By hand: lambda^2 of a skip over one node is lambda of what the node takes, and half of that is its share."""
    energy, shares = residual(feedback=0.5).energy, [1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.5]  # stem to b and b to d skip
    assert energy.topdown_scales == ([0.5, 0.5, 0.5, 0.5, 1.0], shares), "nothing is above d"
    assert energy.drive_scales == ([1.0, 0.5, 0.5, 0.5, 0.5], shares), "images do not deviate"


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_units_of_an_exact_network_are_direct_sums(precision, exact, monkeypatch):
    made, prepare = [], ep.Conv2d.prepare

    def kept(*args):
        made.append(prepare(*args))
        return made[-1]

    net = ep.Network([ep.Conv2d((16, 16, 48), 48)], 3, device="cpu", precision=precision, exact=exact)
    x, layers = (np.full((16, 16, 16, 48), 0.5, np.float32) for _ in range(2))
    monkeypatch.setattr(ep.Conv2d, "prepare", kept)
    for ask in (net.energy.value, net.energy.phi, net.energy.force, net.energy.parameter_gradient):
        ask(x, [layers])
    assert {type(ops).__name__ for ops in made} == {"ConvOps" if exact else "WinogradOps"}
