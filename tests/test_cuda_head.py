"""The operations of heads: `HeadOps` on arrays, and head.cu through the shim, against the formulas in float64.

Both implementations run the same test bodies.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cuda_cpu import ShimLauncher, compiler
from oracle import softmax

from cupyep.activations import get_activation
from cupyep.kernels.cuda_head import SOURCE, CudaHeadOps
from cupyep.kernels.cuda_update import CudaUpdateOps
from cupyep.kernels.head import HeadOps
from cupyep.losses import CrossEntropy, SquaredError

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-6}


@functools.cache
def launcher():
    return ShimLauncher(SOURCE)


@pytest.fixture(params=["arrays", "kernels"])
def ops(request):
    if request.param == "kernels" and compiler() is None:
        pytest.skip("g++ is not installed: kernels cannot run on the CPU")
    return HeadOps() if request.param == "arrays" else CudaHeadOps(launcher())


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
def test_spread_is_added_and_is_the_adjoint_of_the_mean(ops, rng, shape, p, dtype):
    s = rng.standard_normal((3, shape[0] // p, shape[1] // p, shape[2])).astype(dtype)
    force = np.full((3, *shape), 7, dtype)
    expected = np.full((3, *shape), 7.0)
    for y in range(shape[0] // p * p):
        for x in range(shape[1] // p * p):
            expected[:, y, x] += s[:, y // p, x // p].astype(float) / p**2
    ops.add_spread(s, p, force)
    np.testing.assert_allclose(force, expected, rtol=TOLERANCE[dtype])


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
def test_launches(rng):
    """One launch an operation, in packs of 16 bytes where the channels divide."""
    ops = CudaHeadOps(launcher())
    del launcher().launched[:]
    s, z = np.zeros((2, 4, 4, 8), np.float32), np.zeros((2, 10), np.float32)
    ops.pool(s, 2, np.zeros((2, 2, 2, 8), np.float32))
    ops.add_spread(np.zeros((2, 2, 2, 3), np.float32), 2, np.zeros((2, 4, 4, 3), np.float32))
    ops.scaled_error(CrossEntropy(), z, None, z.copy(), z[:, 0].copy(), None)
    assert launcher().launched == ["window_means<float, float, 4>", "add_spread<float, 1>", "scaled_error<float, 0>"]


def test_arrays_that_a_kernel_would_misread_are_refused():
    """NumPy and CuPy cast on the way; a kernel does not."""
    ops, z = CudaHeadOps(None), np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="for float32 cannot read an array of float64"):
        ops.scaled_error(CrossEntropy(), z, None, np.zeros((2, 3)), z[:, 0].copy(), None)
    with pytest.raises(TypeError, match="for float32 cannot read an array of float64"):
        ops.add_spread(np.zeros((1, 1, 1, 1), np.float32), 1, np.zeros((1, 1, 1, 1)))
    updates = CudaUpdateOps(np, get_activation("relu"), None)
    s = np.zeros((2, 4), np.float32)
    for position in range(3):
        given = [s, s, s]
        given[position] = s.astype(np.float64)
        with pytest.raises(TypeError, match="a kernel for float[0-9]+ cannot read an array of float"):
            updates.states(s, *given[:2], 1.0, given[2], None, None, None)
