"""The fused update: `UpdateOps` on arrays, and update.cu through the shim, against the formulas in float64.

Both implementations run the same test bodies. Arithmetic is float32 (float64 for float64); states and drives may be
stored in halves.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_cpu import compiler, launcher_of
from oracle import SIGMA
from small import batch_of, network

import cupyep as ep
from cupyep.activations import ACTIVATIONS
from cupyep.errors import ConfigurationError
from cupyep.ops.launch import arithmetic
from cupyep.ops.update import SOURCE, CudaUpdateOps, UpdateOps

CODES = {
    "hard_sigmoid": ("clip", (1.0, 0.0, 1.0)),
    "half_hard_sigmoid": ("clip", (0.5, 0.0, 1.0)),
    "relu6": ("clip", (1.0, 0.0, 6.0)),
    "relu": ("clip", (1.0, 0.0, np.inf)),
    "sigmoid": ("tanh", (0.5, 0.5, 2.0)),
    "tanh": ("tanh", (0.0, 1.0, 1.0)),
}
# storage of states, storage of drive and top-down input
TYPES = [("float32", "float32"), ("float64", "float64"), ("float16", "float32"), ("bfloat16", "float32"),
         ("float16", "float16"), ("bfloat16", "bfloat16")]  # fmt: skip
SHAPES = {"wide": (5, 7, 16), "odd": (3, 5, 3), "one": (1,), "blocks": (6, 10, 40)}
SAMPLES = 3

types_and_shapes = pytest.mark.parametrize(("types", "shape"), list(itertools.product(TYPES, SHAPES.values())))
activations = pytest.mark.parametrize("name", CODES)


@pytest.fixture(params=["arrays", "kernels"])
def make_ops(request):
    """Return a function from the name of an activation to its updates."""
    if request.param == "kernels" and compiler() is None:
        pytest.skip("g++ is not installed: kernels cannot run on the CPU")

    def make(name):
        activation = copy.copy(ACTIVATIONS[name])
        activation.code = CODES[name]
        return (
            UpdateOps(np, activation)
            if request.param == "arrays"
            else CudaUpdateOps(np, activation, launcher_of(SOURCE))
        )

    return make


def dtype_of(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def rounding(dtype):
    return {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype.name]


def scratch_for(ops, s, number):
    size = int(np.prod(s.shape[1:]))
    return np.full(ops.scratch_size(len(s), size), np.nan, number)


def inputs(rng, types, shape, samples=SAMPLES):
    """Return state, drive, top-down input, force, and the type to compute in."""
    stored, given = map(dtype_of, types)
    number = arithmetic(stored)
    s, drive, topdown, force = rng.normal(0.4, 1.0, (4, samples, *shape))
    return s.astype(stored), drive.astype(given), topdown.astype(given), force.astype(number), number


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@activations
@types_and_shapes
def test_states(make_ops, rng, name, types, shape):
    ops = make_ops(name)
    s, drive, topdown, force, number = inputs(rng, types, shape)
    d, t, f = wide(drive, topdown, force)
    g = np.full(s.shape, np.nan, number)
    ops.states(s, drive, topdown, 0.3, force, g, None, scratch_for(ops, s, number))
    expected = d + 0.3 * t + f
    np.testing.assert_allclose(g, expected, rtol=rounding(number), atol=rounding(number))
    tolerance = rounding(s.dtype)
    np.testing.assert_allclose(s.astype(float), SIGMA[name](expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("has_topdown", "has_force"), [(False, False), (False, True), (True, False)])
def test_absent_parts_of_the_drive(make_ops, rng, has_topdown, has_force):
    """The last layer has no input from above, most layers no force; the drive need not be kept."""
    ops = make_ops("sigmoid")
    s, drive, topdown, force, number = inputs(rng, ("float64", "float64"), (4, 4, 6))
    ops.states(
        s,
        drive,
        topdown if has_topdown else None,
        0.3,
        force if has_force else None,
        None,
        None,
        scratch_for(ops, s, number),
    )
    expected = drive + 0.3 * topdown * has_topdown + force * has_force
    np.testing.assert_allclose(s, SIGMA["sigmoid"](expected), rtol=1e-13, atol=1e-15)


@types_and_shapes
def test_residual_is_added_and_is_that_of_the_stored_values(make_ops, rng, types, shape):
    ops = make_ops("tanh")
    s, drive, topdown, force, number = inputs(rng, types, shape)
    before = s.astype(float)
    residual = np.arange(1, SAMPLES + 1).astype(number)
    ops.states(s, drive, topdown, 0.3, force, None, residual, scratch_for(ops, s, number))
    change = ((s.astype(float) - before) ** 2).reshape(SAMPLES, -1).mean(axis=1)
    assert change.max() > 0.05
    np.testing.assert_allclose(residual, np.arange(1, SAMPLES + 1) + change, rtol=1e-5)
    residual[...] = 0
    ops.states(s, drive, topdown, 0.3, force, None, residual, scratch_for(ops, s, number))
    assert residual.tolist() == [0] * SAMPLES, "the same update again changes nothing, in halves neither"


def rest_point(rng, name, shape, number):
    """Return a rest drive g.

    Clips rest inside and outside of their range; far out in a tanh the formula itself, like 1 - tanh^2, is inexact.
    """
    return rng.normal(0.5, 1.5 if CODES[name][0] == "clip" else 0.3, shape).astype(number)


@activations
@types_and_shapes
@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_deviations(make_ops, rng, name, types, shape, weight):
    """Two phases from one rest point; units clipped at rest among them."""
    ops = make_ops(name)
    eps, drive, topdown, force, number = inputs(rng, types, shape, 2 * SAMPLES)
    g = rest_point(rng, name, (SAMPLES, *shape), number)
    d, t, f = wide(drive, topdown, force)
    residual = np.zeros(2 * SAMPLES, number)
    before = eps.astype(float)
    ops.deviations(eps, drive, topdown, 0.3, force, weight, g, residual, scratch_for(ops, eps, number))
    at_rest = np.concatenate([wide(g)[0]] * 2)
    expected = weight * (SIGMA[name](at_rest + (0.3 * d + t + f) / weight) - SIGMA[name](at_rest))
    # The reference is a difference of two values up to 8; its own rest point is not rounded.
    np.testing.assert_allclose(
        eps.astype(float), expected, rtol=4 * rounding(eps.dtype), atol=8 * weight * rounding(number)
    )
    change = ((eps.astype(float) - before) ** 2).reshape(2 * SAMPLES, -1).mean(axis=1)
    np.testing.assert_allclose(residual, change, rtol=1e-5)


@activations
def test_deviations_keep_responses_far_below_the_precision_of_the_state(make_ops, rng, name):
    """In float32, weights and drives of 1e-12: eps is sigma'(g) t to float32 accuracy, zero where clipped."""
    ops = make_ops(name)
    g = rest_point(rng, name, (SAMPLES, 4, 4, 8), np.float32)
    t = (1e-12 * rng.standard_normal(g.shape)).astype(np.float32)
    eps = np.zeros_like(t)
    ops.deviations(eps, None, t, 1.0, None, 1.0, g, None, scratch_for(ops, eps, np.float32))
    kind, (a, b, c) = CODES[name]
    at = g.astype(float)
    slope = a * ((a * at > b) & (a * at < c)) if kind == "clip" else b * c / np.cosh(c * (at - a)) ** 2
    np.testing.assert_allclose(eps, slope * t.astype(float), rtol=2e-5)
    assert np.count_nonzero(eps) > 50


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_smooth_increments_keep_their_digits(make_ops, name, dtype):
    """Saturated or not, tiny or all the way back: sinh(b) / (cosh(a) cosh(a + b)) in long numbers."""
    rest, changes = np.linspace(-12, 12, 25), np.concatenate([s * np.logspace(-12, 1.5, 24) for s in (1, -1)])
    g, dg = (a.reshape(1, -1).astype(dtype) for a in np.meshgrid([*rest, 40], changes))
    eps, ops = np.zeros_like(g), make_ops(name)
    ops.deviations(eps, dg, None, 1.0, None, 1.0, g, None, scratch_for(ops, eps, dtype))
    center, height, rate = (0.5, 0.5, 2) if name == "sigmoid" else (0, 1, 1)
    long = np.longdouble
    a, b = rate * (g.astype(long) - center), rate * dg.astype(long)
    size = 2 * height * -np.expm1(-2 * abs(b)) * np.exp(abs(b) - abs(a) - abs(a + b))
    expected = np.sign(b) * size / ((1 + np.exp(-2 * abs(a))) * (1 + np.exp(-2 * abs(a + b))))
    tolerance = 8 * np.finfo(dtype).eps * (4 + abs(a) + abs(b))
    assert (abs(eps - expected) <= tolerance * abs(expected) + 1e3 * np.finfo(dtype).tiny).all()


@types_and_shapes
def test_tangents(make_ops, rng, types, shape):
    ops = make_ops("tanh")
    eps, drive, topdown, force, number = inputs(rng, types, shape, 2 * SAMPLES)
    slope = rng.uniform(0, 1, (SAMPLES, *shape)).astype(number)
    before = eps.astype(float)
    residual = np.ones(2 * SAMPLES, number)
    ops.tangents(eps, drive, topdown, 0.3, force, slope, residual, scratch_for(ops, eps, number))
    d, t, f, derivative = wide(drive, topdown, force, slope)
    tolerance = rounding(eps.dtype)
    expected = np.concatenate([derivative] * 2) * (0.3 * d + t + f)
    np.testing.assert_allclose(eps.astype(float), expected, rtol=tolerance, atol=tolerance)
    change = ((eps.astype(float) - before) ** 2).reshape(2 * SAMPLES, -1).mean(axis=1)
    np.testing.assert_allclose(residual, 1 + change, rtol=1e-5)


@pytest.mark.parametrize("topdown", [False, True])
def test_first_and_last_layer_of_deviations(make_ops, rng, topdown):
    """The first layer has no deviation below it, the last none above."""
    ops = make_ops("relu")
    eps, drive, above, _, number = inputs(rng, ("float64", "float64"), (4, 4, 6))
    slope = np.ones_like(eps)
    parts = (None, above) if topdown else (drive, None)
    ops.tangents(eps, *parts, 0.3, None, slope, None, scratch_for(ops, eps, number))
    np.testing.assert_allclose(eps, above if topdown else 0.3 * drive, rtol=1e-14)


@types_and_shapes
@pytest.mark.parametrize("relaxation", [0.5, 1.6])
@pytest.mark.parametrize("form", ["states", "deviations", "tangents"])
def test_relaxation(make_ops, rng, types, shape, relaxation, form):
    """``s + omega (new - s)``, and the residual is that of the stored values."""
    ops = make_ops("sigmoid")
    s, drive, topdown, force, number = inputs(rng, types, shape)
    rest = rng.uniform(0.2, 0.8, s.shape).astype(number)
    before, (d, t, f, r) = s.astype(float), wide(drive, topdown, force, rest)
    residual = np.zeros(SAMPLES, number)
    last = (residual, scratch_for(ops, s, number), relaxation)
    if form == "states":
        new = SIGMA["sigmoid"](d + 0.3 * t + f)
        g = np.full(s.shape, np.nan, number)
        ops.states(s, drive, topdown, 0.3, force, g, *last)
        np.testing.assert_allclose(g, d + 0.3 * t + f, rtol=rounding(number), atol=rounding(number))
    elif form == "deviations":
        new = SIGMA["sigmoid"](r + 0.3 * d + t + f) - SIGMA["sigmoid"](r)
        ops.deviations(s, drive, topdown, 0.3, force, 1.0, rest, *last)
    else:
        new = r * (0.3 * d + t + f)
        ops.tangents(s, drive, topdown, 0.3, force, rest, *last)
    tolerance = 2 * rounding(s.dtype)
    np.testing.assert_allclose(s.astype(float), before + relaxation * (new - before), rtol=tolerance, atol=tolerance)
    change = ((s.astype(float) - before) ** 2).reshape(SAMPLES, -1).mean(axis=1)
    np.testing.assert_allclose(residual, change, rtol=1e-5)
    s[...] = before
    unmeasured = (None, last[1], relaxation)
    if form == "states":
        ops.states(s, drive, topdown, 0.3, force, g, *unmeasured)
        expected = before + relaxation * (new - before)
        np.testing.assert_allclose(s.astype(float), expected, rtol=tolerance, atol=tolerance)


def test_nan_passes_a_clip(make_ops):
    """A network that diverged must be seen to have diverged."""
    ops = make_ops("hard_sigmoid")
    s, drive = np.zeros((1, 8), np.float32), np.full((1, 8), np.nan, np.float32)
    ops.states(s, drive, None, 1.0, None, None, None, scratch_for(ops, s, np.float32))
    assert np.isnan(s).all()
    eps, zero = np.zeros_like(s), np.zeros_like(s)
    ops.deviations(eps, drive, None, 1.0, None, 1.0, zero, None, scratch_for(ops, s, np.float32))
    assert np.isnan(eps).all()


def test_updates_repeat_bit_for_bit(make_ops, rng):
    ops = make_ops("sigmoid")
    s, drive, topdown, force, number = inputs(rng, ("float32", "float32"), SHAPES["blocks"])
    found = []
    for _ in range(2):
        state, residual = s.copy(), np.zeros(SAMPLES, np.float32)
        ops.states(state, drive, topdown, 0.7, force, None, residual, scratch_for(ops, s, number))
        found.append((state.tobytes(), residual.tobytes()))
    assert found[0] == found[1]


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
def test_launches(rng):
    """One launch an update, two where it is measured; packs of 16 bytes where the size divides; too large a batch."""
    activation = copy.copy(ACTIVATIONS["relu"])
    activation.code = CODES["relu"]
    ops = CudaUpdateOps(np, activation, launcher_of(SOURCE))
    for shape, types, width in [((4, 4, 3), ("float32", "float32"), 4), ((5,), ("float32", "float32"), 1),
                                ((4, 6), ("float16", "float32"), 8)]:  # fmt: skip
        s, drive, topdown, _, number = inputs(rng, types, shape)
        del launcher_of(SOURCE).launched[:]
        for residual in (None, np.zeros(SAMPLES, number)):
            ops.states(s, drive, topdown, 1.0, None, None, residual, scratch_for(ops, s, number))
        names = launcher_of(SOURCE).launched
        assert [name.partition("<")[0] for name in names] == ["update_states", "update_states", "add_partials"]
        assert f", {width}, 0, false>" in names[0]
        assert f", {width}, 0, true>" in names[1]
    many = np.zeros((65536, 1), np.float32)
    with pytest.raises(ConfigurationError, match="not 65536"):
        ops.states(many, many, None, 1.0, None, None, None, many[:, 0])


@pytest.mark.parametrize("number", ["float32", "float64"])
@pytest.mark.parametrize("parts", [1, 3, 32, 33, 64, 301])
def test_every_partial_is_added_once_by_a_warp_a_sample(rng, parts, number):
    """Integers: exact in any order. What follows the partials is no number."""
    partials = rng.integers(0, 50, (7, parts)).astype(number)
    memory = np.concatenate([partials.ravel(), np.full(64, np.nan, number)])
    residual = np.arange(7).astype(number)
    sizes = np.int32(parts), memory.dtype.type(16)
    number_type = {"float32": "float", "float64": "double"}[number]
    arguments = (memory, residual, *sizes)
    launcher_of(SOURCE).launch("add_partials", [number_type], (7, 1, 1), (32, 1, 1), arguments)
    expected = [n + sum(map(int, row)) / 16 for n, row in enumerate(partials)]
    np.testing.assert_array_equal(residual, expected)


def test_residuals_take_a_warp_a_sample(rng, monkeypatch):
    """One thread a sample would be four warps for a batch of 128, each lane reading a line of its own."""
    activation = copy.copy(ACTIVATIONS["relu"])
    activation.code = CODES["relu"]
    ops, launches = CudaUpdateOps(np, activation, launcher_of(SOURCE)), []
    monkeypatch.setattr(ops, "launcher", SimpleNamespace(launch=lambda *launch: launches.append(launch)))
    s = np.zeros((5, 40, 40, 8), np.float32)
    ops.states(s, s, None, 1.0, None, None, np.zeros(5, np.float32), np.empty(ops.scratch_size(5, s[0].size), "f"))
    name, _, grid, block, arguments = launches[-1]
    assert (name, grid, block) == ("add_partials", (5, 1, 1), (32, 1, 1))
    assert arguments[2:] == (13, 40 * 40 * 8)  # 12800 units, 4 a thread, 256 threads a block


@activations
@pytest.mark.parametrize("number", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5, 3), (2, 64), (1,)])
def test_values_and_slopes(make_ops, name, number, shape):
    """At the ends of the range a clip has no slope; far outside that of a smooth one is tiny and not zero."""
    ends = [0.0, 1.0, 2.0, 6.0, -1e-3, 40.0, -40.0]
    g = np.resize([*ends, *np.linspace(-3, 7, 29)], (4, *shape)).astype(number)
    kind, (a, b, c) = CODES[name]
    x = g.astype(float)
    if kind == "clip":
        expected = np.where((a * x > b) & (a * x < c), a, 0)
    else:
        expected = b * c / np.cosh(c * (x - a)) ** 2
    ops, values, slopes = make_ops(name), np.full_like(g, np.nan), np.full_like(g, np.nan)
    ops.value(g, values)
    ops.slope(g, slopes)
    rtol = {"float32": 1e-5, "float64": 1e-13}[number]  # of e^-160
    np.testing.assert_allclose(values, SIGMA[name](x), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(slopes, expected, rtol=rtol, atol=1e-37 if number == "float32" else 0)
    ops.slope(g, g)
    np.testing.assert_array_equal(g, slopes)


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
@pytest.mark.parametrize("algorithm", [ep.Backpropagation, ep.BackpropagationThroughTime, ep.EquilibriumPropagation])
def test_slopes_are_one_launch_a_layer(fake_gpu, algorithm):
    """As array code each of them is four launches for every four million units."""
    net = network("conv", fake_gpu, precision="float16", feedback=0.5)
    learner = algorithm(net, **({"scheme": "tangent"} if algorithm is ep.EquilibriumPropagation else {}))
    kernels = fake_gpu.launcher(SOURCE).launched
    del kernels[:]
    learner.step(batch_of(net, 4))
    steps = learner.unrolled_steps if algorithm is ep.BackpropagationThroughTime else 1
    assert sum(name.startswith("slopes") for name in kernels) == net.depth * steps
    assert {learner.network.energy.updates.slope_bytes((1 << 20, 8))} == {0}


# type to compute in, storage of what moves, type of what is written
SEEN_TYPES = [("float32", "float32", "float32"), ("float64", "float64", "float64"), ("float32", "float16", "float16"),
              ("float32", "float16", "float32"), ("float32", "bfloat16", "bfloat16")]  # fmt: skip
SEEN_SHAPES = [((5, 7, 16), None), ((10,), None), ((6, 6, 8), 2), ((7, 5, 3), 2), ((9, 10, 16), 3), ((1,), None)]


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize(("shape", "pool"), SEEN_SHAPES)
@pytest.mark.parametrize("types", SEEN_TYPES)
@pytest.mark.parametrize("what", ["moved", "at rest", "state"])
@pytest.mark.parametrize("name", ["half_hard_sigmoid", "sigmoid"])
def test_what_a_loss_sees(make_ops, rng, name, what, types, shape, pool, phases):
    """A deviation on a rest point that phases share, the rest point alone, or a state; its means over full windows."""
    number, stored, seen = map(dtype_of, types)
    g = (2 * rng.standard_normal((SAMPLES, *shape))).astype(number)
    s = rng.standard_normal((phases * SAMPLES, *shape)).astype(stored)
    scale, ops = (1.0, 0.25)[what == "moved"], make_ops(name)
    expected = np.tile(SIGMA[name](g.astype(float)), (phases, *[1] * len(shape)))
    if what == "state":
        expected = s.astype(float)
    elif what == "moved":
        expected = expected + scale * s.astype(float)
    if pool:
        height, width = shape[0] // pool, shape[1] // pool
        windows = expected[:, : height * pool, : width * pool]
        expected = windows.reshape(len(s), height, pool, width, pool, shape[2]).mean(axis=(2, 4))
    out = np.full(expected.shape, np.nan, seen)
    given = (None if what == "at rest" else s, scale, None if what == "state" else g)
    ops.see(*given, pool, out, np.full(UpdateOps.scratch_size(len(s), s[0].size), np.nan, number))
    spacing = {"float64": 1e-14, "float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[types[2]]
    np.testing.assert_allclose(
        out.astype(float), expected, rtol=1.01 * spacing, atol=1e-6 if number == "float32" else 1e-14
    )


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
def test_what_a_loss_sees_is_one_launch_and_wide():
    activation = copy.copy(ACTIVATIONS["relu"])
    activation.code = CODES["relu"]
    ops, g = CudaUpdateOps(np, activation, launcher_of(SOURCE)), np.zeros((2, 4, 4, 8), np.float32)
    del launcher_of(SOURCE).launched[:]
    eps, out = np.zeros((4, 4, 4, 8), np.float16), np.zeros((4, 2, 2, 8), np.float16)
    ops.see(eps, 0.5, g, 2, out, None)
    ops.see(None, 0.5, g, None, np.zeros((4, 4, 4, 8), np.float16), None)
    ops.see(eps, 1.0, None, None, np.zeros((4, 4, 4, 8), np.float32), None)
    kinds = ["see<__half, __half, 8, 0>"] * 2 + ["see<__half, float, 8, 3>"]
    assert launcher_of(SOURCE).launched == kinds
    with pytest.raises(TypeError, match="for float32 cannot read an array of float64"):
        ops.see(eps, 0.5, g.astype(float), 2, out, None)


@types_and_shapes
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("name", ["half_hard_sigmoid", "tanh"])
def test_mean_and_difference_of_two_phases(make_ops, rng, name, types, shape, phases):
    """Both in the places of the phases, where there are two; the size of the difference as a part of a batch's mean."""
    stored, number = dtype_of(types[0]), arithmetic(dtype_of(types[0]))
    eps = (0.1 * rng.standard_normal((2 * SAMPLES, *shape))).astype(stored)
    g = rng.standard_normal((SAMPLES, *shape)).astype(number)
    plus, minus = eps[:SAMPLES].astype(float, copy=True), eps[SAMPLES:].astype(float, copy=True)
    first, second = eps[:SAMPLES], eps[SAMPLES:] if phases == 2 else None
    mean = first if phases == 2 else np.full_like(first, np.nan)
    work, size = [np.full(g.shape, np.nan, number) for _ in range(2)], np.ones(1, number)
    ops = make_ops(name)
    difference = ops.compare(first, second, g, 0.25, mean, size, 3.0, work)
    assert difference is (first if phases == 1 else second)
    expected = plus - minus if phases == 2 else plus
    tolerance = rounding(stored)
    np.testing.assert_allclose(difference.astype(float), expected, rtol=tolerance, atol=tolerance * 1e-3)
    total = SIGMA[name](g.astype(float)) + 0.25 * (plus + minus if phases == 2 else plus)
    np.testing.assert_allclose(mean.astype(float), total, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(size, 1 + abs(difference.astype(float)).mean() / 3, rtol=rounding(number))
    if phases == 1:
        ops.compare(first, None, g, 0.0, mean, size, 3.0, work)
        np.testing.assert_allclose(mean.astype(float), SIGMA[name](g.astype(float)), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")
def test_mean_and_difference_are_two_launches():
    activation = copy.copy(ACTIVATIONS["relu"])
    activation.code = CODES["relu"]
    ops, g = CudaUpdateOps(np, activation, launcher_of(SOURCE)), np.zeros((2, 4, 4, 8), np.float32)
    eps, size = np.zeros((4, 4, 4, 8), np.float16), np.zeros(1, np.float32)
    del launcher_of(SOURCE).launched[:]
    ops.compare(eps[:2], eps[2:], g, 0.5, eps[:2], size, 1.0, (None, np.empty_like(g)))
    assert launcher_of(SOURCE).launched == ["compare_phases<__half, 8, 0>", "add_partials<float>"]
    with pytest.raises(TypeError, match="for float32 cannot read an array of float64"):
        ops.compare(eps[:2], eps[2:], g.astype(float), 0.5, eps[:2], size, 1.0, (None, np.empty_like(g)))
