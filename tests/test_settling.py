"""When a phase stops, and what it says. Oracle: toy systems of known residuals, and the schedules written out."""

import warnings

import numpy as np
import pytest
from oracle import Oracle, iterate
from small import batch_of, network

import cupyep as ep
from cupyep import settling
from cupyep.program import Drive, TopDown, Update, make_program

SCHEDULES = ("synchronous", "evenodd", "sweeps")


def chain(length):
    return [ep.Linear((3,), 3) for _ in range(length)]


class Geometric:
    """Two layers, three samples; every update of a layer moves it by ``size * rate^t`` at its t-th update."""

    scale = 1.0
    relaxation = 1.0
    drives_current = False
    sizes = np.array([[1.0, 0.5, 0.25], [0.5, 2.0, 0.1]])

    def __init__(self, rate=0.5, schedule="synchronous", warm=False):
        self.rate = rate
        self.program = make_program(ep.Graph(chain(2)), schedule, warm, image=True)
        self.updates = np.zeros(2, int)
        self.x = np.zeros((2, 3))
        self.residual = np.full((2, 3), np.nan)

    def label(self, node):
        return f"layer {node}"

    def host(self, array):
        return array

    def repeat(self, name, work):
        work()

    def run(self, instructions, measure=False):
        for instruction in instructions:
            if isinstance(instruction, Update):
                self.update(instruction.node, measure)

    def update(self, n, measure):
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
    stats = settling.settle(Geometric(), 40, tolerance=0.01, check_every=check_every)
    assert (stats.steps, stats.converged, stats.oscillating) == (expected, True, False)
    np.testing.assert_allclose(stats.per_sample, Geometric.sizes * 0.5**expected, rtol=1e-12)
    np.testing.assert_allclose(stats.residual, Geometric.sizes.mean(axis=1) * 0.5**expected, rtol=1e-12)


def test_the_tolerance_itself_is_enough():
    stats = settling.settle(Geometric(), 40, tolerance=2 / 64, check_every=1)
    assert (stats.steps, stats.converged) == (6, True)


def test_sweeps_count_both_halves():
    """In one iteration a layer is updated twice: the squares add up."""
    stats = settling.settle(Geometric(schedule="sweeps"), 3)
    expected = Geometric.sizes * np.sqrt(0.5 ** (2 * 5) + 0.5 ** (2 * 6))
    np.testing.assert_allclose(stats.per_sample, expected, rtol=1e-12)


def test_no_tolerance_no_verdict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = settling.settle(Cycle(2), 5)
    assert (stats.steps, stats.converged, stats.oscillating, stats.tolerance) == (5, None, False, None)


def test_convergence_is_not_reported_when_absent():
    """One step short of it: not converged, and the warning names layer, samples and the knob."""
    with pytest.warns(ep.ConvergenceWarning) as caught:
        stats = settling.settle(Geometric(), 7, tolerance=0.01, check_every=1, name="nudged")
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
        settling.settle(system, 3, tolerance=1e-9)


def test_period_two_is_recognised():
    with pytest.warns(ep.ConvergenceWarning, match="period two: use schedule 'evenodd' or 'sweeps'"):
        stats = settling.settle(Cycle(2), 12, tolerance=1e-3)
    assert (stats.oscillating, stats.converged) == (True, False)


def test_two_steps_are_enough_to_see_period_two():
    system = Cycle(2)
    system.x = system.sizes.copy()  # on the cycle from the start
    with pytest.warns(ep.ConvergenceWarning, match="period two"):
        assert settling.settle(system, 2, tolerance=1e-3).oscillating


@pytest.mark.parametrize("system", [Cycle(4), Cycle(3), Geometric(0.9)])
def test_other_unrest_is_not_called_period_two(system):
    with pytest.warns(ep.ConvergenceWarning, match="raise the free steps"):
        stats = settling.settle(system, 12, tolerance=1e-3)
    assert (stats.oscillating, stats.converged) == (False, False)


def test_a_real_network_that_oscillates(device):
    """Two units that inhibit each other jump between (0, 0) and (1, 1) if updated together, and else come to rest."""
    net = ep.Network([ep.Linear((1,), 1), ep.Linear((1,), 1)], 2, device=device, precision="float64", feedback=1.0)
    for path, value in {"layers.1.weight": 1.0, "layers.2.weight": -5.0, "layers.2.bias": 1.0}.items():
        net.parameters()[path][...] = value
    x = np.ones((1, 1))
    with pytest.warns(ep.ConvergenceWarning, match="period two"):
        state = net.settle(x, steps=11, tolerance=1e-6, schedule="synchronous")
    assert state.stats.oscillating
    np.testing.assert_array_equal(state.stats.per_sample, [[1.0], [1.0]])
    assert [float(s[0, 0]) for s in state.layers] == [1.0, 1.0]
    for schedule in ("evenodd", "sweeps"):
        state = net.settle(x, steps=11, tolerance=1e-6, check_every=1, schedule=schedule, relaxation=1.0)
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
        stats = net.settle(batch, steps=60, tolerance=tolerance, check_every=check_every, schedule="synchronous").stats
        assert (stats.steps, stats.converged) == (expected, True)
    assert 4 < expected < 60


def written(instructions):
    """Return instructions of a chain in short: u2 is the drive of layer 2, d1 what layer 2 sends to 1, s2 an update."""
    names = {
        Drive: lambda i: f"u{i.connection + 1}",
        TopDown: lambda i: f"d{i.connection}",
        Update: lambda i: f"s{i.node}",
    }
    return " ".join(names[type(i)](i) for i in instructions)


@pytest.mark.parametrize(
    ("schedule", "warm", "expected", "start"),
    [
        ("synchronous", False, "u2 d1 s1 u3 d2 s2 u4 d3 s3 s4", ""),
        ("synchronous", True, "u2 d1 s1 u3 d2 s2 u4 d3 s3 s4", ""),
        ("evenodd", False, "u2 d2 s2 u4 s4 d1 s1 u3 d3 s3", ""),
        ("evenodd", True, "u2 d2 s2 u4 s4 d1 s1 u3 d3 s3", "u3"),  # its winners, which d2 sees
        ("sweeps", False, "s1 u2 s2 u3 s3 u4 s4 s4 d3 s3 d2 s2 d1 s1", ""),
        ("sweeps", True, "s4 d3 s3 d2 s2 d1 s1 s1 u2 s2 u3 s3 u4 s4", "u2 u3 u4"),
    ],
)
def test_programs_of_a_chain(schedule, warm, expected, start):
    """One drive and one top-down product a connection; that of the image is constant. By hand."""
    edges = [
        ep.Conv2d((8, 8, 1), 1),
        ep.Conv2d((8, 8, 1), 1),
        ep.Conv2d((8, 8, 1), 1, pooling="max"),
        ep.Linear((4, 4, 1), 2),
    ]
    program = make_program(ep.Graph(edges), schedule, warm, image=True)
    assert (written(program.body), written(program.start)) == (expected, start)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"schedule": "syncronous"}, "did you mean 'synchronous'"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"check_every": 0}, "check_every"),
        ({"relaxation": 0.0}, "above 0 and below 2"),
        ({"relaxation": 2.0, "schedule": "evenodd"}, "above 0 and below 2"),
        ({"relaxation": float("nan")}, "above 0 and below 2"),
        ({"relaxation": 1.1, "schedule": "synchronous"}, "relaxation 1.1 with synchronous updates"),
    ],
)
def test_wrong_arguments_are_one_line(options, word):
    net = network("dense")
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        net.settle(batch_of(net), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", [{}, {"tolerance": 0.02, "check_every": 4}, {"tolerance": 1e-9, "check_every": 7}])
@pytest.mark.parametrize(
    ("schedule", "relaxation"), [("synchronous", 1.0), ("synchronous", 0.8), ("evenodd", 1.6), ("sweeps", 1.0)]
)
@pytest.mark.parametrize("nudge", ["classical", "deviation", "tangent"])
def test_watching_does_not_touch(device, nudge, schedule, relaxation, how):
    """With `record` a phase stops at the same step with the same bits, and its states are sigma of its drives."""
    net = network("conv", device, pooling="max", gain=1.2)
    batch, shared = batch_of(net), {"schedule": schedule, "relaxation": relaxation, "steps": 25, **how}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ep.ConvergenceWarning)
        phases = {}
        for record in (False, True):
            free = net.settle(batch, record=record, **shared)
            nudged = net.settle(batch, free, targets=batch, beta=[0.2, -0.2], nudge=nudge, record=record, **shared)
            phases[record] = free, nudged
    for plain, watched in zip(phases[False], phases[True], strict=True):
        assert plain.stats.steps == watched.stats.steps == len(watched.stats.trace)
        for name in ("layers", "drives", "winners", "deviations"):
            for a, b in zip(getattr(plain, name) or [], getattr(watched, name) or [], strict=True):
                if a is not None:
                    np.testing.assert_array_equal(device.to_numpy(a), device.to_numpy(b))
        np.testing.assert_array_equal(plain.stats.per_sample, watched.stats.per_sample)
    free = phases[True][0]
    for s, g in zip(free.layers, free.drives, strict=True):
        np.testing.assert_allclose(device.to_numpy(s), 1 / (1 + np.exp(2 - 4 * device.to_numpy(g))), rtol=1e-12)


def test_the_warning_shows_the_line_that_asked():
    net = ep.build("8 8", 4, (4, 4, 1), device="cpu", feedback=1.0)
    with pytest.warns(ep.ConvergenceWarning) as caught:
        net.settle(np.ones((2, 4, 4, 1)), steps=1, tolerance=1e-9)
    assert caught[0].filename == __file__
