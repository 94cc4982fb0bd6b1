"""Settling. Oracles: one linear solve, toy systems of known residuals, the schedules written out once more below."""

import tracemalloc
import warnings

import numpy as np
import pytest
from oracle import SIGMA, Oracle, relative_error
from small import CLASSES, Teacher, batch_of, network, oracle_terms, signals_of

import cupyep as ep
from cupyep import layers as layers_module
from cupyep import settling

SCHEDULES = ("synchronous", "evenodd", "sweeps")


def hosts(net, arrays):
    return [np.array(net.device.to_numpy(a), np.float64) for a in arrays]


# --- a linear network against one solve ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_linear_network_is_one_linear_solve(device, kind, feedback, schedule):
    """Free, nudged in both forms, and the tangent: all rest points of linear equations."""
    net, batch, signals = linear_case(kind, device, feedback)
    how = {"steps": 120, "schedule": schedule}
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


# --- schedules, step by step -----------------------------------------------------------------------------------------


def iterate(oracle, x, start, schedule, steps, warm):
    """Return all states that a schedule goes through, as lists of layers; each half of a sweep counts."""
    sigma, states = SIGMA[oracle.activation], [start]
    layers = [s.copy() for s in start]
    drives = [d for d, _ in oracle.drives(x, layers)]
    winners = [w for _, w in oracle.drives(x, layers)]
    feedback = [np.zeros_like(s) for s in layers]

    def from_below(n):
        drives[n], winners[n] = oracle.edges[n].drive(layers[n - 1] if n else x)

    def from_above(n):
        if n + 1 < oracle.depth:
            feedback[n] = oracle.feedback * oracle.edges[n + 1].topdown(layers[n + 1], winners[n + 1])

    def update(n):
        layers[n] = sigma(drives[n] + feedback[n])

    everything = range(oracle.depth)
    for _ in range(steps):
        if schedule == "synchronous":
            layers[:] = [sigma(g) for g in oracle.totals(x, layers)]
        elif schedule == "evenodd":
            for n in [*everything[1::2], *everything[0::2]]:  # even layers counted from 1, then odd ones
                layers[n] = sigma(oracle.totals(x, layers)[n])
        else:
            for down in (warm, not warm):
                for n in reversed(everything) if down else everything:
                    (from_above if down else from_below)(n)
                    update(n)
                states.append([s.copy() for s in layers])
            continue
        states.append([s.copy() for s in layers])
    return states


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_step_by_step(device, schedule, pooling, warm):
    """States, residuals a sample and the trace of the first iterations equal the written-out schedule."""
    net = network("conv", device, pooling=pooling, feedback=0.7, activation="hard_sigmoid", gain=0.8)
    batch = batch_of(net)
    oracle, images = Oracle(net), net.device.to_numpy(batch.images)
    start = oracle.zeros(3)
    state = None
    if warm:
        generator = np.random.default_rng(3)
        start = [generator.uniform(0, 1, s.shape) for s in start]
        state = ep.State([net.device.asarray(s) for s in start])
    for steps in (1, 2, 3):
        path = iterate(oracle, images, start, schedule, steps, warm)
        found = net.settle(batch, state, steps=steps, schedule=schedule, record=True)
        for a, b in zip(hosts(net, found.layers), path[-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
        halves = 2 if schedule == "sweeps" else 1
        squares = np.array(
            [
                [((a - b) ** 2).reshape(3, -1).mean(axis=1) for a, b in zip(after, before, strict=True)]
                for before, after in zip(path, path[1:], strict=False)
            ]
        )
        residuals = np.sqrt(squares.reshape(steps, halves, net.depth, 3).sum(axis=1))
        np.testing.assert_allclose(found.stats.per_sample, residuals[-1], rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.stats.residual, residuals[-1].mean(axis=1), rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.stats.trace, residuals.mean(axis=2), rtol=1e-9, atol=1e-13)
        assert (found.stats.steps, found.stats.converged) == (steps, None)


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("signal", ["plain", "le"])
def test_schedules_reach_one_fixed_point(device, signal, feedback, nudge):
    net = network("conv", device, feedback=feedback)
    batch, signals = batch_of(net), signals_of(signal)
    ends = []
    for schedule in SCHEDULES:
        free = net.settle(batch, steps=100, schedule=schedule)
        nudged = net.settle(
            batch, free, targets=batch, beta=0.05, nudge=nudge, signals=signals, steps=100, schedule=schedule
        )
        ends.append(hosts(net, free.layers) + hosts(net, nudged.layers))
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd"])
def test_a_warm_start_goes_on_where_it_stopped(device, schedule):
    net = network("conv", device, pooling="max", activation="hard_sigmoid")
    batch = batch_of(net)
    straight = net.settle(batch, steps=9, schedule=schedule)
    first = net.settle(batch, steps=4, schedule=schedule)
    second = net.settle(batch, first, steps=5, schedule=schedule)
    for a, b in zip(hosts(net, straight.layers), hosts(net, second.layers), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("activation", ["hard_sigmoid", ep.Clip("never zero", 1.0, 0.2, 1.0)], ids=["zero", "not"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_depends_on_what_buffers_held(device, schedule, activation):
    """Buffers are reused: full of NaN and impossible winners, they must give the states that fresh ones give."""
    net = network("conv", device, pooling="max", activation=activation)
    batch, signals = batch_of(net), signals_of("le")
    how = {"steps": 3, "schedule": schedule}

    def run(poisoned):
        def poison(samples):
            for array in net.workspace(samples).buffers._arrays.values() if poisoned else ():
                array[...] = 200 if array.dtype == np.uint8 else np.nan

        poison(3)
        free = net.settle(batch, **how)
        ends = hosts(net, free.layers)
        for nudge in ("classical", "deviation"):
            poison(3)
            poison(6)
            nudged = net.settle(batch, free, targets=batch, beta=[0.5, -0.5], nudge=nudge, signals=signals, **how)
            ends += hosts(net, nudged.layers)
        return ends

    run(False)  # makes the buffers
    for a, b in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_samples_do_not_see_each_other(device):
    net = network("conv", device, pooling="max")
    batch = batch_of(net)
    together = hosts(net, net.settle(batch, steps=7).layers)
    for i in range(3):
        alone = net.settle(batch.images[i : i + 1], steps=7)
        for a, b in zip(together, hosts(net, alone.layers), strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-12)


# --- the two forms of the nudge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_phases_in_one_batch_are_two_phases(device, schedule, nudge):
    net = network("conv", device, pooling="max", feedback=0.5)
    batch, signals = batch_of(net), signals_of("kd")
    free = net.settle(batch, steps=20, schedule=schedule)
    how = {"targets": batch, "nudge": nudge, "signals": signals, "steps": 4, "schedule": schedule}
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
    free = net.settle(batch, steps=120)
    how = {"targets": batch, "beta": [0.02, -0.02], "signals": signals, "steps": 120}
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
    free = net.settle(batch, steps=100)
    how = {"targets": batch, "beta": 0.3, "nudge": "deviation"}
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
    free = net.settle(batch, steps=100)
    how = {"targets": batch, "signals": signals, "steps": 3, "schedule": schedule}
    tangent = hosts(net, net.settle(batch, free, beta=1.0, nudge="tangent", **how).deviations)
    errors = []
    for beta in (0.02, 0.01):
        eps = hosts(net, net.settle(batch, free, beta=[beta, -beta], nudge="deviation", **how).deviations)
        errors.append([relative_error((e[:3] - e[3:]) / (2 * beta), t) for e, t in zip(eps, tangent, strict=True)])
    np.testing.assert_allclose(np.divide(*errors), 4, rtol=0.1)
    assert max(errors[0]) < 0.05


def test_returned_states_are_kept(device):
    net = network("dense", device)
    state = net.settle(batch_of(net, seed=1), steps=3)
    before = hosts(net, state.layers)
    net.settle(batch_of(net, seed=2), steps=5)
    for a, b in zip(before, hosts(net, state.layers), strict=True):
        np.testing.assert_array_equal(a, b)


# --- when it stops ---------------------------------------------------------------------------------------------------


class Geometric:
    """Two layers, three samples; every update of a layer moves it by ``size * rate^t`` at its t-th update."""

    depth = 2
    drives_current = False
    sizes = np.array([[1.0, 0.5, 0.25], [0.5, 2.0, 0.1]])

    def __init__(self, rate=0.5):
        self.rate = rate
        self.updates = np.zeros(2, int)
        self.x = np.zeros((2, 3))
        self.residual = np.full((2, 3), np.nan)
        self.log = []

    def host(self, array):
        return array

    def forward(self, n):
        self.log.append(("forward", n))

    def backward(self, n):
        self.log.append(("backward", n))

    def update(self, n, measure):
        self.log.append(("update", n))
        self.updates[n - 1] += 1
        change = self.sizes[n - 1] * self.rate ** self.updates[n - 1]
        self.x[n - 1] += change
        if measure:
            self.residual[n - 1] += change**2

    def remember(self):
        self.kept = self.x.copy()

    def distance_from_remembered(self):
        return np.abs(self.x - self.kept).max()


class Cycle(Geometric):
    """Goes round a cycle of `period` states, for ever."""

    def __init__(self, period):
        super().__init__()
        self.period = period

    def update(self, n, measure):
        self.updates[n - 1] += 1
        new = np.cos(2 * np.pi * self.updates[n - 1] / self.period) * self.sizes[n - 1]
        if measure:
            self.residual[n - 1] += (new - self.x[n - 1]) ** 2
        self.x[n - 1] = new


@pytest.mark.parametrize(("check_every", "expected"), [(1, 8), (2, 8), (3, 9), (5, 10), (10, 10), (7, 14), (100, 40)])
def test_convergence_is_found_at_the_right_step(check_every, expected):
    """The largest residual is 2 * 0.5^t; it is at or below 0.01 from t = 8 on (2 / 256), not at t = 7 (2 / 128)."""
    stats = settling.settle(Geometric(), 40, "synchronous", warm=False, tolerance=0.01, check_every=check_every)
    assert (stats.steps, stats.converged, stats.oscillating) == (expected, True, False)
    np.testing.assert_allclose(stats.per_sample, Geometric.sizes * 0.5**expected, rtol=1e-12)
    np.testing.assert_allclose(stats.residual, Geometric.sizes.mean(axis=1) * 0.5**expected, rtol=1e-12)


def test_the_tolerance_itself_is_enough():
    stats = settling.settle(Geometric(), 40, "synchronous", warm=False, tolerance=2 / 64, check_every=1)
    assert (stats.steps, stats.converged) == (6, True)


def test_sweeps_count_both_halves():
    """In one iteration a layer is updated twice: the squares add up."""
    stats = settling.settle(Geometric(), 3, "sweeps", warm=False)
    expected = Geometric.sizes * np.sqrt(0.5 ** (2 * 5) + 0.5 ** (2 * 6))
    np.testing.assert_allclose(stats.per_sample, expected, rtol=1e-12)


def test_no_tolerance_no_verdict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = settling.settle(Cycle(2), 5, "synchronous", warm=False)
    assert (stats.steps, stats.converged, stats.oscillating, stats.tolerance) == (5, None, False, None)


def test_convergence_is_not_reported_when_absent():
    """One step short of it: not converged, and the warning names layer, samples and the knob."""
    with pytest.warns(ep.ConvergenceWarning) as caught:
        stats = settling.settle(
            Geometric(), 7, "synchronous", warm=False, tolerance=0.01, check_every=1, phase="nudged"
        )
    assert (stats.steps, stats.converged, stats.oscillating) == (7, False, False)
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "\n" not in message
    for part in ("nudged phase", "7 steps", "layer 2", "0.016", "0.01", "1 of 3 samples", "raise the nudged steps"):
        assert part in message


def test_the_warning_names_the_worst_layer_of_any_sample():
    system = Geometric()
    system.sizes = np.array([[0.1, 0.1, 3.0], [1.5, 1.5, 1.5]])  # layer 2 has the larger mean, layer 1 the worst sample
    with pytest.warns(ep.ConvergenceWarning, match=r"layer 1 has residual 0.38 > 1e-09 \(3 of 3 samples\)"):
        settling.settle(system, 3, "synchronous", warm=False, tolerance=1e-9)


def test_period_two_is_recognised():
    with pytest.warns(ep.ConvergenceWarning, match="period two: use schedule 'evenodd' or 'sweeps'"):
        stats = settling.settle(Cycle(2), 12, "synchronous", warm=False, tolerance=1e-3)
    assert (stats.oscillating, stats.converged) == (True, False)


@pytest.mark.parametrize("system", [Cycle(4), Cycle(3), Geometric(0.9)])
def test_other_unrest_is_not_called_period_two(system):
    with pytest.warns(ep.ConvergenceWarning, match="raise the free steps"):
        stats = settling.settle(system, 12, "synchronous", warm=False, tolerance=1e-3)
    assert (stats.oscillating, stats.converged) == (False, False)


def test_a_real_network_that_oscillates(device):
    """Two units that inhibit each other jump between (0, 0) and (1, 1) if updated together, and else come to rest."""
    net = ep.Network([ep.Linear((1,), 1), ep.Linear((1,), 1)], 2, device=device, precision="float64")
    for path, value in {"layers.1.weight": 1.0, "layers.2.weight": -5.0, "layers.2.bias": 1.0}.items():
        net.parameters()[path][...] = value
    x = np.ones((1, 1))
    with pytest.warns(ep.ConvergenceWarning, match="period two"):
        state = net.settle(x, steps=11, tolerance=1e-6)
    assert state.stats.oscillating
    np.testing.assert_array_equal(state.stats.per_sample, [[1.0], [1.0]])
    assert [float(s[0, 0]) for s in state.layers] == [1.0, 1.0]
    for schedule in ("evenodd", "sweeps"):
        state = net.settle(x, steps=11, tolerance=1e-6, check_every=1, schedule=schedule)
        assert state.stats.converged
        assert sorted(float(s[0, 0]) for s in state.layers) == [0.0, 1.0]


def test_tolerance_in_a_network_stops_where_the_residual_says(device):
    """The step at which `settle` stops is the first multiple of check_every whose recorded residual is small enough."""
    net = network("conv", device)
    batch = batch_of(net)
    images, tolerance = net.device.to_numpy(batch.images), 1e-4
    path = iterate(Oracle(net), images, Oracle(net).zeros(3), "synchronous", 60, False)
    worst = [
        max(np.sqrt(((a - b) ** 2).reshape(3, -1).mean(axis=1)).max() for a, b in zip(after, before, strict=True))
        for before, after in zip(path, path[1:], strict=False)
    ]
    for check_every in (1, 4):
        expected = next(t for t in range(1, 61) if t % check_every == 0 and worst[t - 1] <= tolerance)
        stats = net.settle(batch, steps=60, tolerance=tolerance, check_every=check_every).stats
        assert (stats.steps, stats.converged) == (expected, True)
    assert 4 < expected < 60


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_calls_a_schedule_makes(schedule):
    """One forward and one backward call a layer and iteration; a warm start first makes drives belong to it."""
    cold, warm = Geometric(), Geometric()
    settling.settle(cold, 2, schedule, warm=False)
    settling.settle(warm, 2, schedule, warm=True)
    for kind in ("forward", "backward"):
        for n in (1, 2):
            assert cold.log.count((kind, n)) == 2
    extra = len(warm.log) - len(cold.log)
    assert extra == {"synchronous": 0, "evenodd": 0, "sweeps": 2}[schedule]
    if schedule == "sweeps":
        assert cold.log[:2] == [("forward", 1), ("update", 1)]
        assert warm.log[:4] == [("forward", 1), ("forward", 2), ("backward", 2), ("update", 2)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"schedule": "syncronous"}, "did you mean 'synchronous'"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"check_every": 0}, "check_every"),
    ],
)
def test_wrong_arguments_are_one_line(options, word):
    net = network("dense")
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        net.settle(batch_of(net), **options)
    assert "\n" not in str(error.value)


# --- what it costs ---------------------------------------------------------------------------------------------------


def costly_case(pooling, precision="float32", activation="hard_sigmoid"):
    edges = [
        ep.Conv2d((16, 16, 4), 8, pooling=pooling),
        ep.Conv2d((8, 8, 8), 8),
        ep.Conv2d((8, 8, 8), 16, pooling=pooling),
        ep.Linear((4, 4, 16), 64),
    ]
    net = ep.Network(edges, CLASSES, device="cpu", feedback=0.5, precision=precision, activation=activation)
    signals = [
        ep.LocalError([1], pool=2),
        ep.LocalError([3], loss="squared_error"),
        ep.Distillation(Teacher(), [2, 4], temperature=2.0, learned=True),
    ]
    return net, batch_of(net, 32), signals


def settle_phase(net, batch, signals, phase, schedule, steps, free=None):
    if phase == "free":
        return net.settle(batch, steps=steps, schedule=schedule)
    free = free or net.settle(batch, steps=1, schedule=schedule)
    beta = 1.0 if phase == "tangent" else [0.5, -0.5]
    return net.settle(
        batch, free, targets=batch, beta=beta, nudge=phase, signals=signals, steps=steps, schedule=schedule
    )


@pytest.mark.parametrize("phase", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("pooling", "activation", "precision"), [("max", "hard_sigmoid", "float32"), ("average", "sigmoid", "float64")]
)
def test_a_step_allocates_nothing_after_the_first(monkeypatch, pooling, activation, precision, schedule, phase):
    """tracemalloc's peak within each step, views and other small objects aside; the smallest state takes 8 KiB.

    NumPy's own cast buffers are made small for the test: they are no arrays of ours.
    """
    net, batch, signals = costly_case(pooling, precision, activation)
    free = net.settle(batch, steps=1, schedule=schedule)
    inner, peaks = settling._ITERATIONS[schedule], []

    def watched(system, measure, downward):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        inner(system, measure, downward)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)

    monkeypatch.setitem(settling._ITERATIONS, schedule, watched)
    buffer_size = np.setbufsize(16)
    tracemalloc.start()
    try:
        settle_phase(net, batch, signals, phase, schedule, 5, free)
    finally:
        tracemalloc.stop()
        np.setbufsize(buffer_size)
    assert len(peaks) == 5
    assert max(peaks[1:]) < 4096, peaks


@pytest.mark.parametrize("phase", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_computes_two_products_an_edge(monkeypatch, schedule, phase):
    """Multiply-adds are counted where all large products pass. The first edge sees only the input, before the loop."""
    net, batch, signals = costly_case("max")
    free = net.settle(batch, steps=1, schedule=schedule)
    gemm, work = layers_module.gemm, []

    def counted(a, b, out):
        work.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return gemm(a, b, out=out)

    monkeypatch.setattr(layers_module, "gemm", counted)
    totals = []
    for steps in (3, 7):
        work.clear()
        settle_phase(net, batch, signals, phase, schedule, steps, free)
        totals.append(sum(work))
    samples = 32 if phase in ("free", "tangent") else 64
    # kernel 3, padding 1 on 8 x 8 maps of 8 channels to 8 and 16; 256 inputs of the dense edge to 64 units
    edges = [2 * 8 * 8 * 9 * 8 * 8, 2 * 8 * 8 * 9 * 8 * 16, 2 * 256 * 64]
    assert [edge.flops() for edge in net.layers[1:]] == edges
    assert totals[1] - totals[0] == 4 * 2 * sum(edges) * samples
    first = 2 * 16 * 16 * 9 * 4 * 8 * 32  # once a phase, of N images even for 2N samples
    once = totals[0] - 3 * 2 * sum(edges) * samples
    primed = {"synchronous": 0, "evenodd": edges[1], "sweeps": sum(edges)}[schedule] * samples
    assert once == {"free": first, "classical": first + primed, "deviation": 0, "tangent": 0}[phase]
