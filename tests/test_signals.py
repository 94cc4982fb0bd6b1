"""Intermediate signals. Oracle: hand values, finite differences through the network of oracle.py, labels themselves."""

from dataclasses import replace

import numpy as np
import pytest
from oracle import Oracle, Term, finite_difference, relative_error
from small import CLASSES, Teacher, batch_of, network, on_host, oracle_terms

import cupyep as ep


class Quartic(ep.Augmenter):
    """A user's signal: ``sum((s - t)^4) / 4`` with the labels spread over the state as target."""

    def target(self, layer, batch):
        return self.device.asarray(np.asarray(batch.labels, np.float64) / 4)

    def _difference(self, state, target):
        return state - target.reshape(-1, *[1] * (state.ndim - 1))

    def loss(self, layer, state, target):
        return (self._difference(state, target) ** 4 / 4).reshape(len(state), -1).sum(axis=1)

    def gradient(self, layer, state, target):
        return self._difference(state, target) ** 3


class QuarticTerm(Term):
    """The same for the oracle."""

    def value(self, s):
        difference = s - self.target.reshape(-1, *[1] * (s.ndim - 1))
        return self.weight * (difference**4 / 4).reshape(len(s), -1).sum(axis=1)


class FeatureTerm(Term):
    def value(self, s):
        return self.weight * ((s - self.target) ** 2).reshape(len(s), -1).sum(axis=1) / 2


class LabelTeacher:
    """A teacher that is certain of the right class."""

    def __init__(self, labels, certainty):
        self.rows = certainty * np.eye(CLASSES)[labels]

    def logits(self, split, index, view):
        return self.rows[index]


def feature_terms(net, batch, signal):
    target = Teacher().feature("middle", "train", batch.index, batch.view)
    return [Oracle(net).readout_term(batch.labels), FeatureTerm(2, "", target, signal.kappa)]


def quartic_terms(net, batch, signal):
    target = np.asarray(batch.labels) / 4
    return [
        Oracle(net).readout_term(batch.labels),
        *(QuarticTerm(layer, "", target, signal.kappa) for layer in signal.layers),
    ]


OWN_SIGNALS = {
    "quartic": (lambda: Quartic([1, 3], kappa=0.8), quartic_terms),
    "features": (lambda: ep.FeatureDistillation(Teacher(), {2: "middle"}, kappa=0.3), feature_terms),
}


@pytest.mark.parametrize("kind", OWN_SIGNALS)
def test_own_signal_and_features_against_finite_differences(device, kind):
    """A subclass with a loss and a gradient works in BPTT, and through it in every learner."""
    make, make_terms = OWN_SIGNALS[kind]
    net, signal = network("conv", device), make()
    batch = batch_of(net)
    images = net.device.to_numpy(batch.images)
    learner = ep.BackpropagationThroughTime(net, 2, 3, signals=[signal], schedule="synchronous")
    found = on_host(net, learner.step(batch).gradients)
    start, parameters = Oracle(net).settle(images, 2), on_host(net, net.parameters())
    terms = make_terms(net, batch, signal)[1:]

    def loss():
        oracle = Oracle(net, parameters)
        return oracle.loss_value(oracle.settle(images, 3, start), [oracle.readout_term(batch.labels), *terms]).mean()

    generator = np.random.default_rng(0)
    for path in ("layers.1.weight", "layers.2.bias", "layers.3.weight"):
        p = parameters[path]
        numeric = finite_difference(loss, p, 1e-6, generator.choice(p.size, 4, replace=False))
        checked = ~np.isnan(numeric)
        np.testing.assert_allclose(found[path][checked], numeric[checked], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", OWN_SIGNALS)
def test_own_signal_and_features_in_settle_and_ep(device, kind):
    """The nudged state rests where -dF/ds vanishes, and EP's tangent equals BPTT."""
    make, make_terms = OWN_SIGNALS[kind]
    net, signal = network("conv", device, feedback=0.5), make()
    batch = batch_of(net)
    free = net.settle(batch, steps=80, schedule="synchronous")
    nudged = net.settle(batch, free, targets=batch, beta=0.1, steps=80, signals=[signal], schedule="synchronous")
    host = [np.array(net.device.to_numpy(s)) for s in nudged.layers]
    oracle, images, terms = Oracle(net), net.device.to_numpy(batch.images), make_terms(net, batch, signal)
    for n, s in enumerate(host):
        entries = np.random.default_rng(0).choice(s.size, 6, replace=False)
        slope = finite_difference(lambda: oracle.energy(images, host, terms, 0.1).sum(), s, 1e-5, entries)
        np.testing.assert_allclose(slope.ravel()[entries], 0, atol=1e-8 * oracle.scales[n])
    ep_learner = ep.EquilibriumPropagation(
        net, 1.0, nudged_steps=80, scheme="tangent", signals=[signal], schedule="synchronous"
    )
    bptt = ep.BackpropagationThroughTime(net, 1, 80, signals=[signal], schedule="synchronous")
    found, true = (on_host(net, learner.step_from(batch, free).gradients) for learner in (ep_learner, bptt))
    for path in true:
        assert relative_error(found[path], true[path]) < 1e-9, path


@pytest.mark.parametrize("kind", OWN_SIGNALS)
def test_own_signal_and_features_in_the_energy(device, kind):
    """Their loss, kappa included, is part of the nudged energy."""
    make, make_terms = OWN_SIGNALS[kind]
    net, signal = network("conv", device), make()
    batch = batch_of(net)
    host = [np.random.default_rng(n).uniform(0.2, 0.8, (3, *shape)) for n, shape in enumerate(net.state_shapes)]
    layers = [net.device.asarray(s) for s in host]
    nudged = net.energy.value(batch.images, layers, net.nudges(batch, [signal]), 0.3)
    plain = net.energy.value(batch.images, layers)
    expected = 0.3 * sum(term.value(host[term.layer - 1]) for term in make_terms(net, batch, signal))
    np.testing.assert_allclose(net.device.to_numpy(nudged - plain), expected, rtol=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("learner_class", [ep.EquilibriumPropagation, ep.Backpropagation])
def test_distillation_from_a_certain_teacher_is_the_local_error(device, loss, learner_class):
    """One-hot teachers equal labels: the same maps (seed), the same gradients."""
    certainty = 1.0 if loss == "squared_error" else 1000.0
    gradients = []
    for kind in ("le", "kd", "plain"):
        net = network("conv", device, pooling="max")
        batch = batch_of(net)
        labels = np.zeros(20, int)
        labels[batch.index] = batch.labels
        options = {"layers": [1, 2], "kappa": 0.9, "loss": loss, "seed": 8, "pool": 2}
        signals = {
            "le": [ep.LocalError(**options)],
            "kd": [ep.Distillation(LabelTeacher(labels, certainty), **options)],
            "plain": [],
        }[kind]
        steps = {"free_steps": 10, "nudged_steps": 6, "schedule": "synchronous"}
        steps = steps if learner_class is ep.EquilibriumPropagation else {}
        gradients.append(on_host(net, learner_class(net, signals=signals, **steps).step(batch).gradients))
    for path in gradients[0]:
        np.testing.assert_allclose(gradients[1][path], gradients[0][path], rtol=1e-11, atol=1e-13)
    assert relative_error(gradients[2]["layers.1.weight"], gradients[0]["layers.1.weight"]) > 0.1


def test_distillation_looks_up_sample_and_view(device):
    """Logits of another view or sample make another target, with the temperature in it."""
    net = network("conv", device)
    signal = net.bind(ep.Distillation(Teacher(), [1, 2], temperature=4.0))
    batch = batch_of(net)
    first, second = signal.nudges(batch)
    z = Teacher().logits("train", batch.index, batch.view)
    expected = np.exp(z / 4) / np.exp(z / 4).sum(axis=1, keepdims=True)
    for nudge in (first, second):
        np.testing.assert_allclose(net.device.to_numpy(nudge.target), expected, rtol=1e-12)
    assert (first.term.layer, second.term.layer, first.weight) == (1, 2, 0.1)
    mirrored = ep.Batch(batch.images, batch.labels, batch.index, 1 - batch.view)
    other = net.device.to_numpy(signal.nudges(mirrored)[0].target)
    assert np.abs(other - expected).max() > 0.01


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_split_of_the_teacher_is_passed_on(device, kind):
    asked = []

    class Listening(Teacher):
        def logits(self, split, index, view):
            asked.append((split, list(index), list(view)))
            return super().logits("train", index, view)

        def feature(self, layer, split, index, view):
            asked.append((split, list(index), list(view)))
            return super().feature(layer, "train", index, view)

    net = network("conv", device)
    make = {
        "logits": lambda: ep.Distillation(Listening(), [1], split="test"),
        "features": lambda: ep.FeatureDistillation(Listening(), {2: "middle"}, split="test"),
    }[kind]
    net.bind(make()).nudges(batch_of(net))
    assert asked == [("test", [5, 6, 7], [0, 1, 0])]


def test_labels_of_local_errors_are_smoothed_as_those_of_the_readout(device):
    net = network("conv", device)
    batch = replace(batch_of(net), label_smoothing=0.3)
    nudges = net.nudges(batch, [ep.LocalError([1, 2])])
    assert [nudge.term.layer for nudge in nudges] == [3, 1, 2]
    for nudge in nudges:
        np.testing.assert_allclose(net.device.to_numpy(nudge.target), 0.7 * np.eye(3) + 0.1, rtol=1e-12)


def test_gain_and_pool_of_a_signal_reach_its_maps(device):
    """Maps of one seed are in proportion to their gain; a pooled one sees the means of windows, written out here."""
    net = network("conv", device)
    one, other = (net.bind(ep.LocalError([1], gain=gain, loss="squared_error", pool=3)) for gain in (1.0, 2.5))
    maps = [net.device.to_numpy(signal.term(1).weight) for signal in (one, other)]
    np.testing.assert_allclose(maps[1], 2.5 * maps[0], rtol=1e-14)
    batch, s = batch_of(net), np.random.default_rng(0).uniform(0, 1, (3, 3, 3, 3))
    (nudge,) = other.nudges(batch)
    z = s.mean(axis=(1, 2)) @ maps[1]
    loss = net.device.to_numpy(nudge.term.loss(net.device.asarray(s), nudge.target))
    np.testing.assert_allclose(loss, ((z - np.eye(CLASSES)[batch.labels]) ** 2).sum(axis=1) / 2, rtol=1e-12)


def test_annealing_by_hand():
    signal = ep.LocalError([1], kappa=0.8)
    for progress, factor in [(0.0, 1.0), (0.25, 0.8535533905932737), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0)]:
        signal.anneal(progress)
        assert signal.kappa == pytest.approx(0.8 * factor, abs=1e-15)
    constant = ep.LocalError([1], kappa=0.8, annealing="constant")
    constant.anneal(0.9)
    assert constant.kappa == 0.8


def test_no_nudge_at_the_end_of_the_annealing(device):
    """kappa 0 costs nothing and changes nothing."""
    net = network("conv", device)
    batch = batch_of(net)
    signal = net.bind(ep.LocalError([1], kappa=0.8))
    assert [nudge.weight for nudge in signal.nudges(batch)] == [0.8]
    signal.anneal(1.0)
    assert signal.nudges(batch) == []


def test_kappa_scales_the_signal(device):
    """The gradient of L + kappa L_i is linear in kappa."""
    net = network("conv", device)
    batch = batch_of(net)
    signal = ep.LocalError([2], kappa=0.8)
    learner = ep.Backpropagation(net, [signal])
    gradients = []
    for progress in (0.0, 0.5, 1.0):
        signal.anneal(progress)
        gradients.append(on_host(net, learner.step(batch).gradients)["layers.1.weight"])
    full, half, none = gradients
    np.testing.assert_allclose(half - none, (full - none) / 2, rtol=1e-9, atol=1e-14)
    assert relative_error(none, full) > 0.1


def test_maps_are_fixed_random_and_scaled(device):
    net = network("conv", device)
    a, b, c = (net.bind(ep.LocalError([1, 2], seed=seed)) for seed in (0, 0, 1))
    maps = [[net.device.to_numpy(signal.term(layer).weight) for layer in (1, 2)] for signal in (a, b, c)]
    for layer in (0, 1):
        np.testing.assert_array_equal(maps[0][layer], maps[1][layer])
        assert np.abs(maps[0][layer] - maps[2][layer]).max() > 0.1
    assert [m.shape for m in maps[0]] == [(27, CLASSES), (36, CLASSES)]
    for m in maps[0]:
        assert (m * np.sqrt(len(m))).std() == pytest.approx(1.0, rel=0.25)  # about a hundred draws of N(0, 1 / dim)
    assert not np.array_equal(maps[0][0], maps[0][1][:27])
    assert a.parameters() == {}


def test_learned_maps_are_parameters_and_survive_a_second_binding(device):
    """Learners of one network share its signals: binding again must not draw the maps anew."""
    net = network("conv", device)
    signals = [ep.LocalError([1]), ep.Distillation(Teacher(), [2, 3], learned=True)]
    learner = ep.EquilibriumPropagation(net, signals=signals, schedule="synchronous")
    assert list(learner.parameters())[-2:] == ["signals.1.layer2.weight", "signals.1.layer3.weight"]
    learned = learner.parameters()["signals.1.layer2.weight"]
    learned[...] = 0.25
    other = ep.BackpropagationThroughTime(net, signals=signals, schedule="synchronous")
    assert other.parameters()["signals.1.layer2.weight"] is learned
    assert float(learned[0, 0]) == 0.25
    assert sorted(other.step(batch_of(net)).gradients) == sorted(learner.parameters())


def test_every_learner_sees_learned_maps(device):
    """d(kappa L_i)/dA_i in feed-forward backpropagation, by finite differences."""
    net = network("conv", device)
    batch = batch_of(net)
    signals = [ep.Distillation(Teacher(), [2], kappa=0.7, temperature=2.0, learned=True, loss="squared_error")]
    found = on_host(net, ep.Backpropagation(net, signals).step(batch).gradients)["signals.0.layer2.weight"]
    term = oracle_terms(net, batch, signals)[1]
    state = Oracle(net).forward(net.device.to_numpy(batch.images))[1]
    np.testing.assert_allclose(found, finite_difference(lambda: term.value(state).mean(), term.matrix), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ep.LocalError([1], kappa=-0.1), "kappa"),
        (lambda: ep.LocalError([1], kappa=float("inf")), "kappa"),
        (lambda: ep.LocalError([1], kappa=float("nan")), "kappa"),
        (lambda: ep.LocalError([]), "at least one layer"),
        (lambda: ep.LocalError([1, 2, 1]), "repeat"),
        (lambda: ep.LocalError([1], annealing="cosinus"), "did you mean 'cosine'"),
        (lambda: ep.LocalError([1], loss="mse"), "unknown loss 'mse'"),
        (lambda: ep.LocalError([1], pool=0), "pool"),
        (lambda: ep.Distillation(Teacher(), [1], temperature=0), "temperature"),
        (lambda: network().bind(ep.LocalError([0])), "each of the signal layers must be a positive integer, not 0"),
        (lambda: network().bind(ep.LocalError([1, 4])), "there is no layer 4: the network has layers 1 to 3"),
        (lambda: network().bind(network().bind(ep.LocalError([1]))), "LocalError belongs to another network"),
        (lambda: network().bind(ep.LocalError([1], pool=4)), "pool <= 3 on layer 1"),
        (lambda: network().bind(ep.FeatureDistillation(Teacher(), {2: "midle"})), "did you mean 'middle'"),
        (lambda: network().bind(ep.FeatureDistillation(Teacher(), {1: "middle"})), "equal shapes"),
    ],
)
def test_wrong_arguments_are_one_line(make, word):
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        make()
    assert "\n" not in str(error.value)


def test_distillation_needs_index_and_view():
    net = network()
    for signal in (ep.Distillation(Teacher(), [1]), ep.FeatureDistillation(Teacher(), {2: "middle"})):
        learner = ep.EquilibriumPropagation(net, signals=[signal], schedule="synchronous")
        with pytest.raises(ep.ConfigurationError, match="give a Batch with index and view") as error:
            learner.step(np.zeros((2, 6, 6, 2)), [0, 1])
        assert "\n" not in str(error.value)


def test_teacher_of_other_classes_is_refused():
    class Wide(Teacher):
        def logits(self, split, index, view):
            return np.zeros((len(index), 7))

    net = network()
    learner = ep.EquilibriumPropagation(net, signals=[ep.Distillation(Wide(), [1])], schedule="synchronous")
    with pytest.raises(ep.ConfigurationError, match="the teacher has 7 classes, the network 3"):
        learner.step(batch_of(net))


@pytest.mark.parametrize("target", [np.zeros((1, 1)), np.zeros((4, 1)), np.zeros(()), [0.0] * 3, 0.0])
def test_a_target_has_a_row_for_each_sample(target):
    """One row would be spread over all samples, a teacher's too."""
    net, batch = network(), batch_of(network())
    own = type("Own", (Quartic,), {"target": lambda *_: target})([1])
    teacher = type("Few", (), {"logits": lambda *_: np.zeros((1, CLASSES))})()
    for signal in (own, ep.Distillation(teacher, [1])):
        with pytest.raises(ep.ConfigurationError, match="layer 1: a target is an array with a row for each of the 3 "):
            net.nudges(batch, [signal])


def test_an_unfinished_signal_says_what_it_lacks():
    net = network()
    learner = ep.Backpropagation(net, [ep.Augmenter([1])])
    with pytest.raises(NotImplementedError, match=r"Augmenter must define gradient\(layer, state, target\)"):
        learner.step(batch_of(net))


def test_one_layer_may_be_given_as_a_number():
    assert ep.LocalError(3).layers == ep.LocalError([3]).layers == [3]
