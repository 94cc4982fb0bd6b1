"""Array kernels. Oracle: loops over single elements, by the definitions; integers, so that equality is exact."""

import numpy as np
import pytest

from cupyep.backend.precision import get_precision
from cupyep.memory.layout import Stack
from cupyep.ops.buffers import Arena
from cupyep.ops.columns import col2im, im2col, inner_view, output_size
from cupyep.ops.pooling import (
    average_pool,
    average_scatter,
    clear_remainder,
    max_gather,
    max_pool,
    max_scatter,
    windows,
)


def integers(rng, shape, high=100):
    return rng.integers(-high, high, shape).astype(np.float64)


def window(u, n, y, x, c, p):
    """Return the units of one window in row order."""
    return [u[n, y * p + dy, x * p + dx, c] for dy in range(p) for dx in range(p)]


def pooled_shape(u, p):
    return (u.shape[0], u.shape[1] // p, u.shape[2] // p, u.shape[3])


def run_max_pool(device, u, p, margin=0.0):
    xp = device.xp
    shape = pooled_shape(u, p)
    out, winners, mask = xp.full(shape, np.nan), xp.full(shape, 77, np.uint8), xp.empty(shape, bool)
    max_pool(windows(device.asarray(u.copy()), p), out, winners, mask, margin)
    return device.to_numpy(out), device.to_numpy(winners)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (5, 3, 1, 1),
        (6, 3, 2, 1),
        (7, 3, 2, 0),
        (4, 2, 1, 0),
        (8, 5, 3, 2),
        (3, 1, 1, 0),
        (9, 4, 2, 3),
    ],
)
def test_output_size_counts_positions(size, kernel, stride, padding):
    expected = len([start for start in range(0, size + 2 * padding, stride) if start + kernel <= size + 2 * padding])
    assert output_size(size, kernel, stride, padding) == expected


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 1), (3, 2), (1, 1), (2, 3)])
def test_im2col(device, rng, kernel, stride):
    padded = integers(rng, (2, 7, 6, 3))
    ho, wo = (7 - kernel) // stride + 1, (6 - kernel) // stride + 1
    out = device.xp.full((2, ho, wo, kernel, kernel * 3), np.nan)
    im2col(device.asarray(padded), kernel, stride, out)
    found = device.to_numpy(out).reshape(2, ho, wo, kernel, kernel, 3)
    for n, y, x, i, j, c in np.ndindex(*found.shape):
        assert found[n, y, x, i, j, c] == padded[n, y * stride + i, x * stride + j, c]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 1), (3, 2), (1, 1), (2, 3)])
def test_col2im_adds_what_falls_on_a_pixel(device, rng, kernel, stride):
    ho, wo = (7 - kernel) // stride + 1, (6 - kernel) // stride + 1
    columns = integers(rng, (2, ho, wo, kernel, kernel, 3))
    expected = np.zeros((2, 7, 6, 3))
    for n, y, x, i, j, c in np.ndindex(*columns.shape):
        expected[n, y * stride + i, x * stride + j, c] += columns[n, y, x, i, j, c]
    padded = device.xp.full(expected.shape, np.nan)
    col2im(device.asarray(columns).reshape(2, ho, wo, kernel, kernel * 3), kernel, stride, padded)
    np.testing.assert_array_equal(device.to_numpy(padded), expected)


@pytest.mark.parametrize(("size", "offset", "step"), [((3, 2), 1, 1), ((3, 2), 0, 1), ((2, 3), 2, 1), ((3, 2), 1, 2)])
def test_inner_view_is_a_map_in_a_zero_frame(device, size, offset, step):
    """Whatever was in the padded array before, all but the map itself is zero afterwards."""
    padded = device.xp.full((2, 8, 9, 3), 5.0)
    view = inner_view(padded, size, offset, step)
    assert view.shape == (2, *size, 3)
    view[...] = 1.0
    expected = np.zeros((2, 8, 9, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            expected[:, offset + y * step, offset + x * step] = 1
    np.testing.assert_array_equal(device.to_numpy(padded), expected)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 6), (7, 8)])
def test_max_pool(device, rng, size, p):
    u = integers(rng, (2, *size, 3))
    out, winners = run_max_pool(device, u, p)
    for place in np.ndindex(*out.shape):
        values = window(u, *place, p)
        assert out[place] == max(values)
        assert winners[place] == values.index(max(values))


def test_ties_go_to_the_first_in_row_order(device, rng):
    u = integers(rng, (3, 6, 6, 4), high=2)  # values from -2 to 1: most windows have ties
    out, winners = run_max_pool(device, u, 2)
    ties = 0
    for place in np.ndindex(*out.shape):
        values = window(u, *place, 2)
        ties += values.count(max(values)) > 1
        assert winners[place] == values.index(max(values))
    assert ties > 20
    assert set(run_max_pool(device, np.zeros((1, 4, 4, 1)), 2)[1].ravel()) == {0}


@pytest.mark.parametrize("p", [2, 3])
def test_the_first_unit_within_the_margin_wins(device, rng, p):
    """By definition: equal to the maximum is what is not below it by more than margin * max(|max|, 1)."""
    u, margin = 3 * integers(rng, (2, 6, 6, 3)) + rng.uniform(-1, 1, (2, 6, 6, 3)), 0.3
    out, winners = run_max_pool(device, u, p, margin)
    moved = 0
    for place in np.ndindex(*out.shape):
        values = window(u, *place, p)
        best = max(values)
        assert out[place] == best
        first = next(k for k, value in enumerate(values) if value >= best - margin * max(abs(best), 1))
        assert winners[place] == first
        moved += first != values.index(best)
    assert moved > 5


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_rounding_decides_no_winner(device, rng, precision):
    """Windows of flat areas are equal but for rounding; those of texture are not, and keep their maxima."""
    number, chosen = np.dtype(precision), get_precision(precision)
    flat = np.repeat(np.repeat(rng.uniform(-8, 8, (2, 4, 4, 3)), 2, axis=1), 2, axis=2)
    texture = rng.permutation(np.linspace(-8, 8, flat.size)).reshape(flat.shape)  # 0.08 apart
    for base, expected in ((flat, np.zeros((2, 4, 4, 3))), (texture, run_max_pool(device, texture, 2)[1])):
        for _ in range(3):
            noise = 1 + 4 * np.finfo(number).eps * rng.uniform(-1, 1, base.shape)
            winners = run_max_pool(device, (base * noise).astype(number), 2, chosen.tie_margin)[1]
            np.testing.assert_array_equal(winners, expected)


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("size", [(6, 6), (7, 8)])
def test_gather_and_scatter_at_winners(device, rng, size, p):
    """Gather reads the units at the winners, scatter is its transpose: zero elsewhere, dropped rows included."""
    u = integers(rng, (2, *size, 3))
    shape = pooled_shape(u, p)
    winners = rng.integers(0, p * p, shape).astype(np.uint8)
    s = integers(rng, shape)
    xp = device.xp
    gathered, mask = xp.full(shape, np.nan), xp.empty(shape, bool)
    max_gather(windows(device.asarray(u), p), device.asarray(winners), gathered, mask)
    spread = xp.full(u.shape, np.nan)
    max_scatter(device.asarray(s), device.asarray(winners), windows(spread, p), mask)
    clear_remainder(spread, p)
    expected = np.zeros(u.shape)
    for place in np.ndindex(*shape):
        n, y, x, c = place
        dy, dx = divmod(int(winners[place]), p)
        assert device.to_numpy(gathered)[place] == u[n, y * p + dy, x * p + dx, c]
        expected[n, y * p + dy, x * p + dx, c] = s[place]
    np.testing.assert_array_equal(device.to_numpy(spread), expected)


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("size", [(6, 6), (7, 8)])
def test_average_pool_and_its_adjoint(device, rng, size, p):
    u = integers(rng, (2, *size, 3))
    shape = pooled_shape(u, p)
    s = integers(rng, shape)
    out, spread = device.xp.full(shape, np.nan), device.xp.full(u.shape, np.nan)
    average_pool(windows(device.asarray(u), p), out)
    average_scatter(device.asarray(s), windows(spread, p))
    clear_remainder(spread, p)
    expected = np.zeros(u.shape)
    for n, y, x, c in np.ndindex(*shape):
        assert device.to_numpy(out)[n, y, x, c] == pytest.approx(sum(window(u, n, y, x, c, p)) / p**2, rel=1e-14)
        expected[n, y * p : y * p + p, x * p : x * p + p, c] = s[n, y, x, c] / p**2
    np.testing.assert_allclose(device.to_numpy(spread), expected, rtol=1e-15)


def test_pooling_works_on_strided_views(device, rng):
    """The adjoint of a strided convolution scatters into every second pixel of a larger map."""
    u = integers(rng, (1, 4, 4, 2))
    _, winners = run_max_pool(device, u, 2)
    s = integers(rng, winners.shape)
    large = device.xp.zeros((1, 8, 8, 2))
    view = large[:, 1:8:2, 1:8:2]
    max_scatter(device.asarray(s), device.asarray(winners), windows(view, 2), device.xp.empty(winners.shape, bool))
    expected = np.zeros((1, 8, 8, 2))
    for n, y, x, c in np.ndindex(*winners.shape):
        dy, dx = divmod(int(winners[n, y, x, c]), 2)
        expected[n, 1 + 2 * (2 * y + dy), 1 + 2 * (2 * x + dx), c] = s[n, y, x, c]
    np.testing.assert_array_equal(device.to_numpy(large), expected)


def use_stack(stack):
    """Return the arrays of two phases on top of something that stays."""
    kept = stack.take("kept", (2, 3), "float32")  # 24 bytes, in 256
    top = stack.top
    first = [stack.take("first", (65,), "float32"), stack.take("more", (3,), "uint8")]  # 512 + 256
    stack.release(top)
    turns = stack.take_one_of("turns", [(2,), (40, 2), (0,)], "float64")  # 768 for the largest
    return kept, first, turns


def test_stack_lays_what_comes_next_over_what_is_released(device):
    block = device.xp.zeros(2048, np.uint8)
    stack = Stack(block, 512)
    kept, first, turns = use_stack(stack)
    assert [a.shape for a in (kept, *first, *turns)] == [(2, 3), (65,), (3,), (2,), (40, 2), (0,)]
    assert [a.dtype for a in (kept, *first, *turns)] == ["float32", "float32", "uint8", *["float64"] * 3]
    kept[...] = 1
    for array in first:
        array[...] = 2
    turns[1][...] = 3
    assert set(device.to_numpy(turns[0])) == {3.0}, "they share memory"
    assert set(device.to_numpy(kept).ravel()) == {1.0}, "what stays, stays"
    assert not {2.0} & set(device.to_numpy(first[0])), "what is released is used again"
    assert not device.to_numpy(block)[:512].any(), "what lies below the base is left alone"
    assert (stack.top, stack.peak) == (512 + 256 + 768, 512 + 256 + 768)


def test_stack_without_memory_counts_what_memory_would_take():
    plan = Stack(base=512)
    kept, first, turns = use_stack(plan)
    assert (kept, first, turns) == (None, [None, None], [None] * 3)
    assert plan.peak == 512 + 256 + 768
    assert plan.at_peak == {"kept": 256, "first": 512, "more": 256}, "the first time that it was as high"
    plan.take("top", (1,), "uint8")
    assert plan.at_peak == {"kept": 256, "turns": 768, "top": 256}


def test_arena_hands_out_disjoint_aligned_views(device):
    requests = [((3, 5), "float32"), ((7,), "uint8"), ((2, 2, 2), "float64")]
    # 60, 7 and 64 bytes, each rounded up to 256
    assert Arena.size(requests) == 3 * 256
    arena = Arena(device.xp, Arena.size(requests))
    views = arena.views(requests)
    for value, view, (shape, dtype) in zip((1, 2, 3), views, requests, strict=True):
        assert (view.shape, view.dtype) == (shape, np.dtype(dtype))
        view[...] = value
    for value, view in zip((1, 2, 3), views, strict=True):
        assert set(device.to_numpy(view).ravel()) == {value}
    again = arena.views([((15,), "float32")])[0]  # the next user starts at the beginning: the same memory
    np.testing.assert_array_equal(device.to_numpy(again), 1)


def test_arena_of_an_exact_multiple(device):
    assert Arena.size([((64,), "float32"), ((65,), "float32")]) == 256 + 512
