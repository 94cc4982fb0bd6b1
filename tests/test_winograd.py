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
from cupyep.ops.winograd import WinogradOps, possible

MIB = 1 << 20


def prepared(edge, samples, dtype, budget=8 * MIB, make=WinogradOps):
    ops = bind(make(edge.geometry, samples, budget, get_precision(np.dtype(dtype).name), np), np)
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
    ("change", "samples", "chosen"),
    [
        ({}, 8, True),
        ({"pooling": "none"}, 8, True),
        ({"padding": 0}, 8, True),
        ({"in_shape": (15, 13, 64)}, 8, True),
        ({"kernel": 5, "padding": 2}, 8, False),
        ({"stride": 2}, 8, False),
        ({"padding": 2}, 8, False),
        ({"pooling": "max", "pool": 3}, 8, False),
        ({"pooling": "average", "pool": 1}, 8, False),
        ({"in_shape": (16, 16, 31)}, 8, False),  # few channels on either side
        ({"channels": 31}, 8, False),
        ({"in_shape": (4, 4, 512), "channels": 512}, 15, False),  # 4 tiles a sample: 60 rows
        ({"in_shape": (4, 4, 512), "channels": 512}, 16, True),
        ({"in_shape": (4, 4, 64)}, 31, False),  # narrow products want more rows: 124
        ({"in_shape": (4, 4, 64)}, 32, True),
    ],
)
def test_where_it_is_chosen(change, samples, chosen):
    edge = ep.Conv2d(**({"in_shape": (16, 16, 64), "channels": 64, "pooling": "max"} | change))
    ops = edge.prepare(samples, 8 * MIB, get_precision("float32"), ep.get_device("cpu"))
    assert type(ops) is (WinogradOps if chosen else ConvOps)
    assert ops.flops == (edge.flops() if not chosen else 2 * 16 * tiles(edge) * edge.in_shape[2] * edge.out_shape[2])


def tiles(edge):
    height, width, _ = edge.map_shape
    return (height // 2) * (width // 2) if edge.pooling != "none" else -(-height // 2) * -(-width // 2)


def test_never_of_rounded_factors():
    geometry, names = ep.Conv2d((16, 16, 64), 64).geometry, ("float64", "float32", "tf32", "float16")
    assert [possible(geometry, get_precision(name)) for name in names] == [True, True, False, False]


@pytest.mark.parametrize("pooling", ["max", "none"])
def test_of_integers_it_is_exact_ties_included(rng, pooling):
    """Weights are multiples of four, so that their transform is exact; few values, so that most windows have ties."""
    weight = 4.0 * rng.integers(-1, 2, (3, 3, 3, 5))
    edge = edge_of((8, 6, 3), 5, weight, pooling=pooling)
    s = rng.integers(0, 2, (4, 8, 6, 3)).astype(float)
    u = oracle.conv(s, weight, 1, 1)
    out, winners = drive(edge, prepared(edge, 4, float), s)
    if pooling == "none":
        np.testing.assert_array_equal(out, u)
        return
    windows = u.reshape(4, 4, 2, 3, 2, 5).transpose(0, 1, 3, 5, 2, 4).reshape(4, 4, 3, 5, 4)
    assert ((windows == windows.max(axis=-1, keepdims=True)).sum(axis=-1) > 1).mean() > 0.2
    np.testing.assert_array_equal(out, windows.max(axis=-1))
    np.testing.assert_array_equal(winners, windows.argmax(axis=-1))  # the first in row order


@pytest.mark.parametrize(("equal", "winners"), [("all", {0}), ("rows", {0, 1}), ("columns", {0, 2})])
def test_equal_inputs_give_equal_units(rng, equal, winners):
    """Clipped states have large areas of one value. Away from the frame their units tie: the first one wins."""
    edge = edge_of((8, 8, 7), 9, rng.standard_normal((3, 3, 7, 9)).astype(np.float32), padding=0, pooling="max")
    shape = {"all": (5, 1, 1, 7), "rows": (5, 1, 8, 7), "columns": (5, 8, 1, 7)}[equal]
    s = np.broadcast_to(rng.uniform(0, 1, shape), (5, 8, 8, 7)).astype(np.float32)
    for value in (1, 0):
        found = set(drive(edge, prepared(edge, 5, np.float32), value * s)[1].ravel())
        assert found == (winners if value else {0})


def test_error_of_float32(rng):
    """Channels as in VGG-5's second edge. Of the largest unit it errs by 2e-7 to 5e-7, columns by 5e-7 to 7e-7."""
    weight = rng.standard_normal((3, 3, 128, 32)) / np.sqrt(9 * 128)
    s, above = rng.uniform(0, 1, (2, 16, 16, 128)), rng.standard_normal((2, 16, 16, 32))
    expected = oracle.conv(s, weight, 1, 1)
    expected_down = oracle.conv_adjoint(above, weight, (16, 16, 128), 1, 1)
    edge = edge_of((16, 16, 128), 32, weight.astype(np.float32))
    s, above = s.astype(np.float32), above.astype(np.float32)
    ops, down, gradient = prepared(edge, 2, np.float32), np.empty_like(s), np.zeros_like(edge.weight)
    edge.topdown(above, None, down, ops)
    ops.add_gradient(s, above, None, gradient)
    padded, expected_gradient = np.pad(s.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0))), np.empty(weight.shape)
    for i, j in np.ndindex(3, 3):
        expected_gradient[i, j] = np.einsum("nyxc,nyxk->ck", padded[:, i : i + 16, j : j + 16], above)
    for found, exact in ((drive(edge, ops, s)[0], expected), (down, expected_down), (gradient, expected_gradient)):
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("pooling", ["max", "average", "none"])
@pytest.mark.parametrize(("chunks", "kilobytes"), [([5], 100), ([3, 2], 60), ([2, 2, 1], 40), ([1] * 5, 0)])
def test_chunks_change_nothing(rng, pooling, chunks, kilobytes):
    """A sample's scratch takes 17 kB; the gradient is collected over chunks before it is transformed back."""
    edge = edge_of((8, 6, 8), 8, rng.standard_normal((3, 3, 8, 8)), pooling=pooling)
    below, s = rng.standard_normal((5, 8, 6, 8)), rng.standard_normal((5, *edge.out_shape))
    winners = rng.integers(0, 4, s.shape).astype(np.uint8) if edge.has_winners else None
    results = []
    for ops in (prepared(edge, 5, float, make=ConvOps), prepared(edge, 5, float, kilobytes * 1000)):
        linear, down, gradient = np.empty_like(s), np.empty_like(below), np.ones_like(edge.weight)
        edge.linear_drive(below, linear, winners, ops)
        edge.topdown(s, winners, down, ops)
        for _ in range(2):  # added, and what a call leaves in scratch is of no consequence
            ops.add_gradient(below, s, winners, gradient)
        results.append([drive(edge, ops, below)[0], linear, down, gradient])
    assert [m for _, m in ops.chunks] == chunks
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


LEARNERS = {
    "deviation": lambda net: ep.EquilibriumPropagation(net, 0.3, 30, 10),
    "classical": lambda net: ep.EquilibriumPropagation(net, 0.3, 30, 10, nudge="classical", schedule="evenodd"),
    "one-sided": lambda net: ep.EquilibriumPropagation(net, 0.3, 30, 10, nudge="classical", scheme="onesided"),
    "tangent": lambda net: ep.EquilibriumPropagation(net, 0.3, 5, 5, scheme="tangent", schedule="sweeps"),
    "BPTT": lambda net: ep.BackpropagationThroughTime(net, 10, 5),
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
