"""Schedules, states and starts of a phase. Oracle: each schedule written out once more, step by step."""

import numpy as np
import pytest
from oracle import Oracle, iterate
from small import batch_of, hosts, network, signals_of

import cupyep as ep

SCHEDULES = ("synchronous", "evenodd", "sweeps")
NUDGES = ("classical", "deviation", "tangent")


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize(
    ("schedule", "relaxation"),
    [*((schedule, 1.0) for schedule in SCHEDULES), ("synchronous", 0.7), ("evenodd", 1.6), ("sweeps", 1.3)],
)
def test_every_schedule_step_by_step(device, schedule, relaxation, pooling, warm):
    """States, residuals a sample and the trace of the first iterations equal the written-out schedule.

    A residual is what the rule asks for, not how far a relaxed update goes.
    """
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
        path = iterate(oracle, images, start, schedule, steps, warm, relaxation)
        found = net.settle(batch, state, steps=steps, schedule=schedule, relaxation=relaxation, record=True)
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
        residuals[:-1] /= relaxation
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
        free = net.settle(batch, steps=100, schedule=schedule, relaxation=1.0)
        nudged = net.settle(
            batch,
            free,
            targets=batch,
            beta=0.05,
            nudge=nudge,
            signals=signals,
            steps=100,
            schedule=schedule,
            relaxation=1.0,
        )
        ends.append(hosts(net, free.layers) + hosts(net, nudged.layers))
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd"])
def test_a_warm_start_goes_on_where_it_stopped(device, schedule):
    net = network("conv", device, pooling="max", activation="hard_sigmoid")
    batch = batch_of(net)
    straight = net.settle(batch, steps=9, schedule=schedule, relaxation=1.0)
    first = net.settle(batch, steps=4, schedule=schedule, relaxation=1.0)
    second = net.settle(batch, first, steps=5, schedule=schedule, relaxation=1.0)
    for a, b in zip(hosts(net, straight.layers), hosts(net, second.layers), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("activation", ["hard_sigmoid", ep.Clip("never zero", 1.0, 0.2, 1.0)], ids=["zero", "not"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_depends_on_what_buffers_held(device, schedule, activation):
    """Buffers are reused: full of NaN and impossible winners, they must give the states that fresh ones give."""
    net = network("conv", device, pooling="max", activation=activation)
    batch, signals = batch_of(net), signals_of("le")
    how = {"steps": 3, "schedule": schedule, "relaxation": 1.0}

    def run(poisoned):
        def poison():
            for block in (net.memory._block, net.memory._arena.block) if poisoned else ():
                block[...] = 255  # NaN where it is taken for numbers

        poison()
        free = net.settle(batch, **how)
        ends = hosts(net, free.layers)
        for nudge in ("classical", "deviation"):
            poison()
            nudged = net.settle(batch, free, targets=batch, beta=[0.5, -0.5], nudge=nudge, signals=signals, **how)
            ends += hosts(net, nudged.layers)
        return ends

    run(False)  # makes the buffers
    for a, b in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_reads_no_winners_of_the_phase_before(device, schedule):
    """From states that are not zero feedback flows at once, along winners that nothing has found yet."""
    net = network("conv", device, pooling="max", activation=ep.Clip("never zero", 1.0, 0.2, 1.0), precision="float32")
    batch, ends = batch_of(net), []
    net.settle(batch, steps=1, schedule=schedule, relaxation=1.0)  # makes the buffers
    for content in (0, 1, 2, 255):
        net.memory._block[...] = content
        ends.append(hosts(net, net.settle(batch, steps=1, schedule=schedule, relaxation=1.0).layers))
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_samples_do_not_see_each_other(device):
    net = network("conv", device, pooling="max")
    batch = batch_of(net)
    together = hosts(net, net.settle(batch, steps=7, schedule="synchronous").layers)
    for i in range(3):
        alone = net.settle(batch.images[i : i + 1], steps=7, schedule="synchronous")
        for a, b in zip(together, hosts(net, alone.layers), strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-12)


@pytest.mark.parametrize("nudge", NUDGES)
def test_over_relaxation_reaches_the_fixed_point_of_plain_updates(device, nudge):
    net = network("conv", device, pooling="max", activation="hard_sigmoid", gain=0.8)
    batch, ends = batch_of(net), []
    for relaxation in (1.0, 1.5):
        how = {"schedule": "evenodd", "relaxation": relaxation, "steps": 80}
        free = net.settle(batch, **how)
        nudged = net.settle(batch, free, targets=batch, beta=0.05, nudge=nudge, **how)
        ends.append(hosts(net, free.layers) + hosts(net, nudged.layers))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_over_relaxation_settles_at_the_rate_of_theory():
    """The chain of layers is consistently ordered. With rho the spectral radius of synchronous updates, even/odd ones
    settle at the rate rho^2 an iteration, and at omega - 1 from omega = 2 / (1 + sqrt(1 - rho^2)) on (Young 1954).
    So do weakly nudged phases in every form: where all is linear they differ by a constant input.
    """
    identity = ep.Clip("identity", 1.0, -1e6, 1e6)
    net = network("dense", activation=identity, gain=0.56)
    batch, free = batch_of(net, samples=1), {"schedule": "evenodd", "steps": 300}
    rest = net.settle(batch, **free)
    parts = [net.parameters()[f"layers.{n}.weight"] for n in (2, 3)]
    sizes = [7, 6, 5]
    jacobi = np.zeros((18, 18))
    for n, weight in enumerate(parts):
        start = sum(sizes[:n])
        below, above = slice(start, start + sizes[n]), slice(start + sizes[n], start + sizes[n] + sizes[n + 1])
        jacobi[below, above], jacobi[above, below] = weight, weight.T
    rho = np.abs(np.linalg.eigvalsh(jacobi)).max()
    best = 2 / (1 + np.sqrt(1 - rho**2))
    assert 0.85 < rho < 0.99
    for omega, rate in ((1.0, rho**2), (best + 0.1, best + 0.1 - 1)):
        how = {"steps": 61, "schedule": "evenodd", "relaxation": omega, "record": True}
        phases = [net.settle(batch, **how)]
        phases += [net.settle(batch, rest, targets=batch, beta=1e-4, nudge=nudge, **how) for nudge in NUDGES]
        for state in phases:
            size = np.linalg.norm(state.stats.trace, axis=1)
            assert (size[40] / size[20]) ** (1 / 20) == pytest.approx(rate, rel=0.04)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_a_relaxed_phase_ends_with_a_plain_update(device, tolerance):
    """What it leaves is sigma of its drives, within the range of sigma: deviations build on the drives alone."""
    net = network("conv", device, pooling="max", activation="hard_sigmoid", gain=0.8)
    state = net.settle(batch_of(net), steps=40, schedule="evenodd", relaxation=1.9, tolerance=tolerance, check_every=4)
    assert tolerance is None or (state.stats.converged and state.stats.steps < 40)
    for s, g in zip(hosts(net, state.layers), hosts(net, state.drives), strict=True):
        np.testing.assert_array_equal(s, np.clip(g, 0, 1))
