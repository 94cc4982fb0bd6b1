"""BPTT. Oracle: finite differences of the loss after K steps of the network re-implemented in oracle.py."""

import numpy as np
import pytest
from oracle import Oracle, finite_difference
from small import batch_of, network, on_host, oracle_terms, signals_of

import cupyep as ep

FREE, UNROLLED = 3, 4


def numeric_gradients(net, batch, signals, learner):
    """Return, by path, d(mean loss after UNROLLED steps)/d parameter; the start, of FREE steps, stays where it is."""
    images = net.device.to_numpy(batch.images)
    start = Oracle(net).settle(images, FREE)
    parameters = on_host(net, learner.parameters())

    def loss():
        oracle = Oracle(net, {path: p for path, p in parameters.items() if not path.startswith("signals")})
        layers = oracle.settle(images, UNROLLED, start)
        return oracle.loss_value(layers, oracle_terms(net, batch, signals, parameters)).mean()

    generator = np.random.default_rng(0)
    return {
        path: finite_difference(loss, p, 1e-6, generator.choice(p.size, min(p.size, 6), replace=False))
        for path, p in parameters.items()
    }


def assert_gradients(net, signals=()):
    batch = batch_of(net)
    learner = ep.BackpropagationThroughTime(net, FREE, UNROLLED, signals=signals, schedule="synchronous")
    found = on_host(net, learner.step(batch).gradients)
    expected = numeric_gradients(net, batch, signals, learner)
    assert found.keys() == expected.keys()
    for path, numeric in expected.items():
        checked = ~np.isnan(numeric)
        np.testing.assert_allclose(found[path][checked], numeric[checked], rtol=2e-6, atol=2e-9, err_msg=path)
        assert np.abs(numeric[checked]).max() > 1e-6, f"{path}: nothing was compared"


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("signal", ["plain", "le", "kd"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_gradients_with_signals(device, pooling, signal, feedback):
    net = network("conv", device, pooling=pooling, feedback=feedback)
    assert_gradients(net, signals_of(signal))


@pytest.mark.parametrize("activation", ["hard_sigmoid", "half_hard_sigmoid", "relu6", "relu", "tanh", "gelu"])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_gradients_with_activations(device, kind, activation):
    """In a clip some units are cut off: their slope is zero."""
    net = network(kind, device, activation=activation, pooling="max", gain=1.0, bias=0.1)
    assert_gradients(net, signals_of("le"))


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_gradients_with_squared_error(device, kind):
    assert_gradients(network(kind, device, loss="squared_error", feedback=0.5), signals_of("kd", loss="squared_error"))


def test_loss_and_hits_are_those_of_the_last_state(device):
    net = network("dense", device)
    batch = batch_of(net, samples=5)
    result = ep.BackpropagationThroughTime(net, FREE, UNROLLED, signals=signals_of("le"), schedule="synchronous").step(
        batch
    )
    oracle = Oracle(net)
    top = oracle.settle(net.device.to_numpy(batch.images), FREE + UNROLLED)[-1]
    term = oracle.readout_term(batch.labels)
    assert float(result.loss) == pytest.approx(term.value(top).mean(), rel=1e-12)
    assert int(result.correct) == (term.output(top).argmax(axis=1) == batch.labels).sum()
    assert result.nudge_response is None


def test_the_free_phase_ends_at_the_tolerance(device):
    """Far from rest: what comes of a free state that was settled to the tolerance, not of all the free steps."""
    net = network("dense", device, gain=0.8)
    batch, how = batch_of(net), {"schedule": "synchronous", "tolerance": 0.02}
    free = net.settle(batch, steps=60, **how)
    assert free.stats.converged
    assert free.stats.steps < 60
    learner = ep.BackpropagationThroughTime(net, 60, 3, **how)
    wanted = on_host(net, learner.step_from(batch, free).gradients)
    found = on_host(net, learner.step(batch).gradients)
    further = on_host(net, learner.step_from(batch, net.settle(batch, steps=60, schedule="synchronous")).gradients)
    for path, gradient in found.items():
        np.testing.assert_allclose(gradient, wanted[path], rtol=1e-12, atol=1e-15)
    assert not np.allclose(found["layers.1.weight"], further["layers.1.weight"], rtol=1e-6, atol=0)


def test_unrolling_starts_where_it_is_told(device):
    """`step_from` uses the given state and leaves it as it was."""
    net = network("dense", device)
    batch = batch_of(net)
    start = net.settle(batch, steps=FREE, schedule="synchronous")
    before = [net.device.to_numpy(s).copy() for s in start.layers]
    learner = ep.BackpropagationThroughTime(net, 50, UNROLLED, schedule="synchronous")
    top = Oracle(net).settle(net.device.to_numpy(batch.images), UNROLLED, before)[-1]
    expected = Oracle(net).readout_term(batch.labels).value(top).mean()
    assert float(learner.step_from(batch, start).loss) == pytest.approx(expected, rel=1e-12)
    for kept, s in zip(before, start.layers, strict=True):
        np.testing.assert_array_equal(net.device.to_numpy(s), kept)


@pytest.mark.parametrize("options", [{"free_steps": 0}, {"unrolled_steps": -1}, {"schedule": "sweep"}])
def test_wrong_arguments_are_one_line(options):
    with pytest.raises(ep.ConfigurationError, match=f"{next(iter(options))}") as error:
        ep.BackpropagationThroughTime(network("dense"), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("signal", ["plain", "kd"])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_gradients_at_an_equilibrium(device, kind, signal):
    """Infinitely many steps: the derivative of the loss of the equilibrium itself, which moves with the parameters."""
    net = network(kind, device, pooling="max", activation="tanh")
    batch, signals = batch_of(net), signals_of(signal)
    images = device.to_numpy(batch.images)
    free = net.settle(batch, steps=300, schedule="synchronous")
    learner = ep.BackpropagationThroughTime(net, signals=signals, schedule="synchronous")
    result, residual = learner.step_from_equilibrium(batch, free)
    assert residual <= 1e-5
    found, parameters = on_host(net, result.gradients), on_host(net, learner.parameters())
    start = [device.to_numpy(s) for s in free.layers]

    def loss():
        oracle = Oracle(net, {path: p for path, p in parameters.items() if not path.startswith("signals")})
        layers = oracle.settle(images, 100, start)
        return oracle.loss_value(layers, oracle_terms(net, batch, signals, parameters)).mean()

    generator = np.random.default_rng(0)
    for path, p in parameters.items():
        numeric = finite_difference(loss, p, 1e-5, generator.choice(p.size, min(p.size, 6), replace=False))
        checked = ~np.isnan(numeric)
        size = np.abs(numeric[checked]).max()
        np.testing.assert_allclose(found[path][checked], numeric[checked], rtol=3e-4, atol=3e-4 * size, err_msg=path)


def test_many_steps_come_to_the_gradient_at_the_equilibrium(device):
    net = network("conv", device, pooling="max", activation="hard_sigmoid", gain=1.0, bias=0.1)
    batch = batch_of(net)
    free = net.settle(batch, steps=300, schedule="synchronous")
    limit = on_host(
        net, ep.BackpropagationThroughTime(net, schedule="synchronous").step_from_equilibrium(batch, free)[0].gradients
    )
    distance = {}
    for steps in (5, 200):
        found = on_host(
            net, ep.BackpropagationThroughTime(net, 1, steps, schedule="synchronous").step_from(batch, free).gradients
        )
        distance[steps] = max(np.abs(found[path] - limit[path]).max() / np.abs(limit[path]).max() for path in limit)
    assert distance[5] > 1e-2
    assert distance[200] < 1e-4


@pytest.mark.parametrize("feedback", [1.0, 0.3, 0.01])
def test_the_equation_is_solved_in_a_deep_network(device, feedback):
    """Weak feedback makes it far from symmetric: it must not be over-relaxed then."""
    layers = [ep.Linear((6,), 8), *(ep.Linear((8,), 8) for _ in range(9))]
    gain = 0.5 if feedback == 1 else 1.0
    net = ep.Network(layers, 4, activation="tanh", feedback=feedback, gain=gain, device=device, precision="float32")
    generator = np.random.default_rng(2)
    batch = ep.Batch(generator.random((5, 6), np.float32), np.arange(5) % 4)
    free = net.settle(batch, steps=200, schedule="sweeps")
    limit, residual = ep.BackpropagationThroughTime(net, schedule="synchronous").step_from_equilibrium(batch, free, 60)
    assert residual <= 1e-5
    limit = on_host(net, limit.gradients)
    found = on_host(
        net, ep.BackpropagationThroughTime(net, 1, 400, schedule="synchronous").step_from(batch, free).gradients
    )
    for path, g in found.items():
        np.testing.assert_allclose(limit[path], g, rtol=1e-3, atol=1e-3 * np.abs(g).max(), err_msg=path)


def test_an_equation_without_a_solution_is_seen(device):
    """At states of zero tanh is steep, and feedback through large weights grows from step to step."""
    net = network("conv", device, activation="tanh", gain=8.0)
    batch = batch_of(net)
    zero = net.settle(batch, steps=1, schedule="synchronous")
    for s in zero.layers:
        s[...] = 0
    _, residual = ep.BackpropagationThroughTime(net, schedule="synchronous").step_from_equilibrium(batch, zero)
    assert not residual <= 1e-2
