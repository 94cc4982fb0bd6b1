"""A batch in parts gives what the whole batch gives. Oracle: the whole batch, whose gradients other tests prove."""

import numpy as np
import pytest
from oracle import Oracle
from small import Teacher, batch_of, hosts, network, on_host, signals_of

import cupyep as ep
from cupyep.ops import factors
from cupyep.settling import SettleStats

SAMPLES = 7
STEPS = {"free_steps": 6, "nudged_steps": 4, "relaxation": 1.0}
OTHERWISE = {"schedule": "synchronous"}
LEARNERS = {
    f"EP {scheme} {nudge}": lambda net, scheme=scheme, nudge=nudge, **options: ep.EquilibriumPropagation(
        net, 0.3, scheme=scheme, nudge=nudge, generator=np.random.default_rng(5), **STEPS, **OTHERWISE | options
    )
    for scheme in ("centered", "onesided", "random", "tangent")
    for nudge in ("classical", "deviation")
    if (scheme, nudge) != ("tangent", "classical")
} | {
    "BPTT": lambda net, **options: ep.BackpropagationThroughTime(net, 6, 4, **OTHERWISE | options),
    "BP": ep.Backpropagation,
}


def every_signal():
    return [*signals_of("le"), *signals_of("kd"), ep.FeatureDistillation(Teacher(), {2: "middle"}, kappa=0.2)]


def assert_same(net, parts, whole):
    assert parts.gradients.keys() == whole.keys() - {"figures", "stats"}
    rounding = 1e-12 if net.device.is_gpu else 1e-13  # cuBLAS may sum another number of samples in another order
    for path, gradient in on_host(net, parts.gradients).items():
        assert np.abs(whole[path]).max() > 0
        np.testing.assert_allclose(gradient, whole[path], rtol=1e-12, atol=rounding * np.abs(whole[path]).max())
    for found, expected in zip(figures(net, parts), whole["figures"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    for found, expected in zip((parts.free, parts.nudged), whole["stats"], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert (found.steps, found.converged) == (expected.steps, expected.converged)
            np.testing.assert_allclose(found.per_sample, expected.per_sample, rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(found.residual, expected.residual, rtol=1e-9, atol=1e-14)


def figures(net, result):
    values = [result.loss, result.correct, result.count, result.activity, result.nudge_response]
    return [np.array(net.device.to_numpy(value), float) for value in values if value is not None]


def kept(net, result):
    """Return a result's content, which the learner's next step would overwrite."""
    return on_host(net, result.gradients) | {"figures": figures(net, result), "stats": (result.free, result.nudged)}


@pytest.mark.parametrize("signals", ["plain", "every"])
@pytest.mark.parametrize("name", LEARNERS)
def test_parts_give_what_the_whole_batch_gives(device, name, signals):
    """Parts of 3, 3 and 1 samples; of one sample each; and one that holds the batch, to the bit."""
    net = network("conv", device, pooling="max", activation="hard_sigmoid", feedback=0.6, gain=0.8)
    batch = batch_of(net, SAMPLES)

    def step(**options):
        own = [] if signals == "plain" else every_signal()
        learner = LEARNERS[name](net, signals=own, **options)
        return [kept(net, learner.step(batch)), learner.step(batch)]  # the second draws other signs

    whole = step()[1]
    expected = kept(net, whole)
    for size in (3, 1):
        assert_same(net, step(micro_batch=size)[1], expected)
    for size in (SAMPLES, 100):
        found = step(micro_batch=size)[1].gradients
        for path, gradient in on_host(net, found).items():
            np.testing.assert_array_equal(gradient, expected[path])


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
def test_parts_in_every_schedule_and_other_networks(device, schedule):
    net = network("dense", device, loss="squared_error", feedback=0.5)
    batch, options = batch_of(net, SAMPLES), {"schedule": schedule, "signals": signals_of("kd")}
    whole = kept(net, ep.EquilibriumPropagation(net, 0.3, **STEPS, **options).step(batch))
    assert_same(net, ep.EquilibriumPropagation(net, 0.3, **STEPS, **options, micro_batch=4).step(batch), whole)


def test_levels_are_the_means_over_the_parts(device):
    """Saturated units, and channels that no image of a part moves: counted on the states of parts of 3, 3, 1."""
    net = network("conv", device, activation="hard_sigmoid", gain=9.0, pooling="max")
    net.parameters()["layers.2.weight"][..., 1] = 0
    net.parameters()["layers.2.bias"][1] = 0
    batch = batch_of(net, SAMPLES)
    result = ep.Backpropagation(net, micro_batch=3).step(batch)
    states = Oracle(net).forward(net.device.to_numpy(batch.images))
    np.testing.assert_allclose(hosts(net, [result.saturated])[0], [np.mean(s >= 0.99) for s in states], rtol=1e-12)
    still = [
        sum(len(p) * np.mean(p.reshape(-1, p.shape[-1]).max(axis=0) <= 1e-3) for p in (s[:3], s[3:6], s[6:])) / SAMPLES
        for s in states
    ]
    np.testing.assert_allclose(hosts(net, [result.dead])[0], still, rtol=1e-12)
    assert still[1] >= 1 / 4, "the channel that was switched off is among the four"


def test_all_parts_are_nudged_to_the_same_side(device, monkeypatch):
    net = network("conv", device)
    signs = []
    settle = net.settle_nudged
    monkeypatch.setattr(net, "settle_nudged", lambda *a, **k: signs.append(a[2]) or settle(*a, **k))
    learner = ep.EquilibriumPropagation(net, 0.3, 2, 2, scheme="random", micro_batch=2, schedule="synchronous")
    for _ in range(8):
        learner.step(batch_of(net, 6))
    signs = np.array(signs).reshape(8, 3)
    assert (signs == signs[:, :1]).all()
    assert len(set(signs[:, 0])) == 2


@pytest.mark.parametrize("name", ["EP centered deviation", "BPTT", "BP"])
def test_evaluation_in_parts(device, name):
    net = network("conv", device)
    batch = batch_of(net, SAMPLES)
    whole, parts = (LEARNERS[name](net, **options).evaluate(batch) for options in ({}, {"micro_batch": 3}))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(float(a), float(b), rtol=1e-12)


def test_what_parts_say_of_their_settling_is_joined():
    """By hand: two layers; two samples in two phases, then one sample in two phases."""

    def stats(steps, per_sample, converged, oscillating):
        per_sample = np.array(per_sample, float)
        return SettleStats(steps, per_sample, converged, 0.5, oscillating, [per_sample])

    first = stats(10, [[1, 2, 3, 4], [5, 6, 7, 8]], True, False)
    second = stats(20, [[10, 20], [30, 40]], False, True)
    both = first.joined(second, 2)
    np.testing.assert_array_equal(both.per_sample, [[1, 2, 10, 3, 4, 20], [5, 6, 30, 7, 8, 40]])
    np.testing.assert_array_equal(both.residual, [40 / 6, 96 / 6])
    assert (both.steps, both.converged, both.tolerance, both.oscillating, both.trace) == (20, False, 0.5, True, [])
    assert first.joined(first, 2).converged is True
    assert stats(1, [[1], [2]], None, False).joined(stats(1, [[1], [2]], None, False)).converged is None


def test_a_tolerance_ends_each_part_by_itself(device):
    net = network("conv", device, feedback=0.5)
    batch = batch_of(net, 4)
    options = {"schedule": "evenodd", "relaxation": 1.0, "tolerance": 1e-6}
    result = ep.EquilibriumPropagation(net, 0.3, 60, 60, micro_batch=2, **options).step(batch)
    assert result.free.converged
    assert result.nudged.converged
    assert result.free.per_sample.shape == (3, 4)
    assert result.nudged.per_sample.shape == (3, 8)


@pytest.mark.parametrize("wrong", [0, -1, 2.5])
def test_wrong_micro_batches(wrong):
    with pytest.raises(ep.ConfigurationError, match=f"micro_batch must be a positive integer, not {wrong}"):
        ep.Backpropagation(network(), micro_batch=wrong)


def pictures(kind, rng):
    """Return images of one colour each, of repeated pixels, or of a drawing on a flat ground, (SAMPLES, 8, 8, 2)."""
    if kind == "flat":
        return np.broadcast_to(rng.uniform(0, 1, (SAMPLES, 1, 1, 2)), (SAMPLES, 8, 8, 2))
    if kind == "repeated":
        return rng.uniform(0, 1, (SAMPLES, 2, 2, 2)).repeat(4, axis=1).repeat(4, axis=2)
    images = np.full((SAMPLES, 8, 8, 2), -0.42)
    images[:, 2:6, 3:5] = rng.uniform(0, 2.8, (SAMPLES, 4, 2, 2))
    return images


@pytest.mark.parametrize("precision", ["float32", "float64", "float16", "tf32"])
@pytest.mark.parametrize("kind", ["flat", "repeated", "drawing"])
def test_a_sample_does_not_depend_on_its_batch(monkeypatch, rng, algorithm, kind, precision):
    """Where windows tie, rounding must not choose the winner: a library may sum another batch in another order.

    Here every product is off by its own rounding errors, of eight units in the last place.
    """
    noise, exact = np.random.default_rng(1), factors.gemm

    def rounded(a, b, out, tf32=False):
        exact(a, b, out, tf32)
        out *= (1 + 4 * np.finfo(out.dtype).eps * noise.uniform(-1, 1, out.shape)).astype(out.dtype)

    monkeypatch.setattr(factors, "gemm", rounded)
    edges = [ep.Conv2d((8, 8, 2), 6, pooling="max"), ep.Conv2d((4, 4, 6), 6, pooling="max"), ep.Linear((2, 2, 6), 5)]
    net = ep.Network(edges, 3, feedback=0.1, gain=1.2, device="cpu", precision=precision)
    images, labels = net.batch(pictures(kind, rng)).images, np.arange(SAMPLES) % 3
    whole = net.settle(images, steps=2, schedule="sweeps")
    first, middle, _ = whole.winners
    for n in range(SAMPLES):
        alone = net.settle(images[n : n + 1], steps=2, schedule="sweeps")
        np.testing.assert_array_equal(alone.winners[0][0], first[n])
    if kind == "flat":
        assert not first[:, 1:-1, 1:-1].any(), "where padding does not reach all units of a window are equal"
    how = {"free_steps": 2, "nudged_steps": 2, "schedule": "sweeps"}
    gradients = [
        on_host(net, ep.EquilibriumPropagation(net, micro_batch=size, **how).step(images, labels).gradients)
        for size in (None, 2)
    ]
    enlarged = 3 if (algorithm, precision) == ("winograd", "float32") else 1  # by the transforms
    limit = enlarged * {"float64": 1e-12, "float32": 1e-4}.get(precision, 0.02)
    for path, gradient in gradients[0].items():
        assert np.abs(gradients[1][path] - gradient).max() <= limit * np.abs(gradient).max()
