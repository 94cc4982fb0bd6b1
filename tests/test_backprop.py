"""Feed-forward backpropagation. Oracle: finite differences of the feed-forward loss of the network in oracle.py."""

import numpy as np
import pytest
from oracle import Oracle, finite_difference
from small import batch_of, network, on_host, oracle_terms, signals_of

import cupyep as ep


def assert_gradients(net, signals=()):
    batch = batch_of(net)
    images = net.device.to_numpy(batch.images)
    learner = ep.Backpropagation(net, signals)
    found = on_host(net, learner.step(batch).gradients)
    parameters = on_host(net, learner.parameters())
    assert found.keys() == parameters.keys()

    def loss():
        oracle = Oracle(net, {path: p for path, p in parameters.items() if not path.startswith("signals")})
        return oracle.loss_value(oracle.forward(images), oracle_terms(net, batch, signals, parameters)).mean()

    generator = np.random.default_rng(0)
    for path, p in parameters.items():
        numeric = finite_difference(loss, p, 1e-6, generator.choice(p.size, min(p.size, 8), replace=False))
        checked = ~np.isnan(numeric)
        np.testing.assert_allclose(found[path][checked], numeric[checked], rtol=2e-6, atol=2e-9, err_msg=path)
        assert np.abs(numeric[checked]).max() > 1e-6, f"{path}: nothing was compared"


@pytest.mark.parametrize("signal", ["plain", "le", "kd"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_gradients_with_signals(device, pooling, signal):
    assert_gradients(network("conv", device, pooling=pooling), signals_of(signal))


@pytest.mark.parametrize("activation", ["hard_sigmoid", "relu"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_gradients_with_clips_and_losses(device, loss, activation):
    net = network("conv", device, pooling="max", loss=loss, activation=activation, gain=1.0, bias=0.1, feedback=0.2)
    assert_gradients(net, signals_of("le"))


def test_evaluation_is_feed_forward(device):
    net = network("conv", device, pooling="max")
    batch = batch_of(net, samples=5)
    oracle = Oracle(net)
    top = oracle.forward(net.device.to_numpy(batch.images))[-1]
    term = oracle.readout_term(batch.labels)
    learner = ep.Backpropagation(net)
    loss, correct = learner.evaluate(batch)
    assert float(loss) == pytest.approx(term.value(top).sum(), rel=1e-12)
    assert int(correct) == (term.output(top).argmax(axis=1) == batch.labels).sum()
    result = learner.step(batch)
    assert float(result.loss) == pytest.approx(term.value(top).mean(), rel=1e-12)
    assert (result.free, result.nudged, result.nudge_response) == (None, None, None)
