"""The operations of heads: `HeadOps` on arrays, and head.cu through the shim, against the formulas in float64.

Both implementations run the same test bodies.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cpu import compiler, launcher_of, twins
from oracle import softmax

from cupyep.activations import get_activation
from cupyep.losses import CrossEntropy, SquaredError
from cupyep.ops import update
from cupyep.ops.head import SOURCE, CudaHeadOps, HeadOps

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-6}


ops = twins(SOURCE, HeadOps, lambda launcher: CudaHeadOps(launcher, launcher_of(update.SOURCE)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [1, 10, 32, 100])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("loss", [CrossEntropy(1.0), CrossEntropy(3.0), SquaredError()], ids=["ce", "soft", "square"])
def test_scaled_error(ops, rng, loss, has_bias, classes, dtype):
    """Large outputs do not overflow, and every row goes by its own scale."""
    samples = 5
    z = (20 * rng.standard_normal((samples, classes))).astype(dtype)
    z[1] += 500
    target = softmax(rng.standard_normal((samples, classes))).astype(dtype)
    bias = rng.standard_normal(classes).astype(dtype)
    scale = np.array([0.5, -2.0, 0.0, 1.0, 0.25], dtype)
    at = z.astype(float) + (bias if has_bias else 0.0)
    if loss.name == "cross_entropy":
        gradient = loss.temperature * (softmax(at / loss.temperature) - target)
    else:
        gradient = at - target
    ops.scaled_error(loss, z, bias if has_bias else None, target, scale, np.full((samples, 1), np.nan, dtype))
    # A logit of 500 is rounded to 5e-5 in float32, and its exponential by as much.
    atol = 1e-12 if dtype == "float64" else 4e-4
    np.testing.assert_allclose(z, scale[:, None].astype(float) * gradient, rtol=TOLERANCE[dtype], atol=atol)
    assert not z[2].any()


@pytest.mark.parametrize("down", [1.0, 1 / 64])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("loss", [CrossEntropy(3.0), SquaredError()], ids=["soft", "square"])
def test_error_is_rounded_to_a_factor(ops, rng, loss, stored, down):
    """What the product with the map takes: the error in float32, rounded once; of a map that is multiplied by 64."""
    stored = np.dtype(stored) if stored == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    z, target = rng.standard_normal((2, 5, 10)).astype(np.float32)
    bias, scale = rng.standard_normal(10).astype(np.float32), np.array([0.5, -600, 0, 1, 0.25], np.float32)
    at = z.astype(float) + bias
    z /= np.float32(down)
    expected = at - target
    if loss.name == "cross_entropy":
        expected = 3.0 * (softmax(at / 3.0) - target)
    error = np.full((5, 10), np.nan, stored)
    ops.scaled_error(loss, z, bias, target, scale, np.empty((5, 1), np.float32), error, down)
    spacing = 2.0**-11 if stored == np.float16 else 2.0**-8
    expected = down * scale[:, None] * expected
    np.testing.assert_allclose(error.astype(float), expected, rtol=1.01 * spacing, atol=1e-5)


def test_outputs_that_diverged_stay_visible(ops):
    z = np.array([[1.0, np.nan, 2.0], [0.0, 1.0, 2.0]])
    target = np.array([[0.0, 0, 1], [0, 0, 1]])
    ops.scaled_error(CrossEntropy(), z, None, target, np.ones(2), np.empty((2, 1)))
    assert np.isnan(z[0]).any()
    assert np.isfinite(z[1]).all()


SHAPES = [((6, 6, 8), 2), ((7, 5, 3), 2), ((9, 10, 4), 3), ((4, 4, 1), 4), ((3, 3, 8), 1)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(("shape", "p"), SHAPES)
def test_pooled_state(ops, rng, shape, p, dtype):
    """Windows that the map does not fill are left out. A state in halves is averaged in float32."""
    if dtype == "float16" and isinstance(ops, HeadOps) and not isinstance(ops, CudaHeadOps):
        pytest.skip("states in halves exist on a GPU alone")
    s = rng.uniform(0, 1, (3, *shape)).astype(dtype)
    height, width = shape[0] // p, shape[1] // p
    out = np.full((3, height, width, shape[2]), np.nan, "float64" if dtype == "float64" else "float32")
    ops.pool(s, p, out)
    windows = s[:, : height * p, : width * p].astype(float).reshape(3, height, p, width, p, shape[2])
    np.testing.assert_allclose(out, windows.mean(axis=(2, 4)), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "p"), SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_spread_is_the_adjoint_of_the_mean(ops, rng, add, shape, p, dtype):
    """Added to what is there, or written over it, zero where no window reaches."""
    s = rng.standard_normal((3, shape[0] // p, shape[1] // p, shape[2])).astype(dtype)
    force = np.full((3, *shape), 7 if add else np.nan, dtype)
    expected = np.full((3, *shape), 7.0 if add else 0.0)
    for y in range(shape[0] // p * p):
        for x in range(shape[1] // p * p):
            expected[:, y, x] += s[:, y // p, x // p].astype(float) / p**2
    ops.spread(s, p, force, add)
    np.testing.assert_allclose(force, expected, rtol=TOLERANCE[dtype])


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
def test_launches(rng):
    """One launch an operation, in packs of 16 bytes where the channels divide."""
    own, updates = launcher_of(SOURCE), launcher_of(update.SOURCE)
    ops = CudaHeadOps(own, updates)
    del own.launched[:], updates.launched[:]
    s, z = np.zeros((2, 4, 4, 8), np.float32), np.zeros((2, 10), np.float32)
    ops.pool(s, 2, np.zeros((2, 2, 2, 8), np.float32))
    ops.spread(np.zeros((2, 2, 2, 3), np.float32), 2, np.zeros((2, 4, 4, 3), np.float32), True)
    ops.spread(np.zeros((2, 2, 2, 4), np.float32), 2, np.zeros((2, 4, 4, 4), np.float32), False)
    ops.scaled_error(CrossEntropy(), z, None, z.copy(), z[:, 0].copy(), None)
    spreads = ["spread<float, true, 1>", "spread<float, false, 4>"]
    assert own.launched == [*spreads, "scaled_error<float, float, 0>"]
    assert updates.launched == ["see<float, float, 4, 3>"]


def test_arrays_that_a_kernel_would_misread_are_refused():
    """NumPy and CuPy cast on the way; a kernel does not."""
    ops, z = CudaHeadOps(None, None), np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="for float32 cannot read an array of float64"):
        ops.scaled_error(CrossEntropy(), z, None, np.zeros((2, 3)), z[:, 0].copy(), None)
    with pytest.raises(TypeError, match="for float32 cannot read an array of float64"):
        ops.spread(np.zeros((1, 1, 1, 1), np.float32), 1, np.zeros((1, 1, 1, 1)), True)
    updates = update.CudaUpdateOps(np, get_activation("relu"), None)
    s = np.zeros((2, 4), np.float32)
    for position in range(3):
        given = [s, s, s]
        given[position] = s.astype(np.float64)
        with pytest.raises(TypeError, match="a kernel for float[0-9]+ cannot read an array of float"):
            updates.states(s, *given[:2], 1.0, given[2], None, None, None)
