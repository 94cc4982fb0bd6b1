"""A second energy, predictive coding, in a file of its own. Oracles: finite differences of its value; backpropagation.

Its free minimum is the feed-forward pass, so the centered estimate must come to backpropagation's gradient, by beta^2.
"""

import numpy as np
import pytest
from oracle import finite_difference
from predictive_coding import Phase, PredictiveCoding
from small import batch_of, network

import cupyep as ep
from cupyep.errors import ConvergenceWarning
from cupyep.program import SCHEDULES, make_program
from cupyep.settling import settle

BETA = 0.3


def residual_network():
    """Return a network whose node ``c`` gets the image's, two others' and an identity's drives: one with a triangle."""
    edges = [
        ep.Connection("image", "a", ep.Conv2d((6, 6, 2), 3, pooling="average")),
        ep.Connection("a", "b", ep.Conv2d((3, 3, 3), 3)),
        ep.Connection("b", "c", ep.Conv2d((3, 3, 3), 3)),
        ep.Connection("a", "c", ep.Identity((3, 3, 3))),
        ep.Connection("image", "c", ep.Conv2d((6, 6, 2), 3, kernel=2, stride=2, padding=0, bias=False)),
        ep.Connection("c", "out", ep.Linear((3, 3, 3), 4)),
        ep.Connection("b", "out", ep.Linear((3, 3, 3), 4, bias=False)),
    ]
    return ep.Network(edges, 3, activation="sigmoid", gain=0.5, seed=0, device="cpu", precision="float64", feedback=1.0)


# With other seeds max-pooling can rest on a kink, where the winner changes: the update then jumps to and fro for ever.
NETWORKS = {
    "chain": lambda: network("conv"),
    "chain, max-pooling": lambda: network("conv", pooling="max", loss="squared_error", seed=1),
    "residual": residual_network,
}


@pytest.fixture(params=NETWORKS)
def case(request):
    net = NETWORKS[request.param]()
    batch = batch_of(net)
    return net, PredictiveCoding(net), batch.images, net.nudges(batch)


def settled(net, energy, x, nudges=(), beta=0.0, start=None, schedule="evenodd", relaxation=0.6):
    """Return the states at rest, by the package's loop and one of its programs."""
    program = make_program(net.graph, schedule, warm=start is not None, image=True)
    start = [np.zeros((len(x), *shape)) for shape in net.state_shapes] if start is None else start
    phase = Phase(energy, program, x, start, nudges, beta)
    stats = settle(phase, 2000, tolerance=1e-14, relaxation=relaxation)
    assert stats.converged
    return phase.nodes[1:]


def feedforward(net, x):
    return ep.Backpropagation(net).settled(x).copy().layers


def slopes(value, arrays, step=1e-5, entries=8):
    """Yield some entries' numbers and derivatives of `value`, array by array."""
    for array in arrays:
        chosen = np.random.default_rng(1).choice(array.size, min(array.size, entries), replace=False)
        yield chosen, finite_difference(value, array, step, chosen).ravel()[chosen]


def test_update_goes_down_the_gradient(case):
    """A first update of all nodes from what they send, which is current then, is minus the derivative of F."""
    net, energy, x, nudges = case
    rng = np.random.default_rng(7)
    layers = [rng.uniform(0.2, 0.8, (len(x), *shape)) for shape in net.state_shapes]
    phase = Phase(energy, make_program(net.graph, "synchronous", warm=True, image=True), x, layers, nudges, BETA)
    phase.relaxation = 0.0  # nothing moves, and what is sent becomes current
    phase.run(phase.program.body)
    phase.relaxation = 1e-9
    phase.run(phase.program.body)
    numeric = slopes(lambda: energy.value(x, layers, nudges, BETA).sum(), layers)
    for n, (chosen, derivative) in enumerate(numeric):
        change = (phase.nodes[n + 1] - layers[n]).ravel()[chosen] / 1e-9
        np.testing.assert_allclose(change, -derivative, rtol=1e-5, atol=1e-6)


def test_parameter_gradient(case):
    net, energy, x, _ = case
    rng = np.random.default_rng(8)
    layers = [rng.uniform(0.2, 0.8, (len(x), *shape)) for shape in net.state_shapes]
    found = energy.parameter_gradient(x, layers)
    parameters = {path: array for path, array in net.parameters().items() if not path.startswith("readout")}
    assert found.keys() == parameters.keys()
    numeric = slopes(lambda: energy.value(x, layers).sum(), parameters.values())
    for path, (chosen, derivative) in zip(parameters, numeric, strict=True):
        np.testing.assert_allclose(found[path].ravel()[chosen], derivative, rtol=1e-6, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rests_in_a_minimum(case, schedule):
    net, energy, x, nudges = case
    free = settled(net, energy, x, schedule=schedule)
    for s, expected in zip(free, feedforward(net, x), strict=True):
        np.testing.assert_allclose(s, expected, atol=1e-12)
    nudged = settled(net, energy, x, nudges, BETA, free, schedule)
    least = energy.value(x, nudged, nudges, BETA)
    assert (least < energy.value(x, free, nudges, BETA)).all()
    for _, derivative in slopes(lambda: energy.value(x, nudged, nudges, BETA).sum(), nudged):
        np.testing.assert_allclose(derivative, 0, atol=1e-8)
    rng = np.random.default_rng(9)
    for _ in range(20):
        around = [s + 1e-3 * rng.standard_normal(s.shape) for s in nudged]
        assert (energy.value(x, around, nudges, BETA) > least).all()


def test_centered_estimate_comes_to_the_gradient_of_the_loss(case):
    net, energy, x, nudges = case
    truth = ep.Backpropagation(net).step(x, batch_of(net).labels).gradients
    free = settled(net, energy, x)

    def error(beta):
        """Return the relative error of each parameter's estimate."""
        up, down = (
            energy.parameter_gradient(x, settled(net, energy, x, nudges, signed, free)) for signed in (beta, -beta)
        )
        estimate = {path: (up[path] - down[path]) / (2 * beta * len(x)) for path in up}
        return np.array([np.linalg.norm(estimate[p] - truth[p]) / np.linalg.norm(truth[p]) for p in estimate])

    wide, narrow = error(0.02), error(0.01)
    assert (narrow < 2e-3).all()
    np.testing.assert_allclose(wide / narrow, 4, rtol=0.02)


def test_a_phase_that_does_not_settle_says_so(case):
    net, energy, x, _ = case
    program = make_program(net.graph, "synchronous", warm=False, image=True)
    phase = Phase(energy, program, x, [np.ones((len(x), *shape)) for shape in net.state_shapes])
    with pytest.warns(ConvergenceWarning, match="the free phase did not settle in 2 steps"):
        assert not settle(phase, 2, tolerance=1e-14).converged
