"""The step of an optimizer for one parameter: `OptimizerOps` on arrays, and optimizer.cu through the shim.

Both implementations run the same test bodies. Oracle: the recurrences of the docstrings of SGD and Adam, in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cpu import launcher_of, twins

import cupyep as ep
from cupyep.backend.device import launcher_for
from cupyep.ops.optimizer import SOURCE, CudaOptimizerOps, OptimizerOps

SHAPES = [(3, 3, 8, 16), (7,), (1,), (1030,)]  # packs, single numbers, and more than a block of either
STEPS = 4


ops = twins(SOURCE, OptimizerOps, CudaOptimizerOps)


def case(rng, shape, dtype):
    start = rng.standard_normal(shape).astype(dtype)
    return start, [rng.standard_normal(shape).astype(dtype) for _ in range(STEPS)]


def check(found, expected, dtype):
    rtol = 1e-13 if dtype == "float64" else 3e-6
    for array, wanted in zip(found, expected, strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(array, wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.7, True)])
def test_sgd(ops, rng, shape, dtype, momentum, nesterov):
    start, gradients = case(rng, shape, dtype)
    how = {"rate": 0.07, "momentum": momentum, "nesterov": nesterov, "decay": 0.2}
    p, v = start.copy(), np.zeros_like(start) if momentum else None
    kept = [g.copy() for g in gradients]
    for g in gradients:
        ops.sgd(p, g, v, np.full_like(p, np.nan), **how)
    q, w = start.astype(float), np.zeros(shape)
    for g in kept:
        total = g + 0.2 * q
        w = momentum * w + total
        q = q - 0.07 * (total + momentum * w if nesterov else w)
    check([p, *([] if v is None else [v])], [q, *([] if v is None else [w])], dtype)
    assert all(np.array_equal(g, k) for g, k in zip(gradients, kept, strict=True)), "gradients are not modified"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("decay", "shrink"), [(0.1, 1.0), (0.0, 0.97), (0.1, 0.97)])
def test_adam(ops, rng, shape, dtype, decay, shrink):
    start, gradients = case(rng, shape, dtype)
    p, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    q, a, b = start.astype(float), np.zeros(shape), np.zeros(shape)
    for t, g in enumerate(gradients, 1):
        how = {
            "betas": (0.8, 0.999),
            "correction": 1 / (1 - 0.999**t),
            "epsilon": 1e-3,
            "decay": decay,
            "shrink": shrink,
        }
        ops.adam(p, g, m, v, np.full_like(p, np.nan), rate=0.05 / (1 - 0.8**t), **how)
        total = g + decay * q
        a = 0.8 * a + 0.2 * total
        b = 0.999 * b + 0.001 * total**2
        q = shrink * q - 0.05 * (a / (1 - 0.8**t)) / (np.sqrt(b / (1 - 0.999**t)) + 1e-3)
    check([p, m, v], [q, a, b], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_average(ops, rng, shape, dtype):
    average, parameters = case(rng, shape, dtype)
    wanted = average.astype(float)
    for p in parameters:
        kept = p.copy()
        ops.average(average, p, np.full_like(p, np.nan), share=0.3)
        wanted = 0.7 * wanted + 0.3 * p
        np.testing.assert_array_equal(p, kept)
    check([average], [wanted], dtype)


def test_what_diverged_stays_visible(ops):
    p, g = np.ones(8, np.float32), np.array([np.nan, np.inf] + [1.0] * 6, np.float32)
    m, v, scratch = np.zeros_like(p), np.zeros_like(p), np.empty_like(p)
    with np.errstate(invalid="ignore"):
        ops.adam(p, g, m, v, scratch, rate=0.1, betas=(0.9, 0.999), correction=1e3, epsilon=1e-8, decay=0.0, shrink=1.0)
    assert np.isnan(p[:2]).all()
    assert np.isfinite(p[2:]).all()


def make(name, parameters):
    if name == "adam":
        return ep.Adam(parameters, 0.05, weight_decay=0.1)
    return ep.SGD(parameters, 0.05, momentum=0.9 if name == "momentum" else 0.0, weight_decay=0.1)


@pytest.mark.parametrize("name", ["adam", "momentum", "sgd"])
def test_an_optimizer_on_a_gpu_takes_one_launch_a_parameter(fake_gpu, rng, name):
    shapes = {"a": (3, 3, 4, 8), "b": (8,), "c": (3,), "empty": (0, 3)}
    start = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    host = make(name, {path: p.copy() for path, p in start.items()})
    there = make(name, {path: fake_gpu.asarray(p) for path, p in start.items()})
    launched = fake_gpu.launcher(SOURCE).launched
    for _ in range(STEPS):
        gradients = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        host.step(gradients, factor=0.5)
        before = len(launched)
        there.step({path: fake_gpu.asarray(g) for path, g in gradients.items()}, factor=0.5)
        assert len(launched) == before + 3
    assert there._scratch == {}
    for path, p in host.parameters.items():
        np.testing.assert_allclose(fake_gpu.to_numpy(there.parameters[path]), p, rtol=1e-5, atol=1e-6)
        assert np.abs(p - start[path]).max(initial=0.0 if p.size else 1.0) > 0.01


def test_what_kernels_cannot_read_is_updated_all_the_same(fake_gpu, rng):
    """Parameters that are views with gaps."""
    start = rng.standard_normal((4, 6)).astype(np.float32)
    gradient = rng.standard_normal((6, 4)).astype(np.float32)
    host, there = (make("adam", {"a": array.T}) for array in (start.copy(), fake_gpu.asarray(start)))
    host.step({"a": gradient})
    there.step({"a": fake_gpu.asarray(gradient)})
    np.testing.assert_array_equal(fake_gpu.to_numpy(there.parameters["a"]), host.parameters["a"])


def test_kernels_are_for_arrays_on_a_gpu(fake_gpu):
    assert launcher_for(np.zeros(1), SOURCE) is None
    assert launcher_for(fake_gpu.asarray(np.zeros(1)), SOURCE) is fake_gpu.launcher(SOURCE)
    with pytest.raises(TypeError, match="a kernel for float32 cannot read an array of float64"):
        CudaOptimizerOps(launcher_of(SOURCE)).sgd(
            np.zeros(4, np.float32), np.zeros(4), None, None, rate=0.1, momentum=0.0, nesterov=False, decay=0.0
        )
