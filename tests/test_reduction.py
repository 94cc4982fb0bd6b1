"""Reductions over all axes but the channels: `ReductionOps` on arrays, and reduction.cu through the shim.

Both implementations run the same test bodies. Oracle: loops over the channels, in float64 and in exact counts.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cpu import compiler, launcher_of

import cupyep as ep
from cupyep.backend.precision import get_precision
from cupyep.ops import reduction
from cupyep.ops.reduction import SCRATCH_BYTES, SOURCE, CudaReductionOps, ReductionOps

SHAPES = [
    (1, 1),  # one unit
    (2, 10),  # a dense layer's, fewer rows than a slab
    (130, 7),  # no packs; two slabs of unequal length
    (5, 9, 7, 16),  # packs, a warp not filled
    (3, 40, 40, 8),  # one pack: every thread of a block has rows of its own
    (2, 20, 20, 264),  # more than one block over the channels, the last not filled
]
MANY = (17000, 3)  # as many slabs as there are blocks for
PRECISIONS = ["float32", "float64", "float16", "bfloat16"]
CASES = [(shape, precision) for shape in SHAPES for precision in PRECISIONS] + [(MANY, "float32")]


@pytest.fixture(params=["arrays", "kernels"])
def ops(request):
    if request.param == "arrays":
        return ReductionOps()
    if compiler() is None:
        pytest.skip("g++ is not installed: kernels cannot run on the CPU")
    return CudaReductionOps(launcher_of(SOURCE), np.full(SCRATCH_BYTES, 255, np.uint8))  # NaN, whatever the type


def case(rng, shape, precision):
    """Return a state with channels at rest, some units at and beyond 1, and the type to compute in."""
    try:
        chosen = get_precision(precision)
    except ep.errors.ConfigurationError as error:
        pytest.skip(str(error))
    s = rng.uniform(-1.3, 1.3, shape)
    s[np.abs(s) > 1.2] = 1.0
    s[..., ::3] *= 1e-4
    return s.astype(chosen.stored), chosen.number


@pytest.mark.parametrize(("shape", "precision"), CASES)
def test_sums_of_channels(ops, rng, shape, precision):
    """They are added to what is there; halves are summed in float32."""
    s, number = case(rng, shape, precision)
    out = np.arange(shape[-1], dtype=number)
    ops.add_sum(s, out)
    rows = s.reshape(-1, shape[-1]).astype(np.float64)
    tolerance = (1e-14 if number == np.float64 else 3e-7) * np.sqrt(len(rows)) * (1 + np.abs(rows).max())
    expected = [channel + sum(rows[:, channel]) for channel in range(shape[-1])]
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "precision"), CASES)
def test_levels(ops, rng, shape, precision):
    """The mean size, the share of saturated units, the share of channels at rest."""
    s, number = case(rng, shape, precision)
    out = np.full(3, np.nan, number)
    ops.levels(s, 0.99, 1e-3, out, np.empty(shape, number))
    size = np.abs(s.reshape(-1, shape[-1]).astype(np.float64))
    dead = sum(bool(np.all(size[:, channel] <= 1e-3)) for channel in range(shape[-1]))
    assert (size >= 0.99).sum() > 0 or len(size) < 10
    np.testing.assert_allclose(out[0], size.sum() / size.size, rtol=1e-12 if number == np.float64 else 2e-6)
    np.testing.assert_allclose(out[1:], [(size >= 0.99).mean(), dead / shape[-1]], rtol=1e-6)


@pytest.mark.parametrize("at", [0, 99, -1])
def test_what_diverged_stays_visible(ops, rng, at):
    """A channel with a NaN is not at rest, and mean and sum are NaN."""
    s = np.zeros((200, 8), np.float32)
    s[at, 2] = np.nan
    out, sums = np.zeros(3, np.float32), np.zeros(8, np.float32)
    ops.levels(s, 0.99, 1e-3, out, np.empty_like(s))
    ops.add_sum(s, sums)
    assert np.isnan(out[0])
    np.testing.assert_allclose(out[1:], [0.0, 7 / 8])
    assert np.isnan(sums).tolist() == [False, False, True] + [False] * 5


def test_more_channels_than_scratch(ops):
    """Levels of so many are left to plain array code: no kernel writes beyond the scratch."""
    s = np.ones((1, 67585), np.float32)
    out = np.zeros(3, np.float32)
    ops.levels(s, 0.99, 1e-3, out, np.empty_like(s))
    np.testing.assert_allclose(out, [1, 1, 0])


def test_blocks_fill_a_card():
    """Large states are cut into about two blocks a multiprocessor of an H100; small ones into few."""
    for rows, channels, vec in ((131072, 128, 4), (32768, 256, 8), (8192, 512, 8), (2048, 512, 4)):
        slabs, columns, *_ = reduction._plan(rows, channels, vec, reduction.BLOCKS)
        assert slabs * columns <= reduction.BLOCKS
        assert slabs * columns >= min(reduction.BLOCKS // 2, rows // reduction.ROWS_OF_A_SLAB)
        assert 3 * slabs * channels * 4 <= SCRATCH_BYTES
    assert reduction._plan(128, 512, 4, reduction.BLOCKS)[0] <= 2


def test_bias_gradients_and_figures_go_through_the_kernels(fake_gpu, rng):
    """No reduction over rows is left to CuPy in a step: one sum an edge, one of levels a layer."""
    edges = [ep.Conv2d((6, 6, 3), 8, pooling="max"), ep.Linear((3, 3, 8), 5)]
    net = ep.Network(edges, classes=4, device=fake_gpu, feedback=1.0)
    learner = ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2, schedule="synchronous")
    learner.step(rng.standard_normal((5, 6, 6, 3)), rng.integers(0, 4, 5))
    launched = fake_gpu.launcher(SOURCE).launched
    assert sum(name.startswith("column_levels") for name in launched) == 2
    assert sum(name.startswith("level_shares") for name in launched) == 2
    assert sum(name.startswith("column_sums") for name in launched) == 3, "two biases, the padded gradient of edge 1"


@pytest.mark.parametrize("number", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [(16,), (16, 48, 70000, 16), (33000, 0, 4096)])
def test_norms_of_segments(ops, rng, lengths, number):
    """Segments from one pack to more than all blocks take at once, and an empty one."""
    lengths = [-(-length // 16) * 16 for length in lengths]
    bounds = np.cumsum([0, *lengths])
    packed, out = rng.standard_normal(bounds[-1]).astype(number), np.full(len(lengths), np.nan, number)
    ops.norms(packed, bounds.tolist(), bounds.astype(np.int64), out)
    segments = np.split(packed.astype(float), bounds[1:-1])
    np.testing.assert_allclose(
        out, [np.sqrt((s**2).sum()) for s in segments], rtol=1e-5 if number == "float32" else 1e-12
    )


def test_a_norm_that_diverged_stays_visible(ops):
    packed, bounds = np.zeros(64, np.float32), [0, 16, 64]
    packed[20] = np.nan
    out = np.zeros(2, np.float32)
    ops.norms(packed, bounds, np.array(bounds), out)
    assert np.isnan(out).tolist() == [False, True]
