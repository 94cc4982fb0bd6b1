"""Precisions, and factors of products rounded to them. Oracle: integers, float64, NumPy's own float16."""

import sys

import numpy as np
import pytest
from small import bind

import cupyep as ep
from cupyep.backend import PRECISIONS, get_precision
from cupyep.data import ImageFormat
from cupyep.ops.factors import ROUNDED_AT_ONCE, Factors, round_to_tf32
from cupyep.ops.linear import LinearOps
from cupyep.training.build import build_network
from cupyep.training.config import make_config

DIGITS = {"float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8, "float64": 53}
ROUNDED = ["tf32", "float16", "bfloat16"]


def precision_of(name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return get_precision(name)


def nearest(x, digits):
    """Return float64 numbers with so many significant binary digits, ties to even: whole numbers of the last place."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(np.ldexp(fraction, digits)), exponent - digits)


def test_what_is_stored_and_what_is_computed_in():
    for name in PRECISIONS:
        precision = precision_of(name)
        number = "float64" if name == "float64" else "float32"
        stored = name if name.endswith("16") else number
        assert (precision.name, precision.number.name, precision.stored.name) == (name, number, stored)
        assert precision.digits == DIGITS[name]
        assert precision.half == name.endswith("16")
        assert precision.tf32 == (name == "tf32")
        spacing = {"float32": np.finfo(np.float32).epsneg, "float64": np.finfo(np.float64).epsneg,
                   "float16": np.finfo(np.float16).epsneg, "bfloat16": 1 / 256, "tf32": 1 / 2048}  # fmt: skip
        assert precision.spacing == spacing[name]
    assert get_precision("tf32") is get_precision("tf32")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ep.ConfigurationError, match="unknown precision 'flaot16'; did you mean 'float16'"):
        get_precision("flaot16")


def test_bfloat16_without_its_library_is_one_line_with_the_remedy(monkeypatch):
    get_precision.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ep.ConfigurationError, match="bfloat16 needs the library ml_dtypes: pip install ml_dtypes") as e:
        get_precision("bfloat16")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("size", [1e-6, 0.005, 0.0625, 0.5, 1.0, 3.0, 1000.0])
def test_the_scale_of_float16_leaves_room_on_both_sides(size):
    scale = get_precision("float16").scale(size)
    assert np.frexp(scale)[0] == 0.5, "a power of two rounds nothing"
    assert 512 < scale * size <= 1024
    for name in ("float32", "tf32", "float64"):
        assert get_precision(name).scale(size) == 1.0


# --- TF32 in software ----------------------------------------------------------------------------------------------


def tf32_by_integers(x):
    """Return one float32 number with 10 bits of mantissa, by whole-number arithmetic on its 32 bits."""
    bits = int(np.float32(x).view(np.uint32))
    kept, dropped = divmod(bits, 1 << 13)
    if dropped > 1 << 12 or (dropped == 1 << 12 and kept % 2 == 1):
        kept += 1
    return np.uint32(kept << 13).view(np.float32)


def test_tf32_rounds_to_nearest_and_ties_to_even(device, rng):
    ulp = 2.0**-10
    hand = {
        1 + ulp / 2: 1.0,
        1 + 1.5 * ulp: 1 + 2 * ulp,
        1 + 0.51 * ulp: 1 + ulp,
        2 - 2.0**-20: 2.0,
        -1 - ulp / 2: -1.0,
        0.0: 0.0,
        np.inf: np.inf,
        2.0**-136 * 1.75: 2.0**-135,  # below 2^-126 the last place stays 2^-136
    }
    values = np.concatenate([list(hand), rng.standard_normal(5000) * 10.0 ** rng.uniform(-30, 30, 5000)])
    values = values.astype(np.float32)
    expected = np.array([tf32_by_integers(x) for x in values])
    np.testing.assert_array_equal(expected[: len(hand)], np.array(list(hand.values()), np.float32))
    ordinary = slice(len(hand), None)
    np.testing.assert_array_equal(expected[ordinary], nearest(values[ordinary], 11))
    found = device.asarray(values)
    round_to_tf32(found, device.xp.empty(700, np.uint32))  # several rounds, the last one short
    np.testing.assert_array_equal(device.to_numpy(found), expected)
    nan = device.asarray(np.array([np.nan], np.float32))
    round_to_tf32(nan, device.xp.empty(1, np.uint32))
    assert np.isnan(device.to_numpy(nan)).all()


@pytest.mark.parametrize("name", PRECISIONS)
def test_factors_on_numpy_have_the_digits_of_the_precision(rng, name):
    precision = precision_of(name)
    factors = Factors(precision, native=False)
    factors.scratch = np.empty(factors.scratch_size, np.uint32)
    weight = rng.standard_normal((130, 700)).astype(precision.number)  # more than are rounded at once
    assert weight.size > ROUNDED_AT_ONCE
    out = np.full_like(weight, np.nan)
    factors.take_up(weight, out)
    assert out.dtype == factors.dtype == precision.number
    expected = nearest(weight, DIGITS[name])
    if name == "float16":  # below 2^-14 it has fewer digits
        expected = np.where(np.abs(weight) < 2.0**-14, np.rint(weight * 2.0**24) / 2.0**24, expected)
    np.testing.assert_array_equal(out, expected)
    assert factors.copies == (name in ROUNDED)
    assert (out != weight).any() == (name in ROUNDED)


@pytest.mark.parametrize("name", PRECISIONS)
def test_factors_on_a_gpu_are_stored_as_they_are_multiplied(name):
    precision = precision_of(name)
    factors = Factors(precision, native=True)
    assert factors.dtype == precision.stored
    assert factors.copies == precision.half
    assert not factors.widens
    assert not factors.rounds


# --- Edges in all precisions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["none", "max", "average"])
@pytest.mark.parametrize("shape", [(6, 6, 4), (2, 2, 4)])
@pytest.mark.parametrize("name", ROUNDED)
def test_an_edge_multiplies_rounded_factors_and_rounds_its_results_once(device, rng, name, pooling, shape):
    """Against float64 on the same rounded factors; by columns and, on the small map, product first."""
    precision = precision_of(name)
    padding = 0 if shape == (2, 2, 4) else 1
    options = {"kernel": 2 if padding == 0 else 3, "padding": padding, "pooling": pooling, "pool": 1 + padding}
    edge, exact = ep.Conv2d(shape, 5, **options), ep.Conv2d(shape, 5, **options)
    check_edge(device, rng, precision, edge, exact, max_pooled=pooling == "max")


@pytest.mark.parametrize("name", ROUNDED)
def test_a_dense_edge_does_too(device, rng, name):
    check_edge(device, rng, precision_of(name), ep.Linear((2, 3, 2), 7), ep.Linear((2, 3, 2), 7), max_pooled=False)


def check_edge(device, rng, precision, edge, exact, max_pooled):
    name, samples = precision.name, 5
    master = rng.standard_normal(edge.weight_shape).astype(np.float32)
    bias = rng.standard_normal(edge.weight_shape[-1]).astype(np.float32)
    edge.weight, edge.bias = device.asarray(master), device.asarray(bias)
    digits = DIGITS[name]
    cpu = ep.get_device("cpu")
    exact.weight, exact.bias = nearest(master, digits), bias.astype(np.float64)
    # what is stored in halves is rounded already; TF32's factors are rounded when they are multiplied
    below, s = (rng.standard_normal((samples, *each)) for each in (edge.in_shape, edge.out_shape))
    below, s = (array.astype(precision.stored) for array in (below, s))
    below64, s64 = (nearest(array.astype(np.float64), digits) for array in (below, s))
    ops, exact_ops = (
        edge.prepare(samples, 0, precision, device),
        exact.prepare(samples, 0, get_precision("float64"), cpu),
    )
    for one, where, of in ((ops, device, edge), (exact_ops, cpu, exact)):
        bind(one, where.xp)
        of.refresh(one)
    on = device.asarray
    winners = rng.integers(0, 4, s.shape).astype(np.uint8) if max_pooled else None
    if max_pooled and edge.pool == 1:
        winners[...] = 0
    own_winners = None if winners is None else on(winners)
    limit = 2.0**-digits if precision.half else 0.0
    # A GPU may take the factors of so small a product as they are, cut them or round them.
    sums = 2.0**-9 * 20 if name == "tf32" and device.is_gpu else 5e-6

    def compare(found, expected, stored_before=0.0):
        """A rounding of the result, one of what was stored on the way, and the sums of float32."""
        assert found.dtype == precision.stored
        error = np.abs(device.to_numpy(found).astype(np.float64) - expected)
        assert (error <= limit * (np.abs(expected) + np.abs(stored_before)) + sums).all(), error.max()

    for call in ("linear_drive", "drive"):
        out, expected = device.xp.empty(s.shape, precision.stored), np.empty(s.shape)
        getattr(edge, call)(on(below), out, None if winners is None else own_winners.copy(), ops)
        getattr(exact, call)(below64, expected, None if winners is None else winners.copy(), exact_ops)
        # without pooling the product is stored before its bias is added
        twice = call == "drive" and getattr(edge, "pooling", "none") == "none"
        compare(out, expected, expected - bias if twice else 0.0)
    out, expected = device.xp.empty(below.shape, precision.stored), np.empty(below.shape)
    edge.topdown(on(s), own_winners, out, ops)
    exact.topdown(s64, winners, expected, exact_ops)
    compare(out, expected)
    gradient, bias_gradient = on(np.ones_like(master)), on(np.ones_like(bias))
    edge.add_gradient(on(below), on(s), own_winners, gradient, bias_gradient, ops)
    expected, expected_bias = np.ones(master.shape), np.ones(bias.shape)
    exact.add_gradient(below64, s64, winners, expected, expected_bias, exact_ops)
    np.testing.assert_allclose(device.to_numpy(gradient), expected, rtol=1e-5, atol=max(1e-5, sums))
    if name != "tf32":  # a sum, no product: TF32 rounds nothing
        np.testing.assert_allclose(device.to_numpy(bias_gradient), expected_bias, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == bias_gradient.dtype == np.float32


def test_a_dense_edge_in_float32_copies_nothing():
    ops = LinearOps((6, 4), 3, get_precision("float32"), ep.get_device("cpu"))
    assert ops.nbytes == 256, "the gradient on its way, 96 bytes"
    weight = np.ones((6, 4), np.float32)
    ops.refresh(weight)
    assert ops.matrix is weight


def test_the_classical_form_is_not_left_to_the_rounding_of_large_tiles():
    """Small responses of states are lost in it: a run takes direct sums, a network of one's own is warned of."""

    def network(**options):
        layers = [ep.Conv2d((16, 16, 3), 32), ep.Conv2d((16, 16, 32), 32, pooling="max")]
        return ep.Network(layers, 3, device="cpu", feedback=1.0, **options)

    net = network()
    with pytest.warns(ep.PrecisionWarning, match="build the network with exact=True"):
        ep.EquilibriumPropagation(net, nudge="classical")
    ep.EquilibriumPropagation(net, nudge="deviation")
    for quiet in ({"exact": True}, {"precision": "float64"}):
        ep.EquilibriumPropagation(network(**quiet), nudge="classical")
    images = ImageFormat("noise", tuple("abc"), (32, 32, 3), np.zeros(3), np.ones(3))
    for options, exact in (({}, False), ({"nudge": "classical"}, True), ({"exact": True}, True)):
        config = make_config({"arch": "vgg5", "width": 0.1, "algorithm": "ep"}, options)
        assert build_network(config, images, "cpu").precision.exact == exact
