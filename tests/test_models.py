"""The model table. Oracle: counting and sizes by hand."""

import numpy as np
import pytest

import cupyep as ep
from cupyep.models import CHANNELS, default_gain

SIZES = {  # sides of the state maps for 32 x 32 images, by hand: 3 x 3 with padding 1 keeps the size, a pool halves it
    5: [16, 8, 4, 1],  # the last convolution is unpadded: 4 -> 2, pooled to 1
    7: [32, 16, 16, 8, 4, 2],
    9: [32, 16, 16, 8, 8, 4, 4, 2],
    11: [32, 16, 16, 16, 8, 8, 8, 4, 4, 2],
    12: [32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 2],
    16: [32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 1],
}


@pytest.mark.parametrize("depth", SIZES)
def test_vgg_n_has_n_weight_layers(depth):
    """Readout included, whether it is a softmax or the last state."""
    for loss in ("cross_entropy", "squared_error"):
        net = ep.vgg(depth, width=0.03, loss=loss, device="cpu")
        assert sum(path.endswith(".weight") for path in net.parameters()) == depth


@pytest.mark.parametrize("depth", SIZES)
def test_sizes_and_channels(depth):
    net = ep.vgg(depth, width=1 / 64, device="cpu")
    assert [shape[0] for shape in net.state_shapes] == SIZES[depth]
    assert [shape[1] for shape in net.state_shapes] == SIZES[depth]
    # 128, 256 and 512 channels at a 64th of the width; the number doubles after the first pools and stops at 512
    assert {shape[2] for shape in net.state_shapes} == {2, 4, 8}
    channels = [shape[2] for shape in net.state_shapes]
    assert channels == sorted(channels)
    assert CHANNELS[depth].count("p") == {5: 4, 7: 4, 9: 4, 11: 4, 12: 4, 16: 5}[depth]


def test_published_vgg5():
    """Laborieux et al. (2021): 128, 256, 512, 512 channels, four pools, 10 outputs."""
    net = ep.vgg(5, width=1.0, device="cpu", input_shape=(32, 32, 3))
    assert net.state_shapes == [(16, 16, 128), (8, 8, 256), (4, 4, 512), (1, 1, 512)]
    assert net.parameters()["layers.1.weight"].shape == (3, 3, 3, 128)
    assert net.parameters()["readout.weight"].shape == (512, 10)


@pytest.mark.parametrize(
    ("depth", "size", "channels"), [(5, 28, 1), (5, 16, 3), (7, 28, 1), (7, 16, 3), (9, 28, 1), (11, 16, 3)]
)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_other_image_sizes_settle_and_learn(depth, size, channels, pooling):
    net = ep.vgg(depth, input_shape=(size, size, channels), width=0.02, pooling=pooling, device="cpu")
    images = np.random.default_rng(0).uniform(0, 1, (2, size, size, channels))
    result = ep.EquilibriumPropagation(net, free_steps=3, nudged_steps=2).step(images, [3, 7])
    assert set(result.gradients) == set(net.parameters())
    assert float(abs(result.gradients["readout.weight"]).max()) > 0
    assert net.predict(images, steps=3).shape == (2,)


@pytest.mark.parametrize(
    ("depth", "shape", "parts"),
    [
        (5, (15, 15, 3), ["15x15", "VGG-5", "4 times", "at least 16 pixels"]),
        (11, (8, 8, 3), ["8x8", "VGG-11", "at least 16 pixels"]),
        (16, (28, 28, 1), ["28x28", "VGG-16", "5 times", "at least 32 pixels"]),
        (7, (32, 4, 3), ["32x4", "VGG-7", "at least 16 pixels"]),
    ],
)
def test_too_small_images_are_one_line(depth, shape, parts):
    with pytest.raises(ep.ConfigurationError) as error:
        ep.vgg(depth, input_shape=shape, device="cpu")
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("depth", SIZES)
def test_the_smallest_size_named_is_enough(depth):
    size = 2 ** CHANNELS[depth].count("p")
    assert ep.vgg(depth, input_shape=(size, size, 3), width=0.01, device="cpu").state_shapes[-1][0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classes": 7, "input_shape": (16, 20, 1), "width": 0.05, "activation": "tanh", "pooling": "average"},
        {"loss": "squared_error", "feedback": 0.1, "gain": 0.9, "seed": 5, "precision": "float64"},
        {"gain": [0.4, 0.7, 0.6, 0.3]},
    ],
)
def test_config_rebuilds_the_network(options):
    """The same parameters, shapes and settled states, from the configuration alone."""
    net = ep.build("vgg5", **({"width": 0.03, "device": "cpu"} | options))
    again = ep.build(**net.config, device="cpu")
    assert again.config == net.config
    assert again.parameters().keys() == net.parameters().keys()
    for path, p in net.parameters().items():
        np.testing.assert_array_equal(p, again.parameters()[path])
        assert p.dtype == again.parameters()[path].dtype
    x = np.random.default_rng(0).uniform(0, 1, (2, *net.input_shape))
    for a, b in zip(net.settle(x, steps=3).layers, again.settle(x, steps=3).layers, strict=True):
        np.testing.assert_array_equal(a, b)


def test_seed_and_width_matter():
    a, b = (ep.vgg(5, width=0.03, seed=seed, device="cpu") for seed in (0, 1))
    assert not np.array_equal(a.parameters()["layers.1.weight"], b.parameters()["layers.1.weight"])
    assert ep.vgg(5, width=1e-6, device="cpu").state_shapes[0] == (16, 16, 1)


def test_default_gain_by_activation_and_feedback():
    """A slope of one half wants twice the gain; strong feedback wants less."""
    assert default_gain("half_hard_sigmoid", 1.0) == 2 * default_gain("hard_sigmoid", 1.0)
    assert default_gain("hard_sigmoid", 0.1) > default_gain("hard_sigmoid", 1.0)
    assert default_gain(ep.ACTIVATIONS["half_hard_sigmoid"], 0.1) == default_gain("half_hard_sigmoid", 0.1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ep.build("vgg6"), "did you mean 'vgg"),
        (lambda: ep.build("resnet"), "choose from vgg5, vgg7"),
        (lambda: ep.vgg(6), "there is no VGG of depth 6"),
        (lambda: ep.vgg(5, width=0), "width must be above 0"),
        (lambda: ep.vgg(5, classes=1), "classes must be an integer of at least 2"),
        (lambda: ep.vgg(5, input_shape=(32, 32)), "input_shape"),
        (lambda: ep.vgg(5, pooling="none"), "unknown pooling 'none'"),
        (lambda: ep.vgg(5, loss="cross-entropy"), "did you mean 'cross_entropy'"),
    ],
)
def test_wrong_arguments_are_one_line(make, word):
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        make()
    assert "\n" not in str(error.value)
