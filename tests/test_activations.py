"""Activations. Oracle: closed forms, finite differences, and for tiny increments an identity free of cancellation."""

import math

import numpy as np
import pytest
from oracle import INVERSE, SIGMA
from scipy.special import expit

import cupyep as ep
from cupyep.activations import Gelu, get_activation

NAMES = sorted(ep.ACTIVATIONS)
RANGES = {
    "hard_sigmoid": (0, 1), "half_hard_sigmoid": (0, 1), "relu6": (0, 6), "relu": (0, math.inf), "sigmoid": (0, 1),
    "tanh": (-1, 1), "gelu": (-0.17004075057125, math.inf),
}  # fmt: skip
G = np.array([-30.0, -1.7, -0.4, 0.01, 0.2, 0.5, 0.9, 1.3, 1.9, 2.4, 5.7, 6.4, 30.0])  # no kink among them


def call(device, method, *arrays):
    """Return what `method` writes into its last argument, an array like the first."""
    on_device = [device.asarray(a) for a in arrays]
    out = device.xp.full(on_device[0].shape, np.nan, on_device[0].dtype)
    method(*on_device, out)
    return device.to_numpy(out)


def increment(device, activation, g, dg, dtype):
    """Return the increment of the rest point g by dg."""
    g, dg = device.asarray(np.array(g, dtype)), device.asarray(np.array(dg, dtype))  # copies: dg is overwritten
    before = g.copy()
    activation.increment(g, dg, (device.xp.empty_like(g), device.xp.empty_like(g)))
    assert (g == before).all()
    assert dg.dtype == dtype
    return device.to_numpy(dg)


def exact_increment(name, g, dg):
    """Return sigma(g + dg) - sigma(g) without cancellation, in float64."""
    g, dg = np.asarray(g, np.float64), np.asarray(dg, np.float64)
    if name in ("sigmoid", "tanh"):  # tanh(a + b) - tanh(a) = sinh(b) / (cosh(a) cosh(a + b))
        center, height, rate = (0.5, 0.5, 2.0) if name == "sigmoid" else (0.0, 1.0, 1.0)
        a, b = rate * (g - center), rate * dg
        return height * np.sinh(b) / (np.cosh(a) * np.cosh(a + b))
    if name == "gelu":  # the mean value theorem, with the derivative of erf's approximation by hand
        u = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
        derivative = expit(2 * u) + g * 0.5 / np.cosh(u) ** 2 * math.sqrt(2 / math.pi) * (1 + 0.134145 * g**2)
        return np.where(np.abs(dg) < 1e-9, derivative * dg, SIGMA[name](g + dg) - SIGMA[name](g))
    slope = 0.5 if name == "half_hard_sigmoid" else 1.0
    low, high = RANGES[name]
    before, after = slope * g, slope * (g + dg)
    inside = (before > low) & (before < high) & (after > low) & (after < high)
    return np.where(inside, slope * dg, np.clip(after, low, high) - np.clip(before, low, high))


@pytest.mark.parametrize("name", NAMES)
def test_value(device, name):
    np.testing.assert_allclose(call(device, ep.ACTIVATIONS[name].value, G), SIGMA[name](G), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_slope_in_place(device, name):
    activation = ep.ACTIVATIONS[name]
    for method in (activation.value, activation.slope):
        g = device.asarray(G.copy())
        method(g, g)
        np.testing.assert_array_equal(device.to_numpy(g), call(device, method, G))


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(device, name):
    activation, h = ep.ACTIVATIONS[name], 1e-6
    inner = G[1:-1]
    numeric = (call(device, activation.value, inner + h) - call(device, activation.value, inner - h)) / (2 * h)
    np.testing.assert_allclose(call(device, activation.slope, inner), numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["hard_sigmoid", "half_hard_sigmoid", "relu6", "relu"])
def test_a_clip_has_no_slope_at_its_ends(device, name):
    """Units that no input reaches lie just there: their drive is exactly 0."""
    gain, ends = (0.5 if name == "half_hard_sigmoid" else 1.0), [end for end in RANGES[name] if end < math.inf]
    g = np.array([end / gain for end in ends])
    np.testing.assert_array_equal(call(device, ep.ACTIVATIONS[name].slope, g), 0.0)
    np.testing.assert_array_equal(call(device, ep.ACTIVATIONS[name].slope, np.array([0.001, 0.999])), gain)


@pytest.mark.parametrize("name", NAMES)
def test_range(device, name):
    activation = ep.ACTIVATIONS[name]
    low, high = RANGES[name]
    assert (activation.low, activation.high) == (low, high)
    values = call(device, activation.value, np.linspace(-50, 50, 1001))
    assert values.min() >= low
    assert values.max() <= high
    assert values.min() == pytest.approx(low, abs=1e-3 if name == "gelu" else 1e-12)  # the grid misses gelu's minimum
    assert values.max() == pytest.approx(min(high, 50), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-12, -1e-12, 1e-30])
def test_a_tiny_increment_keeps_its_digits_in_float32(device, name, size):
    """A difference of two float32 states near 0.5 would return 0 or 6e-8."""
    g = np.array([0.1, 0.3, 0.5, 0.62, 0.9, -0.7, 1.4, 7.0], np.float32)
    dg = np.full_like(g, size)
    expected = exact_increment(name, g, dg)
    found = increment(device, ep.ACTIVATIONS[name], g, dg, np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
    assert (expected[:5] != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_any_increment(device, name):
    """Large ones too, across the bounds of a clip in both directions."""
    g, dg = (a.ravel() for a in np.meshgrid(G[1:-1], [-3.0, -0.6, -0.05, 0.0, 0.05, 0.7, 4.0]))
    found = increment(device, ep.ACTIVATIONS[name], g, dg, np.float64)
    rtol = 1e-12
    np.testing.assert_allclose(found, exact_increment(name, g, dg), rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(found, SIGMA[name](g + dg) - SIGMA[name](g), rtol=rtol, atol=1e-13)


SMOOTH = ("sigmoid", "tanh", "gelu")
WIDE = np.concatenate([np.linspace(-12, 12, 49), [-80.0, -30.3, 4.503, 30.3, 80.0]])
CHANGES = np.concatenate([s * np.logspace(-12, 1.7, 28) for s in (1, -1)])


def exactly(name, g, dg):
    """Return (sigma(g + dg) - sigma(g), sigma'(g)) in 250 digits, of numbers as they are stored."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(250):
        g, dg = mpmath.mpf(float(g)), mpmath.mpf(float(dg))
        if name == "gelu":
            rate, cube = mpmath.mpf(Gelu.RATE), mpmath.mpf(Gelu.CUBE)

            def sigma(x):
                return x * (1 + mpmath.tanh(rate * (x + cube * x**3))) / 2
        else:
            center, height, rate = (0.5, 0.5, 2) if name == "sigmoid" else (0, 1, 1)

            def sigma(x):
                return center + height * mpmath.tanh(rate * (x - center))

        return float(sigma(g + dg) - sigma(g)), float(mpmath.diff(sigma, g, h=mpmath.mpf(10) ** -90))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_increments_and_slopes_keep_their_digits(device, name, dtype):
    """Over the whole range, saturated or not: relative to the result, up to what rounding the argument costs."""
    activation, eps = ep.ACTIVATIONS[name], float(np.finfo(dtype).eps)
    g, dg = (a.ravel().astype(dtype) for a in np.meshgrid(WIDE, CHANGES))
    found, slopes = increment(device, activation, g, dg, dtype), call(device, activation.slope, g)
    smallest = 1e3 * float(np.finfo(dtype).tiny)
    for rest, change, value, slope in zip(g, dg, found, slopes, strict=True):
        wanted, wanted_slope = exactly(name, rest, change)
        size = 4 + abs(rest) + abs(change)
        if name == "gelu":  # its exponent is a cube; near its minimum two terms cancel
            size, scale = 3 * size + 0.3 * size**3, max(abs(wanted), abs(change) * abs(wanted_slope))
            slack = eps * min(1, abs(change)) * (1 if rest > -6 else math.exp(-1.5 * rest * rest / 2 + 2))
        else:
            scale, slack = abs(wanted), 0
        assert abs(value - wanted) <= 8 * eps * size * scale + slack + smallest, (rest, change, value, wanted)
        slack = eps if name == "gelu" and rest > -6 else 0
        assert abs(slope - wanted_slope) <= 8 * eps * size * abs(wanted_slope) + slack + smallest, (rest, slope)


def test_saturated_units_that_were_wrong(device):
    """A unit at the low end swung all the way up; one of gelu's brought back half way; the slope far out."""
    for name, g, dg in (("sigmoid", -4.5, 5.88), ("gelu", 5.4, -2.72)):
        found = increment(device, ep.ACTIVATIONS[name], [g], [dg], np.float32)
        assert found[0] == pytest.approx(exact_increment(name, g, dg), rel=2e-6)
    slope = call(device, ep.ACTIVATIONS["sigmoid"].slope, np.array([5.5], np.float32))
    assert slope[0] == pytest.approx(4 * math.exp(-20), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gelu"}))
def test_potential_is_the_integral_of_the_inverse(device, name):
    activation, h = ep.ACTIVATIONS[name], 1e-6
    low, high = RANGES[name]
    s = np.linspace(low + 0.05, min(high, 6) - 0.05, 9)
    up, down = (device.to_numpy(activation.potential(device.asarray(s + d))) for d in (h, -h))
    inverse = (up - down) / (2 * h)
    np.testing.assert_allclose(inverse, INVERSE[name](s), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(SIGMA[name](inverse), s, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_potential_of_a_saturated_unit(device, name, dtype):
    """A float32 tanh reaches its end at a drive of 10: the potential there is the limit, height / rate * log 2 more."""
    center, height, rate = (0.5, 0.5, 2.0) if name == "sigmoid" else (0.0, 1.0, 1.0)
    ends = device.asarray(np.array([center - height, center + height], dtype))
    found = device.to_numpy(ep.ACTIVATIONS[name].potential(ends))
    expected = center * device.to_numpy(ends) + height / rate * math.log(2)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_gelu_has_no_energy(device):
    with pytest.raises(ep.ConfigurationError, match="not increasing"):
        ep.ACTIVATIONS["gelu"].potential(device.asarray(np.ones(3)))


def test_lookup():
    assert get_activation("relu6") is ep.ACTIVATIONS["relu6"]
    own = ep.Clip("own", 2.0, -1.0, 1.0)
    assert get_activation(own) is own
    with pytest.raises(ep.ConfigurationError, match="did you mean 'hard_sigmoid'") as error:
        get_activation("hardsigmoid")
    assert "\n" not in str(error.value)


def test_own_clip(device):
    own = ep.Clip("own", 2.0, -1.0, 1.0)
    g = np.array([-0.8, -0.3, 0.0, 0.2, 0.7])
    np.testing.assert_allclose(call(device, own.value, g), [-1.0, -0.6, 0.0, 0.4, 1.0])
    np.testing.assert_allclose(call(device, own.slope, g), [0.0, 2.0, 2.0, 2.0, 0.0])
    found = increment(device, own, g, np.full(5, 0.35), np.float64)
    np.testing.assert_allclose(found, [0.1, 0.7, 0.7, 0.6, 0.0], atol=1e-15)
