"""All gradients of a learner in one run of memory: where each lies, scaling, norms, copies."""

import copy
import pickle

import numpy as np
import pytest
from small import batch_of, gradients_of, network, on_host

import cupyep as ep
from cupyep.learning.gradients import ALIGNED, packed_size
from cupyep.ops.reduction import SOURCE

SHAPES = {"a.weight": (3, 7), "a.bias": (7,), "b.weight": (2, 8), "c.weight": (5,), "c.bias": (1,)}


@pytest.fixture
def arrays(rng):
    return {path: rng.standard_normal(shape) for path, shape in SHAPES.items()}


def test_each_lies_in_the_packed_array_in_order(arrays):
    gradients = gradients_of(arrays)
    assert list(gradients) == list(SHAPES)
    assert len(gradients) == len(SHAPES)
    assert gradients.packed.size == packed_size(SHAPES) == 32 + 16 + 16 + 16 + 16
    start = 0
    for path, array in arrays.items():
        np.testing.assert_array_equal(gradients[path], array)
        np.testing.assert_array_equal(gradients.packed[start : start + array.size], array.ravel())
        start += -(-array.size // ALIGNED) * ALIGNED
    assert np.count_nonzero(gradients.packed) == sum(array.size for array in arrays.values()), "zeros between them"
    gradients.packed[...] = 3.0
    assert all((gradient == 3.0).all() for gradient in gradients.values())


@pytest.mark.parametrize(
    "factors", [{"a": 2.0, "b": 2.0}, {"a": 2.0, "b": -1.0, "c": -1.0}, {"a": 1.5, "b": 2, "c": 3}]
)
def test_layers_are_scaled_by_their_factors(arrays, factors):
    gradients = gradients_of(arrays)
    gradients.scale(factors)
    for path, array in arrays.items():
        np.testing.assert_array_equal(gradients[path], array * factors.get(path[0], 1.0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_a_copy_is_one_run_of_memory_of_its_own(arrays, copied):
    gradients = gradients_of(arrays)
    other = copied(gradients)
    gradients.packed[...] = 0
    for path, array in arrays.items():
        np.testing.assert_array_equal(other[path], array)
    other.packed[...] = 1
    assert all((gradient == 1).all() for gradient in other.values())
    np.testing.assert_allclose(other.norms(), np.sqrt([32 + 16, 16, 32]))


def test_a_learner_packs_the_gradients_of_its_parameters(device, algorithm):
    """Of layers, readout and learned maps; again, after a parameter has got another shape."""
    net = network("conv", device, precision="float32")
    signals = [ep.LocalError([1, 2])]
    learner = ep.EquilibriumPropagation(net, 0.3, 3, 2, signals=signals, schedule="synchronous")
    result = learner.step(batch_of(net))
    assert list(result.gradients) == list(learner.parameters())
    assert result.gradients.packed.dtype == np.float32
    found, packed = on_host(net, result.gradients), net.device.to_numpy(result.gradients.packed)
    assert sum((g.astype(float) ** 2).sum() for g in found.values()) == pytest.approx((packed.astype(float) ** 2).sum())
    norms = net.device.to_numpy(result.gradients.norms())
    for layer, norm in zip(result.gradients.layers, norms, strict=True):
        parts = [(g.astype(float) ** 2).sum() for path, g in found.items() if path.rpartition(".")[0] == layer]
        assert norm == pytest.approx(np.sqrt(sum(parts)), rel=1e-5)
    again = learner.step(batch_of(net)).gradients
    assert again.packed is result.gradients.packed


def test_norms_of_all_layers_are_two_launches(fake_gpu, rng):
    edges = [ep.Conv2d((6, 6, 3), 8), ep.Linear((6, 6, 8), 5)]
    net = ep.Network(edges, classes=4, device=fake_gpu, feedback=1.0)
    gradients = ep.Backpropagation(net).step(rng.standard_normal((5, 6, 6, 3)), rng.integers(0, 4, 5)).gradients
    launched = fake_gpu.launcher(SOURCE).launched
    del launched[:]
    norms = net.device.to_numpy(gradients.norms())
    assert launched == ["segment_squares<float>", "segment_norms<float>"]
    found = {path: net.device.to_numpy(g) for path, g in gradients.items()}
    expected = [
        np.linalg.norm(np.r_[found[f"{name}.weight"].ravel(), found[f"{name}.bias"]]) for name in gradients.layers
    ]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
