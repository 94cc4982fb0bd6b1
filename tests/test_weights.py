"""Parametrisations of weights, on arrays and through standardize.cu in the shim.

Oracle: the formulas of the docstring, filter by filter in plain loops in float64; finite differences; closed forms.
"""

from __future__ import annotations

import functools
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from cuda_cpu import ShimLauncher, compiler
from strict import StrictDevice, no_host_reads

import cupyep as ep
from cupyep import weights
from cupyep.errors import ConfigurationError
from cupyep.export import load_torch_layout, torch_layout
from cupyep.ops import standardize
from cupyep.ops.standardize import SOURCE, CudaStandardizeOps, StandardizeOps
from cupyep.weights import PARAMETRISATIONS, Plain, Standardized, get_parametrisation

SHAPES = [
    (3, 3, 4, 16),  # packs of two blocks
    (27, 10),  # no packs, two blocks, the last not filled
    (700, 8),  # every thread has rows of its own
    (2, 1),  # one filter of two weights
    (1, 1, 5, 4),
]
KINDS = {"trained": Standardized(1.3), "fixed": Standardized(0.7, trained=False), "epsilon": Standardized(epsilon=0.5)}


@functools.cache
def launcher():
    return ShimLauncher(SOURCE)


@pytest.fixture(params=["arrays", "pieces", "kernels"])
def ops(request, monkeypatch):
    """Every way to compute; what `Standardized` takes."""
    if request.param == "kernels":
        if compiler() is None:
            pytest.skip("g++ is not installed: kernels cannot run on the CPU")
        monkeypatch.setattr(weights, "standardize_ops", lambda v: CudaStandardizeOps(launcher()))
    if request.param == "pieces":
        monkeypatch.setattr(standardize, "AT_ONCE", 24)
    return request.param


def fresh(kind):
    return pickle.loads(pickle.dumps(KINDS[kind]))


def case(rng, shape, kind, dtype="float64"):
    """Return a parametrisation, its parameters (the gains unequal), and dL/dw."""
    how = fresh(kind)
    parameters = how.parameters((0.3 + 0.2 * rng.standard_normal(shape)).astype(dtype))
    if "gain" in parameters:
        parameters["gain"] *= rng.uniform(0.5, 2, shape[-1]).astype(dtype)
    return how, parameters, rng.standard_normal(shape).astype(dtype)


def forward(how, parameters):
    out = np.full_like(parameters["weight"], np.nan)
    how.forward(parameters, out)
    return out


def pullback(how, parameters, dw):
    out = {name: np.full_like(p, np.nan) for name, p in parameters.items()}
    how.pullback(dw, parameters, out)
    return out


def loop_forward(how, parameters):
    v = parameters["weight"].astype(float).reshape(-1, parameters["weight"].shape[-1])
    w = np.empty_like(v)
    for k in range(v.shape[1]):
        n, mean = len(v), sum(v[:, k]) / len(v)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in v[:, k]) / n + how.epsilon)
        gain = float(parameters["gain"][k]) if how.trained else how.gain
        for i in range(n):
            w[i, k] = gain * (v[i, k] - mean) / (deviation * math.sqrt(n))
    return w.reshape(parameters["weight"].shape)


def loop_pullback(how, parameters, dw):
    """The whole Jacobian of every filter: dw_i/dv_j = g/sqrt(n) ((i == j) - 1/n)/s - (v_i - m)(v_j - m)/(n s^3)."""
    shape = dw.shape
    v, dw = (a.astype(float).reshape(-1, shape[-1]) for a in (parameters["weight"], dw))
    dv, dgain, n = np.empty_like(v), np.empty(shape[-1]), len(v)
    for k in range(shape[-1]):
        d = v[:, k] - v[:, k].mean()
        s = math.sqrt((d**2).mean() + how.epsilon)
        gain = float(parameters["gain"][k]) if how.trained else how.gain
        jacobian = (np.eye(n) - 1 / n) / s - np.outer(d, d) / (n * s**3)
        dv[:, k] = gain / math.sqrt(n) * jacobian.T @ dw[:, k]
        dgain[k] = dw[:, k] @ d / (s * math.sqrt(n))
    return {"weight": dv.reshape(shape), **({"gain": dgain} if how.trained else {})}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions_follow_the_loops(ops, rng, shape, kind, dtype):
    how, parameters, dw = case(rng, shape, kind, dtype)
    kept = {name: p.copy() for name, p in (parameters | {"dw": dw}).items()}
    w = forward(how, parameters)
    found, expected = pullback(how, parameters, dw), loop_pullback(how, parameters, dw)
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    np.testing.assert_allclose(w, loop_forward(how, parameters), rtol=tolerance, atol=tolerance)
    assert found.keys() == expected.keys() == parameters.keys()
    filters = parameters["weight"].reshape(-1, shape[-1])
    size = np.abs(dw).max() / (filters.std(axis=0).min() * math.sqrt(len(filters)))  # of the terms of dv
    for name, gradient in found.items():
        scale = max(size, np.abs(expected[name]).max())  # of two weights the gradient is 0 but for epsilon
        np.testing.assert_allclose(gradient, expected[name], rtol=tolerance, atol=tolerance * scale)
        assert gradient.dtype == w.dtype == dtype
    assert all(np.array_equal(p, kept[name]) for name, p in (parameters | {"dw": dw}).items()), (
        "inputs are not modified"
    )
    in_place = parameters | {"weight": dw}
    if "gain" in in_place:
        in_place["gain"] = np.empty_like(parameters["gain"])
    how.pullback(dw, parameters, in_place)
    np.testing.assert_array_equal(dw, found["weight"], "the gradient of w may be overwritten")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (5, 3)])
def test_gradients_are_those_of_a_loss(ops, rng, shape, kind):
    """A quartic loss of w: the error of central differences falls as h^2."""
    how, parameters, target = case(rng, shape, kind)
    weight = rng.standard_normal(shape)

    def loss():
        r = forward(how, parameters) - target
        return float((weight * r**2 + 0.3 * r**4).sum())

    r = forward(how, parameters) - target
    gradients = pullback(how, parameters, 2 * weight * r + 1.2 * r**3)
    for name, p in parameters.items():
        direction = rng.standard_normal(p.shape)
        slope, start, errors = float((gradients[name] * direction).sum()), p.copy(), []
        for h in (4e-3, 2e-3, 1e-3):
            sides = []
            for sign in (1, -1):
                p[...] = start + sign * h * direction
                sides.append(loss())
            p[...] = start
            errors.append(abs((sides[0] - sides[1]) / (2 * h) - slope))
        assert errors[2] < 1e-4 * (1 + abs(slope))
        np.testing.assert_allclose(np.divide(errors[:2], errors[1:]), 4, rtol=0.1)


def test_a_network_whose_optimizer_owns_v(rng):
    """The way of a step: forward, gradients of w by the learner, pullback in place; against differences of its loss."""
    edges = [ep.Conv2d((6, 6, 3), 4, pooling="average"), ep.Linear((3, 3, 4), 5)]
    net = ep.Network(edges, classes=3, activation="tanh", precision="float64", seed=1, feedback=1.0)
    images, labels = rng.standard_normal((7, 6, 6, 3)), rng.integers(0, 3, 7)
    learner, hows = ep.Backpropagation(net), [Standardized(0.8) for _ in edges]
    owned = [how.parameters(edge.weight.copy()) for how, edge in zip(hows, edges, strict=True)]

    def step():
        for how, parameters, edge in zip(hows, owned, edges, strict=True):
            how.forward(parameters, edge.weight)
        return learner.step(images, labels)

    result = step()
    for n, (how, parameters) in enumerate(zip(hows, owned, strict=True), 1):
        dw = result.gradients[f"layers.{n}.weight"]
        out = {"weight": dw, "gain": np.empty(dw.shape[-1])}
        how.pullback(dw, parameters, out)
        for name, p in parameters.items():
            direction, start, h = rng.standard_normal(p.shape), p.copy(), 1e-5
            slope, losses = float((out[name] * direction).sum()), []
            for sign in (1, -1):
                p[...] = start + sign * h * direction
                losses.append(step().loss)
            p[...] = start
            assert abs(slope) > 1e-3
            np.testing.assert_allclose((losses[0] - losses[1]) / (2 * h), slope, rtol=1e-6)
        step()


def test_filters_have_mean_0_and_a_norm_of_their_gain(ops, rng):
    """So inputs of unit mean square that are independent give drives of variance g^2."""
    how, parameters, _ = case(rng, (3, 3, 6, 8), "trained")
    w = forward(how, parameters).reshape(-1, 8)
    np.testing.assert_allclose(w.sum(axis=0), 0, atol=1e-13)
    np.testing.assert_allclose((w**2).sum(axis=0), parameters["gain"] ** 2, rtol=1e-6)


def test_shift_and_scale_of_a_filter_change_nothing(ops, rng):
    how, parameters, dw = case(rng, (3, 3, 4, 8), "trained")
    how.epsilon = 1e-30
    w, gradients = forward(how, parameters), None
    gradients = pullback(how, parameters, dw)
    v, factor = parameters["weight"], rng.uniform(0.2, 5, 8)
    d = v - v.mean(axis=(0, 1, 2))
    dv = gradients["weight"]
    np.testing.assert_allclose(dv.sum(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((dv * d).sum(axis=(0, 1, 2)), 0, atol=1e-12)
    v[...] = factor * v + rng.standard_normal(8)
    np.testing.assert_allclose(forward(how, parameters), w, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(pullback(how, parameters, dw)["weight"], dv / factor, rtol=1e-10, atol=1e-12)


def test_a_constant_filter(ops, rng):
    """w is 0 and both gradients are finite: dv = g (dw - mean dw) / sqrt(epsilon n), dgain = 0."""
    how, parameters, dw = case(rng, (3, 3, 4, 8), "trained")
    before = forward(how, parameters)
    parameters["weight"][..., 2] = 0.25  # sums of it are exact
    w = forward(how, parameters)
    gradients = pullback(how, parameters, dw)
    assert np.all(w[..., 2] == 0)
    np.testing.assert_array_equal(w[..., 3], before[..., 3])
    expected = parameters["gain"][2] * (dw[..., 2] - dw[..., 2].mean()) / math.sqrt(how.epsilon * 36)
    np.testing.assert_allclose(gradients["weight"][..., 2], expected, rtol=1e-9)
    assert gradients["gain"][2] == 0


@pytest.mark.parametrize("value", [0.1, 1e-20, 0.0])
def test_a_constant_filter_of_any_number_stays_small(ops, value):
    how = Standardized()
    parameters = how.parameters(np.full((3, 3, 3, 4), value, np.float32))
    assert np.abs(forward(how, parameters)).max() < 1e-4
    gradients = pullback(how, parameters, np.linspace(-1, 1, 108, dtype=np.float32).reshape(3, 3, 3, 4))
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_a_filter_of_one_weight_is_refused_and_0(ops):
    how, v = Standardized(trained=False), np.array([[2.0, -3.0]])
    with pytest.raises(ConfigurationError, match=r"shape \(1, 2\) has filters of one number"):
        how.parameters(v)
    parameters = {"weight": v}
    assert forward(how, parameters).tolist() == [[0, 0]]
    assert pullback(how, parameters, np.ones((1, 2)))["weight"].tolist() == [[0, 0]]


def test_what_diverged_stays_visible(ops):
    """In its filter, and in no other."""
    how = Standardized()
    parameters = how.parameters(np.linspace(0, 1, 32, dtype=np.float32).reshape(8, 4))
    parameters["weight"][3, 1] = np.nan
    w = forward(how, parameters)
    dv = pullback(how, parameters, np.ones((8, 4), np.float32))["weight"]
    for array in (w, dv):
        assert np.isnan(array).all(axis=0).tolist() == [False, True, False, False]
        assert np.isfinite(array[:, [0, 2, 3]]).all()


@pytest.mark.parametrize("trained", [True, False])
def test_a_step_allocates_no_array(rng, trained):
    how = Standardized(trained=trained)
    parameters = how.parameters(rng.standard_normal((3, 3, 64, 128)).astype(np.float32))
    w, out = np.empty_like(parameters["weight"]), {name: np.empty_like(p) for name, p in parameters.items()}
    how.forward(parameters, w)
    kept = how._statistics.size + how._scratch.size
    assert how.numbers(w.shape) == kept < w.size + 5 * 128 + 1
    tracemalloc.start()
    for _ in range(2):
        how.forward(parameters, w)
        how.pullback(w, parameters, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40_000, f"{peak} bytes, more than NumPy's buffers of 8192 numbers; the weight has {w.nbytes}"
    assert Standardized().numbers((3, 3, 512, 512)) < 2**16 + 6 * 512


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_parameters_have_the_shapes_that_are_told(kind, shape):
    how = Plain() if kind == "plain" else fresh(kind)
    assert how.shapes(shape) == {name: p.shape for name, p in how.parameters(np.ones(shape)).items()}


@pytest.mark.parametrize("weights", ["standardized", "standardized-fixed"])
def test_a_standardized_weight_is_drawn_without_its_gain(weights):
    """Variance 1 / fan_in: the gain is beside it, and must not change how fast v turns."""
    edge = ep.Conv2d((8, 8, 20), 60)
    edge.initialize(np.random.default_rng(0), 3.0, ep.get_device("cpu"), np.float64, weights)
    v = edge.parameters()["weight"]
    assert v.std() == pytest.approx(1 / np.sqrt(180), rel=0.02)  # 10800 draws
    edge.make_weight()
    np.testing.assert_allclose(np.linalg.norm(edge.weight.reshape(180, 60), axis=0), 3.0, rtol=1e-4)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3, 0.5])
def test_a_weight_that_is_assigned_is_what_is_made_of_it(rng, epsilon):
    """However large epsilon is; v is as large as one that is drawn, the mean square of a filter 1 / fan_in."""
    how, weight = Standardized(epsilon=epsilon), rng.standard_normal((3, 3, 4, 6))
    weight -= weight.mean(axis=(0, 1, 2))
    parameters, w = how.parameters(np.ones(weight.shape)), np.empty(weight.shape)
    how.assign(parameters, weight)
    how.forward(parameters, w)
    np.testing.assert_allclose(w, weight, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose((parameters["weight"] ** 2).mean(axis=(0, 1, 2)), 1 / 36)


def test_plain_is_the_parameter_itself(rng):
    how, v = Plain(), rng.standard_normal((3, 4))
    parameters = how.parameters(v)
    assert parameters["weight"] is v
    assert (how.shares, Standardized.shares) == (True, False)
    how.forward(parameters, v)
    w, dw = forward(how, parameters), rng.standard_normal((3, 4))
    np.testing.assert_array_equal(w, v)
    np.testing.assert_array_equal(pullback(how, parameters, dw)["weight"], dw)
    how.pullback(dw, parameters, {"weight": dw})
    assert how.numbers((3, 4)) == 0


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_scale_multiplies_w(rng, kind):
    how = Plain() if kind == "plain" else fresh(kind)
    parameters = how.parameters(rng.standard_normal((6, 4)))
    w = forward(how, parameters)
    how.scale(parameters, 2.5)
    np.testing.assert_allclose(forward(how, parameters), 2.5 * w, rtol=1e-14)


def test_statistics_are_those_of_one_weight(rng):
    how, parameters, dw = case(rng, (6, 4), "trained")
    other = how.parameters(rng.standard_normal((6, 4)))
    out = {name: np.empty_like(p) for name, p in parameters.items()}
    for first in ([], [other]):
        for given in first:
            forward(how, given)
        with pytest.raises(ConfigurationError, match="give each weight a parametrisation of its own"):
            how.pullback(dw, parameters, out)
    forward(how, parameters)
    how.pullback(dw, parameters | {"weight": parameters["weight"].view()}, out)
    with pytest.raises(ConfigurationError, match="array of its own"):
        how.forward(parameters, parameters["weight"])
    with pytest.raises(ConfigurationError, match="must be C-contiguous"):
        how.forward({"weight": np.ones((4, 6)).T}, np.empty((6, 4)))


def test_names_and_settings():
    found = {name: get_parametrisation(name, (3, 4), 0.5) for name in PARAMETRISATIONS}
    assert [type(how) for how in found.values()] == [Plain, Standardized, Standardized]
    assert [(how.gain, how.trained) for how in list(found.values())[1:]] == [(0.5, True), (0.5, False)]
    with pytest.raises(
        ConfigurationError, match="unknown parametrisation of weights 'stand.*; did you mean 'standardized'"
    ):
        get_parametrisation("standardised", (3, 4))
    with pytest.raises(ConfigurationError, match="unknown parametrisation of weights '3'"):
        get_parametrisation(3, (3, 4))
    for how, message in [({"gain": 0}, "gain must be above 0"), ({"epsilon": 0.0}, "epsilon must be above 0"),
                         ({"trained": 1}, "trained must be True or False")]:  # fmt: skip
        with pytest.raises(ConfigurationError, match=message):
            Standardized(**how)


def on_device(device, rng, shape):
    """The same weight on the host and there: w and gradients of both, and what was kept there."""
    v, dw = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    results = []
    for asarray in (np.array, device.asarray):
        how = Standardized(0.8)
        parameters = how.parameters(asarray(v))
        w, out = asarray(v.copy()), {name: asarray(np.empty(p.shape, np.float32)) for name, p in parameters.items()}
        with no_host_reads():
            how.forward(parameters, w)
            how.pullback(asarray(dw), parameters, out)
        results.append([w, *out.values()])
    for host, there in zip(*results, strict=True):
        np.testing.assert_allclose(device.to_numpy(there), host, rtol=2e-5, atol=1e-6)
    return how


def test_arrays_of_another_module(rng):
    on_device(StrictDevice(), rng, (3, 3, 4, 8))


def test_a_real_device(device, rng):
    on_device(device, rng, (3, 3, 16, 24))


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (20, 10)])
def test_a_gpu_takes_one_launch_a_direction(fake_gpu, rng, shape):
    how = on_device(fake_gpu, rng, shape)
    launched = fake_gpu.launcher(SOURCE).launched
    assert [name.partition("<")[0] for name in launched] == ["standardize", "standardize_pullback"]
    assert how._statistics.size + how._scratch.size == how.numbers(shape, is_gpu=True) == 2 * shape[-1]


def test_kernels_are_for_their_type(ops):
    if ops == "kernels":
        how = Standardized()
        with pytest.raises(TypeError, match="a kernel for float32 cannot read an array of float64"):
            how.forward(how.parameters(np.ones((4, 4), np.float32)), np.empty((4, 4)))
    assert StandardizeOps().scratch_shape((5, 3))[1] == 3


@pytest.mark.parametrize("weights", ["standardized", "standardized-fixed"])
def test_a_graph_of_standardized_weights_takes_images_of_one_channel(weights, tmp_path):
    """Its skip from the image has filters of one number: they stay plain, learn, are saved, exported and read."""
    options = {"width": 1 / 16, "input_shape": (8, 8, 1), "weights": weights, "device": "cpu", "feedback": 0.1}
    net = ep.build("hopfield-resnet13", 10, **options)
    skip = next(edge for edge in net.layers if edge.weight_shape[:-1] == (1, 1, 1))
    assert isinstance(skip.parametrisation, Plain)
    assert all(isinstance(edge.parametrisation, Standardized) for edge in net.layers if edge is not skip)
    assert skip.weight.any()
    x = np.random.default_rng(0).random((3, 8, 8, 1), dtype=np.float32)
    batch, path = ep.Batch(x, np.array([0, 1, 2])), "layers.block1_2.image.weight"
    settled = net.settle(x, steps=200, schedule="evenodd")
    ours = ep.EquilibriumPropagation(net, scheme="tangent", nudged_steps=60, schedule="sweeps")
    truth = ep.BackpropagationThroughTime(net, unrolled_steps=120).step_from(batch, settled).gradients[path].copy()
    np.testing.assert_allclose(ours.step_from(batch, settled).gradients[path], truth, rtol=1e-4, atol=1e-6)
    before = skip.weight.copy()
    ep.SGD(ours.parameters(), learning_rate=0.1).step(ours.step(batch).gradients)
    assert (skip.weight != before).any()
    net.save(tmp_path / "net.h5")
    again = ep.Network.load(tmp_path / "net.h5", device="cpu")
    other = ep.build("hopfield-resnet13", 10, **options, seed=1)
    if weights == "standardized":
        load_torch_layout(other, torch_layout(net))
        np.testing.assert_allclose(other.scores(x), net.scores(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(again.scores(x), net.scores(x))
