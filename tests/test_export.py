"""Weights in PyTorch's layout, networks as ONNX graphs.

Oracles: the definition of a convolution over NCHW arrays in naive loops; onnxruntime against `Network.scores`.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import cupyep as ep
from cupyep.errors import ConfigurationError
from cupyep.export import onnx_model, torch_layout

SHAPE = (9, 7, 3)  # odd, so that pooling leaves a row and a column over, and so does the stride


def make_network(pooling="max", loss="cross_entropy", feedback=1.0, activation="hard_sigmoid", seed=1):
    """Three convolutions (the second pooled, the third with a stride), a dense layer, biases not zero."""
    first = ep.Conv2d(SHAPE, 5, kernel=1, padding=0)
    second = ep.Conv2d(first.out_shape, 6, pooling=pooling)
    third = ep.Conv2d(second.out_shape, 4, stride=2)
    layers = [first, second, third, ep.Linear(third.out_shape, 7)]
    if loss == "squared_error":
        layers.append(ep.Linear((7,), 3))
    net = ep.Network(layers, 3, loss=loss, feedback=feedback, activation=activation, seed=seed, device="cpu")
    rng = np.random.default_rng(seed)
    for array in net.parameters().values():
        if array.ndim == 1:
            array[...] = 0.1 + 0.2 * rng.standard_normal(array.shape)
    return net


def make_images(count=4, shape=SHAPE):
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


def planes(images):
    """Return (N, H, W, C) as (N, C, H, W)."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1))


def correlate(x, weight, bias, stride, padding):
    """Return the convolution of deep learning, x (C, H, W), weight (K, C, h, w), by its definition."""
    channels, height, width = x.shape
    count, _, kernel, _ = weight.shape
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    out = np.empty((count, rows, columns))
    for k in range(count):
        for y in range(rows):
            for z in range(columns):
                total = bias[k]
                for c in range(channels):
                    for i in range(kernel):
                        for j in range(kernel):
                            row, column = y * stride + i - padding, z * stride + j - padding
                            if 0 <= row < height and 0 <= column < width:
                                total += weight[k, c, i, j] * x[c, row, column]
                out[k, y, z] = total
    return out


# --- weights -------------------------------------------------------------------------------------------------------


def test_names_and_shapes():
    arrays = torch_layout(make_network())
    assert {name: array.shape for name, array in arrays.items()} == {
        "layers.0.weight": (5, 3, 1, 1), "layers.0.bias": (5,),
        "layers.1.weight": (6, 5, 3, 3), "layers.1.bias": (6,),
        "layers.2.weight": (4, 6, 3, 3), "layers.2.bias": (4,),
        "layers.3.weight": (7, 4 * 2 * 2), "layers.3.bias": (7,),
        "readout.weight": (3, 7), "readout.bias": (3,),
    }  # fmt: skip
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in arrays.values())
    assert "readout.weight" not in torch_layout(make_network(loss="squared_error"))


def test_feed_forward_pass_by_definition():
    """The exported arrays, used as PyTorch uses them, give the network's own feed-forward scores."""
    net = make_network(pooling="none")
    arrays, x = torch_layout(net), make_images(2)
    wanted = ep.Backpropagation(net).scores(net.batch(x))
    for image, scores in zip(planes(x), wanted, strict=True):
        s = image
        for n, (stride, padding) in enumerate(((1, 0), (1, 1), (2, 1))):
            u = correlate(s, arrays[f"layers.{n}.weight"], arrays[f"layers.{n}.bias"], stride, padding)
            s = np.clip(u, 0, 1)
        s = np.clip(arrays["layers.3.weight"] @ s.ravel() + arrays["layers.3.bias"], 0, 1)
        np.testing.assert_allclose(arrays["readout.weight"] @ s + arrays["readout.bias"], scores, atol=1e-5)


def test_a_pytorch_module_takes_them():
    torch = pytest.importorskip("torch")
    net = make_network()

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            convolutions = [torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(5, 6, 3, padding=1)]
            convolutions.append(torch.nn.Conv2d(6, 4, 3, stride=2, padding=1))
            self.layers = torch.nn.ModuleList([*convolutions, torch.nn.Linear(16, 7)])
            self.readout = torch.nn.Linear(7, 3)

        def forward(self, s):
            s = self.layers[0](s).clamp(0, 1)
            s = torch.nn.functional.max_pool2d(self.layers[1](s), 2).clamp(0, 1)
            s = self.layers[2](s).clamp(0, 1)
            return self.readout(self.layers[3](s.flatten(1)).clamp(0, 1))

    module, x = Module(), make_images()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in torch_layout(net).items()})
    with torch.inference_mode():
        scores = module(torch.from_numpy(planes(x))).numpy()
    np.testing.assert_allclose(scores, ep.Backpropagation(net).scores(net.batch(x)), atol=1e-5)


def test_own_layers_and_activations_are_refused():
    class Halved(ep.Linear):
        pass

    class Own(ep.Clip):
        pass

    with pytest.raises(ConfigurationError, match="layer 2 is a Halved; only Conv2d and Linear can be exported"):
        torch_layout(ep.Network([ep.Linear((4,), 3), Halved((3,), 2)], 2, device="cpu", feedback=1.0))
    pytest.importorskip("onnx")
    for activation, message in ((Own("own", 1, 0, 1), "Own has no counter"), (ep.Clip("up", 1, 1, 2), "start at 0")):
        with pytest.raises(ConfigurationError, match=message):
            onnx_model(ep.Network([ep.Linear((4,), 3)], 2, activation=activation, device="cpu", feedback=1.0), 2)


# --- ONNX ----------------------------------------------------------------------------------------------------------


def check_and_run(model, images):
    """Return what onnxruntime computes, having checked the model against the standard."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def assert_same_scores(net, steps, schedule, count=4, relaxation=1.0):
    pytest.importorskip("onnx")
    x = make_images(count, net.input_shape)
    scores = check_and_run(onnx_model(net, steps, schedule, relaxation=relaxation), planes(x))
    expected = net.scores(x, steps=steps, schedule=schedule, relaxation=relaxation)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    return scores


@pytest.mark.parametrize("feedback", [1.0, 0.1])
@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
@pytest.mark.parametrize("pooling", ["max", "average", "none"])
def test_onnxruntime_gives_the_scores_of_the_settled_network(pooling, schedule, feedback):
    net = make_network(pooling, feedback=feedback)
    few, many = (assert_same_scores(net, steps, schedule) for steps in (1, 6))
    assert np.abs(few - many).max() > 1e-3, "the steps after the first one do nothing: the test would see no feedback"


@pytest.mark.parametrize(("schedule", "relaxation"), [("synchronous", 0.6), ("evenodd", 1.7), ("sweeps", 1.4)])
def test_onnxruntime_gives_the_scores_of_relaxed_phases(schedule, relaxation):
    net = make_network("max")
    plain, relaxed = (assert_same_scores(net, 3, schedule, relaxation=omega) for omega in (1.0, relaxation))
    assert np.abs(plain - relaxed).max() > 1e-3


@pytest.mark.parametrize("pool", [2, "global"])
@pytest.mark.parametrize("arch", ["4p 6", "4 4+4 6s+6"])
def test_a_readout_of_averages(arch, pool):
    """What is left of the map is still a map with pool 2, so that the order in which it is flattened counts."""
    net = ep.build(arch, 5, (8, 8, 3), readout_pool=pool, feedback=0.5, seed=2, device="cpu", precision="float32")
    x = np.random.default_rng(4).standard_normal((3, 8, 8, 3)).astype(np.float32)
    state = net.settle(x, steps=4, schedule="sweeps").layers[-1]
    size = len(state[0]) if pool == "global" else pool
    rows = len(state[0]) // size
    means = state.reshape(3, rows, size, rows, size, -1).mean(axis=(2, 4)).reshape(3, -1)
    expected = means @ net.readout.weight + net.readout.bias
    scores = check_and_run(onnx_model(net, 4, "sweeps"), planes(x))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 1e-3, "all images have the same scores: the test would see nothing"
    exported = torch_layout(net)["readout.weight"]
    flat = means.reshape(3, rows, rows, -1).transpose(0, 3, 1, 2).reshape(3, -1)
    np.testing.assert_allclose(flat @ exported.T + net.readout.bias, expected, atol=1e-5)


@pytest.mark.parametrize("schedule", ["synchronous", "evenodd", "sweeps"])
def test_squared_error_and_many_steps(schedule):
    assert_same_scores(make_network(loss="squared_error", feedback=0.5), 40, schedule, count=1)


@pytest.mark.parametrize("activation", list(ep.ACTIVATIONS))
def test_every_activation(activation):
    assert_same_scores(make_network(activation=activation, feedback=0.5), 3, "evenodd")


@pytest.mark.parametrize("depth", [5, 7])
def test_vgg(depth):
    """Tied windows too: half of the units of a VGG are clipped to the same values."""
    net = ep.vgg(depth, width=0.02, input_shape=(32, 32, 3), feedback=1.0, gain=1.0, device="cpu")
    assert_same_scores(net, 8, "synchronous", count=2)


def test_a_dense_network_on_flat_inputs():
    pytest.importorskip("onnx")
    net = ep.Network([ep.Linear((6,), 5), ep.Linear((5,), 4)], 3, device="cpu", feedback=1.0)
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    scores = check_and_run(onnx_model(net, 5, "sweeps"), x)
    np.testing.assert_allclose(scores, net.scores(x, steps=5, schedule="sweeps"), atol=1e-5)


def test_feed_forward_networks_and_normalisation_inside_the_graph():
    pytest.importorskip("onnx")
    net, mean, std = make_network(), np.array([0.4, 0.5, 0.6]), np.array([0.1, 0.2, 0.3])
    pixels = np.random.default_rng(0).random((4, *SHAPE)).astype(np.float32)
    model = onnx_model(net, 1, mean=mean, std=std, classes=["a", "b", "c"], feedforward=True)
    x = ((pixels - mean) / std).astype(np.float32)
    np.testing.assert_allclose(
        check_and_run(model, planes(pixels)), ep.Backpropagation(net).scores(net.batch(x)), atol=1e-5
    )
    kept = {p.key: p.value for p in model.metadata_props}
    assert kept["input"] == "pixels in [0, 1], N x C x H x W"
    assert json.loads(kept["classes"]) == ["a", "b", "c"]
    assert json.loads(kept["settling"]) == {"schedule": "feedforward", "feedback": 1.0}


def test_steps_that_the_readout_does_not_see_are_left_out():
    """Two sweeps: of the last way down only the top layer's update is read, so no product of it is needed."""
    pytest.importorskip("onnx")
    kinds = [node.op_type for node in onnx_model(make_network(), 2, "sweeps").graph.node]
    assert kinds.count("Conv") == 1 + 2 + 2
    assert kinds.count("ConvTranspose") == 2
    assert kinds.count("MaxUnpool") == 1


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigurationError, match=r'pip install "cupyep\[onnx\]"'):
        onnx_model(make_network(), 1)
