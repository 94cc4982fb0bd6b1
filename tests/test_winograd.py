"""Winograd's algorithm beyond what test_layers shows edge by edge: its choice, ties, precision, chunks, whole networks.

Oracle: direct convolution in float64 (oracle.py), exact integers, and the same network by columns.
"""

import numpy as np
import oracle
import pytest
from small import batch_of, bind, network, on_host

import cupyep as ep
from cupyep.backend import get_precision
from cupyep.ops.conv import ConvOps
from cupyep.ops.winograd import WinogradOps, matrices, tile_size

MIB = 1 << 20


both = pytest.mark.parametrize("m", [2, 4])


def prepared(edge, samples, dtype, budget=8 * MIB, make=WinogradOps, **options):
    ops = bind(make(edge.geometry, samples, budget, get_precision(np.dtype(dtype).name), np, **options), np)
    ops.refresh(edge.weight)
    return ops


def edge_of(in_shape, channels, weight, **options):
    edge = ep.Conv2d(in_shape, channels, **options)
    edge.weight, edge.bias = weight, np.zeros(channels, weight.dtype)
    return edge


def drive(edge, ops, s):
    out = np.full((len(s), *edge.out_shape), np.nan, s.dtype)
    winners = np.full(out.shape, 77, np.uint8) if edge.has_winners else None
    edge.drive(s, out, winners, ops)
    return out, winners


@pytest.mark.parametrize(
    ("change", "samples", "m", "multiplications"),  # a sample, a pair of channels
    [
        ({}, 8, 4, 36 * 16),
        ({"pooling": "none"}, 8, 4, 36 * 16),
        ({"padding": 0}, 8, 4, 36 * 16),  # 7 x 7 windows
        ({"in_shape": (15, 13, 64)}, 8, 4, 36 * 4 * 3),  # 7 x 6 windows, two of them on each axis of a tile
        ({"in_shape": (13, 13, 64), "pooling": "none"}, 8, 4, 36 * 16),
        ({"kernel": 5, "padding": 2}, 8, None, 25 * 256),
        ({"stride": 2}, 8, None, 9 * 64),
        ({"padding": 2}, 8, None, 9 * 18 * 18),
        ({"pooling": "max", "pool": 3}, 8, None, 9 * 256),
        ({"pooling": "average", "pool": 1}, 8, None, 9 * 256),
        ({"in_shape": (16, 16, 15)}, 32, None, 9 * 256),  # few channels on either side
        ({"channels": 15}, 32, None, 9 * 256),
        ({"channels": 16}, 32, 4, 36 * 16),
        ({"in_shape": (6, 6, 64), "channels": 31, "pooling": "none"}, 32, None, 9 * 36),  # with smaller tiles sooner
        ({"in_shape": (4, 4, 512), "channels": 512, "padding": 0}, 32, 2, 16),  # larger tiles: as many as by columns
        ({"in_shape": (6, 6, 64), "pooling": "none"}, 32, 2, 16 * 9),  # as many with larger tiles
        ({"in_shape": (4, 4, 128), "channels": 128}, 31, 2, 16 * 4),  # larger tiles: 31 rows
        ({"in_shape": (4, 4, 128), "channels": 128}, 32, 4, 36),
        ({"in_shape": (4, 4, 128), "channels": 128}, 7, None, 9 * 16),  # 28 rows of smaller ones
        ({"in_shape": (4, 4, 64)}, 31, None, 9 * 16),  # narrow products want more rows, the more the smaller the tiles
        ({"in_shape": (4, 4, 64)}, 32, 4, 36),
        ({"in_shape": (2, 2, 64)}, 127, None, 9 * 4),
        ({"in_shape": (2, 2, 64)}, 128, 2, 16),
    ],
)
def test_where_it_is_chosen(change, samples, m, multiplications):
    edge = ep.Conv2d(**({"in_shape": (16, 16, 64), "channels": 64, "pooling": "max"} | change))
    precision = get_precision("float32")
    ops = edge.prepare(samples, 8 * MIB, precision, ep.get_device("cpu"))
    assert tile_size(edge.geometry, samples, precision) == m
    assert type(ops) is (WinogradOps if m else ConvOps)
    assert ops.flops == 2 * multiplications * edge.in_shape[2] * edge.channels


def test_never_of_rounded_factors_nor_of_float64():
    geometry, names = ep.Conv2d((16, 16, 64), 64).geometry, ("float64", "float32", "tf32", "float16")
    assert [tile_size(geometry, 8, get_precision(name)) for name in names] == [None, 4, None, None]


@both
def test_matrices_convolve_in_one_dimension(rng, m):
    at, g, bt = matrices(m)
    assert (at.shape, g.shape, bt.shape) == ((m, m + 2), (m + 2, 3), (m + 2, m + 2))
    d, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ d)), np.correlate(d, w), rtol=0, atol=1e-14 * 10)


@both
@pytest.mark.parametrize("pooling", ["max", "none"])
def test_ties_of_integers(rng, pooling, m):
    """Few values, so that most windows have ties, which rounding breaks: the first one wins all the same."""
    weight = rng.integers(-1, 2, (3, 3, 3, 5)).astype(float)
    edge = edge_of((8, 6, 3), 5, weight, pooling=pooling)
    s = rng.integers(0, 2, (4, 8, 6, 3)).astype(float)
    u = oracle.conv(s, weight, 1, 1)
    out, winners = drive(edge, prepared(edge, 4, float, m=m), s)
    if pooling == "none":
        np.testing.assert_allclose(out, u, rtol=0, atol=1e-13)
        return
    windows = u.reshape(4, 4, 2, 3, 2, 5).transpose(0, 1, 3, 5, 2, 4).reshape(4, 4, 3, 5, 4)
    assert ((windows == windows.max(axis=-1, keepdims=True)).sum(axis=-1) > 1).mean() > 0.2
    np.testing.assert_allclose(out, windows.max(axis=-1), rtol=0, atol=1e-13)
    np.testing.assert_array_equal(winners, windows.argmax(axis=-1))  # the first in row order


@both
@pytest.mark.parametrize(("equal", "winners"), [("all", {0}), ("rows", {0, 1}), ("columns", {0, 2})])
def test_equal_inputs_give_equal_units(rng, equal, winners, m):
    """Clipped states have large areas of one value. Away from the frame their units tie: the first one wins."""
    weight = (rng.standard_normal((3, 3, 200, 64)) / np.sqrt(9 * 200)).astype(np.float32)
    edge = edge_of((10, 10, 200), 64, weight, padding=0, pooling="max")
    shape = {"all": (5, 1, 1, 200), "rows": (5, 1, 10, 200), "columns": (5, 10, 1, 200)}[equal]
    s = np.broadcast_to(rng.uniform(0, 1, shape), (5, 10, 10, 200)).astype(np.float32)
    for value in (1, 0):
        found = set(drive(edge, prepared(edge, 5, np.float32, m=m), value * s)[1].ravel())
        assert found == (winners if value else {0})


@both
def test_error_of_float32(rng, m):
    """Channels as in VGG-5's second edge. By tiles of 4 x 4 it errs by about 2e-6 of the largest, else by 5e-7."""
    weight = rng.standard_normal((3, 3, 128, 32)) / np.sqrt(9 * 128)
    s, above = rng.uniform(0, 1, (2, 16, 16, 128)), rng.standard_normal((2, 16, 16, 32))
    expected = oracle.conv(s, weight, 1, 1)
    expected_down = oracle.conv_adjoint(above, weight, (16, 16, 128), 1, 1)
    edge = edge_of((16, 16, 128), 32, weight.astype(np.float32))
    s, above = s.astype(np.float32), above.astype(np.float32)
    ops, down, gradient = prepared(edge, 2, np.float32, m=m), np.empty_like(s), np.zeros_like(edge.weight)
    edge.topdown(above, None, down, ops)
    ops.add_gradient(s, above, None, gradient)
    padded, expected_gradient = np.pad(s.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0))), np.empty(weight.shape)
    for i, j in np.ndindex(3, 3):
        expected_gradient[i, j] = np.einsum("nyxc,nyxk->ck", padded[:, i : i + 16, j : j + 16], above)
    for found, exact in ((drive(edge, ops, s)[0], expected), (down, expected_down), (gradient, expected_gradient)):
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() < {2: 1e-6, 4: 4e-6}[m] * np.abs(exact).max()


@pytest.mark.parametrize("pooling", ["max", "average", "none"])
@pytest.mark.parametrize(
    ("m", "kilobytes", "chunks"), [(2, 150, [5]), (4, 75, [3, 2]), (4, 50, [2, 2, 1]), (2, 0, [1] * 5)]
)
def test_chunks_change_nothing(rng, pooling, m, kilobytes, chunks):
    """A sample's scratch takes some 20 kB."""
    edge = edge_of((8, 6, 8), 8, rng.standard_normal((3, 3, 8, 8)), pooling=pooling)
    below, s = rng.standard_normal((5, 8, 6, 8)), rng.standard_normal((5, *edge.out_shape))
    winners = rng.integers(0, 4, s.shape).astype(np.uint8) if edge.has_winners else None
    results = []
    for ops in (prepared(edge, 5, float, make=ConvOps), prepared(edge, 5, float, kilobytes * 1000, m=m)):
        linear, down, gradient = np.empty_like(s), np.empty_like(below), np.ones_like(edge.weight)
        edge.linear_drive(below, linear, winners, ops)
        edge.topdown(s, winners, down, ops)
        for _ in range(2):  # added, and what a call leaves in scratch is of no consequence
            ops.add_gradient(below, s, winners, gradient)
        results.append([drive(edge, ops, below)[0], linear, down, gradient])
    assert [m for _, m in ops.chunks] == chunks
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "samples_at_once", "copies"),  # 4 tiles an image; at most 10^6 multiplications where 32 rows are fewer
    [((64, 64), [40], 2), ((128, 128), [14, 14, 12], 2), ((176, 177), [8] * 5, 2), ((176, 178), [20, 20], 1)],
)
def test_small_products(rng, channels, samples_at_once, copies):
    """With their own transposed copy of what the weight is transformed to; large ones take a view."""
    inputs, units = channels
    edge = edge_of((8, 8, inputs), units, rng.standard_normal((3, 3, *channels)), pooling="none")
    ops, direct = (prepared(edge, 40, float, make=make) for make in (WinogradOps, ConvOps))
    assert [count for _, count in ops.chunks] == samples_at_once
    assert len(ops.derived) == copies
    s, found, expected = rng.standard_normal((40, 8, 8, units)), *np.empty((2, 40, 8, 8, inputs))
    for weight in (edge.weight, rng.standard_normal(edge.weight.shape)):
        edge.weight = weight
        for its, out in ((ops, found), (direct, expected)):
            its.refresh(weight)
            edge.topdown(s, None, out, its)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


LEARNERS = {
    "deviation": lambda net: ep.EquilibriumPropagation(net, 0.3, 30, 10, schedule="synchronous"),
    "classical": lambda net: ep.EquilibriumPropagation(
        net, 0.3, 30, 10, nudge="classical", schedule="evenodd", relaxation=1.0
    ),
    "one-sided": lambda net: ep.EquilibriumPropagation(
        net, 0.3, 30, 10, nudge="classical", scheme="onesided", schedule="synchronous"
    ),
    "tangent": lambda net: ep.EquilibriumPropagation(net, 0.3, 5, 5, scheme="tangent", schedule="sweeps"),
    "BPTT": lambda net: ep.BackpropagationThroughTime(net, 10, 5, schedule="synchronous"),
    "BP": ep.Backpropagation,
}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_networks_learn_the_same(request, name, pooling):
    results = []
    for algorithm, kind in (("columns", ConvOps), ("winograd", WinogradOps)):
        if algorithm == "winograd":
            request.getfixturevalue("winograd_everywhere")
        net = network("conv", pooling=pooling, activation="hard_sigmoid")
        learner = LEARNERS[name](net)
        results.append(on_host(net, learner.step(batch_of(net)).gradients))
        assert [type(ops) for ops in net.memory.workspace(3).ops] == [
            kind,
            kind,
            ConvOps,
        ]  # the third has a 2 x 2 kernel
    for path, expected in results[0].items():
        assert np.linalg.norm(expected) > 1e-6
        np.testing.assert_allclose(results[1][path], expected, rtol=1e-9, atol=1e-12, err_msg=path)
