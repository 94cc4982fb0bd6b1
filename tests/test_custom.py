"""Parts of a user's own: wrong ones are named, right ones (the package's own among them) pass."""

import numpy as np
import pytest
from small import Teacher, batch_of, network

import cupyep as ep
from cupyep.learning.custom import judge


class Right(ep.Augmenter):
    """Half the squared distance from the image's label, a different one a layer."""

    def target(self, layer, batch):
        return self.device.asarray(np.asarray(batch.labels, np.float64) / layer)

    def loss(self, layer, state, target):
        return 0.5 * ((state - self._wide(state, target)) ** 2).reshape(len(state), -1).sum(axis=1)

    def gradient(self, layer, state, target):
        return state - self._wide(state, target)

    @staticmethod
    def _wide(state, target):
        return target.reshape(-1, *[1] * (state.ndim - 1))


class WrongSign(Right):
    def gradient(self, layer, state, target):
        return -super().gradient(layer, state, target)


class Doubled(Right):
    def gradient(self, layer, state, target):
        return 2 * super().gradient(layer, state, target)


class Mean(Right):
    def gradient(self, layer, state, target):
        return super().gradient(layer, state, target) / len(state)


class Narrow(Right):
    def gradient(self, layer, state, target):
        return super().gradient(layer, state, target)[:, :1]


class Summed(Right):
    def loss(self, layer, state, target):
        return super().loss(layer, state, target).sum()


class Unsummed(Right):
    def loss(self, layer, state, target):
        return 0.5 * (state - self._wide(state, target)) ** 2


class Mixed(Right):
    def loss(self, layer, state, target):
        loss = super().loss(layer, state, target)
        return loss + 0 * loss + loss.mean()


class OtherLayer(Right):
    def gradient(self, layer, state, target):
        return state - self._wide(state, target * layer)


class InPlace(Right):
    def gradient(self, layer, state, target):
        state -= self._wide(state, target)
        return state


class Short(Right):
    def target(self, layer, batch):
        return super().target(layer, batch)[:1]


class NoKappa(Right):
    def nudges(self, batch):
        return [ep.Nudge(term, 1.0, self.target(layer, batch)) for layer, term in self._terms.items()]


class _Term(ep.LossTerm):
    def __init__(self, layer, fault):
        self.layer, self.fault = layer, fault

    def loss(self, state, target):
        return 0.5 * (state**2).reshape(len(state), -1).sum(axis=1)

    def add_force(self, state, target, scale, force, scratch=None):
        share = scale.reshape(-1, *[1] * (state.ndim - 1)) * state
        if self.fault == "written":
            force[...] = share
        elif self.fault == "unscaled":
            force += state
        elif self.fault == "half":
            force += share[:, :, ::-1]
        else:
            force += share


class WithTerm(ep.Augmenter):
    def __init__(self, fault):
        super().__init__([2])
        self.fault = fault

    def make_term(self, layer, shape):
        return _Term(layer + (self.fault == "layer"), self.fault)


class Scaled(ep.LossTerm):
    """A learned factor in front of the squared states, and its gradient times `factor`."""

    def __init__(self, layer, dtype, factor):
        self.layer, self.weight, self.factor = layer, np.full(1, 0.7, dtype), factor

    def parameters(self):
        return {"weight": self.weight}

    def loss(self, state, target):
        return self.weight[0] * 0.5 * (state**2).reshape(len(state), -1).sum(axis=1)

    def add_force(self, state, target, scale, force, scratch=None):
        force += scale.reshape(-1, *[1] * (state.ndim - 1)) * (self.weight[0] * state)

    def add_parameter_gradient(self, state, target, scale, gradients, scratch=None):
        gradients["weight"] += self.factor * (scale * (0.5 * (state**2).reshape(len(state), -1).sum(axis=1))).sum()


class Learned(ep.Augmenter):
    def __init__(self, factor):
        super().__init__([1])
        self.factor = factor

    def make_term(self, layer, shape):
        return Scaled(layer, self.dtype, self.factor)


SIGNALS = [
    (WrongSign([1, 2]), "WrongSign, layer 1: the gradient has the wrong sign"),
    (Doubled([1, 2]), "Doubled, layer 1: the gradient is 2 times what it should be"),
    (Mean([1, 2]), "the gradient is 0.3333 times"),
    (Narrow([1]), r"Narrow, layer 1: the gradient has shape \(3, 1, 3, 3\), the state \(3, 3, 3, 3\)"),
    (Summed([1]), r"the loss has shape \(\), not one number a sample, \(3,\)"),
    (Unsummed([1]), r"the loss has shape \(3, 3, 3, 3\), not one number a sample"),
    (Mixed([1]), "the loss of a sample depends on the others"),
    (OtherLayer([1, 2]), "OtherLayer, layer 2: the gradient is not what finite differences give"),
    (InPlace([1]), "the gradient changes the state"),
    (Short([1]), "the target has 1 rows for 3 samples"),
    (NoKappa([1, 2]), r"does not follow kappa \(layers \[1, 2\]\)"),
    (WithTerm("written"), "the gradient is written over what was there"),
    (WithTerm("unscaled"), "without its scale"),
    (WithTerm("half"), "not what finite differences give"),
    (WithTerm("layer"), "its term for layer 2 says that it looks at layer 3"),
    (Learned(2.0), "the gradient of 'weight' is 2 times"),
    (Learned(-1.0), "the gradient of 'weight' has the wrong sign"),
]


@pytest.mark.parametrize(
    ("signal", "message"), SIGNALS, ids=lambda value: type(value).__name__ if not isinstance(value, str) else ""
)
def test_a_wrong_signal_is_named(signal, message):
    net = network()
    with pytest.raises(ep.ConfigurationError, match=message) as found:
        ep.check_signal(signal, net)
    assert "\n" not in str(found.value)


def test_the_cosine_with_the_derivative_is_said():
    """By hand: 45 degrees."""
    with pytest.raises(ep.ConfigurationError, match=r"cosine 0\.707"):
        judge("it", [[3.0], [0.0]], [[2.0], [2.0]], [[2.0], [2.0]])


@pytest.mark.parametrize("precision", ["float32", "float64", "float16"])
def test_right_signals_pass(precision):
    net = network(precision=precision)
    teacher = Teacher()
    signals = [Right([1, 2, 3]), WithTerm(""), Learned(1.0), ep.LocalError("all"), ep.LocalError([1], pool=2)]
    signals += [ep.Distillation(teacher, [2, 3], learned=True, temperature=3.0)]
    signals += [ep.Distillation(teacher, "all", loss="squared_error")]
    signals += [ep.FeatureDistillation(teacher, {2: "middle"})]
    for signal in signals:
        kappa = signal.kappa
        ep.check_signal(signal, net, batch_of(net))
        assert (signal.network, signal.kappa) == (None, kappa), "the signal itself stays as it is"
        ep.check_signal(net.bind(signal), net, batch_of(net))


def test_check_gradients_looks_at_signals_that_ep_and_bptt_would_agree_on():
    net = network()
    batch = batch_of(net)
    ep.check_gradients(net, batch, signals=[Right([1])])
    with pytest.raises(ep.ConfigurationError, match="wrong sign"):
        ep.check_gradients(net, batch, signals=[WrongSign([1])])


def test_a_gradient_of_another_shape_is_refused_in_training():
    net = network()
    learner = ep.EquilibriumPropagation(
        net, signals=[Narrow([1])], free_steps=3, nudged_steps=3, schedule="synchronous"
    )
    with pytest.raises(ep.ConfigurationError, match="the gradient has shape"):
        learner.step(batch_of(net))


class Soft(ep.Activation):
    """Softsign, ``g / (1 + |g|)``, with one fault or none."""

    name, low, high = "soft", -1.0, 1.0

    def __init__(self, fault=""):
        self.fault = fault
        if fault == "range":
            self.low = 0.0

    def value(self, g, out):
        result = g / (1 + abs(g))
        if self.fault == "unwritten":
            out[1:] = result[1:]
        else:
            out[...] = result

    def slope(self, g, out):
        factor = {"slope": 2, "slope sign": -1}.get(self.fault, 1)
        if self.fault == "alias":
            out[...] = 0
        out[...] = factor / (1 + abs(g)) ** (3 if self.fault == "power" else 2)

    def increment(self, g, dg, scratch):
        if self.fault == "difference":
            dg[...] = (g + dg) / (1 + abs(g + dg)) - g / (1 + abs(g))
            return
        h = g + dg
        # (h (1 + |g|) - g (1 + |h|)) / ..., of which h |g| - g |h| vanishes where the signs agree
        top = dg + np.where(g * h > 0, 0, h * abs(g) - g * abs(h))
        dg[...] = top / ((1 + abs(g)) * (1 + abs(h))) * (0.5 if self.fault == "increment" else 1)

    def potential(self, s):
        sign = -1 if self.fault == "potential" else 1
        return sign * (-abs(s) - np.log1p(-abs(s)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("range", "beyond its range 0.0 to 1.0"),
        ("unwritten", r"value\(g, out\) does not write into all"),
        ("slope", "slope is 2 times what it should be"),
        ("slope sign", "slope has the wrong sign"),
        ("power", "slope is not what finite differences give"),
        ("alias", r"slope\(g, out\) is another one where `out` is g itself"),
        ("increment", "increment is 0.5 times"),
        ("difference", "increment for a small dg"),
        ("potential", "the potential .* has the wrong sign"),
    ],
)
def test_a_wrong_activation_is_named(fault, message):
    with pytest.raises(ep.ConfigurationError, match=message) as found:
        ep.check_activation(Soft(fault))
    assert "activation soft" in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("activation", [*ep.ACTIVATIONS.values(), Soft()], ids=lambda a: a.name)
def test_right_activations_pass(activation):
    ep.check_activation(activation)


class Faulty(ep.Conv2d):
    """A convolution with one fault or none."""

    fault = ""

    def drive(self, s, out, winners, ops):
        super().drive(s, out, winners, ops)
        if self.fault == "drive":
            out *= 1.5
        if self.fault == "square":
            out += out**2

    def linear_drive(self, s, out, winners, ops):
        super().linear_drive(s, out, winners, ops)
        if self.fault == "bias in it":
            out += self.bias
        if self.fault == "bent":
            out[...] = abs(out)

    def topdown(self, s, winners, out, ops):
        if self.fault == "shape":
            out = out[:, 1:]
        super().topdown(s, winners, out, ops)
        out *= {"sign": -1, "factor": 2}.get(self.fault, 1)
        if self.fault == "reversed":
            out[...] = out[:, ::-1].copy()

    def add_gradient(self, s_below, s, winners, weight, bias, ops):
        if self.fault == "written":
            weight[...] = 0
        super().add_gradient(s_below, (2 if self.fault == "gradient" else 1) * s, winners, weight, bias, ops)
        if self.fault == "no bias":
            bias -= s.reshape(-1, s.shape[-1]).sum(axis=0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("drive", "linear_drive is not the linear part of drive"),
        ("square", "linear_drive is not the linear part of drive"),
        ("bias in it", "linear_drive is not linear"),
        ("bent", "linear_drive is not linear"),
        ("shape", "topdown fails for its shapes"),
        ("sign", "topdown is not the adjoint .* sign is wrong"),
        ("factor", r"topdown is not the adjoint .*\(factor 2\)"),
        ("reversed", "topdown is not the adjoint"),
        ("written", "the gradient of 'weight' is written over"),
        ("gradient", "the gradient of 'weight' is 2 times"),
        ("no bias", "the gradient of 'bias'"),
    ],
)
@pytest.mark.parametrize("pooling", ["none", "max"])
def test_a_wrong_edge_is_named(fault, message, pooling):
    edge = Faulty((6, 6, 2), 3, pooling=pooling)
    edge.fault = fault
    with pytest.raises(ep.ConfigurationError, match=message) as found:
        ep.check_edge(edge)
    assert str(found.value).startswith("Faulty: ")
    assert "\n" not in str(found.value)


def test_an_edge_that_hides_its_winners_is_named():
    edge = Faulty((6, 6, 2), 3, pooling="max")
    edge.has_winners = False
    with pytest.raises(ep.ConfigurationError, match="Faulty: drive fails"):
        ep.check_edge(edge)


@pytest.mark.parametrize(
    "edge",
    [
        *[ep.Conv2d((7, 6, 2), 3, stride=stride, pooling=p) for stride in (1, 2) for p in ("none", "max", "average")],
        ep.Linear((3, 3, 2), 5),
        Faulty((6, 6, 2), 3, pooling="max"),
    ],
    ids=repr,
)
def test_right_edges_pass_and_stay_as_they_are(edge):
    ep.check_edge(edge)
    assert not hasattr(edge, "weight"), "a copy is looked at"


def test_check_gradients_looks_at_own_edges_and_activations():
    batch = batch_of(network())
    edge = Faulty((6, 6, 2), 3)
    edge.fault = "gradient"
    with pytest.raises(ep.ConfigurationError, match="Faulty: the gradient of 'weight' is 2 times"):
        ep.check_gradients(ep.Network([edge], 3, device="cpu", precision="float64", feedback=1.0), batch)
    soft = ep.Network(
        [ep.Conv2d((6, 6, 2), 3)], 3, activation=Soft("slope"), device="cpu", precision="float64", feedback=1.0
    )
    with pytest.raises(ep.ConfigurationError, match="slope is 2 times"):
        ep.check_gradients(soft, batch)


def test_all_layers():
    net = network()
    signal = net.bind(ep.LocalError(layers="all"))
    assert signal.layers == [1, 2, 3]
    assert [nudge.term.layer for nudge in signal.nudges(batch_of(net))] == [1, 2, 3]
    with pytest.raises(ep.ConfigurationError, match="numbers, a list of names, or 'all', not '2,3'"):
        ep.LocalError(layers="2,3")


def test_a_check_leaves_an_edge_as_it_is():
    """Whoever draws into arrays that are there already, too: a copy is looked at, and may be used afterwards."""

    class InPlace(ep.Linear):
        def initialize(self, generator, gain, device, dtype):
            if getattr(self, "weight", None) is None or self.weight.dtype != dtype:
                super().initialize(generator, gain, device, dtype)
            self.weight[...] = generator.standard_normal(self.weight.shape) * gain

    edge = InPlace((4,), 3)
    ep.check_edge(edge)
    net = ep.Network([edge], 3, device="cpu", precision="float64", seed=5)
    kept = edge.weight.copy()
    ep.check_edge(edge)
    np.testing.assert_array_equal(net.parameters()["layers.1.weight"], kept)


class Unfinished(ep.Activation):
    name = "unfinished"

    def value(self, g, out):
        np.tanh(g, out=out)


class Empty(ep.Edge):
    pass


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: ep.check_activation(Unfinished()), r"activation unfinished: .* must define slope\(g, out\)"),
        (lambda: ep.check_edge(Empty()), "^Empty: .*weight_shape"),
        (lambda: ep.check_signal(ep.Augmenter([1]), network()), r"^Augmenter: .* must define loss\(layer, "),
        (lambda: ep.check_signal(Right([1]), network(), batch_of(network(), 3).images), "targets are missing"),
    ],
)
def test_what_was_forgotten_is_named_in_one_line(check, message):
    with pytest.raises(ep.ConfigurationError, match=message) as found:
        check()
    assert "\n" not in str(found.value)
