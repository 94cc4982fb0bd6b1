"""Losses. Oracle: sums written out with math.log, finite differences, hand values."""

import math

import numpy as np
import pytest
from oracle import finite_difference

import cupyep as ep
from cupyep.batch import one_hot
from cupyep.losses import CrossEntropy, SquaredError, get_loss, log_softmax, softmax


def cross_entropy_by_hand(z, target, temperature):
    """Return -T^2 sum_k t_k log(e^{z_k / T} / sum_j e^{z_j / T}) of one row."""
    total = sum(math.exp(v / temperature) for v in z)
    return -(temperature**2) * sum(
        t * math.log(math.exp(v / temperature) / total) for v, t in zip(z, target, strict=True)
    )


def rows(rng, shape=(4, 5)):
    z = 2 * rng.standard_normal(shape)
    target = rng.uniform(0.1, 1, shape)
    return z, target / target.sum(axis=1, keepdims=True)


def gradient(device, loss, z, target):
    out, column = device.xp.full(z.shape, np.nan), device.xp.empty((len(z), 1))
    loss.gradient(device.asarray(z), device.asarray(target), out, column)
    return device.to_numpy(out)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_cross_entropy(device, rng, temperature):
    loss = CrossEntropy(temperature)
    z, target = rows(rng)
    expected = [cross_entropy_by_hand(a, b, temperature) for a, b in zip(z, target, strict=True)]
    found = device.to_numpy(loss.value(device.asarray(z), device.asarray(target)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)

    def total():
        return sum(cross_entropy_by_hand(a, b, temperature) for a, b in zip(z, target, strict=True))

    numeric = finite_difference(total, z)
    np.testing.assert_allclose(gradient(device, loss, z, target), numeric, rtol=1e-6, atol=1e-8)


def test_squared_error(device, rng):
    z, target = rows(rng)
    expected = [sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / 2 for u, v in zip(z, target, strict=True)]
    found = SquaredError().value(device.asarray(z), device.asarray(target))
    np.testing.assert_allclose(device.to_numpy(found), expected, rtol=1e-13)
    np.testing.assert_allclose(gradient(device, SquaredError(), z, target), z - target, rtol=1e-13)


def test_gradients_keep_their_size_at_high_temperature(device, rng):
    """With T^2 the gradient tends to (z - mean(z) - v + mean(v)) / C, v the teacher's logits, and not to zero."""
    z, v = rng.standard_normal((2, 4, 5))
    loss = CrossEntropy(1e5)
    target = device.to_numpy(loss.soften(device.asarray(v)))
    centered = (z - z.mean(axis=1, keepdims=True) - v + v.mean(axis=1, keepdims=True)) / 5
    np.testing.assert_allclose(gradient(device, loss, z, target), centered, rtol=1e-3, atol=1e-4)


def test_targets_from_teacher_logits(device):
    z = np.array([[0.0, 2.0, 4.0]])
    # softmax of (0, 1, 2) = (1, e, e^2) / (1 + e + e^2)
    e = math.e
    expected = np.array([[1, e, e * e]]) / (1 + e + e * e)
    np.testing.assert_allclose(device.to_numpy(CrossEntropy(2.0).soften(device.asarray(z))), expected, rtol=1e-13)
    np.testing.assert_array_equal(device.to_numpy(SquaredError().soften(device.asarray(z))), z)


def test_large_logits_neither_overflow_nor_vanish(device):
    z, target = np.array([[1000.0, 0.0, -1000.0]]), np.array([[0.0, 1.0, 0.0]])
    assert device.to_numpy(CrossEntropy().value(device.asarray(z), device.asarray(target)))[0] == 1000.0
    np.testing.assert_array_equal(gradient(device, CrossEntropy(), z, target), [[1.0, -1.0, 0.0]])
    np.testing.assert_array_equal(device.to_numpy(log_softmax(device.asarray(z))), [[0.0, -1000.0, -2000.0]])


def test_softmax_by_hand(device):
    z = device.asarray(np.log([[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]]))
    out = device.xp.empty_like(z)
    softmax(z, out, device.xp.empty((2, 1)))
    np.testing.assert_allclose(device.to_numpy(out), [[0.125, 0.25, 0.625], [0.25, 0.25, 0.5]], rtol=1e-14)


def test_one_hot(device):
    rows_found = one_hot(np.array([2, 0, 1]), 4, np.float32, device)
    assert rows_found.dtype == np.float32
    np.testing.assert_array_equal(device.to_numpy(rows_found), [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [[0, 1]]])
def test_wrong_labels_are_one_line(labels):
    with pytest.raises(ep.ConfigurationError, match="from 0 to 3") as error:
        one_hot(np.array(labels), 4, np.float32, ep.get_device("cpu"))
    assert "\n" not in str(error.value)


def test_lookup():
    assert get_loss("cross_entropy", 3.0).temperature == 3.0
    assert isinstance(get_loss("squared_error"), SquaredError)
    with pytest.raises(ep.ConfigurationError, match="did you mean 'squared_error'"):
        get_loss("squared-error")
    for temperature in (0, -1.0):
        with pytest.raises(ep.ConfigurationError, match="temperature must be above 0"):
            CrossEntropy(temperature)
