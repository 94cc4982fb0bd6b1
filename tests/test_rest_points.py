"""Where phases come to rest. Oracles: one linear solve; classical and deviation form against each other."""

import numpy as np
import pytest
from oracle import Oracle, relative_error
from small import batch_of, hosts, network, oracle_terms, signals_of

import cupyep as ep

SCHEDULES = ("synchronous", "evenodd", "sweeps")


def edge_matrices(oracle):
    """Return (M, b) of every edge, flattened: d = s M + b."""
    result = []
    for edge in oracle.edges:
        size = int(np.prod(edge.in_shape))
        basis = np.eye(size).reshape(size, *edge.in_shape)
        offset = edge.drive(np.zeros((1, *edge.in_shape)))[0].ravel()
        result.append((edge.drive(basis)[0].reshape(size, -1) - offset, offset))
    return result


def solve(oracle, images, terms=(), beta=0.0, tangent_at=None):
    """Return the rest point of the linear network (sigma = identity), or its derivative by beta at a free one."""
    matrices = edge_matrices(oracle)
    sizes = [m.shape[1] for m, _ in matrices]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    system, right = np.eye(starts[-1]), np.zeros((len(images), starts[-1]))
    for n, (matrix, offset) in enumerate(matrices):
        if n:
            system[parts[n], parts[n - 1]] -= matrix.T
            system[parts[n - 1], parts[n]] -= oracle.feedback * matrix
            right[:, parts[n]] += offset
        else:
            right[:, parts[0]] += images.reshape(len(images), -1) @ matrix + offset
    if tangent_at is not None:
        right[...] = 0
        beta = 1.0
    for term in terms:
        here, a = parts[term.layer - 1], oracle.scales[term.layer - 1]
        b = np.eye(sizes[term.layer - 1]) if term.matrix is None else term.matrix
        right[:, here] += beta * term.weight / a * term.target @ b.T
        pull = beta * term.weight / a * b @ b.T  # of -(beta / a) B (B^T s - y)
        if tangent_at is None:
            system[here, here] += pull
        else:
            right[:, here] -= tangent_at[term.layer - 1].reshape(len(images), -1) @ pull
    rest = np.linalg.solve(system, right.T).T
    return [rest[:, part].reshape(len(images), *s.shape[1:]) for part, s in zip(parts, oracle.zeros(1), strict=True)]


def linear_case(kind, device, feedback):
    identity = ep.Clip("identity", 1.0, -1e6, 1e6)
    net = network(kind, device, loss="squared_error", activation=identity, feedback=feedback, gain=0.3)
    signals = [ep.LocalError([1, 3], kappa=0.3, loss="squared_error", seed=5)]
    return net, batch_of(net), signals


@pytest.mark.parametrize(
    ("schedule", "relaxation"), [*((schedule, 1.0) for schedule in SCHEDULES), ("evenodd", 1.4), ("synchronous", 0.8)]
)
@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_linear_network_is_one_linear_solve(device, kind, feedback, schedule, relaxation):
    """Free, nudged in both forms, and the tangent: all rest points of linear equations."""
    net, batch, signals = linear_case(kind, device, feedback)
    how = {"steps": 120, "schedule": schedule, "relaxation": relaxation}
    oracle, images = Oracle(net), net.device.to_numpy(batch.images)
    free = net.settle(batch, **how)
    expected = solve(oracle, images)
    for found, s in zip(hosts(net, free.layers), expected, strict=True):
        np.testing.assert_allclose(found, s, rtol=1e-9, atol=1e-11)
    net.bind(signals[0])
    terms = oracle_terms(net, batch, signals)
    for beta in (0.3, -0.2):
        nudged_expected = solve(oracle, images, terms, beta)
        assert max(abs(a - b).max() for a, b in zip(nudged_expected, expected, strict=True)) > 0.05
        for nudge in ("classical", "deviation"):
            nudged = net.settle(batch, free, targets=batch, beta=beta, nudge=nudge, signals=signals, **how)
            for found, s in zip(hosts(net, nudged.layers), nudged_expected, strict=True):
                np.testing.assert_allclose(found, s, rtol=1e-9, atol=1e-11)
    tangent = net.settle(batch, free, targets=batch, beta=1.0, nudge="tangent", signals=signals, **how)
    derivative = solve(oracle, images, terms, tangent_at=expected)
    for found, a, ds in zip(hosts(net, tangent.deviations), oracle.scales, derivative, strict=True):
        np.testing.assert_allclose(found / a, ds, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("nudge", ["classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_phases_in_one_batch_are_two_phases(device, schedule, nudge):
    net = network("conv", device, pooling="max", feedback=0.5)
    batch, signals = batch_of(net), signals_of("kd")
    free = net.settle(batch, steps=20, schedule=schedule, relaxation=1.0)
    how = {"targets": batch, "nudge": nudge, "signals": signals, "steps": 4, "schedule": schedule, "relaxation": 1.0}
    both = net.settle(batch, free, beta=[0.5, -0.5], **how)
    for phase, beta in enumerate((0.5, -0.5)):
        one = net.settle(batch, free, beta=beta, **how)
        part = slice(3 * phase, 3 * phase + 3)
        for a, b in zip(hosts(net, both.layers), hosts(net, one.layers), strict=True):
            np.testing.assert_allclose(a[part], b, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(both.stats.per_sample[:, part], one.stats.per_sample, rtol=1e-9, atol=1e-15)
    assert relative_error(hosts(net, both.layers)[0][:3], hosts(net, both.layers)[0][3:]) > 1e-4


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize(
    ("pooling", "activation", "seed"), [("average", "sigmoid", 0), ("max", "sigmoid", 0), ("max", "hard_sigmoid", 4)]
)
def test_deviation_form_is_the_classical_form(device, pooling, activation, seed, feedback):
    """At a tight equilibrium, as long as no winner changes: the same nudged states, and eps = a_n (s - s*)."""
    options = {"pooling": pooling, "feedback": feedback, "activation": activation, "seed": seed}
    net = network("conv", device, gain=0.4, bias=0.2, **options)
    batch, signals = batch_of(net), signals_of("le")
    free = net.settle(batch, steps=120, schedule="synchronous")
    how = {"targets": batch, "beta": [0.02, -0.02], "signals": signals, "steps": 120, "schedule": "synchronous"}
    classical = net.settle(batch, free, **how)
    deviation = net.settle(batch, free, nudge="deviation", **how)
    for winners, at_rest in zip(classical.winners, free.winners, strict=True):
        if winners is not None:
            for part in (slice(0, 3), slice(3, 6)):
                np.testing.assert_array_equal(*hosts(net, [winners[part], at_rest]))
    rest = hosts(net, free.layers)
    for n, (a, b, eps) in enumerate(
        zip(hosts(net, classical.layers), hosts(net, deviation.layers), hosts(net, deviation.deviations), strict=True)
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        scale = feedback ** -(net.depth - 1 - n)
        delta = a - np.concatenate([rest[n]] * 2)
        np.testing.assert_allclose(eps, scale * delta, rtol=0, atol=1e-10)
        assert np.abs(delta).max() > 1e-4 / scale


def test_deviation_residual_is_of_the_scaled_deviation(device):
    net = network("conv", device, feedback=0.5)
    batch = batch_of(net)
    free = net.settle(batch, steps=100, schedule="synchronous")
    how = {"targets": batch, "beta": 0.3, "nudge": "deviation", "schedule": "synchronous"}
    before, after = (net.settle(batch, free, steps=steps, **how) for steps in (3, 4))
    expected = [
        np.sqrt(((b - a) ** 2).reshape(3, -1).mean(axis=1))
        for a, b in zip(hosts(net, before.deviations), hosts(net, after.deviations), strict=True)
    ]
    np.testing.assert_allclose(after.stats.per_sample, expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tangent_is_the_limit_of_the_deviation(device, schedule):
    """[eps(beta) - eps(-beta)] / (2 beta) tends to the tangent as beta^2, after any number of steps."""
    net = network("conv", device, pooling="max", feedback=0.5)
    batch, signals = batch_of(net), signals_of("kd")
    free = net.settle(batch, steps=100, schedule="synchronous")
    how = {"targets": batch, "signals": signals, "steps": 3, "schedule": schedule, "relaxation": 1.0}
    tangent = hosts(net, net.settle(batch, free, beta=1.0, nudge="tangent", **how).deviations)
    errors = []
    for beta in (0.02, 0.01):
        eps = hosts(net, net.settle(batch, free, beta=[beta, -beta], nudge="deviation", **how).deviations)
        errors.append([relative_error((e[:3] - e[3:]) / (2 * beta), t) for e, t in zip(eps, tangent, strict=True)])
    np.testing.assert_allclose(np.divide(*errors), 4, rtol=0.1)
    assert max(errors[0]) < 0.05


def test_returned_states_are_kept(device):
    net = network("dense", device)
    state = net.settle(batch_of(net, seed=1), steps=3, schedule="synchronous")
    before = hosts(net, state.layers)
    net.settle(batch_of(net, seed=2), steps=5, schedule="synchronous")
    for a, b in zip(before, hosts(net, state.layers), strict=True):
        np.testing.assert_array_equal(a, b)
