"""The kernels of conv.cu and their launch code, run on the CPU through the shim.

Oracle: loops over single elements, by the definitions. Values are small integers, exact in every type, halves included.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import oracle
import pytest
import small
import strict
from cuda_cpu import ShimLauncher, compiler
from fake_gpu import FakeCublas
from small import bind

from cupyep import Conv2d, EquilibriumPropagation
from cupyep.backend import get_precision
from cupyep.backend.cuda import Cublas
from cupyep.errors import ConfigurationError
from cupyep.ops import factors
from cupyep.ops.conv import ConvOps
from cupyep.ops.cuda_conv import SOURCE, CudaConvOps
from cupyep.ops.launch import check_axes, map_grid, vector_width

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")

DTYPES = ["float32", "float64", "float16", "bfloat16"]
# what products are before they are pooled or summed, and what is stored
PRODUCTS = [("float32", "float32"), ("float64", "float64"), ("float32", "float16"), ("float32", "bfloat16")]
EDGES = {
    "usual": ((6, 6, 16), 8, {"pooling": "max"}),
    "image": ((7, 5, 3), 5, {"pooling": "max"}),  # odd sizes leave a remainder; no vectors
    "plain": ((5, 6, 8), 16, {"padding": 0}),
    "average": ((6, 8, 8), 8, {"pooling": "average"}),
    "strided": ((8, 7, 8), 16, {"stride": 2, "pooling": "average"}),
    "strided plain": ((7, 8, 3), 8, {"stride": 2, "padding": 2}),
    "large": ((9, 10, 8), 24, {"kernel": 5, "stride": 3, "padding": 2, "pooling": "max", "pool": 3}),
    "even": ((5, 5, 16), 8, {"kernel": 4, "padding": 3, "pooling": "max", "pool": 3}),
    "pointwise": ((4, 5, 8), 7, {"kernel": 1, "padding": 0, "pooling": "max"}),
    "grey": ((6, 7, 1), 8, {"pooling": "max"}),
    "two": ((5, 6, 2), 8, {"kernel": 4, "stride": 2, "padding": 1}),  # whole packs without filling
    "odd": ((5, 4, 11), 8, {"pooling": "average"}),  # inside the network: also a top-down product
    "single": ((2, 2, 8), 8, {"padding": 0, "kernel": 2}),
}
SAMPLES = 3


def dtype_of(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


@functools.cache
def launcher():
    return ShimLauncher(SOURCE)


def integers(rng, shape, dtype, high=100):
    return rng.integers(-high, high + 1, shape).astype(dtype)


def operations(edge, dtype, batch=SAMPLES, nbytes=1 << 24, **options):
    """Return CUDA operations of an edge whose scratch is full of NaN."""
    return bind(CudaConvOps(edge.geometry, batch, nbytes, get_precision(dtype.name), np, launcher(), **options), np)


def last_width():
    """Return VEC of the last launch: the first number among its template arguments."""
    arguments = launcher().launched[-1].partition("<")[2].rstrip(">").split(", ")
    return int(next(argument for argument in arguments if argument.isdigit()))


def edge_and(name, dtype_name):
    shape, channels, options = EDGES[name]
    return Conv2d(shape, channels, **options), dtype_of(dtype_name)


def pooled_case(edge, rng, dtype):
    """Return s (n, *out_shape) and valid winners, or None without max-pooling."""
    s = integers(rng, (SAMPLES, *edge.out_shape), dtype)
    winners = rng.integers(0, edge.pool**2, s.shape).astype(np.uint8) if edge.has_winners else None
    return s, winners


def unpooled(edge, s, winners):
    """Return U(s) as float64, by the definition."""
    s = s.astype(float)
    u = np.zeros((len(s), *edge.map_shape))
    p = edge.pool
    for n, y, x, c in np.ndindex(*s.shape):
        if edge.pooling == "average":
            u[n, y * p : y * p + p, x * p : x * p + p, c] = s[n, y, x, c] / p**2
        else:
            dy, dx = divmod(int(winners[n, y, x, c]), p) if edge.has_winners else (0, 0)
            u[n, y * p + dy, x * p + dx, c] = s[n, y, x, c]
    return u


def rounding(dtype):
    """Return the relative error of one rounding to `dtype` (ten for the sums of its own accumulation)."""
    return {"float64": 1e-15, "float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype.name]


cases = pytest.mark.parametrize(("name", "dtype_name"), list(itertools.product(EDGES, DTYPES)))
product_cases = pytest.mark.parametrize(("name", "types"), list(itertools.product(EDGES, PRODUCTS)))


@cases
def test_columns(rng, name, dtype_name):
    edge, dtype = edge_and(name, dtype_name)
    s = integers(rng, (SAMPLES, *edge.in_shape), dtype)
    found = operations(edge, dtype).columns(s, SAMPLES)
    k, stride, padding = edge.kernel, edge.stride, edge.padding
    (height, width, channels), (ho, wo, _) = edge.in_shape, edge.map_shape
    assert found.shape[1] * dtype.itemsize % 16 == 0, "rows are whole packs"
    filling = found[:, k * k * channels :]
    assert filling.shape[1] * dtype.itemsize < 16
    np.testing.assert_array_equal(filling.astype(float), 0)
    found = found[:, : k * k * channels]
    expected = np.zeros((SAMPLES, ho, wo, k, k, channels))
    for y, x, i, j in np.ndindex(ho, wo, k, k):
        row, column = y * stride + i - padding, x * stride + j - padding
        if 0 <= row < height and 0 <= column < width:
            expected[:, y, x, i, j] = s[:, row, column].astype(float)
    np.testing.assert_array_equal(found.astype(float), expected.reshape(found.shape))


@pytest.mark.parametrize(("name", "dtype_name"), list(itertools.product(["usual", "image"], DTYPES)))
def test_columns_are_written_in_packs_whatever_the_channels(rng, name, dtype_name):
    edge, dtype = edge_and(name, dtype_name)
    ops = operations(edge, dtype)
    ops.columns(integers(rng, (SAMPLES, *edge.in_shape), dtype), SAMPLES)
    assert last_width() == 16 // dtype.itemsize
    assert launcher().launched[-1].startswith("im2col<" if name == "usual" else "im2col_rows<")


@cases
def test_columns_of_the_unpooled_map(rng, name, dtype_name):
    """columns_up times the mirrored weight is the adjoint of the strided convolution after the adjoint of pooling."""
    edge, dtype = edge_and(name, dtype_name)
    s, winners = pooled_case(edge, rng, dtype)
    found = operations(edge, dtype, product_first=False).columns_up(s, winners, SAMPLES)
    u = unpooled(edge, s, winners)
    k, stride, padding = edge.kernel, edge.stride, edge.padding
    height, width, _ = edge.in_shape
    expected = np.zeros((SAMPLES, height, width, k, k, edge.map_shape[2]))
    for y, x, i, j in np.ndindex(height, width, k, k):
        # Output (oy, ox) saw input (y, x) through kernel offset (a, b); the kernel is mirrored: i = k - 1 - a.
        down, right = y + padding - (k - 1 - i), x + padding - (k - 1 - j)
        if down % stride or right % stride or min(down, right) < 0:
            continue
        oy, ox = down // stride, right // stride
        if oy < edge.map_shape[0] and ox < edge.map_shape[1]:
            expected[:, y, x, i, j] = u[:, oy, ox]
    expected = expected.reshape(found.shape)
    np.testing.assert_allclose(found.astype(float), expected, rtol=rounding(dtype) if edge.pooling == "average" else 0)


@cases
def test_unpool(rng, name, dtype_name):
    edge, dtype = edge_and(name, dtype_name)
    s, winners = pooled_case(edge, rng, dtype)
    found = operations(edge, dtype).unpool(s, winners, SAMPLES)
    assert found.dtype == dtype
    expected = unpooled(edge, s, winners)
    np.testing.assert_allclose(found.astype(float), expected, rtol=rounding(dtype) if edge.pooling == "average" else 0)


def product_case(name, types, rng, high):
    edge, product = edge_and(name, types[0])
    dtype = dtype_of(types[1])
    if edge.pooling == "none":
        product = dtype  # the product is the output
    ops = operations(edge, dtype)
    values = integers(rng, (SAMPLES, *edge.map_shape), product, high)
    out = np.full((SAMPLES, *edge.out_shape), np.nan, dtype)
    u = out if edge.pooling == "none" else ops.map(SAMPLES)
    assert u.dtype == product
    u[...] = values
    return edge, ops, values.astype(float), u, out


@product_cases
def test_bias_and_pool(rng, name, types):
    """Few distinct values, so that most windows have ties: the first in row order wins."""
    edge, ops, values, u, out = product_case(name, types, rng, 3)
    bias = integers(rng, edge.out_shape[2], np.float64 if types[1] == "float64" else np.float32)
    winners = np.full(out.shape, 77, np.uint8) if edge.has_winners else None
    ops.pool(u, bias, out, winners, SAMPLES)
    p = edge.pool
    for n, y, x, c in np.ndindex(*out.shape):
        window = list(values[n, y * p : y * p + p, x * p : x * p + p, c].ravel())
        if edge.pooling == "average":
            assert float(out[n, y, x, c]) == pytest.approx(sum(window) / p**2 + bias[c], rel=rounding(out.dtype))
            continue
        assert out[n, y, x, c] == max(window) + bias[c]
        if edge.has_winners:
            assert winners[n, y, x, c] == window.index(max(window))


@product_cases
def test_rounding_decides_no_winner(rng, name, types):
    """Units that are equal but for rounding are equal: the first in row order wins, as in NumPy."""
    edge, ops, values, u, out = product_case(name, types, rng, 3)
    if not edge.has_winners:
        return
    eps = np.finfo(np.float64 if types[1] == "float64" else np.float32).eps
    u[...] = values * (1 + 4 * eps * rng.uniform(-1, 1, values.shape))
    winners = np.full(out.shape, 77, np.uint8)
    ops.pool(u, np.zeros(edge.out_shape[2], u.dtype), out, winners, SAMPLES)
    p = edge.pool
    for n, y, x, c in np.ndindex(*out.shape):
        window = list(values[n, y * p : y * p + p, x * p : x * p + p, c].ravel())
        assert winners[n, y, x, c] == window.index(max(window))


@product_cases
def test_gather(rng, name, types):
    edge, ops, values, u, out = product_case(name, types, rng, 100)
    _, winners = pooled_case(edge, rng, out.dtype)
    ops.gather(u, winners, out, SAMPLES)
    p = edge.pool
    for n, y, x, c in np.ndindex(*out.shape):
        window = values[n, y * p : y * p + p, x * p : x * p + p, c].ravel()
        if edge.pooling == "average":
            assert float(out[n, y, x, c]) == pytest.approx(window.sum() / p**2, rel=rounding(out.dtype), abs=1e-6)
        else:
            assert out[n, y, x, c] == window[winners[n, y, x, c] if edge.has_winners else 0]


@product_cases
def test_col2im_is_the_transpose_of_columns(rng, name, types):
    edge, dtype = edge_and(name, types[1])
    ops = operations(edge, dtype, product_first=True)
    products = ops.products(SAMPLES)
    assert products.dtype == types[0]
    products[...] = integers(rng, products.shape, products.dtype, 5)
    out = np.full((SAMPLES, *edge.in_shape), np.nan, dtype)
    ops.col2im(products, out, SAMPLES)
    k, stride, padding = edge.kernel, edge.stride, edge.padding
    (height, width, channels), (ho, wo, _) = edge.in_shape, edge.map_shape
    windows = products.reshape(SAMPLES, ho, wo, k, k, channels).astype(float)
    expected = np.zeros(out.shape)
    for y, x, i, j in np.ndindex(ho, wo, k, k):
        row, column = y * stride + i - padding, x * stride + j - padding
        if 0 <= row < height and 0 <= column < width:
            expected[:, row, column] += windows[:, y, x, i, j]
    np.testing.assert_array_equal(out.astype(float), expected)


def test_nan_is_not_hidden_by_a_maximum(rng):
    """A network that diverged must be seen to have diverged."""
    edge = Conv2d((4, 4, 4), 4, pooling="max")
    ops = operations(edge, np.dtype("float32"))
    for place in range(4):
        u = ops.map(SAMPLES)
        u[...] = integers(rng, u.shape, "float32")
        u[:, place // 2 :: 2, place % 2 :: 2] = np.nan
        out = np.zeros((SAMPLES, *edge.out_shape), np.float32)
        ops.pool(u, np.zeros(4, np.float32), out, np.empty(out.shape, np.uint8), SAMPLES)
        assert np.isnan(out).all()


# --- CudaConvOps in an edge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize(
    ("precision_name", "tolerance"),
    [("float32", 2e-5), ("float64", 1e-12), ("tf32", 2e-5), ("float16", 2e-3), ("bfloat16", 1.6e-2)],
)
def test_an_edge_computes_the_same_with_both_operations(monkeypatch, rng, name, precision_name, tolerance):
    """Chunks of two and a last one of one sample; every output starts as NaN or, where it is added to, as ones.

    Stored halves may differ in their last place, gradients are float32 and as close as its sums.
    """
    cublas = Cublas(FakeCublas(), np, lambda: 0)
    if precision_name == "bfloat16":
        dtype_of("bfloat16")
    edge, precision = edge_and(name, "float32")[0], get_precision(precision_name)
    dtype, number = precision.stored, precision.number
    batch = 5
    edge.weight = rng.standard_normal(edge.weight_shape).astype(number)
    edge.bias = rng.standard_normal(edge.out_shape[2]).astype(number)
    below = rng.standard_normal((batch, *edge.in_shape)).astype(dtype)
    s = rng.standard_normal((batch, *edge.out_shape)).astype(dtype)
    results = []
    multiply = factors.gemm, factors.add_gemm
    own = cublas.gemm, lambda a, b, out, scratch, tf32: cublas.gemm(a, b, out, accumulate=True, tf32=tf32)
    for make in (lambda n: ConvOps(edge.geometry, batch, n, precision, np),
                 lambda n: CudaConvOps(edge.geometry, batch, n, precision, np, launcher())):  # fmt: skip
        assert [m for _, m in make(0).chunks] == [1] * batch
        for name, function in zip(("gemm", "add_gemm"), own if results else multiply, strict=True):
            monkeypatch.setattr(factors, name, function)
        ops = make(1 << 24)
        ops.chunks = [(slice(0, 2), 2), (slice(2, 4), 2), (slice(4, 5), 1)]
        bind(ops, np)
        ops.refresh(edge.weight)
        drive, linear = np.full(s.shape, np.nan, dtype), np.full(s.shape, np.nan, dtype)
        winners = np.full(s.shape, 77, np.uint8) if edge.has_winners else None
        topdown = np.full(below.shape, np.nan, dtype)
        weight, bias = np.ones(edge.weight_shape, number), np.ones(edge.out_shape[2], number)
        edge.drive(below, drive, winners, ops)
        edge.linear_drive(below, linear, winners, ops)
        edge.topdown(s, winners, topdown, ops)
        edge.add_gradient(below, s, winners, weight, bias, ops)
        results.append((drive, linear, topdown, weight, bias, winners if edge.has_winners else drive))
    for reference, found in zip(*results, strict=True):
        limit = tolerance if reference.dtype == dtype else 2e-5
        reference, found = reference.astype(float), found.astype(float)
        np.testing.assert_allclose(found, reference, rtol=limit, atol=limit * np.abs(reference).max())
    np.testing.assert_array_equal(results[0][-1] > 0, results[1][-1] > 0)


@pytest.mark.parametrize("product_first", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_topdown_by_columns_and_product_first(rng, name, product_first):
    edge, dtype = edge_and(name, "float64")
    ops = operations(edge, dtype, product_first=product_first)
    weight = rng.standard_normal(edge.weight_shape)
    ops.refresh(weight)
    s, winners = pooled_case(edge, rng, dtype)
    out = np.full((SAMPLES, *edge.in_shape), np.nan)
    ops.topdown(s, winners, out, SAMPLES)
    expected = oracle.conv_adjoint(unpooled(edge, s, winners), weight, edge.in_shape, edge.stride, edge.padding)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("nudge", ["classical", "deviation"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_a_whole_step_is_the_same_through_the_kernels(monkeypatch, pooling, nudge):
    """Free and nudged phases and the gradient of a convolutional network, all its chunks and scratch included."""
    options = {"beta": 0.1, "free_steps": 8, "nudged_steps": 4, "nudge": nudge, "schedule": "synchronous"}
    results = []
    for kernels in (False, True):
        if kernels:
            monkeypatch.setattr(
                Conv2d,
                "prepare",
                lambda edge, batch, nbytes, precision, _: CudaConvOps(
                    edge.geometry, batch, nbytes, precision, np, launcher()
                ),
            )
        net = small.network(pooling=pooling)
        results.append(EquilibriumPropagation(net, **options).step(small.batch_of(net, 4)))
    assert {name.partition("<")[0] for name in launcher().launched} >= {
        "im2col",
        "unpool_im2col",
        "bias_pool",
        "unpool",
    }
    for path, gradient in results[0].gradients.items():
        np.testing.assert_allclose(results[1].gradients[path], gradient, rtol=1e-9, atol=1e-13, err_msg=path)


def test_scratch_is_the_columns_of_one_direction_and_a_map(rng):
    """16 x 16 x 8 to 16 channels, float32: columns up 256 * 9 * 16, map 256 * 16."""
    edge = Conv2d((16, 16, 8), 16, pooling="max")
    single = get_precision("float32")
    ops = CudaConvOps(edge.geometry, 1, 1 << 20, single, np, launcher())
    assert ops.nbytes == 4 * (256 * 9 * 16 + 256 * 16)
    first = CudaConvOps(edge.geometry, 1, 1 << 20, single, np, launcher(), product_first=True)
    assert first.nbytes == 4 * (256 * 9 * 8 + 256 * 16)
    # the plain code also has padded maps, here 18 x 18 x 16, a mask of the pooled 8 x 8 x 16, and a gradient on its way
    plain = ConvOps(edge.geometry, 1, 1 << 20, single, np)
    assert plain.nbytes == ops.nbytes + 4 * 18 * 18 * 16 + 8 * 8 * 16 + 4 * 9 * 8 * 16
    half = CudaConvOps(edge.geometry, 1, 1 << 20, get_precision("float16"), np, launcher())
    assert half.nbytes == 2 * 256 * 9 * 16 + 4 * 256 * 16  # products stay float32 until they are pooled


@pytest.mark.parametrize(("name", "inputs"), [("float32", 28), ("tf32", 28), ("float16", 32), ("float64", 28)])
def test_the_first_edge_is_multiplied_in_whole_packs(rng, name, inputs):
    """3 x 3 x 3 = 27 inputs. A padded weight, zeros at its end, and a padded gradient; no size that a user sees."""
    edge, precision = Conv2d((8, 8, 3), 16, pooling="max"), get_precision(name)
    ops = operations(edge, precision.stored)
    assert (ops.inputs, ops.factor.shape, ops.derived[0][0]) == (inputs, (inputs, 16), (inputs, 16))
    edge.weight = rng.standard_normal(edge.weight_shape).astype(precision.number)
    ops.refresh(edge.weight)
    np.testing.assert_array_equal(ops.factor[27:], 0)
    np.testing.assert_array_equal(ops.kernel, edge.weight.astype(precision.stored))
    even = operations(Conv2d((8, 8, 8), 16), precision.stored)
    assert even.inputs == 72
    assert not even.padded, "a weight of whole packs is a factor itself"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_what_fills_up_the_weight_is_zero_whatever_the_memory_held(fake_gpu, monkeypatch, precision):
    monkeypatch.setattr(strict.XP, "empty", lambda shape, dtype: strict.XP.full(shape, np.nan, dtype), raising=False)
    net = small.network(device=fake_gpu, precision=precision)
    ops = net.effective.arrays(0, net.layers[0].prepare(2, 1 << 20, net.precision, fake_gpu))
    padded = fake_gpu.to_numpy(ops[0])
    assert len(padded) > net.layers[0].geometry.window
    np.testing.assert_array_equal(padded, 0)


def test_states_of_another_type_are_refused():
    edge = Conv2d((6, 6, 8), 8, pooling="max")
    ops, s = operations(edge, np.dtype("float16")), np.zeros((1, 6, 6, 8), np.float32)
    above, winners = np.zeros((1, 3, 3, 8), np.float32), np.zeros((1, 3, 3, 8), np.uint8)
    for call in (
        lambda: ops.columns(s, 1),
        lambda: ops.columns_up(above, winners, 1),
        lambda: ops.unpool(above, winners, 1),
    ):
        with pytest.raises(TypeError, match="precision float16 stores float16, not float32"):
            call()


def test_winners_of_another_type_are_refused():
    """A kernel would take each byte of a larger integer for a winner."""
    edge = Conv2d((6, 6, 8), 8, pooling="max")
    ops, s = operations(edge, np.dtype("float32")), np.zeros((1, 3, 3, 8), np.float32)
    winners, u = np.zeros(s.shape, np.int64), np.zeros((1, 6, 6, 8), np.float32)
    for call in (
        lambda: ops.columns_up(s, winners, 1),
        lambda: ops.unpool(s, winners, 1),
        lambda: ops.gather(u, winners, s, 1),
        lambda: ops.pool(u, np.zeros(8, np.float32), s, winners, 1),
    ):
        with pytest.raises(TypeError, match="a kernel for uint8 cannot read an array of int64"):
            call()


def test_a_sample_with_columns_beyond_32_bits_is_refused():
    edge = Conv2d((1024, 1024, 256), 256)
    with pytest.raises(ConfigurationError, match="2415919104 elements"):
        CudaConvOps(edge.geometry, 1, 1 << 20, get_precision("float32"), np, launcher())


# --- Launch helpers ------------------------------------------------------------------------------------------------


def test_width_of_accesses():
    floats, halves = np.zeros(64, np.float32), np.zeros(64, np.float16)
    assert vector_width(8, floats) == 4
    assert vector_width(8, floats, np.zeros(64, np.uint8), None) == 4
    assert vector_width(8, floats, halves) == 8
    assert vector_width(12, floats, halves) == 1
    assert vector_width(8, np.zeros(64)) == 2
    assert vector_width(8, floats[1:]) == 1  # its address is no multiple of 16


@pytest.mark.parametrize("items", [1, 31, 32, 33, 255, 256, 257, 384, 5000])
def test_grid_covers_every_item_with_little_waste(items):
    (blocks, rows, samples), (threads, *others) = map_grid(items, 7, 5)
    assert (rows, samples, others) == (7, 5, [1, 1])
    assert threads % 32 == 0
    assert threads <= 256
    assert items <= blocks * threads < items + 32 * blocks


def test_an_axis_that_no_grid_has_is_refused():
    check_axes(65535, 1)
    with pytest.raises(ConfigurationError, match="at most 65535 samples or rows, not 65536"):
        map_grid(1, 1, 65536)
