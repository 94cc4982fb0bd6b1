"""EP against the true gradient. Oracle: BPTT from the same free state (test_bptt.py proves it by finite differences).

EP's error must fall as beta (one-sided) and as beta^2 (centered): the orders are asserted, because a wrong factor or a
missing term leaves an error that does not fall at all. Where units are clipped or windows have winners, the tests
assert that none of them changes within the nudge: only then are the orders defined.
"""

import numpy as np
import pytest
from oracle import Oracle, finite_difference, relative_error
from small import CLASSES, batch_of, hosts, network, on_host, oracle_terms, signals_of

import cupyep as ep

STEPS = 100


def settled(net, batch, schedule="synchronous", steps=STEPS):
    free = net.settle(batch, steps=steps, schedule=schedule, relaxation=1.0)
    assert free.stats.residual.max() < 1e-12, "the case must settle: BPTT and EP agree at an equilibrium"
    return free


def truth(net, batch, free, signals=(), unrolled=STEPS):
    """Return BPTT's gradients, unrolled from the free state."""
    learner = ep.BackpropagationThroughTime(net, 1, unrolled, signals=signals, schedule="synchronous")
    return on_host(net, learner.step_from(batch, free).gradients)


def estimate(net, batch, free, signals=(), steps=STEPS, **options):
    options = {"free_steps": 60, "nudged_steps": steps, "schedule": "synchronous", "relaxation": 1.0, **options}
    learner = ep.EquilibriumPropagation(net, signals=signals, **options)
    return on_host(net, learner.step_from(batch, free).gradients)


def errors(estimated, true):
    assert estimated.keys() == true.keys()
    return {path: relative_error(estimated[path], true[path]) for path in true}


def assert_orders(net, batch, signals=(), beta=0.02):
    """The error of every gradient falls fourfold (centered) or twofold (one-sided) as beta is halved, in both forms."""
    free = settled(net, batch)
    true = truth(net, batch, free, signals)
    for scheme, first, expected in (("centered", beta, 4.0), ("onesided", beta / 5, 2.0)):
        for nudge in ("classical", "deviation"):
            coarse, fine = (
                errors(estimate(net, batch, free, signals, beta=b, scheme=scheme, nudge=nudge), true)
                for b in (first, first / 2)
            )
            for path in true:
                where = (scheme, nudge, path, coarse[path], fine[path])
                assert coarse[path] < 0.1, where
                if coarse[path] > 1e-7:  # the bias of a linear loss has no error to fall
                    assert coarse[path] / fine[path] == pytest.approx(expected, rel=0.15), where
            assert max(coarse.values()) > 1e-5, "nothing was compared"


def host_states(net, state):
    """Return states and winners on the host."""
    to_numpy = net.device.to_numpy
    return [to_numpy(s) for s in state.layers], [None if w is None else to_numpy(w) for w in state.winners]


@pytest.mark.parametrize("feedback", [1.0, 0.4])
@pytest.mark.parametrize("scheme", ["centered", "onesided"])
def test_classical_estimate_is_the_difference_of_two_energies(device, scheme, feedback):
    """-a_n [dPhi/dw(s_1) - dPhi/dw(s_2)] / span at the nudged states, each with its own winners; beta is large."""
    net = network("conv", device, pooling="max", activation="hard_sigmoid", feedback=feedback, gain=0.4, seed=4)
    batch, signals, beta = batch_of(net), signals_of("le"), 0.4
    images = net.device.to_numpy(batch.images)
    free = settled(net, batch)
    second_beta = {"centered": -beta, "onesided": 0.0}[scheme]
    phases, winners = [], []
    for b in (beta, second_beta):
        nudge = {"targets": batch, "beta": b, "signals": signals, "steps": STEPS, "schedule": "synchronous"}
        state = net.settle(batch, free, **nudge) if b else free
        assert state.stats.residual.max() < 1e-12
        layers, its_winners = host_states(net, state)
        phases.append(layers)
        winners.append(its_winners[2])
    assert not np.array_equal(*winners), "no winner changes: the case tests nothing"
    found = estimate(net, batch, free, signals, scheme=scheme, nudge="classical", beta=beta)
    parameters = on_host(net, net.parameters())
    for path in ("layers.1.weight", "layers.2.weight", "layers.3.weight", "layers.3.bias"):
        n = int(path.split(".")[1])

        def difference(n=n):
            oracle = Oracle(net, parameters)
            phi = [(s[n - 1] * oracle.drives(images, s)[n - 1][0]).sum() for s in phases]
            return -oracle.scales[n - 1] * (phi[0] - phi[1]) / ((beta - second_beta) * len(images))

        array = parameters[path]
        entries = np.random.default_rng(0).choice(array.size, min(array.size, 8), replace=False)
        expected = finite_difference(difference, array, 1e-6, entries).ravel()[entries]
        np.testing.assert_allclose(found[path].ravel()[entries], expected, rtol=1e-6, atol=1e-8, err_msg=path)


def test_forms_agree_where_nothing_is_kinked(device):
    """With one branch only, classical and deviation form are the same estimate, at any beta."""
    net = network("conv", device, feedback=0.3)
    batch, signals = batch_of(net), signals_of("le")
    free = settled(net, batch)
    classical, deviation = (
        estimate(net, batch, free, signals, beta=0.05, nudge=nudge) for nudge in ("classical", "deviation")
    )
    assert max(errors(classical, deviation).values()) < 1e-9


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("signal", ["plain", "le", "kd"])
def test_error_orders_with_every_signal(device, signal, feedback):
    net = network("conv", device, feedback=feedback)
    assert_orders(net, batch_of(net), signals_of(signal))


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_error_orders_with_every_loss_and_edge(device, kind, loss, feedback):
    net = network(kind, device, loss=loss, feedback=feedback)
    assert_orders(net, batch_of(net), signals_of("le"))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("signal", ["le", "kd"])
def test_error_orders_of_signal_losses(device, signal, loss, activation):
    net = network("dense", device, activation=activation, gain=0.4)
    assert_orders(net, batch_of(net), signals_of(signal, loss=loss))


def assert_same_branch(net, batch, signals, beta, clipping=True):
    """No unit crosses a clip boundary and no window changes its winner from the free to the nudged states."""
    free = settled(net, batch)
    layers, winners = host_states(net, free)
    clipped = [np.stack([s == 0, s == 1]) for s in layers]
    for sign in (1, -1):
        nudged = net.settle(
            batch, free, targets=batch, beta=sign * beta, steps=STEPS, signals=signals, schedule="synchronous"
        )
        nudged_layers, nudged_winners = host_states(net, nudged)
        for before, s in zip(clipped, nudged_layers, strict=True):
            np.testing.assert_array_equal(np.stack([s == 0, s == 1]), before)
        for before, now in zip(winners, nudged_winners, strict=True):
            if before is not None:
                np.testing.assert_array_equal(now, before)
    if clipping:
        share = np.concatenate([c.any(axis=0).ravel() for c in clipped]).mean()
        assert 0.02 < share < 0.7, f"{share:.3f} of the units are clipped: the case tests nothing"
    if winners[0] is not None:
        assert len(set(winners[0].ravel())) == 4, "all places of the window should win somewhere"


@pytest.mark.parametrize("feedback", [1.0, 0.3])
def test_error_orders_of_max_pooling_with_a_smooth_activation(device, feedback):
    net = network("conv", device, pooling="max", feedback=feedback)
    batch, signals = batch_of(net), signals_of("le")
    assert_same_branch(net, batch, signals, 0.02, clipping=False)
    assert_orders(net, batch, signals)


@pytest.mark.parametrize("feedback", [1.0, 0.3])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize(("activation", "slope"), [("hard_sigmoid", 1.0), ("half_hard_sigmoid", 0.5)])
def test_error_orders_of_clips(device, activation, slope, pooling, feedback):
    options = {"pooling": pooling, "feedback": feedback, "activation": activation, "seed": 4}
    net = network("conv", device, gain=0.4 / slope, bias=0.2 / slope, **options)
    batch, signals = batch_of(net), signals_of("le")
    assert_same_branch(net, batch, signals, 0.02)
    assert_orders(net, batch, signals)


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
@pytest.mark.parametrize("signal", ["plain", "le", "kd"])
@pytest.mark.parametrize("feedback", [1.0, 0.3])
def test_tangent_is_the_gradient_itself(device, signal, feedback, schedule):
    """The limit beta -> 0, in one phase, equals BPTT to rounding, not to an order."""
    net = network("conv", device, pooling="max", feedback=feedback)
    batch, signals = batch_of(net), signals_of(signal)
    free = settled(net, batch, schedule)
    found = errors(
        estimate(net, batch, free, signals, scheme="tangent", schedule=schedule), truth(net, batch, free, signals)
    )
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("activation", ["tanh", "relu6", "gelu"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_tangent_with_every_loss_and_edge(device, kind, loss, activation):
    net = network(kind, device, loss=loss, activation=activation, gain=0.3)
    batch, signals = batch_of(net), signals_of("kd")
    free = settled(net, batch)
    found = errors(estimate(net, batch, free, signals, scheme="tangent"), truth(net, batch, free, signals))
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_truncated_tangent_equals_truncated_unrolling(device, steps):
    """K nudged steps mirror K unrolled ones, step by step (Ernoult et al. 2019)."""
    net = network("conv", device)
    batch = batch_of(net)
    free = settled(net, batch)
    found = estimate(net, batch, free, steps=steps, scheme="tangent")
    true = truth(net, batch, free, unrolled=steps)
    reached = {path for path in true if np.any(true[path])}
    assert len(reached) == {1: 4, 2: 6}.get(steps, 8), "an error travels down one layer a step"
    for path in true:
        np.testing.assert_allclose(found[path], true[path], rtol=1e-9, atol=1e-12 if path in reached else 0)


def test_random_scheme_draws_both_signs(device):
    """Each draw is the one-sided estimate of +beta or of -beta; the mean of both is closer to the truth than either."""
    net = network("dense", device)
    batch, signals, path = batch_of(net), signals_of("le"), "layers.1.weight"
    free = settled(net, batch)
    true = truth(net, batch, free, signals)[path]
    plus = estimate(net, batch, free, signals, beta=0.02, scheme="onesided")[path]
    learner = ep.EquilibriumPropagation(
        net,
        0.02,
        nudged_steps=STEPS,
        scheme="random",
        signals=signals,
        generator=np.random.default_rng(3),
        schedule="synchronous",
    )
    drawn = [on_host(net, learner.step_from(batch, free).gradients)[path] for _ in range(12)]
    is_plus = [relative_error(g, plus) < 1e-9 for g in drawn]
    others = [g for g, same in zip(drawn, is_plus, strict=True) if not same]
    assert 2 <= sum(is_plus) <= 10
    assert max(relative_error(g, others[0]) for g in others) < 1e-9
    assert relative_error((plus + others[0]) / 2, true) < 0.2 * relative_error(plus, true)
    assert relative_error(others[0], true) < 2 * relative_error(plus, true)


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
def test_learned_map_gradient(device, nudge):
    """At small beta the gradient of a learned map is the derivative of its loss at the free state, kappa included."""
    net = network("conv", device)
    batch, signals = batch_of(net), signals_of("kd")
    found = estimate(net, batch, settled(net, batch), signals, beta=1e-4, nudge=nudge)
    layers = Oracle(net).settle(net.device.to_numpy(batch.images), STEPS)
    term = oracle_terms(net, batch, signals)[1]
    expected = finite_difference(lambda: term.value(layers[1]).mean(), term.matrix)
    np.testing.assert_allclose(found["signals.0.layer2.weight"], expected, rtol=1e-5, atol=1e-8)
    assert np.abs(expected).max() > 1e-3


def test_fixed_maps_get_no_gradient(device):
    net = network("conv", device)
    learner = ep.EquilibriumPropagation(
        net, free_steps=2, nudged_steps=2, signals=signals_of("le"), schedule="synchronous"
    )
    assert sorted(learner.step(batch_of(net)).gradients) == sorted(net.parameters())


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
def test_readout_gradient_is_the_mean_over_the_nudged_states(device, nudge):
    """At any beta: the direct derivative of L, averaged over the two nudged states."""
    net = network("dense", device)
    batch = batch_of(net)
    free = settled(net, batch)
    found = estimate(net, batch, free, beta=0.1, nudge=nudge)
    oracle, target = Oracle(net), np.eye(CLASSES)[batch.labels]
    expected, expected_bias = np.zeros((5, 3)), np.zeros(3)
    for beta in (0.1, -0.1):
        nudged = net.settle(batch, free, targets=batch, beta=beta, steps=STEPS, schedule="synchronous")
        top = net.device.to_numpy(nudged.layers[-1])
        z = top @ oracle.parameters["readout.weight"] + oracle.parameters["readout.bias"]
        error = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - target
        expected += top.T @ error / len(top) / 2
        expected_bias += error.mean(axis=0) / 2
    np.testing.assert_allclose(found["readout.weight"], expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found["readout.bias"], expected_bias, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scheme", ["centered", "tangent"])
def test_small_feedback_approaches_backpropagation(device, scheme):
    """lambda -> 0 is backpropagation: the difference falls in proportion to lambda."""
    distance = []
    for feedback in (1e-2, 1e-3):
        net = network("conv", device, feedback=feedback, pooling="max")
        batch, signals = batch_of(net), signals_of("le")
        bp = on_host(net, ep.Backpropagation(net, signals).step(batch).gradients)
        free = settled(net, batch, steps=30)
        distance.append(errors(estimate(net, batch, free, signals, 30, scheme=scheme, beta=1e-3), bp))
    for path in distance[0]:
        assert distance[1][path] < 0.01
        assert distance[0][path] / distance[1][path] == pytest.approx(10, rel=0.2), path


@pytest.mark.parametrize(("activation", "pooling"), [("hard_sigmoid", "max"), ("sigmoid", "average")])
@pytest.mark.parametrize("scheme", ["centered", "onesided", "tangent"])
def test_tiny_responses_survive_float32(device, activation, pooling, scheme):
    """With lambda 1e-3 in five layers the first one answers a nudge by 1e-12: float32 must carry it in every layer."""

    def build(precision):
        edges = [ep.Conv2d((8, 8, 2), 4, pooling=pooling)]
        edges += [ep.Conv2d((4, 4, 4), 4) for _ in range(3)] + [ep.Conv2d((4, 4, 4), 4, pooling=pooling)]
        return ep.Network(
            edges, CLASSES, activation=activation, feedback=1e-3, gain=1.2, device=device, precision=precision, seed=2
        )

    single, double = build("float32"), build("float64")
    double.load_parameters({path: p.astype(np.float64) for path, p in single.parameters().items()})
    images = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 2)).astype(np.float32)
    labels = np.arange(4) % CLASSES
    beta = {"centered": 0.1, "onesided": 0.003, "tangent": 1.0}[scheme]
    result = ep.EquilibriumPropagation(single, beta, 8, 8, scheme=scheme, schedule="sweeps").step(images, labels)
    batch = double.batch(images, labels)
    true = truth(double, batch, settled(double, batch, steps=60), unrolled=30)
    response = single.device.to_numpy(result.nudge_response)
    assert response[0] / (1 if scheme == "tangent" else beta) < 1e-11
    assert response[0] > 0
    for path, gradient in on_host(single, result.gradients).items():
        cosine = (gradient * true[path]).sum() / np.linalg.norm(gradient) / np.linalg.norm(true[path])
        assert cosine > 0.99, (path, cosine)
        assert 0.9 < np.linalg.norm(gradient) / np.linalg.norm(true[path]) < 1.1, path


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
@pytest.mark.parametrize("scheme", ["centered", "onesided"])
def test_step_reports_loss_hits_activity_and_response(device, scheme, nudge):
    net = network("dense", device)
    batch = batch_of(net, samples=5)
    result = ep.EquilibriumPropagation(
        net, 0.05, STEPS, STEPS, scheme=scheme, nudge=nudge, schedule="synchronous"
    ).step(batch)
    oracle = Oracle(net)
    layers = oracle.settle(net.device.to_numpy(batch.images), STEPS)
    term = oracle.readout_term(batch.labels)
    assert float(result.loss) == pytest.approx(term.value(layers[-1]).mean(), rel=1e-9)
    assert int(result.correct) == (term.output(layers[-1]).argmax(axis=1) == batch.labels).sum()
    assert result.count == 5
    np.testing.assert_allclose(net.device.to_numpy(result.activity), [np.abs(s).mean() for s in layers], rtol=1e-9)
    free = settled(net, batch)
    plus, minus = (
        net.settle(batch, free, targets=batch, beta=b, steps=STEPS, schedule="synchronous") for b in (0.05, -0.05)
    )
    other = minus if scheme == "centered" else free
    response = [float(abs(p - m).mean()) for p, m in zip(plus.layers, other.layers, strict=True)]
    np.testing.assert_allclose(net.device.to_numpy(result.nudge_response), response, rtol=1e-6)
    assert (result.free.steps, result.nudged.steps) == (STEPS, STEPS)
    assert result.nudged.per_sample.shape == (3, 10 if scheme == "centered" else 5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"beta": 0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"free_steps": 0}, "free_steps"),
        ({"nudged_steps": -3}, "nudged_steps"),
        ({"scheme": "centred"}, "did you mean 'centered'"),
        ({"nudge": "deviations"}, "did you mean 'deviation'"),
        ({"schedule": "even-odd"}, "did you mean 'evenodd'"),
        ({"scheme": "tangent", "nudge": "classical"}, "deviation"),
    ],
)
def test_wrong_arguments_are_one_line(options, word):
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        ep.EquilibriumPropagation(network("dense"), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
def test_squared_error_takes_nudges_below_one(nudge):
    """``s <- d - beta (s - y)`` falls by beta each step; the tangent, the limit of weak nudges, has no beta."""
    net = network("dense", "cpu", loss="squared_error")
    word = "squared error needs beta between -1 and 1, not 1.0"
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        ep.EquilibriumPropagation(net, beta=1.0, nudge=nudge)
    assert "\n" not in str(error.value)
    learner, batch = ep.EquilibriumPropagation(net, beta=0.99, nudge=nudge), batch_of(net)
    with pytest.raises(ep.ConfigurationError, match=word):
        net.settle(batch, net.settle(batch), targets=batch, beta=1.0, nudge=nudge)
    learner.beta = 1.0
    with pytest.raises(ep.ConfigurationError, match=f"{word}, -1.0"):
        learner.step(batch)
    ep.EquilibriumPropagation(net, beta=1.0, scheme="tangent").step(batch)
    ep.EquilibriumPropagation(network("dense", "cpu"), beta=1.0, nudge=nudge).step(batch)


def test_classical_gradient_uses_the_winners_of_the_nudged_states():
    """Far from rest winners still change: those of the last drives would belong to the states before."""
    layers = [
        ep.Conv2d((8, 8, 2), 5, pooling="max"),
        ep.Conv2d((4, 4, 5), 6, pooling="max"),
        ep.Conv2d((2, 2, 6), 4),
    ]
    net = ep.Network(layers, 3, device="cpu", precision="float64", gain=3.0, seed=2, feedback=1.0)
    x, y = np.random.default_rng(0).random((4, 8, 8, 2)), np.array([0, 1, 2, 0])
    learner = ep.EquilibriumPropagation(
        net, beta=0.5, free_steps=2, nudged_steps=2, nudge="classical", schedule="synchronous"
    )
    free = net.settle(x, steps=2, schedule="synchronous")
    found = learner.step_from(net.batch(x, y), free).gradients
    nudged = net.settle(x, free, targets=y, beta=[0.5, -0.5], steps=2, schedule="synchronous")
    plus, minus = (net.energy.parameter_gradient(net.batch(x).images, [s[part] for s in nudged.layers])
                   for part in (slice(4), slice(4, 8)))  # fmt: skip
    for path, gradient in plus.items():
        np.testing.assert_allclose(found[path], (gradient - minus[path]) / (2 * 0.5 * 4), rtol=1e-9, atol=1e-12)


def test_relaxation_is_that_of_both_phases(device):
    """Three steps each: far from rest, where relaxed and plain phases differ."""
    net = network("conv", device, pooling="max")
    batch, how = batch_of(net), {"steps": 3, "schedule": "evenodd", "relaxation": 1.5}
    free = net.settle(batch, **how)
    nudged = net.settle(batch, free, targets=batch, beta=[0.4, -0.4], nudge="deviation", **how)
    learner = ep.EquilibriumPropagation(net, 0.4, 3, 3, schedule="evenodd", relaxation=1.5)
    own_free = learner.settle_free(batch).copy()
    own_nudged = learner.settle_nudged(batch, own_free, [0.4, -0.4], net.nudges(batch))
    for a, b in zip(hosts(net, free.drives), hosts(net, own_free.drives), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(hosts(net, nudged.deviations), hosts(net, own_nudged.deviations), strict=True):
        np.testing.assert_array_equal(a, b)
    plain = net.settle(batch, **how | {"relaxation": 1.0})
    assert (
        max(np.abs(a - b).max() for a, b in zip(hosts(net, plain.drives), hosts(net, free.drives), strict=True)) > 0.01
    )


@pytest.mark.parametrize("learner", [ep.EquilibriumPropagation, ep.BackpropagationThroughTime])
def test_relaxation_that_cannot_settle_is_refused(learner):
    with pytest.raises(
        ep.ConfigurationError, match=r"relaxation 1.5 with synchronous updates .* use schedule 'evenodd'"
    ):
        learner(network("dense"), schedule="synchronous", relaxation=1.5)


def test_a_state_that_did_not_settle_has_no_winners_to_compare_with():
    net = network()
    batch = batch_of(net, 2)
    arrays = [s.copy() for s in net.settle(batch).layers]
    learner = ep.EquilibriumPropagation(net, scheme="onesided", nudge="classical")
    with pytest.raises(ep.ConfigurationError, match=r"pass what settle\(\) returned"):
        learner.step_from(batch, ep.State(arrays))
