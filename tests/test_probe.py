"""How far from rest phases end. Oracle: the states of the independent oracle after as many and after more steps."""

import copy

import numpy as np
import pytest
from oracle import Oracle, iterate
from small import Teacher, batch_of, network

import cupyep as ep
from cupyep.diagnostics.probe import MORE_STEPS, PhaseProbe, probe_settling


def relative(after, before):
    def norm(z):
        return np.sqrt((z.reshape(len(z), -1) ** 2).sum(axis=1))

    return np.array([norm(a - b) / np.maximum(norm(a), norm(b)) for a, b in zip(after, before, strict=True)])


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
def test_distance_and_residuals_of_the_free_phase(device, schedule):
    net = network("conv", device, gain=0.7)
    batch = batch_of(net)
    probe = probe_settling(ep.EquilibriumPropagation(net, 0.3, 3, 2, schedule=schedule, relaxation=1.0), batch)["free"]
    oracle, total = Oracle(net), 3 + MORE_STEPS
    path = iterate(oracle, device.to_numpy(batch.images), oracle.zeros(3), schedule, total, False)
    path = path[::2] if schedule == "sweeps" else path
    np.testing.assert_allclose(probe.distance, relative(path[total], path[3]), rtol=1e-8)
    assert probe.steps == 3
    assert probe.residual.shape == (total, 3)
    if schedule != "sweeps":  # whose residual joins both halves
        last = [np.sqrt(((a - b) ** 2).reshape(3, -1).mean(axis=1)) for a, b in zip(path[3], path[2], strict=True)]
        np.testing.assert_allclose(probe.per_sample, last, rtol=1e-8)
        np.testing.assert_allclose(probe.residual[2], np.mean(last, axis=1), rtol=1e-8)
    assert not probe.oscillating.any()
    assert not probe.growing.any()


@pytest.mark.parametrize("form", ["classical", "deviation"])
@pytest.mark.parametrize(("scheme", "betas"), [("centered", (0.3, -0.3)), ("onesided", (0.3,)), ("random", (0.3,))])
def test_distance_of_the_nudged_phase(device, form, scheme, betas):
    """Synchronous phases from a free state at rest, without pooling winners: both forms follow the nudged energy."""
    net = network("dense", device, gain=0.7)
    batch = batch_of(net)
    learner = ep.EquilibriumPropagation(net, 0.3, 300, 2, scheme=scheme, nudge=form, schedule="synchronous")
    probes = probe_settling(learner, batch)
    rest = Oracle(net).settle(device.to_numpy(batch.images), 300)
    early, late = ([nudged_states(net, batch, rest, beta, steps) for beta in betas] for steps in (2, 2 + MORE_STEPS))
    early, late = (
        [a - b for a, b in zip(runs[0], runs[1] if len(runs) == 2 else rest, strict=True)] for runs in (early, late)
    )
    np.testing.assert_allclose(probes["nudged"].distance, relative(late, early), rtol=1e-6, atol=1e-9)
    assert probes["nudged"].per_sample.shape == (3, 3)
    np.testing.assert_allclose(probes["free"].distance, 0, atol=1e-12)
    distance = probes["nudged"].distance[0]
    unmoved = distance > 1 - 1e-6 if device.is_gpu else distance == 1  # a GPU may round the last digit otherwise
    assert unmoved.all(), "after two steps the first of three layers knows of no nudge"


def nudged_states(net, batch, rest, beta, steps):
    """Return the oracle's states after so many synchronous steps with the readout's force on the last layer."""
    oracle, states = Oracle(net), rest
    term = oracle.readout_term(batch.labels)
    for _ in range(steps):
        totals = oracle.totals(np.array(net.device.to_numpy(batch.images)), states)
        z = term.output(states[-1])
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        totals[-1] = totals[-1] - beta * (p - term.target) @ term.matrix.T
        states = [1 / (1 + np.exp(2 - 4 * g)) for g in totals]
    return states


def test_an_oscillation_is_seen_and_no_rest_is_claimed(device):
    """Two units that inhibit each other jump between (0, 0) and (1, 1); after any number of steps they are as far."""
    net = ep.Network([ep.Linear((1,), 1), ep.Linear((1,), 1)], 2, device=device, precision="float64", feedback=1.0)
    for path, value in {"layers.1.weight": 1.0, "layers.2.weight": -5.0, "layers.2.bias": 1.0}.items():
        net.parameters()[path][...] = value
    batch = ep.Batch(net.device.asarray(np.ones((2, 1))), np.array([0, 1]))
    for steps in (10, 11):
        free = probe_settling(ep.EquilibriumPropagation(net, 0.5, steps, 2, schedule="synchronous"), batch)["free"]
        assert free.oscillating.all()
        np.testing.assert_array_equal(free.distance, 1.0)
    free = probe_settling(ep.EquilibriumPropagation(net, 0.5, 11, 2, schedule="evenodd", relaxation=1.0), batch)["free"]
    assert not free.oscillating.any()
    np.testing.assert_array_equal(free.distance, 0.0)


def test_a_state_without_bounds_is_far_from_rest_and_grows():
    net = ep.Network([ep.Linear((1,), 1), ep.Linear((1,), 1)], 2, activation="relu", device="cpu", feedback=1.0)
    net.parameters()["layers.1.weight"][...] = 1.0
    net.parameters()["layers.2.weight"][...] = 1e20  # overflows in the steps beyond
    batch = ep.Batch(np.ones((2, 1), np.float32), np.array([0, 1]))
    free = probe_settling(ep.BackpropagationThroughTime(net, 2, 1, schedule="synchronous"), batch)["free"]
    np.testing.assert_array_equal(free.distance, 1.0)


@pytest.mark.parametrize(
    ("residual", "growing"),
    [
        ([4, 2, 1, 2, 4, 8], True),
        ([4, 2, 1, 2, 4, 3], False),  # larger than after two steps, but falling again
        ([4, 8, 1, 2, 4, 7], False),  # rising, but not yet so large
        ([0, 0, 5, 0, 3, 0], False),  # every second step of a synchronous layer
        ([0, 1, 0, 2, 0, 4], True),
    ],
)
def test_what_grows(residual, growing):
    table = np.array(residual, float)[:, None]
    probe = PhaseProbe(2, table, np.ones((1, 1)), np.ones((1, 1)), np.zeros(1, bool), np.ones(1), np.zeros(1))
    assert probe.growing.tolist() == [growing]


def test_the_tolerance_ends_the_own_phase_only():
    net = network("conv", gain=0.3)
    learner = ep.EquilibriumPropagation(net, 0.3, 60, 60, tolerance=1e-3, schedule="synchronous")
    free = probe_settling(learner, batch_of(net))["free"]
    assert (free.steps, len(free.residual)) == (10, 60 + 61)
    assert free.per_sample.max() <= 1e-3
    assert free.distance.max() < 0.01


def test_which_phases_there_are(device):
    net, batch = network("conv", device), batch_of(network("conv", device))
    assert probe_settling(ep.Backpropagation(net), batch) == {}
    assert set(probe_settling(ep.BackpropagationThroughTime(net, 3, 3, schedule="synchronous"), batch)) == {"free"}
    assert set(
        probe_settling(ep.EquilibriumPropagation(net, 0.3, 3, 3, scheme="tangent", schedule="synchronous"), batch)
    ) == {"free", "nudged"}


def test_nothing_is_drawn_nor_changed():
    net = network("conv", pooling="max")
    signals = [ep.Distillation(Teacher(), [2], learned=True)]
    generator = np.random.default_rng(4)
    learner = ep.EquilibriumPropagation(
        net, 0.3, 3, 3, scheme="random", signals=signals, generator=generator, schedule="synchronous"
    )
    batch = batch_of(net)
    draws, weights = generator.bit_generator.state, copy.deepcopy(learner.parameters())
    first = learner.step(batch).gradients
    generator.bit_generator.state = draws
    probe_settling(learner, batch)
    assert generator.bit_generator.state == draws
    for path, array in learner.parameters().items():
        np.testing.assert_array_equal(array, weights[path])
    for path, gradient in learner.step(batch).gradients.items():
        np.testing.assert_array_equal(gradient, first[path])
