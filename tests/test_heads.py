"""Heads. Oracle: the formula with einsum, finite differences."""

import numpy as np
import pytest
from oracle import LOSSES, Term, finite_difference, softmax

import cupyep as ep
from cupyep.heads import Head, LossTerm, accuracy_count
from cupyep.losses import get_loss

SHAPE = (5, 4, 3)


def make(device, loss="cross_entropy", shape=SHAPE, pool=None, bias=False, temperature=1.0, learned=True):
    head = Head(1, shape, get_loss(loss, temperature), 4, bias=bias, learned=learned, pool=pool)
    head.initialize(np.random.default_rng(0), 1.0, device, np.float64)
    if bias:
        head.bias[...] = device.asarray(np.array([0.3, -0.2, 0.1, 0.5]))
    return head


def term_of(device, head, target, pool):
    bias = 0.0 if head.bias is None else device.to_numpy(head.bias)
    temperature = getattr(head.criterion, "temperature", 1.0)
    matrix = np.array(device.to_numpy(head.weight))
    return Term(1, head.criterion.name, target, 1.0, matrix, bias, temperature, pool or 1)


CASES = [("cross_entropy", None, 1.0, True), ("cross_entropy", 2, 3.0, False), ("squared_error", 2, 1.0, True),
         ("squared_error", None, 1.0, False)]  # fmt: skip


@pytest.mark.parametrize(("loss", "pool", "temperature", "bias"), CASES)
def test_output_and_loss(device, rng, loss, pool, temperature, bias):
    head = make(device, loss, pool=pool, bias=bias, temperature=temperature)
    s, target = rng.uniform(0, 1, (3, *SHAPE)), softmax(rng.standard_normal((3, 4)))
    term = term_of(device, head, target, pool)
    z = device.to_numpy(head.output(device.asarray(s)))
    np.testing.assert_allclose(z, term.output(s), rtol=1e-12)
    found = device.to_numpy(head.loss(device.asarray(s), device.asarray(target)))
    np.testing.assert_allclose(found, LOSSES[loss](term.output(s), target, temperature), rtol=1e-12)


@pytest.mark.parametrize(("loss", "pool", "temperature", "bias"), CASES)
def test_force_is_the_scaled_gradient_and_is_added(device, rng, loss, pool, temperature, bias):
    """Each sample by its own scale, sign included; rows that pooling drops get nothing."""
    head = make(device, loss, pool=pool, bias=bias, temperature=temperature)
    s, target = rng.uniform(0, 1, (3, *SHAPE)), softmax(rng.standard_normal((3, 4)))
    scale = np.array([0.5, -2.0, 0.0])
    term = term_of(device, head, target, pool)
    force = device.xp.full(s.shape, 7.0)
    head.add_force(device.asarray(s), device.asarray(target), device.asarray(scale), force)
    gradient = finite_difference(lambda: term.value(s).sum(), s)
    expected = 7.0 + scale[:, None, None, None] * gradient
    np.testing.assert_allclose(device.to_numpy(force), expected, rtol=1e-7, atol=1e-8)
    assert np.abs(gradient).max() > 0.01
    if pool:
        assert not gradient[:, 4:].any()


@pytest.mark.parametrize("kind", ["plain", "pooled", "identity"])
def test_scratch_given_is_enough_and_its_content_does_not_matter(device, rng, kind):
    loss = "squared_error" if kind == "identity" else "cross_entropy"
    head = Head(1, SHAPE, get_loss(loss), 4, identity=kind == "identity", pool=2 if kind == "pooled" else None)
    head.initialize(rng, 1.0, device, np.float64)
    s = device.asarray(rng.uniform(0, 1, (3, *SHAPE)))
    target = device.asarray(rng.uniform(0, 1, (3, *SHAPE) if kind == "identity" else (3, 4)))
    scale, size = device.asarray(np.array([0.5, -2.0, 1.0])), head.scratch_size(3)
    guarded = device.xp.full(size + 8, np.nan)
    forces = [device.xp.zeros(s.shape) for _ in range(2)]
    head.add_force(s, target, scale, forces[0])
    head.add_force(s, target, scale, forces[1], guarded[:size])
    np.testing.assert_array_equal(device.to_numpy(forces[1]), device.to_numpy(forces[0]))
    assert np.isnan(device.to_numpy(guarded)[size:]).all()
    assert np.isfinite(device.to_numpy(forces[0])).all()


def test_capture_key_tells_what_the_force_depends_on(device):
    """Another map, another place of the map or another temperature is another key; a term of one's own has none."""
    others = [make(device, temperature=t) for t in (1.0, 2.0)]  # kept: the key holds addresses of what lives
    keys = [other.capture_key() for other in others]
    head = make(device)
    keys += [head.capture_key()]
    assert head.capture_key() == keys[-1]
    before, head.weight = head.weight, head.weight.copy()
    assert before is not head.weight
    keys += [head.capture_key()]
    head.criterion.temperature = 3.0
    keys += [head.capture_key()]
    assert len(set(keys)) == 5
    assert LossTerm().capture_key() is None


@pytest.mark.parametrize(("loss", "pool", "temperature", "bias"), CASES)
def test_parameter_gradient(device, rng, loss, pool, temperature, bias):
    head = make(device, loss, pool=pool, bias=bias, temperature=temperature)
    s, target = rng.uniform(0, 1, (3, *SHAPE)), softmax(rng.standard_normal((3, 4)))
    scale = np.array([0.5, -2.0, 0.25])
    term = term_of(device, head, target, pool)
    gradients = {name: device.xp.full(p.shape, 1.0) for name, p in head.parameters().items()}
    head.add_parameter_gradient(device.asarray(s), device.asarray(target), device.asarray(scale), gradients)
    assert sorted(gradients) == (["bias", "weight"] if bias else ["weight"])

    def scaled():
        return (scale * term.value(s)).sum()

    expected = 1.0 + finite_difference(scaled, term.matrix)
    np.testing.assert_allclose(device.to_numpy(gradients["weight"]), expected, rtol=1e-7, atol=1e-8)
    if bias:
        term.bias = np.array(term.bias)
        expected = 1.0 + finite_difference(scaled, term.bias)
        np.testing.assert_allclose(device.to_numpy(gradients["bias"]), expected, rtol=1e-7, atol=1e-8)


def test_identity_head(device, rng):
    """The state is the output: force -(s - y) times beta, no parameters."""
    head = Head(2, (4,), get_loss("squared_error"), 4, identity=True)
    head.initialize(np.random.default_rng(0), 1.0, device, np.float64)
    s, y = rng.uniform(0, 1, (2, 3, 4))
    np.testing.assert_array_equal(device.to_numpy(head.output(device.asarray(s))), s)
    force = device.xp.zeros((3, 4))
    head.add_force(device.asarray(s), device.asarray(y), device.asarray(np.array([-0.5, 0.5, 1.0])), force)
    np.testing.assert_allclose(device.to_numpy(force), np.array([[-0.5], [0.5], [1.0]]) * (s - y), rtol=1e-13)
    assert head.parameters() == {}


def test_fixed_maps_have_no_parameters(device):
    assert make(device, learned=False).parameters() == {}
    assert list(make(device, bias=True).parameters()) == ["weight", "bias"]


def test_maps_are_scaled_by_the_length_of_the_pooled_state(device):
    head = Head(1, (8, 8, 50), get_loss("cross_entropy"), 20, pool=2)
    head.initialize(np.random.default_rng(0), 0.5, device, np.float64)
    weight = device.to_numpy(head.weight)
    assert weight.shape == (4 * 4 * 50, 20)
    assert weight.std() == pytest.approx(0.5 / np.sqrt(800), rel=0.02)  # 16000 draws


def test_pool_is_ignored_on_flat_states_and_refused_where_too_large():
    assert Head(1, (9,), get_loss("cross_entropy"), 4, pool=3).inner_shape == (9,)
    with pytest.raises(ep.ConfigurationError, match="pool <= 4 on layer 2, not 5") as error:
        Head(2, (6, 4, 3), get_loss("cross_entropy"), 4, pool=5)
    assert "\n" not in str(error.value)


def test_accuracy_count(device):
    z = device.asarray(np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]]))
    assert int(accuracy_count(z, device.asarray(np.array([1, 1, 1])))) == 2


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_not_right(device, wrong):
    z = device.asarray(np.array([[wrong, 0.9], [0.8, 0.2], [0.8, 0.2]]))
    assert int(accuracy_count(z, device.asarray(np.array([0, 0, 1])))) == 1


def test_a_term_of_ones_own_must_say_its_loss():
    with pytest.raises(NotImplementedError):
        LossTerm().loss(None, None)
    with pytest.raises(NotImplementedError):
        LossTerm().add_force(None, None, None, None)
    assert LossTerm().parameters() == {}
