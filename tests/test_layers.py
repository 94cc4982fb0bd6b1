"""Edges. Oracle: loops over single elements; <Ax, y> = <x, A'y>; the unchunked result."""

import functools

import numpy as np
import pytest
from oracle import relative_error
from small import bind

import cupyep as ep
from cupyep.backend import get_precision
from cupyep.ops.conv import ConvOps
from cupyep.ops.winograd import WinogradOps

GEOMETRIES = [  # in_shape, channels, kernel, stride, padding, pooling, pool
    ((6, 6, 2), 3, 3, 1, 1, "none", 2),
    ((6, 6, 2), 3, 3, 1, 1, "max", 2),
    ((6, 6, 2), 3, 3, 1, 1, "average", 2),
    ((5, 7, 2), 3, 3, 1, 0, "max", 2),
    ((5, 7, 2), 2, 2, 1, 1, "average", 2),
    ((7, 6, 3), 2, 3, 2, 1, "none", 2),
    ((9, 8, 1), 3, 3, 2, 1, "max", 2),
    ((8, 9, 2), 2, 4, 2, 3, "average", 3),
    ((7, 7, 2), 2, 5, 3, 2, "max", 1),
    ((7, 7, 1), 2, 3, 1, 2, "max", 3),
    ((3, 3, 4), 5, 1, 1, 0, "none", 2),
    ((4, 4, 2), 3, 4, 1, 0, "none", 2),
    ((16, 16, 1), 2, 1, 1, 0, "max", 16),  # the largest window whose winner is one byte
    ((17, 17, 1), 2, 1, 1, 0, "average", 17),
]
WINOGRAD = [  # the same, for WinogradOps: maps of whole tiles and others, dropped rows and columns, one tile
    ((6, 6, 2), 3, 3, 1, 1, "none", 2),
    ((6, 4, 2), 3, 3, 1, 1, "max", 2),
    ((4, 6, 3), 2, 3, 1, 1, "average", 2),
    ((5, 7, 2), 3, 3, 1, 0, "max", 2),
    ((6, 5, 2), 2, 3, 1, 0, "average", 2),
    ((7, 5, 2), 3, 3, 1, 1, "max", 2),
    ((5, 8, 2), 3, 3, 1, 1, "none", 2),
    ((5, 4, 3), 2, 3, 1, 0, "none", 2),
    ((3, 3, 4), 5, 3, 1, 0, "none", 2),
    ((2, 3, 2), 3, 3, 1, 1, "max", 2),
    ((8, 12, 2), 3, 3, 1, 1, "none", 2),
    ((9, 10, 3), 2, 3, 1, 1, "max", 2),
    ((11, 8, 1), 1, 3, 1, 0, "average", 2),
]
BOTH = [pytest.param(geometry, ConvOps, id=str(geometry)) for geometry in GEOMETRIES]
BOTH += [
    pytest.param(geometry, functools.partial(WinogradOps, m=m), id=f"winograd {m} {geometry}")
    for geometry in WINOGRAD
    for m in (2, 4)
]
edges = pytest.mark.parametrize(("geometry", "operations"), BOTH)
SAMPLES = 3


def pixel(s, n, y, x, c):
    """Return s at a place of the zero-padded plane."""
    inside = 0 <= y < s.shape[1] and 0 <= x < s.shape[2]
    return s[n, y, x, c] if inside else 0.0


def naive_map(s, weight, bias, stride, padding):
    """Return u = w * s + b, element by element."""
    k, _, channels, filters = weight.shape
    ho, wo = ((size + 2 * padding - k) // stride + 1 for size in s.shape[1:3])
    u = np.zeros((len(s), ho, wo, filters))
    for n, y, x, f in np.ndindex(*u.shape):
        u[n, y, x, f] = bias[f]
        for i, j, c in np.ndindex(k, k, channels):
            u[n, y, x, f] += weight[i, j, c, f] * pixel(s, n, y * stride + i - padding, x * stride + j - padding, c)
    return u


def naive_pool(u, pooling, p):
    """Return (d, winners): the unit that is read, or None for averages."""
    if pooling == "none":
        return u, None
    d = np.zeros((len(u), u.shape[1] // p, u.shape[2] // p, u.shape[3]))
    winners = np.zeros(d.shape, int)
    for n, y, x, c in np.ndindex(*d.shape):
        values = [u[n, y * p + dy, x * p + dx, c] for dy in range(p) for dx in range(p)]
        winners[n, y, x, c] = values.index(max(values))
        d[n, y, x, c] = max(values) if pooling == "max" else sum(values) / p**2
    return (d, winners.astype(np.uint8)) if pooling == "max" else (d, None)  # as kernels read them


def naive_unpool(s, winners, map_shape, pooling, p):
    """Return U(s): where the pooled value came from."""
    if pooling == "none":
        return s
    u = np.zeros((len(s), *map_shape))
    for n, y, x, c in np.ndindex(*s.shape):
        for offset in range(p * p):
            share = 1 / p**2 if pooling == "average" else float(winners[n, y, x, c] == offset)
            u[n, y * p + offset // p, x * p + offset % p, c] += share * s[n, y, x, c]
    return u


class Case:
    """An edge with random parameters and states, on host and device."""

    def __init__(self, device, geometry, rng, operations=ConvOps, samples=SAMPLES, budget=1 << 22, precision="float64"):
        in_shape, channels, self.kernel, self.stride, self.padding, self.pooling, self.pool = geometry
        self.device = device
        self.precision = get_precision(precision)
        self.edge = ep.Conv2d(
            in_shape, channels, self.kernel, self.stride, self.padding, pooling=self.pooling, pool=self.pool
        )
        self.weight = rng.standard_normal((self.kernel, self.kernel, in_shape[2], channels))
        self.bias = rng.standard_normal(channels)
        self.edge.weight = device.asarray(self.weight, self.precision.number)
        self.edge.bias = device.asarray(self.bias, self.precision.number)
        self.below = rng.standard_normal((samples, *in_shape))
        self.s = rng.standard_normal((samples, *self.edge.out_shape))
        if operations is not ConvOps:  # whether it pays or not
            self.ops = operations(self.edge.geometry, samples, budget, self.precision, device.xp)
        else:
            self.ops = self.edge.prepare(samples, budget, self.precision, device)
        bind(self.ops, device.xp)
        self.edge.refresh(self.ops)
        self.u = naive_map(self.below, self.weight, self.bias, self.stride, self.padding)
        self.d, self.winners = naive_pool(self.u, self.pooling, self.pool)

    def on_device(self, array):
        return None if array is None else self.device.asarray(array)

    def new(self, shape):
        return self.device.xp.full((len(self.below), *shape), np.nan, self.precision.stored)

    def drive(self):
        out = self.new(self.edge.out_shape)
        winners = self.device.xp.full(out.shape, 99, np.uint8) if self.edge.has_winners else None
        self.edge.drive(self.on_device(self.below), out, winners, self.ops)
        return self.device.to_numpy(out), None if winners is None else self.device.to_numpy(winners)

    def linear_drive(self, below, winners):
        out = self.new(self.edge.out_shape)
        self.edge.linear_drive(self.on_device(below), out, self.on_device(winners), self.ops)
        return self.device.to_numpy(out)

    def topdown(self, s, winners):
        out = self.new(self.edge.in_shape)
        self.edge.topdown(self.on_device(s), self.on_device(winners), out, self.ops)
        return self.device.to_numpy(out)

    def gradient(self, below, s, winners, bias=True):
        weight = self.device.xp.full(self.weight.shape, 2.0, self.precision.number)
        bias_gradient = self.device.xp.full(self.bias.shape, 3.0, self.precision.number) if bias else None
        arrays = (self.on_device(below), self.on_device(s), self.on_device(winners))
        self.edge.add_gradient(*arrays, weight, bias_gradient, self.ops)
        return self.device.to_numpy(weight), None if bias_gradient is None else self.device.to_numpy(bias_gradient)


@edges
def test_drive_and_winners(device, rng, geometry, operations):
    case = Case(device, geometry, rng, operations)
    d, winners = case.drive()
    np.testing.assert_allclose(d, case.d, rtol=1e-12, atol=1e-13)
    assert case.edge.out_shape == case.d.shape[1:]
    if case.winners is not None:
        np.testing.assert_array_equal(winners, case.winners)


@edges
def test_linear_drive_reads_the_given_winners(device, rng, geometry, operations):
    """No bias; the units read are those asked for, not the maxima of this input."""
    case = Case(device, geometry, rng, operations)
    eps, p = rng.standard_normal(case.below.shape), case.pool
    u = naive_map(eps, case.weight, 0 * case.bias, case.stride, case.padding)
    expected = naive_pool(u, case.pooling, p)[0]
    if case.winners is not None:
        for place in np.ndindex(*expected.shape):
            n, y, x, c = place
            dy, dx = divmod(int(case.winners[place]), p)
            expected[place] = u[n, y * p + dy, x * p + dx, c]
    np.testing.assert_allclose(case.linear_drive(eps, case.winners), expected, rtol=1e-12, atol=1e-13)


@edges
def test_topdown(device, rng, geometry, operations):
    """Every unit of U(s) pays back to each pixel that it saw, times the weight by which it saw it."""
    case = Case(device, geometry, rng, operations)
    u = naive_unpool(case.s, case.winners, case.u.shape[1:], case.pooling, case.pool)
    expected = np.zeros(case.below.shape)
    for n, y, x, f in np.ndindex(*u.shape):
        for i, j, c in np.ndindex(*case.weight.shape[:3]):
            row, column = y * case.stride + i - case.padding, x * case.stride + j - case.padding
            if 0 <= row < expected.shape[1] and 0 <= column < expected.shape[2]:
                expected[n, row, column, c] += case.weight[i, j, c, f] * u[n, y, x, f]
    np.testing.assert_allclose(case.topdown(case.s, case.winners), expected, rtol=1e-12, atol=1e-12)


@edges
def test_gradient_is_added(device, rng, geometry, operations):
    case = Case(device, geometry, rng, operations)
    u = naive_unpool(case.s, case.winners, case.u.shape[1:], case.pooling, case.pool)
    expected = np.full(case.weight.shape, 2.0)
    for i, j, c, f in np.ndindex(*expected.shape):
        for n, y, x in np.ndindex(*u.shape[:3]):
            seen = pixel(case.below, n, y * case.stride + i - case.padding, x * case.stride + j - case.padding, c)
            expected[i, j, c, f] += seen * u[n, y, x, f]
    expected_bias = 3.0 + np.array([u[..., f].sum() for f in range(u.shape[3])])
    weight, bias = case.gradient(case.below, case.s, case.winners)
    np.testing.assert_allclose(weight, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bias, expected_bias, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(case.gradient(case.below, case.s, case.winners, bias=False)[0], weight)


@edges
def test_adjoint_identity(device, rng, geometry, operations):
    """<A x, y> = <x, A' y> to 1e-12, and the weight gradient is the same number once more."""
    case = Case(device, geometry, rng, operations)
    ax = case.linear_drive(case.below, case.winners)
    products = [
        (ax * case.s).sum(),
        (case.below * case.topdown(case.s, case.winners)).sum(),
        ((case.gradient(case.below, case.s, case.winners)[0] - 2.0) * case.weight).sum(),
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES[:8], ids=str)
@pytest.mark.parametrize("parts", [5, 3, 2])
def test_chunks_change_nothing(device, rng, geometry, parts):
    """Five samples in one, two (3 + 2) or more chunks: the same numbers."""
    state = rng.bit_generator.state
    whole = Case(device, geometry, rng, samples=5)
    one = whole.edge.prepare(1, 0, whole.precision, device).nbytes
    rng.bit_generator.state = state
    budget = one * -(-5 // parts) + 1
    cut = Case(device, geometry, rng, samples=5, budget=budget)
    assert len(whole.ops.chunks) == 1
    assert [m for _, m in cut.ops.chunks] == {5: [1] * 5, 3: [2, 2, 1], 2: [3, 2]}[parts]
    assert [part for part, _ in cut.ops.chunks][-1].stop == 5
    assert cut.ops.nbytes <= budget or parts == 5
    np.testing.assert_allclose(cut.drive()[0], whole.drive()[0], rtol=1e-13, atol=1e-14)
    if whole.winners is not None:
        np.testing.assert_array_equal(cut.drive()[1], whole.drive()[1])
    for name, first in (("linear_drive", whole.below), ("topdown", whole.s)):
        a, b = (getattr(case, name)(first, whole.winners) for case in (whole, cut))
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    for a, b in zip(*(case.gradient(whole.below, whole.s, whole.winners) for case in (whole, cut)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_even_a_budget_of_nothing_processes_a_sample(device, rng):
    case = Case(device, GEOMETRIES[1], rng, samples=4, budget=0)
    assert [m for _, m in case.ops.chunks] == [1, 1, 1, 1]
    np.testing.assert_allclose(case.drive()[0], case.d, rtol=1e-12, atol=1e-13)


def test_new_weights_are_taken_up(device, rng):
    """The top-down product keeps a flipped copy: `refresh` renews it."""
    case = Case(device, GEOMETRIES[1], rng)
    before = case.topdown(case.s, case.winners)
    case.edge.weight *= 2
    case.edge.refresh(case.ops)
    np.testing.assert_allclose(case.topdown(case.s, case.winners), 2 * before, rtol=1e-12)


@pytest.mark.parametrize("in_shape", [(6,), (2, 2, 3)])
def test_linear_edge(device, rng, in_shape):
    edge = ep.Linear(in_shape, 4)
    size = int(np.prod(in_shape))
    weight, bias = rng.standard_normal((size, 4)), rng.standard_normal(4)
    edge.weight, edge.bias = device.asarray(weight), device.asarray(bias)
    below, s = rng.standard_normal((3, *in_shape)), rng.standard_normal((3, 4))
    ops = bind(edge.prepare(3, 0, get_precision("float64"), device), device.xp)
    edge.refresh(ops)
    flat = below.reshape(3, size)
    expected = np.zeros((3, 4))
    for n, k in np.ndindex(3, 4):
        expected[n, k] = sum(flat[n, i] * weight[i, k] for i in range(size))
    out = device.xp.full((3, 4), np.nan)
    edge.linear_drive(device.asarray(below), out, None, ops)
    np.testing.assert_allclose(device.to_numpy(out), expected, rtol=1e-12)
    edge.drive(device.asarray(below), out, None, ops)
    np.testing.assert_allclose(device.to_numpy(out), expected + bias, rtol=1e-12)
    down = device.xp.full((3, *in_shape), np.nan)
    edge.topdown(device.asarray(s), None, down, ops)
    expected_down = [[sum(s[n, k] * weight[i, k] for k in range(4)) for i in range(size)] for n in range(3)]
    np.testing.assert_allclose(device.to_numpy(down), np.reshape(expected_down, (3, *in_shape)), rtol=1e-12)
    gradient, bias_gradient = device.xp.ones((size, 4)), device.xp.ones(4)
    edge.add_gradient(device.asarray(below), device.asarray(s), None, gradient, bias_gradient, ops)
    expected_gradient = [[1 + sum(flat[n, i] * s[n, k] for n in range(3)) for k in range(4)] for i in range(size)]
    np.testing.assert_allclose(device.to_numpy(gradient), expected_gradient, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(device.to_numpy(bias_gradient), 1 + s.sum(axis=0), rtol=1e-12)


def test_float32_stays_float32(device, rng):
    case = Case(device, GEOMETRIES[1], rng, precision="float32")
    case.below, case.s = case.below.astype(np.float32), case.s.astype(np.float32)
    d, _ = case.drive()
    assert d.dtype == np.float32
    assert relative_error(d, case.d) < 1e-6
    assert case.gradient(case.below, case.s, case.winners)[0].dtype == np.float32


def test_flops_by_hand():
    # 4 x 4 outputs of 3 channels, each the sum of 3 x 3 x 2 products: 864 multiplications and as many additions
    assert ep.Conv2d((4, 4, 2), 3).flops() == 2 * 864
    # stride 2 without padding on 5 x 5: 2 x 2 outputs; pooling comes after the product
    assert ep.Conv2d((5, 5, 1), 4, stride=2, padding=0, pooling="max").flops() == 2 * 2 * 2 * 4 * 9
    assert ep.Linear((2, 3), 5).flops() == 2 * 30


def test_initial_weights_have_the_variance_of_their_gain(device):
    edge = ep.Conv2d((8, 8, 20), 60)
    edge.initialize(np.random.default_rng(0), 0.7, device, np.float32)
    weight = device.to_numpy(edge.weight)
    assert weight.dtype == np.float32
    assert weight.std() == pytest.approx(0.7 / np.sqrt(3 * 3 * 20), rel=0.02)  # 10800 draws: 0.7 % standard error
    assert abs(weight.mean()) < 3e-3
    assert not device.to_numpy(edge.bias).any()
    again = ep.Conv2d((8, 8, 20), 60)
    again.initialize(np.random.default_rng(0), 0.7, device, np.float32)
    np.testing.assert_array_equal(device.to_numpy(again.weight), weight)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"in_shape": (8, 8)}, "shape"),
        ({"in_shape": (8, 0, 3)}, "shape"),
        ({"channels": 0}, "channels"),
        ({"kernel": 0}, "kernel"),
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"padding": 3}, "padding must be an integer from 0 to 2, not 3"),
        ({"pooling": "maximum"}, "did you mean 'max'"),
        ({"pooling": "max", "pool": 0}, "pool"),
        ({"in_shape": (17, 17, 1), "pooling": "max", "pool": 17}, "pool of max-pooling must be .* 1 to 16, not 17"),
        ({"in_shape": (1, 9, 2), "pooling": "max"}, "1x9 map is too small"),
        ({"in_shape": (2, 2, 2), "padding": 0}, "2x2 map is too small"),
    ],
)
def test_wrong_arguments_are_one_line(options, word):
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        ep.Conv2d(**({"in_shape": (8, 8, 3), "channels": 4} | options))
    assert "\n" not in str(error.value)


def test_wrong_units_and_gain_are_one_line():
    with pytest.raises(ep.ConfigurationError, match="units must be a positive integer, not 0"):
        ep.Linear((3,), 0)
    with pytest.raises(ep.ConfigurationError, match="gain must be above 0, not 0"):
        ep.Network([ep.Linear((3,), 2)], 2, gain=0, feedback=1.0)
